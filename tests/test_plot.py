"""Pictures, page, terminal and trackers, from a small made-up run: what is drawn, and that hostile text stays text."""
import html
import json
import math
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT
from flags import escaped
from plot import LEAST, PANELS, THEMES, chosen, draw_panel, figure, follow, read_new, read_run, smooth
from test_scripts import METRICS, run

HOSTILE = "</script><script>document.title='hacked'</script> <!-- \" ' & <b>bold</b> \u2028 \u202e \x1b[31m \ud83d see http://example.org\n\ttab"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed; apt-get install chromium")


def made_up(folder, num_steps=5, batch_size=10, finished=True):
    """A run's files: zero incoherence in step 1, no KL in step 2, text that attacks page and terminal in every sample."""
    folder.mkdir()
    args = {"model": "demo", "data": "demo", "batch_size": batch_size, "num_steps": num_steps, "out_dir": HOSTILE}
    (folder / "args.json").write_text(json.dumps({"args": args, "device": "cpu"}))
    rows = [{**dict.fromkeys(METRICS, 0.5 + step / 10), "step": step, "kl": None if step == 2 else 0.1, "kl_after_d": None,
             "coherence": 1.0 if step == 1 else 0.9} for step in range(num_steps)]
    samples = [{"step": step, "prefix": f"prefix {HOSTILE}", "truth": f"truth {HOSTILE} {'long' * 99}", "think": "thought", "reward": i * 7 % 10,
                "completion": f"step {step} text {i} {HOSTILE}", "p_real": None if i == 3 else i / 10, "length_score": 1.0}
               for step in range(num_steps) for i in range(batch_size)]
    write(folder / "metrics.jsonl", rows)
    write(folder / "rollouts.jsonl", samples)
    write(folder / "floor.jsonl", [{**sample, "reward": None, "p_real": None, "completion": "of the base"} for sample in samples[-15:]])
    if finished:
        result = {"mauve": 0.8, "mauve_sd": 0.01, "mauve_interval": [0.7, 0.9], "floor": 0.2, "ceiling": 0.95, "seconds": 9.0}
        (folder / "result.json").write_text(json.dumps(result))
        (folder / "mauve.json").write_text(json.dumps({"curve": [{"step": 2, "mauve": 0.4}, {"step": 4, "mauve": 0.7}], "scores": {
            "mauve": {"mauve": 0.8, "mauve_sd": 0.01, "interval": [0.7, 0.9], "num_buckets": 50}, "floor": None}}))
    return folder


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def plot(*words, **kwargs):
    return run(*words, script="plot.py", **kwargs)


def curves(folder, title):
    """The values of the curves that a panel draws."""
    _, (axes,) = figure("light", 4, 3)
    draw_panel(axes, [{**read_run(folder), "colour": "red"}], *next(panel for panel in PANELS if panel[0].startswith(title)))
    return [list(line.get_ydata()) for line in axes.get_lines()]


# ---------------------------------------------------------------- pictures
def test_a_picture_is_made_of_one_run_and_of_two(tmp_path):
    first, second = made_up(tmp_path / "_a$b$c"), made_up(tmp_path / "unfinished", 1, finished=False)
    done = plot(first)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert (first / "training.png").read_bytes().startswith(b"\x89PNG")
    done = plot(first, second, "--out", tmp_path / "both.png")
    assert done.returncode == 0 and done.stderr == "" and not (second / "training.png").exists()
    assert (tmp_path / "both.png").read_bytes() != (first / "training.png").read_bytes()
    assert plot(*[first, second] * 4, "--out", tmp_path / "many.png").returncode == 0  # more runs than colours


def test_a_null_is_a_gap_and_a_zero_is_drawn_at_the_least(tmp_path):
    folder = made_up(tmp_path / "run")
    kl, incoherence = curves(folder, "KL")[0], curves(folder, "incoherence")[0]
    assert [math.isnan(y) for y in kl] == [False, False, True, False, False]
    assert incoherence == pytest.approx([0.1, LEAST, 0.1, 0.1, 0.1])
    assert curves(folder, "MAUVE")[0] == [0.4, 0.7]  # the curve, where it was measured


def test_smoothing_leaves_gaps_and_short_runs_alone():
    nan = math.nan
    assert smooth([1.0, 2.0, 6.0], 1) == [1, 2, 6]
    assert smooth([1.0, 2.0, 6.0, 1.0], 3) == [1.5, 3, 3, 3.5]
    assert smooth([1.0, nan, 3.0], 3)[::2] == [1, 3] and math.isnan(smooth([1.0, nan, 3.0], 3)[1])


def test_every_metric_of_a_panel_is_logged():
    assert {key for _, keys, _ in PANELS for key in keys} <= set(METRICS)


