"""
Sampling: think for a bounded number of tokens, close the thinking, write the completion; and the learner's view of it.

What differs from the textbook:
1. One token loop for the whole batch: each row is a small state machine (thinking, forced, completion, done), kept in
   tensors, so that rows need not think equally long.
2. No top-k, no top-p: the learner can score exactly what was drawn. The sampler returns its own log-probs, to compare.
3. Forced tokens (the closing of the thinking, the blank line after it) are in `ids` and not in `sampled`.

Letters: B sequences (b of them), T tokens, N sampled ones, V vocabulary, H hidden, R and C maximum tokens of thinking
and completion, L closing length, S stop ids.
"""
import contextlib
import hashlib
import math
import os
from typing import NamedTuple

import torch
from tqdm import tqdm

from data import clip, opens_thinking, plain_encoder, prompt_ids, prompt_notes, words
from flags import UserError, first_line, readable
from model import (FORBIDDEN, adapter_parameters, causal_lm, divisor, head_weights, located, micro_batches, pad,
                   token_stats, untrained, without_adapters)
from ranks import FIRST, everyone, mine
from reward import length_score

THINKING, COMPLETION = 0, 1  # kinds of sampled positions; rows of `Rules.blocked`


class Rules(NamedTuple):
    """What the tokenizer and the model allow where."""
    stop: torch.Tensor     # (S,) ids that end a completion
    close: torch.Tensor    # (L,) ids forced where the thinking ends: </think>, then a blank line
    think_end: int         # id of </think>; -1 where it is no single token: then the budget alone ends the thinking
    blocked: torch.Tensor  # (2, V) ids forbidden in thinking and in completion; V: the tokenizer's, rounded up
    pad: int


