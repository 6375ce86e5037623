"""A run in words: what it is about to do, for the person at the terminal and for the manifest."""

from lpsparse.parallel.progress import Brief
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.training.control import SparsityControl

_SAID = (  # beside what is said in words
    "allocation",
    "ramp",
    "p_start",
    "lambda_2",
    "selective",
    "masked_forward",
    "cautious",
    "prox",
    "factors",
    "gain_lr_ratio",
    "path_penalty",
    "lr_schedule",
    "distill",
    "distill_blocks",
    "r_drop",
    "augment",
)


_METHODS = {"lp": "L_p decay", "l1": "L_1 decay", "dwf": "deep weight factorisation", "rigl": "RigL"}
_UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))


def in_words(step: FinetuneStep, control: SparsityControl, steps: int) -> Brief:
    """One line, and all that decides the run."""
    return Brief(_in_short(step, control, steps), _in_full(step, control, steps))


def _in_short(step: FinetuneStep, control: SparsityControl, steps: int) -> str:
    target = control.target
    phased = target is not None and step.method not in ("one-shot", "rigl")
    text = f"{steps} steps{f': {control.phases.in_words()}' if phased else ''}. Method: "
    text += _METHODS.get(step.method, step.method)
    if control.decay is not None:
        text += f" (p {control.p:g}, lambda {control.base_lambda:.3g})"
    if step.method == "dense":
        return f"{text}, nothing is pruned."
    size = next((f"{control.size / one:.3g} {unit}" for one, unit in _UNITS if control.size >= one), "")
    of = f"of {size or control.size} weights"
    if target is None:
        return f"{text}, no target: weights under about {control.w_kill:.3g} {of} go to zero."
    score = f"{step.score.capitalize()} score" if step.score == "fisher" else f"by {step.score}"
    return f"{text}, {score}, target {100 * float(target):.4g} % {of}."


def _in_full(step: FinetuneStep, control: SparsityControl, steps: int) -> str:
    text = f"{steps} steps, method {step.method}, {len(control.weights)} tensors of {control.size:,} weights"
    if step.condition != "none":
        text += f", conditioned by {step.condition}"
    if said := step.options(_SAID):
        text += f", {' '.join(said)}"
    if control.target is not None and step.method not in ("one-shot", "rigl"):
        text += f"; steps: {control.phases.in_words()}"
    if control.target is not None:
        text += f"; chosen by {step.score}"
        if step.cut == "gradual":
            text += ", cut as the target rises"
        if step.keep_zeros and control.start > float(control.target) * control.size:
            text += f"; --keep-zeros keeps the {control.start:,} zeros of MODEL, more than the target"
    if control.decay is None:
        return text
    text += (
        f"; p {control.p:g}, lambda_p {control.base_lambda:.4g} (ours; the authors' "
        f"{control.base_lambda / control.p:.4g})"
    )
    if control.selective:
        return f"{text}, on the weights that the current target would cut"
    if control.p >= 2:
        return f"{text}; with p of 2 or more no weight reaches zero by itself: give a --target-sparsity"
    text += f", sum of learning rates {control.sum_lr:.4g}"
    if step.p_start is None:  # with one the budget's formula does not hold
        text += f", w_kill {control.w_kill:.4g}"
    settling = steps - control.phases.cut_at
    if control.p >= 1 or control.target is not None or settling == 0:
        return text
    return (
        f"{text}; in the last {settling} steps what is far under w_kill falls, its lambda rising as lr ends"
    )
