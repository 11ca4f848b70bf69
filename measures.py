"""
Measures of texts: MAUVE with intervals, precision and recall, two-sample tests, diversity, a shortcut audit.

MAUVE (Pillutla et al., NeurIPS 2021, arXiv 2102.01454) with c = 5 and one cluster per ten texts, to the value that the
package mauve-text gives. What differs from it:
1. It has a standard error, by leaving out one text at a time, and a 95 % interval for MAUVE at this number of texts.
2. Two sets of texts for the same prefixes are compared: the difference of their scores, its interval and a verdict.
3. Any model can make the features, in batches; for gpt2 and bert names they equal the package's.
4. An empty text is a row of zeros, apart from all others. The package drops it, so a silent model would score high.

Letters: B or N texts, T tokens, H features, D principal ones, S seeds, K clusters, W mixture weights, P permutations.
"""
import collections
import difflib
import gzip
import random
import statistics

import numpy as np

from flags import UserError, first_line, read_json

MIN_TEXTS = 50  # texts that an interval needs


def mauve_of(truth, generated, seeds):
    """MAUVE of two feature matrices (N, H), as a dict: mauve, the mean over k-means seeds, and mauve_sd; interval, see
    `interval_of`; num_buckets, the number of clusters; per_seed.
    """
    labels = clusters(truth, generated, seeds)  # (S, 2, N)
    scores, without = jackknife(labels)  # (S,), (N,)
    return {"mauve": float(scores.mean()), "mauve_sd": float(scores.std()), "interval": interval_of(scores, without),
            "num_buckets": int(labels.max()) + 1, "per_seed": scores.tolist()}


def paired(truth, one, other, seeds):
    """MAUVE of `one` minus MAUVE of `other`: three matrices (N, H) whose i-th rows belong to one prefix."""
    return difference(*(jackknife(clusters(truth, part, seeds)) for part in (one, other)))


def jackknife(labels):
    """MAUVE for each seed (S,); and, for each i, its mean over the seeds with both i-th texts left out and the clusters
    kept (N,).
    """
    S, _, N = labels.shape
    one_hot, scores, without = np.eye(labels.max() + 1), np.zeros(S), np.zeros(N)  # (K, K), (S,), (N,)
    for s, pair in enumerate(labels):
        sides = [one_hot[part] for part in pair]  # (N, K) each
        scores[s] = histogram_mauve(*(side.mean(0) for side in sides))
        for i in range(0, N, 500):  # all at once would take memory by the square of N
            rest = ((side.sum(0) - side[i:i + 500]) / max(N - 1, 1) for side in sides)  # (n, K) each
            without[i:i + 500] += histogram_mauve(*rest) / S
    return scores, without


def standard_error(scores, without):
    """Standard error of the mean of `scores`: from texts, by the jackknife, and from k-means, unknown for one seed."""
    S, N = len(scores), len(without)
    return ((N - 1) * without.var() + (scores.var(ddof=1) / S if S > 1 else 0)) ** 0.5


def interval_of(scores, without):
    """95 % interval of the mean MAUVE over new samples of N texts; None below `MIN_TEXTS` texts. It is symmetric on the
    logit scale; docs/intervals.md has its coverage.
    """
    from scipy.special import expit, logit
    score = scores.mean().clip(1e-9, 1 - 1e-9)
    half = 1.96 * standard_error(scores, without) / (score * (1 - score))
    return expit(logit(score) + [-half, half]).tolist() if len(without) >= MIN_TEXTS else None


def difference(one, other):
    """Difference of two MAUVE, each as from `jackknife`: a dict of scores, of the two; difference; interval, 95 %;
    verdict, "higher", "lower", or "no clear difference" where the interval contains 0; num_sequences. Interval and
    verdict are None below `MIN_TEXTS` prefixes.
    """
    scores, without = (a - b for a, b in zip(one, other))  # (S,), (N,)
    found = {"scores": [float(one[0].mean()), float(other[0].mean())], "difference": float(scores.mean()),
             "interval": None, "verdict": None, "num_sequences": len(without)}
    if len(without) >= MIN_TEXTS:
        half = float(1.96 * standard_error(scores, without))
        low, high = found["interval"] = [found["difference"] - half, found["difference"] + half]
        found["verdict"] = "higher" if low > 0 else "lower" if high < 0 else "no clear difference"
    return found


