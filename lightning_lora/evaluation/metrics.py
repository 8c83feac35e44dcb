"""Counts what the metrics of ``metric_table.py`` are made of, in training and evaluation."""

import re
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MetricCollection

from lightning_lora import processes
from lightning_lora.evaluation.documents import wide
from lightning_lora.evaluation.metric_table import all_metrics, metrics_for
from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.tasks import Task

PER_CLASS = "_per_class"


class EvaluationCounter(nn.Module):
    """All metrics of validation or test rows, the mean loss among them.

    Batches are kept and counted together at the end: the metrics are a dozen small operations, which cost a GPU more
    than the batch.

    Args:
        task: What is predicted.
    """

    def __init__(self, task: Task = "single_label") -> None:
        super().__init__()
        self.task = task
        #: Further ones, of torchmetrics, by ``add_metric``.
        self.added = MetricCollection({})
        self._batches: list[tuple[Tensor, Tensor]] = []

    def count(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, C), labels (B,), of several labels (B, C)."""
        self._batches.append((logits.detach(), labels))

    def gathered(self) -> tuple[Tensor, Tensor] | None:
        """Return the logits and labels that were counted, of all processes together, on the CPU; None without rows."""
        own = [torch.cat(parts).cpu() for parts in zip(*self._batches, strict=True)]  # one copy from a GPU
        several = [each for each in processes.gathered(own) if each]
        return (torch.cat([each[0] for each in several]), torch.cat([each[1] for each in several])) if several else None

    def take_values(self, label_names: Sequence[str], thresholds: Tensor | None = None) -> dict[str, float]:
        """Return the metrics as ``named_values``, of all processes together, and reset.

        Args:
            label_names: Names of the C labels.
            thresholds: Of several labels the probabilities from which on each is predicted, (C,).
        """
        computed = dict[str, NDArray]()
        if (counted := self.gathered()) is not None:
            logits, labels = counted
            from_p = None if thresholds is None else thresholds.cpu().double().numpy()
            outputs = Outputs(logits.double().numpy(), labels.numpy(), task=self.task, thresholds=from_p)
            with np.errstate(all="ignore"):  # of a model that has diverged they are NaN
                computed = all_metrics(outputs)
            computed = {"loss": computed["mse" if self.task == "regression" else "loss"], **computed}
        if self.added:
            for logits, labels in self._batches:
                probabilities = logits.to(wide(logits))
                if self.task == "regression":
                    self.added.update(logits[:, 0], labels)
                elif self.task == "single_label":
                    self.added.update(probabilities.softmax(dim=-1), labels)
                else:
                    self.added.update(probabilities.sigmoid(), labels.long())
            computed |= {name: value.float().mean().cpu().numpy() for name, value in self.added.compute().items()}
        self.reset()
        return named_values(computed, label_names, self.task)

    def reset(self) -> None:
        """Forget what was counted."""
        self._batches = []
        self.added.reset()


class TrainCounter(nn.Module):
    """The confusion matrix and the loss of the training rows of an epoch, counted in a few operations.

    Of several labels one matrix each, (label, truth, prediction), from a probability of 0.5 on; of regression none. Its
    tensors keep their addresses, so that a captured CUDA graph can count into them.

    Args:
        num_classes: C.
        task: What is predicted.
    """

    confusion: Tensor
    loss_sum: Tensor
    rows: Tensor

    def __init__(self, num_classes: int, task: Task = "single_label") -> None:
        super().__init__()
        self.num_classes = num_classes
        self.task = task
        matrices: dict[Task, tuple[int, int]] = {"single_label": (1, num_classes), "multi_label": (num_classes, 2)}
        #: How many matrices there are, and the choices of each.
        self.matrices, self.choices = matrices.get(task, (0, 0))
        size = self.matrices * self.choices**2
        self.register_buffer("confusion", torch.zeros(size, dtype=torch.int64), persistent=False)
        self.register_buffer("loss_sum", torch.zeros(()), persistent=False)
        self.register_buffer("rows", torch.zeros((), dtype=torch.int64), persistent=False)

    def count(self, logits: Tensor, labels: Tensor, loss: Tensor, rows: Tensor | None = None) -> None:
        """Count a batch.

        Args:
            logits: (B, C).
            labels: (B,), of several labels (B, C).
            loss: Their mean loss.
            rows: How many of them, the first ones, are there, (); by default all.
        """
        there = torch.ones(len(labels), dtype=torch.int64, device=labels.device)
        if rows is not None:
            there = (torch.arange(len(labels), device=labels.device) < rows).long()
        if self.task == "single_label":
            cells = labels * self.num_classes + logits.detach().argmax(dim=-1)
            self.confusion.index_add_(0, cells, there)
        elif self.task == "multi_label":
            cells = 2 * labels.long() + (logits.detach() >= 0) + 4 * torch.arange(self.matrices, device=labels.device)
            self.confusion.index_add_(0, cells.flatten(), there.repeat_interleave(self.matrices))
        number = there.sum()
        self.loss_sum += loss.detach().float() * number
        self.rows += number

    def take_values(self, label_names: Sequence[str]) -> dict[str, float]:
        """Return the loss and the metrics as ``named_values``, of all processes together, and reset."""
        counted = self.counted()
        rows, computed = int(counted["rows"]), {"loss": (counted["loss_sum"] / counted["rows"]).numpy()}
        if self.matrices and rows:
            single, shares = self.task == "single_label", counted["confusion"].numpy() / rows
            cells = shares.reshape(self.matrices, self.choices, self.choices)
            of_labels = (cells.sum(axis=2), cells.sum(axis=1), cells.diagonal(axis1=1, axis2=2))
            means = np.concatenate([each[0] if single else each[:, 1] for each in of_labels])
            specs = metrics_for(self.task).items()
            computed |= {name: spec.of_training(means, self.task) for name, spec in specs if spec.of_training}
        self.reset()
        return named_values(computed, label_names, self.task)

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


def named_values(
    computed: Mapping[str, NDArray], label_names: Sequence[str], task: Task = "single_label"
) -> dict[str, float]:
    """Named numbers from metrics as of ``all_metrics``.

    For labels (neg, pos): ``accuracy``, ``f1_macro``, ..., ``f1/neg``, ``f1/pos``, ... and, with two
    classes, ``f1_binary``, ``precision_binary``, ``recall_binary`` of the second.
    """
    values: dict[str, float] = {}
    tags = label_tags(label_names)
    for name, value in computed.items():
        if not name.endswith(PER_CLASS):
            values[name] = float(value)
            continue
        kind = name.removesuffix(PER_CLASS)
        values |= {f"{kind}/{tag}": number for tag, number in zip(tags, value.tolist(), strict=True)}
        if len(value) == 2 and task == "single_label":
            values[f"{kind}_binary"] = float(value[1])
    return values


def metric_names(label_names: Sequence[str], task: Task = "single_label") -> list[str]:
    """The names of what is logged of a validation pass: the loss and every metric."""
    names, tags = ["loss"], label_tags(label_names)
    for name in metrics_for(task):
        kind, per_class, _ = name.partition(PER_CLASS)
        names += [f"{kind}/{tag}" for tag in tags] if per_class else [name] * (name != "loss")
        names += [f"{kind}_binary"] if per_class and len(tags) == 2 and task == "single_label" else []
    return names


def label_tags(label_names: Sequence[str]) -> list[str]:
    """Label names as parts of a metric's name: other signs become "_", and no two are the same."""
    tags: list[str] = []
    for i, label in enumerate(label_names):
        tag = re.sub(r"[^\w\-]+", "_", label).strip("_") or f"class_{i}"
        while tag in tags:
            tag += f"_{i}"
        tags.append(tag)
    return tags
