"""The model card of an export: metadata that the Hub can read, code to copy, and the certificate of parity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_lora.evaluation.metric_table import METRICS
from lightning_lora.export.usage import Usage

_TITLES = {
    "trained": "the trained model",
    "adapter": "`adapter` on its base",
    "merged": "`merged`",
    "onnx": "`onnx`",
    "onnx-int8": "`onnx-int8`",
}
_HEADINGS = {
    "adapter": "The adapter, with PEFT (it has to be told the labels, which PEFT's format does not hold):",
    "merged": "The whole model, with transformers:",
    "onnx": "With ONNX Runtime, without torch:",
    "onnx-int8": "The same in 8 bits, with ONNX Runtime:",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        name: The run's name.
        base_model: What ``from_pretrained`` takes for the base.
        base_id: Its Hub id, where it has one.
        base_fingerprint: SHA-256 of its weights and tokenizer.
        usage: The code that loads each format; holds the label names in the order of their numbers.
        method: How it was fine-tuned.
        quantization: How the base was stored in training.
        max_length: Tokens that it reads.
        truncation: What it reads of longer texts.
        license: SPDX name, or "unknown".
        dataset: Name, and Hub id where it has one.
        metrics: Of the test rows.
        test_rows: Their number.
        certificate: Comparison by format, as plain values; "trained" is the model itself; or why one is missing.
        formats: Which formats there are.
        trained_params: Trainable and all parameters.
        warnings: What a user of the files should know of the comparison.
        hub_name: Where the files are uploaded to, if anywhere.
    """

    name: str
    base_model: str
    base_id: str | None
    base_fingerprint: str
    usage: Usage
    method: str
    quantization: str
    max_length: int
    truncation: str
    license: str
    dataset: tuple[str, str | None]
    metrics: Mapping[str, float]
    test_rows: int
    certificate: Mapping[str, Mapping[str, Any]]
    formats: Sequence[str]
    trained_params: tuple[int, int]
    warnings: Sequence[str] = ()
    hub_name: str | None = None


def card_metrics(facts: CardFacts) -> list[tuple[str, str, float]]:
    """The Hub's type, the heading and the value of each metric of the card."""
    return [
        (spec.hub_type, spec.heading, facts.metrics[name])
        for name, spec in METRICS.items()
        if spec.hub_type is not None and name in facts.metrics
    ]


def card(facts: CardFacts, place: str) -> str:
    """The README.md of a place: "" for the whole export, or the name of one format's folder."""
    return f"---\n{metadata(facts, place)}\n---\n\n{_body(facts, place)}"


def metadata(facts: CardFacts, place: str) -> str:
    """The YAML on top of a card."""
    from huggingface_hub import EvalResult, ModelCardData

    name, dataset_id = facts.dataset
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=dataset_id or name,
            dataset_name=name,
            dataset_split="test",
            metric_type=kind,
            metric_name=said,
            metric_value=round(value, 6),
        )
        for kind, said, value in card_metrics(facts)
    ]
    peft = place == "adapter" or (not place and "adapter" in facts.formats)
    library = "onnx" if place.startswith("onnx") else "peft" if peft else "transformers"
    data = ModelCardData(
        base_model=facts.base_id,
        library_name=library,
        pipeline_tag="text-classification",
        datasets=[dataset_id] if dataset_id else None,
        metrics=[kind for kind, _, _ in card_metrics(facts)],
        license=facts.license,
        model_name=facts.name,
        eval_results=results or None,
        tags=["lora" if "lora" in facts.method else facts.method, "text-classification"],
    )
    return data.to_yaml().strip()


