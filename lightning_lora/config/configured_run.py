"""A command that is configured like a run: its settings, and the data module, model and trainer that they describe."""

import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import Namespace
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_lora.config.options import COMMAND_KEYS
from lightning_lora.config.progress import Progress, ProgressLines
from lightning_lora.config.settings import ALLOWED, flat, make_parser, parse_settings, places
from lightning_lora.data.datamodule import TextDataModule, check_whole_pass
from lightning_lora.data.pairs import as_texts
from lightning_lora.data.rows import Rows
from lightning_lora.devices import keep_freed_memory
from lightning_lora.errors import UserError, check_range
from lightning_lora.evaluation.costs import CostMeter
from lightning_lora.evaluation.predictions import PredictionCollector
from lightning_lora.interrupts import StopRequest
from lightning_lora.models.check_base import BaseCheck
from lightning_lora.models.methods import BASELINES, find_method
from lightning_lora.models.speedups import cast_frozen
from lightning_lora.processes import is_rank_zero, started_with_nonzero_rank
from lightning_lora.quiet import quiet_libraries
from lightning_lora.runs.checkpoints import AtomicCheckpointIO, ResumePoints
from lightning_lora.runs.folder import RunFolder
from lightning_lora.tokenizer import ordinary_ids
from lightning_lora.training.length import TrainingLength, length_of, stay_stopped
from lightning_lora.training.loggers import LearningRateCurve, TensorBoardPages, make_loggers, rejoin_loggers
from lightning_lora.training.module import AUTOCAST, TextClassifier
from lightning_lora.training.refused import check_monitors, refuse_options
from lightning_lora.training.saving import StateSaver, best_checkpoint, place_checkpoints

if TYPE_CHECKING:
    from lightning_lora.training.trackers import Tracker

#: What ``trainer.strategy`` may be.
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")


