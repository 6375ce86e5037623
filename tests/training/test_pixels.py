"""What a model sees of an image: decoded as it is meant, and made ready as the model's own settings say."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image as Pillow

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.steps.finetune import EvalStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.build import prepare
from lpsparse.training.images import Image, read_images
from lpsparse.training.pixels import same_channels

MEAN, STD = [0.9, 0.1, 0.3], [0.05, 0.9, 0.2]
SETTINGS = {
    "image_processor_type": "ViTImageProcessor",
    "image_mean": MEAN,
    "image_std": STD,
    "size": {"height": 8, "width": 8},
}


def saved(folder: Path, image: Any, name: str = "0.png", **options: Any) -> Path:
    (folder / "a").mkdir(parents=True, exist_ok=True)
    image.save(folder / "a" / name, **options)
    return folder


def pixels_of(folder: Path) -> Any:
    return read_images([folder], slice(None), None).images[0].pixels


def draw(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 255, shape).astype(np.uint8)


def test_sixteen_bits_are_read_as_they_are(tmp_path: Path) -> None:
    values = np.array([[0, 300], [12_000, 65_535]], np.uint16)
    found = pixels_of(saved(tmp_path, Pillow.fromarray(values)))
    assert found.dtype == np.uint16 and np.array_equal(found[..., 0], values)
    wide = saved(tmp_path / "wide", Pillow.fromarray(values.astype(np.int32)), "0.tiff")  # of mode I
    assert np.array_equal(pixels_of(wide)[..., 0], values)


@pytest.mark.parametrize("values", [np.full((2, 2), 70_000, np.int32), np.ones((2, 2), np.float32)])
def test_values_of_no_known_range_are_refused(values: Any, tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match=r"a/0\.tiff: its values are of mode") as caught:
        pixels_of(saved(tmp_path, Pillow.fromarray(values), "0.tiff"))
    assert caught.value.exit_code == ExitCode.INPUT


@pytest.mark.parametrize("turned", [3, 6, 8])
def test_a_photo_is_turned_as_its_tag_says(turned: int, tmp_path: Path) -> None:
    back = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270"}[turned]
    upright = Pillow.fromarray(draw(5, 7, 3))
    exif = Pillow.Exif()
    exif[0x0112] = turned
    stored = upright.transpose(getattr(Pillow.Transpose, back))
    assert np.array_equal(pixels_of(saved(tmp_path, stored, exif=exif)), np.asarray(upright))


MODES = {
    "1": (0, 1),
    "L": (130, 1),
    "LA": ((130, 255), 1),
    "P": (3, 3),
    "CMYK": ((0, 90, 20, 10), 3),
    "RGBA": ((9, 8, 7, 255), 3),
}


@pytest.mark.parametrize("mode", MODES)
def test_gray_keeps_one_channel_and_all_else_is_colours(mode: str, tmp_path: Path) -> None:
    colour, channels = MODES[mode]
    image = Pillow.new(mode, (3, 5), colour)
    found = pixels_of(saved(tmp_path, image, "0.tiff"))
    assert found.shape == (5, 3, channels) and found.dtype == np.uint8
    assert np.array_equal(found, np.asarray(image.convert("L" if channels == 1 else "RGB")).reshape(5, 3, -1))


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (9, 8, 7, 0)), ("LA", (9, 0))])
def test_what_is_transparent_lies_on_white(mode: str, clear: Any, tmp_path: Path) -> None:
    assert (pixels_of(saved(tmp_path, Pillow.new(mode, (3, 2), clear))) == 255).all()


def test_a_transparent_colour_of_a_palette_lies_on_white(tmp_path: Path) -> None:
    image = Pillow.new("P", (3, 2), 0)
    image.putpalette([9, 8, 7, 1, 2, 3])
    assert (pixels_of(saved(tmp_path, image, "0.gif", transparency=0)) == 255).all()


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    file = io.BytesIO()
    Pillow.fromarray(draw(16, 16, 3)).save(file, format="JPEG")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    (tmp_path / "train" / "cat" / "5.jpg").write_bytes(file.getvalue()[:-200])
    with pytest.raises(LpsparseError, match=r"train/cat/5\.jpg: not an image") as caught:
        read_images([tmp_path / "train"], slice(None), None)
    assert caught.value.exit_code == ExitCode.INPUT


def test_gray_is_as_much_of_each_colour_and_colours_are_no_gray() -> None:
    gray, colour = Image("g", "a", draw(2, 3, 1)), Image("c.png", "a", draw(2, 3, 3))
    found = same_channels([gray, colour], 3)
    assert np.array_equal(found[0], np.repeat(gray.pixels, 3, axis=2)) and found[1] is colour.pixels
    with pytest.raises(LpsparseError, match=r"c\.png: has 3 channels, and the model takes 1"):
        same_channels([gray, colour], 1)


def mixed(folder: Path, *sizes: tuple[int, int], gray: int = 0) -> Path:
    """Images of these sizes in each of four classes; the first `gray` of a class have no colours."""
    for label in "abcd":
        for i, size in enumerate(sizes):
            (folder / label).mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(draw(*size) if i < gray else draw(*size, 3)).save(folder / label / f"{i}.png")
    return folder


def measured(model: object, data: Path, **more: Any) -> Any:
    given = {"model": str(model), "data": str(data), "task": "image-classification", **more}
    return prepare(resolve(EvalStep, given), open_checkpoint(Path(str(model))))


def test_gray_images_among_colours_are_read_and_one_of_another_size_is_named(
    net: dict[str, Any], tmp_path: Path
) -> None:
    data = mixed(tmp_path / "d", (8, 8), (8, 8), gray=1)
    task = measured(net["model"], data, model_fn=net["model_fn"])
    assert task.collate(list(task.held_out))["x"].shape == (8, 3, 8, 8)
    alone = mixed(tmp_path / "gray", (8, 8), gray=1)  # which the module takes as colours alone
    assert (
        measured(net["model"], alone, model_fn=net["model_fn"]).collate(task.held_out[:1])["x"].shape[1] == 3
    )
    Pillow.fromarray(draw(8, 9, 3)).save(data / "c" / "1.png")
    with pytest.raises(LpsparseError, match=r"d/c/1\.png: has 8 x 9 pixels, d/a/0\.png has 8 x 8"):
        measured(net["model"], data, model_fn=net["model_fn"])


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=4,
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize(
    ("name", "settings"),
    [("preprocessor_config.json", SETTINGS), ("processor_config.json", {"image_processor": SETTINGS})],
)
def test_images_are_made_ready_as_the_model_says(
    name: str, settings: dict[str, Any], vit: Path, tmp_path: Path
) -> None:
    (vit / name).write_text(json.dumps(settings))
    data = mixed(tmp_path / "d", (8, 8))
    task = measured(vit, data)
    by_hand = (torch.from_numpy(draw(8, 8, 3)).permute(2, 0, 1) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / (
        torch.tensor(STD).view(3, 1, 1)
    )
    torch.testing.assert_close(task.collate(task.held_out[:1])["x"][0], by_hand, rtol=1e-4, atol=1e-4)
    assert "mean 0.9 0.1 0.3" in task.view and any(name in note for note in task.notes)
    flags = measured(vit, data, mean="0.5", std="0.25")
    plain = (torch.from_numpy(draw(8, 8, 3)).permute(2, 0, 1) / 255 - 0.5) / 0.25
    torch.testing.assert_close(flags.collate(flags.held_out[:1])["x"][0], plain, rtol=1e-4, atol=1e-4)


def test_resize_and_crop_of_the_model_take_images_of_any_size(vit: Path, tmp_path: Path) -> None:
    more = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 10}, "crop_size": 8}
    (vit / "preprocessor_config.json").write_text(json.dumps(SETTINGS | more))
    task = measured(vit, mixed(tmp_path / "d", (11, 23), (19, 7), gray=1))
    assert task.collate(list(task.held_out))["x"].shape == (8, 3, 8, 8)
    assert "resize to shortest_edge 10 (bicubic), crop to 8 x 8 pixels" in task.view


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_magic": True}, "do_magic: ViTImageProcessorPil does no such thing"),
        ({"image_processor_type": "NoSuchProcessor"}, "preprocessor_config.json"),
        ({"size": {"height": 13, "width": 13}}, "does not take images"),
    ],
)
def test_what_cannot_be_done_as_the_model_says_is_refused(
    change: dict[str, Any], words: str, vit: Path, tmp_path: Path
) -> None:
    (vit / "preprocessor_config.json").write_text(json.dumps(SETTINGS | change))
    with pytest.raises(LpsparseError, match=words) as caught:
        measured(vit, mixed(tmp_path / "d", (8, 8)))
    assert caught.value.exit_code == ExitCode.INPUT


def test_a_setting_that_means_nothing_and_bits_that_are_lost_are_said(vit: Path, tmp_path: Path) -> None:
    (vit / "preprocessor_config.json").write_text(json.dumps(SETTINGS | {"crop_pct": 0.9}))
    data = mixed(tmp_path / "d", (8, 8))
    Pillow.fromarray(np.full((8, 8), 30_000, np.uint16)).save(data / "a" / "deep.png")
    notes = measured(vit, data).notes
    assert any("not used there: crop_pct" in note for note in notes)
    assert any("16-bit images are read with 8 bits" in note for note in notes)


def test_finetune_records_how_it_saw_the_images_and_eval_sees_them_alike(vit: Path, tmp_path: Path) -> None:
    (vit / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    data = mixed(tmp_path / "d", (8, 8), (9, 9), (7, 7))
    options = {"task": "image-classification", "steps": 1, "method": "dense", "batch_size": 4}
    parts = {"split": "train[6:]", "eval_split": "train[:6]"}
    lpsparse.finetune(vit, tmp_path / "out", data=data, **parts, **options)
    manifest = json.loads((tmp_path / "out" / "lpsparse.json").read_text())
    assert any(
        "mean 0.9 0.1 0.3" in note and "preprocessor_config.json" in note for note in manifest["notes"]
    )
    found = lpsparse.evaluate(tmp_path / "out", data=data, split="train[:6]", save=True)
    assert "mean 0.9 0.1 0.3" in found["pixels"]
    again = json.loads((tmp_path / "out" / "lpsparse.json").read_text())["quality"]
    assert len(again) == 1  # of the same rows, read in the same way
