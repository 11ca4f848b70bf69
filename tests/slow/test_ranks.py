"""Several processes under torchrun write what one process writes, stop together, and continue at another number."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, TINY, lines

pytestmark = pytest.mark.slow
WORDS = [*TINY, "--batch_size", "6", "--save_every", "1"]


def start(number, *words):
    command = [sys.executable]
    if number > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    return subprocess.Popen([*command, str(ROOT / "train.py"), *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def run(number, *words):
    process = start(number, *words)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def texts(folder):
    return [[row[key] for key in ("step", "prefix", "think", "completion")] for name in ("floor", "rollouts")
            for row in lines(folder / f"{name}.jsonl")]


def assert_same(one, other):
    assert texts(one) == texts(other) and len(texts(one)) == 6 + 18
    for a, b in zip(*(sorted((folder / "ckpt").rglob("*.safetensors")) for folder in (one, other)), strict=True):
        a, b = load_file(a), load_file(b)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for a, b in zip(*(lines(folder / "metrics.jsonl") for folder in (one, other)), strict=True):
        for key in ("reward", "baseline", "g_loss", "d_loss", "kl", "p_real", "g_grad_norm", "d_grad_norm", "d_acc_real"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("flags", ["", "--adapters shared", "--disc reason --d_model demo-small"])
@pytest.mark.parametrize("number", [2, 3])
def test_several_processes_write_what_one_writes(number, flags, tmp_path):
    """Bit for bit, where a process's part is one micro-batch of the one process."""
    words = [*WORDS, *flags.split(), "--micro_batch", 6 // number]
    for n in (1, number):
        status, out, err = run(n, *words, "--out_dir", tmp_path / str(n))
        assert status == 0 and out.count("step 2/3") == 1, err
    assert_same(tmp_path / "1", tmp_path / str(number))


def workers(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [int(number) for number in found]


def wait_for(file, num_lines):
    for _ in range(600):
        if file.exists() and file.read_text().count("\n") >= num_lines:
            return
        time.sleep(0.1)
    raise AssertionError(f"{file} has not come so far")


@pytest.mark.parametrize("number, sent", [(signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGKILL, 0)])
def test_a_signal_to_one_process_ends_all_and_another_number_continues(number, sent, tmp_path):
    words = [*WORDS, "--micro_batch", "2"]
    assert run(1, *words, "--out_dir", tmp_path / "whole")[0] == 0
    process = start(3, *words, "--out_dir", tmp_path / "run")
    wait_for(tmp_path / "run" / "metrics.jsonl", 1)
    os.kill(workers(process)[sent], number)
    err = process.communicate(timeout=120)[1]
    assert process.returncode and f"exitcode  : {143 if number == signal.SIGTERM else -9}" in err, err
    assert torch.load(tmp_path / "run" / "ckpt" / "state.pt", weights_only=True)["step"] >= 0
    assert run(1, "--resume", tmp_path / "run")[0] == 0
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_mistake_is_one_line(tmp_path):
    status, out, err = run(2, *TINY, "--batch_size", 1, "--num_steps", 4)
    assert status and err.count("error:") == 1 and "--batch_size 1: 2 processes" in err
