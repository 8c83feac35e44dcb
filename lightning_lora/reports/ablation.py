"""The report of an ablation: its answer and its notes, in words. Imports no torch."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_lora.evaluation.metric_table import METRICS, primary_metric
from lightning_lora.evaluation.significance import Estimate
from lightning_lora.experiments.confounders import Change
from lightning_lora.experiments.plan import Plan
from lightning_lora.experiments.results import ArmResult, CellPredictions, CellResult
from lightning_lora.tasks import Task
from lightning_lora.units import duration


@dataclass(frozen=True)
class Report:
    """What a report is made of.

    Args:
        name: The ablation's name.
        plan: What was asked.
        command: The exact command.
        arms: The arms, compared.
        cells: Every cell.
        tests: How often test rows were evaluated, and of how many cells.
        changes: In what each arm differs from the baseline, by its label.
        remarks: What a reader should know of how the cells were made, where that was not this ablation.
    """

    name: str
    plan: Plan
    command: str
    arms: Sequence[ArmResult]
    cells: Sequence[CellResult]
    tests: tuple[int, int]
    changes: Mapping[str, Sequence[Change]]
    remarks: Sequence[str] = ()

    @property
    def split_key(self) -> str:
        """The rows that the arms are compared on, as records name them: "test" or "val"."""
        return self.arms[0].split

    @property
    def split(self) -> str:
        """The same in words."""
        return "test" if self.split_key == "test" else "validation"

    @property
    def task(self) -> Task:
        """What is predicted."""
        tasks = ((cell.record.get("data") or {}).get("task") for cell in self.cells)
        return next(filter(None, tasks), "single_label")

    @property
    def baseline(self) -> ArmResult:
        """The baseline's arm."""
        return next(arm for arm in self.arms if arm.label == self.plan.baseline)

    @property
    def compares(self) -> bool:
        """Whether there is more than one arm."""
        return len(self.arms) > 1

    @property
    def rows(self) -> CellPredictions | None:
        """The answers of one cell of the baseline: all that are compared are to the same rows."""
        return next(iter(self.answers_of(self.baseline)), None)

    @property
    def margin(self) -> float:
        """The margin in the metric's units."""
        return self.plan.margin if self.rows is None else self.plan.margin_on(self.rows.truth)

    @property
    def margin_text(self) -> str:
        """The margin in words."""
        unit = METRICS[self.plan.metric].unit
        of = f" ({self.plan.margin:g} of the {unit[0]} of the {self.split} labels)" if unit is not None else ""
        return f"{self.margin:.4g}{of}"

    @property
    def has_answers(self) -> bool:
        """Whether any arm has answers to the rows that the arms are compared on."""
        return any(arm.own is not None for arm in self.arms)

    def answers_of(self, arm: ArmResult) -> list[CellPredictions]:
        """Return an arm's answers to the rows that the arms are compared on, of each seed that has them."""
        return [cell.answers[self.split_key] for cell in arm.by_seed if self.split_key in cell.answers]


def answer(report: Report) -> str:
    """Return the answer in words, with its uncertainty."""
    base, metric = report.baseline, report.plan.metric
    own = base.own
    if own is None:
        why = next((f" ({cell.reason:.160})" for cell in base.cells if cell.reason), "")
        return f"No answer yet: {'the baseline' if report.compares else base.label} has no finished cell{why}."
    better = "" if report.plan.higher_is_better else ", lower is better"
    what = f"The baseline, {base.label}," if report.compares else base.label
    start = f"{what} has {report.split} {metric} {own.mean:.4f} {interval_text(own, metric)}{better}"
    if not report.compares:
        published = report.plan.published
        return f"{start}; published: {published.shown(base.label)}." if published.figures else f"{start}."
    if not any(arm.against for arm in report.arms):
        return f"{start}. No other arm has finished with a seed that the baseline has."
    if own.seeds < 2:
        return f"{start}. With one seed nothing can be called better or worse."
    phrases = {
        "better": "Better than it: {}",
        "worse": "Worse than it: {}",
        "equivalent": f"Equivalent to it within {report.margin_text}: {{}}",
        "inconclusive": "Inconclusive: {}; in brackets the minimum detectable effect at 80% power",
        "same predictions": "With the same predictions on every row: {}",
        "one seed": "One seed in common with it only, which does not support a conclusion: {}",
        "no seed": "Without a seed in common with it: {}",
        "not tested": "Not tested, as not all their seeds have finished: {}",
        "nothing": "Without a finished cell: {}",
    }
    found: dict[str, list[str]] = {verdict: [] for verdict in phrases}
    for arm in report.arms:
        if arm.against is not None:
            found[arm.against.verdict].append(_with_effect(arm, metric))
        elif arm is not base:
            missing = "not tested" if "val" in arm.estimates else "nothing"
            found[missing if arm.own is None else "no seed"].append(arm.label)
    sentences = [phrases[verdict].format(", ".join(arms)) for verdict, arms in found.items() if arms]
    return f"{'. '.join([start, *sentences])}."


