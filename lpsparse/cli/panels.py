"""Help in groups, as plain text that survives grep; and what was meant by a misspelt command."""

from difflib import get_close_matches
from textwrap import wrap
from typing import Any, cast

from typer.core import TyperCommand, TyperGroup

from lpsparse.errors import UsageError

_PANELS = {  # of a command's options, by field; what is not here is of the method, or of the report
    "Input": (
        "weights", "task", "data", "split", "eval_data", "eval_split", "eval_fraction", "text_field",
        "label_field", "max_length", "model_fn", "mean", "std", "set_",
    ),
    "Method": (),
    "Budgets": (
        "min_sparsity", "max_bytes", "max_quality_drop", "max_layer_sparsity", "min_nm", "baseline",
        "max_regression", "warn",
    ),
    "Training": (
        "epochs", "steps", "batch_size", "optimizer", "lr", "lr_schedule", "warmup", "weight_decay", "clip",
        "freeze", "augment", "seed",
    ),
    "Hardware": (
        "threads", "processes", "shard", "workers", "mixed_precision", "accumulate", "checkpointing",
        "compile", "rank_timeout",
    ),
    "Output": (
        "layout", "level", "overwrite", "dry_run", "resume", "save_every", "keep_last", "max_time", "private",
        "revision", "message", "create_pr", "delete_others",
    ),
    "Reporting": (
        "as_json", "json_file", "html_file", "markdown_file", "comment_file", "junit_file", "csv_file",
        "quiet", "log_every", "track", "spectra",
    ),
    "Other": ("help", "version", "install_completion", "show_completion"),
}  # fmt: skip
_WIDEST = 30  # letters of an option that has its text beside it, not below
_COMMANDS = {
    "Start here": ("demo", "doctor", "help", "explain"),
    "Make it small": ("finetune", "prune", "pack", "unpack", "run", "sweep", "recipe"),
    "Prove it": ("report", "verify", "inspect", "eval"),
    "Share it": ("push",),
}


class Command(TyperCommand):
    """A command whose options are shown by panel."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in _PANELS}}
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            if row is not None:
                rows[_panel_of(param, str(ctx.info_name))].append(row)
        _write(formatter, rows)


class Group(TyperGroup):
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
            mend = f"did you mean {' or '.join(near)}? `{ctx.command_path} --help` lists the commands"
            mend = mend if near else f"see `{ctx.command_path} --help`"
            raise UsageError(200, f"no such command: {name}", mend=mend)
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
            lines = wrap(text, max(formatter.width - room - 4, 20), break_on_hyphens=False)
            beside = lines[:1] if len(name) <= room else []
            formatter.write(f"  {name:<{room}}  {''.join(beside)}".rstrip() + "\n")
            for line in lines[len(beside) :]:
                formatter.write(f"{'':{room + 4}}{line}\n")
