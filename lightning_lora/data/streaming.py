"""A train split larger than memory: Parquet files, local or on any fsspec filesystem, tokenized piece by piece.

Each piece of a file is read in batches, checked, tokenized and written to a shard in the cache folder, whole or not at
all: several pieces at once where there are cores, and those that are there are not made again. Texts are then never
needed again, for a shard keeps what the project asks of them: tokens, labels, row numbers, keys that find repeats, and
digests for the fingerprint. Validation and test rows are held in memory as usual. What comes out is what
``prepare`` gives of the same files: the same rows in the same order, the same fingerprints.
"""

import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from lightning_lora.data import prepare, shards, splits
from lightning_lora.data.labels import MAX_CLASSES, canonical, encode_labels
from lightning_lora.data.prepare import Prepared, SourceOptions, SplitRows
from lightning_lora.data.reading import (
    Table,
    declared_names,
    first_line,
    open_parquet,
    read_file,
    source_files,
    split_file,
    split_named,
)
from lightning_lora.data.shards import KEYS, Shard, ShardRows, ShardTokens, ShardWriter
from lightning_lora.data.specs import find_spec
from lightning_lora.data.splits import position_type, text_keys
from lightning_lora.data.stored import stored_splits
from lightning_lora.data.tokens import TokenRows, base_tokenizer, tokenizer_rules, tokenizing_progress
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_folder, locked_folder
from lightning_lora.locations import PACKAGE_PREFIX, resolve

#: A shard ends with the row group that reaches so many rows: what a kill can lose, and what is shared out.
SHARD_ROWS = 65_536
#: With fewer rows, starting processes takes longer than they save.
PARALLEL_ROWS = 100_000
_BATCH_ROWS = 1024
_FORMAT = 1
#: The code that decides what a shard holds; when it changes, shards are made anew.
_CODE = (prepare, shards, splits)


def read_splits(options: SourceOptions, base_model: str, cache_dir: Path) -> Prepared:
    """The splits that the options describe: held in memory, or with a train split that is streamed.

    Args:
        options: Of the source.
        base_model: Whose tokenizer streamed rows are tokenized with.
        cache_dir: Where splits and shards are kept.

    Raises:
        UserError: As ``prepare``; or what is to be streamed cannot be.
    """
    if not options.stream:
        return stored_splits(options, cache_dir)
    return streamed_splits(options, base_tokenizer(base_model), cache_dir)


@dataclass(frozen=True)
class StreamedRows:
    """Rows of a split whose texts are not held: four bytes a row for the label, four for the place.

    Args:
        rows: Where they are.
        labels: Class numbers, int32, shape (rows,).
        known: Whether all of it was in the cache.
    """

    rows: ShardRows
    labels: np.ndarray
    known: bool

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def texts(self) -> list[str]:
        """None are held, so what needs them is refused before."""
        raise TypeError("streamed rows hold no texts")

    @property
    def origins(self) -> list[str]:
        """The file of each row; made when it is asked for, as ``numbers`` is."""
        return [shard.origin for shard, _, local in self.rows.pieces() for _ in range(len(local))]

    @cached_property
    def numbers(self) -> np.ndarray:
        """The 1-based row of each row in its file, int64, shape (rows,)."""
        return np.concatenate([shard.map("numbers")[local] for shard, _, local in self.rows.pieces()])

    def select(self, keep: np.ndarray) -> "StreamedRows":
        """The rows at the given ascending positions."""
        return StreamedRows(ShardRows(self.rows.shards, self.rows.positions[keep]), self.labels[keep], self.known)

    def not_in(self, other: SplitRows) -> np.ndarray:
        """Ascending positions of the rows whose text is no repeat of one of the other rows, whose texts are held."""
        others = np.unique(np.array(text_keys(other.texts), KEYS))
        keep = np.ones(len(self), dtype=bool)
        for shard, mine, local in self.rows.pieces():
            keys = shard.map("keys")[local]
            nearest = np.minimum(np.searchsorted(others, keys), len(others) - 1)
            keep[mine] = others[nearest] != keys
        return np.flatnonzero(keep).astype(position_type(len(keep)))

    def fingerprint(self) -> str:
        """A hash of texts and labels in their order: that of the same rows held in memory."""
        digest = hashlib.sha256()
        for _, mine, _ in self.rows.pieces():
            digest.update(self.labels[mine].astype("<i8").tobytes())
        for shard, _, local in self.rows.pieces():
            digest.update(shard.map("digests")[local].tobytes())
        return digest.hexdigest()

    def places(self) -> Iterator[dict[str, Any]]:
        """Columns ``origin``, ``row`` and ``key``, a shard at a time."""
        import pyarrow as pa

        for shard, _, local in self.rows.pieces():
            keys = pa.py_buffer(shard.map("keys")[local].tobytes())
            key = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(local), [None, keys]).cast(pa.binary())
            yield {"origin": [shard.origin] * len(local), "row": shard.map("numbers")[local], "key": key}

    def tokens(self, tokenizer: Any, cache_dir: Path, advance: Callable[[int], None]) -> tuple[TokenRows, bool]:
        """The tokens, which were made by the same tokenizer when the rows were read."""
        del tokenizer, cache_dir, advance
        return ShardTokens(self.rows), self.known


