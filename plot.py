"""
Picture of a run, or of several over each other: MAUVE where it was measured, and every number in metrics.jsonl.

    python plot.py out/demo-1                               # makes out/demo-1/training.png
    python plot.py out/demo-1 out/demo-2 --out both.svg     # two runs over each other; .png, .svg or .pdf

A colour is a run, a kind of line is a metric, a null is a gap. The run may still be training. A metric that a fork adds
to metrics.jsonl gets its panel without further code; a line in PANELS gives it a title and a range.
"""
import itertools
import math
import pathlib
import statistics

from flags import KINDS, Parser, Run, UserError, escaped, resume_command

FREE, SHARE, POSITIVE = (None, None), (-0.03, 1.03), (0, None)  # ranges of an axis; None: as far as the data go
PANELS = [  # title, metrics, range; all other metrics follow these
    ("reward", ["reward", "baseline"], FREE),
    ("p_real and length_score", ["p_real", "length_score"], SHARE),
    ("discriminator's accuracy", ["d_acc_real", "d_acc_generated", "d_acc_immediate"], SHARE),
    ("discriminator's verdicts", ["d_value", "d_brier", "d_parsed", "d_think_empty"], SHARE),
    ("kl to the base, nats per token", ["kl"], POSITIVE),
    ("loss, nats per token", ["loss", "held"], FREE),
    ("loss on traces", ["loss_trace", "held_trace"], FREE),
    ("loss on truths", ["loss_truth", "held_truth"], FREE),
    ("loss on plain text", ["loss_plain", "held_plain"], FREE),
    ("entropy, nats per token", ["entropy"], FREE),
    ("coherence under the base", ["coherence"], FREE),
    ("distinct_2: variety of bigrams", ["distinct_2"], SHARE),
    ("tokens per sequence", ["num_completion", "num_think", "d_num_think"], POSITIVE),
    ("think_closed: ended by itself", ["think_closed"], SHARE),
    ("gradient norm", ["g_grad_norm", "d_grad_norm"], POSITIVE),
    ("learning rate", ["g_lr", "d_lr"], POSITIVE),
    ("seconds per step", ["seconds", "sample_seconds", "update_seconds"], POSITIVE),
    ("tokens per second", ["tokens_per_second"], POSITIVE),
    ("memory, GiB", ["memory_gb"], POSITIVE),
]
STYLES = ["-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))]  # solid, dashed, dotted, dash-dotted
SCORES = dict(mauve=dict(linestyle="", marker="o"), floor=dict(linestyle=STYLES[2]), ceiling=dict(linestyle=STYLES[1]))
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, colour-blind safe
THEMES = {"light": ("#ffffff", "#1f2328", "#d1d9e0"), "dark": ("#151b23", "#e6edf3", "#3d444d")}  # paper, ink, lines
SMOOTH = 100  # steps from which the strong line is the mean over a 50th of the run, and the single steps are faint


finite = KINDS["number"]


def panels_of(runs):
    """(title, metrics, range) of each panel for which a run has data: MAUVE, those in PANELS, every other metric."""
    keys = dict.fromkeys(key for run in runs for row in run.metrics for key, x in row.items() if finite(x))
    known = [(title, [key for key in wanted if key in keys], limits) for title, wanted, limits in PANELS]
    titled = {"step", *(key for _, found, _ in known for key in found)}
    mauve = any(run.mauve.get("curve") or finite(run.result.get("mauve")) for run in runs)
    return ([("MAUVE", [], SHARE)] * mauve + [panel for panel in known if panel[1]] +
            [(key, [key], FREE) for key in keys if key not in titled])


def series(run, key):
    """Steps and values of a metric, with nan for null; where most steps lack it, only the steps that have it."""
    points = [(row["step"], row[key] if finite(row.get(key)) else math.nan) for row in run.metrics]
    known = [point for point in points if finite(point[1])]
    return tuple(zip(*(points if len(known) > len(points) / 2 else known))) or ((), ())


def smooth(values, width):
    """Means over `width` values around each; nan is left out of them and stays nan."""
    near = [values[max(i - width // 2, 0):i + (width + 1) // 2] for i in range(len(values))]
    return [x if math.isnan(x) else statistics.fmean(y for y in ys if not math.isnan(y)) for x, ys in zip(values, near)]


def legend(axes, labels, styles):
    """The kinds of line in ink, because colours mean runs."""
    lines = [axes.plot([], [], color=axes.title.get_color(), **style)[0] for style in styles]
    axes.legend(lines, labels, fontsize=8, framealpha=0.7, handlelength=2.6)


def plot_metrics(axes, runs, colours, keys):
    """Metrics over the steps."""
    styles = [style for _, style in zip(keys, itertools.cycle(STYLES))]
    for (run, colour), (key, style) in itertools.product(zip(runs, colours), zip(keys, styles)):
        steps, values = series(run, key)
        width = len(values) // 50 if len(values) >= SMOOTH else 1
        if width > 1:
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(steps, smooth(values, width), color=colour, linestyle=style, marker="." * (len(values) == 1))
    if len(keys) > 1:
        legend(axes, keys, [{"linestyle": style} for style in styles])


def plot_mauve(axes, runs, colours):
    """MAUVE over the run and its result, with 95 % intervals, between floor and ceiling."""
    labels = {}
    for i, (run, colour) in enumerate(zip(runs, colours)):
        scores = {name: run.result[name] for name in SCORES if finite(run.result.get(name))}
        if curve := run.mauve.get("curve"):
            steps, means = zip(*((point["step"], point["mauve"]) for point in curve))
            low, high = zip(*(point["interval"] or [point["mauve"]] * 2 for point in curve))
            axes.plot(steps, means, ".-", color=colour)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        for name in [name for name in ("floor", "ceiling") if name in scores]:
            axes.axhline(scores[name], color=colour, linewidth=1.3, **SCORES[name])
        if "mauve" in scores:
            x = run.metrics[-1]["step"] * (1 + 0.15 * i / len(runs))  # several results stand side by side
            axes.vlines(x, *(run.result.get("mauve_interval") or [scores["mauve"]] * 2), color=colour)
            axes.plot([x], [scores["mauve"]], color=colour, **SCORES["mauve"])
        labels |= {name: name.replace("mauve", "result") + f" {x:.2f}" * (len(runs) == 1) for name, x in scores.items()}
    legend(axes, labels.values(), [SCORES[name] for name in labels])
    axes.set_xlim(left=-0.05 * axes.get_xlim()[1])


def plot_runs(runs, file, panels=None, theme="light"):
    """Draw panels (None: all) of runs into an open file, or to a path (no suffix: .png), and return the file."""
    if not hasattr(file, "write"):
        file = pathlib.Path(file if pathlib.Path(file).suffix else f"{pathlib.Path(file)}.png")
    suffix = getattr(file, "suffix", ".png").lower()
    if suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {file}: must end in .png, .svg or .pdf, not in {suffix}")
    if empty := [run.folder for run in runs if not run.metrics]:
        raise UserError(f"{empty[0]} has no step in its metrics.jsonl yet; draw it after its first step; if it was "
                        f"stopped before that, continue with: {resume_command(empty[0])}")
    try:
        import matplotlib.figure
    except ImportError:
        raise UserError("a picture needs the package matplotlib; pip install matplotlib") from None

    colours = COLOURS if theme == "light" else COLOURS[::-1]
    if len(runs) > len(COLOURS):  # shades, dark to light in the order given
        colours = matplotlib.colormaps["viridis"]([0.9 * i / (len(runs) - 1) for i in range(len(runs))])
    names = [run.name if len({r.name for r in runs}) == len(runs) else escaped(str(run.folder)) for run in runs]
    names = [name + run.unfinished() for name, run in zip(names, runs)]
    named, panels = panels is None or len(runs) > 1, panels or panels_of(runs)  # report.html names its run
    rows, columns = math.ceil(len(panels) / 4), min(len(panels), 4)
    paper, ink, lines = THEMES[theme]
    with matplotlib.rc_context({
            "figure.facecolor": paper, "axes.facecolor": paper, "axes.edgecolor": lines, "grid.color": lines,
            "xtick.color": lines, "ytick.color": lines, "xtick.labelcolor": ink, "ytick.labelcolor": ink,
            "text.color": ink, "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.grid": True,
            "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "grid.linewidth": 0.6,
            "lines.linewidth": 1.7, "legend.edgecolor": "none", "legend.fontsize": 11, "figure.labelsize": 9,
            "text.parse_math": False}):  # a folder may be called a$b$c
        figure = matplotlib.figure.Figure((3.4 * columns, 2.7 * rows + 0.6 * named), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # inches around each panel
        for i, (title, keys, limits) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, i)
            plot_metrics(axes, runs, colours, keys) if keys else plot_mauve(axes, runs, colours)
            top = 1.05 * axes.get_ylim()[1] if limits == POSITIVE else limits[1]  # a constant stays off the edge
            axes.set(title=title, ylim=(limits[0], top))
            axes.xaxis.get_major_locator().set_params(integer=True)
        if named:
            bars = [axes.plot([], [], color=colour, linewidth=4)[0] for _, colour in zip(runs, colours)]
            figure.legend(bars, names, loc="outside upper left", ncols=35 * columns // (8 + max(map(len, names))) or 1)
        smoothed = any(len(run.metrics) >= SMOOTH for run in runs)
        figure.supxlabel("step" + "; strong: means over a 50th of a run, faint: every step" * smoothed)
        try:
            figure.savefig(file, dpi=110 if len(panels) > 1 else 170, format=suffix[1:])
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error}); make room, or give plot.py another --out") from None
    return file


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="run", help="folder of a run, out/NAME; several share the panels")
    parser.add_argument("--out", help="picture: .png, .svg or .pdf (unset: training.png in the first run's folder)")
    args = parser.parse_args()
    print(plot_runs([Run(folder) for folder in args.runs], args.out or pathlib.Path(args.runs[0], "training.png")))
