"""
Turn rollouts into training data: for each real completion, the thinking after which the model expects it most.

    python -m tools.traces out/demo-1 --out traces.jsonl         # rollouts' thoughts, and 4 rationalisations per window
    python -m tools.traces out/demo-1 out/demo-2 --out traces.jsonl --samples 0      # only the thoughts, from two runs

What differs from rationalisation in STaR (Zelikman et al. 2022, arXiv 2203.14465):
1) No answer is right or wrong, so a trace is kept for its lift: log p(truth | prefix, trace) - log p(truth | prefix,
   empty trace) in nats per token of the truth, under the generator's prompt, at temperature 1; always above 0.
2) Thoughts from rollouts, whatever was written after them, compete with thoughts made with the truth in sight.
3) A trace that gives the truth away word for word is dropped, see `num_quoted`.
"""
import collections
import json
import os
import pathlib
import random
import re
import unicodedata

from flags import Parser, Run, UserError, check_device, json_lines, write_whole

# the prompt of a rationalisation: the system turn shows the truth, the user turn is the generator's
RATIONALISE = """<|im_start|>system
You write down what a writer thinks at the end of a prefix, just before going on with it.
For this once you know the words that come next:
<next>
{truth}
</next>
Tell in a few sentences what can be seen in the prefix, what kind of text it is, and what is therefore likely to come,
so that somebody who reads the prefix and these thoughts would expect just these words.
Think as if you had not seen them: do not quote them, and do not mention that they are known. Write the thoughts alone.
<|im_start|>user
<prefix>
{prefix}
</prefix>
<|im_start|>assistant
<think>
"""
KEYS = "prefix sep truth think closed source lift logp logp_empty n_think n_truth run".split()  # a line of traces.jsonl
SHORTEST = 4  # this many tokens of the truth in a row are a quote
PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212", "''\"\"---")  # quotation marks, dashes, minus


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs; the first one's generator samples and scores")
    add("--out", required=True, help="new file for the traces, .jsonl; a report is written beside it")
    add("--samples", type=int, default=4, help="rationalisations per window (0: only the rollouts' thoughts)")
    add("--rationale", choices=["think", "reply"], default=None, help="part of an answer that is the rationalisation "
        "(default: think for a run of the demo, else reply, which follows thoughts about the task)")
    add("--policy", choices=["run", "base"], default="run", help="who samples and scores: the generator or the base")
    add("--reasoning_tokens", type=int, default=None, help="token budget of a rationalisation (default: the run's)")
    add("--temperature", type=float, default=1.0, help="sampling temperature of rationalisations (0: greedy)")
    add("--max_windows", type=int, default=0, help="number of windows to use, drawn at random (0: all)")
    add("--batch_size", type=int, default=32, help="rationalisations sampled at once")
    add("--seed", type=int, default=0, help="seed of the rationalisations and of the choice of windows")
    add("--device", default=None, help="cuda, cuda:1, cpu, ... (default: the run's)")
    add("--min_lift", type=float, default=0.0, help="lift that a trace must exceed, in nats per token of the truth")
    add("--max_quote", type=int, default=8, help="most tokens of the truth that a trace may quote (0: no limit)")
    add("--max_reuse", type=int, default=2, help="most windows that the same text may be the trace of (0: no limit)")
    return parser


def check(args, runs):
    """Fill in what is unset from the first run; refuse values out of range and runs that do not belong together."""
    first, least = runs[0].args, dict(reasoning_tokens=1, batch_size=1)
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not least.get(name, 0) <= value < 2 ** 63:
            raise UserError(f"--{name} {value}: must be a finite number, {least.get(name, 0)} or more")
    out = pathlib.Path(args.out)
    if out.suffix != ".jsonl" or out.exists() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out {out}: name a new file that ends in .jsonl, in a folder that can be written to")
    for run in runs:
        for key in "model prompt prefix_tokens reasoning_tokens completion_tokens".split():
            if getattr(run.args, key, None) != getattr(first, key, None):
                raise UserError(f"{run.folder} and {runs[0].folder} differ in --{key}; make traces from each alone")
        if not run.rollouts:
            raise UserError(f"{run.folder} has no rollouts yet; train it first")
    args.rationale = args.rationale or ("think" if first.preset == "demo" else "reply")
    args.reasoning_tokens = first.reasoning_tokens = args.reasoning_tokens or first.reasoning_tokens
    args.device = args.device or first.device
    check_device(args.device)
    if args.samples and not args.reasoning_tokens:
        raise UserError(f"{runs[0].folder} has no thinking; give --reasoning_tokens or --samples 0")


