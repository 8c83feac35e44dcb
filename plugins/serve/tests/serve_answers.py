"""Texts that are asked for, and what a right answer is."""

from typing import Any

import pytest

from tests.conftest import make_pairs, make_rows

LIMITS: dict[str, Any] = {"body_mb": 0.02, "texts": 20, "characters": 300, "waiting_texts": 500}
TEXTS = [text for text, _ in make_rows(60, seed=5)]
PAIRS = [row[:2] for row in make_pairs(20, seed=7)]


def inputs(name: str) -> list[Any]:
    """Texts for a run, or pairs."""
    return PAIRS if name == "pairs" else TEXTS


def check(answer: dict[str, Any], expected: Any, positions: list[int]) -> None:
    """An answer of the server is what ``predict`` gives for these positions."""
    columns = expected.columns()
    assert len(answer["predictions"]) == len(positions)
    for found, i in zip(answer["predictions"], positions, strict=True):
        assert found["prediction"] == columns["prediction"][i]
        assert found["probabilities"] == pytest.approx(
            {name: columns[f"p({name})"][i] for name in expected.label_names}, abs=1e-5
        )
        if "probability" in columns:
            assert found["probability"] == pytest.approx(columns["probability"][i], abs=1e-5)
