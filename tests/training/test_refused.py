"""Each of Lightning's callbacks and trainer options works, or is refused in one line with the reason."""

import csv
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch.callbacks
import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.runs.folder import RunFolder
from lightning_lora.training import refused
from tests.conftest import make_rows, shown_settings, write_csv

#: The callbacks that work, with what they need.
WORKING = {
    "DeviceStatsMonitor": {"cpu_stats": True},
    "EarlyStopping": {"monitor": "val/loss"},
    "LearningRateFinder": {"num_training_steps": 20},
    "LearningRateMonitor": {},
    "ModelCheckpoint": {"monitor": "val/f1_macro", "mode": "max"},
    "ModelSummary": {},
    "RichModelSummary": {},
    "RichProgressBar": {},
    "TQDMProgressBar": {},
    "Timer": {"duration": "00:00:10:00"},
}


Fit = Callable[..., int]


@pytest.fixture(scope="module")
def plain(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The metrics of a run without any of them."""
    place = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert trained(place, tiny_base, {}) == 0
    return RunFolder(place / "logs" / "run").read()["metrics"]


@pytest.fixture
def fit(tmp_path: Path, tiny_base: Path) -> Fit:
    return lambda trainer, *words: trained(tmp_path, tiny_base, trainer, *words)


def trained(place: Path, base: Path, trainer: dict, *words: str) -> int:
    settings = {"max_epochs": 3, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    config = {
        "model": {"base_model": str(base), "learning_rate": 5e-3},
        "data": {"source": str(write_csv(place / "rows.csv", make_rows(80))), "max_length": 24, "batch_size": 8},
        "trainer": settings | {"log_every_n_steps": 1} | trainer,
    }
    (place / "a.yaml").write_text(yaml.safe_dump(config))
    return main(["fit", "--config", "a.yaml", "--name", "run", *words])


def named(name: str, **arguments: object) -> dict:
    return {"callbacks": [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}]}


def test_every_callback_of_lightning_is_known() -> None:
    assert set(lightning.pytorch.callbacks.__all__) == set(WORKING) | set(refused.CALLBACKS)


@pytest.mark.parametrize("name", refused.CALLBACKS)
def test_a_callback_that_cannot_work_is_refused_with_its_reason(fit: Fit, name: str, capsys) -> None:
    assert fit(named(name)) == 2
    assert capsys.readouterr().err == f"error: trainer.callbacks: {name}: {refused.CALLBACKS[name]}\n"
    assert not Path("logs").exists()
    where = getattr(lightning.pytorch.callbacks, name).__module__
    for path in (name, f"{where}.{name}"):  # by its short name and by where it is defined too
        assert main(["fit", "--config", "a.yaml", "--trainer.callbacks", path]) == 2
        assert capsys.readouterr().err == f"error: trainer.callbacks: {name}: {refused.CALLBACKS[name]}\n"


@pytest.mark.parametrize("name", WORKING)
def test_a_callback_that_works_trains_as_without_it(fit: Fit, plain: dict, name: str, capsys) -> None:
    """Beside what it is there for it changes nothing, and it is in the config that is kept."""
    trainer = named(name, **WORKING[name]) | {"enable_progress_bar": "ProgressBar" in name}
    assert fit(trainer) == 0, capsys.readouterr().err
    kept = yaml.safe_load(Path("logs/run/config.yaml").read_text())["trainer"]["callbacks"]
    assert kept[0]["class_path"].endswith(f".{name}")
    # LearningRateMonitor shows the rate of each group of weights in place of one curve.
    found = RunFolder(Path("logs/run")).read()["metrics"]
    metrics, plain = ({k: v for k, v in each.items() if "rate" not in k} for each in (found, plain))
    assert (metrics == plain) == (name != "LearningRateFinder")
    assert Path("logs/run/model_checkpoints").exists() == (name == "ModelCheckpoint")
    assert ("Epoch 2" in "".join(capsys.readouterr())) == ("ProgressBar" in name)


def rates(run: str) -> dict[int, list[float]]:
    """The learning rate of each group of weights, by step."""
    with Path(f"logs/{run}/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        int(row["step"]): [float(row[key]) for key in sorted(row) if key.startswith("learning_rate")]
        for row in rows
        if row["learning_rate"]
    }


def test_the_rate_that_is_found_is_the_peak_of_the_whole_schedule(fit: Fit, capsys) -> None:
    """Against the closed form of the schedule, and after a resume."""
    words = ["--model.method", "lora", "--model.warmup_ratio", "0.1"]
    assert fit(named("LearningRateFinder", num_training_steps=20, max_lr=0.02), *words) == 0
    record, config = RunFolder(Path("logs/run")).read(), yaml.safe_load(Path("logs/run/config.yaml").read_text())
    peak = config["model"]["learning_rate"]
    assert f"learning rate found by LearningRateFinder: {peak:g}" in capsys.readouterr().out
    assert peak == record["model"]["learning_rate"] == record["config"]["model"]["learning_rate"] != 5e-3
    hyperparameters = shown_settings(Path("logs/run"))
    assert hyperparameters["model.learning_rate"] == peak
    steps = record["steps"]
    warm_up, found = round(0.1 * steps), rates("run")
    assert len(found) == steps == 24
    for step, groups in found.items():
        factor = step / warm_up if step < warm_up else (steps - step) / (steps - warm_up)
        for rate in groups:
            assert rate == pytest.approx(peak * factor)
    # The same as a run that was given this rate.
    given = [*words, "--name", "given", "--model.learning_rate", repr(peak)]
    assert fit({}, *given) == 0
    assert RunFolder(Path("logs/given")).read()["metrics"] == record["metrics"]
    # A run that is resumed keeps it.
    assert main(["fit", "--resume", "logs/run", "--trainer.max_epochs", "4"]) == 0
    assert "found by" not in capsys.readouterr().out.split("continued")[1]
    assert rates("run")[24][0] == pytest.approx(peak * 8 / (32 - round(0.1 * 32)))


def test_a_search_over_too_few_steps_is_refused_and_its_remedy_works(fit: Fit, capsys) -> None:
    assert fit(named("LearningRateFinder")) == 2
    assert "give a num_training_steps from 20 to 24" in capsys.readouterr().err
    assert fit(named("LearningRateFinder", num_training_steps=24)) == 0


@pytest.mark.parametrize(
    ("trainer", "said"),
    [
        (named("EarlyStopping", monitor="val/los"), "EarlyStopping: no metric 'val/los'; there are train/loss,"),
        (named("EarlyStopping", monitor="val/los", strict=False), "EarlyStopping: no metric 'val/los'"),
        (named("ModelCheckpoint", monitor="val/los"), "ModelCheckpoint: no metric 'val/los'"),
        (named("EarlyStopping", monitor="val/loss") | {"limit_val_batches": 0}, "no metric 'val/loss'"),
        (named("EarlyStopping", monitor="val/accuracy"), "give mode: max"),
        (named("EarlyStopping", monitor="epoch"), "EarlyStopping: no metric 'epoch'"),
        (named("EarlyStopping", monitor="train/loss") | {"val_check_interval": 0.5}, "check_on_train_epoch_end: true"),
        (named("EarlyStopping", monitor="val/loss", check_on_train_epoch_end=True) | {"check_val_every_n_epoch": 2},
         "EarlyStopping: not every epoch has a val/loss; give check_on_train_epoch_end: false"),
        (named("ModelCheckpoint", monitor="train/loss") | {"check_val_every_n_epoch": 2},
         "ModelCheckpoint: train/loss is of a whole epoch; give save_on_train_epoch_end: true"),
        (named("LearningRateFinder", attr_name="weight_decay"), "'weight_decay' is no learning rate"),
        (named("LearningRateFinder", min_lr=1.0, max_lr=0.1), "0 < min_lr < max_lr is needed, got 1 and 0.1"),
        (named("EarlyStopping", monitor="val/loss", mode="up"), "`mode` can be min, max, got up"),
        (named("ModelCheckpoint", dirpath="logs/run/checkpoints"), "holds the run's own"),
        ({"accelerator": "gpu"}, "No supported gpu backend found!; --trainer.accelerator auto takes what"),
        ({"accelerator": "tpu"}, "accelerator tpu: Requirement 'torch_xla"),
        ({"precision": "16-mixed"}, "give --trainer.precision bf16-mixed"),
        ({"max_epochs": -1, "max_time": "00:00:00:01"}, "give trainer.max_steps"),
        ({"max_epochs": 0}, "trainer.max_epochs: a number of at least 1"),
        ({"max_steps": 0}, "trainer.max_steps: a number of at least 1"),
        ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches: a number of at least 1"),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 3}, "3 batches are no whole number of steps of 2"),
        ({"check_val_every_n_epoch": 0}, "trainer.check_val_every_n_epoch: a number of at least 1"),
        ({"val_check_interval": 99}, "trainer: `val_check_interval` (99) must be less"),
        ({"val_check_interval": "00:00:00:05"}, "trainer.val_check_interval: a time is refused"),
        ({"gradient_clip_val": -1.0}, "trainer.gradient_clip_val: a number of at least 0"),
        ({"gradient_clip_val": None, "gradient_clip_algorithm": "value"}, "nothing is clipped"),
        ({"gradient_clip_algorithm": "x"}, "trainer: `gradient_clip_algorithm` x is invalid"),
        ({"limit_train_batches": 0}, "0 leaves nothing to train on"),
        ({"limit_val_batches": 0.5}, "so the first ones are no sample of the rows; set data.val_size"),
        ({"limit_test_batches": 3}, "set data.test_rows"),
        ({"precision": "bf16-true"}, "small updates are lost; use bf16-mixed"),
        ({"precision": "16-true"}, "use 16-mixed"),
        ({"limit_train_batches": 2.5}, "trainer: You have passed invalid value 2.5 for limit_train_batches"),
        ({"max_time": "5 minutes"}, "Expected a string in the format DD:HH:MM:SS"),
        ({"profiler": "x"}, "trainer: When passing string value for the `profiler`"),
        ({"plugins": [{"class_path": "lightning.pytorch.plugins.MixedPrecision"}]}, "config names 'lightning.py"),
        ({"plugins": ["SLURMEnvironment"]}, "SLURMEnvironment', none of Lightning's callbacks"),
        *((({name: not value if isinstance(value, bool) else 2}), reason) for name, (value, reason) in
          refused.OPTIONS.items() if name not in ("model_registry", "default_root_dir")),
        ({"default_root_dir": "x"}, "a run writes into its own folder only"),
    ],
)  # fmt: skip
def test_what_would_be_ignored_or_fail_late_is_refused(fit: Fit, trainer: dict, said: str, capsys) -> None:
    assert fit(trainer) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and said in lines[-1]
    assert not Path("logs/run").exists()  # and the name is free


@pytest.mark.parametrize(
    "trainer",
    [
        {"num_sanity_val_steps": -1},
        {"deterministic": True},
        {"benchmark": True},
        {"inference_mode": False},
        {"detect_anomaly": True},
        {"profiler": "simple"},
        {"enable_model_summary": True},
        {"logger": False},
        {"max_time": "00:01:00:00", "min_epochs": 1, "min_steps": 1},
    ],
)
def test_an_option_that_is_not_about_the_result_leaves_it_as_it_is(fit: Fit, plain: dict, trainer: dict) -> None:
    assert fit(trainer) == 0
    metrics = RunFolder(Path("logs/run")).read()["metrics"]
    assert metrics == {name: value for name, value in plain.items() if name in metrics} and "val/loss" in metrics


def test_training_without_a_number_of_steps_ends_by_time_with_a_constant_rate(fit: Fit) -> None:
    """The remedy that the refusal names."""
    words = ["--model.schedule", "constant", "--model.warmup_ratio", "0"]
    assert fit({"max_epochs": -1, "max_time": "00:00:00:01"}, *words) == 0
    assert {rate for groups in rates("run").values() for rate in groups} == {5e-3}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"callbacks": [{"EarlyStopping": {"monitor": "val/loss"}}]}, "{class_path: EarlyStopping, init_args: "),
        ({"callbacks": {"monitor": "val/loss"}}, "name a class: {class_path: EarlyStopping, init_args: "),
        (named("EarlyStopping", monitor="lr-nothing"), "no metric 'lr-nothing'"),
        ({"devices": "two"}, "trainer.devices two, num_nodes 1, accelerator cpu: "),
        ({"max_epochs": -1, "max_time": "00:00:01:00"}, "give trainer.max_steps, or --model.schedule constant"),
    ],
)
def test_wrong_settings_are_one_line_before_training(fit: Fit, settings: dict, said: str, capsys) -> None:
    assert fit(settings) == 2
    error = capsys.readouterr().err
    assert said in error and error.splitlines()[-1].startswith("error: ") and not Path("logs/run").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (named("EarlyStopping", monitor="val/loss", patience=1, min_delta=10), "stopped by EarlyStopping: val/loss"),
        ({"max_time": "00:00:00:01", "max_epochs": 1000}, "stopped by the time limit of"),
    ],
)
def test_fit_says_what_ended_it_early(fit: Fit, settings: dict, said: str, capsys) -> None:
    assert fit({"max_epochs": 9, **settings}) == 0
    assert said in capsys.readouterr().out
    assert RunFolder(Path("logs/run")).read()["stopped_by"]


def test_a_profiler_by_name_writes_into_the_run(fit: Fit) -> None:
    assert fit({"profiler": "simple"}) == 0
    assert "run_training_epoch" in next(Path("logs/run").glob("*profiler*")).read_text()
