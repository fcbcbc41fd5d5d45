"""What pip installed works, in this environment and folder: python installed.py. No test of pytest's: see .ci/run."""

import sys
import warnings
from importlib import metadata

import torch

import sus_attn

# Neither the compiler of torch nor a kernel's language is imported before it is needed: that takes seconds.
assert not {"torch._dynamo", "numba", "triton"} & sys.modules.keys()
q, k, v = (torch.randn(1, 2, 130, 16, requires_grad=True) for _ in range(3))
with warnings.catch_warnings():
    warnings.simplefilter("error")  # as a fallback to the reference would be
    out = sus_attn.sus_attention(q, k, v, c=float("inf"))
exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
assert torch.allclose(out, exact, atol=1e-5)
a, b = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, exact))
assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(a, b))

from transformers import AutoConfig, AutoModelForCausalLM

import sus_hf

config = AutoConfig.for_model(
    "llama", vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="sus").train()
sus_hf.set_retention(model, c=4.0)
x = torch.randint(50, (2, 130))
loss = model(x, labels=x).loss
loss.backward()
model.set_attn_implementation("sdpa")
assert torch.allclose(loss, model(x, labels=x).loss, atol=1e-5)
print("nanosus", metadata.version("nanosus"), "works from", sus_attn.__file__)
