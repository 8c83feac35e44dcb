import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from lightning_lora.data.batching import LengthBatchSampler, TokenDataset
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.order import (
    EVALUATION_FACTOR,
    POOL_BATCHES,
    equal_cuts,
    evaluation_batches,
    rounded_lengths,
    training_batches,
)
from lightning_lora.data.tokens import InputFormat, TokenRows
from lightning_lora.seeding import stream_seed
from tests.conftest import make_rows, write_csv

LENGTHS = np.random.default_rng(0).integers(5, 200, size=1003)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 2000])
def test_each_row_stands_in_one_batch(batch_size: int) -> None:
    batches = list(training_batches(LENGTHS, batch_size, 0, 0))
    assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)
    for found in (batches, evaluation_batches(rounded_lengths(LENGTHS), batch_size)):
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(len(LENGTHS)))


@pytest.mark.parametrize("batch_size", [1, 7, 16, 2000])
def test_short_texts_are_evaluated_together_for_as_many_tokens_as_the_longest(batch_size: int) -> None:
    rows = rounded_lengths(LENGTHS)
    sampler = LengthBatchSampler(rows, batch_size, None)
    batches = [np.array(batch) for batch in sampler]
    assert len(sampler) == len(batches)
    padded_lengths = [int(rows[batch].max()) for batch in batches]
    assert padded_lengths == sorted(padded_lengths, reverse=True)
    most = batch_size * padded_lengths[0]
    for batch, width in zip(batches[:-1], padded_lengths, strict=False):
        assert len(batch) == min(most // width, EVALUATION_FACTOR * batch_size) >= batch_size
    assert len(batches[-1]) * padded_lengths[-1] <= most


@pytest.mark.parametrize("to_max", [False, True])
@pytest.mark.parametrize("keep", ["head", "windows"])
def test_no_batch_of_an_evaluation_is_larger_than_the_first(to_max: bool, keep: str) -> None:
    """In tokens, padding included: 130 is no width that texts are padded to, and is one here."""
    ends = np.cumsum(LENGTHS)
    tokens = TokenRows(pa.chunked_array([pa.ListArray.from_arrays([0, *ends], np.ones(ends[-1], np.int32))]))
    input_format = InputFormat((2,), (3,), 0, 130, keep)
    data = TokenDataset(tokens, input_format, None, to_max)
    sizes = [
        data.__getitems__(batch)["input_ids"].numel() for batch in LengthBatchSampler(data.padded_lengths, 16, None)
    ]
    assert max(sizes) == sizes[0]
    whole = math.ceil(len(LENGTHS) / 16)
    assert len(sizes) == whole if to_max and keep == "head" else len(sizes) < whole


def test_nothing_is_evaluated_in_no_batches() -> None:
    sampler = LengthBatchSampler(np.zeros(0, np.int64), 16, None)
    assert len(sampler) == len(list(sampler)) == 0


def test_batches_are_full_ones_in_random_order_and_then_the_rest() -> None:
    rng = np.random.Generator(np.random.PCG64(stream_seed(3, "order/2")))
    order, expected = rng.permutation(len(LENGTHS)), []
    for start in range(0, len(order), 16 * POOL_BATCHES):
        part = order[start : start + 16 * POOL_BATCHES]
        part = part[np.argsort(LENGTHS[part], kind="stable")]
        expected += [part[i : i + 16].tolist() for i in range(0, len(part), 16)]
    full = len(order) // 16
    expected = [expected[i] for i in rng.permutation(full)] + expected[full:]
    assert [batch.tolist() for batch in training_batches(LENGTHS, 16, 3, 2)] == expected


def test_batches_hold_texts_of_similar_length() -> None:
    def padding(batches: list[np.ndarray], lengths: np.ndarray = LENGTHS) -> float:
        held = sum(len(batch) * lengths[batch].max() for batch in batches)
        return 1 - lengths.sum() / held

    shuffled = np.array_split(np.random.default_rng(1).permutation(len(LENGTHS)), 63)
    assert padding(shuffled) > 0.4
    assert padding(list(training_batches(LENGTHS, 16, 0, 0))) < 0.1
    padded_lengths = rounded_lengths(LENGTHS)  # beyond what each row is padded to by itself
    assert padding(evaluation_batches(padded_lengths, 16), padded_lengths) < 0.03


def test_the_order_is_fixed_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(list(training_batches(LENGTHS, 16, seed, epoch))).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_length_says_nothing_of_a_batch_s_place_in_the_epoch() -> None:
    means = [LENGTHS[batch].mean() for batch in training_batches(LENGTHS, 8, 0, 0)]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.25


@pytest.mark.parametrize("rows", [100, 96, 97, 3])
def test_the_parts_of_an_accumulated_step_are_those_of_the_large_batch(rows: int) -> None:
    whole = LengthBatchSampler(LENGTHS[:rows], 16, seed=0)
    parts = LengthBatchSampler(LENGTHS[:rows], 4, seed=0, accumulate=4)
    steps, pieces = list(whole), list(parts)
    assert len(pieces) == len(parts)
    for i, step in enumerate(steps):
        of_step = pieces[4 * i : 4 * i + 4]
        assert [row for part in of_step for row in part] == list(step)
        # The trainer divides each part's loss by 4: what is left must be the mean over the rows of the step.
        assert sum(part.step_weight / 4 * 1.0 for part in of_step) == pytest.approx(1)
        for part in of_step:
            assert part.step_weight / 4 / len(part) == pytest.approx(1 / len(step))


def test_the_sampler_follows_the_epoch_and_knows_its_length() -> None:
    sampler = LengthBatchSampler(LENGTHS, 16, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_trainer_gives_each_epoch_an_order_of_its_own(tiny_base: Path, reviews: Path) -> None:
    from lightning import Callback, Trainer

    from lightning_lora.training.module import TextClassifier

    orders: dict[int, list[int]] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            orders.setdefault(trainer.current_epoch, []).extend(batch["rows"].tolist())

    data = TextDataModule(str(reviews), str(tiny_base), max_length=32)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[Watch()], limit_val_batches=0, **quiet)
    trainer.fit(TextClassifier(str(tiny_base), data.label_names), data)
    assert len({tuple(order) for order in orders.values()}) == 3
    assert len({frozenset(order) for order in orders.values()}) == 1


def held(rows: list[int]) -> int:
    """Tokens of a padded batch."""
    return len(rows) * int(rounded_lengths(LENGTHS[list(rows)].max()))


@pytest.mark.parametrize("batch_size", [1, 7, 16, 2000])
def test_batches_by_tokens_hold_each_row_once_in_as_many_steps(batch_size: int) -> None:
    for epoch in range(3):
        batches = list(training_batches(LENGTHS, batch_size, 0, epoch, "tokens"))
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(LENGTHS)))
        assert min(map(len, batches)) > 0
        assert len(batches) == len(list(training_batches(LENGTHS, batch_size, 0, epoch)))


