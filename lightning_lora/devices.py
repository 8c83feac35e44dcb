"""What the machine's devices can do, and the precision to compute in where the user leaves it open."""

import ctypes
import sys

import torch

#: Lightning's older names of precisions.
_OLD_NAMES = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


def has_bf16(device: str) -> bool:
    """Whether "cuda" or "cpu" multiplies bfloat16 matrices natively; elsewhere they are emulated, and slow."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


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
