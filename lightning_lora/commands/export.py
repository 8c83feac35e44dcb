"""``main.py export``: a run as files that other software loads, each compared with the trained model first."""

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.pairs import is_pair
from lightning_lora.data.rows import Rows
from lightning_lora.data.specs import find_spec, terms_of
from lightning_lora.data.tokens import InputFormat, base_tokenizer
from lightning_lora.errors import UserError, first_line
from lightning_lora.export.card import card, space_files, usage_code
from lightning_lora.export.formats import (
    ENCODED,
    FORMATS,
    FormatWriter,
    build_model,
    fold_temperature,
    public_name,
    require_onnx,
    shown_thresholds,
)
from lightning_lora.export.mean_pooled import mean_head
from lightning_lora.export.parity import PLAIN, Parity, parity_texts
from lightning_lora.export.registry import log_model
from lightning_lora.export.weights import trained_for, trained_steps
from lightning_lora.files import atomic_folder, refusal, write_json
from lightning_lora.locations import PACKAGE_PREFIX, resolve
from lightning_lora.models.head import fold_scale
from lightning_lora.models.methods import BASELINES
from lightning_lora.runs.checkpoints import load_checkpoint
from lightning_lora.runs.folder import RunFolder, processor
from lightning_lora.training.module import TextClassifier

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def run(argv: list[str]) -> int:
    """Writes the formats asked for, compares each with the trained model, and uploads them where asked.

    Raises:
        UserError: A format that was asked for by name could not be made (the others are written), or none could.
    """
    cli = ConfiguredRun("export", argv)
    config = cli.config
    if config.rows < 1:
        raise UserError(f"--rows: a number of at least 1 is needed, got {config.rows}")
    if config.model.method in BASELINES:
        raise UserError(f"export: method '{config.model.method}' is a baseline, which other software does not load")
    folder = RunFolder.open(Path(config.run))
    output = output_folder(folder, config.output)
    checkpoint = folder.checkpoint(config.checkpoint)
    if checkpoint.is_dir():
        raise UserError(f"--checkpoint: {checkpoint} is an export already; give 'best', 'last' or a checkpoint file")
    location = resolve(config.model.base_model, "model.base_model")
    base_id = config.base_model_id or (location.name if location.is_hub else None)
    if config.push_to_hub:
        check_push(config, base_id, location.target)
    model = build_model(config, trained_for(checkpoint))
    load_checkpoint(model, checkpoint)
    fold_scale(model.model)
    model.cpu().eval()
    formats = choose_formats(config.formats, model)
    if config.space and "merged" not in formats:
        raise UserError("--space: it holds the merged model; add merged to --formats")
    print(f"export of {checkpoint} to {output}: {', '.join(formats)}")

    rows, warnings = readable_test_rows(cli, model.label_names)
    data, tokenizer = config.data, base_tokenizer(config.model.base_model)
    input_format = InputFormat.of(tokenizer, data.max_length, data.truncation, data.window_overlap)
    pad_to_max = data.padding == "max_length"
    texts, labels = parity_texts(rows, config.rows, tokenizer, input_format)
    parity = Parity(model, tokenizer, input_format, pad_to_max, texts, labels)
    if not math.isfinite(parity.certificate["trained"]["max_logit_difference"]):
        raise UserError(
            f"export: the logits of {checkpoint} are not finite, so there is nothing to export; train again"
        )
    fold_temperature(model)  # after the comparison has its logits
    usage = {
        "label_names": model.label_names,
        "task": model.task,
        "thresholds": shown_thresholds(model),
        "head": mean_head(model),
        "truncation": data.truncation,
        "pair": is_pair(data.truncation),
        "token_types": bool(input_format.types),
        "pad_token_id": model.model.config.pad_token_id,  # the base's own may be another
        "pad_to_max": pad_to_max,
        "text_columns": np.atleast_1d(data.text_column or "text").tolist(),
    }
    with atomic_folder(output) as staging:
        writer = FormatWriter(model, checkpoint, config, input_format)
        written = write_formats(staging, formats, writer, usage, parity)
        warnings += parity.warnings()
        metrics, test_rows = tested_metrics(folder, checkpoint, rows) or parity.metrics()
        facts = {
            **run_facts(config, folder, location),
            "max_length": input_format.max_length,
            "base_id": base_id,
            "base_package": package_of(config.model.base_model),
            "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "base_fingerprint": model.identity.base_fingerprint,
            "usage": usage,
            "metrics": metrics,
            "test_rows": test_rows,
            "certificate": parity.certificate,
            "formats": written,
            "quantization": model.identity.quantization,
            "warnings": warnings,
        }
        unnamed = name_base(staging / "adapter", base_id, location.target) if "adapter" in written else []
        write_cards(staging, facts, config.space)
    print(f"written: {output} (README.md says how to load each)")
    for warning in warnings + unnamed:  # a card names no path of this machine
        print(f"warning: {warning}")
    log_model(folder, output / "merged", usage)
    if (config.formats or (config.space and "merged" not in written)) and (missing := parity.missing()):
        raise UserError(f"--formats: not written: {missing}; {output} holds {', '.join(written)}")
    if config.push_to_hub:
        push(output, config.push_to_hub, config.private)
    return 0


