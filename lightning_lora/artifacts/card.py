"""The model card of an export: metadata that the Hub can read, code to copy, and the certificate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Metrics of the card: name in the record, the Hub's type, what people read.
METRICS = (
    ("accuracy", "accuracy", "accuracy"),
    ("f1_macro", "f1", "F1 (macro)"),
    ("precision_macro", "precision", "precision (macro)"),
    ("recall_macro", "recall", "recall (macro)"),
)
_TITLES = {
    "trained": "the trained model",
    "adapter": "`adapter` on its base",
    "merged": "`merged`",
    "onnx": "`onnx`",
    "onnx-int8": "`onnx-int8`",
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says.

    Args:
        name: The run's name.
        base_model: What ``from_pretrained`` takes for the base.
        base_id: Its Hub id, where it has one.
        base_fingerprint: SHA-256 of its weights and tokenizer.
        label_names: In the order of their numbers.
        method: How it was fine-tuned.
        quantization: How the base was stored in training.
        max_length: Tokens that it reads.
        truncation: What it reads of longer texts.
        licence: SPDX name, or "unknown".
        dataset: Name, and Hub id where it has one.
        metrics: Of the test rows.
        test_rows: Their number.
        certificate: Comparison by format, as plain values; "trained" is the model itself.
        formats: Which formats there are.
        trained_params: Trainable and all parameters.
    """

    name: str
    base_model: str
    base_id: str | None
    base_fingerprint: str
    label_names: Sequence[str]
    method: str
    quantization: str
    max_length: int
    truncation: str
    licence: str
    dataset: tuple[str, str | None]
    metrics: Mapping[str, float]
    test_rows: int
    certificate: Mapping[str, Mapping[str, Any]]
    formats: Sequence[str]
    trained_params: tuple[int, int]


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
            metric_value=round(facts.metrics[key], 6),
        )
        for key, kind, said in METRICS
        if key in facts.metrics
    ]
    peft = place == "adapter" or (not place and "adapter" in facts.formats)
    library = "onnx" if place.startswith("onnx") else "peft" if peft else "transformers"
    data = ModelCardData(
        base_model=facts.base_id,
        library_name=library,
        pipeline_tag="text-classification",
        datasets=[dataset_id] if dataset_id else None,
        metrics=[kind for key, kind, _ in METRICS if key in facts.metrics],
        license=facts.licence,
        model_name=facts.name,
        eval_results=results or None,
        tags=["lora" if "lora" in facts.method else facts.method, "text-classification"],
    )
    return data.to_yaml().strip()


def _body(facts: CardFacts, place: str) -> str:
    labels = ", ".join(f"{i} = {name}" for i, name in enumerate(facts.label_names))
    trained, total = facts.trained_params
    cut = {
        "head": "the first are read",
        "tail": "the last are read",
        "both": "the first quarter and the last three quarters of the room are read, which a tokenizer alone cannot do",
        "windows": "all is read in windows whose probabilities are averaged, which a pipeline alone does not do",
    }[facts.truncation]
    rows = "\n".join(f"| {said} | {facts.metrics[key]:.4f} |" for key, _, said in METRICS if key in facts.metrics)
    quantized = "" if facts.quantization == "none" else f", stored as {facts.quantization} in training"
    return f"""# {facts.name}

A text classifier: `{facts.base_id or facts.base_model}` fine-tuned with method `{facts.method}`{quantized}
({trained:,} of {total:,} parameters trained) by lightning_lora.

- labels: {labels}
- input: at most {facts.max_length} tokens; of longer texts {cut}
- base model: SHA-256 of weights and tokenizer `{facts.base_fingerprint}`; on other weights, also of the same shape,
  the adapter means nothing
- data: {facts.dataset[0]}

| metric, {facts.test_rows:,} test rows | value |
| --- | --- |
{rows}

## Use

{_code(facts, place)}

## Certificate

Each form was loaded by the software it is for and given the same token ids, in full precision on one CPU.

{certificate_table(facts.certificate)}
"""


