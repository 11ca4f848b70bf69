"""Fine-tuning on traces: lessons are what the sampler leaves, the loss by hand, order, early stop, resume; and train.py --init."""
import json
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT
from data import bos_ids, prompt_ids, windows
from lessons import (NONE, PLAIN, TRACE, TRUTH, Trace, batch_of, held_out_loss, plain_text, read_traces, split,
                     taught_nats, taught_trace)
from rollout import COMPLETION, THINKING, rollout, rules
from test_scripts import TINY, lines, run, same_run

SFT = ("--preset demo --rank 4 --reasoning_tokens 4 --completion_tokens 12 --batch_size 4 --num_steps 6 --eval_every 2 --save_every 2 "
       "--held_out 0.3").split()
KEYS = """step loss loss_trace loss_truth loss_plain grad_norm lr held held_trace held_truth held_plain num_tokens skipped seconds
    tokens_per_second memory_gb""".split()


@pytest.fixture(scope="module")
def traces(encode, tmp_path_factory):
    """A file as traces.py writes it: windows of the demo's corpus, with words of the truth for a trace."""
    file, stream = tmp_path_factory.mktemp("data") / "traces.jsonl", windows("demo", encode, 16, 12, 3)
    rows = [dict(window._asdict(), think=" ".join(sorted(window.truth.split())[:1 + i % 3]), source="rollout", lift=0.1)
            for i, window in enumerate(stream[i] for i in range(30))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sft(traces, out, *words, fault=None):
    words = [*SFT, "--data", traces, *words, "--out_dir", out]
    return run(f"sft.py:{fault}", *words, script="tests/faulty.py") if fault else run(*words, script="sft.py")


@pytest.fixture(scope="module")
def tuned(traces, tmp_path_factory):
    """A whole run with tiny settings, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "sft"
    told = sft(traces, out)
    assert told.returncode == 0, told.stderr
    return out, told.stdout


def adapter(folder, name="generator"):
    return load_file(folder / "ckpt" / name / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -----------------------------------------------------------------------------
# lessons

def test_a_lesson_is_what_the_sampler_leaves_and_teaches_what_it_drew(tiny):
    model, tokenizer = tiny
    rule = rules(tokenizer, model)
    with torch.no_grad():  # some rows close their thinking, some end by themselves
        model.get_base_model().lm_head.weight[[rule.think_end, tokenizer.eos_token_id]] *= 4
    prompts = [[5 + i, 6, 7][:1 + i % 3] for i in range(32)]
    roll = rollout(model, prompts, rule, 6, 20, 1.0, torch.Generator().manual_seed(0))
    found = set()
    for i, prompt in enumerate(prompts):
        ids, part = taught_trace(prompt, roll.think[i], bool(roll.think_closed[i]), roll.reply[i], rule, tokenizer.eos_token_id, 6, 20)
        n, closed = len(ids), bool(roll.think_closed[i])
        ended = roll.ids[i, n - 1].item() == tokenizer.eos_token_id
        if len(roll.reply[i]) in range(4, 20):
            continue  # a truth of that length may have been cut: it teaches no end, see below
        assert ids == roll.ids[i, :n].tolist() and not roll.sampled[i, n:].any()
        assert [p != NONE for p in part] == roll.sampled[i, :n].tolist() and [p == TRACE for p in part] == roll.thinking[i, :n].tolist()
        found.add((closed, ended))
    assert found == {(True, True), (True, False), (False, True), (False, False)}


def test_only_a_truth_much_shorter_than_a_window_teaches_to_stop(tiny):
    rule = rules(tiny[1], tiny[0])
    for n, ends in ((40, False), (25, False), (24, False), (23, True), (1, True)):
        ids, part = taught_trace([1], [], None, [7] * n, rule, 9, 4, 40)
        assert (ids[-1] == 9) == ends and part[-1] == TRUTH
    assert taught_trace([1], [8] * 9, True, [7] * 50, rule, 9, 4, 40).ids == [1] + [8] * 4 + rule.close.tolist() + [7] * 40


def test_the_loss_is_that_of_the_taught_tokens_alone(tiny, encode):
    model, tokenizer = tiny
    rule, text = rules(tokenizer, model), Trace("a prefix of words", " ", "and what follows it", "some words")
    think, truth = encode(text.think)[0], encode(text.truth)[0]
    prompt = prompt_ids(tokenizer, encode, text.prefix)
    traced = taught_trace(prompt, think, None, truth, rule, None, 20, 20)
    cut = taught_trace(prompt, think, None, truth, rule, None, len(think), 20)  # the budget is used up: </think> is forced
    assert taught_trace(prompt, think, True, truth, rule, None, 20, 20) == traced
    assert taught_trace(prompt, think, False, truth, rule, None, 20, 20) == cut  # it was cut, though its tokens are fewer now
    plain = plain_text(encode, bos_ids(tokenizer), text, 20)
    assert plain.ids == encode("a prefix of words and what follows it")[0] and plain.part == [NONE] + [PLAIN] * (len(plain.ids) - 1)
    assert traced.ids == cut.ids == prompt + think + rule.close.tolist() + truth
    assert traced.part == [NONE] * len(prompt) + [TRACE] * (len(think) + 1) + [NONE] + [TRUTH] * len(truth)
    assert cut.part == [NONE] * len(prompt) + [TRACE] * len(think) + [NONE] * 2 + [TRUTH] * len(truth)
    wanted, counts, V = torch.zeros(4), torch.zeros(4), rule.blocked.shape[1]
    for ids, part in (traced, cut, plain):
        logits = model(torch.tensor([ids])).logits[0, :, :V]
        for t, kind in enumerate(part):
            if kind:
                allowed = logits[t - 1].masked_fill(rule.blocked[THINKING if kind == TRACE else COMPLETION], -torch.inf)
                wanted[kind] -= torch.log_softmax(allowed, -1)[ids[t]]
                counts[kind] += 1
    nats, number = taught_nats(model, [traced, cut, plain], rule)
    assert torch.allclose(nats, wanted, rtol=1e-5) and number.tolist() == counts.tolist() and nats[NONE] == 0
    nats.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_the_held_out_loss_is_weighted_as_training_weighs():
    found = held_out_loss(torch.tensor([0.0, 6.0, 20.0, 30.0]), torch.tensor([0, 2, 10, 15]), 0.25)
    assert found == pytest.approx({"held": (0.75 * 26 + 0.25 * 30) / (0.75 * 12 + 0.25 * 15), "trace": 3, "truth": 2, "plain": 2})
    assert held_out_loss(torch.tensor([0.0, 0.0, 20.0, 30.0]), torch.tensor([0, 0, 10, 15]), 0.0) == {"held": 2, "truth": 2, "plain": 2}


@pytest.mark.parametrize("mix, size", [(0.0, 4), (0.25, 4), (0.29, 10), (0.5, 3), (0.9, 7)])
def test_the_mix_is_exact_and_either_kind_goes_through_all_traces(mix, size):
    steps = [batch_of(step, size, mix, 6, seed=1) for step in range(100)]
    assert steps == [batch_of(step, size, mix, 6, seed=1) for step in range(100)] and batch_of(70, size, mix, 6, 1) == steps[70]
    assert steps != [batch_of(step, size, mix, 6, seed=2) for step in range(100)]
    flat = [one for step in steps for one in step]
    for p in range(1, len(flat) + 1):
        assert abs(sum(plain for plain, _ in flat[:p]) - mix * p) < 1
    assert sum(plain for plain, _ in flat) == round(mix * 100 * size)
    for kind in (False, True):
        numbers = [number for plain, number in flat if plain == kind]
        assert all(sorted(numbers[k:k + 6]) == list(range(6)) for k in range(0, len(numbers) - 5, 6))


def test_the_held_out_traces_are_those_of_some_prefixes_whatever_else_is_there(traces):
    rows = read_traces([traces])
    rows += [row._replace(think="another") for row in rows]
    train, held_out = split(rows, 0.3)
    assert sorted(train + held_out) == sorted(rows) and 0 < len(held_out) < len(train)
    assert not {row.prefix for row in train} & {row.prefix for row in held_out}
    assert split(rows[::-1], 0.3)[1] == held_out  # order is nothing to it
    assert set(split(rows[:20], 0.3)[1]) == set(held_out) & set(rows[:20]) and set(split(rows, 0.2)[1]) < set(held_out)
    assert split(rows, 0.0) == (rows, [])


# -----------------------------------------------------------------------------
# sft.py

def test_a_run_leaves_what_is_promised(tuned, traces):
    out, told = tuned
    assert {path.name for path in out.iterdir()} == {"args.json", "metrics.jsonl", "result.json", "ckpt"}
    rows, result = lines(out / "metrics.jsonl"), json.loads((out / "result.json").read_text())
    assert [list(row) for row in rows] == [KEYS] * 6 and [row["step"] for row in rows] == list(range(6))
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * (6 - step) / 6 for step in range(6)])
    assert all(row["grad_norm"] > 0 and row["skipped"] == 0 for row in rows) and [row["held"] is not None for row in rows] == [False, True] * 3
    train, held_out = split(read_traces([traces]), 0.3)
    assert (result["num_train"], result["num_held_out"], result["num_steps"]) == (len(train), len(held_out), 6)
    best = min(rows[1::2], key=lambda row: row["held"])
    assert result["best"]["held"] == best["held"] < result["start"]["held"] and result["best_step"] == best["step"] + 1
    assert "generator" in told and f"--init {out}" in told and "step 5/6" in told


def test_the_first_losses_are_the_bases(tuned, demo, encode, traces):
    """Before the first update the adapter changes nothing: loss and held-out loss are those of the base model."""
    model, tokenizer = demo
    rule, (train, held_out) = rules(tokenizer, model), split(read_traces([traces]), 0.3)

    def nats(chosen):
        made = [plain_text(encode, [], trace, 12) if plain else
                taught_trace(prompt_ids(tokenizer, encode, trace.prefix), encode(trace.think)[0], trace.closed, encode(trace.truth)[0], rule, None, 4, 12)
                for plain, trace in chosen]
        return taught_nats(model, made, rule)

    with torch.no_grad():
        sums, counts = nats([(plain, train[number]) for plain, number in batch_of(0, 4, 0.25, len(train), 0)])
        start = held_out_loss(*nats([(plain, trace) for plain in (False, True) for trace in held_out]), 0.25)
    row, result = lines(tuned[0] / "metrics.jsonl")[0], json.loads((tuned[0] / "result.json").read_text())
    assert row["loss"] == pytest.approx((sums.sum() / counts.sum()).item(), rel=1e-5) and row["num_tokens"] == counts.sum()
    assert row["loss_plain"] == pytest.approx((sums[PLAIN] / counts[PLAIN]).item(), rel=1e-5)
    assert result["start"] == pytest.approx(start, rel=1e-5)


def test_micro_batches_give_the_same_gradient(tuned, traces, tmp_path):
    told = sft(traces, tmp_path / "run", "--micro_batch", 1, "--num_steps", 1)
    assert told.returncode == 0, told.stderr
    whole, split_up = (lines(folder / "metrics.jsonl")[0] for folder in (tuned[0], tmp_path / "run"))
    for key in ("loss", "loss_trace", "loss_truth", "loss_plain", "grad_norm"):
        assert split_up[key] == pytest.approx(whole[key], rel=1e-4), key


def test_it_stops_early_and_leaves_the_best_adapter(traces, tmp_path):
    told = sft(traces, tmp_path / "run", "--lr", 1, "--num_steps", 40, "--patience", 2, "--adapters", "shared")
    assert told.returncode == 0 and "no evaluation was better than the start" in told.stderr, told.stderr
    rows, result = lines(tmp_path / "run" / "metrics.jsonl"), json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(rows) == 4 and all(row["held"] > result["start"]["held"] for row in rows[1::2])
    assert result["best_step"] == 0 and result["best"] == result["start"]
    assert all(not tensor.any() for key, tensor in adapter(tmp_path / "run", "shared").items() if "lora_B" in key)


@pytest.mark.parametrize("flags", ["--quant nf4 --mix 0 --adapters shared", "--dtype bf16 --reasoning_tokens 0 --mix 0.9 --micro_batch 2 --epochs 0.1"])
def test_every_way_to_tune_tunes(flags, traces, tmp_path):
    words = [word for word in SFT if "epochs" not in flags or word not in ("--num_steps", "6")]
    told = run(*words, *flags.split(), "--data", traces, traces, "--out_dir", tmp_path / "run", script="sft.py")
    assert told.returncode == 0, told.stderr
    rows, result = lines(tmp_path / "run" / "metrics.jsonl"), json.loads((tmp_path / "run" / "result.json").read_text())
    assert all(row["grad_norm"] > 0 for row in rows) and (rows[0]["loss_plain"] is None) == ("--mix 0 " in flags) and rows[-1]["held_plain"] > 0
    if "epochs" in flags:  # two files of the same traces; every tenth lesson is a trace
        assert len(rows) == -(-result["num_train"] // 4) and rows[-1]["held_trace"] is None
    assert len(rows) == result["num_steps"]


@pytest.mark.parametrize("fault", ["kill_before:2", "kill_between:3", "oom:lessons:7"])
def test_a_run_that_ends_by_a_fault_goes_on_to_the_same_end(fault, tuned, traces, tmp_path):
    told = sft(traces, tmp_path / "run", fault=fault)
    assert told.returncode == (1 if "oom" in fault else -9) and "Traceback" not in told.stderr
    if "oom" in fault:
        assert told.stderr.count("\n") == 1 and f"python sft.py --resume {tmp_path / 'run'}" in told.stderr and "--prefix_tokens" not in told.stderr
    again = run("--resume", tmp_path / "run", script="sft.py")
    assert again.returncode == 0, again.stderr
    same_run(tuned[0], tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == json.loads((tuned[0] / "result.json").read_text())


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_end_and_a_finished_one_stays(tuned, traces, tmp_path):
    out = tmp_path / "run"
    words = [sys.executable, ROOT / "sft.py", *SFT, "--data", traces, "--out_dir", out]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 0/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == 143 and f"sft.py --resume {out}" in rest and not (out / "result.json").exists()
    for _ in range(2):
        again = run("--resume", out, script="sft.py")
        assert again.returncode == 0, again.stderr
        same_run(tuned[0], out)


def test_a_nan_is_skipped_and_too_many_end_the_run(traces, tmp_path):
    told = sft(traces, tmp_path / "run", "--held_out", 0, "--max_bad_steps", 3, fault="nan:1-1")
    assert told.returncode == 0, told.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 1, 0, 0, 0, 0] and rows[1]["loss"] is None and rows[1]["grad_norm"] is None
    told = sft(traces, tmp_path / "other", "--held_out", 0, "--max_bad_steps", 3, fault="nan:2-4")
    assert told.returncode == 1 and told.stderr.count("\n") == 1 and "--max_bad_steps" in told.stderr


def wrong_files(folder):
    good = json.dumps(dict(prefix="a", sep=" ", truth="b", think="c")) + "\n"
    yield good + "hello\n", ":2 is not JSON"
    yield good + "[1, 2]\n", ":2 has no text in prefix, sep, truth, think"
    yield good + good.replace("truth", "text"), ":2 has no text in truth"
    yield good.replace('"c"', "3"), ":1 has no text in think"
    yield good.replace('"b"', '" "'), ":1 has no text in truth"
    yield "\n\n", "there is no trace in it"
    yield "", "there is no trace in it"


@pytest.mark.parametrize("number", range(7))
def test_a_file_that_holds_no_traces_is_one_line(number, tmp_path, capsys):
    content, wanted = list(wrong_files(tmp_path))[number]
    (tmp_path / "traces.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        read_traces([tmp_path / "traces.jsonl"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and f"--data {tmp_path / 'traces.jsonl'}" in told and wanted in told


@pytest.mark.parametrize("flags, wanted", [
    ("", "--data is missing"), ("--data no/such.jsonl", "--data no/such.jsonl"), ("--data README.md", "README.md:1 is not JSON"),
    ("--data TRACES --mix 1", "--mix"), ("--data TRACES --held_out -0.1", "--held_out"), ("--data TRACES --lr 1000", "--lr"),
    ("--data TRACES --held_out 0.0001", "--held_out"), ("--data TRACES --completion_tokens 48", "--completion_tokens"),
    ("--data TRACES --epochs 0", "--epochs"), ("--data TRACES --rate 1", "unknown flag --rate"), ("--data TRACES --init no/such", "--init no/such"),
])
def test_a_mistake_is_one_line_and_leaves_no_folder(flags, wanted, traces, tmp_path):
    told = run("--preset", "demo", *flags.replace("TRACES", str(traces)).split(), "--out_dir", tmp_path / "run", script="sft.py", cwd=ROOT)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and wanted in told.stderr and told.stdout == "", told.stderr
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_traces_and_other_flags(tuned, traces, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(tuned[0], out)
    args = json.loads((out / "args.json").read_text())
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(traces.read_text().splitlines(True)[1:]))
    (out / "args.json").write_text(json.dumps({"args": args["args"] | {"data": [str(fewer)]}}))
    before = (out / "metrics.jsonl").read_bytes()
    for words, wanted in (([], "is not what it was"), (["--lr", 1], "--lr")):
        told = run("--resume", out, *words, script="sft.py")
        assert told.returncode == 2 and told.stderr.count("\n") == 1 and wanted in told.stderr
    assert (out / "metrics.jsonl").read_bytes() == before


# -----------------------------------------------------------------------------
# train.py --init

@pytest.fixture(scope="module")
def second(tuned, tmp_path_factory):
    """A round of train.py that starts from the fine-tuned adapter, of which a copy is the reference."""
    out, start = (tmp_path_factory.mktemp("runs") / name for name in ("second", "gone"))
    shutil.copytree(tuned[0], start)
    told = run(*TINY, "--save_every", 1, "--init", start, "--out_dir", out)
    assert told.returncode == 0, told.stderr
    return out


def test_a_second_round_starts_from_the_fine_tuned_adapter_and_is_held_to_it(second, tuned, tmp_path):
    assert same(adapter(second, "reference"), adapter(tuned[0])) and not same(adapter(second), adapter(tuned[0]))
    rows = lines(second / "metrics.jsonl")
    assert rows[0]["kl"] == 0 and rows[1]["kl"] > 0 and all(row["logp_gap"] < 1e-4 for row in rows)
    assert (second / "floor.jsonl").exists()

    based = tmp_path / "based"  # of the base as a reference the start is some way off; a generator that does not learn stays
    told = run(*TINY, "--init", tuned[0], "--init_ref", "base", "--g_lr", 0, "--out_dir", based)
    assert told.returncode == 0, told.stderr
    row = lines(based / "metrics.jsonl")[0]
    assert row["kl"] > 1e-6 and row["coherence"] is not None
    assert same(adapter(based), adapter(tuned[0])) and not (based / "ckpt" / "reference").exists()
    assert (based / "floor.jsonl").read_bytes() == (second / "floor.jsonl").read_bytes()  # the floor is the bare base's
    assert (based / "rollouts.jsonl").read_text().splitlines()[0] == (second / "rollouts.jsonl").read_text().splitlines()[0]


def test_a_second_round_goes_on_without_the_folder_it_started_from(second, tuned, tmp_path):
    out, start = tmp_path / "run", pathlib.Path(json.loads((second / "args.json").read_text())["args"]["init"])
    told = run("kill_before:3", *TINY, "--save_every", 1, "--init", start, "--out_dir", out, script="tests/faulty.py")
    assert told.returncode == -9
    shutil.rmtree(start)
    again = run("--resume", out)
    assert again.returncode == 0, again.stderr
    same_run(second, out)
    assert same(adapter(out, "reference"), adapter(tuned[0]))


def test_micro_batches_of_one_give_the_same_round(tuned, tmp_path):
    """The reference is an adapter that is switched to between two micro-batches: no gradient may be lost by that."""
    found = []
    for size in (0, 1):
        file = tmp_path / f"{size}.pt"
        words = [*TINY, "--d_warmup", 0, "--floor_sequences", 0, "--micro_batch", size, "--init", tuned[0], "--out_dir", tmp_path / f"run{size}"]
        told = run(f"gradients:{file}", *words, script="tests/faulty.py")
        assert told.returncode == 0, told.stderr
        found.append(torch.load(file, weights_only=True))
    for a, b in zip(*found):
        assert a.norm() > 0 and (a - b).norm() / a.norm() < 1e-5


def test_a_shared_run_can_start_from_a_run_of_train_and_so_can_sft(second, traces, tmp_path):
    told = run(*TINY, "--adapters", "shared", "--floor_sequences", 0, "--d_warmup", 0, "--init", second, "--out_dir", tmp_path / "third")
    assert told.returncode == 0, told.stderr
    rows = lines(tmp_path / "third" / "metrics.jsonl")
    assert rows[0]["kl"] == 0 and rows[-1]["kl_after_d"] > 0 and same(adapter(tmp_path / "third", "reference"), adapter(second))
    told = sft(traces, tmp_path / "sft", "--init", second, "--lr", 0, "--num_steps", 1)
    assert told.returncode == 0 and same(adapter(tmp_path / "sft"), adapter(second)), told.stderr


@pytest.mark.parametrize("flags, wanted", [("--model demo-small", "--model"), ("--rank 8", "--rank"), ("--alpha 2.0", "--alpha")])
def test_an_init_that_does_not_fit_is_one_line(flags, wanted, tuned, tmp_path):
    told = run(*TINY, *flags.split(), "--init", tuned[0], "--out_dir", tmp_path / "run")
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and f"{flags} does not fit --init {tuned[0]}" in told.stderr
    assert wanted in told.stderr and not (tmp_path / "run").exists()


def test_a_torn_adapter_is_one_line_and_leaves_no_folder(tuned, tmp_path):
    shutil.copytree(tuned[0], tmp_path / "sft")
    file = tmp_path / "sft" / "ckpt" / "generator" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    told = run(*TINY, "--init", tmp_path / "sft", "--out_dir", tmp_path / "run")
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "--init" in told.stderr and not (tmp_path / "run").exists()
