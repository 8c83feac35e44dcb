from pathlib import Path

import numpy as np
import pytest

from lightning_lora.data.augment import Augmentation, augmented
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.errors import UserError

TEXT = " ".join(f"word{i}" for i in range(200))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_deletion_leaves_out_the_asked_share_and_keeps_the_order() -> None:
    counts = []
    for seed in range(50):
        words = augmented(TEXT, Augmentation(delete=0.1), rng(seed)).split()
        counts.append(len(words))
        assert [w for w in TEXT.split() if w in set(words)] == words
    assert np.mean(counts) == pytest.approx(180, abs=3 * np.sqrt(200 * 0.1 * 0.9 / 50))  # three standard errors


def test_swapping_keeps_every_word_and_moves_at_most_two_a_swap() -> None:
    words = augmented(TEXT, Augmentation(swap=0.1), rng()).split()
    assert sorted(words) == sorted(TEXT.split())
    moved = sum(a != b for a, b in zip(words, TEXT.split(), strict=True))
    assert 20 <= moved <= 40


@pytest.mark.parametrize("text", ["one", "  one  ", "one two"])
def test_a_word_always_stays(text: str) -> None:
    for seed in range(30):
        assert augmented(text, Augmentation(delete=0.99, swap=0.9), rng(seed)).split()


def test_only_training_rows_change_each_epoch_anew_and_alike_with_the_same_seed(tiny_base: Path, reviews: Path) -> None:
    def batches(seed: int, epoch: int, split: str, **options: float) -> list[list[int]]:
        data = TextDataModule(
            str(reviews), str(tiny_base), max_length=32, seed=seed, augmentation=Augmentation(**options)
        )
        data.setup("fit")
        loader = data.train_dataloader() if split == "train" else data.val_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        rows = {
            int(row): ids[mask.bool()].tolist()
            for batch in loader
            for row, ids, mask in zip(batch["rows"], batch["input_ids"], batch["attention_mask"], strict=True)
        }
        return [rows[i] for i in sorted(rows)]

    plain = batches(0, 0, "train")
    first = batches(0, 0, "train", delete=0.2)
    assert first == batches(0, 0, "train", delete=0.2)
    assert first != plain and first != batches(0, 1, "train", delete=0.2) != batches(1, 1, "train", delete=0.2)
    assert sum(map(len, first)) < sum(map(len, plain))
    assert batches(0, 0, "val", delete=0.2) == batches(0, 0, "val")


@pytest.mark.parametrize("option", ["delete", "swap"])
def test_a_share_out_of_range_is_refused(tiny_base: Path, reviews: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"data.augmentation.{option}"):
        TextDataModule(str(reviews), str(tiny_base), augmentation=Augmentation(**{option: 1.0}))
