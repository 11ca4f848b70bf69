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
import shlex
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
            longer = ("; --num_steps is part of a run, whose learning rate decays over it; to go on from its weights, "
                      f"start a new run: {export_command(args.resume)}, then train.py --model DIR")
            raise UserError(f"--resume continues a run with its own flags, so {' '.join(fixed)} cannot be given; "
                            f"only --{', --'.join(may_change)} may change{longer * ('--num_steps' in fixed)}")
        run = run_flags(args.resume, vars(Run(args.resume).args), self, every_choice=True)
        return argparse.Namespace(**run | {name: getattr(args, name) for name in given.values()})

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

KNOWN = {  # keys that our scripts read, and what each must be; those with "?" may be missing or null
    "rollouts": "step:count prefix:text sep:text truth:words completion:text think:text? think_closed:bool? "
                "reward:number? p_real:number? length_score:number? n_think:count? n_completion:count?",
    "metrics": "step:count " + " ".join(f"{key}:number?" for key in (
        "reward p_real length_score baseline advantage_sd g_loss g_grad_norm kl entropy logp_gap coherence d_loss "
        "d_acc_real d_acc_generated d_grad_norm g_lr d_lr think_closed num_think num_completion distinct_2 skipped "
        "seconds sample_seconds update_seconds tokens_per_second memory_gb d_value d_brier d_parsed d_num_think "
        "d_think_empty d_acc_immediate loss held").split()),
    "verdicts": "step:count text:text verdict:text? d_value:share",
    "traces": "prefix:text sep:text truth:text think:text closed:bool run:text",
    "args": "args:object device:text? command:list? versions:object? commit:text?",
    "result": "mauve:number num_steps:count? " + " ".join(
        f"{name}:number? {name}_sd:number? {name}_interval:interval?" for name in
        "mauve floor ceiling mauve_last2000 fresh fresh_ceiling".split()),
    "mauve": "curve:curve?", "point": "step:count mauve:number interval:interval?",
}
KNOWN |= {"floor": KNOWN["rollouts"], "fresh": KNOWN["rollouts"] + " other_truth:words"}
KINDS = {
    "text": lambda x: isinstance(x, str) and not re.search("[\ud800-\udfff]", x),
    "words": lambda x: KINDS["text"](x) and x != "",
    "bool": lambda x: isinstance(x, bool),
    "count": lambda x: type(x) is int and 0 <= x < 2 ** 53,
    "number": lambda x: type(x) in (int, float) and abs(x) < 1e300,
    "share": lambda x: type(x) in (int, float) and 0 <= x <= 1,
    "interval": lambda x: isinstance(x, list) and len(x) == 2 and all(map(KINDS["number"], x)),
    "curve": lambda x: isinstance(x, list) and not any(flaw("point", point) for point in x),
    "list": lambda x: isinstance(x, list),
    "object": lambda x: isinstance(x, dict),
}


def flaw(known, record):
    """What is wrong with the first key of a record that is not as KNOWN has it; None where all are."""
    if not isinstance(record, dict):
        return "it is not a record"
    for key, kind in (words.split(":") for words in KNOWN.get(known, "").split()):
        value = record.get(key)
        if not (value is None and kind.endswith("?") or KINDS[kind.rstrip("?")](value)):
            return f"{key} is {repr(value)[:60]}, not a {kind.rstrip('?')}" if key in record else f"it has no {key}"


def parsed(text):
    """JSON as Python; nan and infinities, which JSON lacks, are null."""
    return json.loads(text, parse_constant=lambda name: None)


def read_json(file):
    """The object in a JSON file; {} where there is no such file."""
    file = pathlib.Path(file)
    try:
        found = parsed(file.read_bytes())
        if wrong := flaw(file.stem, found):
            raise ValueError(wrong)
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        advice = "restore that file" if file.stem == "args" else "measure the run again with evaluate.py"
        raise UserError(f"{file} cannot be used ({error}); {advice}") from None


