"""Pairs of texts: rows, splits and tokens, against transformers' own tokenizers."""

from pathlib import Path

import numpy as np
import pytest

from lightning_lora.data.augment import Augmentation
from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.pairs import PAIR_TRUNCATIONS, lengths_kept
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.data.tokens import InputFormat, cached_tokens, tokenize
from lightning_lora.errors import UserError
from lightning_lora.tokenizer import has_token_types, load_tokenizer
from tests.conftest import PAIR_HEADER, make_pairs, save_pair_base, write_csv

COLUMNS = ["premise", "hypothesis"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "pairs.csv", make_pairs(120), PAIR_HEADER)


@pytest.mark.parametrize("truncation", PAIR_TRUNCATIONS)
@pytest.mark.parametrize("framing", ["bert", "roberta", "odd", "none"])
def test_batches_are_what_the_tokenizer_itself_gives(
    tiny_base: Path, tmp_path: Path, framing: str, truncation: str
) -> None:
    from transformers import AutoTokenizer

    base = save_pair_base(tiny_base, tmp_path / "base", framing)
    rng = np.random.default_rng(0)
    words = ["film", "dull", "story", "unknown"]
    texts = [tuple(" ".join(rng.choice(words, n)) for n in rng.integers(1, 24, 2)) for _ in range(150)]
    tokenizer = load_tokenizer(str(base), "model.base_model")
    input_format, plain = InputFormat.of(tokenizer, 21, truncation), AutoTokenizer.from_pretrained(base)  # type: ignore[arg-type]
    tokens = tokenize(texts, tokenizer)
    both = set(input_format.cut_both(tokens).tolist())
    kept = [i for i in range(len(texts)) if i not in both]
    assert bool(both) == (truncation != "longest_first") and len(kept) > 50
    for i in both:
        with pytest.raises(Exception, match="too short"):
            plain(*texts[i], truncation=truncation, max_length=21)
    first, second = zip(*(texts[i] for i in kept), strict=True)
    theirs = plain(
        list(first), list(second), truncation=truncation, max_length=21, padding="longest", return_tensors="np"
    )
    dataset = TokenDataset(tokens, input_format, None, pad_to_max=False)
    ours = dataset.__getitems__(kept)
    assert set(ours) - {"rows", "num_tokens", "step_weight", "micro_batch_weight"} == set(theirs)
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)
    assert dataset.lengths[kept].tolist() == theirs["attention_mask"].sum(1).tolist()
    assert all(dataset.lengths[i] == 21 for i in both)  # of these longest_first
    assert all(len(input_format.inputs(tokens[i])[0]) == 21 for i in both)


def test_lengths_of_a_pair_that_no_strategy_can_cut_alone() -> None:
    assert lengths_kept(9, 3, 8, "only_second") == lengths_kept(9, 3, 8, "longest_first") == (5, 3)
    assert lengths_kept(3, 4, 8, "only_first") == (3, 4)


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("bert", {}, True),
        ("albert", {}, True),
        ("roberta", {"type_vocab_size": 1}, False),
        ("deberta-v2", {}, False),  # of which the published ones have no embedding of types
        ("distilbert", {}, False),
        ("modernbert", {}, False),
    ],
)
def test_token_types_where_the_model_has_them(
    make_base, tmp_path: Path, model_type: str, changes: dict, expected: bool
) -> None:
    base = save_pair_base(make_base(model_type, **changes), tmp_path / "base", "bert")
    tokenizer = load_tokenizer(str(base), "model.base_model")
    assert has_token_types(tokenizer) == expected
    assert bool(InputFormat.of(tokenizer, 16, "longest_first").types) == expected
    assert not InputFormat.of(tokenizer, 16).types  # of single texts as ever: none


def test_two_columns_are_a_pair_and_joined_where_the_truncation_is_of_one_text(pairs: Path) -> None:
    options = SourceOptions(str(pairs), text_column=COLUMNS)
    pair, joined = prepare(options), prepare(SourceOptions(str(pairs), text_column=COLUMNS, truncation="windows"))
    assert set(pair.splits["train"].texts) <= {row[:2] for row in make_pairs(120)}
    assert " ".join(pair.splits["train"].texts[0]) in joined.splits["train"].texts
    assert any("windows is of one text, so premise and hypothesis are joined" in each for each in joined.warnings)
    assert not pair.warnings
    swapped = prepare(SourceOptions(str(pairs), text_column=COLUMNS[::-1]))
    fingerprints = {each.splits["train"].fingerprint for each in (pair, joined, swapped)}
    assert len(fingerprints) == 3


