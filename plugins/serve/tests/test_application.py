"""What the application answers: the predictions of ``predict``, refusals, and nothing that it should not tell."""

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the plugin 'serve'")

from serve_answers import LIMITS, TEXTS, check, inputs
from starlette.testclient import TestClient

from lightning_lora.evaluation.predictions import Predictions
from lightning_lora_serve.schemas import as_answers
from lightning_lora_serve.server import AccessMiddleware


def test_answers_of_many_clients_and_runs_are_those_of_predict(client: TestClient, expected, served) -> None:
    rng = random.Random(0)
    jobs = [(name, rng.sample(range(len(inputs(name))), rng.randint(1, 12))) for name in expected for _ in range(8)]
    rng.shuffle(jobs)

    def ask(job: tuple[str, list[int]]) -> dict[str, Any]:
        name, positions = job
        answer = client.post("/predict", json={"run": name, "texts": [inputs(name)[i] for i in positions]})
        assert answer.status_code == 200, answer.text
        return answer.json()

    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(ask, jobs))
    for (name, positions), answer in zip(jobs, answers, strict=True):
        check(answer, expected[name], positions)
        assert (answer["run"], answer["fingerprint"]) == (name, served[name].fingerprint)
    assert [name for name, run in served.items() if run.packed] == ["packed"]
    several = next(a for (name, _), a in zip(jobs, answers, strict=True) if name == "several")
    assert list(several["thresholds"].values()) == pytest.approx(expected["several"].thresholds.tolist())
    assert several["thresholds"] != pytest.approx(0.5) and float(served["several"].model.temperature) != 1
    counted = client.get("/metrics").text
    texts = sum(len(positions) for name, positions in jobs if name == "run")
    assert f'lightning_lora_texts_total{{run="run"}} {texts}.0' in counted
    assert "lightning_lora_waiting_texts 0.0" in counted


def test_of_regression_the_prediction_is_the_number() -> None:
    predictions = Predictions(np.array([[2.5]], np.float32), None, ["score"], np.arange(1), task="regression")
    assert [answer.model_dump(exclude_none=True) for answer in as_answers(predictions)] == [{"prediction": 2.5}]


def test_one_text_may_stand_alone(client: TestClient, expected) -> None:
    check(client.post("/predict", json={"run": "run", "texts": TEXTS[3]}).json(), expected["run"], [3])


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"run": "run", "texts": []}, 422, "at least 1 item"),
        ({"run": "run", "texts": ["a"] * (LIMITS["texts"] + 1)}, 422, "at most 20 items"),
        ({"run": "run", "texts": "a" * (LIMITS["characters"] + 1)}, 422, "at most 300 characters"),
        ({"run": "run", "texts": ["fine", " \u200b"]}, 422, "text 1: a text is needed"),
        ({"run": "run", "texts": [["a", "b"]]}, 422, "text 0: a text is needed"),
        ({"run": "pairs", "texts": ["a", "b"]}, 422, "text 0: a pair of texts is needed"),
        ({"run": "run", "texts": ["a", 5]}, 422, "valid string"),
        ({"run": "run", "texts": "a", "top": 3}, 422, "Extra inputs"),
        ({"texts": "a"}, 422, "run: one of run, three-labels, "),
        ({"run": "other", "texts": "a"}, 404, "no such run"),
        ({"run": "run", "texts": ["b" * 299] * 80}, 413, "larger than 20,000 bytes"),
    ],
)
def test_what_is_refused(client: TestClient, body: dict[str, Any], status: int, said: str) -> None:
    answer = client.post("/predict", json=body)
    assert (answer.status_code, said in answer.text) == (status, True), answer.text
    assert "bbbb" not in answer.text and "aaaa" not in answer.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"run": "run", "texts": "\\ud800"}', b"\xff\xfe", b"null"])
def test_what_is_no_request_is_refused(client: TestClient, content: bytes) -> None:
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and "detail" in answer.json()


def test_a_body_without_a_length_is_limited_too(client: TestClient) -> None:
    answer = client.post("/predict", content=(b" " * 1000 for _ in range(50)))
    assert answer.status_code == 413


def test_where_too_many_texts_wait_clients_are_told_to_try_again(
    client: TestClient, middleware: AccessMiddleware, monkeypatch
) -> None:
    batcher = middleware.app.state.batcher
    monkeypatch.setattr(batcher, "max_waiting", 5)
    answer = client.post("/predict", json={"run": "run", "texts": ["a"] * 6})
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
    assert client.post("/predict", json={"run": "run", "texts": ["a"] * 5}).status_code == 200


def test_a_key_opens_all_but_health_is_open(middleware: AccessMiddleware) -> None:
    client = TestClient(AccessMiddleware(middleware.app, "secret-ключ", 1.0, middleware.metrics))
    body = {"run": "run", "texts": "fine"}
    assert client.get("/health").status_code == 200
    key = "Bearer secret-ключ".encode()
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": b"secret"}, {"Authorization": key + b"x"}):
        for path in ("/info", "/metrics", "/openapi.json", "/nothing"):
            assert client.get(path, headers=headers).status_code == 401
        assert client.post("/predict", json=body, headers=headers).status_code == 401
    assert client.post("/predict", json=body, headers={"Authorization": key}).status_code == 200


def test_a_failure_tells_no_text_and_no_path_and_the_next_batch_is_predicted(
    client: TestClient, served, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ids: Any, texts: Any) -> None:
        raise ValueError(f"cannot read {texts[0]} of /home/someone")

    body = {"run": "run", "texts": "a secret text"}
    with monkeypatch.context() as patch:
        patch.setattr(served["run"], "logits", broken)
        answer = client.post("/predict", json=body)
    with monkeypatch.context() as patch:
        patch.setattr(served["run"].loaded.__class__, "checked", broken)
        other = client.post("/predict", json=body)
    assert (answer.status_code, other.status_code) == (500, 500)
    assert answer.json() == {"detail": "the texts could not be predicted"}
    assert other.json() == {"detail": "internal error"}
    said = capfd.readouterr()
    assert "ValueError" in said.err and "secret" not in said.err + said.out
    assert client.post("/predict", json=body).status_code == 200


def test_info_tells_what_is_served_and_no_path(client: TestClient, run_folders) -> None:
    info = client.get("/info")
    assert str(run_folders["run"].parent) not in info.text
    found = {run["run"]: run for run in info.json()["runs"]}
    assert found["run"]["labels"] == ["neg", "pos"] and found["run"]["max_length"] == 32
    assert {"accuracy", "f1_macro"} <= {*found["run"]["metrics"]} and found["pairs"]["pairs"]
    assert info.json()["limits"]["texts"] == LIMITS["texts"]
