"""The files that a report can be written as.

Light on purpose: the options of `lpsparse report --help` are made from these records, so each renderer is
imported when it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lpsparse.reporting.records import Report


@dataclass(frozen=True, slots=True)
class View:
    """A member of the family VIEWS."""

    help: str  # of its option, which has its name in the family
    suffix: str  # of its files
    render: Callable[[Report], str]


def _json(report: Report) -> str:
    from lpsparse.reporting.text import IN_JSON, without_order

    return without_order(report.model_dump_json(indent=1, ensure_ascii=True), IN_JSON) + "\n"


def _html(report: Report) -> str:
    from lpsparse.reporting.html import page

    return page.render(report)


def _markdown(report: Report) -> str:
    from lpsparse.reporting import markdown

    return markdown.render(report)


def _comment(report: Report) -> str:
    from lpsparse.reporting import markdown

    return markdown.comment(report)


def _junit(report: Report) -> str:
    from lpsparse.reporting import junit

    return junit.render(report)


def _csv(report: Report) -> str:
    from lpsparse.reporting import spreadsheet

    return spreadsheet.render(report)


JSON = View("Write report.json; - is stdout.", ".json", _json)
HTML = View("Write one page with figures and no script; - is stdout.", ".html", _html)
MARKDOWN = View("Write Markdown for the summary of a CI job.", ".md", _markdown)
COMMENT = View("Write Markdown for a pull request comment, with a marker to find it by.", ".md", _comment)
JUNIT = View("Write JUnit XML with one test case per budget and check.", ".xml", _junit)
CSV = View("Write all figures of each tensor as a table.", ".csv", _csv)
