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
OF_THE_CACHE = ("tile_statistics_kernel, keeping", "kept_gradient_kernel")
SHARED_KIB = {"8.0": 163, "9.0": 227, "12.0": 99}  # a program's most, CUDA programming guide


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """Without terms, with two and a bias, with KL, and with all terms {(capability, kernel): resources}; of a process
    where Triton does not interpret."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no Triton here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}",
                    "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    program = ("import kernel_resources\n"
               "for flags in ([], ['--terms', 'entropy,top1', '--bias'], ['--terms', 'kl'],\n"
               "              ['--terms', ','.join(kernel_resources.TERMS)]): kernel_resources.main(flags)")
    output = subprocess.run([sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE,
                            check=True).stdout
    reports = [json.loads(line)["kernels"] for line in output.splitlines() if line.startswith("{")]
    return [{(row["capability"], row["kernel"]): row for row in rows} for rows in reports]


def test_every_kernel_fits_its_gpu(compiled):
    plain, _, compared, _ = compiled
    kernels = {"tile_statistics_kernel", "tile_statistics_kernel, keeping", "finish_tokens_kernel",
               "sum_sequences_kernel", "logits_gradient_kernel", "kept_gradient_kernel"}
    assert plain.keys() == {(capability, kernel) for capability in SHARED_KIB for kernel in kernels}
    for (capability, kernel), row in plain.items():
        assert row["shared_kib"] <= SHARED_KIB[capability], (capability, kernel)
        # A block of 64-bit addresses cost 500 bytes a thread; a few may spill without harm.
        assert row["spilled_bytes"] <= 64, (capability, kernel)
    assert compared.keys() == {key for key in plain if key[1] not in OF_THE_CACHE}
    for (capability, kernel), row in compared.items():
        assert row["shared_kib"] <= SHARED_KIB[capability] and row["spilled_bytes"] <= 64, (capability, kernel)


def test_hopper_uses_its_tensor_cores(compiled):
    for rows in compiled:
        for (capability, kernel), row in rows.items():
            if kernel.startswith(("tile_statistics_kernel", "logits_gradient_kernel")):
                assert row["tensor_cores"] == ("wgmma.mma_async" if capability == "9.0" else "mma.sync"), kernel


def test_the_kernels_compile_with_terms(compiled):
    """Not all of them fit the registers: what goes through memory is the end of a tile, not its inner loop."""
    plain, with_terms, _, with_all = compiled
    # Where the entropy is given a gradient nothing that is kept is of use; beside a reference nothing is kept.
    assert with_terms.keys() == {key for key in plain if key[1] != "kept_gradient_kernel"}
    assert with_all.keys() == {key for key in plain if key[1] not in OF_THE_CACHE}
    for (capability, kernel), row in (*with_terms.items(), *with_all.items()):
        assert row["shared_kib"] <= SHARED_KIB[capability] and row["spilled_bytes"] <= 512, (capability, kernel)
