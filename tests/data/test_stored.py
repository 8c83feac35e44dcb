import os
from pathlib import Path

import numpy as np
import pytest

from lightning_lora.data import sources
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.errors import UserError
from tests.conftest import make_rows, write_csv


def test_what_is_stored_is_what_was_read_and_is_not_read_again(reviews: Path, tmp_path: Path, monkeypatch) -> None:
    options = SourceOptions(str(reviews), train_rows=100, test_rows=0.5)
    held = prepare(options)
    stored = [prepare(options, tmp_path)]
    monkeypatch.setattr(sources, "read_tables", lambda *_, **__: pytest.fail("read the source again"))
    stored.append(prepare(options, tmp_path))
    for prepared in stored:
        assert prepared.describe() == held.describe()
        for split, rows in held.splits.items():
            assert prepared.splits[split].texts == rows.texts
            assert prepared.splits[split].origins == rows.origins
            np.testing.assert_array_equal(prepared.splits[split].numbers, rows.numbers)
            np.testing.assert_array_equal(prepared.splits[split].labels, rows.labels)


@pytest.mark.parametrize("label", ["neg", 7, 2**70, 0.1, "1.10", "\u00e9"])
def test_label_cells_keep_their_type(tmp_path: Path, label: object) -> None:
    from lightning_lora.data.reading import Table
    from lightning_lora.data.sources import RowSource
    from lightning_lora.data.stored import RowRules, stored_rows

    cells = ["other", label, "other", None, str(label), 1, True, 1.0]  # of which three are equal
    table = Table("made up", {"text": list("abcdefgh"), "label": cells}, range(1, 9))
    source = RowSource("made up", "1", lambda columns: iter([table.select([0, 1]), table.select(range(2, 8))]))
    for cache in (None, tmp_path):
        found, codes = stored_rows(source, RowRules(["text"], "label", "drop"), cache).labels("label")
        expected = list({(type(cell), cell): cell for cell in cells if cell is not None}.values())
        assert [(type(cell), cell) for cell in found.columns["label"]] == [(type(cell), cell) for cell in expected]
        assert [repr(found.columns["label"][code]) if code >= 0 else "None" for code in codes] == [*map(repr, cells)]
        assert list(found.rows) == [1, 2, *([5] if str(label) != label else []), 6, 7, 8]


def test_another_content_column_or_policy_is_read_anew(reviews: Path, tmp_path: Path) -> None:
    def stored() -> int:
        return len(list((tmp_path / "rows").iterdir()))

    prepare(SourceOptions(str(reviews)), tmp_path)
    prepare(SourceOptions(str(reviews), split_seed=1, train_rows=9), tmp_path)  # how the rows are divided is no matter
    assert stored() == 1
    prepare(SourceOptions(str(reviews), bad_rows="drop"), tmp_path)
    assert stored() == 2
    before = reviews.stat()
    reviews.write_text(reviews.read_text().replace("film", "filn"))
    os.utime(reviews, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert any("filn" in text for text in prepare(SourceOptions(str(reviews)), tmp_path).splits["train"].texts)
    write_csv(reviews, [(label, text) for text, label in make_rows(200, seed=1)], header=("text", "label"))
    with pytest.raises(UserError, match="no classes"):
        prepare(SourceOptions(str(reviews)), tmp_path)
    swapped = SourceOptions(str(reviews), text_column="label", label_column="text")
    assert prepare(swapped, tmp_path).label_names == ["neg", "pos"]


def test_a_damaged_store_is_made_again(reviews: Path, tmp_path: Path) -> None:
    options = SourceOptions(str(reviews))
    prepare(options, tmp_path)
    path = next((tmp_path / "rows").iterdir())
    for size in (0, 20, path.stat().st_size - 10):
        path.write_bytes(path.read_bytes()[:size])
        assert prepare(options, tmp_path).describe() == prepare(options).describe()


def test_a_hub_source_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for seed in (0, 1):
        texts, labels = zip(*make_rows(3000, seed=seed), strict=True)
        rows = datasets.Dataset.from_dict({"text": texts, "label": labels})
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, rows=rows: {"train": rows})
        prepared = prepare(SourceOptions("owner/name"), tmp_path)
        assert sorted(text for rows in prepared.splits.values() for text in rows.texts) == sorted(texts)
        assert prepared.splits["test"].origins[0] == "owner/name (train)"
    assert not list(tmp_path.iterdir())


def test_a_store_that_cannot_be_written_is_one_line(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write"):
        prepare(SourceOptions(str(reviews)), tmp_path / "file")
