"""
The discriminator that reasons: shown a prefix and one completion, it thinks within a budget, then says `real` or
`generated`. Its verbs are those of `discriminator.py`.

What differs from the textbook:
1. It learns by the generator's policy gradient: 1 for a right verdict, 0 for a wrong one or for words that are none.
   The baseline is `d_value`, a value head's chance that the verdict will be right, from the end of the prompt, before
   a thought. The head learns by cross-entropy, a mean over the texts (`--d_value_coef` times), as in PPO.
2. No ratio: where both players share an adapter, the generator's step lies between a verdict and its lesson.
3. The KL to the base keeps the verdict the coin that it was until the text tells: without it all verdicts soon were one
   word, from which nothing is learnt any more.
4. The two texts of a prefix are judged apart, each in a prompt of its own, cut to the same number of tokens.

Letters: B sequences, n rows that are shown, b of them in a micro-batch (two texts each: all the real ones, then the
generated ones), T tokens, N sampled ones, H hidden.
"""
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from data import clip, plain_encoder
from discriminator import Judged, shuffled_labels, told_labels, true_labels, verdict_ids
from model import causal_lm, head_logits, hidden_states, micro_batches, pad, positions
from reward import REAL, policy_loss
from rollout import Rollout, reference_hidden, rollout, rules, sampled_stats

WORDS = {REAL: "real", 1 - REAL: "generated"}
UNPARSED = -1  # beside these two


def parsed(reply):
    """REAL, 1 - REAL or UNPARSED. A verdict is one of the two words alone, in lower case, white space around it aside.

    A stop id need not follow: the budget has room for a token behind the longer word, and what is written there shows.
    """
    return next((label for label, word in WORDS.items() if reply.strip() == word), UNPARSED)


def cut_alike(encode, sep, truth, completion, most):
    """Both texts cut to the same number of tokens, at most `most`, as tokenised behind sep; None where one is empty."""
    texts = [clip(encode, sep, text, most)[0] for text in (truth, completion)]
    sizes = [clip(encode, sep, text, most)[1] for text in texts]
    while sizes[0] != sizes[1]:  # more than once where the end of a cut text is tokenised in another way
        texts = [clip(encode, sep, text, min(sizes))[0] for text in texts]
        sizes = [clip(encode, sep, text, most)[1] for text in texts]
    return tuple(texts) if sizes[0] else None


def summary(rows):
    """Metrics of verdicts, from their rows in verdicts.jsonl: means, null where there are none."""
    def mean(values):
        return sum(values) / len(rows) if rows else None

    return dict(
        d_value=mean(row["d_value"] for row in rows),
        d_brier=mean((row["d_value"] - (row["verdict"] == row["text"])) ** 2 for row in rows),
        d_parsed=mean(row["verdict"] is not None for row in rows),
        d_num_think=mean(row["n_think"] for row in rows),
        d_think_empty=mean(not row["think"].strip() for row in rows),
        d_acc_immediate=mean(row["immediate"] for row in rows))


class Verdicts(NamedTuple):
    """What was said of 2n texts."""
    roll: Rollout
    ends: torch.Tensor       # (2n,) where each prompt's last token stands
    said: torch.Tensor       # (2n,) REAL, 1 - REAL or UNPARSED
    value: torch.Tensor      # (2n,) d_value
    immediate: torch.Tensor  # (2n,) chance that it would say `real`, of the two words, right after an empty thinking


