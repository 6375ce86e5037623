"""The model card README.md of OUT: what was done, in the words of the Hugging Face hub's metadata."""

from jinja2 import Environment, StrictUndefined

from lpsparse import __version__
from lpsparse.checkpoint.manifest import Quality, Source
from lpsparse.reporting.measure import Report

_CARD = """\
---
library_name: lpsparse
base_model: {{ source.name | tojson }}
base_model_relation: finetune
tags: [lpsparse, sparse, pruned]
---

# {{ source.name | md }}, made sparse by lpsparse {{ version }}

| | |
| --- | --- |
| zeros among prunable weights | {{ "{:,}".format(report.prunable.zeros) }} of {{ "{:,}".format(report.prunable.weights) }} ({{ "%.2f"|format(100 * report.prunable.sparsity) }} %) |
| zeros among all weights | {{ "%.2f"|format(100 * report.all.sparsity) }} % |
| weight files | {{ "{:,}".format(report.bytes.file_bytes) }} bytes ({{ report.layout }}) |
| opens with | {{ report.opens_with }} |
{% for q in quality -%}
| {{ q.metric | md }} on {{ q.rows }} of {{ q.split | md }} | {% if q.before is not none %}{{ "%.4f"|format(q.before) }} before, {% endif %}{{ "%.4f"|format(q.after) }} after |
{% endfor %}
{{ report.rule[0]|upper }}{{ report.rule[1:] }}.

The licence is that of the base model{% if base_card %} (see README.base.md){% endif %}. `lpsparse.json` lists every
file with its sha256 and every tensor with its zeros; `lpsparse verify` checks them. Zeros make the model smaller to
store; they make it faster only in a runtime that knows about them.
"""


def render(report: Report, source: Source, quality: tuple[Quality, ...], *, base_card: bool) -> str:
    """Markdown. Names from a checkpoint are escaped."""
    # Markdown, not HTML: escaping is done by the md filter where text comes from outside.
    environment = Environment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["md"] = escape
    template = environment.from_string(_CARD)
    return template.render(
        report=report, source=source, quality=quality, base_card=base_card, version=__version__
    )


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return "".join(f"\\{char}" if char in "\\`*_{}[]()#+!|<>" else char for char in printable)
