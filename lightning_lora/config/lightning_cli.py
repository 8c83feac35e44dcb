"""LightningCLI with this project's links, defaults and run folder; shared by all commands that train or evaluate."""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import LambdaCallback, LearningRateMonitor, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora.config.console import Progress, quiet_libraries
from lightning_lora.config.help_pages import show_help
from lightning_lora.config.parse_errors import check_groups, check_texts, explained
from lightning_lora.config.resolved import ResolvingParser, option_value, reset_words, resolved
from lightning_lora.config.resuming import rejoin_loggers, resumed_words
from lightning_lora.config.run_options import COMMAND_KEYS, COMMAND_OPTIONS, refuse_unused
from lightning_lora.config.yaml_files import ALLOW_VARIABLE, check_places, read_config, restrict_imports
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.rows import Rows
from lightning_lora.data.splits import text_keys
from lightning_lora.devices import keep_freed_memory
from lightning_lora.errors import UserError
from lightning_lora.evaluation.costs import CostMeter
from lightning_lora.evaluation.predictions import PredictionCollector
from lightning_lora.interrupts import StopRequest
from lightning_lora.models.check_base import BaseCheck, Inputs
from lightning_lora.models.speedups import lower_frozen
from lightning_lora.processes import is_leader
from lightning_lora.runs.checkpoints import AtomicCheckpointIO, ResumePoints
from lightning_lora.runs.folder import RunFolder
from lightning_lora.tokenizer import ordinary_ids
from lightning_lora.training.loggers import make_loggers
from lightning_lora.training.module import AUTOCAST, TextClassifier
from lightning_lora.training.parallel import STRATEGIES, strategy_for
from lightning_lora.training.refused import (
    check_accelerator,
    check_monitors,
    class_fault,
    refuse_callbacks,
    refuse_options,
)
from lightning_lora.training.saving import StateSaver, checkpoint_callbacks, place_checkpoints
from lightning_lora.training.tensorboard import TensorBoardPages

DEFAULT_CONFIG = Path(__file__).parents[2] / "configs" / "default.yaml"
DEFAULT_SEED = 42

#: Where this project's defaults differ from Lightning's.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "devices": 1,
    "use_distributed_sampler": False,  # batches are shared out by LengthBatchSampler
}
#: What Lightning takes where its own defaults say None, so that a config shows it.
SPELLED_OUT: dict[str, Any] = {
    "logger": True,
    "enable_checkpointing": True,
    "enable_progress_bar": True,
    "limit_train_batches": 1.0,
    "limit_val_batches": 1.0,
    "limit_test_batches": 1.0,
    "limit_predict_batches": 1.0,
    "val_check_interval": 1.0,
    "gradient_clip_algorithm": "norm",
    "deterministic": False,
}
#: Commands that run on several devices if asked to: fit by its config too, the others by what is typed alone, as the
#: machine that trained is not always the one that tests.
SHARED_COMMANDS = frozenset({"fit", "validate", "test"})
#: Where they run.
PLACE_SETTINGS = {"devices": 1, "num_nodes": 1, "strategy": "auto"}


