"""Both discriminators: what they read, what they say, and what their losses teach, by values worked by hand."""
import argparse
import json

import pytest
import torch

from data import Window
from discriminator import (UNPARSED, VALUE_COEF, Features, Head, Reason, cut_alike, discriminator_loss, match_score,
                           pair_ids, parse_verdict, training_labels, verdict_ids)
from model import Player, adapter_parameters
from reward import REAL, policy_loss
from rollout import sampled_stats, strip_echo
from sampler import Sampler

PREFIX, SEP, TRUTH = "Return an array of the given", "\n", "shape and type, filled with zeros, unless asked for ones."
WINDOWS = [Window(PREFIX, SEP, TRUTH), Window("The first line", " ", "says what the function does."),
           Window("Raises an error where", " ", "the file is not there."), Window("Equal", " ", "in shape and size.")]
TEXTS = ["Sure! Here is what comes next, as you wished: an array.", "", "two arrays differ in shape or type.", "x"]
SAID = [REAL, 1 - REAL, REAL, 1 - REAL, 1 - REAL, UNPARSED]  # on three real texts, then on three generated ones
FLAGS = dict(d_pool="mean", d_loss="ce", d_loss_scale=2, d_shuffle=False, d_think_tokens=None, d_kl_coef=0.1, seed=0,
             d_smooth=0.0, d_dropout=0.0, d_replay=0.5, group=1, batch_size=4, micro_batch=0, prefix_tokens=16, completion_tokens=24, reasoning_tokens=5, temperature=1)


def judge_of(tiny, kind=Head, start=False, **flags):
    """A Head or a Reason on the tiny model; start: as it starts, else with a last layer that is not zero."""
    player, args = Player(*tiny, "discriminator"), argparse.Namespace(**FLAGS | flags)
    player.activate()
    judge = kind(args, player, *[Sampler(player.model, static=False)] * (kind is Reason))
    if not start:
        torch.nn.init.normal_([*judge.parameters()][-2], generator=torch.Generator().manual_seed(2))
    return judge


def test_the_match_score_equals_hand_values():
    a, b = torch.tensor([1.0, 0]), torch.tensor([0.6, 0.8])
    real, generated = torch.stack([a, a, b, b])[:, None], torch.stack([a, b, b, b])[:, None]  # (4, 1, 2)
    assert match_score(real, generated, 2).tolist() == pytest.approx([2 - 0.6, 1.2 - 0.6, 2 - 1, 2 - 1])
    assert match_score(real, generated, 1).tolist() == pytest.approx([2, 1.2, 2, 2])
    assert match_score(real.repeat(1, 3, 1), generated.repeat(1, 3, 1), 4).tolist() == pytest.approx(
        [2 - 1.8 / 3, 1.2 - 2.6 / 3, 2 - 2.6 / 3, 2 - 2.6 / 3])


def test_features_find_the_truth_itself_most_alike_and_need_no_training(tiny):
    judge = judge_of(tiny, Features, start=True)
    for _ in range(2):
        judged = judge.score(WINDOWS, [WINDOWS[0].truth, "", *TEXTS[2:]], 0)
        assert judged.score[0].item() == pytest.approx(2, abs=1e-4) and judged.score[1] == 0
        assert judged.score[2:].max() < 1.99 and judged.shown == [] and judged.read.tolist() == [True, False, True, True]
    assert judge.seen == 1 and {*judge.state_dict()} == {"mean", "variance", "seen"} and not [*judge.parameters()]


def test_replayed_pairs_are_those_of_past_records(tiny):
    judge = judge_of(tiny)
    judged = judge.score(WINDOWS, TEXTS, 0)
    past = [dict(prefix=PREFIX, sep=SEP, truth=TRUTH, completion=f"old text {i}") for i in range(3)]
    wanted = [pair_ids(judge.encode, judge.bos, *record.values()) for record in past]
    found = [judge.replay(judged, past, first).detail for first in range(0, 200, 4)]
    old = [pairs[i] in wanted for pairs in found for i in judged.shown]
    assert 0.3 < sum(old) / len(old) < 0.7 and all(pairs[i] in [*wanted, judged.detail[i]] for pairs in found for i in range(4))
    assert [judge.replay(judged, past, 8).detail for _ in range(2)] == [found[2]] * 2  # a function of the position


