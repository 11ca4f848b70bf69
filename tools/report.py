"""
Make report.html, a page to read a run on: scores, samples step by step, curves, settings.

    python -m tools.report out/demo-1                          # makes out/demo-1/report.html
    python -m tools.report out/demo-1 --samples_per_step 32    # more samples of each step

The page is one file that loads nothing from elsewhere. In the last steps of a finished run, whose prefixes are those of
floor.jsonl, the text that the base model wrote for the same prefix stands beside each sample.
"""
import base64
import collections
import io
import json
import pathlib

from flags import Parser, Run, UserError, readable, write_whole
from plot import THEMES, panels_of, plot_runs

SCORES = {"floor": "floor: the base model", "mauve": "result: the last sequences",
          "ceiling": "ceiling: other real texts", "mauve_last2000": "last 2000: the write-up's protocol",
          "fresh_floor": "floor: held-out prefixes", "fresh": "result: held-out prefixes",
          "fresh_ceiling": "ceiling: held-out texts"}
MEANS = "reward p_real length_score d_acc_real d_acc_generated kl coherence".split()  # shown with the samples of a step
MOST_STEPS = 100  # a longer run shows this many of its steps, spread evenly


def samples_by_step(run, samples_per_step, most_steps=MOST_STEPS):
    """The first samples of each step, for steps spread evenly over the run; `base` is the base model's text or None."""
    base = {(r["prefix"], r["truth"]): {key: readable(r.get(key) or "") for key in ("think", "completion")}
            for r in run.floor}
    means = {row["step"]: {key: row[key] for key in MEANS if row.get(key) is not None} for row in run.metrics}
    steps = collections.defaultdict(list)
    for record in run.rollouts:
        steps[record["step"]].append(record)
    known, count = sorted(steps), min(len(steps), most_steps)
    shown = [known[i * (len(known) - 1) // max(count - 1, 1)] for i in range(count)]
    return [{"step": step, "size": len(steps[step]), "means": means.get(step, {}), "samples": [
        {**{key: readable(r.get(key) or "") for key in ("prefix", "think", "completion", "truth")},
         **{key: r.get(key) for key in ("step", "reward", "p_real", "length_score")},
         "base": base.get((r["prefix"], r["truth"]))} for r in steps[step][:samples_per_step]]} for step in shown]


def picture(run, panel, theme):
    """One panel of training.png as a data: URI."""
    file = io.BytesIO()
    plot_runs([run], file, [panel], theme)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def page(run, samples_per_step=8):
    """The page as text."""
    args, result = vars(run.args), run.result
    seconds = [row["seconds"] for row in run.metrics if row.get("seconds")]
    summary = (f"{args['model']} on {args['data']} · {len(seconds)} of {args['num_steps']} steps · "
               f"{sum(seconds) / 60:.0f} min · {run.info.get('device')}")
    data = {
        "name": run.name,
        "summary": readable(summary),
        "scores": [{"label": label + run.unfinished(), "value": result[name], "sd": result.get(f"{name}_sd"),
                    "interval": result.get(f"{name}_interval")}
                   for name, label in SCORES.items() if result.get(name) is not None],
        "texts": {name: found for name, found in (run.mauve.get("texts") or {}).items() if isinstance(found, dict)},
        "steps": samples_by_step(run, samples_per_step),
        "num_steps": len({r["step"] for r in run.rollouts}),
        "num_samples": len(run.rollouts),
        "pictures": [{"title": panel[0], **{theme: picture(run, panel, theme) for theme in THEMES}}
                     for panel in panels_of([run])],
        "settings": {key: readable(str(value)) for key, value in args.items()},
        "origin": {key: readable(value if isinstance(value, str) else json.dumps(value))
                   for key, value in run.info.items() if key != "args"},
    }
    data = json.loads(json.dumps(data), parse_constant=lambda name: None)  # browsers do not read nan
    text = json.dumps(data).replace("<", r"\u003c")  # ASCII in which no tag can open or close
    return pathlib.Path(__file__).with_name("report.html").read_text(encoding="utf-8").replace("{{data}}", text)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("run", help="folder of a run, out/NAME")
    parser.add_argument("--out", help="page to make (default: report.html in the run's folder)")
    parser.add_argument("--samples_per_step", type=int, default=8, help="samples shown of a step, the first ones")
    args = parser.parse_args()
    if args.samples_per_step < 1:
        raise UserError(f"--samples_per_step {args.samples_per_step}: must be at least 1")
    out = pathlib.Path(args.out or f"{args.run}/report.html")
    text = page(Run(args.run), args.samples_per_step)
    try:
        write_whole(out, text)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error}); name another file with --out") from None
    print(out)
