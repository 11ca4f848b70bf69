"""
Pictures of runs, a page to read their samples on, a view of a run in the terminal, and a way to outside trackers.

    python plot.py out/demo-1                               # makes out/demo-1/training.png
    python plot.py out/demo-1 out/demo-2 --out both.png     # runs over each other
    python plot.py --report out/demo-1                      # makes out/demo-1/report.html: one file, no outside address
    python plot.py --watch out/demo-1                       # the newest samples in the terminal, while it trains
    python plot.py --track wandb out/demo-1                 # metrics.jsonl to wandb, tensorboard or trackio

All of it is read from the files that a run leaves, whether it has ended or not; --watch and --track go on until the
run's result.json is there. In a picture a colour is a run and a kind of line a metric, and a null is a gap.
"""
import base64
import collections
import importlib
import io
import json
import math
import os
import pathlib
import re
import signal
import statistics
import sys
import time

from flags import Parser, UserError, escaped, read_args

PANELS = [  # title, metrics (the first is drawn solid, the second dashed), range of the axis
    ("MAUVE", [], (0, 1)),
    ("reward", ["reward", "baseline"], None),
    ("p_real: taken for real", ["p_real"], (0, 1)),
    ("discriminator's accuracy", ["d_acc_real", "d_acc_generated"], (0, 1)),
    ("KL to the reference, nats a token", ["kl", "kl_after_d"], (0, None)),
    ("entropy, nats a token", ["entropy"], None),
    ("incoherence: 1 - coherence, less is better", ["coherence"], None),
    ("distinct_2: variety of bigrams", ["distinct_2"], (0, 1)),
    ("length_score: length asked for", ["length_score"], (0, 1)),
    ("tokens written", ["num_completion", "num_think"], (0, None)),
    ("think_closed: ended by itself", ["think_closed"], (0, 1)),
    ("rate, tokens a second", ["tokens_per_second"], (0, None)),
]
STYLES = ["-", (0, (4, 2))]
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, colour-blind safe
THEMES = {"light": ("#ffffff", "#1f2328", "#d1d9e0"), "dark": ("#151b23", "#e6edf3", "#3d444d")}  # paper, ink, lines
ALONE = {"light": COLOURS[0], "dark": COLOURS[-1]}  # of the report's one run
LEAST = 1e-4  # a log axis has no 0: an incoherence below this is drawn here
SMOOTH = 100  # from so many steps on, a strong line is the mean over a 50th of the run, and the steps are faint
SCORES = {"floor": "floor: the base model", "mauve": "result: the end of the run",
          "ceiling": "ceiling: other real texts", "mauve_last2000": "last 2000 (the write-up's protocol)"}
TEXTS, NUMBERS = "prefix think completion truth".split(), "reward p_real length_score".split()  # of a sample


# -----------------------------------------------------------------------------
# reading

def parsed(text):
    """A JSON object as a dict; nan and infinities, which browsers do not read, are null."""
    return dict(json.loads(text, parse_constant=lambda name: None))


def read_new(file, offset=0):
    """The records of a .jsonl file from a byte on, and the byte after them; a last line still being written waits."""
    if not file.exists():
        return [], 0
    with open(file, "rb") as opened:
        offset = min(offset, opened.seek(0, os.SEEK_END))  # --resume cuts the file back
        opened.seek(offset)
        whole, newline, _ = opened.read().rpartition(b"\n")  # bytes, as a torn line may end inside a character
    try:
        return [parsed(line) for line in whole.split(b"\n") if line], offset + len(whole + newline)
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: a line of it is not a JSON object") from None


def follow(folder, name, pause=1.0):
    """The records of a growing run, a list at a time as they are written, until result.json is there."""
    done, offset = False, 0
    while not done:
        done = (folder / "result.json").exists()  # asked before reading, so that the last lines are not missed
        records, offset = read_new(folder / name, offset)
        yield records
        time.sleep(0 if done else pause)


def read_json(file):
    """One of a run's .json files; {} where it has none yet."""
    try:
        return parsed(file.read_bytes()) if file.exists() else {}
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged; make it again with: python evaluate.py {file.parent}") from None


def read_run(folder):
    """What there is to draw of a run: its metrics by key, with nan for null, and its scores of MAUVE by name."""
    rows = read_new(folder / "metrics.jsonl")[0]
    if not rows:
        raise UserError(f"{folder} has no step in its metrics.jsonl yet; come back later, or wait with --watch")
    metrics = {key: [math.nan if row.get(key) is None else row[key] for row in rows]
               for key in ["step", *(key for _, keys, _ in PANELS for key in keys)]}
    result, mauve = read_json(folder / "result.json"), read_json(folder / "mauve.json")
    scores = {name: (mauve.get("scores") or {}).get(name) or
              {"mauve": result[name], "mauve_sd": result.get(f"{name}_sd"), "interval": result.get(f"{name}_interval")}
              for name in SCORES if result.get(name) is not None}
    return {"name": escaped(folder.resolve().name), "metrics": metrics, "result": result, "scores": scores,
            "curve": mauve.get("curve") or []}


