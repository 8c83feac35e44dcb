"""The LightningDataModule: any source of labelled texts as batches of token ids."""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader
from tqdm import tqdm

from lightning_lora.data.augment import Augmentation, AugmentedDataset
from lightning_lora.data.batching import LengthBatchSampler, ResumableLoader, TokenDataset
from lightning_lora.data.order import BatchBy, default_eval_batch_size
from lightning_lora.data.pairs import Truncation, choose_truncation
from lightning_lora.data.prepare import Prepared, SourceOptions, columns_of, prepare
from lightning_lora.data.rows import Rows
from lightning_lora.data.stored import default_cache_dir
from lightning_lora.data.tokens import InputFormat, base_tokenizer, cached_tokens
from lightning_lora.errors import UserError, check_range
from lightning_lora.tasks import Task

#: A label or a name as YAML reads it; null is then refused with its remedy.
Word = str | int | float | bool | None


class TextDataModule(LightningDataModule):
    """Train, validation and test batches of a text classification source.

    Args:
        source: A known data set (ag_news, imdb, imdb_packaged, glue_cola, ...), a local CSV, TSV, JSON Lines, Parquet
            or Arrow file, a folder with a file a split or by ``save_to_disk``, a Hub id, ``package:NAME/path``, or
            files by split, as ``{train: 's3://bucket/*.parquet', test: b.csv}``.
        base_model: The base model whose tokenizer is used; linked to ``model.base_model``.
        text_column: The column with the text ("text" unless the data set is known). Two are a pair of texts, such as
            [premise, hypothesis]; several that ``truncation`` does not make a pair are joined by a space.
        label_column: The column with the label ("label" unless the data set is known): of a list, a text may have
            any number of labels. Several columns hold 0 or 1 for a label each, which is called like its column.
        label_separator: What stands between the labels of a text where it may have several, such as ";".
        task: What is predicted: a "single_label" of each text, "multi_label" (any number of labels), or a number
            ("regression"); "auto" is one of the first two, by the column of the label.
        label_names: What the labels mean, by default themselves: ``{1: World, 2: Sports, ...}`` names each (several
            may mean one class); a list names the classes of a source that declares them, or the numbers of one that
            does not, in ascending order; a list of the labels themselves sets their order.
        max_length: Tokens of a text that the model sees, special tokens included; the rest is cut. By default 512, or
            as many as the base model takes.
        train_max_length: The same of training texts, where fewer are to do: training takes less time, and validation,
            test and prediction read ``max_length``.
        truncation: What stays of a longer text: its "head", its "tail", or "both" (a quarter and three
            quarters); or "windows": all of it is read in pieces of ``max_length``, whose probabilities are
            averaged. Of a longer pair the longer text is cut first ("longest_first"), or one of both ("only_first",
            "only_second"). By default "longest_first" of two columns, else "head"; by "auto" else "both".
        window_overlap: Tokens that two windows share, by default a quarter of one.
        padding: Pad a batch to its "longest" text, or to "max_length".
        batch_size: Texts a training batch. Several devices share it, so that their number does not change what is
            learnt.
        batch_by: Whether training batches have as many "tokens" (as nearly as whole texts allow; ``batch_size`` texts
            on average, more where they are short), or as many "texts". Each text weighs the same either way.
        eval_batch_size: Texts a batch in validation, test and prediction, on each device; by default 32, and 256 with a
            GPU. So many are taken of the longest, and of shorter ones up to twice as many, for as many tokens.
        val_size: Rows (or fraction) of train carved for validation, 0.1 by default; only where the source
            has no validation split of its own.
        test_size: Rows (or fraction) carved for testing before anything else, 0.2 by default; only where
            the source has no test split of its own.
        train_rows: Train on a stratified subsample of so many rows (or fraction).
        test_rows: Test on a stratified subsample of so many rows (or fraction).
        fold: ``[k, n]``: test on fold k of n stratified folds of the labelled rows (of the source's train split; its
            own test split is then not used), instead of a test split carved by ``test_size``.
        augmentation: Words of training texts that are left out or swapped; holds all training texts in memory.
        encoding: Encoding of text files that are not in UTF-8, such as cp1252 or gb18030.
        bad_rows: What to do with rows without text or label: stop with an "error", or "drop" and count.
        split_seed: Seed of carving and subsampling; kept apart from the run's seed, so that runs with other
            seeds are tested on the same rows.
        seed: Seed of the training order; linked to ``seed_everything``.
        cache_dir: Where rows and tokens are kept for reuse (default: ``~/.cache/lightning_lora``).
    """

    def __init__(
        self,
        source: str | dict[str, str],
        base_model: str,
        text_column: str | list[str] | None = None,
        label_column: str | list[str] | None = None,
        label_separator: str | None = None,
        task: Task | Literal["auto"] = "auto",
        label_names: list[Word] | dict[Word, Word] | None = None,
        max_length: int | None = None,
        train_max_length: int | None = None,
        truncation: Truncation | None = None,
        window_overlap: int | None = None,
        padding: Literal["longest", "max_length"] = "longest",
        batch_size: int = 16,
        batch_by: BatchBy = "texts",
        eval_batch_size: int | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        train_rows: int | float | None = None,
        test_rows: int | float | None = None,
        fold: list[int] | None = None,
        augmentation: Augmentation = Augmentation(),  # noqa: B008  # never changed; the parser reads it
        encoding: str | None = None,
        bad_rows: Literal["error", "drop"] = "error",
        split_seed: int = 0,
        seed: int = 42,
        cache_dir: str | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        eval_batch_size = default_eval_batch_size(eval_batch_size)
        for name, length in (("max_length", max_length), ("train_max_length", train_max_length)):
            if length is not None:
                check_range(f"data.{name}", length, 1, None)
        check_range("data.batch_size", batch_size, 1, None)
        check_range("data.eval_batch_size", eval_batch_size, 1, None)
        if label_separator is not None and (not label_separator or isinstance(label_column, list)):
            raise UserError("data.label_separator: a text such as ';' is needed, for one label column")
        check_range("data.augmentation.delete", augmentation.delete, 0, 1)
        check_range("data.augmentation.swap", augmentation.swap, 0, 1)
        self.options = SourceOptions.of(given)
        self.base_model = base_model
        self.max_length, self.train_max_length = max_length, train_max_length
        self.truncation = choose_truncation(truncation, columns_of(self.options)[0])
        self.window_overlap = window_overlap
        self.augmentation = augmentation
        self.padding = padding
        self.batch_size = batch_size
        self.batch_by: BatchBy = batch_by
        self.eval_batch_size = eval_batch_size
        self.seed = seed
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        #: Whether batches are packed; set by the model, which knows whether it can take them.
        self.packed = False
        #: Whether batches hold their texts; set by a model that reads them.
        self.with_texts = False
        self._datasets: dict[str, TokenDataset] = {}
        self._token_report: dict[str, Any] = {}

    @cached_property
    def prepared(self) -> Prepared:
        """The splits, read once."""
        return prepare(self.options, self.cache_dir)

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        return base_tokenizer(self.base_model)

    @cached_property
    def input_format(self) -> InputFormat:
        """The special tokens around a text, and its truncation."""
        return InputFormat.of(self.tokenizer, self.max_length, self.truncation, self.window_overlap)

    @cached_property
    def train_format(self) -> InputFormat:
        """The same of training texts."""
        if self.train_max_length is None or self.train_max_length >= self.input_format.max_length:
            return self.input_format
        return InputFormat.of(self.tokenizer, self.train_max_length, self.truncation, self.window_overlap)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their numbers; reading them reads the data."""
        return self.prepared.label_names

    @property
    def task(self) -> Task:
        """What is predicted; asking for it reads the data."""
        return self.prepared.task

    @property
    def target_moments(self) -> tuple[float, float]:
        """Mean and standard deviation of the numbers of the training rows."""
        labels = self.rows("train").labels
        return float(labels.mean()), float(labels.std())

    @property
    def class_counts(self) -> list[int]:
        """Training rows of each class."""
        return self.prepared.class_counts("train")

    def rows(self, split: str) -> Rows:
        """The texts and labels of a split ("train", "val" or "test"), in the order of ``batch["rows"]``."""
        return self.prepared.splits[split]

    def dataset(self, split: str) -> TokenDataset:
        """The tokenized rows of a split, after ``setup``."""
        return self._datasets[split]

    def setup(self, stage: str) -> None:
        """Tokenizes the splits that the stage needs, or takes them from the cache."""
        if self.trainer is not None:
            check_distributed(self.trainer)
        wanted = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}.get(stage, ())
        for split in (split for split in wanted if split not in self._datasets):
            rows, tokenizer = self.rows(split), self.tokenizer
            input_format = self.train_format if split == "train" else self.input_format
            with tqdm(desc=f"Tokenizing {split}", total=len(rows), disable=None, leave=False, delay=0.5) as bar:
                tokens, cached = cached_tokens(rows, tokenizer, self.cache_dir, bar.update)
            if len(both := input_format.cut_both(tokens)):
                self.prepared.warnings.append(
                    f"{len(both):,} pairs of {split} have both texts cut, as one alone fills data.max_length (the "
                    f"first: {rows.origins[both[0]]}, {rows.numbers[both[0]]}); longest_first cuts the longer one first"
                )
            common = (tokens, input_format, rows.labels, self.padding == "max_length")
            dataset = TokenDataset(*common)
            if split == "train" and self.augmentation.active:
                dataset = AugmentedDataset(*common, rows.texts, tokenizer, self.augmentation, self.seed)
            self._datasets[split] = dataset
            self._token_report[split] = {
                "tokens": int(dataset.lengths.sum()),
                "truncated_share": input_format.cut_share(tokens),
                "max_length": input_format.max_length,
                "from_cache": cached,
            }

    def train_dataloader(self) -> DataLoader:
        """Batches of similar length in an order that the seed and the epoch fix."""
        return self._loader("train", self.batch_size, self.seed)

    def val_dataloader(self) -> DataLoader:
        """Every validation row once, longest first."""
        if self.trainer is not None and self.trainer.state.fn == "validate":  # a model says so of one within ``fit``
            check_whole_pass(self.trainer, "val")
        return self.evaluation_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Every test row once, longest first."""
        if self.trainer is not None:
            check_whole_pass(self.trainer, "test")
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: str) -> DataLoader:
        """Every row of a split once, longest first."""
        return self._loader(split, self.eval_batch_size, None)

    def describe(self) -> dict[str, Any]:
        """Plain values for the run record: source, sizes, fingerprints, what was taken out, truncation."""
        source = self.options.source
        described = {"source": source if isinstance(source, str) else dict(source), **self.prepared.describe()}
        for split, report in self._token_report.items():
            described["splits"][split].update(report)
        described |= {"max_length": self.input_format.max_length, "truncation": self.truncation}
        return described | ({"augmentation": asdict(self.augmentation)} if self.augmentation.active else {})

    def _loader(self, split: str, batch_size: int, seed: int | None) -> DataLoader:
        dataset = self._datasets[split]
        dataset.batch_texts = self.rows(split).texts if self.with_texts else None
        # Without a trainer the module makes whole steps for one process.
        rank, processes = getattr(self.trainer, "global_rank", 0), getattr(self.trainer, "world_size", 1)
        if len(dataset) < processes:
            raise UserError(f"trainer.devices: {processes} devices for {len(dataset)} {split} rows; use fewer")
        if seed is None:
            sampler = evaluation_sampler(dataset, batch_size * processes, self.packed, rank, processes)
        else:
            accumulate = getattr(self.trainer, "accumulate_grad_batches", 1)
            sampler = LengthBatchSampler(dataset.lengths, batch_size, seed, accumulate, rank, processes, self.batch_by)
        return make_loader(dataset, sampler, self.packed)


