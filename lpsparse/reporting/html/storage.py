"""Draw the bytes from the dense original to the file, step by step, and those of each layout."""

from lpsparse.reporting.html import svg
from lpsparse.reporting.html.parts import Cell, Figure, Table, View, coded, count, percent, size
from lpsparse.reporting.records import Report

_Step = tuple[str, float, float]  # words, bytes before and after


def view(report: Report) -> View:
    words: list[Cell] = [_said(report)]
    if report.base is None:
        words.append("No BASE was given, so the steps begin with these tensors as they would be dense.")
    return View("bytes", "Bytes, step by step", tuple(words), (_waterfall(report), _layouts(report)))


def _said(report: Report) -> Cell:
    if report.layout != "dense":
        return f"The file is in the {report.layout} layout: its zeros cost no bytes of values, only an index."
    zero = size(report.bytes.zero_bytes)
    words = f"The file is dense: its zeros ({zero}) are stored like any other value. "
    return coded(words + "`lpsparse pack` takes them out without loss.")


def _steps(report: Report) -> list[_Step]:
    """Each step starts where the one before ended; the last is the file."""
    held, base = report.bytes, report.base
    steps: list[_Step] = []
    if base is not None:
        forms = (
            "other dtypes or tensors" if base.dense_bytes != held.dense_bytes else "same dtypes and tensors"
        )
        steps += [("dense original", 0, base.dense_bytes), (forms, base.dense_bytes, held.dense_bytes)]
    else:
        steps.append(("dense, as it would be", 0, held.dense_bytes))
    if report.layout == "dense":
        steps.append(("headers", held.dense_bytes, held.file_bytes))
    else:
        values = held.dense_bytes - held.zero_bytes
        rest = (
            "index and headers" if report.layout != "packed" else "index and headers, less what coding saves"
        )
        steps += [("zeros removed", held.dense_bytes, values), (rest, values, held.file_bytes)]
    return [*steps, ("file on disk", 0, held.file_bytes)]


def _waterfall(report: Report) -> Figure:
    steps = _steps(report)
    most = max(*(max(before, after) for _, before, after in steps), 1)
    bars = [_bar(step, most, i in (0, len(steps) - 1)) for i, step in enumerate(steps)]
    told = f"From {size(steps[0][2])} dense to {size(report.bytes.file_bytes)} on disk in {len(steps)} steps."
    whole = max(steps[0][2], 1)
    body = [
        (words, "a total" if before == 0 else _change(before, after), count(after), percent(after / whole))
        for words, before, after in steps
    ]
    head = ("step", "bytes of the step", "bytes after it", "of the first")
    return Figure(
        "From dense to the file",
        (svg.rows("waterfall", "Bytes, step by step", told, bars),),
        Table("Bytes of each step", head, body),
        (("total", "a total"), ("less", "bytes saved"), ("more", "bytes added")),
    )


def _bar(step: _Step, most: float, total: bool) -> svg.Row:
    words, before, after = step
    css = "total" if total else "less" if after < before else "more"
    value = size(after) if total else _signed(after - before)
    return svg.Row(words, value, min(before, after) / most, max(before, after) / most, css)


def _signed(change: float) -> str:
    return f"+{size(change)}" if change > 0 else size(change)


def _change(before: float, after: float) -> str:
    change = after - before
    return f"{'−' if change < 0 else '+' if change > 0 else ''}{count(abs(change))}"


def _layouts(report: Report) -> Figure:
    held = report.bytes
    sizes = [
        ("dense", held.dense_bytes, "tensors alone"),
        ("bitmask", held.bitmask_bytes, "one bit a weight, and the others"),
    ]
    if held.packed_bytes is not None:
        exact = report.layout == "packed"
        sizes.append(("packed", held.packed_bytes, "as it is" if exact else "about: the entropy bound"))
    most = max(*(each for _, each, _ in sizes), 1)
    bars = [svg.Row(name, size(each), 0, each / most, "total") for name, each, _ in sizes]
    body = [
        (name, words, count(each), percent(each / max(held.dense_bytes, 1))) for name, each, words in sizes
    ]
    told = "; ".join(f"{name} {size(each)}" for name, each, _ in sizes)
    return Figure(
        "The same weights in each layout",
        (svg.rows("layouts", "Bytes in each layout", told, bars),),
        Table("Bytes in each layout", ("layout", "what it is", "bytes", "of dense"), body, words=(0, 1)),
        note="" if held.packed_bytes is not None else "Packed bytes are not known: only zeros were counted.",
    )
