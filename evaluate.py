"""
MAUVE of the last sequences of a run, beside the base model's floor and a ceiling of real text.

    python evaluate.py out/demo-1                         # measure a run from the files it left
    python evaluate.py out/demo-1 --fresh 500             # also new samples from its checkpoint, on held-out prefixes
    python evaluate.py out/demo-1 --curve 250             # MAUVE over the run in windows of 250 sequences
    python evaluate.py out/demo-1 out/demo-2              # compare runs, prefix by prefix
    python evaluate.py out/demo-1 --featurizer gpt2-large --seeds 10

Writes result.json (the main numbers) and mauve.json (everything) into the run's folder.

What differs from the textbook:
1. Floor, result and ceiling use the same prefixes and the same number of texts, because MAUVE reads high on few texts.
2. Each has a standard deviation over k-means seeds and a 95 % interval for MAUVE at this number of texts.
3. Two runs are compared in pairs, prefix by prefix: "higher", "lower", or "no clear difference". Below 50 texts there
   is no interval and no verdict.
"""
import json
import math
import statistics

from flags import (Parser, Run, UserError, check_device, export_command, json_lines, read_lines, resume_command,
                   write_whole)
from measures import (MIN_TEXTS, audit, check_featurizer, compression_ratio, copy_rate, distinct, featurizer, lengths,
                      mauve_of, paired, reliability, repetition, self_bleu, two_samples)

WINDOW, LIBRARY_SEED = 2000, 25  # the write-up scores the last 2000 sequences, with mauve-text's default seed
LABELS = {"floor": "floor: the base model", "mauve": "result: the end of the run",
          "ceiling": "ceiling: other real texts", "mauve_last2000": "last {num_last2000} (the write-up)",
          "fresh_floor": "floor, held-out prefixes", "fresh": "result, held-out prefixes",
          "fresh_ceiling": "ceiling, held-out texts"}
NATS = "nats_base", "nats_base_thinking", "nats", "nats_thinking"  # keys of fresh.jsonl
PAIRED = "{verdict}, {difference:+.3f}   95 % {interval[0]:+.3f} to {interval[1]:+.3f}, {num_sequences} pairs"
FEW_PAIRS = f"{{difference:+.3f}}, no verdict: {{num_sequences}} pairs, and {MIN_TEXTS} are needed"


def read_run(folder):
    run = Run(folder)
    if len(run.rollouts) < 4 and vars(run.args).get("traces"):  # a run of tools.sft
        raise UserError(f"{folder} is fine-tuned on traces and has no samples to measure; for some, make a model of it "
                        f"with: {export_command(folder)}, and start a run with: python train.py --model DIR")
    if len(run.rollouts) < 4:
        raise UserError(f"{folder} has {len(run.rollouts)} sequences, and MAUVE needs 4{status(run)}")
    total = run.args.num_steps * run.args.batch_size
    for name, wanted in (("floor", min(run.args.floor_sequences, total)),
                         ("rollouts", len(run.rollouts) if status(run) else total)):
        if (found := len(getattr(run, name))) != wanted:
            raise UserError(f"{folder}/{name}.jsonl has {found} of {wanted} lines; restore it"
                            + f", or sample it anew with: {resume_command(folder)}" * (name == "floor"))
    return run


def status(run):
    """How far an unfinished run has come and how to continue it, after a semicolon; "" for a finished run."""
    k, n = len(run.metrics), run.args.num_steps
    return f"; {k} of {n} steps, continue with: {resume_command(run.folder)}" if k < n else ""


def column(records, key):
    return [record[key] for record in records]


