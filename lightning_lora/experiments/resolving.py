"""All settings of each cell, and in what they differ from the baseline's: before anything is trained."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.config.settings import default_config, flat, read_config, typed_source
from lightning_lora.data.augment import Augmentation
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError
from lightning_lora.experiments.confounders import Change, changes
from lightning_lora.experiments.plan import ARM, Plan, flatten, label_of
from lightning_lora.experiments.results import first_difference
from lightning_lora.experiments.search_space import require
from lightning_lora.locations import check_model
from lightning_lora.models.methods import AdapterOptions, Method, check_options, find_method
from lightning_lora.models.quantization import Quantization, check_quantization
from lightning_lora.runs.folder import folder_name
from lightning_lora.training.length import describe_length

#: Refuses a base model that does not exist before any cell is trained; a hub is asked once.
_check_base = cache(check_model)
#: Keys that a data set of several may have of its own.
_SET_KEYS = ("base", "metric", "published")


def split_sets(
    content: Mapping[str, Any], small: bool, wanted: Sequence[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return the config of each data set's ablation, by the set's name.

    Args:
        content: The config, with ``sets``: settings by name, and ``_SET_KEYS``.
        small: Whether the small size is asked for; its ``sets`` are a list of names.
        wanted: The names that are asked for; by default those of the size.

    Raises:
        UserError: The sets are not described as above, or a name is unknown.
    """
    described = content["sets"]
    require(isinstance(described, dict) and described, "sets: settings by name are needed")
    shared, names = {key: value for key, value in content.items() if key != "sets"}, list(map(str, described))
    if isinstance(shared.get("small"), dict) and "sets" in shared["small"]:
        shared["small"] = dict(shared["small"])
        fewer = shared["small"].pop("sets")
        require(isinstance(fewer, list) and {*fewer} <= {*names}, f"small.sets: a list of {', '.join(names)} is needed")
        wanted = wanted or (fewer if small else None)
    found = {}
    for name, given in zip(names, described.values(), strict=True):
        require(folder_name(name, "sets") == name, f"sets: '{name}' cannot be a folder's name")
        require(isinstance(given, dict | None), f"sets.{name}: settings are needed, such as {{data.source: rows.csv}}")
        own = dict(given or {})
        apart = {key: own.pop(key) for key in _SET_KEYS if key in own}
        found[name] = {**shared, **apart, "settings": flatten(content.get("settings")) | flatten(own, f"sets.{name}")}
    for name in wanted or []:
        require(name in found, f"--sets: there is no set '{name}'; there are {', '.join(found)}")
    return {name: found[name] for name in wanted or found}


