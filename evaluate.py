"""
MAUVE of the last sequences of a run, beside the base model's floor and a ceiling of real text against real text.

    python evaluate.py out/demo-1                         # the last sequences of the run, from the files it left
    python evaluate.py out/demo-1 --fresh 500             # new samples from its checkpoint, on held-out prefixes
    python evaluate.py out/demo-1 --curve 250             # over the run, in windows of 250 sequences
    python evaluate.py out/demo-1 out/demo-2              # which of two runs ended higher, on the same prefixes
    python evaluate.py out/demo-1 --featurizer gpt2-large --seeds 10

Writes mauve.json and result.json into the run's folder, and features.npz, so that no text is featurized twice.

What differs from the textbook:
1. Floor, result and ceiling stand on the same prefixes and the same number of texts, since few texts read high.
2. Each has a standard deviation over seeds of k-means and, apart, a 95 % interval by bootstrap over texts, which is one
   for MAUVE at this number of texts, not at infinitely many.
3. Two runs are compared in pairs, prefix by prefix: "higher", "lower", or "not told apart".
"""
import json
import math
import pathlib
import statistics
import sys

from flags import NEEDED, Parser, UserError, check_device, read_args
from measures import audit, copy_rate, distinct, lengths, reliability, repetition, self_bleu
from scores import mauve_of, paired

WINDOW = 2000  # the write-up's: the last 2000 generated sequences, with mauve-text's own seed
LIBRARY_SEED = 25
LABELS = {"floor": "floor: the base model", "mauve": "result: the end of the run",
          "ceiling": "ceiling: other real texts"}


def read_lines(file):
    """The records of a .jsonl file; a last line that was torn off in writing is left out."""
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):  # what follows the last one is "" or torn
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(f"{file}:{number} is not a record of a run; mend or remove that line") from None
    return records


def read_texts(out_dir):
    """The sequences of a run and of its floor, two lists of records; too few of them are an error."""
    out_dir = pathlib.Path(out_dir)
    rollouts, floor = read_lines(out_dir / "rollouts.jsonl"), read_lines(out_dir / "floor.jsonl")
    for record in rollouts + floor:
        if not all(isinstance(record.get(key), str) for key in ("prefix", "truth", "completion")):
            raise UserError(f"{out_dir}: a sequence without prefix, truth and completion; its files are damaged")
    if len(rollouts) < 4:
        advice = "it is no run of train.py"
        if (out_dir / "rollouts.jsonl").exists():
            advice = f"go on with: python train.py --resume {out_dir}"
        raise UserError(f"{out_dir} has {len(rollouts)} sequences, and 4 are needed; {advice}")
    return rollouts, floor


# -----------------------------------------------------------------------------
# what texts look like beside MAUVE

def perplexity(model, encode, bos, records, key, device, batch_size=32):
    """exp of the mean negative log-prob of the texts' tokens after their prefixes, under the bare base model."""
    import torch

    from model import causal_lm, hidden_states, pad, token_logps, without_adapters
    V = causal_lm(model).get_output_embeddings().weight.shape[0]
    total, count = 0.0, 0
    blocked = torch.zeros(1, V, dtype=torch.bool, device=device)  # (1, V)
    with torch.no_grad(), without_adapters(model):
        for first in range(0, len(records), batch_size):
            before = [bos + encode(r["prefix"] + r.get("sep", " "))[0] for r in records[first:first + batch_size]]
            after = [encode(r[key])[0] for r in records[first:first + batch_size]]
            ids = pad([a + b for a, b in zip(before, after)], 0, device)  # (B, T)
            mask = pad([[0] * len(a) + [1] * len(b) for a, b in zip(before, after)], 0, device, torch.bool)  # (B, T)
            hidden, targets = hidden_states(model, ids)[:, :-1][mask[:, 1:]], ids[mask]  # (N, H), (N,)
            stats = token_logps(model, hidden, targets, blocked, torch.zeros_like(targets))
            total, count = total - stats.logp.sum().item(), count + len(targets)
    return math.exp(total / count) if count else None


