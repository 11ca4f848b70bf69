"""Whole tiny runs in fp16, whose gradients are scaled, and in int8."""
import pytest

import torch

from conftest import lines, run_script, same_run
from model import adapter_parameters, add_adapters, head_logits, hidden_states, load_model, without_adapters
from sampler import Sampler
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


@pytest.mark.parametrize("dtype, merged", [("bf16", 0.95), ("fp16", 0.9995)])
def test_a_young_adapter_beside_its_layer_samples_in_16_bits_as_it_learns(dtype, merged):
    torch.manual_seed(0)
    model = add_adapters(load_model("demo", "none", dtype, "cpu")[0], ["generator"], 64, 8.0)
    ids = torch.randint(10, 4000, (8, 40), generator=torch.Generator().manual_seed(0))  # (B, T)

    def logps(model):
        return head_logits(model, hidden_states(model, ids)).float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])

    adam = torch.optim.Adam(adapter_parameters(model, "generator"), lr=3e-5, betas=(0.95, 0.95))
    for _ in range(10):  # the write-up's rates
        (-logps(model).mean()).backward()
        adam.step()
        adam.zero_grad()
    found = []
    with torch.no_grad():
        with without_adapters(model):
            base = logps(model)
        for merge in (False, True):
            sampler = Sampler(model, merge)
            sampler.sync("generator")
            change = torch.stack([logps(x) - base for x in (model, sampler.model)]).flatten(1)  # (2, N)
            found.append(torch.corrcoef(change)[0, 1].item())
    assert found[0] > 0.9999 and found[1] < merged  # merged, the rounding of the weights loses part of it
