import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from conftest import shared
from flags import UserError
from measures import (audit, check_featurizer, classifier_test, compression_ratio, copy_rate, distinct, featurizer,
                      histogram_mauve, interval_of, jackknife, lengths, mauve_of, mmd_test, paired, precision_recall,
                      reliability, repetition, self_bleu, standard_error, two_samples)

TEXTS = ["Return the sum.", "A longer text: " + "its padding must reach no other text, " * 6, "x"]


@pytest.mark.parametrize("name", ["gauss_shift0.0", "gauss_shift0.5", "gauss_shift2.0", "identical"])
def test_mauve_is_the_librarys_and_near_the_stored_scores(name):
    from mauve import compute_mauve
    stored = json.loads(shared("mauve_reference/reference.json").read_text())[name]
    p, q = np.load(shared(f"mauve_reference/{name}.npz")).values()
    theirs, ours = compute_mauve(p_features=p, q_features=q), mauve_of(p, q, [25])
    assert abs(ours["mauve"] - theirs.mauve) < 1e-12 and abs(ours["mauve"] - stored["mauve"]) < 0.02
    assert ours["num_buckets"] == theirs.num_buckets


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("texts", [np.zeros((40, 8)), np.random.default_rng(0).normal(size=(32, 8))])
def test_equal_texts_score_one(texts):
    assert mauve_of(texts, texts, range(2))["mauve"] == pytest.approx(1, abs=1e-12)


def test_the_jackknife_leaves_out_one_text_of_both_at_a_time():
    labels = np.random.default_rng(0).integers(0, 5, (2, 2, 60))  # (S, 2, N)

    def mauve(pair):
        return histogram_mauve(*(np.bincount(part, minlength=5) / part.size for part in pair))

    scores, without = jackknife(labels)
    assert scores == pytest.approx([mauve(pair) for pair in labels])
    for i in (0, 59):
        assert without[i] == pytest.approx(np.mean([mauve(np.delete(pair, i, 1)) for pair in labels]))


def test_the_standard_error_is_the_spread_of_new_samples_and_the_interval_is_symmetric_in_the_logit():
    rng, shares = np.random.default_rng(0), (np.full(10, 0.1), [0.28] + [0.08] * 9)
    draws = [jackknife(np.stack([rng.choice(10, 400, p=p) for p in shares])[None]) for _ in range(60)]
    errors = [standard_error(*draw) for draw in draws]
    assert np.mean(errors) == pytest.approx(np.std([scores[0] for scores, _ in draws]), rel=0.2)
    scores, without = np.array([0.5, 0.6, 0.7]), np.linspace(0.59, 0.61, 101)
    error = (100 * 0.02 ** 2 / 12 * 102 / 100 + 0.01 / 3) ** 0.5  # texts, and k-means
    assert standard_error(scores, without) == pytest.approx(error)
    low, high = (np.log(x / (1 - x)) - np.log(0.6 / 0.4) for x in interval_of(scores, without))
    assert -low == pytest.approx(high) == pytest.approx(1.96 * error / 0.24)
    assert interval_of(scores, without[:49]) is None


def test_a_comparison_is_the_difference_of_the_scores_and_needs_50_prefixes():
    rng = np.random.default_rng(0)
    truth, near, also_near, far = (rng.normal(shift, size=(200, 8)) for shift in (0, 0.1, 0.1, 1.5))
    same, better = paired(truth, far, far, range(3)), paired(truth, near, far, range(3))
    scores = [mauve_of(truth, texts, range(3))["mauve"] for texts in (near, far)]
    assert better["scores"] == scores and better["difference"] == pytest.approx(scores[0] - scores[1])
    assert better["verdict"] == "higher" and 0 < better["interval"][0] < better["difference"] < better["interval"][1]
    assert same["difference"] == 0 and same["interval"] == [0, 0] and same["verdict"] == "no clear difference"
    assert paired(truth, far, near, range(3))["verdict"] == "lower"
    assert paired(truth, near, also_near, range(3))["verdict"] == "no clear difference"
    few = paired(truth[:49], near[:49], far[:49], range(3))
    assert few["interval"] is few["verdict"] is mauve_of(truth[:49], near[:49], [0])["interval"] is None
    assert few["difference"] > 0 and few["num_sequences"] == 49


