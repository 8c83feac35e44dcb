"""The arms of a comparison: from names and a config to all settings of each, before any is run."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.artifacts.runs import folder_name
from lightning_lora.commands.configured import ConfiguredRun
from lightning_lora.errors import UserError
from lightning_lora.models.methods import METHODS, AdapterOptions, check_options, find_method
from lightning_lora.models.quantization import Quantization, check_quantization

DEFAULT_ARMS = ("none", "head", "lora", "full")
#: What may follow a method's name after a hyphen, and the setting that it means.
STORED: dict[str, dict[str, Any]] = {
    "": {},
    "int8": {"bits": 8},
    "nf4": {"bits": 4},
    "fp4": {"bits": 4, "quant_type": "fp4"},
}
ARMS_KEY = "arms"


def choose_arms(names: Sequence[str] | None, described: Any) -> dict[str, dict[str, Any]]:
    """The settings in which each arm differs from the config, by name.

    Args:
        names: Of the command line: keys of ``described``, or METHOD, METHOD-int8, METHOD-nf4, METHOD-fp4;
            None means all that are described, or else ``DEFAULT_ARMS``.
        described: The config's ``arms``: a mapping of names to settings.

    Raises:
        UserError: A name is none of these, or stands there twice.
    """
    described = {} if described is None else described
    if not isinstance(described, dict) or not all(isinstance(v or {}, dict) for v in described.values()):
        raise UserError(f"{ARMS_KEY}: a mapping of each arm's name to its settings is needed")
    described = {str(name): change or {} for name, change in described.items()}  # a rank may be a name
    wanted = list(names or described or DEFAULT_ARMS)
    if len(set(wanted)) < len(wanted):
        raise UserError(f"--arms: '{next(n for n in wanted if wanted.count(n) > 1)}' stands there twice")
    arms = {}
    for name in wanted:
        method, _, stored = name.partition("-")
        if name in described:
            arms[folder_name(name, ARMS_KEY)] = described[name]
        elif method in METHODS and stored in STORED:
            arms[name] = {"model": method_settings(method, STORED[stored])}
        else:
            raise UserError(
                f"--arms: no arm '{name}'; there are {', '.join([*described, *METHODS])}, and a method followed by "
                f"-{', -'.join(filter(None, STORED))}"
            )
    return arms


def method_settings(method: str, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that make any config one of a method: what the method does not take has its default."""
    entry = METHODS[method]
    settings: dict[str, Any] = {"method": method}
    settings["adapter"] = {
        option.name: option.default for option in fields(AdapterOptions) if option.name not in entry.options
    }
    settings["quantization"] = {option.name: option.default for option in fields(Quantization)} | dict(quantization)
    return settings | ({} if entry.frozen_encoder else {"frozen_dropout": False})


def resolve_arms(
    configs: Sequence[dict[str, Any]], overrides: Sequence[str], arms: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """All settings of each arm.

    Raises:
        UserError: They cannot be parsed, a method cannot do what is asked, or two arms are the same.
    """
    settings: dict[str, dict[str, Any]] = {}
    for name, change in arms.items():
        try:
            settings[name] = resolve(configs, overrides, change)
            model = settings[name]["model"]
            entry = find_method(model["method"])
            check_options(model["method"], AdapterOptions(**model["adapter"]))
            check_quantization(Quantization(**model["quantization"]), model["method"], entry.bits, entry.cpu_bits)
        except UserError as error:
            raise UserError(f"arm {name}: {error}") from error
        for other in list(settings)[:-1]:
            if settings[other] == settings[name]:
                raise UserError(f"arms {other} and {name} have the same settings; does a flag override both?")
    return settings


def resolve(configs: Sequence[dict[str, Any]], overrides: Sequence[str], change: dict[str, Any]) -> dict[str, Any]:
    """All settings of an arm: the configs', the arm's own, the command line's, each winning over those before.

    Raises:
        UserError: They cannot be parsed.
    """
    with tempfile.TemporaryDirectory() as directory:
        words: list[str] = []
        for number, content in enumerate([*configs, change]):
            file = Path(directory) / f"{number}.yaml"
            file.write_text(yaml.safe_dump(content), encoding="utf-8")
            words += ["--config", str(file)]
        return ConfiguredRun("fit", [*words, *overrides]).settings()
