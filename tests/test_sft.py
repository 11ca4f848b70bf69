"""Fine-tuning: lessons are what the sampler leaves, the loss by plain forwards, the order, and commands on traces and on truths."""
import json
import shutil
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import reward
from conftest import lines, run_script, same_run
from data import Window, bos_ids, prompt_template
from flags import Run
from model import load_players
from rollout import COMPLETION, THINKING, Writer, rollout
from sampler import Sampler
from tools import sft
from tools.sft import NONE, PLAIN, TRACE, TRUTH


def a_writer(tiny, reasoning_tokens, completion_tokens):
    """A Writer that does not sample and reads lists of ids where it reads texts."""
    writer = Writer(Namespace(model=tiny[0]), tiny[1], Namespace(
        prompt=prompt_template("writeup", tiny[1]), prefix_tokens=9, echo_tokens=0, reasoning_tokens=reasoning_tokens, completion_tokens=completion_tokens))
    writer.prompt_ids, writer.encode = lambda ids: ids, lambda ids: (ids, [(k, k + 1) for k in range(len(ids))])
    return writer


def test_a_lesson_is_what_the_sampler_leaves_and_trains_what_it_drew(tiny):
    (model, tokenizer), writer, found = tiny, a_writer(tiny, 6, 20), set()
    with torch.no_grad():  # some rows close their thinking, some end by themselves
        model.get_base_model().lm_head.weight[[writer.rules.think_end, tokenizer.eos_token_id]] *= 4
    prompts, sampler = [[5 + i, 6, 7][:1 + i % 3] for i in range(64)], Sampler(model, torch.float32)
    sampler.sync("generator")
    roll = rollout(sampler, prompts, writer.rules, 6, 20, 1.0, [("lesson", i) for i in range(64)])
    for i in (i for i in range(64) if len(roll.reply[i]) not in range(4, 20)):  # a truth of that length may have been cut: it trains no stop
        closed = bool(roll.think_closed[i])
        ids, part = sft.trace_lesson(writer, dict(prefix=prompts[i], think=roll.think[i], closed=closed, truth=roll.reply[i]))
        n = len(ids)
        assert ids == roll.ids[i, :n].tolist() and not roll.sampled[i, n:].any()
        assert [p != NONE for p in part] == roll.sampled[i, :n].tolist() and [p == TRACE for p in part] == roll.thinking[i, :n].tolist()
        found.add((closed, ids[-1] == tokenizer.eos_token_id))
    assert found == {(True, True), (True, False), (False, True), (False, False)}


def test_long_texts_are_cut_and_what_was_cut_does_not_train_the_end(tiny):
    writer, stop = a_writer(tiny, 4, 40), tiny[1].eos_token_id
    for n, ends in ((50, False), (40, False), (24, False), (23, True), (1, True)):
        ids, part = sft.trace_lesson(writer, dict(prefix=[1], think=[8] * (4 + n % 3), closed=True, truth=[7] * n))
        assert ids == [1] + [8] * 4 + writer.rules.close.tolist() + [7] * min(n, 40) + [stop] * ends
        assert part == [NONE] + [TRACE] * 4 + [NONE] * 2 + [TRUTH] * (min(n, 40) + ends)
    for closed, trained in ((None, TRACE), (True, TRACE), (False, NONE)):
        assert sft.trace_lesson(writer, dict(prefix=[1], think=[8], closed=closed, truth=[7]))[1][:4] == [NONE, TRACE, trained, NONE]


