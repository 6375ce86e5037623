"""The commands that build one step and call one function: what is shown of the result."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lpsparse.cli.bar import showing, working
from lpsparse.cli.options import Show, add_command
from lpsparse.cli.output import Json, Quiet, Voice, has_color, has_terminal, print_json, print_result, width
from lpsparse.errors import ExitCode
from lpsparse.reporting import text
from lpsparse.steps import finetune, pack, prune, push, report
from lpsparse.steps.table import COMMANDS

if TYPE_CHECKING:  # numpy comes with it, which --help can do without
    from lpsparse.commands.results import (
        Evaluation,
        Listing,
        RemotePreview,
        TensorFacts,
        TrainingPreview,
        Verification,
    )
    from lpsparse.reporting.records import Report
    from lpsparse.reporting.text import Fold


_SHOWN = 50  # differences that verify prints


def add(app: typer.Typer, name: str) -> None:
    """Register one of the commands of this module."""
    add_command(app, name, _SHOWS[name], examples=_EXAMPLES[name], full=name == "inspect")


def _result(step: Any, voice: Voice) -> Any:
    """What the step's function returns, or of a dry run its preview."""
    from lpsparse.commands.base import silent

    preview = COMMANDS[step.command].preview
    function = COMMANDS[step.command].load("preview" if preview and step.dry_run else "run")
    return function(step, silent if voice.quiet else voice.say)


def show_report(report: "Report", voice: Voice) -> None:
    from lpsparse.reporting import table

    print_result(table.render(report, width(), color=has_color(), full=voice.full))


def _wrote(step: Any, report: "Report", *, as_json: bool, voice: Voice) -> None:
    if as_json:
        print_json(report.as_data())
        return
    from lpsparse.reporting import table

    print_result((table.render if step.dry_run else table.summary)(report, width(), color=has_color()))
    if not step.dry_run:
        voice.say(f"wrote {step.out}")
        base = [] if step.weights else [step.model]  # a folder of several cannot be BASE
        key = ["--key", step.key] if base and step.key else []
        following = [["report", *key, str(step.out), *base]]
        packed, held = report.bytes.packed_bytes, report.bytes.file_bytes
        if packed is not None and packed < held and step.command != "unpack":
            following.append(["pack", str(step.out), f"{step.out}-packed"])
        for i, words in enumerate(following):
            voice.say(f"{'      ' if i else 'next: '}{_command(words)}", fit=False)  # to be pasted


def _command(words: list[str]) -> str:
    """A command to paste; a path that begins with a dash is no option."""
    name, *places = words
    options, places = (places[:2], places[2:]) if places[0] == "--key" else ([], places)
    ends = ["--"] if any(place.startswith("-") for place in places) else []
    return shlex.join(["lpsparse", name, *options, *ends, *places])


def _prune(step: prune.PruneStep, as_json: bool, voice: Voice) -> None:
    if step.component:
        _prune_components(step, as_json, voice)
        return
    with working(voice):
        found = _result(step, voice)
    if hasattr(found, "from_headers_alone"):
        _foretold(found, as_json=as_json)
    else:
        _wrote(step, found, as_json=as_json, voice=voice)


def _prune_components(step: prune.PruneStep, as_json: bool, voice: Voice) -> None:
    from lpsparse.commands.prune import preview_components, prune_components

    with working(voice):
        each = (preview_components if step.dry_run else prune_components)(step, voice.say)
    if as_json:
        print_json({name: found.as_data() for name, found in each.items()})
    for name, found in each.items() if not as_json else ():
        places = {"model": os.path.join(step.model, name), "out": step.out / name}
        _wrote(step.model_copy(update=places), found, as_json=False, voice=voice)


def _foretold(found: "RemotePreview", *, as_json: bool) -> None:
    if as_json:
        print_json(found.as_data())
        return
    from lpsparse.pruning.targets import in_short
    from lpsparse.reporting import table

    print_result(f"{text.clean(found.model)}@{found.revision}: from headers alone")
    print_result(
        f"  to be zero     {_known(found.zeros_at_least)} of {found.prunable_weights:,} prunable weights"
    )
    print_result(f"  all weights    {found.weights:,} (the values of all tensors)")
    print_result(f"  to download    {text.size(found.download_bytes)} into the hub's cache")
    print_result("\n".join(table.estimate_lines(found.estimate)) + "\n")
    body = [
        (
            text.clean(each.name),
            each.dtype,
            "x".join(map(str, each.shape)),
            text.size(each.bytes),
            _known(each.zeros_at_least) if each.prunable else "",
            "prunable" if each.prunable else in_short(each.reason),
        )
        for each in found.tensors
    ]
    head = ("tensor", "dtype", "shape", "bytes", "zeros", "")
    print_result("\n".join(text.columns(head, body, width())))


