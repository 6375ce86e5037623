"""Labels are names, decided once for all splits; rows that cannot be learnt from are refused by place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.models import BUNDLED

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.steps.finetune import EvalStep, FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.build import prepare
from lpsparse.training.data import class_names, read_rows
from lpsparse.training.labels import config_names, label_of, number
from lpsparse.training.tasks.base import length_of

ANY = open_checkpoint(BUNDLED)
TEXTS: dict[str, Any] = {"task": "text-classification", "max_length": 16}
IMAGES = {"task": "image-classification"}


def folders(root: Path, *names: str, size: int = 8) -> Path:
    """Two images in each of these folders; none where the name ends in /."""
    draw = np.random.default_rng(len(names))
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(0 if name.endswith("/") else 2):
            Image.fromarray(draw.integers(0, 255, (size, size, 3)).astype(np.uint8)).save(
                root / name / f"{i}.png"
            )
    return root


def numbers(given: dict[str, Any], data: Path, split: str = "validation") -> list[int]:
    """The number that `eval` gives to each held-out image or row, in order and once."""
    step = resolve(EvalStep, {**given, "data": str(data), "split": split})
    return list(dict.fromkeys(y for _, y in prepare(step, open_checkpoint(Path(step.model))).held_out))


@pytest.fixture
def bare(net: dict[str, Any]) -> dict[str, Any]:
    """A module of four outputs without names."""
    return {key: net[key] for key in ("model", "model_fn", "task")}


def test_a_class_that_a_split_lacks_keeps_its_number(bare: dict[str, Any], tmp_path: Path) -> None:
    data = folders(tmp_path / "d", "train/a", "train/b", "train/c", "train/d", "val/a", "val/c", "val/d")
    assert numbers(bare, data) == [0, 2, 3]
    assert numbers(bare, folders(data, "test/d"), "test") == [3]


def test_fewer_folders_than_outputs_are_refused_and_an_empty_one_or_numbers_settle_it(
    bare: dict[str, Any], tmp_path: Path
) -> None:
    data = folders(tmp_path / "d", "train/a", "train/c", "val/a", "val/c", "val/d")
    with pytest.raises(LpsparseError, match="4 outputs without names, and all splits have 3 class") as caught:
        numbers(bare, data)
    assert caught.value.exit_code == ExitCode.INPUT and "0 to 3" in caught.value.hint
    assert numbers(bare, folders(data, "train/b/")) == [0, 2, 3]
    assert numbers(bare, folders(tmp_path / "n", "val/0", "val/2", "val/3")) == [0, 2, 3]
    with pytest.raises(LpsparseError, match="which is which"):  # they may count from 1
        numbers(bare, folders(tmp_path / "one", "val/1", "val/2", "val/3"))
    assert numbers(bare, folders(tmp_path / "four", "val/1", "val/2", "val/3", "val/4")) == [0, 1, 2, 3]


def vit(folder: Path, *names: str, head: bool = True) -> dict[str, Any]:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        id2label=dict(enumerate(names)) if names else None,
    )
    kind = transformers.ViTForImageClassification if head else transformers.ViTModel
    kind(config).save_pretrained(folder)
    return {**IMAGES, "model": str(folder)}


def test_a_model_that_names_its_classes_decides_by_name(tmp_path: Path) -> None:
    given = vit(tmp_path / "vit", "zebra", "ant", "cow")
    data = folders(tmp_path / "d", "val/ant", "val/cow", "val/zebra")
    assert numbers(given, data) == [1, 2, 0]
    with pytest.raises(LpsparseError, match=r"val/bird: label 'bird' is outside .*\(zebra, ant, cow\)"):
        numbers(given, folders(data, "val/bird"))


def test_a_fresh_head_gets_the_names_of_all_folders_with_numbers_in_order(tmp_path: Path) -> None:
    given = vit(tmp_path / "vit", head=False)
    names = [str(i) for i in (1, 2, 3, 10, 11)]
    data = folders(tmp_path / "d", *(f"train/{name}" for name in names), "val/10", "val/2")
    options = {"steps": 1, "method": "dense", "batch_size": 2}
    lpsparse.finetune(out=tmp_path / "out", data=data, **given, **options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert config["label2id"] == {name: i for i, name in enumerate(names)}
    assert numbers({**IMAGES, "model": str(tmp_path / "out")}, data) == [3, 1]


def test_numbers_go_by_the_names_that_a_data_set_of_the_hub_gives_them(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    told = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    rows = pa.table({"text": ["a", "b"], "label": [0, 1]})
    path = tmp_path / "a.parquet"
    parquet.write_table(rows.replace_schema_metadata({"huggingface": json.dumps(told)}), path)
    names, places = class_names([path], None), {"0": "a.parquet:1", "1": "a.parquet:2"}
    assert names == ("cat", "dog")
    assert number(places, ["Dog", "Cat"], ANY, head=True, told=names).ids["0"] == 1
    assert number(places, ["yes", "no"], ANY, head=True, told=names).ids["0"] == 0
    assert number(places, ["LABEL_0", "LABEL_1"], ANY, head=False, told=names).fresh == names
    with pytest.raises(LpsparseError, match="1 is 'dog', which is outside"):
        number(places, ["cow", "cat"], ANY, head=True, told=names)


def table(path: Path, *rows: tuple[Any, Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    return path


def tuned(model: Path, data: Path, tmp_path: Path, **more: Any) -> Any:
    given = {**TEXTS, "model": str(model), "data": str(data), "out": str(tmp_path / "out"), **more}
    return prepare(resolve(FinetuneStep, given), open_checkpoint(model))


def test_the_labels_do_not_depend_on_the_seed_or_the_part(tiny_bert: Path, tmp_path: Path) -> None:
    rows = [("fine", "10")] * 9 + [("dull", "9")] * 2 + [("odd", "ok")] * 2
    data = table(tmp_path / "rows.jsonl", *rows)
    for seed in range(4):
        assert tuned(tiny_bert, data, tmp_path, seed=seed).loaded.module.config.id2label == {
            0: "9",
            1: "10",
            2: "ok",
        }
    part = tuned(tiny_bert, data, tmp_path, split="rows[:11]")
    assert part.loaded.module.config.num_labels == 3


BAD: dict[str, tuple[list[tuple[Any, Any]], str]] = {
    "a list": ([("a", "x"), ("b", ["x", "y"])], r":2: the label is a list"),
    "a list as pandas writes it": ([("a", "['x']")], r":1: the label is a list"),
    "a score": ([("a", 1.0), ("b", 0.25)], r":2: the label 0.25 is a real number"),
    "a score as text": ([("a", "3.8"), ("b", "4.0")], r":1: the label 3.8 is a real number"),
    "NaN": ([("a", float("nan"))], r":1: the label is empty"),
    "blanks": ([("a", "  ")], r":1: the label is empty"),
    "a lone row": ([("a", "x"), ("b", "x"), ("c", "y")], r":3: the only row of class 'y'"),
    "one class": ([("a", "x"), ("b", "x")], r":\d: all 2 rows to train on have the label 'x'"),
    "no text": ([("a", "x"), ("", "y"), ("b", "x"), ("c", "y")], r":2: the text gives no tokens"),
    "a blank text": ([(" ", "x"), ("a", "x"), ("b", "y"), ("c", "y")], r":1: the text gives no tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_learnt_from_is_named(case: str, tiny_bert: Path, tmp_path: Path) -> None:
    rows, words = BAD[case]
    with pytest.raises(LpsparseError, match=r"rows\.jsonl" + words) as caught:
        tuned(tiny_bert, table(tmp_path / "rows.jsonl", *rows), tmp_path)
    assert caught.value.exit_code == ExitCode.INPUT


def test_held_out_rows_of_a_class_that_nobody_trains_are_refused_for_a_new_head(
    tiny_bert: Path, tmp_path: Path
) -> None:
    rows = table(tmp_path / "rows.jsonl", ("a", "x"), ("b", "y"))
    other = table(tmp_path / "other.jsonl", ("a", "x"), ("b", "z"))
    with pytest.raises(LpsparseError, match=r"other\.jsonl:2: label 'z': no training row has it"):
        tuned(tiny_bert, rows, tmp_path, eval_data=str(other))


@pytest.mark.parametrize("value", [1, 1.0, "1.0", " 1 ", "1."])
def test_whole_numbers_are_one_label_however_they_are_written(value: Any) -> None:
    assert label_of("a:1", value) == "1"
    assert number({label_of("a:1", value): "a:1"}, ["LABEL_0", "LABEL_1"], ANY, head=True).ids == {"1": 1}
    assert number({label_of("a:1", value): "a:1"}, ["0.0", "1.0"], ANY, head=True).ids["1"] == 1


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_a_model_of_another_problem_is_refused_and_never_rewritten(kind: str) -> None:
    with pytest.raises(LpsparseError, match=f"problem_type is {kind}") as caught:
        config_names({"problem_type": kind, "id2label": {"0": "a", "1": "b"}}, ANY)
    assert caught.value.exit_code == ExitCode.INPUT


def test_a_head_of_one_output_is_no_choice() -> None:
    names = config_names({"id2label": {"0": "LABEL_0"}}, ANY)
    with pytest.raises(LpsparseError, match="one output"):
        number({"0": "a:1"}, names, ANY, head=True)


def rows_of(path: Path, text: str, notes: list[str]) -> list[tuple[str, str]]:
    path.write_bytes(text.encode())
    return [(row.text, row.label) for row in read_rows([path], slice(None), None, None, say=notes.append)]


@pytest.mark.parametrize("heading", ["review,sentiment", "a,b", " Review Text , Class"])
def test_a_heading_of_unknown_names_is_known_by_its_label_and_said(heading: str, tmp_path: Path) -> None:
    notes: list[str] = []
    rows = "fine,good\nlong,bad\ngreat,good\ndull,bad\n"
    assert len(rows_of(tmp_path / "a.csv", f"{heading}\n{rows}", notes)) == 4
    assert len(notes) == 1 and "are read as text and label" in notes[0]


@pytest.mark.parametrize("first", ["fine,good", "x,7", "a film that nobody needs,mixed"])
def test_a_first_row_that_is_one_stays(first: str, tmp_path: Path) -> None:
    rows = f"{first}\nfine,good\nlong,bad\ngreat,good\ndull,bad\n"
    assert len(rows_of(tmp_path / "a.csv", rows, [])) == 5


def test_a_first_row_that_may_be_a_heading_is_refused_with_two_ways_out(tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match=r"a\.csv:1: .*is it a heading") as caught:
        rows_of(tmp_path / "a.csv", "review,sentiment\nfine,good\nlong,bad\n", [])
    assert "--text-field review --label-field sentiment" in caught.value.hint and "a row" in caught.value.hint


def test_a_first_text_may_be_of_several_lines_or_empty(tmp_path: Path) -> None:
    assert rows_of(tmp_path / "a.csv", '"two\nlines",1\nb,0\n', [])[0] == ("two\nlines", "1")
    assert rows_of(tmp_path / "a.tsv", "\t1\nb\t0\n", [])[0] == ("", "1")


def test_a_file_of_one_column_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match="one column") as caught:
        rows_of(tmp_path / "a.csv", "text;label\nfine;good\n", [])
    assert "comma" in caught.value.hint


QUOTED = {
    "as a spreadsheet writes it": ('text\tlabel\n"he said ""no"""\tx\nplain\ty\n', ['he said "no"', "plain"]),
    "with line ends and tabs": ('text\tlabel\n"two\nlines"\tx\n"a\tb"\ty\n', ["two\nlines", "a\tb"]),
    "plain lines with quotes": ('text\tlabel\n"open\tx\nclosed"\ty\n', ['"open', 'closed"']),
    "a quoted word first": ('text\tlabel\n"Yes" he said\tx\nno\ty\n', ['"Yes" he said', "no"]),
}


