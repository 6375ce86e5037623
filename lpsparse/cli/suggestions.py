"""What people type who know another tool -> what they mean here."""

MEANT = {
    "compress": "prune",
    "sparsify": "prune",
    "diff": "report",
    "compare": "report",
    "train": "finetune",
    "evaluate": "eval",
    "upload": "push",
    "ls": "inspect",
    "show": "inspect",
    "check": "verify",
    "version": "--version",
    "--bf16": "--mixed-precision bf16",
    "--fp16": "--mixed-precision fp16",
    "--amount": "--sparsity",
    "--force": "--overwrite",
    "--output": "OUT, the second argument",
}
