"""
Fine-tune the generator's adapter on prompt + trace + truth: the reasoning that leads to a real completion, and it.

What differs from textbook fine-tuning:
1) A lesson is, id for id, what train.py's sampler leaves, under the same forbidden ids; forced ids are not taught.
2) A share of the lessons (--mix) is plain text, prefix and truth without a template, all of it taught: what keeps the
   model a model of text. The loss is the mean over all taught tokens of a batch, of whichever part.
3) It stops where the loss on held-out traces no longer falls, and leaves the adapter of the best evaluation, the one
   before the first step included.

    python sft.py --preset demo --data traces.jsonl         # embedded model, no GPU, minutes
    python sft.py --data traces.jsonl                       # for train.py's default model, one GPU
    python sft.py --data one.jsonl two.jsonl --mix 0.5      # several files, and half of it plain text
    python sft.py --resume out/sft-1                        # go on where it stopped
    python train.py --preset demo --init out/sft-1          # the next round
"""
from argparse import Namespace

from flags import Parser, UserError, check_values

# -----------------------------------------------------------------------------
# flags; a preset only changes defaults
DEMO = dict(model="demo", device="cpu", dtype="fp32", adapters="separate", rank=16, alpha=4.0, reasoning_tokens=12,
            completion_tokens=48, batch_size=32, micro_batch=16, epochs=3.0, lr=1e-3, eval_every=10, save_every=10)