def test_batches_by_tokens_have_nearly_as_many() -> None:
    by_texts, by_tokens = (
        np.array([held(batch) for batch in training_batches(LENGTHS, 32, 0, 0, by)]) for by in ("texts", "tokens")
    )
    assert by_texts.max() / by_texts.mean() > 1.7
    assert by_tokens.max() / by_tokens.mean() < 1.25
    assert by_tokens.sum() < 1.05 * by_texts.sum()


def test_cuts_are_as_even_as_whole_rows_allow() -> None:
    lengths = np.array([8, 8, 8, 8, 16, 16, 32, 32])
    assert equal_cuts(lengths, np.arange(8), 4).tolist() == [0, 4, 6, 7, 8]
    # Padded: 5 texts of 16 and 3 of 32, where cutting at half of the tokens, 6 of 16 and 2 of 32, is less even.
    assert equal_cuts(lengths, np.arange(8), 2).tolist() == [0, 5, 8]
    # No part is without a row, also where one row is longer than all others together.
    for lengths in ([800, 8, 8, 8], [8, 8, 8, 800]):
        cuts = equal_cuts(np.array(lengths), np.arange(4), 3)
        assert cuts[[0, -1]].tolist() == [0, 4] and (np.diff(cuts) > 0).all()


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (4, 1), (1, 4), (2, 2)])
def test_in_batches_by_tokens_each_text_weighs_the_same(accumulate: int, processes: int) -> None:
    weights, tokens = np.zeros(len(LENGTHS)), []
    samplers = [LengthBatchSampler(LENGTHS, 32, 0, accumulate, rank, processes, "tokens") for rank in range(processes)]
    parts = list(zip(*samplers, strict=True))  # none has more than another
    assert len(parts) == len(samplers[0])
    for part in parts:
        for mine in part:
            # The trainer divides by the parts of a step, and processes take the mean.
            weights[list(mine)] += mine.step_weight / len(mine) / accumulate / processes
        assert sum(mine.micro_batch_weight for mine in part) / processes == pytest.approx(1)
        tokens.append([held(mine) for mine in part])
    steps = len(parts) / accumulate
    np.testing.assert_allclose(weights, steps / len(LENGTHS), rtol=1e-12)
    waits = np.max(tokens, axis=1).sum() / np.mean(tokens, axis=1).sum() - 1
    assert waits < 0.02  # the share of time for which the others wait for the one with most to do


