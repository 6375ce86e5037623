"""What a model is trained and measured on: one file a task, one line here."""

from lpsparse.training.tasks import causal_lm, image_classification, masked_lm, text_classification

TASKS = {
    "causal-lm": causal_lm.prepare,
    "masked-lm": masked_lm.prepare,
    "text-classification": text_classification.prepare,
    "image-classification": image_classification.prepare,
}