def looks(model, tokenizer, encode, bos, records, key, device):
    """What one list of texts looks like: diversity, repetition, copying, length, perplexity; and the shortcut audit."""
    from discriminator import pair_ids
    records = [r for r in records if r[key]]
    ids = [encode(r[key])[0] for r in records]
    told = {f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)}
    told.update(self_bleu_4=self_bleu([r[key] for r in records]), repetition=repetition(ids),
                copy_rate=copy_rate([encode(r["prefix"])[0] for r in records], ids),
                perplexity=perplexity(model, encode, bos, records, key, device), length=lengths(ids) if ids else None)
    if key == "truth":
        return told
    read = [pair_ids(encode, bos, r["prefix"], r.get("sep", " "), r["truth"], r[key]) for r in records]
    sides = [[[i for i, is_its in zip(*pair[side]) if is_its] for pair in read if pair] for side in (0, 1)]
    real, generated = ([(ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in side]
                       for side in sides)
    told["audit"] = audit(real, generated) if len(real) >= 10 else None
    return told


# -----------------------------------------------------------------------------
# a run

def evaluate(out_dir, featurizer_name, seeds, model, tokenizer, device, curve=0):
    """Measure a run from the files it left. Writes mauve.json and result.json, prints a table, returns the result.

    curve: also MAUVE over the run, in windows of so many sequences (0: not).
    """
    from data import bos_ids, plain_encoder
    from features import featurizer
    out_dir = pathlib.Path(out_dir)
    rollouts, floor = read_texts(out_dir)
    n = min(max(len(floor), 4) if floor else WINDOW, len(rollouts))
    last, before, floor = rollouts[-n:], rollouts[:-n][-n:], floor[-n:]
    same_prefixes = [r["prefix"] for r in floor] == [r["prefix"] for r in last]
    if floor and not same_prefixes:
        print(f"note: {out_dir} is not finished, so its floor stands on other prefixes than its last {n} sequences",
              file=sys.stderr)

    featurize = featurizer(featurizer_name, model, tokenizer, device, cache=out_dir / "features.npz")
    num_empty = {}

    def features_of(name, records, key):
        num_empty[name] = sum(not record[key] for record in records)
        return featurize([record[key] for record in records])  # (n, H)

    truth, written = features_of("truth", last, "truth"), features_of("mauve", last, "completion")
    compared = {"mauve": (truth, written)}
    if floor:
        compared["floor"] = truth, features_of("floor", floor, "completion")
    # the ceiling sets the same truth against as many other real texts; a run too short for that, its two halves
    other = features_of("ceiling", before, "truth") if len(before) == n else None
    compared["ceiling"] = (truth, other) if other is not None else (truth[:len(truth) // 2], truth[len(truth) // 2:])
    scores = {name: mauve_of(p, q, seeds) for name, (p, q) in compared.items()}
    window = rollouts[-WINDOW:]
    p, q = (features_of("last2000", window, key) for key in ("truth", "completion"))
    scores["mauve_last2000"] = mauve_of(p, q, [LIBRARY_SEED])

    result = {}
    for name in ("mauve", "floor", "ceiling"):
        score = scores.get(name)
        for key, part in ((name, "mauve"), (f"{name}_sd", "mauve_sd"), (f"{name}_interval", "interval")):
            result[key] = score[part] if score else None
    result.update(mauve_last2000=scores["mauve_last2000"]["mauve"], num_last2000=len(window),
                  num_sequences=n, featurizer=featurizer_name, num_seeds=seeds, num_empty=num_empty)
    steps = read_lines(out_dir / "metrics.jsonl")
    result.update(num_steps=len(steps), seconds=sum(row["seconds"] for row in steps))
    tail = [row["kl"] for row in steps if row["step"] >= last[0]["step"] and row["kl"] is not None]
    result["kl"] = statistics.fmean(tail) if tail else None
    if floor and same_prefixes:
        result["against_floor"] = compare(featurize, last, floor)

    encode, bos = plain_encoder(tokenizer), bos_ids(tokenizer)
    sets = {"truth": (last, "truth"), "floor": (floor, "completion"), "result": (last, "completion")}
    texts = {name: looks(model, tokenizer, encode, bos, records, key, device)
             for name, (records, key) in sets.items() if records}
    report = {**result, "ceiling_num_sequences": len(compared["ceiling"][1]), "scores": scores, "texts": texts}
    verdicts = [r for r in read_lines(out_dir / "verdicts.jsonl") if r["step"] >= last[0]["step"]]
    if verdicts:  # of --disc reason
        kinds = {"all texts": verdicts, "generated": [r for r in verdicts if r["text"] == "generated"]}  # these pay
        report["reliability"] = {kind: reliability(*zip(*((r["d_value"], r["verdict"] == r["text"]) for r in rows)))
                                 for kind, rows in kinds.items()}
    if curve:
        report["curve"] = over_the_run(rollouts, curve, seeds, featurize)
    write_json(out_dir / "result.json", result)
    write_json(out_dir / "mauve.json", report)
    print_table(out_dir, report)
    return result


def write_json(file, what):
    """Write beside, then rename, so that a good result is never lost to a full disk."""
    from checkpoint import write_whole
    try:
        write_whole(file, json.dumps(what, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{file} could not be written: {error}") from None


def compare(featurize, one, other):
    """`paired` on two lists of records with the same prefixes: a dict."""
    rows = [(a["truth"], a["completion"], b["completion"]) for a, b in zip(one, other)]
    difference, interval, verdict = paired(*map(featurize, map(list, zip(*rows))))
    return {"difference": difference, "interval": interval, "verdict": verdict, "num_sequences": len(rows)}


def over_the_run(rollouts, size, seeds, featurize):
    """MAUVE of each window of `size` sequences: a list of dicts with the window's last step."""
    told = []
    for first in range(0, len(rollouts) - size + 1, size):
        rows = rollouts[first:first + size]
        score = mauve_of(*(featurize([r[key] for r in rows]) for key in ("truth", "completion")), seeds)
        told.append({"step": rows[-1].get("step"), **{key: score[key] for key in ("mauve", "mauve_sd", "interval")}})
    return told


def sample_fresh(run, out_dir, num_sequences, model, tokenizer, device):
    """Records of new samples by a run's checkpoint on held-out prefixes, and as many other held-out truths."""
    import torch
    from tqdm import tqdm

    from data import plain_encoder, windows
    from model import DTYPES, add_adapters, load_adapters
    from rollout import complete, rules
    from sampler import Sampler
    name = "shared" if run["adapters"] == "shared" else "generator"  # the discriminator may be on another model
    model = add_adapters(model, [name], run["rank"], run["alpha"])
    load_adapters(model, out_dir / "ckpt")
    sampler = Sampler(model, DTYPES[run["dtype"]], run.get("merge", True))
    sampler.follow(name)
    encode, rule, C = plain_encoder(tokenizer), rules(tokenizer, model), run["completion_tokens"]
    lengths = run["reasoning_tokens"], C, run["echo_tokens"], run["temperature"]
    stream = windows(run["data"], encode, run["prefix_tokens"], C, run["seed"], "held_out", run["text_field"])
    generator, records, size = torch.Generator(device).manual_seed(run["seed"]), [], max(run["batch_size"], 32)
    for first in tqdm(range(0, num_sequences, size), desc="fresh samples"):
        batch = [stream[position] for position in range(first, min(first + size, num_sequences))]
        roll, texts = complete(sampler, tokenizer, encode, rule, batch, *lengths, generator)
        records += [dict(prefix=w.prefix, sep=w.sep, truth=w.truth, think=tokenizer.decode(think), completion=text,
                         n_completion=n) for w, think, (text, n) in zip(batch, roll.think, texts)]
    return records, [stream[position].truth for position in range(num_sequences, 2 * num_sequences)]


def fresh(run, out_dir, num_sequences, featurizer_name, seeds, model, tokenizer, device):
    """Measure new samples on held-out prefixes, which it leaves in fresh.jsonl; adds `fresh` to both result files."""
    from features import featurizer
    out_dir = pathlib.Path(out_dir)
    if not (out_dir / "ckpt").is_dir():
        raise UserError(f"--fresh: {out_dir} has no checkpoint to sample from")
    featurize = featurizer(featurizer_name, model, tokenizer, device, cache=out_dir / "features.npz")
    records, others = sample_fresh(run, out_dir, num_sequences, model, tokenizer, device)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (out_dir / "fresh.jsonl").write_text("".join(lines), encoding="utf-8")
    truth, written = (featurize([r[key] for r in records]) for key in ("truth", "completion"))  # (N, H) each
    score, ceiling = mauve_of(truth, written, seeds), mauve_of(truth, featurize(others), seeds)
    print(f"\nfresh: {num_sequences} held-out prefixes, {sum(not r['completion'] for r in records)} left empty")
    print_scores({"mauve": score, "ceiling": ceiling})
    found = {"fresh": score["mauve"], "fresh_sd": score["mauve_sd"], "fresh_interval": score["interval"],
             "fresh_ceiling": ceiling["mauve"], "fresh_num_sequences": num_sequences}
    for file in (out_dir / "result.json", out_dir / "mauve.json"):
        write_json(file, {**json.loads(file.read_text()), **found})


def print_scores(scores):
    for name, label in LABELS.items():
        score = scores.get(name)
        if score:
            low, high = score["interval"]
            print(f"  {label:28s}{score['mauve']:.3f} +- {score['mauve_sd']:.3f}   95 % {low:.3f} to {high:.3f}")


def print_table(out_dir, report):
    """Print what `evaluate` found."""
    n, num_window, scores = report["num_sequences"], report["num_last2000"], report["scores"]
    num_buckets = scores["mauve"]["num_buckets"]
    print(f"\nMAUVE of {out_dir}: {n} sequences, {num_buckets} buckets, featurizer {report['featurizer']}, "
          f"{report['num_seeds']} seeds" + ("" if n >= 500 else "; few texts read high and noisy"))
    print_scores(scores)
    print(f"  {f'last {num_window} (the write-up)':28s}{scores['mauve_last2000']['mauve']:.3f}"
          + ("" if num_window == WINDOW else f"   fewer than {WINDOW}"))
    if report.get("against_floor"):
        print(f"  end against floor           {in_words(report['against_floor'])}")
    empty = [f"{count} of {name}" for name, count in report["num_empty"].items() if count]
    if empty:
        print(f"  empty: {', '.join(empty)}")
    for point in report.get("curve", []):
        print(f"  step {point['step']:<23}{point['mauve']:.3f} +- {point['mauve_sd']:.3f}")
    if report["kl"] is not None:
        print(f"  KL to the reference         {report['kl']:.3f} nats a token")
    print_texts(report["texts"])
    for kind, told in report.get("reliability", {}).items():
        print_reliability(kind, *told)


def print_texts(texts):
    """Print what `looks` found: a column a list of texts."""
    def line(label, cells):
        print(f"  {label:28s}" + "".join(f"{cell:>10s}" for cell in cells))

    print()
    line("", texts)
    for key in ("distinct_1", "distinct_2", "distinct_3", "self_bleu_4", "repetition", "copy_rate", "perplexity"):
        line(key, [number(look[key]) for look in texts.values()])
    for key in ("mean", "p10", "p50", "p90"):
        line(f"length, {key}", [number((look["length"] or {}).get(key)) for look in texts.values()])
    audits = [look.get("audit") for look in texts.values()]
    for name in next(filter(None, audits), []):
        line(f"audit, {name}", [f"{told[name][0]:.0%}" if told else "" for told in audits])


def print_reliability(kind, rows, error):
    """Print how far `d_value` held in the verdicts of the last steps, on one kind of texts."""
    label = f"d_value, {kind}"
    print(f"\n  {label:20s}{'verdicts':>8s}{'its mean':>10s}{'right':>10s}   off by {error:.3f} on average")
    for low, high, count, mean, share in rows:
        print(f"  {f'{low:.1f} to {high:.1f}':18s}{count:10d}{mean:10.3f}{share:10.3f}")


def number(value):
    return "" if value is None else f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def in_words(comparison):
    low, high = comparison["interval"]
    return (f"{comparison['verdict']} by {comparison['difference']:+.3f}   95 % {low:+.3f} to {high:+.3f}, paired, "
            f"{comparison['num_sequences']} prefixes")


def compare_runs(folders, featurizer_name, model, tokenizer, device):
    """Print how the ends of two runs compare, on the prefixes that both end with."""
    from features import featurizer
    ends = []
    for folder in folders:
        rollouts, floor = read_texts(folder)
        ends.append({r["prefix"]: r for r in rollouts[-(len(floor) or WINDOW):]})
    common = [prefix for prefix in ends[0] if prefix in ends[1]]
    featurize = featurizer(featurizer_name, model, tokenizer, device, cache=folders[0] / "features.npz")
    if len(common) < 4:
        raise UserError(f"{folders[0]} and {folders[1]} end on {len(common)} common prefixes, and 4 are needed; "
                        "give two runs of the same --data, --seed and lengths")
    comparison = compare(featurize, *([end[prefix] for prefix in common] for end in ends))
    print(f"\n{folders[0]} against {folders[1]}: {in_words(comparison)}")
    return comparison


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("run", help="folder of a run, out/NAME")
    parser.add_argument("other", nargs="?", default=None, help="folder of another run, to compare the first with")
    parser.add_argument("--fresh", type=int, default=0,
                        help="new samples from the checkpoint, on held-out prefixes (0: none)")
    parser.add_argument("--curve", type=int, default=0, help="sequences a window of MAUVE over the run (0: no curve)")
    parser.add_argument("--featurizer", default=None,
                        help="a model id, or base: the run's own base model (unset: as the run's)")
    parser.add_argument("--seeds", type=int, default=None, help="seeds of k-means (unset: as the run's)")
    parser.add_argument("--device", default=None, help="cuda, cpu, ... (unset: as the run's)")
    flags = parser.parse_args()

    run = read_args(flags.run, NEEDED)
    settings = {key: run[key] if getattr(flags, key) is None else getattr(flags, key)
                for key in ("featurizer", "seeds", "device")}
    if settings["seeds"] < 1:
        raise UserError(f"--seeds {settings['seeds']}: must be above 0")
    for name in ("fresh", "curve"):
        if getattr(flags, name) and not 4 <= getattr(flags, name) <= 10 ** 6:
            raise UserError(f"--{name} {getattr(flags, name)}: must be 0, or from 4 to a million")
    check_device(settings["device"])
    for folder in filter(None, (flags.run, flags.other)):
        read_texts(folder)
    from model import checked_device, load_model
    device = checked_device(settings["device"])
    model, tokenizer = load_model(run["model"], run["quant"], run["dtype"], device)
    if flags.other:
        folders = pathlib.Path(flags.run), pathlib.Path(flags.other)
        compare_runs(folders, settings["featurizer"], model, tokenizer, device)
    else:
        evaluate(flags.run, settings["featurizer"], settings["seeds"], model, tokenizer, device, flags.curve)
        if flags.fresh:
            fresh(run, flags.run, flags.fresh, settings["featurizer"], settings["seeds"], model, tokenizer, device)
