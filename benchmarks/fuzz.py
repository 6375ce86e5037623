"""The reader of packed files against files that were changed at random: it reads or refuses them, soon, and
allocates no more than what they declare.

    python benchmarks/fuzz.py [--inputs 100000] [--seed 0]

Starts from tests/golden: true and hostile files. Prints how many were read and refused; exit 1 for any other
end, for more than 2 seconds, or for more memory than 4 times the tensors that the file declares and 2 MiB.
"""

import argparse
import random
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.errors import InputError

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SECONDS, TIMES, CONSTANT = 2.0, 4, 2 << 20


def changed(data: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, cut out, put in, or doubled; most of them beyond the JSON header."""
    found = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.randint(1, 4)):
        low = header if draw.random() < 0.8 else 0
        at = draw.randrange(min(low, len(found) - 1), len(found))
        kind = draw.randrange(5)
        if kind == 0:
            found[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            found[at] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
        elif kind == 2:
            del found[at : at + draw.randint(1, 16)]
        elif kind == 3:
            found[at:at] = draw.randbytes(draw.randint(1, 16))
        else:
            found[at : at + 8] = draw.choice((0, 1, 2**31, 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little")
        if len(found) < 16:
            break
    if (
        draw.random() < 0.7 and len(found) > header
    ):  # of the right length again, so that more than that is tried
        found = (found + bytes(len(data)))[: len(data)]
    return bytes(found)


def trial(path: Path) -> tuple[str, int, float]:
    """How it ended, the bytes that it declared, and the seconds that it took."""
    declared, began = 0, time.perf_counter()
    try:
        for tensor in open_checkpoint(path).tensors:
            declared += tensor.nbytes
            for _ in tensor.blocks():
                pass
        end = "read"
    except InputError:
        end = "refused"
    except Exception as error:
        end = f"{type(error).__name__}: {error}"
    return end, declared, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    sources = [GOLDEN / "packed-1.safetensors", *sorted((GOLDEN / "hostile").glob("*.safetensors"))]
    whole = [source.read_bytes() for source in sources]
    counts, wrong, slowest, most = Counter[str](), 0, 0.0, 0.0
    tracemalloc.start()
    with tempfile.TemporaryDirectory(prefix="lpsparse-fuzz-") as folder:
        path = Path(folder) / "fuzz.safetensors"
        for _ in range(arguments.inputs):
            path.write_bytes(changed(whole[0] if draw.random() < 0.5 else draw.choice(whole), draw))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            end, declared, seconds = trial(path)
            peak = tracemalloc.get_traced_memory()[1] - before
            counts[end] += 1
            slowest, most = max(slowest, seconds), max(most, peak / (TIMES * declared + CONSTANT))
            if end not in ("read", "refused") or seconds > SECONDS or peak > TIMES * declared + CONSTANT:
                wrong += 1
                print(f"WRONG: {end}, {seconds:.2f} s, {peak} bytes for {declared}: {path.read_bytes()!r}")
    print("| inputs | read | refused | wrong | slowest, s | most memory, of the bound |\n|" + " --- |" * 6)
    ends = f"{counts['read']} | {counts['refused']} | {wrong}"
    print(f"| {arguments.inputs} | {ends} | {slowest:.3f} | {most:.2f} |")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
