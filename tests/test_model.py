"""Statistics of marked tokens against plain torch, adapters and the traps of peft, and the players' optimiser."""
import argparse

import bitsandbytes as bnb
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical, kl_divergence

import model as module
from model import (Player, Wide, adapter_parameters, add_adapters, causal_lm, checkpoint_layers, head_logits,
                   hidden_states, load_adapter, load_model, token_stats, without_adapters)

V = 4090  # the tiny model's output layer has ten rows more
IDS = torch.randint(6, V, (3, 16), generator=torch.Generator().manual_seed(0))  # (B, T)
IDS[:, :6] = IDS[:1, :6]


def case(tiny):
    """The tiny model with a bias on its output layer; ids, marked tokens, forbidden ids, and which of them apply."""
    g, blocked = torch.Generator().manual_seed(0), torch.zeros(2, V, dtype=torch.bool)  # (K, V)
    causal_lm(tiny[0]).lm_head.bias = torch.nn.Parameter(torch.randn(4100, generator=g), requires_grad=False)
    blocked[0, [1, 5]] = blocked[1, [2]] = True
    kind, mask = torch.randint(0, 2, IDS.shape, generator=g), torch.rand(IDS.shape, generator=g) < 0.6  # (B, T) each
    mask[:, 0] = False
    return tiny[0], IDS, mask, blocked, kind


def plain(model, ids, mask, blocked, kind, temperature):
    """The four statistics (N,) by torch.distributions in double precision, and the states that they are of."""
    states = hidden_states(model, ids).detach().requires_grad_()  # (B, T, H)
    with torch.no_grad(), without_adapters(model):
        base = hidden_states(model, ids)  # (B, T, H)
    rows = (head_logits(model, x[:, :-1][mask[:, 1:]], V).double() / temperature for x in (states, base))  # (N, V) each
    p, q = (Categorical(logits=logits.masked_fill(blocked[kind[mask]], -1e30)) for logits in rows)
    return (p.log_prob(ids[mask]), p.entropy(), kl_divergence(p, q), q.log_prob(ids[mask])), states


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_bytes, chunk_rows", [(16 * 4 * V, 512), (1 << 26, 512), (1 << 26, 7)])
def test_token_stats_and_their_gradients_equal_plain_torch(tiny, monkeypatch, chunk_bytes, chunk_rows, temperature):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    model, *given = case(tiny)
    stats, hidden = token_stats(model, *given, temperature, with_kl=True, return_hidden=True)
    wanted, states = plain(model, *given, temperature)
    torch.testing.assert_close([x.double() for x in stats], list(wanted), rtol=1e-4, atol=2e-5)
    upstream = torch.randn(len(stats.logp), generator=torch.Generator().manual_seed(3))  # (N,)
    for i in (0, 2):  # logp and kl
        ours, = torch.autograd.grad(stats[i] @ upstream, hidden, retain_graph=True)  # (B, T, H)
        theirs, = torch.autograd.grad(wanted[i].float() @ upstream, states, retain_graph=True)  # (B, T, H)
        size = theirs.norm(dim=-1)  # (B, T) compared row by row, so that a small one must be right, too
        assert ((ours - theirs).norm(dim=-1) <= 1e-4 * size).all()
        assert torch.equal(size[:, :-1] > 0, given[1][:, 1:])  # a marked token trains the state before it alone


def test_options_of_token_stats_change_only_what_they_name(tiny):
    model, ids, mask, blocked, kind = case(tiny)
    bare, with_kl = (token_stats(model, ids, mask, blocked, kind, with_kl=on) for on in (False, True))
    assert torch.equal(bare.logp, with_kl.logp) and torch.equal(bare.entropy, with_kl.entropy)
    assert not bare.kl.any() and not bare.ref_logp.any() and (with_kl.kl > 0).all()
    one, other = (torch.autograd.grad(x.logp.sum(), adapter_parameters(model, "generator")) for x in (bare, with_kl))
    assert all(map(torch.equal, one, other))  # the base's pass costs the active adapter nothing
    assert torch.equal(token_stats(model, ids, mask, blocked, kind, 0.0).logp, bare.logp)  # greedy has no temperature
    theirs = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # (B, T - 1)
    torch.testing.assert_close(token_stats(model, ids, mask).logp, theirs[mask[:, 1:]], rtol=1e-4, atol=2e-5)
    stats = token_stats(model, torch.where(kind == 0, 5, 2), mask, blocked, kind, with_kl=True)  # forbidden ids
    assert not stats.logp.exp().any() and stats.kl.isfinite().all()


