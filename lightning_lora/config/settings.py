"""The settings of a run: read from YAML files and options, and filled in where they are left open."""

import argparse
import enum
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch import callbacks
from lightning.pytorch.cli import LightningArgumentParser

from lightning_lora.config.options import COMMAND_OPTIONS, DEFAULT_CONFIG, find_config, refuse_unused, show_help
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.order import default_eval_batch_size
from lightning_lora.data.pairs import choose_truncation, is_pair
from lightning_lora.data.prepare import SourceOptions, columns_of
from lightning_lora.devices import auto_precision, full_name
from lightning_lora.errors import UserError
from lightning_lora.models.methods import BASELINES, METHODS
from lightning_lora.program import command_line, program
from lightning_lora.runs.folder import RunFolder, as_configured
from lightning_lora.training.length import ENOUGH_STEPS
from lightning_lora.training.module import TextClassifier
from lightning_lora.training.refused import CALLBACKS

DEFAULT_SEED = 42
#: Where this project's defaults differ from Lightning's.
TRAINER_DEFAULTS: dict[str, Any] = {
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "devices": 1,
    "use_distributed_sampler": False,  # batches are shared out by LengthBatchSampler
}
#: Help of settings of Lightning's that do more here.
OWN_HELP = {
    "trainer.max_epochs": "Stop training once this number of epochs is reached; by default as many as the training "
    f"rows take for {ENOUGH_STEPS} optimizer steps, fewer where validation does not get better; -1 for no limit."
}
#: Commands that take no trained run.
_NEW = ("fit", "data")
#: How long a run trains, which may be changed when it is resumed.
LIMITS = ("max_epochs", "max_steps", "max_time")
#: From where a config may name classes (``class_path``); more by ``LIGHTNING_LORA_ALLOW``, which no config can set.
ALLOWED = tuple(f"lightning.pytorch.{module}" for module in ("callbacks", "loggers", "profilers"))
ALLOW_VARIABLE = "LIGHTNING_LORA_ALLOW"
#: Settings of such classes that say where they write.
_PLACES = ("dirpath", "save_dir", "root_dir", "log_dir", "directory")


class SettingsParser(LightningArgumentParser):
    """A parser that shows what is used where a config leaves it open."""

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """Return the settings that are used as YAML, for ``config.yaml`` and ``--print_config``."""
        return super().dump(resolved(cfg), *args, **kwargs)


def make_parser(command: str) -> SettingsParser:
    """Return the parser of a command that is configured like a run: its own options, trainer, model and data.

    It is made once a process, as an ablation parses the settings of each of its cells.
    """
    return _make_parser(command, program())


@cache
def _make_parser(command: str, prog: str) -> SettingsParser:
    parser = SettingsParser(prog=f"{prog} {command}", description="", exit_on_error=False, allow_abbrev=False)
    config = "A YAML file of settings; may be repeated."
    parser.add_argument("-c", "--config", action=jsonargparse.ActionConfigFile, help=config)
    seed = "Seed of head, adapter, order and dropout."
    parser.add_argument("--seed_everything", type=int, default=DEFAULT_SEED, help=seed)
    for name, (kind, default, told) in COMMAND_OPTIONS[command].items():
        parser.add_argument(f"--{name}", type=kind, default=default, help=told)
    if command == "predict":
        parser.add_argument("texts", nargs="*", type=str, help="Texts to classify.")
    parser.add_lightning_class_args(Trainer, "trainer")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    for action in parser._actions:
        action.help = OWN_HELP.get(action.dest, action.help)
    parser.add_lightning_class_args(TextClassifier, "model")
    parser.add_instantiator(_make_classifier, TextClassifier)
    parser.add_lightning_class_args(TextDataModule, "data")
    # What is typed once.
    parser.link_arguments("model.base_model", "data.base_model")
    parser.link_arguments("seed_everything", "model.seed")
    parser.link_arguments("seed_everything", "data.seed")
    for name in ("label_names", "task"):
        parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
    return parser


