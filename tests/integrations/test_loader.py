"""transformers opens packed folders: the model is the dense one in every bit, or there is none."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.cli import cli_environment
from support.files import refuses, tree_hash
from support.models import BUNDLED
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BitsAndBytesConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import lpsparse
from lpsparse.checkpoint.loader_entry import parse_entry, quantization_entry, with_entry, without_entry
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.errors import InputError
from lpsparse.integrations.loader import LazyTensor, Reading

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
HEADS: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 8}
BERT = BertConfig(**SIZES)
CAUSAL = {
    "tied": LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True),
    "merged experts": Qwen3MoeConfig(**SIZES, **HEADS, num_experts=4, moe_intermediate_size=24),
    "renamed experts": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=11),
    "fused experts": GptOssConfig(**SIZES, **HEADS, num_local_experts=4, layer_types=["full_attention"] * 2),
}


def sparse(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Random weights, of which every matrix has zeros; one expert's bits are noise that nothing shortens."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            kept = torch.rand(value.shape, generator=draw) < (0.3 if value.dim() > 1 else 1)
            value.copy_(torch.randn(value.shape, generator=draw) * kept)
            if value.dim() == 3:
                noise = torch.randint(0, 2**31 - 2**24, value[1].shape, generator=draw, dtype=torch.int32)
                value[1] = noise.view(torch.float32)
    return model


def packed(source: Path, layout: str = "packed") -> Path:
    out = source.with_name(f"{source.name}-{layout}")
    lpsparse.pack(source, out, layout=layout)
    return out


def edited(folder: Path, **entry: Any) -> Path:
    table = json.loads((folder / "config.json").read_text())
    table["quantization_config"] |= entry
    (folder / "config.json").write_text(json.dumps(table))
    return folder


def assert_same(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    pairs = zip(found.state_dict().items(), wanted.state_dict().items(), strict=True)
    for (name, value), (also, other) in pairs:
        assert (name, value.dtype, value.shape) == (also, other.dtype, other.shape)
        assert value.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8)), name


def saved(config: Any, folder: Path, **options: Any) -> Path:
    sparse(AutoModelForCausalLM.from_config(config)).save_pretrained(folder, **options)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(CAUSAL["untied"], tmp_path / "llama")


@pytest.mark.parametrize("layout", ["packed", "bitmask"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_packed_model_is_the_dense_one_and_saves_the_same_files(
    name: str, layout: str, tmp_path: Path
) -> None:
    source = saved(CAUSAL[name], tmp_path / "model")
    out = packed(source, layout)
    assert any(tensor.layout == layout for tensor in open_checkpoint(out).tensors)
    found, wanted = (AutoModelForCausalLM.from_pretrained(each) for each in (out, source))
    assert_same(found, wanted)
    found.save_pretrained(tmp_path / "found")
    wanted.save_pretrained(tmp_path / "wanted")
    assert tree_hash(tmp_path / "found") == tree_hash(tmp_path / "wanted")
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "found"), wanted)


def test_experts_of_which_some_are_packed_keep_their_order(tmp_path: Path) -> None:
    out = packed(saved(CAUSAL["renamed experts"], tmp_path / "model"))
    layouts = [t.layout for t in open_checkpoint(out).tensors if "layers.0" in t.name and ".w1." in t.name]
    assert sorted(layouts) == ["dense"] + ["packed"] * 10


@pytest.mark.parametrize("layout", ["packed", "bitmask"])
def test_shards_are_opened_by_their_index(layout: str, tmp_path: Path) -> None:
    source = saved(CAUSAL["merged experts"], tmp_path / "model", max_shard_size="30KB")
    out = packed(source, layout)
    assert len(list(out.glob("lpsparse-*.safetensors"))) > 2
    assert_same(*(AutoModelForCausalLM.from_pretrained(each) for each in (out, source)))


@pytest.mark.parametrize("layout", ["packed", "bitmask"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "float64", "auto", None])
def test_floats_come_in_the_dtype_asked_for(dtype: Any, layout: str, tmp_path: Path) -> None:
    source = saved(CAUSAL["merged experts"], tmp_path / "model")
    out = packed(source, layout)
    assert_same(*(AutoModelForCausalLM.from_pretrained(each, dtype=dtype) for each in (out, source)))


def test_what_a_model_keeps_in_float32_stays_so(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    source, kind = tmp_path / "t5", T5ForConditionalGeneration
    sparse(kind(config)).save_pretrained(source)
    found, wanted = (kind.from_pretrained(each, dtype=torch.float16) for each in (packed(source), source))
    assert_same(found, wanted)
    assert {value.dtype for value in found.parameters()} == {torch.float16, torch.float32}


def test_a_config_without_a_dtype_gives_the_dtype_of_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "model"
    config = LlamaConfig(**SIZES | {"hidden_size": 256}, num_key_value_heads=2)  # its norms are worth packing
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(source)
    table = json.loads((source / "config.json").read_text())
    del table["dtype"]
    (source / "config.json").write_text(json.dumps(table))
    out = packed(source)
    assert {tensor.layout for tensor in open_checkpoint(out).tensors} == {"packed"}
    found, wanted = (AutoModelForCausalLM.from_pretrained(each) for each in (out, source))
    assert found.dtype == torch.bfloat16
    assert_same(found, wanted)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_device_map_is_followed(device_map: Any, llama: Path) -> None:
    out = packed(llama)
    assert_same(*(AutoModelForCausalLM.from_pretrained(each, device_map=device_map) for each in (out, llama)))


def test_on_the_meta_device_a_model_has_shapes_alone(llama: Path) -> None:
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(each, device_map="meta").state_dict()
        for each in (packed(llama), llama)
    )
    assert all(value.is_meta for value in found.values())
    assert found.keys() == wanted.keys()
    assert all(
        (found[key].shape, found[key].dtype) == (wanted[key].shape, wanted[key].dtype) for key in found
    )


def test_what_is_offloaded_to_disk_is_unpacked_there(llama: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    ids = torch.arange(7).reshape(1, 7)
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(each, device_map=device_map, offload_folder=tmp_path / each.name)
        for each in (packed(llama), llama)
    )
    assert found(ids).logits.equal(wanted(ids).logits)


@pytest.mark.parametrize(
    ("made", "opened"),
    [
        (BertModel, AutoModelForMaskedLM),
        (BertModel, AutoModelForSequenceClassification),
        (BertForMaskedLM, AutoModel),
        (BertForMaskedLM, AutoModelForMaskedLM),
    ],
)
def test_another_head_misses_and_leaves_what_it_does_of_the_dense_model(
    made: Any, opened: Any, tmp_path: Path
) -> None:
    sparse(made(BERT)).save_pretrained(tmp_path / "bert")
    out = packed(tmp_path / "bert")
    torch.manual_seed(0)
    found, told = opened.from_pretrained(out, output_loading_info=True)
    torch.manual_seed(0)
    wanted, also = opened.from_pretrained(tmp_path / "bert", output_loading_info=True)
    assert told == also
    assert_same(found, wanted)


def test_minilm_and_stories_compute_what_they_did(minilm: Path, tmp_path: Path) -> None:
    text = AutoTokenizer.from_pretrained(minilm)(
        ["a fine day", "no rain at all"], padding=True, return_tensors="pt"
    )
    stories = tmp_path / "stories"
    shutil.copytree(BUNDLED, stories)
    (tmp_path / "minilm").symlink_to(minilm)
    for source, kind, given in (
        (tmp_path / "minilm", AutoModel, text),
        (stories, AutoModelForCausalLM, {"input_ids": text.input_ids % 512}),
    ):
        found, wanted = (kind.from_pretrained(each).eval() for each in (packed(source), source))
        assert_same(found, wanted)
        with torch.no_grad():
            assert found(**given)[0].equal(wanted(**given)[0])
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_a_folder_in_a_folder_and_in_the_cache_of_the_hub_are_opened(llama: Path, tmp_path: Path) -> None:
    out, commit = packed(llama), "0123456789" * 4
    wanted = AutoModelForCausalLM.from_pretrained(llama)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path, subfolder=out.name), wanted)
    repo = tmp_path / "cache" / "models--some--llama"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(path for path in out.iterdir() if path.is_file())):
        shutil.copyfile(path, repo / "blobs" / str(i))
        (repo / "snapshots" / commit / path.name).symlink_to(f"../../blobs/{i}")
    (repo / "refs").mkdir()
    (repo / "refs" / "v2").write_text(commit)
    given = {"revision": "v2", "cache_dir": tmp_path / "cache", "local_files_only": True}
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        assert_same(kind.from_pretrained("some/llama", **given), wanted)


# The guard


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "lpsparse.safetensors"
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


def exchange(tensors: dict[str, Any]) -> None:
    a, b = (f"model.layers.{i}.mlp.down_proj.weight.packed" for i in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def drop(tensors: dict[str, Any]) -> None:
    del tensors["model.layers.1.mlp.down_proj.weight.packed"]


def spoil(tensors: dict[str, Any]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight.packed"][200] ^= 255


def flip(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * ([-1] + [1] * 31)  # stored densely


@pytest.mark.parametrize("change", [exchange, drop, spoil, flip])
def test_stored_bytes_that_are_others_are_refused(change: Any, llama: Path) -> None:
    out = packed(llama)
    rewritten(out, change)
    with pytest.raises(InputError):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_dense_tensor_that_is_gone_without_a_trace_is_missed(llama: Path) -> None:
    out, name = packed(llama), "model.layers.0.input_layernorm.weight"
    path = out / "lpsparse.safetensors"
    tensors = load_file(path)
    del tensors[name]
    with safe_open(path, "np") as file:
        metadata = {key: _without(value, name) for key, value in file.metadata().items()}
    save_file(tensors, path, metadata=metadata)
    assert name not in str(metadata) and name not in lpsparse.load(path)
    with refuses("LPS364"):
        AutoModelForCausalLM.from_pretrained(out)


def _without(text: str, name: str) -> str:
    """Metadata, of which some is a JSON table, without what is under a name."""
    if name not in text:
        return text
    table = json.loads(text)
    for part in (table, *table.values()):
        if isinstance(part, dict):
            part.pop(name, None)
    return json.dumps(table)


@pytest.mark.parametrize(
    "entry",
    [
        {"tensors": 3},
        {"digest": "0" * 16},
        {"format_version": 2},
        {"layout": "zip"},
        {"tensors": "3"},
        {"digest": 7},
        {"auto_map": "os.system"},
        {"dtype": "I64"},
    ],
)
def test_an_entry_that_is_not_that_of_the_files_is_refused(entry: dict[str, Any], llama: Path) -> None:
    with pytest.raises(InputError):
        AutoModelForCausalLM.from_pretrained(edited(packed(llama), **entry))


def test_what_a_model_does_not_use_is_guarded_too(tmp_path: Path) -> None:
    sparse(BertForMaskedLM(BERT)).save_pretrained(tmp_path / "bert")
    out = packed(tmp_path / "bert")

    def spoil_head(tensors: dict[str, Any]) -> None:
        tensors["cls.predictions.transform.dense.weight.packed"][200] ^= 255

    rewritten(out, spoil_head)
    with refuses("LPS365"):
        AutoModel.from_pretrained(out)


def test_a_shard_that_is_gone_or_not_in_the_index_is_refused(tmp_path: Path) -> None:
    out = packed(saved(CAUSAL["tied"], tmp_path / "model", max_shard_size="20KB"))
    index = out / "lpsparse.safetensors.index.json"
    table = json.loads(index.read_text())
    last = max(table["weight_map"].values())
    table["weight_map"] = {name: file for name, file in table["weight_map"].items() if file != last}
    index.write_text(json.dumps(table))
    with refuses("LPS364"):
        AutoModelForCausalLM.from_pretrained(out)


def test_a_model_of_another_shape_is_refused(llama: Path) -> None:
    out = packed(llama)
    config = AutoConfig.from_pretrained(out)
    config.intermediate_size = 40
    with pytest.raises((InputError, RuntimeError)):
        AutoModelForCausalLM.from_pretrained(out, config=config)


def test_a_model_of_which_nothing_was_packed_is_refused(llama: Path) -> None:
    out = packed(llama)
    config = BertConfig(
        **SIZES, quantization_config=json.loads((out / "config.json").read_text())["quantization_config"]
    )
    with refuses("LPS366"):
        BertModel.from_pretrained(out, config=config)


def test_another_quantisation_meets_what_it_meets_for_the_dense_model(llama: Path) -> None:
    quantised = BitsAndBytesConfig(load_in_8bit=True)  # its package is not installed here
    for each in (packed(llama), llama):
        with pytest.raises(ImportError):
            AutoModelForCausalLM.from_pretrained(each, quantization_config=quantised)


def test_an_adapter_is_not_left_out_in_silence(llama: Path) -> None:
    out = packed(llama)
    (out / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(llama)}))
    with refuses("LPS260", "load_adapter"):
        AutoModelForCausalLM.from_pretrained(out)


# Equal to the dense model in more than its weights


def without_paths(config: Any) -> dict[str, Any]:
    return {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}


@pytest.mark.parametrize("own_file", [True, False])
def test_generation_config_and_config_are_those_of_the_dense_model(own_file: bool, llama: Path) -> None:
    (llama / "generation_config.json").unlink()
    told = {"max_length": 77, "top_k": 13}
    if own_file:
        (llama / "generation_config.json").write_text(json.dumps(told))
    else:  # as old models have it
        table = json.loads((llama / "config.json").read_text()) | told
        (llama / "config.json").write_text(json.dumps(table))
    out = packed(llama)
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
        found, wanted = (load(each) for each in (out, llama))
        assert found.generation_config.to_dict() == wanted.generation_config.to_dict()
        assert found.generation_config.top_k == 13
        assert without_paths(found.config) == without_paths(wanted.config)
        assert (found.name_or_path, found.config.name_or_path) == (str(out), str(out))
        assert type(found.name_or_path) is type(wanted.name_or_path)


def test_arguments_reach_config_and_model_as_for_the_dense_model(llama: Path) -> None:
    out = packed(llama)
    given = {"output_attentions": True, "attn_implementation": "eager", "dtype": torch.float16}
    for kind in (AutoModelForCausalLM, LlamaForCausalLM):
        found, wanted = (kind.from_pretrained(each, **given) for each in (out, llama))
        assert_same(found, wanted)
        assert without_paths(found.config) == without_paths(wanted.config)
        assert found.config.output_attentions
    named = LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=out, config=str(llama))
    assert_same(named, LlamaForCausalLM.from_pretrained(llama))


def test_a_given_config_opens_a_packed_folder(llama: Path) -> None:
    config = AutoConfig.from_pretrained(llama)
    assert_same(*(LlamaForCausalLM.from_pretrained(each, config=config) for each in (packed(llama), llama)))
    assert not hasattr(config, "quantization_config")


def test_a_config_that_cannot_be_read_is_told_by_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match="JSON"):
        LlamaForCausalLM.from_pretrained(tmp_path)


# A transformers that reads in another way


def asks_for_more(self: LazyTensor, index: Any) -> torch.Tensor:
    return self.untyped_storage()


def is_no_tensor(self: LazyTensor, index: Any) -> torch.Tensor:
    raise TypeError("expected Tensor, got LazyTensor")


@pytest.mark.parametrize("way", [asks_for_more, is_no_tensor, None])
def test_where_lazy_tensors_are_not_read_the_model_is_unpacked_first(
    way: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way is None:
        monkeypatch.delattr(LazyTensor, "__getitem__")
    else:
        monkeypatch.setattr(LazyTensor, "__getitem__", way)
    out = packed(llama)
    with pytest.warns(RuntimeWarning, match="unpacked into memory"):
        found, told = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    wanted, also = AutoModelForCausalLM.from_pretrained(llama, output_loading_info=True)
    assert_same(found, wanted)
    assert told == also
    rewritten(out, drop)
    with pytest.raises(InputError):
        AutoModelForCausalLM.from_pretrained(out)


def test_an_error_that_is_not_about_lazy_tensors_is_not_tried_twice(llama: Path) -> None:
    with pytest.raises(TypeError, match="nonsense"):
        LlamaForCausalLM.from_pretrained(packed(llama), nonsense=3)


def test_a_tensor_that_the_model_did_not_get_is_missed(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a transformers that passes over what it does not know."""
    name = "model.layers.1.mlp.down_proj.weight"
    into = Reading.into
    monkeypatch.setattr(
        Reading, "into", lambda self, load: into(self, lambda found: load(_without_name(found, name)))
    )
    with pytest.raises(InputError, match=name):
        AutoModelForCausalLM.from_pretrained(packed(llama))


