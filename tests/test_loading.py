"""Models and tokenizers that a run would misread: each is refused in one line before it begins, or read as it says."""
import argparse
import json
import pathlib
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from data import Window
from discriminator import make_judge
from flags import UserError
from model import (Player, add_adapters, checkpoint_layers, digests, hidden_states, load_model, load_tokenizer, pinned,
                   located, token_stats)
from rollout import Writer, probe
from sampler import Sampler

SIZES = dict(vocab_size=4100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16, max_position_embeddings=512, eos_token_id=2)
TEXT = "A run of the demo reads a text like this one, thinks for a few tokens, and goes on writing where the text ends. " * 3


@pytest.fixture
def made(demo, tmp_path):
    """made(kind, **more): the folder of a small random model of that architecture, with the demo's tokenizer."""
    def make(kind, **more):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES | more)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.mul_(3)
        for part in (model, demo[1]):
            part.save_pretrained(tmp_path / kind)
        return tmp_path / kind
    return make


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model's folder to damage."""
    return pathlib.Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rename(folder, old, new):
    save_file({key.replace(old, new): x for key, x in load_file(folder / "model.safetensors").items()},
              folder / "model.safetensors", metadata={"format": "pt"})


def scale(folder, name, factor):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: weights[name] * factor}, folder / "model.safetensors", metadata={"format": "pt"})


