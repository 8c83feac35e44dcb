"""``main.py demo``: a page on this machine that classifies texts by one run or several side by side."""

import os
from pathlib import Path

import numpy as np

from lightning_lora.commands.sample import cell_text, read_predictions, texts_of
from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.data.pairs import Text, is_pair
from lightning_lora.errors import UserError
from lightning_lora.runs.folder import RunFolder

#: Test rows to try.
_EXAMPLES = 20


def run(argv: list[str]) -> int:
    """Show the page until it is interrupted."""
    parser = OptionParser("demo", description="A page on 127.0.0.1, for this machine alone (docs/demo.md).")
    parser.add_argument("--run", required=True, action="append", help="A run folder; again for more, side by side.")
    parser.add_argument("--port", type=int, help="By default the first from 7860 on that is free.")
    options = parser.parse_args(argv)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported
    from lightning_lora.inference.loaded_run import load_run
    from lightning_lora_demo.page import Demo

    folders = [RunFolder.open(Path(each)) for each in options.run]
    names = [each.path.name for each in folders]
    if len({*names}) < len(names):
        names = [str(each.path) for each in folders]
    if len({*names}) < len(names):
        raise UserError("--run: a run is given twice")
    settings = folders[0].settings()["data"]
    columns = settings["text_column"] if is_pair(settings["truncation"]) else ["text"]
    runs = {name: load_run(each.path, precision="32-true") for name, each in zip(names, folders, strict=True)}
    separators = {n: each.settings()["data"].get("label_separator") for n, each in zip(names, folders, strict=True)}
    given = {name: separator for name, separator in separators.items() if separator}
    Demo(runs, columns, examples_of(folders[0]), given).launch(options.port)
    return 0


def examples_of(folder: RunFolder) -> list[tuple[Text, str]]:
    """Return random test rows with their truth; none, and why, where the run was not tested or its rows are gone."""
    try:
        rows = read_predictions(folder, "test")
        chosen = np.random.default_rng(0).permutation(len(rows))[:_EXAMPLES]
        rows = [rows[i] for i in np.sort(chosen)]
        texts = texts_of(folder, "test", rows)
    except UserError as error:
        print(f"warning: no examples: {error}")
        return []
    return [(text, cell_text(row["label"])) for text, row in zip(texts, rows, strict=True)]
