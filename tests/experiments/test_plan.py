from pathlib import Path

import pytest
import yaml

from lightning_lora.errors import UserError
from lightning_lora.experiments.plan import make_plan
from lightning_lora.experiments.resolving import split_sets, with_arms

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "ablation").glob("*.yaml"))
GOOD = {
    "question": "Does rank matter?",
    "axes": {"rank": {"model.adapter.rank": [2, 8], "model.adapter.alpha": [4, 16]}},
    "baseline": {"rank": 8},
    "seeds": [1, 2],
}


def plan(in_small: bool = False, **change):
    return make_plan({**GOOD, **change}, Path("a.yaml"), in_small)


def test_settings_of_an_axis_change_together() -> None:
    found = plan()
    assert [(c.arm, c.seed) for c in found.cells] == [("rank 2", 1), ("rank 8", 1), ("rank 2", 2), ("rank 8", 2)]
    assert found.cells[0].change == {"model.adapter.rank": 2, "model.adapter.alpha": 4}
    assert found.cells[0].name == "rank-2__seed-1"


def test_axes_are_crossed_and_chosen_ones_are_variants_of_an_arm() -> None:
    rate = {
        "names": ["low", "high"],
        "chosen": True,
        "model.learning_rate": {"rank": {2: [1e-4, 1e-3], 8: [1e-5, 2e-5]}},
    }
    found = plan(axes={**GOOD["axes"], "rate": rate})
    assert (len(found.cells), len(found.arms), found.tried) == (8, 2, 2)
    rates = {(c.arm, c.variant): c.change["model.learning_rate"] for c in found.cells}
    assert rates == {
        ("rank 2", "low"): 1e-4, ("rank 2", "high"): 1e-3, ("rank 8", "low"): 1e-5, ("rank 8", "high"): 2e-5
    }  # fmt: skip


def test_the_small_size_has_fewer_values_seeds_and_rows() -> None:
    small = {"seeds": [7], "settings": {"data.train_rows": 10}}
    found = plan(True, small=small)
    assert {c.seed for c in found.cells} == {7} and found.cells[0].change["data.train_rows"] == 10


def test_published_figures_are_of_arms_also_of_those_that_the_small_size_leaves_out() -> None:
    small = {"axes": {"rank": ["8"]}, "seeds": [1]}
    other = {"arms": {}, "axes": {**GOOD["axes"], "bias": {"model.adapter.bias": ["none", "all"]}}}
    published = {"published": {"rank 2, bias all": 0.9}, "published_in": "A paper"}
    for in_small in (False, True):
        found = plan(in_small, **other, **published, small=small).published
        assert (found.figures, found.source) == ({"rank 2, bias all": 0.9}, "A paper")
        assert (found.shown("rank 2, bias all"), found.shown("rank 8, bias all")) == ("0.900", "-")


