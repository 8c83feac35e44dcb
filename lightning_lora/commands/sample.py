"""``main.py sample``: some texts with truth and prediction, to look at what a model gets right and wrong.

Needs no torch: it reads what ``test`` (or ``fit``) has written.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np
import yaml

from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.data.cache import default_cache_dir
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.errors import UserError
from lightning_lora.runs.folder import RunFolder

SHOWN = ("all", "hits", "misses")


def run(words: list[str]) -> int:
    """Prints random rows of a split, hits and misses marked, and what share is right."""
    options = _parser().parse_args(words)
    folder = RunFolder.open(Path(options.run))
    predictions = read_predictions(folder, options.split)
    hit = predictions["label"] == predictions["prediction"]
    candidates = {"all": np.arange(len(hit)), "hits": np.flatnonzero(hit), "misses": np.flatnonzero(~hit)}
    pool = candidates[options.only]
    if options.n < 1:
        raise UserError(f"--n: a number of at least 1 is needed, got {options.n}")
    if not len(pool):
        raise UserError(f"--only: there are no {options.only} among the {len(hit)} rows")
    chosen = np.sort(np.random.default_rng(options.seed).permutation(pool)[: options.n])
    texts = texts_of(folder, options.split, predictions, chosen)
    _print(texts, {name: column[chosen] for name, column in predictions.items()}, options.chars)
    if options.only == "all":
        print(f"{hit[chosen].sum()} of these {len(chosen)} are right ({hit[chosen].mean():.1%})", end="; ")
    print(f"of all {len(hit):,} {options.split} rows {hit.sum():,} are right ({hit.mean():.2%})")
    return 0


def read_predictions(folder: RunFolder, split: str) -> dict[str, np.ndarray]:
    """Columns label, prediction, probability, origin, row and key of the test or validation rows.

    Of the validation rows what the best checkpoint said where ``validate`` was run, else fit's last pass.

    Raises:
        UserError: There is none.
    """
    import pyarrow.parquet as pq

    files = {name: folder.path / "predictions" / f"{name}.parquet" for name in ("test", "val", "val-best")}
    file = files["val-best"] if split == "val" and files["val-best"].is_file() else files[split]
    if not file.is_file():
        raise UserError(f"--split: {file} is not there; run first: python main.py {_maker(split)} --run {folder.path}")
    try:
        table = pq.read_table(file, columns=["label", "prediction", "probability", "origin", "row", "key"])
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error
    return {name: np.asarray(table.column(name).to_pylist(), dtype=object) for name in table.column_names}


def texts_of(folder: RunFolder, split: str, predictions: dict[str, np.ndarray], chosen: np.ndarray) -> list[str]:
    """The texts of the chosen rows, from the run's source.

    Raises:
        UserError: The source is not what it was.
    """
    settings = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    config = settings["data"]
    known = {field.name for field in fields(SourceOptions)}
    options = SourceOptions(**{key: value for key, value in config.items() if key in known})
    cache = Path(config["cache_dir"]).expanduser() if config.get("cache_dir") else default_cache_dir()
    prepared = prepare(options, cache)
    rows = prepared.splits[split]
    place = {where: i for i, where in enumerate(zip(rows.origins, rows.numbers.tolist(), strict=True))}
    texts = []
    for i in chosen:
        found = place.get((str(predictions["origin"][i]), int(predictions["row"][i])))
        same = found is not None and rows.keys[found] == predictions["key"][i]
        if found is None or not same or prepared.label_names[rows.labels[found]] != predictions["label"][i]:
            raise UserError(
                f"{predictions['origin'][i]}, row {predictions['row'][i]}: not the row that was evaluated; the source "
                "has changed since, or it was evaluated with other data settings than the run's"
            )
        texts.append(rows.texts[found])
    return texts


def _print(texts: list[str], columns: dict[str, np.ndarray], chars: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    for heading in ("", "truth", "prediction", "probability"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "probability" else "left")
    table.add_column("text", ratio=1, overflow="fold")
    for i, text in enumerate(texts):
        right = columns["label"][i] == columns["prediction"][i]
        words = " ".join(text.split())
        cut = words if len(words) <= chars else f"{words[:chars]} ..."
        table.add_row(
            Text("✓ hit" if right else "✗ miss", style="green" if right else "bold red"),
            Text(str(columns["label"][i])),
            Text(str(columns["prediction"][i])),
            f"{columns['probability'][i]:.3f}",
            Text(cut),
        )
    Console().print(table)


def _maker(split: str) -> str:
    return "validate" if split == "val" else "test"


def _parser() -> OptionParser:
    parser = OptionParser("sample", description="Random rows with truth and prediction.")
    parser.add_argument("--run", required=True, help="The run folder, such as logs/NAME.")
    parser.add_argument("--n", type=int, default=10, help="How many rows.")
    parser.add_argument("--split", choices=("test", "val"), default="test", help="Of which rows.")
    parser.add_argument("--only", choices=SHOWN, default="all", help="Hits, misses, or both.")
    parser.add_argument("--seed", type=int, default=0, help="Another seed shows other rows.")
    parser.add_argument("--chars", type=int, default=300, help="Characters of a text that are shown.")
    return parser
