"""Deltas against hand-worked values and against peft; exports against the adapters on their base; and the mistakes a user makes."""
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file

import export
from card import public, run_section
from conftest import ROOT
from deltas import Layer, combine, delta, stacked, ties, trim_floor
from model import add_adapters, load_model, load_tokenizer

FLAGS = dict(quant="none", dtype="fp32", adapters="separate", reasoning_tokens=6, completion_tokens=8, temperature=1.0, adv_norm=True, data="/home/me/x.txt")


def make_run(folder, model, rank, alpha, seed, names=("generator", "discriminator"), **flags):
    """A folder like that of a finished run, with adapters whose weights are not zero."""
    base, _ = load_model(model, "none", "fp32", "cpu")
    torch.manual_seed(seed)
    base = add_adapters(base, list(names), rank, alpha)
    for name, p in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    base.save_pretrained(folder / "ckpt")
    told = {"args": {"preset": "demo", "model": model, **FLAGS, **flags}, "command": ["train.py", "--out_dir", str(folder)],
            "versions": {"torch": "2.13.0"}, "commit": "abc", "dirty": True, "device": "cpu"}
    (folder / "args.json").write_text(json.dumps(told))
    (folder / "result.json").write_text(json.dumps({"mauve": 0.876, "mauve_sd": 0.01, "mauve_interval": [0.8, 0.9], "num_sequences": 500, "featurizer": "base"}))


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """Runs on the tiny model with adapters of rank 4 and of rank 6, a shared one in bf16 on quantised weights, one on the demo's base."""
    out = tmp_path_factory.mktemp("runs")
    make_run(out / "A", tiny_folder, 4, 2.0, 1)
    make_run(out / "B", tiny_folder, 6, 3.0, 2)
    make_run(out / "Q", tiny_folder, 4, 2.0, 3, ["shared"], quant="nf4", dtype="bf16")
    make_run(out / "D", "demo", 4, 2.0, 4)
    return out


@pytest.fixture
def call(monkeypatch):
    """export.py in this process."""
    handler = signal.getsignal(signal.SIGINT)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        export.main(*export.read_flags())

    yield call
    signal.signal(signal.SIGINT, handler)


def layers_of(folder, scale):
    """Module to B @ A * scale, read and multiplied here, not by what is tested."""
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {key.removesuffix(".lora_A.weight") for key in tensors if "lora_A" in key}
    return {name.removeprefix("base_model.model."): scale * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def close(one, other):
    assert one.keys() == other.keys() and one
    assert max((one[key].float() - other[key].float()).abs().max().item() for key in one) < 1e-5


# -----------------------------------------------------------------------------
# the mathematics

def test_a_delta_is_alpha_over_the_root_of_the_rank_times_b_a():
    A, B = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0, 0.0, 3.0]])  # (4, 2), (1, 4)
    assert delta(A, B, 6.0, 4).tolist() == [[24.0, 15.0]]  # 6 / sqrt(4) = 3, B A = [8, 5]
    assert delta(A.bfloat16(), B.bfloat16(), 6.0, 4).dtype == torch.float32


def test_a_sum_weighs_each_delta():
    assert combine([torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0])], [1.0, -0.5]).tolist() == [-1.0, 3.0]


def test_ties_trims_elects_and_averages_as_worked_by_hand():
    vectors = [torch.tensor(v) for v in ([4.0, -1.0, 3.0, 0.5, 2.0], [2.0, 5.0, -4.0, 0.1, -1.0], [-3.0, 1.0, -2.0, 0.2, 6.0])]
    floors = [trim_floor(lambda v=v: iter([v[:2], v[2:]]), 0.6) for v in vectors]
    assert floors == [2.0, 2.0, 2.0]  # three of five are kept: 4 3 2, 5 4 2, 6 3 2
    # trimmed [4 0 3 0 2] [2 5 -4 0 0] [-3 0 -2 0 6]; sums 3 5 -3 0 8; means of those that agree
    assert ties(vectors, [1.0, 1.0, 1.0], floors).tolist() == [3.0, 5.0, -3.0, 0.0, 4.0]
    # [4 0 3 0 2] and [-2 -5 4 0 0]; sums 2 -5 7 0 2
    assert ties(vectors[:2], [1.0, -1.0], floors[:2]).tolist() == [4.0, -5.0, 3.5, 0.0, 2.0]


