import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from lightning_lora.data.splits import carve, count_of, stratified_sample, take_fold, text_keys
from lightning_lora.errors import UserError
from lightning_lora.seeding import stream_seed

LABELS = np.repeat([0, 1, 2], [700, 200, 100])  # sorted by class, as IMDB is


def test_a_sample_has_each_class_in_its_share_as_scikit_learn_draws_it() -> None:
    chosen = stratified_sample(LABELS, 150, seed=3, stream="x")
    _, theirs = next(StratifiedShuffleSplit(1, test_size=150, random_state=0).split(LABELS, LABELS))
    np.testing.assert_array_equal(np.bincount(LABELS[chosen]), np.bincount(LABELS[theirs]))
    assert len(set(chosen)) == 150


def test_rounding_never_changes_the_size() -> None:
    for size in range(1, 40):
        assert len(stratified_sample(np.repeat([0, 1, 2], [13, 14, 13]), size, 0, "x")) == size


def test_a_sample_is_fixed_by_seed_and_stream() -> None:
    first = stratified_sample(LABELS, 100, 1, "a")
    np.testing.assert_array_equal(first, stratified_sample(LABELS, 100, 1, "a"))
    assert (first != stratified_sample(LABELS, 100, 2, "a")).any()
    assert (first != stratified_sample(LABELS, 100, 1, "b")).any()


def test_the_choice_is_the_same_on_every_machine() -> None:
    # Written down once; it changes only if every earlier run's split changes too.
    assert stratified_sample(np.arange(20) % 2, 4, 0, "test").tolist() == [4, 11, 16, 19]


def test_carving_leaves_nothing_out_and_takes_nothing_twice() -> None:
    keys = text_keys([f"text number {i}" for i in range(len(LABELS))])
    stay, taken = carve(LABELS, keys, 100, 0, "val")
    np.testing.assert_array_equal(np.sort(np.concatenate([stay, taken])), np.arange(len(LABELS)))


def test_each_class_keeps_a_row_and_where_that_is_no_matter_the_choice_is_as_ever() -> None:
    rare = np.concatenate([LABELS, [3, 4, 4]])
    for size in (2, 100, 900):
        chosen = stratified_sample(rare, size, 0, "test", leave=1)
        assert len(chosen) == size
        assert set(np.delete(rare, chosen)) == {0, 1, 2, 3, 4}
    assert set(rare[stratified_sample(rare, 5, 0, "subsample/train", least=1)]) == {0, 1, 2, 3, 4}
    plain = [stratified_sample(LABELS, size, 3, "x").tolist() for size in (10, 150, 900)]
    assert plain == [stratified_sample(LABELS, size, 3, "x", 1, 1).tolist() for size in (10, 150, 900)]


def test_with_many_repeats_a_fraction_is_one_of_the_different_texts() -> None:
    texts = [f"the text of number {i % 100}" for i in range(200)]
    stay, taken = carve(np.arange(200) % 2, text_keys(texts), 0.2, 0, "test")
    assert (len(taken), len(stay)) == (20, 160)
    few = [f"the text of number {i % 196}" for i in range(200)]  # as IMDB has: the rows are shared out as they stand
    stay, taken = carve(np.arange(200) % 2, text_keys(few), 0.2, 0, "test")
    np.testing.assert_array_equal(taken, stratified_sample(np.arange(200) % 2, 40, 0, "test"))


def test_repeats_go_where_their_text_goes_and_contradictions_stay() -> None:
    texts = [f"the text of number {i % 20}" for i in range(200)]
    labels = np.arange(200) % 2
    labels[40] = 1  # text 0 stands with both labels
    stay, taken = carve(labels, text_keys(texts), 0.25, 0, "test")
    assert len(taken) == 5 == len({texts[i] for i in taken})
    assert len(stay) == 150 and not {texts[i] for i in taken} & {texts[i] for i in stay}
    assert texts[0] in {texts[i] for i in stay}
    with pytest.raises(UserError, match=r"data.val_size: 19 asks for 19 of 19 rows; give a number from 1 to 17"):
        carve(labels, text_keys(texts), 19, 0, "val")


