"""Explanations as HTML: coloured words, and a page of its own that needs no network."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_lora.inference.explain import Explanation

#: What every page says first.
ABOUT = (
    "Each word was left out once, and the text predicted again. A word's effect is how much the score falls without "
    "it: the label's log-odds, ln(p / (1 - p)), or the predicted number."
)
_TEMPLATES = Environment(
    loader=PackageLoader("lightning_lora", "inference"), undefined=StrictUndefined, trim_blocks=True, autoescape=True
)


def coloured_words(explanation: Explanation) -> str:
    """Return the text as HTML with coloured words; ``words_style`` is its style sheet."""
    return str(_TEMPLATES.get_template("words.html.j2").module.coloured(explanation))  # type: ignore[attr-defined]


def words_style() -> str:
    """Return the style sheet of coloured words."""
    return str(_TEMPLATES.get_template("words.html.j2").module.style())  # type: ignore[attr-defined]


def words_legend(is_number: bool) -> str:
    """Return what the colours mean, as HTML."""
    return str(_TEMPLATES.get_template("words.html.j2").module.legend(is_number))  # type: ignore[attr-defined]


def explain_page(
    title: str,
    explanations: Sequence[Explanation],
    lines: Sequence[str] = (),
    tables: Sequence[tuple[str, Sequence[tuple[str, int, float]]]] = (),
    issues: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return a page with explained texts.

    Args:
        title: Its heading.
        explanations: The texts.
        lines: More to say at the top.
        tables: Names with words, in how many texts they occur, and what they add on average.
        issues: Rows that are most likely labelled wrong: label, prediction, quality, origin, row and text.
    """
    return _TEMPLATES.get_template("explain.html.j2").render(
        title=title,
        about=ABOUT,
        lines=lines,
        tables=tables,
        issues=issues,
        explanations=explanations,
        is_number=any(each.is_number for each in explanations),
    )
