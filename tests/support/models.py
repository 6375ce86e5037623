"""Small models and the settings to train them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from support.files import ROOT
from torch import nn

from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.model import Loaded
from lpsparse.training.tasks.base import Task

BUNDLED = ROOT / "lpsparse" / "bundled" / "stories260k"


LM = {
    "task": "causal-lm",
    "data": "bundled:shakespeare",
    "eval_split": "validation[:4000]",
    "split": "train[:9000]",
}


SMALL = {**LM, "max_length": 32, "batch_size": 8, "steps": 12, "lr": 1e-3, "log_every": 4}


ROWS = [("a fine and moving film", "good"), ("dull , empty and far too long", "bad")] * 20


NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))
"""


def built(path: Path, code: str, *, seed: int) -> dict[str, Any]:
    """Write `code` to `path`; the state dict of what its `build` makes."""
    import torch

    path.write_text(code)
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(seed)
    return names["build"]().state_dict()


FAULTY = """
import os
import signal
import torch
from torch import nn

class Net(nn.Module):
    # Does what TEST_FAULT says: RANK:CALL:WHAT, ... at its CALL-th training pass on process RANK.

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(48, 13), nn.ReLU(), nn.Dropout(0.1), nn.Linear(13, 12), nn.ReLU(),
            nn.Linear(12, 4),
        )
        self.calls = 0

    def forward(self, x):
        if not self.training:
            return self.body(x)
        self.calls += 1
        faults = [fault.split(":") for fault in (os.environ.get("TEST_FAULT") or "0:0:").split(",")]
        here = os.environ.get("RANK", "0"), str(self.calls)
        what = next((what for rank, call, what in faults if (rank, call) == here), None)
        if what is None:
            return self.body(x)
        if what == "memory":
            torch.empty(2**50)
        if what == "perturb":
            self.body[1].weight.data.add_(1)
            return self.body(x)
        if what in ("nan", "spike"):
            return self.body(x) * (float("nan") if what == "nan" else 1e3)
        for name in what.split("+"):
            signal.raise_signal(getattr(signal, name))
        return self.body(x)

def build():
    return Net()
"""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(7, 5)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)) for _ in range(3)
        )
        self.head = nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def task_of(net: nn.Module) -> Task:
    return Task(
        Loaded(net, {}, (), ()),
        [],
        [],
        collate=lambda examples: {},
        metric="accuracy",
        unit="rows",
        predict=lambda model, batch: (model(batch["x"]), batch["y"]),
    )


def step_of(**options: object) -> FinetuneStep:
    return resolve(FinetuneStep, {"model": "m", "out": "o", "data": "d", "task": "causal-lm", **options})


def batch_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"x": torch.randn(11, 7, generator=generator), "y": torch.arange(11) % 4}


def saved(model: Any, folder: Path, tokenizer_of: Path | None = None) -> Path:
    model.save_pretrained(folder)
    if tokenizer_of is not None:
        for path in tokenizer_of.glob("tokenizer*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def gpt2(folder: Path) -> Path:
    config = transformers.GPT2Config(
        vocab_size=512,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    return saved(transformers.GPT2LMHeadModel(config), folder, BUNDLED)


def llama(folder: Path, layers: int = 2) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return saved(transformers.LlamaForCausalLM(config), folder, BUNDLED)


def gemma(folder: Path) -> Path:
    """Stored in bfloat16; it has a buffer that is computed."""
    config = transformers.GemmaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
    )
    return saved(transformers.GemmaForCausalLM(config).bfloat16(), folder, BUNDLED)


def experts(folder: Path) -> Path:
    config = transformers.MixtralConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=64,
    )
    return saved(transformers.MixtralForCausalLM(config), folder, BUNDLED)
