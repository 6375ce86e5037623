"""The steps that a recipe may have, by name."""

from lpsparse.steps.base import Step
from lpsparse.steps.finetune import EvalStep, FinetuneStep, RecoverStep
from lpsparse.steps.pack import PackStep, UnpackStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.report import ReportStep, VerifyStep

STEPS: dict[str, type[Step]] = {
    "finetune": FinetuneStep,
    "prune": PruneStep,
    "recover": RecoverStep,
    "pack": PackStep,
    "unpack": UnpackStep,
    "eval": EvalStep,
    "report": ReportStep,
    "verify": VerifyStep,
}
