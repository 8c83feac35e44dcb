"""Runs that were not planned together, as the arms of an ablation: those that differ by their seed only are one arm."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_lora.errors import UserError
from lightning_lora.experiments.confounders import changes
from lightning_lora.experiments.plan import ARM, Axis, Cell, Plan
from lightning_lora.experiments.plan_config import flatten
from lightning_lora.experiments.results import Answers, Arm, CellResult, one_class

#: Settings that change nothing of what comes out.
_OUTSIDE = {
    *("data.cache_dir", "seed_everything"),
    *("trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.log_every_n_steps"),
}
_SHORT = {"learning_rate": "lr"}
#: A longer label is no name: the arm is then called like its first run.
_LONGEST_LABEL = 60


@dataclass(frozen=True)
class GivenRun:
    """A finished run.

    Args:
        name: Its folder's name.
        record: Its run record.
        val: Its answers on validation rows, None where there are none.
        test: Its answers on test rows, None where there are none.
        label_names: Names of the classes.
        val_of: The weights that ``val`` is of: "best" or "last".
        fingerprints: Of the rows of each split.
    """

    name: str
    record: Mapping[str, Any]
    val: Answers | None
    test: Answers | None
    label_names: Sequence[str]
    val_of: str
    fingerprints: Mapping[str, str]

    @property
    def settings(self) -> dict[str, Any]:
        """Flat settings that what comes out depends on, without the seed."""
        flat = flatten(self.record["config"])
        return {key: value for key, value in flat.items() if key not in _OUTSIDE and value not in (None, {})}

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.record["seed"])


def as_ablation(
    runs: Sequence[GivenRun], baseline: str, metric: str = "accuracy", margin: float = 0.01
) -> tuple[Plan, list[CellResult]]:
    """The runs as a plan and its cells, on test rows where all have answered them, else on validation rows.

    Args:
        runs: The runs, in the order of the table.
        baseline: Name of the run whose arm the others are compared with.
        metric: What is compared by.
        margin: Differences under this count as none.

    Raises:
        UserError: Two runs have other rows, or are the same settings with the same seed.
    """
    split = "test" if all(run.test is not None for run in runs) else "val"
    check_rows(runs, split)
    labels = arm_labels(runs)
    taken: dict[tuple[str, int], str] = {}
    for run in runs:
        other = taken.setdefault((labels[run.name], run.seed), run.name)
        if other != run.name:
            raise UserError(f"report: {other} and {run.name} have the same settings and seed; leave one of them out")
    arms: dict[str, Arm] = {label: ((ARM, label),) for label in dict.fromkeys(labels.values())}
    changed = {labels[run.name]: run.settings for run in reversed(runs)}
    plan = Plan(
        question=question(runs),
        base=None,
        settings={},
        axes=[Axis(ARM, {label: changed[label] for label in arms}, chosen=False, numbers=False)],
        baseline=arms[labels[baseline]],
        seeds=sorted({run.seed for run in runs}),
        metric=metric,
        margin=margin,
    )
    cells = []
    for run in runs:
        cell = Cell(arms[labels[run.name]], (), run.seed, {})
        plan.cells.append(cell)
        # Where only some have answered the test rows, none of those answers is shown beside the others'.
        test = run.test if split == "test" else None
        reason = one_class(test or run.val) if run.val is not None else "no predictions of validation rows"
        cells.append(CellResult(cell, "finished", reason, run.record, run.val, test, run.label_names))
    return plan, cells


def check_rows(runs: Sequence[GivenRun], split: str) -> None:
    """Refuses runs of other rows, naming two of them.

    Raises:
        UserError: As said.
    """
    for run in runs[1:]:
        if run.fingerprints.get(split) != runs[0].fingerprints.get(split):
            named = "test" if split == "test" else "validation"
            raise UserError(
                f"report: {runs[0].name} and {run.name} have different {named} rows (another source, split_seed or "
                "number of rows) and cannot be compared; report them apart"
            )


def differing(runs: Sequence[GivenRun]) -> list[str]:
    """The settings in which the runs differ, in the order of a config."""
    settings = [run.settings for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]


def arm_labels(runs: Sequence[GivenRun]) -> dict[str, str]:
    """The arm of each run, by the settings in which the runs differ: "rank 8, lr 0.0005"."""
    keys = differing(runs)
    last = [key.split(".")[-1] for key in keys]
    short = {
        key: _SHORT.get(name, name) if last.count(name) == 1 else " ".join(key.split(".")[-2:])
        for key, name in zip(keys, last, strict=True)
    }
    labels: dict[str, str] = {}
    known: dict[str, str] = {}
    for run in runs:
        values = {key: run.settings.get(key) for key in keys}
        if str(values) in known:
            labels[run.name] = known[str(values)]
            continue
        label = ", ".join(f"{short[key]} {_value(value)}" for key, value in values.items()) or "all runs"
        if len(label) > _LONGEST_LABEL or label in known.values():
            label = run.name
        labels[run.name] = known[str(values)] = label
    return labels


def question(runs: Sequence[GivenRun]) -> str:
    """What the runs can answer."""
    keys = differing(runs)
    if not keys:
        return f"{len(runs)} runs of the same settings: what do they come to?"
    more = f" and {len(keys) - 6} more settings" if len(keys) > 6 else ""
    return f"{len(runs)} runs that differ in {', '.join(keys[:6])}{more}: which are better, and by how much?"


def differences(runs: Sequence[GivenRun], plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """In what each arm differs from the baseline, by its label, with what follows from the settings."""
    labels = arm_labels(runs)
    first = {label: next(run for run in runs if labels[run.name] == label) for label in labels.values()}
    base = first[dict(plan.baseline)[ARM]]
    found = {}
    for label, run in first.items():
        if run is base:
            continue
        one, other = ({**each.settings, **_follows(each)} for each in (base, run))
        found[label] = [asdict(change) for change in changes(one, other, [*one, *other])]
    return found


def remarks(runs: Sequence[GivenRun]) -> list[str]:
    """What a reader should know of these runs: what differs beside their settings."""
    said = []
    untested = [run.name for run in runs if run.test is None]
    if untested and len(untested) < len(runs):
        said.append(f"warning: validation rows are compared, as not all runs were tested ({', '.join(untested)} not)")
    last = [run.name for run in runs if run.val is not None and run.val_of == "last"]
    if last:
        said.append(f"Validation predictions are of the last weights, not of the best ones, in {', '.join(last)}.")
    first = runs[0]
    for run in runs[1:]:
        same = all(run.settings.get(key) == first.settings.get(key) for key in differing(runs) if key[:5] == "data.")
        if same and run.fingerprints.get("train") != first.fingerprints.get("train"):
            said.append(f"warning: {first.name} and {run.name} were trained on different rows; the source has changed")
            break
    return said


def _follows(run: GivenRun) -> dict[str, Any]:
    """What settings come to without saying so: the method's own learning rate, and a ratio."""
    follows: dict[str, Any] = {}
    settings, model = run.settings, run.record.get("model") or {}
    if "model.learning_rate" not in settings and "learning_rate" in model:
        follows["learning rate of the method"] = model["learning_rate"]
    if settings.get("model.adapter.rank") and settings.get("model.adapter.alpha"):
        follows["alpha / rank"] = settings["model.adapter.alpha"] / settings["model.adapter.rank"]
    return follows


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "default" if value is None else str(value).rstrip("/").split("/")[-1]
