"""
Which settings next? A few runs at chosen corners, the effect of each factor, and a step up the steepest slope.

    python sweep.py --factors g_lr=5e-6:1e-5:2e-5 d_lr=5e-6:2e-5:1e-4 d_scale=0.1:1:10 --num_steps 800
    python sweep.py --factors g_lr=1e-3:2e-3:4e-3 kl_coef=0.05:0.1:0.2 -- --preset demo --num_steps 8
    python sweep.py --factors g_lr=5e-6:1e-5:2e-5 beta1=0.9:0.93:0.95:lin --replicates 2 --jobs 4 --climb 3
    python sweep.py --results table.csv                     # columns g_lr,d_lr,...,mauve: only the analysis

A factor is name=low:centre:high, on a log scale unless it ends in :lin. The runs are the corners of the design, its
centre, then the point of steepest ascent. What sweep.py does not know goes on to train.py. The same command goes on
where one was stopped or killed: what is finished stays, what has a checkpoint is resumed.

The method is that of Box, Hunter & Hunter, Statistics for Experimenters, 2nd edition: two-level designs and their
standard errors in chapter 5, half fractions in 6, steepest ascent in 12. What differs from the textbook:
1) Effects are half-effects: the change of MAUVE for one coded unit, from the middle to a level, not from low to high.
2) A centre need not lie in the middle. The ascent takes as a factor's coded unit its interval on the side it goes to:
   high - centre upwards, centre - low downwards. So the write-up went from its table to its run 05.
3) The next point is rounded to clean values, since a step's length is a guess: 1, 2, 3 or 5 times a power of ten.
4) No random order: a run is a function of its flags and its seed, not of the hour at which it ran.
"""
import collections
import csv
import difflib
import fcntl
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time

from design import Factor, ascend, design, effects, told
from findings import OWN, by_place, draw, point_told, report
from flags import Parser, UserError, escaped

HERE = pathlib.Path(__file__).parent
TRAIN = [sys.executable, "-u", str(HERE / "train.py")]  # the command of a run, before its flags

Run = collections.namedtuple("Run", "id seed values")  # values: a number a factor


