"""``main.py export``: a run as files that other software loads, each compared with the trained model first."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.data.rows import Rows
from lightning_lora.data.specs import find_spec
from lightning_lora.errors import UserError, first_line
from lightning_lora.export.card import CardFacts, card, certificate_table
from lightning_lora.export.formats import FORMATS, rename_base
from lightning_lora.export.parity_check import Parity, source_test_rows
from lightning_lora.export.usage import ENCODED
from lightning_lora.export.weights import trained_steps, weights_labels
from lightning_lora.export.writer import FormatWriter, build_model, missing_packages, public_name
from lightning_lora.files import atomic_folder, refusal
from lightning_lora.locations import resolve
from lightning_lora.runs.checkpoints import load_checkpoint
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training.module import TextClassifier

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def run(words: list[str]) -> int:
    """Writes the formats asked for, compares each with the trained model, and uploads them where asked.

    Raises:
        UserError: A format that was asked for by name could not be made (the others are written), or none could.
    """
    cli = ConfiguredRun("export", words)
    config = cli.config
    if config.rows < 1:
        raise UserError(f"--rows: a number of at least 1 is needed, got {config.rows}")
    folder = RunFolder.open(Path(config.run))
    output = output_folder(folder, config.output)
    checkpoint = folder.checkpoint(config.checkpoint)
    if checkpoint.is_dir():
        raise UserError(f"--checkpoint: {checkpoint} is an export already; give 'best', 'last' or a checkpoint file")
    location = resolve(config.model.base_model, "model.base_model")
    base_id = config.base_model_id or (location.name if location.is_hub else None)
    if config.push_to_hub:
        check_push(config.push_to_hub, base_id, location.target)
    model = build_model(config, list(weights_labels(checkpoint)))
    load_checkpoint(model, checkpoint)
    model.cpu().eval()
    wanted = [config.formats] if isinstance(config.formats, str) else config.formats
    formats = choose_formats(wanted, model)
    print(f"export of {checkpoint} to {output}: {', '.join(formats)}")
    rows, unread = readable_test_rows(cli, model.label_names)
    parity = Parity.of(model, config, rows)
    if not math.isfinite(parity.certificate["trained"]["max_logit_difference"]):
        raise UserError(
            f"export: the logits of {checkpoint} are not finite, so there is nothing to export; train again"
        )
    try:
        with atomic_folder(output) as staging:
            written = write_formats(staging, formats, FormatWriter(model, checkpoint, config, parity.frame), parity)
            warnings = [*([unread] if unread else []), *parity.warnings()]
            metrics = tested_metrics(folder, checkpoint, rows.fingerprint if rows is not None else None)
            facts = card_facts(cli, folder, parity, written, base_id, metrics or parity.metrics(), warnings)
            if config.base_model_id and "adapter" in written:
                rename_base(staging / "adapter", config.base_model_id)
            for place in ("", *written):
                (staging / place / "README.md").write_text(card(facts, place), encoding="utf-8")
            content = json.dumps(parity.certificate, indent=2, allow_nan=False)
            (staging / "certificate.json").write_text(content + "\n", encoding="utf-8")
    except FileExistsError:
        raise UserError(f"{output} was made by another process meanwhile; export again") from None
    print(f"\n{certificate_table(parity.certificate)}\n\nwritten: {output} (README.md says how to load each)")
    for warning in warnings:
        print(f"warning: {warning}")
    if config.formats and (missing := parity.missing()):
        raise UserError(f"--formats: not written: {missing}; {output} holds {', '.join(written)}")
    if config.push_to_hub:
        push(output, config.push_to_hub, config.private)
    return 0


def output_folder(folder: RunFolder, given: str | None) -> Path:
    """The folder to write to: the one given, or RUN/export, RUN/export-2 and so on, whichever is free.

    Raises:
        UserError: The folder given exists.
    """
    if given is None:
        names = itertools.chain(["export"], (f"export-{number}" for number in itertools.count(2)))
        return next(path for name in names if not (path := folder.path / name).exists())
    if Path(given).exists():
        raise UserError(f"--output: {given} exists, and nothing is overwritten; give another folder")
    return Path(given)


def readable_test_rows(cli: ConfiguredRun, label_names: list[str]) -> tuple[Rows | None, str | None]:
    """The run's test rows; or None and a warning that says why they are not used.

    Raises:
        UserError: They cannot be used, and the command line says where they are.
    """
    try:
        return source_test_rows(cli, label_names), None
    except Exception as error:  # a source can be gone, moved, changed, or unreachable in many ways
        if any(word.startswith("--data.") for word in cli.words):
            raise
        why = first_line(error, 300)
        return None, f"the run's test rows were not used ({why}); the texts are made up of the vocabulary"


def choose_formats(wanted: list[str] | None, model: TextClassifier) -> list[str]:
    """The formats asked for, by default all that the method has.

    Raises:
        UserError: There is no such format, the method has no adapter, or a package for it is missing.
    """
    has_adapter = bool(model.target_modules)
    if wanted == []:
        raise UserError(f"--formats: the list is empty; give some of {', '.join(FORMATS)}, or leave it out")
    if unknown := set(wanted or ()) - set(FORMATS):
        raise UserError(f"--formats: no format '{min(unknown)}'; there are {', '.join(FORMATS)}")
    if wanted and "adapter" in wanted and not has_adapter:
        raise UserError(f"--formats: method '{model.identity.method}' has no adapter; use merged")
    if wanted and any(name.startswith("onnx") for name in wanted) and (what := missing_packages()):
        raise UserError(f"--formats: {what}, or --formats '[adapter, merged]'")
    return [name for name in FORMATS if (name in wanted if wanted else has_adapter or name != "adapter")]


def write_formats(staging: Path, formats: list[str], writer: FormatWriter, parity: Parity) -> list[str]:
    """Writes each format and compares it with the trained model; returns those that could be made and are equal.

    Raises:
        UserError: There is none, or no room for them.
    """
    written = []
    for form in formats:
        why: str | None
        try:
            writer.write(form, staging / form)
            why = parity.check(form, staging / form)
        except Exception as error:  # exporters raise kinds of several libraries, and each format stands for itself
            if isinstance(error, OSError) and refusal(error) is not None:
                raise
            lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
            why = f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__
        if why is None:
            written.append(form)
            continue
        shutil.rmtree(staging / form, ignore_errors=True)
        parity.certificate[form] = {"missing": why.replace("|", "/")}
        print(f"{form}: not written: {why}")
    if not written:
        raise UserError(f"export: nothing was written: {parity.missing()}")
    if parity.frame.keep in ENCODED:
        form = "merged" if "merged" in written else written[0]
        parity.check(form, staging / form, plain=True)
    return written


def card_facts(
    cli: ConfiguredRun,
    folder: RunFolder,
    parity: Parity,
    formats: list[str],
    base_id: str | None,
    metrics: tuple[dict[str, float], int],
    warnings: list[str],
) -> CardFacts:
    """What the cards say, from the run's record, where it has ended, and the certificate."""
    config, model = cli.config, parity.model
    record = folder.read() if folder.record.is_file() else {}
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
        usage=parity.usage,
        method=model.identity.method,
        quantization=model.identity.quantization,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        license=config.license or license_of(location),
        dataset=(name, hub_dataset(source)),
        metrics=metrics[0],
        test_rows=metrics[1],
        certificate=parity.certificate,
        formats=formats,
        trained_params=(costs["trainable_params"], costs["total_params"]),
        warnings=warnings,
        hub_name=config.push_to_hub,
    )


