"""
Checkpoints: everything the loop changes, saved at once and restored. Also the run's folder, signals, and provenance.

`ckpt/` holds adapters in peft's own format, the discriminator's head as safetensors, and `state.pt`, all of one step.
It is written beside, then renamed; the previous one stays until the new one is in place.
"""
import errno
import fcntl
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import sys

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flags import UserError, first_line, read_json, write_whole
from model import DAMAGE, load_adapter, load_players

FORMAT = 2


def save(out_dir, step, players, judge, baseline, files):
    """Write out_dir/ckpt, the state before `step`.

    files: the run's append-only files, whose lengths are saved, so that a resumed run can cut off later lines.
    """
    new, ckpt, old = (pathlib.Path(out_dir) / name for name in ("ckpt.new", "ckpt", "ckpt.old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        for model in {id(player.model): player.model for player in players}.values():
            model.save_pretrained(new, save_embedding_layers=False)  # True would ask the hub whether embeddings changed
        save_file({key: x.contiguous() for key, x in judge.state_dict().items()}, new / "head.safetensors")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        lengths = {pathlib.Path(file.name).name: file.tell() for file in files}
        torch.save({"format": FORMAT, "step": step, "lengths": lengths, "baseline": baseline.state_dict(),
                    "players": [player.state_dict() for player in players]}, new / "state.pt")
        for path in [*new.rglob("*"), new]:
            fsync(path)
        if ckpt.exists():
            shutil.rmtree(old, ignore_errors=True)
            ckpt.rename(old)
        new.rename(ckpt)
        fsync(new.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk by a RuntimeError
        if out_of_memory(error):
            raise
        shutil.rmtree(new, ignore_errors=True)
        stands = "the one before it is intact" if ckpt.exists() or old.exists() else "there is none before it"
        raise UserError(f"--out_dir {out_dir}: a checkpoint could not be written ({first_line(error)}); {stands}; "
                        f"make room, then: {resume_command(out_dir)}") from None


def fsync(path):
    """Make sure that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def load_weights(folder, players, judge=None):
    """Read the adapters of players, and a judge's head, from a checkpoint's folder."""
    for player in players:
        load_adapter(player.model, folder / player.adapter, player.adapter)
    if judge:
        judge.load_state_dict(load_file(folder / "head.safetensors"))


def restore(out_dir, players, judge, baseline):
    """Load what `save` wrote, cut the run's files back to that moment, and return the step to continue with.

    A checkpoint that is missing, cut short, or from another model or version is a one-line error, and cuts nothing.
    """
    out_dir = pathlib.Path(out_dir)
    ckpt = next((out_dir / name for name in ("ckpt", "ckpt.old") if (out_dir / name / "state.pt").exists()), None)
    if ckpt is None:
        raise UserError(f"--resume {out_dir}: there is no checkpoint in it; start a new run with another --out_dir")
    try:
        saved = torch.load(ckpt / "state.pt", map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, this version reads {FORMAT}")
        for name, length in saved["lengths"].items():
            if pathlib.Path(name).name != name or not 0 <= length <= (out_dir / name).stat().st_size:
                raise ValueError(f"{name} is shorter than when it was saved")
        load_weights(ckpt, players, judge)
        for player, state in zip(players, saved["players"], strict=True):
            player.load_state_dict(state)
        baseline.load_state_dict(saved["baseline"])
        step = int(saved["step"])
    except DAMAGE as error:
        raise UserError(f"--resume {out_dir}: {ckpt.name} cannot be used ({first_line(error)}): it is cut short, or "
                        "from another model or version") from None
    for name, length in saved["lengths"].items():
        os.truncate(out_dir / name, length)
    return step


def load_run(run, device):
    """The Players of a run (flags.Run) with its checkpoint's adapters, to sample from and to judge with."""
    players = load_players(run.args, device)
    try:
        load_weights(run.folder / "ckpt", players)
    except DAMAGE as error:
        raise UserError(f"{run.folder}/ckpt cannot be used ({first_line(error)}): it is missing, cut short, or from "
                        "another model or version") from None
    return players


def resume_command(out_dir):
    """The command that continues a run."""
    script = "-m tools.sft" if sys.argv[0].endswith("sft.py") else pathlib.Path(sys.argv[0]).name  # or a copy's name
    return f"python {script} --resume {shlex.quote(str(out_dir))}"


# -----------------------------------------------------------------------------
# the run's folder

def make_out_dir(out_dir, preset):
    """Make the run's folder, out_dir or out/<preset>-<next free number>, and lock it."""
    try:
        number = 1
        while out_dir is None:
            try:
                os.makedirs(f"out/{preset}-{number}")
                out_dir = f"out/{preset}-{number}"
            except FileExistsError:
                number += 1
        pathlib.Path(out_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir {out_dir or 'out'} cannot be made: {error}") from None
    lock(out_dir)
    if os.listdir(out_dir):  # nothing is ever overwritten
        raise UserError(f"--out_dir {out_dir} is not empty; name a new folder, or an empty one")
    return pathlib.Path(out_dir)


def lock(out_dir):
    """Lock a run's folder until this process ends; a folder that another process has locked is refused."""
    number = os.open(out_dir, os.O_RDONLY)  # stays open, as closing it would unlock
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir} is in use by another process; wait for it, or choose another --out_dir") from None
    except OSError:
        pass  # a file system without locks


def provenance(device):
    """What a run can be traced by: command, versions, commit, device."""
    def git(*words):
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = "torch transformers peft bitsandbytes mauve-text numpy datasets".split()
    changes = git("status", "--porcelain")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "command": sys.argv,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else bool(changes),
        "device": name,
    }


def write_args(out_dir, args, device):
    """Write args.json: the flags, and what the run can be traced by; for a resumed run, add what it continues with."""
    path = pathlib.Path(out_dir) / "args.json"
    info = read_json(path) or {"args": vars(args), **provenance(device)}
    if args.resume:
        info["resumed"] = info.get("resumed", []) + [provenance(device)]
    write_whole(path, json.dumps(info, indent=2) + "\n")


class Tracker:
    """Sends metrics and samples to the service that --track names, as one run there, also when ours is resumed."""

    def __init__(self, args, out_dir):
        self.service, name = args.track, f"{pathlib.Path(out_dir).resolve().name}-{args.track_id}"
        if self.service == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(pathlib.Path(out_dir) / "tensorboard")
        elif self.service != "none":
            self.module = importlib.import_module(self.service)  # wandb resumes a run by its id, trackio by its name
            by_id = {"id": args.track_id} if self.service == "wandb" else {}
            try:
                self.module.init(project="forger", name=name, config=vars(args), resume="allow", **by_id)
            except Exception as error:  # whatever its client raises: no login, no network
                raise UserError(f"--track {self.service}: {first_line(error)}; log in there, or --track none, then: "
                                f"{resume_command(out_dir)}") from None

    def log(self, step, row, records=()):
        """Log the numbers of a row, and records as a table."""
        numbers = {key: x for key, x in row.items() if isinstance(x, (int, float)) and key != "step"}
        columns = "prefix think completion truth reward".split()
        if self.service == "tensorboard":
            for key, x in numbers.items():
                self.writer.add_scalar(key, x, step)
            self.writer.add_text("samples", "\n\n".join(f"{r['prefix']} **{r['completion']}**" for r in records), step)
        elif self.service != "none":
            table = self.module.Table(columns=columns, data=[[r[key] for key in columns] for r in records])
            self.module.log(numbers | ({"samples": table} if records else {}), step=step)

    def finish(self):
        if self.service == "tensorboard":
            self.writer.close()
        elif self.service != "none":
            self.module.finish()


# -----------------------------------------------------------------------------
# early ends

class Signals:
    """Turns a first signal into `stop`, its number, for the loop to check; a second one ends the process at once."""

    def __init__(self):
        self.stop = 0
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
        self.before = {number: signal.signal(number, self.note) for number in numbers
                       if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP

    def note(self, number, frame):
        self.stop = number
        message = f"\n{signal.Signals(number).name}: finishing this step; once more to stop at once\n"
        os.write(2, message.encode())  # print is not safe here: it may be running already
        for other in self.before:
            signal.signal(other, signal.SIG_DFL)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, when, out_dir):
        """End the run; every completed step is saved."""
        print(f"stopped {when}; continue with: {resume_command(out_dir)}")
        raise SystemExit(128 + self.stop)


def out_of_memory(error):
    words = "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def explain_failures(out_dir=None):
    """Install a sys.excepthook that reports a lack of memory or disk in one line, with status 1 or 2."""
    def hook(kind, error, trace):
        full = errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
        resume = f"; the last checkpoint is intact: {resume_command(out_dir)}" if out_dir else ""
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            os._exit(128 + signal.SIGPIPE)
        if out_of_memory(error):
            status, advice = 1, ("try --micro_batch 1, --quant nf4, --grad_ckpt, or a smaller --batch_size, "
                                 f"--prefix_tokens, --reasoning_tokens or --completion_tokens{resume}")
            message = f"out of memory ({first_line(error)}); {advice}"
            message += " --micro_batch 1" if out_dir else ""
        elif isinstance(error, OSError) and error.errno in full and out_dir:
            status, message = 2, f"--out_dir {out_dir}: {first_line(error)}; make room{resume}"
        else:
            return sys.__excepthook__(kind, error, trace)
        sys.stdout.flush()
        print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
        os._exit(status)  # at once: what is left in a file's buffer cannot be written either
    sys.excepthook = hook
