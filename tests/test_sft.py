"""Fine-tuning: lessons are what the sampler leaves, the loss by plain forwards, runs on traces and on truths."""
import json
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import reward
from conftest import run_script, same_run
from data import Window, bos_ids, prompt_template
from flags import Run
from rollout import COMPLETION, THINKING, Writer, rollout
from sampler import Sampler
from tools import sft
from tools.sft import NONE, PLAIN, TRACE, TRUTH


def a_writer(tiny, reasoning_tokens, completion_tokens):
    """A Writer that does not sample and reads lists of ids where it reads texts."""
    writer = Writer(Namespace(model=tiny[0]), tiny[1], Namespace(
        prompt=prompt_template("writeup"), prefix_tokens=9, echo_tokens=0, reasoning_tokens=reasoning_tokens,
        completion_tokens=completion_tokens, mix=0.3))
    writer.prompt_ids, writer.encode = lambda ids: ids, lambda ids: (ids, [(k, k + 1) for k in range(len(ids))])
    return writer


def test_a_lesson_is_what_the_sampler_leaves_and_trains_what_it_drew(tiny):
    (model, tokenizer), writer, found = tiny, a_writer(tiny, 6, 20), set()
    with torch.no_grad():  # some rows close their thinking, some end by themselves
        model.get_base_model().lm_head.weight[[writer.rules.think_end, tokenizer.eos_token_id]] *= 4
    prompts, sampler = [[5 + i, 6, 7][:1 + i % 3] for i in range(64)], Sampler(model)
    sampler.sync("generator")
    roll = rollout(sampler, prompts, writer.rules, 6, 20, 1.0, [("lesson", i) for i in range(64)])
    for i in range(64):
        closed = bool(roll.think_closed[i])
        trace = dict(prefix=prompts[i], sep=[], think=roll.think[i], closed=closed, truth=roll.reply[i])
        ids, part = sft.trace_lesson(writer, trace)
        n = len(ids)  # without a stop id, which no truth has
        assert ids == roll.ids[i, :n].tolist() and roll.sampled[i, n:].sum() == (len(roll.reply[i]) < 20)
        assert [p != NONE for p in part] == roll.sampled[i, :n].tolist()
        assert [p == TRACE for p in part] == roll.thinking[i, :n].tolist()
        found.add(closed)
    assert found == {True, False}


def test_the_loss_is_that_of_the_trained_tokens_alone(tiny):
    model, writer, wanted, bos = tiny[0], a_writer(tiny, 2, 3), [], bos_ids(tiny[1])
    model.set_adapter("generator")
    trace = dict(prefix=[11, 12], sep=[13], truth=[14, 15, 16, 17], think=[18, 19, 20], closed=True)  # both are cut
    lessons = [sft.trace_lesson(writer, trace), sft.plain_lesson(writer, trace),
               sft.reply_lesson(writer, Window([11, 12], [13], [14, 15, 16, 17]), [9, 8], num_trained=0)]
    close = writer.rules.close.tolist()
    assert lessons == [([11, 12, 18, 19, *close, 14, 15, 16], [NONE] * 2 + [TRACE] * 2 + [NONE] * 2 + [TRUTH] * 3),
                       ([*bos, 11, 12, 13, 14, 15, 16], [NONE] + [PLAIN] * (len(bos) + 5)),
                       ([11, 12, 9, 8, *close, 14, 15, 16], [NONE] * 6 + [TRUTH] * 3)]
    for ids, part in lessons:
        logits = model(torch.tensor([ids])).logits[0, :, :writer.rules.blocked.shape[1]]
        for t, kind in ((t, kind) for t, kind in enumerate(part) if kind):
            bad = writer.rules.blocked[THINKING if kind == TRACE else COMPLETION]
            wanted.append((logits[t - 1].masked_fill(bad, -torch.inf).log_softmax(-1)[ids[t]].item(), kind))
    for size in (1, 3):
        found = [(stats.logp, part) for stats, part in sft.passes(model, lessons, writer.rules, size)]
        logp, part = map(torch.cat, zip(*found))
        assert part.tolist() == [kind for _, kind in wanted]
        assert torch.allclose(logp, torch.tensor([x for x, _ in wanted]), atol=1e-4)
    ((stats, _),) = sft.passes(model, lessons[:1] * 2, writer.rules, 2, with_kl=True)  # rows that share all they can
    assert (stats.kl > 0).all() and torch.allclose(*stats.logp.chunk(2), atol=1e-5)


def test_losses_are_means_over_all_tokens_and_over_each_part():
    pairs = [(-torch.tensor([2.0, 4.0]), torch.tensor([TRACE, TRUTH])),
             (-torch.tensor([1.0, 3.0, 5.0]), torch.tensor([TRUTH, PLAIN, PLAIN]))]
    wanted = dict(loss=3.0, loss_trace=2.0, loss_truth=2.5, loss_plain=4.0)
    assert sft.losses("loss", pairs) == pytest.approx(wanted)


