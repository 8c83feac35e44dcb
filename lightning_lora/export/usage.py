"""The code that loads each exported format: what the cards print, and what the parity check runs."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_lora.quiet import quiet_loading

#: Truncations that a tokenizer does not do by itself, so that exports bring ``encode.py``.
ENCODED = ("both", "windows")
#: Gives logits (texts, classes), float32.
Client = Callable[[list[str]], NDArray]

_IMPORTS = {
    "adapter": "import torch\nfrom peft import AutoPeftModelForSequenceClassification",
    "merged": "import torch\nfrom transformers import AutoModelForSequenceClassification",
    "onnx": "import onnxruntime",
}
_LOAD = {
    "adapter": """model = AutoPeftModelForSequenceClassification.from_pretrained(
    path,
    num_labels=len(labels),
    id2label=labels,
    label2id={name: i for i, name in labels.items()},
    pad_token_id=PAD,
    dtype="float32",
).eval()""",
    "merged": "model = AutoModelForSequenceClassification.from_pretrained(path).eval()",
    "onnx": """session = onnxruntime.InferenceSession(path + "/model.onnx", providers=["CPUExecutionProvider"])
names = [each.name for each in session.get_inputs()]""",
}
_TORCH_RUN = """with torch.no_grad():
        return model(**{name: torch.as_tensor(value) for name, value in inputs.items()}).logits.numpy()"""
_RUN = {
    "adapter": _TORCH_RUN,
    "merged": _TORCH_RUN,
    "onnx": "return session.run(None, {name: inputs[name] for name in names})[0]",
}
_ENCODER = 'encoder = runpy.run_path(path + "/encode.py")["Encoder"](path)  # plain Python: it cuts as in training'
_TRANSFORMERS_ENCODE = 'return run(**tokenizer(texts, truncation=True, padding=PADDING, return_tensors="pt"))'
_TOKENIZERS_ENCODE = """encoded = tokenizer.encode_batch(texts)  # cuts and pads as it was saved
    ids, masks = [each.ids for each in encoded], [each.attention_mask for each in encoded]
    return run(input_ids=np.array(ids, dtype=np.int64), attention_mask=np.array(masks, dtype=np.int64))"""


@dataclass(frozen=True)
class Usage:
    """How the formats of one export are loaded and given texts.

    Args:
        label_names: In the order of the classes.
        truncation: What is kept of long texts.
        pad_token_id: Of the trained model's config; the base's own may be another.
        pad_to_max: Whether every text is padded to ``max_length``.
        text_columns: What a text is joined of, by ``joined_text``.
    """

    label_names: Sequence[str]
    truncation: str
    pad_token_id: int | None
    pad_to_max: bool
    text_columns: Sequence[str]

    @property
    def example(self) -> str:
        """A Python expression for a text to classify, joined as in training."""
        parts = [f"your {name}" for name in self.text_columns] if len(self.text_columns) > 1 else ["your text"]
        return ' + " " + '.join(json.dumps(part, ensure_ascii=False) for part in parts)

    def code(self, form: str, path: str, plain: bool = False) -> str:
        """Python code that loads a format, defines ``logits`` (or ``classify``, a pipeline) and classifies a text.

        Args:
            form: The format.
            path: A Python expression for its folder.
            plain: Let the tokenizer truncate, also where it does so otherwise than in training.
        """
        kind = form.removesuffix("-int8")
        encoded = self.truncation in ENCODED and not plain
        padding = '"max_length"' if self.pad_to_max else "True"
        if kind == "merged" and not encoded:
            more = f", padding={padding}" if self.pad_to_max else ""
            return f"""from transformers import pipeline

path = {path}
classify = pipeline("text-classification", model=path, truncation=True{more})
print(classify([{self.example}]))"""
        imports = [_IMPORTS[kind]]
        if encoded:
            imports.insert(0, "import runpy\n")
            tokenizer, encode = _ENCODER, "return encoder.logits(texts, run)"
        elif kind == "onnx":
            imports = ["import numpy as np", *imports, "from tokenizers import Tokenizer"]
            tokenizer, encode = 'tokenizer = Tokenizer.from_file(path + "/tokenizer.json")', _TOKENIZERS_ENCODE
        else:
            imports.append("from transformers import AutoTokenizer")
            tokenizer = "tokenizer = AutoTokenizer.from_pretrained(path)"
            encode = _TRANSFORMERS_ENCODE.replace("PADDING", padding)
        lines = "\n".join(imports)
        labels = {i: str(name) for i, name in enumerate(self.label_names)}
        return f"""{lines}

path = {path}
labels = {labels!r}
{tokenizer}
{_LOAD[kind].replace("PAD", str(self.pad_token_id))}


def run(**inputs):
    {_RUN[kind]}


def logits(texts):
    {encode}


print(labels[int(logits([{self.example}]).argmax())])"""


def client(code: str) -> Client:
    """Runs code of ``Usage`` and returns what it made to classify texts."""
    namespace: dict[str, Any] = {"__name__": "__usage__"}
    with quiet_loading(), contextlib.redirect_stdout(io.StringIO()):
        exec(compile(code, "README.md", "exec"), namespace)  # this module's own text
    if "logits" in namespace:
        return lambda texts: np.asarray(namespace["logits"](texts), dtype=np.float32)
    classify = namespace["classify"]
    names = [classify.model.config.id2label[i] for i in range(classify.model.config.num_labels)]

    def run(texts: list[str]) -> NDArray:
        found = classify(texts, top_k=None, function_to_apply="none", batch_size=len(texts))
        scores = [{each["label"]: each["score"] for each in row} for row in found]
        return np.array([[row[name] for name in names] for row in scores], dtype=np.float32)

    return run
