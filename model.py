"""
The base model in nf4, int8, bf16, fp16 or fp32, its rsLoRA adapters, and what its heads say of chosen tokens.

What differs from the textbook:
1. Log-probs, entropy and exact KL are computed from hidden states, in chunks of rows, and their gradients are taken in
   the forward pass: positions x vocabulary never stands in memory, and no logit is computed twice.
2. Ids that the tokenizer lacks are sliced off; ids forbidden at a position get FORBIDDEN, in sampler and learner alike.

Letters: B sequences, T tokens, N chosen positions (n in a chunk of them, K kinds), V vocabulary, H hidden.
"""
import contextlib
import logging
import math
import pathlib
import resource
import sys
import warnings
from typing import NamedTuple

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it complains, on a CPU, of a kernel that is optional
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # peft's, not ours

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.logging import disable_progress_bar

from flags import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEMO = pathlib.Path(__file__).parent / "demo"
EMBEDDED = {"demo": str(DEMO / "base"), "demo-small": str(DEMO / "small")}
FORBIDDEN = -1e30      # in place of -inf: its probability is 0 all the same, and 0 * (x - x) stays 0 in the KL
CHUNK_BYTES = 1 << 26  # of one (rows, V) fp32 buffer of token_logps, which holds up to five
CHUNK_ROWS = 512       # and its most rows: with a small vocabulary more are slower on a CPU


def checked_device(name):
    """The torch device of a --device flag: cpu, or a cuda that is there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: must be cpu, cuda, or cuda:0, cuda:1, ...") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such GPU here; python train.py --preset demo needs none")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a CUDA graph is captured on the current device
    return device


def memory_gb(device):
    """Most memory used so far: of the GPU, or of this process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def memory_needs(players, optimizers, merged=0):
    """What a run takes, roughly, in GiB by purpose; players: (model, tokens of a sequence, sequences sampled at once,
    sequences a pass of the update), in turn. Weights and caches of both stay in memory, activations of one at a time.

    Adapters are fp32, with gradients, and two moments an optimiser, in 8 bits or fp32. A layer of Qwen3 keeps about 23
    numbers of H a token for the backward pass (measured: 5.5 GiB at 862 tokens of Qwen3-8B in bf16) or its input alone.
    merged: bytes of the copies that sample.
    """
    frozen, cache, activations = {}, [], []
    for model, num_tokens, num_sampled, num_passed in players:
        config, base = causal_lm(model).config.get_text_config(), causal_lm(model)
        frozen[id(base)] = sum(p.nbytes for name, p in base.named_parameters() if "lora_" not in name)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        size = base.get_output_embeddings().weight.element_size()
        cache.append(2 * config.num_hidden_layers * heads * head_dim * size * num_sampled * num_tokens)
        kept = 1 if getattr(base, "is_activation_checkpointing", False) else 23
        activations.append(kept * size * config.hidden_size * config.num_hidden_layers * num_passed * num_tokens)
    trained, adapters = set(), 0
    for optimizer in optimizers:  # two that share an adapter have moments each
        params = [p for group in optimizer.param_groups for p in group["params"]]
        adapters += (2 if "8bit" in type(optimizer).__name__ else 8) * sum(p.numel() for p in params)
        trained |= {*params}
    adapters += 8 * sum(p.numel() for p in trained)
    parts = {"weights": sum(frozen.values()), "merged copy": merged, "adapters": adapters, "cache": sum(cache),
             "activations": max(activations)}
    return {purpose: size / 2**30 for purpose, size in parts.items()}


def positions(model):
    """The most tokens of a sequence, as the model's config has it."""
    return getattr(causal_lm(model).config, "max_position_embeddings", None) or sys.maxsize


def load_tokenizer(name, flag="--model"):
    """The tokenizer of a hub id, a folder, or an embedded model; `flag` is the one that named it."""
    try:
        return AutoTokenizer.from_pretrained(EMBEDDED.get(name, name))
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name} could not be loaded: {str(error).strip().splitlines()[0]}") from None


