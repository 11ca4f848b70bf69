"""
Real or generated: what a discriminator reads, and the two discriminators. `Head` is a LayerNorm and a linear layer on
the last hidden states. `Reason` thinks within a budget, then says `real` or `generated`.

Both have three methods. `score` judges a batch without gradient: a `Judged`, from which the generator's reward is made.
`loss` is the discriminator's own loss on some of the prefixes. `metrics` is what it adds to the logs.

What differs from the textbook:
1. The two texts of a prefix are tokenised the same way and cut to the same number of completion tokens, so that neither
   length, nor the cut, nor an end token, nor odd tokens give the generated one away.
2. `Reason` learns by policy gradient: reward 1 for a right verdict, 0 for a wrong one or for none. Its baseline is
   `d_value`, a value head's chance that the verdict will be right, read at the end of the prompt. The value head learns
   by cross-entropy, as in PPO; there is no ratio. The KL to the base keeps verdicts from becoming one word.

Letters: B sequences, n prefixes whose texts are shown (b in a micro-batch; two texts each, all the real ones first),
T tokens, N sampled ones, H hidden.
"""
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from data import bos_ids, clip, plain_encoder
from model import divisor, head_logits, head_weights, hidden_states, micro_batches, pad, positions
from ranks import everyone, mine
from reward import REAL, policy_loss
from rollout import Rollout, rng_for, rollout, rules, sampled_stats
from sampler import Sampler

WORDS = {REAL: "real", 1 - REAL: "generated"}
UNPARSED = -1     # the verdict of a reply that is neither word
VALUE_COEF = 0.5  # weight of the value head's loss

# the prompt that asks for a verdict; the reply continues after <think>
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


class Judged(NamedTuple):
    """Judgements of a batch. An empty completion is not shown: it deceives nobody and earns nothing."""
    shown: list            # n row numbers, those whose completion is not empty
    read: torch.Tensor     # (B,) bool: was judged, and its verdict parsed
    counts: torch.Tensor   # (B,) bool: used in the generator's step; all but unparsed verdicts
    p_real: torch.Tensor   # (B,) probability that the completion is real; 1 or 0 by a verdict in words
    log_generated: torch.Tensor | None  # (B,) log(1 - p_real); Head only
    d_value: torch.Tensor | None        # (B,) chance that the verdict on the completion is right; Reason only
    labels: torch.Tensor   # (B, 2) labels to learn for the real and the generated text; shuffled by --d_shuffle
    detail: Any            # what the loss needs besides


def make_judge(args, player, sampler):
    """The discriminator that the flags ask for. sampler: the generator's; Reason shares it if both play one model."""
    if args.disc == "head":
        return Head(args, player)
    if sampler.source is not player.model:
        sampler = Sampler(player.model, args.merge)
    return Reason(args, player, sampler)


def training_labels(args, shown, B, device, first):
    """Labels (B, 2) to learn for real and generated text; --d_shuffle swaps those of a random half of the pairs.

    Exactly half are, because a surplus of right labels may teach what is real (docs/results.md; not proved).
    """
    labels, rng = torch.tensor([[REAL, 1 - REAL]], device=device).repeat(B, 1), rng_for(args.seed, "shuffle", first)
    if args.d_shuffle:
        order = torch.randperm(len(shown), generator=rng)  # (n,)
        half = (len(shown) + torch.randint(2, (), generator=rng)) // 2  # a coin rounds
        swapped = [shown[k] for k in order[:half]]
        labels[swapped] = labels[swapped].flip(1)  # (n / 2, 2)
    return labels


# -----------------------------------------------------------------------------
# the head

def pair_ids(encode, bos, prefix, sep, truth, completion):
    """Ids of a prefix's real and generated text, with masks of their completion tokens, as the head reads them.

    Each is `prefix + sep + text` tokenised as one plain text, both cut to the smaller number of completion tokens.
    Returns ((real_ids, real_mask), (generated_ids, generated_mask)), or None where the completion is empty.
    """
    before, read = prefix + sep, []
    for text in (truth, completion):
        ids, offsets = encode(before + text)
        mask = [end > len(before) for _, end in offsets]  # a token across the border belongs to the completion
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
    """Loss of logits (2b, 2), the real texts first, with labels (2b,): a scalar.

    ce: mean cross-entropy. pair: Bradley-Terry on the two texts of a prefix (GAD, arXiv 2511.10643), without labels.
    """
    if kind == "ce":
        return F.cross_entropy(logits, labels)  # ()
    real, generated = (logits[:, REAL] - logits[:, 1 - REAL]).chunk(2)  # (b,) each
    return -F.logsigmoid(real - generated).mean()  # ()


