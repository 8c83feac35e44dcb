"""Throughput and latency of ``serve`` beside a plain FastAPI application around a transformers pipeline.

    pip install -c constraints.txt locust==2.47.0
    python main.py fit --name bench --data.truncation head --model.pooling first
    python main.py export --run logs/bench --formats [merged]
    python benchmarks/serving.py --run logs/bench --out logs/serving.json

Both serve the same weights on the same machine, one at a time and in turn, to 1, 4, 16 and 64 clients of locust. Each
waits for an answer before it asks again, and checks it against what ``predict`` gives. Texts are from the run's test
rows, of n words, with n drawn so that short ones are as frequent as long ones (log-uniform, 5 to 250). The peer is what
one writes first: a pipeline of the merged export, and a function as its endpoint.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
#: Largest difference from a probability of ``predict``, which rounding of bfloat16 explains.
TOLERANCE = 0.05
PEER = """
import sys
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

classify = pipeline("text-classification", model=sys.argv[1], truncation=True, max_length=int(sys.argv[2]), top_k=None)
app = FastAPI()

class Body(BaseModel):
    texts: list[str]

@app.get("/health")
def health() -> str:
    return "ok"

@app.post("/predict")
def predict(body: Body) -> dict:
    found = classify(body.texts)
    return {"predictions": [{"probabilities": {each["label"]: each["score"] for each in row}} for row in found]}

uvicorn.run(app, port=int(sys.argv[3]), log_level="warning")
"""


def make_texts(run: Path, count: int) -> list[str]:
    """Test rows of a run, each cut to a number of words; no two are the same."""
    from lightning_lora.data.prepare import SourceOptions, prepare
    from lightning_lora.data.stored import default_cache_dir
    from lightning_lora.runs.folder import RunFolder

    data = RunFolder.open(run).settings()["data"]
    options = SourceOptions.of(data)
    rows = prepare(options, default_cache_dir()).splits["test"].texts
    rng = np.random.default_rng(0)
    texts: dict[str, None] = {}
    for i in range(20 * count):
        words = rows[i % len(rows)].split()
        start = int(rng.integers(0, max(len(words) - 5, 1)))
        texts.setdefault(" ".join(words[start : start + int(np.exp(rng.uniform(np.log(5), np.log(250))))]))
        if len(texts) == count:
            break
    return list(texts)


@contextmanager
def server(command: list[str], port: int) -> Iterator[None]:
    """A server that answers, until the end of the block."""
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).read()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"the server ended with status {process.returncode}") from None
                    time.sleep(0.2)
            yield
        finally:
            process.terminate()


def load(port: int, clients: int, seconds: int, texts: Path) -> dict[str, Any]:
    """What locust measures."""
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        str(ROOT / "benchmarks" / "serving_load.py"),
        "--headless",
        "--json",
    ]
    command += ["-u", str(clients), "-r", str(clients), "-t", f"{seconds}s", "--host", f"http://127.0.0.1:{port}"]
    environment = {**os.environ, "LOAD_TEXTS": str(texts)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if not done.stdout.strip():  # with failed requests it has a status of its own, and figures
        raise SystemExit(f"locust: {done.stderr[-1000:]}")
    (stats,) = json.loads(done.stdout)
    times = {float(ms): count for ms, count in stats["response_times"].items()}
    ordered = np.repeat(sorted(times), [times[ms] for ms in sorted(times)])
    elapsed = stats["last_request_timestamp"] - stats["start_time"]
    return {
        "requests": stats["num_requests"],
        "failures": stats["num_failures"],
        "requests_per_s": stats["num_requests"] / elapsed,
        "p50_ms": float(np.percentile(ordered, 50)),
        "p95_ms": float(np.percentile(ordered, 95)),
    }


def main() -> None:
    """Measure, print a table and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="a run with an export 'merged'")
    parser.add_argument("--out", type=Path, default=Path("logs/serving.json"))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=int, default=60, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=1, help="times that both are measured in turn")
    parser.add_argument("--port", type=int, default=8210)
    parser.add_argument("--smoke", action="store_true", help="two clients, some seconds: does it still run?")
    options = parser.parse_args()
    if options.smoke:
        options.clients, options.seconds = [2], 3
    merged = (options.run / "export" / "merged").resolve()
    if not merged.is_dir():
        raise SystemExit(f"no folder {merged}: python main.py export --run {options.run} --formats [merged]")
    from lightning_lora import load_run

    loaded = load_run(options.run)
    texts = make_texts(options.run, 400)
    found = loaded.predict(texts)
    expected = [dict(zip(found.label_names, row, strict=True)) for row in found.probabilities.tolist()]
    max_length, port = loaded.input_format.max_length, options.port
    commands = {
        "serve": [sys.executable, "main.py", "serve", "--run", str(options.run.resolve()), "--port", str(port)],
        "pipeline": [
            *(sys.executable, "-c", PEER, str(merged)),
            *(str(max_length), str(port)),
        ],
    }
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "texts.json"
        file.write_text(json.dumps({"texts": texts, "expected": expected, "tolerance": TOLERANCE}), encoding="utf-8")
        for clients in options.clients * options.rounds:
            for name, command in commands.items():
                with server(command, port):
                    load(port, clients, 3, file)  # until it is warm
                    measured = load(port, clients, options.seconds, file)
                results.append({"server": name, "clients": clients, **measured})
                print(json.dumps(results[-1]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"seconds": options.seconds, "texts": len(texts), "results": results}
    options.out.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
