"""
Factorial designs at two levels: corners, aliases, effects with standard errors, and the point of steepest ascent.

Pure functions, after Box, Hunter & Hunter, Statistics for Experimenters, 2nd edition, chapters 5, 6 and 12. `sweep.py`
says what differs from the book.
"""
import collections
import itertools
import math
import statistics

LETTERS, ROMAN = "ABCDEFG", "0 I II III IV V VI VII".split()

Factor = collections.namedtuple("Factor", "name low centre high scale kind")  # scale: log or lin; kind: int or float
Design = collections.namedtuple("Design", "rows aliases generator resolution")
Effects = collections.namedtuple("Effects", "mean half se sd df curvature curvature_se")


def design(k):
    """The two-level design of k factors, in standard order: the first factor changes fastest, from -1.

    Full for k = 2. From 3 on the half fraction 2^(k-1): the last factor's column is the product of all others, so the
    defining relation is I = AB...K, an effect is aliased with that of all other letters, and the resolution is k
    (Box, Hunter & Hunter, chapter 6). aliases: each pair once, as {"A": "BC", ...}.
    """
    letters, free = LETTERS[:k], k - 1 if k > 2 else k
    rows = [[1 if number >> j & 1 else -1 for j in range(free)] for number in range(2 ** free)]
    if k == 2:
        return Design(rows, {}, None, "full")
    rows = [[*row, math.prod(row)] for row in rows]
    pairs = [("".join(some), "".join(x for x in letters if x not in some))
             for size in range(1, k // 2 + 1) for some in itertools.combinations(letters, size)]
    aliases = {some: rest for some, rest in pairs if len(some) < len(rest) or some < rest}
    return Design(rows, aliases, f"{letters[-1]} = {letters[:-1]}", ROMAN[k])


def effects(coded, y, centre=()):
    """Half-effects of orthogonal columns of +-1, with standard errors where there are replicates.

    coded: a row a corner; y: a corner's replicates, as a list, or its one response; centre: those of the centre.
    With m_i the mean of the r_i replicates of corner i out of n (Box, Hunter & Hunter, chapter 5):
    half_j = sum_i coded_ij m_i / n, se = sd / n sqrt(sum_i 1 / r_i), which is sd / sqrt(runs) when all r_i are equal;
    sd^2 = pooled variance within points, on df degrees of freedom. curvature: mean of the corners - mean of the centre.
    """
    y = [list(some) if isinstance(some, (list, tuple)) else [some] for some in y]
    means, n = [statistics.fmean(some) for some in y], len(y)
    half = [sum(row[j] * m for row, m in zip(coded, means)) / n for j in range(len(coded[0]))]
    mean, points = statistics.fmean(means), [*y, list(centre)] if centre else y
    df = sum(len(some) - 1 for some in points)
    squares = sum((x - statistics.fmean(some)) ** 2 for some in points for x in some)
    sd = math.sqrt(squares / df) if df else None
    of_mean = math.sqrt(sum(1 / len(some) for some in y)) / n  # in units of sd; that of a half-effect is the same
    return Effects(mean, half, sd * of_mean if df else None, sd, df,
                   mean - statistics.fmean(centre) if centre else None,
                   sd * math.sqrt(of_mean ** 2 + 1 / len(centre)) if df and centre else None)


def on_scale(f, value):
    return math.log(value) if f.scale == "log" else value


def unit(f, upwards):
    """A coded unit of a factor on its own scale: the interval on the side that one goes to."""
    return on_scale(f, f.high) - on_scale(f, f.centre) if upwards else on_scale(f, f.centre) - on_scale(f, f.low)


def coded_value(f, value):
    """Where a value lies in coded units: -1 at low, 0 at the centre, 1 at high."""
    away = on_scale(f, value) - on_scale(f, f.centre)
    return away / unit(f, away >= 0)


def steepest(factors, half, ascent_step=1.5):
    """The point of steepest ascent, not rounded: from the centre along the half-effects, the largest of which moves its
    factor `ascent_step` coded units and the others theirs in proportion (Box, Hunter & Hunter, chapter 12).
    """
    largest, values = max(map(abs, half)), []
    for f, h in zip(factors, half):
        away = ascent_step * h / largest
        value = on_scale(f, f.centre) + away * unit(f, away >= 0)
        values.append(math.exp(value) if f.scale == "log" else value)
    return values


def told(value):
    """A number as it is shown and handed on: 12 digits at most, no trailing zeros."""
    return f"{value:.12g}"


def clean(value, ladder=(1, 2, 3, 5)):
    """The number nearest to a positive value, by ratio, among `ladder` times powers of ten."""
    exponent = math.floor(math.log10(value))
    rungs = [float(f"{rung}e{power}") for power in (exponent, exponent + 1) for rung in ladder]
    return min(rungs, key=lambda rung: abs(math.log(rung / value)))


def rounded(f, value):
    """A factor's value made clean: on a log scale on the ladder or, where that moves it by more than half a coded unit,
    with the fewest digits that do not; on a linear one a multiple of about a fifth of a coded unit.
    """
    size = unit(f, value >= f.centre)
    if f.scale == "lin":
        grid = clean(size / 5, ladder=(1, 2, 5))  # without 3, whose multiples look like any number
        value = float(told(round(value / grid) * grid))
        return round(value) if f.kind is int else value
    tries = [clean(value), *(float(f"{value:.{digits}g}") for digits in range(2, 18))]
    value = next(x for x in tries if abs(math.log(x / value)) <= size / 2 + 1e-9)
    return max(round(value), 1) if f.kind is int else value


def ascend(factors, half, ascent_step=1.5):
    """The next point: that of steepest ascent in clean values, a number a factor."""
    return [rounded(f, value) for f, value in zip(factors, steepest(factors, half, ascent_step))]
