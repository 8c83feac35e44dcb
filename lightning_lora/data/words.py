"""Label cells as words: what is written differently and is the same, and what only looks the same."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

#: A number as Python and pandas write it; "007" is a code and "1,5" may be anything, so both stay words.
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9]\d*)(?:\.\d+)?|\.\d+)(?:e[+-]\d\d+)?", re.ASCII)
_QUANTITY = re.compile(
    r"[+-]?[$€£¥₹]?\s?[+-]?(?:\d+(?:,\d{3})*(?:[.,]\d*)?|[.,]\d+)(?:e[+-]?\d+)?(?:/0*[1-9]\d*)?\s?[%$€£¥₹]?",
    re.ASCII | re.IGNORECASE,
)
#: Shown as nothing: default-ignorable code points but joiners (200c, 200d) and tags, which tell emoji apart.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U000e0100-\U000e01ef]"
)
_WIDE_SPACE = re.compile(r"(?![\x00-\x7f])\s")
ALIKE = str.maketrans(
    "‘’‚‛′ʼ`´“”„‟″‐‑‒–—―−АВЕЅІЈКМНОРСТУХаеорсухѕіјԁΑΒΕΖΗΙΚΜΝΟΡΤΥΧαινορ",
    "'" * 8 + '"' * 5 + "-" * 7 + "ABESIJKMHOPCTYXaeopcyxsijdABEZHIKMNOPTYXaivop",
)


def canonical(cell: Any) -> str:
    """The label cell as a word, the same from every file format.

    Numbers are written as Python does, whole ones without a point ("1.0" and "+1" are "1"); accents are composed (NFC),
    a no-break or other special space is a space, and characters that show as nothing are left out.
    """
    if not isinstance(cell, str):
        cell = str(cell)
    word = cell.strip()
    if not word.isascii():
        word = _WIDE_SPACE.sub(" ", unicodedata.normalize("NFC", _INVISIBLE.sub("", word))).strip()
    if not is_number(word):
        return word
    if "." in word or "e" in word:
        number = float(word)
        return str(int(number)) if number.is_integer() else repr(number)
    return "0" if word == "-0" else word.removeprefix("+")


def is_number(word: str) -> bool:
    """Whether the word is a number as Python and pandas write it."""
    return _NUMBER.fullmatch(word) is not None


def is_quantity(word: str) -> bool:
    """Whether a reader takes the word for a number: also ".05", "1,5", "17/50", "$3.99" and "12 %"."""
    return _QUANTITY.fullmatch(word) is not None


def quantity(word: str) -> float:
    """What a quantity amounts to."""
    number, _, whole = re.sub(r"[$€£¥₹%\s]|,(?=.*[.,])", "", word).replace(",", ".").partition("/")
    return float(number) / float(whole or 1)


def looks(word: str) -> str:
    """The same for words that a reader may take for one another."""
    if re.fullmatch(r"-?\d+", word, re.ASCII):
        return str(int(word))
    plain = unicodedata.normalize("NFKC", word).casefold()
    return " ".join(plain.replace("\u200c", "").replace("\u200d", "").split())


def setting(words: Sequence[str], named: Mapping[str, str] | None = None, more: bool = False) -> str:
    """The mapping to give, with ``NAME`` for each word that has none yet."""
    known = [f"{yaml_key(word)}: {yaml_key(name)}" for word, name in (named or {}).items()]
    pairs = [*known[:6], *(["..."] if len(known) > 6 else []), *(f"{yaml_key(word)}: NAME" for word in words[:6])]
    return f"data.label_names='{{{', '.join([*pairs, *(['...'] if more or len(words) > 6 else [])])}}}'"


def yaml_key(word: str) -> str:
    """The word as YAML reads it again as this word, on one line, also between quotes of a shell."""
    if re.fullmatch(r"[\w.+-](?:[\w .+-]*[\w.+-])?", word):
        read = yaml.safe_load(word)
        if isinstance(read, str | int | float) and not isinstance(read, bool) and canonical(read) == word:
            odd = word.translate(ALIKE) != word and re.search("[a-zA-Z]", word)
            return word if not odd else f'"{escaped(word)}"'
    return f'"{escaped(word)}"'


def escaped(word: str) -> str:
    """The word with escapes that YAML reads in double quotes."""
    text = word.replace("\\", "\\\\").replace('"', '\\"').replace("'", "\\x27")
    return "".join(c if " " <= c <= "~" else ascii(c)[1:-1] for c in text)


def few(words: Sequence[str], most: int = 8) -> str:
    """The first words on one line, and how many there are if these are not all."""
    shown = re.sub(r"\s", " ", ", ".join(words[:most]))
    return shown if len(words) <= most else f"{shown}, ... ({len(words)} in all)"
