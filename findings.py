"""
What a sweep found: effects, the next point and the climb, as a report in Markdown and as a picture.

rows: one a run, a dict of id, seed, values, mauve, mauve_sd, floor, status. The mathematics is in design.py.
"""
import statistics

from design import LETTERS, ascend, coded_value, design, effects, steepest, told
from flags import UserError

OWN = "id seed mauve mauve_sd floor status".split()  # columns of sweep.csv that are no factors


def point_told(factors, values):
    return " ".join(f"{f.name}={told(value)}" for f, value in zip(factors, values))


def table(head, rows):
    """A Markdown table, its columns aligned; numbers at 5 digits, None as a dash."""
    def cell(x):
        return f"{x:.5g}" if isinstance(x, float) else "-" if x is None else str(x)

    cells = [[cell(x) for x in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [f"| {' | '.join(text.ljust(width) for text, width in zip(row, widths))} |" for row in cells]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:], ""]


def by_place(factors, rows):
    """The MAUVEs of the corners, a list each; of the centre, a list; and of other points, (values, list) each."""
    plan, centre, others = design(len(factors)).rows, [], {}
    corners = [[] for _ in plan]
    for row in (row for row in rows if row["mauve"] is not None):
        coded = [round(coded_value(f, value), 6) for f, value in zip(factors, row["values"])]
        place = (corners[plan.index(coded)] if coded in plan else others.setdefault(tuple(row["values"]), [])
                 if any(coded) else centre)
        place.append(row["mauve"])
    return corners, centre, list(others.items())


def remarks(e, centre):
    """What Effects say beside the effects themselves."""
    curved = f", centre {statistics.fmean(centre):.5g}, curvature {e.curvature:.5g}" if centre else ""
    curved += f" +- {e.curvature_se:.5g}" if e.curvature_se is not None else ""
    spread = (f"Standard deviation of a run {e.sd:.5g} on {e.df} degrees of freedom." if e.df else
              "No point has replicates, so there are no standard errors (--replicates).")
    return ["A half-effect is the change of MAUVE for one coded unit.",
            f"Mean of the corners {e.mean:.5g}{curved}. {spread}", ""]


def report(factors, rows, ascent_step):
    """sweep.md in two parts: the design with its runs, and what follows from them."""
    plan, (corners, centre, others) = design(len(factors)), by_place(factors, rows)
    k, names = len(factors), [f.name for f in factors]
    head = [f"# Sweep of {', '.join(names)}", "", "## Design", ""]
    head += ["2^2, full: no effect is aliased.", ""] if k == 2 else [
        f"2^({k}-1), a half fraction of resolution {plan.resolution}, generator {plan.generator}. Aliases, effects "
        f"that it cannot tell apart: {', '.join(f'{one} = {other}' for one, other in plan.aliases.items())}.", ""]
    head += table(["", "factor", "low", "centre", "high", "scale"],
                  [[letter, f.name, told(f.low), told(f.centre), told(f.high), f.scale]
                   for letter, f in zip(LETTERS, factors)])
    head += table(["run", "seed", *names, *OWN[2:]],
                  [[row["id"], row["seed"], *map(told, row["values"]), *(row[key] for key in OWN[2:])] for row in rows])
    if not all(corners):
        empty = ["(" + " ".join(f"{x:+d}" for x in row) + ")" for row, y in zip(plan.rows, corners) if not y]
        return head, [f"No effects yet: no MAUVE at the corners {', '.join(empty)}.", ""]
    e = effects(plan.rows, corners, centre)
    body = ["## Effects", "", *table(
        ["factor", "half-effect", "standard error", "aliased with"],
        [[f"{letter} {f.name}", h, e.se, plan.aliases.get(letter)] for letter, f, h in zip(LETTERS, factors, e.half)])]
    body += [*remarks(e, centre), "## Next point", ""]
    if not any(e.half):
        return head, [*body, "All effects are 0: there is no slope to climb.", ""]
    exact, values = steepest(factors, e.half, ascent_step), ascend(factors, e.half, ascent_step)
    unrounded = " ".join(f"{f.name}={x:.4g}" for f, x in zip(factors, exact))
    body += [f"{ascent_step:g} coded units up the steepest slope: {unrounded}", "",
             f"next point {point_told(factors, values)}", ""]
    if others:
        climb = [[point_told(factors, x), statistics.fmean(y)] for x, y in others]
        body += table(["beyond the design", "mauve"], climb)
    return head, body


def draw(path, factors, rows):
    """sweep.png: the half-effects, the responses at corners and centre, and the climb from the centre."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no window, no state
    except ImportError:
        raise UserError("the picture needs matplotlib: pip install matplotlib; all else was written") from None
    plan, (corners, centre, others) = design(len(factors)).rows, by_place(factors, rows)
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(len(factors), max(len(plan) + 1, 5), 4))
    if all(corners):
        e = effects(plan, corners, centre)
        left.errorbar(range(len(factors)), e.half, yerr=e.se, fmt="o", capsize=4)
    left.set(title="half-effects" + (" with standard errors" if all(corners) and e.se is not None else ""),
             ylabel="MAUVE a coded unit", xlim=(-0.5, len(factors) - 0.5))
    left.set_xticks(range(len(factors)), [f.name for f in factors])
    left.axhline(0, color="grey", linewidth=0.8)

    labels = ["\n".join("+" if x > 0 else "-" for x in row) for row in plan] + ["\n".join("0" * len(factors))]
    for i, y in enumerate([*corners, centre]):
        middle.plot([i] * len(y), y, "o" if i < len(plan) else "s", color="C0" if i < len(plan) else "C1")
    middle.set(title="responses at the corners and the centre", ylabel="MAUVE")
    middle.set_xticks(range(len(labels)), labels, fontsize=min(9, 160 / len(labels)))
    middle.set_xlabel("levels of " + ", ".join(f.name for f in factors) + ", downwards", fontsize=8)

    climb = sorted([(0.0, centre), *((max(abs(coded_value(f, x)) for f, x in zip(factors, values)), y)
                                    for values, y in others)])
    climb = [(x, y) for x, y in climb if y]
    right.plot([x for x, _ in climb], [statistics.fmean(y) for _, y in climb], "-", color="C2")
    right.plot([x for x, y in climb for _ in y], [m for _, y in climb for m in y], "o", color="C2")
    floors = [row["floor"] for row in rows if row["floor"] is not None]
    if floors:
        right.axhline(statistics.fmean(floors), color="grey", linestyle=":", label="floor: the base model")
        right.legend()
    right.set(title="the climb", xlabel="coded units from the centre, largest factor", ylabel="MAUVE")
    right.set_xlim(-0.1, max([x for x, _ in climb] + [1.5]) + 0.1)
    figure.savefig(path, dpi=120)