@pytest.mark.parametrize("length", [7, 12, 14, 16])  # the token's probability is 0.57, 0.988, 0.997, 0.9995
def test_gradients_of_confident_tokens_survive_bf16(length):
    # e_t - p is nearly nothing there: formed after a cast to bf16 it would be nothing
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()  # (V, H)
    hidden = (weight[3:4] / weight[3].norm() ** 2 * length).requires_grad_()  # (1, H)
    none, target = torch.zeros(1, 512, dtype=torch.bool), torch.tensor([3])  # (1, V), (1,)
    module._TokenStats.apply(hidden, None, weight, None, target, none, target * 0, 1.0)[0].sum().backward()
    logits = torch.nn.functional.linear(hidden.detach(), weight).double()[0]  # (V,) rounded to bf16, as they were seen
    exact = (torch.eye(512, dtype=torch.double)[3] - logits.softmax(-1)) @ weight.double()  # (H,)
    assert (hidden.grad[0].double() - exact).norm() < 0.02 * exact.norm()


def test_fresh_adapters_cover_every_linear_layer_but_the_head_and_their_kl_is_zero(tiny_folder):
    model = load_model(tiny_folder, "none", "fp32", "cpu")[0]
    model = add_adapters(model, ["generator", "discriminator"], 64, 8.0)
    assert {x.scaling["generator"] for x in model.modules() if isinstance(x, LoraLayer)} == {1.0}  # 8 / sqrt(64)
    ours, theirs = (adapter_parameters(model, name) for name in ("generator", "discriminator"))
    assert len(ours) == len(theirs) == 2 * 7 * 2 and not {*map(id, ours)} & {*map(id, theirs)}
    stats = token_stats(model, IDS, torch.arange(16).expand(3, 16) > 3, with_kl=True)
    stats.kl.sum().backward()
    assert stats.kl.abs().max() < 1e-5 and torch.equal(stats.logp, stats.ref_logp) and all(p.grad.abs().max() < 1e-4 for p in ours)


def adapted(folder, quant="none", dtype="fp32"):
    """The tiny model with one adapter, which is always the same."""
    model, g = load_model(folder, quant, dtype, "cpu")[0], torch.Generator().manual_seed(5)
    for p in adapter_parameters(add_adapters(model, ["generator"], 4, 2.0), "generator"):
        torch.nn.init.normal_(p, std=0.1, generator=g)
    return model


