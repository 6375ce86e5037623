"""The cut: exact counts, ties by name and position, magnitudes in float order, the band of --gap."""

import math
from collections.abc import Iterator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file, save_file
from support.files import PRUNABLE, PRUNABLE_WEIGHTS, f32, peak_of, tiny_arrays, tree_hash, write_safetensors

from lpsparse import prune, unpack
from lpsparse.checkpoint.dtypes import (
    DTYPES,
    F32_INF,
    F64_INF,
    code_of,
    infinity,
    key_of,
    magnitudes,
    ordered,
    value_of,
)
from lpsparse.checkpoint.open import Checkpoint, open_checkpoint
from lpsparse.errors import InputError, UsageError, VerdictError
from lpsparse.pruning.cuts import cut_smallest
from lpsparse.pruning.plan import Plan, plan_prune
from lpsparse.pruning.select import Scored, select, target_count
from lpsparse.pruning.targets import choose, decide, no_match
from lpsparse.steps.prune import PruneStep

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def codes(dtype: str) -> np.ndarray:
    """Every bit pattern of the small dtypes; of the large ones the edges of every kind, and random ones."""
    bits = DTYPES[dtype].bits
    if bits <= 16:
        return np.arange(2**bits, dtype=np.uint32).astype(DTYPES[dtype].storage)
    draw = np.random.default_rng(13).integers(0, 2**bits, 2000, np.uint64, endpoint=False)
    top = {32: 0x7F800000, 64: 0x7FF0000000000000}[bits]
    edges = [0, 1, 2, top - 1, top, top + 1, 2 ** (bits - 1) - 1]
    edges += [edge | 1 << (bits - 1) for edge in edges]
    return np.concatenate([np.array(edges, np.uint64), draw]).astype(DTYPES[dtype].storage)


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """What torch says that the bits mean, as float64."""
    signed = raw.view(np.dtype(f"i{raw.itemsize}"))
    return torch.from_numpy(signed.copy()).view(TORCH[dtype]).double().numpy()


# Magnitudes


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", TORCH)
def test_magnitude_keys_stand_for_the_absolute_values_torch_reads(dtype: str, wide: bool) -> None:
    raw = codes(dtype)
    keys, values = magnitudes(raw, dtype, wide=wide), np.abs(floats(raw, dtype))
    finite = np.isfinite(values)
    top = F64_INF if keys.itemsize == 8 else F32_INF
    assert np.array_equal(keys < top, finite) and np.array_equal(np.isinf(values), keys == top)
    assert np.array_equal(ordered(raw, dtype) < infinity(dtype), finite)
    assert keys.dtype == (np.uint64 if wide or dtype == "F64" else np.uint32)
    assert np.array_equal(keys[finite].view(np.float64 if keys.itemsize == 8 else np.float32), values[finite])


@pytest.mark.parametrize("dtype", TORCH)
def test_magnitude_order_is_float_order(dtype: str) -> None:
    raw = codes(dtype)
    values = np.abs(floats(raw, dtype))
    keys = magnitudes(raw, dtype)[np.isfinite(values)]
    order = np.argsort(values[np.isfinite(values)], kind="stable")
    assert np.array_equal(np.argsort(keys, kind="stable"), order)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", TORCH)
def test_the_code_of_a_key_is_the_smallest_that_reaches_it(dtype: str, wide: bool) -> None:
    if dtype == "F64" and not wide:
        return
    codes_of = np.sort(ordered(codes(dtype), dtype))
    codes_of = codes_of[codes_of < infinity(dtype)]
    keys = magnitudes(codes_of, dtype, wide=wide)
    for code, key in zip(codes_of[::7].tolist(), keys[::7].tolist(), strict=True):
        assert code_of(key, dtype, wide=wide) == code
        assert code_of(key + 1, dtype, wide=wide) == code + 1


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "value", [0.0, -0.0, 1e-46, 1e-45, 1e-3, 0.1, 1.0, 1 / 3, 65504.0, 3.4028234e38, 1e39, 1e308]
)
def test_a_key_is_the_smallest_whose_magnitude_reaches_the_value(value: float, wide: bool) -> None:
    key = key_of(value, wide=wide)
    assert value_of(key, wide=wide) >= value
    assert key == 0 or value_of(key - 1, wide=wide) < value


# The k-th smallest


def scored(name: str, dtype: str, codes: np.ndarray, step: int = 5) -> Scored:
    """The scores of a tensor of rows, given a few rows at a time."""

    def blocks(first: int, last: int) -> Iterator[np.ndarray]:
        for row in range(first, last, step):
            yield codes[row : min(row + step, last)]

    return Scored(name, dtype, len(codes), codes.shape[1], blocks)


