"""Designs, effects and steepest ascent against textbook numbers; sweeps of a small stand-in for train.py."""
import csv
import json
import math
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
from matplotlib.figure import Figure

import sweep

WRITEUP = ("g_lr,d_lr,d_scale,mauve\n2e-5,1e-4,10.0,0.119\n2e-5,5e-6,0.1,0.073\n5e-6,1e-4,0.1,0.072\n"
           "5e-6,5e-6,10.0,0.075\n1e-5,2e-5,1.0,0.09\n")
FACTORS = ["--factors", *"g_lr=5e-6:1e-5:2e-5 d_lr=5e-6:2e-5:1e-4 d_scale=0.1:1:10".split()]

# MAUVE rises with d_scale up to 1e4; the file `starts` gets a line per start; `fault` names a run that crashes or hangs
FAKE = """
import json, math, os, pathlib, sys, time
here, given = pathlib.Path(__file__).parent, dict(word[2:].split("=") for word in sys.argv[1:])
out = pathlib.Path(given.get("resume") or given["out_dir"])
print(json.dumps([out.name, os.environ.get("CUDA_VISIBLE_DEVICES"), *sys.argv[1:]]), file=open(here / "starts", "a"))
if "resume" not in given:
    out.mkdir()
    args = dict(model="m", prompt="{text}", num_steps=8, d_scale=float(given["d_scale"]), seed=int(given["seed"]))
    (out / "args.json").write_text(json.dumps({"args": args, "command": sys.argv}))
args = json.loads((out / "args.json").read_text())["args"]
fault = (here / "fault").read_text() if (here / "fault").exists() else ""
assert fault != "crash " + out.name, "a bad day"
time.sleep(60 * (fault == "hang " + out.name))
mauve = 0.1 + 0.02 * math.log10(args["d_scale"]) + 0.001 * args["seed"] - 0.5 * (args["d_scale"] > 1e4)
(out / "result.json").write_text(json.dumps({"mauve": mauve, "mauve_sd": 0.01, "floor": 0.05, "num_steps": 8}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The folder of a stand-in that sweep.py starts in place of train.py; no pictures."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "TRAIN", [sys.executable, "-S", str(tmp_path / "fake.py")])
    monkeypatch.setattr(Figure, "savefig", lambda *words, **more: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield tmp_path
    [signal.signal(*item) for item in before.items()]


def starts(folder):
    return [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def table(folder):
    return {row["id"]: row for row in csv.DictReader((folder / "sweep.csv").open())}


def fails(words, capsys, status=2):
    """The line that a sweep of these words ends with."""
    with pytest.raises(SystemExit) as end:
        sweep.main([str(word) for word in words])
    err = capsys.readouterr().err
    assert end.value.code == status and err.count("\n") == 1
    return err


def test_the_write_ups_table_leads_to_its_run_05(tmp_path, capsys):
    (tmp_path / "table.csv").write_text(WRITEUP)
    sweep.main([*FACTORS, "--results", str(tmp_path / "table.csv"), "--out_dir", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert re.findall("half-effect (.*)\n", out) == ["0.01125", "0.01075", "0.01225"]
    for part in "A = BC, g_lr", "resolution III", "curvature -0.00525", "point g_lr=3e-05 d_lr=0.0002 d_scale=30\n":
        assert part in (tmp_path / "out" / "sweep.md").read_text() and part in out
    factors, half = sweep.read_factors(FACTORS[1:]), [0.01125, 0.01075, 0.01225]
    assert sweep.next_point(factors, half, 1.42) == sweep.next_point(factors, half, 1.57) == [3e-5, 2e-4, 30]


# Box, Hunter & Hunter's reactor, % reacted: feed rate, catalyst, agitation, temperature, concentration, standard order
REACTOR = [61, 53, 63, 61, 53, 56, 54, 61, 69, 61, 94, 93, 66, 60, 95, 98,
           56, 63, 70, 65, 59, 55, 67, 65, 44, 45, 78, 77, 49, 42, 81, 82]


def test_a_half_fraction_of_five_factors_gives_the_textbooks_reactor():
    plan = sweep.design(5)
    assert len(plan) == 16 and plan[:3] == [[-1, -1, -1, -1, 1], [1, -1, -1, -1, -1], [-1, 1, -1, -1, -1]]
    y = [[REACTOR[sum(2 ** j for j, x in enumerate(row) if x > 0)]] for row in plan]
    found = sweep.effects([[*row, row[1] * row[3], row[3] * row[4]] for row in plan], y, [])
    assert [2 * h for h in found.half] == pytest.approx([-2.0, 20.5, 0.0, 12.25, -6.25, 10.75, -9.5])  # ..., BD, DE
    assert found.corners == 65.25 and math.isnan(found.se) and math.isnan(found.centre)


def test_a_design_is_balanced_and_orthogonal_and_a_half_fraction_has_its_aliases():
    for k in range(2, 8):
        plan = np.array(sweep.design(k))
        assert len(plan) == 2 ** (k - 1 if k > 2 else k) == len(np.unique(plan, axis=0))
        assert (plan.T @ plan == len(plan) * np.eye(k)).all() and not plan.sum(0).any()
        assert k == 2 or (plan.prod(1) == 1).all()  # I = AB...K


def test_replicates_give_the_standard_errors_of_least_squares():
    coded, y, centre = sweep.design(2), [[1.0, 1.4], [2.0, 2.2], [3.1, 2.5], [5.0, 4.6]], [2.9, 3.3]
    found = sweep.effects(coded, y, centre)
    # a model with a free level for every point: the mean of the corners, A, B, AB, and the level of the centre
    x = np.array([[1, *row, row[0] * row[1], 0] for row in coded for _ in range(2)] + [[0, 0, 0, 0, 1]] * 2)  # (10, 5)
    beta, (squares,), *_ = np.linalg.lstsq(x, np.array([value for some in y for value in some] + centre))
    cov = squares / 5 * np.linalg.inv(x.T @ x)  # (5, 5)
    assert [found.corners, *found.half, found.centre] == pytest.approx([*beta[:3], beta[4]]) and found.df == 5
    assert found.se == pytest.approx(cov[1, 1] ** 0.5) and found.sd == pytest.approx((squares / 5) ** 0.5)
    assert found.curvature_se == pytest.approx((cov[0, 0] + cov[4, 4]) ** 0.5)


@pytest.mark.parametrize("spec, half, point", [
    ("d_lr=5e-6:2e-5:1e-4", -1, 3e-6),  # down by 1.5 x log 4: 2.5e-6, which is nearer to 3e-6 than to 2e-6
    ("rank=16:32:64", 1, 100),  # whole numbers stay whole: 90.5
    ("temperature=0.9:1:1.05", 1, 1.1),  # narrower than 1, 2, 3, 5: 1.0759
    ("reasoning_tokens=0:128:256:lin", -1, -64)])
def test_the_next_value_is_clean_on_its_scale(spec, half, point):
    factor, other = sweep.read_factors([spec, "batch_size=1:2:3"])
    value, _ = sweep.next_point([factor, other], [half, 1])
    assert value == point and type(value) is type(factor.low)


def test_a_sweep_runs_the_design_and_climbs_until_mauve_falls(fake, capsys):
    words = [*FACTORS, *"--replicates 2 --jobs 3 --climb 9 --num_steps=8".split(), "--out_dir", str(fake / "out")]
    sweep.main(words)
    rows, first = table(fake / "out"), starts(fake)
    # the centre; 05 at 30, 06 at 1000, 07 at 30000, where MAUVE falls
    assert [float(rows[name]["d_scale"]) for name in ("04", "05", "06", "07")] == [1, 30, 1000, 30000]
    assert len(rows) == 16 and {row["status"] for row in rows.values()} == {"done"} and rows["00-1"]["seed"] == "1"
    assert all("--num_steps=8" in words for words in first) and {gpu for _, gpu, *_ in first} == {"0", "1", "2"}
    assert "C = AB, d_scale=0.1:1:10: half-effect 0.02 +- " in (fake / "out" / "sweep.md").read_text()
    sweep.main(words)
    assert starts(fake) == first and table(fake / "out") == rows  # nothing runs twice
    for changed in ("--seed", "--rank"):
        assert "other flags" in fails([*words, changed, "1"], capsys)


def test_a_failed_run_is_reported_and_the_same_command_resumes_it(fake, capsys):
    (fake / "fault").write_text("crash 02")
    words = [*FACTORS, "--out_dir", str(fake / "out")]
    assert "runs that failed: 02;" in fails(words, capsys, status=1)
    rows = table(fake / "out")
    assert list(rows) == ["00", "01", "02", "03", "04"] and rows["02"]["status"] == "failed (1), 0 of 8 steps"
    assert "No next point" in (fake / "out" / "sweep.md").read_text()
    (fake / "fault").unlink()
    (fake / "out" / "02" / "result.json").write_text('{"mauve": 0.9, "num_steps": 7}')  # evaluate.py of a stopped run
    sweep.main(words)
    assert [run for run, *_ in starts(fake)[5:]] == ["02", "05"] and table(fake / "out")["02"]["mauve"] != "0.9"
    assert starts(fake)[5][2:] == [f"--resume={fake / 'out' / '02'}"]


def test_a_signal_is_passed_on_and_no_other_run_begins(fake, capsys):
    (fake / "fault").write_text("hang 02")
    (fake / "out" / "02" / "ckpt").mkdir(parents=True)  # left by a run that was killed before its first checkpoint

    def interrupt():
        while not (fake / "out" / "02" / "args.json").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit, match="130"):
        sweep.main([*FACTORS, "--out_dir", str(fake / "out")])
    assert "the same command continues" in capsys.readouterr().out
    assert [row["status"] for row in table(fake / "out").values()] == [
        "done", "done", "stopped, 0 of 8 steps", "waiting", "waiting"]


@pytest.mark.parametrize("table, named", [
    *((b"mauve,g_lr,d_lr\n0.1,1,1\n" + row, named) for row, named in (
        (b"nan,1,2\n", "line 3: a number is nan"), (b"0.1,,2\n", "line 3: could not"), (b"0.1,-1,2\n", "line 3"),
        (b"0.1,2\n", "more or fewer"), (b"0.1,1,2,3\n", "more or fewer"), (b'0.1,1,"2\n', "line"),
        (b"=1+1,1,2\n", "line 3"), (b"0.1,1e999,2\n", "line 3"), (b"\xe9,1,1\n", "codec"))),
    (b"", "0 columns mauve"), (b"mauve,g_lr\n1,2\n", "0 columns d_lr"), (b"mauve,g_lr,d_lr,g_lr\n", "2 columns g_lr"),
    (b"mauve,g_lr,d_lr\n,2,3\n", "no row has a mauve"), (b"mauve,g_lr,d_lr\n1.5,2,3\n", "from 0 to 1")])
def test_a_damaged_table_is_one_line(table, named, tmp_path, capsys):
    (tmp_path / "t.csv").write_bytes(table)
    assert named in fails(["--factors", "g_lr=1:2:3", "d_lr=1:2:3", "--results", tmp_path / "t.csv"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


def test_what_else_a_table_of_someone_else_has_goes_nowhere(tmp_path, capsys):
    header, *rows = WRITEUP.splitlines()
    (tmp_path / "t.csv").write_text("\n".join([f"{header},id,status", *(f"{row},=cmd|,@x\x1b[2J" for row in rows)]))
    sweep.main([*FACTORS, "--results", str(tmp_path / "t.csv"), "--out_dir", str(tmp_path / "out")])
    texts = capsys.readouterr().out, (tmp_path / "out" / "sweep.md").read_text()
    assert not any(part in text for part in ("cmd", "@x", "\x1b") for text in texts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sweep.md", "sweep.png"]


def test_a_folder_that_cannot_be_written_costs_no_numbers(tmp_path, capsys):
    (tmp_path / "table.csv").write_text(WRITEUP)
    with pytest.raises(SystemExit, match="2"):
        sweep.main([*FACTORS, "--results", str(tmp_path / "table.csv"), "--out_dir", str(tmp_path / "table.csv" / "x")])
    out, err = capsys.readouterr()
    assert "next point g_lr=3e-05" in out and err.count("\n") == 1 and "--out_dir" in err


@pytest.mark.parametrize("words, named", [
    ("B", "2 to 7"), ("B B", "2 to 7"), ("A g_lr=1:2", "g_lr=1:2:"), ("A g_lr=1:1:3", "rise"),
    ("A g_lr=1:2:inf", "finite"), ("A g_lr=0:1:3", ":lin"), ("A rank=1.5:2:3", "int"), ("A g_lr", "g_lr"),
    ("A g_rl=1:2:3", "mean --g_lr"), ("A model=1:2:3", "numeric flag"), ("A seed=1:2:3", "does not change"), ("A B --g_lr 0", "--g_lr"),
    ("A kl_coef=1:2:3 --g_lr 0", "--g_lr above 0"),
    ("A beta1=0.8:0.9:1", "--beta1 1.0"), ("A d_scale=1:2:3 --adv_norm", "--no-adv_norm"), ("A B --g_lr 3", "--g_lr"),
    ("A B --num_step 3", "--num_steps"), ("A B --resume=x", "--resume"), ("A B --seeds 0", "--seeds"),
    ("A B --ascent_step nan", "--ascent_step"), ("A B --results T --num_steps 3", "--num_steps"),
    ("B rank=1:2:3 --results T", "rank"), ("A B --results no/such.csv", "no/such.csv")])
def test_a_mistake_is_one_line_before_any_run(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "TRAIN", None)
    short = dict(A="d_lr=1:2:3", B="g_lr=1:2:3", T=tmp_path / "table.csv")
    short["T"].write_text(WRITEUP)
    words = [short.get(word, word) for word in words.split()]
    assert named in fails(["--factors", *words, "--out_dir", tmp_path / "out"], capsys)
