from pathlib import Path

import numpy as np
import pytest

from lightning_lora.data import prepare as prepare_module
from lightning_lora.data.prepare import SourceOptions, prepare
from lightning_lora.data.stored import store_key, stored_splits
from lightning_lora.errors import UserError
from tests.conftest import make_rows, write_csv


def test_what_is_stored_is_what_was_prepared_and_is_not_prepared_again(reviews, tmp_path, monkeypatch) -> None:
    options = SourceOptions(str(reviews), train_rows=100, test_rows=0.5)
    first = stored_splits(options, tmp_path)
    monkeypatch.setattr(prepare_module, "prepare", lambda options: pytest.fail("read the source again"))
    second = stored_splits(options, tmp_path)
    assert second.describe() == first.describe()
    for split, rows in first.splits.items():
        assert second.splits[split].texts == rows.texts
        assert second.splits[split].origins == rows.origins
        np.testing.assert_array_equal(second.splits[split].numbers, rows.numbers)
        np.testing.assert_array_equal(second.splits[split].labels, rows.labels)


def test_another_content_option_or_seed_is_prepared_anew(reviews: Path) -> None:
    keys = {store_key(SourceOptions(str(reviews), split_seed=seed, train_rows=n)) for seed in (0, 1) for n in (9, 10)}
    before = store_key(SourceOptions(str(reviews)))
    assert len(keys | {before}) == 5
    mapped = [{1: "a", "b": "c"}, {"b": "c", 1: "a"}, {"1": "a", "b": "c"}]  # the order is that of the classes
    assert len({store_key(SourceOptions(str(reviews), label_names=names)) for names in mapped}) == 3
    write_csv(reviews, make_rows(200, seed=1))
    assert store_key(SourceOptions(str(reviews))) != before


@pytest.mark.parametrize("name", ["rows.parquet", "facts.json"])
def test_a_damaged_store_is_made_again(reviews: Path, tmp_path: Path, name: str) -> None:
    options = SourceOptions(str(reviews))
    stored_splits(options, tmp_path)
    path = next(tmp_path.glob(f"splits/*/{name}"))
    path.write_bytes(path.read_bytes()[:20])
    assert stored_splits(options, tmp_path).describe() == prepare(options).describe()


def test_a_hub_source_is_not_stored() -> None:
    assert store_key(SourceOptions("owner/name")) is None


def test_a_store_that_cannot_be_written_is_one_line(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write"):
        stored_splits(SourceOptions(str(reviews)), tmp_path / "file")
