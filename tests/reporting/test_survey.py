"""What one look at every value tells, against plain numpy on the same values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.files import Given, write_safetensors

from lpsparse import prune, report
from lpsparse.checkpoint.dtypes import DTYPES
from lpsparse.checkpoint.manifest import Quality
from lpsparse.errors import InputError, UsageError
from lpsparse.pruning.targets import decide
from lpsparse.reporting.budgets.check import check_baseline, check_budgets
from lpsparse.reporting.records import KINDS, Bytes, Detail, Identity, Report, Share, TensorRow, kind_of
from lpsparse.reporting.survey import N_M
from lpsparse.steps.report import ReportStep
from lpsparse.steps.resolve import resolve

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


def bits_of(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any bit patterns: NaN, Inf, subnormal values and zeros of both signs among them."""
    kind = DTYPES[dtype].storage
    draw = np.random.default_rng(seed)
    raw = draw.integers(0, 1 << (8 * kind.itemsize), shape, np.uint64).astype(kind)
    raw[draw.random(shape) < 0.5] = 0
    raw[draw.random(shape) < 0.1] = 1 << (8 * kind.itemsize - 1)  # -0
    return raw


def values_of(raw: np.ndarray, dtype: str) -> np.ndarray:
    """float64, by a way of its own."""
    import torch

    names = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
    signed = torch.from_numpy(raw.copy().view(f"i{raw.itemsize}"))
    return signed.view(names[dtype]).to(torch.float64).numpy()


