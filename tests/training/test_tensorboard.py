import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from lightning_lora.evaluation.predictions import Predictions
from lightning_lora.training.tensorboard import confusion_figure, wrong_texts

LOGITS = np.array([[3, 0], [0, 2], [0, 5], [1, 0]], dtype=np.float32)
PREDICTIONS = Predictions(LOGITS, np.array([0, 1, 0, 1]), ["neg", "pos"], np.array([0, 1, 3, 4]))


def test_wrong_texts_are_the_surest_first_and_cannot_break_the_page() -> None:
    page = wrong_texts(PREDICTIONS, ["right", "right", "not in the pass", "<script>a|b</script>\n\nnew", "half sure"])
    lines = page.splitlines()
    assert len(lines) == 4
    assert "&lt;script>a&#124;b&lt;/script> new" in lines[2] and lines[2].startswith("| neg | pos | 0.993 |")
    assert "half sure" in lines[3]


def test_the_confusion_matrix_has_the_truth_in_rows() -> None:
    figure = confusion_figure(
        Predictions(np.eye(3, dtype=np.float32)[[0, 0, 1]], np.array([0, 0, 2]), ["a", "b", "c"], np.arange(3))
    )
    FigureCanvasAgg(figure).draw()
    shares = np.asarray(figure.axes[0].images[0].get_array())
    np.testing.assert_array_equal(shares, [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    assert figure.axes[0].get_ylabel() == "true"
