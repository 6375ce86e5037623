"""Every command: its line of help, where its settings are, and which function does it.

Standard library only: `lpsparse --help` reads this and imports none of what it names.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpsparse.steps.base import Step


@dataclass(frozen=True, slots=True)
class Command:
    """A command, and a word of recipes. Places are MODULE:NAME in lpsparse."""

    help: str
    panel: str = ""  # of `lpsparse --help`; none: a word of recipes only
    step: str = ""  # its settings
    run: str = ""  # (step, say) -> result
    preview: str = ""  # the same for --dry-run; writes nothing
    check: str = ""  # (step, held) -> what a recipe check finds; such a command may stand in a recipe

    def load(self, place: str) -> Any:
        """What the field `place` names."""
        module, _, name = str(getattr(self, place)).partition(":")
        return getattr(import_module(f"lpsparse.{module}"), name)


PANELS = (  # of a command's help, in this order
    "Arguments",
    "Input",
    "Method",
    "Selection",
    "Budgets",
    "Training",
    "Hardware",
    "Output",
    "Reporting",
    "Other",
)
_START, _SMALL, _PROOF, _SHARE = "Start here", "Make it small", "Prove it", "Share it"
COMMANDS = {
    "demo": Command(
        "Run finetune, prune and report on a bundled model, offline.", _START, run="cli.demo:demo"
    ),
    "doctor": Command(
        "Check versions, memory, devices, processes, the disk and the hub.", _START, run="cli.commands:doctor"
    ),
    "help": Command("Explain a topic, or a command; without TOPIC, list them.", _START, run="cli.help:help_"),
    "explain": Command(
        "Explain an error code and say what to do; without CODE, list them all.",
        _START,
        run="cli.help:explain",
    ),
    "finetune": Command(
        "Train most weights to zero with L_p decay, cut the rest of the target, recover quality.",
        _SMALL,
        "steps.finetune:FinetuneStep",
        "commands.finetune:finetune_step",
        "commands.finetune:preview",
        "commands.finetune:check",
    ),
    "prune": Command(
        "Cut the smallest weights to exact zeros.",
        _SMALL,
        "steps.prune:PruneStep",
        "commands.prune:prune_step",
        "commands.prune:preview",
        "commands.prune:check",
    ),
    "recover": Command(
        "Train on with every zero of MODEL held, so that what a cut cost comes back.",
        step="steps.finetune:RecoverStep",
        run="commands.finetune:finetune_step",
        check="commands.finetune:check",
    ),
    "pack": Command(
        "Compress a sparse model losslessly: zeros take no bytes.",
        _SMALL,
        "steps.pack:PackStep",
        "commands.pack:pack_step",
        "commands.pack:preview",
        "commands.pack:check",
    ),
    "unpack": Command(
        "Turn a packed model back into an ordinary one, bit for bit.",
        _SMALL,
        "steps.pack:UnpackStep",
        "commands.pack:pack_step",
        "commands.pack:preview",
        "commands.pack:check",
    ),
    "run": Command("Run the steps of a recipe; finished steps are skipped.", _SMALL, run="cli.recipes:run"),
    "sweep": Command("Run a recipe at several sparsities.", _SMALL, run="cli.recipes:sweep"),
    "recipe": Command("Check a recipe before it runs, or print the schema of recipes.", _SMALL),
    "eval": Command(
        "Measure a model's quality on data.",
        _PROOF,
        "steps.finetune:EvalStep",
        "commands.evaluate:evaluate_step",
        "commands.evaluate:evaluate_step",
        "commands.evaluate:check",
    ),
    "report": Command(
        "Measure sparsity and bytes from the files, and check budgets.",
        _PROOF,
        "steps.report:ReportStep",
        "commands.report:report_step",
        check="commands.report:check",
    ),
    "verify": Command(
        "Check that a folder is what its manifest says: files, hashes, zeros, finiteness.",
        _PROOF,
        "steps.report:VerifyStep",
        "commands.verify:verify_step",
        check="commands.verify:check",
    ),
    "inspect": Command(
        "List what a checkpoint holds, from its headers alone.",
        _PROOF,
        "steps.report:InspectStep",
        "commands.inspect:inspect_step",
    ),
    "push": Command(
        "Upload an lpsparse output to the hub in one commit, checked before and after.",
        _SHARE,
        "steps.push:PushStep",
        "commands.push:push_step",
        "commands.push:preview",
    ),
}
RECIPE_WORDS = tuple(name for name, command in COMMANDS.items() if command.check)


def step_of(name: str) -> type["Step"]:
    """The settings of a command that has some."""
    return COMMANDS[name].load("step")
