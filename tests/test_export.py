"""Exports against the adapters on their base, in transformers and peft alone; and the mistakes a user makes."""
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from model import add_adapters, load_model
from tools import export

FLAGS = dict(adapters="separate", d_model=None, quant="none", dtype="fp32", reasoning_tokens=6, completion_tokens=8,
             temperature=0.7, prompt="<prefix>{text}\n\n<think>\n", data="/home/me/my data/x.txt", hub="hub:a/b")


def call(*words):
    export.main(export.check(export.flags().parse_args([*map(str, words)])))


def make_run(folder, model, rank, std=0.1, names=("generator", "discriminator"), **flags):
    """A folder like that of a finished run, with adapters at scale 2 / sqrt(rank) whose weights are not zero."""
    torch.manual_seed(rank)
    adapted = add_adapters(load_model(model, "none", "fp32", "cpu")[0], list(names), rank, 2.0)
    for p in (p for name, p in adapted.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(p, std=std)
    adapted.save_pretrained(folder / "ckpt")
    (folder / "args.json").write_text(json.dumps({
        "args": {"model": model, "rank": rank, "alpha": 2.0, **FLAGS, **flags}, "commit": "abc"}))
    (folder / "result.json").write_text(json.dumps({"mauve": 0.876, "fresh": None, "num_sequences": 500}))


@pytest.fixture(scope="module")
def runs(demo, tiny_folder, tmp_path_factory):
    """Runs on the tiny model (Q: quantised), on the demo's base (tied embedding), on a GPT-2 (transposed weights)."""
    out = tmp_path_factory.mktemp("runs")
    GPT2LMHeadModel(GPT2Config(vocab_size=4100, n_embd=32, n_layer=1, n_head=2)).save_pretrained(out / "gpt2")
    demo[1].save_pretrained(out / "gpt2")
    make_run(out / "A", tiny_folder, 4)
    make_run(out / "B", tiny_folder, 6)
    make_run(out / "Q", tiny_folder, 4, names=["shared"], adapters="shared", quant="nf4", dtype="bf16")
    make_run(out / "D", "demo", 4)
    make_run(out / "G", str(out / "gpt2"), 4)
    return out


def changes(folder, scale):
    """{weight: scale * B @ A} of an adapter, in fp32."""
    parts = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model.").replace("lora_A.", ""): scale * parts[key.replace("_A.", "_B.")] @ A
            for key, A in parts.items() if "lora_A" in key}


def assert_same_logits(model, other):
    ids = torch.tensor([[5, 6, 7, 8, 300, 2000]])  # (1, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4, rtol=0)


def assert_moved(folder, base, wanted):
    """The weights in a folder are those of the base plus what is wanted."""
    weights, before = load_file(folder / "model.safetensors"), load_model(base, "none", "fp32", "cpu")[0].state_dict()
    assert wanted.keys() <= weights.keys() and all(change.abs().max() > 0.01 for change in wanted.values())
    for key, weight in weights.items():
        torch.testing.assert_close(weight, before[key] + wanted.get(key, 0), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft corrects it
@pytest.mark.parametrize("name, player", [("A", "generator"), ("D", "discriminator"), ("G", "generator")])
def test_a_merged_model_has_the_logits_of_the_adapter_on_its_base(name, player, runs, tmp_path):
    path = runs / name if player == "generator" else runs / name / "ckpt" / player
    call(path, "--merge", tmp_path / "deep" / "merged")
    base, tokenizer = load_model(export.Run(runs / name).args.model, "none", "fp32", "cpu")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "merged")
    assert_same_logits(merged, PeftModel.from_pretrained(base, runs / name / "ckpt" / player))
    text = "<think> caf\u00e9 \n\n\t</think><|im_end|> def f(x): return 1e-5"
    assert AutoTokenizer.from_pretrained(tmp_path / "deep" / "merged")(text).input_ids == tokenizer(text).input_ids
    how = merged.generation_config
    assert (how.do_sample, how.temperature, how.top_k, how.top_p, how.eos_token_id[:2]) == (True, 0.7, 0, 1.0, [0, 2])
    assert merged.dtype == torch.float32 and len([*(tmp_path / "deep").iterdir()]) == 1


def test_a_sum_is_weighted_whatever_the_ranks_and_is_one_adapter_in_peft(runs, tiny_folder, tmp_path):
    other = runs / "B" / "ckpt" / "discriminator"
    words = "--combine", f"{runs / 'A'}:0.7", f"{other}:-1.5"
    call(*words, "--merge", tmp_path / "merged")
    call(*words, "--save_adapter", tmp_path / "sum")
    A, B = changes(runs / "A" / "ckpt" / "generator", 2 / 4 ** 0.5), changes(other, 2 / 6 ** 0.5)
    assert_moved(tmp_path / "merged", tiny_folder, {key: 0.7 * A[key] - 1.5 * B[key] for key in A})
    summed = PeftModel.from_pretrained(load_model(tiny_folder, "none", "fp32", "cpu")[0], tmp_path / "sum")
    assert_same_logits(summed, AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))


