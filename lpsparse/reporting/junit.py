"""Write the report as JUnit XML: one test case per budget, and one per check that needs no budget."""

from xml.etree.ElementTree import Element, SubElement, indent, tostring

from lpsparse.reporting.budgets.check import FINITE
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import budget_name, budget_row, lost_of, nonfinite, state, verdict
from lpsparse.reporting.text import clean, harmless, shorten

_NAME = 200
_ALERT = 1000
_MOST_NAMES = 20


def render(report: Report) -> str:
    """A test suite that fails exactly if the report does."""
    suite = Element("testsuite", name=f"lpsparse {_text(report.model)}")
    for budget in report.budgets:
        if budget.name == FINITE:
            continue  # it is the check below
        case = SubElement(suite, "testcase", classname="lpsparse.budgets", name=_text(budget_name(budget)))
        _, limit, value, margin, said = budget_row(budget)
        text = f"limit {limit}, value {value}, margin {margin or 'unknown'}"
        text += "" if budget.worst is None else f", worst {_text(budget.worst)}"
        if state(budget) == "FAILED":
            SubElement(case, "failure", type="budget", message=text)
        else:
            SubElement(case, "system-out").text = text if said == "ok" else f"warning: {text}"
    _finite(report, suite)
    _all_there(report, suite)
    _manifest(report, suite)
    failed = len(suite.findall("testcase/failure"))
    skipped = len(suite.findall("testcase/skipped"))
    suite.attrib |= {
        "tests": str(len(suite)),
        "failures": str(failed),
        "errors": "0",
        "skipped": str(skipped),
    }
    SubElement(suite, "system-out").text = verdict(report)
    suites = Element("testsuites")
    suites.append(suite)
    indent(suites, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + tostring(suites, encoding="unicode") + "\n"


def _finite(report: Report, suite: Element) -> None:
    case = SubElement(suite, "testcase", classname="lpsparse.checks", name="weights are finite")
    alarm = nonfinite(report)
    names = "\n".join(_text(name) for name in report.nonfinite_tensors[:_MOST_NAMES])
    if any(budget.name == FINITE and state(budget) == "FAILED" for budget in report.budgets):
        SubElement(case, "failure", type="finite", message=alarm or "NaN or Inf").text = names
    elif alarm:
        SubElement(case, "system-out").text = f"warning: {alarm}:\n{names}"


def _all_there(report: Report, suite: Element) -> None:
    if report.base is None:
        return
    case = SubElement(suite, "testcase", classname="lpsparse.checks", name="tensors of BASE are here")
    alert = lost_of(report)
    if alert is not None:
        SubElement(case, "system-out").text = _text(f"warning: {alert}", _ALERT)


def _manifest(report: Report, suite: Element) -> None:
    """Never fails: a report is refused if the manifest does not match."""
    case = SubElement(
        suite, "testcase", classname="lpsparse.checks", name="weights are those of the manifest"
    )
    if report.made is None:
        SubElement(case, "skipped", message="no lpsparse.json is beside this model")


def _text(text: str, most: int = _NAME) -> str:
    """Text without control characters, which XML forbids even escaped, and without commands."""
    return harmless(shorten(clean(text), most))
