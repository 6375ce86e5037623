"""The model card README.md of OUT: what was done, in the words of the Hugging Face hub's metadata."""

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from lpsparse import __version__
from lpsparse.checkpoint.hub import is_hub_id
from lpsparse.checkpoint.manifest import Quality, Source
from lpsparse.reporting.records import Report

_TEMPLATE = Path(__file__).with_suffix(".md.j2")


def render(report: Report, source: Source, quality: tuple[Quality, ...], *, base_card: bool) -> str:
    """Markdown. Names from a checkpoint are escaped."""
    # Markdown, not HTML: escaping is done by the md filter where text comes from outside.
    environment = Environment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["md"] = escape
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        report=report,
        source=source,
        quality=quality,
        base_card=base_card,
        version=__version__,
        on_hub=is_hub_id(source.base),
    )


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return "".join(f"\\{char}" if char in "\\`*_{}[]()#+!|<>" else char for char in printable)
