"""Block-DCT tokens for diffusion: DCTdiff (Ning et al., ICML 2025, arXiv 2412.15032).

The idea: split an image into small blocks, take the discrete cosine transform of each, keep the low frequencies, and
let the diffusion model work on those numbers instead of pixels. This file is that transform, its inverse, and the
statistics it is scaled by. It needs torch alone.

    codec = DCTCodec(image_size=256, block_size=4, keep=8, eta=485.0)
    tokens = codec.encode(images)      # (N, 3, 256, 256) in [-1, 1] -> (N, 1024, 48)
    images = codec.decode(tokens)      # and back

It also enlarges pictures (paper, section 4.5), the one command of this file, beside Pillow's ways to compare with:

    python dct.py upsample photo.png photo-x2.png
    python dct.py upsample photos/ photos-x2/ --method bicubic
"""

import argparse
import functools
import io
import logging
import math
import os
import re
import signal
import sys
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F

PERCENTILES = (0.0175, 0.9825)  # the range eta and the entropies are measured in [paper, section 4.2]
ENTROPY_BINS = 100  # bins over (-1, 1) of coefficient / eta [code]
TOKEN_LIMIT = 2.0  # decode clamps tokens to [-2, 2] [code]
CHANNELS = [0, 0, 0, 0, 1, 2]  # of a token's six blocks: Y, Y, Y, Y, Cb, Cr


# ---- transforms -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def dct_basis(n, dtype=torch.float32, device="cpu"):
    """Orthonormal DCT-II matrix (n, n); row k holds s_k cos(pi (2i + 1) k / 2n). Its transpose is its inverse."""
    with torch.inference_mode(False):  # a cached tensor must stay usable by autograd
        k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        basis = torch.cos(math.pi * (2 * i + 1) * k / (2 * n)) * math.sqrt(2 / n)
        basis[0] = math.sqrt(1 / n)
        return basis.to(device, dtype)


