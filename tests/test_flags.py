"""Mistakes: each ends with status 2 in one line that names the flag; the table covers every flag of train.py."""
import json
import math
import re

import pytest

from conftest import ROOT
from flags import Run, UserError, escaped, readable
from train import flags, parse_flags

BAD = """
--preset big            --model ./no/folder     --quant nf5             --dtype fp8             --adapters both
--rank 0                --rank 1.5              --alpha nan             --alpha -1              --data no/such.jsonl
--text_field=           --prefix_tokens many    --reasoning_tokens -1   --completion_tokens 2.5 --echo_tokens -1
--temperature inf       --batch_size four       --micro_batch -1        --num_steps 1e3         --g_lr -1
--g_lr=                 --d_lr inf              --beta1 1               --beta2 nan             --grad_clip 0
--g_reward gan          --d_scale 0             --kl_coef -0.1          --ema_decay 1           --adv_norm yes
--d_loss hinge          --d_loss_scale 0        --d_pool max            --d_warmup -1           --d_shuffle no
--floor_sequences -1    --featurizer=           --seeds 1.5             --disc both             --d_think_tokens few
--device cuda:x         --out_dir README.md     --save_every -1         --d_model ./no/folder   --d_kl_coef inf
--resume no/such/run    --resume=               --merge never           --grad_ckpt 2           --optim sgd
--tis -1                --sampler gpu:8000
--ce_coef inf
--track mlflow          --prompt=               --deterministic yes     --seed 99999999999999999999
--g-lr 1                -g_lr 3                 --stepz 3               --rnk 3
""".strip()
CASES = [case.split() for case in re.split(r"\s+(?=--?[a-z])", BAD)]
NEAREST = {"--g-lr": "--g_lr", "-g_lr": "--g_lr", "--rnk": "--rank", "--stepz": "--num_steps"}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # a parser changes what Ctrl-C does


