"""How fast scenes render: images per CPU second of one core.

    python benchmarks/scenes.py [--count 200]

Compare with the labeling rate: rendering must not be what a demo waits for. Expect 60 or more at 224 pixels.
"""

from __future__ import annotations

import sys

# Import from the root: benchmarks/tokenize.py, beside this file, would hide the standard library's.
sys.path.insert(0, sys.path.pop(0).removesuffix("/benchmarks"))

import argparse
import time

from fourmill.scenes import render


def rate(size: int, count: int) -> float:
    """Images per CPU second (user + system time of this process)."""
    render(0, 0, size)
    start = time.process_time()
    for index in range(count):
        render(3, index, size)
    return count / (time.process_time() - start)


def main() -> None:
    """Print one line per picture size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="scenes per size")
    count = parser.parse_args().count
    for size in (128, 224):
        print(f"{size} px: {rate(size, count):.0f} images per CPU second")


if __name__ == "__main__":
    main()
