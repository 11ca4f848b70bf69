"""Runs that are killed, lack memory or disk, or meet a nan: what is lost, what is said, and that resuming equals not stopping."""
import json
import os
import pathlib
import random
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from test_scripts import TINY, lines, run, same_run

SMALL = [*TINY, "--num_steps", "6", "--save_every", "2", "--floor_sequences", "0"]


def faulty(fault, out, *words):
    return run(fault, *SMALL, *words, "--out_dir", out, script="tests/faulty.py")


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory):
    """The same run with some flags more, never stopped."""
    made = {}

    def whole(flags):
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("runs") / "whole"
            assert run(*SMALL, *flags.split(), "--out_dir", made[flags]).returncode == 0
        return made[flags]
    return whole


@pytest.fixture(scope="module")
def whole(whole_of):
    return whole_of("")


def goes_on_to_the_same_end(out, whole):
    again = run("--resume", out)
    assert again.returncode == 0, again.stderr
    same_run(whole, out)


# checkpoints are written before the warm-up and after steps 1, 3 and 5
@pytest.mark.parametrize("fault, flags", [
    ("kill_before:2", ""), ("kill_between:2", ""), ("kill_between:3", ""), ("kill_before:3", "--disc reason"),
    ("kill_before:2", "--d_model demo-small"), ("kill_between:3", "--disc reason --d_model demo-small"),
])
def test_a_run_killed_while_it_saves_goes_on_to_the_same_end(fault, flags, whole_of, tmp_path):
    out = tmp_path / "run"
    assert faulty(fault, out, *flags.split()).returncode == -9
    goes_on_to_the_same_end(out, whole_of(flags))


@pytest.mark.parametrize("flags", [[], ["--quant", "nf4"]])
@pytest.mark.parametrize("after", ["step 1/", "step 2/"])  # a checkpoint, and a step behind it
def test_a_run_killed_at_a_random_moment_goes_on_to_the_same_end(flags, after, whole, tmp_path):
    out = tmp_path / "run"
    if flags:
        if after == "step 2/":
            pytest.skip("tests/soak.py --quant nf4 has the rest")
        whole = tmp_path / "whole"
        assert run(*SMALL, *flags, "--out_dir", whole).returncode == 0
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *SMALL, *flags, "--out_dir", out], stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith(after):
            break
    try:
        process.wait(random.uniform(0, 0.5))
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.wait() == -9
    goes_on_to_the_same_end(out, whole)


