"""The HTML page stands alone: no script, no request; nothing from a checkpoint rules it."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.cli import Cli, Ran
from support.files import f32, write_safetensors
from support.reports import FORBIDDEN, NAMES, bare, base, full, hostile, points, quality, tensor, tensors

from lpsparse import prune
from lpsparse.reporting.html.layers import in_order
from lpsparse.reporting.html.page import render
from lpsparse.reporting.html.parts import named, number, percent
from lpsparse.reporting.records import KINDS, Budget, Estimate, Histogram

VOID = {"meta", "br", "hr", "img", "link", "input"}
VIEWS = (
    "verdict",
    "bytes",
    "layers",
    "types",
    "quality",
    "magnitudes",
    "patterns",
    "training",
    "changes",
    "method",
)
HOSTILE = [
    *NAMES.values(),
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style></svg><b>",
    "{{ 7 * 7 }}{% raw %}",
    "9" * 5000,
    "\ud800",
    "א" * 40,
    "javascript:alert(1)",
]


class Page(HTMLParser):
    """Every element with its attributes and ancestors; fails for what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.words: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self.open)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.titles.append(data)

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _, _ in self.elements)


REPORTS = {
    "no tensors": bare(),
    "nothing optional": bare(tensors(7)),
    "everything": full(tensors(61)),
    "one tensor": full(tensors(1)),
    "many": full(tensors(1300)),
    "one point": full(tensors(7), training=points(1)),
    "packed": full(tensors(7), layout="packed"),
    "bitmask": full(tensors(7), layout="bitmask"),
    "two qualities": full(tensors(7), quality=(quality(), quality(metric="loss", higher_is_better=False))),
    "no head before": full(tensors(7), quality=(quality(before=None, before_error=None, after_error=None),)),
    "not the source": full(tensors(7), base=base(tensors(7)).model_copy(update={"is_source": False})),
    "wide magnitudes": full(tensors(7), histogram=Histogram(first=-1075, counts=(1,) * 2099)),
    "dry run": bare(
        tensors(7), estimate=Estimate(disk_bytes=1, free_bytes=2, memory_bytes=3, seconds=None, rule="so")
    ),
    "nothing changed": full(tuple(replace(row, change=None) for row in tensors(7))),
    **{f"hostile {i}": hostile(name) for i, name in enumerate(HOSTILE)},
}


@cache
def page_of(name: str) -> str:
    return render(REPORTS[name])


@pytest.fixture(params=REPORTS, scope="module")
def text(request: pytest.FixtureRequest) -> str:
    return page_of(request.param)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


# What it is made of


