"""Mistakes: each ends with status 2 in one line that names the flag; the table covers every flag of train.py."""
import json
import math
import re

import pytest

from conftest import ROOT
from flags import Run, UserError, check, escaped, read_lines, readable
from train import flags, parse_flags

BAD = """
--preset big            --model ./no/folder     --model=                --quant nf5             --quant=
--dtype fp8             --adapters both         --rank 0                --rank -4               --rank 1.5
--alpha 0               --alpha nan             --alpha -1              --data no/such.jsonl    --data=
--text_field=           --prefix_tokens 0       --prefix_tokens -3      --prefix_tokens many    --reasoning_tokens -1
--completion_tokens 0   --completion_tokens 2.5 --echo_tokens -1        --temperature -0.5      --temperature inf
--temperature warm      --batch_size 0          --batch_size four       --micro_batch -1        --micro_batch x
--num_steps 0           --num_steps -5          --num_steps 1e3         --g_lr -1               --g_lr nan
--g_lr=                 --d_lr inf              --d_lr fast             --beta1 1               --beta1 -0.1
--beta2 1.5             --beta2 nan             --grad_clip 0           --grad_clip nan         --g_reward logit
--d_scale 0             --d_scale -1            --kl_coef -0.1          --kl_coef nan           --ema_decay 1
--ema_decay 2           --adv_norm yes          --d_loss hinge          --d_loss_scale 0        --d_pool max
--d_warmup -1           --d_shuffle no          --floor_sequences -1    --featurizer=           --seeds -1
--seeds 1.5             --seed -1               --seed 99999999999999999999                     --device gpu
--device cuda:x         --out_dir=              --out_dir README.md     --save_every -1         --disc both
--d_model ./no/folder   --d_model=              --d_think_tokens -1     --d_think_tokens few    --d_kl_coef -1
--d_kl_coef inf         --disc=                 --resume no/such/run    --resume=               --g-lr 1
--stepz 3               --rnk 3                 --num_step 3            -g_lr 3                 --merge never
--grad_ckpt 2           --optim sgd             --optim=                --track mlflow          --prompt=
--deterministic yes
""".strip()
CASES = [case.split() for case in re.split(r"\s+(?=--?[a-z])", BAD)]
NEAREST = {"--g-lr": "--g_lr", "--rnk": "--rank", "--num_step": "--num_steps", "--stepz": "--num_steps", "-g_lr": "--g_lr"}