def read_lines(file, known=None):
    """The records of a .jsonl file; [] where there is none. A torn last line is dropped.

    known: key of KNOWN that says what they hold (default: the file's name).
    """
    file = pathlib.Path(file)
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parsed(line)
            wrong = flaw(known or file.stem, record)
        except (ValueError, RecursionError):
            wrong = "it is not JSON"
        if wrong:
            raise UserError(f"{file}:{number} is not a record of {known or 'a run'}: {wrong}; repair or remove it")
        records.append(record)
    return records


class Run:
    """A run's folder: its flags at once, its other files when they are asked for."""

    def __init__(self, folder):
        from train import flags  # here, because train.py begins with an import of this file
        self.folder, self.name = pathlib.Path(folder), escaped(pathlib.Path(folder).resolve().name)
        self.info = read_json(self.folder / "args.json") if self.folder.is_dir() else {}
        if not isinstance(self.info.get("args", {}).get("model"), str):
            raise UserError(f"{folder} is not the folder of a run: there is no args.json with its flags in it")
        if "prompt" not in self.info["args"]:
            raise UserError(f"{folder} is a run of an earlier version, which this one cannot read")
        self.args = argparse.Namespace(**run_flags(folder, self.info["args"], flags([])))

    def __getattr__(self, name):
        if name in ("metrics", "rollouts", "floor", "verdicts"):
            value = read_lines(self.folder / f"{name}.jsonl")
        elif name in ("result", "mauve"):
            value = read_json(self.folder / f"{name}.json")
        else:
            raise AttributeError(name)
        setattr(self, name, value)
        return value

    def unfinished(self):
        """" after k of n steps" where the result is that of a run that had not come to its end, else ""."""
        k, n = self.result.get("num_steps"), self.args.num_steps
        return "" if k in (None, n) else f" after {k} of {n} steps"


def run_flags(folder, found, parser, every_choice=False):
    """The flags found in args.json, checked, with the parser's defaults for those that it lacks.

    every_choice: refuse a choice that the parser lacks; a copy of train.py under another name may have added it.
    """
    flags = {action.dest: action for action in parser._actions if action.dest != "help"}
    for name, action in flags.items():
        value, default = found.get(name, action.default), action.default
        kind = action.type if action.type in (int, float) else str if default is None else type(default)
        kind = bool if isinstance(action, argparse.BooleanOptionalAction) else kind
        fits = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if kind is str:
            fits = KINDS["text"](value)
        if value is None:
            fits = default is None and (name not in found or name not in ("prefix_tokens", "reasoning_tokens", "merge"))
        if name == "prompt" and name in found:
            fits = fits and value.count("{text}") == 1
        if fits and action.choices and (every_choice or name in ("quant", "dtype", "adapters")):
            fits = value in action.choices
        if not fits:
            raise UserError(f"{folder}/args.json is damaged: {name} is {value!r}; restore that file")
    run = {name: action.default for name, action in flags.items()} | found
    check_numbers(run, "rank alpha completion_tokens batch_size num_steps".split(), f"{folder}/args.json: ")
    return run


def export_command(run):
    """The command that makes a model of a run."""
    return f"python -m tools.export {shlex.quote(str(run))} --merge DIR"


def resume_command(out_dir):
    """The command that continues a run, by the script that made it: train.py, a copy of it, or tools.sft."""
    command = (read_json(pathlib.Path(out_dir) / "args.json") or {"command": sys.argv}).get("command") or ["train.py"]
    script = pathlib.Path(str(command[0])).name
    script = "-m tools.sft" if script == "sft.py" else shlex.quote(script)
    return f"python {script} --resume {shlex.quote(str(out_dir))}"


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


def check_numbers(values, positive, where=""):
    """Refuse numbers that no flag can have. positive: names of flags that must not be 0."""
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}--{name} {value}: must be a finite number")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if value < 0 or value == 0 and name in positive:
                raise UserError(f"{where}--{name} {value}: must be {'above 0' if name in positive else '0 or more'}")
            if value >= 2 ** 63:
                raise UserError(f"{where}--{name} {value}: must be below 2 to the 63")