def test_base_features_are_means_over_positions_whatever_the_batch(demo):
    features = featurizer("base", *demo, "cpu")([*TEXTS, ""])
    for text, row in zip(TEXTS, features):
        states = demo[0].model(torch.tensor([demo[1](text).input_ids])).last_hidden_state[0].detach()  # (T, H)
        np.testing.assert_allclose(row, states.mean(0), rtol=1e-4, atol=1e-4)
    assert not features[3].any()  # an empty text


@pytest.mark.parametrize("kind, config", [(GPT2Model, GPT2Config), (BertModel, BertConfig)])
def test_other_features_are_those_of_mauve_text_whatever_the_batch(kind, config, demo, tmp_path):
    from mauve.utils import featurize_tokens_from_model, get_model, get_tokenizer
    torch.manual_seed(0)
    folder = str(tmp_path / config.model_type)  # mauve-text knows gpt2 and bert by their names
    kind(config(vocab_size=4100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                max_position_embeddings=64)).save_pretrained(folder)
    demo[1].save_pretrained(folder)
    tokenizer = get_tokenizer(folder)
    ids = [tokenizer.encode(text, return_tensors="pt", truncation=True, max_length=64) for text in TEXTS]
    theirs = featurize_tokens_from_model(get_model(folder, tokenizer, -1), ids, batch_size=1)
    np.testing.assert_allclose(featurizer(folder, None, None, "cpu")(TEXTS), theirs, rtol=1e-4, atol=1e-5)
    (tmp_path / config.model_type / "1_Pooling").mkdir()  # sentence-transformers saves it there
    for mode, pool in (("mean_tokens", lambda h: h.mean(0)), ("cls_token", lambda h: h[0])):
        pooling = {"word_embedding_dimension": 32, f"pooling_mode_{mode}": True, "pooling_mode_max_tokens": False}
        (tmp_path / config.model_type / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
        states = [get_model(folder, tokenizer, -1)(x).last_hidden_state[0].detach() for x in ids]  # (T, H) each
        np.testing.assert_allclose(featurizer(folder, None, None, "cpu")(TEXTS), [pool(h) for h in states], rtol=1e-4,
                                   atol=1e-5)


@pytest.mark.parametrize("factor", [0.0, float("nan")])
def test_features_that_say_nothing_are_refused(factor, demo, tmp_path):
    model = BertModel(BertConfig(vocab_size=4100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    for p in model.parameters():
        p.data *= factor
    for part in (model, demo[1]):
        part.save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        featurizer(str(tmp_path), None, None, "cpu")([*TEXTS, "more", "and more"])
    assert "not finite, or the same for all texts" in error.value.message


def test_a_featurizer_that_does_not_fit_is_one_line(tmp_path, capsys):
    config, own = BertConfig(hidden_size=32).to_dict(), {"AutoConfig": "own.Config"}  # no code from the hub is run
    for change in ({"is_encoder_decoder": True}, {"model_type": "own", "auto_map": own}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        if change:
            with pytest.raises(UserError):
                check_featurizer(str(tmp_path))
    check_featurizer(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")  # pickles are not read
    with pytest.raises(UserError):
        featurizer(str(tmp_path), None, None, "cpu")
    assert capsys.readouterr().err.count("error: --featurizer") == 3


def test_measures_equal_hand_values():
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4 and distinct([[1, 1, 1]], 1) == 1 / 3
    assert repetition([[1, 2, 3, 1, 2, 3]], 2) == 2 / 5 and repetition([[1, 2, 3], [1, 2, 3]], 2) == 0
    assert distinct([[1], []], 2) is repetition([[1, 2]], 4) is None
    assert copy_rate([[1, 2, 3, 4]], [[9, 2, 3, 9]]) == 0.5 and copy_rate([[1]], [[]]) is None
    same, apart = self_bleu(["a b c d e"] * 3), self_bleu(["a b c d e", "f g h i j", "k l m n o"])
    assert abs(same - 1) < 1e-9 and apart < 0.1 and self_bleu(["alone"]) is None
    assert lengths([[0] * n for n in range(101)]) == dict(length_mean=50, length_p10=10, length_p50=50, length_p90=90)
    rows, error = reliability([0.0, 0.1, 0.3, 0.5, 0.7, 1.0], [False, True, False, True, True, False], num_bins=2)
    assert rows == [(0.0, 0.5, 3, pytest.approx(0.4 / 3), 1 / 3), (0.5, 1.0, 3, pytest.approx(2.2 / 3), 2 / 3)]
    assert error == pytest.approx(0.5 * 0.2 + 0.5 * 0.2 / 3)


def test_precision_and_recall_of_a_hand_worked_line():
    truth, generated = np.array([[1.0], [2], [3], [11]]), np.array([[1.5], [1.6], [1.7], [8]])
    # radii to the 2nd neighbour: real 2, 1, 2, 9, and 8 is 3 from 11; generated 0.2, 0.1, 0.2, 6.4: 2, 3 and 11 are near
    assert precision_recall(truth, generated, k=2) == dict(precision=1, recall=3 / 4, coverage=1)
    empty = np.array([[0.0], [1.6], [40], [60]])  # its first row is that of an empty text, which is near none
    assert precision_recall(truth, empty, k=2) == dict(precision=1 / 4, recall=1, coverage=3 / 4)
    assert precision_recall(truth, truth) == dict(precision=1, recall=1, coverage=1)


def test_mmd_is_the_double_sum_and_its_p_value_counts_all_exchanges():
    truth, generated = np.random.default_rng(0).normal([[[0.0]], [[1.0]]], size=(2, 6, 3))
    both = np.vstack([truth, generated])
    squares = ((both[:, None] - both) ** 2).sum(-1)
    width = np.median(squares[~np.eye(12, dtype=bool)])

    def mmd(x, y):
        k = lambda a, b: np.exp(-((a - b) ** 2).sum() / width)  # noqa: E731
        return np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
                        for i in range(6) for j in range(6) if i != j])

    exchanges = [np.array([[n >> i & 1] for i in range(6)], dtype=bool) for n in range(64)]
    values = [mmd(np.where(one, generated, truth), np.where(one, truth, generated)) for one in exchanges]
    found = mmd_test(truth, generated, num_permutations=20_000)
    assert found["mmd"] == pytest.approx(mmd(truth, generated))
    assert found["mmd_p"] == pytest.approx(np.mean(np.array(values) >= values[0] - 1e-12), abs=0.01)


def test_p_values_are_uniform_where_nothing_differs_and_small_where_something_does():
    from scipy.stats import kstest
    rng = np.random.default_rng(0)
    same = [two_samples(*rng.normal(1, size=(2, 100, 8))) for _ in range(200)]
    shifted = rng.normal(size=(2, 100, 8)) + [[[0]], [[0.6]]]
    for name in ("mmd_p", "classifier_p"):
        assert kstest([found[name] for found in same], "uniform").pvalue > 0.001, name
        assert two_samples(*shifted)[name] < 0.01, name
    assert classifier_test(np.ones((40, 2)), np.ones((40, 2))) == dict(classifier=0.5, classifier_p=pytest.approx(0.5))
    assert classifier_test(*shifted)["classifier"] > 0.8


def test_repetitive_texts_compress_better():
    assert compression_ratio(TEXTS * 9) > 2 * compression_ratio(TEXTS) and compression_ratio([""]) is None


@pytest.mark.parametrize("name, plant", [
    ("length", lambda ids, text: (ids[:17], text[:17])),
    ("first 3 tokens", lambda ids, text: ([ids[0], 99, *ids[2:]], text)),
    ("last 3 tokens", lambda ids, text: ([*ids[:-1], 99], text)),
    ("white space", lambda ids, text: (ids, text[:5] + " " + text[5:])),
])
def test_the_audit_finds_a_planted_shortcut_and_no_other(name, plant):
    rows = np.random.default_rng(0).integers(0, 26, (400, 20)).tolist()
    texts = [(ids, "".join(chr(97 + i) for i in ids)) for ids in rows]
    found = audit(texts[:200], [plant(*text) for text in texts[200:]])
    assert found.pop(f"audit: {name}") > 0.9
    assert 0.5 < found.pop("audit: chance") < 0.5 + 4 * 0.5 / 200 ** 0.5  # both texts of a prefix change sides
    for other in {"audit: length", "audit: first 3 tokens", "audit: last 3 tokens"} & found.keys():
        assert abs(found[other] - 0.5) < 4 * 0.5 / 400 ** 0.5, other  # the aspects left out may see a plant as well
