"""
Merge a run's adapter into a plain Hugging Face model; add, negate and combine adapters as task vectors.

    python -m tools.export out/demo-1 --merge out/merged                             # base + the generator's adapter
    python train.py --preset demo --model out/merged                                 # a new run that starts from it
    python -m tools.export --combine out/A:1 out/B:-0.5 --merge out/mixed            # base + A's change - half of B's
    python -m tools.export --combine out/A:1 out/B:1 --method ties --merge out/ties  # TIES-Merging
    python -m tools.export --combine out/A:1 out/B:-1 --save_adapter out/difference  # one adapter in peft's format

A path is a run's folder, or one of its adapters, such as out/A/ckpt/discriminator. The result loads with transformers
(an adapter: with peft) alone: weights, tokenizer, the first run's sampling settings, and a model card.

What differs from the textbook:
1) Changes are added in fp32 and rounded once. In bf16 much of a small change is lost; the last line says how much.
2) A quantised run is merged into the weights before quantisation, which differ from those it was trained on.
3) TIES (Yadav et al. 2023, arXiv 2306.01708) trims each layer by itself, as peft does, not the whole task vector.
   Weights apply before the signs are elected, so that a negative weight votes against its adapter.
4) A sum of adapters is one adapter, exactly. (peft's add_weighted_adapter scales rsLoRA wrongly, 0.21.2 included.)
"""
import collections
import html
import math
import os
import pathlib
import re
import shutil

from flags import Parser, Run, UserError, escaped, first_line, resume_command, short

# a weighted adapter: its path as given, the folder that is named after it, its flags.Run, and its base model
Source = collections.namedtuple("Source", "path weight folder run base")


def flags():
    parser = Parser(__doc__)
    adapters, target = (parser.add_mutually_exclusive_group(required=True) for _ in range(2))
    adapters.add_argument("path", nargs="?", default=None, help="folder of a run, or of one of its adapters")
    adapters.add_argument("--combine", nargs="+", metavar="PATH:WEIGHT", help="adapters; weights may be negative")
    target.add_argument("--merge", default=None, help="new folder for the merged model")
    target.add_argument("--save_adapter", default=None, help="new folder for the weighted sum as one adapter")
    add = parser.add_argument
    add("--method", choices=["sum", "ties"], default="sum", help="weighted sum, or TIES-Merging")
    add("--density", type=float, default=0.2, help="fraction of a layer's changes that --method ties keeps (1: all)")
    add("--model", default=None, help="base model (default: the runs')")
    add("--dtype", type=short, choices=["bf16", "fp16", "fp32"], default=None,
        help="dtype of the merged weights (default: that of the first run)")
    return parser


def check(args):
    """Refuse flags that do not fit together; add a Source for each adapter. Returns args."""
    target = pathlib.Path(args.merge or args.save_adapter)
    if target.is_file() or target.is_dir() and any(target.iterdir()):
        raise UserError(f"--{'merge' if args.merge else 'save_adapter'} {target} exists; give a new folder")
    if not 0 < args.density <= 1:
        raise UserError(f"--density {args.density}: must be above 0 and at most 1")
    if args.save_adapter and (args.method == "ties" or args.dtype):
        raise UserError("--save_adapter writes a sum in fp32; --dtype and --method ties, of full rank, need --merge")
    args.sources = [read_source(word, args.model) for word in args.combine or [f"{args.path}:1"]]
    bases = [source.base for source in args.sources]
    if len({*bases}) > 1:
        raise UserError(f"adapters can only be combined on one base model, not on {' and '.join(bases)}; if these are "
                        "the same, name it with --model")
    return args