def words(text):
    """The text with its white space normalised; thoughts that agree in this are duplicates."""
    return " ".join(text.split())


def read_windows(runs, max_windows, seed):
    """The windows of some runs in the order of their first occurrence, each with the thoughts on it, by their words."""
    found = {}
    for run, name in ((run, name) for run in runs for name in ("rollouts", "floor")):
        for r in getattr(run, name):
            if not all(isinstance(r.get(key), str) for key in ("prefix", "sep", "truth", "think")):
                raise UserError(f"{run.folder}/{name}.jsonl: a line lacks prefix, sep, truth or think; it is damaged")
            thought = dict(think=r["think"], closed=bool(r.get("think_closed")), source=name, run=str(run.folder))
            found.setdefault((r["prefix"], r["sep"], r["truth"]), {}).setdefault(words(r["think"]), thought)
    windows = [dict(zip(KEYS, texts), thoughts=thoughts) for texts, thoughts in found.items()]
    chosen = random.Random(f"windows {seed}").sample(range(len(windows)), min(max_windows or len(found), len(found)))
    return [windows[i] for i in sorted(chosen)]


if __name__ == "__main__":
    args = flags().parse_args()  # before torch is imported: a mistyped flag must not wait for that
    runs = [Run(folder) for folder in args.runs]
    check(args, runs)
    windows = read_windows(runs, args.max_windows, args.seed)

import torch
from tqdm import tqdm

from checkpoint import explain_failures, load_run
from data import bos_ids
from model import DTYPES, checked_device, load_players, pad, token_stats
from rollout import COMPLETION, Writer, rollout
from sampler import Sampler


# filters: pure. A candidate has the KEYS of a trace, a window (its number) and a quote (tokens of the truth it quotes)

def letters(text):
    """The text without white space, case and typographic variants: what a quote is recognised by."""
    return "".join(unicodedata.normalize("NFKD", text).translate(PLAIN).casefold().split())


def num_quoted(encode, prefix, truth, think):
    """How many tokens of the truth stand in the thinking, in runs of SHORTEST or more that the prefix does not have.

    Many short quotes give as much away as a long one; shorter runs are chance. Letters are compared, as the same words
    may be other tokens in the thinking. White space does not count; a number counts as one token.
    """
    pieces, last = [""], 0
    for start, end in encode(truth)[1]:  # tokens of one character share its span, which is counted once
        text = truth[max(start, last):end]
        last = max(last, end)
        if text.isdigit() and pieces[-1].isdigit():  # some tokenizers make a token of each digit
            pieces[-1] += letters(text)
        else:
            pieces.append(letters(text))
    pieces = [*filter(None, pieces)]
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
    for c in sorted(candidates, key=lambda c: -c["lift"] if c["lift"] > 0 else 0):  # a nan cannot be sorted
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


def spread(rows):
    """Number and mean of the lifts, for all sources and for each: {source: {...}}."""
    lifts = collections.defaultdict(list)
    for row in rows:
        lifts["all"].append(row["lift"])
        lifts[row["source"]].append(row["lift"])
    return {source: dict(number=len(x), mean=sum(x) / len(x)) for source, x in lifts.items()}


def rationale_ids(tokenizer, encode, prefix, truth):
    """Ids of the prompt of a rationalisation; neither text can open or close a turn."""
    texts = {"{prefix}": prefix, "{truth}": truth}
    parts = [encode(texts[part])[0] if part in texts else tokenizer(part, add_special_tokens=False).input_ids
             for part in re.split(r"(\{prefix\}|\{truth\})", RATIONALISE)]
    return sum(parts, bos_ids(tokenizer))


