"""The benchmark's parts on a tiny model. Nothing here asserts a speed: the machine of a test is busy."""
import runpy
import sys

import pytest
import torch

from tools import bench

CPU = torch.device("cpu")
TINY = ("--model tiny-random --batch_size 4 --micro_batch 3 --prompt_tokens 8 --reasoning_tokens 2 --completion_tokens 6 --repeats 2 --rank 4").split()


def tiny(*words):
    return bench.check(bench.flags([*TINY, *words]).parse_args())


def test_a_run_without_trl_says_what_to_install_and_writes_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setattr(sys, "argv", ["bench", *TINY, "--only", "decode", "trl", "--json", f"{tmp_path}/bench.json"])
    runpy.run_path(bench.__file__, run_name="__main__")
    report = bench.json.loads((tmp_path / "bench.json").read_text())
    assert "pip install trl" in capsys.readouterr().out and "trl" not in report and report["decode"]["ratio"]["rollout"] == [1, 1, 1]


@pytest.mark.parametrize("names, quant, layer", [("shared", "none", "Linear"), ("generator discriminator", "nf4", "Linear4bit"), ("shared", "int8", "Linear8bitLt")])
def test_a_step_trains_both_players_and_times_each_phase(names, quant, layer):
    game, clock = bench.Game(tiny("--quant", quant), CPU, names.split()), bench.Clock(CPU)
    assert game.tokenizer(game.tokenizer.decode(range(400))).input_ids == list(range(400))  # 10, 100 and 101 among them
    assert type(game.model.get_base_model().model.layers[1].mlp.up_proj.base_layer).__name__ == layer
    game.step(clock), game.step(clock)  # the head starts at zero, so the discriminator's adapter learns from the second step on
    assert all(p.any() for player in (game.generator, game.discriminator) for p in player.params)  # lora_B and head start at zero
    assert set(clock.spent) == {"sample", "judge", "reference", "generator", "discriminator"}


def test_all_ways_to_log_probs_agree_and_ours_needs_less_memory():
    head, hidden, ids = torch.nn.Linear(8, 9000, bias=False), torch.randn(2000, 8, requires_grad=True), torch.randint(9000, (1, 2001))
    weights, found, peaks = torch.randn(2000), {}, {}
    for name, way in bench.log_probs(head, ids).items():
        peaks[name] = bench.peak(lambda: found.update({name: way(hidden)}), CPU)
        found[name] = found[name], torch.autograd.grad((found[name] * weights).sum(), hidden)[0]
        torch.testing.assert_close(found[name], found["ours"], rtol=1e-4, atol=1e-5)
    assert peaks["plain torch"] * 2**30 == pytest.approx(2 * 2000 * 9000 * 4, rel=0.1) and peaks["ours"] < 0.7 * peaks["plain torch"]


@pytest.mark.parametrize("words, wanted", [("--repeats 0", "--repeats"), ("--batch_size 3", "must be even"), ("--json no/x.json", "--json")])
def test_a_wrong_flag_ends_in_one_line(words, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        tiny(*words.split())
    assert wanted in capsys.readouterr().err