def facts(report: Report) -> list[tuple[str, str]]:
    """Return what the arms were trained and tested on: names and values, those that differ between arms joined."""
    records = [cell.record for cell in report.cells if cell.status == "finished" and cell.record.get("config")]
    if not records:
        return []

    def joined(values: Iterable[object], many: str = "several") -> str:
        found = list(dict.fromkeys(str(value) for value in values))
        return ", ".join(found) if len(found) <= 3 else f"{many} ({found[0]}, {found[1]}, ...)"

    data = [record.get("data") or {} for record in records]
    splits, labels = [each.get("splits") or {} for each in data], [each.get("label_names") or [] for each in data]
    named = {"train": "trained on", "val": "validated on", "test": "tested on"}
    counts = {split: [f"{each[split]['rows']:,}" for each in splits if split in each] for split in named}
    rows = [f"{named[split]} {joined(count)}" for split, count in counts.items() if count]
    said = (f"{len(each)} ({', '.join(each[:6])}{', ...' * (len(each) > 6)})" for each in labels)
    if is_number := report.task == "regression":
        spans = (each["train"]["numbers"] for each in splits if "numbers" in each.get("train", {}))
        said = (", ".join(each) for each in labels)
        said = (f"{name}, {span['min']:g} to {span['max']:g} in train" for name, span in zip(said, spans, strict=False))
    compared = "paired by seed and row; margin " + report.margin_text if report.compares else "over seeds and rows"
    return [
        ("data", joined((record["config"].get("data") or {}).get("source", "-") for record in records)),
        ("rows", ", ".join(rows)),
        ("number" if is_number else "labels", joined(said)),
        ("base model", joined(record["base_model"] for record in records if record.get("base_model"))),
        ("seeds", ", ".join(map(str, report.plan.seeds))),
        ("compared by" if report.compares else "measured by", f"{report.split} {report.plan.metric}, {compared}"),
    ]


def _with_effect(arm: ArmResult, metric: str) -> str:
    """An arm with what its verdict rests on, where that says something."""
    assert arm.against is not None
    found, verdict = arm.against.estimate, arm.against.verdict
    if verdict == "inconclusive":
        return f"{arm.label} ({arm.against.detectable:.3f})"
    if verdict == "worse":  # by how much it is worse, with the interval of just that
        found = replace(found, mean=-found.mean, low=-found.high, high=-found.low)
    decided = verdict in ("better", "worse")
    return arm.label + (f" by {found.mean:.4f} {interval_text(found, metric, signed=True)}" if decided else "")