def streamed_splits(options: SourceOptions, tokenizer: Any, cache_dir: Path) -> Prepared:
    """The splits, of which train is tokenized already and the others are held.

    Raises:
        UserError: There are no such files, a row is bad, labels do not agree, or a size does not fit.
    """
    names, held = _files(options)
    text_columns, label_column = prepare.columns_of(options)
    columns = list(dict.fromkeys([*text_columns, label_column]))
    tables = {split: [read_file(path, columns, label_column) for path in paths] for split, paths in held.items()}
    tables, dropped = prepare.checked(tables, options)
    pieces = plan(names, columns, label_column)
    rules = tokenizer_rules(tokenizer).decode()
    job = Job(text_columns, label_column, options.bad_rows, rules, tokenizer.backend_tokenizer.to_str(), cache_dir)
    found, known = make_shards(pieces, job)
    dropped += sum(shard.dropped for shard in found)
    firsts = [
        Table(
            shard.origin,
            {label_column: [cell for cell, _ in shard.cells]},
            [row for _, row in shard.cells],
            label_names=shard.label_names,
        )
        for shard in found
    ]
    if not any(len(table) for table in firsts):
        raise UserError(f"{names[0]}: the train split has no usable row")
    # Of train each label cell once: to its number there it is what each row's code is to its class number.
    label_names, encoded = encode_labels({"train": firsts, **tables}, label_column, options.label_names)
    labels = np.empty(sum(shard.rows for shard in found), np.int32)
    everything = ShardRows(found, np.arange(len(labels), dtype=position_type(len(labels))))
    numbers = {id(shard): each for shard, each in zip(found, encoded["train"], strict=True)}
    for shard, mine, _ in everything.pieces():
        labels[mine] = numbers[id(shard)][shard.map("codes")]
    read: dict[str, SplitRows] = {"train": StreamedRows(everything, labels, known)}
    for split, parts in tables.items():
        read[split] = prepare.joined(parts, text_columns, encoded[split])
    divided, origin, removed = prepare.divide(read, options)
    return Prepared(label_names, divided, origin, removed, dropped)


def _files(options: SourceOptions) -> tuple[list[str], dict[str, list[Path]]]:
    """Names of the train files, and the files of the splits that are held."""
    source = options.source
    held: dict[str, list[Path]] = {}
    if isinstance(source, str):
        found = None if find_spec(source) else source_files(source)
        if found is None:
            raise UserError(
                f"data.stream: '{source}' is no folder of Parquet files; download it, or give the splits as "
                "data.source={train: 's3://bucket/train-*.parquet', validation: FILE, test: FILE}"
            )
        names = [str(path) for path in found.pop("train")]
        held = found
    else:
        names = []
        for name, place in source.items():
            split = split_named(name)
            if split == "train":
                names = matching(place)
            else:
                held[split] = [split_file(name, place)]
        if not names:
            raise UserError(f"data.source: {dict(source)} has no train split; give train: FILES")
    for split, word in (("test", "test"), ("val", "validation")):
        if split not in held:
            raise UserError(
                f"data.stream: the source has no {word} split, and none is carved from rows that are streamed; "
                f"give data.source.{word}: FILE"
            )
    if odd := next((name for name in names if not name.lower().endswith(".parquet")), None):
        raise UserError(f"data.stream: {odd} is no .parquet file, and only those are streamed; leave data.stream out")
    return names, {split: held[split] for split in ("val", "test")}


def is_url(name: str) -> bool:
    """Whether a name is that of a file on an fsspec filesystem: ``s3://bucket/key``, ``memory://...``."""
    return "://" in name


def matching(place: str) -> list[str]:
    """The names of the files that a file, a folder or a pattern stands for, local or on an fsspec filesystem, sorted.

    Raises:
        UserError: There are none, or the filesystem does not answer.
    """
    key = "data.source.train"
    if is_url(place):
        filesystem, path = _filesystem(place, key)
        try:
            path = f"{path.rstrip('/')}/*.parquet" if filesystem.isdir(path) else path
            found = [filesystem.unstrip_protocol(name) for name in filesystem.glob(path)]
        except Exception as error:  # each filesystem has exceptions of its own
            raise UserError(f"{key}: {place} cannot be listed ({first_line(error)})") from error
    elif place.startswith(PACKAGE_PREFIX):
        found = [str(resolve(place, key).path)]
    else:
        path = str(Path(place).expanduser())
        # A file whose name looks like a pattern is that file.
        found = [path] if Path(path).is_file() else []
        pattern = str(Path(glob.escape(path)) / "*.parquet") if Path(path).is_dir() else path
        found = found or [name for name in glob.glob(pattern, recursive=True) if Path(name).is_file()]  # noqa: PTH207
    if not found:
        where = "" if is_url(place) else f" (looked in {Path.cwd()})"
        raise UserError(f"{key}: no file matches '{place}'{where}; give a Parquet file, a folder or a pattern of them")
    return sorted(found)


