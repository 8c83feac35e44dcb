"""The parser of commands that are not configured like a run, and each parser's faults as one line. Imports no torch."""

import argparse
import difflib
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, Union, get_args, get_origin

from lightning_lora.errors import UserError
from lightning_lora.program import program

#: Settings that take the value of another one.
LINKED = ("data.base_model", "model.seed", "data.seed", "model.label_names", "model.task")
_NOT_ACCEPTED = re.compile(r"(?:Group '([^']*)' does not accept o|O)ption '([^']*)'")
_IN_CLASS = re.compile(r"given class_path '[^']*?(\w+)':\s*(.*?)(?=\n\s*- |\n\s*Given value type|\Z)", re.DOTALL)
_VALUE = re.compile(r"(?:Given|Got) value: (.*)")


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
        return f"'{argv[0]}' belongs to no option; a text with spaces needs quotes, and several values '[one, two]'"
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


def explained(message: str, parser: Any) -> str:
    """Return a parser's message as one line that a person can act on.

    Args:
        message: What the parser says.
        parser: The parser, which knows all settings and their types.
    """
    actions = {action.dest: action for action in parser._actions if type(action).__name__ != "ActionLink"}
    names = [name for name in actions if name not in ("help", "==SUPPRESS==", *LINKED)]
    if (words := message.removeprefix("unrecognized arguments: ")) != message:
        return unknown_options(words.split(), [f"--{name}" for name in names if actions[name].option_strings])
    if (denied := re.search(r"Importing '([^']*)' is not allowed", message)) is not None:
        return _explained_import(denied[1])
    if match := _NOT_ACCEPTED.match(message):
        key = ".".join(filter(None, match.groups()))
        return f"no setting {key}{did_you_mean(key, names)}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"{match[1]}: must be given (in the config, or as --{match[1].split(',')[0]})"
    if (match := re.match(r'Parser key "([^"]*)":', message)) is None or match[1] not in actions:
        return " ".join(message.split())
    key, values = match[1], _VALUE.findall(message)
    if inner := _IN_CLASS.search(message):
        return f"{key}: {inner[1]}: {_plain_words(inner[2])}"
    if unknown := re.search(r"Expected a dot import path string: (\S+)", message):
        from lightning.pytorch import callbacks, loggers, profilers

        classes = (*callbacks.__all__, *loggers.__all__, *profilers.__all__)
        return f"{key}: no class '{unknown[1]}'{did_you_mean(unknown[1], classes)}"
    kind = getattr(actions[key], "_typehint", None) or getattr(actions[key], "type", None)
    if kind is None or not values:
        return f"{key}: {_plain_words(message.removeprefix(match[0]))}"
    got, expected = values[-1].strip()[:80], _plain_words(_type_text(kind))
    word = "str" in expected and got in ("True", "False")
    return f"{key}: expected {expected}, got '{got}'{' (YAML reads on, off, yes and no as that: quote it)' * word}"


def root_cause(error: BaseException) -> str:
    """Return the first cause of an error in one line; of a missing package what installs it."""
    cause: BaseException | None = error
    said = ""
    while cause is not None:
        said = " ".join(str(cause).split())
        if missing := re.search(r"(?:Requirement|No module named) '([\w\-]+)", said):
            return f"a package is missing: pip install {missing[1]}"
        cause = cause.__cause__ or cause.__context__
    return said


def _explained_import(path: str) -> str:
    """Say why a config may not name a class."""
    from lightning_lora.training.refused import CALLBACKS

    name = path.rpartition(".")[2]
    if path.startswith("lightning.pytorch.callbacks") and name in CALLBACKS:
        return f"trainer.callbacks: {name}: {CALLBACKS[name]}"
    if name == "Callback":
        return "trainer.callbacks: name a class: {class_path: EarlyStopping, init_args: {monitor: val/loss}}"
    return (
        f"the config names '{path}', none of Lightning's callbacks, loggers or profilers; code of your own is allowed "
        "by LIGHTNING_LORA_ALLOW=PACKAGE in the environment"
    )


def _type_text(kind: Any) -> str:
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else ()
    return " | ".join(map(_type_text, members)) or str(kind)


def _plain_words(text: str) -> str:
    """Return types and messages of the parser without Python's decoration."""
    text = re.sub(r"<class '([\w.]+)'>", r"\1", text.replace("typing.", "").replace("collections.abc.", ""))
    text = re.sub(r"\bNone(Type)?\b", "null", text)
    text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r'Parser key "([^"]*)":', r"\1:", text).replace("Expected a ", "expected ")
    return " ".join(re.sub(r"\. Got value: ", ", got ", text).split())
