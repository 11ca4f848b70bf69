"""Statistics of marked tokens against plain torch, adapters and the traps of peft, and the players' optimiser."""
import argparse

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical, kl_divergence

from flags import UserError
from model import (_TokenStats, MuonAndAdam, Player, adapter_parameters, add_adapters, causal_lm, checked_device,
                   checkpoint_layers, head_logits, hidden_states, load_adapter, load_model, token_stats, without_adapters)

V = 4090  # the tiny model's output layer has ten rows more
g = torch.Generator().manual_seed(0)
IDS, KIND = torch.randint(6, V, (3, 16), generator=g), torch.randint(0, 2, (3, 16), generator=g)  # (B, T) each
MASK, BLOCKED = torch.rand(3, 16, generator=g) < 0.6, torch.zeros(2, V, dtype=torch.bool)  # (B, T), (K, V)
IDS[:, :6], MASK[:, 0] = IDS[:1, :6], False
BLOCKED[0, [1, 5]] = BLOCKED[1, [2]] = True
GIVEN = IDS, MASK, BLOCKED, KIND


def plain(model, temperature):
    """The four statistics (N,) by torch.distributions in double precision, and the states that they are of."""
    states = hidden_states(model, IDS).detach().requires_grad_()  # (B, T, H)
    with torch.no_grad(), without_adapters(model):
        base = hidden_states(model, IDS)  # (B, T, H)
    rows = (head_logits(model, x[:, :-1][MASK[:, 1:]], V).double() / temperature for x in (states, base))  # (N, V) each
    p, q = (Categorical(logits=logits.masked_fill(BLOCKED[KIND[MASK]], -1e30)) for logits in rows)
    return (p.log_prob(IDS[MASK]), p.entropy(), kl_divergence(p, q), q.log_prob(IDS[MASK])), states


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_bytes, chunk_rows", [(16 * 4 * V, 512), (1 << 26, 512), (1 << 26, 7)])
def test_token_stats_and_their_gradients_equal_plain_torch(tiny, monkeypatch, chunk_bytes, chunk_rows, temperature):
    monkeypatch.setattr("model.CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr("model.CHUNK_ROWS", chunk_rows)
    stats, hidden = token_stats(tiny[0], *GIVEN, temperature, with_kl=True, return_hidden=True)
    wanted, states = plain(tiny[0], temperature)
    torch.testing.assert_close([x.double() for x in stats], [*wanted], rtol=1e-4, atol=2e-5)
    upstream = torch.randn(len(stats.logp), generator=torch.Generator().manual_seed(3))  # (N,)
    for i in (0, 2):  # logp and kl
        ours, = torch.autograd.grad(stats[i] @ upstream, hidden, retain_graph=True)  # (B, T, H)
        theirs, = torch.autograd.grad(wanted[i].float() @ upstream, states, retain_graph=True)  # (B, T, H)
        size = theirs.norm(dim=-1)  # (B, T) compared row by row, so that a small one must be right, too
        assert ((ours - theirs).norm(dim=-1) <= 1e-4 * size).all()


def test_options_of_token_stats_change_only_what_they_name(tiny):
    model, _ = tiny
    bare, with_kl = (token_stats(model, *GIVEN, with_kl=on) for on in (False, True))
    assert torch.equal(bare.logp, with_kl.logp) and torch.equal(bare.entropy, with_kl.entropy)
    assert not bare.kl.any() and not bare.ref_logp.any() and (with_kl.kl > 0).all()
    one, other = (torch.autograd.grad(x.logp.sum(), adapter_parameters(model, "generator")) for x in (bare, with_kl))
    assert all(map(torch.equal, one, other))  # the base's pass costs the active adapter nothing
    assert torch.equal(token_stats(model, *GIVEN, 0.0).logp, bare.logp)  # greedy has no temperature
    theirs = model(IDS).logits.log_softmax(-1)[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]  # (B, T - 1)
    torch.testing.assert_close(token_stats(model, IDS, MASK).logp, theirs[MASK[:, 1:]], rtol=1e-4, atol=2e-5)
    stats = token_stats(model, torch.where(KIND == 0, 5, 2), *GIVEN[1:], with_kl=True)  # forbidden ids
    assert not stats.logp.exp().any() and stats.kl.isfinite().all()


@pytest.mark.parametrize("length", [7, 12, 14, 16])  # the token's probability is 0.57, 0.988, 0.997, 0.9995
def test_gradients_of_confident_tokens_survive_bf16(length):
    # e_t - p is nearly nothing there: formed after a cast to bf16 it would be nothing
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).bfloat16()  # (V, H)
    hidden = (weight[3:4] / weight[3].norm() ** 2 * length).requires_grad_()  # (1, H)
    none, target = torch.zeros(1, 512, dtype=torch.bool), torch.tensor([3])  # (1, V), (1,)
    _TokenStats.apply(hidden, None, weight, None, target, none, target * 0, 1.0)[0].sum().backward()
    logits = torch.nn.functional.linear(hidden.detach(), weight).double()[0]  # (V,) rounded to bf16, as they were seen
    exact = (torch.eye(512, dtype=torch.double)[3] - logits.softmax(-1)) @ weight.double()  # (H,)
    assert (hidden.grad[0].double() - exact).norm() < 0.02 * exact.norm()


