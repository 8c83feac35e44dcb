"""Which state of a text its head reads: the first token's, a language model's the last one's, or the mean of all.

Bases of sentence-transformers were trained through the mean of their last states (Reimers and Gurevych 2019,
arXiv:1908.10084), and say so in ``1_Pooling/config.json``. With few rows their first token is a poor start.
"""

import json
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lora.errors import UserError
from lightning_lora.models.base import Base
from lightning_lora.models.packed import FirstTokens

Pooling = Literal["auto", "first", "last", "mean"]


def choose_pooling(asked: Pooling, base: Base) -> Literal["first", "last", "mean"]:
    """What the head is to read; "auto" is the mean where the base was made for it and the head is new.

    Causal attention shows the whole text to its last token alone, which heads of language models read, and no other.

    Raises:
        UserError: The architecture's head cannot read what is asked for.
    """
    kind, why = base.model.config.model_type, None
    if asked not in (("auto", "last") if base.reads_last else ("auto", "first", "mean")):
        reads = "is a language model, whose head reads the last token" if base.reads_last else "is no language model"
        raise UserError(f"model.pooling: {asked}, but architecture '{kind}' {reads}; give auto")
    if base.reads_last:
        return "last"
    if base.architecture is None:
        why = f"the head of architecture '{kind}' is not known"
    elif hasattr(base.model.config, "classifier_pooling"):
        why = f"architecture '{kind}' has a setting of its own, classifier_pooling in its config.json"
    if asked == "mean" and why is not None:
        raise UserError(f"model.pooling: {why}; give first")
    if asked == "auto":
        return "mean" if why is None and base.fresh_head and pools_mean(base.pooling_file) else "first"
    return asked


def pools_mean(path: Path | None) -> bool:
    """Whether ``1_Pooling/config.json`` says that a base was trained through the mean of its states alone."""
    if path is None:
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if "pooling_mode" in content:  # since sentence-transformers 5.3
        return content["pooling_mode"] == "mean"
    modes = {name for name, value in content.items() if name.startswith("pooling_mode_") and value is True}
    return modes == {"pooling_mode_mean_tokens"}


def read_mean(base: Base, tokens: FirstTokens) -> Base:
    """Let the head read the mean of a text's last states in place of its first token's; return the base, changed.

    What stood between the first token and the head (BERT's pooler) is taken out: it was not trained on means.
    """
    backbone = getattr(base.model, base.model.base_model_prefix)
    parameters = signature(backbone.forward)
    assert base.architecture is not None
    for name in base.architecture.pooler:
        base.model.get_submodule(name.rpartition(".")[0]).pooler = None
        base.head_modules[:] = [module for module in base.head_modules if module != name]

    def pool(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        states = output.last_hidden_state
        if tokens.packed:
            mean = tokens.mean(states)
        else:
            mean = mean_state(states, parameters.bind(*args, **kwargs).arguments["attention_mask"])
        output.last_hidden_state = mean[:, None]  # a batch of one token, for heads that read the first
        if hasattr(output, "pooler_output"):
            output.pooler_output = mean
        return output

    backbone.register_forward_hook(pool, with_kwargs=True)
    return base


def mean_state(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of states (B, T, D) where the mask (B, T) is 1, float32 (B, D)."""
    weights = mask[..., None].float()
    with torch.autocast(states.device.type, enabled=False):
        return (states.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
