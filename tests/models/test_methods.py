from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_lora.errors import UserError
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.base import Base, load_base
from lightning_lora.models.methods import METHODS, AdapterOptions, match_targets, tune
from tests.conftest import LANGUAGE_MODELS

LABELS = ["a", "b", "c"]
INPUTS = {"input_ids": torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])}
INPUTS["attention_mask"] = (INPUTS["input_ids"] != 0).long()
#: Linear layers of one encoder layer by architecture, read off the published model diagrams.
LINEAR_PER_LAYER = {"modernbert": 4, **dict.fromkeys(LANGUAGE_MODELS, 7), "gpt2": 4, "phi": 6, "phi3": 4}
#: Those whose queries, keys and values come of one layer.
FUSED = ("modernbert", "gpt2", "phi3")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**INPUTS).logits


def load(path: Path, seed: int = 0) -> Base:
    return load_base(str(path), LABELS, seed)


def step(model: nn.Module) -> None:
    """One large optimizer step, in training mode."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    nn.functional.cross_entropy(model.train()(**INPUTS).logits, torch.tensor([0, 1])).backward()
    optimizer.step()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_adapts_its_layers_and_never_its_head(make_base, model_type: str) -> None:
    base = load(make_base(model_type))
    tuned = tune(base, "lora", AdapterOptions(), 0, frozen_dropout=False)
    layers = 1 if model_type == "albert" else 2  # ALBERT's layers share their weights
    assert len(tuned.target_modules) == layers * LINEAR_PER_LAYER.get(model_type, 6)
    trainable = {name for name, p in tuned.model.named_parameters() if p.requires_grad}
    adapted = {name for name in trainable if "lora_" in name}
    assert len(adapted) == 2 * len(tuned.target_modules)
    heads = tuple(f"base_model.model.{module}." for module in base.head_modules)
    assert all(name.startswith(heads) for name in trainable - adapted)
    assert not any(name.startswith(heads) for name in adapted)
    for head in heads:  # each of them is trained, not only those that PEFT knows
        assert any(name.startswith(head) for name in trainable), head


@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("keyword", ["query_value", "attention"])
def test_every_architecture_knows_its_attention(make_base, model_type: str, keyword: str) -> None:
    names = match_targets(load(make_base(model_type)), keyword)
    layers = 1 if model_type == "albert" else 2
    fused = model_type in FUSED
    assert (
        len(names)
        == layers * ({"query_value": 1, "attention": 2} if fused else {"query_value": 2, "attention": 4})[keyword]
    )
    assert all("att" in name for name in names)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_fresh_lora_model_says_what_the_base_says_and_only_adapter_and_head_learn(make_base, model_type) -> None:
    path = make_base(model_type)
    expected = logits(load(path).model)
    tuned = tune(load(path), "lora", AdapterOptions(), 0, frozen_dropout=False)
    torch.testing.assert_close(logits(tuned.model), expected, rtol=0, atol=1e-6)
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters()}
    step(tuned.model)
    changed = {name for name, p in tuned.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("lora_" in name or "modules_to_save" in name for name in changed)
    assert any("lora_B" in name for name in changed) and any("modules_to_save" in name for name in changed)


LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}
KEYS_VALUES_OUTPUT = r".*\.(attention\.self\.(key|value)|\d+\.output\.dense)"
#: What a person would write in PEFT by hand for our defaults on queries and values.
BY_HAND = {
    "lora": ("LoraConfig", LORA),
    "rslora": ("LoraConfig", {**LORA, "use_rslora": True}),
    "dora": ("LoraConfig", {**LORA, "use_dora": True}),
    "lora_plus": ("LoraConfig", LORA),
    "pissa": ("LoraConfig", {**LORA, "init_lora_weights": "pissa"}),
    "adalora": (
        "AdaLoraConfig",
        {"init_r": 12, "target_r": 8, "lora_alpha": 16, "total_step": 9, "target_modules": ["query", "value"]},
    ),
    "ia3": (
        "IA3Config",
        {"target_modules": KEYS_VALUES_OUTPUT, "feedforward_modules": r".*\.\d+\.output\.dense"},
    ),
    "vera": ("VeraConfig", {"r": 256, "target_modules": ["query", "value"]}),
}
NOT_PEFT = {"bitfit", "full", "head", "none"}


@pytest.mark.parametrize("method", METHODS)
def test_a_peft_method_is_what_plain_peft_gives(tiny_base: Path, method: str) -> None:
    """Same function as a hand-made PEFT model with the same weights, after a step."""
    import peft

    if method in NOT_PEFT:
        assert method not in BY_HAND
        return
    options = AdapterOptions() if method == "ia3" else AdapterOptions(target_modules="query_value")
    ours = tune(load(tiny_base), method, options, 0, False).model
    step(ours)
    name, settings = BY_HAND[method]
    config = getattr(peft, name)(task_type=peft.TaskType.SEQ_CLS, **settings)
    theirs = peft.get_peft_model(load(tiny_base).model, config)
    result = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(logits(theirs), logits(ours))
    expected = logits(load(tiny_base).model)
    assert (logits(ours) - expected).abs().max() > 1e-3  # the step has moved it


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_what_the_base_says(tiny_base: Path, method: str) -> None:
    tuned = tune(load(tiny_base), method, AdapterOptions(), 0, False)
    # VeRA starts with b = 0 and the others with B = 0, E = 0 or a scale of 1: the update is nothing.
    torch.testing.assert_close(logits(tuned.model), logits(load(tiny_base).model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_merging_changes_nothing_that_the_model_says(tiny_base: Path, method: str) -> None:
    from lightning_lora.models.methods import merged

    tuned = tune(load(tiny_base), method, AdapterOptions(), 0, False)
    if METHODS[method].trains:
        step(tuned.model)
    expected = logits(tuned.model)
    plain = merged(tuned)
    assert type(plain).__name__ == "BertForSequenceClassification"
    assert not any("lora" in name or "original_module" in name for name, _ in plain.named_parameters())
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_ia3_rescales_keys_values_and_the_feed_forward_activations(make_base, model_type: str) -> None:
    tuned = tune(load(make_base(model_type)), "ia3", AdapterOptions(), 0, False)
    layers = 1 if model_type == "albert" else 2
    assert len(tuned.target_modules) == layers * (2 if model_type in FUSED else 3)
    # The activations that go into the second feed-forward layer are scaled, and what comes out of the others.
    scales = {n.split(".ia3_l")[0]: p.numel() for n, p in tuned.model.named_parameters() if "ia3_l" in n}
    for name, size in scales.items():
        layer = tuned.model.get_submodule(name)
        wide = layer.in_features if layer.is_feedforward else layer.out_features
        assert size == wide and layer.is_feedforward == (layer.in_features == 48 and layer.out_features == 32), name
    assert sum(tuned.model.get_submodule(name).is_feedforward for name in scales) == layers


def test_bitfit_trains_the_biases_of_the_encoder_and_the_head(tiny_base: Path) -> None:
    model = tune(load(tiny_base), "bitfit", AdapterOptions(), 0, False).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith("bias")} | {"classifier.weight"}


def test_lora_plus_gives_b_the_higher_learning_rate(tiny_base: Path) -> None:
    from lightning_lora.training.optim import make_optimizer

    tuned = tune(load(tiny_base), "lora_plus", AdapterOptions(lora_plus_ratio=8), 0, False)
    rates = {
        id(p): group["lr"]
        for group in make_optimizer(tuned.model, 1e-3, 0.0, tuned.lr_factors).param_groups
        for p in group["params"]
    }
    for name, parameter in tuned.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(8e-3 if "lora_B" in name else 1e-3), name


def test_pissa_starts_from_the_principal_components(tiny_base: Path) -> None:
    base = load(tiny_base)
    weight = base.model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    model = tune(base, "pissa", AdapterOptions(rank=4), 0, False).model
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    u, s, v = torch.linalg.svd(weight)
    update = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight) * layer.scaling["default"]
    torch.testing.assert_close(update, u[:, :4] @ s[:4].diag() @ v[:4], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("method", "scale"), [("lora", 6 / 4), ("rslora", 6 / 4**0.5)])
def test_the_update_is_scaled_as_published(tiny_base: Path, method: str, scale: float) -> None:
    options = AdapterOptions(rank=4, alpha=6, target_modules="query_value")
    model = tune(load(tiny_base), method, options, 0, False).model
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 32)
    update = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + scale * update)


def test_the_head_starts_alike_whatever_the_method_and_anew_with_another_seed(tiny_base: Path) -> None:
    def head(method: str, seed: int) -> torch.Tensor:
        torch.manual_seed(hash((method, seed)) % 1000)  # the state around it must not matter
        model = tune(load(tiny_base, seed), method, AdapterOptions(), seed, False).model
        return next(p for n, p in model.named_parameters() if "classifier" in n and "weight" in n and p.requires_grad)

    for method in set(METHODS) - {"none"}:
        torch.testing.assert_close(head(method, 1), head("full", 1), rtol=0, atol=0)
    assert not torch.equal(head("full", 1), head("full", 2))


def test_loading_leaves_the_callers_random_state_alone(tiny_base: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tune(load(tiny_base), "lora", AdapterOptions(), 0, False)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_the_trained_share_of_each_method(tiny_base: Path) -> None:
    counts = {}
    for method in METHODS:
        options = AdapterOptions(rank=4) if method == "lora" else AdapterOptions()
        model = tune(load(tiny_base), method, options, 0, False).model
        counts[method] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = 32 * 3 + 3
    assert counts["head"] == head
    per_layer = 4 * (4 * (32 + 32)) + 2 * (4 * (32 + 48))
    assert counts["lora"] == head + 2 * per_layer
    assert counts["full"] == sum(p.numel() for p in load(tiny_base).model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "deberta-v2", "electra"])
@pytest.mark.parametrize("frozen_dropout", [True, False])
def test_dropout_of_a_frozen_encoder_is_off_unless_asked_for(make_base, model_type: str, frozen_dropout: bool) -> None:
    model = tune(load(make_base(model_type)), "lora", AdapterOptions(), 0, frozen_dropout).model
    encoder = getattr(model.base_model.model, model.base_model.model.base_model_prefix)
    first, second = (encoder(**INPUTS).last_hidden_state for _ in range(2))
    assert model.training
    assert torch.equal(first, second) != frozen_dropout


def test_dropout_of_head_adapter_and_a_trained_base_stays(tiny_base: Path) -> None:
    for method, options in (
        ("full", AdapterOptions()),
        ("head", AdapterOptions()),
        ("lora", AdapterOptions(dropout=0.5)),
    ):
        model = tune(load(tiny_base), method, options, 0, False).model
        if method == "lora":
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    nn.init.normal_(parameter)
        assert not torch.equal(model(**INPUTS).logits, model(**INPUTS).logits), method
        torch.testing.assert_close(logits(model), logits(model), rtol=0, atol=0)


def test_a_name_that_matches_nothing_lists_the_candidates(tiny_base: Path) -> None:
    for names in ("q_proj", ["query", "q_proj"]):
        with pytest.raises(UserError, match="'q_proj' matches no linear layer") as raised:
            match_targets(load(tiny_base), names)
        assert "attention.self.query" in str(raised.value) and "all_linear" in str(raised.value)


def test_named_layers_are_matched_by_their_ending(tiny_base: Path) -> None:
    assert match_targets(load(tiny_base), ["attention.output.dense"]) == [
        f"bert.encoder.layer.{i}.attention.output.dense" for i in range(2)
    ]


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("loora", AdapterOptions(), "no method 'loora'; there are lora, rslora, dora"),
        ("full", AdapterOptions(rank=4), "adapter.rank: 4, but method 'full' does not use it"),
        ("lora", AdapterOptions(lora_plus_ratio=4), "lora_plus_ratio: 4, but method 'lora' does not use it"),
        ("vera", AdapterOptions(alpha=4), "adapter.alpha: 4, but method 'vera' does not use it"),
        ("lora", AdapterOptions(rank=0), "adapter.rank: a number of at least 1"),
        ("lora", AdapterOptions(dropout=1.0), "adapter.dropout: a number from 0 up to 1"),
        ("lora", AdapterOptions(modules_to_save=["nothing"]), "no module 'nothing'"),
    ],
)
def test_useless_and_impossible_options_are_refused(tiny_base: Path, method: str, options, said: str) -> None:
    with pytest.raises(UserError, match=said):
        from lightning_lora.models.methods import check_options, find_method

        find_method(method)
        check_options(method, options)
        tune(load(tiny_base), method, options, 0, False)


def test_an_unknown_architecture_works_by_names_and_by_all_linear(make_base) -> None:
    base = load(make_base("mpnet"))
    assert base.architecture is None and base.head_modules == ["classifier"]
    assert len(match_targets(base, "all_linear")) == 12
    with pytest.raises(
        UserError, match=r"not known for architecture 'mpnet'; use all_linear or names among attention\.attn\.q"
    ):
        match_targets(base, "attention")