def test_fresh_adapters_cover_every_linear_layer_but_the_head_and_their_kl_is_zero(tiny_folder):
    names = ["generator", "discriminator"]
    model = add_adapters(load_model(tiny_folder, "none", "fp32", "cpu")[0], names, 64, 8.0)
    assert {x.scaling["generator"] for x in model.modules() if hasattr(x, "lora_A")} == {1.0}  # 8 / sqrt(64)
    ours, theirs = (adapter_parameters(model, name) for name in names)
    assert len(ours) == len(theirs) == 2 * 7 * 2 and not {*map(id, ours)} & {*map(id, theirs)}
    stats = token_stats(model, IDS, MASK, with_kl=True)
    stats.kl.sum().backward()
    assert stats.kl.abs().max() < 1e-5 and all(p.grad.abs().max() < 1e-4 for p in ours)


def adapted(folder, quant="none", dtype="fp32"):
    """The tiny model with one adapter, which is always the same."""
    model, g = load_model(folder, quant, dtype, "cpu")[0], torch.Generator().manual_seed(5)
    for p in adapter_parameters(add_adapters(model, ["generator"], 4, 3.0), "generator"):
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
    save_file({key: x for key, x in load_file(file).items() if "q_proj" not in key}, file)
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
    for wide in (True, False):  # False: peft's own layers, which cast an input to fp32 and keep it
        model, kept = adapted(tiny_folder, dtype="bf16"), []
        for layer in (x for x in model.modules() if hasattr(x, "lora_A") and not wide):
            layer.cast_input_dtype_enabled, layer.lora_A["generator"].__class__ = True, torch.nn.Linear
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            found.append((*gradient(model), sum({x.data_ptr(): x.nbytes for x in kept}.values())))
    (ours, grads, size), (theirs, wanted, more) = found
    assert torch.equal(ours, theirs) and close(grads, wanted) and size < 0.8 * more


@pytest.mark.parametrize("prepare, shared, wanted", [(id, 6, [48, 6, 30]), (checkpoint_layers, 0, [48] * 3)])
def test_a_beginning_read_once_and_checkpointing_change_no_gradient(prepare, shared, wanted, tiny_folder):
    reads, found = [], []
    for prepare, shared in ((id, 0), (prepare, shared)):
        model = adapted(tiny_folder)
        prepare(model)
        first = causal_lm(model).base_model.layers[0].input_layernorm
        first.register_forward_hook(lambda _, x, out: reads.append(out.numel() // 32))
        found.append(gradient(model, shared=shared))
    assert reads == wanted and all(map(close, *found))


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_players_step_clips_and_skips_a_gradient_that_is_not_finite(dtype, tiny):
    p, player = torch.nn.Parameter(torch.tensor([1.0, 1.0])), Player(*tiny, "generator")
    player.optimize(0.5, argparse.Namespace(optim="adam", grad_clip=0.5, beta1=0.9, beta2=0.9, dtype=dtype), [p])
    assert player.step(1.0) == 0.0  # there was no loss
    for bad_steps, value in enumerate((float("inf"), float("nan")), 1):
        player.backward(p.sum() * value)
        assert player.step(1.0) is None and p.grad is None and player.bad_steps == bad_steps
    assert player.scaler.get_scale() == (2.0**12 if dtype == "fp16" else 1.0) and p.tolist() == [1.0, 1.0]
    player.backward((p * torch.tensor([3.0, 4.0])).sum())
    assert player.step(0.1) == pytest.approx(5.0) and p.grad is None and player.bad_steps == 0
    torch.testing.assert_close(player.optimizer.state[p]["exp_avg"], 0.1 * torch.tensor([0.3, 0.4]))  # clipped to 0.5
    torch.testing.assert_close(p.data, torch.full((2,), 0.95))  # Adam's first step: its learning rate


def test_muon_takes_the_matrices_and_adam_the_rest():
    """The updates of torch's two optimisers, each on its own parameters; and a state that loads into another."""
    torch.manual_seed(0)
    start = [torch.randn(6, 4), torch.randn(4)]
    ours, theirs = ([torch.nn.Parameter(x.clone()) for x in start] for _ in range(2))
    both = MuonAndAdam(ours, 0.1, (0.9, 0.95))
    apart = [torch.optim.Muon(theirs[:1], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
             torch.optim.Adam(theirs[1:], lr=0.1, betas=(0.9, 0.95))]
    for i in range(4):
        grads = [torch.randn(x.shape) for x in start]
        for params in (ours, theirs):
            for p, grad in zip(params, grads):
                p.grad = grad.clone()
        both.param_groups[0]["lr"] = both.param_groups[1]["lr"] = apart[0].param_groups[0]["lr"] = 0.1 / (i + 1)
        apart[1].param_groups[0]["lr"] = 0.1 / (i + 1)
        for optimizer in (both, *apart):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
        saved, both = both.state_dict(), MuonAndAdam(ours, 0.1, (0.9, 0.95))
        both.load_state_dict(saved)
    assert len(MuonAndAdam(ours[:1], 0.1, (0.9, 0.95)).parts) == 1


def test_cuda_means_the_first_gpu_since_torch_sets_one_by_its_number(monkeypatch):
    numbers = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: numbers.append(device.index))
    assert [checked_device(name).index for name in ("cuda", "cuda:1")] == [0, 1] == numbers
    with pytest.raises(UserError):
        checked_device("cuda:2")