def rows_of(tmp_path: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> dict[str, TensorRow]:
    given: dict[str, Given] = {
        name: (dtype, list(raw.shape), raw.tobytes()) for name, (dtype, raw) in tensors.items()
    }
    write_safetensors(tmp_path / "m.safetensors", given)
    return {row.name: row for row in report(tmp_path / "m.safetensors").tensors}


def detail_of(tmp_path: Path, dtype: str, raw: np.ndarray) -> Detail:
    found = rows_of(tmp_path, {"a.weight": (dtype, raw)})["a.weight"].detail
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_and_extremes_are_those_of_the_values(dtype: str, tmp_path: Path) -> None:
    raw = bits_of(dtype, (53, 48))
    values = values_of(raw, dtype)
    found = detail_of(tmp_path, dtype, raw)
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    assert found.negative_zeros == np.count_nonzero((values == 0) & np.signbit(values)) > 0
    assert (found.nan, found.inf) == (np.isnan(values).sum(), np.isinf(values).sum())
    assert (found.smallest, found.largest) == (finite.min(), finite.max())


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_histogram_counts_every_finite_value_at_its_power_of_two(dtype: str, tmp_path: Path) -> None:
    raw = bits_of(dtype, (53, 48))
    values = values_of(raw, dtype)
    found = detail_of(tmp_path, dtype, raw)
    finite = np.abs(values[np.isfinite(values) & (values != 0)])
    powers = np.floor(np.log2(finite)).astype(int)
    least = powers.max() - len(found.histogram.counts) + 1
    expected = np.bincount(np.maximum(powers, found.histogram.first) - least)  # subnormal ones in one bin
    assert list(found.histogram.counts) == expected.tolist()
    near = np.count_nonzero(powers < powers.max() - 10)
    assert found.near_zero == near or found.subnormal > 0


@pytest.mark.parametrize("shape", [(64, 48), (33, 16), (16, 7), (5, 8, 3, 3), (300, 20), (1, 4)])
def test_patterns_of_zeros_are_those_of_the_values(shape: tuple[int, ...], tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    values = draw.standard_normal(shape).astype(np.float32)
    table = values.reshape(shape[0], -1)
    table[draw.random(table.shape) < 0.6] = 0
    table[::3] = 0
    table[:, ::5] = 0
    table[: shape[0] // 16 * 16 // 2] *= 0
    found = detail_of(tmp_path, "F32", values)
    kept = table != 0
    assert found.empty["rows"] == (int((~kept.any(axis=1)).sum()), shape[0])
    assert found.empty["columns"] == (int((~kept.any(axis=0)).sum()), table.shape[1])
    for name, most in N_M.items():
        size = int(name[2:])
        if table.shape[1] % size:
            assert name not in found.n_m
        else:
            groups = kept.reshape(-1, size).sum(axis=1)
            assert found.n_m[name] == (int((groups <= most).sum()), groups.size)


@pytest.mark.parametrize(("rows", "width"), [(64, 48), (70, 32), (4, 4), (1000, 16)])
def test_empty_blocks_are_counted_where_rows_and_columns_have_whole_ones(
    rows: int, width: int, tmp_path: Path
) -> None:
    draw = np.random.default_rng(1)
    values = (draw.random((rows, width)) < 0.02).astype(np.float32)
    found = detail_of(tmp_path, "F32", values)
    for side in (4, 16):
        if width % side == 0 and rows >= side:
            whole = values[: rows // side * side].reshape(rows // side, side, width // side, side)
            empty = ~whole.any(axis=(1, 3))
            assert found.empty[f"blocks {side}x{side}"] == (int(empty.sum()), empty.size)


def test_a_tensor_of_many_blocks_and_threads_is_counted_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = bits_of("BF16", (331, 64))
    whole = detail_of(tmp_path, "BF16", raw)
    monkeypatch.setattr("lpsparse.checkpoint.tensors.BLOCK_BYTES", 1000)
    monkeypatch.setattr("lpsparse.reporting.survey._TASK_BYTES", 5000)
    assert detail_of(tmp_path, "BF16", raw) == whole


def test_heads_are_counted_by_the_configuration(tmp_path: Path) -> None:
    values = np.ones((24, 8), np.float32)
    values[8:16] = 0
    out = np.ones((8, 24), np.float32)
    out[:, :8] = 0
    given = {"a.q_proj.weight": values, "a.o_proj.weight": out, "mlp.up_proj.weight": values}
    write_safetensors(
        tmp_path / "model.safetensors",
        {name: ("F32", list(each.shape), each.tobytes()) for name, each in given.items()},
    )
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 24, "num_attention_heads": 3}))
    heads = {row.name: row.detail.empty.get("heads") for row in report(tmp_path).tensors if row.detail}
    assert heads == {"a.q_proj.weight": (1, 3), "a.o_proj.weight": (1, 3), "mlp.up_proj.weight": None}


@pytest.mark.parametrize(
    "config", ["", "[]", "{", '{"head_dim": -1}', '{"head_dim": 1e9}', '{"text_config": 7}', "[" * 9999]
)
def test_a_broken_configuration_costs_the_heads_alone(config: str, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"q_proj.weight": ("F32", [2, 4], bytes(32))})
    (tmp_path / "config.json").write_text(config)
    assert report(tmp_path).prunable.zeros == 8


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("encoder.layer.0.attention.self.query.weight", "attention q"),
        ("encoder.layer.0.attention.output.dense.weight", "attention out"),
        ("encoder.layer.0.output.dense.weight", "mlp"),
        ("encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("pooler.dense.weight", "pooler"),
        ("embeddings.word_embeddings.weight", "embedding"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.o_proj.weight", "attention out"),
        ("lm_head.weight", "head"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("h.0.attn.c_attn.weight", "attention q, k, v"),
        ("h.0.attn.c_proj.weight", "attention out"),
        ("h.0.mlp.c_proj.weight", "mlp"),
        ("wte.weight", "embedding"),
        ("h.0.ln_1.weight", "norm"),
        ("h.0.mlp.c_fc.bias", "bias"),
        ("layer1.0.conv1.weight", "convolution"),
        ("layer1.0.bn1.weight", "norm"),
        ("fc.weight", "head"),
        ("layers.0.feed_forward.w1.weight", "mlp"),
        ("layers.0.attention.wq.weight", "attention q"),
        ("model.layers.1.mlp.experts.gate_up_proj", "mlp"),
        ("x", "other"),
        ("a" * 1_000_000, "other"),
    ],
)
def test_layer_types_follow_from_usual_names(name: str, kind: str) -> None:
    assert kind_of(name, (7, 13)) == kind and kind in KINDS


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "module.model.lm_head.weight",
        "classifier.fc1.weight",
        "score.weight",
        "cls.predictions.decoder.weight",
        "linear.weight",
        "vocab_projector.weight",
        "layers.3.fc.weight",
        "pooler.dense.weight",
        "bert.pooler.dense.weight",
        "model.head.weight",
        "model.scorer.weight",
        "_orig_mod.fc.weight",
        "net._orig_mod.head.weight",
        "decoder.cls.predictions.decoder.weight",
    ],
)
def test_a_head_is_what_pruning_keeps_as_one(name: str) -> None:
    kept_as_head = decide([(name, "F32", (7, 13))])[name].reason == "head"
    assert (kind_of(name, (7, 13)) in ("head", "pooler")) == kept_as_head


