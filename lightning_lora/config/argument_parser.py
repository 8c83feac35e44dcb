"""The parser of commands that are not configured like a run, and what to say of a misspelt word. Imports no torch."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from lightning_lora.errors import UserError

#: How alike a word and a name must be (difflib's ratio) for the name to be proposed, and to be named beside a better.
_ALIKE, _AS_GOOD = 0.7, 0.9


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """The names that a misspelt word is most like, as the end of a message; empty where none is.

    Of dotted names the last part counts too: ``--learning_rate`` is ``--model.learning_rate``.
    """

    def likeness(name: str) -> float:
        whole = _ratio(word, name)
        return max(whole, _ratio(_last(word), _last(name)) - 0.05 if "." in name else 0.0)

    scores = {name: likeness(name) for name in dict.fromkeys(names)}
    best = max(scores.values(), default=0.0)
    found = sorted((n for n, s in scores.items() if s >= max(_ALIKE, _AS_GOOD * best)), key=lambda n: -scores[n])
    return f"; did you mean {' or '.join(found[:2])}?" if found else ""


def _ratio(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one.strip("-").replace("-", "_").lower(), other.strip("-").lower()).ratio()


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def unknown_options(words: Sequence[str], names: Iterable[str]) -> str:
    """What to say of words that a parser did not recognize."""
    options = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not options:
        return f"'{words[0]}' belongs to no option; a text with spaces needs quotes"
    known = list(names)
    said = [f"no option {option}{did_you_mean(option, known)}" for option in options]
    return "; ".join(said) + ("" if said[-1].endswith("?") else "; --help lists the options")


class OptionParser(argparse.ArgumentParser):
    """An argument parser whose faults are one line, and whose options are written whole.

    Args:
        command: The word after ``main.py``.
        options: Of ``argparse.ArgumentParser``.
    """

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"main.py {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong.

        Raises:
            UserError: Always.
        """
        unknown = message.removeprefix("unrecognized arguments: ")
        raise UserError(
            message if unknown == message else unknown_options(unknown.split(), self._option_string_actions)
        )

    def refuse_misspelt(self, words: Iterable[str]) -> None:
        """Refuses options of another parser that are most likely misspelt ones of this.

        Raises:
            UserError: There is one.
        """
        for option in [word.partition("=")[0] for word in words]:
            if option.startswith("--") and "." not in option and did_you_mean(option, self._option_string_actions):
                self.error(f"unrecognized arguments: {option}")
