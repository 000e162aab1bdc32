"""Tests against independent oracles: scipy, Pillow, numpy, closed forms, and the real commands run tiny.

    python -m pytest test_all.py

Nothing is downloaded. Tests that use the development data beside the repository are skipped where it is absent.
"""

import argparse
import ast
import contextlib
import copy
import functools
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.forkserver
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import scipy.integrate
import scipy.linalg
import scipy.ndimage
import scipy.optimize
import scipy.spatial
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageCms

import dct
import dit
import repa
import sample
import spectral_losses as S
import train_diffusion
import train_vae
import uvit
import vae
from dct import DCTCodec, DCTStatistics, dct2, idct2
from dit import DIT_SIZES, DiT
from repa import Aligned
from sample import SAMPLERS
from spectral_losses import psd
from train_diffusion import PATHS, PREDICTIONS, VP, Diffusion, Flow, StableDiffusionVP, like
from train_vae import DataOrder, Images, InputError, Pixels, Processes, Records
from uvit import UVIT_SIZES, UViT

HERE = Path(__file__).parent
CIFAR = HERE.parent / "shared/data/cifar10-train.zip"

HUBCONF = """
import torch
dependencies = ["torch"]

class Colours(torch.nn.Module):
    def forward_features(self, x):  # 4 x 4 tokens: mean colours, on random axes that are the same in every process
        axes = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(x)
        return {"x_norm_patchtokens": torch.nn.functional.adaptive_avg_pool2d(x, 4).flatten(2).mT @ axes}

colours, broken = Colours, torch.nn.Identity

def fetching():
    torch.hub.load_state_dict_from_url("http://127.0.0.1:9/weights.pth", progress=False)

def absent():
    raise RuntimeError("no such thing")
"""


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch):
    torch.manual_seed(0)  # a test that fails by chance fails always
    monkeypatch.setattr(train_diffusion, "GRID_STEPS", 2)  # of the pictures that evaluations draw


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder for --encoder and --features: FOLDER:colours and entries that fail."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "hubconf.py").write_text(HUBCONF)
    return folder


def photos(n, size, seed=0):
    """Smooth, coloured, photograph-like images (n, 3, size, size) in [-1, 1]: dead leaves, blurred."""
    leaves = np.stack([train_vae.dead_leaves(seed * 1000 + i, size, full=True) for i in range(n)])
    x = torch.from_numpy(leaves).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scipy_dct(x, inverse=False):
    return (scipy.fft.idctn if inverse else scipy.fft.dctn)(np.asarray(x, float), axes=(-2, -1), norm="ortho")


def bands_by_loops(power, bins=16):
    """(..., H, W), its DC counted as zero -> mean of every radial band (..., bins), 0 where it is empty."""
    (h, w), count = power.shape[-2:], np.zeros(bins)
    sums = np.zeros((*power.shape[:-2], bins))
    for u, v in np.ndindex(h, w):
        band = min(bins - 1, int(bins * np.hypot(u, v) / np.hypot(h - 1, w - 1)))
        sums[..., band] += power[..., u, v] * (u + v > 0)
        count[band] += 1
    return sums / np.maximum(count, 1)


# ---- dct.py -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_dct_equals_scipy(dtype, tolerance):
    for shape in ((2, 3, 8, 8), (5, 7, 12), (1, 1), (2, 17, 2), (3, 64, 48)):
        x = normal(*shape).to(dtype)
        assert dct2(x).dtype == dtype
        np.testing.assert_allclose(dct2(x).numpy(), scipy_dct(x), atol=tolerance)
        np.testing.assert_allclose(idct2(dct2(x)).numpy(), x.numpy(), atol=tolerance)


def plain_zigzag(n):
    """Diagonals in turn, the odd ones downwards."""
    cells = sorted(np.ndindex(n, n), key=lambda cell: (sum(cell), cell[0] if sum(cell) % 2 else cell[1]))
    return [n * row + column for row, column in cells]


def test_zigzag_colour_and_token_layout_by_hand():
    assert dct.zigzag(4).tolist() == [0, 1, 4, 8, 5, 2, 3, 6, 9, 12, 13, 10, 7, 11, 14, 15]
    assert all(dct.zigzag(n).tolist() == plain_zigzag(n) for n in (1, 2, 3, 4, 8, 16))
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].double()
    ours = dct.rgb_to_ycbcr(x)
    above = ours[0].permute(1, 2, 0).numpy() - np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    assert -0.1 < above.min() and above.max() < 1.05  # Pillow rounds down, in fixed point
    assert (dct.ycbcr_to_rgb(ours) - x).abs().max() < 1e-9
    # every number of one token
    B, keep, eta, x = 4, 9, 100.0, photos(2, 32)
    tokens = DCTCodec(32, B, keep, eta).encode(x).view(2, 4, 4, 6, keep)
    area = dct.rgb_to_ycbcr((x + 1) * 127.5)[1, :, 8:16, 24:32].double().numpy() - 128  # row 1, column 3
    halves = area[1:].reshape(2, 4, 2, 4, 2).mean((2, 4))
    blocks = [area[0, :4, :4], area[0, :4, 4:], area[0, 4:, :4], area[0, 4:, 4:], *halves]
    for block, ours in zip(blocks, tokens[1, 1, 3]):
        np.testing.assert_allclose(ours, scipy_dct(block).flatten()[plain_zigzag(B)[:keep]] / eta, atol=1e-5)
    # every coefficient by its own number
    etas, one = 300 + 200 * torch.rand(3, keep), DCTCodec(32, B, keep, eta)
    own = DCTCodec(32, B, keep, etas)
    for block, channel in enumerate((0, 0, 0, 0, 1, 2)):
        ours = own.encode(x).view(2, 4, 4, 6, keep)[:, :, :, block]
        np.testing.assert_allclose(ours, tokens[:, :, :, block] * eta / etas[channel], atol=1e-5)
    inside = own.encode(x).clamp(-0.4, 0.4)  # of which no token is clamped either way
    again = own.decode(inside), one.decode((inside.view(2, 16, 6, keep) * etas[[0, 0, 0, 0, 1, 2]] / eta).flatten(2))
    assert (again[0] - again[1]).abs().max() < 1e-5


@pytest.mark.parametrize("B, size", [(2, 32), (4, 32), (8, 64), (3, 24)])
def test_codec_keeps_everything_but_chroma_detail(B, size):
    x, codec, few = photos(3, size), DCTCodec(size, B, B * B, 128.0 * B), DCTCodec(size, B, B, 256.0 * B)
    tokens = codec.encode(x.requires_grad_())
    decoded, ycc = codec.decode(tokens), dct.rgb_to_ycbcr((x + 1) * 127.5)
    assert tokens.shape == (3, codec.num_tokens, codec.token_dim) == (3, (size // (2 * B)) ** 2, 6 * B * B)
    chroma = F.interpolate(F.avg_pool2d(ycc[:, 1:], 2), scale_factor=2, mode="bilinear")
    plain = dct.ycbcr_to_rgb(torch.cat((ycc[:, :1], chroma), 1)) / 127.5 - 1
    assert (decoded - plain.clamp(-1, 1)).abs().max() < 1e-5
    assert torch.autograd.grad(decoded.square().sum(), x)[0].abs().sum() > 0
    wild, psnr = torch.randn(2, *tokens.shape[1:]) * 50, dct.psnr_per_keep(x, B)
    assert codec.decode(wild).abs().max() <= 1 and torch.equal(codec.decode(wild), codec.decode(wild.clamp(-2, 2)))
    assert psnr.shape == (B * B,) and (psnr.diff() > -0.05).all() and psnr[-1] - psnr[0] > 5
    assert abs(10 * torch.log10(4 / (few.decode(few.encode(x)) - x).square().mean()) - psnr[B - 1]) < 1e-2


@pytest.mark.parametrize("B", [2, 4])
def test_statistics_equal_numpy(B):
    x = (photos(200, 32) + 0.05 * normal(200, 3, 32, 32).float()).clamp(-1, 1)
    once, parts = DCTStatistics(B), (DCTStatistics(B), DCTStatistics(B))
    once.update(x)
    for i, part in enumerate(x.split(37)):
        parts[i % 2].update(part)
    assert torch.equal(once.counts, parts[0].counts + parts[1].counts)  # a stream, and a sum over processes
    c = dct.block_coefficients(x, B).double().numpy()  # (N, L, 6, B*B)
    channels, entropies = [c[:, :, i].reshape(-1, B * B) for i in (slice(0, 4), 4, 5)], np.zeros((3, B * B))
    eta = np.abs(np.percentile(channels[0][:, 0], [1.75, 98.25])).max()
    for i, j in np.ndindex(3, B * B):
        v, (low, high) = channels[i][:, j], np.percentile(channels[i][:, j], [1.75, 98.25])
        p = np.histogram(v[(v >= low) & (v <= high)] / eta, 100, (-1, 1))[0]
        entropies[i, j] = scipy.special.entr(p / p.sum()).sum() / np.log(2)
    assert abs(once.eta() / eta - 1) < 1e-3
    bounds = [np.abs(np.percentile(channel, [1.75, 98.25], axis=0)).max(0) for channel in channels]
    np.testing.assert_allclose(once.scales(), bounds, rtol=0.03, atol=2 * once.width)
    np.testing.assert_allclose(once.entropies().numpy(), entropies, atol=0.03)
    weights = dct.ebfr_weights(once.entropies(), 3).view(6, 3)
    assert torch.allclose(weights.mean(1), torch.ones(6)) and torch.equal(weights[0], weights[3])


@pytest.mark.skipif(not CIFAR.exists(), reason="no development data beside the repository")
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
def test_upsampling_inverts_averaging_and_equals_the_formula(block):
    for shape in ((37, 22), (16, 16), (9, 14), (1, 1)):
        x = torch.rand(shape, dtype=torch.float64)
        up = dct.upsample(x, block)
        assert up.shape == (2 * shape[0], 2 * shape[1]) and (F.avg_pool2d(up[None], 2)[0] - x).abs().max() < 1e-12
        np.testing.assert_allclose(dct.enlarge(x.numpy(), block), up.numpy(), atol=1e-5)
    x, high, gain = normal(8, 8), np.zeros((16, 16)), np.cos(np.arange(8) * np.pi / 32)
    high[:8, :8] = scipy_dct(x) / (0.5 * np.outer(gain, gain))
    np.testing.assert_allclose(dct.upsample(x).numpy(), scipy_dct(high, inverse=True), atol=1e-12)


def upsampled(source, output, flags=""):
    """The command's picture and its pixels averaged back, channels last."""
    dct.main(dct.make_parser().parse_args(f"upsample {source} {output} {flags}".split()))
    up = Image.open(output)
    pixels = np.asarray(up).astype(float)
    return up, pixels.reshape(up.height // 2, 2, up.width // 2, 2, *pixels.shape[2:]).mean((1, 3))


def test_deep_grey_is_scaled_where_its_range_is_known_and_refused_by_name_elsewhere(tmp_path, capsys):
    ramp = np.arange(64).reshape(8, 8)  # in every kind of grey deeper than 8 bits, 63 being white or nearly so
    sixteen, part = (ramp * 4 * 257).astype(np.uint16), (ramp * 4 / 255).astype(np.float32)
    pictures = {"i16.png": sixteen, "i16.tif": sixteen, "f.tif": part, "i32.tif": (ramp * 60000).astype(np.int32)}
    pictures |= {"f255.tif": (ramp * 4).astype(np.float32), "negative.tif": part - 0.5}
    pictures["nan.tif"] = np.where(ramp == 3, np.nan, part).astype(np.float32)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(name)
    for name, white, pixels in (("i16.pgm", 65535, ramp * 4 * 257), ("i10.pgm", 1020, ramp * 16)):
        Path(name).write_bytes(b"P5 8 8 %d\n" % white + pixels.astype(">u2").tobytes())
    tag = lambda number, value: struct.pack("<HHII", number, 3, 1, value)  # to make what Pillow does not write
    for old, new, *tags in (("i16", "white0", tag(262, 1), tag(262, 0)), ("i32", "u32", tag(339, 2), tag(339, 1))):
        Path(f"{new}.tif").write_bytes(Path(f"{old}.tif").read_bytes().replace(*tags))
    Image.frombytes("I;16B", (8, 8), sixteen.astype(">u2").tobytes()).save("big.tif")
    bits = ((ramp * 4 * 4095 / 255).round().astype(int)[..., None] >> np.arange(11, -1, -1)) & 1
    twelve, plain = np.packbits(bits).tobytes().ljust(128, b"\0"), Path("i16.tif").read_bytes()
    Path("i12.tif").write_bytes(plain.replace(tag(258, 16), tag(258, 12)).replace(sixteen.tobytes(), twelve))
    bad = {"i32.tif": "32-bit", "u32.tif": "32-bit", "nan.tif": "not finite", "f255.tif": "0 to 252"}
    bad |= {"negative.tif": "-0.5 to", "white0.tif": "white is 0"}
    images = Images(str(tmp_path), 8)
    assert len(images) == 13
    for i, name in enumerate(images.names):
        x, message = images.read(i), capsys.readouterr().err
        if name in bad:
            assert x is None and name in message and bad[name] in message and "8 or 16 bits" in message, name
            with pytest.raises(SystemExit, match=f"^dct.py: cannot read the image {name}: [^\n]*{bad[name]}[^\n]*$"):
                upsampled(name, "no.png")
            continue
        assert not message and torch.equal(x, torch.from_numpy(ramp * 4).byte().expand(3, 8, 8)), name
        for output in ("up.png", "up.tif"):
            up, averaged = upsampled(name, output)
            assert up.mode == ("F" if (name, output) == ("f.tif", "up.tif") else "I;16"), name
            white = 1 if up.mode == "F" else 65535
            assert np.abs(averaged / white - ramp * 4 / 255).mean() < 2e-3  # clipping at black


def test_upsample_command_keeps_profile_and_orientation_and_refuses_in_a_line(tmp_path, capsys):
    rng, profile = np.random.default_rng(0), ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for shape in ((9, 14, 3), (5, 4), (4, 4, 4), (3, 5, 2)):
        pixels = rng.integers(60, 190, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "any.png")
        assert np.abs(upsampled(tmp_path / "any.png", tmp_path / "up.png")[1] - pixels).mean() < 1.5  # rounding
    source, picture, exif = tmp_path / "in.png", Image.fromarray(rng.integers(60, 190, (6, 9, 3), "u1")), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(source, icc_profile=profile, exif=exif)
    for ending in ("jpg", "tif", "webp", "png"):
        up, averaged = upsampled(source, tmp_path / f"up.{ending}")
        assert up.info["icc_profile"] == profile and up.size == (12, 18) and up.getexif().get(0x0112, 1) == 1
    assert np.abs(averaged - np.asarray(picture.transpose(Image.Transpose.ROTATE_270))).mean() < 1.5
    capsys.readouterr()
    picture.convert("CMYK").save(tmp_path / "ink.tif", icc_profile=profile[:16] + b"CMYK" + profile[20:])
    up, _ = upsampled(tmp_path / "ink.tif", tmp_path / "up.png")  # RGB now: a profile of inks would be wrong
    assert "icc_profile" not in up.info and "profile" in capsys.readouterr().out
    refused = {f"in.png up.png --block {block}": f"--block {block}" for block in (0, 10)}  # it is 6 x 9
    refused |= {f"in.png {output}": "cannot write" for output in ("no/up.png", "no/up.jpg", "up.unknown")}
    for words, message in (refused | {"absent.png up.png": "cannot read"}).items():
        read, write, *flags = words.split()
        with pytest.raises(SystemExit, match=f"^dct.py: {message}[^\n]*$"):
            upsampled(tmp_path / read, tmp_path / write, " ".join(flags))


def test_upsampling_folders_and_zips_by_every_method_equals_pillow_and_goes_on(tmp_path, capsys):
    rng, upsample = np.random.default_rng(0), lambda words: dct.main(dct.make_parser().parse_args(words.split()))
    colour, deep = rng.integers(0, 256, (6, 9, 3), "u1"), rng.integers(0, 65536, (5, 4), "u2")
    Path("in/sub").mkdir(parents=True)
    Image.fromarray(colour).save("in/a.bmp")
    Image.fromarray(deep).save("in/sub/deep.png")
    for name in ("in/bad.jpg", "in/.hidden.png", "in/text.txt"):
        Path(name).write_bytes(b"none")
    with zipfile.ZipFile("in.zip", "w") as archive:
        for name in ("a.bmp", "sub/deep.png", "bad.jpg", "text.txt"):
            archive.write(f"in/{name}", name)
        archive.writestr("../out.png", Path("in/a.bmp").read_bytes())
    for source, method in itertools.product(("in", "in.zip"), dct.METHODS):
        upsample(f"upsample {source} {source}-{method} --method {method}")
        out, err = capsys.readouterr()
        assert "2 images in" in out and "1 skipped" in out and "cannot read the image bad.jpg" in err
        made = {file.relative_to(f"{source}-{method}").as_posix() for file in Path(f"{source}-{method}").rglob("*.*")}
        assert made == {"a.png", "sub/deep.png"}
        for name, pixels in (("a.png", colour), ("sub/deep.png", deep)):
            channels = np.atleast_3d(pixels).astype("f4")
            if method == "dct":
                planes = [dct.upsample(torch.from_numpy(channels[..., c])) for c in range(channels.shape[2])]
            else:
                wide, way = (2 * pixels.shape[1], 2 * pixels.shape[0]), Image.Resampling[method.upper()]
                planes = [Image.fromarray(channels[..., c]).resize(wide, way) for c in range(channels.shape[2])]
            expected = np.stack([np.asarray(plane) for plane in planes], -1).clip(0, np.iinfo(pixels.dtype).max)
            large = np.atleast_3d(Image.open(f"{source}-{method}/{name}")).astype(float)
            if method != "dct" and name == "a.png":  # whose arithmetic of 8 bits rounds and clips in between
                expected = np.asarray(Image.fromarray(pixels).resize(wide, way))
            assert large.shape == expected.shape and np.abs(large - expected.round()).max() <= (method == "dct")
    times = {file: file.stat().st_mtime_ns for file in Path("in-dct").rglob("*.png")}
    Path("in-dct/a.png").unlink()
    upsample("upsample in in-dct")  # only what is missing is made again
    assert all((file.stat().st_mtime_ns == when) == (file.name == "deep.png") for file, when in times.items())
    Path("none").mkdir()
    Path("twins").mkdir()
    for name in ("twins/a.png", "twins/a.jpg", "some.png"):
        Image.fromarray(colour).save(name)
    # other sources of the same names are other pictures, and outputs whose source is gone are no longer of it
    upsample("upsample in changed")
    shutil.copytree("changed", "more")
    Image.fromarray(255 - colour).save("in/a.bmp")
    shutil.copyfile("more/a.png", "more/sub/b.png")
    bad = {"in changed": "changed/a.png: not made of in", "in more": "more/(a|sub/b).png: not made of in"}
    bad |= {"some.png .": "cannot write . .*name a file that ends in .png"}
    bad |= {
        "in in-dct --method bicubic": "in-dct/.*not made of in by this",
        "in in-dct --block 2": "with these settings",
    }
    bad |= {"in in/out": "lies in in", "in some.png": "is a file", "none out": "none: no image in it"}
    bad |= {"twins out": "twins: has images whose names differ in the ending alone"}
    bad |= {"some.png out.png --block 2 --method nearest": "--block 2: means nothing with --method nearest"}
    bad |= {"in out --block 99": "none of its images"}  # of so many pixels
    for words, message in bad.items():
        with pytest.raises(SystemExit, match=f"^dct.py: [^\n]*{message}[^\n]*$"):
            upsample(f"upsample {words}")
    assert not Path("../out.png").exists()


# ---- spectral_losses.py -----------------------------------------------------------------------------------


def power_law(n, c, side, alpha, seed=0):
    """Noise whose DCT coefficients have power 1 / r^alpha in expectation, its DC nothing special."""
    r = np.hypot(*np.mgrid[:side, :side])
    r[0, 0] = 1
    noise = np.random.default_rng(seed).standard_normal((n, c, side, side))
    return torch.from_numpy(scipy_dct(noise * r ** (-alpha / 2), inverse=True))


@pytest.mark.parametrize("alpha", [0, 0.5, 1, 2, 3])
def test_power_law_exponent_is_recovered(alpha):
    exponent = S.power_law_exponent
    for x in (power_law(64, 4, 16, alpha), power_law(64, 4, 64, alpha), 7 * power_law(64, 4, 32, alpha).float() + 3):
        assert abs(exponent(x) - alpha) < 0.05
    # f^1 of the band's number flattens it by about one: bands begin at r = 0
    assert abs(exponent(power_law(64, 4, 64, alpha), delta=1.0) - (alpha - 1)) < 0.15


def resized(images, side, blurred=True):
    """What ESM compares with a latent: a zero-padded 7 x 7 Gaussian of sigma 1.2, then bicubic. -> float64"""
    x, sigma, radius = images.double(), (0, 0, 1.2, 1.2), (0, 0, 3, 3)
    if blurred:
        x = torch.from_numpy(scipy.ndimage.gaussian_filter(x.numpy(), sigma, mode="constant", radius=radius))
    return F.interpolate(x, (side, side), mode="bicubic")


def esm_by_scipy(images, latents, delta, blurred):
    small, shares = resized(images, latents.shape[-1], blurred), []
    for field, power in ((small, delta), (latents, 0)):
        s = np.log1p(1e-8 + bands_by_loops((scipy_dct(field) ** 2).mean(1)) * np.arange(1, 17.0) ** power)
        shares.append(s / s.sum(1, keepdims=True))
    return scipy.special.rel_entr(*shares).sum(1).mean()


@pytest.mark.parametrize("side", [16, 32, 64])
def test_esm_equals_its_steps_in_scipy_and_blurs_where_the_authors_do(side):
    images, latents = photos(3, 64), normal(3, 4, side, side).float()
    for delta in (0.0, 1.0, 0.5):
        for blur, blurred in ((None, side != 32), (True, True), (False, False)):  # `if h == 32` in their code
            ours = S.esm_loss(images, latents, delta, blur=blur).item()
            assert abs(ours / esm_by_scipy(images, latents, delta, blurred) - 1) < 1e-4


def test_blocks_of_dsm_are_at_most_half_a_latent():
    """The mask of an 8 x 8 latent must not be a low-pass of its whole frame: two blocks a side, or more."""
    fits = {8: "16x16 32x32 64x64 16x32 24x24", 4: "8x8 12x8 20x20 8x32", 2: "4x4 6x6", None: "2x2 3x3 8x1 7x16"}
    for block, sides in fits.items():  # METHOD, section 6
        assert all(S.block_that_fits(*map(int, side.split("x"))) == block for side in sides.split())
    for half in (2, 4, 8):  # what is added in one quarter stays in it
        x, block = torch.randn(1, 1, half, half), S.block_that_fits(2 * half, 2 * half)
        low = S.low_pass(F.pad(x, (0, half, 0, half)), 10, block)
        assert (low - F.pad(S.low_pass(x, 10, block), (0, half, 0, half))).abs().max() < 1e-6 < low.abs().max()


def test_spectra_and_low_pass_by_loops_and_by_fft():
    assert [int(S.low_pass_mask(k).sum()) for k in (0, 8, 10, 12)] == [64, 28, 15, 6]
    x = normal(2, 3, 16, 24)
    for k, block in ((8, 8), (12, 8), (10, 4), (0, 2)):
        blocks = x.numpy().reshape(2, 3, 16 // block, block, 24 // block, block).swapaxes(3, 4)
        u, v = np.mgrid[:block, :block] * 8 / block
        oracle = scipy_dct(np.where(u + v < 15 - k, scipy_dct(blocks), 0), inverse=True).swapaxes(3, 4).reshape(x.shape)
        np.testing.assert_allclose(S.low_pass(x, k, block).numpy(), oracle, atol=1e-12)
    x = normal(3, 7, 9, 12) + 0.7
    np.testing.assert_allclose(psd(x, bins=5), bands_by_loops((scipy_dct(x) ** 2).mean(1), 5), rtol=1e-9)
    y, z = normal(3, 2, 32, 32), normal(3, 2, 32, 32, seed=1)
    np.testing.assert_allclose(S.band_error(y + z, y), (psd(z).sum(0) / psd(y).sum(0)).numpy())
    rmsc, bands, u = S.rmsc(x), S.directional_energy(x), x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    power = (np.abs(np.fft.fft2(u, norm="ortho")) ** 2).sum(1) / (9 * 12)  # another orthonormal transform: Parseval
    np.testing.assert_allclose(rmsc.square().numpy(), power.sum((1, 2)) - power[:, 0, 0], rtol=1e-9)
    np.testing.assert_allclose(rmsc.square().numpy(), bands.sum(1).numpy(), rtol=1e-9)
    assert bands.shape == (3, 16) and S.rmsc(torch.ones(1, 4, 6, 6) * torch.rand(1, 1, 6, 6)) < 1e-3  # one direction


def test_special_cases_equal_torchs_and_numpys():
    x, y = normal(3, 4, 8, 12), normal(3, 4, 8, 12, seed=1)
    posterior, prior = torch.distributions.Normal(x, (y / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    assert torch.isclose(S.kl_loss(x, y), torch.distributions.kl_divergence(posterior, prior).sum() / 3)
    np.testing.assert_array_equal(S.scale_and_rotate(x, (8, 12), 1).numpy(), np.rot90(x.numpy(), axes=(-2, -1)))
    assert torch.allclose(S.scale_and_rotate(x, (4, 6), 2).flip(-2, -1), F.avg_pool2d(x, 2))  # bilinear at one half
    assert torch.isclose(S.downscale(x, 4)[0, 0, 1, 2], x[0, 0, 4:, 8:].mean())
    a, b = (v.flatten(2).mT.numpy() / np.linalg.norm(v.flatten(2).mT, axis=2, keepdims=True) for v in (x, y))
    pairs = np.maximum(0, np.abs(a @ a.swapaxes(1, 2) - b @ b.swapaxes(1, 2)) - 0.25).mean()
    assert abs(S.vf_loss(x, y).item() - pairs - np.maximum(0, 0.5 - (a * b).sum(2)).mean()) < 1e-12
    assert S.vf_loss(3 * x, x) == 0 and S.vf_loss(x, torch.randn(3, 4, 16, 18)).isfinite()  # lengths, another grid


DIFFERENTIABLE = """dct2(x); idct2(x); psd(x); S.power_law_exponent(x); S.rmsc(x); S.directional_energy(y)
S.kl_loss(x, x); S.esm_loss(x, y, bins=4); S.low_pass(x, 10, 2); S.resize_to_latent(x, (3, 3)); S.vf_loss(y, x, 0, 0)
S.downscale(x, 2); S.scale_and_rotate(x, (2, 3), 1); S.band_error(x, x.flip(2), bins=4)"""


@pytest.mark.parametrize("expression", DIFFERENTIABLE.replace("\n", "; ").split("; "))
def test_differentiable_and_in_float32_even_under_autocast(expression):
    x, y, call = normal(1, 2, 4, 6), normal(1, 2, 2, 3, seed=1), eval(f"lambda x, y: {expression}", globals())
    with torch.inference_mode():
        call(x, y)  # what it caches must serve autograd
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), y.requires_grad_()))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, full = call(x.bfloat16(), y.bfloat16()), call(x.bfloat16().double(), y.bfloat16().double())
    assert mixed.dtype == torch.float32 and torch.allclose(mixed.double(), full, rtol=1e-3, atol=1e-5)


def tilted(small, power, std=None):
    """Fields (N, C, n, n), their spectrum times f^power, f the band's number 1..16, without DC; scaled to std."""
    r = np.hypot(*np.mgrid[: small.shape[-2], : small.shape[-1]])
    f = np.minimum(np.floor(16 * r / r.max()), 15) + 1
    field = scipy_dct(scipy_dct(small) * f ** (power / 2) * (r > 0), inverse=True)
    return torch.from_numpy(field * (std / np.sqrt((field**2).mean()) if std else 1))


@pytest.mark.parametrize("side", [16, 8, 6, 4])
def test_comparison_with_the_target_by_loops(side):
    """Both KLs at both scales, of fields that are tilted and scaled themselves; empty bands are left out."""
    rng, delta = np.random.default_rng(side), 0.7
    small = tilted(rng.standard_normal((5, 3, side, side)), -2, 0.4).numpy() * (rng.random((5, 1, 1, 1)) + 0.5)
    latents = 3 * rng.standard_normal((5, 4, side, side)) + 1
    ours = S.compare_with_target(*(psd(torch.from_numpy(v)) for v in (small, latents)), side, side, delta)
    used = bands_by_loops(np.ones((side, side))) > 0
    assert ours["bands"] == (np.flatnonzero(used) + 1).tolist() and used[0] == (side == 16)
    for scale, std in (("raw", None), ("unit_std", 1)):
        fields = {"image": (small, 0), "target": (small, delta), "latent": (latents, 0)}
        shares = {}
        for name, (field, power) in fields.items():
            s = np.log1p(bands_by_loops((scipy_dct(tilted(field, power, std)) ** 2).mean(1))[:, used])
            shares[name] = s / s.sum(1, keepdims=True)
            np.testing.assert_allclose(ours[scale][f"{name}_shares"], shares[name].mean(0), rtol=1e-5, atol=1e-7)
        kl = scipy.special.rel_entr(shares["target"].mean(0), shares["latent"].mean(0)).sum()
        each = scipy.special.rel_entr(shares["target"], shares["latent"]).sum(1).mean()
        assert abs(ours[scale]["kl_of_mean_spectra"] / kl - 1) < 1e-4 and each > 1.001 * kl
        assert abs(ours[scale]["mean_of_kls_per_image"] / each - 1) < 1e-4
        gap = (shares["latent"] - shares["target"]).mean(0)[np.flatnonzero(used) >= 8].sum()
        assert abs(ours[scale]["upper_share"] - gap) < 1e-5


def test_kl_of_mean_spectra_is_the_papers():
    """The published KLs from the published mean spectra (CelebA-HQ 256), here of pictures unlike their mean."""
    published = {
        "target": "1961 1560 1099 0977 0677 0617 0472 0404 0358 0340 0313 0278 0266 0238 0229 0212",
        "SD-VAE": "1671 1312 0833 0710 0587 0538 0513 0476 0460 0455 0438 0419 0408 0398 0393 0389",
        "ESM": "1658 1483 1130 0985 0754 0652 0531 0446 0387 0363 0329 0295 0260 0249 0246 0233",
    }
    shares = {name: torch.tensor([float(v) for v in row.split()]).double() for name, row in published.items()}
    shares = {name: share / share.sum() for name, share in shares.items()}
    apart = 0.01 * torch.sin(torch.arange(16).double())
    for name, kl in (("SD-VAE", 0.0379), ("ESM", 0.0044)):
        power = {}
        for side, sign in (("target", 1), (name, -1)):  # spectra S whose log(1 + S) has these shares, in the mean
            wave = sign * (apart - apart.mean())
            power[side] = torch.expm1(12 * torch.stack((shares[side] + wave, shares[side] - wave)))
        raw = S.compare_with_target(power["target"] / torch.arange(1, 17), power[name], 16, 16)["raw"]
        np.testing.assert_allclose(raw["target_shares"], shares["target"].numpy(), atol=1e-6)
        assert abs(raw["kl_of_mean_spectra"] - kl) < 1e-4 < 1e-3 < raw["mean_of_kls_per_image"] - kl


def artefacts_by_loops(x, period):
    """Wang, Bovik & Evans: differences, explicit Fourier sums, a straight line in log-log through two neighbours."""
    peaks = expected = 0
    for field in (x, x.swapaxes(2, 3)):
        length = (field.shape[3] // period - 1) * period
        at = np.arange(length)
        lines = np.abs(np.diff(field, axis=3)).reshape(-1, field.shape[3] - 1)[:, period // 2 + at]
        waves = np.exp(-2j * np.pi / length * np.outer(at, at))
        power = np.mean(np.abs(lines @ waves) ** 2, 0) / length * period
        for k in range(1, period // 2 + 1):
            f = k * length // period
            slope = np.log(power[f + 1] / power[f - 1]) / np.log((f + 1) / (f - 1))
            slope = 0 if 2 * k == period else slope  # the spectrum is even about the Nyquist frequency
            peaks, expected = peaks + power[f], expected + power[f - 1] * (f / (f - 1)) ** slope
    return peaks / expected


@pytest.mark.parametrize("period", [2, 3, 4, 5, 8])
def test_patch_artefacts_equal_loops_and_a_closed_form(period, n=600):
    x = normal(2, 3, 24, 37)
    assert S.patch_artefacts(x, period).item() == pytest.approx(artefacts_by_loops(x.numpy(), period), rel=1e-6)
    # differences 4 + a pattern + white noise, both ways: the pattern's Fourier power over the noise's
    rng, sigma, side = np.random.default_rng(period), 0.5, 6 * period
    pattern = rng.normal(0, 0.3, period)
    steps = [4 + np.tile(pattern, 6) + sigma * rng.standard_normal((n, side)) for _ in range(2)]
    ramps = [np.cumsum(step, 1) for step in steps]
    images = torch.from_numpy(ramps[0][:, None, :, None] + ramps[1][:, None, None, :])
    power = (np.abs(np.fft.rfft(pattern)) ** 2)[1:] / period**2
    expected = 1 + 5 * period * power.sum() / (len(power) * sigma**2)
    assert S.patch_artefacts(images, period).item() == pytest.approx(expected, rel=0.15)


def test_patch_artefacts_are_of_grids_and_of_their_period_only():
    pixels = np.stack([train_vae.dead_leaves(i, 64, full=True) for i in range(12)])
    pixels = scipy.ndimage.gaussian_filter(pixels, (0, 0.7, 0.7, 0))

    def jpeg(quality):
        files = [io.BytesIO() for _ in pixels]
        for image, file in zip(pixels, files):
            Image.fromarray(image).save(file, "JPEG", quality=quality)
        return torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files])).permute(0, 3, 1, 2)

    plain, meter = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, S.patch_artefacts
    assert all(abs(meter(plain, period).item() - 1) < 0.1 for period in (2, 3, 4, 5, 7, 8))
    grids = [meter(jpeg(quality).float(), 8).item() for quality in (95, 50, 20, 5)]
    assert grids == sorted(grids) and grids[0] < 1.1 and grids[2] > 1.3 and grids[3] > 2
    assert meter(jpeg(5).float(), 7) < 1.1
    coded = [DCTCodec(64, 4, keep, 1024.0) for keep in (16, 4, 1)]
    grids = [meter(codec.decode(codec.encode(plain)), 4).item() for codec in coded]
    assert grids == sorted(grids) and grids[0] < 1.1 and grids[2] > 4
    shifted = plain + 0.1 * normal(1, 3, 4, 4).float().repeat(1, 1, 16, 16)  # the same pattern in every patch
    assert meter(shifted, 4) > 1.5 > 1.1 > meter(shifted, 5)
    for x, period in ((plain, 1), (plain, 22), (plain[..., :8, :], 4)):
        with pytest.raises(ValueError, match=f"period {period} must lie between 2 and a third of an image of"):
            meter(x, period)


# ---- dit.py, uvit.py --------------------------------------------------------------------------------------


class Weights(dict):
    """A state dict that knows which of its keys were read."""

    def __getitem__(self, key):
        self.__dict__.setdefault("read", set()).add(key)
        return super().__getitem__(key)

    def linear(self, name, x):
        bias = self[f"{name}.bias"] if f"{name}.bias" in self else None
        return F.linear(x, self[f"{name}.weight"].flatten(1), bias)

    def attention(self, name, x, heads):
        q, k, v = (part.chunk(heads, 2) for part in self.linear(f"{name}.qkv", x).chunk(3, 2))
        out = [torch.softmax(a @ b.mT / a.shape[2] ** 0.5, 2) @ c for a, b, c in zip(q, k, v)]
        return self.linear(f"{name}.proj", torch.cat(out, 2))


def plain_features(t, dim):
    angles = t[:, None].double() * 10000 ** -(torch.arange(dim // 2).double() / (dim // 2))
    return torch.cat((angles.cos(), angles.sin()), 1)


def plain_maps(tokens, x, p):
    """By loops: token (row, column), then pixel row, pixel column, channel."""
    if x.ndim == 3:
        return tokens
    side, c = x.shape[-1] // p, tokens.shape[2] // p**2
    out = torch.zeros(len(x), c, side * p, side * p, dtype=x.dtype)
    for i, j in np.ndindex(side, side):
        patch = tokens[:, i * side + j].view(-1, p, p, c).permute(0, 3, 1, 2)
        out[:, :, i * p : (i + 1) * p, j * p : (j + 1) * p] = patch
    return out


def plain_dit(w, x, t, y, depth, heads, p):
    """DiT by its paper, as functions of a state dict -> output, the hidden tokens after every block."""
    norm = lambda h: (h - h.mean(2, keepdim=True)) / (h.var(2, unbiased=False, keepdim=True) + 1e-6).sqrt()
    gelu = lambda h: 0.5 * h * (1 + torch.tanh((2 / np.pi) ** 0.5 * (h + 0.044715 * h**3)))
    h = w.linear("x_embedder.proj", F.unfold(x, p, stride=p).mT if x.ndim == 4 else x) + w["pos_embed"]
    c = w.linear("t_embedder.mlp.2", F.silu(w.linear("t_embedder.mlp.0", plain_features(t, 256))))
    c, hidden = F.silu(c + w["y_embedder.embedding_table.weight"][y])[:, None], []
    for n in range(depth):
        b, m = f"blocks.{n}", w.linear(f"blocks.{n}.adaLN_modulation.1", c).chunk(6, 2)
        h = h + m[2] * w.attention(f"{b}.attn", norm(h) * (1 + m[1]) + m[0], heads)
        h = h + m[5] * w.linear(f"{b}.mlp.fc2", gelu(w.linear(f"{b}.mlp.fc1", norm(h) * (1 + m[4]) + m[3])))
        hidden.append(h)
    m = w.linear("final_layer.adaLN_modulation.1", c).chunk(2, 2)
    return plain_maps(w.linear("final_layer.linear", norm(h) * (1 + m[1]) + m[0]), x, p), hidden


def plain_uvit(w, x, t, y, depth, heads, p):
    """U-ViT by its paper, as functions of a state dict -> output, the hidden tokens after every block."""
    half, maps, d, hidden = depth // 2, x.ndim == 4, w["pos_embed"].shape[2], []
    norm = lambda name, h: F.layer_norm(h, (d,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
    time = plain_features(t, d)
    if "time_embed.0.weight" in w:
        time = w.linear("time_embed.2", F.silu(w.linear("time_embed.0", time)))
    h = w.linear("patch_embed.proj", F.unfold(x, p, stride=p).mT) if maps else w.linear("proj", x)
    h = torch.cat((w["label_emb.weight"][y][:, None], time[:, None], h), 1) + w["pos_embed"]
    sides = [[f"{side}_blocks.{n}" for n in range(half)] for side in ("in", "out")]
    for name in (*sides[0], "mid_block", *sides[1]):
        if name in sides[1]:
            h = w.linear(f"{name}.skip_linear", torch.cat((h, hidden[2 * half - len(hidden)]), 2))
        h = h + w.attention(f"{name}.attn", norm(f"{name}.norm1", h), heads)
        inner = w.linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", h))
        h = h + w.linear(f"{name}.mlp.fc2", 0.5 * inner * (1 + torch.erf(inner / 2**0.5)))
        hidden.append(h)
    out = plain_maps(w.linear("decoder_pred", norm("norm", h))[:, 2:], x, p)
    out = F.conv2d(out, w["final_layer.weight"], w["final_layer.bias"], padding=1) if maps else out
    return out, [h[:, 2:] for h in hidden]


def randomised(net, seed=0):
    """Every parameter random, so that no zero initialisation hides a mistake."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.3 if p.ndim < 2 else p.shape[-1] ** -0.5)
    return net


TOKENS = dict(num_tokens=16, token_dim=6, depth=4, num_heads=2)
NETWORKS = {"dit maps": lambda **more: DiT(8, 2, 3, 16, 4, 2, **dict(num_classes=5, learn_sigma=False) | more)}
NETWORKS["dit tokens"] = lambda: DiT(hidden_size=16, num_classes=5, learn_sigma=False, **TOKENS)
NETWORKS["uvit maps"] = lambda: UViT(8, 2, 3, 16, 4, 2, num_classes=6)
NETWORKS["uvit tokens"] = lambda: UViT(embed_dim=16, num_classes=6, mlp_time_embed=True, **TOKENS)


def network_input(name, n=4):
    x = torch.randn((n, 3, 8, 8) if "maps" in name else (n, 16, 6))
    return x, torch.tensor([0.0, 12.5, 250.0, 40.0])[:n], torch.tensor([0, 1, 2, 4])[:n]


@pytest.mark.parametrize("name", [*NETWORKS, "dit maps and sigmas"])
def test_networks_equal_plain_ones_which_use_the_published_keys(name):
    make = NETWORKS.get(name, lambda: NETWORKS["dit maps"](learn_sigma=True))
    net, (x, t, y) = randomised(make()).double().eval(), network_input(name)
    x, w = x.double(), Weights(net.state_dict())
    output, hidden = (plain_dit if "dit" in name else plain_uvit)(w, x, t, y, 4, 2, 2)
    assert w.read == set(w) and net.depth == len(hidden) and net.tapped(x, t, y)[1] is None
    assert (net(x, t, y) - output).abs().max() < 1e-5
    for tap, oracle in enumerate(hidden, 1):
        assert (net.tapped(x, t, y, tap=tap)[1] - oracle).abs().max() < 1e-5


def test_published_sizes_and_positions():
    """Sizes in millions as the papers state them, with the arguments in the published order; positions as MAE's."""
    millions = lambda net: sum(p.numel() for p in net.parameters()) / 1e6
    with torch.device("meta"):
        for size, count in dict(s=33, b=130, l=458, xl=675).items():
            assert abs(millions(DiT(**DIT_SIZES[size])) - count) < 1
        for size, count in dict(s=44, m=131, l=287, h=501).items():
            assert abs(millions(UViT(32, 2, 4, num_classes=1001, **UVIT_SIZES[size])) - count) < 1.5
        state = DiT(32, 4, 4, 1152, 28, 16).state_dict() | UViT(32, 2, 4, 1152, 28, 16, num_classes=1001).state_dict()
        for key, rows in {"y_embedder.embedding_table.": 1001, "final_layer.linear.": 128, "decoder_pred.": 16}.items():
            assert state[f"{key}weight"].shape == (rows, 1152)
        assert state["pos_embed"].shape == (1, 258, 1152)
    table = DiT(4, 1, 3, 16, 1, 2).pos_embed[0].view(4, 4, 16)
    for row, col, i in [(0, 0, 0), (1, 3, 2), (3, 2, 1), (2, 1, 3)]:  # column first, sines then cosines
        angles = np.array([col, row]) * 10000 ** (-i / 4)
        expected = np.stack([np.sin(angles), np.cos(angles)], 1).flatten()
        np.testing.assert_allclose(table[row, col, i::4].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_null_class_and_alignment_up_to_its_block(name):
    net, (x, t, y), drop = randomised(NETWORKS[name]()), network_input(name), torch.tensor([True, False, False, True])
    aligned = repa.Aligned(net, repa.ConvProjector(net.width, 7), 2)
    output, student = aligned(x, t, y, drop)
    assert torch.equal(output, net(x, t, y, drop)) and repa.Aligned(net)(x, t, y, drop)[1] is None
    null = torch.where(drop, net.null_class, y)
    assert torch.allclose(net(x, t, null, torch.zeros_like(drop)), output, atol=1e-5)
    late = [f"network.{n}" for n in "blocks.2 blocks.3 mid_ out_ final_layer decoder_pred norm.".split()]
    losses = output.square().sum(), repa.alignment_loss(student, torch.randn(4, 16, 7)).sum()
    for loss, without in zip(losses, (("projector",), tuple(late))):
        aligned.zero_grad()
        loss.backward(retain_graph=True)
        reached = {n for n, p in aligned.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {n for n, p in aligned.named_parameters() if p.requires_grad and not n.startswith(without)}


def test_dit_drops_labels_itself_in_training_only():
    net, n = randomised(NETWORKS["dit maps"](class_dropout_prob=0.5)), 64
    x, t, y = torch.randn(1, 3, 8, 8).expand(n, -1, -1, -1), torch.zeros(n), torch.zeros(n, dtype=torch.long)
    kept = net(x, t, y, drop=torch.zeros(n, dtype=torch.bool))
    dropped = lambda: ((net(x, t, y) - kept).flatten(1).abs().amax(1) > 1e-4).sum()
    assert 10 < dropped() < 54 and net.eval() is net and dropped() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_what_does_not_fit_a_network_is_one_clear_line(name):
    net, (x, t, _), y = NETWORKS[name](), network_input(name, 2), torch.tensor([0, 5])  # 5 is the null class
    network, bare, image = type(net), type(net)(8, 4, 3, 8, 2, 1, num_classes=0), torch.randn(2, 3, 8, 8)
    assert len(net(x, t, y.int())) == 2 and bare.null_class is None and len(bare(image, t)) == 2
    drop, big, maps = torch.tensor([True, True]), torch.tensor([0, 6]), r"x \(2, .*takes \(N, "
    labels = {"class 6, .* 0 to 5": big, "class -1, .* 0 to 5": big - 1, ".* missing": None, ".*float32": y.float()}
    labels |= {".*bool": drop, r".*\(1,\)": y[:1], r".*\(2, 1\)": y[:, None]}
    calls = [(f"y: {message}", lambda y=y: net(x, t, y)) for message, y in labels.items()]
    calls += [("y: class 6", lambda: net(x, t, big, drop)), ("y: .*without classes", lambda: bare(image, t, y))]
    calls += [(f"tap {n}: .* 1 to {net.depth}", lambda n=n: net.tapped(x, t, y, tap=n)) for n in (0, net.depth + 1)]
    no_null = DiT(8, 4, 3, 8, 1, 1, num_classes=2, class_dropout_prob=0.0)
    calls += [("y: class 2, .* 0 to 1", lambda: no_null(image, t, y.clamp(max=1), drop))]
    others = (x[:, 1:], x[..., 1:], torch.randn(2, 16, 6) if x.ndim == 4 else image)
    calls += [(maps, lambda v=v: net(v, t, y)) for v in others]
    calls += [("num_tokens .*token_dim", lambda k=k: network(**{k: 16})) for k in ("num_tokens", "token_dim")]
    calls += [("patch 2 does not", lambda: network(9, 2)), (".* of .*num_heads", lambda: network(8, 2, 3, 10, 2, 3))]
    for message, call in calls:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


UVITS = [((8, 4, 3), dict(num_classes=11), "vp", 10, 0.1)]  # shape, arguments, path, classes, label dropout
UVITS += [((8, 2, 4), dict(conv=False, mlp_time_embed=True), "vp-sd", None, 0.0)]
UVITS += [((8, 2, 4), dict(num_classes=1000, qkv_bias=True), "vp-sd", 1000, 0.0)]  # no null class
UVITS += [((8, 2, 4), dict(num_classes=1001, mlp_ratio=2.0), "vp-sd", 1000, 0.1)]


@pytest.mark.parametrize("shape, network, path, classes, dropout", UVITS)
def test_published_uvit_is_read_off_its_keys(shape, network, path, classes, dropout):
    published, y = randomised(UViT(*shape, 128, 6, 4, **network)), torch.tensor([3, 7]) if classes else None
    config, state = uvit.read_published(published.state_dict())
    expected = {"side": 8, "channels": shape[2], "predict": "eps", "path": path, "label_dropout": dropout}
    expected["model"] = f"uvit-nano/{shape[1]}"
    assert expected.items() <= config.items() and config["classes"] == (classes and [str(i) for i in range(classes)])
    rows, x, t = network.get("num_classes", -1), torch.randn(2, shape[2], 8, 8), torch.rand(2)
    ours = UViT(*shape, 128, 6, 4, num_classes=rows, **config["network"])
    ours.load_state_dict(state)
    assert torch.equal(ours(x, t, y), published(x, t, y)) and dit.read_published(state, "dit") is None


@pytest.mark.parametrize("layout", ["SiT", "SiT without sigmas", "REPA", "older REPA"])
def test_published_sits_are_read_off_their_keys_with_time_from_data_to_noise(layout):
    published = randomised(DiT(8, 2, 3, num_classes=5, learn_sigma=layout == "SiT", **DIT_SIZES["nano"])).double()
    state, x, t, y = published.state_dict(), torch.randn(4, 3, 8, 8).double(), torch.rand(4).double(), torch.arange(4)
    output, _ = plain_dit(Weights(state), x, 1 - t if layout == "SiT" else t, y, 6, 4, 2)  # its own: noise at t = 0
    if "REPA" in layout:
        state = state | {"projectors.0.0.weight": torch.zeros(2)}
    if layout == "older REPA":  # blocks after the aligned one, the third, have a list of their own
        count = lambda key: int(key.split(".")[1]) if key.startswith("blocks.") else 0
        renamed = lambda key: re.sub(r"^blocks.\d+", f"decoder_blocks.{count(key) - 3}", key)
        state = {renamed(key) if count(key) > 2 else key: value for key, value in state.items()}
        assert "decoder_blocks.2.attn.proj.bias" in state and "blocks.3.attn.proj.bias" not in state
    config, weights = dit.read_published(state, "sit")
    assert config["model"] == "sit-nano/2" and (config["path"], config["predict"]) == ("flow", "v")
    ours = DiT(8, 2, 3, num_classes=5, learn_sigma=False, **DIT_SIZES["nano"]).double().eval()
    ours.load_state_dict(weights)
    assert (ours(x, t, y) - (-output[:, :3] if layout == "SiT" else output)).abs().max() < 1e-5


def test_docstring_examples_do_what_they_say(hub):
    shape = lambda text: tuple(map(int, text.split(", ")))
    for module in (dit, uvit):
        for line, before, after in re.findall(r"^    (.*?) +# \(N, (.*)\) -> (.*)$", module.__doc__, re.M):
            with torch.device("meta"):
                inputs = {"x": torch.empty(2, *shape(before)), "t": torch.empty(2), "y": torch.empty(2).long()}
                wanted = shape(before) if after == "the same" else shape(after[4:-1])
                assert eval(line, vars(module) | inputs).shape == (2, *wanted)
    names = dict(images=photos(2, 256), l1=F.l1_loss, decode=lambda z: F.interpolate(z[:, :3], scale_factor=16))
    names |= dict(latents=torch.randn(2, 4, 16, 16), PRESETS={"f8d4": vae.PRESETS["tiny"]})
    names |= dict(hidden=torch.randn(2, 256, 32), projector=repa.ConvProjector(32, 8))
    names["load_encoder"] = lambda spec: repa.load_encoder(f"{hub}:colours")
    for module, made in ((vae, "mean logvar images"), (dct, "tokens images"), (S, "loss"), (repa, "target loss")):
        lines, results = re.findall(r"^    (?!python )(.*)$", module.__doc__, re.M), vars(module) | names
        exec("\n".join(lines), results)
        assert all(results[name].isfinite().all() for name in made.split())


# ---- vae.py -----------------------------------------------------------------------------------------------


def plain_vae(w, x, levels, blocks, decode):
    side = "decoder" if decode else "encoder"
    conv = lambda name, x, **more: F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], **dict(padding="same") | more)
    norm = lambda name, x: F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def block(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)

    def attend(name, x):
        if f"{name}.norm.weight" not in w:
            return x
        h = norm(f"{name}.norm", x)
        q, k, v = (conv(f"{name}.{p}", h).flatten(2) for p in "qkv")
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / q.shape[1] ** 0.5, 2)
        return x + conv(f"{name}.proj_out", torch.einsum("nij,ncj->nci", weights, v).view(x.shape))

    def middle(x):
        x = attend(f"{side}.mid.attn_1", block(f"{side}.mid.block_1", x))
        return block(f"{side}.mid.block_2", x)

    x = conv(f"{side}.conv_in", conv("post_quant_conv", x) if decode else x)
    x = middle(x) if decode else x
    for i in reversed(range(levels)) if decode else range(levels):
        for j in range(blocks + decode):
            level = f"{side}.{'up' if decode else 'down'}.{i}"
            x = attend(f"{level}.attn.{j}", block(f"{level}.block.{j}", x))
        if decode and i:
            x = conv(f"decoder.up.{i}.upsample.conv", x.repeat_interleave(2, 2).repeat_interleave(2, 3))
        elif not decode and i < levels - 1:
            x = conv(f"encoder.down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), padding=0, stride=2)
    x = conv(f"{side}.conv_out", F.silu(norm(f"{side}.norm_out", x if decode else middle(x))))
    return x if decode else conv("quant_conv", x)


@torch.no_grad()
@pytest.mark.parametrize("attention", [(), (1, 2)])
def test_vae_equals_plain_steps_which_use_the_published_keys(attention):
    net, x = randomised(vae.VAE((32, 64, 32), 5, 2, attention)).double(), normal(2, 3, 12, 20)
    (mean, logvar), w = net.encode(x), Weights(net.state_dict())
    oracle = plain_vae(w, x, 3, 2, decode=False)
    assert mean.shape == logvar.shape == (2, 5, 3, 5)
    np.testing.assert_allclose(torch.cat((mean, logvar), 1).numpy(), oracle.clamp(None, 20).numpy(), atol=1e-9)
    np.testing.assert_allclose(net.decode(mean), plain_vae(w, mean, 3, 2, decode=True), atol=1e-9)
    assert w.read == set(w) and sum(".attn.0." in key for key in w) == 20 * len(attention)


def test_presets_have_their_published_sizes_and_published_autoencoders_are_read_off_their_keys():
    counts = {"f8d4": 83_653_863, "tiny": 954_567}
    for name, preset in vae.PRESETS.items():
        with torch.device("meta"):
            net = vae.VAE(**preset)
        assert name not in counts or sum(p.numel() for p in net.parameters()) == counts[name]
        assert name in ("tiny", "vavae", f"f{net.factor}d{net.latent_channels}")
        assert vae.read_published(net.state_dict())[0] == {"num_res_blocks": 2, "attention": ()} | preset
    state, unused = net.state_dict(), {"loss.logvar": 0, "model.diffusion_model.x": 0}
    inside = {f"first_stage_model.{key}": value for key, value in state.items()}
    for published in ({"state_dict": state | unused, "global_step": 5}, {"state_dict": inside | unused}):
        shape, ours = vae.read_published(published)
        assert shape == {"num_res_blocks": 2, "attention": ()} | preset and ours.keys() == state.keys()
        assert all(ours[key] is value for key, value in state.items())
    with pytest.raises(ValueError, match="original layout"):
        vae.read_published({"encoder.conv_in.weight": torch.zeros(1)})


def diffusers_names(levels, blocks, attention, old):
    """(diffusers' name, the original one) of every module with weights."""
    linear = "query key value proj_attn" if old else "to_q to_k to_v to_out.0"
    yield from ((name, name) for name in ("quant_conv", "post_quant_conv"))
    for side, tower, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        resnets = [(f"mid_block.resnets.{k}", f"mid.block_{k + 1}") for k in (0, 1)]
        attentions = [("mid_block.attentions.0", "mid.attn_1")]
        for i in range(levels):
            theirs, ours = f"{tower}_blocks.{i if tower == 'down' else levels - 1 - i}", f"{tower}.{i}"
            resnets += [(f"{theirs}.resnets.{j}", f"{ours}.block.{j}") for j in range(count)]
            attentions += [(f"{theirs}.attentions.{j}", f"{ours}.attn.{j}") for j in range(count) if i in attention]
            yield f"{side}.{theirs}.{tower}samplers.0.conv", f"{side}.{ours}.{tower}sample.conv"
        pairs = [(name, name) for name in ("conv_in", "conv_out")] + [("conv_norm_out", "norm_out")]
        same = [(name, name) for name in ("norm1", "conv1", "norm2", "conv2")] + [("conv_shortcut", "nin_shortcut")]
        inner = [("group_norm", "norm"), *zip(linear.split(), ("q", "k", "v", "proj_out"))]
        pairs += [(f"{a}.{x}", f"{b}.{y}") for a, b in resnets for x, y in same]
        pairs += [(f"{a}.{x}", f"{b}.{y}") for a, b in attentions for x, y in inner]
        yield from ((f"{side}.{theirs}", f"{side}.{ours}") for theirs, ours in pairs)


def as_diffusers(state, levels, blocks, attention=(), old=False):
    """A state dict in the original layout by diffusers' names, its attention linear."""
    made = {}
    for theirs, ours in diffusers_names(levels, blocks, attention, old):
        for end in ("weight", "bias"):
            if (value := state.get(f"{ours}.{end}")) is not None:
                linear = ".attentions." in theirs and value.ndim == 4
                made[f"{theirs}.{end}"] = value[:, :, 0, 0] if linear else value
    assert len(made) == len(state)
    return made


def as_safetensors(state, pad=0):
    """The bytes of a file of safetensors, written by hand."""
    names = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    header, parts, end = {"__metadata__": {"format": "pt"}}, [], 0
    for key, value in sorted(state.items()):
        parts.append(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        offsets, end = [end, end + len(parts[-1])], end + len(parts[-1])
        header[key] = {"dtype": names[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
    text = json.dumps(header).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def open_autoencoder(path):
    return train_vae.load_autoencoder(path, "cpu")


@torch.no_grad()
@pytest.mark.parametrize("attention", [(), (1, 2)])
def test_autoencoders_open_in_every_layout_and_serialisation(attention):
    """Outputs equal to the bit, and the same hash: keys of the original, of diffusers old and new, alone and within."""
    net, x = randomised(vae.VAE((32, 64, 64), 4, 1, attention)).eval(), photos(2, 16)
    state = net.state_dict()
    layouts = {"original": state, "within": {f"first_stage_model.{key}": value for key, value in state.items()}}
    layouts |= {f"diffusers-{old}": as_diffusers(state, 3, 1, attention, old) for old in (False, True)}
    within = {"within": "state_dict", "original": "model"}  # of some files
    for dtype in (torch.float32, torch.float16, torch.bfloat16) if attention else (torch.float32,):
        rounded, hashes = copy.deepcopy(net).to(dtype).float(), set()
        for pad, (name, layout) in enumerate(layouts.items()):
            layout = {key: value.to(dtype) for key, value in layout.items()}
            torch.save({within[name]: layout, "epoch": 3} if name in within else layout, f"{name}.bin")
            Path(f"{name}.safetensors").write_bytes(as_safetensors(layout, pad))  # aligned and not
            for file in (f"{name}.bin", f"{name}.safetensors"):
                ours, info = train_vae.load_autoencoder(file, "cpu")
                mean, logvar = ours.encode(x)
                assert distance((mean, logvar), rounded.encode(x)) == 0
                assert distance(ours.decode(mean), rounded.decode(mean)) == 0
                assert ours.latent_channels == 4 and info["config"]["attention"] == attention
                assert {p.dtype for p in ours.parameters()} == {torch.float32}
                hashes.add(info["weights"])
        assert len(hashes) == 1
    if not attention:
        return
    looking(f"--spectrum original.bin diffusers-True.safetensors --data {write_photos('p', 4)} --out s --size 16")
    results = json.loads(Path("s/spectrum.json").read_text())
    assert list(results) == ["original", "diffusers-True"] and distance(*results.values()) < 1e-3  # bf16 both


DIFFUSERS_KEYS = """
encoder.conv_in.weight (128, 3, 3, 3) encoder.conv_in.weight
encoder.down_blocks.0.resnets.1.norm2.bias (128,) encoder.down.0.block.1.norm2.bias
encoder.down_blocks.1.resnets.0.conv_shortcut.weight (256, 128, 1, 1) encoder.down.1.block.0.nin_shortcut.weight
encoder.down_blocks.2.downsamplers.0.conv.weight (512, 512, 3, 3) encoder.down.2.downsample.conv.weight
encoder.mid_block.attentions.0.group_norm.weight (512,) encoder.mid.attn_1.norm.weight
encoder.mid_block.attentions.0.to_q.weight (512, 512) encoder.mid.attn_1.q.weight
decoder.mid_block.attentions.0.key.weight (512, 512) decoder.mid.attn_1.k.weight
decoder.mid_block.attentions.0.proj_attn.bias (512,) decoder.mid.attn_1.proj_out.bias
encoder.mid_block.attentions.0.to_out.0.weight (512, 512) encoder.mid.attn_1.proj_out.weight
encoder.mid_block.resnets.1.conv2.weight (512, 512, 3, 3) encoder.mid.block_2.conv2.weight
encoder.conv_norm_out.weight (512,) encoder.norm_out.weight
encoder.conv_out.weight (8, 512, 3, 3) encoder.conv_out.weight
decoder.up_blocks.0.resnets.2.conv1.weight (512, 512, 3, 3) decoder.up.3.block.2.conv1.weight
decoder.up_blocks.0.upsamplers.0.conv.bias (512,) decoder.up.3.upsample.conv.bias
decoder.up_blocks.1.resnets.0.conv1.weight (512, 512, 3, 3) decoder.up.2.block.0.conv1.weight
decoder.up_blocks.2.resnets.0.conv_shortcut.weight (256, 512, 1, 1) decoder.up.1.block.0.nin_shortcut.weight
decoder.up_blocks.3.resnets.0.conv1.weight (128, 256, 3, 3) decoder.up.0.block.0.conv1.weight
"""  # of sd-vae-ft-mse and its older files, in diffusers' layout and in the original one


def test_keys_of_diffusers_are_the_published_ones():
    rows = [re.fullmatch(r"(\S+) \((.*)\) (\S+)", row).groups() for row in DIFFUSERS_KEYS.split("\n")[1:-1]]
    shapes = {theirs: [int(n) for n in shape.split(",") if n] for theirs, shape, _ in rows}
    ours = vae.from_diffusers({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    assert list(ours) == [key for *_, key in rows]
    with torch.device("meta"):
        published = vae.VAE(**vae.PRESETS["f8d4"]).state_dict()
    assert all(published[key].shape == value.shape for key, value in ours.items())


@torch.no_grad()
def test_folders_of_diffusers_open_with_what_their_config_says():
    net = randomised(vae.VAE((32, 64), 4, 1)).eval()
    bare = {key: value for key, value in net.state_dict().items() if "quant_conv" not in key}
    state = as_diffusers(bare, 2, 1)
    config = {"_class_name": "AutoencoderKL", "use_quant_conv": False, "use_post_quant_conv": False}
    net.quant_conv, net.post_quant_conv = torch.nn.Identity(), torch.nn.Identity()
    (mean, std), x, scale = ([0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]), photos(2, 16), 1.5305
    cases = {"absent": ({}, 0.18215, 0.0), "sd3": ({"scaling_factor": scale, "shift_factor": 0.0609}, scale, 0.0609)}
    values = {"scaling_factor": scale, "shift_factor": None, "latents_mean": mean, "latents_std": std}
    cases |= {"by channel": (values, [scale / s for s in std], mean)}
    for name, (more, scale, shift) in cases.items():
        folder = Path(name, "vae")  # as a pipeline's
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config | more))
        torch.save(state, folder / "diffusion_pytorch_model.bin")
        (folder / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not this one")
        for path in (folder.parent, folder, folder / "diffusion_pytorch_model.bin"):
            ours, info = train_vae.load_autoencoder(path, "cpu")
            assert distance(ours.encode(x)[0], net.encode(x)[0]) == 0 and info["config"]["shift"] == shift
            assert np.allclose(info["config"]["scale"], scale) and train_vae.name_of(folder) == "vae"
    config = config | {"scaling_factor": 0.5, "latents_mean": mean}
    bad = {"use_quant_conv": (True, "has no quant_conv"), "norm_num_groups": (16, "norm_num_groups to 16; it is 32")}
    bad |= {"latents_std": ([1.0, 2.0], "do not fit 4 channels"), "act_fn": ("gelu", "act_fn to gelu")}
    bad |= {"scaling_factor": (-1, "the scales positive"), "shift_factor": ("x", "do not fit")}
    for key, (value, message) in bad.items():
        (folder / "config.json").write_text(json.dumps(config | {key: value}))
        refuses(open_autoencoder, {str(folder): message})
    for text, message in {"{": "cannot be read as JSON", '{"_class_name": "UNet2DConditionModel"}': ""}.items():
        (folder / "config.json").write_text(text)
        if message:
            refuses(open_autoencoder, {str(folder): message})
    assert "scale" not in train_vae.load_autoencoder(folder, "cpu")[1]["config"]  # another network's says nothing
    (folder / "diffusion_pytorch_model.bin").unlink()
    refuses(open_autoencoder, {str(folder): "text, no weights"})


def lying(**entries):
    """A file of safetensors that holds 24 bytes, with this header."""
    whole = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    whole |= {"b": {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]}}
    text = json.dumps({key: value for key, value in (whole | entries).items() if value is not None}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(range(24))


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16), **more):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets} | more}


LIES = {  # bytes -> what is said of them
    "lying()[:-1]": "24 bytes of tensors announced, 23 there",
    "lying() + b' '": "24 bytes of tensors announced, 25 there",
    "lying()[:40]": "a header of 128 bytes in a file of 40",
    "struct.pack('<Q', 2**55) + b'{}'": "a header of 36028797018963968 bytes in a file of 10",
    "struct.pack('<Q', 2**30) + b'{' + bytes(9)": "a header of 1073741824 bytes",
    "struct.pack('<Q', 3) + b'{,}'": "no JSON",
    "struct.pack('<Q', 2) + b'{\\xff'": "no JSON",
    "struct.pack('<Q', 80000) + b'{' + b'[' * 79999": "no JSON",
    "lying(a=None)": "'b' begins at byte 16, the tensors before it end at 0",
    "lying(b=None)": "16 bytes of tensors announced, 24 there",
    "lying(**entry(offsets=(0, 20), shape=(5,)))": "'b' begins at byte 16, .* end at 20",
    "lying(**entry(offsets=(8, 24)))": "'a' begins at byte 8",
    "lying(**entry(offsets=(16, 0)))": "'a', .* takes 16 bytes, not .16, 0",
    "lying(**entry(offsets=(-16, 0)))": "'a' has the offsets .-16, 0",
    "lying(**entry(offsets=(0, 16, 24)))": "'a' has the offsets",
    "lying(**entry(offsets=(0, 16.0)))": "'a' has the offsets",
    "lying(**entry(offsets=(0, 2**70), shape=(2**68,)))": "'a' has the shape",
    "lying(**entry(offsets=None))": "'a' has the offsets None",
    "lying(**entry(shape=(-2, -2)))": "'a' has the shape",
    "lying(**entry(shape=(True, 4)))": "'a' has the shape",
    "lying(**entry(shape='4'))": "'a' has the shape '4'",
    "lying(**entry(shape=(2, 3)))": "'a', .2, 3. of F32, takes 24 bytes",
    "lying(**entry(dtype='F64'))": "of F64, takes 32 bytes",
    "lying(**entry(dtype='F33'))": "'a' has the dtype 'F33'",
    "lying(**entry(dtype=['F32']))": "'a' has the dtype",
    "lying(a=3)": "'a' has the dtype None",
    "lying(__metadata__={'n': 1})": "__metadata__ is no text",
    "lying(__metadata__=[])": "__metadata__ is no text",
}


def test_safetensors_are_read_exactly_and_lies_refused_in_a_line():
    Path("true").write_bytes(lying(none={"dtype": "I64", "shape": [0, 3], "data_offsets": [24, 24]}))
    state, data = train_vae.load_plain("true"), bytes(range(24))
    assert np.array_equal(state["a"], np.frombuffer(data[:16], np.float32).reshape(2, 2))
    assert np.array_equal(state["b"], np.frombuffer(data[16:], np.float16)) and state["none"].shape == (0, 3)
    state["a"].zero_()  # what was read can be trained on; the file stays
    assert Path("true").read_bytes()[-24:] == data
    for expression, message in LIES.items():
        Path("lie").write_bytes(eval(expression))
        refuses(train_vae.load_plain, {"lie": f"^lie: safetensors with a false header.*{message}"})


def test_what_a_file_seems_to_be_is_said_in_a_line():
    net = vae.VAE((32, 64), 4, 1)
    state = net.state_dict()
    torch.save(state, "whole.pt")
    whole = Path("whole.pt").read_bytes()
    contents = {b"": "is empty", b"\n<!DOCTYPE html><html>": "a web page", b"<?xml": "a web page", b"hi": "text, no"}
    contents |= {b"version https://git-lfs.github.com/spec/v1\noid": "git lfs pull", b'{"a": 1, "b": {}}': "JSON"}
    contents |= {
        whole[: len(whole) // 2]: "half a file of torch.save",
        as_safetensors(state)[:-9]: "not all of the file",
    }
    contents |= {b"\x80\x02}q\x00(": "cannot be read", bytes(99): "refused"}
    for content, message in contents.items():
        Path("file.bin").write_bytes(content)
        refuses(open_autoencoder, {"file.bin": f"^file.bin: .*{message}"})
    os.rename("whole.pt", "whole.safetensors")  # the content says what it is, not the name
    assert distance(open_autoencoder("whole.safetensors")[0].state_dict(), state) == 0
    lacking = {key: value for key, value in state.items() if "mid.attn_1.q" not in key}
    other = state | {"decoder.norm_out.weight": torch.zeros(5)}
    strange = {key: value for key, value in state.items() if not key.startswith("encoder.down.0")}
    half = as_diffusers(state, 2, 1) | {"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(2, 2)}
    keys = {"blocks.0.attn.to_q.lora_A.weight": "a LoRA", "down_blocks.0.attentions.0.transformer_blocks.0.x": "UNet"}
    keys |= {"model.diffusion_model.out.0.bias": "whole Stable", "Mixed_5b.branch1x1.conv.weight": "Inception"}
    keys |= {"features.0.weight": "VGG-16", "lin0.model.1.weight": "LPIPS", "some.key": "nothing known here"}
    cases = [({key: torch.zeros(1)}, word) for key, word in keys.items()]
    uvits = UViT(8, 2, 4, **UVIT_SIZES["nano"]), UViT(num_tokens=16, token_dim=24, **UVIT_SIZES["nano"])
    cases += [(uvits[0].state_dict(), "a U-ViT "), ({"model": uvits[1].state_dict()}, "DCTdiff's U-ViT")]
    cases += [({"ema": DiT(8, 2, 4, **DIT_SIZES["nano"]).state_dict()}, "a DiT or a SiT")]
    cases += [(lacking, "Missing key.*encoder.mid.attn_1.q.weight"), (other, "size mismatch for decoder.norm_out")]
    cases += [(strange, "no 'encoder.down.0.block.0.conv1.weight'.*original layout "), ({}, "is empty")]
    cases += [({"encoder.down_blocks.0.x": torch.zeros(1)}, "diffusers' layout "), ([1], "is empty")]
    cases += [({1: torch.zeros(1)}, "nothing known here"), ({"state_dict": torch.zeros(1)}, "nothing known here")]
    cases += [({"config": 1, "model": {}, "ema": None, "step": 0}, "")]
    cases += [(half, "widths .2, 64. must be"), (state | {"decoder.conv_in.weight": torch.zeros(())}, "neither")]
    for content, message in cases:
        torch.save(content, "file.pt")
        refuses(open_autoencoder, {"file.pt": f"^file.pt: .*{message}"})


def test_checkpoints_of_lightning_open_without_their_objects(monkeypatch):
    """Beside the weights, Stable Diffusion's and latent diffusion's .ckpt hold a callback's class and numpy scalars."""
    net, name = vae.VAE((32,), 4, 1), "pytorch_lightning.callbacks.model_checkpoint"
    callback = type("ModelCheckpoint", (), {"__module__": name})
    for module in ("pytorch_lightning", name):  # pickle imports both
        monkeypatch.setitem(sys.modules, module, type("Module", (), {"ModelCheckpoint": callback}))
    rest = {"callbacks": {callback: {"best_model_score": np.float64(0.5)}}, "lr_schedulers": [callback()]}
    torch.save(rest | {"global_step": 3, "state_dict": net.state_dict()}, "model.ckpt")
    torch.save(rest | {"code": Path("x")}, "code.ckpt")
    assert distance(net.state_dict(), open_autoencoder("model.ckpt")[0].state_dict()) == 0
    refuses(open_autoencoder, {"code.ckpt": "refused, it holds more than tensors"})


def test_psnr_and_ssim_equal_numpy_and_scipy():
    x, y = ((photos(2, 32, seed=s) + 1) * 127.5 for s in (0, 1))
    y = (x + 0.2 * y).clamp(0, 255).round()
    mse = ((x - y) ** 2).numpy().mean((1, 2, 3))
    np.testing.assert_allclose(vae.psnr(x, y).numpy(), 10 * np.log10(255**2 / mse), rtol=1e-5)
    mean = lambda v: scipy.ndimage.gaussian_filter(v, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5))[..., 5:-5, 5:-5]
    a, b = x.double().numpy(), y.double().numpy()
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    oracle = (2 * ma * mb + 6.5025) * (2 * cov + 58.5225) / ((ma**2 + mb**2 + 6.5025) * (va + vb + 58.5225))
    np.testing.assert_allclose(vae.ssim(x, y).numpy(), oracle.mean((1, 2, 3)), rtol=1e-9)
    assert vae.ssim(x, x).min() > 0.9999


def test_statistics_of_latents_equal_numpys_over_drawn_latents():
    """Means and variances per channel, and the principal components of the channels, by many draws of the posterior."""
    rng, statistics, drawn = np.random.default_rng(0), vae.LatentStatistics(), []
    mix = rng.normal(size=(4, 4))
    for n in (3, 5):
        mean = torch.from_numpy(np.einsum("cd,ndhw->nchw", mix, rng.normal(size=(n, 4, 6, 6))) + 2.0)
        logvar = torch.from_numpy(rng.normal(size=(n, 4, 6, 6)) - 1)
        statistics.add(mean, logvar)
        noise = rng.normal(size=(2000, *mean.shape))
        drawn.append((mean.numpy() + np.exp(logvar.numpy() / 2) * noise).transpose(2, 0, 1, 3, 4).reshape(4, -1))
    z, result = np.concatenate(drawn, 1), statistics.result()
    assert np.allclose(result["mean"], z.mean(1), atol=0.01)
    assert np.allclose(result["channel_std"], z.std(1), rtol=0.01)
    assert abs(result["std"] - z.std()) < 0.02 and result["scale"] == 1 / result["std"]
    shares = np.linalg.svd(z - z.mean(1, keepdims=True), full_matrices=False)[1] ** 2
    assert np.allclose(result["eigenspectrum"], shares / shares.sum(), atol=0.005)


def test_discriminator_and_its_losses():
    net, x = vae.PatchGAN(), torch.randn(2, 3, 64, 64)
    assert net(x).shape == (2, 1, 6, 6) and net(x[..., :24, :24]).shape == (2, 1, 1, 1) and net.least_size == 24
    assert (net(x)[:1] - net(x[:1])).abs().max() < 1e-5  # an image's logits depend on no other image
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert torch.isclose(vae.hinge_loss(real, fake), torch.tensor(0.5 * (0 + 0.5 + 2 + 0 + 1 + 2) / 3))
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.isclose(vae.adaptive_weight((w * 3).sum(), (w**2).sum(), w), torch.tensor(18**0.5 / (20**0.5 + 1e-4)))
    assert vae.adaptive_weight((w * 1e9).sum(), (w * 1e-3).sum(), w) == 1e4  # clamped


@pytest.fixture(scope="session")
def lpips_files(tmp_path_factory):
    """Random weights in the layout of the two published files -> the files, and the network they stand for."""
    folder, vgg = tmp_path_factory.mktemp("lpips"), torchvision.models.vgg16()
    unused = {key: torch.zeros(()).expand(value.shape) for key, value in vgg.state_dict().items() if "class" in key}
    heads = [torch.rand(1, channels, 1, 1) for channels in (64, 128, 256, 512, 512)]
    torch.save(vgg.state_dict() | unused, folder / "vgg.pth", _use_new_zipfile_serialization=False)  # as of 2017
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, folder / "heads.pth")
    return folder / "vgg.pth", folder / "heads.pth", vgg.features, heads


def test_lpips_equals_its_definition(lpips_files, tmp_path):
    (vgg, heads, features, lin), folder = lpips_files, torch.hub.get_dir()
    lpips, x, y = vae.load_lpips(vgg, heads), photos(2, 32), photos(2, 32, seed=1).requires_grad_()
    assert torch.hub.get_dir() == folder
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (repa.IMAGENET_MEAN, repa.IMAGENET_STD))
    a, b, total, ends = ((x + 1) / 2 - mean) / std, ((y + 1) / 2 - mean) / std, 0, (0, 4, 9, 16, 23, 30)
    for start, end, weight in zip(ends, ends[1:], lin):  # a stage begins with the pooling that closes the one before
        a, b = features[start:end](a), features[start:end](b)
        apart = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        total = total + (apart * weight).sum(1).mean((1, 2))
    ours = lpips(x, y)
    assert ours.shape == (2,) and torch.allclose(ours, total, rtol=1e-3)  # torch-fidelity rounds mean and std
    assert torch.autograd.grad(ours.sum(), y)[0].any() and not any(p.requires_grad for p in lpips.parameters())
    (tmp_path / "broken.pth").write_bytes(b"broken")
    for file in (tmp_path / "broken.pth", tmp_path / "absent.pth"):
        with pytest.raises(ValueError, match=f"LPIPS heads weights {file}"):
            vae.load_lpips(vgg, file)
    with pytest.raises(ValueError, match=r"VGG-16 weights .*heads.pth: no features"):
        vae.load_lpips(heads, vgg)


# ---- repa.py ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(0.6, 2.0), (0.3, 0.9), (1.0, 8.0), (2.0, 300.0)])
def test_dog_target_equals_a_direct_convolution(low, high):
    """The average at every position by loops over all others; what lies beyond the border has no weight."""
    z, (rows, cols) = normal(2, 36, 5).float() + 3, np.mgrid[:6, :6]
    field, h = z.mT.unflatten(2, (6, 6)).double().numpy(), np.zeros((2, 5, 6, 6))
    for (i, j), (sign, sigma) in itertools.product(np.ndindex(6, 6), ((1, low), (-1, high))):
        weights = np.exp(-((rows - i) ** 2 + (cols - j) ** 2) / (2 * sigma**2))
        h[..., i, j] += sign * (field * weights).sum((-2, -1)) / weights.sum()
    oracle = h / (h.std((2, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(repa.as_map(repa.dog_target(z, low, high)).numpy(), oracle, atol=2e-4)


def test_dog_has_irepa_at_its_limits_and_constants_give_zero():
    z, dog, infinity = 2 + normal(3, 64, 7).float(), repa.dog_target, float("inf")
    for gamma in (0.6, 1.0):
        oracle = (z - gamma * z.mean(1, keepdim=True)) / z.std(1, correction=0, keepdim=True)
        np.testing.assert_allclose(repa.irepa_target(z, gamma).numpy(), oracle.numpy(), atol=1e-5)
    for low, high, tolerance in ((0, infinity, 1e-5), (0.05, 1e5, 1e-4)):  # gamma 1
        np.testing.assert_allclose(dog(z, low, high).numpy(), oracle.numpy(), atol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        under = dog(z, 0.6, 2.0)
    assert torch.equal(under, dog(z, 0.6, 2.0)) and torch.equal(repa.resize_tokens(z, 8), z)
    for low, high in ((0, 2.0), (0.6, 2.0), (0, infinity)):  # no constant gets through, alone or added
        assert all(dog(torch.full((2, 25, 3), level), low, high).abs().max() < 1e-3 for level in (1.0, -317.3, 0.1))
        assert torch.allclose(dog(z + 5, low, high), dog(z, low, high), atol=1e-4)


def test_hog_by_loops():
    x = photos(2, 24)
    tokens, summary = repa.load_encoder("hog")(x)
    assert tokens.shape == (2, 9, 36) and torch.allclose(summary, tokens.mean(1))
    padded, cells = np.pad(x[1].double().numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge"), np.zeros((3, 3, 9))
    for i, j in np.ndindex(24, 24):
        dx, dy = padded[:, i + 1, j + 2] - padded[:, i + 1, j], padded[:, i + 2, j + 1] - padded[:, i, j + 1]
        channel = np.hypot(dx, dy).argmax()
        place = np.arctan2(dy[channel], dx[channel]) % np.pi / np.pi * 9 - 0.5
        low, length = int(np.floor(place)), np.hypot(dx, dy)[channel] / 64
        cells[i // 8, j // 8, low % 9] += length * (low + 1 - place)
        cells[i // 8, j // 8, (low + 1) % 9] += length * (place - low)
    around = np.pad(cells, ((1, 1), (1, 1), (0, 0)), mode="edge")
    for i, j in np.ndindex(3, 3):
        blocks = [around[i + a : i + a + 2, j + b : j + b + 2] for a in (0, 1) for b in (0, 1)]
        parts = [np.minimum(cells[i, j] / np.sqrt((block**2).sum() + 1e-6), 0.2) for block in blocks]
        np.testing.assert_allclose(tokens[1, 3 * i + j].numpy(), np.concatenate(parts), atol=2e-4)


def cubic_by_loops(image, n):
    """(C, m, m) -> (C, n, n) by Keys' cubic convolution (a = -0.75) of the four nearest pixels, edges repeated."""
    near, far = lambda d: 1.25 * d**3 - 2.25 * d**2 + 1, lambda d: -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    m, matrix = image.shape[-1], np.zeros((n, image.shape[-1]))
    for i in range(n):
        centre = (i + 0.5) * m / n - 0.5
        for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            d = abs(centre - j)
            matrix[i, min(max(j, 0), m - 1)] += near(d) if d <= 1 else far(d) if d < 2 else 0
    return matrix @ image @ matrix.T


def test_encoder_preprocessing():
    seen, network = [], torch.nn.Conv2d(3, 3, 1)
    tokens_of = lambda x: {"x_norm_patchtokens": F.avg_pool2d(x, 14).flatten(2).mT, "x_norm_clstoken": x.mean((2, 3))}
    network.patch_size, network.forward_features = 14, lambda x: seen.append(x) or tokens_of(x)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (repa.IMAGENET_MEAN, repa.IMAGENET_STD))
    x = (photos(2, 48) + 0.2 * normal(2, 3, 48, 48).float()).clamp(-1, 1)  # detail that antialiasing would take
    for asked, side in ((224, 16), (448, 32), (100, 7)):
        encoder = repa.Encoder(network, asked)
        tokens, summary = encoder(x)
        assert tokens.shape == (2, side**2, 3) and summary.shape == (2, 3)
        oracle = (torch.from_numpy(cubic_by_loops((x[0].double().numpy() + 1) / 2, 14 * side)) - mean) / std
        assert (seen[-1][0] - oracle).abs().max() < 1e-4
    assert not any(p.requires_grad for p in encoder.parameters())
    repa.Encoder(network, 28, antialias=True)(x)  # as scores ask for it, and Pillow does it
    pixels = Image.fromarray(((x[0] + 1) * 127.5).round().permute(1, 2, 0).byte().numpy())
    down = torch.from_numpy(np.asarray(pixels.resize((28, 28), Image.Resampling.BICUBIC)) / 255).permute(2, 0, 1)
    assert (seen[-1][0] - (down - mean) / std).abs().mean() < 0.02
    for features in ({"x_norm_clstoken": x}, x, {"x_norm_patchtokens": x}):
        network.forward_features = lambda x, features=features: features
        with pytest.raises(ValueError, match="no patch tokens"):
            encoder(x)


def test_an_encoder_that_cannot_be_loaded_is_one_line_with_its_remedy(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    offline = urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "urlopen", lambda *a, **k: (_ for _ in ()).throw(offline))
    bad = {f"{hub}:fetching": f"127.0.0.1:9/weights.pth .*{tmp_path}/cache.*FOLDER:fetching", "nonsense": "neither hog"}
    bad |= {f"{hub}:absent": "gave no entry 'absent' .*no such thing", f"{hub}:broken": "no forward_features"}
    bad |= {f"{hub}:misspelt": "gave no entry 'misspelt' .*misspelt", f"{tmp_path}:entry": "holds no hubconf.py"}
    bad |= {"no/such:vit": f"https://github.com/no/such.* {tmp_path}/cache.*FOLDER:vit"}
    for spec, message in bad.items():
        with pytest.raises(ValueError, match=f"^[^\n]*{message}"):
            repa.load_encoder(spec)


def test_inception_equals_torch_fidelitys(tmp_path, monkeypatch, capsys):
    from torch_fidelity import feature_extractor_inceptionv3 as published

    with monkeypatch.context() as patched:  # random weights instead of those it downloads
        patched.setattr(published.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patched.setattr(published, "load_state_dict_from_url", lambda *a, **k: {})
        oracle = published.FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    torch.save(oracle.state_dict(), "inception.pth")
    encoder = repa.load_encoder("inception", weights="inception.pth")
    tokens, summary = encoder(photos(2, 48))
    features, logits = oracle(((photos(2, 48) + 1) * 127.5).round().byte())
    assert torch.equal(summary, features) and summary.std() > 0
    torch.testing.assert_close(encoder.logits(summary), logits)
    monkeypatch.setattr(sample, "frechet_distance", lambda a, b: 7.0)  # of 2,048 features it takes long
    sets = ({"images": n, "features": 9 * normal(n, 2048).relu().float()} for n in (40, 30))
    score = sample.score(*sets, SimpleNamespace(encoder=encoder, device="cpu"), {"features": "inception"}, ".")
    p = F.softmax(9 * normal(40, 2048).relu() @ oracle.fc.weight.double().mT, 1)
    p = p[np.random.RandomState(2020).permutation(40)].view(10, 4, -1)
    oracle = (p * (p / p.mean(1, keepdim=True)).log()).sum(2).mean(1).exp().mean().item()
    assert score["inception_score"] == pytest.approx(oracle, rel=1e-3) and oracle > 1.1
    rows = r"FID +7 +40 +30\n(.*\n)*KID .*15\nInception Score .* 40 +- +\S+  10 splits\n"
    assert re.search(rows, capsys.readouterr().out)
    assert tokens.shape == (2, 1, 2048) and torch.equal(tokens[:, 0], summary)
    Path("junk.pth").write_bytes(b"junk")
    for file in ("junk.pth", "absent.pth"):
        with pytest.raises(ValueError, match="could not be loaded .*--features-weights FILE"):
            repa.load_encoder("inception", weights=file)


def frechet_by_hand(a, b):
    """Of features (n, D), by the square root of a matrix, which torch-fidelity does not take."""
    (mu1, s1), (mu2, s2) = ((np.mean(x, 0), np.cov(x, rowvar=False)) for x in (np.float64(a), np.float64(b)))
    return ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)


def test_scores_equal_their_definitions_by_loops():
    a, b = (1.5 * normal(23, 5) + 1).float(), normal(31, 5, seed=1).float()
    assert repa.frechet_distance(a, b) == pytest.approx(frechet_by_hand(a, b))
    assert repa.frechet_distance(repa.statistics(a), repa.statistics(b)) == repa.frechet_distance(a, b)
    # subsets are drawn at random, so that their mean tends to the unbiased estimate from all pairs
    kernel = lambda x, y: (float(x.double() @ y.double()) / 5 + 1) ** 3
    within = (np.mean([kernel(x, y) for x, y in itertools.permutations(z, 2)]) for z in (a, b))
    full = sum(within) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    kid = repa.kernel_distance(a, b)
    assert kid["kid_subset_size"] == 11 and abs(kid["kid"] - full) < 4 * kid["kid_std"] / 10
    # the ball of every point reaches its third neighbour
    within = lambda x, y: np.mean([any(scipy.spatial.distance.cdist(y, [p]) <= radii(y)) for p in x])
    radii = lambda y: np.sort(scipy.spatial.distance.cdist(y, y), 1)[:, 3:4]
    x, y = a.double().numpy(), b.double().numpy()
    assert repa.precision_recall(a, b) == pytest.approx({"precision": within(x, y), "recall": within(y, x)}, abs=1e-6)
    assert 0 < within(x, y) < 1 and 0 < within(y, x) < 1
    # exp(entropy of the mean - mean entropy), in ten parts of a shuffled set
    logits = 2 * normal(43, 7)
    p = scipy.special.softmax(logits.numpy()[np.random.RandomState(2020).permutation(43)], 1)
    parts = [p[k * 43 // 10 : (k + 1) * 43 // 10] for k in range(10)]
    entropy = functools.partial(scipy.stats.entropy, axis=-1)
    scores = [np.exp(entropy(part.mean(0)) - entropy(part).mean()) for part in parts]
    inception = {"inception_score": np.mean(scores), "inception_score_std": np.std(scores)}
    assert repa.inception_score(logits.float()) == pytest.approx(inception, rel=1e-5)


def test_scores_of_gaussians_are_their_closed_forms(monkeypatch):
    """x ~ N(0, I) and y ~ N(m, 4 I) in four dimensions."""
    monkeypatch.setattr(repa, "KID_SUBSET", 100)
    m, d = torch.tensor([1.0, 0.5, 0, -0.5]), 4
    x, y = normal(20_000, d).float(), (2 * normal(20_000, d, seed=1) + m).float()
    square = (m @ m).item()
    assert repa.frechet_distance(x, y) == pytest.approx(square + d, rel=0.02)

    def third_moment(a, b, s, t):  # E[(u.v / d + 1)^3], u ~ N(a, s I), v ~ N(b, t I): the moments of u.v
        aa, bb, ab = a @ a, b @ b, a @ b
        second = ab**2 + t * aa + s * bb + s * t * d
        third = ab**3 + 3 * ab * (s * bb + t * aa + s * t * (d + 2))
        return (third / d**3 + 3 * second / d**2 + 3 * ab / d + 1).item()

    nil = torch.zeros(d)
    expected = third_moment(nil, nil, 1, 1) + third_moment(m, m, 4, 4) - 2 * third_moment(nil, m, 1, 4)
    kid = repa.kernel_distance(x, y)
    assert kid["kid_subset_size"] == 100 and abs(kid["kid"] - expected) < 5 * kid["kid_std"] / 10
    same = repa.kernel_distance(x[::2], x[1::2])  # unbiased: 0 in the mean, where the Frechet distance is above it
    assert abs(same["kid"]) < 4 * same["kid_std"] / 10
    assert all(share > 0.9 for share in repa.precision_recall(x[:1000], x[1000:3000]).values())
    assert repa.precision_recall(x[:1000], x[1000:3000] + 100) == {"precision": 0, "recall": 0}
    few = [{**repa.kernel_distance(x[:n], y), **repa.precision_recall(x[:n], y)} for n in (0, 2, 3)]
    assert few == [{"kid": None, "precision": None, "recall": None}] * 3
    assert repa.inception_score(x[:19]) == {"inception_score": None} and repa.kernel_distance(x[:4], y)["kid"] > 0


def test_principal_colours():
    tokens = normal(3, 16, 7).float() * torch.arange(1, 8)
    flat = (tokens - tokens.mean((0, 1))).view(-1, 7).double().numpy()
    axes = np.linalg.eigh(flat.T @ flat)[1][:, :-4:-1]  # of the three largest variances
    oracle = flat @ axes / (2 * (flat @ axes).std(0, ddof=1))
    ours = F.avg_pool2d(repa.principal_colours(tokens, 8), 2).permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    for colour, expected in zip(ours.T, oracle.clip(-1, 1).T):  # an axis has no sign
        assert min(np.abs(colour - expected).max(), np.abs(colour + expected).max()) < 1e-3


def test_projectors_and_loss():
    hidden, z, mlp, conv = normal(2, 16, 12), normal(2, 16, 7), repa.MLPProjector(12, 7), repa.ConvProjector(12, 7)
    hidden, field = hidden.float(), hidden[1].float().view(4, 4, 12)
    assert [m.out_features for m in mlp if hasattr(m, "out_features")] == [2048, 2048, 7]
    assert torch.allclose(mlp(hidden)[0, 3], mlp(hidden[0, 3]), atol=1e-5)  # token by token
    near = torch.einsum("hwc,ochw->o", field[1:4, 0:3], conv.conv.weight) + conv.conv.bias  # of row 2, column 1
    assert torch.allclose(conv(hidden)[1, 2 * 4 + 1], near, atol=1e-5)
    a, b = hidden[..., :7].double().numpy(), z.numpy()
    cosines = (a * b).sum(2) / np.linalg.norm(a, axis=2) / np.linalg.norm(b, axis=2)
    np.testing.assert_allclose(repa.alignment_loss(hidden[..., :7], z).numpy(), -cosines.mean(1), atol=1e-6)


@pytest.mark.parametrize("side, least", [(8, 6), (5, 6), (4, 6), (3, 4), (2, 2)])
def test_lds_by_loops(side, least):
    """The largest distance on a grid is 2 (side - 1)."""
    z, near, far = torch.randn(2, side**2, 7) + torch.randn(7), [], []
    u = F.normalize(z[1].double(), dim=1).numpy()
    for i, j in np.ndindex(side**2, side**2):
        apart = abs(i // side - j // side) + abs(i % side - j % side)
        near += [u[i] @ u[j]] * (apart == 1)
        far += [u[i] @ u[j]] * (apart >= least)
    assert abs(repa.lds(repa.as_map(z))[1].item() - (np.mean(near) - np.mean(far))) < 1e-6
    assert repa.lds(torch.ones(1, 4, side, side)).abs() < 1e-6 and repa.lds(torch.ones(1, 4, 1, 1)).abs() < 1e-6


BYTES, PIXEL_RANGE = (
    torch.full((1, 3, 16, 16), 200, dtype=torch.uint8),
    r"^images are torch\.\w+, .*\[-1, 1\][^\n]*127\.5",
)
REFUSED = {  # what does not fit a component -> a word of the reason
    "DCTCodec(32, 5, 3, 1.0)": "32 must be a multiple",
    "DCTCodec(32, 4, 17, 1.0)": "keep 17 must",
    "DCTCodec(32, 4, 0, 1.0)": "keep 0 must",
    "DCTCodec(32, 4, 4, 0.0)": "eta 0.0 must",
    "DCTCodec(32, 4, 4, torch.ones(3, 5))": r"eta is \(3, 5\), expected one number or \(3, 4\), a row a channel",
    "DCTCodec(16, 2, 3, 250.0).encode(torch.zeros(1, 3, 32, 32))": "expected",
    "DCTCodec(16, 2, 3, 250.0).encode(BYTES)": PIXEL_RANGE,
    "DCTStatistics(2).update(BYTES.long())": PIXEL_RANGE,
    "dct.psnr_per_keep(BYTES, 2)": PIXEL_RANGE,
    "dct.blockify(torch.zeros(7, 8), 4)": "7",
    "DiT(num_tokens=15, token_dim=4)": "15 tokens form no square",
    "vae.VAE((32, 32, 32)).encode(torch.zeros(1, 3, 8, 6))": "multiples of 4",
    "vae.VAE((32, 48))": "multiples of 32",
    "repa.HOG()(torch.zeros(1, 3, 16, 20))": "multiples of 8",
    "repa.dog_target(torch.zeros(1, 4, 3), 2.0, 1.0)": "sigmas 2 1",
    "repa.dog_target(torch.zeros(1, 4, 3), 1.0, 1.0)": "sigmas 1 1",
    "repa.dog_target(torch.zeros(1, 4, 3), -1.0, 1.0)": "sigmas -1 1",
    "repa.dog_target(torch.zeros(1, 60, 3), 0, 1)": "60 tokens form no square",
    "dit.read_published({'x_embedder.proj.weight': torch.zeros(8, 4, 2, 2)}, 'sit')": "no whole sit's .*final_layer",
    "uvit.read_published({'patch_embed.proj.weight': torch.zeros(8, 4, 2, 2)})": "no whole uvit's .*mid_block",
    "uvit.read_published({'proj.weight': torch.zeros(8, 24)})": "no whole uvit's .*mid_block",
    "uvit.read_published(NETWORKS['uvit tokens']().state_dict())": "16 wide and 4 blocks deep",
    "dit.read_published(NETWORKS['dit maps']().state_dict(), 'dit')": "16 wide and 4 blocks deep",
}


def test_what_does_not_fit_a_component_is_refused():
    for expression, reason in REFUSED.items():
        with pytest.raises(ValueError, match=reason):
            eval(expression)


# ---- paths and samplers -----------------------------------------------------------------------------------

T = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
VP_BETA, SD_BETA = lambda t: 0.1 + 19.9 * t, lambda t: (0.85**0.5 + (12**0.5 - 0.85**0.5) * t) ** 2


@pytest.mark.parametrize("c", [0.25, 1.0, 4.0, 12.0])
@pytest.mark.parametrize("make, beta", [(VP, VP_BETA), (StableDiffusionVP, SD_BETA)])
def test_vp_paths_equal_the_integral_of_beta_and_scale_the_snr(make, beta, c):
    plain, scaled, t = make(), make(c), T.clone().requires_grad_()
    abar = torch.tensor([np.exp(-scipy.integrate.quad(beta, 0, t)[0]) for t in T.tolist()]).double()
    (alpha, sigma), (alpha_c, sigma_c) = plain.alpha_sigma(T), scaled.alpha_sigma(T)
    assert torch.allclose(alpha**2, abar, rtol=1e-12) and torch.allclose(alpha_c**2 + sigma_c**2, torch.ones_like(T))
    assert torch.allclose((alpha_c / sigma_c) ** 2, c * (alpha / sigma) ** 2, rtol=1e-9)  # SNR' = c SNR
    assert torch.allclose(scaled.log_snr_half(T), torch.log(alpha_c / sigma_c))
    assert torch.allclose(scaled.t_of_lambda(scaled.log_snr_half(T)), T, rtol=1e-9)
    slope = torch.autograd.grad(torch.log(scaled.alpha_sigma(t)[0] ** 2).sum(), t)[0]
    assert torch.allclose(scaled.beta(T), -slope, rtol=1e-6)
    if make is StableDiffusionVP:  # by its thousand discrete steps
        steps, betas = torch.arange(1, 1001).double() / 1000, np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        np.testing.assert_allclose(plain.log_abar(steps).numpy(), np.log1p(-betas).cumsum(), rtol=0.02)


@pytest.mark.parametrize("path", [VP(4.0), StableDiffusionVP(), Flow()], ids=list(PATHS))
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_predictions_invert(path, predict):
    x0, eps, t = torch.randn(97, 3, 2), torch.randn(97, 3, 2), T.float().clamp(0.02, 0.98)
    alpha, sigma = path.alpha_sigma(like(t, x0))
    target, x0_and_eps = train_diffusion.target, train_diffusion.x0_and_eps
    ours = x0_and_eps(path, predict, alpha * x0 + sigma * eps, t, target(path, predict, x0, eps, t))
    assert max((a - b).abs().max() for a, b in zip(ours, (x0, eps))) < 2e-4 / 0.02
    t = torch.zeros(97)  # the data's end, where the prediction of x0 is all of x, and that of eps bounded
    assert torch.equal(torch.stack(path.alpha_sigma(t)), torch.stack((t + 1, t)))
    ours = x0_and_eps(path, predict, x0, t, target(path, predict, x0, eps, t))
    assert torch.equal(ours[0], x0) and (ours[1] - (0 if predict == "x0" else eps)).abs().max() < 1e-6


def test_flow_velocity_is_the_time_derivative_and_snr_scaling_moves_its_times():
    snr = lambda t: (lambda alpha, sigma: (alpha / sigma) ** 2)(*Flow().alpha_sigma(t))
    for c in (1.0, 4.0, 16.0):
        assert torch.allclose(snr(Flow(c).time(T)), c * snr(T), rtol=1e-9)
    assert torch.equal(Flow(16.0).time(torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0]))
    x0, eps, t = normal(97, 5), normal(97, 5, seed=1), T.clone()
    point = lambda t: (lambda alpha, sigma: alpha * x0 + sigma * eps)(*Flow().alpha_sigma(like(t, x0)))
    slope = torch.autograd.functional.jvp(point, t, torch.ones_like(t))[1]
    assert torch.allclose(train_diffusion.target(Flow(), "v", x0, eps, t), slope) and torch.allclose(slope, eps - x0)


MU, STD = 0.3, 0.5  # of Gaussian data, whose best denoiser and whose sampling ODE are known in closed form


def gaussian_denoiser(path):
    def denoise(x, t):
        alpha, sigma = path.alpha_sigma(like(t, x))
        x0 = MU + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MU)
        return x0, (x - alpha * x0) / sigma.clamp_min(1e-9)

    return denoise


def start_of(path):
    """Mean and std of x_t at t = 1."""
    alpha, sigma = path.alpha_sigma(torch.ones((), dtype=torch.float64))
    return alpha * MU, (alpha**2 * STD**2 + sigma**2).sqrt()


def ode_error(path, sampler, steps):
    """Largest distance at t = 0 to the exact solution, along which (x - mean) / std stays what it was."""
    z, (mean, std) = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None], start_of(path)
    x = sampler(gaussian_denoiser(path), path, mean + std * z, steps, None)
    return (x - (MU + STD * z)).abs().max().item()


def sde_error(path, sampler, steps, std0=STD):
    """Distance of mean and std to the data's (or to `std0`), exactly: a sampler is affine in its start and each noise,
    so that one batch with a one in each of them in turn reads off every coefficient.
    """
    units = iter(torch.eye(steps + 3, dtype=torch.float64)[1:, :, None])  # the first row stays zero: the constant
    constant, *rest = sampler(gaussian_denoiser(path), path, next(units), steps, lambda: next(units)).flatten()
    (start, *noises), (mean, std) = torch.stack(rest) - constant, start_of(path)
    spread = (start**2 * std**2 + torch.stack(noises).square().sum()).sqrt()
    return max(abs(constant + start * mean - MU), abs(spread - std0)).item()


SAMPLER_ORDERS = [("dpm++", 2), ("ddim", 1), ("euler-ode", 1), ("ddpm", 1), ("euler-sde", 1), ("euler", 1), ("heun", 2)]


@pytest.mark.parametrize("c", [1.0, 4.0])
@pytest.mark.parametrize("name, order", SAMPLER_ORDERS)
def test_samplers_reach_the_exact_solution_at_their_order(name, order, c):
    path, kind = (VP(c), "vp") if name in SAMPLERS["vp"] else (Flow(c), "flow")
    error_of = sde_error if name in ("ddpm", "euler-sde") else ode_error
    errors = [error_of(path, SAMPLERS[kind][name], steps) for steps in (32, 64, 128, 256)]
    assert errors[-1] < (0.02 if order == 1 else 1e-3)
    assert all(order - 0.25 < np.log2(coarse / fine) < order + 0.35 for coarse, fine in zip(errors[1:], errors[2:]))


@pytest.mark.parametrize("c", [1.0, 16.0])
def test_flow_sde_converges_at_its_order_to_its_last_step(c):
    """A step from t = 0.04 without noise makes of its Gaussian, exactly, one that is not the data's."""
    t = 0.04 / (0.04 + c**0.5 * 0.96)
    std = ((1 - t) ** 2 * STD**2 + t**2) ** 0.5
    slope = (1 - t) * STD**2 / std**2  # x0 = MU + slope (x - mean), e = (x - (1 - t) x0) / t, x - t (2 e - x0) then is
    left = abs((2 - t) * slope - 1) * std  # MU + ((2 - t) slope - 1) (x - mean)
    assert abs(STD - left - (0.00505 if c == 1 else 0.00032)) < 1e-5  # as its docstring says
    errors = [sde_error(Flow(c), SAMPLERS["flow"]["sde"], steps, left) for steps in (32, 64, 128, 256)]
    assert all(0.75 < np.log2(coarse / fine) < 1.35 for coarse, fine in zip(errors[1:], errors[2:]))


def noise_of_published_euler(beta, c, steps, stochastic):
    """Std that the authors' Euler loop leaves around a picture whose denoiser is known: step by step, its variance."""
    times, variance = np.append(0, np.linspace(1e-3, 1, steps)), 1.0
    for s, t in list(zip(times, times[1:]))[::-1]:
        abar = np.exp(-scipy.integrate.quad(beta, 0, t)[0])
        b, abar = beta(t) / (1 + (c - 1) * abar), c * abar / (1 + (c - 1) * abar)
        drift = b * (0.5 - (1 if stochastic else 0.5) / (1 - abar))
        variance = variance * (1 + (t - s) * drift) ** 2 + (t - s) * b * (stochastic and s > 0)
    return variance**0.5


def test_naive_scaling_is_trained_kept_and_sampled(capsys):
    flags = f"--data {write_photos('data', 12)} --size 16 --block 2 --scaling"
    train(f"{flags} naive --out naive --steps 2")
    etas, images = checkpoint("naive")["config"]["eta"], load_all("data", 16) / 127.5 - 1
    coefficients = dct.block_coefficients(images, 2, 4).numpy()  # (N, L, 6, keep)
    for row, blocks in zip(etas, (slice(0, 4), 4, 5)):
        values = coefficients[:, :, blocks].reshape(-1, 4)
        np.testing.assert_allclose(row, np.abs(np.percentile(values, [1.75, 98.25], 0)).max(0), rtol=0.05)
    assert "naive: Y over " + " ".join(f"{eta:.0f}" for eta in etas[0]) in capsys.readouterr().out
    sampling("naive --n 2 --steps 2 --out s")
    train(f"{flags} entropy --out one --steps 1")
    train(f"{flags} naive --init one --out other --steps 1")
    assert "scaling naive on one side alone" in capsys.readouterr().out
    train(
        f"{flags.removesuffix(' --block 2 --scaling')} --space pixel --init one --init-partial --out pixels --steps 1"
    )
    assert "space dct there, pixel here" in capsys.readouterr().out
    refuses(train, {f"{flags} entropy --out naive --steps 3": "--scaling naive there, entropy now"})
    refuses(train, {"--space pixel --scaling naive": "only for --space dct"})


CIFAR10, FFHQ256 = (32, 2, 4, 242.382), (256, 4, 8, 485.0)  # size, block, keep, eta
GREY = [(VP(2.0), VP_BETA, *CIFAR10), (VP(4.0), VP_BETA, *FFHQ256), (StableDiffusionVP(), SD_BETA, *CIFAR10)]


@pytest.mark.parametrize("path, beta, size, block, keep, eta", GREY, ids=["cifar10", "ffhq256", "vp-sd"])
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


@pytest.mark.parametrize("kind, path", [("vp", VP(12.0)), ("vp-sd", StableDiffusionVP()), ("flow", Flow(16.0))])
def test_every_sampler_asks_the_network_once_a_step_and_one_is_enough(kind, path):
    for name, sampler in SAMPLERS[kind].items():
        for steps in (1, 2, 7):
            calls, denoise = [], gaussian_denoiser(path)
            counted = lambda x, t, calls=calls, denoise=denoise: calls.append(t[0]) or denoise(x, t)
            x = sampler(counted, path, torch.randn(9, 1), steps, lambda: torch.randn(9, 1))
            assert x.isfinite().all() and calls[0] == 1
            assert len(calls) == (2 * steps - 1 if name == "heun" else steps)


def small_diffusion(space="pixel", size=8, model="dit-nano/4", path="flow", predict="v", **more):
    config = dict(space=space, size=size, model=model, path=path, predict=predict, snr_scale=2.0, classes=["a", "b"])
    return train_diffusion.Diffusion(config | dict(label_dropout=0.1, block=4, keep=9, eta=400.0) | more)


@pytest.mark.parametrize("model", ["dit-nano", "uvit-nano"])
@pytest.mark.parametrize("space", ["pixel", "dct"])
@pytest.mark.parametrize("path", list(PATHS))
def test_every_combination_trains_and_samples(space, model, path):
    """With every prediction: a finite loss, and finite images from every sampler."""
    x, y = photos(2, 16), torch.tensor([0, 1])
    for predict in PREDICTIONS:
        diffusion = small_diffusion(space, 16, model, path, predict)
        x0, t = diffusion.encode(x), torch.tensor([0.0, 1.0])
        network = Aligned(diffusion.network)
        loss, _ = train_diffusion.diffusion_loss(diffusion, network, x0, torch.randn_like(x0), t, y)
        assert loss.shape == (2,) and loss.isfinite().all()
        for sampler in SAMPLERS[path].values():
            guided = dict(sampler=sampler, steps=2, guidance=2.0, interval=(0.1, 0.9))
            images = train_diffusion.generate(diffusion, [0, 1], 0, "cpu", y, **guided)
            assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


def test_complete_records_are_read_where_nothing_may_be_written(tmp_path, monkeypatch):
    write_photos(tmp_path / "photos", 6, 16)
    images, processes, load = Images(str(tmp_path / "photos"), 16), Processes("cpu"), np.load
    first = Pixels(images, tmp_path / "cache", processes, 0)

    def read_only(file, mmap_mode):  # root, who may run the tests, may write anywhere
        if mmap_mode != "r":
            raise PermissionError(file)
        return load(file, mmap_mode=mmap_mode)

    monkeypatch.setattr(np, "load", read_only)
    again = Pixels(images, tmp_path / "cache", processes, 0)
    assert torch.equal(again.read(again.indices), first.read(first.indices))


def decode_photos(number):
    pixels = Pixels(Images("photos", 16), "cache", Processes("cpu"), 0)
    np.save(f"total{number}", pixels.read(pixels.indices).sum())


def test_commands_may_begin_the_same_records_at_one_moment():
    write_photos("photos", 40, 16)
    runs = [forks().Process(target=decode_photos, args=(number,)) for number in range(3)]
    for run in runs:
        run.start()
    assert [run.join(60) or run.exitcode for run in runs] == [0, 0, 0]
    assert len({np.load(f"total{number}.npy").item() for number in range(3)}) == 1
    assert len(os.listdir("cache")) == 1  # nothing is left beside it


def test_guidance_and_its_interval():
    diffusion = small_diffusion()
    randomised(diffusion.network).eval()
    x, y, null = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1]), torch.full((3,), 2)
    at = lambda t, y, *guided: diffusion.denoiser(y, *guided)(x, torch.full((3,), t))[0]
    expected = at(0.5, null) + 3 * (at(0.5, y) - at(0.5, null))
    assert torch.allclose(at(0.5, y, 3.0), expected, atol=1e-4)
    assert torch.allclose(at(0.5, y, 0.0), at(0.5, null), atol=1e-5)
    assert torch.equal(at(0.05, y, 3.0, (0.1, 0.9)), at(0.05, y))
    assert not torch.allclose(at(0.5, y, 3.0, (0.1, 0.9)), at(0.5, y))


# ---- images -----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # cache/ and runs/ stay in it


def write_photos(folder, n, size=16, classes=None):
    for i, pixels in enumerate(train_vae.to_uint8(photos(n, size)).permute(0, 2, 3, 1).numpy()):
        file = Path(folder, classes[i % len(classes)] if classes else "", f"{i:03d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return Path(folder)


def load_all(source, size=16):
    return torch.stack([image for _, image, _ in Images(str(source), size)])


def refuses(program, rows):
    """Every line of flags is an error of one line that says this."""
    for flags, message in rows.items():
        with pytest.raises(InputError, match=message) as error:
            program(flags)
        assert "\n" not in str(error.value)


def test_images_of_every_mode_and_size(tmp_path):
    ramp = np.arange(64, dtype=np.uint8).repeat(2).reshape(8, 16)
    pictures = {"grey": Image.fromarray(ramp), "palette": Image.fromarray(ramp).convert("P")}
    pictures |= {"deep": Image.fromarray(ramp.astype(np.uint16) * 257), "two": Image.new("1", (8, 8), 1)}
    pictures |= {"pixel": Image.new("RGB", (1, 1), "red"), "cmyk": Image.new("CMYK", (20, 12), (0, 255, 255, 0))}
    pictures |= {"rgba": Image.new("RGBA", (9, 30), (255, 0, 0, 0)), "wide": Image.new("RGB", (500, 3), "blue")}
    for name, picture in pictures.items():
        picture.save(f"{name}.{'tif' if name == 'cmyk' else 'png'}")
    images = Images(str(tmp_path), 8)
    read = {Path(name).stem: images.read(i) for i, name in enumerate(images.names)}
    assert len(read) == len(pictures) and all(x.shape == (3, 8, 8) and x.dtype == torch.uint8 for x in read.values())
    assert torch.equal(read["grey"], read["deep"]) and torch.equal(read["grey"], read["palette"])
    assert torch.equal(read["grey"][0], torch.from_numpy(ramp[:, 4:12]))  # the central square, unscaled
    assert (read["rgba"] == 255).all()  # transparent is white
    assert all(read[name][0].min() > 230 and read[name][1:].max() < 60 for name in ("pixel", "cmyk"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8))
    half = noise.crop((15, 0, 85, 70)).resize((35, 35), Image.Resampling.BOX)
    assert train_vae.center_crop(noise, 20) == half.resize((20, 20), Image.Resampling.BICUBIC)


def test_data_layouts():
    tree = write_photos("tree/train", 6, classes=["cat", "dog"])
    images, flat = Images(str(tree), 16), Images(str(write_photos("flat", 4)), 16)
    assert images.classes == ["cat", "dog"] and images.labels == [0, 0, 0, 1, 1, 1] and len(list(images)) == 6
    assert flat.labels is None and flat.classes is None
    names = [f"{i:05d}/img{i:08d}.png" for i in range(6)]
    with zipfile.ZipFile("tree.zip", "w") as z, zipfile.ZipFile("edm.zip", "w") as edm:
        for old, new in zip(images.names, names):
            z.write(tree / old, f"top/{old}")  # one folder around all is no class
            edm.write(tree / old, new)
        z.writestr("__MACOSX/top/._x.png", b"junk")
        edm.writestr("dataset.json", json.dumps({"labels": [[name, i % 3] for i, name in enumerate(names)]}))
    zipped, edm = Images("tree.zip", 16), Images("edm.zip", 16)
    assert zipped.classes == ["cat", "dog"] and all(torch.equal(zipped[i][1], images[i][1]) for i in range(6))
    assert edm.labels == [0, 1, 2, 0, 1, 2] and edm.classes == ["0", "1", "2"]

    def labelled(labels):
        (tree / "dataset.json").write_text(json.dumps({"labels": labels}))
        return Images(str(tree), 16)

    assert labelled(None).classes is None and labelled([[name, 2.0] for name in images.names]).labels == [2] * 6
    bad = [([["no", 1]], "dataset.json"), ([[name, [1.0]] for name in images.names], "dataset.json")]
    for label in (-1, 0.5, True, "cat", "1", None, float("nan"), float("inf")):
        bad.append(([[name, label] for name in images.names], rf"dataset\.json.*{images.names[0]}.*{label!r}"))
    for labels, message in bad:
        with pytest.raises(InputError, match=message):
            labelled(labels)
    Path("empty").mkdir()
    Path("note.txt").write_text("hello")
    refuses(lambda spec: Images(spec, 16), {bad: f"^--data {bad}" for bad in ("nowhere", "empty", "note.txt")})


def test_a_folder_that_leads_back_to_itself_is_refused_by_its_link(tmp_path):
    tree, other = write_photos(tmp_path / "outer/tree", 4, classes=["cat", "dog"]), write_photos(tmp_path / "other", 3)
    for link in (tree / "bird", tree / "fowl"):  # a link alone is fine, and a folder linked twice is meant twice
        link.symlink_to(other)
    Path("door").symlink_to(tree)  # the data set may itself be a link
    images = Images("door", 16)
    assert len(images) == 10 and images.classes == ["bird", "cat", "dog", "fowl"] and len(Images("other", 16)) == 3
    loops = {tree / "cat/again": tree, tree / "up": tmp_path / "outer", tree / "dog/x": tree / "dog"}
    for place, target in {**loops, other / "back": tree}.items():
        place.symlink_to(target)
        refuses(lambda data: Images(data, 16), {str(tree): f"{place.name}.* is a link"})
        place.unlink()


def test_dead_leaves_follow_their_model():
    one, again, other = (train_vae.dead_leaves(i, 32) for i in (3, 3, 4))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    few = [len(np.unique(train_vae.dead_leaves(i, 64)[::3, ::3].reshape(-1, 3), axis=0)) for i in range(8)]
    leaves = np.stack([train_vae.dead_leaves(i, 64, full=True) for i in range(24)])
    power = psd(torch.from_numpy(leaves).permute(0, 3, 1, 2).float()).mean(0)
    slope = np.polyfit(np.log(np.arange(2, 13)), np.log(power[1:12].numpy()), 1)[0]
    assert max(few) < 60 and -4 < slope < -2  # a power law; -2 would need leaves of every size


def test_bad_bytes_of_every_kind_are_unreadable_images():
    png = (write_photos("data", 1) / "000.png").read_bytes()
    contents = dict(empty=b"", text=b"hello", short=png[:100], flipped=png[:60] + b"\0" * 9 + png[69:], member=png * 9)
    with zipfile.ZipFile("bad.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in contents.items():
            z.writestr(f"{name}.png", content)
        start = z.getinfo("member.png").header_offset + 60
    raw = bytearray(Path("bad.zip").read_bytes())
    raw[start : start + 200] = b"\xff" * 200  # a broken deflate stream inside the archive
    Path("bad.zip").write_bytes(raw)
    images = Images("bad.zip", 16)
    assert len(images) == 5 and all(images.read(i) is None and not images[i][2] for i in range(5))


def test_data_order_visits_every_image_once_an_epoch():
    order = DataOrder(10, 4, seed=0)
    seen = torch.cat([order(step) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:]) and torch.equal(DataOrder(10, 4, seed=0)(3), seen[12:16])
    assert len(DataOrder(3, 8, seed=0)(2)) == 8  # a batch larger than the set


def open_pixels(spec, workers=0):
    return Pixels(Images(str(spec), 16), "cache", Processes("cpu"), workers)


def flawed():
    """data/, 120 images of which one is truncated -> its `Images` and that one's number."""
    broken = write_photos("data", 120, classes=["a", "b", "c"]) / "b" / "001.png"
    broken.write_bytes(broken.read_bytes()[:90])
    images = Images("data", 16)
    return images, images.names.index("b/001.png")


def test_decoded_images_are_plain_files_made_once_that_all_runs_share(monkeypatch, capsys):
    (images, broken), reads, read, left = flawed(), [], Images.read, [70]

    def counted(self, i):
        if len(reads) == left[0]:
            raise MemoryError
        reads.append(i)
        return read(self, i)

    monkeypatch.setattr(Images, "read", counted)
    folder = Path("cache") / images.cache_name()
    with pytest.raises(MemoryError):
        make = (folder, images, {"kind": "pixels"}, (3, 16, 16), torch.Tensor.numpy, Processes("cpu"))
        Records.make(*make, workers=0, batch=16, flag="--cache")
    refuses(lambda path: Records(path, "pixels"), {folder: "unfinished"})
    left[0] = None
    pixels = open_pixels("data/")
    assert reads[70:] == list(range(64, 120)) and "b/001.png" in capsys.readouterr().err  # what was not there
    reads.clear()
    assert str(open_pixels(Path("data").absolute())) == str(pixels) and not reads and len(os.listdir("cache")) == 1
    assert f"{folder}, 1 unreadable skipped" in str(pixels)
    values, done, labels = (np.load(folder / f"{name}.npy") for name in ("values", "done", "labels"))
    assert done.tolist() == [1 + (i == broken) for i in range(120)] and labels.tolist() == images.labels
    assert values.dtype == np.uint8 and all((values[i] == read(images, i).numpy()).all() for i in pixels.indices)
    assert json.loads((folder / "names.json").read_text()) == images.names
    Image.new("RGB", (16, 16)).save("data/a/000.png")  # other pixels under the old name
    assert open_pixels("data").read(np.array([0])).max() == 0 and len(os.listdir("cache")) == 2


@pytest.mark.parametrize("free", [0, 10**12])
def test_images_on_the_fly_are_those_of_the_files(monkeypatch, free):
    (images, broken), wanted = flawed(), [DataOrder(120, 50, seed=1)(step).numpy() for step in range(3)]
    monkeypatch.setattr(train_vae, "free_disk", lambda folder: free)
    pixels = open_pixels("data", workers=2)
    assert Path("cache").exists() == bool(free) and ("on the fly by 2 workers" in str(pixels)) == (not free)
    assert broken in np.concatenate(wanted)
    read = [np.where(where == broken, broken + bool(free), where) for where in wanted]
    for asked, (where, batch) in zip(wanted, pixels.stream(read)):
        assert np.array_equal(where, asked + (asked == broken))  # the next image takes its place
        assert all(torch.equal(image, images.read(i)) for i, image in zip(where.tolist(), batch))
    for name in ("a/003.png", "a/006.png"):
        Path("data", name).write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"^--data data: [23] of 120 images are unreadable"):
        list(open_pixels("data").stream([np.arange(120)]))


def test_upsampling_goes_on_beside_pictures_too_large_for_pillow_to_open(monkeypatch, capsys):
    write_photos("data", 1)
    for _ in range(2):  # the second time it looks at what is there
        dct.main(dct.make_parser().parse_args(["upsample", "data", "large"]))
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # an error from twice as many on
    assert capsys.readouterr().out.count("1 images in large") == 2


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_no_more_processes_decode_images_than_there_are_cores_to_use():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})  # as taskset, containers and Slurm do
        assert Processes("cpu").workers(None) == train_vae.cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert train_vae.cores() == len(before) and Processes("cpu").workers(3) == 3


# ---- the programs, tiny -----------------------------------------------------------------------------------

CACHES = tempfile.TemporaryDirectory()
CACHE = CACHES.name
TINY = "--size 16 --model dit-nano --batch 8 --seed 3 --workers 0 --device cpu --lr-decay none --warmup 1 --lr 1e-3 "
TINY += f"--log-every 1 --eval-every 1000 --save-every 1000 --cache {CACHE}"


def train(flags):
    train_diffusion.main(train_diffusion.parse(shlex.split(f"{TINY} {flags}")))


def sampling(flags):
    sample.main(sample.parse(shlex.split(f"--device cpu {flags}")))


def command(line, processes=0, check=True, gpu=False):
    """A real command in its own process, or in several under torchrun."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split() if processes else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    program, *flags = shlex.split(line)
    words = [sys.executable, *torchrun, HERE / program, *flags]
    result = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert not check or result.returncode == 0, result.stderr[-3000:]
    return result


OUTPUTS = itertools.count()


@functools.cache
def forks():
    """What starts processes as forks of one that has imported all this."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_all", "torch._dynamo"])  # which the first optimizer imports
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        patch.setenv("OMP_NUM_THREADS", "1")  # a pool of threads does not outlive a fork
        multiprocessing.forkserver.ensure_running()
    return context


def forked(line, environment, output):
    """A program, in a process of its own that need not import torch: a fork of one that has."""
    os.environ.update(environment)
    for stream, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    train_diffusion.GRID_STEPS = 2
    program, *flags = shlex.split(line)
    module = {"train_diffusion.py": train_diffusion, "train_vae.py": train_vae, "sample.py": sample}[program]
    train_vae.run_program(module.main, lambda: module.parse(flags))


def launch(line, world=1):
    """Start a command -> its processes, as torchrun would start them."""
    environment = {"CUDA_VISIBLE_DEVICES": ""}
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    processes = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        output = str(Path(f"output{next(OUTPUTS)}").absolute())
        processes.append(forks().Process(target=forked, args=(line, environment | ranks, output), name=output))
        processes[-1].start()
    return processes


def finish(processes, seconds=300):
    """Processes that end in time -> of each its exit code, stdout and stderr."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"hangs: {process}")
    read = lambda process, end: (
        Path(f"{process.name}.{end}").read_text() if Path(f"{process.name}.{end}").exists() else ""
    )
    return [(process.exitcode, read(process, "out"), read(process, "err")) for process in processes]


def completed(line, world=1):
    """A command to its end, which is good -> stdout of its processes."""
    ends = finish(launch(line, world))
    assert not any(code for code, *_ in ends), ends
    return "".join(out for _, out, _ in ends)


def one_error(end, *words):
    """What `finish` says of a process is exit code 2 and one line of stderr, which says these."""
    code, _, err = end
    assert code == 2 and re.fullmatch("error: .*\n", err) and all(word in err for word in words), end


def metrics(run, key="loss"):
    return [line for line in map(json.loads, Path(run, "metrics.jsonl").read_text().splitlines()) if key in line]


def checkpoint(run, name="checkpoint.pt"):
    return torch.load(Path(run, name), weights_only=True)


def distance(a, b):
    """Largest difference between two nests of tensors and plain values, infinite where plain values differ."""
    if isinstance(a, torch.Tensor):
        return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    if isinstance(a, (dict, list, tuple)):
        pairs = [(a[k], b[k]) for k in a] if isinstance(a, dict) else list(zip(a, b))
        return max((distance(x, y) for x, y in pairs), default=0.0) if len(a) == len(b) else np.inf
    return 0.0 if a == b else abs(a - b) if isinstance(a, float) else np.inf


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data"), 48, classes=["left", "right", "up"])


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A run of 12 steps on three classes, shared by the tests that only read it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(f"--data {data} --out {run} --steps 12")
    return run


def test_training_lowers_the_loss_prints_lines_and_leaves_its_files(capsys):
    write_photos("my data", 4)
    flags = "--data 'my data' --out 'my run' --steps 150 --eval-every 75 --lr 2e-3"
    train(flags)
    lines, state, images = metrics("my run"), checkpoint("my run"), load_all("my data") / 127.5 - 1
    # DiT starts by predicting zero exactly, so the first loss is the weighted mean square of the tokens ...
    x0, t = Diffusion(state["config"]).encode(images), Flow(16.0).time(torch.sigmoid(0.5 + torch.randn(100_000)))
    assert 0.3 < lines[0]["loss"] / (x0.square().mean() / (t**2 + 0.04)).mean() < 3
    # ... which training leaves far below
    assert np.mean([line["loss"] for line in lines[-20:]]) < 0.35 * np.mean([line["loss"] for line in lines[:3]])
    assert all(line["grad_norm"] > 0 and line["images_per_s"] > 0 and line["skipped_steps"] == 0 for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert lines[-1]["images"] == state["images_seen"] == 1200 and lines[-1]["epoch"] == 300
    statistics = DCTStatistics(4)
    statistics.update(images)
    assert abs(state["config"]["eta"] - statistics.eta()) < 1e-9
    (out, err), bands = (
        capsys.readouterr(),
        [line["x0_error_by_band"] for line in metrics("my run", "x0_error_by_band")],
    )
    for line in lines:
        pattern = rf"^step {line['step']}/150  loss {line['loss']:.4f}  \d+ img/s  (\d+m\d\d)?\d*s left$"
        assert re.search(pattern, out, re.M), pattern
    assert len(bands) == 2 and all(len(b) == 16 for b in bands[0].values()) and bands[1]["0.5"][0] < 0.9
    for step, errors in zip((75, 150), bands):
        assert f"step {step}/150  x0 error by band at t = 0.5: {errors['0.5'][0]:.2f} " in out
        assert Image.open(f"my run/samples/step{step:07d}.png").size == (8 * 18 + 2, 8 * 18 + 2)
    assert all(word in out for word in ("eta", "H(Cr)", "PSNR by keep", "sample.py 'my run'")) and not err
    train(flags)
    assert re.search("finished.*--steps 300", capsys.readouterr().out, re.S)


@pytest.mark.parametrize("flags", ["", "--space pixel --model uvit-nano/4 --path vp --predict eps --no-classes"])
def test_n_and_n_steps_equal_2n_bit_for_bit_and_runs_share_decoded_images(data, flags):
    decoded = lambda: {file: file.stat().st_mtime_ns for file in Path("cache").glob("*/[!.]*")}
    train(f"--data {data} --out whole --steps 8 --cache cache {flags}")
    before = decoded()
    for steps in (4, 8):
        train(f"--data {data} --out halves --steps {steps} --cache cache {flags}")
    assert before == decoded() and len(before) == 5
    a, b = checkpoint("whole"), checkpoint("halves")
    assert all(distance(a[k], b[k]) == 0 for k in ("model", "ema", "optimizer", "step", "config"))
    losses = [[line["loss"] for line in metrics(name)] for name in ("whole", "halves")]
    assert len(losses[0]) == 8 and losses[0] == losses[1]


def test_a_run_begins_with_the_weights_of_another(trained, autoencoders, data, capsys):
    shutil.copytree(trained, "base")
    flat = write_photos("flat", 8)
    still = "--lr 0 --steps 1"  # leaves the weights as they began
    train(f"--data {data} --out new {still} --init base")
    old, new = checkpoint(trained), checkpoint("new")
    assert distance(old["ema"], new["model"]) == distance(old["ema"], new["ema"]) == 0
    assert distance(old["ema"], old["model"]) > 0
    assert new["step"] == new["optimizer"]["state"][0]["step"] == 1
    assert re.search("^init     base, dit-nano, step 12$", capsys.readouterr().out, re.M)
    # a head that differs is named, and left fresh where asked for
    table, unlike = "y_embedder.embedding_table.weight", f"--data {flat} --init base/checkpoint.pt"
    differs = rf"1 of 72 .*{table} \(4, 128\) there, none here\); .*--init-partial"
    refuses(train, {f"{unlike} --out other {still}": differs})
    train(f"{unlike} --out other {still} --init-partial --predict v")
    other, out = checkpoint("other")["model"], capsys.readouterr().out
    assert distance(other, {key: value for key, value in old["ema"].items() if key != table}) == 0
    assert re.search(f"1 of 72 tensors differ and stay new: {table}", out)
    etas = [f"{state['config']['eta']:.1f}" for state in (old, checkpoint("other"))]
    assert "trained otherwise: predict x0 there, v here; eta {} there, {} here".format(*etas) in out
    train(f"--data {data} --out fresh {still} --keep 12")
    train(f"--data {data} --out wide {still} --keep 12 --init base --init-partial")
    wide, fresh = checkpoint("wide")["model"], checkpoint("fresh")["model"]
    assert "x_embedder.proj.weight (128, 54) there, (128, 72) here" in capsys.readouterr().out
    new = {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    assert not any(distance(wide[key], (fresh if key in new else old["ema"])[key]) for key in wide)
    # resuming reads it no more; which it was binds, not where it lies
    shutil.rmtree("base")
    bad = {f"--init {trained}": "--init base there, run now", "": "--init base there, None now"}
    refuses(lambda flags: train(f"--data {data} --out wide --lr 0 --steps 2 --keep 12 {flags}"), bad)
    train(f"--data {data} --out wide --lr 0 --steps 2 --keep 12 --init moved/base")
    assert distance(wide, checkpoint("wide")["model"]) == 0 and checkpoint("wide")["step"] == 2
    bad = {"--init-partial": "--init-partial: means nothing without", "--init base": "base: no such run"}
    bad |= {f"--init {trained} --init-partial --model uvit-nano": "dit-nano, whose weights do not fit this UViT"}
    bad |= {f"--init {autoencoders}/kl": "of train_vae.py; give one of train_diffusion.py"}
    refuses(lambda flags: train(f"--data {data} --out none --steps 1 {flags}"), bad)
    assert not Path("none").exists()


def test_resuming_asks_what_the_data_is_not_how_it_is_spelled(tmp_path):
    write_photos("photos", 12, classes=["a", "b"])
    steps = itertools.count(1)
    again = lambda flags: train(f"--out run --steps {next(steps)} --data {flags}")
    for spelling in ("photos", "photos/", "./photos", tmp_path / "photos"):
        again(spelling)
    Path("photos").rename("moved")
    again("moved")
    assert [line["step"] for line in metrics("run")] == [1, 2, 3, 4, 5]
    state = checkpoint("run")
    for name in ("label_dropout", "ebfr", "repa", "cache", "init"):  # flags that an earlier version did not have
        state["args"].pop(name, None)
    torch.save(state, "run/checkpoint.pt")
    refuses(again, {"moved --label-dropout 0.2": "--label-dropout 0.1 there, 0.2 now"})
    again("moved")
    for new in ("c/1.png", "a/1.png", "b/renamed.png"):  # a new class, the other class, another name
        Path("moved", new).parent.mkdir(exist_ok=True)
        shutil.move("moved/b/001.png", Path("moved", new))
        refuses(again, {"moved": "has changed since"})
        shutil.move(Path("moved", new), "moved/b/001.png")
    Path("moved/b/001.png").unlink()
    refuses(again, {"moved": "has changed since.* 12.* 11"})


def killed_after(enough, line):
    """A process that is killed, before its end, once this is true."""
    (process,) = launch(line)
    while process.is_alive() and not enough():
        time.sleep(0.005)
    process.kill()
    assert finish([process])[0][0] == -signal.SIGKILL


def killed_training(lines, program, flags):
    """The run `killed` once its log has so many lines -> the step of its checkpoint."""
    log = Path("killed/metrics.jsonl")
    enough = lambda: log.exists() and log.read_text().count("\n") >= lines
    killed_after(enough, f"{program} {flags} --steps 100000 --out killed")
    return checkpoint("killed")["step"]


def test_killed_and_resumed_equals_uninterrupted(data):
    flags = f"--data {data} --save-every 5"
    step = killed_training(13, "train_diffusion.py", f"{TINY} {flags}")
    assert step >= 10 and step % 5 == 0
    Path("killed/checkpoint.pt.tmp").write_bytes(b"half a checkpoint")  # as a kill while writing leaves it
    with Path("killed/metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')
    for run in ("whole", "killed"):
        train(f"{flags} --steps {step + 10} --out {run}")
        assert [line["step"] for line in metrics(run)] == list(range(1, step + 11))
    a, b = checkpoint("whole"), checkpoint("killed")
    assert max(distance(a[key], b[key]) for key in ("model", "ema")) < 1e-4  # threads may differ


def test_two_processes_equal_one_and_parts_a_whole(data, trained):
    flags = f"--data {data} --steps 5 --save-every 5 --keep auto --features hog --keep-threshold 0.02"
    flags += f" --init {trained} --init-partial"
    train(f"{flags} --out one --cache cache")
    train(f"{flags} --out parts --grad-accum 4")
    sampled, scoring = "two -n 5 --steps 3 --out", f"--score {data} --features hog --seeds 0 2"
    result = command(f"train_diffusion.py {TINY} {flags} --out two --cache theirs", processes=2)
    completed(f"sample.py --device cpu {sampled} b {scoring}", 2)
    assert result.stdout.count("done at step 5") == result.stdout.count("step 5/5  loss") == 1
    assert np.array_equal(*[np.load(next(Path(cache).glob("*/values.npy"))) for cache in ("cache", "theirs")])
    one = checkpoint("one")
    for other in ("parts", "two"):
        state = checkpoint(other)
        assert distance(one["model"], state["model"]) < 2e-5 and distance(one["ema"], state["ema"]) < 2e-5
        assert distance(one["config"], state["config"]) == 0
        np.testing.assert_allclose(*[[line["loss"] for line in metrics(run)] for run in ("one", other)], rtol=1e-4)
    # and they sample the same files, one process or two
    theirs = Path("scores.jsonl").read_text().replace('"b-seed', '"a-seed').splitlines()
    sampling(f"{sampled} a {scoring}")
    assert Path("scores.jsonl").read_text().splitlines()[2:] == theirs and len(theirs) == 2
    for seed in (0, 2):
        assert_same_images(f"a-seed{seed}", f"b-seed{seed}", 5)


def assert_same_images(a, b, n, tolerance=1):
    for folder in (a, b):
        assert sorted(file.name for file in Path(folder).glob("*.png")) == [f"{i:06d}.png" for i in range(n)]
    assert (load_all(a).int() - load_all(b).int()).abs().max() <= tolerance


def test_sample_i_depends_on_seed_and_i_alone(trained, capsys):
    flags = f"{trained} --steps 3 --sampler sde --guidance 2"
    for name, more in dict(one="--batch 1", seven="--batch 7", seed="--batch 7 --seed 1").items():
        sampling(f"{flags} --n 7 --out {name} {more}")
    assert_same_images("one", "seven", 7)
    assert (load_all("one").int() - load_all("seed").int()).abs().max() > 20
    Image.new("RGB", (16, 16)).save("one/000003.png")  # what exists is skipped
    Path("one/000005.png").unlink()
    sampling(f"{flags} --n 9 --out one --npz a.npz")
    pixels = np.load("a.npz")["arr_0"]
    assert pixels.shape == (9, 16, 16, 3) and pixels.dtype == np.uint8 and not pixels[3].any()
    assert np.array_equal(pixels.transpose(0, 3, 1, 2), load_all("one").numpy())
    state = checkpoint(trained)  # another model, same step, same settings: not taken for this one's images
    state["ema"]["final_layer.linear.bias"] += 1
    torch.save(state, "other.pt")
    bad = {f"{flags} --guidance 3 --out one": "guidance 2.0 there, 3.0 now"}
    bad |= {f"{flags} --amp bf16 --out one": "made otherwise .*amp float32 there, bfloat16 now"}
    bad |= {f"{flags.replace(str(trained), 'other.pt')} --out one": "weights .* there"}
    refuses(sampling, bad | {f"{flags} --out {write_photos('mine', 1)}": "other files"})
    sampling(f"{trained} --n 2 --steps 2 --no-ema --classes up --grid grid.png")
    out = capsys.readouterr().out
    assert Path("grid.png").exists() and "no-ema" in out
    (grid,) = re.findall(r"patch artefacts, period 4: ([\d.]+) ", out.split("9 images in one")[1].split("grid")[1])
    assert grid == f"{artefacts_by_loops(load_all('one').double().numpy(), 4):.2f}"
    assert "period 8" not in out  # a token's: more than a third of 16 pixels


def test_score_and_its_floor_equal_frechet_distances_by_hand(trained, data, hub, capsys):
    flags, rng = f"{trained} --n 24 --steps 3 --out out", np.random.default_rng(0)
    Path("many").mkdir()
    for i in range(515):
        Image.fromarray(rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)).resize((16, 16)).save(f"many/{i:03d}.png")
    for reference in (data, "many"):
        sampling(f"{flags} --score {reference} --features {hub}:colours")
    few, many = map(json.loads, Path("scores.jsonl").read_text().splitlines())
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    means = [((load_all(folder) / 255 - mean) / std).mean((2, 3)) for folder in ("out", data, "many")]
    features = [(m @ torch.randn(3, 8, generator=torch.Generator().manual_seed(0))).double() for m in means]
    halves = features[2][torch.randperm(515, generator=train_vae.generator(0, 6))[:514]].reshape(2, 257, 8)
    for (a, b), score in ((features[:2], few["frechet_distance"]), (halves, many["floor"])):
        assert score == pytest.approx(frechet_by_hand(a, b), rel=1e-3)
    assert "inception_score" not in few and few["kid_subset_size"] == 12  # the rest is tested where it is computed
    assert few["kid"] == pytest.approx(repa.kernel_distance(*features[:2])["kid"], rel=1e-4)
    assert "floor" not in few and many["floor_images"] == 257
    expected = dict(images=24, reference_images=48, sampler="euler", steps=3, guidance=1.0, ema=True, format="PNG")
    assert (expected | dict(checkpoint_step=12, features=f"{hub}:colours")).items() <= few.items()
    out = capsys.readouterr().out
    assert "16" in few["crop"] and "below 10,000" in out and re.search(rf"floor +{many['floor']:.5g} +257 +257\n", out)
    row = rf"kernel distance +{few['kid']:.5g} +24 +48 +{few['kid_std']:.2g}  100 subsets of 12\n"
    assert re.search(row, out) and "Inception Score" not in out
    table = [line for line in out.splitlines() if line.startswith(("Fre", "  its", "ker", "Inc", "prec", "rec"))]
    assert len(table) == 9 and max(map(len, table)) <= 80


def last_score(folder="."):
    return json.loads(Path(folder, "scores.jsonl").read_text().splitlines()[-1])


def test_references_are_computed_once_and_kept(trained, data, hub, capsys, monkeypatch):
    flags = f"{trained} --n 6 --steps 1 --out out --features {hub}:colours --score"
    shutil.copytree(data, "set")
    sampling(f"{flags} set --save-reference a.npz")
    first, (kept,) = last_score(), Path("cache").glob("*.npz")

    def unopened(self, i):
        assert not self.spec.startswith("set"), "opened again"
        return opened(self, i)

    opened = Images.open
    with monkeypatch.context() as patched:
        patched.setattr(Images, "open", unopened)
        sampling(f"{flags} set")
        assert last_score() == first
        sampling(f"{flags} set --save-reference b.npz")
        for file in ("b.npz", kept):
            with np.load("a.npz") as one, np.load(file) as other:
                assert all(np.array_equal(one[key], other[key]) for key in ("features", "mu", "sigma"))
                assert json.loads(str(one["protocol"])) == json.loads(str(other["protocol"]))
    monkeypatch.setattr(sample, "FEATURES_KEPT", 1000)  # bytes: mean and covariance remain
    kept.write_bytes(kept.read_bytes()[:700])
    capsys.readouterr()
    sampling(f"{flags} set")
    assert "made again: --cache" in capsys.readouterr().out
    with np.load(kept) as small, np.load("a.npz") as full:
        np.testing.assert_allclose(small["sigma"], full["sigma"], rtol=1e-6)
        np.testing.assert_allclose(small["mu"], full["mu"])
        assert small["features"].shape == (0, 8) and json.loads(str(small["protocol"]))["images"] == 48
    assert last_score()["frechet_distance"] == pytest.approx(first["frechet_distance"]) and last_score()["kid"] is None
    monkeypatch.setattr(sample, "FEATURES_KEPT", 2**31)
    os.utime("set/up/002.png", (1, 1))  # a changed file makes other images
    sampling(f"{flags} set --cache cache")
    assert len(list(Path("cache").glob("*.npz"))) == 2 and last_score() == first
    shutil.rmtree("set")
    sampling(f"{flags} a.npz")
    assert last_score() == first | {"reference": "a.npz"}
    Path("shut").touch()  # no folder can be made there: said, and nothing is lost
    sampling(f"{flags} {data} --cache shut")
    assert "are not kept" in capsys.readouterr().out and last_score() == first | {"reference": str(data)}


def test_statistics_are_taken_as_published_and_refused_where_they_cannot_be_compared(trained, data, hub, capsys):
    flags = f"{trained} --n 6 --steps 1 --out out --features {hub}:colours --score"
    sampling(f"{flags} {data} --save-reference a.npz")
    first = last_score()
    with np.load("a.npz") as full:
        arrays, protocol = dict(full), json.loads(str(full["protocol"]))
    statistics = {key: arrays[key] for key in ("mu", "sigma")}
    # as ADM and pytorch-fid publish them
    adm = statistics | {"mu_s": np.zeros(3), "sigma_s": np.eye(3), "arr_0": np.zeros((2, 8, 8, 3), np.uint8)}
    np.savez("adm.npz", **adm)
    sampling(f"{flags} adm.npz")
    only = dict.fromkeys(("kid", "precision", "recall", "reference_images"))
    assert (only | {"frechet_distance": first["frechet_distance"]}).items() <= last_score().items()
    assert re.search(r"Frechet distance +\S+ +6 +\?", capsys.readouterr().out)
    # what cannot be compared, or is no such file
    np.savez("samples.npz", adm["arr_0"])
    np.savez("nan.npz", mu=statistics["mu"] * np.nan, sigma=statistics["sigma"])
    np.savez("flat.npz", mu=statistics["mu"], sigma=statistics["mu"])
    np.savez("code.npz", mu=np.array([print], dtype=object), sigma=statistics["sigma"])
    np.savez("words.npz", protocol=np.array("{"), **statistics)
    np.savez("list.npz", protocol=np.array("[1]"), **statistics)
    np.savez("turned.npz", mu=statistics["mu"] + 1j, sigma=statistics["sigma"])
    np.savez("big.npz", **{key: value.astype(">f4") for key, value in statistics.items()})
    sampling(f"{flags} big.npz")
    assert last_score()["frechet_distance"] == pytest.approx(first["frechet_distance"], rel=1e-3)
    assert "mean and covariance alone" in capsys.readouterr().out
    np.savez("deep.npz", protocol=np.array('{"size": 16}'), features=np.float32(1), **statistics)
    Path("half.npz").write_bytes(Path("a.npz").read_bytes()[:900])
    changes = {"other.npz": {"encoder_weights": "0"}, "crop.npz": {"crop": "corner"}, "large.npz": {"size": 32}}
    for name, change in changes.items():
        np.savez(name, **arrays | {"protocol": json.dumps(protocol | change)})
    bad = {f"{name}.npz": f"--score {name}.npz: cannot be read" for name in ("half", "code", "words", "list", "turned")}
    bad |= {"absent.npz": "--score absent.npz: cannot be read", f"{data} --save-reference /proc/x.npz": "cannot be wri"}
    bad |= {"deep.npz": r"its features is \(\)"}
    bad |= {"samples.npz": "lacks mu and sigma", "nan.npz": "its mu is not finite", "flat.npz": r"its sigma is \(8,\)"}
    bad |= {"other.npz": "encoder_weights 0, now", "crop.npz": "crop corner, now", "large.npz": "size 32, now 16"}
    bad |= {"a.npz --features hog": "encoder colours, now hog", "adm.npz --features hog": r"mu is \(8,\), .* have 36"}
    bad |= {"a.npz --save-reference b.npz": "a.npz holds statistics already", f"{data} --size 16": "--size 16"}
    refuses(lambda more: sampling(f"{flags} {more}"), bad)
    refuses(sampling, {f"{model} --save-reference b.npz": "--score SPEC names" for model in (trained, "")})


def test_folders_are_scored_against_each_other(trained, data, hub, tmp_path, capsys):
    features = f"--features {hub}:colours"
    sampling(f"{trained} --n 24 --steps 2 --out out --score {data} {features}")
    expected, crop = last_score(), lambda file: train_vae.center_crop(Image.open(file).convert("RGB"), 16)
    Path("folders").mkdir()
    shutil.copytree("out", "folders/out")
    sampling(f"--score-folder folders/out --score {data} {features}")
    score, out = last_score("folders"), capsys.readouterr().out
    assert f"saved in           {tmp_path}/folders/scores.jsonl" in out and "enlarged" not in out
    same = "frechet_distance kid precision recall images reference_images crop format reference"
    assert all(score[key] == expected[key] for key in same.split())
    # both are cropped and resized alike; a .zip's score goes to the working folder
    with zipfile.ZipFile("a.zip", "w") as archive:
        for i, picture in enumerate(train_vae.to_uint8(photos(9, 40)).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(picture[: 33 + i % 3]).save("picture.png")
            archive.write("picture.png", f"{i}.png")
    sampling(f"--score-folder a.zip --score {data} --size 16 {features}")
    Path("cropped").mkdir()
    with zipfile.ZipFile("a.zip") as archive:
        for name in archive.namelist():
            crop(archive.open(name)).save(f"cropped/{name}")
    zipped = last_score()
    sampling(f"--score-folder cropped --score {data} {features}")
    assert last_score()["frechet_distance"] == zipped["frechet_distance"] and zipped["images"] == 9
    sampling(f"--score {data} --save-reference r.npz {features}")  # without a model, of the images' own size
    sampling(f"--score-folder cropped --score r.npz {features}")
    assert last_score()["frechet_distance"] == zipped["frechet_distance"]
    write_photos("one", 1)
    bad = {f"--score-folder a.zip --score {data}": r"33 \(0.png\) and 34 pixels \(1.png\); --size PIXELS"}
    bad |= {f"--score-folder a.zip --score {data} --size 32": "--score .*16x16 pixels .* compared at 32"}
    bad |= {f"--score-folder {data} --score a.zip --size 32": "--score-folder .*16x16 pixels .* compared at 32"}
    bad |= {"--score-folder out": "--score SPEC names", f"{trained} --score-folder out --score {data}": "leave .* out"}
    bad |= {f"--score-folder out --score {data} --seeds 1 2": "leave --seeds out"}
    bad |= {f"--score-folder one --score {data}": "takes at least 2", "--score-folder nowhere --score out": "nowhere"}
    bad |= {f"--score-folder dead-leaves --score {data}": "--size PIXELS names one"}
    refuses(lambda flags: sampling(f"{flags} {features}"), bad)


def test_several_seeds_are_sampled_and_scored_each(trained, data, hub, monkeypatch, capsys):
    flags, read = f"{trained} --n 5 --steps 2 --score {data} --features {hub}:colours", []
    opened = Images.read
    monkeypatch.setattr(Images, "read", lambda self, i: read.append(self.spec) or opened(self, i))
    sampling(f"{flags} --seeds 3 1 --out many/ --npz x.npz --grid y.png")
    out = capsys.readouterr().out
    assert read.count(str(data)) == 48 + 16  # the reference's, and those looked at before: once
    both = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert [(score["seed"], score["folder"]) for score in both] == [(3, "many-seed3"), (1, "many-seed1")]
    for score in both:
        sampling(f"{flags} --seed {score['seed']} --out one{score['seed']}")
        assert_same_images(f"many-seed{score['seed']}", f"one{score['seed']}", 5)
        assert last_score() == score | {"folder": f"one{score['seed']}"}
        assert np.load(f"x-seed{score['seed']}.npz")["arr_0"].shape == (5, 16, 16, 3)
        assert Path(f"y-seed{score['seed']}.png").exists()
    for key, name in (("frechet_distance", "Frechet distance"), ("kid", "kernel distance")):
        a, b = sorted(score[key] for score in both)
        assert re.search(rf"{name} +{(a + b) / 2:.5g} +{a:.5g} +{b:.5g}\n", out.partition("2 seeds")[2])
    refuses(sampling, {f"{flags} --seed 0 --seeds 1 2": "--seeds: not allowed with argument --seed"})


def test_classes_are_dealt_in_turn_or_at_random(trained, data):
    flags = f"{trained} --n 12 --steps 2 --guidance 3 --seed 6"
    sampling(f"{flags} --deal random --out random --batch 5")
    for name in ("left", "right", "up"):
        sampling(f"{flags} --classes {name} --out {name}")
    random, classes = load_all("random").int(), torch.stack([load_all(name).int() for name in ("left", "right", "up")])
    distances = (classes - random).abs().amax((2, 3, 4))  # (3, 12)
    dealt = distances.argmin(0)
    assert (distances.min(0).values <= 1).all() and len(dealt.unique()) == 3
    assert not torch.equal(dealt, torch.arange(12) % 3)
    protocol = json.loads(Path("random/protocol.json").read_text())
    drawn, network = [], SimpleNamespace(config={"path": "flow"}, device="cpu")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sample, "generate", lambda diffusion, indices, seed, device, y, *rest: drawn.append(y))
        for indices in (range(3000), range(7, 9)):
            sample.generate_by(protocol, network, indices)
    assert torch.equal(drawn[0][:12], dealt) and torch.equal(drawn[1], drawn[0][7:9])
    assert scipy.stats.chisquare(drawn[0].bincount()).pvalue > 1e-3
    # a folder of an earlier version was dealt in turn
    del protocol["deal"]
    Path("left/protocol.json").write_text(json.dumps(protocol | {"classes": [0]}))
    sampling(f"{flags} --classes left --out left")
    refuses(sampling, {f"{flags} --classes left --out left --deal random": "deal equal there, random now"})
    sampling(f"{flags} --deal random")
    assert list(Path(trained, "samples").glob("*-seed6*-random"))
    train(f"--data {write_photos('plain', 4)} --out run --steps 1")
    refuses(sampling, {"run --deal random": "without classes"})


def test_trajectory_and_sampling_without_classes_or_a_null_class(trained, data, capsys):
    sampling(f"{trained} --trajectory --steps 20 --out t")
    table = json.loads(Path("t-trajectory.json").read_text())
    assert len(table["share"]) == 16 and table["t"][0] == 1 and abs(table["share"][0][-1] - 1) < 0.3
    assert Image.open("t-trajectory.png").size == (11 * 18 + 2, 8 * 18 + 2) and "band" in capsys.readouterr().out
    # low bands carry more power, so noise drowns them later
    assert all(0 < t < 1 for t in table["snr_below_1_at"]) and table["snr_below_1_at"][0] > table["snr_below_1_at"][8]
    train(f"--data {write_photos('data', 4)} --out run --steps 1")
    train(f"--data {data} --model uvit-nano --label-dropout 0 --out full --steps 1")
    for flags in ("run --n 3", "run --trajectory", "full --n 3"):
        sampling(f"{flags} --steps 2")
    assert all(len(list(Path(run, "samples").glob("step1-*/*.png"))) == 3 for run in ("run", "full"))
    refuses(sampling, {"full --steps 2 --guidance 2": "--guidance 2.0: .*knows no null class"})
    assert len(checkpoint("full")["model"]["label_emb.weight"]) == 3  # as of the published ImageNet 64: a row a class


@pytest.mark.parametrize("space, path, c", [("dct", "flow", 16.0), ("dct", "vp", 4.0), ("pixel", "flow", 1.0)])
def test_noise_drowns_gaussian_images_when_predicted(space, path, c):
    """Where what two noisy versions of an image have in common falls below what differs."""
    diffusion = small_diffusion(space, 32, "dit-nano", path, "x0", snr_scale=c, keep=12, eta=100.0)
    images = power_law(128, 3, 32, 1.5, seed=1) * 0.3**0.5  # their expected power 0.3 / r^1.5, far from clipping
    x0 = diffusion.encode((images - images.mean((-2, -1), keepdim=True)).float())
    if space == "pixel":  # what the images were made with
        power = torch.from_numpy(bands_by_loops(0.3 * np.maximum(np.hypot(*np.mgrid[:32, :32]), 1) ** -1.5))
    else:  # the codec takes colour and detail away
        power = psd(diffusion.decode(x0)).mean(0)
    ratios, times = [], np.geomspace(0.004, 0.5, 18)
    for t in times:
        alpha, sigma = diffusion.path.alpha_sigma(torch.tensor(t, dtype=torch.float64))
        a, b = (scipy_dct(diffusion.decode(alpha * x0 + sigma * torch.randn(x0.shape))) for _ in range(2))
        noise = bands_by_loops(np.mean((a - b) ** 2, (0, 1)) / 2)
        ratios.append(np.log(np.maximum(bands_by_loops(np.mean(a * b, (0, 1))), 1e-3 * noise) / noise))
    measured = np.exp([np.interp(0, -ratio, np.log(times)) for ratio in np.array(ratios).T])  # -ratio rises with t
    assert 0.005 < measured.min() and measured.max() < 0.5
    np.testing.assert_allclose(sample.drowning_times(diffusion, power), measured, rtol=0.1)


def test_half_of_a_gaussian_band_is_recovered_where_noise_drowns_it(capsys):
    """By the exact denoiser of Gaussian images of slope 1.5; the SNR from the power they are made with."""
    diffusion, r = small_diffusion(size=32, snr_scale=1.0, classes=None), np.hypot(*np.mgrid[:32, :32])
    power = torch.from_numpy(0.05 * np.maximum(r, 1) ** -1.5).float()

    def denoiser(y, guidance, interval, trace):
        def denoise(x, t):
            alpha, sigma = diffusion.path.alpha_sigma(like(t, x))
            x0 = dct.idct2(dct.dct2(x) * (alpha * power / (alpha**2 * power + sigma**2)))
            trace(t[0].item(), x0)
            return x0, (x - alpha * x0) / sigma

        return denoise

    diffusion.denoiser = denoiser
    protocol = dict(seed=0, sampler="euler", steps=250, guidance=1.0, guidance_interval=[0, 1], classes=None)
    sample.trajectory(diffusion, protocol, "exact", rows=24)
    table, cells = json.loads(Path("exact-trajectory.json").read_text()), power.double().numpy()

    def missing(t, band):  # of a prediction along the flow's exact path, which is sqrt(SNR / (1 + SNR)) of the end
        snr = (1 / t - 1) ** 2 * cells
        return bands_by_loops(cells * (snr / (1 + snr)) ** 0.5)[band] / bands_by_loops(cells)[band] - 0.5**0.5

    half = [scipy.optimize.brentq(missing, 1e-4, 0.9, args=band) for band in range(16)]
    np.testing.assert_allclose(table["half_recovered_at"], half, rtol=0.05, atol=0.003)  # steps are of 0.004
    drowned = 1 / (1 + (bands_by_loops(np.ones((32, 32))) / bands_by_loops(cells)) ** 0.5)  # ((1 - t) / t)^2 power = 1
    np.testing.assert_allclose(table["snr_below_1_at"], drowned, rtol=0.15)
    np.testing.assert_allclose(half, drowned, rtol=0.15)
    assert len(table["t"]) == 250 and "SNR<1  half" in capsys.readouterr().out
    # below after it was above: not recovered yet; above from the start: no such time
    amplitudes = torch.tensor([[0.9, 0.2, 0.4, 2**0.5 - 0.4, 1], [0.8, 0.8, 0.9, 1, 1], [0.1, 0.2, 0.2, 0.3, 0.4]])
    times = sample.recovery_times((1.0, 0.8, 0.6, 0.4, 0.2), amplitudes)
    assert abs(times[0] - 0.5) < 1e-6 and math.isnan(times[1]) and times[2] == 0.2


def test_spectrum_of_decoded_noise():
    """In DCT space against every unit impulse, and the figures of the 32-pixel codec; elsewhere noise is white."""
    more = dict(keep=12, eta=469.086, latent_shape=[4, 16, 16], scale=0.2)
    make = lambda space: small_diffusion(space, 32, "dit-nano", **more)
    codec, spectrum, impulses = make("dct").codec, sample.noise_spectrum(make("dct")), torch.eye(16 * 72)
    fields = (codec.decode(impulses.view(-1, 16, 72) / 8) - codec.decode(torch.zeros(1, 16, 72))).double() * 8
    np.testing.assert_allclose(spectrum, bands_by_loops((scipy_dct(fields) ** 2).mean(1).sum(0)), rtol=0.04)
    published = [7.5, 7.5, 6.4, 4.8, 3.0, 1.7, 0.16]
    np.testing.assert_allclose((spectrum / (469.086 / 127.5) ** 2)[[0, 1, 2, 3, 4, 5, 15]], published, rtol=0.07)
    for space, side in (("pixel", 32), ("latent", 16)):
        white = bands_by_loops(np.ones((side, side)))
        white[white == 0] = np.nan  # bands without coefficients
        np.testing.assert_allclose(sample.noise_spectrum(make(space)), white, rtol=0.04)


def test_bad_input_of_training_is_refused_and_leaves_no_folder(data, trained):
    write_photos("flat", 4)
    write_photos("mine/images", 1)
    Path("old.latents").write_bytes(b"SML1")
    strip = 'lambda self, x: {"x_norm_patchtokens": torch.zeros(len(x), 6, 2)}'
    Path("hubconf.py").write_text(f"{HUBCONF}\nColours.forward_features = {strip}")
    dog, here = "--repa dog --encoder hog", f"--repa dog --encoder {Path().absolute()}"
    before, files = (trained / "checkpoint.pt").read_bytes(), sorted(Path().rglob("*"))
    bad = {"--data nowhere": "^--data nowhere: does not exist", "--classes --data flat": "has none"}
    bad |= {"--size 20": "multiple of 2 x block size", "--keep 17": "keep 17", "--model uvit-huge": "uvit-huge"}
    bad |= {"--space pixel --model dit-nano/4 --size 18": "patch 4 does not divide", "--out mine": "and no checkpoint"}
    bad |= {"--model dit-nano/2": "leave /2 out", "--seed -1": "--seed", "--lr nan": "--lr", "--unknown": "--unknown"}
    bad |= {"--snr-scale 0": "^argument --snr-scale: 0 must be a number", "--betas 1 1": "--betas: 1 must lie in"}
    bad |= {"--batch 9 --grad-accum 2": "^--batch 9: must be a multiple", f"--out {data}/up/002.png": "is a file"}
    bad |= {"--batch 0": "^argument --batch: 0 must be a whole number of at least 1$", "--latents x": "--latents x: no"}
    bad |= {"--steps 1.5": "^argument --steps: 1.5 must be a whole number", f"--out {trained} --fresh": "--fresh"}
    bad |= {f"--out {trained} --lr 0.5": "--lr 0.001 there, 0.5 now", "--space pixel --block 4": "--block"}
    bad |= {"--latents old.latents": "^--latents old.latents: .*python train_vae.py --encode DATA --ckpt RUN --out"}
    bad |= {f"{here}:colours": "--encoder .*colours on images of 16 px: 6 tokens form no square"}
    bad |= {f"{here}:fetching": "--encoder .*fetching: .*127.0.0.1:9/weights.pth could not be fetched"}
    bad |= {f"{dog} --repa-depth 8 --model uvit-nano": "--repa-depth 8: uvit-nano has blocks 1 to 7"}
    bad |= {f"{dog} --repa-sigmas 2 1": "--repa-sigmas 2 1: the first must be the smaller"}
    bad |= {f"{dog} --repa-width 64": "--repa-width: means nothing with --repa dog"}
    bad |= {"--encoder hog": "--encoder: means nothing with no --repa"}
    bad |= {"--rmsc --encoder hog --repa-stop 5": "--repa-stop: means nothing with --rmsc alone"}
    refuses(lambda flags: train(f"--data {data} --out new --steps 2 {flags}"), bad)
    result = command("train_diffusion.py --data nowhere", check=False)
    assert result.returncode == 2 and re.fullmatch("error: --data nowhere.*\n", result.stderr)
    assert (trained / "checkpoint.pt").read_bytes() == before and sorted(Path().rglob("*")) == files


TEXTS = {train_diffusion: "--init --data --val --out --latents --vae --model --encoder --cache --cache-targets"}
TEXTS |= {train_vae: "--data --val --out --regularizer --encoder --features --spectrum --encode --ckpt --cache"}
TEXTS |= {sample: "--ckpt --model --vae --out --sampler --classes --score --features --features-weights"}
TEXTS[sample] += " --score-folder --cache"


@pytest.mark.parametrize("program", TEXTS)
def test_an_empty_value_is_an_error_that_names_its_flag(program):
    refuses(lambda flag: program.parse([flag, ""]), {flag: f"^{flag}:? " for flag in TEXTS[program].split()})
    if program is sample:
        refuses(lambda run: program.parse([run]), {"": "^RUN_OR_CKPT: "})


HELP = [(train_diffusion, "--model uvit-s", "0.0002"), (train_diffusion, "--model dit-nano", "0.002")]
HELP += [(train_diffusion, "", "0.002"), (train_vae, "--preset f8d4", "5e-05"), (train_vae, "", "0.001")]


@pytest.mark.parametrize("program, flags, rate", [*HELP, (sample, "", None)])
def test_help_fits_80_columns_and_shows_the_defaults_of_the_recipe(program, flags, rate, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        program.parse([*flags.split(), "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and [line for line in out.splitlines() if len(line) > 80] == []
    assert rate is None or f"--lr X AdamW learning rate (default: {rate})" in " ".join(out.split())


def test_bad_input_of_sampling_is_refused_before_it_begins(trained, autoencoders, published, data, hub):
    state, folder = checkpoint(trained), published[0]
    for name in ("empty", "begun"):
        Path(name).mkdir()
    write_photos("mixed", 4)
    shutil.copy(write_photos("small", 4, size=8) / "000.png", "mixed/a.png")
    contents = {"text.pt": b"hello", "none.pt": b"", "half.pt": (trained / "checkpoint.pt").read_bytes()[:5000]}
    for name, content in (contents | {"begun/checkpoint.pt.tmp": b""}).items():
        Path(name).write_bytes(content)
    other = state | {"config": state["config"] | {"model": "uvit-nano"}, "args": None}
    plain = state | {"config": state["config"] | {"classes": None}}
    plain |= {p: {k: v for k, v in state[p].items() if "y_embedder" not in k} for p in ("model", "ema")}
    saved = {"code.pt": {"model": trained}, "lacks.pt": {"model": {}}, "other.pt": other, "plain.pt": plain}
    for name, content in (saved | {"unknown.pt": {"some.weight": torch.zeros(2)}}).items():
        torch.save(content, name)  # a Path object is code to a pickle
    bad = {name: name for name in contents} | {"code.pt": "plain values", "lacks.pt": "lacks", "nowhere": "no such run"}
    bad |= {"empty": "no checkpoint.pt in it yet", "begun": "being written", "plain.pt --guidance 2": "without classes"}
    bad |= {"other.pt": "another architecture than this UViT", f"{trained} --npz out.npy": "--npz"}
    bad |= {f"{trained} --classes {name}": f"{name}: not one of the 3 classes" for name in ("9", "cat")}
    bad |= {
        f"{trained} --sampler ddim": "ddim",
        str(autoencoders / "kl"): "of train_vae.py; give one of train_diffusion",
    }
    scores = {f"{data} --features {spec}": "--features" for spec in ("nonsense", f"{hub}:absent", f"{data}:colours")}
    scores |= {f"{data} --features-weights {file}": "--features" for file in ("text.pt", "absent.pth")}
    scores |= {"small": "8x8", "mixed": "8x8", "nowhere": "nowhere"}
    bad |= {f"{trained} --score {flags}": message for flags, message in scores.items()}
    # published networks
    sd_vae, dit = f"--vae {folder}/sd-vae.ckpt", f"--ckpt {folder}/DiT.pt"
    either, token = "dit-nano/2 or sit-nano/2", f"--ckpt {folder}/tokens.pth"
    bad |= {f"{dit} {sd_vae}": f"its keys are a DiT's or a SiT's; --model {either} says which"}
    bad |= {f"{dit} --model {name} {sd_vae}": f"is a {either}" for name in ("dit-s/2", "sit-nano/4", "uvit-nano", "x")}
    bad |= {f"--ckpt {folder}/cifar-uvit.pth --model uvit-m": "--model uvit-m: .*uvit.pth is a uvit-nano/4"}
    bad |= {f"{dit} --model dit-nano {sd_vae} --eta 9": "--eta: is for networks on DCT tokens"}
    bad |= {f"{trained} --{name} 2": f"--{name} 2.*: is for --ckpt; .* says itself" for name in ("eta", "snr-scale")}
    bad |= {token: "16 tokens of 6 x 4, 128 wide, 1000 classes.; --eta, --snr-scale must say its own"}
    bad |= {f"{token} --eta 9 --snr-scale 2 {sd_vae}": "is a model of DCT tokens; leave it out"}
    bad |= {f"{token} --eta 9 --snr-scale 2 --guidance 2": "--guidance 2.0: .* no null class"}
    bad |= {f"{token} --eta 9 --snr-scale 2 --block 1": "--block 1 --keep 4: keep 4 must"}
    bad |= {f"--ckpt {folder}/cifar-uvit.pth --model uvit-nano {sd_vae}": "is a model of pixels"}
    bad |= {f"--ckpt unknown.pt --model dit-nano {sd_vae}": "no DiT's, SiT's or U-ViT's"}
    bad |= {f"--ckpt {trained}/checkpoint.pt": "of train_diffusion.py; one of train_diffusion.py is given without"}
    bad |= {
        f"--ckpt {autoencoders}/kl/checkpoint.pt": "a checkpoint of train_vae.py",
        f"--ckpt {trained}": "a directory.; name the file in it",
    }
    bad |= {f"{folder}/DiT.pt": "published weights .* take sample.py --ckpt"}
    refuses(lambda flags: sampling(f"{flags} --n 1 --steps 1 --out x"), bad)
    assert not Path("x").exists()


@pytest.mark.parametrize("block", [2, 4])
def test_keep_auto_is_the_fewest_coefficients_by_brute_force(data, capsys, block):
    """In HOG's features, with Frechet distances of scipy's square root, over every number of coefficients."""
    x, gap = load_all(data), {}
    measure = functools.partial(train_diffusion.measure_codec, open_pixels(data), 16, block, "auto", "entropy")
    features = train_vae.Features("hog", None, 16, "cpu")
    for keep in range(1, block**2 + 1):
        codec = DCTCodec(16, block, keep, 128.0 * block)
        coded = codec.decode(codec.encode(x / 127.5 - 1))
        sets = [repa.HOG()(images)[1].double() for images in (x / 127.5 - 1, ((coded + 1) * 127.5).round() / 127.5 - 1)]
        gap[keep] = frechet_by_hand(*sets)
    thresholds = [0.2, 0.018, 0.01, 0.0025] if block == 2 else [0.2, 0.15, 0.05, 0.0145, 0.006]
    found = [measure(features, threshold, Processes("cpu"))["keep"] for threshold in thresholds]
    assert found == [min(keep for keep in gap if gap[keep] < threshold) for threshold in thresholds]
    assert len(set(found)) == len(found)  # each another
    table = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) dB", capsys.readouterr().out, re.M)
    assert len(table) > len(found)
    assert all(float(shown) == pytest.approx(gap[int(keep)], abs=2e-3) for keep, shown, _ in table)
    refuses(lambda threshold: measure(features, float(threshold), Processes("cpu")), {"0.001": f"even all {block**2} "})
    assert measure(None, 0.5, Processes("cpu"))["keep"] == {2: 4, 4: 9}[block]
    assert f"{block}; with --features SPEC it is measured" in capsys.readouterr().out


def test_keep_auto_stays_with_its_run(data):
    flags = f"--data {data} --model uvit-nano --keep auto --out run"
    train(f"{flags} --features hog --keep-threshold 0.02 --steps 1")
    config = checkpoint("run")["config"]
    assert config["keep"] == 3 and Diffusion(config).codec.token_dim == 18
    train(f"{flags} --keep-threshold 0.02 --steps 2")  # the same without its features, which need not be there
    assert checkpoint("run")["config"] == config
    bad = {f"{flags} --keep 4": "--keep auto there, 4 now", f"{flags} --keep-threshold 1": "threshold 0.02 there, 1.0"}
    bad |= {"--keep some": "argument --keep: some must be", "--keep auto --size 20": "must be a multiple"}
    bad |= {
        "--features hog": "are for --keep auto",
        "--keep-threshold 2": "are for --keep auto",
        "--keep auto --space pixel": "--keep",
    }
    bad |= {"--keep auto --features no --keep-threshold 1": "^--features no: .*neither hog nor REPO:ENTRY"}
    bad |= {"--keep auto --features hog": "--features hog: needs --keep-threshold X"}
    refuses(lambda flags: train(f"--data {data} --steps 3 {flags}"), bad)


def test_nonfinite_steps_are_skipped_and_ten_in_a_row_stop(data, monkeypatch):
    real, calls, bad = train_diffusion.diffusion_loss, itertools.count(1), {3, 4, 6, *range(9, 100)}

    def sometimes_nan(*args, **kwargs):
        loss, aligned = real(*args, **kwargs)
        return loss * (float("nan") if next(calls) in bad else 1.0), aligned

    monkeypatch.setattr(train_diffusion, "diffusion_loss", sometimes_nan)
    train(f"--data {data} --out run --steps 8")
    assert [line["skipped_steps"] for line in metrics("run")] == [0, 0, 1, 1, 0, 1, 0, 0]
    with pytest.raises(InputError, match="10 steps in a row"):
        train(f"--data {data} --out run --steps 50 --save-every 5")
    state = checkpoint("run")
    assert all(v.isfinite().all() for v in state["model"].values()) and state["optimizer"]["state"][0]["step"] == 5


def test_validation_snapshots_and_the_best_checkpoint(data, capsys):
    write_photos("held out", 6)
    flags = f"--data {data} --val 'held out' --out run --eval-every 1 --lr 0.05 --snapshot-every 2"
    for steps in (3, 6):
        train(f"{flags} --steps {steps}")
    out, losses = capsys.readouterr().out, {line["step"]: line["val_loss"] for line in metrics("run", "val_loss")}
    assert all(word in out for word in ("has no classes", "unconditional", "3 classes: left, right, up"))
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert all(f"step {i}/{3 if i < 4 else 6}  val_loss {loss:.4f}, x0 error" in out for i, loss in losses.items())
    best = checkpoint("run", "best.pt")
    assert best["step"] == min(losses, key=losses.get)
    assert [checkpoint("run", f"checkpoint-000000{step}.pt")["step"] for step in (2, 4, 6)] == [2, 4, 6]
    sampling("run/checkpoint-0000004.pt --n 2 --steps 2")
    assert len(list(Path("run/samples").glob("step4-*/*.png"))) == 2
    # the loss of the null class, by hand
    diffusion, g, null = Diffusion(best["config"]), train_vae.generator(0, 4), torch.full((6,), 3)
    diffusion.network.load_state_dict(best["ema"])
    x0 = diffusion.encode(load_all("held out") / 127.5 - 1)
    t = Flow(16.0).time(torch.sigmoid(0.5 + torch.randn(6, generator=g)))
    eps, at = torch.randn(x0.shape, generator=g), t.view(-1, 1, 1)
    error = diffusion.network.eval()((1 - at) * x0 + at * eps, t, null) - x0
    assert losses[best["step"]] == pytest.approx((error.square() / (at**2 + 0.04)).mean().item(), rel=1e-4)
    bad = {f"--val {write_photos('others', 4, classes=['up', 'down'])}": "--val others: its classes are"}
    bad |= {"--val 'held out' --label-dropout 0": "--val held out: has no classes"}
    refuses(lambda flags: train(f"--data {data} --out new --steps 1 {flags}"), bad)


def test_bars_count_steps_on_a_terminal_and_none_is_shown_of_finished_work(data, monkeypatch):
    for n in range(3):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        sys.stderr.isatty = lambda: True
        train(f"--data {data} --out run --steps 30")
        sampling("run --n 4 --steps 1 --out images")
        shown = sys.stderr.getvalue()
        assert "30/30" in shown and "step/s" in shown and "loss" in shown if n == 0 else shown == ""
    for _ in train_vae.progress(range(3), desc="work"):
        time.sleep(0.3)
    shown = sys.stderr.getvalue()
    assert "work" in shown and "\n" not in shown and shown.split("\r")[-2].isspace()  # wiped out when it is done


@pytest.mark.parametrize("space", ["dct", "latent"])
def test_a_process_draws_the_noise_of_its_own_images_only(space, monkeypatch):
    diffusion, drawn, normal_ = small_diffusion(space, 16, "dit-nano", latent_shape=[4, 8, 8]), [], torch.Tensor.normal_
    counted = lambda x, **options: drawn.append(x.numel()) or normal_(x, **options)
    monkeypatch.setattr(torch.Tensor, "normal_", counted)
    diffusion.vae = torch.nn.Identity() if space == "latent" else None
    draw = lambda step, *share: train_diffusion.draw_step(5, step, 64, slice(*share), "uniform", (), diffusion)
    every, later = draw(3, 0, 64), draw(4, 0, 64)
    for start, stop in ((0, 1), (13, 17), (60, 64)):
        drawn.clear()
        part = draw(3, start, stop)
        assert sum(drawn) == (stop - start) * int(np.prod(diffusion.shape)) * (2 if space == "latent" else 1)
        assert all((a is None and b is None) or torch.equal(a[start:stop], b) for a, b in zip(every, part))
    noise = torch.cat([every[1], later[1]]).flatten(1)
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.numpy()) - np.eye(128)).max() < 6 / np.sqrt(noise.shape[1])  # of any two images


def test_batches_are_prepared_one_step_ahead_by_another_thread():
    threads = []

    def batches():
        yield from (threads.append(threading.get_ident()) or i for i in range(4))
        raise InputError("unreadable")

    ahead = train_vae.prefetch(batches())
    for i in range(4):
        assert next(ahead) == i
        time.sleep(0.1)
        assert len(threads) == min(i + 2, 4)  # the next one is made while this one is in use, and no later one
    assert len(set(threads)) == 1 and threading.get_ident() not in threads
    with pytest.raises(InputError, match="unreadable"):
        next(ahead)
    train_vae.prefetch(itertools.count()).close()  # left before its end


def test_share_of_time_spent_waiting_for_data(data, monkeypatch):
    """On a clock that only data and steps move, by 3 and by 1."""
    now, update = [0.0], train_diffusion.update_ema

    def moving(seconds, value=None):
        now[0] += seconds
        return value

    monkeypatch.setattr(train_vae, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=time.sleep))
    monkeypatch.setattr(train_vae, "prefetch", lambda batches: (moving(3, batch) for batch in batches))
    monkeypatch.setattr(train_diffusion, "update_ema", lambda *args: moving(1, update(*args)))
    train(f"--data {data} --out run --steps 3")
    assert [line["data_wait"] for line in metrics("run")] == [0.75, 0.75, 0.75]


def test_amp_auto_is_what_the_hardware_multiplies(monkeypatch):
    chosen = lambda device, amp="auto": train_vae.autocast(amp, torch.device(device))[1]
    for avx512, amx, dtype in ((True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda value=avx512: value)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda value=amx: value)
        assert chosen("cpu") == dtype and chosen("cpu", "off") is None
    for capability, dtype in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert chosen("cuda") == dtype


@pytest.mark.parametrize("space, model", [("dct", "dit-nano"), ("latent", "dit-nano/1")])
def test_networks_alone_run_in_half_precision(space, model):
    """Codec, loss and the samplers' arithmetic see float32, the networks' layers bf16."""
    exact, half = (small_diffusion(space, 16, model, latent_shape=[4, 4, 4], scale=1.0, classes=None) for _ in range(2))
    half.amp, seen = train_vae.autocast("bf16", torch.device("cpu"))[0], []
    half.network.load_state_dict(randomised(exact.network).state_dict())
    layers = [half.network.blocks[0].mlp.fc1]
    if space == "latent":
        half.vae = vae.VAE(**vae.PRESETS["tiny"]).eval()
        exact.vae = copy.deepcopy(half.vae)
        layers.append(half.vae.decoder.conv_in)
    for layer in layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    x0 = [diffusion.encode(photos(2, 16)) for diffusion in (exact, half)]
    assert x0[1].dtype == torch.float32 and (x0[1] - x0[0]).abs().max() <= (0.0 if space == "dct" else 0.1)
    t, eps = torch.tensor([0.3, 0.7]), torch.randn(x0[0].shape)
    loss = lambda diffusion: train_diffusion.diffusion_loss(diffusion, Aligned(diffusion.network), x0[0], eps, t)[0]
    plain, rounded = ((loss(d), train_diffusion.generate(d, [0, 1], 0, "cpu", steps=3)) for d in (exact, half))
    assert set(seen) == {torch.bfloat16} and all(x.dtype == torch.float32 for x in rounded)
    assert torch.allclose(plain[0], rounded[0], rtol=0.05) and not torch.equal(plain[0], rounded[0])
    assert (rounded[1] - plain[1]).abs().mean() < 0.02 and not torch.equal(rounded[1], plain[1])


def test_ema_warm_up_loss_weights_and_times():
    averaged, network, g = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.Generator().manual_seed(0)
    for n in range(30):
        before, decay = averaged.weight.clone(), min(0.7, (1 + n) / (10 + n))
        train_vae.update_ema(averaged, network, n, 0.7)
        assert torch.allclose(averaged.weight, decay * before + (1 - decay) * network.weight)
    logit = torch.logit(train_diffusion.draw_times(100_000, "logit-normal", (0.5, 1.0), Flow(), g))
    assert abs(logit.mean() - 0.5) < 0.02 and abs(logit.std() - 1) < 0.02
    t = train_diffusion.draw_times(100_000, "uniform", None, VP(), g)
    assert 0 <= t.min() < 1e-4 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.01
    diffusion = small_diffusion("dct", 16, "dit-nano", predict="x0", keep=2, classes=None)
    x0, t, weights = torch.randn(5, 4, 12), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), torch.rand(12)
    given = (diffusion, Aligned(diffusion.network), x0, torch.randn_like(x0), t)
    expected = (x0.square() * weights).mean((1, 2)) / (t**2 + 0.04)  # the network starts at zero
    assert torch.allclose(train_diffusion.diffusion_loss(*given, weights=weights)[0], expected, rtol=1e-5)


COMPILED = [(train_diffusion, "--model dit-nano"), (train_vae, "--regularizer dsm+kl --eval-images 8")]
COMPILED += [(train_vae, "--regularizer se --size 32 --eval-images 4")]


@pytest.mark.parametrize("program, flags", COMPILED)
def test_compiled_runs_equal_plain_ones(data, program, flags, monkeypatch):
    """By all of torch.compile but the code it generates, which takes a minute; once for each size of se's views."""
    monkeypatch.setitem(DIT_SIZES, "nano", dict(hidden_size=32, depth=1, num_heads=2))
    monkeypatch.setitem(vae.PRESETS, "tiny", dict(widths=(32,), latent_channels=4, num_res_blocks=1))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.utils.counters.clear()
    for run in ("plain", "compiled"):
        compiling = "--compile" * (run == "compiled")
        line = f"--data {data} --batch 4 --steps 4 --out {run} {compiling} {flags}"
        program.main(program.parse(f"{TINY.replace('--model dit-nano', '')} {line}".split()))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # se: encoder, decoder of two sizes
    losses = [[line["loss"] for line in metrics(run)] for run in ("plain", "compiled")]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert distance(checkpoint("plain")["model"], checkpoint("compiled")["model"]) < 5e-3


FILES = ["dct", "spectral_losses", "dit", "uvit", "vae", "repa", "train_vae", "train_diffusion", "sample"]


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way_only(name):
    """A program imports only programs before it in FILES, a component none; what is slow is imported in functions."""

    def modules(node):
        nodes = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = [name for n in nodes for name in ([n.module] if hasattr(n, "module") else [a.name for a in n.names])]
        return {name.partition(".")[0] for name in names}

    tree = ast.parse((HERE / f"{name}.py").read_text())
    assert modules(tree) & set(FILES[6:]) <= set(FILES[6 : FILES.index(name)])
    at_the_top = set().union(*(modules(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))))
    assert not at_the_top & {"torchvision", "torch_fidelity", "matplotlib"}


# ---- train_vae.py: the real commands, tiny ----------------------------------------------------------------

TINY_VAE = "--size 16 --batch 4 --seed 3 --workers 0 --device cpu --lr-decay none --warmup 1 --log-every 1 "
TINY_VAE += f"--eval-every 1000 --save-every 1000 --eval-images 4 --cache {CACHE}"


def autoencode(flags):
    train_vae.main(train_vae.parse(f"{TINY_VAE} {flags}".split()))


def looking(flags):
    train_vae.main(train_vae.parse(f"--device cpu --workers 0 {flags}".split()))


@pytest.fixture(scope="module")
def autoencoders(data, tmp_path_factory):
    """Runs of a few steps with kl and with dsm, and of more with esm, shared by the tests that only read them."""
    runs = tmp_path_factory.mktemp("autoencoders")
    for name in ("kl", "dsm", "esm"):
        more = "--steps 100 --lr 2e-3" if name == "esm" else "--steps 3"  # latents worth learning
        autoencode(f"--data {data} --cache {runs}/cache --out {runs}/{name} --regularizer {name} {more}")
    return runs


def test_views_follow_their_shares_and_the_seed():
    View, drawn = train_vae.View, []
    for step in range(800):
        side, (view,) = train_vae.draw_views({"dsm"}, 0, 5, step, 16, 4)
        assert side == 64 and view in (View(), *(View("dsm", k=k, block=8) for k in (8, 10, 12)))
        drawn.append(view.k)
        side, (view,) = train_vae.draw_views({"eq"}, 0, 5, step, 32, 8)
        assert view == View() or view in [View("eq", side=n, turns=turns) for n in range(8, 32) for turns in (1, 2, 3)]
        assert side == 256 or (view == View() and side % 8 == 0 and 64 <= side < 256)
        drawn.append("small" if side < 256 else view.kind)
        side, (view, scaled) = train_vae.draw_views({"se"}, 0.25, 5, step, 16, 4)
        assert (side, view) == (64, View()) and scaled in [View("se", factor=n, weight=0.25) for n in (2, 4)]
    for kind, share in {0: 0.25, 8: 0.25, 10: 0.25, 12: 0.25, "eq": 0.5, "small": 0.125, "plain": 0.375}.items():
        assert abs(drawn.count(kind) / 800 - share) < 0.05
    x = photos(1, 32)
    assert torch.allclose(View("eq", side=8, turns=1).apply(x, 4), x.rot90(dims=(2, 3)), atol=1e-6)


@pytest.mark.parametrize("name, decodes", [("kl", 0), ("esm", 0), ("vf", 0), ("dsm", 1), ("eq", 1), ("se", 1)])
def test_every_regularizer_reaches_its_networks_and_the_loss(hub, name, decodes):
    """The encoder always, the decoder where it decodes a view; and the terms add up to the loss."""
    weights = "--kl-weight 0.1 --esm-weight 0.2 --vf-weight 0.3 --se-weight 0.4"
    args = train_vae.parse(f"{TINY_VAE} --size 32 {weights} --regularizer {name} --encoder {hub}:colours".split())
    objective, log = train_vae.make_objective(args, train_vae.Processes("cpu"), None), {}
    drawn = (train_vae.draw_views({name}, 0.4, 0, step, 8, 4)[1] for step in range(99))
    views = next(views for views in drawn if views[-1].kind == name or not decodes)
    objective.autoencoder(photos(2, 32), torch.randn(2, 4, 8, 8), views, log.__setitem__)
    terms = {"kl": 0.1, "esm": 0.2, "se": 0.4, "reconstruction": 1.0, "vf": 0.3 * float(log.get("vf_balance", 0))}
    assert torch.isclose(log["loss"], sum(weight * log[term] for term, weight in terms.items() if term in log))
    log[name if name in log else "reconstruction"].backward()
    reached = lambda net: any(p.grad is not None and p.grad.any() for p in net.parameters())
    assert reached(objective.vae.encoder) and reached(objective.vae.decoder) == decodes


@pytest.mark.parametrize("name", ["esm+dsm", "eq", "se", "vf", "kl"])
def test_training_an_autoencoder_lowers_its_losses(hub, name):
    size, few = 16 if name in ("esm+dsm", "kl") else 32, write_photos("few", 4, 32)
    more = {"vf": f"--encoder {hub}:colours", "esm+dsm": "--esm-weight 0.3", "kl": "--kl-weight 0.01"}
    flags = f"--steps 30 --size {size} --regularizer {name} --lr 3e-3 {more.get(name, '')}"
    autoencode(f"--data {few} --out run {flags}")
    lines, state, (entry,) = metrics("run"), checkpoint("run"), metrics("run", "evaluation")
    least = {"kl": 0.7} if name == "kl" else {"reconstruction": 0.8, "esm": 0.95, "se": 0.95, "vf": 0.95}
    for term in least.keys() & lines[0].keys():
        values = [line[term] for line in lines]
        assert np.mean(values[-10:]) < least[term] * np.mean(values[:3]), term
    assert set(name.split("+")) - {"dsm", "eq"} <= lines[0].keys()
    assert all(line["grad_norm"] > 0 and line["skipped_steps"] == 0 for line in lines)
    assert entry["evaluation"]["psnr"] > 12 and entry["evaluation"]["images"] == 4
    assert abs(state["latent"]["scale"] * state["latent"]["std"] - 1) < 1e-9 and len(state["latent"]["mean"]) == 4
    assert Image.open("run/samples/step0000030.png").size == (4 * (size + 2) + 2, 2 * (size + 2) + 2)


def test_autoencoder_n_and_n_steps_equal_2n_with_everything_on(data):
    flags = f"--data {data} --size 24 --lr 1e-5 --warmup 3 --regularizer esm+dsm+kl --ema 0.9 --gan-weight 1"
    for run, steps in (("one", 4), ("halves", 2), ("halves", 4)):
        autoencode(f"{flags} --gan-start 1 --out {run} --steps {steps}")
    completed(f"train_vae.py {TINY_VAE} {flags} --gan-start 1 --out two --steps 4", 2)
    (one, halves, two), lines = map(checkpoint, ("one", "halves", "two")), metrics("one", "grad_norm")
    keys = ("model", "ema", "discriminator", "optimizer", "critic_optimizer", "latent")
    assert all(distance(one[key], halves[key]) == 0 for key in keys)
    assert all(distance(one[key], two[key]) < 1e-4 for key in keys[:3])
    for key in ("loss", "discriminator", "gan_balance", "grad_norm"):
        values = [[line.get(key, 0) for line in metrics(run, "grad_norm")] for run in ("one", "two")]
        np.testing.assert_allclose(*values, rtol=2e-3)
    terms = [sorted(line.keys() & {"loss", "discriminator", "gan"}) for line in lines]
    assert terms == [["loss"], ["gan", "loss"], ["discriminator"], ["gan", "loss"]]
    # the warm-up of three steps is each optimizer's own: the autoencoder's third is the run's fourth
    np.testing.assert_allclose([line["lr"] for line in lines], np.array([1 / 3, 2 / 3, 1 / 3, 1]) * 1e-5)


@pytest.mark.parametrize("decay", ["none", "linear"])
@pytest.mark.parametrize("start", [0, 5, 20, 99, None])
def test_each_optimizer_warms_up_over_its_own_steps(decay, start):
    """Counted one by one, as the authors' loop does."""
    taken, alternating = [0, 0], 0
    for step in range(40):
        started = start is not None and step >= start
        critic = started and alternating % 2 == 1
        assert train_vae.turn(step, start) == (critic, taken[critic])
        rate = min(8, taken[critic] + 1) * (1 - step / 40 if decay == "linear" else 1)
        assert abs(train_vae.learning_rate(step, 8, 8, 40, decay, taken[critic]) - rate) < 1e-9
        taken[critic], alternating = taken[critic] + 1, alternating + started


def test_autoencoder_killed_is_resumed_and_parts_of_a_batch_equal_a_whole():
    flags = f"--data {write_photos('few', 8, 32)} --size 32 --regularizer eq"
    step = killed_training(4, "train_vae.py", f"{TINY_VAE} {flags} --save-every 2")
    assert step >= 2 and step % 2 == 0
    for run, parts in (("whole", 1), ("killed", 1), ("parts", 2)):
        autoencode(f"{flags} --out {run} --steps {step + 2} --grad-accum {parts}")
    whole, *others = ([line["loss"] for line in metrics(run)] for run in ("whole", "killed", "parts"))
    assert len(whole) == step + 2
    np.testing.assert_allclose(others, [whole] * 2, rtol=1e-3)


def test_nan_steps_of_one_optimizer_are_skipped_and_stop_the_run(data, monkeypatch):
    real, calls = train_vae.Objective.autoencoder, []
    factor = lambda: calls.append(1) or (float("nan") if len(calls) > 3 else 1.0)
    monkeypatch.setattr(train_vae.Objective, "autoencoder", lambda *args, **more: real(*args, **more) * factor())
    flags = "--steps 50 --save-every 2 --size 24 --batch 2 --gan-weight 0.1 --gan-start 0"
    with pytest.raises(InputError, match="10 steps in a row"):  # the discriminator's between them are good
        autoencode(f"--data {data} --out run {flags}")
    state = checkpoint("run")
    assert all(v.isfinite().all() for v in state["model"].values()) and state["optimizer"]["state"][0]["step"] == 3
    assert [line["skipped_steps"] for line in metrics("run", "lr")] == [0] * 6 + [1, 0] * 9 + [1]


def test_best_autoencoder_and_the_recipe_that_evaluates_it(data):
    autoencode(f"--data {data} --val {data} --eval-images 48 --eval-every 3 --out run --lr 0.02 --steps 6")
    losses, x = {line["step"]: line["val_loss"] for line in metrics("run", "val_loss")}, load_all(data) / 127.5 - 1
    net, info = train_vae.load_autoencoder("run/best.pt", "cpu")
    assert list(losses) == [3, 6] and info["step"] == min(losses, key=losses.get)
    assert abs((net.decode(net.encode(x)[0]).clamp(-1, 1) - x).abs().mean() - min(losses.values())) < 1e-5
    state = checkpoint("run")
    for preset, weight, features in (("tiny", 0, "none"), ("f8d4", 0.5, "inception")):
        torch.save(state | {name: state[name] | {"preset": preset} for name in ("config", "args")}, "ckpt.pt")
        args = train_vae.parse("--eval-only --ckpt ckpt.pt".split())
        assert (args.lpips_weight, args.features, args.size, args.data) == (weight, features, None, None)


def test_spectrum_report_and_evaluation(autoencoders, data, hub, capsys):
    few, kl = write_photos("few", 5, 24), autoencoders / "kl"
    autoencode(f"--data {data} --out flat --steps 1 --regularizer esm+kl --esm-delta 0.5 --amp bf16")
    assert metrics("flat")[0]["skipped_steps"] == 0
    assert all(value.dtype == torch.float32 for value in checkpoint("flat")["model"].values())
    capsys.readouterr()
    looking(f"--spectrum {kl} {autoencoders}/dsm/checkpoint.pt {kl} flat --data {few} --out s")
    out, results = capsys.readouterr().out, json.loads(Path("s/spectrum.json").read_text())
    assert list(results) == ["kl", "dsm", str(kl), "flat"] and results["kl"] == results[str(kl)]
    small = resized(load_all(few) / 127.5 - 1, 4)
    assert abs(results["kl"]["image_alpha"] - S.power_law_exponent(small)) < 1e-4
    # a run that ESM trained is judged against its own target, in a table of its own
    assert [result["delta"] for result in results.values()] == [1, 1, 1, 0.5]
    assert results["flat"]["target_alpha"] > results["kl"]["target_alpha"] and "kl: latents" in out
    flat, others = out.split("share of log power per band")[1:]
    for result, table, title in ((results["flat"], flat, "f^0.5"), (results["kl"], others, "4 x 4 latents")):
        rows = table.splitlines()[1:24]
        assert title in table and [row.split()[0] for row in rows[1:9]] == "4 6 8 9 11 12 14 16".split()  # no others
        assert all(f"{result[scale]['kl_of_mean_spectra']:.4f}" in table for scale in ("raw", "unit_std"))
    assert "pip install matplotlib" in out or Image.open("s/spectrum.png").width > 500
    looking(f"--eval-only --ckpt {kl} --data {few} --features {hub}:colours --batch 2")
    out, stem = capsys.readouterr().out, kl / "samples" / "eval-step0000003-few-16"
    score, numbers = json.loads((kl / "scores.jsonl").read_text()), json.loads(Path(f"{stem}.json").read_text())
    assert all(word in out for word in ("rFID", "LPIPS is off", "--lpips-vgg")) and Path(f"{stem}-lowpass.png").exists()
    assert (score["kind"], score["images"], score["features"]) == ("reconstruction", 5, f"{hub}:colours")
    assert numbers["rfid"] == score["frechet_distance"] and abs(numbers["psnr"] - results["kl"]["psnr"]) < 1e-6


def test_report_of_channels_directions_artefacts_and_distances_by_numpy(autoencoders, data, hub, capsys):
    names, x = ("kl", "esm", "dsm"), load_all(data).double() / 127.5 - 1
    paths = " ".join(str(autoencoders / name) for name in names)
    looking(f"--spectrum {paths} --data {data} --features {hub}:colours --out s --batch 48")
    out, results = capsys.readouterr().out, json.loads(Path("s/spectrum.json").read_text())
    table = out[out.index("share of log power") :].splitlines()
    assert max(map(len, table[1:-2])) <= 80

    def rmsc(fields):
        u = fields.numpy().reshape(*fields.shape[:2], -1)
        u = u / np.linalg.norm(u, axis=1, keepdims=True)
        return np.sqrt(((u - u.mean(2, keepdims=True)) ** 2).sum(1).mean(1)).mean()

    def low(fields, block, k=10):  # by loops over blocks
        kept = np.add.outer(np.arange(block), np.arange(block)) < (15 - k) * block / 8
        made = fields.double().numpy().copy()
        for i, j in itertools.product(range(0, made.shape[2], block), range(0, made.shape[3], block)):
            part = np.s_[:, :, i : i + block, j : j + block]
            made[part] = scipy_dct(scipy_dct(made[part]) * kept, inverse=True)
        return torch.from_numpy(made)

    def distance(*images):  # of mean colours, see HUBCONF
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        axes = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).numpy()
        pixels = [((part.clamp(-1, 1) + 1) * 127.5).round().numpy().mean((2, 3)) / 255 for part in images]
        return frechet_by_hand(*((part - mean) / std @ axes for part in pixels))

    for name in names:
        result, (net, _) = results[name], train_vae.load_autoencoder(autoencoders / name, "cpu")
        with torch.no_grad():
            mean, logvar = net.encode(x.float())
            made, lowered = net.decode(mean), net.decode(low(mean, 2).float())
        z = mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=train_vae.generator(0, 4))
        shares = np.array(result["latent_eigenspectrum"])
        expected = {"latent_effective_channels": np.exp(-(shares * np.log(shares)).sum()), "latent_rmsc": rmsc(z)}
        expected |= {"image_rmsc": rmsc(resized(x, 4)), "image_artefacts": artefacts_by_loops(x.numpy(), 4)}
        expected |= {"made_artefacts": artefacts_by_loops(made.double().clamp(-1, 1).numpy(), 4)}
        expected |= {"rfid": distance(x, made), "lowpass_rfid_10": distance(low(x, 2), lowered)}
        for key, value in expected.items():
            assert result[key] == pytest.approx(value, rel=5e-3, abs=1e-4), (name, key)
    rows = {"component 1": ("latent_eigenspectrum", 3), "effective channels": ("latent_effective_channels", 2)}
    rows |= {"RMSC": ("latent_rmsc", 3), "low-pass 10 rFID": ("lowpass_rfid_10", 4)}
    for title, (key, digits) in (rows | {"patch artefacts": ("made_artefacts", 3)}).items():
        values = [results[name][key] for name in names]
        shown = [f"{value[0] if isinstance(value, list) else value:.{digits}f}" for value in values]
        assert next(row for row in table if row.startswith(f"{title} ")).split()[-3:] == shown
    looking(f"--spectrum {autoencoders}/kl --data {data} --out s")
    assert "rfid" not in json.loads(Path("s/spectrum.json").read_text())["kl"] and "rFID" not in capsys.readouterr().out


def test_verdict_on_a_spectrum_does_not_depend_on_scale(side=16, delta=0.5):
    """Latents of just the target's spectrum are matched, flatter ones too noisy, steeper ones too smooth."""
    images = train_vae.to_uint8(0.7 * power_law(8, 3, 4 * side, 2))
    small, net = resized(images / 127.5 - 1, side).numpy(), SimpleNamespace(decode=lambda z: F.interpolate(z, 4 * side))
    for std in (0.5, 6):
        for tilt, word in ((0, "matched"), (1.2, "too noisy"), (-1.2, "too smooth")):
            moments = tilted(small, delta + tilt, std).float(), torch.full((8, 3, side, side), -40.0)
            net.encode = lambda x, moments=moments: moments
            result, _ = train_vae.measure(net, [images], torch.device("cpu"), delta=delta)
            assert train_vae.verdict(result).startswith(word)


def test_latents_are_plain_arrays_of_moments_made_in_float32(autoencoders, data, monkeypatch):
    """np.load alone reads them; --amp changes nothing; complete ones stay."""
    cudnn, matmul, real, seen = torch.backends.cudnn, torch.backends.cuda.matmul, vae.VAE.encode, []
    watched = lambda self, x: seen.append((cudnn.allow_tf32, matmul.allow_tf32, x.dtype)) or real(self, x)
    monkeypatch.setattr(vae.VAE, "encode", watched)
    for name, more in (("one", "--batch 7 --amp bf16"), ("off", "--batch 7 --amp off"), ("one", "")):
        cudnn.allow_tf32 = matmul.allow_tf32 = True
        looking(f"--encode {data} --ckpt {autoencoders}/kl --out {name} {more}")
    assert set(seen) == {(False, False, torch.float32)} and len(seen) == 2 * 2 * 7  # nothing the third time
    refuses(looking, {f"--encode {data} --ckpt {autoencoders}/dsm --out one": "holds other latents"})
    header, images = json.loads(Path("one/header.json").read_text()), Images(str(data), 16)
    values, done, labels = (np.load(f"one/{name}.npy") for name in ("values", "done", "labels"))
    assert values.shape == (48, 2, 8, 4, 4) and values.dtype == np.float16 and (done == 1).all() and header["complete"]
    assert labels.tolist() == images.labels and json.loads(Path("one/names.json").read_text()) == list(images.names)
    assert np.array_equal(np.load("off/values.npy"), values)
    (net, info), x = train_vae.load_autoencoder(autoencoders / "kl", "cpu"), load_all(data) / 127.5 - 1
    moments = [net.encode(view) for view in (x, x.flip(-1))]
    np.testing.assert_allclose(values, torch.stack([torch.cat(view, 1) for view in moments], 1), rtol=2e-3, atol=2e-3)
    mean, logvar = (torch.cat(part) for part in zip(*moments))
    std = ((mean.square() + logvar.exp()).mean() - mean.mean() ** 2).sqrt().item()
    assert abs(header["scale"] * std - 1) < 2e-3 and header["autoencoder"] == info["weights"]


def test_encoding_goes_on_after_a_kill_and_skips_unreadable_images(autoencoders, monkeypatch):
    many, real, calls = write_photos("many", 120), vae.VAE.encode, []
    Path("many/050.png").write_bytes(b"no picture")
    flags = f"--device cpu --workers 0 --encode {many} --ckpt {autoencoders}/kl --batch 1 --out"
    done = lambda: np.load("out/done.npy") if Path("out/header.json").exists() else np.zeros(120)
    killed_after(lambda: np.count_nonzero(done()) >= 60, f"train_vae.py {flags} out")
    left = (done() == 0).sum()
    assert 0 < left <= 60
    refuses(lambda folder: Records(folder, "moments"), {"out": "unfinished", "many": "no folder of latents"})
    monkeypatch.setattr(vae.VAE, "encode", lambda self, x: calls.append(len(x)) or real(self, x))
    looking(f"{flags} out")
    assert sum(calls) == 2 * left  # only what was missing, and mirrored
    looking(f"{flags} whole")
    assert done().tolist() == [1] * 50 + [2] + [1] * 69 and (np.load("out/labels.npy") == -1).all()
    values = [np.load(f"{folder}/values.npy").astype(float) for folder in ("out", "whole")]
    assert np.abs(values[0] - values[1]).max() < 0.01 and (values[0][50] == 0).all()
    monkeypatch.setattr(train_vae, "free_disk", lambda folder: 10_000)
    refuses(looking, {f"{flags} other": "--out other: needs 0.1 MiB, its disk has 0.0 free"})


@pytest.mark.parametrize("layout", ["run", "average", "SD-VAE"])
def test_an_autoencoder_begins_with_the_weights_of_another(autoencoders, data, layout, capsys):
    state = checkpoint(autoencoders / "esm")
    old, changed = state["model"], "post_quant_conv.weight"
    if layout == "average":
        state = state | {"ema": {key: value + 1 for key, value in old.items()}}
    if layout == "SD-VAE":
        state = {"state_dict": {f"first_stage_model.{key}": value for key, value in old.items()}}
    torch.save(state, "begin.pt")
    flags = f"--data {data} --regularizer kl --gan-weight 0.5 --gan-start 0 --size 24 --steps 1 --lr 0 --ema 0.9"
    autoencode(f"{flags} --out new --init begin.pt")
    new = checkpoint("new")
    assert distance(state.get("ema") or old, new["model"]) == distance(new["ema"], new["model"]) == 0
    name, step = ("published", "") if layout == "SD-VAE" else ("tiny", ", step 100")
    assert f"init     begin.pt, {name}{step}\n" in capsys.readouterr().out
    if layout != "run":
        return
    Path("begin.pt").unlink()
    autoencode(f"{flags} --out new --init begin.pt --steps 2")
    torch.save(old | {changed: torch.zeros(4, 3, 1, 1)}, "cut.pt")
    differs = rf"1 of \d+ tensors .*{changed} \(4, 3, 1, 1\) there, \(4, 4"
    refuses(autoencode, {f"{flags} --out cut --init cut.pt": differs})
    autoencode(f"{flags} --out cut --init cut.pt --init-partial")
    began = checkpoint("cut")["model"]
    assert [key for key in old if distance(began[key], old[key])] == [changed]


def test_bad_input_of_autoencoders(autoencoders, trained, data):
    kl, state = autoencoders / "kl", checkpoint(autoencoders / "kl")
    before = (kl / "checkpoint.pt").read_bytes()
    torch.save(state | {"config": state["config"] | {"widths": [32, 32, 64]}}, "other.pt")
    Path("old.latents").write_text("made by an earlier version")
    bad = {"--size 18": "--size 18: --preset tiny takes multiples of 4", "--regularizer eq+dsm": "choose one"}
    bad |= {"--regularizer dsm --size 12": "DSM's blocks .* 3x3 here", "--regularizer se": "cannot be halved"}
    bad |= {"--regularizer vf --encoder nowhere:x --size 32": "--encoder nowhere:x"}
    bad |= {"--size 96 --preset f16d16 --regularizer eq --gan-weight 0.5": "the discriminator would see 16"}
    bad |= {
        f"--out {kl} --regularizer kl --preset f4d4 --gan-weight 0 --lpips-weight 0": "--preset tiny there, f4d4 now"
    }
    bad |= {f"--out {trained}": "a checkpoint of train_diffusion.py; give one of train_vae.py"}
    refuses(autoencode, {f"--data {data} --steps 2 --out new {line}": text for line, text in bad.items()})
    assert (kl / "checkpoint.pt").read_bytes() == before and not Path("new/checkpoint.pt").exists()
    bad = {"--eval-only": "--eval-only: name the autoencoder with --ckpt"}
    bad |= {"--eval-only --ckpt other.pt": "another architecture than this VAE"}
    bad |= {f"--encode {data} --ckpt {kl} --size 18": "--size 18: the autoencoder .* multiples of 4"}
    refuses(looking, bad | {f"--encode {data} --ckpt {kl} --out old.latents": "is a file"})


def test_what_is_absent_is_off_in_a_line_and_so_it_stays(data, lpips_files, capsys, monkeypatch):
    files = f"--lpips-vgg {lpips_files[0]} --lpips-heads {lpips_files[1]}"
    on, off = (f"--data {data} --lpips-weight 0.5 --size 24 --out {run}" for run in ("on", "off"))
    autoencode(f"{on} --steps 1 {files}")
    assert metrics("on")[0]["lpips"] > 0 and metrics("on", "evaluation")[0]["evaluation"]["lpips"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", lambda url, file, *_, **__: open(f"{file}/no/network"))
        patch.setattr(torch.hub, "get_dir", lambda: "downloads")
        capsys.readouterr()
        autoencode(f"{off} --steps 1 --gan-weight 0.5")
        refuses(autoencode, {f"{on} --steps 2": "was begun with LPIPS; name its weights by --lpips-vgg"})
    out = capsys.readouterr().out
    assert re.search("LPIPS is off(?=.*--lpips-vgg FILE)(?=.*https://)(?=.*downloads)", out)
    assert "warning: --gan-start 50000 is not before the end" in out
    autoencode(f"{off} --steps 2 --gan-weight 0.5 {files}")
    assert not any("lpips" in line for line in metrics("off"))


# ---- latent diffusion and alignment: the real commands ----------------------------------------------------


@pytest.fixture(scope="module")
def latents(autoencoders, data, tmp_path_factory):
    """The latents of the shared images by the autoencoder trained with esm: 4 x 4 x 4."""
    folder = tmp_path_factory.mktemp("latents") / "data.latents"
    looking(f"--encode {data} --ckpt {autoencoders}/esm --out {folder}")
    return folder


def amended(records, folder, **header):
    """A copy of records with another header."""
    shutil.copytree(records, folder)
    header = json.loads((records / "header.json").read_text()) | header
    Path(folder, "header.json").write_text(json.dumps(header))
    return folder


FIRST_CELL = [("dit-nano/1", "vp", "x0", ""), ("uvit-nano/1", "vp-sd", "eps", "--no-classes")]
FIRST_CELL += [("uvit-nano", "flow", "v", "--classes")]


@pytest.mark.parametrize("model, path, predict, classes", FIRST_CELL)
def test_latent_diffusion_trains_and_samples(latents, data, capsys, model, path, predict, classes):
    tiny, flags = TINY.replace("--size 16 ", ""), f"--model {model} --path {path} --predict {predict} {classes}"
    line = f"--latents {latents} --out run --val {data} --steps 60 {flags}".split()  # the latents know their size
    train_diffusion.main(train_diffusion.parse([*tiny.split(), *line]))
    config, header = checkpoint("run")["config"], Records(latents, "moments").header
    (last,), lines = metrics("run", "val_loss"), metrics("run")
    assert all(config[key] == header[key] for key in ("scale", "autoencoder", "size"))
    assert config["latent_shape"] == [4, 4, 4] and len(last["x0_error_by_band"]["0.5"]) == 16
    assert config["classes"] == (None if "--no-classes" in flags else ["left", "right", "up"])
    assert 0 < last["val_loss"] < 0.92 * np.mean([line["loss"] for line in lines[:5]])
    sampling(f"run --n 4 --steps 3 --out out --score {data} --features hog")  # through the decoder that it keeps
    assert json.loads(Path("scores.jsonl").read_text())["autoencoder"] == config["autoencoder"]
    assert Image.open("out/000003.png").size == (16, 16)
    sampling("run --trajectory --steps 4 --out t")
    rows = json.loads(Path("t-trajectory.json").read_text())["share"]
    shares = np.array([row for row in rows if row[0] is not None])
    assert len(shares) == 8 and np.isfinite(shares).all()  # 4 x 4 latents have no other bands
    assert np.allclose(shares[:, -1], 1) and not np.allclose(shares[:, 0], 1, atol=0.05)
    train(" ".join(line))
    assert "finished" in capsys.readouterr().out


def test_one_pair_encodes_and_decodes(latents, autoencoders, data):
    """Moments of the records, drawn anew, mirrored, against the autoencoder itself; and back."""
    records, (net, info) = Records(latents, "moments"), train_vae.load_autoencoder(autoencoders / "esm", "cpu")
    scale, flip = records.header["scale"], torch.arange(48) % 3 == 0
    latent = dict(latent_shape=[4, 4, 4], scale=scale, autoencoder=info["weights"])
    diffusion, x = small_diffusion("latent", 16, "dit-nano", **latent), train_vae.mirrored(load_all(data), flip)
    diffusion.vae, moments = net, records.read(np.arange(48), flip.numpy()).float()
    mean, logvar = (moment.detach() for moment in net.encode(x))
    for seed in (0, 1):
        noise = normal(48, 4, 4, 4, seed=seed).float()
        oracle = scale * (mean + (0.5 * logvar).exp() * noise)
        live = train_diffusion.to_x0(diffusion, x, None, noise)
        assert torch.allclose(live, oracle, atol=1e-5) and not live.requires_grad
        assert (train_diffusion.to_x0(diffusion, None, moments, noise) - oracle).abs().max() < 0.01
    assert torch.allclose(diffusion.encode(x), scale * mean, atol=1e-5)  # without noise, the mean
    assert 0.8 < live.std() < 1.2  # that is what the scale is for
    assert torch.allclose(diffusion.decode(scale * mean), net.decode(mean).clamp(-1, 1), atol=1e-5)
    first, second = (train_diffusion.draw_step(3, i, 8, slice(0, 8), "uniform", None, diffusion) for i in (0, 1))
    assert distance(first[3], second[3]) > 0.5 < distance(first[1], first[3])  # by step, and not the diffusion's


def test_latents_normalised_by_channel_have_mean_0_and_std_1(autoencoders, data, monkeypatch, capsys):
    """When they are made, and later, when only the header changes."""
    flags, real = f"--encode {data} --ckpt {autoencoders}/esm --out", vae.VAE.encode
    looking(f"{flags} made --latent-norm channel")
    looking(f"{flags} changed")
    before, config = Path("changed/values.npy").read_bytes(), json.loads(Path("changed/header.json").read_text())
    monkeypatch.setattr(vae.VAE, "encode", None)
    looking(f"{flags} changed --latent-norm channel")
    looking(f"{flags} changed")  # stays
    monkeypatch.setattr(vae.VAE, "encode", real)
    header = json.loads(Path("changed/header.json").read_text())
    assert header == json.loads(Path("made/header.json").read_text()) and config["shift"] == 0 < config["scale"]
    assert Path("changed/values.npy").read_bytes() == before and "scale 0" in capsys.readouterr().out
    values = np.load("made/values.npy").astype(float)  # (N, 2, 2C, h, w)
    drawn = values[:, :, :4] + np.exp(values[:, :, 4:] / 2) * normal(16, 48, 2, 4, 4, 4).numpy()
    z = (drawn - np.reshape(header["shift"], (4, 1, 1))) * np.reshape(header["scale"], (4, 1, 1))
    of_channels = (0, 1, 2, 4, 5)
    assert np.allclose(z.mean(of_channels), 0, atol=0.05) and np.allclose(z.std(of_channels), 1, atol=0.05)
    refuses(looking, {"--latent-norm one": "^--latent-norm one: is for --encode"})


def test_runs_on_latents_normalised_by_channel_train_decode_and_sample(autoencoders, data):
    """Cached ones and live ones."""
    net, _ = train_vae.load_autoencoder(autoencoders / "esm", "cpu")
    mean, logvar = (moment.detach() for moment in net.encode(load_all(data) / 127.5 - 1))
    encode, line = f"--encode {data} --ckpt {autoencoders}/esm --out made", "--model dit-nano --steps 2 --seed 3"
    looking(f"{encode} --latent-norm channel")
    header = json.loads(Path("made/header.json").read_text())
    train(f"--latents made {line} --out cached")
    train(f"--vae {autoencoders}/esm --latent-norm channel --data {data} {line} --out live")
    looking(f"{encode} --latent-norm one")  # the run keeps its own
    train(f"--latents made {line.replace('2', '3', 1)} --out cached")
    for run in ("cached", "live"):
        config = checkpoint(run)["config"]
        assert config["latent_norm"] == "channel" and np.allclose(config["scale"], header["scale"], rtol=0.1)
        diffusion = Diffusion(config, vae=net)
        moments = torch.cat((mean, logvar), 1)
        x0 = diffusion.from_moments(moments.repeat(16, 1, 1, 1), normal(768, 4, 4, 4).float()).numpy()
        assert np.allclose(x0.mean((0, 2, 3)), 0, atol=0.1) and np.allclose(x0.std((0, 2, 3)), 1, atol=0.1)
        back = diffusion.decode(diffusion.from_moments(moments))
        assert torch.allclose(back, net.decode(mean).clamp(-1, 1), atol=1e-4)
        sampling(f"{run} --n 2 --steps 2 --sampler euler --out {run}-pictures")
        x = torch.stack([torch.randn(4, 4, 4, generator=train_vae.generator(0, i)) for i in (0, 1)])
        shift, scale = (torch.tensor(config[name]).view(4, 1, 1) for name in ("shift", "scale"))
        network = train_diffusion.build_network(config)
        network.load_state_dict(checkpoint(run)["ema"])
        for t in (1.0, 0.5):  # Euler's steps by hand
            x0 = network.eval()(x, torch.full((2,), t), torch.tensor([0, 1])).detach()
            x = (1.5 - t) * x0 + (t - 0.5) * (x - (1 - t) * x0) / t
        picture = train_vae.to_uint8(net.decode(x / scale + shift).clamp(-1, 1)).permute(0, 2, 3, 1).numpy()
        for i in (0, 1):
            assert np.abs(np.asarray(Image.open(f"{run}-pictures/00000{i}.png")).astype(int) - picture[i]).max() <= 1
    refuses(train, {f"--latents made --latent-norm one --out x {line}": "^--latent-norm one: is for --vae without"})


def test_a_config_json_normalises_unless_the_flag_does(data, published, capsys):
    net, (mean, std) = randomised(vae.VAE((32, 32), 4, 1)), ([0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0])
    config = {"_class_name": "AutoencoderKL", "scaling_factor": 2.0, "latents_mean": mean, "latents_std": std}
    Path("sd").mkdir()
    Path("sd/config.json").write_text(json.dumps(config))
    state = as_diffusers(net.state_dict(), 2, 1) | {"unused": torch.zeros(2**20)}
    Path("sd/diffusion_pytorch_model.safetensors").write_bytes(as_safetensors(state))
    said = {"latent_norm": "published", "scale": [4.0, 2.0, 1.0, 0.5], "shift": mean}
    looking(f"--encode {data} --ckpt sd --size 16 --out said")
    looking(f"--encode {data} --ckpt sd --size 16 --out measured --latent-norm one")
    header = Records("said", "moments").header
    assert said.items() <= header.items() and Records("measured", "moments").header["shift"] == 0.0
    train(f"--vae sd --data {data} --model dit-nano --steps 1 --out run")
    assert "scale 0.5000 to 4.0000, shift -0.2000 to 0.3000, by diffusers' config.json" in capsys.readouterr().out
    assert Path("run/autoencoder.pt").stat().st_size < 2**21  # of the file it keeps the autoencoder alone
    config, copied = checkpoint("run")["config"], train_vae.read_checkpoint("run/autoencoder.pt", "autoencoder")
    assert said.items() <= config.items() and said.items() <= copied["config"].items()
    given = train_vae.load_autoencoder("sd", "cpu")
    config, _ = sample.published_network(published[0] / "DiT.pt", "dit-nano/2", given)
    assert (config["scale"], config["shift"]) == (said["scale"], mean)


def test_published_autoencoder_weights_are_diffused_on(data):
    """Weights in SD-VAE's layout, another shape (f2, 8 channels), and no scale: it is measured on the data."""
    net, flags = vae.VAE((32, 32), 8, 1), f"--vae sd.ckpt --data {data} --out run --model dit-nano"
    torch.save({"state_dict": {f"first_stage_model.{k}": v for k, v in net.state_dict().items()}}, "sd.ckpt")
    train(f"{flags} --steps 2")
    mean, logvar = net.encode(load_all(data) / 127.5 - 1)
    std = ((mean.square() + logvar.exp()).mean() - mean.mean() ** 2).sqrt().item()
    config = checkpoint("run")["config"]
    assert abs(config["scale"] * std - 1) < 1e-3 and config["latent_shape"] == [8, 8, 8]
    Path("sd.ckpt").unlink()
    sampling("run --n 2 --steps 2 --out out")
    train(f"{flags} --steps 3")  # its own copy serves


def test_mismatches_between_latents_autoencoder_and_run(latents, autoencoders, trained, data):
    esm, dsm = autoencoders / "esm", autoencoders / "dsm"
    line, new = f"--latents {latents} --model dit-nano/1 --steps 2", f"--vae {dsm} --data {data} --model dit-nano/1"
    train(f"{line} --out run")
    before = Path("run/checkpoint.pt").read_bytes()
    looking(f"--encode {data} --ckpt {dsm} --out other")
    for name, header in {"half": {"complete": False}, "moved": {"vae": "gone/away"}, "cut": {}}.items():
        amended(latents, name, **header)
    Path("cut/values.npy").write_bytes((latents / "values.npy").read_bytes()[:-4096])
    shutil.copy("run/checkpoint.pt", "alone.pt")
    ours, theirs = (train_vae.load_autoencoder(path, "cpu")[1]["weights"] for path in (esm, dsm))
    bad = {f"{line} --latents other --out run": f"other: made by autoencoder {theirs}, .*{ours}"}  # though it is done
    bad |= {f"{line} --vae {dsm}": f"{theirs}.* made the latents of .*{ours}", "--latents cut": "cut: damaged"}
    bad |= {f"{new} --out run --steps 4": f"dsm: another autoencoder .{theirs}", "--latents half": "half: unfinished"}
    bad |= {"--latents absent": "absent: no folder of latents", f"{line} --size 32": "--size 32: .* of 16 pixels"}
    bad |= {
        f"{line} --latents moved": "gone/away: no such autoencoder; --vae",
        f"{line} --block 4": "--block.*: only for",
    }
    more = write_photos("more", 50, classes=["left", "right", "up"])
    bad |= {f"{line} --data {more}": "made of other images.*count 48, now 50"}
    refuses(lambda flags: train(f"--out new {flags}"), bad)
    assert Path("run/checkpoint.pt").read_bytes() == before
    bad = {f"run --vae {dsm}": f"{theirs}.*run .{ours}", f"{trained} --vae {dsm}": "--vae .*works on dct"}
    bad |= {"run --model dit-nano": "--model dit-nano: is for --ckpt"}
    refuses(sampling, bad | {"alone.pt": "autoencoder.pt: no such autoencoder; --vae"})
    sampling(f"alone.pt --vae {esm} --n 1 --steps 1 --out out")
    train(f"{line} --latents moved --vae {esm} --out m")  # the flag says where it is


ALIGNED = [("repa", "latent", 0.5), ("irepa", "dct", 0.25), ("dog", "latent", 1.0)]


@pytest.mark.parametrize("method, space, weight", ALIGNED)
def test_alignment_lowers_both_losses_and_sampling_needs_no_projector(latents, data, hub, method, space, weight):
    more = {"repa": "--repa-width 32", "irepa": "--repa-weight 0.25"}.get(method, "")
    given = f"--latents {latents} --model uvit-nano/1" if space == "latent" else f"--data {data} --block 2"
    train(f"{given} --out run --steps 60 --repa {method} --encoder {hub}:colours {more}")
    losses = np.array([(line["loss"], line["alignment"]) for line in metrics("run")])
    first, last = losses[:3].mean(0), losses[-5:].mean(0)
    assert last[0] < 0.9 * first[0] and last[1] < first[1] - 0.1
    state = checkpoint("run")
    assert state.pop("projector") and state.pop("target_dim") == 8 and state["args"]["repa_weight"] == weight
    for name in ("with", "without"):
        sampling(f"run --n 3 --steps 3 --out {name}")
        torch.save(state, "run/checkpoint.pt")  # without its projector
    assert_same_images("with", "without", 3, tolerance=0)


@pytest.fixture
def encoder_calls(monkeypatch):
    calls, real = [], repa.Encoder.forward
    monkeypatch.setattr(repa.Encoder, "forward", lambda self, x: calls.append(len(x)) or real(self, x))
    return calls


def test_alignment_changes_nothing_else(data, hub):
    """The network starts the same with and without it; with weight 0 and the clipping off its weights end the same."""
    flags, dog = f"--data {data} --steps 5 --clip 0", f"--repa dog --encoder {hub}:colours"
    for run, more in (("none", ""), ("zero", f"{dog} --repa-weight 0"), ("some", dog)):
        train(f"{flags} --out {run} {more}")
    none, zero, some = (checkpoint(run)["model"] for run in ("none", "zero", "some"))
    assert distance(none, zero) == 0 < distance(none, some)


@pytest.mark.parametrize("space, stops", [("dct", (4, 8)), ("latent", (3, 8))])
def test_no_encoder_runs_after_the_stop_however_the_run_is_cut(latents, data, hub, encoder_calls, space, stops):
    given = f"--data {data} --block 2" if space == "dct" else f"--latents {latents} --model dit-nano/1"
    flags = f"{given} --repa irepa --encoder {hub}:colours --repa-stop 4 --save-every 2"
    train(f"{flags} --out whole --steps 8")
    assert encoder_calls == [1] + [8] * 4  # a look at its tokens, and four steps
    assert [("alignment" in line) for line in metrics("whole")] == [True] * 4 + [False] * 4
    encoder_calls.clear()
    for steps in stops:
        train(f"{flags} --out parts --steps {steps}")
    assert distance(checkpoint("whole"), checkpoint("parts")) == 0
    assert sum(encoder_calls) == 8 * 4 + sum(start < 4 for start in (0, *stops))


def test_cached_targets_equal_live_ones_and_need_no_images(latents, data, hub, encoder_calls, monkeypatch):
    dog, tokens = "--model dit-nano/1 --steps 4 --repa dog --repa-sigmas 0.6 2 --lr 1e-5", "--cache-targets own.tokens"
    shutil.copytree(data, "images")
    plain = f"--latents {amended(latents, 'c', data='images')} {dog}"
    live = f"{plain} --encoder {hub}:colours"
    train(f"{live} --out live")
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):  # while the tokens are made
        real = repa.Encoder.forward
        patched.setattr(repa.Encoder, "forward", lambda self, x: 1 / 0 if len(encoder_calls) > 7 else real(self, x))
        train(f"{live} {tokens} --out cached")
    encoder_calls.clear()
    train(f"{live} {tokens} --out cached")
    assert encoder_calls == [1, 16, 16]  # the first 32, and their mirror images, were there
    lines = [[(line["loss"], line["alignment"]) for line in metrics(run)] for run in ("live", "cached")]
    np.testing.assert_allclose(*lines, rtol=2e-3, atol=2e-3)
    values, x = np.load("own.tokens/values.npy"), load_all(data) / 127.5 - 1
    assert values.shape == (48, 2, 16, 8) and values.dtype == np.float16
    oracle = [repa.resize_tokens(repa.load_encoder(f"{hub}:colours")(view)[0], 4) for view in (x, x.flip(-1))]
    np.testing.assert_allclose(values, torch.stack(oracle, 1), atol=2e-3)
    Path("images").rename("moved")  # the run that reads the images goes on, told where they are
    refuses(train, {f"{live} --out live --steps 5": "images: does not exist.* c was made of.*--data says"})
    train(f"{live} --out live --steps 5 --data moved")
    shutil.rmtree("moved")
    encoder_calls.clear()
    train(f"{plain} {tokens} --out again")  # the header says whose tokens they are
    assert distance(checkpoint("again")["model"], checkpoint("cached")["model"]) == 0 and not encoder_calls
    few, bad = write_photos("few", 8), {f"{plain} {tokens} --encoder hog": "tokens of .*colours, not of --encoder hog"}
    bad |= {f"{plain} {tokens} --model dit-nano": "4 x 4 tokens, the model has 2 x 2"}
    bad |= {f"{plain} --data {data} --cache-targets c": "no encoder tokens but latents"}
    bad |= {f"--latents c {tokens}": "--cache-targets: means nothing with no --repa"}
    bad |= {f"{dog} --model dit-nano/4 --space pixel --data {few} {tokens}": "count 48, now 8"}
    refuses(train, {f"{line} --out new": text for line, text in bad.items()})


def test_aligned_latent_diffusion_on_two_processes_equals_one(latents, hub):
    """Across the step where the alignment stops, the targets being made by both; local rank 0 fetches the encoder."""
    fetching = 'import os, time\nif not os.path.exists("weights"):\n    time.sleep(0.2)  # a download\n'
    fetching += '    with open("weights", "a") as file:\n        file.write(os.environ["LOCAL_RANK"] + " ")\n'
    Path("hubconf.py").write_text(HUBCONF + fetching)
    flags = f"--latents {latents} --model dit-nano/2 --steps 4 --lr 1e-5 --repa dog --repa-stop 2"
    two = f"{flags} --encoder {Path().absolute()}:colours --out two --cache-targets two.tokens"
    completed(f"train_diffusion.py {TINY} {two}", 2)
    assert Path("weights").read_text() == "0 "
    train(f"{flags} --encoder {hub}:colours --out one --cache-targets one.tokens --grad-accum 2")
    for one, two in zip(metrics("one"), metrics("two")):
        assert one.keys() == two.keys() and abs(one["loss"] - two["loss"]) < 1e-4
        assert abs(one.get("alignment", 0) - two.get("alignment", 0)) < 1e-5
        assert abs(one["grad_norm"] / two["grad_norm"] - 1) < 1e-3
    values = [np.load(f"{run}.tokens/values.npy").astype(float) for run in ("one", "two")]
    assert np.abs(values[0] - values[1]).max() < 2e-3


def test_targets_are_compared_before_training(latents, data, hub, capsys):
    train(f"--latents {latents} --model dit-nano/1 --encoder {hub}:colours --rmsc --repa-sigmas 0.5 1.5 --out run")
    out = capsys.readouterr().out
    tokens = repa.resize_tokens(repa.load_encoder(f"{hub}:colours")(load_all(data) / 127.5 - 1)[0], 4)
    rows = {"raw (repa)": tokens, "irepa": repa.irepa_target(tokens), "dog 0.5 1.5": repa.dog_target(tokens, 0.5, 1.5)}
    for name, target in rows.items():
        field, (words,) = repa.as_map(target), re.findall(rf"^{re.escape(name)}(.*)", out, re.M)
        oracle = torch.stack((repa.lds(field), S.rmsc(field), *S.directional_energy(field, 2).T)).mean(1)
        np.testing.assert_allclose([float(word) for word in words.split()], oracle, atol=6e-4)
    assert "48 images" in out and "4 x 4 tokens of 8" in out
    assert Image.open("run-targets.png").size == (8 * 18 + 2, 9 * 18 + 2) and not Path("run").exists()
    train(f"--data {data} --encoder hog --rmsc --out pixels")  # without a latent anywhere
    assert "2 x 2 tokens of 36" in capsys.readouterr().out


def test_benchmarks_print_their_timers_and_leave_nothing(latents, data, hub, monkeypatch, capsys):
    Path("temporary").mkdir()
    more, leaving = f"--data {data} --cache cache --benchmark 2 --out none", []
    aligned = f"--latents {latents} --repa repa --encoder {hub}:colours --cache-targets tokens"
    monkeypatch.setenv("TMPDIR", os.path.abspath("temporary"))
    outs = {"targets": command(f"train_diffusion.py {TINY} {aligned} {more}").stdout}
    # the others without starting a process, of which what is done at its end is caught
    monkeypatch.setattr(tempfile, "tempdir", os.environ["TMPDIR"])
    at_exit = SimpleNamespace(register=lambda *call, **options: leaving.append(functools.partial(*call, **options)))
    monkeypatch.setattr(train_vae, "atexit", at_exit)
    for part, program in {"encode": train, "forward": autoencode}.items():
        program(more)
        leaving.pop()()
        outs[part] = capsys.readouterr().out
    for part, out in outs.items():
        words = (part, "data", "forward", "backward", "optimizer", "images/s", "GFLOP/s", "peak memory")
        assert all(word in out for word in words)
    assert list(Path().rglob("*")) == [Path("temporary")] and not leaving


# ---- published networks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(autoencoders, tmp_path_factory):
    """Checkpoints in the published layouts, of small sizes -> folder, {file: (network, --model, t at 1, path)}"""
    folder, nano, bare = tmp_path_factory.mktemp("published"), DIT_SIZES["nano"], dict(conv=False, mlp_time_embed=True)
    prefixed = lambda prefix, net: {f"{prefix}{key}": value for key, value in net.state_dict().items()}
    dit = randomised(DiT(8, 2, 4, num_classes=10, **nano), 1).eval()
    plain = randomised(DiT(8, 2, 4, num_classes=10, learn_sigma=False, **nano), 4).eval()
    pixels = randomised(UViT(16, 4, 3, num_classes=11, **UVIT_SIZES["nano"]), 2).eval()
    uvit = randomised(UViT(8, 2, 4, **bare, **UVIT_SIZES["nano"]), 3).eval()
    unused = {"loss.logvar": torch.zeros(())}
    files = {"sd-vae.ckpt": {"state_dict": checkpoint(autoencoders / "esm")["model"] | unused}}
    files |= {"DiT.pt": dit.state_dict(), "bare-REPA.pt": plain.state_dict(), "uvit.pth": uvit.half().state_dict()}
    tokens = UViT(num_tokens=16, token_dim=24, num_classes=1000, mlp_time_embed=True, **UVIT_SIZES["nano"])
    files["tokens.pth"] = prefixed("module.", randomised(tokens, 5))  # as DCTdiff's of ImageNet, without a null class
    files |= {"SiT.pt": {"model": {}, "ema": prefixed("module.", dit), "args": argparse.Namespace(lr=1)}}
    files |= {"REPA.pt": {"ema": prefixed("_orig_mod.module.", dit) | {"projectors.0.0.weight": torch.zeros(2)}}}
    for name, state in (files | {"cifar-uvit.pth": prefixed("module._orig_mod.", pixels)}).items():
        torch.save(state, folder / name)
    networks = {"DiT.pt": (dit, "dit-nano/2", 999, "vp"), "SiT.pt": (dit, "sit-nano", 1, "flow")}
    networks |= {"REPA.pt": (dit, "sit-nano/2", 1, "flow"), "bare-REPA.pt": (plain, "sit-nano/2", 1, "flow")}
    networks |= {"cifar-uvit.pth": (pixels, "uvit-nano", 999, "vp")}
    return folder, networks | {"uvit.pth": (uvit.float(), "uvit-nano", 999, "vp-sd")}


def test_published_networks_are_sampled_from_their_checkpoints(published):
    folder, networks = published
    sd_vae = train_vae.load_autoencoder(folder / "sd-vae.ckpt", "cpu")
    for name, (network, model, scale, path) in networks.items():
        given = None if name == "cifar-uvit.pth" else sd_vae
        config, weights = sample.published_network(folder / name, None if "uvit" in model else model, given)
        diffusion = train_diffusion.Diffusion(config, vae=given and given[0])
        train_vae.load_weights(diffusion.network, weights, name)
        diffusion.network.eval()
        x, t = torch.randn(2, *diffusion.shape), torch.tensor([0.3, 0.9])
        y = torch.tensor([3, 7]) if config["classes"] else None
        # SiT's release: noise at t = 0, data at 1, and the velocity from noise to data
        output = (-network(x, 1 - t, y) if name == "SiT.pt" else network(x, scale * t, y))[:, : diffusion.shape[0]]
        oracle = train_diffusion.x0_and_eps(diffusion.path, config["predict"], x, t, output)
        for ours, theirs in zip(diffusion.denoiser(y)(x, t), oracle):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item()), name
        assert config["path"] == path and config["size"] == (32 if given else 16)
        assert config["classes"] == (None if name == "uvit.pth" else list("0123456789"))
        assert not given or (config["scale"], config["autoencoder"]) == (0.18215, sd_vae[1]["weights"])
        flags = f"--vae {folder}/sd-vae.ckpt " * bool(given) + "--classes 3 7 --guidance 2" * bool(config["classes"])
        sampling(f"--ckpt {folder}/{name} --model {model} {flags} --n 2 --steps 2 --out {name}")
        assert Image.open(f"{name}/000001.png").size == (config["size"],) * 2


DCTDIFF = """
cifar10      32   0     2  4   242.382  2   m
celeba       64   0     2  4   244.925  4   s
imagenet     64   1000  2  4   247.125  4   s
imagenet     64   1000  2  4   247.125  4   m
ffhq         128  0     4  9   480.25   4   s
ffhq         256  0     4  8   485      4   m
both         512  0     8  18  969.5    12  m
"""  # data, size, classes, B, keep, eta, c, network: the authors' configurations


@pytest.mark.parametrize("row", DCTDIFF.strip().splitlines())
def test_dctdiffs_networks_are_known_by_their_shapes(row, monkeypatch):
    size, classes, block, keep, eta, c, network = row.split()[1:]
    size, rows, block, keep = map(int, (size, classes, block, keep))
    make = lambda tokens: UViT(num_tokens=tokens, token_dim=6 * keep, num_classes=rows or -1, **UVIT_SIZES[network])
    with torch.device("meta"):
        state = make((size // (2 * block)) ** 2).state_dict()
        other = make(49).state_dict()
    monkeypatch.setattr(train_diffusion, "load_plain", lambda file: {f"module.{k}": v for k, v in file.items()})
    read = lambda state=state, **codec: train_diffusion.published_network(state, codec=codec)[0]
    if "both" in row:  # the same shapes
        with pytest.raises(InputError, match=r"--eta says of which it is, 969.5 \(FFHQ 512\) or 928.0 \(AFHQ 512\)"):
            read()
        assert (read(eta=928.0)["eta"], read(eta=928.0)["snr_scale"]) == (928.0, 12)
    config = read(eta=float(eta) if "both" in row else None)
    expected = dict(space="dct", path="vp", predict="eps", size=size, block=block, keep=keep, snr_scale=float(c))
    assert expected.items() <= config.items() and config["eta"] == float(eta) and config["label_dropout"] == 0
    assert config["classes"] == ([str(i) for i in range(rows)] if rows else None)
    built = train_diffusion.meta_network(config).state_dict()
    assert config["model"] == f"uvit-{network}" and built.keys() == state.keys()
    assert all(built[key].shape == value.shape for key, value in state.items())
    assert (read(eta=3.0, snr_scale=5.0)["eta"], read(eta=3.0, snr_scale=5.0)["snr_scale"]) == (3, 5)
    with pytest.raises(InputError, match="--eta, --snr-scale must say its own"):
        read(other)
    with pytest.raises(InputError, match="--eta, --snr-scale must"):  # of other blocks the published eta is not
        read(block=2 * block)
    with pytest.raises(InputError, match="6 x 11, .*; --block, --eta, --snr-scale must"):
        read(state | {"proj.weight": torch.empty(len(state["norm.weight"]), 66, device="meta")})


def test_a_network_on_dct_tokens_is_sampled_as_by_hand(published):
    """Its plain copy, DDIM's steps with abar' = c abar / (1 + (c - 1) abar), and the codec."""
    file, eta, c = published[0] / "tokens.pth", 200.0, 3.0
    sampling(f"--ckpt {file} --eta {eta} --snr-scale {c} --classes 3 997 --sampler ddim --steps 4 -n 2 --out out")
    record = json.loads(Path("out/protocol.json").read_text())
    assert (record["eta"], record["snr_scale"], record["classes"]) == (eta, c, [3, 997])
    state = checkpoint(published[0], "tokens.pth").items()
    w = Weights({key.removeprefix("module."): value.double() for key, value in state})
    draws = [torch.randn(16, 24, generator=train_vae.generator(0, i)) for i in range(2)]
    x, y, times = torch.stack(draws).double(), torch.tensor([3, 997]), torch.linspace(1, 0, 5).double()
    abar = torch.exp(-(0.1 * times + 19.9 * times**2 / 2))
    abar = c * abar / (1 + (c - 1) * abar)
    for i in range(4):
        eps, _ = plain_uvit(w, x, 999 * times[i].expand(2), y, 6, 4, 0)
        x0 = (x - (1 - abar[i]).sqrt() * eps) / abar[i].sqrt()
        x = abar[i + 1].sqrt() * x0 + (1 - abar[i + 1]).sqrt() * eps
    pixels = ((DCTCodec(16, 2, 4, eta).decode(x) + 1) * 127.5).round()
    difference = (load_all("out").double() - pixels).abs()
    assert difference.max() <= 2 and difference.mean() < 0.1 and pixels.std() > 30
    refuses(sampling, {f"--ckpt {file} --eta 9 --snr-scale {c} --n 2 --out out": "eta 200.0 there, 9.0 now"})


def test_training_begins_with_published_weights(published, data, capsys):
    torch.save({"nnet": 0, "state_dict": randomised(UViT(**TOKEN_UVIT), 6).state_dict()}, "uvit.pth")
    wanted = checkpoint(".", "uvit.pth")["state_dict"]
    still = f"--data {data} --lr 0 --steps 1"
    train(f"{still} --out u --model uvit-nano --path vp --predict eps --init uvit.pth")
    assert distance(wanted, checkpoint("u")["model"]) == 0 and checkpoint("u")["config"]["network"]["mlp_time_embed"]
    assert "init     uvit.pth, uvit-nano\n" in (out := capsys.readouterr().out) and "otherwise" not in out
    sampling("u --n 1 --steps 1 --out out")
    sit = randomised(DiT(16, 4, 3, num_classes=3, **DIT_SIZES["nano"]), 7)
    torch.save({"ema": sit.state_dict()}, "sit.pt")  # a DiT's keys: on the flow path they are read as a SiT's
    train(f"{still} --out sit --space pixel --model dit-nano/4 --path flow --predict x0 --init sit.pt")
    assert distance(dit.read_published(sit.state_dict(), "sit")[1], checkpoint("sit")["model"]) == 0
    out = capsys.readouterr().out
    said = (
        "init     sit.pt, sit-nano/4\n         read as a SiT, as the path is flow; .* the same\nwarning: --init sit.pt "
    )
    assert re.search(f"{said}was trained otherwise: predict v there, x0 here\n", out)
    bad = {"--init unknown.pt": "no such run", "--init sit.pt": "4 of 72 tensors differ .pos_embed"}
    refuses(lambda flags: train(f"{still} --out none {flags}"), bad)


TOKEN_UVIT = dict(num_tokens=4, token_dim=54, num_classes=4, mlp_time_embed=True, **UVIT_SIZES["nano"])


# ---- README.md --------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


@pytest.fixture
def documented(latents, autoencoders):
    """A function: the arguments of the documented commands of a program that match. What they read is there.

    Every command of README.md and of the programs' first lines parses, and its settings fit together.
    """
    for name, size in (("photos", 64), ("imagenet", 256), ("celeba-hq", 256)):
        amended(latents, f"{name}.latents", size=size, data=name, factor=size // 4)
    for name in ("vae", "mine"):
        shutil.copytree(autoencoders / "kl", f"runs/{name}")
    parsers = {"train_diffusion": train_diffusion.parse, "train_vae": train_vae.parse, "sample": sample.parse}
    parsers["dct"] = dct.make_parser().parse_args
    text = "\n".join([README, *(program.__doc__ for program in (train_diffusion, train_vae, sample, dct))])
    command = r"(?:python|torchrun)(?: +--\S+)* +(\w+)\.py((?: +[^\s`#;&)|]+)*)"
    lines = re.findall(command, text.replace("\\\n", " "))
    parsed = [(name, flags, parsers[name](flags.split())) for name, flags in lines]
    for program, least in {"train_diffusion": 20, "train_vae": 12, "sample": 12, "dct": 1}.items():
        assert sum(name == program for name, *_ in parsed) > least
    return lambda program, pattern: [
        args for name, flags, args in parsed if name == program and re.search(pattern, flags)
    ]


@pytest.fixture(scope="module")
def evidence():
    """.ci/evidence.py, which repeats the runs of assets/evidence.md."""
    spec = importlib.util.spec_from_file_location("evidence", HERE / ".ci" / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands_of(row):
    return [command for stage in row() for chain in stage for command in chain]


def test_commands_of_the_evidence_parse(evidence, latents):
    """Those of its rows, which read each other's latents, and those that its text shows."""
    for name in (*evidence.ALL, "train"):
        amended(latents, f"{name}.latents", size=64, data="scenes64-train.zip", factor=16)
    amended(latents, "kl32.latents", size=32, data="cifar10-train.zip", factor=8)
    parsers = {"train_diffusion.py": train_diffusion.parse, "train_vae.py": train_vae.parse, "sample.py": sample.parse}
    parsers |= {"dct.py": dct.make_parser().parse_args}
    shown = (HERE / "assets" / "evidence.md").read_text().replace("\\\n", " ")
    shown = re.findall(r"^python [^.].*", "".join(re.findall(r"```sh\n(.*?)```", shown, re.S)), re.M)
    rows = {name: commands_of(row) for name, row in evidence.ROWS.items()}
    assert len(shown) > 20 and len(rows) == 10 and all(len(set(row)) == len(row) for row in rows.values())
    for command in itertools.chain(shown, *rows.values()):
        _, program, *flags = shlex.split(command)
        if program != ".ci/evidence.py":
            parsers[program](flags)
        else:
            assert flags[1] in evidence.MEASURES if flags[0] == "--measure" else flags[0] in {*rows, "--write"}


def test_tables_of_the_evidence_are_those_of_its_numbers(evidence):
    text, store = (HERE / "assets" / "evidence.md").read_text(), evidence.Store()
    marked = re.findall(r"<!-- table: (\w+) -->", text)
    assert len(marked) >= 5 and {*marked} <= {*evidence.TABLES}
    for name in marked:
        table = evidence.TABLES[name](store)
        assert f"<!-- table: {name} -->\n\n{table}\n" in text and table.count("\n") >= 3
    for row, entries in store.runs.items():
        ran = [entry["command"] for entry in entries]
        assert len({*ran}) == len(ran) and {*ran} <= {*commands_of(evidence.ROWS[row])}
        assert all(entry["minutes"] >= 0 and entry["machine"] for entry in entries)


def test_a_row_of_evidence_is_run_once_and_noted(evidence, data, tmp_path, monkeypatch, capsys):
    """By real commands, two side by side; one that fails ends the row, which then goes on where it stopped."""
    monkeypatch.chdir(tmp_path)
    training = f"python train_diffusion.py --data {data} --size 16 --eval-every 2 --log-every 1"
    chains = [[f"{training} --seed {seed} --steps 2 --out runs/{seed}"] for seed in (0, 1)]
    score = f"python sample.py runs/1 --n 8 --steps 1 --score {data} --features hog"
    trajectory = "python sample.py runs/1 --trajectory --steps 2 --seed 3"
    stages = [chains, [[score, trajectory], [f"{training} --steps 0 --out runs/2"]]]
    monkeypatch.setattr(evidence, "ROWS", {"tiny": lambda: stages})
    Path("evidence.json").write_text('{"experiments": []}')
    with pytest.raises(SystemExit, match="failed, see runs/tiny.log: .*--steps 0"):
        evidence.run_row("tiny", 2, evidence.Store(Path("evidence.json")))
    assert "argument --steps" in Path("runs/tiny.log").read_text()
    stages[1].pop()
    evidence.run_row("tiny", 2, evidence.Store(Path("evidence.json")))
    store = evidence.Store(Path("evidence.json"))
    assert len(store.runs["tiny"]) == 4 and capsys.readouterr().out.count(" min  python ") == 4
    for seed, (command,) in enumerate(chains):
        entry, last = store.entry("tiny", command), metrics(f"runs/{seed}")[-1]
        assert (entry["seed"], entry["steps"], entry["images"]) == (seed, 2, last["images"])
        assert entry["scores"]["loss"] == last["loss"] and len(entry["scores"]["x0_error_by_band"]["0.5"]) == 16
    (line,) = [json.loads(text) for text in Path("runs/1/samples/scores.jsonl").read_text().splitlines()]
    noted = store.scores("tiny", score)
    assert noted["features"] == "hog" and all(noted[key] == line[key] for key in ("frechet_distance", "images"))
    printed = Path("runs/tiny.log").read_text()
    assert all(f"period {side}: {value:.2f} " in printed for side, value in noted["patch_artefacts"].items())
    (file,) = Path("runs/1/samples").glob("*-trajectory.json")
    assert store.scores("tiny", trajectory)["half_recovered_at"] == json.loads(file.read_text())["half_recovered_at"]


def test_measures_of_the_evidence(evidence):
    """By closed forms: slopes of power laws, half-way steps."""
    for alpha in (1.0, 2.0, 3.0):  # of isotropic noise, periodic and cut out of a larger field, without its edges
        f = np.hypot(np.fft.fftfreq(256, 1 / 256)[:, None], np.fft.fftfreq(256, 1 / 256))
        f[0, 0] = 1
        noise = np.random.default_rng(0).standard_normal((20, 3, 256, 256))
        x = np.fft.ifft2(np.fft.fft2(noise) * f ** (-alpha / 2)).real[..., :64, :64]
        assert abs(evidence.exponent_by_fourier(x) - alpha) < 0.15
    errors = {str(step): {"0.1": [0.2 + 0.8 * 0.5 ** (step / 40), 1.0]} for step in range(10, 410, 10)}
    assert abs(evidence.half_way(errors, 0) - 40) < 1 and evidence.half_way(errors, 1) is None


def test_promises_name_the_tests_that_hold_them():
    promised = re.findall(r"`(test_\w+)`( \(slow\))?", README)
    assert len(promised) >= 20
    for name, slow in promised:
        marks = [mark.name for mark in getattr(globals()[name], "pytestmark", ())]
        assert ("slow" in marks) == bool(slow), name


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.S))
def test_documented_code_runs_and_its_shapes_are_as_said(block):
    names = {}
    exec(block, names)
    for left, comment in re.findall(r"^([\w, ]+) = .*# (\(.*)", block, re.M):
        shapes = re.findall(r"\([\d, ]+\)", comment.partition(":")[0])
        assert shapes == [str(tuple(names[name].shape)) for name in left.split(", ")][: len(shapes)]
    assert all(names[name].isfinite() for name in ("loss", "esm", "dsm") if name in names)


def test_documented_commands_are_understood_and_do_what_was_published(documented):
    """The authors' tables, row by row: block, keep, c, network, learning rate, batch, label dropout of DCTdiff ..."""
    rows = {("cifar10", 32): (2, 4, 2, "uvit-m", 2e-4, 256), ("celeba.zip", 64): (2, 4, 4, "uvit-s", 2e-4, 256)}
    rows |= {("imagenet/train", 64): (2, 4, 4, "uvit-m", 3e-4, 1024), ("ffhq.zip", 128): (4, 9, 4, "uvit-s", 2e-4, 256)}
    rows |= {("ffhq.zip", 256): (4, 8, 4, "uvit-m", 2e-4, 256), ("ffhq.zip", 512): (8, 18, 12, "uvit-m", 1e-4, 128)}
    rows |= {("afhq.zip", 512): (8, 18, 12, "uvit-m", 1e-4, 128)}
    adamw = lambda args: (args.betas, args.weight_decay, args.warmup, args.lr_decay, args.ema, args.clip)
    method = lambda args: (args.space, args.path, args.predict, args.t_sampling, args.ebfr)
    commands = {(args.data, args.size): args for args in documented("train_diffusion", "--model uvit-[sm]( |$)")}
    for key, row in rows.items():
        args = commands[key]
        assert (args.block, args.keep, args.snr_scale, args.model, args.lr, args.batch) == row
        assert adamw(args) == ([0.99, 0.99], 0.03, 5000, "none", 0.9999, 0)
        assert method(args) == ("dct", "vp", "eps", "uniform", True)
        assert args.classes is False or (args.data, args.label_dropout) == ("imagenet/train", 0)
    # ... of U-ViT on latents, and of REPA's SiT
    (args,) = documented("train_diffusion", "--latents celeba-hq.latents")
    assert adamw(args) == ([0.99, 0.99], 0.03, 5000, "none", 0.9999, 0) and (args.lr, args.batch) == (2e-4, 256)
    assert method(args) == ("latent", "vp-sd", "eps", "uniform", None) and args.classes is False
    (args,) = documented("train_diffusion", "--latents imagenet.latents .*--repa repa")
    assert adamw(args) == ([0.9, 0.999], 0, 0, "none", 0.9999, 1) and (args.lr, args.batch) == (1e-4, 256)
    assert method(args) == ("latent", "flow", "v", "uniform", None) and (args.repa_weight, args.repa_depth) == (0.5, 8)
    # ... of the autoencoders: set, regularizer, batch, steps; and SNR scaling is that of vp on vp-sd
    rows = {("celeba-hq.zip", "esm", 48, 500_000), ("imagenet/train", "esm", 128, 600_000)}
    rows |= {("imagenet/train", "dsm", 128, 1_000_000)}
    commands = documented("train_vae", "--data (celeba-hq.zip|imagenet/train) .*--regularizer")
    assert {(args.data, args.regularizer, args.batch, args.steps) for args in commands} == rows
    for args in commands:
        assert (args.lr, args.betas, args.weight_decay, args.warmup, args.clip) == (5e-5, [0.9, 0.999], 0.005, 2000, 1)
        assert (args.size, args.lpips_weight, args.gan_weight, args.gan_start) == (256, 0.5, 0.5, 50_000)
        assert (args.esm_weight, args.esm_delta) == (0.01, 1.0)
    assert train_diffusion.parse("--model uvit-s --size 64 --path vp-sd".split()).snr_scale == 4


# ---- what damage does: quick ----------------------------------------------------------------------------


def lines_of(run):
    """metrics.jsonl without what depends on the clock."""
    clock = ("images_per_s", "data_wait")
    return [{key: v for key, v in line.items() if key not in clock} for line in metrics(run, "step")]


def left_by(run):
    """All that a finished run leaves, to compare bit for bit, but for what depends on the clock and names the run."""
    run = Path(run)
    content = {file.name: file.read_bytes() for file in sorted(run.glob("samples/*.png"))}
    for file in run.glob("*.pt"):
        state = checkpoint(run, file.name)
        content[file.name] = {key: state.get(key) for key in ("model", "ema", "optimizer", "step", "latent")}
    scores = run / "scores.jsonl"
    content["scores"] = list(map(json.loads, scores.read_text().splitlines())) if scores.exists() else []
    others = {file.relative_to(run).as_posix() for file in run.rglob("*")}
    return content | {"lines": lines_of(run), "files": sorted(others)}


def assert_same_run(a, b, case=""):
    a, b = left_by(a), left_by(b)
    assert a.keys() == b.keys(), case
    differing = [name for name in a if distance(a[name], b[name])]
    assert not differing, f"{case}: {differing}"


def same_runs(a, b, tolerance=0.0):
    """Weights, optimizers and metrics of two runs, but for what depends on the clock."""
    one, other = checkpoint(a), checkpoint(b)
    keys = one.keys() - {"args"}
    assert other.keys() - {"args"} == keys and max(distance(one[key], other[key]) for key in keys) <= tolerance
    lines = [{line["step"]: line["loss"] for line in metrics(run)} for run in (a, b)]
    assert lines[0].keys() == lines[1].keys()
    np.testing.assert_allclose(*[list(steps.values()) for steps in lines], rtol=tolerance)


def until(done, seconds=60):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def within(seconds):
    """Raises TimeoutError where it takes longer."""

    def stop(*_):
        raise TimeoutError(f"after {seconds} s")

    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_what_is_no_file_in_a_folder_is_skipped_by_name_and_never_opened(tmp_path, capsys, monkeypatch):
    write_photos("data/a", 3)
    os.mkfifo("data/a/fifo.png")
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("data/a/socket.png")
    for name, target in {"fifo": tmp_path / "fifo", "device": "/dev/null", "nowhere": "/no/such"}.items():
        Path(f"data/a/to {name}.png").symlink_to(target)
    others = {"fifo.png", "socket.png", "to fifo.png", "to device.png", "to nowhere.png"}
    with within(20):
        images = Images("data", 16)
        assert len(images) == 8 and images.cache_name()
        for i, name in enumerate(images.names):
            x, err = images.read(i), capsys.readouterr().err
            assert (x is None) == (Path(name).name in others)
            assert x is not None or re.search(rf"data/{name} \((no regular file|a link to nowhere)", err)
        dct.main(dct.make_parser().parse_args(["upsample", "data/a", "large"]))
        out, err = capsys.readouterr()
        assert "3 images in large, 5 skipped" in out and all(f"the image {name}: " in err for name in others)
        refuses(lambda spec: Images(spec, 16, "--score"), {"fifo": "^--score fifo: is neither a folder nor a .zip"})
        with pytest.raises(SystemExit, match="^dct.py: cannot read the image fifo: no regular file$"):
            upsampled("fifo", "up.png")
    scandir = os.scandir
    Path("data/b").mkdir()  # which may not be looked into, as root may everywhere

    def denied(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refuses(lambda spec: Images(spec, 16), {"data": "^--data data: data/b cannot be read .Permission denied"})


def test_damaged_zips_and_labels_are_refused_in_a_line_before_they_take_memory(capsys):
    names = [f"{i:03d}.png" for i in range(4)]
    content = {name: (write_photos("data", 4) / name).read_bytes() for name in names}
    good = json.dumps({"labels": [[name, i] for i, name in enumerate(names)]})
    huge, deep = good.replace(" 3]", " 1000000000]"), "[" * 100_000
    labels = {"good": good, "huge": huge, "deep": deep, "twice": good.replace("003.png", "002.png")}
    for what, text in labels.items():
        with zipfile.ZipFile(f"{what}.zip", "w") as archive:
            for name, data in (content | {"dataset.json": text}).items():
                archive.writestr(name, data)
    raw = Path("good.zip").read_bytes()
    entry = raw.rfind(b"PK\x01\x02")  # of dataset.json
    changed = {"locked": (entry + 8, raw[entry + 8] | 1), "crc": (entry + 16, raw[entry + 16] ^ 1)}
    for what, (place, value) in (changed | {"directory": (raw.find(b"PK\x01\x02") + 1, 0)}).items():
        Path(f"{what}.zip").write_bytes(raw[:place] + bytes([value]) + raw[place + 1 :])
    Path("half.zip").write_bytes(raw[: len(raw) // 2])
    bad = {"half": "is a cut-off .zip", "directory": "is a damaged .zip", "locked": "dataset.json .*encrypted"}
    bad |= {
        "crc": "dataset.json .*CRC",
        "deep": "dataset.json .*recursion",
        "twice": "dataset.json lists 1 files twice",
    }
    bad |= {"huge": "dataset.json gives 003.png the label '1000000000', one of 4; .*below 65,536"}
    with within(20):
        refuses(
            lambda spec: Images(spec, 16), {f"{what}.zip": f"^--data {what}.zip: {text}" for what, text in bad.items()}
        )
        assert Images("good.zip", 16).labels == [0, 1, 2, 3]
    with pytest.raises(SystemExit, match="^dct.py: half.zip: is a cut-off .zip[^\n]*$"):
        upsampled("half.zip", "up")
    with zipfile.ZipFile("bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text\n.png", "hello")
        archive.writestr("zeros.png", bytes(2**20))
        archive.getinfo("zeros.png").file_size = 10**9  # as the directory announces
    for name in (0, 1):
        assert Images("bad.zip", 16, "--score").read(name) is None
    first, second = capsys.readouterr().err.splitlines()
    assert first == "skipped, unreadable: bad.zip/text .png (cannot identify image file)"
    assert second.startswith("skipped, unreadable: bad.zip/zeros.png (1,000,000,000 bytes")
    with pytest.raises(InputError, match="^--score bad.zip: of 2 images none can be read, as text\n.png; name others"):
        Images("bad.zip", 16, "--score").readable(0)


NUMBERS = {
    train_diffusion: "--lr --clip --weight-decay --repa-weight --snr-scale --keep-threshold --batch --seed --workers",
    train_vae: "--lr --clip --kl-weight --esm-weight --esm-delta --se-weight --vf-weight --gan-weight --lpips-weight",
    sample: "--guidance --eta --snr-scale --n --batch --seed --steps",
}


@pytest.mark.parametrize("program", NUMBERS)
def test_numbers_are_finite_and_bounded_and_values_can_be_paths(program):
    Path("note.txt").write_text("hello")
    Path("nowhere").symlink_to("no/such/place")
    values = itertools.product(NUMBERS[program].split(), ("nan", "inf", "1e400", "9" * 20, "9" * 5000, "²"))
    refuses(program.parse, {(flag, value): f"^argument (-n/)?{flag}: .* must be a" for flag, value in values})
    paths = {"note.txt/x": "Not a directory", "nowhere": "link to nowhere", "~/x": "left ~ as it is", "a\0b": "NUL"}
    paths |= {"a" * 300: "File name too long"}
    refuses(lambda out: program.parse(["--out", out]), {value: f"^--out.*{text}" for value, text in paths.items()})
    bad = {}
    if program is train_diffusion:
        bad = {f"--t-logit-normal {ends}": "must be" for ends in ("0.5 0", "0.5 -1", "nan 1", "0 inf")}
        bad |= {f"--repa dog --repa-sigmas {ends}": "--repa-sigmas" for ends in ("0 nan", "inf inf", "0 1e300")}
        assert program.parse("--repa dog --repa-sigmas 0 inf".split()).repa_sigmas[1] == np.inf
        refuses(train_diffusion.parse_model, {f"dit-nano/{patch}": "^--model" for patch in ("²", "9" * 20, "9" * 5000)})
    if program is sample:
        bad = {f"--guidance-interval {ends}": "--guidance-interval" for ends in ("0.5 0.2", "0 nan", "0 2", "1 1")}
        bad |= {"--npz note.txt/x.npz": "^--npz.*Not a dir", f"--npz {'a' * 300}.npz": "^--npz.*too long"}
        for name in ("²", "9" * 5000):
            refuses(lambda name: sample.parse_classes([name], ["a", "b"]), {name: "not one of the 2 classes"})
    refuses(lambda flags: program.parse(flags.split()), bad)


@pytest.mark.parametrize(
    "flags", ["--size 1024 --block 256 --keep 100", "--label-dropout 0.9999999999", "--snr-scale 1e9"]
)
def test_what_flags_take_a_checkpoint_may_hold(flags):
    args = vars(train_diffusion.parse(flags.split()))
    names = ("space", "size", "model", "path", "snr_scale", "predict", "label_dropout", "block", "keep")
    config = {name: args[name] for name in names} | {"classes": None, "eta": 1.0}
    with torch.device("meta"):
        train_diffusion.stored_network(config | {"entropies": [[0.0] * args["block"] ** 2] * 3})


def test_torn_samples_are_made_again(trained, capsys):
    flags = f"{trained} --n 4 --steps 1 --out out"
    sampling(flags)
    whole = {file.name: file.read_bytes() for file in Path("out").iterdir()}
    for name, torn in {"000000": b"", "000001": whole["000001.png"][:200], "000002": bytes(500)}.items():
        Path("out", f"{name}.png").write_bytes(torn)
    kept = Path("out/000003.png").stat().st_mtime_ns
    sampling(flags)
    assert {file.name: file.read_bytes() for file in Path("out").iterdir()} == whole
    assert Path("out/000003.png").stat().st_mtime_ns == kept
    for torn in (b"", whole["protocol.json"][:50], bytes(100), b"7", b"\xff"):
        sampling(f"{flags} --seed 1 --out other")  # made otherwise
        Path("other/protocol.json").write_bytes(torn)
        for name in (".lock", "000009.png.tmp"):
            Path("other", name).touch()
        capsys.readouterr()
        sampling(flags.replace("--out out", "--out other"))
        assert "other/protocol.json: torn; it is made again, and so are the 4 images" in capsys.readouterr().out
        assert all(Path("other", name).read_bytes() == content for name, content in whole.items())
        shutil.rmtree("other")
    Path("mine").mkdir()
    for name in ("protocol.json", "000000.png", "holiday.png"):
        Path("mine", name).write_text("mine")
    with pytest.raises(InputError, match="^--out mine holds other files"):
        sampling(flags.replace("--out out", "--out mine"))
    assert len(os.listdir("mine")) == 3
    Path("new").mkdir()
    Path("new/.lock").touch()
    sampling(flags.replace("--out out", "--out new"))
    assert all(Path("new", name).read_bytes() == content for name, content in whole.items())


def test_weights_that_are_damaged_are_refused_by_name(tmp_path):
    """Flipped bits in a record, values that are not finite, other types; what torch.load takes in silence."""
    net = randomised(vae.VAE((32,), 4, 1))
    state, key, config = (
        net.state_dict(),
        "decoder.conv_in.weight",
        dict(widths=[32], latent_channels=4, num_res_blocks=1),
    )
    ours = {"config": config, "model": state, "ema": None, "step": 3}
    torch.save(ours, "ours.pt")
    open_autoencoder("ours.pt")
    content = Path("ours.pt").read_bytes()
    place = content.find(state[key].numpy().tobytes())
    Path("flipped.pt").write_bytes(content[: place + 5] + bytes([content[place + 5] ^ 1]) + content[place + 6 :])
    assert torch.load("flipped.pt", weights_only=True)["model"][key].isfinite().all()  # torch does not see it
    with zipfile.ZipFile("ours.pt") as old, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes(10**7) if name.endswith("data/1") else old.read(name))
    changes = {"nan": state[key].clone().fill_(float("nan")), "inf": state[key] / 0, "int": state[key].long()}
    changes |= {"complex": state[key].cfloat(), "list": [1.0], "sparse": state[key].to_sparse()}
    changes |= {"huge": torch.zeros(1).expand(10**6, 10**6), "empty": state[key][:0]}
    for name, value in changes.items():
        torch.save(ours | {"model": state | {key: value}}, f"{name}.pt")
        torch.save(state | {key: value}, f"{name}-published.pt")
    fitting = {"nan": "not finite", "inf": "not finite", "int": "of int64", "complex": "of complex", "list": "list"}
    fitting |= {"sparse": "no plain array", "huge": "no plain array", "empty": "another architecture"}
    bad = {"flipped.pt": "^flipped.pt: damaged, .*CRC|not those that were written", "bomb.pt": "^bomb.pt: refused"}
    bad |= {f"{name}.pt": f"^{name}.pt: .*{text}" for name, text in fitting.items()}
    bad |= {f"{name}-published.pt": f"^{name}-published.pt: " for name in changes}
    refuses(open_autoencoder, bad)
    lies = {"widths": [10**9], "num_res_blocks": 10**6, "latent_channels": 1.5, "attention": "x", "size": 10**9}
    lies |= {"scale": float("nan"), "shift": [0.0], "widths ": None}
    for name, value in lies.items():
        torch.save(ours | {"config": config | {name.strip(): value}}, "lie.pt")
        refuses(open_autoencoder, {"lie.pt": f"^lie.pt: a false checkpoint, its {name.strip()} is "})
    for name, value in {"step": 1.5, "latent": {"scale": 0}, "args": [1], "model": 7, "val": 3}.items():
        torch.save(ours | {name: value}, "lie.pt")
        refuses(open_autoencoder, {"lie.pt": f"^lie.pt: a false checkpoint, its {name} is "})


def test_a_checkpoint_that_cannot_be_opened_is_passed_over_for_the_one_before(trained, autoencoders, capsys):
    state = checkpoint(trained)
    for run in ("run", "other"):
        Path(run).mkdir()
        for number in (1, 2, 10):
            torch.save(state | {"step": 12 - number}, f"{run}/checkpoint.{number}.pt")
    read = lambda: train_vae.read_checkpoint("run")["step"]
    assert read() == 11 and "run: no checkpoint.pt in it yet" in capsys.readouterr().out
    Path("run/checkpoint.pt").write_bytes((trained / "checkpoint.pt").read_bytes()[:-999])
    torch.save(state | {"config": state["config"] | {"predict": "noise"}}, "run/checkpoint.1.pt")
    assert read() == 10 and read() == 10
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(
        "run/checkpoint.2.pt is taken, step 10: run/checkpoint.pt: .*; run/checkpoint.1.pt: .*predict", line
    )
    for number in (2, 10):
        Path(f"run/checkpoint.{number}.pt").write_bytes(b"")
    refuses(train_vae.read_checkpoint, {"run": "^run/checkpoint.pt: "})  # the newest one's error
    shutil.copy(autoencoders / "kl/checkpoint.pt", "other/checkpoint.pt")
    refuses(train_vae.read_checkpoint, {"other": "a checkpoint of train_vae.py; give one of train_diffusion.py"})


def test_configs_and_moments_that_lie_are_refused_before_anything_is_built(trained, data):
    state = checkpoint(trained)
    lies = {"predict": "noise", "path": [], "size": 10**9, "keep": 17, "block": 0, "eta": float("inf"), "space": "x"}
    lies |= {"model": "uvit-nano/²", "classes": ["a", 1], "label_dropout": 1.0, "entropies": [[1.0]], "snr_scale": "x"}
    cases = [(state | {"config": state["config"] | {name: value}}, name) for name, value in lies.items()]
    cases += [(state | {"config": state["config"] | {"size": 32}}, "its size is 32, by its flags 16")]
    cases += [(state | {"config": state["config"] | {"size": 2**14}, "args": None}, "pos_embed")]
    for content, name in cases:
        torch.save(content, "lie.pt")
        refuses(train_vae.read_checkpoint, {"lie.pt": f"^lie.pt: .*{name}"})
    weight = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.ones(2, 3)
    optimizer.step()
    moments = optimizer.state_dict()["state"][0]
    bad = {
        "exp_avg": (torch.zeros(3, 5), "shape|parameter 0 is torch.float32 .3, 5."),
        "step": (3, "step of parameter 0"),
    }
    bad |= {"exp_avg_sq": (-torch.ones(2, 3), "negative"), "exp_avg ": (torch.zeros(2, 3) / 0, "not finite")}
    groups = optimizer.state_dict()["param_groups"]
    for name, (value, message) in bad.items():
        lying = {"state": {0: moments | {name.strip(): value}}, "param_groups": groups}
        with pytest.raises(InputError, match=f"^run: .*{message}|^run of parameter 0: .*{message}"):
            train_vae.load_part(optimizer, lying, "run")
    for lying in ({"state": {1: moments}}, {"state": {0: moments, "x": moments}}, {}, None):
        with pytest.raises(InputError, match="^run: "):
            train_vae.load_part(optimizer, lying, "run")
    train_vae.load_part(
        optimizer, {"state": {0: moments}, "param_groups": []}, "run"
    )  # settings are those of the flags
    scaler = torch.amp.GradScaler("cpu")
    for lying in ({}, scaler.state_dict() | {"scale": float("nan")}, scaler.state_dict() | {"_growth_tracker": None}):
        with pytest.raises(InputError, match="^run: its "):
            train_vae.load_part(scaler, lying, "run")


def test_damaged_decoded_images_are_made_again_and_damaged_latents_refused(tmp_path, capsys):
    images = Images(str(write_photos("photos", 6, classes=["a", "b"])), 16)
    folder = Path("cache", images.cache_name())
    right = Pixels(images, "cache", Processes("cpu"), 0).read(np.arange(6))
    damages = {name: lambda file: file.write_bytes(file.read_bytes()[:-1]) for name in ("values", "labels")}
    damages |= {"done": lambda file: np.save(file, np.zeros(6, np.uint8)), "names": lambda file: file.unlink()}
    damages |= {"header": lambda file: file.write_text("[" * 10**5)}
    for name, damage in damages.items():
        damage(folder / f"{name}.{'json' if name in ('names', 'header') else 'npy'}")
        capsys.readouterr()
        assert torch.equal(Pixels(images, "cache", Processes("cpu"), 0).read(np.arange(6)), right)
        assert capsys.readouterr().out.count("made again: --cache cache/") == 1
    values = lambda n=6, side=4: np.ones((n, 2, 8, side, side), np.float16)
    encode, made_by = lambda x: values(len(x)), {"kind": "moments", "autoencoder": "x", "vae": "y", "factor": 4}
    finish = lambda records: {"scale": 1.0, "shift": 0.0, "latent_norm": "one"}
    Records.make("right", images, made_by, (2, 8, 4, 4), encode, Processes("cpu"), 0, 4, "--out", finish)
    header = json.loads(Path("right/header.json").read_text())
    arrays = {"values": [values().astype(np.float32), values(5), values(side=5), np.asfortranarray(values())]}
    arrays |= {"labels": [np.array([0, 1, 0, 1, 0, 2]), np.zeros(6, np.int64)], "done": [np.full(6, 3, np.uint8)]}
    arrays["values"] += [np.array([{}] * 6)]
    for name, spoilt in arrays.items():
        for array in spoilt:
            shutil.copytree("right", "wrong", dirs_exist_ok=True)
            np.save(f"wrong/{name}.npy", array)
            refuses(lambda folder: Records(folder, "moments"), {"wrong": "^--latents wrong: damaged .*; remove it and"})
    lies = {"scale": [1.0], "size": 10**9, "complete": 1, "images": {}, "factor": 2, "data": None}
    lies |= {"images ": header["images"] | {"count": 10**9}, "images  ": header["images"] | {"classes": ["a"]}}
    for name, value in lies.items():
        amended(Path("right"), "lie", **{name.strip(): value})
        refuses(lambda folder: Records(folder, "moments"), {"lie": "^--latents lie: damaged"})
        shutil.rmtree("lie")
    spoilt = values()
    spoilt[3, 0, 0, 0, 0] = np.nan
    np.save("right/values.npy", spoilt)
    records = Records("right", "moments")
    assert records.read(np.array([0, 1])).isfinite().all()
    with pytest.raises(InputError, match="^--latents right: its values.npy is not finite: damaged"):
        records.read(np.array([2, 3]))


def test_broken_lines_of_small_files_are_left_out_and_said(data, capsys):
    flags = f"--data {data} --out run --steps"
    train(f"{flags} 3")
    lines, file = lines_of("run"), Path("run/metrics.jsonl")
    text = file.read_bytes().splitlines()
    broken = [b"\0" * 40, b'{"step": 2, "lo', b"[1, 2]", b'{"loss": 1}', b'{"step": "2"}', b"\xff\xfe", b"[" * 100_000]
    file.write_bytes(b"\n".join([text[0], *broken, *text[1:]]) + b'\n{"step": 3, "lr')
    capsys.readouterr()
    train(f"{flags} 4")
    assert "run/metrics.jsonl: 8 broken lines" in capsys.readouterr().out
    assert lines_of("run")[:4] == lines and len(lines_of("run")) == 6
    scores = Path("scores.jsonl")
    scores.write_bytes(b'{"a": 1}\n{"half')
    for content in ({"b": 2}, {"b": 2}, {"c": 3}, {"b": 2}):  # said again, as a killed command does, it is one
        train_vae.append_json(scores, content)
    assert scores.read_bytes() == b'{"a": 1}\n{"half\n{"b": 2}\n{"c": 3}\n{"b": 2}\n'


def test_nothing_that_is_not_finite_is_saved_and_after_skipped_steps_saving_waits(data, monkeypatch):
    with monkeypatch.context() as patch:
        broken = lambda averaged, network, step, decay: step == 2 and next(averaged.parameters())[0].fill_(np.inf)
        patch.setattr(train_diffusion, "update_ema", broken)
        with pytest.raises(InputError, match="^the weights of step 3 are not finite; run/checkpoint.pt, of step 2, is"):
            train(f"--data {data} --out run --steps 6 --save-every 1")
        shutil.rmtree("run")
        for due in ("--save-every 3", "--eval-every 3", "--snapshot-every 3"):
            with pytest.raises(InputError, match="^the weights of step 3 are not finite; none was saved before"):
                train(f"--data {data} --out run --steps 6 {due}")
            assert not [*Path("run").glob("*.pt*"), *Path("run").glob("samples/*")]
    real, calls, bad = train_diffusion.diffusion_loss, itertools.count(1), {3, 4, 8}

    def sometimes_nan(*args, **kwargs):
        loss, aligned = real(*args, **kwargs)
        return loss * (float("nan") if next(calls) in bad else 1.0), aligned

    monkeypatch.setattr(train_diffusion, "diffusion_loss", sometimes_nan)
    with pytest.raises(InputError, match=r"the last 1 steps were .* run/checkpoint.pt, of step 6, is the last good"):
        train(f"--data {data} --out run --steps 8 --save-every 3")
    steps = [checkpoint("run", name)["step"] for name in ("checkpoint.pt", "checkpoint.1.pt")]
    assert steps == [6, 5]  # not 3


@pytest.mark.parametrize("program, lost", [("train_diffusion.py", "picture"), ("train_vae.py", "all")])
def test_a_killed_evaluation_is_made_by_the_same_command(data, program, lost, capsys):
    begin, last = (train, 8 + 1) if program == "train_diffusion.py" else (autoencode, 4)
    more = "" if begin is train else "--features hog --ema 0.9"
    flags = f"--data {data} --val {write_photos('val', 6)} --steps 4 --eval-every 2 --save-every 2 {more} --out"
    begin(f"{flags} whole")
    shutil.copytree("whole", "killed")
    text = Path("killed/metrics.jsonl").read_text().splitlines(keepends=True)
    assert "lr" not in json.loads(text[-1]) and json.loads(text[-1])["step"] == 4
    if lost != "picture":
        Path("killed/metrics.jsonl").write_text("".join(text[:-1]))
    if lost != "line":
        for file in Path("killed/samples").glob("step0000004*"):
            file.unlink()
    if lost == "all":
        Path("killed/scores.jsonl").unlink(missing_ok=True)
        shutil.copy("killed/checkpoint.1.pt", "killed/best.pt")
    capsys.readouterr()
    begin(f"{flags} killed")
    assert "step 4/4" in capsys.readouterr().out
    assert_same_run("whole", "killed")
    begin(f"{flags} killed")
    assert re.search("finished.*--steps 8", capsys.readouterr().out, re.S)
    if lost == "all":  # an evaluation in the middle of a run as well
        for file in ("checkpoint.pt", "checkpoint.1.pt"):
            shutil.copy("whole/checkpoint.1.pt", f"killed/{file}")
        kept = [
            line for line in text if json.loads(line)["step"] < 2 or '"lr"' in line and json.loads(line)["step"] < 3
        ]
        Path("killed/metrics.jsonl").write_text("".join(kept))
        begin(f"{flags} killed")
        assert lines_of("whole") == lines_of("killed")


def test_checkpoints_are_read_back_before_older_ones_move_up(data, monkeypatch):
    flags, files = f"--data {data} --out run --save-every 1 --steps", ("checkpoint.pt", "checkpoint.1.pt")
    train(f"{flags} 3")
    train(f"{flags} 6 --keep-last 4")
    names = [*files, "checkpoint.2.pt", "checkpoint.3.pt"]
    assert [checkpoint("run", name)["step"] for name in names] == [6, 5, 4, 3]
    before = {name: Path("run", name).read_bytes() for name in names}
    real = torch.save

    def flipped(state, file):
        real(state, content := io.BytesIO())
        content = bytearray(content.getvalue())
        content[content.index(state["model"]["x_embedder.proj.weight"].numpy().tobytes()[:64]) + 7] ^= 1
        file.write(content)

    monkeypatch.setattr(torch, "save", flipped)
    with pytest.raises(InputError, match=r"^run/checkpoint.pt(.tmp)?: .*"):
        train(f"{flags} 8")
    assert {name: Path("run", name).read_bytes() for name in names} == before
    assert not list(Path("run").glob("*.tmp"))
    monkeypatch.setattr(torch, "save", real)
    monkeypatch.setattr(os, "link", lambda *paths: os.open("/", os.O_WRONLY))  # a file system without links
    train(f"{flags} 8")
    assert [checkpoint("run", name)["step"] for name in names] == [8, 7, 4, 3]
    assert not [name for name in os.listdir("run") if name.endswith(".tmp")]
    content = bytearray(Path("run/checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    Path("run/checkpoint.pt").write_bytes(content)
    train_vae.keep_older(Path("run/checkpoint.pt"), 2)  # one that is damaged takes no sound one's place
    assert checkpoint("run", "checkpoint.1.pt")["step"] == 7


@contextlib.contextmanager
def files_at_most(size):
    """Files of this process end at so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # pytest's are files
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_cannot_be_written_is_a_line_that_leaves_nothing_half(data, trained):
    flags = f"--data {data} --out run --save-every 2 --steps"
    train(f"{flags} 2")
    before, pixels = checkpoint("run"), lambda cache: Pixels(Images(str(data), 64), cache, Processes("cpu"), 0)
    rows = [(10, "run/metrics.jsonl", "MiB are"), (50_000, "run/checkpoint.pt", r"it takes \d\d\.\d MiB, .* MiB are")]
    for size, file, text in rows:
        with files_at_most(size):
            line = rf"^{file}: cannot be written \(File too large\); .*{text} free on .* the same command again$"
            refuses(train, {f"{flags} 3": line})
        assert not list(Path("run").rglob("*.tmp")) and distance(checkpoint("run"), before) == 0
    with files_at_most(50_000):
        refuses(pixels, {"other": "^other/.*/values.npy: cannot be written .* it takes 0.6 MiB"})
    with files_at_most(100):
        refuses(sampling, {f"{trained} --n 2 --steps 1 --out s": r"^s/protocol.json: cannot be written"})
    sampling(f"{trained} --n 2 --steps 1 --out s")
    with files_at_most(300):
        refuses(sampling, {f"{trained} --n 2 --steps 1 --out s": r"^s.png: cannot be written"})
    assert not list(Path().rglob("*.tmp")) and len(pixels("other").indices) == 48
    train(f"{flags} 3")
    assert [line["step"] for line in metrics("run", "lr")] == [1, 2, 3]


def test_a_run_whose_folder_is_deleted_ends_in_a_line(data, monkeypatch):
    real = train_diffusion.diffusion_loss
    for more in ("--log-every 1", "--log-every 9 --save-every 3", "--log-every 9 --eval-every 3"):
        calls = itertools.count(1)
        gone = lambda *args, calls=calls, **more: (next(calls) == 2 and shutil.rmtree("run")) or real(*args, **more)
        monkeypatch.setattr(train_diffusion, "diffusion_loss", gone)
        refuses(train, {f"--data {data} --out run --steps 9 {more}": "^run.*(No such file or directory|removed while)"})
        assert not Path("run").exists()


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.truncate(0)
file.write("process 4711 on elsewhere since 12:01")
file.flush()
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


@contextlib.contextmanager
def held(folder, seconds=60):
    """Another process holds a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-c", HOLDER, str(Path(folder, ".lock")), str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        try:
            yield
        finally:
            process.kill()


def test_what_another_process_works_in_is_left_alone_until_it_is_dead(data, trained, autoencoders, capsys):
    run = f"--data {data} --steps 2 --cache own --out"
    train(f"{run} run")
    held_by = "is in use by process 4711 on elsewhere since 12:01; wait for it, or name another"
    with held("run"), held("vae"), held("new"), held("s"):
        before = left_by("run")
        sampling("run --n 1 --steps 1 --out other")
        refuses(train, {f"{run} run --steps 4": f"^--out run: {held_by}", f"{run} new": f"^--out new: {held_by}"})
        refuses(autoencode, {f"{run} vae": f"^--out vae: {held_by}"})
        refuses(sampling, {f"{trained} --n 1 --out s": f"^--out s: {held_by}"})
        assert distance(before, left_by("run")) == 0 and os.listdir("new") == os.listdir("vae") == os.listdir("s") == [
            ".lock"
        ]
    assert Path("run/.lock").read_text().startswith("process 4711")
    train(f"{run} run --steps 4")  # of a dead one it is free, whatever is written in it
    capsys.readouterr()
    with held("s.latents", 1.5):  # what is made once for all is waited for
        looking(f"--encode {data} --ckpt {autoencoders}/kl --out s.latents")
    assert "--out s.latents: is being made by process 4711 on elsewhere since 12:01; waiting" in capsys.readouterr().out
    assert len(Records("s.latents", "moments").indices) == 48


@pytest.fixture
def signalled(monkeypatch, capsys):
    """A function: the exit code of a program that a signal stops, and its one line of stderr."""
    monkeypatch.setattr(train_vae, "asked", {})
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def end(main, flags):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            train_vae.run_program(main, lambda: flags)
        train_vae.asked.clear()
        (line,) = capsys.readouterr().err.splitlines()
        return ending.value.code, line

    return end


def asking(function, when):
    """The function, after which a signal comes where when(its arguments)."""

    def asks(*given, **named):
        result = function(*given, **named)
        if when(*given):
            train_vae.ask_to_stop(signal.SIGTERM, None)
        return result

    return asks


def test_a_signal_stops_training_after_a_step_which_the_same_command_goes_on_from(data, signalled, monkeypatch):
    flags = f"--data {data} --steps 5 --eval-every 3"
    train(f"{flags} --out whole")
    moments = {2: (train_vae.Log, "end_step", lambda log, step, *_: step == 2)}
    moments[3] = Diffusion, "denoiser", lambda *_: True  # during the evaluation
    for step, (owner, name, when) in moments.items():
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, asking(getattr(owner, name), when))
            said = f"stopped at step {step} by SIGTERM: the same command goes on"
            assert signalled(train, f"{flags} --out {step}") == (143, said)
        assert checkpoint(str(step))["step"] == step and not metrics(str(step), "x0_error_by_band")
        train(f"{flags} --out {step}")
        same_runs("whole", str(step))


def test_a_signal_stops_sampling_and_encoding_within_a_tick(trained, autoencoders, signalled, monkeypatch):
    flags, pictures = f"{trained} -n 5 --steps 2 --batch 1 --out out", lambda: len(list(Path("out").glob("*.png")))
    with monkeypatch.context() as patched:
        asks = asking(train_vae.write_atomically, lambda file, *_: file.name == "000002.png")
        patched.setattr(train_vae, "write_atomically", asks)
        said = "stopped after sample 3 of 5 by SIGTERM: the same command goes on"
        assert signalled(sampling, flags) == (143, said)
    assert pictures() == 3
    sampling(flags)
    assert pictures() == 5
    encode = f"--ckpt {autoencoders}/kl --encode {write_photos('many', 6)} --batch 2 --out latents --device cpu"
    encoding = lambda flags: train_vae.main(train_vae.parse(flags.split()))
    with monkeypatch.context() as patched:
        patched.setattr(Images, "read", asking(Images.read, lambda images, i: i == 3))
        said = "stopped after encode 4 of 6 by SIGTERM: the same command goes on"
        assert signalled(encoding, encode) == (143, said)
    assert np.load("latents/done.npy").tolist() == [1, 1, 1, 1, 0, 0]
    encoding(encode)
    assert np.load("latents/done.npy").all()


def test_a_second_signal_ends_at_once_but_not_one_that_torchrun_passes_on(monkeypatch):
    monkeypatch.setattr(train_vae, "asked", {})
    sent, handlers = [], []
    monkeypatch.setattr(os, "kill", lambda *given: sent.append(given))
    monkeypatch.setattr(signal, "signal", lambda *given: handlers.append(given))
    for _ in range(3):
        train_vae.ask_to_stop(signal.SIGINT, None)
    assert not sent and train_vae.asked["signal"] == signal.SIGINT
    train_vae.asked["at"] -= 2
    train_vae.ask_to_stop(signal.SIGTERM, None)
    assert sent == [(os.getpid(), signal.SIGTERM)] and handlers == [(signal.SIGTERM, signal.SIG_DFL)]


def test_processes_meet_anew_whatever_an_earlier_start_has_left(monkeypatch):
    """Rounds on one store, as after restarts: in each, a prefix that all share, and nothing of the rounds before."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=server.port, TORCHELASTIC_USE_AGENT_STORE=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            stores = list(threads.map(functools.partial(train_vae.meet, world=3), range(3)))
        assert not any(store.check(["address"]) for store in stores)
        stores[2].set("address", "here")
        assert all(store.check(["address"]) for store in stores)
    monkeypatch.setattr(train_vae, "MEETING_TIMEOUT", 0.1)
    with pytest.raises(InputError, match="not all 3 processes started"):
        train_vae.meet(0, 3)


def test_a_lost_process_is_named_in_one_line(signalled, monkeypatch, tmp_path):
    error = "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711"

    def broken(flags):
        raise RuntimeError(error)

    code, line = signalled(broken, "")
    assert code == 2 and re.search("^error: another process has probably ended, the same command goes on", line)
    asks = asking(lambda: None, lambda: True)
    assert signalled(lambda flags: asks() or broken(flags), "")[0] == 143  # it was asked to stop as well
    error = "shape mismatch"
    with pytest.raises(RuntimeError, match="shape"):
        train_vae.run_program(broken, lambda: "")
    # sampling: process 1 holds its lock while it lives
    monkeypatch.setattr(sample, "LOST", 0.4)
    code = "import fcntl; fcntl.lockf(file := open('.lock1', 'a'), fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        watched = {}
        for _ in range(4):
            assert sample.watch({1: 2}, tmp_path, watched) == [] and not time.sleep(0.2)
    assert watched[1][2]  # its lock was seen
    ends = [time.sleep(0.2) or sample.watch({1: 2}, tmp_path, watched) for _ in range(4)]
    assert ends[-1] == [1]
    # images are a sign of life as well, where locks are not seen; one that has not begun is given time
    for missing in range(9, 4, -1):
        watched[1] = missing + 1, watched[1][1], True
        assert sample.watch({1: missing}, tmp_path, watched) == []
    assert not any(time.sleep(0.2) or sample.watch({2: 2}, tmp_path, watched) for _ in range(4))


def test_a_signal_to_one_process_alone_stops_all_with_one_line(signalled):
    def told(flags):
        raise train_vae.Stopped(signal.SIGTERM, " at step 3")  # as Run._stop does, whoever was asked

    assert not train_vae.asked
    assert signalled(told, "") == (143, "stopped at step 3 by SIGTERM: the same command goes on")


def test_a_signal_stops_a_trajectory(trained, signalled):
    train_vae.ask_to_stop(signal.SIGTERM, None)
    said = "stopped during the trajectory by SIGTERM: the same command goes on"
    assert signalled(sampling, f"{trained} --trajectory --steps 2 --out t") == (143, said)


def test_programs_run_with_closed_streams(signalled, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train_vae.run_program(lambda flags: print(flags) or 7, lambda: "said to no one") == 7


def test_a_terminal_that_goes_after_another_signal_is_written_to_no_more(monkeypatch):
    monkeypatch.setattr(train_vae, "asked", {})
    turned = []
    monkeypatch.setattr(os, "dup2", lambda _, stream: turned.append(stream))
    monkeypatch.setattr(train_vae.stat, "S_ISCHR", lambda _: True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        train_vae.ask_to_stop(number, None)
    assert turned == [1, 2] and train_vae.asked["signal"] == signal.SIGTERM


# ---- slow: attacks ----------------------------------------------------------------------------------------


# What is killed: a time after the start, or the moment when such a file appears.
MOMENTS = ["checkpoint.pt.tmp", "checkpoint.1.pt", "best.pt.tmp", "samples/*.tmp", "samples/*4.png", "samples/*8.png"]
MOMENTS += ["metrics.jsonl.tmp", "../cache-*/*/done.npy", "../cache-*/*/header.json", "checkpoint-*.pt", "scores.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train_diffusion.py", "train_vae.py"])
def test_thirty_kills_leave_what_an_uninterrupted_run_leaves(program, seed=12):
    write_photos("photos", 60, classes=["a", "b"])
    write_photos("val", 6)
    tiny, more = (TINY, "") if program == "train_diffusion.py" else (TINY_VAE, "--ema 0.9 --features hog")
    flags = f"{tiny} --data photos --val val --steps 8 --save-every 2 --eval-every 4 --snapshot-every 4 {more}"
    line = lambda run: f"{program} {flags} --out {run} --cache cache-{run}"
    began = time.perf_counter()
    completed(line("whole"))
    took, rng, kills, runs = time.perf_counter() - began, np.random.default_rng(seed), 0, 0
    while kills < 30:
        run, codes = f"run{runs}", []
        while not codes or codes[-1] != 0:
            before = {file for moment in MOMENTS for file in Path(run).glob(moment)}
            (process,), moment, case = launch(line(run)), None, f"seed {seed}, kill {kills}"
            end = time.perf_counter() + rng.uniform(0.05, 1.1) * took
            if rng.random() < 0.6:
                moment, end = str(rng.choice(MOMENTS)), time.perf_counter() + 2 * took
            while process.is_alive() and kills < 30 and time.perf_counter() < end:
                if moment and set(Path(run).glob(moment)) - before:
                    break
                time.sleep(0.0005)
            if kills < 30 and process.is_alive():
                process.kill()
            (end,) = finish([process])
            assert end[0] in (0, -signal.SIGKILL), (case, end)
            codes.append(end[0])
            kills += codes[-1] != 0
        assert_same_run("whole", run, f"seed {seed}, {run}, {kills} kills")
        runs += 1
    print(f"{kills} kills in {runs} runs")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes, *options) -> a disk of its own."""
    disks = []

    def mount(size, *options):
        disk = tmp_path / f"disk{len(disks)}"
        disk.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
            pytest.skip("no disk may be mounted here")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def writers(data, trained, autoencoders, disk):
    """Commands that write to a disk -> {name: command}"""
    training = f"--data {data} --steps 8 --save-every 2 --eval-every 3 --out {disk}"
    kl = f"{autoencoders}/kl"
    return {
        "train": f"train_diffusion.py {TINY} {training}/run",
        "vae": f"train_vae.py {TINY_VAE} {training}/vae",
        "sample": f"sample.py --device cpu {trained} --n 40 --steps 1 --out {disk}/samples/s --npz {disk}/s.npz",
        "trajectory": f"sample.py --device cpu {trained} --trajectory --steps 2 --out {disk}/t/t",
        "encode": f"train_vae.py --device cpu --encode {data} --ckpt {kl} --out {disk}/l.latents",
        "look": f"train_vae.py --device cpu --eval-only --ckpt {kl} --features hog --out {disk}/look",
        "spectrum": f"train_vae.py --device cpu --spectrum {kl} --out {disk}/spectrum",
    }


@pytest.mark.slow
def test_full_and_read_only_disks_are_a_line_and_the_same_command_goes_on(small_disk, data, trained, autoencoders):
    sizes = {"train": "21m", "vae": "4m", "sample": "24k", "trajectory": "4k", "encode": "44k", "look": "12k"}
    sizes |= {"spectrum": "4k"}
    for name, size in sizes.items():
        disk = small_disk(size)
        line, ballast = writers(data, trained, autoencoders, disk)[name], disk / "ballast"
        ballast.write_bytes(bytes(2048 if name != "train" else 2**20))
        one_error(*finish(launch(line)), str(disk), "No space left on device")
        assert not list(disk.rglob("*.tmp")) and ballast.exists()
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        completed(line)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for old, new in {"--steps 8": "--steps 9", "--n 40": "--n 41", "l.latents": "m.latents"}.items():
            line = line.replace(old, new)
        one_error(*finish(launch(line)), str(disk), "Read-only file system")


def race(line, pause):
    """A command started twice, so many seconds apart -> what `finish` says of both; one at least ends well."""
    first = launch(line)
    time.sleep(pause)
    ends = finish(first + launch(line))
    assert 0 in [code for code, *_ in ends], ends
    return ends


@pytest.mark.slow
def test_the_same_command_twice_at_once(data, trained, autoencoders):
    write_photos("many", 400, classes=["a", "b"])
    line, told = f"train_diffusion.py {TINY} --data {data} --steps 30 --save-every 1 --out", 0
    completed(f"{line} whole")
    for k in range(5):
        pauses = np.random.default_rng(k).uniform(0, 1, 2)
        # a run, new or begun: one of them is told, what the other does is what it does alone
        for end in race(f"{line} run{k}", pauses[0]):
            if end[0]:
                one_error(end, f"--out run{k}: is in use by process")
                told += 1
        assert_same_run("whole", f"run{k}", f"race {k}")
        # a folder of samples
        for end in race(f"sample.py --device cpu {trained} --n 150 --batch 5 --steps 8 --out s{k}", pauses[1]):
            if end[0]:
                one_error(end, f"--out s{k}", "in use by process")
                told += 1
        assert len(list(Path(f"s{k}").glob("*.png"))) == 150 and not list(Path(f"s{k}").glob("*.tmp"))
        # what is made once for all: both end well, with all of it
        encode = f"train_vae.py --device cpu --workers 0 --batch 4 --encode many --ckpt {autoencoders}/kl"
        decode = f"train_diffusion.py {TINY} --data many --steps 1 --cache cache{k} --out"
        lines = [f"{decode} x{k}", f"{decode} y{k}", *[f"{encode} --out l{k}.latents"] * 2]
        ends = finish([process for line in lines for process in launch(line)])
        assert not any(code for code, *_ in ends), ends
        assert len(Records(f"l{k}.latents", "moments").indices) == 400
        assert distance(checkpoint(f"x{k}")["model"], checkpoint(f"y{k}")["model"]) == 0
    assert told > 3
    folders = [np.load(f"l{k}.latents/values.npy") for k in range(5)]
    assert all(np.array_equal(folders[0], other) for other in folders[1:])


@pytest.mark.slow
def test_a_run_in_training_can_be_benchmarked_and_looked_at(data):
    train(f"--data {data} --steps 2 --out run")
    autoencode(f"--data {data} --steps 2 --out vae")
    with held("run"), held("vae"):
        train(f"--data {data} --steps 2 --out run --benchmark 1")
        looking("--eval-only --ckpt vae")


@pytest.mark.slow
@pytest.mark.parametrize("program", [f"train_diffusion.py {TINY}", f"train_vae.py {TINY_VAE}"])
def test_run_folders_deleted_while_training(data, program):
    for k in range(5):
        every = ("--log-every 1", "--save-every 2 --log-every 99", "--eval-every 2 --log-every 99")[k % 3]
        processes, folder = launch(f"{program} --data {data} --steps 100000 --out run{k} {every}"), Path(f"run{k}")
        until(lambda folder=folder: any(list(folder.glob(name)) for name in ("metrics.jsonl", "checkpoint.pt", "*/*")))
        time.sleep(np.random.default_rng(k).uniform(0, 0.3))
        folder.rename(f"gone{k}")
        shutil.rmtree(f"gone{k}", ignore_errors=True)
        one_error(*finish(processes), f"run{k}")


# Every case ends, in time and in little memory, in a right result or in an error of one line that names what is wrong.

NASTY = [None, -1, 1.5, float("nan"), float("inf"), 10**6, 10**9, 10**30, "x", "", "²", [], [1], {}, {"a": [1]}, True]
NASTY += [[10**9] * 3, torch.zeros(2), "uvit-nano/99999999999"]


def how_it_ends(action, seconds=60, gigabytes=2.5):
    """What becomes of action() -> plain text in a process of its own: ("right", text), ("refused", the line), or
    ("broken", why): a traceback, a signal, a hang, more memory than that."""
    source, sink = os.pipe()
    if not (child := os.fork()):
        status = 1
        try:
            signal.alarm(seconds)
            torch.set_num_threads(1)  # a pool of threads does not outlive a fork
            for stream in (1, 2):
                os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            try:
                answer = ["right", action()]
            except InputError as error:
                answer = ["refused" if "\n" not in str(error) and len(str(error)) < 2000 else "broken", str(error)]
            except BaseException as error:
                answer = ["broken", f"{type(error).__name__}: {error}"[:300]]
            os.write(sink, json.dumps(answer).encode()[:60000])
            status = 0
        finally:
            os._exit(status)
    os.close(sink)
    with os.fdopen(source) as pipe:
        answer = pipe.read()
    _, status, usage = os.wait4(child, 0)
    if not answer or status:
        return "broken", f"ended with status {status}, by signal {status & 127}"
    kind, text = json.loads(answer)
    return ("broken", f"{usage.ru_maxrss >> 20} GiB") if usage.ru_maxrss > gigabytes * 2**20 else (kind, text)


def attack_files(cases, expected, may_differ=()):
    """Run (name, words that an error has one of, action): none may break, and none be right but different."""
    ends = {"right": 0, "refused": 0, "broken": 0}

    def judge(number, case):
        name, words, action = case
        kind, text = how_it_ends(action)
        if kind == "right" and text != expected[name.split()[0]] and not any(word in name for word in may_differ):
            kind, text = "broken", "another result, in silence"
        if kind == "refused" and not any(word in text for word in words):
            kind = "broken"
        ends[kind] += 1
        assert kind != "broken", f"{name}: {text}"

    attack(enumerate(cases), judge, 90)
    print(ends)
    assert min(ends["right"], ends["refused"]) > 0


def damaged_bytes(content, rng):
    """-> (what was done, the bytes)"""
    content, way = bytearray(content), rng.integers(5)
    if way == 0:
        return "cut off", bytes(content[: rng.integers(len(content))])
    if way == 1:
        start, count = rng.integers(len(content)), int(rng.integers(1, 5000))
        content[start : start + count] = bytes(len(content[start : start + count]))
        return "zeros", bytes(content)
    for place in (
        rng.integers(0, len(content), rng.integers(1, 9)) if way < 4 else rng.integers(-min(3000, len(content)), 0, 2)
    ):
        content[place] ^= 1 << rng.integers(8)
    return "bits", bytes(content)


def swapped_records(file, rng):
    """Two records of a .zip under each other's names, with their right CRCs."""
    with zipfile.ZipFile(file) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    a, b = rng.choice([name for name in records if "/data/" in name], 2, replace=False)
    records[a], records[b] = records[b], records[a]
    with zipfile.ZipFile(file, "w") as new:
        for name, content in records.items():
            new.writestr(name, content)


def spoiled(state, rng):
    """What is wrong with it now; of a checkpoint, in place."""
    part = state[["model", "ema"][rng.integers(2)] if state["ema"] else "model"]
    key, moment = list(part)[rng.integers(len(part))], state["optimizer"]["state"][int(rng.integers(5))]
    weight, which = part[key], ["exp_avg", "exp_avg_sq"][rng.integers(2)]

    def put(place, name, value):
        place[name] = value

    nasty = NASTY[rng.integers(len(NASTY))]
    name, setting = list(state)[rng.integers(len(state))], list(state["config"])[rng.integers(len(state["config"]))]
    ways = {
        f"{name} is missing": lambda: state.pop(name),
        f"{setting} is missing": lambda: state["config"].pop(setting),
    }
    ways |= {f"{name} = {nasty!r:.30}": lambda: put(state, name, nasty)}
    ways |= {f"{setting} = {nasty!r:.30}": lambda: put(state["config"], setting, nasty)}
    for value in ("nan", "inf", "-inf"):
        ways[f"{value} in {key}"] = lambda value=value: weight.view(-1)[:1].fill_(float(value))
    for change in ("long", "bool", "cfloat", "to_sparse"):
        ways[f"{change} {key}"] = lambda change=change: put(part, key, getattr(weight, change)())
    ways |= {f"large {key}": lambda: put(part, key, torch.zeros(1).expand(10**5, 10**6))}
    ways |= {f"empty {key}": lambda: put(part, key, weight[:0]), "integers": lambda: put(part, 7, part.pop(key))}
    ways |= {f"shape of {which}": lambda: put(moment, which, torch.zeros(3, 5))}
    ways |= {f"int {which}": lambda: put(moment, which, moment[which].long())}
    ways |= {f"nan in {which}": lambda: moment[which].view(-1)[:1].fill_(float("nan"))}
    ways |= {"negative moment": lambda: moment["exp_avg_sq"].view(-1)[:1].fill_(-1.0), "no moment": moment.clear}
    ways |= {"lost moment": lambda: state["optimizer"]["state"].pop(1)}
    ways |= {"no groups": lambda: state["optimizer"]["param_groups"].clear()}
    way = list(ways)[rng.integers(len(ways))]
    ways[way]()
    return way


def hash_of(file, key="model"):
    return train_vae.fingerprint(torch.load(file, weights_only=True)[key])


@pytest.mark.slow
def test_attack_damaged_checkpoints(data):
    """200: bits, cuts, swapped records, values; by sampling, resuming both trainers, --init, --vae and --ckpt."""
    base, vae_base = f"--data {data} --steps", f"--data {data} --regularizer kl --steps"
    train(f"{base} 2 --out run --cache c")
    autoencode(f"{vae_base} 2 --out vae --cache c")

    def attacked(route, file):
        """The same command on a damaged copy -> a hash of its result"""
        folder, beside = file.parent, file.parent / "out"
        if route == "sample":
            sampling(f"{file} --n 1 --steps 2 --out {beside}")
            return str(np.asarray(Image.open(beside / "000000.png")).tolist())[:1000]
        if route in ("diffusion", "autoencoder"):
            (train if route == "diffusion" else autoencode)(
                f"{base if route == 'diffusion' else vae_base} 3 --out {folder} --cache c"
            )
            return hash_of(folder / "checkpoint.pt")
        if route == "init":
            train(f"{base} 1 --out {beside} --init {file} --cache c")
            return hash_of(beside / "checkpoint.pt")
        train(f"{base} 1 --out {beside} --vae {file} --model dit-nano/1 --cache c")
        return hash_of(beside / "checkpoint.pt")

    routes = {"sample": "run", "diffusion": "run", "autoencoder": "vae", "init": "run", "vae": "vae"}
    expected = {}
    for route, run in routes.items():
        file = Path(shutil.copytree(run, f"right-{route}")) / "checkpoint.pt"
        kind, expected[route] = how_it_ends(functools.partial(attacked, route, file))
        assert kind == "right", expected[route]

    def cases(seed=12):
        for number in range(200):
            rng = np.random.default_rng([seed, number])
            route = list(routes)[number % len(routes)]
            file = Path(shutil.copytree(routes[route], f"case{number}")) / "checkpoint.pt"
            if number % 3 == 0:
                way, content = damaged_bytes(file.read_bytes(), rng)
                file.write_bytes(content)
            elif number % 10 == 1:
                way = "swapped"
                swapped_records(file, rng)
            else:
                state = torch.load(file, weights_only=True)
                way = spoiled(state, rng)
                torch.save(state, file)
            yield f"{route} {way}", (str(file), file.parent.name), functools.partial(attacked, route, file)
            shutil.rmtree(file.parent)

    # what no file can show to be false: another eta that is a number, names of classes
    attack_files(cases(), expected, may_differ=("swapped", "eta = ", "classes = []", "snr_scale = True"))


@pytest.mark.slow
def test_attack_damaged_caches(data, hub):
    """80: headers and arrays of decoded pixels, which are made again, of latents, tokens and references."""
    autoencode(f"--data {data} --regularizer kl --steps 1 --out vae --cache c")
    looking(f"--encode {data} --ckpt vae --out moments")
    aligned = f"--data {data} --steps 1 --repa repa --encoder {hub}:colours --repa-width 8 --block 2 --cache c"
    train(f"{aligned} --cache-targets tokens --out a")
    Path("pixels").mkdir()
    images = Images(str(data), 16)
    Pixels(images, "pixels", Processes("cpu"), 0)
    Path("npz").mkdir()
    sample.main(
        sample.parse(f"--score {data} --save-reference npz/r.npz --features {hub}:colours --device cpu".split())
    )

    def attacked(kind, folder):
        if kind == "pixels":
            pixels = Pixels(images, folder, Processes("cpu"), 0)
            return str([pixels.indices.tolist(), pixels.read(pixels.indices).sum().item()])
        if kind == "npz":
            made = sample.read_reference("--score", folder / "r.npz", {}, 8)
            return str([made["mu"].tolist(), float(np.abs(made["sigma"]).sum()), made["features"].sum().item()])
        if kind == "tokens":
            train(f"{aligned} --cache-targets {folder} --out {folder}-run")
            return hash_of(f"{folder}-run/checkpoint.pt")
        train(f"--latents {folder} --steps 1 --model dit-nano/1 --out {folder}-run")
        return hash_of(f"{folder}-run/checkpoint.pt")

    kinds = ("pixels", "moments", "tokens", "npz")
    expected = {}
    for kind in kinds:
        right = shutil.copytree(kind, f"right-{kind}")
        end, expected[kind] = how_it_ends(functools.partial(attacked, kind, Path(right)))
        assert end == "right", expected[kind]

    def cases(seed=12):
        for number in range(80):
            rng, kind = np.random.default_rng([seed, number]), kinds[number % 4]
            folder = Path(shutil.copytree(kind, f"case{number}"))
            files = sorted(file for file in folder.rglob("*.*") if file.is_file())
            file = files[rng.integers(len(files))]
            content = file.read_bytes()
            if file.suffix == ".json" and rng.integers(2) and isinstance(values := json.loads(content), dict):
                place = values["images"] if rng.integers(2) else values
                key = list(place)[rng.integers(len(place))]
                nasty = [value for value in NASTY if not isinstance(value, torch.Tensor)]
                place[key], way = nasty[rng.integers(len(nasty))], f"{key} lies"
                file.write_text(json.dumps(values))
            elif file.suffix == ".npy" and rng.integers(2):
                array = np.load(file)
                spoilt = [array.astype(np.float64), array[:-1], array[None], array.ravel(), np.asfortranarray(array)]
                spoilt += [(array.astype(np.int64) + 99).astype(array.dtype), np.array([{}], object), array[:0]]
                spoilt += [np.full_like(array, np.nan)] if array.dtype == np.float16 else []
                change = rng.integers(len(spoilt))
                way = f"array {change} {file.name}"
                np.save(file, spoilt[change], allow_pickle=True)
            else:
                way, content = damaged_bytes(content[:128] if file.name == "values.npy" else content, rng)
                file.write_bytes(content + file.read_bytes()[128:] * (file.name == "values.npy" and way == "bits"))
            words = (str(folder), f"{folder.name}")
            yield f"{kind} {file.name} {way}", words, functools.partial(attacked, kind, folder)
            shutil.rmtree(folder)

    attack_files(cases(), expected, may_differ=("names.json", "array 5 values.npy", "values.npy zeros"))


@contextlib.contextmanager
def bounded(seconds=30, gigabytes=1.0):
    """Raises TimeoutError after so long; asserts that memory has not grown by more."""
    before = peak_memory()
    with within(seconds):
        yield
    assert peak_memory(begin=False) - before < gigabytes * 2**30, "took gigabytes"


def peak_memory(begin=True):
    """Bytes, of this process since it was last asked to begin."""
    if begin:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def attack(cases, act, seconds=30):
    """act(number, case) of such pairs; asserts that none broke, naming those that did by their numbers."""
    broken, tried = {}, 0
    for number, case in cases:
        tried += 1
        try:
            with bounded(seconds):
                act(number, case)
        except (Exception, SystemExit) as error:
            broken[number] = f"{type(error).__name__}: {error}"[:300]
    print(f"{tried} tried, {len(broken)} broke")
    assert tried and not broken, f"{len(broken)} of {tried}: " + "\n".join(f"{k}: {v}" for k, v in broken.items())


def right_or_refused(act, *names):
    """act()'s result, or None where it is refused in one line that names one of these."""
    try:
        return act()
    except InputError as error:
        text = str(error)
    except SystemExit as error:
        text = str(error)
        assert text.startswith("dct.py: "), text
    assert len(text.splitlines()) == 1 and any(name in text for name in names), text
    return None


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


LIBTIFF = r"\w+(Decode|Lib|Strip|Directory|Tag\w*): |\w+: "  # which writes a line of its own


def sound_pictures():
    """{name with ending: bytes} of 16 x 16 pixels, in many modes of all formats."""
    rgb = Image.fromarray(train_vae.to_uint8(photos(1, 16))[0].permute(1, 2, 0).numpy())
    rgba, palette, exif = rgb.convert("RGBA"), rgb.quantize(16), Image.Exif()
    rgba.putalpha(rgb.convert("L"))
    exif[0x0112], exif[0x010E] = 6, "text"
    deep = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16)) * 257)
    part, modes = Image.fromarray(np.asarray(rgb.convert("L")).astype("f4") / 255), {}
    for name, picture in {"rgb": rgb, "l": rgb.convert("L"), "cmyk": rgb.convert("CMYK")}.items():
        modes[f"{name}.jpg"] = encoded(picture, "JPEG", exif=exif, quality=90)
    modes["progressive.jpeg"] = encoded(rgb, "JPEG", progressive=True)
    kinds = {"rgb": rgb, "rgba": rgba, "p": palette, "l": rgb.convert("L"), "deep": deep, "1": rgb.convert("1")}
    modes |= {f"{name}.png": encoded(picture, "PNG") for name, picture in kinds.items()}
    modes["clear.png"] = encoded(palette, "PNG", transparency=bytes(range(16)), exif=exif)
    modes |= {"rgb.webp": encoded(rgb, "WEBP", exif=exif), "rgba.webp": encoded(rgba, "WEBP", lossless=True)}
    modes |= {"rgb.bmp": encoded(rgb, "BMP"), "p.bmp": encoded(palette, "BMP"), "1.bmp": encoded(kinds["1"], "BMP")}
    modes |= {"p.gif": encoded(palette, "GIF"), "clear.gif": encoded(palette, "GIF", transparency=3)}
    modes["moving.gif"] = encoded(palette, "GIF", save_all=True, append_images=[palette.rotate(90)])
    for name in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits"):
        modes[f"{name}.tif"] = encoded(rgb, "TIFF", compression=name)
    for name, picture in {
        "deep": deep,
        "part": part,
        "cmyk": rgb.convert("CMYK"),
        "p": palette,
        "1": kinds["1"],
    }.items():
        modes[f"{name}.tiff"] = encoded(picture, "TIFF")
    return modes | {
        "rgb.ppm": encoded(rgb, "PPM"),
        "l.pgm": encoded(rgb.convert("L"), "PPM"),
        "deep.pgm": encoded(deep, "PPM"),
    }


def announcing(name, content, size):
    """A file whose header says that it is so large, where the place of that is known."""
    content, at = bytearray(content), lambda form, place, *values: struct.pack_into(form, content, place, *values)
    if name.endswith(".png"):
        at(">II", 16, size, size)
        at(">I", 29, zlib.crc32(content[12:29]))
    elif name.endswith(".bmp"):
        at("<ii", 18, min(size, 2**31 - 1), min(size, 2**31 - 1))
    elif name.endswith(".gif"):
        at("<HH", 6, min(size, 65535), min(size, 65535))
    elif name.endswith((".jpg", ".jpeg")):
        place = next(content.find(bytes((255, kind, 0))) for kind in (0xC0, 0xC2) if bytes((255, kind, 0)) in content)
        at(">HH", place + 5, min(size, 65535), min(size, 65535))
    elif name.endswith((".ppm", ".pgm")):
        return bytes(content).replace(b"16 16", b"%d %d" % (size, size), 1)
    elif name.endswith(".webp") and content[12:16] == b"VP8X":
        content[24:30] = b"\xff" * 6
    elif name.endswith((".tif", ".tiff")):
        first = struct.unpack_from("<I", content, 4)[0]
        for entry in range(first + 2, first + 26, 12):
            if struct.unpack_from("<H", content, entry)[0] in (256, 257):
                at("<HII", entry + 2, 4, 1, size)
    return bytes(content)


def damaged_picture(rng, name, content, sound):
    """One way of many -> name, bytes"""
    way, data = rng.integers(9), bytearray(content)
    if way == 0:
        for _ in range(rng.integers(1, 20)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif way == 1:
        del data[rng.integers(len(data)) :]
    elif way == 2:  # in the header, palette or EXIF
        for _ in range(rng.integers(1, 6)):
            data[rng.integers(min(200, len(data)))] = rng.choice([0, 255, 127, 128, rng.integers(256)])
    elif way == 3:
        start = rng.integers(len(data))
        data[start : start + rng.integers(1, 400)] = bytes(len(data[start : start + rng.integers(1, 400)]))
    elif way in (4, 5):
        data = announcing(name, content, int(rng.choice([0, 10**9, 2**31 - 1, 60_000, 1_000])))
    elif way == 6:
        name = f"{Path(name).stem}{rng.choice(sorted(train_vae.EXTENSIONS))}"
    elif way == 7:  # the head of one, the tail of another
        other = sound[rng.choice(sorted(sound))]
        data = content[: rng.integers(8, len(content))] + other[rng.integers(len(other)) :]
    return name, bytes(data)


@pytest.mark.slow
def test_mutated_images_are_read_as_pillow_reads_them_or_named(capfd):
    rng, sound, cases, seed = np.random.default_rng(12), sound_pictures(), {}, 12
    for number in range(200):
        name = sorted(sound)[number % len(sound)]
        name, content = damaged_picture(rng, name, sound[name], sound)
        cases[number] = f"{number:03d}-{name}", content
    Path("some").mkdir()
    with zipfile.ZipFile("some.zip", "w") as archive:
        for name, content in cases.values():
            Path("some", name).write_bytes(content)
            archive.writestr(name, content)
    both = [Images(spec, 16) for spec in ("some", "some.zip")]
    assert all(len(images) == 200 for images in both)
    capfd.readouterr()
    read = {}

    def pillow(content):
        with warnings.catch_warnings(), Image.open(io.BytesIO(content)) as image:
            warnings.simplefilter("ignore")
            image.load()
        return image

    def reads(number, case):
        name, content = case
        pair = []
        for images in both:
            pair.append(images.read(images.names.index(name)))
            err = [line for line in capfd.readouterr().err.splitlines() if not re.match(LIBTIFF, line)]
            assert len(err) == (pair[-1] is None) and all(f"{images.spec}/{name}" in line for line in err), err
            assert not any("_io." in line or "object at" in line for line in err), err
        assert (pair[0] is None) == (pair[1] is None)
        try:
            image = pillow(content)
        except Exception:
            image = None
        capfd.readouterr()
        read[name] = image
        assert pair[0] is None or image is not None, "read what Pillow does not"
        if pair[0] is None:
            assert image is None or image.mode[0] in "IF", f"Pillow reads it, {image}"
            return
        assert pair[0].shape == (3, 16, 16) and torch.equal(*pair)
        plain = image.mode in ("RGB", "L", "CMYK") and not image.has_transparency_data
        if plain and image.size == (16, 16) and image.getexif().get(0x0112, 1) == 1:
            assert (pair[0].permute(1, 2, 0).numpy() == np.asarray(image.convert("RGB"))).all()

    def enlarges(number, source):
        with contextlib.suppress(SystemExit):
            dct.main(dct.make_parser().parse_args(["upsample", source, f"{source}-x2"]))
        err = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "img" not in line]
        for name, image in read.items():
            output, named = Path(f"{source}-x2", name).with_suffix(".png"), [line for line in err if name in line]
            assert output.exists() != bool(named) and len(named) <= 1, (name, named)
            assert not output.exists() or image is not None, name
        assert all(any(name in line for name in read) and "object at" not in line for line in err), err[:5]

    def warns_of_nothing(number, code):  # outside of pytest, which takes warnings
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | paths)
        said = [line for line in result.stderr.splitlines() if line.strip() and not re.match(LIBTIFF, line)]
        said = [line for line in said if not re.search(r"^skipped: |^skipped, unreadable: some/|\d img| img/s", line)]
        assert result.returncode == 0 and not said, said[:5]

    paths = {"PYTHONPATH": str(HERE)}
    programs = ["from train_vae import Images; images = Images('some', 16); [images.read(i) for i in range(200)]"]
    programs += ["import dct; dct.main(dct.make_parser().parse_args(['upsample', 'some', 'again']))"]
    broken = []
    for act, some in (
        (warns_of_nothing, dict(enumerate(programs))),
        (reads, cases),
        (enlarges, {"folder": "some", "zip": "some.zip"}),
    ):
        try:
            attack(some.items(), act)
        except AssertionError as error:
            broken.append(str(error))
    assert not broken, f"seed {seed}: " + "\n".join(broken)


def evil_labels(names):
    """{what: the content of a dataset.json}"""
    say = lambda labels: json.dumps({"labels": labels}).encode()
    all_of = lambda label: say([[name, label] for name in names])
    one_of = lambda label: say([[name, label if i == 3 else i % 2] for i, name in enumerate(names)])
    evil = {
        "deep": b"[" * 100_000,
        "deep object": b'{"labels":' * 50_000,
        "bytes": b"\xff\xfe\xfd\x00\x01",
        "empty": b"",
    }
    evil |= {"half": all_of(1)[:40], "long number": b'{"labels": [["a", ' + b"9" * 5000 + b"]]}", "list": b"[1, 2]"}
    values = {"nan": math.nan, "inf": math.inf, "1e9": 10**9, "1e9.0": 1e9, "minus": -1, "true": True, "text": "1"}
    values |= {"huge": 10**30, "1e300": 1e300, "half": 0.5, "list": [1], "null": None, "object": {}, "65536": 2**16}
    for kind, make in (("all", all_of), ("one", one_of)):
        evil |= {f"{kind} {what}": make(value) for what, value in values.items()}
    pairs = [[name, i % 2] for i, name in enumerate(names)]
    evil |= {
        "twice": say([*pairs, [names[0], 1]]),
        "short": say(pairs[:-1]),
        "triples": say([[*pair, 0] for pair in pairs]),
    }
    return evil | {"strings": say(["ab"] * 6), "number": say(7), "ones": say([[name] for name in names])}


def evil_archives(rng):
    """{what: (bytes of a .zip, {name: pixels} of what went in)}"""
    pictures = {f"{'ab'[i % 2]}/{i}.png": train_vae.to_uint8(x) for i, x in enumerate(photos(6, 16))}
    files = {name: encoded(Image.fromarray(x.permute(1, 2, 0).numpy()), "PNG") for name, x in pictures.items()}
    good = json.dumps({"labels": [[name, i % 3] for i, name in enumerate(files)]}).encode()
    evil = {}

    def packed(content, method=zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(file, "w", method) as archive:
            warnings.simplefilter("ignore")  # of duplicate names
            for name, data in content:
                archive.writestr(name, data)
        return file.getvalue()

    plain = packed([*files.items(), ("dataset.json", good)], zipfile.ZIP_STORED)
    for what, content in evil_labels(list(files)).items():
        evil[f"dataset.json {what}"] = packed([*files.items(), ("dataset.json", content)])
    for number in range(8):
        data = bytearray(plain)
        for _ in range(rng.integers(1, 30)):
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        evil[f"flipped {number}"] = bytes(data)
    directory = plain.rfind(b"PK\x01\x02")
    directory = plain.find(b"PK\x01\x02")
    for number in range(8):
        data = bytearray(plain)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(directory, len(data))] = rng.integers(256)
        evil[f"directory {number}"] = bytes(data)
    for share in (0.0, 0.3, 0.9, 0.99):
        evil[f"cut off {share}"] = plain[: max(30, int(share * len(plain)))]
    entry = directory + 8
    encrypted, unknown = bytearray(plain), bytearray(plain)
    while (entry := plain.find(b"PK\x01\x02", entry - 8)) >= 0:
        encrypted[entry + 8] |= 1
        unknown[entry + 10] = 99
        entry += 46 + 8
    evil |= {"encrypted": bytes(encrypted), "unknown compression": bytes(unknown)}
    entry = plain.rfind(b"PK\x01\x02")  # of dataset.json
    for what, place, value in (("flag utf-8", 8, 0x800), ("encrypted json", 8, 1)):
        data = bytearray(plain)
        struct.pack_into("<H", data, entry + place, value)
        data[entry + 46 : entry + 48] = b"\xff\xfe" if what == "flag utf-8" else data[entry + 46 : entry + 48]
        evil[what] = bytes(data)
    data = bytearray(plain)
    data[entry + 16] ^= 1
    evil["CRC of json"] = bytes(data)
    data = bytearray(plain)
    struct.pack_into("<II", data, directory + 20, 2**31, 2**31)
    evil["absurd size"] = bytes(data)
    many = [*files.items(), ("z.png", bytes(700 * 2**20))]
    evil |= {
        "bomb": packed(many),
        "nothing": packed([]),
        "nested": packed([("in.zip", plain)]),
        "zip as png": packed([("x.png", plain)]),
    }
    evil["names"] = packed(
        [*files.items(), ("../up.png", b"x"), ("/root.png", files["a/0.png"]), ("a/\n.png", b"x"), ("a//b.png", b"")]
    )
    evil["folder"] = packed([*files.items(), ("a/x.png/", b""), ("a/x.png/y.png", files["a/0.png"])])
    evil["twice"] = packed([*files.items(), ("a/0.png", files["b/1.png"])])
    return evil, pictures


@pytest.mark.slow
def test_damaged_archives_and_labels_are_read_right_or_refused_in_a_line(capfd):
    seed = 13
    cases, pictures = evil_archives(np.random.default_rng(seed))
    assert len(cases) >= 60
    for number, (_, content) in enumerate(cases.items()):
        Path(f"{number}.zip").write_bytes(content)

    def act(what, content):
        spec = f"{list(cases).index(what)}.zip"
        capfd.readouterr()
        images = right_or_refused(lambda: Images(spec, 16, "--score"), f"--score {spec}: ")
        for i in range(len(images or ())):
            x, err = images.read(i), capfd.readouterr().err.splitlines()
            assert len(err) == (x is None) and all(spec in line and "object at" not in line for line in err), err
            expected = pictures.get(images.names[i]) if what != "twice" else None
            assert x is None or expected is None or torch.equal(x, expected), images.names[i]
        if images:
            images.identity(), images.cache_name()
            assert images.labels is None or len(images.labels) == len(images)
            assert images.labels is None or 0 <= min(images.labels) <= max(images.labels) < len(images.classes) <= 2**16
        elif what.startswith("cut off"):
            with pytest.raises(InputError, match="cut-off"):
                Images(spec, 16)
        right_or_refused(lambda: dct.main(dct.make_parser().parse_args(["upsample", spec, f"out{spec}"])), spec)
        capfd.readouterr()

    try:
        attack(cases.items(), act)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from None


NASTY_WORDS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e400",
    "9" * 20,
    "9" * 5000,
    "99999999999",
    "²",
    "1_000",
    " 5",
    "٣",
    "",
]
NASTY_WORDS += [
    "~",
    "~/x",
    "a" * 300,
    "note.txt/x",
    "x\0y",
    "nowhere",
    "a\nb",
    "\udcff",
    "0x10",
    "1e-400",
    "-0",
    "[]",
    "=",
]
NASTY_WORDS += [".", "/", "1e9", "2e38", "0.5", "1", "🙂", "note.txt", "-1e300", "9" * 12, "4294967296", f"{2**64}"]


@pytest.mark.slow
def test_nasty_command_lines_end_in_a_line_or_give_sound_values(monkeypatch, trained, data, capfd):
    seed, parsers = 14, {}
    rng, complete = np.random.default_rng(seed), train_vae.Parser.complete
    monkeypatch.setattr(
        train_vae.Parser, "complete", lambda self, *rest: parsers.update(last=self) or complete(self, *rest)
    )
    Path("note.txt").write_text("hello")
    Path("nowhere").symlink_to("no/such/place")
    cases = {}
    for number in range(150):
        program = (train_diffusion, train_vae, sample)[number % 3]
        program.parse([])
        actions = [a for a in parsers["last"]._actions if a.option_strings and a.dest != "help"]
        words = []
        for action in rng.choice(actions, rng.integers(1, 4), replace=False):
            words.append(action.option_strings[-1])
            count = {None: 1, "+": rng.integers(1, 4), 0: 0}.get(action.nargs, action.nargs)
            words += rng.choice(NASTY_WORDS, count).tolist()
        cases[number] = program, words

    def act(number, case):
        program, words = case
        capfd.readouterr()
        try:
            args = program.parse(words)
        except InputError as error:  # `run_program` prints it
            assert len(str(error)) < 2000
            return
        for name, value in vars(args).items():
            for one in value if isinstance(value, list) else [value]:
                if type(one) in (int, float):
                    assert one == math.inf and name == "repa_sigmas" or abs(one) < 1e12 or "seed" in name, (name, one)
                assert not isinstance(one, str) or ("\0" not in one), (name, one)
        low, high = getattr(args, "guidance_interval", (0, 1))
        assert 0 <= low < high <= 1 and getattr(args, "t_logit_normal", (0, 1))[1] > 0
        assert not any(
            str(getattr(args, name, "")).startswith(("~", "note.txt/", "nowhere")) for name in ("out", "npz")
        )

    try:
        attack(cases.items(), act)
    except AssertionError as error:
        raise AssertionError(
            f"seed {seed}: {error}\n" + "\n".join(f"{k}: {w[:9]}" for k, (_, w) in cases.items())
        ) from None
    # the real thing: one line and an exit status that says so, or 0
    lines = {}
    for value in ("note.txt/x", "a\nb/note.txt", "\udcff"):
        lines[f"data {value}"] = f"train_diffusion.py {TINY} --steps 1 --out run --data".split() + [value]
        lines[f"score {value}"] = f"sample.py {trained} --features hog --device cpu --score".split() + [value]
        lines[f"upsample {value}"] = ["dct.py", "upsample", value, "out.png"]
    lines["out \udcff"] = f"train_diffusion.py {TINY} --data {data} --steps 1 --out".split() + ["\udcff"]
    lines["block ²"] = ["dct.py", "upsample", str(data / "left/000.png"), "out.png", "--block", "²"]

    def runs(number, words):
        program, *flags = words
        environment, words = os.environ | {"CUDA_VISIBLE_DEVICES": ""}, [sys.executable, HERE / program, *flags]
        result = subprocess.run(words, capture_output=True, env=environment, errors="replace")
        assert result.returncode in (0, 2, 1 if program == "dct.py" else 2), result.stderr[-400:]
        assert len(result.stderr.splitlines()) == (result.returncode > 0), result.stderr[-400:]

    attack(lines.items(), runs)


SMALL_VAE = "--size 16 --preset tiny --batch 4 --regularizer kl --workers 0 --device cpu --lr-decay none --log-every 1 "
SMALL_VAE += f"--save-every 1000 --eval-images 12 --cache {CACHE}"


@pytest.mark.slow
def test_other_process_counts_and_workers_continue_the_same_run(data):
    for program in (f"train_diffusion.py {TINY}", f"train_vae.py {SMALL_VAE}"):
        program += f" --data {data} --batch 12 --lr 1e-4"
        for run in ("whole", "parts"):
            shutil.rmtree(run, ignore_errors=True)
        completed(f"{program} --steps 9 --out whole")
        for steps, world, workers in ((3, 2, 1), (6, 3, 0), (9, 1, 2)):
            completed(f"{program} --steps {steps} --out parts --workers {workers}", world)
        same_runs("whole", "parts", 2e-4)
        assert [line["step"] for line in metrics("parts")] == list(range(1, 10))
        # with the same number of processes, bit for bit
        shutil.rmtree("parts")
        for steps, workers in ((4, 1), (9, 0)):
            completed(f"{program} --steps {steps} --out parts --workers {workers}", 1)
        same_runs("whole", "parts")


@pytest.mark.slow
def test_signals_at_random_moments_end_in_one_line_and_the_same_command_goes_on(data, autoencoders):
    rng = np.random.default_rng(12)
    write_photos("many", 80)
    train(f"--data {data} --out run --steps 2")
    cases = {"train": f"train_diffusion.py {TINY} --data {data} --steps 20 --eval-every 7"}
    cases["vae"] = f"train_vae.py {SMALL_VAE} --data {data} --steps 12 --eval-every 5"
    cases["sample"] = "sample.py run --device cpu -n 24 --batch 4 --steps 8"
    cases["encode"] = f"train_vae.py --encode many --ckpt {autoencoders}/kl --batch 2 --device cpu --workers 1"
    for name, world in itertools.product(cases, (1, 2)):
        completed(f"{cases[name]} --out whole-{name}{world}", world)
    done = {"train": lambda out: (out / "metrics.jsonl").exists() and len(metrics(out))}
    done |= {"vae": done["train"], "sample": lambda out: len(list(out.glob("*.png")))}
    done["encode"] = lambda out: np.load(out / "done.npy").sum() if (out / "header.json").exists() else 0
    amounts, stopped = {"train": 20, "vae": 12, "sample": 24, "encode": 80}, 0
    for case in range(20):
        name, world = list(cases)[case % 4], 1 + case // 4 % 2
        number, amount = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP]), int(rng.integers(amounts[name]))
        say, out = f"seed 12, case {case}: {name}, {world} processes, {number!r} after {amount}", f"{name}-{case}"
        line = f"{cases[name]} --out {out}"
        started = launch(line, world)
        until(lambda name=name, out=Path(out), amount=amount: done[name](out) >= amount)
        time.sleep(rng.uniform(0, 0.1))
        # one process alone may be told, as where one of several machines is taken away: the others learn of it
        told = started[rng.integers(world) :][:1] if name in ("train", "vae") else started
        for process in told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
        ends = finish(started, 30)  # when torchrun kills; 1 to 4 s on a free machine
        codes, lines = {code for code, *_ in ends}, [text for *_, err in ends for text in err.splitlines()]
        if not re.search("done at|patch artefacts|  diffuse", "".join(out for _, out, _ in ends)):  # it came in time
            stopped += 1
            named = f"^stopped.* by {signal.Signals(number).name}: the same command goes on$"
            assert len(lines) == 1 and re.search(named, lines[0]), (say, ends)
            assert 128 + number in codes and codes <= {0, 128 + number}, (say, ends)  # 0: its share was done
        completed(line, world)
        if name in ("train", "vae"):
            same_runs(f"whole-{name}{world}", out)
        elif name == "sample":
            assert_same_images(f"whole-{name}{world}", out, 24, tolerance=0)
        else:
            for array in ("values", "done"):
                assert np.array_equal(*(np.load(f"{folder}/{array}.npy") for folder in (f"whole-{name}{world}", out)))
    assert stopped > 10


def children(pid):
    """The processes that one has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if file.read_text().rpartition(") ")[2].split()[1] == str(pid):
                found.append(int(file.parent.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.parametrize("program, agents", [("train_diffusion", 1), ("train_diffusion", 2), ("train_vae", 1)])
def test_torchrun_restarts_by_itself_after_kills_of_a_process(program, agents, data):
    """Ten kills, of two agents four: at random moments, while processes start and evaluate too."""
    rng, kills = np.random.default_rng(agents), 10 if agents == 1 else 4
    flags = {"train_diffusion": TINY, "train_vae": SMALL_VAE}[program] + f" --data {data}"
    flags += " --steps 100000 --save-every 5 --eval-every 20 --out run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --nnodes={agents} --nproc_per_node={3 - agents}"
    words = f"-m torch.distributed.run {meeting} --max-restarts={kills} {HERE}/{program}.py {flags}".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = Path("metrics").with_suffix(".log").open("w")
    options = dict(env=environment, stdout=log, stderr=log, start_new_session=True)
    torchruns = [subprocess.Popen([sys.executable, *words], **options) for _ in range(agents)]
    processes, saved = lambda: [pid for run in torchruns for pid in children(run.pid)], Path("run/checkpoint.pt")
    try:
        before = 0
        for case in range(kills):
            say = f"seed {agents}, kill {case}, after step {before}"
            if case % 3:  # a restart that comes as far as the next checkpoint
                until(lambda before=before: saved.exists() and checkpoint("run")["step"] > before, 90)
                before = checkpoint("run")["step"]
            time.sleep(rng.uniform(0, 3))
            until(lambda: len(processes()) == 2, 90)
            os.kill(processes()[rng.integers(2)], signal.SIGKILL)
            assert all(run.poll() is None for run in torchruns), say
        until(lambda: checkpoint("run")["step"] > before, 120)
    finally:
        for run in torchruns:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGTERM)
        for run in torchruns:
            run.wait(60)
        for run in torchruns:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
    steps = [line["step"] for line in metrics("run")]
    assert steps == list(range(1, len(steps) + 1))
    assert not processes()


@pytest.mark.slow
def test_a_lost_process_is_noticed_in_one_line_and_the_same_command_goes_on(data, autoencoders):
    rng = np.random.default_rng(17)
    train(f"--data {data} --out run --steps 2")
    write_photos("many", 150)
    cases = {"train": f"train_diffusion.py {TINY} --data {data} --steps 100000 --save-every 3 --out train"}
    cases |= {"vae": f"train_vae.py {SMALL_VAE} --data {data} --steps 100000 --save-every 3 --out vae"}
    cases |= {"encode": f"train_vae.py --encode many --ckpt {autoencoders}/kl --batch 1 --device cpu --out encode"}
    cases |= {"sample": "sample.py run --device cpu -n 40 --batch 4 --steps 100 --out sample"}
    for case, lost in itertools.product(cases, (0, 1)):
        say, line = f"{case}, rank {lost}", f"{cases[case]}{lost}"
        out = Path(line.split()[-1])
        begun = {"encode": lambda out=out: (out / "header.json").exists() and 3 < np.load(out / "done.npy").sum()}
        begun["sample"] = lambda out=out: len(list(out.glob("*.png"))) > 4
        started = launch(line, 2)
        until(begun.get(case, (out / "checkpoint.pt").exists))
        time.sleep(rng.uniform(0, 0.3))
        started[lost].kill()
        ends = finish(started, 60)
        assert ends[lost][0] == -signal.SIGKILL, say
        code, _, err = ends[1 - lost]
        if case == "sample" and lost == 0:  # the others make their share
            assert (code, err) == (0, ""), say
        else:
            one_error(ends[1 - lost], "process", "ended", "the same command")
        if case in ("train", "vae"):
            step = checkpoint(out)["step"] + 2
            for run in (out, f"whole-{out}") if lost else ():
                completed(f"{line.partition(' --steps')[0]} --steps {step} --save-every 3 --out {run}", 2)
                same_runs(out, run)
        else:
            completed(line, 1 + lost)
            assert case == "encode" or len(list(out.glob("*.png"))) == 40
    for array in ("values", "done"):
        assert np.array_equal(*(np.load(f"encode{lost}/{array}.npy") for lost in (0, 1)))
    assert_same_images("sample0", "sample1", 40)


@pytest.mark.slow
def test_ctrl_c_ends_dct_py_without_a_traceback_and_the_same_command_goes_on():
    write_photos("many", 2000)
    command = [sys.executable, Path(dct.__file__), "upsample", "many", "large"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(Path("large").glob("*.png")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=30)[1] and process.returncode == -signal.SIGINT
    assert len(list(Path("large").glob("*.png"))) < 2000
    subprocess.run(command, check=True, capture_output=True)
    assert len([file for file in Path("large").glob("*.png") if Image.open(file).size == (32, 32)]) == 2000


@pytest.mark.slow
def test_a_signal_to_one_process_of_torchrun_stops_all(tmp_path):
    write_photos("photos", 60)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [train_diffusion.__file__, *shlex.split(f"{TINY} --data photos --steps 100000 --out run")]
    with open("log", "wb") as log:
        agent = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while agent.poll() is None and "step 3/" not in Path("log").read_text():
        time.sleep(0.05)
    (children,) = Path(f"/proc/{agent.pid}/task").glob(f"{agent.pid}/children")
    (second,) = (p for p in children.read_text().split() if b"\0RANK=1\0" in Path(f"/proc/{p}/environ").read_bytes())
    os.kill(int(second), signal.SIGTERM)
    agent.wait(60)
    stops = re.findall("stopped at step ([0-9]+) by SIGTERM", text := Path("log").read_text())
    assert len(stops) == 1 and "KeyError" not in text and checkpoint("run")["step"] == int(stops[0]), text[-3000:]


# ---- components on a GPU: python -m pytest test_all.py -m cuda -s -----------------------------------------


def on_cuda(test):
    """With -s it prints speed, share of peak and peak memory."""
    return pytest.mark.cuda(pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")(test))


def components(device):
    """What the components make of the same input on a device -> {name: tensor}, gradients among them."""
    torch.manual_seed(0)
    images, latents = photos(4, 32).to(device), torch.randn(4, 4, 16, 16).to(device).requires_grad_()
    codec, statistics = DCTCodec(32, 4, 9, 467.0), DCTStatistics(4, device=device)
    statistics.update(images)
    made = {"esm": S.esm_loss(images, latents), "alpha": S.power_law_exponent(images), "low": S.low_pass(latents, 10)}
    made |= {"esm gradient": torch.autograd.grad(made["esm"], latents)[0], "rmsc": S.rmsc(latents), "psd": psd(images)}
    made |= {"dct": dct2(images), "tokens": codec.encode(images), "decoded": codec.decode(codec.encode(images))}
    made |= {"eta": torch.tensor([statistics.eta()]), "entropies": statistics.entropies(), "up": dct.upsample(images)}
    made |= {"hog": repa.HOG().to(device)(images)[0], "dog": repa.dog_target(latents.flatten(2).mT, 0.6, 2)}
    made |= {"psnr": vae.psnr(images, images.flip(0)), "ssim": vae.ssim(images, images.flip(0))}
    for name, make in NETWORKS.items():
        net, (x, t, y) = randomised(make()).to(device), (v.to(device) for v in network_input(name))
        made[name], made[f"{name}, hidden"] = net.tapped(x, t, y, y == 1, tap=1)
        parameter = next(p for p in net.parameters() if p.requires_grad)
        made[f"{name}, gradient"] = torch.autograd.grad(made[name].square().mean(), parameter)[0]
    autoencoder = vae.VAE(**vae.PRESETS["tiny"]).to(device, memory_format=torch.channels_last)
    made["mean"], made["logvar"] = autoencoder.encode(images)
    return {
        name: value.detach().cpu()
        for name, value in (made | {"reconstruction": autoencoder.decode(made["mean"])}).items()
    }


@on_cuda
def test_components_on_cuda_equal_those_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    ours, oracle = components("cuda"), components("cpu")
    for name, value in oracle.items():
        tolerance = dict(rtol=2e-3, atol=2e-4 * max(1.0, value.abs().max().item()))
        torch.testing.assert_close(ours[name], value, **tolerance, msg=name)


TRAINED = ["train_diffusion.py --model dit-tiny", "train_diffusion.py --model uvit-tiny"]
TRAINED += ["train_diffusion.py --model dit-nano --space pixel --repa dog --encoder hog --repa-depth 1"]
TRAINED += ["train_vae.py --regularizer esm+dsm --ema 0.9"]
TRAINED += ["train_vae.py --regularizer kl --gan-weight 0.5 --gan-start 4"]


@on_cuda
@pytest.mark.parametrize("compiling", ["", "--compile"])
@pytest.mark.parametrize("program", TRAINED)
def test_trainers_on_cuda(program, compiling):
    """Half the steps, the rest resumed, then all of them under torchrun; and a benchmark, whose figures are printed."""
    line = f"{program} {compiling} --size 32 --batch 16 --workers 0 --device cuda --amp bf16 --log-every 1 "
    line += f"--lr-decay none --eval-every 1000 --data {write_photos('data', 64, 32, classes=['left', 'right'])}"
    many = max(1, torch.cuda.device_count())
    for run, steps, processes in (("one", 20, 0), ("halves", 10, 0), ("halves", 20, 0), ("many", 20, many)):
        command(f"{line} --steps {steps} --out {run}", processes, gpu=True)
    losses = {run: [entry["loss"] for entry in metrics(run)] for run in ("one", "halves", "many")}
    assert all(np.mean(loss[-3:]) < np.mean(loss[:3]) for loss in losses.values())
    assert all(entry["skipped_steps"] == 0 for run in losses for entry in metrics(run, "grad_norm"))
    np.testing.assert_allclose(losses["many"], losses["one"], rtol=0.1)
    out = command(f"{line} --benchmark 10 --out none", gpu=True).stdout.splitlines()
    figures = [text for text in out if text.startswith(("step  ", "training  ", "arithmetic", "peak memory"))]
    print(f"\n{line}", *figures, f"share of peak in training {metrics('one')[-1].get('share_of_peak')}", sep="\n")
    assert len(figures) == 4


@on_cuda
@pytest.mark.parametrize("program", ["train_diffusion.py --model dit-nano", "train_vae.py --regularizer kl"])
def test_a_run_goes_on_on_another_device(program):
    line = f"{program} --data {write_photos('data', 24, 32)} --size 32 --batch 8 --workers 0 --amp off --log-every 1"
    line += " --lr 1e-4 --lr-decay none --eval-every 1000"
    for run, parts in {"whole": [(9, "cpu")], "parts": [(3, "cpu"), (6, "cuda"), (9, "cpu")]}.items():
        for steps, device in parts:
            command(f"{line} --steps {steps} --device {device} --out {run}", gpu=True)
    losses = [[entry["loss"] for entry in metrics(run)] for run in ("whole", "parts")]
    # noise is drawn on the device: where that changes, it is other noise of the same distribution
    np.testing.assert_allclose(losses[0][:3], losses[1][:3], rtol=1e-5)
    assert (
        np.isfinite(losses[1]).all()
        and len(losses[1]) == 9
        and checkpoint("parts")["optimizer"]["state"][0]["step"] == 9
    )


@on_cuda
def test_from_images_to_a_score_on_cuda():
    """Autoencoder, spectrum, evaluation, latents, aligned diffusion on them, samples in bf16 and in float32."""
    data, flags = f"--data {write_photos('data', 48, 32, classes=['left', 'right'])}", "--device cuda --amp bf16"
    few = f"{flags} --workers 0 --eval-every 1000 --steps 20"
    command(f"train_vae.py {few} {data} --size 32 --batch 8 --out vae", gpu=True)
    for line in (f"--eval-only --ckpt vae {data} --features hog", f"--spectrum vae {data} --out s"):
        command(f"train_vae.py {flags} {line}", gpu=True)
    command(f"train_vae.py {flags} --encode data --ckpt vae --out c", gpu=True)
    latent = "--latents c --model dit-nano/1 --repa dog --encoder hog --cache-targets t"
    for run, line in (("z", latent), ("dct", f"{data} --size 32 --batch 16")):
        command(f"train_diffusion.py {few} {line} --out {run}", gpu=True)
        for amp in ("bf16", "off"):
            images = f"sample.py {run} -n 16 --steps 4 --guidance 1.5 --out {run}-{amp} --score data --features hog"
            command(f"{images} --device cuda --amp {amp}", gpu=True)
        assert_same_images(f"{run}-bf16", f"{run}-off", 16, tolerance=16)
        command(f"sample.py {run} {flags} --trajectory", gpu=True)
    scores = [json.loads(text)["frechet_distance"] for text in Path("scores.jsonl").read_text().splitlines()]
    assert len(scores) == 4 and np.isfinite(scores).all()
