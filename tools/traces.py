"""
Turn a run's rollouts into training data: for each real completion, the thinking after which the model expects it most.

    python -m tools.traces out/demo-1 --out traces.jsonl              # rollouts' thoughts, and 4 rationalisations each
    python -m tools.traces out/demo-1 --out traces.jsonl --samples 0  # only the rollouts' thoughts

What differs from rationalisation in STaR (Zelikman et al. 2022, arXiv 2203.14465):
1) No answer is right or wrong, so a trace is kept for its lift: log p(truth | prefix, trace) - log p(truth | prefix,
   empty trace) in nats per token of the truth, under the generator's prompt, at temperature 1.
2) Thoughts from rollouts, whatever was written after them, compete with thoughts made with the truth in sight.
3) A trace that gives the truth away word for word is dropped, see `num_quoted`.
"""
import collections
import os
import pathlib
import random
import re

from flags import Parser, Run, UserError, check_device, json_lines, write_whole

# the prompt of a rationalisation: the system turn shows the truth, the user turn is the generator's
RATIONALISE = """<|im_start|>system
You write down what a writer thinks at the end of a prefix, just before continuing it.
This time you are given the words that come next:
<next>
{truth}
</next>
In a few sentences, say what the prefix shows, what kind of text it is, and what is therefore likely to follow, so that
a reader of the prefix and of these thoughts would expect exactly these words.
Think as if you had not seen them: do not quote them, and do not mention that they are known. Write only the thoughts.
<|im_start|>user
<prefix>
{prefix}
</prefix>
<|im_start|>assistant
<think>
"""
KEYS = "prefix sep truth think closed source lift logp logp_empty n_think n_truth run".split()  # a line of traces.jsonl
SHORTEST = 4  # this many tokens of the truth in a row are a quote


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="folder of a run; its generator samples and scores")
    add("--out", required=True, help="new file for the traces, .jsonl")
    add("--samples", type=int, default=4, help="rationalisations per window (0: only the rollouts' thoughts)")
    add("--rationale", choices=["think", "reply"], default=None, help="part of an answer that is the rationalisation "
        "(default: think for a run of the demo, else reply, which follows thoughts about the task)")
    add("--max_windows", type=int, default=0, help="number of windows to use, drawn at random (0: all)")
    add("--batch_size", type=int, default=32, help="rationalisations sampled at once")
    add("--seed", type=int, default=0, help="seed of the rationalisations and of the choice of windows")
    add("--device", default=None, help="cuda, cuda:1, cpu, ... (default: the run's)")
    add("--min_lift", type=float, default=0.0, help="lift that a trace must exceed, in nats per token of the truth")
    add("--max_quote", type=int, default=8, help="most tokens of the truth that a trace may quote (0: no limit)")
    add("--max_reuse", type=int, default=2, help="most windows that the same text may be the trace of (0: no limit)")
    return parser


def check(args, run):
    """Refuse what cannot work, and fill in what is unset from the run."""
    if args.batch_size < 1 or min(args.samples, args.max_windows) < 0:
        raise UserError("--batch_size must be 1 or more, --samples and --max_windows 0 or more")
    out = pathlib.Path(args.out)
    if out.exists() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: name a new file in a folder that can be written to")
    if not run.rollouts or not run.args.reasoning_tokens:
        raise UserError(f"{run.folder} has no {'thinking' if run.rollouts else 'rollouts'}; give another run")
    args.rationale = args.rationale or ("think" if run.args.preset in ("demo", "best") else "reply")
    args.device = args.device or run.args.device
    check_device(args.device)


def words(text):
    """The text with its white space normalised; thoughts that agree in this are duplicates."""
    return " ".join(text.split())


def read_windows(run, max_windows, seed):
    """The run's windows in the order of their first occurrence, each with the thoughts on it, by their words."""
    found = {}
    for source in ("rollouts", "floor"):
        for r in getattr(run, source):
            think = r.get("think") or ""
            thought = dict(think=think, closed=bool(r.get("think_closed")), source=source)
            found.setdefault((r["prefix"], r["sep"], r["truth"]), {}).setdefault(words(think), thought)
    windows = [dict(zip(KEYS, texts), thoughts=thoughts) for texts, thoughts in found.items()]
    chosen = random.Random(f"windows {seed}").sample(range(len(windows)), min(max_windows or len(found), len(found)))
    return [windows[i] for i in sorted(chosen)]


if __name__ == "__main__":
    args = flags().parse_args()  # before torch is imported: a mistyped flag must not wait for that
    run = Run(args.run)
    check(args, run)

import torch
from tqdm import tqdm

from checkpoint import explain_failures, load_run
from data import bos_ids
from model import checked_device, pad, token_stats
from rollout import COMPLETION, Writer, rollout
from sampler import Sampler


# filters: pure. A candidate has the KEYS of a trace, a window (its number) and a quote (tokens of the truth it quotes)

def letters(text):
    """The text without white space and case: what a quote is recognised by."""
    return "".join(text.casefold().split())


def num_quoted(encode, prefix, truth, think):
    """How many tokens of the truth stand in the thinking, in runs of SHORTEST or more that the prefix does not have.

    Many short quotes give as much away as a long one; shorter runs are chance. Letters are compared, because the
    thinking may have the same words in other tokens. White space and case do not count.
    """
    spans = dict.fromkeys(encode(truth)[1])  # the tokens of one character share its span, which is counted once
    pieces = [*filter(None, (letters(truth[start:end]) for start, end in spans))]
    thought, known, quoted = letters(think), letters(prefix), set()
    for start in range(len(pieces) - SHORTEST + 1):
        run = "".join(pieces[start:start + SHORTEST])
        if run in thought and run not in known:
            quoted.update(range(start, start + SHORTEST))
    return len(quoted)


