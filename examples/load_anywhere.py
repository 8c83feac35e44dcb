"""Classifies texts with every format of an export, by the code of each format's own card, and compares the results.

Nothing of lightning_lora is imported: this is how other software sees the files.

    python examples/load_anywhere.py logs/NAME/export texts.txt [logits.json]

``texts.txt`` holds a text a line, or a pair of texts with a tab between. Ends with status 1 when label names differ, or
when a form in full precision is further than 1e-4 from another in any logit, in padded batches or one text at a time.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

TOLERANCE = 1e-4
BATCH = 32


def card_code(folder: Path) -> Callable[[list[str]], np.ndarray]:
    """Runs the code in a folder's card, and returns a function from texts to logits (texts, classes)."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    found: dict = {}
    with contextlib.chdir(folder):
        exec(compile(code, str(folder / "README.md"), "exec"), found)
    if "logits" in found:
        return found["logits"]
    classify = found["classify"]  # a pipeline
    names = [classify.model.config.id2label[i] for i in range(classify.model.config.num_labels)]

    def logits(texts: list[str]) -> np.ndarray:
        pairs = [dict(zip(("text", "text_pair"), each, strict=True)) for each in texts if isinstance(each, tuple)]
        said = classify(pairs or texts, top_k=None, function_to_apply="none", batch_size=len(texts))
        rows = [{each["label"]: each["score"] for each in row} for row in said]
        return np.array([[row[name] for name in names] for row in rows], dtype=np.float32)

    return logits


def label_names(folder: Path) -> list[str]:
    """The label names that a folder's files hold: ``config.json``, or for an adapter ``lightning_lora.json``."""
    config = folder / "config.json"
    if config.is_file():
        labels = json.loads(config.read_text(encoding="utf-8"))["id2label"]
        return [labels[str(i)] for i in range(len(labels))]
    return json.loads((folder / "lightning_lora.json").read_text(encoding="utf-8"))["label_names"]


def main() -> int:
    """Prints how far each form is from the merged model."""
    export = Path(sys.argv[1])
    texts: list = Path(sys.argv[2]).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if all("\t" in text for text in texts):
        texts = [tuple(text.split("\t", 1)) for text in texts]
    forms = [name for name in ("merged", "adapter", "onnx", "onnx-int8") if (export / name).is_dir()]
    said, names = {}, {}
    for name in forms:
        logits = card_code(export / name)
        batches = np.concatenate([logits(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)])
        said[name] = (batches, np.concatenate([logits([text]) for text in texts]))
        names[name] = label_names(export / name)
    first = said[forms[0]][0]
    bad = False
    for name, both in said.items():
        difference = float(max(np.abs(rows - first).max() for rows in both))
        batch, single = (int((rows.argmax(1) != first.argmax(1)).sum()) for rows in both)
        print(
            f"{name}: labels {names[name]}, largest logit difference {difference:.1e}, of {len(texts)} labels flipped "
            f"in batches {batch}, one by one {single}"
        )
        bad |= names[name] != names[forms[0]] or (difference > TOLERANCE and name != "onnx-int8")
    if len(sys.argv) > 3:
        found = {name: {"labels": names[name], "logits": rows.tolist()} for name, (rows, _) in said.items()}
        Path(sys.argv[3]).write_text(json.dumps(found))
    assert not any(name.split(".")[0] in ("lightning_lora", "lightning") for name in sys.modules)
    return int(bad)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
