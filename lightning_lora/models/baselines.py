"""What a fine-tuned model must beat: the majority class, TF-IDF and a linear probe, fitted without gradient steps.

Classifiers and their choice are scikit-learn's; what they find is kept as tensors and words, never pickled.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_lora.models.pooling import mean_state

#: N-grams of TF-IDF, by the name of the features: keywords of scikit-learn's ``TfidfVectorizer``.
NGRAMS: dict[str, dict[str, Any]] = {
    "words": {"analyzer": "word", "ngram_range": (1, 2)},
    "characters": {"analyzer": "char_wb", "ngram_range": (2, 5)},
}
#: Most frequent n-grams of each kind that are kept.
MOST_NGRAMS = 200_000
#: Inverse strengths of regularization that are tried, on TF-IDF and on standardized states.
TFIDF_C = (1.0, 10.0, 100.0)
PROBE_C = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)
#: How the states of a text's tokens become one: the first token's, their mean, the last token's.
POOLINGS = ("first", "mean", "last")
#: The logit of a class that no training row has, beside others around 0.
_NEVER = -30.0


@dataclass(frozen=True)
class Features:
    """One way to see the rows.

    Args:
        name: What is chosen, in words.
        train: Features of the training rows, (N, F), dense or sparse.
        val: Those of the validation rows, (M, F).
    """

    name: str
    train: Any
    val: Any


@dataclass(frozen=True)
class Regression:
    """A logistic or ridge regression that was chosen on validation rows.

    Args:
        weight: float32, (C, F).
        bias: float32, (C,).
        val_logits: Its logits of the validation rows, (M, C).
        chosen: For the run record: the name of its features, its C, and by features and C the validation F1, of numbers
            the mean squared error, of all that were tried.
    """

    weight: Tensor
    bias: Tensor
    val_logits: Tensor
    chosen: dict[str, Any]


def choose_regression(
    several: Iterator[Features],
    labels: np.ndarray,
    val_labels: np.ndarray,
    classes: int,
    cs: Sequence[float],
    class_weights: Tensor | None = None,
) -> Regression:
    """Fit a logistic regression for each kind of features and each C; return the best on validation rows.

    The best has the highest macro F1, of equal ones the lowest loss. Of several labels there is a regression for each,
    judged from a probability of 0.5 on; of numbers a ridge regression, judged by its loss.

    Args:
        several: The kinds of features, which are made one after another.
        labels: Of the training rows, (N,), of several labels (N, C).
        val_labels: Of the validation rows, (M,), of several labels (M, C).
        classes: C.
        cs: Inverse strengths of regularization, ascending.
        class_weights: Of the rows of each class, or of those that have each label, beside 1 of the others, (C,).
    """
    from sklearn.linear_model import LogisticRegression

    numbers = labels.dtype.kind == "f" and labels.ndim == 1
    tried: dict[str, float] = {}  # of the run record: what each choice came to, the same for all of them
    found: list[tuple[tuple[float, float], Regression]] = []
    for features in several:
        models = [LogisticRegression(max_iter=1000, warm_start=True) for _ in range(classes)]
        for model, weights in zip(models, _row_weights(labels, classes, class_weights), strict=True):
            model.set_params(class_weight=weights)
        for c in cs:
            weight, bias = _fit_linear(models, features.train, labels, c)
            logits = torch.from_numpy(np.asarray(features.val @ weight.numpy().T)).float() + bias
            score, loss = _judge(logits, val_labels)
            tried[f"{features.name}, C {c:g}"] = loss if numbers else score
            chosen = {"features": features.name, "C": c, "val_mse" if numbers else "val_f1_macro": tried}
            found.append(((score, -loss), Regression(weight, bias, logits, chosen)))
    return max(found, key=lambda each: each[0])[1]


def _row_weights(labels: np.ndarray, classes: int, class_weights: Tensor | None) -> list[dict[int, float] | None]:
    """Return the ``class_weight`` of each of C regressions, of which one does for labels (N,)."""
    if class_weights is None:
        return [None] * classes
    if labels.ndim == 2:
        return [{0: 1.0, 1: float(weight)} for weight in class_weights]
    return [{int(each): float(class_weights[each]) for each in np.unique(labels)}] * classes


def _fit_linear(models: Sequence[Any], rows: Any, labels: np.ndarray, c: float) -> tuple[Tensor, Tensor]:
    """Weights (C, F) and biases (C,) of a regression; logistic ones are fitted from where the models were."""
    from sklearn.linear_model import Ridge

    if labels.ndim == 2:
        each = [_of_label(model.set_params(C=c), rows, own) for model, own in zip(models, labels.T, strict=True)]
        weight, bias = (np.stack(parts) for parts in zip(*each, strict=True))
    elif labels.dtype.kind == "f":
        ridge = Ridge(alpha=1 / c).fit(rows, labels)
        weight, bias = ridge.coef_[None], np.atleast_1d(ridge.intercept_)
    else:
        weight, bias = _of_all_classes(models[0].set_params(C=c).fit(rows, labels), len(models))
    return torch.from_numpy(weight).float(), torch.from_numpy(bias).float()


def _judge(logits: Tensor, labels: np.ndarray) -> tuple[float, float]:
    """The macro F1 of logits (M, C), of numbers the negative loss, and the loss."""
    from sklearn.metrics import f1_score

    truth = torch.from_numpy(labels)
    if labels.ndim == 2:
        score = f1_score(labels, (logits >= 0).numpy(), average="macro", zero_division=0)
        return float(score), float(nn.functional.binary_cross_entropy_with_logits(logits, truth.float()))
    if labels.dtype.kind == "f":
        loss = float(((logits[:, 0].numpy() - labels) ** 2).mean())
        return -loss, loss
    score = f1_score(labels, logits.argmax(1).numpy(), average="macro")
    return float(score), float(nn.functional.cross_entropy(logits, truth.long()))


def _of_label(model: Any, rows: Any, has: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (F,) and bias () of a logistic regression for one label; of one that all rows have, or none, constant."""
    if len(np.unique(has)) < 2:
        return np.zeros(rows.shape[1]), np.array(-_NEVER if has[0] else _NEVER)
    model.fit(rows, has)
    return model.coef_[0], model.intercept_[0]


