"""The discriminator that reasons: what it is shown, how it is read, what moves by which loss, and that micro-batches change nothing."""
import functools
import json

import pytest
import torch

from data import Window
from discriminator import verdict_ids
from model import adapter_parameters, micro_batches
from reason import UNPARSED, Reason, cut_alike, parsed, summary
from reward import REAL
from rollout import keyed, reference_hidden, sampled_stats
from sampler import Sampler

WINDOWS = [Window("Return a new array of the given", "\n", "shape and type, filled with zeros, unless the caller asked for ones."),
           Window("The first line says", " ", "what the function does, in one short sentence; details come after."),
           Window("Raises an error where", " ", "the file is not there.")]
COMPLETIONS = [("Sure! Here is what comes next, as you wished: an array.", 14), ("", 0), ("two arrays differ in their shape or in their type.", 12)]
random_for = functools.partial(keyed, torch.device("cpu"), 0)


def judge_of(tiny, **flags):
    """A Reason on the tiny model, with a value head that is not zero."""
    model, tokenizer = tiny
    model.set_adapter("discriminator")
    flags = dict(micro_batch=0, loss_scale=1.0, shuffle=False, think_tokens=5, temperature=1.0, kl_coef=0.1, value_coef=1.0, detach=False, reference=[]) | flags
    judge = Reason(model, tokenizer, (16, 24), sampler=Sampler(model, torch.float32), adapter="discriminator", batch_size=3, **flags)
    torch.manual_seed(2)
    torch.nn.init.normal_(judge.value[1].weight)
    return judge


@pytest.mark.parametrize("reply, verdict", [
    ("real", REAL), ("generated", 1 - REAL), (" real\n", REAL), ("\n\ngenerated ", 1 - REAL),
    ("Real", UNPARSED), ("real.", UNPARSED), ("real real", UNPARSED), ("real generated", UNPARSED), ("not real", UNPARSED), ("realistic", UNPARSED),
    ("generate", UNPARSED), ("generatedx", UNPARSED), ("<|im_start|>real", UNPARSED), ("", UNPARSED), ("   ", UNPARSED)])
def test_a_verdict_is_one_of_two_words_alone(reply, verdict):
    assert parsed(reply) == verdict


def test_a_verdicts_budget_leaves_room_to_say_too_much(demo, encode):
    judge = Reason(*demo, (16, 24), 0, 1.0, False, None, None, 3, 0, 1.0, 0.0, 1.0, False, [])
    assert judge.verdict_tokens == max(len(encode("real")[0]), len(encode("generated")[0])) + 1


@pytest.mark.parametrize("completion", ["shape", "a shorter one.", "caf\u00e9 \u2603\ufe0f \U0001f600" * 5, "x " * 60])
def test_both_texts_are_judged_by_the_same_number_of_tokens(encode, completion):
    window = WINDOWS[0]
    texts = cut_alike(encode, window.sep, window.truth, completion, 12)
    sizes = {len([end for _, end in encode(window.sep + text)[1] if end > len(window.sep)]) for text in texts}
    assert len(sizes) == 1 and 0 < sizes.pop() <= 12
    assert window.truth.startswith(texts[0]) and completion.startswith(texts[1])


def test_an_empty_completion_is_not_shown_and_earns_nothing(tiny):
    judged = judge_of(tiny).look(WINDOWS, COMPLETIONS, random_for, 0)
    assert judged.shown == [0, 2] and len(judged.own.said) == 4
    assert judged.counts[1] and not judged.read[1] and judged.p_real[1] == 0 and judged.d_value[1] == 1
    nothing = judge_of(tiny).look(WINDOWS[:1], COMPLETIONS[1:2], random_for, 0)
    assert nothing.shown == [] and judge_of(tiny).tell(nothing, 0) == (summary([]), {"verdicts": []})


def test_a_prompt_too_long_for_the_model_loses_the_prefixs_beginning(demo, encode):
    whole = verdict_ids(demo[1], encode, "one two three four five six", "end")
    short = verdict_ids(demo[1], encode, "one two three four five six", "end", len(whole) - 3)
    start = next(i for i, (a, b) in enumerate(zip(whole, short)) if a != b)
    assert len(short) == len(whole) - 3 and whole[:start] + whole[start + 3:] == short


def test_verdicts_are_a_function_of_seed_and_step(tiny):
    judge = judge_of(tiny)
    one, again, other = (judge.look(WINDOWS, COMPLETIONS, random_for, step).own.roll.ids for step in (4, 4, 5))
    assert torch.equal(one, again) and (one.shape != other.shape or not torch.equal(one, other))


