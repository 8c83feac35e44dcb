"""A run, and Parquet files for it: what the tests of ``predict`` share."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lora.cli import main
from tests.conftest import fit_tiny, make_rows

FILES = 5
NEW = ["prediction", "probability", "p(neg)", "p(pos)"]
ROWS = 50  # a file: more than three chunks of 16


@pytest.fixture(scope="session")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, ``run``, and Parquet files, ``in``; nothing in it is changed."""
    place = tmp_path_factory.mktemp("many")
    fit_tiny(place, tiny_base)
    write_inputs(place / "in")
    (place / "in" / "_SUCCESS").touch()
    return place


def write_inputs(folder: Path, files: int = FILES, rows: int = ROWS) -> None:
    """Files of texts of all lengths, with columns of several types beside them."""
    folder.mkdir()
    texts = [text for text, _ in make_rows(files * rows, seed=3)]
    for i in range(files):
        numbers = range(i * rows, (i + 1) * rows)
        table = {
            "id": pa.array(numbers, pa.int32()),
            "text": texts[i * rows : (i + 1) * rows],
            "tags": [[str(n)] * (n % 3) or None for n in numbers],
            "kind": pa.array([f"k{n % 4}" for n in numbers]).dictionary_encode(),
        }
        pq.write_table(pa.table(table), folder / f"part-{i}.parquet")


def words(place: Path, *more: str, source: str | None = None, output: str = "out") -> list[str]:
    return ["predict", "--run", str(place / "run"), "--input", source or str(place / "in"), "--output", output, *more]


def whole(place: Path, output: Path = Path("out")) -> list[pa.Table]:
    """The outputs, each with the rows of its input in their order, and nothing beside them."""
    names = [f"part-{i}.parquet" for i in range(FILES)]
    assert sorted(path.name for path in output.iterdir()) == names
    tables = [pq.read_table(output / name) for name in names]
    for name, table in zip(names, tables, strict=True):
        source = pq.read_table(place / "in" / name)
        assert table.column_names == ["text", *NEW, "id", "tags", "kind"]
        for column in source.column_names:
            assert table[column].to_pylist() == source[column].to_pylist()
            assert table.schema.field(column).type == source.schema.field(column).type
    return tables


@pytest.fixture(scope="session")
def expected(place: Path) -> list[pa.Table]:
    """What ``predict`` gives for one file after the other."""
    tables = []
    for i in range(FILES):
        output = place / f"one-{i}.parquet"
        assert main(words(place, source=str(place / "in" / f"part-{i}.parquet"), output=str(output))) == 0
        tables.append(pq.read_table(output))
    return tables


def same(found: list[pa.Table], expected: list[pa.Table]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["prediction"].to_pylist() == other["prediction"].to_pylist()
        for name in ("probability", "p(neg)", "p(pos)"):
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def refusal(capsys: pytest.CaptureFixture, status: int = 2) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error:") for line in lines) == 1, lines
    return lines[-1]


def damaged_inputs() -> None:
    """Two files, of which the first is damaged."""
    write_inputs(Path("in"), files=2, rows=40)
    content = bytearray(Path("in/part-0.parquet").read_bytes())
    content[40:400] = bytes(360)
    Path("in/part-0.parquet").write_bytes(content)