def rules(tokenizer, model):
    """Stop ids: eos, <|im_end|>, <|endoftext|>, what generation_config adds. Forbidden ids: see docs/choices.md."""
    device = causal_lm(model).device
    ids = tokenizer.get_vocab()
    extra = causal_lm(model).generation_config.eos_token_id  # a number, a list of numbers, or None
    stop = {tokenizer.eos_token_id, ids.get("<|im_end|>"), ids.get("<|endoftext|>")} - {None}
    stop |= set(extra if isinstance(extra, list) else [extra]) - {None}
    think, think_end = ids.get("<think>", -1), ids.get("</think>", -1)
    rows = causal_lm(model).get_output_embeddings().weight.shape[0]
    V = min(-(-(max(ids.values()) + 1) // 64) * 64, rows)  # Qwen3's 151,669 would be slow on a GPU; the rest is blocked
    blocked = torch.ones(2, V, dtype=torch.bool)  # (2, V)
    blocked[:, [i for i in ids.values() if i < V]] = False
    unknown = {tokenizer.unk_token_id} - {None} - stop  # text with <unk> cannot be encoded back
    for kind, forbidden in ((THINKING, stop | {think} | unknown), (COMPLETION, {think, think_end} | unknown)):
        blocked[kind, [i for i in forbidden if 0 <= i < V]] = True
    closing = [think_end] if think_end >= 0 else tokenizer("</think>", add_special_tokens=False).input_ids
    closing = closing + tokenizer("\n\n", add_special_tokens=False).input_ids
    pad_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    stop_ids = torch.tensor(sorted(stop), device=device)  # (S,)
    close_ids = torch.tensor(closing, device=device)  # (L,)
    return Rules(stop_ids, close_ids, think_end, blocked.to(device), pad_id)


class Rollout(NamedTuple):
    """What was sampled, right-padded. Position t of `logps` is about ids[:, t] given what stands before it."""
    ids: torch.Tensor           # (B, T) prompt and reply
    sampled: torch.Tensor       # (B, T) drawn and kept: trained. Prompt, forced, cut and padded positions are not
    thinking: torch.Tensor      # (B, T) belongs to the thinking, its </think> included
    logps: torch.Tensor         # (B, T) the sampler's log-probs, 0 where not sampled
    think_closed: torch.Tensor  # (B,) the model closed its thinking by itself
    broken: torch.Tensor        # (B,) ended where its states were not finite
    think: list                 # B lists of ids, without </think>
    reply: list                 # B lists of ids, without the stop id
    shared: int                 # number of leading ids that all rows share


class Written(NamedTuple):
    """One reply: lists with an entry for each token, as in Rollout, and whether it closed its thinking, or broke."""
    ids: list
    sampled: list
    thinking: list
    logps: list
    closed: bool
    broken: bool


class Reply:
    """The replies of B rows while they are written; all state is changed in place, so that a graph can hold a step."""

    def __init__(self, rows, rules, reasoning_tokens, completion_tokens, temperature, model):
        self.rules, self.R, self.C, self.greedy = rules, reasoning_tokens, completion_tokens, temperature == 0
        self.divisor = divisor(model, temperature)
        self.weight, self.bias = head_weights(model, rules.blocked.shape[1])  # (V, H), (V,) or None
        self.budget = reasoning_tokens + len(rules.close) + completion_tokens
        # with no thinking budget the closing is part of the prompt
        self.forced_prefix = rules.close.tolist() if reasoning_tokens == 0 else []
        self.close = rules.close if len(rules.close) else rules.close.new_zeros(1)  # (L,), never empty

        def zeros(*shape, dtype=torch.long):
            return torch.zeros(*shape, dtype=dtype, device=rules.close.device)

        self.t, self.token = zeros(1), zeros(rows)  # (1,), (B,) the step, and the last tokens
        self.thinking, self.done, self.broken, self.think_closed = (
            zeros(rows, dtype=torch.bool) for _ in range(4))  # (B,) each
        self.next_forced = zeros(rows)  # (B,) index in `close` of the next token to force; L: none
        self.num_think, self.num_completion = zeros(rows), zeros(rows)  # (B,) each
        self.uniform = zeros(self.budget, rows, dtype=torch.double)     # (budget, B) random numbers to draw with
        dtypes = dict(ids=torch.long, alive=torch.bool, sampled=torch.bool, thinking=torch.bool, logps=torch.float)
        self.out = {key: zeros(rows, self.budget, dtype=dtype) for key, dtype in dtypes.items()}  # (B, budget) each

    def reset(self, uniform):
        self.uniform.copy_(uniform)
        flags = self.done, self.broken, self.think_closed
        for tensor in (*flags, self.num_think, self.num_completion, *self.out.values()):
            tensor.zero_()
        self.t.fill_(len(self.forced_prefix))
        self.out["alive"][:, :len(self.forced_prefix)] = True
        if self.forced_prefix:
            self.out["ids"][:, :len(self.forced_prefix)] = self.rules.close
        self.thinking.fill_(self.R > 0)
        self.next_forced.fill_(len(self.rules.close))

    def advance(self, hidden):
        """Write one token a row, from the hidden states (B, H) of the last ones."""
        rules, L = self.rules, len(self.rules.close)
        over = self.thinking & (self.num_think >= self.R)         # (B,) the budget is spent: force the whole closing
        next_forced = torch.where(over, 0, self.next_forced)      # (B,)
        thinking = self.thinking & ~over                          # (B,)
        forced = next_forced < L                                  # (B,)
        blocked = rules.blocked[torch.where(thinking, THINKING, COMPLETION)]  # (B, V)
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias).float()  # (B, V)
        if self.divisor != 1.0:
            logits /= self.divisor
        logits = torch.where(blocked, FORBIDDEN, logits)  # (B, V)
        drawn, logp = draw(logits, None if self.greedy else self.uniform.index_select(0, self.t)[0])  # (B,)
        self.broken |= ~logp.isfinite() & ~self.done              # (B,) not finite, by overflow in fp16: the row ends
        self.done |= self.broken
        token = torch.where(forced, self.close[next_forced.clamp(max=max(L - 1, 0))], drawn)  # (B,)
        token = torch.where(self.done, rules.pad, token)          # (B,)
        sampled = ~forced & ~self.done                            # (B,)
        columns = dict(ids=token, alive=~self.done, sampled=sampled, thinking=thinking & sampled,
                       logps=torch.where(sampled, logp, 0.0))     # (B,) each
        for key, column in columns.items():
            self.out[key].index_copy_(1, self.t, column[:, None])

        closed = thinking & (token == rules.think_end)            # (B,) </think> drawn: the rest of the closing follows
        stopped = ~thinking & sampled & (token[:, None] == rules.stop).any(1)  # (B,)
        self.num_think += thinking
        self.num_completion += sampled & ~thinking
        self.next_forced.copy_(torch.where(closed, 1, next_forced + (forced & ~self.done).long()))
        self.think_closed |= closed
        self.thinking.copy_(thinking & ~closed)
        self.done |= stopped | (self.num_completion >= self.C)
        self.token.copy_(token)
        self.t += 1

    def rows(self):
        """The B replies, as Written."""
        out = {key: column.tolist() for key, column in self.out.items()}
        lengths = [sum(row) for row in out.pop("alive")]
        return [Written(*(column[i][:n] for column in out.values()), closed, broken) for i, (n, closed, broken) in
                enumerate(zip(lengths, self.think_closed.tolist(), self.broken.tolist()))]


@torch.no_grad()
def rollout(sampler, prompts, rules, reasoning_tokens, completion_tokens, temperature, keys):
    """Sample a reply to each of B prompts (lists of ids). Each of several processes samples a part.

    At most `reasoning_tokens` of thinking, then `rules.close` is forced, then at most `completion_tokens` up to a stop
    id. temperature 0 is greedy. keys: one a row; the random numbers of a row are a function of its key alone.
    """
    assert completion_tokens > 0, "there is nothing to write"
    settings = rules, reasoning_tokens, completion_tokens, temperature
    part = mine(prompts), settings, mine(keys)
    written = sampler.write(*part) if hasattr(sampler, "write") else decode(sampler, *part)  # a server has its own loop
    return gather(prompts, everyone(written), rules)


def decode(sampler, prompts, settings, keys):
    """Replies to B prompts, as Written, token by token."""
    (rules, reasoning_tokens, completion_tokens, _), B = settings, len(prompts)
    if not B:
        return []
    budget = reasoning_tokens + len(rules.close) + completion_tokens
    numbers = [torch.rand(budget, dtype=torch.double, generator=rng_for(*key)) for key in keys]  # B of (budget,)

    def new_reply():
        return Reply(B, *settings, sampler.model)

    width = max(map(len, prompts)) + budget
    reader, reply, step = sampler.decoder((id(rules), *settings[1:]), B, width, new_reply)

    def begin():
        reply.reset(torch.stack(numbers, 1))
        reply.advance(reader.begin([prompt + reply.forced_prefix for prompt in prompts], rules.pad))

    begin()
    if budget - len(reply.forced_prefix) > 3 and step.capture():  # capturing takes the first token and two to warm up
        begin()
    for t in range(len(reply.forced_prefix) + 1, budget):
        if (rules.close.device.type == "cpu" or t % 16 == 0) and bool(reply.done.all()):  # reading it back stalls a GPU
            break
        step()
    return reply.rows()


class Samples(NamedTuple):
    """Completions of B windows."""
    roll: Rollout
    texts: list  # B completions, without the echo, cut to completion_tokens
    sizes: list  # B numbers of their tokens
    num_sampled: int  # sampled tokens, those that were cut off included


class Writer:
    """Samples completions of windows, as a run's flags say."""

    def __init__(self, sampler, tokenizer, args):
        self.sampler, self.tokenizer, self.args, self.encode = sampler, tokenizer, args, plain_encoder(tokenizer)
        self.rules = rules(tokenizer, sampler.model)
        if not args.reasoning_tokens and not opens_thinking(args.prompt):
            self.rules = self.rules._replace(close=self.rules.close[:0])  # there is no thinking to close
        # lengths of the longest reply and of the longest sequence
        self.max_reply = args.reasoning_tokens + len(self.rules.close) + args.completion_tokens + args.echo_tokens
        self.max_tokens = len(self.prompt_ids("")) + args.prefix_tokens + self.max_reply

    def prompt_ids(self, prefix):
        return prompt_ids(self.tokenizer, self.encode, self.args.prompt, prefix)

    def truth_ids(self, window, think):
        """Two lists of ids: prompt, thinking (ids) and closing; and the truth, cut to the completion's budget.

        With --prompt plain the truth begins with the white space at the cut.
        """
        before = self.prompt_ids(window.prefix) + think + self.rules.close.tolist()
        goes_on = self.args.prompt.endswith("{text}") and not len(self.rules.close)
        return before, self.encode(window.sep * goes_on + window.truth)[0][:self.args.completion_tokens]

    def truth_logps(self, model, windows, thoughts):
        """B tensors: log-probs (n,) of a window's truth where it follows a thought (B lists of ids), under the active
        adapter, at the run's temperature and without the forbidden ids.
        """
        rows = [self.truth_ids(*pair) for pair in zip(windows, thoughts)]
        ids = pad([before + truth for before, truth in rows], self.rules.pad, model.device)  # (B, T)
        marks = [[False] * len(before) + [True] * len(truth) for before, truth in rows]
        mask, kind = pad(marks, False, ids.device, torch.bool), torch.full_like(ids, COMPLETION)  # (B, T) each
        stats = token_stats(model, ids, mask, self.rules.blocked, kind, self.args.temperature)  # (N,) each
        return stats.logp.split(mask.sum(1).tolist())

    def decode(self, ids):
        """Text of ids; a character that is cut in two at the end is left out."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd")

    def write(self, windows, adapter, purpose, first):
        """Samples for B windows under an adapter (None: the base)."""
        args, keys = self.args, [(self.args.seed, purpose, first + i) for i in range(len(windows))]
        self.sampler.sync(adapter)
        prompts = [self.prompt_ids(window.prefix) for window in windows]
        roll = rollout(self.sampler, prompts, self.rules, args.reasoning_tokens,
                       args.completion_tokens + args.echo_tokens, args.temperature, keys)
        if roll.broken.all():
            raise UserError(f"--dtype {args.dtype}: the states of {args.model} are not finite; try another --dtype")
        texts, sizes, num_sampled = [], [], roll.sampled.sum().item()
        for i, (window, reply) in enumerate(zip(windows, roll.reply)):
            whole = strip_echo(self.decode(reply), window.prefix, args.echo_tokens)
            text, n = clip(self.encode, window.prefix + window.sep, whole, args.completion_tokens)
            texts.append(text)
            sizes.append(min(n, len(reply)))  # a special token's text is several plain tokens: count it once
            if len(text) < len(whole):  # what is cut off is never judged, so it is not trained
                end, kept = len(self.decode(reply)) - len(whole) + len(text), len(reply)  # characters, ids to keep
                while kept and len(self.decode(reply[:kept - 1])) >= end:
                    kept -= 1
                completion = (roll.sampled[i] & ~roll.thinking[i]).nonzero()[:, 0]  # (n,) its positions
                roll.sampled[i, completion[kept:]] = False
        return Samples(roll, texts, sizes, num_sampled)

    def floor(self, stream, place, signals, out_dir):
        """Records of what the base (adapter None) writes for the windows in a range; a signal ends the run."""
        size, rows = max(self.args.batch_size, 32), []
        for first in tqdm(place[::size], desc="floor", disable=not FIRST):
            part = range(first, min(first + size, place.stop))
            batch = [stream[i] for i in part]
            steps = [i // self.args.batch_size for i in part]
            rows += self.records(steps, batch, self.write(batch, None, "floor", first))
            if signals.stop():
                signals.leave("before the first step", out_dir)
        for row in rows[-3:]:
            print(readable(f"the base writes: ...{row['prefix'][-60:]} | {row['completion'][:120]}"))
        self.sampler.release()
        return rows

    def records(self, steps, windows, samples, reward=None, p_real=None):
        """One dict per sequence, with its step: the lines of rollouts.jsonl and floor.jsonl."""
        roll, nothing, C = samples.roll, [None] * len(windows), self.args.completion_tokens
        rows = zip(steps, windows, roll.think, samples.texts, samples.sizes, roll.think_closed.tolist(),
                   nothing if reward is None else reward.tolist(), nothing if p_real is None else p_real.tolist())
        return [dict(step=step, prefix=window.prefix, sep=window.sep, truth=window.truth, think=self.decode(think),
                     completion=text, reward=paid, p_real=real, length_score=length_score(n, C), n_think=len(think),
                     n_completion=n, think_closed=closed)
                for step, window, think, text, n, closed, paid, real in rows]


def sampled_stats(model, roll, rows, rules, temperature, with_kl, return_hidden=False):
    """TokenStats of the sampled tokens of some rows, under the active adapter and the sampler's forbidden ids."""
    kind = torch.where(roll.thinking[rows], THINKING, COMPLETION)  # (b, T)
    return token_stats(model, roll.ids[rows], roll.sampled[rows], rules.blocked, kind, temperature, with_kl,
                       roll.shared, return_hidden)  # (N,) each


def rng_for(*key):
    """A random generator, on the CPU, that is a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def draw(logits, uniform):
    """One id a row from logits (B, V), and its log-prob in nats: (B,) each.

    It is the first id whose cumulative probability exceeds `uniform` (B,), a number from 0 to below 1 (None: greedy).
    These numbers are made before a rollout, so that a step is not random and never synchronises.
    """
    p = logits.softmax(-1)                                      # (B, V)
    if uniform is None:
        drawn = logits.argmax(-1, keepdim=True)                 # (B, 1)
    else:
        where = "cpu" if torch.are_deterministic_algorithms_enabled() else p.device  # CUDA's sum varies
        mass = p.double().to(where).cumsum(-1).to(p.device)     # (B, V) in fp32 a tail of small ones would be lost
        drawn = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)  # (B, 1)
        drawn = drawn.clamp_(max=logits.shape[1] - 1)           # (B, 1) in case rounding makes the product the total
    return drawn[:, 0], p.gather(1, drawn).log()[:, 0]  # (B,) each


def gather(prompts, written, rules):
    """Prompts and the replies to them (a list of Written) as one right-padded Rollout."""
    heads, stop, device = [[0] * len(prompt) for prompt in prompts], set(rules.stop.tolist()), rules.close.device

    def padded(key, fronts, fill, dtype):
        return pad([front + getattr(row, key) for front, row in zip(fronts, written)], fill, device, dtype)

    ids = padded("ids", prompts, rules.pad, torch.long)  # (B, T)
    sampled, thinking = (padded(key, heads, False, torch.bool) for key in ("sampled", "thinking"))  # (B, T) each
    logps = padded("logps", heads, 0.0, torch.float)  # (B, T)
    think = [[i for i, yes in zip(row.ids, row.thinking) if yes and i != rules.think_end] for row in written]
    reply = [[i for i, drawn, thought in zip(row.ids, row.sampled, row.thinking)
              if drawn and not thought and i not in stop] for row in written]
    closed, broken = (torch.tensor([getattr(row, key) for row in written], device=device)
                      for key in ("closed", "broken"))  # (B,) each
    return Rollout(ids, sampled, thinking, logps, closed, broken, think, reply, len(os.path.commonprefix(prompts)))


def strip_echo(reply, prefix, max_words):
    """Cut off an echo: the prefix's last 2 to `max_words` words at the reply's beginning, after an ellipsis or not.

    Leading white space always goes. max_words below 2: no echo is looked for.
    """
    reply = reply.lstrip()
    start = 3 if reply.startswith("...") else 1 if reply.startswith("\u2026") else 0
    said, known = words(reply[start:]), words(prefix)
    for n in range(min(max_words, len(said), len(known)), 1, -1):  # the longest echo first
        if said[:n] == known[-n:]:
            rest = reply[start:].lstrip()
            for word in said[:n]:
                rest = rest[len(word):].lstrip()
            return rest
    return reply


# -----------------------------------------------------------------------------
# before the run

def notes(args, tokenizer, usual):
    """Warnings about flags that do not suit each other, one line each. usual: the preset's defaults, by name."""
    lines = prompt_notes(args.prompt, tokenizer, args.reasoning_tokens)
    if located(args.model)[0] != located(usual("model"))[0] and args.g_lr == usual("g_lr"):
        lines.append(f"--g_lr {args.g_lr:g} was found for {usual('model')}; docs/results.md has rates for other sizes")
    return lines


def probe(writer, player, windows, judge=None):
    """Refuse a model that the run would score wrongly: sample, score, train and judge three sequences as the run will.

    Their lengths differ, up to the longest in the run. The adapter is perturbed, and restored at the end.
    Without gradients, training is not checked.
    """
    args, most = writer.args, writer.max_tokens - len(writer.rules.close) - 6  # two of thinking, four of completion
    prompts = [writer.prompt_ids(w.prefix)[:most] for w in windows]
    text = "\n".join(w.prefix + w.sep + w.truth for w in windows)
    prompts[0] = (prompts[0] + writer.encode(text)[0] * most)[:most]
    prompts[1] = prompts[1][:len(prompts[1]) * 3 // 4 or 1]
    params = adapter_parameters(player.model, player.adapter)
    kept, rng = [p.detach().clone() for p in params], rng_for("probe")

    def restore():
        for p, old in zip(params, kept):
            p.data.copy_(old)

    try:
        player.activate()
        for p in params:
            p.data += 0.03 * torch.randn(p.shape, generator=rng).to(p.device)
        gaps = log_prob_gaps(writer.sampler, player, writer.rules, prompts, args)
        share, names = untrained(player.model) if torch.is_grad_enabled() else (0, [])
        restore()
        if judge:
            judge.player.activate()
            judged = judge.score(windows, [window.truth for window in windows[1:] + windows[:1]], 0)
            for rows in micro_batches(judged.shown, args.micro_batch):
                judge.loss(judged, rows)[0].backward()
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"--model {args.model} cannot be used: {type(error).__name__}: {first_line(error)}") from None
    finally:
        restore()
        for part in (player.model, *((judge, judge.player.model) if judge else ())):
            part.zero_grad(set_to_none=True)
        for sampler in {writer.sampler, getattr(judge, "sampler", writer.sampler)}:
            sampler.release()
    if share > 0.01:
        print(f"--model {args.model}: {share:.0%} of the weights are not trained: {', '.join(names)}", flush=True)
    allowed = 0.5 if args.quant == "int8" else 1e-3 if args.dtype == "fp32" else 0.3
    for name, gap in gaps.items():
        if not gap <= allowed:
            raise UserError(f"--model {args.model}: the {name}'s log-probs are {gap:.2g} nats off the model's own, and "
                            f"{allowed} are allowed; choose another model, or --dtype fp32 if rounding is the cause")


def log_prob_gaps(sampler, player, rules, prompts, args):
    """How far, in nats, sampler, learner and reference are from the model's own pass over each sequence alone, without
    padding or cache: for each of the three, the mean absolute gap in log-prob over a row's tokens, in the worst row.
    With gradients on, the learner's are backpropagated, for `untrained` to see.
    """
    sampler.sync(player.adapter)
    keys = [("probe", i) for i in range(len(prompts))]
    roll = rollout(sampler, prompts, rules, min(args.reasoning_tokens, 2), 4, args.temperature, keys)
    if roll.broken.any():
        raise ValueError("its states are not finite; if --dtype is fp16, give bf16 or fp32")
    found, lm, with_kl = {"sampler": roll.logps, "learner": 0 * roll.logps}, causal_lm(player.model), args.kl_coef > 0
    if with_kl:
        found["reference"] = 0 * roll.logps  # (B, T)
    for rows in micro_batches(range(len(prompts)), args.micro_batch):
        stats, mask = sampled_stats(player.model, roll, rows, rules, args.temperature, with_kl), roll.sampled.clone()
        mask[[i for i in range(len(prompts)) if i not in rows]] = False  # (B, T)
        found["learner"][mask] = stats.logp.detach()
        if with_kl:
            found["reference"][mask] = stats.ref_logp
        if torch.is_grad_enabled():
            (stats.logp.sum() + stats.kl.sum()).backward()
    gaps = {}
    for name, logps in found.items():
        with torch.no_grad(), without_adapters(player.model) if name == "reference" else contextlib.nullcontext():
            for ids, sampled, thinking, row in zip(roll.ids, roll.sampled, roll.thinking, logps):
                at = sampled.nonzero()[:, 0]  # (n,)
                logits = lm(input_ids=ids[None, :at[-1] + 1], use_cache=False).logits[0, at - 1].float()  # (n, V)
                blocked = rules.blocked[torch.where(thinking[at], THINKING, COMPLETION)]  # (n, V)
                logits = (logits[:, :blocked.shape[1]] / (args.temperature or 1.0)).masked_fill(blocked, FORBIDDEN)
                wanted = logits.log_softmax(-1).gather(1, ids[at, None])[:, 0]  # (n,)
                gap, worst = (row[at] - wanted).abs().mean().item(), gaps.get(name, 0.0)
                gaps[name] = gap if gap > worst or math.isnan(gap) else worst  # nan stays
    return gaps
