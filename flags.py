"""
Flags with one-line errors, checks of their values, and the reader of a run's folder. Imports nothing heavy, so that a
wrong flag or a wrong folder fails before torch has loaded.
"""
import argparse
import difflib
import hashlib
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
RANK = int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0  # this process's number under torchrun
POSITIVE = "rank alpha prefix_tokens completion_tokens batch_size num_steps d_scale d_loss_scale grad_clip".split()


class UserError(SystemExit):
    """A user's mistake: one line on standard error that says what was given, what is allowed, which flag to change.

    Of several processes the first one prints it; the others do where it is their own failure.
    """

    def __init__(self, message, status=2, own=False):
        super().__init__(status)
        self.message = escaped(" ".join(str(message).split()))
        if RANK == 0 or own:
            print(f"error: {f'process {RANK}: ' * (RANK > 0)}{self.message}", file=sys.stderr)


def escaped(text):
    """Text with its unprintable characters escaped: it cannot move a terminal's cursor or change its colours."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def readable(text):
    """Text with its unprintable characters escaped, except for line ends and tabs."""
    return re.sub(r"[^\n\t]+", lambda part: escaped(part[0]), text)


def first_line(error):
    """An exception's message in one line, or its type where there is none."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


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
            names = {flag.lstrip("-"): flag for flag in self._option_string_actions}
            parts = {part: flag for name, flag in names.items() for part in name.split("_")}  # --stepz: --num_steps
            typed = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
            near = difflib.get_close_matches(typed, names, 1, 0.6) or difflib.get_close_matches(typed, parts, 1, 0.5)
            advice = f", did you mean {(parts | names)[near[0]]}?" if near else "; --help lists them all"
            raise UserError(f"unknown flag {unknown[0]}{advice}")
        signal.signal(signal.SIGINT, stop_quietly)  # the imports that follow take seconds, and a model minutes
        return args

    def given(self):
        """The flags on the command line: {as typed: name}, such as {"--no-merge": "merge"}."""
        typed = (word.split("=")[0] for word in self.words if word.startswith("--"))
        return {flag: flag.removeprefix("--").removeprefix("no-") for flag in typed}

    def peek(self, flag):
        """The value of one flag on the command line, unchecked; None where it is absent."""
        words = [part for word in self.words for part in word.split("=", 1)]
        return dict(zip(words, words[1:])).get(flag)

    def resumed(self, args, may_change):
        """The flags of the run that --resume names, with those on the command line that may change."""
        given = self.given()
        fixed = [flag for flag, name in given.items() if name not in (*may_change, "resume")]
        if fixed:
            longer = ("; the learning rate decays over --num_steps, so to go on from the weights of a run, start a new "
                      f"one: {export_command(args.resume)}, then train.py --model DIR") * ("--num_steps" in fixed)
            raise UserError(f"--resume continues a run with its own flags, so {' '.join(fixed)} cannot be given; "
                            f"only --{', --'.join(may_change)} may change{longer}")
        typed = {name: getattr(args, name) for name in given.values()}
        return argparse.Namespace(**vars(Run(args.resume, self).args) | typed)

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

# keys that our scripts compute with, and what each must be; those with "?" may be missing or null
KNOWN = {
    "rollouts": "step:count prefix:text sep:text truth:words completion:text think:text? think_closed:bool? "
                "reward:number? p_real:number? length_score:number? n_think:count? n_completion:count?",
    "metrics": "step:count kl:number? seconds:number? reward:number? p_real:number? length_score:number? "
               "d_acc_real:number? d_acc_generated:number? coherence:number?",  # plot.py leaves out what is no number
    "verdicts": "step:count text:text verdict:text? d_value:share",
    "traces": "prefix:text sep:text truth:text think:text closed:bool run:text",
    "args": "args:object device:text? command:list? versions:object? commit:text?",
    "result": "mauve:number num_steps:count? " + " ".join(
        f"{name}:number? {name}_sd:number? {name}_interval:interval?" for name in
        "mauve floor ceiling mauve_last2000 fresh fresh_floor fresh_ceiling".split()),
    "mauve": "curve:curve? texts:object?", "point": "step:count mauve:number interval:interval?",
}
KNOWN |= {"floor": KNOWN["rollouts"], "fresh": KNOWN["rollouts"] + " other_truth:words base_completion:text" + "".join(
    f" {key}:number?" for key in ("nats", "nats_thinking", "nats_base", "nats_base_thinking"))}
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
    """What is wrong with a record: its first key that is not as KNOWN says. None where all are."""
    if not isinstance(record, dict):
        return "it is not a record"
    for key, kind in (words.split(":") for words in KNOWN.get(known, "").split()):
        value = record.get(key)
        if not (value is None and kind.endswith("?") or KINDS[kind.rstrip("?")](value)):
            return f"{key} is no valid {kind.rstrip('?')}: {repr(value)[:60]}" if key in record else f"{key} is missing"


