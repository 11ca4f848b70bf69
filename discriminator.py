"""
Real or generated: what a discriminator is shown, what the loop wants of it, and `Head`: a LayerNorm and a linear layer
on the last hidden states. `reason.py` has the other one, which thinks and gives a verdict in words.

Both have the same three verbs. `look` makes of a batch, without gradient, a `Judged`, by which the generator is paid.
`loss` is the discriminator's own lesson, on some of the rows that were shown. `tell` is what it adds to the logs.

What differs from the textbook: the two texts of a prefix are tokenised the same way and cut to the same number of
completion tokens, so that neither length, nor the cut, nor an end token, nor odd tokens give the generated one away.

Letters: B sequences or texts, n rows that are shown (b in a micro-batch; two texts each), T tokens, H hidden.
"""
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from data import bos_ids, plain_encoder
from model import causal_lm, hidden_states, micro_batches, pad, positions
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


def verdict_ids(tokenizer, encode, prefix, completion, most=None):
    """Ids of the prompt that asks for a verdict; neither text can open or end a turn.

    most: a prefix that makes it longer than this loses its beginning.
    """
    head, middle, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in
                          VERDICT.replace("{prefix}", "{completion}").split("{completion}"))
    head, before, rest = bos_ids(tokenizer) + head, encode(prefix)[0], middle + encode(completion)[0] + tail
    over = max(len(head + before + rest) - most, 0) if most else 0
    return head + before[over:] + rest


# -----------------------------------------------------------------------------
# what the loop wants of a discriminator

class Judged(NamedTuple):
    """What a discriminator, as it stands, makes of a batch. An empty completion is not shown: it deceives nobody."""
    shown: list            # n row numbers, of the prefixes whose two texts were read
    read: torch.Tensor     # (B,) shown, and not judged in words that cannot be parsed
    counts: torch.Tensor   # (B,) in the generator's statistics: all but what cannot be parsed
    p_real: torch.Tensor   # (B,) of the completion: a head's probability, or 1 and 0 by the word of a verdict
    log_generated: torch.Tensor | None  # (B,) log(1 - p_real), of a head
    d_value: torch.Tensor | None        # (B,) chance that the verdict on the completion is right, of a value head
    shuffled: torch.Tensor | None       # (2n,) labels to learn in place of the true ones, as a control
    own: Any               # whatever else its lesson needs


def true_labels(n, device):
    """Of the texts of n rows: first the real ones, then the generated ones, as they always stand."""
    return torch.tensor([REAL] * n + [1 - REAL] * n, device=device)  # (2n,)


def shuffled_labels(n, generator, device):
    """Half of them REAL, in an order that the texts have no part in."""
    return torch.randperm(2 * n, generator=generator, device=device) % 2  # (2n,)


def told_labels(judged, rows, device):
    """The labels that the texts of some rows are learnt with."""
    if judged.shuffled is None:
        return true_labels(len(rows), device)  # (2b,)
    places = [judged.shown.index(i) for i in rows]
    return judged.shuffled[places + [len(judged.shown) + place for place in places]]  # (2b,)


class Head:
    """A `Discriminator` and what it reads; learns by cross-entropy."""
    files, samples = (), False  # names of .jsonl files of its own; whether it writes

    def __init__(self, model, tokenizer, num_tokens, micro_batch, loss_scale, shuffle, pool, kind):
        """num_tokens: most of a prefix and of a completion. pool and kind: see Discriminator, discriminator_loss."""
        self.model, self.device, self.room = model, causal_lm(model).device, positions(model)
        self.encode, self.bos, self.most = plain_encoder(tokenizer), bos_ids(tokenizer), sum(num_tokens)
        self.micro_batch, self.loss_scale, self.shuffle, self.kind = micro_batch, loss_scale, shuffle, kind
        self.head = Discriminator(causal_lm(model).config.hidden_size, pool).to(self.device)
        self.modules = {"head": self.head}

    def logits(self, texts):
        """Of texts (ids, mask of the completion), which lose their beginning where the model has no room for them."""
        ids, mask = (pad([row[-self.room:] for row in rows], 0, self.device, kind)
                     for rows, kind in zip(zip(*texts), (torch.long, torch.bool)))  # (B, T) each
        return self.head(hidden_states(self.model, ids), mask)  # (B, 2)

    @torch.no_grad()
    def look(self, batch, completions, random_for, step):
        """Judge B windows with their completions (text, number of tokens). random_for(purpose, step): a generator."""
        pairs = [pair_ids(self.encode, self.bos, w.prefix, w.sep, w.truth, text)
                 for w, (text, _) in zip(batch, completions)]  # (real ids, mask), (generated ids, mask)
        shown = [i for i, pair in enumerate(pairs) if pair]
        read = torch.tensor([bool(pair) for pair in pairs], device=self.device)  # (B,)
        logps = torch.tensor([[0.0, -torch.inf]], device=self.device).repeat(len(batch), 1)  # (B, 2) generated, surely
        for rows in micro_batches(shown, self.micro_batch):
            logps[rows] = self.logits([pairs[i][1] for i in rows]).log_softmax(-1)  # (b, 2)
        p_real, log_generated, shuffled = logps[:, REAL].exp(), logps[:, 1 - REAL], None  # (B,) each
        if self.shuffle:
            shuffled = shuffled_labels(len(shown), random_for("shuffle", step), self.device)  # (2n,)
        return Judged(shown, read, torch.ones_like(read), p_real, log_generated, None, shuffled, pairs)

    def loss(self, judged, rows):
        """Loss of the texts of some rows, as their part of all; and how many real and generated ones it gets right."""
        logits = self.logits([judged.own[i][side] for side in (0, 1) for i in rows])  # (2b, 2)
        told = told_labels(judged, rows, self.device)  # (2b,)
        loss = self.loss_scale * discriminator_loss(logits, told, self.kind) * len(rows) / len(judged.shown)  # ()
        right = logits.argmax(-1) == true_labels(len(rows), self.device)  # (2b,)
        return loss, right.float().view(2, -1).sum(1).cpu()  # (), (2,)

    def tell(self, judged, step):
        """Metrics of its own, and rows for its own files."""
        return {}, {}
