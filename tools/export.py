"""
Merge a run's adapter into a plain Hugging Face model; add, negate and combine adapters as task vectors.

    python -m tools.export out/demo-1 --merge out/merged                             # base + the generator's adapter
    python train.py --preset demo --model out/merged                                 # a new run that starts from it
    python -m tools.export --combine out/A:1 out/B:-0.5 --merge out/mixed            # base + A's change - half of B's
    python -m tools.export --combine out/A:1 out/B:1 --method ties --merge out/ties  # TIES-Merging
    python -m tools.export --combine out/A:1 out/B:-1 --save_adapter out/difference  # one adapter in peft's format

A path is a run's folder or an adapter in peft's format, such as out/A/ckpt/discriminator. The result loads with
transformers (an adapter: with peft) alone: weights, tokenizer, the first run's sampling settings, and a model card.

What differs from the textbook:
1) Changes are added in fp32 and rounded once. In bf16 much of a small change is lost; the last line says how much.
2) A quantised run is merged into the weights before quantisation, which differ from those it was trained on.
3) TIES (Yadav et al. 2023, arXiv 2306.01708) trims each layer by itself, as peft does, not the whole task vector.
   Weights apply before the signs are elected, so that a negative weight votes against its adapter.
4) A sum of adapters is one adapter, exactly. (peft's add_weighted_adapter scales rsLoRA wrongly, 0.21.2 included.)
"""
import collections
import math
import os
import pathlib
import re
import shutil

from flags import Parser, Run, UserError, escaped, first_line, read_json, short

# peft's settings for adapters that are more than B @ A at one scale on linear layers of an unchanged base
NOT_PLAIN = """alora_invocation_tokens alpha_pattern arrow_config kasa_config layer_replication lora_bias
    modules_to_save rank_pattern target_parameters trainable_token_indices use_bdlora use_dora use_qalora""".split()
# an adapter: a folder in peft's format, the base model to which it adds scale * B @ A, and its run or None
Source = collections.namedtuple("Source", "path weight role folder rank scale base run")


def flags():
    parser = Parser(__doc__)
    adapters, target = (parser.add_mutually_exclusive_group(required=True) for _ in range(2))
    adapters.add_argument("run", nargs="?", default=None, help="folder of a run, or of an adapter in peft's format")
    adapters.add_argument("--combine", nargs="+", metavar="PATH:WEIGHT", help="adapters; weights may be negative")
    target.add_argument("--merge", default=None, help="new folder for the merged model")
    target.add_argument("--save_adapter", default=None, help="new folder for the weighted sum as one adapter")
    add = parser.add_argument
    add("--method", choices=["sum", "ties"], default="sum", help="weighted sum, or TIES-Merging")
    add("--density", type=float, default=0.2, help="fraction of a layer's changes that --method ties keeps (1: all)")
    add("--adapter", choices=["generator", "discriminator", "shared"], default=None,
        help="which adapter of a run to use (default: the one that generates)")
    add("--model", default=None, help="base model (default: the one that the adapters name)")
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
    pairs = [word.rpartition(":")[::2] for word in args.combine or [f"{args.run}:1"]]
    args.sources = [read_source(path, weight, args.adapter, args.model) for path, weight in pairs]
    return args


def read_source(path, weight, role, model):
    if not path or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", weight):
        raise UserError(f"--combine {f'{path}:{weight}'.lstrip(':')}: must be PATH:WEIGHT, as in out/demo-1:-0.5")
    folder = pathlib.Path(path)
    if (folder / "adapter_config.json").exists():
        if role:
            raise UserError(f"--adapter {role}: {path} is one adapter already; leave the flag out")
        role, above = folder.resolve().name, folder.resolve().parents[1]
        run = Run(above) if (above / "args.json").exists() else None
    else:
        run, names = Run(path), sorted(file.parent.name for file in folder.glob("ckpt/*/adapter_config.json"))
        role = role or ("shared" if "shared" in names else "generator")
        if role not in names:
            raise UserError(f"--adapter {role}: the checkpoint of {path} has {' and '.join(names) or 'no adapter'}")
        folder = folder / "ckpt" / role
    config = read_json(folder / "adapter_config.json")
    if (config.get("peft_type") != "LORA" or any(config.get(key) for key in NOT_PLAIN)
            or config.get("init_lora_weights", True) not in (True, False, "gaussian")):  # pissa changes the base
        raise UserError(f"{path} is not a plain LoRA adapter; see {folder / 'adapter_config.json'}")
    base = run and (role == "discriminator" and run.args.d_model or run.args.model)
    base = model or base or config.get("base_model_name_or_path")
    if not base:
        raise UserError(f"{path} does not name its base model; give it with --model")
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    return Source(path, float(weight), role, folder, config["r"], scale, base, run)


