"""Runs that were not planned together, as the arms of an ablation: those that differ by their seed only are one arm.

Imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_lora.errors import UserError
from lightning_lora.evaluation.metric_table import row_metrics
from lightning_lora.experiments.confounders import Change, changes
from lightning_lora.experiments.plan import ARM, Axis, Cell, Plan, flatten
from lightning_lora.experiments.results import (
    CellPredictions,
    CellResult,
    one_class,
    read_cell_predictions,
    read_run_predictions,
)
from lightning_lora.runs.folder import RunFolder, as_configured, best_evaluation
from lightning_lora.units import duration

#: Settings that change nothing in a result.
_OUTSIDE = {
    *("data.cache_dir", "seed_everything"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
}
_BUDGET = "budget"
#: A longer label is no name: the arm is then called like its first run.
_LONGEST_LABEL = 60


@dataclass(frozen=True)
class GivenRun:
    """A finished run.

    Args:
        place: Its folder.
        record: Its run record.
        answers: Its answers by split; of validation rows those of the last weights where the best were not validated.
    """

    place: Path
    record: Mapping[str, Any]
    answers: Mapping[str, CellPredictions]

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.place.name

    @property
    def settings(self) -> dict[str, Any]:
        """Flat settings that the result depends on, without the seed.

        Of a run by ``fit --budget`` they are those that the search began with, and the budget: what it chose is its
        result, and differs from seed to seed.
        """
        tuning = self.record.get("tuning") or {}
        if "default" in tuning:
            flat = {**flatten(tuning["default"]), _BUDGET: duration(tuning["budget_s"])}
        else:
            flat = flatten(as_configured(self.record["config"], self.record))
        return {key: value for key, value in flat.items() if key not in _OUTSIDE and value not in (None, {})}

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.record["seed"])

    def fingerprint(self, split: str) -> str | None:
        """Return the fingerprint of the rows of a split: of those that were evaluated, where they were."""
        tested = best_evaluation(self.record, "test") if split == "test" else None
        if tested is not None:
            return str(self.record["evaluations"][tested]["fingerprint"])
        splits = (self.record.get("data") or {}).get("splits", {})
        return splits.get(split, {}).get("fingerprint")


def read_run(place: Path) -> GivenRun:
    """Read a run with its answers.

    Raises:
        UserError: It has not finished, or a file is damaged.
    """
    record = RunFolder(place).read()
    if (status := record.get("status")) != "finished":
        raise UserError(f"report: {place} has not finished ({status}); resume it, or leave it out")
    answers = read_run_predictions(place, record)
    last = read_cell_predictions(place / "predictions" / "val.parquet") if "val" not in answers else None
    return GivenRun(place, record, answers if last is None else {**answers, "val": last})


def as_ablation(runs: Sequence[GivenRun], baseline: GivenRun) -> tuple[Plan, list[CellResult], dict[str, list[Change]]]:
    """Return the runs as a plan and its cells, and in what each arm differs from the baseline, by its label.

    They are compared on test rows where all have answered them, else on validation rows.

    Raises:
        UserError: Two runs have the same settings and seed, or other rows.
    """
    keys = differing(runs)
    labels = arm_labels(runs, keys)
    firsts: dict[str, GivenRun] = {}
    taken: dict[tuple[str, int], str] = {}
    cells = []
    tested = all("test" in run.answers for run in runs)
    split = "test" if tested else "val"
    for run, label in zip(runs, labels, strict=True):
        firsts.setdefault(label, run)
        if run.fingerprint(split) != runs[0].fingerprint(split):
            rows = "test" if tested else "validation"
            raise UserError(
                f"report: {runs[0].name} and {run.name} have different {rows} rows (another source, split_seed or "
                "number of rows) and cannot be compared; report them apart"
            )
        if (other := taken.setdefault((label, run.seed), run.name)) != run.name:
            raise UserError(f"report: {other} and {run.name} have the same settings and seed; leave one of them out")
        cell = Cell(label, "", {ARM: label}, run.seed, run.settings)
        # Where only some have answered the test rows, none of those answers is shown beside the others'.
        answers = {split: each for split, each in run.answers.items() if split == "val" or tested}
        judged = answers.get("test", answers.get("val"))
        reason = one_class(judged) if judged and "val" in answers else "no predictions of validation rows"
        cells.append(CellResult(cell, "finished", reason, run.record, answers, run.place))
    question = f"{len(runs)} runs that differ in {', '.join(keys)}: which are better, and by how much?"
    if len(firsts) == 1:
        question = f"How good {f'are {len(runs)} runs of other seeds' if len(runs) > 1 else f'is {runs[0].name}'}?"
    plan = Plan(
        question=question,
        base=None,
        axes=[Axis(ARM, {label: run.settings for label, run in firsts.items()}, chosen=False, numbers=False)],
        baseline=labels[runs.index(baseline)],
        seeds=sorted({run.seed for run in runs}),
        metric=row_metrics((baseline.record.get("data") or {}).get("task", "single_label"))[0],
        margin=0.01,
        cells=[result.cell for result in cells],
    )
    own = {label: {**run.settings, **_follows(run)} for label, run in firsts.items()}
    base = own.pop(plan.baseline)
    return plan, cells, {label: changes(base, each, {*base, *each}) for label, each in own.items()}


def differing(runs: Sequence[GivenRun]) -> list[str]:
    """Return the settings in which the runs differ, in the order of a config."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def arm_labels(runs: Sequence[GivenRun], keys: Sequence[str]) -> list[str]:
    """Return the arm of each run, by the settings in which the runs differ: "rank 8, learning_rate 0.0005"."""
    labels: dict[str, str] = {}
    for run in runs:
        values = {key: run.settings.get(key) for key in keys}
        if str(values) not in labels:
            words = [_words(key, value) for key, value in values.items()]
            label = ", ".join(words) or "all runs"
            labels[str(values)] = run.name if len(label) > _LONGEST_LABEL or label in labels.values() else label
    return [labels[str({key: run.settings.get(key) for key in keys})] for run in runs]