def test_a_nan_is_skipped_and_counted(tmp_path):
    out = tmp_path / "run"
    told = faulty("nan:3-3", out)
    assert told.returncode == 0, told.stderr
    metrics = lines(out / "metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 0, 0, 1, 0, 0] and metrics[3]["g_grad_norm"] is None and metrics[3]["g_loss"] is None
    assert all(row["g_grad_norm"] > 0 for row in metrics if not row["skipped"]) and not (out / "bad_step.jsonl").exists()


def test_too_many_nans_in_a_row_end_the_run_with_the_sequences_saved(tmp_path):
    out = tmp_path / "run"
    told = faulty("nan:2-11", out, "--num_steps", "20", "--save_every", "5", "--max_bad_steps", "10")
    assert told.returncode == 1 and told.stderr.count("\n") == 1 and "--max_bad_steps" in told.stderr and "bad_step.jsonl" in told.stderr
    bad = lines(out / "bad_step.jsonl")
    assert len(bad) == 4 and all(row["step"] == 11 and row["prefix"] and row["truth"] for row in bad)
    assert [row["skipped"] for row in lines(out / "metrics.jsonl")] == [0, 0] + [1] * 9
    assert run("--resume", out).returncode == 0  # the fault is gone, so it goes on from step 10


@pytest.mark.parametrize("place, number, flags", [
    ("sampling", 5, ""), ("generator", 4, ""), ("discriminator", 5, ""), ("verdicts", 5, "--disc reason"),
])  # each in step 3
def test_out_of_memory_ends_in_one_line_and_loses_nothing_saved(place, number, flags, whole_of, tmp_path):
    out = tmp_path / "run"
    told = faulty(f"oom:{place}:{number}", out, *flags.split())
    assert told.returncode == 1 and told.stderr.count("\n") == 1 and "Traceback" not in told.stderr
    for word in ("out of memory", "--micro_batch", "--quant", "--completion_tokens", "GiB", f"--resume {out}"):
        assert word in told.stderr
    state = torch.load(out / "ckpt" / "state.pt", weights_only=True)["state"]
    assert state["step"] == (2 if place in ("discriminator", "verdicts") else 3)  # the generator has moved by then: only the last checkpoint is whole
    goes_on_to_the_same_end(out, whole_of(flags))


@pytest.mark.parametrize("fault", ["disk:4", "full:3"])
def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_loads(fault, whole, tmp_path):
    out = tmp_path / "run"
    told = faulty(fault, out)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and f"--out_dir {out}" in told.stderr and "--resume" in told.stderr
    assert not (out / "ckpt.new").exists()
    goes_on_to_the_same_end(out, whole)


def test_files_that_may_not_grow_at_all_end_in_one_line(tmp_path):
    code = f"ulimit -f 100; exec {sys.executable} {ROOT}/train.py {' '.join(SMALL)} --out_dir {tmp_path}/run"
    told = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=200)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and f"--out_dir {tmp_path}/run" in told.stderr


def test_micro_batches_of_one_give_the_gradients_of_the_whole_batch(tmp_path):
    found = []
    for size in (0, 1):
        file = tmp_path / f"{size}.pt"
        assert faulty(f"gradients:{file}", tmp_path / f"run{size}", "--d_warmup", "0", "--micro_batch", size).returncode == 0
        found.append(torch.load(file, weights_only=True))
    for a, b in zip(*found):
        assert a.norm() > 0 and (a - b).norm() / a.norm() < 1e-5


def test_two_processes_on_one_folder_are_refused(whole, tmp_path):
    import fcntl
    held = os.open(whole, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    before = (whole / "metrics.jsonl").read_bytes()
    told = run("--resume", whole)
    os.close(held)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and "in use" in told.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", ["state cut short", "adapter cut short", "other rank", "format", "rollouts lost", "head missing"])
def test_a_damaged_checkpoint_is_one_line_and_nothing_is_overwritten(damage, whole, tmp_path):
    import shutil
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    state = out / "ckpt" / "state.pt"
    if damage == "state cut short":
        state.write_bytes(state.read_bytes()[:5000])
    elif damage == "adapter cut short":
        file = out / "ckpt" / "generator" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "other rank":
        args = json.loads((out / "args.json").read_text())
        args["args"]["rank"] = 2
        (out / "args.json").write_text(json.dumps(args))
    elif damage == "format":
        torch.save(torch.load(state, weights_only=True) | {"format": 99}, state)
    elif damage == "rollouts lost":
        (out / "rollouts.jsonl").write_text("")
    else:
        (out / "ckpt" / "head.safetensors").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    told = run("--resume", out)
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and f"--resume {out}" in told.stderr, told.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_resume_takes_what_does_not_make_it_another_run_and_notes_it(whole, tmp_path):
    out = tmp_path / "run"
    assert faulty("kill_before:3", out).returncode == -9
    told = run("--resume", out, "--keep", 2, "--save_every", 1)
    assert told.returncode == 0, told.stderr
    same_run(whole, out)
    assert {path.name for path in pathlib.Path(out).glob("ckpt*")} == {"ckpt", "ckpt-4", "ckpt-5"}
    noted = json.loads((out / "args.json").read_text())
    assert len(noted["resumed"]) == 1 and "--keep" in noted["resumed"][0]["command"] and noted["args"]["keep"] == 0
