"""Which row goes where: pure functions of labels, texts and a seed."""

import unicodedata
import warnings
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from lightning_lora.data.pairs import Text
from lightning_lora.errors import UserError
from lightning_lora.seeding import stream_seed

SHORT = 20
#: Of a source with more repeats than this share of its rows, texts are shared out, not rows.
MANY_REPEATS = 0.05
_NOT_ASCII_LETTER_OR_DIGIT = bytes(i for i in range(128) if not chr(i).isalnum())


def count_of(size: int | float, total: int, key: str, least: int = 2, most: int | None = None) -> int:
    """How many rows ``size`` means: a fraction of ``total``, or a whole number of rows (also where typed as 10.0).

    Args:
        size: What was set.
        total: The rows there are.
        key: The setting, for messages.
        least: The fewest that may be taken; 2 where a 1 could be meant as all of them.
        most: The most that may be taken, by default all.
    """
    most = total if most is None else most
    rows = int(size) if float(size).is_integer() else round(size * total)
    if not min(least, total) <= rows <= most:
        allowed = f"a number from {least} to {most}" if least < most else str(most)
        raise UserError(f"{key}: {size} asks for {rows} of {total} rows; give {allowed}")
    return rows


def strata(labels: np.ndarray) -> np.ndarray:
    """What a split is stratified by: classes (N,), the labels of each row (N, C), or of numbers their tenth (N,)."""
    if labels.dtype.kind != "f":
        return labels
    return np.digitize(labels, np.unique(np.quantile(labels, np.arange(1, 10) / 10)))


def classes_of(labels: np.ndarray) -> np.ndarray:
    """The classes or labels that some row has, ascending."""
    return np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(axis=0))


def iterative_sample(labels: np.ndarray, size: int, rng: np.random.Generator, leave: int = 0) -> np.ndarray:
    """Positions of ``size`` rows, with each label in its share of the whole, of rows that have several.

    Sechidis et al. 2011, On the Stratification of Multi-Label Data: rows of the rarest label that is left first, each
    to where that label lacks most.

    Args:
        labels: 0 or 1, (N, C).
        size: Rows to take.
        rng: Says which.
        leave: Rows of each label that are not taken, where it has so many.
    """
    counts = labels.sum(axis=0, dtype=np.int64)
    rest = np.maximum(counts * (1 - size / len(labels)), np.minimum(leave, counts))
    lacking = np.stack([rest, counts - rest])  # of each label, (2, C), and of rows: in the rest, and taken
    room = [len(labels) - size, size]
    side = np.full(len(labels), -1)
    rows_of = [rng.permutation(np.flatnonzero(labels[:, label])) for label in range(labels.shape[1])]
    left = counts.copy()

    def put(row: int, lacks: np.ndarray) -> None:
        to = int((lacks[1], room[1] / size) > (lacks[0], room[0] / max(1, len(labels) - size)))
        to = to if room[to] else 1 - to
        side[row] = to
        room[to] -= 1
        lacking[to] -= labels[row]
        left[:] -= labels[row]

    while left.any():
        label = int(np.where(left > 0, left, np.iinfo(np.int64).max).argmin())
        for row in rows_of[label][side[rows_of[label]] < 0]:
            put(int(row), lacking[:, label])
    without = rng.permutation(np.flatnonzero(side < 0))
    side[without[: room[1]]] = 1
    return np.flatnonzero(side == 1)