def read_flags(argv):
    """The flags of sweep.py, and the words that are meant for train.py."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--factors", nargs="+", default=None, help="2 to 7 numeric flags of train.py, as name=low:centre:high[:lin]")
    add("--results", default=None, help="table to analyse, .csv with a column a factor and mauve; nothing is run")
    add("--out_dir", default=None, help="folder of the sweep (unset: out/sweep, or the folder of --results)")
    add("--replicates", type=int, default=1, help="seeds a point; from 2 on the effects have standard errors")
    add("--seed", type=int, default=0, help="of a point's first run; its replicates take the seeds that follow")
    add("--jobs", type=int, default=1, help="runs at a time, each on a GPU of its own")
    add("--ascent_step", type=float, default=1.5, help="coded units that the factor of the largest effect moves")
    add("--climb", type=int, default=0, help="most steps beyond the ascent point, while MAUVE does not fall (0: none)")
    cut = argv.index("--") if "--" in argv else len(argv)
    args, unknown = parser.parse_known_args(argv[:cut])
    for name, least in (("replicates", 1), ("jobs", 1), ("climb", 0), ("seed", 0)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)}: must be {least} or more")
    if not 0 < args.ascent_step < math.inf:
        raise UserError(f"--ascent_step {args.ascent_step}: must be a finite number above 0")
    if not (args.factors or args.results):
        raise UserError("give --factors name=low:centre:high ..., or --results table.csv; --help shows examples")
    return args, unknown + argv[cut + 1:]


# -----------------------------------------------------------------------------
# factors

def train_flags():
    """The flags of train.py by name, each with its type: int, float, or None where it is no number."""
    found = re.findall(r'^add\("--(\w+)"(?:, type=(int|float))?', (HERE / "train.py").read_text(encoding="utf-8"), re.M)
    return {name: {"int": int, "float": float}.get(kind) for name, kind in found}


def read_factor(spec, kinds):
    """A Factor from name=low:centre:high[:lin]. kinds: name to int or float, the flags that may be one."""
    name, _, levels = spec.partition("=")
    *levels, scale = levels.split(":") if levels.endswith((":lin", ":log")) else [*levels.split(":"), "log"]
    wrong = f"--factors {spec}: "
    if len(levels) != 3:
        raise UserError(wrong + "must be name=low:centre:high, with :lin behind it for a linear scale")
    if name not in kinds:
        near = difflib.get_close_matches(name, kinds, 1, 0.5)
        raise UserError(wrong + f"{name or 'an empty name'} is no numeric flag of train.py"
                        + (f", did you mean {near[0]}?" if near else f"; these are: {', '.join(sorted(kinds))}"))
    try:
        low, centre, high = map(kinds[name], levels)
    except ValueError:
        what = "whole numbers" if kinds[name] is int else "numbers"
        raise UserError(wrong + f"low, centre and high of {name} must be {what}") from None
    if not (low < centre < high and math.isfinite(high - low)):
        raise UserError(wrong + "low, centre and high must be finite and rise in this order")
    if scale == "log" and low <= 0:
        raise UserError(wrong + "a log scale needs low above 0; put :lin behind it for a linear one")
    return Factor(name, low, centre, high, scale, kinds[name])


def read_factors(specs, kinds):
    """2 to 7 Factors of different names."""
    factors = [read_factor(spec, kinds) for spec in specs]
    names = [f.name for f in factors]
    if not 2 <= len(set(names)) == len(names) <= 7:
        raise UserError(f"--factors {' '.join(names)}: must be 2 to 7 different flags")
    return factors


def spec_of(f):
    return f"{f.name}={told(f.low)}:{told(f.centre)}:{told(f.high)}" + (":lin" if f.scale == "lin" else "")


# -----------------------------------------------------------------------------
# runs

def recall(out_dir, facts):
    """What the sweep's folder remembers in sweep.json: facts, and the points of the climb. Other facts are refused."""
    if (out_dir / "args.json").exists():
        raise UserError(f"--out_dir {out_dir} holds a run; choose another --out_dir for the sweep")
    file = out_dir / "sweep.json"
    memory = json.loads(file.read_text()) if file.exists() else {**facts, "climb": []}
    for key, wanted in facts.items():
        if memory[key] != wanted:
            was = (" ".join(memory[key]) or "none") if isinstance(wanted, list) else memory[key]
            raise UserError(f"--out_dir {out_dir} holds a sweep whose {key} were: {was}; go on with the same, "
                            "or choose another --out_dir")
    return memory


def taken(number):
    """Lock an open file for this process and those that inherit it; False where another one has it."""
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def write_whole(path, text):
    """Write a file beside, then rename it, so that it is never there by half."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.rename(path)


def result_of(folder):
    """What a finished run measured: mauve, mauve_sd, floor; None where it has not finished."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):  # a torn one is measured again
        return None
    return result if result.get("mauve") is not None else None


def start(folder, run, factors, flags, gpu):
    """Start a run, or go on with it. Its log, beside its folder, stays locked for as long as it lives, even without us.
    """
    values = itertools.chain(*((f"--{f.name}", told(value)) for f, value in zip(factors, run.values)))
    words = [*flags, *values, "--seed", str(run.seed), "--out_dir", str(folder)]
    if (folder / "args.json").exists():  # written after the first checkpoint
        words = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # killed before it had begun: train.py wants an empty folder
    env = dict(os.environ)
    if not re.search(r"--device[ =](cpu|cuda:)", " ".join(flags)):
        env["CUDA_VISIBLE_DEVICES"] = gpu
    with open(folder.with_suffix(".log"), "ab") as log:
        taken(log.fileno())
        # a session of its own, so that Ctrl-C reaches it once, through us, and it saves
        return subprocess.Popen([*TRAIN, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
                                start_new_session=True)


def await_orphans(out_dir, runs, stop):
    """Wait for runs that outlived an earlier sweep.py, killed outright: they still write, each on some GPU."""
    for run in runs:
        file = (out_dir / run.id).with_suffix(".log")
        if file.exists():
            with open(file, "ab") as log:
                if not taken(log.fileno()):
                    print(f"run {run.id} is still under way from an earlier start; waiting for it", flush=True)
                    while not (stop or taken(log.fileno())):
                        time.sleep(0.2)


def run_all(out_dir, runs, factors, flags, jobs, stop, after):
    """Do what is not finished among some runs, `jobs` at a time; after(run, status) is told of each that ends.

    stop: a list that signals are appended to; each is passed on, so that the runs save and end, and no other begins.
    """
    await_orphans(out_dir, runs, stop)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(jobs)))).split(",")
    waiting, running, passed_on = [run for run in runs if not result_of(out_dir / run.id)], {}, 0
    while running or waiting and not stop:
        for slot in range(jobs):
            if waiting and slot not in running and not stop:
                run = waiting.pop(0)
                print(f"run {run.id}: {point_told(factors, run.values)} seed={run.seed}", flush=True)
                running[slot] = run, start(out_dir / run.id, run, factors, flags, gpus[slot % len(gpus)])
        for slot, (run, process) in list(running.items()):
            if process.poll() is not None:
                del running[slot]
                result, status = result_of(out_dir / run.id), "stopped" if stop else f"failed ({process.returncode})"
                ending = f"mauve {result['mauve']:.3f}" if result else f"{status}: {last_line(out_dir / run.id)}"
                print(f"run {run.id}: {ending}", flush=True)
                after(run, "done" if result else status)
        if passed_on < len(stop):  # a second one ends them at once
            passed_on += 1
            for _, process in running.values():
                process.send_signal(signal.SIGTERM)
        time.sleep(0.1)


