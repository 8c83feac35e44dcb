"""Texts as flat arrays of token ids, tokenized once and kept.

The whole text is tokenized and stored without special tokens. What a batch needs (special tokens, the cut
at ``max_length``) is added when the batch is made, so one stored copy serves every ``max_length``, and
the share of truncated texts is known exactly.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lightning_lora.errors import UserError
from lightning_lora.files import atomic_folder, locked_folder
from lightning_lora.locations import resolve
from lightning_lora.tokenizer import load_tokenizer

Truncation = Literal["head", "tail", "both", "windows"]
CACHE_FORMAT = 1
_CHUNK = 512


class TokenRows(Protocol):
    """Token ids of many texts, without special tokens, wherever they lie."""

    def __len__(self) -> int: ...

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text before special tokens and truncation, shape (texts,)."""

    def __getitem__(self, index: int) -> np.ndarray:
        """The ids of one text, int32."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of many texts in one array, without special tokens.

    Args:
        ids: All ids one after another, int32, shape (tokens,).
        offsets: Text ``i`` is ``ids[offsets[i]:offsets[i + 1]]``; int64, shape (texts + 1,).
    """

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each text before special tokens and truncation, shape (texts,)."""
        return np.diff(self.offsets)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class InputFormat:
    """How a tokenizer frames one text: ``prefix + ids + suffix``, cut to ``max_length`` tokens.

    Args:
        prefix: Special tokens before a text.
        suffix: Special tokens after it.
        pad_id: The padding token.
        max_length: Tokens that the model sees at most, special tokens included.
        keep: What stays of a text that is longer: its "head", its "tail", or "both" (the first quarter and
            the last three quarters of the room, the shares of Sun et al. 2019, arXiv:1905.05583); or all of
            it, in "windows".
        overlap: Tokens that two windows share.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int
    max_length: int
    keep: Truncation = "head"
    overlap: int = 0

    @classmethod
    def of(
        cls, tokenizer: Any, max_length: int, keep: Truncation = "head", overlap: int | None = None
    ) -> "InputFormat":
        """The frame of a tokenizer, read off what it adds to one text.

        Raises:
            UserError: ``max_length`` leaves no room for a token, or exceeds what the model can take; or there
                is an overlap without windows, or one as large as a window.
        """
        limit = tokenizer.model_max_length
        if max_length > limit:
            raise UserError(f"data.max_length: {max_length}, but the base model takes at most {limit} tokens")
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = tokenizer("a")["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        prefix, suffix = tuple(framed[:start]), tuple(framed[start + len(bare) :])
        room = max_length - len(framed) + len(bare)
        if overlap is not None and keep != "windows":
            raise UserError(f"data.window_overlap: {overlap}, but only truncation: windows uses it")
        overlap = (room // 4 if overlap is None else overlap) if keep == "windows" else 0
        frame = cls(prefix, suffix, tokenizer.pad_token_id, max_length, keep, overlap)
        if room >= 1 and not 0 <= overlap < room:
            raise UserError(f"data.window_overlap: a number from 0 up to the {room} tokens of a window, got {overlap}")
        if frame.room < 1:
            raise UserError(f"data.max_length: {max_length} leaves no room beside {len(framed) - 1} special tokens")
        return frame

    @property
    def room(self) -> int:
        """Tokens of a text that fit."""
        return self.max_length - len(self.prefix) - len(self.suffix)

    def inputs(self, ids: np.ndarray) -> list[np.ndarray]:
        """The ids of one text as the model sees them: cut and framed; or its windows, the last at its end."""
        if self.keep != "windows" or len(ids) <= self.room:
            return [self._cut(ids)]
        starts = [*range(0, len(ids) - self.room, self.room - self.overlap), len(ids) - self.room]
        return [np.concatenate((self.prefix, ids[start : start + self.room], self.suffix)) for start in starts]

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) > self.room:
            head = {"head": self.room, "tail": 0, "both": self.room // 4}[self.keep]
            ids = np.concatenate((ids[:head], ids[len(ids) - (self.room - head) :]))
        return np.concatenate((self.prefix, ids, self.suffix))

    def input_lengths(self, tokens: TokenRows) -> np.ndarray:
        """Tokens of each text as the model sees it, with special tokens, in all its windows; shape (texts,)."""
        special = len(self.prefix) + len(self.suffix)
        if self.keep != "windows":
            return np.minimum(tokens.lengths, self.room) + special
        windows = 1 + np.maximum(np.ceil((tokens.lengths - self.room) / (self.room - self.overlap)), 0).astype(np.int64)
        return np.where(windows == 1, tokens.lengths + special, windows * self.max_length)


def base_tokenizer(base_model: str) -> Any:
    """The tokenizer of ``model.base_model``, as ``load_tokenizer``."""
    return load_tokenizer(resolve(base_model, "model.base_model").target, "model.base_model")


@contextmanager
def tokenizing_progress(split: str, total: int) -> Iterator[Callable[[int], None]]:
    """Gives the function that counts n texts as done; its first call shows a bar with the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, transient=True, console=Console(stderr=True))
    task = progress.add_task(f"Tokenizing {split}", total=total)

    def advance(texts: int) -> None:
        progress.start()
        progress.advance(task, texts)

    try:
        yield advance
    finally:
        progress.stop()


def tokenize(texts: Sequence[str], tokenizer: Any, advance: Callable[[int], None] = lambda n: None) -> Tokens:
    """The tokens of the texts; ``advance(n)`` is called after every n texts."""
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        rows = tokenizer(
            chunk,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        lengths.extend(len(row) for row in rows)
        pieces.extend(np.asarray(row, dtype=np.int32) for row in rows)
        advance(len(chunk))
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return Tokens(np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32), offsets)


def cache_key(texts: Sequence[str], tokenizer: Any) -> str:
    """A key of everything that tokens depend on: the texts, the tokenizer's own rules, library version."""
    digest = hashlib.sha256(tokenizer_rules(tokenizer))
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()[:32]


def tokenizer_rules(tokenizer: Any) -> bytes:
    """All that the tokens of a text depend on but the text."""
    import tokenizers

    return f"{CACHE_FORMAT}/{tokenizers.__version__}/{tokenizer.backend_tokenizer.to_str()}".encode()


def cached_tokens(
    texts: Sequence[str], tokenizer: Any, cache_dir: Path, advance: Callable[[int], None] = lambda n: None
) -> tuple[Tokens, bool]:
    """The tokens of the texts, and whether they came from the cache.

    An entry is there whole or not there at all, also when two runs make it at once. An unreadable one is
    made again.
    """
    entry = cache_dir / "tokens" / cache_key(texts, tokenizer)
    if (known := _known_entry(entry, len(texts))) is not None:
        return known, True
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with locked_folder(entry.parent, None):  # processes of one run begin at once, and need the same
            if (known := _known_entry(entry, len(texts))) is not None:
                return known, True
            tokens = tokenize(texts, tokenizer, advance)
            _write_entry(entry, tokens)
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {entry} ({error.strerror or error}); set another folder"
        ) from error
    return tokens, False


def _known_entry(entry: Path, texts: int) -> Tokens | None:
    """What the cache holds; a damaged entry is removed."""
    if not entry.is_dir():
        return None
    try:
        return _read_entry(entry, texts)
    except (OSError, ValueError, KeyError):
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _read_entry(entry: Path, texts: int) -> Tokens:
    manifest = json.loads((entry / "manifest.json").read_text())
    tokens = Tokens(np.load(entry / "ids.npy", mmap_mode="r"), np.load(entry / "offsets.npy"))
    if len(tokens) != texts or manifest != {"texts": texts, "tokens": len(tokens.ids)}:
        raise ValueError("the entry does not hold what its manifest says")
    return tokens


def _write_entry(entry: Path, tokens: Tokens) -> None:
    with atomic_folder(entry) as staging:
        np.save(staging / "ids.npy", tokens.ids)
        np.save(staging / "offsets.npy", tokens.offsets)
        manifest = {"texts": len(tokens), "tokens": len(tokens.ids)}
        (staging / "manifest.json").write_text(json.dumps(manifest))
