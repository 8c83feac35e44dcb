"""Parity of the exported formats with the trained model: each is given the same raw texts and its logits compared."""

import contextlib
import io
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.pairs import Text, is_pair
from lightning_lora.data.rows import Rows
from lightning_lora.data.tokens import InputFormat, tokenize
from lightning_lora.evaluation.intervals import metrics_of, row_values
from lightning_lora.evaluation.metric_table import row_metrics
from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.quiet import quiet_loading
from lightning_lora.training.module import TextClassifier

#: A format in full precision is the same model where no logit differs by more than this.
TOLERANCE = 1e-4
#: It is another model, and not written, where some logit differs by more than this.
BROKEN = 1e-2
#: Of a format in 8 bits, a larger share of texts with another label is worth a warning.
FLIPPED_SHARE = 0.02
#: Texts of a padded batch.
BATCH = 32
#: Texts that are also given one by one, without padding.
SINGLE_TEXTS = 100
#: Fewer texts say nothing of how long one takes.
LATENCY_TEXTS = 50
#: Made-up texts that are longer than ``max_length``, beside the test rows; and all texts where there are no test rows.
LONG_TEXTS, MADE_UP_TEXTS = 20, 200
#: Ends the name of the certificate's row for a tokenizer's own truncation.
PLAIN = " without encode.py"
#: Returns the logits (texts, C) of raw texts, float32.
TextModel = Callable[[list[Text]], NDArray]


