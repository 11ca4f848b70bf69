"""
What texts look like, beside MAUVE: diversity, repetition, copying, lengths, and what gives the generated ones away. And
whether chances hold.

Pure functions of texts and of lists of token ids. `audit` asks what a discriminator could know without reading: a small
classifier sees one side of the texts alone (how long, how they begin, how they end, how they are cut into tokens, their
white space), and 50 % means that this side tells nothing.
"""
import collections
import difflib
import random
import statistics


def ngrams(ids, n):
    return zip(*(ids[i:] for i in range(n)))


def distinct(sequences, n):
    """Distinct n-grams over all n-grams of lists of tokens, in [0, 1] (Li et al. 2016); None where there is none."""
    grams = collections.Counter(gram for ids in sequences for gram in ngrams(ids, n))
    return len(grams) / grams.total() if grams else None


def repetition(sequences, n=4):
    """Share of n-grams that stood before in the same sequence, over all sequences; None where there is none."""
    total, seen = 0, 0
    for ids in sequences:
        grams = list(ngrams(ids, n))
        total, seen = total + len(grams), seen + len(grams) - len(set(grams))
    return seen / total if total else None


def self_bleu(texts, num_texts=100):
    """Mean BLEU-4 of each text against all the others (Zhu et al. 2018), by sacrebleu, of a fixed sample: 0 to 1."""
    from sacrebleu.metrics import BLEU
    texts = random.Random(0).sample(texts, min(num_texts, len(texts)))
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)
    scores = [bleu.sentence_score(text, texts[:i] + texts[i + 1:]).score for i, text in enumerate(texts)]
    return statistics.fmean(scores) / 100


def copy_rate(prefixes, completions):
    """Longest run of tokens that a completion shares with its prefix, over the completion's length: mean over pairs."""
    rates = [difflib.SequenceMatcher(None, prefix, ids, autojunk=False).find_longest_match().size / len(ids)
             for prefix, ids in zip(prefixes, completions) if ids]
    return statistics.fmean(rates) if rates else None


def lengths(sequences):
    """Mean length in tokens and its 10, 50 and 90 % quantiles."""
    sizes = sorted(map(len, sequences))
    quantiles = {f"p{q}": sizes[min(len(sizes) * q // 100, len(sizes) - 1)] for q in (10, 50, 90)}
    return {"mean": statistics.fmean(sizes), **quantiles}


# -----------------------------------------------------------------------------
# the shortcut audit

def reliability(chances, came_true, num_bins=10):
    """Whether chances in [0, 1] hold: rows of (lowest, highest, count, mean chance, share that came true), one a bin
    that is not empty; and the expected calibration error, the mean distance of the last two over all (None of nothing).
    """
    bins = collections.defaultdict(list)
    for chance, true in zip(chances, came_true):
        bins[min(int(chance * num_bins), num_bins - 1)].append((chance, bool(true)))
    rows = [(i / num_bins, (i + 1) / num_bins, len(pairs), *map(statistics.fmean, zip(*pairs)))
            for i, pairs in sorted(bins.items())]
    total = sum(count for _, _, count, _, _ in rows)
    return rows, sum(count * abs(mean - share) for _, _, count, mean, share in rows) / total if rows else None


def ends(part):
    """Features of the first (or last) three ids of a text: which id stands where."""
    return {f"{place}={i}": 1 for place, i in enumerate(part)}


def spelling(ids, text):
    """Features of how a text is cut into tokens, not of which ones they are."""
    size = max(len(ids), 1)
    return {"characters a token": len(text) / size, "distinct": len(set(ids)) / size}


def white_space(text):
    """Features of the white space of a text alone."""
    size = max(len(text), 1)
    counts = {repr(c): text.count(c) / size for c in (" ", "\n", "\t", "\r", "  ", "\n\n")}
    return {**counts, "at its start": text[:1].isspace(), "at its end": text[-1:].isspace()}


SHORTCUTS = {
    "length": lambda ids, text: {"tokens": len(ids)},
    "first 3 tokens": lambda ids, text: ends(ids[:3]),
    "last 3 tokens": lambda ids, text: ends(ids[-3:]),
    "tokenisation": spelling,
    "white space": lambda ids, text: white_space(text),
}


def audit(real, generated, num_folds=5):
    """Accuracy, in [0, 1], of a classifier that sees one side of a text alone; 0.5 is a coin.

    real, generated: lists of (ids, text), as the discriminator reads them, the i-th of both for the same prefix.
    Logistic regression where the features are ids, a tree of depth 3 where they are sizes; cross-validated, a prefix
    never in training and test at once. Returns name to (accuracy, its standard error if it were a coin).
    """
    import numpy as np
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.tree import DecisionTreeClassifier
    labels = np.repeat([1, 0], [len(real), len(generated)])  # (N,)
    groups = np.concatenate([np.arange(len(real)), np.arange(len(generated))])  # (N,)
    told = {}
    for name, features in SHORTCUTS.items():
        rows = [features(ids, text) for ids, text in [*real, *generated]]
        model = LogisticRegression(max_iter=1000) if "3 tokens" in name else DecisionTreeClassifier(max_depth=3)
        guesses = cross_val_predict(make_pipeline(DictVectorizer(sparse="3 tokens" in name), model), rows, labels,
                                    groups=groups, cv=GroupKFold(num_folds))  # (N,)
        told[name] = float((guesses == labels).mean()), 0.5 / len(labels) ** 0.5
    return told
