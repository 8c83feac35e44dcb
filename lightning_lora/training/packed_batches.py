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
from lightning_lora.models.base import Base, first_position
from lightning_lora.models.packed import (
    PACKED,
    FirstTokens,
    deterministic_as_before,
    leave_short_attention,
    take_short_attention,
    why_not_packed,
)
from lightning_lora.training.capture import callback_is_ours, capture, ours

#: Largest relative difference, of logits and gradients in their norm, between packed and padded batches: what two
#: orders of summing can differ by.
PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
#: The same between a captured pass and a plain one.
CAPTURED_TOLERANCE = 1e-3
#: Methods that read a batch.
READ_BATCHES = (
    "forward",
    "document_logits",
    "shared_step",
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
)
#: The forward pass of an evaluation batch is captured when its shape comes for this time: a capture takes as long as
#: some three plain passes.
CAPTURE_AT = 4


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
        self.rejected: str | None = None
        #: Why evaluation passes are not captured; None while they are.
        self.plain_evaluation: str | None = None
        #: Why the kernels for short texts are not used; None while they are.
        self.no_short_attention: str | None = None
        #: Whether logits have been checked (False), and logits and gradients (True).
        self._checked: set[tuple[bool, int]] = set()
        self.forget()

    def forget(self) -> None:
        """Forget the captured passes and give back their memory."""
        self._captured: dict[Any, tuple[Tensor, Tensor, Callable[[], None]]] = {}
        self._met: Counter[Any] = Counter()
        self._addresses: list[int] = []
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: not what was captured with the tensors of this one."""
        empty: dict[str, Any] = {"_captured": {}, "_met": Counter(), "_addresses": [], "_pool": None}
        return vars(self) | empty

    @property
    def not_used(self) -> dict[str, str]:
        """What was not used for speed, and why."""
        reasons = {
            "packing not used": self.rejected,
            "evaluation not captured": self.plain_evaluation,
            "kernels for short texts not used": self.no_short_attention,
        }
        return {what: reason for what, reason in reasons.items() if reason is not None}

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
        if own := [name for name in READ_BATCHES if not ours(getattr(kind, name))]:
            reason = f"{own[0]} is overridden, and reads padded batches"
        elif module.hparams["gradient_checkpointing"]:
            reason = "gradient checkpointing reads a batch once more in the backward pass"
        elif module.attention != "auto":
            reason = f"model.attention asks for {module.attention}"
        elif getattr(data, "padding", None) == "max_length":
            reason = "data.padding asks for max_length"
        if asked is True and reason is not None:
            one = "it" if reason == self.cannot else "one of the two"
            raise UserError(f"model.speedups.packing: {reason}; leave {one} out")
        on_gpu = trainer.strategy.root_device.type == "cuda"
        return reason is None and (on_gpu if asked == "auto" else bool(asked))

    def logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits, float32 (B, C), of the texts of a packed batch; padded, where packing is not trusted.

        Args:
            batch: A packed batch on the device of the model.
        """
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
        types = {} if views.token_type_ids is None else {"token_type_ids": views.token_type_ids}
        with self.first_tokens.at(starts, views.offsets[: shape.inputs + 1]):
            logits = module.model(
                input_ids=views.input_ids,
                position_ids=views.position_ids + self.first_position,
                attention_mask=None,
                cu_seq_lens_q=offsets,
                max_length_q=shape.longest,
                **types,
            ).logits.float()
        # Windows that are not there are pooled into one text more.
        if not shape.windows:
            return logits
        return pooled(logits, views.documents, shape.texts + 1, self.module.task)[: shape.texts]

    def padded_logits(self, batch: dict[str, Any]) -> Tensor:
        """Compute the logits of a packed batch as a padded one."""
        shape, views = batch["shape"], unpack(batch["packed"], batch["shape"])
        inputs = int((views.documents < shape.texts).sum())
        logits = self.module(*padded(views, shape, inputs))
        if not shape.windows:
            return logits
        return pooled(logits, views.documents[:inputs], len(batch["rows"]), self.module.task)

    def checked(self, batch: dict[str, Any]) -> str | None:
        """Compare packed with padded on a first batch; return why packed batches are not trusted, if they are not.

        Args:
            batch: A packed batch on the device of the model.
        """
        graded, power = torch.is_grad_enabled(), batch["shape"].longest.bit_length()  # other lengths, other kernels
        new = not self._checked & {(graded, power), (True, power)}
        if self.rejected is None and new and len(batch["rows"]) > 1:  # one says nothing
            self._checked.add((graded, power))
            self.rejected = self._difference(batch)
            if self.rejected is not None and leave_short_attention(self.rejected):
                self.no_short_attention = self.rejected
                self.rejected = self._difference(batch)
                if self.rejected is not None:  # it was not they
                    self.no_short_attention = None
                    take_short_attention()
            for what, reason in self.not_used.items():
                print(f"warning: {what}: {reason}", file=sys.stderr, flush=True)
        return self.rejected

    def _difference(self, batch: dict[str, Any]) -> str | None:
        """Say how packed and padded differ on a batch, if they do."""
        model = self.module.model
        trained = [p for p in model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        modes = {each: each.training for each in model.modules()}
        nn.Module.train(model, False)  # without dropout
        try:
            found = []
            for packed in (False, True):
                if packed:
                    logits = self.all_logits(unpack(batch["packed"], batch["shape"]), batch["shape"])
                else:
                    logits = self.padded_logits(batch)
                logits = logits[: len(batch["rows"])]
                loss = logits.logsumexp(-1).mean() - logits[:, 0].mean() * (logits.shape[1] > 1)
                with deterministic_as_before():
                    gradients = torch.autograd.grad(loss, trained, allow_unused=True) if trained else ()
                found.append([logits.detach(), *(g for g in gradients if g is not None)])
            dtype = compute_dtype(next(p for p in model.parameters() if p.is_floating_point()))
            if self.module.task == "regression":  # numbers may be far from 0, which would hide how they differ
                middle = found[0][0].mean()
                found = [[logits - middle, *gradients] for logits, *gradients in found]
            for part in (slice(1), slice(1, None)):  # logits, then gradients
                difference = _apart(found[1][part], found[0][part])
                if not difference <= PACKING_TOLERANCE[dtype]:  # nor NaN
                    return f"packed and padded batches differ by {difference:.1e}"
            return None
        except torch.OutOfMemoryError:  # of two passes where there is one; what is too large will say so by itself
            torch.cuda.empty_cache()
            return None
        except Exception as error:  # of kernels, and of models that take no offsets
            return first_line(error, 160)
        finally:
            for each, mode in modes.items():
                each.training = mode

    def start_evaluation(self) -> None:
        """Forget passes that were captured with weights at other addresses."""
        addresses = [tensor.data_ptr() for tensor in (*self.module.parameters(), *self.module.buffers())]
        if addresses != self._addresses:
            self.forget()
        self._addresses = addresses

    def _captures(self, flat: Tensor) -> bool:
        asked = self.module.speedups.cuda_graphs
        wanted = asked is not False and self.plain_evaluation is None and flat.is_cuda and not self.module.training
        wanted = wanted and self.module.quantization.bits != 8  # as in ``graphs.why_not_captured``
        # What a callback of one's own does in a forward pass, by hooks, a capture would leave out.
        return wanted and (asked is True or all(map(callback_is_ours, self.module.trainer.callbacks)))

    def _run_captured(self, flat: Tensor, shape: PackedShape) -> Tensor | None:
        key = shape, torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        self._met[key] += 1
        if key not in self._captured and self._met[key] < CAPTURE_AT:
            return None
        with torch.inference_mode(False), torch.no_grad():
            try:
                if key not in self._captured:
                    self._captured[key] = self._capture(flat.clone(), shape)
                    return self._captured[key][1]
            except Exception as error:
                self.forget()
                self.plain_evaluation = first_line(error, 160)
                print(f"warning: evaluation not captured: {self.plain_evaluation}", file=sys.stderr, flush=True)
                return None
            static, logits, run = self._captured[key]
            static.copy_(flat)
            run()
        return logits

    def _capture(self, static: Tensor, shape: PackedShape) -> tuple[Tensor, Tensor, Callable[[], None]]:
        """Capture a pass, after it was computed plainly, run it, and compare the two."""
        plain, out = self.all_logits(unpack(static, shape), shape), list[Tensor]()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        run = capture(lambda: out.append(self.all_logits(unpack(static, shape), shape)), self._pool, static.device)
        run()
        if not (difference := _apart(out, [plain])) <= CAPTURED_TOLERANCE:
            raise RuntimeError(f"a captured pass differs from a plain one by {difference:.1e}")
        return static, out[0], run


def _apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The relative difference of tensors in their norm."""
    if not wanted:
        return 0.0
    norm = nn.utils.get_total_norm([each.float() for each in wanted])
    apart = nn.utils.get_total_norm([(a - b).float() for a, b in zip(found, wanted, strict=True)])
    return float(apart / norm.clamp(min=1e-6))
