"""The kernels compile for GPUs that are not here, with the tiles they would be launched with there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
SHARED_KIB = {"8.0": 163, "9.0": 227, "12.0": 99}  # a program's most, CUDA programming guide


def compile_kernels(cache: Path, *flags: str) -> dict:
    """{(capability, kernel): resources}; compiled in a process of its own, where Triton does not interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    output = subprocess.run([sys.executable, ROOT / "benchmarks" / "kernel_resources.py", *flags], env=environment,
                            text=True, stdout=subprocess.PIPE, check=True).stdout
    rows = json.loads(output.splitlines()[-1])["kernels"]
    return {(row["capability"], row["kernel"]): row for row in rows}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compile_kernels(tmp_path_factory.mktemp("triton"))


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


def test_the_kernels_compile_with_terms(tmp_path):
    """Not all of them fit the registers: what goes through memory is the end of a tile, not its inner loop."""
    for (capability, kernel), row in compile_kernels(tmp_path, "--terms", "entropy,top1").items():
        assert row["shared_kib"] <= SHARED_KIB[capability] and row["spilled_bytes"] <= 512, (capability, kernel)
