"""
MAUVE of feature matrices: over seeds of k-means, with an interval by bootstrap over texts, and in pairs.

MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454) is mauve-text's, with c = 5, a tenth as many buckets as texts,
and its other defaults; only its public interface is used. Letters: N texts, H features, K buckets, W mixture weights.
"""
import contextlib
import os
import statistics
import sys


def mauve_of(truth, generated, seeds):
    """MAUVE between two feature matrices (N, H), over seeds of k-means.

    Returns a dict: mauve and mauve_star (its smoothed variant), means; _sd over seeds; interval, 95 % by bootstrap over
    texts, see `bootstrap`; num_buckets; per_seed. seeds: a number (seeds 0, 1, ...), or a list of seeds.
    """
    import numpy as np
    from mauve import compute_mauve
    seeds = range(seeds) if isinstance(seeds, int) else seeds
    with quiet():
        told = [compute_mauve(p_features=truth, q_features=generated, seed=seed, mauve_scaling_factor=5)
                for seed in seeds]
    scores, stars = [float(t.mauve) for t in told], [float(t.mauve_star) for t in told]
    return {"mauve": statistics.fmean(scores), "mauve_sd": statistics.pstdev(scores),
            "mauve_star": statistics.fmean(stars), "mauve_star_sd": statistics.pstdev(stars),
            "interval": (statistics.fmean(scores) + np.quantile(
                [bootstrap(t.p_hist, t.q_hist, len(truth), len(generated)) for t in told], (0.025, 0.975))
                ).clip(0, 1).tolist(),
            "num_buckets": int(told[0].num_buckets), "per_seed": scores}


def histogram_mauve(p, q, c=5.0, num_points=25):
    """MAUVE of histograms (..., K): the area under the curve (exp(-c KL(q | r)), exp(-c KL(p | r))) with
    r = w p + (1 - w) q, over `num_points` weights w and its two ends (Pillutla et al., section 2), by trapezoids in x
    and in y: (...).
    """
    import numpy as np
    w = np.linspace(1e-6, 1 - 1e-6, num_points)[:, None]  # (W, 1)
    p, q = p[..., None, :], q[..., None, :]  # (..., 1, K) each
    mixed = w * p + (1 - w) * q  # (..., W, K)

    def curve(part):
        ratio = np.divide(part, mixed, out=np.ones_like(mixed), where=part > 0)  # (..., W, K)
        return np.exp(-c * (part * np.log(ratio)).sum(-1))  # (..., W)

    ends = [(0, 0)] * (p.ndim - 2) + [(1, 1)]
    x, y = (np.pad(side, ends, constant_values=edges) for side, edges in
            ((curve(q), (1, 0)), (curve(p), (0, 1))))  # (..., W + 2) each: x falls, y rises
    return 0.5 * (np.trapezoid(x, y) - np.trapezoid(y, x))  # (...)


def bootstrap(p_hist, q_hist, num_p, num_q, num_draws=400):
    """How far MAUVE moves when texts are drawn again with replacement, buckets kept: deviations (num_draws,).

    They are taken from their own mean: drawing 500 texts out of 500 adds noise, which by itself lowers MAUVE. So an
    interval made of them is one for MAUVE at this number of texts; the value for infinitely many lies elsewhere.
    """
    import numpy as np
    rng = np.random.default_rng(0)
    draws = [rng.multinomial(n, hist / hist.sum(), num_draws) / n for hist, n in ((p_hist, num_p), (q_hist, num_q))]
    scores = histogram_mauve(*draws)  # (num_draws,)
    return scores - scores.mean()  # (num_draws,)


def paired(truth, one, other, num_draws=60):
    """MAUVE of `one` minus MAUVE of `other`, three matrices (N, H) whose i-th rows belong to one prefix.

    Returns (difference, [low, high], verdict): a 95 % interval by bootstrap over prefixes, each draw with a seed of its
    own for k-means, taken around the difference on all prefixes; "higher", "lower", or "not told apart" where it
    holds 0.
    """
    import numpy as np
    from mauve import compute_mauve
    rng = np.random.default_rng(0)

    def difference(rows, seed):
        p = truth[rows]  # (N, H)
        a, b = (compute_mauve(p_features=p, q_features=q[rows], seed=seed, mauve_scaling_factor=5,
                              kmeans_num_redo=1).mauve for q in (one, other))
        return a - b

    with quiet():
        all_rows = np.arange(len(truth))  # (N,)
        middle = statistics.fmean(difference(all_rows, seed) for seed in range(5))
        draws = np.array([difference(rng.integers(0, len(truth), len(truth)), seed)
                          for seed in range(num_draws)])  # (num_draws,)
    low, high = (middle + np.quantile(draws - draws.mean(), (0.025, 0.975))).tolist()
    return float(middle), [low, high], "higher" if low > 0 else "lower" if high < 0 else "not told apart"


@contextlib.contextmanager
def quiet():
    """Without faiss' advice, from C, on how many points a bucket wants: MAUVE's tenth gives it 20 at any size."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nowhere)
