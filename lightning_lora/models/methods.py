"""The ways to fine-tune a base model. A new one is one entry in ``METHODS``."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, TaskType, VeraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_lora.errors import UserError, check_range
from lightning_lora.models.base import Base, below_layer, linear_modules
from lightning_lora.seeding import torch_stream

if TYPE_CHECKING:
    from lightning_lora.models.adalora import AdaLoraSteps


@dataclass
class AdapterOptions:
    """Options of PEFT methods, in the field's words. One that a method does not take is refused.

    Args:
        rank: Rank r of the update, at least 1; by default 8 (vera 256). The mean rank that adalora ends with.
        alpha: The update is scaled by alpha / rank (rslora: alpha / sqrt(rank)).
        dropout: Dropout on the adapter's input, from 0 up to 1. On a CPU drawing its random numbers for
            every adapted layer takes half of a step or more (docs/LOG.md).
        target_modules: "all_linear", "attention", "query_value", "query", or endings of module names.
        bias: Train "none" of the biases, those of the adapted layers ("lora_only"), or "all".
        lora_plus_ratio: Learning rate of B over that of A, for lora_plus.
        modules_to_save: Further modules to train and save whole, besides the head.
    """

    rank: int | None = None
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all_linear"
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_plus_ratio: float = 16
    modules_to_save: list[str] | None = None


@dataclass(frozen=True)
class AdaptedModel:
    """A model made ready for training: frozen and trainable weights are set, everything is in train mode.

    Args:
        model: The model to call: the base itself, or PEFT's wrapper around it.
        target_modules: Full names of the adapted layers.
        head_modules: Names of the modules that are trained whole.
        lr_factors: The learning rate of parameters whose name holds the key is multiplied by the value.
        steps: What the method does beside the gradient step, for one that does.
    """

    model: Any
    target_modules: list[str]
    head_modules: list[str]
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    steps: "AdaLoraSteps | None" = None


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Args:
        summary: One line for people.
        learning_rate: What is used when ``model.learning_rate`` is not set; 0 where nothing is trained by steps.
        apply: Gives the tuned model from the base and the options.
        options: The fields of ``AdapterOptions`` that the method takes; others must keep their default.
        rank: What is used when ``adapter.rank`` is not set.
        bits: Bits in which the encoder may be stored, if it is quantized.
        cpu_bits: The same without a GPU.
        frozen_encoder: Whether the pretrained weight matrices of the encoder stay as they are.
        stops_early: Whether what it has learnt before the last step can be kept.
        weighs_classes: Whether ``model.class_weights`` make a difference.
    """

    summary: str
    learning_rate: float
    apply: Callable[[Base, AdapterOptions], AdaptedModel]
    options: tuple[str, ...] = ()
    rank: int = 8
    bits: tuple[int, ...] = (8, 4)
    cpu_bits: tuple[int, ...] = (8, 4)
    frozen_encoder: bool = True
    stops_early: bool = True
    weighs_classes: bool = True

    @property
    def trains(self) -> bool:
        """Whether it is trained by steps."""
        return self.learning_rate > 0


def tune(base: Base, method: str, options: AdapterOptions, seed: int, frozen_dropout: bool) -> AdaptedModel:
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
    encoder = getattr(base.model, base.model.base_model_prefix)
    if entry.frozen_encoder and not frozen_dropout:  # before the adapter brings dropout of its own
        for module in encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    with torch_stream(seed, "adapter"):
        tuned = entry.apply(base, replace(options, rank=options.rank or entry.rank))
    # Hugging Face models load in eval mode and the trainer keeps the mode it finds.
    tuned.model.train()
    return tuned


def merged(tuned: AdaptedModel) -> Any:
    """The tuned model as a plain transformers model, adapters folded into the weights; in place."""
    if not isinstance(tuned.model, PeftModel):
        return tuned.model
    base = tuned.model.get_base_model()
    for name, module in [*base.named_modules()]:  # PEFT (0.21) takes that of IA3 and VeRA for a single layer
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, module.modules_to_save[str(module.active_adapter)])
    return tuned.model.merge_and_unload()


def find_method(method: str) -> Method:
    """The entry of a method; refuse another name."""
    known = METHODS | BASELINES
    if method not in known:
        raise UserError(f"model.method: no method '{method}'; there are {', '.join(known)}")
    return known[method]


def check_options(method: str, options: AdapterOptions) -> None:
    """Refuses values out of range and options that the method would ignore."""
    takes = find_method(method).options
    for option in fields(AdapterOptions):
        value = getattr(options, option.name)
        if option.name not in takes and value != option.default:
            allowed = ", ".join(takes) or "no adapter options"
            raise UserError(
                f"model.adapter.{option.name}: {value}, but method '{method}' does not use it (it takes {allowed})"
            )
    if options.rank is not None and options.rank < 1:
        raise UserError(f"model.adapter.rank: a number of at least 1 is needed, got {options.rank}")
    for name in ("alpha", "lora_plus_ratio"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"model.adapter.{name}: a number above 0 is needed, got {value}")
    check_range("model.adapter.dropout", options.dropout, 0, 1)


