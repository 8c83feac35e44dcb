"""``main.py sample``: some texts with truth and prediction, to see what a model gets right and wrong.

Needs no torch: it reads what ``test`` (or ``fit``) has written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.data.pairs import Text
from lightning_lora.data.prepare import Prepared, SourceOptions, prepare
from lightning_lora.data.stored import default_cache_dir
from lightning_lora.errors import UserError
from lightning_lora.program import command_line
from lightning_lora.runs.folder import RunFolder, best_evaluation, best_predictions

_COLUMNS = ["label", "prediction", "probability", "origin", "row", "key"]


def run(argv: list[str]) -> int:
    """Print random rows of a split, hits and misses marked, and what share is right."""
    parser = OptionParser("sample", description="Random rows with truth and prediction.")
    parser.add_argument("--run", required=True, help="The run folder, such as logs/NAME.")
    parser.add_argument("--n", type=int, default=10, help="How many rows.")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="Of which rows.")
    parser.add_argument("--only", choices=("all", "hits", "misses"), default="all", help="Hits, misses, or both.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed shows other rows.")
    parser.add_argument("--chars", type=int, default=300, help="Characters of a text that are shown.")
    options = parser.parse_args(argv)
    folder = RunFolder.open(Path(options.run))
    rows = read_predictions(folder, options.split)
    numbers = isinstance(rows[0]["label"], float)
    if numbers and options.only != "all":
        raise UserError(f"--only: a predicted number is neither hit nor miss; leave '{options.only}' out")
    hit = np.array([row["label"] == row["prediction"] for row in rows])
    pool = np.flatnonzero({"all": hit | ~hit, "hits": hit, "misses": ~hit}[options.only])
    if options.n < 1:
        raise UserError(f"--n: a number of at least 1 is needed, got {options.n}")
    if not len(pool):
        raise UserError(f"--only: there are no {options.only} among the {len(hit)} rows")
    chosen = np.sort(np.random.default_rng(options.seed).permutation(pool)[: options.n])
    shown = [rows[i] for i in chosen]
    print_rows(shown, texts_of(folder, options.split, shown), options.chars)
    if numbers:
        errors = np.array([abs(row["label"] - row["prediction"]) for row in rows])
        said = f"mean absolute error {errors[chosen].mean():.4f} on these {len(chosen)}"
        print(f"{said}; {errors.mean():.4f} on all {len(hit):,} {options.split} rows")
        return 0
    if options.only == "all":
        print(f"{hit[chosen].sum()} of these {len(chosen)} are right ({hit[chosen].mean():.1%})", end="; ")
    print(f"of all {len(hit):,} {options.split} rows {hit.sum():,} are right ({hit.mean():.2%})")
    return 0


def read_predictions(folder: RunFolder, split: str) -> list[dict[str, Any]]:
    """Return label, prediction, probabilities (but of numbers), origin, row and key of each test or validation row.

    They are the best checkpoint's; of the validation rows where ``validate`` was not run those of fit's last pass.

    Raises:
        UserError: There are none.
    """
    import pyarrow.parquet as pq

    name = best_evaluation(folder.read_if_written(), split)
    file = folder.path / "predictions" / f"{split}.parquet" if name is None else best_predictions(folder.path, name)
    if not file.is_file() or (name is None and split == "test"):
        command = command_line({"val": "validate", "test": "test"}[split], "--run", folder.path)
        raise UserError(f"--split: the best checkpoint has not predicted the {split} rows; run first: {command}")
    try:
        with pq.ParquetFile(file) as table:
            names = [name for name in table.schema_arrow.names if name in _COLUMNS or name.startswith("p(")]
            return table.read(names).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error


def texts_of(folder: RunFolder, split: str, shown: Sequence[dict[str, Any]]) -> list[Text]:
    """Return the texts of evaluated rows, from the run's source.

    Raises:
        UserError: The source is not what it was.
    """
    config = folder.settings()["data"]
    cache = Path(config["cache_dir"]).expanduser() if config.get("cache_dir") else default_cache_dir()
    prepared = prepare(SourceOptions.of(config), cache)
    rows = prepared.splits[split]
    # By number and text; the file may have another path from here than it had then, and tells which of equal ones.
    places: dict[tuple[int, bytes], dict[str, int]] = {}
    for i, where in enumerate(zip(rows.numbers.tolist(), rows.keys, strict=True)):
        places.setdefault(where, {})[rows.origins[i]] = i
    texts = []
    for row in shown:
        same = places.get((row["row"], row["key"]), {})
        found = same.get(row["origin"], next(iter(same.values()), None))
        if found is None or _truth(prepared, rows.labels[found]) != row["label"]:
            raise UserError(
                f"{row['origin']}, row {row['row']}: not the row that was evaluated; the source has changed since, or "
                "it was evaluated with other data settings than the run's"
            )
        texts.append(rows.texts[found])
    return texts


def _truth(prepared: Prepared, label: Any) -> Any:
    """The label of a row, as files of predictions have it."""
    if prepared.task == "regression":
        return float(np.float32(label))
    if prepared.task == "single_label":
        return prepared.label_names[label]
    return [name for name, has in zip(prepared.label_names, label, strict=True) if has]


def print_rows(shown: Sequence[dict[str, Any]], texts: Sequence[Text], chars: int) -> None:
    """Print a table of rows with their texts, each cut to so many characters."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    single = any("probability" in row for row in shown)
    for heading in ("", "truth", "prediction", *(["probability"] if single else [])):
        right = heading == "probability"
        table.add_column(heading, no_wrap=single or heading == "", justify="right" if right else "left")
    table.add_column("text", ratio=1, overflow="fold", min_width=24)
    for row, text in zip(shown, texts, strict=True):
        truth, predicted = (cell_text(row[name]) for name in ("label", "prediction"))
        mark = Text("✓ hit", "green") if truth == predicted else Text("✗ miss", "bold red")
        mark = Text("") if isinstance(row["label"], float) else mark
        probability = [f"{row['probability']:.3f}"] if single else []
        lines = [" ".join(side.split()) for side in ([text] if isinstance(text, str) else text)]
        cut = "\n".join(line if len(line) <= chars else f"{line[:chars]} ..." for line in lines)
        table.add_row(mark, Text(truth), Text(predicted), *probability, Text(cut))
    Console().print(table)


def cell_text(value: Any) -> str:
    """Return a label, several or a number as a cell for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(value) if isinstance(value, list) else str(value)
