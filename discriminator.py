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
from model import (backbone, causal_lm, divisor, head_logits, head_weights, hidden_states, micro_batches, pad,
                   positions, without_adapters)
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
    shown: list            # n row numbers, the prefixes whose two texts were read
    read: torch.Tensor     # (B,) bool: was judged, and its verdict parsed
    counts: torch.Tensor   # (B,) bool: used in the generator's step; all but unparsed verdicts
    p_real: torch.Tensor   # (B,) probability that the completion is real; 1 or 0 by a verdict in words
    log_generated: torch.Tensor | None  # (B,) log(1 - p_real); Head only
    d_value: torch.Tensor | None        # (B,) chance that the verdict on the completion is right; Reason only
    labels: torch.Tensor   # (B, 2) labels to learn for the real and the generated text; shuffled by --d_shuffle
    detail: Any            # what the loss needs besides
    score: torch.Tensor | None = None  # (B,) likeness to the truth; Features only
    first: int = 0         # position of the first window


def make_judge(args, player, sampler):
    """The discriminator that the flags ask for. sampler: the generator's, which Reason shares if the model is one."""
    if args.disc != "reason":
        return (Head if args.disc == "head" else Features)(args, player)
    if sampler.source is not player.model:
        sampler = Sampler(player.model, args.merge)
    return Reason(args, player, sampler)


def training_labels(args, shown, B, device, first):
    """Labels (B, 2) to learn for real and generated text; with --d_shuffle those of a random half of the pairs are swapped.

    It must be half of each batch: a few more right labels than wrong ones teach what is real, where that is easy to see.
    """
    labels, rng = torch.tensor([[REAL, 1 - REAL]], device=device).repeat(B, 1), rng_for(args.seed, "shuffle", first)
    if args.d_shuffle:
        order = torch.randperm(len(shown), generator=rng)  # (n,)
        half = (len(shown) + torch.randint(2, (), generator=rng)) // 2  # of an odd number by a coin
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


def discriminator_loss(logits, labels, kind, smooth=0.0):
    """Loss of logits (2b, 2), the real texts first, with labels (2b,): a scalar.

    ce: mean cross-entropy. pair: Bradley-Terry on the two texts of a prefix (GAD, arXiv 2511.10643), without labels.
    """
    if kind == "ce":
        return F.cross_entropy(logits, labels, label_smoothing=smooth)  # ()
    real, generated = (logits[:, REAL] - logits[:, 1 - REAL]).chunk(2)  # (b,) each
    return -F.logsigmoid(real - generated).mean()  # ()


