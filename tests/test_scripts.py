"""Every script end to end, as a user starts it, with tiny settings; and the mistakes a user makes."""
import json
import os
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, shared

TINY = ("--preset demo --batch_size 4 --num_steps 3 --d_warmup 1 --prefix_tokens 16 --reasoning_tokens 4 --completion_tokens 12 "
        "--echo_tokens 4 --floor_sequences 6 --seeds 2 --rank 4").split()
METRICS = """step reward p_real length_score baseline advantage_sd g_loss kl kl_after_d entropy logp_gap d_loss d_acc_real d_acc_generated
    g_grad_norm d_grad_norm g_lr d_lr kl_after_g think_closed num_think num_completion distinct_2 coherence skipped seconds sample_seconds update_seconds
    tokens_per_second memory_gb""".split()
VERDICT = "step row text verdict immediate d_value think reply n_think".split()
ROLLOUT = "step prefix sep truth think completion reward p_real length_score n_think n_completion think_closed".split()


def run(*words, script="train.py", timeout=200, **kwargs):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, ROOT / script, *map(str, words)], capture_output=True, text=True, timeout=timeout, env=env, **kwargs)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of the demo with tiny settings, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "one"
    told = run(*TINY, "--out_dir", out)
    assert told.returncode == 0, told.stderr
    return out, told.stdout


def test_a_run_leaves_what_is_promised(finished):
    out, told = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"args.json", "metrics.jsonl", "rollouts.jsonl", "floor.jsonl", "ckpt", "mauve.json", "result.json", "features.npz"}
    metrics, rollouts, floor = (lines(out / f"{name}.jsonl") for name in ("metrics", "rollouts", "floor"))
    assert [row["step"] for row in metrics] == [0, 1, 2] and all(set(METRICS) <= set(row) for row in metrics)
    assert [row["step"] for row in rollouts] == [0] * 4 + [1] * 4 + [2] * 4 and all(list(row) == ROLLOUT for row in rollouts)
    assert [row["prefix"] for row in floor] == [row["prefix"] for row in rollouts[-6:]] and all(list(row) == ROLLOUT for row in floor)
    result = json.loads((out / "result.json").read_text())
    assert {"mauve", "floor", "ceiling", "mauve_sd", "floor_sd", "ceiling_sd", "seconds"} <= set(result)
    assert result["num_sequences"] == 6 and result["num_steps"] == 3
    provenance = json.loads((out / "args.json").read_text())
    assert provenance["args"]["batch_size"] == 4 and "torch" in provenance["versions"] and "commit" in provenance
    assert {path.name for path in (out / "ckpt").iterdir()} >= {"generator", "discriminator", "head.safetensors", "state.pt"}
    assert (out / "ckpt" / "generator" / "adapter_model.safetensors").exists()
    for word in ("floor", "result", "ceiling", "left", "warm-up 1/1", "step 2/3"):
        assert word in told


@pytest.fixture(scope="module")
def reasoned(tmp_path_factory):
    """The same with the discriminator that reasons."""
    out = tmp_path_factory.mktemp("runs") / "reasoned"
    told = run(*TINY, "--disc", "reason", "--out_dir", out)
    assert told.returncode == 0, told.stderr
    return out, told.stdout


