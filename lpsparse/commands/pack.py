"""Store a checkpoint losslessly in a packed layout, or densely again."""

from time import perf_counter

from lpsparse.checkpoint.counting import count_all
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.preflight import check_output
from lpsparse.checkpoint.write import Written, rewrite
from lpsparse.commands.artefact import Say, stamps_of, writing
from lpsparse.commands.base import on_threads, opened, silent
from lpsparse.commands.checks import Checked, Held
from lpsparse.commands.preview import foretell, say_left
from lpsparse.families import RETIRED_LAYOUTS
from lpsparse.parallel.threads import on_rank_0
from lpsparse.pruning.targets import Chosen, refuse_quantised
from lpsparse.reporting.measure import own_quality, prunable_of
from lpsparse.reporting.records import Report
from lpsparse.steps.pack import PackStep, UnpackStep


def say_nonfinite(written: Written, say: Say) -> None:
    for name, counted in written.counts.items():
        if counted.nonfinite:
            say(f"{name!r}: {counted.nonfinite} values are NaN or Inf; kept as they are")


@on_threads
def pack_step(step: PackStep | UnpackStep, say: Say = silent) -> Report:
    """Write the values of MODEL in another layout: that of the step, of `unpack` the dense one."""
    source, chosen = _opened(step, say)
    stamps = stamps_of(source)
    with writing(step, source, stamps, chosen, say) as (folder, finish):
        layout, level = str(getattr(step, "layout", "dense")), str(getattr(step, "level", "default"))
        written = rewrite(source, folder, lambda _: None, layout, level=level, finite=())
        say_nonfinite(written, say)
        return finish(written, own_quality(source))


@on_threads
def preview(step: PackStep | UnpackStep, say: Say = silent) -> Report:
    """What `pack_step` would write. Writes nothing."""
    source, chosen = _opened(step, say)
    say("dry run: nothing is written")
    say_left(source, say)
    began = perf_counter()
    counts = count_all(source)
    return foretell(step, source, chosen, counts, (0, perf_counter() - began))


def check(step: PackStep | UnpackStep, held: Held) -> Checked:
    """Nothing of a packed result depends on names."""
    return Checked(renamed=held.renamed)


def _opened(step: PackStep | UnpackStep, say: Say) -> tuple[Checkpoint, Chosen]:
    source = opened(step.model, say, step.weights, step.key)
    if source.layout in RETIRED_LAYOUTS:
        refuse_quantised(source)
    chosen = on_rank_0(lambda: prunable_of(source))
    on_rank_0(lambda: check_output(step.out, source, source.dense_bytes, overwrite=step.overwrite))
    return source, chosen
