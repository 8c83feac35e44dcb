"""Tiny models and rows that the tests generate: nothing is downloaded."""

import contextlib
import csv
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of a hub client
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # a worker for each core: a thread for each worker
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest

WORDS = {
    "neg": ["awful", "boring", "clumsy", "dull", "empty"],
    "pos": ["brilliant", "charming", "deep", "elegant", "fine"],
    "mixed": ["long", "short", "loud", "quiet", "strange"],
}
FILLER = [
    "the",
    "film",
    "was",
    "a",
    "story",
    "of",
    "two",
    "people",
    "in",
    "town",
    "and",
    "their",
    "dog",
    "with",
    "some",
    "music",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
#: Those of the table (models/architectures.py).
LANGUAGE_MODELS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "phi", "phi3"]
VOCABULARY = SPECIAL + sorted({word for words in [*WORDS.values(), FILLER] for word in words})


#: Files that take longest: run first, so that no worker is left with one of them at the end.
LONGEST = (
    "tests/test_readme.py",
    "tests/experiments/test_ablate.py",
    "tests/export/",
    "tests/test_configs.py",
    "tests/training/test_refused.py",
    "tests/training/test_length.py",
    "tests/faults/",
    "tests/commands/",
)


#: Of a Trainer in Python that shows and keeps nothing.
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "enable_checkpointing": False,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((i for i, name in enumerate(LONGEST) if item.nodeid.startswith(name)), len(LONGEST))
    )


def make_rows(count: int, labels: tuple[str, ...] = ("neg", "pos"), seed: int = 0) -> list[tuple[str, str]]:
    """Rows whose label shows in their words; no two texts are the same."""
    rng = random.Random(seed)
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = labels[len(rows) % len(labels)]
        words = rng.choices(FILLER, k=rng.randint(3, 25)) + rng.choices(WORDS[label], k=3)
        rng.shuffle(words)
        rows.setdefault(" ".join(words), label)
    return list(rows.items())


def make_pairs(count: int, seed: int = 0) -> list[tuple[str, str, str]]:
    """Rows of premise, hypothesis and label, which shows in the words of both; no two pairs are the same."""
    rng = random.Random(seed)
    texts = [text for text, _ in make_rows(2 * count, ("neg", "pos"), seed)]
    rng.shuffle(texts)

    def kind(text: str) -> str:
        return "neg" if set(text.split()) & set(WORDS["neg"]) else "pos"

    pairs = list(zip(texts[:count], texts[count:], strict=True))
    return [(a, b, "same" if kind(a) == kind(b) else "other") for a, b in pairs]


def make_sets(count: int) -> list[tuple[str, list[str]]]:
    """Texts with none to three labels, which show in their words."""
    rng, rows = random.Random(0), dict[str, list[str]]()
    while len(rows) < count:
        labels = [label for label in sorted(WORDS) if rng.random() < 0.4]
        words = rng.choices(FILLER, k=rng.randint(3, 20)) + [
            w for each in labels for w in rng.choices(WORDS[each], k=3)
        ]
        rng.shuffle(words)
        rows.setdefault(" ".join(words), labels)
    return list(rows.items())


PAIR_HEADER = ("premise", "hypothesis", "label")
#: What is predicted of what, beside one label of one text.
KINDS = ("multi_label", "regression", "pairs")


def write_kind(path: Path, kind: str, count: int) -> dict[str, object]:
    """Writes made-up rows of a kind as CSV; the settings of ``data`` that read them.

    Labels stand in one cell, ``|`` between; numbers are in units far from 0 and 1.
    """
    if kind == "pairs":
        write_csv(path, make_pairs(count), PAIR_HEADER)
        return {"source": str(path), "text_column": [*PAIR_HEADER[:2]]}
    sets = enumerate(make_sets(count))
    if kind == "multi_label":
        write_csv(path, [(text, "|".join(labels)) for _, (text, labels) in sets])
        return {"source": str(path), "label_separator": "|"}
    write_csv(path, [(text, f"{1000 + 30 * len(labels) + i % 7}.1") for i, (text, labels) in sets])
    return {"source": str(path), "task": "regression"}


