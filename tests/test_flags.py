"""Mistakes, one table: each ends with status 2 in one line that names the flag, before a model loads; the table covers every flag."""
import gzip
import json
import re
import runpy
import sys

import pytest

from conftest import ROOT
from flags import UserError, escaped

BAD = """
--preset big            --model ./no/folder     --model=                --quant nf5             --quant=                --dtype fp8
--adapters both         --rank 0                --rank -4               --rank 1.5              --alpha 0               --alpha nan
--alpha -1              --data no/such.jsonl    --data=                 --text_field=           --prefix_tokens 0       --prefix_tokens -3
--prefix_tokens many    --reasoning_tokens -1   --completion_tokens 0   --completion_tokens 2.5 --echo_tokens -1        --temperature -0.5
--temperature inf       --temperature warm      --batch_size 0          --batch_size four       --micro_batch -1        --micro_batch x
--num_steps 0           --num_steps -5          --num_steps 1e3         --g_lr -1               --g_lr nan              --g_lr=
--d_lr inf              --d_lr fast             --beta1 1               --beta1 -0.1            --beta2 1.5             --beta2 nan
--grad_clip 0           --grad_clip nan         --g_reward logit        --d_scale 0             --d_scale -1            --kl_coef -0.1
--kl_coef nan           --ema_decay 1           --ema_decay 2           --adv_norm yes          --d_loss hinge          --d_loss_scale 0
--d_pool max            --d_warmup -1           --d_shuffle no          --sft 1                 --floor_sequences -1    --featurizer=
--seeds 0               --seeds 1.5             --seed -1               --seed 99999999999999999999  --device gpu       --device cuda:x
--out_dir=              --out_dir README.md     --save_every -1         --keep -1               --keep all              --max_bad_steps -1
--init no/such/run      --init=                 --init tests            --init_ref adapter
--disc both             --d_model ./no/folder   --d_model=              --azr_t nan             --azr_t 1               --azr_t -0.1
--d_think_tokens -1     --d_think_tokens few    --d_kl_coef -1          --d_kl_coef inf         --d_value_detach no     --disc=
--d_value_coef -1       --d_value_coef nan
--resume no/such/run    --resume=               --g-lr 1                --stepz 3               --rnk 3                 --num_step 3            -g_lr 3
--merge never           --grad_ckpt 2           --optim sgd             --optim=
""".strip()
CASES = [case.split() for case in re.split(r"\s+(?=--?[a-z])", BAD)]


def started(words, monkeypatch, capsys):
    """Run train.py's flags in this process; they must end before anything is loaded."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setattr("model.load_model", None)  # whatever gets as far as a model fails otherwise
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    told = capsys.readouterr()
    return end.value.code, told.out, told.err


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_mistake_is_one_line_that_names_its_flag(words, monkeypatch, capsys):
    preset = [] if "--resume" in words[0] else ["--preset", "demo"]
    code, out, err = started([*preset, *words], monkeypatch, capsys)
    flag = {"--g-lr": "--g_lr", "--rnk": "--rank", "--num_step": "--num_steps", "--stepz": "--num_steps", "-g_lr": "--g_lr"}.get(words[0], words[0].split("=")[0])
    if words[0] == "--resume":
        flag = words[-1].removeprefix("--resume=") or "--resume"
    if words[0] in ("--adv_norm", "--d_shuffle", "--sft", "--merge", "--grad_ckpt", "--d_value_detach"):  # switches take no word: the word is what is unknown
        flag = words[1]
    assert code == 2 and out == "" and err.count("\n") == 1 and flag in err and "Traceback" not in err


@pytest.mark.parametrize("words, named", [
    ("--num_steps 1 --batch_size 3", "--num_steps"), ("--d_loss pair --d_shuffle", "--d_shuffle"), ("--resume out/x --num_steps 9", "--num_steps"),
    ("--preset writeup --sft", "--sft"), ("--data README.md", "--data"), (f"--out_dir {'x' * 300}", "--out_dir"), ("--g_lr 1e30", "--g_lr"),
    ("--resume out/x --no-adv_norm", "--no-adv_norm"), ("--resume out/x --micro_batch 2", "out/x"), ("--sft --d_shuffle", "--sft"),
    ("--preset demo --g_reward azr", "--disc reason"), ("--preset demo --disc reason --g_reward neglog", "--g_reward"), ("--disc reason --d_loss pair", "--d_loss"),
    ("--d_model demo-small", "--adapters separate"), ("--preset demo --d_think_tokens 4", "--disc reason"), ("--preset demo --d_value_detach", "--disc reason"),
])
def test_combinations_that_cannot_work_are_one_line(words, named, monkeypatch, capsys):
    code, out, err = started(words.split(), monkeypatch, capsys)
    assert code == 2 and out == "" and err.count("\n") == 1 and named in err


def test_the_table_covers_every_flag_and_is_long_enough():
    named = {words[0].split("=")[0] for words in CASES}
    flags = {f"--{name}" for name in re.findall(r'^add\("--(\w+)"', (ROOT / "train.py").read_text(), re.M)}
    assert flags <= named and len(CASES) >= 60


@pytest.mark.parametrize("content", ["garbage", "[]", "{}", '{"args": {}}', '{"args": {"preset": "demo"}}', "batch_size=x", "num_steps=None", "device=None",
                                     "quant=nf5", "adv_norm=1.5"])
def test_a_run_with_a_damaged_args_file_is_one_line(content, tmp_path, monkeypatch, capsys):
    good = dict(preset="demo", model="demo", quant="none", dtype="fp32", device="cpu", featurizer="base", seeds=5, num_steps=40)
    if "=" in content:
        key, value = content.split("=")
        content = json.dumps({"args": {**good, key: None if value == "None" else float(value) if value == "1.5" else value}})
    (tmp_path / "args.json").write_text(content)
    code, out, err = started(["--resume", str(tmp_path)], monkeypatch, capsys)
    assert code == 2 and out == "" and err.count("\n") == 1 and str(tmp_path) in err


def wrong_sources(folder):
    good = json.dumps({"text": "words and words " * 200}) + "\n"
    yield "empty.txt", b""
    yield "empty.jsonl", b""
    yield "blank.jsonl", b"\n\n  \n"
    yield "short.jsonl", b'{"text": "too short"}\n' * 50
    yield "other_field.jsonl", good.replace("text", "body").encode() * 60
    yield "not_json.jsonl", b"hello\n" * 60
    yield "not_objects.jsonl", b"[1, 2]\n" * 60
    yield "numbers.jsonl", b'{"text": 3}\n' * 60
    yield "no_gzip.jsonl.gz", good.encode()
    yield "torn.jsonl.gz", gzip.compress(good.encode() * 500)[:-40]
    yield "no_zstd.jsonl.zst", good.encode()
    yield "no.parquet", b"PAR1 no"
    yield "image.png", b"\x89PNG"


@pytest.mark.parametrize("number", range(13))
def test_a_source_that_cannot_be_used_is_one_line(number, tmp_path, capsys, encode):
    from data import windows
    name, content = list(wrong_sources(tmp_path))[number]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        windows(str(tmp_path / name), encode, 16, 16, 0)[0]
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and ("--data" in told or "--text_field" in told)


def test_what_a_message_repeats_cannot_move_the_terminal(capsys):
    with pytest.raises(SystemExit):
        raise UserError("--data \x1b[2J\x07\u202ereversed\nsecond line: no such file")
    told = capsys.readouterr().err
    assert told == "error: --data \\x1b[2J\\x07\\u202ereversed second line: no such file\n"
    assert escaped("Grüße, 東京") == "Grüße, 東京"
