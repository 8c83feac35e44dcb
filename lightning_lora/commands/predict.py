"""``main.py predict``: labels and probabilities for a person's own texts, from nothing but a run folder."""

import sys
from pathlib import Path
from typing import Any

from lightning_lora.config.configured_run import ConfiguredRun
from lightning_lora.data.pairs import is_pair
from lightning_lora.errors import UserError
from lightning_lora.export.weights import trained_for
from lightning_lora.files import check_writable
from lightning_lora.inference.input_rows import (
    InputRows,
    file_rows,
    piped_rows,
    text_columns_of,
    typed_rows,
    warn_of_faults,
)
from lightning_lora.inference.many_files import is_many
from lightning_lora.inference.output import (
    OUTPUTS,
    as_text,
    columns_beside,
    new_columns,
    print_table,
    separated,
    write_output,
)
from lightning_lora.inference.predict_files import load_for, run_files
from lightning_lora.runs.folder import RunFolder


def run(argv: list[str]) -> int:
    """Classify texts in the order given and print or write a row for each."""
    cli = ConfiguredRun("predict", argv)
    config = cli.config
    output = Path(config.output) if config.output else None
    if not config.texts and is_many(config.input):
        if output is None or output.suffix.lower() in OUTPUTS:
            raise UserError("--output: for many input files a folder is needed, to hold an output for each")
        if config.format != "table":
            raise UserError("--format: the outputs of many input files are Parquet files; leave it out")
        return run_files(cli)
    check_options(config, output)
    rows = gather_rows(config)
    path = RunFolder.open(Path(config.run)).checkpoint(config.checkpoint)
    labels = trained_for(path)
    new = new_columns(labels["label_names"], labels["task"])
    ending = output.suffix.lower() if output else f".{config.format}"
    columns: dict[str, Any] = {"text": rows.texts, **dict.fromkeys(new.names)}
    if is_pair(config.data.truncation):
        columns = {name: [text[i] for text in rows.texts] for i, name in enumerate(rows.text_columns)}
        columns |= dict.fromkeys(new.names)
    if output or config.format != "table":
        columns = columns_beside(rows.table.columns, rows.text_columns, new.names, ending, config.input)
    if output:
        try:
            check_writable(output.parent)
        except OSError as error:  # such as a file where a folder should be
            raise UserError(f"--output: cannot write {output} ({error.strerror or error})") from error
    loaded = load_for(cli, path, labels)
    columns |= rows.predicted(loaded.predict_dataset(loaded.dataset(rows.usable)))
    if ending == ".csv" and config.data.label_separator:
        columns["prediction"] = separated(columns["prediction"], labels["label_names"], config.data.label_separator)
    if output:
        write_output(output, columns, new)
        print(f"{len(rows.texts):,} rows written to {output}", file=sys.stderr)
    elif config.format == "table":
        print_table(columns, [*columns][: -len(new)])
    else:
        sys.stdout.write(as_text(columns, ending))
    warn_of_faults(rows.faulty_places, len(rows.faults), len(rows.texts))
    return 0


def check_options(config: Any, output: Path | None) -> None:
    """Refuse options that do not go with texts or a single file.

    Raises:
        UserError: An option needs a folder of files or an output.
    """
    for option in ("workers", "executor", "address"):
        if config[option] is not None:
            raise UserError(f"--{option}: only for many input files: --input FOLDER, or --input 'FOLDER/*.parquet'")
    if output and output.is_dir():
        raise UserError(f"--output: '{output}' is a folder; name a file in it")
    if output and output.suffix.lower() not in OUTPUTS:
        raise UserError(f"--output: '{output.name}' must end in one of {', '.join(OUTPUTS)}")
    if output and config.format != "table":
        raise UserError("--format: the format of --output is that of its ending; leave --format out")
    if config.text_column and (config.texts or config.input in (None, "-")):
        raise UserError("--text_column: only an --input file has columns; leave it out")


def gather_rows(config: Any) -> InputRows:
    """Return the rows of the command line, of standard input or of a file.

    Raises:
        UserError: There are none, or both kinds; or a row has no text, and that is to be refused.
    """
    if config.texts and config.input:
        raise UserError("predict takes texts or --input, not both")
    pair = config.data.text_column if is_pair(config.data.truncation) else ()
    if config.texts:
        rows = typed_rows(config.texts, pair)
    elif config.input in (None, "-"):
        rows = piped_rows(pair)
    else:
        rows = file_rows(config.input, text_columns_of(config), config.data.encoding, pair)
    # A text that is typed and empty is most likely a variable that was never set.
    if (config.bad_rows or ("error" if config.texts else "empty")) == "error":
        rows.refuse_faults()
    return rows
