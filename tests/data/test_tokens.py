import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.reading import Table
from lightning_lora.data.rows import Rows
from lightning_lora.data.sources import RowSource
from lightning_lora.data.stored import RowRules, stored_rows
from lightning_lora.data.tokens import InputFormat, TokenRows, cached_tokens, load_tokenizer, tokenize
from lightning_lora.errors import UserError
from tests.conftest import save_tokenizer, tiny_config

TEXTS = ["the film was fine", "dull", "a long story of two people " * 20, "unknown wörds!"]


@pytest.fixture
def tokenizer(tiny_base: Path):
    return load_tokenizer(str(tiny_base), "model.base_model")


@pytest.mark.parametrize("max_length", [4, 8, 64])
def test_batches_are_what_the_tokenizer_itself_gives(tiny_base: Path, tokenizer, max_length: int) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_base)(
        TEXTS, truncation=True, max_length=max_length, padding="longest", return_tensors="np"
    )
    input_format = InputFormat.of(tokenizer, max_length)
    ours = TokenDataset(tokenize(TEXTS, tokenizer), input_format, None, pad_to_max=False).__getitems__([0, 1, 2, 3])
    np.testing.assert_array_equal(ours["input_ids"], theirs["input_ids"])
    np.testing.assert_array_equal(ours["attention_mask"], theirs["attention_mask"])
    assert ours["num_tokens"] == theirs["attention_mask"].sum()


@pytest.mark.parametrize("framing", ["roberta", "one-sided"])
def test_other_framings_of_a_text(tmp_path: Path, tokenizer, framing: str) -> None:
    from tokenizers import processors

    single = {"roberta": "[CLS] [MASK] $A [SEP] [SEP]", "one-sided": "$A [SEP]"}[framing]
    special = [("[CLS]", 2), ("[SEP]", 3), ("[MASK]", 4)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    theirs = tokenizer(TEXTS, truncation=True, max_length=9)["input_ids"]
    tokenizer.backend_tokenizer.no_truncation()
    dataset = TokenDataset(tokenize(TEXTS, tokenizer), InputFormat.of(tokenizer, 9), None, pad_to_max=False)
    for i, expected in enumerate(theirs):
        batch = dataset.__getitems__([i])
        assert batch["input_ids"][0][batch["attention_mask"][0] == 1].tolist() == expected


@pytest.mark.parametrize(
    ("keep", "expected"),
    [("head", [10, 11, 12, 13, 14]), ("tail", [15, 16, 17, 18, 19]), ("both", [10, 16, 17, 18, 19])],
)
def test_what_stays_of_a_long_text(keep: str, expected: list[int]) -> None:
    input_format = InputFormat(prefix=(2,), suffix=(3,), pad_id=0, max_length=7, keep=keep)
    assert [ids.tolist() for ids in input_format.inputs(np.arange(10, 20))] == [[2, *expected, 3]]
    assert [ids.tolist() for ids in input_format.inputs(np.arange(10, 15))] == [[2, 10, 11, 12, 13, 14, 3]]  # fits


@pytest.mark.parametrize("overlap", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 5, 6, 7, 10, 23])
def test_windows_cover_a_text_with_full_windows_that_share_the_overlap(overlap: int, length: int) -> None:
    input_format = InputFormat(prefix=(2,), suffix=(3,), pad_id=0, max_length=7, keep="windows", overlap=overlap)
    ids = np.arange(10, 10 + length)
    windows = [window.tolist() for window in input_format.inputs(ids)]
    assert all(window[0] == 2 and window[-1] == 3 for window in windows)
    bare = [window[1:-1] for window in windows]
    assert set().union(*bare) == set(ids.tolist())
    assert bare == [ids.tolist()] if length <= 5 else all(len(window) == 5 for window in bare)
    for left, right in itertools.pairwise(bare[:-1]):  # the last one is moved back to the end of the text
        assert len(set(left) & set(right)) == overlap
    tokens = TokenRows(pa.chunked_array([[ids.tolist()]], pa.list_(pa.int32())))
    assert input_format.input_lengths(tokens)[0] == sum(map(len, windows))


