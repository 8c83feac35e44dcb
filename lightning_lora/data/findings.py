"""What is suspicious of a data set, the gravest first, each with an example and what to do."""

from collections.abc import Iterator

import numpy as np

from lightning_lora.data.facts import DataFacts, FoundRows, SplitFacts
from lightning_lora.data.labels import few
from lightning_lora.data.near_duplicates import LEAST_SIMILARITY
from lightning_lora.data.pairs import is_pair
from lightning_lora.data.prepare import CONTRADICTED

#: A class with fewer training rows is hardly learned.
FEW_ROWS = 8
#: A larger class with so many times the rows of another is pointed out.
IMBALANCE = 10
#: So is a larger share of texts that are cut, and of rows that repeat another.
CUT_SHARE, REPEAT_SHARE = 0.1, 0.01


def find_suspicious(facts: DataFacts) -> list[str]:
    """What is suspicious, a sentence each: what, in how many rows, an example, what to do."""
    # Of contradictions the facts know more, unless all such rows were taken out as repeats across splits.
    known = any(each.conflicts.count for each in facts.splits.values())
    warnings = [warning for warning in facts.datamodule.prepared.warnings if not (known and CONTRADICTED in warning)]
    return [*_labels(facts), *_leaks(facts), *warnings, *_texts(facts), *_sizes(facts)]


def _labels(facts: DataFacts) -> Iterator[str]:
    task = facts.datamodule.task
    for split, each in facts.splits.items():
        if each.conflicts.count:
            one = "one number" if task == "regression" else "one label"
            remedy = ", or give each text all its labels (data.label_separator)" if task == "single_label" else ""
            yield (
                f"{split}: {_rows(each.conflicts, each)} with a text that stood before with another label "
                f"({each.conflicts.example}); correct them to {one} a text{remedy}"
            )


def _leaks(facts: DataFacts) -> Iterator[str]:
    near = [(split, other, facts.splits[split]) for split in ("test", "val") for other in ("train", "val")]
    near = [(split, other, each) for split, other, each in near if other in each.near and each.near[other].count]
    if near:
        counts = [f"{e.near[other].count:,} of {e.compared:,} {split} rows in {other}" for split, other, e in near]
        _, other, first = near[0]
        yield (
            f"near-duplicates: {', '.join(counts)} (texts that share {LEAST_SIMILARITY:.0%} of their 5-letter pieces; "
            f"{first.near[other].example}); metrics are optimistically biased: make splits that keep such rows "
            "together, data.source='{train: a.csv, test: b.csv}'"
        )
    if facts.discriminative:
        words = [
            f"'{w.word}' {w.label} ({w.rows:,} texts, {w.coverage:.0%} of the class)" for w in facts.discriminative
        ]
        yield (
            f"a word alone tells the class: {few(words)}; if it is not there when you predict, take it out of the "
            "texts, or its column out of data.text_column"
        )


def _texts(facts: DataFacts) -> Iterator[str]:
    decode = "write the file again as UTF-8 from its source"
    if (encoding := facts.datamodule.options.encoding) is not None:
        decode = f"data.encoding={encoding} is probably wrong; leave it out for UTF-8"
    pieces = {
        "misread": ("hold letters that were decoded wrongly", decode),
        "lost": ("hold a replacement character, where a letter is lost", decode),
        "html": ("hold HTML", "take it out, unless the texts to predict have it too"),
        "same sides": ("are pairs of the same text", "check data.text_column, or leave such rows out of the file"),
    }
    for kind, (what, remedy) in pieces.items():
        found = {split: each.faults[kind] for split, each in facts.splits.items() if each.faults[kind].count}
        if found:
            counts = ", ".join(f"{each.count:,} of {split}" for split, each in found.items())
            yield f"rows that {what}: {counts} ({next(iter(found.values())).example}); {remedy}"


def _sizes(facts: DataFacts) -> Iterator[str]:
    datamodule = facts.datamodule
    length = datamodule.input_format.max_length
    for split, each in facts.splits.items():
        if each.cut_share > CUT_SHARE:
            most = min(int(np.quantile(each.lengths, 0.9)), datamodule.tokenizer.model_max_length)
            whole = (each.lengths <= most).mean()
            remedies = [f"data.max_length={most} keeps {whole:.0%} whole"] if most > length else []
            remedies += ["data.truncation=windows reads all of each"] if not is_pair(datamodule.truncation) else []
            yield (
                f"{split}: {each.cut_share:.0%} of the texts are cut at {length} tokens "
                f"({datamodule.truncation}); {', '.join(remedies) or 'the base model takes no more'}"
            )
            break
    for split, each in facts.splits.items():
        if each.repeats.count > REPEAT_SHARE * each.rows:
            yield (
                f"{split}: {_rows(each.repeats, each)} with a text that stood before ({each.repeats.example}); "
                "each counts as often as it stands: leave repeats out of the file unless that is meant"
            )
    counts = dict(zip(datamodule.label_names, facts.splits["train"].class_counts, strict=False))
    if scarce := [f"{name} ({count})" for name, count in counts.items() if 0 < count < FEW_ROWS]:
        yield (
            f"train: fewer than {FEW_ROWS} rows of {few(scarce)}: hardly learned; add rows, or join classes by giving "
            "them one name in data.label_names"
        )
    present = {name: count for name, count in counts.items() if count}
    if present and max(present.values()) >= IMBALANCE * min(present.values()):
        large, small = max(present, key=present.__getitem__), min(present, key=present.__getitem__)
        yield (
            f"train: '{large}' has {present[large] / present[small]:.0f} times the rows of '{small}' "
            f"({present[large]:,} and {present[small]:,}): accuracy says little, look at F1 (macro); "
            "try model.class_weights=balanced"
        )


def _rows(found: FoundRows, facts: SplitFacts) -> str:
    return f"{found.count:,} of {facts.rows:,} rows"
