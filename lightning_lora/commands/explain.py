"""``main.py explain``: what each word adds to a prediction; without a text, of test rows, with labels to check."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lightning_lora.commands.sample import cell_text, read_predictions, texts_of
from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.data.pairs import Text, as_texts, is_pair
from lightning_lora.errors import UserError, check_range
from lightning_lora.evaluation.label_issues import label_issues, require_cleanlab
from lightning_lora.files import write_text
from lightning_lora.inference.explain import Explanation, deletion_check, explain_page, label_words
from lightning_lora.inference.input_rows import typed_rows
from lightning_lora.inference.loaded_run import LoadedRun, load_run
from lightning_lora.inference.output import as_text, print_table
from lightning_lora.runs.folder import RunFolder

#: Options of evaluated rows, with their defaults.
_OF_ROWS: dict[str, Any] = {"split": "test", "rows": 50, "seed": 0}
#: Columns of the tables.
_OF_WORDS = ("word", "texts", "adds")
_OF_ISSUES = ("text", "origin", "row", "label", "prediction", "quality")
#: Rows with doubtful labels that a page shows; the CSV file has all.
_ON_PAGE = 100


def run(argv: list[str]) -> int:
    """Explain the texts of the command line, or rows that were evaluated."""
    parser = OptionParser(
        "explain",
        description="What each word adds to a prediction: each is left out once. Without a text: the words that count "
        "most for each label over rows that `test` has evaluated, and the rows that are most likely labelled wrong.",
    )
    parser.add_argument("texts", nargs="*", help="Texts in quotes; for a run that reads pairs two for each.")
    parser.add_argument("--run", required=True, help="The run folder, such as logs/NAME.")
    parser.add_argument("--checkpoint", default="best", help="'best', 'last', a file, or an exported adapter folder.")
    parser.add_argument("--label", help="What is explained; by default what is predicted.")
    parser.add_argument("--top", type=int, default=10, help="Words and rows that are printed.")
    parser.add_argument("--html", help="Write the picture of the texts to this file.")
    parser.add_argument("--split", choices=("test", "val"), help="Without a text: of which rows (default: test).")
    parser.add_argument("--rows", type=int, help="Without a text: how many rows are explained (default: 50).")
    parser.add_argument("--seed", type=int, help="Without a text: another seed takes other rows (default: 0).")
    options = parser.parse_intermixed_args(argv)
    for name in ("top", "rows"):
        if (value := getattr(options, name)) is not None:
            check_range(f"--{name}", value, 1, None)
    for name, default in _OF_ROWS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif options.texts:
            raise UserError(f"--{name}: of evaluated rows, which are explained where no text is given; leave it out")
    return explain_texts(options) if options.texts else explain_rows(options)


def explain_texts(options: Any) -> int:
    """Print the words that count most of each text."""
    settings = RunFolder.open(Path(options.run)).settings()["data"]
    pair = settings["text_column"] if is_pair(settings["truncation"]) else ()
    texts = typed_rows(options.texts, pair).texts
    found = explained(load(options), texts, options.label)
    for each in found:
        start = " ".join(as_texts([each.text])[0].split())
        print(f"\n{start if len(start) <= 60 else start[:57] + '...'!r}\n{each.summary}")
        print_words([(word, effect) for word, effect in each.top(options.top)], each)
    if options.html:
        write_text(Path(options.html), explain_page(Path(options.run).name, found))
        print(f"written: {options.html}")
    return 0


def load(options: Any) -> LoadedRun:
    """Load the run, to compute in full precision: of most words the effect is smaller than what bfloat16 rounds off."""
    return load_run(options.run, options.checkpoint, precision="32-true")


def explained(loaded: LoadedRun, texts: Sequence[Text], label: str | None) -> list[Explanation]:
    """Explain texts behind a progress bar."""
    with tqdm(total=len(texts), unit=" texts", leave=False, disable=None) as bar:
        return loaded.explain(texts, label, advance=bar.update)


def print_words(words: Sequence[tuple[str, float]], of: Explanation) -> None:
    """Print words with what each adds, and what is predicted without it."""
    columns: dict[str, Any] = {"word": [word for word, _ in words], "adds": [effect for _, effect in words]}
    left = of.score - np.array(columns["adds"])
    name, values = ("number without it", left) if of.is_number else ("p without it", 1 / (1 + np.exp(-left)))
    print_table(columns | {name: values.tolist()}, ["word"])


def explain_rows(options: Any) -> int:
    """Print and write the words that count most for each label, and the rows that are most likely labelled wrong."""
    folder = RunFolder.open(Path(options.run))
    rows = read_predictions(folder, options.split)
    is_number = isinstance(rows[0]["label"], float)
    if not is_number:
        require_cleanlab()
    loaded = load(options)
    names, task = loaded.label_names, loaded.model.task
    outputs = np.array([[row["prediction"]] if is_number else [row[f"p({n})"] for n in names] for row in rows])
    doubtful = label_issues([row["label"] for row in rows], outputs, names, task)
    chosen = np.sort(np.random.default_rng(options.seed).permutation(len(rows))[: options.rows]).tolist()
    texts = texts_of(folder, options.split, [rows[i] for i in [*chosen, *(i for i, _ in doubtful)]])
    found = explained(loaded, texts[: len(chosen)], options.label)
    cells = zip(doubtful, as_texts(texts[len(chosen) :]), strict=True)
    issues = [[text, *(rows[i][name] for name in _OF_ISSUES[1:-1]), quality] for (i, quality), text in cells]
    line = f"{len(chosen):,} of {len(rows):,} {options.split} rows were explained. {deletion_text(loaded, found)}"
    by_label = label_words(found)
    print(f"\n{line}")
    for label, words in by_label.items():
        print(f"\n{label}: words that add most")
        print_table(columns(_OF_WORDS, [(word, str(n), effect) for word, n, effect in words[: options.top]]), ["word"])
    what = "numbers" if is_number else "labels"
    print(f"\n{len(issues):,} of {len(rows):,} {what} are to be checked (likely wrong, or hard for the model):")
    table = columns(_OF_ISSUES, [[*map(cell_text, issue)] for issue in issues[: options.top]])
    print_table({name: table[name] for name in ("text", "label", "prediction", "row")})

    files = {
        "words": columns(("label", *_OF_WORDS), [(label, *row) for label, words in by_label.items() for row in words]),
        "labels": columns(_OF_ISSUES, issues),
    }
    output = folder.path / "explain"
    for name, table in files.items():
        write_text(output / f"{options.split}-{name}.csv", as_text(table, ".csv"))
    page = Path(options.html) if options.html else output / f"{options.split}.html"
    tops = [(label, words[: options.top]) for label, words in by_label.items()]
    shown = [dict(zip(_OF_ISSUES, map(cell_text, issue), strict=True)) for issue in issues[:_ON_PAGE]]
    write_text(page, explain_page(f"{folder.path.name}: {options.split} rows", found, [line], tops, shown))
    print(f"\nwritten: {page}, and in {output}: {', '.join(f'{options.split}-{name}.csv' for name in files)}")
    return 0


def columns(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Return rows as columns."""
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def deletion_text(loaded: LoadedRun, found: Sequence[Explanation]) -> str:
    """Return how faithful the explanations are, in a sentence."""
    share, what = 0.1, "number" if any(each.is_number for each in found) else "score"
    most, random = deletion_check(loaded, found, share)
    return (
        f"Without the {share:.0%} of the words that add most, the {what} falls by {most.mean():.3g} on average, "
        f"without as many random ones by {random.mean():.3g} (by less in {np.mean(most > random):.0%} of the "
        "explanations)."
    )