MAY_CHANGE = "micro_batch device save_every".split()  # on --resume
NEEDED = "preset model quant dtype device data mix num_steps digest".split()  # of a run to go on with
parser = Parser(__doc__)
add = parser.add_argument
add("--preset", choices=["writeup", "demo"], default="writeup", help="set of defaults; any flag still wins")
# model
add("--model", default="Qwen/Qwen3-8B", help="hub id or folder of a causal LM; demo and demo-small are embedded")
add("--quant", choices=["none", "nf4", "int8"], default="none", help="quantise the base model (bitsandbytes)")
add("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of weights, or of computation where quantised")
add("--adapters", choices=["shared", "separate"], default="shared", help="name it shared or generator, as train.py's")
add("--rank", type=int, default=64, help="of the rsLoRA adapter")
add("--alpha", type=float, default=8.0, help="of the rsLoRA adapter; its scale is alpha / sqrt(rank)")
add("--init", default=None, help="folder of a run or of sft.py to start the adapter from (unset: fresh)")
# data
add("--data", nargs="+", default=None, help="files of traces.py: .jsonl[.gz|.zst]")
add("--reasoning_tokens", type=int, default=256, help="most tokens of a trace; one that has them all was not closed")
add("--completion_tokens", type=int, default=256, help="most tokens of a truth; one much shorter teaches to stop")
add("--mix", type=float, default=0.25, help="share of plain text among the lessons (0: none)")
add("--held_out", type=float, default=0.1, help="share of the prefixes to evaluate on (0: none, and no early stop)")
add("--eval_lines", type=int, default=200, help="most held-out traces that an evaluation reads (0: all)")
# training
add("--batch_size", type=int, default=16, help="lessons a step")
add("--micro_batch", type=int, default=0, help="lessons a pass; same gradient, less memory (0: all)")
add("--epochs", type=float, default=2.0, help="times that each trace is taught, where --num_steps is unset")
add("--num_steps", type=int, default=None, help="steps; the rate falls linearly to 0 over them (unset: by --epochs)")
add("--lr", type=float, default=1e-4, help="learning rate")
add("--beta1", type=float, default=0.9, help="of Adam")
add("--beta2", type=float, default=0.95, help="of Adam")
add("--grad_clip", type=float, default=1.0, help="largest gradient norm of an update")
add("--eval_every", type=int, default=20, help="steps between evaluations (0: only at the start and the end)")
add("--patience", type=int, default=3, help="evaluations in a row without a new best that end the run (0: none)")
add("--max_bad_steps", type=int, default=10, help="steps in a row without a finite update that end the run (0: none)")
# run
add("--seed", type=int, default=0, help="of adapter and order")
add("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
add("--out_dir", default=None, help="folder of the run (unset: out/sft-<next free number>)")
add("--save_every", type=int, default=100, help="steps between checkpoints (0: only at the end)")
add("--resume", default=None, help="folder of a run to go on with; needs no other flag, and takes few")
if parser.peek("--preset") == "demo":
    parser.set_defaults(**DEMO)
args = parser.parse_args()
if args.resume:
    run, changed = parser.going_on(args, MAY_CHANGE, NEEDED)
    args = Namespace(**vars(args) | (DEMO if run["preset"] == "demo" else {}) | run | changed)
check_values(args, "rank alpha completion_tokens batch_size epochs num_steps grad_clip".split())
if not args.data:
    raise UserError("--data is missing; give the files that traces.py wrote")

import datetime
import hashlib
import json
import math
import pathlib
import sys
import time

import torch

from checkpoint import (Signals, claim, hold, json_lines, last_words, provenance, restore, save, start_from,
                        trace_resume, write_whole)
from data import bos_ids, plain_encoder, prompt_ids
from lessons import (NONE, PARTS, SLACK, batch_of, held_out_loss, plain_text, read_traces, split, taught_nats,
                     taught_trace)
from model import (adapter_parameters, add_adapters, checked_device, load_model, load_tokenizer, memory_gb,
                   memory_needs, positions, update)
from rollout import rules

# -----------------------------------------------------------------------------
# seed, device, data, model
# B lessons a step, b in a micro-batch; R and C most tokens of trace and truth
B, R, C = args.batch_size, args.reasoning_tokens, args.completion_tokens
device = checked_device(args.device)
torch.manual_seed(args.seed)
sys.excepthook = last_words(None, {}, lambda: False)  # a lack of memory ends in one line
traces = read_traces(args.data)
digest = hashlib.blake2b(repr(traces).encode(), digest_size=8).hexdigest()
if args.resume and args.digest != digest:
    raise UserError(f"--resume {args.resume}: {' '.join(args.data)} is not what it was when the run was started; "
                    "put that back, or start anew with another --out_dir")
args.digest = digest
train, held_out = split(traces, args.held_out)
if not train or not held_out and args.held_out:
    raise UserError(f"--held_out {args.held_out} of {len(traces)} traces leaves {len(train)} to train on and "
                    f"{len(held_out)} held out; give more traces, or another share (0: none held out)")
tokenizer = load_tokenizer(args.model)
encode, bos = plain_encoder(tokenizer), bos_ids(tokenizer)
longest = max(len(encode(trace.truth)[0]) for trace in traces)
if longest + SLACK < C:  # else every truth would teach to stop
    raise UserError(f"--completion_tokens {C}: the longest truth of --data has {longest} tokens; give the "
                    "--completion_tokens of the run that the traces come from")
model, _ = load_model(args.model, args.quant, args.dtype, device)
rule, stop = rules(tokenizer, model), tokenizer.eos_token_id


def lesson(trace, plain):
    """A trace as plain text, or as a rollout."""
    if plain:
        return plain_text(encode, bos, trace, C)
    prompt = prompt_ids(tokenizer, encode, trace.prefix)
    return taught_trace(prompt, encode(trace.think)[0], trace.closed, encode(trace.truth)[0], rule, stop, R, C)


lessons = {plain: [lesson(trace, plain) for trace in train] for plain in (False, True)}
exam = [lesson(trace, plain) for plain in (False, True) for trace in held_out[:args.eval_lines or None]]
most = max(len(one.ids) for one in lessons[False] + lessons[True] + exam)
room = positions(model)
if most > room:
    raise UserError(f"--model {args.model} has {room} positions and a lesson takes up to {most}; lower "
                    "--reasoning_tokens or --completion_tokens, or make traces with shorter prefixes")
if args.num_steps is None:
    args.num_steps = math.ceil(args.epochs * len(train) / (B * (1 - args.mix)))

G = "shared" if args.adapters == "shared" else "generator"
model = add_adapters(model, [G], args.rank, args.alpha)
if args.init and not args.resume:
    start_from(args.init, model, [G])
params = adapter_parameters(model, G)

# -----------------------------------------------------------------------------
# everything the loop changes, besides the weights: saved and restored as this block
optimizer = torch.optim.Adam(params, lr=args.lr, betas=(args.beta1, args.beta2))
best = torch.nn.ParameterList(p.detach().cpu().clone() for p in params).requires_grad_(False)  # of the best evaluation
modules, optimizers = {"best": best}, {G: optimizer}
state = {
    "step": 0,
    "start": None,  # held-out losses before the first step
    "best": None,   # and at the best evaluation
    "best_step": 0,
    "stale": 0,     # evaluations since then
    "loss_scale": 2.0 ** 14 if args.dtype == "fp16" else 1.0,  # lifts small gradients above fp16's floor
    "bad_steps": 0,  # in a row, up to now
}
# the order is keyed by (seed, step): there is no random state to save

out_dir = pathlib.Path(args.resume) if args.resume else claim(args.out_dir, "sft")
num_trained = sum(p.numel() for p in params)
whole = False  # whether the weights are those of a whole step, so that they can be saved


def checkpoint():
    """Save everything the loop changes."""
    save(out_dir, [model], modules, optimizers, state, [metrics])


# from here on a lack of memory or of disk ends the run in one line
needs = memory_needs([(model, most, 0, args.micro_batch or B)], optimizers.values())
sys.excepthook = last_words(out_dir, needs, lambda: whole and not checkpoint(),
                            "--batch_size, --reasoning_tokens or --completion_tokens")
if args.resume:  # also cuts the file back to the checkpoint, so it comes before it is opened
    hold(out_dir)
    state |= restore(out_dir, [model], modules, optimizers)
    trace_resume(out_dir, device)
metrics = open(out_dir / "metrics.jsonl", "a", 1, encoding="utf-8")
if not args.resume:
    checkpoint()
    write_whole(out_dir / "args.json", json.dumps({"args": vars(args), **provenance(device)}, indent=2) + "\n")
    # from here on it is a run, and a stopped one can go on
signals = Signals()
print(f"{out_dir}: {args.model} on {device}, {num_trained:,} trained of "
      f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.num_steps} steps")
print(f"{len(train)} traces to train on, {len(held_out)} held out; "
      f"{sum(len(encode(trace.think)[0]) > R for trace in train)} are cut to --reasoning_tokens {R}, the truths of "
      f"{sum(one.ids[-1] == stop for one in lessons[False])} teach to stop")


# -----------------------------------------------------------------------------
# the loop's verbs; they read the names above

def passes(batch):
    """Nats and numbers of taught tokens by part, (4,) each, micro-batch by micro-batch."""
    size = args.micro_batch or B
    return (taught_nats(model, batch[first:first + size], rule) for first in range(0, len(batch), size))


def examine(step):
    """The held-out losses after so many steps; the weights of the best ones are kept."""
    with torch.no_grad():
        nats, counts = (torch.stack(part).sum(0).cpu() for part in zip(*passes(exam)))  # (4,) each
        found = held_out_loss(nats, counts, args.mix)
        if state["best"] is None or found["held"] < state["best"]["held"]:
            state.update(best=found, best_step=step, stale=0)
            for kept, p in zip(best, params):
                kept.copy_(p)
        else:
            state["stale"] += 1
    return found


# -----------------------------------------------------------------------------
# the loop
if exam and state["start"] is None:
    state["start"] = examine(0)
    print(f"before the first step | held {state['start']['held']:.4f}", flush=True)
started, first_step = time.time(), state["step"]
while state["step"] < args.num_steps and not 0 < args.patience <= state["stale"]:
    t0, whole, step = time.time(), True, state["step"]
    lr = args.lr * (1 - step / args.num_steps)
    batch = [lessons[plain][number] for plain, number in batch_of(step, B, args.mix, len(train), args.seed)]
    num_tokens = sum(part != NONE for one in batch for part in one.part)
    nats, counts = torch.zeros(4), torch.zeros(4)  # (4,) each
    for some, count in passes(batch):
        (some.sum() / num_tokens * state["loss_scale"]).backward()
        nats, counts = nats + some.detach().cpu(), counts + count.cpu()  # (4,) each
    whole = False
    grad_norm = update(optimizer, lr, args.grad_clip, state)
    t1 = time.time()
    state["bad_steps"] = state["bad_steps"] + 1 if grad_norm is None else 0
    if 0 < args.max_bad_steps <= state["bad_steps"]:
        raise UserError(f"{state['bad_steps']} steps in a row (--max_bad_steps) had a gradient that is not finite; the "
                        "checkpoint from before them stands; start anew with a lower --lr or another --dtype", status=1)
    due = args.eval_every and (step + 1) % args.eval_every == 0 or step + 1 == args.num_steps
    held = examine(step + 1) if exam and due else {}

    # log
    loss = {name: (nats[k] / counts[k]).item() for name, k in PARTS.items() if counts[k]}
    row = dict(
        step=step, loss=nats.sum().item() / num_tokens, **{f"loss_{name}": loss.get(name) for name in PARTS},
        grad_norm=grad_norm, lr=lr, held=held.get("held"), **{f"held_{name}": held.get(name) for name in PARTS},
        num_tokens=num_tokens, skipped=int(grad_norm is None), seconds=time.time() - t0,
        tokens_per_second=num_tokens / (t1 - t0), memory_gb=memory_gb(device))
    metrics.write(json_lines([row]))
    left = (time.time() - started) / (step - first_step + 1) * (args.num_steps - step - 1)
    told = " | ".join(f"{name} {value:.3f}" for name, value in {"loss": row["loss"], **loss}.items())
    told += f" | held {held['held']:.4f}{' (best)' * (not state['stale'])}" if held else ""
    print(f"step {step}/{args.num_steps} | {told} | {time.time() - t0:.1f} s/step, "
          f"{datetime.timedelta(seconds=int(left))} left", flush=True)

    # save
    state["step"], stopped = step + 1, signals.stop
    if stopped or args.save_every and (step + 1) % args.save_every == 0 and not state["bad_steps"]:
        checkpoint()
    if stopped:
        signals.leave(f"after step {step}", out_dir)

# -----------------------------------------------------------------------------
# the best adapter is what stays
whole = False
if exam:
    with torch.no_grad():
        for kept, p in zip(best, params):
            p.copy_(kept)
checkpoint()
metrics.close()
result = dict(start=state["start"], best=state["best"], best_step=state["best_step"], num_steps=state["step"],
              num_train=len(train), num_held_out=len(held_out))
write_whole(out_dir / "result.json", json.dumps(result, indent=2) + "\n")
if exam:
    before, after = ({name: f"{value:.3f}" for name, value in state[key].items()} for key in ("start", "best"))
    told = ", ".join(f"{name} {before[name]} to {after[name]}" for name in after)
    print(f"held-out nats a token, start to best (after {state['best_step']} of {state['step']} steps): {told}")
    if not state["best_step"]:
        print("note: no evaluation was better than the start, whose adapter is left; lower --lr, or give more traces",
              file=sys.stderr)
print(f"{out_dir}: its adapter is in {out_dir}/ckpt/{G}; the next round: "
      f"python train.py --preset {args.preset} --init {out_dir}")
