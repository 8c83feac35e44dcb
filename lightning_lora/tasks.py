"""What is predicted of a text: one class of several, any number of labels, or a number. Imports no torch."""

from typing import Literal

Task = Literal["single_label", "multi_label", "regression"]
#: transformers' names, as in ``config.problem_type``.
PROBLEM_TYPES: dict[Task, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
