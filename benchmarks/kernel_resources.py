"""Compile the Triton kernels for GPUs that need not be here, and print what each asks of the GPU.

    python benchmarks/kernel_resources.py                                every default tile shape, Llama-3-8B head
    python benchmarks/kernel_resources.py --capability 9.0 --tile 128,128,64,8,4,descriptors

Registers are per thread (255 at most); spilled bytes per thread go through memory and cost time; shared memory is per
program (99 KiB at most on 8.6, 8.9 and 12.x, 163 on 8.0, 227 on 9.0 and 10.x). Needs no GPU: Triton brings ptxas.
The last line is JSON.
"""

import argparse
import json
import re
import subprocess
import tempfile
import warnings

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from twdpo.kernels import weighted_logratio as kernels
from twdpo.kernels.tiles import TILES
from twdpo.logratio import OF_REFERENCE, TERMS

KERNELS = ("tile_statistics_kernel", "finish_tokens_kernel", "sum_sequences_kernel", "logits_gradient_kernel",
           "kept_gradient_kernel")
CACHE_GIB = 0.5  # some of the tiles are kept
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.bool: "i1"}


def record_launches(plan: kernels.Plan, dtype: torch.dtype, bias: bool, vocabulary=128256, hidden=4096):
    """{kernel: (its name, arguments, constants)} of one forward and backward pass, on tensors without memory.

    A kernel that also fills the cache is one of its own.
    """
    launches = {}

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return self.record

        def record(self, *args, **constants):
            keeps = dict(zip(before[self.name].arg_names, args)).get("kept_NC") is not None
            title = f"{self.name}, keeping" if keeps and self.name == "tile_statistics_kernel" else self.name
            launches.setdefault(title, (self.name, args, constants))

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    num_tokens = 4096
    before = {name: getattr(kernels, name) for name in (*KERNELS, "_set_product", "_add_product")}
    try:
        for name in KERNELS:
            setattr(kernels, name, Recorder(name))
        kernels._set_product = kernels._add_product = lambda *_: None
        operands = (meta(num_tokens, hidden, dtype=dtype), meta(vocabulary, hidden, dtype=dtype),
                    meta(vocabulary, dtype=dtype) if bias else None, meta(num_tokens, dtype=torch.int64))
        # A reference of the policy's size.
        compares = not set(plan.terms).isdisjoint(OF_REFERENCE)
        reference = kernels.Reference(*operands[:3]) if compares else kernels.NO_REFERENCE
        _, logps_N, softmax, values, kept = kernels.forward(
            *operands, meta(num_tokens), meta(num_tokens), meta(5, dtype=torch.int64), meta(4), plan, reference)
        upstream = {name: value for name, value in values.items() if name != "top1"}
        kernels.backward(*operands, softmax, logps_N, upstream, kept, plan, (True, True, bias), reference)
    finally:
        for name, value in before.items():
            setattr(kernels, name, value)
    return launches


def compile_launch(name: str, arguments: tuple, constants: dict, capability: tuple[int, int]):
    """Compile a kernel as launching it with these arguments would."""
    kernel = getattr(kernels, name)
    options = {key: constants[key] for key in ("num_warps", "num_stages") if key in constants}
    values = dict(zip(kernel.arg_names, arguments)) | {key: value for key, value in constants.items()
                                                      if key not in options}
    signature, constexprs, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        divisible = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + SHORT[value.dtype]
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            signature[parameter.name], divisible = f"tensordesc<{SHORT[value.base.dtype]}[{block}]>", False
        else:
            signature[parameter.name], divisible = "i32", divisible and value % 16 == 0
        if divisible:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability[0] * 10 + capability[1], 32), options=options)


def resources(compiled) -> dict[str, float]:
    """What ptxas reports, and which tensor core instruction is used."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
                                capture_output=True, text=True, check=True).stdout
    ptx = compiled.asm["ptx"]
    instructions = [name for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync") if name in ptx]
    registers, spilled = (int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK"))
    return {"registers": registers, "spilled_bytes": spilled, "shared_kib": round(compiled.metadata.shared / 1024, 1),
            "tensor_cores": " ".join(instructions) or "-"}


def capability_of(text: str) -> tuple[int, int]:
    """An argparse type."""
    if not re.fullmatch(r"\d+\.\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no compute capability, as 9.0 is")
    major, minor = text.split(".")
    return int(major), int(minor)


def tile_of(text: str) -> kernels.Tile:
    """An argparse type."""
    if not re.fullmatch(r"\d+(,\d+){4}(,descriptors)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not five whole numbers with or without 'descriptors'")
    return kernels.Tile(*map(int, text.split(",")[:5]), descriptors=text.endswith("descriptors"))


def terms_of(text: str) -> tuple[str, ...]:
    """An argparse type."""
    terms = tuple(filter(None, text.split(",")))
    if unknown := set(terms) - set(TERMS):
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: there are {', '.join(TERMS)}")
    return terms


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=capability_of,
                        help="compute capability, as 9.0; all that TILES names, 8.0 first, by default")
    parser.add_argument("--tile", type=tile_of, help="block_n,block_v,block_d,num_warps,num_stages[,descriptors] of "
                        "all kernels; TILES by default")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--bias", action="store_true")
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--terms", type=terms_of, default="", help=f"comma-separated: {', '.join(TERMS)}")
    flags = parser.parse_args(argv)
    if kernels.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")
    dtype = getattr(torch, flags.dtype)
    capabilities = sorted({max(least, (8, 0)) for least in TILES[dtype.itemsize]})
    if flags.capability:
        capabilities = [flags.capability]
    rows = []
    print(f"Triton {triton.__version__}, {flags.dtype}, V 128,256, D 4,096\n"
          f"{'capability':10} {'kernel':32} {'tile':>12} {'registers':>9} {'spilled B':>9} {'shared KiB':>10} "
          "tensor cores")
    for capability in capabilities:
        tiles = kernels.default_tiles(dtype, capability)
        if flags.tile:
            tiles = kernels.Tiles(flags.tile, flags.tile, flags.tile)
        compares = not set(flags.terms).isdisjoint(OF_REFERENCE)
        plan = kernels.Plan(None, flags.softcap, tiles, kernels.WAVE_MIB, flags.terms,
                            CACHE_GIB if flags.softcap is None and not compares else 0.0)
        for name, launch in record_launches(plan, dtype, flags.bias).items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = resources(compile_launch(*launch, capability))
            rows.append({"capability": ".".join(map(str, capability)), "kernel": name} | row)
            tile = tiles.gradient if name == "logits_gradient_kernel" else tiles.statistics
            tile = tiles.reference if compares else tile
            shape = f"{tile.block_n}x{tile.block_v}x{tile.block_d}"
            print(f"{rows[-1]['capability']:10} {name:32} {shape:>12} {row['registers']:9} {row['spilled_bytes']:9} "
                  f"{row['shared_kib']:10} {row['tensor_cores']}", flush=True)
    print(json.dumps({"triton": triton.__version__, "dtype": flags.dtype, "kernels": rows}))


if __name__ == "__main__":
    main()