def check_distributed(trainer: Any) -> None:
    """Refuse a trainer of several devices that replaces samplers, where Lightning (2.6.6) ends in a ``TypeError``.

    Raises:
        UserError: The trainer is one.
    """
    connector = getattr(trainer, "_accelerator_connector", None)  # no public name says so
    if trainer.world_size > 1 and getattr(connector, "use_distributed_sampler", False):
        raise UserError(
            "use_distributed_sampler: give Trainer(use_distributed_sampler=False), as batches are shared out by "
            "length; training_length does"
        )


def check_whole_pass(trainer: Any, stage: Literal["val", "test"]) -> None:
    """Refuse a limit on the batches of an evaluation: the first ones hold the longest texts, and are no sample.

    Args:
        trainer: A trainer, or its settings with the same names; 0 leaves the pass out, and is not refused.
        stage: Of the pass.

    Raises:
        UserError: The limit leaves some rows out.
    """
    limit = getattr(trainer, f"limit_{stage}_batches")
    if trainer.fast_dev_run or limit in (None, 0) or (isinstance(limit, float) and limit == 1):
        return
    setting = {"val": "val_size", "test": "test_rows"}[stage]
    raise UserError(
        f"trainer.limit_{stage}_batches: {limit}, but batches begin with the longest texts, so the first ones are no "
        f"sample of the rows; set data.{setting}"
    )


