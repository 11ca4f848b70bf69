"""The design and its arithmetic against textbook numbers; sweeps of a small stand-in for train.py, killed and crashed."""
import csv
import fcntl
import json
import math
import signal
import subprocess
import sys
import time

import pytest

import design
import sweep
from conftest import ROOT

WRITEUP = """g_lr,d_lr,d_scale,mauve
2e-5,1e-4,10.0,0.119
2e-5,5e-6,0.1,0.073
5e-6,1e-4,0.1,0.072
5e-6,5e-6,10.0,0.075
1e-5,2e-5,1.0,0.09
"""
FACTORS = "g_lr=5e-6:1e-5:2e-5 d_lr=5e-6:2e-5:1e-4 d_scale=0.1:1:10".split()

# stands in for train.py: MAUVE rises with d_scale; leaves a mark a start, and does what the file `fault` beside it says
FAKE = """
import json, math, os, pathlib, sys, time
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
device = given.pop("--device", None)
out = pathlib.Path(given.get("--resume") or given["--out_dir"])
here = pathlib.Path(__file__).parent
with open(here / "starts", "a") as file:
    file.write(json.dumps({"id": out.name, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), **given}) + "\\n")
fault = (here / "fault").read_text() if (here / "fault").exists() else ""
if "--resume" not in given:
    out.mkdir()  # as train.py does, which takes no folder that holds anything
    kinds = {"--seed": int}
    args = {key[2:]: kinds.get(key, float)(value) for key, value in given.items() if key != "--out_dir"}
    (out / "args.json").write_text(json.dumps({"args": args}))
args = json.loads((out / "args.json").read_text())["args"]
if fault == "crash " + out.name:
    raise ValueError("a bad day")
if fault == "hang " + out.name:
    time.sleep(60)
if fault == "slow " + out.name:
    time.sleep(1.5)
mauve = 0.1 + 0.02 * math.log10(args["d_scale"]) + 0.001 * args["seed"] - (0.5 if args["d_scale"] > 1e4 else 0)
(out / "result.json").write_text(json.dumps({"mauve": mauve, "mauve_sd": 0.01, "floor": 0.05}))
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The stand-in's folder; sweep.py starts it in place of train.py."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "TRAIN", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sweep, "draw", lambda *words: None)  # the picture has a test of its own
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def started(folder):
    return [json.loads(line) for line in (folder / "starts").read_text().splitlines()]


def rows(out):
    return {row["id"]: row for row in csv.DictReader((out / "sweep.csv").open())}


def background(folder, *words):
    """sweep.py in a process of its own, with the stand-in."""
    code = f"import sys, sweep; sweep.TRAIN = [sys.executable, {str(folder / 'fake.py')!r}]; sweep.main(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-u", "-c", code, *map(str, words)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def until(condition):
    end = time.time() + 15
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


# -----------------------------------------------------------------------------
# the mathematics

def test_the_write_ups_table_leads_to_its_run_05(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "table.csv").write_text(WRITEUP)
    words = [sys.executable, ROOT / "sweep.py", "--results", tmp_path / "table.csv", "--out_dir", tmp_path / "out"]
    told = subprocess.run(words, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    cells = [[cell.strip() for cell in line.split("|")] for line in told.stdout.splitlines()]
    halves = {row[1].split()[1]: row[2] for row in cells if len(row) > 3 and row[1][1:2] == " "}
    assert halves == {"g_lr": "0.01125", "d_lr": "0.01075", "d_scale": "0.01225"}
    assert "next point g_lr=3e-05 d_lr=0.0002 d_scale=30\n" in told.stdout
    assert "curvature -0.00525" in told.stdout
    report = (tmp_path / "out" / "sweep.md").read_text()
    assert "resolution III" in report and "A = BC, B = AC, C = AB" in report and "next point" in report
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    table = rows(tmp_path / "out")
    assert list(table["00"]) == "id seed g_lr d_lr d_scale mauve mauve_sd floor status".split() and len(table) == 5
    again = [*words[:-1], tmp_path / "again", "--factors", *FACTORS]  # the same where the levels are said
    assert subprocess.run(again, capture_output=True, text=True).stdout == told.stdout


@pytest.mark.parametrize("step", [1.42, 1.5, 1.57])
def test_the_write_ups_step_may_have_had_any_length_near_ours(step):
    factors = sweep.read_factors(FACTORS, sweep.train_flags())
    assert sweep.ascend(factors, [0.01125, 0.01075, 0.01225], step) == [3e-5, 2e-4, 30]
    exact = design.steepest(factors, [0.01125, 0.01075, 0.01225])
    assert exact == pytest.approx([2.60e-5, 1.66e-4, 31.6], rel=3e-3)


# Box, Hunter & Hunter's reactor: A feed rate, B catalyst, C agitation, D temperature, E concentration; % reacted,
# all 32 runs in standard order
REACTOR = [61, 53, 63, 61, 53, 56, 54, 61, 69, 61, 94, 93, 66, 60, 95, 98,
           56, 63, 70, 65, 59, 55, 67, 65, 44, 45, 78, 77, 49, 42, 81, 82]


def reactor(coded):
    return REACTOR[sum(2 ** j for j, x in enumerate(coded) if x > 0)]


def test_a_half_fraction_of_five_factors_is_the_textbooks_reactor():
    plan = sweep.design(5)
    assert plan.generator == "E = ABCD" and plan.resolution == "V" and len(plan.rows) == 16
    assert plan.rows[:3] == [[-1, -1, -1, -1, 1], [1, -1, -1, -1, -1], [-1, 1, -1, -1, -1]]
    assert plan.aliases == {
        "A": "BCDE", "B": "ACDE", "C": "ABDE", "D": "ABCE", "E": "ABCD", "AB": "CDE", "AC": "BDE", "AD": "BCE",
        "AE": "BCD", "BC": "ADE", "BD": "ACE", "BE": "ACD", "CD": "ABE", "CE": "ABD", "DE": "ABC"}
    y = [reactor(row) for row in plan.rows]
    found = sweep.effects([[*row, row[1] * row[3], row[3] * row[4]] for row in plan.rows], y)
    assert [2 * h for h in found.half] == pytest.approx([-2.0, 20.5, 0.0, 12.25, -6.25, 10.75, -9.5])  # ..., BD, DE
    assert found.mean == 65.25 and found.se is None and found.curvature is None


@pytest.mark.parametrize("k, names", [(2, "full"), (3, "III"), (4, "IV"), (5, "V"), (6, "VI"), (7, "VII")])
def test_every_design_is_balanced_orthogonal_and_its_aliases_are_equal_columns(k, names):
    plan = sweep.design(k)
    assert plan.resolution == names and len(plan.rows) == 2 ** (k - 1 if k > 2 else k)
    columns = list(zip(*plan.rows))
    assert all(sum(x * y for x, y in zip(columns[i], columns[j])) == 0 for i in range(k) for j in range(i))
    assert not any(map(sum, columns)) and len({tuple(row) for row in plan.rows}) == len(plan.rows)

    def column(letters):
        return [math.prod(row["ABCDEFG".index(x)] for x in letters) for row in plan.rows]

    assert all(column(one) == column(other) for one, other in plan.aliases.items())
    assert len(plan.aliases) == (2 ** (k - 1) - 1 if k > 2 else 0)


def test_replicates_give_the_standard_errors_of_least_squares():
    np = pytest.importorskip("numpy")
    coded, y, centre = sweep.design(2).rows, [[1.0, 1.4], [2.0, 2.2], [3.1, 2.5], [5.0, 4.6]], [2.9, 3.3]
    found = sweep.effects(coded, y, centre)
    # a model with a free level for every point, solved by numpy: corners' mean, A, B, AB, and the centre's own level
    x = np.array([[1, *row, row[0] * row[1], 0] for row in coded for _ in range(2)] + [[0, 0, 0, 0, 1]] * 2)  # (10, 5)
    flat = np.array([value for some in y for value in some] + centre)  # (10,)
    beta, (squares,), *_ = np.linalg.lstsq(x, flat)
    cov = squares / 5 * np.linalg.inv(x.T @ x)  # (5, 5)
    assert [found.mean, *found.half] == pytest.approx(beta[:3]) and found.df == 5
    assert found.se == pytest.approx(cov[1, 1] ** 0.5) and found.sd == pytest.approx((squares / 5) ** 0.5)
    assert found.curvature == pytest.approx(beta[0] - beta[4])
    assert found.curvature_se == pytest.approx((cov[0, 0] + cov[4, 4]) ** 0.5)


@pytest.mark.parametrize("value, nearest", [(2.6e-5, 3e-5), (1.66e-4, 2e-4), (31.6, 30), (1, 1), (8, 10), (0.007, 0.005),
                                            (0.0072, 0.01), (4.0, 5), (3.8, 3), (9.99e-7, 1e-6)])
def test_clean_is_the_nearest_rung_by_ratio(value, nearest):
    assert design.clean(value) == nearest


@pytest.mark.parametrize("spec, half, point", [
    ("d_lr=5e-6:2e-5:1e-4", -1, 3e-6),  # downwards by 1.5 x log 4: 2.5e-6, which lies nearer to 3e-6 than to 2e-6
    ("rank=16:32:64", 1, 100),  # whole numbers stay whole: 90.5
    ("rank=2:3:4", -1, 2),
    ("temperature=0.9:1:1.05", 1, 1.1),  # narrower than the ladder: 1.0759
    ("ema_decay=0.8:0.85:0.9:lin", 1, 0.92),  # 0.925 on a grid of 0.01
    ("reasoning_tokens=0:128:256:lin", -1, -60),
])
def test_the_next_value_is_clean_on_its_scale(spec, half, point):
    f = sweep.read_factor(spec, sweep.train_flags())
    (value,) = sweep.ascend([f], [half])
    assert value == point and isinstance(value, f.kind)


# -----------------------------------------------------------------------------
# runs

def test_a_sweep_runs_the_design_the_ascent_and_climbs_until_mauve_falls(fake, capsys):
    out = fake / "out"
    sweep.main(["--factors", *FACTORS, "--out_dir", str(out), "--replicates", "2", "--jobs", "2", "--climb", "9",
                "--", "--num_steps", "8"])
    starts, table = started(fake), rows(out)
    # corners and centre, 05 at 30, 06 at 1000, 07 at 30000, where MAUVE falls
    assert list(table) == [f"{number:02d}{replicate}" for number in range(8) for replicate in ("", "-1")]
    assert [table[name]["d_scale"] for name in ("00", "04", "05", "06", "07")] == ["10", "1", "30", "1000", "30000"]
    assert {row["status"] for row in table.values()} == {"done"} and table["00-1"]["seed"] == "1"
    assert all(row["--num_steps"] == "8" for row in starts) and {row["gpu"] for row in starts} == {"0", "1"}
    report = (out / "sweep.md").read_text()
    assert "| C d_scale | 0.02" in report and "beyond the design" in report and "degrees of freedom" in report
    before = len(starts)
    sweep.main(["--factors", *FACTORS, "--out_dir", str(out), "--replicates", "2", "--climb", "9", "--num_steps", "8"])
    assert len(started(fake)) == before  # nothing is run twice
    assert (out / "sweep.md").read_text() == report


def test_a_crashed_run_is_reported_and_the_others_go_on(fake, capsys):
    out = fake / "out"
    (fake / "fault").write_text("crash 01-1")
    words = ["--factors", *FACTORS, "--out_dir", str(out), "--replicates", "2"]
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    told = capsys.readouterr()
    assert end.value.code == 1 and told.err.count("\n") == 1 and "runs that failed: 01-1;" in told.err
    assert "run 01-1: failed (1): ValueError: a bad day" in told.out
    assert rows(out)["01-1"]["status"] == "failed (1)" and rows(out)["05"]["status"] == "done"
    (fake / "fault").unlink()
    sweep.main(words)
    again = started(fake)[12:]
    assert [row["id"] for row in again] == ["01-1"] and again[0]["--resume"] == str(out / "01-1")


def test_without_a_corner_there_is_no_ascent(fake, capsys):
    (fake / "fault").write_text("crash 02")
    with pytest.raises(SystemExit) as end:
        sweep.main(["--factors", *FACTORS, "--out_dir", str(fake / "out")])
    assert end.value.code == 1 and list(rows(fake / "out")) == ["00", "01", "02", "03", "04"]
    assert "no MAUVE at the corners (-1 +1 -1)" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--", "--device", "cpu"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_sweep_goes_on_where_it_was(number, flags, fake):
    out = fake / "out"
    (fake / "fault").write_text("slow 02" if number == signal.SIGKILL else "hang 02")
    words = ["--factors", *FACTORS, "--out_dir", out, *flags]
    process = background(fake, *words)
    until(lambda: (out / "02" / "args.json").exists())
    process.send_signal(number)
    told = process.communicate(timeout=10)[0]
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), told
    assert not (out / "03").exists()
    if number != signal.SIGKILL:
        assert rows(out)["02"]["status"] == "stopped" and "the same command goes on" in told
        (fake / "fault").unlink()
    process = background(fake, *words)
    told = process.communicate(timeout=20)[0]
    assert process.returncode == 0, told
    starts = [row["id"] for row in started(fake)]
    if number == signal.SIGKILL:  # its run had lived on, and was waited for
        assert "run 02 is still under way" in told and starts == ["00", "01", "02", "03", "04", "05"]
    else:
        assert starts == ["00", "01", "02", "02", "03", "04", "05"] and started(fake)[3]["--resume"] == str(out / "02")
    assert {row["status"] for row in rows(out).values()} == {"done"}


@pytest.mark.parametrize("flags", [[], ["--", "--device", "cpu"]])
def test_a_run_killed_before_it_had_begun_begins_anew(flags, fake):
    (fake / "out" / "02" / "ckpt").mkdir(parents=True)  # all that train.py had left
    sweep.main(["--factors", *FACTORS, "--out_dir", str(fake / "out"), *flags])
    assert {row["status"] for row in rows(fake / "out").values()} == {"done"}
    assert not (fake / "out" / "02" / "ckpt").exists()


def test_a_folder_of_another_sweep_is_refused(fake, capsys):
    out = fake / "out"
    words = ["--out_dir", str(out), "--factors", *FACTORS[:2], "--", "--d_scale", "1"]
    sweep.main(words)
    for changed, named in ((["d_lr=1e-6:2e-5:1e-4" if word == FACTORS[1] else word for word in words], "factors"),
                           ([*words[:-1], "2"], "flags"), (["--seed", "1", *words], "seed")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            sweep.main(changed)
        told = capsys.readouterr().err
        assert end.value.code == 2 and told.count("\n") == 1 and named in told
    with open(out / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        process = background(fake, *words)
        told = process.communicate(timeout=10)[0]
    assert process.returncode == 2 and "in use by another process" in told


# -----------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize("words, named", [
    ("", "--factors"), ("--factors g_lr=1:2:3", "2 to 7"), ("--factors g_lr=1:2:3 g_lr=1:2:3", "2 to 7"),
    ("--factors g_lr=1:2 d_lr=1:2:3", "g_lr=1:2"), ("--factors g_lr d_lr=1:2:3", "low:centre:high"),
    ("--factors g_lr=1:2:3:exp d_lr=1:2:3", "low:centre:high"), ("--factors g_lr=1:x:3 d_lr=1:2:3", "numbers"),
    ("--factors g_lr=3:2:1 d_lr=1:2:3", "rise"), ("--factors g_lr=1:1:3 d_lr=1:2:3", "rise"),
    ("--factors g_lr=nan:1:3 d_lr=1:2:3", "rise"), ("--factors g_lr=1:2:inf d_lr=1:2:3", "rise"),
    ("--factors g_lr=0:1:3 d_lr=1:2:3", ":lin"), ("--factors rank=1.5:2:3 d_lr=1:2:3", "whole"),
    ("--factors g_rl=1:2:3 d_lr=1:2:3", "did you mean g_lr"), ("--factors model=1:2:3 d_lr=1:2:3", "numeric flag"),
    ("--factors seed=1:2:3 d_lr=1:2:3", "numeric flag"), ("--factors adv_norm=0:1:2:lin d_lr=1:2:3", "numeric flag"),
    ("--factors g_lr=1:2:3 d_lr=1:2:3 --num_step 3", "--num_steps"), ("--factors g_lr=1:2:3 d_lr=1:2:3 -- --g_lr 3", "--g_lr"),
    ("--factors g_lr=1:2:3 d_lr=1:2:3 -- --seed 3", "--seed"), ("--factors g_lr=1:2:3 d_lr=1:2:3 -- --resume x", "--resume"),
    ("--factors g_lr=1:2:3 d_lr=1:2:3 --jobs 0", "--jobs"), ("--factors g_lr=1:2:3 d_lr=1:2:3 --replicates 0", "--replicates"),
    ("--factors g_lr=1:2:3 d_lr=1:2:3 --climb -1", "--climb"), ("--factors g_lr=1:2:3 d_lr=1:2:3 --ascent_step 0", "--ascent_step"),
    ("--factors g_lr=1:2:3 d_lr=1:2:3 --climbs 3", "--climb"), ("--results no/such.csv", "no/such.csv"),
    ("--results flags.py", "--results flags.py"), ("--results TABLE --num_steps 3", "--num_steps"),
    ("--results TABLE --factors g_lr=1:2:3 kl_coef=1:2:3", "kl_coef"), ("--results ODD", "give --factors"),
])
def test_a_mistake_is_one_line(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sweep, "sweep", None)  # whatever gets as far as a run fails otherwise
    (tmp_path / "TABLE").write_text(WRITEUP)
    (tmp_path / "ODD").write_text(WRITEUP + "3e-5,2e-4,30.0,0.375\n")
    words = [str(tmp_path / word) if word in ("TABLE", "ODD") else word for word in words.split()]
    with pytest.raises(SystemExit) as end:
        sweep.main(words)
    told = capsys.readouterr()
    assert end.value.code == 2 and told.out == "" and told.err.count("\n") == 1 and named in told.err


def test_without_matplotlib_the_rest_is_written_and_one_line_names_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "table.csv").write_text(WRITEUP)
    with pytest.raises(SystemExit) as end:
        sweep.main(["--results", str(tmp_path / "table.csv")])
    assert end.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "sweep.csv", "sweep.md"}


def test_nothing_heavy_is_imported(tmp_path):
    (tmp_path / "table.csv").write_text(WRITEUP)
    code = "import sys, sweep; print([x for x in ('torch', 'numpy', 'matplotlib') if x in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "[]\n"