def parsed(text, known):
    """A record from JSON, checked; nan and infinities, which JSON lacks, are null."""
    record = json.loads(text, parse_constant=lambda name: None)
    if wrong := flaw(known, record):
        raise ValueError(wrong)
    return record


def read_json(file):
    """The object in a JSON file; {} where there is no such file."""
    file = pathlib.Path(file)
    try:
        return parsed(file.read_bytes(), file.stem)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        advice = "restore that file" if file.stem in ("args", "digests") else "measure the run again with evaluate.py"
        raise UserError(f"{file} cannot be used ({error}); {advice}") from None


def read_lines(file, known=None):
    """The records of a .jsonl file; [] where there is none. A torn last line is dropped.

    known: key of KNOWN that says what they hold (default: the file's name).
    """
    file, records = pathlib.Path(file), []
    try:
        for line in file.read_bytes().split(b"\n")[:-1]:
            records.append(parsed(line, known or file.stem))
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        where = f"{file}:{len(records) + 1}"
        raise UserError(f"{where} is not a record of {known or 'a run'} ({error}); repair or remove it") from None
    return records


def digest(flags):
    return hashlib.blake2b(json.dumps(flags, sort_keys=True).encode(), digest_size=8).hexdigest()


class Run:
    """A run's folder: its flags at once, its other files when they are asked for.

    parser: that of the script that continues the run (default: train.py's).
    """

    def __init__(self, folder, parser=None):
        from train import flags  # here, because train.py begins with an import of this file
        self.folder, self.name = pathlib.Path(folder), escaped(pathlib.Path(folder).resolve().name)
        self.info = read_json(self.folder / "args.json") if self.folder.is_dir() else {}
        found, known = self.info.get("args", {}), parser or flags([])
        if not isinstance(found.get("model"), str):
            raise UserError(f"{folder} is not the folder of a run: there is no args.json with its flags in it")
        if "prompt" not in found:
            raise UserError(f"{folder} is a run of an earlier version, which this one cannot read")
        check_numbers(found, POSITIVE, f"{folder}/args.json: ")
        if self.info.get("digest", digest(found)) != digest(found):
            raise UserError(f"{folder}/args.json was edited; a run keeps the flags that it began with; restore it")
        self.args = argparse.Namespace(**vars(known.parse_known_args([])[0]) | found)

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
        """" after k of n steps" where an unfinished run was measured, else ""."""
        k, n = self.result.get("num_steps"), self.args.num_steps
        return "" if k in (None, n) else f" after {k} of {n} steps"


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
        if type(value) in (int, float) and not (0 <= value < 2 ** 53 and (value > 0 or name not in positive)):
            least = "above 0" if name in positive else "0 or more"
            raise UserError(f"{where}--{name} {value}: must be {least}, and below 2 to the 53")


def check_temperature(value):
    if value and not 0.01 <= value <= 100:
        raise UserError(f"--temperature {value}: must be from 0.01 to 100, or 0, which is greedy")


