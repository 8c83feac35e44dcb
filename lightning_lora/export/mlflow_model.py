"""An exported classifier as an MLflow model; MLflow copies this file into the model, and runs it alone.

It needs mlflow, numpy, pandas and what the export itself needs (torch, transformers), and nothing of lightning_lora.
"""

import contextlib
import io
import runpy
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

ROWS_AT_ONCE = 32


class ExportedClassifier(PythonModel):
    """Texts to labels, as the code in the model card does."""

    def load_context(self, context: Any) -> None:
        """Load the exported folder by its code."""
        with contextlib.redirect_stdout(io.StringIO()):  # it classifies an example
            self.code = runpy.run_path(context.artifacts["code"], {"folder": context.artifacts["merged"]})

    def predict(self, context: Any, model_input: Any, params: Any = None) -> pd.DataFrame:
        """Return ``label`` and ``score`` (its probability) of each row; of several labels those over their thresholds.

        Args:
            context: MLflow's; unused.
            model_input: Texts, in one column; pairs in two.
            params: MLflow's; unused.
        """
        frame = pd.DataFrame(model_input)
        rows = [tuple(row) if len(frame.columns) > 1 else row[0] for row in frame.itertuples(index=False)]
        parts = [np.asarray(self.code["logits"](rows[i : i + ROWS_AT_ONCE])) for i in range(0, len(rows), ROWS_AT_ONCE)]
        logits, labels = np.concatenate(parts).astype(np.float64), self.code["labels"]
        if self.code["task"] == "regression":
            return pd.DataFrame({"score": logits[:, 0]})
        if self.code["task"] == "multi_label":
            over = 1 / (1 + np.exp(-logits)) >= np.array(self.code["thresholds"])
            return pd.DataFrame({"label": [[labels[i] for i in np.flatnonzero(row)] for row in over]})
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        best, probabilities = logits.argmax(axis=1), exponents / exponents.sum(axis=1, keepdims=True)
        return pd.DataFrame({"label": [labels[int(i)] for i in best], "score": probabilities.max(axis=1)})


set_model(ExportedClassifier())
