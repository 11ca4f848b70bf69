"""
The base model in nf4, int8, bf16, fp16 or fp32, its rsLoRA adapters, the two players, and statistics of marked tokens:
log-prob, entropy and exact KL.

What differs from the textbook:
1. Log-probs, entropy and exact KL are computed from hidden states, in chunks of rows, and their gradients are taken in
   the forward pass: no (positions, vocabulary) matrix is ever held in memory, and no logit is computed twice.
2. Ids that the tokenizer lacks are sliced off; ids forbidden at a position get FORBIDDEN, in sampler and learner alike.

Letters: B sequences, T tokens, N marked tokens (n in a chunk of them), K kinds of position, V vocabulary, H hidden.
"""
import collections
import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import pathlib
import pickle
import re
import resource
import sys
import warnings
from typing import NamedTuple

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it warns about a kernel that is optional
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)  # raised inside peft
warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # peft, of GPT-2's transposed layers

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache,
                          PreTrainedConfig, PreTrainedModel)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from flags import UserError, first_line, read_json
from ranks import sum_gradients

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DEMO = pathlib.Path(__file__).parent / "demo"
EMBEDDED = {"demo": str(DEMO / "base"), "demo-small": str(DEMO / "small")}
MAX_BAD_STEPS = 10     # consecutive steps without a finite gradient that end a run
FORBIDDEN = -1e30      # in place of -inf: its probability is 0 all the same, and 0 * (x - x) stays 0 in the KL
DAMAGE = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, SafetensorError,
          pickle.UnpicklingError)  # what reading damaged weights can raise
CHUNK_BYTES = 1 << 26  # size of one (n, V) fp32 buffer of token_stats, which holds up to five
CHUNK_ROWS = 512       # maximum rows per chunk; more are slower on a CPU with a small vocabulary
SPARE = re.compile(r"(masked_bias|attn\.bias|attention\.bias|causal_mask|inv_freq|\.version|position_ids)$|^v_head\.|"
                   r"(^|\.)mtp\.")  # weights in a file that a model can do without: old buffers, other heads
PROBE = "The first of three bridges was built in 1861, of stone; the others are younger, and made of iron and steel."


def checked_device(name, deterministic=False):
    """The torch device of a --device flag: cpu, or a cuda that is there. deterministic: as --deterministic says."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before CUDA starts
        torch.use_deterministic_algorithms(True)
    device = torch.device("cuda:0" if name == "cuda" else name)  # torch sets a device by its number only
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there is no such GPU here; --device cpu needs none, nor does --preset demo")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # a CUDA graph is captured on the current device
    return device


def memory_gb(device):
    """Peak memory in GiB: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# -----------------------------------------------------------------------------
# loading

def located(name):
    """Path and revision of an embedded model, a folder, a hub id, or a hub id with @ and a revision."""
    path, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    return EMBEDDED.get(path, path), revision or "main"


def pinned(name, flag):
    """A hub id with the commit that it stands for now; any other name as it is."""
    path, revision = located(name)
    load_config(name, flag)  # raises where the name is wrong
    if os.path.isdir(path):
        return name
    commit = extract_commit_hash(cached_file(path, "config.json", revision=revision), None)
    return f"{path}@{commit}" if commit else name


def digests(folder, flag):
    """Digests of the files in a model's folder: "model" (weights and configs) and "tokenizer"."""
    found = {"model": hashlib.blake2b(digest_size=8), "tokenizer": hashlib.blake2b(digest_size=8)}
    try:
        for file in sorted(pathlib.Path(folder).iterdir()):
            of_tokenizer = re.match("tokenizer|special_|added_tokens|vocab|merges|chat_template|spiece", file.name)
            if of_tokenizer or re.search(r"\.safetensors|^(generation_)?config\.json", file.name):
                with open(file, "rb") as content:
                    part = hashlib.file_digest(content, "blake2b").digest()
                found["tokenizer" if of_tokenizer else "model"].update(file.name.encode() + part)
                index = json.loads(file.read_bytes()) if file.suffix == ".json" else {}  # damaged JSON raises here
                shards = index.get("weight_map", {}) if isinstance(index, dict) else {}
                if any("/" in str(shard) for shard in shards.values()):
                    raise ValueError(f"{file.name} names weights in other folders")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{flag} {folder} cannot be used: {first_line(error)}") from None
    return {kind: digest.hexdigest() for kind, digest in found.items()}