def _widen(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def dct2(x, inverse=False):
    """Orthonormal 2-D DCT-II over the last two dims. (..., H, W) real -> (..., H, W), float32 or wider."""
    x = _widen(x)
    rows, cols = (dct_basis(n, x.dtype, x.device) for n in x.shape[-2:])
    if inverse:
        rows, cols = rows.mT, cols.mT
    with torch.autocast(x.device.type, enabled=False):
        return ((x @ cols.mT).mT @ rows.mT).mT  # rows @ x @ cols^T of a batch, as two plain matrix products


def idct2(x):
    """Inverse of `dct2` (the orthonormal 2-D DCT-III). (..., H, W) -> (..., H, W), float32 or wider."""
    return dct2(x, inverse=True)


def blockify(x, block_size):
    """(..., H, W) -> (..., H/B, W/B, B, B). Raises ValueError where B does not divide H and W."""
    B, (h, w) = block_size, x.shape[-2:]
    if h % B or w % B:
        raise ValueError(f"blocks of {B} do not divide an image of {h}x{w}")
    return x.unflatten(-1, (w // B, B)).unflatten(-3, (h // B, B)).transpose(-3, -2)


def unblockify(x):
    """Inverse of `blockify`. (..., H/B, W/B, B, B) -> (..., H, W)"""
    return x.transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def zigzag(block_size, device=None):
    """Flat indices (B*B,) of a block's coefficients from low to high frequency, in JPEG's order."""

    def key(i):  # anti-diagonal first; on odd ones the row grows, on even ones the column
        row, col = divmod(i, block_size)
        return row + col, row if (row + col) % 2 else col

    return torch.tensor(sorted(range(block_size**2), key=key), device=device)


# ---- colour -----------------------------------------------------------------------------------------------

KR, KG, KB = 0.299, 0.587, 0.114  # luma weights of ITU-R BT.601, full range as in JFIF


def rgb_to_ycbcr(x):
    """RGB (N, 3, H, W) on 0..255 -> Y, Cb, Cr (N, 3, H, W) on 0..255, chroma centred on 128 (JFIF)."""
    r, g, b = _widen(x).unbind(1)
    y = KR * r + KG * g + KB * b
    return torch.stack((y, 128 + (b - y) * (0.5 / (1 - KB)), 128 + (r - y) * (0.5 / (1 - KR))), 1)


def ycbcr_to_rgb(x):
    """Inverse of `rgb_to_ycbcr`; the result is not clipped to 0..255."""
    y, cb, cr = _widen(x).unbind(1)
    r = y + (cr - 128) * ((1 - KR) / 0.5)
    b = y + (cb - 128) * ((1 - KB) / 0.5)
    return torch.stack((r, (y - KR * r - KB * b) / KG, b), 1)


# ---- codec ------------------------------------------------------------------------------------------------


def _images(x):
    """Images in [-1, 1], float32 or wider. Raises ValueError for integers, which are pixels of 0..255."""
    if not x.is_floating_point():
        raise ValueError(f"images are {x.dtype}, expected floats in [-1, 1]: of 8-bit pixels, images / 127.5 - 1")
    return _widen(x)


def block_coefficients(images, block_size, keep=None):
    """Zigzagged DCT coefficients of every block, grouped by token (paper, section 4.1).

    images (N, 3, S, S) in [-1, 1] -> (N, L, 6, keep) with L = (S / 2B)^2 in raster order; the six are the Y blocks
    top-left, top-right, bottom-left, bottom-right, then Cb and Cr (halved by averaging) of the same 2B x 2B pixels.
    Units: 8-bit levels, so the DC of a flat block is B times its level less 128.
    """
    B, (N, _, S, _) = block_size, images.shape
    ycc = rgb_to_ycbcr((_images(images) + 1) * 127.5) - 128  # (N, 3, S, S)
    y = blockify(ycc[:, 0], 2 * B)  # (N, h, w, 2B, 2B), h = w = S / 2B
    y = blockify(y, B).flatten(3, 4)  # (N, h, w, 4, B, B)
    chroma = blockify(F.avg_pool2d(ycc[:, 1:], 2), B).movedim(1, 3)  # (N, h, w, 2, B, B)
    coefficients = dct2(torch.cat((y, chroma), 3)).reshape(N, (S // (2 * B)) ** 2, 6, B * B)
    return coefficients[..., zigzag(B, images.device)[:keep]]


@functools.lru_cache(maxsize=16)
def _token_matrix(block_size, keep, dtype, device):
    """`block_coefficients` of one token area as weight (6 keep, 12 B*B) and bias (6 keep,), read off unit impulses.

    Colour, averaging, DCT, zigzag and truncation are all affine in the pixels of a 2B x 2B area, so that one matrix
    product does what they do: six times as fast on a CPU core as step by step (256 px, B = 4, keep 8).
    """
    with torch.inference_mode(False), torch.no_grad():
        side = 2 * block_size
        impulses = torch.eye(3 * side * side, dtype=torch.float64).view(-1, 3, side, side)
        bias = block_coefficients(torch.zeros_like(impulses[:1]), block_size, keep).flatten()
        weight = block_coefficients(impulses, block_size, keep).flatten(1).T - bias[:, None]
        return weight.contiguous().to(device, dtype), bias.to(device, dtype)


class DCTCodec:
    """Images to tokens and back (paper, section 4.1), on the device of its input, a batch at a time.

    A token covers 2B x 2B pixels and holds `keep` coefficients of each of its six blocks (see `block_coefficients`),
    all divided by `eta`, or, where eta is (3, keep) numbers, those of Y, Cb and Cr each by its own (naive scaling).
    Attributes: num_tokens = (S / 2B)^2, token_dim = 6 keep. Raises ValueError for a size 2B does not divide, a `keep`
    outside 1..B*B or an eta that is not positive.
    """

    def __init__(self, image_size, block_size, keep, eta):
        if block_size < 1 or image_size < 1 or image_size % (2 * block_size):
            raise ValueError(f"image size {image_size} must be a multiple of 2 x block size = {2 * block_size}")
        if not 1 <= keep <= block_size**2:
            raise ValueError(f"keep {keep} must lie in 1..{block_size**2} for blocks of {block_size}")
        scale = torch.as_tensor(eta, dtype=torch.float64, device="cpu")  # networks are looked at on meta
        if scale.shape not in ((), (3, keep)):
            raise ValueError(f"eta is {tuple(scale.shape)}, expected one number or (3, {keep}), a row a channel")
        if not (scale > 0).all():
            raise ValueError(f"eta {eta} must be positive: it is what coefficients are divided by")
        self.scale = scale.expand(3, keep)[CHANNELS].flatten()  # (6 keep,)
        self.image_size, self.block_size, self.keep = image_size, block_size, keep
        self.num_tokens, self.token_dim = (image_size // (2 * block_size)) ** 2, 6 * keep

    def encode(self, images):
        """(N, 3, S, S) floats in [-1, 1] -> tokens (N, L, 6 keep), mostly in [-1, 1]. Raises ValueError for others."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images are {tuple(images.shape)}, expected (N, 3, {self.image_size}, {self.image_size})")
        images = _images(images)
        weight, bias = _token_matrix(self.block_size, self.keep, images.dtype, images.device)
        areas = blockify(images, 2 * self.block_size).permute(0, 2, 3, 1, 4, 5)  # (N, h, w, 3, 2B, 2B)
        with torch.autocast(images.device.type, enabled=False):
            scale = self.scale.to(weight)
            return F.linear(areas.reshape(len(images), self.num_tokens, -1), weight / scale[:, None], bias / scale)

    def decode(self, tokens):
        """Tokens (N, L, 6 keep), clamped to [-2, 2] -> images (N, 3, S, S) clipped to [-1, 1]."""
        B, N, h = self.block_size, tokens.shape[0], self.image_size // (2 * self.block_size)
        kept = _widen(tokens).clamp(-TOKEN_LIMIT, TOKEN_LIMIT)
        kept = (kept * self.scale.to(kept)).unflatten(2, (6, self.keep))
        blocks = kept.new_zeros(*kept.shape[:3], B * B)  # (N, L, 6, B*B)
        blocks[..., zigzag(B, tokens.device)[: self.keep]] = kept
        blocks = idct2(blocks.view(N, h, h, 6, B, B)) + 128
        y = unblockify(unblockify(blocks[:, :, :, :4].unflatten(3, (2, 2))))  # (N, S, S)
        chroma = unblockify(blocks[:, :, :, 4:].movedim(3, 1))  # (N, 2, S/2, S/2)
        chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
        return (ycbcr_to_rgb(torch.cat((y[:, None], chroma), 1)) / 127.5 - 1).clamp(-1, 1)


def psnr_per_keep(images, block_size):
    """PSNR in dB (peak 255) of images (N, 3, S, S) in [-1, 1] coded with keep = 1..B*B -> (B*B,)."""
    n, mse = block_size**2, []
    codec = DCTCodec(images.shape[-1], block_size, n, 256.0 * block_size)  # eta: no clamping
    tokens = codec.encode(images).unflatten(2, (6, n))
    for keep in range(1, n + 1):
        kept = F.pad(tokens[..., :keep], (0, n - keep)).flatten(2)
        mse.append(((codec.decode(kept) - images) * 127.5).square().mean())
    return 10 * torch.log10(255**2 / torch.stack(mse))


class DCTStatistics:
    """Eta and entropies from a stream of images, in one pass and bounded memory (paper, section 4.2 and 4.3).

    One fine histogram per channel and coefficient, whose bins are interpolated afterwards. Two such objects over two
    halves of a data set add up: `counts` is a plain sum (all-reduce it under torchrun).
    """

    def __init__(self, block_size, bins=2**15, device=None):
        self.block_size, self.bins = block_size, bins
        self.width = 257.0 * block_size / bins  # an orthonormal coefficient lies within +-128 B; and a margin
        self.counts = torch.zeros(3, block_size**2, bins, dtype=torch.int64, device=device)  # Y, Cb, Cr

    def update(self, images):
        """Count a batch (N, 3, S, S) in [-1, 1]."""
        n = self.block_size**2
        # Zero sits in the middle of a bin, so that rounding noise on flat blocks cannot tip it to one side.
        index = (block_coefficients(images, self.block_size) / self.width).round_().long() + self.bins // 2
        channel = torch.tensor(CHANNELS, device=images.device)[:, None] * n
        row = channel + torch.arange(n, device=images.device)  # (6, B*B): which histogram
        index = (index.clamp_(0, self.bins - 1) + row * self.bins).flatten()
        self.counts.view(-1).scatter_add_(0, index, torch.ones_like(index))

    def _cdf(self):
        """Cumulative share at the upper edge of every bin (3, B*B, bins + 1), 0 first, and where it passes the two
        percentiles, (3, B*B, 2) in 8-bit levels.
        """
        cdf = F.pad(self.counts.double().cumsum(-1), (1, 0))
        if not cdf[0, 0, -1]:
            raise ValueError("no image has been counted yet")
        cdf = cdf / cdf[..., -1:]
        q = torch.tensor(PERCENTILES, dtype=cdf.dtype, device=cdf.device).expand(*cdf.shape[:2], 2).contiguous()
        upper = torch.searchsorted(cdf, q).clamp(1, self.bins)
        low, high = cdf.gather(-1, upper - 1), cdf.gather(-1, upper)
        fraction = (q - low) / (high - low).clamp_min(1e-300)
        return cdf, (upper - 1 + fraction - self.bins // 2 - 0.5) * self.width

    def eta(self):
        """Entropy-consistent scaling: the larger magnitude of the Y DC's two percentiles, in 8-bit levels."""
        return self._cdf()[1][0, 0].abs().max().item()

    def scales(self):
        """Naive scaling, which the paper compares: every coefficient's own larger percentile -> (3, B*B). A coefficient
        that is zero almost everywhere has the width of a bin.
        """
        return self._cdf()[1].abs().amax(-1).clamp_min(self.width)

    def entropies(self):
        """Shannon entropy in bits of every coefficient / eta within its percentile range -> (3, B*B)."""
        cdf, percentiles = self._cdf()
        low, high = percentiles.split(1, dim=2)
        edges = torch.linspace(-1, 1, ENTROPY_BINS + 1, dtype=cdf.dtype, device=cdf.device) * self.eta()
        place = edges.clamp(low, high) / self.width + self.bins // 2 + 0.5  # (3, B*B, 101), in bins
        left = place.floor().long().clamp(0, self.bins - 1)
        share = torch.lerp(cdf.gather(-1, left), cdf.gather(-1, left + 1), place - left).diff(dim=-1)
        p = share / share.sum(-1, keepdim=True).clamp_min(1e-300)
        return -torch.xlogy(p, p).sum(-1) / math.log(2)


def ebfr_weights(entropies, keep):
    """Entropy-based frequency reweighting (paper, section 4.3): loss weight of every entry of a token.

    entropies (3, B*B), zigzagged -> (6 keep,): each channel truncated to `keep`, divided by its mean.
    """
    weights = entropies[:, :keep] / entropies[:, :keep].mean(1, keepdim=True).clamp_min(1e-12)
    return weights[CHANNELS].flatten().float()


# ---- upsampling -------------------------------------------------------------------------------------------


def upsampling_gain(n):
    """What the n coefficients along one axis are multiplied by when its length doubles -> (n,) float64."""
    return math.sqrt(2) / torch.cos(torch.arange(n, dtype=torch.float64) * (math.pi / (4 * n)))


def upsample(x, block_size=None):
    """Upsampling by two (paper, section 4.5): 2 x 2 averages of the result, until rounded or clipped, are the input.

    D_high(k, l) = D_low(k, l) / (1/2 cos(k pi / 4B) cos(l pi / 4B)) for k, l < B, zero elsewhere.
    x (..., H, W) of any range and size -> (..., 2H, 2W). block_size None takes the frame as one block (no seams);
    a number works block by block, the edges replicated where it does not divide the image.
    """
    h, w = x.shape[-2:]
    if block_size is None:
        low = dct2(x)
        rows, cols = (upsampling_gain(n).to(low) for n in (h, w))
        return idct2(F.pad(low * (rows[:, None] * cols), (0, w, 0, h)))
    if block_size < 1:
        raise ValueError(f"block size {block_size} must be at least 1")
    rows, cols = (torch.arange(n + -n % block_size, device=x.device).clamp_max(n - 1) for n in (h, w))
    blocks = blockify(x[..., rows[:, None], cols], block_size)
    return unblockify(upsample(blocks))[..., : 2 * h, : 2 * w]


def enlarge(x, block_size=None):
    """`upsample` of a channel (H, W) of a large picture, numpy -> (2H, 2W) float32, by scipy's n log n transforms."""
    import numpy as np
    from scipy.fft import dctn, idctn

    h, w = x.shape
    rows, cols = (block_size, block_size) if block_size else (h, w)
    x = np.pad(x.astype(np.float32), ((0, -h % rows), (0, -w % cols)), mode="edge")
    blocks = x.reshape(x.shape[0] // rows, rows, x.shape[1] // cols, cols)
    low = dctn(blocks, axes=(1, 3), norm="ortho", overwrite_x=True)
    low *= (upsampling_gain(rows)[:, None, None] * upsampling_gain(cols)).float().numpy()
    high = np.zeros((low.shape[0], 2 * rows, low.shape[2], 2 * cols), np.float32)
    high[:, :rows, :, :cols] = low
    high = idctn(high, axes=(1, 3), norm="ortho", overwrite_x=True)
    return high.reshape(2 * x.shape[0], 2 * x.shape[1])[: 2 * h, : 2 * w]


def white_level(image):
    """The value of white in an image just opened by Pillow: 255, of deeper greys 65535 (16-bit integers; 4095 where
    a TIFF holds 12) or 1 (floats, all within 0..1). Raises ValueError for greys of another range, or of an unknown one.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if not image.mode.startswith(("I", "F")):
        return 255
    if tags.get(262) == 0:
        reason = "a TIFF of deep grey in which white is 0"  # Pillow would show its negative
    elif image.mode.startswith("I;16"):
        return 2 ** tags.get(258, (16,))[0] - 1
    elif image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, which Pillow opens so (PNG: until Pillow 10)
        return 65535
    elif image.mode == "I":
        reason = "32-bit or signed integers, of which no value is known to be white"
    else:
        import numpy as np

        low, high = np.min(image), np.max(image)  # nan where one is
        if 0 <= low and high <= 1:
            return 1
        finite = np.isfinite(low) and np.isfinite(high)
        reason = f"floats from {low:g} to {high:g}, not within 0 to 1" if finite else "floats that are not finite"
    raise ValueError(f"{reason}; save it as grey of 8 or 16 bits, or as floats within 0 to 1")


METHODS = ("dct", "bicubic", "lanczos", "nearest")  # all but the first are Pillow's


def resized(x, method, block):
    """A channel (H, W) uint8, uint16 or float32 of a large picture, numpy, by one of METHODS -> (2H, 2W)"""
    import numpy as np
    from PIL import Image

    if method == "dct":
        return enlarge(x, block)
    field = Image.fromarray(x if x.dtype == np.uint8 else x.astype(np.float32))  # Pillow resizes no 16 bits
    return np.array(field.resize((2 * field.width, 2 * field.height), Image.Resampling[method.upper()]))


def signature(method, block, content):
    """What the PNG files of the command say made them, and of which file's content."""
    block = f" --block {block}" * (block is not None)
    return f"dct.py upsample --method {method}{block}, CRC-32 {zlib.crc32(content):08x}"


def upsample_picture(name, read, output, method, block, quiet=False):
    """Write the picture in read(), bytes, twice as large as `output` -> a line about it. Raises ValueError where it
    cannot be read; ends the program where nothing can be written.
    """
    import numpy as np
    from PIL import Image, ImageOps, PngImagePlugin  # the command alone needs pictures
    from tqdm import tqdm

    try:
        content = read()
        with Image.open(io.BytesIO(content)) as opened:
            white, image, profile = white_level(opened), ImageOps.exif_transpose(opened), opened.info.get("icc_profile")
            if white == 255 and image.mode not in ("L", "LA", "RGB", "RGBA"):
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
            pixels, size = np.asarray(image), f"{image.width}x{image.height}"
    except Exception as error:  # decoders raise all kinds on bad bytes
        raise ValueError(f"cannot read the image {name}: {error}") from error
    if block is not None and not 1 <= block <= max(image.size):
        raise ValueError(f"--block {block} must lie in 1..{max(image.size)} for an image of {size}")
    if white > 255 or (white == 1 and Path(output).suffix.lower() not in (".tif", ".tiff")):  # which hold floats
        pixels, white = (pixels * (65535 / white)).round().astype(np.uint16), 65535
    note = {255: "", 65535: ", 16-bit grey", 1: ", floats"}[white]
    space = profile[16:20] if profile else None  # of the pixels that the profile describes
    if space and space != (b"RGB " if image.mode.startswith("RGB") else b"GRAY"):
        profile, note = None, f"{note}, without its colour profile, which is of {space.decode('latin-1').strip()}"

    large, channels = [], np.atleast_3d(pixels).transpose(2, 0, 1)
    for channel in tqdm(channels, "upsample", unit="channel", delay=2, leave=False, disable=quiet):
        channel = resized(channel, method, block)
        channel.clip(0, white, out=channel)
        large.append(channel if white == 1 else channel.round(out=channel).astype(pixels.dtype))
    large = Image.fromarray(np.dstack(large) if pixels.ndim == 3 else large[0])
    made_by = PngImagePlugin.PngInfo()
    made_by.add_text("Software", signature(method, block, content))
    try:
        unfinished = Path(output).with_name(f".{Path(output).name}")  # an interrupted command leaves no half a picture
        # of a PNG: more compression would take longer than the rest
        large.save(unfinished, icc_profile=profile, compress_level=1, pnginfo=made_by)
        unfinished.replace(output)
    except (OSError, ValueError, KeyError) as error:
        remedy = "name a file that ends in .png, in a folder that exists"
        sys.exit(f"dct.py: cannot write {output} ({error}); {remedy}")
    return f"{name} {size} -> {output} {large.width}x{large.height}{note}"


def upsample_folder(source, pictures, folder, method, block):
    """The pictures of `list_pictures`, twice as large, as PNG files of the same names. What the same command has made
    is skipped, what cannot be read named and left out.
    """
    from PIL import PngImagePlugin
    from tqdm import tqdm

    def made_alike(name):
        try:  # Image.open would refuse one so large
            with PngImagePlugin.PngImageFile(outputs[name]) as image:
                return image.info.get("Software") == signature(method, block, pictures[name]())
        except Exception:  # bad bytes raise all kinds
            return False

    outputs, unreadable = {name: folder / PurePosixPath(name).with_suffix(".png") for name in pictures}, 0
    if not pictures:
        sys.exit(f"dct.py: {source}: no image in it; name a picture, or a folder or .zip of pictures")
    if folder.is_file() or folder.resolve().is_relative_to(source.resolve()):
        sys.exit(f"dct.py: {folder}: is a file, or lies in {source}; name another folder")
    if len(set(outputs.values())) < len(outputs):
        sys.exit(f"dct.py: {source}: has images whose names differ in the ending alone; all would end in .png")
    todo = [name for name, output in outputs.items() if not output.exists()]
    others = [outputs[name] for name in outputs if name not in todo and not made_alike(name)]
    others += sorted(set(folder.rglob("*.png")) - set(outputs.values()) - set(folder.rglob(".*")))
    if others:
        sys.exit(f"dct.py: {others[0]}: not made of {source} by this command with these settings; name another folder")
    with tqdm(None, "upsample", len(outputs), initial=len(outputs) - len(todo), unit="img") as bar:
        for name in todo:
            outputs[name].parent.mkdir(parents=True, exist_ok=True)
            try:
                upsample_picture(name, pictures[name], outputs[name], method, block, quiet=True)
            except ValueError as error:
                unreadable += 1
                bar.write(one_line(f"skipped: {error}"), file=sys.stderr)
            bar.update()
    print(f"{len(outputs) - unreadable} images in {folder}" + f", {unreadable} skipped" * bool(unreadable))
    if unreadable == len(outputs):
        sys.exit(f"dct.py: {source}: none of its images could be read")


# ---- files of pictures ------------------------------------------------------------------------------------

LARGEST_FILE = 2**29  # bytes; a picture takes less, what some archives announce is more


def hush_pillow():
    """No warnings of Pillow about bad bytes: what cannot be read is named, in a line."""
    warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def one_line(text):
    """A message without the line breaks that names may hold, and the address by which Pillow calls bytes in memory."""
    return re.sub(r" <_io\.\w+ object at \w+>", "", " ".join(str(text).splitlines()))


def is_zip(path):
    """Whether a file is a .zip. Raises ValueError where it is the beginning of one."""
    if not os.path.isfile(path):  # opening a FIFO would wait for ever
        return False
    with open(path, "rb") as file:
        head = file.read(4)
    if (whole := zipfile.is_zipfile(path)) or head != b"PK\x03\x04":
        return whole
    raise ValueError("is a cut-off .zip, without the directory at its end; fetch or copy it again")


def read_file(path):
    """The bytes of a picture's file. Raises ValueError where it is none or too large, OSError where it is not read."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError("a link to nowhere" if os.path.islink(path) else "no regular file")
    check_bytes(os.path.getsize(path))
    return Path(path).read_bytes()


def check_bytes(size):
    """Raise ValueError where a file is larger than any picture's."""
    if size > LARGEST_FILE:
        raise ValueError(f"{size:,} bytes, more than {LARGEST_FILE:,}, which no picture takes")


class Files:
    """The files in a folder tree, links followed (linked twice, twice), or in a .zip. Attributes: kind ("folder" or
    "zip"), names (sorted). Raises ValueError where it is neither, or damaged, or leads back to itself.
    """

    def __init__(self, path):
        self.path, self._zips = Path(path), {}
        try:
            self.kind = "folder" if os.path.isdir(path) else "zip" if is_zip(path) else None
            self.names = sorted(self._walk() if self.kind == "folder" else self._members() if self.kind else ())
        except OSError as error:
            raise ValueError(f"{error.filename or path} cannot be read ({error.strerror})") from error
        if not self.kind:
            raise ValueError("is neither a folder nor a .zip" if os.path.exists(path) else "does not exist")

    def _walk(self):
        def stop(error):  # os.walk would leave the folder out
            raise error

        for root, folders, files in os.walk(self.path, onerror=stop, followlinks=True):
            # hidden ones hold no images; lost+found, at the top of a disk, is root's alone to list
            folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX")) and name != "lost+found"]
            yield from (Path(root, file).relative_to(self.path).as_posix() for file in files)
            for link in filter(Path.is_symlink, (Path(root, folder) for folder in folders)):
                around = [folder.resolve() for folder in link.parents if folder.is_relative_to(self.path)]
                if any(folder.is_relative_to(link.resolve()) for folder in around):
                    raise ValueError(f"{link} is a link to a folder that it lies in; remove it")

    def _members(self):  # of several with one name the last counts, as when they are extracted
        try:
            return {name for name in self._zip().namelist() if not name.endswith("/")}
        except Exception as error:  # zipfile raises all kinds on a damaged directory
            raise ValueError(f"is a damaged .zip ({error}); fetch it again, or make it anew") from error

    def _zip(self):  # one handle a process: they share no file position
        if os.getpid() not in self._zips:
            self._zips[os.getpid()] = zipfile.ZipFile(self.path)
        return self._zips[os.getpid()]

    def __getstate__(self):
        return self.__dict__ | {"_zips": {}}

    def read(self, name):
        """The bytes of one. Raises ValueError, OSError, and on bad bytes whatever zipfile does."""
        if self.kind == "folder":
            return read_file(self.path / name)
        check_bytes(self._zip().getinfo(name).file_size)
        return self._zip().read(name)


def list_pictures(source):
    """The pictures in a folder tree or .zip, without hidden ones -> {name: what reads its bytes}. Raises ValueError."""
    from PIL import Image

    files = Files(source)
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = {}
    for name in files.names:
        hidden = any(part.startswith((".", "/", "__MACOSX")) for part in PurePosixPath(name).parts)  # or out: .. or /
        if PurePosixPath(name).suffix.lower() in endings and not hidden:
            pictures[name] = functools.partial(files.read, name)
    return pictures


# ---- command line -----------------------------------------------------------------------------------------


def main(args):
    hush_pillow()
    source = Path(args.input)
    if args.block is not None and args.method != "dct":
        sys.exit(f"dct.py: --block {args.block}: means nothing with --method {args.method}; leave it out")
    try:
        pictures = list_pictures(source) if os.path.isdir(source) or is_zip(source) else None
    except ValueError as error:
        sys.exit(one_line(f"dct.py: {source}: {error}"))
    try:
        if pictures is not None:
            return upsample_folder(source, pictures, Path(args.output), args.method, args.block)
        read = functools.partial(read_file, source)
        print(upsample_picture(source, read, args.output, args.method, args.block))
    except (ValueError, OSError) as error:
        sys.exit(one_line(f"dct.py: {error}"))


def make_parser():
    parser = argparse.ArgumentParser(description="DCT tools (arXiv 2412.15032)")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("upsample", help="make an image, or those of a folder, twice as large")
    command.description = "Averaging 2 x 2 pixels of the result gives the image back, until rounded and clipped."
    several = "or a folder tree or .zip of such"
    command.add_argument("input", metavar="IN", help=f"any image, deep grey of 16 bits or floats in 0..1; {several}")
    files = "the file to write, its ending chooses the format; or the folder, of PNG files"
    command.add_argument("output", metavar="OUT", help=f"{files}; the same command goes on")
    command.add_argument("--method", choices=METHODS, default="dct", help="dct (default), or Pillow's to compare with")
    command.add_argument("--block", type=int, metavar="B", help="block size (default: the frame as one block)")
    parser.error = command.error = lambda message: parser.exit(
        2, one_line(f"dct.py: {message}; --help says more") + "\n"
    )
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C ends it without a traceback; the same command goes on
    main(make_parser().parse_args())