def _make_classifier(_: type, **settings: Any) -> Any:
    """Return the module of a method, which is another class for a baseline."""
    if settings["method"] not in BASELINES:
        return TextClassifier(**settings)
    from lightning_lora.training.baselines import make_classifier

    return make_classifier(**settings)


def parse_settings(parser: SettingsParser, command: str, argv: Sequence[str]) -> Namespace:
    """Return the settings that a command line gives, with what it leaves open filled in.

    Args:
        parser: Of the command.
        command: The word after ``main.py``.
        argv: What stands after it.

    Raises:
        UserError: There is a fault in them.
    """
    restrict_imports()
    show_help(command, lambda: _make_parser.__wrapped__(command, program()), argv)
    try:
        configs, rest = _split_configs(command, argv)
        given = [word for config in configs for word in ("--config", yaml.safe_dump(config, allow_unicode=True))]
        settings = resolved(parser.parse_args([*given, *rest]))
    except (argparse.ArgumentError, TypeError) as error:
        from lightning_lora.config.argument_parser import explained

        raise UserError(explained(str(error), parser)) from error
    if command not in _NEW:
        trained, asked = configs[0].get("data", {}).get("truncation"), settings.get("data.truncation")
        if trained and asked and is_pair(trained) != is_pair(asked):
            read = "pairs of texts" if is_pair(trained) else "one text a row"
            raise UserError(f"data.truncation: {asked}, but the run was trained on {read} ({trained}); leave it out")
    return settings


