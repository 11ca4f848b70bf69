"""
Find better settings: run the corners of a two-level design, estimate each factor's effect, step up the steepest slope.

    python sweep.py --factors g_lr=1e-3:2e-3:4e-3 kl_coef=0.05:0.1:0.2 --preset demo --num_steps 8
    python sweep.py --factors g_lr=5e-6:1e-5:2e-5 d_lr=5e-6:2e-5:1e-4 d_scale=0.1:1:10 --num_steps 800
    python sweep.py --factors g_lr=5e-6:1e-5:2e-5 beta1=0.9:0.93:0.95:lin --replicates 2 --jobs 4 --climb 3
    python sweep.py --factors g_lr=5e-6:1e-5:2e-5 d_lr=5e-6:2e-5:1e-4 --results table.csv  # analyse a table only

A factor is name=low:centre:high, on a log scale unless it ends in :lin. Flags that sweep.py lacks go to train.py. The
same command continues a stopped sweep. It leaves sweep.csv, sweep.md, sweep.png, and a folder and a log per run.

After Box, Hunter & Hunter, Statistics for Experimenters, 2nd edition: designs and standard errors in chapter 5, half
fractions in 6, steepest ascent in 12. What differs from the textbook:
1. Effects are half-effects: the change of MAUVE per coded unit, from the centre to a level rather than low to high.
2. The centre need not lie in the middle. A coded unit is the interval on the side that the ascent goes to.
3. The next point is rounded to clean values, since the length of the step is a guess.
4. The order is not random: a run depends on its flags and its seed, not on when it ran.
"""
import collections
import csv
import io
import itertools
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

from flags import Parser, Run, UserError, check, escaped, write_whole
from train import flags

TRAIN = [sys.executable, "-u", str(pathlib.Path(__file__).with_name("train.py"))]
NO_EFFECT = "seed seeds micro_batch save_every floor_sequences".split()  # on what is learned
MEASURED = "mauve", "mauve_sd", "floor"
Effects = collections.namedtuple("Effects", "corners centre half se sd df curvature_se")


class Factor(collections.namedtuple("Factor", "name low centre high log")):
    """A flag at three levels, on a logarithmic or a linear scale. Coded, they are -1, 0 and 1."""

    def scaled(self, value):
        return math.log(value) if self.log else value

    def unit(self, upwards):
        return abs(self.scaled(self.high if upwards else self.low) - self.scaled(self.centre))

    def coded(self, value):
        distance = self.scaled(value) - self.scaled(self.centre)
        return distance / self.unit(distance >= 0)

    def decoded(self, coded):
        value = self.scaled(self.centre) + coded * self.unit(coded >= 0)
        return math.exp(value) if self.log else value

    def rounded(self, value):
        """The cleanest value within half a coded unit: 1, 2, 3 or 5 times a power of ten (log scale), or few digits."""
        tries = [float(f"{value:.{digits}g}") for digits in range(2, 18)]
        if self.log:
            power = math.floor(math.log10(value))
            ladder = (float(f"{digit}e{p}") for p in (power, power + 1) for digit in (1, 2, 3, 5))
            tries.insert(0, min(ladder, key=lambda x: abs(math.log(x / value))))  # the nearest by ratio
        value = next(x for x in tries if abs(self.coded(x) - self.coded(value)) < 0.5000001)
        return value if isinstance(self.low, float) else max(round(value), 1) if self.log else round(value)


def design(k):
    """The corners in standard order, as rows of -1 and 1: all four for two factors; for more the half fraction 2^(k-1),
    whose last column is the product of the others. Its defining relation is I = AB...K."""
    free = k - 1 if k > 2 else k
    rows = [[1 if i >> j & 1 else -1 for j in range(free)] for i in range(2 ** free)]
    return [[*row, math.prod(row)] if k > 2 else row for row in rows]


def effects(coded, y, centre):
    """Half-effects of orthogonal columns of -1 and 1, with standard errors from replicates; nan where data is missing.

    coded: a row per corner; y: a list of replicates per corner; centre: the replicates of the centre.
    With m_i the mean of the r_i replicates of corner i out of n: half_j = sum_i coded_ij m_i / n,
    se = sd / n sqrt(sum_i 1 / r_i), sd^2 = the variance within points, pooled over df degrees of freedom.
    """
    *means, middle = [fmean(some or [math.nan]) for some in [*y, centre]]
    half = [fmean(x * mean for x, mean in zip(column, means)) for column in zip(*coded)]
    df = sum(len(some) - 1 for some in [*y, centre] if some)
    sd = math.sqrt(sum((x - fmean(some)) ** 2 for some in [*y, centre] for x in some) / df) if df else math.nan
    se = sd * math.sqrt(sum(1 / (len(some) or math.nan) for some in y)) / len(y)  # also of the corners' mean
    return Effects(fmean(means), middle, half, se, sd, df, math.hypot(se, sd / math.sqrt(len(centre) or math.nan)))