def test_lessons_are_mixed_by_a_key(tiny):
    writer, trace = a_writer(tiny, 4, 4), dict(prefix=[1], sep=[], think=[], closed=True, truth=[7])
    first, same, other = ([PLAIN in part for _, part in sft.mixed_lessons(writer, [trace] * 1000, 1, step)]
                          for step in (2, 2, 3))
    assert first == same != other and abs(sum(first) - 300) < 50


@pytest.fixture
def traces(finished, tmp_path):
    rows = [dict(prefix=f"prefix {i}", sep=" ", think=f"thought {i}", closed=True, truth=f"continues with {i} " * 6,
                 run=str(finished[0])) for i in range(30)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "traces.jsonl"


def test_traces_leave_the_adapter_that_was_best_on_held_out_prefixes(finished, traces, tmp_path, monkeypatch):
    words = "--g_lr 0.003 --batch_size 4 --num_steps 6 --held_out 0.3 --save_every 2 --data".split()
    assert run_script("tools/sft.py", *words, traces, "--out_dir", tmp_path / "sft").status == 0
    run, base = Run(tmp_path / "sft"), Run(finished[0]).args
    assert ["held" in row for row in run.metrics] == [True, False] * 3 + [True]  # the last row has nothing else
    assert run.metrics[6]["held"] < run.metrics[0]["held"] and "loss" not in run.metrics[6]
    assert [row["g_lr"] for row in run.metrics[:6]] == pytest.approx([0.003 * (6 - step) / 6 for step in range(6)])
    assert sorted(path.name for path in run.folder.iterdir()) == ["args.json", "ckpt", "metrics.jsonl"]
    wanted = (base.model, base.prompt, "demo", 4, 0.9, 0)
    assert tuple(getattr(run.args, key) for key in "model prompt data rank beta1 kl_coef".split()) == wanted
    assert checkpoint.load_run(run, torch.device("cpu"))[0].adapter == "generator"  # so evaluate.py and export can
    loss = reward.policy_loss
    monkeypatch.setattr(reward, "policy_loss", lambda *args: -loss(*args))  # uphill nothing is better than the start
    assert "from after 0 steps" in run_script("tools/sft.py", *words, traces, "--out_dir", tmp_path / "worse").out
    weights = load_file(tmp_path / "worse" / "ckpt" / "generator" / "adapter_model.safetensors")
    assert not any(x.any() for key, x in weights.items() if "lora_B" in key)


def test_truths_sample_as_the_run_did_learn_the_truths_and_resume(finished, tmp_path, monkeypatch):
    words, save = ["--truths", finished[0], "--save_every", 1, "--out_dir"], checkpoint.save
    assert run_script("tools/sft.py", *words, tmp_path / "whole").status == 0
    base, tuned = Run(finished[0]), Run(tmp_path / "whole")
    assert {key for key, x in vars(base.args).items() if vars(tuned.args)[key] != x} == {"out_dir", "save_every"}
    assert tuned.floor == base.floor and [row["truth"] for row in tuned.rollouts] == [r["truth"] for r in base.rollouts]
    texts, base_texts = ([row["completion"] for row in run.rollouts] for run in (tuned, base))
    assert texts[:4] == base_texts[:4] and texts[4:] != base_texts[4:]  # both adapters begin as the base
    assert tuned.metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and tuned.metrics[2]["kl"] > 1e-6
    assert tuned.metrics[2]["loss"] < tuned.metrics[0]["loss"]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint, "save", lambda out, step, *rest: save(out, step, *rest) if step < 2 else 1 / 0)
        run_script("tools/sft.py", *words, tmp_path / "cut")
    assert run_script("tools/sft.py", "--resume", tmp_path / "cut").status == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("command, wanted", [
    ("sft", "--data"), ("sft --data no/such.jsonl", "no/such.jsonl"), ("sft --data FILE --truths RUN", "--truths"),
    ("sft --data FILE --mix 1", "--mix"), ("sft --data FILE --rate 1", "--rate"),
    ("sft --data FILE --held_out 0.0001", "--held_out"), ("sft --truths RUN --num_steps 9", "finish"),
    ("sft --data RUN/rollouts.jsonl", "not a record of traces"), ("traces RUN --out FILE", "--out"),
    ("traces RUN --out NEW --batch_size 0", "--batch_size"), ("traces RUN --out no/x.jsonl", "--out"),
    ("traces no/such --out NEW", "no/such")])
def test_a_mistake_is_one_line_and_leaves_nothing(command, wanted, finished, traces, tmp_path):
    for name, path in dict(RUN=finished[0], FILE=traces, NEW=tmp_path / "new.jsonl").items():
        command = command.replace(name, str(path))
    tool, *words = command.split()
    ended = run_script(f"tools/{tool}.py", *words, *["--out_dir", tmp_path / "new"] * (tool == "sft"))
    assert ended.status == 2 and wanted in ended.err and ended.err.count("error:") == 1, ended.err
    assert not [*tmp_path.glob("new*")]