def test_the_report_of_a_packed_checkpoint_is_that_of_the_dense_one(tiny: Path, tmp_path: Path) -> None:
    from lpsparse import pack

    prune(tiny, tmp_path / "sparse", sparsity=0.5)
    pack(tmp_path / "sparse", tmp_path / "packed")
    one, two = (report(tmp_path / name) for name in ("sparse", "packed"))
    assert [row.detail for row in one.tensors] == [row.detail for row in two.tensors]
    assert (one.n_m, one.empty, one.histogram) == (two.n_m, two.empty, two.histogram)


# Beside BASE


def test_changes_say_what_was_cut_at_which_magnitude(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    found = report(tmp_path / "out", tiny)
    changes = [row.change for row in found.tensors if row.prunable]
    assert sum(each.cut for each in changes if each) == found.prunable.zeros
    assert {(each.revived, each.changed) for each in changes if each} == {(0, 0)}
    highest = max(each.largest_cut or 0 for each in changes if each)
    assert highest < min(each.smallest_kept or 9 for each in changes if each)
    assert found.base is not None and found.base.is_source


@pytest.mark.parametrize(
    ("dtype", "other"), [("F32", "F32"), ("BF16", "F32"), ("F16", "F16"), ("F64", "F64")]
)
def test_changes_are_those_of_the_values(dtype: str, other: str, tmp_path: Path) -> None:
    import torch

    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(53, 48, generator=draw, dtype=torch.float64).to(names[other])
    base[::7] = 0
    ours = (base.double() * (1 + 0.1 * torch.randn(53, 48, generator=draw))).to(names[dtype])
    ours[::3] = 0
    ours[7] = 5
    for name, each, kind in (("o", ours, dtype), ("b", base, other)):
        raw = each.contiguous().view(torch.uint8).numpy().tobytes()
        write_safetensors(tmp_path / f"{name}.safetensors", {"a.weight": (kind, [53, 48], raw)})
    found = report(tmp_path / "o.safetensors", tmp_path / "b.safetensors").tensors[0].change
    assert found is not None
    one, two = ours.double(), base.double()
    both = (one != 0) & (two != 0)
    moved = ((one - two).abs() * both).max()
    assert found.cut == int(((one == 0) & (two != 0)).sum())
    assert found.revived == int(((one != 0) & (two == 0)).sum()) == 48
    assert found.changed == int((both & (one != two)).sum())
    assert found.largest_change == pytest.approx(float(moved))
    assert found.at is not None and float(one.reshape(-1)[found.at]) == found.after
    assert found.distance == pytest.approx(float((one - two).norm() / two.norm()), rel=1e-5)


def test_a_base_of_other_tensors_is_refused(tiny: Path, tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"other.weight": ("F32", [2, 2], bytes(16))})
    with pytest.raises(InputError, match="not comparable"):
        report(tiny, tmp_path / "m.safetensors")


def test_a_base_that_it_was_not_made_from_is_said_to_be_no_source(tiny: Path, tmp_path: Path) -> None:
    from support.files import write_tiny

    prune(tiny, tmp_path / "out", sparsity=0.5)
    found = report(tmp_path / "out", write_tiny(tmp_path / "seed1", seed=1))
    assert found.base is not None and not found.base.is_source


def test_singular_values_are_there_on_request(tiny: Path) -> None:
    from safetensors.numpy import load_file

    rows = {row.name: row.spectrum for row in report(tiny, spectra=True).tensors}
    values = np.linalg.svd(load_file(tiny / "model.safetensors")["layers.0.mlp.weight"], compute_uv=False)
    found = rows["layers.0.mlp.weight"]
    assert found is not None and rows["embed_tokens.weight"] is None
    assert (found.largest, found.smallest) == pytest.approx((values[0], values[-1]), rel=1e-5)
    assert found.condition == pytest.approx(values[0] / values[-1], rel=1e-4)


