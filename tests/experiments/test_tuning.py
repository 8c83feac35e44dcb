"""``fit --budget``: the default first, the best on validation kept, the time kept to, and nothing lost on the way."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.commands.fit_budget import tuning_page
from lightning_lora.errors import UserError
from lightning_lora.experiments import tuning, tuning_space
from lightning_lora.experiments.search_space import make_search
from lightning_lora.experiments.tuning import Tuner, budget_seconds
from lightning_lora.experiments.tuning_space import TuningSpace
from lightning_lora.training.length import plan_length


def settings(method: str, rate: float) -> dict[str, Any]:
    data = {"max_length": 256, "train_max_length": None, "truncation": "both"}
    trainer = {"max_epochs": None, "max_time": None, "callbacks": None}
    return {"model": {"method": method, "learning_rate": rate}, "data": data, "trainer": trainer}


DIMENSIONS = {
    "learning_rate_factor": tuning_space.RATE_FACTORS,
    "model.method": ["lora", "full"],
    "data.max_length": [128, 256],
    "epochs_factor": [1, 2, 4],
}
DEFAULT = {"learning_rate_factor": 1.0, "model.method": "lora", "data.max_length": 256, "epochs_factor": 1}
SPACE = TuningSpace(
    {"lora": settings("lora", 5e-4), "full": settings("full", 5e-5)}, DIMENSIONS, DEFAULT, plan_length(30, 200), {}
)


class Lab:
    """Trials that are computed instead of trained, on a clock of its own.

    Args:
        monkeypatch: Puts them in place.
        seconds: Of a trial of the default's length.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float = 10) -> None:
        self.clock = 0.0
        self.seconds = seconds
        #: Settings of each trial that was started, in order.
        self.started: list[dict[str, Any]] = []
        #: Called with a trial's number and settings; gives what its record says.
        self.outcome = lambda number, settings: finished(0.5)
        monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: self.clock))
        monkeypatch.setattr(tuning, "run_child", self.run_child)

    def run_child(self, commands: list[list[str]], output: Path) -> int:
        (words,) = commands
        if words[1] == "--resume":
            place = Path(words[2])
            config = yaml.safe_load((place / "config.yaml").read_text())
        else:
            config = yaml.safe_load(Path(words[2]).read_text())
            place = Path(words[4]) / words[6]
            (place / "checkpoints").mkdir(parents=True)
            (place / "config.yaml").write_text(yaml.safe_dump(config))
        self.started.append(config)
        record = self.outcome(int(place.name), config)
        took = self.seconds * (config["trainer"]["max_epochs"] or 10) / 10
        if (limit := config["trainer"]["max_time"]) is not None and took > limit_s(limit):
            took, record["stopped_by"] = limit_s(limit), "the time limit of some seconds"
        self.clock += took
        record = {"format": 1, "costs": {"fit_s": took}, "wall_s": took, **record}
        (place / "run.json").write_text(json.dumps(record))
        for name in ("best", "last"):
            (place / "checkpoints" / f"{name}.ckpt").write_text(place.name)
        output.write_text("")
        return 0

    def tune(self, budget_s: float = 100, folder: str = "run", space: TuningSpace = SPACE, seed: int = 1) -> dict:
        """Search in ``folder``, and return what its record says of it."""
        Tuner(space, Path(folder), budget_s, seed, "the command", tuning_page, self.clock).run()
        return json.loads((Path(folder) / "run.json").read_text())["tuning"]


def finished(value: float, loss: float = 1.0) -> dict[str, Any]:
    metrics = {"val/f1_macro": value, "val/accuracy": value, "val/loss": loss}
    return {"status": "finished", "best": {"value": value, "metrics": metrics}}


def limit_s(limit: str) -> int:
    days, hours, minutes, seconds = map(int, limit.split(":"))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_a_budget_is_a_number_with_a_unit(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["5", "m", "0m", "-1h", "5 min", "1d", "nan", ""])
def test_any_other_budget_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget: a time such as 90s, 5m or 1\.5h is needed, got"):
        budget_seconds(text)


