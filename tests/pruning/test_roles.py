"""What a tensor is, by names, shapes, config.json and modules; and what a folder is."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.cli import Ran
from support.files import write_safetensors
from torch import nn
from torch.nn.utils import prune as torch_prune

import lpsparse
from lpsparse import inspect, prune
from lpsparse.errors import InputError, VerdictError
from lpsparse.integrations.look import build
from lpsparse.pruning import look as looking
from lpsparse.pruning.roles import guess_roles, is_head
from lpsparse.pruning.targets import decide
from lpsparse.training.modules import roles_of

Cli = Callable[..., Ran]


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("h.0.attn.bias", (1, 1, 31, 31), "bias"),  # GPT-2's causal mask: transformers#708
        ("transformer.h.3.attn.causal_mask", (31, 31), "mask"),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (5, 14), "bias"),  # GPT-OSS
        ("model.layers.0.mlp.experts.down_proj", (5, 7, 13), "linear"),
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (7, 13), "linear"),
        ("model.layers.0.mlp.shared_expert_gate.weight", (1, 13), "router"),  # mlx-examples#640
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", (5, 13), "router"),
        ("backbone.layers.0.mixer.A_log", (7, 13), "state"),  # state-spaces/mamba#127
        ("rwkv.blocks.0.attention.time_mix_key", (1, 1, 13), "state"),
        ("model.vision_tower.embeddings.class_embedding", (1, 1, 13), "token"),
        ("visual_model.register_tokens", (1, 5, 13), "token"),  # DINOv2 with registers
        ("qformer.query_tokens", (1, 32, 13), "token"),
        ("layers.0.attn.relative_position_bias_table", (169, 3), "position"),
        ("vision_encoder.layers.0.attn.rel_pos_h", (27, 13), "position"),
        ("encoder.embed_positions.weight", (31, 13), "position"),
        ("layers.0.conv.parametrizations.weight.original0", (7, 1, 1), "scale"),
        ("layers.0.conv.parametrizations.weight.original1", (7, 13, 3), "convolution"),
        ("decoder.conv.weight_g", (7, 1, 1), "scale"),
        ("encoder.stages.0.layers.0.grn.weight", (1, 1, 1, 13), "norm"),
        ("transformer_blocks.0.norm1.linear.weight", (26, 13), "linear"),  # a DiT's modulation is no norm
        ("time_embedding.linear_1.weight", (26, 13), "linear"),
        ("embeddings.patch_embeddings.projection.weight", (7, 3, 5, 5), "convolution"),
        ("lstm.weight_ih_l0_reverse", (28, 13), "linear"),
        ("funnel.blocks.0.0.attention.q_head.weight", (7, 13), "linear"),  # not a head of the model
        ("model.diffusion_head.layers.0.ffn.gate_proj.weight", (7, 13), "linear"),
        ("_orig_mod.module.model.classifier.weight", (7, 13), "head"),  # pytorch#101107
        ("bert.pooler.dense.weight", (13, 13), "head"),
        ("net.codes_of_a_stranger", (7, 13), "unknown"),
    ],
)
def test_names_and_shapes_tell_the_role(name: str, shape: tuple[int, ...], role: str) -> None:
    beside = {"model.layers.0.mlp.experts.0.up_proj.weight": (7, 13)}
    assert guess_roles({**beside, name: shape}.items())[name].role == role


def test_a_gate_is_a_router_only_beside_experts() -> None:
    names = {"a.mlp.gate.weight": (5, 13), "b.mlp.gate.weight": (5, 13), "b.mlp.experts.0.up.weight": (7, 13)}
    found = guess_roles(names.items())
    assert (found["a.mlp.gate.weight"].role, found["b.mlp.gate.weight"].role) == ("linear", "router")


def test_config_tells_a_vocabulary_by_its_rows_but_not_within_blocks() -> None:
    config = {"text_config": {"vocab_size": 211, "hidden_size": 13}}
    shapes = {"transformer.w.weight": (211, 13), "layers.0.in_proj.weight": (211, 13)}
    found = guess_roles(shapes.items(), config)
    assert [found[name].role for name in shapes] == ["embedding", "linear"]
    ambiguous = {"vocab_size": 211, "intermediate_size": 211}
    assert guess_roles(shapes.items(), ambiguous)["transformer.w.weight"].role == "linear"


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": {"architectures": ["BertForMaskedLM"], "num_hidden_layers": 1},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_layer": 1},
    "llama": {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1},
    "qwen2_moe": {"architectures": ["Qwen2MoeForCausalLM"], "num_hidden_layers": 1, "layer_types": None},
    "mamba": {"architectures": ["MambaForCausalLM"], "num_hidden_layers": 1},
    "t5": {"architectures": ["T5ForConditionalGeneration"], "num_layers": 1},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
    "vit": {"architectures": ["ViTForImageClassification"], "num_hidden_layers": 1},
    "convnext": {"architectures": ["ConvNextForImageClassification"]},
    "whisper": {
        "architectures": ["WhisperForConditionalGeneration"],
        "encoder_layers": 1,
        "decoder_layers": 1,
    },
    "clip": {},
    "wav2vec2": {"architectures": ["Wav2Vec2ForCTC"], "num_hidden_layers": 1},
}


def weighted(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Of each tensor: weight, or kept; by isinstance alone. What is beside the base model is left out."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    kept = (nn.Embedding, nn.LayerNorm, nn.GroupNorm)
    for place, module in model.named_modules():
        for own, param in module.named_parameters(recurse=False):
            name = f"{place}.{own}" if place else own
            if param.ndim < 2 or isinstance(module, kept) or own.endswith("bias"):
                yield name, "kept"
            elif is_head(name) or place.endswith("gate"):
                continue
            elif isinstance(module, (nn.Linear, *convolutions)) or type(module).__name__ == "Conv1D":
                yield name, "weight"


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_roles_are_those_of_the_built_modules(kind: str) -> None:
    model: Any = build({"model_type": kind, **ARCHITECTURES[kind]})
    assert any(param.is_meta for param in model.parameters())
    named = [(name, "F32", tuple(value.shape)) for name, value in model.state_dict().items()]
    alone, looked = decide(named), decide(named, known=roles_of(model), known_by="module")
    for name, truth in weighted(model):
        assert alone[name].prunable == looked[name].prunable == (truth == "weight"), name
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    ids = {id(param) for param in outputs.parameters()} if outputs is not None else set[int]()
    heads = [name for name, param in model.named_parameters(remove_duplicate=False) if id(param) in ids]
    assert not any(alone[name].prunable or looked[name].prunable for name in heads)


def test_a_config_chooses_no_class_that_transformers_does_not_list() -> None:
    import transformers

    small = {"model_type": "bert", "num_hidden_layers": 1}
    made = build(
        {**small, "architectures": ["logging", "os.system"], "auto_map": {"AutoModel": "evil.Model"}}
    )
    assert isinstance(made, transformers.BertModel)
    assert build({"model_type": "evil"}) is None and build({"model_type": "no such"}) is None


AMBIGUOUS = {"model_type": "decision_transformer", "n_layer": 1, "hidden_size": 24, "n_head": 2}


@pytest.fixture
def unclear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a linear layer that is called as embeddings are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    arrays = {"embed_state.weight": np.ones((24, 17), "f4"), "predict_state.weight": np.ones((17, 24), "f4")}
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(AMBIGUOUS))
    return folder


def test_what_names_leave_open_the_modules_decide_once(
    unclear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {each["name"]: each for each in inspect(unclear)["tensors"]}
    assert found["embed_state.weight"]["role"] == "linear"
    assert found["embed_state.weight"]["told_by"].startswith("DecisionTransformerModel of transformers")
    assert found["predict_state.weight"]["told_by"] == "names and shapes"
    monkeypatch.setattr(looking.subprocess, "run", lambda *_, **__: pytest.fail("it was asked again"))
    assert {each["name"]: each for each in inspect(unclear)["tensors"]} == found


@pytest.mark.parametrize("config", ["{}", '{"model_type": 7}', "[]", '{"model_type": "no such"}'])
def test_without_a_model_to_ask_the_likely_role_holds(config: str, unclear: Path) -> None:
    (unclear / "config.json").write_text(config)
    found = {each["name"]: each for each in inspect(unclear)["tensors"]}["embed_state.weight"]
    assert (found["prunable"], found["role"], found["told_by"]) == (False, "embedding", "a guess")


def test_a_role_is_taken_of_a_tensor_of_the_models_own_shape_alone(unclear: Path) -> None:
    (unclear / "config.json").write_text(json.dumps(AMBIGUOUS | {"state_dim": 5}))
    found = {each["name"]: each for each in inspect(unclear)["tensors"]}["embed_state.weight"]
    assert (found["role"], found["told_by"]) == ("embedding", "a guess")


def test_a_look_that_fails_is_not_kept_and_runs_nothing_of_the_folder_it_starts_in(
    unclear: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(words: list[Any], *, cwd: str, **_: Any) -> None:
        assert "-P" in words and {path.name for path in Path(cwd).iterdir()} == {"config.json"}
        raise subprocess.TimeoutExpired(words, 1)

    monkeypatch.chdir(unclear)
    with monkeypatch.context() as patch:
        patch.setattr(looking.subprocess, "run", failing)
        assert inspect(unclear)["tensors"][0]["told_by"] == "a guess"
    assert not list(unclear.parent.glob("cache/**/*.json"))


def test_what_a_manifest_says_of_a_tensor_is_its_role(tmp_path: Path) -> None:
    prune(scaled(tmp_path), tmp_path / "out", sparsity=0.3, scope="tensor")
    assert {each["role"] for each in inspect(tmp_path / "out")["tensors"]} == {"linear"}


def test_a_name_of_a_million_letters_is_looked_at_no_longer() -> None:
    assert guess_roles([("a." + "_token" * 200_000, (7, 13))])["a." + "_token" * 200_000].role == "unknown"


# Quantised


def of(dtype: str, *shape: int) -> tuple[str, list[int], bytes]:
    size = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I16": 2, "I32": 4, "U32": 4}[dtype]
    return dtype, list(shape), b"\1" * (size * int(np.prod(shape)))


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ({"a.weight": of("U32", 7, 2), "a.scales": of("BF16", 7, 1), "a.biases": of("BF16", 7, 1)}, "MLX"),
        ({"a.weight._data": of("I8", 7, 13), "a.weight._scale": of("F32", 7, 1)}, "quanto"),
        ({"a.W_q": of("U8", 7, 13), "a.scale": of("F16", 7, 2), "a.zero": of("F16", 7, 2)}, "HQQ"),
        ({"a.codes": of("I16", 7, 13, 1), "a.codebooks": of("F16", 2, 5, 1, 8)}, "AQLM"),
        ({"a.qweight": of("I8", 7, 13), "a.wscales": of("F16", 2), "a.lora_up": of("F16", 7, 4)}, "Nunchaku"),
        ({"a.weight": of("I8", 7, 13), "a.scale": of("F32", 7, 1)}, "integers with scales"),
        ({"a.weight_qdata": of("I8", 7, 13), "a.weight_scale": of("F32", 7, 1)}, "integers with scales"),
    ],
    ids=["MLX", "quanto", "HQQ", "AQLM", "Nunchaku", "plain int8", "torchao"],
)
def test_integers_with_scales_are_refused_and_their_siblings_never_cut(
    given: dict[str, Any], method: str, tmp_path: Path
) -> None:
    model = write_safetensors(tmp_path / "m.safetensors", {**given, "b.weight": of("F32", 7, 13)})
    with pytest.raises(InputError, match=f"quantised \\({method}"):
        prune(model, tmp_path / "out", sparsity=0.5)
    found = {each["name"]: each["prunable"] for each in inspect(model)["tensors"]}
    assert found == {**dict.fromkeys(given, False), "b.weight": True}


def test_integer_masks_and_indexes_beside_weights_are_not_quantised(tmp_path: Path) -> None:
    masks = {"attn.bias": of("U8", 1, 1, 7, 7), "attn.masked_bias": of("F32")}
    given = masks | {"attn.relative_position_index": of("I32", 7, 7)}
    model = write_safetensors(tmp_path / "m.safetensors", {**given, "attn.weight": of("F32", 7, 13)})
    assert inspect(model)["prunable_weights"] == 91


# What is left


def scaled(tmp_path: Path, **more: np.ndarray) -> Path:
    draw = np.random.default_rng(0)
    small, large = (draw.standard_normal((13, 53)).astype("f4") * scale for scale in (1e-4, 1))
    save_file(
        {"layers.0.mlp.weight": large, "layers.0.attn.weight": small} | more, tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors"


def test_a_cut_that_empties_a_tensor_is_exit_1_unless_allowed(tmp_path: Path, cli: Cli) -> None:
    model = scaled(tmp_path)
    ran = cli("prune", model, tmp_path / "out", "--sparsity", "0.6")
    assert ran.rc == 1 and "LPS103" in ran.stderr and "layers.0.attn.weight" in ran.stderr
    foretold = cli("prune", model, tmp_path / "dry", "--sparsity", "0.6", "--dry-run")
    assert (
        foretold.rc == 0 and "would exit 1" in foretold.stderr and "layers.0.attn.weight" in foretold.stderr
    )
    assert cli("verify", tmp_path / "out", model).rc == 0  # it is complete
    assert cli("prune", model, tmp_path / "b", "--sparsity", "0.6", "--allow-empty").rc == 0
    assert cli("prune", model, tmp_path / "c", "--sparsity", "0.6", "--scope", "tensor").rc == 0


def test_what_was_empty_before_the_cut_is_not_held_against_it(tmp_path: Path) -> None:
    model = scaled(tmp_path, **{"layers.1.mlp.weight": np.zeros((7, 13), "f4")})
    assert prune(model, tmp_path / "half", sparsity=0.5, scope="tensor").prunable.sparsity > 0.5
    with pytest.raises(VerdictError, match="layers\\.0\\.attn"):
        prune(model, tmp_path / "most", sparsity=0.6)
    assert (tmp_path / "most" / "lpsparse.json").is_file()


@pytest.mark.parametrize(("kept", "code"), [(6, 1), (20, 0), (80, 0)])
def test_a_layer_type_of_which_little_is_left_is_said_or_exit_1(
    kept: int, code: int, tmp_path: Path, cli: Cli
) -> None:
    small = np.full((20, 50), 1e-4, "f4")
    small.reshape(-1)[:kept] = 9
    large = np.ones((100, 100), "f4")
    save_file({"h.0.mlp.weight": large, "h.0.attn.q_proj.weight": small}, tmp_path / "m.safetensors")
    ran = cli("prune", tmp_path / "m.safetensors", tmp_path / "out", "--below", "1e-3")
    assert ran.rc == code
    assert ("layer type attention q" in ran.stderr) == (kept < 50)
    assert ("2.00 % of the layer type" in ran.stderr) == (kept == 20)


def test_infinity_in_a_mask_is_carried_as_it_is(tmp_path: Path) -> None:
    mask = np.triu(np.full((7, 7), -np.inf, "f4"), 1)
    model = scaled(tmp_path, **{"layers.0.attn.mask": mask})
    prune(model, tmp_path / "out", sparsity=0.3, scope="tensor")
    assert np.array_equal(load_file(tmp_path / "out" / "m.safetensors")["layers.0.attn.mask"], mask)


# Folders


def test_masks_of_torch_are_applied_and_leave_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(13, 7), nn.Linear(7, 5))
    for module in net:
        torch_prune.l1_unstructured(module, "weight", 0.6)
    expected = {f"{i}.weight": module.weight.detach().clone() for i, module in enumerate(net)}
    torch.save(net.state_dict(), tmp_path / "net.pt")
    found = lpsparse.load(tmp_path / "net.pt")
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert lpsparse.report(tmp_path / "net.pt").prunable.zeros == sum(
        int((v == 0).sum()) for v in expected.values()
    )
    state = net.state_dict()
    state["0.weight_mask"][0, 0] = 0.5
    torch.save(state, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="other values than 0 and 1"):
        lpsparse.load(tmp_path / "odd.pt")


def test_an_index_of_any_name_is_found_and_kept(tmp_path: Path) -> None:
    stem, variant = "diffusion_pytorch_model", "diffusion_pytorch_model.fp16"
    for folder, shard, index in (
        ("a", stem, f"{stem}.safetensors.index.json"),
        ("b", variant, f"{stem}.safetensors.index.fp16.json"),
    ):
        source = tmp_path / folder
        source.mkdir()
        table = {}
        for i in (1, 2):
            name = f"{shard}-0000{i}-of-00002.safetensors"
            save_file({f"down.{i}.conv.weight": np.ones((7, 13, 3, 3), "f4") * i}, source / name)
            table[f"down.{i}.conv.weight"] = name
        (source / index).write_text(json.dumps({"metadata": {}, "weight_map": table}))
        (source / f"._{index}").write_bytes(b"\0\5\26\7")  # what macOS leaves beside files
        (source / "config.json").write_text('{"_diffusers_version": "0.34.0"}')
        prune(source, tmp_path / f"{folder}-out", below=0.5)
        there = {path.name for path in (tmp_path / f"{folder}-out").iterdir()}
        assert {index, *table.values()} <= there and not any("index" in n for n in there - {index})


def test_the_weights_of_an_adapter_are_refused_by_their_own_name_too(tmp_path: Path, cli: Cli) -> None:
    save_file({"q_proj.lora_A.weight": np.ones((5, 13), "f4")}, tmp_path / "adapter_model.safetensors")
    for command in (
        ("inspect", tmp_path / "adapter_model.safetensors"),
        ("inspect", tmp_path, "--weights", "adapter_model.safetensors"),
    ):
        ran = cli(*command)
        assert ran.rc == 3 and "LPS318" in ran.stderr


def test_a_model_that_is_called_as_trainers_call_their_files_is_found(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(7, 13)}, tmp_path / "scheduler_net.pth")
    torch.save({"state": {}}, tmp_path / "scheduler.pt")
    assert inspect(tmp_path)["files"][0]["name"] == "scheduler_net.pth"


def test_an_adapter_a_pipeline_and_a_cache_are_refused_by_what_they_are(tmp_path: Path, cli: Cli) -> None:
    adapter, pipeline, cache = (tmp_path / name for name in ("adapter", "pipeline", "models--org--tiny"))
    for folder in (adapter, pipeline / "unet", cache / "snapshots" / "abc", cache / "blobs"):
        folder.mkdir(parents=True)
    weights = {"base_model.model.layers.0.q_proj.lora_A.weight": np.zeros((5, 13), "f4")}
    save_file(weights, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    save_file(weights, pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    (pipeline / "model_index.json").write_text(
        '{"_class_name": "X", "unet": ["diffusers", "U"], "tokenizer": []}'
    )
    for folder, said in (
        (adapter, "an adapter of org/base"),
        (pipeline, "a diffusers pipeline, of unet"),
        (cache, "a repository in the hub's cache"),
    ):
        for command in (
            ("inspect", folder),
            ("report", folder),
            ("prune", folder, tmp_path / "o", "--sparsity", "0.5"),
        ):
            ran = cli(*command)
            assert ran.rc == 3 and said in ran.stderr and "hint: " in ran.stderr
