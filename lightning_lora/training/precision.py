"""The number format to compute in, where the user leaves it open."""

import torch


def auto_precision(accelerator: str) -> str:
    """``bf16-mixed`` where the device multiplies bfloat16 matrices natively, else ``32-true``.

    Args:
        accelerator: The trainer's accelerator setting; "auto" means CUDA where there is one.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        # Without native instructions bfloat16 is emulated, and slower than float32.
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16-mixed" if native else "32-true"
    return "32-true"
