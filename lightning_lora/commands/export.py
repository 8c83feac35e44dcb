"""``main.py export``: a run as files that other software loads, each compared with the trained model first."""

import importlib.util
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_lora.artifacts.card import CardFacts, card, certificate_table
from lightning_lora.artifacts.checkpoints import checked_checkpoint, load_checkpoint
from lightning_lora.artifacts.formats import (
    CLIENTS,
    FORMATS,
    Client,
    rename_base,
    write_adapter,
    write_identity,
    write_merged,
    write_onnx,
)
from lightning_lora.artifacts.runs import RunFolder
from lightning_lora.commands.configured import ConfiguredRun
from lightning_lora.commands.evaluate import refuse_trained_rows
from lightning_lora.data.batching import TokenDataset, evaluation_batches
from lightning_lora.data.specs import find_spec
from lightning_lora.errors import UserError
from lightning_lora.evaluation.certificate import BROKEN, LATENCY_TEXTS, TOLERANCE, compare, measure
from lightning_lora.evaluation.documents import pooled
from lightning_lora.evaluation.intervals import METRICS, RowSums
from lightning_lora.files import atomic_folder
from lightning_lora.locations import PACKAGE_PREFIX, resolve
from lightning_lora.models.methods import merged
from lightning_lora.models.quantization import Quantization
from lightning_lora.quiet import quiet_loading
from lightning_lora.training.module import TextClassifier

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


def run(words: list[str]) -> int:
    """Writes the formats asked for, compares each with the trained model, and uploads them where asked."""
    cli = ConfiguredRun("export", words)
    config = cli.config
    folder = RunFolder.open(Path(config.run))
    output = Path(config.output) if config.output else folder.path / "export"
    if output.exists():
        raise UserError(f"--output: {output} exists, and nothing is overwritten; give another folder")
    checkpoint = folder.checkpoint(config.checkpoint)
    if checkpoint.is_dir():
        raise UserError(f"--checkpoint: {checkpoint} is an export already; give 'best', 'last' or a checkpoint file")
    location = resolve(config.model.base_model, "model.base_model")
    target = str(location.path.resolve()) if location.path else location.name
    base_id = config.base_model_id or (location.name if location.is_hub else None)
    if config.push_to_hub:
        check_push(config.push_to_hub, base_id, target)
    cli.build(folder)
    model: TextClassifier = cli.model
    checked_checkpoint(model, checkpoint)
    load_checkpoint(model, checkpoint)
    formats = choose_formats(config.formats, model)
    batches, singles, labels = compared_rows(cli)
    print(f"export of {checkpoint} to {output}: {', '.join(formats)}")
    model.cpu().eval()
    said = measure(lambda batch: trained_logits(model, batch), batches, singles)
    reference = said.logits
    certificate = {"trained": compare(said, reference, labels).plain}
    with atomic_folder(output) as staging:
        write_formats(staging, formats, model, checkpoint, config, target)
        for name in formats:
            with quiet_loading():
                client = CLIENTS[name](staging / name, model.label_names)
            found = compare(measure(batch_client(client), batches, singles), reference, labels)
            certificate[name] = found.plain
            print(
                f"{name}: largest logit difference {found.max_logit_difference:.1e}, {found.labels_flipped} of "
                f"{found.rows} labels flipped, {found.texts_per_s:.0f} texts/s"
            )
        if config.base_model_id and "adapter" in formats:
            rename_base(staging / "adapter", config.base_model_id)
        refuse_broken(certificate, model.identity.quantization)
        measured = RowSums(reference, labels)
        metrics = tested_metrics(folder, checkpoint, cli.datamodule.rows("test").fingerprint())
        metrics = metrics or ({name: measured.value(name) for name in METRICS}, len(labels))
        facts = card_facts(cli, folder, model, formats, certificate, base_id, metrics)
        for place in ("", *formats):
            (staging / place / "README.md").write_text(card(facts, place), encoding="utf-8")
        content = json.dumps(certificate, indent=2, allow_nan=False)
        (staging / "certificate.json").write_text(content + "\n", encoding="utf-8")
    print(f"\n{certificate_table(certificate)}\n\nwritten: {output} (README.md says how to load each)")
    if (what := beyond_tolerance(certificate, model.identity.quantization)) is not None:
        print(f"careful: {what}")
    if config.push_to_hub:
        push(output, config.push_to_hub, config.private)
    return 0


