"""train.py end to end with tiny settings: what a run leaves, every way to train, and that resuming equals not stopping."""
import json
import subprocess
import sys

import pytest
import torch

import checkpoint
import reward
from conftest import ROOT, lines, run_script, same_run, shared

METRICS = """step reward p_real length_score baseline advantage_sd g_loss kl entropy logp_gap gap_kl sampler_corr d_loss
    d_acc_real d_acc_generated g_grad_norm d_grad_norm g_lr d_lr think_closed num_think num_completion distinct_2 coherence skipped
    seconds sample_seconds update_seconds tokens_per_second memory_gb""".split()
ROLLOUT = "step prefix sep truth think completion reward p_real length_score n_think n_completion think_closed".split()


def test_a_run_leaves_what_is_promised(finished):
    out, printed = finished
    assert {path.name for path in out.iterdir()} == {
        "args.json", "metrics.jsonl", "rollouts.jsonl", "floor.jsonl", "ckpt", "mauve.json", "result.json", "training.png"}
    metrics, rollouts, floor = (lines(out / f"{name}.jsonl") for name in ("metrics", "rollouts", "floor"))
    assert [row["step"] for row in metrics] == [0, 1, 2] and all(set(METRICS) <= set(row) for row in metrics)
    assert [row["step"] for row in rollouts] == [0] * 4 + [1] * 4 + [2] * 4
    assert all(list(row) == ROLLOUT for row in rollouts + floor)
    assert [row["prefix"] for row in floor] == [row["prefix"] for row in rollouts[-6:]]
    result, info = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "args"))
    assert {"mauve", "floor", "ceiling", "mauve_sd", "floor_sd", "ceiling_sd", "seconds"} <= set(result)
    assert result["num_sequences"] == 6 and result["num_steps"] == 3
    assert info["args"]["batch_size"] == 4 and "{text}" in info["args"]["prompt"] and info["args"]["data_revision"]
    assert "torch" in info["versions"] and "commit" in info
    assert {path.name for path in (out / "ckpt").iterdir()} >= {"generator", "discriminator", "head.safetensors", "state.pt"}
    for words in ("data demo:", "the base writes:", "warm-up 1/1", "step 2/3", "left", "floor", "result", "ceiling"):
        assert words in printed


def test_the_metrics_mean_what_they_say(finished):
    metrics, rollouts = (lines(finished[0] / f"{name}.jsonl") for name in ("metrics", "rollouts"))
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and metrics[0]["baseline"] == metrics[0]["reward"]
    assert metrics[2]["kl"] > 0 and [row["g_lr"] for row in metrics] == pytest.approx([2e-3, 2e-3 * 2 / 3, 2e-3 / 3])
    for row in metrics:
        assert 0.7 * row["logp_gap"] <= row["gap_kl"] ** 0.5 < 1e-4 and row["skipped"] == 0 and 0 <= row["p_real"] <= 1
        assert row["num_completion"] <= 12 and row["num_think"] <= 4 and 0 < row["distinct_2"] <= 1
        assert row["g_grad_norm"] > 0 and row["d_grad_norm"] > 0
    assert metrics[0]["sampler_corr"] is None and min(row["sampler_corr"] for row in metrics[1:]) > 0.999
    assert sum(row["reward"] for row in rollouts[:4]) / 4 == pytest.approx(metrics[0]["reward"], rel=1e-4)


@pytest.mark.parametrize("flags", [
    "--adapters shared --micro_batch 1 --kl_coef 0 --reasoning_tokens 0 --dtype bf16",
    "--quant nf4 --micro_batch 2 --d_loss pair --d_pool last --g_reward prob",
    "--disc reason --adapters shared --d_think_tokens 0 --g_reward prob --micro_batch 3 --d_shuffle",
    "--disc reason --d_model demo-small --d_kl_coef 0 --no-merge",
    "--prompt plain --reasoning_tokens 0 --optim adam8bit --grad_ckpt --model demo-small",
    "--tis 2 --ce_coef 0.1 --micro_batch 3"])
def test_every_way_to_train_trains(flags, train, tmp_path):
    ended = train(*flags.split(), "--floor_sequences", 0)
    assert ended.status == 0, ended.err
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 3 and all(row["skipped"] == 0 and row["g_grad_norm"] > 0 for row in metrics)
    assert ("--g_lr 0.002 was found for demo; docs" in ended.out) == ("--model" in flags)
    if "plain" in flags:
        assert metrics[0]["num_think"] == 0 and json.loads((tmp_path / "run" / "args.json").read_text())[
            "args"]["prompt"] == "{text}"


