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
    logit:  d_scale * (margin - lowest margin of the batch) * length_score, margin = log(p_real / (1 - p_real)): the raw
            logit (GAD, arXiv 2511.10643), shifted so that none is negative
    azr:    d_scale * (1 - d_value if d_value > 1/8 else 0) * length_score (after arXiv 2505.03335, where a proposer
            earns 1 - the solver's pass rate, and 0 for what nobody solves)
    None is ever negative: a negative reward times a length score would pay for writing nothing.
    """
    if kind == "prob":
        score = judged.p_real  # (B,)
    elif kind in ("neglog", "lift"):  # lift is the thinking's, see train.py
        score = -judged.log_generated  # (B,)
    elif kind == "logit":
        margin = judged.p_real.log() - judged.log_generated if judged.score is None else judged.score  # (B,)
        score = (margin - margin.where(margin.isfinite(), torch.inf).amin()).clamp(min=0)  # (B,)
    elif kind == "azr":
        score = torch.where(judged.d_value > AZR_LEAST, 1 - judged.d_value, 0.0)  # (B,)
    else:
        raise ValueError(f"no such reward: {kind}")
    return d_scale * score * length_scores  # (B,)


class Baseline:
    """What a reward is compared with, and moving averages of the batch's mean reward and of its squared distance from
    what it is compared with.

    ema: the moving average from before this batch; the first batch starts it. none: nothing. loo: the mean of the
    others of its group, `group` neighbours that share a prefix (RLOO, arXiv 2402.14740); with group 1, of the batch.
    The variance includes the batch, so that an advantage stays below sqrt(B / (1 - decay)) even if all rewards were
    equal until now.
    """

    def __init__(self, decay, normalize, kind="ema", group=1):
        self.decay, self.normalize, self.kind, self.group = decay, normalize, kind, group
        self.mean, self.variance, self.used = None, None, None

    def others(self, reward, counts):
        """Mean of the other rewards of each one's group that count (B,); its own where there is no other."""
        size = self.group if self.group > 1 else len(reward)
        paid, num = (x.view(-1, size) for x in (torch.where(counts, reward, 0.0), counts.float()))  # (B / G, G) each
        left = num.sum(1, keepdim=True) - num  # (B / G, G)
        mean = (paid.sum(1, keepdim=True) - paid) / left.clamp(min=1)  # (B / G, G)
        return torch.where(left > 0, mean, paid).flatten()  # (B,)

    def advantages(self, reward, counts):
        """reward (B,) minus what it is compared with, divided by the running standard deviation if normalize; 0 where
        a reward does not count, by counts (B,) bool: (B,).
        """
        new = reward[counts].mean().item()
        self.used = new if self.mean is None else self.mean
        compared = {"ema": self.used, "none": 0.0, "loo": self.others(reward, counts)}[self.kind]
        variance = (reward - compared)[counts].square().mean().item()
        if math.isfinite(new) and math.isfinite(variance):  # neither is where nothing counts
            self.mean, self.variance = self.average(self.mean, new), self.average(self.variance, variance)
        advantage = reward - compared  # (B,)
        if self.normalize and self.variance is not None:
            advantage = advantage / (self.variance ** 0.5 + 1e-8)  # (B,)
        return torch.where(counts, advantage, 0.0)  # (B,)

    def average(self, old, new):
        return new if old is None else self.decay * old + (1 - self.decay) * new

    def state_dict(self):
        return {"mean": self.mean, "variance": self.variance}

    def load_state_dict(self, state):
        self.mean, self.variance = state["mean"], state["variance"]


def centred(reward, normalize):
    """reward (B,) minus the batch's mean, over the batch's standard deviation if normalize: (B,)."""
    reward = reward - reward.mean()  # (B,)
    return reward / (reward.std(correction=0) + 1e-8) if normalize else reward


def kl_barrier(kl, sizes, kl_agg, kl_tau):
    """What the KL's coefficient multiplies (N,): for each token relu(level of its sequence - kl_tau).

    kl: (N,), the sequences' tokens one after another; sizes: how many each has. kl_agg says what a sequence's level is:
    the mean, rms, p95 (95 % quantile) or max of its tokens' KL. A mean hides a few incoherent tokens, and the others do
    not; a kl_tau for one does not suit another. With mean and 0 the KL itself is returned, which has the same sum.
    """
    if kl_agg == "mean" and kl_tau == 0:
        return kl
    levels = [part.mean() if kl_agg == "mean" else (part.square().mean() + 1e-8).sqrt() if kl_agg == "rms" else
              part.quantile(0.95) if kl_agg == "p95" else part.amax()  # 1e-8: a root has no slope at 0
              for part in kl.split(sizes) if len(part)]  # () each
    kept = torch.tensor([n for n in sizes if n], device=kl.device)
    return (torch.stack(levels) - kl_tau).relu().repeat_interleave(kept) if levels else kl  # (N,)


def kl_term(stats, sizes, kind):
    """What the KL's coefficient multiplies (N,), from TokenStats of sequences of `sizes` tokens, one after another.

    exact: the sum over the vocabulary. The others see only the sampled token, with r = log policy - log base:
    k1: logp times the sum of r from the token on: a penalty in the reward; its gradient is that of the sequence's KL.
    k2: r^2 / 2, whose gradient is that of KL(policy || base) in expectation.
    k3: e^-r - 1 + r, whose gradient is that of KL(base || policy) in expectation, whatever its value says.
    """
    ratio = stats.logp - stats.ref_logp  # (N,)
    if kind == "k1":
        return torch.cat([part.flip(0).cumsum(0).flip(0) for part in ratio.detach().split(sizes)]) * stats.logp  # (N,)
    return {"exact": stats.kl, "k2": ratio.square() / 2, "k3": (-ratio).exp() - 1 + ratio}[kind]  # (N,)


def adapted_coef(coef, kl, target):
    """The KL's coefficient for the next step: 2 % up or down, or less near the target (arXiv 1909.08593)."""
    return coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def truncated_ratio(logp, sampler_logp, most):
    """Importance weights (N,) of tokens that another distribution drew, min(p / p_sampler, most), without gradient: the
    sampler's rounding makes it another one (truncated importance sampling).
    """
    return (logp - sampler_logp).detach().exp().clamp(max=most)  # (N,)


def policy_loss(logp, kl, advantage, kl_coef, num_positions):
    """REINFORCE with an exact KL penalty: sum of -advantage * logp + kl_coef * kl, over a constant.

    logp, kl, advantage: (N,), one entry for each sampled position. num_positions: batch_size * (reasoning_tokens +
    completion_tokens); a constant, so that long and short completions weigh alike (Dr. GRPO, arXiv 2503.20783).
    """
    return (-advantage * logp + kl_coef * kl).sum() / num_positions  # ()
