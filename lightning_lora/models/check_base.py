"""Ask a base model, before training, whether it reads texts as they will be given to it.

No config says it in one way: positions have offsets, tables, factors or no limit, the last token is looked for by its
number, some layers mix padding into the text. A few short passes tell.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.errors import UserError, first_line
from lightning_lora.seeding import torch_stream

#: Tokens of the short text, and what it is padded to beside a longer one.
_SHORT, _LONG = 5, 16
#: Largest change of a logit by padding, as a share of what texts differ by; rounding is a hundred times smaller.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class BaseCheck:
    """The passes that are made through a model; they leave no gradient, and put random generators and buffers back.

    Args:
        module: Gives logits (B, C) of token ids and mask, each (B, T).
        kind: The name of its architecture.
        input_format: What is around a text: ``prefix``, ``suffix``, ``pad_id``, ``max_length``.
        words: Token ids to make up texts of.
        pad_to_max: Whether every text is padded to ``max_length``.
        positions: How many positions its config names; relative ones have no end, but were not trained beyond it.
    """

    module: nn.Module
    kind: str
    input_format: Any
    words: Sequence[int]
    pad_to_max: bool
    positions: int | None = None

    def check(self, padding: bool) -> None:
        """Refuse a model that cannot take the texts, cannot be trained on them, or reads the padding beside them.

        Args:
            padding: Whether to look for what it reads; layers in 8 or 4 bits round by the whole batch.

        Raises:
            UserError: The forward or backward pass fails, or padding changes the logits; what works is named.
        """
        longest = self.input_format.max_length
        with self._unchanged():
            self._check_length()
            if failure := _failure(self._step):
                lengths, instead = "texts of different lengths", "set data.padding: max_length, which pads all alike"
                if self.pad_to_max:
                    lengths, instead = f"texts of {longest} tokens", "take another base model"
                what = f"architecture '{self.kind}' cannot be trained on {lengths} ({failure})"
                raise UserError(f"model.base_model: {what}; {instead}")
            if not padding or self.pad_to_max:
                return
            self.module.eval()
            with torch.no_grad():
                alone, together = self._logits([self._short], self._short), self._logits([self._short, self._width])
        change, spread = float((alone[0] - together[0]).abs().max()), float((together[0] - together[1]).abs().max())
        spread = max(spread, 0.1 * float(together.abs().max()))  # a model may not tell made-up texts apart
        if not math.isfinite(change + spread):
            raise UserError(f"model.base_model: a text gets the logits {together[0].tolist()}; the weights are damaged")
        if change > _TOLERANCE * spread:
            raise UserError(
                f"model.base_model: architecture '{self.kind}' reads the padding behind a text (it moves a logit by "
                f"{change:.1g}, where texts differ by {spread:.1g}), so that a prediction would depend on the batch; "
                "set data.padding: max_length, which pads all alike, or take another base model"
            )

    def check_precision(self, precision: str, dtype: torch.dtype) -> None:
        """Refuse a model that cannot be trained or evaluated in a precision of the trainer, after ``check``.

        Raises:
            UserError: The pass fails in this dtype, or its result is not finite.
        """
        with self._unchanged(), torch.autocast(self._device.type, dtype):
            failure = _failure(self._step) or self._failure(self._short)
        if failure:
            raise UserError(
                f"trainer.precision: architecture '{self.kind}' cannot compute in {precision} ({failure}); "
                "set trainer.precision: 32-true"
            )

    @property
    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def _special(self) -> int:
        return len(self.input_format.prefix) + len(self.input_format.suffix)

    @property
    def _short(self) -> int:
        return min(max(_SHORT, self._special + 1), self.input_format.max_length)

    @property
    def _width(self) -> int:
        limit: int = self.input_format.max_length
        return limit if self.pad_to_max else min(max(_LONG, 2 * self._short), limit)

    def _logits(self, lengths: Sequence[int], width: int | None = None) -> Tensor:
        """Logits of made-up texts of so many tokens, padded on the right."""
        width = width or self._width
        ids = torch.full((len(lengths), width), self.input_format.pad_id)
        for row, length in enumerate(lengths):
            body = [self.words[(i + 7 * row) % len(self.words)] for i in range(length - self._special)]
            ids[row, :length] = torch.tensor([*self.input_format.prefix, *body, *self.input_format.suffix])
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        logits: Tensor = self.module(ids.to(self._device), mask.to(self._device))
        return logits

    def _step(self) -> None:
        """Go forward and backward with a short text beside a longer one."""
        self.module.train()
        logits = self._logits([self._short, self._width])
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        if trained:
            loss = F.cross_entropy(logits, torch.zeros(2, dtype=torch.long, device=self._device))
            torch.autograd.grad(loss, trained, allow_unused=True)

    def _failure(self, length: int) -> str | None:
        """What goes wrong with one text of so many tokens in evaluation, where it takes the least memory."""
        self.module.eval()
        with torch.no_grad():
            return _failure(lambda: self._logits([length], length))

    def _check_length(self) -> None:
        length = self.input_format.max_length
        longest = min(length, self.positions or length)
        failure = self._failure(longest)
        if failure is not None:
            low, high = self._short, longest
            if self._failure(low) is not None:
                raise UserError(
                    f"model.base_model: architecture '{self.kind}' cannot read a text of {low} tokens alone "
                    f"({failure}); take another base model"
                )
            while high - low > 1:  # low goes through, high does not
                middle = (low + high) // 2
                low, high = (middle, high) if self._failure(middle) is None else (low, middle)
            longest = low
        if longest < length:
            raise UserError(
                f"data.max_length: {length}, but the base model takes at most {longest} tokens; set data.max_length: "
                f"{longest} or less"
            )

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        training, buffers = self.module.training, dict(self.module.named_buffers())
        kept = {name: buffer.clone() for name, buffer in buffers.items()}
        hooks = []
        if self._device.type != "cpu":  # where a number out of range ends the process's use of the device
            embeddings = [each for each in self.module.modules() if isinstance(each, nn.Embedding)]
            hooks = [each.register_forward_pre_hook(_in_range) for each in embeddings]
        try:
            with torch_stream(0, "check"):
                yield
        finally:
            for hook in hooks:
                hook.remove()
            for name, buffer in buffers.items():
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, buffer.copy_(kept[name]))  # some are made anew
            self.module.train(training)


def _in_range(embedding: nn.Embedding, args: tuple[Tensor, ...]) -> None:
    if args and int(args[0].max()) >= embedding.num_embeddings:
        raise IndexError(f"index {int(args[0].max())} of an embedding of {embedding.num_embeddings} rows")


def _failure(call: Callable[[], object]) -> str | None:
    """The first line of what a call raises; lack of memory is no fault of the model's."""
    try:
        call()
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except Exception as error:  # each architecture fails in its own way
        first = first_line(error, 120)
        return None if "memory" in first else f"{type(error).__name__}: {first}"
    return None
