"""
What an adapter adds to its base model, exactly; sums, negations and TIES merges of it (task vectors).

What differs from the textbook:
1. A delta is alpha / sqrt(rank) * B @ A in fp32. peft's add_weighted_adapter is not used: for rsLoRA it sets alpha to
   the rank and still divides by the square root.
2. A sum of adapters is an adapter, exactly: their ranks stand side by side. Ranks may differ.
3. TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1) trims over the whole task vector, as the paper
   does and not layer by layer. Weights, which the paper has not, come after trimming and before the signs are elected;
   one weight for all is its lambda.

Letters: R rank, I inputs and O outputs of a layer, K task vectors, n entries.
"""
import math
from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """One layer's part of an adapter."""
    A: torch.Tensor  # (R, I)
    B: torch.Tensor  # (O, R)
    alpha: float     # of rsLoRA: the scale is alpha / sqrt(rank)
    rank: int


def delta(A, B, alpha, rank):
    """What an rsLoRA adapter adds to a weight: A (R, I), B (O, R) to (O, I), in fp32."""
    return alpha / math.sqrt(rank) * (B.float() @ A.float())  # (O, I)


def combine(deltas, weights):
    """The weighted sum of K deltas (O, I)."""
    return sum(weight * d for weight, d in zip(weights, deltas))  # (O, I)


def ties(deltas, weights, floors):
    """TIES-Merging of K deltas (O, I): trim what is below each floor, elect signs, mean of those that agree."""
    trimmed = torch.stack([weight * d * (d.abs() >= floor) for d, weight, floor in zip(deltas, weights, floors)])
    agrees = trimmed.sign() == trimmed.sum(0).sign()  # (K, O, I)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)  # (O, I)


def trim_floor(blocks, density):
    """The least magnitude among the `density` largest entries of a task vector; blocks() yields it in fp32 pieces.

    Exact, in two passes and little memory: the bits of positive floats, read as integers, are in the floats' order, so
    it is enough to count high halves from the top, then the low halves below the one that is found.
    """
    high, keep = None, 0
    for _ in range(2):
        counts = torch.zeros(1 << 16, dtype=torch.long)  # (65536,)
        for block in blocks():
            bits = block.abs().flatten().view(torch.int32)  # (O * I,)
            part = bits >> 16 if high is None else bits[bits >> 16 == high] & 0xFFFF  # (n,)
            counts += torch.bincount(part, minlength=1 << 16)  # (65536,)
        above = counts.flip(0).cumsum(0).flip(0)  # (65536,) how many are as large as this or larger
        keep = keep or max(1, round(density * int(above[0])))
        half = int((above >= keep).nonzero().max())
        if high is None:
            high, keep = half, keep - int(above[half] - counts[half])
    return torch.tensor(high << 16 | half, dtype=torch.int32).view(torch.float32).item()


def stacked(layers, weights, ranks):
    """A (R, I) and B (O, R), at scale 1, of the weighted sum of K layers; R sums the ranks. None: no such layer."""
    some, at = next(layer for layer in layers if layer), 0
    A, B = torch.zeros(sum(ranks), some.A.shape[1]), torch.zeros(len(some.B), sum(ranks))  # (R, I), (O, R)
    for layer, weight, rank in zip(layers, weights, ranks):
        if layer:
            own = slice(at, at + layer.rank)
            A[own], B[:, own] = layer.A, weight * layer.alpha / math.sqrt(layer.rank) * layer.B.float()
        at += rank
    return A, B  # (R, I), (O, R)