def _known(zeros: int | None) -> str:
    return "not known" if zeros is None else f"{zeros:,} or more"


def _pack(step: pack.PackStep | pack.UnpackStep, as_json: bool, voice: Voice) -> None:
    with working(voice):
        found = _result(step, voice)
    _wrote(step, found, as_json=as_json, voice=voice)


def _finetune(step: finetune.FinetuneStep, as_json: bool, voice: Voice) -> None:
    if voice.verbose:  # also in the processes that it starts
        os.environ["LPSPARSE_VERBOSE"] = "1"
    with showing(voice):
        found = _result(step, voice)
    if not step.dry_run:
        _wrote(step, found, as_json=as_json, voice=voice)
    elif as_json:
        print_json(found.as_data())
    else:
        _planned(found)


def _planned(found: "TrainingPreview") -> None:
    """What a dry run of finetune foretells, in the form of prune's."""
    size, zeros = found.prunable_weights, found.zeros
    head = f"{size:,} prunable weights in {found.prunable_tensors:,} tensors"
    if zeros is not None:
        head = f"{zeros:,} of {size:,} prunable weights would be zero ({text.percent(zeros / size)})"
    elif found.method != "dense":
        head += "; without --target-sparsity only training tells how many become zero"
    disk, free, kept, peak = (
        text.size(getattr(found, name)) for name in ("disk_bytes", "free_bytes", "bytes_kept", "bytes_peak")
    )
    of = f" in each of {found.processes} processes" if found.processes > 1 else ""
    rows = [
        ("kept", found.kept.partition("Kept dense: ")[2]),
        ("training", f"{found.steps:,} steps of {found.method}"),
        ("warning", found.warning or ""),
        ("examples", f"{found.examples:,} to train on, {found.held_out:,} held out"),
        ("new", ", ".join(found.fresh)),
        ("would take", f"{disk} of disk ({free} are free)"),
        ("", f"{kept} of memory, {peak} at the peak of a step{of}"),
        (
            "",
            "(disk without training states; memory from what the code keeps for each weight, without "
            "activations and torch itself; time is known when training has begun)",
        ),
    ]
    print_result(f"{text.clean(found.model)}: {head}\n")
    for name, words in rows:
        if words:
            print_result(text.fitted(f"  {name:<14} {text.clean(words)}", width(), hang=15 if name else 0))


def _verify(step: report.VerifyStep, as_json: bool, voice: Voice) -> None:
    with working(voice):
        found: Verification = _result(step, voice)
    if as_json:
        print_json(found.as_data())
    elif found.ok:
        print_result(
            f"{step.model}: ok: {found.files} files and {found.tensors} tensors are as written"
            + (f"; every value is that of {step.source} or 0" if step.source else "")
        )
    else:
        problems = found.problems
        print_result(f"{step.model}: FAILED: {len(problems)} difference{'s' * (len(problems) > 1)}")
        print_result("\n".join(f"  {text.clean(each)}" for each in problems[:_SHOWN]))
        if len(problems) > _SHOWN:
            print_result(f"  and {len(problems) - _SHOWN} more; --json has them all")
    if not found.ok:
        raise typer.Exit(ExitCode.VERDICT)


def _inspect(step: report.InspectStep, as_json: bool, voice: Voice) -> None:
    from lpsparse.pruning.targets import in_short

    found: Listing = _result(step, voice)
    if as_json:
        print_json(found.as_data())
        return
    body = [
        (
            text.clean(fold.name),
            each.dtype,
            _shape(each.shape, len(fold.rows)),
            text.size(sum(row.bytes for row in fold.rows)),
            "prunable" if each.prunable else in_short(each.reason),
        )
        for fold in _folds(found.tensors, voice)
        for each in fold.rows[:1]
    ]
    print_result("\n".join(text.columns(("tensor", "dtype", "shape", "bytes", ""), body, width())) + "\n")
    names = ", ".join(text.clean(file.name) for file in found.files)
    files = names if len(found.files) == 1 else f"{len(found.files)} files"
    size = text.size(sum(file.bytes for file in found.files))
    print_result(f"{text.clean(found.model)}: {found.layout}, {files} ({size})")
    prunable = sum(each.prunable for each in found.tensors)
    print_result(
        f"{found.weights:,} values in {len(found.tensors):,} tensors, {found.prunable_weights:,} of "
        f"them prunable weights in {prunable:,}"
    )


def _folds(tensors: "tuple[TensorFacts, ...]", voice: Voice) -> "list[Fold[TensorFacts]]":
    """The tensors, of layers that are alike as one."""
    from lpsparse.reporting.text import Fold, folded

    if voice.full:
        return [Fold(each.name, (each,)) for each in tensors]
    return folded(list(tensors), lambda each: each.name, lambda each: (*each.shape, each.dtype, each.reason))


