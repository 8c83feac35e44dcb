"""The command line: ``python main.py fit | validate | test | predict`` (see ``lightning_lora/cli.py``)."""

from lightning_lora.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
