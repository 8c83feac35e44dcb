import pytest

from lightning_lora.evaluation.metric_table import metrics_for
from lightning_lora.reports.tables import cost_rows, markdown, metric_rows, print_tables
from lightning_lora.tasks import Task
from lightning_lora.units import duration


def test_a_table_has_a_row_before_and_after_and_no_invented_numbers() -> None:
    evaluation = {"before": {"accuracy": 0.5, "loss": 0.7}, "after": {"accuracy": 0.9, "f1_macro": 0.875, "loss": 0.2}}
    rows = metric_rows(evaluation)
    assert rows[1] == ["before", "0.5000", "-", "-", "-", "-", "0.7000", "-"]
    assert rows[2][:3] == ["after", "0.9000", "0.8750"]
    assert markdown(rows).splitlines()[2] == "| before | 0.5000 | - | - | - | - | 0.7000 | - |"


def test_the_interval_stands_below_what_it_is_of() -> None:
    evaluation = {"after": {"accuracy": 0.9}, "after_interval": {"accuracy": [0.85, 0.95]}}
    assert metric_rows(evaluation)[-1][:3] == ["95% interval", "0.8500 to 0.9500", "-"]


def test_a_run_that_was_killed_has_fewer_lines() -> None:
    assert [row[0] for row in cost_rows({}, {})] == ["base model", "method"]


@pytest.mark.parametrize(("seconds", "text"), [(3.14, "3.1 s"), (61, "1 min 1 s"), (3660, "1 h 1 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_the_tables_fit_into_a_terminal_of_80_columns(task: Task, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    values = {name: 0.12345 for name, spec in metrics_for(task).items() if spec.heading}
    bounds = {name: [0.1, 0.2] for name in values}
    rows = metric_rows({"task": task, "before": values, "after": values, "after_interval": bounds, "int8": values})
    print_tables("test: 500 rows", rows, [["method", "lora"]])
    said = capsys.readouterr().out
    assert "…" not in said and max(map(len, said.splitlines())) <= 80
    assert all(word in said for spec in metrics_for(task).values() for word in spec.heading.split()) and said.count(
        "0.1000 to 0.2000"
    ) == len(values)