def public(value):
    """A value as one line of text, without the folders of absolute paths, which are private."""
    return escaped(re.sub(r"(^|[=:,])(?:~|/(?!/))[^=:,]*/", r"\1", str(value)))


def card(title, args):
    """The model card: what this is, and each run's scores, settings and prompt."""
    base, library = args.sources[0].base, "peft" if args.save_adapter else "transformers"
    link = "" if os.path.isdir(place(base)) else f"base_model: {base}\n"
    names = [source.run.name if source.run else public(source.path) for source in args.sources]
    parts = " ".join(f"{source.weight:+g} x {source.role} of {name}" for source, name in zip(args.sources, names))
    method = f"TIES, density {args.density:g}" if args.method == "ties" else "sum"
    text = (f"---\n{link}library_name: {library}\npipeline_tag: text-generation\ntags: [forger]\n---\n\n"
            f"# {public(title)}\n\n{public(base)} {parts} ({method}), under the base's licence. Scores are of the "
            "run's generator, which forger trains to pass for real before a discriminator.\n")
    for run in (source.run for source in args.sources if source.run):
        scores = ", ".join(f"{key} {x:.3f}" for key, x in run.result.items() if isinstance(x, float)) or "not measured"
        settings = " ".join(f"{key}={public(value)}" for key, value in vars(run.args).items() if key != "prompt")
        text += (f"\n## {run.name}\n\nScores: {scores}. Settings: `{settings}`. Commit {run.info.get('commit')}, "
                 f"{run.info.get('device')}, {run.info.get('versions')}.\n\nThe prompt, with {{text}} for the prefix, "
                 f"is followed by at most {run.args.reasoning_tokens} tokens of thinking, the end of thinking, and at "
                 f"most {run.args.completion_tokens} tokens of text:\n\n~~~~\n{run.args.prompt}\n~~~~\n")
    return text


if __name__ == "__main__":
    args = check(flags().parse_args())

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from model import DTYPES, EMBEDDED, load_adapter, load_model
from rollout import rules

from peft import LoraConfig, get_peft_model  # after model, which silences bitsandbytes
from peft.tuners.lora import LoraLayer
from peft.utils.merge_utils import ties


def place(name):
    """The folder or hub id of a base model: equal for two names of one model."""
    path = pathlib.Path(EMBEDDED.get(name, name))
    return str(path.resolve()) if path.is_dir() else name


def load(sources, base):
    """The base model as stored, with the adapters as source0, source1, ...; its tokenizer; the name of its dtype."""
    try:
        config = AutoConfig.from_pretrained(place(base), trust_remote_code=False)
        if getattr(config, "quantization_config", None):
            raise UserError(f"--model {base} is stored quantised; give the model that it was made from")
        dtype = next((name for name, kind in DTYPES.items() if kind == config.get_text_config().dtype), "fp32")
        model, tokenizer = load_model(base, "none", dtype, "cpu")
        model = get_peft_model(model, LoraConfig.from_pretrained(sources[0].folder), "source0")
        for i, source in enumerate(sources):
            if i:
                model.add_adapter(f"source{i}", LoraConfig.from_pretrained(source.folder))
            load_adapter(model, source.folder, f"source{i}")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"these adapters cannot be loaded onto --model {base}: {first_line(error)}") from None
    return model, tokenizer, dtype