class ConfiguredRun(LightningCLI):
    """One parsed command line; ``build`` makes the objects, once there is a run folder for them.

    Args:
        command: "fit", "validate", "test", "predict" or "export".
        words: What stands after the command.
    """

    def __init__(self, command: str, words: list[str]) -> None:
        quiet_libraries()
        restrict_imports()
        self.command = command
        self.words = words
        self.collector = PredictionCollector()
        self.costs = CostMeter()
        self.stop_request = StopRequest()
        #: Steps that were done before, where a run resumes; or those that the weights to evaluate were trained for.
        self.steps_done = 0
        #: The runs that loggers began, by their class, where training is resumed.
        self.logger_ids: dict[str, str] = {}
        #: Called right before training, when all that it uses is known.
        self.at_start: Callable[[], None] = lambda: None
        super().__init__(
            TextClassifier,
            TextDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS | SPELLED_OUT,
            parser_kwargs={"prog": f"main.py {command}", "exit_on_error": False, "allow_abbrev": False},
            args=words,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that shows what is used where a config leaves it open."""
        parser = ResolvingParser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=jsonargparse.ActionConfigFile, help="A YAML file of settings; may be repeated."
        )
        return parser

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the seed and the command's own options."""
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=DEFAULT_SEED,
            help="Seed of head, adapter, order and dropout.",
        )
        parser.add_argument(
            "--keep_every_epoch", type=bool, default=False, help="Also keep a checkpoint of each epoch."
        )
        COMMAND_OPTIONS[self.command](parser)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Links what is typed once."""
        parser.link_arguments("model.base_model", "data.base_model")
        parser.link_arguments("seed_everything", "model.seed")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.label_names", "model.label_names", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; a fault is one line."""
        try:
            show_help(self.command, parser, args)
            words = with_base_config(self.command, args)
            configs = [read_config(path) for path in config_files(words)]
            for config in configs:
                check_groups(config, parser)
            if self.command == "fit":
                for config in configs:
                    refuse_callbacks(config.get("trainer"))
                words = [*words, *reset_words(configs, words)]
            self.config = resolved(parser.parse_args(words))
        except (jsonargparse.ArgumentError, TypeError) as error:
            if "'arms" in str(error):
                raise UserError(
                    "the config describes arms, which are for: python main.py compare --config FILE"
                ) from error
            if (denied := re.search(r"Importing '([^']*)' is not allowed", str(error))) is not None:
                raise UserError(
                    f"the config names '{denied[1]}', none of Lightning's callbacks, loggers or profilers; code of "
                    f"your own is allowed by {ALLOW_VARIABLE}=PACKAGE in the environment"
                ) from error
            raise UserError(explained(str(error), parser)) from error
        keys = [word[2:].partition("=")[0].rstrip("+") for word in option_words(args) if word.startswith("--")]
        check_texts(self.config, parser, keys)
        if self.command == "predict":
            refuse_unused([*keys, *(key for path in config_files(args) for key in flat(read_config(path)))])
        self._check_settings(words)

    def _check_settings(self, words: list[str]) -> None:
        """Refuses settings that the parser lets through.

        Raises:
            UserError: There is one.
        """
        trainer = self.config.trainer
        logs = Path(self.config.get("logs_dir") or "logs")
        check_places(self.config.trainer.as_dict(), [Path.cwd(), logs])
        if not 0 <= self.config.seed_everything < 2**32:
            raise UserError(
                f"seed_everything: a number from 0 to 2^32 - 1 is needed, got {self.config.seed_everything}"
            )
        for name, alone in PLACE_SETTINGS.items():
            typed = option_value(words, f"--trainer.{name}")
            if typed not in (None, str(alone)) and self.command not in SHARED_COMMANDS:
                more = "; --workers shares many files" if self.command == "predict" else ""
                raise UserError(f"--trainer.{name}: {self.command} runs on one device{more}")
            if self.command != "fit" and typed is None:  # the config is that of the run
                setattr(trainer, name, trainer[name][:1] if isinstance(trainer[name], list) else alone)
        if trainer.strategy not in STRATEGIES:
            raise UserError(
                f"trainer.strategy: '{trainer.strategy}' is not one of {', '.join(STRATEGIES)}; what is trained of an "
                "encoder with LoRA fits on each device, so it is never cut up"
            )
        if trainer.default_root_dir is not None:
            raise UserError(
                "trainer.default_root_dir: a run writes into its own folder only; use --logs_dir and --name"
            )
        if self.command == "fit":
            settings = trainer.as_dict()
            refuse_callbacks(settings)
            if self.config.resume is None:  # a resumed run keeps what it started with
                refuse_options(settings)
            if self.config.model.method == "lora_plus" and "LearningRateFinder" in str(settings["callbacks"]):
                raise UserError(
                    "trainer.callbacks: LearningRateFinder: it tries one rate for all weights, and lora_plus has two; "
                    "search with model.method lora, or leave it out"
                )
            if self.config.keep_every_epoch and not trainer.enable_checkpointing:
                raise UserError("keep_every_epoch: trainer.enable_checkpointing is off; leave one of the two out")

    def _set_seed(self) -> None:
        seed_everything(self.config.seed_everything, workers=True, verbose=False)

    def instantiate_classes(self) -> None:
        """Nothing yet: see ``build``."""

    def build(self, folder: RunFolder) -> None:
        """Makes the data module, the model and the trainer; the trainer writes into the folder."""
        keep_freed_memory()
        check_accelerator(str(self.config.trainer.accelerator))
        self.config_init = self._instantiated()
        self.datamodule = self.config_init.data
        self.model = self.config_init.model
        self.trainer = self.make_trainer(folder)
        # On the CPU that the model still is on; what a GPU cannot compute in is another matter.
        trains_here = self.command == "fit" and isinstance(self.trainer.accelerator, CPUAccelerator)
        check_base(self.model, self.datamodule, str(self.trainer.precision) if trains_here else None)

    def _instantiated(self) -> Any:
        """The objects of the config; callbacks and loggers that it adds are for fitting only.

        Raises:
            UserError: A class that the config names cannot be made, such as a logger whose package is missing.
        """
        config = self.config.clone()
        trainer = config.trainer
        if self.command != "fit":
            trainer.callbacks = None
            trainer.logger = trainer.logger is not False
        elif self.steps_done:  # the rate that was found stands in the run's config
            several = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
            kept = [c for c in several if not str(getattr(c, "class_path", "")).endswith(".LearningRateFinder")]
            trainer.callbacks = kept if trainer.callbacks else None
        rejoin_loggers(trainer, self.logger_ids)
        try:
            return self.parser.instantiate_classes(config)
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            if (said := class_fault(error)) is None:
                raise
            raise UserError(said) from error

    def make_trainer(self, folder: RunFolder | None) -> Trainer:
        """The trainer of the config; without a folder it logs and saves nothing."""
        config = dict((self.config_init if hasattr(self, "config_init") else self.config).trainer)
        fits = self.command == "fit"
        own: list[Callback] = [self.collector, self.costs]
        extra = (config["callbacks"] or []) if fits else []
        extra = extra if isinstance(extra, list) else [extra]
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in extra):
            own.append(Progress())
        checkpointing = folder is not None and fits and config["enable_checkpointing"] is not False
        checkpointing = checkpointing and not config["fast_dev_run"]
        if folder is None or not is_leader():
            config["logger"] = False
        elif config["logger"] is not False:
            added = config["logger"] if isinstance(config["logger"], list | Logger) else []
            added = added if isinstance(added, list) else [added]
            config["logger"] = [*make_loggers(folder.path, fits, self.steps_done), *added]
        if fits and folder is not None:
            check_monitors(extra, self.model.label_names, config["limit_val_batches"] != 0)
            place_checkpoints(extra, folder)
            # After those of the config, one of which may search for the learning rate.
            extra = [*extra, LambdaCallback(on_fit_start=lambda *_: self.at_start())]
        if config["logger"] and folder is not None:
            logs_settings = fits and config["enable_autolog_hparams"]
            pages = TensorBoardPages(self.collector, self.hyperparameters if logs_settings else None, self.steps_done)
            extra = [*extra, pages]
            if fits and not any(isinstance(c, LearningRateMonitor) for c in extra):
                own.append(LearningRateMonitor(logging_interval="step"))
        if checkpointing and folder is not None:
            own += checkpoint_callbacks(folder, self.config.keep_every_epoch)
            own.append(StateSaver(ResumePoints(folder.checkpoints), self.stop_request))
        config["callbacks"] = own + extra
        if self.command == "predict":  # whose config is not instantiated
            config |= {"plugins": None, "profiler": None, "limit_predict_batches": None, "fast_dev_run": False}
        config["enable_checkpointing"] = checkpointing
        config["use_distributed_sampler"] = False  # also in runs whose config says otherwise
        config["strategy"] = strategy_for(config, [self.command, *self.words])
        plugins = config["plugins"] or []
        config["plugins"] = [AtomicCheckpointIO(), *(plugins if isinstance(plugins, list) else [plugins])]
        if folder is not None:
            config["default_root_dir"] = str(folder.path)
            config["profiler"] = placed_profiler(config["profiler"], folder)
        try:
            trainer = Trainer(**config)
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        if fits and (used := str(trainer.precision)) != (asked := str(self.config.trainer.precision)):
            raise UserError(
                f"trainer.precision: this machine cannot compute in {asked}, and {used} would be used instead; give "
                f"--trainer.precision {used}"
            )
        if fits and (size := self.config.data.batch_size) < trainer.world_size:
            raise UserError(
                f"data.batch_size: {size} texts a step cannot be shared by {trainer.world_size} devices; raise it"
            )
        return trainer

    def settings(self) -> dict[str, Any]:
        """The resolved settings as plain values, without the command's own options and without linked copies."""
        text = self.parser.dump(self.config, skip_none=False, skip_validation=True)
        return {k: v for k, v in yaml.safe_load(text).items() if k not in COMMAND_KEYS}

    def hyperparameters(self) -> dict[str, Any]:
        """Flat settings of model and data, and of the trainer what differs from Lightning's own defaults."""
        settings = self.settings()
        defaults = inspect.signature(Trainer.__init__).parameters
        given = {k: v for k, v in settings["trainer"].items() if k != "logger"}  # which may hold a key to a service
        settings["trainer"] = {k: v for k, v in given.items() if v not in (defaults[k].default, SPELLED_OUT.get(k))}
        return flat(settings)


