"""Names of other libraries that they do not document, all of them: why we use each, and what is done without.

A release may take any of them away: that may cost speed or a convenience, never a traceback. Everything else
that lpsparse imports is documented by its library, or exported by it as public. `tests/test_borrowed.py`
takes each of them away.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Borrowed:
    reason: str
    without: str


BORROWED: dict[str, Borrowed] = {
    "accelerate.state:AcceleratorState._reset_state": Borrowed(
        "one process may train twice, each time with another --mixed-precision",
        "the second run keeps the first one's precision, or is refused with the hint to start a new process",
    ),
    "huggingface_hub.constants": Borrowed(
        "its settings as it has read them from the environment",
        "the documented variables (HF_HOME, HF_ENDPOINT, ...) are read again, with the documented defaults",
    ),
    "torch._dynamo:mark_dynamic": Borrowed(
        "the compiled loop of the decay is made for any length at its first use",
        "torch.compile(dynamic=True)",
    ),
    "torch.distributed.launcher.api:elastic_launch": Borrowed(
        "--processes tells which process failed first, with its exit code",
        "the torchrun command; the exit code is 6 where a process failed",
    ),
    "transformers.core_model_loading:revert_weight_conversion": Borrowed(
        "the names that the checkpoint has for tensors which transformers renames or fuses",
        "the model is saved into a temporary folder, and the names are read from there",
    ),
    "typer.core": Borrowed(
        "help in panels that fit the terminal, a suggestion for a misspelt command (cli/help.py)",
        "help and errors as Typer shows them",
    ),
}


def borrow(name: str) -> Any:
    """The object of BORROWED with this name, `module:attribute`; None where the library does not have it."""
    assert name in BORROWED, name
    module, _, attributes = name.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError:
        return None
    for attribute in attributes.split(".") if attributes else ():
        found = getattr(found, attribute, None)
    return found