def _of_all_classes(model: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """The weights (C, F) and biases (C,) of a fitted logistic regression, with all classes, whose softmax it says."""
    coefficients, intercepts = model.coef_, model.intercept_
    if len(model.classes_) == 2:  # one row: the logit of the second class against the first
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    weight, bias = np.zeros((classes, coefficients.shape[1])), np.full(classes, _NEVER)
    weight[model.classes_], bias[model.classes_] = coefficients, intercepts
    return weight, bias


class Majority(nn.Module):
    """Gives every text the shares of the classes or labels among the training rows, or the mean of their numbers."""

    val_logits: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))

    def fit(self, texts: Sequence[str], labels: np.ndarray, val_texts: Sequence[str] = (), *_: Any) -> dict[str, Any]:
        """Count the training rows of each class, whatever they weigh; return what was chosen: nothing."""
        if labels.dtype.kind == "f":
            self.bias.data = torch.tensor([labels.mean()]).float()
        elif labels.ndim == 2:
            self.bias.data = torch.logit(torch.from_numpy(labels.mean(axis=0)), 1e-9).float()
        else:
            counts = np.bincount(labels, minlength=len(self.bias))
            self.bias.data = torch.log(torch.from_numpy(np.maximum(counts, 1e-9) / len(texts))).float()
        self.val_logits = self.forward(val_texts)
        return {}

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Logits (B, C) of B texts."""
        return self.bias.detach().expand(len(texts), -1)


class Tfidf(nn.Module):
    """Logistic regression on TF-IDF weighted n-grams of words, or of words and characters."""

    val_logits: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, 0))
        self.bias = nn.Parameter(torch.zeros(classes))
        #: By kind of n-gram: the n-grams in the order of their columns, and their inverse document frequencies.
        self.ngrams: dict[str, tuple[list[str], list[float]]] = {}
        self._vectorizers: list[Any] = []

    def fit(
        self,
        texts: Sequence[str],
        labels: np.ndarray,
        val_texts: Sequence[str],
        val_labels: np.ndarray,
        class_weights: Tensor | None = None,
    ) -> dict[str, Any]:
        """Fit to training texts; n-grams and C are chosen on validation rows. Return what was chosen."""
        from scipy.sparse import hstack
        from sklearn.feature_extraction.text import TfidfVectorizer

        made: dict[str, Any] = {}

        def features() -> Iterator[Features]:
            train, val = [], []
            for kind, options in NGRAMS.items():
                made[kind] = TfidfVectorizer(sublinear_tf=True, max_features=MOST_NGRAMS, dtype=np.float32, **options)
                train.append(made[kind].fit_transform(texts))
                val.append(made[kind].transform(val_texts))
                yield Features(" and ".join(made), hstack(train, "csr"), hstack(val, "csr"))

        best = choose_regression(features(), labels, val_labels, len(self.bias), TFIDF_C, class_weights)
        self.weight.data, self.bias.data, self.val_logits = best.weight, best.bias, best.val_logits
        self.ngrams = {
            kind: (made[kind].get_feature_names_out().tolist(), made[kind].idf_.tolist())
            for kind in best.chosen["features"].split(" and ")
        }
        self._vectorizers = []
        return best.chosen

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Logits (B, C) of B texts."""
        from scipy.sparse import hstack

        self._vectorizers = self._vectorizers or [self._vectorizer(kind) for kind in self.ngrams]
        found = hstack([vectorizer.transform(texts) for vectorizer in self._vectorizers], "csr")
        return torch.from_numpy(found @ self.weight.detach().numpy().T).float() + self.bias.detach()

    def _vectorizer(self, kind: str) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        words, idf = self.ngrams[kind]
        vectorizer = TfidfVectorizer(sublinear_tf=True, vocabulary=words, dtype=np.float32, **NGRAMS[kind])
        vectorizer.idf_ = np.array(idf)
        return vectorizer

    def get_extra_state(self) -> dict[str, Any]:
        """The n-grams, which a checkpoint holds beside the weights."""
        return {"ngrams": self.ngrams}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take the n-grams of a checkpoint."""
        self.ngrams, self._vectorizers = state["ngrams"], []

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Take weights of as many n-grams as were found in training."""
        self.weight.data = torch.zeros_like(state_dict[f"{prefix}weight"])
        super()._load_from_state_dict(state_dict, prefix, *args)


