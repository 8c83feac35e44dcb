"""What runs leave, read by twelve other programs, each in a process that cannot import this project: ``make outside``.

    python benchmarks/outside.py --out logs/outside

Tiny runs are made by the command line on made-up rows: one label, one label of a pair, several labels. Each client
(``outside_clients.py``) compares what it reads with what ``predict``, ``test`` or ``ablate`` wrote. A line a client
says its version and ok or FAILED; ``outside.json`` holds the same. The exit status is 1 if one failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from outside_clients import CLIENTS, MEAN

ROOT = Path(__file__).parents[1]
FIT = ["fit", "--config", "own_csv", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
FIT += ["--trainer.precision", "32-true"]  # so that a probability differs by rounding alone
FIRST = ["--model.pooling", "first", "--track", "mlflow"]
PAIR = ["--data.source", "pairs.csv", "--data.text_column", "[first, second]", "--data.label_column", "label"]
#: What makes each run, beside ``FIT``.
RUNS = {
    "tickets": [*FIRST, "--data.truncation", "head"],
    "pairs": [*FIRST, *PAIR],
    "topics": [
        *FIRST,
        *("--data.truncation", "head", "--data.source", "topics.csv"),
        *("--data.label_column", "topics", "--data.label_separator", ";"),
    ],
    MEAN: ["--data.truncation", "head"],
}
SWEEP = f"""
question: Which learning rate?
base: {ROOT}/configs/experiment/own_csv.yaml
axes: {{method: {{model.method: [lora, head]}}}}
search: {{space: {{model.learning_rate: {{low: 1.0e-3, high: 1.0e-2, log: true}}}}, trials: 2}}
seeds: [1]
settings: {{trainer.max_epochs: 1, data.train_rows: 60, data.val_size: 30, data.test_rows: 30}}
"""


def make(folder: Path) -> None:
    """Write what the clients read: rows, runs, exports, predictions, a search with its report, a data card."""
    folder.mkdir(parents=True)
    (folder / "sweep.yaml").write_text(SWEEP, encoding="utf-8")
    os.environ |= {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(program: str, *words: str) -> None:
        done = subprocess.run(
            [sys.executable, ROOT / program, *words], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{program} {' '.join(words)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    for rows in (["make_tickets.py", "tickets.csv", "300"], ["make_tickets.py", "topics.csv", "300", "topics"]):
        run(f"examples/{rows[0]}", *rows[1:])
    run("examples/make_pairs.py", "pairs.csv", "300")
    for name, words in RUNS.items():
        print(f"run {name}", flush=True)
        rows = "tickets.csv" if name == MEAN else f"{name}.csv"
        run("main.py", *FIT, *words, "--name", name)
        run("main.py", "test", "--run", f"logs/{name}", "--before", "false")
        run("main.py", "export", "--run", f"logs/{name}", "--rows", "20")
        for ending in ("csv", "parquet"):
            run(
                "main.py", "predict", "--run", f"logs/{name}", "--input", rows, "--output", f"{name}-predicted.{ending}"
            )
    print("search, report, data card", flush=True)
    run("main.py", "ablate", "--config", "sweep.yaml", "--name", "sweep")
    run("main.py", "data", "--config", "own_csv", "--output", "card.html")


def ask(client: str, folder: Path) -> dict[str, Any]:
    """Run a client; return its version, whether it found what was written, and why not."""
    words = [sys.executable, ROOT / "benchmarks" / "outside_clients.py", client, folder]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"client": client, "ok": False, "why": [line for line in done.stderr.splitlines() if line.strip()][-12:]}
    return {"client": client, "ok": True, "version": json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    """Make the runs, ask the clients and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("logs/outside"), help="a folder; what it held is removed")
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=[*CLIENTS], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="ask about the runs that the folder holds already")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    if not options.keep:
        shutil.rmtree(out, ignore_errors=True)
        make(out)
    found = []
    for client in options.clients:
        found.append(ask(client, out))
        print(f"{client} {found[-1].get('version', '')}: {'ok' if found[-1]['ok'] else 'FAILED'}", flush=True)
        print(*(f"    {line}" for line in found[-1].get("why", ())), sep="\n", end="\n" * ("why" in found[-1]))
    (out / "outside.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"{sum(each['ok'] for each in found)} of {len(found)}; written: {out / 'outside.json'}")
    return int(not all(each["ok"] for each in found))


if __name__ == "__main__":
    sys.exit(main())
