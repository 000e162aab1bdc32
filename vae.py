"""The SD-VAE autoencoder (latent diffusion, arXiv 2112.10752), its discriminator, perceptual loss and measures.

Keys and outputs are those of the original release, so that published weights load with strict=True.

    vae = VAE(**PRESETS["f8d4"])                      # 83,653,863 parameters
    mean, logvar = vae.encode(images)                 # (N, 3, 256, 256) in [-1, 1] -> twice (N, 4, 32, 32)
    images = vae.decode(sample_posterior(mean, logvar))
"""

import re
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# f: pixels per latent pixel along a side, d: latent channels, with the widths of their release. VA-VAE, like E2E-VAVAE
# and IN-VAE, is f16d32 (or f16d16) with attention in the last level as well.
PRESETS = {
    "tiny": dict(widths=(32, 64, 64), latent_channels=4, num_res_blocks=1),  # f4, for CPUs
    "f4d4": dict(widths=(128, 256, 512), latent_channels=4),
    "f8d4": dict(widths=(128, 256, 512, 512), latent_channels=4),
    "f8d16": dict(widths=(128, 256, 512, 512), latent_channels=16),  # SD3's and FLUX's
    "f16d16": dict(widths=(128, 128, 256, 256, 512), latent_channels=16),
    "f16d32": dict(widths=(128, 128, 256, 256, 512), latent_channels=32),
    "vavae": dict(widths=(128, 128, 256, 256, 512), latent_channels=32, attention=(4,)),
    "f32d64": dict(widths=(128, 128, 256, 256, 512, 512), latent_channels=64),
}
GROUPS = 32
LOGVAR_RANGE = (-30.0, 20.0)


# ---- autoencoder ------------------------------------------------------------------------------------------


def norm(channels):
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))). (N, c_in, H, W) -> (N, c_out, H, W)"""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.nin_shortcut(x)


class Attention(nn.Module):
    """Self-attention over all positions, one head. (N, C, H, W) -> (N, C, H, W)"""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        # contiguous: what the fast kernels of attention take
        q, k, v = (layer(h).flatten(2).mT[:, None].contiguous() for layer in (self.q, self.k, self.v))  # (N, 1, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.unflatten(2, x.shape[-2:])  # (N, C, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Convolution of stride 2, padded by a row below and a column on the right. (N, C, H, W) -> (N, C, H/2, W/2)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution. (N, C, H, W) -> (N, C, 2H, 2W)"""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, where there is attention each followed by it, and the way to the next."""

    def __init__(self, c_in, c_out, blocks, attention, downsample=False, upsample=False):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out) for i in range(blocks))
        self.attn = nn.ModuleList(Attention(c_out) if attention else nn.Identity() for _ in range(blocks))
        self.downsample = Downsample(c_out) if downsample else nn.Identity()
        self.upsample = Upsample(c_out) if upsample else nn.Identity()

    def forward(self, x):
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return self.upsample(self.downsample(x))


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1 = ResBlock(channels, channels), Attention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (N, 3, H, W) -> (N, 2 latent_channels, H/f, W/f), f = 2^(levels - 1)"""

    def __init__(self, widths, latent_channels, num_res_blocks, attention):
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        channels = zip((widths[0], *widths), widths)  # into and out of every level
        blocks = num_res_blocks
        levels = (Level(*pair, blocks, i in attention, downsample=i < last) for i, pair in enumerate(channels))
        self.down = nn.ModuleList(levels)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents (N, latent_channels, h, w) -> images (N, 3, f h, f w); up[0] is the highest resolution."""

    def __init__(self, widths, latent_channels, num_res_blocks, attention):
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        channels = zip((*widths[1:], widths[-1]), widths)  # into and out of every level
        blocks = num_res_blocks + 1
        levels = (Level(*pair, blocks, i in attention, upsample=i > 0) for i, pair in enumerate(channels))
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """Variational autoencoder. Attributes: factor (pixels per latent pixel along a side), latent_channels.

    attention: the levels, 0 the highest resolution, with attention after every residual block. Raises ValueError for
    widths that are no multiples of 32 (the groups of its norms).
    """

    def __init__(self, widths=(128, 256, 512, 512), latent_channels=4, num_res_blocks=2, attention=()):
        super().__init__()
        if not widths or any(width % GROUPS or width < GROUPS for width in widths):
            raise ValueError(f"widths {tuple(widths)} must be multiples of {GROUPS}")
        self.factor, self.latent_channels = 2 ** (len(widths) - 1), latent_channels
        self.encoder = Encoder(widths, latent_channels, num_res_blocks, attention)
        self.decoder = Decoder(widths, latent_channels, num_res_blocks, attention)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, x):
        """Images (N, 3, H, W) in [-1, 1] -> mean and log variance of the posterior, each (N, C, H/f, W/f).
        Raises ValueError where f does not divide H and W.
        """
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(f"images of {x.shape[-2]}x{x.shape[-1]}: both sides must be multiples of {self.factor}")
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(*LOGVAR_RANGE)

    def decode(self, z):
        """Latents (N, C, h, w) -> images (N, 3, f h, f w), mostly in [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(z))


