"""The training loop, from the first step to the last. One process and many are the same code."""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch

from lpsparse.errors import InterruptError, NumericError, ResourceError, ResumableError
from lpsparse.parallel import ranks
from lpsparse.parallel.progress import advance, phase
from lpsparse.pruning.targets import Chosen
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.build import Setup, build
from lpsparse.training.loss import batch_loss
from lpsparse.training.metrics import OnStep, Progress
from lpsparse.training.optimizers import switch
from lpsparse.training.order import Part, batches, seed_pass
from lpsparse.training.quality import Measured, evaluate
from lpsparse.training.state import States, moved
from lpsparse.training.stopping import Stop, guarded, listening
from lpsparse.training.tasks.base import Batch, Task

SAVE_SECONDS = 15 * 60
SPIKE = 10.0  # times the usual loss: reported, since a batch may be broken


@dataclass(frozen=True, slots=True)
class Trained:
    task: Task
    prunable: Chosen  # name in OUT -> whether, and why
    before: Measured | None  # None: the head is fresh
    after: Measured
    facts: str  # steps, lambda_p, sum of learning rates, w_kill, in words


def train(
    step: FinetuneStep, task: Task, on_step: OnStep, say: Callable[[str], None], states: States
) -> Trained:
    """Train `task` in place by the step's method, from the state that `states` has found, if any.

    All processes call it. Raises NumericError on a loss or gradient that is not finite, ResumableError and
    InterruptError when it was asked to stop and has saved its state.
    """
    found = states.read()
    setup = build(step, task, say, resumes=found is not None)
    step, driver, optimizer = setup.step, setup.driver, setup.optimizer
    run, steps = Run(setup, states), driver.control.phases.steps
    if found is not None:
        run.restore(found)
        say(f"resuming at step {driver.done} of {steps}")
    if setup.teacher is not None:
        setup.teacher.open()
    setup.model.train()
    given = batches(step, task, driver.done, steps)
    with listening(run.stop), phase(run.doing(), steps, "steps", done=driver.done):
        for t in range(driver.done, steps):
            # Twice: torch reports a dead worker by a signal, which may come while the first reads an error.
            with guarded(step, t, states.last), guarded(step, t, states.last):
                parts = next(given)
                driver.before_step()
                loss = run.backward(parts)
                driver.after_backward()
                asked, due = run.check(t, loss)
                optimizer.step()
                run.skipped += setup.accelerator.optimizer_step_was_skipped
                optimizer.zero_grad()
                driver.after_step()
                run.report(parts[0][0].epoch, on_step)
                if asked or due:
                    run.save()
            if asked:
                raise run.left(asked)
    return _finished(run)


def _finished(run: "Run") -> Trained:
    """Take everything off the model, round its weights to the dtypes of OUT, and measure it."""
    setup, facts = run.setup, run.setup.facts.full
    task, model = setup.task, setup.task.loaded.module
    if run.skipped:
        facts += f"; {run.skipped} steps left out, whose gradients overflowed in fp16"
    switch(setup.driver.control.optimizer, "eval")
    setup.driver.finish()
    if setup.teacher is not None:
        setup.teacher.close()
    if not setup.step.shard:  # or it would be measured under autocast
        setup.accelerator.unwrap_model(setup.model, keep_fp32_wrapper=False)
    ranks.broadcast_buffers(model)
    task.loaded.round_to_storage()
    return Trained(task, setup.prunable, run.before, evaluate(setup.step, task, "after"), facts)