def next_point(factors, half, ascent_step=1.5):
    """Steepest ascent from the centre, in clean values: the largest half-effect moves its factor by `ascent_step`."""
    largest = max(map(abs, half))
    return [f.rounded(f.decoded(ascent_step * h / largest)) for f, h in zip(factors, half)] if largest > 0 else []


def read_factors(specs):
    """2 to 7 Factors from name=low:centre:high[:lin]."""
    factors = []
    for spec in specs:
        name, _, text = spec.partition("=")
        log, text = not text.endswith(":lin"), text.removesuffix(":lin")
        levels = [getattr(flags([f"--{name}={level}"]).parse_args(), name) for level in text.split(":")]
        good = [x for x in levels if type(x) in (int, float) and math.isfinite(x) and (x > 0 or not log)]
        if name in NO_EFFECT:
            raise UserError(f"--factors {spec}: --{name} does not change what is learned; choose another flag")
        if len(levels) != 3 or good != sorted({*levels}):
            raise UserError(f"--factors {spec}: must be name=low:centre:high, a numeric flag of train.py and three "
                            "finite levels that rise, above 0 unless :lin at the end makes the scale linear")
        factors.append(Factor(name, *levels, log))
    if not 2 <= len({f.name for f in factors}) == len(factors) <= 7:
        raise UserError(f"--factors {' '.join(specs)}: must be 2 to 7 different flags, each as name=low:centre:high")
    return factors


def read_table(path, factors):
    """The rows of a .csv that has a column per factor and one named mauve; those without a mauve are left out."""
    rows, lines, names = [], None, ["mauve", *(f.name for f in factors)]
    try:
        lines = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), skipinitialspace=True, strict=True)
        for name in names:
            if (count := (lines.fieldnames or []).count(name)) != 1:
                raise ValueError(f"it has {count} columns {name}")
        for line in lines:
            if None in line or None in line.values():
                raise ValueError("this row has more or fewer cells than the header")
            if line["mauve"].strip():
                rows.append({name: float(line[name]) for name in names})
                if not all(math.isfinite(f.coded(rows[-1][f.name]) + rows[-1]["mauve"]) for f in factors):
                    raise ValueError("a number is nan or infinite")
                if not 0 <= rows[-1]["mauve"] <= 1:
                    raise ValueError("its mauve is not from 0 to 1")
        if not rows:
            raise ValueError("no row has a mauve")
    except (OSError, ValueError, ArithmeticError, csv.Error) as error:
        where = f"{path}, line {lines.line_num}" if lines and lines.line_num > 1 else path
        raise UserError(f"--results {where}: {error}; must be a .csv with a header and finite numbers in a column per "
                        "factor, above 0 on a log scale, and one named mauve") from None
    return rows


def outcome(folder):
    """What a finished run measured, else {}, and how far it has come."""
    if not (folder / "args.json").exists():
        return {}, ""
    run = Run(folder)
    finished = run.result.get("num_steps") == run.args.num_steps  # evaluate.py can measure a stopped run, too
    return ({key: run.result.get(key) for key in MEASURED} if finished else {},
            f", {len(run.metrics)} of {run.args.num_steps} steps")


