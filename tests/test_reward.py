"""Rewards, baseline and losses against values worked by hand."""
import math

import pytest
import torch

from discriminator import Judged
from model import TokenStats
from reward import (REAL, Baseline, adapted_coef, centred, generator_reward, kl_barrier, kl_term, length_score,
                    policy_loss, truncated_ratio)


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


def test_the_logit_is_the_margin_above_the_lowest_of_the_batch_and_an_empty_text_earns_nothing():
    logps = torch.tensor([[0.0, 3.0], [0.0, -1.0], [20.0, -20.0], [0.0, -torch.inf]]).log_softmax(-1)  # (4, 2)
    read = torch.tensor([True, True, True, False])
    judged = Judged([0, 1, 2], read, read, logps[:, REAL].exp(), logps[:, 1 - REAL], None, None, None)
    got = generator_reward(judged, torch.tensor([0.5, 1, 1, 1]), "logit", 2.0)
    assert got.tolist() == pytest.approx([2 * 0.5 * (3 + 40), 2 * (40 - 1), 0, 0])


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


@pytest.mark.parametrize("kind, group, wanted", [
    ("loo", 2, [1 - 3, 3 - 1, 5 - 7, 7 - 5, 0, 0]),  # the last is alone in its group: nothing to compare it with
    ("loo", 3, [1 - 4, 3 - 3, 5 - 2, 7 - 9, 0, 9 - 7]),
    ("loo", 1, [1 - 6, 3 - 5.5, 5 - 5, 7 - 4.5, 0, 9 - 4]),  # the whole batch is one group
    ("none", 1, [1, 3, 5, 7, 0, 9])])
def test_other_baselines_equal_the_table(kind, group, wanted):
    reward, counts = torch.tensor([1.0, 3, 5, 7, 99, 9]), torch.tensor([1, 1, 1, 1, 0, 1]) > 0
    assert Baseline(0.9, False, kind, group).advantages(reward, counts).tolist() == pytest.approx(wanted)


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


@pytest.mark.parametrize("kl_agg, levels", [("mean", (2, 0.5)), ("rms", ((24 / 4 + 1e-8) ** 0.5, 0.5)),
                                            ("p95", (2 + 0.85 * 2, 0.5)), ("max", (4, 0.5))])
def test_the_barrier_charges_what_exceeds_it_and_its_gradient_is_the_exact_one(kl_agg, levels):
    kl = torch.tensor([0.0, 4, 2, 2, 0.5], dtype=torch.double, requires_grad=True)  # sequences of 4, 0 and 1 tokens
    penalty = kl_barrier(kl, [4, 0, 1], kl_agg, 1.0)
    assert penalty.tolist() == pytest.approx([levels[0] - 1] * 4 + [0])
    assert torch.autograd.gradcheck(lambda x: kl_barrier(x, [4, 0, 1], kl_agg, 1.0).sum(), kl + torch.arange(5) / 1e3)
    assert torch.equal(kl_barrier(kl, [4, 0, 1], "mean", 0.0), kl)


def test_centred_rewards_equal_hand_values():
    assert centred(torch.tensor([1.0, 2, 6]), False).tolist() == [-2, -1, 3]
    assert centred(torch.tensor([1.0, 2, 6]), True).tolist() == pytest.approx([x / (14 / 3) ** 0.5 for x in (-2, -1, 3)])
    assert centred(torch.ones(3), True).tolist() == [0, 0, 0]


def test_the_barrier_is_finite_at_zero_and_where_nothing_was_sampled():
    kl = torch.zeros(3, requires_grad=True)
    kl_barrier(kl, [3], "rms", 0.0).sum().backward()
    assert kl.grad.isfinite().all() and kl_barrier(kl[:0], [0, 0], "max", 0.1).shape == (0,)


def test_importance_weights_are_ratios_cut_off_above_and_carry_no_gradient():
    logp = torch.tensor([-1.0, -1.0, -3.0], requires_grad=True)
    found = truncated_ratio(logp, torch.tensor([-1.0, -2.0, -2.0]), 2.0)
    assert found.tolist() == pytest.approx([1.0, 2.0, math.exp(-1)]) and not found.requires_grad


def test_policy_loss_and_its_gradient_equal_hand_values():
    logp, kl = (torch.tensor(x, requires_grad=True) for x in ([-1.0, -2.0, -0.5], [0.1, 0.2, 0.4]))  # (N,) each
    loss = policy_loss(logp, kl, torch.tensor([1.0, 1.0, -2.0]), 0.5, 10)
    assert loss.item() == pytest.approx((1.0 + 2.0 - 1.0 + 0.5 * 0.7) / 10)
    loss.backward()
    assert logp.grad.tolist() == pytest.approx([-0.1, -0.1, 0.2])  # a good sequence becomes more likely
    assert kl.grad.tolist() == pytest.approx([0.05] * 3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_an_estimate_of_the_kl_has_the_exact_gradient_of_its_own_kl_on_average(kind):
    # texts of two tokens out of three, the second drawn after the first; p is the policy, q the base
    g = torch.Generator().manual_seed(0)
    first, second, q_first, q_second = (torch.randn(*shape, generator=g, dtype=torch.double).requires_grad_()
                                        for shape in ((3,), (3, 3)) * 2)
    log_p, log_p2, log_q, log_q2 = (x.log_softmax(-1) for x in (first, second, q_first, q_second))
    total = 0.0
    for a in range(3):
        for b in range(3):
            logp, ref_logp = torch.stack([log_p[a], log_p2[a, b]]), torch.stack([log_q[a], log_q2[a, b]]).detach()
            term = kl_term(TokenStats(logp, None, None, ref_logp), [2], kind).sum()
            total = total + (log_p[a] + log_p2[a, b]).exp().detach() * term  # a mean over what is drawn
    p, q = log_p.exp(), log_q.exp()
    reverse = (p * (log_p - log_q)).sum(), (log_p2.exp() * (log_p2 - log_q2)).sum(-1)  # (), (3,)
    forward = (q * (log_q - log_p)).sum(), (log_q2.exp() * (log_q2 - log_p2)).sum(-1)
    wanted = {"k1": reverse[0] + (p * reverse[1]).sum(),  # of the whole text
              "k2": reverse[0] + (p.detach() * reverse[1]).sum(),
              "k3": forward[0] + (p.detach() * forward[1]).sum()}[kind]
    for ours, theirs in zip(*(torch.autograd.grad(x, (first, second), retain_graph=True) for x in (total, wanted))):
        torch.testing.assert_close(ours, theirs)


def test_estimates_of_the_kl_equal_hand_values_and_are_zero_at_the_base():
    stats = TokenStats(torch.tensor([-1.0, -2.0, -3.0]), None, torch.tensor([7.0, 8, 9]), torch.tensor([-2.0, -2.0, -2.0]))
    assert kl_term(stats, [2, 1], "exact").tolist() == [7, 8, 9]
    assert kl_term(stats, [2, 1], "k1").tolist() == [-1, 0, 3]  # r is 1, 0, -1; summed from each token on, by text
    assert kl_term(stats, [2, 1], "k2").tolist() == [0.5, 0, 0.5]
    assert kl_term(stats, [2, 1], "k3").tolist() == pytest.approx([math.exp(-1), 0, math.e - 2])


def test_the_adapted_coefficient_moves_at_most_two_percent_toward_the_target():
    assert [adapted_coef(0.5, kl, 0.1) for kl in (0.0, 0.09, 0.1, 0.11, 9.0)] == pytest.approx(
        [0.49, 0.495, 0.5, 0.505, 0.51])