def test_parts_that_are_short_of_rows_count_nothing() -> None:
    lengths = np.array([400, 8, 8])
    parts = list(LengthBatchSampler(lengths, 1, 0, accumulate=4, by="tokens"))
    assert len(parts) == 4
    assert sorted(part.step_weight for part in parts)[0] == 0
    assert sum(part.step_weight for part in parts) / 4 == pytest.approx(1)


def test_devices_and_accumulation_leave_steps_by_tokens_as_they_are() -> None:
    whole = [sorted(step) for step in LengthBatchSampler(LENGTHS, 32, 0, by="tokens")]
    parts = list(LengthBatchSampler(LENGTHS, 8, 0, accumulate=4, by="tokens"))
    assert [sorted(row for part in parts[i : i + 4] for row in part) for i in range(0, len(parts), 4)] == whole
    shared = zip(*(LengthBatchSampler(LENGTHS, 32, 0, 1, rank, 2, "tokens") for rank in range(2)), strict=True)
    assert [sorted([*a, *b]) for a, b in shared] == whole


def test_widths_are_few_and_waste_little() -> None:
    lengths = np.arange(1, 513)
    padded_lengths = rounded_lengths(lengths)
    assert (padded_lengths >= lengths).all()
    assert (padded_lengths % 8 == 0).all()
    assert (padded_lengths - lengths < np.maximum(lengths / 4, 8)).all()
    assert {int(w) for w in padded_lengths if w > 64} == {
        *range(80, 129, 16),
        *range(160, 257, 32),
        *range(320, 513, 64),
    }


@pytest.mark.parametrize("by", ["texts", "tokens"])
def test_the_largest_batch_is_one_of_the_epoch(by) -> None:
    sampler = LengthBatchSampler(LENGTHS, 16, seed=3, by=by)
    sampler.set_epoch(2)
    tokens = {tuple(batch): len(batch) * int(rounded_lengths(LENGTHS[batch].max())) for batch in sampler}
    assert tokens[tuple(sampler.largest())] == max(tokens.values())


@pytest.mark.parametrize("truncation", ["head", "both", "windows"])
def test_training_texts_can_be_shorter_than_those_that_are_read_after(
    tiny_base: Path, tmp_path: Path, truncation: str
) -> None:
    rows = write_csv(tmp_path / "rows.csv", [(" ".join([text] * 5), label) for text, label in make_rows(60)])
    common = {"truncation": truncation, "cache_dir": str(tmp_path / "cache")}
    short, long, both = (
        TextDataModule(str(rows), str(tiny_base), **common, **lengths)  # type: ignore[arg-type]
        for lengths in ({"max_length": 12}, {"max_length": 24}, {"max_length": 24, "train_max_length": 12})
    )
    for data in (short, long, both):
        data.setup("fit")
    for split, other in (("train", short), ("val", long)):
        for mine, theirs in zip(both.evaluation_loader(split), other.evaluation_loader(split), strict=True):
            assert torch.equal(mine["input_ids"], theirs["input_ids"])
    lengths = {name: each["max_length"] for name, each in both.describe()["splits"].items() if "max_length" in each}
    assert lengths == {"train": 12, "val": 24}
    more = TextDataModule(str(rows), str(tiny_base), max_length=24, train_max_length=30, **common)  # type: ignore[arg-type]
    assert more.train_format.max_length == 24
