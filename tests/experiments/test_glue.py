"""The shipped ablation over GLUE, its small size, on rows that are made up in GLUE's columns and tiny models."""

import json
import re
from pathlib import Path

import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, matthews_corrcoef

from lightning_lora.cli import main
from tests.conftest import cells_in_process, save_tokenizer
from tests.glue_rows import cache_glue

CONFIGS = Path(__file__).parents[2] / "configs"
SMALLER = {
    "sets: [rte, cola, stsb]": "sets: [mnli, cola, stsb]",
    "data.train_rows: 200, data.val_size: 100, data.test_rows: 100": "data.val_size: 20",
    "trainer.max_steps: 50": "trainer.max_steps: 18",
    "learning_rate: 4.0e-4": "learning_rate: 0.05",  # else the tiny model says the same of every text
}


@pytest.mark.slow
def test_the_table_of_glue_has_ours_beside_what_the_paper_reports(
    make_base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import pandas as pd

    cells_in_process(monkeypatch)
    cache_glue(tmp_path / "hub", monkeypatch, ["mnli", "cola", "stsb"])
    bases = {}
    for seed, size in enumerate(("base", "large")):
        bases[f"FacebookAI/roberta-{size}"] = make_base("roberta", seed, max_position_embeddings=600)
        save_tokenizer(bases[f"FacebookAI/roberta-{size}"], 512)
    for path in [CONFIGS / "ablation" / "glue_lora.yaml", *(CONFIGS / "experiment" / "glue").glob("*.yaml")]:
        text = path.read_text()
        for name, value in {**bases, **SMALLER}.items():
            text = text.replace(name, str(value))
        copy = tmp_path / "configs" / path.relative_to(CONFIGS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    words = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.enable_progress_bar", "false"]
    command = ["ablate", "--config", "configs/ablation/glue_lora.yaml", "--small", "--name", "glue", *words]
    assert main(command) == 0
    report = Path("logs/glue/report.md").read_text()
    print(report)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in report.splitlines()
        if line[:1] == "|"
    }
    names = rows["arm"][:3]
    assert sorted(names) == ["cola", "mnli", "stsb"]
    published = {"cola": ("0.634", "0.682"), "mnli": ("0.875", "0.906"), "stsb": ("0.915", "0.923")}
    assert [tuple(rows[f"{arm}, published"][i] for arm in ("base", "large")) for i in range(3)] == [
        published[n] for n in names
    ]
    assert "accuracy (mnli)" in report and "matthews_correlation (cola)" in report and "pearson (stsb)" in report
    assert "what others report" in report and "Hu et al. 2022" in report

    def predictions(task: str, arm: str, seed: int) -> pd.DataFrame:
        return pd.read_parquet(f"logs/glue/{task}/cells/arm-{arm}__seed-{seed}/predictions/test.parquet")

    oracles = {"cola": matthews_corrcoef, "mnli": accuracy_score, "stsb": lambda *pair: pearsonr(*pair).statistic}
    for i, task in enumerate(names):
        for arm, cells in (("base (baseline)", "base"), ("large", "large")):
            found = [
                oracles[task](each["label"], each["prediction"])
                for each in (predictions(task, cells, s) for s in (1, 2))
            ]
            shown = float(re.search(r"-?\d\.\d+", rows[arm][i])[0])  # type: ignore[index]
            assert shown == pytest.approx(sum(found) / 2, abs=6e-4)

    # Both validation sets of mnli, in the report and in the record of each cell.
    one = predictions("mnli", "base", 1)
    assert len(one) == 80 and one["origin"].nunique() == 2
    record = json.loads(Path("logs/glue/mnli/cells/arm-base__seed-1/run.json").read_text())
    for origin, metrics in record["evaluations"]["test"]["after_by_file"].items():
        part = one[one["origin"] == origin]
        assert metrics["accuracy"] == pytest.approx(accuracy_score(part["label"], part["prediction"]))
    own = Path("logs/glue/mnli/report.md").read_text()
    assert "glue:mnli (validation_matched) | glue:mnli (validation_mismatched)" in own
    assert "| 0.875 |" in own and "Published: Hu et al. 2022" in own
    assert json.loads(Path("logs/glue/mnli/report.json").read_text())["arms"][0]["published"] == 0.875
    capsys.readouterr()
    assert main(["report", "logs/glue"]) == 0
    assert Path("logs/glue/report.md").read_text() == report