def test_the_loss_is_that_of_the_trained_tokens_alone(tiny):
    model, writer, wanted, bos = tiny[0], a_writer(tiny, 20, 3), [], bos_ids(tiny[1])
    model.set_adapter("generator")
    close, trace = writer.rules.close.tolist(), dict(prefix=[11, 12], sep=[13], truth=[14, 15, 16, 17], think=[18, 19])
    lessons = [sft.trace_lesson(writer, trace), sft.plain_lesson(writer, trace), sft.truth_lesson(writer, Window([11, 12], [13], [14, 15, 16, 17]), [9, 8])]
    assert lessons == [([11, 12, 18, 19, *close, 14, 15, 16], [NONE] * 2 + [TRACE] * 3 + [NONE] + [TRUTH] * 3),
                       ([*bos, 11, 12, 13, 14, 15, 16], [NONE] + [PLAIN] * (len(bos) + 5)),
                       ([11, 12, 9, 8, *close, 14, 15, 16], [NONE] * 6 + [TRUTH] * 3)]
    for ids, part in lessons:
        logits = model(torch.tensor([ids])).logits[0, :, :writer.rules.blocked.shape[1]]
        for t, kind in ((t, kind) for t, kind in enumerate(part) if kind):
            bad = writer.rules.blocked[THINKING if kind == TRACE else COMPLETION]
            wanted.append((logits[t - 1].masked_fill(bad, -torch.inf).log_softmax(-1)[ids[t]].item(), kind))
    for size in (1, 3):
        logp, part = (torch.cat(x) for x in zip(*((stats.logp, part) for stats, part in sft.passes(model, lessons, writer.rules, size))))
        assert part.tolist() == [kind for _, kind in wanted] and torch.allclose(logp, torch.tensor([x for x, _ in wanted]), atol=1e-4)
    ((stats, _),) = sft.passes(model, lessons[:1] * 2, writer.rules, 2, with_kl=True)  # equal rows, which share all that they can
    assert (stats.kl > 0).all() and torch.allclose(*stats.logp.chunk(2), atol=1e-5)


def test_losses_are_weighted_as_the_lessons_are_mixed():
    pairs = [(-torch.tensor([2.0, 4.0]), torch.tensor([TRACE, TRUTH])), (-torch.tensor([1.0, 3.0, 5.0]), torch.tensor([TRUTH, PLAIN, PLAIN]))]
    assert sft.losses("loss", pairs) == pytest.approx(dict(loss=3.0, loss_trace=2.0, loss_truth=2.5, loss_plain=4.0))
    assert sft.losses("held", pairs, 0.25)["held"] == pytest.approx((0.75 * 7 + 0.25 * 8) / (0.75 * 3 + 0.25 * 2))


def test_the_mix_is_exact_all_traces_take_turns_and_some_prefixes_are_held_out():
    for mix in (0.0, 0.29, 0.9):
        order = sft.schedule(1000, mix, 6, seed=1)
        assert order == sft.schedule(1000, mix, 6, seed=1) != sft.schedule(1000, mix, 6, seed=2)
        assert all(abs(sum(plain for plain, _ in order[:p]) - mix * p) < 1 for p in range(1, 1001))
        for numbers in ([number for plain, number in order if plain == kind] for kind in (False, True)):
            assert all(sorted(numbers[k:k + 6]) == list(range(6)) for k in range(0, len(numbers) - 5, 6))
    rows = [dict(prefix=f"prefix {i % 40}") for i in range(80)]
    rest, held_out = sft.split(rows, 0.3)
    assert 0 < len(held_out) < len(rest) == 80 - len(held_out) and not any(row in rest for row in held_out)
    assert sft.split(rows[::-1], 0.3)[1] == held_out and held_out[:len(sft.split(rows, 0.2)[1])] == sft.split(rows, 0.2)[1]


