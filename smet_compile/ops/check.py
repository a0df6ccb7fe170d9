"""What products are given, looked at before a kernel takes it by its address."""

from __future__ import annotations

from torch import Tensor

from smet_compile.format import Layout


def masked_matmul(
    input: Tensor, values: Tensor, layout: Layout, transposed: bool, bias: Tensor | None, offsets: Tensor | None
) -> None:
    """Raises ValueError where dtypes, devices or shapes do not go together."""
    width, num_outputs = layout.matrix[::-1] if transposed else layout.matrix
    _alike("masked_matmul", values, input=input, bias=bias)
    _tokens("masked_matmul: input", input, width, layout, offsets)
    if values.shape != layout.values_shape(values.shape[0]):
        raise ValueError(
            f"masked_matmul: expected values of {layout.values_shape(values.shape[0])}, got {tuple(values.shape)}"
        )
    if bias is not None and bias.shape != (num_outputs,):
        raise ValueError(f"masked_matmul: expected a bias of ({num_outputs},), got {tuple(bias.shape)}")


def sampled_matmul(left: Tensor, right: Tensor, layout: Layout, offsets: Tensor | None) -> None:
    """Raises ValueError where dtypes, devices or shapes do not go together."""
    _alike("sampled_matmul", left, right=right)
    _tokens("sampled_matmul: left", left, layout.rows, layout, offsets)
    _tokens("sampled_matmul: right", right, layout.cols, layout, offsets)
    if left.shape[:-1] != right.shape[:-1]:
        raise ValueError(
            f"sampled_matmul: expected as many tokens on both sides, got {tuple(left.shape)} and {tuple(right.shape)}"
        )


def _alike(op: str, tensor: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and (other.dtype, other.device) != (tensor.dtype, tensor.device):
            raise ValueError(
                f"{op}: expected {name} of {tensor.dtype} on {tensor.device}, got {other.dtype} on {other.device}"
            )


def _tokens(name: str, tokens: Tensor, width: int, layout: Layout, offsets: Tensor | None) -> None:
    """(T, width) of one matrix and where there are offsets, else (S, T, width); a stack of one may come either way."""
    dims = (2,) if offsets is not None else (2, 3) if layout.num_matrices == 1 else (3,)
    stacked = tokens.dim() < 3 or tokens.shape[0] == layout.num_matrices
    if tokens.dim() not in dims or tokens.shape[-1] != width or not stacked:
        shape = f"({layout.num_matrices}, tokens, {width})" if dims == (3,) else f"(tokens, {width})"
        raise ValueError(f"{name}: expected {shape}, got {tuple(tokens.shape)}")
