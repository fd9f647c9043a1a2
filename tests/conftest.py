"""Shared by all tests: tiny models and tokenizers made on the spot, and the optional real data beside the checkout."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only cost time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels run on the CPU

from twdpo.toy import build_toy_model

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pairs, tokenizers and a tiny trained model; a test that asks for it is skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """A folder with the toy's model and tokenizer."""
    directory = tmp_path_factory.mktemp("toy")
    build_toy_model(directory)
    return directory
