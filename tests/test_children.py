"""How child processes start."""

import multiprocessing

import pytest
import torch

from lightning_lora import children


@pytest.mark.parametrize(("can", "method"), [(True, "forkserver"), (False, "spawn")])
def test_children_are_forked_where_a_forked_process_can_use_the_gpu(
    monkeypatch: pytest.MonkeyPatch, can: bool, method: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(children, "_forked_can_use_gpu", lambda: can)
    assert children.child_context().get_start_method() == method


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif("forkserver" not in multiprocessing.get_all_start_methods(), reason="nothing is forked")
def test_a_forked_process_that_cannot_use_a_gpu_says_so() -> None:
    assert children.child_context().get_start_method() == "forkserver"
    assert not children._forked_can_use_gpu()
