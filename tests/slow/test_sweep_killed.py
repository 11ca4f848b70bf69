"""A sweep of real runs that is stopped and continued."""
import csv
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT, TINY
from flags import Run

pytestmark = pytest.mark.slow


def test_a_stopped_sweep_resumes_its_run_and_ends_like_any_other(tmp_path):
    command = [sys.executable, "-u", ROOT / "sweep.py", "--out_dir", tmp_path, "--factors", "g_lr=1e-3:2e-3:4e-3",
               "kl_coef=0.05:0.1:0.2", *TINY, "--num_steps", "8", "--seeds", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, end = tmp_path / "01" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command continues" in out
    assert not Run(tmp_path / "01").result and not (tmp_path / "02").exists()
    first = (tmp_path / "00" / "result.json").stat().st_mtime_ns

    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 5 and {row["status"] for row in rows} == {"done"}
    assert len(Run(tmp_path / "01").info["resumed"]) == 1 and len(Run(tmp_path / "01").metrics) == 8
    assert (tmp_path / "00" / "result.json").stat().st_mtime_ns == first and (tmp_path / "sweep.png").exists()