def test_the_default_comes_first_and_then_one_change_of_the_best_so_far(lab: Lab) -> None:
    lab.outcome = lambda number, config: finished(0.9 if config["model"]["learning_rate"] == 1e-3 else 0.5)
    found = lab.tune(55)
    assert lab.started[0] == SPACE.settings(DEFAULT) == SPACE.by_method["lora"]
    changes = [trial["settings"] for trial in found["trials"]]
    assert changes == [
        {},
        {"model.learning_rate": 1e-3},
        {"model.method": "full", "model.learning_rate": 1e-4},  # twice its own default, as twice was better
        {"model.learning_rate": 2.5e-4},
        {"model.learning_rate": 1e-3, "data.max_length": 128},
    ]
    assert found["kept"] == 1


def test_then_optuna_proposes_and_never_what_was_tried(lab: Lab) -> None:
    found = lab.tune(400)["trials"]
    assert len(found) > 15
    assert len({json.dumps(trial["settings"]) for trial in found}) == len(found)
    space = make_search({"space": DIMENSIONS}, []).space
    rates = [trial["settings"].get("model.learning_rate", 5e-4) for trial in found[6:]]
    assert all(1.2e-5 <= rate <= 2e-3 for rate in rates) and len(set(rates)) > 5
    assert space["learning_rate_factor"].log
    again = lab.tune(400, "again")["trials"]
    other = lab.tune(400, "other", seed=2)["trials"]
    assert [trial["settings"] for trial in again] == [trial["settings"] for trial in found]
    assert [trial["settings"] for trial in other] != [trial["settings"] for trial in found]


def test_a_search_ends_when_all_was_tried(lab: Lab) -> None:
    choices = {"model.method": ["lora", "full"], "data.max_length": [128, 256]}
    default = {"model.method": "lora", "data.max_length": 256}
    found = lab.tune(1000, space=TuningSpace(SPACE.by_method, choices, default, None, {}))["trials"]
    assert len({json.dumps(trial["settings"]) for trial in found}) == len(found) == 4


def test_more_epochs_are_validated_and_stopped_like_the_default(lab: Lab) -> None:
    lab.tune(400)
    for config in (each["trainer"] for each in lab.started if each["trainer"]["max_epochs"] is not None):
        times = config["max_epochs"] / SPACE.length.epochs
        assert times in (2, 4) and config["check_val_every_n_epoch"] == times * SPACE.length.check_every
        (stopping,) = config["callbacks"]
        assert stopping["init_args"]["patience"] == SPACE.length.patience


def test_the_best_is_kept_of_equal_ones_the_one_with_the_lower_loss(lab: Lab) -> None:
    lab.outcome = lambda number, config: finished([0.5, 0.8, 0.8, 0.8][number], [0.1, 0.5, 0.4, 0.4][number])
    assert lab.tune(44)["kept"] == 2
    assert (Path("run") / "checkpoints" / "best.ckpt").read_text() == "002"
    assert not [*Path("run").glob("trials/*/checkpoints")]  # of the others the weights are not needed


@pytest.mark.parametrize("budget_s", [15, 37, 100, 333])
def test_the_time_is_kept_to_and_only_started_on_what_fits_into_it(lab: Lab, budget_s: float) -> None:
    found = lab.tune(budget_s)
    assert found["used_s"] == lab.clock <= budget_s
    assert budget_s - lab.clock < lab.seconds
    for trial, config in zip(found["trials"], lab.started, strict=True):
        assert (config["trainer"]["max_time"] is None) == (trial["number"] == 0)


def test_a_trial_that_takes_longer_than_thought_is_stopped_by_the_time_left(lab: Lab, capsys) -> None:
    def slower(number: int, config: dict) -> dict:
        lab.seconds = 10 + 30 * number
        return finished(0.5 + number / 10)

    lab.outcome = slower
    lab.tune(45)
    record = json.loads(Path("run/run.json").read_text())
    assert record["tuning"]["trials"][1]["stopped_by_time"] and record["tuning"]["used_s"] <= 45
    assert "stopped by the time left" in capsys.readouterr().out
    # The limit was of consequence, and stays in the settings of the run.
    assert yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["max_time"] == "00:00:00:35"


def test_a_default_that_takes_longer_than_the_budget_ends_and_is_kept(lab: Lab, capsys) -> None:
    found = lab.tune(5)
    assert found["kept"] == 0 and len(found["trials"]) == 1
    assert "the default alone took 10.0 s, more than the budget of 5.0 s" in capsys.readouterr().out


