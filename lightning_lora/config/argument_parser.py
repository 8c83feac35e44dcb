"""The parser of commands that are not configured like a run, and what to say of a misspelt word. Imports no torch."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from lightning_lora.errors import UserError
from lightning_lora.program import program


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return the names that a misspelt word is most like, as the end of a message; empty where none is.

    Of dotted names the last part counts too: ``--learning_rate`` is ``--model.learning_rate``.
    """
    names = list(dict.fromkeys(names))
    by_last = {name.rpartition(".")[2].lstrip("-"): name for name in names}
    last = word.rpartition(".")[2].lstrip("-")
    close = [by_last[each] for each in difflib.get_close_matches(last, by_last, 2, 0.75)]
    close = close or difflib.get_close_matches(word, names, 2, 0.7)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def unknown_options(argv: Sequence[str], names: Iterable[str]) -> str:
    """Return what to say of words that a parser did not recognize."""
    options = [word.partition("=")[0] for word in argv if word.startswith("-")]
    if not options:
        return f"'{argv[0]}' belongs to no option; a text with spaces needs quotes"
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
        super().__init__(prog=f"{program()} {command}", allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong.

        Raises:
            UserError: Always.
        """
        unknown = message.removeprefix("unrecognized arguments: ")
        raise UserError(
            message if unknown == message else unknown_options(unknown.split(), self._option_string_actions)
        )

    def refuse_misspelt(self, argv: Iterable[str]) -> None:
        """Refuse options of another parser that are most likely misspelt ones of this.

        Raises:
            UserError: An option is unknown and close to one of this parser.
        """
        for option in [word.partition("=")[0] for word in argv]:
            if option.startswith("--") and "." not in option and did_you_mean(option, self._option_string_actions):
                self.error(f"unrecognized arguments: {option}")
