"""Checkpoints of a small made-up run: what is saved, what is refused before anything is cut, and how a run ends."""
import copy
import errno
import json
import math
import os
import shutil
import sys
from argparse import Namespace
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save

import checkpoint
from flags import Run
from model import Player
from reward import Baseline

ADAM = dict(optim="adam", grad_clip=1.0, beta1=0.9, beta2=0.9, dtype="fp16")


@pytest.fixture
def run(tiny, tmp_path, request):
    """A run after its second step: its folder, players, judge, baseline and open files; no checkpoint yet."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "args.json").write_text(json.dumps({"args": {}, "command": ["x/train.py"]}))
    files = [open(out / f"{name}.jsonl", "a", 1) for name in ("metrics", "rollouts")]
    for file in files:
        file.write('{"step": 0}\n{"step": 1}\n')
    players = [Player(*tiny, name) for name in ("generator", "discriminator")]
    judge, baseline = torch.nn.Linear(8, 2), Baseline(0.9, True)
    for player, head in zip(players, ((), judge.parameters())):
        player.optimize(0.1, Namespace(**ADAM | getattr(request, "param", {})), head)
        player.activate()
        player.backward(sum(p.sum() for p in player.params))
        player.step(1.0)
    baseline.load_state_dict({"mean": 0.5, "variance": 0.25})
    yield out, players, judge, baseline, torch.nn.Module(), files  # the last but one: a stream without a place
    for file in files:
        file.close()


def ends(call, capsys, status=2):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as end:
        call()
    err = capsys.readouterr().err
    assert end.value.code == status and err.count("\n") == 1, err
    return err


def all_bytes(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sign(ckpt):
    """Make a checkpoint's digests fit its files again, as one who damages it on purpose would."""
    names = json.loads((ckpt / "digests.json").read_text())
    (ckpt / "digests.json").write_text(json.dumps({name: checkpoint.file_digest(ckpt / name) for name in names}))


def refused(out, rest, capsys):
    """The line that refuses a checkpoint, and changes nothing."""
    before = all_bytes(out)
    err = ends(lambda: checkpoint.restore(out, *rest), capsys)
    assert all_bytes(out) == before
    return err


@pytest.mark.parametrize("name", ["state.pt", "head.safetensors", "generator/adapter_model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone", "edited"])
def test_a_checkpoint_with_a_damaged_file_is_one_line(damage, name, run, capsys):
    out, *rest, files = run
    checkpoint.save(out, 2, *rest, files)
    files[1].write('{"step": 2}\n')
    file = out / "ckpt" / name
    if damage == "gone":
        file.rename(out / "x")
    else:
        file.write_bytes(file.read_bytes()[:-1] + (b"" if damage == "cut" else b"x"))
    assert ("there is no checkpoint" if file.name == "state.pt" and damage == "gone" else
            f"--resume {out}: ckpt cannot be used (") in refused(out, rest, capsys)


@pytest.mark.parametrize("what", ["", "torn", "absent"])
def test_damaged_digests_are_one_line(what, run, capsys):
    out, *rest = run
    checkpoint.save(out, 2, *rest)
    file = out / "ckpt" / "digests.json"
    file.unlink() if what == "absent" else file.write_text("{}" if not what else '{"state')
    assert "restore that file" in refused(out, rest[:-1], capsys) if what == "torn" else (
        "not those that were saved" in refused(out, rest[:-1], capsys))


LENGTHS = {  # what is done to the lengths to which a run's files are cut
    "a file of the user's": lambda s, out: s.update({str(out / "args.json"): 0}),
    "another file of the run": lambda s, out: s.update({"args.json": 0}),
    "a float": lambda s, out: s.update({"metrics.jsonl": 0.0}),
    "negative": lambda s, out: s.update({"rollouts.jsonl": -1}),
    "too long": lambda s, out: s.update({"rollouts.jsonl": 99}),
    "within a line": lambda s, out: s.update({"rollouts.jsonl": 5}),
    "a link": lambda s, out: ((out / "rollouts.jsonl").rename(out.parent / "x"),
                              (out / "rollouts.jsonl").symlink_to(out.parent / "x"))}


@pytest.mark.parametrize("damage", LENGTHS)
def test_only_a_runs_own_files_are_cut_and_only_after_a_line(damage, run, capsys):
    out, *rest, files = run
    checkpoint.save(out, 2, *rest, files)
    file = out / "ckpt" / "state.pt"
    saved = torch.load(file, weights_only=True)
    LENGTHS[damage](saved["lengths"], out)
    torch.save(saved, file)
    sign(out / "ckpt")
    files[1].write('{"step": 2}\n')
    assert f"--resume {out}: ckpt cannot be used (" in refused(out, rest, capsys)


@pytest.mark.parametrize("damage", ["size", "keys", "exchanged"])
def test_weights_of_another_model_are_one_line(damage, run, capsys):
    out, *rest, files = run
    checkpoint.save(out, 2, *rest, files)
    ckpt = out / "ckpt"
    file = ckpt / "generator" / "adapter_model.safetensors"
    weights = load_file(file)
    if damage == "exchanged":
        for old, new in (("generator", "x"), ("discriminator", "generator"), ("x", "discriminator")):
            (ckpt / old).rename(ckpt / new)
    else:
        key = next(iter(weights))
        file.write_bytes(save(weights | ({key: torch.zeros(7, 7)} if damage == "size" else {"x": torch.zeros(1)})))
        sign(ckpt)
    assert "ckpt cannot be used (" in refused(out, rest, capsys)


