"""
Real or generated: a LayerNorm and a linear head on the last hidden states of the discriminator's adapter.

What differs from the textbook: the two texts of a prefix are tokenised the same way and cut to the same number of
completion tokens, so that neither length, nor the cut, nor an end token, nor odd tokens give the generated one away.

Letters: B texts, T tokens, H hidden.
"""
import torch
from torch import nn
from torch.nn import functional as F

from data import bos_ids
from reward import REAL

# the form in which a verdict is asked for; the reply goes on after <think>
VERDICT = """<|im_start|>system
You tell real completions of a text from generated ones.
Think in a few words, then answer: real or generated.
<|im_start|>user
<prefix>
{prefix}
</prefix>
<completion>
{completion}
</completion>
<|im_start|>assistant
<think>
"""


class Discriminator(nn.Module):
    """Hidden states (B, T, H) and the mask of completion tokens (B, T) to logits (B, 2): 0 generated, 1 real.

    pool: `last` reads the last completion token's state, `mean` the mean over the completion's. The linear layer starts
    at zero, so that p_real starts at exactly one half.
    """

    def __init__(self, hidden_size, pool):
        super().__init__()
        self.pool = pool
        self.norm = nn.LayerNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden, mask):
        hidden = hidden.float()  # (B, T, H)
        if self.pool == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, H)
        else:
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]  # (B, H)
        return self.linear(self.norm(pooled))  # (B, 2)


def pair_ids(encode, bos, prefix, sep, truth, completion):
    """Ids of a prefix's real and generated text, with masks of their completion tokens, as the head reads them.

    Each is `prefix + sep + text` tokenised as one plain text, both cut to the smaller number of completion tokens.
    Returns ((real_ids, real_mask), (generated_ids, generated_mask)), or None where the completion is empty.
    """
    before, read = prefix + sep, []
    for text in (truth, completion):
        ids, offsets = encode(before + text)
        mask = [end > len(before) for _, end in offsets]  # a token across the border is the completion's
        read.append((ids, mask))
    n = min(sum(mask) for _, mask in read)
    if n == 0:
        return None
    texts = []
    for ids, mask in read:
        stop = mask.index(True) + n
        texts.append((bos + ids[:stop], [False] * len(bos) + mask[:stop]))
    return tuple(texts)


def discriminator_loss(logits, labels, kind):
    """Loss of logits (B, 2): a scalar.

    ce: mean cross-entropy with labels (B,). pair: Bradley-Terry on the two texts of a prefix (GAD, arXiv 2511.10643),
    which takes the first half for the real ones and the second for the generated ones, in the same order.
    """
    if kind == "ce":
        return F.cross_entropy(logits, labels)  # ()
    real, generated = (logits[:, REAL] - logits[:, 1 - REAL]).chunk(2)  # (B/2,) each
    return -F.logsigmoid(real - generated).mean()  # ()


def verdict_ids(tokenizer, encode, prefix, completion):
    """Ids of the prompt that asks for a verdict; neither text can open or end a turn."""
    head, middle, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in
                          VERDICT.replace("{prefix}", "{completion}").split("{completion}"))
    return bos_ids(tokenizer) + head + encode(prefix)[0] + middle + encode(completion)[0] + tail
