"""Measure time and peak memory of `tagger-job check` for data of many rows.

`python -m bench.check --rows 2000 100000` prints a line for each number of rows. The rows are made up: 20 words a text
with the frequencies of Zipf's law, three percent of the texts nearly equal to another, 3 of 500 tags each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path

from bench.bases import SMOLLM2

WORDS, TAGS = 50_000, 500


def write_rows(path: Path, rows: int) -> None:
    """Write a file of JSON lines with this many rows."""
    rng = random.Random(0)
    words, weights = [f"w{number}" for number in range(WORDS)], list(accumulate(1 / (n + 1) for n in range(WORDS)))
    with path.open("w", encoding="utf-8") as file:
        text: list[str] = []
        for number in range(rows):
            # every 33rd text is the one before with another last word
            text = [*text[:-1], f"z{number}"] if number % 33 == 32 else rng.choices(words, cum_weights=weights, k=20)
            tags = [f"tag {rng.randrange(TAGS)}" for _ in range(3)]
            file.write(json.dumps({"quote": " ".join(text), "tags": tags}) + "\n")


def main() -> None:
    """Measure each number of rows in a process of its own."""
    parser = argparse.ArgumentParser(prog="python -m bench.check", description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[2_000, 20_000, 100_000])
    options = parser.parse_args()
    print("rows       seconds  peak GiB (the largest process so far)")
    with tempfile.TemporaryDirectory() as folder:
        for rows in sorted(options.rows):
            path = Path(folder, f"{rows}.jsonl")
            write_rows(path, rows)
            environ = os.environ | {
                "TAGGER_BASE_MODEL": SMOLLM2,
                "TAGGER_DATA_DATASET": str(path),
                "TAGGER_RUN_DIR": folder,
                "TAGGER_HUB_PUSH": "never",
            }
            started = time.monotonic()
            subprocess.run([sys.executable, "-m", "job", "check"], env=environ, stdout=subprocess.DEVNULL, check=True)
            seconds = time.monotonic() - started
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            print(f"{rows:<10} {seconds:7.1f}  {peak:8.2f}", flush=True)


if __name__ == "__main__":
    main()
