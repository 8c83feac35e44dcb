"""Near-duplicates against all pairs compared by sets of 5-grams."""

import random
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lightning_lora.data.near_duplicates import Sketch, near_duplicates, similarity
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.data.rows import Rows
from tests.conftest import make_rows, write_csv


def grams(text: str) -> set[bytes]:
    plain = re.sub(r"[\W_]", "", text.casefold()).encode()
    return {plain[i : i + 5] for i in range(len(plain) - 4)}


def jaccard(first: str, second: str) -> float:
    one, other = grams(first), grams(second)
    return len(one & other) / len(one | other)


def edited(text: str, words: int, rng: random.Random) -> str:
    """The text with so many words replaced."""
    parts = text.split()
    for at in rng.sample(range(len(parts)), min(words, len(parts))):
        parts[at] = rng.choice(["zebra", "quartz", "vow"])
    return " ".join(parts).capitalize() + "!"


def split_rows(folder: Path, **texts: list[str]) -> dict[str, Rows]:
    for split, each in texts.items():
        write_csv(folder / f"{split}.csv", [(text, "ab"[i % 2]) for i, text in enumerate(each)])
    return prepare(SourceOptions(str(folder))).splits


def test_what_is_found_is_what_comparing_all_pairs_finds(tmp_path: Path) -> None:
    rng = random.Random(0)
    train = [text for text, _ in make_rows(400)]
    train = [text for text in train if len(text) > 60] + ["Im Café ist es schön und groß, naïve Gäste kommen öfter"] * 2
    test = [edited(text, i % 5, rng) + " x" for i, text in enumerate(train[:120])]
    test += ["im cafe\u0301 ist es schön und groß, naïve Gäste kommen öfters mal", "etwas ganz anderes und sehr neues"]
    splits = split_rows(tmp_path, train=train, test=test, val=[text for text, _ in make_rows(40, seed=5)])
    held, texts = splits["test"].texts, splits["train"].texts
    best = np.array([max(jaccard(one, other) for other in texts) for one in held])
    pairs = near_duplicates(Sketch.of(splits["test"]), Sketch.of(splits["train"]))
    expected = np.flatnonzero(best >= 0.8)
    assert 30 < len(expected) < 110
    assert pairs[:, 0].tolist() == expected.tolist()
    found = np.array([jaccard(held[i], texts[j]) for i, j in pairs])
    assert (found >= 0.8).all() and (found == best[expected]).mean() > 0.9


def test_the_most_similar_row_is_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    test = [text for text, _ in make_rows(60) if len(text) > 90]
    near = [f"{text} zebra" for text in test]
    train = [*near, *(edited(text, 1, rng) for text in test)]  # less similar, and later
    splits = split_rows(tmp_path, train=train, test=test, val=["something else", "and another thing"])
    pairs = near_duplicates(Sketch.of(splits["test"]), Sketch.of(splits["train"]))
    right = [max(train, key=lambda text: jaccard(text, test[i])) == splits["train"].texts[j] for i, j in pairs]
    assert len(pairs) == len(test) > 15 and np.mean(right) > 0.9


def test_similarity_is_the_jaccard_index() -> None:
    texts = [text for text, _ in make_rows(30)]
    for one, other in pairwise(texts):
        assert similarity(one, other) == pytest.approx(jaccard(one, other))
    assert similarity("ok", "ok!") < 1 and similarity("ok", "OK") == 1  # short: punctuation counts
    assert similarity(("a long enough text", "b"), ("a long enough text", "b")) == 1


def test_texts_of_one_template_and_no_text_alike(tmp_path: Path) -> None:
    """All rows fall into the same buckets, of which only some are compared."""
    train = [
        f"the parcel with order {i:05d} has not arrived at the right address since last monday" for i in range(300)
    ]
    test = [
        f"the parcel with order {i:05d} has not arrived at the right address since last monday" for i in range(900, 930)
    ]
    others = [f"{word * 4} {i}" for i, word in enumerate(text.replace(" ", "") for text, _ in make_rows(20, seed=9))]
    splits = split_rows(tmp_path, train=train, test=[*test, *others], val=["something else", "and another thing"])
    pairs = near_duplicates(Sketch.of(splits["test"]), Sketch.of(splits["train"]))
    assert pairs[:, 0].tolist() == list(range(30))
    assert len(near_duplicates(Sketch.of(splits["val"]), Sketch.of(splits["train"]))) == 0


def test_of_many_rows_some_are_compared_spread_evenly(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", make_rows(100))
    rows = prepare(SourceOptions(str(path))).splits["train"]
    counted: list[int] = []
    sketch = Sketch.of(rows, counted.append, most=10)
    assert sketch.positions.tolist() == np.linspace(0, len(rows) - 1, 10).astype(int).tolist()
    assert sketch.minima.shape == (10, 80) and sum(counted) == 10
    assert near_duplicates(sketch, Sketch.of(rows))[:, 1].tolist() == sketch.positions.tolist()  # itself
