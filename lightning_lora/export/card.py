"""The model card of an export, and the code in it that loads each format: templates beside this module."""

import json
import math
import platform
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_lora.evaluation.metric_table import METRICS, row_metrics
from lightning_lora.export.formats import ENCODED

#: The Gradio that the page of a Space is written for.
SPACE_GRADIO = "6.31.0"
_TEMPLATES = Environment(
    loader=PackageLoader("lightning_lora.export", ""), undefined=StrictUndefined, trim_blocks=True, autoescape=False
)
_TEMPLATES.filters["quoted"] = partial(json.dumps, ensure_ascii=False)


def usage_code(
    usage: Mapping[str, Any],
    name: str,
    path: str,
    plain: bool = False,
    example: bool = True,
    pipeline: bool = True,
) -> str:
    """Returns Python code that loads a format, defines ``logits`` or ``classify`` and classifies a text.

    Args:
        usage: How texts are given to the formats and what their logits mean: label_names, task, thresholds, truncation,
            pair (whether that is of a pair), token_types (whether pairs have them), pad_token_id, pad_to_max,
            text_columns; and the head, where it reads the mean of a text's states.
        name: The format.
        path: A Python expression for its folder.
        plain: Let the tokenizer truncate, also where it does so otherwise than in training.
        example: Classify a text and print what is predicted.
        pipeline: Let it be ``classify`` where that is enough.
    """
    encoder = usage["truncation"] in ENCODED and not plain
    facts = {"name": name.removesuffix("-int8"), "path": path, "encoder": encoder, "pipeline": pipeline}
    return _TEMPLATES.get_template("usage.py.j2").render(usage, **facts, example_shown=example).strip()


def space_files(facts: Mapping[str, Any]) -> dict[str, str]:
    """Returns the files of a Hugging Face Space, by name, but for the merged model, which goes into ``model``."""
    folder = 'os.path.join(os.path.dirname(os.path.abspath(__file__)), "model")'
    code = usage_code(facts["usage"], "merged", folder, example=False)
    named = {"gradio": SPACE_GRADIO, "python": ".".join(platform.python_version_tuple()[:2]), "code": code}
    packages = {
        name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers", "numpy", "safetensors")
    }
    return {
        "app.py": _TEMPLATES.get_template("space_app.py.j2").render(facts, **named) + "\n",
        "README.md": _TEMPLATES.get_template("space_card.md.j2").render(facts, **named) + "\n",
        "requirements.txt": "".join(f"{k}=={v}\n" for k, v in {"gradio": SPACE_GRADIO, **packages}.items()),
    }


def card_metrics(metrics: Mapping[str, float | None]) -> list[tuple[str, str, float]]:
    """Returns the Hub's type, the heading and the value of each metric of the card; none that is not defined."""
    return [
        (spec.hub_type, spec.heading, value)
        for name, spec in METRICS.items()
        if spec.hub_type is not None and (value := metrics.get(name)) is not None and not math.isnan(value)
    ]


def card(place: str, facts: Mapping[str, Any]) -> str:
    """Returns the README.md of a place, "" for the whole export, or the name of one format's folder: ``card.md.j2``."""
    hub = f'huggingface_hub.snapshot_download("{facts["hub_name"] or "OWNER/NAME"}")'
    paths = {name: f'"{name}"  # from the Hub: {hub} + "/{name}"' for name in facts["formats"]}
    paths = {place: '"."  # this folder'} if place else paths
    peft = place == "adapter" or (not place and "adapter" in facts["formats"])
    whole = "sentence-transformers" if facts["usage"]["head"] else "transformers"
    return _TEMPLATES.get_template("card.md.j2").render(
        facts,
        codes={name: usage_code(facts["usage"], name, path) for name, path in paths.items()},
        library="onnx" if place.startswith("onnx") else "peft" if peft else whole,
        results=card_metrics(facts["metrics"]),
        primary_metric=(primary_metric := row_metrics(facts["usage"]["task"])[0], METRICS[primary_metric].heading),
    )
