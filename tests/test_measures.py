import random

import pytest

from measures import audit, copy_rate, distinct, lengths, reliability, repetition, self_bleu


def test_distinct_equals_hand_values():
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1, 1, 1]], 1) == 1 / 3
    assert distinct([[1], []], 2) is None


def test_repetition_counts_what_stood_before_in_the_same_text_only():
    assert repetition([[1, 2, 3, 1, 2, 3]], 2) == 2 / 5
    assert repetition([[1, 2, 3], [1, 2, 3]], 2) == 0
    assert repetition([[1, 1, 1, 1, 1, 1]], 4) == 2 / 3
    assert repetition([[1, 2]], 4) is None


def test_self_bleu_is_one_for_copies_and_small_for_strangers():
    assert self_bleu(["the same words in every text of this list"] * 5) == pytest.approx(1)
    rng = random.Random(0)
    strangers = [" ".join(f"{rng.randrange(10 ** 6)}" for _ in range(20)) for _ in range(20)]
    assert self_bleu(strangers) < 0.05 and self_bleu(["alone"]) is None


def test_self_bleu_equals_sacrebleu_by_hand():
    from sacrebleu import sentence_bleu
    texts = ["a b c d e f g", "a b c d x y z", "q r s t e f g"]
    wanted = sum(sentence_bleu(text, [t for t in texts if t != text]).score for text in texts) / 300
    assert self_bleu(texts) == pytest.approx(wanted)


def test_copy_rate_is_the_longest_common_run_over_the_length():
    assert copy_rate([[1, 2, 3, 4]], [[9, 2, 3, 8]]) == 2 / 4
    assert copy_rate([[1, 2], [1, 2]], [[1, 2], [3, 4]]) == 0.5
    assert copy_rate([[1]], [[]]) is None


def test_lengths_are_means_and_quantiles():
    assert lengths([[0] * n for n in range(101)]) == {"mean": 50, "p10": 10, "p50": 50, "p90": 90}


def texts(seed, count=200):
    """Random texts of 20 ids, spelt as letters: nothing in them tells one list from another."""
    rng = random.Random(seed)
    rows = [[rng.randrange(26) for _ in range(20)] for _ in range(count)]
    return [(ids, "".join(chr(97 + i) for i in ids)) for ids in rows]


def test_the_audit_finds_nothing_where_nothing_is():
    for name, (accuracy, error) in audit(texts(1), texts(2)).items():
        assert abs(accuracy - 0.5) < 4 * error, name


@pytest.mark.parametrize("name, plant", [
    ("length", lambda ids, text: (ids[:17], text[:17])),
    ("first 3 tokens", lambda ids, text: ([ids[0], 99, *ids[2:]], text)),
    ("last 3 tokens", lambda ids, text: ([*ids[:-1], 99], text)),
    ("tokenisation", lambda ids, text: (ids, text + text[:10])),
    ("white space", lambda ids, text: (ids, text[:5] + " " + text[5:])),
])
def test_the_audit_finds_a_planted_shortcut_and_no_other(name, plant):
    generated = [plant(*row) for row in texts(2)]
    told = audit(texts(1), generated)
    assert told[name][0] > 0.9
    alone = {"length": {"length"}, "first 3 tokens": {"first 3 tokens"}, "last 3 tokens": {"last 3 tokens"}}.get(name, {"tokenisation", "white space"})
    assert all(accuracy < 0.65 for other, (accuracy, _) in told.items() if other not in alone and other != "tokenisation")


def test_reliability_sets_shares_beside_chances_as_by_hand():
    rows, error = reliability([0.0, 0.1, 0.3, 0.5, 0.7, 1.0], [False, True, False, True, True, False], num_bins=2)
    assert [row[:3] for row in rows] == [(0.0, 0.5, 3), (0.5, 1.0, 3)]
    assert [row[3:] for row in rows] == [pytest.approx((0.4 / 3, 1 / 3)), pytest.approx((2.2 / 3, 2 / 3))]
    assert error == pytest.approx(0.5 * 0.2 + 0.5 * 0.2 / 3)
    assert reliability([0.72], [True]) == ([(0.7, 0.8, 1, 0.72, 1.0)], pytest.approx(0.28)) and reliability([], []) == ([], None)