def output_folder(folder: RunFolder, given: str | None) -> Path:
    """Returns the folder to write to: the one given, or the first that is free of RUN/export, RUN/export-2, ..."""
    if given is None:
        names = ("export" if number == 1 else f"export-{number}" for number in itertools.count(1))
        return next(path for name in names if not (path := folder.path / name).exists())
    if Path(given).exists():
        raise UserError(f"--output: {given} exists, and nothing is overwritten; give another folder")
    return Path(given)


def readable_test_rows(cli: ConfiguredRun, label_names: list[str]) -> tuple[Rows | None, list[str]]:
    """Returns the run's test rows; or None and a warning that says why they are not used.

    Raises:
        UserError: They cannot be used, and the command line says where they are.
    """
    settings = {name: value for name, value in cli.config.data.as_dict().items() if name != "augmentation"}
    try:
        data = TextDataModule(**settings)
        if data.label_names != label_names:
            raise UserError(f"the data's labels are {data.label_names} now, not {label_names}")
        rows = data.rows("test")
        RunFolder.open(Path(cli.config.run)).refuse_trained_rows(rows.keys, ("train", "val"))
    except Exception as error:  # a source can be gone, moved, changed, or unreachable in many ways
        if any(word.startswith("--data.") for word in cli.argv):
            raise
        why = first_line(error, 300)
        return None, [f"the run's test rows were not used ({why}); the texts are made up of the vocabulary"]
    return rows, []


def choose_formats(wanted: list[str] | str | None, model: TextClassifier) -> list[str]:
    """Returns the formats asked for, by default all that the method has."""
    possible = [name for name in FORMATS if name != "adapter" or model.target_modules]
    if wanted is None:
        return possible
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not wanted:
        raise UserError(f"--formats: the list is empty; give some of {', '.join(FORMATS)}, or leave it out")
    if unknown := set(wanted) - set(FORMATS):
        raise UserError(
            f"--formats: no format '{min(unknown)}'; there are {', '.join(FORMATS)}, several as '[adapter, merged]'"
        )
    if not set(wanted) <= set(possible):
        raise UserError(f"--formats: method '{model.identity.method}' has no adapter; use merged")
    if any(name.startswith("onnx") for name in wanted):
        require_onnx()
    return [name for name in possible if name in wanted]


def write_formats(
    staging: Path, formats: list[str], writer: FormatWriter, usage: Mapping[str, Any], parity: Parity
) -> list[str]:
    """Writes each format and compares it with the trained model; returns those that could be made and are equal."""
    written = []
    for name in formats:
        folder = staging / name
        why: str | None
        try:
            writer.write(name, folder)
            why = parity.check(name, usage_code(usage, name, repr(str(folder))))
        except Exception as error:  # exporters raise kinds of several libraries, and each format stands for itself
            if isinstance(error, OSError) and refusal(error) is not None:
                raise
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            why = kind + _COLOURS.sub("", first_line(error))
        if why is None:
            written.append(name)
            continue
        shutil.rmtree(folder, ignore_errors=True)
        parity.certificate[name] = {"missing": why.replace("|", "/")}
        print(f"{name}: not written: {why}")
    if not written:
        raise UserError(f"export: nothing was written: {parity.missing()}")
    if usage["truncation"] in ENCODED:
        name = "merged" if "merged" in written else written[0]
        parity.check(f"{name}{PLAIN}", usage_code(usage, name, repr(str(staging / name)), plain=True))
    return written