def save_merged(args, folder):
    """Write the base with the adapters merged into it. Returns a line on how much its weights changed."""
    sources, run, before, change2, written2, product = args.sources, args.sources[0].run, 0.0, 0.0, 0.0, 0.0
    model, tokenizer, stored = load(sources, sources[0].base)
    name = args.dtype or (run.args.dtype if run else stored)
    for key, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight, dtype = layer.get_base_layer().weight, DTYPES[name]  # (O, I) outputs, inputs
            if weight is model.get_input_embeddings().weight:
                raise UserError(f"{key} has the embedding's weights; an adapter on those cannot be merged")
            deltas = [source.weight * layer.get_delta_weight(f"source{i}") for i, source in enumerate(sources)
                      if f"source{i}" in layer.lora_A]  # (O, I) each
            ones = torch.ones(len(deltas))  # the weights are in the deltas
            change = ties(deltas, ones, args.density) if args.method == "ties" else sum(deltas)  # (O, I)
            merged = (weight.float() + change).to(dtype)  # (O, I)
            if not merged.isfinite().all():
                raise UserError(f"{key} is not finite after merging; choose smaller weights, or --dtype fp32")
            written = merged.float() - weight.to(dtype).float()  # (O, I)
            before += weight.float().norm().item() ** 2
            change2 += change.norm().item() ** 2
            written2 += written.norm().item() ** 2
            product += (written * change).sum().item()
            weight.data = merged
    model = model.unload().to(DTYPES[name])
    if run:
        rule, t = rules(tokenizer, model), run.args.temperature
        sampling = dict(do_sample=True, temperature=t, top_k=0, top_p=1.0) if t else {}
        model.generation_config = GenerationConfig(eos_token_id=rule.stop.tolist(), pad_token_id=rule.pad,
                                                   bos_token_id=tokenizer.bos_token_id, **sampling)
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)
    cosine = product / math.sqrt(change2 * written2) if written2 else 0.0
    return (f"the weights move by {math.sqrt(change2 / before):.2g} of their norm; rounded to {name}, the change has a "
            f"cosine of {cosine:.3f} with the exact one (1: no loss, as with --dtype fp32)")


def save_sum(args, folder):
    """Write the weighted sum of adapters as one adapter in peft's format, at scale 1: B holds weights and scales."""
    sources, tensors = args.sources, {}  # R is the sum of the adapters' ranks r
    adapters = [load_file(source.folder / "adapter_model.safetensors") for source in sources]
    layers = [{key: x.shape["lora_A" in key] for key, x in adapter.items()} for adapter in adapters]  # I of A, O of B
    if any(layer != layers[0] for layer in layers):
        raise UserError("--save_adapter: these adapters belong to different layers; --merge can combine them")
    for key in layers[0]:
        factors = [1.0 if "lora_A" in key else source.weight * source.scale for source in sources]
        parts = [factor * adapter[key].float() for factor, adapter in zip(factors, adapters)]  # (r, I) or (O, r) each
        tensors[key] = torch.cat(parts, 0 if "lora_A" in key else 1)  # (R, I) or (O, R)
    config = LoraConfig.from_pretrained(sources[0].folder)
    config.base_model_name_or_path, config.use_rslora = place(sources[0].base), True
    config.r = sum(source.rank for source in sources)
    config.lora_alpha = math.sqrt(config.r)
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return f"one adapter of rank {config.r}"


def main(args):
    target, bases = pathlib.Path(args.merge or args.save_adapter).resolve(), [source.base for source in args.sources]
    if len({*map(place, bases)}) > 1:
        raise UserError(f"adapters can only be combined on one base model, and these belong to {' and '.join(bases)} "
                        "(if they are the same, name it with --model)")
    if args.merge and any(source.run and source.run.args.quant != "none" for source in args.sources):
        print("note: trained on quantised weights, merged into the unquantised ones, which differ from them")
    beside = target.with_name(f"{target.name}.{os.getpid()}.new")  # renamed when it is complete
    try:
        beside.mkdir(parents=True)
        report = save_merged(args, beside) if args.merge else save_sum(args, beside)
        (beside / "README.md").write_text(card(target.name, args), "utf-8")
        os.sync()
        beside.rename(target)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{target} could not be written: {first_line(error)}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    print(f"{target}: {bases[0]}", *(f"{source.weight:+g} x {source.path}" for source in args.sources))
    print(report)


if __name__ == "__main__":
    main(args)