def cut_by_a_sort(group: list[Scored], wanted: int, wide: bool) -> list[np.ndarray]:
    """What is left of each tensor's codes when the smallest are set to 0, ties by position."""
    codes = [np.concatenate(list(each.blocks(0, each.rows))) for each in group]
    keys = [magnitudes(c, each.dtype, wide=wide).ravel() for c, each in zip(codes, group, strict=True)]
    dead = np.zeros(sum(k.size for k in keys), bool)
    dead[np.argsort(np.concatenate(keys), kind="stable")[:wanted]] = True
    found, start = [], 0
    for each in codes:
        found.append(np.where(dead[start : start + each.size].reshape(each.shape), 0, each))
        start += each.size
    return found


def check_selection(group: list[Scored], sparsity: Decimal, wide: bool) -> None:
    codes = [np.concatenate(list(each.blocks(0, each.rows))) for each in group]
    zeros = sum(int(np.count_nonzero(c == 0)) for c in codes)
    wanted = target_count(sparsity, sum(each.size for each in group), zeros)
    found = select(group, sparsity, wide=wide)
    for each, own, expected in zip(group, codes, cut_by_a_sort(group, wanted, wide), strict=True):
        left = own.copy()
        cut_smallest(left, own, code_of(found.key, each.dtype, wide=wide), found.ties[each.name])
        assert np.array_equal(left, expected)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), wide=st.booleans())
