"""The precision to compute in, where the user leaves it open."""

import torch

from lightning_lora.devices import has_bf16

#: Lightning's older names.
_OLD_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def full_name(precision: str | int) -> str:
    """The name of a precision without abbreviation: "16-mixed" for 16."""
    return _OLD_NAMES.get(str(precision), str(precision))


def auto_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the device multiplies bfloat16 matrices natively, else ``32-true``.

    Args:
        accelerator: The trainer's accelerator setting; "auto" means CUDA where there is one.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if has_bf16("cuda") else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        return "bf16-mixed" if has_bf16("cpu") else "32-true"
    return "32-true"
