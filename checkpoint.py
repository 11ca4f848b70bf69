"""
Checkpoints: everything the loop changes, saved at once and restored. Also the run's folder, signals, and provenance.

`ckpt/` holds adapters in peft's own format, the discriminator's head as safetensors, and `state.pt`, all of one step.
It is written beside, then renamed; the previous one stays until the new one is in place.
"""
import errno
import fcntl
import hashlib
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

from flags import UserError, digest, first_line, read_json, resume_command, write_whole
from model import DAMAGE, digests, load_adapter, load_players, located, pinned
from ranks import FIRST, agreed, everyone, size

FORMAT = 3


def save(out_dir, step, players, judge, baseline, stream, files):
    """Write out_dir/ckpt, the state before `step`; the first process does, and the others wait for it.

    files: the run's append-only files, whose lengths are saved, so that a resumed run can cut off later lines.
    """
    if not FIRST:
        return everyone([])
    new, ckpt, old = (pathlib.Path(out_dir) / name for name in ("ckpt.new", "ckpt", "ckpt.old"))
    for file in files:
        check_in_place(file)
    if not all_finite(players, judge):
        raise UserError(f"--out_dir {out_dir}: before step {step} a weight or a moment of an optimiser is not finite, "
                        f"so it is not saved; {standing(out_dir)}; or start a new run with a lower learning rate, or "
                        "--dtype bf16 or fp32", 1)
    try:
        remove(new)
        for model in {id(player.model): player.model for player in players}.values():
            model.save_pretrained(new, save_embedding_layers=False)  # True would ask the hub whether embeddings changed
        save_file({key: x.contiguous() for key, x in judge.state_dict().items()}, new / "head.safetensors")
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        lengths = {pathlib.Path(file.name).name: file.tell() for file in files}
        torch.save({"format": FORMAT, "step": step, "lengths": lengths, "baseline": baseline.state_dict(),
                    "stream": stream.state_dict(), "players": [player.state_dict() for player in players]},
                   new / "state.pt")
        write_whole(new / "digests.json", json.dumps({
            str(path.relative_to(new)): file_digest(path) for path in sorted(new.rglob("*")) if path.is_file()}))
        for path in [*new.rglob("*"), new]:
            fsync(path)
        if os.path.lexists(ckpt):
            remove(old)
            ckpt.rename(old)
        new.rename(ckpt)
        fsync(new.parent)
        remove(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk by a RuntimeError
        if out_of_memory(error):
            raise
        shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"--out_dir {out_dir}: a checkpoint could not be written ({first_line(error)}); make room; "
                        f"{standing(out_dir)}") from None
    everyone([])


def check_in_place(file):
    """End a run whose open file is no longer the one at its path: what it writes would be lost."""
    try:
        here = os.stat(file.name)
        lost = not os.path.samestat(here, os.fstat(file.fileno())) or here.st_size < file.tell()
    except OSError:
        lost = True
    if lost:
        folder = pathlib.Path(file.name).parent
        raise UserError(f"{file.name} was moved, deleted or replaced while the run wrote to it, so the run ends; where "
                        f"its folder still has a checkpoint, continue with: {resume_command(folder)}")


def all_finite(players, judge):
    """Whether all that a checkpoint holds is finite: adapters, the judge's head, moments of the optimisers."""
    tensors = [*judge.state_dict().values()]
    for player in players:
        tensors += [*player.params, *(x for state in player.optimizer.state.values() for x in state.values())]
    return all(x.isfinite().all() for x in tensors if torch.is_tensor(x) and x.is_floating_point())


def remove(path):
    """Remove a folder, if there is one; of a link to another disk, only the link."""
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    shutil.rmtree(path, ignore_errors=True)


def latest(out_dir):
    """The folder of the run's last whole checkpoint, or None."""
    paths = (pathlib.Path(out_dir) / name for name in ("ckpt", "ckpt.old"))
    return next((path for path in paths if (path / "state.pt").exists()), None)


