"""The queue between HTTP and the models: batches by tokens from the texts of all clients, in threads of their own."""

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lightning_lora.data.pairs import Text
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora_serve.served_run import ServedRun
from lightning_lora_serve.server import ServingMetrics

#: Where batches are padded, the longest text of one has up to so many times the tokens of its shortest.
SPREAD = 1.5
#: Batches that are computed at once on a CPU at most; Python's lock leaves little to more.
MOST_THREADS = 4


class QueueFullError(Exception):
    """There is no room for the texts of a request."""


class PredictionError(Exception):
    """A batch could not be computed; why is in the log."""


@dataclass(eq=False, slots=True)
class _Request:
    """The texts of one client for one run."""

    run: ServedRun
    texts: Sequence[Text]
    left: int
    logits: list[np.ndarray] = field(default_factory=list)
    future: Future[np.ndarray] = field(default_factory=Future)


@dataclass(eq=False, slots=True)
class _QueuedText:
    """A text that waits: its position in its request, what it takes of a batch, its place in the queue."""

    request: _Request
    index: int
    ids: Any
    tokens: int
    turn: float


class Batcher:
    """Predicts texts of any number of clients by any number of runs, batch by batch.

    A batch is of one run, has at most as many tokens as the run takes together, and holds the text whose turn it is.
    Turns follow the tokens that were asked for before, so that a request of few texts does not wait for all those of
    one of many (start-time fair queueing, Goyal et al. 1996).

    Args:
        max_waiting: Texts that may be accepted and not yet answered.
        metrics: What is counted.
        threads: Batches that are computed at once; more than one where all runs are ``concurrent``.
    """

    def __init__(self, max_waiting: int, metrics: ServingMetrics, threads: int = 1) -> None:
        self.max_waiting = max_waiting
        self.metrics = metrics
        self.waiting = 0
        self._queue: list[_QueuedText] = []
        self._now = 0.0
        self._closed = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name="batches", daemon=True) for _ in range(threads)]

    def start(self) -> None:
        """Start the threads that predict."""
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Predict what is queued, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether the threads run."""
        return all(thread.is_alive() for thread in self._threads)

    async def predict(self, run: ServedRun, texts: Sequence[Text]) -> Predictions:
        """Classify N texts, which ``LoadedRun.checked`` has returned.

        Raises:
            QueueFullError: Too many texts wait.
            PredictionError: Their batch could not be computed.
        """
        if self.waiting + len(texts) > self.max_waiting:
            raise QueueFullError
        self._count(len(texts))
        try:
            # Outside the event loop: tokenizers work without Python's lock.
            dataset = await asyncio.to_thread(run.loaded.dataset, texts)
            request = _Request(run, texts, len(texts), [np.empty(0)] * len(texts))
            request.future.set_running_or_notify_cancel()  # no client can cancel what other clients share a batch with
            tokens = dataset.lengths if run.packed else dataset.padded_lengths
            with self._changed:
                turns = self._now + np.cumsum(tokens) - tokens
                for i, turn in enumerate(turns.tolist()):
                    self._queue.append(_QueuedText(request, i, dataset.tokens[i], int(tokens[i]), turn))
                self._changed.notify_all()
            return run.predictions(await asyncio.wrap_future(request.future))
        finally:
            self._count(-len(texts))

    def _count(self, change: int) -> None:
        self.waiting += change
        self.metrics.waiting.set(self.waiting)

    def _work(self) -> None:
        with torch.inference_mode():
            while batch := self._take():
                self._predict(batch)

    def _take(self) -> list[_QueuedText]:
        """Wait for texts and return the next batch; an empty one when the queue is empty and closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return []
            self._queue.sort(key=lambda text: text.turn)
            batch = choose_batch(self._queue)
            self._now = self._queue[0].turn
            taken = set(map(id, batch))
            self._queue = [text for text in self._queue if id(text) not in taken]
            return batch

    def _predict(self, batch: list[_QueuedText]) -> None:
        run, start = batch[0].request.run, time.perf_counter()
        try:
            logits = run.logits([each.ids for each in batch], [each.request.texts[each.index] for each in batch])
        except Exception as error:  # of any library; the next batch may do
            self._fail(batch, error)
            return
        self.metrics.batch_seconds.observe(time.perf_counter() - start)
        self.metrics.batch_texts.observe(len(batch))
        self.metrics.texts.labels(run.name).inc(len(batch))
        self.metrics.tokens.labels(run.name).inc(sum(each.tokens for each in batch))
        with self._changed:
            for text, row in zip(batch, logits, strict=True):
                request = text.request
                request.logits[text.index] = row
                request.left -= 1
                if not request.left and not request.future.done():
                    request.future.set_result(np.stack(request.logits))

    def _fail(self, batch: list[_QueuedText], error: Exception) -> None:
        """Answer the requests of a batch by an error, and say where it comes from; its message may hold a text."""
        print(f"error: a batch could not be predicted: {type(error).__name__}", file=sys.stderr)
        traceback.print_tb(error.__traceback__)
        failed = {id(text.request): text.request for text in batch}
        with self._changed:
            self._queue = [text for text in self._queue if id(text.request) not in failed]
            for request in failed.values():
                if not request.future.done():
                    request.future.set_exception(PredictionError())


def choose_batch(queue: Sequence[_QueuedText]) -> list[_QueuedText]:
    """Return the first text of a queue, and of those of its run that go with it as many as a batch takes.

    Where batches are padded, texts go together that are of similar length.
    """
    first, batch, total = queue[0], list[_QueuedText](), 0
    run, shortest, longest = first.request.run, first.tokens, 0
    for text in queue:
        if text.request.run is not run:
            continue
        low, high = min(shortest, text.tokens), max(longest, text.tokens)
        if not run.packed and high > SPREAD * low:
            continue
        needed = total + text.tokens if run.packed else high * (len(batch) + 1)
        if batch and needed > run.batch_tokens:
            break
        batch.append(text)
        total, longest, shortest = total + text.tokens, high, low
    return batch


def batch_threads(runs: Sequence[ServedRun]) -> int:
    """Return how many batches to compute at once, and share torch's threads out among them.

    On a CPU several small batches, each by fewer threads, take less time than one after the other by all threads.
    """
    cores = torch.get_num_threads()
    threads = min(cores, MOST_THREADS) if all(run.concurrent for run in runs) else 1
    torch.set_num_threads(cores // threads)
    return threads
