"""List what a checkpoint holds, from its headers."""

from lpsparse.commands.artefact import Say
from lpsparse.commands.base import opened, silent
from lpsparse.commands.results import FileSize, Listing, TensorFacts
from lpsparse.reporting.measure import prunable_of
from lpsparse.steps.report import InspectStep


def inspect_step(step: InspectStep, say: Say = silent) -> Listing:
    checkpoint = opened(step.model, say, step.weights, step.key, needed=False)
    chosen = prunable_of(checkpoint, always_look=step.look)
    tensors = (
        TensorFacts(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            tensor.file,
            tensor.layout,
            tensor.stored_bytes,
            chosen[tensor.name].prunable,
            chosen[tensor.name].reason,
            chosen[tensor.name].role,
            chosen[tensor.name].by,
        )
        for tensor in checkpoint.tensors
    )
    return Listing(
        model=checkpoint.name,
        revision=checkpoint.revision,
        layout=checkpoint.layout,
        files=tuple(FileSize(path.name, path.stat().st_size) for path in checkpoint.files),
        weights=sum(tensor.size for tensor in checkpoint.tensors),
        prunable_weights=sum(each.size for each in checkpoint.tensors if chosen[each.name].prunable),
        tensors=tuple(tensors),
        notes=tuple(checkpoint.notes),
    )