def test_a_reasoning_discriminator_leaves_its_verdicts(reasoned):
    out, told = reasoned
    metrics, rollouts, verdicts = (lines(out / f"{name}.jsonl") for name in ("metrics", "rollouts", "verdicts"))
    assert all(list(row) == VERDICT for row in verdicts) and all(0 < row["d_value"] < 1 and row["n_think"] <= 6 for row in verdicts)
    for row in metrics:
        assert set(METRICS) <= set(row) and row["skipped"] == 0 and row["d_grad_norm"] > 0
        told_of = {text: [v for v in verdicts if v["step"] == row["step"] and v["text"] == text] for text in ("real", "generated")}
        written = [r for r in rollouts if r["step"] == row["step"]]
        shown = [i for i, r in enumerate(written) if r["n_completion"]]
        assert [v["row"] for v in told_of["real"]] == [v["row"] for v in told_of["generated"]] == shown
        for text, rows in told_of.items():  # d_acc comes from the loss, the verdicts from the log
            assert row[f"d_acc_{text}"] == pytest.approx(sum(v["verdict"] == text for v in rows) / len(rows))
        assert row["d_value"] == pytest.approx(sum(v["d_value"] for rows in told_of.values() for v in rows) / (2 * len(shown)))
        for v in told_of["generated"]:  # azr at a length score of n / 12
            wanted = (1 - v["d_value"]) * written[v["row"]]["length_score"] if v["verdict"] else None
            assert written[v["row"]]["reward"] == (wanted if wanted is None else pytest.approx(wanted, rel=1e-5))
            assert written[v["row"]]["p_real"] == {"real": 1, "generated": 0, None: None}[v["verdict"]]
    assert json.loads((out / "mauve.json").read_text())["reliability"]["generated"][0] and "its mean" in told


def test_the_metrics_mean_what_they_say(finished):
    metrics = lines(finished[0] / "metrics.jsonl")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[0]["baseline"] == metrics[0]["reward"]
    assert metrics[2]["kl"] > 0 and [row["g_lr"] for row in metrics] == pytest.approx([2e-3, 2e-3 * 2 / 3, 2e-3 / 3])
    for row in metrics:
        assert row["logp_gap"] < 1e-4 and row["skipped"] == 0 and 0 <= row["p_real"] <= 1 and row["num_completion"] <= 12
        assert row["g_grad_norm"] > 0 and row["d_grad_norm"] > 0 and 0 < row["distinct_2"] <= 1 and row["num_think"] <= 4
    rollouts = lines(finished[0] / "rollouts.jsonl")
    assert sum(row["reward"] for row in rollouts[:4]) / 4 == pytest.approx(metrics[0]["reward"], rel=1e-4)


def test_evaluate_measures_a_run_again_and_equally(finished):
    out, _ = finished
    before = json.loads((out / "mauve.json").read_text())
    told = run(out, script="evaluate.py")
    assert told.returncode == 0, told.stderr
    assert json.loads((out / "mauve.json").read_text()) == before and "ceiling" in told.stdout


def test_evaluate_samples_afresh_draws_a_curve_and_compares_runs(finished, tmp_path):
    import shutil
    out = tmp_path / "copy"
    shutil.copytree(finished[0], out)
    told = run(out, "--fresh", 8, "--curve", 4, script="evaluate.py")
    assert told.returncode == 0, told.stderr
    result, report = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "mauve"))
    assert [point["step"] for point in report["curve"]] == [0, 1, 2] and 0 <= result["fresh"] <= 1 and result["fresh_num_sequences"] == 8
    fresh = lines(out / "fresh.jsonl")
    seen = {row["truth"] for row in lines(out / "rollouts.jsonl")}
    assert len(fresh) == 8 and not seen & {row["truth"] for row in fresh} and all(row["n_completion"] <= 12 for row in fresh)
    told = run(out, finished[0], script="evaluate.py")
    assert told.returncode == 0 and "not told apart by +0.000" in told.stdout, told.stderr


def same_run(one, other):
    """Two runs are one but for times, memory and the folder's name."""
    noisy = {"seconds", "sample_seconds", "update_seconds", "tokens_per_second", "memory_gb"}
    texts = [{path.name: path.read_bytes() for path in folder.glob("*.jsonl") if path.name != "metrics.jsonl"} for folder in (one, other)]
    assert texts[0] == texts[1]  # of sft.py there are none
    a, b = ([{k: v for k, v in row.items() if k not in noisy} for row in lines(folder / "metrics.jsonl")] for folder in (one, other))
    assert a == b
    from safetensors.torch import load_file
    weights = [sorted((folder / "ckpt").rglob("*.safetensors")) for folder in (one, other)]
    assert len(weights[0]) == len(weights[1]) >= 2  # of one adapter or two, and of a head
    for x, y in zip(*(map(load_file, files) for files in weights)):
        assert x.keys() == y.keys() and all((x[key] == y[key]).all() for key in x)


