import argparse
import json
import random
import runpy
import statistics
import sys
import types

import pytest
import torch

import evaluate as module
from conftest import ROOT
from evaluate import compare_runs, describe, evaluate, read_run, sample_fresh
from flags import UserError

WORDS = (argparse.__doc__ + statistics.__doc__).split()
TRUTHS = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(200)]


def records(truths, completions, **more):
    return [dict(step=i // 20, prefix=f"prefix {truth}", sep=" ", truth=truth, completion=text, kl=0.1, seconds=1, **more)
            for i, (truth, text) in enumerate(zip(truths, completions))]


def make_run(folder, completions, floor=(), **flags):
    """The files of a run: completions of the first truths, and a floor for the last of these."""
    folder.mkdir()
    truths = TRUTHS[:len(completions)]
    for name, rows in (("rollouts", records(truths, completions)), ("floor", records(truths[-len(floor):], floor)),
                       ("metrics", records(truths, completions)[::20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(model="demo", quant="none", dtype="fp32", device="cpu", featurizer="base", seeds=2) | flags
    (folder / "args.json").write_text(json.dumps({"args": flags}))
    return folder


def read(run, name):
    return json.loads((run / f"{name}.json").read_text())


def test_a_run_that_copies_the_truth_scores_one_and_nonsense_scores_the_floor(tmp_path, demo, capsys):
    run = make_run(tmp_path / "run", TRUTHS[:195] + [""] * 5, floor=["!!! 0 0 0 " * 4] * 100)
    result, report = evaluate(run, "base", 2, *demo, "cpu"), read(run, "mauve")
    assert result["mauve"] > 0.9 and result["floor"] < 0.1 and result["ceiling"] > 0.7 and result["num_sequences"] == 100
    assert result["num_empty"]["mauve"] == 5 and result["num_empty"]["truth"] == 0
    assert 0 <= result["mauve_interval"][0] < result["mauve"] <= result["mauve_interval"][1] <= 1
    assert result["against_floor"]["verdict"] == "higher" and result["kl"] == pytest.approx(0.1)
    assert [(point["step"], point["num_sequences"]) for point in report["curve"]] == [(2, 50), (4, 50), (7, 50), (9, 50)]
    assert report["texts"]["floor"]["audit"]["length"][0] > 0.4 and result == read(run, "result") == result & report


def test_a_run_that_falls_silent_scores_low(tmp_path, demo):
    result = evaluate(make_run(tmp_path / "run", [""] * 90 + TRUTHS[90:100]), "base", 2, *demo, "cpu")
    assert result["mauve"] < 0.2 and result["num_empty"]["mauve"] == 90 and result["floor"] is None


@pytest.mark.parametrize("line", ["not json", "\udcff", "[1]", '{"prefix": "p", "completion": "c"}', None])
def test_damaged_or_missing_sequences_are_one_line(line, tmp_path, capsys):
    run = make_run(tmp_path / "run", TRUTHS[:9])
    rows = (run / "rollouts.jsonl").read_text().split("\n")
    rows = [*rows[:3], line, *rows[3:]] if line else rows[:1]
    (run / "rollouts.jsonl").write_bytes("\n".join(rows).encode(errors="surrogateescape"))
    with pytest.raises(UserError):
        read_run(run)
    assert capsys.readouterr().err.count("\n") == 1


def test_perplexity_reads_prefix_and_text_as_one(demo, encode):
    model, tokenizer = demo
    ids, offsets = encode("def area(radius): return radius")
    logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
    logps = [logps[t - 1, ids[t]].item() for t in range(1, len(ids)) if offsets[t][1] > len("def area(rad")]
    row = dict(prefix="def area(rad", sep="", truth="ius): return radius", completion="")
    found = describe(model, tokenizer, [row, row], "truth", "cpu")
    assert found["perplexity"] == pytest.approx(statistics.geometric_mean([2.718281828459045 ** -x for x in logps]), rel=1e-4)


def test_fresh_samples_are_measured_until_the_run_goes_on(tmp_path, demo):
    run = make_run(tmp_path / "run", TRUTHS[:40])
    rows = [row | {"step": 1} for row in records(TRUTHS[100:110], TRUTHS[100:110], other_truth="x y")]
    (run / "fresh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = evaluate(run, "base", 2, *demo, "cpu")
    assert result["fresh"] == pytest.approx(1) and result["fresh_ceiling"] < 0.5 and result["fresh_num_sequences"] == 10
    assert evaluate(run, "base", 2, *demo, "cpu") == result
    with open(run / "rollouts.jsonl", "a") as file:
        file.write(json.dumps(records(TRUTHS, TRUTHS)[40]) + "\n")
    assert "fresh" not in evaluate(run, "base", 2, *demo, "cpu")


def test_fresh_never_samples_more_windows_than_half_of_the_held_out_documents(tmp_path, monkeypatch, capsys):
    class Stream(list):
        num_documents = 11

    class Writer:
        def __init__(self, *_):
            pass

        def write(self, windows, *_):
            return windows

        def records(self, steps, windows, samples):
            return [dict(step=step, truth=window.truth, completion="c") for step, window in zip(steps, windows)]

    stream = Stream(types.SimpleNamespace(truth=truth) for truth in TRUTHS[:11])
    for name, value in (("data.windows", lambda *_, **__: stream), ("data.plain_encoder", str), ("rollout.Writer", Writer),
                        ("sampler.Sampler", lambda *_: None)):
        monkeypatch.setattr(name, value)
    run = read_run(make_run(tmp_path / "run", TRUTHS[:40], merge=True))
    sample_fresh(run, 500, types.SimpleNamespace(model=None, tokenizer=None, adapter="generator"))
    rows = [json.loads(line) for line in (run.folder / "fresh.jsonl").read_text().splitlines()]
    assert [(row["step"], row["truth"], row["other_truth"]) for row in rows] == [(1, *pair) for pair in zip(TRUTHS[:5], TRUTHS[5:10])]
    assert "5 of 11 held-out documents" in capsys.readouterr().out


def test_results_are_printed_before_they_are_written(tmp_path, demo, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(OSError):
        evaluate(make_run(tmp_path / "run", TRUTHS[:12]), "base", 1, *demo, "cpu")
    assert "ceiling" in capsys.readouterr().out


def test_runs_without_common_prefixes_are_told_why(tmp_path, capsys):
    runs = [make_run(tmp_path / str(seed), TRUTHS[:20], seed=seed, num_steps=5) for seed in (0, 1)]
    rows = (runs[1] / "rollouts.jsonl").read_text().replace("prefix ", "another ")
    (runs[1] / "rollouts.jsonl").write_text(rows)
    with pytest.raises(UserError):
        compare_runs([read_run(run) for run in runs], None)
    message = capsys.readouterr().err
    assert "--seed is 0 and 1" in message and "num_steps" not in message


def test_the_command_measures_keeps_the_curves_windows_and_compares(tmp_path, monkeypatch, capsys):
    run, other, third = (make_run(tmp_path / name, texts) for name, texts in (
        ("run", TRUTHS[:40]), ("other", TRUTHS[:40]), ("third", ["nothing else"] * 40)))

    def command(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
        return capsys.readouterr().out

    for words in (["--curve", 10], []):
        command(run, *words)
        assert [point["num_sequences"] for point in read(run, "mauve")["curve"]] == [10] * 4
    lines = command(run, other, third).strip().split("\n")
    assert "not told apart by +0.000" in lines[0] and "higher by" in lines[-1]
    for words in ([run, other, "--fresh", 8], [run, "--curve", 2], [run, "--device", "tpu"]):
        with pytest.raises(UserError):
            command(*words)