def evaluation_sampler(
    dataset: TokenDataset, batch_size: int, packed: bool, rank: int = 0, processes: int = 1
) -> LengthBatchSampler:
    """Every row once, longest first.

    Args:
        dataset: The rows.
        batch_size: Of the longest rows that there can be, of all processes together; see ``LengthBatchSampler``.
        packed: Whether batches are packed.
        rank: Of this process.
        processes: Their number.
    """
    lengths, max_tokens = (
        (dataset.lengths, batch_size * dataset.input_format.max_length) if packed else (dataset.padded_lengths, None)
    )
    return LengthBatchSampler(lengths, batch_size, None, 1, rank, processes, max_tokens=max_tokens)


def make_loader(dataset: TokenDataset, sampler: LengthBatchSampler, packed: bool = False) -> DataLoader:
    """A loader in this process: making a batch from flat arrays costs less than a worker's hand-over."""
    dataset.packing = None  # of a loader before
    if packed and sampler.max_tokens is not None:
        dataset.pack_evaluation(sampler.max_tokens, sampler.most_texts)
    elif packed:
        batches = sampler.sample()
        dataset.pack_like(batches, len(batches) / len(sampler))
    pin = torch.cuda.is_available()  # what is pinned is copied to the GPU without waiting for it
    return ResumableLoader(dataset, batch_sampler=sampler, collate_fn=lambda batch: batch, pin_memory=pin)