def _without_name(found: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in found.items() if key != name}


# Whichever is imported first


def run(code: str, *argv: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env=cli_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )


LOAD = "import sys; print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.norm.weight.sum().item())"
IMPORT = "from transformers import AutoModelForCausalLM"
KNOWN = """
from transformers import PreTrainedModel
assert PreTrainedModel.from_pretrained.__module__ == "lpsparse.integrations.loader"
"""


@pytest.mark.parametrize(
    "imports",
    [
        ("import lpsparse", "import transformers"),
        ("import transformers.modeling_utils", "import lpsparse"),
        ("import lpsparse", "import transformers.core_model_loading"),
        ("import lpsparse", "import transformers.quantizers.auto"),
    ],
)
def test_either_may_be_imported_first(imports: tuple[str, ...]) -> None:
    done = run("\n".join([*imports, KNOWN]))
    assert done.returncode == 0, done.stderr


def test_transformers_may_be_imported_first_and_opens_a_packed_folder(llama: Path) -> None:
    done = run("\n".join([IMPORT, "import lpsparse", LOAD]), packed(llama))
    assert float(done.stdout) == AutoModelForCausalLM.from_pretrained(llama).model.norm.weight.sum().item()


def test_without_lpsparse_a_packed_folder_is_an_oserror(llama: Path) -> None:
    done = run("\n".join([IMPORT, LOAD]), packed(llama))
    assert done.returncode
    assert "OSError" in done.stderr.splitlines()[-1]