def _split_configs(command: str, argv: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the configs that a command line begins with, each over those before it, and the other arguments."""
    argv = list(argv)
    if command not in (*_NEW, "predict") and argv and not argv[0].startswith("-"):
        argv = ["--run", *argv]  # the folder alone is clear enough where no texts are given
    end = argv.index("--") if "--" in argv else len(argv)
    option = "resume" if command == "fit" else "run"
    names = {"fit": ("arm", option), "data": ("arm",)}.get(command, (option,))
    given, rest, typed = _find_options(argv[:end], names)
    run, configs = given.get(option), list[dict[str, Any]]()
    if run is not None:
        folder = RunFolder.open(Path(run), f"--{option}")
        configs = [folder.found_from_here(read_config(folder.config, as_base=False))]
        if command != "fit":  # the machine that evaluates is not always the one that trained
            trainer = configs[0].setdefault("trainer", {})
            devices = trainer.get("devices")
            one = devices[:1] if isinstance(devices, list) else 1
            configs[0]["trainer"] = {**trainer, "devices": one, "num_nodes": 1, "strategy": "auto"}
        rest += [f"--{option}", run]
    elif command not in _NEW:
        raise UserError(f"{command} needs a trained run: --run logs/NAME (a folder that fit made)")
    elif not given["config"]:
        configs = [default_config(typed_source(argv[:end]))]
    more = [config for _, config in _read_configs(given["config"], given.get("arm"))]
    if command == "fit" and run is not None:
        limits = [f"trainer.{name}" for name in LIMITS]
        for name in [*typed, *(["config"] if more else [])]:
            if name not in limits:
                raise UserError(
                    f"--resume: '--{name}' would make it another run; only --{', --'.join(limits)} can be given, or "
                    "start a new run"
                )
    if command == "predict":
        refuse_unused(command, [*typed, *(key for config in more for key in flat(config))])
    elif command in ("data", "validate", "test"):  # a config describes a run whole
        refuse_unused(command, typed)
    layers = [*configs, *more]
    _reset_train_length(layers, typed)
    return layers, [*rest, *argv[end:]]


def _reset_train_length(layers: Sequence[dict[str, Any]], typed: Iterable[str]) -> None:
    """Let a ``data.max_length`` be that of training texts too, where only layers below its own say otherwise."""
    for at, layer in enumerate([*map(flat, layers), dict.fromkeys(typed)]):
        if "data.max_length" in layer and "data.train_max_length" not in layer:
            for below in layers[:at]:
                below.get("data", {}).pop("train_max_length", None)


def split_fit(argv: Sequence[str]) -> tuple[list[dict[str, Any]], list[str], set[str]]:
    """Return what a command line of ``fit`` says of the run: its configs, its options, and the keys that were typed.

    Typed is what an option or a config other than the default one gives; name and place of the run are left out.

    Args:
        argv: What stands after the command.
    """
    given, rest, options = _find_options(argv, COMMAND_OPTIONS["fit"])
    configs, typed = list[dict[str, Any]](), {*options}
    if not given["config"]:
        return [default_config(typed_source(argv))], rest, typed
    for path, config in _read_configs(given["config"], given["arm"]):
        configs.append({k: v for k, v in config.items() if k not in COMMAND_OPTIONS["fit"]})
        typed |= set() if path.resolve() == DEFAULT_CONFIG else set(flat(configs[-1]))
    return configs, rest, typed


def default_config(source: Any = None) -> dict[str, Any]:
    """Return the settings of a run without a config, of which those of the data are for its own source alone.

    Args:
        source: The ``data.source`` that is given beside it, if one is.
    """
    config = read_config(DEFAULT_CONFIG)
    if source not in (None, config["data"]["source"]):
        del config["data"]
    return config


def typed_source(argv: Sequence[str]) -> Any:
    """Return the ``data.source`` that a command line gives, the last one, or None; of split by split their names."""
    given, _, others = _find_options(argv, ["data", "data.source"])
    if splits := [name for name in others if name.startswith("data.source.")]:
        return splits
    if given["data.source"] is None and given["data"] is not None:
        try:
            group = yaml.safe_load(given["data"])
        except yaml.YAMLError:  # of which the parser says so
            group = None
        return group.get("source") if isinstance(group, dict) else None
    return given["data.source"]


def _find_options(argv: Sequence[str], names: Iterable[str]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the configs and some options of a command line, its other arguments, and the names of options in these."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("-c", "--config", action="append", default=[])
    for name in names:
        finder.add_argument(f"--{name}")
    given, rest = finder.parse_known_args(argv)
    return vars(given), rest, [word[2:].partition("=")[0].rstrip("+") for word in rest if word.startswith("--")]


def _read_configs(names: Sequence[str | Path], arm: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """The settings of each config with its path, and after them those of an arm where the config describes arms.

    Raises:
        UserError: A config is an ablation or describes arms and the name is none of them; or none describes arms.
    """
    found, known = list[tuple[Path, dict[str, Any]]](), False
    for name in names:
        config = read_config(path := find_config(str(name)))
        if "question" in config:
            raise UserError(f"--config: {name} is an ablation: {command_line('ablate', '--config', name)}")
        found.append((path, config))
        if "arms" in config:
            arms = config.pop("arms")
            arms = {str(key): change or {} for key, change in arms.items()} if isinstance(arms, dict) else {}
            if arm not in arms:
                other = "" if arm is None else f"'{arm}' is none of them; "
                raise UserError(
                    f"--config: {name} describes the arms {', '.join(arms)}; {other}choose one with --arm, or train "
                    f"all: {command_line('compare', '--config', name)}"
                )
            found.append((path, arms[arm]))
            known = True
    if arm is not None and not known:
        raise UserError(f"--arm: no config that is given describes arms; leave '{arm}' out")
    return found


def restrict_imports() -> None:
    """Let configs name classes of ``ALLOWED`` only, without those of ``CALLBACKS``; naming another imports nothing.

    Raises:
        UserError: The variable ``LIGHTNING_LORA_ALLOW`` holds what is no import path.
    """
    more = [name.strip() for name in os.environ.get(ALLOW_VARIABLE, "").split(",") if name.strip()]
    refused = [getattr(callbacks, name) for name in CALLBACKS]  # by the path of the module that defines each, too
    denied = ["*", *(f"{path}.{each.__name__}" for each in refused for path in (ALLOWED[0], each.__module__))]
    try:
        jsonargparse.set_parsing_settings(import_path_denylist=denied, import_path_allowlist=[*ALLOWED, *more])
    except ValueError as error:
        raise UserError(f"{ALLOW_VARIABLE}: import paths separated by commas are needed ({error})") from error


class _ConfigLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML keeps the last, and aliases, which can stand for any number of values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "aliases are not supported", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if (name := str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{name}' is a duplicate key", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_config(path: Path, as_base: bool = True) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Args:
        path: The file.
        as_base: Whether other settings may be built on them: those of a run then leave open what its method gave as
            default, and its rows as length, so that another method and other rows have their own.

    Raises:
        UserError: It cannot be read, is no YAML, or holds something else than settings, or one twice.
    """
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_ConfigLoader)  # a safe loader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config: cannot read {path} ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(config, dict):
        raise UserError(f"--config: {path} holds no settings")
    if as_base and path.with_name("run.json").is_file():
        config = as_configured(config, RunFolder(path.parent).read())
        model = config["model"]
        defaults = method_defaults(model["method"])
        for place, name in ((model, "learning_rate"), (model["adapter"], "rank")):
            if place[name] == defaults[name]:
                place[name] = None
    return config