def last_line(folder):
    lines = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
    return escaped(next((line for line in reversed(lines) if line.strip()), "it printed nothing")[:300])


# -----------------------------------------------------------------------------
# the table; a row is a run: a dict of id, seed, values, mauve, mauve_sd, floor, status

def row_of(folder, run, status):
    result = result_of(folder) or {}
    return {"id": run.id, "seed": run.seed, "values": run.values,
            **{key: result.get(key) for key in ("mauve", "mauve_sd", "floor")}, "status": "done" if result else status}


def read_table(path, factors):
    """The rows of a .csv with a header, and its Factors: where `factors` is None, from the three values in a column."""
    def number(row, name):
        try:
            return float(row[name])
        except (TypeError, ValueError):
            raise UserError(f"--results {path}: {name} is {row[name]!r} in one row, and must be a number") from None

    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig")), skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--results {path} cannot be read: {error}") from None
    head = list(lines[0]) if lines else []
    missing = [name for name in ["mauve", *(f.name for f in factors or [])] if name not in head]
    if missing:
        raise UserError(f"--results {path} has no column {', '.join(missing)}; it has {', '.join(map(str, head))}")
    if factors is None:
        kinds, specs = train_flags(), []
        for name in (name for name in head if name in kinds and name not in OWN):
            levels = sorted({number(row, name) for row in lines})
            if len(levels) > 1:
                specs.append(f"{name}={':'.join(map(told, levels))}" + (":lin" if levels[0] <= 0 else ""))
        if any(spec.count(":") - spec.endswith(":lin") != 2 for spec in specs):
            raise UserError(f"--results {path}: not three levels each: {' '.join(specs)}; give --factors")
        factors = read_factors(specs, kinds)
    rows = [{"id": row.get("id") or f"{i:02d}", "seed": row.get("seed"),
             "values": [number(row, f.name) for f in factors],
             **{key: number(row, key) if row.get(key) else None for key in ("mauve", "mauve_sd", "floor")},
             "status": row.get("status") or ("done" if row["mauve"] else "")} for i, row in enumerate(lines)]
    for f, value in ((f, value) for row in rows for f, value in zip(factors, row["values"])):
        if f.scale == "log" and value <= 0:
            raise UserError(f"--results {path}: {f.name} is {told(value)}, and a log scale needs values above 0")
    return factors, rows


def write_table(path, factors, rows):
    file = io.StringIO()
    out = csv.writer(file, lineterminator="\n")
    out.writerow(["id", "seed", *(f.name for f in factors), *OWN[2:]])
    out.writerows([row["id"], row["seed"], *map(told, row["values"]), *(row[key] for key in OWN[2:])] for row in rows)
    write_whole(path, file.getvalue())


# -----------------------------------------------------------------------------
# the whole of it

def write_all(out_dir, factors, rows, ascent_step):
    """Print the analysis and write it down; the picture last, as it may lack its library."""
    head, body = report(factors, rows, ascent_step)
    print("\n" + "\n".join(body), flush=True)
    write_table(out_dir / "sweep.csv", factors, rows)
    write_whole(out_dir / "sweep.md", "\n".join(head + body))
    draw(out_dir / "sweep.png", factors, rows)


