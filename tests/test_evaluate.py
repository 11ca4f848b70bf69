import json

import numpy as np
import pytest
import torch

from conftest import shared
from evaluate import evaluate, read_lines
from features import featurizer
from scores import bootstrap, histogram_mauve, mauve_of, paired


@pytest.mark.parametrize("name", ["gauss_shift0.0", "gauss_shift0.5", "gauss_shift2.0", "identical"])
def test_mauve_is_within_two_hundredths_of_the_stored_scores(name):
    wanted = json.loads(shared("mauve_reference/reference.json").read_text())[name]
    features = np.load(shared(f"mauve_reference/{name}.npz"))
    score = mauve_of(features["p"], features["q"], [25])
    assert abs(score["mauve"] - wanted["mauve"]) < 0.02 and abs(score["mauve_star"] - wanted["mauve_star"]) < 0.02
    assert score["num_buckets"] == wanted["num_buckets"]


def test_seeds_give_a_mean_and_a_spread():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(100, 8)), rng.normal(0.5, size=(100, 8))
    score = mauve_of(p, q, 3)
    assert len(score["per_seed"]) == 3 and score["mauve"] == pytest.approx(sum(score["per_seed"]) / 3)
    assert score["per_seed"][1] == mauve_of(p, q, [1])["mauve"]


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0])
def test_mauve_of_histograms_is_the_librarys(shift):
    from mauve import compute_mauve
    rng = np.random.default_rng(0)
    told = compute_mauve(p_features=rng.normal(size=(200, 8)), q_features=rng.normal(shift, size=(150, 8)), verbose=False)
    assert histogram_mauve(told.p_hist, told.q_hist) == pytest.approx(told.mauve, abs=1e-9)
    both = histogram_mauve(np.stack([told.p_hist, told.q_hist]), np.stack([told.q_hist, told.q_hist]))
    assert both == pytest.approx([told.mauve, 1.0], abs=1e-9)


def test_the_interval_is_as_wide_as_new_samples_are_apart():
    rng = np.random.default_rng(0)
    p, q = np.full(10, 0.1), np.array([0.28] + [0.08] * 9)
    again = [histogram_mauve(rng.multinomial(400, p) / 400, rng.multinomial(400, q) / 400) for _ in range(400)]
    moved = bootstrap(p, q, 400, 400)
    assert len(moved) == 400 and abs(moved.mean()) < 1e-9 and moved.std() == pytest.approx(np.std(again), rel=0.15)
    assert bootstrap(p, q, 4000, 4000).std() < 0.5 * moved.std()


def test_a_run_is_not_told_apart_from_itself_and_a_better_one_is_higher():
    rng = np.random.default_rng(0)
    truth, near, far = (rng.normal(shift, size=(200, 8)) for shift in (0, 0.1, 1.5))
    assert paired(truth, far, far, 20) == (0.0, [0.0, 0.0], "not told apart")
    difference, (low, high), verdict = paired(truth, near, far, 20)
    assert verdict == "higher" and 0 < low < difference < high
    assert paired(truth, far, near, 20)[2] == "lower"
    assert paired(truth, near, rng.normal(0.1, size=(200, 8)), 20)[2] == "not told apart"


def test_features_are_computed_once_and_a_torn_cache_is_made_anew(tmp_path):
    from features import cached
    asked = []

    def features(texts):
        asked.append(texts)
        return np.array([[len(text), 1.0] for text in texts])

    file = tmp_path / "features.npz"
    first = cached(features, file, "model")(["a", "bb", "a"])
    again = cached(features, file, "model")(["bb", "ccc"])
    assert asked == [["a", "bb"], ["ccc"]] and first.tolist() == [[1, 1], [2, 1], [1, 1]] and again.tolist() == [[2, 1], [3, 1]]
    cached(features, file, "another model")(["a"])
    assert asked[-1] == ["a"]
    file.write_bytes(file.read_bytes()[:50])
    assert cached(features, file, "model")(["a"]).tolist() == [[1, 1]] and asked[-1] == ["a"]