def _shape(shape: tuple[int, ...], count: int) -> str:
    return (f"{count} x " if count > 1 else "") + "x".join(map(str, shape))


def _push(step: push.PushStep, as_json: bool, voice: Voice) -> None:
    from lpsparse.commands.push import preview, push_step

    if step.dry_run:
        with showing(voice):
            planned = preview(step, voice.say)
        if as_json:
            print_json(planned.as_data())
            return
        body = [(text.clean(each.name), text.size(each.bytes)) for each in planned.names]
        print_result("\n".join(text.columns(("file", "bytes"), body, width())))
        return
    with showing(voice):
        found = push_step(step, voice.say, bars=not voice.quiet and has_terminal())
    if as_json:
        print_json(found.as_data())
    else:
        voice.say("names, sizes and hashes on the hub are those of FOLDER")
        print_result(text.clean(found.pull_request or found.url))


def _eval(step: finetune.EvalStep, as_json: bool, voice: Voice) -> None:
    with showing(voice):
        result: Evaluation = _result(step, voice)
    found = result.as_data()
    if as_json:
        print_json(found)
        return
    from lpsparse.reporting.summary import interval

    if not found["trained_on"]:
        del found["trained_on"]  # nothing is known of it, or nothing is to be said
    errors = {key: found.pop(key) for key in list(found) if key.endswith("_error")}
    names = {key: key.removesuffix("_error") for key in errors}
    shown = {name: f"{interval(found[name], errors[key])} (95 %)" for key, name in names.items()}
    _print_facts(found | shown)
    if result.saved:
        gate = "" if step.against is None else " --max-quality-drop 1%"
        places = [step.model, *([] if step.against is None else [step.against])]
        voice.say(f"recorded in {step.model}")
        voice.say(f"next: {_command(['report', *places])}{gate}", fit=False)


def _print_facts(found: dict[str, Any]) -> None:
    for key, value in found.items():
        shown = (
            f"{value:.6g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        )
        if isinstance(value, tuple):
            shown = ", ".join(cast("tuple[str, ...]", value)) or "none"
        print_result(f"{key.replace('_', ' '):<18} {text.clean(str(shown))}")


_SHOWS: dict[str, Show] = {
    "finetune": _finetune,
    "prune": _prune,
    "pack": _pack,
    "unpack": _pack,
    "eval": _eval,
    "verify": _verify,
    "inspect": _inspect,
    "push": _push,
}
_EXAMPLES = {
    "finetune": """\
  lpsparse finetune MODEL sparse --data rows.jsonl --task text-classification --target-sparsity 0.8
  lpsparse finetune MODEL sparse --data text.txt --task causal-lm --target-sparsity 0.8
  lpsparse finetune net.pt sparse --data images.npz --task image-classification --model-fn net.py:build""",
    "prune": """\
  lpsparse prune MODEL sparse --sparsity 0.8
  lpsparse prune MODEL sparse --gap
  lpsparse prune MODEL sparse --n-m 2:4
  lpsparse prune MODEL sparse --below 1e-3 --exclude '*.layer.0.*'
  lpsparse prune PIPELINE sparse --sparsity 0.5 --component unet""",
    "push": """\
  lpsparse push sparse org/name --dry-run
  lpsparse push sparse org/name --private --message '80 % zeros'
  lpsparse push packed org/name --revision packed
  lpsparse inspect org/name@packed""",
    "eval": """\
  lpsparse eval sparse --data dev.tsv
  lpsparse eval sparse --data dev.tsv --task text-classification --against dense --save
  lpsparse eval sparse --data held-out.txt --task causal-lm --json""",
    "pack": """\
  lpsparse pack sparse packed""",
    "unpack": """\
  lpsparse unpack packed dense""",
    "verify": """\
  lpsparse verify sparse
  lpsparse verify sparse MODEL""",
    "inspect": """\
  lpsparse inspect org/name@main""",
}


# lpsparse doctor


def doctor(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where OUT would be written.")] = Path("."),
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Exit 6 where something fails, 4 where only the disk does. The output holds no secrets.

    \b
    Examples:
      lpsparse doctor
      lpsparse doctor /scratch --json"""
    from lpsparse.commands import doctor

    Voice(quiet).say("checking (starting torch and two processes takes some seconds) ...")
    found = doctor.doctor(folder)
    if as_json:
        print_json(found)
    else:
        for check in found["checks"]:
            print_result(f"{check['status']:<4}  {check['name']:<15}  {check['found']}")
            if "hint" in check:
                print_result(f"        hint: {check['hint']}")
    if not found["ok"]:
        raise typer.Exit(found["exit_code"])
