"""The sentences about a report that all views share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lpsparse.checkpoint.manifest import Quality
from lpsparse.families import BUDGETS
from lpsparse.reporting.budgets.check import FINITE
from lpsparse.reporting.budgets.cost import drop_of
from lpsparse.reporting.records import Base, Budget, Report, TensorRow
from lpsparse.reporting.text import percent, shorten, size

_ROOM = 0.05  # share of a limit from which on a margin is worth a word
_DRAINED = 0.999  # zeros of a tensor that hardly says anything any more,
_MODERATE = 0.95  # where of all prunable weights less than this is zero; else only one of zeros alone is told
_MOST_NAMED = 4  # tensors in a warning
LEFT_BEHIND = "a head or pooler of BASE that this model has no place for"
_MANY = 10  # times a limit: so many times, no more percent
CONFIDENCE = 1.96  # standard errors either way that hold 95 % of a normal distribution


def verdict(report: Report) -> str:
    """How much is zero, and how many budgets failed or warn."""
    return "; ".join([zeros(report), *([budgets_in_short(report)] if report.budgets else [])])


def zeros(report: Report) -> str:
    share = report.prunable
    be = "are" if report.estimate is None else "would be"
    return f"{percent(share.sparsity)} of prunable weights {be} zero ({share.zeros:,} of {share.weights:,})"


def budgets_in_short(report: Report) -> str:
    failed, warned, of = budget_counts(report)
    text = f"{failed} of {of} budgets failed" if failed else "all budgets met" if of and not warned else ""
    warning = f"{warned} of {of} budgets warn{'s' * (warned == 1)}" if warned else ""
    broken = "" if report.passed or failed else "but not all weights are finite"
    return ", ".join(part for part in (text, warning, broken) if part)


def budget_counts(report: Report) -> tuple[int, int, int]:
    """How many budgets failed, how many warn, and how many there are, without the check that weights are
    finite: nobody gave it as a budget."""
    states = [state(budget) for budget in report.budgets if budget.name != FINITE]
    return states.count("FAILED"), states.count("warn"), len(states)


def nonfinite(report: Report) -> str | None:
    """The alarm that comes before anything else; None if every value is finite."""
    count = len(report.nonfinite_tensors)
    return f"NaN or Inf in {count:,} of {len(report.tensors):,} tensors" if count else None


@dataclass(frozen=True, slots=True)
class Alert:
    """A problem to look at before the model is used."""

    what: str
    tensors: tuple[tuple[str, str], ...]  # name, and a remark
    hint: str

    def __str__(self) -> str:
        return f"{self.what} {', '.join(shorten(name, 160) + left for name, left in self.tensors)}{self.hint}"


def alerts(report: Report) -> tuple[Alert, ...]:
    found = lost_of(report), drained_of(report)
    return tuple(each for each in found if each is not None)


def lost_of(report: Report) -> Alert | None:
    """Tensors of BASE that are missing here, except heads that this class of model does not have."""
    base = report.base
    if base is None:
        return None
    names = [(name, "") for name in base.only_there if name not in base.left_behind]
    names += [(name, " (other shape)") for name in base.other_form if name not in base.left_behind]
    if not names:
        return None
    many = f"{len(names):,} tensors of BASE are missing or of another shape:" if len(names) > 1 else ""
    what = many or "a tensor of BASE is missing or of another shape:"
    return Alert(what, tuple(names[:_MOST_NAMED]), ". A loader may fill them with random values")


def apart_in_words(base: Base) -> list[tuple[str, str]]:
    """Tensors that only one of the two has, which is no alarm, with the first names."""
    found: list[tuple[str, str]] = []
    groups = (("only here", base.only_here, ""), ("left behind", base.left_behind, f" ({LEFT_BEHIND})"))
    for word, names, remark in groups:
        more = f" and {len(names) - _MOST_NAMED:,} more" if len(names) > _MOST_NAMED else ""
        shown = ", ".join(shorten(name, 160) for name in names[:_MOST_NAMED])
        found += [(word, f"{shown}{more}{remark}")] if names else []
    return found


def drained(tensors: Iterable[tuple[str, int, int]]) -> Alert | None:
    """Prunable tensors that are (nearly) all zero, from names, zeros and weights; None if there are none."""
    given = [each for each in tensors if each[2]]
    moderate = sum(zeros for _, zeros, _ in given) < _MODERATE * sum(weights for *_, weights in given)
    bound = _DRAINED if moderate else 1
    found = [each for each in given if each[1] >= bound * each[2]]
    if not found:
        return None
    whole = all(zeros == weights for _, zeros, weights in found)
    named = tuple(
        (name, f" ({weights - zeros:,} of {weights:,} weights left)" if zeros < weights else "")
        for name, zeros, weights in found[:_MOST_NAMED]
    )
    many = f" ({len(found):,} tensors)" if len(found) > 1 else ""
    it = "it" if len(found) == 1 else "them"
    hint = f"Keep {it} with `--exclude`, or spread the cut with `prune --scope tensor` or "
    hint += "`finetune --allocation lamp`"
    return Alert(f"{'now' if whole else 'nearly'} 100 % zero:", named, f"{many}. {hint}")


def drained_of(report: Report) -> Alert | None:
    return drained((row.name, row.zeros, row.weights) for row in report.tensors if row.prunable)


def state(budget: Budget) -> str:
    """ok, warn or FAILED."""
    return "ok" if budget.passed else "warn" if budget.level == "warn" else "FAILED"


def budget_name(budget: Budget) -> str:
    return budget.name if budget.pattern is None else f"{budget.name} {budget.pattern}"


def budget_row(budget: Budget) -> tuple[str, str, str, str, str]:
    """Name, limit, value, margin and state of a budget."""
    limit, value = _limit_and_value(budget)
    margin = "" if budget.margin is None else _in_unit(budget, budget.margin)
    if budget.margin is not None and _unit(budget) == "metric" and abs(budget.margin) < 1000:
        margin = f"{budget.margin:.3g}"
    if budget.margin is not None and budget.margin > 0:
        margin = f"+{margin}" if margin[0].isdigit() else margin  # "under 0.01 %" has no sign
    if _unit(budget) == "bytes" and (excess := _excess(budget)):
        margin = f"{margin} ({excess})"
    return budget_name(budget), limit, value, margin, state(budget)


def budget_line(budget: Budget) -> str:
    """A budget as one line: max-bytes: 90.9 MB > 60 MB (over by 51 %)."""
    limit, value = _limit_and_value(budget)
    if budget.value is None:
        return f"{budget_name(budget)}: {value}, limit {limit}"
    sign = "=" if limit == value else ">" if budget.value > budget.limit else "<"
    excess = _excess(budget)
    worst = f"; worst: {budget.worst}" if budget.worst is not None and not budget.passed else ""
    return f"{budget_name(budget)}: {value} {sign} {limit}{f' ({excess})' if excess else ''}{worst}"


def _limit_and_value(budget: Budget) -> tuple[str, str]:
    """In three digits, or as many as it takes to tell them apart."""
    limit = _in_unit(budget, budget.limit)
    value = "not recorded" if budget.value is None else _in_unit(budget, budget.value)
    if _unit(budget) == "metric" and budget.value is not None and abs(budget.value) < 1000:
        short = f"{budget.value:.3g}"
        value = short if float(short) != budget.limit or budget.value == budget.limit else value
    if limit == value and budget.value is not None and not budget.passed:
        if _unit(budget) == "bytes":
            return f"{budget.limit:,.0f} bytes", f"{budget.value:,.0f} bytes"
        for digits in range(3, 9):
            limit, value = percent(budget.limit, digits), percent(budget.value, digits)
            if limit != value:
                break
    return limit, value


def _excess(budget: Budget) -> str:
    """By how much a budget is missed; empty if it is met or if its margin says so already."""
    if budget.passed or not budget.margin or budget.value is None:
        return ""
    how = "over by" if budget.value > budget.limit else "short by"
    if _unit(budget) == "share":
        points = f"{100 * abs(budget.margin):.3g}"
        return f"{how} {points} point{'' if points == '1' else 's'}"
    if not budget.limit:
        return ""
    share = abs(budget.margin / budget.limit)
    if share >= _MANY:
        return f"{abs(budget.value / budget.limit):,.0f} times the limit"
    return f"{how} {100 * share:.0f} %" if share >= 0.1 else f"{how} {100 * share:.2g} %"


def _unit(budget: Budget) -> str:
    """The unit of its limit, value and margin: bytes, share or metric."""
    kind = BUDGETS.get(budget.name.partition(" ")[0])  # "min-nm 2:4"
    if kind is not None:
        return "share" if budget.relative else kind.unit
    return {"bytes of baseline": "bytes", "sparsity of baseline": "share"}.get(budget.name, "metric")


def _in_unit(budget: Budget, value: float) -> str:
    unit = _unit(budget)
    if unit == "bytes":
        return f"-{size(-value)}" if value < 0 else size(value)
    return percent(value) if unit == "share" else figure(value)


def hint(budget: Budget, name: str | None = None) -> str | None:
    """Advice to tighten a budget that is met with room to spare. `name` is how it is shown."""
    if not budget.passed or budget.margin is None or budget.name.endswith("of baseline"):
        return None
    if budget.margin <= _ROOM * abs(budget.limit):
        return None
    spare = f"{budget.margin:.2g}" if _unit(budget) == "metric" else _in_unit(budget, budget.margin)
    return f"{name or budget_name(budget)} has {spare} to spare; consider tightening it."


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def interval(value: float | None, error: float | None) -> str:
    """A figure with its 95 % interval, where its standard error is known."""
    if value is None:
        return "not measured"
    return f"{value:.4f}" if error is None else f"{value:.4f} {spread(error)}"


def spread(error: float) -> str:
    """Half of the 95 % interval of a figure with this standard error."""
    return f"± {CONFIDENCE * error:.4f}"


def apart(quality: Quality) -> bool | None:
    """Whether the intervals before and after are apart; None if one is unknown."""
    before, errors = quality.before, (quality.before_error, quality.after_error)
    if before is None or errors[0] is None or errors[1] is None:
        return None
    return abs(before - quality.after) > CONFIDENCE * (errors[0] + errors[1])


def change_of(quality: Quality) -> str:
    """Better or worse, and by how much; empty if nothing was measured before."""
    drop = drop_of(quality)
    if drop is None:
        return ""
    found = f"{'worse' if drop > 0 else 'better'} by {abs(float(drop)):.4f}" if drop else "unchanged"
    return f"{found} since it was cut, which may have cost more" if quality.of_cut else found


@dataclass(frozen=True, slots=True)
class Sums:
    """The changes of all tensors beside BASE."""

    cut: int
    revived: int
    changed: int
    tensors: int  # that were compared
    cut_to: float | None  # largest magnitude in BASE of a prunable weight that was cut
    kept_from: float | None  # smallest of one that was not
    moved: TensorRow | None  # the tensor whose value changed most


def changes(report: Report) -> Sums | None:
    """None where no BASE was given."""
    given = [(row, row.change) for row in report.tensors if row.change is not None]
    if report.base is None:
        return None
    prunable = [change for row, change in given if row.prunable]
    cut, kept = _magnitudes(c.largest_cut for c in prunable), _magnitudes(c.smallest_kept for c in prunable)
    moved = max(given, key=lambda each: each[1].largest_change, default=None)
    return Sums(
        cut=sum(change.cut for _, change in given),
        revived=sum(change.revived for _, change in given),
        changed=sum(change.changed for _, change in given),
        tensors=len(given),
        cut_to=max(cut, default=None),
        kept_from=min(kept, default=None),
        moved=moved[0] if moved and moved[1].largest_change else None,
    )


def _magnitudes(given: Iterable[float | None]) -> list[float]:
    """The known positive ones: there are none if only NaN was cut."""
    return [value for value in given if value is not None and value > 0]


def in_figures(sums: Sums) -> str:
    """How many weights were set to zero, revived and changed."""
    cut, revived, changed = sums.cut, sums.revived, sums.changed
    return f"{cut:,} set to zero, {revived:,} revived, {changed:,} other weights changed"


def cut_at(sums: Sums) -> str | None:
    """The threshold of the cut, by magnitudes in BASE; None if nothing was cut."""
    if sums.cut_to is None:
        return None
    kept = "" if sums.kept_from is None else f"; smallest kept {sums.kept_from:.6g}"
    one = "" if one_threshold(sums) is not False else " (not one threshold for all)"
    return f"magnitudes up to {sums.cut_to:.6g}{kept}{one}"


def one_threshold(sums: Sums) -> bool | None:
    """Whether all prunable weights were cut at one magnitude; None where none was cut, or none kept."""
    if sums.cut_to is None or sums.kept_from is None:
        return None
    return sums.cut_to <= sums.kept_from


def largest_change(row: TensorRow, name: str) -> str:
    """The largest change of a weight that is zero neither here nor in BASE, from what to what, and where."""
    assert row.change is not None
    change = row.change
    if change.at is None or change.before is None or change.after is None:
        return f"{change.largest_change:.6g} in {name}, zeros excluded"
    values = f"{change.before:.6g} -> {change.after:.6g}"
    return f"{change.largest_change:.6g} ({values} at index {change.at:,} of {name}), zeros excluded"


def neighbours(report: Report) -> list[tuple[str, str]]:
    """The N:M groups, and the all-zero rows, columns, heads and blocks, of prunable weights."""
    lines: list[tuple[str, str]] = []
    for name, (part, whole) in report.n_m.items():
        if part and whole:
            lines.append((name, f"{part:,} of {whole:,} groups ({percent(part / whole)})"))
    for name, (part, whole) in report.empty.items():
        if part and whole:
            what = f"{name.removeprefix('blocks ')} blocks" if name.startswith("blocks") else name
            lines.append((f"all-zero {what}", f"{part:,} of {whole:,} ({percent(part / whole)})"))
    return lines


def singular(report: Report) -> list[tuple[str, str, str]]:
    """The largest singular value and the worst condition, each with the tensor that has it."""
    given = [(row.spectrum, row.name) for row in report.tensors if row.spectrum is not None]
    if not given:
        return []
    most, of = max(given, key=lambda each: each[0].largest)
    worst, name = max(given, key=lambda each: math.inf if each[0].condition is None else each[0].condition)
    said = "infinite (the smallest is 0)" if worst.condition is None else f"{worst.condition:.4g}"
    return [("largest singular", f"{most.largest:.4g}", of), ("worst condition", said, name)]


def oddities(report: Report) -> list[tuple[str, str]]:
    """Negative zeros, subnormal and nearly zero values of all tensors, if there are any."""
    details = [row.detail for row in report.tensors if row.detail is not None]
    counts = {
        "-0.0": (sum(each.negative_zeros for each in details), "negative zeros, counted as zeros"),
        "subnormal": (sum(each.subnormal for each in details), "values below their dtype's normal range"),
        "nearly zero": (
            sum(each.near_zero for each in details),
            "non-zero values below about 1/1000 of the largest in their tensor",
        ),
    }
    return [(name, f"{count:,} {text}") for name, (count, text) in counts.items() if count]


def stores(report: Report) -> list[tuple[str, str]]:
    """Bytes of the weight files now, and after `pack`."""
    held = report.bytes
    lines = [
        (
            "weight files",
            f"{size(held.file_bytes)} ({held.file_bytes:,} bytes, {report.layout}); "
            f"{percent(held.zero_share)} of the dense bytes are zeros",
        )
    ]
    if held.packed_bytes is not None and report.layout != "packed":
        lines.append(("packed", f"about {size(held.packed_bytes)}"))
    return lines


def shrinks(report: Report) -> str | None:
    """The change of size: 90.9 MB -> about 51.3 MB packed, 1.77x smaller. None: unknown."""
    held, base = report.bytes, report.base
    now = held.file_bytes if report.layout != "dense" else held.packed_bytes
    if now is None:
        return None
    before = base.file_bytes if base else held.dense_bytes if report.layout != "dense" else held.file_bytes
    about = "about " if report.layout == "dense" else ""
    layout = "packed" if report.layout == "dense" else report.layout
    return f"{size(before)} -> {about}{size(now)} {layout}, {times(before, now)}"


def times(before: float, now: float) -> str:
    """How much smaller or larger."""
    if not now or not before or round(before / now, 2) == 1:
        return "as large as before"
    return f"{before / now:.3g}x smaller" if now < before else f"{now / before:.3g}x larger"


def beside(base: Base) -> tuple[str, str]:
    """Whether BASE is the source, and how the files compare."""
    ratio = base.bytes_ratio
    change = f" ({'+' if ratio > 1 else '-'}{100 * abs(ratio - 1):.0f} %)" if round(ratio, 2) != 1 else ""
    now = base.file_bytes * ratio
    return (
        "base" if base.is_source else "compared with",
        f"{base.name}, {size(base.file_bytes)}, {percent(base.prunable.sparsity)} zeros. Now {size(now)}: "
        f"{times(base.file_bytes, now)}{change}",
    )


def costs(report: Report) -> list[tuple[str, str]]:
    """Each quality before and after, with its error."""
    lines: list[tuple[str, str]] = []
    for quality in report.quality:
        before = interval(quality.before, quality.before_error)
        after = interval(quality.after, quality.after_error)
        change = change_of(quality)
        worse = f" ({change})" if change else ""
        lines.append((quality.metric, f"{before} -> {after}{worse}, {quality.rows:,} of {quality.split}"))
    return lines
