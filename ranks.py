"""
Several processes, one run: each holds the whole model and takes its part of every batch. Alone it takes all.

    torchrun --nproc_per_node 4 train.py --batch_size 96 --micro_batch 4

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

from flags import RANK, UserError, first_line

FIRST = RANK == 0  # the process that prints and writes
PIECE = 2 ** 24    # gradient elements gathered at once: 64 MiB from each process


def size():
    """The number of processes that have met."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def join(args):
    """Meet the other processes, if torchrun has started several. Returns the name of this one's device."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return args.device
    world, here = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if args.batch_size < world:
        raise UserError(f"--batch_size {args.batch_size}: {world} processes need one each; raise it, or start fewer")
    if ":" in args.device:
        raise UserError(f"--device {args.device} is one GPU, and {world} processes take one each; give cuda or cpu")
    if args.device == "cuda" and torch.cuda.device_count() < here:
        raise UserError(f"--device cuda: {here} processes need a GPU each, and there are {torch.cuda.device_count()}; "
                        "start fewer, or give --device cpu")
    if not FIRST:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo")
    return f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else args.device


def mine(rows):
    """This process's part of a list or a range, in order; parts differ by at most one row."""
    n, k = size(), RANK if size() > 1 else 0
    return rows[len(rows) * k // n:len(rows) * (k + 1) // n]


def together(collective, *arguments, **options):
    """Call a collective; if another process has ended, end in one line."""
    try:
        return collective(*arguments, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise UserError(f"the other processes of this run do not answer ({first_line(error)[:200]}); --resume goes on "
                        "from the last checkpoint", 1) from None


def everyone(part):
    """The parts of all processes in order: lists are joined to a list, tensors (n, ...) to a tensor (B, ...)."""
    if size() == 1:
        return part
    parts = [None] * size()
    together(dist.all_gather_object, parts, part.cpu() if torch.is_tensor(part) else part)
    return torch.cat(parts).to(part.device) if torch.is_tensor(part) else [row for rows in parts for row in rows]


def agreed(value):
    """The first process's value."""
    return everyone([value])[0]


def sum_gradients(params):
    """Sum gradients over all processes, in rank order: one process would add these micro-batches so, if each has one.

    A process without gradients adds zeros; if none has any, nothing is done. An all-reduce would send less, but in an
    order of its own, and Adam turns the rounding of a gradient that nearly cancels into a good part of a step.
    """
    if size() == 1 or not any(everyone([any(p.grad is not None for p in params)])):
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
    for piece in flat.split(PIECE):
        parts = [torch.empty_like(piece) for _ in range(size())]
        together(dist.all_gather, parts, piece)
        piece.copy_(sum(parts))
    for p, grad in zip(params, flat.split([p.numel() for p in params])):
        p.grad = grad.view_as(p)


def leave():
    """Wait for the others, and end the processes that have nothing left to write."""
    everyone([None])
    if size() > 1:
        dist.destroy_process_group()
    if not FIRST:
        raise SystemExit
