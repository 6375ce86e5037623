"""Train a checkpoint and write the result. Torch is imported where training begins, nowhere else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.hub import is_remote
from lpsparse.checkpoint.manifest import Quality, source_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.checkpoint.preflight import check_output
from lpsparse.checkpoint.write import follow, rewrite
from lpsparse.commands.artefact import Say, called_after, check_left, check_same, complete, recorded
from lpsparse.commands.base import opened, silent
from lpsparse.commands.checks import Checked, Held, check_files, check_model, matches, without_unknown
from lpsparse.commands.report import report_on
from lpsparse.commands.results import TrainingPreview
from lpsparse.families import TASKS
from lpsparse.parallel.environment import is_launched, is_rank_0
from lpsparse.parallel.threads import using_threads
from lpsparse.pruning.targets import Decision, choose, no_match, refuse_quantised
from lpsparse.reporting.estimate import estimate
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import drained_of
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import as_launched
from lpsparse.training import memory
from lpsparse.training.data import check_apart, held_out_of

_NOT_OURS = Decision(False, "not part of the model")


def finetune_step(step: FinetuneStep, say: Say = silent, on_step: Callable[[Any], None] = silent) -> Report:
    """Train and write.

    Every process of a launched job calls it; rank 0 writes and speaks. With --processes it starts them.
    """
    step, source = _opened(step, say)
    if step.processes is not None and step.processes > 1 and not is_launched():
        return _launch(step, quiet=say is silent)
    from lpsparse.parallel.ranks import lost_rank_errors

    with lost_rank_errors():
        return _train(step, source, say, on_step)


def preview(step: FinetuneStep, say: Say = silent) -> TrainingPreview:
    """What `finetune_step` would do. Loads the model and the data, and writes nothing."""
    step, source = _opened(step, say)
    say("dry run: nothing is written")
    say(f"loading {step.model}")
    from lpsparse.training.build import plan_training, prepare
    from lpsparse.training.precision import with_precision

    step, precision = with_precision(step)
    for note in precision:
        say(note)
    needs = estimate(source, step.out, weight_bytes=source.dense_bytes)
    planned = plan_training(step, prepare(step, source))
    planned |= {"kept": str(planned["kept"]), "fresh": tuple(planned["fresh"])}
    return TrainingPreview(
        model=source.name, **planned, disk_bytes=needs.disk_bytes, free_bytes=needs.free_bytes
    )


def check(step: FinetuneStep, held: Held) -> Checked:
    """What is known of the step before it runs. Raises what it would raise for data, names and patterns."""
    source = held.checkpoint
    refuse_quantised(source)
    check_model(step, source)
    known = step.eval_data or step.eval_split or not is_remote(step.data, "dataset")
    parts = held_out_of(step) if known else None
    wanted = {step.data: [step.split]}
    if parts is not None:
        wanted.setdefault(parts[0], []).append(parts[1])
    notes = check_files(step.task, wanted)
    if not notes and parts is not None:
        check_apart(step.data, step.split, *parts)
    renamed = held.renamed or (
        TASKS[step.task].fresh_head and step.model_fn is None and not _has_head(source)
    )
    step, unknown = without_unknown(step, held, "include", "exclude", "freeze", renamed=renamed)
    for pattern in step.freeze:
        if not matches(pattern, held):
            raise no_match("--freeze", pattern, [tensor.name for tensor in source.tensors])
    chosen = choose(source, step.include, step.exclude)
    trained, frozen = memory.trained_and_frozen(step, source.tensors)
    prunable = sum(tensor.size for tensor in source.tensors if chosen[tensor.name].prunable)
    took = memory.estimate(
        step, trained=trained, frozen=frozen, prunable=prunable, processes=step.processes or 1
    )
    return Checked(chosen, (*notes, *unknown), renamed, took.kept + took.peak, source.dense_bytes)


def _has_head(source: Checkpoint) -> bool:
    plain = choose(source, needed=False)
    return any(each.role == "head" and "pooler" not in name for name, each in plain.items())


def _opened(step: FinetuneStep, say: Say) -> tuple[FinetuneStep, Checkpoint]:
    step = as_launched(step)
    source = opened(step.model, say, step.weights, step.key)
    refuse_quantised(source)
    if is_rank_0():
        check_output(
            step.out, source, 2 * source.dense_bytes, overwrite=step.overwrite, reads=_data_files(step)
        )
    return step, source


def _train(step: FinetuneStep, source: Checkpoint, say: Say, on_step: Callable[[Any], None]) -> Report:
    say(f"loading {step.model}")  # torch and the data too, which takes seconds
    from lpsparse.parallel import launcher, ranks
    from lpsparse.training.build import prepare, start
    from lpsparse.training.loop import train
    from lpsparse.training.metrics import recording
    from lpsparse.training.model import trained_checkpoint
    from lpsparse.training.precision import with_precision
    from lpsparse.training.quality import held_of
    from lpsparse.training.state import find_states, made_by, training_folder

    launcher.end_with_launcher()
    asked = step
    step, precision = with_precision(asked)
    start(step)
    task = prepare(step, source, spread=False)
    notes = (*task.loaded.notes, *task.notes, *_about_held_out(step))
    for note in (*precision, *notes):
        say(note)
    if asked.mixed_precision == "auto":  # what it chose; a time that was measured differs from run to run
        notes = (*precision, *notes)
    recipe = recorded(asked)
    of_run = made_by(step, source, recorded(step))
    with training_folder(step) as folder:
        states = find_states(step, folder, of_run, say)
        with recording(step, states, on_step, say) as record:
            trained = train(step, task, record, say, states)
        written = trained_checkpoint(source, task.loaded)
        if not is_rank_0():
            follow(written)
            ranks.barrier()
            return report_on(step.out)
        say(f"writing {step.out}")
        with using_threads(1):  # a sharded tensor is gathered by all processes, one after another
            result = rewrite(written, folder, lambda _: None, "dense")
        held = held_of(step, task)
        quality = Quality(
            metric=task.metric,
            before=trained.before.of(task.metric) if trained.before else None,
            after=trained.after.of(task.metric),
            higher_is_better=task.higher_is_better,
            rows=trained.after.count,
            split=f"{recipe['finetune']['eval_split'] or 'held-out'} {task.unit}",
            before_error=trained.before.error_of(task.metric) if trained.before else None,
            after_error=trained.after.error_of(task.metric),
            data_sha256=held.sha256,
            of_cut=step.keep_zeros,
            task=step.task,
            data=held.names,
        )
        chosen = {t.name: trained.prunable.get(t.name, _NOT_OURS) for t in written.tensors}
        notes = (*notes, trained.facts)
        record = source_of(source)
        check_same(record, of_run["model"])
        found = complete(asked, source, record, folder, chosen, say, result, (quality,), task.sidecars, notes)
        alert = drained_of(found)
        if alert is not None:
            say(str(alert))
    ranks.barrier()
    check_left(source, found, step.out, say, allow_empty=step.allow_empty, trained=True)
    return called_after(found, step.out)


def _about_held_out(step: FinetuneStep) -> list[str]:
    """What there is to say of the rows that a fine-tune selects on."""
    from lpsparse.training.data import copies, find

    held = held_out_of(step)
    if held is None:
        return []
    said = [
        f"held-out {name} has the bytes of a training file: quality is of what trains"
        for name in copies(step.data, step.split, *held)
    ]
    if not (step.eval_data or step.eval_split):
        names = ", ".join(path.name for path in find(*held)[0])
        said.append(f"selects on {names}; --eval-fraction sets a share of the training data aside instead")
    return said


def _launch(step: FinetuneStep, *, quiet: bool) -> Report:
    """The step in `step.processes` processes, which say what there is to say; then what is in OUT."""
    from lpsparse.parallel import launcher

    words = ["finetune", step.model, str(step.out), *step.options(), "--json"]
    words += ["--quiet"] if quiet else []
    launcher.launch(step.processes or 1, words)
    return report_on(step.out)


def _data_files(step: FinetuneStep) -> list[Path]:
    """What a fine-tune reads beside MODEL, as far as it is local."""
    named = [step.data, step.eval_data or "", (step.model_fn or "").rpartition(":")[0]]
    return [Path(text) for text in named if text and Path(text).exists()]
