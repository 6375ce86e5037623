"""Check the decision about tensors on every architecture that builds small, against the built modules.

    python benchmarks/architectures.py [-v] [--open] [MODEL_TYPE ...]

Each model of transformers is built with a small config and random values and saved; `inspect` and `prune
--sparsity 0.8 --dry-run` read it. Nothing may be prunable that the module says is a bias, norm, router,
state, mask, token, position, embedding or head; every other weight of nn.Linear, a convolution or fused
experts must be. Prints what differs, and the share of the bytes on which names alone say other than modules.
With --open transformers also opens the pruned model, and its outputs must be those of the same mask in torch.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import lpsparse
from lpsparse.errors import LpsparseError
from lpsparse.pruning.targets import decide
from lpsparse.training.modules import roles_of

SMALL = {  # words in the names of a config's numbers -> what they become
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "dim": 64,
    "intermediate_size": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_ff": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 40,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 211,
    "max_position_embeddings": 72,
    "n_positions": 72,
    "max_source_positions": 72,
    "max_target_positions": 72,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 48,
    "rotary_dim": 8,
    "embedding_size": 64,
    "num_mel_bins": 16,
    "n_inner": None,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOST = 3_000_000  # weights of a model that is small
CLASSES = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "PRETRAINING",
    "",
)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS)
TASK_HEADS = ("cls", "classifier", "score", "predictions", "generator_predictions", "heads", "head")


def shrink(config: Any) -> Any:
    for part in [*(getattr(config, name, None) for name in getattr(config, "sub_configs", {})), config]:
        for name, value in SMALL.items():
            if isinstance(getattr(part, name, None), int) and not isinstance(getattr(part, name), bool):
                setattr(part, name, value)
        if isinstance(getattr(part, "layer_types", None), list):
            part.layer_types = part.layer_types[:1] + part.layer_types[-1:]
    return config


def model_of(kind: str) -> nn.Module | None:
    """A small model of an architecture; None where there is none that builds."""
    for name in CLASSES:
        table = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES")
        if kind in table:
            found = table[kind] if isinstance(table[kind], str) else table[kind][0]
            break
    else:
        return None
    try:
        maker: Any = getattr(transformers, found)
        with torch.device("meta"):
            made = maker(shrink(CONFIG_MAPPING[kind]()))
        if sum(param.numel() for param in made.parameters()) > MOST:
            return None
        torch.manual_seed(0)
        return maker(shrink(CONFIG_MAPPING[kind]()))
    except Exception:  # a config of these sizes is none, or a package is missing
        return None


def truth(model: Any) -> dict[str, str]:
    """What each tensor is, by the modules alone: weight, kept, or open where no module of torch's says it."""
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    base = getattr(model, "base_model_prefix", "")
    found = dict.fromkeys(model.state_dict(), "kept")
    for place, module in model.named_modules():
        for own, param in module.named_parameters(recurse=False):
            name = f"{place}.{own}" if place else own
            parts = place.split(".")
            task = parts[0] != base and any(part in TASK_HEADS or "head" in part for part in parts[:2])
            router = not {"gate", "router", "shared_expert_gate"}.isdisjoint(parts[-2:])
            if param.ndim < 2 or own.endswith("bias") or module is outputs or id(param) in embedded:
                continue
            kind = type(module).__name__
            if (
                isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention)
                or kind == "Conv1D"
            ):
                flat = sum(size != 1 for size in param.shape) < 2 and param.ndim > 2
                found[name] = "kept" if router or flat else "head" if task or is_pooler(parts) else "weight"
            elif kind.endswith("Experts") and own.endswith(("_proj", "weight", "w1", "w2", "w3")):
                found[name] = "weight"
            elif not isinstance(module, nn.Embedding) and "Router" not in kind and "Norm" not in kind:
                found[name] = "open"
    return found


def is_pooler(parts: list[str]) -> bool:
    """A pooler, or a pooling head of a vision tower: kept by default."""
    return any("pool" in part or part in ("head", "cls") or part.endswith("_head") for part in parts)


