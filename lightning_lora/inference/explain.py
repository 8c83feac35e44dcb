"""What each word of a text adds to its prediction: occlusion, by leaving the words out one at a time.

An effect is the score of the text less that of the text without the word (leave-one-out; Li et al. 2016,
arXiv:1612.08220). The score is the log-odds of a label, ln(p / (1 - p)), or the predicted number. It takes a prediction
for each word, and works for every model that a run can hold.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from scipy.special import logsumexp

from lightning_lora.config.argument_parser import did_you_mean
from lightning_lora.data.pairs import Text
from lightning_lora.errors import UserError
from lightning_lora.evaluation.outputs import Outputs
from lightning_lora.training.baselines import TextBaseline

if TYPE_CHECKING:
    from lightning_lora.inference.loaded_run import LoadedRun

#: Scripts that are written without spaces (kana, Han): each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+(?:['’\-][^\W{_UNSPACED}]+)*|[\u2600-\u27bf\U0001f300-\U0001faff]")
#: What every page says first.
ABOUT = (
    "Each word was left out once, and the text predicted again. A word's effect is how much the score falls without "
    "it: the label's log-odds, ln(p / (1 - p)), or the predicted number."
)
_TEMPLATES = Environment(
    loader=PackageLoader("lightning_lora", "inference"), undefined=StrictUndefined, trim_blocks=True, autoescape=True
)
#: As HTML: a text with coloured words, their style sheet, and what the colours mean.
_WORDS: Any = _TEMPLATES.get_template("words.html.j2").module
coloured_words, words_style, words_legend = _WORDS.coloured, _WORDS.style, _WORDS.legend
#: A word's place: which side of a pair (0 of a text), start and end.
Place = tuple[int, int, int]


@dataclass(frozen=True)
class Explanation:
    """What each word of a text adds to one label, or to the number that is predicted.

    Args:
        text: The text, or pair of texts.
        label: The label; of regression the name of the number.
        score: The label's log-odds, or the number.
        places: Where each of the W words stands.
        effects: What each word adds to the score, (W,): it falls by so much without the word. 0 for a word that is
            not read.
        read: Whether the model reads a word, (W,): not what is cut off of a long text, nor what its tokenizer does not
            know beside another such word.
        is_number: Whether the score is a predicted number.
    """

    text: Text
    label: str
    score: float
    places: Sequence[Place]
    effects: NDArray
    read: NDArray
    is_number: bool = False

    @property
    def words(self) -> list[str]:
        """The words, in their order; those of the second text of a pair follow those of the first."""
        sides = _sides(self.text)
        return [sides[side][start:end] for side, start, end in self.places]

    @property
    def probability(self) -> float | None:
        """The label's probability; None of a number."""
        return None if self.is_number else float(1 / (1 + np.exp(-self.score)))

    @property
    def summary(self) -> str:
        """What is explained, in a line."""
        said = f": {self.score:.4g}" if self.is_number else f", probability {self.probability:.3f}"
        unread = f"{(~self.read).sum()} of {len(self.read)} words"
        cut = "" if self.read.all() else f" ({unread} change no token: cut off, or unknown)"
        return self.label + said + cut

    def top(self, count: int) -> list[tuple[str, float]]:
        """The words that change the score most, either way, each with its effect."""
        order = np.argsort(-np.abs(self.effects), kind="stable")[:count]
        return [(self.words[i], float(self.effects[i])) for i in order if self.read[i]]

    def pieces(self) -> list[list[tuple[str, float | None, float, bool]]]:
        """Each side of the text cut into words and what is between: text, effect (None between), strength, read.

        The strength is the size of the effect, 1 for the largest.
        """
        largest, sides = max(np.abs(self.effects).max(initial=0.0), 1e-12), []
        for number, side in enumerate(_sides(self.text)):
            pieces, last = list[tuple[str, float | None, float, bool]](), 0
            for (which, start, end), effect, read in zip(self.places, self.effects, self.read, strict=True):
                if which == number:
                    pieces.append((side[last:start], None, 0.0, True))
                    pieces.append((side[start:end], float(effect), float(abs(effect) / largest), bool(read)))
                    last = end
            sides.append([*pieces, (side[last:], None, 0.0, True)])
        return sides


