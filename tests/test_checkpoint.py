import pytest
import torch

from checkpoint import claim, restore, save
from discriminator import Discriminator
from model import adapter_parameters


def everything(model):
    head = Discriminator(32, "last")
    optimizers = {name: torch.optim.Adam(adapter_parameters(model, name), lr=0.1) for name in ("generator", "discriminator")}
    return head, optimizers


def test_what_is_saved_is_restored_and_later_lines_are_cut_off(tiny, tmp_path):
    model, _ = tiny
    head, optimizers = everything(model)
    for p in adapter_parameters(model, "generator"):
        p.grad = torch.ones_like(p)
    optimizers["generator"].step()
    torch.nn.init.normal_(head.linear.weight)
    log = open(tmp_path / "metrics.jsonl", "w")
    log.write("one\n")
    save(tmp_path, [model], {"head": head}, optimizers, {"step": 7, "baseline": 0.5}, [log])
    kept = [p.detach().clone() for p in adapter_parameters(model, "generator") + adapter_parameters(model, "discriminator")]
    log.write("two\n")
    log.close()

    optimizers["generator"].step()
    fresh, again = everything(model)
    assert restore(tmp_path, [model], {"head": fresh}, again) == {"step": 7, "baseline": 0.5}
    now = adapter_parameters(model, "generator") + adapter_parameters(model, "discriminator")
    assert all(torch.equal(p, q) for p, q in zip(now, kept))
    assert torch.equal(fresh.linear.weight, head.linear.weight)
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    moments = again["generator"].state_dict()["state"][0]
    assert moments["step"] == 1 and moments["exp_avg"].abs().sum() > 0


def test_a_second_checkpoint_replaces_the_first_and_leaves_nothing_beside(tiny, tmp_path):
    model, _ = tiny
    head, optimizers = everything(model)
    for step in (1, 2):
        save(tmp_path, [model], {"head": head}, optimizers, {"step": step}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert restore(tmp_path, [model], {"head": head}, optimizers)["step"] == 2


def test_a_crash_between_the_renames_leaves_the_older_checkpoint(tiny, tmp_path):
    model, _ = tiny
    head, optimizers = everything(model)
    save(tmp_path, [model], {"head": head}, optimizers, {"step": 1}, [])
    (tmp_path / "ckpt").rename(tmp_path / "ckpt.old")
    assert restore(tmp_path, [model], {"head": head}, optimizers)["step"] == 1


def test_a_folder_without_a_checkpoint_is_one_line(tiny, tmp_path, capsys):
    head, optimizers = everything(tiny[0])
    with pytest.raises(SystemExit) as error:
        restore(tmp_path, [tiny[0]], {"head": head}, optimizers)
    assert error.value.code == 2 and "--resume" in capsys.readouterr().err


def test_folders_are_numbered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [str(claim(None, "demo")) for _ in range(2)] == ["out/demo-1", "out/demo-2"]
    (tmp_path / "mine").mkdir()
    assert claim("mine", "demo").name == "mine"
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit):
        claim("file/run", "demo")
    assert "--out_dir" in capsys.readouterr().err
