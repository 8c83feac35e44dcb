import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.training.tensorboard import confusion_figure


def test_the_confusion_matrix_has_the_truth_in_rows() -> None:
    figure = confusion_figure(
        Predictions(np.eye(3, dtype=np.float32)[[0, 0, 1]], np.array([0, 0, 2]), ["a", "b", "c"], np.arange(3))
    )
    FigureCanvasAgg(figure).draw()
    shares = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shares, [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    assert figure.axes[0].get_ylabel() == "True label"