@pytest.fixture
def traces(finished, tmp_path):
    rows = [dict(prefix=f"prefix {i}", sep=" ", think=f"thought {i}", closed=True, truth=f"continues with {i} " * 6, run=str(finished[0])) for i in range(30)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "traces.jsonl"


def test_traces_leave_the_adapter_that_was_best_on_held_out_prefixes(finished, traces, tmp_path, monkeypatch):
    words, loss = ["--data", traces, *"--g_lr 0.003 --batch_size 4 --num_steps 6 --held_out 0.3 --eval_every 2 --out_dir".split()], reward.policy_loss
    assert run_script("tools/sft.py", *words, tmp_path / "sft").status == 0
    rows, args, base = lines(tmp_path / "sft" / "metrics.jsonl"), Run(tmp_path / "sft").args, Run(finished[0]).args
    assert [row["step"] for row in rows] == list(range(6)) and ["held" in row for row in rows] == [True, False] * 3
    assert [row["g_lr"] for row in rows] == pytest.approx([0.003 * (6 - step) / 6 for step in range(6)]) and rows[4]["held"] < rows[0]["held"]
    assert (args.model, args.prompt, args.data, args.rank, args.beta1, args.kl_coef) == (base.model, base.prompt, "demo", 4, 0.9, 0)
    generator, _ = checkpoint.load_run(Run(tmp_path / "sft"), torch.device("cpu"))  # as evaluate.py, export and sample.py do
    assert generator.adapter == "generator"
    monkeypatch.setattr(reward, "policy_loss", lambda *args: -loss(*args))  # uphill nothing is better than the start
    assert "from after 0 steps" in run_script("tools/sft.py", *words, tmp_path / "worse").out
    weights = load_file(tmp_path / "worse" / "ckpt" / "generator" / "adapter_model.safetensors")
    assert not any(x.any() for key, x in weights.items() if "lora_B" in key)


def test_truths_sample_as_the_run_did_learn_the_truths_and_resume(finished, tmp_path, monkeypatch):
    base, words, save, out = Run(finished[0]), ["--truths", finished[0], "--save_every", 1, "--out_dir"], checkpoint.save, tmp_path / "whole"
    assert run_script("tools/sft.py", *words, out).status == 0
    tuned, written = Run(out), ("think", "completion", "think_closed", "n_think", "n_completion", "length_score", "reward", "p_real")
    assert {key for key, value in vars(base.args).items() if vars(tuned.args)[key] != value} == {"out_dir", "save_every"}
    assert tuned.floor == base.floor and [{**row, **dict.fromkeys(written)} for row in tuned.rollouts] == [{**row, **dict.fromkeys(written)} for row in base.rollouts]
    assert [row["completion"] for row in tuned.rollouts[:4]] == [row["completion"] for row in base.rollouts[:4]]  # the base wrote both
    assert tuned.rollouts[4:] != base.rollouts[4:] and tuned.metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and tuned.metrics[2]["kl"] > 1e-6
    player, _ = load_players(base.args, torch.device("cpu"))  # the first loss is the base's, on the truths after that thinking
    writer, windows = Writer(Sampler(player.model, torch.float32), player.tokenizer, base.args), [Window(r["prefix"], r["sep"], r["truth"]) for r in base.rollouts]
    thinks = writer.write(windows[:4], None, "rollout", 0).roll.think
    stats = [stats for stats, _ in sft.passes(player.model, [sft.truth_lesson(writer, *pair) for pair in zip(windows, thinks)], writer.rules, 4)]
    assert tuned.metrics[0]["loss"] == pytest.approx(-stats[0].logp.mean().item(), rel=1e-4)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint, "save", lambda out_dir, step, *rest: save(out_dir, step, *rest) if step < 2 else 1 / 0)
        run_script("tools/sft.py", *words, tmp_path / "cut")
    assert run_script("tools/sft.py", "--resume", tmp_path / "cut").status == 0
    same_run(out, tmp_path / "cut")


@pytest.mark.parametrize("tool, words, wanted", [
    ("sft", "", "--data"), ("sft", "--data no/such.jsonl", "no/such.jsonl"), ("sft", "--data TRACES --truths RUN", "--truths"), ("sft", "--data TRACES --mix 1", "--mix"),
    ("sft", "--data TRACES --rate 1", "--rate"), ("sft", "--data TRACES --held_out 0.0001", "--held_out"), ("sft", "--truths RUN --num_steps 9", "finish"),
    ("sft", "--data TRACES --run no/such", "no/such"), ("traces", "RUN --out TRACES", "--out"), ("traces", "RUN --out NEW --min_lift nan", "--min_lift"),
    ("traces", "RUN --out NEW --batch_size 0", "--batch_size"), ("traces", "RUN --out no/x.jsonl", "--out"), ("traces", "RUN --out NEW --polcy base", "--policy?"),
    ("traces", "RUN no/such --out NEW", "no/such"), ("traces", "RUN DAMAGED --out NEW", "rollouts.jsonl"), ("traces", "RUN --out NEW --reasoning_tokens 9999", "positions")])
def test_a_mistake_is_one_line_and_leaves_nothing(tool, words, wanted, finished, traces, tmp_path):
    shutil.copytree(finished[0], tmp_path / "damaged").joinpath("rollouts.jsonl").write_text('{"prefix": 1}\n')
    paths = dict(RUN=finished[0], TRACES=traces, DAMAGED=tmp_path / "damaged", NEW=tmp_path / "new.jsonl")
    ended = run_script(f"tools/{tool}.py", *(paths.get(word, word) for word in words.split()), *["--out_dir", tmp_path / "new"] * (tool == "sft"))
    assert ended.status == 2 and wanted in ended.err and ended.err.count("error:") == 1 and not [*tmp_path.glob("new*")], ended.err
