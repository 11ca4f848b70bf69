"""The sampler in other precisions, and on CUDA, where a decode step is a graph."""
import pytest
import torch

from model import adapter_parameters, add_adapters, load_model
from rollout import rules
from sampler import AdapterBeside
from test_sampler import gap, prompts_of, sampler_of

pytestmark = pytest.mark.slow
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PRECISIONS = [("none", "fp32", 1e-4), ("none", "bf16", 0.1), ("none", "fp16", 0.02),
              ("nf4", "fp32", 1e-4), ("nf4", "bf16", 0.1), ("int8", "fp32", 0.1)]


def loaded(folder, quant, dtype, device):  # with two adapters whose weights are not zero
    model, tokenizer = load_model(folder, quant, dtype, device)
    model, g = add_adapters(model, ["generator", "discriminator"], 4, 3.0), torch.Generator(device).manual_seed(1)
    for p in adapter_parameters(model, "generator") + adapter_parameters(model, "discriminator"):
        torch.nn.init.normal_(p, std=0.1, generator=g)
    return model, tokenizer


@pytest.mark.parametrize("quant, dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_sampler_and_learner_agree_in_every_precision(static, quant, dtype, tolerance, tiny_folder):
    model, tokenizer = loaded(tiny_folder, quant, dtype, "cpu")
    sampler = sampler_of(model, static)
    assert all(isinstance(part, AdapterBeside) == (quant != "none") for part, _ in sampler.pairs)
    args = model, sampler, prompts_of(tokenizer), rules(tokenizer, model)
    assert gap(*args)[0] < tolerance
    sampler.sync(None)
    assert gap(*args)[0] > 10 * tolerance  # without the adapter they differ far more


@GPU
@pytest.mark.parametrize("quant, dtype, tolerance", PRECISIONS[:5])
def test_a_graph_samples_what_the_growing_cache_samples(quant, dtype, tolerance, tiny_folder):
    model, tokenizer = loaded(tiny_folder, quant, dtype, "cuda")
    growing, graph = (sampler_of(model, static) for static in (False, None))
    assert graph.static and graph.captures and not growing.captures
    prompts, rule = prompts_of(tokenizer), rules(tokenizer, model)
    for adapter in ("generator", "discriminator", "generator"):  # by the same graphs: new weights at old addresses
        model.set_adapter(adapter)
        for sampler in (growing, graph):
            sampler.sync(adapter)
        for some, temperature in ((prompts, 0.0), (prompts, 1.0), (prompts[:1], 1.0)):
            (distance, roll), (_, replayed), (_, plain) = (
                gap(model, sampler, some, rule, temperature, 100) for sampler in (graph, graph, growing))
            assert distance < tolerance and torch.equal(replayed.ids, roll.ids)
            assert dtype != "fp32" or torch.equal(plain.ids, roll.ids)
    assert len(graph.caches) == 3 and all(step.graph for _, _, step in graph.caches.values())


@GPU
def test_a_model_that_cannot_be_captured_samples_without_a_graph(tiny_folder):
    model, tokenizer = loaded(tiny_folder, "int8", "bf16", "cuda")  # LLM.int8() searches for outliers, and so waits
    sampler = sampler_of(model, None)
    assert sampler.static and not sampler.captures
    assert gap(model, sampler, prompts_of(tokenizer), rules(tokenizer, model))[0] < 0.5