def readable(text):
    """Text that shows its control characters by number, but keeps its lines and tabs."""
    return re.sub(r"[^\n\t]+", lambda part: escaped(part[0]), text)


# -----------------------------------------------------------------------------
# pictures

def figure(theme, width, height, rows=1, columns=1):
    """A figure in the colours of a theme, and the list of its axes."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("a picture needs the package matplotlib; pip install matplotlib") from None
    paper, ink, lines = THEMES[theme]
    matplotlib.rcParams.update({
        "figure.facecolor": paper, "axes.facecolor": paper, "axes.edgecolor": lines, "grid.color": lines,
        "text.color": ink, "axes.labelcolor": ink, "axes.titlecolor": ink, "xtick.color": lines, "ytick.color": lines,
        "xtick.labelcolor": ink, "ytick.labelcolor": ink, "legend.facecolor": paper, "legend.edgecolor": "none",
        "axes.grid": True, "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlelocation": "left", "axes.titlesize": 11, "axes.titleweight": "bold", "lines.linewidth": 1.7,
        "text.parse_math": False})  # a folder may be called a$b$c
    fig = Figure(figsize=(width, height), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches around each panel
    return fig, list(fig.subplots(rows, columns, squeeze=False).flat)


def smooth(values, width):
    """Means over `width` values around each; nan is left out of them and stays nan."""
    near = [values[max(i - width // 2, 0):i + (width + 1) // 2] for i in range(len(values))]
    return [x if math.isnan(x) else statistics.fmean(y for y in ys if not math.isnan(y)) for x, ys in zip(values, near)]


def legend(axes, labels, styles):
    """What the kinds of line mean, in ink, as the colours mean the runs."""
    ink = axes.title.get_color()
    lines = [axes.plot([], [], color=ink, **style)[0] for style in styles]
    axes.legend(lines, labels, fontsize=8, framealpha=0.7, handlelength=2.6)


def draw_curves(axes, runs, keys):
    """Metrics over the steps, a colour a run and a kind of line a metric."""
    keys = [key for key in keys if not all(math.isnan(x) for run in runs for x in run["metrics"][key])]
    for run, key, style in ((run, *kind) for run in runs for kind in zip(keys, STYLES)):
        steps, values = run["metrics"]["step"], run["metrics"][key]
        if key == "coherence":
            values = [x if math.isnan(x) else max(1 - x, LEAST) for x in values]
        width = max(len(steps) // 50, 1) if len(steps) >= SMOOTH else 1
        if width > 1:
            axes.plot(steps, values, color=run["colour"], alpha=0.2, linewidth=0.7)
        axes.plot(steps, smooth(values, width), color=run["colour"], linestyle=style,
                  marker="." if len(steps) == 1 else None)
    if keys == ["coherence"]:
        axes.set_yscale("log")
        axes.set_ylim(LEAST / 1.5, None)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.axhline(LEAST, color=axes.title.get_color(), linewidth=0.8, alpha=0.4)
        axes.text(0.98, LEAST * 1.1, f"0 is drawn here, at {LEAST:g}", transform=axes.get_yaxis_transform(), ha="right",
                  fontsize=8, alpha=0.7)
    if len(keys) > 1:
        legend(axes, keys, [{"linestyle": style} for style in STYLES])
    return bool(keys)


def draw_mauve(axes, runs):
    """The result as a point with its interval, floor and ceiling as lines, and the curve where one was measured."""
    for i, run in enumerate(runs):
        colour, scores, end = run["colour"], run["scores"], run["metrics"]["step"][-1] + 1
        axes.plot(*([point[key] for point in run["curve"]] for key in ("step", "mauve")), ".-", color=colour)
        for name, style in (("floor", ":"), ("ceiling", STYLES[1])):
            if name in scores:
                axes.axhline(scores[name]["mauve"], color=colour, linestyle=style, linewidth=1.3)
        if "mauve" in scores:
            mean, x = scores["mauve"]["mauve"], end * (1 - (len(runs) - 1 - i) / 40)  # beside each other
            low, high = scores["mauve"].get("interval") or (mean, mean)
            axes.errorbar([x], [mean], [[max(mean - low, 0)], [max(high - mean, 0)]], color=colour, fmt="o", capsize=3)
        for name, x, offset, side in (("floor", 0, (3, 3), "left"), ("ceiling", 0, (3, 3), "left"),
                                      ("mauve", end, (-7, -11), "right")):
            if name in scores and len(runs) == 1:
                axes.annotate(f"{scores[name]['mauve']:.2f}", (x, scores[name]["mauve"]), offset,
                              textcoords="offset points", ha=side, fontsize=8)
    if not any(run["scores"] or run["curve"] for run in runs):
        return False
    axes.set_xlim(0, 1.04 * max(run["metrics"]["step"][-1] + 1 for run in runs))
    legend(axes, ["result", "floor", "ceiling"],
           [{"linestyle": "", "marker": "o"}, {"linestyle": ":"}, {"linestyle": STYLES[1]}])
    return True


def draw_panel(axes, runs, title, keys, limits):
    drawn = draw_curves(axes, runs, keys) if keys else draw_mauve(axes, runs)
    axes.set_title(title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if limits:
        low, high = limits[0], limits[1] or axes.get_ylim()[1]
        axes.set_ylim(low - 0.03 * high, 1.03 * high)
    if not drawn:
        axes.text(0.5, 0.5, "not logged" if keys else "not measured", transform=axes.transAxes, ha="center", alpha=0.6)
        axes.set_yticks([])


def draw_runs(folders, file):
    """training.png: every panel, all runs over each other."""
    runs = [read_run(folder) for folder in folders]
    names = [run["name"] for run in runs]
    fig, panels = figure("light", 13, 14, 4, 3)
    colours = COLOURS
    if len(runs) > len(COLOURS):  # then shades, dark to light in the order given
        from matplotlib import colormaps
        colours = colormaps["viridis"]([0.9 * i / (len(runs) - 1) for i in range(len(runs))])
    for run, folder, colour in zip(runs, folders, colours):
        run["colour"] = colour
        if names.count(run["name"]) > 1:
            run["name"] = escaped(str(folder))
    for axes, panel in zip(panels, PANELS):
        draw_panel(axes, runs, *panel)
    lines = [panels[0].plot([], [], color=run["colour"], linewidth=4)[0] for run in runs]
    fig.legend(lines, [run["name"] for run in runs], loc="outside upper left", ncols=4, fontsize=12)
    longest = max(len(run["metrics"]["step"]) for run in runs)
    note = "; strong: means over a 50th of a run, faint: every step" if longest >= SMOOTH else ""
    fig.supxlabel(f"step{note}", fontsize=10)
    save(lambda out: fig.savefig(out, dpi=110, format="png"), file)


def draw_alone(run, panel, theme):
    """One panel as a data: URI."""
    fig, (axes,) = figure(theme, 4.4, 3.1)
    draw_panel(axes, [{**run, "colour": ALONE[theme]}], *panel)
    picture = io.BytesIO()
    fig.savefig(picture, dpi=140, format="png")
    return "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()


def save(write, file):
    """Write a file by `write`, a function of the open file, and say so."""
    try:
        with open(file, "wb") as out:
            write(out)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}; name another file with --out") from None
    print(file)


# -----------------------------------------------------------------------------
# the report

def chosen(folder, samples_per_step, most_steps):
    """The samples that the page shows, a dict a step: the first of each, on steps spread evenly over the run.

    The base model's from before training come first, with null for a step, on the prefixes that the run ends with.
    """
    records, floor = read_new(folder / "rollouts.jsonl")[0], read_new(folder / "floor.jsonl")[0]
    steps = collections.defaultdict(list)
    for record in records:
        steps[record["step"]].append(record)
    known, count = sorted(steps), min(len(steps), most_steps)
    groups = [(step, steps[step]) for step in (known[i * (len(known) - 1) // max(count - 1, 1)] for i in range(count))]
    if floor:
        groups.insert(0, (None, [record for record in floor if record["step"] == floor[-1]["step"]]))
    return {"num_steps": len(steps), "num_samples": len(records), "steps": [
        {"step": step, "of": len(members), "samples": [
            {**{key: readable(record[key]) for key in TEXTS}, **{key: record[key] for key in NUMBERS}, "step": step}
            for record in members[:samples_per_step]]} for step, members in groups]}


def report(folder, file, samples_per_step, most_steps):
    """report.html: everything a reader of the run wants, as data in one page that draws itself."""
    run, provenance = read_run(folder), read_json(folder / "args.json")
    keys = "step reward p_real length_score d_acc_real d_acc_generated kl coherence".split()
    data = {
        "name": run["name"],
        "result": run["result"],
        "scores": [{"label": label, **run["scores"][name]} for name, label in SCORES.items() if name in run["scores"]],
        "settings": {key: readable(str(value)) for key, value in provenance["args"].items()},
        "origin": {key: readable(value if isinstance(value, str) else json.dumps(value))
                   for key, value in provenance.items() if key != "args"},
        "pictures": [{"title": panel[0], **{theme: draw_alone(run, panel, theme) for theme in THEMES}}
                     for panel in PANELS],
        "metrics": [{key: row.get(key) for key in keys} for row in read_new(folder / "metrics.jsonl")[0]],
        "texts": chosen(folder, samples_per_step, most_steps),
    }
    told = json.dumps(data).replace("<", r"\u003c")  # ascii, and no tag can open or close in it
    template = pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    save(lambda out: out.write(template.replace("{{data}}", told).encode()), file)


# -----------------------------------------------------------------------------
# the terminal, and trackers

def watch(folder, samples_per_step):
    """Print the newest samples as they are written."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # of `| head`
    sys.stdout.reconfigure(errors="backslashreplace")  # where a terminal has no Unicode
    print(f"following {folder}; ctrl-C ends this and not the run", file=sys.stderr)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    dim, cyan, bold, plain = ("\x1b[2m", "\x1b[36m", "\x1b[1m", "\x1b[0m") if colour else [""] * 4
    shown = collections.Counter()
    for records in follow(folder, "rollouts.jsonl"):
        for record in (record for record in records if record["step"] == records[-1]["step"]):
            shown[record["step"]] += 1
            if shown[record["step"]] > samples_per_step:
                continue
            paid = "   ".join(f"{key} {record[key]:.3f}" for key in ("reward", "p_real") if record[key] is not None)
            prefix, think, completion = (readable(record[key]) for key in ("prefix", "think", "completion"))
            print(f"{bold}step {record['step']}   {paid}{plain}\n{dim}{prefix}{plain}\n"
                  f"{cyan}<think>{think}</think>{plain}\n{completion}\n", flush=True)