def sample_posterior(mean, logvar, noise=None):
    """mean + std * noise, all (N, C, h, w); noise is drawn where it is not given."""
    return mean + torch.exp(0.5 * logvar) * (torch.randn_like(mean) if noise is None else noise)


# ---- published weights ------------------------------------------------------------------------------------

DIFFUSERS = {  # names in diffusers' AutoencoderKL, of several releases -> the original ones
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "down_blocks.": "down.",
    ".resnets.": ".block.",
    ".attentions.": ".attn.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
    ".conv_norm_out.": ".norm_out.",
    ".group_norm.": ".norm.",
}
DIFFUSERS |= {f".to_{name}.": f".{name}." for name in "qkv"} | {".to_out.0.": ".proj_out."}
DIFFUSERS |= {f".{name}.": f".{name[0]}." for name in ("query", "key", "value")} | {".proj_attn.": ".proj_out."}


def read_published(state, config=None):
    """SD-VAE weights in the original layout or in diffusers', alone or within a checkpoint, and diffusers' config.json
    where there is one -> the arguments of `VAE`, and the state dict it loads. Quantising convolutions that the file
    lacks become identities. Raises ValueError, to follow the file's name, on another layout.
    """
    inner, first = state.get("state_dict"), "encoder.conv_in.weight"
    state = inner if isinstance(inner, dict) else state
    prefix = next((key.removesuffix(first) for key in state if key.endswith(first)), "")
    parts = tuple(f"{prefix}{part}" for part in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(parts)}
    if any(".mid_block." in key for key in state):
        state = from_diffusers(state)
    convolution = "encoder.down.{}.block.{}.conv1.weight"  # of a level and a block
    levels = max(1, sum(convolution.format(i, 0) in state for i in range(16)))
    blocks = sum(convolution.format(0, i) in state for i in range(16))
    try:
        widths = tuple(state[convolution.format(i, 0)].shape[0] for i in range(levels))
        entry = state["decoder.conv_in.weight"]
        channels = entry.shape[1]
    except (KeyError, IndexError) as error:
        layouts = "SD-VAE weights in the original layout or in diffusers'"
        raise ValueError(f"neither a checkpoint of train_vae.py nor {layouts} (no {error})") from error
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if f"{name}.weight" not in state:
            if config and config.get(f"use_{name}", True):
                raise ValueError(f"has no {name}, and its config.json does not set use_{name} to false")
            state[f"{name}.weight"] = torch.eye(width, dtype=entry.dtype)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(width, dtype=entry.dtype)
    for name, ours in {"norm_num_groups": GROUPS, "act_fn": "silu"}.items():
        if config and config.get(name, ours) != ours:
            raise ValueError(f"its config.json sets {name} to {config[name]}; it is {ours} here")
    attention = tuple(i for i in range(levels) if f"encoder.down.{i}.attn.0.norm.weight" in state)
    return dict(widths=widths, latent_channels=channels, num_res_blocks=blocks, attention=attention), state


def from_diffusers(state):
    """A state dict of diffusers' AutoencoderKL by its original names; its linear attention as 1x1 convolutions."""
    ups, renamed = len({key.split(".")[2] for key in state if key.startswith("decoder.up_blocks.")}), {}
    for key, value in state.items():
        for theirs, ours in DIFFUSERS.items():
            key = key.replace(theirs, ours)
        key = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{ups - 1 - int(match[1])}", key)
        renamed[key] = value[:, :, None, None] if ".attn" in key and value.ndim == 2 else value
    return renamed