# Budgets


@pytest.mark.parametrize(
    ("options", "passed", "value"),
    [
        ({"min_sparsity": "0.5"}, True, 0.5),
        ({"min_sparsity": ["*attn*=0.9"]}, False, None),
        ({"max_bytes": "1MB"}, True, None),
        ({"max_bytes": "1kB"}, False, None),
        ({"max_bytes": "*mlp*=1.5KiB"}, True, 2 * 7 * 13 * 4),
        ({"max_layer_sparsity": 0.9}, True, None),
        ({"max_layer_sparsity": "layers.0.*=0.01"}, False, None),
        ({"min_nm": "2:4=1"}, False, None),
        ({"max_quality_drop": "1%"}, False, None),
        ({"min_sparsity": 0.9, "warn": "min-sparsity"}, True, None),
    ],
)
def test_a_budget_has_a_value_a_margin_and_a_verdict(
    options: dict[str, Any], passed: bool, value: float | None, tiny: Path, tmp_path: Path
) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    found = report(tmp_path / "out", **options)
    (budget,) = found.budgets
    assert found.passed == passed
    assert value is None or budget.value == pytest.approx(value)
    assert budget.margin is None or (budget.margin >= 0) == budget.passed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"min_sparsity": "1.5"}, (204, "0.8")),
        ({"min_sparsity": "180%"}, (204, "0.8")),
        ({"max_bytes": "-1"}, (204, "20MB")),
        ({"max_bytes": "2 parsecs"}, (204, "20MB")),
        ({"max_quality_drop": "x=1"}, (204, "GLOB")),
        ({"min_nm": "3:5=1"}, (204, "1:4, 2:4, 4:8")),
        ({"min_nm": "2:4"}, (204, "1:4, 2:4, 4:8")),
        ({"warn": "min-sparsty"}, (204, "min-sparsity?")),
        ({"min_sparsity": "zzz*=0.5"}, (290, "zzz*=0.5")),
        ({"min_sparsity": "nan"}, (204, "0.8")),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(
    options: dict[str, Any], expected: tuple[int, str], tiny: Path
) -> None:
    with pytest.raises(UsageError) as refused:
        report(tiny, **options)
    assert refused.value.code == f"LPS{expected[0]}"
    assert next(iter(options)).replace("_", "-") in str(refused.value) or expected[0] == 290
    assert expected[1] in str(refused.value)


# Reports that were written, and baselines


def test_a_written_report_is_read_back_the_same(tiny: Path, tmp_path: Path, cli: Any) -> None:
    assert cli("report", tiny, "--json", tmp_path / "r.json").rc == 0
    assert report(tmp_path / "r.json") == report(tiny)
    assert not report(tmp_path / "r.json", min_sparsity=0.5).passed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"schema_version": 99}', "upgrade|schema_version"),
        ('{"schema_version": 1', "not valid JSON"),
        ('{"schema_version": 1, "x": NaN}', "NaN is no JSON"),
        ("[]", "schema_version"),
        ("", "not valid"),
        ('{"schema_version": 1}', "model"),
        ("[" * 9999, "nested"),
        ('{"a": 1, "a": 2}', "duplicate"),
    ],
)
def test_a_report_that_is_broken_or_newer_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputError, match=words):
        report(tmp_path / "r.json")


def test_a_written_report_is_not_measured_anew(tiny: Path, tmp_path: Path, cli: Any) -> None:
    cli("report", tiny, "--json", tmp_path / "r.json")
    with pytest.raises(UsageError, match="--spectra") as refused:
        report(tmp_path / "r.json", spectra=True)
    assert refused.value.code == "LPS291"


def test_a_baseline_makes_budgets_of_what_it_was(tiny: Path, tmp_path: Path, cli: Any) -> None:
    for name, sparsity in (("a", 0.5), ("b", 0.6)):
        prune(tiny, tmp_path / name, sparsity=sparsity)
    assert cli("report", tmp_path / "b", "--json", tmp_path / "b.json").rc == 0
    worse = report(tmp_path / "a", baseline=tmp_path / "b.json")
    assert [each.name for each in worse.budgets if not each.passed] == ["sparsity of baseline"]
    assert report(tmp_path / "b", baseline=tmp_path / "b.json").passed
    assert report(tmp_path / "a", baseline=tmp_path / "b.json", max_regression=0.2).passed
    assert report(tmp_path / "a", baseline=tmp_path / "b.json", warn="baseline").passed