class Head(nn.Module):
    """A LayerNorm and a linear layer on the last hidden states, trained by cross-entropy.

    --d_pool last reads the state of the last completion token, mean the mean over the completion's. The linear layer
    starts at zero, so that p_real starts at exactly one half.
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

    def forward(self, hidden, mask, kept=1.0):
        """Hidden states (B, T, H) and the mask of completion tokens (B, T) to logits (B, 2): 0 generated, 1 real.

        kept: what to multiply the normalised states (B, H) by, a mask of dropout.
        """
        hidden = hidden.float()  # (B, T, H)
        if self.args.d_pool == "mean":
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, H)
        else:
            last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # (B,)
            pooled = hidden[torch.arange(len(hidden), device=hidden.device), last]  # (B, H)
        return self.linear(self.norm(pooled) * kept)  # (B, 2)

    def logits(self, texts, kept=1.0):
        """Logits (B, 2) of texts (ids, mask), which lose their beginning where the model has no room for them."""
        room = positions(self.player.model)
        ids, mask = (pad([row[-room:] for row in rows], 0, self.device, kind)
                     for rows, kind in zip(zip(*texts), (torch.long, torch.bool)))  # (B, T) each
        return self(hidden_states(self.player.model, ids), mask, kept)  # (B, 2)

    @torch.no_grad()
    def score(self, windows, texts, first):
        """Judge the completions (B texts) of the B windows from position `first` on, as the discriminator stands."""
        pairs = [pair_ids(self.encode, self.bos, w.prefix, w.sep, w.truth, text) for w, text in zip(windows, texts)]
        shown = [i for i, pair in enumerate(pairs) if pair]
        read = torch.tensor([bool(pair) for pair in pairs], device=self.device)  # (B,)
        logps = torch.tensor([[0.0, -torch.inf]], device=self.device).repeat(len(pairs), 1)  # (B, 2) surely generated
        for rows in micro_batches(shown, self.args.micro_batch):
            logps[rows] = self.logits([pairs[i][1] for i in rows]).log_softmax(-1)  # (b, 2)
        labels = training_labels(self.args, shown, len(pairs), self.device, first)  # (B, 2)
        return Judged(shown, read, torch.ones_like(read), logps[:, REAL].exp(), logps[:, 1 - REAL], None, labels, pairs,
                      first=first)

    def replay(self, judged, past, first):
        """The same judgements, with the texts of past records (of rollouts.jsonl) in place of a share --d_replay of the
        shown pairs, for the loss."""
        pairs = list(judged.detail)
        for i in judged.shown:
            rng = rng_for(self.args.seed, "replay", first + i)
            if torch.rand((), generator=rng) < self.args.d_replay:
                record = past[int(torch.randint(len(past), (), generator=rng))]
                texts = (record[key] for key in ("prefix", "sep", "truth", "completion"))
                pairs[i] = pair_ids(self.encode, self.bos, *texts) or pairs[i]
        return judged._replace(detail=pairs)

    def loss(self, judged, rows):
        """Loss of some rows, as their part of the batch's; and how many of their real and generated texts are right."""
        texts, kept = [judged.detail[i][side] for side in (0, 1) for i in rows], 1.0
        if self.args.d_dropout:
            rng, shape = rng_for(self.args.seed, "dropout", judged.first + rows[0]), (len(texts), len(self.norm.weight))
            kept = torch.rand(shape, generator=rng).ge(self.args.d_dropout).to(self.device) / (1 - self.args.d_dropout)
        logits = self.logits(texts, kept)  # (2b, 2)
        labels = judged.labels[rows].mT.flatten()  # (2b,)
        loss = discriminator_loss(logits, labels, self.args.d_loss, self.args.d_smooth)  # ()
        guessed_real = (logits.argmax(-1) == REAL).view(2, -1)  # (2, b)
        right = torch.stack([guessed_real[0].sum(), (~guessed_real[1]).sum()]).float().cpu()  # (2,)
        return self.args.d_loss_scale * loss * len(rows) / len(judged.shown), right  # (), (2,)

    def metrics(self, judged, step):
        """Metrics of its own, and the rows of verdicts.jsonl: none."""
        return {}, []


# -----------------------------------------------------------------------------
# a judge without training

