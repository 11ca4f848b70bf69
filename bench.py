"""
Speed and memory beside what else a user would pick: one table, and with --json everything in a file.

What differs from the textbook:
1. A ratio is between calls that were taken in turn in this run: its median, and the least and the most of --repeats.
2. Both sides do the same work: weights, adapters, prompts, lengths, batch and threads are the same, and nothing ends
   early, as the end is an id that no model here can draw. A rollout reads one token more than it draws, the forced end
   of its thinking; that costs us time and is not counted as a token.
3. The floor of a decode step is the time to read weights and cache once, at the speed of a large copy on this device.
4. Memory is the most that was allocated above what stood before: CUDA's counter, or a trace of torch's CPU allocator.

    python bench.py                                         # the demo's model on a CPU, under 10 minutes
    python bench.py --only decode,trl --json bench.json     # two sections, and a file
    python bench.py --model qwen3-8b-random                 # Qwen3-8B, random weights, one GPU; nothing is downloaded
    python bench.py --model qwen3-8b-random --quant nf4 --micro_batch 1
    python bench.py --scaling                               # against length, batch, vocabulary: demo/scaling.png

`pip install -r requirements-bench.txt` adds TRL; without it its rows are left out.
"""
import math
import os
import pathlib

from flags import Parser, UserError

SECTIONS = "decode step logps trl".split()
WRITEUP = dict(  # --model qwen3-8b-random: the write-up's run
    device="cuda", dtype="bf16", adapters="shared", rank=64, alpha=8.0, batch_size=4, prompt_tokens=350,
    reasoning_tokens=256, completion_tokens=256, hidden=4096)


def check(args):
    for name, value in vars(args).items():
        least = {"threads": 0, "reasoning_tokens": 0, "micro_batch": 0, "vocab": 32, "most_tokens": 16}.get(name, 1)
        if name == "alpha" and not 0 < value < math.inf:
            raise UserError(f"--alpha {value}: must be above 0 and finite")
        if type(value) is int and not least <= value < 2 ** 31:
            raise UserError(f"--{name} {value}: must be at least {least} and below 2 to the 31")
    if not set(args.only.split(",")) <= set(SECTIONS):
        raise UserError(f"--only {args.only}: the sections are {','.join(SECTIONS)}")
    if "trl" in args.only and not args.scaling and (args.batch_size or 2) % 2:
        raise UserError(f"--batch_size {args.batch_size}: GRPO compares two samples of a prompt; give an even number, "
                        "or leave trl out of --only")
    for flag, file in (("json", args.json), ("out", args.out if args.scaling else None)):
        if file and (os.path.isdir(file) or not os.access(pathlib.Path(file).parent, os.W_OK)):
            raise UserError(f"--{flag} {file} cannot be written; name a file in a folder that can")


if __name__ == "__main__":  # flags first: a wrong one need not wait for torch
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--only", default=",".join(SECTIONS), help="sections to run")
    add("--model", default="demo", help="hub id, folder, demo, demo-small, or built here: qwen3-8b-random, tiny-random")
    add("--quant", choices=["none", "nf4", "int8"], default="none", help="quantise the base model (bitsandbytes)")
    add("--dtype", choices=["bf16", "fp32"], default="fp32", help="of weights, or of computation where quantised")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="CUDA_VISIBLE_DEVICES chooses among cards")
    add("--threads", type=int, default=0, help="of torch on the CPU (0: as torch chooses)")
    add("--adapters", choices=["shared", "separate"], default="separate", help="of a whole step, as in train.py")
    add("--rank", type=int, default=16, help="of the rsLoRA adapters")
    add("--alpha", type=float, default=4.0, help="of the rsLoRA adapters; their scale is alpha / sqrt(rank)")
    add("--batch_size", type=int, default=None, help="sequences (unset: 32 in decode and --scaling, else 16)")
    add("--prompt_tokens", type=int, default=64, help="tokens of each prompt")
    add("--reasoning_tokens", type=int, default=0, help="tokens of thinking; the others draw as many more (0: none)")
    add("--completion_tokens", type=int, default=None, help="tokens of the completion (unset: 64 in decode, else 128)")
    add("--micro_batch", type=int, default=0, help="sequences a pass of our updates (0: all)")
    add("--vocab", type=int, default=151936, help="vocabulary in logps, and the largest of --scaling")
    add("--hidden", type=int, default=1024, help="hidden size in logps")
    add("--positions", type=int, default=2048, help="positions in logps")
    add("--repeats", type=int, default=5, help="turns of a ratio; logps takes at most 3")
    add("--scaling", action="store_true", help="in place of the sections: what grows with length, batch, vocabulary")
    add("--most_tokens", type=int, default=2048, help="longest completion of --scaling")
    add("--out", default="demo/scaling.png", help="picture of --scaling")
    add("--json", default=None, help="file for all of it (unset: none)")
    if parser.peek("--model") == "qwen3-8b-random":
        parser.set_defaults(**WRITEUP)
    args = parser.parse_args()
    check(args)