def applied(options: AdapterOptions, method: str) -> dict[str, Any]:
    """The options of a method that change what trained weights do and do not show in their shapes."""
    return {"alpha": float(options.alpha)} if "alpha" in find_method(method).options else {}


def match_targets(base: Base, target_modules: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers of the encoder that the option means, in the model's order.

    Raises:
        UserError: A name matches nothing (the candidates are listed), or the keyword is not known for
            this architecture.
    """
    linear, arch = linear_modules(base), base.architecture
    if target_modules == "all_linear" and linear:
        return linear
    # The path below the numbered layer is the shortest unambiguous ending.
    candidates = ", ".join(dict.fromkeys(below_layer(name) for name in linear))
    endings: Sequence[str] = [target_modules] if isinstance(target_modules, str) else target_modules
    if target_modules in ("attention", "query_value", "query"):
        if arch is None:
            raise UserError(
                f"model.adapter.target_modules: '{target_modules}' is not known for architecture "
                f"'{base.model.config.model_type}'; use all_linear or names among {candidates}"
            )
        known: dict[Any, Sequence[str]] = {"attention": arch.attention, "query_value": arch.query_value}
        endings = known.get(target_modules, arch.query_value[:1])
    if not endings or not linear:
        what = "no layer is named" if linear else "the encoder has no plain linear layer to adapt"
        instead = candidates or "model.method: full or head, or another base model"
        raise UserError(f"model.adapter.target_modules: {what}; use {instead}")
    for ending in endings:
        if not any(_ends_with(name, ending) for name in linear):
            raise UserError(
                f"model.adapter.target_modules: '{ending}' matches no linear layer of the encoder; candidates: "
                f"{candidates}, or all_linear, attention, query_value, query"
            )
    return [name for name in linear if any(_ends_with(name, ending) for ending in endings)]


def _ends_with(name: str, ending: str) -> bool:
    """Whether the last parts of a module's full name are these."""
    return name == ending or name.endswith(f".{ending}")


def _with_adapter(
    base: Base, options: AdapterOptions, kind: Callable[..., Any], targets: Sequence[str] | None = None, **settings: Any
) -> AdaptedModel:
    """The base model with PEFT's adapter on the layers that are named; the head, and what the user names, is trained.

    Args:
        base: The base model.
        options: The method's options.
        kind: PEFT's class of settings.
        targets: Full names of the adapted layers; by default those that the options mean.
        settings: Others of PEFT's.
    """
    targets = match_targets(base, options.target_modules) if targets is None else targets
    extra = options.modules_to_save or []
    for name in extra:
        if not any(_ends_with(module, name) for module, _ in base.model.named_modules()):
            raise UserError(f"model.adapter.modules_to_save: the model has no module '{name}'")
    head = [*base.head_modules, *extra]
    config = kind(task_type=TaskType.SEQ_CLS, target_modules=[*targets], modules_to_save=[*head], **settings)
    if hasattr(config, "fan_in_fan_out"):  # GPT-2's linear layers hold their weights transposed
        config.fan_in_fan_out = any(isinstance(base.model.get_submodule(name), Conv1D) for name in targets)
    return AdaptedModel(get_peft_model(base.model, config), [*targets], head)


def _lora(base: Base, options: AdapterOptions, **variant: Any) -> AdaptedModel:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) through PEFT, with the settings of a variant."""
    settings = {"lora_alpha": options.alpha, "lora_dropout": options.dropout, "bias": options.bias, **variant}
    return _with_adapter(base, options, LoraConfig, r=options.rank, **settings)


def _lora_plus(base: Base, options: AdapterOptions) -> AdaptedModel:
    """LoRA whose B learns faster than its A (Hayou et al. 2024, arXiv:2402.12354)."""
    return replace(_lora(base, options), lr_factors={"lora_B": options.lora_plus_ratio})


def _adalora(base: Base, options: AdapterOptions) -> AdaptedModel:
    """AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ranks move to the layers that need them.

    It starts with one and a half times the rank it ends with, as in the paper's experiments.
    """
    from lightning_lora.models.adalora import AdaLoraSteps

    tuned = _with_adapter(
        base,
        options,
        AdaLoraConfig,
        init_r=math.ceil(1.5 * (options.rank or 0)),
        target_r=options.rank,
        total_step=1,  # set when the trainer knows it
        tinit=0,
        tfinal=0,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
    )
    return replace(tuned, steps=AdaLoraSteps(tuned.model))


def _ia3(base: Base, options: AdapterOptions) -> AdaptedModel:
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): keys, values and the feed-forward activations are rescaled."""
    arch = base.architecture
    if arch is None:
        raise UserError(f"model.method: ia3 is not known for architecture '{base.model.config.model_type}'")
    linear = linear_modules(base)
    feed_forward = [name for name in linear if below_layer(name) == arch.feed_forward_out]
    attention = match_targets(base, (arch.key, arch.query_value[-1]))
    targets = [name for name in linear if name in feed_forward or name in attention]
    return _with_adapter(base, options, IA3Config, targets, feedforward_modules=feed_forward)


