"""
Everything the loop changes, saved at once and restored; and the signals that ask for it.

`ckpt/` holds adapters in peft's own format, the discriminator's head as safetensors, and `state.pt`, all of one step.
It is written beside, then renamed; the previous one stays until the new one stands.
"""
import importlib.metadata
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from flags import UserError
from model import load_adapters

FORMAT = 1


def save(out_dir, model, modules, optimizers, state, files):
    """Write out_dir/ckpt.

    modules, optimizers: name to object, with a state_dict. state: plain values. files: the append-only files of the
    run, whose lengths are kept, so that lines written after this moment can be cut off.
    """
    out_dir = pathlib.Path(out_dir)
    new, ckpt, old = out_dir / "ckpt.new", out_dir / "ckpt", out_dir / "ckpt.old"
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, save_embedding_layers=False)  # no question to the hub whether embeddings changed
    for name, module in modules.items():
        save_file({key: value.contiguous() for key, value in module.state_dict().items()}, new / f"{name}.safetensors")
    lengths = {}
    for file in files:
        file.flush()
        os.fsync(file.fileno())
        lengths[pathlib.Path(file.name).name] = file.tell()
    saved = {"format": FORMAT, "state": state, "lengths": lengths,
             "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
    torch.save(saved, new / "state.pt")
    for path in new.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    if ckpt.exists():
        shutil.rmtree(old, ignore_errors=True)
        ckpt.rename(old)
    new.rename(ckpt)
    shutil.rmtree(old, ignore_errors=True)


def restore(out_dir, model, modules, optimizers):
    """Load what `save` wrote, cut the run's files back to that moment, and return the state."""
    out_dir = pathlib.Path(out_dir)
    ckpt = next((out_dir / name for name in ("ckpt", "ckpt.old") if (out_dir / name / "state.pt").exists()), None)
    if ckpt is None:
        raise UserError(f"--resume {out_dir}: there is no checkpoint in it; start the run anew with another --out_dir")
    saved = torch.load(ckpt / "state.pt", map_location="cpu", weights_only=True)
    if saved["format"] != FORMAT:
        raise UserError(f"--resume {out_dir}: its checkpoint has format {saved['format']}, this version reads {FORMAT}")
    load_adapters(model, ckpt)
    for name, module in modules.items():
        module.load_state_dict(load_file(ckpt / f"{name}.safetensors"))
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved["optimizers"][name])
    for name, length in saved["lengths"].items():
        os.truncate(out_dir / name, length)
    return saved["state"]


def claim(out_dir, preset):
    """Make the run's own folder: out_dir, or out/<preset>-<next free number>."""
    if out_dir is None:
        number = 1
        while os.path.exists(f"out/{preset}-{number}"):
            number += 1
        out_dir = f"out/{preset}-{number}"
    out_dir = pathlib.Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir} cannot be made: {error}") from None
    return out_dir


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


class Signals:
    """Turns the first SIGINT or SIGTERM into `stop`, its number, for the loop to look at; a second one ends at once."""

    def __init__(self):
        self.stop = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def default(self):
        """Give both signals back their usual meaning."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def note(self, number, frame):
        self.stop = number
        name = signal.Signals(number).name
        print(f"\n{name}: finishing what is under way; once more to stop at once", flush=True)
        signal.signal(number, signal.SIG_DFL)
