"""
From rollouts to training data: for each real completion, the reasoning after which the model expects it most.

    python traces.py out/demo-1 --out traces.jsonl       # its rollouts' thoughts, and 4 rationalisations a window
    python traces.py out/demo-1 out/demo-2 --out traces.jsonl --samples 0     # of two runs, without these
    python traces.py out/writeup-1 --out traces.jsonl --policy base --min_lift 0.02

The same command goes on where one was stopped or killed. Beside traces.jsonl it leaves traces.report.json, and
traces.candidates.jsonl with all that was scored: remove traces.jsonl alone to filter the same candidates anew.

What differs from rationalisation in STaR (Zelikman et al. 2022, arXiv 2203.14465):
1) No answer is right or wrong, so a trace is kept for its lift: log p(truth | prefix, trace) - log p(truth | prefix,
   empty trace) in nats a token of the truth, under the generator's own prompt, at temperature 1; always above 0.
2) Thoughts that rollouts had before they wrote something else compete with those made with the truth in sight.
3) What gives the truth away word for word is dropped, see `num_quoted` in selection.py.

Letters: N tokens of truths, H hidden.
"""
import hashlib
import json
import os
import pathlib
import random
import re

from evaluate import read_lines
from flags import Parser, UserError, check_device, read_args
from selection import LIMITS, SHORTEST, num_quoted, print_report, report, select, words

# how the model is asked for the reasoning: the user's turn is the generator's, the truth stands before it
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
SAME = "model prefix_tokens reasoning_tokens completion_tokens echo_tokens".split()  # of runs that are used together


# -----------------------------------------------------------------------------
# which windows there are

def read_windows(folders, max_windows, seed):
    """The windows of some runs, in the order in which they first occur, each with the thoughts that were had on it."""
    found = {}
    for folder in folders:
        for source, name in (("rollout", "rollouts.jsonl"), ("floor", "floor.jsonl")):
            for r in read_lines(pathlib.Path(folder) / name):
                texts = [r.get(key) for key in ("prefix", "truth", "think")]
                if not all(isinstance(text, str) for text in texts) or not all(texts[:2]):
                    raise UserError(f"{folder}/{name}: a sequence without prefix, truth and think; the file is damaged")
                think = r["think"].rstrip("\ufffd")  # a character cut in two
                window = r["prefix"], r.get("sep", " "), r["truth"]
                thought = dict(source=source, run=str(folder), think=think, closed=bool(r.get("think_closed")))
                found.setdefault(window, []).append(thought)
    windows = [dict(prefix=prefix, sep=sep, truth=truth, thoughts=thoughts)
               for (prefix, sep, truth), thoughts in found.items()]
    if max_windows and max_windows < len(windows):
        chosen = random.Random(f"windows {seed}").sample(range(len(windows)), max_windows)
        windows = [windows[i] for i in sorted(chosen)]
    return windows


# -----------------------------------------------------------------------------
# what the model makes of them

def rationale_ids(tokenizer, encode, prefix, truth):
    """Ids of the prompt that asks for the reasoning; neither text can open or end a turn."""
    from data import bos_ids
    texts = {"{prefix}": prefix, "{truth}": truth}
    parts = [encode(texts[part])[0] if part in texts else tokenizer(part, add_special_tokens=False).input_ids
             for part in re.split(r"(\{prefix\}|\{truth\})", RATIONALISE)]
    return sum(parts, bos_ids(tokenizer))


def rationalise(model, tokenizer, encode, rule, batch, where, reasoning_tokens, temperature, generator):
    """A thought and whether it ended by itself, for each window: its thinking, or its reply after an empty one."""
    from rollout import rollout
    prompts = [rationale_ids(tokenizer, encode, window["prefix"], window["truth"]) for window in batch]
    budgets = (reasoning_tokens, 1) if where == "think" else (0, reasoning_tokens)
    roll = rollout(model, prompts, rule, *budgets, temperature, generator)
    written = roll.think if where == "think" else roll.reply
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False).rstrip("\ufffd") for ids in written]
    if where == "think":
        return [*zip(texts, roll.think_closed.tolist())]
    drawn = roll.sampled.sum(1).tolist()  # a reply that ended by itself has drawn a stop id as well
    return [(text.strip(), n > len(ids)) for text, n, ids in zip(texts, drawn, written)]