def _vera(base: Base, options: AdapterOptions) -> AdaptedModel:
    """VeRA (Kopiczko et al. 2024, arXiv:2310.11454): vectors are trained around random matrices that all share."""
    drawn = int(torch.randint(2**31 - 1, ()))  # from the adapter's stream, so that PEFT's matrices are the seed's
    settings: dict[str, Any] = {"projection_prng_key": drawn, "vera_dropout": options.dropout}
    return _with_adapter(base, options, VeraConfig, r=options.rank, **settings)


def _none(base: Base, options: AdapterOptions) -> AdaptedModel:
    """Nothing is trained: what the base model says with its head."""
    base.model.requires_grad_(False)
    return AdaptedModel(base.model, [], base.head_modules)


def _head(base: Base, options: AdapterOptions) -> AdaptedModel:
    """Only the head (and what else was newly initialised) is trained, on a frozen base."""
    tuned = _none(base, options)
    for name in base.head_modules:
        base.model.get_submodule(name).requires_grad_(True)
    return tuned


def _bitfit(base: Base, options: AdapterOptions) -> AdaptedModel:
    """BitFit (Ben Zaken et al. 2022, arXiv:2106.10199): the biases and the head are trained."""
    encoder = getattr(base.model, base.model.base_model_prefix)
    biases = [name for name, _ in encoder.named_parameters() if name.endswith("bias")]
    if not biases:
        raise UserError(f"model.method: bitfit trains biases, and '{base.model.config.model_type}' has none")
    tuned = _head(base, options)
    for name in biases:
        encoder.get_parameter(name).requires_grad_(True)
    return tuned


def _full(base: Base, options: AdapterOptions) -> AdaptedModel:
    """Every weight is trained."""
    base.model.requires_grad_(True)
    return AdaptedModel(base.model, [], base.head_modules)


def _probe(base: Base, options: AdapterOptions) -> AdaptedModel:
    """Nothing is trained by steps; pooled states are classified."""
    from lightning_lora.models.baselines import Probe

    return AdaptedModel(Probe(base.model, base.model.config.num_labels), [], ["classifier"])


_SOME = ("rank", "alpha", "dropout", "target_modules", "modules_to_save")
_LORA = (*_SOME[:4], "bias", "modules_to_save")

# Learning rates are starting points near those of the papers' experiments on classification (head, lora, full: sweeps
# of this project on MiniLM, docs/LOG.md; recipes of larger bases have lower ones).
METHODS: dict[str, Method] = {
    "lora": Method("low-rank adapters on a frozen base", 1e-3, _lora, _LORA),
    # Kalajdzievski 2023, arXiv:2312.03732
    "rslora": Method("LoRA scaled by alpha / sqrt(rank), for high ranks", 1e-3, partial(_lora, use_rslora=True), _LORA),
    # Liu et al. 2024, arXiv:2402.09353. Reading an 8-bit weight on the CPU loses its scales (PEFT 0.21.2,
    # dequantize_module_weight).
    "dora": Method(
        "LoRA on the direction, with a trained magnitude", 1e-3, partial(_lora, use_dora=True), _LORA, cpu_bits=(4,)
    ),
    "lora_plus": Method("LoRA whose B learns faster", 2e-4, _lora_plus, (*_LORA, "lora_plus_ratio")),
    # Meng et al. 2024, arXiv:2404.02948
    "pissa": Method(
        "LoRA started from the weights' principal components",
        2e-4,
        partial(_lora, init_lora_weights="pissa"),
        _LORA,
        bits=(),
    ),
    "adalora": Method("LoRA that moves rank to the layers that need it", 1e-3, _adalora, _SOME, stops_early=False),
    "ia3": Method("trained rescaling of keys, values and activations", 5e-3, _ia3, ("modules_to_save",)),
    "vera": Method(
        "vectors around shared random matrices",
        5e-3,
        _vera,
        ("rank", "dropout", "target_modules", "modules_to_save"),
        rank=256,
    ),
    "bitfit": Method("only biases and head", 1e-3, _bitfit, bits=()),
    "full": Method("full fine-tuning", 1e-4, _full, bits=(), frozen_encoder=False),
    "head": Method("a trained head on a frozen base", 1e-2, _head),
    "none": Method("the base model and its head, untouched", 0.0, _none, weighs_classes=False),
}
#: What a fine-tuned model must beat; methods too, fitted without steps (``models/baselines.py``).
BASELINES: dict[str, Method] = {
    "majority": Method("the most frequent class, or the mean", 0.0, _none, bits=(), weighs_classes=False),
    "tfidf": Method("logistic or ridge regression on TF-IDF n-grams", 0.0, _none, bits=()),
    "probe": Method("logistic or ridge regression on pooled states", 0.0, _probe, bits=()),
}
