"""
Several processes, one run: each holds the whole model and takes its part of every batch. Alone, this file does nothing.

    torchrun --nproc_per_node 4 train.py --batch_size 96 --micro_batch 24

What differs from textbook data parallelism:
1. No DistributedDataParallel. Its hooks expect one forward and one backward of one module a step; here two players take
   turns on the adapters of one model, and a wrapper leaves their gradients unsynchronised without an error.
2. A loss is a sum over rows, divided by constants of the whole batch. So gradients are summed, once an update, before
   they are clipped, and every process makes the same update.
3. Only sampling and the passes of the learner are divided. What they give is small, all processes gather it, and each
   computes rewards, baseline and metrics of the whole batch. Random numbers are keyed by row, so that the number of
   processes changes nothing but rounding.
"""
import os

import torch
import torch.distributed as dist

from flags import UserError

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
FIRST = RANK == 0  # the process that prints and writes


def join(args):
    """Meet the other processes. Returns the name of this one's device."""
    if WORLD == 1:
        return args.device
    if args.batch_size < WORLD:
        raise UserError(f"--batch_size {args.batch_size}: {WORLD} processes need one each; raise it, or start fewer")
    if ":" in args.device:
        raise UserError(f"--device {args.device} is one GPU, and {WORLD} processes take one each; give cuda or cpu")
    if not FIRST:
        os.environ["TQDM_DISABLE"] = "1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    return f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device


def mine(rows):
    """This process's part of a list or a range, in order; parts differ by at most one row."""
    return rows[len(rows) * RANK // WORLD:len(rows) * (RANK + 1) // WORLD]


def together(collective, *arguments, **options):
    """A collective of torch.distributed; one line where another process has ended."""
    try:
        return collective(*arguments, **options)
    except RuntimeError:
        raise UserError("another process of this run has ended, so this one ends; --resume continues from the last "
                        "checkpoint", 1) from None


def everyone(part):
    """The parts of all processes, in order: of lists a list, of tensors (n, ...) a tensor (B, ...)."""
    if WORLD == 1:
        return part
    parts = [None] * WORLD
    together(dist.all_gather_object, parts, part.cpu() if torch.is_tensor(part) else part)
    return torch.cat(parts).to(part.device) if torch.is_tensor(part) else [row for rows in parts for row in rows]


def agreed(value):
    """The first process's value."""
    return everyone([value])[0]


def sum_gradients(params):
    """Sum gradients over all processes. One without rows adds zeros; where none had any, there are none after it."""
    if WORLD == 1 or not any(everyone([any(p.grad is not None for p in params)])):
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    together(dist.all_reduce, flat)
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad = grad.view_as(p)


def leave():
    """Wait for the others, and end the processes that have nothing left to write."""
    if WORLD > 1:
        everyone([None])
        dist.destroy_process_group()
    if not FIRST:
        raise SystemExit
