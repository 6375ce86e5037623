"""Help in groups, as plain text that survives grep; and what was meant by a misspelt command."""

import re
from difflib import get_close_matches
from shutil import get_terminal_size
from textwrap import wrap
from typing import Any, cast

from typer.core import TyperCommand, TyperGroup

from lpsparse.cli.suggestions import MEANT
from lpsparse.errors import UsageError
from lpsparse.reporting.text import fitted

_PANELS = {  # of a command's options, by field; what is not here is of the method, or of the report
    "Input": (
        "weights",
        "key",
        "task",
        "data",
        "split",
        "eval_data",
        "eval_split",
        "eval_fraction",
        "text_field",
        "label_field",
        "max_length",
        "model_fn",
        "mean",
        "std",
        "set_",
    ),
    "Method": (),
    "Budgets": (
        "min_sparsity",
        "max_bytes",
        "max_quality_drop",
        "max_layer_sparsity",
        "min_nm",
        "baseline",
        "max_regression",
        "warn",
    ),
    "Training": (
        "epochs",
        "steps",
        "batch_size",
        "optimizer",
        "lr",
        "lr_schedule",
        "warmup",
        "weight_decay",
        "clip",
        "freeze",
        "augment",
        "seed",
    ),
    "Hardware": (
        "threads",
        "processes",
        "shard",
        "workers",
        "mixed_precision",
        "accumulate",
        "checkpointing",
        "compile",
        "rank_timeout",
    ),
    "Output": (
        "layout",
        "level",
        "overwrite",
        "dry_run",
        "resume",
        "save_every",
        "keep_last",
        "max_time",
        "private",
        "revision",
        "message",
        "create_pr",
        "delete_others",
    ),
    "Reporting": (
        "as_json",
        "json_file",
        "html_file",
        "markdown_file",
        "comment_file",
        "junit_file",
        "csv_file",
        "full",
        "quiet",
        "verbose",
        "log_every",
        "track",
        "spectra",
    ),
    "Other": ("help", "version", "install_completion", "show_completion"),
}
_WIDEST = 30  # letters of an option that has its text beside it, not below
_LEAST = 20  # letters of a line of that text; where there is less room it is below, too
_COMMON = 80  # columns of a terminal; in these and more, examples stay on one line
_COMMANDS = {
    "Start here": ("demo", "doctor", "help", "explain"),
    "Make it small": ("finetune", "prune", "pack", "unpack", "run", "sweep", "recipe"),
    "Prove it": ("report", "verify", "inspect", "eval"),
    "Share it": ("push",),
}


class _Fitted:
    """Help that keeps to the terminal's width: Typer's own is never under 50 columns."""

    help: str | None

    def format_help(self, ctx: Any, formatter: Any) -> None:
        formatter.width = max(_LEAST, min(formatter.width, get_terminal_size().columns))
        cast("Any", super()).format_help(ctx, formatter)

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        usage = f"Usage: {ctx.command_path} {' '.join(cast('Any', self).collect_usage_pieces(ctx))}"
        formatter.write(f"{fitted(usage, formatter.width, hang=4)}\n\n")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        lines = (self.help or "").split("\n")
        with formatter.indentation():
            formatter.write_text("\n".join(_continued(line, formatter.width - 2) for line in lines))


class Command(_Fitted, TyperCommand):
    """A command whose options are shown by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in _PANELS}}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                rows[_panel_of(param, str(ctx.info_name))].append(row)
        _write(formatter, rows)


class Group(_Fitted, TyperGroup):
    """All commands, by what they are for; those of a command of its own in one list."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        self.format_commands(ctx, formatter)
        Command.format_options(cast("Any", self), ctx, formatter)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        known = {name for names in _COMMANDS.values() for name in names}
        own = tuple(name for name in self.list_commands(ctx) if name not in known)
        helps = {name: str(cast("Any", self.get_command(ctx, name)).help) for name in self.list_commands(ctx)}
        rows = {name: (name, text.partition("\n\n")[0]) for name, text in helps.items()}
        panels = {**_COMMANDS, "Commands": own}
        shown = {panel: [rows[name] for name in names if name in rows] for panel, names in panels.items()}
        _write(formatter, shown)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0]
        if self.get_command(ctx, name) is None and not ctx.resilient_parsing:
            near = get_close_matches(name.lower(), self.list_commands(ctx), n=2)
            near = [MEANT[name.lower()]] if name.lower() in MEANT else near
            hint = f"did you mean {' or '.join(near)}? `{ctx.command_path} --help` lists the commands"
            hint = hint if near else f"see `{ctx.command_path} --help`"
            raise UsageError(200, f"no such command: {name}", hint=hint)
        return super().resolve_command(ctx, args)


def _panel_of(param: Any, command: str) -> str:
    if param.param_type_name == "argument":
        return "Arguments"
    other = "Reporting" if command == "report" else "Method"
    return next((panel for panel, names in _PANELS.items() if param.name in names), other)


def _write(formatter: Any, rows: dict[str, list[tuple[str, str]]]) -> None:
    """Each panel as a heading and a list. Typer's own would break flags at their hyphens."""
    for panel, each in rows.items():
        room = min(_WIDEST, max((len(name) for name, _ in each), default=0))
        for i, (name, text) in enumerate(each):
            formatter.write(f"\n{panel}:\n" if i == 0 else "")
            under = 2 if formatter.width < room + 4 + _LEAST else room  # how far to the right the text is
            lines = wrap(text, formatter.width - under - 4, break_on_hyphens=False, break_long_words=False)
            beside = lines[:1] if len(name) <= under else []
            words = _filled(re.findall(r"[^\s|]+\|?\s*", name), formatter.width - 6)  # choices may part
            formatter.write(f"  {words[0]:<{under}}  {''.join(beside)}".rstrip() + "\n")
            for line in words[1:]:
                formatter.write(f"    {line}\n")
            for line in lines[len(beside) :]:
                formatter.write(f"{'':{under + 4}}{line}\n")


def _filled(parts: list[str], width: int) -> list[str]:
    """The parts in lines of `width` letters; one that is longer stays whole."""
    lines = parts[:1]
    for part in parts[1:]:
        if len((lines[-1] + part).rstrip()) > width:
            lines.append(part)
        else:
            lines[-1] += part
    return [line.rstrip() for line in lines]


def _continued(line: str, width: int) -> str:
    """An example that a narrow terminal has no room for, on lines that a shell puts together again."""
    if not line.startswith("  lpsparse ") or len(line) <= width or width >= _COMMON - 4:
        return line
    words = re.findall(r"(?:'[^']*'|\S)+\s*", line)
    return "  " + " \\\n    ".join(_filled(words, width - 6))
