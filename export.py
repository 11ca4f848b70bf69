"""
A run's adapter merged into a plain Hugging Face model; adapters added, negated and merged as task vectors.

    python export.py out/demo-1 --merge out/merged                                 # base + the generator's adapter
    python export.py --combine out/A:1.0 out/B:-0.5 --merge out/mixed              # base + A's delta - half of B's
    python export.py --combine out/A:1 out/B:1 --method ties --merge out/ties      # TIES-Merging
    python export.py --combine out/A:1 out/B:-1 --save_adapter out/difference      # an adapter in peft's format

A path is a run's folder, or one in peft's format, as out/A/ckpt-20/discriminator is. What is written loads with
transformers (an adapter: with peft) alone: weights, tokenizer, how to sample as the run did, and a model card.

What differs from the textbook:
1. Deltas are exact, in fp32, added to the weights as they are stored and rounded once: see deltas.py.
2. A quantised run is merged into the weights before quantisation, which are not quite those that it was trained on.
3. One layer at a time: beside the model and the adapters there is never more than one delta of each in fp32.

Letters: R rank, I inputs and O outputs of a layer.
"""
import math
import os
import pathlib
import shutil
from functools import partial

from adapters import find, read_layers, weighed
from flags import Parser, UserError

SHARD = "5GB"  # most of one file of weights


# -----------------------------------------------------------------------------
# flags and the adapters they name, before torch is imported

def read_flags():
    """The flags, and a Source for each adapter they name."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", default=None, help="folder of a run, out/NAME, or of an adapter in peft's format")
    add("--combine", nargs="+", default=[], metavar="PATH:WEIGHT", help="several in its place; weights may be negative")
    add("--method", choices=["sum", "ties"], default="sum", help="weighted sum, or TIES-Merging")
    add("--density", type=float, default=0.2, help="share of each adapter's changes that ties keeps (1: all)")
    add("--adapter", choices=["generator", "discriminator", "shared"], default=None,
        help="which of a run's adapters (unset: the one that generates)")
    add("--merge", default=None, help="folder for the merged model")
    add("--save_adapter", default=None, help="folder for an adapter in peft's format in its place; of --method sum")
    add("--model", default=None, help="base model (unset: the adapters' own, on which they must agree)")
    add("--dtype", choices=["bf16", "fp16", "fp32"], default=None, help="of what is merged (unset: the run's --dtype)")
    args = parser.parse_args()
    if bool(args.run) == bool(args.combine):
        raise UserError("give one run, as in: python export.py out/demo-1 --merge DIR, or several with --combine")
    if bool(args.merge) == bool(args.save_adapter):
        raise UserError("give one of --merge DIR, for a whole model, and --save_adapter DIR, for an adapter")
    if not 0 < args.density <= 1:
        raise UserError(f"--density {args.density}: must be above 0 and at most 1")
    if "--density" in parser.given() and args.method != "ties":
        raise UserError("--density is of --method ties; a sum keeps everything")
    if args.save_adapter and args.method == "ties":
        raise UserError("--save_adapter: what --method ties makes has full rank and fits no adapter; use --merge")
    if args.save_adapter and args.dtype:
        raise UserError("--dtype is of --merge; an adapter is written in fp32")
    check_target(*("--merge", args.merge) if args.merge else ("--save_adapter", args.save_adapter))
    named = [weighed(word) for word in args.combine] or [(args.run, 1.0)]
    sources = [find(path, weight, args.adapter, args.model) for path, weight in named]
    dtypes = sorted({source.run["dtype"] for source in sources if source.run})
    if args.merge and len(dtypes) > 1 and not args.dtype:
        raise UserError(f"--dtype: these runs were trained in {' and '.join(dtypes)}; name one")
    args.dtype = args.dtype or next(iter(dtypes), None)
    return args, sources


def check_target(flag, target):
    """Refuse a folder that holds something or cannot be made."""
    target = pathlib.Path(target).resolve()
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{flag} {target} is not empty; name a new folder, or one that is")
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise UserError(f"{flag} {target}: {above} is no folder that can be written to")
    except OSError as error:
        raise UserError(f"{flag} {target} cannot be used: {error}") from None


if __name__ == "__main__":
    args, sources = read_flags()

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoConfig, GenerationConfig
from transformers.pytorch_utils import Conv1D

from card import card
from checkpoint import first_line, sync
from deltas import combine, delta, stacked, ties, trim_floor
from model import DTYPES, EMBEDDED, load_model
from rollout import rules

from peft import LoraConfig  # after model, which quietens bitsandbytes


# -----------------------------------------------------------------------------
# the base model

def place(name):
    """What two names of one base model have in common: its folder, embedded or not, or its hub id."""
    name = EMBEDDED.get(name, name)
    return str(pathlib.Path(name).resolve()) if os.path.isdir(name) else name


def label(base):
    """A base model's name without its folders, and whether it is the name that others know it by."""
    ours = next((name for name in EMBEDDED if place(name) == place(base)), None)
    return (ours, True) if ours else (pathlib.Path(base).name, False) if os.path.isdir(base) else (base, True)


