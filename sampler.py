"""
The model as it samples: adapters folded into a copy, a KV cache that stays, and on CUDA one graph for a whole step.

What differs from the textbook:
1. The copy shares every weight that no adapter changes. Where the base is not quantised, an adapted layer holds merged
   weights, made anew from the pristine ones each time, so that no rounding adds up; else the base's layer with the
   adapter beside it in the compute dtype.
2. Keys and values are written in place: on a CPU attention sees the columns in use, in a CUDA graph always all of them.
3. What all prompts begin with is read once, by one row.
4. Of all but a prompt's last token the last layer's keys and values are enough: what follows them is not computed.
5. On a CPU attention from one token a row is two plain products: torch's kernel is made for many tokens. A layer's
   product of few rows is taken the other way round, weights first, which is faster with several threads.

Letters: B sequences, P prompt width, S columns that all prompts share, W columns of the cache, H hidden, D of a head.
"""
import copy
import os
import weakref

import torch
from peft.tuners.lora import LoraLayer
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from model import causal_lm, pad, sees_all

BUCKET = 64  # the cache's width is a multiple of it, so that prompts of about one length share a cache and its graph


# -----------------------------------------------------------------------------
# the copy

class Beside(torch.nn.Module):
    """A quantised layer and the product of one adapter, both in the compute dtype; the scale is folded into `up`."""

    def __init__(self, layer, dtype):
        super().__init__()
        (down, *_), (up, *_) = layer.lora_A.values(), layer.lora_B.values()
        self.base = layer.get_base_layer()
        self.register_buffer("down", torch.zeros_like(down.weight, dtype=dtype, requires_grad=False))  # (r, in)
        self.register_buffer("up", torch.zeros_like(up.weight, dtype=dtype, requires_grad=False))  # (out, r)

    def forward(self, x):
        low = torch.nn.functional.linear(x.to(self.down.dtype), self.down)  # (..., r)
        return self.base(x) + torch.nn.functional.linear(low, self.up).to(x.dtype)  # (..., out)

    def follow(self, layer, name):
        self.up.zero_()
        if name is not None:
            self.down.copy_(layer.lora_A[name].weight)
            self.up.copy_(layer.lora_B[name].weight * layer.scaling[name])


class Turned(torch.nn.Linear):
    """A layer on a CPU, for few rows a call."""

    def forward(self, x):
        return turned(x, self.weight, self.bias)  # (..., out)


def turned(x, weight, bias=None):
    """linear(x, weight, bias), its product as weight times x where that is faster: (..., in) to (..., out)."""
    several = x.dtype == torch.float32 and x.device.type == "cpu" and torch.get_num_threads() > 1
    if not several or bias is not None or x.numel() > 64 * x.shape[-1]:
        return torch.nn.functional.linear(x, weight, bias)
    return (weight @ x.flatten(0, -2).mT).mT.contiguous().unflatten(0, x.shape[:-1])


def merge_into(merged, layer, name):
    """Write a layer's pristine weights plus one adapter's, added in fp32, into its merged twin."""
    weight, like_linear = layer.get_base_layer().weight, isinstance(merged, torch.nn.Linear)  # (out, in)
    if name is None:
        merged.weight.copy_(weight)
    elif like_linear and weight.dtype == torch.float32:  # in one pass
        up, down = layer.lora_B[name].weight, layer.lora_A[name].weight  # (out, r), (r, in)
        torch.addmm(weight, up, down, alpha=layer.scaling[name], out=merged.weight)
    else:
        merged.weight.copy_(weight.float() + layer.get_delta_weight(name))


