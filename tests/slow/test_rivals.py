"""The benchmark against TRL. The comparison itself asserts that TRL reads and writes the same number of tokens."""
import math

import pytest
import torch

from test_bench import CPU, bench, tiny

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not bench.HAS_TRL, reason="TRL is not installed: pip install trl==1.16.0 accelerate==1.15.0")]


@pytest.mark.parametrize("model", ["tiny-random", "demo"])  # the demo's model declares an id that ends a sequence
def test_a_step_of_trl_is_timed_and_needs_memory(model):
    found = bench.trl(tiny("--model", model), CPU)
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert found["memory_gib"]["GRPOTrainer"] > 0 and all(map(math.isfinite, found["ratio"]["GRPOTrainer"]))


def test_trl_is_not_timed_on_longer_prompts(monkeypatch):
    initialize = bench.Game.__init__

    def spoiled(game, *args):
        initialize(game, *args)
        game.tokenizer.add_special_tokens({"pad_token": "0"})  # cuts 10 into 1 and 0
        game.prompts[0] = game.prompts[1] = [10] * 8

    monkeypatch.setattr(bench.Game, "__init__", spoiled)
    with pytest.raises(AssertionError, match="another number of tokens"):
        bench.trl(tiny(), CPU)


def test_trls_chunked_log_probs_are_among_the_ways():
    assert "TRL's chunked" in bench.log_probs(torch.nn.Linear(4, 10, bias=False), torch.zeros(1, 3, dtype=torch.long))
