"""Tokenized pieces of a large train split: arrays in the cache folder, of which what is needed is read."""

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

KEYS = np.dtype("S16")
#: What a shard holds of each row, and how; ``ids`` alone has an item a token.
ARRAYS: dict[str, np.dtype[Any]] = {
    "ids": np.dtype(np.int32),
    "ends": np.dtype(np.int64),  # where in ``ids`` the row ends
    "codes": np.dtype(np.int32),  # which of the shard's label cells
    "numbers": np.dtype(np.int64),  # 1-based, in the file
    "keys": KEYS,  # text_keys
    "digests": np.dtype("S32"),  # text_digest
}
#: Files of more shards are not held open.
MOST_OPEN = 64


@dataclass(frozen=True)
class Shard:
    """A finished piece: rows of one file, in their order.

    Args:
        folder: Where its arrays are.
        origin: The file.
        rows: Their number.
        tokens: Of all rows.
        dropped: Rows without text or label that were left out.
        cells: Each label cell that occurs, with the number of the first row that has it.
        label_names: Class names that the file declares.
    """

    folder: Path
    origin: str
    rows: int
    tokens: int
    dropped: int
    cells: list[tuple[Any, int]]
    label_names: list[str] | None

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """The shard of a folder.

        Raises:
            OSError: It cannot be read.
            ValueError, KeyError, TypeError: It is damaged.
        """
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        shard = cls(folder, **manifest)
        for name, kind in ARRAYS.items():
            if (folder / f"{name}.bin").stat().st_size != shard._items(name) * kind.itemsize:
                raise ValueError(f"{name} does not hold what the manifest says")
        return shard

    def map(self, name: str) -> np.ndarray:
        """An array, mapped: for passes over it that are soon done, as the pages count as memory while it lives."""
        if not self._items(name):
            return np.zeros(0, ARRAYS[name])
        return np.memmap(self.folder / f"{name}.bin", ARRAYS[name], mode="r")

    def _items(self, name: str) -> int:
        return self.tokens if name == "ids" else self.rows


class ShardWriter:
    """Fills the folder of a shard, some rows at a time: nothing that was added is held.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = 0
        self.tokens = 0
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        for name in ARRAYS:
            self._files[name] = self._stack.enter_context((self.folder / f"{name}.bin").open("wb"))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def add(self, ids: Sequence[Sequence[int]], **columns: Any) -> None:
        """Adds rows: their token ids, and what ``ARRAYS`` names but for ``ends``."""
        ends = self.tokens + np.cumsum([len(row) for row in ids], dtype=np.int64)
        flat = np.fromiter((i for row in ids for i in row), ARRAYS["ids"], count=int(ends[-1]) - self.tokens)
        for name, values in {"ids": flat, "ends": ends, **columns}.items():
            self._files[name].write(np.asarray(values, ARRAYS[name]).tobytes())
        self.rows += len(ids)
        self.tokens = int(ends[-1])

    def finish(self, **facts: Any) -> None:
        """Writes the manifest, with the fields of ``Shard`` that were not counted here."""
        manifest = {"rows": self.rows, "tokens": self.tokens, **facts}
        (self.folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


class ShardRows:
    """Some rows of several shards, as if they stood in one.

    Args:
        shards: The shards.
        positions: Which of all their rows, ascending, shape (rows,).
    """

    def __init__(self, shards: Sequence[Shard], positions: np.ndarray) -> None:
        self.shards = shards
        self.positions = positions
        self.starts = np.cumsum([0, *(shard.rows for shard in shards)])

    def __len__(self) -> int:
        return len(self.positions)

    def pieces(self) -> Iterator[tuple[Shard, slice, np.ndarray]]:
        """Each shard that has some of the rows: which of them (a slice), and where they stand in the shard."""
        # Needles of another type would have the whole haystack copied.
        bounds = np.searchsorted(self.positions, self.starts.astype(self.positions.dtype))
        for i, shard in enumerate(self.shards):
            if bounds[i] < bounds[i + 1]:
                mine = slice(int(bounds[i]), int(bounds[i + 1]))
                yield shard, mine, self.positions[mine] - self.starts[i]

    def place(self, index: int) -> tuple[int, int]:
        """Which shard a row is in, and where there."""
        position = int(self.positions[index])
        shard = bisect_right(self.starts, position) - 1
        return shard, position - int(self.starts[shard])


class ShardTokens:
    """The tokens of rows of shards; four bytes a row are held, the ids stay in their files.

    A text is read by its place in the file, not from a map: the system maps up to a megabyte around each text that is
    touched (large folios of its page cache), so that soon the whole cache counts as this process's memory.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: ShardRows) -> None:
        self.rows = rows
        self._lengths = np.empty(len(rows), np.int32)
        self._open: dict[int, tuple[FileIO, FileIO]] = {}
        for shard, mine, local in rows.pieces():
            self._lengths[mine] = np.diff(shard.map("ends"), prepend=0)[local]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text before special tokens and truncation, shape (texts,)."""
        return self._lengths

    def __getitem__(self, index: int) -> np.ndarray:
        shard, row = self.rows.place(index)
        if shard not in self._open:
            if len(self._open) >= MOST_OPEN:
                self._close()
            folder = self.rows.shards[shard].folder
            self._open[shard] = (FileIO(folder / "ids.bin"), FileIO(folder / "ends.bin"))
        ids, ends = self._open[shard]
        end, length = int(_read(ends, "ends", row, 1)[0]), int(self._lengths[index])
        return _read(ids, "ids", end - length, length)

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        for file in (file for both in self._open.values() for file in both):
            file.close()
        self._open.clear()


def _read(file: FileIO, name: str, start: int, count: int) -> np.ndarray:
    kind = ARRAYS[name]
    file.seek(start * kind.itemsize)
    return np.frombuffer(file.read(count * kind.itemsize), kind)