def standing(out_dir):
    """Whether a run that ends early has a checkpoint, and the command to go on with."""
    if latest(out_dir) and (pathlib.Path(out_dir) / "args.json").exists():
        return f"the last checkpoint is intact: {resume_command(out_dir)}"
    return f"there is no checkpoint yet: remove {shlex.quote(str(out_dir))} and start the run again"


def fsync(path):
    """Make sure that a file, or a folder's list of names, is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def file_digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def check_files(folder, suffix=""):
    """Raise a ValueError where a checkpoint's files whose names end in the suffix are not those that were saved."""
    saved = read_json(folder / "digests.json")
    if not saved or any(file_digest(folder / name) != old for name, old in saved.items() if name.endswith(suffix)):
        raise ValueError("its files are not those that were saved")


def load_weights(folder, players, judge=None):
    """Read the adapters of players, and a judge's head, from a checkpoint's folder."""
    for player in players:
        load_adapter(player.model, folder / player.adapter, player.adapter)
    if judge:
        judge.load_state_dict(load_file(folder / "head.safetensors"))


def restore(out_dir, players, judge, baseline, stream):
    """Load what `save` wrote, cut the run's files back to that moment, and return the step to continue with.

    A checkpoint that is missing, damaged, or from another model or version is a one-line error, and cuts nothing.
    """
    out_dir, ckpt = pathlib.Path(out_dir), latest(out_dir)
    if ckpt is None:
        raise UserError(f"--resume {out_dir}: there is no checkpoint in it; start a new run with another --out_dir")
    try:
        saved = torch.load(ckpt / "state.pt", map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"its format is {saved['format']}, this version reads {FORMAT}")
        check_files(ckpt)
        load_weights(ckpt, players, judge)
        for name, length in saved["lengths"].items():
            if name not in ("metrics.jsonl", "rollouts.jsonl", "verdicts.jsonl") or (out_dir / name).is_symlink():
                raise ValueError(f"{name} is a link, or no file of a run")
            if type(length) is not int or length < 0:
                raise ValueError(f"{length!r} is not a length of {name}")
            with open(out_dir / name, "rb") as file:
                file.seek(max(length - 1, 0))
                if length and file.read(1) != b"\n":
                    raise ValueError(f"{name} has no line that ends at byte {length}")
        for player, state in zip(players, saved["players"], strict=True):
            player.load_state_dict(state)
        baseline.load_state_dict(saved["baseline"])
        stream.load_state_dict(saved["stream"])
    except Exception as error:  # whatever the readers of a damaged file come across
        if out_of_memory(error):
            raise
        raise UserError(f"--resume {out_dir}: {ckpt.name} cannot be used ({first_line(error)}): it is cut short, or "
                        "from another model or version") from None
    everyone([])  # all have read it
    for name, length in saved["lengths"].items() if FIRST else ():
        os.truncate(out_dir / name, length)
    return saved["step"]


def load_run(run, device):
    """The Players of a run (flags.Run) with its last checkpoint's adapters, to sample from and to judge with."""
    pin(run.args)
    folder, players = latest(run.folder) or run.folder / "ckpt", load_players(run.args, device)
    try:
        check_files(folder, ".safetensors")
        load_weights(folder, players)
    except DAMAGE as error:
        raise UserError(f"{folder} cannot be used ({first_line(error)}): it is missing, cut short, or from another "
                        "model or version") from None
    return players


# -----------------------------------------------------------------------------
# the run's folder

def make_out_dir(out_dir, preset):
    """Make the run's folder, out_dir or out/<preset>-<next free number>, and lock it."""
    if not FIRST:
        return agreed(None)
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
    if os.listdir(out_dir):  # nothing is overwritten
        raise UserError(f"--out_dir {out_dir} is not empty; name a new folder, or an empty one")
    return agreed(pathlib.Path(out_dir))


def lock(out_dir):
    """Lock a run's folder until this process ends; a folder that another process has locked is refused."""
    if not FIRST:
        return
    number = os.open(out_dir, os.O_RDONLY)  # stays open, as closing it would unlock
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out_dir} is in use by another process; wait until that has ended") from None
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

    packages = "torch transformers peft bitsandbytes mauve-text numpy datasets".split()
    versions = {found.name: found.version for found in importlib.metadata.distributions() if found.name in packages}
    changes = git("status", "--porcelain")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return dict(command=sys.argv, versions={"python": platform.python_version(), **versions}, device=name,
                processes=size(), commit=git("rev-parse", "HEAD"), dirty=None if changes is None else bool(changes))