def read_source(word, model):
    parts = re.fullmatch(r"(.+):([-+]?\d*\.?\d+)", word)
    if not parts:
        raise UserError(f"--combine {word}: must be PATH:WEIGHT, as in out/demo-1:-0.5")
    path, folder = parts[1], pathlib.Path(parts[1])
    if (folder / "adapter_config.json").exists():
        run = Run(folder.resolve().parents[1])
    else:
        run = Run(path)
        folder = folder / "ckpt" / ("shared" if run.args.adapters == "shared" else "generator")
    if not (folder / "adapter_model.safetensors").exists():
        raise UserError(f"{path} has no checkpoint yet; if it was stopped, continue with: {resume_command(run.folder)}")
    base = model or folder.name == "discriminator" and run.args.d_model or run.args.model
    return Source(path, float(parts[2]), folder, run, base)


def public(value):
    """A value as one line of plain Markdown; of an absolute path only its last part, because folders are private."""
    text = html.escape(escaped(pathlib.Path(value).name if re.match("[/~]", str(value)) else str(value)), quote=False)
    return text.replace("[", "&#91;").replace("`", "&#96;")  # no link, no image, no end of code


def card(title, args):
    """The model card: what this is, and each run's scores, settings and prompt."""
    base, library = args.sources[0].base, "peft" if args.save_adapter else "transformers"
    path, _ = located(base)
    link = f"base_model: {path}\n" if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not os.path.isdir(path) else ""
    parts = " ".join(f"{source.weight:+g} x {source.folder.name} of {source.run.name}" for source in args.sources)
    method = f"TIES, density {args.density:g}" if args.method == "ties" else "sum"
    text = (f"---\n{link}library_name: {library}\npipeline_tag: text-generation\ntags: [forger]\n---\n\n"
            f"# {public(title)}\n\n{public(base)} {public(parts)} ({method}), under the base's licence. forger trains "
            "a generator to fool a discriminator, which tells its texts from real ones; scores are the generator's.\n")
    for run in (source.run for source in args.sources):
        scores = ", ".join(f"{key} {x:.3f}" for key, x in run.result.items() if isinstance(x, float)) or "not measured"
        settings = " ".join(f"{key}={public(value)}" for key, value in vars(run.args).items() if key != "prompt")
        origin = ", ".join(public(run.info.get(key)) for key in ("commit", "device", "versions"))
        fence = "~" * max(4, *(len(found) + 1 for found in re.findall("~+", run.args.prompt)), 0)
        text += (f"\n## {public(run.name)}\n\nScores{run.unfinished()}: {public(scores)}. Settings: `{settings}`. "
                 f"Commit {origin}.\n\nThe prompt, with {{text}} for the prefix, is followed by at most "
                 f"{run.args.reasoning_tokens} tokens of thinking, the end of thinking, and at most "
                 f"{run.args.completion_tokens} tokens of text:\n\n{fence}\n{run.args.prompt}\n{fence}\n")
    return text


if __name__ == "__main__":
    args = check(flags().parse_args())

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from model import DAMAGE, load_adapter, load_model, located
from rollout import rules

from peft import LoraConfig, get_peft_model  # after model, which silences bitsandbytes
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import ties


def read_adapter(source):
    """Config and tensors of an adapter; A is (r, I) and B (O, r)."""
    config, tensors = LoraConfig.from_pretrained(source.folder), load_file(source.folder / "adapter_model.safetensors")
    for key, x in tensors.items():
        rank = x.shape[1] if "lora_B" in key else x.shape[0]
        if rank != config.r or not x.isfinite().all():
            raise ValueError(f"{source.path}: {key} is not finite, or not of rank {config.r}")
    if (config.r, config.lora_alpha) != (source.run.args.rank, source.run.args.alpha):
        raise ValueError(f"{source.path}: rank or alpha in adapter_config.json is not the run's")
    return config, tensors


def load(sources, dtype):
    """The base model with the adapters source0, source1, ..., and its tokenizer."""
    base = sources[0].base
    try:
        model, tokenizer = load_model(base, "none", dtype, "cpu")
        if getattr(model.config, "quantization_config", None):
            raise UserError(f"{base} is stored quantised; give the model that it was made from with --model")
        model = get_peft_model(model, read_adapter(sources[0])[0], "source0")
        for i, source in enumerate(sources):
            if i:
                model.add_adapter(f"source{i}", read_adapter(source)[0])
            load_adapter(model, source.folder, f"source{i}")
    except (*DAMAGE, LookupError) as error:
        raise UserError(f"these adapters cannot be loaded onto --model {base}: {first_line(error)}") from None
    return model, tokenizer