def sampling_copy(model, dtype, merge):
    """A causal LM like the one inside `model`, and the pairs (twin, layer with adapters) in which the two differ."""
    base, twins, memo = causal_lm(model), [], {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            twin = copy.deepcopy(layer) if merge and layer.weight.is_floating_point() else Beside(module, dtype)
            if type(twin) is torch.nn.Linear:
                twin.__class__ = Turned
            twins.append((twin, module))
            memo[id(module)] = twin  # deepcopy takes it for the copy that it has made already
    memo |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    twin = copy.deepcopy(base, memo)
    if getattr(twin, "is_activation_checkpointing", False):
        twin.activation_checkpointing_disable()
    if twin.device.type == "cpu" and twin.config._attn_implementation == "sdpa":
        twin.set_attn_implementation("products")
    return twin, twins


def products(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """transformers' sdpa; plain products where `Standing` reads a token a row: query (B, heads, 1, D), key and value
    (B, fewer heads, S, D), a mask (B, 1, 1, S) to add.
    """
    (B, heads, T, D), few, mask = query.shape, key.shape[1], attention_mask
    unlike = any(kwargs.get(name) is not None for name in ("position_bias", "softcap"))
    if unlike or T > 1 or mask is None or not mask.is_floating_point() or mask.shape[1] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
    query = query.reshape(B, few, heads // few, D) * (D ** -0.5 if scaling is None else scaling)
    share = (query @ key.transpose(2, 3) + mask).softmax(-1, dtype=torch.float)  # (B, few, heads / few, S)
    return (share.to(value.dtype) @ value).reshape(B, 1, heads, D), None


AttentionInterface.register("products", products)
AttentionMaskInterface.register("products", sdpa_mask)


# -----------------------------------------------------------------------------
# two ways of reading on: with a cache that grows, and with one that stands

class Growing:
    """transformers' own cache and mask: works with every model, and is what the other way is tested against."""

    def __init__(self, model):
        self.model, self.device = causal_lm(model).base_model, causal_lm(model).device

    def begin(self, prompts, pad_id):
        """Read the prompts: hidden states (B, H) of their last tokens."""
        ids, self.seen, place = left_padded(prompts, pad_id, self.device)  # (B, P) each
        self.cache, self.place = None, place[:, -1:]  # (B, 1)
        return self.forward(ids, place)  # (B, H)

    def read(self, token):
        """Read one token a row: (B,) to hidden states (B, H)."""
        self.seen = torch.cat([self.seen, torch.ones_like(token[:, None])], 1)  # (B, P + t)
        self.place = self.place + 1  # (B, 1)
        return self.forward(token[:, None], self.place)  # (B, H)

    def forward(self, ids, place):
        out = self.model(input_ids=ids, attention_mask=self.seen, position_ids=place, past_key_values=self.cache,
                         use_cache=True)
        self.cache = out.past_key_values
        return out.last_hidden_state[:, -1]  # (B, H)


class Enough(Exception):
    """The last layer's keys and values are written."""


class Slab(CacheLayerMixin):
    """Keys and values of one layer, (B, heads, W, D) from the start. Its owner says which columns are being written."""

    def __init__(self, owner):
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, keys, values):
        B, heads, W = self.owner.rows, keys.shape[1], self.owner.width
        self.keys = keys.new_zeros(B, heads, W, keys.shape[-1])      # (B, heads, W, D)
        self.values = values.new_zeros(B, heads, W, values.shape[-1])  # (B, heads, W, D)
        self.is_initialized = True

    def update(self, keys, values, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        at, end = self.owner.at, self.owner.end
        if isinstance(at, slice):
            self.keys[:, :, at], self.values[:, :, at] = keys, values  # what all rows share is one row: it is broadcast
        else:
            self.keys.index_copy_(2, at, keys)
            self.values.index_copy_(2, at, values)
        if self.owner.fills and self is self.owner.cache.layers[-1]:
            raise Enough
        return self.keys[:len(keys), :, :end], self.values[:len(keys), :, :end]  # (B or 1, heads, end, D) each

    def get_seq_length(self):
        return 0  # positions and mask are given: nobody needs to count

    def get_mask_sizes(self, query_length):
        return self.owner.end, 0

    def get_max_length(self):
        return self.owner.width


class Standing:
    """A cache of fixed size for `rows` rows and `width` columns, all of whose state is in tensors that stay."""

    def __init__(self, model, rows, width, reads_all=False):
        self.model, self.rows, self.width = causal_lm(model).base_model, rows, width
        weight, config = causal_lm(model).get_output_embeddings().weight, causal_lm(model).config.get_text_config()
        device, owner = weight.device, weakref.proxy(self)  # no ring of references: what is let go is freed at once
        self.cache = Cache(layers=[Slab(owner) for _ in range(config.num_hidden_layers)])
        self.mask = torch.zeros(rows, 1, 1, width, dtype=weight.dtype, device=device)  # (B, 1, 1, W) added
        self.place = torch.zeros(rows, 1, dtype=torch.long, device=device)  # (B, 1)
        self.column = torch.zeros(1, dtype=torch.long, device=device)       # (1,) the one that was written last
        self.reads_all = reads_all  # columns, in use or not: for a CUDA graph, in which every shape must stay
        self.fills = False  # the cache, and needs no hidden states

    def begin(self, prompts, pad_id):
        """Read the prompts: hidden states (B, H) of their last tokens."""
        device, heads = self.mask.device, [prompt[:-1] for prompt in prompts]
        S = len(os.path.commonprefix(heads))
        ids, seen, place = left_padded([head[S:] for head in heads], pad_id, device)  # (B, P) each
        P = ids.shape[1]
        if self.reads_all:  # columns beyond the used ones are read too, and 0 times infinity is nan
            for slab in (slab for slab in self.cache.layers if slab.is_initialized):
                slab.keys.zero_()
                slab.values.zero_()
        if S:
            self.fill(*left_padded([heads[0][:S]], pad_id, device), 0)
        if P:
            self.fill(ids, seen, place, S)
        self.mask.fill_(torch.finfo(self.mask.dtype).min)
        self.mask[..., :S] = 0
        self.mask[:, 0, 0, S:S + P].masked_fill_(seen.bool(), 0)
        self.place.copy_(torch.tensor([[len(head) - 1] for head in heads]))
        self.column.fill_(S + P - 1)
        self.end = S + P
        return self.read(torch.tensor([prompt[-1] for prompt in prompts], device=device))  # (B, H)

    def fill(self, ids, seen, place, S):
        """Write the keys and values of ids (b, P) behind S columns that all rows share; one row is written to all."""
        (b, P), device = ids.shape, ids.device
        allowed = torch.ones(P, P, dtype=torch.bool, device=device).tril() & seen.bool()[:, None]  # (b, P, P)
        allowed |= torch.eye(P, dtype=torch.bool, device=device)  # a row of padding that sees nothing would be nan
        mask = torch.zeros(b, 1, P, S + P, dtype=self.mask.dtype, device=device)  # (b, 1, P, S + P)
        mask[:, 0, :, S:].masked_fill_(~allowed, torch.finfo(mask.dtype).min)
        self.at, self.end, self.fills = slice(S, S + P), S + P, True
        try:
            self.forward(ids, mask, place + S)
        except Enough:
            pass
        finally:
            self.fills = False

    def read(self, token):
        """Read one token a row: (B,) to hidden states (B, H)."""
        self.place.add_(1)
        self.column.add_(1)
        self.mask.index_fill_(3, self.column, 0)
        if self.reads_all:
            self.at, self.end = self.column, self.width
        else:
            self.at, self.end = slice(self.end, self.end + 1), self.end + 1
        return self.forward(token[:, None], self.mask[..., :self.end], self.place)  # (B, H)

    def forward(self, ids, mask, place):
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=place, past_key_values=self.cache,
                         use_cache=True)
        return out.last_hidden_state[:, -1]  # (B, H)


class Sampler:
    """A model to sample from, in place of the one that learns: faster, and with the same distribution.

    Give it to `rollout` as its model. `follow(adapter)` makes it the model with that adapter, or with none. dtype: what
    adapters are computed in where they are not merged. merge: where the base is not quantised; off, as where it is.
    """

    def __init__(self, model, dtype, merge=True):
        self.loops = {}  # of `rollout`: caches and graphs, by shape and settings
        self.model, self.twins = sampling_copy(model, dtype, merge)
        self.num_bytes = sum(p.numel() * p.element_size() for twin, _ in self.twins if not isinstance(twin, Beside)
                             for p in twin.parameters())
        self.stands = self.agrees()
        waits = any(getattr(getattr(m, "state", None), "threshold", 0) for m in self.model.modules())
        self.captures = causal_lm(self.model).device.type == "cuda" and not waits  # LLM.int8() looks for outliers

    @torch.no_grad()
    def sync(self, name):
        """Take over an adapter's weights as they are now; None: the bare base."""
        for twin, layer in self.twins:
            if isinstance(twin, Beside):
                twin.follow(layer, name)
            else:
                merge_into(twin, layer, name)

    @torch.no_grad()
    def agrees(self):
        """Whether the standing cache gives what transformers' own gives, on prompts that differ in length."""
        if not sees_all(self.model):
            print("sampling goes the slow way: this model has layers that do not see all of a text")
            return False
        prompts, token = [[1, 2, 3, 4, 5], [1, 2, 6]], torch.tensor([3, 4], device=causal_lm(self.model).device)  # (2,)
        told = []
        try:
            for reader in (Growing(self.model), Standing(self.model, 2, BUCKET)):
                reader.begin(prompts, 0)
                told.append(torch.stack([reader.read(token) for _ in range(2)]).float())  # (2, 2, H)
            same = torch.allclose(*told, rtol=0.05, atol=0.05 * told[0].abs().max().item())
            why = "it gives other hidden states"
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            same, why = False, type(error).__name__
        if not same:
            print(f"sampling goes the slow way: this model cannot use a cache of fixed size ({why})")
        return same


def left_padded(prompts, pad_id, device):
    """Lists of ids, left-padded so that all end together: ids, attention mask and positions, (B, P) each."""
    ids = pad([prompt[::-1] for prompt in prompts], pad_id, device).flip(1)   # (B, P)
    seen = pad([[1] * len(prompt) for prompt in prompts], 0, device).flip(1)  # (B, P)
    place = (seen.cumsum(1) - 1).clamp(min=0)                                 # (B, P)
    return ids, seen, place