class Head(nn.Module):
    """A LayerNorm and a linear layer on the last hidden states, trained by cross-entropy.

    --d_pool: the last completion token's state, or the mean of the states of all its tokens. The linear layer starts
    at zero, so that p_real starts at exactly one half.
    """

    def __init__(self, args, player):
        super().__init__()
        self.args, self.player, self.device = args, player, player.device
        self.encode, self.bos = plain_encoder(player.tokenizer), bos_ids(player.tokenizer)
        self.max_tokens = args.prefix_tokens + args.completion_tokens  # length of the longest sequence
        size = head_weights(player.model)[0].shape[1]
        self.norm, self.linear = nn.LayerNorm(size), nn.Linear(size, 2)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.to(self.device)

    def forward(self, hidden, mask):
        """Hidden states (B, T, H) and the mask of completion tokens (B, T) to logits (B, 2): 0 generated, 1 real."""
        hidden = hidden.float()  # (B, T, H)
        if self.args.d_pool == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, H)
        else:
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]  # (B, H)
        return self.linear(self.norm(pooled))  # (B, 2)

    def logits(self, texts):
        """Logits (B, 2) of texts (ids, mask), which lose their beginning where the model has no room for them."""
        room = positions(self.player.model)
        ids, mask = (pad([row[-room:] for row in rows], 0, self.device, kind)
                     for rows, kind in zip(zip(*texts), (torch.long, torch.bool)))  # (B, T) each
        return self(hidden_states(self.player.model, ids), mask)  # (B, 2)

    @torch.no_grad()
    def score(self, windows, texts, first):
        """Judge the completions (B texts) of the B windows from position `first` on, by the current weights."""
        pairs = [pair_ids(self.encode, self.bos, w.prefix, w.sep, w.truth, text) for w, text in zip(windows, texts)]
        shown = [i for i, pair in enumerate(pairs) if pair]
        read = torch.tensor([bool(pair) for pair in pairs], device=self.device)  # (B,)
        logps = torch.tensor([[0.0, -torch.inf]], device=self.device).repeat(len(pairs), 1)  # (B, 2) surely generated
        for rows in micro_batches(mine(shown), self.args.micro_batch):
            logps[rows] = self.logits([pairs[i][1] for i in rows]).log_softmax(-1)  # (b, 2)
        logps[shown] = everyone(logps[mine(shown)])  # (n, 2)
        labels = training_labels(self.args, shown, len(pairs), self.device, first)  # (B, 2)
        return Judged(shown, read, torch.ones_like(read), logps[:, REAL].exp(), logps[:, 1 - REAL], None, labels, pairs)

    def loss(self, judged, rows):
        """These rows' part of the batch's loss; and how many of their real and generated texts it got right."""
        logits = self.logits([judged.detail[i][side] for side in (0, 1) for i in rows])  # (2b, 2)
        loss = discriminator_loss(logits, judged.labels[rows].mT.flatten(), self.args.d_loss)  # ()
        guessed_real = (logits.argmax(-1) == REAL).view(2, -1)  # (2, b)
        right = torch.stack([guessed_real[0].sum(), (~guessed_real[1]).sum()]).float().cpu()  # (2,)
        return self.args.d_loss_scale * loss * len(rows) / len(judged.shown), right  # (), (2,)

    def metrics(self, judged, step):
        """Metrics of its own, and the rows of verdicts.jsonl: none."""
        return {}, []


# -----------------------------------------------------------------------------
# the discriminator that reasons

def parse_verdict(reply):
    """REAL, 1 - REAL or UNPARSED. A verdict is one of the two words in lower case, and nothing else but white space.

    A stop id need not follow: the budget has room for one more token than the longer word takes.
    """
    return next((label for label, word in WORDS.items() if reply.strip() == word), UNPARSED)


def cut_alike(encode, sep, truth, completion, most):
    """Both texts cut to the same number of tokens, at most `most`, as tokenised behind sep; None where one is empty."""
    texts, size = (truth, completion), most
    while True:  # repeated, as the end of a cut text may be tokenised in another way
        texts = [clip(encode, sep, text, size)[0] for text in texts]
        sizes = [clip(encode, sep, text, most)[1] for text in texts]
        if sizes[0] == sizes[1]:
            return tuple(texts) if sizes[0] else None
        size = min(sizes)


