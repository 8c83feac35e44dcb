"""Labels that were made wrong are found, among predictions of a model that knows better."""

import numpy as np
import pytest
from scipy.special import softmax

from lightning_lora.errors import UserError
from lightning_lora.evaluation.label_issues import label_issues

NAMES = ["a", "b", "c"]


def test_classes_that_were_made_wrong_are_found_the_most_certain_first() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    p = softmax(3 * np.eye(3)[truth] + rng.normal(size=(300, 3)), axis=1)
    given, wrong = truth.copy(), rng.permutation(300)[:20]
    given[wrong] = (truth[wrong] + 1) % 3
    found = label_issues([NAMES[i] for i in given], p, NAMES, "single_label")
    rows, quality = zip(*found, strict=True)
    assert len({*rows} & {*wrong.tolist()}) >= 17 and len(rows) < 40
    assert list(quality) == sorted(quality)
    np.testing.assert_allclose(quality, [p[row, given[row]] for row in rows])


def test_sets_of_labels_that_were_made_wrong_are_found() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random((200, 3)) < 0.5
    p = np.clip(np.where(truth, 0.9, 0.1) + rng.normal(scale=0.05, size=truth.shape), 0.01, 0.99)
    given, wrong = truth.copy(), rng.permutation(200)[:10]
    given[wrong, 1] ^= True
    labels = [[name for name, has in zip(NAMES, row, strict=True) if has] for row in given]
    found = label_issues(labels, p, NAMES, "multi_label")
    rows = {row for row, _ in found}
    assert rows <= {*wrong.tolist()} and len(rows) >= 7


def test_numbers_far_from_the_predicted_ones_are_found() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=100) * 50
    given = truth + rng.normal(size=100)
    given[[7, 30]] += [40, -25]
    found = label_issues(given.tolist(), truth[:, None], ["score"], "regression")
    assert [row for row, _ in found][:2] == [7, 30] and len(found) < 6
    assert label_issues([1.0, 2.0], np.array([[1.0], [2.0]]), ["score"], "regression") == []


def test_without_cleanlab_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '.\[explain\]'"):
        label_issues(["a"], np.ones((1, 1)), ["a"], "single_label")
