"""How long `lpsparse demo` takes, beside a fixed loop of torch that is timed in turns with it.

    python benchmarks/demo.py [--rounds 5]

The loop trains a small network for 400 steps on one thread. Another machine takes for the demo about the
ratio times what it takes for the loop.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOOP = """
import time, torch
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(8)))
optimizer, x = torch.optim.AdamW(model.parameters()), torch.randn(256, 256)
started = time.perf_counter()
for _ in range(400):
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
print(time.perf_counter() - started)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| round | demo, s | loop, s | ratio |")
    print("| --- | --- | --- | --- |")
    ratios: list[float] = []
    for i in range(rounds):
        loop = subprocess.run([sys.executable, "-c", LOOP], capture_output=True, text=True, check=True)
        with tempfile.TemporaryDirectory(prefix="lpsparse-") as folder:
            started = time.perf_counter()
            words = [sys.executable, "-m", "lpsparse", "demo", str(Path(folder, "demo")), "--quiet"]
            subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
            demo = time.perf_counter() - started
        ratios.append(demo / float(loop.stdout))
        print(f"| {i + 1} | {demo:.1f} | {float(loop.stdout):.2f} | {ratios[-1]:.1f} |", flush=True)
    print(f"\nmedian ratio {statistics.median(ratios):.1f}")


if __name__ == "__main__":
    main()
