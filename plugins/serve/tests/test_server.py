"""The server as a process: really started, asked over HTTP, and ended."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

pytest.importorskip("fastapi", reason="needs the plugin 'serve'")

from serve_answers import TEXTS, check

from lightning_lora.cli import main, plugin_commands
from tests.faults.processes import Run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., tuple[Run, str]]]:
    """Starts a server; returns its process and its address."""
    if "serve" not in plugin_commands():
        pytest.skip("the plugin 'serve' is not installed (pip install -e plugins/serve)")
    started: list[Run] = []

    def start(*words: str, **environment: str) -> tuple[Run, str]:
        server = Run(["serve", "--port", "0", *words], tmp_path / "server.txt", environment=environment)
        started.append(server)
        server.wait_for(lambda: "serving at" in server.text())
        address = re.search(r"serving at (http://\S+)", server.text())
        assert address, server.text()
        return server, address[1]

    yield start
    for server in started:
        server.signal(signal.SIGKILL)
        server.process.join()


def test_two_runs_behind_a_key(start, run_folders, expected) -> None:
    words = [word for name in ("run", "three-labels") for word in ("--run", str(run_folders[name]))]
    server, address = start(*words, "--host", "0.0.0.0", LIGHTNING_LORA_API_KEY="word")
    with httpx2.Client(base_url=address.replace("0.0.0.0", "127.0.0.1")) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/info").status_code == 401
        client.headers["Authorization"] = "Bearer word"
        for name in ("run", "three-labels"):
            answer = client.post("/predict", json={"run": name, "texts": TEXTS[:5]})
            check(answer.json(), expected[name], [*range(5)])
        assert client.post("/predict", json={"run": "run", "texts": "x" * 30_000_00}).status_code == 413
        # The server's own log holds no text, whatever is asked.
        client.post("/predict", json={"run": "run", "texts": ["a-secret-text" * 2000]})
        client.get("/a-secret-text?a-secret-text")
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert "secret" not in server.text() and "word" not in server.text()


def test_a_server_that_is_told_to_end_answers_what_it_has_accepted(start, run_folders, expected) -> None:
    server, address = start("--run", str(run_folders["run"]), "--log_texts")
    answered, lost, several = list[int](), list[str](), threading.Event()

    def ask(first: int) -> None:
        with httpx2.Client(base_url=address, timeout=30) as client:
            for i in range(100_000):
                at = [(first + i) % len(TEXTS), (first * i) % len(TEXTS)]
                try:
                    answer = client.post("/predict", json={"texts": [TEXTS[k] for k in at]})
                    assert answer.status_code == 200
                    check(answer.json(), expected["run"], at)
                except httpx2.ConnectError:  # of a request that was never sent
                    return
                except Exception as error:
                    lost.append(repr(error))
                    return
                answered.append(i)
                if len(answered) > 100:
                    several.set()

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for client in clients:
        client.start()
    assert several.wait(60), (server.text(), lost)
    server.signal(signal.SIGTERM)
    for client in clients:
        client.join(60)
    assert server.wait() == 0, server.text()
    assert lost == []
    logged = [json.loads(line) for line in server.text().splitlines() if line.startswith("{")]
    assert len(logged) == 2 * len(answered) and logged[0].keys() == {
        "run",
        "text",
        "prediction",
        "probability",
        "probabilities",
    }
    assert {each["text"] for each in logged} <= set(TEXTS)


@pytest.mark.slow
def test_no_request_made_from_the_openapi_document_makes_the_server_fail(start, run_folders) -> None:
    """Answers have the statuses, content types and forms of the document; SERVE_REQUESTS sets how many are made."""
    pytest.importorskip("schemathesis")
    words = [word for name in ("run", "several", "pairs") for word in ("--run", str(run_folders[name]))]
    server, address = start(*words, LIGHTNING_LORA_API_KEY="word")
    key, count = "Authorization: Bearer word", os.environ.get("SERVE_REQUESTS", "500")
    # What is valid for one run is refused by another: a text where a pair is needed, or a run that is not named.
    more = ["--exclude-checks", "positive_data_acceptance", "--generation-database", "none", "--seed", "1"]
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json", "-H", key, "-n", count]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    counted = httpx2.get(f"{address}/metrics", headers={"Authorization": "Bearer word"}).text
    answers = re.findall(r'lightning_lora_requests_total\{.*status="(\d+)"\} ([\d.]+)', counted)
    assert sum(float(number) for _, number in answers) > float(count)
    assert not [status for status, _ in answers if status.startswith("5")], server.text()


@pytest.mark.skipif("serve" not in plugin_commands(), reason="the plugin 'serve' is not installed")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--host", "0.0.0.0"], "so a key is needed: set LIGHTNING_LORA_API_KEY"),
        (["--host", "no.such.host.invalid"], "--host, --port: cannot use no.such.host.invalid:8000"),
        (["--port", "70000"], "--port: a number from 0 to 65535 is needed, got 70000"),
        (["--run", "logs/run"], "requests choose a run by the name of its folder; there are run, run"),
        (["--max_texts", "0"], "--max_texts: a number above 0 is needed, got 0"),
        (["--max_waiting", "5"], "--max_waiting: 5, but --max_texts allows 256"),
        (["--checkpoint", "third"], "argument --checkpoint: invalid choice"),
        (["--runs", "x"], "no option --runs; did you mean --run"),
    ],
)
def test_what_is_refused_is_one_line(words: list[str], said: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIGHTNING_LORA_API_KEY", raising=False)
    assert main(["serve", "--run", "run", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]