def method_defaults(name: str) -> dict[str, float | None]:
    """Return the learning rate and the rank that a method has by default; None where it takes none."""
    method = (METHODS | BASELINES).get(name)
    if method is None:  # refused later, with the names that there are
        return {"learning_rate": None, "rank": None}
    return {"learning_rate": method.learning_rate, "rank": method.rank if "rank" in method.options else None}


def resolved(config: Namespace) -> Namespace:
    """Return a copy of parsed settings in which what depends on the method, source or machine is filled in.

    What depends on the rows stays open: ``data.val_size`` and ``data.test_size`` are used only where the source has no
    such split, and the run record says what was carved.
    """
    config = config.clone()
    if "model.method" in config:
        defaults = method_defaults(config["model.method"])
        for key in ("model.learning_rate", "model.adapter.rank"):
            if config.get(key) is None:
                config[key] = defaults[key.rpartition(".")[2]]
    if (source := config.get("data.source")) is not None:
        given = (config.get("data.text_column"), config.get("data.label_column"))
        texts, label = columns_of(SourceOptions(source, *given))
        config["data.text_column"] = given[0] or (texts if len(texts) > 1 else texts[0])
        config["data.label_column"] = label if isinstance(label, str) else list(label)
        if "data.truncation" in config:
            config["data.truncation"] = choose_truncation(config["data.truncation"], texts)
    if "data.eval_batch_size" in config:
        config["data.eval_batch_size"] = default_eval_batch_size(config["data.eval_batch_size"])
    if "trainer.precision" in config:
        precision = config["trainer.precision"]
        automatic = auto_precision(str(config["trainer.accelerator"])) if precision is None else precision
        config["trainer.precision"] = full_name(automatic)
        config["trainer"] = _plain(config["trainer"])
    return config


def _plain(value: Any) -> Any:
    """Return the value with members of enumerations, which YAML cannot hold, as what they stand for."""
    if isinstance(value, Namespace):
        return Namespace(**{key: _plain(each) for key, each in vars(value).items()})
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.value if isinstance(value, enum.Enum) else value


def places(settings: Any) -> Iterator[str]:
    """Yield where the classes that settings name would write."""
    if isinstance(settings, dict):
        for name, value in settings.items():
            if name in _PLACES and isinstance(value, str):
                yield value
            yield from places(value)
    elif isinstance(settings, list):
        for each in settings:
            yield from places(each)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as ``{"model.adapter.rank": 8}``; lists as text."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            result[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return result