def test_smoothed_labels_equal_a_hand_value():
    logits, labels = torch.tensor([[0.0, 2.0]]), torch.tensor([REAL])
    logp = logits.log_softmax(-1)[0]
    assert discriminator_loss(logits, labels, "ce", 0.2) == pytest.approx(-(0.9 * logp[1] + 0.1 * logp[0]).item())


@pytest.mark.parametrize("opening", ["", " ", "\n\n", "\t \n", "... of the given ", "\u2026of the given\n"])
def test_a_generator_that_writes_the_truth_is_indistinguishable(encode, opening):
    completion = strip_echo(opening + TRUTH, PREFIX, 16)
    real, generated = pair_ids(encode, [], PREFIX, SEP, TRUTH, completion)
    assert real == generated and sum(real[1]) > 5


@pytest.mark.parametrize("completion", ["shape", TRUTH + TRUTH, "caf\u00e9 \u2603\ufe0f \U0001f600" * 5, "x " * 60])
def test_both_texts_are_cut_to_the_same_number_of_completion_tokens(encode, completion):
    (real, mask), (generated, generated_mask) = pair_ids(encode, [7], PREFIX, SEP, TRUTH, completion)
    assert sum(mask) == sum(generated_mask) > 0 and mask[-1] and generated_mask[-1] and real[0] == generated[0] == 7
    texts = cut_alike(encode, SEP, TRUTH, completion, 12)  # for verdicts in words
    size, other = (sum(end > len(SEP) for _, end in encode(SEP + text)[1]) for text in texts)
    assert 0 < size == other <= 12 and TRUTH.startswith(texts[0]) and completion.startswith(texts[1])


def test_pooling_reads_the_completion_and_no_padding(tiny):
    hidden, mask = torch.arange(2 * 4 * 32.0).view(2, 4, 32), torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]) > 0
    for pool, wanted in (("last", [[64, 65], [224, 225]]), ("mean", [[48, 49], [208, 209]])):
        head = judge_of(tiny, d_pool=pool)
        head.norm = head.linear = torch.nn.Identity()
        assert head(hidden, mask)[:, :2].tolist() == wanted


