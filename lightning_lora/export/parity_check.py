"""The texts on which ``export`` compares each format with the trained model, and what it says of the result."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.rows import Rows
from lightning_lora.data.splits import text_keys
from lightning_lora.data.tokens import InputFormat, base_tokenizer, tokenize
from lightning_lora.errors import UserError
from lightning_lora.evaluation.intervals import metrics_of
from lightning_lora.export.parity import BROKEN, TOLERANCE, ParityTexts, compare, measure
from lightning_lora.export.usage import Usage, client
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.module import TextClassifier

#: So many of the texts at least are longer than ``max_length``; where the test rows have fewer, rows are joined.
LONG_TEXTS = 20
#: Texts that are made up where there are no test rows.
MADE_UP_TEXTS = 200
#: A format in 8 bits that gives another label for more texts than this share is worth a warning.
FLIPPED_SHARE = 0.02
#: Ends the name of the certificate's row for a tokenizer's own truncation.
PLAIN = " without encode.py"


def source_test_rows(cli: ConfiguredRun, label_names: list[str]) -> Rows:
    """The run's test rows, as its source holds them now.

    Raises:
        UserError: They cannot be read, have other labels, or hold rows that the run was trained on.
    """
    settings = {name: value for name, value in cli.config.data.as_dict().items() if name != "augmentation"}
    data = TextDataModule(**settings)
    if data.label_names != label_names:
        raise UserError(f"the data's labels are {data.label_names} now, not {label_names}")
    rows = data.rows("test")
    RunFolder.open(Path(cli.config.run)).refuse_trained_rows(text_keys(rows.texts), ("train", "val"))
    return rows


def parity_texts(rows: Rows | None, count: int, tokenizer: Any, frame: InputFormat) -> ParityTexts:
    """Texts of many lengths, evenly spread over the test rows, and made-up ones where these are lacking.

    Args:
        rows: The test rows, or None where they cannot be had.
        count: How many of them to take at most.
        tokenizer: The base model's.
        frame: How it is used.
    """
    texts: list[str] = []
    labels = np.zeros(0, dtype=np.int64)
    if rows is None:
        texts = random_texts(tokenizer, frame.room, min(count, MADE_UP_TEXTS))
    else:
        chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))
        texts, labels = [rows.texts[i] for i in chosen], rows.labels[chosen]
        lacking = LONG_TEXTS - int((tokenize(texts, tokenizer).lengths > frame.room).sum())
        texts += joined_texts(texts, tokenizer, frame.room, lacking)
    labels = np.concatenate([labels, np.full(len(texts) - len(labels), -1)])
    return ParityTexts(texts, labels, tokenize(texts, tokenizer).lengths > frame.room)


def joined_texts(texts: list[str], tokenizer: Any, room: int, count: int) -> list[str]:
    """So many texts of more than ``room`` tokens, each of as many rows as that takes."""
    lengths = np.maximum(tokenize(texts, tokenizer).lengths, 1)
    joined = []
    for number in range(count):
        start, tokens, parts = number * len(texts) // count, 0, []
        while tokens <= room * (1 + number / count):
            parts.append(texts[start % len(texts)])
            tokens, start = tokens + int(lengths[start % len(texts)]), start + 1
        joined.append(" ".join(parts))
    return joined


def random_texts(tokenizer: Any, room: int, count: int) -> list[str]:
    """Texts of random tokens of the vocabulary, from one to three times ``room`` of them, in random order."""
    rng = np.random.default_rng(0)
    ids = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    lengths = rng.permutation(np.linspace(1, 3 * room, count).astype(int))
    texts = [tokenizer.decode(rng.choice(ids, length)) for length in lengths]
    return [text for text in texts if text.strip()]


@dataclass(frozen=True)
class Parity:
    """The trained model beside the formats that are made of it, on the same texts.

    Args:
        model: The trained model.
        frame: How texts are encoded.
        usage: How the formats are loaded.
        given: The texts.
        reference: The trained model's logits (texts, C) in batches.
        certificate: The comparison by format, "trained" first; or why a format is missing.
    """

    model: TextClassifier
    frame: InputFormat
    usage: Usage
    given: ParityTexts
    reference: NDArray
    certificate: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: TextClassifier, config: Any, rows: Rows | None) -> "Parity":
        """Measures the trained model on ``config.rows`` test rows, or on made-up texts where there are none."""
        data = config.data
        tokenizer = base_tokenizer(config.model.base_model)
        frame = InputFormat.of(tokenizer, data.max_length, data.truncation, data.window_overlap)
        given = parity_texts(rows, config.rows, tokenizer, frame)
        pad_to_max = data.padding == "max_length"
        names = data.text_column or "text"
        columns = [names] if isinstance(names, str) else list(names)
        usage = Usage(model.label_names, frame.keep, model.model.config.pad_token_id, pad_to_max, columns)
        measured = measure(trained_client(model, tokenizer, frame, pad_to_max), given)
        return cls(
            model, frame, usage, given, measured.logits, {"trained": compare(measured, measured.logits, given).plain}
        )

    def check(self, form: str, folder: Path, plain: bool = False) -> str | None:
        """Runs the card's code on the texts and adds a row to the certificate; returns why the format is not equal.

        Args:
            form: The format.
            folder: Where it is.
            plain: Let the tokenizer truncate, where ``encode.py`` does in the card's code.
        """
        code = self.usage.code(form, repr(str(folder)), plain)
        row = compare(measure(client(code), self.given), self.reference, self.given).plain
        name = f"{form}{PLAIN}" if plain else form
        self.certificate[name] = row
        if (why := unequal(form, row, self.model.identity.quantization)) is None or plain:
            print(
                f"{name}: largest logit difference {row['max_logit_difference']:.1e}, labels flipped: "
                f"{row['labels_flipped']} of {row['rows']} in batches, {row['labels_flipped_single']} of "
                f"{row['single_rows']} one by one; {row['texts_per_s']:.0f} texts/s"
            )
        return why

    def metrics(self) -> tuple[dict[str, float], int]:
        """The trained model's metrics on the test rows among the texts, and their number; none where there are none."""
        real = self.given.labels >= 0
        if not real.any():
            return {}, 0
        return metrics_of(self.reference[real], self.given.labels[real]), int(real.sum())

    def missing(self) -> str:
        """The formats that could not be made, each with the reason."""
        rows = self.certificate.items()
        return "; ".join(f"{name} ({row['missing']})" for name, row in rows if "missing" in row)

    def warnings(self) -> list[str]:
        """What a person should know of the formats: what is missing, and where they are not quite the trained model."""
        warnings = []
        quantization = self.model.identity.quantization
        rows = {name: row for name, row in self.certificate.items() if "missing" not in row}
        trained = rows.pop("trained")
        if trained["max_logit_difference"] > TOLERANCE:
            warnings.append("the trained model itself gives other logits for a text alone than in a padded batch")
        for name in [name for name in rows if name.endswith(PLAIN)]:
            warnings.append(plain_warning(rows.pop(name), trained))
        exact = {name: row for name, row in rows.items() if name != "onnx-int8"}
        off = [n for n, row in exact.items() if row["max_logit_difference"] > TOLERANCE or row["labels_flipped"]]
        if off:
            why = (
                f"; the run's base was stored as {quantization}, the export's is not" if quantization != "none" else ""
            )
            warnings.append(
                f"{', '.join(off)} differ from the trained model: a logit by more than {TOLERANCE:g}, or a label{why}"
            )
        int8 = rows.get("onnx-int8", trained)
        if int8["labels_flipped"] > FLIPPED_SHARE * int8["rows"]:
            warnings.append(f"onnx-int8 gives another label for {int8['labels_flipped']:,} of {int8['rows']:,} texts")
        if missing := self.missing():
            warnings.append(f"not written: {missing}")
        return warnings


