"""Training texts with words left out or swapped, others in each epoch (after Wei and Zou 2019, arXiv:1901.11196)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_lora.data.batching import TokenDataset
from lightning_lora.data.pairs import Text
from lightning_lora.data.tokens import tokenize
from lightning_lora.seeding import stream_seed


@dataclass
class Augmentation:
    """What happens to the words of a training text; validation and test texts are never changed.

    Args:
        delete: Probability that a word is left out; one always stays.
        swap: Pairs of words that change places, as a share of the number of words.
    """

    delete: float = 0.0
    swap: float = 0.0

    @property
    def active(self) -> bool:
        """Whether anything is changed."""
        return bool(self.delete or self.swap)


def augmented(text: str, options: Augmentation, rng: np.random.Generator) -> str:
    """The text with some words left out and some swapped; words are separated by spaces."""
    words = text.split()
    if options.swap and len(words) > 1:
        for _ in range(round(options.swap * len(words))):
            i, j = rng.choice(len(words), size=2, replace=False)
            words[i], words[j] = words[j], words[i]
    if options.delete:
        stay = rng.random(len(words)) >= options.delete
        if not stay.any():
            stay[rng.integers(len(words))] = True
        words = [word for word, kept in zip(words, stay, strict=True) if kept]
    return " ".join(words)


@dataclass(eq=False)
class AugmentedDataset(TokenDataset):
    """Training rows whose words change from epoch to epoch, as a function of seed, epoch and row.

    Batches are still put together by the lengths of the unchanged texts.
    """

    texts: Sequence[Text]
    tokenizer: Any
    options: Augmentation
    seed: int

    @property
    def longest(self) -> int:
        """Tokens of the longest text that there can be: a changed text may have more than it had."""
        return self.input_format.max_length

    def ids(self, rows: Sequence[int], epoch: int) -> list[Any]:
        """Token ids of the rows' texts as this epoch has them."""
        texts: list[Any] = []
        for row in rows:
            rng = np.random.Generator(np.random.PCG64(stream_seed(self.seed, f"augment/{epoch}/{row}")))
            text = self.texts[row]
            sides = [augmented(each, self.options, rng) for each in ((text,) if isinstance(text, str) else text)]
            texts.append(tuple(sides) if len(sides) == 2 else sides[0])
        changed = tokenize(texts, self.tokenizer)
        return [changed[i] for i in range(len(changed))]
