"""Temperature scaling (Guo et al. 2017): logits are divided by one number, so that probabilities are right."""

import math

from torch import Tensor
from torch.nn import functional as F

from lightning_lora.evaluation.documents import wide
from lightning_lora.tasks import Task

#: The temperatures that are searched.
LOWEST, HIGHEST = 0.2, 10.0
#: On fewer rows one that is fitted can do worse than none (docs/LOG.md).
ROWS_TO_FIT = 100


def fit_temperature(logits: Tensor, labels: Tensor, task: Task = "single_label") -> float:
    """Return the temperature with the lowest loss on these rows (https://arxiv.org/abs/1706.04599), or 1.

    It is 1 where no label is wrong: the loss then falls as far as the temperature does. Otherwise the loss is convex in
    the inverse of the temperature, so that what is found is the minimum within the bounds.

    Args:
        logits: (N, C).
        labels: Class numbers (N,); or 0 or 1 for each label, (N, C).
        task: Which of them; not regression.
    """
    from scipy.optimize import minimize_scalar  # which takes a tenth of a second

    logits, labels = logits.cpu().double(), labels.cpu()
    if task == "single_label":
        right, labels = logits.argmax(dim=1) == labels, labels.long()
    else:
        right, labels = (logits > 0) == (labels > 0), labels.double()

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        several = task == "multi_label"
        return (F.binary_cross_entropy_with_logits if several else F.cross_entropy)(scaled, labels).item()

    if right.all() or not logits.isfinite().all():
        return 1.0
    bounds = (math.log(LOWEST), math.log(HIGHEST))
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x) if found.fun < loss(0.0) else 1.0


def scale_thresholds(thresholds: Tensor, temperature: Tensor) -> Tensor:
    """Return the probabilities of scaled logits that the thresholds become, (C,): the same labels are predicted.

    Args:
        thresholds: Probabilities of the logits as they were, (C,).
        temperature: What these are divided by, ().
    """
    return (thresholds.to(wide(thresholds)).logit() / temperature).sigmoid()


def temperature_words(temperature: float) -> str:
    """Return a temperature in words: the number, and why it is none that validation rows have settled."""
    if temperature == 1:
        return "1 (no validation row is wrong, or no other is better)"
    bound = next((b for b in (LOWEST, HIGHEST) if math.isclose(temperature, b, rel_tol=1e-3)), None)
    return f"{temperature:.3f}" + ("" if bound is None else f" (the bound of the search is {bound:g})")
