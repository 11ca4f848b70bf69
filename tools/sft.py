"""
Fine-tune the generator on traces (prompt, thinking, truth), or on the truths of a run, as a control for that run.

    python -m tools.sft --data traces.jsonl                 # model, prompt and lengths of the run that made the traces
    python -m tools.sft --truths out/demo-1                 # control: the same sequences, steps and learning rate
    python -m tools.sft --resume out/sft-1                  # continue from the last checkpoint
    python -m tools.export out/sft-1 --merge out/merged     # then, for the next round: train.py --model out/merged

All flags of train.py work here too; those left out are the run's. With --data the defaults are --batch_size 32, --g_lr
1e-4 (1e-3 for a run of the demo), --beta1 0.9, --kl_coef 0, --save_every 10, and the --num_steps that --epochs takes.

What differs from textbook fine-tuning:
1) A lesson has the ids that the sampler would leave, under the same forbidden ids; forced ids are not trained, and an
   end of the text is not either, because a truth is cut from a longer text.
2) A share of the lessons (--mix) is plain text without the prompt, so that the model stays a model of text.
3) With --data the loss on held-out prefixes is measured at each save, and only an adapter that lowers it is saved.
4) --truths: each step samples as the run's step did, then trains on the truths in place of the completions, after the
   model's own thinking. The loss is train.py's at advantage 1, KL included; a discriminator takes no part.
"""
import math
import os
import pathlib
import random
import shlex
import time
from argparse import SUPPRESS, Namespace

import train
from flags import Run, UserError, check_values, export_command, json_lines, read_lines, write_whole

PARTS = "none", "trace", "truth", "plain"
NONE, TRACE, TRUTH, PLAIN = range(4)  # what an id of a lesson belongs to; NONE is not trained


def flags():
    parser = train.flags()
    parser.description = __doc__
    for action in parser._actions[1:]:  # all but --help
        action.help = SUPPRESS
    add = parser.add_argument
    add("--truths", default=None, help="folder of a finished run whose truths to train on, in place of --data")
    add("--mix", type=float, default=0.25, help="share of plain text among the lessons (0: none)")
    add("--epochs", type=float, default=3.0, help="times that each trace is trained on, where --num_steps is left out")
    add("--held_out", type=float, default=0.1, help="share of prefixes to evaluate on (0: none, the last step is kept)")
    return parser


def parse_flags():
    """The run's flags, changed by the defaults for traces and by the flags that are given."""
    parser = flags()
    args = parser.parse_args()
    if args.resume:
        args = parser.resumed(args, train.MAY_CHANGE)
        check_values(args, ())
        return args
    given = {flag.removeprefix("--").removeprefix("no-") for flag in parser.given()}
    if len(given & {"data", "truths"}) != 1:
        raise UserError("give either --data, a file of traces, or --truths, the folder of a run")
    if args.truths and given & {"mix", "epochs", "held_out"}:
        raise UserError("--mix, --epochs and --held_out are for the traces of --data; leave them out with --truths")
    run = Run(args.truths or read_traces(args.data)[0]["run"]).args
    defaults = {} if args.truths else dict(
        batch_size=32, g_lr=1e-3 if run.preset in ("demo", "best") else 1e-4, beta1=0.9, kl_coef=0.0, num_steps=None,
        save_every=10, micro_batch=run.micro_batch or run.batch_size)
    args = Namespace(**vars(args) | vars(run) | defaults | {name: getattr(args, name) for name in given} | dict(
        traces=None if args.truths else args.data, data=run.data, out_dir=args.out_dir, d_model=None, resume=None))
    check_values(args, "rank alpha batch_size epochs num_steps".split())
    return args


def read_traces(file):
    traces = read_lines(file, "traces")
    if not traces:
        raise UserError(f"--data {file} has no traces; give a file that tools.traces wrote")
    return traces


if __name__ == "__main__":
    args = parse_flags()  # before torch is imported: a mistyped flag must not wait for that

import torch

from checkpoint import explain_failures, lock, make_out_dir, pin, restore, save, write_args
from data import Window, bos_ids, prompt_template
from model import checked_device, load_players, memory_gb, pad, token_stats
from reward import policy_loss
from rollout import COMPLETION, THINKING, Writer, probe
from sampler import Sampler


