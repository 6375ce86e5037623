"""In transformers' Trainer: a callback that does beside its loop what `lpsparse finetune` does in its own."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from lpsparse.errors import StateError, UsageError
from lpsparse.training.sparsity import Sparsity
from lpsparse.training.state import decode, encode, moved

_STATE = "lpsparse-state"


class SparsityCallback(TrainerCallback):
    """`Trainer(..., callbacks=[SparsityCallback(target_sparsity=0.8)])`.

    Options are those of `lpsparse.Sparsity`; steps and the peak learning rate of each group are the
    Trainer's. The learning rate of every step is the callback's. Its state is in each of the Trainer's
    checkpoints, from which it goes on. The target is met exactly where the Trainer stops early or ends by
    loading its best checkpoint, too: what is missing is cut then, which the logger `lpsparse` warns of.
    Raises UsageError for a weight decay of the Trainer's own, and for conditioning other than rows.
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.sparsity: Sparsity | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if args.weight_decay:
            what = f"weight_decay={args.weight_decay}: L_p decay takes its place"
            raise UsageError(251, what, hint="TrainingArguments(weight_decay=0)")
        if self.options.get("condition", "auto") not in ("auto", "none", "rows"):
            what = f"condition={self.options['condition']} is not for the Trainer, which clips too early"
            raise UsageError(252, what, hint="rows or none")
        self.sparsity = Sparsity(given["model"], given["optimizer"], steps=state.max_steps, **self.options)
        if state.global_step:
            named = args.resume_from_checkpoint  # where the Trainer was told so, else its own newest
            folder = Path(named) if isinstance(named, str) else Path(args.output_dir)
            own = f"checkpoint-{state.global_step}"
            self._load(self.sparsity, folder if folder.name == own else folder / own)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._running().before_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._running().after_backward()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._running().after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self._running().finish()

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.is_world_process_zero:
            tensors: dict[str, Tensor] = {}
            tree = encode(self._running().state_dict(), tensors)
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            save_file(tensors, folder / f"{_STATE}.safetensors")
            (folder / f"{_STATE}.json").write_text(json.dumps(tree), encoding="utf-8")

    def _load(self, sparsity: Sparsity, folder: Path) -> None:
        try:
            tree = json.loads((folder / f"{_STATE}.json").read_text(encoding="utf-8"))
            saved = decode(tree, load_file(folder / f"{_STATE}.safetensors"))
        except (OSError, ValueError, KeyError) as error:
            raise StateError(708, f"{folder}: no state of lpsparse: {error}", hint="start afresh") from error
        device = next(iter(sparsity.control.weights.values())).device
        sparsity.load_state_dict(moved(saved, device))

    def _running(self) -> Sparsity:
        assert self.sparsity is not None, "the Trainer has not begun"
        return self.sparsity