def write_cards(output: Path, facts: Mapping[str, Any], space: bool) -> None:
    """Writes the card of the export and of each format, the certificate, and a Space if asked."""
    for place in ("", *facts["formats"]):
        (output / place / "README.md").write_text(card(place, facts), encoding="utf-8")
    write_json(output / "certificate.json", facts["certificate"])
    if space and "merged" in facts["formats"]:
        shutil.copytree(output / "merged", output / "space" / "model")
        for name, content in space_files(facts).items():
            (output / "space" / name).write_text(content, encoding="utf-8")


def run_facts(config: Any, folder: RunFolder, location: Any) -> dict[str, Any]:
    """Returns what the cards say of the run: its settings, its record where it has ended, its data set."""
    record = folder.read() if folder.record.is_file() else {}
    costs = record.get("costs") or {"trainable_params": 0, "total_params": 0}
    source = config.data.source
    dataset, dataset_id = "local files", None
    if isinstance(source, str):
        spec = find_spec(source)
        dataset = spec.names[0] if spec else Path(source).stem
        try:
            place = resolve(spec.source if spec else source, "data.source")
            dataset_id = place.name.partition(":")[0] if place.is_hub else None
        except UserError:  # a file that is no longer there
            pass
    return {
        "name": folder.path.name,
        "base_model": public_name(config),
        "method": config.model.method,
        "license": config.license or license_of(location),
        "dataset": dataset,
        "dataset_id": dataset_id,
        "terms": terms_of(source),
        "trainable_params": costs["trainable_params"],
        "total_params": costs["total_params"],
        "hub_name": config.push_to_hub,
    }


def name_base(adapter: Path, base_id: str | None, target: str) -> list[str]:
    """Writes the base model's name on the Hub into an adapter; returns a warning where it has none.

    The adapter was compared on the base where that lies here, at ``target``.
    """
    if base_id is None:
        place = f"the adapter names its base model by where it lies here ({target}), which others do not have"
        return [f"{place}; give its name on the Hub with --base_model_id OWNER/NAME"]
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base_id})
    return []


def package_of(base_model: str) -> str | None:
    """Returns what pip installs to have a base model that lies in a Python package, with its version; else None."""
    if not base_model.startswith(PACKAGE_PREFIX):
        return None
    names = metadata.packages_distributions().get(base_model.removeprefix(PACKAGE_PREFIX).partition("/")[0])
    return f"{names[0]}=={metadata.version(names[0])}" if names else None


def tested_metrics(folder: RunFolder, checkpoint: Path, rows: Rows | None) -> tuple[dict[str, float], int] | None:
    """Returns metrics and row count of the latest test of this checkpoint on these rows, or on any without them."""
    done = folder.read().get("evaluations", {}) if folder.record.is_file() else {}
    step = trained_steps(checkpoint)
    for name, evaluation in reversed(done.items()):
        # RUN/checkpoints/best.ckpt: what lies above the run may have been moved, or the path be relative.
        same = Path(evaluation["checkpoint"]).resolve().parts[-3:] == checkpoint.resolve().parts[-3:]
        same = same and evaluation["step"] == step and (rows is None or evaluation["fingerprint"] == rows.fingerprint)
        if same and name.startswith("test"):
            return evaluation["after"], evaluation["rows"]
    return None


def license_of(location: Any) -> str:
    """Returns the license that the base model's own card names, else "unknown"."""
    from huggingface_hub import ModelCard

    try:
        readme = location.path / "README.md" if location.path else location.name
        return ModelCard.load(readme).data.license or "unknown"
    except Exception:  # no card, no network, or one that cannot be read
        return "unknown"


def check_push(config: Any, base_id: str | None, target: str) -> None:
    """Refuses an upload that nobody could use, before minutes are spent on it.

    Raises:
        UserError: The name cannot be one on the Hub, the base model lies on this machine only, or a Space is asked for.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = config.push_to_hub
    if config.space:
        raise UserError("--space: a Space is another repository; leave --push_to_hub out, and upload its folder")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub: '{name}' is no name on the Hub; give NAME or OWNER/NAME") from error
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
        raise UserError(
            f"--push_to_hub: '{name}' was not uploaded ({first_line(error)}); {folder} is complete and can be uploaded "
            f"with: hf upload {name} {folder}"
        ) from error
    print(f"uploaded: {url}")
