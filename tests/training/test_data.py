"""Rows, texts and images from files: what is read is what stands there; a bad one is named by its place."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.manifest import Trained
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.data import Row, check_apart, copies, digests, find, held_out_of, read_rows, trained_on
from lpsparse.training.images import read_images
from lpsparse.training.tasks.text_classification import prepare

BAD_ROWS = {
    "empty file": ("rows.jsonl", "", "no rows"),
    "bad JSON": ("rows.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', "rows.jsonl:2: not valid JSON"),
    "no such field": ("rows.jsonl", '{"body": "a", "label": "x"}\n', "no field 'text' (found: body, label)"),
    "columns": ("rows.tsv", "text\tlabel\na\t1\nb\n", "rows.tsv:3: 1 columns, expected 2"),
    "empty label": ("rows.csv", "text,label\na,\n", "rows.csv:2: the label is empty"),
    "not UTF-8": ("rows.csv", b"text,label\n\xff,1\n", "not UTF-8 at byte 11"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_is_written(case: str, tiny_bert: Path, tmp_path: Path) -> None:
    name, content, message = BAD_ROWS[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LpsparseError) as caught:
        lpsparse.finetune(tiny_bert, tmp_path / "out", data=str(tmp_path / name), task="text-classification")
    assert message in str(caught.value) and caught.value.exit_code == ExitCode.INPUT
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_label_outside_the_models_set_is_named_with_its_row(
    tiny_bert: Path, table: Path, tmp_path: Path
) -> None:
    options = {"task": "text-classification", "steps": 1}
    lpsparse.finetune(tiny_bert, tmp_path / "one", data=str(table), **options)
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "fine", "label": "good"}\n{"text": "odd", "label": "ugly"}\n')
    with pytest.raises(LpsparseError, match=r"other\.jsonl:2: label 'ugly' is outside .*bad, good"):
        lpsparse.evaluate(tmp_path / "one", data=str(other), task="text-classification")
    with pytest.raises(LpsparseError, match=r"other\.jsonl:2: label 'ugly'"):
        lpsparse.finetune(tiny_bert, tmp_path / "two", data=table, eval_data=other, **options)


def test_an_image_label_outside_the_classes_is_refused(net: dict, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", x=np.zeros((3, 8, 8, 3), np.uint8), y=np.array([0, 1, 9]))
    with pytest.raises(
        LpsparseError, match=r"bad\.npz: image 2: label '9' is outside the model's set \(LABEL_0"
    ):
        lpsparse.finetune(out=tmp_path / "out", **{**net, "data": str(tmp_path / "bad.npz")})


def test_folders_of_images_and_parquet_read_like_npz(tmp_path: Path) -> None:
    import pyarrow as pa
    from PIL import Image
    from pyarrow import parquet

    pixels = np.random.default_rng(1).integers(0, 255, (4, 5, 6, 3)).astype(np.uint8)
    cells = []
    for i, label in enumerate((0, 0, 1, 1)):
        file = tmp_path / "photos" / f"class{label}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(file)
        cells.append({"bytes": file.read_bytes(), "path": None})
    (tmp_path / "hub").mkdir()
    parquet.write_table(
        pa.table({"img": cells, "label": [0, 0, 1, 1]}), tmp_path / "hub/train-00000-of-00001.parquet"
    )
    for folder in ("photos", "hub"):
        files, part, _ = find(str(tmp_path / folder), "train[1:]")
        found = read_images(files, part, None).images
        assert np.array_equal([each.pixels for each in found], pixels[1:])
        assert [each.label[-1] for each in found] == ["0", "1", "1"]


def rows_of(path: Path, text: str, **fields: str) -> list[Row]:
    path.write_bytes(text.encode())
    return read_rows([path], slice(None), fields.get("text_field"), fields.get("label_field"))


def test_columns_of_any_name_can_be_asked_for(tmp_path: Path) -> None:
    table = "review\tfeeling\nfine\tgood\ndull\tbad\n"
    named = {"text_field": "review", "label_field": "feeling"}
    assert [(row.text, row.label, row.where) for row in rows_of(tmp_path / "a.tsv", table, **named)] == [
        ("fine", "good", "a.tsv:2"),
        ("dull", "bad", "a.tsv:3"),
    ]


def test_two_columns_without_a_heading_are_text_and_label_and_not_the_other_way_round(tmp_path: Path) -> None:
    assert [row.label for row in rows_of(tmp_path / "a.tsv", "a film\t1\nno film\t0\n")] == ["1", "0"]
    with pytest.raises(LpsparseError, match="the other way round"):
        rows_of(tmp_path / "b.tsv", "1\ta film\n0\tno film\n1\tone film\n")


LINES = {
    "a line separator in JSON": ("a.jsonl", '{"text": "a\u2028b", "label": "x"}\n', "a\u2028b"),
    "a next line in tsv": ("a.tsv", "a\u0085b\tx\n", "a\u0085b"),
    "a quoted line end": ("a.csv", 'text,label\n"a\nb",x\n', "a\nb"),
    "line ends of Windows": ("a.csv", "text,label\r\na b,x\r\n", "a b"),
    "a byte order mark": ("a.csv", "\ufefftext,label\na b,x\n", "a b"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_row_ends_where_its_format_says(case: str, tmp_path: Path) -> None:
    name, content, text = LINES[case]
    assert [(row.text, row.label) for row in rows_of(tmp_path / name, content)] == [(text, "x")]


@pytest.mark.parametrize(
    ("split", "held", "apart"),
    [
        ("train", "dev", True),
        ("train", "train", False),
        ("train[:10]", "train[10:]", True),
        ("train[:10]", "train[9:]", False),
        ("train[5:]", "train[:5]", True),
        ("train", "train[:1]", False),
    ],
)
def test_held_out_rows_are_no_training_rows(split: str, held: str, apart: bool, tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("a\tb\n")
    if apart:
        check_apart(str(tmp_path), split, str(tmp_path), held)
    else:
        with pytest.raises(LpsparseError, match="trains on"):
            check_apart(str(tmp_path), split, str(tmp_path), held)


def test_a_split_that_is_not_there_is_not_made_of_the_training_rows(
    tiny_bert: Path, table: Path, tmp_path: Path
) -> None:
    with pytest.raises(LpsparseError, match="trains on") as caught:
        lpsparse.finetune(
            tiny_bert,
            tmp_path / "out",
            data=str(table),
            eval_split="dev",
            task="text-classification",
            steps=1,
        )
    assert caught.value.exit_code == ExitCode.USAGE and not (tmp_path / "out").exists()


def labels_of(folder: Path, table: dict[str, str] | list[str] | None, rows: list[str]) -> list[int]:
    """The ids that `eval` gives to the labels of `rows`, for a model whose config has this id2label."""
    from lpsparse.checkpoint.open import open_checkpoint

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": table}))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": "a", "label": y}) + "\n" for y in rows))
    given = {"model": str(folder), "data": str(folder / "rows.jsonl"), "task": "text-classification"}
    return [label for _, label in prepare(resolve(EvalStep, given), open_checkpoint(folder)).held_out]


@pytest.fixture
def classifier(tiny_bert: Path, table: Path, tmp_path: Path) -> Path:
    lpsparse.finetune(
        tiny_bert,
        tmp_path / "classifier",
        data=str(table),
        task="text-classification",
        steps=1,
        method="dense",
    )
    return tmp_path / "classifier"


def test_labels_go_by_name_and_by_number_where_no_name_is_a_number(classifier: Path) -> None:
    assert labels_of(classifier, {"0": "bad", "1": "good"}, ["good", "0", "bad", "1"]) == [1, 0, 0, 1]
    assert labels_of(classifier, {"0": "1", "1": "2"}, ["1", "2"]) == [0, 1]


@pytest.mark.parametrize(
    ("names", "label", "words"),
    [
        ({"0": "1", "1": "2"}, "0", "label '0' is outside"),
        ({"0": "a", "1": "b"}, "²", "label '²' is outside"),
        (["a", "b"], "a", "id2label"),
        ({"zero": "a", "one": "b"}, "a", "id2label"),
        ({"1": "a"}, "a", "id2label"),
    ],
)
def test_a_label_or_a_table_of_labels_that_is_none_is_refused(
    names: Any, label: str, words: str, classifier: Path
) -> None:
    with pytest.raises(LpsparseError, match=words) as caught:
        labels_of(classifier, names, [label])
    assert caught.value.exit_code == ExitCode.INPUT


def test_hidden_folders_and_files_are_no_classes_and_no_images(tmp_path: Path) -> None:
    from PIL import Image

    for name in (".ipynb_checkpoints/x.png", "a/1.png", "b/2.png", "b/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (3, 2)).save(tmp_path / name, format="PNG")
    found = read_images([tmp_path], slice(None), None)
    assert [each.label for each in found.images] == ["a", "b"] == list(found.places)


def broken_images() -> dict[str, tuple[str, bytes]]:
    import io

    from PIL import Image

    array, png = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    Image.new("1", (40, 40)).save(png, format="PNG")
    header = bytearray(png.getvalue())
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the PNG's header
    return {
        "a cut zip": ("x.npz", b"PK\3\4" + bytes(40)),
        "a lone array": ("x.npz", array.getvalue()),
        "nothing": ("x.npz", b""),
        "a huge picture": ("a/x.png", bytes(header)),
        "no picture": ("a/x.png", b"x"),
    }


@pytest.mark.parametrize("case", broken_images())
def test_broken_images_are_refused_by_name(case: str, tmp_path: Path) -> None:
    name, content = broken_images()[case]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    path = tmp_path if name.endswith(".png") else tmp_path / name
    with pytest.raises(LpsparseError, match=r"x\.(npz|png)") as caught:
        read_images([path], slice(None), None)
    assert caught.value.exit_code == ExitCode.INPUT


@pytest.mark.skipif(sys.platform == "win32", reason="no devices")
def test_a_device_is_no_data() -> None:
    with pytest.raises(LpsparseError, match="neither a file nor a folder"):
        find("/dev/null", "train")


@pytest.mark.parametrize(
    ("name", "why"), [("rows.jsonl", "rows.jsonl would be lost"), ("listed.txt", "holds the input")]
)
def test_overwrite_does_not_delete_the_data_it_reads(
    name: str, why: str, tiny_bert: Path, table: Path, tmp_path: Path
) -> None:
    (tiny_bert / "listed.txt").write_bytes(table.read_bytes())
    lpsparse.prune(tiny_bert, classifier := tmp_path / "out", sparsity=0.5)
    inside = classifier / name
    inside.write_bytes(table.read_bytes())
    with pytest.raises(LpsparseError, match=why):
        lpsparse.finetune(
            "bundled:stories260k", classifier, data=str(inside), task="causal-lm", steps=1, overwrite=True
        )
    assert inside.exists()


def test_a_copy_of_the_training_file_as_held_out_data_is_said_and_recorded(
    tiny_bert: Path, table: Path, tmp_path: Path, cli: Any
) -> None:
    (tmp_path / "dev.jsonl").write_bytes(table.read_bytes())
    words = ["--data", table, "--eval-data", tmp_path / "dev.jsonl", "--task", "text-classification"]
    ran = cli("finetune", tiny_bert, tmp_path / "out", *words, "--steps", "1", "--method", "dense")
    assert ran.rc == 0 and "dev.jsonl has the bytes of a training file" in ran.stderr
    notes = json.loads(cli("report", tmp_path / "out", "--json", "-").stdout)["made"]["notes"]
    assert any("dev.jsonl has the bytes" in note for note in notes)
    assert copies(str(table), "rows", str(table), "rows[5:]") == []


def test_eval_says_which_data_the_model_was_trained_on_also_when_it_was_cut_since(
    tiny_bert: Path, table: Path, tmp_path: Path, cli: Any
) -> None:
    options = {"task": "text-classification", "steps": 1, "method": "dense"}
    lpsparse.finetune(tiny_bert, tmp_path / "tuned", data=table, **options)
    lpsparse.prune(tmp_path / "tuned", tmp_path / "cut", sparsity=0.5)
    words = ["--data", table, "--task", "text-classification"]
    ran = cli("eval", tmp_path / "cut", *words)
    assert "cut was trained on rows.jsonl, except the 10 % that were held out" in ran.stderr
    assert "trained on         rows.jsonl" in ran.stdout
    (tmp_path / "new.jsonl").write_text(table.read_text() + "\n")
    other = cli("eval", tmp_path / "cut", "--data", tmp_path / "new.jsonl", *words[2:])
    assert "trained on" not in other.stdout + other.stderr
    assert lpsparse.evaluate(tmp_path / "cut", data=table, task=options["task"]).trained_on == (table.name,)


@pytest.mark.parametrize(
    ("trained", "asked", "known"),
    [("rows", "rows[5:9]", True), ("rows[:5]", "rows[5:9]", False), ("rows[:6]", "rows[5:9]", True)],
)
def test_of_ranges_of_one_file_only_those_that_meet_are_known(
    trained: str, asked: str, known: bool, table: Path
) -> None:
    one = Trained(data=digests(str(table), "rows"), split=trained, set_aside=None)
    assert trained_on(str(table), asked, [one]) == ({"rows.jsonl": None} if known else {})


def test_a_range_in_a_strangers_manifest_is_bounded() -> None:
    with pytest.raises(ValueError, match="split"):
        Trained(data={}, split=f"rows[{'9' * 5000}:]", set_aside=None)


def test_mean_and_std_are_checked_by_eval_too() -> None:
    with pytest.raises(LpsparseError, match="--std above 0"):
        resolve(EvalStep, {"model": "m", "data": "d", "task": "image-classification", "std": "0"})
    with pytest.raises(LpsparseError, match="as many values"):
        resolve(FinetuneStep, {"model": "m", "out": "o", "data": "d", "task": "causal-lm", "std": "1,1"})


@pytest.mark.parametrize("name", ["text", "text.md"])
def test_a_file_of_another_suffix_is_told_those_that_are_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("Once upon a time.")
    with pytest.raises(LpsparseError) as caught:
        find(str(tmp_path / name), "train")
    suffixes = (".txt", ".jsonl", ".csv", ".tsv", ".parquet", ".npz")
    assert caught.value.code == "LPS372" and all(suffix in caught.value.hint for suffix in suffixes)


def test_a_single_file_is_called_by_its_name_and_an_empty_range_is_refused(table: Path) -> None:
    assert find(str(table), "validation[3:]")[2] == "rows.jsonl[3:]"
    with pytest.raises(LpsparseError, match="is nothing") as caught:
        find(str(table), "train[5:3]")
    assert caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("names", "given", "held"),
    [
        (("train.tsv", "dev.tsv", "test.tsv"), {}, "validation"),
        (("train.tsv", "validation.tsv"), {}, "validation"),
        (("train-00000-of-00001.tsv", "validation-00000-of-00001.tsv"), {}, "validation"),
        (("train.tsv", "test.tsv"), {}, None),  # a test set selects nothing
        (("train.tsv", "dev.tsv"), {"eval_fraction": 0.2}, None),
        (("train.tsv", "dev.tsv"), {"split": "dev"}, None),
        (("dev.tsv",), {"split": "dev"}, None),
    ],
)
def test_a_validation_file_beside_the_training_one_is_what_finetune_selects_on(
    names: tuple[str, ...], given: dict[str, Any], held: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_text("text\tlabel\na\tb\n")
    base = {"model": "m", "out": "o", "data": str(tmp_path), "task": "text-classification"}
    found = held_out_of(resolve(FinetuneStep, base | given))
    assert found == (None if held is None else (str(tmp_path), held))


def test_a_folder_of_classes_has_no_validation_split_and_one_of_splits_has(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for kind in ("cat", "dev"):  # a class may be called anything
            (tmp_path / "split" / split / kind).mkdir(parents=True)
            (tmp_path / "plain" / kind).mkdir(parents=True, exist_ok=True)
    base = {"model": "m", "out": "o", "task": "image-classification"}
    whole, plain = (
        resolve(FinetuneStep, {**base, "data": str(tmp_path / name)}) for name in ("split", "plain")
    )
    assert held_out_of(whole) == (str(tmp_path / "split"), "validation")
    assert held_out_of(plain) is None


def test_the_split_that_was_found_is_said_and_recorded(tiny_bert: Path, table: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = table.read_text()
    (tmp_path / "data" / "train.jsonl").write_text(rows)
    (tmp_path / "data" / "dev.jsonl").write_text("".join(rows.splitlines(keepends=True)[:5]))
    given = {"task": "text-classification", "max_length": 8, "steps": 1, "batch_size": 4, "method": "dense"}
    found = lpsparse.finetune(tiny_bert, tmp_path / "out", data=str(tmp_path / "data"), **given)
    assert (found.quality[0].rows, found.quality[0].split) == (5, "validation rows")
    manifest = json.loads((tmp_path / "out" / "lpsparse.json").read_text())
    assert any("dev.jsonl" in note for note in manifest["notes"])
    assert manifest["recipe"]["finetune"]["eval_split"] == "validation"
    explicit = lpsparse.finetune(
        tiny_bert, tmp_path / "asked", data=str(tmp_path / "data"), eval_split="validation", **given
    )
    assert explicit.quality == found.quality  # with the same hash of the data
