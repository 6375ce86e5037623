"""List what a checkpoint holds, from its headers."""

from typing import Any

from lpsparse.commands.artefact import Say
from lpsparse.commands.base import opened, silent
from lpsparse.reporting.measure import prunable_of
from lpsparse.steps.report import InspectStep


def inspect_step(step: InspectStep, say: Say = silent) -> dict[str, Any]:
    checkpoint = opened(step.model, say, step.weights, step.key, needed=False)
    chosen = prunable_of(checkpoint, always_look=step.look)
    tensors = [
        {
            "name": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": tensor.file,
            "layout": tensor.layout,
            "bytes": tensor.stored_bytes,
            "prunable": chosen[tensor.name].prunable,
            "reason": chosen[tensor.name].reason,
            "role": chosen[tensor.name].role,
            "told_by": chosen[tensor.name].by,
        }
        for tensor in checkpoint.tensors
    ]
    return {
        "model": checkpoint.name,
        "revision": checkpoint.revision,
        "layout": checkpoint.layout,
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in checkpoint.files],
        "weights": sum(tensor.size for tensor in checkpoint.tensors),
        "prunable_weights": sum(tensor.size for tensor in checkpoint.tensors if chosen[tensor.name].prunable),
        "tensors": tensors,
        "notes": list(checkpoint.notes),
    }
