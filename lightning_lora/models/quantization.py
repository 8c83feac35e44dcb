"""A base model stored in 8 or 4 bits by bitsandbytes; what is trained on it stays in full precision."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from lightning_lora.devices import has_bf16
from lightning_lora.errors import UserError, first_line


@dataclass
class Quantization:
    """How the linear layers of a frozen encoder are stored; the head never is.

    Args:
        bits: 8 (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339), 4 (QLoRA, Dettmers et al. 2023,
            arXiv:2305.14314), or nothing for full precision.
        quant_type: Of 4 bits: "nf4" or "fp4".
        double_quant: Of 4 bits: quantize the scales too.
        compute_dtype: Of 4 bits: what the weights are turned into to multiply; "auto" is bfloat16 where
            the device has it, else float32.
    """

    bits: Literal[4, 8] | None = None
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    @property
    def label(self) -> str:
        """A short name: "none", "int8", "nf4", "fp4"; with "-single" where scales are not quantized."""
        if self.bits is None:
            return "none"
        return "int8" if self.bits == 8 else self.quant_type + ("" if self.double_quant else "-single")


def check_quantization(options: Quantization, method: str, bits: Sequence[int], cpu_bits: Sequence[int]) -> None:
    """Refuses what would be ignored, and what the method cannot do.

    Args:
        options: What is asked for.
        method: The method's name.
        bits: What it can do on a GPU.
        cpu_bits: What it can do without one.

    Raises:
        UserError: An option is for 4 bits only, or the method cannot train on weights of so many bits (here).
    """
    if options.bits != 4:
        for field in fields(Quantization):
            value = getattr(options, field.name)
            if field.name != "bits" and value != field.default:
                raise UserError(f"model.quantization.{field.name}: {value}, but only bits: 4 uses it")
    if options.bits is None:
        return
    if options.bits not in bits:
        raise UserError(
            f"model.quantization: method '{method}' changes the base model's weights, which cannot be quantized then"
        )
    if options.bits not in cpu_bits and not torch.cuda.is_available():
        raise UserError(
            f"model.quantization.bits: method '{method}' on {options.bits} bits works on a GPU only; here it takes "
            f"{', '.join(map(str, cpu_bits))}"
        )


def quantization_config(options: Quantization, not_quantized: Sequence[str], base_model: str) -> Any:
    """The config that makes transformers quantize while loading, or None for full precision.

    Modules of the names ``not_quantized`` stay as they are: the head, and what may be newly initialised.
    """
    if options.bits is None:
        return None
    _require_backend(options, base_model)
    compute_dtype: str = options.compute_dtype
    if compute_dtype == "auto":
        compute_dtype = "bfloat16" if has_bf16("cuda" if torch.cuda.is_available() else "cpu") else "float32"
    return BitsAndBytesConfig(
        load_in_8bit=options.bits == 8,
        load_in_4bit=options.bits == 4,
        llm_int8_skip_modules=list(not_quantized),
        bnb_4bit_quant_type=options.quant_type,
        bnb_4bit_use_double_quant=options.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def prepare_quantized(model: nn.Module) -> None:
    """Let quantized layers be trained, evaluated, moved and shared in any order.

    In eval mode 4-bit layers are repacked for inference on some CPUs. A repacked layer stays so in training after it,
    and then passes no gradient to the layers below it, or fails (bitsandbytes 0.50.2, ``Linear4bit.forward``).
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(_follow_weight)


def _follow_weight(layer: Any, args: tuple[Any, ...]) -> None:
    """Have an 8-bit layer multiply by its weight where that is: on another device now, or shared between models.

    bitsandbytes keeps the numbers a second time beside the weight, which moving a model leaves behind, and puts them
    back into the weight after each pass (0.50.2, ``Linear8bitLt.forward``).
    """
    weight = layer.weight
    for holder in (weight, layer.state):  # before and after the first pass
        if holder.CB is not None and holder.CB.data_ptr() != weight.data_ptr():
            holder.CB, holder.SCB = weight.data, holder.SCB.to(weight.device)


def _require_backend(options: Quantization, base_model: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes import functional as bnb

        probe = torch.ones(64, 64, device=device)
        if options.bits == 4:
            bnb.quantize_4bit(probe, quant_type=options.quant_type, compress_statistics=options.double_quant)
        else:
            bnb.int8_vectorwise_quant(probe.to(torch.float16))
    except Exception as error:  # a missing library raises kinds of its own
        raise UserError(
            f"model.quantization: bitsandbytes cannot quantize '{base_model}' to {options.bits} bits on this "
            f"machine's {device} ({first_line(error, 120)}); leave model.quantization out"
        ) from error