def test_ties_trims_elects_by_weighted_signs_and_averages(runs, tiny_folder, tmp_path):
    call("--combine", f"{runs / 'A'}:1", f"{runs / 'B'}:-2", "--method=ties", "--density=.3", "--merge", tmp_path / "o")
    A, B = changes(runs / "A" / "ckpt" / "generator", 1.0), changes(runs / "B" / "ckpt" / "generator", -4 / 6 ** 0.5)
    wanted = {}
    for key in A:
        n = A[key].numel() - int(0.3 * A[key].numel())
        kept = [x * (x.abs() > x.abs().flatten().kthvalue(n).values) for x in (A[key], B[key])]  # (O, I) each
        votes = [x.sign() == sum(kept).sign() for x in kept]
        wanted[key] = sum(x * vote for x, vote in zip(kept, votes)) / sum(vote.float() for vote in votes).clamp(min=1)
    assert_moved(tmp_path / "o", tiny_folder, wanted)


def test_changes_are_rounded_once_and_what_rounding_loses_is_printed(tiny_folder, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "bf16")
    make_run(tmp_path / "run", str(tmp_path / "bf16"), 4, std=1e-5, dtype="bf16")
    call(tmp_path / "run", "--merge", tmp_path / "merged")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "merged"))
    wanted = changes(tmp_path / "run" / "ckpt" / "generator", 2 / 4 ** 0.5)
    assert all(torch.equal(merged[key], (base[key].float() + wanted[key]).bfloat16()) for key in wanted)
    written = torch.cat([(merged[key].double() - base[key].double()).flatten() for key in wanted])
    cosine = torch.cosine_similarity(written, torch.cat([x.flatten().double() for x in wanted.values()]), dim=0)
    share, printed = written.count_nonzero() / written.numel(), capsys.readouterr().out
    assert 0.1 < cosine < 0.9 and f"the change has a cosine of {cosine:.3f}" in printed
    assert 0 < share < 1 and f"rounded to bf16, {share:.0%} of the changed weights still differ" in printed


def test_a_quantised_run_gets_a_note_and_the_card_is_whole_without_private_folders(runs, tmp_path, capsys):
    call(runs / "Q", "--merge", tmp_path / "merged")
    assert capsys.readouterr().out.startswith("note: trained on quantised weights")
    text = (tmp_path / "merged" / "README.md").read_text()
    wanted = "mauve 0.876", "data=x.txt", "hub=hub:a/b", "temperature=0.7", "+1 x shared of Q", FLAGS["prompt"]
    assert [words for words in wanted if words not in text] == []
    assert "/home" not in text and str(runs.parent) not in text and "base_model:" not in text


def test_a_card_has_no_markup_of_a_runs_files_and_says_k_of_n_steps(runs, tmp_path):
    bad, prompt, run = "<img src=x> [a](http://b) `c` ~~~~ \n# d", "{text}\n~~~~~\n<script>", tmp_path / "<b>run</b>"
    shutil.copytree(runs / "A", run)
    info = json.loads((run / "args.json").read_text()) | dict(device=bad, commit=bad, versions={bad: bad})
    info["args"] |= dict(num_steps=40, data=bad, prompt=prompt)
    (run / "args.json").write_text(json.dumps(info))
    (run / "result.json").write_text(json.dumps({"mauve": 0.5, "num_steps": 7, bad: 0.25}))
    call(run, "--save_adapter", tmp_path / "<i>new")
    text = (tmp_path / "<i>new" / "README.md").read_text()
    head, _, fenced = text.partition("\n~~~~~~\n")
    assert fenced == prompt + "\n~~~~~~\n" and "Scores after 7 of 40 steps: mauve 0.500" in head
    assert not any(part in head for part in ("<", "[a]", "`c`", "\n# d")) and head.count("`") == 2


@pytest.mark.parametrize("file, damage", [
    ("adapter_config.json", lambda weights: b"[]"), ("adapter_model.safetensors", lambda weights: save(weights)[:999]),
    ("adapter_model.safetensors", lambda weights: save({key: x * torch.nan for key, x in weights.items()})),
    ("adapter_model.safetensors", lambda weights: save({key: torch.zeros(2, 3) for key in weights}))])
def test_a_damaged_adapter_is_one_line_and_leaves_nothing(file, damage, runs, tmp_path, capsys):
    shutil.copytree(runs / "A", tmp_path / "A")
    folder = tmp_path / "A" / "ckpt" / "generator"
    (folder / file).write_bytes(damage(load_file(folder / "adapter_model.safetensors")))
    for target in ("--save_adapter", "--merge"):
        with pytest.raises(SystemExit, match="2"):
            call(tmp_path / "A", target, tmp_path / "new")
        assert capsys.readouterr().err.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["A"]


@pytest.mark.parametrize("words, message", [
    ("no/such/run --merge {new}", "no/such/run is not the folder of a run"),
    ("{empty} --merge {new}", "no checkpoint"),
    ("{A} --merge {empty}", "exists"),
    ("{A} --merge {empty}/args.json/deeper", "could not be written"),
    ("--combine {A}:nan --merge {new}", "PATH:WEIGHT"),
    ("--combine {A}:1 {D}:1 --merge {new}", "one base model"),
    ("--combine {A}:1 {B}:1 --method ties --save_adapter {new}", "full rank"),
    ("{A} --model demo --merge {new}", "cannot be loaded onto --model demo")])
def test_a_mistake_ends_in_one_line_and_leaves_nothing(words, message, runs, tmp_path, capsys):
    shutil.copytree(runs / "A", tmp_path / "empty", ignore=shutil.ignore_patterns("ckpt"))
    paths, before = {name: runs / name for name in "ABD"}, sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        call(*words.format(**paths, empty=tmp_path / "empty", new=tmp_path / "new").split())
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.rglob("*")) == before
