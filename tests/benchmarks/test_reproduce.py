"""The comparison of stored figures, the project's own list against the README, and a tiny table that is run."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import make_rows, write_csv

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import reproduce  # noqa: E402

README = "".join((ROOT / name).read_text() for name in ("README.md", "docs/results.md"))
TABLES = yaml.safe_load(reproduce.TABLES.read_text())


def test_list_holds_the_figures_of_the_readme_and_reports() -> None:
    reports = {"ag_news_rank": "ag_news_rank", "ag_news_methods": "ag_news_arms"}
    assert set(TABLES["tables"]) == {"quickstart", "ag_news_arms", "imdb_arms", *reports}
    for name, table in TABLES["tables"].items():
        page = (ROOT / "docs" / "ablations" / f"{reports[name]}.md").read_text() if name in reports else README
        for figures in table["figures"].values():
            for key, figure in figures.items():
                if "evaluations" in key and "majority" not in key:
                    assert f"{figure['is']:.4f}" in page, (name, key)
                if key == "costs.trainable_params" and figure["is"] and name not in reports:
                    assert f"{figure['is']:,}" in page, (name, key)


def test_judge() -> None:
    assert [reproduce.judge(5, 0, 5), reproduce.judge(5, 0, 6)] == ["same", "differs"]
    assert [reproduce.judge(0.47, 0.01, 0.48), reproduce.judge(0.47, 0.01, 0.4801)] == ["same", "differs"]
    assert [reproduce.judge(0.8, [0.7, 0.85], 0.85), reproduce.judge(0.8, [0.7, 0.85], 0.86)] == ["same", "differs"]
    assert [reproduce.judge(70, None, 900), reproduce.judge(70, None, None)] == ["shown", "missing"]


def test_look_up_finds_keys_with_dots_and_slashes() -> None:
    record = {"a": {"b": {"f1/neg.e": 0.5}, "flag": True}, "a.c": {"d": 2}}
    assert (reproduce.look_up(record, "a.b.f1/neg.e"), reproduce.look_up(record, "a.c.d")) == (0.5, 2.0)
    assert [reproduce.look_up(record, key) for key in ("a.flag", "a.x", "a")] == [None] * 3


def test_runs_a_table_once_and_reports_changed_figures(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "model": {"base_model": str(tiny_base)},
        "data": {"source": str(write_csv(tmp_path / "rows.csv", make_rows(120))), "max_length": 16},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    commands = [f"fit --config {tmp_path / 'tiny.yaml'} --name tiny --logs_dir {{logs}}"]
    figures = {"tiny": {"costs.trainable_params": {"is": 0, "within": 0}, "nothing": {"is": 1, "within": 0}}}
    table = {"says": "tiny", "commands": commands, "figures": figures}
    path = tmp_path / "tables.yaml"
    path.write_text(yaml.safe_dump({"tables": {"tiny": table, "other": {**table, "data": {"news": "a folder"}}}}))
    words = ["--list", str(path), "--logs_dir", str(tmp_path / "logs")]
    assert reproduce.main(words) == 1
    shown = capsys.readouterr().out
    assert "other: skipped; give --data news=FOLDER (a folder)" in shown and "2 of 2 figures differ" in shown

    record = json.loads((tmp_path / "logs" / "tiny" / "tiny" / "run.json").read_text())
    figures["tiny"] = {"costs.trainable_params": {"is": record["costs"]["trainable_params"], "within": 0}}
    path.write_text(yaml.safe_dump({"tables": {"tiny": table}}))
    assert reproduce.main(words) == 0
    assert "$ python" not in capsys.readouterr().out
