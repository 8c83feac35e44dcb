"""A pair of texts, such as premise and hypothesis: two columns that a model reads as two segments."""

from collections.abc import Sequence
from typing import Literal

from lightning_lora.errors import UserError

Truncation = Literal["auto", "head", "tail", "both", "windows", "longest_first", "only_first", "only_second"]
#: Of those, the truncations of a pair, by transformers' names; the others are of one text.
PAIR_TRUNCATIONS = ("longest_first", "only_first", "only_second")
#: What a row holds.
Text = str | tuple[str, str]


def is_pair(truncation: str) -> bool:
    """Whether two columns are read as a pair; else they are joined to one text."""
    return truncation in PAIR_TRUNCATIONS


def choose_truncation(asked: Truncation | None, columns: Sequence[str]) -> Truncation:
    """The truncation of texts in these columns: of two by default "longest_first", else "head", or by "auto" "both".

    Raises:
        UserError: One of a pair is asked for, and there are not two columns.
    """
    if asked is not None and is_pair(asked) and len(columns) != 2:
        raise UserError(
            f"data.truncation: {asked} is of a pair of texts, and data.text_column names {len(columns)} "
            f"({', '.join(columns)}); give two columns, as [premise, hypothesis], or head, tail, both or windows"
        )
    if asked is None or asked == "auto":
        return "longest_first" if len(columns) == 2 else "both" if asked else "head"
    return asked


def as_texts(rows: Sequence[Text]) -> list[str]:
    """One text a row: those of a pair joined by a space."""
    return [row if isinstance(row, str) else " ".join(row) for row in rows]


def lengths_kept(first: int, second: int, room: int, truncation: str) -> tuple[int, int]:
    """Tokens that stay of each text of a pair: those of ``tokenizer(first, second, truncation=...)``.

    Where that raises an error, as the text that stays whole leaves the other no token, both are cut ("longest_first").

    Args:
        first: Tokens of the first text.
        second: Tokens of the second text.
        room: Tokens of both that fit.
        truncation: One of ``PAIR_TRUNCATIONS``.
    """
    over = max(first + second - room, 0)
    if not over or (truncation == "only_first" and first > over):
        return first - over, second
    if truncation == "only_second" and second > over:
        return first, second - over
    shorter = min(first, second, room // 2)
    return (shorter, room - shorter) if first <= second else (room - shorter, shorter)
