"""The test rows of an experiment: evaluated once, by the weights that validation rows have chosen."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lightning_lora.children import last_error, run_child
from lightning_lora.errors import UserError
from lightning_lora.experiments.plan import Plan
from lightning_lora.experiments.results import compare_arms, read_cells, read_run_predictions
from lightning_lora.files import locked_folder
from lightning_lora.runs.folder import RunFolder, best_evaluation
from lightning_lora.workers import Workers, share_tasks


def evaluate_test_rows(plan: Plan, folder: Path, workers: Workers) -> bool:
    """Test each arm's best variant that was not tested yet, once all its seeds are there.

    What is tested was chosen before, by validation rows only. Returns whether all of it went well.
    """
    with locked_folder(folder, None):
        names: list[str] = []
        for arm in compare_arms(plan, read_cells(plan, folder)):
            if arm.complete:
                names += [result.cell.name for result in arm.cells if "test" not in result.answers]
            else:
                print(f"{arm.label}: not tested, as not all its seeds have finished")
        if workers.alone or len(names) < 2:
            failures = evaluate_cells(folder, names)
        else:
            shown = set[str]()

            def watch() -> None:
                for name in names:
                    if name not in shown and best_evaluation(RunFolder(folder / "cells" / name).read(), "test"):
                        shown.add(name)
                        print(f"{name}: tested", flush=True)

            failures = workers.run(partial(_test_all, folder, names), len(names), watch)
            watch()
    for failure in dict.fromkeys(failures):
        print(failure, file=sys.stderr)
    return not failures


def _test_all(folder: Path, names: Sequence[str]) -> None:
    """What a worker does; its last error is what its end is told with."""
    if failures := evaluate_cells(folder, names):
        raise UserError("; ".join(failures))


def evaluate_cells(folder: Path, names: Sequence[str]) -> list[str]:
    """Test cells that no other process tests or has tested; return what failed, in words."""
    failures = []

    def test(name: str) -> None:
        place, output = folder / "cells" / name, folder / "cells" / f"{name}.txt"
        if "test" in read_run_predictions(place, RunFolder(place).read()):
            return
        print(f"{name}: test rows", flush=True)
        if status := run_child([["test", "--run", str(place), "--before", "false"]], output):
            failures.append(f"{name}: its test failed: {last_error(output.read_text(encoding='utf-8'), status)}")

    share_tasks(names, folder, str, test)
    return failures
