"""Pieces of Parquet files, each read in batches, checked, tokenized and written to a shard in the cache folder.

A shard is whole or not there at all; several are made at once where there are cores, and those that are there are not
made again.
"""

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

from lightning_lora.data import labels, prepare, rows
from lightning_lora.data.reading import Table, cells, declared_names, open_parquet
from lightning_lora.data.remote import file_system, is_url
from lightning_lora.data.shards import Shard, ShardWriter
from lightning_lora.data.splits import text_keys
from lightning_lora.data.tokens import tokenizing_progress
from lightning_lora.errors import UserError, first_line
from lightning_lora.files import atomic_folder, locked_folder
from lightning_lora.fingerprint import code_fingerprint

#: A shard ends with the row group that reaches so many rows: what a kill can lose, and what is shared out.
SHARD_ROWS = 65_536
#: With fewer rows, starting processes takes longer than they save.
PARALLEL_ROWS = 100_000
_BATCH_ROWS = 1024
#: Of a shard of more label cells, nearly each another one, nobody reads the rest.
_MANY_CELLS = 1000
_FORMAT = 2
#: What decides the content of a shard: with another fingerprint of this code it is written again.
_CODE = ("data.prepare", "data.shards")


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
                filesystem, path = file_system(name, name)
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
        labels_stated: Whether the user says what the labels are, so that any number of them is right.
    """

    text_columns: list[str]
    label_column: str
    bad_rows: str
    rules: str
    tokenizer: str
    cache_dir: Path
    labels_stated: bool = False

    @property
    def folder(self) -> Path:
        """Where the shards are."""
        return self.cache_dir / "shards"

    @cached_property
    def key(self) -> str:
        """A key of all that a shard depends on, but for its piece."""
        facts = [_FORMAT, self.text_columns, self.label_column, self.bad_rows, self.rules]
        return hashlib.sha256(json.dumps([*facts, code_fingerprint(*_CODE)]).encode()).hexdigest()

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
            "a process that tokenizes was ended from outside (is memory short?); the same command resumes with the rest"
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
    codes: dict[tuple[type, Any], int] = {}
    firsts: list[tuple[Any, int]] = []
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
                    codes=_codes(table, job.label_column, codes, firsts),
                    numbers=table.rows,
                    keys=text_keys(texts),
                    digests=[rows.text_digest(text) for text in texts],
                )
            advance(len(whole))
            done = writer.rows >= min(piece.rows, SHARD_ROWS)
            if done and not job.labels_stated and len(codes) > max(_MANY_CELLS, 0.95 * writer.rows):
                raise UserError(
                    f"{piece.origin}: column '{job.label_column}' holds {len(codes):,} different values in "
                    f"{writer.rows:,} rows; is it the label? Set data.label_column, or name the classes with "
                    "data.label_names"
                )
        dropped = piece.rows - writer.rows
        writer.finish(origin=piece.origin, dropped=dropped, cells=firsts, label_names=piece.label_names)


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
                values = {name: cells(batch.column(name)) for name in columns}
                yield Table(piece.origin, values, range(row, row + len(batch)))
                row += len(batch)


def _codes(
    table: Table, label_column: str, codes: dict[tuple[type, Any], int], firsts: list[tuple[Any, int]]
) -> list[int]:
    """Which of the different label cells each row's is; those that are new are added."""
    found = []
    for cell, row in zip(table.columns[label_column], table.rows, strict=True):
        key = labels.cell_key(cell)
        if key not in codes:
            codes[key] = len(codes)
            firsts.append((cell, row))
        found.append(codes[key])
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