def gradient(model, name="generator", shared=0):
    """Last hidden states of IDS, and the gradient of a weighted sum of them for one adapter, flat."""
    hidden = hidden_states(model, IDS, shared)  # (B, T, H)
    (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden, torch.cat([p.grad.flatten() for p in adapter_parameters(model, name)])


def close(ours, theirs, tolerance=1e-5):
    return 0 < theirs.norm() and (ours - theirs).norm() <= tolerance * theirs.norm()


def test_players_gradients_stay_apart_and_micro_batches_add_up(tiny):
    found = []
    for player in [Player(*tiny, name) for name in ("generator", "discriminator")] * 2:
        player.activate()
        found.append(gradient(player.model, player.adapter)[1])
        with torch.no_grad(), without_adapters(player.model):
            hidden_states(player.model, IDS)
    assert close(found[2], 2 * found[0]) and close(found[3], 2 * found[1]) and not close(found[0], found[1], 0.1)


def test_an_adapter_loads_under_another_name_and_only_where_its_tensors_fit(tiny, tmp_path):
    model, file = tiny[0], tmp_path / "generator" / "adapter_model.safetensors"
    model.save_pretrained(tmp_path, selected_adapters=["generator"])
    load_adapter(model, file.parent, "discriminator")
    assert all(map(torch.equal, *(adapter_parameters(model, name) for name in ("generator", "discriminator"))))
    (name, tensor), *rest = load_file(file).items()
    for more in ({}, {name.replace("layers.", "layers.9"): tensor}):
        save_file(dict(rest) | more, file)
        with pytest.raises(ValueError, match="not those of the model"):
            load_adapter(model, file.parent, "discriminator")


@pytest.mark.parametrize("quant, tolerance", [("nf4", 1e-4), ("int8", 0.1)])  # int8 rounds its inputs, too
def test_gradients_flow_through_quantised_layers(quant, tolerance, tiny_folder):
    quantised, dense = adapted(tiny_folder, quant), adapted(tiny_folder)
    for name, layer in quantised.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)  # (out, in)
            dense.get_submodule(name).weight.data.copy_(weight)
    assert close(gradient(quantised)[1], gradient(dense)[1], tolerance)


def test_adapters_keep_inputs_of_16_bits_with_the_same_outputs_and_gradients(tiny_folder):
    found = []
    for wide in (True, False):  # False: peft's own layers, which cast an input to fp32 and keep that
        model, kept = adapted(tiny_folder, dtype="bf16"), {}
        for layer in (x for x in model.modules() if isinstance(x, LoraLayer) and not wide):
            layer.cast_input_dtype_enabled, layer.lora_A["generator"].__class__ = True, torch.nn.Linear
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x.nbytes}) or x, lambda x: x):
            found.append((*gradient(model), sum(kept.values())))
    (ours, grads, size), (theirs, wanted, more) = found
    assert torch.equal(ours, theirs) and close(grads, wanted) and size < 0.8 * more


@pytest.mark.parametrize("how", ["shared", "checkpointed"])
def test_a_beginning_read_once_and_checkpointing_change_no_state_and_no_gradient(how, tiny_folder):
    reads, found = [], []
    for on in (False, True):
        model = adapted(tiny_folder)
        if on and how == "checkpointed":
            checkpoint_layers(model)
        norm = causal_lm(model).base_model.layers[0].input_layernorm
        norm.register_forward_hook(lambda _, x, out: reads.append(out.numel() // 32))
        found.append(gradient(model, shared=6 * (on and how == "shared")))
    assert reads == ([3 * 16, 6, 3 * 10] if how == "shared" else [3 * 16] * 3)
    assert all(map(close, *found))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_players_step_clips_and_skips_a_gradient_that_is_not_finite(dtype, tiny):
    p, player = torch.nn.Parameter(torch.tensor([1.0, 1.0])), Player(*tiny, "generator")
    player.optimize(0.5, argparse.Namespace(optim="adam", grad_clip=0.5, beta1=0.9, beta2=0.9, dtype=dtype), [p])
    assert player.step(1.0) == 0.0  # there was no loss
    player.backward((p * torch.tensor([3.0, 4.0])).sum())
    assert player.step(0.1) == pytest.approx(5.0) and p.grad is None and player.bad_steps == 0
    torch.testing.assert_close(player.optimizer.state[p]["exp_avg"], 0.1 * torch.tensor([0.3, 0.4]))  # clipped to 0.5
    torch.testing.assert_close(p.data, torch.full((2,), 0.95))  # Adam's first step is as long as its learning rate
    for value, bad_steps in ((float("inf"), 1), (float("nan"), 2)):
        player.backward(p.sum() * value)
        assert player.step(1.0) is None and p.grad is None and player.bad_steps == bad_steps
        torch.testing.assert_close(p.data, torch.full((2,), 0.95))
    assert player.scaler.get_scale() == (2.0**12 if dtype == "fp16" else 1.0)
    player.backward(p.sum())
    assert player.step(1.0) == pytest.approx(2 ** 0.5) and player.bad_steps == 0
