"""Tests against independent oracles: scipy, Pillow, numpy, closed forms, and the real commands run tiny.

    python -m pytest test_all.py

Nothing is downloaded. Tests that use the development data beside the repository are skipped where it is absent.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image

import dct
import sample
import train_diffusion
from dct import DCTCodec, DCTStatistics, dct2, idct2
from dit import DIT_SIZES, DiT
from sample import SAMPLERS, VP, Flow, Images, InputError, like
from spectral_losses import psd, radial_bands
from uvit import UVIT_SIZES, UViT

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
CIFAR = SHARED / "data" / "cifar10-train.zip"
needs_shared = pytest.mark.skipif(not CIFAR.exists(), reason=f"no development data in {SHARED}")


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


@pytest.mark.parametrize("path", [VP(4.0), Flow()], ids=["vp", "flow"])
@pytest.mark.parametrize("predict", sample.PREDICTIONS)
def test_predictions_invert(path, predict):
    x0, eps, t = torch.randn(97, 3, 2), torch.randn(97, 3, 2), T.float().clamp(0.02, 0.98)
    alpha, sigma = path.alpha_sigma(like(t, x0))
    out = sample.target(path, predict, x0, eps, t)
    for ours, true in zip(sample.x0_and_eps(path, predict, alpha * x0 + sigma * eps, t, out), (x0, eps)):
        assert (ours - true).abs().max() < 2e-4 / 0.02
    if predict == "v" and isinstance(path, Flow):
        assert torch.equal(out, eps - x0)


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
    """Largest distance to the exact solution, along which (x - mean) / std stays what it was."""
    z = torch.linspace(-3, 3, 101, dtype=torch.float64)[:, None]
    (mean1, std1), (mean0, std0) = marginal(path, 1), marginal(path, path.time(0.0))
    x = sampler(gaussian_denoiser(path), path, mean1 + std1 * z, steps, None)
    return (x - (mean0 + std0 * z)).abs().max().item()


def sde_error(path, sampler, steps):
    """Error of mean and std, exactly: the sampler is affine in its start and in each noise, so that one batch with a
    one in each of them in turn reads off every coefficient."""
    x, draws = torch.zeros(steps + 3, 1, dtype=torch.float64), []
    x[1] = 1

    def noise():
        draws.append(None)
        unit = torch.zeros_like(x)
        unit[1 + len(draws)] = 1
        return unit

    constant, *rest = sampler(gaussian_denoiser(path), path, x, steps, noise).flatten()
    (mean1, std1), (mean0, std0) = marginal(path, 1), marginal(path, path.time(0.0))
    start, noises = rest[0] - constant, torch.stack(rest[1:]) - constant
    std = (start**2 * std1**2 + noises.square().sum()).sqrt()
    return max(abs(constant + start * mean1 - mean0), abs(std - std0)).item()


SAMPLER_ORDERS = [("dpm++", 2), ("ddim", 1), ("euler-ode", 1), ("ddpm", 1), ("euler-sde", 1), ("euler", 1), ("heun", 2)]


@pytest.mark.parametrize("c", [1.0, 4.0])
@pytest.mark.parametrize("name, order", SAMPLER_ORDERS)
def test_samplers_reach_the_exact_solution_at_their_order(name, order, c):
    path, error = (VP(c), "vp") if name in SAMPLERS["vp"] else (Flow(c), "flow")
    sampler, error = SAMPLERS[error][name], sde_error if name in ("ddpm", "euler-sde") else ode_error
    errors = [error(path, sampler, steps) for steps in (64, 128, 256, 512)]
    assert errors[-1] < (0.02 if order == 1 else 1e-3)
    for coarse, fine in zip(errors[1:], errors[2:]):
        assert order - 0.25 < np.log2(coarse / fine) < order + 0.35


def test_flow_sde_converges_up_to_its_last_step():
    """Its jump from t = 0.04 without noise leaves an error of that size, however fine the steps."""
    errors = [sde_error(Flow(), SAMPLERS["flow"]["sde"], steps) for steps in (8, 32, 128)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.012


def test_one_step_is_enough_for_every_sampler():
    for kind, path in (("vp", VP(12.0)), ("flow", Flow(16.0))):
        for sampler in SAMPLERS[kind].values():
            x = sampler(gaussian_denoiser(path), path, torch.randn(9, 1), 1, lambda: torch.randn(9, 1))
            assert x.isfinite().all()


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
                    loss = train_diffusion.diffusion_loss(
                        diffusion, diffusion.network, x0, torch.randn_like(x0), torch.tensor([0.2, 1.0]), y
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
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("hello")
    for bad in ("nowhere", "empty", "note.txt"):
        with pytest.raises(InputError, match=bad):
            Images(str(tmp_path / bad), 16)


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


def command(line, processes=0, check=True):
    """A real command in its own process, or in several under torchrun."""
    torchrun = f"-m torch.distributed.run --standalone --nproc_per_node={processes}".split() if processes else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
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


def test_killed_and_resumed_equals_uninterrupted(data, tmp_path):
    flags = f"--data {data} --steps 40 --save-every 5 --lr-decay linear"
    train(f"{flags} --out {tmp_path}/whole")
    killed = tmp_path / "killed"
    words = [sys.executable, HERE / "train_diffusion.py", *f"{TINY} {flags} --out {killed}".split()]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=HERE) as process:
        for _ in range(600):
            time.sleep(0.1)
            if (killed / "metrics.jsonl").exists() and (killed / "metrics.jsonl").read_text().count("\n") > 12:
                break
        process.send_signal(signal.SIGKILL)
    assert 0 < checkpoint(killed)["step"] < 40
    (killed / "checkpoint.pt.tmp").write_bytes(b"half a checkpoint")  # as a kill while writing leaves it
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 39, "lo')
    train(f"{flags} --out {killed}")
    assert [line["step"] for line in metrics(killed)] == list(range(1, 41))
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
    command(f"sample.py {tmp_path}/two --n 5 --steps 3 --out {tmp_path}/a")
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
        return real(*args, **kwargs) * (float("nan") if len(calls) in bad else 1.0)

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
    assert t.min() >= 1e-3 and t.max() <= 1 and abs(t.mean() - 0.5) < 0.01
    config = dict(space="dct", size=16, model="dit-nano", path="flow", snr_scale=1.0, predict="x0", classes=None)
    diffusion = sample.Diffusion(config | dict(label_dropout=0.1, block=4, keep=2, eta=400.0))
    x0, t, weights = torch.randn(5, 4, 12), torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), torch.rand(12)
    loss = train_diffusion.diffusion_loss(diffusion, diffusion.network, x0, torch.randn_like(x0), t, weights=weights)
    expected = (x0.square() * weights).mean((1, 2)) / (t**2 + 0.04)  # the network starts at zero
    assert torch.allclose(loss, expected, rtol=1e-5)


def test_benchmark_prints_every_part_and_writes_nothing(data, tmp_path, capsys):
    train(f"--data {data} --out {tmp_path}/none --benchmark 2")
    out = capsys.readouterr().out
    for word in ("file to pixels", "forward", "backward", "optimizer", "images/s", "GFLOP/s", "peak memory"):
        assert word in out
    assert not (tmp_path / "none").exists()


KINDS = [((9, 14, 3), "uint8"), ((5, 4), "uint8"), ((6, 6), "uint16"), ((4, 4, 4), "uint8")]


@pytest.mark.parametrize("shape, dtype", KINDS)
def test_upsample_command_on_every_kind_of_image(tmp_path, shape, dtype):
    pixels = np.random.default_rng(0).integers(60, 190, shape).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    dct.main(dct.make_parser().parse_args(f"upsample {tmp_path}/in.png {tmp_path}/out.png".split()))
    up = np.asarray(Image.open(tmp_path / "out.png"))
    assert up.shape[:2] == (2 * shape[0], 2 * shape[1]) and up.dtype == dtype
    averaged = up.astype(float).reshape(shape[0], 2, shape[1], 2, -1).mean((1, 3)).reshape(shape)
    assert np.abs(averaged - pixels).mean() < 1.5  # rounding, and clipping at 0 and 255


def test_upsample_command_in_its_own_process(tmp_path):
    Image.new("RGB", (14, 9), "teal").save(tmp_path / "in.png")
    result = command(f"dct.py upsample {tmp_path}/in.png {tmp_path}/out.png --block 4")
    assert "14x9" in result.stdout and Image.open(tmp_path / "out.png").size == (28, 18)
    for source, out in (
        (tmp_path / "absent.png", "b.png"),
        (tmp_path / "in.png", "no/b.png"),
        (HERE / "dct.py", "b.png"),
    ):
        result = command(f"dct.py upsample {source} {tmp_path}/{out}", check=False)
        assert result.returncode and "dct.py: cannot" in result.stderr and "Traceback" not in result.stderr


def test_documented_commands_are_understood():
    """Every command line of README.md and of the programs' first lines parses, and its settings fit together."""
    text = (HERE / "README.md").read_text() + train_diffusion.__doc__ + sample.__doc__
    text = text.replace("\\\n", " ")
    lines = re.findall(r"(?:python|torchrun --nproc_per_node=\d+) (train_diffusion|sample)\.py *([^\n`#;&)]*)", text)
    assert len(lines) > 12
    for program, flags in lines:
        args = {"train_diffusion": train_diffusion, "sample": sample}[program].make_parser().parse_args(flags.split())
        if program == "train_diffusion":
            train_diffusion.complete(args)