class Sweep:
    """Factors and rows. A row is a run: a dict of id, seed, a value per factor, mauve, mauve_sd, floor and status."""

    def __init__(self, out_dir, factors, rows, args):
        self.out_dir, self.factors, self.rows, self.args = pathlib.Path(out_dir), factors, rows, args
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.jobs)))).split(",")
        self.gpus, self.stop = (gpus * args.jobs)[:args.jobs], []  # GPUs that no run uses; signals received

    def effects(self):
        points, plan = collections.defaultdict(list), design(len(self.factors))
        for row in self.rows:
            if row["mauve"] is not None:
                points[tuple(round(f.coded(row[f.name]), 6) for f in self.factors)].append(row["mauve"])
        return effects(plan, [points[tuple(corner)] for corner in plan], points[(0,) * len(self.factors)])

    def report(self):
        k, e, letters = len(self.factors), self.effects(), "ABCDEFG"[:len(self.factors)]
        point = next_point(self.factors, e.half, self.args.ascent_step)
        return "\n".join([
            f"# Sweep of {', '.join(f.name for f in self.factors)}", "",
            "Design 2^2: no effect is aliased." if k == 2 else f"Design 2^({k}-1), resolution "
            f"{'III IV V VI VII'.split()[k - 3]}: an effect is aliased with that of all other letters.", "",
            *(f"- {x}{' = ' + letters.replace(x, '') if k > 2 else ''}, {f.name}={f.low:g}:{f.centre:g}:{f.high:g}"
              f"{'' if f.log else ':lin'}: half-effect {h:.5g} +- {e.se:.5g}"
              for x, f, h in zip(letters, self.factors, e.half)), "",
            f"Mean of the corners {e.corners:.5g}, centre {e.centre:.5g}, curvature {e.corners - e.centre:.5g} +- "
            f"{e.curvature_se:.5g}.",
            f"Standard deviation of a run {e.sd:.5g}, on {e.df} degrees of freedom." if e.df else
            "No standard errors without --replicates.", "",
            "next point " + " ".join(f"{f.name}={value:.12g}" for f, value in zip(self.factors, point)) if point else
            "No next point: a corner has no MAUVE, or no factor an effect.", ""]).replace(" +- nan", "")

    def write(self):
        """Write sweep.md, sweep.png, and unless the rows come from a table sweep.csv."""
        from matplotlib.figure import Figure  # not pyplot: no window, no state
        file, e, figure = io.StringIO(), self.effects(), Figure(figsize=(12, 4), layout="constrained")
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if not self.args.results:
            csv.writer(file, lineterminator="\n").writerows([self.rows[0], *(row.values() for row in self.rows)])
            write_whole(self.out_dir / "sweep.csv", file.getvalue())
        write_whole(self.out_dir / "sweep.md", self.report())
        left, right = figure.subplots(1, 2, width_ratios=(1, 2))
        left.set(title="half-effects and standard errors", ylabel="MAUVE per coded unit")
        left.axhline(0, color="grey", linewidth=0.8)
        left.errorbar([f.name for f in self.factors], e.half, yerr=e.se, fmt="o", capsize=4)
        right.set(title="MAUVE of the runs", xlabel="coded " + ", ".join(f.name for f in self.factors))
        right.plot(["\n".join(f"{f.coded(row[f.name]):+.2g}" for f in self.factors) for row in self.rows],
                   [row["mauve"] for row in self.rows], "o")
        figure.savefig(self.out_dir / "sweep.png", dpi=120)

    def run_one(self, row, words):
        """Run or resume a row's train.py unless it has finished, and fill in the row."""
        folder, log, code, passed_on = self.out_dir / row["id"], self.out_dir / f"{row['id']}.log", None, 0
        if self.stop:
            return
        if not outcome(folder)[0]:
            print(f"run {row['id']}: {shlex.join(words)}", flush=True)
            if (folder / "args.json").exists():
                words = [f"--resume={folder}"]
            else:
                shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed before its first checkpoint
                words = [*words, f"--out_dir={folder}"]
            gpu = self.gpus.pop(0)
            launcher = shlex.split(self.args.launcher)  # it chooses the machine and the GPU, if there is one
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if self.args.jobs > 1 and not launcher else {})
            with open(log, "ab") as out:  # a separate session, so that Ctrl-C reaches the run once, through us
                process = subprocess.Popen([*launcher, *TRAIN, *words], env=env, stdin=subprocess.DEVNULL, stdout=out,
                                           stderr=out, start_new_session=True)
            while (code := process.poll()) is None:
                if passed_on < len(self.stop):  # srun passes SIGUSR1 on, and takes SIGTERM for itself
                    process.send_signal(signal.SIGUSR1 if launcher else signal.SIGTERM)
                    passed_on += 1
                time.sleep(0.1)
            self.gpus.append(gpu)
        result, progress = outcome(folder)
        row.update(result, status="done" if result else ("stopped" if self.stop else f"failed ({code})") + progress)
        ending = f"mauve {row['mauve']:.3f}" if result else log.read_text(errors="replace").strip().rpartition("\n")[2]
        print(f"run {row['id']}: {row['status']}: {escaped(ending)[:300]}", flush=True)

    def run(self, points, words):
        """Run the replicates of some points, --jobs at a time; returns their MAUVEs."""
        rows, commands, seed, first = [], [], self.args.seed, len(self.rows) // self.args.replicates
        for r, (i, values) in itertools.product(range(self.args.replicates), enumerate(points, first)):
            row = {f.name: value for f, value in zip(self.factors, values)}
            command = [*words, *(f"--{name}={value:.12g}" for name, value in row.items()), f"--seed={seed + r}"]
            if not self.rows:  # what train.py would refuse is refused before the first run
                parser = flags(command)
                check(parser.parse_args(), parser.given())
            folder = self.out_dir / (f"{i:02d}" + f"-{r}" * (r > 0))
            if (folder / "args.json").exists() and (Run(folder).info.get("command") or [])[1:-1] != command:
                raise UserError(f"{folder} is a run with other flags; continue a sweep with the same command, move "
                                "that folder away, or choose another --out_dir")
            rows.append({"id": folder.name, "seed": seed + r, **row, **dict.fromkeys(MEASURED), "status": "waiting"})
            commands.append(command)
        self.rows += rows
        self.out_dir.mkdir(parents=True, exist_ok=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda number, frame: self.stop.append(number))
        with ThreadPoolExecutor(self.args.jobs) as pool:
            for _ in pool.map(self.run_one, rows, commands):
                self.write()
        return [row["mauve"] for row in rows if row["mauve"] is not None]

    def climb(self, words):
        """Run the design, the next point, and further points up the slope while MAUVE does not fall."""
        points = [[f.low if x < 0 else f.high for f, x in zip(self.factors, row)] for row in design(len(self.factors))]
        points.append([f.centre for f in self.factors])
        self.run(points, words)
        e = self.effects()
        before = e.centre
        for step in range(1, self.args.climb + 2):
            point = next_point(self.factors, e.half, self.args.ascent_step * step)
            reached = [] if self.stop or not point or point in points else self.run([point], words)
            if not reached or fmean(reached) < before:
                break
            before = fmean(reached)
            points.append(point)