@pytest.mark.parametrize("case", QUOTED)
def test_quotes_of_a_tsv_are_read_as_they_are_meant(case: str, tmp_path: Path) -> None:
    content, texts = QUOTED[case]
    assert [text for text, _ in rows_of(tmp_path / "a.tsv", content, [])] == texts


def positions(kind: str, **more: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=41,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        **more,
    )
    return getattr(transformers, f"{kind}Model")(config)


@pytest.mark.parametrize(
    ("kind", "pad", "most"), [("Bert", 0, 34), ("Roberta", 1, 32), ("Camembert", 1, 32), ("Roberta", 3, 30)]
)
def test_a_text_may_have_as_many_tokens_as_the_model_has_positions(kind: str, pad: int, most: int) -> None:
    model = positions(kind, max_position_embeddings=34, pad_token_id=pad)
    model(torch.full((1, most), 7))  # and one more is an index out of range
    given = {"model": "m", "data": "d", "task": "text-classification"}
    assert length_of(resolve(EvalStep, given), model, "m") == most  # the default is cut
    assert length_of(resolve(EvalStep, {**given, "max_length": most}), model, "m") == most
    with pytest.raises(LpsparseError, match=f"--max-length {most + 1}: m has {most} positions") as caught:
        length_of(resolve(EvalStep, {**given, "max_length": most + 1}), model, "m")
    assert caught.value.exit_code == ExitCode.USAGE


def test_tensors_of_other_shapes_are_named_and_no_report_is_pointed_to(
    tiny_bert: Path, tmp_path: Path
) -> None:
    for path in tiny_bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    with pytest.raises(
        LpsparseError, match=r"position_embeddings\.weight is \[64, 16\], expected \[32, 16\]"
    ):
        tuned(tmp_path, table(tmp_path / "rows.jsonl", *[("a", "x"), ("b", "y")] * 2), tmp_path)