def parity_texts(
    rows: Rows | None, count: int, tokenizer: Any, input_format: InputFormat
) -> tuple[list[Text], NDArray]:
    """Returns texts to compare formats on: test rows, evenly spread over all, and random tokens of the vocabulary.

    Args:
        rows: The test rows, or None where they cannot be had.
        count: Test rows at most.
        tokenizer: The base model's.
        input_format: How texts are encoded.

    Returns:
        Texts or pairs, and the labels of the test rows among them, which come first.
    """
    texts, labels, room = list[Text](), np.zeros(0, dtype=np.int64), input_format.text_tokens
    lengths = np.linspace(1, 3 * room, min(count, MADE_UP_TEXTS))
    if rows is not None:
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
        texts, labels = [rows.texts[i] for i in chosen], rows.labels[chosen]
        lengths = np.linspace(2 * room, 3 * room, LONG_TEXTS)
    rng = np.random.default_rng(0)
    vocabulary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    made_up = [tokenizer.decode(rng.choice(vocabulary, int(length))) for length in rng.permutation(lengths)]
    made_up = [text for text in made_up if text.strip()]
    if not is_pair(input_format.keep):
        return [*texts, *made_up], labels
    others = [text[: room // 4].strip() or "a" for text in made_up]  # beside a long text, one that leaves it room
    texts += zip(*((made_up, others) if input_format.keep == "only_first" else (others, made_up)), strict=True)
    # Other software refuses pairs of which both texts have to be cut.
    keep = np.setdiff1d(np.arange(len(texts)), input_format.cut_both(tokenize(texts, tokenizer)))
    return [texts[i] for i in keep], labels[keep[keep < len(labels)]]


class Parity:
    """The trained model's logits of some texts, and how those of the formats compare.

    Args:
        model: The trained model.
        tokenizer: The base model's.
        input_format: How texts are encoded.
        pad_to_max: Whether every text is padded to ``max_length``.
        texts: Raw texts, or pairs of them.
        labels: Those of the first texts; the others are made up.
    """

    def __init__(
        self,
        model: TextClassifier,
        tokenizer: Any,
        input_format: InputFormat,
        pad_to_max: bool,
        texts: list[Text],
        labels: NDArray,
    ) -> None:
        thresholds = model.decision_thresholds("test")
        numbers = None if thresholds is None else thresholds.numpy()
        self.outputs = partial(Outputs, task=model.task, thresholds=numbers)
        #: Whether numbers are predicted, which have no labels that could be others.
        self.is_number = model.task == "regression"
        #: What is compared, in words.
        self.unit = "number, scaled to their size" if self.is_number else "logit"
        #: The metric by row that formats are compared by.
        self.primary_metric = row_metrics(model.task)[0]

        def trained(texts: list[Text]) -> NDArray:
            dataset = TokenDataset(tokenize(texts, tokenizer), input_format, None, pad_to_max)
            with torch.inference_mode():
                return model.calibrated_logits(dataset.__getitems__(list(range(len(texts))))).numpy()

        self.quantization = model.identity.quantization
        self.texts, self.labels = texts, labels
        self.long = tokenize(texts, tokenizer).lengths > input_format.text_tokens
        self.reference = _batch_logits(trained, texts)
        #: The comparison by format, "trained" (the model itself) first; or why a format is missing.
        self.certificate: dict[str, dict[str, Any]] = {"trained": self.compare(trained)}

    def compare(self, run: TextModel) -> dict[str, Any]:
        """Returns how the logits of the texts differ from the trained model's, and how fast they are computed."""
        texts, long, real = self.texts, self.long, len(self.labels)
        run(texts[:BATCH])  # the first call also prepares things
        started = time.perf_counter()
        logits = _batch_logits(run, texts)
        seconds = time.perf_counter() - started
        singles = np.unique(np.linspace(0, len(texts) - 1, min(SINGLE_TEXTS, len(texts))).astype(int))
        run([texts[0]])
        single_logits, times = [], []
        for i in singles:
            started = time.perf_counter()
            single_logits.append(run([texts[i]])[0])
            times.append(time.perf_counter() - started)
        median, slow = np.percentile(times, [50, 95]) * 1000 if len(times) >= LATENCY_TEXTS else (None, None)
        single, expected = np.stack(single_logits), self.reference[singles]
        flipped = self.outputs(logits, None).changed(self.outputs(self.reference, None))
        scores = row_values(self.outputs(logits[:real], self.labels))[self.primary_metric] if real else None
        # Numbers may be ratings or prices, and float32 is exact to a share of their size.
        sizes = (float(self.reference.std()), float(np.abs(self.reference).max()) / 100)
        unit = max(1.0, *sizes) if self.is_number else 1.0
        difference = max(np.abs(logits - self.reference).max(), np.abs(single - expected).max()) / unit
        return {
            "max_logit_difference": float(difference),
            "labels_flipped": int(flipped.sum()),
            "rows": len(texts),
            "labels_flipped_single": int(self.outputs(single, None).changed(self.outputs(expected, None)).sum()),
            "single_rows": len(singles),
            "long_rows": int(long.sum()),
            "labels_flipped_long": int(flipped[long].sum()),
            "made_up": len(texts) - real,
            self.primary_metric: None if scores is None else float(scores.mean()),
            "texts_per_s": len(texts) / seconds,
            "latency_ms": median,
            "latency_p95_ms": slow,
        }

    def check(self, name: str, code: str) -> str | None:
        """Adds a format to the certificate; returns why it is not the trained model, or None.

        Args:
            name: The format; its code may leave truncation to the tokenizer (``PLAIN``), which changes what it says.
            code: The card's code that loads it.
        """
        row = self.certificate[name] = self.compare(run_code(code))
        difference = row["max_logit_difference"]
        said = f"{difference:.2g} in a {self.unit}"
        if not self.is_number:
            said += f" ({row['labels_flipped']} of {row['rows']} labels in batches, "
            said += f"{row['labels_flipped_single']} of {row['single_rows']} one by one)"
        exact = name != "onnx-int8" and self.quantization == "none" and not name.endswith(PLAIN)
        if not math.isfinite(difference) or (exact and difference > BROKEN):
            return f"differs from the trained model by {said}"
        print(f"{name}: differs by {said}; {row['texts_per_s']:.0f} texts/s")
        return None

    def metrics(self) -> tuple[dict[str, float], int]:
        """Returns the trained model's metrics on the test rows among the texts, and their number."""
        real = len(self.labels)
        found = metrics_of(self.outputs(self.reference[:real], self.labels)) if real else {}
        return found, real

    def missing(self) -> str:
        """Returns the formats that could not be made, each with the reason."""
        rows = self.certificate.items()
        return "; ".join(f"{name} ({row['missing']})" for name, row in rows if "missing" in row)

    def warnings(self) -> list[str]:
        """Returns what a user should know: what is missing, and what is not quite the trained model."""
        warnings, off = list[str](), list[str]()
        for name, row in self.certificate.items():
            if "missing" in row:
                continue
            flipped, differs = row["labels_flipped"], row["max_logit_difference"] > TOLERANCE
            of_all = f"{flipped:,} of {row['rows']:,}"
            if name == "trained":
                if differs:
                    what = "numbers" if self.is_number else "logits"
                    warnings.append(f"the trained model itself gives other {what} for a text alone than in a batch")
            elif name == "onnx-int8":
                if flipped > FLIPPED_SHARE * row["rows"]:
                    warnings.append(f"onnx-int8 gives another label for {of_all} texts")
            elif name.endswith(PLAIN):
                long = f"{row['labels_flipped_long']:,} of the {row['long_rows']:,} texts"
                how = f"{of_all} labels differ, {long} that are longer than max_length"
                if self.is_number:
                    how = f"numbers differ by up to {row['max_logit_difference']:.2g}, scaled to their size"
                start = "a pipeline or tokenizer alone, without encode.py, truncates otherwise than in training"
                warnings.append(f"{start}: {how}")
            elif differs or flipped:
                off.append(name)
        if off:
            what = f"a {self.unit} by more than {TOLERANCE:g}" + ("" if self.is_number else ", or a label")
            why = f"; the run's base was stored as {self.quantization}, the export's is not"
            why = "" if self.quantization == "none" else why
            warnings.append(f"{', '.join(off)} differ from the trained model: {what}{why}")
        return warnings + ([f"not written: {missing}"] if (missing := self.missing()) else [])


def run_code(code: str) -> TextModel:
    """Runs a card's code and returns what it defines to classify texts."""
    namespace: dict[str, Any] = {"__name__": "__usage__"}
    with quiet_loading(), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), namespace)  # this package's own template
    if "logits" in namespace:
        return lambda texts: np.asarray(namespace["logits"](texts), dtype=np.float32)
    classify = namespace["classify"]
    classify.device = classify.model.cpu().device  # of its own accord a pipeline takes a GPU, the other formats do not
    numbers = classify.model.config.label2id

    def run(texts: list[Text]) -> NDArray:
        logits = np.empty((len(texts), len(numbers)), dtype=np.float32)
        inputs = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in texts]
        said = classify(inputs, top_k=None, function_to_apply="none", batch_size=len(texts))
        for row, scores in zip(logits, said, strict=True):
            for each in scores:
                row[numbers[each["label"]]] = each["score"]
        return logits

    return run


def _batch_logits(run: TextModel, texts: list[Text]) -> NDArray:
    return np.concatenate([run(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])
