"""Picture and page of a made-up run: they show what is there, and hostile text stays text."""
import json
import math
import re

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from conftest import run_script
from flags import Run
from plot import STYLES, THEMES, panels_of, plot_mauve, plot_metrics, plot_runs, series, smooth
from tools.report import page, samples_by_step

HOSTILE = ("</script><script>document.title='hacked'</script> <!-- \" ' & <b>bold</b> \u2028 \u202e \x1b[31m "
           "see http://example.org\n\ttab")
LOGGED = "reward baseline kl d_acc_real d_acc_generated seconds".split()


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def made_up(folder, num_steps=5, batch_size=10, **metrics):
    """A finished run with the base model's text for its last 15 prefixes; kl is null in step 2."""
    folder.mkdir()
    args = dict(model="demo", data="demo", prompt="{text}" + HOSTILE, batch_size=batch_size, num_steps=num_steps)
    (folder / "args.json").write_text(json.dumps({"args": args, "device": "cpu"}))
    rows = [{"step": step, **dict.fromkeys(LOGGED, 0.5 + step / 10), **metrics} for step in range(num_steps)]
    write(folder / "metrics.jsonl", [row | {"kl": None} if row["step"] == 2 else row for row in rows])
    samples = [{"step": step, "prefix": f"prefix {step} {i} {HOSTILE}", "sep": " ", "think": "thought",
                "truth": f"truth {HOSTILE} {'long' * 99}", "completion": f"step {step} text {i} {HOSTILE}",
                "reward": i * 7 % 10, "p_real": None if i == 3 else i / 10, "length_score": 1.0}
               for step in range(num_steps) for i in range(batch_size)]
    write(folder / "rollouts.jsonl", samples)
    write(folder / "floor.jsonl", [{**row, "completion": "base " + row["completion"]} for row in samples[-15:]])
    (folder / "result.json").write_text(json.dumps(
        {"mauve": 0.8, "mauve_interval": [0.7, 0.9], "floor": 0.2, "ceiling": 0.95, "ceiling_sd": math.nan}))
    (folder / "mauve.json").write_text(json.dumps({"curve": [
        {"step": step, "mauve": step / 5, "interval": [step / 5 - 0.1, step / 5 + 0.1]} for step in (2, 4)]}))
    return Run(folder)


@pytest.fixture
def run(tmp_path):
    return made_up(tmp_path / "run")


def lines_of(axes):
    return [line for line in axes.get_lines() if len(line.get_xdata())]


def test_known_panels_come_first_and_then_every_other_number(tmp_path):
    run = made_up(tmp_path / "run", mine=3, note="text", entropy=None, endless=math.inf)
    assert [title for title, _, _ in panels_of([run])] == [
        "MAUVE", "reward", "discriminator's accuracy", "kl to the base, nats per token", "seconds per step", "mine"]


def test_a_fine_tuning_run_is_drawn_and_a_rare_metric_is_joined(run):
    write(run.folder / "metrics.jsonl", [{"step": step, "loss": 2.0, "held": 1.9 if step % 5 == 4 else None}
                                         for step in range(20)])
    for file in ("result.json", "mauve.json", "rollouts.jsonl", "floor.jsonl"):
        (run.folder / file).unlink()
    run = Run(run.folder)
    assert panels_of([run]) == [("loss, nats per token", ["loss", "held"], (None, None))]
    assert list(series(run, "held")) == [(4, 9, 14, 19), (1.9,) * 4] and '"steps": []' in page(run)


def test_a_null_is_a_gap_also_when_smoothed_and_no_metric_of_a_panel_is_dropped(run):
    axes = Figure().subplots()
    plot_metrics(axes, [run], ["red"], ["kl", *LOGGED[:4]])
    assert len(lines_of(axes)) == 5 > len(STYLES)
    assert [math.isnan(y) for y in lines_of(axes)[0].get_ydata()] == [False, False, True, False, False]
    assert smooth([1.0, 2.0, 6.0, 1.0], 3) == [1.5, 3, 3, 3.5]
    assert str(smooth([1.0, math.nan, 3.0], 3)) == "[1.0, nan, 3.0]"


