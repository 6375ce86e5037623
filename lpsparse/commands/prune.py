"""Cut the smallest weights of a checkpoint, or of the components of a pipeline, to exact zeros."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from lpsparse.checkpoint.components import asked_components
from lpsparse.checkpoint.counting import count_all
from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.opening import Checkpoint
from lpsparse.checkpoint.output import shared_folder
from lpsparse.checkpoint.preflight import check_output
from lpsparse.checkpoint.rewrite import rewrite
from lpsparse.checkpoint.writer import copy_sidecars, find_sidecars
from lpsparse.commands.artefact import Say, called_after, check_left, emptied, stamps_of, writing
from lpsparse.commands.base import on_threads, opened, silent
from lpsparse.commands.pack import say_nonfinite
from lpsparse.commands.preview import foretell, foretell_unread, say_left
from lpsparse.parallel.threads import on_rank_0
from lpsparse.pruning.plan import plan_prune
from lpsparse.pruning.targets import Chosen, choose, kept_in_words, refuse_quantised
from lpsparse.reporting.measure import own_quality
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import drained
from lpsparse.steps.prune import PruneStep


@on_threads
def prune_step(step: PruneStep, say: Say = silent) -> Report | dict[str, Any]:
    """With dry_run of a hub id that would have to be downloaded: what its headers tell, as plain data."""
    if step.dry_run and on_rank_0(lambda: is_remote(step.model)):
        return on_rank_0(lambda: foretell_unread(step, say))
    source, found = _prune(step, say)
    if not step.dry_run:
        check_left(source, found, step.out, say, allow_empty=step.allow_empty)
    return found


@on_threads
def prune_components(step: PruneStep, say: Say = silent) -> dict[str, Report]:
    """Each component that was asked for, pruned by itself into OUT's folder of its name; the rest of the
    pipeline is copied. With dry_run nothing is written."""
    folder, out = Path(step.model), step.out
    names = on_rank_0(lambda: asked_components(folder, step.component))
    rest = Checkpoint(folder.resolve().name, folder, (), (), {})
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    on_rank_0(lambda: check_output(out, rest, size, overwrite=False))
    for name in names:  # before the first is written
        refuse_quantised(opened(str(folder / name), silent))
    pruned: dict[str, tuple[Checkpoint, Report]] = {}

    def prune_each(into: Callable[[str], Path]) -> None:
        for name in names:
            say(f"component {name}")
            one = step.model_copy(update={"model": str(folder / name), "out": into(name), "component": ()})
            source, found = _prune(one, say)
            pruned[name] = source, called_after(found, out / name)

    if step.dry_run:
        prune_each(lambda _: out)
        left = find_sidecars(rest, names)[1]
    else:
        with shared_folder(out, overwrite=False) as partial:
            prune_each(partial.__truediv__)
            left = on_rank_0(lambda: copy_sidecars(rest, partial, names))
    if left:
        say(f"{'would be ' if step.dry_run else ''}left behind: {', '.join(left)}")
    for name, (source, found) in pruned.items() if not step.dry_run else ():
        check_left(source, found, out / name, say, allow_empty=step.allow_empty)
    return {name: found for name, (_, found) in pruned.items()}


def _prune(step: PruneStep, say: Say) -> tuple[Checkpoint, Report]:
    began = perf_counter()
    source = opened(step.model, say, step.weights, step.key)
    refuse_quantised(source)
    stamps = stamps_of(source)
    on_rank_0(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    chosen = choose(source, step.include, step.exclude, always_look=step.look)
    plan = plan_prune(source, step, chosen)
    say(kept_in_words(chosen))
    if plan.band is not None:
        band = plan.band
        below = f"{band.below:,} of {band.total:,} weights below"
        wide = f" ({band.decades:.1f} decades)" if band.low > 0 else ": nothing between exact zeros and that"
        say(f"band from {band.low:.3g} to {band.high:.3g}{wide}, {below}")
    if plan.threshold is not None:
        say(f"threshold {plan.threshold:.6g}")
    if step.dry_run:
        say("dry run: nothing is written; the zeros are those that the cut would leave")
        say_left(source, say)
        decided = perf_counter()
        counts = count_all(source, plan.cut)
        took = (decided - began, perf_counter() - decided)
        found = foretell(step, source, chosen, counts, took, plan.cut)
        if not step.allow_empty and (names := emptied(source, found)):
            say(f"the run would exit 1, as next to nothing is left of {names}; --allow-empty allows it")
        return source, found
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        cut = [tensor for tensor in source.tensors if chosen[tensor.name].prunable]
        written = rewrite(source, folder, plan.cut, step.layout, finite=_finite(chosen))
        say_nonfinite(written, say)
        counts = written.counts
        alert = drained((tensor.name, counts[tensor.name].zeros, tensor.size) for tensor in cut)
        if alert is not None:
            say(str(alert))
        quality = own_quality(source)
        same = bool(quality) and counts == count_all(source)
        if quality and not same:
            say(
                "quality recorded in MODEL is left out: the cut changed weights; measure again with "
                "`lpsparse eval OUT --against DENSE --save`, DENSE being the model before any cut"
            )
        return source, finish(written, quality if same else ())


def _finite(chosen: Chosen) -> set[str]:
    """The tensors that may hold no NaN or Inf: all but masks, often made of -Inf, and what --exclude
    takes out."""
    return {name for name, each in chosen.items() if each.role != "mask" and each.reason != "--exclude"}