def remarks(runs: Sequence[GivenRun]) -> list[str]:
    """Return what a reader should know of these runs: what differs beside their settings."""
    found = []
    untested = [run.name for run in runs if "test" not in run.answers]
    if untested and len(untested) < len(runs):
        found.append(f"warning: validation rows are compared, as not all runs were tested ({', '.join(untested)} not)")
    if tuned := [run.name for run in runs if "tuning" in run.record]:
        found.append(f"Training times of {', '.join(tuned)} are those of the kept trials, not of the searches.")
    last = [run.name for run in runs if "val" in run.answers and best_evaluation(run.record, "val") is None]
    if last:
        found.append(f"Validation predictions are of the last weights, not of the best ones, in {', '.join(last)}.")
    trained: dict[str, GivenRun] = {}
    for run in runs:
        data = str({key: value for key, value in run.settings.items() if key.startswith("data.")})
        first = trained.setdefault(data, run)
        if run.fingerprint("train") != first.fingerprint("train"):
            why = "the source has changed"
            return [*found, f"warning: {first.name} and {run.name} were trained on different rows; {why}"]
    return found


def _follows(run: GivenRun) -> dict[str, Any]:
    """What follows from settings that do not show it: the method's own learning rate, and a ratio."""
    settings, model = run.settings, run.record.get("model") or {}
    rank, alpha = (settings.get(f"model.adapter.{name}") for name in ("rank", "alpha"))
    follows: dict[str, Any] = {"alpha / rank": alpha / rank} if rank and alpha else {}
    if "model.learning_rate" not in settings and "learning_rate" in model:
        follows["learning rate of the method"] = model["learning_rate"]
    return follows


def _words(key: str, value: Any) -> str:
    return "no budget" if key == _BUDGET and value is None else f"{key.rsplit('.', maxsplit=1)[-1]} {_value(value)}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "default" if value is None else str(value).rstrip("/").split("/")[-1]
