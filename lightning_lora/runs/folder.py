"""A run's folder and its record; the only place that reads or writes either. Imports no torch.

A run folder holds ``config.yaml`` (resolved), ``checkpoints/best.ckpt`` and ``last.ckpt`` (``stopped.ckpt`` where it
was asked to stop), ``metrics.csv``, TensorBoard's ``events.out.*``, ``splits.parquet`` (which row went where),
``predictions/``, the table of each evaluated split (``test.md``), ``export/``, of ``fit --budget`` ``tuning.json`` and
``tuning.md``, and, written last, ``run.json``: the record.
"""

import itertools
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from lightning_lora import __version__
from lightning_lora.errors import UserError
from lightning_lora.files import atomic_folder, write_text
from lightning_lora.fingerprint import code_fingerprint
from lightning_lora.program import command_line

RECORD_FORMAT = 1
#: In the folder of a search within a time (``fit --budget``) that has not ended: what it has tried.
TUNING = "tuning.json"
#: What TensorBoard reads, in the run's folder itself: it calls a run by the folder that they lie in.
EVENT_FILES = "events.out.tfevents.*"
_PACKAGES = ("torch", "lightning", "transformers", "datasets", "peft", "bitsandbytes", "torchmetrics", "jsonargparse")
#: What trains, and chooses how long and which weights are kept: with other code results may be others.
TRAINS = ("training.module", "training.baselines", "data.datamodule", "config.configured_run")
#: Settings that hold local paths.
_PATHS = (("data", "source"), ("model", "base_model"), ("data", "base_model"))
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,99}")


