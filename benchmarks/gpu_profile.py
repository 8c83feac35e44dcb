"""Where a step of ``benchmarks/gpu.py`` spends its time."""

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from benchmarks.gpu_common import BEST, CUDA, NAMES, QUIET, Bench, PredictClock, Watch, fit, predictor, synchronize
from lightning_lora.data.batching import LengthBatchSampler
from lightning_lora.data.datamodule import make_loader
from lightning_lora.devices import auto_precision
from lightning_lora.models.methods import AdapterOptions
from lightning_lora.models.speedups import Speedups
from lightning_lora.training.module import TextClassifier


class Window(Callback):
    """Profiles ten batches, and keeps where in them the CPU waits for the GPU.

    Args:
        first: The batch that it starts with.
    """

    def __init__(self, first: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
        self.first, self.profile, self.took, self.waits = first, profile(activities=kinds), 0.0, dict[str, int]()
        self._warnings = warnings.catch_warnings(record=True)

    def on_train_batch_end(self, *args: Any) -> None:
        """Start and stop."""
        self.look(args[4])

    def on_predict_batch_end(self, *args: Any) -> None:
        """The same."""
        self.look(args[4])

    def look(self, batch: int) -> None:
        """Start before a batch, or stop."""
        if batch == self.first:
            synchronize()
            self.said = self._warnings.__enter__()
            warnings.simplefilter("always")
            if CUDA:
                torch.cuda.set_sync_debug_mode(1)
            self.profile.start()
            self.took = time.perf_counter()
        elif batch == self.first + 10:
            if CUDA:
                torch.cuda.set_sync_debug_mode(0)
            synchronize()
            self.took = time.perf_counter() - self.took
            self.profile.stop()
            self._warnings.__exit__(None, None, None)
            for each in self.said or []:
                where = f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno} {str(each.message)[:60]}"
                self.waits[where] = self.waits.get(where, 0) + 1

    def summary(self, operators: bool) -> dict[str, Any]:
        """What was found, per batch; with operators also the time on the GPU of each of torch's."""
        events = self.profile.key_averages()
        kernels = [e for e in self.profile.events() if str(e.device_type).endswith("CUDA") and "step#" not in e.name]
        launches = sum(e.count for e in events if "Launch" in e.key or e.key.startswith("cudaMemcpyAsync"))
        busy = sum(e.time_range.elapsed_us() for e in kernels) / 1e6
        top = sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]
        gpu: dict[str, float] = {}
        for event in kernels:
            gpu[event.name[:90]] = gpu.get(event.name[:90], 0.0) + event.time_range.elapsed_us() / 10
        found = {
            "ms, profiled": self.took * 100,
            "GPU busy share": busy / self.took,
            "kernels": len(kernels) / 10,
            "launches": launches / 10,
            "waits in ten batches": self.waits,
            "most time on the CPU, us": {e.key[:50]: round(e.self_cpu_time_total / 10) for e in top},
            "most time on the GPU, us": dict(sorted(gpu.items(), key=lambda item: -item[1])[:25]),
        }
        if operators:
            ops = {e.key[:60]: round(e.self_device_time_total / 10) for e in events if e.self_device_time_total}
            found["operators on the GPU, us"] = dict(sorted(ops.items(), key=lambda item: -item[1])[:40])
        return found


def profile(bench: "Bench") -> dict[str, Any]:
    """Share of the time that the GPU is busy, launches a step, and what takes the time."""
    found: dict[str, Any] = {}
    adapter = AdapterOptions(rank=8, target_modules="query_value")
    cases = [(16, BEST), (256, BEST)]
    cases += [(256, Speedups(cuda_graphs=False))] if bench.again else []
    for batch_size, speedups in cases if not bench.tiny else [(8, BEST)]:
        window = Window(30)
        data = bench.rows(batch_size * 45)
        module = TextClassifier(str(bench.base("roberta-base")), NAMES, adapter=adapter, speedups=speedups)
        trainer = Trainer(
            precision=auto_precision("auto"),  # type: ignore[arg-type]
            callbacks=[window],
            max_epochs=1,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            **QUIET,
        )
        trainer.fit(
            module,
            make_loader(data, LengthBatchSampler(data.lengths, batch_size, 1), module.packed_batches.wanted(trainer)),
        )
        name = f"{batch_size} a step" + ("" if speedups.cuda_graphs else ", not captured")
        found[name] = window.summary(operators=not speedups.cuda_graphs)
    return found


def evaluation_profile(bench: "Bench") -> dict[str, Any]:
    """The same of evaluation batches."""
    found = {}
    for size in ("roberta-base", "minilm"):
        window = Window(20 if not bench.tiny else 0)
        data = bench.rows(24_000 if not bench.tiny else 1000)
        predictor(bench, size, BEST, window).predict_dataset(data)
        found[size] = window.summary(operators=True)
    return found


def pooling(bench: "Bench") -> dict[str, Any]:
    """What reading the mean of all states costs beside the first token's: MiniLM's shape, a step of 256 texts."""
    found: dict[str, Any] = {}
    size, steps = (256, 100) if not bench.tiny else (8, 5)
    data = bench.rows(size * steps)
    for name in ("first", "mean"):
        watch, clock = Watch(), PredictClock()
        fit(bench.base("minilm"), data, size, BEST, watch, pooling=name)
        found[f"{name}, ms a step"] = (watch.times[-1] - watch.times[0]) / (steps - watch.skip) * 1e3
        run = predictor(bench, "minilm", BEST, clock, pooling=name)
        for _ in range(3):  # passes are captured in the first
            run.predict_dataset(data)
        found[f"{name}, texts/s"] = len(data) / clock.seconds
    return found