def test_no_page_has_a_script_or_loads_anything(page: Page, text: str) -> None:
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {
        "script",
        "img",
        "link",
        "iframe",
        "object",
        "embed",
        "form",
        "base",
        "use",
        "image",
        "b",
    }
    for _, attributes, _ in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "style", "srcset")]
        assert (attributes.get("href") or "#").startswith("#")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_the_policy_of_the_page_allows_its_own_style_and_nothing_else(page: Page, text: str) -> None:
    given = [a["content"] for _, a, _ in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    style = text.partition("<style>")[2].partition("</style>")[0]
    known = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert given == [f"default-src 'none'; style-src 'sha256-{known}'; base-uri 'none'; form-action 'none'"]


def test_every_page_has_the_ten_views_in_order_and_a_link_to_each(page: Page) -> None:
    views = [a["id"] for tag, a, _ in page.elements if tag in ("header", "section")]
    links = [a["href"] for tag, a, _ in page.elements if tag == "a"]
    assert tuple(views) == VIEWS
    assert links == ["#main", *(f"#{each}" for each in VIEWS)]


def test_every_id_is_there_once_and_every_reference_has_its_id(page: Page) -> None:
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    pointers = [a.get("aria-labelledby") or "" for _, a, _ in page.elements]
    assert set(" ".join(pointers).split()) <= set(ids)


def test_every_drawing_has_words_and_a_table_behind_it(page: Page) -> None:
    drawings = [(a, inside) for tag, a, inside in page.elements if tag == "svg" and "svg" not in inside]
    assert all(a["role"] == "img" and "figure" in inside for a, inside in drawings)
    inside_svg = [
        tag for tag, _, inside in page.elements if inside[-1:] == ("svg",) and inside.count("svg") == 1
    ]
    assert (inside_svg.count("title"), inside_svg.count("desc")) == (len(drawings), len(drawings))
    tables = [inside for tag, _, inside in page.elements if tag == "table" and "details" in inside]
    assert len(tables) == page.count("figure")


def test_tables_have_captions_scopes_and_names_of_their_own(page: Page) -> None:
    assert page.count("caption") == page.count("table")
    assert all("scope" in a for tag, a, _ in page.elements if tag == "th")
    regions = [a["aria-label"] for _, a, _ in page.elements if a.get("role") == "region"]
    assert len(regions) == page.count("table")
    assert len({*regions, *page.titles}) == len(regions) + page.count("section")


def test_headings_go_down_one_level_at_a_time(page: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_every_length_of_a_drawing_is_a_finite_number(text: str) -> None:
    assert not re.search(r'="[^"]*\b(nan|inf|None)\b[^"]*"', text.partition("<main")[2].partition("<bdi")[0])
    for value in re.findall(r'\b(?:x|y|x1|x2|y1|y2|cx|cy|r|width|height)="([^"]*)"', text):
        assert re.fullmatch(r"-?\d+(\.\d+)?%?", value), value


# Names


def test_no_page_holds_a_control_or_bidi_character(text: str) -> None:
    assert not FORBIDDEN.search(text)
    assert text.encode("utf-8").isascii() or "\ud800" not in text


@pytest.mark.parametrize("i", range(len(HOSTILE)))
def test_a_hostile_name_adds_no_element_and_no_attribute(i: int) -> None:
    ours, plain = Page(page_of(f"hostile {i}")), Page(render(hostile("plain")))
    forms = [
        [(tag, sorted(a)) for tag, a, _ in each.elements if tag not in ("bdi", "code")]
        for each in (ours, plain)
    ]
    kinds = [{(tag, *keys) for tag, keys in form} for form in forms]
    assert kinds[0] <= kinds[1]
    assert len(forms[0]) == len(forms[1])


def test_a_hostile_name_is_shown_as_text() -> None:
    words = "".join(Page(page_of(f"hostile {HOSTILE.index(NAMES['script'])}")).words)
    assert words.count("<script>alert(1)</script>.weight") == 4  # once in a warning


def test_a_very_long_name_is_cut_in_its_middle_and_whole_in_its_title() -> None:
    name = "a" * 200 + "b" * 200
    assert re.fullmatch(f'<bdi title="{name}">a+…b+</bdi>', named(name))
    assert len(named("x" * 10**6)) < 1500


def test_hostile_names_in_a_file_pass_through_the_command(tmp_path: Path, cli: Cli) -> None:
    given = {f"{name}.{i}.weight": f32(7, 13) for i, name in enumerate(NAMES.values())}
    write_safetensors(tmp_path / "m.safetensors", given)
    assert cli("report", tmp_path / "m.safetensors", "--html", tmp_path / "r.html").rc == 0
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert page.count("script") == page.count("img") == 0


# Bytes, size


def test_the_same_report_gives_the_same_bytes(tmp_path: Path, tiny: Path, cli: Cli) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    ran = [cli("report", tmp_path / "out", tiny, "--html", tmp_path / f"{i}.html") for i in range(2)]
    assert [each.rc for each in ran] == [0, 0]
    first, second = ((tmp_path / f"{i}.html").read_bytes() for i in range(2))
    assert first == second and str(tmp_path).encode() not in first


def test_twenty_thousand_tensors_with_long_names_stay_under_3_mb() -> None:
    rows = tuple(tensor(i, f"{'long.' * 40}{i}.q_proj.weight") for i in range(20_000))
    text = render(full(rows))
    assert len(text.encode()) < 3_000_000
    assert "200 largest of 20\u202f000 tensors; all are in report.json" in text
    assert Page(text).count("rect") < 1000


# What it says


def test_a_page_without_what_is_optional_says_what_is_missing() -> None:
    words = " ".join("".join(Page(page_of("nothing optional")).words).split())
    for missing in (
        "No budgets were set",
        "No BASE was given",
        "No quality is recorded",
        "There is no histogram",
        "No patterns are known",
        "No training run is recorded",
        "How it was made is not known",
        "This report does not say",
    ):
        assert missing in words


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(name="max-bytes", limit=10, value=20, margin=-10, passed=False), "Failed: 1 of 1 budget"),
        (Budget(name="max-bytes", limit=10, value=20, margin=-10, passed=False, level="warn"), "1 warning"),
        (Budget(name="max-bytes", limit=10, value=10, margin=0, passed=True), "Passed: the budget is met"),
    ],
)
def test_the_verdict_is_in_words(budget: Budget, words: str) -> None:
    page = render(bare(tensors(7), budgets=(budget,)))
    assert words in page.partition("</title>")[0] and words in page.partition("<body>")[2]