import copy
import datetime
import gc
import importlib.metadata
import json
import platform
import re
import statistics

from clock import Clock, copy_speed, in_turn, peak_of, ratio, spread

import torch
from transformers.utils import logging

from checkpoint import first_line, provenance, write_whole
from model import DTYPES, add_adapters, checked_device, load_model
from plot import COLOURS, figure, save
from rivals import HAS_FUSED, HAS_TRL, compare_logps, compare_steps
from rollout import rollout
from sampler import Sampler
from workload import SHAPES, Players, Work, build, bytes_a_step, endless, learn, prompts_of, qwen3, twin


# -----------------------------------------------------------------------------
# what is measured here; rivals.py has the rest

def decode(base, work, rank, alpha, repeats, device):
    """A rollout against generate(), with the same adapters, and against the floor."""
    vocab, tokens = base.get_output_embeddings().weight.shape[0], work.R + work.C
    model = add_adapters(twin(base), ["generator"], rank, alpha)
    sampler = Sampler(model, base.get_output_embeddings().weight.dtype)
    rule, prompts = endless(vocab, device), prompts_of(work, vocab)
    ids = torch.tensor(prompts, device=device)  # (B, P)
    random, drawn = torch.Generator(device).manual_seed(0), {}

    def ours():
        sampler.follow("generator")
        roll = rollout(sampler, prompts, rule, work.R, work.C, 1.0, random)
        drawn["rollout"] = roll.sampled.sum().item()

    def theirs():
        whole = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, eos_token_id=vocab, pad_token_id=0)  # (B, P + R + C)
        drawn["generate"] = whole[:, work.P:].numel()

    calls = {"rollout": ours, "generate": theirs}
    memory = {name: peak_of(call, device) for name, call in calls.items()}  # warms them up, too
    seconds = in_turn(calls, repeats, device)
    read, speed = bytes_a_step(base, work), copy_speed(device)
    ms = {name: 1e3 * statistics.median(times) / tokens for name, times in seconds.items()}
    ms["floor"] = 1e3 * read / speed
    return {**work._asdict(), "drawn": drawn, "forced": work.B * len(rule.close), "seconds": seconds, "ms_a_token": ms,
            "tokens_a_second": {name: 1e3 * work.B / each for name, each in ms.items()},
            "ratio": ratio(seconds["rollout"], seconds["generate"]), "memory_gib": memory, "bytes_a_step": read,
            "copy_gb_a_second": speed / 1e9}


def step(players, repeats, device):
    """A whole training step by phase: medians of seconds."""
    def whole():
        clock = Clock(device)
        roll = players.sample()
        clock("sample")
        learn(players, roll, clock)
        return clock.spent

    whole()  # makes the optimisers' states
    standing, above = players.standing() / 2**30, peak_of(whole, device)
    turns = [whole() for _ in range(repeats)]
    return {**players.work._asdict(), "shared": players.G == players.D,
            "phases": {phase: statistics.median(turn[phase] for turn in turns) for phase in turns[0]},
            "seconds": spread([sum(turn.values()) for turn in turns]),
            "memory_gib": {"standing": standing, "above": above, "total": standing + above}}


