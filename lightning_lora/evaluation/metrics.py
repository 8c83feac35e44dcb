"""The metrics, all of torchmetrics. A new metric is one entry in ``METRICS``."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)

from lightning_lora.evaluation.documents import wide

CALIBRATION_BINS = 15

#: Metric by name, as a function of the number of classes. The average is part of the name.
#: "_per_class" gives one value for each label, logged as "<metric>/<label>".
METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda c: MulticlassAccuracy(c, average="micro"),
    "f1_macro": lambda c: MulticlassF1Score(c, average="macro"),
    "precision_macro": lambda c: MulticlassPrecision(c, average="macro"),
    "recall_macro": lambda c: MulticlassRecall(c, average="macro"),
    # Naeini et al. 2015: 15 bins of equal width over the probability of the predicted class.
    "calibration_error": lambda c: MulticlassCalibrationError(c, n_bins=CALIBRATION_BINS, norm="l1"),
    "f1_per_class": lambda c: MulticlassF1Score(c, average="none"),
    "precision_per_class": lambda c: MulticlassPrecision(c, average="none"),
    "recall_per_class": lambda c: MulticlassRecall(c, average="none"),
}
#: Metrics that only two classes have, taken of class 1 (the convention of scikit-learn's pos_label).
BINARY = ("f1", "precision", "recall")
PER_CLASS = "_per_class"


#: Those that keep every row until the epoch's end: too much for training rows.
OF_EVALUATION = ("calibration_error",)


def make_metrics(num_classes: int, training: bool = False) -> MetricCollection:
    """All metrics as one collection that counts each batch once; takes probabilities (B, C) and labels (B,).

    Args:
        num_classes: C.
        training: Leave out what would grow with the training rows.
    """
    names = [name for name in METRICS if not (training and name in OF_EVALUATION)]
    metrics = {name: METRICS[name](num_classes) for name in names}
    return MetricCollection(metrics, compute_groups=True)  # type: ignore[arg-type]


class StageCounter(nn.Module):
    """All metrics and the mean loss of one stage.

    Args:
        num_classes: C.
        training: Whether of training rows.
    """

    def __init__(self, num_classes: int, training: bool) -> None:
        super().__init__()
        self.metrics = make_metrics(num_classes, training)
        self.loss = MeanMetric()

    def count(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Counts a batch: logits (B, C), labels (B,) and their mean loss."""
        # Probabilities, as the calibration error would take logits that happen to lie between 0 and 1 for such; in
        # double precision, so that the largest is the largest logit.
        self.metrics.update(logits.detach().softmax(dim=-1, dtype=wide(logits)), labels)
        self.loss.update(loss.detach(), len(labels))

    def take_values(self, label_names: Sequence[str]) -> dict[str, float]:
        """The loss and the values of ``metric_values``; the next batch begins anew."""
        values = {"loss": self.loss.compute().item(), **metric_values(self.metrics.compute(), label_names)}
        self.reset()
        return values

    def reset(self) -> None:
        """Forgets what was counted."""
        self.metrics.reset()
        self.loss.reset()

    def counted(self) -> dict[str, Any]:
        """What was counted, of all processes together, as tensors and lists of them."""
        counted: dict[str, Any] = {}
        for name, metric in self._named():
            if metric._update_count:
                with metric.sync_context(should_unsync=metric.distributed_available_fn()):
                    state = metric.metric_state  # in which processes have made one tensor of their lists
                    lists = {key for key, default in metric._defaults.items() if isinstance(default, list)}
                    state = {k: [v] if k in lists and isinstance(v, Tensor) else v for k, v in state.items()}
                    counted[name] = {"updates": metric._update_count, "state": _copied(state)}
        return counted

    def go_on(self, counted: Mapping[str, Any]) -> None:
        """Goes on, where nothing was counted, from what ``counted`` gave."""
        for name, metric in self._named():
            if name in counted:
                metric._update_count = counted[name]["updates"]
                for key, value in _copied(counted[name]["state"]).items():
                    moved = [v.to(metric.device) for v in value] if isinstance(value, list) else value.to(metric.device)
                    setattr(metric, key, moved)

    def _named(self) -> Iterator[tuple[str, Metric]]:
        yield from self.metrics.items(keep_base=True, copy_state=True)
        yield "loss", self.loss


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of many small tensors become one tensor: a checkpoint keeps each as a file of its own."""
    copied: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, list):
            copied[key] = [torch.cat(value)] if value else []
        else:
            copied[key] = value.clone()
    return copied


def metric_values(computed: dict[str, Tensor], label_names: Sequence[str]) -> dict[str, float]:
    """Named numbers from what ``make_metrics(...).compute()`` gives.

    For labels (neg, pos): ``accuracy``, ``f1_macro``, ..., ``f1/neg``, ``f1/pos``, ... and, with two
    classes, ``f1_binary``, ``precision_binary``, ``recall_binary`` of the second.
    """
    values: dict[str, float] = {}
    tags = label_tags(label_names)
    for name, value in computed.items():
        if not name.endswith(PER_CLASS):
            values[name] = value.item()
            continue
        kind = name.removesuffix(PER_CLASS)
        per_class = value.tolist()
        values |= {f"{kind}/{tag}": number for tag, number in zip(tags, per_class, strict=True)}
        if len(per_class) == 2 and kind in BINARY:
            values[f"{kind}_binary"] = per_class[1]
    return values


def metric_names(label_names: Sequence[str]) -> list[str]:
    """The names of what is logged of a validation pass: the loss and every metric."""
    counter = StageCounter(len(label_names), training=False)
    counter.count(torch.zeros(1, len(label_names)), torch.zeros(1, dtype=torch.long), torch.zeros(()))
    return list(counter.take_values(label_names))


def label_tags(label_names: Sequence[str]) -> list[str]:
    """Label names as parts of a metric's name: other signs become "_", and no two are the same."""
    tags: list[str] = []
    for i, label in enumerate(label_names):
        tag = re.sub(r"[^\w\-]+", "_", label).strip("_") or f"class_{i}"
        while tag in tags:
            tag += f"_{i}"
        tags.append(tag)
    return tags
