"""The report as text of each kind that it can be written as."""

from collections.abc import Callable

from lpsparse.reporting.records import Report
from lpsparse.reporting.text import IN_JSON, without_order


def _json(report: Report) -> str:
    return without_order(report.model_dump_json(indent=1, ensure_ascii=True), IN_JSON) + "\n"


def _html(report: Report) -> str:
    from lpsparse.reporting.html.page import render

    return render(report)


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


VIEWS: dict[str, Callable[[Report], str]] = {
    "json": _json,
    "html": _html,
    "markdown": _markdown,
    "comment": _comment,
    "junit": _junit,
    "csv": _csv,
}