def load_model(name, quant, dtype, device, flag="--model"):
    """A causal LM and its tokenizer from a hub id, a folder, or `demo` and `demo-small`, which are embedded.

    quant is none, nf4 (4-bit) or int8 (bitsandbytes); dtype is the weights' or, quantised, the compute dtype.
    """
    name = EMBEDDED.get(name, name)
    config = {
        "none": None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[quant]
    tokenizer = load_tokenizer(name, flag)
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES[dtype], quantization_config=config, device_map={"": device}, use_safetensors=True)
    except (OSError, ValueError, SafetensorError) as error:  # no such model, no hub, torn weights, not a causal LM
        raise UserError(f"{flag} {name} could not be loaded: {str(error).strip().splitlines()[0]}") from None
    model.requires_grad_(False)
    model.eval()
    for module in model.modules():  # bitsandbytes would repack nf4 weights for AVX512, in a form that has no gradient
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = torch.tensor([[0, 1, 2]], device=device)  # (1, 3)
    with torch.no_grad():
        told, ours = model(ids).logits, head_logits(model, hidden_states(model, ids))  # (1, 3, V) each
    if not torch.allclose(told.float(), ours.float(), rtol=0.05, atol=0.05):
        raise UserError(f"{flag} {name} changes its logits after the output layer (a soft cap, a scale), "
                        "which token_logps does not know")
    return model, tokenizer


