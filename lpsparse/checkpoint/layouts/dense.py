"""The dense layout: ordinary safetensors, in which a zero is stored as any other value."""

from dataclasses import dataclass
from pathlib import Path

from lpsparse.checkpoint.counting import Count, Cuts, Sums
from lpsparse.checkpoint.header import Entry, Header
from lpsparse.checkpoint.layouts.base import Layout, Planned, Wrote, flow, read_exactly
from lpsparse.checkpoint.safetensors_writer import file_size, write_tensors
from lpsparse.checkpoint.tensors import Blocks, Tensor, grid_of, lines_at_once


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks of a dense tensor. Not a function in a function, which takes five times the memory."""

    path: Path
    entry: Entry

    def __call__(self, first: int = 0, last: int | None = None) -> Blocks:
        entry = self.entry
        if entry.nbytes == 0:
            return
        lines, width = grid_of(entry.shape, entry.dtype)
        step = lines_at_once(width, entry.dtype)
        end = lines if last is None else last
        with self.path.open("rb") as file:
            for line in range(first, end, step):
                taken = min(step, end - line)
                yield line, read_exactly(file, entry, line * width, taken * width).reshape(taken, width)


def dense_tensor(path: Path, entry: Entry) -> Tensor:
    """A tensor that is stored as it is."""
    return Tensor(
        entry.name, entry.dtype, entry.shape, path.name, "dense", entry.nbytes, _Blocks(path, entry)
    )


def _open(path: Path, header: Header) -> list[Tensor]:
    return [dense_tensor(path, entry) for entry in header.entries]


def _write(target: Path, tensors: list[Tensor], cut: Cuts, metadata: dict[str, str], _: str) -> Wrote:
    sums: Sums = {tensor.name: (0, 0) for tensor in tensors}
    entries = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    parts = ((tensor.name, line * block.shape[1], block) for tensor, line, block in flow(tensors, cut, sums))
    return Wrote(tuple(sums), sums, write_tensors(target, entries, metadata, parts))


def _plan(
    tensors: list[Tensor], counts: dict[str, Count], cut: Cuts, metadata: dict[str, str], level: str
) -> Planned:
    return Planned({}, file_size([(each.name, each.dtype, each.shape) for each in tensors], metadata))


DENSE = Layout(
    "dense",
    "any safetensors reader{}",
    open=_open,
    write=_write,
    plan=_plan,
    stored_names=lambda name: (name,),
    is_plain=True,
)