def mean_logps(model, rule, prompts, thinks, truths):
    """log p(truth | prompt, think) in nats a token of the truth: a list of B, for B lists of ids each."""
    import torch

    from model import hidden_states, token_logps
    from rollout import COMPLETION, Rollout, taught
    rows = taught(Rollout(**dict.fromkeys(Rollout._fields) | {"think": thinks}), prompts, truths, rule)
    shared = len(os.path.commonprefix([*prompts]))
    with torch.no_grad():
        hidden = hidden_states(model, rows.ids, shared)[:, :-1][rows.sampled[:, 1:]]  # (N, H)
        targets = rows.ids[rows.sampled]  # (N,)
        logp = token_logps(model, hidden, targets, rule.blocked, torch.full_like(targets, COMPLETION)).logp  # (N,)
    return [part.double().mean().item() for part in logp.split([len(truth) for truth in truths])]


def score(model, tokenizer, encode, rule, batch, completion_tokens):
    """Scored windows from windows with thoughts: those that repeat an earlier one are left out, the rest scored."""
    from data import prompt_ids
    rows, scored = [], []
    for window in batch:
        texts = {words(thought["think"]): thought for thought in reversed(window["thoughts"])}  # the first of its words
        candidates = [thought for thought in window["thoughts"] if texts[words(thought["think"])] is thought]
        prompt, truth = prompt_ids(tokenizer, encode, window["prefix"]), encode(window["truth"])[0][:completion_tokens]
        rows.append((prompt, [], truth))
        for candidate in candidates:
            think = encode(candidate["think"])[0]
            rows.append((prompt, think, truth))
            candidate["n_think"] = len(think) if candidate["think"].strip() else 0
            candidate["quote"] = num_quoted(encode, window["prefix"], window["truth"], candidate["think"])
        scored.append({key: window[key] for key in ("prefix", "sep", "truth")} | dict(
            n_truth=len(truth), repeated=len(window["thoughts"]) - len(candidates), candidates=candidates))
    parts = [rows[first:first + len(batch)] for first in range(0, len(rows), len(batch))]
    logps = iter([logp for part in parts for logp in mean_logps(model, rule, *zip(*part))])
    for window in scored:
        window["logp_empty"] = next(logps)
        for candidate in window["candidates"]:
            candidate["logp"] = next(logps)
    return scored


def player(run):
    """The name of the generator's adapter."""
    return "shared" if run["adapters"] == "shared" else "generator"


