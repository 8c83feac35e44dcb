"""``main.py data``: a data card, what is suspicious first, before anything is trained on the data."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lightning_lora.config.settings import make_parser, parse_settings
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.facts import DataFacts, gather_facts
from lightning_lora.data.findings import find_suspicious
from lightning_lora.data.near_duplicates import MOST_ROWS
from lightning_lora.data.specs import terms_of
from lightning_lora.errors import UserError
from lightning_lora.experiments.resolving import data_module
from lightning_lora.files import write_text
from lightning_lora.program import command_line
from lightning_lora.quiet import quiet_libraries
from lightning_lora.reports.ablation_tables import TextTable
from lightning_lora.reports.data_card import DataCard, Histogram, as_page

#: Classes that the terminal shows; the page shows all.
MOST_CLASSES = 20


def run(argv: list[str]) -> int:
    """Print the card of the data that ``fit`` would read, and write the page where one is asked for."""
    quiet_libraries()
    parser = make_parser("data")
    config = parse_settings(parser, "data", argv)
    if config.output is not None and Path(config.output).suffix != ".html":
        raise UserError(f"--output: a file that ends with .html is needed, got {config.output}")
    data = data_module(config.data.as_dict())
    stopped = _without_bad_rows(data)
    facts = gather_facts(data)
    card = make_card(facts, [*stopped, *find_suspicious(facts)])
    if config.output is not None:
        write_text(Path(config.output), as_page(card))
    print_card(card)
    if config.output is not None:
        print(f"written: {config.output}")
    else:
        print(f"the card as a page: {command_line('data', *argv, '--output', 'card.html')}")
    return 0


def _without_bad_rows(data: TextDataModule) -> list[str]:
    """Leave out rows without text or label, also where ``fit`` would stop at one; return what it would say."""
    try:
        data.prepared  # noqa: B018  # reads the rows
    except UserError as error:
        if data.options.bad_rows == "drop":
            raise
        data.options = replace(data.options, bad_rows="drop")
        dropped = data.prepared.bad_rows_dropped  # raises the same again where that is not why
        return [f"fit stops, as rows have no text or label ({dropped:,}, left out here): {error}"]
    return []


def make_card(facts: DataFacts, suspicious: list[str]) -> DataCard:
    """Return what is shown of the facts."""
    data, train = facts.datamodule, facts.splits["train"]
    source = data.options.source
    tokens = f"of {data.base_model}, at most {data.input_format.max_length} ({data.truncation})"
    about = [("task", str(data.task)), ("tokens", tokens)]
    about += [(split, f"{each.rows:,} rows ({each.origin})") for split, each in facts.splits.items()]
    if data.prepared.bad_rows_dropped:
        about.append(("left out", f"rows without text or label: {data.prepared.bad_rows_dropped:,}"))
    if any(each.compared < each.rows for each in facts.splits.values()):
        about.append(("near-duplicates", f"sought among at most {MOST_ROWS:,} rows of a split, spread evenly"))
    for name, value in (("made by", data.prepared.citation), ("terms", terms_of(source))):
        about += [(name, value)] if value else []
    histograms = [Histogram("Tokens of a training text", train.lengths, data.input_format.max_length + 1)]
    if len(train.numbers):
        histograms.append(Histogram(f"{data.label_names[0]} of the training rows", train.numbers))
    name = source if isinstance(source, str) else ", ".join(f"{k}: {v}" for k, v in source.items())
    return DataCard(name, about, suspicious, split_table(facts), class_table(facts), histograms)


def split_table(facts: DataFacts) -> TextTable:
    """Return the facts of each split in a column, header first; what does not occur in any is left out."""
    splits, rows, data = facts.splits, [["", *facts.splits]], facts.datamodule
    length = data.input_format.max_length
    sizes, compared = ([getattr(each, name) for each in splits.values()] for name in ("rows", "compared"))

    def count(name: str, values: list[int], wholes: list[int] | None) -> None:
        if any(values):
            said = [f" ({n / whole:.1%})" if n else "" for n, whole in zip(values, wholes or [], strict=False)]
            rows.append([name, *map("{:,}{}".format, values, said or [""] * len(values))])

    count("rows", sizes, None)
    for name, share in (("tokens: median", 0.5), ("tokens: nine of ten at most", 0.9), ("tokens: longest", 1.0)):
        rows.append([name, *(f"{np.quantile(each.lengths, share):.0f}" for each in splits.values())])
    rows.append([f"cut at {length} tokens", *(f"{each.cut_share:.1%}" for each in splits.values())])
    if data.task == "regression":
        for name, share in (("number: least", 0.0), ("number: median", 0.5), ("number: greatest", 1.0)):
            rows.append([name, *(f"{np.quantile(each.numbers, share):g}" for each in splits.values())])
    count("without any label", [each.unlabelled for each in splits.values()], sizes)
    for other in ("val", "test"):
        removed = [data.prepared.duplicates_removed.get(f"{split}_in_{other}", 0) for split in splits]
        count(f"removed, as they are in {other} too", removed, None)
    count("repeats within the split", [each.repeats.count for each in splits.values()], sizes)
    count("of these, with another label", [each.conflicts.count for each in splits.values()], sizes)
    for other in ("train", "val"):
        near = [each.near[other].count if other in each.near else 0 for each in splits.values()]
        count(f"near-duplicates of {other} rows", near, compared)
    names = {"misread": "decoded wrongly", "lost": "replacement characters", "html": "HTML", "same sides": "same sides"}
    for kind, name in names.items():
        count(name, [each.faults[kind].count for each in splits.values()], sizes)
    return rows


def class_table(facts: DataFacts) -> TextTable:
    """Return the rows of each class by split with their share, header first; of regression nothing."""
    if facts.datamodule.task == "regression":
        return []
    table = [["class" if facts.datamodule.task == "single_label" else "label", *facts.splits]]
    for number, name in enumerate(facts.datamodule.label_names):
        counts = [(each.class_counts[number], each.rows) for each in facts.splits.values()]
        table.append([name, *(f"{count:,} ({count / rows:.1%})" for count, rows in counts)])
    return table


def print_card(card: DataCard) -> None:
    """Print the card to the terminal, in 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    heading = f"suspicious ({len(card.suspicious)}):" if card.suspicious else "nothing suspicious was found"
    console.print(Text(f"{card.source}: {heading}", "bold"))
    marks = [(f"{number}.", said) for number, said in enumerate(card.suspicious, 1)]
    for pairs in filter(None, (marks, card.about)):
        grid = Table(show_header=False, box=None, pad_edge=False)
        for name, said in pairs:
            grid.add_row(Text(name), Text(said, overflow="fold"))
        console.print(grid)
        console.print()
    for rows in (card.splits, card.classes):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in rows[0] if rows else []:
            table.add_column(name, justify="right" if table.columns else "left", overflow="fold")
        for row in rows[1 : MOST_CLASSES + 1]:
            table.add_row(*map(Text, row))
        if rows:
            console.print(table)
        if len(rows) > MOST_CLASSES + 1:
            console.print(f"and {len(rows) - MOST_CLASSES - 1} more classes, which the page shows")
