"""
MAUVE of the last sequences of a run, beside the base model's floor and a ceiling of real text against real text.

    python evaluate.py out/demo-1
    python evaluate.py out/demo-1 --featurizer gpt2-large --seeds 10

Writes mauve.json and result.json into the run's folder. MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454) is
mauve-text's, with c = 5, a tenth as many buckets as texts, and its other defaults.

What differs from the textbook: floor, result and ceiling stand on the same prefixes and the same number of texts, since
few texts read high; each is a mean over seeds of k-means, with its standard deviation, and with a 95 % interval by
bootstrap over texts.
"""
import collections
import contextlib
import json
import os
import pathlib
import statistics
import sys

from flags import Parser, UserError, read_args

WINDOW = 2000  # the write-up's: the last 2000 generated sequences, with mauve-text's own seed
LIBRARY_SEED = 25


def distinct(sequences, n):
    """Distinct n-grams over all n-grams of lists of tokens, in [0, 1] (Li et al. 2016); None where there is none."""
    grams = collections.Counter(gram for ids in sequences for gram in zip(*(ids[i:] for i in range(n))))
    return len(grams) / grams.total() if grams else None


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
    """MAUVE of histograms (..., K): the area under the curve (exp(-c KL(q | r)), exp(-c KL(p | r))), r = w p + (1 - w) q,
    over `num_points` weights w and its two ends (Pillutla et al., section 2), by trapezoids in x and in y: (...).
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

    They are taken from their own mean: drawing 500 texts out of 500 adds noise, which by itself lowers MAUVE.
    """
    import numpy as np
    rng = np.random.default_rng(0)
    draws = [rng.multinomial(n, hist / hist.sum(), num_draws) / n for hist, n in ((p_hist, num_p), (q_hist, num_q))]
    scores = histogram_mauve(*draws)  # (num_draws,)
    return scores - scores.mean()  # (num_draws,)


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


def base_states(model, tokenizer):
    """Return `ids_of(text)` and `states(ids)` of the run's base model: ids (B, T) to last hidden states (B, T, H)."""
    from data import bos_ids, plain_encoder
    from model import hidden_states, without_adapters
    encode, bos = plain_encoder(tokenizer), bos_ids(tokenizer)

    def ids_of(text):
        return bos + encode(text)[0]

    def states(ids):
        with without_adapters(model):
            return hidden_states(model, ids)  # (B, T, H)

    return ids_of, states


def hub_states(name, device):
    """Return `ids_of(text)` and `states(ids)` of another model, by its id; a text is cut to 1024 tokens."""
    from transformers import AutoModel, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--featurizer {name} could not be loaded ({reason}); base is the run's own model") from None

    def ids_of(text):
        return tokenizer(text, truncation=True, max_length=1024).input_ids

    def states(ids):
        return model(ids).last_hidden_state  # (B, T, H)

    return ids_of, states