def policy_model(folder, run, policy, device, reasoning_tokens):
    """What samples and scores, and its tokenizer: the base with a run's generator, or the bare base."""
    from safetensors import SafetensorError

    from data import plain_encoder
    from model import add_adapters, checked_device, load_adapters, load_model, positions
    model, tokenizer = load_model(run["model"], run["quant"], run["dtype"], checked_device(device))
    num_prompt = len(rationale_ids(tokenizer, plain_encoder(tokenizer), "", ""))
    most = num_prompt + run["prefix_tokens"] + 2 * run["completion_tokens"] + reasoning_tokens
    room = positions(model)
    if most > room:
        raise UserError(f"the run's model {run['model']} has {room} positions, and to be shown prefix and truth and to "
                        f"think takes it up to {most}; lower --reasoning_tokens")
    if policy == "run":
        model = add_adapters(model, [player(run)], run["rank"], run["alpha"])
        try:
            load_adapters(model, pathlib.Path(folder, "ckpt"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"{folder}/ckpt cannot be used ({reason}); try --policy base") from None
    return model, tokenizer


# -----------------------------------------------------------------------------
# files: traces.candidates.jsonl, a line of settings and a line a window, grows by a batch at a time

FIRST = b'{"settings": '  # how such a file begins


def refuse_other(path, settings, before):
    """Refuse to go on with a file that was made with other settings."""
    other = {key: before.get(key) for key in settings if before.get(key) != settings[key] and key != "inputs"}
    told = [f"with --{key} {value}" for key, value in other.items() if key != "runs"]
    told += [f"from {' '.join(map(str, other['runs'] or []))}"] if "runs" in other else []
    if told or before.get("inputs") != settings["inputs"]:
        what = f"{', '.join(told)}; give the same" if told else "from runs that have changed since; restore them"
        raise UserError(f"{path} was made {what}, remove it, or name another --out")


def scored_before(path, settings, total, size):
    """The windows that a candidates file holds: whole batches of them; what a kill left behind these is cut off."""
    data = path.read_bytes()
    lines = data.split(b"\n")[:-1]
    try:
        records = [dict(json.loads(line)) for line in lines]
        before = dict(records[0]["settings"]) if records else {}
    except (ValueError, KeyError, TypeError):
        records = None
    if records is None or not records and not FIRST.startswith(data[:len(FIRST)]):
        raise UserError(f"{path} is damaged, or none of traces.py; remove it, or name another --out")
    if len(records) > 1:
        refuse_other(path, settings, before)
    done = len(records) - 1 if len(records) > total else (len(records) - 1) // size * size
    if done <= 0:  # not one batch was written whole: nothing is lost
        path.write_text(json.dumps({"settings": settings}) + "\n", encoding="utf-8")
        return []
    os.truncate(path, sum(len(line) + 1 for line in lines[:done + 1]))
    return records[1:done + 1]


def score_all(args, run, windows, path, settings):
    """All windows, scored; those that the candidates file lacks are added to it, a batch at a time."""
    from checkpoint import Signals, hold
    load = args.runs[0], run, args.policy, args.device, max(args.reasoning_tokens, run["reasoning_tokens"])
    loaded = None if path.exists() else policy_model(*load)  # what cannot be loaded leaves no file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    hold(path, "--out")
    scored, B = scored_before(path, settings, len(windows), args.batch_size), args.batch_size
    if len(scored) == len(windows):
        return scored
    import torch
    from tqdm import tqdm

    from data import plain_encoder
    from model import DTYPES, causal_lm
    from rollout import rules
    from sampler import Sampler
    model, tokenizer = loaded or policy_model(*load)
    encode, rule, device = plain_encoder(tokenizer), rules(tokenizer, model), causal_lm(model).device
    how, signals = (args.rationale, args.reasoning_tokens, args.temperature), Signals()
    sampler = Sampler(model, DTYPES[run["dtype"]], run.get("merge", True)) if args.samples else None
    if sampler:
        sampler.follow(player(run) if args.policy == "run" else None)
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(windows), initial=len(scored), unit="window") as bar:
        for first in range(len(scored), len(windows), B):
            batch = windows[first:first + B]
            for n in range(args.samples):  # keyed by window, so that it does not matter where it stopped
                key = hashlib.blake2b(repr((args.seed, "rationalise", first, n)).encode(), digest_size=7).digest()
                generator = torch.Generator(device).manual_seed(int.from_bytes(key, "big"))
                thoughts = rationalise(sampler, tokenizer, encode, rule, batch, *how, generator)
                for window, (think, closed) in zip(batch, thoughts):
                    thought = dict(source="rationalise", run=args.runs[0], think=think, closed=closed)
                    window["thoughts"].append(thought)
            scored += score(model, tokenizer, encode, rule, batch, run["completion_tokens"])
            file.write("".join(json.dumps(window, ensure_ascii=False) + "\n" for window in scored[first:]))
            file.flush()
            bar.update(len(batch))
            if signals.stop:
                print(f"stopped after {len(scored)} of {len(windows)} windows; the same command goes on")
                raise SystemExit(128 + signals.stop)
    signals.default()
    return scored


# -----------------------------------------------------------------------------
# flags

def read_flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", help="folders of runs, out/NAME; of several, the first one's generator is used")
    add("--out", required=True, help="file of the traces, .jsonl")
    add("--samples", type=int, default=4, help="rationalisations a window (0: the rollouts' thoughts alone)")
    add("--rationale", choices=["think", "reply"], default=None, help="where they are read from: the thinking, or the "
        "reply after an empty one, for a model that thinks about its task (unset: reply; of the demo, think)")
    add("--policy", choices=["run", "base"], default="run", help="what samples and scores: the base with the "
        "run's generator, or the bare base")
    add("--reasoning_tokens", type=int, default=None, help="most tokens of a rationalisation (unset: the run's)")
    add("--temperature", type=float, default=1.0, help="of rationalisations; the lift is always taken at 1 (0: greedy)")
    add("--max_windows", type=int, default=0, help="windows to use, drawn at random (0: all)")
    add("--batch_size", type=int, default=32, help="windows a batch, and sequences a pass")
    add("--seed", type=int, default=0, help="of rationalisations, and of the choice of windows")
    add("--device", default=None, help="cuda, cpu, ... (unset: the run's)")
    # filters
    add("--min_lift", type=float, default=0.0, help="nats a token of the truth that a trace must exceed")
    add("--max_quote", type=int, default=8, help=f"most tokens of the truth that a trace may quote, {SHORTEST} or more "
        "at a time (0: any)")
    add("--min_think", type=int, default=1, help="fewest tokens of a trace")
    add("--max_think", type=int, default=None, help="most tokens of a trace (unset: --reasoning_tokens; 0: any)")
    add("--max_reuse", type=int, default=2, help="most windows that one and the same text may serve (0: any)")
    return parser.parse_args()


