"""What the parser of settings says of a fault, in one line: the setting, what it takes, and what came."""

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from lightning_lora.config.argument_parser import did_you_mean, unknown_options
from lightning_lora.errors import UserError

#: Settings that take the value of another one.
LINKED = ("data.base_model", "model.seed", "data.seed", "model.label_names")
_MANY = {int: "whole numbers", float: "numbers", str: "texts"}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
_KEY = re.compile(r'^Parser key "([^"]*)":')
_CLASS = re.compile(r"Problem with given class_path '([^']*)':\s*(.*?)(?=\n\s*- |\n\s*Given value type|\Z)", re.DOTALL)
_EXPECTED = re.compile(r"Expected a (.*?)\. Got value: (.*)", re.DOTALL)
_VALUE = re.compile(r".*(?:Given|Got) value: (.*)", re.DOTALL)  # the last, which is the whole value
_CLASS_PATH = re.compile(r"'class_path': '([^']*)'")


def explained(message: str, parser: Any) -> str:
    """A parser's message as one line that a person can act on.

    Args:
        message: What the parser says.
        parser: The parser, which knows all settings and their types.
    """
    # What is linked is typed once, under the name that it is linked to.
    actions = [action for action in parser._actions if type(action).__name__ != "ActionLink"]
    names = [action.dest for action in actions if action.dest not in ("help", "==SUPPRESS==", *LINKED)]
    if (words := message.removeprefix("unrecognized arguments: ")) != message:
        return unknown_options(words.split(), [f"--{name}" for name in names])
    if match := re.match(r"(?:Group '([^']*)' does not accept o|O)ption '([^']*)'", message):
        key = ".".join(filter(None, match.groups()))
        return f"no setting {key}{did_you_mean(key, names)}"
    if match := re.match(r"argument (\S+): expected one argument", message):
        return f"{match[1]}: a value is needed behind it"
    if match := re.match(r"the following arguments are required: (.*)", message):
        return f"{match[1]}: must be given (in the config, or as --{match[1].split(',')[0]})"
    if match := _KEY.match(message):
        return _explained_value(match[1], message, parser, names)
    return " ".join(message.split())


def _explained_value(key: str, message: str, parser: Any, names: Sequence[str]) -> str:
    if inner := _CLASS.search(message):
        return f"{key}: {_explained_class(inner[1], inner[2])}"
    if "Unable to load config" in message:
        return _settings_needed(key, re.findall(r"Unable to load config '(.*)'", message)[0], names)
    action = next((action for action in parser._actions if action.dest == key), None)
    kind = getattr(action, "_typehint", None) or getattr(action, "type", None)
    value = found[1].strip() if (found := _VALUE.search(message)) else ""
    if kind is None:
        return " ".join(message.split())
    if named := _class_names(kind):
        word = path[1] if (path := _CLASS_PATH.search(value)) else value
        return f"{key}: no class '{word}'{did_you_mean(word, named)}"
    return type_error(key, kind, value)


def type_error(key: str, kind: Any, value: str) -> str:
    """That a setting takes another kind of value: "model.adapter.rank: a whole number is needed (or null), got 'x'"."""
    got = {"None": "null", "True": "true", "False": "false"}.get(value, repr(value) if len(value) < 80 else value[:80])
    as_text = got in ("true", "false") and bool not in _members(kind) and str in _members(kind)
    hint = " (YAML reads on, off, yes and no as true and false; put a text in quotes)" if as_text else ""
    null = " (or null)" if type(None) in _members(kind) else ""
    return f"{key}: {allowed(kind)} is needed{null}, got {got}{hint}"


def allowed(kind: Any) -> str:
    """The values of a type in words, null left out."""
    members = _members(kind)
    choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
    said = [f"one of {', '.join(dict.fromkeys(choices))}"] if choices else []
    for member in members:
        origin = get_origin(member) or member
        if origin is type(None) or origin is Literal or (member is int and float in members):
            continue
        if member in _WORDS:
            said.append(_WORDS[member])
        elif isinstance(origin, type) and issubclass(origin, Mapping):
            said.append(" to ".join(["a mapping of " + _many(member, 0), _many(member, 1)]))
        elif isinstance(origin, type) and issubclass(origin, Iterable):
            said.append(f"a list of {_many(member, 0)}")
        else:
            said.append(f"a {getattr(origin, '__name__', origin)} (class_path, init_args)")
    return " or ".join(said)


def _many(kind: Any, position: int) -> str:
    inner = get_args(kind)[position : position + 1]
    if not inner or len(_members(inner[0])) > 1:
        return "values"
    return _MANY.get(inner[0], allowed(inner[0]))


def _members(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        return [member for each in get_args(kind) for member in _members(each)]
    return [kind]


def _class_names(kind: Any) -> list[str]:
    """Names of the classes that a setting may name."""
    found: dict[str, None] = {}
    queue = [m for member in _members(kind) for m in (*get_args(member), member) if isinstance(m, type)]
    queue = [cls for cls in queue if cls.__module__.startswith("lightning.")]
    while queue:
        cls = queue.pop()
        found[cls.__name__] = None
        queue += cls.__subclasses__()
    return list(found)


def _explained_class(path: str, inner: str) -> str:
    """What is wrong with the arguments of a class that a setting names."""
    name = path.rpartition(".")[2]
    if match := re.match(r"(?:Group '([^']*)' does not accept o|O)ption '([^']*)'", inner):
        import inspect
        from importlib import import_module

        module, _, last = path.rpartition(".")
        arguments = list(inspect.signature(getattr(import_module(module), last)).parameters)
        return f"{name} has no argument '{match[2]}'{did_you_mean(match[2], arguments)}"
    if (key := _KEY.match(inner)) and (expected := _EXPECTED.search(inner)):
        known = {f"<class '{kind.__name__}'>": kind for kind in _WORDS}
        if expected[1] in known:
            return f"{name}: {type_error(key[1], known[expected[1]], expected[2].strip())}"
    return f"{name}: {' '.join(inner.split())}"


def check_groups(config: Mapping[str, Any], parser: Any) -> None:
    """Refuses a config in which a group of settings is something else: jsonargparse takes a list for no settings.

    Raises:
        UserError: As said; the group is named, and what belongs into it.
    """
    names = [action.dest for action in parser._actions]
    groups = {name.rpartition(".")[0] for name in names if "." in name and not name.endswith(".help")}
    for group in sorted(groups):
        value: Any = config
        for part in group.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, Mapping | str):
            raise UserError(_settings_needed(group, str(value), names))


def _settings_needed(group: str, value: str, names: Sequence[str]) -> str:
    inside = [name for name in names if name.startswith(f"{group}.") and not name.endswith(".help")]
    return f"{group}: settings are needed ({', '.join(inside[:3])}, ...), got {value!r:.60}"


def check_texts(config: Any, parser: Any, keys: Iterable[str]) -> None:
    """Refuses a list or mapping of the wrong kind, which a setting that may also be a text takes for one.

    Raises:
        UserError: As said.
    """
    for action in parser._actions:
        value = config.get(action.dest) if action.dest in keys else None
        kind = getattr(action, "_typehint", None)
        if isinstance(value, str) and value[:1] in ("[", "{") and len(set(_members(kind)) - {type(None)}) > 1:
            try:
                found = yaml.safe_load(value)
            except yaml.YAMLError:
                continue
            if isinstance(found, list | dict):
                raise UserError(type_error(action.dest, kind, value))
