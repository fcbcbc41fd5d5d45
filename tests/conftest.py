import os
import sys
from pathlib import Path

import pytest
import torch

# Nothing in the tests may reach for a network or a login.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # then Triton's kernels run interpreted; it asks at its first import, by whomever
    os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture
def poisoned():
    """What isn't written shows: every new buffer holds NaN, or a huge int."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills them
    assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, where its files are at hand."""
    from configurator import UserError
    from data.tokenizer import tokenizer_from_meta

    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("GPT-2's BPE needs its files: set TIKTOKEN_CACHE_DIR")
    try:
        return tokenizer_from_meta({"name": "gpt2"})
    except UserError as error:
        pytest.skip(f"GPT-2's BPE doesn't load: {error}")