def evaluate(folder, featurizer_name, seeds, model, tokenizer, device, curve=None):
    """Measure a run from the files it left, print a table, write mauve.json and result.json, return the result.

    curve: sequences per window of MAUVE over the run (0: about ten windows; None: as last time).
    """
    run = read_run(folder)
    if (curve or 0) > len(run.rollouts):
        raise UserError(f"--curve {curve}: {folder} has {len(run.rollouts)} sequences; give a smaller number")
    curve = last_curve(run.folder) if curve is None else curve
    n = min(max(len(run.floor), 4) if run.floor else WINDOW, len(run.rollouts))
    last, before, window, floor = run.rollouts[-n:], run.rollouts[:-n][-n:], run.rollouts[-WINDOW:], run.floor[-n:]
    fresh = [row for row in read_lines(run.folder / "fresh.jsonl") if row.get("step") == last[-1]["step"]]  # no older

    # the ceiling compares the truth with as many other real texts; in a run too short for that, its two halves
    truth, half = column(last, "truth"), n // 2
    compared = {"mauve": (truth, column(last, "completion")), "floor": (truth, column(floor, "completion")),
                "ceiling": ((truth, column(before, "truth")) if len(before) == n else
                            (truth[:half], truth[half:2 * half])),
                "mauve_last2000": (column(window, "truth"), column(window, "completion")),
                "fresh_floor": (column(fresh, "truth"), column(fresh, "base_completion")),
                "fresh": (column(fresh, "truth"), column(fresh, "completion")),
                "fresh_ceiling": (column(fresh, "truth"), column(fresh, "other_truth"))}
    compared = {name: texts for name, texts in compared.items() if texts[1]}
    featurize = featurizer(featurizer_name, model, tokenizer, device)
    scores = {name: mauve_of(*map(featurize, texts), [LIBRARY_SEED] if name == "mauve_last2000" else range(seeds))
              for name, texts in compared.items()}
    result = dict(floor=None, floor_sd=None, floor_interval=None)
    for name, score in scores.items():
        result |= {name: score["mauve"], f"{name}_sd": score["mauve_sd"], f"{name}_interval": score["interval"]}
    kl = [row["kl"] for row in run.metrics if row["step"] >= last[0]["step"] and row.get("kl") is not None]
    result |= dict(
        num_sequences=n, num_last2000=len(window), fresh_num_sequences=len(fresh), num_steps=len(run.metrics),
        featurizer=featurizer_name, num_seeds=seeds, seconds=sum(row.get("seconds") or 0 for row in run.metrics),
        kl=statistics.fmean(kl) if kl else None,
        num_empty={"truth": truth.count(""), **{name: texts[1].count("") for name, texts in compared.items()}})
    if floor and column(floor, "prefix") == column(last, "prefix"):
        result["against_floor"] = compare(featurize, last, floor, seeds)
    elif floor:
        print(f"{folder}: its floor has other prefixes than its last {n} sequences{status(run)}")
    texts = {"truth": (last, "truth"), "floor": (floor, "completion"), "result": (last, "completion")}
    texts = {name: describe(model, tokenizer, *which, device) for name, which in texts.items() if any(column(*which))}
    for name, pair in (("truth", "ceiling"), ("floor", "floor"), ("result", "mauve")):
        if name in texts:
            texts[name] |= two_samples(*map(featurize, compared[pair]))
    if fresh and all(row.get(key) is not None for row in fresh for key in NATS):
        result["fresh_nats"] = nats(fresh)
    report = result | dict(ceiling_num_sequences=len(compared["ceiling"][1]), scores=scores, texts=texts,
                           curve=over_the_run(run.rollouts, curve, seeds, featurize))
    if curve:
        report["curve_size"] = curve
    verdicts = [row for row in run.verdicts if row["step"] >= last[0]["step"]]
    for kind in ("all texts", "generated") if verdicts else ():  # --disc reason; generated texts make the reward
        rows = [row for row in verdicts if kind in ("all texts", row["text"])]
        report.setdefault("reliability", {})[kind] = reliability(
            column(rows, "d_value"), [row["verdict"] == row["text"] for row in rows])
    print_report(run, report)  # before writing: a full disk must not cost the numbers
    write_whole(run.folder / "mauve.json", json.dumps(report, indent=2) + "\n")
    write_whole(run.folder / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def nats(fresh):
    """Means over held-out texts of the nats a token of each truth, for base and trained model, without a thought and
    after one of the model's own. `change`: trained minus base, after a thought; with its 95 % interval, by Student's t.
    """
    from scipy.stats import t
    means, n = {key: statistics.fmean(column(fresh, key)) for key in NATS}, len(fresh)
    change = [row["nats_thinking"] - row["nats_base_thinking"] for row in fresh]
    mean, half = statistics.fmean(change), float(t.ppf(0.975, n - 1)) * statistics.stdev(change) / n ** 0.5
    return means | {"change": mean, "interval": [mean - half, mean + half]}


def last_curve(folder):
    """The --curve behind a folder's mauve.json; 0 where that file is missing or damaged, since it is written anew."""
    try:
        return max(int(json.loads((folder / "mauve.json").read_bytes())["curve_size"]), 0)
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def over_the_run(rollouts, size, seeds, featurize):
    """MAUVE in windows of `size` sequences (0: ten windows, of 50 to 500 sequences), with the last step of each."""
    total, points = len(rollouts), []
    count = total // size if size else min(total // 50, 10)
    size = size or min(total // max(count, 1), 500)
    for end in (total * i // count for i in range(1, count + 1)):
        rows = rollouts[end - size:end]
        score = mauve_of(featurize(column(rows, "truth")), featurize(column(rows, "completion")), range(seeds))
        points.append({"step": rows[-1]["step"], "num_sequences": size, **score})
    return points


def describe(model, tokenizer, records, key, device):
    """Diversity, repetition, copying, length and perplexity of some texts; if they are generated, also the audit."""
    from data import bos_ids, plain_encoder
    from discriminator import pair_ids
    encode, bos = plain_encoder(tokenizer), bos_ids(tokenizer)
    records = [record for record in records if record[key]]
    ids = [encode(text)[0] for text in column(records, key)]
    pairs = [pair_ids(encode, bos, r["prefix"], r["sep"], r["truth"], r[key]) for r in records]
    found = {f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)} | lengths(ids)
    found["compression_ratio"] = compression_ratio(column(records, key))
    prefixes = [encode(prefix)[0] for prefix in column(records, "prefix")]
    found |= dict(self_bleu_4=self_bleu(column(records, key)), repetition=repetition(ids),
                  copy_rate=copy_rate(prefixes, ids),
                  perplexity=perplexity(model, [text for _, text in pairs], device))
    if key != "truth" and len(pairs) >= 10:
        sides = [[[i for i, counts in zip(*text) if counts] for text in side] for side in zip(*pairs)]
        found |= audit(*([(ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in side]
                         for side in sides))
    return found


def perplexity(model, texts, device, batch_size=32):
    """exp of the mean negative log-prob of marked tokens under the base model. texts: pairs of ids and marks."""
    import torch
    from model import micro_batches, pad, token_stats, without_adapters
    logps = []
    for ids, marks in (zip(*batch) for batch in micro_batches(texts, batch_size)):
        ids, mask = pad(ids, 0, device), pad(marks, False, device, torch.bool)  # (B, T) each
        mask[:, 0] = False  # nothing predicts the first token
        with torch.no_grad(), without_adapters(model):
            logps += token_stats(model, ids, mask).logp.tolist()
    return math.exp(-statistics.fmean(logps))


def print_report(run, report):
    scores, n = report["scores"], report["num_sequences"]
    print(f"\nMAUVE of {run.folder}: {n} sequences, {scores['mauve']['num_buckets']} buckets, featurizer "
          f"{report['featurizer']}, {report['num_seeds']} seeds{'; few texts read high and noisy' * (n < 500)}"
          f"{status(run)}")
    lines = [(label.format(**report), scores[name]) for name, label in LABELS.items() if name in scores]
    for label, score in lines + [(f"step {point['step']}", point) for point in report["curve"]]:
        spread = "95 % {:.3f} to {:.3f}".format(*score["interval"]) if score["interval"] else "too few for an interval"
        print(f"  {label:28s}{score['mauve']:.3f} +- {score['mauve_sd']:.3f}   {spread}")
    if "against_floor" in report:
        print("  end against floor           " + in_words(report["against_floor"]))
    if any(report["num_empty"].values()):
        print(f"  empty: {', '.join(f'{count} of {name}' for name, count in report['num_empty'].items() if count)}")
    if report["kl"] is not None:
        print(f"  KL to the base              {report['kl']:.3f} nats a token")
    if found := report.get("fresh_nats"):
        print("  nats of held-out truths     {nats_base_thinking:.3f} to {nats_thinking:.3f} a token, {change:+.3f}   "
              "95 % {interval[0]:+.3f} to {interval[1]:+.3f}".format(**found))
    print("\n" + " " * 30 + "".join(f"{name:>10s}" for name in report["texts"]))
    for key in dict.fromkeys(key for found in report["texts"].values() for key in found):
        cells = (found.get(key) for found in report["texts"].values())
        print(f"  {key:28s}" + "".join(" " * 10 if x is None else f"{x:10.3g}" for x in cells))
    for kind, (bins, error) in report.get("reliability", {}).items():
        print(f"\n  d_value, {kind:11s}verdicts  its mean     right   off by {error:.3f} on average")
        for low, high, count, mean, share in bins:
            print(f"  {low:.1f} to {high:.1f}        {count:10d}{mean:10.3f}{share:10.3f}")


def sample_fresh(run, num_sequences, generator):
    """Write fresh.jsonl: samples on held-out prefixes, by the trained model and by the base; the truth's nats a token
    under both; and the truth of another held-out document.
    """
    from tqdm import tqdm
    from data import plain_encoder, windows
    from model import without_adapters
    from rollout import Writer
    from sampler import Sampler
    stream = windows(run.args, plain_encoder(generator.tokenizer), split="held_out")
    documents = len(getattr(stream, "texts", range(2 * num_sequences)))  # a stream from the hub has enough
    num = min(num_sequences, documents // 2)
    if num < 4:
        raise UserError(f"--fresh: --data has {documents} held-out documents that are long enough, and 8 are needed")
    if num < num_sequences:
        print(f"--fresh {num_sequences}: {num} of {documents} held-out documents; the ceiling takes as many others")
    writer = Writer(Sampler(generator.model, run.args.merge), generator.tokenizer, run.args)
    records = []
    for first in tqdm(range(0, num, 32), desc="fresh samples"):
        batch = [stream[place] for place in range(first, min(first + 32, num))]
        samples, base = (writer.write(batch, adapter, "fresh", first) for adapter in (generator.adapter, None))
        rows = writer.records([run.rollouts[-1]["step"]] * len(batch), batch, samples)
        nothing = [[]] * len(batch)
        generator.activate()
        with without_adapters(generator.model):
            found = [truth_nats(generator.model, writer, batch, think) for think in (nothing, base.roll.think)]
        found += [truth_nats(generator.model, writer, batch, think) for think in (nothing, samples.roll.think)]
        records += [row | dict(base_completion=text) | dict(zip(NATS, values))
                    for row, text, *values in zip(rows, base.texts, *found)]
    for place, record in enumerate(records, num):
        record["other_truth"] = stream[place].truth
    write_whole(run.folder / "fresh.jsonl", json_lines(records))


def truth_nats(model, writer, windows, thoughts):
    """Mean nats a token of each window's truth, as the completion after a thought (B lists of ids): B numbers."""
    import torch
    from model import micro_batches
    found = []
    for rows in micro_batches([*zip(windows, thoughts)], writer.args.micro_batch or writer.args.batch_size):
        with torch.no_grad():
            found += [-logps.mean().item() for logps in writer.truth_logps(model, *zip(*rows))]
    return found


def compare(featurize, one, other, seeds):
    """The completions of one list of records against those of another, for the same prefixes: see `paired`."""
    texts = column(one, "truth"), column(one, "completion"), column(other, "completion")
    return paired(*map(featurize, texts), range(seeds))


def in_words(found):
    """A comparison, as `paired` returns it, in a line."""
    return (PAIRED if found["interval"] else FEW_PAIRS).format(**found)


def compare_runs(runs, featurize, seeds):
    """Print how the end of the first run compares with the end of each other run, on the prefixes they share."""
    ends = [{record["prefix"]: record for record in run.rollouts[-(len(run.floor) or WINDOW):]} for run in runs]
    for run, end in zip(runs[1:], ends[1:]):
        both, common = (runs[0], run), [prefix for prefix in ends[0] if prefix in end]
        if len(common) < 4:
            raise UserError(f"{runs[0].folder} and {run.folder} end on {len(common)} common prefixes, and 4 are needed"
                            + (differences(*both) or "".join(map(status, both)) or "; their texts have changed"))
        found = compare(featurize, *([each[prefix] for prefix in common] for each in (ends[0], end)), seeds)
        print(f"\n{runs[0].folder} against {run.folder}{''.join(map(status, both))}\n"
              f"  {found['scores'][0]:.3f} against {found['scores'][1]:.3f}: {in_words(found)}")


def differences(one, other):
    """The flags that choose the prefixes a run ends on, where two runs differ in them, after a semicolon; or ""."""
    names = "data data_revision text_field model seed prefix_tokens completion_tokens floor_sequences".split()
    found = [[*map(vars(run.args).get, names), run.args.batch_size * run.args.num_steps] for run in (one, other)]
    words = [f"{name} ({a} and {b})" for name, a, b in zip([*names, "batch_size x num_steps"], *found) if a != b]
    return "; the runs differ in " + ", ".join(words) if words else ""


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="run", help="folder of a run, out/NAME; others are compared with the first")
    add("--fresh", type=int, default=0, help="sequences to sample on held-out prefixes (0: none)")
    add("--curve", type=int, default=None,
        help="sequences per window of MAUVE over the run (0: ten windows; default: as last time, at first 0)")
    add("--featurizer", default=None, help="id of the model that embeds texts, or base (default: as in the run)")
    add("--seeds", type=int, default=None, help="k-means seeds of MAUVE (default: as in the run)")
    add("--device", default=None, help="cuda, cuda:1, cpu, ... (default: as in the run)")
    flags = parser.parse_args()
    runs = [read_run(folder) for folder in flags.runs]
    run, args = runs[0], runs[0].args
    name, seeds = flags.featurizer or args.featurizer, flags.seeds or args.seeds or 5
    check_device(device := flags.device or args.device)
    if min(flags.fresh or 4, flags.curve or 4) < 4 or seeds < 1:
        raise UserError("--fresh and --curve must be 0, or 4 and more; --seeds must be above 0")
    if len(runs) > 1 and (flags.fresh or flags.curve):
        raise UserError("--fresh and --curve measure one run; leave them out to compare runs")

    from checkpoint import explain_failures, load_run, pin
    from model import checked_device, load_model
    explain_failures()
    device = checked_device(device)
    check_featurizer(name)
    if flags.fresh:
        generator, _ = load_run(run, device)
        model, tokenizer = generator.model, generator.tokenizer
        sample_fresh(run, flags.fresh, generator)
    else:
        pin(args)
        model, tokenizer = load_model(args.model, args.quant, args.dtype, device)
    if len(runs) > 1:
        compare_runs(runs, featurizer(name, model, tokenizer, device), seeds)
    else:
        evaluate(run.folder, name, seeds, model, tokenizer, device, flags.curve)
