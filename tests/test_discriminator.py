"""Both discriminators: what they read, what they say, what their losses teach, by hand-worked values."""
import argparse
import json

import pytest
import torch

from data import Window
from discriminator import (UNPARSED, VALUE_COEF, Head, Reason, cut_alike, discriminator_loss, learnt_labels, pair_ids,
                           parse_verdict, verdict_ids)
from model import Player, adapter_parameters, hidden_states, micro_batches, token_stats
from reward import REAL, policy_loss
from rollout import COMPLETION, THINKING, strip_echo
from sampler import Sampler

WINDOWS = [Window("Return a new array of the given", "\n",
                  "shape and type, filled with zeros, unless the caller asked for ones."),
           Window("The first line says", " ", "what the function does, in one short sentence; details come after."),
           Window("Raises an error where", " ", "the file is not there."),
           Window("Two arrays are equal", " ", "where they have the same shape and elements.")]
TEXTS = ["Sure! Here is what comes next, as you wished: an array.", "", "two arrays differ in their shape or their type.", "x"]
PREFIX, SEP, TRUTH = WINDOWS[0]
ODD = "caf\u00e9 \u2603\ufe0f \U0001f600" * 5
FLAGS = dict(d_pool="mean", d_loss="ce", d_loss_scale=1.0, d_shuffle=False, seed=0, micro_batch=0, batch_size=4,
             prefix_tokens=16, completion_tokens=24, reasoning_tokens=5, d_think_tokens=None, temperature=1.0,
             d_kl_coef=0.1)


def judge_of(tiny, kind=Head, start=False, **flags):
    """A Head or a Reason on the tiny model; its last layer is not zero, unless it stands at its start."""
    args, player = argparse.Namespace(**FLAGS | flags), Player(*tiny, "discriminator")
    player.activate()
    judge = Head(args, player) if kind is Head else Reason(args, player, Sampler(player.model, torch.float32, static=False))
    if not start:
        torch.nn.init.normal_((judge.linear if kind is Head else judge.value[1]).weight,
                              generator=torch.Generator().manual_seed(2))
    return judge


# -----------------------------------------------------------------------------
# what they read

@pytest.mark.parametrize("opening", ["", " ", "\n\n", "\t \n", "... of the given ", "\u2026of the given\n", "the given "])
def test_a_generator_that_writes_the_truth_cannot_be_told_from_it(encode, opening):
    completion = strip_echo(opening + TRUTH, PREFIX, 16)
    real, generated = pair_ids(encode, [], PREFIX, SEP, TRUTH, completion)
    assert real == generated and sum(real[1]) > 5


@pytest.mark.parametrize("completion", ["shape", "a shorter one.", TRUTH + TRUTH, ODD, "x " * 60])
def test_both_texts_are_cut_to_the_same_number_of_completion_tokens(encode, completion):
    (real, mask), (generated, generated_mask) = pair_ids(encode, [7], PREFIX, SEP, TRUTH, completion)
    assert sum(mask) == sum(generated_mask) > 0 and mask[-1] and generated_mask[-1] and real[0] == generated[0] == 7
    assert len(real) == len(mask) and len(generated) == len(generated_mask)
    texts = cut_alike(encode, SEP, TRUTH, completion, 12)  # for verdicts in words
    sizes = {sum(end > len(SEP) for _, end in encode(SEP + text)[1]) for text in texts}
    assert len(sizes) == 1 and 0 < sizes.pop() <= 12 and TRUTH.startswith(texts[0]) and completion.startswith(texts[1])


def test_pooling_reads_the_completion_and_no_padding(tiny):
    hidden = torch.arange(2 * 4 * 32.0).view(2, 4, 32)  # (B, T, H)
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]) > 0  # (B, T)
    for pool, wanted in (("last", [[64, 65], [224, 225]]), ("mean", [[48, 49], [208, 209]])):
        head = judge_of(tiny, d_pool=pool)
        head.norm, head.linear = torch.nn.Identity(), torch.nn.Identity()
        assert head(hidden, mask)[:, :2].tolist() == wanted


