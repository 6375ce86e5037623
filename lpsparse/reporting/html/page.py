"""The page: ten views in one file that asks for nothing. Same report, same bytes."""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lpsparse import __version__
from lpsparse.reporting.html import (
    curves,
    goodness,
    layers,
    magnitudes,
    method,
    moved,
    parts,
    patterns,
    storage,
    verdict,
)
from lpsparse.reporting.records import Report
from lpsparse.reporting.text import harmless, without_order

_ORDER = "#&#35;["  # for `##[`: the same letters
_HERE = Path(__file__).parent
_VIEWS = (
    storage.view,
    layers.view,
    layers.kinds_view,
    goodness.view,
    magnitudes.view,
    patterns.view,
    curves.view,
    moved.view,
    method.view,
)


def render(report: Report) -> str:
    """HTML. All text is cleaned and escaped on its way out, whatever it is."""
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    # `finalize` sees every value of the template: none can be forgotten.
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
        views=[view(report) for view in _VIEWS],
        named=parts.named,
        coded=parts.coded,
    )
    return _harmless(page)


def _harmless(page: str) -> str:
    """The same page, of which GitHub's runner makes no command when it goes to stdout."""
    head, end, body = page.partition("</style>")
    return without_order(head, _ORDER) + end + harmless(body, _ORDER, "&#58;:")


def _hash(style: str) -> Markup:
    """What the page's policy knows its style sheet by."""
    return Markup("sha256-" + base64.b64encode(hashlib.sha256(style.encode()).digest()).decode())
