"""The settings that are used: what is left open in a config, filled in."""

import enum
from collections.abc import Mapping, Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_lora.data.order import evaluated_together
from lightning_lora.data.prepare import SourceOptions, columns_of
from lightning_lora.models.methods import METHODS, Method
from lightning_lora.training.precision import auto_precision, full_name

_DEFAULT_METHOD = "lora"
#: Settings whose default depends on the method.
_OF_METHOD = ("model.learning_rate", "model.adapter.rank")


class ResolvingParser(LightningArgumentParser):
    """A parser that writes the settings that are used, in ``config.yaml`` and for ``--print_config``."""

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """The settings as YAML."""
        return super().dump(resolved(cfg), *args, **kwargs)


def resolved(config: Namespace) -> Namespace:
    """A copy of parsed settings in which what depends on the method, the source or the machine is filled in.

    What depends on the rows stays open: ``data.val_size`` and ``data.test_size`` are used only where the source has no
    such split, and the run record says what was carved.
    """
    config = config.clone()
    method = METHODS.get(config.get("model.method"))
    for key in _OF_METHOD:
        if method is not None and config.get(key) is None:
            config[key] = _default(key, method)
    if (source := config.get("data.source")) is not None:
        given = (config.get("data.text_column"), config.get("data.label_column"))
        texts, label = columns_of(SourceOptions(source, *given))
        config["data.text_column"] = given[0] or (texts if len(texts) > 1 else texts[0])
        config["data.label_column"] = label
    if "data.eval_batch_size" in config:
        config["data.eval_batch_size"] = evaluated_together(config["data.eval_batch_size"])
    if "trainer.precision" in config:
        precision = config["trainer.precision"]
        automatic = auto_precision(str(config["trainer.accelerator"])) if precision is None else precision
        config["trainer.precision"] = full_name(automatic)
        config["trainer"] = _plain(config["trainer"])
    return config


def reopen(config: dict[str, Any]) -> None:
    """Leaves open again what a run's config holds as the default of its method, in place.

    A run's ``config.yaml`` holds the values that were used. Where it is the base of a run by another method, it must
    not pass on the defaults of its own.
    """
    method = METHODS.get(_value(config, "model.method") or _DEFAULT_METHOD)
    for key in _OF_METHOD:
        value = _value(config, key)
        if method is not None and value is not None and value == _default(key, method):
            parent, _, name = key.rpartition(".")
            _value(config, parent)[name] = None


def reset_words(configs: Sequence[Mapping[str, Any]], words: Sequence[str]) -> list[str]:
    """Words that set to null what the config files leave open for another method than the one asked for.

    Args:
        configs: What ``read_config`` gives of each file, each winning over those before.
        words: The words of the command line, which win over the files.
    """
    method, opened = _DEFAULT_METHOD, dict.fromkeys(_OF_METHOD, "")
    for config in configs:
        method = _value(config, "model.method") or method
        for key in _OF_METHOD:
            parent, _, name = key.rpartition(".")
            if name in (_value(config, parent) or {}):
                opened[key] = method if _value(config, key) is None else ""
    method = option_value(words, "--model.method") or method
    reset = [key for key in _OF_METHOD if opened[key] not in ("", method) and option_value(words, f"--{key}") is None]
    return [word for key in reset for word in (f"--{key}", "null")]


def option_value(words: Sequence[str], option: str) -> str | None:
    """The last value of an option in the words, as ``--option value`` or ``--option=value``."""
    value = None
    for i, word in enumerate(words):
        if word == option and i + 1 < len(words):
            value = words[i + 1]
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
    return value


def _value(config: Any, key: str) -> Any:
    """The value at a dotted key of nested settings; None where there is none."""
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def _default(key: str, method: Method) -> float | None:
    """The default of a setting by a method; None where the method does not take it."""
    if key == "model.learning_rate":
        return method.learning_rate
    return method.rank if "rank" in method.options else None


def _plain(value: Any) -> Any:
    """The value with members of enumerations, which YAML cannot hold, as what they stand for."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _plain(each) for key, each in vars(value).items()})
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, enum.Enum) else value