def check_outputs(model: Any, folder: Path) -> str:
    """What is wrong with the pruned model as transformers opens it, beside the same mask applied in torch."""
    out = folder.with_name("out")
    plan = lpsparse.prune(folder, out, sparsity=0.8, allow_empty=True)
    opened, info = type(model).from_pretrained(out, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]:
        return f"missing {info['missing_keys']}, unexpected {info['unexpected_keys']}"
    state = model.state_dict()
    names = [row.name for row in plan.tensors if row.prunable and row.name in state]
    if len(names) < sum(row.prunable for row in plan.tensors):
        return "names differ from the module's"
    values = torch.cat([state[name].abs().flatten() for name in names])
    limit = values.kthvalue(int(0.8 * values.numel())).values
    with torch.no_grad():
        for name in names:
            state[name].mul_(state[name].abs() > limit)
        given = inputs_of(model)
        first, second = (each.eval()(**given)[0] for each in (model, opened))
    return "" if torch.equal(first, second) else f"outputs differ by {(first - second).abs().max()}"


def inputs_of(model: Any) -> dict[str, Any]:
    """Random inputs of the kind that the model takes."""
    torch.manual_seed(1)
    name, words = model.main_input_name, torch.randint(3, 200, (1, 11))
    size = getattr(getattr(model.config, "vision_config", model.config), "image_size", 32)
    kinds: dict[str, Any] = {
        "input_ids": words,
        "input_values": torch.randn(1, 4000),
        "pixel_values": torch.randn(1, 3, size, size),
        "input_features": torch.randn(1, getattr(model.config, "num_mel_bins", 16), 144),
    }
    given = {name: kinds[name]}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = words
    if model.config.model_type == "clip":
        given["pixel_values"] = kinds["pixel_values"]
    return given


def compare(kind: str, model: Any, folder: Path) -> Iterator[str]:
    model.save_pretrained(folder)
    known = truth(model)
    told = {each["name"]: each for each in lpsparse.inspect(folder)["tensors"]}
    named = [(each["name"], each["dtype"], tuple(each["shape"])) for each in told.values()]
    config = json.loads((folder / "config.json").read_text())
    alone, looked = decide(named, config=config), decide(named, config=config, known=roles_of(model))
    try:
        plan = lpsparse.prune(folder, folder.with_name("out"), sparsity=0.8, dry_run=True)
        rows = {row.name: row.prunable for row in plan.tensors}
        yield from (
            f"{kind}: {n}: dry run and inspect differ" for n in rows if rows[n] != told[n]["prunable"]
        )
    except LpsparseError as error:
        yield f"{kind}: {error}"
    for name, each in told.items():
        should = known.get(name)
        if (should == "kept" and each["prunable"]) or (should == "weight" and not each["prunable"]):
            yield f"{kind}: {name} {each['shape']}: {each['role']} by {each['told_by']}, the module: {should}"
    weights = {each["name"]: each["bytes"] for each in told.values()}
    other = sum(weights[name] for name in told if alone[name].prunable != looked[name].prunable)
    share = other / sum(weights.values())
    matched = sum(name in known for name in told)
    print(
        f"{kind:<28}{len(told):>6} tensors {matched:>6} in the module {share:>8.2%} differ by names alone",
        flush=True,
    )
    if "-v" in sys.argv:
        others = [name for name in told if alone[name].prunable != looked[name].prunable]
        print(
            *(f"    {name}: {alone[name].role}, by its module {looked[name].role}" for name in others),
            sep="\n",
        )
    if share > 0.03:
        yield f"{kind}: names and modules differ on {share:.1%} of the bytes"


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kinds = [each for each in sys.argv[1:] if not each.startswith("-")] or sorted(CONFIG_MAPPING)
    problems: list[str] = []
    count = 0
    for kind in kinds:
        model = model_of(kind)
        if model is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                problems += compare(kind, model, Path(folder) / "model")
                if "--open" in sys.argv:
                    wrong = check_outputs(model, Path(folder) / "model")
                    print(f"    opened: {wrong or 'no missing or unexpected key, outputs equal'}")
                    problems += [f"{kind}: {wrong}"] if wrong else []
                count += 1
            except Exception as error:
                print(f"{kind}: not compared: {type(error).__name__}: {str(error)[:100]}", flush=True)
    print("\n".join(problems))
    print(json.dumps({"architectures": count, "differences": len(problems)}))


if __name__ == "__main__":
    main()
