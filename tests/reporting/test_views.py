"""The views of a report: the same figures everywhere, within the limits of who shows them."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from junitparser import JUnitXml
from safetensors.numpy import save_file
from support.cli import Ran
from support.files import PRUNABLE, ROOT, Given, f32, tiny_arrays, tree_hash, write_safetensors
from support.reports import full, tensor

from lpsparse import LpsparseError, prune, report
from lpsparse.checkpoint.manifest import Quality, Source
from lpsparse.reporting import card, junit, markdown, spreadsheet, summary, table
from lpsparse.reporting.html.page import render as render_page
from lpsparse.reporting.records import Budget, KindRow, Report, Share, schema
from lpsparse.reporting.text import folded, percent

Cli = Callable[..., Ran]
NAMES = {
    "ansi": "\x1b[2J\x1b[31mred",
    "newline": "a\n| b |\n# c",
    "bidi": "a\u202ebin\u202c",
    "nul": "a\0b",
    "script": "<script>alert(1)</script>",
    "details": "</details><h1>x</h1>",
    "code": "a`b``c|d\\|e",
    "link": "[x](http://x) www.x.org",
    "mention": "@everyone #1",
    "formula": "=cmd|' /C calc'!A0",
    "command": "::error::fake",
    "old command": "x ##[error]fake",
    "quote": "'a\"b'",
    "empty": "",
    "percent": "100%0A::error::fake",
    "entity": "&lt;b&gt;",
    "cdata": "]]>",
    "plus": "+1",
    "tab": "\t=1",
}


@pytest.fixture
def sparse(tiny: Path) -> Path:
    prune(tiny, tiny.parent / "sparse", sparsity=0.8)
    return tiny.parent / "sparse"


def quality(**fields: Any) -> Quality:
    given = {"metric": "accuracy", "before": 0.9, "after": 0.88, "higher_is_better": True, "rows": 872}
    return Quality(**{**given, "split": "validation[:872]", **fields})


def budget(name: str = "min-sparsity", **fields: Any) -> Budget:
    return Budget(**{"name": name, "limit": 0.8, "value": 0.7, "margin": -0.1, "passed": False, **fields})


def card_of(found: Report) -> str:
    source = Source(name="x", revision=None, files=(), base="x")
    return card.render(found, source, (), recipe={}, base_card=Path("no card"))


def named(name: str, folder: Path) -> Report:
    """A report in which everything that can have the name has it."""
    given: dict[str, Given] = {name: f32(7, 13), f"{name}.bias": f32(7)}
    found = report(write_safetensors(folder / "m.safetensors", given))
    row = replace(found.tensors[0], dtype=name, reason=name)
    return found.model_copy(
        update={
            "model": name,
            "baseline": name,
            "tensors": (row, *found.tensors[1:]),
            "rule": name,
            "budgets": (budget(pattern=name, worst=name), budget(passed=True, pattern=name, margin=0.5)),
            "quality": (quality(metric=name, split=name),),
            "nonfinite_tensors": (name,),
            "not_measured": (name,),
            "opens_with": name,
            "n_m": {name: (1, 2)},
        }
    )


# Markdown


def test_markdown_has_the_verdict_first_and_failed_budgets_before_met_ones(sparse: Path) -> None:
    text = markdown.render(report(sparse, min_sparsity="0.5", max_bytes="100B"))
    lines = text.splitlines()
    assert lines[0] == "## lpsparse: FAILED"
    assert (
        lines[2] == "`sparse`: **79.95 % of prunable weights are zero (291 of 364); 1 of 2 budgets failed**"
    )
    row = "| `max-bytes` | 100 B | 3.08 kB | -2.98 kB (31 times the limit) | **FAILED** |"
    assert text.index(row) < text.index("| `min-sparsity` |")
    assert "`min-sparsity` has 29.95 % to spare" in text
    assert "\n- speed: " in text.partition("### Not measured")[2]


def test_markdown_says_quality_with_its_interval(sparse: Path) -> None:
    found = report(sparse).model_copy(update={"quality": (quality(before_error=0.01, after_error=0.02),)})
    row = "| `accuracy` | 0.9000 ± 0.0196 | 0.8800 ± 0.0392 | worse by 0.0200 | 872 of `validation[:872]` |"
    assert row in markdown.render(found)
    assert "1.96 standard errors" in markdown.render(found)


@pytest.mark.parametrize("view", ["markdown", "comment"])
@pytest.mark.parametrize("name", ["model.layers.{i}.weight", "{i}" + "<" * 3000, "{i}" + "\U0001f600" * 500])
def test_markdown_fits_whatever_the_input(view: str, name: str, sparse: Path) -> None:
    found = report(sparse)
    rows = [replace(found.tensors[0], name=name.format(i=i)) for i in range(20_000)]
    names = tuple(row.name for row in rows)
    many = tuple(budget(pattern=each, worst=each) for each in names[:500])
    found = found.model_copy(
        update={"tensors": tuple(rows), "nonfinite_tensors": names, "not_measured": names, "budgets": many}
    )
    text = markdown.render(found) if view == "markdown" else markdown.comment(found)
    assert len(text.encode()) < (900 * 1024 if view == "markdown" else 65_536)
    assert re.search(r"\n\.\.\. and [\d,]+ more: see report.json", text) and text.endswith("</details>\n")


def test_a_comment_begins_with_the_mark_by_which_it_is_found_again(sparse: Path, cli: Cli) -> None:
    ran = cli("report", sparse, "--comment", "-")
    assert (ran.rc, ran.stdout.splitlines()[0]) == (0, "<!-- lpsparse-report -->")
    assert ran.stdout.partition("\n")[2] == cli("report", sparse, "--markdown", "-").stdout


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_no_name_becomes_markdown(name: str, tmp_path: Path) -> None:
    text = markdown.render(named(name, tmp_path))
    outside = re.sub(r"`[^`\n]*`|<code>[^<\n]*</code>", "", text)  # what is code shows as it stands
    assert all(char.isprintable() or char == "\n" for char in text)
    assert not re.search(r"script|<h1|http|www|@|#1|everyone|\x1b|::|##\[|fake|cmd|\\", outside)
    assert not re.search(r"<code>[^<]*[<`|\\@][^<]*</code>", text)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows} <= {3, 6, 7}
    assert "`" not in outside and "<details" not in outside


# JUnit


def test_junit_has_a_test_case_for_each_budget_and_check(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    flags = ("--min-sparsity", "0.9", "--max-bytes", "100B", "--warn", "max-bytes", "--min-nm", "2:4=0.1")
    assert cli("report", sparse, *flags, "--junit", tmp_path / "j.xml").rc == 1
    suite = next(iter(JUnitXml.fromfile(str(tmp_path / "j.xml"))))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped) == (5, 2, 0, 0)
    cases = {case.name: case for case in suite if case.classname}
    assert cases["min-sparsity"].result[0].message == "limit 90.00 %, value 79.95 %, margin -10.05 %"
    assert cases["max-bytes"].result == [] and "warning: limit 100" in cases["max-bytes"].system_out
    assert cases["weights are those of the manifest"].result == []


@pytest.mark.parametrize("asked", [False, True])
def test_junit_fails_for_nan_where_the_report_does(asked: bool, tmp_path: Path) -> None:
    save_file({"a.weight": np.full((7, 13), np.nan, np.float32)}, tmp_path / "m.safetensors")
    finite = budget("finite", limit=0, value=91, margin=-91)
    found = report(tmp_path / "m.safetensors").model_copy(update={"budgets": (finite,) if asked else ()})
    suite = ElementTree.fromstring(junit.render(found))[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("2", str(int(asked)), "1")
    told = suite.findtext(f"testcase/{'failure' if asked else 'system-out'}")
    assert told is not None and "a.weight" in told


@pytest.mark.parametrize(("met", "word"), [(None, "NOT FINITE"), (True, "NOT FINITE"), (False, "FAILED")])
def test_markdown_of_nan_has_no_passed_heading(met: bool | None, word: str, sparse: Path) -> None:
    budgets = () if met is None else (budget(passed=met),)
    found = report(sparse).model_copy(update={"budgets": budgets, "nonfinite_tensors": ("a.weight",)})
    assert markdown.render(found).splitlines()[0] == f"## lpsparse: {word}"


@pytest.mark.parametrize("name", [*NAMES.values(), "\ufffe\ud800"], ids=[*NAMES.keys(), "no character"])
def test_junit_is_xml_whatever_names_say(name: str, tiny: Path) -> None:
    update = {"model": name, "nonfinite_tensors": (name,), "budgets": (budget(pattern=name, worst=name),)}
    text = junit.render(report(tiny).model_copy(update=update))
    suites = ElementTree.fromstring(text.encode())
    tags = {each.tag for each in suites.iter()}
    assert tags == {"testsuites", "testsuite", "testcase", "failure", "skipped", "system-out"}


# CSV


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def test_csv_has_all_figures_of_each_tensor(sparse: Path, tiny: Path) -> None:
    found = report(sparse, tiny, spectra=True)
    rows = rows_of(spreadsheet.render(found))
    for row, cells in zip(found.tensors, rows, strict=True):
        assert cells["name"] == row.name and cells["zeros"] == str(row.zeros)
        assert cells["shape"] == " ".join(map(str, row.shape))
        for part in ("spectrum", "change", "detail"):
            for key, value in (asdict(getattr(row, part)) if getattr(row, part) else {}).items():
                if not isinstance(value, dict) and key != "histogram":
                    assert cells[f"{part}.{key}"] == ("" if value is None else repr(value))
        if row.detail:
            for key, (met, whole) in {**row.detail.empty}.items():
                assert cells[f"detail.empty.{key}.part"] == str(met)
                assert cells[f"detail.empty.{key}.of"] == str(whole)
            assert cells["detail.histogram.counts"] == " ".join(map(str, row.detail.histogram.counts))


@pytest.mark.parametrize("name", [*NAMES.values(), "-1", "'", "''=x"], ids=[*NAMES.keys(), "-", "'", "''="])
def test_csv_gives_no_formula_and_the_name_back(name: str, tmp_path: Path) -> None:
    text = spreadsheet.render(named(name, tmp_path))
    assert all(char.isprintable() or char in "\r\n" for char in text) and "##[" not in text
    assert not re.search(r"(?m)^::", text)
    for row, cells in zip(named(name, tmp_path).tensors, rows_of(text), strict=True):
        cell = cells["name"]
        assert cell[:1] not in ("=", "+", "-", "@", "\t", "\r")
        cell = cell.removeprefix("'").replace('"', '\\"')
        assert json.loads(f'"{cell}"') == row.name


def test_csv_lines_end_as_rfc_4180_says(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("report", sparse, "--csv", tmp_path / "t.csv").rc == 0
    data = (tmp_path / "t.csv").read_bytes()
    assert data.count(b"\r\n") == data.count(b"\n") == 12
    assert data.decode() == spreadsheet.render(report(sparse))


# All views


@pytest.mark.parametrize("view", ["json", "markdown", "comment", "junit", "csv"])
def test_every_view_has_the_same_bytes_each_time(view: str, sparse: Path, tmp_path: Path, cli: Cli) -> None:
    for name in ("a", "b"):
        assert cli("report", sparse, f"--{view}", tmp_path / name).rc == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != b""
    assert cli("report", sparse, f"--{view}", "-").stdout.encode() == (tmp_path / "a").read_bytes()


def test_two_views_are_not_written_to_one_place(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("report", sparse, "--csv", "-", "--json", "-").rc == 2
    assert cli("report", sparse, "--csv", tmp_path / "x", "--junit", tmp_path / "x").rc == 2
    assert not (tmp_path / "x").exists()


def test_a_view_is_written_when_a_budget_fails(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("report", sparse, "--max-bytes", "1B", "--markdown", tmp_path / "s.md").rc == 1
    assert (tmp_path / "s.md").read_text().startswith("## lpsparse: FAILED")


def test_the_published_schema_is_that_of_the_code() -> None:
    assert (ROOT / "docs" / "report.schema.json").read_text() == schema()


def test_the_schema_refuses_what_is_no_report(sparse: Path, valid: Callable[[object], None]) -> None:
    from jsonschema import ValidationError

    found = json.loads((sparse / "report.json").read_text())
    valid(found)
    for wrong in ({"schema_version": 2}, {"new": 1}, {"tensors": [{}]}, {"bytes": None}):
        with pytest.raises(ValidationError):
            valid({**found, **wrong})


def test_all_views_say_alike_whether_there_was_one_threshold() -> None:
    uncut = tensor(0, "b.query.weight").change
    assert uncut is not None
    uncut = replace(uncut, cut=0, largest_cut=None, smallest_kept=1e-6)
    found = full((tensor(3, "a.query.weight"), tensor(0, "b.query.weight", change=uncut)))
    assert "(not one threshold for all)" in " ".join(table.render(found).split())
    assert "(not one threshold for all)" in markdown.render(found)
    assert "there was not one threshold for all." in render_page(found)


def test_all_views_ask_to_tighten_the_same_budgets(sparse: Path) -> None:
    tight, loose = (budget(passed=True, margin=share * 0.8) for share in (0.04, 0.06))
    base = budget("sparsity of baseline", passed=True, margin=0.5)
    for given in ((tight, base), (loose, base)):
        found = report(sparse).model_copy(update={"budgets": given})
        for text in (table.render(found), markdown.render(found), render_page(found)):
            assert text.count("to spare") == (given[0] is loose) and "take this report" not in text


def test_no_view_says_100_percent_with_a_weight_left() -> None:
    share = Share(of="x", weights=1_000_000, zeros=999_999, sparsity=0.999999)
    row = tensor(3, "a.query.weight", sparsity=0.999999)
    kind = KindRow(
        kind="attention q",
        tensors=1,
        prunable=1,
        weights=1_000_000,
        share=1,
        zeros=999_999,
        sparsity=0.999999,
        stored_bytes=364,
    )
    found = full((row,), prunable=share, all=share, kinds=(kind, kind))
    for text in (table.render(found), markdown.render(found), render_page(found), card_of(found)):
        assert "(100.0" not in text and re.search(r"\(99\.99\s%", text)
        assert not re.search(r"99\.9\s%", text)  # of the same tensor in another table
    assert (table.render(found).count("  99.99 %"), markdown.render(found).count("| 99.99 %")) == (3, 4)


@pytest.mark.parametrize(
    ("share", "digits", "said"),
    [
        (1, 2, "100.00 %"),
        (0.999999, 2, "99.99 %"),
        (0.9999, 1, "99.9 %"),
        (0, 2, "0.00 %"),
        (1e-9, 2, "under 0.01 %"),
        (-1e-9, 2, "over -0.01 %"),
        (-0.5, 0, "-50 %"),
        (1.5, 2, "150.00 %"),
    ],
)
def test_percent_is_not_rounded_to_all_or_nothing(share: float, digits: int, said: str) -> None:
    assert percent(share, digits) == said


def test_a_share_of_nothing_is_left_out(sparse: Path) -> None:
    found = report(sparse).model_copy(update={"n_m": {"2:4": (1, 0)}, "empty": {"rows": (1, 0)}})
    assert summary.neighbours(found) == []
    assert table.render(found) and markdown.render(found) and render_page(found)


def test_a_drop_that_is_a_share_has_its_figures_in_percent() -> None:
    drop = budget("max-quality-drop", limit=0.01, value=0.0125, margin=-0.0025)
    drop = drop.model_copy(update={"relative": True})
    assert summary.budget_row(drop) == ("max-quality-drop", "1.00 %", "1.25 %", "-0.25 %", "FAILED")
    met = drop.model_copy(update={"value": 0.004, "margin": 0.006, "passed": True})
    assert summary.budget_row(met)[3] == "+0.60 %" and " 0.60 %" in str(summary.hint(met))


@pytest.mark.parametrize(
    ("name", "limit", "value", "said"),
    [
        ("max-bytes", 60e6, 90.9e6, "max-bytes: 90.9 MB > 60 MB (over by 52 %)"),
        ("max-bytes", 60e6, 60e6 + 1, "max-bytes: 60,000,001 bytes > 60,000,000 bytes (over by 1.7e-06 %)"),
        ("max-bytes", 60e6, 50e6, "max-bytes: 50 MB < 60 MB"),
        ("max-bytes", 1.0, 364.0, "max-bytes: 364 B > 1 B (364 times the limit)"),
        ("min-sparsity", 0.7, 0.6, "min-sparsity: 60.00 % < 70.00 % (short by 10 points)"),
        ("min-sparsity", 0.7, 0.7, "min-sparsity: 70.00 % = 70.00 %"),
        ("max-quality-drop", 0.01, 0.0125, "max-quality-drop: 0.0125 > 0.01 (over by 25 %)"),
        ("max-quality-drop", 0.0, 0.5, "max-quality-drop: 0.5 > 0"),
        ("max-quality-drop", 0.01, None, "max-quality-drop: not recorded, limit 0.01"),
    ],
)
def test_a_budget_is_one_line_with_its_excess(
    name: str, limit: float, value: float | None, said: str
) -> None:
    least = name.startswith("min")
    margin = None if value is None else value - limit if least else limit - value
    passed = margin is not None and margin >= 0
    given = Budget(name=name, limit=limit, value=value, margin=margin, passed=passed)
    assert summary.budget_line(given) == said


# The terminal


def test_a_warning_is_no_failure(sparse: Path, cli: Cli) -> None:
    ran = cli("report", sparse, "--max-bytes", "100B", "--warn", "max-bytes", "--min-sparsity", "0.7")
    assert ran.rc == 0 and ran.stdout.splitlines()[-1] == "warn: 1 of 2 budgets warns"
    row = next(line for line in ran.stdout.splitlines() if "max-bytes: " in line)
    assert row.split()[:5] == ["warn", "max-bytes:", "3.08", "kB", ">"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"limit": 0.8, "margin": 0.1}, True),
        ({"limit": 0.8, "margin": 0.04}, False),
        ({"limit": 0.0, "margin": 0.001}, True),
        ({"limit": 0.0, "margin": 0.0}, False),
        ({"limit": 0.8, "margin": None}, False),
        ({"limit": 0.8, "margin": 0.1, "passed": False}, False),
        ({"limit": 0.8, "margin": 0.1, "name": "sparsity of baseline"}, False),
    ],
)
def test_only_a_budget_that_is_met_with_room_is_to_be_tightened(fields: dict[str, Any], said: bool) -> None:
    given = budget(**{"value": 0.9, "passed": True, **fields})
    assert (summary.hint(given) is not None) == said


def test_the_changes_beside_the_source_are_told(sparse: Path, tiny: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("report", sparse, tiny)
    assert "  base           tiny, " in ran.stdout
    assert "  vs base        291 set to zero, 0 revived, 0 other weights changed\n" in ran.stdout
    assert re.search(r"  cut            magnitudes up to 1\.28\d+; smallest kept 1\.28\d+\n", ran.stdout)
    arrays = tiny_arrays()
    arrays[PRUNABLE[0]][0, 3] += 2
    save_file(arrays, tmp_path / "other.safetensors")
    ran = cli("report", tmp_path / "other.safetensors", tiny)
    assert "  compared with  tiny, " in ran.stdout and "0 set to zero, 0 revived, 1 other" in ran.stdout
    assert re.search(rf"largest change 2 .* at\s+index\s+3\s+of\s+{PRUNABLE[0]}\)", ran.stdout)


def test_oddities_are_told_where_they_are_and_nowhere_else(tmp_path: Path, sparse: Path, cli: Cli) -> None:
    array = np.ones((8, 8), np.float32)
    array[0], array[1, 0], array[1, 1] = -0.0, 1e-40, 1e-4
    save_file({"a.weight": array}, tmp_path / "m.safetensors")
    ran = cli("report", tmp_path / "m.safetensors", "--full")
    assert "subnormal" not in cli("report", tmp_path / "m.safetensors").stdout
    for line in ("-0.0           8 ", "subnormal      1 ", "nearly zero    2 "):
        assert f"  {line}" in ran.stdout
    assert "  all-zero rows  1 of 8 (12.50 %)\n" in ran.stdout
    assert not re.search(
        "-0.0 |subnormal|nearly|heads|largest change", cli("report", sparse, "--full").stdout
    )


def test_nan_is_the_last_word_and_no_failure(tmp_path: Path, cli: Cli) -> None:
    save_file({"a.weight": np.full((7, 13), np.nan, np.float32)}, tmp_path / "m.safetensors")
    ran = cli("report", tmp_path / "m.safetensors")
    assert (ran.rc, ran.stdout.splitlines()[-1]) == (0, "NOT FINITE: NaN or Inf in 1 of 1 tensors")
    found = report(tmp_path / "m.safetensors")
    assert table.render(found, color=True).splitlines()[-1].startswith("\x1b[31mNOT FINITE\x1b[0m: ")


@pytest.mark.parametrize("width", [20, 40, 80, 100_000])
def test_the_report_fits_its_width_at_twenty_thousand_tensors(width: int, sparse: Path, tiny: Path) -> None:
    found = report(sparse, tiny, min_sparsity="0.5", max_bytes="1B", max_layer_sparsity="*.mlp.*=0.1")
    row = found.tensors[3]
    rows = [replace(row, name=f"model.layers_{i}.self_attention.weight") for i in range(20_000)]
    text = table.render(found.model_copy(update={"tensors": tuple(rows)}), width)
    lines = text.splitlines()
    assert len(lines) < 90 + 8000 // width
    assert "... and 19,985 more tensors" in " ".join(text.split())
    if width >= 40:
        assert max(map(len, lines)) <= width


# The same files from Python


def test_python_writes_every_view_as_the_command_line_does(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    names = ("json", "html", "markdown", "comment", "junit", "csv")
    files = {view: tmp_path / f"python.{view}" for view in names}
    found = report(sparse, tmp_path / "tiny", max_bytes="1B", **files)
    words = [word for view in names for word in (f"--{view}", tmp_path / f"cli.{view}")]
    assert cli("report", sparse, tmp_path / "tiny", "--max-bytes", "1B", *words).rc == 1 and not found.passed
    for view, path in files.items():
        assert path.read_bytes() == (tmp_path / f"cli.{view}").read_bytes(), view


def test_a_report_that_fails_in_python_leaves_no_earlier_file_under_its_name(
    sparse: Path, tmp_path: Path
) -> None:
    report(sparse, html=tmp_path / "r.html")
    with pytest.raises(LpsparseError):
        report(tmp_path / "gone", html=tmp_path / "r.html")
    assert (tmp_path / "r.html.old").is_file() and not (tmp_path / "r.html").exists()


WRONG_FILES: dict[str, tuple[dict[str, str], str]] = {
    "one place": ({"json": "x", "html": "x"}, "LPS292"),
    "in the model": ({"csv": "sparse/x.csv"}, "LPS405"),
    "its weights": ({"junit": "sparse/model.safetensors"}, "LPS405"),
    "no folder": ({"html": "gone/x"}, "LPS409"),
}


@pytest.mark.parametrize(("files", "code"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_files_that_cannot_be_written_are_refused_in_python_too(
    files: dict[str, str], code: str, sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sparse.parent)
    before = tree_hash(sparse.parent)
    with pytest.raises(LpsparseError) as caught:
        report(sparse, **files)
    assert caught.value.code == code and tree_hash(sparse.parent) == before


def test_rows_are_folded_where_one_name_stands_for_them_alone() -> None:
    def names(*given: str, alike: Any = lambda name: 0) -> list[str]:
        return [each.name for each in folded(given, str, alike)]

    assert names("a.0.w", "a.1.w", "a.2.w") == ["a.{0..2}.w"]
    assert names("a.0.b.0.w", "a.0.b.1.w", "a.1.b.0.w", "a.1.b.1.w") == ["a.{0..1}.b.{0..1}.w"]
    odd = ("a.0.b.0.w", "a.1.b.1.w", "a.0.b.1.w", "a.1.b.0.w")  # two of one shape, two of another
    found = names(*odd, alike=lambda name: name[2] == name[6])
    assert sorted(found) == sorted(odd)
    assert names("layer.01.w", "layer.1.w") == ["layer.01.w", "layer.1.w"]
    assert names("layers." + "9" * 5000 + ".w") == ["layers." + "9" * 5000 + ".w"]


def test_a_budget_that_fails_never_reads_as_equal() -> None:
    given = {"name": "min-sparsity", "limit": 0.7, "value": 0.69999, "margin": -1e-5, "passed": False}
    line = summary.budget_line(Budget(**given))
    assert line.startswith("min-sparsity: 69.999 % < 70.000 %")


@pytest.mark.parametrize("words", [("--min-sparsity", "79%"), ("--min-sparsity", "*.mlp.*=50 %")])
def test_a_budget_takes_a_percentage_too(words: tuple[str, str], sparse: Path, cli: Cli) -> None:
    assert cli("report", sparse, *words).rc == 0
    assert cli("report", sparse, "--max-bytes", "50%").rc == 2