class Features(nn.Module):
    """How like the truth a completion is, in states of the frozen base (EBFT, arXiv 2603.12248). Nothing is trained.

    Features f of a text: the mean of its completion tokens' states after 25, 50 and 75 % of the layers, each
    standardised by the moving mean and variance of the truths and scaled to length 1. With t those of the truth and j
    the others of its group: score = 2 f t - mean_j f f_j, averaged over the layers. The second term pays for variety.
    """

    def __init__(self, args, player):
        super().__init__()
        self.args, self.player, self.device = args, player, player.device
        self.encode, self.bos = plain_encoder(player.tokenizer), bos_ids(player.tokenizer)
        self.max_tokens = args.prefix_tokens + args.completion_tokens
        num_layers = causal_lm(player.model).config.get_text_config().num_hidden_layers
        self.layers = [max(1, round(share * num_layers)) for share in (0.25, 0.5, 0.75)]
        size = head_weights(player.model)[0].shape[1]
        self.register_buffer("mean", torch.zeros(3, size))
        self.register_buffer("variance", torch.ones(3, size))
        self.register_buffer("seen", torch.zeros(()))
        self.to(self.device)

    def features(self, texts):
        """Mean states (B, 3, H) of texts (ids, mask)."""
        ids, mask = (pad(rows, 0, self.device, kind) for rows, kind in zip(zip(*texts), (torch.long, torch.bool)))
        with without_adapters(self.player.model):
            read = backbone(self.player.model)(input_ids=ids, use_cache=False, output_hidden_states=True)
        states = torch.stack([read.hidden_states[i] for i in self.layers], 1).float()  # (B, 3, T, H)
        weights = (mask / mask.sum(1, keepdim=True))[:, None, :, None]  # (B, 1, T, 1)
        return (states * weights).sum(2)  # (B, 3, H)

    @torch.no_grad()
    def score(self, windows, texts, first):
        """Judge the completions (B texts) of the B windows; an empty one has the score of a text that is unlike all."""
        pairs = [pair_ids(self.encode, self.bos, w.prefix, w.sep, w.truth, text) for w, text in zip(windows, texts)]
        shown = [i for i, pair in enumerate(pairs) if pair]
        read = torch.tensor([bool(pair) for pair in pairs], device=self.device)  # (B,)
        real, generated = (torch.zeros(len(pairs), *self.mean.shape, device=self.device) for _ in range(2))  # (B, 3, H)
        for rows in micro_batches(shown, self.args.micro_batch):
            real[rows], generated[rows] = (self.features([pairs[i][side] for i in rows]) for side in (0, 1))
        if shown:
            keep = self.seen * 0.9
            self.mean.mul_(keep).add_((1 - keep) * real[shown].mean(0))
            self.variance.mul_(keep).add_((1 - keep) * (real[shown] - self.mean).square().mean(0))
            self.seen.fill_(1.0)
        scale = self.variance.sqrt() + 1e-6  # (3, H)
        real, generated = (F.normalize((x - self.mean) / scale, dim=-1) for x in (real, generated))  # (B, 3, H)
        generated[~read] = 0
        score = match_score(real, generated, self.args.group)  # (B,)
        none = torch.full_like(score, torch.nan)  # (B,)
        return Judged([], read, torch.ones_like(read), none, none, None, None, None, score)

    def metrics(self, judged, step):
        return {"score": judged.score.mean().item()}, []


def match_score(real, generated, group):
    """2 f t - mean_j f f_j of unit features (B, L, H), averaged over layers: (B,). Neighbours in a group share a prefix.
    """
    near = (real * generated).sum(-1).mean(1)  # (B,)
    place = torch.arange(len(generated), device=generated.device) // group  # (B,)
    others = (place == place[:, None]).fill_diagonal_(False)  # (B, B)
    products = torch.einsum("ilh,jlh->ij", generated, generated) / generated.shape[1]  # (B, B)
    return 2 * near - (products * others).sum(1) / others.sum(1).clamp(min=1)  # (B,)


# -----------------------------------------------------------------------------
# the discriminator that reasons

def parse_verdict(reply):
    """REAL, 1 - REAL or UNPARSED. A verdict is one of the two words alone, in lower case, white space around it aside.

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
    verdict: torch.Tensor       # (2n,) REAL, 1 - REAL or UNPARSED
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
        for texts in micro_batches(range(len(prompts)), 2 * self.args.micro_batch):
            ids = pad([prompts[k] + self.opening for k in texts], 0, self.device)  # (2b, T)
            hidden = hidden_states(self.player.model, ids, roll.shared)  # (2b, T, H)
            value[texts] = self.value_logits(hidden, ends[texts]).sigmoid()  # (2b,)
            last = hidden[torch.arange(len(texts), device=self.device), ends[texts] + len(self.opening)]  # (2b, H)
            logits = head_logits(self.player.model, last)[:, self.choice].float()  # (2b, 2)
            logits /= divisor(self.player.model, self.args.temperature)  # (2b, 2)
            immediate[texts] = logits.softmax(-1)[:, REAL]  # (2b,)
        return Verdicts(roll, ends, verdict, value, immediate)

    @torch.no_grad()
    def score(self, windows, texts, first):
        """Judge the completions (B texts) of the B windows from position `first` on, as the discriminator stands."""
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
            verdict = verdicts.verdict[len(shown):]  # (n,) of the completions
            p_real[shown], d_value[shown] = (verdict == REAL).float(), verdicts.value[len(shown):]  # (n,) each
            read[shown], unread[shown] = verdict != UNPARSED, verdict == UNPARSED  # (n,) each
        labels = training_labels(self.args, shown, B, self.device, first)  # (B, 2)
        return Judged(shown, read, ~unread, p_real, None, d_value, labels, verdicts)

    def loss(self, judged, rows):
        """Loss of some rows, as their part of the batch's; and how many of their real and generated texts are right."""
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