@pytest.mark.parametrize("density", [1e-9, 0.001, 0.2, 0.5, 1.0])
def test_the_trim_floor_is_that_of_a_whole_sort(density):
    torch.manual_seed(0)
    vector = torch.cat([torch.randn(4000) * 1e-3, torch.zeros(500), torch.full((500,), -0.25), torch.randn(1000)])
    floor = trim_floor(lambda: (part.reshape(10, -1) for part in vector.split(1500)), density)
    assert floor == vector.abs().sort(descending=True).values[max(1, round(density * 6000)) - 1].item()


def test_ranks_stand_side_by_side_and_a_missing_layer_is_zero():
    torch.manual_seed(0)
    one, two = Layer(torch.randn(2, 5), torch.randn(3, 2), 3.0, 2), Layer(torch.randn(4, 5), torch.randn(3, 4), -1.0, 4)
    A, B = stacked([one, None, two], [1.0, 7.0, -2.0], [2, 3, 4])
    assert A.shape == (9, 5) and B.shape == (3, 9)
    assert torch.allclose(B @ A, 3 / 2 ** 0.5 * one.B @ one.A + two.B @ two.A, atol=1e-6)


# -----------------------------------------------------------------------------
# what is written

GREEDY = """
import importlib.util, json, sys
sys.modules["peft"] = None  # importing it would fail
assert not any(map(importlib.util.find_spec, ["export", "model", "rollout", "flags"]))
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
texts = []
for prompt in json.loads(sys.argv[2]):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    texts.append(tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=24, eos_token_id=[0, 2])[0]))
print(json.dumps([texts, str(model.dtype), tokenizer(sys.argv[3]).input_ids, tokenizer.decode(tokenizer(sys.argv[3]).input_ids)]))
"""
PROMPTS = ["Return the number of", "<|im_start|>user\n<prefix>\nThe array is", "class Foo:\n    def"]
HARD = "<think> caf\u00e9 \u4f60\u597d  \n\n\t</think><|im_end|> def f(x): return 1e-5"


