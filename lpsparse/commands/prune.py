"""Cut the smallest weights of a checkpoint, or of the components of a pipeline, to exact zeros."""

from pathlib import Path
from time import perf_counter

from lpsparse.checkpoint.counting import count_all
from lpsparse.checkpoint.files import copy_sidecars, find_sidecars
from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.names import asked_components
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.preflight import check_output
from lpsparse.checkpoint.transaction import shared_folder
from lpsparse.checkpoint.write import rewrite
from lpsparse.commands.artefact import Say, called_after, check_left, emptied, stamps_of, writing
from lpsparse.commands.base import on_threads, opened, silent
from lpsparse.commands.checks import Checked, Held, without_unknown
from lpsparse.commands.pack import say_nonfinite
from lpsparse.commands.preview import foretell, foretell_unread, say_left
from lpsparse.commands.results import RemotePreview
from lpsparse.parallel.threads import on_rank_0
from lpsparse.pruning.plan import Plan, plan_prune, plan_unread
from lpsparse.pruning.targets import Chosen, choose, kept_in_words, refuse_quantised
from lpsparse.reporting.measure import own_quality
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import drained
from lpsparse.steps.prune import PruneStep


@on_threads
def prune_step(step: PruneStep, say: Say = silent) -> Report:
    source, found = _prune(step, say)
    check_left(source, found, step.out, say, allow_empty=step.allow_empty)
    return found


@on_threads
def preview(step: PruneStep, say: Say = silent) -> Report | RemotePreview:
    """What `prune_step` would leave. Writes nothing; of a hub id that would have to be downloaded it reads
    the headers alone."""
    if on_rank_0(lambda: is_remote(step.model)):
        return on_rank_0(lambda: foretell_unread(step, say))
    return _preview(step, say)


def check(step: PruneStep, held: Held) -> Checked:
    """What is known of the step before it runs. Raises what it would raise for names and shapes."""
    refuse_quantised(held.checkpoint)
    step, notes = without_unknown(step, held, "include", "exclude", renamed=held.renamed)
    chosen = choose(held.checkpoint, step.include, step.exclude, always_look=step.look)
    plan_unread(held.checkpoint, step, chosen)
    return Checked(chosen, notes, held.renamed)


@on_threads
def prune_components(step: PruneStep, say: Say = silent) -> dict[str, Report]:
    """Each component that was asked for, pruned by itself into OUT's folder of its name; the rest of the
    pipeline is copied."""
    names, rest = _components(step)
    pruned: dict[str, tuple[Checkpoint, Report]] = {}
    with shared_folder(step.out, overwrite=False) as partial:
        for name in names:
            say(f"component {name}")
            source, found = _prune(_component(step, name, partial / name), say)
            pruned[name] = source, called_after(found, step.out / name)
        left = on_rank_0(lambda: copy_sidecars(rest, partial, names))
    if left:
        say(f"left behind: {', '.join(left)}")
    for name, (source, found) in pruned.items():
        check_left(source, found, step.out / name, say, allow_empty=step.allow_empty)
    return {name: found for name, (_, found) in pruned.items()}


@on_threads
def preview_components(step: PruneStep, say: Say = silent) -> dict[str, Report]:
    """What `prune_components` would leave. Writes nothing."""
    names, rest = _components(step)
    found: dict[str, Report] = {}
    for name in names:
        say(f"component {name}")
        found[name] = called_after(_preview(_component(step, name, step.out), say), step.out / name)
    left = find_sidecars(rest, names)[1]
    if left:
        say(f"would be left behind: {', '.join(left)}")
    return found


def _components(step: PruneStep) -> tuple[list[str], Checkpoint]:
    """The components to prune, and all else of the pipeline. Refuses before the first is written."""
    folder = Path(step.model)
    names = on_rank_0(lambda: asked_components(folder, step.component))
    rest = Checkpoint(folder.resolve().name, folder, (), (), {})
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    on_rank_0(lambda: check_output(step.out, rest, size, overwrite=False))
    for name in names:
        refuse_quantised(opened(str(folder / name), silent))
    return names, rest


def _component(step: PruneStep, name: str, out: Path) -> PruneStep:
    return step.model_copy(update={"model": str(Path(step.model) / name), "out": out, "component": ()})


def _opened(step: PruneStep, say: Say) -> Checkpoint:
    source = opened(step.model, say, step.weights, step.key)
    refuse_quantised(source)
    on_rank_0(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    return source


def _plan(step: PruneStep, source: Checkpoint, say: Say) -> tuple[Plan, Chosen]:
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
    return plan, chosen


def _preview(step: PruneStep, say: Say) -> Report:
    began = perf_counter()
    source = _opened(step, say)
    plan, chosen = _plan(step, source, say)
    say("dry run: nothing is written; the zeros are those that the cut would leave")
    say_left(source, say)
    decided = perf_counter()
    counts = count_all(source, plan.cut)
    took = (decided - began, perf_counter() - decided)
    found = foretell(step, source, chosen, counts, took, plan.cut)
    if not step.allow_empty and (names := emptied(source, found)):
        say(f"the run would exit 1, as almost nothing is left of {names}; --allow-empty allows it")
    return found


def _prune(step: PruneStep, say: Say) -> tuple[Checkpoint, Report]:
    source = _opened(step, say)
    stamps = stamps_of(source)
    plan, chosen = _plan(step, source, say)
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        written = rewrite(source, folder, plan.cut, step.layout, finite=_finite(chosen))
        say_nonfinite(written, say)
        counts = written.counts
        cut = [tensor for tensor in source.tensors if chosen[tensor.name].prunable]
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
