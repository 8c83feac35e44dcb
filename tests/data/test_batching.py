from pathlib import Path

import numpy as np
import pytest

from lightning_lora.data.batching import POOL_BATCHES, LengthBatchSampler, evaluation_batches, training_batches
from lightning_lora.seeding import stream_seed

LENGTHS = np.random.default_rng(0).integers(5, 200, size=1003)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 2000])
def test_each_row_stands_in_one_batch(batch_size: int) -> None:
    for batches in (training_batches(LENGTHS, batch_size, 0, 0), evaluation_batches(LENGTHS, batch_size)):
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(LENGTHS)))
        assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1)


def test_batches_cut_from_one_array_are_those_of_a_list() -> None:
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
    def padding(batches: list[np.ndarray]) -> float:
        held = sum(len(batch) * LENGTHS[batch].max() for batch in batches)
        return 1 - LENGTHS.sum() / held

    shuffled = np.array_split(np.random.default_rng(1).permutation(len(LENGTHS)), 63)
    assert padding(shuffled) > 0.4
    assert padding(training_batches(LENGTHS, 16, 0, 0)) < 0.1
    assert padding(evaluation_batches(LENGTHS, 16)) < 0.02


def test_the_order_is_fixed_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(training_batches(LENGTHS, 16, seed, epoch)).tolist()

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
        assert sum(part.share / 4 * 1.0 for part in of_step) == pytest.approx(1)
        for part in of_step:
            assert part.share / 4 / len(part) == pytest.approx(1 / len(step))


def test_the_sampler_follows_the_epoch_and_knows_its_length() -> None:
    sampler = LengthBatchSampler(LENGTHS, 16, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_the_trainer_gives_each_epoch_an_order_of_its_own(tiny_base: Path, reviews: Path) -> None:
    from lightning import Callback, Trainer

    from lightning_lora.data.datamodule import TextDataModule
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