def test_mauve_is_a_curve_with_interval_floor_ceiling_and_result(run):
    axes = Figure().subplots()
    plot_mauve(axes, [run], ["red"])
    curve, floor, ceiling, result = lines_of(axes)
    assert list(curve.get_xdata()) == [2, 4] and list(curve.get_ydata()) == [0.4, 0.8] and result.get_xdata()[0] == 4
    assert [line.get_ydata()[0] for line in (floor, ceiling, result)] == [0.2, 0.95, 0.8]
    band, bar = axes.collections
    assert band.get_paths()[0].get_extents().bounds == pytest.approx((2, 0.3, 2, 0.6))
    assert bar.get_segments()[0].tolist() == [[4, 0.7], [4, 0.9]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["result 0.80", "floor 0.20", "ceiling 0.95"]


def test_runs_are_drawn_over_each_other_in_a_grid_that_grows(tmp_path):
    first, second = made_up(tmp_path / "_a$b$c"), made_up(tmp_path / "more", 1, **dict.fromkeys("abcd", 1))
    for name, runs in {"one": [first], "both": [first, second], "many": [first] * 8}.items():  # 8: more than colours
        plot_runs(runs, tmp_path / f"{name}.png")
    one, both, many = (imread(tmp_path / f"{name}.png") for name in ("one", "both", "many"))
    assert both.shape[0] - one.shape[0] == 297  # 9 panels for 5: a row more of 2.7 inches at 110 dpi
    assert one.shape == many.shape and (one != many).any()


def test_the_page_is_one_file_in_which_hostile_text_stays_text(run):
    before, text, after = re.split(r'(?<=id="data">)(.*)(?=</script>\n<script>)', page(run))
    assert not re.search(r"https?://|//\w+\.|@import|url\(", before + after)
    assert "<" not in text and not set("\u2028\u202e\x1b") & set(text) and r"\\x1b[31m" in text
    data = json.loads(text)
    assert [score["value"] for score in data["scores"]] == [0.2, 0.8, 0.95] and data["scores"][2]["sd"] is None  # nan
    assert data["settings"]["batch_size"] == "10" and data["origin"] == {"device": "cpu"}
    assert data["summary"] == "demo on demo · 5 of 5 steps · 0 min · cpu" and data["num_samples"] == 50
    assert [picture["title"] for picture in data["pictures"]] == [title for title, _, _ in panels_of([run])]
    assert all(picture[theme].startswith("data:image/png;base64,") for picture in data["pictures"] for theme in THEMES)


def test_base_and_trained_text_of_one_prefix_stand_together(run):
    steps = samples_by_step(run, 8, 4)
    assert [group["step"] for group in steps] == [0, 1, 2, 4] and steps[2]["size"] == 10  # spread, with both ends
    assert [sum(sample["base"] is not None for sample in group["samples"]) for group in steps] == [0, 0, 0, 8]
    assert all(sample["base"]["completion"] == f"base {sample['completion']}" for sample in steps[-1]["samples"])
    assert steps[2]["means"] == {"reward": 0.7, "d_acc_real": 0.7, "d_acc_generated": 0.7}  # kl is null


def test_a_result_of_a_run_that_was_not_finished_says_so(run, monkeypatch):
    result = json.loads((run.folder / "result.json").read_text())
    for num_steps, said in (5, ""), (3, " after 3 of 5 steps"):
        (run.folder / "result.json").write_text(json.dumps(result | {"num_steps": num_steps}))
        named = []
        monkeypatch.setattr(Figure, "legend", lambda self, bars, names, **more: named.extend(names))
        plot_runs([Run(run.folder)], run.folder / "x.png")
        assert named == ["run" + said] and f"result: the last sequences{said}" in page(Run(run.folder))


@pytest.mark.parametrize("words, status, printed", [
    ("plot.py RUN", 0, "training.png"), ("plot.py RUN --out RUN/a", 0, "RUN/a.png"), ("plot.py RUN NO", 2, "NO is not"),
    ("plot.py NEW", 2, "first step; if it was stopped before that, continue with: python train.py --resume"),
    ("plot.py RUN --out RUN/no/a.png", 2, "--out"),
    ("plot.py RUN --out a.foo", 2, "foo"), ("tools/report.py RUN", 0, "RUN/report.html"),
    ("tools/report.py NO", 2, "NO is not"), ("tools/report.py RUN --out RUN/no/page.html", 2, "--out"),
    ("tools/report.py RUN --samples_per_step 0", 2, "at least 1")])
def test_a_command_prints_one_line(words, status, printed, run, tmp_path):
    (made_up(tmp_path / "NEW").folder / "metrics.jsonl").write_text("")
    ended = run_script(*words.replace("RUN", str(run.folder)).replace("NEW", f"{tmp_path}/NEW").split())
    assert ended.status == status and (ended.out + ended.err).count("\n") == 1
    assert printed in (ended.err if status else ended.out).replace(str(run.folder), "RUN")
