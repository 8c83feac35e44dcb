"""Kernels for CPUs with AMX, as a plugin of lightning_lora: see ``lightning_lora.models.kernel_plugins``."""

import torch
from torch import nn

from lightning_lora.errors import UserError
from lightning_lora.models.attention import EXACT
from lightning_lora.models.base import Base
from lightning_lora_amx import kernels
from lightning_lora_amx.attention import COMPILED
from lightning_lora_amx.buffers import BUFFERS
from lightning_lora_amx.encoder_layer import FusedEncoderLayer, fuse_layers
from lightning_lora_amx.fused_linear import ONE_PASS, fuse_bias, fuse_lora
from lightning_lora_amx.int8 import begin_int8, check_int8, end_int8


class AmxKernels:
    """A ``KernelPlugin``: LoRA, linear and encoder layers in few passes, and attention, norms and int8 in C."""

    engines = ("int8",)

    def install(self, base: Base) -> list[str]:
        """Replace layers, except where there is a GPU; as ``KernelPlugin.install``."""
        if torch.cuda.is_available():
            return []
        done = [f"{count} LoRA layers fused"] if (count := fuse_lora(base.model)) else []
        if ONE_PASS:
            fuse_bias(base.model)  # which shows in bfloat16 only
        if count := fuse_layers(base):
            layers = [module for module in base.model.modules() if isinstance(module, FusedEncoderLayer)]
            fitting = sum(layer.parts.sizes_fit for layer in layers) if kernels.LIBRARY else 0
            why = "" if kernels.LIBRARY else f" ({kernels.MISSING})"
            done.append(f"{count} encoder layers fused, {fitting} of them by AMX kernels{why}")
        return done

    def attention(self, chosen: str) -> str:
        """The compiled attention in place of the exact one, where it was compiled."""
        return COMPILED if chosen == EXACT and kernels.LIBRARY else chosen

    def check_engine(self, engine: str, model: nn.Module, attention: str | None) -> int:
        """As ``KernelPlugin.check_engine``.

        Raises:
            UserError: No layer of the model can be evaluated in int8, or this machine cannot.
        """
        if engine not in self.engines:
            raise UserError(f"engine '{engine}': not one of {', '.join(self.engines)}")
        return check_int8(model, attention)

    def begin_evaluation(self, model: nn.Module, engine: str | None) -> None:
        """Quantize layers where the engine is int8."""
        BUFFERS.forget()
        if engine == "int8":
            begin_int8(model)

    def end_evaluation(self, model: nn.Module) -> None:
        """Compute in bfloat16 again."""
        BUFFERS.forget()
        end_int8(model)


plugin = AmxKernels()
