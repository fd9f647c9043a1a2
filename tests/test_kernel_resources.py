"""The kernels compile for GPUs that are not here, with the tiles they would be launched with there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_KIB = {"8.0": 163, "9.0": 227, "12.0": 99}  # a program's most, CUDA programming guide


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(capability, kernel): resources}; compiled in a process of its own, where Triton does not interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    output = subprocess.run([sys.executable, ROOT / "benchmarks" / "kernel_resources.py"], env=environment, text=True,
                            stdout=subprocess.PIPE, check=True).stdout
    rows = json.loads(output.splitlines()[-1])["kernels"]
    return {(row["capability"], row["kernel"]): row for row in rows}


def test_every_kernel_fits_its_gpu(compiled):
    assert {capability for capability, _ in compiled} == set(SHARED_KIB)
    for (capability, kernel), row in compiled.items():
        assert row["shared_kib"] <= SHARED_KIB[capability], (capability, kernel)
        # A block of 64-bit addresses cost 500 bytes a thread; a few may spill without harm.
        assert row["spilled_bytes"] <= 64, (capability, kernel)


def test_hopper_uses_its_tensor_cores(compiled):
    for kernel in ("tile_statistics_kernel", "logits_gradient_kernel"):
        assert compiled["9.0", kernel]["tensor_cores"] == "wgmma.mma_async"
        assert compiled["8.0", kernel]["tensor_cores"] == "mma.sync"
