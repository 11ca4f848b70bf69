"""
Traces as lessons for sft.py: reading them, which are held out, their order, their ids, and the loss on them.

What differs from the textbook:
1. A lesson is, id for id, what the sampler would have left: the prompt, the trace, its closing, the truth. What the
   sampler forces is not taught: the blank line after </think>, and </think> itself where the model did not draw it.
2. A truth does not teach to stop: it ends where its window was cut. Only one that is much shorter does.
3. Which line is held out depends on its prefix alone, so that neither more lines nor another seed move it.

Letters: b lessons of a pass, T tokens, N taught ones.
"""
import functools
import hashlib
import json
import math
import pathlib
import random
import zlib
from typing import NamedTuple

import torch
import zstandard
from torch.nn import functional as F

from data import clean, open_bytes
from flags import UserError
from model import hidden_states, pad, token_logps
from rollout import COMPLETION, THINKING

NONE, TRACE, TRUTH, PLAIN = range(4)  # what a position of a lesson belongs to; NONE is not taught
PARTS = {"trace": TRACE, "truth": TRUTH, "plain": PLAIN}
SLACK = 16  # tokens a cut truth may fall short of the most: white space lost, a character cut in two (data.cut_window)


class Trace(NamedTuple):
    """One line of traces.py's file, as far as it is needed."""
    prefix: str
    sep: str
    truth: str
    think: str
    closed: bool = None  # whether the thinking ended by itself; None, in another program's file: if it is short enough


def read_traces(files):
    """All traces of .jsonl[.gz|.zst] files, in order. A line that is none is an error: a program wrote them."""
    traces = []
    for file in map(pathlib.Path, files):
        try:
            with open_bytes(file) as lines:
                traces += [read_trace(f"{file}:{n}", line) for n, line in enumerate(lines, 1) if line.strip()]
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"--data {file} cannot be read: {error}") from None
    if not traces:
        raise UserError(f"--data {' '.join(map(str, files))}: there is no trace in it; make some with traces.py")
    return traces


def read_trace(where, line):
    """One line to a Trace."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"--data {where} is not JSON; mend or remove that line") from None
    *texts, last = Trace._fields
    wrong = [key for key in texts if not isinstance(row, dict) or not isinstance(row.get(key), str)]
    wrong = wrong or [key for key in ("prefix", "truth") if not row[key].strip()]
    if wrong:
        raise UserError(f"--data {where} has no text in {', '.join(wrong)}; a trace of traces.py has one in each of "
                        f"{', '.join(texts)}")
    if row.get(last) not in (None, True, False):
        raise UserError(f"--data {where}: {last} is {json.dumps(row[last])[:50]} and must be true, false or left out")
    return Trace(*(clean(row[key]) for key in texts), row.get(last))


def split(traces, share):
    """(train, held out): the held-out ones are about that share of all prefixes, in the order of their hashes."""
    def place(trace):
        return int.from_bytes(hashlib.blake2b(trace.prefix.encode(), digest_size=8).digest(), "big") / 2 ** 64

    held_out = sorted((trace for trace in traces if place(trace) < share), key=lambda t: (place(t), t[:4]))
    return [trace for trace in traces if place(trace) >= share], held_out


# -----------------------------------------------------------------------------
# order: a pure function of (seed, step)

def batch_of(step, batch_size, mix, num_traces, seed):
    """The lessons of a step: batch_size pairs (whether it is plain, number of its trace).

    Of the first p lessons of a run floor(p * mix) are plain ones. Either kind goes through all traces in a shuffled
    order before any comes again.
    """
    chosen = []
    for p in range(step * batch_size, (step + 1) * batch_size):
        num_plain = plain_among(p, mix)  # before this one
        plain = plain_among(p + 1, mix) > num_plain
        epoch, at = divmod(num_plain if plain else p - num_plain, num_traces)
        chosen.append((plain, order(num_traces, f"{seed} {plain} {epoch}")[at]))
    return chosen


def plain_among(p, mix):
    return math.floor(round(p * mix, 6))  # rounded: 0.29 * 100 is 28.999999999999996


@functools.lru_cache(4)
def order(n, key):
    numbers = list(range(n))
    random.Random(f"traces {key}").shuffle(numbers)
    return numbers


# -----------------------------------------------------------------------------
# ids and loss

class Lesson(NamedTuple):
    ids: list
    part: list  # NONE, TRACE, TRUTH or PLAIN, one an id


def taught_trace(prompt, think, closed, truth, rules, stop, reasoning_tokens, completion_tokens):
    """The lesson of a trace, as a rollout of these ids would look; longer ones are cut as the sampler would.

    closed: whether the model ended the thinking, by </think>, which is then taught; None: it did if it had tokens left.
    stop: the id that ends a text, taught where the truth is shorter than a window's ever is; None: never.
    """
    think, truth, close = think[:reasoning_tokens], truth[:completion_tokens], rules.close.tolist()
    closed = closed is not False and rules.think_end >= 0 and len(think) < reasoning_tokens
    end = [stop] if stop is not None and len(truth) + SLACK < completion_tokens else []
    ids = prompt + think + close + truth + end
    part = [NONE] * len(prompt) + [TRACE] * (len(think) + closed) + [NONE] * (len(close) - closed)
    return Lesson(ids, part + [TRUTH] * len(truth + end))


def plain_text(encode, bos, trace, completion_tokens):
    """The lesson of a trace's text without template or trace, as the discriminator reads it; all of it is taught."""
    before = trace.prefix + trace.sep
    ids, offsets = encode(before + trace.truth)
    ids = bos + ids[:sum(end <= len(before) for _, end in offsets) + completion_tokens]
    return Lesson(ids, [NONE] + [PLAIN] * (len(ids) - 1))  # nothing stands before the first id to predict it from


def taught_nats(model, lessons, rules):
    """Negative log-prob in nats, summed, and number of the taught tokens, by part: (4,) each.

    With the ids that sampler and learner of train.py forbid; a plain text's are a completion's.
    """
    device = rules.close.device
    ids, part = (pad(rows, NONE, device) for rows in zip(*lessons))  # (b, T) each
    taught = part != NONE  # (b, T)
    hidden, targets = hidden_states(model, ids)[:, :-1][taught[:, 1:]], ids[taught]  # (N, H), (N,)
    kind = torch.where(part == TRACE, THINKING, COMPLETION)[taught]  # (N,)
    logp = token_logps(model, hidden, targets, rules.blocked, kind).logp  # (N,)
    of_part = F.one_hot(part[taught], 1 + len(PARTS))  # (N, 4)
    return -(of_part * logp[:, None]).sum(0), of_part.sum(0)  # (4,), (4,)


def held_out_loss(nats, counts, mix):
    """Mean nats a token by part, as {"trace", "truth", "plain"}, and "held": the loss that training lowers, on these.

    nats, counts: (4,) each, of both lessons of every held-out trace. A part without a token has no entry.
    """
    weights = torch.tensor([0.0, 1 - mix, 1 - mix, mix])  # (4,)
    parts = {name: (nats[k] / counts[k]).item() for name, k in PARTS.items() if counts[k]}
    return {"held": ((weights * nats).sum() / (weights * counts).sum()).item(), **parts}
