"""
Time and memory of a call, on a CPU or a GPU, for bench.py.

What differs from the textbook: calls that are compared are made in turn, so that a busy moment of the machine meets
them alike; and a CPU's peak is a trace of torch's own allocator, not of the process, whose pages outlive the tensors.
"""
import itertools
import os
import statistics
import time

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # before torch is loaded: its profiler announces itself otherwise,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns when a tensor from before is freed

import torch


def now(device):
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(call, device):
    start = now(device)
    call()
    return now(device) - start


def in_turn(calls, repeats, device):
    """Seconds of each call of a dict, a list each: all of them once, then all again."""
    turns = [{name: timed(call, device) for name, call in calls.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in calls}


def spread(values):
    values = sorted(values)
    return {"median": statistics.median(values), "least": values[0], "most": values[-1]}


def ratio(ours, other):
    """The spread of ours / other, turn by turn."""
    return spread([a / b for a, b in zip(ours, other, strict=True)])


class Clock:
    """Seconds by phase: clock(phase) gives the phase what has passed since the call before."""

    def __init__(self, device):
        self.device, self.spent, self.last = device, {}, now(device)

    def __call__(self, phase):
        before, self.last = self.last, now(self.device)
        self.spent[phase] = self.spent.get(phase, 0.0) + self.last - before


class Peak:
    """`with Peak(device) as peak`: peak.gib is the most that was allocated inside, above what stood before."""

    def __init__(self, device):
        self.device, self.gib = device, None

    def __enter__(self):
        if self.device.type == "cuda":
            now(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.trace = torch.autograd.profiler.profile(profile_memory=True)
            self.trace.__enter__()
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(self.device) - self.before
        else:
            self.trace.__exit__(*error)
            events = [event for event in self.trace.kineto_results.events() if event.name() == "[memory]"]
            sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
            most = max(itertools.accumulate(sizes, initial=0))  # what is freed counts below 0
        self.gib = most / 2**30


def peak_of(call, device):
    with Peak(device) as peak:
        call()
    return peak.gib


def copy_speed(device, size=1 << 27):
    """Bytes a second that a copy of `size` floats reads and writes."""
    source = torch.ones(size, device=device)  # (size,)
    target = torch.zeros_like(source)  # (size,)
    return 2 * source.nbytes / min(timed(lambda: target.copy_(source), device) for _ in range(10))