class ConfiguredRun:
    """One parsed command line; ``build`` makes the objects, once there is a run folder for them.

    Args:
        command: "fit", "validate", "test", "predict" or "export".
        argv: What stands after the command.
    """

    datamodule: TextDataModule
    model: TextClassifier
    trainer: Trainer

    def __init__(self, command: str, argv: list[str]) -> None:
        quiet_libraries()
        self.command = command
        self.argv = argv
        self.collector = PredictionCollector()
        self.costs = CostMeter()
        self.stop_request = StopRequest()
        #: Steps that were done before, where a run resumes; or those that the weights to evaluate were trained for.
        self.steps_done = 0
        #: The runs that loggers began, by their class, where training is resumed.
        self.logger_ids: dict[str, str] = {}
        #: Where the run is tracked too.
        self.tracker: Tracker | None = None
        #: How long to train by the number of rows, where that was left open.
        self.length: TrainingLength | None = None
        #: The trainer's settings that this has filled in, by name: as asked for, and as used.
        self.auto_filled: dict[str, list[Any]] = {}
        #: Whether a run is resumed to train for longer than it was to.
        self.longer = False
        #: Called right before training, when all that it uses is known.
        self.at_start: Callable[[], None] = lambda: None
        self.parser = make_parser(command)
        self.config = parse_settings(self.parser, command, argv)
        self._check_settings()
        seed_everything(self.config.seed_everything, workers=True, verbose=False)
        #: The trainer's settings with the callbacks, loggers and profiler that they name, once they are made.
        self.trainer_settings: dict[str, Any] = vars(self.config.trainer)

    @property
    def has_begun(self) -> bool:
        """Whether a first step has started."""
        return hasattr(self, "model") and self.model.step_started

    def _check_settings(self) -> None:
        """Refuse settings that the parser lets through.

        Raises:
            UserError: A setting is out of range, or does not go with another.
        """
        config, trainer = self.config, self.config.trainer
        check_range("seed_everything", config.seed_everything, 0, 2**32)
        folders = [Path.cwd(), Path(config.get("logs_dir") or "logs").resolve()]
        for place in places(trainer.as_dict()):
            if not any(Path(place).expanduser().resolve().is_relative_to(folder) for folder in folders):
                raise UserError(f"trainer: {place} lies outside the working folder and --logs_dir")
        if trainer.strategy not in STRATEGIES:
            raise UserError(
                f"trainer.strategy: '{trainer.strategy}' is not one of {', '.join(STRATEGIES)}; what is trained of an "
                "encoder with LoRA fits on each device, so it is never cut up"
            )
        if self.command == "fit" and config.resume is None:  # a resumed run keeps what it started with
            refuse_options(trainer.as_dict(), find_method(config.model.method).trains)
        check_whole_pass(trainer, "val")
        check_whole_pass(trainer, "test")

    def count_devices(self) -> int:
        """Return the number of devices, of all nodes, that run the command.

        Raises:
            UserError: This machine does not have them, torchrun has started another number of processes, or the command
                cannot share its work among them.
        """
        trainer = self.config.trainer
        devices, nodes, accelerator = trainer.devices, int(trainer.num_nodes), trainer.accelerator
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        try:
            if nodes < 1:
                raise ValueError("at least one machine is needed")
            count = nodes * Trainer(accelerator=accelerator, devices=devices, **quiet).num_devices
        except (MisconfigurationException, TypeError, ValueError, ImportError, RuntimeError) as error:
            raise UserError(
                f"trainer.devices {devices}, num_nodes {nodes}, accelerator {accelerator}: "
                f"{' '.join(str(error).split())}; --trainer.accelerator auto takes what this machine has"
            ) from error
        started = int(os.environ.get("WORLD_SIZE", "0"))
        if started and started != count:
            raise UserError(
                f"trainer.devices: {started} processes were started, but the trainer is to have {count} devices; give "
                "--trainer.devices (a machine) and --trainer.num_nodes as they were started"
            )
        if self.command in ("predict", "export") and count > 1:
            more = "; --workers shares many files" if self.command == "predict" else ""
            raise UserError(f"trainer.devices: {self.command} runs on one device{more}")
        if self.command == "fit" and count > 1 and self.config.model.method in BASELINES:
            raise UserError(f"trainer.devices: method '{self.config.model.method}' is fitted by one process; give 1")
        if self.command == "fit" and (size := self.config.data.batch_size) < count:
            raise UserError(f"data.batch_size: {size} texts a step cannot be shared by {count} devices; raise it")
        return count

    def start_processes(self) -> int | None:
        """Run the command in a process for each of several devices, unless this is one of them.

        Returns:
            The exit status; None where the command is to run in this process.
        """
        if (count := self.count_devices()) == 1:
            return None
        from lightning_lora.training.parallel import run_processes, silence_nonzero_rank

        status = run_processes([self.command, *self.argv], count, self.config.trainer.num_nodes)
        if status is None and started_with_nonzero_rank():  # rank zero prints, and writes all files
            silence_nonzero_rank()
        return status

    def build(self, folder: RunFolder) -> None:
        """Make the data module, the model and the trainer, which writes into the folder.

        Raises:
            UserError: The machine lacks what is asked for, a class that the config names cannot be made, or the base
                model cannot take the texts.
        """
        keep_freed_memory()
        config = self.config.clone()
        if self.command != "fit":  # callbacks and loggers of a config are for fitting only
            config.trainer.callbacks, config.trainer.logger = None, config.trainer.logger is not False
        elif self.steps_done and config.trainer.callbacks:  # the rate that was found stands in the run's config
            several = as_list(config.trainer.callbacks)
            config.trainer.callbacks = [each for each in several if "LearningRateFinder" not in str(each)]
        rejoin_loggers(config.trainer.logger, self.logger_ids)
        try:
            made = self.parser.instantiate_classes(config)
        except (ValueError, TypeError, ImportError, AttributeError) as error:
            if "class_path" not in str(error):
                raise
            from lightning_lora.config.argument_parser import root_cause

            raise UserError(f"trainer: a class that the config names cannot be made: {root_cause(error)}") from error
        self.datamodule, self.model, self.trainer_settings = made.data, made.model, vars(made.trainer)
        if self.command == "fit" and find_method(config.model.method).trains:
            self._fill_length()
        self.trainer = self.make_trainer(folder)
        # On the CPU that the model still is on; what a GPU cannot compute in is another matter.
        trains_here = self.command == "fit" and isinstance(self.trainer.accelerator, CPUAccelerator)
        check_base(self.model, self.datamodule, str(self.trainer.precision) if trains_here else None)

    def _begin(self) -> None:
        """Do what is done right before training."""
        stay_stopped(self.trainer, self.longer)
        self.at_start()

    def _fill_length(self) -> None:
        """Fill in how long to train, and when to stop early, where the settings leave it to the number of rows."""
        callbacks = as_list(self.trainer_settings["callbacks"])
        stops_early = find_method(self.config.model.method).stops_early
        self.length = length_of(self.trainer_settings, self.datamodule, callbacks, stops_early)
        if self.length is None:
            return
        asked, trainer = self.settings()["trainer"], self.config.trainer
        self.trainer_settings |= self.length.settings
        for name, value in self.length.settings.items():
            trainer[name] = value
        if (stopping := self.length.stopping) is not None:
            self.trainer_settings["callbacks"] = [*callbacks, EarlyStopping(**stopping)]
            described = Namespace(class_path=f"{ALLOWED[0]}.EarlyStopping", init_args=Namespace(**stopping))
            trainer.callbacks = [*as_list(trainer.callbacks), described]
        used = self.settings()["trainer"]
        self.auto_filled = {name: [value, used[name]] for name, value in asked.items() if value != used[name]}

    def make_trainer(self, folder: RunFolder | None) -> Trainer:
        """Return the trainer of the config; without a folder it logs and saves nothing.

        Raises:
            UserError: There is none with such settings.
        """
        config, fits = dict(self.trainer_settings), self.command == "fit"
        if self.command == "predict":  # whose config is not instantiated
            config |= {"plugins": None, "profiler": None, "limit_predict_batches": None, "fast_dev_run": False}
        given: list[Callback] = as_list(config["callbacks"]) if fits else []
        callbacks: list[Callback] = [self.collector, self.costs]
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks += [Progress()] if sys.stderr.isatty() else [Progress(), ProgressLines()]
        added = [each for each in as_list(config["logger"]) if isinstance(each, Logger)]
        added += [self.tracker] if self.tracker is not None else []
        logs = folder is not None and is_rank_zero() and config["logger"] is not False
        config["logger"] = [*make_loggers(folder.path, fits, self.steps_done), *added] if folder and logs else False
        saves = bool(folder and fits and config["enable_checkpointing"] is not False and not config["fast_dev_run"])
        config["enable_checkpointing"] = saves
        if folder and fits:
            check_monitors(given, self.model.label_names, config, self.model.task)
            place_checkpoints(given, folder)
            # After those of the config, one of which may search for the learning rate.
            given.append(LambdaCallback(on_fit_start=lambda *_: self._begin()))
        if logs:
            settings = self.hyperparameters if fits and config["enable_autolog_hparams"] else None
            given.append(TensorBoardPages(self.collector, settings, self.steps_done))
            if fits and not any(isinstance(c, LearningRateMonitor) for c in given):
                callbacks.append(LearningRateCurve())
        if folder and saves:
            callbacks += [
                best_checkpoint(folder, self.model.task),
                StateSaver(ResumePoints(folder.checkpoints), self.stop_request),
            ]
        config["callbacks"] = [*callbacks, *given]
        if self.count_devices() > 1:
            from lightning_lora.training.parallel import data_parallel

            config["strategy"] = data_parallel(config["strategy"])
        else:
            config["strategy"] = "auto"
        config["plugins"] = [AtomicCheckpointIO(), *as_list(config["plugins"])]
        if folder is not None:
            config["default_root_dir"] = str(folder.path)
            kind: Any = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}.get(str(config["profiler"]))
            if kind is not None:
                config["profiler"] = kind(dirpath=folder.path, filename="profiler")
        try:
            trainer = Trainer(**config)
        except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        if fits and (used := str(trainer.precision)) != (asked := str(self.config.trainer.precision)):
            raise UserError(
                f"trainer.precision: this machine cannot compute in {asked}, and {used} would be used instead; give "
                f"--trainer.precision {used}"
            )
        return trainer

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings as plain values, without the command's own options and linked copies."""
        text = self.parser.dump(self.config, skip_none=False, skip_validation=True)
        return {k: v for k, v in yaml.safe_load(text).items() if k not in COMMAND_KEYS}

    def hyperparameters(self) -> dict[str, Any]:
        """Return flat settings of model and data, and of the trainer what differs from Lightning's defaults."""
        settings = self.settings()
        defaults = inspect.signature(Trainer.__init__).parameters
        given = {k: v for k, v in settings["trainer"].items() if k != "logger"}  # which may hold a key to a service
        settings["trainer"] = {k: v for k, v in given.items() if v != defaults[k].default}
        return flat(settings)


