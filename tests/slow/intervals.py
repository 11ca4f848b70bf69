"""
Coverage of MAUVE's 95 % intervals, verdicts of comparisons, and p-values, by simulation with texts of the demo's base.

    python tests/slow/intervals.py              # about an hour on one core; prints the tables of docs/intervals.md
    python tests/slow/intervals.py DIR          # keep the pool and the draws in DIR, and use what is there

1. The pool has 4000 prefixes of the demo corpus, each with its truth, two completions by the base model, and two other
   real texts. A set takes a completion for a share of the prefixes, and another real text for the rest.
2. A draw takes n prefixes of the pool with replacement, so that the pool is the population, and makes all sets anew.
3. An interval must cover the mean over all draws. p-values must be uniform where two sets are halves of real text.

Letters: P prefixes in the pool, R draws, J sets, S k-means seeds, n or N texts, H features.
"""
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import numpy as np
import torch
from scipy.stats import kstest
from tqdm import tqdm

import train
from data import plain_encoder, prompt_template, windows
from measures import clusters, difference, featurizer, interval_of, jackknife, two_samples
from model import load_model
from rollout import Writer
from sampler import Sampler

P, R, S, SIZES = 4000, 400, 5, (50, 300, 500)
SETS = [(1, 1), (1, 2), (0.9, 1), (0.8, 1), (0.15, 1), (0.15, 2), (0.25, 1), (0.5, 1)]  # share of completions, which
PAIRS = [(1, 0), (2, 1), (3, 1), (5, 4), (6, 5)]  # indices of SETS; equal shares are two sets of one distribution


def cached(folder, name, make):
    """The arrays in folder/name.npz, which are made if they are not there."""
    file = folder / f"{name}.npz"
    if not file.exists():
        np.savez(file, **make())
    return dict(np.load(file))


def make_pool():
    """Features (P, H) of the truths, of both completions, and of both other real texts."""
    args = train.parse_flags(["--preset", "demo"])
    model, tokenizer = load_model(args.model, args.quant, args.dtype, args.device)
    args.prompt = prompt_template(args.prompt, tokenizer)
    writer = Writer(Sampler(model, args.merge), tokenizer, args)
    stream = windows(args, plain_encoder(tokenizer))
    real = [stream[i] for i in range(3 * P)]
    texts = {"truth": real[:P], "real 1": real[P:2 * P], "real 2": real[2 * P:]}
    texts = {name: [window.truth for window in part] for name, part in texts.items()}
    for name in ("base 1", "base 2"):
        texts[name] = [text for i in tqdm(range(0, P, 125), desc=name)
                       for text in writer.write(real[i:i + 125], None, name, i).texts]
    features = featurizer("base", model, tokenizer, args.device)
    return {name: features(part) for name, part in texts.items()}


def draw(pool, n):
    """Scores (R, J, S), and scores without each text (R, J, N), of all sets in R draws of n texts."""
    scores, without = np.zeros((R, len(SETS), S)), np.zeros((R, len(SETS), n))
    for r in tqdm(range(R), desc=f"{n} texts"):
        rng = np.random.default_rng([n, r])
        rows = rng.integers(0, P, n)  # (N,)
        for j, (share, which) in enumerate(SETS):
            completed = rng.random((n, 1)) < share  # (N, 1)
            generated = np.where(completed, pool[f"base {which}"][rows], pool[f"real {which}"][rows])  # (N, H)
            scores[r, j], without[r, j] = jackknife(clusters(pool["truth"][rows], generated, range(S)))
    return {"scores": scores, "without": without}


def coverage(values, intervals):
    """Mean and standard deviation of values (R,), mean half width of intervals (R, 2), share that cover the mean."""
    low, high = np.transpose(intervals)  # (R,) each
    mean = np.mean(values)
    return mean, np.std(values), np.mean(high - low) / 2, np.mean((low < mean) & (mean < high))


def p_values(pool, n, draws=200):
    """p-values (R, 2) of both tests, for halves of 2n real texts, and for n completions against their truths."""
    real, found = np.vstack([pool["truth"], pool["real 1"], pool["real 2"]]), ([], [])
    for r in range(draws):
        rng = np.random.default_rng([n, r])
        rows = rng.choice(len(real), 2 * n, replace=False)  # (2 n,)
        places = rng.choice(P, n, replace=False)  # (n,)
        pairs = (real[rows[:n]], real[rows[n:]]), (pool["truth"][places], pool["base 1"][places])
        for kept, pair in zip(found, pairs):
            kept.append([two_samples(*pair)[name] for name in ("mmd_p", "classifier_p")])
    return map(np.array, found)


def heading(*names):
    print("", "| " + " | ".join(names) + " |", "|---" * len(names) + "|", sep="\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, started = pathlib.Path(sys.argv[1] if sys.argv[1:] else tempfile.mkdtemp()), time.time()
    folder.mkdir(parents=True, exist_ok=True)
    pool, drawn = cached(folder, "pool", make_pool), {}
    for n in SIZES:
        found = cached(folder, f"draws-{n}", lambda: draw(pool, n))
        drawn[n] = [[*zip(*row)] for row in zip(found["scores"], found["without"])]  # R of J of (S,), (N,)

    heading("texts", "share of completions", "mean MAUVE", "its sd", "mean half width", "coverage")
    for n, rows in drawn.items():
        for j, (share, _) in sorted(enumerate(SETS), key=lambda pair: -pair[1][0]):
            scores, intervals = [row[j][0].mean() for row in rows], [interval_of(*row[j]) for row in rows]
            mean, sd, half, covered = coverage(scores, intervals)
            print(f"| {n} | {share:.0%} | {mean:.3f} | {sd:.3f} | {half:.3f} | {covered:.1%} |")
    heading("texts", "mean MAUVE of both", "difference", "its sd", "mean standard error", "coverage", "clear verdicts")
    for n, rows in drawn.items():
        for i, j in PAIRS:
            pairs = [difference(row[i], row[j]) for row in rows]
            one, other = np.mean([pair["scores"] for pair in pairs], 0)
            mean, sd, half, covered = coverage(*([pair[key] for pair in pairs] for key in ("difference", "interval")))
            clear = np.mean([pair["verdict"] != "no clear difference" for pair in pairs])
            print(f"| {n} | {one:.3f}, {other:.3f} | {mean:+.3f} | {sd:.3f} | {half / 1.96:.3f} | {covered:.1%} | "
                  f"{clear:.1%} |")
    heading("texts", "test", "halves of real text: distance from uniform, its p", "below 0.05", "base: largest p")
    for n in SIZES:
        same, apart = p_values(pool, n)
        for i, name in enumerate(("MMD", "classifier")):
            (distance, p), least = kstest(same[:, i], "uniform"), np.mean(same[:, i] < 0.05)
            print(f"| {n} | {name} | {distance:.3f}, {p:.2f} | {least:.1%} | {apart[:, i].max():.3g} |")
    print(f"\n{(time.time() - started) / 60:.0f} minutes")