def test_import_lpsparse_before_transformers_loads_nothing_more() -> None:
    tell = "import sys, json; print(json.dumps(sorted(sys.modules)))"
    alone, both = (
        set(json.loads(run(f"{first}import transformers\n{tell}").stdout))
        for first in ("", "import lpsparse\n")
    )
    assert "torch" not in both - alone
    assert {name.partition(".")[0] for name in both - alone} - set(sys.stdlib_module_names) == {"lpsparse"}


# The entry


@pytest.mark.parametrize("config", ["{}", '{"a": 1}', '{\n  "a": {"b": [1]}\n}\n', '{"a": "}"\n\n}  \n'])
def test_an_entry_put_in_and_taken_out_leaves_every_byte(config: str, llama: Path) -> None:
    entry = quantization_entry(open_checkpoint(packed(llama)))
    told = with_entry(config, entry)
    assert parse_entry(json.loads(told)["quantization_config"]).model_dump() == entry
    assert json.loads(told) == json.loads(config) | {"quantization_config": entry}
    assert with_entry(told, entry) == told
    assert without_entry(told) == config == without_entry(config)


def test_an_entry_that_somebody_reformatted_is_taken_out(llama: Path) -> None:
    told = with_entry('{"a": 1}', quantization_entry(open_checkpoint(packed(llama))))
    assert json.loads(without_entry(json.dumps(json.loads(told), indent=4))) == {"a": 1}


@pytest.mark.parametrize("key", ["quantization_config", "text_config"])
def test_a_config_that_is_quantised_otherwise_is_refused(key: str) -> None:
    other = {"quant_method": "fp8"}
    config = json.dumps({key: other if key == "quantization_config" else {"quantization_config": other}})
    with refuses("LPS362"):
        with_entry(config, {})
    assert without_entry(config) == config
