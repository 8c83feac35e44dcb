"""What a data set is, before anything is trained on it: the facts of a data card."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from tqdm import tqdm

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.near_duplicates import Sketch, near_duplicates
from lightning_lora.data.pairs import Text, as_texts
from lightning_lora.data.rows import Rows
from lightning_lora.data.splits import contradictions, first_positions, text_keys

#: A word tells a class where so many of the rows with it, and of the class, have both; in so many rows at least.
DISCRIMINATIVE_PRECISION, DISCRIMINATIVE_COVERAGE, DISCRIMINATIVE_ROWS = 0.99, 0.2, 20
#: Training rows, spread evenly, among whose words these are sought.
_WORD_ROWS = 5_000
#: The first byte of a letter of several bytes in UTF-8 and the others, each read as a letter of its own.
_MISREAD = re.compile(r"[ÂÃÄÅÎÏÐÑ][^\x00-\x7f]|[à-ï][^\x00-\x7f]{2}|ð[^\x00-\x7f]{3}")
_HTML = re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>|&(?:[a-z]{2,8}|#\d{2,6}|#x[0-9a-f]{2,6});", re.IGNORECASE)
#: For each split those in which near-duplicates of its rows are sought.
_COMPARED_WITH: dict[str, list[str]] = {"train": [], "val": ["train"], "test": ["train", "val"]}
#: Characters of a text that are shown.
_SHOWN = 60


@dataclass(frozen=True)
class FoundRows:
    """Rows in which something was found.

    Args:
        count: Their number.
        example: Where the first stands, and how it begins.
    """

    count: int = 0
    example: str = ""


@dataclass(frozen=True)
class SplitFacts:
    """The facts of one split.

    Args:
        rows: Their number.
        origin: Where they are from.
        class_counts: Rows of each class or label; of regression empty.
        unlabelled: Rows without any of several labels.
        numbers: What is predicted by regression, shape (rows,); else empty.
        lengths: Tokens of each text, special tokens included, before truncation, shape (rows,).
        cut_share: Share of the texts that are cut at ``max_length``.
        repeats: Rows whose text stood before in the split.
        conflicts: Those of them with another label.
        faults: By kind ("misread", "lost", "html", "same sides"), rows whose text is suspicious.
        near: By other split, rows with a near-duplicate there.
        compared: Rows that near-duplicates were sought for.
    """

    rows: int
    origin: str
    class_counts: list[int]
    unlabelled: int
    numbers: np.ndarray
    lengths: np.ndarray
    cut_share: float
    repeats: FoundRows
    conflicts: FoundRows
    faults: dict[str, FoundRows]
    near: dict[str, FoundRows]
    compared: int


@dataclass(frozen=True)
class DiscriminativeWord:
    """A word that alone tells a class, as a label that slipped into the text does.

    Args:
        word: The word, in lower case.
        label: The class.
        rows: Rows with it, among those in which it was sought.
        precision: Share of these that are of the class.
        coverage: Share of the rows of the class that have it.
    """

    word: str
    label: str
    rows: int
    precision: float
    coverage: float


@dataclass(frozen=True)
class DataFacts:
    """The facts of a data set.

    Args:
        datamodule: What reads it.
        splits: The facts of each split.
        discriminative: Words that predict a class.
    """

    datamodule: TextDataModule
    splits: dict[str, SplitFacts]
    discriminative: list[DiscriminativeWord]


def gather_facts(data: TextDataModule) -> DataFacts:
    """The facts of the data; texts are read a batch at a time, and their tokens are kept in the cache for ``fit``."""
    data.setup("fit")
    data.setup("test")
    sketches = {}
    for split, rows in data.prepared.splits.items():
        with tqdm(desc=f"Comparing {split}", total=len(rows), disable=None, leave=False, delay=0.5) as bar:
            sketches[split] = Sketch.of(rows, bar.update)
    splits = {split: _split_facts(data, split, sketches) for split in sketches}
    words = discriminative_words(data.rows("train"), data.label_names) if data.task != "regression" else []
    return DataFacts(data, splits, words)


def _split_facts(data: TextDataModule, split: str, sketches: Mapping[str, Sketch]) -> SplitFacts:
    rows, tokens, input_format = data.rows(split), data.dataset(split).tokens, data.input_format
    labels, regression = rows.labels, data.task == "regression"
    firsts = first_positions(rows.keys)
    repeats = np.flatnonzero(firsts != np.arange(len(rows)))
    conflicts = contradictions(labels, rows.keys)

    def contradicted(number: int) -> str:
        row, first = conflicts[number], firsts[conflicts[number]]
        here, there = (label_words(labels[i], data.label_names) for i in (row, first))
        return f"{here}, but {there} in {rows.place(first)}"

    return SplitFacts(
        rows=len(rows),
        origin=data.prepared.origin[split],
        class_counts=[] if regression else data.prepared.class_counts(split),
        unlabelled=int((~labels.any(axis=1)).sum()) if labels.ndim == 2 else 0,
        numbers=labels if regression else np.zeros(0),
        lengths=tokens.lengths + input_format.special,
        cut_share=input_format.cut_share(tokens),
        repeats=_found(rows, repeats, lambda i: f"as {rows.place(firsts[repeats[i]])}"),
        conflicts=_found(rows, conflicts, contradicted),
        faults=text_faults(rows),
        near={other: _near(sketches[split], sketches[other]) for other in _COMPARED_WITH[split]},
        compared=len(sketches[split].positions),
    )


def _near(sketch: Sketch, others: Sketch) -> FoundRows:
    pairs = near_duplicates(sketch, others)
    return _found(sketch.rows, pairs[:, 0], lambda number: f"like {others.rows.place(pairs[number, 1])}")


def text_faults(rows: Rows) -> dict[str, FoundRows]:
    """Of each kind of fault the rows whose text has it; see ``SplitFacts``."""
    positions: dict[str, list[int]] = {kind: [] for kind in ("misread", "lost", "html", "same sides")}
    starts: dict[str, int] = {}
    texts = enumerate(chain.from_iterable(rows.text_batches()))
    for row, text in tqdm(texts, desc="Reading texts", total=len(rows), disable=None, leave=False, delay=0.5):
        for kind, start in faults_of(text):
            positions[kind].append(row)
            starts.setdefault(kind, start)
    return {
        kind: _found(rows, np.array(found, np.int64), start=starts.get(kind, 0)) for kind, found in positions.items()
    }


def faults_of(text: Text) -> Iterator[tuple[str, int]]:
    """The kinds of faults of a text or pair, each with the place of the first, in the sides joined by a space."""
    (whole,) = as_texts([text])
    if not whole.isascii():
        if (lost := whole.find("\N{REPLACEMENT CHARACTER}")) >= 0:
            yield "lost", lost
        if (misread := next(filter(_is_misread, _MISREAD.finditer(whole)), None)) is not None:
            yield "misread", misread.start()
    if (html := _HTML.search(whole)) is not None:
        yield "html", html.start()
    if not isinstance(text, str) and len(set(text_keys(text))) == 1:
        yield "same sides", 0


def _is_misread(match: re.Match[str]) -> bool:
    """Whether the bytes of these letters, in Latin-1 or Windows-1252, are a letter in UTF-8, as in "cafÃ©"."""
    for encoding in ("cp1252", "latin-1"):
        try:
            match[0].encode(encoding).decode()
        except UnicodeError:
            continue
        return True
    return False


def discriminative_words(rows: Rows, label_names: Sequence[str]) -> list[DiscriminativeWord]:
    """For each class the word that most of its texts have and nearly no other, where there is one."""
    from sklearn.feature_extraction.text import CountVectorizer

    if len(rows) > _WORD_ROWS:
        rows = rows.select(np.linspace(0, len(rows) - 1, _WORD_ROWS).astype(np.int64))
    labels = rows.labels if rows.labels.ndim == 2 else np.eye(len(label_names), dtype=np.int64)[rows.labels]
    labels = labels.astype(np.int64)
    words = CountVectorizer(binary=True, token_pattern=r"(?u)\w+", min_df=DISCRIMINATIVE_ROWS, dtype=np.int64)
    try:
        has = words.fit_transform(as_texts(rows.texts))
    except ValueError:  # no word is in so many texts
        return []
    with_word = np.asarray(has.sum(axis=0)).reshape(-1, 1)
    of_class = np.maximum(labels.sum(axis=0), 1)
    both = has.T @ labels  # (words, C)
    precision, coverage = both / with_word, both / of_class
    discriminative = (precision >= DISCRIMINATIVE_PRECISION) & (coverage >= DISCRIMINATIVE_COVERAGE)
    discriminative &= of_class / len(rows) < DISCRIMINATIVE_PRECISION  # else any word would
    best = np.where(discriminative, coverage, 0).argmax(axis=0)
    names = words.get_feature_names_out()
    return [
        DiscriminativeWord(
            str(names[word]), name, int(with_word[word, 0]), float(precision[word, c]), float(coverage[word, c])
        )
        for c, (word, name) in enumerate(zip(best, label_names, strict=True))
        if discriminative[word, c]
    ]


def label_words(label: np.ndarray, names: Sequence[str]) -> str:
    """The label of a row as a reader knows it."""
    if label.ndim:
        return "+".join(name for name, has in zip(names, label, strict=True) if has) or "no label"
    return f"{label:g}" if label.dtype.kind == "f" else names[int(label)]


def _found(
    rows: Rows, positions: np.ndarray, beside: Callable[[int], str] = lambda number: "", start: int = 0
) -> FoundRows:
    """The rows at these positions.

    Args:
        rows: The split.
        positions: Of the rows.
        beside: Says more of the first of them, number 0.
        start: The place in its text that is to be seen.
    """
    if not len(positions):
        return FoundRows()
    (text,) = as_texts(rows.select(positions[:1]).texts)
    first = max(0, start - _SHOWN // 2)
    said = " ".join(text[first : first + _SHOWN].split())
    said = f"{'... ' * (first > 0)}{said}{' ...' * (first + _SHOWN < len(text))}"
    return FoundRows(len(positions), ", ".join(filter(None, (f"{rows.place(positions[0])}: '{said}'", beside(0)))))
