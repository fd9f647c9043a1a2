"""Shared by all tests: tiny models and tokenizers made on the spot, and the optional real data beside the checkout."""

import functools
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads only cost time

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: kernels run on the CPU

from runs_of_tests import small_run, write_pairs

import train
from twdpo import dist
from twdpo.losses import LOSSES
from twdpo.models.source import load_tokenizer
from twdpo.toy.train import build_toy_model
from twdpo.weights import WEIGHTS

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """A benchmark of one thread leaves the tests after it as many as their child processes have, to the last bit."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registries():
    """What a test adds to the tables of losses and sources is gone after it."""
    before = dict(LOSSES), dict(WEIGHTS)
    yield
    for table, old in zip((LOSSES, WEIGHTS), before):
        table.clear()
        table.update(old)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real pairs, tokenizers and a tiny trained model; a test that asks for it is skipped where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("the shared data are not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def real_tokenizer(shared):
    """Name -> real tokenizer, read once."""
    return functools.cache(lambda name: load_tokenizer(shared / "tokenizers" / name, ""))


@pytest.fixture
def process():
    """The process group of this process alone."""
    yield dist.start()
    dist.stop()


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """A folder with the toy's model and tokenizer."""
    directory = tmp_path_factory.mktemp("toy")
    build_toy_model(directory)
    return directory


@pytest.fixture(scope="session")
def run_pairs(tmp_path_factory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


@pytest.fixture(scope="session")
def run_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def run_arguments(toy_model, run_pairs, run_cache):
    """Flags of a small run of train.py into a folder."""
    return small_run(toy_model, run_pairs, run_cache)


@pytest.fixture(scope="session")
def plain_run(run_arguments, tmp_path_factory) -> Path:
    """The folder of a finished run with the flags of `run_arguments`, on a cache of its own. To be read only."""
    folder = tmp_path_factory.mktemp("plain")
    train.main(run_arguments(folder / "run", cache_dir=folder / "cache"))
    return folder / "run"


@pytest.fixture(scope="session")
def toy_flags(run_cache) -> list[str]:
    """Flags of the default run of the toy, cut to one step."""
    return ["--cache-dir", str(run_cache), "--max-steps", "1", "--warmup-ratio", "0", "--save-every", "0"]


@pytest.fixture(scope="session")
def toy_run(toy_flags, tmp_path_factory) -> Path:
    """The folder of that run. To be read only."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    train.main([*toy_flags, "--output-dir", str(folder)])
    return folder
