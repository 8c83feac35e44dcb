"""What words add: against predictions of texts that were shortened by hand, and a linear model's own weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_lora import LoadedRun, load_run
from lightning_lora.cli import main
from lightning_lora.errors import UserError
from lightning_lora.inference.explain import (
    Explanation,
    coloured_words,
    deletion_check,
    explain_page,
    find_words,
    label_words,
    scores,
    without,
)
from tests.conftest import FILLER, WORDS, fit_tiny, make_rows

TEXT = "the film was awful, and (brilliant) in town"


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs that know their words: ``full`` of a fine-tuned base, and ``tfidf``."""
    place = fit_tiny(tmp_path_factory.mktemp("runs"), tiny_base, rows=400, epochs=1).parent
    words = ["fit", "--config", str(place / "tiny.yaml"), "--logs_dir", str(place)]
    full = ["--model.learning_rate", "1e-3", "--trainer.max_epochs", "6"]
    assert main([*words, "--name", "full", "--model.method", "full", *full]) == 0
    assert main([*words, "--name", "tfidf", "--model.method", "tfidf", "--trainer.max_epochs", "null"]) == 0
    return place


@pytest.fixture(scope="module")
def loaded(runs: Path) -> LoadedRun:
    return load_run(runs / "full", accelerator="cpu")


@pytest.mark.parametrize(
    ("text", "words", "second", "rest"),
    [
        (TEXT, TEXT.replace(",", "").replace("(", "").replace(")", "").split(), "film", TEXT.replace("film ", "")),
        ("Don't stop", ["Don't", "stop"], "stop", "Don't"),
        ("映画が good 😀", ["映", "画", "が", "good", "😀"], "画", "映が good 😀"),
        ("a\n b", ["a", "b"], "b", "a\n"),
        (("one two", "three"), ["one", "two", "three"], "two", ("one", "three")),
        ("...", [], None, None),
    ],
)
def test_words_are_found_and_left_out_with_a_space(text, words: list[str], second, rest) -> None:
    places = find_words(text)
    sides = [text] if isinstance(text, str) else text
    assert [sides[side][start:end] for side, start, end in places] == words
    if second:
        assert words[1] == second and without(text, [places[1]]) == rest
        assert not find_words(without(text, places))


def test_an_effect_is_the_fall_of_the_log_odds_without_the_word(loaded: LoadedRun) -> None:
    (found,) = loaded.explain([TEXT])
    words = TEXT.split()
    shortened = [TEXT, *(" ".join(words[:i] + words[i + 1 :]) for i in range(len(words)))]
    shortened = [text.replace(" and in", " and () in").replace("was and", "was, and") for text in shortened]
    predicted = loaded.predict(shortened)
    p = predicted.probabilities[:, loaded.label_names.index(found.label)]
    expected = np.log(p[0] / (1 - p[0])) - np.log(p[1:] / (1 - p[1:]))
    assert found.label == predicted.names[0] and found.probability == pytest.approx(p[0], abs=1e-6)
    np.testing.assert_allclose(found.effects, expected, atol=1e-4)
    (other,) = loaded.explain([TEXT], "neg" if found.label == "pos" else "pos")
    np.testing.assert_allclose(other.effects, -found.effects, atol=1e-4)  # of two classes


def test_words_that_are_cut_off_count_nothing_and_take_no_prediction(loaded: LoadedRun, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(LoadedRun, "predict_dataset", lambda self, data: asked.append(len(data)) or plain(self, data))
    room = loaded.input_format.text_tokens
    (found,) = loaded.explain([" ".join(f"{word}" for word in (FILLER * 9)[: room + 20])])
    # Of the last that is read another moves into its place; then nothing changes.
    assert found.read[:room].all() and not found.read[room + 1 :].any() and not found.effects[room + 1 :].any()
    assert asked == [1 + found.read.sum()] and "words change no token: cut off, or unknown" in found.summary


plain = LoadedRun.predict_dataset


def test_without_the_words_that_count_most_the_answer_changes_more_than_without_random_ones(loaded) -> None:
    found = loaded.explain([text for text, _ in make_rows(20, seed=5)])
    most, random = deletion_check(loaded, found)
    assert (most > random).mean() > 0.8 and most.mean() > 2 * abs(random.mean())
    shuffled = [replace(each, effects=np.random.default_rng(0).permutation(each.effects)) for each in found]
    assert most.mean() > deletion_check(loaded, shuffled)[0].mean()


def test_the_words_of_a_label_are_those_that_the_rows_were_made_of(loaded: LoadedRun) -> None:
    found = loaded.explain([text.title() for text, _ in make_rows(40, seed=6)])
    for label, words in label_words(found).items():
        top = [word for word, *_ in words[:4]]
        assert set(top) <= {*WORDS[label]}, (label, words[:8])
        assert [effect for *_, effect in words] == sorted((effect for *_, effect in words), reverse=True)
    assert label_words(found, min_texts=1000) == {"neg": [], "pos": []}


def test_of_tfidf_a_word_adds_what_the_prediction_lacks_without_it(runs: Path) -> None:
    loaded = load_run(runs / "tfidf", accelerator="cpu")
    (found,) = loaded.explain(["the film was awful"])
    predicted = loaded.predict(["the film was awful", "the film was"])
    logits = scores(predicted)[:, loaded.label_names.index(found.label)]
    assert dict(found.top(1)) == {"awful": pytest.approx(logits[0] - logits[1])} and found.label == "neg"


@pytest.mark.parametrize("text", ["fine", "!!!", "\U0001f600"])
def test_texts_of_one_word_or_none_are_explained(loaded: LoadedRun, text: str) -> None:
    (found,) = loaded.explain([text])
    assert np.isfinite(found.effects).all() and len(found.words) == len(find_words(text))
    assert text in coloured_words(found)


def test_what_cannot_be_explained_is_refused(loaded: LoadedRun) -> None:
    with pytest.raises(UserError, match="text 1: a text is needed"):
        loaded.explain(["fine", " "])
    with pytest.raises(UserError, match="no label 'poss'; did you mean pos"):
        loaded.explain(["fine"], "poss")
    assert loaded.explain([]) == []


def test_colours_follow_sign_and_size_and_texts_are_escaped() -> None:
    text = "good <b> bad so"
    effects, read = np.array([2.0, 0.01, -1.0, 0.0]), np.array([True, True, True, False])
    found = Explanation(text, "a<b", 0.0, find_words(text), effects, read)
    html = coloured_words(found)
    assert '<span class="more" style="--a: 0.55" title="+2.000">good</span>' in html
    assert '<span class="less" style="--a: 0.28" title="-1.000">bad</span>' in html
    assert '&lt;<span title="+0.010">b</span>&gt;' in html and 'not read">so</span>' in html
    page = explain_page("<run>", [found])
    assert "<b>" not in page and "&lt;run&gt;" in page and "http" not in page and "<script" not in page
    assert found.top(9) == [("good", 2.0), ("bad", -1.0), ("b", 0.01)]
