"""What the parts of ``benchmarks/gpu.py`` share: sizes, models, rows and a training."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer

from benchmarks.throughput import make_base, make_rows, matrix_rate
from lightning_lora.data.batching import LengthBatchSampler
from lightning_lora.data.datamodule import make_loader
from lightning_lora.data.order import default_eval_batch_size
from lightning_lora.devices import auto_precision
from lightning_lora.inference.loaded_run import LoadedRun
from lightning_lora.models.methods import AdapterOptions
from lightning_lora.models.speedups import Speedups
from lightning_lora.training.module import TextClassifier

CUDA = torch.cuda.is_available()
QUIET: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "devices": 1}
NAMES = ["World", "Sports", "Business", "Sci/Tech"]
EPOCH = 120_000
#: Captures are asked for, as callbacks of one's own are there.
BEST = Speedups(cuda_graphs=True if CUDA else "auto")


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if CUDA:
        torch.cuda.synchronize()


class Bench:
    """The sizes, models and rows of one call."""

    def __init__(self, folder: str, tiny: bool, again: bool) -> None:
        self.folder, self.tiny, self.again = folder, tiny, again
        self.device = torch.device("cuda" if CUDA else "cpu")
        self.rate = matrix_rate(self.device, torch.bfloat16 if CUDA else torch.float32)
        self._bases: dict[str, Path] = {}

    def base(self, size: str, **changes: Any) -> Path:
        """A base model of random weights."""
        key = "-".join([size, *(f"{k}{v}" for k, v in changes.items())]).replace(".", "")
        if key not in self._bases:
            place = Path(self.folder) / key
            self._bases[key] = make_base(
                "tiny" if self.tiny and size in ("minilm", "roberta-base") else size, place, **changes
            )
        return self._bases[key]

    def word_base(self, size: str) -> Path:
        """A base model with a tokenizer that knows the words w0 to w1999."""
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        folder = self.base(size)
        vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(2000))])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # type: ignore[call-arg]
        backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)  # type: ignore[assignment]
        special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **special).save_pretrained(folder)
        return folder

    def rows(self, count: int, max_length: int = 128, length: int | None = None) -> Any:
        """Random rows with AG News' lengths."""
        return make_rows(count, max_length, length, top=20000 if not self.tiny else 1900)


class Watch(Callback):
    """Losses of the steps, and when a fifth of them, and the last, had been done."""

    def __init__(self, losses: bool = False) -> None:
        self.keeps, self.losses, self.times = losses, list[torch.Tensor](), list[float]()
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self.skip = max(1, int(trainer.num_training_batches) // 5)
        synchronize()
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the loss and the time."""
        if self.keeps:
            self.losses.append(outputs["loss"].detach().clone())
        if batch_idx + 1 in (self.skip, trainer.num_training_batches):
            synchronize()
            self.times.append(time.perf_counter())


class PredictClock(Callback):
    """Seconds of a prediction pass, without moving the model to the device and back."""

    seconds = 0.0

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clock."""
        synchronize()
        self._started = time.perf_counter()

    def on_predict_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Stop it."""
        synchronize()
        self.seconds = time.perf_counter() - self._started


def fit(
    base: Path,
    data: Any,
    batch_size: int,
    speedups: Speedups,
    watch: Watch,
    precision: str | None = None,
    epochs: int = 1,
    resume: Path | None = None,
    save: Path | None = None,
    kind: Any = TextClassifier,
    **model: Any,
) -> TextClassifier:
    """Train; return the model."""
    torch.manual_seed(0)
    module = kind(str(base), NAMES, speedups=speedups, **{"schedule": "constant", "warmup_ratio": 0} | model)
    progress = {"enable_progress_bar": False, "gradient_clip_val": 1.0, "max_epochs": epochs, **QUIET}
    trainer = Trainer(precision=precision or auto_precision("auto"), callbacks=[watch], **progress)  # type: ignore[arg-type]
    data.packing = None
    sampler = LengthBatchSampler(data.lengths, batch_size, 1)
    trainer.fit(module, make_loader(data, sampler, module.packed_batches.wanted(trainer)), ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return module


def weights(module: TextClassifier) -> torch.Tensor:
    """All trained weights in one tensor."""
    return torch.cat([p.detach().cpu().flatten() for p in module.parameters() if p.requires_grad])


def predictor(
    bench: "Bench", size: str, speedups: Speedups, *callbacks: Callback, precision: Any = None, **model: Any
) -> LoadedRun:
    """A model of random weights, as a run that was loaded."""
    torch.manual_seed(0)
    adapter = AdapterOptions(rank=8, target_modules="query_value")
    module = TextClassifier(str(bench.base(size)), NAMES, adapter=adapter, speedups=speedups, **model)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    precision = precision or auto_precision("auto")
    trainer = Trainer(precision=precision, enable_progress_bar=False, callbacks=list(callbacks), **QUIET)
    return LoadedRun(module, None, bench.rows(1).input_format, "longest", default_eval_batch_size(None), trainer)