def load_tokenizer(name, flag="--model"):
    """The tokenizer of a hub id, a folder, or an embedded model; `flag` is the one that named it."""
    path, revision = located(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        if not tokenizer("text").input_ids:
            raise ValueError("there are no tokenizer files beside the weights")
        if tokenizer.is_fast and json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("dropout"):
            raise ValueError("it splits words at random; remove dropout from tokenizer.json")
        tokenizer.split_special_tokens = False  # a prompt's are special; corpus text goes through plain_encoder
    except Exception as error:  # damaged files raise whatever the readers come across
        raise UserError(f"{flag} {name}: its tokenizer could not be loaded: {first_line(error)}") from None
    return tokenizer


def load_config(name, flag):
    """The config of a model, without dropout, and with transformers' own attention, whatever kernel it asks for."""
    path, revision = located(name)
    try:
        adapter = find_adapter_config_file(path, revision=revision)
        config = None if adapter else AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{flag} {name} could not be loaded: {first_line(error)}") from None
    if adapter:
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(f"{flag} {name} holds an adapter for {base}, not a model; merge the two first (a run's: python "
                        f"-m tools.export RUN --merge DIR; another's: peft's merge_and_unload), or name {base}")
    if getattr(config, "quantization_config", None):
        raise UserError(f"{flag} {name} is stored quantised; name the full model, with --quant nf4 or int8 if need be")
    parts = [config]
    for part in parts:
        for key, value in list(vars(part).items()):
            if isinstance(value, PreTrainedConfig):
                parts.append(value)
            elif re.search("drop|jitter", key) and isinstance(value, (int, float)):
                setattr(part, key, type(value)(0))
        part._attn_implementation = None
    return config


def load_model(name, quant, dtype, device, flag="--model"):
    """A causal LM and its tokenizer from a hub id, a folder, or `demo` and `demo-small`, which are embedded.

    quant is none, nf4 (4-bit) or int8 (bitsandbytes); dtype is the weights' or, quantised, the compute dtype.
    """
    quantisation = {
        "none": None,
        "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[quant]
    (path, revision), config, tokenizer = located(name), load_config(name, flag), load_tokenizer(name, flag)
    disable_progress_bar()
    set_verbosity_error()  # it would print a table where weights are missing
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, config=config, dtype=DTYPES[dtype], quantization_config=quantisation,
            device_map={"": device}, use_safetensors=True, output_loading_info=True)
        for word in ("missing", "unexpected"):
            if keys := sorted(key for key in info[f"{word}_keys"] if word == "missing" or not SPARE.search(key)):
                raise ValueError(f"{len(keys)} {word} weights, {keys[0]} for one; config.json does not fit the weights")
        model.requires_grad_(False)
        model.eval()
        for module in model.modules():  # bitsandbytes would repack nf4 weights for AVX512, in a form without a gradient
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        check_model(model, tokenizer, quant, dtype)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # no such model, no hub, torn weights, not a causal LM, or one that cannot be run
        raise UserError(f"{flag} {name} could not be loaded: {first_line(error)}") from None
    return model, tokenizer


@torch.no_grad()
def check_model(model, tokenizer, quant, dtype):
    """Raise a ValueError for a model whose log-probs token_stats cannot compute.

    A constant factor on all logits is stored as `logit_factor`.
    """
    rows, ids = len(model.get_input_embeddings().weight), torch.tensor([tokenizer(PROBE).input_ids])  # (1, T)
    spare = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}  # an image token has no row
    used = {*tokenizer.get_vocab().values()} - spare | {tokenizer.bos_token_id, tokenizer.eos_token_id,
                                                        tokenizer.pad_token_id} - {None}
    if (largest := max(used)) >= min(rows, len(head_weights(model)[0])):
        raise ValueError(f"the tokenizer has ids up to {largest}, and the model {rows} rows of embeddings; add rows by "
                         "resize_token_embeddings, or remove the tokens that were added")
    if not isinstance(ends := model.generation_config.eos_token_id, (int, list, type(None))):
        raise ValueError(f"eos_token_id in its generation_config.json is {ends!r}, not a number or a list of numbers")
    ids, tolerance = ids[:, :64].to(model.device), 1e-3 if (quant, dtype) == ("none", "fp32") else 0.05
    theirs, hidden = model(ids, use_cache=False).logits.float(), hidden_states(model, ids)  # (1, T, V), (1, T, H)
    early = hidden_states(model, ids[:, :8])  # (1, 8, H)
    if not (theirs.isfinite().all() and hidden.isfinite().all()):
        raise ValueError("its states are not finite" + f" in {dtype}; give --dtype bf16 or fp32" * (dtype == "fp16"))
    scale = tolerance * hidden.float().abs().max()
    if (early - hidden[:, :8]).abs().max() > max(scale, 1e-3):
        raise ValueError("later tokens change its states of earlier ones, so it is not causal; choose another model")
    ours = head_logits(model, hidden).float()  # (1, T, V)
    model.logit_factor = ((theirs * ours).sum() / ours.square().sum()).item()
    if abs(model.logit_factor - 1) < 1e-2:
        model.logit_factor = 1.0
    capped = [key for part in (model.config, model.config.get_text_config()) for key, value in vars(part).items()
              if value and "logit" in key and "cap" in key and "att" not in key]
    if capped or not torch.allclose(theirs, model.logit_factor * ours, rtol=tolerance, atol=tolerance):
        cause = ", ".join({*capped}) or "a cap, say, or one more layer"
        raise ValueError(f"its logits are more than its output layer on its last states ({cause}), which token_stats "
                         "does not support; choose another model")