@pytest.mark.parametrize(
    ("size", "total", "rows"), [(0.1, 1000, 100), (7, 1000, 7), (7.0, 1000, 7), (1000, 1000, 1000)]
)
def test_sizes(size: int | float, total: int, rows: int) -> None:
    assert count_of(size, total, "data.val_size") == rows


@pytest.mark.parametrize("size", [0, 1, 1.0, -1, 1001, 0.0, 1.5, 0.0001, -0.5])
def test_impossible_sizes_are_refused_by_name(size: int | float) -> None:
    with pytest.raises(UserError, match=r"data\.val_size"):
        count_of(size, 1000, "data.val_size")


def test_repeats_are_found_whatever_their_case_spaces_and_signs() -> None:
    long = "a good film that everybody should see"
    keys = text_keys([f"{long}!", f"{long.upper()}  ?", f"{long}ö", f"{long}Ö.", f"the{long}"])
    assert keys[0] == keys[1]
    assert keys[2] == keys[3]
    assert len(set(keys)) == 3


def test_texts_of_other_meaning_are_no_repeats() -> None:
    pairs = [
        ("nice :)", "nice :("),
        ("Great film \U0001f44d", "Great film \U0001f44e"),
        ("C++", "C#"),
        ("\u0915\u093f", "\u0915\u0940"),
    ]
    pairs.append(
        ("a long text that ends well for everybody \U0001f44d", "a long text that ends well for everybody \U0001f44e")
    )
    for first, second in pairs:
        assert len(set(text_keys([first, second]))) == 2, first


def test_ascii_texts_have_the_same_key_as_by_the_general_rule() -> None:
    text = "".join(map(chr, range(128)))
    fast, general = text_keys([text, text + "\u2003"])  # a wide space, which no key counts
    assert fast == general


def test_folds_are_scikit_learn_s_and_each_row_is_in_one() -> None:
    labels = np.random.default_rng(0).permutation(LABELS)
    keys = text_keys([f"text number {i}" for i in range(len(labels))])
    folds = [take_fold(labels, keys, (k, 5), 3) for k in range(1, 6)]
    theirs = StratifiedKFold(5, shuffle=True, random_state=stream_seed(3, "fold") % 2**32).split(labels, labels)
    for (stay, taken), (train, test) in zip(folds, theirs, strict=True):
        np.testing.assert_array_equal(taken, test)
        np.testing.assert_array_equal(stay, train)
        np.testing.assert_array_equal(np.bincount(labels[taken]), [140, 40, 20])
    np.testing.assert_array_equal(np.sort(np.concatenate([taken for _, taken in folds])), np.arange(len(labels)))
    assert set(take_fold(labels, keys, (1, 5), 4)[1]) != set(folds[0][1])


@pytest.mark.parametrize("different", [196, 50])
def test_repeats_are_in_one_fold_and_many_of_them_are_tested_once(different: int) -> None:
    texts = [f"the text of number {i % different}" for i in range(200)]
    labels = np.arange(200) % different % 2
    if different == 50:
        labels[199] = 0  # text 49 stands with both labels
    tested: list[int] = []
    for k in range(1, 6):
        stay, taken = take_fold(labels, text_keys(texts), (k, 5), 0)
        assert not {texts[i] for i in stay} & {texts[i] for i in taken}
        tested += taken.tolist()
    assert sorted(tested) == list(range(200 if different == 196 else 49))


@pytest.mark.parametrize("fold", [[0, 5], [6, 5], [1, 1], [1, 701], [1], [1, 2, 3]])
def test_what_is_no_fold_is_refused(fold: list[int]) -> None:
    with pytest.raises(
        UserError, match=r"data.fold: .* is no fold \[k, n\], such as \[1, 5\]; with these rows n goes from 2 to 700"
    ):
        take_fold(LABELS, text_keys([f"text number {i}" for i in range(len(LABELS))]), fold, 0)
