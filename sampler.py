"""
The model as it samples: adapters merged into a copy of their layers or beside them, a static cache of keys and values,
and on CUDA one graph for a whole decode step.

What differs from the textbook:
1. The copy shares every weight that no adapter changes. A merged layer is recomputed from the pristine weights at each
   sync, so that rounding errors do not accumulate. Without `merge`, and on quantised layers, an adapter runs
   beside its layer.
2. On CUDA the cache is transformers' StaticCache, whose tensors stay where they are, so that a graph can replay a step.
   On a CPU, and for models that have none, it is transformers' growing cache.

Letters: B sequences, P prompt width, W columns of the cache, H hidden.
"""
import copy
import os

import torch
from peft.tuners.lora import LoraLayer
from transformers import DynamicCache, StaticCache

from model import backbone, causal_lm, head_weights, pad, has_full_attention

BUCKET = 64  # the cache's width is a multiple of it, so that prompts of about one length share a cache and its graph
MAX_CACHES = 6     # number of shapes whose static caches are kept


# -----------------------------------------------------------------------------
# the copy

class AdapterBeside(torch.nn.Module):
    """A layer plus the product of one adapter in fp32, rounded as the learner rounds; the scale is folded into `up`."""

    def __init__(self, layer):
        super().__init__()
        (down, *_), (up, *_) = layer.lora_A.values(), layer.lora_B.values()
        self.base = layer.get_base_layer()
        self.register_buffer("down", torch.zeros_like(down.weight, requires_grad=False))  # (r, in)
        self.register_buffer("up", torch.zeros_like(up.weight, requires_grad=False))  # (out, r)

    def forward(self, x):
        low = torch.nn.functional.linear(x.float(), self.down)  # (..., r)
        return self.base(x).add_(torch.nn.functional.linear(low, self.up))  # (..., out) in x's dtype

    def sync(self, layer, name):
        self.up.zero_()
        if name is not None:
            self.down.copy_(layer.lora_A[name].weight)
            self.up.copy_(layer.lora_B[name].weight * layer.scaling[name])


def merge_into(merged, layer, name):
    """Write a layer's pristine weights plus one adapter's, added in fp32, into its merged copy."""
    weight, is_linear = layer.get_base_layer().weight, isinstance(merged, torch.nn.Linear)  # (out, in)
    if name is None:
        merged.weight.copy_(weight)
    elif is_linear and weight.dtype == torch.float32:  # in one pass
        up, down = layer.lora_B[name].weight, layer.lora_A[name].weight  # (out, r), (r, in)
        torch.addmm(weight, up, down, alpha=layer.scaling[name], out=merged.weight)
    else:
        merged.weight.copy_(weight.float() + layer.get_delta_weight(name))