def check_values(args, positive):
    """Refuse values that no training script can use. positive: names of flags that must not be 0."""
    check_numbers(vars(args), positive)
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"--{name} is empty; leave the flag out for its default")
        if isinstance(value, str) and name != "prompt" and max(map(len, value.split("/"))) > 255:
            raise UserError(f"--{name} {value[:20]}...: a name of {len(value)} characters is too long")
    for name in ("beta1", "beta2", "ema_decay", "mix", "held_out", "g_lr", "d_lr"):
        if getattr(args, name, 0) >= (limit := 100 if name.endswith("lr") else 1):
            raise UserError(f"--{name} {getattr(args, name)}: must be below {limit}")
    check_device(args.device)
    check_temperature(getattr(args, "temperature", 1.0))
    for flag in ("model", "d_model", "featurizer"):
        folder = pathlib.Path(name := getattr(args, flag, None) or "")
        if name.startswith((".", "/", "~")) and not folder.is_dir():
            raise UserError(f"--{flag} {name}: there is no such folder; give a folder or a hub id")
        if name and any((folder / file).exists() for file in ("args.json", "adapter_config.json", "state.pt")):
            for run in (folder, *folder.parents)[:3]:  # the folder may be a run's checkpoint, or an adapter in it
                if (run / "args.json").exists():
                    raise UserError(f"--{flag} {name} is a run, or part of one; make a model of it with: "
                                    f"{export_command(run)}")
    out_dir = pathlib.Path(args.out_dir or "")
    if out_dir.is_file() or out_dir.is_symlink() and not out_dir.exists():
        raise UserError(f"--out_dir {out_dir} is a file, or a link to nothing; name a folder")
    if args.out_dir and not args.resume and (out_dir / "args.json").exists():
        raise UserError(f"--out_dir {out_dir} holds a run already; name another folder, or continue it with: "
                        f"{resume_command(out_dir)}")


def check(args, given={}):
    """Refuse train.py's flags where they are out of range, contradictory, or without effect.

    given: Parser.given(); a flag without effect is a mistake only where it was typed.
    """
    check_values(args, POSITIVE)
    reason, typed, data = args.disc == "reason", {flag.removeprefix("--") for flag in given}, args.data
    served = args.sampler != "none"
    for wrong, message in (
        (args.num_steps * args.batch_size < 4 and args.seeds,
         f"--num_steps {args.num_steps} x --batch_size {args.batch_size}: MAUVE needs at least 4 sequences"),
        (0 < args.floor_sequences < 4, f"--floor_sequences {args.floor_sequences}: must be 0, or 4 and more"),
        (args.g_reward == "azr" and not reason, "--g_reward azr needs --disc reason; or choose prob or neglog"),
        (args.g_reward == "neglog" and reason, "--g_reward neglog needs --disc head; with reason, choose azr or prob"),
        (reason and (args.d_loss == "pair" or typed & {"d_loss", "d_pool"}),
         "--d_loss and --d_pool are for --disc head; --disc reason learns by policy gradient; leave them out"),
        (args.d_loss == "pair" and args.d_shuffle, "--d_shuffle shuffles labels, and --d_loss pair has none; use ce"),
        (not reason and (args.d_think_tokens is not None or "d_kl_coef" in typed),
         "--d_think_tokens and --d_kl_coef are for --disc reason; give it, or leave them out"),
        ("d_scale" in typed and args.adv_norm,
         "--d_scale has no effect with --adv_norm, which divides it out; add --no-adv_norm"),
        ("d_warmup" in typed and args.d_warmup and not args.d_lr,
         f"--d_warmup {args.d_warmup} has no effect with --d_lr 0; give --d_lr, or leave it out"),
        (args.d_shuffle and not args.d_lr, "--d_shuffle has no effect with --d_lr 0; give --d_lr, or leave it out"),
        ("text_field" in typed and (data == "demo" or data.endswith((".txt", ".md"))),
         f"--text_field has no effect on --data {data}, which has no fields; leave it out"),
        (args.d_model and args.adapters == "shared",
         f"--d_model {args.d_model}: two models cannot share an adapter; give --adapters separate"),
        (served and not args.sampler.startswith(("http://", "https://")),
         f"--sampler {args.sampler}: must be none, or the URL of a vLLM server, such as http://127.0.0.1:8000"),
        (served and args.temperature > 2, f"--temperature {args.temperature}: a vLLM server allows at most 2"),
        (served and not args.d_model and "merge" in given.values(), "--merge has no effect with --sampler; drop it"),
        (args.track != "none" and importlib.util.find_spec(args.track) is None,
         f"--track {args.track}: the package is not installed; pip install {args.track}"),
        (not (data in ("pile", "demo") or data.startswith("hub:") or pathlib.Path(data).exists()),
         f"--data {data} does not exist; give pile, demo, hub:user/name, or a path"),
    ):
        if wrong:
            raise UserError(message)