class Reason:
    """Thinks, then gives its verdict; learns by policy gradient."""
    files, samples = ("verdicts",), True

    def __init__(self, model, tokenizer, num_tokens, micro_batch, loss_scale, shuffle, sampler, adapter, batch_size,
                 think_tokens, temperature, kl_coef, value_coef, detach, reference):
        """num_tokens: most of a prefix and of a completion. sampler, adapter: of the model, to write verdicts with.
        batch_size: B, for the constants under the losses. value_coef: of the value's loss; detach: which then moves the
        value head alone. reference: name of the KL's frozen adapter, as a list; []: the base.
        """
        self.sampler, self.adapter = sampler, adapter
        self.model, self.tokenizer, self.encode = model, tokenizer, plain_encoder(tokenizer)
        self.device, self.rule, self.micro_batch = causal_lm(model).device, rules(tokenizer, model), micro_batch
        self.loss_scale, self.shuffle, self.kl_coef, self.detach = loss_scale, shuffle, kl_coef, detach
        self.value_scale, self.reference = value_coef / (2 * batch_size), reference
        self.think_tokens, self.temperature, self.completion_tokens = think_tokens, temperature, num_tokens[1]
        words = [[i for i, (_, end) in zip(*self.encode("\n\n" + WORDS[label])) if end > 2] for label in (0, 1)]
        first = next(i for i, (a, b) in enumerate(zip(*words)) if a != b)  # where the two words begin to differ
        self.opening, self.choice = self.rule.close.tolist() + words[0][:first], [word[first] for word in words]
        self.verdict_tokens = max(map(len, words)) + 1
        self.num_positions = 2 * batch_size * (think_tokens + self.verdict_tokens)
        reply = think_tokens + len(self.rule.close) + self.verdict_tokens
        self.most = len(verdict_ids(tokenizer, self.encode, "", "")) + sum(num_tokens) + reply
        self.most_prompt = positions(model) - reply
        size = causal_lm(model).config.hidden_size
        self.value = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 1)).to(self.device)
        for p in self.value[1].parameters():
            nn.init.zeros_(p)  # d_value starts at exactly one half
        self.modules = {"value": self.value}

    def decode(self, ids):
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def value_logits(self, hidden, ends):
        """Of d_value, from the states (2b, T, H) at the ends (2b,) of the prompts."""
        at_end = hidden[torch.arange(len(ends), device=self.device), ends].float()  # (2b, H)
        return self.value(at_end.detach() if self.detach else at_end)[:, 0]  # (2b,)

    def verdicts(self, prompts, generator):
        """Verdicts on the texts in 2n prompts (lists of ids)."""
        budgets = self.think_tokens, self.verdict_tokens
        self.sampler.follow(self.adapter)
        roll = rollout(self.sampler, prompts, self.rule, *budgets, self.temperature, generator)
        said = torch.tensor([parsed(self.decode(ids)) for ids in roll.reply], device=self.device)  # (2n,)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)  # (2n,)
        value, immediate = (torch.zeros(len(prompts), device=self.device) for _ in range(2))  # (2n,) each
        for texts in micro_batches(range(len(prompts)), 2 * self.micro_batch):
            ids = pad([prompts[k] + self.opening for k in texts], 0, self.device)  # (2b, T)
            hidden = hidden_states(self.model, ids, roll.shared)  # (2b, T, H)
            value[texts] = self.value_logits(hidden, ends[texts]).sigmoid()  # (2b,)
            last = hidden[torch.arange(len(texts), device=self.device), ends[texts] + len(self.opening)]  # (2b, H)
            logits = head_logits(self.model, last)[:, self.choice].float() / (self.temperature or 1.0)  # (2b, 2)
            immediate[texts] = logits.softmax(-1)[:, REAL]  # (2b,)
        return Verdicts(roll, ends, said, value, immediate)

    @torch.no_grad()
    def look(self, batch, completions, random_for, step):
        """Judge B windows with their completions (text, number of tokens). random_for(purpose, step): a generator."""
        pairs = [cut_alike(self.encode, w.sep, w.truth, text, self.completion_tokens)
                 for w, (text, _) in zip(batch, completions)]  # (real, generated)
        shown = [i for i, pair in enumerate(pairs) if pair]
        prompts = [verdict_ids(self.tokenizer, self.encode, batch[i].prefix, batch[i].sep + pairs[i][side],
                               self.most_prompt) for side in (0, 1) for i in shown]
        B, own, shuffled = len(batch), None, None
        p_real, d_value = torch.zeros(B, device=self.device), torch.ones(B, device=self.device)  # (B,) each
        read, unread = (torch.zeros(B, dtype=torch.bool, device=self.device) for _ in range(2))  # (B,) each
        if shown:
            own = self.verdicts(prompts, random_for("verdict", step))
            said = own.said[len(shown):]  # (n,) of the completions
            p_real[shown], d_value[shown] = (said == REAL).float(), own.value[len(shown):]  # (n,) each
            read[shown], unread[shown] = said != UNPARSED, said == UNPARSED  # (n,) each
        if self.shuffle:
            shuffled = shuffled_labels(len(shown), random_for("shuffle", step), self.device)  # (2n,)
        return Judged(shown, read, ~unread, p_real, None, d_value, shuffled, own)

    def loss(self, judged, rows):
        """Loss of the texts of some rows, as their part of all; and how many real and generated ones it got right."""
        own, n, place = judged.own, len(judged.shown), judged.shown.index(rows[0])
        texts = [first + i for first in (place, n + place) for i in range(len(rows))]
        reward = (own.said[texts] == told_labels(judged, rows, self.device)).float()  # (2b,)
        advantage = reward - own.value[texts]  # (2b,)
        ref_hidden = reference_hidden(self.model, own.roll, texts, *self.reference) if self.kl_coef else None
        hidden = hidden_states(self.model, own.roll.ids[texts], own.roll.shared)  # (2b, T, H)
        stats = sampled_stats(self.model, own.roll, texts, self.rule, self.temperature, ref_hidden, hidden)  # (N,)
        each = advantage.repeat_interleave(own.roll.sampled[texts].sum(1))  # (N,)
        loss = policy_loss(stats.logp, stats.kl, each, self.kl_coef, self.num_positions)  # ()
        logits = self.value_logits(hidden, own.ends[texts])  # (2b,)
        loss += self.value_scale * F.binary_cross_entropy_with_logits(logits, reward, reduction="sum")  # ()
        right = own.said[texts] == true_labels(len(rows), self.device)  # (2b,)
        return self.loss_scale * loss, right.float().view(2, -1).sum(1).cpu()  # (), (2,)

    def tell(self, judged, step):
        """Metrics of its own, and rows for its own files."""
        own, n, rows = judged.own, len(judged.shown), []
        for k in range(2 * n):
            think, reply = self.decode(own.roll.think[k]), self.decode(own.roll.reply[k])
            at_once = own.immediate[k].item() if k < n else 1 - own.immediate[k].item()  # chance to be right
            rows.append(dict(
                step=step, row=judged.shown[k % n], text=WORDS[REAL if k < n else 1 - REAL],
                verdict=WORDS.get(own.said[k].item()), immediate=at_once,
                d_value=own.value[k].item(), think=think, reply=reply, n_think=len(own.roll.think[k])))
        return summary(rows), {"verdicts": rows}