def test_a_baseline_of_another_model_or_another_count_is_refused(
    tiny: Path, tmp_path: Path, cli: Any
) -> None:
    from support.files import write_tiny

    prune(tiny, tmp_path / "a", sparsity=0.5)
    prune(write_tiny(tmp_path / "other", seed=1), tmp_path / "b", sparsity=0.5)
    cli("report", tmp_path / "b", "--json", tmp_path / "b.json")
    with pytest.raises(InputError, match=r"sha256 .{12}") as refused:
        report(tmp_path / "a", baseline=tmp_path / "b.json")
    assert refused.value.code == "LPS354"
    cli("report", tmp_path / "a", "--include", "*mlp*", "--json", tmp_path / "a.json")
    with pytest.raises(InputError, match="182 weights") as refused:
        report(tmp_path / "a", baseline=tmp_path / "a.json")
    assert refused.value.code == "LPS354"


# Verdicts that must not be given


def with_quality(before: float, after: float, **more: Any) -> Report:
    share = Share(of="all weights", weights=10, zeros=5, sparsity=0.5)
    held = Bytes(file_bytes=9, dense_bytes=40, zero_bytes=20, zero_share=0.5, bitmask_bytes=9)
    quality = Quality(
        metric="accuracy", before=before, after=after, higher_is_better=True, rows=9, split="dev", **more
    )
    return Report(
        model="m",
        layout="dense",
        opens_with="",
        rule="",
        prunable=share,
        all=share,
        bytes=held,
        tensors=(),
        nonfinite_tensors=(),
        quality=(quality,),
        identity=Identity(base_sha256=None, prunable_sha256="x"),
    )


def asked(**budgets: Any) -> ReportStep:
    return resolve(ReportStep, {"model": "m", **budgets})


@pytest.mark.parametrize(("after", "limit"), [(0.89, "0.01"), (0.882, "2%"), (0.91, "0")])
def test_a_quality_budget_that_is_met_exactly_passes(after: float, limit: str) -> None:
    (budget,) = check_budgets(with_quality(0.9, after), asked(max_quality_drop=limit)).budgets
    assert budget.passed and budget.margin is not None and budget.margin >= 0
    assert budget.relative == limit.endswith("%")


def test_groups_met_exactly_pass_and_tensors_without_groups_meet_none(tmp_path: Path) -> None:
    values = np.ones((10, 4), np.float32)
    values[:7, 2:] = 0
    rows = {"a.weight": values, "b.weight": np.ones((2, 7), np.float32)}
    for names, passed in (("a", True), ("ab", False)):
        given: dict[str, Given] = {
            f"{name}.weight": ("F32", list(rows[f"{name}.weight"].shape), rows[f"{name}.weight"].tobytes())
            for name in names
        }
        write_safetensors(tmp_path / "m.safetensors", given)
        found = report(tmp_path / "m.safetensors", min_nm="2:4=0.7")
        assert found.passed == passed and found.budgets[0].worst == ("a.weight" if passed else "b.weight")


