"""The kernels in Triton by its interpreter, which needs Triton but no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARE = """
import torch
from lightning_lora.models.packed import padded_attention
from lightning_lora.models.triton_kernels import ShortAttention

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

ADD_NORM = """
import torch
from lightning_lora.models.triton_kernels import add_norm, add_norm_works

torch.manual_seed(0)
for width in (48, 64):
    assert add_norm_works(width, torch.device("cpu"))
    norm = torch.nn.LayerNorm(width, eps=1e-12).requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    norm.bias.normal_()
    x, residual = torch.randn(2, 5, width).bfloat16(), torch.randn(2, 5, width)
    wanted = norm(x.float() + residual)
    found = add_norm(x, residual, norm).float()
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-6)  # the interpreter cuts to bfloat16
"""


@pytest.mark.parametrize("script", [COMPARE, ADD_NORM], ids=["attention", "add_norm"])
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton")
def test_kernels_compute_what_torch_does(script: str) -> None:
    env = os.environ | {"TRITON_INTERPRET": "1"}  # read when the kernels are defined
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
