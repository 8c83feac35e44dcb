"""What the machine's devices can do."""

import ctypes
import sys

import torch


def has_bf16(device: str) -> bool:
    """Whether "cuda" or "cpu" multiplies bfloat16 matrices natively; elsewhere they are emulated, and slow."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with the tensor is computed: autocast's, or its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def keep_freed_memory() -> bool:
    """Let the C library keep the memory that a step frees for the next step; return whether it can.

    By default glibc gives blocks back to the system and takes them anew, a page fault for every 4 KiB of activations.
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(m_mmap_threshold, 2**30) and mallopt(m_trim_threshold, 2**31 - 1))
