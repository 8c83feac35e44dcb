"""Rows a second of ``predict`` over many files, in one process and as processes grow.

    python benchmarks/predict.py --run logs/NAME
    python benchmarks/predict.py --run logs/NAME --workers 1 2 4 8 --rows 200000

Writes Parquet files of made-up texts, has each number of workers predict them anew, and prints a table. Every number of
workers does the same work; what counts is measured by this script, from the start of the command to its end, so that
it includes what each worker needs to load the model. The threads are divided among the workers: one process already
uses all cores, and several gain only what a single process leaves unused.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = "the film was a story of two people in town and their dog with some music long short loud quiet fine dull"


def write_files(folder: Path, files: int, rows: int, words: int, seed: int = 0) -> None:
    """Files of texts that have from a quarter of so many words up to all of them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, known = random.Random(seed), TEXT.split()
    folder.mkdir()
    for i in range(files):
        count = rows // files + (i < rows % files)
        texts = [" ".join(rng.choices(known, k=rng.randint(max(words // 4, 1), words))) for _ in range(count)]
        pq.write_table(pa.table({"id": range(count), "text": texts}), folder / f"part-{i:04d}.parquet")


def measure(run: Path, source: Path, output: Path, more: list[str]) -> float:
    """Seconds that the command takes."""
    words = ["predict", "--run", str(run), "--input", str(source), "--output", str(output), "--text_column", "text"]
    began = time.monotonic()
    subprocess.run([sys.executable, str(ROOT / "main.py"), *words, *more], check=True)
    return time.monotonic() - began


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a run folder that fit made")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of processes to measure")
    parser.add_argument("--rows", type=int, default=20_000, help="texts in all files")
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--words", type=int, default=60, help="words of the longest texts")
    parser.add_argument("--ray", action="store_true", help="also on a Ray cluster of this machine")
    given = parser.parse_args()
    ways = [(f"{n} process" + "es" * (n > 1), ["--workers", str(n)]) for n in given.workers]
    ways += [("Ray", ["--executor", "ray"])] * given.ray
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_files(folder / "in", given.files, given.rows, given.words)
        none = folder / "none"
        write_files(none, 1, 0, given.words)
        start_s = measure(given.run, none, folder / "started", [])
        first = None
        for i, (way, more) in enumerate(ways):
            seconds = measure(given.run, folder / "in", folder / f"out-{i}", more)
            first = first or seconds
            lines.append(f"| {way} | {seconds:.1f} | {given.rows / seconds:,.0f} | {first / seconds:.2f} |")
    print(f"\n{given.rows:,} rows in {given.files} files; a command without rows takes {start_s:.1f} s\n")
    print("| | s | rows/s | times the first |\n| --- | --- | --- | --- |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