def check(args):
    """Refuse flags out of range and runs that do not belong together, fill in what is unset, return the first run."""
    least = dict(samples=0, reasoning_tokens=1, temperature=0, max_windows=0, batch_size=1, seed=0, min_lift=0,
                 max_quote=0, min_think=1, max_think=0, max_reuse=0)
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not low <= value < 2 ** 63:
            raise UserError(f"--{name} {value}: must be a finite number, {low} or more")
    if not args.out.endswith(".jsonl"):
        raise UserError(f"--out {args.out}: must end in .jsonl")
    runs = [read_args(folder, [*SAME, "preset", "quant", "dtype", "adapters", "rank", "alpha", "device"])
            for folder in args.runs]
    for folder, run in zip(args.runs[1:], runs[1:]):
        for key in SAME:
            if run[key] != runs[0][key]:
                raise UserError(f"{folder} has --{key} {run[key]} and {args.runs[0]} {runs[0][key]}; use them apart")
    if args.rationale is None:
        args.rationale = "think" if runs[0]["preset"] == "demo" else "reply"  # the demo's base knows no instructions
    args.reasoning_tokens = args.reasoning_tokens or runs[0]["reasoning_tokens"]
    if args.samples and not args.reasoning_tokens:
        raise UserError(f"--reasoning_tokens 0, as in {args.runs[0]}: say how many a rationalisation may take, 1 or "
                        "more, or use the rollouts' thoughts alone with --samples 0")
    args.max_think = args.reasoning_tokens if args.max_think is None else args.max_think
    args.device = args.device or runs[0]["device"]
    check_device(args.device)
    return runs[0]


def main():
    args = read_flags()
    args.runs = [str(pathlib.Path(folder)) for folder in args.runs]  # out/run/ is out/run
    run, out = check(args), pathlib.Path(args.out)
    path, report_file = out.with_suffix(".candidates.jsonl"), out.with_suffix(".report.json")
    windows = read_windows(args.runs, args.max_windows, args.seed)
    if not windows:
        raise UserError(f"{' '.join(args.runs)}: no rollouts in it yet; train it first")
    digest = hashlib.blake2b(json.dumps([windows, SHORTEST]).encode(), digest_size=8)
    adapter = pathlib.Path(args.runs[0], "ckpt", player(run), "adapter_model.safetensors")
    if args.policy == "run":
        if not adapter.exists():
            raise UserError(f"--policy run: {args.runs[0]} has no checkpoint of its generator; use --policy base")
        digest.update(adapter.read_bytes())
    names = "runs samples rationale policy reasoning_tokens temperature max_windows batch_size seed".split()
    settings = {name: getattr(args, name) for name in names} | {"inputs": digest.hexdigest()}
    limits = {name: getattr(args, name) for name in LIMITS}
    if out.exists():
        try:
            before = dict(json.loads(report_file.read_text(encoding="utf-8"))["settings"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--out {out} is there already, and no report beside it; name another file") from None
        refuse_other(out, settings | limits, before)

    try:
        scored = score_all(args, run, windows, path, settings)
        traces, dropped = select(scored, limits)
        told = report(scored, traces, dropped) | {"settings": settings | limits}
        from checkpoint import write_whole
        write_whole(report_file, json.dumps(told, indent=2) + "\n")
        write_whole(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in traces))
    except (OSError, RuntimeError, MemoryError) as error:  # torch tells of a lack of memory by a RuntimeError
        from checkpoint import first_line, shortage
        if shortage(error) == "memory":
            raise UserError(f"out of memory ({first_line(error)}); lower --batch_size, name another --out", 1) from None
        if not isinstance(error, OSError):
            raise
        raise UserError(f"--out {out} could not be written: {error}; the same command goes on") from None
    print_report(out, told)


if __name__ == "__main__":
    main()