def test_a_selection_is_what_a_sort_gives(data: st.DataObject, wide: bool) -> None:
    names = st.sampled_from([name for name in TORCH if wide or name != "F64"])
    group = []
    for i, dtype in enumerate(data.draw(st.lists(names, min_size=1, max_size=4))):
        storage, top = DTYPES[dtype].storage, infinity(dtype) - 1
        few = st.sampled_from([0, 1, 2, top // 2, top // 2 + 1, top - 1, top])
        shapes = hnp.array_shapes(min_dims=2, max_dims=2, max_side=13)
        codes = data.draw(hnp.arrays(storage, shapes, elements=few | st.integers(0, top)))
        group.append(scored(str(i), dtype, codes))
    sparsity = data.draw(st.sampled_from([Decimal(0), Decimal(1)]) | st.decimals(0, 1, places=3))
    check_selection(group, sparsity, wide)


@pytest.mark.parametrize("kind", ["normal", "all equal", "two values", "sorted", "zeros", "heavy tail"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F8_E4M3"])
def test_a_selection_among_many_needs_few_passes_and_is_exact(dtype: str, kind: str) -> None:
    draw = np.random.default_rng(5)
    values = {
        "normal": draw.standard_normal((1009, 257)),
        "all equal": np.full((1009, 257), 0.5),
        "two values": np.where(draw.random((1009, 257)) < 0.6, 0.25, 2.0),
        "sorted": np.sort(draw.standard_normal(1009 * 257)).reshape(1009, 257),
        "zeros": np.where(draw.random((1009, 257)) < 0.7, 0, draw.standard_normal((1009, 257))),
        "heavy tail": np.exp(8 * draw.standard_normal((1009, 257))).clip(1e-30, 1e30),
    }[kind]
    torch_dtype = TORCH[dtype]
    largest = torch.finfo(torch_dtype).max
    cast = torch.from_numpy(values.clip(-largest, largest)).to(torch_dtype)
    raw = cast.view(getattr(torch, f"int{8 * cast.element_size()}")).numpy().view(DTYPES[dtype].storage)
    codes, passes = ordered(raw, dtype), []

    def blocks(first: int, last: int) -> Iterator[np.ndarray]:
        passes.append(last - first)
        yield codes[first:last]

    counted = Scored("a", dtype, 1009, 257, blocks)
    for sparsity in ("0.5", "0.8", "0.999"):
        check_selection([scored("a", dtype, codes, 100)], Decimal(sparsity), dtype == "F64")
        passes.clear()
        select([counted], Decimal(sparsity), wide=dtype == "F64")
        # Of few bits, a bin has one score, and is not looked into.
        few = kind == "normal" and DTYPES[dtype].bits <= 16 and sparsity != "0.999"
        assert sum(size == 1009 for size in passes) <= (1 if few else 8)


def test_a_selection_among_many_tensors_takes_fewer_bins_and_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lpsparse.pruning.select._HELD", 1000)
    draw = np.random.default_rng(9)
    group = [scored(f"{i:03d}", "F32", draw.integers(0, 1 << 30, (3, 7), np.uint32)) for i in range(120)]
    check_selection(group, Decimal("0.37"), wide=False)


def test_a_selection_among_more_than_2_to_the_24_is_exact() -> None:
    codes = np.random.default_rng(6).integers(0, 3000, (1 << 13, 2100), np.uint32)  # many ties
    found = select([scored("a", "F32", codes, 64)], Decimal("0.7"), wide=False)
    wanted = target_count(Decimal("0.7"), codes.size, 0)
    below = int(np.count_nonzero(codes < found.key))
    assert below < wanted <= below + int(np.count_nonzero(codes == found.key))
    assert below + found.ties["a"] == wanted


@pytest.mark.parametrize(
    ("sparsity", "size", "zeros", "wanted"),
    [
        ("0.29", 100, 0, 29),
        ("0.57", 100, 0, 57),
        ("0.1", 7, 0, 0),
        ("0.7", 10, 0, 7),
        ("0.9", 10**15, 3, 9 * 10**14),
        ("0", 100, 0, 0),
        ("1", 100, 0, 100),
        ("0.5", 91, 46, 46),
        ("0.5", 91, 45, 45),
        ("1e-9999999", 100, 0, 0),
    ],
)
def test_the_target_is_the_floor_of_the_decimal_or_the_zeros_there(
    sparsity: str, size: int, zeros: int, wanted: int
) -> None:
    assert target_count(Decimal(sparsity), size, zeros) == wanted


# Plans on files


def checkpoint_of(folder: Path, arrays: dict[str, np.ndarray]) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    return open_checkpoint(folder)


def planned(source: Checkpoint, **rule: Any) -> Plan:
    """The plan of a step with these settings."""
    step = PruneStep(model="m", out=Path("o"), **rule)
    return plan_prune(source, step, choose(source, step.include, step.exclude))


def apply(plan: Plan, source: Checkpoint) -> dict[str, np.ndarray]:
    """Raw bits of every tensor after the cut."""
    found = {}
    for tensor in source.tensors:
        cut = plan.cut(tensor)
        blocks = cut(tensor.blocks()) if cut else tensor.blocks()
        parts = [block.ravel() for _, block in blocks]
        found[tensor.name] = np.concatenate(parts).reshape(tensor.shape) if parts else tensor.read()
    return found


def zeros(arrays: dict[str, np.ndarray], names: tuple[str, ...] = PRUNABLE) -> int:
    return sum(int(np.count_nonzero(arrays[name] == 0)) for name in names)


@pytest.mark.parametrize("sparsity", ["0", "0.001", "0.29", "0.5", "0.57", "0.999", "1"])
def test_a_global_cut_leaves_exactly_the_floor_of_zeros(sparsity: str, tiny: Path) -> None:
    source = open_checkpoint(tiny)
    plan = planned(source, sparsity=Decimal(sparsity))
    assert zeros(apply(plan, source)) == math.floor(Decimal(sparsity) * PRUNABLE_WEIGHTS)


def test_a_float_from_python_is_read_as_the_decimal_it_shows(tmp_path: Path) -> None:
    save_file({"a.weight": np.arange(1, 101, dtype=np.float32).reshape(10, 10)}, tmp_path / "m.safetensors")
    for sparsity in (0.29, "0.29", Decimal("0.29")):
        out = tmp_path / type(sparsity).__name__
        assert prune(tmp_path / "m.safetensors", out, sparsity=sparsity).prunable.zeros == 29


def test_a_global_cut_takes_the_smallest_of_all_tensors(tiny: Path) -> None:
    source = open_checkpoint(tiny)
    found = apply(planned(source, sparsity=Decimal("0.7")), source)
    every = np.concatenate([np.abs(tiny_arrays()[name].ravel()) for name in PRUNABLE])
    kept = np.concatenate([found[name].ravel() != 0 for name in PRUNABLE])
    assert every[~kept].max() < every[kept].min()


@pytest.mark.parametrize("sparsity", ["0", "0.29", "0.5", "1"])
def test_a_cut_by_tensor_is_exact_in_each(sparsity: str, tiny: Path) -> None:
    source = open_checkpoint(tiny)
    found = apply(planned(source, sparsity=Decimal(sparsity), scope="tensor"), source)
    assert {zeros(found, (name,)) for name in PRUNABLE} == {math.floor(Decimal(sparsity) * 91)}


@pytest.mark.parametrize("sparsity", ["0", "0.29", "0.5", "1"])
def test_a_cut_by_row_is_exact_in_each_and_takes_the_smallest(sparsity: str, tiny: Path) -> None:
    source = open_checkpoint(tiny)
    found = apply(planned(source, sparsity=Decimal(sparsity), scope="row"), source)
    for name in PRUNABLE:
        values = np.abs(tiny_arrays()[name])
        wanted = math.floor(Decimal(sparsity) * values.shape[1])
        expected = np.argsort(values, axis=1, kind="stable")[:, :wanted]
        assert np.array_equal(
            np.sort(expected, axis=1), np.argwhere(found[name] == 0)[:, 1].reshape(len(values), wanted)
        )


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_zeros_already_there_count_and_are_never_fewer(scope: Any, tmp_path: Path) -> None:
    array = np.random.default_rng(7).standard_normal((7, 13)).astype(np.float32)
    array[:, :10] = 0
    source = checkpoint_of(tmp_path / "m", {"a.weight": array})
    assert zeros(apply(planned(source, sparsity=Decimal("0.5"), scope=scope), source), ("a.weight",)) == 70
    more = planned(source, sparsity=Decimal("0.93"), scope=scope)
    assert zeros(apply(more, source), ("a.weight",)) == 84


def test_ties_go_by_tensor_name_then_position(tmp_path: Path) -> None:
    ones = np.ones((7, 13), np.float32)
    source = checkpoint_of(tmp_path / "m", {"b.weight": -ones, "a.weight": ones, "c.weight": ones / 2})
    found = apply(planned(source, sparsity=Decimal("0.4")), source)  # floor(0.4 * 273) = 109 = 91 + 18
    assert zeros(found, ("c.weight",)) == 91
    assert np.array_equal(np.flatnonzero(found["a.weight"] == 0), np.arange(18))
    assert zeros(found, ("b.weight",)) == 0


def test_ties_in_a_row_go_by_position(tmp_path: Path) -> None:
    row = np.arange(1009) % 3 + 1  # long enough for a sort that is not stable to show
    source = checkpoint_of(tmp_path / "m", {"a.weight": np.tile(row, (7, 1)).astype(np.float32)})
    found = apply(planned(source, sparsity=Decimal("0.5"), scope="row"), source)["a.weight"]
    first_twos = np.flatnonzero(row == 2)[: 504 - np.count_nonzero(row == 1)]
    cut = (row == 1) | np.isin(np.arange(1009), first_twos)
    assert np.array_equal(found == 0, np.tile(cut, (7, 1)))


def test_ties_across_blocks_of_rows_are_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = checkpoint_of(tmp_path / "m", {"a.weight": np.ones((13, 7), np.float32)})
    monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", 3 * 7 * 4)
    assert len(list(source.tensors[0].blocks())) == 5
    found = apply(planned(source, sparsity=Decimal("0.5")), source)["a.weight"]
    assert np.array_equal(np.flatnonzero(found == 0), np.arange(45))


@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "tensor"}, {"below": 0.5}])
def test_the_result_does_not_depend_on_the_sharding(
    rule: dict[str, Any], tiny: Path, shards: Path, tmp_path: Path
) -> None:
    prune(tiny, tmp_path / "one", **rule)
    prune(shards, tmp_path / "three", **rule)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {
        name: a for path in (tmp_path / "three").glob("*.safetensors") for name, a in load_file(path).items()
    }
    assert len(list((tmp_path / "three").glob("*.safetensors"))) == 3
    assert whole.keys() == parts.keys()
    assert all(whole[name].tobytes() == parts[name].tobytes() for name in whole)


def test_the_same_tie_is_cut_whatever_the_shard_order(tmp_path: Path) -> None:
    ones = {name: np.ones((7, 13), np.float32) for name in PRUNABLE}
    cut = []
    for folder, names in (("forward", PRUNABLE), ("backward", PRUNABLE[::-1])):
        (tmp_path / folder).mkdir()
        index = {}
        for i, name in enumerate(names):
            save_file({name: ones[name]}, tmp_path / folder / f"{i}.safetensors")
            index[name] = f"{i}.safetensors"
        path = tmp_path / folder / "model.safetensors.index.json"
        path.write_text(str({"weight_map": index}).replace("'", '"'))
        source = open_checkpoint(path)
        cut.append(apply(planned(source, sparsity=Decimal("0.3")), source))
    assert all(np.array_equal(cut[0][name], cut[1][name]) for name in PRUNABLE)


def test_minus_zero_counts_as_zero_and_becomes_plus_zero(tmp_path: Path) -> None:
    array = np.full((7, 13), -0.0, np.float32)
    array[:, 0] = -3
    source = checkpoint_of(tmp_path / "m", {"a.weight": array, "kept.norm.weight": array})
    for rule in ({"sparsity": Decimal("0.5")}, {"sparsity": Decimal("0.5"), "scope": "row"}, {"below": 1e-9}):
        found = apply(planned(source, **rule), source)
        assert np.count_nonzero(found["a.weight"]) == 7  # the bits of -0.0 are not zero, those of +0.0 are
        assert np.array_equal(found["kept.norm.weight"], array.view(np.uint32))


def test_f32_and_f64_tensors_compare_in_one_cut(tmp_path: Path) -> None:
    low = np.linspace(0.001, 0.1, 91).reshape(7, 13)
    source = checkpoint_of(tmp_path / "m", {"a.weight": low.astype(np.float32) + 1, "b.weight": low})
    plan = planned(source, sparsity=Decimal("0.5"))
    assert plan.decided.wide
    assert zeros(apply(plan, source), ("b.weight",)) == 91


def test_the_threshold_reported_is_the_largest_magnitude_cut(tiny: Path) -> None:
    source = open_checkpoint(tiny)
    plan = planned(source, sparsity=Decimal("0.5"))
    every = np.sort(np.concatenate([np.abs(tiny_arrays()[name].ravel()) for name in PRUNABLE]))
    assert plan.threshold == every[PRUNABLE_WEIGHTS // 2 - 1]


# Below a threshold


@pytest.mark.parametrize("dtype", TORCH)
def test_below_cuts_what_is_smaller_and_keeps_what_is_equal(dtype: str, tmp_path: Path) -> None:
    raw = codes(dtype)
    values = np.abs(floats(raw, dtype))
    raw = np.resize(raw[np.isfinite(values)], (7, 13 * 13))
    value = float(np.abs(floats(raw, dtype)[3, 5]))
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": (dtype, list(raw.shape), raw.tobytes())})
    source = open_checkpoint(tmp_path / "m.safetensors")
    for threshold in (value, math.nextafter(value, 0), math.nextafter(value, math.inf)):
        found = apply(planned(source, below=threshold), source)["a.weight"]
        expected = np.where(np.abs(floats(raw, dtype)) < threshold, 0, raw)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(("below", "count"), [(0, 0), (-0.0, 0), (1e-300, 0), (1e39, 91), (1e308, 91)])
def test_below_holds_at_the_ends_of_the_scale(below: float, count: int, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": f32(7, 13)})
    assert (
        prune(tmp_path / "m.safetensors", tmp_path / "out", below=below, allow_empty=True).prunable.zeros
        == count
    )


# The band


def band_arrays(exact_zeros: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A quarter of the weights at 1e-9..1e-7, the others at 1e-2..1: five decades of nothing between."""
    draw = np.random.default_rng(29)
    size, small = 31 * 37, 31 * 37 // 4
    exponents = np.concatenate([draw.uniform(-9, -7, small), draw.uniform(-2, 0, size - small)])
    values = draw.permutation(10.0**exponents * draw.choice([-1, 1], size)).astype(dtype)
    values[np.argsort(np.abs(values))[:exact_zeros]] = 0
    return {"a.weight": values.reshape(31, 37), "lm_head.weight": np.full((7, 13), 1e-5, dtype)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("exact_zeros", [0, 11])  # of 1,147: under 1 %
def test_gap_finds_the_band_and_cuts_inside_it(exact_zeros: int, dtype: Any, tmp_path: Path) -> None:
    arrays = band_arrays(exact_zeros, dtype)
    source = checkpoint_of(tmp_path / "m", arrays)
    plan = planned(source, gap=True)
    every = np.abs(arrays["a.weight"])
    assert plan.band is not None and plan.threshold is not None
    assert (plan.band.low, plan.band.high) == (every[every < 1e-5].max(), every[every > 1e-5].min())
    assert (plan.band.below, plan.band.total) == (31 * 37 // 4, 31 * 37)
    assert plan.threshold == pytest.approx(math.sqrt(plan.band.low * plan.band.high))
    assert zeros(apply(plan, source), ("a.weight",)) == 31 * 37 // 4


def test_gap_counts_exact_zeros_as_lying_below(tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "m", band_arrays(31 * 37 // 4))
    plan = planned(source, gap=True)
    assert plan.band is not None
    assert plan.band.low == 0
    assert plan.band.below == 31 * 37 // 4
    assert zeros(apply(plan, source), ("a.weight",)) == 31 * 37 // 4


def gaussian() -> np.ndarray:
    return np.random.default_rng(31).standard_normal((101, 103)).astype(np.float32)


def scaled_tail(share: float) -> np.ndarray:
    """A Gaussian whose smallest share is five decades smaller."""
    values = gaussian()
    smallest = np.argsort(np.abs(values), axis=None)[: math.ceil(share * values.size)]
    values.reshape(-1)[smallest] *= np.float32(1e-5)
    return values


@pytest.mark.parametrize(
    "values",
    [gaussian(), np.zeros((7, 13), np.float32), np.ones((7, 13), np.float32), scaled_tail(0.005)],
    ids=["gaussian", "all zero", "all one", "too few below"],
)
def test_without_a_band_gap_fails_its_verdict_and_writes_nothing(values: np.ndarray, tmp_path: Path) -> None:
    save_file({"a.weight": values}, tmp_path / "m.safetensors")
    before = tree_hash(tmp_path)
    with pytest.raises(VerdictError) as failed:
        prune(tmp_path / "m.safetensors", tmp_path / "out", gap=True)
    assert (failed.value.code, int(failed.value.exit_code)) == ("LPS101", 1)
    assert tree_hash(tmp_path) == before


def test_a_band_narrower_than_two_decades_is_named_with_its_width(tmp_path: Path) -> None:
    low, high = np.linspace(1, 2, 91), np.linspace(20, 40, 91)
    source = checkpoint_of(tmp_path / "m", {"a.weight": np.stack([low, high]).astype(np.float32)})
    with pytest.raises(VerdictError, match=r"1\.00 decades \(2 to 20\)"):
        planned(source, gap=True)


# Which tensors


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "yes", "reason"),
    [
        ("model.layers.0.mlp.up_proj.weight", "F32", (7, 13), True, "linear"),
        ("features.0.weight", "BF16", (7, 3, 3, 3), True, "convolution"),
        ("encoder.head_mix.weight", "F32", (7, 13), True, "linear"),
        ("model.embed_tokens.weight", "F32", (7, 13), False, "embedding"),
        ("bert.embeddings.word_embeddings.weight", "F32", (7, 13), False, "embedding"),
        ("transformer.wte.weight", "F32", (7, 13), False, "embedding"),
        ("h.0.ln_1.weight", "F32", (7, 13), False, "norm"),
        ("lm_head.weight", "F32", (7, 13), False, "head"),
        ("module.fc.weight", "F32", (7, 13), False, "head"),
        ("_orig_mod.fc.weight", "F32", (7, 13), False, "head"),  # torch.compile
        ("model._orig_mod.fc.weight", "F32", (7, 13), False, "head"),
        ("net.module.score.weight", "F32", (7, 13), False, "head"),  # Lightning
        ("_orig_mod.layers.0._orig_mod.fc.weight", "F32", (7, 13), True, "linear"),
        ("decoder.cls.predictions.transform.dense.weight", "F32", (7, 13), False, "head"),
        ("fc.f6.weight", "F32", (7, 13), False, "head"),  # LeNet's last but one: docs/compress.md
        ("shared.weight", "F32", (7, 13), False, "embedding"),  # T5
        ("model.shared.weight", "F32", (7, 13), False, "embedding"),  # BART
        (
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "F32",
            (7, 13),
            False,
            "position",
        ),
        ("heads.head.weight", "F32", (7, 13), False, "head"),  # torchvision's ViT
        ("linear.weight", "F32", (7, 13), False, "head"),
        ("encoder.0.linear.weight", "F32", (7, 13), True, "linear"),
        ("proj_out.weight", "F32", (7, 13), False, "head"),  # Whisper
        ("transformer.output_layer.weight", "F32", (7, 13), False, "head"),
        ("vocab_projector.weight", "F32", (7, 13), False, "head"),  # DistilBERT
        ("a.bias", "F32", (7,), False, "bias"),
        ("a.weight", "F32", (), False, "scale"),
        ("a.weight", "F32", (0, 7), False, "empty"),
        ("a.weight", "I8", (7, 13), False, "I8 is not a float that can be pruned"),
        ("a.weight", "F4", (7, 14), False, "F4 is not a float that can be pruned"),
    ],
)
def test_names_shapes_and_dtypes_decide_what_is_kept(
    name: str, dtype: str, shape: tuple[int, ...], yes: bool, reason: str
) -> None:
    found = decide([(name, dtype, shape)])[name]
    assert (found.prunable, found.reason) == (yes, reason)


def test_include_names_all_that_may_be_cut_and_exclude_wins(tiny: Path) -> None:
    source = open_checkpoint(tiny)
    include, exclude = ("*.weight", "layers.0.attn.bias"), ("layers.1.*",)
    found = apply(planned(source, sparsity=Decimal(1), include=include, exclude=exclude), source)
    untouched = {name for name, array in tiny_arrays().items() if found[name].tobytes() == array.tobytes()}
    assert untouched == {
        "layers.1.attn.weight",
        "layers.1.mlp.weight",
        "scale",
        "nothing.weight",
        "position_ids",
    }


@pytest.mark.parametrize(("option", "flag"), [("include", "--include"), ("exclude", "--exclude")])
def test_a_pattern_that_matches_nothing_names_the_nearest_tensor(option: str, flag: str, tiny: Path) -> None:
    with pytest.raises(UsageError) as refused:
        prune(tiny, tiny.parent / "out", sparsity=0.5, **{option: "layers.0.atn.weight"})
    assert f"{flag} layers.0.atn.weight" in refused.value.what
    assert refused.value.hint.startswith("nearest tensor: layers.0.attn.weight; see the names with")
    assert not (tiny.parent / "out").exists()


@pytest.mark.parametrize("pattern", ["*mlp*", "*layers.0*"])
def test_names_of_another_architecture_get_a_tensor_of_this_one(pattern: str) -> None:
    bert = ["encoder.layer.0.attention.self.key.weight", "encoder.layer.0.intermediate.dense.weight"]
    for flag in ("--include", "--exclude"):
        assert f"nearest tensor: {bert[0]}; see" in str(no_match(flag, pattern, bert).hint)


def test_when_every_tensor_is_kept_prune_says_so(tiny: Path) -> None:
    with pytest.raises(UsageError) as refused:
        prune(tiny, tiny.parent / "out", sparsity=0.5, exclude="*")
    assert refused.value.code == "LPS211"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"])
def test_nan_or_infinity_in_a_weight_names_the_tensor(value: float, dtype: str, tmp_path: Path) -> None:
    raw = torch.full((7, 13), 0.5)
    raw[3, 5] = raw[4, 4] = value if dtype != "F8_E4M3" else float("nan")
    data = raw.to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": (dtype, [7, 13], data)})
    rules: Iterator[dict[str, Any]] = iter([{"sparsity": Decimal("0.5")}, {"below": 0.5}, {"gap": True}])
    for rule in rules:
        with pytest.raises(InputError, match=r"'a\.weight': 2 values are NaN or Inf"):
            planned(open_checkpoint(tmp_path / "m.safetensors"), **rule)


# Patterns: N:M and blocks


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 7), (4, 8)])
def test_n_of_m_leaves_the_largest_of_each_group_ties_by_position(
    n: int, m: int, dtype: Any, tmp_path: Path
) -> None:
    draw = np.random.default_rng(3)
    array = draw.integers(-3, 4, (13, 56)).astype(dtype)  # ties and zeros
    experts = draw.standard_normal((3, 5, 56)).astype(dtype)
    source = checkpoint_of(tmp_path / "m", {"a.weight": array, "b.experts.weight": experts})
    found = apply(planned(source, n_m=f"{n}:{m}"), source)
    for name, original in (("a.weight", array), ("b.experts.weight", experts)):
        for group, left in zip(original.reshape(-1, m), found[name].reshape(-1, m), strict=True):
            dead = np.argsort(np.abs(group), kind="stable")[: m - n]
            expected = group.copy()
            expected[dead] = 0
            assert np.array_equal(left.view(dtype), expected)


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (1, 7), (4, 1)])
def test_blocks_are_cut_whole_the_smallest_sums_first(
    rows: int, columns: int, scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", 3 * 21 * 4)  # read three rows at a time
    draw = np.random.default_rng(4)
    arrays = {f"{name}.weight": draw.standard_normal((12, 21)).astype(np.float32) for name in "ab"}
    arrays["b.weight"] *= 0.1
    source = checkpoint_of(tmp_path / "m", arrays)
    plan = planned(source, sparsity=Decimal("0.3"), block=f"{rows}x{columns}", scope=scope)
    found = apply(plan, source)

    def sums(array: np.ndarray) -> np.ndarray:
        table = np.abs(array.astype(np.float64)).reshape(12 // rows, rows, 21 // columns, columns)
        return table.sum(axis=(1, 3))

    of = {name: sums(array).ravel() for name, array in arrays.items()}
    dead = {name: sums(found[name].view(np.float32)).ravel() == 0 for name in arrays}
    for name, array in arrays.items():  # what is not cut is as it was
        kept = ~dead[name].reshape(12 // rows, -1).repeat(rows, 0).repeat(columns, 1)
        assert np.array_equal(found[name].view(np.float32), np.where(kept, array, 0))
    groups = [["a.weight", "b.weight"]] if scope == "global" else [["a.weight"], ["b.weight"]]
    for group in groups:
        scores = np.concatenate([of[name] for name in group])
        cut = np.concatenate([dead[name] for name in group])
        assert cut.sum() == math.floor(Decimal("0.3") * scores.size)
        assert scores[cut].max() < scores[~cut].min()


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (8, 1), (1, 16)])
def test_blocks_of_experts_lie_within_one_of_them(rows: int, columns: int, tmp_path: Path) -> None:
    array = np.random.default_rng(8).standard_normal((4, 8, 16)).astype(np.float32)
    source = checkpoint_of(tmp_path / "m", {"experts.weight": array})
    found = apply(planned(source, sparsity=Decimal("0.5"), block=f"{rows}x{columns}"), source)[
        "experts.weight"
    ]
    left = found.view(np.float32).reshape(32 // rows, rows, 16 // columns, columns)
    dead = (left == 0).all(axis=(1, 3))
    assert dead.sum() == dead.size // 2 and np.array_equal((left == 0).any(axis=(1, 3)), dead)


@pytest.mark.parametrize("rule", [{"n_m": "2:4"}, {"sparsity": Decimal("0.5"), "block": "2x13"}])
def test_a_shape_that_a_pattern_does_not_divide_is_named(rule: dict[str, Any], tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"layers.0.attn.weight.*7 rows of 13") as caught:
        planned(open_checkpoint(tiny), **rule)
    assert "--exclude" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"n_m": "4:2"}, "0 < N < M"),
        ({"n_m": 124}, "in quotes"),
        ({"n_m": "x"}, "such as 2:4"),
        ({"n_m": "2:4", "sparsity": 0.5}, "one of"),
        ({"block": "4x", "sparsity": 0.5}, "ROWSxCOLUMNS"),
        ({"block": "2x2"}, "one of"),
        ({"block": "2x2", "sparsity": 0.5, "scope": "row"}, "--block goes"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(options: dict[str, Any], what: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match=what):
        prune(tiny, tiny.parent / "out", **options)
    assert not (tiny.parent / "out").exists()


LONG = [(7, 416), (1, 312), (3, 1248)]  # made of N:M and blocks; of pieces of 8 values


@pytest.mark.parametrize("layout", ["dense", "bitmask"])
@pytest.mark.parametrize(
    "rule",
    [
        {"sparsity": 0.7},
        {"sparsity": 0.7, "scope": "tensor"},
        {"sparsity": 0.7, "scope": "row"},
        {"below": 4.5},
        {"n_m": "3:13"},
        {"n_m": "2:4"},
        {"sparsity": 0.7, "block": "1x26"},
        {"sparsity": 0.7, "block": "7x4", "include": ["0.*", "5.*"]},
    ],
)
def test_rows_that_are_read_in_pieces_are_cut_as_whole_ones(
    rule: dict[str, Any], layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(5)
    arrays = {f"{n}.weight": draw.integers(-9, 9, shape).astype(np.float32) for n, shape in enumerate(LONG)}
    arrays["5.experts.weight"] = draw.standard_normal((3, 14, 52)).astype(np.float16)
    save_file(arrays, tmp_path / "m.safetensors")
    prune(tmp_path / "m.safetensors", tmp_path / "whole", **rule, layout=layout, allow_empty=True)
    for piece_bytes in (40 * 4, 104 * 4):
        monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", piece_bytes)
        out = tmp_path / str(piece_bytes)
        assert open_checkpoint(tmp_path / "m.safetensors").tensors[0].grid[0] > LONG[0][0]
        prune(tmp_path / "m.safetensors", out, **rule, layout=layout, allow_empty=True)
        assert tree_hash(out) == tree_hash(tmp_path / "whole")
        unpack(out, tmp_path / f"{piece_bytes}-dense")
        dense = {tensor.name: tensor for tensor in open_checkpoint(tmp_path / f"{piece_bytes}-dense").tensors}
        for tensor in open_checkpoint(out).tensors:
            assert np.array_equal(tensor.read(), dense[tensor.name].read())


def test_a_row_of_many_megabytes_takes_no_more_memory_than_rows_of_few(tmp_path: Path) -> None:
    draw = np.random.default_rng(6).standard_normal((1, 1 << 24), np.float32)  # 64 MiB
    save_file({"a.weight": draw}, tmp_path / "m.safetensors")
    source = tmp_path / "m.safetensors"
    for n, rule in enumerate([{"sparsity": 0.5}, {"sparsity": 0.5, "scope": "row"}, {"n_m": "2:4"}]):
        options: dict[str, Any] = {**rule, "threads": 1}
        assert peak_of(partial(prune, source, tmp_path / str(n), **options)) < 24 << 20


@pytest.mark.parametrize(
    "rule",
    [
        {"sparsity": 0.5},
        {"sparsity": 0.5, "scope": "tensor"},
        {"sparsity": 0.5, "scope": "row"},
        {"below": 0.5},
        {"n_m": "3:13", "include": ["*attn.weight"]},
        {"sparsity": 0.5, "block": "7x1"},
    ],
)
def test_the_result_does_not_depend_on_the_threads(
    rule: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    given = {"exclude": ["*mlp*"], **rule} if "block" in rule else rule
    for threads in (1, 2, 5):
        prune(shards, tmp_path / str(threads), **given, threads=threads)
    assert tree_hash(tmp_path / "1") == tree_hash(tmp_path / "2") == tree_hash(tmp_path / "5")