#: Baselines that read texts, without a base model.
TEXT_BASELINES: dict[str, type[Majority] | type[Tfidf]] = {"majority": Majority, "tfidf": Tfidf}


class Probe(nn.Module):
    """A frozen encoder whose pooled states a logistic regression classifies (linear probing).

    Alain and Bengio 2016, arXiv:1610.01644.

    Args:
        model: A ``...ForSequenceClassification`` model of transformers, whose own head is not used.
        classes: C.
    """

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        self.encoder = getattr(model, model.base_model_prefix).requires_grad_(False)
        self.config = model.config
        self.classifier = nn.Linear(self.config.get_text_config().hidden_size, classes)
        #: The position in ``POOLINGS``.
        self.register_buffer("pooling", torch.tensor(0))
        #: Of the validation rows, (M, C), once it is fitted.
        self.val_logits = torch.zeros(0, classes)
        #: Whether ``forward`` gives pooled states in place of logits.
        self.gives_states = False

    def set_attn_implementation(self, name: str) -> None:
        """Set the implementation of the attention."""
        self.encoder.set_attn_implementation(name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **types: Tensor) -> Any:
        """Logits (B, C) of token ids (B, T), mask and types; or states (B, P D), one after another by ``POOLINGS``."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types)[0].float()
        if self.gives_states:
            return SequenceClassifierOutput(logits=torch.cat([pool(states, attention_mask, p) for p in POOLINGS], 1))
        pooled = pool(states, attention_mask, POOLINGS[int(self.get_buffer("pooling"))])
        return SequenceClassifierOutput(logits=self._logits(pooled))

    def classify(self, states: Tensor) -> Tensor:
        """Logits (B, C) of states (B, P D) as ``forward`` gives them."""
        return self._logits(states.chunk(len(POOLINGS), 1)[int(self.get_buffer("pooling"))])

    def _logits(self, pooled: Tensor) -> Tensor:
        with torch.autocast(pooled.device.type, enabled=False):
            return self.classifier(pooled)

    def fit(
        self,
        states: np.ndarray,
        labels: np.ndarray,
        val_states: np.ndarray,
        val_labels: np.ndarray,
        class_weights: Tensor | None = None,
    ) -> dict[str, Any]:
        """Fit to the pooled states of training rows (N, P D); pooling and C are chosen on validation rows.

        Return what was chosen.
        """
        from sklearn.preprocessing import StandardScaler

        scalers: dict[str, Any] = {}

        def features() -> Iterator[Features]:
            size = states.shape[1] // len(POOLINGS)
            for i, pooling in enumerate(POOLINGS):
                own = slice(i * size, (i + 1) * size)
                scalers[pooling] = scaler = StandardScaler().fit(states[:, own])
                yield Features(pooling, scaler.transform(states[:, own]), scaler.transform(val_states[:, own]))

        classes = self.classifier.out_features
        best = choose_regression(features(), labels, val_labels, classes, PROBE_C, class_weights)
        scaler = scalers[best.chosen["features"]]
        weight = best.weight / torch.from_numpy(scaler.scale_).float()  # of states that are not standardized
        self.classifier.weight.data = weight
        self.classifier.bias.data = best.bias - weight @ torch.from_numpy(scaler.mean_).float()
        self.get_buffer("pooling").fill_(POOLINGS.index(best.chosen["features"]))
        self.val_logits = best.val_logits
        return best.chosen


def pool(states: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """States of texts (B, D) from those of their tokens (B, T, D), where the mask (B, T) is 1."""
    if pooling == "mean":
        return mean_state(states, mask)
    places = torch.arange(mask.shape[1], device=mask.device)
    if pooling == "first":
        at = torch.where(mask.bool(), places, mask.shape[1]).amin(1)
    else:
        at = torch.where(mask.bool(), places, -1).amax(1)
    return states[torch.arange(len(states), device=states.device), at.clamp(0, mask.shape[1] - 1)]
