"""
Rewards, baseline, advantages and the generator's loss: pure functions, tested by hand-worked tables.

Letters: B sequences, N sampled positions.
"""
import math

import torch

REAL = 1         # the discriminator's class of the real text; 0 is generated
AZR_LEAST = 1/8  # a d_value up to this earns nothing under --g_reward azr


def length_score(n, completion_tokens):
    """n / completion_tokens, at most 1; n: tokens of the completion after the echo is cut."""
    return min(n / completion_tokens, 1.0)


def generator_reward(judged, length_scores, kind, d_scale):
    """The generator's reward (B,), from a discriminator.Judged and length scores (B,).

    prob:   d_scale * p_real * length_score
    neglog: d_scale * -log(1 - p_real) * length_score, which does not saturate where the discriminator is sure
    azr:    d_scale * (1 - d_value if d_value > 1/8 else 0) * length_score (after arXiv 2505.03335, where a proposer
            earns the solver's failure rate, and 0 for what nobody solves)
    No reward is negative: a negative one, times a length score, would pay for writing nothing.
    """
    if kind == "prob":
        score = judged.p_real  # (B,)
    elif kind == "neglog":
        score = -judged.log_generated  # (B,)
    elif kind == "azr":
        score = torch.where(judged.d_value > AZR_LEAST, 1 - judged.d_value, 0.0)  # (B,)
    else:
        raise ValueError(f"no such reward: {kind}")
    return d_scale * score * length_scores  # (B,)


class Baseline:
    """Moving averages of the mean reward and of the mean squared distance of rewards from it.

    A batch is compared with the average from before it, the first batch with its own mean. The
    variance includes the batch, so that an advantage stays below sqrt(B / (1 - decay)) even if all rewards were equal
    until now.
    """

    def __init__(self, decay, normalize):
        self.decay, self.normalize, self.mean, self.variance, self.used = decay, normalize, None, None, None

    def advantages(self, reward, counts):
        """reward (B,) minus the baseline, divided by the running standard deviation if normalize; 0 where a reward does
        not count, by counts (B,) bool: (B,).
        """
        new = reward[counts].mean().item()
        self.used = new if self.mean is None else self.mean
        variance = (reward - self.used)[counts].square().mean().item()
        if math.isfinite(new) and math.isfinite(variance):  # both are nan if no row counts
            self.mean, self.variance = self.average(self.mean, new), self.average(self.variance, variance)
        advantage = reward - self.used  # (B,)
        if self.normalize and self.variance is not None:
            advantage = advantage / (self.variance ** 0.5 + 1e-8)  # (B,)
        return torch.where(counts, advantage, 0.0)  # (B,)

    def average(self, old, new):
        return new if old is None else self.decay * old + (1 - self.decay) * new

    def state_dict(self):
        return {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state):
        self.mean, self.variance = state["mean"], state["variance"]


def truncated_ratio(logp, sampler_logp, most):
    """Truncated importance weights (N,) of sampled tokens, min(p / p_sampler, most), without gradient.

    They correct for a sampler that rounds in another way than the learner. most 0: all weights are 1.
    """
    return (logp - sampler_logp).detach().exp().clamp(max=most) if most else torch.ones_like(logp)  # (N,)


def policy_loss(logp, kl, advantage, kl_coef, num_positions):
    """REINFORCE with an exact KL penalty: sum of -advantage * logp + kl_coef * kl, over a constant.

    logp, kl, advantage: (N,), one entry for each sampled position. num_positions: batch_size * (reasoning_tokens +
    completion_tokens); a constant, so that a token weighs alike in any completion (Dr. GRPO, arXiv 2503.20783).
    """
    return (-advantage * logp + kl_coef * kl).sum() / num_positions  # ()
