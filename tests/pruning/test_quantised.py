"""Quantised checkpoints cannot be pruned: method and tensors named. What can be cut is said of each kind."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.cli import Ran
from support.files import PRUNABLE, Given, f32, write_safetensors, write_tiny

import lpsparse
from lpsparse import pack, prune
from lpsparse.checkpoint.manifest import read_manifest
from lpsparse.errors import InputError

NAME = "layers.0.mlp"
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4}}


def of(dtype: str, *shape: int) -> Given:
    bits = {"F4": 4, "BF16": 16, "F16": 16, "I32": 32, "I64": 64, "F64": 64, "F32": 32}.get(dtype, 8)
    values = 1
    for size in shape:
        values *= size
    return dtype, list(shape), b"\x11" * (values * bits // 8)


QUANTISED: dict[str, tuple[dict[str, Given], str]] = {
    "gptq": (
        {
            ".qweight": of("I32", 2, 13),
            ".qzeros": of("I32", 1, 2),
            ".scales": of("F16", 7, 13),
            ".g_idx": of("I32", 14),
        },
        "GPTQ or AWQ",
    ),
    "bitsandbytes nf4": (
        {
            ".weight": of("U8", 91, 1),
            ".weight.absmax": of("F32", 3),
            ".weight.quant_state.bitsandbytes__nf4": of("U8", 80),
        },
        "bitsandbytes",
    ),
    "bitsandbytes int8": ({".weight": of("I8", 7, 13), ".SCB": of("F32", 7)}, "bitsandbytes"),
    "packed": (
        {".weight_packed": of("I32", 7, 2), ".weight_scale": of("BF16", 7, 2), ".weight_shape": of("I64", 2)},
        "compressed-tensors",
    ),
    "int8": ({".weight": of("I8", 7, 13), ".weight_scale": of("BF16", 7, 1)}, "compressed-tensors"),
    "fp8": ({".weight": of("F8_E4M3", 7, 13), ".weight_scale": of("F32", 1)}, "compressed-tensors"),
    "fp8 blocks": ({".weight": of("F8_E4M3", 7, 13), ".weight_scale_inv": of("F32", 1, 2)}, "fp8"),
    "scaled fp8": ({".weight": of("F8_E4M3", 7, 13), ".scale_weight": of("F32", 1)}, "scaled fp8"),
    "mxfp4": ({".experts_blocks": of("U8", 2, 7, 16), ".experts_scales": of("U8", 2, 7)}, "MXFP4"),
}


@pytest.mark.parametrize(("tensors", "method"), QUANTISED.values(), ids=QUANTISED.keys())
def test_a_quantised_layout_is_refused_by_method_and_tensor_and_still_packed(
    tensors: dict[str, Given], method: str, tmp_path: Path
) -> None:
    given = {NAME + ending: value for ending, value in tensors.items()} | {"other.weight": f32(7, 13)}
    model = write_safetensors(tmp_path / "m.safetensors", given)
    with pytest.raises(InputError, match=method) as refused:
        prune(model, tmp_path / "out", sparsity=0.5)
    assert NAME in refused.value.what and sorted(tmp_path.iterdir()) == [model]
    pack(model, tmp_path / "out")
    rows = {row.name: row for row in lpsparse.report(tmp_path / "out").tensors}
    assert [name for name, row in rows.items() if row.prunable] == ["other.weight"]
    assert sum(method in row.reason for row in rows.values()) == 2
    assert lpsparse.inspect(model)["prunable_weights"] == 91


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (GPTQ, "(gptq)"),
        ({"text_config": GPTQ}, "(gptq)"),
        ({"quantization_config": {"load_in_8bit": True}}, "(by its config.json)"),
        ({"quantization_config": {"quant_method": ["x"]}}, "(by its config.json)"),
        ({"quantization_config": "awq"}, "(by its config.json)"),
    ],
)
def test_a_config_that_says_quantised_is_believed(config: Any, method: str, tiny: Path, cli: Any) -> None:
    (tiny / "config.json").write_text(json.dumps(config))
    prune(tiny, tiny.parent / "plain", sparsity=0.5)  # of values that stand for themselves it says nothing
    shutil.rmtree(tiny.parent / "plain")
    packed = {**load_file(tiny / "model.safetensors"), "w": np.ones((7, 13), np.int8)}
    save_file(packed, tiny / "model.safetensors")
    ran: Ran = cli("prune", tiny, tiny.parent / "out", "--sparsity", "0.5")
    assert ran.rc == 3 and f"tiny: is quantised {method}" in ran.stderr
    assert len(ran.stderr.splitlines()) == 2
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]
    assert cli("report", tiny).rc == cli("inspect", tiny).rc == cli("pack", tiny, tiny.parent / "o").rc == 0


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"quantization_config": null}',
        b'{"quantization_config": {}}',
        b'{"text_config": [1, null]}',
    ],
    ids=lambda config: config[:30].decode(errors="replace"),
)
def test_a_config_that_says_nothing_is_carried_as_it_is(config: bytes, tiny: Path) -> None:
    (tiny / "config.json").write_bytes(config)
    prune(tiny, tiny.parent / "out", sparsity=0.5)
    assert (tiny.parent / "out" / "config.json").read_bytes() == config


def test_float8_without_scales_is_pruned(tmp_path: Path) -> None:
    given = {"a.weight": of("F8_E4M3", 7, 13), "b.weight": of("F8_E5M2", 7, 13), "b.weight_scale": f32(7, 13)}
    model = write_safetensors(tmp_path / "m.safetensors", {"a.weight": given["a.weight"]})
    assert prune(model, tmp_path / "out", sparsity=1, allow_empty=True).prunable.zeros == 91
    model = write_safetensors(tmp_path / "n.safetensors", given)
    with pytest.raises(InputError, match=r"b\.weight, b\.weight_scale"):
        prune(model, tmp_path / "other", sparsity=1)


def test_finetune_refuses_a_quantised_state_dict_before_it_trains(tmp_path: Path) -> None:
    given = {"a.qweight": of("I32", 7, 13), "a.scales": of("F16", 7, 13)}
    model = write_safetensors(tmp_path / "m.safetensors", given)
    with pytest.raises(InputError, match=r"a\.qweight, a\.scales"):
        lpsparse.finetune(model, tmp_path / "out", data="bundled:shakespeare", task="causal-lm")


KINDS: dict[str, tuple[Given, bool, str]] = {
    "a.weight": (of("F32", 7, 13), True, "linear"),
    "experts.weight": (of("F8_E5M2", 2, 7, 13), True, "linear"),
    "conv.weight": (of("BF16", 2, 3, 3, 3), True, "convolution"),
    "ids": (of("I64", 7, 13), False, "I64 is not a float that can be pruned"),
    "mask": (of("BOOL", 7, 13), False, "BOOL is not a float that can be pruned"),
    "four.weight": (of("F4", 6, 2), False, "F4 is not a float that can be pruned"),
    "eight.weight": (of("F8_E8M0", 7, 13), False, "F8_E8M0 is not a float that can be pruned"),
    "empty.weight": (of("F32", 0, 7), False, "empty"),
    "a.bias": (of("F32", 13), False, "bias"),
    "scale": (of("F64"), False, "scale"),
    "embed_tokens.weight": (of("F32", 7, 13), False, "embedding"),
    "norm.weight": (of("F32", 7, 13), False, "norm"),
    "lm_head.weight": (of("F16", 7, 13), False, "head"),
    "b.weight": (of("F32", 7, 13), False, "--exclude"),
    "q.qweight": (of("I32", 7, 13), False, "quantised (GPTQ or AWQ)"),
    "q.scales": (of("F16", 7, 13), False, "quantised (GPTQ or AWQ)"),
}


def test_the_manifest_says_of_every_kind_whether_it_is_prunable_and_why(tmp_path: Path) -> None:
    tensors = {name: given for name, (given, _, _) in KINDS.items() if not name.startswith("q.")}
    model = write_safetensors(tmp_path / "m.safetensors", tensors)
    prune(model, tmp_path / "out", sparsity=0.5, exclude="b.*", allow_empty=True)
    said = {each.name: (each.prunable, each.reason) for each in read_manifest(tmp_path / "out").tensors}
    assert said == {name: KINDS[name][1:] for name in tensors}
    model = write_safetensors(
        tmp_path / "q.safetensors", {name: given for name, (given, _, _) in KINDS.items()}
    )
    found = lpsparse.report(model, exclude="b.*").tensors
    assert {row.name: (row.prunable, row.reason) for row in found} == {n: k[1:] for n, k in KINDS.items()}


def test_with_include_the_others_are_said_to_be_not_in_it(tmp_path: Path) -> None:
    prune(write_tiny(tmp_path / "tiny"), tmp_path / "out", sparsity=0.5, include=PRUNABLE[0])
    reasons = {each.name: each.reason for each in read_manifest(tmp_path / "out").tensors}
    assert [name for name, reason in reasons.items() if reason == "--include"] == [PRUNABLE[0]]
    assert reasons["norm.weight"] == "not in --include" and reasons["nothing.weight"] == "empty"
