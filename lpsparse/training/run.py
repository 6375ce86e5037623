"""One run of the loop: its steps, its state, and how it leaves."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from lpsparse.errors import InterruptError, NumericError, ResourceError, ResumableError, is_out_of_memory
from lpsparse.parallel import ranks
from lpsparse.parallel.progress import advance, phase
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.distill import Teacher
from lpsparse.training.loss import batch_loss
from lpsparse.training.model import first_line
from lpsparse.training.order import Part, batches, hear_no_more_of_workers, seed_pass, worker_is_gone
from lpsparse.training.quality import Measured
from lpsparse.training.resume import States, moved
from lpsparse.training.sparsity import Method
from lpsparse.training.stopping import Stop
from lpsparse.training.tasks.base import Batch, Task

SAVE_SECONDS = 15 * 60
SPIKE = 10.0  # times the usual loss: said, since a batch may be broken


@dataclass(frozen=True, slots=True)
class Progress:
    """One optimizer step, for a bar or a log."""

    step: int  # steps done
    steps: int
    epoch: int
    loss: float  # mean since the last one
    lr: float
    lambda_p: float
    target: float  # zeros that the plan asks for now
    sparsity: float  # exact zeros of the prunable weights
    near_zero: float  # as good as zero


class Run:
    """One run of the loop: what moves, and how far it is."""

    def __init__(
        self,
        step: FinetuneStep,
        task: Task,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        method: Method,
        teacher: Teacher | None,
        states: States,
        before: Measured | None,
        say: Callable[[str], None],
    ) -> None:
        self.step, self.task, self.accelerator = step, task, accelerator
        self.model, self.optimizer, self.method = model, optimizer, method
        self.teacher, self.states, self.before, self.say = teacher, states, before, say
        self.losses: list[float] = []  # since the last line of the log
        self.skipped = 0  # steps whose gradients overflowed in fp16
        self.stop = Stop(step.max_time)
        self._saved = time.monotonic()
        self._recent: deque[float] = deque(maxlen=20)
        self._zero = ("", "")  # phase and share of zeros when they were counted last

    @property
    def done(self) -> int:
        """Steps."""
        return self.method.done

    def loop(self, on_step: Callable[[Progress], None]) -> None:
        """Train to the end. Each step advances a phase of `checkpoint.progress`; `on_step` hears of every
        `log_every`-th, since counting zeros takes time."""
        self.model.train()
        with phase(self._doing(), len(self.method.control.rates), "steps", done=self.done):
            self._steps(on_step)

    def _doing(self) -> str:
        control = self.method.control
        name = "train" if self.step.method == "dense" else control.phases.name(self.done)
        return "settle" if name == "recover" and control.target is None else name

    def _steps(self, on_step: Callable[[Progress], None]) -> None:
        rates = self.method.control.rates
        given = batches(self.step, self.task, self.done, len(rates))
        while self.done < len(rates):
            # Twice: torch tells of a dead worker by a signal, which may come while the first reads an error.
            with self._guarded(self.done), self._guarded(self.done):
                parts = next(given)
                asked, due = self._step(self.done, parts)
                if self.done % self.step.log_every == 0 or self.done == len(rates):
                    self._log(self._progress(parts[0][0].epoch), on_step)
                advance(1, "steps", what=self._doing(), facts=self._facts())
                if asked or due:
                    self.states.save(self.done, self.state())
                    self._saved = time.monotonic()
            if asked:
                self._leave(len(rates), asked)

    def _log(self, progress: Progress, on_step: Callable[[Progress], None]) -> None:
        on_step(progress)
        self._zero = (self._doing(), f"zero {100 * progress.sparsity:.2f} %")

    def _facts(self) -> tuple[str, ...]:
        """What a bar says of the step: zeros, which take time to count, in the phase that counted them."""
        control = self.method.control
        zero = [self._zero[1]] if self._zero[0] == self._doing() else []
        rates = (f"lr {control.rates[self.done - 1]:.1e}", f"lambda {control.lambda_p:.1e}")
        return (f"loss {self._recent[-1]:.4f}", *zero, *rates)

    @contextmanager
    def _guarded(self, t: int) -> Generator[None]:
        """Raises ResourceError where memory or another process is missing."""
        with ranks.lost_rank_errors(f"step {t + 1}: "):
            try:
                yield
            except (MemoryError, RuntimeError, OSError, EOFError) as error:
                if is_out_of_memory(error):
                    raise self._out_of_memory(t) from error
                if worker_is_gone():
                    hear_no_more_of_workers()
                    what = f"a process that prepares batches is gone: {first_line(error)}"
                    raise ResourceError(606, what, hint="use fewer --workers, or 0") from error
                raise

    def _out_of_memory(self, t: int) -> ResourceError:
        step, world_size = self.step, ranks.world_size()
        more = min(2 * step.accumulate, step.batch_size)
        size, half = (math.ceil(step.batch_size / (world_size * parts)) for parts in (step.accumulate, more))
        what = f"out of memory at step {t + 1}, with {size} examples at a time"
        ways = [] if step.checkpointing else ["--checkpointing"]
        ways += ["--shard"] if world_size > 1 and not step.shard else []
        hint = f"use {', '.join([*ways, 'a smaller model or more memory'])}"
        if half < size:
            hint = f"--accumulate {more} takes {half} at a time and makes the same step"
            hint += ", with --resume never" if self.states.last() else ""
        return ResourceError(601, what, hint=hint)

    def _step(self, t: int, parts: list[Any]) -> tuple[int, bool]:
        """One optimizer step. Whether the run was asked to stop (2: by Ctrl-C), and whether to save."""
        self.method.before_step()
        loss = self._backward(parts)
        self.method.after_backward()
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        params = [param for group in groups for param in group["params"]]  # gains included
        norm = ranks.to_float(self.accelerator.clip_grad_norm_(params, self.step.clip or math.inf))
        # A loss scaler (fp16) skips a step whose gradients overflow and goes on with a smaller scale.
        bad = not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm))
        asked = {"": 0, "SIGINT": 2}.get(self.stop.reason(), 1)
        bad, asked, due = ranks.all_reduce_max([bad, asked, self._is_due(t + 1)])
        if bad:
            self._refuse(t, loss, norm)
        self._note(t, loss)
        self.optimizer.step()
        self.skipped += self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        self.method.after_step()
        return int(asked), bool(due)

    def _note(self, t: int, loss: float) -> None:
        self.losses.append(loss)
        usual = statistics.median(self._recent) if len(self._recent) == self._recent.maxlen else math.inf
        if loss > SPIKE * usual:
            self.say(f"step {t + 1}: loss {loss:.4g} is {loss / usual:.0f} times the usual {usual:.4g}")
        self._recent.append(loss)

    def _backward(self, parts: list[Any]) -> float:
        """The loss of this process's share of the step's batch; its gradients are there."""
        step, task, world_size = self.step, self.task, ranks.world_size()
        alone, device = world_size * step.accumulate == 1, self.accelerator.device
        ready: list[tuple[Part, Batch]] = []
        for part, batch in parts:
            batch = {key: value.to(device) for key, value in batch.items()}
            ready.append(
                (part, batch if task.augment is None else task.augment(batch, part.seeds(step.seed)))
            )
        counts = [0 if part.empty else task.count(batch) for part, batch in ready]
        total = 1.0 if alone else ranks.all_reduce_sum([sum(counts)])[0]
        whole = 0.0
        for k, (part, batch) in enumerate(ready):
            last = k == len(ready) - 1
            seed_pass(step, part)
            with nullcontext() if last else ranks.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = batch_loss(step, task, self.model, batch, self.teacher)
                if not alone:  # so that the processes' mean is the mean over the whole batch
                    loss = loss * (world_size * counts[k] / total)
                self.accelerator.backward(loss)
            whole += float(loss.detach())
        return whole

    def _is_due(self, done: int) -> bool:
        if self.step.save_every is not None:
            return done % self.step.save_every == 0
        return time.monotonic() - self._saved >= SAVE_SECONDS

    def _progress(self, epoch: int) -> Progress:
        control = self.method.control
        if not self.step.shard:
            odd = ranks.first_different_rank(ranks.fingerprint(control.weights.values()))
            if odd is not None:
                what = f"step {self.done}: process {odd} has other weights than process 0"
                raise ResourceError(
                    605, what, hint="run the same command again; look at that machine's memory"
                )
        mean = ranks.all_reduce_sum([sum(self.losses) / len(self.losses)])[0] / ranks.world_size()
        self.losses.clear()
        return Progress(
            self.done,
            len(control.rates),
            epoch,
            mean,
            control.rates[self.done - 1],
            control.lambda_p,
            control.scheduled(self.done) / max(1, control.size),
            control.zeros() / max(1, control.size),
            control.near_zero(),
        )

    def _refuse(self, t: int, loss: float, norm: float) -> None:
        last = self.states.last()
        kept = f"the state of step {last} is whole" if last else "nothing was written"
        what = f"step {t + 1} of {len(self.method.control.rates)}: loss {loss}, gradient norm {norm}; {kept}"
        raise NumericError(501, what, hint="lower --lr (with --resume never); the input is untouched")

    def _leave(self, steps: int, asked: int) -> None:
        reason = self.stop.reason() or "another process"
        how = " again" if self.step.resume == "auto" else " with --resume auto"
        what = f"stopped by {reason} after step {self.done} of {steps}; its state is in {self.states.folder}"
        raise (InterruptError if asked == 2 else ResumableError)(
            750, what, hint=f"the same command{how} goes on from there"
        )

    def state(self) -> dict[str, Any]:
        """All that decides the rest of the run; tensors, numbers and text."""
        scaler, before = self.accelerator.scaler, self.before
        return {
            "losses": ranks.all_gather(list(self.losses)),
            "skipped": self.skipped,
            "before": None if before is None else astuple(before),
            "weights": dict(self.task.loaded.module.state_dict()),
            "optimizer": self.method.control.optimizer.state_dict(),
            "method": self.method.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        self.losses, self.skipped = list(state["losses"][ranks.rank()]), state["skipped"]
        self.before = None if state["before"] is None else Measured(*state["before"])
        for name, value in self.task.loaded.module.state_dict().items():
            ranks.local_tensor(value).copy_(state["weights"][name])
        self.method.load_state_dict(moved(state["method"], self.accelerator.device))
        ranks.load_averages(self.method.control.optimizer, state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
