"""Transfer functions at some frequencies, and the matrices of diffraction tomography made of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import Optics
from ..reference import diffraction as reference


class Scan(NamedTuple):
    """A scan as `oder_fast.ops.diffraction_forward` takes it, and the number of columns of its images."""

    transfer: Tensor
    depths: Tensor
    support: Tensor
    optics: Optics
    width: int

    def only(self, illumination: int) -> Scan:
        """Return the scan by one illumination."""
        one = slice(illumination, illumination + 1)
        return self._replace(transfer=self.transfer[one], support=self.support[one])


def transfer_at(scan: Scan, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the transfer functions at some frequencies, complex128, shape (L, Z) and that of the frequencies.

    Args:
        scan: The scan.
        rows: Row frequency numbers, int64, signed or as indices of the transform.
        columns: Column frequency numbers, which are broadcast with `rows`.
    """
    transfer, depths, support, optics, width = scan
    shape = (support.shape[1], width)
    rows, columns = torch.broadcast_tensors(
        reference.signed(rows, shape[0]), reference.signed(columns, width)
    )
    ends = support[:, rows]
    inside = ((columns >= ends[..., 0]) & (columns < ends[..., 1]))[:, None]
    if transfer.is_complex():
        return torch.where(inside, transfer[:, :, rows, columns].to(torch.complex128), 0)
    return torch.where(inside, reference.waves(transfer, depths, list(optics), rows, columns, shape), 0)


def gram_shape(support: Tensor, width: int) -> tuple[int, int]:
    """Return the rows and columns of the pairs of `diffraction_gram`.

    They are of the frequencies that pass, with one illumination, at both signs.
    """
    height = support.shape[1]
    begin, end = support[..., 0].long(), support[..., 1].long()
    mirror = -torch.arange(height, device=support.device) % height
    begin, end = torch.maximum(begin, 1 - end[:, mirror]), torch.minimum(end, 1 - begin[:, mirror])
    both = begin < end
    if not bool(both.any()):
        return 1, 1
    number = reference.signed_frequencies(height, support.device).abs()
    largest_row = int(torch.where(both.any(0), number, 0).max())
    return 2 * largest_row + 1, int(torch.where(both, end, 1).max())


def gram_matrices(scan: Scan) -> tuple[Tensor, Tensor]:
    """Return the matrices that `diffraction_gram` takes, complex128, of a scan of evenly spaced slices.

    Illumination after illumination, so that no more than one's transfer functions are in memory.
    """
    support, width = scan.support, scan.width
    height, device, n = support.shape[1], support.device, len(scan.depths)
    auto = torch.zeros(n, height, width, dtype=torch.complex128, device=device)
    rows, columns = gram_shape(support, width)
    pairs = torch.zeros(n, n, rows, columns, dtype=torch.complex128, device=device)
    i = torch.arange(-(rows // 2), rows // 2 + 1, device=device)[:, None]
    j = torch.arange(1 - columns, columns, device=device)
    numbers = reference.signed_frequencies(height, device)
    for light, ends in enumerate(support):
        one = scan.only(light)
        used = ends[:, 0] < ends[:, 1]
        if not bool(used.any()):
            continue
        k = numbers[used][:, None]
        m = torch.arange(int(ends[used, 0].min()), int(ends[used, 1].max()), device=device)
        h = transfer_at(one, k, m)[0]
        auto[:, k, m] += 2 * h[:1] * h.conj()
        box = transfer_at(one, i, j)[0].conj()
        here, there = box[..., columns - 1 :], box.flip(1, 2)[..., columns - 1 :]
        pairs += 2 * here[:, None] * there[None]
    return auto, pairs


def normal_matrices(scan: Scan, rows: Tensor, columns: Tensor) -> Tensor:
    """Return A^T A at some frequencies u: Hermitian matrices (n, 2 Z, 2 Z) for (X(u), conj X(-u)), complex128.

    Args:
        scan: The scan.
        rows: Row frequency numbers (n,), int64, signed or as indices of the transform.
        columns: Column frequency numbers (n,).
    """
    h = torch.cat((transfer_at(scan, rows, columns), transfer_at(scan, -rows, -columns).conj()), 1)
    h = h.permute(2, 0, 1)  # (n, L, 2 Z)
    return 2 * h.mH @ h
