"""
Sampling: think for a bounded number of tokens, close the thinking, write the completion; one KV cache from end to end.

What differs from the textbook:
1. One token loop for the whole batch: each row is a small state machine (thinking, forced, completion, done), kept in
   tensors, so that rows need not think equally long.
2. No top-k, no top-p: the learner can score exactly what was drawn. The sampler returns its own log-probs, to compare.
3. Forced tokens (the closing of the thinking, the blank line after it) are in `ids` and not in `sampled`.

Letters: B sequences, T tokens, V vocabulary, H hidden, L closing length, P prompt width, S stop ids.
"""
from typing import NamedTuple

import torch

from data import clip, prompt_ids
from model import causal_lm, head_weights, pad, row_logps

THINKING, COMPLETION = 0, 1  # kinds of sampled positions; rows of `Rules.blocked`


class Rules(NamedTuple):
    """What the tokenizer and the model allow where."""
    stop: torch.Tensor     # (S,) ids that end a completion
    close: torch.Tensor    # (L,) ids forced where the thinking ends: </think>, then a blank line
    think_end: int         # id of </think>; -1 where it is no single token: then the budget alone ends the thinking
    blocked: torch.Tensor  # (2, V) ids forbidden in thinking and in completion; V is the tokenizer's, not the model's
    pad: int


def rules(tokenizer, model):
    """Stop ids: eos, <|im_end|>, <|endoftext|>, what generation_config adds. Forbidden: see `thinking` in README."""
    device = causal_lm(model).device
    ids = tokenizer.get_vocab()
    extra = causal_lm(model).generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, ids.get("<|im_end|>"), ids.get("<|endoftext|>")} - {None}
    stop |= set(extra if isinstance(extra, list) else [extra]) - {None}
    think, think_end = ids.get("<think>", -1), ids.get("</think>", -1)
    V = min(max(ids.values()) + 1, causal_lm(model).get_output_embeddings().weight.shape[0])
    blocked = torch.ones(2, V, dtype=torch.bool)  # (2, V)
    blocked[:, [i for i in ids.values() if i < V]] = False
    for kind, forbidden in ((THINKING, stop | {think}), (COMPLETION, {think, think_end})):
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
    sampled: torch.Tensor       # (B, T) drawn from the model: trained. Prompt, forced and padded positions are not
    thinking: torch.Tensor      # (B, T) belongs to the thinking, its </think> included
    logps: torch.Tensor         # (B, T) the sampler's log-probs, 0 where not sampled
    think_closed: torch.Tensor  # (B,) the model closed its thinking by itself
    think: list                 # B lists of ids, without </think>
    reply: list                 # B lists of ids, without the stop id


@torch.no_grad()
def rollout(model, prompts, rules, reasoning_tokens, completion_tokens, temperature=1.0, generator=None):
    """Sample a reply to each of B prompts (lists of ids) with whatever adapter is active.

    At most `reasoning_tokens` of thinking, then `rules.close` is forced, then at most `completion_tokens` up to a stop
    id. temperature 0 is greedy. `generator` makes it reproducible on one device.
    """
    device, B, L = rules.close.device, len(prompts), len(rules.close)
    ids, seen, place = left_padded(prompts, rules.pad, device)    # (B, P) each
    thinking = torch.full((B,), True, device=device)              # (B,)
    done, think_closed = ~thinking, ~thinking                     # (B,) each
    queue = torch.full((B,), L, device=device)                    # (B,) next of `close` to be forced; L: none
    num_think, num_completion = torch.zeros_like(queue), torch.zeros_like(queue)  # (B,) each
    budget = reasoning_tokens + L + completion_tokens
    dtypes = dict(ids=torch.long, alive=torch.bool, sampled=torch.bool, thinking=torch.bool, logps=torch.float)
    out = {key: torch.zeros(B, budget, dtype=dtype, device=device) for key, dtype in dtypes.items()}  # (B, budget) each

    weight, bias = head_weights(model, rules.blocked.shape[1])    # (V, H), (V,)
    backbone, cache = causal_lm(model).base_model, None
    for t in range(budget):
        hidden = backbone(input_ids=ids, attention_mask=seen, position_ids=place, past_key_values=cache, use_cache=True)
        cache = hidden.past_key_values
        over = thinking & (num_think >= reasoning_tokens)         # (B,) the budget is spent: force the whole closing
        queue = torch.where(over, 0, queue)                       # (B,)
        thinking = thinking & ~over                               # (B,)
        forced = queue < L                                        # (B,)
        blocked = rules.blocked[torch.where(thinking, THINKING, COMPLETION)]  # (B, V)
        logps = row_logps(hidden.last_hidden_state[:, -1], weight, bias, blocked, temperature or 1.0)  # (B, V)
        drawn = draw(logps, temperature, generator)               # (B,)
        token = torch.where(forced, rules.close[queue.clamp(max=L - 1)], drawn)  # (B,)
        token = torch.where(done, rules.pad, token)               # (B,)
        sampled = ~forced & ~done                                 # (B,)
        out["ids"][:, t], out["alive"][:, t], out["sampled"][:, t] = token, ~done, sampled  # (B,) each
        out["thinking"][:, t] = thinking & sampled                # (B,)
        out["logps"][:, t] = torch.where(sampled, logps.gather(1, drawn[:, None])[:, 0], 0.0)  # (B,)

        closed = thinking & (token == rules.think_end)            # (B,) </think> drawn: the rest of the closing follows
        num_think += thinking
        num_completion += sampled & ~thinking
        stopped = ~thinking & sampled & torch.isin(token, rules.stop)  # (B,)
        queue = torch.where(closed, 1, queue + (forced & ~done).long())  # (B,)
        think_closed |= closed
        thinking = thinking & ~closed                             # (B,)
        done = done | stopped | (num_completion >= completion_tokens)  # (B,)
        if (device.type == "cpu" or t % 16 == 15) and bool(done.all()):  # asking a GPU means waiting for it
            break
        ids, place = token[:, None], place[:, -1:] + 1            # (B, 1) each
        seen = torch.cat([seen, torch.ones_like(ids)], 1)         # (B, P + t + 1)

    return gather(prompts, out, rules, think_closed)


