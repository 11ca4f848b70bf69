"""
Flags with one-line errors, checks of their values, and the reader of a run's folder. Imports nothing heavy, so that a
wrong flag or a wrong folder fails before torch has loaded.
"""
import argparse
import difflib
import importlib.util
import json
import math
import os
import pathlib
import re
import signal
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch loads: OpenMP threads that spin stall shared cores
SHORT = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32",
         "4bit": "nf4", "8bit": "int8", "no": "none"}  # other names of the values of --dtype and --quant


class UserError(SystemExit):
    """A user's mistake: prints `message` as one line on standard error and ends the program with status 2.

    The message says what was given, what is allowed, and which flag to change.
    """

    def __init__(self, message, status=2):
        super().__init__(status)
        self.message = escaped(" ".join(str(message).split()))
        print(f"error: {self.message}", file=sys.stderr)


def escaped(text):
    """Text with its unprintable characters escaped: it cannot move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def readable(text):
    """Text with its unprintable characters escaped, except for line ends and tabs."""
    return re.sub(r"[^\n\t]+", lambda part: escaped(part[0]), text)


def first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def short(word):
    """The short name of a dtype or a quantisation: fp16 for float16, nf4 for 4bit."""
    return SHORT.get(word.lower(), word)


class Parser(argparse.ArgumentParser):
    """argparse with underscored flags, whole names only, defaults in --help, and errors of one line."""

    def __init__(self, doc, words=None):
        super().__init__(description=doc, allow_abbrev=False, formatter_class=Formatter)
        self.words = sys.argv[1:] if words is None else words

    def parse_args(self, words=None, namespace=None):
        args, unknown = self.parse_known_args(self.words if words is None else words, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            typed = unknown[0].split("=")[0].lstrip("-").replace("-", "_")

            def likeness(flag):  # --stepz resembles one word of --num_steps more than the whole name
                name = flag.lstrip("-")
                whole, *parts = (difflib.SequenceMatcher(None, typed, x).ratio() for x in (name, *name.split("_")))
                return max(whole, 0.95 * max(parts))

            near = max(known, key=likeness)
            advice = f", did you mean {near}?" if likeness(near) > 0.5 else "; --help lists them all"
            raise UserError(f"unknown flag {unknown[0]}{advice}")
        signal.signal(signal.SIGINT, stop_quietly)  # the imports that follow take seconds, and a model minutes
        return args

    def given(self):
        """The flags on the command line, as typed."""
        return [word.split("=")[0] for word in self.words if word.startswith("--")]

    def peek(self, flag):
        """The value of one flag on the command line, unchecked; None where it is absent."""
        words = [part for word in self.words for part in word.split("=", 1)]
        return next((value for name, value in reversed([*zip(words, words[1:])]) if name == flag), None)

    def resumed(self, args, may_change):
        """The flags of the run that --resume names, with those on the command line that may change."""
        given = {word: word.removeprefix("--").removeprefix("no-") for word in self.given()}
        fixed = [word for word, name in given.items() if name not in (*may_change, "resume")]
        if fixed:
            raise UserError(f"--resume continues a run with its own flags, so {' '.join(fixed)} cannot be given; "
                            f"only --{', --'.join(may_change)} may change")
        run = vars(Run(args.resume).args)
        for action in self._actions:
            value, default = run.get(action.dest, action.default), action.default
            kind = action.type if action.type in (int, float) else str if default is None else type(default)
            fits = default is None if value is None else isinstance(value, (int, float) if kind is float else kind)
            if action.dest in run and (not fits or action.choices and value not in action.choices):
                raise UserError(f"{args.resume}/args.json is damaged: {action.dest} is {value!r}")
        changed = {name: getattr(args, name) for name in given.values()}
        return argparse.Namespace(**vars(args) | run | changed)

    def error(self, message):
        raise UserError(message)


class Formatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):  # a default that depends on another flag stands in the help string itself
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return re.sub(r" \(default: .*\)", "", action.help) + " (default: %(default)s)"


def stop_quietly(number, frame):
    """Ctrl-C before anything can be lost: one line, status 130."""
    print("\nstopped", file=sys.stderr)
    raise SystemExit(128 + number)


# -----------------------------------------------------------------------------
# files of a run

def read_json(file):
    """The object in a JSON file; {} where there is no such file."""
    try:
        return dict(json.loads(pathlib.Path(file).read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as a JSON object ({error})") from None


def read_lines(file):
    """The records of a .jsonl file; [] where there is none. A torn last line is dropped."""
    try:
        lines = pathlib.Path(file).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{file}:{number} is not a record of a run; repair or remove that line") from None
    return records


class Run:
    """A run's folder: its flags at once, its other files when they are asked for."""

    def __init__(self, folder):
        self.folder, self.name = pathlib.Path(folder), escaped(pathlib.Path(folder).resolve().name)
        self.info = read_json(self.folder / "args.json") if self.folder.is_dir() else {}
        if not isinstance(self.info.get("args"), dict) or not isinstance(self.info["args"].get("model"), str):
            raise UserError(f"{folder} is not the folder of a run: there is no args.json with its flags in it")
        if "prompt" not in self.info["args"]:
            raise UserError(f"{folder} is a run of an earlier version, which this one cannot read")
        self.args = argparse.Namespace(**self.info["args"])

    def __getattr__(self, name):
        if name in ("metrics", "rollouts", "floor", "verdicts"):
            value = read_lines(self.folder / f"{name}.jsonl")
        elif name in ("result", "mauve"):
            value = read_json(self.folder / f"{name}.json")
        else:
            raise AttributeError(name)
        setattr(self, name, value)
        return value


