"""--mixed-precision auto: what the device computes in, said, recorded, and the same after a stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lpsparse
from lpsparse.commands.finetune import finetune_step
from lpsparse.errors import LpsparseError
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training import precision

Known = Callable[[dict[str, bool]], None]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Known:
    """Gives this machine a CPU with these instructions and no other device."""

    def has(known: dict[str, bool]) -> None:
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: known, raising=False)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.accelerator.is_available", lambda: False)

    return has


def step_with(**given: Any) -> FinetuneStep:
    return resolve(FinetuneStep, {"model": "-", "out": "-", "data": "-", "task": "causal-lm", **given})


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"avx2": True, "avx512_bf16": False}, "no"),
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"bf16": True}, "bf16"),
        ({}, "no"),
    ],
)
def test_auto_is_bf16_where_the_cpu_has_it(known: dict[str, bool], wanted: str, cpu: Known) -> None:
    cpu(known)
    step, said = precision.with_precision(step_with(mixed_precision="auto"))
    assert step.mixed_precision == wanted
    assert "bf16" in said[0] and ("fp32" in said[0]) == (wanted == "no")


def test_a_cpu_that_runs_older_kernels_has_no_bf16(cpu: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu({"avx512_bf16": True})
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert not precision.has_bf16()


@pytest.mark.parametrize("words", ["flags : fpu avx512_bf16", "Features : fp asimd bf16"])
def test_the_system_is_asked_where_torch_does_not_tell(
    words: str, cpu: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu({})
    monkeypatch.delattr("torch.cpu.get_capabilities")
    monkeypatch.setattr("sys.platform", "linux")
    for text, wanted in ((f"processor : 0\n{words}\n", True), ("flags : avx2\n", False)):
        monkeypatch.setattr(Path, "read_text", lambda *_, text=text: text)
        assert precision.has_bf16() is wanted


def test_a_gpu_is_asked_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for known in (True, False):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, known=known: known)
        assert precision.has_bf16() is known


def test_emulated_bf16_warns_with_a_measured_factor(cpu: Known) -> None:
    cpu({"avx2": True})
    step, said = precision.with_precision(step_with(mixed_precision="bf16"))
    assert step.mixed_precision == "bf16" and "emulated" in said[0]
    assert float(said[0].partition("takes ")[2].partition(" times")[0]) > 0
    assert precision.with_precision(step_with(mixed_precision="no"))[1] == ()
    cpu({"avx512_bf16": True})
    assert precision.with_precision(step_with(mixed_precision="bf16"))[1] == ()


def test_the_command_says_and_records_what_it_trained_in(
    net: dict[str, Any], tmp_path: Path, cpu: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LPSPARSE_MIXED_PRECISION")
    cpu({"avx2": True})
    said: list[str] = []
    finetune_step(resolve(FinetuneStep, {**net, "out": tmp_path / "out", "steps": 2}), said.append)
    manifest = json.loads((tmp_path / "out" / "lpsparse.json").read_text())
    assert manifest["recipe"]["finetune"]["mixed_precision"] == "auto"
    for told in (said, manifest["notes"]):
        assert [text for text in told if text.startswith("fp32")]


def test_what_was_measured_of_emulation_is_said_and_not_recorded(
    net: dict[str, Any], tmp_path: Path, cpu: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by a run that was stopped and went on: its manifest had another factor in it."""
    cpu({"avx2": True})
    manifests: list[bytes] = []
    for factor in (7.0, 9.0):
        monkeypatch.setattr(precision, "slowdown", lambda factor=factor: factor)
        said: list[str] = []
        out = tmp_path / f"{factor:.0f}"
        step = resolve(FinetuneStep, {**net, "out": out, "steps": 2, "mixed_precision": "bf16"})
        finetune_step(step, said.append)
        assert any(f"{factor:.1f} times as long" in text for text in said)
        manifests.append((out / "lpsparse.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_auto_and_what_it_stands_for_end_in_the_same_bits(
    net: dict[str, Any], tmp_path: Path, cpu: Known
) -> None:
    cpu({"avx512_bf16": True})
    files: list[bytes] = []
    for asked in ("auto", "bf16", "no"):
        lpsparse.finetune(out=tmp_path / asked, **net, steps=3, mixed_precision=asked)
        files.append(next((tmp_path / asked).glob("*.safetensors")).read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_state_goes_on_in_the_arithmetic_that_it_was_made_in(
    net: dict[str, Any], tmp_path: Path, cpu: Known
) -> None:
    given = {**net, "out": tmp_path / "out", "steps": 8, "save_every": 2, "mixed_precision": "auto"}
    step = resolve(FinetuneStep, {**given, "log_every": 4})
    cpu({"avx2": True})

    def stop(progress: Any) -> None:
        if progress.step >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_step(step, on_step=stop)
    cpu({"avx512_bf16": True})
    with pytest.raises(LpsparseError, match="mixed_precision was no, is bf16") as refused:
        finetune_step(step)
    assert refused.value.code == "LPS704"
    cpu({"avx2": True})
    assert finetune_step(step)


def test_fp16_needs_a_gpu(net: dict[str, Any], tmp_path: Path, cpu: Known) -> None:
    cpu({})
    if torch.accelerator.is_available():
        pytest.skip("here is one")
    with pytest.raises(LpsparseError, match="fp16"):
        lpsparse.finetune(out=tmp_path / "out", **net, steps=1, mixed_precision="fp16")