def test_base_features_are_means_over_positions_whatever_the_batch(demo):
    model, tokenizer = demo
    texts = ["Return the sum.", "A longer text, which is padded against: nothing of it may reach the others.", "x"]
    features = featurizer("base", model, tokenizer, "cpu")(texts)
    for text, row in zip(texts, features):
        ids = torch.tensor([tokenizer(text).input_ids])
        np.testing.assert_allclose(row, model.model(ids).last_hidden_state[0].mean(0).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_other_featurizers_equal_what_mauve_text_computes_itself(tmp_path, demo):
    from mauve import compute_mauve
    from transformers import GPT2Config, GPT2Model
    torch.manual_seed(0)
    folder = str(tmp_path / "gpt2-random")
    GPT2Model(GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=2, n_positions=1024)).save_pretrained(folder)
    demo[1].save_pretrained(folder)
    words = "alpha beta gamma delta epsilon zeta eta theta".split()
    rng = np.random.default_rng(0)
    p, q = ([" ".join(rng.choice(part, size=rng.integers(3, 40))) for _ in range(60)] for part in (words, words[:5]))
    features = featurizer(folder, None, None, "cpu")
    theirs = compute_mauve(p_text=p, q_text=q, featurize_model_name=folder, seed=25, verbose=False)
    ours = mauve_of(features(p), features(q), [25])
    assert 0 < theirs.mauve < 1 and ours["mauve"] == pytest.approx(theirs.mauve, rel=1e-4)


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_lines(tmp_path / "a.jsonl") == [{"a": 1}, {"a": 2}] and read_lines(tmp_path / "none.jsonl") == []


def make_run(folder, generated, truths, floor=None):
    folder.mkdir()
    for name, texts in (("rollouts", generated), ("floor", floor or [])):
        rows = [dict(prefix=f"p{len(truths) - len(texts) + i}", truth=truths[len(truths) - len(texts) + i], completion=text) for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_that_copies_the_truth_scores_one_and_nonsense_scores_the_floor(tmp_path, demo, encode, capsys):
    from data import windows
    stream = windows("demo", encode, 16, 24, 0)
    truths = [stream[p].truth for p in range(200)]
    run = make_run(tmp_path / "run", truths[:195] + [""] * 5, truths, floor=["!!! 0 0 0 " * 4] * 100)
    result = evaluate(run, "base", 2, *demo, "cpu")
    assert result["mauve"] > 0.9 and result["floor"] < 0.1 and result["ceiling"] > 0.7 and result["num_sequences"] == 100
    assert result["num_empty"]["mauve"] == 5 and result["num_empty"]["truth"] == 0
    assert 0 <= result["mauve_interval"][0] < result["mauve"] <= result["mauve_interval"][1] <= 1
    assert json.loads((run / "mauve.json").read_text())["scores"]["mauve"]["mauve_star"] > 0.9
    assert "fewer than 2000" in capsys.readouterr().out


def test_a_run_that_falls_silent_scores_low(tmp_path, demo, encode):
    from data import windows
    stream = windows("demo", encode, 16, 24, 0)
    truths = [stream[p].truth for p in range(100)]
    result = evaluate(make_run(tmp_path / "run", [""] * 90 + truths[90:], truths), "base", 2, *demo, "cpu")
    assert result["mauve"] < 0.2 and result["num_sequences"] == 100 and result["num_empty"]["mauve"] == 90


@pytest.mark.parametrize("line", [b"not json", b"\xff\xfe", b"[1]", b'{"prefix": "p", "completion": "c"}'])
def test_a_damaged_line_is_named(line, tmp_path, demo, capsys):
    run = make_run(tmp_path / "run", ["x"] * 9, ["y"] * 9)
    rows = (run / "rollouts.jsonl").read_bytes().split(b"\n")
    (run / "rollouts.jsonl").write_bytes(b"\n".join([*rows[:3], line, *rows[3:]]))
    with pytest.raises(SystemExit) as error:
        evaluate(run, "base", 2, *demo, "cpu")
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_a_run_without_enough_sequences_is_one_line(tmp_path, demo, capsys):
    with pytest.raises(SystemExit) as error:
        evaluate(make_run(tmp_path / "run", ["x"], ["y"]), "base", 2, *demo, "cpu")
    assert error.value.code == 2 and "--resume" in capsys.readouterr().err
