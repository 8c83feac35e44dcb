"""The page of ``main.py demo``, by Gradio: runs side by side on a text, and a file to label."""

import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lightning_lora.data.pairs import Text, is_pair
from lightning_lora.errors import UserError, first_line
from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.inference.explain import ABOUT, coloured_words, words_legend, words_style
from lightning_lora.inference.input_rows import file_rows
from lightning_lora.inference.loaded_run import LoadedRun
from lightning_lora.inference.output import OUTPUTS, columns_beside, new_columns, separated, write_output

#: Classes whose bars are shown, the most probable first.
_BARS = 10
#: Beside Gradio's own style and that of the words.
_STYLE = (
    "main.fillable { max-width: 70rem !important; margin: 0 auto } footer { display: none !important } "
    ".words { font-size: 1.05rem } td, th { text-align: left !important }"
)
#: White text on it can be read (contrast 6.6), in both colour schemes.
_BUTTON = "#0b5fa5"
#: Fonts of the machine: Gradio's would be fetched from the network.
_FONT, _CODE_FONT = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")


@dataclass
class Demo:
    """What the page shows.

    Args:
        runs: The runs by the name that they are shown under; all read one text, or all read pairs.
        text_columns: Names of the fields: one, or two of a pair.
        examples: Rows to try: text and truth.
        separators: The ``data.label_separator`` of runs that have one, by name.
    """

    runs: Mapping[str, LoadedRun]
    text_columns: Sequence[str]
    examples: Sequence[tuple[Text, str]]
    separators: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pairs = {name: is_pair(run.input_format.keep) for name, run in self.runs.items()}
        if len({*pairs.values()}) > 1:
            raise UserError(f"--run: {next(n for n in pairs if pairs[n])} reads pairs of texts, and others do not")
        self._lock = threading.Lock()  # requests come in threads, and a model answers one at a time

    @property
    def pair(self) -> bool:
        """Whether pairs of texts are read."""
        return len(self.text_columns) == 2

    def _text(self, sides: Sequence[str]) -> Text:
        return (sides[0], sides[1]) if self.pair else sides[0]

    def classify(self, *sides: str) -> list[Any]:
        """Return for each run what ``gradio.Label`` shows: the probabilities by label, or the number."""
        with self._lock:
            return [bars(run.predict([self._text(sides)])) for run in self.runs.values()]

    def explain(self, *sides: str) -> list[str]:
        """Return what colours mean, and for each run the text with coloured words, for each label that it predicts."""
        with self._lock:
            found = [run.explain([self._text(sides)]) for run in self.runs.values()]
        legend = words_legend(any(each.is_number for several in found for each in several))
        return [
            f"{legend}<small>{ABOUT}</small>",
            *("".join(f"<b>{escape(each.summary)}</b>{coloured_words(each)}" for each in several) for several in found),
        ]

    def label_file(self, name: str, path: str, columns: str) -> str:
        """Write the rows of a file, whose text columns have commas between, with a run's predictions to a new file."""
        run, source = self.runs[name], Path(path)
        text_columns = [each.strip() for each in columns.split(",") if each.strip()] or [*self.text_columns]
        if self.pair and len(text_columns) != 2:
            raise UserError(f"text columns: the run reads pairs of texts; give two, got {', '.join(text_columns)}")
        rows = file_rows(path, text_columns, None, text_columns if self.pair else ())
        ending = source.suffix.lower() if source.suffix.lower() in OUTPUTS else ".csv"
        new = new_columns(run.label_names, run.model.task)
        found = columns_beside(rows.table.columns, rows.text_columns, new.names, ending, source.name)
        with self._lock:
            found |= rows.predicted(run.predict_dataset(run.dataset(rows.usable)))
        if ending == ".csv" and name in self.separators:
            found["prediction"] = separated(found["prediction"], run.label_names, self.separators[name])
        output = Path(tempfile.mkdtemp(prefix="labels-")) / f"{source.stem}-labelled{ending}"
        write_output(output, found, new)
        return str(output)

    def page(self) -> Any:
        """Return the page, a ``gradio.Blocks``."""
        import gradio as gr

        with gr.Blocks(title="lightning_lora demo", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(f"# {' and '.join(self.runs)}")
            with gr.Tab("A text" if not self.pair else "A pair of texts"):
                fields = [gr.Textbox(label=name, lines=3, max_lines=12) for name in self.text_columns]
                with gr.Row():
                    classify = gr.Button("Classify", variant="primary", elem_id="classify")
                    explain = gr.Button("What each word adds", elem_id="explain")
                truth = gr.Textbox(label="truth of the example", interactive=False, visible=False)
                shown, words = list[Any](), list[Any]()
                with gr.Row():
                    for name, run in self.runs.items():
                        with gr.Column(min_width=300):
                            single = run.model.task != "multi_label"
                            shown.append(gr.Label(label=name, num_top_classes=_BARS, show_heading=single))
                            words.append(gr.HTML())
                words.insert(0, gr.HTML())
                if self.examples:
                    samples = [[*([text] if isinstance(text, str) else text), label] for text, label in self.examples]
                    headers = [*self.text_columns, "truth"]
                    title = "Test rows with their truth"
                    examples = gr.Dataset(components=[*fields, truth], samples=samples, headers=headers, label=title)
                    chosen = examples.click(self._chosen, examples, [*fields, truth, *words])
                    chosen.then(_told(self.classify), fields, shown)
            with gr.Tab("A file"):
                file = gr.File(label="CSV, TSV, JSON Lines, Parquet, or a text a line (.txt)", type="filepath")
                columns = gr.Textbox(label="text columns", value=", ".join(self.text_columns))
                which = gr.Radio([*self.runs], value=next(iter(self.runs)), label="run", visible=len(self.runs) > 1)
                label = gr.Button("Label the file", variant="primary", elem_id="label")
                labelled = gr.File(label="with labels", interactive=False)
            classify.click(_told(self.classify), fields, shown)
            explain.click(_told(self.classify), fields, shown).then(_told(self.explain), fields, words)
            for field in fields:
                field.submit(_told(self.classify), fields, shown)  # Shift and Enter
                field.input(self._cleared, None, [truth, *words], show_progress="hidden")
            label.click(_told(self.label_file), [which, file, columns], labelled)
        return page

    def _chosen(self, row: Sequence[str]) -> list[Any]:
        import gradio as gr

        return [*row[:-1], gr.Textbox(value=row[-1], visible=True), "", *[""] * len(self.runs)]

    def _cleared(self) -> list[Any]:
        import gradio as gr

        return [gr.Textbox(value="", visible=False), "", *[""] * len(self.runs)]

    def launch(self, port: int | None) -> None:
        """Show the page on this machine alone, until it is interrupted."""
        import gradio as gr

        theme = gr.themes.Default(primary_hue="blue", font=_FONT, font_mono=_CODE_FONT).set(
            button_primary_background_fill=_BUTTON, button_primary_background_fill_dark=_BUTTON
        )
        page = self.page()
        try:
            _, address, _ = page.launch(
                server_name="127.0.0.1",
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
                theme=theme,
                css=f"{words_style()}{_STYLE}",
            )
        except OSError as error:
            raise UserError(f"--port: {first_line(error)}") from error
        print(f"{address} shows {' and '.join(self.runs)}, on this machine alone; Ctrl-C ends it", flush=True)
        page.block_thread()


def bars(predictions: Predictions) -> Any:
    """Return the first row's probabilities by label, or its number, as ``gradio.Label`` takes them.

    Of several labels those that are predicted are ticked.
    """
    if predictions.task == "regression":
        return f"{predictions.names[0]:.4g}"
    ticked = predictions.names[0] if predictions.task == "multi_label" else []
    names = [f"✓ {name}" if name in ticked else name for name in predictions.label_names]
    return dict(zip(names, predictions.probabilities[0].tolist(), strict=True))


def _told(function: Any) -> Any:
    """The function with errors that a user can cause shown on the page."""

    def call(*given: Any) -> Any:
        import gradio as gr

        if any(each is None or (isinstance(each, str) and not each.strip()) for each in given):
            raise gr.Error("Nothing is given yet.", title="")
        try:
            found = function(*given)
        except UserError as error:
            raise gr.Error(str(error), title="") from error
        return found[0] if isinstance(found, list) and len(found) == 1 else found

    return call
