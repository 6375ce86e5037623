"""The HTML page in a real Chromium: light, dark, narrow, on paper; nothing asked for, nothing complained of.
Needs `pip install '.[browser]'` and a Chromium (in PATH, or playwright's own); otherwise it is skipped."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.reports import bare, full, hostile, tensors

from lpsparse.reporting.html.page import render

api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'"
)
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
)

REPORTS = {"everything": full(tensors(61)), "nothing": bare(), "hostile": hostile("<b>\u202e" + "long" * 90)}
MODES: dict[str, dict[str, Any]] = {
    "light": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
    "narrowest": {"viewport": {"width": 320, "height": 600}, "color_scheme": "dark"},
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The browser; its pages are closed with it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as play:
        try:
            browser = play.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture(params=REPORTS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "r.html").write_text(render(REPORTS[request.param]), encoding="utf-8")
    return tmp_path / "r.html"


class Visit:
    """A page opened with the network cut: what it asked for and what the browser said of it."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_context(**options).new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.route("**/*", self._answer)
        self.page.goto(file.as_uri())

    def _answer(self, route: Any) -> None:
        self.asked.append(route.request.url)
        route.continue_() if len(self.asked) == 1 else route.abort()


@pytest.mark.parametrize("mode", MODES)
def test_the_page_asks_for_nothing_complains_of_nothing_and_fits(
    chromium: Any, file: Path, mode: str, tmp_path: Path
) -> None:
    visit = Visit(chromium, file, **MODES[mode])
    visit.page.screenshot(path=tmp_path / f"{mode}.png", full_page=True)
    assert (visit.asked, visit.said) == ([file.as_uri()], [])
    width = visit.page.evaluate("document.documentElement.scrollWidth")
    assert width == MODES[mode]["viewport"]["width"]
    assert (tmp_path / f"{mode}.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", [320, 360, 390, 600])
def test_on_a_narrow_screen_every_cell_of_a_budget_is_in_sight_with_its_word(
    chromium: Any, file: Path, width: int
) -> None:
    page = Visit(chromium, file, viewport={"width": width, "height": 740}).page
    cells: list[Any] = page.evaluate(
        "[...document.querySelectorAll('header tbody :is(th, td)')].filter(each => each.innerText).map("
        "each => [each.getBoundingClientRect().right, each.closest('.scroll').scrollWidth,"
        " getComputedStyle(each, '::before').content])"
    )
    assert bool(cells) == ("Budgets, failed first" in page.content())
    assert all(right <= width and inside <= width for right, inside, _ in cells)
    heads = ("budget", "value", "limit", "margin", "level", "remark")
    assert not cells or {word for _, _, word in cells} == {"none", *(f'"{word}"' for word in heads)}


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_no_two_words_under_a_figure_lie_on_one_another(chromium: Any, file: Path, width: int) -> None:
    page = Visit(chromium, file, viewport={"width": width, "height": 740}).page
    words: list[list[Any]] = page.evaluate(
        "[...document.querySelectorAll('svg.plot')].flatMap((plot, i) => [...plot.querySelectorAll('text')]"
        ".map(each => [i, each.getBoundingClientRect(), each.textContent])"
        ".map(([i, box, said]) => [i, Math.round(box.top), box.left, box.right, said]))"
    )
    assert len(words) > 10 or "There is no histogram" in page.content()
    lines: dict[tuple[int, int], list[Any]] = {}
    for plot, top, *word in words:
        lines.setdefault((plot, top), []).append(word)
    on: list[Any] = []
    for line in lines.values():
        ordered = sorted(line)
        on += [(one, two) for one, two in pairwise(ordered) if one[1] > two[0]]
    assert on == []


@pytest.mark.parametrize("mode", ["light", "dark", "narrow"])
def test_axe_finds_nothing_serious(chromium: Any, file: Path, mode: str) -> None:
    visit = Visit(chromium, file, **MODES[mode], bypass_csp=True)  # axe is a script, which the page forbids
    visit.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = axe.Axe().run(visit.page).response
    assert len(found["passes"]) > 10
    assert [(each["id"], each["impact"]) for each in found["violations"]] == []


def test_on_paper_all_tables_are_open_and_colours_are_light(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text(render(REPORTS["everything"]), encoding="utf-8")
    page = Visit(chromium, tmp_path / "r.html", **MODES["dark"]).page
    page.emulate_media(media="print")
    heights = page.evaluate("[...document.querySelectorAll('details table')].map(each => each.offsetHeight)")
    assert heights and all(height > 20 for height in heights)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.pdf(path=tmp_path / "r.pdf", format="A4")
    assert (tmp_path / "r.pdf").stat().st_size > 10_000


def test_the_keyboard_reaches_the_skip_link_the_views_and_the_data(chromium: Any, tmp_path: Path) -> None:
    (tmp_path / "r.html").write_text(render(REPORTS["everything"]), encoding="utf-8")
    page = Visit(chromium, tmp_path / "r.html", **MODES["light"]).page
    seen: list[str] = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("document.activeElement.getAttribute('href') || document.activeElement.tagName")
        )
    assert seen[:3] == ["#main", "#verdict", "#bytes"]
    assert {"DIV", "SUMMARY"} <= set(seen)
    page.keyboard.press("Enter")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 1


def test_scripts_could_not_run_even_if_one_were_there(chromium: Any, tmp_path: Path) -> None:
    text = render(REPORTS["nothing"]).replace("</main>", "<script>document.title = 'ran'</script></main>")
    (tmp_path / "r.html").write_text(text, encoding="utf-8")
    visit = Visit(chromium, tmp_path / "r.html", **MODES["light"])
    assert visit.page.title() != "ran" and "Content Security Policy" in visit.said[0]
