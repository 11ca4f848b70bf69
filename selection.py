"""
Which traces are worth teaching: what one quotes of its truth, what it lifts, which are kept, and a report of it.

Pure functions on texts and numbers, for traces.py. A scored window: prefix, sep, truth, n_truth, logp_empty, repeated,
candidates; a candidate: source, run, think, closed (whether the thinking ended by itself), n_think, quote, logp.
"""
import collections
import statistics
import unicodedata

LIMITS = "min_lift max_quote min_think max_think max_reuse".split()  # flags that only select
FILTERS = "repeated length quote lift reuse beaten".split()  # why a candidate is dropped, in this order
SHORTEST = 4  # tokens of the truth in a row that are a quote
PLAIN = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014\u2212", "''\"\"---")  # quotation marks, dashes, minus


# -----------------------------------------------------------------------------
# what a trace quotes of its truth

def words(text):
    """A text but for its white space: two that agree in this are duplicates."""
    return " ".join(text.split())


def letters(text):
    """A text without white space, case and typographic variants, as quotes are looked for."""
    return "".join(unicodedata.normalize("NFKD", text).translate(PLAIN).casefold().split())


def num_quoted(encode, prefix, truth, think, shortest=SHORTEST):
    """How many tokens of the truth stand in a trace, in runs of `shortest` or more, and not in the prefix, which it may
    quote. Many short quotes give as much away as a long one; shorter runs than these are chance.

    The truth is cut into tokens as plain text. The trace may break the same words into other tokens, so a run of the
    truth's tokens is quoted where its letters stand in the trace, whatever the case and the white space between them.
    Tokens of white space alone do not count; a number is one token, as some tokenizers give each digit one.
    """
    pieces, last = [""], 0
    for start, end in encode(truth)[1]:  # the tokens of one character share its span: it is counted once
        text = truth[max(start, last):end]
        last = max(last, end)
        if text.isdigit() and pieces[-1].isdigit():  # no white space between: one number
            pieces[-1] += letters(text)
        else:
            pieces.append(letters(text))
    pieces = [*filter(None, pieces)]
    said, known, quoted = letters(think), letters(prefix), set()
    for start in range(len(pieces) - shortest + 1):
        run = "".join(pieces[start:start + shortest])
        if run in said and run not in known:
            quoted.update(range(start, start + shortest))
    return len(quoted)


# -----------------------------------------------------------------------------
# which traces are kept

def lift(window, candidate):
    return candidate["logp"] - window["logp_empty"]


def fault(window, candidate, limits):
    """The filter that a candidate does not pass, or None."""
    n, most = candidate["n_think"], limits["max_think"]
    if n < limits["min_think"] or most and n > most:
        return "length"
    if limits["max_quote"] and candidate["quote"] > limits["max_quote"]:
        return "quote"
    return None if lift(window, candidate) > limits["min_lift"] else "lift"  # this way round nan is dropped as well


def select(scored, limits):
    """(traces, number of candidates dropped by each filter): of each window the candidate with the most lift.

    One text serves at most max_reuse windows, those in which it has the most lift; others take their next best.
    """
    dropped = dict.fromkeys(FILTERS, 0) | {"repeated": sum(window["repeated"] for window in scored)}
    passed, best, uses = [], {}, collections.Counter()
    for number, window in enumerate(scored):
        for candidate in window["candidates"]:
            why = fault(window, candidate, limits)
            if why:
                dropped[why] += 1
            else:
                passed.append((lift(window, candidate), number, candidate))
    for _, number, candidate in sorted(passed, key=lambda row: -row[0]):
        text = words(candidate["think"])
        if number in best:
            dropped["beaten"] += 1
        elif limits["max_reuse"] and uses[text] >= limits["max_reuse"]:
            dropped["reuse"] += 1
        else:
            best[number] = candidate
            uses[text] += 1
    return [trace(scored[number], best[number]) for number in sorted(best)], dropped


def trace(window, candidate):
    """One line of traces.jsonl."""
    row = window | candidate | {"lift": lift(window, candidate)}
    return {key: row[key] for key in
            "prefix sep truth think closed source lift logp logp_empty n_think n_truth run".split()}


def spread(lifts):
    """Mean, quantiles and share above 0 of some lifts."""
    ranked = sorted(lifts)
    quantiles = {f"p{q}": ranked[min(len(ranked) * q // 100, len(ranked) - 1)] for q in (10, 25, 75, 90)}
    return dict(number=len(lifts), mean=statistics.fmean(lifts), median=statistics.median(lifts), **quantiles,
                positive=sum(x > 0 for x in lifts) / len(lifts))


def report(scored, traces, dropped):
    """How many candidates from which source, their lift before and after the filters, and what each filter took."""
    before, after = {"all": []}, {"all": []}
    rows = [(before, candidate["source"], lift(window, candidate)) for window in scored
            for candidate in window["candidates"]]
    for lifts, source, value in rows + [(after, kept["source"], kept["lift"]) for kept in traces]:
        lifts["all"].append(value)
        lifts.setdefault(source, []).append(value)
    told = {name: {source: spread(values) for source, values in lifts.items() if values}
            for name, lifts in (("before", before), ("after", after))}
    return dict(num_windows=len(scored), num_candidates=len(rows) + dropped["repeated"], num_traces=len(traces),
                dropped=dropped, lift=told)


def print_report(out, told):
    rows = [(f"{name}, {source}", row) for name, rows in told["lift"].items() for source, row in rows.items()]
    numbers = [told[f"num_{what}"] for what in ("traces", "windows", "candidates")]
    print("\n{}: {} traces for {} windows, of {} candidates".format(out, *numbers))
    print("  dropped: " + ", ".join(f"{name} {count}" for name, count in told["dropped"].items()))
    print(f"  {'lift, nats a token':22s}" + "".join(f"{column:>9s}" for column in (rows[0][1] if rows else ())))
    for label, row in rows:
        print(f"  {label:22s}" + "".join(f"{x:9d}" if isinstance(x, int) else f"{x:9.3f}" for x in row.values()))
