"""Which modules of a base model are adapted, and which are trained and saved whole."""

from collections.abc import Sequence
from typing import Any

from lightning_lora.errors import UserError
from lightning_lora.models.base import Base, below_layer, linear_modules


def match_targets(base: Base, target_modules: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers of the encoder that the option means, in the model's order.

    Raises:
        UserError: A name matches nothing (the candidates are listed), or the keyword is not known for
            this architecture.
    """
    linear = linear_modules(base)
    if target_modules == "all_linear" and linear:
        return linear
    if target_modules in ("attention", "query_value", "query"):
        arch = base.architecture
        if arch is None:
            kind = base.model.config.model_type
            raise UserError(
                f"model.adapter.target_modules: '{target_modules}' is not known for architecture '{kind}'; use "
                f"all_linear or names among {_candidates(linear)}"
            )
        known: dict[Any, Sequence[str]] = {"attention": arch.attention, "query_value": arch.query_value}
        endings = known.get(target_modules, arch.query_value[:1])
    else:
        endings = [target_modules] if isinstance(target_modules, str) else target_modules
    if not endings or not linear:
        what = "no layer is named" if linear else "the encoder has no plain linear layer to adapt"
        instead = _candidates(linear) or "model.method: full or head, or another base model"
        raise UserError(f"model.adapter.target_modules: {what}; use {instead}")
    for ending in endings:
        if not any(ends_with(name, ending) for name in linear):
            raise UserError(
                f"model.adapter.target_modules: '{ending}' matches no linear layer of the encoder; candidates: "
                f"{_candidates(linear)}, or all_linear, attention, query_value, query"
            )
    return [name for name in linear if any(ends_with(name, ending) for ending in endings)]


def ends_with(name: str, ending: str) -> bool:
    """Whether the last parts of a module's full name are these."""
    return name == ending or name.endswith(f".{ending}")


def _candidates(linear: Sequence[str]) -> str:
    # The path below the numbered layer is the shortest unambiguous ending.
    return ", ".join(dict.fromkeys(below_layer(name) for name in linear))


def saved_modules(base: Base, extra: Sequence[str]) -> list[str]:
    """The head, and what the user names besides."""
    have = {name for name, _ in base.model.named_modules()}
    for name in extra:
        if not any(ends_with(module, name) for module in have):
            raise UserError(f"model.adapter.modules_to_save: the model has no module '{name}'")
    return [*base.head_modules, *extra]