@pytest.mark.parametrize("name, player", [("A", "generator"), ("D", "discriminator")])  # D ties its embeddings
def test_a_merged_model_alone_writes_the_same_greedy_text_as_the_adapter_on_its_base(name, player, runs, call, tmp_path):
    out = tmp_path / "deep" / "merged"
    call(runs / name, "--merge", out, *(["--adapter", player] if player != "generator" else []))
    code = [sys.executable, "-I", "-c", GREEDY, out, json.dumps(PROMPTS), HARD]
    told = subprocess.run(code, capture_output=True, text=True, cwd=tmp_path, timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert told.returncode == 0, told.stderr
    texts, dtype, ids, back = json.loads(told.stdout)
    args = json.loads((runs / name / "args.json").read_text())["args"]
    base, tokenizer = load_model(args["model"], "none", "fp32", "cpu")
    bare = [base.generate(tokenizer(p, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=24, eos_token_id=[0, 2]) for p in PROMPTS]
    model = PeftModel.from_pretrained(base, runs / name / "ckpt" / player)
    wanted = [model.generate(input_ids=tokenizer(p, return_tensors="pt").input_ids, do_sample=False, max_new_tokens=24, eos_token_id=[0, 2]) for p in PROMPTS]
    assert texts == [tokenizer.decode(row[0]) for row in wanted] and texts != [tokenizer.decode(row[0]) for row in bare]
    assert dtype == "torch.float32" and ids == load_tokenizer(args["model"])(HARD).input_ids and back == tokenizer.decode(ids)
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md", "model.safetensors"} <= {file.name for file in out.iterdir()}
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1 and os.listdir(out.parent) == ["merged"]
    sampling = json.loads((out / "generation_config.json").read_text())
    assert sampling["eos_token_id"] == [0, 2] and (sampling["do_sample"], sampling["temperature"], sampling["top_k"], sampling["top_p"]) == (True, 1.0, 0, 1.0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft's, which mends it itself
def test_a_layer_that_lies_transposed_is_merged_as_it_lies(demo, call, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=4100, n_embd=32, n_layer=1, n_head=2, n_positions=64, eos_token_id=2)).save_pretrained(tmp_path / "gpt2")
    demo[1].save_pretrained(tmp_path / "gpt2")
    make_run(tmp_path / "run", str(tmp_path / "gpt2"), 3, 2.0, 5)
    call(tmp_path / "run", "--merge", tmp_path / "merged")
    model = PeftModel.from_pretrained(load_model(str(tmp_path / "gpt2"), "none", "fp32", "cpu")[0], tmp_path / "run" / "ckpt" / "generator")
    merged, ids = load_model(str(tmp_path / "merged"), "none", "fp32", "cpu")[0], torch.tensor([[5, 6, 7, 8]])  # (1, 4)
    with torch.no_grad(), model.disable_adapter():
        bare = model(input_ids=ids).logits  # (1, 4, V)
    with torch.no_grad():
        told, wanted = merged(ids).logits, model(input_ids=ids).logits  # (1, 4, V) each
    assert torch.allclose(told, wanted, atol=1e-5) and not torch.allclose(bare, wanted, atol=1e-2)


def test_a_plus_b_is_the_sum_of_both_deltas_of_different_ranks(runs, call, tmp_path):
    call("--combine", f"{runs / 'A'}:1", f"{runs / 'B'}:-0.5", "--merge", tmp_path / "both")
    base = load_model(json.loads((runs / "A" / "args.json").read_text())["args"]["model"], "none", "fp32", "cpu")[0].state_dict()
    moved = {key: value - base[key] for key, value in weights_of(tmp_path / "both").items()}
    one, two = layers_of(runs / "A" / "ckpt" / "generator", 2 / 4 ** 0.5), layers_of(runs / "B" / "ckpt" / "generator", 3 / 6 ** 0.5)
    wanted = {key: torch.zeros_like(value) for key, value in moved.items()}
    wanted |= {f"{name}.weight": one[name] - 0.5 * two[name] for name in one}
    close(moved, wanted)
    assert max(value.abs().max() for value in moved.values()) > 0.1


def test_negating_an_adapter_twice_is_the_identity_and_once_cancels_it(runs, call, tmp_path):
    call("--combine", f"{runs / 'A'}:-1", "--save_adapter", tmp_path / "once")
    call("--combine", f"{tmp_path / 'once'}:-1", "--save_adapter", tmp_path / "twice")
    A = layers_of(runs / "A" / "ckpt" / "generator", 2 / 4 ** 0.5)
    close(layers_of(tmp_path / "twice", 1.0), A)
    close(layers_of(tmp_path / "once", 1.0), {name: -d for name, d in A.items()})
    call("--combine", f"{runs / 'A'}:1", f"{tmp_path / 'once'}:1", "--merge", tmp_path / "nothing")
    base = load_model(json.loads((runs / "A" / "args.json").read_text())["args"]["model"], "none", "fp32", "cpu")[0].state_dict()
    close(weights_of(tmp_path / "nothing"), {key: base[key] for key in weights_of(tmp_path / "nothing")})


def test_a_saved_adapter_has_the_combinations_delta_in_peft(runs, call, tmp_path, tiny_folder):
    call("--combine", f"{runs / 'A'}:0.7", f"{runs / 'B' / 'ckpt' / 'discriminator'}:-1.5", "--save_adapter", tmp_path / "sum")
    model = PeftModel.from_pretrained(load_model(tiny_folder, "none", "fp32", "cpu")[0], tmp_path / "sum")
    found = {name.removeprefix("base_model.model."): module.get_delta_weight("default") for name, module in model.named_modules() if hasattr(module, "lora_A")
             and "default" in module.lora_A}
    one, two = layers_of(runs / "A" / "ckpt" / "generator", 2 / 4 ** 0.5), layers_of(runs / "B" / "ckpt" / "discriminator", 3 / 6 ** 0.5)
    close(found, {name: 0.7 * one[name] - 1.5 * two[name] for name in one})
    assert model.peft_config["default"].r == 10 and len(found) == 14


def test_an_adapter_that_is_not_rslora_keeps_its_own_scale(runs, call, tmp_path, tiny_folder):
    import shutil
    shutil.copytree(runs / "A" / "ckpt" / "generator", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    (tmp_path / "plain" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": False}))
    call(tmp_path / "plain", "--save_adapter", tmp_path / "saved", "--model", tiny_folder)
    close(layers_of(tmp_path / "saved", 1.0), layers_of(tmp_path / "plain", 2 / 4))


def test_ties_merges_what_its_parts_say(runs, call, tmp_path):
    call("--combine", f"{runs / 'A'}:1", f"{runs / 'B'}:1", "--method", "ties", "--density", "0.3", "--merge", tmp_path / "ties")
    parts = layers_of(runs / "A" / "ckpt" / "generator", 2 / 4 ** 0.5), layers_of(runs / "B" / "ckpt" / "generator", 3 / 6 ** 0.5)
    flat = [torch.cat([part[name].flatten() for name in sorted(part)]) for part in parts]  # over the whole task vector
    kept = [v * (v.abs() >= v.abs().sort(descending=True).values[round(0.3 * len(v)) - 1]) for v in flat]
    sign = (kept[0] + kept[1]).sign()
    votes = [(v.sign() == sign) & (sign != 0) for v in kept]
    wanted = sum(v * vote for v, vote in zip(kept, votes)) / sum(vote.float() for vote in votes).clamp(min=1)
    base = load_model(json.loads((runs / "A" / "args.json").read_text())["args"]["model"], "none", "fp32", "cpu")[0].state_dict()
    weights = weights_of(tmp_path / "ties")
    found = torch.cat([(weights[f"{name}.weight"] - base[f"{name}.weight"]).flatten() for name in sorted(parts[0])])
    assert torch.allclose(found, wanted, atol=1e-5) and 0.3 < (wanted != 0).float().mean() < 0.6


def test_a_quantised_run_is_merged_unquantised_rounded_once_and_says_so(runs, call, tmp_path, tiny_folder, capsys):
    call(runs / "Q", "--merge", tmp_path / "merged")
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "quantised" in told[0] and "bf16" in told[1]
    base = load_model(tiny_folder, "none", "fp32", "cpu")[0].state_dict()
    change = layers_of(runs / "Q" / "ckpt" / "shared", 2 / 4 ** 0.5)
    for key, weight in weights_of(tmp_path / "merged").items():
        wanted = base[key] + change.get(key.removesuffix(".weight"), 0)
        assert weight.dtype == torch.bfloat16 and ((weight.float() - wanted).abs() <= wanted.abs() * 2 ** -8 + 1e-6).all(), key
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "quantised weights" in card and "both roles" in card


@pytest.mark.parametrize("text, told", [
    ("/home/me/my data/secret project/x.jsonl", "x.jsonl"), ("/home/my name/x.txt", "x.txt"), ("a:/home/me/x", "a:x"), ("~/me/x", "x"),
    ("python train.py --data /home/me/x.txt --out_dir=/home/me/y", "python train.py --data x.txt --out_dir=y"), ("out/a/b", "out/a/b"),
    ("https://example.org/a/b", "https://example.org/a/b"), ("NVIDIA H200 1/2", "NVIDIA H200 1/2"),
])
def test_a_card_names_no_folder_of_this_machine(text, told):
    assert public(text) == told


def test_a_cards_command_and_settings_name_no_folder_of_this_machine():
    place = "/home/my name/a project/x y.jsonl"
    told = dict(args=dict(data=place, runs=[place, "out/a"], seed=1), command=["sft.py", "--data", place, f"--init={place}"])
    text = " ".join(run_section("out/a", told, {}).split())
    assert "home" not in text and "project" not in text
    assert "python sft.py --data 'x y.jsonl' '--init=x y.jsonl'" in text and "--data 'x y.jsonl' --runs 'x y.jsonl' out/a --seed 1" in text


def test_the_card_is_read_by_the_hub_tells_the_run_and_its_code_runs(runs, call, tmp_path):
    call(runs / "D", "--merge", tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.tags) == ("demo", "transformers", ["forger"])
    for word in ("0.876", "0.800 to 0.900", "--temperature 1.0", "--adv_norm", "--data x.txt", "abc, with uncommitted changes", "Licence", "generator's adapter"):
        assert word in card.text, word
    assert str(runs) not in card.content and "/home" not in card.content
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    told = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path / "merged", timeout=120)
    assert told.returncode == 0 and "<|im_end|>" not in told.stdout, told.stderr
    call("--combine", f"{runs / 'A'}:1", f"{runs / 'B'}:-1", "--save_adapter", tmp_path / "difference")
    card = ModelCard.load(tmp_path / "difference" / "README.md")
    assert card.data.base_model is None and card.data.library_name == "peft"  # a folder here has no address
    assert "not measured" in card.text and "+1 x A" in card.text and "-1 x B" in card.text


# -----------------------------------------------------------------------------
# mistakes

@pytest.mark.parametrize("words, wanted", [
    ("", "give one run"),
    ("{A} --combine {B}:1 --merge {new}", "give one run"),
    ("{A}", "--merge"),
    ("{A} --merge {new} --save_adapter {new}", "give one of"),
    ("no/such/run --merge {new}", "no/such/run holds neither"),
    ("{A} --merge {full}", "is not empty"),
    ("{A} --merge {full}/file", "is not empty"),
    ("{A} --merge {full}/file/deeper", "{full}/file"),
    ("{A} --adapter shared --merge {new}", "generator"),
    ("{A}/ckpt/generator --adapter generator --merge {new}", "leave the flag out"),
    ("--combine {A}:x --merge {new}", "PATH:WEIGHT"),
    ("--combine {A}:nan --merge {new}", "PATH:WEIGHT"),
    ("--combine {A}:-inf --merge {new}", "PATH:WEIGHT"),
    ("--combine {A} --merge {new}", "PATH:WEIGHT"),
    ("--combine {A}:1 {D}:1 --merge {new}", "one base"),
    ("--combine {A}:1 {D}:1 --save_adapter {new} --model demo", "one base"),
    ("--combine {A}:1 {Q}:1 --merge {new}", "--dtype"),
    ("--combine {A}:1 {B}:1 --method ties --save_adapter {new}", "full rank"),
    ("--combine {A}:1 {B}:1 --method ties --density 0 --merge {new}", "--density"),
    ("{A} --density 0.5 --merge {new}", "--density"),
    ("{A} --dtype bf16 --save_adapter {new}", "--dtype"),
    ("{A} --model demo --merge {new}", "another base"),
    ("{A} --model no/such-model --merge {new}", "--model no/such-model"),
    ("--combine {A}:1e60 --merge {new}", "not finite"),
    ("{torn} --merge {new}", "cannot be read"),
    ("{dora} --merge {new}", "lora_magnitude_vector"),
    ("{pissa} --merge {new}", "pissa"),
])
def test_a_mistake_ends_in_one_line_and_leaves_nothing(words, wanted, runs, call, tmp_path, capsys):
    import shutil

    from safetensors.torch import save_file
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    for name in ("torn", "dora", "pissa"):
        shutil.copytree(runs / "A" / "ckpt" / "generator", tmp_path / name)
    weights = tmp_path / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    weights = tmp_path / "dora" / "adapter_model.safetensors"
    save_file(load_file(weights) | {"base_model.model.x.lora_magnitude_vector": torch.ones(3)}, weights)
    config = tmp_path / "pissa" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa_niter_4"}))
    places = {**{name: runs / name for name in "ABDQ"}, **{name: tmp_path / name for name in ("new", "full", "torn", "dora", "pissa")}}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        call(*words.format(**places).split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and wanted.format(**places) in told, told
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_half_written(runs, call, tmp_path, monkeypatch, capsys):
    def full(path):
        assert os.listdir(tmp_path) == ["new.new"]  # what is under way stands beside
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync", full)
    with pytest.raises(SystemExit) as end:
        call(runs / "A", "--merge", tmp_path / "new")
    assert end.value.code == 2 and "No space left" in capsys.readouterr().err and not os.listdir(tmp_path)


def test_the_script_exports_and_tells_a_mistake_before_torch_is_imported(runs, tmp_path):
    (tmp_path / "empty").mkdir()  # may be there, if it is empty
    told = subprocess.run([sys.executable, ROOT / "export.py", runs / "A", "--merge", tmp_path / "empty"], capture_output=True, text=True, timeout=120)
    assert told.returncode == 0 and told.stderr == "" and told.stdout.count("\n") == 1, told.stderr
    assert (tmp_path / "empty" / "model.safetensors").exists()
    code = ("import runpy, sys\nsys.argv = ['export.py', 'no/such/run', '--merge', 'x']\ntry:\n    runpy.run_path('export.py', run_name='__main__')\n"
            "except SystemExit as end:\n    print(end.code, {'torch', 'transformers', 'numpy'} & set(sys.modules))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert told.stdout == "2 set()\n"
