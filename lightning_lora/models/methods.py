"""The ways to fine-tune a base model. A new PEFT method is one entry in ``METHODS``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from lightning_lora.errors import UserError
from lightning_lora.models.base import Base, linear_modules
from lightning_lora.seeding import torch_stream


@dataclass
class AdapterOptions:
    """Options of PEFT methods, in the field's words.

    Args:
        rank: Rank r of the update, a number of at least 1.
        alpha: The update is scaled by alpha / rank (alpha / sqrt(rank) with rsLoRA).
        dropout: Dropout on the adapter's input, from 0 up to 1. On a CPU drawing its random numbers for
            every adapted layer takes half of a step or more (docs/LOG.md).
        target_modules: "all_linear", "attention", "query_value", or endings of module names.
        bias: Train "none" of the biases, those of the adapted layers ("lora_only"), or "all".
        use_rslora: Scale by alpha / sqrt(rank), for high ranks (Kalajdzievski 2023, arXiv:2312.03732).
        modules_to_save: Further modules to train and save whole, besides the head.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all_linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None


@dataclass(frozen=True)
class Tuned:
    """A model made ready for training: frozen and trainable weights are set, everything is in train mode.

    Args:
        model: The model to call: the base itself, or PEFT's wrapper around it.
        target_modules: Full names of the adapted layers.
        head_modules: Names of the modules that are trained whole.
    """

    model: Any
    target_modules: list[str]
    head_modules: list[str]


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        summary: One line for people.
        learning_rate: What is used when ``model.learning_rate`` is not set.
        frozen_encoder: Whether the pretrained weights of the encoder stay as they are.
        options: The fields of ``AdapterOptions`` that the method takes; others must keep their default.
        apply: Gives the tuned model from the base and the options.
    """

    summary: str
    learning_rate: float
    frozen_encoder: bool
    options: tuple[str, ...]
    apply: Callable[[Base, AdapterOptions], Tuned]


def tune(base: Base, method: str, options: AdapterOptions, seed: int, frozen_dropout: bool) -> Tuned:
    """The base model prepared for the method; what it initialises is a function of the seed.

    Args:
        base: The loaded base model; it is changed in place.
        method: A key of ``METHODS``.
        options: The method's options.
        seed: The run's seed; the adapter has a stream of its own.
        frozen_dropout: Keep the dropout of the frozen encoder. Off, its random numbers, up to half of a
            step's time on a CPU, are not drawn; the dropout of adapter and head stays.

    Raises:
        UserError: No such method, an option it does not take, or no module matches.
    """
    entry = find_method(method)
    check_options(method, options)
    if frozen_dropout and not entry.frozen_encoder:
        raise UserError(f"model.frozen_dropout: method '{method}' freezes nothing, and dropout is on; leave it out")
    with torch_stream(seed, "adapter"):
        tuned = entry.apply(base, options)
    encoder = getattr(base.model, base.model.base_model_prefix)
    if entry.frozen_encoder and not frozen_dropout:
        for name, module in encoder.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
                module.p = 0.0
    # Hugging Face models load in eval mode and the trainer keeps the mode it finds.
    tuned.model.train()
    return tuned


def find_method(method: str) -> Method:
    """The entry of a method.

    Raises:
        UserError: There is none of that name.
    """
    if method not in METHODS:
        raise UserError(f"model.method: no method '{method}'; there are {', '.join(METHODS)}")
    return METHODS[method]


def check_options(method: str, options: AdapterOptions) -> None:
    """Refuses values out of range and options that the method would ignore."""
    takes = METHODS[method].options
    for field in fields(AdapterOptions):
        value = getattr(options, field.name)
        if field.name not in takes and value != field.default:
            allowed = ", ".join(takes) or "no adapter options"
            raise UserError(
                f"model.adapter.{field.name}: {value}, but method '{method}' does not use it (it takes {allowed})"
            )
    if options.rank < 1:
        raise UserError(f"model.adapter.rank: a number of at least 1 is needed, got {options.rank}")
    if not (math.isfinite(options.alpha) and options.alpha > 0):
        raise UserError(f"model.adapter.alpha: a number above 0 is needed, got {options.alpha}")
    if not 0 <= options.dropout < 1:
        raise UserError(f"model.adapter.dropout: a number from 0 up to 1 is needed, got {options.dropout}")


def match_targets(base: Base, target_modules: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers of the encoder that the option means, in the model's order.

    Raises:
        UserError: A name matches nothing (the candidates are listed), or the keyword is not known for
            this architecture.
    """
    linear = linear_modules(base)
    if target_modules == "all_linear" and linear:
        return linear
    if target_modules in ("attention", "query_value"):
        if base.architecture is None:
            kind = base.model.config.model_type
            raise UserError(
                f"model.adapter.target_modules: '{target_modules}' is not known for architecture '{kind}'; use "
                f"all_linear or names among {_candidates(linear)}"
            )
        endings: Sequence[str] = getattr(base.architecture, str(target_modules))
    else:
        endings = [target_modules] if isinstance(target_modules, str) else target_modules
    if not endings or not linear:
        what = "no layer is named" if linear else "the encoder has no plain linear layer"
        raise UserError(f"model.adapter.target_modules: {what}; use {_candidates(linear) or 'another base model'}")
    for ending in endings:
        if not any(_ends_with(name, ending) for name in linear):
            raise UserError(
                f"model.adapter.target_modules: '{ending}' matches no linear layer of the encoder; candidates: "
                f"{_candidates(linear)}, or all_linear, attention, query_value"
            )
    return [name for name in linear if any(_ends_with(name, ending) for ending in endings)]


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _candidates(linear: Sequence[str]) -> str:
    # The path below the numbered layer is the shortest unambiguous ending.
    endings = [name[max(i for i, part in enumerate(name) if part.isdecimal()) + 2 :] for name in linear]
    return ", ".join(dict.fromkeys(endings))


def _lora(base: Base, options: AdapterOptions) -> Tuned:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets = match_targets(base, options.target_modules)
    extra = options.modules_to_save or []
    have = {name for name, _ in base.model.named_modules()}
    for name in extra:
        if not any(_ends_with(module, name) for module in have):
            raise UserError(f"model.adapter.modules_to_save: the model has no module '{name}'")
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=options.rank,
        lora_alpha=options.alpha,  # type: ignore[arg-type]  # annotated int, but only used as a factor
        lora_dropout=options.dropout,
        target_modules=list(targets),
        bias=options.bias,
        use_rslora=options.use_rslora,
        modules_to_save=[*base.head_modules, *extra],
    )
    model = get_peft_model(base.model, config)
    return Tuned(model, targets, [*base.head_modules, *extra])


def _head(base: Base, options: AdapterOptions) -> Tuned:
    """Only the head (and what else was newly initialised) is trained, on a frozen base."""
    del options
    base.model.requires_grad_(False)
    for name in base.head_modules:
        base.model.get_submodule(name).requires_grad_(True)
    return Tuned(base.model, [], base.head_modules)


def _full(base: Base, options: AdapterOptions) -> Tuned:
    """Every weight is trained."""
    del options
    base.model.requires_grad_(True)
    return Tuned(base.model, [], base.head_modules)


_LORA_OPTIONS = tuple(field.name for field in fields(AdapterOptions))

METHODS: dict[str, Method] = {
    "lora": Method("low-rank adapters on a frozen base", 5e-4, True, _LORA_OPTIONS, _lora),
    "full": Method("full fine-tuning", 5e-5, False, (), _full),
    "head": Method("a trained head on a frozen base", 1e-3, True, (), _head),
}
