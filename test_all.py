"""Tests against independent oracles: scipy, Pillow, numpy, closed forms, and the real commands run tiny.

    python -m pytest test_all.py

Nothing is downloaded. Tests that use the development data beside the repository are skipped where it is absent.
"""

import argparse
import functools
import itertools
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import scipy.linalg
import scipy.ndimage
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageCms
from torch.utils._python_dispatch import TorchDispatchMode

import dct
import dit
import repa
import sample
import spectral_losses
import train_diffusion
import train_vae
import uvit
import vae
from dct import DCTCodec, DCTStatistics, dct2, idct2
from dit import DIT_SIZES, DiT
from sample import SAMPLERS, VP, Flow, Images, InputError, StableDiffusionVP, like
from spectral_losses import psd, radial_bands
from uvit import UVIT_SIZES, UViT

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
CIFAR = SHARED / "data" / "cifar10-train.zip"
needs_shared = pytest.mark.skipif(not CIFAR.exists(), reason=f"no development data in {SHARED}")


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch):
    torch.manual_seed(0)  # a test that fails by chance fails always
    monkeypatch.setattr(train_diffusion, "GRID_STEPS", 4)  # of the pictures that evaluations draw


def photos(n, size, seed=0):
    """Smooth, coloured, photograph-like images (n, 3, size, size) in [-1, 1]: dead leaves, blurred."""
    leaves = np.stack([sample.dead_leaves(seed * 1000 + i, size, full=True) for i in range(n)])
    x = torch.from_numpy(leaves).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


# ---- dct.py -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (4, 4), (5, 7, 12), (1, 1), (2, 17, 2), (3, 64, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dct_equals_scipy(shape, dtype):
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    oracle = scipy.fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert dct2(x).dtype == dtype
    np.testing.assert_allclose(dct2(x).numpy(), oracle, atol=tolerance)
    np.testing.assert_allclose(idct2(dct2(x)).numpy(), x.numpy(), atol=tolerance)


def test_dct_gradient_and_precision():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dct2, x) and torch.autograd.gradcheck(idct2, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert (dct2(x.float()) - dct2(x)).abs().max() < 1e-5  # float32 inside, even under autocast
        assert dct2(x.bfloat16()).dtype == torch.float32
    with torch.inference_mode():
        dct2(torch.randn(3, 11, 11))
    dct2(torch.randn(3, 11, 11, requires_grad=True)).sum().backward()  # the basis cached above still serves


def walk_zigzag(n):
    """The zigzag as a pen draws it: along a diagonal until the edge, one step, back along the next."""
    row = col = 0
    up, path = True, []
    for _ in range(n * n):
        path.append(row * n + col)
        if up:
            if col == n - 1:
                row, up = row + 1, False
            elif row == 0:
                col, up = col + 1, False
            else:
                row, col = row - 1, col + 1
        elif row == n - 1:
            col, up = col + 1, True
        elif col == 0:
            row, up = row + 1, True
        else:
            row, col = row + 1, col - 1
    return path


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16])
def test_zigzag_equals_a_drawn_one(n):
    assert dct.zigzag(n).tolist() == walk_zigzag(n)


def test_zigzag_published():
    assert dct.zigzag(4).tolist() == [0, 1, 4, 8, 5, 2, 3, 6, 9, 12, 13, 10, 7, 11, 14, 15]


def test_colour_equals_pillow():
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    oracle = np.asarray(Image.fromarray(rgb).convert("YCbCr")).astype(float)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].double()
    ours = dct.rgb_to_ycbcr(x)
    above = ours[0].permute(1, 2, 0).numpy() - oracle  # Pillow rounds down, in fixed point
    assert -0.1 < above.min() and above.max() < 1.05
    assert (dct.ycbcr_to_rgb(ours) - x).abs().max() < 1e-9


@pytest.mark.parametrize("B, shape", [(4, (2, 3, 8, 16)), (3, (9, 6)), (8, (1, 8, 8))])
def test_blockify(B, shape):
    x = torch.arange(np.prod(shape)).view(shape)
    blocks = dct.blockify(x, B)
    assert blocks.shape == (*shape[:-2], shape[-2] // B, shape[-1] // B, B, B)
    assert torch.equal(blocks[..., -1, 0, :, :], x[..., -B:, :B])
    assert torch.equal(dct.unblockify(blocks), x)
    with pytest.raises(ValueError):
        dct.blockify(torch.zeros(7, 8), 4)


@pytest.mark.parametrize("B, size", [(2, 32), (4, 32), (8, 64), (3, 24)])
def test_codec_keeps_everything_but_chroma_detail(B, size):
    x = photos(3, size)
    codec = DCTCodec(size, B, B * B, 128.0 * B)
    tokens = codec.encode(x)
    assert tokens.shape == (3, codec.num_tokens, codec.token_dim) == (3, (size // (2 * B)) ** 2, 6 * B * B)
    ycc = dct.rgb_to_ycbcr((x + 1) * 127.5)
    chroma = F.interpolate(F.avg_pool2d(ycc[:, 1:], 2), scale_factor=2, mode="bilinear")
    plain = (dct.ycbcr_to_rgb(torch.cat((ycc[:, :1], chroma), 1)) / 127.5 - 1).clamp(-1, 1)
    assert (codec.decode(tokens) - plain).abs().max() < 1e-5


def test_codec_token_layout_by_hand():
    """Every number of one token against scipy on the pixels it stands for."""
    B, keep, eta = 4, 9, 100.0
    x = photos(2, 32)
    tokens = DCTCodec(32, B, keep, eta).encode(x).view(2, 4, 4, 6, keep)
    ycc = dct.rgb_to_ycbcr((x + 1) * 127.5).double() - 128
    area = ycc[1, :, 8:16, 24:32].numpy()  # row 1, column 3 of the token grid
    halves = area[1:].reshape(2, 4, 2, 4, 2).mean((2, 4))
    blocks = [area[0, :4, :4], area[0, :4, 4:], area[0, 4:, :4], area[0, 4:, 4:], *halves]
    for block, ours in zip(blocks, tokens[1, 1, 3]):
        oracle = scipy.fft.dctn(block, norm="ortho").flatten()[walk_zigzag(B)[:keep]] / eta
        np.testing.assert_allclose(ours.numpy(), oracle, atol=1e-5)


def test_codec_psnr_rises_with_keep_and_gradients_flow():
    x = photos(4, 32)
    for B in (2, 4, 8):
        psnr = dct.psnr_per_keep(x, B)
        assert psnr.shape == (B * B,) and (psnr.diff() > -0.05).all() and psnr[-1] - psnr[0] > 5
        codec = DCTCodec(32, B, B, 256.0 * B)
        direct = 10 * torch.log10(4 / (codec.decode(codec.encode(x)) - x).square().mean())
        assert abs(direct - psnr[B - 1]) < 1e-2
    x.requires_grad_()
    codec.decode(codec.encode(x)).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_codec_clamps_and_refuses():
    codec = DCTCodec(16, 2, 3, 250.0)
    wild = torch.randn(2, 16, 18) * 50
    assert codec.decode(wild).abs().max() <= 1
    assert torch.equal(codec.decode(wild), codec.decode(wild.clamp(-2, 2)))
    for bad in [(30, 4, 3, 1.0), (32, 4, 17, 1.0), (32, 4, 0, 1.0), (32, 4, 4, 0.0)]:
        with pytest.raises(ValueError):
            DCTCodec(*bad)
    with pytest.raises(ValueError):
        codec.encode(torch.zeros(1, 3, 32, 32))
    whole = torch.full((1, 3, 16, 16), 200, dtype=torch.uint8)
    for taker in (codec.encode, DCTStatistics(2).update, lambda x: dct.psnr_per_keep(x, 2)):
        for integers in (whole, whole.long()):
            with pytest.raises(ValueError, match=r"^images are torch\.\w+, expected floats in \[-1, 1\][^\n]*127\.5"):
                taker(integers)
    assert codec.encode(whole.double() / 127.5 - 1).dtype == torch.float64


def numpy_statistics(x, B):
    """Eta and entropies straight from the definition, with numpy's percentile and histogram."""
    c = dct.block_coefficients(x, B).numpy().astype(np.float64)  # (N, L, 6, B*B)
    channels = [c[:, :, i].reshape(-1, B * B) for i in (slice(0, 4), 4, 5)]
    eta = np.abs(np.percentile(channels[0][:, 0], [1.75, 98.25])).max()
    entropies = np.zeros((3, B * B))
    for i, channel in enumerate(channels):
        for j in range(B * B):
            v = channel[:, j]
            low, high = np.percentile(v, [1.75, 98.25])
            counts, _ = np.histogram(v[(v >= low) & (v <= high)] / eta, 100, (-1, 1))
            p = counts[counts > 0] / counts.sum()
            entropies[i, j] = -(p * np.log2(p)).sum()
    return eta, entropies


@pytest.mark.parametrize("B", [2, 4])
def test_statistics_equal_numpy(B):
    x = (photos(200, 32) + 0.05 * torch.randn(200, 3, 32, 32, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    whole, first, second = DCTStatistics(B), DCTStatistics(B), DCTStatistics(B)
    whole.update(x)
    for i, part in enumerate(x.split(37)):
        (first, second)[i % 2].update(part)
    assert torch.equal(whole.counts, first.counts + second.counts)  # a stream, and a sum over processes
    eta, entropies = numpy_statistics(x, B)
    assert abs(whole.eta() / eta - 1) < 1e-3
    np.testing.assert_allclose(whole.entropies().numpy(), entropies, atol=0.03)
    weights = dct.ebfr_weights(whole.entropies(), 3).view(6, 3)
    assert torch.allclose(weights.mean(1), torch.ones(6)) and torch.equal(weights[0], weights[3])


@needs_shared
def test_statistics_of_cifar10_are_the_published_ones():
    """DCTdiff's figures, from a JPEG copy of the set; numpy gives eta 242.358 on it, the paper's PNGs gave 242.382."""
    images, statistics = Images(str(CIFAR), 32), DCTStatistics(2)
    for start in range(0, 50_000, 5000):
        statistics.update(torch.stack([images.read(i) for i in range(start, start + 5000, 2)]) / 127.5 - 1)
    assert abs(statistics.eta() / 242.382 - 1) < 1e-3
    published = [[6.471, 3.588, 3.767, 2.411], [4.308, 1.315, 1.487, 1.000], [4.014, 1.284, 1.435, 1.000]]
    gap = (statistics.entropies() - torch.tensor(published)).abs()
    assert gap[0].max() < 0.015 and gap[1:].max() < 0.05


@pytest.mark.parametrize("block", [None, 4, 5])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 9, 14), (2, 1, 1)])
def test_upsampling_inverts_averaging(block, shape):
    x = torch.rand(shape, dtype=torch.float64)
    up = dct.upsample(x, block)
    assert up.shape == (shape[0], 2 * shape[1], 2 * shape[2])
    assert (F.avg_pool2d(up[None], 2)[0] - x).abs().max() < 1e-12


def test_upsampling_equals_the_formula():
    B, x = 8, np.random.default_rng(1).random((8, 8))
    k = np.arange(B)
    gain = 0.5 * np.cos(k * np.pi / (4 * B))[:, None] * np.cos(k * np.pi / (4 * B))
    high = np.zeros((16, 16))
    high[:8, :8] = scipy.fft.dctn(x, norm="ortho") / gain
    np.testing.assert_allclose(
        dct.upsample(torch.from_numpy(x)).numpy(), scipy.fft.idctn(high, norm="ortho"), atol=1e-12
    )


@pytest.mark.parametrize("block", [None, 4, 5])
def test_upsampling_by_scipy_equals_that_by_torch(block):
    x = np.random.default_rng(2).random((37, 22))
    np.testing.assert_allclose(dct.enlarge(x, block), dct.upsample(torch.from_numpy(x), block).numpy(), atol=1e-5)


# ---- spectra ----------------------------------------------------------------------------------------------


def test_psd_by_loops():
    x = torch.randn(2, 3, 6, 9, dtype=torch.float64)
    ours, spectrum = psd(x, bins=5), scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho")
    for n in range(2):
        total, count = np.zeros(5), np.zeros(5)
        for u in range(6):
            for v in range(9):
                band = min(4, int(5 * np.hypot(u, v) / np.hypot(5, 8)))
                total[band] += 0 if u == v == 0 else (spectrum[n, :, u, v] ** 2).mean()
                count[band] += 1
        np.testing.assert_allclose(ours[n].numpy(), total / count, rtol=1e-9)
    assert radial_bands(32, 32).max() == 15 and radial_bands(1, 1).item() == 0


def power_law(n, c, side, alpha, seed=0):
    """Noise whose DCT coefficients have power 1 / r^alpha in expectation, its DC nothing special."""
    r = np.hypot(*np.mgrid[:side, :side])
    r[0, 0] = 1
    noise = np.random.default_rng(seed).standard_normal((n, c, side, side))
    return torch.from_numpy(scipy.fft.idctn(noise * r ** (-alpha / 2), axes=(-2, -1), norm="ortho"))


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2, 3])
def test_power_law_exponent_is_recovered(alpha):
    for side in (16, 64):
        assert abs(spectral_losses.power_law_exponent(power_law(64, 4, side, alpha)) - alpha) < 0.05
    x = power_law(64, 4, 64, alpha)  # f^1 of the band's number flattens it by about one: bands begin at r = 0
    assert abs(spectral_losses.power_law_exponent(x, delta=1.0) - (alpha - 1)) < 0.15
    assert abs(spectral_losses.power_law_exponent(7 * power_law(64, 4, 32, alpha).float() + 3) - alpha) < 0.05


def esm_blur(images):
    """The image that ESM resizes: a zero-padded 7 x 7 Gaussian of sigma 1.2. (N, C, H, W) -> float64"""
    sigma, radius = (0, 0, 1.2, 1.2), (0, 0, 3, 3)
    return scipy.ndimage.gaussian_filter(images.double().numpy(), sigma, mode="constant", radius=radius)


def esm_by_scipy(images, latents, delta, blurred):
    """ESM from its steps, a picture at a time, with scipy's blur and DCT."""
    found = []
    for image, latent in zip(torch.from_numpy(esm_blur(images)) if blurred else images.double(), latents.double()):
        small = F.interpolate(image[None], latent.shape[-2:], mode="bicubic")[0]
        shares = []
        for field, power in ((small, delta), (latent, 0)):
            field = field.numpy() - field.numpy().mean((1, 2), keepdims=True)
            energy = (scipy.fft.dctn(field, axes=(-2, -1), norm="ortho") ** 2).mean(0)
            r = np.hypot(*np.mgrid[: energy.shape[0], : energy.shape[1]])
            band = np.minimum(np.floor(16 * r / r.max()), 15).astype(int)
            mean = np.bincount(band.ravel(), energy.ravel(), 16) / np.maximum(np.bincount(band.ravel(), minlength=16), 1)
            s = np.log(1 + 1e-8 + mean * np.arange(1, 17.0) ** power)
            shares.append(s / s.sum())
        found.append(np.where(shares[0] > 0, shares[0] * np.log(shares[0] / shares[1]), 0).sum())
    return np.mean(found)


def test_esm_equals_its_steps_in_scipy():
    images, latents = photos(3, 64), torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for delta in (0.0, 1.0, 0.5):
        for blurred in (False, True):
            ours = spectral_losses.esm_loss(images, latents, delta, blur=blurred).item()
            assert abs(ours / esm_by_scipy(images, latents, delta, blurred) - 1) < 1e-4


def test_esm_blurs_where_the_authors_do():
    for side in (16, 32, 64):  # `if h == 32` in their code leaves the blur out
        images, latents = photos(1, 64), torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(side))
        oracle = esm_by_scipy(images, latents, 1.0, side != 32)
        assert abs(spectral_losses.esm_loss(images, latents).item() / oracle - 1) < 1e-4
        for flag, blurred in (("", side != 32), ("--esm-blur", True), ("--no-esm-blur", False)):
            args = train_vae.make_parser().parse_args(f"--size {4 * side} {flag}".split())
            train_vae.complete(args)
            terms = train_vae.regularizers(args, {"esm"}, images, None, None, latents)
            assert abs(terms["esm"][1].item() / esm_by_scipy(images, latents, 1.0, blurred) - 1) < 1e-4


def test_esm_is_zero_at_its_target_and_falls():
    images = photos(4, 64)
    small = F.interpolate(images, (16, 16), mode="bicubic")
    assert spectral_losses.esm_loss(images, small, delta=0.0, blur=False).abs() < 1e-6
    assert spectral_losses.esm_loss(images, spectral_losses.resize_to_latent(images, (16, 16)), delta=0.0).abs() < 1e-6
    assert spectral_losses.esm_loss(images, small, delta=1.0, blur=False) > 0.01
    latents = torch.randn(4, 6, 16, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss = spectral_losses.esm_loss(images, latents)
    assert torch.isclose(loss, spectral_losses.esm_loss(images, latents[:, [3, 0, 5, 1, 4, 2]]))  # channels have no order
    losses, free = [], latents
    for _ in range(150):  # only it, over a free latent
        loss = spectral_losses.esm_loss(images, free)
        losses.append(loss.item())
        free = (free - 20 * torch.autograd.grad(loss, free)[0]).detach().requires_grad_()
    assert (np.diff(losses) < 0).all() and losses[-1] < 0.2 * losses[0]


def test_low_pass():
    counts = [int(spectral_losses.low_pass_mask(k).sum()) for k in (0, 8, 10, 12)]
    assert counts == [64, 28, 15, 6]
    x = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    for k, block in ((8, 8), (12, 8), (10, 4), (0, 2)):
        oracle = np.empty(x.shape)
        for i in range(0, 16, block):
            for j in range(0, 24, block):
                area = scipy.fft.dctn(x[..., i : i + block, j : j + block].numpy(), axes=(-2, -1), norm="ortho")
                u, v = np.mgrid[:block, :block] * 8 / block
                area[..., u + v >= 15 - k] = 0
                oracle[..., i : i + block, j : j + block] = scipy.fft.idctn(area, axes=(-2, -1), norm="ortho")
        np.testing.assert_allclose(spectral_losses.low_pass(x, k, block).numpy(), oracle, atol=1e-12)


def test_blocks_of_dsm_are_at_most_half_a_latent():
    """The mask of an 8 x 8 latent must not be a low-pass of its whole frame: two blocks a side, or more."""
    fits = {(16, 16): 8, (32, 32): 8, (64, 64): 8, (16, 32): 8, (24, 24): 8, (8, 8): 4, (4, 4): 2,  # METHOD, section 6
            (12, 8): 4, (20, 20): 4, (8, 32): 4, (6, 6): 2, (2, 2): None, (3, 3): None, (8, 1): None, (7, 16): None}  # fmt: skip
    assert {side: spectral_losses.block_that_fits(*side) for side in fits} == fits
    for side in (4, 8, 16):  # a step's mask does nothing across the blocks: what is added in one stays in it
        mask = next(v[0][0] for v in (train_vae.draw_views({"dsm"}, 0, 0, s, side, 4)[1] for s in range(20)) if
                    not torch.equal(v[0][0](torch.eye(side)[None, None]), torch.eye(side)[None, None]))  # fmt: skip
        x = torch.zeros(1, 1, side, side)
        x[..., : side // 2, : side // 2] = torch.randn(side // 2, side // 2)
        outside = torch.ones(side, side, dtype=torch.bool)
        outside[: side // 2, : side // 2] = False
        assert mask(x).abs().sum() > 0 and mask(x)[..., outside].abs().max() < 1e-6


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    normal = torch.distributions.Normal
    oracle = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0.0, 1.0)).sum() / 3
    assert torch.isclose(spectral_losses.kl_loss(mean, logvar), oracle)


def test_vf_loss():
    features = torch.randn(2, 24, 4, 6, dtype=torch.float64)
    assert spectral_losses.vf_loss(3 * features, features) == 0  # aligned: zero, whatever the lengths
    z = torch.randn(2, 24, 4, 6, dtype=torch.float64)
    pairs, points = [], []
    for n in range(2):
        a, b = (x[n].flatten(1).T.numpy() for x in (z, features))
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        pairs.append(np.maximum(0, np.abs(a @ a.T - b @ b.T) - 0.25).mean())
        points.append(np.maximum(0, 0.5 - (a * b).sum(1)).mean())
    assert abs(spectral_losses.vf_loss(z, features).item() - np.mean(pairs) - np.mean(points)) < 1e-12
    assert spectral_losses.vf_loss(z, torch.randn(2, 24, 8, 9)).isfinite()  # another grid is resized


def test_transforms_of_latent_and_image():
    x = torch.randn(2, 3, 8, 12)
    turned = spectral_losses.scale_and_rotate(x, (8, 12), 1)
    np.testing.assert_array_equal(turned.numpy(), np.rot90(x.numpy(), axes=(-2, -1)))
    half = spectral_losses.scale_and_rotate(x, (4, 6), 2)
    assert torch.allclose(half.flip(-2, -1), F.avg_pool2d(x, 2), atol=1e-6)  # bilinear at one half is 2 x 2 averaging
    assert torch.isclose(spectral_losses.downscale(x, 4)[0, 0, 1, 2], x[0, 0, 4:, 8:].mean(), atol=1e-6)


def test_directional_energy_both_ways():
    x = torch.randn(3, 7, 9, 12, dtype=torch.float64) + 0.7
    rmsc, bands = spectral_losses.rmsc(x), spectral_losses.directional_energy(x)
    assert rmsc.shape == (3,) and bands.shape == (3, 16)
    u = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    power = (np.abs(np.fft.fft2(u, norm="ortho")) ** 2).sum(1) / (9 * 12)  # another orthonormal transform: Parseval
    np.testing.assert_allclose(rmsc.square().numpy(), power.sum((1, 2)) - power[:, 0, 0], rtol=1e-9)
    np.testing.assert_allclose(rmsc.square().numpy(), bands.sum(1).numpy(), rtol=1e-9)
    assert spectral_losses.rmsc(torch.ones(1, 4, 6, 6) * torch.rand(1, 1, 6, 6)) < 1e-3  # one direction everywhere


def test_band_error():
    x = power_law(4, 3, 32, 2)
    noise = torch.randn_like(x)
    error = spectral_losses.band_error(x + noise, x)
    assert error[-1] > 10 * error[0] and torch.allclose(spectral_losses.band_error(0 * x, x), torch.ones(16).double())
    np.testing.assert_allclose(error.numpy(), (psd(noise).sum(0) / psd(x).sum(0)).numpy())


def test_spectral_functions_differentiable_and_in_float32():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 4, 6, dtype=torch.float64, generator=g, requires_grad=True)
    y = torch.randn(1, 2, 2, 3, dtype=torch.float64, generator=g, requires_grad=True)
    S = spectral_losses
    calls = {
        "esm": lambda x, y: S.esm_loss(x, y, bins=4), "alpha": lambda x, y: S.power_law_exponent(x),
        "psd": lambda x, y: S.psd(x), "low pass": lambda x, y: S.low_pass(x, 10, 2),
        "resize": lambda x, y: S.resize_to_latent(x, (3, 3)),
        "kl": lambda x, y: S.kl_loss(x, x), "vf": lambda x, y: S.vf_loss(y, x, 0, 0), "rmsc": lambda x, y: S.rmsc(x),
        "energy": lambda x, y: S.directional_energy(y), "eq": lambda x, y: S.scale_and_rotate(x, (2, 3), 1),
        "se": lambda x, y: S.downscale(x, 2), "bands": lambda x, y: S.band_error(x, x.flip(2), bins=4),
    }  # fmt: skip
    for name, call in calls.items():
        assert torch.autograd.gradcheck(call, (x, y)), name
        with torch.autocast("cpu", torch.bfloat16):
            mixed, full = call(x.bfloat16(), y.bfloat16()), call(x.bfloat16().double(), y.bfloat16().double())
        assert mixed.dtype == torch.float32, name
        assert torch.allclose(mixed.double(), full, rtol=1e-3, atol=1e-5), name


# ---- dit.py, uvit.py --------------------------------------------------------------------------------------


def dit_keys(depth, classes=True):
    linear = [
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "t_embedder.mlp.2",
        "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    ]
    for n in range(depth):
        linear += [
            f"blocks.{n}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
        ]
    keys = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} | {"pos_embed"}
    return keys | ({"y_embedder.embedding_table.weight"} if classes else set())


