"""Proved bounds on floating-point error, so that a norm computed fast is never smaller than the true one.

Notation of Higham, Accuracy and Stability of Numerical Algorithms (2nd edition), sections 2.2 and 3.1: u is the unit
roundoff, 2^-24 in float32; gamma(n) = n u / (1 - n u). A sum of n products has an error of at most gamma(n) times the
sum of the products' absolute values, in whatever order it is taken, with or without fused multiply-adds. So the bounds
hold for every BLAS, blocking and number of threads, as long as arithmetic is at least float32 (`exactly` sees to that)
and subnormal numbers are not flushed to zero (torch's default); what underflow loses is bounded by `TINY` a product.

Norms that overflow come out infinite, and norms of NaN as NaN: never as something small.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TINY = 2.0**-149
"""The least positive float32: what one product can lose by underflow."""

ROUND_UP = 1.0 + 2.0**-40
"""Covers the few float64 operations in which bounds themselves are computed."""

CANCELLATION = 32.0
"""A ghost norm is never taken below 1 / 32 of the sum of its outer products' norms; see `summation_error`."""

MAX_PHYSICAL_BATCH = 2**12
"""Examples that may be backpropagated at once; a step adds up any number of such batches without losing more."""

MAX_EXAMPLES = 2**20
"""Examples of one step, over all its physical batches, up to which `SUMMATION_ERROR` holds."""

MAX_POSITIONS = 2**16
"""Positions of one example (tokens, pixels) up to which `SUMMATION_ERROR` holds."""

QUICK_ROWS = 16
"""Rows that may be added up in float32 before a sum goes on in float64."""

QUICK_EXAMPLES = 256
"""Examples of a step that may be added up so; a public constant, so that the bound on their error is one."""

_SHORT, _LONG = 512, 1 << 20


def gamma(terms: int, dtype: torch.dtype) -> float:
    """What Higham calls gamma of that many terms, rounded up; infinite where it is not defined."""
    product = terms * torch.finfo(dtype).eps / 2
    return product / (1.0 - product) * ROUND_UP if product < 0.5 else float("inf")


def summation_error(examples: int) -> float:
    """How far rounding can move a step's sum, in units of the clipping norm C.

    Let every example's factor be at most C / (root of its summed `squared_norms`). Then the L2 distance between the
    computed weighted sum and the exact sum of the examples' contributions is at most half of this; so two samples that
    differ in one example have sums that differ by that example's contribution, of norm at most C, and at most this.

    **Proof.** A physical batch is summed in float64 with at most its examples + `MAX_POSITIONS` + 8 additions and
    multiplications on the way of each term; batches are added with what rounding loses carried along (`optimizer`),
    which counts for less than 4 more, however many there are. So the error of every coordinate is at most gamma64 times
    the sum of its terms' absolute values (Higham, section 4.2). Where gradients are instantiated, a term is one
    example's coordinate, and the L2 norm of the sum of absolute values is at most the sum of the examples' norms,
    `examples` times C. Where they are not, a term is a product at one position; an example's terms then amount to at
    most the sum S of its outer products' norms, and its factor is at most C / (S / CANCELLATION), because its squared
    norm was not taken below (S / CANCELLATION)^2.

    Up to `QUICK_EXAMPLES` examples of a step may be added up in float32 first, `QUICK_ROWS` instantiated gradients at a
    time, by factors rounded to float32: each term passes at most QUICK_ROWS + 1 roundings, which moves their sum by at
    most gamma32(QUICK_ROWS + 1) times `QUICK_EXAMPLES` times C more.

    What it does not cover: a layer's forward and backward pass may round differently in another batch (a BLAS chooses
    its blocking by size). That moves gradients themselves by relative amounts of the order of 1e-7, as in every
    floating-point implementation of DP-SGD.
    """
    quick = min(examples, QUICK_EXAMPLES) * gamma(QUICK_ROWS + 1, torch.float32)
    additions = min(examples, MAX_PHYSICAL_BATCH) + MAX_POSITIONS + 12
    return 2.0 * (examples * CANCELLATION * gamma(additions, torch.float64) + quick)


SUMMATION_ERROR = summation_error(MAX_EXAMPLES)
"""`summation_error` for any number of examples up to `MAX_EXAMPLES`; 1.1e-3. Beyond, it grows in proportion."""


def norms_above(x: Tensor, dim: int) -> Tensor:
    """float64: L2 norms over `dim`, each at least the true norm of the given numbers."""
    terms = x.shape[dim]
    # square, n - 1 additions, root: gamma(n + 2) covers the norm, of which it needs about half
    norms: Tensor = torch.linalg.vector_norm(x, dim=dim).double()
    return norms.mul_(1.0 + gamma(terms + 2, x.dtype)).add_((terms * TINY) ** 0.5)


def squares_above(rows: Tensor) -> Tensor:
    """float64[n]: squared norms of the rows of `rows` [n, p], each at least the true one.

    Taken in float32 over short stretches, whose results are summed in float64: the relative bound is 3.1e-5.
    """
    n, width = rows.shape
    if rows.numel() == 0:
        return rows.new_zeros(n, dtype=torch.float64)
    if width <= _SHORT:
        return norms_above(rows, 1).square_()
    even = width - width % _SHORT
    squares = norms_above(rows[:, :even].reshape(n, -1, _SHORT), 2).square_().sum(1)
    if even < width:
        squares += norms_above(rows[:, even:], 1).square_()
    return squares.mul_(1.0 + gamma(width // _SHORT + 2, torch.float64))


def sizes_above(x: Tensor, example: int = 0) -> Tensor:
    """float64[n]: L2 norms of all that belongs to an example, each at least the true one; `example` is its dimension.

    For bounds on errors, to which up to 6 % more does not matter. Over the last dimension first, which is the quick
    one: the order does not matter to a norm.
    """
    n = x.shape[example]
    if example == 0 and x.dim() == 3 and x.stride(1) == 1:
        x = x.transpose(1, 2)  # channels that were moved last
    if example == 0 and x.is_contiguous():
        flat = x.view(n, x.numel() // max(1, n))
        return norms_above(flat, 1) if flat.shape[1] < _LONG else squares_above(flat).sqrt_().mul_(ROUND_UP)
    squares = norms_above(x, x.dim() - 1).square_().movedim(example, 0).flatten(1)
    return squares.sum(1).mul_(1.0 + gamma(squares.shape[1], torch.float64)).sqrt_().mul_(ROUND_UP)


def widen(squares: Tensor, error: Tensor) -> Tensor:
    """Squares of (root of `squares` + `error`): an upper bound from one norm and a bound on its error, both float64."""
    return squares.sqrt().add_(error).square_().mul_(ROUND_UP)


@contextmanager
def exactly() -> Iterator[None]:
    """No gradients, no autocast, no TF32 or bfloat16 in place of float32: what the bounds above presuppose."""
    products = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    precisions = [backend.fp32_precision for backend in products]
    for backend in products:
        backend.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for backend, precision in zip(products, precisions, strict=True):
            backend.fp32_precision = precision
