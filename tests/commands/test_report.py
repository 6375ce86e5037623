"""The proof: counts equal numpy's, verify sees every change, nothing from a checkpoint rules the terminal."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.cli import Ran, run_cli
from support.files import PRUNABLE, Given, f32, tiny_arrays, write_safetensors
from support.reports import FORBIDDEN, NAMES

from lpsparse import pack, prune, report, verify
from lpsparse.errors import InputError
from lpsparse.reporting.card import escape
from lpsparse.reporting.records import Report
from lpsparse.reporting.table import render
from lpsparse.reporting.text import cells, clean, columns, shorten, size

Cli = Callable[..., Ran]


@pytest.fixture
def sparse(tiny: Path) -> Path:
    prune(tiny, tiny.parent / "sparse", sparsity=0.8)
    return tiny.parent / "sparse"


# Counting


def test_every_count_equals_numpys(sparse: Path) -> None:
    arrays = load_file(sparse / "model.safetensors")
    found = report(sparse)
    for row in found.tensors:
        array = arrays[row.name]
        assert (row.weights, row.shape, row.dense_bytes) == (array.size, array.shape, array.nbytes)
        assert row.zeros == np.count_nonzero(array == 0)
        assert row.sparsity == (row.zeros / row.weights if row.weights else 0)
    assert [row.name for row in found.tensors if row.prunable] == sorted(PRUNABLE)


def test_the_three_denominators_are_kept_apart(tmp_path: Path, cli: Cli) -> None:
    half = np.arange(7 * 13, dtype=np.float16).reshape(7, 13) % 2  # 46 zeros
    one = np.zeros((1, 13), np.int64)
    save_file({"a.weight": half, "norm.weight": half, "steps": one}, tmp_path / "m.safetensors")
    found = report(tmp_path / "m.safetensors")
    assert (found.prunable.weights, found.prunable.zeros) == (91, 46)
    assert (found.all.weights, found.all.zeros) == (2 * 91 + 13, 2 * 46 + 13)
    assert (found.bytes.dense_bytes, found.bytes.zero_bytes) == (2 * 182 + 104, 2 * 92 + 104)
    assert found.prunable.sparsity == 46 / 91
    assert found.all.sparsity == 105 / 195
    assert found.bytes.zero_share == 288 / 468
    assert found.bytes.file_bytes == (tmp_path / "m.safetensors").stat().st_size
    assert "; all weights are the values of all tensors, integers and statistics too; " in found.rule
    shown = cli("inspect", tmp_path / "m.safetensors").stdout
    assert shown.splitlines()[-1] == "195 values in 3 tensors, 91 of them prunable weights in 1"


def test_zeros_of_either_sign_count(tmp_path: Path) -> None:
    array = np.array([[0.0, -0.0, 1.0]], np.float32)
    save_file({"a.weight": array}, tmp_path / "m.safetensors")
    assert report(tmp_path / "m.safetensors").prunable.zeros == 2


def test_a_foreign_file_is_reported_and_compared_with_its_base(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    arrays = tiny_arrays() | {PRUNABLE[0]: np.zeros((7, 13), np.float32)}
    save_file(arrays, tmp_path / "theirs.safetensors")
    ran = cli("report", tmp_path / "theirs.safetensors", tiny)
    assert ran.rc == 0
    assert "\ntheirs.safetensors: 25.00 % of prunable weights are zero (91 of 364)\n" in ran.stdout
    assert "compared with  tiny, " in ran.stdout and "0.00 % zeros" in ran.stdout


def test_the_report_on_a_folder_uses_the_choice_of_its_manifest(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=1, include="lm_head.weight", allow_empty=True)
    assert (report(tmp_path / "out").prunable.weights, report(tmp_path / "out").prunable.zeros) == (77, 77)
    assert report(tmp_path / "out", include="layers.0.*").prunable.zeros == 0


def test_a_model_with_nothing_to_cut_is_still_reported_inspected_and_packed(tmp_path: Path, cli: Cli) -> None:
    save_file({"norm.weight": np.ones(7, np.float32)}, tmp_path / "m.safetensors")
    assert cli("inspect", tmp_path / "m.safetensors").rc == 0
    assert "\nm.safetensors: 0.00 % of prunable" in cli("report", tmp_path / "m.safetensors").stdout
    assert cli("pack", tmp_path / "m.safetensors", tmp_path / "packed").rc == 0


@pytest.mark.parametrize("sparsity", ["0.8", "0.7", "0.123456789", "1", "0"])
def test_what_prune_left_meets_the_budget_of_the_same_number(
    sparsity: str, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    prune(
        tiny, tmp_path / "out", sparsity=sparsity, allow_empty=True
    )  # 364 weights: no whole number of zeros
    assert cli("report", tmp_path / "out", "--min-sparsity", sparsity).rc == 0
    if sparsity not in ("1", "0"):
        assert cli("report", tmp_path / "out", "--min-sparsity", str(float(sparsity) + 0.003)).rc == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_reported_by_the_name_of_their_tensor(
    value: float, tmp_path: Path, cli: Cli
) -> None:
    array = np.ones((7, 13), np.float32)
    array[1, 2:5] = value
    save_file({"a.weight": array, "b.weight": np.ones((7, 13), np.float32)}, tmp_path / "m.safetensors")
    ran = cli("report", tmp_path / "m.safetensors")
    assert ran.rc == 0 and "NaN or Inf in  a.weight\n" in ran.stdout
    found = json.loads(cli("report", tmp_path / "m.safetensors", "--json", "-").stdout)
    assert found["nonfinite_tensors"] == ["a.weight"]
    assert [row["nonfinite"] for row in found["tensors"]] == [3, 0]


# JSON


def test_json_to_stdout_or_a_file_is_the_report_that_out_holds(
    sparse: Path, tmp_path: Path, cli: Cli
) -> None:
    ran = cli("report", sparse, "--json", "-")
    shown = Report.model_validate(json.loads(ran.stdout))
    assert cli("report", sparse, "--json", tmp_path / "r.json").rc == 0
    assert Report.model_validate(json.loads((tmp_path / "r.json").read_text())) == shown
    kept = Report.model_validate(json.loads((sparse / "report.json").read_text()))
    assert (shown.prunable, shown.all, shown.rule) == (kept.prunable, kept.all, kept.rule)
    # OUT's own has the zeros, counted as they were read back, and no details.
    assert [replace(row, detail=None) for row in shown.tensors] == list(kept.tensors)
    assert kept.model == "tiny"


def test_json_into_a_folder_that_is_not_there_is_an_output_error(
    sparse: Path, tmp_path: Path, cli: Cli
) -> None:
    for where in (tmp_path / "gone" / "r.json", tmp_path):
        assert cli("report", sparse, "--json", where).rc == 4


# Budgets


@pytest.mark.parametrize(
    ("flags", "rc"),
    [
        (("--min-sparsity", "0.79"), 0),
        (("--min-sparsity", "0.81"), 1),
        (("--max-bytes", "10000000"), 0),
        (("--max-bytes", "100B"), 1),
        (("--min-sparsity", "0.5", "--max-bytes", "100B"), 1),
        (("--max-quality-drop", "1"), 1),
        (("--min-sparsity", "1.5"), 2),
        (("--max-bytes", "-1"), 2),
    ],
)
def test_budgets_decide_the_exit_code(flags: tuple[str, ...], rc: int, sparse: Path, cli: Cli) -> None:
    ran = cli("report", sparse, *flags)
    assert ran.rc == rc
    assert ("FAILED" in ran.stdout, "budgets failed" in ran.stdout) == (rc == 1, rc == 1)
    assert ("all budgets met" in ran.stdout) == (rc == 0)


def test_a_budget_met_exactly_passes(sparse: Path, cli: Cli) -> None:
    found = report(sparse)
    flags = ("--min-sparsity", repr(found.prunable.sparsity), "--max-bytes", found.bytes.file_bytes)
    ran = cli("report", sparse, *flags, "--json", "-")
    assert ran.rc == 0
    budgets = json.loads(ran.stdout)["budgets"]
    assert [(each["name"], each["passed"]) for each in budgets] == [
        ("min-sparsity", True),
        ("max-bytes", True),
    ]
    assert cli("report", sparse, "--max-bytes", found.bytes.file_bytes - 1, "--json", "-").rc == 1


# Verify


def test_fresh_output_of_every_layout_verifies(sparse: Path, shards: Path, tmp_path: Path) -> None:
    prune(shards, tmp_path / "sharded", sparsity=0.5)
    for name in ("sparse", "sharded"):
        pack(tmp_path / name, tmp_path / f"{name}-packed")
        for folder in (tmp_path / name, tmp_path / f"{name}-packed"):
            found = verify(folder)
            assert (found.ok, found.problems, found.tensors) == (True, (), 11)


def flip_a_byte(folder: Path, name: str, at: int) -> None:
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1
    (folder / name).write_bytes(bytes(data))


def zero_a_page(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-400:-100] = bytes(300)
    (folder / name).write_bytes(bytes(data))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    table = json.loads((folder / "lpsparse.json").read_text())
    change(table)
    (folder / "lpsparse.json").write_text(json.dumps(table))


def edit_tensor(folder: Path, **changes: Any) -> None:
    edit_manifest(folder, lambda table: table["tensors"][0].update(changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bit in a weight": (lambda f: flip_a_byte(f, "model.safetensors", -9), "model.safetensors: "),
    "flipped bit in the header": (lambda f: flip_a_byte(f, "model.safetensors", 20), "model.safetensors: "),
    "flipped bit in a sidecar": (lambda f: flip_a_byte(f, "config.json", 0), "config.json: "),
    "flipped bit in a dot file": (lambda f: flip_a_byte(f, ".gitattributes", 0), ".gitattributes: "),
    "zeroed page": (lambda f: zero_a_page(f, "model.safetensors"), "zeros, the manifest has"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 3000), "truncated"),
    "deleted weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors: missing"),
    "deleted sidecar": (lambda f: (f / "extra" / "vocab.txt").unlink(), "extra/vocab.txt: missing"),
    "extra file": (lambda f: (f / "new.py").touch(), "new.py: not in the manifest"),
    "extra checkpoint": (
        lambda f: shutil.copy(f / "model.safetensors", f / "lpsparse.safetensors"),
        "two check",
    ),
    "edited zeros": (lambda f: edit_tensor(f, zeros=7), "the manifest has 7"),
    "edited shape": (lambda f: edit_tensor(f, shape=[7]), "I64 (7,)"),
    "tensor unlisted": (lambda f: edit_manifest(f, lambda m: m["tensors"].pop()), "tensor not in"),
    "edited layout": (lambda f: edit_tensor(f, layout="packed"), "stored dense, the manifest has packed"),
    "edited finite": (
        lambda f: edit_manifest(f, lambda m: m["tensors"][-1].update(finite=False)),
        "the manifest has some",
    ),
    "another layout": (lambda f: edit_manifest(f, lambda m: m.update(layout="../x")), "has ../x"),
    "file twice": (lambda f: edit_manifest(f, lambda m: m["files"].append(m["files"][0])), "1 files twice"),
    "tensor invented": (lambda f: edit_tensor(f, name="x"), "x: tensor missing"),
    "edited hash": (lambda f: edit_manifest(f, lambda m: m["files"][0].update(sha256="0" * 64)), "sha256"),
    "file unlisted": (lambda f: edit_manifest(f, lambda m: m["files"].pop()), "not in the manifest"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE.keys())
def test_verify_fails_on_any_change_and_names_it(
    damage: Callable[[Path], object], words: str, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    (tiny / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert verify(tmp_path / "out")["ok"]
    damage(tmp_path / "out")
    ran = cli("verify", tmp_path / "out")
    assert ran.rc == 1 and ": FAILED: " in ran.stdout
    assert words in ran.stdout
    found = json.loads(cli("verify", tmp_path / "out", "--json", "--quiet").stdout)
    assert not found["ok"] and any(words in problem for problem in found["problems"])


def test_a_downloads_own_hidden_files_do_not_fail_verify(sparse: Path) -> None:
    (sparse / ".cache" / "huggingface").mkdir(parents=True)
    (sparse / ".cache" / "huggingface" / "x.metadata").touch()
    (sparse / ".DS_Store").touch()
    assert verify(sparse)["ok"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no lpsparse.json"),
        ("", "not valid JSON"),
        ("{}", "lpsparse.json: lpsparse"),
        ("[]", "lpsparse.json"),
        ('{"format_version": 99}', "format_version"),
        ('{"a": 1, "a": 2}', "duplicate key"),
        ("[" * 5000, "nested"),
    ],
)
def test_verify_without_a_readable_manifest_exits_3(
    text: str | None, words: str, sparse: Path, cli: Cli
) -> None:
    (sparse / "lpsparse.json").unlink()
    if text is not None:
        (sparse / "lpsparse.json").write_text(text)
    ran = cli("verify", sparse)
    assert ran.rc == 3 and words in ran.stderr


@pytest.mark.parametrize("model", ["gone", "model.safetensors"])
def test_verify_wants_a_folder(model: str, tiny: Path, cli: Cli) -> None:
    assert cli("verify", tiny / model).rc == 3


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "extra/../../secret"])
def test_a_manifest_cannot_make_verify_read_outside_the_folder(
    name: str, sparse: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "secret").write_text("secret")
    edit_manifest(
        sparse, lambda m: m["files"][0].update(name=name, size=6, sha256=sha_of(tmp_path / "secret"))
    )
    ran = cli("verify", sparse)
    assert ran.rc == 1
    assert f"{name}: missing" in ran.stdout


def sha_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Hostile names


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_hostile_tensor_name_never_rules_the_terminal_and_stays_itself(
    name: str, tmp_path: Path, cli: Cli
) -> None:
    given: dict[str, Given] = {f"{name}.weight": f32(7, 13), f"{name}.bias": f32(7)}
    write_safetensors(tmp_path / "m.safetensors", given)
    commands = (
        ("inspect", "m.safetensors"),
        ("inspect", "m.safetensors", "--json"),
        ("report", "m.safetensors"),
        ("report", "m.safetensors", "--json", "-"),
        ("prune", "m.safetensors", "out", "--sparsity", "0.5"),
        ("verify", "out"),
        ("pack", "out", "packed"),
        ("prune", "m.safetensors", "o", "--gap"),
        ("prune", "m.safetensors", "o", "--sparsity", "1", "--exclude", "zzz"),
    )
    for command, *rest in commands:
        paths = ("m.safetensors", "out", "packed", "o")
        ran = cli(command, *(tmp_path / word if word in paths else word for word in rest))
        assert not FORBIDDEN.search(ran.stdout + ran.stderr)
        assert "\nerror[LPS000]" not in ran.stdout + ran.stderr
    assert set(load_file(tmp_path / "out" / "m.safetensors")) == set(given)
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "out", "packed"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "=cmd", "a](x) |b| `c`", "a\nb: c"])
def test_a_hostile_model_name_is_escaped_in_the_card(name: str, tmp_path: Path) -> None:
    name = name.replace("/", "\u2215")
    (tmp_path / name).mkdir()
    write_safetensors(tmp_path / name / "model.safetensors", {f"{name}.weight": f32(7, 13)})
    prune(tmp_path / name, tmp_path / "out", sparsity=0.5)
    card = (tmp_path / "out" / "README.md").read_text()
    body = card.split("---\n")[2]
    assert "<script>" not in card and (name not in body or name == "=cmd")
    assert f"# {escape(name)}, made sparse" in card
    assert "base_model" not in card.split("---\n")[1]  # a name of the hub alone may stand there


def test_a_card_names_the_model_that_the_chain_began_with(tmp_path: Path) -> None:
    hub = tmp_path / "hf/hub/models--org--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    write_safetensors(hub / "snapshots" / ("0" * 40) / "model.safetensors", {"a.weight": f32(7, 13)})
    for words in (["prune", "org/name", "one", "--sparsity", "0.5"], ["pack", "one", "two"]):
        assert run_cli(words, cwd=tmp_path, HF_HOME=str(tmp_path / "hf")).rc == 0
    for out in ("one", "two"):
        card = (tmp_path / out / "README.md").read_text()
        assert "base_model: org/name\n" in card and "base_model_relation: finetune\n" in card
        assert "# org/name, made sparse" in card


@pytest.mark.parametrize("text", ["plain name-1.weight", "Ünï 模型"])
def test_printable_text_is_shown_as_it_is(text: str) -> None:
    assert clean(text) == text


def test_a_damaged_file_of_hostile_names_is_told_in_clean_lines(tmp_path: Path, cli: Cli) -> None:
    array = np.full((7, 13), np.nan, np.float32)
    given: dict[str, Given] = {"\x1b[31m\nred.weight": ("F32", [7, 13], array.tobytes())}
    write_safetensors(tmp_path / "m.safetensors", given)
    ran = cli("prune", tmp_path / "m.safetensors", tmp_path / "out", "--sparsity", "0.5")
    assert ran.rc == 3 and len(ran.stderr.splitlines()) == 2
    assert not FORBIDDEN.search(ran.stderr)


def test_a_name_of_a_million_letters_does_not_fill_the_terminal(tmp_path: Path, cli: Cli) -> None:
    given: dict[str, Given] = {"x" * 1_000_000: ("F32", [7, 13], bytes(4)), "y": f32(7, 13)}
    write_safetensors(tmp_path / "m.safetensors", given)
    ran = cli("inspect", tmp_path / "m.safetensors")
    assert ran.rc == 3 and len(ran.stderr) < 3000


# The table


@pytest.mark.parametrize("columns_", ["20", "80", "1", "0", "junk", "100000"])
def test_a_terminal_of_any_width_works(columns_: str, sparse: Path) -> None:
    for arguments in (["report", sparse], ["inspect", sparse]):
        ran = run_cli([*arguments], COLUMNS=columns_)
        assert (ran.rc, ran.stderr) == (0, "")


def test_at_80_columns_every_line_of_the_tensor_table_fits(tmp_path: Path) -> None:
    given = {
        f"model.layers.{i}.self_attention.query_key_value.{'long_' * i}weight": f32(101, 13)
        for i in range(13)
    }
    write_safetensors(tmp_path / "m.safetensors", given)
    ran = run_cli(["report", tmp_path / "m.safetensors"], COLUMNS="80")
    table = ran.stdout.split("\n\n")[0].splitlines()
    assert len(table) == 14
    assert max(map(len, table)) <= 80
    assert {len(line) for line in table[1:]} == {max(map(len, table))}


def test_a_long_table_shows_fifteen_tensors_and_says_how_many_more(tmp_path: Path) -> None:
    given = {f"t{i:02d}.weight": f32(7, i) for i in range(1, 60)}
    write_safetensors(tmp_path / "m.safetensors", given)
    found = report(tmp_path / "m.safetensors")
    lines = render(found, 80).split("\n\n")[0].splitlines()
    assert lines[-1] == "... and 44 more tensors (--full shows all)"
    assert [line.split()[0] for line in lines[1:-1]] == [f"t{i:02d}.weight" for i in range(45, 60)]
    assert len(render(found, 80, full=True).split("\n\n")[0].splitlines()) == 60


def test_tensors_far_from_the_mean_come_before_large_ones(tmp_path: Path) -> None:
    given = {f"t{i:02d}.weight": f32(31, 13) for i in range(30)}
    given["odd.weight"] = ("F32", [7, 13], bytes(4 * 91))
    write_safetensors(tmp_path / "m.safetensors", given)
    assert "\nodd.weight" in render(report(tmp_path / "m.safetensors"), 80).split("\n\n")[0]


def test_layers_that_are_alike_are_one_row(tmp_path: Path, cli: Cli) -> None:
    given = {f"layer.{i}.{part}.dense.weight": f32(7, 13) for i in (0, 1, 2, 5) for part in ("one", "two")}
    given["layer.1.one.dense.weight"] = ("F32", [7, 13], bytes(4 * 91))
    write_safetensors(tmp_path / "m.safetensors", given | {"layer.6.one.dense.weight": f32(13, 7)})
    lines = cli("report", tmp_path / "m.safetensors").stdout.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["layer.{0..2,5}.one.dense.weight", "x4"],
        ["layer.{0..2,5}.two.dense.weight", "x4"],
        ["layer.6.one.dense.weight", "F32"],
    ]
    assert "0.00..100.00 %" in lines[1] and "  364  " in lines[1]
    shown = cli("inspect", tmp_path / "m.safetensors").stdout.splitlines()
    assert len(shown) == 7 and shown[1].split()[2:5] == ["4", "x", "7x13"]
    assert len(cli("inspect", tmp_path / "m.safetensors", "--full").stdout.splitlines()) == 13


@pytest.mark.parametrize("width", [80, 60, 40, 20])
def test_no_two_names_become_one_in_a_narrow_terminal(width: int) -> None:
    names = [f"encoder.layer.2.{part}output.dense.{kind}" for part in ("", "attention.") for kind in "ab"]
    lines = columns(("tensor", "zero"), [(name, "50.00 %") for name in names], width)
    assert len({line.split()[0] for line in lines if line.startswith("enc")}) == 4


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (90_868_376, "90.9 MB"),
        (999_500, "1 MB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes_are_decimal_and_name_their_unit(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize("width", range(3, 30))
def test_a_shortened_name_has_the_width_and_keeps_both_ends(width: int) -> None:
    name = "model.layers.0.weight"
    short = shorten(name, width)
    assert len(short) == min(width, len(name))
    assert (short[0], short[-1]) == ("m", "t")


@pytest.mark.parametrize("width", [2, 3, 8, 21, 40])
@pytest.mark.parametrize("name", ["模" * 30, "a模" * 20, "é" * 30, "e\u0301" * 40, "😀" * 20, "模"])
def test_a_name_of_wide_letters_has_no_more_columns_than_there_are(name: str, width: int) -> None:
    shown = shorten(name, width)
    assert cells(shown) <= max(width, 4) and (shown == name or "…" in shown)
    assert cells("模é😀e\u0301") == 6


def test_columns_of_wide_letters_line_up() -> None:
    lines = columns(("tensor", "zero"), [("模型.weight", "1"), ("a", "22"), ("层" * 30, "3")], 40)
    assert all(cells(line) <= 40 for line in lines) and len({cells(line) for line in lines}) == 1


def test_columns_line_up() -> None:
    lines = columns(("name", "n"), [("a", "1"), ("a long name", "1,000")], 80)
    assert lines == ["name             n", "a                1", "a long name  1,000"]


def test_the_error_of_a_missing_model_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        report(tmp_path / "gone")


def test_quality_is_of_the_weights_it_was_measured_on_and_of_no_others(tiny: Path, tmp_path: Path) -> None:
    from support.models import BUNDLED, SMALL

    from lpsparse import finetune

    finetune(BUNDLED, tmp_path / "out", target_sparsity="0.5", **SMALL)
    assert report(tmp_path / "out", max_quality_drop=9).passed
    state = load_file(tmp_path / "out/model.safetensors")
    save_file(
        {name: np.zeros_like(value) for name, value in state.items()}, tmp_path / "out/model.safetensors"
    )
    with pytest.raises(InputError, match=r"is not what lpsparse\.json describes"):
        report(tmp_path / "out", max_quality_drop=9)
    with pytest.raises(InputError, match=r"is not what lpsparse\.json describes"):
        pack(tmp_path / "out", tmp_path / "packed")
    (tmp_path / "out/lpsparse.json").unlink()
    assert pack(tmp_path / "out", tmp_path / "packed").quality == ()


def test_writing_a_report_leaves_a_persons_file_beside_it_alone(
    sparse: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "r.json.partial").write_text("mine")
    assert cli("report", sparse, "--json", tmp_path / "r.json").rc == 0
    assert (tmp_path / "r.json.partial").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.glob("*r.json*")) == ["r.json", "r.json.partial"]


def test_a_report_is_written_over_no_part_of_a_checkpoint(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copyfile(sparse / "model.safetensors", tmp_path / "lone.safetensors")
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    lone, loose = tmp_path / "lone.safetensors", tmp_path / "lone.bin"
    loose.write_bytes(b"weights")
    for model, target in (
        (sparse, sparse / "model.safetensors"),
        (sparse, sparse / "report.json"),
        (lone, lone),
        (sparse, sparse / "new.json"),
        (lone, sparse / "new.json"),
        (sparse, lone),
        (sparse, loose),
    ):
        ran = cli("report", model, "--json", target)
        assert ran.rc == 4 and len(ran.stderr.strip().splitlines()) == 2, target
    assert {path: path.read_bytes() for path in before} == before and not (sparse / "new.json").exists()


# Beside BASE, and beside an earlier report


def test_what_base_has_and_the_model_has_not_is_told_in_every_view(
    tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    arrays = tiny_arrays()
    gone, other = PRUNABLE[0], PRUNABLE[1]
    del arrays[gone]
    arrays[other] = arrays[other].reshape(-1, 1)
    save_file(arrays, tmp_path / "lost.safetensors")
    views = {view: tmp_path / f"a.{view}" for view in ("markdown", "comment", "junit", "html", "json")}
    files = [word for view, path in views.items() for word in (f"--{view}", path)]
    ran = cli("report", tmp_path / "lost.safetensors", tiny, "--max-bytes", "1GB", *files)
    assert ran.rc == 0
    shown = [ran.stdout, *(path.read_text() for path in views.values())]
    assert all(gone in text and other in text for text in shown if "<testsuites>" not in text)
    assert "all budgets met" in ran.stdout and f"of another shape: {gone}" in views["junit"].read_text()
    assert len(json.loads(views["json"].read_text())["budgets"]) == 1  # a warning is no budget
    assert "random values" in views["comment"].read_text()
    whole = cli("report", tiny, tiny, "--max-bytes", "1GB")
    assert "random values" not in whole.stdout and "all budgets met" in whole.stdout


@pytest.mark.parametrize(
    ("flags", "rc", "said"),
    [
        (["--max-bytes", "1GB"], 1, "FAILED: all budgets met, but not all weights are finite"),
        (["--max-bytes", "1GB", "--warn", "finite"], 0, "all budgets met"),
        (["--max-bytes", "1B", "--min-sparsity", "0"], 1, "1 of 2 budgets failed"),
    ],
)
def test_what_is_counted_as_budgets_is_what_was_given(
    flags: list[str], rc: int, said: str, tmp_path: Path, cli: Cli
) -> None:
    nan = np.full((7, 13), np.nan, np.float32)
    save_file({"a.weight": nan}, tmp_path / "m.safetensors")
    ran = cli("report", tmp_path / "m.safetensors", *flags, "--html", tmp_path / "r.html")
    assert ran.rc == rc and ran.stdout.splitlines()[-1].endswith(said)
    assert "3 budgets" not in (tmp_path / "r.html").read_text()


def test_n_m_is_of_the_same_groups_in_the_totals_and_in_the_budget(tmp_path: Path) -> None:
    zeros = np.zeros((8, 20), np.float32)  # rows of 20: whole groups of 4, none of 8
    save_file({"a.weight": np.zeros((8, 16), np.float32), "b.weight": zeros}, tmp_path / "m.safetensors")
    found = report(tmp_path / "m.safetensors", min_nm=("4:8=0.5", "2:4=0.5"))
    values = {each.name: each.value for each in found.budgets}
    assert found.n_m["4:8"] == (16, 36) and values["min-nm 4:8"] == 16 / 36
    assert found.n_m["2:4"] == (72, 72) and values["min-nm 2:4"] == 1


def test_infinity_that_stayed_is_no_change(tmp_path: Path) -> None:
    array = np.full((4, 4), np.inf, np.float32)
    save_file({"a.weight": array}, tmp_path / "base.safetensors")
    array[0, 0], array[0, 1] = 3, -np.inf
    save_file({"a.weight": array}, tmp_path / "m.safetensors")
    change = report(tmp_path / "m.safetensors", tmp_path / "base.safetensors").tensors[0].change
    assert change is not None and change.changed == 2


def test_a_torch_file_is_opened_by_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a.weight": torch.ones(7, 13)}, tmp_path / "m.pt")
    assert "torch.load" in report(tmp_path / "m.pt").opens_with
    assert "torch" not in report(write_safetensors(tmp_path / "m.safetensors", {"a": f32(7, 13)})).opens_with


def test_singular_values_are_shown(sparse: Path, tmp_path: Path, cli: Cli) -> None:
    ran = cli("report", sparse, "--spectra", "--markdown", tmp_path / "a.md", "--html", tmp_path / "a.html")
    found = report(sparse, spectra=True)
    most = max(row.spectrum.largest for row in found.tensors if row.spectrum)
    for text in (ran.stdout, (tmp_path / "a.md").read_text(), (tmp_path / "a.html").read_text()):
        assert f"{most:.4g}" in text
    assert "Singular values" in (tmp_path / "a.html").read_text()
    assert "singular" not in cli("report", sparse).stdout


def test_a_report_is_no_base(sparse: Path, cli: Cli) -> None:
    ran = cli("report", sparse, sparse / "report.json")
    assert ran.rc == 2 and "LPS293" in ran.stderr and "did you mean --baseline" in ran.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-regression", "0.1"),
        ("--warn", "min-sparsity"),
        ("--warn", "finite"),
        ("--warn", "baseline", "--min-sparsity", "0.1"),
    ],
)
def test_a_gate_that_lost_what_it_is_about_is_refused(flags: tuple[str, ...], sparse: Path, cli: Cli) -> None:
    ran = cli("report", sparse, *flags)
    assert ran.rc == 2 and "LPS204" in ran.stderr


def test_baselines_of_foreign_files_are_told_apart_by_base(tiny: Path, tmp_path: Path, cli: Cli) -> None:
    arrays = tiny_arrays()
    save_file(arrays, tmp_path / "mine.safetensors")
    arrays[PRUNABLE[0]][0, 0] += 1
    save_file(arrays, tmp_path / "other.safetensors")
    mine, other, first = (tmp_path / name for name in ("mine.safetensors", "other.safetensors", "a.json"))
    assert cli("report", mine, tiny, "--json", first).rc == 0
    assert cli("report", mine, tiny, "--baseline", first).rc == 0
    assert cli("report", mine, other, "--baseline", first).rc == 3
    unknown = cli("report", mine, "--baseline", first, "--json", "-")
    assert unknown.rc == 0
    assert any("baseline" in each for each in json.loads(unknown.stdout)["not_measured"])


def test_after_a_failure_no_earlier_file_looks_like_its_report(
    sparse: Path, tmp_path: Path, cli: Cli
) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    views = [tmp_path / "a.json", tmp_path / "a.xml"]
    words = ["--json", views[0], "--junit", views[1]]
    assert cli("report", sparse, *words).rc == 0
    texts = [path.read_bytes() for path in views]
    assert cli("report", sparse, *words, "--min-sparsity", "0.99").rc == 1
    assert views[1].read_bytes() != texts[1]
    assert cli("report", sparse, *words).rc == 0
    assert cli("report", tmp_path / "bad.safetensors", *words).rc == 3
    assert not any(path.exists() for path in views)
    assert [path.with_name(path.name + ".old").read_bytes() for path in views] == texts
    # A file that may not be written over is not set aside, either.
    before = (sparse / "report.json").read_bytes()
    assert cli("report", sparse, "--json", sparse / "report.json").rc == 4
    assert (sparse / "report.json").read_bytes() == before