def sampling_copy(model, merge):
    """A causal LM like the one inside `model`, and the pairs (its layer, layer with adapters) where the two differ."""
    base, pairs, memo = causal_lm(model), [], {}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            layer = module.get_base_layer()
            mergeable = merge and layer.weight.is_floating_point()
            pairs.append((copy.deepcopy(layer) if mergeable else AdapterBeside(module), module))
            memo[id(module)] = pairs[-1][0]  # deepcopy then uses this layer instead of copying the module
    memo |= {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    sampled = copy.deepcopy(base, memo)
    if getattr(sampled, "is_activation_checkpointing", False):
        sampled.activation_checkpointing_disable()
    return sampled, pairs


# -----------------------------------------------------------------------------
# two readers: a static cache, and transformers' own that grows

def left_padded(prompts, pad_id, device):
    """Lists of ids, padded on the left so that all end together: ids, attention mask and positions, (B, P) each."""
    ids = pad([prompt[::-1] for prompt in prompts], pad_id, device).flip(1)   # (B, P)
    seen = pad([[1] * len(prompt) for prompt in prompts], 0, device).flip(1)  # (B, P)
    place = (seen.cumsum(1) - 1).clamp(min=0)                                 # (B, P)
    return ids, seen, place


class GrowingReader:
    """transformers' own cache and mask: works with every model."""

    def __init__(self, model):
        self.model = model

    def begin(self, prompts, pad_id):
        """Read the prompts: hidden states (B, H) of their last tokens. What all of them begin with is read once."""
        S = len(os.path.commonprefix([prompt[:-1] for prompt in prompts])) if has_full_attention(self.model) else 0
        self.cache = DynamicCache(config=self.model.config)
        if S:
            backbone(self.model)(input_ids=torch.tensor([prompts[0][:S]], device=self.model.device),
                                 past_key_values=self.cache)
            self.cache.batch_repeat_interleave(len(prompts))
        ids, seen, place = left_padded([prompt[S:] for prompt in prompts], pad_id, self.model.device)  # (B, P - S) each
        self.seen = torch.nn.functional.pad(seen, (S, 0), value=1)  # (B, P)
        self.place = place[:, -1:] + S  # (B, 1)
        return self.forward(ids, place + S)  # (B, H)

    def read(self, token):
        """Read one token a row: (B,) to hidden states (B, H)."""
        self.seen = torch.cat([self.seen, torch.ones_like(token[:, None])], 1)  # (B, P + t)
        self.place = self.place + 1  # (B, 1)
        return self.forward(token[:, None], self.place)  # (B, H)

    def forward(self, ids, place):
        return backbone(self.model)(input_ids=ids, attention_mask=self.seen, position_ids=place,
                                    past_key_values=self.cache).last_hidden_state[:, -1]  # (B, H)


class StaticReader:
    """A StaticCache for B rows and W columns; all its state is in tensors that stay where they are."""

    def __init__(self, model, rows, width):
        self.model, (weight, _) = model, head_weights(model)
        self.cache = StaticCache(config=model.config, max_cache_len=width)
        self.mask = torch.zeros(rows, 1, 1, width, dtype=weight.dtype, device=weight.device)  # (B, 1, 1, W) added
        self.place = torch.zeros(rows, 1, dtype=torch.long, device=weight.device)  # (B, 1)
        self.column = torch.zeros(1, dtype=torch.long, device=weight.device)       # (1,) the one written last

    def begin(self, prompts, pad_id):
        """Read the prompts: hidden states (B, H) of their last tokens."""
        ids, seen, place = left_padded(prompts, pad_id, self.mask.device)  # (B, P) each
        self.cache.reset()
        (B, P), W, low = ids.shape, self.mask.shape[-1], torch.finfo(self.mask.dtype).min
        self.mask.fill_(low)[:, 0, 0, :P].masked_fill_(seen.bool(), 0)
        causal = torch.full((P, W), low, dtype=self.mask.dtype, device=ids.device).triu(1)  # (P, W)
        mask = torch.minimum(self.mask.expand(B, 1, P, W), causal)  # (B, 1, P, W)
        mask[:, 0].diagonal(dim1=1, dim2=2).zero_()  # a row of padding that sees nothing would be nan
        self.place.copy_(place[:, -1:])
        self.column.fill_(P - 1)
        return self.forward(ids, mask, place)  # (B, H)

    def read(self, token):
        """Read one token a row: (B,) to hidden states (B, H)."""
        self.place.add_(1)
        self.column.add_(1)
        self.mask.index_fill_(3, self.column, 0)
        return self.forward(token[:, None], self.mask, self.place)  # (B, H)

    def forward(self, ids, mask, place):
        return backbone(self.model)(input_ids=ids, attention_mask=mask, position_ids=place,
                                    past_key_values=self.cache).last_hidden_state[:, -1]  # (B, H)


class Step:
    """One decode step, a function without arguments; on CUDA it is captured in a graph once, and then replayed."""

    def __init__(self, step, sampler):
        self.step, self.sampler, self.graph, self.tried = step, sampler, None, False

    def __call__(self):
        (self.graph.replay if self.graph else self.step)()

    def capture(self):
        """Capture the step if that has not been tried. Returns True if it advanced the state: begin again."""
        if self.tried or not self.sampler.captures:
            return False
        self.tried, graph = True, torch.cuda.CUDAGraph()
        here, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            for _ in range(2):  # warm up
                self.step()
        here.wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                self.step()
            self.graph = graph
        except RuntimeError as error:
            torch.cuda.set_stream(here)  # a capture that fails at its end leaves torch's own stream current
            cause = error.__context__ or error  # the end's error hides the first
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            self.sampler.captures = False  # another shape would fail, too
            print(f"sampling without a CUDA graph: {str(cause).strip().splitlines()[0]}")
        return True


class Sampler:
    """A copy of the learning model to sample from: faster, and with its distribution but for rounding.

    `sync(adapter)` makes it the model with that adapter, or with none. merge: merged layers where the base is not
    quantised, else adapters beside them. static: use a StaticCache (None: on CUDA).
    """

    def __init__(self, model, merge=True, static=None):
        self.source, (self.model, self.pairs) = model, sampling_copy(model, merge)
        wanted = self.model.device.type == "cuda" if static is None else static
        self.static = wanted and has_full_attention(self.model) and self.model._can_compile_fullgraph
        if wanted and not self.static:
            print("sampling with a growing cache: this model has no static one")
        outliers = any(getattr(getattr(m, "state", None), "threshold", 0) for m in self.model.modules())  # LLM.int8()
        self.captures = (self.static and self.model.device.type == "cuda" and not outliers
                         and not torch.are_deterministic_algorithms_enabled())
        self.caches = {}

    @torch.no_grad()
    def sync(self, name):
        """Take over an adapter's weights as they are now; None: the bare base."""
        for sampled, layer in self.pairs:
            if isinstance(sampled, AdapterBeside):
                sampled.sync(layer, name)
            else:
                merge_into(sampled, layer, name)

    def decoder(self, key, rows, width, make_reply):
        """(reader, reply, Step) for so many rows and columns; static ones are kept for the same key and shape.

        make_reply() makes the state of the replies, whose `advance` takes hidden states (B, H) and writes `token` (B,).
        """
        width = -(-width // BUCKET) * BUCKET
        key = (key, rows, width)
        found = self.caches.pop(key, None)
        if found is None:
            reader = StaticReader(self.model, rows, width) if self.static else GrowingReader(self.model)
            reply = make_reply()
            found = reader, reply, Step(lambda: reply.advance(reader.read(reply.token)), self)
        if self.static:  # the last one used stands last, and the oldest is dropped
            self.caches = dict([*self.caches.items()][1 - MAX_CACHES:]) | {key: found}
        return found

    def release(self):
        """Drop the kept caches, whose shapes will not come back."""
        self.caches.clear()
