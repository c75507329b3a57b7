"""How fast scenes render: images per CPU second of one core.

    python benchmarks/scenes.py [--count 200]

Compare with the labeling rate: rendering must not be what a demo waits for. Expect 60 or more at 224 pixels.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
