"""Packed batches and CUDA graphs on one GPU: are they right, and how fast are they beside transformers' Trainer?

    python benchmarks/gpu.py --out logs/gpu.json

Nothing is downloaded: random weights of the right shapes, random tokens with the lengths of AG News. Each part runs by
itself (``--only training profile``); a part that fails is reported, and the others run. Without a GPU, and with
``--tiny``, the sizes are tiny and steps are not captured: that only shows that the script runs.
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # also where the project is not installed

import numpy as np
import torch

from benchmarks.gpu_common import BEST, CUDA, EPOCH, NAMES, Bench, PredictClock, Watch, fit, predictor, weights
from benchmarks.gpu_peer import TUNED, peer, peer_model, peer_training
from benchmarks.gpu_profile import evaluation_profile, pooling, profile
from benchmarks.throughput import encoder_flops
from lightning_lora.errors import UserError, first_line
from lightning_lora.models import packed
from lightning_lora.models.methods import METHODS, AdapterOptions
from lightning_lora.models.quantization import Quantization
from lightning_lora.models.speedups import Speedups
from lightning_lora.quiet import quiet_libraries
from lightning_lora.training.module import TextClassifier

PLAIN = Speedups(packing=False, cuda_graphs=False)
PACKED = Speedups(packing=True, cuda_graphs=False)
#: Asked for, as callbacks of one's own are there.
GRAPHS = Speedups(packing=True, cuda_graphs=True if CUDA else "auto")


def correctness(bench: "Bench") -> dict[str, Any]:
    """Packed against padded, captured against plain, repeats and resumes."""
    found: dict[str, Any] = {}
    base = bench.base("minilm", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    data, size = bench.rows(640 if not bench.tiny else 96), 16

    def losses(speedups: Speedups, precision: str, **model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        watch = Watch(losses=True)
        module = fit(base, data, size, speedups, watch, precision, **model)
        if speedups is GRAPHS and CUDA and module.not_captured:
            raise RuntimeError(module.not_captured)
        return torch.stack(watch.losses).cpu(), weights(module)

    for precision in ("32-true", "bf16-mixed"):
        padded, packed, graphs, again = (losses(s, precision) for s in (PLAIN, PACKED, GRAPHS, GRAPHS))
        found[f"{precision}: loss, packed - padded"] = float((packed[0] - padded[0]).abs().max())
        found[f"{precision}: first loss, packed - padded"] = float((packed[0] - padded[0])[0].abs())
        found[f"{precision}: loss, captured - packed"] = float((graphs[0] - packed[0]).abs().max())
        found[f"{precision}: weights, captured - packed"] = float((graphs[1] - packed[1]).abs().max())
        found[f"{precision}: repeat is bit for bit the same"] = bool(torch.equal(graphs[1], again[1]))
    dropped = bench.base("minilm")
    long = bench.rows(320 if not bench.tiny else 32, max_length=400, length=399)
    place = Path(bench.folder) / "resume.ckpt"
    straight = fit(dropped, long, 8, GRAPHS, Watch(), epochs=2)
    found["texts of 399 tokens, dropout: repeat is bit for bit the same"] = bool(
        torch.equal(weights(straight), weights(fit(dropped, long, 8, GRAPHS, Watch(), epochs=2)))
    )
    fit(dropped, long, 8, GRAPHS, Watch(), save=place)
    resumed = fit(dropped, long, 8, GRAPHS, Watch(), epochs=2, resume=place)
    found["texts of 399 tokens, dropout: resume is bit for bit the same"] = bool(
        torch.equal(weights(straight), weights(resumed))
    )
    return found


def methods(bench: "Bench") -> dict[str, Any]:
    """Each method of the table, and quantized bases: captured, or why not."""
    found: dict[str, Any] = {}
    base, data = bench.base("minilm"), bench.rows(192)
    runs = [(name, {"method": name}) for name, method in METHODS.items() if method.trains]
    runs += [("lora, dropout 0.1", {"adapter": AdapterOptions(dropout=0.1)})]
    runs += [("lora, frozen dropout", {"frozen_dropout": True})]
    runs += [("lora, gradient checkpointing", {"gradient_checkpointing": True})]
    runs += [(f"lora-{name}", {"quantization": Quantization(bits=bits)}) for name, bits in (("nf4", 4), ("int8", 8))]
    for name, settings in runs:
        try:
            watch = Watch(losses=True)
            module = fit(base, data, 16, BEST, watch, **settings)
            ends = bool(torch.stack(watch.losses).isfinite().all())
            packed = module.packed_batches.rejected
            said = f"plain: {module.not_captured}" if module.not_captured else "captured"
            found[name] = said + (f"; padded: {packed}" if packed else "") + ("" if ends else "; NOT FINITE")
        except UserError as error:  # captures are asked for
            found[name] = f"plain: {error}"
        except Exception as error:
            found[name] = f"failed: {first_line(error)}"
    return found


def architectures(bench: "Bench") -> dict[str, Any]:
    """Each architecture of the table: captured, or why not."""
    from lightning_lora.models.architectures import ARCHITECTURES

    found: dict[str, Any] = {}
    data = bench.rows(96)
    for name in ARCHITECTURES:
        try:
            try:
                module = fit(bench.base(name), data, 16, BEST, Watch())
            except UserError:  # captures are asked for; what cannot be captured must train all the same
                module = fit(bench.base(name), data, 16, Speedups(), Watch())
            packed = module.packed_batches.rejected or module.packed_batches.cannot
            found[name] = (f"plain: {module.not_captured}" if module.not_captured else "captured") + (
                f"; padded: {packed}" if packed else ""
            )
        except Exception as error:
            found[name] = f"failed: {first_line(error)}"
    return found


class Asks(TextClassifier):
    """A training loss that asks the device for a number, which a capture cannot."""

    def configure_losses(self) -> None:
        """Set it."""
        self.criterion = lambda logits, labels: (
            self.weighted_cross_entropy(logits, labels) * (logits.sum().item() > -1e9)
        )


def fallback(bench: "Bench") -> dict[str, Any]:
    """A step that cannot be captured is done plainly, and learns the same."""
    base, data = bench.base("minilm"), bench.rows(96)
    found = [fit(base, data, 16, speedups, Watch(), kind=Asks) for speedups in (GRAPHS, PACKED, GRAPHS)]
    return {
        "plain because": found[0].not_captured,
        "learns what a plain run learns": bool(torch.equal(weights(found[0]), weights(found[1]))),
        "again": bool(torch.equal(weights(found[0]), weights(found[2]))),
        "captured after it": fit(base, data, 16, GRAPHS, Watch()).not_captured is None,
    }


def long_texts(bench: "Bench") -> dict[str, Any]:
    """What the fixed order of the attention's backward pass costs: 256 tokens a text, 32 texts a step."""
    found, plain = {}, packed.flash_attention
    for name, order in (("fixed order", True), ("any order", False), ("fixed order, again", True)):
        packed.flash_attention = functools.partial(plain, fixed_order=order)  # type: ignore[assignment]
        data, watch = bench.rows(32 * (80 if not bench.tiny else 4), max_length=256, length=256), Watch()
        fit(bench.base("roberta-base"), data, 32, BEST, watch)
        found[f"{name}, ms a step"] = (watch.times[-1] - watch.times[0]) / (len(data) // 32 - watch.skip) * 1e3
    packed.flash_attention = plain
    return found


def own_training(bench: "Bench", batch_size: int, rows: int, speedups: Speedups) -> dict[str, Any]:
    """Seconds an epoch of 120,000 rows would take, from four fifths of the steps of this run."""
    data, watch = bench.rows(rows), Watch()
    adapter = AdapterOptions(rank=8, target_modules="query_value")
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    module = fit(bench.base("roberta-base"), data, batch_size, speedups, watch, adapter=adapter)
    steps = rows // batch_size
    each = (watch.times[-1] - watch.times[0]) / (steps - watch.skip)
    start = watch.times[0] - watch.started - watch.skip * each
    row = {"step_ms": each * 1e3, "epoch_s": each / batch_size * EPOCH, "setup_s": start}
    row["share_of_matrix_rate"] = float(data.lengths.sum()) / steps * encoder_flops(module.model) / each / bench.rate
    if CUDA:
        row["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 2**20
    return row | {"plain_because": module.not_captured}


def training(bench: "Bench") -> dict[str, Any]:
    """An epoch of AG News' 120,000 rows, roberta-base, LoRA r 8 on query and value; peers in turn."""
    sizes = {256: 200, 32: 500, 16: 700} if not bench.tiny else {8: 6}
    found: dict[str, Any] = {}
    for batch_size, steps in sizes.items():
        rows = batch_size * steps
        found[f"{batch_size}: this project"] = own_training(bench, batch_size, rows, BEST)
        for tuned in (True,) if batch_size > 16 else (False,):
            name = "tuned" if tuned else "common"
            found[f"{batch_size}: Trainer, {name}"] = peer_training(
                bench, batch_size, max(rows // 5, 4 * batch_size), tuned
            )
        if bench.again:
            packed._found_wanting.append("measured")
            found[f"{batch_size}: this project, FlashAttention"] = own_training(bench, batch_size, rows, BEST)
            packed._found_wanting.clear()
            found[f"{batch_size}: this project, padded and plain"] = own_training(
                bench, batch_size, max(rows // 5, 4 * batch_size), PLAIN
            )
            found[f"{batch_size}: this project, again"] = own_training(bench, batch_size, rows, BEST)
    return found


def evaluation(bench: "Bench") -> dict[str, Any]:
    """Texts a second of a trained model, beside the Trainer's own evaluation loop; how far bfloat16 is from float32."""
    rows = 24_000 if not bench.tiny else 40
    found: dict[str, Any] = {}
    for size in ("roberta-base", "minilm"):
        data = bench.rows(rows)
        variants = {"this project": BEST}
        if bench.again:
            variants["this project, GELU after its product"] = dataclasses.replace(BEST, fused_gelu=False)
            variants["this project, norms in float32"] = dataclasses.replace(BEST, low_norms=False)
        clock, rates = PredictClock(), dict[str, list[float]]()
        runs = {name: predictor(bench, size, speedups, clock) for name, speedups in variants.items()}
        peers = {name: peer(bench, peer_model(bench, tuned, size), rows, 256, tuned) for name, tuned in TUNED.items()}
        for _ in range(3):
            for name, run in runs.items():
                run.predict_dataset(data)
                rates.setdefault(name, []).append(rows / clock.seconds)
            for name, (their, table, _steps) in peers.items():
                part = table if TUNED[name] else table.select(range(rows if bench.tiny else rows // 24))
                loader = their.get_test_dataloader(part.sort("length", reverse=True) if TUNED[name] else part)
                started = time.perf_counter()
                their.evaluation_loop(loader, description="Prediction")
                rates.setdefault(name, []).append(len(part) / (time.perf_counter() - started))
        found[f"{size}, texts/s"] = rates
        best = {name: max(several) for name, several in rates.items()}
        for name in TUNED:
            found[f"{size}, best over the best of the {name}"] = best["this project"] / best[name]
        packed_batches = runs["this project"].model.packed_batches
        found[f"{size}, plain because"] = packed_batches.plain_evaluation or packed_batches.rejected
        few = bench.rows(2000 if not bench.tiny else 40)
        exact = predictor(bench, size, PLAIN, precision="32-true").predict_dataset(few).probabilities
        for name, speedups in {**variants, "padded and plain": PLAIN}.items():
            other = predictor(bench, size, speedups).predict_dataset(few).probabilities
            labels = float((other.argmax(1) != exact.argmax(1)).mean())
            found[f"{size}, {name}: probabilities from float32's"] = float(abs(other - exact).mean())
            found[f"{size}, {name}: other labels than float32"] = labels
    return found


def word_rows(bench: "Bench", rows: int, few: int) -> dict[str, Any]:
    """Settings of a data set of texts with AG News' lengths, and of MiniLM on it, 16 a step."""
    place, base = Path(bench.folder), bench.word_base("minilm")
    texts = place / "texts.csv"
    draw = np.random.default_rng(0)
    words = [f"w{i}" for i in range(2000)]
    lengths = bench.rows(rows).lengths
    with texts.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for length in [*lengths, *lengths[: 2 * few]]:  # as many to train on, and some to validate and to test
            label = int(draw.integers(4))
            text = draw.choice(words[label * 400 :], int(length) - 2)
            writer.writerow([" ".join(text), NAMES[label]])
    return {
        "model.base_model": str(base),
        "data.source": str(texts),
        "data.max_length": 128,
        "data.train_rows": rows,
        "data.val_size": few,
        "data.test_size": few,
        "data.test_rows": few,
        "data.batch_size": 16,
        "data.cache_dir": str(place / "cache"),
        "trainer.max_epochs": 1,
    }


def main_py(bench: "Bench", *arguments: str) -> tuple[float, str]:
    """Run ``main.py``; return the seconds it took and what it printed."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, str(Path(__file__).parents[1] / "main.py"), *arguments, f"--logs_dir={bench.folder}/logs"]
    started = time.perf_counter()
    done = subprocess.run(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-800:])
    return time.perf_counter() - started, done.stdout


def command(bench: "Bench") -> dict[str, Any]:
    """``main.py fit`` of MiniLM on 5,398 texts, 16 a step."""
    settings = word_rows(bench, *((5398, 500) if not bench.tiny else (64, 8)))
    wall, said = main_py(bench, "fit", "--name=run", *(f"--{key}={value}" for key, value in settings.items()))
    record = json.loads((Path(bench.folder) / "logs" / "run" / "run.json").read_text())
    return {
        "train_s": record["costs"]["train_s"],
        "startup_s": record["costs"]["startup_s"],
        "wall_s": wall,
        "steps": record["steps"],
        "speed": record["speed"],
        "said": [line for line in said.splitlines() if "warning" in line],
    }


def workers(bench: "Bench") -> dict[str, Any]:
    """Cells of an ablation an hour, by one process and by several at once on one GPU: ``ablate --workers``.

    Each process has three cells; counted is from the first cell of each to the last of all, so that what a process does
    once is left out.
    """
    settings = word_rows(bench, *((2000, 250) if not bench.tiny else (64, 8)))
    found: dict[str, Any] = {}
    for count in (1, 4) if not bench.tiny else (1, 2):
        config = Path(bench.folder) / f"workers{count}.yaml"
        axes = {"rate": {"model.learning_rate": [1e-4, 5e-4, 1e-3]}}
        plan = {"question": "What rate?", "settings": settings, "axes": axes, "baseline": {"rate": 1e-4}}
        config.write_text(json.dumps(plan | {"seeds": list(range(count))}))  # which is YAML too
        wall, _ = main_py(bench, "ablate", f"--config={config}", f"--workers={count}", "--no_test")
        records = list((Path(bench.folder) / "logs" / f"ablation-workers{count}" / "cells").glob("*/run.json"))
        ends = sorted(path.stat().st_mtime for path in records)
        costs = [json.loads(path.read_text())["costs"] for path in records]
        row: dict[str, Any] = {"wall_s": wall, "cells": len(ends)}
        row |= {name: [cost[name] for cost in costs] for name in ("startup_s", "train_s")}
        row["cells_an_hour"] = (len(ends) - count) / (ends[-1] - ends[count - 1]) * 3600
        found[f"{count} at once"] = row
        print(json.dumps(row), flush=True)
    one = found["1 at once"]["cells_an_hour"]
    return found | {"cells an hour, over one": {n: v["cells_an_hour"] / one for n, v in found.items()}}


PARTS: dict[str, Callable[["Bench"], dict[str, Any]]] = {
    "training": training,
    "evaluation": evaluation,
    "evaluation_profile": evaluation_profile,
    "command": command,
    "correctness": correctness,
    "fallback": fallback,
    "methods": methods,
    "architectures": architectures,
    "long_texts": long_texts,
    "pooling": pooling,
    "profile": profile,
    "workers": workers,
}


def main() -> None:
    """Run the parts; print and store what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; always without a GPU")
    parser.add_argument("--again", action="store_true", help="each of this project's trainings twice, and padded")
    options = parser.parse_args()
    quiet_libraries()
    import transformers

    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if CUDA else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, options.tiny or not CUDA, options.again)
        report["matrix_product_tflops"] = bench.rate / 1e12
        print(json.dumps(report), flush=True)
        for name in options.only:
            started = time.perf_counter()
            try:
                report[name] = PARTS[name](bench)
            except Exception as error:
                import traceback

                traceback.print_exc()
                report[name] = {"failed": first_line(error)}
            report["seconds"][name] = round(time.perf_counter() - started, 1)
            print(f"{name}: {json.dumps(report[name], indent=1)}", flush=True)
            if options.out:
                with contextlib.suppress(OSError):
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["seconds"]))
    if any("failed" in report[name] for name in options.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