def check_values(args, positive):
    """Refuse values that no training script can use. positive: names of flags that must not be 0."""
    check_numbers(vars(args), positive)
    for name, value in vars(args).items():
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
    for flag in ("model", "d_model", "featurizer"):
        name, own = getattr(args, flag, None) or "", "base" if flag == "featurizer" else "demo"
        folder = pathlib.Path(name)
        if name.startswith((".", "/", "~")) and not folder.is_dir():
            raise UserError(f"--{flag} {name}: there is no such folder; give a folder, a hub id, or {own}")
        if name and any((folder / file).exists() for file in ("args.json", "adapter_config.json", "state.pt")):
            for run in (folder, *folder.parents)[:3]:  # the folder may be a run's checkpoint, or an adapter in it
                if (run / "args.json").exists():
                    raise UserError(f"--{flag} {name} is a run, or part of one; make a model of it with: "
                                    f"{export_command(run)}")
    if args.out_dir and pathlib.Path(args.out_dir).is_file():
        raise UserError(f"--out_dir {args.out_dir} is a file; name a folder")
    if args.out_dir and not args.resume and (pathlib.Path(args.out_dir) / "args.json").exists():
        raise UserError(f"--out_dir {args.out_dir} holds a run already; continue it with "
                        f"--resume {shlex.quote(args.out_dir)}, or name another folder")


def check(args, given=()):
    """Raise an error if train.py's flags are out of range, contradictory, or without effect. given: those that were
    typed, because a default without effect is no mistake.
    """
    check_values(args, "rank alpha prefix_tokens completion_tokens batch_size num_steps d_scale d_loss_scale "
                       "grad_clip".split())
    reason, typed = args.disc == "reason", {flag.removeprefix("--") for flag in given}
    for wrong, message in (
        (args.num_steps * args.batch_size < 4, f"--num_steps {args.num_steps} x --batch_size {args.batch_size}: MAUVE "
         "needs at least 4 sequences"),
        (args.g_reward == "azr" and not reason, "--g_reward azr needs the d_value of --disc reason; give both, or "
         "choose prob or neglog"),
        (args.g_reward == "neglog" and reason, "--g_reward neglog needs the probability of --disc head; with reason, "
         "choose azr or prob"),
        (reason and (args.d_loss == "pair" or typed & {"d_loss", "d_pool"}), "--d_loss and --d_pool are for --disc "
         "head; --disc reason learns by policy gradient; leave them out"),
        (args.d_loss == "pair" and args.d_shuffle, "--d_shuffle shuffles the labels of --d_loss ce; --d_loss pair has "
         "none"),
        (not reason and (args.d_think_tokens is not None or "d_kl_coef" in typed), "--d_think_tokens and --d_kl_coef "
         "are for --disc reason; give it, or leave them out"),
        ("d_scale" in typed and args.adv_norm, "--d_scale has no effect with --adv_norm, which divides it out; add "
         "--no-adv_norm"),
        ("d_warmup" in typed and args.d_warmup and not args.d_lr, f"--d_warmup {args.d_warmup} has no effect with "
         "--d_lr 0; give --d_lr, or leave it out"),
        ("text_field" in typed and (args.data == "demo" or args.data.endswith((".txt", ".md"))), "--text_field has no "
         f"effect on --data {args.data}, which has no fields; leave it out"),
        (args.d_model and args.adapters == "shared", f"--d_model {args.d_model}: two models cannot share an adapter; "
         "give --adapters separate"),
        (args.track != "none" and importlib.util.find_spec(args.track) is None, f"--track {args.track}: the package is "
         f"not installed; pip install {args.track}"),
        (not (args.data in ("pile", "demo") or args.data.startswith("hub:") or pathlib.Path(args.data).exists()),
         f"--data {args.data} does not exist; give pile, demo, hub:user/name, or a path"),
    ):
        if wrong:
            raise UserError(message)
