"""A search space of an ablation: what it may say, what Optuna makes of it, and that nothing of it is lost."""

import csv
import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.experiments.plan import Cell, make_plan
from lightning_lora.experiments.search_space import at_edge
from lightning_lora.experiments.searcher import Searcher, open_journal, read_found
from tests.conftest import make_rows, write_csv
from tests.faults.processes import Run

CONTENT = {
    "question": "Does rank matter when each has its own learning rate?",
    "axes": {"rank": {"model.adapter.rank": [2, 8]}},
    "search": {
        "space": {
            "model.learning_rate": {
                "rank": {2: {"low": 1e-3, "high": 1e-1, "log": True}, 8: {"low": 1e-4, "high": 1e-2}}
            },
            "data.batch_size": {"low": 4, "high": 16, "step": 4},
            "model.schedule": ["linear", "constant"],
        },
        "trials": 2,
    },
    "seeds": [1, 2],
}  # fmt: skip


def plan(**change: object):
    return make_plan({**CONTENT, **change}, Path("a.yaml"))


def test_each_arm_has_its_own_space() -> None:
    spaces = [plan().search.for_arm(cell.values) for cell in plan().arms.values()]
    assert spaces[0]["model.learning_rate"] == FloatDistribution(1e-3, 1e-1, log=True)
    assert spaces[1]["model.learning_rate"] == FloatDistribution(1e-4, 1e-2)
    assert spaces[0]["data.batch_size"] == IntDistribution(4, 16, step=4)
    assert spaces[1]["model.schedule"] == CategoricalDistribution(["linear", "constant"])


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({}, "a space is needed"),
        ({"space": {}}, "a space is needed"),
        ({"space": {"a": [1]}, "x": 1}, "unknown key 'x'"),
        ({"space": {"a": [1]}, "sampler": "grid"}, "'grid' is none of tpe"),
        ({"space": {"a": [1]}, "trials": 0}, "at least 1"),
        ({"space": {"a": {"low": 1}}}, "a list of choices, or a range"),
        ({"space": {"a": {"low": 2, "high": 1}}}, "low <= high"),
        ({"space": {"a": {"low": 0, "high": 1, "log": True}}}, "low >= 1"),
        ({"space": {"a": {"low": 1, "high": "x"}}}, "a range of numbers"),
        ({"space": {"model.adapter.rank": [1]}}, "is varied by an axis"),
        ({"space": {"a": {"rank": {2: [1]}}}}, "no value for rank 8"),
    ],
)
def test_what_does_not_fit_together_is_one_line(search: dict, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        plan(search=search)
    assert "\n" not in str(raised.value)


def test_a_value_at_an_end_of_its_range_is_known_as_such() -> None:
    log, plain = FloatDistribution(1e-4, 1e-2, log=True), IntDistribution(0, 100)
    assert at_edge(log, 1.1e-4) and at_edge(log, 9e-3) and not at_edge(log, 1e-3)
    assert at_edge(plain, 4) and at_edge(plain, 96) and not at_edge(plain, 6)
    listed = CategoricalDistribution([8, 2, 32])
    assert at_edge(listed, 2) and at_edge(listed, 32) and not at_edge(listed, 8)
    assert not at_edge(CategoricalDistribution(["a", "b", "c"]), "a")


def test_the_cells_are_those_of_the_best_trial_with_every_seed(tmp_path: Path) -> None:
    first, second = plan().arms
    study = optuna.create_study(study_name="first", storage=open_journal(tmp_path / "optuna.log"), direction="maximize")
    study.set_user_attr("arm", first)
    best, failed = (study.ask(plan().search.for_arm(plan().arms[first].values)) for _ in range(2))
    study.tell(best, 0.5)
    study.tell(failed, state=optuna.trial.TrialState.FAIL)
    found = read_found(plan(), tmp_path)
    assert found[first].best.number == 0 and found[first].best.params == best.params
    cells = plan().with_found(found).cells
    assert [(c.variant, c.seed) for c in cells] == [("0", 1), ("none", 1), ("0", 2), ("none", 2)]
    assert cells[0].change == {"model.adapter.rank": 2, **best.params}
    assert cells[1].arm == second and "model.learning_rate" not in cells[1].change
    # Nothing is taken of a search over other settings.
    narrower = plan(search={"space": {"model.learning_rate": {"low": 1e-3, "high": 1e-2}}, "trials": 2})
    assert not narrower.with_found(read_found(narrower, tmp_path)).cells[0].searched
    # One trial more: the search has not ended, and nothing is the best yet.
    more = plan(search={**CONTENT["search"], "trials": 3})
    assert read_found(more, tmp_path)[first].best is None
    (tmp_path / "optuna.log").write_text("[]\n{")
    with pytest.raises(UserError, match="not a readable journal"):
        read_found(plan(), tmp_path)


@pytest.fixture(scope="module")
def place(make_base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_csv(folder / "rows.csv", make_rows(120))
    base = {
        "model": {"base_model": str(make_base("bert"))},
        "data": {"source": str(folder / "rows.csv"), "max_length": 24, "cache_dir": str(folder / "cache")},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    (folder / "search.yaml").write_text(yaml.safe_dump({**CONTENT, "base": "base.yaml"}))
    return folder


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    assert main(["ablate", "--config", str(place / "search.yaml"), "--logs_dir", str(place / "logs")]) == 0
    return place / "logs" / "ablation-search"


#: Columns that are never the same twice.
TIMES = ("training s", "tokens/s", "peak memory MiB")


def studies(folder: Path) -> list[optuna.Study]:
    storage = open_journal(folder / "optuna.log")
    return [optuna.load_study(study_name=each.study_name, storage=storage) for each in storage.get_all_studies()]


def tried(folder: Path) -> list[list[tuple]]:
    return [[(t.params, t.state, t.value) for t in study.trials] for study in studies(folder)]


def test_what_is_compared_is_what_optuna_calls_best(done: Path) -> None:
    found = read_found(plan(), done)
    assert len(found) == len(studies(done)) == 2
    for one, study in zip(found.values(), studies(done), strict=True):
        assert [t.state for t in study.trials] == [optuna.trial.TrialState.COMPLETE] * 2
        assert one.best.number == study.best_trial.number
        assert one.best.params["model.learning_rate"] == study.best_params["model.learning_rate"]
        assert one.best.params["model.schedule"] == study.best_params["model.schedule"]
    records = {p.parent.name: json.loads(p.read_text()) for p in (done / "cells").glob("*/run.json")}
    assert len(records) == 2 * 2 + 2  # the first seed's are trials
    for rank, one in zip((2, 8), found.values(), strict=True):
        for trial in one.trials:
            record = records[f"rank-{rank}__trial-{trial.number}__seed-1"]
            assert record["evaluations"]["val"]["after"]["accuracy"] == trial.value
            assert record["config"]["model"]["learning_rate"] == trial.params["model.learning_rate"]
            assert record["config"]["data"]["batch_size"] in (4, 8, 12, 16)
        tested = [
            name for name, record in records.items() if f"rank-{rank}_" in name and "test" in record["evaluations"]
        ]
        assert sorted(tested) == [f"rank-{rank}__trial-{one.best.number}__seed-{seed}" for seed in (1, 2)]


def main_table(folder: Path, without: Sequence[str] = ()) -> list[dict[str, str]]:
    with (folder / "report.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def test_the_report_shows_what_was_tried(done: Path) -> None:
    said = (done / "report.md").read_text()
    assert "2 trials (Optuna, tpe, seed 0)" in said and "## What the search has tried" in said
    assert [row["settings tried"] for row in main_table(done)] == ["2", "2"]


@pytest.mark.faults
def test_killed_workers_leave_the_search_as_it_would_have_been(place: Path, done: Path, tmp_path: Path) -> None:
    """Two at once, one killed in a trial: each trial is done once, with the settings of the undisturbed search."""
    words = ["ablate", "--config", str(place / "search.yaml"), "--logs_dir", str(tmp_path)]
    workers = [Run(words, tmp_path / f"{number}.txt") for number in range(2)]
    here = tmp_path / "ablation-search"
    workers[0].wait_for(lambda: len(list((here / "cells").glob("*trial-1__seed-1"))) > 0, 300)
    workers[0].signal(signal.SIGKILL)
    workers[0].wait()
    assert workers[1].wait(300) == 0, workers[1].text()
    assert tried(here) == tried(done)
    assert main_table(here, TIMES) == main_table(done, TIMES)
    again = Run(words, tmp_path / "again.txt")
    assert again.wait(100) == 0 and "trial 1 of" not in again.text()
    assert tried(here) == tried(done)


@pytest.mark.faults
def test_workers_share_the_trials_also_after_sigterm(place: Path, done: Path, tmp_path: Path) -> None:
    words = ["ablate", "--config", str(place / "search.yaml"), "--logs_dir", str(tmp_path), "--workers", "2"]
    here = tmp_path / "ablation-search"
    run = Run(words, tmp_path / "stopped.txt")
    run.wait_for(lambda: len(list((here / "cells").glob("*/config.yaml"))) > 1, 300)
    run.signal(signal.SIGTERM)
    assert run.wait(60) == 143, run.text()
    again = Run(words, tmp_path / "again.txt")
    assert again.wait(300) == 0, again.text()
    assert tried(here) == tried(done)
    assert main_table(here, TIMES) == main_table(done, TIMES)


class Stopped(Exception):
    """Stands for a kill between two trials."""


def search(folder: Path, loss, stop_after: int | None = None, **how: object) -> dict:
    """Searches with trials that are computed instead of trained: ``loss`` of a learning rate."""
    two = plan(metric="loss", search={**SPACE, **how}, seeds=[1])
    started = 0

    def train(cell: Cell) -> None:
        nonlocal started
        started += 1
        if stop_after is not None and started > stop_after:
            raise Stopped
        value = loss(cell.change["model.learning_rate"])
        place = folder / "cells" / cell.name
        place.mkdir(parents=True, exist_ok=True)
        record = {"format": 1, "status": "finished", "evaluations": {"val": {"after": {"loss": value}}}}
        (place / "run.json").write_text(json.dumps(record))

    folder.mkdir(exist_ok=True)
    return Searcher(two, folder, train, lambda arm: "the same code").run()


SPACE = {"space": {"model.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}}, "trials": 24}


def bowl(rate: float) -> float:
    """A loss that is smallest at 1e-3."""
    return (math.log10(rate) + 3) ** 2


@pytest.mark.parametrize("stop_after", [4, 15])
def test_a_search_goes_on_with_what_it_would_have_proposed(tmp_path: Path, stop_after: int) -> None:
    """Also behind the ten trials that TPE draws at random: what it proposes then depends on all that came before."""
    search(tmp_path / "undisturbed", bowl)
    with pytest.raises(Stopped):
        search(tmp_path / "stopped", bowl, stop_after)
    search(tmp_path / "stopped", bowl)
    assert tried(tmp_path / "stopped") == tried(tmp_path / "undisturbed")


def test_tpe_looks_where_it_was_good_and_random_does_not(tmp_path: Path) -> None:
    values = {}
    for sampler in ("tpe", "random"):
        for seed in range(4):
            search(tmp_path / f"{sampler}{seed}", bowl, sampler=sampler, seed=seed)
        found = [[value for *_, value in tried(tmp_path / f"{sampler}{seed}")[0]] for seed in range(4)]
        values[sampler] = np.array(found)
    assert not np.array_equal(values["tpe"], values["random"])
    assert values["tpe"][:, 10:].mean() < values["tpe"][:, :10].mean() / 2
    assert values["tpe"][:, 10:].mean() < values["random"][:, 10:].mean() / 2


def test_without_optuna_the_message_says_how_to_get_it(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["ablate", "--config", str(place / "search.yaml")]) == 2
    assert "pip install -c constraints.txt -e '.[search]'" in capsys.readouterr().err


def test_a_list_is_a_choice_like_any_other(tmp_path: Path) -> None:
    choices = [["query"], ["query", "value"], None, True]
    one = plan(search={"space": {"model.adapter.target_modules": choices}, "trials": 1})
    study = optuna.create_study(study_name="s", storage=open_journal(tmp_path / "optuna.log"))
    study.set_user_attr("arm", "rank 2")
    for choice in choices:
        study.enqueue_trial({"model.adapter.target_modules": choice})
        study.tell(study.ask(one.search.for_arm(one.arms["rank 2"].values)), 0.5)
    trials = read_found(one, tmp_path)["rank 2"].trials
    assert [trial.params["model.adapter.target_modules"] for trial in trials] == choices
