"""The facts of a data card against pandas, on rows with planted faults, and the warnings about them."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lightning_lora.config.settings import make_parser
from lightning_lora.data import findings
from lightning_lora.data.datamodule import TextDataModule
from lightning_lora.data.facts import DataFacts, faults_of, gather_facts
from lightning_lora.data.findings import find_suspicious
from tests.conftest import PAIR_HEADER, make_pairs, make_rows, write_csv


def facts_of(source: object, base: Path, **settings: object) -> tuple[DataFacts, list[str]]:
    facts = gather_facts(TextDataModule(source, str(base), max_length=16, **settings))  # type: ignore[arg-type]
    return facts, find_suspicious(facts)


def only(found: list[str], word: str) -> str:
    (said,) = [each for each in found if word in each]
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three splits without a fault, but that words tell the class."""
    rows = make_rows(300, ("neg", "pos", "mixed"))
    for name, part in (("train", rows[:200]), ("val", rows[200:240]), ("test", rows[240:])):
        write_csv(tmp_path / f"{name}.csv", part)
    return tmp_path


def plant(folder: Path, split: str, *rows: tuple[str, ...]) -> None:
    frame = pd.read_csv(folder / f"{split}.csv")
    pd.concat([frame, pd.DataFrame(rows, columns=frame.columns)]).to_csv(folder / f"{split}.csv", index=False)


def first_text(folder: Path, split: str, at: int) -> str:
    return pd.read_csv(folder / f"{split}.csv")["text"][at]


def test_sizes_classes_and_lengths(folder: Path, tiny_base: Path) -> None:
    from transformers import AutoTokenizer

    facts, found = facts_of(str(folder), tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    for split, each in facts.splits.items():
        frame = pd.read_csv(folder / f"{split}.csv")
        lengths = np.array([len(ids) for ids in tokenizer(frame["text"].tolist()).input_ids])
        assert each.rows == len(frame) and each.lengths.tolist() == lengths.tolist()
        assert each.class_counts == frame["label"].value_counts().loc[facts.datamodule.label_names].tolist()
        assert each.cut_share == pytest.approx((lengths > 16).mean())
        assert not each.repeats.count and not any(fault.count for fault in each.faults.values())
    nine = int(np.quantile(facts.splits["train"].lengths, 0.9))
    whole = (facts.splits["train"].lengths <= nine).mean()
    assert f"data.max_length={nine} keeps {whole:.0%} whole" in only(found, "are cut at")
    assert len(found) == 2 and "word alone" in found[0]
    assert facts_of(str(folder), tiny_base, truncation="windows")[0].splits["train"].cut_share == 0


def test_repeats_and_contradictions(folder: Path, tiny_base: Path) -> None:
    texts = [first_text(folder, "train", i) for i in range(3)]
    label = pd.read_csv(folder / "train.csv")["label"]
    plant(folder, "train", *((f"{texts[i].upper()} !", label[i]) for i in range(2)), (texts[2], label[0]))
    plant(folder, "train", (first_text(folder, "test", 0), label[0]))
    facts, found = facts_of(str(folder), tiny_base)
    train = facts.splits["train"]
    frame = pd.read_csv(folder / "train.csv")
    frame["key"] = frame["text"].str.lower().str.replace(r"\W", "", regex=True)
    assert train.repeats.count == frame.duplicated("key").sum() == 3
    contradicted = frame.groupby("key")["label"].nunique() > 1
    assert train.conflicts.count == contradicted.sum() == 1
    assert facts.datamodule.prepared.duplicates_removed["train_in_test"] == 1 and train.rows == 203
    assert f"{label[0]}, but {label[2]} in {folder / 'train.csv'}, line 4" in only(found, "another label")
    assert f"{folder / 'train.csv'}, line 204" in train.conflicts.example
    assert f"as {folder / 'train.csv'}, line 2" in only(found, "each counts as often")
    assert found[0] == only(found, "another label")  # the gravest first


def test_a_contradiction_that_carving_took_apart_is_said_still(tmp_path: Path, tiny_base: Path) -> None:
    rows = make_rows(60)
    path = write_csv(tmp_path / "rows.csv", [*rows, (rows[0][0], "pos")])
    apart = []
    for seed in range(6):
        facts, found = facts_of(str(path), tiny_base, split_seed=seed)
        only(found, "another label")
        apart.append(not any(each.conflicts.count for each in facts.splits.values()))
    assert {*apart} == {True, False}


def test_near_repeats_across_splits(folder: Path, tiny_base: Path) -> None:
    long = [text for text in pd.read_csv(folder / "train.csv")["text"] if len(text) > 90]
    plant(folder, "test", (f"{long[0]} zebra", "neg"), (f"{long[1]} zebra", "neg"))
    plant(folder, "val", (f"{long[2]} zebra", "neg"))
    facts, found = facts_of(str(folder), tiny_base)
    assert facts.splits["test"].near["train"].count == 2 and facts.splits["val"].near["train"].count == 1
    said = only(found, "near-duplicates")
    assert "2 of 62 test rows in train, 1 of 41 val rows in train" in said
    where = pd.read_csv(folder / "train.csv")["text"].tolist().index(long[0]) + 2
    assert f"{folder / 'test.csv'}, line 62: '" in said and f"like {folder / 'train.csv'}, line {where})" in said


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("the cafÃ© was fine", ["misread"]),
        ("it isnâ€™t fine", ["misread"]),
        ("a smile ðŸ˜€ here", ["misread"]),
        ("Ð¼Ð¾Ñ\x81ÐºÐ²Ð° in latin one", ["misread"]),
        ("the café isn’t fine, naïve Ärger, São Paulo, CAFÉ’S, 😀, Москва, 東京", []),
        ("a lost \N{REPLACEMENT CHARACTER} letter", ["lost"]),
        ("one<br />two", ["html"]),
        ("ham &amp; eggs, it&#39;s", ["html"]),
        ("a < b and c > d, AT&T; 3 <4> 5, <-- here", []),
        (("A fine  film", "a fine film"), ["same sides"]),
        (("a fine film", "a dull film"), []),
        ("plain words", []),
    ],
)
def test_faults_of_texts(text, kinds: list[str]) -> None:
    assert [kind for kind, _ in faults_of(text)] == kinds


