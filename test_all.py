"""Tests against independent oracles: scipy, Pillow, numpy, closed forms, and the real commands run tiny.

    python -m pytest test_all.py

Nothing is downloaded. Tests that use the development data beside the repository are skipped where it is absent.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
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
        statistics.update(torch.stack([images[i] for i in range(start, start + 5000, 2)]) / 127.5 - 1)
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
    np.testing.assert_allclose(dct.upsample(torch.from_numpy(x)).numpy(), scipy.fft.idctn(high, norm="ortho"), atol=1e-12)


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
    linear = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1"]
    for n in range(depth):
        linear += [f"blocks.{n}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")]
    keys = {f"{name}.{kind}" for name in linear for kind in ("weight", "bias")} | {"pos_embed"}
    return keys | ({"y_embedder.embedding_table.weight"} if classes else set())


def uvit_keys(depth, classes=True, tokens=False, time_mlp=False, conv=True):
    embed = "proj" if tokens else "patch_embed.proj"
    keys = {"pos_embed", f"{embed}.weight", f"{embed}.bias", "norm.weight", "norm.bias"}
    blocks = [f"in_blocks.{n}" for n in range(depth // 2)] + ["mid_block"] + [f"out_blocks.{n}" for n in range(depth // 2)]
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
        assert state["blocks.27.adaLN_modulation.1.weight"] == (6912, 1152) and state["t_embedder.mlp.0.weight"] == (1152, 256)
        assert state["blocks.0.attn.qkv.bias"] == (3456,) and state["blocks.0.mlp.fc1.weight"] == (4608, 1152)

        net = UViT(32, 2, 4, 1152, 28, 16, num_classes=1001, conv=False)
        state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert set(state) == uvit_keys(28, conv=False)
        assert state["pos_embed"] == (1, 258, 1152) and state["label_emb.weight"] == (1001, 1152)
        assert state["out_blocks.13.skip_linear.weight"] == (1152, 2304) and state["decoder_pred.weight"] == (16, 1152)

        net = UViT(num_tokens=1024, token_dim=48, mlp_time_embed=True, **UVIT_SIZES["m"])  # DCTdiff on FFHQ 256
        state = {k: tuple(v.shape) for k, v in net.state_dict().items()}
        assert set(state) == uvit_keys(16, classes=False, tokens=True, time_mlp=True)
        assert state["proj.weight"] == (768, 48) and state["decoder_pred.weight"] == (48, 768) and state["pos_embed"] == (1, 1025, 768)
        net = UViT(32, 2, 3, 512, 12, 8)
        assert set(net.state_dict()) == uvit_keys(12, classes=False)
        assert net.state_dict()["final_layer.weight"].shape == (3, 3, 3, 3)
        # the sizes the papers state: DiT-XL/2 675M, S 33M, B 130M, L 458M; U-ViT S 44M, M 131M, L 287M, H 501M
        for size, millions in dict(s=33, b=130, l=458, xl=675).items():
            assert round(sum(p.numel() for p in DiT(**DIT_SIZES[size]).parameters()) / 1e6) == millions
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
    return torch.stack([torch.tensor([np.cos(v * 10000 ** (-i / (dim // 2))) for i in range(dim // 2)]
                                     + [np.sin(v * 10000 ** (-i / (dim // 2))) for i in range(dim // 2)]) for v in t.tolist()])  # fmt: skip


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
    x, t, y = torch.randn(3, 4, 8, 8, generator=g, dtype=torch.float64), torch.tensor([0.0, 12.5, 999.0]), torch.tensor([0, 7, 3])
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
    "dit tokens": lambda: DiT(num_tokens=16, token_dim=6, hidden_size=16, depth=4, num_heads=2, num_classes=5, learn_sigma=False),
    "uvit maps": lambda: UViT(8, 2, 3, 16, 4, 2, num_classes=6),
    "uvit tokens": lambda: UViT(num_tokens=16, token_dim=6, embed_dim=16, depth=4, num_heads=2, num_classes=6, mlp_time_embed=True),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_gradients_null_class_and_tap(name):
    net = randomised(NETWORKS[name]()).float()
    shape = (4, 3, 8, 8) if "maps" in name else (4, 16, 6)
    x, t, y, drop = torch.randn(shape), torch.rand(4), torch.tensor([0, 1, 2, 4]), torch.tensor([True, False, False, True])
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
        assert not any("emb" in k and ("label" in k or "table" in k) for k in net.state_dict()) and net.null_class is None
        net(torch.randn(2, 3, 8, 8), torch.rand(2))
    for bad in (lambda: DiT(9, 2), lambda: UViT(9, 2), lambda: DiT(num_tokens=15, token_dim=4), lambda: UViT(8, 2, embed_dim=10, num_heads=3)):
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