def json_lines(rows):
    """Dicts as lines of JSON, with null for nan and infinities, which JSON lacks."""
    rows = ({key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_whole(path, text):
    """Write to a temporary file, then rename it, so that readers never see half a file."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)


# -----------------------------------------------------------------------------
# checks of values

def check_device(name):
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name}: must be cpu, cuda, or cuda:0, cuda:1, ...")


def check_values(args, positive):
    """Refuse values that no training script can use. positive: names of flags that must not be 0."""
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} {value}: must be a finite number")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value < 0 or value == 0 and name in positive:
                raise UserError(f"--{name} {value}: must be {'above 0' if name in positive else '0 or more'}")
            if value >= 2 ** 63:
                raise UserError(f"--{name} {value}: must be below 2 to the 63")
        if value == "":
            raise UserError(f"--{name} is empty; leave the flag out for its default")
        if isinstance(value, str) and name != "prompt" and max(map(len, value.split("/"))) > 255:
            raise UserError(f"--{name} {value[:20]}...: a name of {len(value)} characters is too long")
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
        if name and (pathlib.Path(name) / "args.json").exists():
            raise UserError(f"--{flag} {name} is the folder of a run; make a model of it with: "
                            f"python -m tools.export {name} --merge DIR")
    if args.out_dir and pathlib.Path(args.out_dir).is_file():
        raise UserError(f"--out_dir {args.out_dir} is a file; name a folder")
    if args.out_dir and not args.resume and (pathlib.Path(args.out_dir) / "args.json").exists():
        raise UserError(f"--out_dir {args.out_dir} holds a run already; "
                        f"continue it with --resume {args.out_dir}, or name another folder")


def check(args):
    """Raise an error if train.py's flags are out of range, contradictory, or without effect."""
    check_values(args, "rank alpha prefix_tokens completion_tokens batch_size num_steps d_scale d_loss_scale "
                       "grad_clip".split())
    reason = args.disc == "reason"
    for wrong, message in (
        (args.num_steps * args.batch_size < 4, f"--num_steps {args.num_steps} x --batch_size {args.batch_size}: MAUVE "
         "needs at least 4 sequences"),
        (args.g_reward == "azr" and not reason, "--g_reward azr needs the d_value of --disc reason; give both, or "
         "choose prob or neglog"),
        (args.g_reward == "neglog" and reason, "--g_reward neglog needs the probability of --disc head; with reason, "
         "choose azr or prob"),
        (args.d_loss == "pair" and reason, "--d_loss pair is for --disc head; --disc reason learns by policy gradient"),
        (args.d_loss == "pair" and args.d_shuffle, "--d_shuffle shuffles the labels of --d_loss ce; --d_loss pair has "
         "none"),
        (args.d_think_tokens is not None and not reason, "--d_think_tokens has no effect on --disc head; give --disc "
         "reason, or leave it out"),
        (args.d_model and args.adapters == "shared", f"--d_model {args.d_model}: two models cannot share an adapter; "
         "give --adapters separate"),
        (args.track != "none" and importlib.util.find_spec(args.track) is None, f"--track {args.track}: the package is "
         f"not installed; pip install {args.track}"),
        (not (args.data in ("pile", "demo") or args.data.startswith("hub:") or pathlib.Path(args.data).exists()),
         f"--data {args.data} does not exist; give pile, demo, hub:user/name, or a path"),
    ):
        if wrong:
            raise UserError(message)