def test_misread_letters_are_those_that_decoding_wrongly_makes() -> None:
    for word in ("crème", "Ünal", "žluť", "naïve", "“quoted”", "wörk—done", "привет", "日本語", "😀"):
        misread = "".join(chr(byte) for byte in word.encode())  # as Latin-1
        assert "misread" in dict(faults_of(misread)) and "misread" not in dict(faults_of(word)), word


def test_faults_are_counted_by_split_with_the_place_of_the_first(folder: Path, tiny_base: Path) -> None:
    padding = "a long story " * 8
    plant(folder, "train", (f"{padding}with a cafÃ© and more words", "neg"), (f"<br> {padding}", "neg"))
    plant(folder, "test", ("a \N{REPLACEMENT CHARACTER} b town", "neg"), ("two cafÃ© people in town", "neg"))
    facts, found = facts_of(str(folder), tiny_base)
    counts = {(split, kind): f.count for split, each in facts.splits.items() for kind, f in each.faults.items()}
    planted = {("train", "misread"), ("train", "html"), ("test", "lost"), ("test", "misread")}
    assert {place for place, count in counts.items() if count} == planted and set(counts.values()) == {0, 1}
    said = only(found, "decoded wrongly")
    assert "1 of train, 1 of test" in said and f"{folder / 'train.csv'}, line 202: '..." in said and "cafÃ©" in said
    assert "write the file again" in said and "<br>" in only(found, "hold HTML")
    _, found = facts_of(str(folder), tiny_base, encoding="utf-8")
    assert "data.encoding=utf-8 is probably wrong" in only(found, "decoded wrongly")