@pytest.mark.parametrize("flags", ["", "--adapters shared", "--disc reason", "--disc reason --d_model demo-small", "--d_model demo-small"])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_end(flags, finished, reasoned, tmp_path):
    whole, out = {"": finished, "--disc reason": reasoned}.get(flags, [tmp_path / "one"])[0], tmp_path / "two"
    if not whole.exists():
        assert run(*TINY, *flags.split(), "--out_dir", whole).returncode == 0
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    words = [sys.executable, ROOT / "train.py", *TINY, *flags.split(), "--out_dir", out]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 0/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143 and f"--resume {out}" in rest
    for name in {"rollouts.jsonl", "verdicts.jsonl"} & {path.name for path in out.iterdir()}:
        with open(out / name, "a") as file:
            file.write('{"step": 7, "torn')  # as a crash after the checkpoint would leave it
    assert "result.json" not in {path.name for path in out.iterdir()}
    assert len(lines(out / "floor.jsonl")) == 6
    again = run("--resume", out)
    assert again.returncode == 0, again.stderr
    same_run(whole, out)


def test_a_run_killed_before_its_first_step_goes_on_from_the_start(finished, tmp_path):
    out = tmp_path / "two"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *TINY, "--out_dir", out], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline().startswith(str(out))
    process.kill()
    process.wait()
    again = run("--resume", out)
    assert again.returncode == 0, again.stderr
    same_run(finished[0], out)


@pytest.mark.parametrize("flags", ["--adapters shared", "--quant nf4", "--quant int8", "--micro_batch 2 --d_loss pair --d_pool last --g_reward prob --sft",
                                   "--adapters shared --micro_batch 1 --kl_coef 0 --reasoning_tokens 0 --dtype bf16",
                                   "--disc reason --adapters shared --d_think_tokens 0 --g_reward prob --micro_batch 3 --d_shuffle --dtype fp16",
                                   "--disc reason --d_model demo-small --quant nf4 --d_value_detach --d_kl_coef 0"])
def test_every_way_to_train_trains(flags, tmp_path):
    told = run(*TINY, *flags.split(), "--floor_sequences", 0, "--out_dir", tmp_path / "run")
    assert told.returncode == 0, told.stderr
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 3 and all(row["skipped"] == 0 and row["g_grad_norm"] > 0 for row in metrics)
    if "shared" in flags and "kl_coef" not in flags:
        assert metrics[-1]["kl_after_g"] != metrics[-1]["kl_after_d"] and metrics[-1]["kl_after_d"] > 0


