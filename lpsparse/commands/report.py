"""Measure a checkpoint by its files alone, and check budgets."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lpsparse.checkpoint.files import MANIFEST, REPORT, check_report_file, write_beside
from lpsparse.checkpoint.manifest import hash_of, own_manifest, source_of
from lpsparse.checkpoint.open import Checkpoint
from lpsparse.commands.artefact import Say, called_after
from lpsparse.commands.base import on_threads, opened, silent
from lpsparse.commands.checks import NOT_YET, Checked, Held, matches, without_unknown
from lpsparse.errors import InputError, UsageError
from lpsparse.families import BUDGETS, VIEWS
from lpsparse.parallel.environment import is_rank_0
from lpsparse.pruning.targets import Decision
from lpsparse.reporting.budgets.base import no_tensor
from lpsparse.reporting.budgets.check import check_baseline, check_budgets
from lpsparse.reporting.changes import changes
from lpsparse.reporting.check import check_weights
from lpsparse.reporting.history import is_report, read_history, read_report
from lpsparse.reporting.matching import left_behind, match
from lpsparse.reporting.measure import (
    beside_base,
    compare,
    identity_of,
    made_by,
    measure,
    not_measured,
    prunable_of,
)
from lpsparse.reporting.records import Report
from lpsparse.reporting.spectra import spectra
from lpsparse.steps.base import about, flag
from lpsparse.steps.report import ReportStep
from lpsparse.steps.resolve import resolve


@on_threads
def report_step(step: ReportStep, say: Say = silent) -> Report:
    """Measure MODEL and check budgets. If MODEL is a report.json, only the budgets are checked again."""
    found = _reread(step) if is_report(step.model) else _measured(step, say)
    if step.baseline is not None:
        found = check_baseline(found, read_report(step.baseline), step)
    return check_budgets(found, step)


def check(step: ReportStep, held: Held) -> Checked:
    """What is known of the step before it runs. Raises UsageError for patterns of tensors that cannot be
    there."""
    notes: list[str] = []
    for name, kind in BUDGETS.items():
        for text in getattr(step, kind.field, ()):
            pattern = kind.limit(text).pattern
            if pattern is None or matches(pattern, held):
                continue
            if not held.renamed:
                raise no_tensor(f"--{name} {text}")
            notes.append(f"{pattern}: {NOT_YET}")
    bare, unknown = without_unknown(step, held, "include", "exclude", renamed=held.renamed)
    if held.chosen is not None and not bare.include and not bare.exclude:
        chosen = held.chosen  # what the manifest will say
    else:
        chosen = prunable_of(held.checkpoint, bare.include, bare.exclude)
    return Checked(chosen, (*notes, *unknown), held.renamed)


def report_on(model: str | Path) -> Report:
    """The report of a checkpoint without budgets."""
    return report_step(resolve(ReportStep, {"model": str(model)}))


def write_report(step: ReportStep, files: Mapping[str, Path], say: Say = silent) -> Report:
    """`report_step`, written to these files by view. Raises UsageError and OutputError for files that cannot
    be written. If there is no report, files of an earlier run are renamed to `.old`."""
    places = [path.resolve() for path in files.values()]
    twice = [str(path) for path in files.values() if places.count(path.resolve()) > 1]
    if twice:
        raise UsageError(
            292, f"{twice[0]}: two views cannot be written to one file", hint="give each its own FILE"
        )
    for path in files.values():
        read = (step.model, step.base, None if step.baseline is None else str(step.baseline))
        check_report_file(path, read)
    left = list(files.values()) if is_rank_0() else []
    try:
        found = report_step(step, say)
        for view, path in files.items() if is_rank_0() else ():
            write_beside(path, VIEWS[view].render(found))
            left.remove(path)
    except BaseException:
        for path in left:
            with suppress(OSError):
                if path.is_file():
                    path.replace(path.with_name(path.name + ".old"))
        raise
    return found


def _reread(step: ReportStep) -> Report:
    check_reread(step)
    path, found = Path(step.model), read_report(Path(step.model))
    found = found.model_copy(update={"budgets": (), "baseline": None})
    is_of_out = path.name == REPORT and path.with_name(MANIFEST).is_file()
    return called_after(found, path.parent) if is_of_out else found


def check_reread(step: ReportStep) -> None:
    """Raises UsageError for settings that need the checkpoint itself."""
    kept = ("Budgets", "Hardware")  # panels of what a report that is read again may be asked
    known = ((name, each.panel) for name, each in about(ReportStep).items() if name != "model")
    given = [flag(name) for name, panel in known if panel not in kept and not step.at_default(name)]
    if given:
        what = f"{step.model}: is a report.json; {', '.join(given)} needs the checkpoint itself"
        raise UsageError(291, what, hint="give the checkpoint as MODEL")


def _measured(step: ReportStep, say: Say) -> Report:
    strict = step.base is None  # else --key may be meant for BASE, and goes to both
    checkpoint = opened(step.model, say, step.weights, step.key, needed=False, strict=strict)
    manifest = own_manifest(checkpoint)
    quality = () if manifest is None else manifest.quality
    found = measure(checkpoint, include=step.include, exclude=step.exclude, quality=quality)
    check_weights(checkpoint, found)
    began = manifest.source.base_sha256 if manifest else None
    if step.base is not None:
        found, base_sha256 = _compared(step.base, checkpoint, found, step, say)
        began = began or base_sha256
    if step.spectra:
        values = spectra(checkpoint, {row.name for row in found.tensors if row.prunable})
        rows = [replace(row, spectrum=values.get(row.name)) for row in found.tensors]
        found = found.model_copy(update={"tensors": tuple(rows)})
    more: dict[str, Any] = {
        "identity": identity_of(found, began),
        "training": read_history(checkpoint.root),
        "not_measured": not_measured(found),
    }
    if manifest is not None:
        more["made"] = made_by(manifest, {path.name for path in checkpoint.files})
    return found.model_copy(update=more)


def _compared(
    model: str, checkpoint: Checkpoint, found: Report, step: ReportStep, say: Say
) -> tuple[Report, str | None]:
    """The report beside BASE, and the hash of the weights that BASE's own chain of steps began with."""
    if is_report(model):
        what = f"{model}: a report; BASE is the checkpoint that MODEL came from"
        raise UsageError(293, what, hint=f"did you mean --baseline {model}?")
    base = opened(model, say, key=step.key, strict=not checkpoint.is_torch)
    found_of = match(checkpoint, base)
    names, ours = found_of.names, {row.name: row for row in found.tensors}
    if not any(ours[names[each.name]].shape == each.shape for each in base.tensors if each.name in names):
        what = f"{base.name}: has no tensor of the names and shapes of {checkpoint.name}: not comparable"
        raise InputError(353, what, hint="give the checkpoint that MODEL was made from as BASE")
    # The same weights are counted of both.
    counted = {theirs: Decision(ours[mine].prunable, ours[mine].reason) for theirs, mine in names.items()}
    chosen = prunable_of(base, step.include, step.exclude, strict=False) | counted
    beside = measure(base, chosen, patterns=False)
    check_weights(base, beside)
    manifest = own_manifest(checkpoint)
    made_of = manifest and (hash_of(manifest.source.files), manifest.source.base_sha256)
    source = source_of(base)
    is_source = made_of is not None and hash_of(source.files) in made_of
    known = own_manifest(base)
    quality = beside_base(found.quality, known.quality if known else (), base.name)
    found = found.model_copy(update={"quality": quality})
    changed, left = changes(checkpoint, base, names), left_behind(checkpoint, base, found_of)
    return compare(found, beside, changed, names, left, is_source=is_source), source.base_sha256
