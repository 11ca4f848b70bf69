"""Runs in processes of their own that are killed, lack memory or disk, or share a folder: nothing saved is lost."""
import os
import random
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, TINY, lines, same_run

pytestmark = pytest.mark.slow
SMALL = [*TINY, "--num_steps", "6", "--save_every", "2", "--floor_sequences", "0"]

# train.py with a fault built in from outside: WHERE names a function, whose NUMBER-th call does DO
FAULTY = """
import errno, os, runpy, signal, sys
sys.path.insert(0, {root!r})
import torch, checkpoint, pathlib, rollout, reward, discriminator
def fault(call):
    {do}
module, name = {where}
real, calls = getattr(module, name), []
def wrapped(*args, **kwargs):
    calls.append(name)
    return fault(lambda: real(*args, **kwargs)) if len(calls) == {number} else real(*args, **kwargs)
setattr(module, name, wrapped)
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path({script!r}, run_name="__main__")
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def command(*words):
    return [sys.executable, str(ROOT / "train.py"), *map(str, words)]


def run(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=300)


def faulty(where, number, do, out, *words):
    code = FAULTY.format(root=str(ROOT), script=str(ROOT / "train.py"), where=where, number=number, do=do)
    return subprocess.run([sys.executable, "-c", code, *SMALL, *words, "--out_dir", str(out)], capture_output=True,
                          text=True, timeout=300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, never stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(*SMALL, "--out_dir", out).returncode == 0
    return out


def resumes_to_the_same_end(out, whole):
    ended = run("--resume", out)
    assert ended.returncode == 0, ended.stderr
    same_run(whole, out)


def started(out, line):
    """A run in a process of its own, once it has printed a line that begins so."""
    process = subprocess.Popen(command(*SMALL, "--out_dir", out), stdout=subprocess.PIPE, text=True)
    for printed in process.stdout:
        if printed.startswith(line):
            return process
    raise AssertionError(f"it ended before it printed {line}")


def test_sigterm_saves_and_the_run_resumes_to_the_same_end(whole, tmp_path):
    process = started(tmp_path / "run", "step 1/")
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 143 and f"--resume {tmp_path / 'run'}" in rest
    resumes_to_the_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("line", [str(), "step 0/", "step 2/"])
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_end(line, whole, tmp_path):
    process = started(tmp_path / "run", line or str(tmp_path))
    try:
        process.wait(random.uniform(0, 0.5))
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.wait() == -9
    resumes_to_the_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("where, number", [("checkpoint, 'save_file'", 3), ("pathlib.Path, 'rename'", 4),
                                           ("pathlib.Path, 'rename'", 5)])  # writing, before and between the renames
def test_a_run_killed_while_it_saves_resumes_to_the_same_end(where, number, whole, tmp_path):
    assert faulty(where, number, KILL, tmp_path / "run").returncode == -9
    resumes_to_the_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("where", ["rollout, 'rollout'", "reward, 'policy_loss'",
                                   "discriminator, 'discriminator_loss'"])
def test_out_of_memory_is_one_line_with_advice_and_the_checkpoint_is_intact(where, whole, tmp_path):
    out = tmp_path / "run"
    ended = faulty(where, 5, "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB')", out)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    for words in ("out of memory", "--micro_batch 1", "--quant nf4", f"--resume {out}"):
        assert words in ended.stderr
    resumes_to_the_same_end(out, whole)


def test_a_full_disk_is_one_line_and_the_last_checkpoint_loads(whole, tmp_path):
    out = tmp_path / "run"
    ended = faulty("checkpoint, 'save_file'", 3, "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", out)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "make room" in ended.stderr, ended.stderr
    assert not (out / "ckpt.new").exists()
    resumes_to_the_same_end(out, whole)


@pytest.mark.parametrize("where, number, do, said", [
    ("checkpoint, 'save_file'", 1, "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", "no checkpoint yet"),
    ("checkpoint, 'write_args'", 1, "raise OSError(errno.EROFS, os.strerror(errno.EROFS))", "no checkpoint yet"),
    ("reward, 'policy_loss'", 1, "__import__('shutil').rmtree(sys.argv[-1]); return call()", "was moved, deleted"),
    ("reward, 'policy_loss'", 1, "os.rename(sys.argv[-1], sys.argv[-1] + '2'); return call()", "was moved, deleted")])
def test_a_run_that_cannot_save_says_what_is_left(where, number, do, said, tmp_path):
    ended = faulty(where, number, do, tmp_path / "run")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and said in ended.stderr, ended.stderr
    assert "intact" not in ended.stderr


def test_two_processes_on_one_folder_are_refused(whole):
    import fcntl
    held = os.open(whole, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    before = (whole / "metrics.jsonl").read_bytes()
    ended = run("--resume", whole)
    os.close(held)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "in use" in ended.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before and len(lines(whole / "metrics.jsonl")) == 6
