"""
The ablation of docs/ablation.md: one option of the game changed at a time, on the demo, over seeds.

    python tests/slow/ablation.py OUT                               # runs what is not there yet, and prints the table
    python tests/slow/ablation.py OUT --jobs 2 --only "muon;kl 0"     # two runs at a time; only these rows

Every row samples as many sequences as the default. MAUVE, KL, coherence, distinct-2 and accuracy are means over seeds of
a run's last sequences or last five steps; nats are those of held-out truths after a thought, trained minus base.
"""
import argparse
import pathlib
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evaluate import compare, read_run
from flags import Run
from measures import featurizer
from model import load_model
from sweep import Sweep, outcome

COMMON = "--preset demo --num_steps 24 --batch_size 32 --floor_sequences 320 --d_warmup 8".split()
ROWS = {name: flags.split() for name, flags in {
    "default": "", "reward prob": "--g_reward prob", "advantages not normalised": "--no-adv_norm",
    "kl 0": "--kl_coef 0", "kl 0.3": "--kl_coef 0.3", "loss pair": "--d_loss pair", "pool last": "--d_pool last",
    "no warm-up": "--d_warmup 0", "shared adapter": "--adapters shared", "importance weights": "--tis 2",
    "cross-entropy 0.03": "--ce_coef 0.03", "cross-entropy 0.3": "--ce_coef 0.3", "muon": "--optim muon",
    "muon, 5 x rates": "--optim muon --g_lr 1e-2 --d_lr 1.5e-2", "adam, 5 x rates": "--g_lr 1e-2 --d_lr 1.5e-2",
}.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--replicates", type=int, default=3)
    args, words = parser.parse_known_args()  # other flags go to all runs
    args.out.mkdir(parents=True, exist_ok=True)
    sweep = Sweep(args.out, [], [], argparse.Namespace(jobs=args.jobs, results=None, launcher=""))
    rows, commands = [], []
    for seed in range(args.replicates):
        for name, flags in ROWS.items():
            if not args.only or name in args.only.split(";"):
                rows.append({"id": f"{name.replace(' ', '_').replace(',', '')}-{seed}", "name": name, "mauve": None})
                commands.append([*COMMON, *words, *flags, f"--seed={seed}"])
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: run(sweep, *job), zip(rows, commands)))
    table(args, rows)


def run(sweep, row, command):
    folder = sweep.out_dir / row["id"]
    sweep.run_one(row, [*command, "--seeds=0"])  # evaluate.py measures it, with held-out truths
    if (folder / "ckpt").exists() and "fresh_nats" not in Run(folder).result:
        subprocess.run([sys.executable, str(ROOT / "evaluate.py"), str(folder), "--fresh", "75"], check=True,
                       stdout=subprocess.DEVNULL)


def table(args, rows):
    model, tokenizer = load_model("demo", "none", "fp32", "cpu")
    featurize = featurizer("base", model, tokenizer, "cpu")
    print("\n| row | MAUVE by seed | against the default, by seed | nats | KL | coherence | distinct-2 | accuracy | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [read_run(args.out / row["id"]) for row in rows if row["name"] == name and outcome(args.out / row["id"])[0]]
        if not found:
            continue
        words, last = [], [run.metrics[-5:] for run in found]
        for one in found:
            base = args.out / f"default-{one.args.seed}"
            if one.folder != base and outcome(base)[0]:
                ends = [{r["prefix"]: r for r in run.rollouts[-500:]} for run in (one, Run(base))]
                both = [prefix for prefix in ends[0] if prefix in ends[1]]
                pair = compare(featurize, *([end[prefix] for prefix in both] for end in ends), 5)
                words.append(f"{pair['difference']:+.2f} {pair['verdict']}")

        def mean(key):
            values = [row[key] for rows in last for row in rows if row.get(key) is not None]
            return f"{statistics.fmean(values):.3g}" if values else "-"

        nats = [run.result["fresh_nats"]["change"] for run in found if "fresh_nats" in run.result]
        scores = ', '.join(format(run.result['mauve'], '.3f') for run in found)
        accuracy = statistics.fmean((row["d_acc_real"] + row["d_acc_generated"]) / 2 for rows in last for row in rows)
        print(f"| {name} | {scores} | {'; '.join(words) or '-'} | "
              f"{statistics.fmean(nats) if nats else float('nan'):+.3f} | {mean('kl')} | {mean('coherence')} | "
              f"{mean('distinct_2')} | {accuracy:.2f} | {statistics.fmean(run.result['seconds'] for run in found):.0f} |")


if __name__ == "__main__":
    main()