def check_agreement(sources, adapters):
    """Refuse adapters of different base models."""
    shapes = {}
    for source, layers in zip(sources, adapters):
        if place(source.base) != place(sources[0].base):
            raise UserError(f"{sources[0].path} stands on {sources[0].base} and {source.path} on {source.base}; to be "
                            "combined they need one base (if it is one, name it with --model)")
        for name, layer in layers.items():
            shape = len(layer.B), layer.A.shape[1]
            if shapes.setdefault(name, shape) != shape:
                raise UserError(f"{source.path}: {name} is {shape} and in those before {shapes[name]}; adapters to be "
                                "combined need one base")


def load_base(name):
    """The base model, not quantised, in the type it is stored in; its tokenizer; and that type."""
    try:
        config = AutoConfig.from_pretrained(EMBEDDED.get(name, name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name} could not be loaded: {first_line(error)}") from None
    if getattr(config, "quantization_config", None):
        raise UserError(f"--model {name} is stored quantised; name the model it was made from")
    stored = next((short for short, dtype in DTYPES.items() if dtype == config.get_text_config().dtype), "fp32")
    return *load_model(name, "none", stored, "cpu"), stored


def sampling(model, tokenizer, sources):
    """A generation_config that samples as the runs did; the base's own where there is no run, or they differ."""
    temperatures = {source.run.get("temperature", 1.0) for source in sources if source.run}  # sft.py has none: 1
    temperature = temperatures.pop() if len(temperatures) == 1 else None
    if not isinstance(temperature, (int, float)):
        return model.generation_config
    rule, how = rules(tokenizer, model), dict(do_sample=False)
    if temperature:
        how = dict(do_sample=True, temperature=float(temperature), top_k=0, top_p=1.0)
    return GenerationConfig(eos_token_id=rule.stop.tolist(), pad_token_id=rule.pad,
                            bos_token_id=model.generation_config.bos_token_id, **how)


# -----------------------------------------------------------------------------
# merging and writing

def changes(adapters, weights, method, density):
    """Yield (module's name, delta (O, I)) of the combination, for each module that any of the adapters changes."""
    def blocks(layers):
        return (delta(*layer) for layer in layers.values())  # (O, I) each

    floors = [trim_floor(partial(blocks, layers), density) for layers in adapters] if method == "ties" else []
    for name in tqdm(sorted(set().union(*adapters)), desc="merging", disable=None):
        have = [i for i, layers in enumerate(adapters) if name in layers]
        deltas, chosen = [delta(*adapters[i][name]) for i in have], [weights[i] for i in have]  # (O, I) each
        yield name, ties(deltas, chosen, [floors[i] for i in have]) if floors else combine(deltas, chosen)


def merge(model, name, changed, dtype):
    """Add what `changes` yields to the weights of model `name` and cast all of them to dtype.

    Returns the norm of what was added over that of the weights it was added to.
    """
    modules, embedding = dict(model.named_modules()), model.get_input_embeddings().weight
    added = total = 0.0
    for key, change in changed:
        module = modules.get(key)
        if not isinstance(module, (torch.nn.Linear, Conv1D)) or module.weight is embedding:
            raise UserError(f"--model {name} has no linear layer {key} of its own; the adapter belongs to another base")
        change = change.T if isinstance(module, Conv1D) else change  # (O, I), or as the weight lies
        if change.shape != module.weight.shape:
            raise UserError(f"--model {name}: {key} is {tuple(module.weight.shape)} and the adapter's is "
                            f"{tuple(change.shape)}; it belongs to another base")
        weight = module.weight.data.float()  # (O, I)
        added, total = added + change.norm().item() ** 2, total + weight.norm().item() ** 2
        module.weight.data = (weight + change).to(dtype)  # (O, I)
        if not module.weight.isfinite().all():
            raise UserError(f"{key} is not finite after merging; choose smaller weights, or --dtype fp32")
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return math.sqrt(added / total) if total else 0.0


def write_adapter(folder, base, adapters, weights):
    """The weighted sum of adapters as one adapter in peft's format."""
    ranks = [max(layer.rank for layer in layers.values()) for layers in adapters]
    names, R, tensors = sorted(set().union(*adapters)), sum(ranks), {}
    for name in names:
        A, B = stacked([layers.get(name) for layers in adapters], weights, ranks)  # (R, I), (O, R)
        tensors |= {f"base_model.model.{name}.lora_A.weight": A, f"base_model.model.{name}.lora_B.weight": B}
    # alpha is the rank's root, so the scale is 1: what it was before is in B
    LoraConfig(r=R, lora_alpha=math.sqrt(R), use_rslora=True, target_modules=names, task_type="CAUSAL_LM",
               base_model_name_or_path=place(base), inference_mode=True).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write(flag, target, text, fill):
    """README.md with the text and what fill(folder) writes, beside the target, then renamed: never there by half."""
    new = target.with_name(target.name + ".new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    except OSError as error:
        raise UserError(f"{flag} {target}: {new} cannot be made: {error}; if an export was killed, remove it") from None
    try:
        (new / "README.md").write_text(text, encoding="utf-8")
        fill(new)
        mode = (new / "README.md").stat().st_mode
        for file in (path for path in new.rglob("*") if path.is_file()):
            file.chmod(mode)  # safetensors' own lets nobody else read
            sync(file)
        sync(new)
        new.rename(target)
        sync(target.parent)
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: an odd generation_config of the base
        raise UserError(f"{flag} {target} could not be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main(args, sources):
    adapters, weights, base = [read_layers(s) for s in sources], [s.weight for s in sources], sources[0].base
    check_agreement(sources, adapters)
    target = pathlib.Path(args.merge or args.save_adapter).resolve()
    told = f"{label(base)[0]} " + " ".join(f"{s.weight:+g} x {s.path}" for s in sources)
    text = card(target.name, sources, *label(base), args.method, args.density, merged=bool(args.merge))
    if args.save_adapter:
        write("--save_adapter", target, text, lambda folder: write_adapter(folder, base, adapters, weights))
        print(f"{target}: {told}, as one adapter")
        return
    quantised = [s.path for s in sources if s.run.get("quant", "none") != "none"]
    if quantised:
        print(f"note: {', '.join(quantised)}: trained on quantised weights, merged into the unquantised ones, which "
              "differ from them")
    model, tokenizer, stored = load_base(base)
    dtype = args.dtype or stored
    moved = merge(model, base, changes(adapters, weights, args.method, args.density), DTYPES[dtype])
    model.generation_config = sampling(model, tokenizer, sources)

    def fill(folder):
        model.save_pretrained(folder, max_shard_size=SHARD)
        tokenizer.save_pretrained(folder)

    write("--merge", target, text, fill)
    print(f"{target}: {told}, {args.method} in {dtype}; the weights moved by {moved:.3f} of their norm")


if __name__ == "__main__":
    main(args, sources)
