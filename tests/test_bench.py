"""bench.py end to end, and what its numbers stand on. Nothing here asserts a speed: the machine of a test is busy."""
import json
import math
import subprocess
import sys

import pytest
import torch

import rivals
from clock import Clock, Peak, ratio
from conftest import ROOT
from model import adapter_parameters, add_adapters
from rollout import rollout
from test_scripts import run
from workload import SHAPES, Players, Work, build, bytes_a_step, endless, learn, numbers, qwen3, twin

TINY = ("--model tiny-random --batch_size 4 --prompt_tokens 8 --reasoning_tokens 2 --completion_tokens 6 --repeats 2 --rank 4 "
        "--vocab 300 --hidden 16 --positions 40").split()
CPU = torch.device("cpu")


def finite(value):
    """Whether all numbers in it are finite; there must be some."""
    if isinstance(value, dict):
        return bool(value) and all(map(finite, value.values()))
    if isinstance(value, list):
        return bool(value) and all(map(finite, value))
    return math.isfinite(value)


@pytest.fixture(scope="module")
def tiny_base():
    torch.manual_seed(0)
    return build(qwen3(*SHAPES["tiny-random"]), "none", "fp32", CPU)


def test_the_file_holds_what_is_promised_and_both_sides_did_the_same_work(tmp_path):
    told = run(*TINY, "--only", "decode,step,logps", "--json", tmp_path / "bench.json", script="bench.py")
    assert told.returncode == 0, told.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {"date", "hardware", "versions", "commit", "dirty", "command", "args", "skipped"} <= set(report)
    assert report["hardware"]["cores"] >= 1 and report["hardware"]["memory_gib"] > 0 and "trl" in report["versions"]
    decode, step, logps = (report[name] for name in ("decode", "step", "logps"))
    assert all(map(finite, (decode, step, logps)))
    assert decode["drawn"] == {"rollout": 4 * 8, "generate": 4 * 8} and decode["forced"] == 4
    assert set(decode["ms_a_token"]) == {"rollout", "generate", "floor"} and len(decode["seconds"]["rollout"]) == 2
    assert set(step["phases"]) == {"sample", "reference", "generator", "discriminator", "optimiser"}
    assert step["memory_gib"]["total"] > step["memory_gib"]["standing"] > 0
    assert {"ours", "plain"} < set(logps["seconds"]) and set(logps["ratio"]) == set(logps["seconds"]) - {"ours"}
    assert set(logps["ratio"]["plain"]) == {"median", "least", "most"}
    assert max(logps["logp_difference"].values()) < 1e-4 and max(logps["gradient_difference"].values()) < 1e-4
    for word in ("tokens a second", "optimiser, s", "whole step, s", "plain", "generate()"):
        assert word in told.stdout


@pytest.mark.skipif(not rivals.HAS_TRL, reason="TRL is not installed; requirements-bench.txt has it")
def test_trl_does_the_same_work_as_we_do(tmp_path):
    told = run(*TINY, "--only", "trl", "--json", tmp_path / "bench.json", script="bench.py")
    assert told.returncode == 0 and told.stderr == "", told.stderr
    report = json.loads((tmp_path / "bench.json").read_text())
    found = report["trl"]
    assert finite(found) and found["drawn"] == {"ours": 32, "TRL": 32} and report["versions"]["trl"]
    assert len(found["seconds"]["ours"]) == len(found["seconds"]["TRL"]) == 2 and found["memory_gib"]["TRL"] > 0
    assert "GRPOTrainer" in told.stdout


def test_without_trl_one_line_says_what_to_install_and_the_rest_runs(tmp_path):
    words = [*TINY, "--only", "trl,logps", "--json", str(tmp_path / "bench.json")]
    code = (f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nsys.modules['trl'] = None\n"
            f"sys.argv = ['bench.py', *{words!r}]\nrunpy.run_path({str(ROOT / 'bench.py')!r}, run_name='__main__')")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr
    (line,) = [line for line in told.stdout.splitlines() if "TRL" in line]
    assert "pip install -r requirements-bench.txt" in line
    report = json.loads((tmp_path / "bench.json").read_text())
    assert "trl" not in report and "trl" in report["skipped"] and "plain" in report["logps"]["ratio"]


