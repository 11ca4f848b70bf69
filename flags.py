"""
How every script here reads its flags and tells a mistake: one line, exit status 2, the nearest flag named.
Imports nothing heavy, so that a wrong flag fails before torch has loaded.
"""
import argparse
import difflib
import json
import math
import pathlib
import re
import signal
import sys

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")  # of --data
NEEDED = "preset model quant dtype device featurizer seeds num_steps".split()  # of a run that is loaded again


class UserError(SystemExit):
    """A user's mistake: says `message` in one line on standard error and ends the program with status 2.

    The message tells what was given, what is allowed, and which flag to change. Control characters are escaped.
    """

    def __init__(self, message, status=2):
        super().__init__(status)
        self.message = escaped(" ".join(str(message).split()))
        print(f"error: {self.message}", file=sys.stderr)


def escaped(text):
    """Text that cannot move a terminal's cursor, change its colours or direction: what cannot be printed, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def interrupted(number, frame):
    """Ctrl-C while nothing is lost by it: one line, status 130."""
    print("\nstopped", file=sys.stderr)
    raise SystemExit(128 + number)


class Parser(argparse.ArgumentParser):
    """argparse with underscored flags, whole names only, defaults in --help, and errors of one line."""

    def __init__(self, doc):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Formatter)

    def parse_args(self, argv=None, namespace=None):
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            typed = unknown[0].split("=")[0].lstrip("-").replace("-", "_")

            def likeness(flag):  # to the whole name, or a little less to one word of it: --stepz is --num_steps
                name = flag.lstrip("-")
                parts = name, *name.split("_")
                whole, *words = (difflib.SequenceMatcher(None, typed, part).ratio() for part in parts)
                return max(whole, 0.95 * max(words))

            near = max(known, key=likeness)
            advice = f", did you mean {near}?" if likeness(near) > 0.5 else "; --help lists them all"
            raise UserError(f"unknown flag {unknown[0]}{advice}")
        signal.signal(signal.SIGINT, interrupted)  # the imports that follow take seconds, and a model minutes
        return args

    def given(self):
        """The flags that stand on the command line, as typed."""
        return [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]

    def peek(self, flag):
        """The value that one flag has on the command line, unchecked; None where it has none."""
        words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
        return next((value for name, value in reversed([*zip(words, words[1:])]) if name == flag), None)

    def checked(self, run, where):
        """The flags of a run that was read from a file, if each has the type and is among the choices of ours."""
        for action in self._actions:
            value = run.get(action.dest, action.default)
            kind = action.type or (str if action.default is None else type(action.default))
            parts = value if action.nargs and isinstance(value, list) else [value]
            of_kind = (isinstance(part, {float: (int, float)}.get(kind, kind)) for part in parts)
            fits = value is None and action.default is None or all(of_kind)
            if action.dest in run and (not fits or action.choices and value not in action.choices):
                raise UserError(f"{where} holds no usable run: its args.json has {action.dest} = {value!r}")
        return run

    def going_on(self, args, may_change, needed=NEEDED):
        """The flags of the run that --resume names, and those on the command line, which may be few."""
        given = {word: word.removeprefix("--").removeprefix("no-") for word in self.given()}
        another = [word for word, name in given.items() if name not in (*may_change, "resume")]
        if another:
            raise UserError(f"--resume goes on with the run's own flags; {' '.join(another)} would make it another "
                            f"run; only --{', --'.join(may_change)} may change")
        run = self.checked(read_args(args.resume, needed), args.resume)
        return run, {name: getattr(args, name) for name in given.values()}

    def error(self, message):
        raise UserError(message)


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def read_args(out_dir, needed=()):
    """The flags a run was started with, from its args.json; without the needed ones it is no run to go on with."""
    try:
        run = dict(json.loads((pathlib.Path(out_dir) / "args.json").read_text())["args"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out_dir} holds no run: there is no readable args.json in it") from None
    missing = set(needed) - run.keys()
    if missing:
        raise UserError(f"{out_dir} holds no usable run: its args.json lacks {', '.join(sorted(missing))}")
    return run


def check_device(name):
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: must be cpu, cuda, or cuda:0, cuda:1, ...")


def check_values(args, positive):
    """Refuse what no script that trains can use; positive: the flags that must not be 0. Imports nothing heavy."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
            raise UserError(f"--{name} {value}: must not be negative")
        if name in positive and value == 0:
            raise UserError(f"--{name} 0: must be above 0")
        if value == "":
            raise UserError(f"--{name} is empty; leave the flag out for its default")
        if isinstance(value, str) and max(map(len, value.split("/"))) > 255:
            raise UserError(f"--{name} {value[:20]}...: a name of {len(value)} characters is too long")
        if isinstance(value, int) and value >= 2 ** 63:
            raise UserError(f"--{name} {value}: must be below 2 to the 63")
    for name in ("beta1", "beta2", "ema_decay", "mix", "held_out"):
        if not 0 <= getattr(args, name, 0) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be from 0 to below 1")
    for name in ("lr", "g_lr", "d_lr"):
        if getattr(args, name, 0) > 100:
            raise UserError(f"--{name} {getattr(args, name)}: must be at most 100; 1e-5 to 1e-2 are usual")
    check_device(args.device)
    for flag in ("model", "d_model"):
        name = getattr(args, flag, None) or ""
        if name.startswith((".", "/", "~")) and not pathlib.Path(name).is_dir():
            raise UserError(f"--{flag} {name}: there is no such folder; give a folder, a hub id, or demo")
    if args.out_dir and pathlib.Path(args.out_dir).is_file():
        raise UserError(f"--out_dir {args.out_dir} is a file; name a folder")
    if args.out_dir and not args.resume and (pathlib.Path(args.out_dir) / "args.json").exists():
        raise UserError(f"--out_dir {args.out_dir} holds a run already; "
                        f"go on with --resume {args.out_dir}, or name another folder")
    if args.init and not args.resume:  # a resumed run has it all in its own checkpoint
        check_init(args)