@pytest.mark.parametrize("run", [{}, {"optim": "adam8bit"}], indirect=True)
def test_what_is_saved_is_restored_and_later_lines_are_cut(run):
    out, players, judge, baseline, stream, files = run
    checkpoint.save(out, 2, players, judge, baseline, stream, files)
    whole, state = all_bytes(out), copy.deepcopy(players[0].optimizer.state[players[0].params[0]])
    files[0].write('{"step": 2}\n{"st')
    for player in players:
        for p in player.params:
            p.data += 1
        player.optimizer.state.clear()
    assert checkpoint.restore(out, players, judge, Baseline(0.9, True), stream) == 2
    restored = players[0].optimizer.state[players[0].params[0]]
    assert state.keys() == restored.keys()
    assert all(torch.equal(*map(torch.as_tensor, (state[key], restored[key]))) for key in state)
    files[0].seek(0, os.SEEK_END)
    checkpoint.save(out, 2, players, judge, baseline, stream, files)
    for name in ("state.pt", "digests.json"):  # torch numbers its storages anew
        whole.pop(out / "ckpt" / name)
    assert whole.items() <= all_bytes(out).items()


@pytest.mark.parametrize("what", ["removed", "moved", "replaced", "emptied"])
def test_a_run_whose_files_are_gone_ends_at_its_next_checkpoint(what, run, capsys):
    out, *rest = run
    checkpoint.save(out, 2, *rest)
    metrics, copied = out / "metrics.jsonl", out / "copy"
    if what == "replaced":  # an editor saves a file this way
        shutil.copy(metrics, copied)
    {"removed": lambda: shutil.rmtree(out), "moved": lambda: out.rename(out.with_name("elsewhere")),
     "replaced": lambda: copied.rename(metrics), "emptied": lambda: metrics.write_text("")}[what]()
    err = ends(lambda: checkpoint.save(out, 3, *rest), capsys)
    assert f"{metrics} was moved, deleted or replaced" in err and "--resume" in err
    assert out.exists() == (what in ("replaced", "emptied")) and not (out / "ckpt.new").exists()


@pytest.mark.parametrize("name", ["ckpt", "ckpt.old", "ckpt.new"])
def test_a_link_in_the_place_of_a_checkpoint_is_removed_and_what_it_names_stays(name, run, tmp_path):
    out, *rest, files = run
    checkpoint.save(out, 2, *rest, files)
    (out / "ckpt").rename(tmp_path / "disk")
    (out / name).symlink_to(tmp_path / "disk")
    before = all_bytes(tmp_path / "disk")
    for _ in range(3):
        checkpoint.save(out, 2, *rest, files)
        assert checkpoint.restore(out, *rest) == 2
    assert all_bytes(tmp_path / "disk") == before
    assert sorted(path.name for path in out.iterdir()) == ["args.json", "ckpt", "metrics.jsonl", "rollouts.jsonl"]


@pytest.mark.parametrize("saved", [False, True])
def test_a_full_disk_says_whether_there_is_a_checkpoint(saved, run, monkeypatch, capsys):
    out, *rest = run
    if saved:
        checkpoint.save(out, 2, *rest)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(checkpoint, "save_file", mock.Mock(side_effect=full))
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(sys, "excepthook", None)
    checkpoint.explain_failures(out)
    wanted = f"the last checkpoint is intact: python train.py --resume {out}" if saved else "there is no checkpoint yet"
    for end in (lambda: checkpoint.save(out, 3, *rest), lambda: sys.excepthook(OSError, full, None)):
        err = ends(end, capsys)
        assert "make room" in err and wanted in err


@pytest.mark.parametrize("where", ["weight", "moment", "head"])
def test_what_is_not_finite_is_not_saved(where, run, capsys):
    out, players, judge, *rest = run
    checkpoint.save(out, 2, players, judge, *rest)
    before, weight = all_bytes(out), players[1].params[0]
    spoilt = {"weight": weight, "moment": players[1].optimizer.state[weight]["exp_avg"], "head": judge.bias}[where]
    spoilt.data.view(-1)[0] = math.inf
    err = ends(lambda: checkpoint.save(out, 3, players, judge, *rest), capsys, status=1)
    assert "not finite" in err and "the last checkpoint is intact" in err and all_bytes(out) == before


def test_a_model_that_changed_since_the_run_began_is_refused_by_name(tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    args = Namespace(model=str(folder), d_model=None, featurizer="base", seeds=2)
    checkpoint.pin(args)
    made_with = copy.deepcopy(args.made_with)
    checkpoint.pin(args)  # a resumed run
    assert args.made_with == made_with and sorted(made_with[str(folder)]) == ["model", "tokenizer"]
    (folder / "tokenizer_config.json").write_text("{}")
    err = ends(lambda: checkpoint.pin(args), capsys)
    assert f"--model {folder}: files of its tokenizer have changed since this run began" in err


def test_edited_flags_are_refused(tmp_path, capsys):
    args = Namespace(model="demo", prompt="{text}", seed=0, resume=None)
    checkpoint.write_args(tmp_path, args, torch.device("cpu"))
    assert Run(tmp_path).args.seed == 0
    file = tmp_path / "args.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 5'))
    assert "was edited; a run keeps the flags that it began with" in ends(lambda: Run(tmp_path), capsys)