def test_scaling_leaves_a_row_a_point_and_a_picture(tmp_path):
    words = "--scaling --most_tokens 16 --batch_size 4 --completion_tokens 2 --vocab 320".split()
    told = run(*TINY, *words, "--out", tmp_path / "scaling.png", "--json", tmp_path / "bench.json", script="bench.py")
    assert told.returncode == 0, told.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["scaling"]
    values = {axis: [row["value"] for row in rows if row["axis"] == axis] for axis in ("completion tokens", "batch", "vocabulary")}
    assert values == {"completion tokens": [1, 2, 4, 8, 16], "batch": [1, 2, 4], "vocabulary": [10, 20, 40, 80, 160, 320]}
    assert all(finite([row["sample"], row["update"], row["update_gib"]]) and row["update_gib"] > 0 for row in rows)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_all_ways_to_log_probs_agree_with_their_gradients():
    found = rivals.compare_logps(30, 500, 24, torch.float32, 1, CPU)
    assert {"ours", "plain"} <= set(found["logp_difference"]) and ("TRL chunked" in found["seconds"]) == rivals.HAS_TRL
    for name, difference in found["logp_difference"].items():
        assert difference < 1e-4 and found["gradient_difference"][name] < 1e-4, name


def test_log_probs_in_chunks_stay_below_the_plain_ones_in_memory():
    found = rivals.compare_logps(2000, 30000, 8, torch.float32, 1, CPU)
    assert found["memory_gib"]["plain"] == pytest.approx(3 * 2000 * 30000 * 4 / 2**30, rel=0.1)  # logits, log-probs, gradient
    assert found["memory_ratio"]["plain"] < 0.6


@pytest.mark.parametrize("adapters", [("shared", "shared"), ("generator", "discriminator")])
def test_a_step_trains_both_players_and_counts_every_phase(adapters, tiny_base):
    players = Players(tiny_base, *adapters, 4, 2.0, Work(5, 8, 2, 6, micro_batch=2), CPU)
    weights = [p for name in adapters for key, p in players.model.named_parameters() if f"lora_B.{name}" in key]
    weights.append(players.head.linear.weight)
    clock = Clock(CPU)
    for _ in range(2):  # the head starts at zero, so that the discriminator's adapter learns from the second step on
        roll = players.sample()
        learn(players, roll, clock)
    assert roll.sampled.sum() == 5 * 8 and [len(reply) for reply in roll.reply] == [6] * 5
    assert all(p.any() for p in weights)  # all of them started at zero
    assert set(clock.spent) - {"kl for the log"} == {"discriminator", "reference", "generator", "optimiser"}
    assert ("kl for the log" in clock.spent) == (adapters[0] == adapters[1])


def test_our_greedy_tokens_are_those_of_generate(tiny_base):
    model, rule = add_adapters(twin(tiny_base), ["generator"], 4, 2.0), endless(400, CPU)
    for p in adapter_parameters(model, "generator"):
        torch.nn.init.normal_(p, std=0.3)
    prompts = torch.randint(2, 400, (3, 8)).tolist()
    roll = rollout(model, prompts, rule, 0, 6, temperature=0)
    ids = torch.tensor([prompt + rule.close.tolist() for prompt in prompts])
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, eos_token_id=400, pad_token_id=0)
    assert new[:, 9:].tolist() == roll.reply


