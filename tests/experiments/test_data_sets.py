"""Ablations over several data sets."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from sklearn.metrics import accuracy_score, f1_score

from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.experiments.resolving import split_sets
from tests.conftest import cells_in_process, make_rows, write_csv

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


def test_a_set_may_have_a_base_a_metric_and_published_figures_of_its_own() -> None:
    own = {"base": "two.yaml", "metric": "pearson", "published": {"tfidf": 0.5}}
    found = split_sets(described(one={"data.source": "a.csv"}, two={"data.source": "b.csv", **own}), small=False)
    assert {key: found["two"][key] for key in own} == own and found["one"]["base"] == "base.yaml"
    assert found["two"]["settings"] == {"data.test_size": 30, "data.source": "b.csv"}


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


def test_one_table_has_every_arm_on_every_set(tiny_base: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    cells_in_process(monkeypatch)
    base = {
        "model": {"base_model": str(tiny_base)},
        "data": {"max_length": 24, "cache_dir": str(tmp_path / "cache")},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    Path("base.yaml").write_text(yaml.safe_dump(base))
    for name, labels in (("two", ("neg", "pos")), ("three", ("neg", "pos", "mixed"))):
        write_csv(Path(f"{name}.csv"), make_rows(150, labels))
    Path("own.yaml").write_text(yaml.safe_dump({**base, "arms": PLAN["arms"]}, sort_keys=False))  # the same arms
    one = {"data.source": "two.csv", "published": {"tfidf": 0.95}}
    content = described(one=one, other={"data.source": "three.csv", "metric": "f1_macro"})
    content |= {"published_in": "A paper, Table 2", "base": "own.yaml"}
    del content["arms"]
    Path("plan.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
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
            score = accuracy_score if name == "one" else partial(f1_score, average="macro")
            means.append(float(np.mean([score(table["label"], table["prediction"]) for table in tables])))
        rows = [line.split("|") for line in report.splitlines() if line.startswith(("| tfidf", "| majority"))]
        row = [each for each in rows if "published" not in each[1]]
        assert [[cell.strip() for cell in each[1:4]] for each in rows if each not in row] == [
            ["tfidf, published", "0.950", "-"]
        ]
        column = 2 if name == "one" else 3
        assert [float(re.search(r"\d\.\d+", line[column])[0]) for line in row] == [  # type: ignore[index]
            pytest.approx(mean, abs=5e-4) for mean in means
        ]
        assert row[1][column].strip().endswith("-") and "**" in row[0][column]
    assert "accuracy (one), f1_macro (other); on test rows" in report and "others report" in report
    assert report.count("A paper, Table 2") == 1 and "Published: A paper" in Path("logs/all/one/report.md").read_text()
    assert "published" not in Path("logs/all/other/report.md").read_text().casefold()
    assert "| majority | " in report and row[1][5].strip() == "2"
    Path("logs/all/report.md").write_text("")
    assert main(["report", "logs/all"]) == 0
    assert Path("logs/all/report.md").read_text() == report
    capsys.readouterr()
    assert main(words) == 0
    assert "4 are finished" in capsys.readouterr().out.replace("arms x 2 seeds = 4; ", "")
    # One of the arms: its mean, interval and published figure, and no comparison.
    (first,) = [line for line in report.splitlines() if line.startswith("| tfidf (baseline)")]
    assert main([*words, "--sets", "one", "--arms", "tfidf"]) == 0
    alone, own = Path("logs/all/report.md").read_text(), Path("logs/all/one/report.md").read_text()
    assert "2 are finished" in capsys.readouterr().out and "better" not in own.split("- command")[0]
    mean = re.search(r"\d\.\d+", first)[0]  # type: ignore[index]
    shown = re.search(rf"\| tfidf[^|]* \| {mean} \[(\d\.\d+), (\d\.\d+)\] \|", alone)
    assert (
        shown is not None and float(shown[1]) <= float(mean) <= float(shown[2]) and "tfidf, published | 0.950" in alone
    )
    assert re.search(rf"^tfidf has test accuracy {mean}\d+ \[.*\]; published: 0\.950\.$", own, re.MULTILINE)
    page = Path("logs/all/one/report.html").read_text()
    assert "id=forest" not in page and "verdict" not in page.split("<h2>Metrics")[1].split("id=notes")[0]
    assert main([*words, "--sets", "one", "--arms", "probe"]) == 2
    assert "--arms: no arm 'probe'; there are tfidf, majority" in capsys.readouterr().err


def test_sets_are_for_a_config_that_has_some(tmp_path: Path, capsys) -> None:
    Path("plan.yaml").write_text(yaml.safe_dump(PLAN))
    assert main(["ablate", "--config", "plan.yaml", "--sets", "one"]) == 2
    assert "describes no sets" in capsys.readouterr().err