def test_few_rows_and_imbalance(folder: Path, tiny_base: Path) -> None:
    plant(folder, "train", *((f"a rare thing in town {i} and dog", "rare") for i in range(5)))
    _, found = facts_of(str(folder), tiny_base)
    assert "fewer than 8 rows of rare (5)" in only(found, "hardly learned")
    assert "'neg' has 13 times the rows of 'rare' (67 and 5)" in only(found, "class_weights")
    assert any("val has no row of rare" in each for each in found)


def test_a_word_that_tells_the_class(folder: Path, tiny_base: Path) -> None:
    frame = pd.read_csv(folder / "train.csv")
    chosen = frame["label"] == "pos"
    frame.loc[chosen, "text"] += " Refid"
    frame.to_csv(folder / "train.csv", index=False)
    facts, found = facts_of(str(folder), tiny_base)
    word = next(each for each in facts.discriminative if each.label == "pos")
    assert (word.word, word.rows, word.precision, word.coverage) == ("refid", int(chosen.sum()), 1, 1)
    assert f"'refid' pos ({chosen.sum()} texts, 100% of the class)" in only(found, "word alone")
    frame["text"] = [
        f"{text} {'' if i % 4 else 'refid'}" for i, text in enumerate(frame["text"])
    ]  # in other classes too
    frame["text"] = (
        frame["text"].str.split().map(lambda words: " ".join(w for w in words if w in ("the", "refid") or len(w) < 3))
    )
    frame["text"] += [f" t{i}" for i in range(len(frame))]
    frame.to_csv(folder / "train.csv", index=False)
    assert facts_of(str(folder), tiny_base)[0].discriminative == []


def test_several_labels(tmp_path: Path, tiny_base: Path) -> None:
    rows = [(text, ("a;b", "a", "", "b;c")[i % 4]) for i, (text, _) in enumerate(make_rows(120))]
    path = write_csv(tmp_path / "rows.csv", [(text, labels or " ; ") for text, labels in rows])
    facts, _ = facts_of(str(path), tiny_base, label_separator=";")
    counts = pd.Series([labels for _, labels in rows if labels]).str.split(";").explode().value_counts().sort_index()
    assert sum(np.array(each.class_counts) for each in facts.splits.values()).tolist() == counts.tolist()
    assert sum(each.unlabelled for each in facts.splits.values()) == sum(not labels for _, labels in rows)


def test_numbers(folder: Path, tiny_base: Path) -> None:
    for split in ("train", "val", "test"):
        frame = pd.read_csv(folder / f"{split}.csv")
        frame.assign(label=np.arange(len(frame)) / 4).to_csv(folder / f"{split}.csv", index=False)
    plant(folder, "train", (first_text(folder, "train", 1), 77))
    facts, found = facts_of(str(folder), tiny_base, task="regression")
    assert facts.splits["train"].numbers.tolist() == [*np.arange(200) / 4, 77]
    assert facts.discriminative == [] and not any(each.class_counts for each in facts.splits.values())
    said = only(found, "another label")
    assert "77, but 0.25 in" in said and "one number a text" in said and "label_separator" not in said


def test_pairs(tmp_path: Path, tiny_base: Path) -> None:
    pairs = make_pairs(100)
    path = write_csv(tmp_path / "pairs.csv", [*pairs, *((a, a.upper(), "same") for a, _, _ in pairs[:5])], PAIR_HEADER)
    facts, found = facts_of(str(path), tiny_base, text_column=["premise", "hypothesis"])
    assert sum(each.faults["same sides"].count for each in facts.splits.values()) == 5
    assert "pairs of the same text" in only(found, "same text") and "windows" not in only(found, "are cut at")


def test_known_data_have_terms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_lora.data import specs as module
    from lightning_lora.data.specs import DATASETS

    assert all(spec.terms and spec.citation for spec in DATASETS)
    monkeypatch.setattr(module, "find_spec", lambda source: DATASETS[0])
    assert module.terms_of(str(folder)) == DATASETS[0].terms


def test_every_setting_that_is_named_exists() -> None:
    known = {action.dest for action in make_parser("fit")._actions}
    named = set(
        re.findall(r"\b(?:data|model|trainer)\.[a-z_]+", Path(findings.__file__).read_text().partition("def ")[2])
    )
    assert named and named <= known