def _filesystem(url: str, where: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except Exception as error:  # a protocol that nobody knows, a package that is missing, credentials
        raise UserError(f"{where}: '{url}' cannot be reached ({first_line(error)})") from error


@dataclass(frozen=True)
class Piece:
    """Rows of one file that become one shard.

    Args:
        origin: The file's name.
        version: What changes when the file does.
        groups: Its row groups, one after another.
        before: Rows of the file before them.
        rows: Their rows.
        label_names: Class names that the file declares.
    """

    origin: str
    version: str
    groups: list[int]
    before: int
    rows: int
    label_names: list[str] | None


def plan(names: Sequence[str], columns: Sequence[str], label_column: str) -> list[Piece]:
    """The pieces of the files, in order; reads the end of each file.

    Raises:
        UserError: A file cannot be read or lacks a column.
    """

    def pieces(name: str) -> list[Piece]:
        found: list[Piece] = []
        with _opened(name, columns) as (file, version):
            declared = declared_names(file.schema_arrow, label_column)
            before, groups, rows = 0, [], 0
            for group in range(file.metadata.num_row_groups):
                groups.append(group)
                rows += file.metadata.row_group(group).num_rows
                if rows >= SHARD_ROWS or group == file.metadata.num_row_groups - 1:
                    found.append(Piece(name, version, groups, before, rows, declared))
                    before, groups, rows = before + rows, [], 0
        return found

    with ThreadPoolExecutor(8) as pool:
        return [piece for each in pool.map(pieces, names) for piece in each if piece.rows]


@contextmanager
def _opened(name: str, columns: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """A Parquet file, and what changes when it does; faults of reading it in the block are of the user's kind."""
    with ExitStack() as stack:
        try:
            if is_url(name):
                filesystem, path = _filesystem(name, name)
                version = filesystem.ukey(path)
                source = stack.enter_context(filesystem.open(path, "rb"))
            else:
                status, source = Path(name).stat(), name
                version = f"{Path(name).resolve()}/{status.st_size}/{status.st_mtime_ns}"
            # Far away a row group is fetched at once, in few requests; near by, what is read is enough.
            file = stack.enter_context(open_parquet(source, columns, name, pre_buffer=is_url(name)))
        except UserError:
            raise
        except Exception as error:  # each filesystem has exceptions of its own
            raise UserError(f"{name}: cannot be read ({first_line(error)})") from error
        yield file, version


@dataclass(frozen=True)
class Job:
    """What is done with each piece.

    Args:
        text_columns: The columns that are joined to the text.
        label_column: That of the label.
        bad_rows: "error" or "drop".
        rules: Of the tokenizer: all that tokens depend on.
        tokenizer: The tokenizer, as its library writes it.
        cache_dir: Shards come into a folder in it.
    """

    text_columns: list[str]
    label_column: str
    bad_rows: str
    rules: str
    tokenizer: str
    cache_dir: Path

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return self.cache_dir / "shards"

    @cached_property
    def key(self) -> str:
        """A key of all that a shard depends on, but for its piece."""
        facts = [_FORMAT, self.text_columns, self.label_column, self.bad_rows, self.rules]
        digest = hashlib.sha256(json.dumps(facts).encode())
        for module in _CODE:
            digest.update(Path(str(module.__file__)).read_bytes())
        return digest.hexdigest()

    def entry(self, piece: Piece) -> Path:
        """The folder of a piece's shard."""
        return self.folder / hashlib.sha256(json.dumps([self.key, asdict(piece)]).encode()).hexdigest()[:32]


def make_shards(pieces: Sequence[Piece], job: Job) -> tuple[list[Shard], bool]:
    """The shards of the pieces, and whether all were there; those that are not are made.

    Raises:
        UserError: A row is bad, a file cannot be read, or the cache cannot be written.
    """
    entries = [job.entry(piece) for piece in pieces]
    if all(found := [known_shard(entry) for entry in entries]):
        return [shard for shard in found if shard], True
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
        with locked_folder(job.folder, None):  # processes of one run begin at once, and need the same
            missing = [piece for piece, entry in zip(pieces, entries, strict=True) if known_shard(entry) is None]
            rows = sum(piece.rows for piece in missing)
            with tokenizing_progress("train", rows) as advance:
                if (workers := worker_count(missing)) > 1:
                    _make_in_processes(missing, job, workers, advance)
                else:
                    for piece in missing:
                        make_shard(piece, job, advance)
            return [Shard.open(entry) for entry in entries], False
    except BrokenProcessPool:
        raise UserError(
            "a process that tokenizes was ended from outside (is memory short?); the same command goes on with the rest"
        ) from None
    except OSError as error:
        raise UserError(
            f"data.cache_dir: cannot write {job.folder} ({error.strerror or error}); set another folder"
        ) from error


def known_shard(entry: Path) -> Shard | None:
    """The shard of a folder, if it is there; one that is damaged is removed."""
    if not entry.is_dir():
        return None
    try:
        return Shard.open(entry)
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(entry, ignore_errors=True)
        return None


def worker_count(pieces: Sequence[Piece]) -> int:
    """How many processes make the pieces."""
    in_this_process = any(piece.origin.startswith("memory://") for piece in pieces)
    if in_this_process or sum(piece.rows for piece in pieces) < PARALLEL_ROWS:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, len(pieces))


def make_shard(piece: Piece, job: Job, advance: Callable[[int], None] = lambda rows: None) -> None:
    """Makes the shard of a piece; holds some rows of it at a time."""
    encoder = _encoder(job.tokenizer)
    codes: dict[tuple[str, bool], int] = {}
    cells: list[tuple[Any, int]] = []
    with atomic_folder(job.entry(piece)) as staging, ShardWriter(staging) as writer:
        for whole in _tables(piece, job):
            bad = prepare.bad_rows(whole, job.text_columns, job.label_column)
            if bad and job.bad_rows == "error":
                raise prepare.bad_row_error(bad[min(bad)])
            table = whole.select([i for i in range(len(whole)) if i not in bad]) if bad else whole
            if len(table):
                texts = prepare.texts_of(table, job.text_columns)
                writer.add(
                    [encoding.ids for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False)],
                    codes=_codes(table, job.label_column, codes, cells),
                    numbers=table.rows,
                    keys=text_keys(texts),
                    digests=[prepare.text_digest(text) for text in texts],
                )
            advance(len(whole))
        dropped = piece.rows - writer.rows
        writer.finish(origin=piece.origin, dropped=dropped, cells=cells, label_names=piece.label_names)


