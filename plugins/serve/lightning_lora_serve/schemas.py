"""What requests and answers hold; the OpenAPI document is made of these."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.tasks import Task


@dataclass(frozen=True)
class Limits:
    """What a request may be.

    Args:
        body_mb: Megabytes of its body.
        texts: Texts in it.
        characters: Characters of a text.
        waiting_texts: Texts of all requests that are accepted and not yet answered.
    """

    body_mb: float = 2.0
    texts: int = 256
    characters: int = 20_000
    waiting_texts: int = 4096


class TextPrediction(BaseModel):
    """The prediction of one text, or pair of texts.

    Of several labels ``prediction`` is the list of those predicted; of regression it is the number, alone.
    """

    prediction: str | list[str] | float
    probability: float | None = None
    probabilities: dict[str, float] | None = None


class PredictAnswer(BaseModel):
    """Predictions in the order of the texts.

    ``thresholds`` are the probabilities from which on each of several labels is predicted; ``fingerprint`` is the
    SHA-256 of the weights.
    """

    run: str
    fingerprint: str
    thresholds: dict[str, float] | None = None
    predictions: list[TextPrediction]


class RunInfo(BaseModel):
    """A run that is served; ``max_length`` is in tokens, ``metrics`` are those of its record."""

    run: str
    fingerprint: str
    task: Task
    labels: list[str]
    thresholds: dict[str, float] | None = None
    pairs: bool
    max_length: int
    method: str
    base_model: str
    base_fingerprint: str
    metrics: dict[str, float]


class ServerInfo(BaseModel):
    """What is served, and the limits of a request."""

    version: str
    runs: list[RunInfo]
    limits: Limits


class Health(BaseModel):
    """Whether texts are predicted."""

    status: Literal["ok", "draining", "failed"]


class Refusal(BaseModel):
    """Why a request has no answer."""

    detail: str | list[dict[str, Any]]


def request_model(limits: Limits) -> Any:
    """Return the model of the body of a request within the limits."""
    text = Annotated[str, Field(min_length=1, max_length=limits.characters)]
    many: Any = Annotated[list[text | tuple[text, text]], Field(min_length=1, max_length=limits.texts)]
    return create_model(
        "PredictRequest",
        __config__=ConfigDict(extra="forbid"),
        texts=(text | many, Field(description="A text, several, or pairs of texts for a run that reads pairs.")),
        run=(str | None, Field(None, description="The run's name; needed where there are several.")),
    )


def as_answers(predictions: Predictions) -> list[TextPrediction]:
    """Return the predictions of texts as ``predict`` writes them."""
    columns = predictions.columns()
    names, values = predictions.label_names, columns["prediction"]
    if predictions.task == "regression":
        return [TextPrediction(prediction=value) for value in values]
    highest = columns["probability"].tolist() if "probability" in columns else [None] * len(values)
    return [
        TextPrediction(prediction=value, probability=p, probabilities=dict(zip(names, row, strict=True)))
        for value, p, row in zip(values, highest, predictions.probabilities.tolist(), strict=True)
    ]