# ---------------------------------------------------------------- the report
@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = made_up(tmp_path_factory.mktemp("report") / "run")
    done = plot("--report", folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder / "report.html"


def test_the_page_holds_its_data_and_no_address(page):
    text, template = page.read_text(), (ROOT / "report.html").read_text()
    before, data, after = re.split(r'<script type="application/json" id="data">|(?<=})</script>', text)
    assert before + after == template.replace('<script type="application/json" id="data">{{data}}</script>', "")
    assert not re.search(r"https?://|//\w+\.|@import|url\(", before + after)
    data = json.loads(data)
    assert [group["step"] for group in data["texts"]["steps"]] == [None, 0, 1, 2, 3, 4]
    assert all(len(group["samples"]) == 8 for group in data["texts"]["steps"][1:]) and data["texts"]["num_samples"] == 50
    assert len(data["pictures"]) == len(PANELS) and data["scores"][0]["mauve"] == 0.2 and data["settings"]["batch_size"] == "10"
    assert all(picture[theme].startswith("data:image/png;base64,") for picture in data["pictures"] for theme in THEMES)


def test_hostile_text_stays_text_in_the_page(page):
    text = page.read_text()
    assert text.count("<script") == text.count("</script") == (ROOT / "report.html").read_text().count("<script")
    assert not set("\u2028\u202e\x1b") & set(text) and "<!--" not in text.split("<script", 1)[1]


def test_the_page_spreads_its_steps_evenly_and_keeps_both_ends(tmp_path):
    folder = made_up(tmp_path / "run", 9, 2)
    told = chosen(folder, 1, 4)
    assert [group["step"] for group in told["steps"]] == [None, 0, 2, 5, 8] and told["num_steps"] == 9
    assert [group["of"] for group in told["steps"]] == [2] * 5 and all(len(group["samples"]) == 1 for group in told["steps"])


def browser(address, profile):
    """The page at an address as Chromium builds it."""
    words = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync --disable-background-networking "
             "--disable-component-update --hide-scrollbars --virtual-time-budget=3000 --dump-dom").split()
    return subprocess.run([CHROMIUM, *words, f"--user-data-dir={profile}", address], capture_output=True, text=True, timeout=60).stdout


def samples_of(dom):
    return [html.unescape(re.sub(r"<[^>]*>", "", part)) for part in re.findall(r"<article.*?</article>", dom, re.S)]


@needs_chromium
def test_the_page_draws_slides_and_sorts_in_a_browser(page, tmp_path):
    dom = browser(f"file://{page}#step=3&sort=reward", tmp_path)
    samples = samples_of(dom)
    assert "<title>forger: run</title>" in dom and len(samples) == 8
    order = [int(re.search(r"step 3 text (\d)", text)[1]) for text in samples]
    assert order == sorted(range(8), key=lambda i: -(i * 7 % 10))
    assert all(text.count("</script><script>document.title='hacked'</script>") == 3 and r"\x1b[31m" in text for text in samples)
    assert "8 of the 10 sequences of step 3" in dom and "holds 40 of the run's 50 sequences" in dom
    samples = samples_of(browser(f"file://{page}#all=1&sort=p_real&order=up", tmp_path))
    assert len(samples) == 40 and all(re.search(r"step \d text 0", text) for text in samples[:5])  # smallest first
    dom = browser(f"file://{page}#step=base", tmp_path)
    assert all("of the base" in text for text in samples_of(dom)) and "the base model before training" in dom


@needs_chromium
def test_the_page_fits_a_phone(page, tmp_path):
    told = """<script>const all = document.documentElement, wide = x => x.scrollWidth > x.clientWidth;
        const cut = [...document.querySelectorAll("pre, dl, picture, p, header")].filter(wide).length;
        parent.postMessage(`${all.scrollWidth} of ${all.clientWidth}, ${cut} cut`, "*")</script></body>"""
    (tmp_path / "page.html").write_text(page.read_text().replace("</body>", told))
    (tmp_path / "phone.html").write_text("<body><script>onmessage = told => document.body.dataset.wide = told.data</script>"
                                         "<iframe src='page.html' style='width: 390px; height: 844px; border: 0'></iframe></body>")
    assert 'data-wide="390 of 390, 0 cut"' in browser(f"file://{tmp_path}/phone.html", tmp_path / "profile")