def certificate_table(certificate: Mapping[str, Mapping[str, Any]]) -> str:
    """The certificate as a Markdown table."""
    lines = [
        "| form | rows | largest logit difference | labels flipped | accuracy | texts/s | one text |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in certificate.items():
        against = ("-", "-") if name == "trained" else (f"{row['max_logit_difference']:.1e}", row["labels_flipped"])
        lines.append(
            f"| {_TITLES[name]} | {row['rows']:,} | {against[0]} | {against[1]} | {row['accuracy']:.4f} | "
            f"{row['texts_per_s']:.0f} | {row['latency_ms']:.1f} ms |"
        )
    return "\n".join(lines)


def _code(facts: CardFacts, place: str) -> str:
    """Code to copy, for what is there."""
    names = {i: str(name) for i, name in enumerate(facts.label_names)}
    here = '"."  # this folder, or its name on the Hub'
    blocks = []
    if place in ("", "adapter") and "adapter" in facts.formats:
        quantized = ""
        if facts.quantization != "none":
            quantized = (
                f"# Trained on a base stored as {facts.quantization}; for exactly that, pass quantization_config too.\n"
            )
        elsewhere = (
            ""
            if facts.base_id
            else (
                "\n\nIts `adapter_config.json` names the base model by where it lay on the machine that wrote it; "
                "elsewhere, put the path of a copy there."
            )
        )
        told = "num_labels=len(labels), id2label=labels, label2id={v: k for k, v in labels.items()}"
        if place:
            classes, sub = "AutoPeftModelForSequenceClassification", ""
            load = f"model = AutoPeftModelForSequenceClassification.from_pretrained(path, {told}).eval()"
            more = "AutoTokenizer"
        else:  # PEFT's own class looks for the base model in the subfolder too
            classes, sub, more = (
                "PeftConfig, PeftModel",
                ', subfolder="adapter"',
                "AutoModelForSequenceClassification, AutoTokenizer",
            )
            load = f"""base = PeftConfig.from_pretrained(path{sub}).base_model_name_or_path
base_model = AutoModelForSequenceClassification.from_pretrained(base, {told})
model = PeftModel.from_pretrained(base_model, path{sub}).eval()"""
        blocks.append(f"""The adapter, with PEFT (it has to be told the labels, which PEFT's format does not hold):

```python
import torch
from peft import {classes}
from transformers import {more}

path = {here}
labels = {names!r}
{quantized}{load}
tokenizer = AutoTokenizer.from_pretrained(path{sub})
inputs = tokenizer(["your text"], truncation=True, padding=True, return_tensors="pt")
inputs.pop("token_type_ids", None)
with torch.no_grad():
    print(labels[model(**inputs).logits.argmax(-1).item()])
```{elsewhere}""")
    if place in ("", "merged") and "merged" in facts.formats:
        sub = ', subfolder="merged"' if not place else ""
        blocks.append(f"""The whole model, with transformers:

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

path = {here}
model = AutoModelForSequenceClassification.from_pretrained(path{sub})
classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(path{sub}))
print(classify(["your text"], truncation=True))
```""")
    graph = place if place.startswith("onnx") else "onnx"
    if place in ("", "onnx", "onnx-int8") and graph in facts.formats:
        folder = "onnx/" if not place else ""
        direction = ', direction="left"' if facts.truncation == "tail" else ""
        blocks.append(f"""With ONNX Runtime, without torch:

```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

labels = {names!r}
tokenizer = Tokenizer.from_file("{folder}tokenizer.json")
tokenizer.enable_truncation({facts.max_length}{direction})
session = onnxruntime.InferenceSession("{folder}model.onnx")
encoded = tokenizer.encode("your text")
inputs = {{"input_ids": np.array([encoded.ids]), "attention_mask": np.array([encoded.attention_mask])}}
print(labels[int(session.run(None, inputs)[0].argmax())])
```""")
    return "\n\n".join(blocks)
