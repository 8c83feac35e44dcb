"""Counts the metrics of ``metric_table.py`` in training and evaluation, by torchmetrics."""

import re
import sys
from collections.abc import Mapping, Sequence

import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, SpearmanCorrCoef
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.functional import pearson_corrcoef
from torchmetrics.utilities import dim_zero_cat

from lightning_lora import processes
from lightning_lora.evaluation.documents import wide
from lightning_lora.evaluation.metric_table import METRICS, metrics_for
from lightning_lora.tasks import Task

PER_CLASS = "_per_class"
#: Training rows whose classes are counted together at the end of an epoch.
_AT_ONCE = 2**20


class MatthewsCorrelation(MulticlassConfusionMatrix):
    """Matthews correlation as scikit-learn has it: 0 where all rows are of one class, or are said to be.

    ``MatthewsCorrCoef`` then gives other numbers, such as 1 where all of them are right.
    """

    def compute(self) -> Tensor:
        """Return the correlation, ()."""
        shares = (self.confmat.double() / self.confmat.sum()).cpu()
        means = torch.cat([shares.sum(1), shares.sum(0), shares.diagonal()]).numpy()
        value = METRICS["matthews_correlation"].value
        assert value is not None
        return torch.as_tensor(value(means, "single_label"))


class SpearmanCorrelation(SpearmanCorrCoef):
    """Spearman's correlation as SciPy has it: NaN where all predictions, or all labels, are equal, not 0."""

    def compute(self) -> Tensor:
        """Return the correlation, ()."""
        preds, target = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if (preds == preds[0]).all() or (target == target[0]).all():
            return preds.new_tensor(torch.nan)
        return self.of_values(preds, target)

    def of_values(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the correlation, (), of values that differ, (N,) each."""
        return super().compute()


class PearsonCorrelation(SpearmanCorrelation):
    """Pearson's correlation as SciPy has it; torchmetrics' own gives for equal predictions what rounding leaves."""

    def of_values(self, preds: Tensor, target: Tensor) -> Tensor:
        """Return the correlation, (), of values that differ, (N,) each."""
        return pearson_corrcoef(preds.double(), target.double()).to(preds.dtype)


def make_metrics(num_classes: int, training: bool = False, task: Task = "single_label") -> MetricCollection:
    """All metrics of a task as one collection; of single labels it takes probabilities (B, C) and labels (B,).

    Args:
        num_classes: C.
        training: Leave out those that training rows do not have; the others take predicted classes (B,) too, or
            whether each label is predicted, (B, C).
        task: What is predicted.
    """
    sizes: dict[Task, dict[str, str | int]] = {
        "single_label": {"task": "multiclass", "num_classes": num_classes},
        "multi_label": {"task": "multilabel", "num_labels": num_classes},
    }
    size: dict[str, str | int] = dict(sizes.get(task, {}))
    if training:
        size["sync_on_compute"] = False  # ``TrainCounter`` has the rows of all processes
    metrics = {
        name: spec.torch_metric(torchmetrics, size)
        for name, spec in metrics_for(task).items()
        if spec.torch_metric is not None and (spec.of_training or not training)
    }
    return MetricCollection(metrics, compute_groups=task == "single_label")


class EvaluationCounter(nn.Module):
    """All metrics and the mean loss of validation or test rows.

    Batches are kept and counted together at the end: the metrics are a dozen small operations, which cost a GPU more
    than the batch.

    Args:
        num_classes: C.
        task: What is predicted.
    """

    def __init__(self, num_classes: int, task: Task = "single_label") -> None:
        super().__init__()
        self.task = task
        self.metrics = make_metrics(num_classes, task=task)
        self.loss = MeanMetric()
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def count(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Count a batch: logits (B, C), labels (B,), of several labels (B, C), and their mean loss."""
        self._batches.append((logits.detach(), labels, loss.detach()))

    def gathered(self) -> tuple[Tensor, Tensor] | None:
        """Return the logits and labels that were counted, of all processes together, on the CPU; None without rows."""
        own = [(logits.cpu(), labels.cpu()) for logits, labels, _ in self._batches]
        batches = [batch for each in processes.gathered(own) for batch in each]
        return (torch.cat([each[0] for each in batches]), torch.cat([each[1] for each in batches])) if batches else None

    def take_values(self, label_names: Sequence[str], thresholds: Tensor | None = None) -> dict[str, float]:
        """Return the loss and the values of ``metric_values``, and reset.

        Args:
            label_names: Names of the C labels.
            thresholds: Of several labels the probabilities from which on each is predicted, (C,).
        """
        if self._batches:
            logits, labels, losses = zip(*self._batches, strict=True)
            together, target = torch.cat(logits), torch.cat(labels)
            if self.task == "single_label":
                # Probabilities, as the calibration error would take logits that happen to lie between 0 and 1 for such;
                # in double precision, so that the largest is the largest logit.
                self.metrics.update(together.softmax(dim=-1, dtype=wide(together)), target)
            elif self.task == "regression":
                self.metrics.update(together[:, 0], target)
            else:
                assert thresholds is not None
                scores = together.to(wide(together)).sigmoid()
                predicted = (scores >= thresholds).long()
                for name, metric in self.metrics.items():
                    takes_scores = name not in METRICS or METRICS[name].of_scores
                    metric.update(scores if takes_scores else predicted, target.long())
            self.loss.update(torch.stack(losses), torch.tensor([len(each) for each in labels]).to(together.device))
        values = {"loss": self.loss.compute().item(), **metric_values(self.metrics.compute(), label_names, self.task)}
        self.reset()
        return values

    def reset(self) -> None:
        """Forget what was counted."""
        self._batches = []
        self.metrics.reset()
        self.loss.reset()


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
        """Return the loss and the values of ``metric_values``, of all processes together, and reset."""
        counted = self.counted()
        metrics = make_metrics(self.num_classes, training=True, task=self.task)
        cells = counted["confusion"].view(self.matrices, self.choices**2).cumsum(1)
        total, at_once = int(counted["rows"]), max(1, _AT_ONCE // max(1, self.matrices))
        for start in range(0, total if self.matrices else 0, at_once):
            rows = torch.arange(start, min(start + at_once, total))
            # Rows with the same counts in each matrix: which labels stand together is not known.
            found = torch.searchsorted(cells, rows.expand(self.matrices, -1).contiguous(), right=True)
            found = found[0] if self.task == "single_label" else found.T
            metrics.update(found % self.choices, found // self.choices)
        loss = (counted["loss_sum"] / counted["rows"]).item()
        self.reset()
        if not total:  # a ``training_step`` of one's own, which counts nothing
            return {}
        values = metric_values(metrics.compute(), label_names, self.task) if self.matrices else {}
        return {"loss": loss, **values}

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


def metric_values(
    computed: dict[str, Tensor], label_names: Sequence[str], task: Task = "single_label"
) -> dict[str, float]:
    """Named numbers from what ``make_metrics(...).compute()`` gives.

    For labels (neg, pos): ``accuracy``, ``f1_macro``, ..., ``f1/neg``, ``f1/pos``, ... and, with two
    classes, ``f1_binary``, ``precision_binary``, ``recall_binary`` of the second.
    """
    values: dict[str, float] = {}
    tags = label_tags(label_names)
    for name, value in computed.items():
        if not name.endswith(PER_CLASS):
            values[name] = value.float().mean().item()  # of one value a row, or of the only one
            continue
        kind = name.removesuffix(PER_CLASS)
        per_class = value.tolist()
        values |= {f"{kind}/{tag}": number for tag, number in zip(tags, per_class, strict=True)}
        if len(per_class) == 2 and task == "single_label":
            values[f"{kind}_binary"] = per_class[1]
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
