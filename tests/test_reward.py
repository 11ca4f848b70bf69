import math

import pytest
import torch

from discriminator import Discriminator, Judged, discriminator_loss
from reward import REAL, advantages, ema, generator_reward, length_score, policy_loss


@pytest.mark.parametrize("n, score", [(0, 0.0), (1, 0.25), (2, 0.5), (4, 1.0), (9, 1.0)])
def test_length_score_is_n_over_the_budget_and_at_most_one(n, score):
    assert length_score(n, 4) == score


def paid(logits=None, p_real=None, d_value=None, length=1.0, kind="prob", d_scale=1.0, azr_t=0.125):
    """The reward of one completion: of a head's logits, or of a verdict's p_real and d_value."""
    logps = torch.tensor([logits or [0.0, 0.0]]).log_softmax(-1)
    p_real, d_value = (torch.tensor([0.0 if x is None else x]) for x in (logps[0, REAL].exp().item() if p_real is None else p_real, d_value))
    judged = Judged([0], torch.tensor([True]), torch.tensor([True]), p_real, logps[:, 1 - REAL], d_value, None, None)
    return generator_reward(judged, torch.tensor([length]), kind, d_scale, azr_t).item()


# p_real of the logits (log 1, log 3) is 3/4
@pytest.mark.parametrize("kind, d_scale, length, wanted", [
    ("prob", 1.0, 1.0, 0.75),
    ("prob", 30.0, 0.5, 11.25),
    ("neglog", 1.0, 1.0, math.log(4)),
    ("neglog", 2.0, 0.25, 0.5 * math.log(4)),
    ("prob", 1.0, 0.0, 0.0),
    ("neglog", 1.0, 0.0, 0.0),
])
def test_reward_equals_the_table(kind, d_scale, length, wanted):
    assert paid([0.0, math.log(3)], length=length, kind=kind, d_scale=d_scale) == pytest.approx(wanted)


@pytest.mark.parametrize("d_value, wanted", [(0.0, 0.0), (0.125, 0.0), (0.126, 0.874), (0.5, 0.5), (1.0, 0.0)])
def test_azr_pays_one_minus_d_value_above_the_threshold_and_nothing_up_to_it(d_value, wanted):
    assert paid(d_value=d_value, kind="azr") == pytest.approx(wanted)
    assert paid(d_value=d_value, kind="azr", d_scale=30.0, length=0.5) == pytest.approx(15 * wanted)


def test_azr_without_a_threshold_pays_nearly_all_for_what_is_never_told():
    assert paid(d_value=0.01, kind="azr", azr_t=0.0) == pytest.approx(0.99)


@pytest.mark.parametrize("said, wanted", [("real", 15.0), ("generated", 0.0)])
def test_prob_of_a_verdict_in_words_is_one_minus_its_correctness(said, wanted):
    assert paid(p_real=float(said == "real"), d_value=0.9, d_scale=30.0, length=0.5) == wanted


@pytest.mark.parametrize("kind", ["prob", "neglog"])
def test_reward_rises_with_the_real_class_and_is_never_negative(kind):
    reward = torch.tensor([paid(logits, kind=kind) for logits in ([40.0, -40.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0])])
    assert (reward >= 0).all() and (reward.diff() > 0).all()


def test_neglog_stays_finite_where_the_discriminator_is_sure():
    assert paid([-200.0, 200.0], kind="neglog") == pytest.approx(400.0)


def test_ema_starts_at_the_first_batch_and_lags_after_it():
    average = ema(None, 2.0, 0.9)
    assert average == 2.0
    average = ema(average, 3.0, 0.9)
    assert average == pytest.approx(2.1)
    assert ema(average, 1.0, 0.9) == pytest.approx(1.99)


def test_advantages_subtract_and_divide():
    rewards = torch.tensor([1.0, 3.0])
    assert advantages(rewards, 2.0).tolist() == [-1.0, 1.0]
    assert advantages(rewards, 2.0, 0.25).tolist() == pytest.approx([-2.0, 2.0])


def test_equal_rewards_give_no_advantage_and_no_division_by_zero():
    assert advantages(torch.tensor([0.7, 0.7]), 0.7, 0.0).tolist() == [0.0, 0.0]
    variance = ema(0.0, 1e-6, 0.9)  # all rewards equal until now, then a batch that differs by 1e-3: bounded by sqrt(1 / 0.1)
    assert advantages(torch.tensor([0.701, 0.699]), 0.7, variance).abs().max() < 3.2


def test_policy_loss_and_its_gradient_equal_hand_values():
    logp, kl = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True), torch.tensor([0.1, 0.2, 0.4], requires_grad=True)
    loss = policy_loss(logp, kl, torch.tensor([1.0, 1.0, -2.0]), 0.5, 10)
    assert loss.item() == pytest.approx((1.0 + 2.0 - 1.0 + 0.5 * 0.7) / 10)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.1, -0.1, 0.2])  # a good sequence is made more likely
    assert kl.grad.tolist() == pytest.approx([0.05] * 3)


def test_p_real_learns_to_name_the_real_class():
    torch.manual_seed(0)
    head, mask = Discriminator(8, "last"), torch.ones(2, 3, dtype=torch.bool)
    hidden = torch.randn(2, 3, 8)
    assert head(hidden, mask).softmax(-1)[:, REAL].tolist() == [0.5, 0.5]
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(100):
        discriminator_loss(head(hidden, mask), torch.tensor([REAL, 1 - REAL]), "ce").backward()
        optimizer.step()
        optimizer.zero_grad()
    real, generated = head(hidden, mask).softmax(-1)[:, REAL].tolist()
    assert real > 0.95 and generated < 0.05


def test_pairwise_loss_equals_hand_value():
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0]])  # scores 1 (real) and -1 (generated)
    labels = torch.tensor([REAL, 1 - REAL])
    assert discriminator_loss(logits, labels, "pair").item() == pytest.approx(math.log(1 + math.exp(-2)))
