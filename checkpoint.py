"""
Everything the loop changes, saved at once and restored; and the ways in which a run ends before its end.

`ckpt/` holds adapters in peft's own format, the discriminator's head as safetensors, and `state.pt`, all of one step.
It is written beside, then renamed; the previous one stays until the new one stands.
"""
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import pathlib
import pickle
import platform
import shutil
import signal
import subprocess
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flags import UserError
from model import load_adapter, load_adapters

FORMAT = 1


def save(out_dir, models, modules, optimizers, state, files, keep=0):
    """Write out_dir/ckpt.

    models: whose adapters are trained. modules, optimizers: name to object, with a state_dict. state: plain values.
    files: the append-only files of the run, whose lengths are kept, so that lines written after this moment can be cut
    off. keep: so many checkpoints before this one stay, as ckpt-<step>.
    """
    new = pathlib.Path(out_dir) / "ckpt.new"
    try:
        shutil.rmtree(new, ignore_errors=True)
        for model in models:
            model.save_pretrained(new, save_embedding_layers=False)  # no question to the hub whether embeddings changed
        for name, module in modules.items():
            tensors = {key: value.contiguous() for key, value in module.state_dict().items()}
            save_file(tensors, new / f"{name}.safetensors")
        lengths = {}
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            lengths[pathlib.Path(file.name).name] = file.tell()
        saved = {"format": FORMAT, "state": state, "lengths": lengths,
                 "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
        torch.save(saved, new / "state.pt")
        for path in [*new.rglob("*"), new]:
            sync(path)
        put_in_place(new, keep)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch tells of a full disk by a RuntimeError
        if shortage(error) == "memory":
            raise
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"--out_dir {out_dir}: a checkpoint could not be written ({first_line(error)}); the one before "
                        f"it stands; make room, then: {again(out_dir)}") from None


def put_in_place(new, keep):
    """Rename ckpt.new to ckpt. Of the ones that stood there before, the `keep` latest stay as ckpt-<step>."""
    folder, ckpt, old = new.parent, new.with_name("ckpt"), new.with_name("ckpt.old")
    if ckpt.exists():
        shutil.rmtree(old, ignore_errors=True)
        ckpt.rename(old)
    new.rename(ckpt)
    sync(folder)
    if keep and old.exists():
        step = torch.load(old / "state.pt", weights_only=True, mmap=True)["state"]["step"]
        if step > 0:
            shutil.rmtree(folder / f"ckpt-{step}", ignore_errors=True)
            old.rename(folder / f"ckpt-{step}")
    shutil.rmtree(old, ignore_errors=True)
    steps = sorted(kept(folder))
    for step in steps[:max(len(steps) - keep, 0)]:
        shutil.rmtree(kept(folder)[step])


def kept(folder):
    """Step to path of the earlier checkpoints in a run's folder."""
    return {int(path.name[5:]): path for path in folder.glob("ckpt-*") if path.name[5:].isdecimal()}


def sync(path):
    """Make sure that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def restore(out_dir, models, modules, optimizers):
    """Load what `save` wrote, cut the run's files back to that moment, and return the state.

    A checkpoint that is missing, cut short, or of another model or version is one line, and nothing is cut then.
    """
    out_dir = pathlib.Path(out_dir)
    ckpt = next((out_dir / name for name in ("ckpt", "ckpt.old") if (out_dir / name / "state.pt").exists()), None)
    if ckpt is None:
        raise UserError(f"--resume {out_dir}: there is no checkpoint in it; start the run anew with another --out_dir")
    try:
        saved = torch.load(ckpt / "state.pt", map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, this version reads {FORMAT}")
        for name, length in saved["lengths"].items():
            if (out_dir / name).stat().st_size < length:
                raise ValueError(f"{name} is shorter than when it was saved")
        for model in models:
            load_adapters(model, ckpt)
        for name, module in modules.items():
            module.load_state_dict(load_file(ckpt / f"{name}.safetensors"))
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, SafetensorError,
            pickle.UnpicklingError) as error:
        earlier = ", ".join(path.name for _, path in sorted(kept(out_dir).items()))
        advice = f"; earlier ones are there, remove {ckpt.name} and rename one to ckpt: {earlier}" if earlier else ""
        raise UserError(f"--resume {out_dir}: {ckpt.name} cannot be used ({first_line(error)}): it is cut short, or of "
                        f"another model or version{advice}") from None
    for name, length in saved["lengths"].items():
        os.truncate(out_dir / name, length)
    for step, path in kept(out_dir).items():  # of a future that will be another one
        if step > saved["state"]["step"]:
            shutil.rmtree(path)
    return saved["state"]


def start_from(out_dir, model, names):
    """Give the named adapters the weights of a run's generator, or of what sft.py fine-tuned."""
    ckpt = pathlib.Path(out_dir) / "ckpt"
    source = ckpt / "shared" if (ckpt / "shared").is_dir() else ckpt / "generator"
    try:
        for name in names:
            load_adapter(model, source, name)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(f"--init {out_dir}: {source} cannot be used ({first_line(error)}): it is cut short, or of "
                        "another model or version") from None


def again(out_dir):
    """The command that goes on with a run of the script that is running."""
    return f"python {pathlib.Path(sys.argv[0]).name} --resume {out_dir}"


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# -----------------------------------------------------------------------------
# the run's folder

