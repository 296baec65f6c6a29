"""Singular values and vectors of a sum of matrices, such as the gradient of a weight, that is never held whole."""

from __future__ import annotations

import torch
from torch import Tensor

_EXTRA = 8
"""Columns of a sketch beyond the wanted vectors, for the accuracy of the last ones."""


class SketchedSVD:
    r"""Sums up ``G`` ``(out, in)``, products ``d_y^T x`` or matrices, as two random sketches ``G R`` and ``L G``.

    Where these would not be smaller than ``G``, it is ``G`` itself that is summed up, and the result is exact. Equal
    seeds give equal ``R`` and ``L``, so that sketches of several devices can be added.

    Args:
        num_out: Rows of ``G``.
        num_in: Columns of ``G``.
        count: Number of singular vectors to find.
        seed: Seeds ``R`` and ``L``.
        device: Device of the sketches, and of what is added.
        dtype: Type to sum up in, at least float32.

    References:
        Tropp et al., *Practical sketching algorithms for low-rank matrix approximation*, 2017, algorithm 4,
        https://arxiv.org/abs/1609.00048
    """

    def __init__(
        self, num_out: int, num_in: int, count: int, seed: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.num_out, self.num_in, self.seed = num_out, num_in, seed
        self.count = min(count, num_out, num_in)
        self.side = self.count + _EXTRA
        self.is_whole = 3 * self.side + 1 >= min(num_out, num_in)
        options = {"device": device, "dtype": dtype}
        self.range = torch.zeros(num_out, num_in if self.is_whole else self.side, **options)
        self.core = torch.zeros(0 if self.is_whole else 2 * self.side + 1, num_in, **options)

    @torch.no_grad()
    def add(self, x: Tensor, d_y: Tensor) -> None:
        """Add the product of ``x`` ``(*, in)`` and ``d_y`` ``(*, out)``, summed over all leading axes."""
        with torch.autocast(x.device.type, enabled=False):
            rows = x.detach().reshape(-1, self.num_in).to(self.range)
            d_rows = d_y.detach().reshape(-1, self.num_out).to(self.range)
            if self.is_whole:
                self.range += d_rows.T @ rows
                return
            left, right = self._test_matrices()
            self.range += d_rows.T @ (rows @ right)
            self.core += (d_rows @ left.T).T @ rows

    @torch.no_grad()
    def add_matrix(self, matrix: Tensor) -> None:
        """Add a matrix ``(out, in)``."""
        matrix = matrix.detach().to(self.range)
        if self.is_whole:
            self.range += matrix
            return
        left, right = self._test_matrices()
        self.range += matrix @ right
        self.core += left @ matrix

    def _test_matrices(self) -> tuple[Tensor, Tensor]:
        """``L`` and ``R``, drawn again for each product, which costs less than keeping them."""
        generator = torch.Generator(self.range.device).manual_seed(self.seed)
        options = {"generator": generator, "device": self.range.device, "dtype": self.range.dtype}
        left = torch.randn(2 * self.side + 1, self.num_out, **options)
        return left, torch.randn(self.num_in, self.side, **options)

    def is_finite(self) -> bool:
        """Whether everything that was added is finite."""
        return bool(self.range.isfinite().all() and self.core.isfinite().all())

    def squares(self) -> tuple[Tensor, float]:
        """Squares of the singular values, descending, and the squared norm of ``G``, in float64."""
        squares = torch.linalg.svdvals(self._small()[1]).square()
        if self.is_whole:
            return squares, float(squares.sum())
        # The columns of R have unit variance: each column of the sketch has the norm of G in expectation.
        return squares, max(float(squares.sum()), float(self.range.double().square().sum()) / self.side)

    def _small(self) -> tuple[Tensor | None, Tensor]:
        """A basis ``(out, side)`` of what ``G`` maps to, and ``G`` in it; None and ``G`` if that is not larger."""
        if self.is_whole:
            return None, self.range.double()
        basis, _ = torch.linalg.qr(self.range.double())
        left = self._test_matrices()[0].double() @ basis
        return basis, torch.linalg.lstsq(left, self.core.double()).solution

    def vectors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U`` ``(out, k)``, ``S`` ``(k,)`` and ``V^T`` ``(k, in)`` in float64, with ``k`` at most ``count``.

        Vectors whose value is rounding are left out. The entry of each row of ``V^T`` that is largest in size is
        positive, so that rounding flips no sign.
        """
        basis, small = self._small()
        U, S, Vh = torch.linalg.svd(small, full_matrices=False)
        U = U if basis is None else basis @ U
        rounding = 8 * torch.finfo(self.range.dtype).eps * max(self.num_out, self.num_in) ** 0.5
        k = int((S[: self.count] > rounding * S[0]).sum())
        U, S, Vh = U[:, :k], S[:k], Vh[:k]
        signs = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).sign()
        return U * signs.T, S, Vh * signs