def main(argv):
    parser = Parser(__doc__, argv)
    add = parser.add_argument
    add("--factors", nargs="+", default=[], help="2 to 7 numeric flags of train.py, as name=low:centre:high[:lin]")
    add("--results", type=pathlib.Path, help="table to analyse, .csv with a column per factor and one named mauve")
    add("--out_dir", help="folder of the sweep (default: out/sweep, or the folder of --results)")
    add("--replicates", type=int, default=1, help="seeds per point; 2 or more give the effects standard errors")
    add("--seed", type=int, default=0, help="seed of a point's first run; its replicates take the seeds that follow")
    add("--jobs", type=int, default=1, help="runs at a time, each on a separate GPU")
    add("--launcher", default="", help="words to put before each run's command, such as: srun -n1 --gres=gpu:1")
    add("--ascent_step", type=float, default=1.5, help="coded units that the factor of the largest effect moves")
    add("--climb", type=int, default=0, help="most steps beyond the next point, while MAUVE does not fall (0: none)")
    args, words = parser.parse_known_args(argv)
    for name, least, most in (("replicates", 1, 99), ("jobs", 1, 99), ("climb", 0, 99), ("ascent_step", 0.01, 10)):
        if not least <= getattr(args, name) <= most:
            raise UserError(f"--{name} {getattr(args, name)}: must be from {least} to {most}")
    try:
        known = not args.launcher or shutil.which((shlex.split(args.launcher) or [""])[0])
    except ValueError:  # a quotation that is not closed
        known = False
    if not known:
        raise UserError(f"--launcher {args.launcher}: its first word is not a program here; give one such as srun -n1")
    given, factors = flags(words).parse_args(), read_factors(args.factors)
    fixed = {f"--{name}" for name in ("seed", "out_dir", "resume", *(f.name for f in factors))}
    if clash := sorted(fixed & {word.split("=")[0] for word in words}):
        raise UserError(f"{' '.join(clash)}: a sweep sets --seed, --out_dir and its factors itself, for each run")
    if args.results and words or not given.seeds or not given.g_lr and "--g_lr" not in fixed:
        raise UserError(f"{' '.join(words)}: --results runs nothing; runs of a sweep need --seeds and --g_lr above 0")
    rows = read_table(args.results, factors) if args.results else []
    sweep = Sweep(args.out_dir or (args.results.parent if args.results else "out/sweep"), factors, rows, args)
    full = ""
    try:
        if not args.results:
            sweep.climb(words)
        sweep.write()
    except OSError as error:
        full = f"--out_dir {sweep.out_dir} cannot be written to ({error}); make room, or name another"
    print("\n" + sweep.report(), flush=True)  # a full disk must not cost the numbers
    if full:
        raise UserError(full)
    if sweep.stop:
        print("stopped; the same command continues")
        raise SystemExit(128 + sweep.stop[0])
    failed = [row["id"] for row in sweep.rows if row.get("status", "").startswith("failed")]
    if failed:
        raise UserError(f"runs that failed: {', '.join(failed)}; their logs in {sweep.out_dir} say why; "
                        "the same command tries them once more", status=1)


if __name__ == "__main__":
    main(sys.argv[1:])
