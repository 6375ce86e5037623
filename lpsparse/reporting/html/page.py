"""The report as one page that loads nothing else. The same report gives the same bytes."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lpsparse import __version__
from lpsparse.families import HTML_VIEWS
from lpsparse.reporting.html import parts, verdict
from lpsparse.reporting.records import Report
from lpsparse.reporting.text import harmless, without_order

_ORDER = "#&#35;["  # for `##[`: the same letters
_HERE = Path(__file__).parent


def render(report: Report) -> str:
    """HTML. The template cleans and escapes all text."""
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    # `finalize` sees every value of the template, so that none can be forgotten.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=parts.shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    template = environment.from_string((_HERE / "page.html.j2").read_text(encoding="utf-8"))
    state, words = verdict.status(report)
    page = template.render(
        report=report,
        version=__version__,
        style=Markup(style),
        style_hash=_hash(style),
        state=state,
        words=words,
        sentence=verdict.sentence(report),
        alerts=verdict.alerts(report),
        cards=verdict.cards(report),
        budgets=verdict.budgets(report),
        views=[view(report) for view in HTML_VIEWS.values()],
        named=parts.named,
        coded=parts.coded,
    )
    return _harmless(page)


def _harmless(page: str) -> str:
    """The same page without text that GitHub's runner would run as a command."""
    head, end, body = page.partition("</style>")
    return without_order(head, _ORDER) + end + harmless(body, _ORDER, "&#58;:")


def _hash(style: str) -> Markup:
    """The hash by which the page's content policy accepts its style sheet."""
    return Markup("sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode())