def uvit_keys(depth, classes=True, tokens=False, time_mlp=False, conv=True):
    embed = "proj" if tokens else "patch_embed.proj"
    keys = {"pos_embed", f"{embed}.weight", f"{embed}.bias", "norm.weight", "norm.bias"}
    blocks = (
        [f"in_blocks.{n}" for n in range(depth // 2)] + ["mid_block"] + [f"out_blocks.{n}" for n in range(depth // 2)]
    )
    for block in blocks:
        keys.add(f"{block}.attn.qkv.weight")  # no bias
        parts = ["norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2"] + ["skip_linear"] * block.startswith("out")
        keys |= {f"{block}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    names = ["decoder_pred"] + ["final_layer"] * (conv and not tokens) + ["time_embed.0", "time_embed.2"] * time_mlp
    return keys | {f"{n}.{k}" for n in names for k in ("weight", "bias")} | ({"label_emb.weight"} if classes else set())


def test_published_keys_and_shapes():
    with torch.device("meta"):
        net = DiT(32, 4, 4, 1152, 28, 16)  # positional, in the published order
        state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert set(state) == dit_keys(28)
        assert state["pos_embed"] == (1, 64, 1152) and state["y_embedder.embedding_table.weight"] == (1001, 1152)
        assert state["x_embedder.proj.weight"] == (1152, 4, 4, 4) and state["final_layer.linear.weight"] == (128, 1152)
        assert state["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152) and state["t_embedder.mlp.0.weight"] == (
            1152,
            256,
        )
        assert state["blocks.0.attn.qkv.bias"] == (3456,) and state["blocks.0.mlp.fc1.weight"] == (4608, 1152)

        net = UViT(32, 2, 4, 1152, 28, 16, num_classes=1001, conv=False)
        state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert set(state) == uvit_keys(28, conv=False)
        assert state["pos_embed"] == (1, 258, 1152) and state["label_emb.weight"] == (1001, 1152)
        assert state["out_blocks.13.skip_linear.weight"] == (1152, 2304) and state["decoder_pred.weight"] == (16, 1152)

        net = UViT(num_tokens=1024, token_dim=48, mlp_time_embed=True, **UVIT_SIZES["m"])  # DCTdiff on FFHQ 256
        state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert set(state) == uvit_keys(16, classes=False, tokens=True, time_mlp=True)
        assert (
            state["proj.weight"] == (768, 48)
            and state["decoder_pred.weight"] == (48, 768)
            and state["pos_embed"] == (1, 1025, 768)
        )
        net = UViT(32, 2, 3, 512, 12, 8)
        assert set(net.state_dict()) == uvit_keys(12, classes=False)
        assert net.state_dict()["final_layer.weight"].shape == (3, 3, 3, 3)
        # the sizes the papers state: DiT-XL/2 675M, S 33M, B 130M, L 458M; U-ViT S 44M, M 131M, L 287M, H 501M
        for size, millions in dict(s=33, b=130, l=458, xl=675).items():
            assert abs(sum(p.numel() for p in DiT(**DIT_SIZES[size]).parameters()) / 1e6 - millions) < 1
        for size, millions in dict(s=44, m=131, l=287, h=501).items():
            parameters = UViT(32, 2, 4, num_classes=1001, **UVIT_SIZES[size]).parameters()
            assert abs(sum(p.numel() for p in parameters) / 1e6 - millions) < 1.5


def plain_attention(w, name, x, heads):
    """softmax(q k^T / sqrt d) v written out, with the weights of a state dict."""
    q, k, v = F.linear(x, w[f"{name}.qkv.weight"], w.get(f"{name}.qkv.bias")).split(x.shape[2], 2)
    out, d = [], x.shape[2] // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        out.append(torch.softmax(q[..., part] @ k[..., part].mT / d**0.5, 2) @ v[..., part])
    return F.linear(torch.cat(out, 2), w[f"{name}.proj.weight"], w[f"{name}.proj.bias"])


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def plain_features(t, dim):
    frequencies = [10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
    return torch.tensor(
        [[np.cos(v * w) for w in frequencies] + [np.sin(v * w) for w in frequencies] for v in t.tolist()]
    )


def plain_unpatchify(x, p, c):
    """By loops: token (row, column), then pixel row, pixel column, channel."""
    side = int(x.shape[1] ** 0.5)
    out = torch.zeros(len(x), c, side * p, side * p, dtype=x.dtype)
    for i in range(side * side):
        patch = x[:, i].view(-1, p, p, c).permute(0, 3, 1, 2)
        out[:, :, i // side * p : (i // side + 1) * p, i % side * p : (i % side + 1) * p] = patch
    return out


def plain_dit(w, x, t, y, depth, heads, p, channels):
    """DiT by its paper, as functions of a state dict."""
    norm = lambda h: (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    gelu = lambda h: 0.5 * h * (1 + torch.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
    patches = F.unfold(x, p, stride=p).mT  # channel, row, column
    h = F.linear(patches, w["x_embedder.proj.weight"].flatten(1), w["x_embedder.proj.bias"]) + w["pos_embed"]
    c = linear(w, "t_embedder.mlp.2", F.silu(linear(w, "t_embedder.mlp.0", plain_features(t, 256).to(x))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][y])[:, None]
    for n in range(depth):
        b, m = f"blocks.{n}", linear(w, f"blocks.{n}.adaLN_modulation.1", c).chunk(6, 2)
        h = h + m[2] * plain_attention(w, f"{b}.attn", norm(h) * (1 + m[1]) + m[0], heads)
        h = h + m[5] * linear(w, f"{b}.mlp.fc2", gelu(linear(w, f"{b}.mlp.fc1", norm(h) * (1 + m[4]) + m[3])))
    m = linear(w, "final_layer.adaLN_modulation.1", c).chunk(2, 2)
    return plain_unpatchify(linear(w, "final_layer.linear", norm(h) * (1 + m[1]) + m[0]), p, channels)


def plain_uvit(w, x, t, y, depth, heads, p, channels):
    """U-ViT by its paper, as functions of a state dict."""
    d = w["pos_embed"].shape[2]
    norm = lambda name, h: F.layer_norm(h, (d,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
    time = plain_features(t, d).to(x)
    if "time_embed.0.weight" in w:
        time = linear(w, "time_embed.2", F.silu(linear(w, "time_embed.0", time)))
    patches = F.linear(F.unfold(x, p, stride=p).mT, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"])
    h = torch.cat((w["label_emb.weight"][y][:, None], time[:, None], patches), 1) + w["pos_embed"]

    def block(name, h):
        h = h + plain_attention(w, f"{name}.attn", norm(f"{name}.norm1", h), heads)
        inner = linear(w, f"{name}.mlp.fc1", norm(f"{name}.norm2", h))
        return h + linear(w, f"{name}.mlp.fc2", 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))

    skips = []
    for n in range(depth // 2):
        h = block(f"in_blocks.{n}", h)
        skips.append(h)
    h = block("mid_block", h)
    for n in range(depth // 2):
        h = block(f"out_blocks.{n}", linear(w, f"out_blocks.{n}.skip_linear", torch.cat((h, skips[-1 - n]), 2)))
    out = plain_unpatchify(linear(w, "decoder_pred", norm("norm", h))[:, 2:], p, channels)
    return F.conv2d(out, w["final_layer.weight"], w["final_layer.bias"], padding=1)


def randomised(net, seed=0):
    """Every parameter random, so that no zero initialisation hides a mistake."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.3 if p.ndim < 2 else p.shape[-1] ** -0.5)
    return net.double()


def test_networks_equal_plain_ones():
    g = torch.Generator().manual_seed(1)
    x, t, y = (
        torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64),
        torch.tensor([0.0, 12.5, 999.0]),
        torch.tensor([0, 7, 3]),
    )
    dit = randomised(DiT(8, 2, 4, 24, 3, 4, num_classes=7, learn_sigma=True)).eval()
    assert (dit(x, t, y) - plain_dit(dit.state_dict(), x, t, y, 3, 4, 2, 8)).abs().max() < 1e-5
    for time_mlp in (False, True):
        uvit = randomised(UViT(8, 2, 4, 24, 4, 3, num_classes=8, mlp_time_embed=time_mlp))
        assert (uvit(x, t, y) - plain_uvit(uvit.state_dict(), x, t, y, 4, 3, 2, 4)).abs().max() < 1e-5


def test_dit_positions_are_the_published_ones():
    """Column first, sines then cosines, as in MAE's and DiT's tables."""
    table = DiT(4, 1, 3, 16, 1, 2).pos_embed[0].view(4, 4, 16)
    for row, col, i in [(0, 0, 0), (1, 3, 2), (3, 2, 1), (2, 1, 3)]:
        omega = 10000 ** (-i / 4)
        expected = [np.sin(col * omega), np.cos(col * omega), np.sin(row * omega), np.cos(row * omega)]
        np.testing.assert_allclose(table[row, col, i::4].numpy(), expected, atol=1e-6)


NETWORKS = {
    "dit maps": lambda: DiT(8, 2, 3, 16, 4, 2, num_classes=5, learn_sigma=False),
    "dit tokens": lambda: DiT(
        num_tokens=16, token_dim=6, hidden_size=16, depth=4, num_heads=2, num_classes=5, learn_sigma=False
    ),
    "uvit maps": lambda: UViT(8, 2, 3, 16, 4, 2, num_classes=6),
    "uvit tokens": lambda: UViT(
        num_tokens=16, token_dim=6, embed_dim=16, depth=4, num_heads=2, num_classes=6, mlp_time_embed=True
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_gradients_null_class_and_tap(name):
    net = randomised(NETWORKS[name]()).float()
    shape = (4, 3, 8, 8) if "maps" in name else (4, 16, 6)
    x, t, y, drop = (
        torch.randn(shape),
        torch.rand(4),
        torch.tensor([0, 1, 2, 4]),
        torch.tensor([True, False, False, True]),
    )
    out, hidden = net(x, t, y, drop, tap=2)
    assert out.shape == shape and hidden.shape == (4, 16, 16)
    out.square().sum().backward()
    assert [n for n, p in net.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    assert torch.allclose(net(x, t, torch.where(drop, net.null_class, y), torch.zeros_like(drop)), out, atol=1e-5)
    net.zero_grad()
    net(x, t, y, drop, tap=2)[1].sum().backward()
    late = ("blocks.2", "blocks.3", "mid_block", "out_blocks", "final_layer", "decoder_pred")
    reached = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("blocks.1" in n for n in reached) and not any(n.startswith(late) for n in reached)


def test_networks_without_classes_and_bad_shapes():
    for net in (DiT(8, 4, 3, 8, 1, 1, num_classes=0), UViT(8, 4, 3, 8, 2, 1)):
        assert (
            not any("emb" in k and ("label" in k or "table" in k) for k in net.state_dict()) and net.null_class is None
        )
        net(torch.randn(2, 3, 8, 8), torch.rand(2))
    for bad in (
        lambda: DiT(9, 2),
        lambda: UViT(9, 2),
        lambda: DiT(num_tokens=15, token_dim=4),
        lambda: UViT(8, 2, embed_dim=10, num_heads=3),
    ):
        with pytest.raises(ValueError):
            bad()


@pytest.mark.parametrize("name", NETWORKS)
def test_what_does_not_fit_a_network_is_one_clear_line(name):
    net, maps = NETWORKS[name](), "maps" in name
    shape, t, y = (3, 8, 8) if maps else (16, 6), torch.rand(2), torch.tensor([0, 5])
    x = torch.randn(2, *shape)
    net(x, t, y)  # 5 is the null class
    net(x, t, y.int(), tap=net.depth)
    other = NETWORKS[name.replace("maps", "tokens") if maps else name.replace("tokens", "maps")]
    for call, said in [
        (lambda: net(x, t), "y: .* missing"),
        (lambda: net(x, t, torch.tensor([0, 6])), "y: class 6, .* 0 to 5"),
        (lambda: net(x, t, torch.tensor([-1, 0])), "y: class -1, .* 0 to 5"),
        (lambda: net(x, t, torch.tensor([0, 6]), torch.tensor([True, True])), "y: class 6, .* 0 to 5"),  # dropped or not
        (lambda: net(x, t, y.float()), "y: .*float32"),
        (lambda: net(x, t, torch.tensor([True, False])), "y: .*bool"),
        (lambda: net(x, t, y[:1]), r"y: .*\(1,\)"),
        (lambda: net(x, t, y[:, None]), r"y: .*\(2, 1\)"),
        (lambda: net(x, t, y, tap=0), f"tap 0: .* 1 to {net.depth}"),
        (lambda: net(x, t, y, tap=net.depth + 1), f"tap {net.depth + 1}: .* 1 to {net.depth}"),
        (lambda: net(torch.randn(2, shape[0] + 1, *shape[1:]), t, y), r"x \(2, .*takes \(N, "),
        (lambda: net(torch.randn(2, *shape[:-1], 4), t, y), r"x \(2, .*takes \(N, "),
        (lambda: other()(x, t, y), r"x \(2, .*takes \(N, "),
    ]:
        with pytest.raises(ValueError, match=f"^{said}"):
            call()
    bare = DiT(8, 4, 3, 8, 1, 1, num_classes=0) if name.startswith("dit") else UViT(8, 4, 3, 8, 2, 1)
    with pytest.raises(ValueError, match="^y: .*without classes"):
        bare(torch.randn(2, 3, 8, 8), t, y)
    for network in (DiT, UViT):
        for half in ({"num_tokens": 16}, {"token_dim": 6}):
            with pytest.raises(ValueError, match="num_tokens .*token_dim"):
                network(**half)
    without = sample.build_network(dict(space="pixel", size=8, model="dit-nano/4", classes=["a", "b"], label_dropout=0.0))
    with pytest.raises(ValueError, match="^y: class 2, .* 0 to 1"):  # no null class to drop to
        without(torch.randn(2, 3, 8, 8), t, torch.tensor([0, 1]), drop=torch.tensor([True, False]))


def examples_of(module):
    """The lines of code in a module's first docstring."""
    lines = [line[4:] for line in module.__doc__.splitlines() if line.startswith("    ")]
    return [line for line in lines if not line.startswith("python ")]


def test_docstring_examples_do_what_they_say(hub):
    for module in (dit, uvit):
        lines = examples_of(module)
        assert len(lines) == 2
        for line in lines:
            before, after = re.search(r"# \(N, ([\d, ]+)\) -> (?:\(N, ([\d, ]+)\)|the same)$", line).groups()
            before, after = (tuple(map(int, shape.split(", "))) for shape in (before, after or before))
            with torch.device("meta"):
                inputs = {"x": torch.empty(2, *before), "t": torch.empty(2), "y": torch.empty(2, dtype=torch.long)}
                assert eval(line, vars(module) | inputs).shape == (2, *after)
    thin = dict(widths=(32, 32, 32, 32), latent_channels=4, num_res_blocks=1)  # f8d4 but for its cost
    names = vars(vae) | {"PRESETS": {"f8d4": thin}, "images": torch.rand(1, 3, 256, 256)}
    with torch.no_grad():
        exec("\n".join(examples_of(vae)), names)
    assert names["mean"].shape == names["logvar"].shape == (1, 4, 32, 32) and names["images"].shape == (1, 3, 256, 256)
    names = vars(dct) | {"images": torch.rand(2, 3, 256, 256)}
    exec("\n".join(examples_of(dct)), names)
    assert names["tokens"].shape == (2, 1024, 48) and names["images"].shape == (2, 3, 256, 256)
    names = vars(spectral_losses) | {"images": photos(2, 64), "latents": torch.randn(2, 4, 16, 16), "l1": F.l1_loss}
    names |= {"decode": lambda z: F.interpolate(z[:, :3], scale_factor=4)}
    for line in examples_of(spectral_losses):
        exec(line, names)
        assert names["loss"].shape == () and names["loss"] > 0
    load = repa.load_encoder
    names = vars(repa) | {"load_encoder": lambda spec: load(f"{hub}:colours" if ":" in spec else spec)}
    names |= {"images": photos(2, 64), "hidden": torch.randn(2, 256, 32), "projector": repa.ConvProjector(32, 36)}
    exec("\n".join(examples_of(repa)), names)
    assert names["target"].shape == (2, 256, 36) and names["loss"].shape == () and abs(names["loss"]) < 1


def test_dit_drops_labels_itself_in_training_only():
    torch.manual_seed(0)
    net = randomised(NETWORKS["dit maps"]()).float()
    net.y_embedder.dropout_prob = 0.5
    x, t, y = torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1), torch.zeros(64), torch.zeros(64, dtype=torch.long)
    whole = net(x[:1], t[:1], y[:1], drop=torch.tensor([False]))
    changed = lambda: ((net(x, t, y) - whole).flatten(1).abs().amax(1) > 1e-4).sum()
    net.train()
    assert 10 < changed() < 54
    net.eval()
    assert changed() == 0


# ---- vae.py -----------------------------------------------------------------------------------------------


def vae_shapes(widths, latent, blocks):
    """Keys and shapes of published SD-VAE weights, from the layout in METHOD's words."""
    shapes = {}

    def conv(name, c_in, c_out, k=3):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (c_out, c_in, k, k), (c_out,)

    def norm(name, c):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (c,)

    def block(name, c_in, c_out):
        norm(f"{name}.norm1", c_in), conv(f"{name}.conv1", c_in, c_out)
        norm(f"{name}.norm2", c_out), conv(f"{name}.conv2", c_out, c_out)
        if c_in != c_out:
            conv(f"{name}.nin_shortcut", c_in, c_out, 1)

    def ends(side, first, last, c_in, c_out):
        conv(f"{side}.conv_in", c_in, first), norm(f"{side}.norm_out", last), conv(f"{side}.conv_out", last, c_out)
        for i in (1, 2):
            block(f"{side}.mid.block_{i}", widths[-1], widths[-1])
        norm(f"{side}.mid.attn_1.norm", widths[-1])
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{side}.mid.attn_1.{part}", widths[-1], widths[-1], 1)

    ends("encoder", widths[0], widths[-1], 3, 2 * latent)
    ends("decoder", widths[-1], widths[0], latent, 3)
    conv("quant_conv", 2 * latent, 2 * latent, 1), conv("post_quant_conv", latent, latent, 1)
    for i, width in enumerate(widths):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", widths[max(i - 1, 0)] if j == 0 else width, width)
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", widths[min(i + 1, len(widths) - 1)] if j == 0 else width, width)
        if i < len(widths) - 1:
            conv(f"encoder.down.{i}.downsample.conv", width, width)
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", width, width)
    return shapes


def test_vae_keys_shapes_and_counts_are_the_published_ones():
    counts = {"f8d4": 83_653_863, "tiny": 954_567}
    for name, preset in vae.PRESETS.items():
        with torch.device("meta"):
            net = vae.VAE(**preset)
        found = {key: tuple(value.shape) for key, value in net.state_dict().items()}
        assert found == vae_shapes(preset["widths"], preset["latent_channels"], preset.get("num_res_blocks", 2))
        assert name not in counts or sum(p.numel() for p in net.parameters()) == counts[name]
        assert name == "tiny" or f"f{net.factor}d{net.latent_channels}" == name
        inferred = vae.infer_shape(net.state_dict())
        assert inferred == {"num_res_blocks": 2} | preset


def plain_vae(w, x, levels, blocks, decode):
    """Encoder or decoder as plain steps on a state dict."""

    def conv(name, x, **kw):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], **({"padding": weight.shape[-1] // 2} | kw))

    def norm(name, x):
        n, c, *rest = x.shape
        grouped = x.reshape(n, 32, -1)
        grouped = (grouped - grouped.mean(2, keepdim=True)) / (grouped.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return grouped.view(n, c, *rest) * w[f"{name}.weight"].view(-1, 1, 1) + w[f"{name}.bias"].view(-1, 1, 1)

    def act(name, x):
        x = norm(name, x)
        return x / (1 + (-x).exp())

    def block(name, x):
        h = conv(f"{name}.conv2", act(f"{name}.norm2", conv(f"{name}.conv1", act(f"{name}.norm1", x))))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def middle(side, x):
        x = block(f"{side}.mid.block_1", x)
        h = norm(f"{side}.mid.attn_1.norm", x)
        q, k, v = (conv(f"{side}.mid.attn_1.{p}", h).flatten(2) for p in "qkv")
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / q.shape[1] ** 0.5, 2)
        h = torch.einsum("nij,ncj->nci", weights, v).view(x.shape)
        return block(f"{side}.mid.block_2", x + conv(f"{side}.mid.attn_1.proj_out", h))

    if decode:
        x = middle("decoder", conv("decoder.conv_in", conv("post_quant_conv", x)))
        for i in reversed(range(levels)):
            for j in range(blocks + 1):
                x = block(f"decoder.up.{i}.block.{j}", x)
            if i:
                x = conv(f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        return conv("decoder.conv_out", act("decoder.norm_out", x))
    x = conv("encoder.conv_in", x)
    for i in range(levels):
        for j in range(blocks):
            x = block(f"encoder.down.{i}.block.{j}", x)
        if i < levels - 1:
            x = conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
    return conv("quant_conv", conv("encoder.conv_out", act("encoder.norm_out", middle("encoder", x))))


def test_vae_equals_plain_steps_at_any_size():
    net = randomised(vae.VAE((32, 64, 32), 5, 2)).double()
    w, x = net.state_dict(), torch.randn(2, 3, 12, 20, dtype=torch.float64)
    with torch.no_grad():
        mean, logvar = net.encode(x)
        assert mean.shape == logvar.shape == (2, 5, 3, 5)
        oracle = plain_vae(w, x, 3, 2, decode=False)
        np.testing.assert_allclose(torch.cat((mean, logvar), 1).numpy(), oracle.clamp(None, 20).numpy(), atol=1e-9)
        np.testing.assert_allclose(net.decode(mean), plain_vae(w, mean, 3, 2, decode=True), atol=1e-9)
        with pytest.raises(ValueError, match="multiples of 4"):
            net.encode(x[..., :18])
    with pytest.raises(ValueError, match="multiples of 32"):
        vae.VAE((32, 48), 4)


def test_attention_of_the_autoencoder_is_on_contiguous_tensors(monkeypatch):
    real, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(vae.F, "scaled_dot_product_attention", lambda *qkv: seen.append(qkv) or real(*qkv))
    net, x = vae.Attention(64), torch.randn(2, 64, 4, 6)
    made = net(x)
    ((q, k, v),) = seen
    assert q.shape == (2, 1, 24, 64) and q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    w = {name: value.detach().double().numpy() for name, value in net.state_dict().items()}
    h = F.group_norm(x, 32, net.norm.weight, net.norm.bias, 1e-6).flatten(2).double().detach().numpy()
    q, k, v = (np.einsum("oc,nct->nto", w[f"{n}.weight"][..., 0, 0], h) + w[f"{n}.bias"] for n in "qkv")
    weights = scipy.special.softmax(q @ k.transpose(0, 2, 1) / 8, -1)
    out = np.einsum("oc,ntc->not", w["proj_out.weight"][..., 0, 0], weights @ v) + w["proj_out.bias"][:, None]
    np.testing.assert_allclose(made.detach().flatten(2).numpy(), x.flatten(2).numpy() + out, atol=1e-5)


def test_vae_in_bf16_and_channels_last():
    net, x = vae.VAE(**vae.PRESETS["tiny"]), photos(2, 32)
    with torch.no_grad():
        mean = net.encode(x)[0]
        made = net.decode(mean)
        last = net.to(memory_format=torch.channels_last)
        assert (last.decode(last.encode(x.contiguous(memory_format=torch.channels_last))[0]) - made).abs().max() < 1e-4
        half = net.bfloat16()
        again = half.decode(half.encode(x.bfloat16())[0])
    assert again.dtype == torch.bfloat16 and (again - made).abs().mean() < 0.05 * made.abs().mean() + 0.02


def test_posterior_samples():
    mean, logvar = torch.full((1, 2, 100, 100), 3.0), torch.full((1, 2, 100, 100), np.log(4.0))
    z = vae.sample_posterior(mean, logvar)
    assert abs(z.mean() - 3) < 0.1 and abs(z.std() - 2) < 0.1
    assert torch.equal(vae.sample_posterior(mean, logvar, torch.zeros_like(mean)), mean)


def test_published_autoencoders_load_from_their_layouts(tmp_path):
    net = vae.VAE((32, 64), 3, 2)
    state = net.state_dict()
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(1)}
    torch.save({"state_dict": state | loss, "global_step": 5}, tmp_path / "kl.ckpt")
    inside = {f"first_stage_model.{k}": v for k, v in state.items()} | {"model.diffusion_model.x": torch.zeros(1)}
    torch.save({"state_dict": inside}, tmp_path / "sd.ckpt")
    torch.save(state, tmp_path / "bare.pt")
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pt")
    assert sample.load_autoencoder(tmp_path / "half.pt", "cpu")[0].encode(photos(1, 8))[0].dtype == torch.float32
    for name in ("kl.ckpt", "sd.ckpt", "bare.pt"):
        loaded, info = sample.load_autoencoder(tmp_path / name, "cpu")
        assert distance(loaded.state_dict(), state) == 0 and info["weights"] == sample.fingerprint(state)
        assert loaded.factor == 2 and not any(p.requires_grad for p in loaded.parameters())
    torch.save({"encoder.conv_in.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="original layout"):
        sample.load_autoencoder(tmp_path / "other.pt", "cpu")
    diffusers = {"encoder.down_blocks.0.resnets.0.conv1.weight": 1, "post_quant_conv.weight": torch.zeros(4, 4, 1, 1)}
    torch.save(diffusers, tmp_path / "diffusers.bin")
    with pytest.raises(InputError, match="original layout .*diffusers' layout"):
        sample.load_autoencoder(tmp_path / "diffusers.bin", "cpu")
    state.pop("decoder.conv_out.bias")
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(InputError, match="decoder.conv_out.bias"):
        sample.load_autoencoder(tmp_path / "less.pt", "cpu")


def test_discriminator_and_its_losses():
    net, x = vae.PatchGAN(), torch.randn(2, 3, 64, 64)
    assert net(x).shape == (2, 1, 6, 6) and net(x[..., :24, :24]).shape == (2, 1, 1, 1) and net.least_size == 24
    assert (net(x)[:1] - net(x[:1])).abs().max() < 1e-5  # an image's logits depend on no other image
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert torch.isclose(vae.hinge_loss(real, fake), torch.tensor(0.5 * (0 + 0.5 + 2 + 0 + 1 + 2) / 3))
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.isclose(vae.adaptive_weight((w * 3).sum(), (w**2).sum(), w), torch.tensor(18**0.5 / (20**0.5 + 1e-4)))
    assert vae.adaptive_weight((w * 1e9).sum(), (w * 1e-3).sum(), w) == 1e4  # clamped


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Random weights in the layout of the two published files. The classifier, which LPIPS does not use, is stored as
    one number expanded."""
    folder, g = tmp_path_factory.mktemp("lpips"), torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in torchvision.models.vgg16().state_dict().items()}
    trunk = {k: torch.zeros(()).expand(s) if "classifier" in k else torch.randn(s, generator=g) / max(1, s.numel() / s[0]) ** 0.5
             for k, s in shapes.items()}  # fmt: skip
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=g) for i, c in enumerate((64, 128, 256, 512, 512))}
    torch.save(trunk, folder / "vgg.pth", _use_new_zipfile_serialization=False)  # as torchvision's file of 2017
    torch.save(heads, folder / "heads.pth")
    return folder / "vgg.pth", folder / "heads.pth", trunk, heads


def test_lpips_equals_its_definition(lpips_files, tmp_path):
    vgg, heads, trunk, lin = lpips_files
    hub = torch.hub.get_dir()
    lpips = vae.load_lpips(vgg, heads)
    assert torch.hub.get_dir() == hub
    x, y = photos(2, 32), photos(2, 32, seed=1).requires_grad_()
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    a, b, total, stage = ((x + 1) / 2 - mean) / std, ((y + 1) / 2 - mean) / std, 0, 0
    layers = [0, 2, "tap", "pool", 5, 7, "tap", "pool", 10, 12, 14, "tap", "pool", 17, 19, 21, "tap", "pool", 24, 26, 28, "tap"]
    for layer in layers:
        if layer == "tap":
            u, v = (F.normalize(t, dim=1) for t in (a, b))
            total, stage = total + ((u - v).square() * lin[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2)), stage + 1
        elif layer == "pool":
            a, b = F.max_pool2d(a, 2), F.max_pool2d(b, 2)
        else:
            w = trunk[f"features.{layer}.weight"], trunk[f"features.{layer}.bias"]
            a, b = (F.relu(F.conv2d(t, *w, padding=1)) for t in (a, b))
    found = lpips(x, y)
    assert found.shape == (2,) and torch.allclose(found, total, rtol=1e-3)  # torch-fidelity rounds mean and std
    found.sum().backward()
    assert y.grad.abs().sum() > 0 and not any(p.requires_grad for p in lpips.parameters())
    with pytest.raises(ValueError, match=r"VGG-16 weights .*heads.pth: no features"):
        vae.load_lpips(heads, vgg)
    (tmp_path / "broken.pth").write_bytes(b"broken")
    for file in (tmp_path / "broken.pth", tmp_path / "absent.pth"):
        with pytest.raises(ValueError, match=f"LPIPS heads weights {file}"):
            vae.load_lpips(vgg, file)


# ---- repa.py ----------------------------------------------------------------------------------------------


def direct_blur(field, sigma):
    """A Gaussian average at every position by loops over all others; what lies beyond the border has no weight."""
    out, (h, w) = np.zeros_like(field), field.shape[-2:]
    for i in range(h):
        for j in range(w):
            rows, cols = np.mgrid[:h, :w]
            weights = np.exp(-((rows - i) ** 2 + (cols - j) ** 2) / (2 * sigma**2))
            out[..., i, j] = (field * weights).sum((-2, -1)) / weights.sum()
    return out


@pytest.mark.parametrize("low, high", [(0.6, 2.0), (0.3, 0.9), (1.0, 8.0), (2.0, 300.0)])
def test_dog_target_equals_a_direct_convolution(low, high):
    z = torch.randn(2, 36, 5, generator=torch.Generator().manual_seed(0)) + 3
    field = z.mT.unflatten(2, (6, 6)).double().numpy()
    h = direct_blur(field, low) - direct_blur(field, high)
    oracle = h / (h.std((2, 3), keepdims=True) + 1e-6)
    ours = repa.as_map(repa.dog_target(z, low, high)).numpy()
    np.testing.assert_allclose(ours, oracle, atol=2e-4)
    # within the grid, where borders play no part, it is scipy's filter
    z = torch.randn(1, 41 * 41, 1, generator=torch.Generator().manual_seed(1))
    blurred = repa.blur(repa.as_map(z), low)[0, 0, 16:25, 16:25]
    filtered = scipy.ndimage.gaussian_filter(z.view(41, 41).double().numpy(), low, truncate=8)[16:25, 16:25]
    np.testing.assert_allclose(blurred.numpy(), filtered, atol=1e-5)


def test_dog_has_irepa_at_its_limits_and_constants_give_zero():
    z = 2 + torch.randn(3, 64, 7, generator=torch.Generator().manual_seed(0))
    double = z.double()
    for gamma in (0.6, 1.0):
        oracle = (double - gamma * double.mean(1, keepdim=True)) / (double.std(1, correction=0, keepdim=True) + 1e-6)
        np.testing.assert_allclose(repa.irepa_target(z, gamma).numpy(), oracle.numpy(), atol=1e-5)
    assert torch.allclose(repa.dog_target(z, 0, float("inf")), repa.irepa_target(z, 1.0), atol=1e-5)
    assert torch.allclose(repa.dog_target(z, 0.05, 1e5), repa.irepa_target(z, 1.0), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        under = repa.dog_target(z, 0.6, 2.0)
    assert torch.equal(under, repa.dog_target(z, 0.6, 2.0))
    assert repa.irepa_target(z).dtype == torch.float32 and torch.equal(repa.resize_tokens(z, 8), z)
    for low, high in ((0, 2.0), (0.6, 2.0), (0, float("inf"))):
        for level in (1.0, -317.3, 0.1):
            assert repa.dog_target(torch.full((2, 25, 3), level), low, high).abs().max() < 1e-3
        # no constant gets through, alone or added
        assert torch.allclose(repa.dog_target(z + 5, low, high), repa.dog_target(z, low, high), atol=1e-4)
    for low, high in ((2.0, 1.0), (1.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="sigmas"):
            repa.dog_target(z, low, high)
    with pytest.raises(ValueError, match="60 tokens form no square"):
        repa.dog_target(z[:, :60], 0, 1)


def test_hog_by_loops():
    x = photos(2, 24)
    tokens, summary = repa.load_encoder("hog")(x)
    assert tokens.shape == (2, 9, 36) and torch.allclose(summary, tokens.mean(1))
    padded = np.pad(x[1].double().numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
    cells = np.zeros((3, 3, 9))
    for i in range(24):
        for j in range(24):
            dx, dy = padded[:, i + 1, j + 2] - padded[:, i + 1, j], padded[:, i + 2, j + 1] - padded[:, i, j + 1]
            channel = np.hypot(dx, dy).argmax()
            angle = np.arctan2(dy[channel], dx[channel]) % np.pi
            place = angle / np.pi * 9 - 0.5
            low = int(np.floor(place))
            length = np.hypot(dx, dy)[channel] / 64
            cells[i // 8, j // 8, low % 9] += length * (low + 1 - place)
            cells[i // 8, j // 8, (low + 1) % 9] += length * (place - low)
    around = np.pad(cells, ((1, 1), (1, 1), (0, 0)), mode="edge")
    for i in range(3):
        for j in range(3):
            parts = []
            for a in (0, 1):
                for b in (0, 1):
                    block = around[i + a : i + a + 2, j + b : j + b + 2]
                    parts.append(np.minimum(cells[i, j] / np.sqrt((block**2).sum() + 1e-6), 0.2))
            np.testing.assert_allclose(tokens[1, 3 * i + j].numpy(), np.concatenate(parts), atol=2e-4)
    with pytest.raises(ValueError, match="multiples of 8"):
        repa.HOG()(x[..., :20])
    turned = repa.HOG()(x.flip(-1))[0].view(2, 3, 3, 4, 9).flip(2, 4)  # a mirror image: cells swap sides, angles their sign
    assert torch.allclose(turned[:, :, :, [1, 0, 3, 2]].flatten(3), tokens.view(2, 3, 3, 36), atol=1e-5)


class Patches(torch.nn.Module):
    patch_size = 14

    def forward_features(self, x):
        self.seen = x
        return {"x_norm_patchtokens": F.avg_pool2d(x, 14).flatten(2).mT, "x_norm_clstoken": x.mean((2, 3))}


def cubic_by_loops(image, n):
    """(C, m, m) -> (C, n, n) by Keys' cubic convolution (a = -0.75) of the four nearest pixels, edges repeated."""

    def weight(d):
        d = abs(d)
        return 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    m, matrix = image.shape[-1], np.zeros((n, image.shape[-1]))
    for i in range(n):
        centre = (i + 0.5) * m / n - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(j, 0), m - 1)] += weight(centre - j)
    return matrix @ image @ matrix.T


def test_encoder_preprocessing():
    x, (mean, std) = photos(2, 48), (torch.tensor(v).view(3, 1, 1) for v in (repa.IMAGENET_MEAN, repa.IMAGENET_STD))
    x = x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))  # detail that antialiasing would take
    for asked, side in ((224, 16), (448, 32), (100, 7)):
        net = Patches()
        tokens, summary = repa.Encoder(net, asked)(x)
        assert net.seen.shape == (2, 3, 14 * side, 14 * side) and tokens.shape == (2, side**2, 3) and summary.shape == (2, 3)
        oracle = (torch.from_numpy(cubic_by_loops((x[0].double().numpy() + 1) / 2, 14 * side)) - mean) / std
        assert (net.seen[0] - oracle).abs().max() < 1e-4
    # scores ask for antialiasing, as Pillow does it
    net, small = Patches(), x.clamp(-1, 1)
    repa.Encoder(net, 28, antialias=True)(small)
    pixels = Image.fromarray(((small[0] + 1) * 127.5).round().permute(1, 2, 0).byte().numpy())
    down = torch.from_numpy(np.asarray(pixels.resize((28, 28), Image.Resampling.BICUBIC)) / 255).permute(2, 0, 1)
    assert (net.seen[0] - (down - mean) / std).abs().mean() < 0.02
    assert not any(p.requires_grad for p in repa.Encoder(Colours()).parameters())
    for features in ({"x_norm_clstoken": x}, x, {"x_norm_patchtokens": x}):
        net = torch.nn.Identity()
        net.forward_features = lambda x, features=features: features
        with pytest.raises(ValueError, match="no patch tokens"):
            repa.Encoder(net)(x)


FETCHING = """
import torch
dependencies = ["torch"]
def entry():
    torch.hub.load_state_dict_from_url("http://127.0.0.1:9/weights.pth", progress=False)
def absent():
    raise RuntimeError("no such thing")
"""


def test_a_failed_fetch_names_address_folder_and_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    (tmp_path / "hubconf.py").write_text(FETCHING)
    with pytest.raises(ValueError, match=rf"127.0.0.1:9/weights.pth .*{tmp_path}/cache.*FOLDER:entry"):
        repa.load_encoder(f"{tmp_path}:entry")
    for entry, said in (("absent", "no such thing"), ("misspelt", "misspelt")):
        with pytest.raises(ValueError, match=f"gave no entry '{entry}' .*{said}"):
            repa.load_encoder(f"{tmp_path}:{entry}")

    for failure in (OSError("reset"), urllib.error.URLError("no network")):
        monkeypatch.setattr(torch.hub, "urlopen", lambda *args, failure=failure, **kwargs: (_ for _ in ()).throw(failure))
        with pytest.raises(ValueError, match=rf"https://github.com/no/such.* {tmp_path}/cache.*FOLDER:vit"):
            repa.load_encoder("no/such:vit")
    with pytest.raises(ValueError, match="neither hog nor REPO:ENTRY"):
        repa.load_encoder("nonsense")


def test_projectors_loss_and_lds():
    g = torch.Generator().manual_seed(0)
    hidden, z = torch.randn(2, 16, 12, generator=g), torch.randn(2, 16, 7, generator=g)
    mlp, conv = repa.MLPProjector(12, 7), repa.ConvProjector(12, 7)
    assert [m.out_features for m in mlp if hasattr(m, "out_features")] == [2048, 2048, 7]
    assert mlp(hidden).shape == conv(hidden).shape == (2, 16, 7)
    field = hidden[1].view(4, 4, 12)  # the 3x3 neighbourhood of row 2, column 1, by hand
    near = torch.einsum("hwc,ochw->o", field[1:4, 0:3], conv.conv.weight) + conv.conv.bias
    assert torch.allclose(conv(hidden)[1, 2 * 4 + 1], near, atol=1e-5)
    assert torch.allclose(mlp(hidden)[0, 3], mlp(hidden[0, 3]), atol=1e-5)  # token by token
    a, b = hidden[..., :7].double().numpy(), z.double().numpy()
    cosines = (a * b).sum(2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
    np.testing.assert_allclose(repa.alignment_loss(hidden[..., :7], z).numpy(), -cosines.mean(1), atol=1e-6)
    assert torch.allclose(repa.alignment_loss(3 * z, z), -torch.ones(2))
    for side, least in ((8, 6), (5, 6), (4, 6), (3, 4), (2, 2)):  # the largest distance on a grid is 2 (side - 1)
        z = torch.randn(2, side**2, 7, generator=g) + torch.randn(7, generator=g)
        u, near, far = F.normalize(z[1].double(), dim=1).numpy(), [], []
        for i in range(side**2):
            for j in range(side**2):
                apart = abs(i // side - j // side) + abs(i % side - j % side)
                near += [u[i] @ u[j]] * (apart == 1)
                far += [u[i] @ u[j]] * (apart >= least)
        assert abs(repa.lds(repa.as_map(z))[1].item() - (np.mean(near) - np.mean(far))) < 1e-6
    noise = torch.randn(4, 8, 16, 16, generator=g)
    assert (repa.lds(repa.blur(noise, 2.0)) > 0.3).all() and repa.lds(noise).abs().max() < 0.05
    for side in (1, 2, 3, 5):
        assert repa.lds(torch.ones(1, 4, side, side)).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["dit maps", "uvit tokens"])
def test_alignment_reaches_the_blocks_up_to_the_tap_alone(name):
    net = randomised(NETWORKS[name]()).float()
    shape = (4, 3, 8, 8) if "maps" in name else (4, 16, 6)
    aligned = repa.Aligned(net, repa.ConvProjector(net.width, 7), 2)
    x, t, y, tokens = torch.randn(shape), torch.rand(4), torch.tensor([0, 1, 2, 4]), torch.randn(4, net.num_tokens, 7)
    output, student = aligned(x, t, y, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(output, net(x, t, y, torch.zeros(4, dtype=torch.bool)))
    repa.alignment_loss(student, tokens).mean().backward()
    late = ("blocks.2", "blocks.3", "mid", "out", "final", "decoder", "norm.")
    late = tuple(f"network.{part}" for part in late)
    reached = {n for n, p in aligned.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"projector.conv.weight", "projector.conv.bias"} <= reached and not any(n.startswith(late) for n in reached)
    assert any("blocks.1" in n for n in reached) and any("blocks.0" in n for n in reached)
    assert net.depth == len([n for n, _ in net.named_modules() if re.fullmatch(r"(in_|out_)?blocks\.\d+|mid_block", n)])


# ---- paths and samplers -----------------------------------------------------------------------------------

T = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)


@pytest.mark.parametrize("c", [0.25, 1.0, 2.0, 4.0, 12.0])
def test_vp_path(c):
    plain, scaled = VP(), VP(c)
    alpha, sigma = plain.alpha_sigma(T)
    integral = 0.1 * T + (20 - 0.1) * T**2 / 2  # of beta
    assert torch.allclose(alpha**2, torch.exp(-integral), rtol=1e-12)
    abar = alpha**2
    alpha_c, sigma_c = scaled.alpha_sigma(T)
    assert torch.allclose(alpha_c**2, c * abar / (1 + (c - 1) * abar), rtol=1e-12)
    assert torch.allclose(alpha_c**2 + sigma_c**2, torch.ones_like(T))
    assert torch.allclose((alpha_c / sigma_c) ** 2, c * (alpha / sigma) ** 2, rtol=1e-9)  # SNR' = c SNR
    assert torch.allclose(scaled.log_snr_half(T), torch.log(alpha_c / sigma_c))
    assert torch.allclose(scaled.t_of_lambda(scaled.log_snr_half(T)), T, rtol=1e-9)
    t = T.clone().requires_grad_()
    slope = torch.autograd.grad(torch.log(scaled.alpha_sigma(t)[0] ** 2).sum(), t)[0]
    assert torch.allclose(scaled.beta(T), -slope, rtol=1e-6)


@pytest.mark.parametrize("path", [VP(4.0), StableDiffusionVP(), Flow()], ids=list(sample.PATHS))
@pytest.mark.parametrize("predict", sample.PREDICTIONS)
def test_predictions_invert(path, predict):
    x0, eps, t = torch.randn(97, 3, 2), torch.randn(97, 3, 2), T.float().clamp(0.02, 0.98)
    alpha, sigma = path.alpha_sigma(like(t, x0))
    out = sample.target(path, predict, x0, eps, t)
    for ours, true in zip(sample.x0_and_eps(path, predict, alpha * x0 + sigma * eps, t, out), (x0, eps)):
        assert (ours - true).abs().max() < 2e-4 / 0.02
    if predict == "v" and isinstance(path, Flow):
        assert torch.equal(out, eps - x0)
    t = torch.zeros(97)  # the data's end, where the prediction of x0 is all of x, and that of eps bounded
    alpha, sigma = path.alpha_sigma(t)
    assert torch.equal(alpha, t + 1) and torch.equal(sigma, t)
    ours = sample.x0_and_eps(path, predict, x0, t, sample.target(path, predict, x0, eps, t))
    assert torch.equal(ours[0], x0) and (ours[1] - (0 if predict == "x0" else eps)).abs().max() < 1e-6


def test_snr_scaling_of_the_flow_moves_its_times():
    snr = lambda t: (lambda alpha, sigma: (alpha / sigma) ** 2)(*Flow().alpha_sigma(t))
    for c in (1.0, 4.0, 16.0):
        assert torch.allclose(snr(Flow(c).time(T)), c * snr(T), rtol=1e-9)
    assert torch.equal(Flow(16.0).time(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))


def test_flow_velocity_is_the_time_derivative():
    x0, eps, h = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, 5, dtype=torch.float64), 1e-6
    point = lambda t: (lambda a, s: a * x0 + s * eps)(*Flow().alpha_sigma(torch.tensor(t, dtype=torch.float64)))
    v = sample.target(Flow(), "v", x0, eps, torch.full((8,), 0.3, dtype=torch.float64))
    assert ((point(0.3 + h) - point(0.3 - h)) / (2 * h) - v).abs().max() < 1e-6


MU, STD = 0.3, 0.5  # of Gaussian data, whose best denoiser and whose sampling ODE are known in closed form


def gaussian_denoiser(path):
    def denoise(x, t):
        alpha, sigma = path.alpha_sigma(like(t, x))
        x0 = MU + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MU)
        return x0, (x - alpha * x0) / sigma.clamp_min(1e-9)

    return denoise


def marginal(path, t):
    """Mean and std of x_t."""
    alpha, sigma = path.alpha_sigma(torch.tensor(float(t), dtype=torch.float64))
    return alpha * MU, (alpha**2 * STD**2 + sigma**2).sqrt()


def ode_error(path, sampler, steps):
    """Largest distance at t = 0 to the exact solution, along which (x - mean) / std stays what it was."""
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    mean1, std1 = marginal(path, 1)
    x = sampler(gaussian_denoiser(path), path, mean1 + std1 * z, steps, None)
    return (x - (MU + STD * z)).abs().max().item()


def sde_error(path, sampler, steps, std0=STD):
    """Distance of mean and std to the data's (or to `std0`), exactly: the sampler is affine in its start and in each noise,
    so that one batch with a one in each of them in turn reads off every coefficient."""
    x, draws = torch.zeros(steps + 3, 1, dtype=torch.float64), []
    x[1] = 1

    def noise():
        draws.append(None)
        unit = torch.zeros_like(x)
        unit[1 + len(draws)] = 1
        return unit

    constant, *rest = sampler(gaussian_denoiser(path), path, x, steps, noise).flatten()
    mean1, std1 = marginal(path, 1)
    start, noises = rest[0] - constant, torch.stack(rest[1:]) - constant
    std = (start**2 * std1**2 + noises.square().sum()).sqrt()
    return max(abs(constant + start * mean1 - MU), abs(std - std0)).item()


SAMPLER_ORDERS = [("dpm++", 2), ("ddim", 1), ("euler-ode", 1), ("ddpm", 1), ("euler-sde", 1), ("euler", 1), ("heun", 2)]


@pytest.mark.parametrize("c", [1.0, 4.0])
@pytest.mark.parametrize("name, order", SAMPLER_ORDERS)
def test_samplers_reach_the_exact_solution_at_their_order(name, order, c):
    path, error = (VP(c), "vp") if name in SAMPLERS["vp"] else (Flow(c), "flow")
    sampler, error = SAMPLERS[error][name], sde_error if name in ("ddpm", "euler-sde") else ode_error
    errors = [error(path, sampler, steps) for steps in (32, 64, 128, 256)]
    assert errors[-1] < (0.02 if order == 1 else 1e-3)
    for coarse, fine in zip(errors[1:], errors[2:]):
        assert order - 0.25 < np.log2(coarse / fine) < order + 0.35


@pytest.mark.parametrize("c", [1.0, 16.0])
def test_flow_sde_converges_at_its_order_to_its_last_step(c):
    """A step from t = 0.04 without noise makes of its Gaussian, exactly, one that is not the data's."""
    t = 0.04 / (0.04 + c**0.5 * 0.96)
    std = ((1 - t) ** 2 * STD**2 + t**2) ** 0.5
    slope = (1 - t) * STD**2 / std**2  # x0 = MU + slope (x - mean), e = (x - (1 - t) x0) / t, x - t (2 e - x0) then is
    left = abs((2 - t) * slope - 1) * std  # MU + ((2 - t) slope - 1) (x - mean)
    assert abs(STD - left - (0.00505 if c == 1 else 0.00032)) < 1e-5  # as its docstring says
    errors = [sde_error(Flow(c), SAMPLERS["flow"]["sde"], steps, left) for steps in (32, 64, 128, 256)]
    for coarse, fine in zip(errors[1:], errors[2:]):
        assert 0.75 < np.log2(coarse / fine) < 1.35


def test_samplers_on_stable_diffusions_schedule():
    for name, sampler in SAMPLERS["vp-sd"].items():
        error = sde_error if name in ("ddpm", "euler-sde") else ode_error
        errors = [error(StableDiffusionVP(2.0), sampler, steps) for steps in (50, 200)]
        assert errors[0] < 0.07 and errors[1] < min(0.02, errors[0] / 2.5)


def noise_of_published_euler(beta, c, steps, stochastic):
    """Std that the authors' Euler loop leaves around a picture whose denoiser is known: step by step, its variance."""
    times, variance = np.append(0, np.linspace(1e-3, 1, steps)), 1.0
    for s, t in list(zip(times, times[1:]))[::-1]:
        abar = np.exp(-scipy.integrate.quad(beta, 0, t)[0])
        b, abar = beta(t) / (1 + (c - 1) * abar), c * abar / (1 + (c - 1) * abar)
        drift = b * (0.5 - (1 if stochastic else 0.5) / (1 - abar))
        variance = variance * (1 + (t - s) * drift) ** 2 + (t - s) * b * (stochastic and s > 0)
    return variance**0.5


VP_BETA, SD_BETA = lambda t: 0.1 + 19.9 * t, lambda t: (0.85**0.5 + (12**0.5 - 0.85**0.5) * t) ** 2
PUBLISHED = [(VP(2.0), VP_BETA, 32, 2, 4, 242.382), (VP(4.0), VP_BETA, 256, 4, 8, 485.0),
             (StableDiffusionVP(), SD_BETA, 32, 2, 4, 242.382)]  # fmt: skip


@pytest.mark.parametrize("path, beta, size, block, keep, eta", PUBLISHED, ids=["cifar10", "ffhq256", "vp-sd"])
def test_noise_left_in_a_picture_after_fifty_steps(path, beta, size, block, keep, eta):
    """By the exact denoiser of a grey picture, in units of its coefficients and in grey levels; nothing clips."""
    codec, g = DCTCodec(size, block, keep, eta), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(32 * 32**2 // size**2 or 1, codec.num_tokens, codec.token_dim, generator=g)
    abar = np.exp(-scipy.integrate.quad(beta, 0, 1e-4)[0])
    expected = {"ddim": 0, "ddpm": 0, "dpm++": eta * ((1 - abar) / (1 + (path.c - 1) * abar)) ** 0.5}
    for name, stochastic in (("euler-ode", False), ("euler-sde", True)):
        expected[name] = eta * noise_of_published_euler(beta, path.c, 50, stochastic)
    if size == 256:  # the figures of the authors' code
        assert abs(expected["euler-sde"] - 2.9) < 0.1 and abs(expected["dpm++"] - 0.77) < 0.01
    for name, sampler in SAMPLERS["vp"].items():
        denoise = lambda x, t: (torch.zeros_like(x), x / path.alpha_sigma(like(t, x))[1])
        x = sampler(denoise, path, draw(), 50, draw)
        assert abs(x.std() * eta - expected[name]) < 0.03 * expected[name] + 1e-6
        if beta is VP_BETA:
            levels = (codec.decode(x) - codec.decode(torch.zeros_like(x))).std() * 127.5
            assert levels < {"ddim": 0.01, "ddpm": 0.01, "dpm++": 0.8}.get(name, 3.1)


def test_one_step_is_enough_for_every_sampler():
    """And every sampler asks the network once a step, heun twice but for its last."""
    for kind, path in (("vp", VP(12.0)), ("vp-sd", StableDiffusionVP()), ("flow", Flow(16.0))):
        for name, sampler in SAMPLERS[kind].items():
            for steps in (1, 2, 7):
                calls, denoise = [], gaussian_denoiser(path)
                counted = lambda x, t: calls.append(t[0]) or denoise(x, t)
                x = sampler(counted, path, torch.randn(9, 1), steps, lambda: torch.randn(9, 1))
                assert x.isfinite().all() and len(calls) == (2 * steps - 1 if name == "heun" else steps)
                assert calls[0] == 1


def test_every_combination_trains_and_samples():
    """All of space x network x path x prediction: a finite loss, and finite images from every sampler."""
    x = photos(2, 16)
    for space in ("pixel", "dct"):
        for model in ("dit-nano", "uvit-nano"):
            for path in ("vp", "flow"):
                for predict in sample.PREDICTIONS:
                    config = dict(space=space, size=16, model=model, path=path, snr_scale=2.0, predict=predict,
                                  classes=["a", "b"],
                                  label_dropout=0.1, block=4, keep=9, eta=400.0)  # fmt: skip
                    diffusion = sample.Diffusion(config)
                    x0, y = diffusion.encode(x), torch.tensor([0, 1])
                    loss, _ = train_diffusion.diffusion_loss(
                        diffusion, diffusion.network, x0, torch.randn_like(x0), torch.tensor([0.0, 1.0]), y
                    )
                    assert loss.shape == (2,) and loss.isfinite().all()
                    for sampler in SAMPLERS[path]:
                        images = sample.generate(
                            diffusion, [0, 1], 0, "cpu", y, sampler, 2, guidance=2.0, interval=(0.1, 0.9)
                        )
                        assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_guidance_and_its_interval():
    diffusion = sample.Diffusion(dict(space="pixel", size=8, model="dit-nano/4", path="flow", snr_scale=1.0, predict="v",
                                      classes=["a", "b"], label_dropout=0.1))  # fmt: skip
    randomised(diffusion.network).float().eval()
    x, y, null = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1]), torch.full((3,), 2)
    at = lambda t, y, *args: diffusion.denoiser(y, *args)(x, torch.full((3,), t))[0]
    expected = at(0.5, null) + 3 * (at(0.5, y) - at(0.5, null))
    assert torch.allclose(at(0.5, y, 3.0), expected, atol=1e-4)
    assert torch.allclose(at(0.5, y, 0.0), at(0.5, null), atol=1e-5)
    assert torch.equal(at(0.05, y, 3.0, (0.1, 0.9)), at(0.05, y)) and not torch.allclose(
        at(0.5, y, 3.0, (0.1, 0.9)), at(0.5, y)
    )


# ---- images -----------------------------------------------------------------------------------------------


def write_photos(folder, n, size=16, classes=None):
    for i, pixels in enumerate(sample.to_uint8(photos(n, size)).permute(0, 2, 3, 1).numpy()):
        file = folder / (classes[i % len(classes)] if classes else "") / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return folder


def test_images_of_every_mode_and_size(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).repeat(2).reshape(8, 16)
    pictures = {
        "grey": Image.fromarray(ramp), "palette": Image.fromarray(ramp).convert("P"), "pixel": Image.new("RGB", (1, 1), "red"),
        "rgba": Image.new("RGBA", (9, 30), (255, 0, 0, 0)), "cmyk": Image.new("CMYK", (20, 12), (0, 255, 255, 0)),
        "deep": Image.fromarray(ramp.astype(np.uint16) * 257), "two": Image.new("1", (8, 8), 1),
        "wide": Image.new("RGB", (500, 3), "blue"),
    }  # fmt: skip
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.{'tif' if name == 'cmyk' else 'png'}")
    images = Images(str(tmp_path), 8)
    read = {Path(name).stem: images.read(i) for i, name in enumerate(images.names)}
    assert len(read) == len(pictures) and all(x.shape == (3, 8, 8) and x.dtype == torch.uint8 for x in read.values())
    assert torch.equal(read["grey"], read["deep"]) and torch.equal(read["grey"], read["palette"])
    assert torch.equal(read["grey"][0], torch.from_numpy(ramp[:, 4:12]))  # the central square, unscaled
    assert (read["rgba"] == 255).all()  # transparent is white
    for name in ("pixel", "cmyk"):
        assert read[name][0].min() > 230 and read[name][1:].max() < 60
    assert images.labels is None and images.classes is None


RAMP = np.arange(64).reshape(8, 8)  # in every kind of grey deeper than 8 bits, 63 being white or nearly so


def tiff(pixels, bits, kind, photometric=1):
    """A TIFF of 8 x 8 pixels in one plain strip, as its specification lays it out: whole numbers of any size."""
    data = pixels.tobytes()
    tags = [(256, 8), (257, 8), (258, bits), (259, 1), (262, photometric), (273, 8),
            (277, 1), (278, 8), (279, len(data)), (339, kind)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


def deep_pictures(folder):
    """-> files whose range is known, all of RAMP * 4 in 8 bits, and files to refuse, with a word of the reason."""
    sixteen, part = (RAMP * 4 * 257).astype(np.uint16), (RAMP * 4 / 255).astype(np.float32)
    twelve = (RAMP * 4 * 4095 / 255).round().astype(int)
    known = {
        "i16.png": sixteen, "i16.tif": sixteen, "f.tif": part,
        "big.tif": Image.frombytes("I;16B", (8, 8), sixteen.astype(">u2").tobytes()),
        "i16.pgm": b"P5 8 8 65535\n" + sixteen.astype(">u2").tobytes(),
        "i10.pgm": b"P5 8 8 1020\n" + (RAMP * 16).astype(">u2").tobytes(),
        "i12.tif": tiff(np.packbits((twelve[..., None] >> np.arange(11, -1, -1)) & 1), 12, 1),
    }  # fmt: skip
    refused = {
        "i32.tif": (RAMP.astype(np.int32) * 60000, "32-bit"),
        "u32.tif": (tiff(RAMP.astype(np.uint32) << 26, 32, 1), "32-bit"),
        "nan.tif": (np.where(RAMP == 3, np.nan, part).astype(np.float32), "not finite"),
        "inf.tif": (np.where(RAMP == 3, np.inf, part).astype(np.float32), "not finite"),
        "f255.tif": ((RAMP * 4).astype(np.float32), "0 to 252"), "negative.tif": (part - 0.5, "-0.5 to"),
        "white0.tif": (tiff(sixteen, 16, 1, photometric=0), "white is 0"),
    }  # fmt: skip
    for name, content in {**known, **{name: content for name, (content, _) in refused.items()}}.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            (Image.fromarray(content) if isinstance(content, np.ndarray) else content).save(folder / name)
    return list(known), {name: reason for name, (_, reason) in refused.items()}


def test_deep_grey_is_scaled_where_its_range_is_known_and_refused_by_name_elsewhere(tmp_path, capsys):
    known, refused = deep_pictures(tmp_path)
    images = Images(str(tmp_path), 8)
    for i, name in enumerate(images.names):
        x = images.read(i)
        said = capsys.readouterr().err
        if name in known:
            assert not said and torch.equal(x, torch.from_numpy(RAMP * 4).to(torch.uint8).expand(3, 8, 8)), name
        else:
            assert x is None and name in said and refused[name] in said and "8 or 16 bits" in said, name
    assert len(images) == len(known) + len(refused)


def test_crop_equals_pillow_steps():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    square = (
        image.crop((15, 0, 85, 70)).resize((35, 35), Image.Resampling.BOX).resize((20, 20), Image.Resampling.BICUBIC)
    )
    assert np.array_equal(np.asarray(sample.center_crop(image, 20)), np.asarray(square))


def test_data_layouts(tmp_path):
    tree = write_photos(tmp_path / "tree" / "train", 6, classes=["cat", "dog"])
    images = Images(str(tree), 16)
    assert len(list(images)) == 6  # iterating ends
    assert images.classes == ["cat", "dog"] and images.labels == [0, 0, 0, 1, 1, 1]
    assert Images(str(write_photos(tmp_path / "flat", 4)), 16).labels is None
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as z:
        for name in images.names:
            z.write(tree / name, f"top/{name}")  # one folder around all is no class
        z.writestr("__MACOSX/top/._x.png", b"junk")
    zipped = Images(str(tmp_path / "tree.zip"), 16)
    assert zipped.classes == ["cat", "dog"] and all(torch.equal(zipped[i][1], images[i][1]) for i in range(6))
    with zipfile.ZipFile(tmp_path / "edm.zip", "w") as z:
        names = [f"{i:05d}/img{i:08d}.png" for i in range(6)]
        for i, name in enumerate(images.names):
            z.write(tree / name, names[i])
        z.writestr("dataset.json", json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}))
    edm = Images(str(tmp_path / "edm.zip"), 16)
    assert edm.labels == [0, 1, 2, 0, 1, 2] and edm.classes == ["0", "1", "2"]
    (tree / "dataset.json").write_text('{"labels": null}')
    assert Images(str(tree), 16).classes is None
    for labels in ([["no", 1]], [[name, [1.0]] for name in images.names]):
        (tree / "dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(InputError, match="dataset.json"):
            Images(str(tree), 16)
    for label in (-1, 0.5, True, "cat", "1", None, float("nan"), float("inf")):
        (tree / "dataset.json").write_text(json.dumps({"labels": [[name, label] for name in images.names]}))
        with pytest.raises(InputError, match=rf"dataset\.json.*{images.names[0]}.*{label!r}"):
            Images(str(tree), 16)
    (tree / "dataset.json").write_text(json.dumps({"labels": [[name, 2.0] for name in images.names]}))
    assert Images(str(tree), 16).labels == [2] * 6
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    for bad in ("nowhere", "empty", "note.txt"):
        with pytest.raises(InputError, match=bad):
            Images(str(tmp_path / bad), 16)


def test_a_folder_that_leads_back_to_itself_is_refused_by_its_link(tmp_path):
    tree = write_photos(tmp_path / "outer" / "tree", 4, classes=["cat", "dog"])
    other = write_photos(tmp_path / "other", 3)
    (tree / "bird").symlink_to(other)  # a link alone is fine, and a folder linked twice is meant twice
    (tree / "fowl").symlink_to(other)
    images = Images(str(tree), 16)
    assert len(images) == 10 and images.classes == ["bird", "cat", "dog", "fowl"]
    assert len(Images(str(other), 16)) == 3
    loops = {tree / "cat" / "again": tree, tree / "up": tmp_path / "outer", tree / "dog" / "x": tree / "dog"}
    for place, target in {**loops, other / "back": tree}.items():
        place.symlink_to(target)
        with pytest.raises(InputError, match=f"{place.name}.* is a link"):
            Images(str(tree), 16)
        place.unlink()
    (tmp_path / "door").symlink_to(tree)  # the data set may itself be a link
    assert len(Images(str(tmp_path / "door"), 16)) == 10


def test_dead_leaves_follow_their_model():
    assert np.array_equal(sample.dead_leaves(3, 32), sample.dead_leaves(3, 32)) and not np.array_equal(
        sample.dead_leaves(3, 32), sample.dead_leaves(4, 32)
    )
    few = [len(np.unique(sample.dead_leaves(i, 64)[::3, ::3].reshape(-1, 3), axis=0)) for i in range(8)]
    power = psd(
        torch.stack([torch.from_numpy(sample.dead_leaves(i, 64, True)).permute(2, 0, 1).float() for i in range(24)])
    ).mean(0)
    slope = np.polyfit(np.log(np.arange(2, 13)), np.log(power[1:12].numpy()), 1)[0]
    assert max(few) < 60 and -4 < slope < -2  # a power law; -2 would need leaves of every size


def store_of(path, folder, workers=0):
    return train_diffusion.Store(Images(str(path), 16), folder, train_diffusion.Processes("cpu"), workers)


def test_memory_file_and_on_the_fly_give_the_same_images(tmp_path, monkeypatch, capsys):
    """120 images, one of them truncated: each of the three ways leaves it out, and gives every image its own label."""
    data = write_photos(tmp_path / "data", 120, classes=["a", "b", "c"])
    broken = data / "b" / "001.png"
    broken.write_bytes(broken.read_bytes()[:90])
    order, steps, share = train_diffusion.DataOrder(119, 50, seed=1), range(5), slice(10, 30)
    stores = [store_of(data, tmp_path)]
    monkeypatch.setattr(train_diffusion, "MEMORY_LIMIT", 0)
    stores.append(store_of(data, tmp_path))
    made = (tmp_path / "images-16.u8").stat().st_mtime_ns
    stores.append(store_of(data, tmp_path))
    assert (tmp_path / "images-16.u8").stat().st_mtime_ns == made  # the second time it is read, not made
    assert "in memory" in stores[0].how and str(tmp_path / "images-16.u8") in stores[1].how
    assert "b/001.png" in capsys.readouterr().err and all(s.count == 119 and "1 unreadable" in s.how for s in stores)
    batches = [list(store.batches(order, steps, share)) for store in stores]
    for other in batches[1:]:
        assert all(torch.equal(x, y) for a, b in zip(batches[0], other) for x, y in zip(a, b))
    write_photos(tmp_path / "more", 4)
    assert store_of(tmp_path / "more", tmp_path).count == 4  # other data: the old file is made anew
    (tmp_path / "images-16.json").unlink()
    monkeypatch.setattr(train_diffusion, "DISK_SHARE", 0)
    fly = store_of(data, tmp_path, workers=2)
    assert "on the fly by 2 workers" in fly.how and fly.count == 120
    batches.append(list(fly.batches(train_diffusion.DataOrder(120, 50, seed=1), range(5), slice(0, 50))))
    for where, pixels in (pair for batch in batches for pair in batch):
        for i, image in zip(where.tolist(), pixels):
            name = fly.images.names[i]
            assert (
                name != "b/001.png" and torch.equal(image, fly.images.read(i)) and fly.labels[i] == "abc".index(name[0])
            )
    for i in (3, 6):
        (data / "a" / f"{i:03d}.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="^--data .* 2 of 120 images are unreadable"):
        list(fly.batches(train_diffusion.DataOrder(120, 50, seed=1), range(5), slice(0, 50)))
    monkeypatch.undo()
    with pytest.raises(InputError, match="3 of 120 images are unreadable"):
        store_of(data, tmp_path)


def test_bad_bytes_of_every_kind_are_unreadable_images(tmp_path):
    whole = write_photos(tmp_path / "data", 2)
    png = (whole / "000.png").read_bytes()
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in dict(
            empty=b"", text=b"hello", cut=png[:100], flipped=png[:60] + b"\0" * 9 + png[69:]
        ).items():
            z.writestr(f"{name}.png", content)
        z.writestr("member.png", bytes(np.random.default_rng(0).integers(0, 99, 4000, dtype=np.uint8)))
    raw = bytearray((tmp_path / "bad.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "bad.zip") as z:  # a broken deflate stream inside the archive
        start = z.getinfo("member.png").header_offset + 60
    raw[start : start + 200] = b"\xff" * 200
    (tmp_path / "bad.zip").write_bytes(raw)
    images = Images(str(tmp_path / "bad.zip"), 16)
    assert len(images) == 5 and all(images.read(i) is None and not images[i][2] for i in range(5))


def test_data_order_visits_every_image_once_an_epoch():
    order = train_diffusion.DataOrder(10, 4, seed=0)
    seen = torch.cat([order(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10)) and not torch.equal(
        seen[:10], seen[10:]
    )
    assert torch.equal(train_diffusion.DataOrder(10, 4, seed=0)(3), seen[12:16])
    assert len(train_diffusion.DataOrder(3, 8, seed=0)(2)) == 8  # a batch larger than the set


# ---- the programs, tiny -----------------------------------------------------------------------------------

TINY = (
    "--size 16 --model dit-nano --batch 8 --seed 3 --workers 0 --device cpu --lr-decay none --warmup 1 --lr 1e-3 "
    "--log-every 1 --eval-every 1000 --save-every 1000"
)


def train(flags):
    train_diffusion.main(train_diffusion.make_parser().parse_args(f"{TINY} {flags}".split()))


def sampling(flags):
    sample.main(sample.make_parser().parse_args(f"--device cpu {flags}".split()))


def command(line, processes=0, check=True, gpu=False):
    """A real command in its own process, or in several under torchrun."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split() if processes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    words = [sys.executable, *torchrun, *line.split()]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, cwd=HERE)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


def metrics(run, key="loss"):
    """The lines of a run's metrics file that have this entry."""
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if key in line]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def distance(a, b):
    """Largest difference between two nests of tensors and plain values, infinite where plain values differ."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, (dict, list, tuple)):
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else list(zip(a, b))
        return max((distance(x, y) for x, y in pairs), default=0.0) if len(a) == len(b) else np.inf
    return 0.0 if a == b else abs(a - b) if isinstance(a, float) else np.inf


def load_all(source, size=16):
    return torch.stack([image for _, image, _ in Images(str(source), size)])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data"), 48, classes=["left", "right", "up"])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of 12 steps on three classes, shared by the tests that only read it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(f"--data {data} --out {run} --steps 12")
    return run


def test_training_lowers_the_loss_and_leaves_its_files(tmp_path, capsys):
    run, data = tmp_path / "run", write_photos(tmp_path / "few", 4)
    flags = f"--data {data} --out {run} --steps 150 --eval-every 75 --lr 2e-3"
    train(flags)
    lines = metrics(run)
    # DiT starts by predicting zero exactly, so the first loss is the weighted mean square of the tokens ...
    x0 = sample.Diffusion(checkpoint(run)["config"]).encode(load_all(data) / 127.5 - 1)
    t = Flow(16.0).time(torch.sigmoid(0.5 + torch.randn(100_000, generator=torch.Generator().manual_seed(0))))
    assert 0.3 < lines[0]["loss"] / (x0.square().mean() / (t**2 + 0.04)).mean() < 3
    # ... which training leaves far below
    assert np.mean([line["loss"] for line in lines[-20:]]) < 0.35 * np.mean([line["loss"] for line in lines[:3]])
    assert all(line["grad_norm"] > 0 and line["images_per_s"] > 0 and line["skipped_steps"] == 0 for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert lines[-1]["images"] == 1200 and lines[-1]["epoch"] == 300
    bands = [line["x0_error_by_band"] for line in metrics(run, "x0_error_by_band")]
    assert len(bands) == 2 and all(len(b) == 16 for b in bands[0].values()) and bands[1]["0.5"][0] < 0.9
    for step in (75, 150):
        assert Image.open(run / "samples" / f"step{step:07d}.png").size == (8 * 18 + 2, 8 * 18 + 2)
    out = capsys.readouterr().out
    assert "eta" in out and "H(Cr)" in out and "PSNR by keep" in out and f"sample.py {run}" in out
    train(flags)
    out = capsys.readouterr().out
    assert "finished" in out and "--steps 300" in out


def test_checkpoint_is_plain_and_whole(trained, data):
    state = checkpoint(trained)
    assert set(state) >= {"model", "ema", "optimizer", "step", "images_seen", "random", "config", "args"}
    assert state["step"] == 12 and state["images_seen"] == 96 and state["args"]["data"] == str(data)
    assert state["config"]["classes"] == ["left", "right", "up"] and state["config"]["keep"] == 9
    statistics = DCTStatistics(4)
    statistics.update(load_all(data) / 127.5 - 1)
    assert abs(state["config"]["eta"] - statistics.eta()) < 1e-9


@pytest.mark.parametrize("flags", ["", "--space pixel --model uvit-nano/4 --path vp --predict eps --no-classes"])
def test_n_and_n_steps_equal_2n_bit_for_bit(data, tmp_path, flags):
    train(f"--data {data} --out {tmp_path}/whole --steps 8 {flags}")
    for steps in (4, 8):
        train(f"--data {data} --out {tmp_path}/halves --steps {steps} {flags}")
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves")
    assert all(distance(a[k], b[k]) == 0 for k in ("model", "ema", "optimizer", "step", "config"))
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "halves")]
    assert len(losses[0]) == 8 and losses[0] == losses[1]


def test_resuming_on_changed_data_is_refused(tmp_path):
    data = write_photos(tmp_path / "data", 12, classes=["a", "b"])
    train(f"--data {data} --out {tmp_path}/run --steps 2")
    write_photos(data / "c", 2)
    with pytest.raises(InputError, match="has changed since"):
        train(f"--data {data} --out {tmp_path}/run --steps 4")


def killed_after(lines, program, flags, run):
    """A run whose process is killed once its log has so many lines, long before its end -> the step of its checkpoint."""
    words = [sys.executable, HERE / program, *f"{flags} --steps 100000 --out {run}".split()]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE) as process:
        while process.poll() is None and not (run / "metrics.jsonl").exists():
            time.sleep(0.05)
        while process.poll() is None and (run / "metrics.jsonl").read_text().count("\n") < lines:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return checkpoint(run)["step"]


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    flags, killed = f"--data {data} --save-every 5", tmp_path / "killed"
    step = killed_after(13, "train_diffusion.py", f"{TINY} {flags}", killed)
    assert step >= 10 and step % 5 == 0
    (killed / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")  # as a kill while writing leaves it
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')
    for run in (tmp_path / "whole", killed):
        train(f"{flags} --steps {step + 10} --out {run}")
        assert [line["step"] for line in metrics(run)] == list(range(1, step + 11))
    a, b = checkpoint(tmp_path / "whole"), checkpoint(killed)
    assert distance(a["model"], b["model"]) < 1e-4 and distance(a["ema"], b["ema"]) < 1e-4  # threads may differ


def test_two_processes_equal_one_and_parts_a_whole(data, tmp_path):
    flags = f"--data {data} --steps 5 --save-every 5"
    train(f"{flags} --out {tmp_path}/one")
    train(f"{flags} --out {tmp_path}/parts --grad-accum 4")
    result = command(f"train_diffusion.py {TINY} {flags} --out {tmp_path}/two", processes=2)
    assert result.stdout.count("done at step 5") == 1
    one = checkpoint(tmp_path / "one")
    for other in ("parts", "two"):
        state = checkpoint(tmp_path / other)
        assert distance(one["model"], state["model"]) < 2e-5 and distance(one["ema"], state["ema"]) < 2e-5
        assert distance(one["config"], state["config"]) == 0
        losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("one", other)]
        np.testing.assert_allclose(*losses, rtol=1e-4)
    # and they sample the same files, one process or two
    command(f"sample.py {tmp_path}/two -n 5 --steps 3 --out {tmp_path}/b", processes=2)
    sampling(f"{tmp_path}/two --n 5 --steps 3 --out {tmp_path}/a")
    assert_same_images(tmp_path / "a", tmp_path / "b", 5)


def assert_same_images(a, b, n, tolerance=1):
    files = sorted(file.name for file in a.glob("*.png"))
    assert files == sorted(file.name for file in b.glob("*.png")) == [f"{i:06d}.png" for i in range(n)]
    for name in files:
        gap = np.asarray(Image.open(a / name)).astype(int) - np.asarray(Image.open(b / name))
        assert np.abs(gap).max() <= tolerance


def test_sample_i_depends_on_seed_and_i_alone(trained, tmp_path, capsys):
    flags = f"{trained} --steps 3 --sampler sde --guidance 2"
    for name, more in dict(one="--batch 1", seven="--batch 7", seed="--batch 7 --seed 1").items():
        sampling(f"{flags} --n 7 --out {tmp_path}/{name} {more}")
    assert_same_images(tmp_path / "one", tmp_path / "seven", 7)
    with pytest.raises(AssertionError):
        assert_same_images(tmp_path / "one", tmp_path / "seed", 7, 20)
    kept, missing = tmp_path / "one" / "000003.png", tmp_path / "one" / "000005.png"
    Image.new("RGB", (16, 16)).save(kept)  # what exists is skipped
    missing.unlink()
    sampling(f"{flags} --n 9 --out {tmp_path}/one --npz {tmp_path}/a.npz")
    assert np.asarray(Image.open(kept)).max() == 0
    pixels = np.load(tmp_path / "a.npz")["arr_0"]
    assert pixels.shape == (9, 16, 16, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels[5], np.asarray(Image.open(missing)))
    with pytest.raises(InputError, match="guidance 2.0 there, 3.0 now"):
        sampling(f"{flags} --guidance 3 --n 9 --out {tmp_path}/one")
    other = checkpoint(trained)  # another model, same step, same settings: not taken for this one's images
    other["ema"]["final_layer.linear.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(InputError, match="weights .* there"):
        sampling(f"{flags.replace(str(trained), str(tmp_path / 'other.pt'))} --n 9 --out {tmp_path}/one")
    with pytest.raises(InputError, match="other files"):
        sampling(f"{flags} --n 1 --out {write_photos(tmp_path / 'mine', 1)}")
    sampling(f"{trained} --n 2 --steps 2 --no-ema --classes up --grid {tmp_path}/grid.png")
    assert (tmp_path / "grid.png").exists() and "no-ema" in capsys.readouterr().out


def test_uvit_without_label_dropout_has_no_null_class(data, tmp_path):
    train(f"--data {data} --model uvit-nano --label-dropout 0 --out {tmp_path}/run --steps 2")
    state = checkpoint(tmp_path / "run")
    assert state["model"]["label_emb.weight"].shape[0] == 3  # as of the published ImageNet 64: one row a class
    sampling(f"{tmp_path}/run --n 3 --steps 2 --out {tmp_path}/out")
    with pytest.raises(InputError, match="--guidance 2.0: .*knows no null class"):
        sampling(f"{tmp_path}/run --n 3 --steps 2 --guidance 2 --out {tmp_path}/guided")
    for weights in (state["model"], state["ema"]):  # a run of the time when there was one all the same
        weights["label_emb.weight"] = torch.cat((weights["label_emb.weight"], torch.zeros(1, 128)))
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(InputError, match="another architecture than this UViT: .*label_emb"):
        sampling(f"{tmp_path}/run --n 1 --out {tmp_path}/old")
    with pytest.raises(InputError, match="another architecture than this UViT: .*label_emb"):
        train(f"--data {data} --model uvit-nano --label-dropout 0 --out {tmp_path}/run --steps 4")


def test_sampling_without_classes(tmp_path, capsys):
    data = write_photos(tmp_path / "data", 4)
    train(f"--data {data} --out {tmp_path}/run --steps 1")
    sampling(f"{tmp_path}/run --n 3 --steps 2")
    assert len(list((tmp_path / "run" / "samples").glob("step1-*/*.png"))) == 3
    sampling(f"{tmp_path}/run --steps 2 --trajectory")
    assert "band" in capsys.readouterr().out


HUBCONF = """import torch
class Tiny(torch.nn.Module):
    def forward_features(self, x):
        x = torch.nn.functional.avg_pool2d(x, 8)
        return {"x_norm_patchtokens": x.flatten(2).transpose(1, 2)}
def tiny():
    return Tiny()
def broken():
    return torch.nn.Identity()
"""


def test_score_equals_frechet_distance_by_hand(trained, data, tmp_path, capsys):
    """Through a torch.hub folder that this test writes; the oracle is scipy's matrix square root."""
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "hubconf.py").write_text(HUBCONF)
    flags = f"{trained} --n 24 --steps 3 --out {tmp_path}/out"
    sampling(f"{flags} --score {data} --features {hub}:tiny")
    result = json.loads((tmp_path / "scores.jsonl").read_text())
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    features = [((load_all(x) / 255 - mean) / std).mean((2, 3)).double().numpy() for x in (tmp_path / "out", data)]
    (mu1, s1), (mu2, s2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in features)
    oracle = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert abs(result["frechet_distance"] / oracle - 1) < 1e-3
    expected = dict(images=24, reference_images=48, sampler="euler", steps=3, guidance=1.0, ema=True, format="PNG",
                    checkpoint_step=12, features=f"{hub}:tiny")  # fmt: skip
    assert expected.items() <= result.items() and "16" in result["crop"]
    assert "below 10,000" in capsys.readouterr().out
    for bad in ("nonsense", f"{hub}:absent", f"{hub}:broken", f"{data}:tiny"):
        with pytest.raises(InputError, match="--features"):
            sampling(f"{flags} --score {data} --features {bad}")
    (tmp_path / "mixed").mkdir()
    shutil.copy(write_photos(tmp_path / "small", 4, size=8) / "000.png", write_photos(tmp_path / "mixed", 4) / "a.png")
    for reference, message in (("small", "8x8"), ("mixed", "8x8"), ("nowhere", "nowhere")):
        with pytest.raises(InputError, match=message):  # before anything is sampled
            sampling(f"{trained} --out {tmp_path}/new --score {tmp_path / reference}")
    assert not (tmp_path / "new").exists()
    (tmp_path / "weights.pth").write_bytes(b"junk")
    for weights in ("weights.pth", "absent.pth"):
        with pytest.raises(InputError, match="--features"):
            sampling(f"{flags} --score {data} --features-weights {tmp_path}/{weights}")


def test_trajectory(trained, tmp_path, capsys):
    sampling(f"{trained} --trajectory --steps 20 --out {tmp_path}/t")
    table = json.loads((tmp_path / "t-trajectory.json").read_text())
    assert len(table["share"]) == 16 and table["t"][0] == 1 and abs(table["share"][0][-1] - 1) < 0.3
    assert Image.open(tmp_path / "t-trajectory.png").size == (11 * 18 + 2, 8 * 18 + 2)
    assert "band" in capsys.readouterr().out
    # low bands carry more power, so noise drowns them later
    assert all(0 < t < 1 for t in table["snr_below_1_at"]) and table["snr_below_1_at"][0] > table["snr_below_1_at"][8]


def gaussian_images(n, side, alpha, seed):
    """Coloured Gaussian images (n, 3, side, side) around mid-grey, their expected power 0.3 / r^alpha, far from clipping."""
    x = power_law(n, 3, side, alpha, seed) * 0.3**0.5
    return (x - x.mean((-2, -1), keepdim=True)).float()


def bands_by_loops(power):
    """(side, side), its DC counted as zero -> mean of every radial band (16,), nan where it is empty"""
    side, sums = len(power), [[] for _ in range(16)]
    for k in range(side):
        for l in range(side):
            sums[min(15, int(16 * (k * k + l * l) ** 0.5 / (2**0.5 * (side - 1))))].append(power[k, l] if k + l else 0)
    return np.array([np.mean(band) if band else np.nan for band in sums])


def measured_drowning(diffusion, images, seed=0):
    """Where, in forward process and decoder, what two noisy versions of an image have in common falls below what differs."""
    g, x0, ratios, times = torch.Generator().manual_seed(seed), diffusion.encode(images), [], np.geomspace(0.004, 0.5, 18)
    for t in times:
        alpha, sigma = diffusion.path.alpha_sigma(torch.tensor(t, dtype=torch.float64))
        noisy = [diffusion.decode(alpha * x0 + sigma * torch.randn(x0.shape, generator=g)) for _ in range(2)]
        a, b = (scipy.fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho") for x in noisy)
        noise = bands_by_loops(np.mean((a - b) ** 2, (0, 1)) / 2)
        ratios.append(np.log(np.maximum(bands_by_loops(np.mean(a * b, (0, 1))), 1e-3 * noise) / noise))
    return np.exp([np.interp(0, -ratio, np.log(times)) for ratio in np.array(ratios).T])  # -ratio rises with t


DROWNING = [("dct", "flow", 16.0), ("dct", "vp", 4.0), ("pixel", "flow", 1.0), ("pixel", "vp", 1.0)]


@pytest.mark.parametrize("space, path, c", DROWNING)
def test_noise_drowns_gaussian_images_when_predicted(space, path, c):
    config = dict(space=space, size=32, model="dit-nano", path=path, snr_scale=c, predict="x0", classes=None,
                  label_dropout=0.0, block=4, keep=12, eta=100.0)  # fmt: skip
    diffusion, images = sample.Diffusion(config), gaussian_images(128, 32, 1.5, seed=1)
    if space == "pixel":  # what the images were made with
        r = np.hypot(*np.mgrid[:32, :32])
        power = torch.from_numpy(bands_by_loops(0.3 * np.maximum(r, 1) ** -1.5))
    else:  # the codec takes colour and detail away
        power = psd(diffusion.decode(diffusion.encode(images))).mean(0)
    measured = measured_drowning(diffusion, images)
    assert 0.005 < measured.min() and measured.max() < 0.5
    np.testing.assert_allclose(sample.drowning_times(diffusion, power), measured, rtol=0.1)


def test_spectrum_of_decoded_noise():
    """In DCT space against every unit impulse, and the figures of the 32-pixel codec; elsewhere noise is white."""
    config = dict(size=32, path="flow", snr_scale=1.0, predict="x0", classes=None, label_dropout=0.0, block=4, keep=12,
                  eta=469.086, latent_shape=[4, 16, 16], scale=0.2)  # fmt: skip
    make = lambda space: sample.Diffusion(config | {"space": space, "model": "dit-nano"})
    codec, found = make("dct").codec, sample.noise_spectrum(make("dct"))
    impulses = torch.eye(16 * 72).view(-1, 16, 72)
    fields = (codec.decode(impulses / 8) - codec.decode(0 * impulses[:1])).double().numpy() * 8
    power = bands_by_loops((scipy.fft.dctn(fields, axes=(-2, -1), norm="ortho") ** 2).mean(1).sum(0))
    np.testing.assert_allclose(found, power, rtol=0.04)
    published = [7.5, 7.5, 6.4, 4.8, 3.0, 1.7, 0.16]
    np.testing.assert_allclose((found / (469.086 / 127.5) ** 2)[[0, 1, 2, 3, 4, 5, 15]], published, rtol=0.07)
    for space, side in (("pixel", 32), ("latent", 16)):
        white = bands_by_loops(np.ones((side, side)))
        np.testing.assert_allclose(sample.noise_spectrum(make(space)), white, rtol=0.04)


def test_bad_input_of_training(data, trained, tmp_path):
    def refused(match, flags="", out=tmp_path / "new"):
        with pytest.raises(InputError, match=match):
            train(f"--data {data} --out {out} --steps 2 {flags}")

    refused("nowhere", f"--data {tmp_path}/nowhere")
    refused("multiple of 2 x block size", "--size 20")
    refused("patch 4 does not divide", "--space pixel --model dit-nano/4 --size 18")
    refused("keep 17", "--keep 17")
    refused("uvit-huge", "--model uvit-huge")
    refused("leave /2 out", "--model dit-nano/2")
    refused("--block", "--space pixel --block 4")
    refused("--snr-scale", "--snr-scale 0")
    refused("must be a multiple", "--batch 9 --grad-accum 2")
    refused("--steps", "--steps 0")
    refused("has none", f"--classes --data {write_photos(tmp_path / 'flat', 4)}")
    refused("--seed", "--seed -1")
    refused("--betas", "--betas 1 1")
    refused("is a file", out=data / "left" / "000.png")
    before = (trained / "checkpoint.pt").read_bytes()
    refused("--lr 0.001 there, 0.5 now", "--lr 0.5", trained)
    refused("--fresh", "--fresh", trained)
    refused("and no checkpoint", out=write_photos(tmp_path / "mine" / "images", 1).parent)
    assert (trained / "checkpoint.pt").read_bytes() == before and (tmp_path / "mine" / "images" / "000.png").exists()
    result = command(f"train_diffusion.py --data {tmp_path}/nowhere", check=False)
    assert result.returncode == 2 and "error: --data" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("module", [train_diffusion, train_vae, sample])
def test_an_empty_value_is_an_error_that_names_its_flag(module, capsys):
    """Of every flag that takes text; before anything else happens, so that `main` is never reached."""
    parser, seen = module.make_parser(), 0
    for action in parser._actions:
        if action.type is None and action.nargs != 0 and not action.choices and action.option_strings:
            words = [action.option_strings[-1], *(["x"] if action.nargs == "+" else []), ""]
            with pytest.raises(SystemExit) as stop:
                sample.run_program(lambda args: pytest.fail("main was reached"), parser.parse_args(words))
            error = capsys.readouterr().err
            assert stop.value.code == 2 and error.startswith(f"error: {words[0]}: ") and error.count("\n") == 1
            seen += 1
    assert seen > 5
    if module is sample:
        with pytest.raises(SystemExit):
            sample.run_program(sample.main, parser.parse_args([""]))
        assert "RUN_OR_CKPT" in capsys.readouterr().err


def test_bad_input_of_sampling(trained, tmp_path):
    def refused(match, flags):
        with pytest.raises(InputError, match=match):
            sampling(f"{flags} --n 1 --steps 1 --out {tmp_path}/x")

    refused("no such run", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no checkpoint.pt in it yet", tmp_path / "empty")
    (tmp_path / "empty" / "checkpoint.pt.tmp").write_bytes(b"")
    refused("being written", tmp_path / "empty")
    for name, content in {
        "text.pt": b"hello",
        "abc.pt": b"abc",
        "none.pt": b"",
        "cut.pt": (trained / "checkpoint.pt").read_bytes()[:5000],
    }.items():
        (tmp_path / name).write_bytes(content)
        refused(name, tmp_path / name)
    torch.save({"model": trained}, tmp_path / "code.pt")  # a Path object is code to a pickle
    refused("plain values", tmp_path / "code.pt")
    torch.save({"model": {}}, tmp_path / "other.pt")
    refused("lacks", tmp_path / "other.pt")
    state = checkpoint(trained)
    state["config"]["model"] = "uvit-nano"
    torch.save(state, tmp_path / "architecture.pt")
    refused("another architecture than this UViT", tmp_path / "architecture.pt")
    refused("9: not one of the 3 classes", f"{trained} --classes 9")
    refused("cat: not one of the 3 classes", f"{trained} --classes cat")
    refused("ddim", f"{trained} --sampler ddim")
    state["config"] |= {"model": "dit-nano", "classes": None}
    torch.save(state, tmp_path / "plain.pt")
    refused("without classes", f"{tmp_path}/plain.pt --guidance 2")


def test_prefixes_of_wrapped_weights_are_stripped():
    net = NETWORKS["dit maps"]()
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        other = randomised(NETWORKS["dit maps"](), seed=5).float()
        sample.load_weights(other, {prefix + k: v for k, v in net.state_dict().items()}, "here")
        assert distance(net.state_dict(), other.state_dict()) == 0


def test_nonfinite_steps_are_skipped_and_ten_in_a_row_stop(data, tmp_path, monkeypatch):
    real, calls, bad = train_diffusion.diffusion_loss, [], {3, 4, 6}

    def sometimes_nan(*args, **kwargs):
        calls.append(1)
        loss, aligned = real(*args, **kwargs)
        return loss * (float("nan") if len(calls) in bad else 1.0), aligned

    monkeypatch.setattr(train_diffusion, "diffusion_loss", sometimes_nan)
    train(f"--data {data} --out {tmp_path}/some --steps 8")
    assert [line["skipped_steps"] for line in metrics(tmp_path / "some")] == [0, 0, 1, 1, 0, 1, 0, 0]
    state = checkpoint(tmp_path / "some")
    assert all(v.isfinite().all() for v in state["model"].values()) and state["optimizer"]["state"][0]["step"] == 5
    calls.clear()
    bad.update(range(7, 100))
    with pytest.raises(InputError, match="10 steps in a row"):
        train(f"--data {data} --out {tmp_path}/many --steps 50 --save-every 5")
    assert all(v.isfinite().all() for v in checkpoint(tmp_path / "many")["model"].values())


class CountNormals(TorchDispatchMode):
    """Counts the normal numbers that are drawn."""

    drawn = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "normal" in str(function) or "randn" in str(function):
            self.drawn += result.numel()
        return result


@pytest.mark.parametrize("space", ["dct", "latent"])
def test_a_process_draws_the_noise_of_its_own_images_only(space):
    config = dict(space=space, size=16, model="dit-nano", path="flow", snr_scale=1.0, predict="x0", classes=None,
                  label_dropout=0.1, block=4, keep=9, eta=1.0, latent_shape=[4, 8, 8], scale=1.0)  # fmt: skip
    diffusion = sample.Diffusion(config, torch.nn.Identity(), vae=torch.nn.Identity() if space == "latent" else None)
    args = train_diffusion.make_parser().parse_args("--batch 64 --t-sampling uniform --seed 5".split())
    whole = train_diffusion.draw_step(args, 3, slice(0, 64), diffusion, "cpu")
    for start, stop in ((0, 1), (13, 17), (60, 64)):
        with CountNormals() as count:
            part = train_diffusion.draw_step(args, 3, slice(start, stop), diffusion, "cpu")
        assert count.drawn == (stop - start) * int(np.prod(diffusion.shape)) * (2 if space == "latent" else 1)
        for a, b in zip(whole, part):
            assert (a is None and b is None) or torch.equal(a[start:stop], b)
    noise = torch.stack([whole[1], train_diffusion.draw_step(args, 4, slice(0, 64), diffusion, "cpu")[1]]).flatten(2)
    values = noise.flatten().numpy()
    assert scipy.stats.kstest(values, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise.flatten(0, 1).numpy()) - np.eye(128)  # of any two images, of one step or of two
    assert np.abs(correlation).max() < 6 / np.sqrt(noise.shape[2])


def test_batches_are_prepared_one_step_ahead_by_another_thread():
    made, threads = [], set()

    def batches():
        for i in range(4):
            made.append(i)
            threads.add(threading.get_ident())
            yield i

    for i in train_diffusion.prefetch(batches()):
        deadline = time.monotonic() + 10
        while len(made) < min(i + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.001)  # the next one comes while this one is in use
        assert made == list(range(min(i + 2, 4)))  # and no later one
    assert len(threads) == 1 and threading.get_ident() not in threads

    def failing():
        yield 0
        raise InputError("unreadable")

    ahead = train_diffusion.prefetch(failing())
    assert next(ahead) == 0
    with pytest.raises(InputError, match="unreadable"):
        next(ahead)
    ahead = train_diffusion.prefetch(itertools.count())  # left before its end
    next(ahead)
    ahead.close()


def test_share_of_time_spent_waiting_for_data(data, tmp_path, monkeypatch):
    """On a clock that only data and steps move, by 3 and by 1."""
    now, real = [0.0], train_diffusion.update_ema
    monkeypatch.setattr(train_diffusion, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=time.sleep))

    def in_line(batches):
        for batch in batches:
            now[0] += 3
            yield batch

    def slowly(*args):
        now[0] += 1
        real(*args)

    monkeypatch.setattr(train_diffusion, "prefetch", in_line)
    monkeypatch.setattr(train_diffusion, "update_ema", slowly)
    train(f"--data {data} --out {tmp_path}/run --steps 3")
    assert [line["data_wait"] for line in metrics(tmp_path / "run")] == [0.75, 0.75, 0.75]


def test_amp_auto_is_what_the_hardware_multiplies(monkeypatch):
    def chosen(device):
        return sample.autocast("auto", torch.device(device))[1]

    for avx512, amx, dtype in ((True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        assert chosen("cpu") == dtype
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert chosen("cuda") == dtype
    assert sample.autocast("off", torch.device("cpu"))[1] is None
    for name, tf32, inside in (("cuda", True, "high"), ("cuda", False, "highest"), ("cpu", True, "highest")):
        with sample.autocast("off", torch.device(name), tf32)[0]():
            assert torch.get_float32_matmul_precision() == inside
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("space", ["dct", "latent"])
def test_networks_alone_run_in_half_precision(space):
    """Codec, loss and the samplers' arithmetic see float32, the networks' layers bf16."""
    config = dict(space=space, size=16, model="dit-nano/1" if space == "latent" else "dit-nano", path="flow", snr_scale=1.0,
                  predict="x0", classes=None, label_dropout=0.1, block=4, keep=9, eta=400.0, latent_shape=[4, 4, 4],
                  scale=1.0)  # fmt: skip
    autoencoder = vae.VAE(**vae.PRESETS["tiny"]).eval() if space == "latent" else None
    contexts = [sample.autocast(amp, torch.device("cpu"))[0] for amp in ("off", "bf16")]
    make = [sample.Diffusion(config, vae=autoencoder, amp=context) for context in contexts]
    make[1].network.load_state_dict(randomised(make[0].network).float().state_dict())
    make[0].network.float()
    seen, images = [], photos(2, 16)
    for layer in (make[1].network.blocks[0].mlp.fc1, *([autoencoder.decoder.conv_in] if autoencoder else [])):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x0 = [diffusion.encode(images) for diffusion in make]
    assert x0[1].dtype == torch.float32 and (x0[1] - x0[0]).abs().max() <= (0.0 if space == "dct" else 0.1)
    t, eps = torch.tensor([0.3, 0.7]), torch.randn(x0[0].shape, generator=torch.Generator().manual_seed(0))
    losses = [train_diffusion.diffusion_loss(d, d.network, x0[0], eps, t)[0] for d in make]
    assert losses[1].dtype == torch.float32 and torch.allclose(*losses, rtol=0.05) and not torch.equal(*losses)
    pictures = []
    for diffusion in make:
        seen.clear()
        pictures.append(sample.generate(diffusion, [0, 1], 0, "cpu", steps=3))
    assert set(seen) == {torch.bfloat16} and pictures[1].dtype == torch.float32
    assert (pictures[1] - pictures[0]).abs().mean() < 0.02 and not torch.equal(*pictures)


def test_sampling_in_bf16_is_close_and_its_protocol_says_so(trained, tmp_path):
    for amp in ("off", "bf16"):
        sampling(f"{trained} --n 3 --steps 3 --amp {amp} --out {tmp_path}/{amp}")
    assert_same_images(tmp_path / "off", tmp_path / "bf16", 3, tolerance=12)
    kinds = [json.loads((tmp_path / amp / "protocol.json").read_text())["amp"] for amp in ("off", "bf16")]
    assert kinds == ["float32", "bfloat16"]
    with pytest.raises(InputError, match="made otherwise .*amp float32 there, bfloat16 now"):
        sampling(f"{trained} --n 4 --steps 3 --amp bf16 --out {tmp_path}/off")


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="--compile needs a C++ compiler")


SMALL_RUNS = """
import sys, dit, train_diffusion, train_vae, vae
dit.DIT_SIZES["nano"] = dict(hidden_size=32, depth=1, num_heads=2)
vae.PRESETS["tiny"] = dict(widths=(32,), latent_channels=4, num_res_blocks=1)
for program, flags in ((train_diffusion, sys.argv[1]), (train_vae, sys.argv[2])):
    program.main(program.make_parser().parse_args(flags.split()))
"""


@pytest.fixture(scope="session", autouse=True)
def compiled_runs(request, tmp_path_factory):
    """Both trainers with --compile, in a process beside the other tests: compiling takes a minute. -> it, its folder"""
    wanted = any(item.name == "test_compiled_runs_equal_plain_ones" for item in request.session.items)
    if not wanted or not shutil.which("g++"):
        yield None
        return
    folder = tmp_path_factory.mktemp("compiled")
    write_photos(folder / "data", 48, classes=["left", "right", "up"])
    lines = small_runs(folder, "compiled", "--compile")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen([sys.executable, "-c", SMALL_RUNS, *lines], cwd=HERE, env=environment, text=True,
                          stdout=subprocess.DEVNULL, stderr=(folder / "log").open("w")) as process:  # fmt: skip
        yield process, folder
        process.kill()


def small_runs(folder, name, flags=""):
    common = f"--data {folder}/data --steps 3 {flags} --out {folder}/{name}"
    return f"{TINY} {common}-diffusion", f"{TINY_VAE} {common}-vae --regularizer dsm+kl --eval-images 8"


def test_views_of_many_sizes_compile_once_a_size_or_not_at_all(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters = torch._dynamo.utils.counters
    counters.clear()
    autoencode(f"--size 64 --data {data} --out {tmp_path}/se --steps 6 --regularizer se --compile --eval-images 4")
    assert 2 <= counters["stats"]["unique_graphs"] <= 4  # encoder; decoder of whole, halved and quartered latents
    with pytest.raises(InputError, match="--compile: eq .* leave --compile out"):
        autoencode(f"--size 64 --data {data} --out {tmp_path}/eq --regularizer eq --compile")


def test_ema_warm_up():
    averaged, network = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for n in range(30):
        before, decay = averaged.weight.clone(), min(0.7, (1 + n) / (10 + n))
        train_diffusion.update_ema(averaged, network, n, 0.7)
        assert torch.allclose(averaged.weight, decay * before + (1 - decay) * network.weight)


def test_loss_weights_and_times():
    g = torch.Generator().manual_seed(0)
    t = train_diffusion.draw_times(100_000, "logit-normal", (0.5, 1.0), Flow(), g)
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 1) < 0.02
    t = train_diffusion.draw_times(100_000, "uniform", None, VP(), g)
    assert 0 <= t.min() < 1e-4 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.01
    config = dict(space="dct", size=16, model="dit-nano", path="flow", snr_scale=1.0, predict="x0", classes=None)
    diffusion = sample.Diffusion(config | dict(label_dropout=0.1, block=4, keep=2, eta=400.0))
    x0, t, weights = torch.randn(5, 4, 12), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), torch.rand(12)
    loss, _ = train_diffusion.diffusion_loss(diffusion, diffusion.network, x0, torch.randn_like(x0), t, weights=weights)
    expected = (x0.square() * weights).mean((1, 2)) / (t**2 + 0.04)  # the network starts at zero
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_benchmark_prints_every_part_and_writes_nothing(data, tmp_path, capsys):
    train(f"--data {data} --out {tmp_path}/none --benchmark 2")
    out = capsys.readouterr().out
    for word in ("file to pixels", "forward", "backward", "optimizer", "images/s", "GFLOP/s", "peak memory"):
        assert word in out
    assert not (tmp_path / "none").exists()


KINDS = [((9, 14, 3), "uint8"), ((5, 4), "uint8"), ((6, 6), "uint16"), ((4, 4, 4), "uint8"), ((3, 5, 2), "uint8")]


@pytest.mark.parametrize("shape, dtype", KINDS)
def test_upsample_command_on_every_kind_of_image(tmp_path, shape, dtype):
    pixels = np.random.default_rng(0).integers(60, 190, shape).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    dct.main(dct.make_parser().parse_args(f"upsample {tmp_path}/in.png {tmp_path}/out.png".split()))
    up = np.asarray(Image.open(tmp_path / "out.png"))
    assert up.shape[:2] == (2 * shape[0], 2 * shape[1]) and up.dtype == dtype
    averaged = up.astype(float).reshape(shape[0], 2, shape[1], 2, -1).mean((1, 3)).reshape(shape)
    assert np.abs(averaged - pixels).mean() < 1.5  # rounding, and clipping at 0 and 255


def upsampling(source, output, flags=""):
    dct.main(dct.make_parser().parse_args(f"upsample {source} {output} {flags}".split()))


def test_upsample_command_on_deep_grey(tmp_path, capsys):
    known, refused = deep_pictures(tmp_path)
    for name in known:
        for ending in ("png", "tif"):
            upsampling(tmp_path / name, tmp_path / f"up.{ending}")
            with Image.open(tmp_path / f"up.{ending}") as image:
                up = np.asarray(image).astype(float)
                white = 1 if image.mode == "F" else 65535
                assert image.mode == ("F" if name == "f.tif" and ending == "tif" else "I;16"), name
            averaged = up.reshape(8, 2, 8, 2).mean((1, 3)) / white
            assert np.abs(averaged - RAMP * 4 / 255).mean() < 2e-3  # clipping at black
    for name, reason in refused.items():
        with pytest.raises(SystemExit, match=f"^dct.py: cannot read the image .*{name}: [^\n]*{reason}[^\n]*$"):
            upsampling(tmp_path / name, tmp_path / "no.png")
    assert not (tmp_path / "no.png").exists()


def test_upsample_command_keeps_colour_profile_and_orientation(tmp_path, capsys):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture = Image.fromarray(np.random.default_rng(0).integers(60, 190, (6, 9, 3), dtype=np.uint8))
    picture.save(tmp_path / "in.png", icc_profile=profile, exif=exif)
    for ending in ("png", "jpg", "tif", "webp"):
        upsampling(tmp_path / "in.png", tmp_path / f"up.{ending}")
        with Image.open(tmp_path / f"up.{ending}") as up:
            assert up.info["icc_profile"] == profile and up.size == (12, 18) and up.getexif().get(0x0112, 1) == 1
            if ending == "png":
                averaged = np.asarray(up).astype(float).reshape(9, 2, 6, 2, 3).mean((1, 3))
                assert np.abs(averaged - np.asarray(picture.transpose(Image.Transpose.ROTATE_270))).mean() < 1.5
    capsys.readouterr()
    picture.convert("CMYK").save(tmp_path / "ink.tif", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    upsampling(tmp_path / "ink.tif", tmp_path / "up.png")  # RGB now: a profile of inks would be wrong
    assert "icc_profile" not in Image.open(tmp_path / "up.png").info and "profile" in capsys.readouterr().out
    for block in (0, 10):  # the picture is 6 x 9
        with pytest.raises(SystemExit, match=f"--block {block}"):
            upsampling(tmp_path / "in.png", tmp_path / "up.png", f"--block {block}")


def test_upsample_command_in_its_own_process(tmp_path):
    Image.new("RGB", (14, 9), "teal").save(tmp_path / "in.png")
    result = command(f"dct.py upsample {tmp_path}/in.png {tmp_path}/out.png --block 4")
    assert "14x9" in result.stdout and Image.open(tmp_path / "out.png").size == (28, 18)
    result = command(f"dct.py upsample {tmp_path}/absent.png {tmp_path}/b.png", check=False)
    assert result.returncode and "dct.py: cannot read" in result.stderr and "Traceback" not in result.stderr
    for source, out, problem in (
        (tmp_path / "in.png", "no/b.png", "write"),
        (tmp_path / "in.png", "no/b.jpg", "write"),
        (tmp_path / "in.png", "b.unknown", "write"),
        (HERE / "dct.py", "b.png", "read"),
    ):
        with pytest.raises(SystemExit, match=f"^dct.py: cannot {problem}"):
            upsampling(source, tmp_path / out)


# ---- train_vae.py, tiny -----------------------------------------------------------------------------------

TINY_VAE = (
    "--size 16 --batch 4 --seed 3 --workers 0 --device cpu --lr-decay none --warmup 1 --log-every 1 --eval-every 1000 "
    "--save-every 1000 --eval-images 4"
)


def autoencode(flags):
    train_vae.main(train_vae.make_parser().parse_args(f"{TINY_VAE} {flags}".split()))


def looking(flags):
    train_vae.main(train_vae.make_parser().parse_args(f"--device cpu --workers 0 {flags}".split()))


@pytest.fixture(scope="module")
def autoencoders(data, tmp_path_factory):
    """Runs of a few steps with kl and with dsm, and of more with esm, shared by the tests that only read them."""
    runs = tmp_path_factory.mktemp("autoencoders")
    for name in ("kl", "dsm"):
        autoencode(f"--data {data} --out {runs}/{name} --steps 3 --regularizer {name}")
    autoencode(f"--data {data} --out {runs}/esm --steps 100 --regularizer esm --lr 2e-3")  # latents worth learning
    return runs


def test_views_follow_their_shares_and_the_seed():
    ks, eq = [], []
    for step in range(800):
        side, ((change, on_image, weight),) = train_vae.draw_views({"dsm"}, 0, 5, step, 16, 4)
        assert side == 64 and weight == 1 and (change.keywords if hasattr(change, "keywords") else 0) in (
            0, {"k": 8, "block": 8}, {"k": 10, "block": 8}, {"k": 12, "block": 8})  # fmt: skip
        ks.append(change.keywords["k"] if hasattr(change, "keywords") else 0)
        side, ((change, on_image, _),) = train_vae.draw_views({"eq"}, 0, 5, step, 32, 8)
        if hasattr(change, "keywords"):
            n, turns = change.keywords["size"][0], change.keywords["quarter_turns"]
            assert side == 256 and on_image.keywords == {"size": (8 * n, 8 * n), "quarter_turns": turns}
            assert 8 <= n <= 31 and turns in (1, 2, 3)
            eq.append("transformed")
        else:
            eq.append("plain" if side == 256 else "small")
            assert side % 8 == 0 and 64 <= side <= 256
    for k in (0, 8, 10, 12):
        assert abs(ks.count(k) / 800 - 1 / 4) < 0.05
    for kind, share in (("transformed", 1 / 2), ("small", 1 / 8), ("plain", 3 / 8)):
        assert abs(eq.count(kind) / 800 - share) < 0.06
    _, (plain, (change, on_image, weight)) = train_vae.draw_views({"se"}, 0.25, 5, 0, 16, 4)
    assert weight == 0.25 and change.keywords == on_image.keywords and change.keywords["factor"] in (2, 4)


def parts_of(flags):
    args = train_vae.make_parser().parse_args(f"{TINY_VAE} {flags}".split())
    train_vae.complete(args)
    config = vae.PRESETS["tiny"]
    parts = train_vae.make_parts(args, train_diffusion.Processes("cpu"), config)
    parts.lpips = None
    train_vae.wrap(parts, args, train_diffusion.Processes("cpu"))
    return args, parts


class Colours(torch.nn.Module):
    """An encoder of 4 x 4 tokens: mean colours, on random axes."""

    def __init__(self):
        super().__init__()
        self.axes = torch.nn.Linear(3, 8)
        self.axes.weight.data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))  # the same in every process
        self.axes.bias.data.zero_()

    def forward_features(self, x):
        return {"x_norm_patchtokens": self.axes(F.adaptive_avg_pool2d(x, 4).flatten(2).mT)}


HUB = "import sys; sys.path.insert(0, {!r}); from test_all import Colours as colours; dependencies = ['torch']"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (folder / "hubconf.py").write_text(HUB.format(str(HERE)))
    return folder


def test_every_regularizer_reaches_the_encoder_and_views_the_decoder(hub):
    x, noise = photos(2, 32), torch.randn(2, 4, 8, 8)

    def gradients(loss, parts):
        parts.one_pass.zero_grad()
        loss.backward()
        return [sum(p.grad.abs().sum() for p in net.parameters() if p.grad is not None) > 0
                for net in (parts.vae.encoder, parts.vae.decoder)]  # fmt: skip

    for name in ("kl", "esm"):
        args, parts = parts_of(f"--size 32 --regularizer {name}")
        mean, logvar, z, _, _ = parts.one_pass(x, noise, [])
        ((_, value),) = train_vae.regularizers(args, {name}, x, mean, logvar, z).values()
        assert gradients(value, parts) == [True, False]
    args, parts = parts_of(f"--size 32 --regularizer vf --encoder {hub}:colours")
    tokens = parts.encoder(x)[0].mT.unflatten(2, (4, 4))
    projected = parts.one_pass(x, noise, [])[4]
    assert gradients(spectral_losses.vf_loss(projected, tokens), parts) == [True, False]
    for name in ("dsm", "eq", "se"):
        args, parts = parts_of(f"--size 32 --regularizer {name}")
        views = next(v for v in (train_vae.draw_views({name}, 0.25, 0, s, 8, 4)[1] for s in range(9)) if
                     hasattr(v[-1][0], "keywords"))  # fmt: skip
        made = parts.one_pass(x, noise, [views[-1][0]])[3][0]
        wanted = views[-1][1](x)
        assert made.shape == wanted.shape and gradients((made - wanted).abs().mean(), parts) == [True, True]


@pytest.mark.parametrize("name", ["esm+dsm", "eq", "se", "vf", "none"])
def test_training_an_autoencoder_lowers_its_losses(data, hub, tmp_path, name):
    size = 16 if name in ("esm+dsm", "none") else 32
    encoder = {"vf": f"--encoder {hub}:colours", "esm+dsm": "--esm-weight 0.3"}.get(name, "")
    run, few = tmp_path / "run", write_photos(tmp_path / "few", 4, 32)
    autoencode(f"--data {few} --out {run} --steps 40 --size {size} --regularizer {name} --lr 3e-3 {encoder}")
    lines = metrics(run)
    first, last = (np.mean([line["reconstruction"] for line in part]) for part in (lines[:3], lines[-10:]))
    assert last < 0.8 * first
    for term in {"esm", "se", "vf"} & set(name.split("+")):
        assert np.mean([line[term] for line in lines[-10:]]) < 0.95 * np.mean([line[term] for line in lines[:3]])
    assert all(line["grad_norm"] > 0 and line["skipped_steps"] == 0 for line in lines)
    (entry,) = metrics(run, "evaluation")
    result = entry["evaluation"]
    assert result["psnr"] > 12 and result["images"] == 4
    for scale in ("raw", "unit_std"):
        assert len(result[scale]["latent_shares"]) == len(result["bands"]) == {32: 15, 16: 8}[size]
        assert abs(sum(result[scale]["latent_shares"]) - 1) < 1e-6 and result[scale]["kl_of_mean_spectra"] > 0
    latent = checkpoint(run)["latent"]
    assert abs(latent["scale"] * latent["std"] - 1) < 1e-9 and len(latent["mean"]) == 4
    picture = Image.open(run / "samples" / "step0000040.png")
    assert picture.size == (4 * (size + 2) + 2, 2 * (size + 2) + 2)


def test_autoencoder_n_and_n_steps_equal_2n_with_everything_on(data, lpips_files, tmp_path):
    """With GAN, LPIPS, EMA and a sum of regularizers; then two processes, and parts of a batch, equal one."""
    files = f"--lpips-vgg {lpips_files[0]} --lpips-heads {lpips_files[1]} --lpips-weight 0.5"
    flags = f"--data {data} --size 32 --lr 1e-5 --warmup 3 --regularizer esm+dsm+kl --gan-weight 0.5 --gan-start 1 {files}"
    flags += " --ema 0.9"
    autoencode(f"{flags} --out {tmp_path}/whole --steps 4")
    for steps in (2, 4):
        autoencode(f"{flags} --out {tmp_path}/halves --steps {steps}")
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "halves")
    same = ("model", "ema", "optimizer", "discriminator", "critic_optimizer", "step", "config", "latent")
    assert all(distance(a[k], b[k]) == 0 for k in same)
    lines = metrics(tmp_path / "whole", "grad_norm")
    assert [sorted(set(line) & {"loss", "discriminator", "gan", "lpips", "gan_balance"}) for line in lines] == [
        ["loss", "lpips"], ["gan", "gan_balance", "loss", "lpips"], ["discriminator"],
        ["gan", "gan_balance", "loss", "lpips"]]  # fmt: skip
    assert 0 < lines[1]["gan_balance"] <= 1e4
    # the warm-up of three steps is each optimizer's own: the autoencoder's third is the run's fourth
    np.testing.assert_allclose([line["lr"] for line in lines], np.array([1 / 3, 2 / 3, 1 / 3, 1]) * 1e-5)
    result = metrics(tmp_path / "whole", "evaluation")[0]["evaluation"]
    assert result["lpips"] > 0
    command(f"train_vae.py {TINY_VAE} {flags} --out {tmp_path}/two --steps 4", processes=2)
    two = checkpoint(tmp_path / "two")
    both = [metrics(tmp_path / run, "grad_norm") for run in ("whole", "two")]
    for key in ("loss", "discriminator", "gan_balance", "grad_norm"):
        np.testing.assert_allclose(*([line.get(key, 0) for line in lines] for lines in both), rtol=2e-3)
    assert all(distance(a[k], two[k]) < 1e-4 for k in ("model", "ema", "discriminator"))


@pytest.mark.parametrize("decay", ["none", "linear"])
def test_each_optimizer_warms_up_over_its_own_steps(decay):
    flags = f"--steps 40 --lr 8 --warmup 8 --lr-decay {decay} --gan-weight 0.5"
    for start in (0, 5, 20, 99):
        args, taken, alternating = train_vae.make_parser().parse_args(f"{flags} --gan-start {start}".split()), [0, 0], 0
        for step in range(40):  # counted one by one, as the authors' loop does
            critic = step >= start and alternating % 2 == 1
            alternating += step >= start
            rate = min(8, taken[critic] + 1) * (1 - step / 40 if decay == "linear" else 1)
            taken[critic] += 1
            ours = train_vae.turn(args, step)
            assert ours == (critic, taken[critic] - 1)
            assert abs(train_diffusion.learning_rate(step, args, ours[1]) - rate) < 1e-9
    args.gan_weight = 0.0  # no discriminator: its start means nothing
    assert [train_vae.turn(args, step) for step in (98, 99, 100)] == [(False, 98), (False, 99), (False, 100)]


def test_autoencoder_killed_is_resumed_and_eq_is_the_same_on_two_processes(tmp_path):
    few = write_photos(tmp_path / "few", 8, 32)
    flags = f"--data {few} --size 32 --regularizer eq --grad-accum 2"
    autoencode(f"{flags} --out {tmp_path}/one --steps 6")
    autoencode(f"{flags} --out {tmp_path}/parts --steps 6 --grad-accum 1")
    command(f"train_vae.py {TINY_VAE} {flags} --out {tmp_path}/two --steps 6", processes=2)
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("one", "parts", "two")]
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-3)
    killed = tmp_path / "killed"
    step = killed_after(4, "train_vae.py", f"{TINY_VAE} {flags} --save-every 2", killed)
    assert step >= 2 and step % 2 == 0
    for run in (tmp_path / "one", killed):  # the interrupted one goes on to where the other, never killed, gets
        autoencode(f"{flags} --out {run} --steps {max(step, 6) + 2}")
    whole, kept = ([line["loss"] for line in metrics(run)] for run in (tmp_path / "one", killed))
    assert len(kept) == max(step, 6) + 2
    np.testing.assert_allclose(kept, whole, rtol=1e-3)


def test_nan_steps_of_an_autoencoder_are_skipped(data, tmp_path, monkeypatch):
    real, calls = train_vae.autoencoder_loss, []

    def broken_from_3(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(train_vae, "autoencoder_loss", broken_from_3)
    with pytest.raises(InputError, match="10 steps in a row"):
        autoencode(f"--data {data} --out {tmp_path}/run --steps 50 --save-every 2 --regularizer none")
    state = checkpoint(tmp_path / "run")
    assert all(v.isfinite().all() for v in state["model"].values()) and state["optimizer"]["state"][0]["step"] == 3
    assert [line["skipped_steps"] for line in metrics(tmp_path / "run")] == [0] * 3 + [1] * 10


def test_measures_equal_scipy_and_numpy():
    x, y = ((photos(2, 32, seed=s) + 1) * 127.5 for s in (0, 1))
    y = (x + 0.2 * y).clamp(0, 255).round()
    mse = ((x - y) ** 2).numpy().mean((1, 2, 3))
    np.testing.assert_allclose(train_vae.psnr(x, y).numpy(), 10 * np.log10(255**2 / mse), rtol=1e-5)
    for ours, a, b in zip(train_vae.ssim(x, y), x.double().numpy(), y.double().numpy()):

        def mean(v):
            return scipy.ndimage.gaussian_filter(v, (0, 1.5, 1.5), radius=(0, 5, 5))[:, 5:-5, 5:-5]

        ma, mb = mean(a), mean(b)
        va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        oracle = (2 * ma * mb + 6.5025) * (2 * cov + 58.5225) / ((ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225))
        assert abs(ours.item() - oracle.mean()) < 1e-3
    assert train_vae.ssim(x, x).min() > 0.9999
    mean, logvar = torch.randn(50, 3, 8, 8) + 1, torch.randn(50, 3, 8, 8)
    statistics = train_vae.LatentStatistics()
    for part in (slice(0, 20), slice(20, 50)):
        statistics.add(mean[part], logvar[part])
    found = statistics.result()
    samples = vae.sample_posterior(mean.repeat(40, 1, 1, 1), logvar.repeat(40, 1, 1, 1))
    assert abs(found["std"] / samples.std().item() - 1) < 0.01


def test_spectrum_report_and_evaluation(autoencoders, data, hub, tmp_path, capsys):
    few = write_photos(tmp_path / "few", 5, 24)
    looking(f"--spectrum {autoencoders}/kl {autoencoders}/dsm/checkpoint.pt {autoencoders}/kl --data {few} --out {tmp_path}/s")
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "s" / "spectrum.json").read_text())
    again = f"{autoencoders}/kl"
    assert list(results) == ["kl", "dsm", again] and results["kl"] == results[again]
    for scale in ("raw", "unit_std"):
        assert f"{results['kl'][scale]['kl_of_mean_spectra']:.4f}" in out
    assert "kl: latents" in out and "4 x 4 latents" in out
    table = out[out.index("share of log power") :].splitlines()[1:24]
    assert len({len(line) for line in table}) == 1
    assert [line.split()[0] for line in table[1:9]] == ["4", "6", "8", "9", "11", "12", "14", "16"]  # no other holds any
    small = F.interpolate(torch.from_numpy(esm_blur(load_all(few) / 127.5 - 1)), (4, 4), mode="bicubic")
    assert abs(results["kl"]["image_alpha"] - spectral_losses.power_law_exponent(small)) < 1e-4
    # a run that ESM trained is judged against its own target, in a table of its own
    autoencode(f"--data {data} --out {tmp_path}/flat --steps 1 --regularizer esm+kl --esm-delta 0.5")
    autoencode(f"--data {data} --out {tmp_path}/other --steps 1 --regularizer kl --esm-delta 0.5")
    assert metrics(tmp_path / "flat", "evaluation")[0]["evaluation"]["delta"] == 0.5
    capsys.readouterr()
    looking(f"--spectrum {tmp_path}/flat {autoencoders}/kl {tmp_path}/other --data {few} --out {tmp_path}/t")
    out = capsys.readouterr().out
    mixed = json.loads((tmp_path / "t" / "spectrum.json").read_text())
    assert [mixed[name]["delta"] for name in ("flat", "kl", "other")] == [0.5, 1, 1] and mixed["kl"] == results["kl"]
    assert mixed["flat"]["target_alpha"] > mixed["kl"]["target_alpha"] == mixed["other"]["target_alpha"]
    tables = out.split("share of log power per band")[1:]
    assert len(tables) == 2 and "f^0.5" in tables[0] and "flat" in tables[0] and "kl   other" in tables[1]
    looking(f"--eval-only --ckpt {autoencoders}/kl --data {few} --features {hub}:colours --batch 2")
    out = capsys.readouterr().out
    assert "rFID" in out and "LPIPS is off" in out and "--lpips-vgg" in out and "PSNR" in out
    line = json.loads((autoencoders / "kl" / "scores.jsonl").read_text().splitlines()[-1])
    assert line["kind"] == "reconstruction" and line["images"] == 5 and line["features"] == f"{hub}:colours"
    assert (autoencoders / "kl" / "samples" / "eval-step0000003-few-16-lowpass.png").exists()
    numbers = json.loads((autoencoders / "kl" / "samples" / "eval-step0000003-few-16.json").read_text())
    assert numbers["rfid"] == line["frechet_distance"] and abs(numbers["psnr"] - results["kl"]["psnr"]) < 1e-6
    looking(f"--eval-only --ckpt {autoencoders}/kl --data {few}")
    assert "rFID is off; --features inception" in capsys.readouterr().out


def tilted(small, power, std=None):
    """Fields (N, C, n, n), their spectrum times f^power, f the band's number 1..16, without DC; scaled to std."""
    r = np.hypot(*np.mgrid[: small.shape[-2], : small.shape[-1]])
    f = np.minimum(np.floor(16 * r / r.max()), 15) + 1
    field = scipy.fft.dctn(small, axes=(-2, -1), norm="ortho") * f ** (power / 2) * (r > 0)
    field = scipy.fft.idctn(field, axes=(-2, -1), norm="ortho")
    return torch.from_numpy(field * (std / np.sqrt((field**2).mean()) if std else 1))


def judged(small, latents, images, side, delta=1.0):
    """`measure` of an autoencoder that makes these latents of the images, whatever it is given."""
    net = SimpleNamespace(encode=lambda x: (latents.float(), torch.full_like(latents, -40).float()),
                          decode=lambda z: F.interpolate(z, images.shape[-2:]))  # fmt: skip
    return train_vae.measure(net, [images], torch.device("cpu"), delta=delta)[0]


@pytest.mark.parametrize(("side", "delta"), [(16, 1.0), (16, 0.5), (8, 1.0), (4, 1.0)])
def test_verdict_on_a_spectrum_does_not_depend_on_scale(side, delta):
    """Latents of exactly the target's spectrum are matched, flatter ones too noisy, steeper ones too smooth, at any std."""
    images = sample.to_uint8(0.7 * power_law(8, 3, 4 * side, 2))
    small = F.interpolate(torch.from_numpy(esm_blur(images / 127.5 - 1)), (side, side), mode="bicubic").numpy()
    raw = []
    for std in (0.5, 1.5, 6):
        result = judged(small, tilted(small, delta, std), images, side, delta)
        assert train_vae.verdict(result).startswith("matched at unit std (+0.000") or "(-0.000" in train_vae.verdict(result)
        assert all(abs(result["unit_std"][key]) < 1e-5 for key in ("kl_of_mean_spectra", "mean_of_kls_per_image"))
        assert abs(result["latent_alpha"] - result["target_alpha"]) < 1e-3
        assert abs(result["spatial_std"]["latent"] / std - 1) < 1e-4
        raw.append(result["raw"]["upper_share"])
        for tilt, word in ((1.2, "too noisy"), (-1.2, "too smooth")):
            result = judged(small, tilted(small, delta + tilt, std), images, side, delta)
            assert train_vae.verdict(result).startswith(word)
    assert raw[0] < raw[1] < raw[2]


@pytest.mark.parametrize("side", [16, 8, 6, 4])
def test_spectrum_report_by_loops(side):
    """Both KLs at both scales, a picture and a band at a time, of fields that are tilted and scaled themselves."""
    rng, delta, bands = np.random.default_rng(side), 0.7, {}
    small = tilted(rng.standard_normal((5, 3, side, side)), -2, 0.4).numpy() * (rng.random((5, 1, 1, 1)) + 0.5)
    latents = 3 * rng.standard_normal((5, 4, side, side)) + 1
    spectra = (psd(torch.from_numpy(fields)) for fields in (small, latents))
    ours = train_vae.compare_with_target(*spectra, side, side, delta)
    for u, v in np.ndindex(side, side):
        bands.setdefault(min(15, int(16 * np.hypot(u, v) / np.hypot(side - 1, side - 1))), []).append((u, v))
    used = sorted(band for band, cells in bands.items() if cells != [(0, 0)])
    assert ours["bands"] == [band + 1 for band in used] and (0 in used) == (side == 16)
    for scale, std in (("raw", None), ("unit_std", 1)):
        shares = {}
        for name, fields in (("image", tilted(small, 0, std)), ("target", tilted(small, delta, std)),
                             ("latent", tilted(latents, 0, std))):  # fmt: skip
            power = (scipy.fft.dctn(fields.numpy(), axes=(-2, -1), norm="ortho") ** 2).mean(1)
            s = [[np.log1p(np.mean([one[cell] for cell in bands[band]])) for band in used] for one in power]
            shares[name] = np.array([row / np.sum(row) for row in s])
            np.testing.assert_allclose(ours[scale][f"{name}_shares"], shares[name].mean(0), rtol=1e-5, atol=1e-7)
        kl = lambda p, q: sum(a * np.log(a / b) for a, b in zip(p, q))  # noqa: E731
        means, each = [kl(shares["target"].mean(0), shares["latent"].mean(0))], []
        for target, latent in zip(shares["target"], shares["latent"]):
            each.append(kl(target, latent))
        assert abs(ours[scale]["kl_of_mean_spectra"] / means[0] - 1) < 1e-4
        assert abs(ours[scale]["mean_of_kls_per_image"] / np.mean(each) - 1) < 1e-4 and np.mean(each) > 1.001 * means[0]
        gap = sum((shares["latent"] - shares["target"]).mean(0)[i] for i, band in enumerate(used) if band >= 8)
        assert abs(ours[scale]["upper_share"] - gap) < 1e-5


def test_kl_of_mean_spectra_is_the_papers():
    """The published KLs from the published mean spectra (CelebA-HQ 256), here of pictures that differ from their mean."""
    published = {
        "target": "1961 1560 1099 0977 0677 0617 0472 0404 0358 0340 0313 0278 0266 0238 0229 0212",
        "SD-VAE": "1671 1312 0833 0710 0587 0538 0513 0476 0460 0455 0438 0419 0408 0398 0393 0389",
        "ESM": "1658 1483 1130 0985 0754 0652 0531 0446 0387 0363 0329 0295 0260 0249 0246 0233",
    }  # fmt: skip
    shares = {name: torch.tensor([int(v) / 1e4 for v in row.split()]).double() for name, row in published.items()}
    shares = {name: share / share.sum() for name, share in shares.items()}
    wave = torch.sin(torch.arange(16).double())
    for name, kl in (("SD-VAE", 0.0379), ("ESM", 0.0044)):
        assert abs(spectral_losses.spectral_kl(shares["target"][None], shares[name][None]).item() - kl) < 1e-4
        power = {}
        for side, sign in (("target", 1), (name, -1)):  # spectra S whose log(1 + S) has these shares, in the mean
            apart = sign * 0.01 * (wave - wave.mean())
            power[side] = torch.expm1(12 * torch.stack((shares[side] + apart, shares[side] - apart)))
        image = power["target"] / torch.arange(1, 17)
        raw = train_vae.compare_with_target(image, power[name], 16, 16)["raw"]
        np.testing.assert_allclose(raw["target_shares"], shares["target"].numpy(), atol=1e-6)
        assert abs(raw["kl_of_mean_spectra"] - kl) < 1e-4 < 1e-3 < raw["mean_of_kls_per_image"] - kl


def test_figure_is_drawn_where_matplotlib_is(autoencoders, data, tmp_path, capsys, monkeypatch):
    looking(f"--spectrum {autoencoders}/kl --data {data} --eval-images 4 --out {tmp_path}/s")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "pip install matplotlib" in capsys.readouterr().out
    else:
        assert Image.open(tmp_path / "s" / "spectrum.png").width > 500


def test_latent_cache(autoencoders, data, tmp_path, capsys):
    looking(f"--encode {data} --ckpt {autoencoders}/kl --out {tmp_path}/one.latents --batch 7")
    out = capsys.readouterr().out
    assert "48 images and mirror images" in out and "MiB" in out
    one = train_diffusion.Cache(tmp_path / "one.latents")
    assert one.values.shape == (48, 2, 8, 4, 4) and (one.status == 1).all()
    assert one.header["classes"] == ["left", "right", "up"] and one.header["factor"] == 4
    assert one.labels.tolist() == Images(str(data), 16).labels
    net, info = sample.load_autoencoder(autoencoders / "kl", "cpu")
    assert one.header["autoencoder"] == info["weights"]
    x = load_all(data) / 127.5 - 1
    moments = []
    for view, place in ((x, 0), (x.flip(-1), 1)):
        mean, logvar = net.encode(view)
        moments.append((mean, logvar))
        np.testing.assert_allclose(one.values[:, place], torch.cat((mean, logvar), 1).numpy(), rtol=2e-3, atol=2e-3)
    mean, logvar = (torch.cat(part) for part in zip(*moments))
    std = ((mean.square() + logvar.exp()).mean() - mean.mean() ** 2).sqrt().item()
    assert abs(one.header["scale"] * std - 1) < 2e-3
    # again: nothing to do; other data into the same file: refused; by two processes: the same
    before = (tmp_path / "one.latents").read_bytes()
    looking(f"--encode {data} --ckpt {autoencoders}/kl --out {tmp_path}/one.latents")
    assert "all 48 images are encoded already" in capsys.readouterr().out
    with pytest.raises(InputError, match="holds other moments"):
        looking(f"--encode {data} --ckpt {autoencoders}/dsm --out {tmp_path}/one.latents")
    assert (tmp_path / "one.latents").read_bytes() == before
    command(f"train_vae.py --device cpu --workers 0 --encode {data} --ckpt {autoencoders}/kl --out {tmp_path}/two", processes=2)
    two = train_diffusion.Cache(tmp_path / "two")
    assert np.abs(two.values.astype(float) - one.values).max() < 0.01 and (two.labels == one.labels).all()


def test_moments_are_encoded_in_float32_whatever_amp_says(autoencoders, data, tmp_path, monkeypatch):
    real, seen, cudnn, matmul = vae.VAE.encode, [], torch.backends.cudnn, torch.backends.cuda.matmul

    def watched(self, x):
        moments = real(self, x)
        seen.append((cudnn.allow_tf32, matmul.allow_tf32, moments[0].dtype))
        return moments

    monkeypatch.setattr(vae.VAE, "encode", watched)
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        for amp in ("off", "bf16"):
            cudnn.allow_tf32 = matmul.allow_tf32 = True
            looking(f"--encode {data} --ckpt {autoencoders}/esm --amp {amp} --out {tmp_path}/{amp}")
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
    assert (tmp_path / "off").read_bytes() == (tmp_path / "bf16").read_bytes()
    assert set(seen) == {(False, False, torch.float32)}


def test_latent_cache_is_resumed_and_skips_unreadable_images(autoencoders, tmp_path, monkeypatch, capsys):
    folder = write_photos(tmp_path / "many", 120)
    (folder / "050.png").write_bytes(b"no picture")
    file = tmp_path / "cache"
    flags = f"--encode {folder} --ckpt {autoencoders}/kl --out {file} --batch 10"
    real, calls = vae.VAE.encode, []

    def killed_after(self, x):
        calls.append(len(x))
        if len(calls) > 8:
            raise KeyboardInterrupt
        return real(self, x)

    def no_links(*paths):
        raise PermissionError("a disk without hard links")

    monkeypatch.setattr(train_diffusion.os, "link", no_links)
    monkeypatch.setattr(vae.VAE, "encode", killed_after)
    with pytest.raises(KeyboardInterrupt):
        looking(flags)
    assert not file.exists() and (train_diffusion.Cache(f"{file}.part").status == 1).sum() == 40
    monkeypatch.setattr(vae.VAE, "encode", lambda self, x: (calls.append(len(x)), real(self, x))[1])
    calls.clear()
    looking(flags)
    assert sum(calls) == 2 * (120 - 40 - 1)  # only what was missing, and mirrored
    cache = train_diffusion.Cache(file)
    assert cache.status.tolist() == [1] * 50 + [2] + [1] * 69 and (cache.labels == -1).all()
    assert not Path(f"{file}.part").exists()
    monkeypatch.setattr(train_diffusion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(InputError, match=r"--out .*other: needs 0.1 MiB, its disk has 0.0 free"):
        looking(flags.replace(str(file), f"{tmp_path}/other"))
    assert not list(tmp_path.glob("other*"))


def test_bad_input_of_autoencoders(autoencoders, trained, data, lpips_files, tmp_path, capsys):
    def refused(match, flags="", out=tmp_path / "new"):
        with pytest.raises(InputError, match=match):
            autoencode(f"--data {data} --out {out} --steps 2 {flags}")

    refused("--size 18: --preset tiny takes multiples of 4", "--size 18")
    refused("--size 40: --preset f16d16 takes multiples of 16", "--size 40 --preset f16d16")
    refused("--regularizer blur", "--regularizer blur")
    refused("--regularizer none.kl", "--regularizer none+kl")
    refused("choose one", "--regularizer eq+dsm")
    refused("--size 12: DSM's blocks .* divide it, which is 3x3", "--regularizer dsm --size 12")
    dsm = "--regularizer dsm --size 16 --preset f8d4"
    refused("--size 16: DSM's blocks .* half as wide as the latent .* 2x2 .*--size 128 does", dsm)
    refused("--size 8: must be at least 11", "--regularizer none --size 8")
    refused("--size 16: nothing smaller", "--regularizer eq")
    refused("cannot be halved", "--regularizer se")
    refused("needs --encoder", "--regularizer vf")
    refused("--encoder nowhere:x", "--regularizer vf --encoder nowhere:x --size 32")
    refused("the discriminator would see 16", "--gan-weight 1")
    refused("--kl-weight -1", "--kl-weight -1")
    refused("LPIPS heads weights nowhere", f"--lpips-weight 1 --lpips-vgg {lpips_files[0]} --lpips-heads nowhere")
    refused("--features-weights FILE", "--features inception --features-weights nowhere --regularizer kl")
    before = (autoencoders / "kl" / "checkpoint.pt").read_bytes()
    other = "--regularizer kl --preset f4d4 --gan-weight 0 --lpips-weight 0"
    refused("--preset tiny there, f4d4 now", other, autoencoders / "kl")
    refused("--regularizer kl there, esm now", "", autoencoders / "kl")
    refused("a checkpoint of train_diffusion.py; give one of train_vae.py", "", trained)
    assert (autoencoders / "kl" / "checkpoint.pt").read_bytes() == before
    with pytest.raises(InputError, match="a checkpoint of train_vae.py; give one of train_diffusion.py"):
        sampling(autoencoders / "kl")
    for flags, match in (
        ("--eval-only", "--eval-only: name the autoencoder with --ckpt"),
        (f"--encode {data}", "--encode: name the autoencoder"),
        (f"--encode {data} --ckpt {autoencoders}/kl --size 18", "--size 18: the autoencoder .* multiples of 4"),
        (f"--encode {data} --ckpt {tmp_path}/nowhere", "no such run"),
        (f"--spectrum {autoencoders}/kl {trained}", "a checkpoint of train_diffusion.py"),
        (f"--eval-only --ckpt {autoencoders}/kl --batch -1", "--batch -1"),
        (f"--ckpt {autoencoders}/kl", "is for --eval-only and --encode"),
        ("--size 96 --preset f16d16 --regularizer eq --gan-weight 0.5", "the discriminator would see 16"),
        ("--size 16 --preset f16d16 --regularizer eq", "nothing smaller"),
    ):
        with pytest.raises(InputError, match=match):
            looking(flags)
    state = checkpoint(autoencoders / "kl")
    state["config"]["widths"] = [32, 32, 64]
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(InputError, match="another architecture than this VAE"):
        looking(f"--eval-only --ckpt {tmp_path}/other.pt")
    (tmp_path / "text").write_text("hello, no cache")
    with pytest.raises(InputError, match="no latent cache"):
        train_diffusion.Cache(tmp_path / "text")
    # what is merely absent is off, in one line, and a GAN that never starts is warned of
    capsys.readouterr()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", lambda url, file: open(f"{file}/no/network"))
        patch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
        autoencode(f"--data {data} --out {tmp_path}/off --steps 1 --size 24 --lpips-weight 0.5 --gan-weight 0.5")
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "LPIPS is off" in line]
    assert "--lpips-vgg FILE" in line and "https://" in line and str(tmp_path / "hub") in line
    assert "warning: --gan-start 50000 is not before the end" in out


def test_autoencoder_in_bf16_and_kl_falls(data, tmp_path):
    autoencode(f"--data {data} --out {tmp_path}/half --steps 2 --regularizer esm+kl --amp bf16")
    assert all(np.isfinite(line["loss"]) and line["skipped_steps"] == 0 for line in metrics(tmp_path / "half"))
    assert all(v.dtype == torch.float32 for v in checkpoint(tmp_path / "half")["model"].values())
    autoencode(f"--data {data} --out {tmp_path}/kl --steps 12 --regularizer kl --kl-weight 0.01 --lr 3e-3")
    kl = [line["kl"] for line in metrics(tmp_path / "kl")]
    assert kl[-1] < 0.7 * kl[0]


def test_a_run_goes_on_with_the_lpips_it_began_with(data, lpips_files, tmp_path, monkeypatch):
    files = f"--lpips-vgg {lpips_files[0]} --lpips-heads {lpips_files[1]}"
    flags = f"--data {data} --lpips-weight 0.5 --regularizer none"
    autoencode(f"{flags} {files} --out {tmp_path}/with --steps 1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file: open(f"{file}/no/network"))
    autoencode(f"{flags} --out {tmp_path}/without --steps 1")
    with pytest.raises(InputError, match="was begun with LPIPS; name its weights by --lpips-vgg"):
        autoencode(f"{flags} --out {tmp_path}/with --steps 2")
    monkeypatch.undo()
    autoencode(f"{flags} {files} --out {tmp_path}/without --steps 2")
    assert not any("lpips" in line for line in metrics(tmp_path / "without"))


def test_benchmark_of_autoencoders(data, tmp_path, capsys):
    autoencode(f"--data {data} --out {tmp_path}/none --benchmark 1")
    out = capsys.readouterr().out
    assert "images/s" in out and "GFLOP/s" in out and not (tmp_path / "none").exists()


# ---- latent diffusion and alignment: the real commands ----------------------------------------------------


@pytest.fixture(scope="module")
def latents(autoencoders, data, tmp_path_factory):
    """The latent cache of the shared images by the autoencoder trained with esm: 4 x 4 x 4."""
    file = tmp_path_factory.mktemp("latents") / "data.latents"
    looking(f"--encode {data} --ckpt {autoencoders}/esm --out {file}")
    return file


FIRST_CELL = [("dit-nano/1", "flow", "x0", ""), ("uvit-nano/1", "vp-sd", "eps", "--no-classes"),
              ("uvit-nano", "flow", "v", "--classes"), ("dit-nano/1", "vp", "x0", "")]  # fmt: skip


@pytest.mark.parametrize("model, path, predict, flags", FIRST_CELL)
def test_latent_diffusion_trains_and_samples(latents, data, tmp_path, capsys, model, path, predict, flags):
    run = tmp_path / "run"
    given = f"--latents {latents} --out {run} --model {model} --path {path} --predict {predict} --steps 60 --val {data} {flags}"
    without_size = f"{TINY.replace('--size 16 ', '')} {given}".split()
    train_diffusion.main(train_diffusion.make_parser().parse_args(without_size))
    losses = [line["loss"] for line in metrics(run)]
    state, cache = checkpoint(run), train_diffusion.Cache(latents)
    config = state["config"]
    assert config["scale"] == cache.header["scale"] and config["autoencoder"] == cache.header["autoencoder"]
    assert config["size"] == 16 and config["latent_shape"] == [4, 4, 4] and "--size" not in without_size
    assert config["classes"] == (None if "--no-classes" in flags else ["left", "right", "up"])
    (last,) = metrics(run, "val_loss")
    assert 0 < last["val_loss"] < 0.92 * np.mean(losses[:5]) and len(last["x0_error_by_band"]["0.5"]) == 16
    # the run is sampled through the decoder that it keeps
    sampling(f"{run} --n 4 --steps 3 --out {tmp_path}/out --score {data} --features hog")
    assert json.loads((tmp_path / "scores.jsonl").read_text())["autoencoder"] == config["autoencoder"]
    assert Image.open(tmp_path / "out" / "000003.png").size == (16, 16)
    sampling(f"{run} --trajectory --steps 4 --out {tmp_path}/t")
    table = json.loads((tmp_path / "t-trajectory.json").read_text())
    shares = np.array([row for row in table["share"] if row[0] is not None])
    bands = {int(16 * np.hypot(i, j) / np.hypot(3, 3)) for i in range(4) for j in range(4) if i + j}
    assert len(shares) == len(bands) and np.isfinite(shares).all()  # 4 x 4 latents have no others
    assert np.allclose(shares[:, -1], 1) and not np.allclose(shares[:, 0], 1, atol=0.05)
    assert "scale" in capsys.readouterr().out
    train(given)
    assert "finished" in capsys.readouterr().out


def test_stable_diffusion_schedule_trains_resumes_and_samples(latents, tmp_path):
    flags = f"--latents {latents} --model uvit-nano --path vp-sd --no-classes"
    for name, steps in (("whole", 4), ("halves", 2), ("halves", 4)):
        train(f"{flags} --predict eps --out {tmp_path}/{name} --steps {steps}")
    a, b = (checkpoint(tmp_path / name) for name in ("whole", "halves"))
    assert a["config"]["path"] == "vp-sd" and distance(a, b) == 0
    sampling(f"{tmp_path}/whole --n 2 --steps 2 --sampler ddim --out {tmp_path}/made")
    # every prediction learns and is sampled by every sampler
    config = a["config"] | dict(space="pixel", size=8, model="uvit-nano/4", classes=["a", "b"])
    x0, eps, t, y = photos(2, 8), torch.randn(2, 3, 8, 8), torch.tensor([0.2, 1.0]), torch.tensor([0, 1])
    for predict in sample.PREDICTIONS:
        diffusion = sample.Diffusion(config | {"predict": predict})
        loss, _ = train_diffusion.diffusion_loss(diffusion, diffusion.network, x0, eps, t, y)
        assert loss.shape == (2,) and loss.isfinite().all()
        for sampler in SAMPLERS["vp-sd"]:
            images = sample.generate(diffusion, [0, 1], 0, "cpu", y, sampler, 2, guidance=2.0)
            assert images.shape == x0.shape and images.isfinite().all()
    # in DCT space, SNR scaling is that of the vp path
    for path in ("vp", "vp-sd"):
        args = train_diffusion.make_parser().parse_args(f"--model uvit-s --size 64 --path {path}".split())
        train_diffusion.complete(args)
        assert args.snr_scale == 4


def test_one_pair_encodes_and_decodes(latents, autoencoders, data):
    """Cached moments, drawn anew, mirrored, against the autoencoder itself; and back."""
    cache = train_diffusion.Cache(latents)
    net, info = sample.load_autoencoder(autoencoders / "esm", "cpu")
    scale, shape = cache.header["scale"], [4, 4, 4]
    config = dict(space="latent", size=16, model="dit-nano", path="flow", snr_scale=1.0, predict="x0", classes=None,
                  label_dropout=0.1, latent_shape=shape, scale=scale, autoencoder=info["weights"])  # fmt: skip
    diffusion, x = sample.Diffusion(config, vae=net), load_all(data)
    where, flip = torch.arange(48), torch.arange(48) % 3 == 0
    turned = torch.where(flip[:, None, None, None], x.flip(-1), x)
    mean, logvar = (m.detach() for m in net.encode(turned / 127.5 - 1))
    for seed in (0, 1):
        noise = torch.randn(48, *shape, generator=torch.Generator().manual_seed(seed))
        oracle = scale * (mean + (0.5 * logvar).exp() * noise)
        cached, none = train_diffusion.clean(diffusion, None, cache.read(where, flip, torch.device("cpu")), flip, noise)
        live, images = train_diffusion.clean(diffusion, x, None, flip, noise)
        assert none is None and torch.equal(images, turned / 127.5 - 1) and not live.requires_grad
        assert torch.allclose(live, oracle, atol=1e-5) and (cached - oracle).abs().max() < 0.01
    assert torch.allclose(diffusion.encode(images), scale * mean, atol=1e-5)  # without noise, the mean
    assert 0.8 < live.std() < 1.2  # that is what the scale is for
    assert torch.allclose(diffusion.decode(scale * mean), net.decode(mean).clamp(-1, 1), atol=1e-5)
    args = train_diffusion.make_parser().parse_args("--batch 8 --t-sampling uniform".split())
    draws = [train_diffusion.draw_step(args, step, slice(0, 8), diffusion, "cpu") for step in (0, 1, 1)]
    assert distance(draws[1], draws[2]) == 0 and distance(draws[0][3], draws[1][3]) > 0.5  # posterior noise, by step
    assert distance(draws[0][1], draws[0][3]) > 0.5  # which is not the diffusion's
    flips = train_diffusion.draw_flips(args, 0, slice(0, 8))
    assert flips.any() and not flips.all()


def test_encoding_at_every_step_equals_the_cache(latents, autoencoders, data, tmp_path):
    flags = "--model dit-nano/1 --predict eps --steps 4"
    info = sample.load_autoencoder(autoencoders / "esm", "cpu")[1]
    shutil.copy(latents, tmp_path / "same.latents")
    train_diffusion.Cache(tmp_path / "same.latents", "r+").finish(scale=info["latent"]["scale"])
    train(f"--latents {tmp_path}/same.latents --out {tmp_path}/cached {flags}")
    train(f"--vae {autoencoders}/esm --out {tmp_path}/live {flags}")  # its own data by default
    cached, live = (np.array([[l["loss"], l["grad_norm"]] for l in metrics(tmp_path / run)]) for run in ("cached", "live"))
    np.testing.assert_allclose(cached, live, rtol=5e-3)
    info = sample.load_autoencoder(autoencoders / "esm", "cpu")[1]
    config = checkpoint(tmp_path / "live")["config"]
    assert config["scale"] == info["latent"]["scale"] and config["autoencoder"] == info["weights"]
    ratio = config["scale"] / train_diffusion.Cache(latents).header["scale"]  # of 256 posteriors, here of the same 48
    assert abs(ratio - 1) < 0.05


def test_published_autoencoder_weights_are_diffused_on(data, tmp_path):
    """Weights in SD-VAE's layout, another shape (f2, 8 channels), and no scale: it is measured on the data."""
    net = vae.VAE((32, 32), 8, 1)
    torch.save({"state_dict": {f"first_stage_model.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "sd.ckpt")
    train(f"--vae {tmp_path}/sd.ckpt --data {data} --out {tmp_path}/run --model dit-nano --steps 2")
    mean, logvar = net.encode(load_all(data) / 127.5 - 1)
    std = ((mean.square() + logvar.exp()).mean() - mean.mean() ** 2).sqrt().item()
    config = checkpoint(tmp_path / "run")["config"]
    assert abs(config["scale"] * std - 1) < 1e-3 and config["latent_shape"] == [8, 8, 8]
    (tmp_path / "sd.ckpt").unlink()
    sampling(f"{tmp_path}/run --n 2 --steps 2 --out {tmp_path}/out")
    train(f"--vae {tmp_path}/sd.ckpt --data {data} --out {tmp_path}/run --model dit-nano --steps 3")  # its own copy serves


def test_mismatches_between_latents_autoencoder_and_run(latents, autoencoders, trained, data, tmp_path, capsys):
    flags = "--model dit-nano/1 --steps 2"
    run = tmp_path / "run"
    train(f"--latents {latents} --out {run} {flags}")
    other = tmp_path / "other.latents"
    looking(f"--encode {data} --ckpt {autoencoders}/dsm --out {other}")
    cut = tmp_path / "cut.latents"
    cut.write_bytes(latents.read_bytes()[:-4096])
    (tmp_path / "text").write_text("no cache")
    more = write_photos(tmp_path / "more", 50, classes=["left", "right", "up"])
    half = tmp_path / "half.latents"
    shutil.copy(latents, half)
    train_diffusion.Cache(half, "r+").finish(scale=None)
    ours, theirs = (sample.load_autoencoder(autoencoders / name, "cpu")[1]["weights"] for name in ("esm", "dsm"))
    before = (run / "checkpoint.pt").read_bytes()
    for line, message in [
        (f"--latents {other} --out {run} {flags}", f"{other}: made by autoencoder {theirs}, .*{ours}"),  # though it is finished
        (f"--latents {other} --out {run} {flags} --steps 4", f"{other}: made by autoencoder {theirs}, .*{ours}"),
        (f"--latents {latents} --vae {autoencoders}/dsm --out {tmp_path}/n {flags}", f"{theirs}.* made the latents of .*{ours}"),
        (f"--vae {autoencoders}/dsm --data {data} --out {run} {flags} --steps 4", f"dsm: another autoencoder .{theirs}"),
        (f"--latents {tmp_path}/absent --out {tmp_path}/n {flags}", "absent: no such file"),
        (f"--latents {tmp_path}/text --out {tmp_path}/n {flags}", "text: no latent cache"),
        (f"--latents {cut} --out {tmp_path}/n {flags}", "cut off"),
        (f"--latents {latents} --space dct --out {tmp_path}/n {flags}", "--space dct"),
        (f"--latents {latents} --size 32 --out {tmp_path}/n {flags}", "--size 32: .* of 16 pixels"),
        (f"--latents {latents} --block 4 --out {tmp_path}/n {flags}", "--block: only for"),
        (f"--space latent --out {tmp_path}/n {flags}", "--space latent: needs --latents"),
        (f"--vae {autoencoders}/esm --size 18 --data {data} --out {tmp_path}/n {flags}", "--size 18: .*multiples of 4"),
        (f"--vae {trained} --data {data} --out {tmp_path}/n {flags}", "a checkpoint of train_diffusion.py"),
        (f"--latents {latents} --model dit-nano/3 --out {tmp_path}/n --steps 2", "patch 3 does not divide"),
        (f"--latents {latents} --repa dog --encoder hog --data {more} --out {tmp_path}/n {flags}", "count 48, now 50"),
        (f"--latents {half} --out {tmp_path}/n {flags}", "half.latents: unfinished"),
        (f"--latents {latents} --data {more} --out {tmp_path}/n {flags}", "made of other images .*count 48, now 50"),
        (f"--latents {latents} --val {tmp_path}/nowhere --out {tmp_path}/n {flags}", "nowhere: does not exist"),
        (f"--latents {latents} --val {write_photos(tmp_path / 'bare', 4)} --out {tmp_path}/n {flags}", "--val .*classes"),
    ]:
        with pytest.raises(InputError, match=message):
            train(line)
    assert (run / "checkpoint.pt").read_bytes() == before
    for line, message in [
        (f"{run} --vae {autoencoders}/dsm", f"{theirs}.*{run} .{ours}"),
        (f"{trained} --vae {autoencoders}/dsm", "--vae .*works on dct"),
        (f"{run} --model dit-nano", "--model dit-nano: is for --ckpt"),
        (f"{run} --ckpt {run}", "name a run folder"),
    ]:
        with pytest.raises(InputError, match=message):
            sampling(f"{line} --n 1 --out {tmp_path}/out")
    shutil.copy(run / "checkpoint.pt", tmp_path / "alone.pt")
    with pytest.raises(InputError, match="autoencoder.pt: no such autoencoder; --vae"):
        sampling(f"{tmp_path}/alone.pt --n 1 --out {tmp_path}/out")
    sampling(f"{tmp_path}/alone.pt --vae {autoencoders}/esm --n 1 --steps 1 --out {tmp_path}/out")
    # a moved autoencoder: the header says where it was, the flag where it is
    moved = tmp_path / "moved.latents"
    shutil.copy(latents, moved)
    train_diffusion.Cache(moved, "r+").finish(vae="gone/away")
    with pytest.raises(InputError, match="gone/away: no such autoencoder; --vae"):
        train(f"--latents {moved} --out {tmp_path}/n {flags}")
    train(f"--latents {moved} --vae {autoencoders}/esm --out {tmp_path}/m {flags}")


@pytest.mark.parametrize("method, space", [("repa", "latent"), ("irepa", "latent"), ("dog", "latent"), ("dog", "dct")])
def test_alignment_lowers_both_losses_and_sampling_needs_no_projector(latents, data, hub, tmp_path, method, space):
    run = tmp_path / "run"
    given = f"--latents {latents} --model uvit-nano/1" if space == "latent" else f"--data {data} --block 2"
    train(f"{given} --out {run} --steps 60 --repa {method} --encoder {hub}:colours" + " --repa-width 32" * (method == "repa"))
    first, last = (
        {key: np.mean([line[key] for line in part]) for key in ("loss", "alignment")}
        for part in (metrics(run)[:3], metrics(run)[-5:])
    )
    assert last["loss"] < 0.9 * first["loss"] and last["alignment"] < first["alignment"] - 0.1
    state = checkpoint(run)
    assert state["projector"] and state["target_dim"] == 8 and not any("projector" in k for k in state["model"])
    sampling(f"{run} --n 3 --steps 3 --out {tmp_path}/with")
    state = {key: value for key, value in state.items() if key not in ("projector", "target_dim")}
    torch.save(state, run / "checkpoint.pt")
    sampling(f"{run} --n 3 --steps 3 --out {tmp_path}/without")
    assert_same_images(tmp_path / "with", tmp_path / "without", 3, tolerance=0)


def test_weight_of_the_alignment_follows_the_method():
    for flags, weight in (("repa", 0.5), ("irepa", 1.0), ("dog", 1.0), ("irepa --repa-weight 0.25", 0.25)):
        args = train_diffusion.make_parser().parse_args(f"--encoder hog --repa {flags}".split())
        train_diffusion.complete(args)
        assert args.repa_weight == weight


def test_alignment_changes_nothing_else_and_weight_zero_is_none(data, hub, tmp_path):
    """The network starts the same with and without it; with weight 0 and the clipping off its weights end the same."""
    flags = f"--data {data} --steps 5 --clip 0"
    train(f"{flags} --out {tmp_path}/none")
    train(f"{flags} --out {tmp_path}/zero --repa dog --encoder {hub}:colours --repa-weight 0")
    train(f"{flags} --out {tmp_path}/some --repa dog --encoder {hub}:colours")
    none, zero, some = (checkpoint(tmp_path / run)["model"] for run in ("none", "zero", "some"))
    assert distance(none, zero) == 0 < distance(none, some)


@pytest.fixture
def encoder_calls(monkeypatch):
    calls, real = [], repa.Encoder.forward
    monkeypatch.setattr(repa.Encoder, "forward", lambda self, x: (calls.append(len(x)), real(self, x))[1])
    return calls


@pytest.mark.parametrize("space, stopping", [("dct", [(4, 8)]), ("latent", [(3, 6, 8)])])
def test_no_encoder_runs_after_the_stop_and_a_resumed_run_equals_an_uninterrupted_one(
    latents, data, hub, tmp_path, encoder_calls, space, stopping):  # fmt: skip
    given = f"--data {data} --block 2" if space == "dct" else f"--latents {latents} --model dit-nano/1"
    flags = f"{given} --repa irepa --encoder {hub}:colours --repa-stop 4 --save-every 2"
    train(f"{flags} --out {tmp_path}/whole --steps 8")
    assert encoder_calls == [1] + [8] * 4  # a look at its tokens, and four steps
    lines = metrics(tmp_path / "whole")
    assert [("alignment" in line) for line in lines] == [True] * 4 + [False] * 4
    for stops in stopping:
        encoder_calls.clear()
        run = tmp_path / "-".join(map(str, stops))
        for steps in stops:
            train(f"{flags} --out {run} --steps {steps}")
        assert distance(checkpoint(tmp_path / "whole"), checkpoint(run)) == 0
        assert sum(encoder_calls) == 8 * 4 + sum(stop < 4 for stop in stops) + 1
    encoder_calls.clear()
    train(f"--data {data} --out {tmp_path}/off --steps 2")
    assert not encoder_calls


def test_runs_from_before_alignment_existed_go_on(data, tmp_path):
    flags = f"--data {data} --out {tmp_path}/run"
    train(f"{flags} --steps 2")
    state = checkpoint(tmp_path / "run")
    new = ("repa", "encoder", "repa_depth", "repa_weight", "repa_stop", "repa_sigmas", "repa_width")
    state["args"] = {key: value for key, value in state["args"].items() if key not in new}
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    train(f"{flags} --steps 4")
    assert checkpoint(tmp_path / "run")["step"] == 4


def test_token_cache_is_made_once_by_commands_side_by_side_and_goes_on(data, hub, tmp_path, monkeypatch):
    """A second command makes the file while the first is at it; one is interrupted, with the file in its run folder."""
    flags, real, calls = f"--data {data} --block 2 --steps 1 --repa dog --encoder {hub}:colours", repa.Encoder.forward, []

    def forward(self, x):
        calls.append(len(x))
        if len(calls) == 3:
            with torch.enable_grad():
                train(f"{flags} --cache-targets {tmp_path}/both.tokens --out {tmp_path}/second")
        return real(self, x)

    monkeypatch.setattr(repa.Encoder, "forward", forward)
    train(f"{flags} --cache-targets {tmp_path}/both.tokens --out {tmp_path}/first")
    assert distance(checkpoint(tmp_path / "first"), checkpoint(tmp_path / "second")) == 0

    def interrupted(self, x):
        calls.append(len(x))
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, x)

    calls.clear()
    monkeypatch.setattr(repa.Encoder, "forward", interrupted)
    within = f"{flags} --cache-targets {tmp_path}/run/own.tokens --out {tmp_path}/run"
    with pytest.raises(KeyboardInterrupt):
        train(within)
    assert (tmp_path / "run" / "own.tokens.part").exists()
    calls.clear()
    monkeypatch.setattr(repa.Encoder, "forward", lambda self, x: (calls.append(len(x)), real(self, x))[1])
    train(within)
    assert sum(calls) == 1 + 2 * (48 - 32)  # the first batch was there
    assert distance(checkpoint(tmp_path / "run")["model"], checkpoint(tmp_path / "first")["model"]) == 0


def test_cached_targets_equal_live_ones_and_need_no_images(latents, data, hub, tmp_path, capsys, encoder_calls):
    flags = f"--model dit-nano/1 --steps 4 --repa dog --repa-sigmas 0.6 2 --encoder {hub}:colours --lr 1e-5"
    here = tmp_path / "images"
    shutil.copytree(data, here)
    file = tmp_path / "c.latents"
    shutil.copy(latents, file)
    train_diffusion.Cache(file, "r+").finish(data=str(here))
    train(f"--latents {file} --out {tmp_path}/live {flags}")
    cached = f"--latents {file} --cache-targets {tmp_path}/t.tokens {flags}"
    capsys.readouterr()
    train(f"{cached} --out {tmp_path}/cached")
    out = capsys.readouterr().out
    assert "48 images and mirror images, 16 x 8 float16 each: 0.0 MiB" in out
    live, kept = ([(line["loss"], line["alignment"]) for line in metrics(tmp_path / run)] for run in ("live", "cached"))
    assert np.allclose(live, kept, rtol=2e-3, atol=2e-3)
    cache = train_diffusion.Cache(tmp_path / "t.tokens", kind="tokens")
    for side, view in enumerate((load_all(data), load_all(data).flip(-1))):
        tokens, _ = repa.load_encoder(f"{hub}:colours")(view / 127.5 - 1)
        np.testing.assert_allclose(cache.values[:, side], repa.resize_tokens(tokens, 4).numpy(), atol=2e-3)
    moved = here.rename(tmp_path / "moved")  # the images elsewhere: the run that reads them goes on, told where
    with pytest.raises(InputError, match="--data says where"):
        train(f"--latents {file} --out {tmp_path}/live {flags.replace('--steps 4', '--steps 5')}")
    train(f"--latents {file} --data {moved} --out {tmp_path}/live {flags.replace('--steps 4', '--steps 5')}")
    shutil.rmtree(moved)
    encoder_calls.clear()
    train(f"{cached.replace(f'--encoder {hub}:colours', '')} --out {tmp_path}/again")  # the file says whose tokens they are
    assert distance(checkpoint(tmp_path / "again"), checkpoint(tmp_path / "cached")) == 0 and not encoder_calls
    for line, message in [
        (f"--latents {file} --out {tmp_path}/n {flags}", f"{here}: does not exist.*--latents {file} was made of.*--cache"),
        (f"{cached} --encoder hog --out {tmp_path}/n", "tokens of .*colours, not of --encoder hog"),
        (f"{cached} --model dit-nano --out {tmp_path}/n", "4 x 4 tokens, dit-nano has 2 x 2"),
        (f"{cached.replace('t.tokens', 'c.latents')} --out {tmp_path}/n", "no token cache"),
        (f"--latents {file} --cache-targets {tmp_path}/t --out {tmp_path}/n", "--cache-targets: means nothing with no --repa"),
    ]:
        with pytest.raises(InputError, match=message):
            train(line)
    few = write_photos(tmp_path / "few", 8)
    with pytest.raises(InputError, match="made of other images .*count 48, now 8"):
        pixels = flags.replace("dit-nano/1", "dit-nano/4")
        train(f"--data {few} --space pixel {pixels} --cache-targets {tmp_path}/t.tokens --out {tmp_path}/n")


FETCHED_ONCE = """
import os, time
def colours():
    if not os.path.exists({weights!r}):  # a download that takes its time
        time.sleep(1)
        with open({weights!r}, "a") as file:
            file.write(os.environ.get("LOCAL_RANK", "none") + " ")
    from test_all import Colours
    return Colours()
"""


def test_aligned_latent_diffusion_on_two_processes_equals_one(latents, hub, tmp_path):
    """Across the step where the alignment stops, the targets being cached by both; local rank 0 fetches the encoder."""
    (tmp_path / "hubconf.py").write_text(HUB.format(str(HERE)) + FETCHED_ONCE.format(weights=str(tmp_path / "weights")))
    flags = f"--latents {latents} --model dit-nano/1 --steps 4 --lr 1e-5 --repa dog --repa-stop 2"
    two = f"{TINY} {flags} --encoder {tmp_path}:colours --out {tmp_path}/two --cache-targets {tmp_path}/two.tokens"
    command(f"train_diffusion.py {two}", processes=2)
    assert (tmp_path / "weights").read_text() == "0 "
    train(f"{flags} --encoder {hub}:colours --out {tmp_path}/one --cache-targets {tmp_path}/one.tokens --grad-accum 2")
    one, two = (metrics(tmp_path / run) for run in ("one", "two"))
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and abs(a["loss"] - b["loss"]) < 1e-4 and abs(a["grad_norm"] / b["grad_norm"] - 1) < 1e-3
        assert abs(a.get("alignment", 0) - b.get("alignment", 0)) < 1e-5
    values = [train_diffusion.Cache(tmp_path / f"{n}.tokens", kind="tokens").values for n in ("one", "two")]
    assert np.abs(values[0].astype(float) - values[1]).max() < 2e-3


def test_bad_input_of_alignment(latents, data, hub, tmp_path):
    (tmp_path / "hubconf.py").write_text(HUBCONF + """
class Strip(torch.nn.Module):
    def forward_features(self, x):
        return {"x_norm_patchtokens": torch.zeros(len(x), 6, 2)}
class Summary(torch.nn.Module):
    def forward_features(self, x):
        return {"x_norm_clstoken": x.mean((2, 3))}
def fetching():
    torch.hub.load_state_dict_from_url("http://127.0.0.1:9/weights.pth", progress=False)
def strip():
    return Strip()
def summary():
    return Summary()
""")  # fmt: skip
    flags = f"--data {data} --steps 2 --out {tmp_path}/n"
    for line, message in [
        (f"--repa dog --encoder {tmp_path}:summary", "--encoder .*summary on images of 16 px: .*no patch tokens"),
        (f"--repa dog --encoder {tmp_path}:strip", "--encoder .*strip on .*: 6 tokens form no square"),
        (f"--repa dog --encoder {tmp_path}:broken", "--encoder .*no forward_features"),
        ("--repa dog --encoder nonsense", "--encoder 'nonsense' is neither hog nor"),
        ("--repa dog --encoder hog --repa-depth 7", "--repa-depth 7: dit-nano has blocks 1 to 6"),
        ("--repa dog --encoder hog --repa-depth 0", "--repa-depth 0"),
        ("--repa dog --encoder hog --repa-depth 8 --model uvit-nano", "--repa-depth 8: uvit-nano has blocks 1 to 7"),
        ("--repa dog --encoder hog --repa-sigmas 2 1", "--repa-sigmas 2 1: the first must be the smaller"),
        ("--repa dog --encoder hog --repa-stop 0", "--repa-stop 0"),
        ("--repa dog --encoder hog --repa-weight -1", "--repa-weight -1"),
        ("--repa dog --encoder hog --repa-width 64", "--repa-width: means nothing with --repa dog"),
        ("--encoder hog", "--encoder: means nothing with no --repa"),
        ("--repa-stop 5", "--repa-stop: means nothing with no --repa"),
        ("--repa irepa --encoder hog --repa-sigmas 0 1", "--repa-sigmas: means nothing with --repa irepa"),
        ("--rmsc --encoder hog --repa-stop 5", "--repa-stop: means nothing with --rmsc alone"),
        (f"--repa dog --encoder {tmp_path}:fetching", "--encoder .*fetching: .*127.0.0.1:9/weights.pth could not be fetched"),
    ]:
        with pytest.raises(InputError, match=message):
            train(f"{flags} {line}")
    assert not (tmp_path / "n" / "checkpoint.pt").exists()


def test_targets_are_compared_before_training(latents, data, hub, tmp_path, capsys):
    train(f"--latents {latents} --model dit-nano/1 --encoder {hub}:colours --rmsc --repa-sigmas 0.5 1.5 --out {tmp_path}/run")
    out = capsys.readouterr().out
    tokens = repa.resize_tokens(repa.load_encoder(f"{hub}:colours")(load_all(data) / 127.5 - 1)[0], 4)
    known = {"raw (repa)": tokens, "irepa": repa.irepa_target(tokens), "dog 0.5 1.5": repa.dog_target(tokens, 0.5, 1.5)}
    for name, target in known.items():
        words = next(line for line in out.splitlines() if line.startswith(name))[len(name) :].split()
        field = repa.as_map(target)
        oracle = [repa.lds(field).mean(), spectral_losses.rmsc(field).mean()]
        oracle += spectral_losses.directional_energy(field, 2).mean(0).tolist()
        np.testing.assert_allclose([float(word) for word in words], [float(value) for value in oracle], atol=6e-4)
    assert "48 images" in out and "4 x 4 tokens of 8" in out
    assert Image.open(tmp_path / "run-targets.png").size == (8 * 18 + 2, 9 * 18 + 2) and not (tmp_path / "run").exists()
    train(f"--data {data} --encoder hog --rmsc --out {tmp_path}/pixels")  # without a latent anywhere
    assert "2 x 2 tokens of 36" in capsys.readouterr().out


def test_benchmark_of_aligned_latent_diffusion(latents, hub, tmp_path, capsys):
    train(f"--latents {latents} --benchmark 1 --repa repa --encoder {hub}:colours --out {tmp_path}/none")
    out = capsys.readouterr().out
    assert "targets" in out and "images/s" in out and not (tmp_path / "none").exists()


# ---- published networks -----------------------------------------------------------------------------------


def published(folder, autoencoders):
    """Checkpoints in the published layouts, of small sizes: file, flags, and the network as published."""
    state = checkpoint(autoencoders / "esm")["model"]
    torch.save({"state_dict": state | {"loss.logvar": torch.zeros(())}}, folder / "sd-vae.ckpt")
    nano = DIT_SIZES["nano"]
    dit = randomised(DiT(8, 2, 4, num_classes=10, **nano), 1).float().eval()
    pixels = randomised(UViT(16, 4, 3, num_classes=11, **UVIT_SIZES["nano"]), 2).float().eval()
    bare = randomised(UViT(8, 2, 4, num_classes=-1, conv=False, mlp_time_embed=True, **UVIT_SIZES["nano"]), 3).float().eval()
    torch.save(dit.state_dict(), folder / "DiT.pt")
    ema = {f"module.{k}": v for k, v in dit.state_dict().items()}
    torch.save({"model": {}, "ema": ema, "args": argparse.Namespace(lr=1)}, folder / "SiT.pt")
    extra = {"projectors.0.0.weight": torch.zeros(2)}
    torch.save({"ema": {f"_orig_mod.module.{k}": v for k, v in (dit.state_dict() | extra).items()}}, folder / "REPA.pt")
    plain = randomised(DiT(8, 2, 4, num_classes=10, learn_sigma=False, **nano), 4).float().eval()
    torch.save(plain.state_dict(), folder / "bare-REPA.pt")
    torch.save({f"module._orig_mod.{k}": v for k, v in pixels.state_dict().items()}, folder / "cifar-uvit.pth")
    torch.save(bare.half().state_dict(), folder / "uvit.pth")
    return {"DiT": (dit, "dit-nano/2", 999), "SiT": (dit, "sit-nano", 1), "REPA": (dit, "sit-nano/2", 1),
            "bare-REPA": (plain, "sit-nano/2", 1),
            "cifar-uvit": (pixels, "uvit-nano", 999), "uvit": (bare.float(), "uvit-nano/2", 999)}  # fmt: skip


def test_published_networks_are_sampled_from_their_checkpoints(autoencoders, trained, tmp_path, capsys):
    known = published(tmp_path, autoencoders)
    g = torch.Generator().manual_seed(0)
    vae_parts = sample.load_autoencoder(tmp_path / "sd-vae.ckpt", "cpu")
    for name, (network, model, scale) in known.items():
        file = next(tmp_path.glob(f"{name}.p*"))
        with_vae = None if name == "cifar-uvit" else vae_parts
        config, weights = sample.published_network(file, model, with_vae)
        diffusion = sample.Diffusion(config, vae=with_vae and with_vae[0])
        sample.load_weights(diffusion.network, weights, file)
        diffusion.network.eval()
        x, t = torch.randn(2, *diffusion.shape, generator=g), torch.tensor([0.3, 0.9])
        y = torch.tensor([3, 7]) if config["classes"] else None
        ours = diffusion.output(diffusion.network, x, t, y)
        if name == "SiT":  # noise at t = 0, data at 1, and the velocity from noise to data: arXiv 2401.08740's release
            oracle = -network(x, 1 - t, y)[:, :4]
        else:
            oracle = network(x, scale * t, y)[:, : diffusion.shape[0]]
        assert torch.allclose(ours, oracle, atol=1e-4 if name != "uvit" else 1e-3), name
        assert config["path"] == {"DiT": "vp", "cifar-uvit": "vp", "uvit": "vp-sd"}.get(name, "flow")
        assert config["size"] == (16 if name == "cifar-uvit" else 32) and (config["classes"] is None) == (name == "uvit")
        given = "" if name == "cifar-uvit" else f"--vae {tmp_path}/sd-vae.ckpt"
        classes = "" if name == "uvit" else "--classes 3 7 --guidance 2"
        sampling(f"--ckpt {file} --model {model} {given} {classes} --n 2 --steps 2 --out {tmp_path}/{name}-out")
        assert Image.open(tmp_path / f"{name}-out" / "000001.png").size == (config["size"],) * 2
        protocol = json.loads((tmp_path / f"{name}-out" / "protocol.json").read_text())
        assert protocol["classes"] == (None if name == "uvit" else [3, 7])
    if with_vae:
        assert config["scale"] == 0.18215 and config["autoencoder"] == vae_parts[1]["weights"]
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save({"x_embedder.proj.weight": torch.zeros(8, 4, 2, 2)}, tmp_path / "less.pt")
    given = f"--vae {tmp_path}/sd-vae.ckpt"
    for line, message in [
        (f"--ckpt {tmp_path}/DiT.pt {given}", "--model NAME says which"),
        (f"--ckpt {tmp_path}/DiT.pt --model dit-nano/2", "--vae FILE names the SD-VAE"),
        (f"--ckpt {tmp_path}/DiT.pt --model dit-nano/4 {given}", "--model dit-nano/4: .*patches of 2"),
        (f"--ckpt {tmp_path}/DiT.pt --model uvit-nano {given}", "its keys are a dit or sit's"),
        (f"--ckpt {tmp_path}/DiT.pt --model dit-s/2 {given}", "another architecture"),
        (f"--ckpt {tmp_path}/DiT.pt --model dit-huge {given}", "--model dit-huge"),
        (f"--ckpt {tmp_path}/uvit.pth --model sit-nano {given}", "its keys are a uvit's"),
        (f"--ckpt {tmp_path}/cifar-uvit.pth --model uvit-nano {given}", "is a model of pixels"),
        (f"--ckpt {tmp_path}/uvit.pth --model uvit-nano {given} --guidance 2", "without classes"),
        (f"--ckpt {tmp_path}/other.pt --model dit-nano {given}", "no DiT's, SiT's or U-ViT's"),
        (f"--ckpt {tmp_path}/less.pt --model dit-nano {given}", "is no whole dit's .*final_layer"),
        (f"--ckpt {trained}/checkpoint.pt --model dit-nano", "a checkpoint of train_diffusion.py; give it without --ckpt"),
        (f"--ckpt {tmp_path}/absent.pt --model dit-nano {given}", "absent.pt: no such file"),
        (f"{tmp_path}/DiT.pt", "published weights .* take sample.py --ckpt"),
        ("", "name a run folder"),
    ]:
        with pytest.raises(InputError, match=message):
            sampling(f"{line} --n 1 --out {tmp_path}/none")


class GaussianSiT(DiT):
    """The velocity of SiT's release for data N(mean, std^2), in closed form: x_t = t x_1 + (1 - t) x_0, x_1 the data."""

    def forward(self, x, t, y=None, drop=None):
        t = t.view(-1, 1, 1, 1)
        innovation = (x - t * 0.7) / (t**2 * 0.3**2 + (1 - t) ** 2)
        return 0.7 + t * 0.3**2 * innovation - (1 - t) * innovation  # E[x_1 - x_0 | x_t]


def test_time_of_published_sits_runs_from_noise_to_data():
    config = dict(space="pixel", size=8, model="dit-nano/8", path="flow", predict="v", snr_scale=1.0, classes=None,
                  label_dropout=0.0, reversed=True)  # fmt: skip
    diffusion = sample.Diffusion(config, GaussianSiT(8, 8, 3, 16, 1, 1, num_classes=0))
    for sampler in ("euler", "heun", "sde"):
        made = sample.generate(diffusion, range(64), 0, "cpu", sampler=sampler, steps=60)
        assert abs(made.median() - 0.7) < 0.03 and abs((made < 0.4).float().mean() - 0.159) < 0.02  # one std below


def test_published_sizes_fit(tmp_path):
    """The largest of each family, whole tables of keys and shapes, without their memory."""
    for name, network, extra in (
        ("dit-xl/2", lambda: DiT(32, 2, 4, num_classes=1000, **DIT_SIZES["xl"]), {}),
        ("sit-xl/2", lambda: DiT(32, 2, 4, num_classes=1000, learn_sigma=False, **DIT_SIZES["xl"]), {"projectors.0.0.bias": 1}),
        ("uvit-h/2", lambda: UViT(32, 2, 4, num_classes=1001, conv=False, **UVIT_SIZES["h"]), {}),
    ):
        with torch.device("meta"):
            shapes = {key: value.shape for key, value in network().state_dict().items()}
        state = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}
        torch.save(state | extra, tmp_path / "big.pt")
        with torch.device("meta"):
            sd_vae = vae.VAE(**vae.PRESETS["f8d4"])
        config, weights = sample.published_network(tmp_path / "big.pt", name, (sd_vae, {"weights": "known"}))
        assert config["size"] == 256 and len(config["classes"]) == 1000 and config["latent_shape"] == [4, 32, 32]
        with torch.device("meta"):
            ours = sample.build_network(config).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in weights.items()}


def test_stable_diffusion_schedule():
    """Against the product over its thousand discrete steps, and its own derivatives."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    path, steps = StableDiffusionVP(), torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(path.log_abar(steps), torch.log1p(-betas).cumsum(0), rtol=0.02)
    assert torch.allclose(path.t_of_lambda(path.log_snr_half(T)), T, rtol=1e-9)
    t = T.clone().requires_grad_()
    slope = torch.autograd.grad(path.log_abar(t).sum(), t)[0]
    assert torch.allclose(path.beta(T), -slope, rtol=1e-9)


def documented(pattern=""):
    """The commands of README.md and of the programs' first lines -> [(program, its arguments, the line's flags)]"""
    programs = {"train_diffusion": train_diffusion, "train_vae": train_vae, "sample": sample}
    text = "".join([(HERE / "README.md").read_text(), *(program.__doc__ for program in programs.values())])
    text = text.replace("\\\n", " ")
    command = r"(?:python|torchrun --nproc_per_node=\d+) (train_diffusion|train_vae|sample)\.py *([^\n`#;&)]*)"
    lines = re.findall(command, text)
    assert len(lines) > 20 and {program for program, _ in lines} == set(programs)
    return [(programs[program], programs[program].make_parser().parse_args(flags.split()), flags)
            for program, flags in lines if re.search(pattern, flags)]  # fmt: skip


def test_documented_commands_are_understood():
    """Every command line of README.md and of the programs' first lines parses, and its settings fit together."""
    for program, args, flags in documented():
        if program != sample and "--eval-only" not in flags and not re.search("--(spectrum|encode) ", flags):
            program.complete(args)


def test_published_settings_are_what_the_documented_commands_do():
    """The authors' tables, row by row: block, keep, c, network, learning rate, batch, label dropout of DCTdiff ..."""
    known = {
        ("cifar10", 32): (2, 4, 2, "uvit-m", 2e-4, 256), ("celeba.zip", 64): (2, 4, 4, "uvit-s", 2e-4, 256),
        ("imagenet/train", 64): (2, 4, 4, "uvit-m", 3e-4, 1024), ("ffhq.zip", 128): (4, 9, 4, "uvit-s", 2e-4, 256),
        ("ffhq.zip", 256): (4, 8, 4, "uvit-m", 2e-4, 256), ("ffhq.zip", 512): (8, 18, 12, "uvit-m", 1e-4, 128),
        ("afhq.zip", 512): (8, 18, 12, "uvit-m", 1e-4, 128),
    }  # fmt: skip
    common = ("betas", "weight_decay", "warmup", "lr_decay", "ema")
    adamw = [[0.99, 0.99], 0.03, 5000, "none", 0.9999]
    for _, args, flags in documented(r"--model uvit-[sm]( |$)"):
        if (args.data, args.size) not in known:
            continue
        train_diffusion.complete(args)
        found = args.block, args.keep, args.snr_scale, args.model, args.lr, args.batch
        assert found == known.pop((args.data, args.size))
        assert args.clip == 0 and [getattr(args, name) for name in common] == adamw
        assert (args.space, args.path, args.predict, args.t_sampling, args.ebfr) == ("dct", "vp", "eps", "uniform", True)
        assert args.classes is False or (args.data, args.label_dropout) == ("imagenet/train", 0)
    assert not known
    # ... of U-ViT on latents, and of REPA's SiT
    ((_, args, _),) = documented("--latents celeba-hq.latents")
    train_diffusion.complete(args)
    assert [getattr(args, name) for name in common] == adamw and (args.lr, args.batch, args.clip) == (2e-4, 256, 0)
    assert (args.path, args.predict, args.t_sampling, args.classes) == ("vp-sd", "eps", "uniform", False)
    ((_, args, _),) = documented("--latents imagenet.latents .*--repa repa")
    train_diffusion.complete(args)
    assert (args.path, args.predict, args.lr, args.batch, args.clip) == ("flow", "v", 1e-4, 256, 1)
    assert (args.warmup, args.weight_decay, args.repa_weight, args.repa_depth) == (0, 0, 0.5, 8)
    # ... and of the autoencoders: set, regularizer, batch, steps
    found = set()
    for _, args, _ in documented("--data (celeba-hq.zip|imagenet/train) .*--regularizer"):
        train_vae.complete(args)
        found.add((args.data, args.regularizer, args.batch, args.steps))
        assert (args.lr, args.weight_decay, args.warmup, args.clip) == (5e-5, 0.005, 2000, 1)
        assert (args.size, args.lpips_weight, args.gan_weight, args.gan_start) == (256, 0.5, 0.5, 50_000)
        assert (args.esm_weight, args.esm_delta) == (0.01, 1.0)
    assert found == {("celeba-hq.zip", "esm", 48, 500_000), ("imagenet/train", "esm", 128, 600_000),
                     ("imagenet/train", "dsm", 128, 1_000_000)}  # fmt: skip


@pytest.mark.skipif(not shutil.which("g++"), reason="--compile needs a C++ compiler")
def test_compiled_runs_equal_plain_ones(compiled_runs, monkeypatch):
    process, folder = compiled_runs
    monkeypatch.setitem(DIT_SIZES, "nano", dict(hidden_size=32, depth=1, num_heads=2))
    monkeypatch.setitem(vae.PRESETS, "tiny", dict(widths=(32,), latent_channels=4, num_res_blocks=1))
    for program, flags in zip((train_diffusion, train_vae), small_runs(folder, "plain")):
        program.main(program.make_parser().parse_args(flags.split()))
    assert process.wait() == 0, (folder / "log").read_text()[-2000:]
    for name in ("diffusion", "vae"):
        plain, compiled = (metrics(folder / f"{kind}-{name}") for kind in ("plain", "compiled"))
        np.testing.assert_allclose([l["loss"] for l in compiled], [l["loss"] for l in plain], rtol=1e-3)
        a, b = (checkpoint(folder / f"{kind}-{name}")["model"] for kind in ("plain", "compiled"))
        assert a.keys() == b.keys() and distance(a, b) < 5e-3


# ---- on a GPU: python -m pytest test_all.py -m cuda -s ----------------------------------------------------


def on_cuda(test):
    """Skipped where there is no GPU. With -s it prints speed, share of peak and peak memory."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def components(device):
    """What the components make of the same input on a device -> {name: tensor}, gradients among them."""
    torch.manual_seed(0)
    images, latents = photos(4, 32).to(device), torch.randn(4, 4, 16, 16).to(device).requires_grad_()
    codec, statistics = DCTCodec(32, 4, 9, 467.0), DCTStatistics(4, device=device)
    statistics.update(images)
    loss = spectral_losses.esm_loss(images, latents)
    made = {
        "dct": dct2(images), "tokens": codec.encode(images), "decoded": codec.decode(codec.encode(images)),
        "eta": torch.tensor([statistics.eta()]), "entropies": statistics.entropies(), "upsampled": dct.upsample(images),
        "psd": psd(images), "esm": loss, "esm gradient": torch.autograd.grad(loss, latents)[0],
        "alpha": spectral_losses.power_law_exponent(images), "low-passed": spectral_losses.low_pass(latents, 10),
        "rmsc": spectral_losses.rmsc(latents), "hog": repa.HOG().to(device)(images)[0],
        "dog": repa.dog_target(repa.as_map(torch.rand(4, 64, 8)).flatten(2).mT.to(device), 0.6, 2),
    }  # fmt: skip
    y, drop = torch.tensor([0, 1, 2, 1]), torch.tensor([False, True, False, False])
    for name, make in NETWORKS.items():
        net = randomised(make()).float().to(device)
        x = torch.randn((4, 16, 6) if "tokens" in name else (4, 3, 8, 8))
        out, hidden = net(x.to(device), torch.rand(4).to(device) * 999, y.to(device), drop.to(device), tap=1)
        made |= {name: out, f"{name}, hidden": hidden}
        made[f"{name}, gradient"] = torch.autograd.grad(out.square().mean(), net.pos_embed if "uvit" in name else next(
            p for p in net.parameters() if p.requires_grad))[0]  # fmt: skip
    autoencoder = vae.VAE(**vae.PRESETS["tiny"]).to(device, memory_format=train_vae.layout(torch.device(device)))
    mean, logvar = autoencoder.encode(images)
    made |= {"mean": mean, "logvar": logvar, "reconstruction": autoencoder.decode(mean)}
    return {name: value.detach().cpu() for name, value in made.items()}


@on_cuda
def test_components_on_cuda_equal_those_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ours, oracle = components("cuda"), components("cpu")
    for name, value in oracle.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-4 * max(1.0, value.abs().max().item()), msg=name)


def train_on(device, program, flags, folder, steps=20):
    """A trainer's real command: half its steps, the rest resumed, then all of them under torchrun (NCCL on GPUs), and a
    benchmark, whose figures are printed.
    """
    photographs = write_photos(folder / "data", 64, 32, classes=["left", "right"])
    line = f"{program} --data {photographs} --size 32 --batch 16 --workers 0 --device {device} --log-every 1 {flags}"
    line += " --lr-decay none --eval-every 1000"
    command(f"{line} --steps {steps} --out {folder}/whole", gpu=True)
    for count in (steps // 2, steps):
        command(f"{line} --steps {count} --out {folder}/halves", gpu=True)
    processes = max(1, torch.cuda.device_count())
    command(f"{line} --steps {steps} --out {folder}/many", processes, gpu=True)
    whole, halves, many = (metrics(folder / run) for run in ("whole", "halves", "many"))
    assert [l["step"] for l in whole] == [l["step"] for l in halves] == list(range(1, steps + 1))
    assert all(l["skipped_steps"] == 0 for l in (*whole, *halves, *many))
    for lines in (whole, halves):
        assert np.mean([l["loss"] for l in lines[-3:]]) < np.mean([l["loss"] for l in lines[:3]])
    np.testing.assert_allclose([l["loss"] for l in many], [l["loss"] for l in whole], rtol=0.1)
    out = command(f"{line} --benchmark 10", gpu=True).stdout
    shown = [text for text in out.splitlines() if text.startswith(("step", "training", "arithmetic", "peak memory"))]
    assert len(shown) == 4
    print(f"\n{line}\n" + "\n".join(shown), "\nshare of peak in training", whole[-1].get("share_of_peak"))


@on_cuda
@pytest.mark.parametrize("compiling", ["", "--compile"])
@pytest.mark.parametrize("program, flags", [
    ("train_diffusion.py", "--model dit-tiny"), ("train_diffusion.py", "--model uvit-tiny"),
    ("train_diffusion.py", "--model dit-nano --space pixel --repa dog --encoder hog --repa-depth 1"),
    ("train_vae.py", "--regularizer esm+dsm --ema 0.9"), ("train_vae.py", "--regularizer kl --gan-weight 0.5 --gan-start 4"),
])  # fmt: skip
def test_trainers_on_cuda(program, flags, compiling, tmp_path):
    train_on("cuda", program, f"{flags} --amp bf16 {compiling}", tmp_path)


def use_on(device, folder, amp):
    """From images to a score: autoencoder, spectrum, evaluation, latent cache, aligned diffusion on it, samples."""
    photographs = write_photos(folder / "data", 48, 32, classes=["left", "right"])
    flags = f"--device {device} --amp {amp}"
    few = f"{flags} --workers 0 --eval-every 1000"
    command(f"train_vae.py {few} --data {photographs} --size 32 --steps 20 --batch 8 --out {folder}/vae", gpu=True)
    command(f"train_vae.py {flags} --eval-only --ckpt {folder}/vae --data {photographs} --features hog", gpu=True)
    command(f"train_vae.py {flags} --spectrum {folder}/vae --data {photographs} --out {folder}/spectrum", gpu=True)
    command(f"train_vae.py {flags} --encode {photographs} --ckpt {folder}/vae --out {folder}/c.latents", gpu=True)
    aligned = f"--latents {folder}/c.latents --model dit-nano/1 --repa dog --encoder hog --cache-targets {folder}/c.tokens"
    command(f"train_diffusion.py {few} {aligned} --steps 20 --batch 16 --out {folder}/latent", gpu=True)
    command(f"train_diffusion.py {few} --data {photographs} --size 32 --steps 20 --batch 16 --out {folder}/dct", gpu=True)
    for run in ("latent", "dct"):
        images = f"sample.py {folder}/{run} -n 16 --steps 4 --guidance 1.5"
        for kind in (amp, "off"):
            command(f"{images} --device {device} --amp {kind} --out {folder}/{run}-{kind} "
                    f"--score {photographs} --features hog", gpu=True)  # fmt: skip
        assert_same_images(folder / f"{run}-{amp}", folder / f"{run}-off", 16, tolerance=16)
        command(f"sample.py {folder}/{run} {flags} --trajectory", gpu=True)
    scores = [json.loads(text) for text in (folder / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 4 and all(np.isfinite(score["frechet_distance"]) for score in scores)


@on_cuda
def test_from_images_to_a_score_on_cuda(tmp_path):
    use_on("cuda", tmp_path, "bf16")


@on_cuda
def test_memory_of_sampling_on_cuda_is_flat():
    config = dict(space="dct", size=64, model="dit-tiny", path="flow", snr_scale=16.0, predict="x0", classes=None,
                  label_dropout=0.1, block=4, keep=9, eta=467.0)  # fmt: skip
    device, peaks = torch.device("cuda"), []
    diffusion = sample.Diffusion(config, amp=sample.autocast("auto", device, tf32=True)[0])
    diffusion.network.to(device).eval()
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        sample.generate(diffusion, range(32), 0, device, steps=4)
        peaks.append(torch.cuda.max_memory_allocated() / 2**20)
    print(f"\npeak memory of sampling, MiB: {peaks}")
    assert peaks[2] <= peaks[1] * 1.01
