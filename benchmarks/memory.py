"""Memory and communication a GPU under FSDP2, by the code's own accounting: python benchmarks/memory.py"""

from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.resolve import resolve
from lpsparse.training.memory import estimate

GB = 1e9
MODELS = {"7 B": (6.74e9, 6.48e9), "70 B": (68.98e9, 68.45e9)}  # Llama 2: weights, and those that may be cut


def main() -> None:
    print("| model | GPUs | plain: kept | lpsparse: kept | at the peak of a step | sent a step, bf16 |")
    print("| --- | --- | --- | --- | --- | --- |")
    fixed = {"model": "-", "out": "-", "data": "-", "task": "causal-lm", "mixed_precision": "bf16"}
    plain = resolve(FinetuneStep, {**fixed, "shard": True, "method": "dense"})
    sparse = resolve(FinetuneStep, {**fixed, "shard": True, "target_sparsity": "0.8"})
    for name, (weights, prunable) in MODELS.items():
        for processes in (8, 64):
            sizes = {"trained": int(weights), "frozen": 0, "prunable": int(prunable), "processes": processes}
            base, ours = estimate(plain, **sizes), estimate(sparse, **sizes)
            figures = (base.kept, ours.kept, ours.kept + ours.peak, ours.exchanged)
            print(f"| {name} | {processes} | " + " | ".join(f"{each / GB:.1f} GB" for each in figures) + " |")


if __name__ == "__main__":
    main()