def clusters(truth, generated, seeds):
    """The cluster of every text for each k-means seed (S, 2, N), as mauve-text finds it: one cluster per ten texts."""
    import faiss
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits
    labels = []
    with threadpool_limits(1):  # on busy cores more threads are 10 to 100 times slower
        data = normalize(np.vstack([generated, truth]))  # (2 N, H)
        pca = PCA().fit(data)
        D = int(np.argmax(pca.explained_variance_ratio_.cumsum() >= 0.9)) + 1
        data = pca.transform(data)[:, :D].astype(np.float32)  # (2 N, D)
        for seed in seeds:
            kmeans = faiss.Kmeans(D, max(2, round(len(truth) / 10)), niter=500, nredo=5, update_index=True,
                                  seed=seed + 2, min_points_per_centroid=1)  # 1: no warnings
            kmeans.train(data)
            labels.append(kmeans.index.search(data, 1)[1].reshape(2, -1)[::-1])  # (2, N)
    return np.stack(labels)  # (S, 2, N)


def histogram_mauve(p, q, c=5.0, num_points=25):
    """MAUVE of histograms (..., K): the area under the curve (exp(-c KL(q | r)), exp(-c KL(p | r))) with
    r = w p + (1 - w) q, over `num_points` weights w and its two ends, by trapezoids in x and in y: (...).
    """
    w = np.linspace(1e-6, 1 - 1e-6, num_points)[:, None]  # (W, 1)
    p, q = p[..., None, :], q[..., None, :]  # (..., 1, K) each
    mixed = w * p + (1 - w) * q  # (..., W, K)

    def curve(part):
        ratio = np.divide(part, mixed, out=np.ones_like(mixed), where=part > 0)  # (..., W, K)
        return np.exp(-c * (part * np.log(ratio)).sum(-1))  # (..., W)

    ends = [(0, 0)] * (p.ndim - 2) + [(1, 1)]
    x, y = (np.pad(side, ends, constant_values=edges) for side, edges in
            ((curve(q), (1, 0)), (curve(p), (0, 1))))  # (..., W + 2) each: x falls, y rises
    return 0.5 * (np.trapezoid(x, y) - np.trapezoid(y, x))  # (...)


# -----------------------------------------------------------------------------
# what one number hides: quality apart from diversity, and whether a difference is more than chance

def two_samples(truth, generated):
    """Precision, recall and two tests of feature matrices (N, H), as a dict; of at most 2,000 texts, because they need
    (2 N, 2 N) matrices. The i-th rows belong to one prefix, or the texts are independent.
    """
    from sklearn.preprocessing import normalize
    from threadpoolctl import threadpool_limits
    truth, generated = normalize(truth[:2000]), normalize(generated[:2000])  # (N, H) each, as MAUVE sees them
    with threadpool_limits(1):  # see `clusters`
        return precision_recall(truth, generated) | mmd_test(truth, generated) | classifier_test(truth, generated)


def precision_recall(truth, generated, k=3):
    """Precision: share of generated texts no farther from some real text than that text's k-th real neighbour. Recall:
    the same with the sides exchanged (Kynkaanniemi et al. 2019, arXiv 1904.06991; for texts arXiv 2402.10693). One odd
    generated text is far from all others and so "reaches" most real ones; coverage, the share of real texts with a
    generated one so near, is safe from that (Naeem et al. 2020, arXiv 2002.09797). An empty text is near none.
    """
    from scipy.spatial.distance import cdist

    def near(texts, known):  # (N, N)
        radius = np.sort(cdist(known, known))[:, min(k, len(known) - 1)]  # (N,); the nearest is the text itself
        return (cdist(texts, known) <= radius) & known.any(1) & texts.any(1)[:, None]  # an empty text is a row of zeros

    by_real, by_generated = near(generated, truth), near(truth, generated)
    return {"precision": float(by_real.any(1).mean()), "recall": float(by_generated.any(1).mean()),
            "coverage": float(by_real.any(0).mean())}