def placed_profiler(asked: Any, folder: RunFolder) -> Any:
    """The profiler, writing into the run's folder where only its name was given."""
    kind: Any = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}.get(str(asked))
    return asked if kind is None else kind(dirpath=folder.path, filename="profiler")


def row_columns(rows: Rows) -> dict[str, Any]:
    """What stands beside the predictions of each row: where it comes from, its key, its length."""
    characters = [len(text) for text in rows.texts]
    return {"row": rows.numbers, "origin": rows.origins, "key": text_keys(rows.texts), "characters": characters}


def check_base(model: TextClassifier, texts: Any, precision: str | None) -> None:
    """Refuse a base model that cannot take the texts as they will be given to it.

    Args:
        model: The model.
        texts: How texts are given to it: has ``frame``, ``tokenizer`` and ``padding``.
        precision: What is to be trained in on the CPU; None where nothing is.

    Raises:
        UserError: What the base model cannot, and what works.
    """
    frame, words = texts.frame, ordinary_ids(texts.tokenizer)
    inputs = Inputs(
        frame.prefix, frame.suffix, words, frame.pad_id, frame.max_length, pad_to_max=texts.padding == "max_length"
    )
    config = model.model.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    check = BaseCheck(model, config.model_type, inputs, positions if positions and positions > 0 else None)
    check.check(padding=model.identity.quantization == "none")
    if precision in AUTOCAST:
        if model.lowers_frozen(precision):
            lower_frozen(model.model, AUTOCAST[precision])  # as ``TextClassifier.setup`` will
        check.check_precision(precision, AUTOCAST[precision])