# lessons: (ids, the part that each id belongs to). b lessons, T tokens, N trained ones

def reply_lesson(writer, window, think, num_trained):
    """Prompt, thinking (ids), its closing, and the truth; num_trained: ids of thinking and closing that are trained."""
    before, truth = writer.truth_ids(window, think)
    num_reply = len(think) + len(writer.rules.close)
    part = [TRACE] * num_trained + [NONE] * (num_reply - num_trained) + [TRUTH] * len(truth)
    return before + truth, [NONE] * (len(before) - num_reply) + part


def trace_lesson(writer, trace):
    """The lesson of a trace; </think> is trained if the model drew it and there is room for it."""
    budget = writer.args.reasoning_tokens
    think = writer.encode(trace["think"])[0][:budget]
    closed = trace["closed"] and writer.rules.think_end >= 0 and len(think) < budget
    return reply_lesson(writer, Window(trace["prefix"], trace["sep"], trace["truth"]), think, len(think) + closed)


def plain_lesson(writer, trace):
    """The lesson of a trace's text without prompt or thinking, as the discriminator reads it; all of it is trained."""
    before = trace["prefix"] + trace["sep"]
    ids, offsets = writer.encode(before + trace["truth"])
    num_before = sum(end <= len(before) for _, end in offsets)
    ids = bos_ids(writer.tokenizer) + ids[:num_before + writer.args.completion_tokens]
    return ids, [NONE] + [PLAIN] * (len(ids) - 1)  # nothing predicts the first id


def mixed_lessons(writer, traces, *key):
    """A lesson for each trace; a share --mix of them, drawn by the key, is plain text."""
    rng = random.Random(repr(key))
    return [(plain_lesson if rng.random() < writer.args.mix else trace_lesson)(writer, trace) for trace in traces]


def passes(model, lessons, rules, size, **options):
    """TokenStats of the trained tokens and the part of each, (N,) each, for `size` lessons at a time."""
    for first in range(0, len(lessons), size):
        rows, parts = zip(*lessons[first:first + size])
        ids, part = pad(rows, rules.pad, rules.close.device), pad(parts, NONE, rules.close.device)  # (b, T) each
        kind = torch.where(part == TRACE, THINKING, COMPLETION)  # (b, T)
        shared = min(len(os.path.commonprefix(rows)), min(map(len, rows)) - 1)
        yield token_stats(model, ids, part != NONE, rules.blocked, kind, shared=shared, **options), part[part != NONE]


def losses(name, found):
    """Mean negative log-prob in pairs of log-probs and parts: of all tokens, and of each part (nan: it has none)."""
    logp, part = map(torch.cat, zip(*found))  # (N,) each
    means = {f"{name}_{key}": -logp[part == k].mean().item() for k, key in enumerate(PARTS) if k}
    return {name: -logp.sum().item() / len(logp), **means}


