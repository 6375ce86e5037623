"""Memory and time of transformers' from_pretrained on a packed folder, beside the dense one it was made of.

    python benchmarks/from_pretrained.py [--mib 1024] [--rounds 3]

A Llama with random weights, of which 80 % are zero, in float32. Each load is a process of its own; memory is
the most that it held beyond what it held before, as a multiple of the model's bytes. Linux alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import json, re, sys, time
from pathlib import Path
import lpsparse, torch
from transformers import LlamaForCausalLM
torch.set_num_threads(1)
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before, started = peak(), time.perf_counter()
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
seconds, held = time.perf_counter() - started, peak() - before
size = sum(each.numel() * each.element_size() for each in model.state_dict().values())
largest = max(each.numel() * each.element_size() for each in model.state_dict().values())
print(json.dumps([held / size, seconds, largest / size]))
"""
LAYER = 4096 * 1024 * 3 * 4 + 1024 * 1024 * 4 * 4  # bytes


def make(folder: Path, mib: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import lpsparse

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=max(1, (mib << 20) // LAYER),
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.mul_(torch.rand(value.shape) < 0.2)
    model.save_pretrained(folder / "dense")
    lpsparse.pack(folder / "dense", folder / "packed")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lpsparse-") as name:
        folder = Path(name)
        make(folder, given.mib)
        found: dict[str, list[list[float]]] = {"dense": [], "packed": []}
        for _ in range(given.rounds):
            for kind, rows in found.items():
                words = [sys.executable, "-c", LOAD, str(folder / kind)]
                ran = subprocess.run(words, capture_output=True, text=True, check=True)
                rows.append(json.loads(ran.stdout))
    print("| folder | memory beyond the start, of the model's bytes | seconds, median |")
    print("| --- | --- | --- |")
    for kind, rows in found.items():
        memory, seconds = (statistics.median(row[i] for row in rows) for i in (0, 1))
        print(f"| {kind} | {memory:.2f} | {seconds:.2f} |")
    print(f"largest tensor: {found['dense'][0][2]:.3f} of the model's bytes")


if __name__ == "__main__":
    main()