def load_players(args, device):
    """The generator and the discriminator, as train.py's flags describe them: one model or two, one adapter or two."""
    names = ["shared"] if args.adapters == "shared" else ["generator", "discriminator"]
    model, tokenizer = load_model(args.model, args.quant, args.dtype, device)
    model = add_adapters(model, names[:1] if args.d_model else names, args.rank, args.alpha)
    players = [Player(model, tokenizer, name) for name in (names[0], names[-1])]
    if args.d_model:
        d_model, d_tokenizer = load_model(args.d_model, args.quant, args.dtype, device, "--d_model")
        players[1] = Player(add_adapters(d_model, names[1:], args.rank, args.alpha, "--d_model"), d_tokenizer, names[1])
    if args.grad_ckpt:
        for lm in {id(player.model): player.model for player in players}.values():
            checkpoint_layers(lm)
    return players


class Player:
    """One of the two players: a model, its tokenizer, an adapter that makes it this player, and an optimiser."""

    def __init__(self, model, tokenizer, adapter):
        self.model, self.tokenizer, self.adapter = model, tokenizer, adapter
        self.device = causal_lm(model).device
        self.bad_steps = 0  # consecutive steps with a gradient that is not finite

    def activate(self):
        """Make its adapter the active one. Never between a forward and its backward: peft drops the gradients."""
        self.model.set_adapter(self.adapter)

    def check_length(self, num_tokens):
        """Refuse sequences that are longer than the model's config allows."""
        if num_tokens > positions(self.model):
            raise UserError(f"{causal_lm(self.model).config.name_or_path} has {positions(self.model)} positions, and a "
                            f"sequence takes up to {num_tokens}; lower --prefix_tokens, --reasoning_tokens, "
                            "--completion_tokens, --echo_tokens or --d_think_tokens")

    def optimize(self, lr, args, head=()):
        """Train its adapter, and the parameters of a head, at learning rate lr."""
        Optimizer = {"adam": torch.optim.Adam, "muon": MuonAndAdam}.get(args.optim)
        if args.optim == "adam8bit":
            from bitsandbytes.optim import Adam8bit as Optimizer
        self.lr, self.grad_clip = lr, args.grad_clip
        self.params = adapter_parameters(self.model, self.adapter) + list(head)
        self.optimizer = Optimizer(self.params, lr=lr, betas=(args.beta1, args.beta2))
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=2.0**14, enabled=args.dtype == "fp16")
        self.scaler.scale(torch.zeros((), device=self.device))  # makes its state, where a process has no rows at first

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, lr_factor):
        """Clip, step, zero. Returns the gradient's norm, or None where it is not finite and the step was skipped."""
        sum_gradients(self.params)
        if all(p.grad is None for p in self.params):
            return 0.0
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip).item()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        if math.isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.bad_steps = 0 if math.isfinite(norm) else self.bad_steps + 1
        if self.bad_steps >= MAX_BAD_STEPS:
            raise UserError(f"{self.bad_steps} steps in a row had a gradient that is not finite; the last checkpoint "
                            "is intact; start a new run with a lower learning rate, or --dtype bf16 or fp32", 1)
        return norm if math.isfinite(norm) else None

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "bad_steps": self.bad_steps}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.bad_steps = state["bad_steps"]


