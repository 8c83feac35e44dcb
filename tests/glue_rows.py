"""GLUE's columns, splits and labels as on the Hub, with rows that are made up, in the cache of ``datasets``."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import make_pairs

#: Of each task the columns of its texts, and its classes; none of stsb, whose labels are numbers.
TASKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable")),
    "sst2": (("sentence",), ("negative", "positive")),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "stsb": (("sentence1", "sentence2"), ()),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment")),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment")),
}


def cache_glue(folder: Path, monkeypatch: pytest.MonkeyPatch, tasks: Sequence[str] = tuple(TASKS)) -> None:
    """Put rows where those of the Hub would be: 90 of train, 40 of each validation split, 10 of each test split."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    for number, task in enumerate(tasks):
        columns, classes = TASKS[task]
        kind = datasets.ClassLabel(names=list(classes)) if classes else datasets.Value("float32")
        text = dict.fromkeys(columns, datasets.Value("string"))
        features = datasets.Features(**text, label=kind, idx=datasets.Value("int32"))
        place = folder / "nyu-mll___glue" / task / "0.0.0" / "made-up"
        place.mkdir(parents=True)
        ends = ("_matched", "_mismatched") if task == "mnli" else ("",)
        sizes = {"train": 90} | {
            f"{name}{end}": size for name, size in (("validation", 40), ("test", 10)) for end in ends
        }
        pairs, rng, splits = iter(make_pairs(sum(sizes.values()), number)), random.Random(number), datasets.SplitDict()
        for split, size in sizes.items():
            with ArrowWriter(features=features, path=str(place / f"glue-{split}.arrow")) as writer:
                for i, (first, second, label) in zip(range(size), pairs, strict=False):
                    known = (i % len(classes)) if classes else round(rng.random() + 4 * (label == "same"), 3)
                    row = dict(zip(columns, (first, second), strict=False))
                    writer.write({**row, "label": -1 if split.startswith("test") else known, "idx": i})
                writer.finalize()
            splits.add(datasets.SplitInfo(split, num_examples=size, dataset_name="glue"))
        info = datasets.DatasetInfo(features=features, splits=splits, config_name=task, dataset_name="glue")
        info.write_to_directory(str(place))
