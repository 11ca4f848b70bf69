"""
Adapters on disk: which one a path names, what is known of the run that it belongs to, and its weights.
Torch is imported only to read weights, so that a wrong path is told at once.

Letters: R rank, I inputs and O outputs of a layer.
"""
import json
import math
import pathlib
import re
from typing import NamedTuple

from flags import UserError

# of peft's settings, those by which a delta is more than B @ A, or the base no longer the base
UNKNOWN = """alpha_pattern alora_invocation_tokens arrow_config kasa_config layer_replication lora_bias
    target_parameters trainable_token_indices use_bdlora use_dora use_qalora""".split()
OTHER_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")  # of init_lora_weights


class Source(NamedTuple):
    """An adapter, of a run or by itself."""
    path: str             # as given
    weight: float
    name: str             # the run's folder's, or the adapter's
    role: str             # generator, discriminator or shared; of an adapter by itself, its folder's name
    folder: pathlib.Path  # in peft's format
    config: dict          # its adapter_config.json
    base: str             # as --model, the run or the adapter names it
    told: dict            # the run's args.json; empty without a run, as the next two
    run: dict             # the flags in it
    result: dict          # the run's result.json


def weighed(word):
    """(path, weight) of a PATH:WEIGHT."""
    path, _, weight = word.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not math.isfinite(value):
        raise UserError(f"--combine {word}: must be PATH:WEIGHT with a finite number, as in out/demo-1:-0.5")
    return path, value


def read_json(file):
    """The object in a JSON file; empty where there is no such file."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError:
        return {}
    except (ValueError, TypeError):
        raise UserError(f"{file} is damaged: it holds no JSON object") from None


def find(path, weight, adapter, model):
    """The Source at a path."""
    folder = pathlib.Path(path)
    config = read_json(folder / "adapter_config.json")
    if config and adapter:
        raise UserError(f"--adapter {adapter}: {path} is one adapter already; leave the flag out")
    if config:
        role, inside = folder.resolve().name, folder.resolve().parent
        run_dir = inside.parent if inside.name.startswith("ckpt") else None
    else:
        run_dir = folder
        have = sorted(file.parent.name for file in folder.glob("ckpt/*/adapter_config.json"))
        role = adapter or ("shared" if "shared" in have else "generator")
        if not read_json(run_dir / "args.json"):
            raise UserError(f"{path} holds neither a run (args.json) nor an adapter (adapter_config.json)")
        if role not in have:
            raise UserError(f"--adapter {role}: the checkpoint of {path} has {' and '.join(have) or 'no adapter'}")
        folder = run_dir / "ckpt" / role
        config = read_json(folder / "adapter_config.json")
    told, result = (read_json(run_dir / name) if run_dir else {} for name in ("args.json", "result.json"))
    run = told.get("args", {})
    if told and not (isinstance(run, dict) and isinstance(run.get("model"), str)
                     and run.get("dtype") in ("bf16", "fp16", "fp32") and isinstance(told.get("versions", {}), dict)):
        raise UserError(f"{run_dir} holds no usable run: its args.json lacks a model or a dtype")
    strange = [name for name in UNKNOWN if config.get(name)]
    strange += [how for how in [str(config.get("init_lora_weights"))] if how.startswith(OTHER_BASE)]
    if config.get("peft_type") != "LORA" or not isinstance(config.get("lora_alpha"), (int, float)) or strange:
        raise UserError(f"{path} is no plain LoRA adapter: see {', '.join(strange) or 'the type'} in its "
                        "adapter_config.json")
    base = model or (role == "discriminator" and run.get("d_model")) or run.get("model")
    base = base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} does not tell its base model; name it with --model")
    name = (run_dir if told else folder).resolve().name
    return Source(path, weight, name, role, folder, config, base, told, run, result)


def read_layers(source):
    """A Layer for each module that an adapter changes, by the module's name in the base."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from deltas import Layer
    try:
        tensors = load_file(source.folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{source.path}: adapter_model.safetensors cannot be read: {error}") from None
    pattern = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
    parts = {match.groups(): tensors[key] for key in tensors if (match := pattern.fullmatch(key))}
    layers = {}
    for name in sorted({name for name, _ in parts}):
        A, B = parts.get((name, "A")), parts.get((name, "B"))  # (R, I), (O, R)
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or len(A) != B.shape[1]:
            raise UserError(f"{source.path}: the shapes of {name} are not those of a linear layer's adapter")
        if not (A.isfinite().all() and B.isfinite().all()):
            raise UserError(f"{source.path}: {name} holds values that are not finite")
        alpha = source.config["lora_alpha"]
        layers[name] = Layer(A, B, alpha if source.config.get("use_rslora") else alpha / math.sqrt(len(A)), len(A))
    if not layers or len(parts) < len(tensors):
        other = next((key for key in tensors if not pattern.fullmatch(key)), "no layer")
        raise UserError(f"{source.path} is no plain LoRA adapter: it holds {other}")
    return layers
