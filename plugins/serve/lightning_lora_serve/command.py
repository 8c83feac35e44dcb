"""``main.py serve``: trained runs behind an HTTP address."""

import os
import sys
from pathlib import Path
from typing import Any

from lightning_lora.config.argument_parser import OptionParser
from lightning_lora.errors import UserError
from lightning_lora.quiet import quiet_libraries

KEY = "LIGHTNING_LORA_API_KEY"


def run(argv: list[str]) -> int:
    """Load the runs and answer requests until the process is told to end."""
    from lightning_lora_serve.server import bind

    options = _read_options(argv)
    if (key := os.environ.get(KEY)) == "":
        raise UserError(f"{KEY}: it is empty; set a key, or unset it")
    serve_runs(options, bind(options.host, options.port, key), key)
    return 0


def serve_runs(options: Any, address: Any, key: str | None) -> None:
    """Load the runs and answer requests at an address.

    Raises:
        UserError: A run cannot be loaded.
    """
    from lightning_lora_serve.application import make_app
    from lightning_lora_serve.batcher import Batcher, batch_threads
    from lightning_lora_serve.schemas import Limits
    from lightning_lora_serve.served_run import ServedRun, SharedWeights
    from lightning_lora_serve.server import AccessMiddleware, ServingMetrics, run_server

    quiet_libraries()
    shared, runs = SharedWeights(), dict[str, ServedRun]()
    for folder in map(Path, options.run):
        alone = len(options.run) == 1
        served = ServedRun(folder, options.checkpoint, shared, options.batch_tokens, merged=alone)
        runs[served.name] = served
        sizes = f"{served.weight_bytes / 1e6:,.0f} MB of weights, {served.shared_bytes / 1e6:,.0f} of them shared"
        print(f"{served.name}: weights {served.fingerprint[:12]}, {sizes}", file=sys.stderr, flush=True)
    limits = Limits(options.max_body_mb, options.max_texts, options.max_characters, options.max_waiting)
    metrics = ServingMetrics()
    batcher = Batcher(limits.waiting_texts, metrics, batch_threads(list(runs.values())))
    middleware = AccessMiddleware(make_app(runs, batcher, limits, options.log_texts), key, limits.body_mb, metrics)
    host, port, *_ = address.getsockname()
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    batcher.start()
    try:
        run_server(
            middleware, address, lambda: print(f"serving at {where} (/openapi.json)", file=sys.stderr, flush=True)
        )
    finally:
        batcher.close()


def _read_options(argv: list[str]) -> Any:
    from lightning_lora_serve.schemas import Limits

    usual = Limits()
    parser = OptionParser("serve", description=f"Runs behind an HTTP address (docs/serve.md). {KEY} sets a key.")
    parser.add_argument("--run", action="append", required=True, help="A run folder; again for each further run.")
    parser.add_argument("--checkpoint", default="best", choices=("best", "last"), help="Of each run.")
    parser.add_argument("--host", default="127.0.0.1", help="Where to listen; one that others reach needs a key.")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one.")
    parser.add_argument("--max_body_mb", type=float, default=usual.body_mb, help="Megabytes of a request (413).")
    parser.add_argument("--max_texts", type=int, default=usual.texts, help="Texts of a request (422).")
    parser.add_argument("--max_characters", type=int, default=usual.characters, help="Of a text (422).")
    parser.add_argument("--max_waiting", type=int, default=usual.waiting_texts, help="Texts that wait (429).")
    parser.add_argument("--log_texts", action="store_true", help="Write texts and predictions to standard output.")
    parser.add_argument("--batch_tokens", type=int, help="Tokens of a batch; by default what suits the machine.")
    options = parser.parse_args(argv)
    for name in ("max_body_mb", "max_texts", "max_characters", "max_waiting", "batch_tokens"):
        if (value := getattr(options, name)) is not None and value <= 0:
            raise UserError(f"--{name}: a number above 0 is needed, got {value}")
    if not 0 <= options.port < 2**16:
        raise UserError(f"--port: a number from 0 to 65535 is needed, got {options.port}")
    if options.max_waiting < options.max_texts:
        raise UserError(f"--max_waiting: {options.max_waiting}, but --max_texts allows {options.max_texts} at once")
    names = [Path(folder).resolve().name for folder in options.run]
    if len({*names}) < len(names):
        raise UserError(f"--run: requests choose a run by the name of its folder; there are {', '.join(names)}")
    return options
