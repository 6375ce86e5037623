"""Every criterion, and one from outside of the package."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lpsparse import prune
from lpsparse.checkpoint.dtypes import DTYPES, FIELDS, ordered
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.checkpoint.tensors import Tensor
from lpsparse.errors import UsageError
from lpsparse.families import CRITERIA
from lpsparse.pruning.criteria.base import Criterion


def by_column(codes: np.ndarray, tensor: Tensor, line: int) -> np.ndarray:
    """|w| times the number of its column: the first columns go first."""
    values = codes.view(np.float32) * np.arange(1, codes.shape[1] + 1, dtype=np.float32)
    return values.view(np.uint32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    array = np.random.default_rng(3).standard_normal((8, 16)).astype(np.float32)
    array[:, 5] = -0.0
    save_file({"a.weight": array, "b.weight": array[::-1].copy()}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_keeps_shapes_and_scores_zeros_lowest(name: str, source: Path) -> None:
    criterion = CRITERIA[name]
    for tensor in open_checkpoint(source).tensors:
        assert criterion.dtype(tensor) in FIELDS
        for line, raw in tensor.blocks():
            codes = ordered(raw, tensor.dtype)
            scores = criterion.score(codes, tensor, line)
            assert scores.shape == raw.shape
            assert scores.dtype == DTYPES[criterion.dtype(tensor)].storage
            assert not scores[codes == 0].any()


@pytest.mark.parametrize(
    "rule",
    [
        {"sparsity": "0.5"},
        {"sparsity": "0.5", "scope": "tensor"},
        {"sparsity": "0.5", "scope": "row"},
        {"sparsity": "0.5", "block": "2x2"},
        {"n_m": "2:4"},
    ],
)
@pytest.mark.parametrize("name", [*CRITERIA, "toy"])
def test_a_cut_is_exact_by_every_criterion(
    name: str, rule: dict[str, Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA.members, "toy", Criterion(by_column))
    found = prune(source, tmp_path / "out", criterion=name, **rule)
    assert found.prunable.zeros >= Decimal("0.5") * found.prunable.weights
    if rule == {"sparsity": "0.5"}:
        assert found.prunable.zeros == found.prunable.weights // 2


def test_a_criterion_from_outside_decides_what_is_cut(
    source: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA.members, "toy", Criterion(by_column))
    assert cli("prune", source, tmp_path / "out", "--sparsity", "0.5", "--criterion", "toy").rc == 0
    before, after = load_file(source), load_file(tmp_path / "out" / "m.safetensors")
    scores, kept = (
        np.concatenate([table[name].ravel() for name in sorted(table)])
        for table in (
            {name: np.abs(array) * np.arange(1, 17, dtype=np.float32) for name, array in before.items()},
            {name: array != 0 for name, array in after.items()},
        )
    )
    assert scores[kept].min() > scores[~kept].max()


def test_a_criterion_that_ranks_nothing_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CRITERIA.members, "toy", Criterion(by_column))
    for rule in ({"below": 0.1}, {"gap": True}):
        with pytest.raises(UsageError) as refused:
            prune(source, source.parent / "out", criterion="toy", **rule)
        assert refused.value.code == "LPS204"
    with pytest.raises(UsageError, match="magnitude"):
        prune(source, source.parent / "out", sparsity=0.5, criterion="magnitud")