def pin(args):
    """Pin the models of a run: hub ids to their commits, and folders by digests of their files, in args.made_with.

    For a run that has them already, a folder whose files have changed is refused.
    """
    args.made_with = getattr(args, "made_with", {})
    for flag in ("model", "d_model", "featurizer"):
        name = getattr(args, flag, None)
        if name is None or flag == "featurizer" and (name == "base" or not args.seeds):
            continue
        setattr(args, flag, pinned(name, f"--{flag}"))
        folder = located(name)[0]
        found = digests(folder, f"--{flag}") if os.path.isdir(folder) else {}
        if changed := [part for part, digest in found.items() if args.made_with.get(name, found).get(part) != digest]:
            raise UserError(f"--{flag} {name}: files of its {' and '.join(changed)} have changed since this run began; "
                            "restore them, or start another run")
        args.made_with[name] = found


def write_args(out_dir, args, device):
    """Write args.json: the flags, and what the run can be traced by; for a resumed run, add what it continues with."""
    if not FIRST:
        return
    path = pathlib.Path(out_dir) / "args.json"
    info = read_json(path) or {"args": vars(args), "digest": digest(vars(args)), **provenance(device)}
    if args.resume:
        info["resumed"] = info.get("resumed", []) + [provenance(device)]
    write_whole(path, json.dumps(info, indent=2) + "\n")


class Tracker:
    """Sends metrics and samples to the service that --track names; a resumed run continues its run there."""

    def __init__(self, args, out_dir):
        self.service, name = args.track if FIRST else "none", f"{pathlib.Path(out_dir).resolve().name}-{args.track_id}"
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
    """Keeps a signal's number, which the loop asks for; a second signal ends the process at once.

    Of several processes, a signal to any stops all, and torchrun ends those that take too long.
    """

    def __init__(self):
        self.number = 0
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
        self.before = {number: signal.signal(number, self.note) for number in numbers
                       if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP

    def note(self, number, frame):
        self.number = number
        message = f"\n{signal.Signals(number).name}: finishing this step; once more to stop at once\n"
        if size() == 1:
            os.write(2, message.encode())  # print is not safe here: it may be running already
            for other in self.before:
                signal.signal(other, signal.SIG_DFL)

    def stop(self):
        """The number of a signal that any process has received, else 0."""
        number = max(everyone([self.number]))
        self.number = number or self.number  # one may have come meanwhile
        return number

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, when, out_dir):
        """End the run; every completed step is saved."""
        print(f"stopped {when}; continue with: {resume_command(out_dir)}")
        raise SystemExit(128 + self.number)


def out_of_memory(error):
    words = "can't allocate memory", "CUDA out of memory", "CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def explain_failures(out_dir=None):
    """Report a lack of memory or disk in one line, with status 1 or 2. out_dir: the run that this process trains."""
    def hook(kind, error, trace):
        full = errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO
        resume = f"; {standing(out_dir)}" if out_dir else ""
        if isinstance(error, BrokenPipeError):  # the reader of our output has gone
            os._exit(128 + signal.SIGPIPE)
        if out_of_memory(error):
            status, message = 1, (
                f"out of memory ({first_line(error)}); try --micro_batch 1, --quant nf4, --grad_ckpt, or a smaller "
                "--batch_size, --prefix_tokens, --reasoning_tokens or --completion_tokens"
                + resume + " --micro_batch 1" * ("--resume" in resume))
        elif isinstance(error, OSError) and error.errno in full:
            status, message = 2, f"{out_dir or 'a file'} cannot be written ({first_line(error)}); make room{resume}"
        else:
            return sys.__excepthook__(kind, error, trace)
        UserError(message, own=True)  # prints it
        sys.stdout.flush()
        os._exit(status)  # at once: what is left in a file's buffer cannot be written either
    sys.excepthook = hook