def notes(report: Report) -> list[str]:
    """Return what a reader should know beside the numbers."""
    tests, cells = report.tests
    judged = primary_metric(report.task)[1]
    chosen = f"Variants are chosen by validation {report.plan.metric}, checkpoints by validation {judged}."
    found = [
        f"command: {report.command}",
        *(report.remarks or [chosen]),
        f"Test rows were evaluated {tests} times, for {cells} cells.",
        f"Intervals and p-values are over seeds and {report.split} rows together; p-values, also those behind "
        "'equivalent', are corrected for the number of arms (Holm), intervals are of each arm by itself. The "
        "minimum detectable effect is the smallest true difference found with 80% power; 'seeds needed' is how many "
        "seeds would find one as large as was seen ('more rows': over a thousand); both for a single comparison."
        if report.compares
        else f"Intervals are over seeds and {report.split} rows together.",
        "All seeds learn from the same choice of rows (data.split_seed) and are tested on the same: how much the "
        "result depends on that choice is not in the intervals."
        if report.plan.folds is None
        else f"Metrics are of the rows of all {report.plan.folds} folds (K) together, each tested by its fold's model; "
        "variants are chosen for each fold on its own validation rows; costs are means over the runs. Models of two "
        "folds share training rows: the rows' part of intervals and p-values is (1/K + 1/(K-1)) times the variance "
        "of the folds' means, with K-1 degrees of freedom (Nadeau and Bengio 2003), or that of the rows where it is "
        "more. No estimate of it is unbiased (Bengio and Grandvalet 2004).",
    ]
    if (search := report.plan.search) is not None:
        found.append(
            f"Each arm was given {search.trials} trials (Optuna, {search.sampler}, seed {search.seed}), with seed "
            f"{report.plan.seeds[0]}; the best on validation rows is then trained with every seed."
        )
    if report.plan.published.figures:
        found.append(
            f"Published: {report.plan.published.source}. Measured by others: no interval or p-value is about these."
        )
    found += _cautions(report)
    records = [cell.record for cell in report.cells if cell.record.get("machine")]
    if records:
        machines = {f"{r['machine']['cores']} cores, {r['machine']['processor']}" for r in records}
        found.append(f"machine: {'; '.join(sorted(machines))}")
        codes = (
            f"{str(r['code'].get('commit'))[:12]}{' with changes' * bool(r['code'].get('dirty'))}" for r in records
        )
        packages = ", ".join(f"{name} {value}" for name, value in records[0]["versions"].items())
        found.append(f"versions: {packages}; code {', '.join(dict.fromkeys(codes))}")
    seconds = sum(cell.record.get("wall_s", 0.0) for cell in report.cells)
    return [*found, f"{len(report.cells)} cells, {duration(seconds)} in all"]


def _cautions(report: Report) -> list[str]:
    """What limits the comparison."""
    found = []
    if report.split == "validation":
        found.append(
            "warning: compared on the validation rows that chose checkpoints and variants: optimistically biased"
        )
    for arm in report.arms:
        if not arm.complete:
            found.append(f"warning: {arm.label} has seeds that have not finished; it is not tested before they have")
        if arm.edges:
            found.append(f"warning: {arm.label} is best at the edge of what was tried ({', '.join(arm.edges)})")
    for label, changes in report.changes.items():
        found += [f"warning: {label} also differs from the baseline in {each}" for each in changes if not each.named]
    finished = [cell for cell in report.cells if cell.status == "finished"]
    made_by = {"code": "by different code", "versions": "with different versions", "machine": "on different machines"}
    for key, what in made_by.items():
        made = [cell.record.get(key) or {} for cell in finished]
        made = [value.get("fingerprint") for value in made] if key == "code" else made
        if odd := [cell for cell, value in zip(finished, made, strict=True) if value != made[0]]:
            first, other = (cell.record.get("name") for cell in (finished[0], odd[0]))
            found.append(f"warning: {first} and {other} were made {what}")
    count = len(report.cells)
    if one_class := sum(bool(cell.reason) for cell in finished):
        same = "one class only" if report.task == "single_label" else "the same for every text"
        found.append(f"warning: {one_class} of {count} cells predict {same}")
    if len(finished) < count:
        found.append(f"{count - len(finished)} of {count} cells have not finished; the table of cells says why")
    return found


def bounded(found: Estimate, metric: str, signed: bool = False) -> tuple[float, float]:
    """Return the ends of an interval, within what the metric, or a difference of two, can be."""
    least, most = -math.inf, math.inf
    if metric in ("pearson", "matthews_correlation"):
        least, most = -1.0, 1.0
    elif metric.startswith(("accuracy", "subset_accuracy", "hamming_loss", "f1_", "precision_", "recall_")):
        least, most = 0.0, 1.0
    elif metric in ("loss", "mse", "mae"):
        least = 0.0
    if signed:
        least, most = least - most, most - least
    return max(found.low, least), min(found.high, most)


def interval_text(found: Estimate, metric: str, signed: bool = False) -> str:
    """Return an interval in brackets, with signs where it is of a difference."""
    form = "+.4f" if signed else ".4f"
    return "[{}, {}]".format(*(f"{end:{form}}" for end in bounded(found, metric, signed)))


def estimate_text(found: Estimate, metric: str, signed: bool = False) -> str:
    """Return a mean with its interval."""
    return f"{found.mean:{'+.4f' if signed else '.4f'}} {interval_text(found, metric, signed)}"


def number_text(value: float, digits: int = 0) -> str:
    """Return a number with thousands separated, a hyphen where there is none."""
    return "-" if math.isnan(value) else f"{value:,.{digits}f}"