def rationalise(writer, batch, args, keys):
    """A text for each window and whether the model ended it: its thinking, or its reply after an empty one."""
    prompts = [rationale_ids(writer.tokenizer, writer.encode, window["prefix"], window["truth"]) for window in batch]
    budgets = (args.reasoning_tokens, 1) if args.rationale == "think" else (0, args.reasoning_tokens)
    roll = rollout(writer.sampler, prompts, writer.rules, *budgets, args.temperature, keys)
    if args.rationale == "think":
        return [*zip(map(writer.decode, roll.think), roll.think_closed.tolist())]
    num_drawn = roll.sampled.sum(1).tolist()  # a stop id is drawn, and is not in the reply
    return [(writer.decode(ids).strip(), n > len(ids)) for ids, n in zip(roll.reply, num_drawn)]


def mean_logps(model, rules, prompt, thinks, truth):
    """log p(truth | prompt, thinking) in nats per token of the truth, for each thinking. All are lists of ids."""
    heads = [prompt + think + rules.close.tolist() for think in thinks]
    ids = pad([head + truth for head in heads], rules.pad, rules.close.device)  # (B, T)
    mask = pad([[0] * len(head) + [1] * len(truth) for head in heads], 0, ids.device, torch.bool)  # (B, T)
    with torch.no_grad():
        stats = token_stats(model, ids, mask, rules.blocked, torch.full_like(ids, COMPLETION), shared=len(prompt))
    return stats.logp.view(len(thinks), len(truth)).double().mean(1).tolist()


def score(model, writer, window, number, completion_tokens):
    """The candidates of a window: its thoughts, with what they quote and how they lift."""
    thinks = [writer.encode(thought["think"])[0] for thought in window["thoughts"].values()]
    truth = writer.encode(window["truth"])[0][:completion_tokens]
    empty, *logps = mean_logps(model, writer.rules, writer.prompt_ids(window["prefix"]), [[], *thinks], truth)
    candidates = []
    for (text, thought), think, logp in zip(window["thoughts"].items(), thinks, logps):
        quote = num_quoted(writer.encode, window["prefix"], window["truth"], text)
        candidates.append(window | thought | dict(window=number, quote=quote, n_truth=len(truth), logp_empty=empty,
                                                  n_think=len(think) if text else 0, logp=logp, lift=logp - empty))
    return candidates


if __name__ == "__main__":
    run, device, candidates = runs[0].args, checked_device(args.device), []
    explain_failures()
    player, _ = load_run(runs[0], device) if args.policy == "run" else load_players(run, device)  # a new adapter adds 0
    player.activate()
    writer = Writer(Sampler(player.model, DTYPES[run.dtype], run.merge), player.tokenizer, run)
    writer.sampler.sync(player.adapter)
    player.check_length(len(rationale_ids(player.tokenizer, writer.encode, "", "")) + run.prefix_tokens
                        + 2 * run.completion_tokens + args.reasoning_tokens)

    for first in tqdm(range(0, len(windows), args.batch_size), unit="batch"):
        batch = windows[first:first + args.batch_size]
        for n in range(args.samples):
            keys = [(args.seed, "rationalise", n, first + i) for i in range(len(batch))]
            for window, (think, closed) in zip(batch, rationalise(writer, batch, args, keys)):
                thought = dict(think=think, closed=closed, source="rationalise", run=args.runs[0])
                window["thoughts"].setdefault(words(think), thought)
        for number, window in enumerate(batch, first):
            candidates += score(player.model, writer, window, number, run.completion_tokens)

    traces, dropped = select(candidates, args)
    report = dict(num_windows=len(windows), num_candidates=len(candidates), num_traces=len(traces), dropped=dropped,
                  before=spread(candidates), after=spread(traces), args=vars(args))
    write_whole(pathlib.Path(args.out).with_suffix(".report.json"), json.dumps(report, indent=2) + "\n")
    write_whole(pathlib.Path(args.out), json_lines(traces))
    print(f"{args.out}: {len(traces)} traces for {len(windows)} windows; dropped {dropped}")
    for when in ("before", "after"):
        print(f"mean lift {when} filters: " + ", ".join(f"{name} {x['mean']:.3f}" for name, x in report[when].items()))
