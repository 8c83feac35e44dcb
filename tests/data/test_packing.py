"""Packed batches hold the texts of padded ones, in few shapes."""

import itertools

import numpy as np
import pyarrow as pa
import pytest

from lightning_lora.data.batching import LengthBatchSampler, TokenDataset
from lightning_lora.data.datamodule import evaluation_sampler, make_loader
from lightning_lora.data.order import evaluation_batches
from lightning_lora.data.packing import MOST_SIZES, SIZE_STEP, choose_sizes, padded, unpack
from lightning_lora.data.tokens import InputFormat, TokenRows

DRAW = np.random.default_rng(0)


def dataset(rows: int = 200, keep: str = "head", max_length: int = 24, top: int = 60) -> TokenDataset:
    lengths = DRAW.integers(1, top, rows)
    ids = DRAW.integers(5, 100, lengths.sum()).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32)))
    tokens = TokenRows(pa.chunked_array([pa.ListArray.from_arrays(offsets, ids)]))
    input_format = InputFormat((2,), (3,), 1, max_length, keep, 5 if keep == "windows" else 0)  # type: ignore[arg-type]
    return TokenDataset(tokens, input_format, DRAW.integers(0, 3, rows), pad_to_max=False)


@pytest.mark.parametrize("keep", ["head", "windows"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_packed_batch_is_the_padded_one(keep: str, accumulate: int) -> None:
    data = dataset(keep=keep)
    sampler = LengthBatchSampler(data.lengths, 8, 0, accumulate)
    plain = [data.__getitems__(rows) for rows in sampler]
    data.pack_like(sampler.sample(), 0.0)
    assert data.packing is not None and 1 < len(data.packing) <= MOST_SIZES
    for expected, rows in zip(plain, sampler, strict=True):
        batch = data.__getitems__(rows)
        shape, views = batch["shape"], unpack(batch["packed"], batch["shape"])
        assert batch["static"] and batch["packed"].numel() == sum(shape.parts)
        inputs, count = len(expected["input_ids"]), len(rows)
        width = expected["input_ids"].shape[1]
        ids, mask = padded(views, shape, inputs)
        assert (ids[:, :width] == expected["input_ids"]).all() and (mask[:, :width] == expected["attention_mask"]).all()
        assert not mask[:, width:].any()
        assert (views.labels[:count] == expected["labels"]).all() and (views.count, views.scale) == (
            count,
            rows.step_weight,
        )
        owners = expected["documents"] if keep == "windows" else np.arange(inputs)
        assert (views.documents.numpy() == [*owners, *[shape.texts] * (shape.inputs - inputs)]).all()
        # What is left of the row belongs to no text, and no piece of it is longer than a text.
        lengths = views.offsets.diff()
        assert views.offsets[0] == 0 and views.offsets[-1] == shape.tokens and (lengths >= 0).all()
        assert lengths.max() <= shape.longest and lengths[inputs : shape.inputs].sum() == 0
        positions = np.concatenate([np.arange(n) for n in lengths[:inputs]])
        assert (views.position_ids[0, : len(positions)].numpy() == positions).all()
        assert {name: batch[name] for name in ("num_tokens", "step_weight", "micro_batch_weight")} == {
            name: expected[name] for name in ("num_tokens", "step_weight", "micro_batch_weight")
        }


def test_a_batch_larger_than_those_known_has_a_shape_of_its_own() -> None:
    data = dataset()
    order = np.argsort(data.lengths)
    data.pack_like([order[:4]])
    batch = data.__getitems__(order[-12:].tolist())
    assert not batch["static"] and batch["shape"].texts == 12
    assert (unpack(batch["packed"], batch["shape"]).labels.numpy() == data.labels[order[-12:]]).all()  # type: ignore[index]


@pytest.mark.parametrize("keep", ["head", "windows"])
def test_evaluation_batches_of_other_texts_have_the_same_shapes(keep: str) -> None:
    """A captured pass serves other texts; those of short ones are for kernels that take half as long."""
    packings = []
    for rows in (400, 300):
        data = dataset(rows, keep, max_length=100, top=180)
        sampler = evaluation_sampler(data, 8, packed=True)
        loader = make_loader(data, sampler, packed=True)
        batches = list(loader)
        assert sorted(row for batch in batches for row in batch["rows"].tolist()) == list(range(rows))
        for batch in batches:
            assert batch["static"] and batch["num_tokens"] <= batch["shape"].tokens <= 8 * 100 + SIZE_STEP
            assert batch["shape"].longest == (64 if data.lengths[batch["rows"]].max() <= 64 else 100)
        assert {batch["shape"].longest for batch in batches} == {64, 100}
        packings.append(data.packing)
    assert packings[0] == packings[1]


def test_a_text_of_more_windows_than_there_is_room_for_has_a_shape_of_its_own() -> None:
    data = dataset(rows=40, keep="windows", max_length=12)
    data.pack_evaluation(24, 8)
    batch = data.__getitems__([int(data.lengths.argmax())])
    assert data.lengths.max() > 64 and not batch["static"] and batch["shape"].tokens >= data.lengths.max()


def test_sizes_leave_as_few_tokens_unused_as_any_choice_of_as_many_would() -> None:
    for _ in range(20):
        totals = DRAW.integers(1, SIZE_STEP * 8, 20)
        steps = np.unique(-(-totals // SIZE_STEP)) * SIZE_STEP

        def cost(sizes: tuple[int, ...], totals: np.ndarray = totals) -> int:
            return int(np.asarray(sizes)[np.searchsorted(sizes, totals)].sum())

        choices = [(*few, int(steps[-1])) for k in range(3) for few in itertools.combinations(steps[:-1].tolist(), k)]
        assert cost(choose_sizes(totals, 3)) == min(map(cost, choices))
        for price in (SIZE_STEP, 10 * SIZE_STEP, 1000 * SIZE_STEP):  # of each size
            found = choose_sizes(totals, 3, price)
            assert cost(found) + len(found) * price == min(cost(each) + len(each) * price for each in choices)
    many = DRAW.integers(1, 10**6, 5000)
    sizes = choose_sizes(many, 6)
    assert len(sizes) == 6 and sizes[-1] >= many.max()


def test_evaluation_batches_have_about_as_many_tokens_and_every_row_once() -> None:
    lengths = DRAW.integers(3, 60, 500)
    batches = evaluation_batches(lengths, 16, 16 * 59)
    assert sorted(np.concatenate(batches).tolist()) == list(range(500))
    totals = [int(lengths[batch].sum()) for batch in batches]
    assert max(totals) <= 16 * lengths.max() and max(map(len, batches)) <= 64
    assert min(totals[:-1]) > 16 * lengths.max() - 60 or max(map(len, batches)) == 64