def mistake(words, monkeypatch, capsys):
    """The one line that train.py's flags end with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        parse_flags(words)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_a_mistake_is_one_line_that_names_its_flag(words, monkeypatch, capsys):
    preset = [] if "--resume" in words[0] else ["--preset", "demo"]
    name = words[0].split("=")[0]
    if name == "--resume":
        name = words[-1].removeprefix("--resume=") or "--resume"
    elif name in ("--adv_norm", "--d_shuffle", "--merge", "--grad_ckpt", "--deterministic"):  # switches take no word
        name = words[1]
    assert NEAREST.get(name, name) in mistake([*preset, *words], monkeypatch, capsys)


@pytest.mark.parametrize("words, named", [
    ("--num_steps 1 --batch_size 3", "--num_steps"), ("--d_loss pair --d_shuffle", "--d_shuffle"),
    ("--resume out/x --num_steps 9", "--num_steps"), (f"--out_dir {'x' * 300}", "--out_dir"), ("--g_lr 1e30", "--g_lr"),
    ("--resume out/x --no-adv_norm", "--no-adv_norm"), ("--resume out/x --micro_batch 2", "out/x"),
    ("--preset demo --g_reward azr", "--disc"), ("--preset demo --disc reason --g_reward neglog", "--g_reward"),
    ("--disc reason --d_loss pair", "--d_loss"), ("--d_model demo-small", "--adapters separate"),
    ("--preset demo --d_think_tokens 4", "--disc reason"), ("--track no_such", "--track")])
def test_combinations_that_cannot_work_are_one_line(words, named, monkeypatch, capsys):
    assert named in mistake(words.split(), monkeypatch, capsys)


def test_the_table_covers_every_flag_and_there_are_at_most_fifty():
    names = {action.option_strings[0] for action in flags([])._actions} - {"-h"}
    assert names <= {words[0].split("=")[0] for words in CASES} and len(names) <= 50


def test_help_reads_alone_and_shows_the_defaults_of_the_preset(capsys):
    for words, lr in (["--preset", "demo"], "0.002"), ([], "3e-05"):
        text = " ".join(flags(words).format_help().split())
        assert f"(default: {lr})" in text and "(default: None)" not in text and text.count("(default") > 45
    for action in flags([])._actions:
        assert not re.match(r"(of|as|and|which)\b", action.help), action.help


def test_other_names_of_dtypes_and_quantisation_are_understood(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    args = parse_flags("--preset demo --dtype float16 --quant 4bit --prompt plain".split())
    assert (args.dtype, args.quant, args.reasoning_tokens, args.echo_tokens) == ("fp16", "nf4", 0, 0)
    assert parse_flags("--preset demo --prompt plain --reasoning_tokens 3".split()).reasoning_tokens == 3


@pytest.mark.parametrize("words, named", [
    ("--d_scale 2", "--no-adv_norm"), ("--d_kl_coef 0.2", "--disc reason"), ("--d_kl_coef=0.1", "--disc reason"),
    ("--disc reason --d_pool mean", "--d_pool"), ("--disc reason --d_loss ce", "--d_loss"),
    ("--d_lr 0 --d_warmup 3", "--d_warmup 3"), ("--text_field body", "--data demo"),
    ("--text_field text --data {}/a.txt", "a.txt")])
def test_a_flag_without_effect_is_refused_where_it_is_typed(words, named, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "a.txt").write_text("text")
    parser = flags(["--preset", "demo", *words.format(tmp_path).split()])
    with pytest.raises(UserError):
        check(parser.parse_args(), parser.given())
    assert named in capsys.readouterr().err


def test_defaults_without_effect_are_no_mistake(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for words in ("", "--disc reason", "--d_lr 0", "--d_lr 0 --d_warmup 0", "--no-adv_norm --d_scale 3",
                  "--disc reason --d_kl_coef 0.1 --d_think_tokens 3", "--data tests --text_field body"):
        parser = flags(["--preset", "demo", *words.split()])
        check(parser.parse_args(), parser.given())


@pytest.mark.parametrize("flag", ["model", "d_model", "featurizer"])
@pytest.mark.parametrize("part", ["", "ckpt", "ckpt/generator"])
def test_a_run_in_the_place_of_a_model_names_tools_export(flag, part, tmp_path, monkeypatch, capsys):
    run = tmp_path / "a run"
    (run / "ckpt" / "generator").mkdir(parents=True)
    for file in ("args.json", "ckpt/state.pt", "ckpt/generator/adapter_config.json"):
        (run / file).write_text("{}")
    words = ["--preset", "demo", "--adapters", "separate", f"--{flag}", str(run / part)]
    assert f"python -m tools.export '{run}' --merge DIR" in mistake(words, monkeypatch, capsys)


def test_more_steps_for_a_run_name_the_way_on(monkeypatch, capsys):
    err = mistake(["--resume", "out/a run", "--num_steps", "80"], monkeypatch, capsys)
    assert "learning rate decays" in err and "tools.export 'out/a run' --merge DIR" in err and "--model DIR" in err


@pytest.mark.parametrize("content", ["garbage", "[]", "{}", '{"args": {}}', '{"args": {"model": "demo"}}', "batch_size=x",
                                     "num_steps=None", "device=None", "quant=nf5", "adv_norm=1.5", "rank=0",
                                     "g_lr=-1.5", "seed=True", "prompt=none", "prompt=\ud800{text}", "d_model=1.5"])
def test_a_run_with_a_damaged_args_file_is_one_line(content, tmp_path, monkeypatch, capsys):
    if "=" in content:
        key, value = content.split("=")
        value = dict(zip("None 1.5 -1.5 0 True".split(), (None, 1.5, -1.5, 0, True))).get(value, value)
        content = json.dumps({"args": {"preset": "demo", "model": "demo", "prompt": "{text}", key: value}})
    (tmp_path / "args.json").write_text(content)
    assert str(tmp_path) in mistake(["--resume", str(tmp_path)], monkeypatch, capsys)


def test_a_run_is_read_line_by_line_and_a_torn_last_line_is_dropped(tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"args": {"model": "demo", "prompt": "{text}"}}')
    (tmp_path / "metrics.jsonl").write_bytes('{"step": 0, "text": "é\u2028"}\n{"step": 1}\n{"step": "é'.encode()[:-1])
    run = Run(tmp_path)
    assert [row["step"] for row in run.metrics] == [0, 1] and run.rollouts == [] and run.result == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n[1]\n')
    with pytest.raises(UserError, match="2"):
        read_lines(tmp_path / "metrics.jsonl")
    assert "metrics.jsonl:2 is not a record" in capsys.readouterr().err


RECORDS = {
    "rollouts": dict(step=0, prefix="a", sep=" ", truth="b", completion=""), "metrics": dict(step=0, kl=None, mine="x"),
    "verdicts": dict(step=1, text="real", verdict=None, d_value=0.5), "result": dict(mauve=0.5, num_steps=3, mine=[1]),
    "mauve": dict(curve=[dict(step=1, mauve=0.5, interval=[0, 1])])}


@pytest.mark.parametrize("file, key, value", [
    *(("rollouts", "completion", value) for value in (..., None, 3, ["a"], {}, "\ud800", True)),
    *(("metrics", "step", value) for value in (..., None, "1", 1.0, True, -1, [1], 10 ** 30, math.nan)),
    ("rollouts", "prefix", ["a"]),
    *(("metrics", "kl", value) for value in ("0.1", [0.1], {"a": 1}, True, 10 ** 400)),
    ("rollouts", "truth", ""), ("rollouts", "reward", "high"), ("rollouts", "think", 3), ("floor", "think_closed", 1),
    ("verdicts", "d_value", None), ("verdicts", "d_value", 1.5), ("verdicts", "text", []), ("verdicts", "verdict", 1),
    ("result", "mauve", ...), ("result", "mauve", math.nan), ("result", "mauve_interval", [1]),
    ("result", "floor", "x"), ("result", "num_steps", "3"),
    ("mauve", "curve", {}), ("mauve", "curve", [1]), ("mauve", "curve", [{"step": 1}])])
def test_a_damaged_record_is_one_line_that_names_its_place(file, key, value, tmp_path, capsys):
    (tmp_path / "args.json").write_text('{"args": {"model": "demo", "prompt": "{text}"}}')
    whole = RECORDS.get(file, RECORDS["rollouts"])
    damaged = {k: v for k, v in (whole | {key: value}).items() if v is not ...}
    path = tmp_path / f"{file}.json{'l' * (file not in ('result', 'mauve'))}"
    path.write_text(json.dumps(whole) + "\n")
    assert getattr(Run(tmp_path), file) in (whole, [whole])
    path.write_text((json.dumps(whole) + "\n") * (path.suffix == ".jsonl") + json.dumps(damaged) + "\n")
    with pytest.raises(UserError):
        getattr(Run(tmp_path), file)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"{path}{':2' * (path.suffix == '.jsonl')} " in err and key in err


def test_what_a_message_repeats_cannot_move_the_terminal(capsys):
    with pytest.raises(SystemExit):
        raise UserError("--data \x1b[2J\x07\u202ereversed\nsecond line: no such file")
    printed = capsys.readouterr().err
    assert printed == "error: --data \\x1b[2J\\x07\\u202ereversed second line: no such file\n"
    assert escaped("Grüße, 東京") == "Grüße, 東京" and readable("a\tb\n\x1b[1m") == "a\tb\n\\x1b[1m"