def stratified_sample(
    labels: np.ndarray, size: int, seed: int, stream: str, least: int = 0, leave: int = 0
) -> np.ndarray:
    """Sorted positions of ``size`` rows, each class in its share of the whole (largest remainders).

    Args:
        labels: Class numbers, shape (rows,); or 0 or 1 for each label, (rows, C).
        size: At most ``len(labels)``; from ``least`` to all but ``leave`` rows for each class.
        seed: Together with ``stream`` it fixes the choice, on every machine.
        stream: What the choice is for; other streams choose independently.
        least: Rows of each class that are taken at least, where it has so many.
        leave: Rows of each class that are not taken, where it has so many.
    """
    rng = np.random.Generator(np.random.PCG64(stream_seed(seed, stream)))
    if labels.ndim == 2:
        return iterative_sample(labels, size, rng, leave) if size else np.zeros(0, np.int64)
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    low, high = np.minimum(counts, least), np.maximum(counts - leave, 0)
    shares = np.clip(np.floor(exact).astype(int), low, high)
    while missing := size - int(shares.sum()):
        more = 1 if missing > 0 else -1
        movable = shares < high if more > 0 else shares > low
        order = np.argsort(np.where(movable, (shares - exact) * more, np.inf), kind="stable")
        shares[order[: min(abs(missing), movable.sum())]] += more
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:share] for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def carve(
    labels: np.ndarray,
    keys: Sequence[bytes],
    size: int | float | None,
    seed: int,
    stream: str,
    default: float = 0.1,
    spare: int = 0,
    origin: str = "data.source",
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of the rows that stay, and of the stratified ones that are taken out.

    Each class keeps a row, and no text that is taken is among those that stay. Where more of the rows than
    ``MANY_REPEATS`` repeat another, ``size`` is one of different texts: with many repeats of each text, a tenth of the
    rows would take nearly all texts away from the rest.

    Args:
        labels: Class numbers, shape (rows,); or 0 or 1 for each label, (rows, C).
        keys: ``text_keys`` of the rows.
        size: As in ``count_of``; None takes ``default``, or what comes nearest to it.
        seed: As in ``stratified_sample``.
        stream: The split to carve, "val" or "test".
        default: A fraction.
        spare: Texts that stay beside one of each class, for another split to carve.
        origin: Where the rows are from, or the first that contradicts another, for messages.
    """
    every, (texts, firsts) = np.arange(len(labels)), _texts(keys)
    # A text that stands with several labels is no measure of any of them.
    single = np.sort(firsts[~np.isin(texts[firsts], texts[contradictions(labels, keys)])])
    most = len(single) - len(classes_of(labels[single])) - spare
    if most < 1 and len(single) < len(firsts):
        raise UserError(
            f"{origin}: this text stood before with another label, as {len(firsts) - len(single)} of {len(firsts)} "
            f"different texts do, and such a text is no measure: too few others can be held out for {stream}; correct "
            "the labels, or add rows"
        )
    if most < 1:
        raise UserError(
            f"{origin}: of {len(single)} different texts with one label none can be held out for {stream} and leave "
            "each class one to train on; add rows"
        )

    def taken(candidates: np.ndarray) -> np.ndarray:
        if size is None:
            number = min(max(1, round(default * len(candidates))), most)
        else:
            number = count_of(size, len(candidates), f"data.{stream}_size", 1, most)
        return candidates[stratified_sample(labels[candidates], number, seed, stream, leave=1)]

    if len(labels) - len(firsts) <= MANY_REPEATS * len(labels):
        chosen = taken(every)
        stay = every[~np.isin(texts, texts[chosen])]
        if len(classes_of(labels[stay])) == len(classes_of(labels)):
            return stay, chosen
    chosen = taken(single)
    return every[~np.isin(texts, texts[chosen])], chosen


def take_fold(
    labels: np.ndarray, keys: Sequence[bytes], fold: Sequence[int], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of the rows that stay, and of those of fold k of n, by scikit-learn's ``StratifiedKFold``.

    Of rows with several labels each fold is an ``iterative_sample`` of what the folds before it leave.

    The texts are divided, each once, and its repeats go with it: over all folds each row is taken once. Where more of
    the rows than ``MANY_REPEATS`` repeat another, each text with one label is, as repeats are no independent rows.

    Args:
        labels: Class numbers, shape (rows,); or 0 or 1 for each label, (rows, C).
        keys: ``text_keys`` of the rows.
        fold: (k, n), k from 1.
        seed: With it the folds are the same on every machine.
    """
    from sklearn.model_selection import StratifiedKFold

    every, (texts, firsts) = np.arange(len(labels)), _texts(keys)
    order = np.argsort(firsts)  # texts, the first of the rows first
    classes = labels[firsts[order]]
    most = int(np.bincount(classes).max() if classes.ndim == 1 else classes.sum(axis=0).max())
    number, folds = fold if len(fold) == 2 else (0, 0)
    if not 1 <= number <= folds or not 2 <= folds <= most:
        raise UserError(
            f"data.fold: {list(fold)} is no fold [k, n], such as [1, 5]; with these rows n goes from 2 to {most}, "
            "k from 1 to n"
        )
    if classes.ndim == 2:
        rng, left = np.random.Generator(np.random.PCG64(stream_seed(seed, "fold"))), np.arange(len(order))
        for taken_before in range(number):
            size = round(len(left) / (folds - taken_before))
            chosen = left[iterative_sample(classes[left], size, rng)] if size < len(left) else left
            left = np.setdiff1d(left, chosen)
    else:
        splitter = StratifiedKFold(folds, shuffle=True, random_state=stream_seed(seed, "fold") % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a class with fewer texts than folds: ``prepare`` tells
            chosen = list(splitter.split(order, classes))[number - 1][1]
    inside = np.isin(texts, order[chosen])
    taken = inside.copy()
    if len(labels) - len(firsts) > MANY_REPEATS * len(labels):
        several = np.isin(texts, texts[contradictions(labels, keys)])
        taken &= np.isin(every, firsts) & ~several
    return every[~inside], every[taken]


def contradictions(labels: np.ndarray, keys: Sequence[bytes]) -> np.ndarray:
    """Positions of the rows whose text stood before with another label."""
    other = labels != labels[first_positions(keys)]
    return np.flatnonzero(other if other.ndim == 1 else other.any(axis=1))


def first_positions(keys: Sequence[bytes]) -> np.ndarray:
    """For each row the position of the first row with its text."""
    texts, firsts = _texts(keys)
    return firsts[texts]


def _texts(keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's text, and the position where each text is first."""
    # As integers, for numpy takes zero bytes at the end of a byte string for padding.
    numbers = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
    _, firsts, texts = np.unique(numbers, axis=0, return_index=True, return_inverse=True)
    return texts.reshape(-1), firsts


def text_keys(texts: Sequence[Text]) -> list[bytes]:
    """A key for each text, equal for texts of which the same counts (``counted_bytes``); of a pair for both."""
    keys = []
    for text in texts:
        counted = counted_bytes(text) if isinstance(text, str) else b"".join(text_keys(text))
        keys.append(blake2b(counted, digest_size=16).digest())
    return keys


def counted_bytes(text: str) -> bytes:
    """What counts of a text, in UTF-8: its letters and digits in their order.

    Case, spaces and punctuation do not count, so a review that was copied with another line break is
    found. Vowel signs and symbols such as emoji do, and in a text of less than ``SHORT`` letters and digits
    the punctuation too: "nice :)" is not "nice :(".
    """
    if text.isascii():  # the same, ten times as fast
        counted = text.lower().encode().translate(None, _NOT_ASCII_LETTER_OR_DIGIT)
    else:
        counted = "".join(filter(_counts, text.casefold())).encode()
    return counted if len(counted) >= SHORT else "".join(text.casefold().split()).encode()


def _counts(character: str) -> bool:
    kind = unicodedata.category(character)[0]
    return kind in "LNM" or (kind == "S" and not character.isascii())


def position_type(rows: int) -> type[np.signedinteger]:
    """The smaller integer that counts so many rows: four bytes where they do."""
    return np.int32 if rows < 2**31 else np.int64