@pytest.mark.parametrize(("value", "hint"), [(8_000_000, True), (9_600_000, False), (10_000_000, False)])
def test_a_budget_with_room_asks_to_be_tightened(value: int, hint: bool) -> None:
    budget = Budget(name="max-bytes", limit=1e7, value=value, margin=1e7 - value, passed=True)
    assert ("to spare" in render(bare(tensors(7), budgets=(budget,)))) == hint


def test_nan_tensors_are_named_at_the_top() -> None:
    top = render(bare(tensors(7), nonfinite_tensors=("a.weight",))).partition("<section")[0]
    assert "NaN or Inf in 1 tensor: <bdi>a.weight</bdi>." in top


@pytest.mark.parametrize(
    "budgets", [(), (Budget(name="max-bytes", limit=9, value=9, margin=0, passed=True),)]
)
def test_a_page_of_nan_is_not_passed_and_not_green(budgets: tuple[Budget, ...]) -> None:
    page = render(bare(tensors(7), nonfinite_tensors=("a.weight",), budgets=budgets))
    assert '<p class="verdict failed">' in page and "Not finite: NaN or Inf in 1 of 7 tensors" in page
    assert "Passed" not in page and "verdict passed" not in page


def test_a_page_on_stdout_holds_no_command_for_the_runner() -> None:
    name = "::error::x ##[error]fake"
    page = render(full(tensors(7), model=name, not_measured=(name,), nonfinite_tensors=(name,)))
    assert "##[" not in page and not re.search(r"(?m)^\s*::", page.partition("</style>")[2])
    assert "".join(Page(page).words).count(name) >= 3


def test_histograms_far_from_each_other_are_drawn_by_their_bins() -> None:
    rows = tensors(7)
    far = Histogram(first=0, counts=(7,))
    object.__setattr__(far, "first", 3_000_000)  # more than a report.json may have
    found = full(rows).model_copy(update={"histogram": far})
    page = render(found)
    assert len(page) < 200_000 and "2^3000000 to 2^3000001" in page


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_magnitude_that_is_none_is_no_threshold(value: float) -> None:
    row = tensor(3, "a.query.weight")
    assert row.change is not None
    change = replace(row.change, largest_cut=value, smallest_kept=value)
    page = render(full((replace(row, change=change),)))
    assert "no threshold is drawn" in page


