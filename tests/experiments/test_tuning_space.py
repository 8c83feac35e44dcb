"""What ``fit --budget`` searches: what was left open, and can matter on the data."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_lora.experiments import tuning_space
from lightning_lora.experiments.tuning_space import make_space


def space_of(
    own_config: Path, *words: str, lengths: tuple[int, ...] = (16, 24, 48, 96), **data: object
) -> dict[str, Any]:
    """What would be searched; the texts have 5 to 30 tokens, the base takes 64."""
    config = yaml.safe_load((own_config / "own.yaml").read_text())
    config["data"] |= {"max_length": 24, **data}
    typed = {"model.base_model", "data.source", *(word[2:] for word in words if word.startswith("--"))}
    before = tuning_space.TRIED_LENGTHS
    tuning_space.TRIED_LENGTHS = lengths
    try:
        return dict(make_space([config], words, typed).dimensions)
    finally:
        tuning_space.TRIED_LENGTHS = before


def test_what_is_open_and_can_matter_is_searched(own_config: Path) -> None:
    assert space_of(own_config) == {
        "learning_rate_factor": {"low": 0.25, "high": 4.0, "log": True},
        "model.method": ["lora", "full"],
        "data.max_length": [16, 24, 48],  # 96 is more than the base takes, and nothing is cut at 48
        "data.truncation": ["both", "head"],
        "epochs_factor": [1, 2, 4],
    }


@pytest.mark.parametrize(
    ("words", "fixed"),
    [
        (["--model.learning_rate", "1e-3"], {"learning_rate_factor", "model.method"}),
        (["--model.method", "lora"], {"model.method"}),
        (["--model.adapter.rank", "4"], {"model.method"}),  # which full does not take
        (["--model.method", "dora"], {"model.method"}),
        (["--data.max_length", "24"], {"data.max_length"}),
        (["--data.truncation", "both"], {"data.truncation"}),
        (["--trainer.max_epochs", "1"], {"epochs_factor"}),
        (["--trainer.max_steps", "9"], {"epochs_factor"}),
    ],
)
def test_what_was_typed_is_not_searched(own_config: Path, words: list[str], fixed: set[str]) -> None:
    assert set(space_of(own_config)) - set(space_of(own_config, *words)) == fixed


def test_lengths_at_which_hardly_any_text_is_cut_are_not_tried(own_config: Path) -> None:
    assert "data.max_length" not in space_of(own_config, lengths=(40, 48), max_length=40)
    assert "data.truncation" not in space_of(own_config, lengths=(40, 48), max_length=40)
    assert space_of(own_config, lengths=(16, 48), max_length=40)["data.max_length"] == [16, 40]
    assert "data.max_length" not in space_of(own_config, truncation="windows")
    assert space_of(own_config, max_length=24, train_max_length=16)["data.train_max_length"] == [16, 24]
    assert "data.train_max_length" not in space_of(own_config, max_length=24)