class Wide(torch.nn.Linear):
    """A layer of fp32 weights that takes 16-bit inputs: cast for the product, kept for the gradient as they came."""

    def forward(self, x):
        return _WideProduct.apply(x, self.weight)  # (..., out)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x.to(weight.dtype), weight)  # (..., out)

    @staticmethod
    def backward(ctx, grad):  # (..., out)
        x, weight = ctx.saved_tensors
        of_x = (grad @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None  # (..., in)
        return of_x, grad.flatten(0, -2).mT @ x.flatten(0, -2).to(weight.dtype)  # (..., in), (out, in)


def add_adapters(model, names, rank, alpha, flag="--model"):
    """Wrap the model with one rsLoRA adapter a name on all its linear layers; the scale is alpha / sqrt(rank).

    Adapters are fp32. peft would keep an fp32 copy of each layer's input for the backward pass; ours keeps the input.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    try:
        model = get_peft_model(model, config, adapter_name=names[0])
    except ValueError as error:
        raise UserError(f"{flag} {model.config.name_or_path}: peft has no adapters for it: {error}") from None
    for name in names[1:]:
        model.add_adapter(name, config)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.cast_input_dtype_enabled = False
        for down in layer.lora_A.values():
            down.__class__ = Wide
    return model


def checkpoint_layers(model):
    """Keep only each layer's input for the backward pass and compute the rest again. Dropout stays off."""
    causal_lm(model).activation_checkpointing_enable({"use_reentrant": False})
    for module in causal_lm(model).modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # of this module alone: what it looks at to know that a backward pass will come


def load_adapters(model, folder):
    """Read every adapter's weights back from a folder that `model.save_pretrained` wrote."""
    for name in model.peft_config:
        load_adapter(model, pathlib.Path(folder) / name, name)


def load_adapter(model, folder, name):
    """Read one adapter's weights from the folder of one that may have had another name."""
    weights = load_file(folder / "adapter_model.safetensors")
    if len(weights) != len(adapter_parameters(model, name)):
        raise ValueError(f"adapter {name} has {len(weights)} tensors, the model "
                         f"{len(adapter_parameters(model, name))}")
    set_peft_model_state_dict(model, weights, adapter_name=name)


def adapter_parameters(model, name):
    """The parameters of one adapter, by name: `requires_grad` tells only which adapter is active just now."""
    return [p for key, p in model.named_parameters() if "lora_" in key and f".{name}." in key]


def without_adapters(model):
    """Context in which the model is its base. Never enter it between a forward and its backward."""
    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


@contextlib.contextmanager
def reference(model, name=None):
    """Context in which the model is the KL's reference: its base, or the adapter of that name, which is never trained.

    Never enter it between a forward and its backward: switching adapters loses the gradients, without an error.
    """
    if name is None:
        with without_adapters(model):
            yield
        return
    active = model.active_adapter
    model.set_adapter(name, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(active)


def causal_lm(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def sees_all(model):
    """Whether every layer attends to all that stands before a token: no window, no state of another kind."""
    config = causal_lm(model).config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    return kinds == {"full_attention"} or not kinds and not getattr(config, "sliding_window", None)


def hidden_states(model, ids, shared=0):
    """Last hidden states of the backbone, after its final norm: ids (B, T) to (B, T, H). No lm_head is run.

    Pad on the right and pass no mask: under causal attention what follows a token cannot reach it. The first `shared`
    ids are the same in all rows: where they are a good part of T, they are read once, with the same gradients.
    """
    backbone, (B, T) = causal_lm(model).base_model, ids.shape
    checkpointed = getattr(causal_lm(model), "is_activation_checkpointing", False)  # then there is no cache
    if B == 1 or shared < T / 4 or checkpointed or not sees_all(model):
        return backbone(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    cache = DynamicCache()
    head = backbone(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = (x.expand(B, -1, -1, -1) for x in (layer.keys, layer.values))
    place = torch.arange(shared, T, device=ids.device)[None]  # (1, T - shared)
    tail = backbone(input_ids=ids[:, shared:], position_ids=place, past_key_values=cache, use_cache=True)
    return torch.cat([head.last_hidden_state.expand(B, -1, -1), tail.last_hidden_state], 1)  # (B, T, H)


def head_weights(model, vocab=None):
    """Weight (V, H) and bias (V,), or None, of the output layer, for the first `vocab` ids."""
    head = causal_lm(model).get_output_embeddings()
    return head.weight[:vocab], None if head.bias is None else head.bias[:vocab]  # (V, H), (V,)


def head_logits(model, hidden, vocab=None):
    """Logits of hidden states (..., H) over the first `vocab` ids: (..., V)."""
    return torch.nn.functional.linear(hidden, *head_weights(model, vocab))  # (..., V)


def pad(rows, value=0, device="cpu", dtype=torch.long):
    """Lists of unequal length to one right-padded tensor (B, T)."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=dtype)  # (B, T)
    for i, row in enumerate(rows):
        out[i, :len(row)] = torch.as_tensor(row, dtype=dtype)  # (len(row),)
    return out.to(device)  # (B, T)


def micro_batches(rows, size):
    """Lists of at most `size` of the row numbers (0: all in one)."""
    rows = list(rows)
    return [rows[first:first + (size or len(rows))] for first in range(0, len(rows), size or len(rows) or 1)]


def update(optimizer, lr, grad_clip, state):
    """Clip, step, zero. Returns the gradient's norm, or None where it is not finite and the step was skipped.

    The gradients are those of the loss times state["loss_scale"], which is halved where they overflow, as fp16's do.
    """
    (group,) = optimizer.param_groups
    for p in (p for p in group["params"] if p.grad is not None):
        p.grad /= state["loss_scale"]
    norm = torch.nn.utils.clip_grad_norm_(group["params"], grad_clip).item()
    group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    else:
        norm, state["loss_scale"] = None, max(state["loss_scale"] / 2, 1.0)
    optimizer.zero_grad(set_to_none=True)
    return norm


# -----------------------------------------------------------------------------
# what the model says of the tokens that were drawn

class TokenStats(NamedTuple):
    logp: torch.Tensor      # (N,) log-prob of the target, nats
    entropy: torch.Tensor   # (N,) of the policy, nats
    kl: torch.Tensor        # (N,) exact KL(policy || reference) over the vocabulary, nats; 0 without a reference
    ref_logp: torch.Tensor  # (N,) log-prob of the target under the reference; 0 without one


def token_logps(model, hidden, targets, blocked, kind, ref_hidden=None, temperature=1.0, entropy_grad=False):
    """Per-token statistics of N positions from their hidden states.

    hidden, ref_hidden: (N, H), the states that predict the targets, under the policy and (no gradient) the reference.
    targets: (N,) ids. blocked: (K, V) bool, forbidden ids by kind of position; kind: (N,) its row for each position.
    Gradients flow into `hidden` alone, through logp and kl, and through entropy if entropy_grad. Log-sum-exp in fp32.
    """
    weight, bias = head_weights(model, blocked.shape[1])  # (V, H), (V,)
    stats = _TokenStats.apply(hidden, ref_hidden, weight, bias, targets, blocked, kind, temperature, entropy_grad)
    return TokenStats(*stats)  # (N,) each


def row_logps(hidden, weight, bias, blocked, temperature):
    """Log-probs over the vocabulary: hidden (n, H), blocked (n, V) bool to (n, V) fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float()  # (n, V)
    if temperature != 1.0:
        logits /= temperature
    logits.masked_fill_(blocked, FORBIDDEN)
    return logits.sub_(logits.logsumexp(-1, keepdim=True))  # (n, V)


class _TokenStats(torch.autograd.Function):
    """Gradients by hand, with z the logits, p the policy, q the reference, e_t the target's one-hot row:

    d logp / dz = e_t - p,  d kl / dz = p (log p - log q - kl),
    d entropy / dz = -p (log p + entropy),  dz / dh = W / temperature.
    """

    @staticmethod
    def forward(ctx, hidden, ref_hidden, weight, bias, targets, blocked, kind, temperature, entropy_grad):
        N, V = len(targets), weight.shape[0]
        logp, entropy, kl, ref_logp = (hidden.new_zeros(N, dtype=torch.float32) for _ in range(4))  # (N,) each
        need = ctx.needs_input_grad[0]
        grads = [torch.zeros_like(hidden) if wanted else None for wanted in
                 (need, need and entropy_grad, need and ref_hidden is not None)]  # (N, H) each
        size = min(max(16, CHUNK_BYTES // (4 * V)), CHUNK_ROWS)
        for first in range(0, N, size):
            rows = slice(first, first + size)
            target, mask = targets[rows, None], blocked[kind[rows]]  # (n, 1), (n, V)
            log_p = row_logps(hidden[rows], weight, bias, mask, temperature)  # (n, V)
            p = log_p.exp()  # (n, V)
            logp[rows] = log_p.gather(1, target)[:, 0]  # (n,)
            entropy[rows] = -(p * log_p).sum(-1)  # (n,)
            if grads[1] is not None:
                grads[1][rows] = -(p * (log_p + entropy[rows, None])).to(weight.dtype) @ weight / temperature  # (n, H)
            if ref_hidden is not None:
                log_q = row_logps(ref_hidden[rows], weight, bias, mask, temperature)  # (n, V)
                ref_logp[rows] = log_q.gather(1, target)[:, 0]  # (n,)
                ratio = log_p.sub_(log_q)  # (n, V)
                kl[rows] = (p * ratio).sum(-1)  # (n,)
                if grads[2] is not None:
                    grads[2][rows] = (p * ratio.sub_(kl[rows, None])).to(weight.dtype) @ weight / temperature  # (n, H)
            if grads[0] is not None:  # e_t - p before the cast: in bf16 a p of 0.999 is 1, and nothing would be left
                p.neg_().scatter_add_(1, target, torch.ones_like(p[:, :1]))  # (n, V)
                grads[0][rows] = p.to(weight.dtype) @ weight / temperature  # (n, H)
        ctx.grads = grads
        ctx.mark_non_differentiable(*([ref_logp] if entropy_grad else [ref_logp, entropy]))
        return logp, entropy, kl, ref_logp

    @staticmethod
    def backward(ctx, *upstream):  # of logp, entropy, kl, ref_logp: (N,) each
        total = sum(g * up[:, None].to(g.dtype) for g, up in zip(ctx.grads, upstream) if g is not None)  # (N, H)
        return (total,) + (None,) * 8
