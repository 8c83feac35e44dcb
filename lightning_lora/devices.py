"""What the machine's devices can do."""

import torch


def has_bf16(device: str) -> bool:
    """Whether "cuda" or "cpu" multiplies bfloat16 matrices natively; elsewhere they are emulated, and slow."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