def claim(out_dir, preset):
    """Make the run's own folder, out_dir or out/<preset>-<next free number>, and hold it."""
    try:
        if out_dir is None:
            number = 1
            pathlib.Path("out").mkdir(exist_ok=True)
            while not made(f"out/{preset}-{number}"):
                number += 1
            out_dir = f"out/{preset}-{number}"
        pathlib.Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir or 'out'} cannot be made: {error}") from None
    hold(out_dir)
    if os.listdir(out_dir):  # nothing that is there is ever overwritten
        raise UserError(f"--out_dir {out_dir} is not empty; name a new folder, or one that is")
    return pathlib.Path(out_dir)


def made(folder):
    """Make a folder; False where there is one already, so that of two processes one gets it."""
    try:
        os.mkdir(folder)
    except FileExistsError:
        return False
    return True


def hold(out_dir, flag="--out_dir"):
    """Lock a run's folder, or a file, until this process ends, however it ends; what another one holds is refused."""
    number = os.open(out_dir, os.O_RDONLY)  # stays open: closing it would let go
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir} is in use by another process; wait for it, or choose another {flag}") from None
    except OSError:
        pass  # a file system without locks


def provenance(device):
    """What a run can be traced by: command, versions, commit, device."""
    def git(*words):
        try:
            told = subprocess.run(["git", *words], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
        except OSError:  # no git here
            return None
        return told.stdout.strip() if told.returncode == 0 else None

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = "torch transformers peft bitsandbytes mauve-text numpy datasets".split()
    changes = git("status", "--porcelain")
    threads = f"{device.type}, {torch.get_num_threads()} threads"
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else threads,
    }


def trace_resume(out_dir, device):
    """Note in args.json by which command and which versions a run was gone on with."""
    path = pathlib.Path(out_dir) / "args.json"
    run = json.loads(path.read_text())
    run["resumed"] = run.get("resumed", []) + [provenance(device)]
    write_whole(path, json.dumps(run, indent=2) + "\n")


def json_lines(rows):
    """Dicts as lines of JSON, with null for nan and infinities, which it does not have."""
    def known(x):
        return None if isinstance(x, float) and not math.isfinite(x) else x

    rows = ({key: known(x) for key, x in row.items()} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path, text):
    """Write a file beside, then rename it, so that it is never there by half."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    sync(beside)
    beside.rename(path)


# -----------------------------------------------------------------------------
# ends before the end

class Signals:
    """Turns the first SIGINT or SIGTERM into `stop`, its number, for the loop to look at; a second one ends at once."""

    def __init__(self):
        self.stop, self.before = 0, {number: signal.signal(number, self.note) for number in
                                     (signal.SIGINT, signal.SIGTERM)}

    def default(self):
        """Give both signals back the meaning they had."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, when, out_dir):
        """End the run, all whole steps of which were saved."""
        print(f"stopped {when}; go on with: {again(out_dir)}")
        raise SystemExit(128 + self.stop)

    def note(self, number, frame):
        self.stop = number
        told = f"\n{signal.Signals(number).name}: finishing what is under way; once more to stop at once\n"
        os.write(2, told.encode())  # print is not safe here: it may be under way itself
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)


def shortage(error):
    """"memory" or "disk" where an error says that it ran out, or cannot be written to; None for any other error."""
    told = str(error)
    allocators = "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in told for words in allocators):
        return "memory"
    full = errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
    return "disk" if isinstance(error, OSError) and error.errno in full else None


SIZES = "--batch_size, --prefix_tokens, --reasoning_tokens or --completion_tokens"  # the flags that memory goes with


def last_words(out_dir, needs, save_whole, sizes=SIZES):
    """A sys.excepthook: where memory or disk ran out, a run ends in one line with status 1 or 2, not in a traceback.

    needs: GiB of memory by purpose, from `memory_needs`. save_whole() saves the run if it can, and returns whether.
    Without an out_dir the model is still being loaded.
    """
    def hook(kind, error, trace):
        short = shortage(error)
        if isinstance(error, BrokenPipeError):  # whoever read our lines has gone
            os._exit(128 + signal.SIGPIPE)
        if short == "memory" and out_dir is None:
            print(f"error: out of memory while the model was loaded ({first_line(error)}); try --quant nf4, a smaller "
                  "--model or a smaller --rank", file=sys.stderr, flush=True)
            os._exit(1)
        if short is None or out_dir is None:
            return sys.__excepthook__(kind, error, trace)
        resume, stands = again(out_dir), "the last checkpoint stands"
        if short == "memory":
            with contextlib.suppress(SystemExit, Exception):  # no room for that either: the last checkpoint stands
                stands = "all whole steps were saved" if save_whole() else stands
            parts = ", ".join(f"{purpose} {gib:.1f}" for purpose, gib in needs.items())
            message = (f"out of memory ({first_line(error)}); {stands}; about {sum(needs.values()):.1f} GiB are wanted "
                       f"({parts}); go on with: {resume} --micro_batch 1, or start anew with --quant nf4, or with a "
                       f"smaller {sizes}")
        else:
            message = f"--out_dir {out_dir}: {first_line(error)}; {stands}; make room, then: {resume}"
        sys.stdout.flush()
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
        os._exit(1 if short == "memory" else 2)  # at once: what is left in a file's buffer cannot be written either
    return hook
