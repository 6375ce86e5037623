"""prune of a whole diffusers pipeline: the components that were asked for, and all else as it was."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.cli import Ran
from support.files import f32, write_safetensors

from lpsparse import check_recipe, prune, verify
from lpsparse.errors import ExitCode, UsageError, VerdictError

Cli = Callable[..., Ran]
UNET = {"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.attentions.0.to_q.weight": (13, 7), "norm.bias": (8,)}
CLIP = {"text_model.encoder.layers.0.self_attn.q_proj.weight": (13, 7), "text_model.final.bias": (5,)}
NAME = "diffusion_pytorch_model.safetensors"


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipe"
    weights = {
        f"unet/{NAME}": UNET,
        f"vae/{NAME}": UNET,
        "vae/diffusion_pytorch_model.fp16.safetensors": UNET,
        "text_encoder/model.safetensors": CLIP,
        "old/model.safetensors": CLIP,
        "../elsewhere/model.safetensors": CLIP,
    }
    for name, shapes in weights.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / name, {key: f32(*shape) for key, shape in shapes.items()})
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer", "../elsewhere"):
        index[part] = ["diffusers", "Any"]
    texts = {
        "model_index.json": json.dumps(index),
        "README.md": "# Pipe",
        "unet/config.json": "{}",
        "vae/config.json": "{}",
        "text_encoder/config.json": "{}",
        "tokenizer/merges.txt": "a b",
        "scheduler/scheduler_config.json": "{}",
        "logs/events.out": "x",
        "LICENSE": "none",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_components_that_were_asked_for_are_pruned_and_all_else_is_copied(
    pipeline: Path, tmp_path: Path, cli: Cli
) -> None:
    out, before = tmp_path / "out", files(pipeline)
    words = ("prune", pipeline, out, "--sparsity", "0.5", "--component", "unet", "--component", "text_*")
    dry = cli(*words, "--dry-run", "--json")
    assert dry.rc == 0 and not out.exists()
    assert "old/model.safetensors" in dry.stderr and "logs/" in dry.stderr
    ran = cli(*words)
    assert ran.rc == 0
    for name in ("unet", "text_encoder"):
        assert verify(out / name, pipeline / name)["ok"]
        found = json.loads((out / name / "report.json").read_text())
        assert json.loads(dry.stdout)[name]["prunable"] == found["prunable"]
        assert found["prunable"]["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert f"lpsparse report {out / name} {pipeline / name}" in ran.stderr
    both = verify(out, pipeline)
    assert both["ok"] and both["tensors"] == len(UNET) + len(CLIP)
    after, changed = files(out), ("unet/", "text_encoder/")
    same = {name for name in before if not name.startswith((*changed, "old/", "logs/"))}
    assert {name for name in after if not name.startswith(changed)} == same
    assert all(after[name] == before[name] for name in same)
    (out / "unet" / "config.json").write_text('{"a": 1}')
    found = verify(out)
    assert not found["ok"] and found["problems"][0].startswith("unet: config.json")
    assert f"unet/{NAME}" in after and "text_encoder/config.json" in after
    assert files(pipeline) == before and not list(tmp_path.glob("*.partial"))


def test_a_pipeline_in_the_cache_of_the_hub_is_made_of_links(pipeline: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--pipe" / "snapshots" / "abc"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    for i, name in enumerate(files(pipeline)):
        shutil.copyfile(pipeline / name, blobs / str(i))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / str(i))
    found = prune(snapshot, tmp_path / "out", sparsity=0.5, component=["*"])
    assert list(found) == ["text_encoder", "unet", "vae"]
    assert (tmp_path / "out" / "unet" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer" / "merges.txt").is_file()
    alone = prune(snapshot / "unet", tmp_path / "alone", sparsity=0.5)
    assert (tmp_path / "alone" / "config.json").is_file() and alone.prunable == found["unet"].prunable


def test_what_is_no_component_is_refused_before_anything_is_written(
    pipeline: Path, tiny: Path, tmp_path: Path, cli: Cli
) -> None:
    for model, name, said in (
        (pipeline, "scheduler", "one of text_encoder, unet, vae"),
        (pipeline, "../elsewhere", "one of text_encoder, unet, vae"),
        (tiny, "unet", "not the folder of a diffusers pipeline"),
    ):
        ran = cli("prune", model, tmp_path / "o", "--sparsity", "0.5", "--component", name)
        assert ran.rc == ExitCode.USAGE and "LPS262" in ran.stderr and said in ran.stderr
    ran = cli("prune", pipeline, tmp_path / "o", "--sparsity", "0.5")
    assert ran.rc == ExitCode.INPUT and "--component text_encoder" in ran.stderr
    with pytest.raises(UsageError, match="--component"):
        prune(pipeline, tmp_path / "o", sparsity=0.5, component=["unet"], overwrite=True)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {pipeline}\nout: o\nsteps: [{{prune: {{sparsity: 0.5, component: unet}}}}]"
    )
    with pytest.raises(UsageError, match="component"):
        check_recipe(recipe)
    (pipeline / "vae" / NAME).write_bytes(b"broken")
    assert cli("prune", pipeline, tmp_path / "o", "--sparsity", "0.5", "--component", "*").rc == 3
    assert not list(tmp_path.glob("o*"))


def test_a_component_that_is_left_empty_is_a_verdict_on_a_whole_pipeline(
    pipeline: Path, tmp_path: Path
) -> None:
    small = np.full((13, 7), 1e-6, "f4")
    save_file({"a.to_q.weight": small, "b.to_q.weight": np.ones((13, 7), "f4")}, pipeline / "unet" / NAME)
    with pytest.raises(VerdictError, match=r"out/unet: .*a\.to_q\.weight") as raised:
        prune(pipeline, tmp_path / "out", sparsity=0.5, component=["*"])
    assert raised.value.code == "LPS103"
    assert all(verify(tmp_path / "out" / name)["ok"] for name in ("unet", "vae", "text_encoder"))
    assert (tmp_path / "out" / "model_index.json").is_file()
