"""Text for people: cleaned, sized and shortened.
Standard library only, so that an error message costs nothing."""


def clean(text: str) -> str:
    """Text from outside without what a terminal would obey: control and format characters become '?'."""
    return "".join(char if char.isprintable() else "?" for char in text)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def shorten(name: str, width: int) -> str:
    """A name cut in its middle to `width` characters."""
    if len(name) <= width:
        return name
    half = max(1, (width - 1) // 2)
    return f"{name[: width - 1 - half]}…{name[-half:]}"


def columns(head: tuple[str, ...], body: list[tuple[str, ...]], width: int) -> list[str]:
    """Aligned columns: the first to the left, the others to the right.
    To fit, first the last column is shortened (a remark), then the first (a name)."""
    widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
    for i in (-1, 0):
        over = sum(widths) + 2 * (len(head) - 1) - width
        widths[i] = max(min(8, widths[i]), widths[i] - max(0, over))
    lines: list[str] = []
    for row in (head, *body):
        cells = [shorten(row[0], widths[0]).ljust(widths[0])]
        cells += [shorten(cell, w).rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines
