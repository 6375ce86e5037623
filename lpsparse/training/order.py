"""Choose the examples and random numbers of each step: a pure function of seed, epoch and step.

Nothing of it is kept in a run's state, so a resumed run continues with the very same batches, and the batch
of a step is the same for any number of processes; they share it.
"""

import math
import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from lpsparse.parallel import launcher, ranks
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.stopping import ASKS, watch_workers
from lpsparse.training.tasks.base import Batch, Task

_POOL = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True, slots=True)
class Part:
    """What one process sees in one backward pass of a step: every `parts`-th example of the step's batch."""

    step: int
    epoch: int
    number: int  # of the part, 0 .. parts - 1
    examples: tuple[int, ...]  # at least one, so that all processes do the same work
    empty: bool  # then what stands in for an example counts nothing

    def seeds(self, seed: int) -> list[int]:
        """One for each example, for its random changes: the same whichever part it is in."""
        return [_mix(seed, self.epoch, example) for example in self.examples]


def _mix(*numbers: int) -> int:
    """A well spread 63-bit number (splitmix64 over the numbers)."""
    state = 0
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 + number) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def steps_of(step: FinetuneStep, task: Task) -> int:
    """Optimizer steps of the run."""
    return step.steps or max(1, round(step.epochs * _steps_an_epoch(step, task)))


def _steps_an_epoch(step: FinetuneStep, task: Task) -> int:
    return math.ceil(len(task.train) / step.batch_size)


def batch_order(step: FinetuneStep, task: Task, epoch: int) -> list[list[int]]:
    """Indices of each batch of an epoch;
    examples of like length share a batch where the task knows lengths."""
    generator = torch.Generator().manual_seed(step.seed * 1_000_003 + epoch)
    order = torch.randperm(len(task.train), generator=generator).tolist()
    length = task.length
    if length is None:
        return [order[i : i + step.batch_size] for i in range(0, len(order), step.batch_size)]
    pool = step.batch_size * _POOL
    batches: list[list[int]] = []
    for i in range(0, len(order), pool):
        near = sorted(order[i : i + pool], key=lambda k: length(task.train[k]))
        batches += [near[j : j + step.batch_size] for j in range(0, len(near), step.batch_size)]
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


def parts_of(step: FinetuneStep, task: Task, first: int, steps: int) -> Iterator[Part]:
    """This process's parts, `step.accumulate` a step, of the steps from `first` on."""
    world_size, rank = ranks.world_size(), ranks.rank()
    count, of_epoch, order = world_size * step.accumulate, -1, list[list[int]]()
    for t in range(first, steps):
        epoch, place = divmod(t, _steps_an_epoch(step, task))
        if epoch != of_epoch:
            of_epoch, order = epoch, batch_order(step, task, epoch)
        batch = order[place]
        for number in range(rank, count, world_size):
            mine = tuple(batch[number::count])
            yield Part(t, epoch, number, mine or (batch[0],), not mine)


def batches(step: FinetuneStep, task: Task, first: int, steps: int) -> Iterator[list[tuple[Part, Batch]]]:
    """For each step from `first` on, this process's parts of its batch, each with its data."""
    plan = parts_of(step, task, first, steps)
    given: list[Part] = []  # to the loader, whose workers may run ahead

    def indices() -> Iterator[list[int]]:
        for part in plan:
            given.append(part)
            yield list(part.examples)

    data: Any = task.train
    loader = DataLoader(
        data,
        batch_sampler=indices(),
        collate_fn=task.collate,
        num_workers=step.workers,
        worker_init_fn=_in_worker if step.workers else None,
    )
    of_step: list[tuple[Part, Batch]] = []
    before = multiprocessing.active_children()
    read = iter(loader)  # which starts its processes
    watch_workers([each for each in multiprocessing.active_children() if each not in before])
    for batch in read:
        of_step.append((given.pop(0), batch))
        if len(of_step) == step.accumulate:
            yield of_step
            of_step = []


def _in_worker(_: int) -> None:
    """A signal to all of a job's processes is for those that train; workers end with them."""
    for number in ASKS:
        signal.signal(number, signal.SIG_IGN)
    launcher.end_with_parent(signal.SIGKILL)
    torch.set_num_threads(1)


def seed_pass(step: FinetuneStep, part: Part) -> None:
    """Dropout of a forward pass: a function of seed, step and part."""
    torch.manual_seed(_mix(step.seed, part.step, part.number))