def test_what_cannot_be_parsed_does_not_count_for_the_generator_and_is_wrong_for_the_discriminator(tiny, monkeypatch):
    said = iter([REAL, REAL, UNPARSED, 1 - REAL])  # of real texts 0 and 2, then of generated texts 0 and 2
    monkeypatch.setattr("reason.parsed", lambda reply: next(said))
    judge = judge_of(tiny)
    judged = judge.look(WINDOWS, COMPLETIONS, random_for, 0)
    assert judged.counts.tolist() == [False, True, True] and judged.read.tolist() == [False, False, True]
    assert judged.p_real.tolist() == [0, 0, 0]
    assert judge.loss(judged, judged.shown)[1].tolist() == [2, 1]
    rows = judge.tell(judged, 7)[1]["verdicts"]
    assert [(row["row"], row["text"], row["verdict"]) for row in rows] == [
        (0, "real", "real"), (2, "real", "real"), (0, "generated", None), (2, "generated", "generated")]
    assert all(row["step"] == 7 and 0 < row["d_value"] < 1 and json.dumps(row) for row in rows)


def test_the_metrics_of_verdicts_equal_hand_values():
    row = dict(text="real", verdict="real", immediate=0.5, d_value=0.5, think="a", n_think=3)
    rows = [row, row | dict(verdict="generated", d_value=1.0, think=" \n"), row | dict(text="generated", verdict=None, n_think=0, d_value=0.0),
            row | dict(text="generated", verdict="generated")]
    assert summary(rows) == dict(d_value=0.5, d_brier=(0.25 + 1 + 0 + 0.25) / 4, d_parsed=0.75, d_num_think=2.25, d_think_empty=0.25,
                                 d_acc_immediate=0.5)


def gradients(judge, judged, size):
    """Of adapter and value head, in micro-batches of so many rows."""
    params = [adapter_parameters(judge.model, "discriminator"), list(judge.value.parameters())]
    for rows in micro_batches(judged.shown, size):
        judge.loss(judged, rows)[0].backward()
    found = [torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in part]) for part in params]
    for p in sum(params, []):
        p.grad = None
    return found


SAID = [REAL, 1 - REAL, REAL, 1 - REAL, 1 - REAL, UNPARSED]  # of three real texts, then of three generated ones


def looked(judge):
    """A judgement of three pairs, with verdicts that differ."""
    judged = judge.look([WINDOWS[0], *WINDOWS], [COMPLETIONS[2], *COMPLETIONS], random_for, 0)
    return judged._replace(own=judged.own._replace(said=torch.tensor(SAID)))


@pytest.mark.parametrize("reference", [[], ["generator"]])
def test_micro_batches_give_the_gradient_of_the_whole_batch(reference, tiny):
    judge = judge_of(tiny, reference=reference)
    judged = looked(judge)
    whole, split = gradients(judge, judged, 0), gradients(judge, judged, 1)
    assert all(a.norm() > 0 and (a - b).norm() / a.norm() < 1e-5 for a, b in zip(whole, split))
    if reference:  # another one than the base: it counts, and learns nothing
        assert all(p.grad is None for p in adapter_parameters(judge.model, "generator"))
        assert (gradients(judge_of(tiny), judged, 0)[0] - whole[0]).norm() / whole[0].norm() > 1e-3


def policy_alone(judge, judged):
    """What the loss must be without the value's, by its formula: the reward of SAID is 1, 0, 1, 1, 1, 0."""
    own, rows = judged.own, list(range(6))
    ref_hidden = reference_hidden(judge.model, own.roll, rows)
    stats = sampled_stats(judge.model, own.roll, rows, judge.rule, 1.0, ref_hidden)
    advantage = torch.tensor([1.0, 0, 1, 1, 1, 0]) - own.value
    each = advantage.repeat_interleave(own.roll.sampled.sum(1))
    return (-each * stats.logp + judge.kl_coef * stats.kl).sum() / (2 * 3 * (5 + judge.verdict_tokens))


@pytest.mark.parametrize("detach", [False, True])
def test_the_values_loss_reaches_the_adapter_unless_it_is_detached(detach, tiny):
    judge = judge_of(tiny, detach=detach)
    judged = looked(judge)
    adapter, head = gradients(judge, judged, 0)
    loss = policy_alone(judge, judged)
    loss.backward()
    policy = torch.cat([p.grad.flatten() for p in adapter_parameters(judge.model, "discriminator")])
    assert head.norm() > 0 and policy.norm() > 0
    assert ((adapter - policy).norm() / policy.norm() < 1e-5) == detach
    value = judged.own.value
    entropy = -(value[[0, 2, 3, 4]].log().sum() + (1 - value[[1, 5]]).log().sum()) / (2 * 3)  # a mean over texts
    assert judge.loss(judged, judged.shown)[0].item() == pytest.approx((loss + entropy).item(), rel=1e-4)