@pytest.mark.parametrize(
    "options", [{"min_sparsity": 0.8}, {"max_layer_sparsity": 0.5}, {"min_nm": "2:4=0.1"}]
)
def test_a_budget_of_nothing_fails(options: dict[str, Any], tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a.bias": ("F32", [4], bytes(16))})
    found = report(tmp_path / "m.safetensors", **options)
    assert not found.passed and found.budgets[0].value is None


def test_a_budget_on_a_few_weights_is_not_met_by_no_zero(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a.bias": ("F32", [1], b"\0\0\x80\x3f")})
    assert not report(tmp_path / "m.safetensors", min_sparsity="*.bias=0.9").passed


def test_a_quality_that_only_the_baseline_has_fails(tmp_path: Path) -> None:
    mine = with_quality(0.9, 0.9).model_copy(update={"quality": ()})
    found = check_baseline(mine, with_quality(0.9, 0.9), asked(baseline="b.json"))
    assert [each.name for each in found.budgets if not each.passed] == ["accuracy of baseline"]


def test_budgets_of_a_baseline_have_its_own_figures() -> None:
    theirs = with_quality(0.9, 0.8)
    found = check_baseline(with_quality(0.9, 0.9), theirs, asked(baseline="b.json", max_regression="0.5"))
    own = {each.name: (each.baseline, each.limit) for each in found.budgets}
    assert own["accuracy of baseline"] == (0.8, 0.4)
    sizes = theirs.bytes.file_bytes, theirs.prunable.sparsity
    assert (own["bytes of baseline"][0], own["sparsity of baseline"][0]) == sizes


def test_weights_that_are_not_finite_fail_where_there_is_a_budget(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", {"a.weight": ("F32", [2, 2], b"\0\0\xc0\x7f" * 4)})
    assert report(tmp_path / "m.safetensors").passed
    found = report(tmp_path / "m.safetensors", max_bytes="1MB")
    assert [(each.name, each.passed) for each in found.budgets] == [("finite", False), ("max-bytes", True)]
    assert report(tmp_path / "m.safetensors", max_bytes="1MB", warn="finite").passed


def test_the_baseline_is_not_written_over(tiny: Path, tmp_path: Path, cli: Any) -> None:
    cli("report", tiny, "--json", tmp_path / "b.json")
    before = (tmp_path / "b.json").read_bytes()
    assert cli("report", tiny, "--baseline", tmp_path / "b.json", "--json", tmp_path / "b.json").rc == 4
    assert (tmp_path / "b.json").read_bytes() == before


def test_a_report_of_a_dry_run_is_of_no_model(tiny: Path, tmp_path: Path, cli: Any) -> None:
    told = cli("prune", tiny, tmp_path / "out", "--sparsity", "0.9", "--dry-run", "--json").stdout
    (tmp_path / "dry.json").write_text(told)
    assert cli("report", tmp_path / "dry.json", "--min-sparsity", "0.8").rc == 3


def test_base_is_counted_over_the_same_weights(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5, exclude=["*mlp*"])
    found = report(tmp_path / "out", tiny)
    assert found.base is not None and found.base.prunable.weights == found.prunable.weights


def test_rows_of_other_lengths_in_lines_are_compared(tmp_path: Path) -> None:
    shape, values = [2, 1572864], np.ones(2 * 1572864)
    for name, dtype, kind in (("o", "F16", np.float16), ("b", "F32", np.float32)):
        write_safetensors(
            tmp_path / f"{name}.safetensors", {"a.weight": (dtype, shape, values.astype(kind).tobytes())}
        )
    found = report(tmp_path / "o.safetensors", tmp_path / "b.safetensors").tensors[0].change
    assert found is not None and (found.cut, found.changed, found.distance) == (0, 0, 0)


@pytest.mark.parametrize("base", [[np.nan, 1, 2, 3], [0, 0, 0, 0]])
def test_changes_from_what_has_no_size_have_no_distance(base: list[float], tmp_path: Path) -> None:
    for name, values in (("o", [0, 5, 6, 7]), ("b", base)):
        raw = np.array(values, np.float32).tobytes()
        write_safetensors(tmp_path / f"{name}.safetensors", {"a.weight": ("F32", [1, 4], raw)})
    found = report(tmp_path / "o.safetensors", tmp_path / "b.safetensors").tensors[0].change
    assert found is not None and found.distance is None and found.largest_cut is None


@pytest.mark.parametrize(
    "change",
    [
        {"n_m": {"2:4": [1, 0]}},
        {"histogram": {"first": 10**9, "counts": [1]}},
        {"empty": {"rows": [3, 2]}},
        {"histogram": {"first": 0, "counts": [1] * 3000}},
    ],
)
def test_a_report_with_impossible_figures_is_refused(
    change: dict[str, Any], tiny: Path, tmp_path: Path, cli: Any
) -> None:
    table = json.loads(cli("report", tiny, "--json", "-").stdout) | change
    (tmp_path / "r.json").write_text(json.dumps(table))
    with pytest.raises(InputError):
        report(tmp_path / "r.json")
