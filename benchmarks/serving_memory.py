"""Memory of ``serve`` with one run and with several on the same base.

    python benchmarks/serving_memory.py --runs 10 --out logs/serving_memory.json

Trains short LoRA runs of the default config, each with another seed, under ``logs/serving-memory`` (once), serves one
of them, then all, asks each for a prediction, and reads the resident memory of the process.
"""

import argparse
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
FOLDER = Path("logs/serving-memory")
SHORT = ["--data.train_rows", "64", "--data.val_size", "32", "--data.max_length", "64", "--trainer.max_epochs", "1"]


def train(count: int) -> list[Path]:
    """Train as many runs as are missing; return their folders."""
    runs = [FOLDER / f"seed-{seed}" for seed in range(1, count + 1)]
    for seed, run in enumerate(runs, 1):
        if not (run / "run.json").is_file():
            words = ["--name", run.name, "--logs_dir", str(FOLDER), "--seed_everything", str(seed)]
            subprocess.run([sys.executable, "main.py", "fit", *words, *SHORT], cwd=ROOT, check=True)
    return runs


def memory_mb(runs: list[Path], port: int) -> float:
    """The resident memory, in MB of 10^6 bytes, of a server that has predicted by each of the runs."""
    words = [word for run in runs for word in ("--run", str(run))]
    command = [sys.executable, "main.py", "serve", *words, "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                sys.stderr.write(line)
                if "serving at" in line:
                    break
            for run in runs:
                body = json.dumps({"texts": ["A beautiful film, wonderfully acted."] * 8, "run": run.name}).encode()
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", body, headers)
                urllib.request.urlopen(request, timeout=60).read()
            return psutil.Process(server.pid).memory_info().rss / 1e6
        finally:
            server.terminate()


def main() -> None:
    """Measure, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--port", type=int, default=8211)
    parser.add_argument("--out", type=Path, default=Path("logs/serving_memory.json"))
    options = parser.parse_args()
    runs = train(options.runs)
    found = {"1": memory_mb(runs[:1], options.port), str(len(runs)): memory_mb(runs, options.port)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"resident_mb": found}, indent=2) + "\n", encoding="utf-8")
    print("\n".join(f"{count} runs: {size:.0f} MB" for count, size in found.items()))


if __name__ == "__main__":
    main()