def _body(facts: CardFacts, place: str) -> str:
    labels = ", ".join(f"{i} = {name}" for i, name in enumerate(facts.usage.label_names))
    trained, total = facts.trained_params
    cut = {
        "head": "the first are read",
        "tail": "the last are read",
        "both": "the first quarter and the last three quarters of the room are read (by `encode.py`)",
        "windows": "all is read in windows whose probabilities are averaged (by `encode.py`)",
    }[facts.truncation]
    rows = "\n".join(f"| {said} | {value:.4f} |" for _, said, value in card_metrics(facts))
    tested = f"| metric, {facts.test_rows:,} test rows | value |\n| --- | --- |\n{rows}" if rows else "Not tested."
    columns = ' + " " + '.join(facts.usage.text_columns)
    joined = f"`{columns}` (without columns that are blank), " if len(facts.usage.text_columns) > 1 else ""
    quantized = "" if facts.quantization == "none" else f", stored as {facts.quantization} in training"
    warnings = "".join(f"\n- warning: {what}" for what in facts.warnings)
    return f"""# {facts.name}

A text classifier: `{facts.base_id or facts.base_model}` fine-tuned with method `{facts.method}`{quantized}
({trained:,} of {total:,} parameters trained) by lightning_lora.

- labels: {labels}
- input: {joined}at most {facts.max_length} tokens; of longer texts {cut}
- base model: SHA-256 of weights and tokenizer `{facts.base_fingerprint}`; on other weights, also of the same shape,
  the adapter means nothing
- data: {facts.dataset[0]}

{tested}

## Use

{_code(facts, place)}

## Certificate

Each form was loaded by the code above, with its own tokenizer, and given the same raw texts as the trained model, in
float32:
{parity_texts(facts.certificate["trained"], facts.max_length)}

{certificate_table(facts.certificate)}
{warnings}
"""


def parity_texts(row: Mapping[str, Any], max_length: int) -> str:
    """What the forms were compared on, in words."""
    real = row["rows"] - row["made_up"]
    kinds = [f"{real:,} test rows"] * (real > 0) + [f"{row['made_up']:,} made-up texts"] * (row["made_up"] > 0)
    return (
        f"{' and '.join(kinds)}, of which {row['long_rows']:,} are longer than {max_length} tokens, in padded batches; "
        f"{row['single_rows']:,} of them also one by one."
    )


def certificate_table(certificate: Mapping[str, Mapping[str, Any]]) -> str:
    """The certificate as a Markdown table."""
    lines = [
        "| form | texts | largest logit difference | labels flipped | one by one | accuracy | texts/s | one text |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in certificate.items():
        title = _TITLES.get(name, name)
        if "missing" in row:
            lines.append(f"| {title} | missing: {row['missing']} | | | | | | |")
            continue
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        lines.append(
            f"| {title} | {row['rows']:,} | {row['max_logit_difference']:.1e} | {row['labels_flipped']:,} | "
            f"{row['labels_flipped_single']:,} of {row['single_rows']:,} | {accuracy} | {row['texts_per_s']:.0f} | "
            f"{row['latency_ms']:.1f} ms |"
        )
    return "\n".join(lines)


def _code(facts: CardFacts, place: str) -> str:
    """Code to copy, for what is there: in a format's folder its own, in the whole export that of each."""
    blocks = []
    for form in facts.formats if not place else [place]:
        path = '"."  # this folder'
        if not place:
            hub = f'huggingface_hub.snapshot_download("{facts.hub_name or "OWNER/NAME"}") + "/{form}"'
            path = f'"{form}"  # from the Hub: {hub}'
        notes = ""
        if form == "adapter" and facts.quantization != "none":
            notes += (
                f"\n\nIt was trained on a base stored as {facts.quantization}; for exactly that, pass "
                "`quantization_config` too."
            )
        if form == "adapter" and not facts.base_id:
            notes += (
                "\n\nIts `adapter_config.json` names the base model by where it lay on the machine that wrote it; "
                "elsewhere, put the path of a copy there."
            )
        code = facts.usage.code(form, path)
        blocks.append(f"{_HEADINGS[form]}\n\n```python\n{code}\n```{notes}")
    return "\n\n".join(blocks)