def mmd_test(truth, generated, num_permutations=999):
    """mmd: squared maximum mean discrepancy, unbiased (Gretton et al. 2012), with the kernel exp(-d^2 / m) of distances
    d, where m is the median of d^2. mmd_p: share that reaches it among the data and permutations, which exchange the
    two texts of random prefixes; at least 1 / (num_permutations + 1).
    """
    from scipy.spatial.distance import cdist
    N, both = len(truth), np.vstack([truth, generated])  # (2 N, H)
    squares = cdist(both, both, "sqeuclidean")  # (2 N, 2 N)
    kernel = np.exp(-squares / (np.median(squares[~np.eye(2 * N, dtype=bool)]) or 1))  # (2 N, 2 N)
    apart = kernel[:N, :N] + kernel[N:, N:] - kernel[:N, N:] - kernel[N:, :N]  # (N, N)
    np.fill_diagonal(apart, 0)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (num_permutations + 1, N))  # (P + 1, N)
    signs[0] = 1  # the texts as they are
    values = ((signs @ apart) * signs).sum(1) / (N * max(N - 1, 1))  # (P + 1,)
    return {"mmd": float(values[0]), "mmd_p": float((values >= values[0] - 1e-12).mean())}


def classifier_test(truth, generated):
    """A logistic regression on the texts of half the prefixes (Lopez-Paz and Oquab 2017, arXiv 1610.06545).
    classifier: share of the other prefixes whose real text it finds. classifier_p: by Wilcoxon's signed-rank test of
    its margins there, real minus generated, against "not above 0".
    """
    from scipy.stats import wilcoxon
    from sklearn import linear_model, pipeline, preprocessing
    half, other = np.array_split(np.random.default_rng(0).permutation(len(truth)), 2)
    regression = linear_model.LogisticRegression(C=0.01, max_iter=1000)
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    model.fit(np.vstack([truth[half], generated[half]]), np.repeat([1, 0], len(half)))
    margin = model.decision_function(truth[other]) - model.decision_function(generated[other])  # (N / 2,)
    return {"classifier": float((1 + np.sign(margin)).mean() / 2),
            "classifier_p": float(wilcoxon(margin, zero_method="zsplit", alternative="greater").pvalue)}


# -----------------------------------------------------------------------------
# texts to features

def check_featurizer(name):
    """Refuse a --featurizer that does not exist or cannot embed texts, from its config alone."""
    from model import load_config
    if name != "base" and load_config(name, "--featurizer").is_encoder_decoder:
        raise UserError(f"--featurizer {name} is an encoder-decoder; give an encoder, a decoder, or base")


def load_featurizer(name):
    """The model of a --featurizer, its tokenizer, and how it pools its states: mean, cls or last.

    A sentence-transformers model states its pooling; any other uses the last token's state, as mauve-text does.
    """
    from transformers import AutoModel
    from transformers.utils import cached_file
    from model import load_config, load_tokenizer, located
    (path, revision), config, tokenizer = located(name), load_config(name, "--featurizer"), load_tokenizer(
        name, "--featurizer")
    try:
        model, info = AutoModel.from_pretrained(path, revision=revision, config=config, use_safetensors=True,
                                                output_loading_info=True)
        if missing := sorted(key for key in info["missing_keys"] if "pooler" not in key):
            raise ValueError(f"{len(missing)} missing weights, {missing[0]} for one")
        file = cached_file(path, "1_Pooling/config.json", revision=revision,
                           _raise_exceptions_for_missing_entries=False)
        modes = [key for key, on in (read_json(file) if file else {"last": True}).items() if on is True]
        pool = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "last": "last",
                "pooling_mode_lasttoken": "last"}[" ".join(key for key in modes if key != "include_prompt")]
    except Exception as error:
        raise UserError(f"--featurizer {name} could not be loaded ({first_line(error)}); give a model id, a folder, or "
                        "base, the run's own base model") from None
    return model, tokenizer, pool