def write_csv(path: Path, rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def fit_tiny(
    place: Path,
    base: Path,
    rows: int = 120,
    epochs: int = 2,
    precision: str = "32-true",
    labels: tuple[str, ...] = ("neg", "pos"),
) -> Path:
    """A run ``place/run`` by ``fit``, of made-up rows, on the CPU; its folder."""
    import yaml

    from lightning_lora.cli import main

    write_csv(place / "rows.csv", make_rows(rows, labels))
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3},
        "data": {"source": str(place / "rows.csv"), "max_length": 32, "cache_dir": str(place / "cache")},
        "trainer": {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "precision": precision,
            "enable_progress_bar": False,
        },
    }
    (place / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(place / "tiny.yaml"), "--name", "run", "--logs_dir", str(place)]) == 0
    return place / "run"


def shown_settings(run: Path) -> dict[str, object]:
    """The hyperparameters that TensorBoard shows for a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(run))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in settings.items()}


def save_tokenizer(folder: Path, model_max_length: int = 64) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=model_max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


#: Architectures whose tokenizers give token types.
TYPED = ("bert", "albert", "electra", "deberta-v2")


def save_pair_base(base: Path, folder: Path, framing: str) -> Path:
    """Copies a base model, with a tokenizer that gives for a pair what those of an architecture give."""
    import json
    import shutil

    from tokenizers import Tokenizer, processors

    shutil.copytree(base, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if framing in ("roberta", "xlm-roberta", "camembert"):
        tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    elif framing == "none":
        tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    elif framing == "odd":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [CLS]", pair="$A [SEP]:0 $B:1 [SEP]:1 [CLS]:0", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ["input_ids", *["token_type_ids"] * (framing in (*TYPED, "odd")), "attention_mask"]
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_input_names": names}))
    return folder


def tiny_config(model_type: str, **changes: object):
    """A config of the architecture with two layers of width 32."""
    from transformers import AutoConfig

    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size": 32}
    if model_type == "distilbert":
        size = {"n_layers": 2, "n_heads": 2, "hidden_dim": 48, "dim": 32}
    if model_type in ("albert", "electra"):
        size["embedding_size"] = 16
    if model_type == "deberta-v2":
        size |= {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "pooler_hidden_size": 32,
            "share_att_key": True,
        }
    if model_type == "modernbert":
        size |= {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    if model_type in LANGUAGE_MODELS:  # queries share keys and values, and some layers see a window of 8 tokens
        size |= (
            {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8} if model_type != "gpt2" else {"n_inner": 48}
        )
    common = {"vocab_size": len(VOCABULARY), "max_position_embeddings": 80, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **{**common, **size, **changes})


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a pretrained-looking base model (encoder weights and tokenizer, no head) of an architecture."""
    made: dict[object, Path] = {}

    def make(model_type: str = "bert", seed: int = 0, **changes: object) -> Path:
        import torch
        from transformers import AutoModel

        key = (model_type, seed, tuple(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"base-{model_type}")
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                AutoModel.from_config(tiny_config(model_type, **changes)).save_pretrained(folder)
            save_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_base(make_base: Callable[..., Path]) -> Path:
    return make_base("bert")


def slow_but(few: Sequence[Any], values: Iterable[Any]) -> list[Any]:
    """Parameters of which a few are tested always, and the others by ``make test-slow``."""
    return [value if value in few else pytest.param(value, marks=pytest.mark.slow) for value in values]


def run_in_process(commands: list[list[str]], output: Path) -> int:
    """Run commands in this process instead of one of their own; what they say of errors goes to the output."""
    from lightning_lora.cli import main

    with output.open("a") as file, contextlib.redirect_stderr(file):
        return next((status for status in map(main, commands) if status), 0)


def cells_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run cells and trials in this process, which is faster; other tests see that they have their own processes."""
    from lightning_lora.experiments import evaluating, runner, tuning

    for module in (runner, evaluating, tuning):
        monkeypatch.setattr(module, "run_child", run_in_process)


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in its own folder, with its own cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    return write_csv(tmp_path / "reviews.csv", make_rows(200))


@pytest.fixture(scope="module")
def own_config(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with made-up rows and ``own.yaml``, a config that trains on them on the CPU."""
    import yaml

    folder = tmp_path_factory.mktemp("own")
    write_csv(folder / "rows.csv", make_rows(120))
    config = {
        "model": {"base_model": str(make_base("bert"))},
        "data": {"source": str(folder / "rows.csv"), "cache_dir": str(folder / "cache")},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (folder / "own.yaml").write_text(yaml.safe_dump(config))
    return folder