def featurizer(name, model, tokenizer, device, batch_size=32):
    """Return `features(texts) -> (N, H) float32`.

    base: last hidden states of the run's own base model, mean over positions. Any other model id: the last token's
    state, of at most 1024 tokens, which for gpt2 and bert names is what mauve-text computes itself.
    """
    import numpy as np
    import torch
    from model import pad
    ids_of, states = base_states(model, tokenizer) if name == "base" else hub_states(name, device)

    @torch.no_grad()
    def features(texts):
        rows = [ids_of(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # texts of like length together
        out = [None] * len(rows)
        for first in range(0, len(order), batch_size):
            part = order[first:first + batch_size]
            hidden = states(pad([rows[i] for i in part], 0, device)).float()  # (B, T, H)
            for i, h in zip(part, hidden):
                n = len(rows[i])
                out[i] = (h[:n].mean(0) if name == "base" else h[n - 1]).cpu().numpy()  # (H,)
        return np.stack(out)  # (N, H)

    return features


def read_lines(file):
    """The records of a .jsonl file; a last line that was torn off in writing is left out."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is "" or torn


def evaluate(out_dir, featurizer_name, seeds, model, tokenizer, device):
    """Measure a run from the files it left. Writes mauve.json and result.json, prints a table, returns the result."""
    out_dir = pathlib.Path(out_dir)
    rollouts, floor = read_lines(out_dir / "rollouts.jsonl"), read_lines(out_dir / "floor.jsonl")
    n = min(len(floor) or WINDOW, len(rollouts))
    if n < 4:
        raise UserError(f"{out_dir} has {n} sequences, and 4 are needed; "
                        f"go on with: python train.py --resume {out_dir}")
    last, before, floor = rollouts[-n:], rollouts[:-n][-n:], floor[-n:]
    if floor and [r["prefix"] for r in floor] != [r["prefix"] for r in last]:
        print(f"note: {out_dir} is not finished, so its floor stands on other prefixes than its last {n} sequences",
              file=sys.stderr)

    featurize, num_empty = featurizer(featurizer_name, model, tokenizer, device), {}

    def features_of(name, records, key):
        texts = [record[key] for record in records if record[key]]  # mauve-text drops empty texts too, without a word
        num_empty[name] = len(records) - len(texts)
        return featurize(texts) if texts else None

    truth, written = features_of("truth", last, "truth"), features_of("mauve", last, "completion")
    compared = {"mauve": (truth, written)}
    if floor:
        compared["floor"] = truth, features_of("floor", floor, "completion")
    # the ceiling sets the same truth against as many other real texts; a run too short for that, its two halves
    other = features_of("ceiling", before, "truth") if len(before) == n else None
    compared["ceiling"] = (truth, other) if other is not None else (truth[:len(truth) // 2], truth[len(truth) // 2:])
    scores = {name: mauve_of(p, q, seeds) if q is not None else None for name, (p, q) in compared.items()}

    window = rollouts[-WINDOW:]
    p, q = (features_of("last2000", window, key) for key in ("truth", "completion"))
    scores["mauve_last2000"] = mauve_of(p, q, [LIBRARY_SEED]) if q is not None else None

    result = {}
    for name in ("mauve", "floor", "ceiling"):
        score = scores.get(name)
        for key, part in ((name, "mauve"), (f"{name}_sd", "mauve_sd"), (f"{name}_interval", "interval")):
            result[key] = score[part] if score else None
    result.update(mauve_last2000=(scores["mauve_last2000"] or {}).get("mauve"), num_last2000=len(window),
                  num_sequences=n, featurizer=featurizer_name, num_seeds=seeds, num_empty=num_empty)
    steps = read_lines(out_dir / "metrics.jsonl")
    result.update(num_steps=len(steps), seconds=sum(row["seconds"] for row in steps))
    (out_dir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    report = {**result, "ceiling_num_sequences": len(compared["ceiling"][1]), "scores": scores}
    (out_dir / "mauve.json").write_text(json.dumps(report, indent=2) + "\n")

    print_table(out_dir, result, scores)
    return result


def print_table(out_dir, result, scores):
    """Print what `evaluate` found; scores: name to what `mauve_of` returned, or None."""
    n, num_window = result["num_sequences"], result["num_last2000"]
    num_buckets = scores["mauve"]["num_buckets"] if scores["mauve"] else 0
    print(f"\nMAUVE of {out_dir}: {n} sequences, {num_buckets} buckets, featurizer {result['featurizer']}, "
          f"{result['num_seeds']} seeds" + ("" if n >= 500 else "; few texts read high and noisy"))
    labels = {"floor": "floor: the base model", "mauve": "result: the end of the run",
              "ceiling": "ceiling: other real texts"}
    for name, label in labels.items():
        score, told = scores.get(name), "none"
        if score:
            low, high = score["interval"]
            told = f"{score['mauve']:.3f} +- {score['mauve_sd']:.3f}   95 % {low:.3f} to {high:.3f}"
        print(f"  {label:28s}{told}")
    if scores["mauve_last2000"]:
        label = f"last {num_window} (the write-up)"
        print(f"  {label:28s}{scores['mauve_last2000']['mauve']:.3f}"
              + ("" if num_window == WINDOW else f"   fewer than {WINDOW}"))
    left_out = [f"{count} of {name}" for name, count in result["num_empty"].items() if count]
    if left_out:
        print(f"  left out as empty: {', '.join(left_out)}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("run", help="folder of a run, out/NAME")
    parser.add_argument("--featurizer", default=None,
                        help="a model id, or base: the run's own base model (unset: as the run's)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of k-means (unset: as the run's)")
    parser.add_argument("--device", default=None, help="cuda, cpu, ... (unset: as the run's)")
    flags = parser.parse_args()

    run = read_args(flags.run)
    settings = {key: run[key] if getattr(flags, key) is None else getattr(flags, key)
                for key in ("featurizer", "seeds", "device")}
    if settings["seeds"] < 1:
        raise UserError(f"--seeds {settings['seeds']}: must be above 0")
    from model import checked_device, load_model
    device = checked_device(settings["device"])
    model = tokenizer = None
    if settings["featurizer"] == "base":
        model, tokenizer = load_model(run["model"], run["quant"], run["dtype"], device)
    evaluate(flags.run, settings["featurizer"], settings["seeds"], model, tokenizer, device)