class Run:
    """What changes from step to step, beside the model and the optimizer."""

    def __init__(self, setup: Setup, states: States) -> None:
        self.setup, self.states, self.before = setup, states, setup.before
        self.losses: list[float] = []  # since the last line of the log
        self.skipped = 0  # steps whose gradients overflowed in fp16
        self.stop = Stop(setup.step.max_time)
        self._saved = time.monotonic()
        self._recent: deque[float] = deque(maxlen=20)
        self._zero = ("", "")  # phase and share of zeros when they were counted last

    def backward(self, parts: list[tuple[Part, Batch]]) -> float:
        """Return the loss of this process's share of the step's batch, and leave its gradients."""
        setup, step, world_size = self.setup, self.setup.step, ranks.world_size()
        augment, device = setup.task.augment, setup.accelerator.device
        alone = world_size * step.accumulate == 1
        ready: list[tuple[Part, Batch]] = []
        for part, batch in parts:
            batch = {key: value.to(device) for key, value in batch.items()}
            ready.append((part, batch if augment is None else augment(batch, part.seeds(step.seed))))
        counts = [0 if part.empty else setup.task.count(batch) for part, batch in ready]
        total = 1.0 if alone else ranks.all_reduce_sum([sum(counts)])[0]
        whole = 0.0
        for k, (part, batch) in enumerate(ready):
            last = k == len(ready) - 1
            seed_pass(step, part)
            with nullcontext() if last else ranks.no_sync(setup.model):
                with setup.accelerator.autocast():
                    loss = batch_loss(step, setup.task, setup.model, batch, setup.teacher)
                if not alone:  # so that the processes' mean is the mean over the whole batch
                    loss = loss * (world_size * counts[k] / total)
                setup.accelerator.backward(loss)
            whole += float(loss.detach())
        return whole

    def check(self, t: int, loss: float) -> tuple[int, bool]:
        """Clip the gradients of step t and look whether all is finite. Return whether the run was asked to
        stop (2: by Ctrl-C), and whether a state is due; the same on all processes."""
        accelerator, step = self.setup.accelerator, self.setup.step
        groups: list[dict[str, Any]] = self.setup.optimizer.param_groups
        params = [param for group in groups for param in group["params"]]  # gains included
        norm = ranks.to_float(accelerator.clip_grad_norm_(params, step.clip or math.inf))
        # A loss scaler (fp16) skips a step whose gradients overflow, and continues with a smaller scale.
        bad = not math.isfinite(loss) or (accelerator.scaler is None and not math.isfinite(norm))
        asked = {"": 0, "SIGINT": 2}.get(self.stop.reason(), 1)
        bad, asked, due = ranks.all_reduce_max([bad, asked, self._is_due(t + 1)])
        if bad:
            last = self.states.last()
            kept = f"the state of step {last} is complete" if last else "nothing was written"
            steps = self.setup.driver.control.phases.steps
            what = f"step {t + 1} of {steps}: loss {loss}, gradient norm {norm}; {kept}"
            raise NumericError(501, what, hint="lower --lr (with --resume never); the input is untouched")
        self.losses.append(loss)
        usual = statistics.median(self._recent) if len(self._recent) == self._recent.maxlen else math.inf
        if loss > SPIKE * usual:
            times = f"{loss / usual:.0f} times the usual {usual:.4g}"
            self.setup.say(f"step {t + 1}: loss {loss:.4g} is {times}")
        self._recent.append(loss)
        return int(asked), bool(due)

    def _is_due(self, done: int) -> bool:
        save_every = self.setup.step.save_every
        if save_every is not None:
            return done % save_every == 0
        return time.monotonic() - self._saved >= SAVE_SECONDS

    def report(self, epoch: int, on_step: OnStep) -> None:
        """Advance the phase; every `log_every` steps give `on_step` the figures, as counting takes time."""
        control, done = self.setup.driver.control, self.setup.driver.done
        if done % self.setup.step.log_every == 0 or done == control.phases.steps:
            progress = self._progress(epoch)
            on_step(progress)
            self._zero = (self.doing(), f"zero {100 * progress.sparsity:.2f} %")
        zero = [self._zero[1]] if self._zero[0] == self.doing() else []
        rates = (f"lr {control.rates[done - 1]:.1e}", f"lambda {control.method.lambda_p:.1e}")
        advance(1, "steps", what=self.doing(), facts=(f"loss {self._recent[-1]:.4f}", *zero, *rates))

    def doing(self) -> str:
        """The phase's name."""
        control = self.setup.driver.control
        if control.method.cuts == "never":
            return "train"
        name = control.phases.name(self.setup.driver.done)
        return "settle" if name == "recover" and control.target is None else name

    def _progress(self, epoch: int) -> Progress:
        control, done = self.setup.driver.control, self.setup.driver.done
        if not self.setup.step.shard:
            odd = ranks.first_different_rank(ranks.fingerprint(control.weights.values()))
            if odd is not None:
                what = f"step {done}: weights diverged: rank {odd} differs from rank 0"
                hint = "run the same command again; check the memory of that machine"
                raise ResourceError(605, what, hint=hint)
        mean = ranks.all_reduce_sum([sum(self.losses) / len(self.losses)])[0] / ranks.world_size()
        self.losses.clear()
        size = max(1, control.size)
        return Progress(
            step=done,
            steps=control.phases.steps,
            epoch=epoch,
            loss=mean,
            lr=control.rates[done - 1],
            lambda_p=control.method.lambda_p,
            target=control.scheduled(done) / size,
            sparsity=control.zeros() / size,
            near_zero=control.near_zero(),
        )

    def left(self, asked: int) -> ResumableError | InterruptError:
        """The error with which a run leaves that was asked to stop and has saved its state."""
        reason, driver = self.stop.reason() or "another process", self.setup.driver
        how = " again" if self.setup.step.resume == "auto" else " with --resume auto"
        what = f"stopped by {reason} after step {driver.done} of {driver.control.phases.steps}"
        what += f"; its state is in {self.states.folder}"
        hint = f"run the same command{how} to resume"
        return (InterruptError if asked == 2 else ResumableError)(750, what, hint=hint)

    def save(self) -> None:
        """Save all that decides the rest of the run: tensors, numbers and text."""
        setup, scaler, before = self.setup, self.setup.accelerator.scaler, self.before
        state: dict[str, Any] = {
            "losses": ranks.all_gather(list(self.losses)),
            "skipped": self.skipped,
            "before": None if before is None else astuple(before),
            "weights": dict(setup.task.loaded.module.state_dict()),
            "optimizer": setup.driver.control.optimizer.state_dict(),
            "method": setup.driver.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        self.states.save(setup.driver.done, state)
        self._saved = time.monotonic()

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `save`."""
        setup, scaler = self.setup, self.setup.accelerator.scaler
        self.losses, self.skipped = list(state["losses"][ranks.rank()]), state["skipped"]
        self.before = None if state["before"] is None else Measured(*state["before"])
        for name, value in setup.task.loaded.module.state_dict().items():
            ranks.local_tensor(value).copy_(state["weights"][name])
        setup.driver.load_state_dict(moved(state["method"], setup.accelerator.device))
        ranks.load_averages(setup.driver.control.optimizer, state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