def test_texts_too_long_for_the_model_lose_their_beginning(tiny, encode):
    head, ids, mask = judge_of(tiny), [*range(600)], [False] * 590 + [True] * 10
    assert torch.equal(head.logits([(ids, mask)]), head.logits([(ids[-512:], mask[-512:])]))
    whole = verdict_ids(tiny[1], encode, "one two three four five six", "end")
    short = verdict_ids(tiny[1], encode, "one two three four five six", "end", len(whole) - 3)
    assert short in [whole[:k] + whole[k + 3:] for k in range(len(whole) // 2, len(whole) - 9)]


@pytest.mark.parametrize("kind", [Head, Reason])
def test_judges_start_at_one_half_and_an_empty_completion_is_not_shown(kind, tiny):
    judge = judge_of(tiny, kind, start=True)
    judged, nothing = judge.score(WINDOWS, TEXTS, 0), judge.score(WINDOWS[1:2], TEXTS[1:2], 0)
    start = judged.p_real if kind is Head else judged.d_value  # (B,)
    assert start.tolist() == [0.5, kind is Reason, 0.5, 0.5] and judged.labels.tolist() == [[REAL, 1 - REAL]] * 4
    assert judged.shown == [0, 2, 3] and not judged.read[1] and judged.counts[1] and judged.p_real[1] == 0
    assert nothing.shown == [] and {*judge.metrics(nothing, 0)[0].values()} <= {None}


@pytest.mark.parametrize("kind", [Head, Reason])
def test_a_judgement_depends_on_its_text_and_its_position_alone(kind, tiny):
    judge = judge_of(tiny, kind)
    whole, part = judge.score(WINDOWS, TEXTS, 8), judge.score(WINDOWS[2:], TEXTS[2:], 10)
    for name in ("p_real", "log_generated" if kind is Head else "d_value"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[2:], rtol=1e-4, atol=1e-5)
    if kind is Reason:
        assert part.detail.roll.reply == [whole.detail.roll.reply[k] for k in (1, 2, 4, 5)]
        assert judge.score(WINDOWS, TEXTS, 9).detail.roll.reply != whole.detail.roll.reply


def test_shuffled_labels_are_swapped_in_half_of_the_pairs_that_are_shown():
    args = argparse.Namespace(d_shuffle=True, seed=0)
    shown, found, odd = [i for i in range(17) if i != 3], [], []
    for first in range(0, 40 * 17, 17):
        labels = training_labels(args, shown, 17, "cpu", first)  # (B, 2)
        assert (labels.sum(1) == REAL).all() and labels[:, 0].sum() == 1 + 8 and labels[3].tolist() == [REAL, 1 - REAL]
        found.append(labels)
        odd.append(training_labels(args, shown[:5], 17, "cpu", first)[shown[:5], 0].sum().item())
    assert len({tuple(x[:, 0].tolist()) for x in found}) == 40 and {*odd} == {2, 3}
    assert torch.equal(found[2], training_labels(args, shown, 17, "cpu", 34))
    assert not training_labels(args, [], 17, "cpu", 0)[:, 1].any() and 0.3 < torch.stack(found)[:, 0, 0].float().mean() < 0.7


def test_a_verdict_is_one_of_two_words_alone():
    assert [parse_verdict(x) for x in ("real", " real\n", "generated", "\n\ngenerated ")] == [REAL] * 2 + [1 - REAL] * 2
    for reply in ("Real", "real.", "real real", "real generated", "not real", "realistic", "<|im_start|>real", "", " "):
        assert parse_verdict(reply) == UNPARSED


def test_losses_of_the_head_equal_hand_values():
    logits, labels = torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([REAL, 1 - REAL])  # (2b, 2), (2b,)
    for kind, labels, wanted in (("ce", labels, -1), ("ce", 1 - labels, 1), ("pair", labels, -2)):
        assert discriminator_loss(logits, labels, kind).exp().item() == pytest.approx(1 + torch.e ** wanted)


def judged_by(judge, monkeypatch):
    """A judgement; the verdicts of a Reason are those of SAID."""
    verdict = iter(SAID)
    monkeypatch.setattr("discriminator.parse_verdict", lambda reply: next(verdict))
    return judge.score(WINDOWS, TEXTS, 0)


def formula(judge, judged):
    """The loss of the whole batch, by its definition."""
    labels = judged.labels[judged.shown].mT.flatten()  # (2n,)
    if isinstance(judge, Head):
        logits = [judge.logits([judged.detail[i][side]]) for side in (0, 1) for i in judged.shown]  # 2n of (1, 2)
        return discriminator_loss(torch.cat(logits), labels, judge.args.d_loss)  # ()
    roll, reward = judged.detail.roll, torch.tensor(SAID) == labels  # (2n,)
    stats, hidden = sampled_stats(judge.player.model, roll, [*range(6)], judge.rules, 1.0, True, return_hidden=True)
    advantage = (reward.float() - judged.detail.value).repeat_interleave(roll.sampled.sum(1))  # (N,)
    value = judge.value(hidden[range(6), judged.detail.ends])[:, 0].sigmoid()  # (2n,) chance to be right
    return (policy_loss(stats.logp, stats.kl, advantage, 0.1, 2 * 4 * (5 + judge.verdict_tokens))
            - VALUE_COEF * torch.where(reward, value, 1 - value).log().sum() / (2 * 4))  # ()


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind, d_loss", [(Head, "ce"), (Head, "pair"), (Reason, "ce")])
def test_losses_in_micro_batches_have_the_gradient_of_the_whole_batchs_formula(kind, d_loss, swap, tiny, monkeypatch):
    judge = judge_of(tiny, kind, d_loss=d_loss)
    judged = judged_by(judge, monkeypatch)
    judged.labels[0] = judged.labels[0].flip(0) if swap else judged.labels[0]  # (2,) as --d_shuffle swaps them
    params = adapter_parameters(judge.player.model, "discriminator") + [*judge.parameters()]
    losses, right = zip(*(judge.loss(judged, rows) for rows in ([0], [2, 3])))
    ours, theirs = (torch.cat([x.flatten() for x in torch.autograd.grad(loss, params, materialize_grads=True)])
                    for loss in (sum(losses), 2.0 * formula(judge, judged)))  # 2: --d_loss_scale
    assert theirs.norm() > 0 and (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert sum(right)[1] == ((judged.p_real[judged.shown] < 0.5).sum() if kind is Head else 2)  # whatever the labels


def test_an_unparsed_verdict_does_not_count_for_the_generator_and_metrics_equal_hand_values(tiny, monkeypatch):
    judge, chance = judge_of(tiny, Reason), torch.tensor([0.5, 0.5, 1.0, 0.0, 0.5, 0.25])  # (2n,)
    judged = judged_by(judge, monkeypatch)
    assert judged.counts.tolist() == [1, 1, 1, 0] and judged.read.tolist() == [1, 0, 1, 0] and not judged.p_real.any()
    detail = judged.detail._replace(value=chance, immediate=chance)
    metrics, rows = judge.metrics(judged._replace(detail=detail), 7)
    assert metrics == pytest.approx(dict(
        d_value=2.75 / 6, d_brier=(0.25 + 0.25 + 0 + 1 + 0.25 + 0.0625) / 6, d_parsed=5 / 6, d_think_empty=0,
        d_num_think=sum(map(len, detail.roll.think)) / 6, d_acc_immediate=(0.5 + 0.5 + 1 + 1 + 0.5 + 0.75) / 6))
    assert [row["row"] for row in rows] == [0, 2, 3] * 2 and all(row["step"] == 7 and json.dumps(row) for row in rows)
    assert [row["verdict"] for row in rows] == ["real", "generated", "real", "generated", "generated", None]


def test_an_immediate_verdict_is_the_chance_of_its_first_token_after_an_empty_thinking(tiny):
    judge = judge_of(tiny, Reason)
    verdicts, texts = judge.score(WINDOWS, TEXTS, 0).detail, [judge.decode(judge.opening + [i]) for i in judge.choice]
    assert all(f"</think>\n\n{word}".startswith(text) for word, text in zip(("generated", "real"), texts))
    for k, (row, end) in enumerate(zip(verdicts.roll.ids.tolist(), verdicts.ends)):
        logits = judge.player.model(torch.tensor([row[:end + 1] + judge.opening])).logits[0, -1, judge.choice]  # (2,)
        assert verdicts.immediate[k].item() == pytest.approx(logits.softmax(-1)[REAL].item(), rel=1e-3)


def test_dropout_zeroes_its_share_of_the_heads_input_in_the_loss_alone_by_position(tiny, monkeypatch):
    judge, seen = judge_of(tiny, d_dropout=0.25), []
    judged = judge.score(WINDOWS, TEXTS, 3)
    whole = judge.loss(judged, [0, 2])[0]
    monkeypatch.setattr(judge, "forward", lambda hidden, mask, kept: seen.append(kept) or torch.zeros(len(hidden), 2))
    for first in (3, 3, 4):
        judge.loss(judged._replace(first=first), [0, 2])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2]) and seen[0].shape == (4, 32)
    assert seen[0].unique().tolist() == pytest.approx([0.0, 4 / 3]) and 0.1 < (seen[0] == 0).float().mean() < 0.4
    judge.score(WINDOWS, TEXTS, 3)
    assert seen[-1] == 1.0 and whole.isfinite()
