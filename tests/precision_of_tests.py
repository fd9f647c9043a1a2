"""How exact fp32 and half precision have to be, whatever the processor: fp64 as the truth, the error of plain torch in
the same dtype as the measure. Rounding differs from one BLAS, instruction set and thread count to the next."""

import torch
from torch.overrides import TorchFunctionMode


class InDouble(TorchFunctionMode):
    """Inside this context what asks for fp32, or for no dtype, gets fp64, so that a model in fp64 is exact all through:
    those of transformers have norms, rotary embeddings and a softmax that compute in fp32 whatever comes in. Models are
    built outside, with the numbers that they have in fp32."""

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*args, **kwargs)


def assert_exact(ours: torch.Tensor, expected: torch.Tensor, message: str = "") -> None:
    """Equal in fp64: what differs is a mistake, not rounding."""
    assert ours.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9, msg=lambda text: f"{message}: {text}")


def assert_as_exact(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, message: str = "",
                    floor: float = 2e-6) -> None:
    """No error is above four times the largest of `plain`, which computes the same in the same dtype, plus a floor.

    exact: fp64. floor: what is no mistake where `plain` happens to be exact, relative to a value and absolute for one
    below 1; by default sixteen roundings of fp32.
    """
    assert ours.dtype == plain.dtype and exact.dtype == torch.float64 and ours.shape == plain.shape == exact.shape
    if not exact.numel():
        return
    error, allowed = ((value.detach().double() - exact.detach()).abs() for value in (ours, plain))
    excess = error - floor * exact.detach().abs().clamp_min(1)
    assert excess.max() <= 4 * allowed.max(), f"{message}: off by {error.max():.2e}, plain torch by {allowed.max():.2e}"