def test_a_pair_repeats_only_as_a_whole(tmp_path: Path) -> None:
    rows = make_pairs(40)
    files = {}
    for split, of_split in (("train", rows[:30]), ("test", rows[30:])):
        files[split] = str(write_csv(tmp_path / f"{split}.csv", of_split, PAIR_HEADER))
    (a, b, label), other = rows[35], rows[3]
    repeats = [(f"{a}!", b.upper(), label), (a, other[1], label), (b, a, label), (f"{a} {b}", other[1], label)]
    write_csv(tmp_path / "train.csv", [*rows[:30], *repeats], PAIR_HEADER)
    prepared = prepare(SourceOptions(files, text_column=COLUMNS))
    assert prepared.duplicates_removed["train_in_test"] == 1  # of which case and punctuation do not count
    left = [*prepared.splits["train"].texts, *prepared.splits["val"].texts]
    assert repeats[0][:2] not in left and set(left) >= {each[:2] for each in repeats[1:]}


@pytest.mark.parametrize(("cells", "column"), [((" ", "a film"), "premise"), (("a film", ""), "hypothesis")])
def test_a_row_with_one_text_is_refused_by_its_place_or_dropped(tmp_path: Path, cells, column: str) -> None:
    path = write_csv(tmp_path / "a.csv", [*make_pairs(40), (*cells, "same")], PAIR_HEADER)
    with pytest.raises(UserError, match=rf"a\.csv, line 42, column '{column}': the text is empty; .*bad_rows=drop"):
        prepare(SourceOptions(str(path), text_column=COLUMNS))
    assert prepare(SourceOptions(str(path), text_column=COLUMNS, bad_rows="drop")).bad_rows_dropped == 1


@pytest.mark.parametrize("columns", ["premise", ["a", "b", "c"]])
def test_a_truncation_of_pairs_needs_two_columns(tiny_base: Path, columns) -> None:
    with pytest.raises(UserError, match=r"only_second is of a pair of texts, and data\.text_column names"):
        TextDataModule("rows.csv", str(tiny_base), text_column=columns, truncation="only_second")


def test_windows_of_a_pair_are_refused_with_an_overlap(tiny_base: Path) -> None:
    with pytest.raises(UserError, match="window_overlap: 3, but only truncation: windows uses it"):
        InputFormat.of(load_tokenizer(str(tiny_base), "model.base_model"), 20, "longest_first", 3)


def test_tokens_of_pairs_come_from_the_cache(pairs: Path, tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_base), "model.base_model")
    pair = prepare(SourceOptions(str(pairs), text_column=COLUMNS), tmp_path / "cache").splits["train"]
    joined = prepare(SourceOptions(str(pairs), text_column=COLUMNS, truncation="head"), tmp_path / "cache")
    for known in (False, True):
        tokens, cached = cached_tokens(pair, tokenizer, tmp_path)
        assert cached == known and len(tokens) == len(pair)
        for i in (0, 17, len(pair) - 1):
            expected = [tokenizer(side, add_special_tokens=False)["input_ids"] for side in pair.texts[i]]
            assert [side.tolist() for side in tokens[i]] == expected
    assert not cached_tokens(joined.splits["train"], tokenizer, tmp_path)[1]


def test_streamed_pairs_are_those_of_memory(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = make_pairs(3000)
    table = pa.table(dict(zip(PAIR_HEADER, zip(*rows, strict=True), strict=True)))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700)
    options = SourceOptions(str(tmp_path / "a.parquet"), text_column=COLUMNS)
    stored, held = prepare(options, tmp_path / "cache"), prepare(options)
    for split, each in held.splits.items():
        assert stored.splits[split].texts == each.texts and stored.splits[split].fingerprint == each.fingerprint
    where = dict(zip(held.splits["test"].texts, held.splits["test"].numbers.tolist(), strict=True))
    assert all(rows[number - 1][:2] == text for text, number in where.items())


def test_a_pair_of_which_one_fills_the_room_is_a_warning(tmp_path: Path, tiny_base: Path) -> None:
    rows = make_pairs(60)
    path = write_csv(tmp_path / "a.csv", [*rows, ("film " * 40, "a dull story", "same")], PAIR_HEADER)
    data = TextDataModule(str(path), str(tiny_base), COLUMNS, max_length=34, truncation="only_second", val_size=5)
    data.setup("fit")
    data.setup("test")
    (warning,) = data.prepared.warnings
    assert "have both texts cut" in warning and "1 pairs of" in warning and "a.csv, 62" in warning


def test_words_of_either_text_are_augmented(pairs: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = save_pair_base(tiny_base, tmp_path / "base", "bert")
    change = Augmentation(delete=0.5)
    data = TextDataModule(str(pairs), str(base), COLUMNS, max_length=64, augmentation=change)
    data.setup("fit")
    dataset = data.dataset("train")
    changed, whole = dataset.ids([3], 0)[0], dataset.tokens[3]
    assert len(changed) == 2 and all(0 < len(a) < len(b) for a, b in zip(changed, whole, strict=True))
    assert dataset.__getitems__([3])["token_type_ids"].sum() == len(changed[1]) + 1