def tracker(service, name, settings, folder):
    """A tracking service's `log(row, step)` and `finish()`; it is imported only here."""
    try:
        if service == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
        else:
            module = importlib.import_module(service)
    except ImportError:
        raise UserError(f"--track {service}: the package is not installed; pip install {service}") from None
    if service == "tensorboard":
        writer = SummaryWriter(folder / "tensorboard")
        return lambda row, step: [writer.add_scalar(key, x, step) for key, x in row.items()], writer.close
    module.init(project="forger", name=name, config=settings)  # trackio has taken over wandb's functions
    return lambda row, step: module.log(row, step=step), module.finish


def track(folder, service, settings):
    """Send each step's metrics and at last the result; nulls are left out."""
    log, finish = tracker(service, folder.resolve().name, settings, folder)
    last = -1
    try:
        for rows in follow(folder, "metrics.jsonl"):
            for row in (row for row in rows if row["step"] > last):  # a resumed run does some steps again, alike
                last = row["step"]
                log({key: x for key, x in row.items() if key != "step" and x is not None}, last)
        result = read_json(folder / "result.json")
        log({key: x for key, x in result.items() if isinstance(x, (int, float)) and key != "seconds"}, last + 1)
    finally:
        finish()  # also after ctrl-C: what was sent arrives
    print(f"{folder}: sent {last + 1} steps to {service}")


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="run", help="folder of a run, out/NAME; several are drawn over each other")
    add("--out", default=None, help="file to make (unset: training.png or report.html in the first run's folder)")
    add("--report", action="store_true", help="make the page instead of the picture")
    add("--watch", action="store_true", help="follow the samples in the terminal")
    add("--track", choices=["wandb", "tensorboard", "trackio"], default=None, help="send the metrics to a tracker")
    add("--samples_per_step", type=int, default=8, help="samples a step, in the report and in the terminal")
    add("--most_steps", type=int, default=100, help="steps in the report, spread evenly over the run")
    flags = parser.parse_args()

    folders = [pathlib.Path(run) for run in flags.runs]
    settings = [read_args(folder) for folder in folders][0]
    modes = [mode for mode in ("report", "watch", "track") if getattr(flags, mode)]
    if len(modes) > 1:
        raise UserError(f"--{' and --'.join(modes)}: give one of them")
    if modes and len(folders) > 1:
        raise UserError(f"--{modes[0]} takes one run, and {len(folders)} are given")
    for name, least in (("samples_per_step", 1), ("most_steps", 2)):
        if getattr(flags, name) < least:
            raise UserError(f"--{name} {getattr(flags, name)}: must be at least {least}")
    if flags.watch:
        watch(folders[0], flags.samples_per_step)
    elif flags.track:
        track(folders[0], flags.track, settings)
    elif flags.report:
        file = flags.out or folders[0] / "report.html"
        report(folders[0], file, flags.samples_per_step, flags.most_steps)
    else:
        draw_runs(folders, flags.out or folders[0] / "training.png")
