"""Memory of large intermediate results, used again by the next that is as wide.

A step makes and forgets dozens of them, as long as its batch: the C library's memory soon lies in pieces of which none
is long enough for the largest batch (a tenth more in all than that needs). Here a piece is as long as the longest.
"""

import threading
from typing import Any

import torch
from torch import Tensor

#: Tensors of so many bytes and more are worth it.
LEAST = 2**17


class Buffers(threading.local):
    """Pieces of memory by the width of what lies in them; one is free when no tensor is left that was made of it.

    Each thread has its own.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Leaves all pieces to the C library, before something that needs fewer and longer ones."""
        self._free: dict[int, list[_Piece]] = {}
        self._used: dict[int, list[_Piece]] = {}
        self._rows: dict[int, int] = {}

    def empty(self, rows: int, width: int) -> Tensor:
        """A tensor (rows, width) of bfloat16 with anything in it."""
        if 2 * rows * width < LEAST:
            return torch.empty(rows, width, dtype=torch.bfloat16)
        free = self._free.setdefault(width, [])
        used = self._used.setdefault(width, [])
        longest = self._rows[width] = max(self._rows.get(width, 0), rows)
        if not free:
            held: list[_Piece] = []
            for piece in used:
                (free if piece.is_free() else held).append(piece)
            used[:] = held
        taken = free.pop() if free else None
        if taken is None or taken.rows < rows:
            taken = _Piece(longest, width)
        used.append(taken)
        return torch.empty(0, dtype=torch.bfloat16).set_(taken.storage, 0, (rows, width), (width, 1))


class _Piece:
    def __init__(self, rows: int, width: int) -> None:
        with torch.inference_mode(False):  # of what is made within it nothing can be learnt
            self.storage: Any = torch.empty(rows, width, dtype=torch.bfloat16).untyped_storage()
        self.rows = rows
        self._address = self.storage._cdata
        self._kept = torch._C._storage_Use_Count(self._address)

    def is_free(self) -> bool:
        return torch._C._storage_Use_Count(self._address) == self._kept


#: Of each thread.
BUFFERS = Buffers()
