import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_lora.errors import UserError
from lightning_lora.locations import resolve
from lightning_lora.models.base import load_base, weights_fingerprint


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def test_the_encoder_is_the_pretrained_one(tiny_base: Path) -> None:
    from transformers import AutoModel

    pretrained = AutoModel.from_pretrained(tiny_base, add_pooling_layer=False).state_dict()
    loaded = load_base(str(tiny_base), ["a", "b"], 0).model.bert.state_dict()
    for name, value in pretrained.items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)


def test_label_names_are_in_the_models_config(tiny_base: Path) -> None:
    config = load_base(str(tiny_base), ["bad", "good"], 0).model.config
    assert (config.id2label, config.label2id) == ({0: "bad", 1: "good"}, {"bad": 0, "good": 1})


def test_a_pooler_that_is_pretrained_stays_frozen_and_a_fresh_one_is_trained(make_base, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    assert load_base(str(make_base("bert")), ["a", "b"], 0).head_modules == ["classifier"]
    without = tmp_path / "mlm"
    shutil.copytree(make_base("bert"), without)
    AutoModelForMaskedLM.from_pretrained(make_base("bert")).save_pretrained(without)  # has no pooler
    assert load_base(str(without), ["a", "b"], 0).head_modules == ["bert.pooler", "classifier"]


def test_a_head_of_other_labels_is_replaced(make_base, tmp_path: Path) -> None:
    path = tmp_path / "three"
    load_base(str(make_base("distilbert")), ["a", "b", "c"], 0).model.save_pretrained(path)
    base = load_base(str(path), ["a", "b"], 0)
    assert base.model.classifier.out_features == 2
    assert base.head_modules == ["pre_classifier", "classifier"]


def test_a_base_without_some_encoder_weight_is_refused(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks .* outside the head, such as bert.encoder.layer.1.output.dense.weight"):
        load_base(str(copy), ["a", "b"], 0)


def test_the_fingerprint_follows_the_weights_not_the_name(copy: Path, tiny_base: Path, make_base) -> None:
    assert weights_fingerprint(resolve(str(copy), "k")) == weights_fingerprint(resolve(str(tiny_base), "k"))
    other = weights_fingerprint(resolve(str(make_base("bert", seed=1)), "k"))
    assert other != weights_fingerprint(resolve(str(tiny_base), "k"))


def test_sharded_weights_have_a_fingerprint_too(tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(tiny_base).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert len(weights_fingerprint(resolve(str(tmp_path / "shards"), "k"))) == 64


@pytest.mark.parametrize("damage", ["truncated", "pointer", "config"])
def test_a_damaged_model_is_one_line(copy: Path, damage: str) -> None:
    weights, config = copy / "model.safetensors", copy / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:500])
    elif damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    else:
        config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": "wide"'))
    with pytest.raises(UserError, match=r"model\.base_model") as raised:
        load_base(str(copy), ["a", "b"], 0)
    assert "\n" not in str(raised.value)


def test_the_fingerprint_follows_the_tokenizer_too(copy: Path) -> None:
    before = weights_fingerprint(resolve(str(copy), "k"))
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace('"awful": ', '"awfull": '))
    assert weights_fingerprint(resolve(str(copy), "k")) != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody/nothing", "no usable model 'nobody/nothing'"),
        ("./nowhere", "no file or folder './nowhere'"),
        ("package:no_such_package/model", "package 'no_such_package' of .* is not installed"),
        ("package:transformers/no_such_folder", "package 'transformers' holds no 'no_such_folder'"),
        ("package:transformers/../numpy", "holds no '../numpy'"),
        ("what is this?", "no file or folder 'what is this.'"),
    ],
)
def test_a_model_that_is_not_there_is_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        load_base(name, ["a", "b"], 0)
    assert "model.base_model" in str(raised.value) and "\n" not in str(raised.value)