def hub_dataset(source: Any) -> str | None:
    """The Hub id of a data source, where it has one."""
    if not isinstance(source, str):
        return None
    spec = find_spec(source)
    try:
        location = resolve(spec.source if spec else source, "data.source")
    except UserError:  # a file that is no longer there
        return None
    return location.name.partition(":")[0] if location.is_hub else None


def tested_metrics(folder: RunFolder, checkpoint: Path, fingerprint: str | None) -> tuple[dict[str, float], int] | None:
    """Metrics and rows of the latest test of this checkpoint on these rows (on any, without a fingerprint), or None."""
    done = folder.read().get("evaluations", {}) if folder.record.is_file() else {}
    step = trained_steps(checkpoint)
    for name, evaluation in reversed(list(done.items())):
        tested = Path(evaluation["checkpoint"])
        # The folder may have been moved since, or the path be relative to another place.
        same = tested.name == checkpoint.name and checkpoint.parent == folder.checkpoints
        same = tested.samefile(checkpoint) if tested.exists() else same
        same = same and evaluation.get("step", step) == step
        if name.startswith("test") and same and fingerprint in (None, evaluation["fingerprint"]):
            return evaluation["after"], evaluation["rows"]
    return None


def license_of(location: Any) -> str:
    """The license that the base model's own card names, else "unknown"."""
    from huggingface_hub import ModelCard

    try:
        readme = location.path / "README.md" if location.path else location.name
        return ModelCard.load(readme).data.license or "unknown"
    except Exception:  # no card, no network, or one that cannot be read
        return "unknown"


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
        raise UserError(
            f"--push_to_hub: '{name}' was not uploaded ({first_line(error)}); {folder} is complete and can be uploaded "
            f"with: hf upload {name} {folder}"
        ) from error
    print(f"uploaded: {url}")