def compared_rows(cli: ConfiguredRun) -> tuple[list[dict[str, Any]], list[dict[str, Any]], NDArray]:
    """Test rows to compare on: batches of them, the first few alone, and the true labels of all."""
    cli.datamodule.setup("test")
    rows = cli.datamodule.rows("test")
    refuse_trained_rows(rows.texts, RunFolder.open(Path(cli.config.run)), ("train", "val"))
    dataset: TokenDataset = cli.datamodule.dataset("test")
    chosen = some_rows(len(dataset), cli.config.rows)
    parts = evaluation_batches(dataset.widths[chosen], cli.datamodule.eval_batch_size)
    batches = [dataset.__getitems__(chosen[part].tolist()) for part in parts]
    singles = [dataset.__getitems__([int(row)]) for row in chosen[:LATENCY_TEXTS]]
    return batches, singles, rows.labels[chosen]


def choose_formats(wanted: list[str] | None, model: TextClassifier) -> list[str]:
    """The formats asked for, by default all that the method has.

    Raises:
        UserError: There is no such format, or the method has no adapter.
    """
    has_adapter = bool(model.target_modules)
    if unknown := set(wanted or ()) - set(FORMATS):
        raise UserError(f"--formats: no format '{min(unknown)}'; there are {', '.join(FORMATS)}")
    if wanted and "adapter" in wanted and not has_adapter:
        raise UserError(f"--formats: method '{model.identity.method}' has no adapter; use merged")
    chosen = [name for name in FORMATS if (name in wanted if wanted else has_adapter or name != "adapter")]
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing and any(name.startswith("onnx") for name in chosen):
        raise UserError(
            f"--formats: onnx needs the package '{missing[0]}': pip install -e '.[export]' in this project's folder, "
            "or --formats '[adapter, merged]'"
        )
    return chosen


def some_rows(total: int, wanted: int) -> NDArray:
    """Sorted positions of at most ``wanted`` rows, evenly spread."""
    if wanted < 1:
        raise UserError(f"--rows: a number of at least 1 is needed, got {wanted}")
    return np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int))


def trained_logits(model: TextClassifier, batch: dict[str, Any]) -> NDArray:
    """The trained model's logits of a batch, in full precision."""
    with torch.inference_mode():
        return model.document_logits(batch).numpy()


def batch_client(client: Client) -> Any:
    """A client that takes a batch and pools windows as the trained model does."""

    def run(batch: dict[str, Any]) -> NDArray:
        logits = client(batch["input_ids"].numpy(), batch["attention_mask"].numpy())
        if "documents" not in batch:
            return logits
        return pooled(torch.from_numpy(logits), batch["documents"], len(batch["rows"])).numpy()

    return run


def write_formats(
    folder: Path, formats: list[str], model: TextClassifier, checkpoint: Path, config: Any, target: str
) -> None:
    """Writes each format into its folder, with tokenizer and identity."""
    from transformers import AutoTokenizer

    # Given here, both are saved with it: truncation=True then cuts as it was cut in training.
    side = "left" if config.data.truncation == "tail" else "right"
    tokenizer = AutoTokenizer.from_pretrained(target, model_max_length=config.data.max_length, truncation_side=side)
    more = {key: config.data[key] for key in ("max_length", "truncation", "window_overlap")}
    if "adapter" in formats:
        method = config.model.method
        untrained = (lambda: _build(config, model.label_names).model) if method == "pissa" else None
        write_adapter(model.model, folder / "adapter", target, untrained)
    if set(formats) - {"adapter"}:
        # A model that was trained on a quantized base is merged into the base in full precision.
        whole = _build(config, model.label_names, Quantization())
        load_checkpoint(whole, checkpoint, any_quantization=True)
        plain = merged(whole.tuned).eval()
        plain.set_attn_implementation("sdpa" if plain._supports_sdpa else "eager")
        if "merged" in formats:
            write_merged(plain, folder / "merged")
        for name in ("onnx", "onnx-int8"):
            if name in formats:
                write_onnx(plain, folder / name, int8=name == "onnx-int8")
    # Where the base lies on this machine says nothing elsewhere, and is nobody's business.
    identity = replace(model.identity, base_model=public_name(config))
    for name in formats:
        tokenizer.save_pretrained(folder / name)
        write_identity(folder / name, identity, more)


def _build(config: Any, label_names: list[str], quantization: Quantization | None = None) -> TextClassifier:
    """A fresh model of the run's settings."""
    settings = {**config.model.as_dict(), "label_names": label_names}
    if quantization is not None:
        settings["quantization"] = asdict(quantization)
    return TextClassifier(**settings).eval()


