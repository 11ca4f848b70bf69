"""A sweep of real runs that is stopped and continued, also through a launcher."""
import csv
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, TINY
from flags import Run

pytestmark = pytest.mark.slow


# what srun does with signals: it kills its task at once on SIGTERM, and passes SIGUSR1 on
LIKE_SRUN = """
import signal, subprocess, sys
task = subprocess.Popen(sys.argv[1:])
signal.signal(signal.SIGTERM, lambda number, frame: task.kill())
signal.signal(signal.SIGUSR1, lambda number, frame: task.send_signal(number))
sys.exit(task.wait() % 256)
"""


def launcher(kind, folder):
    """Flags of sweep.py, and which run is to be under way when it is stopped."""
    if kind == "none":
        return [], "01"
    if kind == "stand-in":
        (folder / "like_srun.py").write_text(LIKE_SRUN)
        words = shlex.join([sys.executable, str(folder / "like_srun.py")])
    elif not shutil.which("srun") or subprocess.run(["srun", "-n1", "true"], capture_output=True, timeout=60).returncode:
        pytest.skip("no Slurm runs here")
    else:
        words = "srun -n1"
    return ["--jobs", "2", "--launcher", words], "02"


@pytest.mark.parametrize("kind", ["none", "stand-in", "slurm"])
def test_a_stopped_sweep_resumes_its_run_and_ends_like_any_other(kind, tmp_path):
    words, under_way = launcher(kind, tmp_path)
    command = [sys.executable, "-u", ROOT / "sweep.py", "--out_dir", tmp_path, "--factors", "g_lr=1e-3:2e-3:4e-3",
               "kl_coef=0.05:0.1:0.2", *TINY, "--num_steps", "8", "--seeds", "1", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, end = tmp_path / under_way / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in out
    assert not Run(tmp_path / under_way).result and not (tmp_path / "04").exists()
    first = (tmp_path / "00" / "result.json").stat().st_mtime_ns

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 5 and {row["status"] for row in rows} == {"done"}
    assert len(Run(tmp_path / under_way).info["resumed"]) == 1 and len(Run(tmp_path / under_way).metrics) == 8
    assert (tmp_path / "00" / "result.json").stat().st_mtime_ns == first and (tmp_path / "sweep.png").exists()
