"""Ablations over several data sets."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.experiments.data_sets import split_sets
from tests.conftest import make_rows, write_csv

PLAN: dict[str, Any] = {
    "question": "What beats what?",
    "base": "base.yaml",
    "arms": {"tfidf": {"model.method": "tfidf"}, "majority": {"model.method": "majority"}},
    "seeds": [1, 2],
    "settings": {"data.test_size": 30},
}


def described(**sets: Any) -> dict[str, Any]:
    return {**PLAN, "sets": sets, "small": {"sets": ["one"], "seeds": [1]}}


def test_each_set_has_the_settings_of_all_and_its_own() -> None:
    content = described(one={"data.source": "a.csv"}, two={"data": {"source": "b.csv", "test_size": 9}})
    found = split_sets(content, small=False)
    assert [*found] == ["one", "two"] and "sets" not in found["one"] and "sets" not in found["one"]["small"]
    assert found["one"]["settings"] == {"data.test_size": 30, "data.source": "a.csv"}
    assert found["two"]["settings"] == {"data.test_size": 9, "data.source": "b.csv"}
    assert [*split_sets(content, small=True)] == ["one"] and [*split_sets(content, False, ["two"])] == ["two"]


@pytest.mark.parametrize(
    ("change", "wanted", "said"),
    [
        ({"sets": ["one"]}, None, "sets: settings by name"),
        ({"sets": {"one": 3}}, None, "settings are needed"),
        ({"sets": {"a/b": {}}}, None, "a/b"),
        ({"small": {"sets": ["three"]}}, None, "small.sets"),
        ({}, ["three"], "--sets: there is no set 'three'"),
    ],
)
def test_what_is_no_set_is_refused(change: dict[str, Any], wanted: list[str] | None, said: str) -> None:
    content = described(one={"data.source": "a.csv"}) | change
    with pytest.raises(UserError, match=re.escape(said)):
        split_sets(content, small=False, wanted=wanted)


def test_one_table_has_every_arm_on_every_set(tiny_base: Path, tmp_path: Path, capsys) -> None:
    base = {
        "model": {"base_model": str(tiny_base)},
        "data": {"max_length": 24, "cache_dir": str(tmp_path / "cache")},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))
    for name, labels in (("two", ("neg", "pos")), ("three", ("neg", "pos", "mixed"))):
        write_csv(Path(f"{name}.csv"), make_rows(150, labels))
    Path("plan.yaml").write_text(
        yaml.safe_dump(described(one={"data.source": "two.csv"}, other={"data.source": "three.csv"}), sort_keys=False)
    )
    words = ["ablate", "--config", "plan.yaml", "--name", "all"]
    assert main([*words, "--plan"]) == 0 and not Path("logs").exists()
    assert main(words) == 0
    report = Path("logs/all/report.md").read_text()
    assert report in capsys.readouterr().out or "| arm | one | other | better | worse |" in report
    for name in ("one", "other"):
        means = []
        for arm in PLAN["arms"]:
            cells = [Path(f"logs/all/{name}/cells/arm-{arm}__seed-{seed}/predictions/test.parquet") for seed in (1, 2)]
            tables = [pd.read_parquet(path) for path in cells]
            means.append(float(np.mean([(table["label"] == table["prediction"]).mean() for table in tables])))
        row = [line.split("|") for line in report.splitlines() if line.startswith(("| tfidf", "| majority"))]
        column = 2 if name == "one" else 3
        assert [float(re.search(r"\d\.\d+", line[column])[0]) for line in row] == [  # type: ignore[index]
            pytest.approx(mean, abs=5e-4) for mean in means
        ]
        assert row[1][column].strip().endswith("-") and "**" in row[0][column]
    assert "| majority | " in report and row[1][5].strip() == "2"
    Path("logs/all/report.md").write_text("")
    assert main(["report", "logs/all"]) == 0
    assert Path("logs/all/report.md").read_text() == report
    capsys.readouterr()
    assert main(words) == 0
    assert "4 are finished" in capsys.readouterr().out.replace("arms x 2 seeds = 4; ", "")


def test_sets_are_for_a_config_that_has_some(tmp_path: Path, capsys) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN))
    assert main(["ablate", "--config", "plan.yaml", "--sets", "one"]) == 2
    assert "describes no sets" in capsys.readouterr().err
