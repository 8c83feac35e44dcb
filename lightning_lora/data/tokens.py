"""Texts as token ids, tokenized once and kept.

The whole text is tokenized and stored without special tokens. These and the truncation to ``max_length`` follow when
a batch is made, so one stored copy serves every ``max_length``, and the share of truncated texts is known exactly.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_lora.data.pairs import Text, Truncation, is_pair, lengths_kept
from lightning_lora.data.rows import Rows
from lightning_lora.data.stored import cached
from lightning_lora.errors import UserError, check_range
from lightning_lora.locations import resolve
from lightning_lora.tokenizer import has_token_types, load_tokenizer, longest_input

#: Tokens of an input where the base model takes so many: what most encoders were trained with.
DEFAULT_LENGTH = 512
CACHE_FORMAT = 3
_CHUNK = 1024
_LISTS = pa.list_(pa.int32())


class TokenRows:
    """Token ids of many texts, or pairs of texts, without special tokens.

    Args:
        columns: An Arrow column of lists of int32, in memory or mapped from a file, of which what is asked for is read;
            of pairs two, in the same chunks.
    """

    def __init__(self, *columns: pa.ChunkedArray) -> None:
        #: Tokens of each text, of pairs of the first and of the second ones, int32, each of shape (rows,).
        self.side_lengths: list[np.ndarray] = [pc.list_value_length(column).to_numpy() for column in columns]
        #: Tokens of each text or pair before special tokens and truncation, shape (rows,).
        self.lengths = reduce(np.add, self.side_lengths)
        # Views: three times as fast as a scalar of Arrow for each text.
        self._chunks = [[(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in c.chunks] for c in columns]
        self._starts = [0, *accumulate(map(len, columns[0].chunks))]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Any:
        """The ids of one text, int32, or of both texts of a pair."""
        number = bisect_right(self._starts, index) - 1
        row = index - self._starts[number]
        sides = []
        for chunks in self._chunks:
            offsets, ids = chunks[number]
            sides.append(ids[offsets[row] : offsets[row + 1]])
        return tuple(sides) if len(sides) == 2 else sides[0]


@dataclass(frozen=True)
class InputFormat:
    """The special tokens around a text, ``prefix + ids + suffix``, and its truncation to ``max_length`` tokens.

    Those of a pair are ``prefix + first + middle + second + suffix``.

    Args:
        prefix: Special tokens before a text.
        suffix: Special tokens after it.
        pad_id: The padding token.
        max_length: Tokens that the model sees at most, special tokens included.
        keep: What stays of a text that is longer: its "head", its "tail", or "both" (the first quarter and
            the last three quarters of the room, the shares of Sun et al. 2019, arXiv:1905.05583); or all of
            it, in "windows". Of a pair that is longer one of ``PAIR_TRUNCATIONS``.
        overlap: Tokens that two windows share.
        middle: Special tokens between the texts of a pair.
        types: Where a model reads the token types of a pair, those of each special token and of either text, in their
            order.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    pad_id: int
    max_length: int
    keep: Truncation = "head"
    overlap: int = 0
    middle: tuple[int, ...] = ()
    types: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, tokenizer: Any, max_length: int | None, keep: Truncation = "head", overlap: int | None = None
    ) -> "InputFormat":
        """The format of a tokenizer's inputs, read off what it adds to one text, or to a pair.

        Without a ``max_length`` it is ``DEFAULT_LENGTH``, or as many tokens as the base model takes.

        Raises:
            UserError: ``max_length`` leaves no room for a token, or exceeds what the model can take; or there
                is an overlap without windows, or one as large as a window.
        """
        if max_length is None:
            max_length = int(min(DEFAULT_LENGTH, longest_input(tokenizer)))
        if max_length > (limit := tokenizer.model_max_length):
            raise UserError(f"data.max_length: {max_length}, but the base model takes at most {limit} tokens")
        texts = ["a"] * (1 + is_pair(keep))
        encoding = tokenizer.backend_tokenizer.encode(*texts)
        ids, kinds, of_text = encoding.ids, encoding.type_ids, encoding.sequence_ids  # None of a special token
        starts = [of_text.index(i) for i, _ in enumerate(texts)]
        ends = [start + of_text.count(i) for i, start in enumerate(starts)]
        special = [ids[: starts[0]], ids[ends[0] : starts[-1]], ids[ends[-1] :]]
        types: list[int] = []
        if len(texts) == 2 and has_token_types(tokenizer):
            types = [*kinds[: starts[0] + 1], *kinds[ends[0] : starts[1] + 1], *kinds[ends[1] :]]
        room = max_length - sum(map(len, special))
        if room < len(texts):
            raise UserError(f"data.max_length: {max_length} leaves no room beside {max_length - room} special tokens")
        if overlap is None:
            overlap = room // 4 if keep == "windows" else 0
        elif keep != "windows":
            raise UserError(f"data.window_overlap: {overlap}, but only truncation: windows uses it")
        check_range("data.window_overlap", overlap, 0, room)
        prefix, middle, suffix = map(tuple, special)
        return cls(prefix, suffix, tokenizer.pad_token_id, max_length, keep, overlap, middle, tuple(types))

    @property
    def special(self) -> int:
        """Special tokens of a text or pair."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    @property
    def text_tokens(self) -> int:
        """Tokens of a text, or of both texts of a pair, that fit."""
        return self.max_length - self.special

    def inputs(self, ids: Any) -> list[np.ndarray]:
        """The ids of one text as the model sees them: truncated, with special tokens; or its windows; or of a pair."""
        if isinstance(ids, tuple):
            first, second = self._kept(ids)
            return [np.concatenate((self.prefix, ids[0][:first], self.middle, ids[1][:second], self.suffix))]
        if self.keep != "windows" or len(ids) <= self.text_tokens:
            return [self._cut(ids)]
        starts = [
            *range(0, len(ids) - self.text_tokens, self.text_tokens - self.overlap),
            len(ids) - self.text_tokens,
        ]  # the last ends it
        return [np.concatenate((self.prefix, ids[start : start + self.text_tokens], self.suffix)) for start in starts]

    def token_types(self, ids: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        """The token types of a pair's ``inputs``."""
        first, second = self._kept(ids)
        before, between, after = ([1] * len(each) for each in (self.prefix, self.middle, self.suffix))
        return np.repeat(self.types, [*before, first, *between, second, *after])

    def _kept(self, ids: tuple[np.ndarray, np.ndarray]) -> tuple[int, int]:
        return lengths_kept(len(ids[0]), len(ids[1]), self.text_tokens, self.keep)

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        if len(ids) > self.text_tokens:
            head = {"head": self.text_tokens, "tail": 0, "both": self.text_tokens // 4}[self.keep]
            ids = np.concatenate((ids[:head], ids[len(ids) - (self.text_tokens - head) :]))
        framed = np.concatenate((self.prefix, ids, self.suffix))
        return framed if len(framed) else np.array([self.pad_id])  # no token of the text, and none around it

    def cut_share(self, tokens: TokenRows) -> float:
        """The share of the texts of which something is cut."""
        return float((tokens.lengths > self.text_tokens).mean()) if self.keep != "windows" else 0.0

    def cut_both(self, tokens: TokenRows) -> np.ndarray:
        """Positions of the pairs whose text that is to stay whole leaves the other no token, so that both are cut."""
        whole = {"only_first": 1, "only_second": 0}.get(self.keep)
        return np.flatnonzero([] if whole is None else tokens.side_lengths[whole] >= self.text_tokens)

    def input_lengths(self, tokens: TokenRows) -> np.ndarray:
        """Tokens of each text as the model sees it, with special tokens, in all its windows; shape (texts,)."""
        if self.keep != "windows":
            return np.maximum(np.minimum(tokens.lengths, self.text_tokens) + self.special, 1)
        windows = 1 + np.maximum(
            np.ceil((tokens.lengths - self.text_tokens) / (self.text_tokens - self.overlap)), 0
        ).astype(np.int64)
        return np.where(windows == 1, np.maximum(tokens.lengths + self.special, 1), windows * self.max_length)


def base_tokenizer(base_model: str) -> Any:
    """The tokenizer of ``model.base_model``, as ``load_tokenizer``."""
    return load_tokenizer(resolve(base_model, "model.base_model").target, "model.base_model")


def tokenize(texts: Sequence[Text], tokenizer: Any) -> TokenRows:
    """The tokens of the texts or pairs of texts."""
    sides: Any = [texts] if not texts or isinstance(texts[0], str) else list(zip(*texts, strict=True))
    starts = range(0, len(texts), _CHUNK)
    chunks = [[_token_lists(side[start : start + _CHUNK], tokenizer) for start in starts] for side in sides]
    return TokenRows(*(pa.chunked_array(each, _LISTS) for each in chunks))


def _token_lists(texts: Sequence[str], tokenizer: Any) -> pa.ListArray:
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return pa.array([encoding.ids for encoding in encodings], _LISTS)


def cached_tokens(
    rows: Rows, tokenizer: Any, cache_dir: Path, advance: Callable[[int], Any] = lambda n: None
) -> tuple[TokenRows, bool]:
    """The tokens of the rows' texts, and whether they came from the cache; ``advance(n)`` is called after n rows."""
    import tokenizers

    content = f"{CACHE_FORMAT}/{tokenizers.__version__}/{tokenizer.backend_tokenizer.to_str()}{rows.fingerprint}"
    columns = rows.text_fields

    def write(path: Path) -> None:
        with pa.ipc.new_file(str(path), pa.schema(dict.fromkeys(columns, _LISTS))) as writer:
            for _, batch in rows.batches(*columns):
                lists = {name: _token_lists(batch[name].to_pylist(), tokenizer) for name in columns}
                writer.write(pa.record_batch(lists))
                advance(len(batch))

    def read(path: Path) -> TokenRows:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        return TokenRows(*(table[name] for name in columns))

    return cached(cache_dir / "tokens", content, write, read)
