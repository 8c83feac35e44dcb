"""Logits of packed batches: checked against padded ones before they are used, and captured in evaluation."""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.data.packing import PackedShape, PackedViews, padded, unpack
from lightning_lora.devices import compute_dtype
from lightning_lora.errors import UserError, first_line
from lightning_lora.evaluation.documents import pooled
from lightning_lora.models.base import Base
from lightning_lora.models.packed import PACKED, FirstTokens, first_position, leave_short_attention, why_not_packed
from lightning_lora.training.capture import capture, ours

#: Largest relative difference, of logits and gradients in their norm, between packed and padded batches: what two
#: orders of summing can differ by.
PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
#: The forward pass of an evaluation batch is captured when its shape comes for this time.
CAPTURE_AT = 2


class PackedBatches:
    """Computes the logits of packed batches by a ``TextClassifier``.

    Args:
        module: The classifier.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        #: Why batches cannot be packed for the model; None where they can.
        self.cannot: str | None = "configure_models is overridden"
        #: Where the texts of a packed batch begin, while the model reads it.
        self.first_tokens = FirstTokens()
        self.first_position = 0
        #: Why packed batches are padded again before the model reads them; None while they are not.
        self.distrust: str | None = None
        #: Why evaluation passes are not captured; None while they are.
        self.plain_evaluation: str | None = None
        self._checked = False
        self._captured: dict[PackedShape, tuple[Tensor, Tensor, Callable[[], None]]] = {}
        self._met: Counter[PackedShape] = Counter()
        self._addresses: list[int] = []

    def start(self, base: Base) -> None:
        """Take in the model, to which hooks of ``first_tokens`` were added."""
        self.cannot, self.first_position = why_not_packed(base), first_position(base.model)

    def wanted(self, trainer: Any) -> bool:
        """Whether batches are packed in a run of this trainer.

        Raises:
            UserError: That was asked for and cannot be.
        """
        module, data = self.module, getattr(trainer, "datamodule", None)
        asked, reason, kind = module.speedups.packing, self.cannot, type(module)
        own = ("forward", "document_logits", "shared_step")
        if any(not ours(getattr(kind, name)) for name in own):
            reason = f"{' or '.join(own)} is overridden, and reads padded batches"
        elif module.hparams["gradient_checkpointing"]:
            reason = "gradient checkpointing reads a batch once more in the backward pass"
        elif module.attention != "auto":
            reason = f"model.attention asks for {module.attention}"
        elif getattr(data, "padding", None) == "max_length":
            reason = "data.padding asks for max_length"
        if asked is True and reason is not None:
            raise UserError(f"model.speedups.packing: {reason}; leave one of the two out")
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return reason is None and (on_gpu if asked == "auto" else bool(asked))

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits, float32 (B, C), of the texts of a packed batch on the device of the model."""
        flat, shape, count = batch["packed"], batch["shape"], len(batch["rows"])
        if self.checked(batch) is not None:
            return self.padded_logits(batch)
        if not torch.is_grad_enabled() and batch["static"] and self._captures(flat):
            logits = self._run_captured(flat, shape)
            if logits is not None:
                return logits[:count].clone()
        return self.all_logits(unpack(flat, shape), shape)[:count]

    def all_logits(self, views: PackedViews, shape: PackedShape) -> Tensor:
        """Compute logits, float32 (B, C), of all texts that there is room for."""
        module = self.module
        module.use_attention(PACKED)
        offsets = views.offsets.int()
        starts = views.offsets[: shape.inputs].clamp(max=shape.tokens - 1)
        with self.first_tokens.at(starts):
            logits = module.model(
                input_ids=views.input_ids,
                position_ids=views.position_ids + self.first_position,
                attention_mask=None,
                cu_seq_lens_q=offsets,
                cu_seq_lens_k=offsets,
                max_length_q=shape.longest,
                max_length_k=shape.longest,
            ).logits.float()
        # Windows that are not there are pooled into one text more.
        return pooled(logits, views.documents, shape.texts + 1)[: shape.texts] if shape.windows else logits

    def padded_logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits of a packed batch as a padded one."""
        shape, views = batch["shape"], unpack(batch["packed"], batch["shape"])
        inputs = int((views.documents < shape.texts).sum())
        logits = self.module(*padded(views, shape, inputs))
        return pooled(logits, views.documents[:inputs], len(batch["rows"])) if shape.windows else logits

    def checked(self, batch: dict[str, Any]) -> str | None:
        """Compare packed with padded on a first batch; return why packed batches are not trusted, if they are not."""
        if not self._checked and len(batch["rows"]) > 1:  # one text says nothing of others
            self._checked = True
            self.distrust = self._difference(batch)
            if self.distrust is not None and leave_short_attention(self.distrust):
                self.distrust = self._difference(batch)
            if self.distrust is not None:
                print(f"warning: texts are padded, not packed: {self.distrust}", file=sys.stderr, flush=True)
        return self.distrust

    def _difference(self, batch: dict[str, Any]) -> str | None:
        """Say how packed and padded differ on a batch, if they do."""
        model = self.module.model
        trained = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        mode = model.training
        nn.Module.train(model, False)  # without dropout
        try:
            found, dtype = [], torch.float32
            for compute in (lambda: self.all_logits(unpack(batch["packed"], batch["shape"]), batch["shape"]), None):
                logits = self.padded_logits(batch) if compute is None else compute()[: len(batch["rows"])]
                loss = logits.logsumexp(-1).mean() - logits[:, 0].mean()
                gradients = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
                found.append([logits.detach(), *(g for g in gradients if g is not None)])
            dtype = compute_dtype(next(p for p in model.parameters() if p.is_floating_point()))
            difference = max(_apart(found[0][:1], found[1][:1]), _apart(found[0][1:], found[1][1:]))
            alike = difference <= PACKING_TOLERANCE[dtype]
            return None if alike else f"packed and padded batches differ by {difference:.1e}"
        except torch.OutOfMemoryError:  # of two passes where there is one; what is too large will say so by itself
            torch.cuda.empty_cache()
            return None
        except Exception as error:  # of kernels, and of models that take no offsets
            return first_line(error, 160)
        finally:
            nn.Module.train(model, mode)

    def start_evaluation(self) -> None:
        """Forget passes that were captured with weights at other addresses."""
        addresses = [tensor.data_ptr() for tensor in (*self.module.parameters(), *self.module.buffers())]
        if addresses != self._addresses:
            self._captured.clear()
            self._met.clear()
        self._addresses = addresses

    def _captures(self, flat: Tensor) -> bool:
        wanted = self.module.speedups.cuda_graphs is not False and self.plain_evaluation is None
        return flat.is_cuda and wanted and not self.module.training

    def _run_captured(self, flat: Tensor, shape: PackedShape) -> Tensor | None:
        self._met[shape] += 1
        if shape not in self._captured and self._met[shape] < CAPTURE_AT:
            return None
        with torch.inference_mode(False), torch.no_grad():
            try:
                if shape not in self._captured:
                    self._captured[shape] = self._capture(flat.clone(), shape)
            except Exception as error:
                self.plain_evaluation = first_line(error, 160)
                print(f"warning: evaluation is not captured: {self.plain_evaluation}", file=sys.stderr, flush=True)
                return None
            static, logits, run = self._captured[shape]
            static.copy_(flat)
            run()
        return logits

    def _capture(self, static: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor, Callable[[], None]]:
        out = list[Tensor]()
        run = capture(lambda: out.append(self.all_logits(unpack(static, shape), shape)), None, static.device)
        return static, out[0], run


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The relative difference of tensors in their norm."""
    if not wanted:
        return 0.0
    norm = nn.utils.get_total_norm([each.float() for each in wanted])
    apart = nn.utils.get_total_norm([(a - b).float() for a, b in zip(found, wanted, strict=True)])
    return float(apart / norm.clamp(min=1e-6))