def with_arms(
    config: Mapping[str, Any], path: Path, wanted: Sequence[str] | None = None, overrides: Sequence[str] = ()
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Return an ablation's config with the arms of its base recipe, where it has neither axes nor arms; and the recipe.

    Args:
        config: The config.
        path: Its path, to which that of the recipe is relative.
        wanted: Names of arms, which are then the only ones, also in what the config says of them.
        overrides: Options of ``fit`` for all cells.

    Raises:
        UserError: A wanted arm is none.
    """
    if config.get("base"):
        recipe = read_config(path.parent / str(config["base"]))
    else:
        groups = [each for each in (config.get("axes"), config.get("arms")) if isinstance(each, Mapping)]
        varied = [flatten(each) for group in groups for each in group.values() if isinstance(each, Mapping)]
        given = [pair for each in (*varied, flatten(config.get("settings"))) for pair in each.items()]
        sources = [value for key, value in given if f"{key}.".startswith("data.source.")]
        recipe = default_config(typed_source(overrides) or (sources or [None])[-1])
    if not (config.get("axes") or config.get("arms")):
        config = {**config, "arms": recipe.pop("arms", None)}
    if not wanted:
        return config, recipe
    for key in ("arms", "published", "baseline"):
        require(isinstance(config.get(key), dict | None), f"{path}: {key}: names with what they mean are needed")
    arms = {str(name): change for name, change in (config.get("arms") or {}).items()}
    if missing := [name for name in wanted if name not in arms]:
        there = f"there are {', '.join(arms)}" if arms else "the config has axes and names no arms; leave it out"
        raise UserError(f"--arms: no arm '{missing[0]}'; {there}")
    kept, dropped = {**config, "arms": {name: arms[name] for name in wanted}}, arms.keys() - set(wanted)
    kept["published"] = {name: f for name, f in (config.get("published") or {}).items() if str(name) not in dropped}
    if str((config.get("baseline") or {}).get(ARM)) in dropped:
        del kept["baseline"]
    return kept, recipe


def resolve_cells(plan: Plan, base: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return all settings of each cell, by its name; cells that differ in their seed are parsed once.

    Raises:
        UserError: They cannot be parsed, a method cannot do what is asked, a base model does not exist, or two arms
            have the same settings.
    """
    known: dict[str, dict[str, Any]] = {}
    found = {}
    for cell in plan.cells:
        key = json.dumps(cell.change, sort_keys=True, default=str)
        if key not in known:
            try:
                known[key] = resolve(base, overrides, cell.change)
                _check_base(known[key]["model"]["base_model"], "model.base_model")
            except UserError as error:
                raise UserError(f"{label_of(cell.values)}: {error}") from error
        if (other := first_difference(known[key], cell.change)) is not None:
            name, here, value = other
            raise UserError(f"{name}: an option gives {here} to every cell, but {cell.name} is about {value}")
        found[cell.name] = {**known[key], "seed_everything": cell.seed}
    for one, other_arm in itertools.combinations(plan.arms.values(), 2):
        if plan.search is None and plan.tried == 1 and found[one.name] == found[other_arm.name]:
            raise UserError(f"arms {one.arm} and {other_arm.arm} have the same settings")
    return found


def resolve(base: Sequence[Mapping[str, Any]], overrides: Sequence[str], change: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings of a cell: the base's, its own, the command line's, each with priority over those before.

    Raises:
        UserError: They cannot be parsed, or its method cannot do what is asked.
    """
    with tempfile.TemporaryDirectory() as directory:
        argv: list[str] = []
        for number, content in enumerate([*base, nested(change)]):
            file = Path(directory) / f"{number}.yaml"
            file.write_text(yaml.safe_dump(dict(content)), encoding="utf-8")
            argv += ["--config", str(file)]
        run = ConfiguredRun("fit", [*argv, *overrides])
    if run.config.budget is not None:
        raise UserError("no option --budget: it is for fit alone; --help lists the options")
    settings = run.settings()
    model = settings["model"]
    entry = find_method(model["method"])
    check_options(model["method"], AdapterOptions(**model["adapter"]))
    check_quantization(Quantization(**model["quantization"]), model["method"], entry.bits, entry.cpu_bits)
    return settings


def data_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the data module of a cell is made with, of all its settings."""
    return {**settings["data"], "base_model": settings["model"]["base_model"]}


def data_module(data: Mapping[str, Any]) -> TextDataModule:
    """Return the data module of a cell.

    Args:
        data: The cell's settings of it, with ``base_model``.
    """
    return TextDataModule(**{**data, "augmentation": Augmentation(**data["augmentation"])})


def check_validated(settings: Mapping[str, dict[str, Any]]) -> None:
    """Refuse a number of steps that ends before the first validation pass, by which all is chosen.

    Args:
        settings: All of each cell, by its name.

    Raises:
        UserError: A cell would end before it; faults of the data are told when the cell runs.
    """
    checked = set()
    for name, each in settings.items():
        trainer, data = each["trainer"], data_settings(each)
        ends_early = trainer["max_steps"] != -1 or trainer["limit_val_batches"] == 0
        key = json.dumps([data, trainer], sort_keys=True, default=str)
        if key in checked or not (ends_early and find_method(each["model"]["method"]).trains):
            continue
        checked.add(key)
        planned: dict[str, Any] = {}
        with contextlib.suppress(UserError):
            planned = describe_length(trainer, data_module(data), None)
        if "not_validated" in planned:
            raise UserError(f"{name}: {planned['not_validated']}")


def nested(change: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat keys as the tree that a config is."""
    tree: dict[str, Any] = {}
    for key, value in change.items():
        *path, last = key.split(".")
        place = tree
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return tree


def find_changes(plan: Plan, settings: Mapping[str, dict[str, Any]]) -> dict[str, list[Change]]:
    """Return in what each arm differs from the baseline, by the arm's label; those that no axis names are confounders.

    Args:
        plan: The plan.
        settings: All settings of each cell, by its name.
    """
    named = {key for axis in plan.axes for change in axis.values.values() for key in flatten(change)}
    named |= set(plan.search.space) if plan.search is not None else set()
    base = settings[plan.arms[plan.baseline].name]
    found = {}
    for arm, cell in plan.arms.items():
        if arm != plan.baseline:
            both = base, settings[cell.name]
            methods = [find_method(each["model"]["method"]) for each in both]
            options = [set(method.options) for method in methods]
            # What only one of two methods takes, the method implies.
            implied = {f"model.adapter.{name}" for name in options[0] ^ options[1]} - named
            implied |= set() if all(method.trains for method in methods) else {"model.learning_rate"}
            follows = [what_follows(each, named) for each in both]
            implied |= follows[0].keys() ^ follows[1].keys()
            pairs = zip(both, methods, follows, strict=True)
            one, other = ({**flat(each), **unused(method), **more} for each, method, more in pairs)
            found[arm] = [change for change in changes(one, other, named) if change.key not in implied]
    return found


def unused(method: Method) -> dict[str, Any]:
    """Return settings that a baseline does not use, as they are where they are left out: that others do differs."""
    if method.trains:
        return {}
    return {"model.label_smoothing": 0.0} | ({} if method.weighs_classes else {"model.class_weights": None})


def what_follows(settings: Mapping[str, Any], named: set[str]) -> dict[str, Any]:
    """Return what follows from settings that do not show it, such as ratios.

    Args:
        settings: All of a cell.
        named: Keys that the axes and the search name.
    """
    model, precision = settings["model"], str(settings["trainer"]["precision"])
    method, adapter, quantization = find_method(model["method"]), model["adapter"], model["quantization"]
    follows: dict[str, Any] = {}
    if adapter["rank"] and "alpha" in method.options:
        follows["alpha / rank"] = adapter["alpha"] / adapter["rank"]
    if "model.quantization.bits" not in named:  # else the axis is about it
        lowered = model["speedups"]["frozen_weights"] == "auto" and precision == "bf16-mixed" and method.frozen_encoder
        stored = "bfloat16" if lowered else "float32"
        follows["weights of the encoder"] = "quantized" if quantization["bits"] else stored
    multiplies = {"bf16": "bfloat16", "16": "float16"}.get(precision.partition("-")[0], "float32")
    if quantization["bits"] == 8:
        multiplies = "int8"
    elif quantization["bits"] == 4 and quantization["compute_dtype"] != "auto":
        multiplies = str(quantization["compute_dtype"])
    follows["the encoder multiplies in"] = multiplies
    if method.trains:
        follows["dropout of the encoder"] = "off" if method.frozen_encoder and not model["frozen_dropout"] else "on"
    return follows