@lru_cache(maxsize=1)
def _encoder(rules: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(rules)


def _tables(piece: Piece, job: Job) -> Iterator[Table]:
    columns = list(dict.fromkeys([*job.text_columns, job.label_column]))
    row = piece.before + 1
    with _opened(piece.origin, columns) as (file, version):
        if version != piece.version:
            raise UserError(f"{piece.origin}: was changed while it was read; give the command again")
        for group in piece.groups:
            batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
            while True:
                try:
                    batch = next(batches, None)
                except Exception as error:  # of Arrow, or of whatever the filesystem is made by
                    raise UserError(f"{piece.origin}, row {row} or after: damaged ({first_line(error)})") from error
                if batch is None:
                    break
                values = {name: batch.column(name).to_pylist() for name in columns}
                yield Table(piece.origin, values, range(row, row + len(batch)))
                row += len(batch)


def _codes(
    table: Table, label_column: str, codes: dict[tuple[str, bool], int], cells: list[tuple[Any, int]]
) -> list[int]:
    """Which of the ``cells`` each row's label is; those that are new are added.

    Raises:
        UserError: They are too many to be classes.
    """
    found = []
    for i, cell in enumerate(table.columns[label_column]):
        kind = (canonical(cell), isinstance(cell, float) and not cell.is_integer())
        if kind not in codes:
            if len(codes) == MAX_CLASSES:
                raise UserError(
                    f"{table.origin}: column '{label_column}' holds more than {MAX_CLASSES} different values; "
                    "is it the label? Set data.label_column"
                )
            codes[kind] = len(codes)
            cells.append((cell, table.rows[i]))
        found.append(codes[kind])
    return found


def _make_in_processes(pieces: Sequence[Piece], job: Job, workers: int, advance: Callable[[int], None]) -> None:
    # Not forked: threads of this process may hold locks. Each shard's place is this process's to know.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    advance(0)
    with ProcessPoolExecutor(workers, context, _begin_worker, (job,)) as pool:
        try:
            made = {pool.submit(_make_in_worker, piece): piece for piece in pieces}
            for future in as_completed(made):
                future.result()
                advance(made[future].rows)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise


_job: Job | None = None


def _begin_worker(job: Job) -> None:
    global _job  # noqa: PLW0603  # sent once to each process, not with each piece
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pieces are what is shared out
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes to all; the one that began this one ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make_in_worker(piece: Piece) -> None:
    assert _job is not None
    make_shard(piece, _job)