def points(work, most_tokens, most_vocab):
    """(axis, value, Work, vocabulary or None) of each point of --scaling: one of three grows, the others stay."""
    few = work._replace(B=max(work.B // 8, 1))
    for C in (most_tokens >> shift for shift in range(4, -1, -1)):
        yield "completion tokens", C, few._replace(C=C), None
    for B in sorted({max(work.B >> shift, 1) for shift in range(6)}):
        yield "batch", B, work._replace(B=B), None
    for V in (most_vocab >> shift for shift in range(5, -1, -1)):
        yield "vocabulary", V, few, V


def scale(players, device):
    """Seconds of the second step, sampling and update, and the memory of the first one's update."""
    roll = players.sample()
    memory = peak_of(lambda: learn(players, roll, lambda phase: None), device)
    clock = Clock(device)
    roll = players.sample()
    clock("sample")
    learn(players, roll, lambda phase: None)
    clock("update")
    return {**clock.spent, "update_gib": memory}


def draw(rows, file):
    """The picture of --scaling: seconds above, memory below, an axis a column."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    fig, panels = figure("light", 13, 7, 2, len(axes))
    kinds = [(["sample", "update"], "seconds a step"), (["update_gib"], "memory of the update, GiB")]
    for panel, (keys, title), axis in zip(panels, [kind for kind in kinds for _ in axes], axes * 2):
        chosen = [row for row in rows if row["axis"] == axis]
        for key, colour in zip(keys, COLOURS):
            values = [row[key] for row in chosen]
            panel.plot([row["value"] for row in chosen], values, marker=".", color=colour, label=key)
        panel.set_title(title)
        panel.set_xlabel(axis)
        panel.set_xlim(0)
        panel.set_ylim(0)
        panel.locator_params(axis="x", nbins=5)
        if len(keys) > 1:
            panel.legend()
    save(lambda out: fig.savefig(out, dpi=110, format="png"), file)


# -----------------------------------------------------------------------------
# the table

def line(what, ours="", other="", compared=""):
    print(f"{what:<40}{ours:>12}   {other:<36}{compared}", flush=True)


def told(spread):
    return f"{spread['median']:.2f} ({spread['least']:.2f} to {spread['most']:.2f})"


def show_decode(found):
    ms, rate, memory = found["ms_a_token"], found["tokens_a_second"], found["memory_gib"]
    line("ms a token", f"{ms['rollout']:.2f}", f"{ms['generate']:.2f} generate()", told(found["ratio"]))
    line("tokens a second", f"{rate['rollout']:,.0f}", f"{rate['generate']:,.0f}")
    line("ms a token, the floor", "", f"{ms['floor']:.3f} at {found['copy_gb_a_second']:.0f} GB/s",
         f"{ms['floor'] / ms['rollout']:.1%} of the floor's speed")
    line("memory above the weights, GiB", f"{memory['rollout']:.3f}", f"{memory['generate']:.3f}",
         f"{memory['rollout'] / memory['generate']:.2f}")


def show_step(found):
    total, memory = found["seconds"], found["memory_gib"]
    for phase, seconds in found["phases"].items():
        line(f"{phase}, s", f"{seconds:.3f}", f"{seconds / total['median']:.0%}")
    line("whole step, s", f"{total['median']:.3f}", f"{total['least']:.3f} to {total['most']:.3f}")
    line("memory, GiB", f"{memory['total']:.3f}", f"of these {memory['standing']:.3f} weights and states")


def show_logps(found):
    ours, memory = statistics.median(found["seconds"]["ours"]), found["memory_gib"]
    for name, compared in found["ratio"].items():
        other = statistics.median(found["seconds"][name])
        line("s, with gradient", f"{ours:.2f}", f"{other:.2f} {name}", told(compared))
        line("  memory, GiB", f"{memory['ours']:.3f}", f"{memory[name]:.3f}", f"{found['memory_ratio'][name]:.3f}")
        line("  gradient's distance from the plain one", f"{found['gradient_difference']['ours']:.0e}",
             f"{found['gradient_difference'][name]:.0e}")


def show_trl(found):
    ours, other = (statistics.median(found["seconds"][key]) for key in ("ours", "TRL"))
    memory = found["memory_gib"]
    line("whole step, no discriminator, s", f"{ours:.3f}", f"{other:.3f} TRL's GRPOTrainer", told(found["ratio"]))
    line("  memory above weights and states, GiB", f"{memory['ours']:.3f}", f"{memory['TRL']:.3f}",
         f"{memory['ours'] / memory['TRL']:.2f}")


SHOW = {"decode": show_decode, "step": show_step, "logps": show_logps, "trl": show_trl}


def hardware(device):
    """What this runs on."""
    info = pathlib.Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    card = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {"cpu": names[0] if names else platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
            "gpu": card and card.name, "gpu_memory_gib": card and card.total_memory / 2**30}


# -----------------------------------------------------------------------------
if __name__ == "__main__":
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(0)
    device, dtype, shape = checked_device(args.device), DTYPES[args.dtype], SHAPES.get(args.model)
    if shape:
        base = build(qwen3(*shape), args.quant, args.dtype, device)
    else:
        base, _ = load_model(args.model, args.quant, args.dtype, device)
    names = ("shared", "shared") if args.adapters == "shared" else ("generator", "discriminator")

    def work_of(section):
        C = args.completion_tokens or (64 if section == "decode" else 128)
        B = args.batch_size or (16 if section in ("step", "trl") else 32)
        return Work(B, args.prompt_tokens, args.reasoning_tokens, C, args.micro_batch)

    most, room = max(sum(work_of(section)[1:4]) + 1 for section in SECTIONS), base.config.max_position_embeddings
    if most > room:
        raise UserError(f"--model {args.model} has {room} positions and a sequence takes {most}; lower "
                        "--prompt_tokens, --reasoning_tokens or --completion_tokens")
    traced = provenance(device)
    for name in ("trl", "accelerate"):
        traced["versions"][name] = importlib.metadata.version(name) if HAS_TRL else None
    report = {"date": datetime.date.today().isoformat(), "hardware": hardware(device), **traced, "args": vars(args),
              "skipped": {}}
    if not HAS_TRL:
        report["skipped"]["trl"] = "TRL is not installed; pip install -r requirements-bench.txt"
    if not HAS_FUSED:
        report["skipped"]["F.linear_cross_entropy"] = "torch has none before 2.13; pip install -r requirements.txt"
    machine = report["hardware"]
    print(f"{args.model}, {args.quant if args.quant != 'none' else args.dtype}, on {machine['gpu'] or machine['cpu']}, "
          f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory_gib']:.0f} GiB")
    for name, reason in report["skipped"].items():
        print(f"left out: {name}: {reason}")

    if args.scaling:
        report["scaling"], config = [], base.config
        del base
        line("\nscaling", "value", "sample + update, s", "memory of the update, GiB")
        for axis, value, work, vocab in points(work_of("scaling"), args.most_tokens, args.vocab):
            grown = copy.deepcopy(config)
            grown.vocab_size = vocab or config.vocab_size
            grown.max_position_embeddings = max(config.max_position_embeddings, sum(work[1:4]) + 1)
            shaped = build(grown, args.quant, args.dtype, device)
            row = {"axis": axis, "value": value,
                   **scale(Players(shaped, *names, args.rank, args.alpha, work, device), device)}
            line(axis, f"{value:,}", f"{row['sample']:.2f} + {row['update']:.2f}", f"{row['update_gib']:.3f}")
            report["scaling"].append(row)
            gc.collect()
        draw(report["scaling"], args.out)

    for section in () if args.scaling else args.only.split(","):
        if section in report["skipped"]:
            continue
        work = work_of(section)
        size = f"{work.B} x ({work.P} + {work.R + work.C}) tokens"
        if section == "logps":
            size = f"{args.positions} x {args.vocab:,} x {args.hidden}"
        line(f"\n{section}, {size}", "ours", *(["share"] if section == "step" else ["other", "ours / other"]))
        try:
            if section == "decode":
                report[section] = decode(base, work, args.rank, args.alpha, args.repeats, device)
            elif section == "step":
                report[section] = step(Players(base, *names, args.rank, args.alpha, work, device), args.repeats, device)
            elif section == "logps":
                shape, turns = (args.positions, args.vocab, args.hidden), min(args.repeats, 3)
                report[section] = compare_logps(*shape, dtype, turns, device)
            else:
                report[section] = compare_steps(base, work, args.rank, args.alpha, dtype, args.repeats, device)
            SHOW[section](report[section])
        except torch.OutOfMemoryError as error:  # the other sections may fit
            report["skipped"][section] = first_line(error)
            print(f"left out: {section}: {first_line(error)}")
        gc.collect()  # a trainer is a ring of references, with a model in it

    if args.json:
        write_whole(pathlib.Path(args.json), json.dumps(report, indent=2) + "\n")
