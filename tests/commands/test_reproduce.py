"""A frozen list of a tiny model, run for real; and the project's own list against the README."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_lora.cli import main
from lightning_lora.commands import reproduce
from lightning_lora.reports.reproduction import Compared, Figure, look_up, summary, table
from tests.conftest import make_rows, write_csv

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PATHS = (
    "costs.trainable_params",
    "evaluations.test.after.accuracy",
    "evaluations.test.after.f1/pos",
    "metrics.val/loss",
)


def write_list(path: Path, figures: dict, base: Path) -> Path:
    config = {
        "model": {"base_model": str(base)},
        "data": {"source": str(path.parent / "rows.csv"), "max_length": 16, "cache_dir": str(path.parent / "cache")},
        "trainer": {"accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False},
    }
    (path.parent / "tiny.yaml").write_text(yaml.safe_dump(config))
    commands = [f"fit --config {path.parent / 'tiny.yaml'} --name tiny --logs_dir {{logs}}"]
    commands += ["test --run {logs}/tiny --before false"]
    tiny = {"says": "a tiny table", "commands": commands, "figures": {"tiny": figures}}
    other = {**tiny, "data": {"news": "a folder with news"}, "figures": {"x": {"steps": {"is": 1, "within": 0}}}}
    other["commands"] = ["fit --data.source {news} --name x --logs_dir {logs}"]
    path.write_text(yaml.safe_dump({"tables": {"tiny": tiny, "news": other}, "smoke": {"tiny": tiny}}))
    return path


@pytest.fixture(scope="module")
def came_out(tmp_path_factory: pytest.TempPathFactory, make_base) -> tuple[Path, dict]:
    """A place with a list whose figures are what a first run came to, and those figures."""
    place = tmp_path_factory.mktemp("reproduce")
    write_csv(place / "rows.csv", make_rows(120))
    base = make_base("bert")
    guess = write_list(place / "guess.yaml", {path: {"is": 0, "within": 0} for path in PATHS}, base)
    logs = ["--logs_dir", str(place / "logs")]
    assert main(["reproduce", "--list", str(guess), "--smoke", "--name", "first", *logs]) == 1
    rows = json.loads((place / "logs" / "first" / "reproduce.json").read_text())["figures"]
    found = {row["path"]: row["now"] for row in rows}
    (record,) = (place / "logs" / "first").glob("tiny-*/tiny/run.json")
    test = json.loads(record.read_text())["evaluations"]["test"]["after"]
    assert found["evaluations.test.after.accuracy"] == test["accuracy"] and found[PATHS[2]] == test["f1/pos"]
    return place, found


def freeze(place: Path, found: dict, base: Path) -> list[str]:
    figures = {path: {"is": value, "within": 1e-9} for path, value in found.items()}
    figures["costs.train_s"] = {"is": 12345, "within": None}
    path = write_list(place / "frozen.yaml", figures, base)
    return ["reproduce", "--list", str(path), "--logs_dir", str(place / "logs")]


def test_the_same_figures_come_out_again_and_a_changed_one_is_named(
    came_out, make_base, monkeypatch, capsys, tmp_path
) -> None:
    place, found = came_out
    frozen = freeze(place, found, make_base("bert"))
    # In this process, which is faster; a process of its own has run the first.
    ran: list[str] = []
    monkeypatch.setattr(reproduce, "run_child", lambda each, output: ran.append(each[0][0]) or main(each[0]))
    assert main([*frozen, "--smoke", "--name", "second"]) == 0
    said = capsys.readouterr().out
    assert ran == ["fit", "test"] and "4 of 4 figures are the same; 1 are only shown" in said
    assert "| tiny | tiny | costs.train_s | 12,345 |" in (place / "logs" / "second" / "reproduce.md").read_text()

    figures = {path: {"is": value, "within": 1e-9} for path, value in found.items()}
    figures["evaluations.test.after.accuracy"] = {"is": found["evaluations.test.after.accuracy"] + 0.125, "within": 0.1}
    changed = write_list(place / "changed.yaml", figures, make_base("bert"))
    words = ["reproduce", "--list", str(changed), "--logs_dir", str(place / "logs"), "--smoke", "--name", "second"]
    assert main(words) == 1  # the commands are the same, so their runs are there
    said = capsys.readouterr().out
    assert ran == ["fit", "test"] and "done already" in said
    assert "tiny, tiny: evaluations.test.after.accuracy differs by -0.1250" in said and "3 of 4 figures" in said
    rows = json.loads((place / "logs" / "second" / "reproduce.json").read_text())["figures"]
    assert [row["path"] for row in rows if row["verdict"] == "differs"] == ["evaluations.test.after.accuracy"]


def test_a_table_without_its_data_is_skipped_with_what_to_give(came_out, make_base, monkeypatch, capsys) -> None:
    place, found = came_out
    frozen = freeze(place, found, make_base("bert"))
    monkeypatch.setattr(reproduce, "run_child", lambda *_: pytest.fail("nothing was to be run"))
    assert main([*frozen, "--only", "news"]) == 0
    assert "news: skipped; give --data news=FOLDER (a folder with news)" in capsys.readouterr().out
    assert "skipped" in (place / "logs" / "reproduce-tables" / "reproduce.md").read_text()


def test_a_command_that_fails_is_said_and_its_figures_are_missing(came_out, make_base, capsys, monkeypatch) -> None:
    place, found = came_out
    frozen = freeze(place, found, make_base("bert"))

    def fails(commands: list, output: Path) -> int:
        output.write_text("error: no such thing\n")
        return 2

    monkeypatch.setattr(reproduce, "run_child", fails)
    words = [*frozen, "--only", "news", "--data", f"news={place}", "--name", "fails"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "news: command 1 ended with status 2: no such thing" in said.err
    assert "news, x: steps is missing; stored is 1" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "nothing"], "no table 'nothing'; there are news, tiny"),
        (["--data", "news"], "NAME=FOLDER"),
        (["--data", "books=."], "no table of these needs 'books'"),
        (["--list", "none.yaml"], "cannot read none.yaml"),
    ],
)
def test_wrong_words_are_one_line(came_out, make_base, capsys, words, message) -> None:
    place, found = came_out
    assert main([*freeze(place, found, make_base("bert")), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"commands": ["export --run x"]}, "one of fit"),
        ({"commands": ["fit --name x"]}, "fit needs --name and --logs_dir"),
        ({"commands": ["test --run {other}/x"]}, "nothing is known of {other}"),
        ({"figures": {"x": {"steps": 3}}}, "'is' and 'within' are needed"),
        ({"figures": {"x": {"steps": {"is": "many", "within": 0}}}}, "numbers are needed"),
        ({"colour": "red"}, "an entry has says, data, commands, figures"),
    ],
)
def test_a_wrong_list_is_one_line(tmp_path: Path, capsys, change, message) -> None:
    entry = {"says": "", "commands": ["test --run {logs}/x"], "figures": {"x": {"steps": {"is": 1, "within": 0}}}}
    (tmp_path / "list.yaml").write_text(yaml.safe_dump({"tables": {"one": {**entry, **change}}}))
    assert main(["reproduce", "--list", "list.yaml"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_what_counts_as_the_same() -> None:
    def verdict(stored: float, within, now: float | None) -> str:
        return Compared("t", Figure("r", "p", stored, within), now).verdict

    assert [verdict(5, 0, 5), verdict(5, 0, 6)] == ["same", "differs"]
    assert [verdict(0.47, 0.01, 0.48), verdict(0.47, 0.01, 0.4801)] == ["same", "differs"]
    assert [verdict(0.8, (0.7, 0.85), 0.85), verdict(0.8, (0.7, 0.85), 0.86)] == ["same", "differs"]
    assert [verdict(70, None, 900), verdict(70, None, None)] == ["shown", "missing"]
    compared = [Compared("t", Figure("r", "p", 0.8, 0.01), 0.75)]
    assert summary(compared)[0] == "t, r: p differs by -0.0500: stored 0.8000, now 0.7500 (same if ± 0.0100)"
    assert table(compared)[1] == ["t", "r", "p", "0.8000", "0.7500", "-0.0500", "± 0.0100", "**differs**"]
    counted = table(
        [Compared("t", Figure("r", "p", 12345, 0), 12345), Compared("t", Figure("r", "p", 0.5, 0.1), 0.49999)]
    )
    assert counted[1][3:7] == ["12,345", "12,345", "0", "± 0"] and counted[2][4:6] == ["0.5000", "+0.0000"]


def test_figures_are_found_by_keys_that_hold_dots_and_strokes() -> None:
    record = {"a": {"b": {"f1/neg.e": 0.5}, "flag": True}, "a.c": {"d": 2}}
    assert (look_up(record, "a.b.f1/neg.e"), look_up(record, "a.c.d")) == (0.5, 2.0)
    assert (look_up(record, "a.flag"), look_up(record, "a.x"), look_up(record, "a")) == (None, None, None)


def test_the_projects_own_list_holds_the_figures_of_the_readme() -> None:
    entries = reproduce.read_list(reproduce.FROZEN, "tables", None)
    ablations = {"ag_news_rank": "ag_news_rank", "ag_news_methods": "ag_news_arms"}
    assert {entry.name for entry in entries} == {"quickstart", "ag_news_arms", "imdb_arms", *ablations}
    for entry in (entry for entry in entries if entry.name in ablations):
        report = (ROOT / "docs" / "ablations" / f"{ablations[entry.name]}.md").read_text()
        for figure in entry.figures:
            if "evaluations" in figure.path:
                assert f"| {figure.stored:.4f} |" in report, figure
    for figure in (figure for entry in entries if entry.name not in ablations for figure in entry.figures):
        if "evaluations" in figure.path and "majority" not in figure.path:
            assert f"{figure.stored:.4f}" in README, figure
        if figure.path == "costs.trainable_params" and figure.stored:
            assert f"{figure.stored:,}" in README, figure
    (smoke,) = reproduce.read_list(reproduce.FROZEN, "smoke", None)
    assert smoke.figures and not smoke.data


def test_other_data_at_the_same_place_is_another_state(tmp_path: Path) -> None:
    entry = reproduce.Entry("table", "", {"rows": "a folder"}, [["fit"]], [])
    (tmp_path / "train.csv").write_text("text,label\nfine,pos\n")
    before = reproduce._key(entry, {"rows": tmp_path})
    assert reproduce._key(entry, {"rows": tmp_path}) == before
    (tmp_path / "train.csv").write_text("text,label\nfine,pos\ndull,neg\n")
    assert reproduce._key(entry, {"rows": tmp_path}) != before
