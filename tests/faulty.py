"""
train.py or sft.py with a fault built in from outside, so that the product needs no hooks for its tests:

    python tests/faulty.py FAULT train.py's flags...
    python tests/faulty.py sft.py:FAULT sft.py's flags...

kill_before:N   kill -9 when the N-th checkpoint is written and not yet renamed
kill_between:N  kill -9 between its two renames
nan:A-B         the generator's loss of steps A to B is nan; with sft.py the nats of passes A to B
oom:PLACE:N     the N-th call in sampling, generator, discriminator, verdicts (of --disc reason) or lessons (of sft.py) runs
                out of memory
disk:N          from the N-th step on no file may grow beyond what rollouts.jsonl has, and 100 bytes
full:N          the N-th checkpoint finds the disk full
gradients:FILE  the first two gradients (generator's, discriminator's) are saved, and the run ends
"""
import errno
import os
import pathlib
import resource
import runpy
import signal
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
fault, *details = sys.argv[1].split(":")
script = "train.py"
if fault == "sft.py":
    script, fault, *details = fault, *details
sys.argv = [str(ROOT / script), *sys.argv[2:]]

import torch

import checkpoint
import discriminator
import lessons
import reason
import reward
import rollout


def at_call(module, name, number, do):
    """Let `do(original, args)` take the place of the number-th call of module.name."""
    original, calls = getattr(module, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        return do(lambda: original(*args, **kwargs), args) if len(calls) == number else original(*args, **kwargs)

    setattr(module, name, wrapped)


def die(call, args):
    os.kill(os.getpid(), signal.SIGKILL)


def die_between(call, args):
    args[0].with_name("ckpt").rename(args[0].with_name("ckpt.old"))
    os.kill(os.getpid(), signal.SIGKILL)


def no_memory(call, args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def no_disk(call, args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def small_files(call, args):
    folder = pathlib.Path(sys.argv[sys.argv.index("--out_dir") + 1])
    limit = (folder / "rollouts.jsonl").stat().st_size + 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return call()


if fault in ("kill_before", "kill_between", "full"):
    at_call(checkpoint, "put_in_place", int(details[0]), dict(kill_before=die, kill_between=die_between, full=no_disk)[fault])
elif fault == "nan":
    first, last = map(int, details[0].split("-"))
    for number in range(first + 1, last + 2):  # one call a step: the tests' runs have no micro-batches
        if script == "sft.py":
            at_call(lessons, "taught_nats", number, lambda call, args: tuple(x * float("nan") for x in call()))
        else:
            at_call(reward, "policy_loss", number, lambda call, args: call() * float("nan"))
elif fault == "oom":
    place = dict(sampling=(rollout, "rollout"), generator=(reward, "policy_loss"), discriminator=(discriminator, "discriminator_loss"),
                 verdicts=(reason, "sampled_stats"), lessons=(lessons, "taught_nats"))
    at_call(*place[details[0]], int(details[1]), no_memory)
elif fault == "disk":
    at_call(reward, "policy_loss", int(details[0]), small_files)
elif fault == "gradients":
    original, found = torch.nn.utils.clip_grad_norm_, []

    def keep(parameters, most):
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        if len(found) == 2:
            torch.save(found, details[0])
            raise SystemExit(0)
        return original(parameters, most)

    torch.nn.utils.clip_grad_norm_ = keep
    # an untrained discriminator pays all alike, which leaves no gradient to compare
    reward.generator_reward = lambda judged, lengths, *rest: torch.linspace(0, 1, len(lengths))  # (B,)
else:
    raise SystemExit(f"no such fault: {fault}")

runpy.run_path(sys.argv[0], run_name="__main__")