@pytest.mark.parametrize("quant, kind", [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_a_model_is_built_quantised_layer_by_layer(quant, kind):
    from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    model = build(qwen3(*SHAPES["tiny-random"]), quant, "fp32", CPU)
    assert len(model.model.layers) == 2 == model.config.num_hidden_layers == len(model.config.layer_types)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    assert all(type(layer.mlp.up_proj).__name__ == kind for layer in model.model.layers)
    assert not any(p.requires_grad for p in model.parameters())
    players = Players(model, "generator", "generator", 4, 2.0, Work(2, 8, 0, 4), CPU)
    assert sum(isinstance(part, (Linear4bit, Linear8bitLt)) for part in players.model.modules()) == 2 * 7
    learn(players, players.sample(), lambda phase: None)


def test_the_random_qwen3_8b_has_the_published_size():
    from transformers import AutoModelForCausalLM
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(qwen3(*SHAPES["qwen3-8b-random"]))
    assert sum(p.numel() for p in model.parameters()) == 8_190_735_360


def test_a_twin_shares_the_weights_and_nothing_else(tiny_base):
    one, other = twin(tiny_base), twin(tiny_base)
    assert all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True)) and one is not other
    add_adapters(one, ["generator"], 4, 2.0)
    assert not any("lora" in name for name, _ in other.named_parameters())


def test_the_floor_counts_weights_once_and_the_cache_at_its_mean_length(tiny_base):
    attention, mlp, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 2 * 32 + 2 * 16
    weights = 4 * (400 * 32 + 2 * (attention + mlp + norms) + 32)  # tied: the table is read as the output layer
    cache = 2 * 2 * 16 * 4 * 3 * (8 + 5)  # two of each layer's 16 floats a token, 3 sequences of 8 to 18 tokens
    assert bytes_a_step(tiny_base, Work(3, 8, 4, 6)) == weights + cache


def test_a_tokenizer_of_numbers_gives_back_the_ids():
    tokenizer = numbers(50)
    assert tokenizer("17 4 49 0").input_ids == [17, 4, 49, 0] and tokenizer.eos_token_id == 50
    assert tokenizer.batch_decode([[17, 4]]) == ["17 4"]


def test_a_peak_is_what_stood_at_once_above_what_stood_before():
    before = torch.zeros(1 << 18)
    with Peak(CPU) as peak:
        one = torch.zeros(1 << 18) + before
        del one
        two = torch.zeros(1 << 19)
    assert peak.gib * 2**30 == pytest.approx(2 * (1 << 20), rel=0.01) and two.numel()


def test_a_ratio_is_taken_turn_by_turn():
    assert ratio([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == {"median": 1.0, "least": 0.5, "most": 3.0}


@pytest.mark.parametrize("flags, wanted", [
    (["--onyl", "step"], "did you mean --only?"),
    (["--only", "step,all"], "--only"),
    (["--repeats", "0"], "--repeats"),
    (["--batch_size", "3"], "--batch_size"),
    (["--completion_tokens", "-4"], "--completion_tokens"),
    (["--dtype", "fp8"], "--dtype"),
    (["--alpha", "nan"], "--alpha"),
    (["--json", "no/such/folder/bench.json"], "--json"),
    (["--scaling", "--out", "."], "--out"),
    (["--model", "no/such-model"], "--model"),
    (["--prompt_tokens", "900", "--completion_tokens", "200"], "--prompt_tokens"),
])
def test_a_wrong_flag_of_bench_ends_in_one_line(flags, wanted):
    told = run(*flags, script="bench.py")
    assert told.returncode == 2 and told.stderr.count("\n") == 1 and wanted in told.stderr and told.stdout == ""


def test_a_wrong_flag_of_bench_is_told_before_anything_heavy_is_imported():
    code = ("import runpy, sys\nsys.argv = ['bench.py', '--repeats', '0']\ntry:\n    runpy.run_path('bench.py', run_name='__main__')\n"
            "except SystemExit as end:\n    print(end.code, {'torch', 'transformers', 'numpy'} & set(sys.modules))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert told.stdout == "2 set()\n"