class MuonAndAdam(torch.optim.Optimizer):
    """torch's Muon for matrices and Adam for other parameters, as one optimiser with one state.

    A step of Muon has a root mean square of 0.2 lr where Adam's is about lr, so it wants a rate five times as high.
    """

    def __init__(self, params, lr, betas):
        params = list(params)
        matrices, rest = [p for p in params if p.ndim == 2], [p for p in params if p.ndim != 2]
        self.parts = [torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]
        self.parts += [torch.optim.Adam(rest, lr=lr, betas=betas)] if rest else []
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self.share()

    def share(self):
        for part, group in zip(self.parts, self.param_groups):
            part.param_groups, part.state = [group], self.state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.share()

    def step(self, closure=None):
        for part in self.parts:
            part.step()


# -----------------------------------------------------------------------------
# adapters

class Fp32Linear(torch.nn.Linear):
    """A linear layer with fp32 weights and 16-bit inputs, which are cast for the product and kept as they came."""

    def forward(self, x):
        return _Fp32Product.apply(x, self.weight)  # (..., out)


class _Fp32Product(torch.autograd.Function):
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
    """Wrap the model with rsLoRA adapters of these names on all its linear layers; the scale is alpha / sqrt(rank).

    Adapters are fp32. peft would keep an fp32 copy of each layer's input for the backward pass; ours keeps the input.
    """
    linear = {id(x) for x in backbone(model).modules() if isinstance(x, (torch.nn.Linear, Conv1D))}
    linear -= {id(model.get_output_embeddings())}
    targets = LoraConfig(target_modules=[key for key, x in model.named_modules() if id(x) in linear])
    try:
        convert_peft_config_for_transformers(targets, model, None)  # drops names that peft would map to experts
        config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=True, target_modules=targets.target_modules,
                            task_type="CAUSAL_LM")
        model = get_peft_model(model, config, adapter_name=names[0])
    except ValueError as error:
        raise UserError(f"{flag} {model.config.name_or_path}: peft has no adapters for it: {error}") from None
    for name in names[1:]:
        model.add_adapter(name, config)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        layer.cast_input_dtype_enabled = False
        for down in layer.lora_A.values():
            down.__class__ = Fp32Linear
    return model


def untrained(model):
    """Share of the weights that no adapter trains, without embeddings and output layer, and the largest by name.

    Call it after a backward pass of an adapter whose weights are not zero.
    """
    base, total, names = causal_lm(model), 0, collections.Counter()
    ends = {id(base.get_output_embeddings().weight)}
    ends |= {id(x.weight) for x in base.modules() if isinstance(x, torch.nn.Embedding)}
    trained = {id(x.get_base_layer().weight) for x in model.modules() if isinstance(x, LoraLayer) and
               any(down.weight.grad is not None for down in x.lora_A.values())}
    for name, p in base.named_parameters():
        if "lora_" not in name and p.ndim > 1 and id(p) not in ends:
            total += p.numel()
            names[re.sub(r".*\.\d+\.|\.base_layer|\.weight$", "", name)] += p.numel() * (id(p) not in trained)
    return names.total() / max(total, 1), [name for name, count in names.most_common(4) if count]


