"""What is done with the classification head that a base model may bring along: names decide, never shapes.

================================  =============================================================================
the base model's labels           its head
================================  =============================================================================
the same names, the same order    is kept
the same names in another order   is kept, with the rows of its output layer in the order of the data's labels
other names, or LABEL_0, ...      is replaced by a fresh one, as a base model without a head gets
================================  =============================================================================

Names are the same whatever their case ("POSITIVE", "positive"), as long as that tells all of them apart.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

#: What was done with a head that is new begins so.
FRESH = "a fresh head"


def matching_rows(theirs: Sequence[str], ours: Sequence[str]) -> list[int] | None:
    """Give the place among the base model's labels of each of ours, or None where the names are not the same."""
    folded = [[name.strip().casefold() for name in names] for names in (theirs, ours)]
    for have, wanted in ((list(theirs), list(ours)), folded):
        if len(set(have)) == len(have) and sorted(have) == sorted(wanted):
            return [have.index(name) for name in wanted]
    return None


def prepare_head(
    model: Any, missing: set[str], modules: Sequence[str], theirs: Sequence[str], ours: Sequence[str]
) -> str:
    """Keep, reorder or replace the head of a model that was just loaded; say which, as "base model with ...".

    Args:
        model: The model, with a head of the size for our labels.
        missing: Names of the weights that the checkpoint lacks.
        modules: Names of the head's modules.
        theirs: Label names in the base model's config.
        ours: Label names of the data.
    """
    weights = {f"{name}.{key}" for name in modules for key in model.get_submodule(name).state_dict()}
    if weights <= missing:
        return FRESH
    rows = matching_rows(theirs, ours)
    if rows is None or weights & missing:
        redraw(model, modules)
        return f"{FRESH} (its own is for {', '.join(theirs)})"
    if rows == sorted(rows):
        return "its own head"
    reorder(model, rows)
    return f"its own head, reordered from {', '.join(theirs)}"


class ScaledLinear(nn.Linear):
    """The last layer of a head that predicts a number: what it gives is scaled to the units of the data.

    So weights and learning rate need not follow these units. A layer without a bias, as heads of language models are,
    can hold no mean in its weights: it is scaled by the root of the mean square instead.
    """

    mean: Tensor
    sd: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("mean", torch.zeros(1, device=layer.weight.device))
        self.register_buffer("sd", torch.ones(1, device=layer.weight.device))

    def forward(self, input: Tensor) -> Tensor:
        """Numbers (..., 1) of states (..., H)."""
        return super().forward(input) * self.sd + self.mean

    def folded(self) -> nn.Linear:
        """The plain layer that gives the same."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        plain.weight = nn.Parameter(self.weight.detach() * self.sd, self.weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach() * self.sd + self.mean, self.bias.requires_grad)
        return plain


def make_scalable(model: Any, modules: Sequence[str]) -> None:
    """Let the last layer of a fresh head be scaled."""
    layers = [
        f"{module}.{name}".rstrip(".")
        for module in modules
        for name, layer in model.get_submodule(module).named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1
    ]
    if layers:
        model.set_submodule(layers[-1], ScaledLinear(model.get_submodule(layers[-1])))


def scale_output(model: nn.Module, mean: float, sd: float) -> None:
    """Set the units of what a model predicts, where it can be scaled: mean and standard deviation of the truth."""
    for layer in model.modules():
        if isinstance(layer, ScaledLinear):
            layer.mean.fill_(mean if layer.bias is not None else 0)
            layer.sd.fill_(sd if layer.bias is not None else math.hypot(mean, sd))


def fold_scale(model: nn.Module) -> None:
    """Put the scale into the weights, as other software knows no ``ScaledLinear``: the model gives the same."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ScaledLinear):
            model.set_submodule(name, layer.folded())


def divide_output(model: nn.Module, outputs: int, by: float) -> None:
    """Divide what the last layer of a head, with so many outputs, gives by a number: its weights, and its bias if any.

    With an adapter a head that is trained whole is a copy of the original one, which stays.
    """
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == outputs and ".original_module" not in name
    ]
    with torch.no_grad():
        for parameter in layers[-1].parameters():
            parameter.div_(by)


def outside_backbone(model: Any) -> list[str]:
    """Give the names of a model's modules beside its encoder that hold weights."""
    return [
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    ]


def unloaded(config: Any) -> Any:
    """Make a model of the config without memory for its weights, to look at its modules and shapes."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def redraw(model: Any, modules: Sequence[str]) -> None:
    """Draw the weights of modules as transformers draws those that a checkpoint lacks."""
    for name in modules:
        head = model.get_submodule(name)
        for module in head.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(torch.zeros_like(parameter)))  # transformers skips loaded ones
        head.apply(model._init_weights)


def reorder(model: Any, rows: Sequence[int]) -> None:
    """Put what a head gives for each label into another order: place i gets what was at ``rows[i]``."""
    config = copy.deepcopy(model.config)
    config.num_labels += 1  # what then has another shape has a row a label
    other = dict(unloaded(config).named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for dim, (size, larger) in enumerate(zip(parameter.shape, other[name].shape, strict=True)):
                if size != larger:
                    parameter.copy_(parameter.index_select(dim, torch.tensor(rows, device=parameter.device)))