def test_a_cut_of_nan_has_a_page(tmp_path: Path, cli: Cli) -> None:
    for name, first in (("base", math.nan), ("cut", 0.0)):
        array = np.ones((7, 13), np.float32)
        array[0, 0] = first
        save_file({"a.weight": array}, tmp_path / f"{name}.safetensors")
    ran = cli("report", tmp_path / "cut.safetensors", tmp_path / "base.safetensors", "--html", "-")
    assert ran.rc == 0 and "no threshold is drawn" in ran.stdout


def test_intervals_are_at_95_percent() -> None:
    words = "".join(Page(page_of("everything")).words)
    assert "± 0.0190 and ± 0.0194 (95 % intervals)" in words and "the intervals overlap" in words
    apart = render(full(tensors(7), quality=(quality(after=0.5),)))
    assert "the intervals are apart" in apart


def compared(**changes: float | None) -> list[str]:
    """The points of the view of quality, as its table names them."""
    of = [
        Budget(name=f"{name} of baseline", limit=0.88, value=0.9, passed=True, **{"baseline": 0.9} | changes)
        for name in ("accuracy", "sparsity")
    ]
    page = render(full(tensors(7), budgets=tuple(of)))
    view = page[page.index('id="quality"') : page.index('id="magnitudes"')]
    drawn = re.findall(r">(before|after|baseline|allowed) 0[.\d]+</text>", view)
    assert len(drawn) == len(re.findall(r"<circle", view)) == view.count("<tr>") - 1
    return drawn


def test_a_baseline_is_drawn_where_it_is_and_where_it_allows_to_be() -> None:
    assert compared() == ["before", "after", "baseline", "allowed"]
    assert compared(baseline=0.88) == ["before", "after", "baseline"]
    assert compared(baseline=None) == ["before", "after", "allowed"]


@pytest.mark.parametrize("after", [0.5, 0.9, 0.905, 0.91, 1.3])
def test_no_words_of_a_point_stand_beside_those_of_another(after: float) -> None:
    page = render(full(tensors(7), quality=(quality(after=after),)))
    heights = re.findall(r'y="([\d.]+)"[^>]*>(?:before|after|baseline|allowed) 0?[.\d]+</text>', page)
    at = sorted(map(float, heights))
    assert len(at) == 4 and all(b - a >= 16 for a, b in pairwise(at)) and at[-1] <= 214


def test_layers_are_in_the_order_of_the_model_and_not_of_the_alphabet() -> None:
    names = [
        "lm_head.weight",
        "layers.10.mlp.weight",
        "layers.2.mlp.weight",
        "wte.weight",
        "layers.2.att.weight",
    ]
    ordered = in_order([tensor(0, name) for name in names])
    assert [row.name for row in ordered] == [names[3], names[4], names[2], names[1], names[0]]


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.5, "50.00"), (0, "0.00"), (1, "100.00"), (0.999999, "99.99"), (1e-9, "under 0.01")],
)
def test_percent_never_rounds_to_all_or_nothing(share: float, words: str) -> None:
    assert percent(share) == f"{words}\u202f%"


@pytest.mark.parametrize(
    ("value", "words"), [(None, "–"), (-1.5, "−1.5"), (1.23456e-05, "1.235e−5"), (0, "0")]
)
def test_numbers_have_few_digits(value: float | None, words: str) -> None:
    assert number(value) == words


def test_the_page_goes_to_stdout_alone_and_the_exit_code_stays(tiny: Path, cli: Cli) -> None:
    ran: Ran = cli("report", tiny, "--html", "-", "--min-sparsity", "0.9")
    assert ran.rc == 1
    assert ran.stdout.startswith("<!DOCTYPE html>") and ran.stdout.endswith("</html>\n")


def test_every_layer_type_has_a_colour() -> None:
    style = page_of("everything")
    last = len(KINDS) - 1
    assert all(
        f".k{i} {{ fill: var(--k{i}); }}" in style and f".key.k{i} " in style for i in range(1, last + 1)
    )
    assert style.count(f"--k{last}: #") == 2 and f"--k{last + 1}" not in style
