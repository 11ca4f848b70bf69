"""Whole tiny runs in fp16, whose gradients are scaled, and in int8."""
import pytest

from conftest import lines, run_script, same_run
from test_train import stopped_at, vanish

pytestmark = pytest.mark.slow


def test_an_fp16_run_trains_and_resumes_to_the_same_end(train, tmp_path, monkeypatch):
    whole, flags = tmp_path / "whole", "--dtype float16 --adapters shared --floor_sequences 0 --save_every 1".split()
    assert train(*flags, "--out_dir", whole).status == 0
    assert all(row["skipped"] == 0 and row["g_grad_norm"] > 0 for row in lines(whole / "metrics.jsonl"))
    stopped_at(3, monkeypatch, vanish)
    assert train(*flags).status == 137
    monkeypatch.undo()
    assert run_script("train.py", "--resume", tmp_path / "run").status == 0
    same_run(whole, tmp_path / "run")


def test_an_int8_run_trains(train, tmp_path):
    assert train("--quant", "8bit", "--floor_sequences", 0).status == 0
    assert all(row["g_grad_norm"] > 0 and row["logp_gap"] < 0.1 for row in lines(tmp_path / "run" / "metrics.jsonl"))