def verdict_ids(tokenizer, encode, prefix, completion, most=None):
    """Ids of the prompt that asks for a verdict; neither text can open or end a turn.

    most: maximum length; a longer prompt loses the beginning of its prefix.
    """
    head, middle, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in
                          VERDICT.replace("{prefix}", "{completion}").split("{completion}"))
    head, before, rest = bos_ids(tokenizer) + head, encode(prefix)[0], middle + encode(completion)[0] + tail
    over = max(len(head + before + rest) - most, 0) if most else 0
    return head + before[over:] + rest


class Verdicts(NamedTuple):
    """Verdicts on 2n texts."""
    roll: Rollout
    ends: torch.Tensor       # (2n,) where each prompt's last token stands
    verdict: torch.Tensor    # (2n,) REAL, 1 - REAL or UNPARSED
    value: torch.Tensor      # (2n,) d_value
    immediate: torch.Tensor  # (2n,) chance of `real`, out of the two words, right after an empty thinking


class Reason(nn.Module):
    """Thinks, then gives its verdict; learns by policy gradient."""

    def __init__(self, args, player, sampler):
        super().__init__()
        self.args, self.player, self.device, self.sampler = args, player, player.device, sampler
        self.encode, self.rules = plain_encoder(player.tokenizer), rules(player.tokenizer, player.model)
        self.think_tokens = args.reasoning_tokens if args.d_think_tokens is None else args.d_think_tokens
        words = [[i for i, (_, end) in zip(*self.encode("\n\n" + WORDS[label])) if end > 2] for label in (0, 1)]
        first = next(i for i, (a, b) in enumerate(zip(*words)) if a != b)  # where the two words begin to differ
        self.opening, self.choice = self.rules.close.tolist() + words[0][:first], [word[first] for word in words]
        self.verdict_tokens = max(map(len, words)) + 1
        self.num_positions = 2 * args.batch_size * (self.think_tokens + self.verdict_tokens)
        reply = self.think_tokens + len(self.rules.close) + self.verdict_tokens
        self.max_prompt = positions(player.model) - reply
        self.max_tokens = (len(verdict_ids(player.tokenizer, self.encode, "", "")) + args.prefix_tokens
                           + args.completion_tokens + reply)  # length of the longest sequence
        size = head_weights(player.model)[0].shape[1]
        self.value = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 1)).to(self.device)
        for p in self.value[1].parameters():
            nn.init.zeros_(p)  # d_value starts at exactly one half

    def decode(self, ids):
        return self.player.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def value_logits(self, hidden, ends):
        """Logits of d_value, from the states (2b, T, H) at the ends (2b,) of the prompts."""
        return self.value(hidden[torch.arange(len(ends), device=self.device), ends].float())[:, 0]  # (2b,)

    def verdicts(self, prompts, keys):
        """Verdicts on the texts in 2n prompts (lists of ids), with random numbers by 2n keys."""
        self.sampler.sync(self.player.adapter)
        roll = rollout(self.sampler, prompts, self.rules, self.think_tokens, self.verdict_tokens, self.args.temperature,
                       keys)
        verdict = torch.tensor([parse_verdict(self.decode(ids)) for ids in roll.reply], device=self.device)  # (2n,)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)  # (2n,)
        value, immediate = (torch.zeros(len(prompts), device=self.device) for _ in range(2))  # (2n,) each
        part = mine(range(len(prompts)))
        for texts in micro_batches(part, 2 * self.args.micro_batch):
            ids = pad([prompts[k] + self.opening for k in texts], 0, self.device)  # (2b, T)
            hidden = hidden_states(self.player.model, ids, roll.shared)  # (2b, T, H)
            value[texts] = self.value_logits(hidden, ends[texts]).sigmoid()  # (2b,)
            last = hidden[torch.arange(len(texts), device=self.device), ends[texts] + len(self.opening)]  # (2b, H)
            logits = head_logits(self.player.model, last)[:, self.choice].float()  # (2b, 2)
            logits /= divisor(self.player.model, self.args.temperature)  # (2b, 2)
            immediate[texts] = logits.softmax(-1)[:, REAL]  # (2b,)
        value, immediate = (everyone(x[part.start:part.stop]) for x in (value, immediate))  # (2n,) each
        return Verdicts(roll, ends, verdict, value, immediate)

    @torch.no_grad()
    def score(self, windows, texts, first):
        """Judge the completions (B texts) of the B windows from position `first` on, by the current weights."""
        pairs = [cut_alike(self.encode, w.sep, w.truth, text, self.args.completion_tokens)
                 for w, text in zip(windows, texts)]  # (real, generated)
        shown = [i for i, pair in enumerate(pairs) if pair]
        prompts = [verdict_ids(self.player.tokenizer, self.encode, windows[i].prefix, windows[i].sep + pairs[i][side],
                               self.max_prompt) for side in (0, 1) for i in shown]
        B, verdicts = len(windows), None
        p_real, d_value = torch.zeros(B, device=self.device), torch.ones(B, device=self.device)  # (B,) each
        read, unread = (torch.zeros(B, dtype=torch.bool, device=self.device) for _ in range(2))  # (B,) each
        if shown:
            keys = [(self.args.seed, "verdict", first + i, side) for side in (0, 1) for i in shown]
            verdicts = self.verdicts(prompts, keys)
            verdict = verdicts.verdict[len(shown):]  # (n,) on the completions
            p_real[shown], d_value[shown] = (verdict == REAL).float(), verdicts.value[len(shown):]  # (n,) each
            read[shown], unread[shown] = verdict != UNPARSED, verdict == UNPARSED  # (n,) each
        labels = training_labels(self.args, shown, B, self.device, first)  # (B, 2)
        return Judged(shown, read, ~unread, p_real, None, d_value, labels, verdicts)

    def loss(self, judged, rows):
        """These rows' part of the batch's loss; and how many of their real and generated texts it got right."""
        verdicts, n, place = judged.detail, len(judged.shown), judged.shown.index(rows[0])
        texts = [first + i for first in (place, n + place) for i in range(len(rows))]
        reward = (verdicts.verdict[texts] == judged.labels[rows].mT.flatten()).float()  # (2b,)
        stats, hidden = sampled_stats(self.player.model, verdicts.roll, texts, self.rules, self.args.temperature,
                                      self.args.d_kl_coef > 0, return_hidden=True)  # (N,) each, (2b, T, H)
        advantage = (reward - verdicts.value[texts]).repeat_interleave(verdicts.roll.sampled[texts].sum(1))  # (N,)
        loss = policy_loss(stats.logp, stats.kl, advantage, self.args.d_kl_coef, self.num_positions)  # ()
        logits = self.value_logits(hidden, verdicts.ends[texts])  # (2b,)
        value_loss = F.binary_cross_entropy_with_logits(logits, reward, reduction="sum")  # ()
        loss += VALUE_COEF / (2 * self.args.batch_size) * value_loss
        on_real, on_generated = verdicts.verdict[texts].chunk(2)  # (b,) each
        right = torch.stack([(on_real == REAL).sum(), (on_generated == 1 - REAL).sum()]).float().cpu()  # (2,)
        return self.args.d_loss_scale * loss, right  # (), (2,)

    def metrics(self, judged, step):
        """Metrics of its own, means over the verdicts (null where there are none), and the rows of verdicts.jsonl."""
        verdicts, n, rows = judged.detail, len(judged.shown), []
        for k in range(2 * n):
            think, reply = self.decode(verdicts.roll.think[k]), self.decode(verdicts.roll.reply[k])
            says_real = verdicts.immediate[k].item()
            rows.append(dict(
                step=step, row=judged.shown[k % n], text=WORDS[REAL if k < n else 1 - REAL],
                verdict=WORDS.get(verdicts.verdict[k].item()),
                immediate=says_real if k < n else 1 - says_real,  # chance to be right
                d_value=verdicts.value[k].item(), think=think, reply=reply, n_think=len(verdicts.roll.think[k])))
        values = dict(
            d_value=[row["d_value"] for row in rows],
            d_brier=[(row["d_value"] - (row["verdict"] == row["text"])) ** 2 for row in rows],
            d_parsed=[row["verdict"] is not None for row in rows],
            d_num_think=[row["n_think"] for row in rows],
            d_think_empty=[not row["think"].strip() for row in rows],
            d_acc_immediate=[row["immediate"] for row in rows])
        return {key: sum(some) / len(rows) if rows else None for key, some in values.items()}, rows
