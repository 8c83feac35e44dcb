"""The wheel holds all that the commands need, and works where there is no checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_lora.config.options import CONFIGS, describe, find_config, recipes
from lightning_lora.program import command_line, install_line
from tests.conftest import make_rows, write_csv

ROOT = Path(__file__).parents[1]
START = "import sys; sys.argv[0] = 'lightning-lora'; from lightning_lora.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that the wheel was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_the_package_and_its_configs_only(site: Path) -> None:
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"lightning_lora"}
    files = {path.relative_to(site / "lightning_lora") for path in (site / "lightning_lora").rglob("*.*")}
    package = {path.relative_to(ROOT / "lightning_lora") for path in (ROOT / "lightning_lora").rglob("*.*")}
    configs = {path.relative_to(ROOT) for path in CONFIGS.rglob("*.yaml")}
    assert {path for path in files if path.suffix != ".yaml"} == {p for p in package if p.suffix in (".py", ".j2")}
    assert {path for path in files if path.suffix == ".yaml"} == configs


def test_an_installed_command_finds_configs_by_name_and_says_what_to_type(site: Path, make_base, tmp_path) -> None:
    write_csv(tmp_path / "rows.csv", make_rows(80))
    words = ["fit", "--config", "default", "--data.source", "rows.csv", "--data.train_rows", "40", "--data.val_size"]
    words += ["10", "--data.test_rows", "10", "--model.base_model", str(make_base()), "--name", "first"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    run = [sys.executable, "-c", START, *words, "--trainer.max_epochs", "1", "--data.max_length", "32"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "next: lightning-lora test --run logs/first" in done.stdout
    code = "import lightning_lora; print(lightning_lora.__file__)"
    where = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True)
    assert where.startswith(str(site))


def test_each_config_has_a_name_and_a_question() -> None:
    found = recipes()
    assert {*found.values()} == {*CONFIGS.rglob("*.yaml")}
    for name, path in found.items():
        assert find_config(name) == path and "?" in describe(path)["Question"] + "?" * (
            "the same as" in describe(path)["Question"]
        )
        assert find_config(f"configs/{path.relative_to(CONFIGS)}").samefile(path)
    assert find_config("missing") == Path("missing")  # which reading it refuses


def test_an_extra_is_installed_as_the_package_was(site: Path) -> None:
    assert install_line("export") == "pip install -c constraints.txt -e '.[export]'"
    code = "from lightning_lora.program import install_line; print(install_line('export'))"
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
    said = subprocess.check_output([sys.executable, "-c", code], cwd=site, env=environment, text=True)
    assert said == "pip install 'lightning_lora[export]'\n"


@pytest.mark.parametrize(
    ("started", "typed"),
    [
        ("main.py", "python main.py"),
        ("/usr/bin/lightning-lora", "lightning-lora"),
        ("/site/lightning_lora/__main__.py", "python -m lightning_lora"),
        ("my_script.py", "python main.py"),
    ],
)
def test_messages_name_the_command_that_was_typed(started: str, typed: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert command_line("test", "--run", "my logs/a") == f"{typed} test --run 'my logs/a'"
