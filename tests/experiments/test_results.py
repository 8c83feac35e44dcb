"""Arms put together from cells whose answers are written down here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_lora.errors import UserError
from lightning_lora.evaluation.significance import difference
from lightning_lora.experiments.confounders import Change, changes
from lightning_lora.experiments.plan import make_plan
from lightning_lora.experiments.results import CellPredictions, CellResult, compare_arms, one_class

KEYS = np.array([f"k{i:03}" for i in range(200)])
LABELS = np.arange(200) % 2
CONTENT = {
    "question": "?",
    "axes": {
        "rank": {"model.adapter.rank": [2, 8]},
        "rate": {"model.learning_rate": [1e-4, 1e-3, 1e-2], "chosen": True},
    },
    "baseline": {"rank": 8},
    "seeds": [1, 2, 3],
}
PLAN = make_plan(CONTENT, Path("a.yaml"))


def answers(right: float, seed: int, keys: np.ndarray = KEYS) -> CellPredictions:
    """The first so-and-so-many rows right, a little more or less by the seed."""
    hit = np.arange(len(keys)) < round(len(keys) * right) + seed
    logits = np.eye(2)[np.where(hit, LABELS[: len(keys)], 1 - LABELS[: len(keys)])].astype(np.float32) * 3
    return CellPredictions(logits, LABELS[: len(keys)], keys, ["a", "b"])


def cells(val: dict[tuple[str, str], float], test: dict[str, float] | None = None, lost=()) -> list[CellResult]:
    found = []
    for cell in PLAN.cells:
        arm, rate = cell.values["rank"], cell.values["rate"]
        if (arm, rate, cell.seed) in lost:
            found.append(CellResult(cell, "failed", "diverged"))
            continue
        tested = {"test": answers(test[arm], cell.seed)} if test else {}
        found.append(CellResult(cell, "finished", "", {}, {"val": answers(val[arm, rate], cell.seed), **tested}))
    return found


VAL = {("2", "0.0001"): 0.6, ("2", "0.001"): 0.7, ("2", "0.01"): 0.65,
       ("8", "0.0001"): 0.6, ("8", "0.001"): 0.7, ("8", "0.01"): 0.8}  # fmt: skip


def test_each_arm_takes_the_variant_that_is_best_on_validation_whatever_test_says() -> None:
    two, eight = compare_arms(PLAN, cells(VAL, test={"2": 0.9, "8": 0.5}))
    assert two.variant == "rate 0.001" and eight.variant == "rate 0.01"
    assert (two.edges, eight.edges) == ([], ["rate 0.01"]) and two.tried == 3
    assert two.against is not None and two.against.estimate.mean == pytest.approx(0.4) and eight.against is None
    assert two.against.verdict == "better" and two.seeds == [1, 2, 3]


def test_without_test_rows_validation_rows_are_compared() -> None:
    two, eight = compare_arms(PLAN, cells(VAL))
    assert "test" not in two.estimates and two.against is not None
    assert two.against.estimate.mean == pytest.approx(-0.1)
    assert eight.estimates["val"].mean == pytest.approx(0.8 + 2 / 200)


def test_a_lost_seed_is_left_out_of_the_pair_and_a_variant_with_one_cannot_be_the_best() -> None:
    found = cells(VAL, lost={("2", "0.001", 2), ("8", "0.0001", 1)})
    two, eight = compare_arms(PLAN, found)
    assert two.variant == "rate 0.01" and eight.variant == "rate 0.01"
    lost = {("2", r, s) for r in ("0.0001", "0.001", "0.01") for s in (1, 2, 3)} - {("2", "0.001", 3)}
    two, eight = compare_arms(PLAN, cells(VAL, lost=lost))
    assert two.seeds == [3] and two.against is not None and two.against.verdict == "one seed"
    everything = {("2", r, s) for r in ("0.0001", "0.001", "0.01") for s in (1, 2, 3)}
    two, eight = compare_arms(PLAN, cells(VAL, lost=everything))
    assert two.against is None and not two.estimates and [c.reason for c in two.cells] == ["diverged"] * 3


def test_other_rows_are_never_paired() -> None:
    found = cells(VAL)
    odd = answers(0.6, 1, np.array([f"x{i:03}" for i in range(200)]))
    found[1] = CellResult(found[1].cell, "finished", "", {}, {"val": odd})
    with pytest.raises(UserError, match="rows are not those"):
        compare_arms(PLAN, found)


def test_each_seed_is_paired_with_itself_in_whatever_order_the_cells_come() -> None:
    found = cells(VAL, test={"2": 0.62, "8": 0.8})
    for cell in found:  # a seed of its own kind: seeds that are exchanged would show
        test = cell.answers["test"]
        shift = replace(test, logits=np.roll(test.logits, 40 * cell.cell.seed, axis=0))
        found[found.index(cell)] = replace(cell, answers={**cell.answers, "test": shift})
    straight, turned = (compare_arms(PLAN, given)[0].against for given in (found, found[:9] + found[9:][::-1]))
    mixed = compare_arms(PLAN, [*found[::2], *found[1::2]])[0].against
    assert straight == turned == mixed
    rights = [np.stack([c.answers["test"].right for c in arm.cells]) for arm in compare_arms(PLAN, found)]
    expected = difference(*rights, 0.01)
    assert straight is not None and straight.per_seed == expected.per_seed and straight.p == expected.p


def test_rows_are_looked_at_also_where_the_first_seed_is_lost() -> None:
    everywhere = {("2", rate, 1) for rate in ("0.0001", "0.001", "0.01")}
    found = [
        replace(c, answers={"val": answers(0.6, 1, np.array([f"x{i:03}" for i in range(200)]))})
        if c.answers and c.cell.arm == "rank 2"
        else c
        for c in cells(VAL, lost=everywhere)
    ]
    with pytest.raises(UserError, match="rows are not those of rank-8__rate"):
        compare_arms(PLAN, found)


def test_an_arm_that_lost_a_seed_leaves_the_others_compared_on_test_rows() -> None:
    from lightning_lora.reports.ablation import Report, answer
    from lightning_lora.reports.ablation_tables import arm_table

    three = make_plan({**CONTENT, "axes": {"rank": {"model.adapter.rank": [2, 4, 8]}}}, Path("a.yaml"))
    found = []
    for cell in three.cells:
        rank = cell.values["rank"]
        if rank == "4" and cell.seed == 2:
            found.append(CellResult(cell, "failed", "diverged"))
            continue
        test = {} if rank == "4" else {"test": answers({"2": 0.6, "8": 0.8}[rank], cell.seed)}
        found.append(CellResult(cell, "finished", "", {}, {"val": answers(0.7, cell.seed), **test}))
    arms = compare_arms(three, found)
    two, four, _ = arms
    assert {arm.split for arm in arms} == {"test"}
    assert two.against is not None and two.against.estimate.mean == pytest.approx(-0.2)
    assert four.against is None and four.own is None
    report = Report("a", three, "ablate", arms, found, (6, 6), {})
    assert "Not tested, as not all their seeds have finished: rank 4" in answer(report)
    assert "diverged" in arm_table(report)[2]


def test_cells_of_other_code_or_versions_are_told_of() -> None:
    from lightning_lora.reports.ablation import Report, notes

    found = cells(VAL)
    same = {"code": {"fingerprint": "a", "commit": "c" * 40, "dirty": False}, "versions": {"torch": "2"}}
    same["machine"] = {"cores": 2, "processor": "one"}
    found = [replace(c, record={**same, "name": c.cell.name}) for c in found]
    said = "\n".join(notes(Report("a", PLAN, "ablate", compare_arms(PLAN, found), found, (0, 0), {})))
    assert "were made" not in said and f"code {'c' * 12}" in said
    found[3] = replace(
        found[3], record={**found[3].record, "code": {"fingerprint": "b", "commit": "d" * 40, "dirty": True}}
    )
    found[4] = replace(found[4], record={**found[4].record, "versions": {"torch": "3"}})
    said = "\n".join(notes(Report("a", PLAN, "ablate", compare_arms(PLAN, found), found, (0, 0), {})))
    assert f"and {found[3].cell.name} were made by different code" in said
    assert f"and {found[4].cell.name} were made with different versions" in said
    assert f"{'d' * 12} with changes" in said


def test_a_label_in_brackets_is_no_option_of_latex() -> None:
    from lightning_lora.reports.ablation import Report
    from lightning_lora.reports.ablation_pages import as_latex

    axes = {"layers": {"names": ["[q]", "[q, v]"], "a": [1, 2]}}
    plan = make_plan({**CONTENT, "axes": axes, "baseline": {"layers": "[q]"}}, Path("a.yaml"))
    found = [CellResult(c, "finished", "", {}, {"val": answers(0.7, c.seed)}) for c in plan.cells]
    written = as_latex(Report("a", plan, "ablate", compare_arms(plan, found), found, (0, 0), {}))
    assert "\n{}[q, v] & 3 & 0." in written and "& {}[" not in written


def test_one_class_is_told() -> None:
    assert (
        one_class(CellPredictions(np.tile([1.0, 0.0], (200, 1)), LABELS, KEYS, ["a", "b"])) == "predicts one class only"
    )
    assert one_class(answers(0.9, 0)) == ""


def test_a_second_difference_is_found() -> None:
    base = {"model.adapter.rank": 8, "model.adapter.alpha": 16, "seed_everything": 1, "data.max_length": 128}
    arm = {**base, "model.adapter.rank": 2, "seed_everything": 2, "data.max_length": 64}
    found = changes({**base, "alpha / rank": 2.0}, {**arm, "alpha / rank": 8.0}, ["model.adapter.rank"])
    assert [str(change) for change in found] == [
        "model.adapter.rank: 8 -> 2", "data.max_length: 128 -> 64", "alpha / rank: 2 -> 8"
    ]  # fmt: skip
    assert [change.key for change in found if not change.named] == ["data.max_length", "alpha / rank"]


def test_the_answer_and_the_tables_of_a_report() -> None:
    from lightning_lora.reports.ablation import Report, answer
    from lightning_lora.reports.ablation_pages import as_csv, as_html, as_latex, as_markdown
    from lightning_lora.reports.ablation_tables import arm_table

    found = cells(VAL, test={"2": 0.62, "8": 0.8}, lost={("2", "0.0001", 2)})
    arms = compare_arms(PLAN, found)
    differences = {"rank 2": [Change("alpha / rank", 2.0, 8.0, named=False)]}
    report = Report("a & b", PLAN, "python main.py ablate", arms, found, (6, 6), differences)
    assert "has test accuracy 0.8100" in answer(report) and "Worse than it: rank 2 by 0.1800" in answer(report)
    header, two, eight = arm_table(report)
    assert two[header.index("verdict")] == "worse" and two[header.index("settings tried")] == "3"
    assert eight[0] == "**rank 8** (baseline)" and len({len(header), len(two), len(eight)}) == 1
    text = as_markdown(report)
    assert "evaluated 6 times, for 6 cells" in text and "best at the edge of what was tried (rate 0.01)" in text
    assert "also differs from the baseline in alpha / rank" in text and "diverged" in text
    assert as_csv(report).count("\n") == 3 and r"a \& b" not in as_latex(report) and "\\toprule" in as_latex(report)
    page = as_html(report)
    assert "a &amp; b" in page and "a & b" not in page and page.count("<table") == 7 and "<svg" in page


@pytest.mark.parametrize("metric", ["mse", "mae"])
def test_the_margin_of_numbers_is_a_share_of_their_spread(metric: str) -> None:
    """Whatever the unit of the data, the same is said; of the mean squared error the margin is one of R2."""
    rng = np.random.default_rng(0)
    truth, noise = rng.normal(5, 2, 400), rng.normal(0, 0.6, (3, 400))
    plan = replace(PLAN, metric=metric, axes=PLAN.axes[:1], cells=PLAN.cells)
    found = {}
    for unit in (1, 1000):
        results = []
        for cell in plan.cells:
            off = 1.0 if cell.arm == "rank 8" else 1.005
            numbers = (unit * (truth + off * noise[cell.seed - 1]))[:, None].astype(np.float32)
            said = CellPredictions(numbers, unit * truth, np.arange(400).astype(str), ["days"], task="regression")
            results.append(CellResult(cell, "finished", "", {}, {"val": said}))
        arms = compare_arms(plan, results)
        found[unit] = arms[0].against
        values = {a.label: np.stack([c.answers["val"].values(metric) for c in a.cells]) for a in arms}
        margin = 0.01 * unit ** (2 if metric == "mse" else 1) * (truth.var() if metric == "mse" else truth.std())
        by_hand = difference(values["rank 2"], values["rank 8"], margin, higher_is_better=False)
        assert found[unit] is not None and found[unit].p_equivalent == pytest.approx(by_hand.p_equivalent)
        assert found[unit].estimate.mean < 0 and found[unit].verdict in ("equivalent", "worse")
    assert found[1].p_equivalent == pytest.approx(found[1000].p_equivalent, rel=1e-3, abs=1e-12)
    assert found[1].verdict == found[1000].verdict


def test_labels_that_are_markup_stay_words() -> None:
    from lightning_lora.reports.ablation import Report
    from lightning_lora.reports.ablation_pages import as_html

    found = [
        replace(
            c,
            reason="<script>alert(1)</script>",
            answers={"val": replace(c.answers["val"], label_names=["<b>", "</table>"])},
        )
        for c in cells(VAL)
    ]
    page = as_html(Report("<i>", PLAN, "<u>", compare_arms(PLAN, found), found, (0, 0), {}))
    assert page.count("<script>") == 1 and "<i>" not in page and "<u>" not in page and "<b></th" not in page