def plain_warning(row: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    """What a tokenizer's own truncation changes, in figures."""
    figures = [
        f"{row['labels_flipped']:,} of {row['rows']:,} labels differ, {row['labels_flipped_long']:,} of the "
        f"{row['long_rows']:,} texts that are longer than max_length"
    ]
    for name, among in (("accuracy", "test rows"), ("accuracy_long", "the long ones")):
        if row[name] is not None:
            figures.append(f"accuracy on {among} {row[name]:.4f} instead of {trained[name]:.4f}")
    return f"a pipeline or tokenizer alone, without encode.py, cuts otherwise than in training: {'; '.join(figures)}"


def trained_client(
    model: TextClassifier, tokenizer: Any, frame: InputFormat, pad_to_max: bool
) -> Callable[[list[str]], NDArray]:
    """The trained model on raw texts, tokenized and batched as ``predict`` does, in full precision."""

    def run(texts: list[str]) -> NDArray:
        dataset = TokenDataset(tokenize(texts, tokenizer), frame, None, pad_to_max)
        with torch.inference_mode():
            return model.document_logits(dataset.__getitems__(list(range(len(texts))))).numpy()

    return run


def unequal(name: str, row: Mapping[str, Any], quantization: str) -> str | None:
    """Why a format is not the trained model, or None: a value is not finite, or it differs in full precision."""
    difference = row["max_logit_difference"]
    exact = name != "onnx-int8" and quantization == "none"
    if math.isfinite(difference) and (not exact or difference <= BROKEN):
        return None
    return (
        f"differs from the trained model by {difference:.2g} in a logit ({row['labels_flipped']} of {row['rows']} "
        f"labels in batches, {row['labels_flipped_single']} of {row['single_rows']} one by one)"
    )
