"""Loads an export with peft, transformers, ONNX Runtime and safetensors, and compares what they say.

Nothing of lightning_lora is imported: this is how other software sees the files.

    python examples/load_anywhere.py logs/NAME/export texts.txt [logits.json]

``texts.txt`` holds a text a line. Ends with status 1 when label names differ, or when a form in full precision is
further than 1e-4 from another in any logit.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

TOLERANCE = 1e-4
BATCH = 32


def facts(folder: Path) -> dict:
    """What the export says of itself."""
    return json.loads((folder / "lightning_lora.json").read_text())


def with_peft(folder: Path, texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """Logits (texts, C) and label names; PEFT has to be told the labels."""
    labels = dict(enumerate(facts(folder)["label_names"]))
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(labels), id2label=labels, label2id={v: k for k, v in labels.items()}
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = []
    for start in range(0, len(texts), BATCH):
        inputs = tokenizer(texts[start : start + BATCH], truncation=True, padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            logits.append(model(**inputs).logits.numpy())
    config = model.get_base_model().config
    return np.concatenate(logits), [config.id2label[i] for i in range(config.num_labels)]


def with_pipeline(folder: Path, texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """The same from ``pipeline("text-classification")`` on the merged folder."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    said = classify(texts, truncation=True, top_k=None, function_to_apply="none", batch_size=BATCH)
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = [{each["label"]: each["score"] for each in row} for row in said]
    return np.array([[row[name] for name in names] for row in rows], dtype=np.float32), names


def with_onnx(folder: Path, texts: list[str]) -> tuple[np.ndarray, list[str]]:
    """The same from ONNX Runtime and the tokenizers library alone."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    tokenizer.enable_truncation(
        facts(folder)["max_length"], direction="left" if facts(folder)["truncation"] == "tail" else "right"
    )
    tokenizer.enable_padding(pad_id=config["pad_token_id"])
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer.encode_batch(texts[start : start + BATCH])
        inputs = {
            "input_ids": np.array([each.ids for each in encoded], dtype=np.int64),
            "attention_mask": np.array([each.attention_mask for each in encoded], dtype=np.int64),
        }
        logits.append(session.run(None, inputs)[0])
    return np.concatenate(logits), [config["id2label"][str(i)] for i in range(len(config["id2label"]))]


def main() -> int:
    """Prints how far each form is from the merged model."""
    export = Path(sys.argv[1])
    texts = Path(sys.argv[2]).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    clients = {"merged": with_pipeline, "adapter": with_peft, "onnx": with_onnx, "onnx-int8": with_onnx}
    said = {name: run(export / name, texts) for name, run in clients.items() if (export / name).is_dir()}
    logits, names = said["merged"]
    bad = False
    for name, (others, labels) in said.items():
        difference = float(np.abs(others - logits).max())
        flips = int((others.argmax(1) != logits.argmax(1)).sum())
        print(f"{name}: labels {labels}, largest logit difference {difference:.1e}, {flips} of {len(texts)} flipped")
        bad |= labels != names or (difference > TOLERANCE and name != "onnx-int8")
    if (export / "adapter").is_dir():
        with safe_open(export / "adapter" / "adapter_model.safetensors", "np") as file:
            print(f"adapter_model.safetensors: {len(file.keys())} tensors")
    if len(sys.argv) > 3:
        found = {name: {"labels": labels, "logits": rows.tolist()} for name, (rows, labels) in said.items()}
        Path(sys.argv[3]).write_text(json.dumps(found))
    assert not any(name.split(".")[0] in ("lightning_lora", "lightning") for name in sys.modules)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
