"""What ``fit --budget`` may search: a small space, of the settings that were left open and that can matter on the data.

Anything that was typed stays as it is. A dimension is an entry of ``make_space`` and a line of
``TuningSpace.settings``; ``TuningSpace.initial_trials`` says in what order they are tried first.
"""

import copy
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.pairs import is_pair
from lightning_lora.errors import UserError
from lightning_lora.experiments.plan import flatten
from lightning_lora.experiments.resolving import data_module, data_settings, resolve
from lightning_lora.locations import check_model
from lightning_lora.models.methods import find_method
from lightning_lora.tasks import Task
from lightning_lora.tokenizer import longest_input
from lightning_lora.training.length import TrainingLength, length_of

#: Factors of a method's default learning rate: a range, on a logarithmic scale.
RATE_FACTORS = {"low": 0.25, "high": 4.0, "log": True}
#: Methods that are tried where none was typed.
TRIED_METHODS = ("lora", "full")
#: Tokens of a text that the model may see.
TRIED_LENGTHS = (128, 256, 512)
#: What may stay of a longer text.
TRIED_TRUNCATIONS = ("head", "both")
#: Multiples of the epochs that the rule of ``training/length.py`` gives.
EPOCH_FACTORS = (1, 2, 4)
#: A length, or a truncation, can matter where at least this share of the training texts is cut.
_CUT_SHARE = 0.05
#: The settings that trials differ by.
_SHOWN = (
    *("model.method", "model.learning_rate", "data.max_length", "data.train_max_length", "data.truncation"),
    "trainer.max_epochs",
)