def select(candidates, limits):
    """(traces, number of candidates dropped by each filter): of each window the candidate with the most lift. One text
    is the trace of at most max_reuse windows, those where it lifts most; the others take their next best."""
    best, uses, dropped = {}, collections.Counter(), dict.fromkeys("empty quote lift beaten reuse".split(), 0)
    for c in sorted(candidates, key=lambda c: -c["lift"]):
        why = ("empty" if not c["n_think"] else
               "quote" if 0 < limits.max_quote < c["quote"] else
               "lift" if not c["lift"] > limits.min_lift else
               "beaten" if c["window"] in best else
               "reuse" if 0 < limits.max_reuse <= uses[words(c["think"])] else None)
        if why:
            dropped[why] += 1
        else:
            best[c["window"]] = {key: c[key] for key in KEYS}
            uses[words(c["think"])] += 1
    return [best[window] for window in sorted(best)], dropped


def rationale_ids(tokenizer, encode, prefix, truth):
    """Ids of the prompt of a rationalisation; neither text can open or close a turn."""
    head, middle, tail = (tokenizer(part, add_special_tokens=False).input_ids
                          for part in re.split(r"\{truth\}|\{prefix\}", RATIONALISE))
    return bos_ids(tokenizer) + head + encode(truth)[0] + middle + encode(prefix)[0] + tail


def rationalise(writer, batch, part, keys):
    """A text for each window and whether the model ended it: its thinking, or its reply after an empty one."""
    prompts = [rationale_ids(writer.tokenizer, writer.encode, window["prefix"], window["truth"]) for window in batch]
    R = writer.args.reasoning_tokens
    budgets = (R, 1) if part == "think" else (0, R)
    roll = rollout(writer.sampler, prompts, writer.rules, *budgets, writer.args.temperature, keys)
    if part == "think":
        return [*zip(map(writer.decode, roll.think), roll.think_closed.tolist())]
    num_drawn = roll.sampled.sum(1).tolist()  # a stop id is drawn, and is not in the reply
    return [(writer.decode(ids).strip(), n > len(ids)) for ids, n in zip(roll.reply, num_drawn)]


def score(model, writer, window, number):
    """The candidates of a window: its thoughts, with what they quote and how much they lift."""
    prompt, close, rules = writer.prompt_ids(window["prefix"]), writer.rules.close.tolist(), writer.rules
    thinks = [writer.encode(thought["think"])[0] for thought in window["thoughts"].values()]
    truth = writer.encode(window["truth"])[0][:writer.args.completion_tokens]
    heads = [prompt + think + close for think in [[], *thinks]]  # the first is what a trace is compared with
    ids = pad([head + truth for head in heads], rules.pad, rules.close.device)  # (B, T)
    mask = pad([[0] * len(head) + [1] * len(truth) for head in heads], 0, ids.device, torch.bool)  # (B, T)
    with torch.no_grad():
        stats = token_stats(model, ids, mask, rules.blocked, torch.full_like(ids, COMPLETION), shared=len(prompt))
    empty, *logps = stats.logp.view(len(heads), len(truth)).double().mean(1).tolist()
    candidates = []
    for (text, thought), think, logp in zip(window["thoughts"].items(), thinks, logps):
        quote = num_quoted(writer.encode, window["prefix"], window["truth"], text)
        candidates.append(window | thought | dict(window=number, quote=quote, n_truth=len(truth), logp_empty=empty,
                                                  n_think=len(think) if text else 0, logp=logp, lift=logp - empty))
    return candidates


if __name__ == "__main__":
    device, candidates = checked_device(args.device), []
    explain_failures()
    windows = read_windows(run, args.max_windows, args.seed)
    player, _ = load_run(run, device)
    player.activate()
    writer = Writer(Sampler(player.model, run.args.merge), player.tokenizer, run.args)
    writer.sampler.sync(player.adapter)
    player.check_length(len(rationale_ids(player.tokenizer, writer.encode, "", "")) + run.args.prefix_tokens
                        + 2 * run.args.completion_tokens + run.args.reasoning_tokens)

    for first in tqdm(range(0, len(windows), args.batch_size), unit="batch"):
        batch = windows[first:first + args.batch_size]
        for n in range(args.samples):
            keys = [(args.seed, "rationalise", n, first + i) for i in range(len(batch))]
            for window, (think, closed) in zip(batch, rationalise(writer, batch, args.rationale, keys)):
                thought = dict(think=think, closed=closed, source="rationalise")
                window["thoughts"].setdefault(words(think), thought)
        for number, window in enumerate(batch, first):
            candidates += score(player.model, writer, window | {"run": args.run}, number)

    traces, dropped = select(candidates, args)
    print(f"{len(traces)} traces for {len(windows)} windows; candidates dropped: {dropped}")
    for name, rows in ("candidates", candidates), ("traces", traces):
        print(f"{len(rows)} {name}, mean lift {sum(row['lift'] for row in rows) / max(len(rows), 1):.3f}")
    try:
        write_whole(pathlib.Path(args.out), json_lines(traces))
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be written ({error}); make room, or name another file") from None
    print(args.out)
