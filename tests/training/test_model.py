"""From checkpoint to module and back: what was trained is what is written, or it is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.models import BUNDLED, SMALL

import lpsparse
from lpsparse import ExitCode, LpsparseError

ONE = {"task": "text-classification", "steps": 3, "lr": 1e-2, "method": "dense"}


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def renamed(source: Path, folder: Path, rename: Any) -> Path:
    """A copy of a model folder in which every tensor has another name."""
    shutil.copytree(source, folder)
    state = {rename(name): value for name, value in state_of(folder).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_berts_old_names_of_its_norms_are_trained(tiny_bert: Path, table: Path, tmp_path: Path) -> None:
    def old(name: str) -> str:
        swap = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return next((name.replace(new, then) for new, then in swap.items() if name.endswith(new)), name)

    legacy = renamed(tiny_bert, tmp_path / "legacy", old)
    for model, out in ((tiny_bert, "a"), (legacy, "b")):
        lpsparse.finetune(model, tmp_path / out, data=str(table), **ONE)
    before, a, b = (state_of(folder) for folder in (tiny_bert, tmp_path / "a", tmp_path / "b"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    norm = "embeddings.LayerNorm.weight"
    assert not torch.equal(a[f"bert.{norm}"], before[norm])
    lpsparse.finetune(tmp_path / "b", tmp_path / "c", data=str(table), **ONE)  # a head is there: names stay
    assert state_of(tmp_path / "c").keys() == b.keys()


def test_a_wrappers_prefix_is_looked_through_and_put_back(tmp_path: Path) -> None:
    wrapped = renamed(BUNDLED, tmp_path / "wrapped", lambda name: f"module.{name}")
    for model, out in ((BUNDLED, "a"), (wrapped, "b")):
        lpsparse.finetune(model, tmp_path / out, target_sparsity="0.5", **SMALL)
    a, b = state_of(tmp_path / "a"), state_of(tmp_path / "b")
    assert {f"module.{name}" for name in a} == set(b)
    assert all(torch.equal(a[name], b[f"module.{name}"]) for name in a)


def test_fused_experts_are_trained_and_written_as_the_checkpoints_own_tensors(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    for path in BUNDLED.glob("token*"):
        shutil.copyfile(path, tmp_path / "moe" / path.name)
    report = lpsparse.finetune(tmp_path / "moe", tmp_path / "out", **SMALL)
    before, after = state_of(tmp_path / "moe"), state_of(tmp_path / "out")
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 6 and not any(torch.equal(before[name], after[name]) for name in experts)
    options = {"task": "causal-lm", "data": "bundled:shakespeare", "max_length": 32}
    found = lpsparse.evaluate(tmp_path / "out", split=SMALL["eval_split"], **options)
    assert found["loss"] == pytest.approx(report.quality[0].after, rel=1e-6)


def test_what_does_not_turn_back_into_the_checkpoints_tensors_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=8,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    np.savez(tmp_path / "images.npz", x=np.zeros((8, 16, 16, 3), np.uint8), y=np.arange(8) % 2)
    monkeypatch.setattr("lpsparse.training.names.turned_back", lambda model, tensors: {})
    given = {"data": tmp_path / "images.npz", "task": "image-classification", "steps": 1}
    with pytest.raises(LpsparseError, match="renames or fuses 16 tensors") as caught:
        lpsparse.finetune(tmp_path / "vit", tmp_path / "out", **given)
    assert caught.value.exit_code == ExitCode.INPUT and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_recorded_quality_is_that_of_the_files(
    dtype: torch.dtype, precision: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    state = {name: value.to(dtype) for name, value in state_of(folder).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    report = lpsparse.finetune(
        folder, tmp_path / "out", target_sparsity="0.5", mixed_precision=precision, **SMALL
    )
    options = {"task": "causal-lm", "data": "bundled:shakespeare", "max_length": 32}
    found = lpsparse.evaluate(tmp_path / "out", split=SMALL["eval_split"], **options)
    assert found["loss"] == pytest.approx(report.quality[0].after, rel=1e-6)


def test_a_language_model_without_padding_can_classify_and_says_so_in_out(
    table: Path, tmp_path: Path
) -> None:
    lpsparse.finetune(BUNDLED, tmp_path / "out", data=str(table), batch_size=4, **ONE)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert isinstance(config["pad_token_id"], int)
    once = lpsparse.evaluate(tmp_path / "out", data=str(table), task="text-classification", split="train")
    alone = lpsparse.evaluate(
        tmp_path / "out", data=str(table), task="text-classification", split="train", batch_size=1
    )
    assert once["loss"] == pytest.approx(alone["loss"], rel=1e-5)


BROKEN = {
    "hidden_size is text": {"hidden_size": "abc"},
    "hidden_size below 0": {"hidden_size": -1},
    "no heads": {"num_attention_heads": 0},
    "no such activation": {"hidden_act": "zzz"},
    "no such dtype": {"dtype": "zzz"},
    "one position": {"max_position_embeddings": 1},
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "a kernel of its own": {"attn_implementation": "evil/kernel"},
    "a hidden kernel": {"_attn_implementation": "evil/kernel"},
    "code of its own": {"auto_map": {"AutoModel": "evil.Model"}},
    "code inside": {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_hostile_config_is_an_error_of_the_input(case: str, tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "model")
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | BROKEN[case]))
    with pytest.raises(LpsparseError) as caught:
        lpsparse.finetune(tmp_path / "model", tmp_path / "out", **SMALL)
    assert caught.value.exit_code == ExitCode.INPUT and "model" in caught.value.what
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model"]


def test_a_broken_tokenizer_is_an_error_of_the_input(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "model")
    (tmp_path / "model/tokenizer_config.json").write_text("[]")
    with pytest.raises(LpsparseError, match="no tokenizer") as caught:
        lpsparse.finetune(tmp_path / "model", tmp_path / "out", **SMALL)
    assert caught.value.exit_code == ExitCode.INPUT


def test_a_model_whose_loss_is_nan_has_no_quality(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "model")
    state = state_of(tmp_path / "model")
    state["model.norm.weight"][3] = torch.nan
    safetensors.torch.save_file(state, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LpsparseError, match="loss nan") as caught:
        lpsparse.evaluate(tmp_path / "model", task="causal-lm", data="bundled:shakespeare", max_length=32)
    assert caught.value.exit_code == ExitCode.NUMERIC


MODEL_FNS = {
    "leaves": ("import sys; sys.exit(3)", "SystemExit"),
    "no Python": ("def build(:", "SyntaxError"),
    "raises": ("def build(): raise ValueError('odd')", "ValueError: odd"),
    "wants more": ("def build(size): return None", "TypeError"),
    "gives no module": ("def build(): return {}", "gave a dict"),
    "is missing": ("", "no attribute 'build'"),
}


@pytest.mark.parametrize("case", MODEL_FNS)
def test_a_model_function_that_fails_is_named_with_its_error(
    case: str, net: dict[str, Any], tmp_path: Path
) -> None:
    code, words = MODEL_FNS[case]
    (tmp_path / "net.py").write_text(code)
    with pytest.raises(LpsparseError, match=words) as caught:
        lpsparse.finetune(out=tmp_path / "out", **net)
    assert caught.value.exit_code == ExitCode.USAGE


def test_training_what_is_no_matrix_alone_needs_no_prunable_tensor(
    net: dict[str, Any], tmp_path: Path
) -> None:
    frozen = {"freeze": "module.0.weight,module.4.weight", "steps": 2}
    before = torch.load(net["model"], weights_only=True)["state_dict"]
    lpsparse.finetune(out=tmp_path / "out", method="dense", **frozen, **net)
    after = state_of(tmp_path / "out")
    assert torch.equal(after["module.4.weight"], before["module.4.weight"])
    assert not torch.equal(after["module.4.bias"], before["module.4.bias"])
    with pytest.raises(LpsparseError, match="no prunable tensor is left"):
        lpsparse.finetune(out=tmp_path / "no", target_sparsity="0.5", **frozen, **net)


def test_decay_without_a_target_holds_the_zeros_of_a_sparse_model(tmp_path: Path) -> None:
    sparse = lpsparse.prune(BUNDLED, tmp_path / "sparse", sparsity=0.6)
    out = lpsparse.finetune(tmp_path / "sparse", tmp_path / "out", **SMALL)
    assert out.prunable.zeros >= sparse.prunable.zeros
