"""What `--dry-run` of prune, pack and unpack shows: what OUT would be, and what it would take."""

from lpsparse.checkpoint.counting import Count, Cuts
from lpsparse.checkpoint.files import find_sidecars
from lpsparse.checkpoint.open import Checkpoint, no_key
from lpsparse.checkpoint.preflight import check_output
from lpsparse.commands.artefact import Say, called_after
from lpsparse.commands.results import FileSize, RemotePreview, TensorOutlook
from lpsparse.families import LAYOUTS
from lpsparse.pruning.plan import plan_unread
from lpsparse.pruning.targets import Chosen, choose, kept_in_words, refuse_quantised
from lpsparse.reporting.estimate import estimate, report_of
from lpsparse.reporting.records import Report
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep


def foretell(
    step: PruneStep | PackStep | UnpackStep,
    source: Checkpoint,
    chosen: Chosen,
    counts: dict[str, Count],
    took: tuple[float, float],
    cut: Cuts = lambda _: None,
) -> Report:
    """What a dry run shows: the report of OUT, and what it would take."""
    layout, level = str(getattr(step, "layout", "dense")), str(getattr(step, "level", "default"))
    found = report_of(source, chosen, counts, layout, cut, level)
    size = found.bytes.file_bytes
    # All is counted as it is written and read back; packing and unpacking take as long as four counts each.
    took = took[0], took[1] * (2 if LAYOUTS[layout].is_plain else 10)
    needs = estimate(source, step.out, weight_bytes=size, threads=step.threads, took=took)
    return called_after(found.model_copy(update={"estimate": needs}), step.out)


def say_left(source: Checkpoint, say: Say) -> None:
    """What of the source's files would not be in OUT."""
    left = find_sidecars(source)[1]
    if left:
        say(f"would be left behind: {', '.join(left)}")


def foretell_unread(step: PruneStep, say: Say) -> RemotePreview:
    """What can be known of `step` without downloading MODEL."""
    from lpsparse.hub.headers import read_remote

    if step.key is not None:  # headers are those of safetensors
        raise no_key(step.model, step.key)
    remote = read_remote(step.model, step.weights)
    source = remote.checkpoint
    refuse_quantised(source)
    check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite)
    chosen = choose(source, step.include, step.exclude, always_look=step.look)
    plan = plan_unread(source, step, chosen)
    say(kept_in_words(chosen))
    say("dry run from headers alone: MODEL is not in the local cache; no weights are fetched")
    if plan.zeros is None:
        rule = "--gap" if step.gap else "--below"
        say(f"the number of weights that {rule} cuts depends on their values: not known")
    needs = estimate(
        source,
        step.out,
        weight_bytes=source.dense_bytes,
        sidecar_bytes=remote.sidecar_bytes,
        threads=step.threads,
    )
    tensors = (
        TensorOutlook(
            tensor.name,
            tensor.dtype,
            tensor.shape,
            tensor.file,
            tensor.nbytes,
            chosen[tensor.name].prunable,
            chosen[tensor.name].reason,
            plan.each.get(tensor.name),
        )
        for tensor in source.tensors
    )
    return RemotePreview(
        model=source.name,
        revision=source.revision,
        from_headers_alone=True,
        files=tuple(FileSize(name, size) for name, size in remote.files.items()),
        download_bytes=remote.download_bytes,
        weights=sum(tensor.size for tensor in source.tensors),
        prunable_weights=sum(each.size for each in source.tensors if chosen[each.name].prunable),
        zeros_at_least=plan.zeros,
        estimate=needs,
        tensors=tuple(tensors),
    )