def complete(model, tokenizer, encode, rules, batch, reasoning_tokens, completion_tokens, echo_tokens, temperature,
             generator):
    """A rollout for each window of a batch, and B pairs: its completion as text, without the echo and cut to
    completion_tokens, and the number of its tokens.
    """
    prompts = [prompt_ids(tokenizer, encode, window.prefix) for window in batch]
    roll = rollout(model, prompts, rules, reasoning_tokens, completion_tokens + echo_tokens, temperature, generator)
    completions = []
    for window, reply in zip(batch, roll.reply):
        text = tokenizer.decode(reply, clean_up_tokenization_spaces=False).rstrip("\ufffd")  # a character cut in two
        text = strip_echo(text, window.prefix, echo_tokens)
        text, n = clip(encode, window.prefix + window.sep, text, completion_tokens)
        completions.append((text, min(n, len(reply))))  # a special token, read as plain text, is five: count it once
    return roll, completions


def taught(roll, prompts, answers, rules):
    """The rollout with given completions (B lists of ids) in place of the drawn ones; only these count as sampled."""
    device, close = rules.close.device, rules.close.tolist()
    heads = [prompt + think + close for prompt, think in zip(prompts, roll.think)]
    ids = pad([head + answer for head, answer in zip(heads, answers)], rules.pad, device)  # (B, T)
    sampled = pad([[False] * len(head) + [True] * len(answer) for head, answer in zip(heads, answers)], False, device,
                  torch.bool)  # (B, T)
    never = torch.full(ids.shape, torch.nan, device=device)  # (B, T) no sampler drew them
    return roll._replace(ids=ids, sampled=sampled, thinking=torch.zeros_like(sampled), logps=never, reply=answers)


def left_padded(prompts, pad_id, device):
    """Lists of ids, left-padded so that all end together: ids, attention mask and positions, (B, P) each."""
    ids = pad([prompt[::-1] for prompt in prompts], pad_id, device).flip(1)   # (B, P)
    seen = pad([[1] * len(prompt) for prompt in prompts], 0, device).flip(1)  # (B, P)
    place = (seen.cumsum(1) - 1).clamp(min=0)                                 # (B, P)
    return ids, seen, place


def draw(logps, temperature, generator):
    """One id a row from log-probs (B, V): argmax(p / Exp(1)), the exponential race, which needs no synchronisation."""
    if temperature == 0:
        return logps.argmax(-1)  # (B,)
    noise = torch.empty_like(logps).exponential_(generator=generator).clamp_(min=1e-30)  # (B, V)
    return (logps.exp() / noise).argmax(-1)  # (B,)


def gather(prompts, out, rules, think_closed):
    """Prompts and what was written behind them to one right-padded Rollout."""
    device, rows = rules.close.device, {key: value.tolist() for key, value in out.items()}
    stop = set(rules.stop.tolist())
    ids, sampled, thinking, logps, think, reply = [], [], [], [], [], []
    for i, prompt in enumerate(prompts):
        length = sum(rows["alive"][i])
        new, is_sampled, is_thinking = (rows[key][i][:length] for key in ("ids", "sampled", "thinking"))
        head = [0] * len(prompt)
        ids.append(prompt + new)
        sampled.append(head + is_sampled)
        thinking.append(head + is_thinking)
        logps.append(head + rows["logps"][i][:length])
        think.append([token for token, yes in zip(new, is_thinking) if yes and token != rules.think_end])
        drawn = zip(new, is_sampled, is_thinking)
        reply.append([token for token, yes, no in drawn if yes and not no and token not in stop])
    ids, logps = pad(ids, rules.pad, device), pad(logps, 0.0, device, torch.float)  # (B, T) each
    sampled, thinking = (pad(mask, False, device, torch.bool) for mask in (sampled, thinking))  # (B, T) each
    return Rollout(ids, sampled, thinking, logps, think_closed, think, reply)


def strip_echo(reply, prefix, max_words):
    """Cut the echo off a reply: the last 2 to `max_words` whole words of the prefix at its beginning, an ellipsis
    before them or not. Leading white space goes in any case. max_words below 2: no echo is looked for.
    """
    reply = reply.lstrip()
    start = 3 if reply.startswith("...") else 1 if reply.startswith("\u2026") else 0
    said, words = reply[start:].split(), prefix.split()
    for n in range(min(max_words, len(said), len(words)), 1, -1):  # the longest echo first
        if said[:n] == words[-n:]:
            rest = reply[start:].lstrip()
            for word in said[:n]:
                rest = rest[len(word):].lstrip()
            return rest
    return reply