def card_facts(
    cli: ConfiguredRun,
    folder: RunFolder,
    model: TextClassifier,
    formats: list[str],
    certificate: dict[str, dict[str, Any]],
    base_id: str | None,
    metrics: tuple[dict[str, float], int],
) -> CardFacts:
    """What the cards say, from the run's record and the certificate."""
    config, record = cli.config, folder.read()
    source = config.data.source
    spec = find_spec(source) if isinstance(source, str) else None
    location = resolve(config.model.base_model, "model.base_model")
    name = spec.names[0] if spec else Path(source).stem if isinstance(source, str) else "local files"
    costs = record.get("costs") or {"trainable_params": 0, "total_params": 0}
    return CardFacts(
        name=folder.path.name,
        base_model=public_name(config),
        base_id=base_id,
        base_fingerprint=model.identity.base_fingerprint,
        label_names=model.label_names,
        method=model.identity.method,
        quantization=model.identity.quantization,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        licence=config.licence or licence_of(location),
        dataset=(name, hub_dataset(source)),
        metrics=metrics[0],
        test_rows=metrics[1],
        certificate=certificate,
        formats=formats,
        trained_params=(costs["trainable_params"], costs["total_params"]),
    )


def public_name(config: Any) -> str:
    """The base model's name as others may read it: of a local folder only the last part."""
    name = config.model.base_model
    local = not name.startswith(PACKAGE_PREFIX) and not resolve(name, "model.base_model").is_hub
    return config.base_model_id or (Path(name).name if local else name)


def hub_dataset(source: Any) -> str | None:
    """The Hub id of a data source, where it has one."""
    if not isinstance(source, str):
        return None
    spec = find_spec(source)
    location = resolve(spec.source if spec else source, "data.source")
    return location.name.partition(":")[0] if location.is_hub else None


def tested_metrics(folder: RunFolder, checkpoint: Path, fingerprint: str) -> tuple[dict[str, float], int] | None:
    """Metrics and rows of the latest test of this checkpoint on these rows, or None where there was none."""
    done = folder.read().get("evaluations", {}) if folder.record.is_file() else {}
    for name, evaluation in reversed(list(done.items())):
        same = evaluation["fingerprint"] == fingerprint and Path(evaluation["checkpoint"]).samefile(checkpoint)
        if name.startswith("test") and same:
            return evaluation["after"], evaluation["rows"]
    return None


def licence_of(location: Any) -> str:
    """The licence that the base model's own card names, else "unknown"."""
    from huggingface_hub import ModelCard

    try:
        readme = location.path / "README.md" if location.path else location.name
        return ModelCard.load(readme).data.license or "unknown"
    except Exception:  # no card, no network, or one that cannot be read
        return "unknown"


def refuse_broken(certificate: dict[str, dict[str, Any]], quantization: str) -> None:
    """Refuses an export that is not the trained model.

    Raises:
        UserError: A form says nothing that is a number, or one in full precision says something else.
    """
    for name, row in certificate.items():
        exact = name != "onnx-int8" and quantization == "none"
        difference = row["max_logit_difference"]
        if not math.isfinite(difference) or (exact and difference > BROKEN):
            raise UserError(
                f"export: {name} differs from the trained model by {difference:.2g} in a logit; nothing was written "
                "(leave it out with --formats, and please report it)"
            )


def beyond_tolerance(certificate: dict[str, dict[str, Any]], quantization: str) -> str | None:
    """What a person should know of forms that are not the trained model itself, or None."""
    off = [n for n, row in certificate.items() if n != "onnx-int8" and not row["max_logit_difference"] <= TOLERANCE]
    if not off:
        return None
    why = f"; the run's base was stored as {quantization}, the export's is not" if quantization != "none" else ""
    return f"{', '.join(off)} differ from the trained model by more than {TOLERANCE:g}{why}"


def check_push(name: str, base_id: str | None, target: str) -> None:
    """Refuses an upload that nobody could use.

    Raises:
        UserError: The name is none, or the base model lies on this machine only.
    """
    if not _HUB_NAME.fullmatch(name):
        raise UserError(f"--push_to_hub: '{name}' is no name on the Hub; give NAME or OWNER/NAME")
    if base_id is None:
        raise UserError(
            f"--push_to_hub: the base model lies at {target}, where others have nothing; give its name on the Hub with "
            "--base_model_id OWNER/NAME"
        )


def push(folder: Path, name: str, private: bool) -> None:
    """Uploads the folder to the Hub.

    Raises:
        UserError: It could not be uploaded; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Upload by lightning_lora")
    except Exception as error:  # the client raises kinds of several libraries
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--push_to_hub: '{name}' was not uploaded ({first:.200}); {folder} is complete and can be uploaded "
            f"with: hf upload {name} {folder}"
        ) from error
    print(f"uploaded: {url}")
