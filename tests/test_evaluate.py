import argparse
import json
import random
import shutil
import statistics

import pytest
import torch

from conftest import lines, run_script
from data import Window, held_out, prompt_template, read_documents
from evaluate import compare_runs, describe, evaluate, read_run, truth_nats
from flags import Run, UserError
from measures import featurizer
from rollout import Writer
from sampler import Sampler
from train import parse_flags

WORDS = (argparse.__doc__ + statistics.__doc__).split()
TRUTHS = [" ".join(random.Random(i).choices(WORDS, k=6)) for i in range(100)]


def make_run(folder, completions, floor=(), **flags):
    """The files of a run, 20 sequences a step: completions of the first truths, and a floor for the last of these."""
    folder.mkdir()
    rows = [dict(step=i // 20, prefix=f"prefix {i}", sep=" ", truth=truth, completion=text, kl=0.1, seconds=1)
            for i, (truth, text) in enumerate(zip(TRUTHS, completions))]
    floor = [row | {"completion": text} for row, text in zip(rows[-len(floor):], floor)]
    for name, records in (("rollouts", rows), ("floor", floor), ("metrics", rows[::20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    flags = dict(model="demo", prompt="{text}", quant="none", dtype="fp32", device="cpu", featurizer="base", seeds=2,
                 batch_size=min(len(rows), 20) or 20, num_steps=-(-len(rows) // 20), floor_sequences=len(floor)) | flags
    (folder / "args.json").write_text(json.dumps({"args": flags}))
    return folder


def read(run, name):
    return json.loads((run / name).read_text())


def test_a_run_that_copies_the_truth_scores_one_and_a_silent_floor_scores_low(tmp_path, demo):
    run = make_run(tmp_path / "run", TRUTHS[:98] + [""] * 2, floor=[""] * 45 + TRUTHS[95:])
    result, report = evaluate(run, "base", 2, *demo, "cpu"), read(run, "mauve.json")
    assert result["mauve"] > 0.9 and result["floor"] < 0.2 and result["ceiling"] > 0.6 and result["num_sequences"] == 50
    assert [result["num_empty"][name] for name in ("truth", "mauve", "floor")] == [0, 2, 45]
    assert 0 <= result["mauve_interval"][0] < result["mauve"] <= result["mauve_interval"][1] <= 1
    assert result["against_floor"]["verdict"] == "higher" and result["kl"] == pytest.approx(0.1)
    assert [(point["step"], point["num_sequences"]) for point in report["curve"]] == [(2, 50), (4, 50)]
    assert result == read(run, "result.json") and result.items() <= report.items()


def test_results_are_printed_before_they_are_written(tmp_path, demo, capsys):
    run = make_run(tmp_path / "run", TRUTHS[:12])
    (run / "result.json").mkdir()  # no file can take its place
    with pytest.raises(OSError):
        evaluate(run, "base", 1, *demo, "cpu")
    assert "ceiling" in capsys.readouterr().out


def test_a_run_without_enough_sequences_names_the_way_on(tmp_path, capsys):
    run, traces = (make_run(tmp_path / name, [], num_steps=9, traces=file) for name, file in
                   (("run", None), ("sft", "traces.jsonl")))
    for folder, way in ((run, f"0 of 9 steps, continue with: python train.py --resume {run}"),
                        (traces, f"with: python -m tools.export {traces} --merge DIR, and start a run with: ")):
        with pytest.raises(UserError):
            read_run(folder)
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and way in err


def test_tables_of_an_unfinished_run_say_so_and_few_texts_have_no_interval(tmp_path, demo, capsys):
    run, other = (make_run(tmp_path / name, TRUTHS[:40], TRUTHS[:40], num_steps=9) for name in "ab")
    result = evaluate(run, "base", 1, *demo, "cpu")
    compare_runs([Run(run), Run(other)], featurizer("base", *demo, "cpu"), 1)
    table, comparison = capsys.readouterr().out.split(f"{run} against {other}")
    for name, text in ((run, table), (run, comparison), (other, comparison)):
        assert f"2 of 9 steps, continue with: python train.py --resume {name}" in text
    assert result["mauve_interval"] is result["against_floor"]["verdict"] is None and result["mauve"] > 0.9
    assert "too few for an interval" in table
    assert all("+0.000, no verdict: 40 pairs, and 50 are needed" in text for text in (table, comparison))


def test_perplexity_reads_prefix_and_text_as_one(demo, encode):
    row = dict(prefix="def area(rad", sep="", truth="ius): return radius")
    ids, offsets = encode(row["prefix"] + row["truth"])
    logps = demo[0](torch.tensor([ids])).logits[0].log_softmax(-1)  # (T, V)
    logps = [logps[t - 1, ids[t]] for t in range(1, len(ids)) if offsets[t][1] > len(row["prefix"])]
    found = describe(*demo, [row, row], "truth", "cpu")["perplexity"]
    assert found == pytest.approx((-torch.stack(logps).mean()).exp().item(), rel=1e-4)


def test_fresh_takes_half_of_the_held_out_documents_and_stays_until_the_run_goes_on(finished, demo, tmp_path):
    run, few = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "few.jsonl"
    texts = [text for text in read_documents("demo", "text") if held_out(text)][:11]
    few.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    info = read(run, "args.json")
    del info["digest"]
    info["args"] |= {"data": str(few), "data_revision": None}
    (run / "args.json").write_text(json.dumps(info))
    ended = run_script("evaluate.py", run, "--fresh", 500)
    assert ended.status == 0 and "5 of 11 held-out documents" in ended.out, ended.err
    rows, first = lines(run / "fresh.jsonl"), read(run, "result.json")
    assert len({row[key] for row in rows for key in ("truth", "other_truth")}) == 2 * first["fresh_num_sequences"] == 10
    assert evaluate(run, "base", 2, *demo, "cpu") == first and 0 <= first["fresh"] <= 1
    for key, mean in first["fresh_nats"].items():
        if key.startswith("nats"):
            assert 2 < mean == pytest.approx(statistics.fmean(row[key] for row in rows)), key
    args = Run(run).args
    args.prompt = prompt_template(args.prompt, demo[1])
    writer, windows = Writer(Sampler(demo[0]), demo[1], args), [Window(r["prefix"], r["sep"], r["truth"]) for r in rows]
    assert [row["nats_base"] for row in rows] == pytest.approx(truth_nats(demo[0], writer, windows, [[]] * 5), rel=1e-4)
    base = writer.write(windows, None, "fresh", 0)  # the base alone, adapters never loaded
    assert [row["base_completion"] for row in rows] == base.texts != [row["completion"] for row in rows]
    assert [row["nats_base_thinking"] for row in rows] == pytest.approx(
        truth_nats(demo[0], writer, windows, base.roll.think), rel=1e-4)
    assert all(row["nats"] != row["nats_base"] for row in rows)
    low, high = first["fresh_nats"]["interval"]
    change = [row["nats_thinking"] - row["nats_base_thinking"] for row in rows]
    assert first["fresh_nats"]["change"] == pytest.approx(statistics.fmean(change)) and low < high
    assert (low + high) / 2 == pytest.approx(statistics.fmean(change))
    with open(run / "rollouts.jsonl", "a") as file:
        file.write(json.dumps(lines(run / "rollouts.jsonl")[-1] | {"step": 3}) + "\n")
    info["args"]["num_steps"] = 4
    (run / "args.json").write_text(json.dumps(info))
    assert "fresh" not in evaluate(run, "base", 2, *demo, "cpu")


def test_nats_of_the_truth_are_those_of_the_whole_sequence_after_prompt_and_thought(demo):
    model, tokenizer = demo
    args = parse_flags(["--preset", "demo", "--temperature", "0.8", "--micro_batch", "1"])
    args.prompt = prompt_template(args.prompt, tokenizer)
    writer = Writer(Sampler(model), tokenizer, args)
    batch, thoughts = [Window("def f(", "", "x): pass"), Window("The sum of", " ", "all parts.")], [[5, 6, 7], [8]]
    for think, windows in ((thoughts, batch), ([[], []], batch[::-1])):
        for window, thought, found in zip(windows, think, truth_nats(model, writer, windows, think)):
            before = writer.prompt_ids(window.prefix) + thought + writer.rules.close.tolist()
            truth = writer.encode(window.truth)[0]
            logits = model(torch.tensor([before + truth])).logits[0, len(before) - 1:-1] / 0.8  # (n, V)
            logits = logits.masked_fill(writer.rules.blocked[1], -torch.inf)
            logp = logits.log_softmax(-1).gather(1, torch.tensor(truth)[:, None])  # (n, 1)
            assert found == pytest.approx(-logp.mean().item(), rel=1e-4)
    args.prompt, args.reasoning_tokens = "{text}", 0
    before, truth = Writer(Sampler(model), tokenizer, args).truth_ids(batch[1], [])
    assert tokenizer.decode(truth) == " all parts." and before == writer.encode("The sum of")[0]  # one text goes on


@pytest.mark.parametrize("name, way", [("floor", "sample it anew with: python train.py --resume"), ("rollouts", "")])
def test_files_that_lack_lines_are_refused(name, way, tmp_path, capsys):
    run = make_run(tmp_path / "run", TRUTHS[:40], TRUTHS[:40])
    file = run / f"{name}.jsonl"
    file.write_text("".join(file.read_text().splitlines(True)[:30]))
    with pytest.raises(UserError):
        read_run(run)
    err = capsys.readouterr().err
    assert f"{file} has 30 of 40 lines; restore it" in err and way in err


def test_the_command_measures_one_run_and_compares_others_with_the_first(tmp_path, demo):
    one, same, worse = (make_run(tmp_path / name, texts) for name, texts in (
        ("0", TRUTHS[:60]), ("1", TRUTHS[:60]), ("2", ["no"] * 60)))
    assert run_script("evaluate.py", one, "--curve", 30).status == 0
    assert evaluate(one, "base", 2, *demo, "cpu")["floor"] is None
    assert [point["num_sequences"] for point in read(one, "mauve.json")["curve"]] == [30, 30]  # the size of last time
    ended = run_script("evaluate.py", one, same, worse)
    first, second = ended.out.strip().split("\n\n")
    assert "no clear difference, +0.000" in first and "higher, +" in second and ended.status == 0
    for words in ([one, same, "--fresh", 8], [one, "--curve", 2], [one, "--device", "tpu"], [one, "--seeds", -1]):
        ended = run_script("evaluate.py", *words)
        assert ended.status == 2 and ended.err.count("\n") == 1


@pytest.mark.parametrize("flags, cause", [
    (dict(seed=1, data_revision="b"), "; the runs differ in data_revision (None and b), seed (0 and 1)"),
    (dict(batch_size=5), "; the runs differ in batch_size x num_steps (20 and 5)"),
    (dict(num_steps=4, batch_size=5), "; 1 of 4 steps, continue with: python train.py --resume "),
])
def test_runs_without_common_prefixes_are_told_why(flags, cause, tmp_path, capsys):
    one, other = make_run(tmp_path / "a", TRUTHS[:20]), make_run(tmp_path / "b", TRUTHS[:20], **flags)
    rows = (other / "rollouts.jsonl").read_text()
    (other / "rollouts.jsonl").write_text(rows.replace("prefix ", "other "))
    with pytest.raises(UserError):
        compare_runs([Run(one), Run(other)], None, 1)
    assert f"0 common prefixes, and 4 are needed{cause}" in capsys.readouterr().err