def featurizer(name, model, tokenizer, device, batch_size=32):
    """Return `features(texts) -> (N, H) float32`, which computes no text twice. With name base: the mean of the hidden
    states of `model`, adapters off; with a model id or folder: its states of at most 1024 tokens, see load_featurizer.
    """
    import torch
    from data import bos_ids, plain_encoder
    from model import hidden_states, micro_batches, pad, positions, without_adapters
    base, known, pool = name == "base", {}, "mean"  # known: text to features (H,)
    if base:
        encode, bos = plain_encoder(tokenizer), bos_ids(tokenizer)
    else:
        model, tokenizer, pool = load_featurizer(name)
        model.to(device).eval().config.use_cache = False
        limit = min(1024, tokenizer.model_max_length, positions(model))

    def ids_of(text):
        return bos + encode(text)[0] if base else tokenizer(text, truncation=True, max_length=limit).input_ids

    @torch.no_grad()
    def features(texts):
        new = {text: ids_of(text) for text in ("a", *texts) if text and text not in known}  # "a" gives H
        order = sorted(filter(new.get, new), key=lambda text: len(new[text]))  # a batch has texts of similar length
        for batch in micro_batches(order, batch_size):
            ids = pad([new[text] for text in batch], 0, device)  # (B, T)
            mask = pad([[1] * len(new[text]) for text in batch], 0, device)  # (B, T)
            with without_adapters(model):
                hidden = (hidden_states(model, ids) if base else
                          model(input_ids=ids, attention_mask=mask).last_hidden_state)  # (B, T, H)
            for text, n, h in zip(batch, mask.sum(1).tolist(), hidden.float()):
                known[text] = {"mean": h[:n].mean(0), "cls": h[0], "last": h[n - 1]}[pool].cpu().numpy().copy()  # (H,)
        found = np.stack([known.get(text, np.zeros_like(known["a"])) for text in texts])  # (N, H)
        if not np.isfinite(found).all() or len({*texts}) > 3 and (found == found[0]).all():
            raise UserError(f"--featurizer {name}: its features are not finite, or the same for all texts; the run is "
                            "whole, so measure it with: python evaluate.py RUN --featurizer OTHER")
        return found

    return features


# -----------------------------------------------------------------------------
# diversity, the shortcut audit, calibration

def ngrams(ids, n):
    return zip(*(ids[i:] for i in range(n)))


def distinct(sequences, n):
    """Distinct n-grams over all n-grams of lists of tokens, in [0, 1] (Li et al. 2016); None where there is none."""
    grams = collections.Counter(gram for ids in sequences for gram in ngrams(ids, n))
    return len(grams) / grams.total() if grams else None


def repetition(sequences, n=4):
    """Share of n-grams that occur earlier in the same sequence, over all sequences; None where there is none."""
    grams = [list(ngrams(ids, n)) for ids in sequences]
    total = sum(map(len, grams))
    return (total - sum(len(set(each)) for each in grams)) / total if total else None


def compression_ratio(texts):
    """Bytes of all texts over their gzipped bytes; repetition raises it (Shaib et al. 2024, arXiv 2403.00553)."""
    data = "\n".join(texts).encode(errors="replace")
    return len(data) / len(gzip.compress(data)) if data else None


def batch_metrics(samples, judged, ids):
    """Metrics of a sampled (rollout.Samples) and judged (discriminator.Judged) batch; ids: of its B completions."""
    roll, B = samples.roll, len(samples.texts)
    broken = {"broken": roll.broken.float().mean().item()} if roll.broken.any() else {}  # rows that overflowed
    return broken | dict(
        p_real=judged.p_real[judged.read].mean().item(), think_closed=roll.think_closed.float().mean().item(),
        num_think=sum(map(len, roll.think)) / B, num_completion=sum(samples.sizes) / B, distinct_2=distinct(ids, 2),
        repetition=repetition(ids))


def policy_metrics(stats, roll, with_kl):
    """Metrics of the sampled tokens (model.TokenStats); what needs the KL's pass is null without it.

    gap_kl: KL between sampler and learner, estimated as half the mean squared difference of their log-probs.
    sampler_corr: correlation of the sampler's and the learner's log-probs, each minus the learner's of the base.
    """
    import torch
    completion, gap = ~roll.thinking[roll.sampled], roll.logps[roll.sampled] - stats.logp  # (N,) each
    found = dict(entropy=stats.entropy.mean().item(), logp_gap=gap.abs().mean().item(),
                 gap_kl=gap.square().mean().item() / 2, kl=None, sampler_corr=None, coherence=None)
    if with_kl:
        change = stats.logp - stats.ref_logp  # (N,)
        found |= dict(kl=stats.kl.mean().item(), coherence=(stats.ref_logp[completion] > -10).float().mean().item(),
                      sampler_corr=torch.corrcoef(torch.stack([change, change + gap]))[0, 1].item())
    return found