def test_folds_are_crossed_with_seeds_and_arms() -> None:
    found = plan(folds=3, small={"folds": 2})
    assert [(c.seed, c.fold, c.values["rank"]) for c in found.cells[:4]] == [
        (1, 1, "2"),
        (1, 1, "8"),
        (1, 2, "2"),
        (1, 2, "8"),
    ]
    assert found.cells[2].change["data.fold"] == [2, 3] and found.cells[2].name == "rank-2__seed-1__fold-2"
    assert len(found.cells) == 12
    assert plan(True, folds=3, small={"folds": 2}).folds == 2
    assert "data.fold" not in plan().cells[0].change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"question": ""}, "say in a sentence"),
        ({"axis": {}}, "unknown key 'axis'"),
        ({"axes": {}}, "at least one axis"),
        ({"axes": {"r": {"a": [1, 2], "b": [1]}}}, "as many values each"),
        ({"axes": {"r": {"a": 1}}}, "a list of values each"),
        ({"axes": {"r": {"a": [1, 1]}}}, "a name of its own"),
        ({"axes": {"r": {"a": [1, 2], "chosen": True}}, "baseline": {}}, "nothing is compared"),
        ({"baseline": {"rank": 3}}, "rank 3 is none of 2, 8"),
        ({"baseline": {"x": 3}}, "'x' is no compared axis"),
        ({"seeds": []}, "whole numbers"),
        ({"folds": 1}, "folds: a number from 2 on is needed, got 1"),
        ({"folds": True}, "folds: a number from 2"),
        ({"folds": 3, "settings": {"data.fold": [1, 3]}}, "data.fold: folds say which rows are tested"),
        ({"folds": 3, "axes": {"s": {"data.test_size": [5, 9]}}, "baseline": {}}, "data.test_size: folds say"),
        ({"folds": 3, "search": {"space": {"model.learning_rate": [0.1, 1]}, "trials": 2}}, "search: with folds"),
        ({"seeds": [1, 1]}, "two cells have the same name"),
        ({"seeds": [True]}, "whole numbers"),
        ({"metric": "test_accuracy"}, "is none of accuracy, f1_samples"),
        ({"metric": "spearman"}, "'spearman' is none of"),
        ({"published": 0.9}, "published: a figure for each arm"),
        ({"published": {"4": 0.9}, "published_in": "X"}, "published: there is no arm '4'; there are rank 2, rank 8"),
        ({"published": {"rank 8": "90 %"}, "published_in": "X"}, "published.rank 8: a number is needed, got 90 %"),
        ({"published": {"rank 8": 0.9}}, "published_in: say where"),
        ({"margin": 0}, "between 0 and 1"),
        ({"settings": {"model.adapter.rank": 4}}, "is varied by an axis"),
        ({"axes": {"a": {"data.seed": [1]}, "b": {"data.seed": [2, 3]}}}, "data.seed is varied by a and by b"),
        ({"axes": {"r": {"a": [1, 2], "names": 5}}}, "names: a list of words is needed, got 5"),
        ({"axes": {"r": {"a": [1, 2], "chosen": "false"}}}, "r.chosen: true or false is needed, got false"),
        ({"axes": {"trial": {"data.seed": [1, 2]}}}, "axes.trial: the name of an axis of every ablation"),
        ({"settings": {"model": 5}}, "model and model.adapter.* are both given"),
        (
            {"axes": {"r": {"m.a": [1, 2]}, "s": {"names": ["x", "y"], "m": [{"a": 1}, {"a": 2}]}}, "baseline": {}},
            "m and m.a are both given",
        ),
        (
            {"axes": {**GOOD["axes"], "b": {"names": ["x"], "chosen": True, "a": {"rank": {"2": [1]}}}}},
            "no value for rank 8",
        ),
    ],
)
def test_what_does_not_fit_together_is_one_line(change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        plan(**change)
    assert "a.yaml" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("what", [{"baseline": "a"}, {"arms": ["a"]}, {"published": [1]}])
def test_some_arms_of_what_describes_none_are_refused_in_one_line(tmp_path: Path, what: dict) -> None:
    (tmp_path / "base.yaml").write_text("{}")
    config = {"question": "?", "base": "base.yaml", "arms": {"a": {"data.seed": 1}}} | what
    with pytest.raises(UserError, match=f"a.yaml: {next(iter(what))}: names with what they mean are needed"):
        with_arms(config, tmp_path / "a.yaml", ["a"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_ablation_is_a_plan(path: Path) -> None:
    whole = yaml.safe_load(path.read_text())
    for small in (False, True):
        contents = split_sets(whole, small).values() if "sets" in whole else [whole]
        for content in (with_arms(each, path)[0] for each in contents):
            if not small:
                assert len(make_plan(content, path).seeds) >= 3
            elif "small" in content:
                assert 2 <= len(make_plan(content, path, small=True).cells) <= 18


def test_every_axis_that_was_promised_is_shipped() -> None:
    axes = "rank alpha dropout target_modules learning_rate method quantization train_rows base_model max_length"
    others = "arms search speed_choices defaults choices long_texts many_classes glue_lora"
    assert {path.stem for path in SHIPPED} == {*axes.split(), *others.split()}