def test_a_failed_trial_counts_and_the_search_goes_on(lab: Lab, capsys) -> None:
    def one_fails(number: int, config: dict) -> dict:
        return {"status": "failed", "error": "out of memory with 16 texts a batch"} if number == 1 else finished(0.5)

    lab.outcome = one_fails
    found = lab.tune(45)
    assert [trial["status"] for trial in found["trials"]] == ["finished", "failed", "finished", "finished"]
    assert found["trials"][1]["reason"] == "out of memory with 16 texts a batch"
    assert "failed: out of memory with 16 texts a batch; 10.0 s; 25.0 s left" in capsys.readouterr().out
    assert "failed: out of memory" in Path("run/tuning.md").read_text()


def test_a_search_in_which_all_fails_ends_with_the_reason(lab: Lab) -> None:
    lab.outcome = lambda number, config: {"status": "failed", "error": "the loss is not finite"}
    with pytest.raises(UserError, match="none of 5 trials finished: the loss is not finite"):
        lab.tune(1000)
    assert not Path("run/config.yaml").exists()


class Killed(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("number", [0, 2, 7])
@pytest.mark.parametrize("trained", [False, True])
def test_the_same_command_goes_on_with_the_time_that_is_left(lab: Lab, number: int, trained: bool) -> None:
    undisturbed = lab.tune(120, "undisturbed")
    run_child, killed = lab.run_child, []

    def kill(commands: list[list[str]], output: Path) -> int:
        if len(lab.started) == number and not killed:
            killed.append(True)
            if trained:  # the trial has ended, and nobody has noticed
                run_child(commands, output)
            raise Killed
        return run_child(commands, output)

    lab.started.clear()
    tuning.run_child = kill
    with pytest.raises(Killed):
        lab.tune(120, "killed")
    assert not Path("killed/config.yaml").exists()
    assert lab.tune(120, "killed") == undisturbed
    assert len(lab.started) == len(undisturbed["trials"])  # none is trained twice


def test_the_time_of_a_killed_process_is_counted_as_its_trial_knows_it(lab: Lab) -> None:
    """Also where the process could not write down how long it had worked."""
    lab.outcome = lambda number, config: finished(0.5)
    lab.tune(15, "one")
    state = {"format": 1, "command": "c", "used_s": 0.0, "kept": None}
    state["identity"] = Tuner(SPACE, Path("two"), 15, 1, "c", tuning_page, 0.0).identity
    entry = {"number": 0, "settings": {}, "point": DEFAULT, "status": "running", "started_s": 0.0}
    Path("two").mkdir()
    Path("one/trials").rename("two/trials")
    Path("two/tuning.json").write_text(json.dumps({**state, "trials": [entry]}))
    assert lab.tune(15, "two")["trials"][0]["seconds"] == 10


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_kill_while_the_best_is_moved_up_loses_nothing(lab: Lab, parts: int, monkeypatch) -> None:
    undisturbed = lab.tune(15, "undisturbed")
    write, left = tuning.write_text, [parts]

    def killed(path: Path, text: str) -> None:
        if path.name in ("tuning.md", "config.yaml") or '"kept": 0' in text:
            if not left[0]:
                raise Killed
            left[0] -= 1
        write(path, text)

    monkeypatch.setattr(tuning, "write_text", killed)
    with pytest.raises(Killed):
        lab.tune(15, "killed")
    monkeypatch.setattr(tuning, "write_text", write)
    assert lab.tune(15, "killed") == undisturbed
    assert Path("killed/checkpoints/best.ckpt").read_text() == "000"
    assert not Path("killed/tuning.json").exists()


def test_a_search_with_other_settings_is_refused(lab: Lab) -> None:
    lab.outcome = lambda number, config: {"status": "failed", "error": "e"}
    with pytest.raises(UserError):
        lab.tune(100)
    other = TuningSpace({"lora": settings("lora", 1e-3)}, DIMENSIONS, DEFAULT, SPACE.length, {})
    with pytest.raises(UserError, match=r"is a search with other settings, .* the command"):
        lab.tune(100, space=other)
    with pytest.raises(UserError, match="with other data"):
        lab.tune(100, space=TuningSpace(SPACE.by_method, DIMENSIONS, DEFAULT, SPACE.length, {"val": "x"}))


def test_resume_says_to_give_the_command_again(lab: Lab, capsys) -> None:
    lab.outcome = lambda number, config: {"status": "failed", "error": "e"}
    with pytest.raises(UserError):
        lab.tune(100, "logs/run")
    assert main(["fit", "--resume", "logs/run"]) == 2
    assert capsys.readouterr().err.strip().endswith("has not ended; give its command again: the command")
