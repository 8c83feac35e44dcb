"""The LightningModule: a base model, a method, one shared step."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_lora.data.batching import ResumableLoader
from lightning_lora.data.datamodule import TextDataModule, check_whole_pass
from lightning_lora.errors import UserError, check_range
from lightning_lora.evaluation.documents import pooled
from lightning_lora.evaluation.metrics import TrainCounter
from lightning_lora.evaluation.thresholds import Threshold
from lightning_lora.models.base import Base, enable_gradient_checkpointing, load_base
from lightning_lora.models.head import scale_output
from lightning_lora.models.kernel_plugins import check_engine
from lightning_lora.models.methods import BASELINES, AdapterOptions, applied, check_options, find_method, tune
from lightning_lora.models.pooling import Pooling, choose_pooling, read_mean
from lightning_lora.models.quantization import Quantization, check_quantization
from lightning_lora.models.speedups import (
    Speedups,
    begin_evaluation,
    cast_frozen,
    choose_attention,
    end_evaluation,
    install,
)
from lightning_lora.program import command_line
from lightning_lora.runs.checkpoints import CheckpointIdentity
from lightning_lora.tasks import Task
from lightning_lora.training.guard import check_whole_steps, compute_largest_batch
from lightning_lora.training.loss import Calibrate, ClassWeights, check_task, has_temperature, row_losses
from lightning_lora.training.optim import (
    Schedule,
    count_steps,
    make_optimizer,
    make_schedule,
    set_rates,
    take_found_rate,
)
from lightning_lora.training.packed_batches import PackedBatches
from lightning_lora.training.steps import StepRunner

#: In what a precision of Lightning's multiplies while weights are of another format.
AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class TextClassifier(StepRunner):
    """A Hugging Face encoder or language model fine-tuned to classify texts.

    Args:
        base_model: The pretrained model: a Hub id, a local folder, or ``package:NAME/path``.
        label_names: Names of the classes in the order of their numbers; linked to the data.
        method: "lora" or a variant ("rslora", "dora", "lora_plus", "pissa", "adalora"), "ia3", "vera", "bitfit"
            (biases), "head" (frozen base, trained head), "full" (every weight), or "none" (nothing is trained). On the
            command line also a baseline: "majority", "tfidf" or "probe".
        adapter: Options of the adapter, for methods that have one.
        quantization: How the weights of the frozen encoder are stored.
        pooling: What the head reads of a text: the state of its "first" token, the "mean" of the states of all, of
            language models that of the "last", or "auto": the mean where the base was trained through it, as those of
            sentence-transformers were.
        learning_rate: Peak of the schedule; by default what suits the method (lora 1e-3, head 1e-2, full
            1e-4).
        schedule: How the learning rate falls after warm-up: "linear", "cosine" or "constant".
        warmup_ratio: Share of all optimizer steps over which the learning rate rises.
        weight_decay: AdamW's, not on biases and norms.
        task: What is predicted: one class, any number of labels, or a number; linked to the data.
        threshold: Of several labels the probability from which on one is predicted: "one" for all labels or one
            "per_label", chosen by F1 on validation rows and kept with the weights; or a number.
        calibrate: Divide logits by a temperature that is fitted to validation rows and kept with the weights, so that
            probabilities are those that come true; no label changes. "auto": where there are 100 rows to fit it to,
            and texts are not cut into windows.
        label_smoothing: From 0 up to 1; in training only.
        class_weights: Weights of the classes in the training loss: "balanced" (inverse to their share of
            the training rows) or one number a class; they are scaled so that a row weighs 1 on average. Of several
            labels the weights of the rows that have each, beside 1 of those that do not.
        attention: Implementation of the attention: "auto" (what transformers chooses, but "exact" without a GPU,
            where "sdpa" is slower, its backward pass above all), "eager", "sdpa", or "exact", this project's own
            for encoders (``models/attention.py``).
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them: less
            memory, about a third more time, the same gradients.
        frozen_dropout: Keep the dropout of a frozen encoder. Drawing its random numbers takes up to half of
            the time on a CPU; dropout of the adapter, the head, and a base that is trained is always kept.
        speedups: What is done for speed.
        seed: Seed of everything newly initialised and of dropout; linked to ``seed_everything``.
    """

    #: Baselines that a subclass fits.
    baselines: tuple[str, ...] = ()

    def __init__(
        self,
        base_model: str,
        label_names: list[str],
        method: str = "lora",
        adapter: AdapterOptions = AdapterOptions(),  # noqa: B008  # never changed; the parser reads it
        quantization: Quantization = Quantization(),  # noqa: B008
        pooling: Pooling = "auto",
        learning_rate: float | None = None,
        schedule: Schedule = "linear",
        warmup_ratio: float = 0.06,
        weight_decay: float = 0.01,
        task: Task = "single_label",
        threshold: Threshold = "one",
        calibrate: Calibrate = "auto",
        label_smoothing: float = 0.0,
        class_weights: ClassWeights | None = None,
        attention: Literal["auto", "eager", "sdpa", "exact"] = "auto",
        gradient_checkpointing: bool = False,
        frozen_dropout: bool = False,
        speedups: Speedups = Speedups(),  # noqa: B008
        seed: int = 42,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        # A checkpoint holds plain types only.
        adapter = AdapterOptions(**adapter) if isinstance(adapter, dict) else adapter
        quantization = Quantization(**quantization) if isinstance(quantization, dict) else quantization
        speedups = Speedups(**speedups) if isinstance(speedups, dict) else speedups
        entry = find_method(method)
        if method in BASELINES and method not in self.baselines:
            raise UserError(
                f"model.method: '{method}' is a baseline, fitted without steps; use: "
                f"{command_line('fit', '--model.method', method)}"
            )
        check_options(method, adapter)
        check_quantization(quantization, method, entry.bits, entry.cpu_bits)
        check_range("model.warmup_ratio", warmup_ratio, 0, 1)
        check_range("model.label_smoothing", label_smoothing, 0, 1)
        check_task(task, len(label_names), label_smoothing, class_weights, threshold)
        self.has_temperature = has_temperature(calibrate, task, threshold, method)
        check_range("model.weight_decay", weight_decay, 0, None)
        check_range("model.learning_rate", learning_rate or 0, 0, None)
        self.learning_rate = entry.learning_rate if learning_rate is None else learning_rate
        given |= {"label_names": list(label_names), "learning_rate": self.learning_rate}
        given |= {"adapter": asdict(adapter), "quantization": asdict(quantization), "speedups": asdict(speedups)}
        self.save_hyperparameters(given, logger=False)
        self.label_names = list(label_names)
        self.task, self.threshold, self.calibrate = task, threshold, calibrate
        self.schedule = schedule
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.attention = attention
        self.seed = seed
        self.adapter, self.quantization, self.speedups = adapter, quantization, speedups
        #: Whether layers are evaluated in int8, where they can be.
        self.int8 = False
        self.packed_batches = PackedBatches(self)
        # A checkpoint holds what is trained; the frozen rest comes from the base model.
        self.strict_loading = False
        self.register_buffer("loss_weights", None, persistent=False)
        self.configure_models()
        self.configure_losses()
        self.configure_metrics()
        self._counted: dict[str, Any] = {}
        #: Where the loader is to resume.
        self._loader: dict[str, Any] = {}
        #: The peak of the schedule, which a search may replace.
        self.scheduled_rate = self.learning_rate
        #: Optimizer steps of the schedule: in the state that training continues from, and now.
        self.planned_before: int | None = None
        self.planned_steps: int | None = None

    def load_base_model(self) -> Base:
        """Load the base model with its head. Override to change the head before the method is applied."""
        base = load_base(self.hparams["base_model"], self.label_names, self.seed, self.quantization, self.task)
        if self.hparams["gradient_checkpointing"]:
            enable_gradient_checkpointing(base.model)
        return base

    def configure_models(self) -> None:
        """Apply the method to the base model: sets ``self.model``, which gives ``logits`` (B, C)."""
        base, method = self.load_base_model(), self.hparams["method"]
        self.pooling = choose_pooling(self.hparams["pooling"], base)
        if self.pooling == "mean":
            read_mean(base, self.packed_batches.first_tokens)
        self.tuned = tuned = tune(base, method, self.adapter, self.seed, self.hparams["frozen_dropout"])
        self.speed_notes = install(base, self.speedups, self.packed_batches.first_tokens, self.pooling == "first")
        self.packed_batches.start(base)
        self.known_architecture = base.architecture is not None and not base.reads_last
        if self.attention == "exact" and base.reads_last:
            raise UserError("model.attention: exact attention is for encoders; leave it out for a language model")
        if self.attention == "sdpa" and not base.model._supports_sdpa:
            raise UserError(f"model.attention: architecture '{base.model.config.model_type}' has no sdpa; leave it out")
        read = {"mean": " on the mean of a text's states", "last": " on the state of a text's last token"}
        self.head_origin = base.head + read.get(self.pooling, "")
        self.model: Any = tuned.model
        self.loaded_attention: str = tuned.model.config._attn_implementation
        self.target_modules = tuned.target_modules
        self.head_modules = tuned.head_modules
        stored, options = self.quantization.label, {**applied(self.adapter, method), "pooling": self.pooling}
        self.identity = CheckpointIdentity(
            self.hparams["base_model"], base.fingerprint, self.label_names, method, stored, options, self.task
        )

    def configure_losses(self) -> None:
        """Set ``self.criterion``, the training loss of logits (B, C) and labels; override for another one."""
        self.criterion: Callable[[Tensor, Tensor], Tensor] = self.weighted_cross_entropy

    def configure_metrics(self) -> None:
        """Set the metrics of each stage; override to add some: ``self.add_metric("mcc", MulticlassMatthews...(C))``."""
        super().configure_metrics()
        self.train_counter = TrainCounter(len(self.label_names), self.task)

    def weighted_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The training loss: cross-entropy (binary of several labels) with label smoothing and class weights.

        Of regression the squared error, in units of the variance of the training rows.
        """
        return self._row_losses(logits, labels).mean()

    def _row_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return row_losses(logits, labels, cast("Tensor | None", self.loss_weights), self.label_smoothing, self.task)

    def train(self, mode: bool = True) -> "TextClassifier":
        """Sets training or evaluation mode, and with it the attention that is faster in that mode."""
        super().train(mode)
        if mode:  # after an evaluation that was broken off
            end_evaluation(self.model)
        self.use_attention(self.attention_for(mode))
        return self

    def attention_for(self, training: bool) -> str:
        """The name of the attention to padded batches in training or evaluation."""
        return choose_attention(self.attention, self.loaded_attention, self.known_architecture, training, self.speedups)

    def use_attention(self, name: str) -> None:
        """Sets the implementation of the attention."""
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)

    def speed_choices(self, trainer: Any) -> list[str]:
        """What is done for speed in a run of this trainer, in words."""
        packed = self.packed_batches.wanted(trainer)
        attention = "texts packed" if packed else f"{self.attention_for(training=True)} attention"
        lowered = ["frozen weights in bfloat16"] if self.lowers_frozen(str(trainer.precision)) else []
        return [attention, *lowered, *self.speed_notes]

    def lowers_frozen(self, precision: str) -> bool:
        """Whether frozen weights are kept in bfloat16."""
        wanted = self.speedups.frozen_weights == "auto" and precision == "bf16-mixed"
        return wanted and not all(p.requires_grad for p in self.model.parameters())

    def check_int8(self, precision: str) -> int:
        """The number of layers that can be evaluated in int8 in a run of this precision.

        Raises:
            UserError: No layer can be evaluated in int8, or this machine has no kernels for it.
        """
        attention = self.attention_for(training=False) if self.lowers_frozen(precision) else None
        return check_engine("int8", self.model, attention)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Logits, float32 (B, C), of token ids (B, T), their mask, and the token types of pairs."""
        self.use_attention(self.attention_for(self.training))
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits.float()

    def document_logits(self, batch: dict[str, Any]) -> Tensor:
        """Logits, float32 (B, C), of the batch's documents; those of several windows are pooled."""
        if "packed" in batch:
            return self.packed_batches.logits(batch)
        types = [batch["token_type_ids"]] if "token_type_ids" in batch else []
        logits = self(batch["input_ids"], batch["attention_mask"], *types)
        several = "documents" in batch
        return pooled(logits, batch["documents"], len(batch["rows"]), self.task) if several else logits

    def shared_step(self, batch: dict[str, Any], stage: str) -> dict[str, Tensor]:
        """Loss and logits of a batch; counts the metrics of the stage ("train", "val" or "test")."""
        if stage != "train":
            return super().shared_step(batch, stage)
        logits = self.document_logits(batch)
        labels = batch["labels"].to(logits.device, non_blocking=True)
        loss = self.criterion(logits, labels)
        if batch["step_weight"]:  # else this process had no row of the part
            self.train_counter.count(logits, labels, loss)
        return {"loss": loss, "logits": logits}

    @property
    def own_criterion(self) -> bool:
        """Whether the training loss is another than this class's, of which only whole batches are known."""
        overridden = type(self).weighted_cross_entropy is not TextClassifier.weighted_cross_entropy
        return overridden or self.criterion != self.weighted_cross_entropy

    def packed_loss(self, logits: Tensor, labels: Tensor, count: Tensor) -> Tensor:
        """The training loss of the first texts of a packed batch.

        Args:
            logits: (B, C).
            labels: (B,), of several labels (B, C).
            count: How many texts are there, (); all of them where the loss is another than this class's.
        """
        if self.own_criterion:
            return self.criterion(logits, labels)
        there = torch.arange(len(labels), device=labels.device) < count
        return (self._row_losses(logits, labels) * there).sum() / count

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss to step on; where steps are captured, the gradients are computed here too."""
        loss = self.captured_loss(batch)
        if loss is None:
            loss = self.shared_step(batch, "train")["loss"]
            self.step_guard.add(loss, batch["rows"])
        self.show_loss(loss, batch, batch_idx)
        # The trainer gives each part of an accumulated step the same weight; its rows say what it should have.
        return (loss if self.tuned.steps is None else loss + self.tuned.steps.penalty()) * batch["step_weight"]

    def on_validation_start(self) -> None:
        """Merges adapters while their weights stay as they are."""
        self.wait_for_steps()
        dtype = AUTOCAST.get(str(self.trainer.precision))
        averages = any(isinstance(each, WeightAveraging) for each in self.trainer.callbacks)  # type: ignore[attr-defined]
        # Their weights are there after this, so nothing is merged.
        speedups = replace(self.speedups, merged_evaluation=False) if averages else self.speedups
        begin_evaluation(self.model, dtype, speedups, "int8" if self.int8 else None)
        self.packed_batches.start_evaluation()

    def on_validation_end(self) -> None:
        """Takes adapters apart again, and lets the model read padded batches."""
        end_evaluation(self.model)
        self.use_attention(self.attention_for(self.training))

    def on_validation_model_train(self) -> None:
        """Goes back to training and its attention: Lightning by itself sets the modules' flags past ``train``."""
        self.train(self.trainer.state.fn == "fit")

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @property
    def weights_settled(self) -> bool:
        """Whether the weights as they are now may be the run's result; not while a method still moves ranks."""
        return self.tuned.steps is None or self.tuned.steps.settled(self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        """Logs the epoch's training loss and metrics."""
        self.wait_for_steps()
        self.log_epoch("train")

    def setup(self, stage: str) -> None:
        """Puts the frozen weights into their dtype, and takes the class weights of the training loss."""
        data: Any = getattr(self.trainer, "datamodule", None)
        has_rows = isinstance(data, TextDataModule)
        if stage == "fit" and not has_rows and (self.task == "regression" or self.class_weights is not None):
            needed = "task regression" if self.task == "regression" else "model.class_weights"
            raise UserError(
                f"{needed} needs the training rows: give Trainer.fit(model, datamodule=TextDataModule(...))"
            )
        if has_rows:
            if data.truncation == "windows":
                if self.calibrate is True:
                    raise UserError(
                        "model.calibrate: exports scale the logits of each window, which can change the label that all "
                        "windows of a text have together; leave it out, or give data.truncation head or both"
                    )
                self.calibrate = False
            data.packed = self.packed_batches.wanted(self.trainer)
        if self.lowers_frozen(str(self.trainer.precision)):
            cast_frozen(self.model, torch.bfloat16)
        if stage == "fit" and (weights := self.weigh_classes(data)) is not None:
            self.loss_weights = weights.to(self.device)
        if stage == "fit" and self.task == "regression":
            mean, sd = data.target_moments
            scale_output(self.model, mean, sd)
            self.loss_weights = torch.tensor(1 / sd**2, device=self.device)

    def on_fit_start(self) -> None:
        """Sets training mode, resets the metrics, and takes the learning rate that a callback may have found."""
        check_whole_pass(self.trainer, "val")
        take_found_rate(self)
        self.fit_started = True
        for stage in ("train", "val", "test"):
            self.counter(stage).reset()
        self.train()

    def on_train_start(self) -> None:
        """Computes the largest batch once, and restores what the metrics of an interrupted epoch have counted."""
        check_whole_steps(self.trainer)
        loader: Any = self.trainer.train_dataloader
        if self._loader and isinstance(loader, ResumableLoader):
            # Lightning does so itself, but not once an optimizer has asked for the number of steps (2.6.6: the loader
            # is then there before the state is read).
            loader.load_state_dict(self._loader)
        self._loader = {}
        if self.planned_before not in (None, self.planned_steps):  # the rate in the state is of the plan before
            for config in self.trainer.lr_scheduler_configs:
                set_rates(config.scheduler)
        compute_largest_batch(self)
        if self._counted and self.trainer.is_global_zero:  # it holds what all processes had counted
            self.train_counter.restore(self._counted)
        self._counted = {}
        self.start_graphs()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW and its schedule, which moves on each optimizer step."""
        optimizer = make_optimizer(
            self, self.learning_rate, self.weight_decay, self.tuned.lr_factors, not self.scales_loss
        )
        self.scheduled_rate = self.learning_rate
        self.planned_steps = count_steps(self.trainer, self.schedule, self.warmup_ratio, self.tuned.steps is not None)
        if self.tuned.steps is not None:
            self.tuned.steps.plan(self.planned_steps)
        schedule = make_schedule(optimizer, self.schedule, self.warmup_ratio, self.planned_steps)
        scheduler: Any = {"scheduler": schedule, "interval": "step", "name": "learning_rate"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out what the base model holds, and says what the rest belongs to."""
        kept = self.checkpoint_keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        self.identity.write_to(checkpoint)
        if "optimizer_states" in checkpoint:  # a state to go on from, and not weights alone
            self.wait_for_steps()
            checkpoint["counted"] = self.train_counter.counted()
            if isinstance(loader := self.trainer.train_dataloader, ResumableLoader):
                checkpoint["loader"] = loader.state_dict()
            checkpoint["planned_steps"] = self.planned_steps
            if self.tuned.steps is not None:
                checkpoint["method_state"] = self.tuned.steps.state_dict()
        elif self._trainer is not None:
            metrics = self.trainer.callback_metrics
            checkpoint["metrics"] = {name: float(v) for name, v in metrics.items() if name.startswith("val/")}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another base model, other labels, another method or other weights."""
        self.identity.check(checkpoint)
        self.identity.check_keys(checkpoint["state_dict"], self.checkpoint_keys(), self.state_dict())
        self._counted, self._loader = checkpoint.get("counted", {}), checkpoint.get("loader", {})
        self.planned_before = checkpoint.get("planned_steps")
        if self.tuned.steps is not None and "method_state" in checkpoint:
            self.tuned.steps.load_state_dict(checkpoint["method_state"])

    def checkpoint_keys(self) -> set[str]:
        """Names of the weights that training changes, the head's and the buffers': what a checkpoint must hold.

        What a quantized weight is stored with is none of it.
        """
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        kept |= {name for name, _ in self.named_buffers(remove_duplicate=False)}
        if not kept & {name for name, _ in self.named_parameters()}:  # nothing is trained, but the head is new
            kept |= {f"model.{m}.{n}" for m in self.head_modules for n in self.model.get_submodule(m).state_dict()}
        return kept & set(self.state_dict())