def with_base_config(command: str, words: list[str]) -> list[str]:
    """The words with the config in front that they change: the run's own, or for fit the embedded default."""
    if command == "fit":
        if (run := option_value(words, "--resume")) is not None and not {"-h", "--help"} & set(words):
            return resumed_words(words, run)
        if any(word in ("-c", "--config", "-h", "--help") or word.startswith("--config=") for word in words):
            return words
        if not DEFAULT_CONFIG.is_file():
            raise UserError(
                "fit needs --config FILE: the embedded default lies in the project's folder, not in the package"
            )
        return ["--config", str(DEFAULT_CONFIG), *words]
    if {"-h", "--help"} & set(words):
        return words
    if command != "predict" and words and not words[0].startswith("-"):
        words = ["--run", *words]  # the folder alone is clear enough where no texts are given
    run = option_value(words, "--run")
    if run is None:
        raise UserError(
            f"{command} needs a trained run: --run logs/NAME (a folder that fit made); "
            "an untrained model is not evaluated"
        )
    return ["--config", str(RunFolder.open(Path(run)).config), *words]


def option_words(words: Sequence[str]) -> list[str]:
    """The words up to "--", behind which none is an option."""
    return list(words[: words.index("--")] if "--" in words else words)


def config_files(words: Sequence[str]) -> list[Path]:
    """The files that the words give by --config."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = ("-c", "--config")
    return [Path(w.partition("=")[2] or after) for w, after in pairs if w in given or w.startswith("--config=")]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``{"model.adapter.rank": 8}``; lists as text."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            result |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            result[f"{prefix}{key}"] = value if isinstance(value, str | int | float | bool) else str(value)
    return result
