"""The figure of a model card: how much of each tensor is zero, as SVG without scripts, fonts or names."""

from lpsparse.reporting.records import Report, TensorRow
from lpsparse.reporting.text import percent

FIGURE = "figures/sparsity.svg"
_WIDE, _HIGH, _LEFT, _TOP = 640, 160, 52, 24
_MOST_BARS = 320
_COLORS = {True: "#0072b2", False: "#b0b0b0"}  # prunable, kept: told apart by everyone, and in grey


def render(report: Report) -> str:
    """A bar a tensor, in the order of the file; of very many, a bar for as many neighbours as are needed."""
    rows = [row for row in report.tensors if row.weights]
    step = max(1, -(-len(rows) // _MOST_BARS))
    bars = [rows[i : i + step] for i in range(0, len(rows), step)]
    wide = _WIDE / max(len(bars), 1)
    share = report.prunable
    zeros = f"{share.zeros:,} of {share.weights:,} prunable weights are zero"
    said = f"{zeros} ({percent(share.sparsity)})"
    each = "a tensor" if step == 1 else f"{step} tensors"
    right, low = _LEFT + _WIDE, _TOP + _HIGH
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {right + 16} {low + 40}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>Sparsity by layer</title><desc>{said}; a bar is {each}, in the order of the file.</desc>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *(_bar(bar, _LEFT + i * wide, wide) for i, bar in enumerate(bars)),
        *(_line(level) for level in (0, 50, 100)),
        f'<text x="{_LEFT}" y="{_TOP - 8}">{said}</text>',
        f'<rect x="{_LEFT}" y="{low + 14}" width="10" height="10" fill="{_COLORS[True]}"/>',
        f'<text x="{_LEFT + 16}" y="{low + 24}">prunable</text>',
        f'<rect x="{_LEFT + 90}" y="{low + 14}" width="10" height="10" fill="{_COLORS[False]}"/>',
        f'<text x="{_LEFT + 106}" y="{low + 24}">kept; a bar is {each}, in the order of the file</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _bar(rows: list[TensorRow], left: float, wide: float) -> str:
    high = _HIGH * sum(row.zeros for row in rows) / sum(row.weights for row in rows)
    color = _COLORS[any(row.prunable for row in rows)]
    place = f'x="{left:.2f}" y="{_TOP + _HIGH - high:.2f}" width="{0.9 * wide:.2f}" height="{high:.2f}"'
    return f'<rect {place} fill="{color}"/>'


def _line(level: int) -> str:
    y = _TOP + _HIGH * (100 - level) / 100
    line = f'<line x1="{_LEFT}" x2="{_LEFT + _WIDE}" y1="{y:.1f}" y2="{y:.1f}" stroke="#808080"/>'
    return f'{line}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{level} %</text>'
