"""Rows whose label is most likely wrong, by confident learning (Northcutt et al. 2021, arXiv:1911.00068; cleanlab).

Imports no torch.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lora.errors import UserError
from lightning_lora.program import install_line
from lightning_lora.tasks import Task

#: Robust standard deviations from the median beyond which the error of a predicted number is an outlier.
OUTLIER_DEVIATIONS = 3.0


def require_cleanlab() -> None:
    """Refuse to look for wrong labels without the package for it.

    Raises:
        UserError: It is missing.
    """
    if importlib.util.find_spec("cleanlab") is None:
        raise UserError(f"explain: wrong labels are found by 'cleanlab': {install_line('explain')}")


def label_issues(labels: Sequence[Any], outputs: NDArray, names: Sequence[str], task: Task) -> list[tuple[int, float]]:
    """Find the rows that are most likely labelled wrong, the most doubtful first.

    The predictions must be of rows that the model was not trained on.

    Args:
        labels: Of N rows: names, lists of names, or numbers.
        outputs: Probabilities (N, C), or predicted numbers (N, 1).
        names: Names of the C classes or labels.
        task: What is predicted.

    Returns:
        Position and quality of each such label: the probability of a class; cleanlab's score, from 0 to 1, of several
        labels; of a number the distance to the predicted one, in robust standard deviations, negative.
    """
    if task == "regression":
        from scipy.stats import median_abs_deviation

        errors = np.asarray(labels, float) - outputs[:, 0]
        spread = median_abs_deviation(errors, scale="normal")
        distances = np.abs(errors - np.median(errors)) / max(spread, np.finfo(float).tiny)
        rows, quality = np.flatnonzero(distances > OUTLIER_DEVIATIONS), -distances
        rows = rows[np.argsort(quality[rows], kind="stable")]
    else:
        require_cleanlab()
        from cleanlab import multilabel_classification, rank
        from cleanlab.filter import find_label_issues

        number = {name: i for i, name in enumerate(names)}
        several = task == "multi_label"
        given: Any = [[number[name] for name in each] for each in labels] if several else [number[n] for n in labels]
        given = given if several else np.array(given)
        order = "self_confidence"
        rows = find_label_issues(given, outputs, return_indices_ranked_by=order, multi_label=several, n_jobs=1)
        scorer = multilabel_classification if several else rank
        quality = scorer.get_label_quality_scores(given, outputs)
    return [(int(row), float(quality[row])) for row in rows]