def stopped_at(number, monkeypatch, fault):
    """Let `fault` happen after the number-th checkpoint is written."""
    real, calls = checkpoint.save, []

    def save(*args):
        real(*args)
        calls.append(args)
        if len(calls) == number:
            fault()
    monkeypatch.setattr(checkpoint, "save", save)


def vanish():
    raise SystemExit(137)


@pytest.mark.parametrize("flags", ["", "--adapters shared --deterministic", "--disc reason --d_model demo-small",
                                   "--optim muon --ce_coef 0.1"])
def test_a_resumed_run_equals_one_that_was_never_stopped(flags, train, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert train(*flags.split(), "--save_every", 1, "--out_dir", whole).status == 0
    stopped_at(3, monkeypatch, vanish)  # after step 0: at the start, after the warm-up, after step 0
    assert train(*flags.split(), "--save_every", 1).status == 137
    monkeypatch.undo()
    for name in ("rollouts", "metrics"):  # a crash after the checkpoint would leave such lines
        with open(out / f"{name}.jsonl", "a") as file:
            file.write('{"step": 1}\n{"step": 7, "torn')
    assert run_script("train.py", "--resume", out).status == 0
    same_run(whole, out)
    assert len(json.loads((out / "args.json").read_text())["resumed"]) == 1


def test_a_signal_saves_and_names_the_command_that_continues(train, tmp_path, monkeypatch):
    import os
    import signal
    real = reward.policy_loss
    monkeypatch.setattr(reward, "policy_loss", lambda *args: (os.kill(os.getpid(), signal.SIGUSR1), real(*args))[1])
    ended = train("--out_dir", tmp_path / "a run")
    assert ended.status == 128 + signal.SIGUSR1 and f"python train.py --resume '{tmp_path}/a run'" in ended.out
    assert torch.load(tmp_path / "a run" / "ckpt" / "state.pt", weights_only=True)["step"] == 1


def test_micro_batches_give_the_same_step(finished, train, tmp_path):
    assert train("--micro_batch", 3, "--floor_sequences", 0).status == 0
    whole, split = (lines(folder / "metrics.jsonl")[0] for folder in (finished[0], tmp_path / "run"))
    for key in ("g_loss", "d_loss", "g_grad_norm", "d_grad_norm", "entropy", "d_acc_real"):
        assert split[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-6), key


def test_real_pile_documents_and_another_architecture_train(train, tmp_path):
    ended = train("--data", shared("pile/pile_200.jsonl"), "--model", shared("stories260k"))
    assert ended.status == 0 and "no single </think> token" in ended.out, ended.err
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3


def test_hostile_text_trains_or_is_left_out_and_never_reaches_the_terminal(train, tmp_path):
    words = ("alpha \x1b[31mbeta \x07gamma \u202edelta\u202c <|im_end|> <think> </think> </prefix> <|im_start|>user "
             "\r\n \u2028 \u0085 \ufffd ").split(" ")
    texts = ["", " " * 3000, "word " * 3000, "x" * 5000, "\u05d0\u05d1 \u200f" * 500,
             *(" ".join(words[i % 7:] * 40) + "\0" for i in range(260))]
    data = [json.dumps({"text": text}).encode() for text in texts]
    (tmp_path / "hostile.jsonl").write_bytes(b"\n".join([*data, b'{"text": "' + b"\xff broken utf-8 " * 200 + b'"}', b"{torn", b""]))
    ended = train("--data", tmp_path / "hostile.jsonl")
    assert ended.status == 0 and "left out" in ended.err, ended.err
    assert all(c.isprintable() or c in "\n\r" for c in ended.out + ended.err.replace("\x1b[A", ""))  # tqdm's own
    assert len(lines(tmp_path / "run" / "rollouts.jsonl")) == 12


def failing(first, last):
    """policy_loss, but nan from the first to the last call."""
    real, calls = reward.policy_loss, []

    def loss(*args):
        calls.append(args)
        return real(*args) * (float("nan") if first <= len(calls) <= last else 1)
    return loss


def test_a_gradient_that_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(train, tmp_path, monkeypatch):
    monkeypatch.setattr(reward, "policy_loss", failing(2, 2))
    assert train("--floor_sequences", 0).status == 0
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 1, 0] and metrics[1]["g_grad_norm"] is None is metrics[1]["g_loss"]
    monkeypatch.undo()
    monkeypatch.setattr(reward, "policy_loss", failing(3, 99))
    ended = train("--floor_sequences", 0, "--num_steps", 20, "--save_every", 1, "--out_dir", tmp_path / "bad")
    assert ended.status == 1 and ended.err.count("\n") == 1 and "10 steps in a row" in ended.err
    assert torch.load(tmp_path / "bad" / "ckpt" / "state.pt", weights_only=True)["step"] == 2  # from before them