def save_merged(args, folder):
    """Write the base with the adapters merged into it. Returns a line on what rounding leaves of the change."""
    sources, settings = args.sources, args.sources[0].run.args
    change2, written2, product, num_changes, num_written = 0.0, 0.0, 0.0, 0, 0
    dtype = args.dtype or settings.dtype
    model, tokenizer = load(sources, dtype)
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        weight = layer.get_base_layer().weight  # (O, I) outputs, inputs
        deltas = [source.weight * layer.get_delta_weight(f"source{i}") for i, source in enumerate(sources)]  # (O, I)
        ones = torch.ones(len(deltas))  # the deltas are weighted already
        change = ties(deltas, ones, args.density) if args.method == "ties" else sum(deltas)  # (O, I)
        merged = (weight.float() + change).to(weight.dtype)  # (O, I)
        written = merged.float() - weight.float()  # (O, I)
        change2 += change.norm().item() ** 2
        written2 += written.norm().item() ** 2
        product += (written * change).sum().item()
        num_changes += change.count_nonzero().item()
        num_written += written.count_nonzero().item()
        weight.data = merged
    model = model.unload()
    rule, t = rules(tokenizer, model), settings.temperature
    sampling = dict(do_sample=True, temperature=t, top_k=0, top_p=1.0) if t else {}
    model.generation_config = GenerationConfig(eos_token_id=rule.stop.tolist(), pad_token_id=rule.pad,
                                               bos_token_id=tokenizer.bos_token_id, **sampling)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    cosine = product / math.sqrt(change2 * written2) if written2 else 0.0
    return (f"rounded to {dtype}, {num_written / max(num_changes, 1):.0%} of the changed weights still differ from the "
            f"base's; the change has a cosine of {cosine:.3f} with the exact one (1: no loss)")


def save_sum(args, folder):
    """Write the weighted sum of adapters as one adapter in peft's format, at scale 1: B holds weights and scales."""
    sources, tensors = args.sources, {}  # R is the sum of the adapters' ranks r
    configs, adapters = zip(*map(read_adapter, sources))
    factors = [source.weight * config.lora_alpha / config.r ** 0.5 for source, config in zip(sources, configs)]
    for key in adapters[0]:
        if "lora_A" in key:
            tensors[key] = torch.cat([adapter[key] for adapter in adapters])  # (R, I)
        else:
            tensors[key] = torch.cat([x * adapter[key] for x, adapter in zip(factors, adapters)], 1)  # (O, R)
    config, rank = configs[0], sum(config.r for config in configs)
    config.base_model_name_or_path, config.revision = located(sources[0].base)
    config.r, config.lora_alpha = rank, math.sqrt(rank)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"one adapter of rank {rank}"


def main(args):
    target, sources = pathlib.Path(args.merge or args.save_adapter).resolve(), args.sources
    if args.merge and any(source.run.args.quant != "none" for source in sources):
        print("note: trained on quantised weights, merged into the unquantised ones, which differ from them")
    beside = target.with_name(f"{target.name}.{os.getpid()}.new")  # renamed when it is complete
    try:
        beside.mkdir(parents=True)
        report = save_merged(args, beside) if args.merge else save_sum(args, beside)
        (beside / "README.md").write_text(card(target.name, args), "utf-8")
        beside.rename(target)
    except (*DAMAGE, LookupError, ArithmeticError) as error:
        raise UserError(f"{target} could not be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{target}: {escaped(sources[0].base)}", *(f"{source.weight:+g} x {source.path}" for source in sources))
    print(report)


if __name__ == "__main__":
    main(args)