def _sides(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def find_words(text: Text) -> list[Place]:
    """Where the words of a text or pair stand; punctuation is none."""
    return [(side, *found.span()) for side, each in enumerate(_sides(text)) for found in _WORD.finditer(each)]


def without(text: Text, places: Sequence[Place]) -> Text:
    """The text without some words, each taken out with a space beside it."""
    sides = list(_sides(text))
    for side, start, end in sorted(places, reverse=True):
        before, after = sides[side][:start], sides[side][end:]
        if before[-1:].isspace() and (not after or after[0].isspace()):
            before = before[:-1]
        sides[side] = before + after if before else after.lstrip()
    return sides[0] if isinstance(text, str) else (sides[0], sides[1])


def scores(outputs: Outputs) -> NDArray:
    """Log-odds of each class or label, or the predicted number; float64, (N, C)."""
    logits = outputs.logits.astype(np.float64)
    if outputs.task != "single_label":
        return logits
    others = [logsumexp(np.delete(logits, i, axis=1), axis=1) for i in range(logits.shape[1])]
    return logits - np.stack(others, axis=1)


def explain(
    run: "LoadedRun",
    texts: Sequence[Text],
    label: str | None = None,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[Explanation]:
    """Return what each word adds; as ``LoadedRun.explain``."""
    names, task = list(run.label_names), run.model.task
    if label is not None and task == "regression":
        raise UserError(f"label: the run predicts a number, and '{label}' is no label of it; leave it out")
    if label is not None and label not in names:
        close = did_you_mean(label, names)
        raise UserError(f"label: the run has no label '{label}'{close or '; it has ' + ', '.join(names[:20])}")
    found: list[Explanation] = []
    for text in texts:
        places = find_words(text)
        # What makes no difference to what the model reads needs no prediction.
        shortened = [without(text, [place]) for place in places]
        read = _differs(run, text, shortened)
        outputs = run.predict_dataset(run.dataset([text, *(shortened[i] for i in np.flatnonzero(read))]))
        values = scores(outputs)
        effects = np.zeros((len(places), values.shape[1]))
        effects[read] = values[0] - values[1:]
        explained = [names.index(label)] if label else _predicted(outputs)
        found += [
            Explanation(text, names[i], float(values[0, i]), places, effects[:, i], read, task == "regression")
            for i in explained
        ]
        advance(1)
    return found


def _predicted(outputs: Outputs) -> list[int]:
    """The labels that the first row is given; the most probable where there is none."""
    if outputs.task == "regression":
        return [0]
    if outputs.task == "multi_label":
        return np.flatnonzero(outputs.predicted[0]).tolist() or [int(outputs.logits[0].argmax())]
    return [int(outputs.predicted[0])]


def _differs(run: "LoadedRun", text: Text, others: Sequence[Text]) -> NDArray:
    """Whether the model reads something else of each of the other texts than of the text."""
    if isinstance(run.model, TextBaseline) or not others:  # which reads all of it
        return np.ones(len(others), bool)
    tokens = run.dataset([text, *others]).tokens
    inputs = [[part.tobytes() for part in run.input_format.inputs(tokens[i])] for i in range(len(others) + 1)]
    return np.array([each != inputs[0] for each in inputs[1:]])


def deletion_check(
    run: "LoadedRun", explanations: Sequence[Explanation], share: float = 0.1, seed: int = 0
) -> tuple[NDArray, NDArray]:
    """Leave out the words of each text that add most, and as many random ones.

    Args:
        run: The run that the explanations are of.
        explanations: N explanations.
        share: How many of the words, at least one.
        seed: For the random ones.

    Returns:
        How much the score falls without those that add most, and without the random ones; (N,) each. Of a faithful
        explanation the first is larger (comprehensiveness; DeYoung et al. 2020, arXiv:1911.03429).
    """
    random, texts, indices = np.random.default_rng(seed), list[Text](), list[int]()
    for each in explanations:
        read = np.flatnonzero(each.read)
        count = min(max(1, round(share * len(read))), len(read))
        for chosen in (read[np.argsort(-each.effects[read], kind="stable")[:count]], random.permutation(read)[:count]):
            texts.append(without(each.text, [each.places[i] for i in chosen]))
            indices.append(list(run.label_names).index(each.label))
    after = scores(run.predict_dataset(run.dataset(texts)))[np.arange(len(texts)), indices]
    falls = np.array([each.score for each in explanations])[:, None] - after.reshape(-1, 2)
    return falls[:, 0], falls[:, 1]


def label_words(explanations: Sequence[Explanation], min_texts: int = 3) -> dict[str, list[tuple[str, int, float]]]:
    """The words of each label by what they add to it on average, over at least ``min_texts`` texts, the largest first.

    They are in lower case, each with the number of texts and the mean over them.
    """
    effects: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in explanations:
        words = np.array([word.lower() for word in each.words])
        for word in dict.fromkeys(words[each.read].tolist()):
            effects[each.label][word].append(float(each.effects[each.read & (words == word)].mean()))
    found = {
        label: [(word, len(v), float(np.mean(v))) for word, v in words.items() if len(v) >= min_texts]
        for label, words in sorted(effects.items())
    }
    return {label: sorted(words, key=lambda row: -row[2]) for label, words in found.items()}


def explain_page(
    title: str,
    explanations: Sequence[Explanation],
    lines: Sequence[str] = (),
    tables: Sequence[tuple[str, Sequence[tuple[str, int, float]]]] = (),
    issues: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return a page with explained texts.

    Args:
        title: Its heading.
        explanations: The texts.
        lines: More to say at the top.
        tables: Names with words, in how many texts they occur, and what they add on average.
        issues: Rows that are most likely labelled wrong: label, prediction, quality, origin, row and text.
    """
    return _TEMPLATES.get_template("explain.html.j2").render(
        title=title,
        about=ABOUT,
        lines=lines,
        tables=tables,
        issues=issues,
        explanations=explanations,
        is_number=any(each.is_number for each in explanations),
    )