def published_norm(config, channels):
    """How the config.json of a diffusers' AutoencoderKL of so many channels normalises latents, see `latent_norm`.
    Raises ValueError where its values are no such numbers.
    """
    scale, std = config.get("scaling_factor", 0.18215), config.get("latents_std")  # diffusers' default
    shift = config.get("shift_factor") or config.get("latents_mean") or 0.0
    try:
        scale = [scale / float(s) for s in std] if std else float(scale)
        shift = [float(s) for s in shift] if isinstance(shift, list) else float(shift)
        pair = torch.stack([torch.tensor(value).expand(channels) for value in (scale, shift)])
        if not pair.isfinite().all() or (pair[0] <= 0).any():
            raise ValueError("they must be finite, the scales positive")
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        names = "scaling_factor, shift_factor, latents_mean or latents_std"
        raise ValueError(f"{names} in its config.json do not fit {channels} channels ({error})") from error
    return {"latent_norm": "published", "scale": scale, "shift": shift}


# ---- discriminator ----------------------------------------------------------------------------------------

ADAPTIVE_LIMIT = 1e4


class PatchGAN(nn.Module):
    """Patch discriminator (arXiv 1611.07004): a logit per overlapping patch. (N, 3, H, W) -> (N, 1, ~H/8, ~W/8)

    GroupNorm stands where the paper has BatchNorm: no image's logits depend on the others', so that batches can be cut
    into parts and over processes. Images must be at least `least_size` pixels wide.
    """

    def __init__(self, width=64, depth=3):
        super().__init__()
        layers, c_in = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)], width
        for i in range(1, depth + 1):
            c_out = width * min(2**i, 8)
            layers.append(nn.Conv2d(c_in, c_out, 4, 2 if i < depth else 1, 1, bias=False))
            layers += [nn.GroupNorm(GROUPS, c_out), nn.LeakyReLU(0.2)]
            c_in = c_out
        self.main = nn.Sequential(*layers, nn.Conv2d(c_in, 1, 4, 1, 1))
        self.least_size = 3 * 2**depth
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x):
        return self.main(x).float()  # whatever autocast made of it


def hinge_loss(real, fake):
    """The discriminator's loss on logits of any shape (arXiv 1705.02894) -> scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def adaptive_weight(reconstruction, other, parameter, reduce=lambda gradient: gradient):
    """|grad of the reconstruction loss| / |grad of another loss| at one parameter, at most 1e4 (VQGAN, arXiv
    2012.09841, equation 7). `reduce` averages a gradient over processes.
    """
    up = 2.0**10  # leaves their ratio alone and keeps fp16 gradients from vanishing
    gradients = (torch.autograd.grad(loss * up, parameter, retain_graph=True)[0] for loss in (reconstruction, other))
    first, second = (reduce(gradient).norm() / up for gradient in gradients)
    return (first / (second + 1e-4)).clamp(0, ADAPTIVE_LIMIT).detach()


# ---- LPIPS ------------------------------------------------------------------------------------------------


def load_lpips(vgg=None, heads=None):
    """LPIPS (arXiv 1801.03924, VGG) of torch-fidelity -> a module: two batches (N, 3, H, W) in [-1, 1] -> (N,).

    vgg, heads: files of torchvision's vgg16 weights and of the LPIPS heads; where None, those in torch.hub's folder,
    downloaded if absent. Raises ValueError, naming file or address, where one is missing or is another network's.
    """
    from torch_fidelity.sample_similarity_lpips import URL_VGG16_LPIPS, SampleSimilarityLPIPS
    from torchvision.models import VGG16_Weights

    vgg_url, hub = VGG16_Weights.IMAGENET1K_V1.url, torch.hub.get_dir()
    vgg = weights_file("VGG-16", vgg, vgg_url, "features.0.weight")
    heads = weights_file("LPIPS heads", heads, URL_VGG16_LPIPS, "lin0.model.1.weight")
    # torch-fidelity takes no paths but looks into torch.hub's folder: give it one that links to the two files.
    with tempfile.TemporaryDirectory() as linked:
        (Path(linked) / "checkpoints").mkdir()
        for file, url in ((vgg, vgg_url), (heads, URL_VGG16_LPIPS)):
            (Path(linked) / "checkpoints" / Path(url).name).symlink_to(file.resolve())
        torch.hub.set_dir(linked)
        try:
            network = SampleSimilarityLPIPS("lpips-vgg16")
        except Exception as error:  # load_state_dict's
            raise ValueError(f"LPIPS weights {vgg}, {heads}: {str(error)[:200]}") from error
        finally:
            torch.hub.set_dir(hub)
    return LPIPS(network)


def weights_file(name, file, url, key):
    """`file`, if None that in torch.hub's folder, downloaded if absent. Raises ValueError where it lacks `key`."""
    folder, given = Path(torch.hub.get_dir()) / "checkpoints", file is not None
    file = Path(file or folder / Path(url).name)
    try:
        if not file.exists() and not given:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file))
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # urllib's, torch.load's
        where = "" if given else f", from {url} to {folder}"
        raise ValueError(f"{name} weights {file}: cannot be loaded{where} ({str(error)[:120]})") from error
    if key not in state:
        raise ValueError(f"{name} weights {file}: no {key} in it; it holds {', '.join(list(state)[:2])}, ...")
    return file


