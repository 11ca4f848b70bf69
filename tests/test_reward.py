"""Rewards, baseline and losses against values worked by hand."""
import math

import pytest
import torch

from discriminator import Judged
from reward import REAL, Baseline, generator_reward, length_score, policy_loss, truncated_ratio


def test_length_score_is_n_over_the_budget_and_at_most_one():
    assert [length_score(n, 4) for n in (0, 1, 2, 4, 9)] == [0.0, 0.25, 0.5, 1.0, 1.0]


def reward_of(kind, d_scale=1.0, length=1.0, logits=(0.0, 0.0), **judged):
    """The reward of one completion, from the head's logits, or from a verdict's p_real and d_value."""
    logps = torch.tensor([logits]).log_softmax(-1)  # (1, 2)
    yes, judged = torch.tensor([True]), {name: torch.tensor([x]) for name, x in judged.items()}  # (1,) each
    fields = dict(shown=[0], read=yes, counts=yes, p_real=logps[:, REAL].exp(), log_generated=logps[:, 1 - REAL],
                  d_value=None, labels=None, detail=None)
    return generator_reward(Judged(**fields | judged), torch.tensor([length]), kind, d_scale).item()


# logits (0, log 3): p_real is 3/4
@pytest.mark.parametrize("kind, d_scale, length, wanted", [
    ("prob", 1.0, 1.0, 0.75), ("prob", 30.0, 0.5, 11.25), ("prob", 1.0, 0.0, 0.0),
    ("neglog", 1.0, 1.0, math.log(4)), ("neglog", 2.0, 0.25, 0.5 * math.log(4)), ("neglog", 1.0, 0.0, 0.0)])
def test_the_heads_reward_equals_the_table(kind, d_scale, length, wanted):
    assert reward_of(kind, d_scale, length, (0.0, math.log(3))) == pytest.approx(wanted)


@pytest.mark.parametrize("kind", ["prob", "neglog"])
def test_reward_rises_with_p_real_is_never_negative_and_stays_finite(kind):
    rewards = [reward_of(kind, logits=logits) for logits in ((40.0, -40.0), (1.0, 0.0), (0.0, 0.0), (0.0, 1.0))]
    assert rewards[0] >= 0 and rewards == sorted(rewards) and len(set(rewards)) == 4
    assert reward_of(kind, logits=(-200.0, 200.0)) == pytest.approx(1.0 if kind == "prob" else 400.0)


@pytest.mark.parametrize("d_value, wanted", [(0.0, 0.0), (0.125, 0.0), (0.126, 0.874), (0.5, 0.5), (1.0, 0.0)])
def test_azr_pays_one_minus_d_value_above_an_eighth_and_nothing_up_to_it(d_value, wanted):
    assert reward_of("azr", d_value=d_value) == pytest.approx(wanted)
    assert reward_of("azr", 30.0, 0.5, d_value=d_value) == pytest.approx(15 * wanted)


def test_prob_pays_for_a_verdict_that_says_real():
    assert [reward_of("prob", 30.0, 0.5, p_real=p_real, d_value=0.9) for p_real in (1.0, 0.0)] == [15.0, 0.0]


# decay 0.5; by batch: rewards, which of them count, baseline used, advantages, mean and variance after it
TABLE = [([1.0, 3.0], [1, 1], 2.0, [-1.0, 1.0], 2.0, 1.0),   # the first batch starts both
         ([4.0, 4.0], [1, 1], 2.0, [2.0, 2.0], 3.0, 2.5),    # compared with the mean from before it
         ([5.0, 99.0], [1, 0], 3.0, [2.0, 0.0], 4.0, 3.25),  # what does not count earns nothing and moves nothing
         ([7.0, 8.0], [0, 0], 4.0, [0.0, 0.0], 4.0, 3.25),   # nothing counts
         ([math.nan, 4.0], [1, 1], 4.0, [math.nan, 0.0], 4.0, 3.25)]   # a reward that is not finite moves nothing


@pytest.mark.parametrize("normalize", [False, True])
def test_the_baseline_equals_the_table_and_its_state_is_all_there_is(normalize):
    baseline = Baseline(0.5, normalize)
    for reward, counts, used, wanted, mean, variance in TABLE:
        loaded = Baseline(0.5, normalize)
        loaded.load_state_dict(baseline.state_dict())
        for one in (baseline, loaded):
            got, size = one.advantages(torch.tensor(reward), torch.tensor(counts) > 0), variance ** (normalize / 2)
            assert got.tolist() == pytest.approx([x / size for x in wanted], nan_ok=True)
            assert (one.used, one.mean, one.variance) == pytest.approx((used, mean, variance))


@pytest.mark.parametrize("reward, counts", [([1.0, 2.0], [0, 0]), ([math.nan, 1.0], [1, 1]), ([math.inf, 1.0], [1, 1])])
def test_a_first_batch_without_a_finite_mean_leaves_the_baseline_unset(reward, counts):
    baseline, counts = Baseline(0.9, True), torch.tensor(counts) > 0
    assert not baseline.advantages(torch.tensor(reward), counts)[~counts].any() and baseline.mean is None
    assert baseline.advantages(torch.tensor([1.0, 3.0]), torch.tensor([True, True])).tolist() == pytest.approx([-1, 1])


def test_normalised_advantages_are_bounded_where_all_rewards_were_equal_before():
    baseline, all_count = Baseline(0.9, True), torch.ones(4, dtype=torch.bool)
    assert not baseline.advantages(torch.full((4,), 0.5), all_count).any()
    advantages = baseline.advantages(torch.tensor([0.5, 0.5, 0.5, 0.75]), all_count)  # (4,)
    assert advantages[3].item() == pytest.approx((4 / 0.1) ** 0.5, rel=1e-3)  # sqrt(B / (1 - decay))


def test_importance_weights_are_ratios_cut_off_above_and_carry_no_gradient():
    logp = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    found = truncated_ratio(logp, torch.tensor([-1.0, -2.0, -2.0]), 2.0)
    assert found.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)]) and not found.requires_grad
    assert truncated_ratio(logp, torch.zeros(3), 0).tolist() == [1, 1, 1]


def test_policy_loss_and_its_gradient_equal_hand_values():
    logp, kl = (torch.tensor(x, requires_grad=True) for x in ([-1.0, -2.0, -0.5], [0.1, 0.2, 0.4]))  # (N,) each
    loss = policy_loss(logp, kl, torch.tensor([1.0, 1.0, -2.0]), 0.5, 10)
    assert loss.item() == pytest.approx((1.0 + 2.0 - 1.0 + 0.5 * 0.7) / 10)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.1, -0.1, 0.2])  # a good sequence becomes more likely
    assert kl.grad.tolist() == pytest.approx([0.05] * 3)
