"""The temperature, against closed forms and torch's own optimizer."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.evaluation.temperature import HIGHEST, LOWEST, fit_temperature, scale_thresholds, temperature_words
from lightning_lora.evaluation.thresholds import choose_thresholds
from lightning_lora.tasks import Task


def rows_of(task: Task, seed: int, scale: float, rows: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are ``scale`` times those of the probabilities that labels are drawn by."""
    made = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, 4, generator=made)
    if task == "multi_label":
        return logits * scale, torch.bernoulli(logits.sigmoid(), generator=made)
    return logits * scale, torch.multinomial(logits.softmax(1), 1, generator=made)[:, 0]


def loss_of(logits: torch.Tensor, labels: torch.Tensor, task: Task) -> torch.Tensor:
    return (F.binary_cross_entropy_with_logits if task == "multi_label" else F.cross_entropy)(logits, labels)


@pytest.mark.parametrize("task", ["single_label", "multi_label"])
@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_it_is_the_minimum_that_lbfgs_finds(task: Task, scale: float) -> None:
    logits, labels = rows_of(task, 0, scale)
    logits, labels = logits.double(), labels if task == "single_label" else labels.double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-10)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(logits / log_t.exp(), labels, task)
        loss.backward()
        return loss

    optimizer.step(step)
    found = fit_temperature(logits.float(), labels, task)
    assert found == pytest.approx(log_t.exp().item(), rel=1e-4) and found == pytest.approx(scale, rel=0.15)
    assert loss_of(logits / found, labels, task) <= loss_of(logits, labels, task)


def test_a_margin_that_is_right_in_four_of_five_rows_means_a_probability_of_four_fifths() -> None:
    logits = torch.tensor([[0.0, 3.0]]).repeat(10, 1)
    labels = torch.tensor([1] * 8 + [0] * 2)
    assert fit_temperature(logits, labels) == pytest.approx(3 / math.log(4), rel=1e-5)
    several = fit_temperature(logits[:, 1:], labels[:, None].float(), "multi_label")
    assert several == pytest.approx(3 / math.log(4), rel=1e-5)


def test_rows_without_an_error_settle_none_and_others_stay_within_bounds() -> None:
    logits = torch.tensor([[0.0, 3.0], [0.1, 0.0]])
    assert fit_temperature(logits, torch.tensor([1, 0])) == 1
    assert fit_temperature(logits, torch.tensor([[0, 1], [1, 0]]).float(), "multi_label") == 1
    assert fit_temperature(torch.full((2, 2), torch.nan), torch.tensor([1, 0])) == 1
    assert "no validation row is wrong" in temperature_words(1.0)
    wrong = fit_temperature(logits, torch.tensor([0, 1]))
    assert wrong == pytest.approx(HIGHEST, rel=1e-4) and "bound" in temperature_words(wrong)
    almost = torch.tensor([[0.0, 1.0]]).repeat(1000, 1), torch.tensor([1] * 999 + [0])
    faint = fit_temperature(0.1 * almost[0], almost[1])
    assert faint == pytest.approx(LOWEST, rel=1e-4) and "bound" in temperature_words(faint)
    assert "bound" not in temperature_words(1.5)


@pytest.mark.parametrize("temperature", [LOWEST, 0.7, 3.0, HIGHEST])
@pytest.mark.parametrize("kind", ["one", "per_label"])
def test_no_label_changes(temperature: float, kind: str) -> None:
    logits, labels = rows_of("multi_label", 1, 2.0)
    divided = logits / torch.tensor(temperature)
    for chosen in (choose_thresholds(logits, labels, kind), torch.tensor([0.01, 0.5, 0.9, 0.99])):  # type: ignore[arg-type]
        scaled = scale_thresholds(chosen, torch.tensor(temperature)).numpy()
        before, after = (
            Outputs(each.numpy(), None, task="multi_label", thresholds=thresholds).predicted
            for each, thresholds in ((logits, chosen.numpy()), (divided, scaled))
        )
        assert np.array_equal(before, after)
    assert torch.equal(logits.argmax(1), divided.argmax(1))