@dataclass(frozen=True)
class TuningSpace:
    """What is searched, and the settings that a point of it stands for.

    Args:
        by_method: All settings of a trial with each method, the default's first.
        dimensions: What is searched, as ``search.space`` of an ablation: choices, or a range. Factors multiply what is
            the default: of the method's learning rate, of the rule's epochs.
        default: The default's point: what ``fit`` trains without a budget.
        length: How long the default trains, where the rows say so.
        fingerprints: Of the rows of each split.
        task: What is predicted.
    """

    by_method: Mapping[str, dict[str, Any]]
    dimensions: Mapping[str, Any]
    default: Mapping[str, Any]
    length: TrainingLength | None
    fingerprints: Mapping[str, str]
    task: Task = "single_label"

    def settings(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return all settings of the trial at a point."""
        settings = copy.deepcopy(self.by_method[point.get("model.method", next(iter(self.by_method)))])
        if (factor := point.get("learning_rate_factor", 1)) != 1:
            settings["model"]["learning_rate"] = float(f"{settings['model']['learning_rate'] * factor:.2g}")
        for name in ("max_length", "train_max_length", "truncation"):
            settings["data"][name] = point.get(f"data.{name}", settings["data"][name])
        if (times := point.get("epochs_factor", 1)) != 1:
            settings["trainer"] |= self._longer(times, settings["trainer"])
        return settings

    def _longer(self, times: int, trainer: Mapping[str, Any]) -> dict[str, Any]:
        """Return the trainer's settings for a multiple of the rule's epochs, validated and stopped as by the rule."""
        assert self.length is not None
        found: dict[str, Any] = {"max_epochs": times * self.length.epochs}
        if self.length.check_every is not None:
            found["check_val_every_n_epoch"] = times * self.length.check_every
        if (stopping := self.length.stopping) is not None and "EarlyStopping" not in str(trainer["callbacks"]):
            given = trainer["callbacks"] or []
            added = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": stopping}
            found["callbacks"] = [*(given if isinstance(given, list) else [given]), added]
        return found

    def changes(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings in which the trial at a point differs from the default, as flat keys."""
        own, default = flatten(self.settings(point)), flatten(self.settings(self.default))
        return {key: own[key] for key in _SHOWN if own[key] != default[key]}

    def initial_trials(self) -> list[dict[str, Any]]:
        """Return what is changed of the best point so far in the first trials, in the order of what matters most."""
        wanted: list[dict[str, Any]] = [
            {"learning_rate_factor": 2.0},
            *({"model.method": method} for method in self.by_method),
            {"learning_rate_factor": 0.5},
            *({"data.max_length": each} for each in reversed(self.dimensions.get("data.max_length", []))),
            *({"data.train_max_length": each} for each in self.dimensions.get("data.train_max_length", [])),
            *({"data.truncation": each} for each in TRIED_TRUNCATIONS),
            {"epochs_factor": 2},
        ]
        known = (each for each in wanted if each.keys() <= self.dimensions.keys())
        return [each for each in known if not each.items() <= self.default.items()]


def make_space(base: Sequence[Mapping[str, Any]], overrides: Sequence[str], typed: Collection[str]) -> TuningSpace:
    """Return what may be searched around what ``fit`` trains by default; reads and tokenizes the data.

    Args:
        base: Configs, each with priority over those before.
        overrides: Options of ``fit``.
        typed: Keys of the settings that were typed.

    Raises:
        UserError: There is a fault in the settings or the data, or nothing is left to search.
    """
    default = resolve(base, overrides, {})
    method, trainer = default["model"]["method"], default["trainer"]
    if not find_method(method).trains:
        raise UserError(f"--budget: method '{method}' has no training to search settings for; leave --budget out")
    if trainer["max_time"] is not None:
        raise UserError("--budget: it sets the time of each trial; leave trainer.max_time out")
    if trainer["fast_dev_run"] or trainer["enable_checkpointing"] is False:
        raise UserError(
            "--budget: the best checkpoint is kept; leave out trainer.fast_dev_run and enable_checkpointing"
        )
    check_model(default["model"]["base_model"], "model.base_model")
    by_method, finds_rate = {method: default}, "LearningRateFinder" in str(trainer["callbacks"])
    # A typed learning rate is meant for the method at hand: others are used to another scale.
    rate_open = _is_open("model.learning_rate", typed) and not finds_rate
    if rate_open and _is_open("model.method", typed) and method in TRIED_METHODS:
        for other in TRIED_METHODS:
            try:
                by_method.setdefault(other, resolve(base, overrides, {"model.method": other}))
            except UserError:  # it cannot do what was typed, such as a quantized base
                continue
    data = data_module(data_settings(default))
    data.setup("fit")
    length = length_of(trainer, data, stops_early=find_method(method).stops_early)
    choices = {"model.method": list(by_method), **_text_choices(data, typed)}
    dimensions: dict[str, Any] = {"learning_rate_factor": RATE_FACTORS} if rate_open else {}
    dimensions |= {key: values for key, values in choices.items() if len(values) > 1}
    dimensions |= {"epochs_factor": list(EPOCH_FACTORS)} if length is not None else {}
    if not dimensions:
        raise UserError(
            "--budget: every setting that would be searched is typed; leave one open, or leave --budget out"
        )
    at_default = {
        "learning_rate_factor": 1.0,
        "model.method": method,
        "data.max_length": data.input_format.max_length,
        "data.train_max_length": data.train_format.max_length,
        "data.truncation": data.truncation,
        "epochs_factor": 1,
    }
    fingerprints = {split: each["fingerprint"] for split, each in data.prepared.describe()["splits"].items()}
    point = {key: value for key, value in at_default.items() if key in dimensions}
    return TuningSpace(by_method, dimensions, point, length, fingerprints, data.task)


def _is_open(key: str, typed: Collection[str]) -> bool:
    """Whether a setting was not typed, by itself or with its group."""
    return not any(f"{key}.".startswith(f"{name}.") for name in typed)


def _text_choices(data: TextDataModule, typed: Collection[str]) -> dict[str, list[Any]]:
    """Return the lengths and truncations that can matter on the training texts, the default's among them."""
    if data.truncation == "windows":  # nothing is cut
        return {}
    tokens = data.dataset("train").tokens.lengths + data.input_format.special  # of each text, shape (rows,)

    def cuts(length: int) -> bool:
        return float(np.mean(tokens > length)) >= _CUT_SHARE

    own = data.input_format.max_length
    lengths = [own]
    if _is_open("data.max_length", typed):
        most = longest_input(data.tokenizer)
        known = sorted({own, *(each for each in TRIED_LENGTHS if each <= most)})
        shorter = [each for each in known if each < own and cuts(each)]
        longer = [each for before, each in itertools.pairwise(known) if each > own and cuts(before)]
        lengths = [*shorter, own, *longer]
    choices: dict[str, list[Any]] = {"data.max_length": lengths}
    trained = data.train_format.max_length
    if _is_open("data.train_max_length", typed) and trained < own and cuts(trained):
        choices["data.train_max_length"] = [trained, own]  # as is, or all that is read
    if _is_open("data.truncation", typed) and cuts(lengths[0]) and not is_pair(data.truncation):
        choices["data.truncation"] = sorted({data.truncation, *TRIED_TRUNCATIONS})
    return choices
