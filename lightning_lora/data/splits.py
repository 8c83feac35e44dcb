"""Which row goes where: pure functions of labels, texts and a seed."""

import unicodedata
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from lightning_lora.errors import UserError
from lightning_lora.seeding import stream_seed

SHORT = 20
_NOT_ASCII_LETTER_OR_DIGIT = bytes(i for i in range(128) if not chr(i).isalnum())


def count_of(size: int | float, total: int, key: str) -> int:
    """How many rows ``size`` means: a fraction of ``total`` under 1, else a number of rows.

    The command line hands over 10 as 10.0, so a whole number is a number of rows however it is written.

    Raises:
        UserError: A fraction outside 0 to 1, a count under 1, or more rows than there are.
    """
    if size == 1:
        raise UserError(f"{key}: 1 could be one row or all of them; leave it out for all, or give 2 or more")
    fraction = not float(size).is_integer()
    rows = round(size * total) if fraction else int(size)
    if fraction and not 0 < size < 1:
        raise UserError(f"{key}: a fraction between 0 and 1 or a number of rows is needed, got {size}")
    if not 1 <= rows <= total:
        raise UserError(f"{key}: {size} asks for {rows} of {total} rows; give a number from 1 to {total}")
    return rows


def stratified_sample(labels: np.ndarray, size: int, seed: int, stream: str) -> np.ndarray:
    """Sorted positions of ``size`` rows, each class in its share of the whole (largest remainders).

    Args:
        labels: Class numbers, shape (rows,).
        size: At most ``len(labels)``.
        seed: Together with ``stream`` it fixes the choice, on every machine.
        stream: What the choice is for; other streams choose independently.
    """
    rng = np.random.Generator(np.random.PCG64(stream_seed(seed, stream)))
    classes, counts = np.unique(labels, return_counts=True)
    exact = counts * (size / len(labels))
    shares = np.floor(exact).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: size - shares.sum()]:
        shares[i] += 1
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:share] for label, share in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def carve(labels: np.ndarray, size: int, seed: int, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions of what stays and of the ``size`` stratified rows that are taken out."""
    taken = stratified_sample(labels, size, seed, stream)
    return np.setdiff1d(np.arange(len(labels)), taken, assume_unique=True), taken


def text_keys(texts: Sequence[str]) -> list[bytes]:
    """A key for each text, equal for texts with the same letters and digits in the same order.

    Case, spaces and punctuation do not count, so a review that was copied with another line break is
    found. Vowel signs and symbols such as emoji do, and in a text of less than ``SHORT`` letters and digits
    the punctuation too: "nice :)" is not "nice :(".
    """
    keys = []
    for text in texts:
        if text.isascii():  # the same, ten times as fast
            plain = text.lower().encode().translate(None, _NOT_ASCII_LETTER_OR_DIGIT)
        else:
            plain = "".join(filter(_counts, text.casefold())).encode()
        if len(plain) < SHORT:
            plain = "".join(text.casefold().split()).encode()
        keys.append(blake2b(plain, digest_size=16).digest())
    return keys


def _counts(character: str) -> bool:
    kind = unicodedata.category(character)[0]
    return kind in "LNM" or (kind == "S" and not character.isascii())


def not_in(keys: Sequence[bytes], others: Sequence[bytes]) -> np.ndarray:
    """Sorted positions of the keys that do not stand in ``others``."""
    held_out = set(others)
    return np.array([i for i, key in enumerate(keys) if key not in held_out], dtype=np.int64)


def position_type(rows: int) -> type[np.signedinteger]:
    """The smaller integer that counts so many rows: four bytes where they do."""
    return np.int32 if rows < 2**31 else np.int64