def mistake(words, capsys):
    """The one line that train.py's flags end with."""
    with pytest.raises(SystemExit) as end:
        parse_flags(words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_mistake_is_one_line_that_names_its_flag(words, capsys):
    preset = [] if "--resume" in words[0] else ["--preset", "demo"]
    switches = "--adv_norm", "--d_shuffle", "--merge", "--grad_ckpt", "--deterministic"  # they take no word
    name = words[1] if words[0] in ("--resume", *switches) else words[0].split("=")[0]
    assert NEAREST.get(name, name) in mistake([*preset, *words], capsys)


@pytest.mark.parametrize("words, named", [
    ("--num_steps 1 --batch_size 3", "--num_steps"), ("--d_loss pair --d_shuffle", "--d_shuffle"),
    (f"--out_dir {'x' * 300}", "--out_dir"), ("--g_lr 1e30", "--g_lr"), ("--track no_such", "--track"),
    ("--resume out/x --no-adv_norm", "--no-adv_norm"), ("--resume out/x --micro_batch 2", "out/x"),
    ("--g_reward azr", "--disc"), ("--disc reason --g_reward neglog", "--g_reward"),
    ("--disc reason --d_loss pair", "--d_loss"), ("--adapters shared --d_model demo-small", "--adapters separate"),
    ("--d_think_tokens 4", "--disc reason"),
    # without effect
    ("--d_scale 2", "--no-adv_norm"), ("--d_kl_coef=0.1", "--disc reason"), ("--disc reason --d_pool mean", "--d_pool"),
    ("--d_lr 0 --d_warmup 3", "--d_warmup 3"),
    ("--sampler http://a --temperature 3", "--temperature 3"), ("--sampler http://a --merge", "--merge"), ("--text_field body", "--data demo"),
    ("--text_field text --data README.md", "README.md")])
def test_combinations_that_cannot_work_or_have_no_effect_are_one_line(words, named, capsys):
    preset = [] if "--resume" in words else ["--preset", "demo"]
    assert named in mistake([*preset, *words.split()], capsys)


@pytest.mark.parametrize("words", [
    "", "--disc reason", "--d_lr 0 --d_warmup 0", "--no-adv_norm --d_scale 3",
    "--disc reason --d_kl_coef 0.1 --d_think_tokens 3", "--data tests --text_field body"])
def test_defaults_without_effect_are_no_mistake(words):
    parse_flags(["--preset", "demo", *words.split()])


def test_the_table_covers_every_flag_and_there_are_at_most_sixty():
    names = {action.option_strings[0] for action in flags([])._actions} - {"-h"}
    assert names <= {words[0].split("=")[0] for words in CASES} and len(names) <= 60


def test_help_reads_alone_and_shows_the_defaults_of_the_preset():
    for words, lr in (["--preset", "demo"], "0.002"), (["--preset", "small"], "0.0005"), ([], "3e-05"):
        text = " ".join(flags(words).format_help().split())
        assert f"(default: {lr})" in text and "(default: None)" not in text and text.count("(default") > 45
    for action in flags([])._actions:
        assert not re.match(r"(of|as|and|which)\b", action.help), action.help


def test_other_names_of_dtypes_and_quantisation_are_understood():
    args = parse_flags("--preset demo --dtype float16 --quant 4bit --prompt plain".split())
    assert (args.dtype, args.quant, args.reasoning_tokens, args.echo_tokens) == ("fp16", "nf4", 0, 0)
    assert parse_flags("--preset demo --prompt plain --reasoning_tokens 3".split()).reasoning_tokens == 3


@pytest.mark.parametrize("flag", ["model", "d_model", "featurizer"])
@pytest.mark.parametrize("part", ["", "ckpt", "ckpt/generator"])
def test_a_run_in_the_place_of_a_model_names_tools_export(flag, part, tmp_path, capsys):
    run = tmp_path / "a run"
    (run / "ckpt" / "generator").mkdir(parents=True)
    for file in ("args.json", "ckpt/state.pt", "ckpt/generator/adapter_config.json"):
        (run / file).write_text("{}")
    words = ["--preset", "demo", "--adapters", "separate", f"--{flag}", str(run / part)]
    assert f"python -m tools.export '{run}' --merge DIR" in mistake(words, capsys)


def test_more_steps_for_a_run_name_the_way_on(capsys):
    err = mistake(["--resume", "out/a run", "--num_steps", "80"], capsys)
    assert "learning rate decays" in err and "tools.export 'out/a run' --merge DIR" in err and "--model DIR" in err


ARGS = {"model": "demo", "prompt": "{text}"}


@pytest.mark.parametrize("content", [
    "garbage", "[]", "{}", '{"args": {}}', '{"args": {"model": "demo"}}',
    *(json.dumps({"args": ARGS | {key: value}}) for key, value in (("rank", 0), ("g_lr", -1.5)))])
def test_a_run_with_a_damaged_args_file_is_one_line(content, tmp_path, capsys):
    (tmp_path / "args.json").write_text(content)
    assert str(tmp_path) in mistake(["--resume", str(tmp_path)], capsys)


def test_a_run_is_read_line_by_line_and_a_torn_last_line_is_dropped(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps({"args": ARGS}))
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 0, "text": "é\u2028"}\n{"step": 1}\n{"step": "é'.encode()[:-1])
    run = Run(tmp_path)
    assert [row["step"] for row in run.metrics] == [0, 1] and run.rollouts == [] and run.result == {}


RECORDS = {
    "rollouts": dict(step=0, prefix="a", sep=" ", truth="b", completion=""), "metrics": dict(step=0, kl=None, mine="x"),
    "verdicts": dict(step=1, text="real", verdict=None, d_value=0.5), "result": dict(mauve=0.5, num_steps=3, mine=[1]),
    "mauve": dict(curve=[dict(step=1, mauve=0.5, interval=[0, 1])])}


@pytest.mark.parametrize("file, key, value", [
    *(("rollouts", "completion", value) for value in (..., None, 3, {}, "\ud800", True)),
    *(("metrics", "step", value) for value in (..., "1", 1.0, True, -1, [1], 10 ** 30, math.nan)),
    *(("metrics", "kl", value) for value in ("0.1", [0.1], True, 10 ** 400)),
    ("rollouts", "truth", ""), ("rollouts", "reward", "high"), ("rollouts", "think", 3), ("floor", "think_closed", 1),
    ("verdicts", "d_value", None), ("verdicts", "d_value", 1.5), ("verdicts", "verdict", 1),
    ("result", "mauve", ...), ("result", "mauve", math.nan), ("result", "mauve_interval", [1]),
    ("result", "num_steps", "3"), ("mauve", "curve", {}), ("mauve", "curve", [1]), ("mauve", "curve", [{"step": 1}])])
def test_a_damaged_record_is_one_line_that_names_its_place(file, key, value, tmp_path, capsys):
    (tmp_path / "args.json").write_text(json.dumps({"args": ARGS}))
    whole = RECORDS.get(file, RECORDS["rollouts"])
    damaged = {k: v for k, v in (whole | {key: value}).items() if v is not ...}
    one = file in ("result", "mauve")  # a single record; the others are files of lines
    path = tmp_path / f"{file}.json{'' if one else 'l'}"
    path.write_text(json.dumps(whole) + "\n")
    assert getattr(Run(tmp_path), file) == (whole if one else [whole])
    path.write_text(("" if one else json.dumps(whole) + "\n") + json.dumps(damaged) + "\n")
    with pytest.raises(UserError):
        getattr(Run(tmp_path), file)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path}{'' if one else ':2'} " in err and key in err


def test_what_a_message_repeats_cannot_move_the_terminal(capsys):
    with pytest.raises(SystemExit):
        raise UserError("--data \x1b[2J\x07\u202ereversed\nsecond line: no such file")
    printed = capsys.readouterr().err
    assert printed == "error: --data \\x1b[2J\\x07\\u202ereversed second line: no such file\n"
    assert escaped("Grüße, 東京") == "Grüße, 東京" and readable("a\tb\n\x1b[1m") == "a\tb\n\\x1b[1m"