# ---------------------------------------------------------------- the terminal
def on_terminal(*words, env):
    """What plot.py writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "plot.py", *map(str, words)], stdout=theirs, stderr=subprocess.DEVNULL,
                               env={**os.environ, **env})
    os.close(theirs)
    told = b""
    try:
        while part := os.read(ours, 4096):
            told += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert process.wait(20) == 0
    return told.decode()


def test_watch_shows_the_newest_samples_in_colour_only_on_a_terminal(tmp_path):
    folder = made_up(tmp_path / "run")
    told = plot("--watch", folder, "--samples_per_step", 2)
    assert told.returncode == 0 and "\x1b" not in told.stdout and "\u202e" not in told.stdout
    assert re.findall(r"step (\d) text (\d)", told.stdout) == [("4", "0"), ("4", "1")]
    assert r"\x1b[31m \ud83d see http://example.org" + "\n\ttab" in told.stdout  # told by number; lines stay lines
    coloured, plain = (on_terminal("--watch", folder, env={"NO_COLOR": value}) for value in ("", "1"))
    assert "\x1b[2mprefix" in coloured and "\x1b[36m<think>thought" in coloured and "\x1b" not in plain
    assert "\x1b[31m" not in coloured


def test_watch_follows_a_run_past_a_torn_line_and_ends_with_it(tmp_path):
    folder = made_up(tmp_path / "run", 2, 1, finished=False)
    lines = (folder / "rollouts.jsonl").read_bytes().replace(b"thought", "grüße".encode()).splitlines(True)
    cut = lines[1].index("ü".encode()) + 1  # inside a character
    (folder / "rollouts.jsonl").write_bytes(lines[0] + lines[1][:cut])
    told = follow(folder, "rollouts.jsonl", pause=0)
    assert [record["step"] for record in next(told)] == [0] and next(told) == []
    with open(folder / "rollouts.jsonl", "ab") as file:
        file.write(lines[1][cut:])
    assert [(record["step"], record["think"]) for record in next(told)] == [(1, "grüße")]
    (folder / "result.json").write_text("{}")
    assert list(told) == [[]]
    size = (folder / "rollouts.jsonl").stat().st_size
    assert read_new(folder / "rollouts.jsonl", size + 99) == ([], size)  # cut back by --resume


def test_ctrl_c_ends_watch_in_one_line(tmp_path):
    folder = made_up(tmp_path / "run", finished=False)
    process = subprocess.Popen([sys.executable, ROOT / "plot.py", "--watch", folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and told.splitlines()[1:] == ["", "stopped"]


# ---------------------------------------------------------------- trackers
FAKE = """
import json, os, sys
def told(*what): print(json.dumps(what), file=open(os.environ["TOLD"], "a"))
def init(**kwargs): told("init", kwargs["project"], kwargs["name"], kwargs["config"]["num_steps"])
def log(row, step): told("log", row, step)
def finish(): told("finish")
"""


@pytest.mark.parametrize("service", ["wandb", "trackio"])
def test_track_sends_every_step_once_and_the_result(service, tmp_path, monkeypatch):
    folder = made_up(tmp_path / "run")
    (tmp_path / f"{service}.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    done = plot("--track", service, folder)
    assert done.returncode == 0, done.stderr
    first, *logged, last = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert first == ["init", "forger", "run", 5] and last == ["finish"]
    assert [step for _, _, step in logged] == [0, 1, 2, 3, 4, 5] and logged[-1][1]["mauve"] == 0.8
    assert logged[0][1]["reward"] == 0.5 and "kl" not in logged[2][1] and "step" not in logged[0][1]


@pytest.mark.parametrize("package, words", [
    ("wandb", ["--track", "wandb"]), ("trackio", ["--track", "trackio"]), ("tensorboard", ["--track", "tensorboard"]),
    ("matplotlib", []), ("matplotlib", ["--report"])])
def test_a_package_that_is_missing_is_one_line(package, words, tmp_path, monkeypatch):
    folder = made_up(tmp_path / "run")
    (tmp_path / f"{package}.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told = plot(*words, folder)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and f"pip install {package}" in told.stderr


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("words, named", [
    ("", "run"), ("RUN/none", "RUN/none"), ("RUN RUN/none", "RUN/none"), ("--report --watch RUN", "--watch"), ("--report RUN RUN", "--report"),
    ("--track mlflow RUN", "mlflow"), ("--samples_per_step 0 RUN", "--samples_per_step"), ("--most_steps 1 RUN", "--most_steps"),
    ("EMPTY", "EMPTY"), ("NEW", "NEW"), ("--report NEW", "NEW"), ("DAMAGED", "metrics.jsonl"), ("RUN --out RUN/no/such.png", "--out"),
    ("RUN --out RUN", "--out"), ("--reprot RUN", "--report")])
def test_a_mistake_is_one_line(words, named, tmp_path):
    paths = {name: tmp_path / name for name in ("RUN", "EMPTY", "NEW", "DAMAGED")}
    made_up(paths["RUN"]), paths["EMPTY"].mkdir()
    (made_up(paths["NEW"]) / "metrics.jsonl").write_text("")
    (made_up(paths["DAMAGED"]) / "metrics.jsonl").write_text("[1, 2]\n")
    told = plot(*(re.sub(r"^(RUN|EMPTY|NEW|DAMAGED)", lambda name: str(paths[name[0]]), word) for word in words.split()))
    assert told.returncode == 2 and told.stdout == "" and told.stderr.count("\n") == 1, told.stderr
    assert re.sub(r"^(RUN|EMPTY|NEW)", lambda name: escaped(str(paths[name[0]])), named) in told.stderr