if __name__ == "__main__":
    # set-up: model, lessons, folder
    B, device, exam = args.batch_size, checked_device(args.device), []
    explain_failures()
    torch.manual_seed(args.seed)
    pin(args)
    player, _ = load_players(args, device)
    args.prompt = prompt_template(args.prompt, player.tokenizer)
    sampler = Sampler(player.model, args.merge) if args.truths else player  # traces need no sampler
    writer = Writer(sampler, player.tokenizer, args)
    player.check_length(writer.max_tokens)
    player.optimize(args.g_lr, args)
    if args.truths:
        windows = [Window(r["prefix"], r["sep"], r["truth"]) for r in Run(args.truths).rollouts]
        if len(windows) < args.num_steps * B:
            raise UserError(f"{args.truths} has {len(windows)} of {args.num_steps * B} sequences; finish it first")
        probe(writer, player, windows[:3])
    else:
        traces, held_out = [], []
        for trace in read_traces(args.traces):  # what is held out depends on the prefix alone, whatever the seed
            (held_out if random.Random(trace["prefix"]).random() < args.held_out else traces).append(trace)
        if not traces or args.held_out and not held_out:
            raise UserError(f"--held_out {args.held_out}: one of the two parts has no trace; give another share")
        exam = mixed_lessons(writer, held_out[:200], "held out")
        args.num_steps = args.num_steps or math.ceil(args.epochs * len(traces) / (B * (1 - args.mix)))
        rng, num_epochs = random.Random(args.seed), math.ceil(args.num_steps * B / len(traces))
        order = [trace for _ in range(num_epochs) for trace in rng.sample(traces, len(traces))]

    out_dir = pathlib.Path(args.resume) if args.resume else make_out_dir(args.out_dir, "sft")
    explain_failures(out_dir)
    nothing, first_step = torch.nn.Module(), 0  # `nothing` stands for the discriminator's head, baseline and stream
    if args.resume:
        lock(out_dir)
        first_step = restore(out_dir, [player], nothing, nothing, nothing)
    elif args.truths:  # evaluate.py compares with the run's floor, if both end on the same prefixes
        args.floor_sequences *= len(windows) == args.num_steps * B
        write_whole(out_dir / "floor.jsonl", json_lines(Run(args.truths).floor if args.floor_sequences else []))
    files = {name: open(out_dir / f"{name}.jsonl", "a", 1, encoding="utf-8")
             for name in ["metrics"] + ["rollouts"] * bool(args.truths)}
    write_args(out_dir, args, device)

    # the loop; after the last step comes one more evaluation
    best, best_step, options = math.inf, 0, dict(size=args.micro_batch or B, temperature=args.temperature)
    for step in range(first_step, args.num_steps + 1):
        t0, row = time.perf_counter(), {"step": step}
        player.activate()

        # evaluate and save: the best adapter on held-out prefixes, or without these the latest
        due = step == args.num_steps or step % (args.save_every or args.num_steps) == 0
        if due and exam:
            with torch.no_grad():
                found = [(stats.logp, part) for stats, part in passes(player.model, exam, writer.rules, **options)]
            row |= losses("held", found)
            print(f"after {step} steps | " + " | ".join(f"{key} {x:.3f}" for key, x in row.items() if key != "step"))
        if due and (not exam or row["held"] < best):
            best, best_step = row.get("held"), step
            save(out_dir, step, [player], nothing, nothing, nothing, files.values())
        if step == args.num_steps:
            files["metrics"].write(json_lines([row] if exam else []))
            break

        # lessons
        if args.truths:
            batch = windows[step * B:(step + 1) * B]
            samples = writer.write(batch, player.adapter, "rollout", step * B)
            files["rollouts"].write(json_lines(writer.records([step] * B, batch, samples)))
            lessons = [reply_lesson(writer, window, think, num_trained=0)
                       for window, think in zip(batch, samples.roll.think)]
            num_positions = B * (args.reasoning_tokens + args.completion_tokens)
        else:
            lessons = mixed_lessons(writer, order[step * B:(step + 1) * B], args.seed, step)
            num_positions = sum(part != NONE for _, parts in lessons for part in parts)

        # step: train.py's loss at advantage 1; without a KL this is the mean negative log-prob
        found, kl, lr_factor = [], 0.0, 1 - step / args.num_steps
        for stats, part in passes(player.model, lessons, writer.rules, with_kl=args.kl_coef > 0, **options):
            player.backward(policy_loss(stats.logp, stats.kl, 1.0, args.kl_coef, num_positions))
            found.append((stats.logp.detach(), part))
            kl += stats.kl.sum().item()
        g_grad_norm, seconds = player.step(lr_factor), time.perf_counter() - t0
        num_tokens = sum(len(part) for _, part in found)
        row |= losses("loss", found) | dict(
            kl=kl / num_tokens if args.kl_coef else None, g_grad_norm=g_grad_norm, g_lr=args.g_lr * lr_factor,
            skipped=int(g_grad_norm is None), num_tokens=num_tokens, seconds=seconds, memory_gb=memory_gb(device))
        files["metrics"].write(json_lines([row]))
        print(f"step {step}/{args.num_steps} | loss {row['loss']:.3f} | kl {row['kl'] or 0:.4f} | {seconds:.1f} s",
              flush=True)
    print(f"{out_dir}/ckpt is from after {best_step} steps; next: "
          + (f"python evaluate.py {shlex.quote(str(out_dir))}" if args.truths else export_command(out_dir)))
