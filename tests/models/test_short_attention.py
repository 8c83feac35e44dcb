"""The kernels for short texts by Triton's interpreter, which needs Triton but no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from lightning_lora.models.packed import padded_attention
from lightning_lora.models.short_attention import ShortAttention

torch.manual_seed(0)
for dimension in (16, 64):
    for window in (None, 5):
        qkv = torch.randn(60, 3, 2, dimension)
        q, k, v = (qkv[:, i].requires_grad_() for i in range(3))  # heads that do not lie side by side
        offsets = torch.tensor([0, 17, 20, 20, 50, 60], dtype=torch.int32)  # one text is not there
        found = ShortAttention.apply(q, k, v, offsets, 30, 0.3, window)
        wanted = padded_attention(q, k, v, offsets, 30, 0.3, 0.0, window)
        weights = torch.randn_like(wanted)
        for got, value in zip(
            [found, *torch.autograd.grad((found * weights).sum(), (q, k, v))],
            [wanted, *torch.autograd.grad((wanted * weights).sum(), (q, k, v))],
        ):
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_short_texts_are_attended_to_as_by_torch() -> None:
    env = os.environ | {"TRITON_INTERPRET": "1"}  # read when the kernels are defined
    done = subprocess.run([sys.executable, "-c", COMPARE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
