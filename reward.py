"""
Rewards, length score, baseline, advantages and the generator's loss: pure functions, tested by hand-worked tables.

Letters: B sequences, N sampled positions.
"""
import torch

REAL = 1  # the discriminator's class of the real text; 0 is generated


def length_score(n, completion_tokens):
    """n / completion_tokens, at most 1; n: tokens of the completion after the echo is cut."""
    return min(n / completion_tokens, 1.0)


def generator_reward(judged, length_scores, kind, d_scale, azr_t):
    """What the generator is paid: (B,) by a discriminator.Judged and length scores (B,).

    prob:   d_scale * p_real * length_score; of a verdict in words: 1 - its correctness, in place of p_real
    neglog: d_scale * -log(1 - p_real) * length_score, which does not saturate where the discriminator is sure.
    azr:    d_scale * (1 - d_value if d_value > azr_t else 0) * length_score (after arXiv 2505.03335, where a proposer
            earns 1 - the solver's pass rate, and 0 for what nobody solves).
    None is ever negative: a negative reward times a length score would pay for writing nothing.
    """
    if kind == "prob":
        score = judged.p_real  # (B,)
    elif kind == "neglog":
        score = -judged.log_generated  # (B,)
    else:
        score = torch.where(judged.d_value > azr_t, 1 - judged.d_value, 0.0)  # (B,)
    return d_scale * score * length_scores  # (B,)


def ema(average, value, decay):
    """The exponential moving average after `value`; a first value (average None) starts it."""
    return value if average is None else decay * average + (1 - decay) * value


def advantages(rewards, baseline, variance=None):
    """rewards (B,) minus the baseline from before the batch, over the root of a running variance if one is given: (B,).

    The variance is the moving average of (rewards - baseline)^2, this batch included: so that an advantage stays below
    sqrt(B / (1 - decay)) even where all rewards were equal until now.
    """
    advantage = rewards - baseline  # (B,)
    return advantage if variance is None else advantage / (variance ** 0.5 + 1e-8)  # (B,)


def policy_loss(logp, kl, advantage, kl_coef, num_positions):
    """REINFORCE with an exact KL penalty: sum of -advantage * logp + kl_coef * kl, over a constant.

    logp, kl, advantage: (N,), one entry for each sampled position. num_positions: batch_size * (reasoning_tokens +
    completion_tokens); a constant, so that long and short completions weigh alike (Dr. GRPO, arXiv 2503.20783).
    """
    return (-advantage * logp + kl_coef * kl).sum() / num_positions  # ()