def self_bleu(texts, num_texts=100):
    """Mean BLEU-4 of each text against all the others (Zhu et al. 2018), by sacrebleu, on a fixed sample: 0 to 1."""
    from sacrebleu.metrics import BLEU
    from data import words
    if len(texts) < 2:
        return None
    texts = [" ".join(words(text)) for text in texts]
    texts, bleu = random.Random(0).sample(texts, min(num_texts, len(texts))), BLEU(effective_order=True)
    return statistics.fmean(bleu.sentence_score(text, texts[:i] + texts[i + 1:]).score
                            for i, text in enumerate(texts)) / 100


def copy_rate(prefixes, completions):
    """Longest run of tokens that a completion shares with its prefix, over the completion's length: mean over pairs."""
    rates = [difflib.SequenceMatcher(None, prefix, ids, autojunk=False).find_longest_match().size / len(ids)
             for prefix, ids in zip(prefixes, completions) if ids]
    return statistics.fmean(rates) if rates else None


def lengths(sequences):
    """Mean length in tokens and its 10, 50 and 90 % quantiles."""
    n, sizes = len(sequences), sorted(map(len, sequences))
    return {"length_mean": statistics.fmean(sizes), **{f"length_p{q}": sizes[n * q // 100] for q in (10, 50, 90)}}


SHORTCUTS = {  # what a classifier sees of a text, for each aspect
    "length": lambda ids, text: {"tokens": len(ids)},
    "first 3 tokens": lambda ids, text: {f"{place}={i}": 1 for place, i in enumerate(ids[:3])},
    "last 3 tokens": lambda ids, text: {f"{place}={i}": 1 for place, i in enumerate(ids[-3:])},
    "tokenisation": lambda ids, text: {"characters": len(text) / len(ids), "distinct": len(set(ids)) / len(ids)},
    "white space": lambda ids, text: {"first": text[:1].isspace(), "last": text[-1:].isspace()} | {
        space: text.count(space) / max(len(text), 1) for space in (" ", "\n", "\t", "\r", "  ", "\n\n")},
}


def audit(real, generated, num_folds=5, num_permutations=19):
    """What a discriminator could know without reading: accuracy of a small classifier that sees one aspect of a text.

    real, generated: lists of (ids, text), as the discriminator reads them, the i-th of both for the same prefix.
    Logistic regression on ids, a tree of depth 3 on sizes; cross-validated, with both texts of a prefix in one fold.
    Returns a dict from "audit: " and the aspect to the accuracy. "audit: chance" is the highest accuracy of any aspect
    in 19 permutations, which exchange the two texts of random prefixes: only in 5 % of all cases would an aspect exceed
    it by chance.
    """
    from sklearn import feature_extraction, linear_model, model_selection as ms, tree
    from threadpoolctl import threadpool_limits
    N, rng, folds, chance, found = len(real), np.random.default_rng(0), ms.GroupKFold(num_folds), 0.0, {}
    groups, swaps = np.tile(np.arange(N), 2), rng.random((num_permutations, N)) < 0.5  # (2 N,), (P, N)
    for aspect, features in SHORTCUTS.items():
        rows, of_ids = [features(ids, text) for ids, text in [*real, *generated]], "3 tokens" in aspect
        rows = feature_extraction.DictVectorizer(sparse=of_ids).fit_transform(rows)  # (2 N, features)
        model = (linear_model.LogisticRegression(max_iter=1000) if of_ids else
                 tree.DecisionTreeClassifier(max_depth=3, random_state=0))

        def accuracy(swapped):
            labels = np.concatenate([~swapped, swapped])  # (2 N,)
            return float((ms.cross_val_predict(model, rows, labels, groups=groups, cv=folds) == labels).mean())

        with threadpool_limits(1):  # see `clusters`
            found[f"audit: {aspect}"] = accuracy(np.zeros(N, dtype=bool))
            chance = max(chance, *map(accuracy, swaps))
    return found | {"audit: chance": chance}


def reliability(chances, outcomes, num_bins=10):
    """Calibration of chances in [0, 1]: rows (low, high, count, mean chance, share that came true) of non-empty bins,
    and the expected calibration error, the mean distance of the last two.
    """
    bins = collections.defaultdict(list)
    for chance, true in zip(chances, outcomes):
        bins[min(int(chance * num_bins), num_bins - 1)].append((chance, bool(true)))
    rows = [(i / num_bins, (i + 1) / num_bins, len(pairs), *map(statistics.fmean, zip(*pairs)))
            for i, pairs in sorted(bins.items())]
    return rows, sum(row[2] * abs(row[3] - row[4]) for row in rows) / len(chances)