def checkpoint_layers(model):
    """Keep only each layer's input for the backward pass and recompute the rest."""
    layers = [module for module in causal_lm(model).modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not causal_lm(model).supports_gradient_checkpointing:
        raise UserError(f"--grad_ckpt: {type(causal_lm(model)).__name__} does not support it; try --micro_batch 1")
    causal_lm(model).activation_checkpointing_enable({"use_reentrant": False})
    for layer in layers:
        layer.training = True  # this module alone: it reads the flag to decide whether to checkpoint


def load_adapter(model, folder, name):
    """Read one adapter's weights from a folder in peft's format, where it may have another name."""
    weights, config = load_file(pathlib.Path(folder) / "adapter_model.safetensors"), LoraConfig.from_pretrained(folder)
    if any(getattr(config, key) != getattr(model.peft_config[name], key) for key in ("r", "lora_alpha", "use_rslora")):
        raise ValueError(f"adapter_config.json of adapter {name} has another rank or alpha")
    expected = {key.replace(f".{name}.", ".") for key, _ in model.named_parameters()
                if "lora_" in key and f".{name}." in key}
    if weights.keys() != expected:
        raise ValueError(f"the tensors of adapter {name} are not those of the model")
    set_peft_model_state_dict(model, weights, adapter_name=name)


def adapter_parameters(model, name):
    """The parameters of one adapter, by name: `requires_grad` only says which adapter is active at the moment."""
    return [p for key, p in model.named_parameters() if "lora_" in key and f".{name}." in key]


def without_adapters(model):
    """Context in which the model is its base. Never enter it between a forward and its backward."""
    return model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()


def causal_lm(model):
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model):
    """The part of a causal LM that turns ids into hidden states."""
    decoder = causal_lm(model).get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else causal_lm(model).base_model


# -----------------------------------------------------------------------------
# states and logits

def positions(model):
    """The longest sequence that the model's config allows, in tokens."""
    return getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def has_full_attention(model):
    """Whether every layer attends to all earlier tokens, wherever padding puts them: no sliding window, no recurrent
    state, no positions counted by column.
    """
    config, forward = causal_lm(model).config.get_text_config(), backbone(model).forward
    kinds = {*(getattr(config, "layer_types", None) or []), *(getattr(config, "attention_layers", None) or [])}
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(forward).parameters:
        return False
    return kinds == {"full_attention"} or not kinds and not getattr(config, "sliding_window", None)


