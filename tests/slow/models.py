"""
The table in docs/models.md: a tiny model of every causal architecture that transformers has, tried as a run would use it.

    python tests/slow/models.py            # writes docs/models.md
    python tests/slow/models.py qwen3 opt  # prints the rows of these

Each is made from its config, with random weights and the demo's tokenizer, saved, and loaded as --model.
"""
import argparse
import contextlib
import datetime
import logging
import os
import pathlib
import sys
import tempfile
import time
import warnings

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flags import Parser, UserError, first_line
from model import Player, adapter_parameters, add_adapters, load_model, load_tokenizer, untrained
from rollout import log_prob_gaps, rules
from sampler import Sampler

TOLERANCE, VOCAB, WINDOW, LAYERS = 1e-4, 4100, 32, 6
SIZES = dict(  # those that a config has are set
    vocab_size=VOCAB, hidden_size=32, d_model=32, n_embd=32, dim=32, word_embed_proj_dim=32, embedding_size=32,
    intermediate_size=48, ffn_dim=48, n_inner=48, decoder_ffn_dim=48, encoder_ffn_dim=48, d_ff=48, dff=48,
    num_hidden_layers=LAYERS, n_layer=LAYERS, n_layers=LAYERS, num_layers=LAYERS, decoder_layers=LAYERS,
    num_attention_heads=2, n_head=2, n_heads=2, decoder_attention_heads=2, encoder_attention_heads=2, num_heads=2,
    num_key_value_heads=1, head_dim=16, kv_channels=16, d_kv=16, max_position_embeddings=512, n_positions=512,
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16, n_group=1, topk_group=1, first_k_dense_replace=1,
    sliding_window=WINDOW, window_size=WINDOW, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=16, pad_token_id=0, eos_token_id=2, is_decoder=True, global_head_dim=16,
    hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0, rotary_dim=8,
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, state_size=8, mamba_d_ssm=64, time_step_rank=4,
    linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MORE = {  # what one architecture needs besides
    "gpt_neo": dict(attention_types=[[["global", "local"], 3]]),
    "diffllama": dict(num_key_value_heads=2),
    "minicpm3": dict(num_key_value_heads=2),
    "codegen": dict(n_head=4, num_attention_heads=4),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 3),
    "bamba": dict(attn_layer_indices=[1, 3, 5]),
    "rembert": dict(input_embedding_size=32, output_embedding_size=32),
}
ARGS = argparse.Namespace(reasoning_tokens=2, temperature=1.0, kl_coef=0.05, micro_batch=0)


PAGE = """# Models

This page lists which causal language models of transformers {version} train.
A tiny one of each was tried ({date}).

```bash
python tests/slow/models.py  # {minutes:.0f} min on one core of a busy machine
```

Each model is made from its config: {layers} layers, windows of {window} tokens if it has any, initial weights times three.
It gets the demo's tokenizer, is saved, loaded as `--model`, and given adapters with visible weights.
Three sequences of unequal length, the longest beyond any window, are then sampled and scored in fp32.
The gap is the distance of the sampler's, the learner's and the reference's log-probs from the model's own.
The same check runs at the start of every run, on the real model.

Of {tried} architectures {works} can be trained, {static} of them with a static cache, which a CUDA graph needs.
The others sample with a cache that grows.
{refused} are refused before the run, with the reason.
{failed} could not be made so small, and were not tried.

| `model_type` | cache | gap, nats | not trained, embeddings and output layer aside |
|---|---|---|---|
{table}

Refused:

| `model_type` | reason |
|---|---|
{reasons}

Not tried: {others}.
"""


