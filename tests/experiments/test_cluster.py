"""An ablation on a Ray cluster of several node processes on this machine."""

import os
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.workers import room_for
from tests.conftest import make_rows, write_csv
from tests.experiments.test_search import TIMES, main_table
from tests.faults.processes import Run


@pytest.fixture
def place(make_base, tmp_path: Path) -> Path:
    write_csv(tmp_path / "rows.csv", make_rows(200))
    base = {
        "model": {"base_model": str(make_base("bert")), "learning_rate": 1e-2},
        "data": {"source": str(tmp_path / "rows.csv"), "max_length": 24, "batch_size": 4},
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    base["data"]["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    axes = {"rank": {"model.adapter.rank": [2, 8]}}
    ablation = {"question": "Does rank matter?", "base": "base.yaml", "axes": axes, "seeds": [1, 2]}
    (tmp_path / "rank.yaml").write_text(yaml.safe_dump(ablation))
    return tmp_path


def test_without_ray_the_message_says_how_to_get_it(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["ablate", "--config", str(place / "rank.yaml"), "--executor", "ray"]) == 2
    assert "pip install -c constraints.txt -e '.[scale]'" in capsys.readouterr().err


def test_what_no_node_could_run_is_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}]
    assert room_for(nodes, 2, 0) == 2
    assert room_for([*nodes, {"Alive": True, "Resources": {"CPU": 3.0}}], 2, 0) == 3
    for needs in ((8, 0), (1, 1)):
        with pytest.raises(UserError, match="the nodes have 4 CPU, 0 GPU"):
            room_for(nodes, *needs)


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf")])
def test_what_is_no_number_of_cpus_is_refused(count: float) -> None:
    with pytest.raises(UserError, match="numbers from 0 on are needed"):
        room_for([{"Alive": True, "Resources": {"CPU": 4.0}}], count, 0)


@pytest.mark.faults
def test_a_node_is_lost_and_nothing_with_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes, one of which is killed while it trains: every cell is there once, as without a cluster."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    words = ["ablate", "--config", str(place / "rank.yaml")]
    assert main([*words, "--logs_dir", str(place / "alone")]) == 0
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        given = [*words, "--logs_dir", str(place / "cluster"), "--executor", "ray", "--address", cluster.address]
        run = Run(given, place / "out.txt")
        cells = place / "cluster" / "ablation-rank" / "cells"
        run.wait_for(lambda: bool(list(cells.glob("*/checkpoints/last.ckpt"))), 300)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert run.wait(400) == 0, run.text()
        assert "4 cells" not in run.text().splitlines()[-1]
    finally:
        cluster.shutdown()
    told = [main_table(place / logs / "ablation-rank", TIMES) for logs in ("alone", "cluster")]
    assert told[0] == told[1] and len(told[0]) == 2
    for cell in (place / "alone" / "ablation-rank" / "cells").glob("*/predictions"):
        for file in ("val-best", "test"):
            one, two = (
                pq.read_table(
                    place / logs / "ablation-rank" / "cells" / cell.parent.name / "predictions" / f"{file}.parquet"
                )
                for logs in ("alone", "cluster")
            )
            for column in one.column_names:  # Ray gives a cell one thread: what is a number differs by rounding
                here, there = one[column].to_pylist(), two[column].to_pylist()
                assert here == (pytest.approx(there, abs=1e-4) if isinstance(here[0], float) else there), column