@pytest.mark.parametrize("damage", ["state cut short", "adapter cut short", "adapter renamed", "format", "rollouts lost",
                                    "head missing", "another file"])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_overwritten(damage, finished, tmp_path):
    import shutil
    from safetensors.torch import load_file, save_file
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    state, adapter = out / "ckpt" / "state.pt", out / "ckpt" / "generator" / "adapter_model.safetensors"
    if "cut short" in damage:
        file = state if "state" in damage else adapter
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "adapter renamed":
        save_file({f"x{key}": x for key, x in load_file(adapter).items()}, adapter)
    elif damage == "rollouts lost":
        (out / "rollouts.jsonl").write_text("")
    elif damage == "head missing":
        (out / "ckpt" / "head.safetensors").unlink()
    else:
        saved = torch.load(state, weights_only=True)
        torch.save(saved | ({"format": 99} if damage == "format" else {"lengths": {str(adapter): 0}}), state)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    ended = run_script("train.py", "--resume", out)
    assert ended.status == 2 and ended.err.count("\n") == 1 and f"--resume {out}" in ended.err, ended.err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_that_holds_a_run_and_flags_of_another_run_are_refused(finished, train):
    ended = train("--out_dir", finished[0])
    assert ended.status == 2 and "--resume" in ended.err
    ended = run_script("train.py", "--resume", finished[0], "--num_steps", 9)
    assert ended.status == 2 and "--num_steps" in ended.err and len(lines(finished[0] / "metrics.jsonl")) == 3


@pytest.mark.parametrize("flags, named", [
    ([], "--preset demo"), (["--preset", "demo", "--data", "empty.txt"], "--data"),
    (["--preset", "demo", "--featurizer", "no/such-model"], "--featurizer"),
    (["--preset", "demo", "--model", "no/such-model"], "--model"), (["--preset", "demo", "--prompt", "no.txt"], "--prompt"),
    (["--preset", "demo", "--completion_tokens", "2000"], "--completion_tokens")])
def test_what_cannot_run_here_is_one_line_and_leaves_no_folder(flags, named, tmp_path, monkeypatch):
    if not flags and torch.cuda.is_available():
        pytest.skip("with a GPU the defaults run")
    (tmp_path / "empty.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    ended = run_script("train.py", *flags)
    assert ended.status == 2 and ended.err.count("\n") == 1 and named in ended.err, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_wrong_flag_is_reported_before_anything_heavy_is_imported():
    code = ("import runpy, sys\nsys.argv = ['train.py', '--beta1', '1']\ntry:\n"
            "    runpy.run_path('train.py', run_name='__main__')\n"
            "except SystemExit as end:\n    print(end.code, {'torch', 'transformers', 'numpy'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "2 set()\n"


def test_samples_come_from_a_run_its_base_and_a_bare_model(finished, capsys):
    ended = run_script("sample.py", finished[0], "--prefix", "Return the number of ", "--num", 2, "--both", "--best_of", 2)
    assert ended.status == 0 and ended.out.count("--- ") == 4 and "--- base 1, p_real 0." in ended.out, ended.err
    ended = run_script("sample.py", "demo", "--prefix", "Return", "--num", 1)
    assert ended.status == 0 and ended.out.count("--- base 1\n") == 1, ended.err
    ended = run_script("sample.py", finished[0], "--prefix", "Return", "--num", 1)
    assert ended.status == 0 and ended.out.count("--- trained 1\n") == 1, ended.err
    for words in (["no/run", "--both"], [finished[0], "--num", 0]):
        ended = run_script("sample.py", *words)
        assert ended.status == 2 and ended.err.count("\n") == 1


def test_tracking_is_one_run_there_and_survives_a_resume(train, tmp_path, monkeypatch):
    import types
    calls = []
    module = types.SimpleNamespace(
        __spec__=object(), init=lambda **kw: calls.append(("init", kw)), finish=lambda: calls.append(("finish", None)),
        log=lambda row, step: calls.append((step, row)), Table=lambda columns, data: (columns, data))
    monkeypatch.setitem(sys.modules, "wandb", module)
    assert train("--track", "wandb", "--floor_sequences", 0).status == 0
    assert run_script("train.py", "--resume", tmp_path / "run").status == 0
    ids = [kw["id"] for name, kw in calls if name == "init"]
    assert len(ids) == 2 and ids[0] == ids[1] and [name for name, _ in calls] == ["init", 0, 1, 2, "finish", "init", "finish"]
    columns, data = calls[1][1]["samples"]
    assert len(data) == 4 and len(data[0]) == len(columns) and calls[1][1]["reward"] == lines(
        tmp_path / "run" / "metrics.jsonl")[0]["reward"]
