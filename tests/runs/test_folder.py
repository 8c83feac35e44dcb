import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lightning_lora.errors import UserError
from lightning_lora.runs.folder import RunFolder, commit, new_record


def test_a_folder_is_never_used_twice(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "mine", "x")
    with pytest.raises(UserError, match="exists, and a run is never overwritten"):
        RunFolder.create(tmp_path, "mine", "x")


def test_runs_that_start_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: RunFolder.create(tmp_path, None, "imdb lora").path, range(24)))
    assert len(set(made)) == 24
    assert all(path.name.startswith("imdb-lora-") for path in made)


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".", "..", "a\nb", "x" * 200, "-x", "\x00"])
def test_a_name_never_leads_out_of_the_logs_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--name"):
        RunFolder.create(tmp_path / "logs", name, "x")
    assert not (tmp_path / "logs").exists()


def test_a_stem_from_a_path_becomes_a_plain_name(tmp_path: Path) -> None:
    path = RunFolder.create(tmp_path, None, "../../etc/passwd x").path
    assert path.parent == tmp_path and path.name.startswith("etc-passwd-x-")


def test_a_record_comes_back_as_it_was_and_infinite_numbers_as_null(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a", "x")
    folder.write({"format": 1, "x": [1.5, float("nan"), {"y": float("inf")}], "name": "ü"})
    assert folder.read() == {"format": 1, "x": [1.5, None, {"y": None}], "name": "ü"}


@pytest.mark.parametrize("content", [None, "", "{", '{"format": 99}'])
def test_a_missing_damaged_or_newer_record_is_one_line(tmp_path: Path, content: str | None) -> None:
    folder = RunFolder.create(tmp_path, "a", "x")
    if content is not None:
        folder.record.write_text(content)
    with pytest.raises(UserError) as raised:
        folder.read()
    assert str(folder.path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_without_checkpoint_is_refused_with_its_status(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "a", "x")
    folder.write({"format": 1, "status": "failed"})
    with pytest.raises(UserError, match=r"no checkpoint best.ckpt \(the run's status: failed\)"):
        folder.checkpoint("best")


def test_the_record_says_which_code_made_it() -> None:
    record = new_record(["fit", "--name", "a b"], 3)
    assert record["command"] == "python main.py fit --name 'a b'"
    assert record["versions"]["torch"].startswith("2.")
    json.dumps(record)
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert commit()["commit"] == head.stdout.strip()
        words = ["git", "-C", root, "status", "--porcelain", "--", "main.py", "lightning_lora", "configs"]
        status = subprocess.run(words, capture_output=True, text=True, check=True)
        assert commit()["dirty"] == bool(status.stdout.strip())


def test_a_logs_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(UserError, match="--logs_dir: cannot make"):
        RunFolder.create(tmp_path / "logs", "a", "x")