def test_micro_batches_give_the_same_run(finished, tmp_path):
    told = run(*TINY, "--micro_batch", 3, "--floor_sequences", 0, "--out_dir", tmp_path / "run")
    assert told.returncode == 0, told.stderr
    whole, split = (lines(folder / "metrics.jsonl")[0] for folder in (finished[0], tmp_path / "run"))
    for key in ("g_loss", "d_loss", "g_grad_norm", "d_grad_norm", "entropy", "d_acc_real"):
        assert split[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


def test_real_pile_documents_and_another_architecture_train(tmp_path):
    told = run(*TINY, "--data", shared("pile/pile_200.jsonl"), "--model", shared("stories260k"), "--out_dir", tmp_path / "run")
    assert told.returncode == 0, told.stderr
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3


def test_hostile_text_trains_or_is_counted_out_and_never_reaches_the_terminal(tmp_path):
    words = "alpha \x1b[31mbeta \x07gamma\x00 \u202edelta\u202c <|im_end|> <think> </think> </prefix> <|im_start|>user \r\n \u2028 \u0085 \ufffd ".split(" ")
    texts = ["", " " * 3000, "word " * 3000, "x" * 5000, "\u05d0\u05d1 \u200f" * 500, *(" ".join(words[i % 7:] * 40) for i in range(160))]
    lines_ = [json.dumps({"text": text}).encode() for text in texts] + [b'{"text": "' + b"\xff\xfe broken utf-8 " * 200 + b'"}']
    (tmp_path / "hostile.jsonl").write_bytes(b"\n".join(lines_) + b'\n{"text": "torn')
    told = run(*TINY, "--data", tmp_path / "hostile.jsonl", "--out_dir", tmp_path / "run")
    assert told.returncode == 0 and "left out" in told.stderr, told.stderr
    assert all(c.isprintable() or c in "\n\r" for c in told.stdout + told.stderr.replace("\x1b[A", ""))  # tqdm's own
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().split("\n")[:-1]]
    assert len(rollouts) == 12 and len(lines(tmp_path / "run" / "metrics.jsonl")) == 3


# -----------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize("flags, wanted", [
    (["--g_rl", "1"], "did you mean --g_lr?"),
    (["--g-lr", "1"], "did you mean --g_lr?"),
    (["--batch_size", "four"], "--batch_size"),
    (["--batch_size", "0"], "--batch_size"),
    (["--g_lr", "-1"], "--g_lr"),
    (["--kl_coef", "nan"], "--kl_coef"),
    (["--beta1", "1"], "--beta1"),
    (["--device", "gpu"], "--device"),
    (["--quant", "nf5"], "--quant"),
    (["--num_steps", "1", "--batch_size", "3"], "--num_steps"),
    (["--data", "no/such/file"], "--data"),
    (["--micro_batch", "-1"], "--micro_batch"),
    (["--resume", "no/such/run"], "no/such/run"),
    (["--resume", "out/x", "--num_steps", "9"], "--num_steps"),
])
def test_a_wrong_flag_ends_in_one_line(flags, wanted):
    told = run(*flags)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and wanted in told.stderr and told.stdout == ""


def test_a_wrong_flag_is_told_before_anything_heavy_is_imported():
    code = ("import runpy, sys\nsys.argv = ['train.py', '--beta1', '1']\ntry:\n    runpy.run_path('train.py')\n"
            "except SystemExit as end:\n    print(end.code, {'torch', 'transformers', 'numpy'} & set(sys.modules))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert told.stdout == "2 set()\n"


@pytest.mark.parametrize("flags, wanted", [
    ([], "--preset demo"),
    (["--preset", "demo", "--data", "empty.txt"], "--data"),
    (["--preset", "demo", "--featurizer", "no/such-model"], "--featurizer"),
    (["--preset", "demo", "--model", "no/such-model"], "--model"),
    (["--preset", "demo", "--completion_tokens", "2000"], "--completion_tokens"),
])
def test_what_cannot_run_here_is_one_line_and_leaves_no_folder(flags, wanted, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    told = run(*flags, cwd=tmp_path)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and wanted in told.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_folder_that_holds_a_run_is_refused(finished):
    told = run(*TINY, "--out_dir", finished[0])
    assert told.returncode == 2 and "--resume" in told.stderr
    told = run("--resume", finished[0], "--num_steps", 9)
    assert told.returncode == 2 and "--num_steps" in told.stderr
    assert len(lines(finished[0] / "metrics.jsonl")) == 3


def test_help_tells_every_flag_with_the_presets_default():
    demo, writeup = run("--preset", "demo", "--help"), run("--help")
    told, other = (" ".join(r.stdout.split()) for r in (demo, writeup))  # argparse breaks lines wherever they are full
    assert demo.returncode == 0 and "(default: 3e-05)" not in told and "(default: neglog)" in told
    assert writeup.returncode == 0 and "(default: 3e-05)" in other and other.count("default:") > 35