def as_list(value: Any) -> list[Any]:
    """Return the value of a setting that is one of something, several or none as a new list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def row_columns(rows: Rows) -> dict[str, Any]:
    """Return what stands beside the predictions of each row: where it comes from, its key, its length."""
    characters = [len(text) for text in as_texts(rows.texts)]
    return {"row": rows.numbers, "origin": rows.origins, "key": rows.keys, "characters": characters}


def check_base(model: Any, texts: Any, precision: str | None) -> None:
    """Refuse a base model that cannot take the texts as they will be given to it.

    Args:
        model: The model; a baseline that reads texts has no base model.
        texts: How texts are given to it: has ``input_format``, ``tokenizer`` and ``padding``.
        precision: What is to be trained in on the CPU; None where nothing is.

    Raises:
        UserError: What the base model cannot, and what works.
    """
    if not isinstance(model, TextClassifier):
        return
    config, words = model.model.config, ordinary_ids(texts.tokenizer)
    positions = max(getattr(config.get_text_config(), "max_position_embeddings", None) or 0, 0)
    pad_to_max = texts.padding == "max_length"
    check = BaseCheck(model, config.model_type, texts.input_format, words, pad_to_max, positions or None)
    check.check(padding=model.identity.quantization == "none")
    if precision in AUTOCAST:
        if model.lowers_frozen(precision):
            cast_frozen(model.model, AUTOCAST[precision])  # as ``TextClassifier.setup`` will
        check.check_precision(precision, AUTOCAST[precision])
