"""Work grows with the number of tensors, not with its square: counted in calls, which no machine changes."""

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.files import f32, write_safetensors

from lpsparse import inspect, pack, prune, report, unpack
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.commands.verify import verify_step
from lpsparse.families import LAYOUTS
from lpsparse.steps.report import VerifyStep

COUNTS = (20, 40, 60)
COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "inspect": lambda model, _: inspect(model),
    "prune": lambda model, out: prune(model, out / "again", below=0.5, threads=1),
    "pack": lambda _, out: pack(out / "cut", out / "packed", threads=1),
    "unpack": lambda model, out: unpack(model, out / "dense", threads=1),
    "verify": lambda model, out: verify_step(
        VerifyStep(model=str(out / "cut"), source=str(model), key=None, threads=1)
    ),
    "report": lambda _, out: report(out / "cut", threads=1),
    "report BASE": lambda model, out: report(out / "cut", model, threads=1),
}


def write_many(folder: Path, count: int) -> Path:
    """Matrices of 3 x 5, all of the same values, five in each shard."""
    folder.mkdir(parents=True)
    values, shards = np.random.default_rng(0).standard_normal((3, 5)), count // 5
    weight_map = {f"layers.{i}.mlp.weight": f"model-{i % shards:05d}.safetensors" for i in range(count)}
    for file in set(weight_map.values()):
        some = {name: values for name, of in weight_map.items() if of == file}
        save_file(some, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def calls_of(work: Callable[[], Any]) -> int:
    """Calls of functions, and turns of generators, in this thread."""
    count = 0

    def seen(_: Any, event: str, __: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Path]]:
    """Models, and folders in which they are cut; the first one is there twice, for what is imported once."""
    folders = [tmp_path_factory.mktemp("many") for _ in range(4)]
    models = [
        write_many(folder / "model", count)
        for folder, count in zip(folders, (COUNTS[0], *COUNTS), strict=True)
    ]
    for model, folder in zip(models, folders, strict=True):
        prune(model, folder / "cut", below=0.5, threads=1)
    return list(zip(models, folders, strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_work_grows_with_the_number_of_tensors(command: str, made: list[tuple[Path, Path]]) -> None:
    _, few, some, many = [calls_of(partial(COMMANDS[command], *each)) for each in made]
    first, second = some - few, many - some  # of as many tensors more, each time
    assert abs(second - first) < 0.03 * first


def test_the_names_of_a_hundred_thousand_tensors_are_checked_at_once() -> None:
    """With a set of the others for each of them this takes minutes."""
    names = [f"experts.{i}.weight" for i in range(100_000)]
    names_taken = LAYOUTS["packed"].names_taken
    assert names_taken({*names, f"{names[7]}.packed"}) == [f"{names[7]}.packed"]
    assert names_taken({*names}) == []


def test_a_tensor_is_found_by_its_name_without_looking_through_all(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {f"t{i}": f32(1, seed=i) for i in range(300)})
    found = open_checkpoint(file)
    assert calls_of(lambda: [found[f"t{i}"] for i in range(300)]) < 3000
    with pytest.raises(KeyError):
        found["t300"]
