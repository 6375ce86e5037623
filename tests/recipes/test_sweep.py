"""`sweep`: what is shared, what is run again, the curve, and the model that it names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from support.cli import Ran, failed
from support.files import PRUNABLE_WEIGHTS, tree_hash
from support.models import SMALL

import lpsparse
from lpsparse.reporting.charts import sweep_figure

Cli = Callable[..., Ran]
STEPS: list[dict[str, Any]] = [
    {"pack": {"out": "before"}},
    {"prune": {"sparsity": 0.1, "model": "before", "out": "cut"}},
    {"pack": {"out": "packed"}},
    {"report": {"min_sparsity": 0.5}},
]


@pytest.fixture
def here(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny.parent)
    write(tiny.parent, STEPS)
    return tiny.parent


def write(folder: Path, steps: list[dict[str, Any]], **top: Any) -> None:
    (folder / "r.yaml").write_text(yaml.safe_dump({"model": "tiny", "out": "made", **top, "steps": steps}))


def test_each_sparsity_has_its_folder_and_the_rest_is_made_once(here: Path, cli: Cli) -> None:
    ran = cli("sweep", "r.yaml", "--sparsity", "0.75,0.5,0.955")
    assert ran.rc == 0, ran.stderr
    made = [path.relative_to("made-sweep").as_posix() for path in Path("made-sweep").glob("*/*")]
    assert sorted(made) == [
        "s0.50/cut",
        "s0.50/packed",
        "s0.75/cut",
        "s0.75/packed",
        "s0.955/cut",
        "s0.955/packed",
        "shared/before",
    ]
    assert ran.stderr.count("] pack -> made-sweep/shared") == 1 and not Path("made").exists()
    assert ran.stdout.splitlines()[-1] == "made-sweep/s0.955/packed"


def test_a_sweep_writes_the_same_table_as_json_and_csv(here: Path, cli: Cli) -> None:
    ran = cli("sweep", "r.yaml", "--sparsity", "0.5,0.75", "--out", "curve", "--json", "--quiet")
    found = json.loads(ran.stdout)
    assert [row["zeros"] for row in found["rows"]] == [PRUNABLE_WEIGHTS // 2, PRUNABLE_WEIGHTS * 3 // 4]
    assert json.loads(Path("curve/sweep.json").read_text()) | {"out": "curve"} == found
    lines = Path("curve/sweep.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[2].startswith("0.75,273,364,") and ran.stderr == ""


def test_a_sweep_again_skips_what_is_finished_and_changes_no_byte(here: Path, cli: Cli) -> None:
    cli("sweep", "r.yaml", "--sparsity", "0.5,0.75")
    before = tree_hash(Path("made-sweep"))
    ran = cli("sweep", "r.yaml", "--sparsity", "0.75,0.5")
    assert ran.stderr.count("finished already") == 5
    assert tree_hash(Path("made-sweep")) == before
    assert cli("sweep", "r.yaml", "--sparsity", "0.5,0.75,0.9").stderr.count("finished already") == 5


def test_a_sweep_that_fails_leaves_no_table_that_could_be_its_own(here: Path, cli: Cli) -> None:
    cli("sweep", "r.yaml", "--sparsity", "0.5")
    before = Path("made-sweep/sweep.json").read_bytes()
    failed(cli("sweep", "r.yaml", "--sparsity", "0.75", "--set", "report.base=gone", "--quiet"), 3)
    assert sorted(path.name for path in Path("made-sweep").glob("sweep*")) == [
        "sweep.csv.old",
        "sweep.json.old",
        "sweep.svg.old",
    ]
    assert Path("made-sweep/sweep.json.old").read_bytes() == before
    cli("sweep", "r.yaml", "--sparsity", "0.5")
    assert len(list(Path("made-sweep").glob("sweep*"))) == 3


def test_no_model_within_the_budgets_is_exit_1(here: Path, cli: Cli) -> None:
    ran = cli("sweep", "r.yaml", "--sparsity", "0.25,0.4", "--quiet")
    assert ran.rc == 1 and ran.stdout.splitlines()[-1] == "no model meets the budgets"
    assert json.loads(Path("made-sweep/sweep.json").read_text())["smallest"] is None


@pytest.mark.parametrize(
    ("steps", "values", "words"),
    [
        ([{"prune": {"below": 0.1}}], "0.5", "cuts by below"),
        ([{"prune": {"gap": True}}], "0.5", "by gap"),
        ([{"prune": {"n_m": "2:4"}}], "0.5", "by n_m"),
        ([{"pack": {}}], "0.5", "no step has"),
        (STEPS, "0.5,1", "--sparsity 1"),
        (STEPS, "0.5,0.50", "stands twice"),
        (STEPS, ",", "no values"),
        (STEPS, "180%", "180%"),
        (STEPS, "nan", "nan"),
    ],
)
def test_what_cannot_be_swept_is_exit_2(steps: Any, values: str, words: str, here: Path, cli: Cli) -> None:
    write(here, steps)
    assert words in failed(cli("sweep", "r.yaml", "--sparsity", values), 2)
    assert sorted(path.name for path in here.iterdir()) == ["r.yaml", "tiny"]


def test_a_sweep_of_training_draws_the_dense_model_beside_the_others(tmp_path: Path) -> None:
    tune = {"finetune": {**SMALL, "steps": 4, "target_sparsity": 0.5, "threads": 1, "out": "tuned"}}
    steps = [tune, {"report": {"max_quality_drop": 5}}]
    write(tmp_path, steps, model="bundled:stories260k", out=str(tmp_path / "made"))
    found = lpsparse.sweep(tmp_path / "r.yaml", [0.3, "0.6"])
    assert found["dense"]["quality"] == found["rows"][0]["before"] and found["smallest"] == "s0.60/tuned"
    figure = (tmp_path / "made-sweep" / "sweep.svg").read_text()
    assert all(f">{word}</text>" in figure for word in ("dense", "30 %", "60 %", "max-quality-drop 5"))


PRUNE: dict[str, Any] = {"prune": {"sparsity": 0.1, "out": "cut"}}
PACK = {"pack": {"out": "packed"}}
NAMED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "the one that the budgets are of": ([PRUNE, {"report": {"max_bytes": "9MB"}}, PACK], "cut"),
    "the last written": ([PRUNE, {"report": {}}, PACK], "packed"),
    "budgets before a report without any": (
        [PRUNE, {"report": {"min_sparsity": 0.1}}, PACK, {"report": {}}],
        "cut",
    ),
    "beside a budget of another model": (
        [PRUNE, PACK, {"report": {"model": "tiny", "max_bytes": "1B"}}],
        "packed",
    ),
}


@pytest.mark.parametrize(("steps", "named"), NAMED.values(), ids=NAMED.keys())
def test_the_figures_of_a_row_are_those_of_its_folder(steps: Any, named: str, here: Path) -> None:
    write(here, steps)
    (found,) = lpsparse.sweep("r.yaml", [0.75])["rows"]
    measured = lpsparse.report(here / "made-sweep" / found["folder"])
    assert found["folder"] == f"s0.75/{named}"
    assert (found["file_bytes"], found["layout"]) == (measured.bytes.file_bytes, measured.layout)
    assert (found["zeros"], found["weights"]) == (measured.prunable.zeros, measured.prunable.weights)


def test_a_baseline_may_be_what_an_earlier_step_makes(here: Path) -> None:
    write(here, [PRUNE, PACK, {"report": {"baseline": "cut", "max_regression": 1}}])
    found = lpsparse.sweep("r.yaml", [0.5, 0.75])
    assert found["smallest"] == "s0.75/packed"
    assert [len(row["budgets"]) for row in found["rows"]] == [2, 2]


def test_a_budget_that_a_shared_model_fails_fails_the_sweep(here: Path, cli: Cli) -> None:
    write(here, [{"report": {"min_sparsity": 0.5}}, PRUNE])
    ran = cli("sweep", "r.yaml", "--sparsity", "0.75", "--json", "--quiet")
    (found,) = json.loads(ran.stdout)["rows"]
    assert ran.rc == 1 and not found["passed"] and found["zeros"] == PRUNABLE_WEIGHTS * 3 // 4
    assert [budget["name"] for budget in found["budgets"]] == ["min-sparsity"]


EVAL = {"eval": {key: SMALL[key] for key in ("task", "data", "max_length")}}


@pytest.mark.parametrize(("steps", "measured"), [([PRUNE, EVAL, PACK], True), ([EVAL, PRUNE, PACK], False)])
def test_quality_is_that_of_the_folders_own_weights(steps: Any, measured: bool, tmp_path: Path) -> None:
    write(tmp_path, steps, model="bundled:stories260k", out=str(tmp_path / "made"))
    (found,) = lpsparse.sweep(tmp_path / "r.yaml", [0.3])["rows"]
    assert (found["after"] is not None) == measured


def row(sparsity: float, quality: float | None, *, passed: bool = True, **more: Any) -> dict[str, Any]:
    limits = {"min-sparsity": 0.4, "max-quality-drop": 0.2, "max-bytes": 700}
    budgets = [{"name": name, "limit": limit, "value": 0, "passed": passed} for name, limit in limits.items()]
    return {
        "sparsity": sparsity,
        "folder": f"s{sparsity}/x",
        "layout": "dense",
        "zeros": int(1000 * sparsity),
        "weights": 1000,
        "file_bytes": 1000,
        "bitmask_bytes": int(1000 * (1 - sparsity)),
        "metric": "loss",
        "before": 2.0,
        "after": quality,
        "higher_is_better": False,
        "budgets": budgets,
        "passed": passed,
        **more,
    }


def found_of(*rows: dict[str, Any], quality: float | None = 2.0) -> dict[str, Any]:
    dense = {"zeros": 0, "weights": 1000, "file_bytes": 1000, "bitmask_bytes": 1000, "quality": quality}
    return {"rows": list(rows), "dense": dense, "smallest": "s0.5/x"}


def test_the_figure_has_a_title_units_limits_and_a_mark_for_each_verdict() -> None:
    figure = sweep_figure(found_of(row(0.5, 2.1), row(0.9, 3.0, passed=False)))
    root = ElementTree.fromstring(figure)
    space = "{http://www.w3.org/2000/svg}"
    assert [root[0].tag, root[1].tag] == [f"{space}title", f"{space}desc"]
    texts = [each.text for each in root.iter(f"{space}text")]
    assert {"loss (nats; lower is better)", "weight files (kB)", "min-sparsity 0.4"} <= set(texts)
    kinds = [each.get("class") for each in root.iter(f"{space}circle")]
    assert (kinds.count("good"), kinds.count("bad"), kinds.count("best")) == (2, 2, 2)
    assert "prefers-color-scheme: dark" in figure and "<script" not in figure


@pytest.mark.parametrize(
    ("higher", "relative", "limit"),
    [(False, False, 2.2), (True, False, 1.8), (False, True, 2.4), (True, True, 1.6)],
)
def test_a_limit_in_percent_is_drawn_at_its_share_of_the_dense_quality(
    higher: bool, relative: bool, limit: float
) -> None:
    def figure(**change: Any) -> str:
        budgets = [{"name": "max-quality-drop", "limit": 0.2, "passed": True, **change}]
        return sweep_figure(found_of(row(0.5, 2.1, budgets=budgets, higher_is_better=higher)))

    plain, asked = figure(limit=abs(limit - 2)), figure(relative=relative)
    assert ("max-quality-drop 20 %" in asked) == relative
    assert [line for line in plain.splitlines() if 'class="limit"' in line] == [
        line for line in asked.splitlines() if 'class="limit"' in line
    ]


def test_no_label_stands_on_another() -> None:
    points = (row(sparsity, 2.0 + sparsity / 50) for sparsity in (0.3, 0.5, 0.52, 0.54))
    root = ElementTree.fromstring(sweep_figure(found_of(*points)))
    texts = [each for each in root.iter("{http://www.w3.org/2000/svg}text") if "%" in str(each.text)[-1]]
    at = [(float(each.get("x", 0)), float(each.get("y", 0))) for each in texts]
    assert len(at) == 8
    assert all(abs(a - c) > 22 or abs(b - d) > 9 for i, (a, b) in enumerate(at) for c, d in at[:i])


@pytest.mark.parametrize("ground", ["#fff", "#161616"])
def test_words_have_a_rim_of_the_grounds_colour(ground: str) -> None:
    style = sweep_figure(found_of(row(0.5, 2.1)))
    assert f"svg {{ background: {ground}" in style and style.count(f"stroke: {ground}") == 1


def test_the_same_table_gives_the_same_figure() -> None:
    assert sweep_figure(found_of(row(0.5, 2.1))) == sweep_figure(found_of(row(0.5, 2.1)))


@pytest.mark.parametrize(
    "found",
    [
        found_of(row(0.5, None)),
        found_of(row(0.0, 2.0), quality=None),
        found_of(row(0.5, 0.0), quality=0.0),
        found_of(row(0.5, 1e9), row(0.6, -1e9)),
        found_of(row(0.5, 2.0, bitmask_bytes=0, file_bytes=0)),
        found_of(row(0.5, 2.0, budgets=[], layout="packed", file_bytes=5 * 10**12)),
    ],
)
def test_any_figures_can_be_drawn(found: dict[str, Any]) -> None:
    assert ElementTree.fromstring(sweep_figure(found)).tag.endswith("svg")


def test_hostile_words_are_escaped_in_the_figure() -> None:
    figure = sweep_figure(found_of(row(0.5, 2.1, metric="<script>\x1b&amp")))
    assert "<script" not in figure and "\x1b" not in figure
    ElementTree.fromstring(figure)