class LPIPS(nn.Module):
    """torch-fidelity's network, which takes 0..255, for images in [-1, 1]."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, x, y):
        with torch.autocast(x.device.type, enabled=False):
            return self.network((x.float() + 1) * 127.5, (y.float() + 1) * 127.5).flatten()


# ---- measures ---------------------------------------------------------------------------------------------

SSIM_WINDOW = 11  # pixels


def psnr(x, y):
    """dB at a peak of 255, of images (N, 3, H, W) on 0..255 -> (N,)"""
    return 10 * torch.log10(255**2 / (x.float() - y.float()).square().flatten(1).mean(1).clamp_min(1e-10))


def ssim(x, y, window=SSIM_WINDOW, sigma=1.5):
    """Structural similarity (Wang et al., 2004) of images (N, C, H, W) on 0..255 -> (N,), windows within the image."""
    x, y = x.double(), y.double()  # variances are differences of large numbers
    g = torch.exp(-(torch.arange(window, device=x.device) - window // 2).double().square() / (2 * sigma**2))
    g = (g / g.sum()).expand(x.shape[1], 1, 1, window)

    def mean(v):
        return F.conv2d(F.conv2d(v, g, groups=v.shape[1]), g.mT, groups=v.shape[1])

    mx, my, c1, c2 = mean(x), mean(y), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    vx, vy, cov = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.flatten(1).mean(1)


class LatentStatistics:
    """Means, standard deviations and principal components of sampled latents, exactly, from a stream of posteriors."""

    def __init__(self):
        self.total = self.products = self.count = 0

    def add(self, mean, logvar):
        """mean, logvar (N, C, h, w)"""
        flat = mean.double().movedim(1, 0).flatten(1)  # (C, N h w)
        variance = logvar.double().exp().sum((0, 2, 3))
        self.total = self.total + flat.sum(1).cpu()
        self.products = self.products + (flat @ flat.mT + variance.diag()).cpu()
        self.count += flat.shape[1]

    def result(self):
        """-> {"mean" and "channel_std" per channel, "std" over all, "scale" = 1 / std, "eigenspectrum": shares of the
        variance by principal component of the channels, the largest first}
        """
        mean = self.total / self.count
        covariance = self.products / self.count - mean[:, None] * mean
        std = ((covariance.trace() / len(mean)) + mean.var(correction=0)).sqrt().item()
        principal = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
        result = {"mean": mean.tolist(), "std": std, "scale": 1 / std, "channel_std": covariance.diag().sqrt().tolist()}
        return result | {"eigenspectrum": (principal / principal.sum()).tolist()}


def latent_norm(statistics, kind):
    """How latents of these statistics, a result of `LatentStatistics`, are normalised, (z - shift) scale: "one" scale
    makes their std 1, or each "channel" gets mean 0 and std 1 (LightningDiT, arXiv 2501.01423) -> {"latent_norm": kind,
    "scale" and "shift": a number or a list by channel}
    """
    if kind == "one":
        return {"latent_norm": kind, "scale": statistics["scale"], "shift": 0.0}
    scale = [1 / std for std in statistics["channel_std"]]
    return {"latent_norm": kind, "scale": scale, "shift": statistics["mean"]}
