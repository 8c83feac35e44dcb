"""The scripts in ``examples/`` that no other test runs."""

import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from lightning_lora.config.configured_run import ConfiguredRun

EXAMPLES = Path(__file__).parents[1] / "examples"
write_first_layers = runpy.run_path(str(EXAMPLES / "first_layers.py"))["write_first_layers"]


def test_the_first_layers_compute_what_they_computed_in_the_whole(tiny_base: Path, tmp_path: Path) -> None:
    write_first_layers(str(tiny_base), 1, tmp_path / "one")
    whole, part = AutoModel.from_pretrained(tiny_base).eval(), AutoModel.from_pretrained(tmp_path / "one").eval()
    ids = torch.tensor([[2, 7, 9, 3], [2, 5, 3, 0]])
    mask = ids.ne(0).long()
    with torch.inference_mode():
        states = whole(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = part(input_ids=ids, attention_mask=mask).last_hidden_state
    assert len(states) == 3
    torch.testing.assert_close(found, states[1])
    text = "good film"
    assert AutoTokenizer.from_pretrained(tmp_path / "one")(text) == AutoTokenizer.from_pretrained(tiny_base)(text)


def test_more_layers_than_there_are_is_one_line(tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="a number from 1 to 2 is needed, got 9"):
        write_first_layers(str(tiny_base), 9, tmp_path / "nine")
    assert not (tmp_path / "nine").exists()


def test_the_job_of_slurm_is_a_command_that_fit_understands(monkeypatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    script = (EXAMPLES / "slurm.sh").read_text().replace("\\\n", " ")
    asked = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    for name, value in {"NNODES": asked["nodes"], "NTASKS_PER_NODE": asked["ntasks-per-node"], "JOB_ID": "7"}.items():
        script = script.replace(f"$SLURM_{name}", value)
    (line,) = (line for line in script.splitlines() if line.startswith("srun "))
    words = shlex.split(line)
    run = ConfiguredRun("fit", words[words.index("fit") + 1 :])
    assert (int(run.config.trainer.num_nodes), int(run.config.trainer.devices)) == (2, 4)
    assert run.config.data.batch_size >= 8 and run.config.name == "reviews-7"
