"""Counts the metrics of ``metric_table.py`` in training and evaluation, by torchmetrics."""

import re
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, classification

from lightning_lora import processes
from lightning_lora.evaluation.documents import wide
from lightning_lora.evaluation.metric_table import METRICS

PER_CLASS = "_per_class"
#: Training rows whose classes are counted together at the end of an epoch.
_AT_ONCE = 2**20


def make_metrics(num_classes: int, training: bool = False) -> MetricCollection:
    """All metrics as one collection that counts each batch once; takes probabilities (B, C) and labels (B,).

    Args:
        num_classes: C.
        training: Leave out those that training rows do not have; the others take predicted classes (B,) too.
    """
    metrics = {
        name: spec.torch_metric(classification, num_classes)
        for name, spec in METRICS.items()
        if spec.torch_metric is not None and (spec.of_training or not training)
    }
    return MetricCollection(metrics, compute_groups=True)


class EvaluationCounter(nn.Module):
    """All metrics and the mean loss of validation or test rows.

    Batches are kept and counted together at the end: the metrics are a dozen small operations, which cost a GPU more
    than the batch.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.metrics = make_metrics(num_classes)
        self.loss = MeanMetric()
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def count(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch: logits (B, C), labels (B,) and their mean loss."""
        self._batches.append((logits.detach(), labels, loss.detach()))

    def take_values(self, label_names: Sequence[str]) -> dict[str, float]:
        """Return the loss and the values of ``metric_values``, and reset."""
        if self._batches:
            logits, labels, losses = zip(*self._batches, strict=True)
            together = torch.cat(logits)
            # Probabilities, as the calibration error would take logits that happen to lie between 0 and 1 for such; in
            # double precision, so that the largest is the largest logit.
            self.metrics.update(together.softmax(dim=-1, dtype=wide(together)), torch.cat(labels))
            self.loss.update(torch.stack(losses), torch.tensor([len(each) for each in labels]).to(together.device))
        values = {"loss": self.loss.compute().item(), **metric_values(self.metrics.compute(), label_names)}
        self.reset()
        return values

    def reset(self) -> None:
        """Forget what was counted."""
        self._batches = []
        self.metrics.reset()
        self.loss.reset()


class TrainCounter(nn.Module):
    """The confusion matrix and the loss of the training rows of an epoch, counted in a few operations.

    Its tensors keep their addresses, so that a captured CUDA graph can count into them.

    Args:
        num_classes: C.
    """

    confusion: Tensor
    loss_sum: Tensor
    rows: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("confusion", torch.zeros(num_classes**2, dtype=torch.int64), persistent=False)
        self.register_buffer("loss_sum", torch.zeros(()), persistent=False)
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64), persistent=False)

    def count(self, logits: Tensor, labels: Tensor, loss: Tensor, rows: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: (B, C).
            labels: (B,).
            loss: Their mean loss.
            rows: How many of them, the first ones, are there, (); by default all.
        """
        cells = labels * self.num_classes + logits.detach().argmax(dim=-1)
        there = torch.ones_like(cells)
        if rows is not None:
            there = (torch.arange(len(cells), device=cells.device) < rows).long()
        self.confusion.index_add_(0, cells, there)
        number = there.sum()
        self.loss_sum += loss.detach().float() * number
        self.rows += number

    def take_values(self, label_names: Sequence[str]) -> dict[str, float]:
        """Return the loss and the values of ``metric_values``, of all processes together, and reset."""
        counted = self.counted()
        metrics = make_metrics(self.num_classes, training=True)
        cells = counted["confusion"].cumsum(0)
        for start in range(0, int(cells[-1]), _AT_ONCE):
            rows = torch.arange(start, min(start + _AT_ONCE, int(cells[-1])))
            found = torch.searchsorted(cells, rows, right=True)
            metrics.update(found % self.num_classes, found // self.num_classes)
        loss = (counted["loss_sum"] / counted["rows"]).item()
        self.reset()
        return {"loss": loss, **metric_values(metrics.compute(), label_names)}

    def reset(self) -> None:
        """Forget what was counted."""
        for tensor in self.buffers():
            tensor.zero_()

    def counted(self) -> dict[str, Tensor]:
        """Return what was counted, of all processes together, on the CPU."""
        own = {name: tensor.cpu() for name, tensor in self.named_buffers()}
        several = processes.gathered(own)
        return {name: torch.stack([each[name] for each in several]).sum(0) for name in own}

    def restore(self, counted: Mapping[str, Tensor]) -> None:
        """Set what was counted to what ``counted`` gave; what another version has counted is left out."""
        if counted.keys() != dict(self.named_buffers()).keys():
            print("warning: the training metrics of this epoch begin with the resumed step", file=sys.stderr)
            return
        for name, tensor in self.named_buffers():
            tensor.copy_(counted[name])


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
        if len(per_class) == 2:
            values[f"{kind}_binary"] = per_class[1]
    return values


def metric_names(label_names: Sequence[str]) -> list[str]:
    """The names of what is logged of a validation pass: the loss and every metric."""
    counter = EvaluationCounter(len(label_names))
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
