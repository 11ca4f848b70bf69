import pytest
import torch
from peft.tuners.lora import LoraLayer

import model as model_file
from model import (Wide, adapter_parameters, add_adapters, head_logits, hidden_states, load_model, memory_needs, reference,
                   token_logps, update, without_adapters)


class Head:
    """The least that token_logps asks of a model: an output layer."""

    def __init__(self, weight, bias=None):
        self.head = torch.nn.Linear(*weight.T.shape, bias=bias is not None)
        self.head.weight.data = weight
        if bias is not None:
            self.head.bias.data = bias
        self.head.requires_grad_(False)

    def get_output_embeddings(self):
        return self.head


def case(N=50, H=12, V=37, bias=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, ref = 0.3 * torch.randn(N, H, generator=g), 0.3 * torch.randn(N, H, generator=g)  # logits within some 5 nats
    head = Head(torch.randn(V + 3, H, generator=g), torch.randn(V + 3, generator=g) if bias else None)  # 3 rows the tokenizer lacks
    kind, blocked = torch.randint(0, 2, (N,), generator=g), torch.zeros(2, V, dtype=torch.bool)
    blocked[0, [1, 5]] = blocked[1, [2]] = True
    targets = torch.randint(6, V, (N,), generator=g)
    return head, hidden.requires_grad_(), ref, targets, blocked, kind


def naive(head, hidden, ref, targets, blocked, kind, temperature):
    """The same four numbers in double precision with whole-vocabulary tensors and autograd, over the allowed ids alone."""
    out, hidden, ref = [], hidden.double(), ref.double()
    for i, target in enumerate(targets):
        allowed = (~blocked[kind[i]]).nonzero()[:, 0]
        weight, bias = head.head.weight[allowed].double(), 0 if head.head.bias is None else head.head.bias[allowed].double()
        log_p = ((weight @ hidden[i] + bias) / temperature).log_softmax(-1)
        log_q = ((weight @ ref[i] + bias) / temperature).log_softmax(-1)
        at = (allowed == target).nonzero().item()
        out.append(torch.stack([log_p[at], -(log_p.exp() * log_p).sum(), (log_p.exp() * (log_p - log_q)).sum(), log_q[at]]))
    return torch.stack(out, 1)


@pytest.mark.parametrize("chunk_rows, most_rows", [(16, 512), (10_000, 512), (10_000, 20)])
@pytest.mark.parametrize("temperature, bias", [(1.0, False), (0.7, True)])
def test_chunked_logps_entropy_and_kl_equal_the_naive_ones(monkeypatch, chunk_rows, most_rows, temperature, bias):
    head, hidden, ref, targets, blocked, kind = case(bias=bias)
    monkeypatch.setattr(model_file, "CHUNK_BYTES", chunk_rows * 4 * blocked.shape[1])
    monkeypatch.setattr(model_file, "CHUNK_ROWS", most_rows)
    stats = token_logps(head, hidden, targets, blocked, kind, ref, temperature, entropy_grad=True)
    wanted = naive(head, hidden, ref, targets, blocked, kind, temperature)
    for name, got, want in zip(stats._fields, stats, wanted):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    upstream = torch.randn(3, len(targets), generator=torch.Generator().manual_seed(3))
    for row, got in enumerate((stats.logp, stats.entropy, stats.kl)):
        ours, = torch.autograd.grad((got * upstream[row]).sum(), hidden, retain_graph=True)
        theirs, = torch.autograd.grad((wanted[row] * upstream[row]).sum(), hidden, retain_graph=True)
        error, size = (ours - theirs).norm(dim=1), theirs.norm(dim=1)  # (N,) row by row: single entries cancel
        assert (error <= 1e-4 * size).all(), (stats._fields[row], (error / size).max())


@pytest.mark.parametrize("p_target", [0.5, 0.99, 0.999, 0.9999])
def test_gradients_of_confident_tokens_survive_bf16(p_target):
    # e_t - p is nearly nothing there: formed after a cast to bf16 it would be nothing
    V, H, g = 512, 64, torch.Generator().manual_seed(0)
    weight = torch.randn(V, H, generator=g).bfloat16()
    direction = weight[3].float() / weight[3].float().norm() ** 2
    low, high = 0.0, 60.0
    for _ in range(40):  # the length along the target's row at which its probability is p_target
        hidden = direction * (low + high) / 2
        p = (weight.float() @ hidden).softmax(-1)
        low, high = (low, (low + high) / 2) if p[3] > p_target else ((low + high) / 2, high)
    hidden = hidden.bfloat16()[None].requires_grad_()
    stats = token_logps(Head(weight), hidden, torch.tensor([3]), torch.zeros(1, V, dtype=torch.bool), torch.tensor([0]))
    stats.logp.sum().backward()
    logits = torch.nn.functional.linear(hidden.detach(), weight).double()[0]  # the logits that were seen, in bf16
    exact = (torch.eye(V, dtype=torch.double)[3] - logits.softmax(-1)) @ weight.double()
    assert (hidden.grad[0].double() - exact).norm() < 0.02 * exact.norm()


def test_without_a_reference_the_kl_is_zero_and_nothing_else_changes():
    head, hidden, ref, targets, blocked, kind = case()
    alone, beside = token_logps(head, hidden, targets, blocked, kind), token_logps(head, hidden, targets, blocked, kind, ref)
    assert torch.equal(alone.logp, beside.logp) and torch.equal(alone.entropy, beside.entropy)
    assert not alone.kl.any() and not alone.ref_logp.any() and (beside.kl > 0).all()


def test_kl_gradient_equals_the_exact_one_on_a_toy_softmax():
    # p = (1/2, 1/3, 1/6), q = (1/3, 1/3, 1/3): KL = 1/2 log 3/2 + 0 + 1/6 log 1/2, dKL/dz = p (log p/q - KL)
    p, q = torch.tensor([1 / 2, 1 / 3, 1 / 6]), torch.full((3,), 1 / 3)
    hidden = p.log()[None].requires_grad_()
    stats = token_logps(Head(torch.eye(3)), hidden, torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([0]), q.log()[None])
    kl = 0.5 * torch.tensor(1.5).log() + torch.tensor(0.5).log() / 6
    stats.kl.sum().backward()
    torch.testing.assert_close(stats.kl[0], kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hidden.grad[0], p * ((p / q).log() - kl), rtol=1e-4, atol=1e-6)


def test_forbidden_ids_have_no_probability_and_leave_the_kl_finite():
    head, hidden, ref, targets, blocked, kind = case()
    targets = torch.where(kind == 0, 5, 2)  # the forbidden ones
    stats = token_logps(head, hidden, targets, blocked, kind, ref)
    assert (stats.logp.exp() == 0).all() and stats.kl.isfinite().all()


def test_our_logits_equal_the_models_own(tiny):
    model, _ = tiny
    ids = torch.randint(0, 4000, (2, 9))
    torch.testing.assert_close(head_logits(model, hidden_states(model, ids)), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_adapters_scale_is_alpha_over_the_root_of_the_rank(tiny_folder):
    model = add_adapters(load_model(tiny_folder, "none", "fp32", "cpu")[0], ["shared"], 64, 8.0)
    scales = {module.scaling["shared"] for module in model.modules() if isinstance(getattr(module, "scaling", None), dict)}
    assert scales == {1.0}


def test_adapters_cover_all_linear_layers_but_the_head_and_start_as_the_base(tiny_folder):
    base, _ = load_model(tiny_folder, "none", "fp32", "cpu")
    ids = torch.randint(0, 4000, (1, 9))
    before = hidden_states(base, ids)
    model = add_adapters(base, ["generator", "discriminator"], 4, 2.0)
    assert torch.equal(hidden_states(model, ids), before)
    linear = [name for name, m in base.named_modules() if name.endswith("_proj")]
    assert len(adapter_parameters(model, "generator")) == 2 * len(linear) == 2 * 7 * 2
    assert not set(adapter_parameters(model, "generator")) & set(adapter_parameters(model, "discriminator"))


def test_without_adapters_the_model_is_its_base(tiny, tiny_folder):
    model, _ = tiny
    ids = torch.randint(0, 4000, (1, 9))
    base, _ = load_model(tiny_folder, "none", "fp32", "cpu")
    with without_adapters(model):
        assert torch.equal(hidden_states(model, ids), hidden_states(base, ids))
    assert not torch.equal(hidden_states(model, ids), hidden_states(base, ids))


def test_the_reference_is_another_adapter_or_the_base_and_costs_the_active_one_nothing(tiny):
    model, _ = tiny
    ids, params = torch.randint(0, 4000, (1, 9)), adapter_parameters(model, "generator")
    model.set_adapter("discriminator")
    other = hidden_states(model, ids).detach()
    model.set_adapter("generator")
    hidden_states(model, ids).sum().backward()
    before, kept = hidden_states(model, ids).detach(), [p.grad.clone() for p in params]
    with torch.no_grad(), reference(model, "discriminator"):
        assert torch.equal(hidden_states(model, ids), other)
    with torch.no_grad(), without_adapters(model):
        bare = hidden_states(model, ids)
    with torch.no_grad(), reference(model):
        assert torch.equal(hidden_states(model, ids), bare)
    assert not torch.equal(bare, other) and torch.equal(hidden_states(model, ids).detach(), before)
    hidden_states(model, ids).sum().backward()  # a second micro-batch adds to the first one's gradient
    assert all(torch.allclose(p.grad, 2 * g) for p, g in zip(params, kept)) and any(g.abs().sum() > 0 for g in kept)
    assert all(p.grad is None for p in adapter_parameters(model, "discriminator"))


@pytest.mark.parametrize("name", ["no/such-model-here", "/no/such/folder"])
def test_a_model_that_cannot_be_loaded_is_one_line(name, capsys):
    with pytest.raises(SystemExit) as error:
        load_model(name, "none", "fp32", "cpu")
    assert error.value.code == 2 and "--model" in error.value.message and "\n" not in error.value.message


def adapter_gradients(model):
    """Gradients of one adapter for a fixed sum of last hidden states, after a pass without gradient, as in a run."""
    torch.manual_seed(5)
    model = add_adapters(model, ["generator"], 4, 2.0)
    for p in adapter_parameters(model, "generator"):
        torch.nn.init.normal_(p, std=0.1)
    ids = torch.arange(4, 44).view(2, 20)
    with torch.no_grad():
        hidden_states(model, ids)
    hidden = hidden_states(model, ids)
    (hidden.float() * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return torch.cat([p.grad.flatten() for p in adapter_parameters(model, "generator")])


@pytest.mark.parametrize("quant, tolerance", [("nf4", 1e-4), ("int8", 0.1)])  # int8 rounds its inputs as well
def test_gradients_flow_through_quantised_layers(quant, tolerance, tiny_folder):
    import bitsandbytes as bnb
    quantised, _ = load_model(tiny_folder, quant, "fp32", "cpu")
    dense, _ = load_model(tiny_folder, "none", "fp32", "cpu")
    if quant == "nf4":
        layers = dict(dense.named_modules())
        for name, module in quantised.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                layers[name].weight.data = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state).view_as(layers[name].weight)
    ours, theirs = adapter_gradients(quantised), adapter_gradients(dense)
    assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_adapters_keep_inputs_of_16_bits_and_the_same_gradients(tiny_folder):
    """Against peft's own layers, which cast a layer's input to fp32 and keep that."""
    model, _ = load_model(tiny_folder, "none", "bf16", "cpu")
    model = add_adapters(model, ["generator"], 4, 2.0)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    ids, told = torch.randint(5, 4000, (2, 30)), []
    for wide in (True, False):
        for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
            layer.cast_input_dtype_enabled = not wide
            layer.lora_A["generator"].__class__ = Wide if wide else torch.nn.Linear
        kept = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.add((x.data_ptr(), x.nbytes)), x)[1], lambda x: x):
            out = hidden_states(model, ids)
        model.zero_grad()
        out.float().square().sum().backward()
        told.append((out, [p.grad.clone() for p in adapter_parameters(model, "generator")], sum(size for _, size in kept)))
    (ours, grads, size), (theirs, wanted, more) = told
    assert torch.equal(ours, theirs) and size < 0.8 * more, (size, more)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_a_shared_beginning_is_read_once_with_the_same_states_and_gradients(tiny):
    model, _ = tiny
    model.set_adapter("generator")
    torch.manual_seed(0)
    ids, reads, told = torch.randint(5, 4000, (3, 24)), [], []
    ids[:, :10] = ids[:1, :10]
    weights = torch.randn(3, 19, model.config.hidden_size)  # (B, T - 5, H)
    embed = model.get_base_model().get_input_embeddings()
    hook = embed.register_forward_hook(lambda module, inputs, output: reads.append(inputs[0].numel()))
    for shared in (0, 10):
        model.zero_grad()
        out = hidden_states(model, ids, shared)
        (out[:, 5:] * weights).sum().backward()
        told.append((out, [p.grad.clone() for p in adapter_parameters(model, "generator")]))
    hook.remove()
    assert reads == [3 * 24, 10, 3 * 14]
    torch.testing.assert_close(told[0][0], told[1][0], rtol=1e-4, atol=1e-5)
    for a, b in zip(told[0][1], told[1][1], strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm(), (a - b).norm() / a.norm()


def test_adapters_take_a_weight_and_a_gradient_and_two_moments_an_optimiser(tiny):
    ours, theirs = (adapter_parameters(tiny[0], name) for name in ("generator", "discriminator"))
    n, players = sum(p.numel() for p in ours), [(tiny[0], 10, 2, 2)]
    one, two = (torch.optim.Adam(params, lr=1e-3) for params in (ours, theirs))
    shared, coarse = torch.optim.Adam(ours, lr=1e-3), type("Adam8bit", (torch.optim.Adam,), {})(ours, lr=1e-3)
    for optimizers, size in (([one], 8 + 8), ([one, two], 2 * (8 + 8)), ([one, shared], 8 + 8 + 8), ([coarse], 8 + 2)):
        assert memory_needs(players, optimizers)["adapters"] * 2**30 == size * n


def test_an_update_unscales_clips_and_leaves_the_weights_where_a_gradient_is_not_finite():
    p, unused = (torch.nn.Parameter(torch.tensor([1.0, 1.0])) for _ in range(2))
    optimizer, state = torch.optim.SGD([p, unused], lr=9.0), {"loss_scale": 4.0}
    p.grad = torch.tensor([12.0, 16.0])  # of the loss: 3 and 4, norm 5; clipped to a half: 0.3 and 0.4
    assert update(optimizer, 0.1, 0.5, state) == pytest.approx(5.0) and state == {"loss_scale": 4.0}
    torch.testing.assert_close(p.detach(), torch.tensor([0.97, 0.96]), rtol=1e-5, atol=1e-6)
    assert p.grad is None and unused.tolist() == [1.0, 1.0]
    p.grad = torch.tensor([float("inf"), 0.0])
    assert update(optimizer, 0.1, 0.5, state) is None and state == {"loss_scale": 2.0}
    torch.testing.assert_close(p.detach(), torch.tensor([0.97, 0.96]), rtol=1e-5, atol=1e-6)
    for wanted in (1.0, 1.0):
        p.grad = torch.tensor([float("nan"), 0.0])
        assert update(optimizer, 0.1, 0.5, state) is None and state == {"loss_scale": wanted}
