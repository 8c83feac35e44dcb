"""What an epoch would take on more machines than there are here: measured rates, assumed ones, and the real sampler.

    python benchmarks/scale_plan.py [--tokenized_per_s N] [--batched_per_s N] [...]

Prints the tables of docs/scale.md. Rates that were measured and rates that are assumed are options, and said as such.
How long devices wait for each other is not assumed: the batches of ``LengthBatchSampler`` are dealt out to so many of
them, for texts of AG News' lengths, and the longest share of each step is what the others wait for.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from lightning_lora.data.batching import LengthBatchSampler
from lightning_lora.reports.tables import markdown
from lightning_lora.units import duration

GPUS = (1, 8, 64)
TEXTS = (10**6, 10**8, 10**10)
GPUS_A_MACHINE = 8


@dataclass(frozen=True)
class Rates:
    """What is known or assumed.

    Args:
        tokenized: Texts a second and core, tokenized (``benchmarks/streaming.py``).
        batched: Texts a second and process, made into batches (the same).
        tokens: Of a text, a mean.
        serial: Seconds a text that one process takes to read, check and write it, whatever the cores (the same).
        token_bytes: Of a text in the file of tokens.
        index_bytes: Of a row, held by each process (``benchmarks/streaming.py``).
        flop: A token, forward and backward, of the base with LoRA.
        tflops: Of a GPU in training, sustained.
        step_tokens: Of a step and GPU.
        gradient_bytes: Of the trained weights.
        inside, outside: Bytes a second of an all-reduce, within a machine and between machines.
        latency: Seconds of one hop between machines.
        cores: CPU cores a GPU.
        disk: Bytes a second that a machine reads from the store.
    """

    tokenized: float
    batched: float
    tokens: float = 55
    serial: float = 10e-6
    token_bytes: float = 55 * 4 + 4
    index_bytes: float = 34
    flop: float = 354e6
    tflops: float = 200
    step_tokens: float = 16_384
    gradient_bytes: float = 8e6
    inside: float = 200e9
    outside: float = 20e9
    latency: float = 30e-6
    cores: int = 12
    disk: float = 1e9


def lengths(count: int) -> np.ndarray:
    """Token counts shaped as AG News' (mean 55, a long tail), from a fixed seed."""
    drawn = np.random.default_rng(0).lognormal(np.log(51), 0.38, count)
    return np.clip(drawn, 12, 256).astype(np.int64)


def waiting(devices: int, texts_a_device: int) -> float:
    """How much longer an epoch takes than if all devices had as many tokens: longest shares over mean ones."""
    found = lengths(devices * texts_a_device * 60)
    samplers = [
        LengthBatchSampler(found, devices * texts_a_device, seed=1, rank=rank, processes=devices)
        for rank in range(devices)
    ]
    shares = np.array([[found[batch].max() * len(batch) for batch in sampler] for sampler in samplers])
    return float(shares.max(axis=0).sum() / shares.mean(axis=0).sum())


def epoch(rates: Rates, gpus: int, texts: int, wait: float) -> dict[str, float]:
    """Seconds of each part of an epoch."""
    machines = max(1, gpus // GPUS_A_MACHINE)
    local = min(gpus, GPUS_A_MACHINE)
    steps = texts * rates.tokens / (rates.step_tokens * gpus)
    compute = rates.step_tokens * rates.flop / (rates.tflops * 1e12) * wait
    reduce_inside = 2 * (local - 1) / local * rates.gradient_bytes / rates.inside
    reduce_outside = 2 * (machines - 1) / machines * rates.gradient_bytes / rates.outside
    talk = reduce_inside + reduce_outside + 2 * (machines - 1) * rates.latency + (1e-4 if gpus > 1 else 0)
    return {
        "tokenizing, once": texts * (rates.serial + 1 / (rates.tokenized * rates.cores * local)),  # on one machine
        "computing": steps * compute,
        "gradients": steps * talk,
        "batches": texts / (rates.batched * gpus),
        "reading tokens": texts * rates.token_bytes / (rates.disk * machines),
    }


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenized_per_s", type=float, required=True, help="measured: texts a second and core")
    parser.add_argument("--batched_per_s", type=float, required=True, help="measured: texts a second and process")
    parser.add_argument("--tflops", type=float, default=Rates.tflops, help="assumed: of a GPU in training, sustained")
    given = parser.parse_args()
    rates = Rates(given.tokenized_per_s, given.batched_per_s, tflops=given.tflops)
    texts_a_device = round(rates.step_tokens / rates.tokens)
    waits = {gpus: waiting(gpus, texts_a_device) for gpus in GPUS}
    rows = [["GPUs", "longest share of a step, over the mean"]]
    rows += [[str(gpus), f"{wait:.3f}"] for gpus, wait in waits.items()]
    print(markdown(rows), "\n")
    rows = [["texts", "GPUs"]]
    for texts in TEXTS:
        for gpus in GPUS:
            parts = epoch(rates, gpus, texts, waits[gpus])
            if len(rows) == 1:
                rows[0] += [*parts, "an epoch", "longest part", "tokens, GB", "index, GB a process"]
            # Batches are made in the process that trains, between its steps, and not beside them.
            whole = max(parts["computing"] + parts["gradients"] + parts["batches"], parts["reading tokens"])
            first = max(set(parts) - {"tokenizing, once"}, key=lambda name: parts[name])
            shown = [duration(seconds) for seconds in parts.values()]
            sizes = [f"{texts * size / 1e9:,.1f}" for size in (rates.token_bytes, rates.index_bytes)]
            rows.append([f"{texts:,}", str(gpus), *shown, duration(whole), first, *sizes])
    print(markdown(rows))


if __name__ == "__main__":
    main()
