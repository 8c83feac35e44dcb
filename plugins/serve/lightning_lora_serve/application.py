"""The HTTP application: what each path answers."""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lightning_lora import __version__
from lightning_lora.data.pairs import Text
from lightning_lora.errors import UserError
from lightning_lora_serve.batcher import Batcher, PredictionError, QueueFullError
from lightning_lora_serve.schemas import (
    Health,
    Limits,
    PredictAnswer,
    Refusal,
    RunInfo,
    ServerInfo,
    as_answers,
    request_model,
)
from lightning_lora_serve.served_run import ServedRun


def make_app(runs: Mapping[str, ServedRun], batcher: Batcher, limits: Limits, log_texts: bool = False) -> FastAPI:
    """Return the application; keys and the size of bodies are the matter of ``AccessMiddleware``.

    With ``log_texts`` each text is written to standard output, as JSON with its run and its prediction.
    """
    app = FastAPI(title="lightning_lora", version=__version__, docs_url=None, redoc_url=None)
    app.state.batcher, app.state.draining = batcher, False
    app.exception_handler(RequestValidationError)(_answer_invalid)
    app.add_exception_handler(Exception, _answer_failure)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal} for status in (400, 401, 404, 413, 422, 429, 500)
    }
    # Only for the OpenAPI document: the key is checked before a body is read.
    keyed = [Depends(HTTPBearer(auto_error=False))]
    served = [_describe(run) for run in runs.values()]

    async def predict(body: Any) -> PredictAnswer:
        """Labels and probabilities of texts, as ``main.py predict`` gives them."""
        run = _find(runs, body.run)
        texts: list[Text] = [body.texts] if isinstance(body.texts, str) else body.texts
        try:
            predictions = await batcher.predict(run, run.loaded.checked(texts))
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        except QueueFullError:
            raise HTTPException(429, "too many texts wait; try again", {"Retry-After": "1"}) from None
        except PredictionError:
            raise HTTPException(500, "the texts could not be predicted") from None
        answers = as_answers(predictions)
        for text, answer in zip(texts if log_texts else (), answers, strict=False):
            kept = {"run": run.name, "text": text, **answer.model_dump(exclude_none=True)}
            print(json.dumps(kept, ensure_ascii=False), flush=True)
        return PredictAnswer(
            run=run.name, fingerprint=run.fingerprint, thresholds=_thresholds(run), predictions=answers
        )

    predict.__annotations__["body"] = request_model(limits)
    app.post("/predict", responses=refused, dependencies=keyed, response_model_exclude_none=True)(predict)

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether texts are predicted; needs no key."""
        if not batcher.alive or app.state.draining:
            response.status_code = 503
        return Health(status="draining" if app.state.draining else "ok" if batcher.alive else "failed")

    @app.get("/info", responses={401: refused[401]}, dependencies=keyed, response_model_exclude_none=True)
    async def info() -> ServerInfo:
        """What is served: labels, metrics, base model, limits."""
        return ServerInfo(version=__version__, runs=served, limits=limits)

    @app.get("/metrics", responses={401: refused[401]}, dependencies=keyed, response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(generate_latest(batcher.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _find(runs: Mapping[str, ServedRun], name: str | None) -> ServedRun:
    if name is None and len(runs) == 1:
        return next(iter(runs.values()))
    if name is None:
        raise HTTPException(422, f"run: one of {', '.join(runs)} is needed")
    if name not in runs:
        raise HTTPException(404, f"no such run; there are {', '.join(runs)}")
    return runs[name]


def _thresholds(run: ServedRun) -> dict[str, float] | None:
    return None if run.thresholds is None else dict(zip(run.loaded.label_names, run.thresholds.tolist(), strict=True))


def _describe(run: ServedRun) -> RunInfo:
    identity = run.model.identity
    base = str(identity.base_model)
    return RunInfo(
        run=run.name,
        fingerprint=run.fingerprint,
        task=run.model.task,
        labels=list(run.loaded.label_names),
        thresholds=_thresholds(run),
        pairs=run.pairs,
        max_length=run.loaded.input_format.max_length,
        method=identity.method,
        base_model=PurePath(base).name if PurePath(base).is_absolute() else base,
        base_fingerprint=identity.base_fingerprint,
        metrics=run.metrics,
    )


def _answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Say what is wrong with a body, without repeating it."""
    del request
    faults: list[dict[str, Any]] = [{name: fault[name] for name in ("loc", "msg", "type")} for fault in error.errors()]
    return JSONResponse({"detail": faults}, 422)


def _answer_failure(request: Request, error: Exception) -> JSONResponse:
    """Say no more than that it failed; ``AccessMiddleware`` says on standard error where."""
    del request, error
    return JSONResponse({"detail": "internal error"}, 500)