def hidden_states(model, ids, shared=0):
    """Last hidden states of the backbone, after its final norm: ids (B, T) to (B, T, H). No lm_head is run.

    Pad on the right and pass no mask: under causal attention what follows a token cannot reach it. The first `shared`
    ids are the same in all rows: where they are a good part of T, they are read once, with the same gradients.
    """
    decoder, (B, T) = backbone(model), ids.shape
    checkpointed = getattr(causal_lm(model), "is_activation_checkpointing", False)  # then there is no cache
    if B == 1 or shared < T / 4 or checkpointed or not has_full_attention(model):
        return decoder(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
    cache = DynamicCache()
    head = decoder(input_ids=ids[:1, :shared], past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = (x.expand(B, -1, -1, -1) for x in (layer.keys, layer.values))
    place = torch.arange(shared, T, device=ids.device)[None]  # (1, T - shared)
    tail = decoder(input_ids=ids[:, shared:], position_ids=place, past_key_values=cache, use_cache=True)
    return torch.cat([head.last_hidden_state.expand(B, -1, -1), tail.last_hidden_state], 1)  # (B, T, H)


def head_weights(model, vocab=None):
    """Weight (V, H) and bias (V,), or None, of the output layer, for the first `vocab` ids."""
    head = causal_lm(model).get_output_embeddings()
    return head.weight[:vocab], None if head.bias is None else head.bias[:vocab]  # (V, H), (V,)


def divisor(model, temperature):
    """The temperature (1 where it is greedy) over the model's own factor on its logits."""
    return (temperature or 1.0) / getattr(causal_lm(model), "logit_factor", 1.0)


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


# -----------------------------------------------------------------------------
# statistics of marked tokens

class TokenStats(NamedTuple):
    logp: torch.Tensor      # (N,) log-prob of the token, nats
    entropy: torch.Tensor   # (N,) entropy of the policy, nats
    kl: torch.Tensor        # (N,) exact KL(policy || base) over the vocabulary, nats; 0 where it is not asked for
    ref_logp: torch.Tensor  # (N,) log-prob of the token under the base; 0 where the KL is not asked for


def token_stats(model, ids, mask, blocked=None, kind=None, temperature=1.0, with_kl=False, shared=0,
                return_hidden=False):
    """TokenStats of the N marked tokens, row by row, under the active adapter.

    ids: (B, T). mask: (B, T) bool, the marked tokens; the state at t - 1 predicts the token at t. blocked: (K, V) bool,
    forbidden ids by kind of position (None: nothing is forbidden); kind: (B, T), each position's row of it (None: 0).
    with_kl: compare with the base, adapters off. shared: see hidden_states. return_hidden: return (stats, hidden), with
    the states (B, T, H). Gradients flow through logp and kl. Log-sum-exp in fp32.
    """
    def predicting(hidden):
        return hidden[:, :-1][mask[:, 1:]]  # (N, H)

    ref_hidden = None
    if with_kl:
        with torch.no_grad(), without_adapters(model):
            ref_hidden = predicting(hidden_states(model, ids, shared))  # (N, H)
    hidden = hidden_states(model, ids, shared)  # (B, T, H)
    targets = ids[mask]  # (N,)
    kind = torch.zeros_like(targets) if kind is None else kind[mask]  # (N,)
    if blocked is None:
        size = causal_lm(model).get_output_embeddings().weight.shape[0]
        blocked = torch.zeros(1, size, dtype=torch.bool, device=ids.device)  # (1, V)
    weight, bias = head_weights(model, blocked.shape[1])  # (V, H), (V,)
    stats = TokenStats(*_TokenStats.apply(
        predicting(hidden), ref_hidden, weight, bias, targets, blocked, kind, divisor(model, temperature)))  # (N,) each
    return (stats, hidden) if return_hidden else stats


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
    dz / dh = W / temperature. Entropy is logged only.
    """

    @staticmethod
    def forward(ctx, hidden, ref_hidden, weight, bias, targets, blocked, kind, temperature):
        N, V = len(targets), weight.shape[0]
        logp, entropy, kl, ref_logp = (hidden.new_zeros(N, dtype=torch.float32) for _ in range(4))  # (N,) each
        need = ctx.needs_input_grad[0]
        grads = [torch.zeros_like(hidden) if wanted else None
                 for wanted in (need, need and ref_hidden is not None)]  # (N, H) each: of logp, of kl
        size = min(max(16, CHUNK_BYTES // (4 * V)), CHUNK_ROWS)
        for first in range(0, N, size):
            rows = slice(first, first + size)
            target, mask = targets[rows, None], blocked[kind[rows]]  # (n, 1), (n, V)
            log_p = row_logps(hidden[rows], weight, bias, mask, temperature)  # (n, V)
            p = log_p.exp()  # (n, V)
            logp[rows] = log_p.gather(1, target)[:, 0]  # (n,)
            entropy[rows] = -(p * log_p).sum(-1)  # (n,)
            if ref_hidden is not None:
                log_q = row_logps(ref_hidden[rows], weight, bias, mask, temperature)  # (n, V)
                ref_logp[rows] = log_q.gather(1, target)[:, 0]  # (n,)
                ratio = log_p.sub_(log_q)  # (n, V)
                kl[rows] = (p * ratio).sum(-1)  # (n,)
                if grads[1] is not None:
                    grads[1][rows] = (p * ratio.sub_(kl[rows, None])).to(weight.dtype) @ weight / temperature  # (n, H)
            if grads[0] is not None:  # e_t - p before the cast: in bf16 a p of 0.999 is 1, and nothing would be left
                p.neg_().scatter_add_(1, target, torch.ones_like(p[:, :1]))  # (n, V)
                grads[0][rows] = p.to(weight.dtype) @ weight / temperature  # (n, H)
        ctx.grads = grads
        ctx.mark_non_differentiable(entropy, ref_logp)
        return logp, entropy, kl, ref_logp

    @staticmethod
    def backward(ctx, d_logp, d_entropy, d_kl, d_ref_logp):  # (N,) each
        total = sum(grad * up[:, None].to(grad.dtype) for grad, up in zip(ctx.grads, (d_logp, d_kl))
                    if grad is not None)  # (N, H)
        return (total,) + (None,) * 7