def check_init(args):
    """Refuse an --init whose adapter is not there or would not fit."""
    files = (pathlib.Path(args.init) / "ckpt" / name / "adapter_model.safetensors" for name in ("shared", "generator"))
    if not (pathlib.Path(args.init) / "args.json").is_file() or not any(file.is_file() for file in files):
        raise UserError(f"--init {args.init} holds no run of train.py or sft.py with a checkpoint; give such a folder")
    run = read_args(args.init, ("model", "rank", "alpha"))
    for name in ("model", "rank", "alpha"):
        if run[name] != getattr(args, name):
            raise UserError(f"--{name} {getattr(args, name)} does not fit --init {args.init}, which was made with "
                            f"--{name} {run[name]}; give that one")


def check(args):
    """Refuse train.py's flags out of range, combinations that cannot work and paths that are not there."""
    positive = ("rank alpha prefix_tokens completion_tokens batch_size num_steps "
                "d_scale d_loss_scale grad_clip seeds").split()
    check_values(args, positive)
    if args.num_steps * args.batch_size < 4:
        raise UserError(f"--num_steps {args.num_steps} x --batch_size {args.batch_size}: "
                        "MAUVE needs at least 4 sequences")
    if args.d_loss == "pair" and args.d_shuffle:
        raise UserError("--d_shuffle: shuffles labels text by text, which --d_loss pair has no use for; "
                        "use --d_loss ce")
    if args.g_reward == "azr" and args.disc != "reason":
        raise UserError("--g_reward azr: is made of the d_value that --disc reason has; give both, or prob or neglog")
    if args.g_reward == "neglog" and args.disc != "head":
        raise UserError("--g_reward neglog: needs the probability that --disc head gives; with reason, use azr or prob")
    if args.d_loss == "pair" and args.disc != "head":
        raise UserError("--d_loss pair: is the head's; --disc reason learns by policy gradient, leave it out")
    if args.disc != "reason" and (args.d_think_tokens is not None or args.d_value_detach):
        flag = "d_value_detach" if args.d_value_detach else "d_think_tokens"
        raise UserError(f"--{flag}: has no effect on --disc head; use --disc reason, or leave it out")
    if args.d_model and args.adapters == "shared":
        raise UserError(f"--d_model {args.d_model}: two models cannot share an adapter; use --adapters separate")
    if args.azr_t >= 1:
        raise UserError(f"--azr_t {args.azr_t}: must be from 0 to below 1")
    if args.sft and args.d_shuffle:
        raise UserError("--sft learns from the truth and not from the discriminator, so --d_shuffle has no effect; "
                        "give one of the two")
    if args.sft and args.adapters == "shared":
        raise UserError("--sft: with --adapters shared the discriminator's steps would move the generator too; "
                        "use --adapters separate")
    if args.data not in ("pile", "demo"):
        if not pathlib.Path(args.data).exists():
            raise UserError(f"--data {args.data} does not exist; give pile, demo, or a path")
        if not pathlib.Path(args.data).is_dir() and not args.data.endswith(SUFFIXES):
            raise UserError(f"--data {args.data} is none of {', '.join(SUFFIXES)}, nor a folder of these")