def test_texts_too_long_for_the_model_lose_their_beginning(tiny, demo, encode):
    head, ids = judge_of(tiny), [7, 8] * 300
    mask = [False] * 590 + [True] * 10
    assert torch.equal(head.logits([(ids, mask)]), head.logits([(ids[-512:], mask[-512:])]))
    whole = verdict_ids(demo[1], encode, "one two three four five six", "end")
    short = verdict_ids(demo[1], encode, "one two three four five six", "end", len(whole) - 3)
    start = next(i for i, (a, b) in enumerate(zip(whole, short)) if a != b)
    assert whole[:start] + whole[start + 3:] == short


# -----------------------------------------------------------------------------
# what they say

@pytest.mark.parametrize("kind", [Head, Reason])
def test_p_real_and_d_value_start_at_one_half_and_an_empty_completion_is_not_shown(kind, tiny):
    judged = judge_of(tiny, kind, start=True).score(WINDOWS, TEXTS, 0)
    assert judged.shown == [0, 2, 3] and not judged.read[1] and judged.counts[1] and judged.p_real[1] == 0
    if kind is Head:
        assert judged.p_real[[0, 2, 3]].tolist() == [0.5] * 3 and judged.log_generated[1] == 0
    else:
        assert judged.d_value.tolist() == [0.5, 1, 0.5, 0.5]
    judge = judge_of(tiny, kind)
    nothing = judge.score(WINDOWS[1:2], TEXTS[1:2], 0)
    assert nothing.shown == [] and not {*judge.metrics(nothing, 0)[0].values()} - {None}


@pytest.mark.parametrize("kind", [Head, Reason])
def test_a_judgement_depends_on_its_own_text_and_position_alone(kind, tiny):
    judge = judge_of(tiny, kind, d_shuffle=True)
    whole, part = judge.score(WINDOWS, TEXTS, 8), judge.score(WINDOWS[2:], TEXTS[2:], 10)
    torch.testing.assert_close(part.p_real, whole.p_real[2:], rtol=1e-4, atol=1e-5)
    assert torch.equal(part.labels, whole.labels[2:])
    if kind is Reason:
        assert part.detail.roll.reply == [whole.detail.roll.reply[k] for k in (1, 2, 4, 5)]
        torch.testing.assert_close(part.d_value, whole.d_value[2:], rtol=1e-4, atol=1e-5)
        assert judge.score(WINDOWS, TEXTS, 9).detail.roll.reply != whole.detail.roll.reply


def test_shuffled_labels_are_a_coin_a_pair():
    args, device = argparse.Namespace(d_shuffle=True, seed=0), torch.device("cpu")
    labels = learnt_labels(args, range(400), 400, device, 0)  # (B, 2)
    assert (labels.sum(1) == REAL).all() and 160 < labels[:, 0].sum() < 240
    assert torch.equal(labels[100:], learnt_labels(args, range(300), 300, device, 100))
    args.d_shuffle = False
    assert learnt_labels(args, range(3), 3, device, 0).tolist() == [[REAL, 1 - REAL]] * 3


@pytest.mark.parametrize("reply, verdict", [
    ("real", REAL), ("generated", 1 - REAL), (" real\n", REAL), ("\n\ngenerated ", 1 - REAL), *((reply, UNPARSED) for reply in (
        "Real", "real.", "real real", "real generated", "not real", "realistic", "generate", "<|im_start|>real", "", " "))])
def test_a_verdict_is_one_of_two_words_alone(reply, verdict):
    assert parse_verdict(reply) == verdict


# -----------------------------------------------------------------------------
# what their losses teach

def test_losses_of_logits_equal_hand_values():
    logits, labels = torch.tensor([[0.0, 1.0], [0.0, -1.0]]), torch.tensor([REAL, 1 - REAL])  # (2b, 2), (2b,)
    for kind, labels, wanted in (("ce", labels, (1 + torch.e ** -1)), ("pair", labels, 1 + torch.e ** -2), ("ce", 1 - labels, 1 + torch.e)):
        assert discriminator_loss(logits, labels, kind).exp().item() == pytest.approx(wanted)