def test_a_batch_of_windows_says_which_document_each_belongs_to(tokenizer) -> None:
    texts = [" ".join(["film"] * n) for n in (3, 12, 5)]
    input_format = InputFormat.of(tokenizer, 7, "windows", 1)
    batch = TokenDataset(tokenize(texts, tokenizer), input_format, None, pad_to_max=False).__getitems__([2, 0, 1])
    assert batch["documents"].tolist() == [0, 1, 2, 2, 2]
    assert batch["rows"].tolist() == [2, 0, 1] and batch["input_ids"].shape == (5, 7)
    assert batch["num_tokens"] == int(batch["attention_mask"].sum())


@pytest.mark.parametrize(
    ("keep", "overlap", "said"), [("head", 3, "only truncation: windows"), ("windows", 5, "up to")]
)
def test_an_overlap_that_makes_no_sense_is_refused(tokenizer, keep: str, overlap: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        InputFormat.of(tokenizer, 7, keep, overlap)


def test_padding_to_max_length_on_request(tokenizer) -> None:
    dataset = TokenDataset(tokenize(TEXTS, tokenizer), InputFormat.of(tokenizer, 32), None, pad_to_max=True)
    assert dataset.__getitems__([1])["input_ids"].shape == (1, 32)


@pytest.mark.parametrize(("max_length", "said"), [(65, "takes at most 64"), (2, "leaves no room")])
def test_impossible_max_lengths_are_refused(tokenizer, max_length: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        InputFormat.of(tokenizer, max_length)


def rows_of(texts: list[str], number: int = 0) -> Rows:
    table = Table("made up", {"text": texts, "label": ["a"] * len(texts)}, range(1, len(texts) + 1))
    file = stored_rows(
        RowSource("made up", None, lambda columns: iter([table])), RowRules(["text"], "label", "error"), None
    )
    return Rows([file], np.arange(len(texts)), np.full(len(texts), number))


@pytest.mark.parametrize(("of_tokenizer", "positions", "expected"), [(64, 80, 64), (10**30, 80, 80), (1024, 514, 512)])
def test_without_max_length_it_is_what_the_base_takes(
    tmp_path: Path, of_tokenizer: int, positions: int, expected: int
) -> None:
    tiny_config("bert", max_position_embeddings=positions).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, of_tokenizer)
    assert InputFormat.of(load_tokenizer(str(tmp_path), "model.base_model"), None).max_length == expected


def test_a_second_call_takes_the_tokens_from_the_cache(tmp_path: Path, tokenizer) -> None:
    counted: list[int] = []
    rows = rows_of(TEXTS * 700)  # several batches of the file
    expected = tokenizer(rows.texts, add_special_tokens=False)["input_ids"]
    for cached in (False, True):
        tokens, known = cached_tokens(rows, tokenizer, tmp_path, counted.append)
        assert (known, sum(counted)) == (cached, len(rows))
        assert [tokens[i].tolist() for i in range(len(tokens))] == expected
        assert tokens.lengths.tolist() == [len(ids) for ids in expected]
    some = rows.select(np.arange(5, 2800, 7))
    tokens, _ = cached_tokens(some, tokenizer, tmp_path)
    assert [tokens[i].tolist() for i in range(len(some))] == expected[5::7]


def test_the_cache_misses_when_texts_or_tokenizer_change(tmp_path: Path, tokenizer) -> None:
    cached_tokens(rows_of(["ab", "c"]), tokenizer, tmp_path)
    assert not cached_tokens(rows_of(["a", "bc"]), tokenizer, tmp_path)[1]
    tokenizer.backend_tokenizer.normalizer = None
    assert not cached_tokens(rows_of(["ab", "c"]), tokenizer, tmp_path)[1]


@pytest.mark.parametrize("damage", [lambda data: data[:-8], lambda data: b"", lambda data: data[: len(data) // 2]])
def test_damaged_tokens_are_made_again(tmp_path: Path, tokenizer, damage) -> None:
    rows = rows_of(TEXTS)
    cached_tokens(rows, tokenizer, tmp_path)
    path = next((tmp_path / "tokens").glob("*.arrow"))
    path.write_bytes(damage(path.read_bytes()))
    again, cached = cached_tokens(rows, tokenizer, tmp_path)
    assert not cached
    assert [again[i].tolist() for i in range(4)] == tokenizer(TEXTS, add_special_tokens=False)["input_ids"]
    assert cached_tokens(rows, tokenizer, tmp_path)[1]


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.base_model: cannot load a tokenizer") as raised:
        load_tokenizer(str(tmp_path), "model.base_model")
    assert "\n" not in str(raised.value)