class RunFolder:
    """One run's folder under ``logs/``.

    Args:
        path: The folder; it exists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: The resolved config.
        self.config = path / "config.yaml"
        #: The folder of ``best.ckpt`` and ``last.ckpt``.
        self.checkpoints = path / "checkpoints"
        #: The run record, JSON.
        self.record = path / "run.json"
        #: Which row of the source went to which split.
        self.splits = path / "splits.parquet"

    @classmethod
    def create(cls, logs_dir: Path, name: str | None, stem: str, config: str = "") -> "RunFolder":
        """Make a new folder; one that exists is never used again.

        Args:
            logs_dir: The folder of all runs.
            name: The folder's name; taken as it is, and refused when it exists.
            stem: Without a name the folder is called ``<stem>-<date>-<time>``, with a number where taken.
            config: Its resolved config.

        Raises:
            UserError: The name is taken or not usable, or the folder cannot be made.
        """
        wanted = f"{plain_stem(stem)}-{datetime.now():%Y%m%d-%H%M%S}" if name is None else folder_name(name)
        for number in itertools.count():
            path = logs_dir / (f"{wanted}-{number}" if number else wanted)
            try:
                logs_dir.mkdir(parents=True, exist_ok=True)
                # With its config in it from the first moment on: what a killed process leaves can be resumed.
                with atomic_folder(path) as staging:
                    (staging / "config.yaml").write_text(config, encoding="utf-8")
                break
            except OSError as error:
                if not path.exists():
                    raise UserError(f"--logs_dir: cannot make {path} ({error.strerror or error})") from error
                if name is not None:  # else a run of the same second has it
                    or_resume = f", or resume it: --resume {path}" if (path / "config.yaml").is_file() else ""
                    raise UserError(
                        f"--name: {path} exists, and a run is never overwritten; choose another name{or_resume}"
                    ) from None
        return cls(path)

    @classmethod
    def open(cls, path: Path, option: str = "--run") -> "RunFolder":
        """Return the folder of an earlier run, which was given with this option.

        Raises:
            UserError: It does not exist or is none.
        """
        if not (path / "config.yaml").is_file():
            if (path / TUNING).is_file():
                command = json.loads((path / TUNING).read_text(encoding="utf-8"))["command"]
                raise UserError(f"{option}: {path} is a search that has not ended; give its command again: {command}")
            raise UserError(f"{option}: {path} is no run folder (no config.yaml in it); give a folder that fit made")
        return cls(path)

    def settings(self) -> dict[str, Any]:
        """Return the resolved config as plain values, with its local paths as they are to be found from here."""
        return self.found_from_here(yaml.safe_load(self.config.read_text(encoding="utf-8")))

    def found_from_here(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return settings whose relative paths of data and base model are those of the folder that the run started in.

        A path that exists from here stays as it is, and so does one that is nowhere.
        """
        started = Path(self.read_if_written().get("started_in", "."))

        def found(path: Any) -> Any:
            if isinstance(path, Mapping):
                return {split: found(each) for split, each in path.items()}
            if not isinstance(path, str) or Path(path).is_absolute() or Path(path).expanduser().exists():
                return path
            return str(started / path) if path and any(started.glob(path)) else path  # files may be a pattern

        given = {group: dict(value) if isinstance(value, Mapping) else value for group, value in settings.items()}
        for group, name in _PATHS:
            if isinstance(given.get(group), dict) and name in given[group]:
                given[group][name] = found(given[group][name])
        return given

    def with_own_paths(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings with paths as the run's config has them, where they lead to the same place from here."""
        before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        found = self.found_from_here(before)
        for group, name in _PATHS:
            own = settings.get(group)
            if own and name in own and name in (before.get(group) or {}) and own[name] == found[group][name]:
                settings = {**settings, group: {**own, name: before[group][name]}}
        return settings

    def checkpoint(self, which: str) -> Path:
        """Return the checkpoint "best" or "last", or a path to a file or an exported adapter's folder.

        Raises:
            UserError: It does not exist; the reason is looked up in the record.
        """
        path = self.checkpoints / f"{which}.ckpt" if which in ("best", "last") else Path(which)
        if not (path.is_file() or (which not in ("best", "last") and path.is_dir())):
            record = self.read_if_written()
            status = record.get("status", "unfinished")
            remedy = "an untrained model is not evaluated; run fit again"
            if which == "best" and (self.checkpoints / "last.ckpt").is_file():
                why = (record.get("length") or {}).get("not_validated", "no validation pass ended, so none is best")
                remedy = f"{why}; --checkpoint last takes the last state"
            raise UserError(f"--run: {self.path} has no checkpoint {path.name} (the run's status: {status}); {remedy}")
        return path

    def read(self) -> dict[str, Any]:
        """Return the record.

        Raises:
            UserError: It is missing or damaged.
        """
        try:
            record = dict(json.loads(self.record.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no run.json: the run has not ended, or was killed") from None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.record}: cannot be read ({error})") from error
        if record.get("format") != RECORD_FORMAT:
            raise UserError(f"{self.record}: format {record.get('format')}; this version reads {RECORD_FORMAT}")
        return record

    def read_if_written(self) -> dict[str, Any]:
        """Return the record, empty where a run was killed before it was written."""
        return self.read() if self.record.is_file() else {}

    def write(self, record: dict[str, Any]) -> None:
        """Write the record, whole; numbers that are not finite become null, which JSON has."""
        write_text(self.record, json.dumps(plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def refuse_trained_rows(self, keys: Sequence[bytes], seen: Sequence[str]) -> None:
        """Refuse to evaluate on texts that the run has learned from or was chosen by.

        The source may have changed since, or another ``data.split_seed`` may have been given.

        Args:
            keys: Keys of the texts, as in the file of splits.
            seen: The splits that were learned from or chosen by.

        Raises:
            UserError: There are such rows, or the file of splits cannot be read.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        wanted = pc.field("split").isin(list(seen)) & pc.field("key").isin(pa.array(set(keys), pa.binary()))
        try:  # of millions of rows, those in question stay
            known = set(pq.read_table(self.splits, columns=["key"], filters=wanted)["key"].to_pylist())
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self.splits}: cannot be read ({error}); without it nobody knows what was trained on"
            ) from error
        if count := sum(key in known for key in keys):
            raise UserError(
                f"{count} of the {len(keys)} rows to evaluate are rows that {self.path} was trained or chosen on; "
                "use the source and the data.split_seed of the run, or other rows"
            )

    def new_evaluation(self, split: str) -> str:
        """Return a name for a further evaluation of a split ("test", then "test-2", ...); none is overwritten."""
        done = self.read_if_written().get("evaluations", {})
        names = itertools.chain([split], (f"{split}-{number}" for number in itertools.count(2)))
        return next(name for name in names if name not in done and not (self.path / f"{name}.md").exists())

    def add_evaluation(self, name: str, evaluation: dict[str, Any]) -> dict[str, Any]:
        """Add what a later command measured (such as "test") to the record; return the whole."""
        record = self.read_if_written()
        record = record or {"format": RECORD_FORMAT, "name": self.path.name, "status": "unfinished"}
        record.setdefault("evaluations", {})[name] = evaluation
        self.write(record)
        return record


def as_configured(settings: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run as they were configured, without what ``fit`` filled in from the rows.

    So a run can be compared with settings that were not used yet, and another run built on it.

    Args:
        settings: Those in its ``config.yaml``; a value that was changed there by hand stays.
        record: Its record, which holds what was filled in.
    """
    auto_filled = (record.get("length") or {}).get("auto_filled", {})
    if not auto_filled:
        return dict(settings)
    trainer = dict(settings["trainer"])
    trainer |= {name: asked for name, (asked, used) in auto_filled.items() if trainer[name] == used}
    return {**settings, "trainer": trainer}


def best_evaluation(record: Mapping[str, Any], split: str) -> str | None:
    """Return the first evaluation of a split ("val", "test") by the weights that are the best checkpoint now, or None.

    A run that was trained for longer may have kept other weights since; evaluations of the earlier ones do not count.
    Those on other rows than the run's own come last, such as those on a file that was given to ``test``.
    """
    step = (record.get("best") or {}).get("step")
    rows = ((record.get("data") or {}).get("splits") or {}).get(split, {}).get("fingerprint")
    found: list[tuple[bool, str]] = []
    for name, evaluation in (record.get("evaluations") or {}).items():
        now = step is None or evaluation.get("step", step) == step
        best = Path(evaluation.get("checkpoint", "best.ckpt")).name == "best.ckpt"
        if now and best and re.fullmatch(rf"{split}(-\d+)?", name):
            found.append((evaluation.get("fingerprint") != rows, name))
    return min(found, key=lambda each: each[0])[1] if found else None


def best_predictions(place: Path, name: str) -> Path:
    """Return the file with the predictions of an evaluation; "val.parquet" is what the last pass of ``fit`` gave."""
    return place / "predictions" / ("val-best.parquet" if name == "val" else f"{name}.parquet")


def best_metrics(record: Mapping[str, Any], split: str) -> Mapping[str, float]:
    """Return the metrics of the kept weights on a split; of validation rows those of ``fit`` without ``validate``."""
    name = best_evaluation(record, split)
    if name is not None:
        return dict(record["evaluations"][name].get("after", {}))
    best = (record.get("best") or {}).get("metrics", {}) if split == "val" else {}
    return {key.removeprefix("val/"): value for key, value in best.items()}


def folder_name(name: str, key: str = "--name") -> str:
    """Return the name, if a folder may be called so.

    Args:
        name: What is asked for.
        key: Where it was given, for the message.

    Raises:
        UserError: It may not.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{key}: '{name}' is no folder name; use letters, digits, '.', '_' and '-' (at most 100)")
    return name


def plain_stem(stem: str) -> str:
    """Return what the name of a folder that was given none begins with."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", stem)[:60].strip("-.") or "run"


def new_record(words: list[str], seed: int) -> dict[str, Any]:
    """Return the part of a record that is known at the start: command, seed, versions, commit, machine."""
    return {
        "format": RECORD_FORMAT,
        "started": now(),
        "started_in": str(Path.cwd()),
        "command": command_line(*words),
        "seed": seed,
        "versions": {"lightning_lora": __version__, "python": platform.python_version(), **versions()},
        "code": commit(),
        "machine": {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()},
    }


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on, and of plugins with kernels."""
    plugins = [point.dist for point in metadata.entry_points(group="lightning_lora.kernels") if point.dist]
    return {name: metadata.version(name) for name in _PACKAGES} | {each.name: each.version for each in plugins}


@cache
def commit() -> dict[str, Any]:
    """Return the commit of this code and whether code or configs differed from it; nulls outside a git checkout.

    With them a fingerprint of the code that results come from, which a commit that changes a document leaves as it is.
    Asked once a process, early: what is imported stays as it was when the files change. Processes that are forked
    from one that has imported the code have its answer.
    """
    here = Path(__file__)

    def git(*words: str) -> str | None:
        command = ["git", "-C", str(here.parents[2]), *words]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    head = changes = None
    if git("ls-files", "--error-unmatch", str(here)) is not None:  # no copy that another repository happens to contain
        head = git("rev-parse", "HEAD")
        # Data and runs of a user may lie in the same folder; they do not change what the code does.
        changes = git("status", "--porcelain", "--", "main.py", "lightning_lora", "configs")
    dirty = None if changes is None else bool(changes)
    return {"commit": head, "dirty": dirty, "fingerprint": code_fingerprint(*TRAINS)}


def processor() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return named[1] if named else platform.processor()


def as_yaml(settings: Mapping[str, Any]) -> str:
    """Return the settings as the text of a ``config.yaml``."""
    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)


def plain(value: Any) -> Any:
    """Return the value as JSON can hold it: keys as text, tuples as lists, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
