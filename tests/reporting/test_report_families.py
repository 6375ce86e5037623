"""Every budget and view, and one of each from outside of the package."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from support import reports

from lpsparse import prune, report
from lpsparse.commands.report import report_step
from lpsparse.errors import UsageError
from lpsparse.families import BUDGETS, HTML_VIEWS, VIEWS
from lpsparse.reporting.budgets.base import BudgetKind, Limit, Measured
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import budget_line
from lpsparse.reporting.views import View
from lpsparse.steps.budgets import with_budgets
from lpsparse.steps.report import ReportStep


def most_tensors(found: Report, limit: Limit) -> Measured:
    return Measured(len(found.tensors))


TOY = BudgetKind("max-tensors", "Budget NUMBER: most tensors.", most_tensors, example="7", unit="metric")


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_is_an_option_that_reads_its_own_example(name: str) -> None:
    kind = BUDGETS[name]
    assert kind.name == name and ReportStep.model_fields[kind.field].description == kind.help
    for text in kind.example.split(" or "):
        limit = kind.limit(text)
        assert limit.value >= 0 and limit.pattern is None
        step = ReportStep.model_validate({"model": "m", kind.field: text, "warn": name})
        assert getattr(step, kind.field) == (text,)
        globbed = {"model": "m", kind.field: f"*.weight={text}"}
        if kind.takes_glob:
            assert kind.limit(f"*.weight={text}").pattern == "*.weight"
        else:
            with pytest.raises(ValueError, match=name):
                ReportStep.model_validate(globbed)


@pytest.mark.parametrize("text", ["", "x", "-1", "nan", "1e9999x", "=", "*="])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_refuses_what_is_not_a_limit(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=name):
        BUDGETS[name].limit(text)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_is_checked_and_written_by_every_view(name: str, tiny: Path, tmp_path: Path) -> None:
    kind, text = BUDGETS[name], BUDGETS[name].example.split(" or ")[0]
    prune(tiny, tmp_path / "out", sparsity="0.5")
    found = report(tmp_path / "out", **{kind.field: text})
    (budget,) = found.budgets
    assert budget.name.split(" ")[0] == name and budget.limit == float(kind.limit(text).value)
    assert budget.passed is False or budget.margin is not None
    for view in VIEWS.values():
        assert view.suffix == ".csv" or name in view.render(found)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_the_same_text_every_time_and_an_option(name: str, tiny: Path, tmp_path: Path) -> None:
    view = VIEWS[name]
    for found in (reports.bare(), reports.full(reports.tensors(9))):
        assert view.render(found) == view.render(found) != ""
    path = tmp_path / f"report{view.suffix}"
    found = report(tiny, **{name: path})
    assert path.read_bytes() == view.render(found).encode()


@pytest.mark.parametrize("name", HTML_VIEWS)
def test_a_section_of_the_page_has_its_name(name: str) -> None:
    for found in (reports.bare(), reports.full(reports.tensors(9))):
        view = HTML_VIEWS[name](found)
        assert view.name == name and view.title


def test_a_budget_and_a_view_from_outside_work_everywhere(
    tiny: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BUDGETS.members, "max-tensors", TOY)
    monkeypatch.setitem(
        VIEWS.members, "count", View("Write a count.", ".txt", lambda found: f"{found.all.of}")
    )
    step = with_budgets(ReportStep, {"max-tensors": TOY}).model_validate(
        {"model": str(tiny), "max_tensors": 3}
    )
    (budget,) = report_step(step).budgets
    assert (budget.limit, budget.passed, budget.margin) == (3, False, 3 - budget.value)
    assert "max-tensors" in budget_line(budget)
    assert cli("report", tiny, "--count", tmp_path / "a.txt").rc == 0
    report(tiny, count=tmp_path / "b.txt")
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "b.txt").read_text() == "all weights"


def test_a_limit_is_read_as_the_decimal_that_stands_there() -> None:
    assert BUDGETS["max-bytes"].limit("1.5GiB").value == Decimal(3 << 29)
    assert BUDGETS["max-quality-drop"].limit("2%") == Limit(Decimal("0.02"), relative=True)
    with pytest.raises(UsageError):
        report("m", max_bytes="7")