def main(argv):
    args, flags = read_flags(argv)
    kinds = train_flags()
    numeric = {name: kind for name, kind in kinds.items() if kind and name != "seed"}
    factors = read_factors(args.factors, numeric) if args.factors else None
    if args.results:
        if flags:
            raise UserError(f"--results runs nothing, so there is no use for {' '.join(flags)}")
        path = pathlib.Path(args.results)
        factors, rows = read_table(path, factors)
        return write_all(made(args.out_dir or path.parent), factors, rows, args.ascent_step)
    check_passed_on(flags, factors, kinds)
    if importlib.util.find_spec("matplotlib") is None:  # now, not after days of runs
        raise UserError("the picture at the end needs matplotlib: pip install matplotlib")
    out_dir = made(args.out_dir or "out/sweep")
    with open(out_dir / "lock", "a") as lock:
        if not taken(lock.fileno()):
            raise UserError(f"--out_dir {out_dir} is in use by another process; wait for it, or choose another folder")
        sweep(out_dir, factors, flags, args)


def made(out_dir):
    try:
        os.makedirs(out_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be made: {error}") from None
    return pathlib.Path(out_dir)


def check_passed_on(flags, factors, kinds):
    """Refuse words that train.py would refuse in every run, or that the sweep gives itself."""
    for word in (word.split("=")[0] for word in flags if word.startswith("--")):
        name = word.removeprefix("--")
        if name in ("seed", "out_dir", "resume") or name in [f.name for f in factors]:
            raise UserError(f"{word} is the sweep's to give to each run; leave it out behind --")
        if name.removeprefix("no-") not in kinds:
            near = difflib.get_close_matches(name, [*kinds, "factors", "results", "replicates", "jobs", "climb"], 1)
            advice = f", did you mean --{near[0]}?" if near else "; --help of sweep.py and train.py list them all"
            raise UserError(f"unknown flag {word}{advice}")


def sweep(out_dir, factors, flags, args):
    """The runs of the design, the ascent point, and the climb."""
    memory = recall(out_dir, {"factors": [spec_of(f) for f in factors], "flags": flags, "seed": args.seed})
    plan, stop, status = design(len(factors)).rows, [], {}
    points = [[f.low if x < 0 else f.high for f, x in zip(factors, row)] for row in plan]
    points.append([f.centre for f in factors])
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))

    def runs_of(some, first):  # all with the first seed, then all with the next
        return [Run(f"{i:02d}" + (f"-{r}" if r else ""), args.seed + r, values)
                for r in range(args.replicates) for i, values in enumerate(some, first)]

    def rows():
        runs = sorted(runs_of([*points, *memory["climb"]], 0))  # by id
        return [row_of(out_dir / run.id, run, status.get(run.id, "waiting")) for run in runs]

    def after(run, ending):
        status[run.id] = ending
        write_table(out_dir / "sweep.csv", factors, rows())

    def do(some, first):
        write_whole(out_dir / "sweep.json", json.dumps(memory, indent=2) + "\n")
        run_all(out_dir, runs_of(some, first), factors, flags, args.jobs, stop, after)

    do(points, 0)
    corners, centre, _ = by_place(factors, rows())
    half = effects(plan, corners).half if all(corners) else [0]
    before = statistics.fmean(centre) if centre else -math.inf
    for number in range(args.climb + 1 if any(half) else 0):
        values = ascend(factors, half, args.ascent_step * (number + 1))
        if stop:
            break
        if values not in memory["climb"]:  # one of an earlier --ascent_step or number of replicates keeps its number
            memory["climb"].append(values)
        do([values], len(points) + memory["climb"].index(values))
        reached = [row["mauve"] for row in rows() if row["values"] == values and row["mauve"] is not None]
        if not reached or statistics.fmean(reached) < before:
            break
        before = statistics.fmean(reached)
    write_all(out_dir, factors, rows(), args.ascent_step)
    finish(out_dir, stop, [name for name, ending in status.items() if ending != "done"])


def finish(out_dir, stop, failed):
    """The exit status of a sweep: 0, 1 where runs failed, 130 or 143 where a signal stopped it."""
    if stop:
        print("stopped; the same command goes on", flush=True)
        raise SystemExit(128 + stop[0])
    if failed:
        raise UserError(f"runs that failed: {', '.join(failed)}; their .log files in {out_dir} say why; "
                        "the same command tries them again", status=1)


if __name__ == "__main__":
    main(sys.argv[1:])
