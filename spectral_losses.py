"""Radial spectra of images: the frequency measures of Spectrum Matching (Ning et al., 2026, arXiv 2603.14645).

psd(images)             # (N, 3, 64, 64) -> (N, 16): power per radial band, low to high
"""

import math

import torch

from dct import dct2

BINS = 16  # radial bands, as in the paper's code


def radial_bands(height, width, bins=BINS, device=None):
    """Band floor(bins r / r_max) of every DCT coefficient, r its distance from DC -> (H, W) long, 0..bins-1."""
    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    radius = torch.hypot(rows[:, None].double(), cols.double())
    return (bins * radius / max(math.hypot(height - 1, width - 1), 1)).floor().long().clamp_max(bins - 1)


def psd(x, bins=BINS):
    """Radial power spectral density (section 3.1): subtract the spatial mean, DCT of the whole frame, square, mean
    over channels, mean over the cells of each radial band. x (N, C, H, W) -> (N, bins), units of x squared.
    The DC cell is zero but counts in the size of its band, as in the authors' code. Differentiable.
    """
    power = dct2(x - x.mean((-2, -1), keepdim=True)).square().mean(1).flatten(1)  # (N, H*W)
    band = radial_bands(*x.shape[-2:], bins, x.device).flatten()
    total = power.new_zeros(len(x), bins).index_add(1, band, power)
    return total / torch.bincount(band, minlength=bins).clamp_min(1)