def page(rows, seconds):
    """docs/models.md."""
    works = {kind: row for kind, row in rows.items() if row[0] in ("static", "growing", "WRONG")}
    refused = {kind: row[3].replace("|", "/") for kind, row in rows.items() if row[0] == "refused"}
    failed = [kind for kind, row in rows.items() if row[0] == "not built"]
    return PAGE.format(
        version=transformers.__version__, date=datetime.date.today(), minutes=seconds / 60, layers=LAYERS, window=WINDOW,
        tried=len(works) + len(refused), works=len(works), refused=len(refused), failed=len(failed),
        static=sum(row[0] == "static" for row in works.values()), others=", ".join(failed),
        table="\n".join(f"| {kind} | {way} | {gap:.0e} | {rest} |" for kind, (way, gap, rest, _) in works.items()),
        reasons="\n".join(f"| {kind} | {why} |" for kind, why in refused.items()))


def sizes(config, kind):
    """Small values for those of a config's keys that can be set."""
    keys = {*vars(config), *config.attribute_map}
    keys -= {key for key in keys if isinstance(getattr(type(config), key, None), property)}
    found = {key: value for key, value in SIZES.items() if key in keys}
    if "qk_rope_head_dim" in keys:  # multi-head latent attention
        found = {key: value for key, value in found.items() if key != "head_dim"} | dict(num_key_value_heads=2)
    return found | MORE.get(kind, {})


def tiny(kind):
    """A model of the architecture `kind`, from its config alone."""
    make = transformers.CONFIG_MAPPING[kind]
    known = make()
    parts = {key: sizes(part, kind) for key, part in vars(known).items()
             if isinstance(part, transformers.PreTrainedConfig) and part.model_type}
    config = make(**parts if "text_config" in parts else sizes(known, kind))
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > 1e7:
        raise ValueError(f"{size:,} parameters with these sizes")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.ndim > 1:
            p.data.mul_(3)  # so that attention is not uniform
    return model


def tried(kind, folder):
    """What becomes of one architecture: how it is sampled, its largest gap in nats, what is not trained, what is wrong."""
    way, worst, rest = "", 0.0, ""
    try:
        tiny(kind).save_pretrained(folder)
        load_tokenizer("demo").save_pretrained(folder)
    except Exception as error:
        return "not built", None, "", f"{type(error).__name__}: {first_line(error)}"
    try:
        model, tokenizer = load_model(folder, "none", "fp32", torch.device("cpu"))
        model = add_adapters(model, ["generator"], 4, 2.0)
        player, g = Player(model, tokenizer, "generator"), torch.Generator().manual_seed(1)
        for p in adapter_parameters(model, "generator"):
            p.data += 0.05 * torch.randn(p.shape, generator=g)
        words = torch.randint(10, 4000, (100,), generator=g).tolist()
        for static in (True, False):
            sampler = Sampler(model, True, static)
            way = way or ("static" if sampler.static else "growing")
            for prompts in ([words, words[:9] + words[30:60], words[:12]], [words[::-1], words[:40], words[50:57]]):
                worst = max(worst, *log_prob_gaps(sampler, player, rules(tokenizer, model), prompts, ARGS).values())
        share, names = untrained(model)
        rest = f"{share:.0%}: {', '.join(names)}" if share > 0.01 else ""
        if worst > 1e-3:
            return "refused", worst, rest, f"sampler, learner and model differ by {worst:.2g} nats"
        return way if worst <= TOLERANCE else "WRONG", worst, rest, ""
    except UserError as error:
        return "refused", None, rest, error.message.partition(str(folder))[2].removeprefix(" could not be loaded").strip(": ")
    except Exception as error:
        return "refused", None, rest, f"{type(error).__name__}: {first_line(error)}"


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("kinds", nargs="*", help="model types to try (default: all, into docs/models.md)")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    start, rows = time.time(), {}
    for kind in args.kinds or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
            with contextlib.redirect_stderr(nothing), contextlib.redirect_stdout(nothing):
                rows[kind] = tried(kind, folder)
        print(kind, *rows[kind], sep=" | ", flush=True)
    if not args.kinds:
        (ROOT / "docs" / "models.md").write_text(page(rows, time.time() - start))