def add_tokens(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<new {i}>" for i in range(10)])
    tokenizer.save_pretrained(folder)


def load(folder, dtype="fp32"):
    return load_model(str(folder), "none", dtype, "cpu", "--d_model")[0]


DAMAGES = {
    "weights renamed": (lambda f: rename(f, "model.layers", "_orig_mod.model.layers"), "22 missing weights"),
    "one weight missing": (lambda f: rename(f, "layers.1.mlp.up_proj", "layers.1.mlp.old"), "1 missing weights, model.l"),
    "a bias that the config lacks": (lambda f: save_file(
        load_file(f / "model.safetensors") | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
        f / "model.safetensors", metadata={"format": "pt"}), "1 unexpected weights, model.layers.0.self_attn.q_proj.bias"),
    "another size": (lambda f: edit(f / "config.json", intermediate_size=64), "could not be loaded"),
    "stored in 8 bits": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "fp8"}), "--quant nf4"),
    "an adapter beside it": (lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}'),
                             "holds an adapter for org/base"),
    "more tokens than rows": (add_tokens, "ids up to 4105, and the model 4100 rows"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "its tokenizer could not be loaded"),
    "a newer tokenizer.json": (lambda f: edit(f / "tokenizer.json", model={"type": "Next"}), "its tokenizer could not"),
    "an unknown rope": (lambda f: edit(f / "config.json", rope_parameters={"rope_type": "new", "rope_theta": 1e4}),
                        "could not be loaded"),
    "a config that is no config": (lambda f: (f / "config.json").write_text("[1]"), "could not be loaded"),
    "torn weights": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 99), "could not be loaded"),
    "a tokenizer with dropout": (lambda f: edit(f / "tokenizer.json", model=json.loads((f / "tokenizer.json").read_text())[
        "model"] | {"dropout": 0.3}), "splits words at random"),
    "an end token by name": (lambda f: edit(f / "generation_config.json", eos_token_id="</s>"), "eos_token_id in its"),
    "nan in its weights": (lambda f: scale(f, "model.norm.weight", float("nan")), "states are not finite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_model_is_refused_in_one_line(name, folder, capsys):
    damage, message = DAMAGES[name]
    damage(folder)
    with pytest.raises(UserError):
        load(folder)
    err = capsys.readouterr().err
    assert err.startswith(f"error: --d_model {folder}") and message in err and err.count("\n") == 1, err


def test_overflow_in_fp16_names_the_dtype(folder):
    scale(folder, "model.layers.1.mlp.down_proj.weight", 1e5)
    scale(folder, "model.layers.1.mlp.up_proj.weight", 1e5)
    load(folder, "fp32")
    with pytest.raises(UserError) as error:
        load(folder, "fp16")
    assert "not finite in fp16; give --dtype bf16 or fp32" in error.value.message


@pytest.mark.parametrize("kind, more, message", [
    ("Gemma2", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ("Bert", dict(is_decoder=False), "not causal")])
def test_a_model_whose_log_probs_would_be_wrong_is_refused(kind, more, message, made):
    with pytest.raises(UserError) as error:
        load(made(kind, **more))
    assert message in error.value.message


@pytest.mark.parametrize("kind, keys", [("GPT2", ["transformer.h.0.attn.masked_bias"]), ("OPT", ["model.decoder.version"]), (
    "Llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight", "mtp.layers.0.weight"])])
def test_old_buffers_and_other_heads_in_a_file_are_no_mistake(kind, keys, made):
    folder = made(kind, word_embed_proj_dim=32, ffn_dim=48)
    save_file(load_file(folder / "model.safetensors") | {key: torch.zeros(1) for key in keys}, folder / "model.safetensors",
              metadata={"format": "pt"})
    load(folder)


def test_a_special_token_that_no_text_has_needs_no_row(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<image {i}>" for i in range(10)]})
    tokenizer.save_pretrained(folder)
    (folder / "data_config.json").write_text("[]")
    assert load(folder) and digests(folder, "--model")


@pytest.mark.parametrize("kind, more", [("Cohere", dict(logit_scale=0.1)), ("Granite", dict(logits_scaling=8.0))])
def test_a_factor_on_the_logits_is_part_of_the_log_probs(kind, more, made):
    model = load(made(kind, **more))
    ids = torch.randint(10, 4000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    for temperature in (1.0, 0.5):
        theirs = (model(ids).logits / temperature).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]  # (2, 8)
        ours = token_stats(model, ids, mask, temperature=temperature).logp.view(2, 8)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_attention_from_a_hub_is_not_fetched_and_dropout_is_off(made):
    folder = made("OPT", word_embed_proj_dim=32, ffn_dim=48, dropout=0.5, attention_dropout=0.5)
    edit(folder / "config.json", _attn_implementation="org/kernel", attn_implementation="org/kernel")
    model = load(folder)
    assert model.config._attn_implementation == "sdpa"
    ids = torch.arange(10, 40)[None]
    checkpoint_layers(model)
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_checkpointing_of_a_model_without_it_is_refused(tiny):
    tiny[0].get_base_model().supports_gradient_checkpointing = False
    with pytest.raises(UserError) as error:
        checkpoint_layers(tiny[0])
    assert error.value.message.startswith("--grad_ckpt: Qwen3ForCausalLM does not support it")


def players(folder, **more):
    args = argparse.Namespace(**dict(
        model=str(folder), quant="none", dtype="fp32", prompt="Go on: {text}", prefix_tokens=16, reasoning_tokens=2,
        completion_tokens=16, echo_tokens=4, seed=0, temperature=1.0, kl_coef=0.05, micro_batch=2, disc="head",
        d_pool="mean", d_loss="ce", d_loss_scale=1.0, d_shuffle=False) | more)
    model, tokenizer = load_model(args.model, args.quant, args.dtype, "cpu")
    model = add_adapters(model, ["generator", "discriminator"], 4, 2.0)
    pair = [Player(model, tokenizer, name) for name in ("generator", "discriminator")]
    writer = Writer(Sampler(model), tokenizer, args)
    windows = [Window(TEXT[i:i + 60], " ", TEXT[i + 60:i + 120]) for i in (0, 30, 90)]
    return writer, pair[0], windows, make_judge(args, pair[1], writer.sampler)


def test_the_probe_leaves_nothing_behind(tiny_folder):
    parts = players(tiny_folder)
    before = {key: x.clone() for key, x in parts[1].model.state_dict().items()}
    probe(*parts)
    after = parts[1].model.state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    assert not any(p.grad is not None for p in (*parts[1].model.parameters(), *parts[3].parameters()))


@pytest.mark.parametrize("kind, more", [("Rwkv", dict(attention_hidden_size=32)), ("Bart", dict(
    d_model=32, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=48, is_decoder=True))])
def test_the_probe_refuses_a_model_whose_sampler_and_learner_would_differ(kind, more, made):
    with pytest.raises(UserError) as error:
        probe(*players(made(kind, **more)))
    assert "the sampler's log-probs are" in error.value.message


@pytest.mark.parametrize("where, what", [("hidden_states", "learner"), ("one row", "are nan"), ("score", "KeyError")])
def test_the_probe_turns_any_failure_into_one_line(where, what, tiny_folder, monkeypatch):
    writer, generator, windows, judge = players(tiny_folder, micro_batch=0)
    if where == "score":
        monkeypatch.setattr(judge, "score", lambda *_: {}["no"])
    elif where == "one row":
        first = torch.tensor([torch.nan, 0, 0])[:, None, None]  # (3, 1, 1)
        monkeypatch.setattr("model.hidden_states", lambda *a: hidden_states(*a) + first)
    else:  # a learner with dropout, say
        monkeypatch.setattr("model.hidden_states", lambda *a: torch.dropout(hidden_states(*a), 0.3, True))
    with pytest.raises(UserError) as error:
        probe(writer, generator, windows, judge)
    assert what in error.value.message


def test_the_probe_fits_in_the_positions_of_the_run(made):
    folder = made("GPT2", n_positions=44, n_embd=32, n_layer=2, n_head=2)
    parts = players(folder, prompt="{text}", reasoning_tokens=0, echo_tokens=0, completion_tokens=28)
    assert parts[0].max_tokens == 44
    probe(*parts)
    with torch.no_grad():
        probe(*parts[:3])


def test_experts_are_not_trained_and_the_run_says_so(made, capsys):
    folder = made("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_only_layers=[])
    parts = players(folder)
    probe(*parts)
    assert "% of the weights are not trained: mlp.experts" in capsys.readouterr().out
    adapters = [name for name, _ in parts[1].model.named_parameters() if "lora_A.generator" in name]
    assert len(adapters) == 2 * 4  # the attention's


def test_a_hub_id_is_pinned_to_its_commit_and_a_folder_by_its_files(folder, tmp_path, monkeypatch):
    cache = tmp_path / "hub" / "models--some--base"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("a" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("a" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert pinned("some/base", "--model") == pinned("some/base@main", "--model") == "some/base@" + "a" * 40
    assert located("some/base@v1") == ("some/base", "v1") and located("demo")[1] == "main"
    assert pinned(str(folder), "--model") == str(folder)
    before = digests(folder, "--model")
    scale(folder, "model.norm.weight", 1.001)
    after = digests(folder, "--model")
    assert before["model"] != after["model"] and before["tokenizer"] == after["tokenizer"]
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../elsewhere.safetensors"}}')
    with pytest.raises(UserError) as error:
        digests(folder, "--model")
    assert "names weights in other folders" in error.value.message
    (folder / "model.safetensors.index.json").unlink()
    add_tokens(folder)
    assert digests(folder, "--model")["tokenizer"] != after["tokenizer"]
