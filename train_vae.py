"""Stage 1: train an autoencoder whose latents are easy to diffuse (Spectrum
Matching, arXiv 2603.14645), look at its spectrum, and encode images with it.

    python train_vae.py                              # built-in images, minutes
    python train_vae.py --data photos/ --size 64 --regularizer esm
    torchrun --nproc_per_node=8 train_vae.py --data photos.zip --preset f8d4
    python train_vae.py --eval-only --ckpt runs/mine --data more/
    python train_vae.py --spectrum runs/kl runs/esm --data photos/
    python train_vae.py --encode photos/ --ckpt runs/mine --out photos.latents

The same command again resumes. The method comes first: views, losses; then
measures, training, and what all programs share: images, records, running.
"""

import argparse
import atexit
import contextlib
import copy
import dataclasses
import datetime
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import reprlib
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from PIL import Image, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dct import Files, hush_pillow, one_line, white_level
from repa import ISC_SPLITS, KID_SUBSETS, PATCH_ENCODER_SIZE, as_map, frechet_distance, load_encoder
from spectral_losses import BINS, DSM_BLOCK, DSM_KEEP_ALL, DSM_LEVELS, block_that_fits, blurs, compare_with_target
from spectral_losses import downscale, esm_loss, kl_loss, low_pass, patch_artefacts, power_law_exponent, psd
from spectral_losses import resize_to_latent, rmsc, scale_and_rotate, vf_loss
from vae import PRESETS, SSIM_WINDOW, VAE, LatentStatistics, PatchGAN, adaptive_weight, hinge_loss, latent_norm
from vae import load_lpips, psnr, published_norm, read_published, sample_posterior, ssim

# ---- method: what the decoder is shown --------------------------------------------------------------------

REGULARIZERS = ("kl", "esm", "dsm", "eq", "se", "vf", "none")
EQ_TRANSFORMED, EQ_SMALL = 0.5, 0.125  # shares of EQ-VAE's steps; the rest are plain [code]
LEAST_SIDE = 16  # pixels, of what eq and se show the losses: LPIPS halves an image four times


@dataclasses.dataclass(frozen=True)
class View:
    """A change of latents and images alike: the decoder has to make the changed image of the changed latents."""

    kind: str = "plain"  # dsm: low-passed, eq: scaled and turned, se: halved or quartered
    k: int = 0  # of dsm's mask, see `low_pass`
    block: int = DSM_BLOCK
    side: int = 0  # of the latent after eq
    turns: int = 0  # by 90 degrees, of eq
    factor: int = 1  # of se
    weight: float = 1.0  # in the loss

    def apply(self, x, scale=1):
        """Latents (scale 1), or images (scale: pixels per latent pixel) (N, C, H, W) -> (N, C, H', W')"""
        if self.kind == "dsm":
            return low_pass(x, self.k, self.block)
        if self.kind == "eq":
            return scale_and_rotate(x, (self.side * scale, self.side * scale), self.turns)
        return downscale(x, self.factor) if self.kind == "se" else x


def draw_views(terms, se_weight, seed, step, latent, factor):
    """The views of a step, the same in all processes -> (side of the input, pixels, [View, ...]); latent: its side."""
    g = generator(seed, step, VIEWS)

    def draw(n):  # 0..n-1
        return int(torch.randint(n, (), generator=g))

    side, views = latent * factor, [View()]
    if "dsm" in terms:  # section 3.3: the low-passed latent decodes to the low-passed image
        k = (DSM_KEEP_ALL, *DSM_LEVELS)[draw(1 + len(DSM_LEVELS))]
        views = [View("dsm", k=k, block=block_that_fits(latent, latent))] if k else views
    if "eq" in terms:  # the scaled and turned latent decodes to the image scaled and turned alike
        which, least = torch.rand((), generator=g).item(), least_latent(latent, factor)
        small, turns = least + draw(latent - least), 1 + draw(3)
        if which < EQ_TRANSFORMED:
            views = [View("eq", side=small, turns=turns)]
        elif which < EQ_TRANSFORMED + EQ_SMALL:
            side = small * factor
    if "se" in terms:  # the halved or quartered latent decodes to the image halved or quartered
        scales = [s for s in (2, 4) if latent % s == 0 and side // s >= LEAST_SIDE]
        views.append(View("se", factor=scales[draw(len(scales))], weight=se_weight))
    return side, views


def least_latent(latent, factor):
    """The smallest side EQ-VAE scales a latent to: a quarter, unless the losses cannot see so small an image."""
    return max(latent // 4, math.ceil(LEAST_SIDE / factor))


# ---- method: losses ---------------------------------------------------------------------------------------


class OnePass(nn.Module):
    """Encode, sample, decode every view: one forward call, as DistributedDataParallel wants it."""

    def __init__(self, vae, feature_width=None):
        super().__init__()
        self.vae, self.encode, self.decode = vae, vae.encode, vae.decode
        # vf: onto the features of its encoder
        self.project = nn.Conv2d(vae.latent_channels, feature_width, 1, bias=False) if feature_width else None

    def forward(self, x, noise, views):
        """x (N, 3, H, W), noise (N, C, h, w) -> mean, logvar, latents (N, C, h, w), [images], projected latents."""
        mean, logvar = self.encode(x)
        latents = sample_posterior(mean.float(), logvar.float(), noise)
        outputs = [self.decode(view.apply(latents)).float() for view in views]
        return mean, logvar, latents, outputs, self.project(latents) if self.project else None


class Objective:
    """All terms of the loss, with their weights and the networks they take. Terms go to log(name, value)."""

    def __init__(self, one_pass, terms, weights, esm_delta, esm_blur, l2, lpips, encoder, critic, processes):
        self.one_pass, self.vae, self.terms, self.weights = one_pass, one_pass.vae, terms, weights
        self.esm_delta, self.esm_blur, self.pixel_error = esm_delta, esm_blur, F.mse_loss if l2 else F.l1_loss
        self.lpips, self.encoder, self.critic, self.processes = lpips, encoder, critic, processes
        self.model, self.wrapped_critic = one_pass, critic

    def wrap(self, compiling):
        """For several processes, and compiled."""
        if compiling:
            import torch._functorch.config

            torch._functorch.config.donated_buffer = False  # adaptive weights go back through a part of the graph twice
            self.one_pass.encode = torch.compile(self.vae.encode, dynamic=False)  # se's views have three sizes
            self.one_pass.decode = torch.compile(self.vae.decode, dynamic=False)
        self.model = self.processes.wrap(self.one_pass)
        self.wrapped_critic = self.critic and self.processes.wrap(self.critic)

    def reconstruction(self, output, image, log, prefix):
        error = self.pixel_error(output, image)
        log(prefix or "reconstruction", error)
        if self.lpips:
            perceptual = self.lpips(image, output).mean()
            log(f"{prefix}_lpips" if prefix else "lpips", perceptual)
            error = error + self.weights["lpips"] * perceptual
        return error

    def regularizers(self, images, mean, logvar, latents):
        """The terms on latents themselves -> {name: value}"""
        values = {"kl": kl_loss(mean, logvar)} if "kl" in self.terms else {}
        if "esm" in self.terms:
            values["esm"] = esm_loss(images, latents, self.esm_delta, blur=self.esm_blur)
        return values

    def autoencoder(self, images, noise, views, log, gan=False):
        """The autoencoder's loss of images (n, 3, S, S), noise (n, C, h, w) -> scalar. The GAN sees the first view."""
        mean, logvar, latents, outputs, projected = self.model(images, noise, views)
        reconstruction, balanced = 0, {}  # name: (value, the parameter at which its gradient is balanced)
        for view, output in zip(views, outputs):
            prefix = "se" if view.kind == "se" else ""
            error = self.reconstruction(output, view.apply(images, self.vae.factor), log, prefix)
            reconstruction = reconstruction + view.weight * error
        total = reconstruction
        for name, value in self.regularizers(images, mean, logvar, latents).items():
            log(name, value)
            total = total + self.weights[name] * value
        if "vf" in self.terms:
            with torch.no_grad():
                features = as_map(self.encoder(images)[0].float())  # (n, D, g, g)
            balanced["vf"] = vf_loss(projected, features), self.vae.encoder.conv_out.weight
        if gan:
            balanced["gan"] = -self.critic(outputs[0]).mean(), self.vae.decoder.conv_out.weight
        for name, (value, parameter) in balanced.items():
            balance = adaptive_weight(reconstruction, value, parameter, self.processes.mean)
            log(name, value)
            log(f"{name}_balance", balance)
            total = total + self.weights[name] * balance * value
        log("loss", total)
        return total

    def discriminator(self, images, noise, views, log):
        """Hinge loss of real against reconstructed images, both as the first view shows them -> scalar"""
        with torch.no_grad():
            outputs = self.one_pass(images, noise, views[:1])[3]
        real, fake = self.wrapped_critic(torch.cat((views[0].apply(images, self.vae.factor), outputs[0]))).chunk(2)
        loss = hinge_loss(real, fake)
        for name, value in {"logits_real": real.mean(), "logits_fake": fake.mean(), "discriminator": loss}.items():
            log(name, value)
        return loss


def turn(step, gan_start):
    """From the start of the GAN on (None: never), autoencoder and discriminator alternate [code] -> (whether a step is
    the discriminator's, how many steps its optimizer has taken before).
    """
    if gan_start is None or step < gan_start:
        return False, step
    pairs, second = divmod(step - gan_start, 2)
    return bool(second), pairs if second else pairs + gan_start


# ---- measuring --------------------------------------------------------------------------------------------

EVAL_IMAGES = 1000  # looked at by an evaluation during training
SCALE_IMAGES, SCALE_LIMIT = 256, 50_000  # images whose latents give the scale: of a checkpoint, of encoded latents
MATCHED = 0.05  # largest difference of a matched latent from the target in the upper half of the bands, at unit std
PER_ROW = 8  # pictures in a row


def some_images(images, count, batch, workers, name="evaluate"):
    """Batches of `count` images spread over a data set, (n, 3, S, S) uint8, without unreadable ones, at most 1%."""
    chosen, unreadable = spread(range(len(images)), count).tolist(), 0
    apart = max(1, len(chosen) // PER_ROW)  # the first batch, which is drawn, comes from all over the set
    chosen = [i for start in range(apart) for i in chosen[start::apart]]
    for _, pixels, good in images.batches(chosen, batch, workers, name):
        unreadable += int((~good).sum())
        images.check_unreadable(unreadable)
        if good.any():
            yield pixels[good]


@torch.no_grad()
def measure(vae, batches, device, seed=0, lpips=None, features=None, delta=1.0, error=F.l1_loss, low_passed=False):
    """Everything that is reported of an autoencoder -> (dict of plain values, rows of pictures).

    Reconstructions are of the posterior's mean, spectra of its samples (as the losses see them), judged against the
    image's times f^delta; pixel_error is the mean `error`; low_passed asks for rFIDs of low-passed images as well.
    """
    values, noise, latents, rows, spectra, scored = {}, generator(seed, 4), LatentStatistics(), [], ([], []), {}

    def add(name, value):  # (n, ...)
        values.setdefault(name, []).append(value.double().cpu())

    def compare(name, *pairs):  # uint8 (n, 3, S, S): originals, reconstructions
        if features:
            scored.setdefault(name, []).append([features(images) for images in pairs])

    for pixels in batches:
        pixels = pixels.to(device)
        x = pixels / 127.5 - 1
        mean, logvar = vae.encode(x)
        latents.add(mean, logvar)
        made = vae.decode(mean).clamp(-1, 1)
        add("psnr", psnr(pixels, to_uint8(made)))
        add("ssim", ssim(pixels, to_uint8(made)))
        add("pixel_error", error(made, x, reduction="none").flatten(1).mean(1))
        if lpips:
            add("lpips", lpips(x, made))
        compare("rfid", pixels, to_uint8(made))
        z = sample_posterior(mean, logvar, torch.randn(mean.shape, generator=noise).to(device))
        small = resize_to_latent(x, z.shape[-2:])
        for name, field, spectrum in zip(("image", "latent"), (small, z), spectra):
            spectrum.append(psd(field).double().cpu())
            add(f"{name}_alpha", power_law_exponent(field).expand(len(x)))
            add(f"{name}_rmsc", rmsc(field))
        add("target_alpha", power_law_exponent(small, delta=delta).expand(len(x)))
        factor = x.shape[-1] // z.shape[-1]
        for name, field in (("image", x), ("made", made)) if 1 < factor <= x.shape[-1] // 3 else ():
            add(f"{name}_artefacts", patch_artefacts(field, factor).expand(len(x)))
        pictures = [x[:PER_ROW], made[:PER_ROW]]
        block = block_that_fits(*z.shape[-2:])
        for k in DSM_LEVELS if block else ():
            target, output = low_pass(x, k, block).clamp(-1, 1), vae.decode(low_pass(mean, k, block)).clamp(-1, 1)
            add(f"lowpass_psnr_{k}", psnr(to_uint8(target), to_uint8(output)))
            if low_passed:
                compare(f"lowpass_rfid_{k}", to_uint8(target), to_uint8(output))
            pictures += [target[:PER_ROW], output[:PER_ROW]]
        rows = rows or [picture.cpu() for picture in pictures]
    result = {name: torch.cat(value).mean(0).tolist() for name, value in values.items()}
    result |= compare_with_target(*map(torch.cat, spectra), *z.shape[-2:], delta)
    result |= {name: frechet_distance(*map(torch.cat, zip(*parts))) for name, parts in scored.items()}
    result |= {f"latent_{key}": value for key, value in latents.result().items()}
    shares = torch.tensor(result["latent_eigenspectrum"])
    result["latent_effective_channels"] = torch.special.entr(shares).sum().exp().item()  # exp of their entropy
    return result | {"images": len(torch.cat(values["psnr"])), "latent_side": z.shape[-1], "size": x.shape[-1]}, rows


def target_delta(settings):
    """The target's delta, by a run's flags (None: published weights): its own where it has ESM, else the paper's 1."""
    return settings.get("esm_delta", 1.0) if settings and "esm" in settings.get("regularizer", "").split("+") else 1.0


def verdict(result):
    gap, raw = (result[scale]["upper_share"] for scale in ("unit_std", "raw"))
    word = "matched" if abs(gap) <= MATCHED else "too noisy" if gap > 0 else "too smooth"
    upper = f"{gap:+.3f} of log power in the upper half of the bands, against the target; raw {raw:+.3f}"
    alphas = f"alpha {result['latent_alpha']:.2f}, the target's {result['target_alpha']:.2f}"
    return f"{word} at unit std ({upper}); {alphas}"


def headline(result):
    """The first figures of a result of `measure`."""
    figures = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}", "rfid": "rFID {:.4f}", "lpips": "LPIPS {:.4f}"}
    return ", ".join(text.format(result[name]) for name, text in figures.items() if name in result)


def report(name, result):
    """Print a result of `measure`."""
    print(f"{result['images']} images: {headline(result)}")
    means = " ".join(f"{mean:.3f}" for mean in result["latent_mean"][:8])
    print(f"latents: mean by channel {means}, std {result['latent_std']:.4f}, scale {result['latent_scale']:.4f}")
    spectrum_table({name: result})
    print(f"latents {verdict(result)}")


def spectrum_rows(result):
    """A result of `measure` as rows of title, format, in some rows the image's and the target's figure, the latents'.
    Results of a group (see `grouped`) have the same rows.
    """
    unit, raw, names = result["unit_std"], result["raw"], ("image", "target", "latent")
    rows = list(zip(result["bands"], [".4f"] * BINS, *(unit[f"{name}_shares"] for name in names)))
    sums = (("KL of mean spectra", ".4f", "kl_of_mean_spectra"), ("upper half", "+.3f", "upper_share"))
    for title, form, key in (*sums, ("mean of KLs per image", ".4f", "mean_of_kls_per_image")):
        rows += [(title, form, unit[key]), ("  raw", form, raw[key])]
    rows.append(("alpha", ".2f", *(result[f"{name}_alpha"] for name in names)))
    rows.append(("std about own mean", ".3f", *(result["spatial_std"][name] for name in names)))
    rows.append(("std", ".3f", result["latent_std"]))
    largest = [*result["latent_eigenspectrum"], 0, 0, 0][:4]
    rows += [(f"component {i}", ".3f", share) for i, share in enumerate(largest, 1)]
    rows.append(("effective channels", ".2f", result["latent_effective_channels"]))
    rows.append(("RMSC", ".3f", result["image_rmsc"], result["latent_rmsc"]))
    titles = {"psnr": ("PSNR, dB", ".2f"), "ssim": ("SSIM", ".4f")}
    titles |= {f"lowpass_psnr_{k}": (f"low-pass {k}", ".2f") for k in DSM_LEVELS} | {"rfid": ("rFID", ".4f")}
    titles |= {f"lowpass_rfid_{k}": (f"low-pass {k} rFID", ".4f") for k in DSM_LEVELS}
    rows += [(*title, result[name]) for name, title in titles.items() if name in result]
    if "made_artefacts" in result:
        rows.append(("patch artefacts", ".3f", result["image_artefacts"], result["made_artefacts"]))
    return rows


def spectrum_table(results):
    """Print results with one target: shares of log power by band at unit std, and sums."""
    width, first = max(8, *(len(name) + 2 for name in results)), next(iter(results.values()))
    side = first["latent_side"]
    of = f"{side} x {side} latents, {first['size']} px, at unit std"
    print(f"share of log power per band of {of}; target = {target_name(first)}")
    print(f"{'band':<22}{'image':>8}{'target':>8}" + "".join(name.rjust(width) for name in results))
    for rows in zip(*map(spectrum_rows, results.values())):
        title, form, *others, _ = rows[0]
        cells = "".join(format(other, form).rjust(8) for other in others).ljust(16)
        print(f"{title:<22}{cells}" + "".join(format(row[-1], form).rjust(width) for row in rows))


def target_name(result):
    return "image x f" + (f"^{result['delta']:g}" if result["delta"] != 1 else "")


def grouped(results):
    """Results of autoencoders with the same target: one size of images, one of latents, one delta."""
    groups = {}
    for name, result in results.items():
        groups.setdefault((result["size"], result["latent_side"], result["delta"]), {})[name] = result
    return [groups[kind] for kind in sorted(groups)]


def draw_spectra(results, file):
    """Shares of power by band, at unit std and raw (as the paper's figure), on a log scale. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, scale, title in zip(panels, ("unit_std", "raw"), ("at unit std", "raw, as ESM and the paper have them")):
        for group in grouped(results):
            first = next(iter(group.values()))
            at = f", {first['latent_side']} x {first['latent_side']}"
            axes.plot(first["bands"], first[scale]["image_shares"], "k:", label="image" + at)
            axes.plot(first["bands"], first[scale]["target_shares"], "k--", label=f"target: {target_name(first)}{at}")
        for name, result in results.items():
            label = f"{name}, KL of mean spectra {result[scale]['kl_of_mean_spectra']:.4f}"
            axes.plot(result["bands"], result[scale]["latent_shares"], marker=".", label=label)
        axes.set(title=title, xlabel="radial frequency band", yscale="log", xticks=range(1, BINS + 1))
        axes.legend(frameon=False, fontsize=8)
    panels[0].set(ylabel="share of log power")
    write_atomically(file, partial(figure.savefig, format="png", dpi=120), sync=False)
    plt.close(figure)


def save_pictures(rows, stem):
    """STEM.png: originals above reconstructions; STEM-lowpass.png: the same of low-passed images and latents, by k."""
    sheets = {f"{stem}.png": rows[:2], f"{stem}-lowpass.png": rows[2:]}
    return [save_grid(torch.cat(pictures), file, len(rows[0])) for file, pictures in sheets.items() if pictures]


# ---- training ---------------------------------------------------------------------------------------------

# What a flag is when it is not given: the CPU preset's recipe [ours], and the published one (arXiv 2603.14645) [code],
# batch and steps being those of CelebA-HQ; ImageNet's are 128 and 600,000, with dsm a million.
TINY = dict(size=64, steps=400, batch=16, lr=1e-3, lr_decay="linear", warmup=50, betas=[0.9, 0.99], weight_decay=0.005)
TINY |= dict(clip=1.0, ema=0.0, lpips_weight=0.0, gan_weight=0.0, features="none")
PUBLISHED = dict(size=256, steps=500_000, batch=48, lr=5e-5, lr_decay="none", warmup=2000, betas=[0.9, 0.999])
PUBLISHED |= dict(weight_decay=0.005, clip=1.0, ema=0.0, lpips_weight=0.5, gan_weight=0.5, features="inception")


def parse_regularizer(text):
    """'esm+dsm' -> {"esm", "dsm"}. Raises InputError."""
    names = text.split("+")
    unknown = [name for name in names if name not in REGULARIZERS]
    if unknown or len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise InputError(f"--regularizer {text}: takes {', '.join(REGULARIZERS)}, or a sum of them such as esm+dsm")
    if "eq" in names and {"dsm", "se"} & set(names):
        raise InputError(f"--regularizer {text}: eq changes what the decoder sees, as dsm and se do; choose one")
    return set(names) - {"none"}


def check_size(size, preset, terms, gan_weight):
    """The side of the latents. Raises InputError where the losses cannot be taken at this size."""
    factor = 2 ** (len(PRESETS[preset]["widths"]) - 1)
    flags = f"--regularizer {'+'.join(sorted(terms))} at --size {size}"
    if size % factor:
        raise InputError(f"--size {size}: --preset {preset} takes multiples of {factor}")
    latent = size // factor
    if "dsm" in terms and not block_that_fits(latent, latent):
        fits = f"divide the latent, which is {latent}x{latent} here, and are at most half as wide"
        raise InputError(f"{flags}: DSM's blocks of 8, 4 or 2 {fits}; --size {16 * factor} does")
    if "eq" in terms and latent <= least_latent(latent, factor):
        raise InputError(f"{flags}: nothing smaller to scale to; --size 64 does")
    if "se" in terms and (latent % 2 or size < 2 * LEAST_SIDE):
        raise InputError(f"{flags}: a latent of {latent} cannot be halved; --size 64 does")
    smallest, least = least_latent(latent, factor) * factor if "eq" in terms else size, PatchGAN().least_size
    if gan_weight and smallest < least:
        seen = f"the discriminator would see {smallest} pixels and needs {least}"
        raise InputError(f"--gan-weight {gan_weight:g}: {seen}; a larger --size, or --gan-weight 0")
    return latent


def optional(what, load, named, hint, processes):
    """load(), or None, in one line, where load is or weights are missing. Raises InputError where they were `named`."""
    reason = ""
    try:
        if load:
            return load()
    except (InputError, ValueError) as error:
        if named:
            raise InputError(f"{named}: {error}" if type(error) is ValueError else str(error)) from error
        reason = ": " + " ".join(str(error).split())[:450]
    processes.print(f"{what} is off{reason}; {hint} turns it on")


def open_lpips(weight, vgg, heads, processes):
    """LPIPS, or None, in all processes alike."""
    hint = "--lpips-weight 0.5, with --lpips-vgg FILE --lpips-heads FILE where nothing can be downloaded,"
    named = (vgg or heads) and "--lpips-vgg, --lpips-heads"

    def load():
        lpips = load_lpips(*(file and check_records(file) for file in (vgg, heads)))
        check_finite(lpips.state_dict(), named or "LPIPS")
        return lpips

    lpips = processes.local_first(lambda: optional("LPIPS", weight and load, named, hint, processes))
    return lpips.to(processes.device) if processes.all(lpips) else None


def open_rfid(spec, weights, size, processes):
    """The features of rFID on process 0, or None."""
    hint = "--features inception --features-weights FILE, or --features REPO:ENTRY,"
    load = spec != "none" and partial(Features, spec, weights, size, processes.device)
    named = (weights or spec != "inception") and "rFID"
    return optional("rFID", load, named, hint, processes) if processes.main else None


def layout(device):
    """The memory format of convolutions: on a CPU, channels_last took 1.3 times as long."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def vae_flops(one_pass, size, device):
    """Forward and backward FLOPs of one image through the autoencoder, its losses' networks left out."""
    x, side = torch.zeros(1, 3, size, size, device=device), size // one_pass.vae.factor
    noise = torch.zeros(1, one_pass.vae.latent_channels, side, side, device=device)
    flops = count_flops(lambda: one_pass(x, noise, [View()])[3][0].sum())
    one_pass.zero_grad(set_to_none=True)
    return flops


def make_objective(args, processes, checkpoint):
    """The networks of a run and the loss that trains them; the same weights in every process. Raises InputError."""
    terms, device = parse_regularizer(args.regularizer), processes.device
    torch.manual_seed(args.seed)
    encoder, width = None, None
    if "vf" in terms:
        if not args.encoder:
            dino = "facebookresearch/dinov2:dinov2_vitb14"
            raise InputError(f"--regularizer vf: needs --encoder REPO:ENTRY, such as {dino}")
        encoder, tokens = open_encoder(args.encoder, args.size, processes)
        width = tokens.shape[2]
    one_pass = OnePass(VAE(**PRESETS[args.preset]), width).to(device, memory_format=layout(device))
    critic = PatchGAN().to(device, memory_format=layout(device)) if args.gan_weight else None
    lpips = open_lpips(args.lpips_weight, args.lpips_vgg, args.lpips_heads, processes)
    if checkpoint and not checkpoint.get("lpips"):
        lpips = None  # a run goes on as it began
    if checkpoint and checkpoint.get("lpips") and not lpips:
        raise InputError(f"{args.out} was begun with LPIPS; name its weights by --lpips-vgg FILE --lpips-heads FILE")
    weights = {name.removesuffix("_weight"): value for name, value in vars(args).items() if name.endswith("_weight")}
    esm, l2 = (args.esm_delta, args.esm_blur), args.reconstruction == "l2"
    return Objective(one_pass, terms, weights, *esm, l2, lpips, encoder, critic, processes)


def describe(objective, gan_start):
    """The losses of a run in one line."""
    weights, words = objective.weights, ["L2" if objective.pixel_error is F.mse_loss else "L1"]
    words += [f"{weights['lpips']:g} LPIPS"] * bool(objective.lpips)
    words += [f"{weights['gan']:g} adaptive GAN from step {gan_start + 1}"] * bool(objective.critic)
    words += [f"{weights[name]:g} {name}" if name in weights else name for name in sorted(objective.terms)]
    blur = f", image {'' if objective.esm_blur else 'not '}blurred" if "esm" in objective.terms else ""
    return " + ".join(words) + blur


@torch.no_grad()
def latent_statistics(vae, pixels, device):
    """Mean, std and scale of the latents of some images."""
    statistics = LatentStatistics()
    for part in torch.from_numpy(spread(pixels.indices, SCALE_IMAGES)).split(8):
        statistics.add(*vae.encode(pixels.read(part.numpy()).to(device) / 127.5 - 1))
    return statistics.result()


def train(args):
    # ---- set-up
    processes, terms = Processes(args.device), parse_regularizer(args.regularizer)
    latent = check_size(args.size, args.preset, terms, args.gan_weight)
    device, write, gan = processes.device, processes.print, args.gan_weight > 0
    run = Run(args, "autoencoder", processes)
    if run.finished:
        return say_what_next(args.out, run.step, args.data, args.val, processes, again=True)
    if gan and args.gan_start >= args.steps:
        write(f"warning: --gan-start {args.gan_start} is not before the end, --steps {args.steps}: it never acts")

    # ---- data
    images = run.open_images(args.data, args.size, few=args.benchmark)
    validation = processes.local_first(partial(Images, args.val, args.size, "--val")) if args.val else None
    pixels = Pixels(images, run.cache, processes, args.workers)

    # ---- model
    objective = make_objective(args, processes, run.checkpoint)
    one_pass, vae, critic = objective.one_pass, objective.vae, objective.critic
    if args.init and not run.checkpoint:  # the autoencoder alone: projector and discriminator begin anew
        write(initialize(vae, read_checkpoint(args.init, "autoencoder"), args.init, args.init_partial))
    features = open_rfid(args.features, args.features_weights, args.size, processes) if not args.benchmark else None
    optimizer, critic_optimizer = run.optimizer(one_pass), run.optimizer(critic) if gan else None
    ema = copy.deepcopy(vae).requires_grad_(False) if args.ema else None
    averaged, (amp, dtype) = ema or vae, autocast(args.amp, device)
    config = {"num_res_blocks": 2} | PRESETS[args.preset] | {"widths": list(PRESETS[args.preset]["widths"])}
    config |= {"preset": args.preset, "size": args.size, "regularizer": args.regularizer}

    def facts():
        latents = latent_statistics(averaged, pixels, device)
        return {"config": config, "latent": latents, "val": args.val, "lpips": bool(objective.lpips)}

    def evaluate(step):
        source, count = validation or images, args.eval_images or EVAL_IMAGES
        batches, delta = some_images(source, count, run.micro, pixels.workers), target_delta(vars(args))
        networks, error = (objective.lpips, features), objective.pixel_error
        result, rows = measure(averaged, batches, device, args.seed, *networks, delta, error)
        save_pictures(rows, run.picture(step).with_suffix(""))
        if step == run.steps:
            report(args.regularizer, result)
            weights = fingerprint(averaged.state_dict())
            save_rfid(run.folder, result, args.features, args.features_weights, source, step, weights)
        return {"evaluation": result}, headline(result), result["pixel_error"] if validation else None

    # ---- resume
    parts = {"model": vae, "ema": ema, "projector": one_pass.project, "discriminator": critic}
    parts |= {"optimizer": optimizer, "critic_optimizer": critic_optimizer}
    flops = vae_flops(one_pass, args.size, device) if run.counts_flops else 0
    millions = sum(p.numel() for p in vae.parameters()) / 1e6
    write(f"data     {pixels}")
    write(f"model    {args.preset}, {millions:.2f}M parameters, latents {vae.latent_channels} x {latent} x {latent}")
    write(f"losses   {describe(objective, args.gan_start)}")
    log = run.start(parts, facts, evaluate, pixels.indices, flops, dtype)
    objective.wrap(args.compile)

    # ---- loop
    for step, _, flip, x, _, _ in run.batches(pixels):
        x = mirrored(x, flip).contiguous(memory_format=layout(device))  # (n, 3, S, S)
        side, views = draw_views(terms, args.se_weight, args.seed, step, latent, vae.factor)
        if side < args.size:
            x = F.interpolate(x, (side, side), mode="bilinear", antialias=True)
        small = side // vae.factor
        noise = image_noise(args.seed, step, POSTERIOR, run.share, (vae.latent_channels, small, small), device)
        started, (critics, taken) = gan and step >= args.gan_start, turn(step, args.gan_start if gan else None)
        if critic:
            critic.requires_grad_(critics)
        for part, last in run.parts_of(len(x)):
            with processes.no_sync(objective.wrapped_critic if critics else objective.model, last):
                with log.timer("forward"), amp():
                    given = x[part], noise[part], views, log.add
                    loss = objective.discriminator(*given) if critics else objective.autoencoder(*given, started)
                with log.timer("backward"):
                    run.backward(loss)
        with log.timer("optimizer"):
            rate = run.take_step(critic_optimizer if critics else optimizer, step, taken)
            if ema and not critics:
                update_ema(ema, vae, taken, args.ema)
        run.end_step(step + 1, rate)
    if not args.benchmark:
        say_what_next(args.out, run.steps, args.data, args.val, processes)


def say_what_next(out, step, data, val, processes, again=False):
    run, write = quoted(out), processes.print
    write(f"{out}: {'this run is finished' if again else 'done'} at step {step}.")
    write(f"  look      {out}/samples/")
    write(f"  spectrum  python train_vae.py --spectrum {run} --data {quoted(val or data)}")
    write(f"  evaluate  python train_vae.py --eval-only --ckpt {run}")
    write(f"  encode    python train_vae.py --encode {quoted(data)} --ckpt {run}")
    if again:
        write(f"  go on     the same command with --steps {2 * step}")


# ---- using a trained autoencoder --------------------------------------------------------------------------


def open_trained(path, size, device, flag):
    """-> (vae, its info, the size of its images). Raises InputError; `flag` names where the path came from."""
    if not path:
        raise InputError(f"{flag}: name the autoencoder with --ckpt RUN_OR_FILE")
    vae, info = load_autoencoder(path, device)
    size = size or info["config"].get("size") or 256
    if size % vae.factor:
        raise InputError(f"--size {size}: the autoencoder {path} takes multiples of {vae.factor}")
    return vae.to(memory_format=layout(device)), info, size


def data_of(spec, info):
    """--val or --data, or else what the autoencoder was validated or trained on."""
    spec = spec or info["val"] or (info["args"] or {}).get("data")
    if not spec:
        raise InputError("--data: name the images to look at; this checkpoint does not say what it was trained on")
    return spec


def evaluate_only(args):
    """`--eval-only`: a report and pictures of one autoencoder, into --out or its run folder."""
    processes = Processes(args.device)
    vae, info, size = open_trained(args.ckpt, args.size, processes.device, "--eval-only")
    lpips = open_lpips(args.lpips_weight, args.lpips_vgg, args.lpips_heads, processes)
    features = open_rfid(args.features, args.features_weights, size, processes)
    if not processes.main:
        return
    flag, folder = "--val" if args.val else "--data", Path(args.out or run_folder(args.ckpt))
    images = Images(data_of(args.val or args.data, info), size, flag)
    batches = some_images(images, args.eval_images or len(images), args.batch, processes.workers(args.workers))
    result, rows = measure(vae, batches, processes.device, args.seed, lpips, features, target_delta(info["args"]))
    report(name_of(args.ckpt), result)
    stem = folder / "samples" / f"eval-step{info['step']:07d}-{short_name(images.spec)}-{size}"
    files = save_pictures(rows, stem)
    write_json(f"{stem}.json", result)
    print(f"pictures {' '.join(map(str, files))}, numbers {stem}.json")
    save_rfid(folder, result, args.features, args.features_weights, images, info["step"], info["weights"])


def compare_spectra(args):
    """`--spectrum CKPT ...`: any number of autoencoders side by side, as a table, a figure and spectrum.json."""
    processes = Processes(args.device)
    if not processes.main:
        return
    folder, results, spec = Path(args.out or "runs/spectrum"), {}, args.val or args.data
    flag = "--val" if args.val else "--data"
    count, workers = args.eval_images or EVAL_IMAGES, processes.workers(args.workers)
    opened = [open_trained(path, args.size, processes.device, "--spectrum") for path in args.spectrum]
    if len(sizes := sorted({size for *_, size in opened})) > 1:
        text = "px, each as it was trained; --size compares all at one size"
        print(f"note: images of {', '.join(map(str, sizes))} {text}")
    for path, (vae, info, size) in zip(args.spectrum, opened):
        spec, name = data_of(spec, info), name_of(path)  # the first one's data, for all
        name = str(Path(path).resolve()) if name in results else name
        batches = some_images(Images(spec, size, flag), count, args.batch, workers, name)
        settings = {"seed": args.seed, "delta": target_delta(info["args"]), "low_passed": True}
        if args.features != "none":
            settings["features"] = Features(args.features, args.features_weights, size, processes.device)
        results[name], _ = measure(vae, batches, processes.device, **settings)
    for name, result in results.items():
        print(f"{name}: latents {verdict(result)}")
    for group in grouped(results):
        spectrum_table(group)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "spectrum.json", results)
    print(f"numbers {folder}/spectrum.json, from {spec}")
    try:
        draw_spectra(results, folder / "spectrum.png")
        print(f"figure  {folder}/spectrum.png")
    except ImportError:
        print("no figure: it takes matplotlib (pip install matplotlib)")


def save_rfid(folder, result, features, files, images, step, weights):
    """rFID, where there is one, with its protocol, as sample.py writes its scores."""
    if "rfid" in result:
        protocol = {"features": features, "features_weights": files, "images": result["images"]}
        protocol |= {"reference": images.spec, "reference_images": result["images"], "format": "uint8"}
        protocol |= {"crop": crop_text(images.size), "step": step, "weights": weights}
        record_score(folder, {"frechet_distance": result["rfid"], "kind": "reconstruction", **protocol})


def encode_data(spec, ckpt, size, out, device, batch, workers, norm):
    """`--encode SPEC --ckpt CKPT --out FOLDER`: latents of stage 2, `Records` of moments. The same command goes on;
    with another --latent-norm only the header of complete ones changes.
    """
    processes = Processes(device)
    vae, info, size = open_trained(ckpt, size, processes.device, "--encode")
    images = processes.local_first(partial(Images, spec, size, "--encode"))
    folder = Path(out or run_folder(ckpt) / f"{short_name(spec)}-{size}.latents")
    made_by = {"kind": "moments", "autoencoder": info["weights"], "vae": ckpt}
    made_by |= {"preset": info["config"].get("preset"), "factor": vae.factor}
    # float32, whatever --amp: a posterior's std may be less than a half-precision rounding of its mean
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    @torch.no_grad()
    def moments(pixels):
        x = pixels.to(processes.device) / 127.5 - 1
        views = (view.contiguous(memory_format=layout(x.device)) for view in (x, x.flip(-1)))
        return torch.stack([torch.cat(vae.encode(view), 1) for view in views], 1).half().cpu().numpy()

    def normalise(records):
        if not norm and "scale" in info["config"]:
            return {name: info["config"][name] for name in ("latent_norm", "scale", "shift") if name in info["config"]}
        statistics, some = LatentStatistics(), spread(records.indices, SCALE_LIMIT)
        for part in np.array_split(some, math.ceil(len(some) / 256)):
            statistics.add(*records.read(part).float().flatten(0, 1).chunk(2, 1))
        return latent_norm(statistics.result(), norm or "one")

    shape = (2, 2 * vae.latent_channels, size // vae.factor, size // vae.factor)
    records = Records.make(folder, images, made_by, shape, moments, processes, workers, batch, "--out", normalise)
    if processes.main and norm and records.header.get("latent_norm", "one") != norm:  # runs keep their own
        records.header |= normalise(records)
        write_json(folder / "header.json", records.header)
    scaled = f"{norm_text(records.header)}, autoencoder {info['weights']}"
    processes.print(f"{folder}: {len(records.indices)} images, {scaled}")
    processes.print(f"  diffuse  python train_diffusion.py --latents {quoted(folder)}")


def norm_text(norm):
    """The normalisation of latents, of a header or a config, in words."""
    kind, values = norm.get("latent_norm", "one"), (norm["scale"], norm.get("shift", 0.0))
    ranges = (f"{min(v):.4f} to {max(v):.4f}" if isinstance(v, list) else f"{v:.4f}" for v in values)
    return "scale {}, shift {}".format(*ranges) + ", by diffusers' config.json" * (kind == "published")


# ---- shared by all programs: errors, and the forms of what files hold --------------------------------------


class InputError(Exception):
    """A mistake of the user's: printed without a traceback. Names the flag or file, the value and what would do."""


MOST, SIDE = 2**53, 2**14  # of what is counted; pixels that the side of an image may have
# Forms: {key: check(value) -> bool} of plain values that a file holds; "key?" may be missing, as it is in older files.
string = lambda value: type(value) is str
plain = lambda value: value is None or type(value) in (bool, int, float, str)
whole = lambda low, high=MOST: lambda value: type(value) is int and low <= value <= high
real = lambda low=-1e30, high=1e30: lambda value: type(value) in (int, float) and low <= value <= high  # no nan
one_of = lambda *values: lambda value: any(type(value) is type(entry) and value == entry for entry in values)
maybe = lambda check: lambda value: value is None or check(value)
each = lambda check, counts=range(MOST): (
    lambda values: type(values) in (list, tuple) and len(values) in counts and all(map(check, values))
)
holding = lambda form: lambda value: misfit(value, form) is None


def misfit(values, form):
    """What is wrong with what has to be a dict of a form, in words, or None."""
    if not isinstance(values, dict):
        return f"it is {shown(values)}, no dict"
    for key, check in form.items():
        name = key.rstrip("?")
        if (name in values or name == key) and not check(values.get(name)):
            return f"its {name} is {shown(values[name]) if name in values else 'missing'}"


def check_form(values, form):
    """Raise ValueError, naming key and value, where a dict is not of a form."""
    if wrong := misfit(values, form):
        raise ValueError(wrong)


def shown(value):
    """A value in a few words."""
    return " ".join(reprlib.repr(value).split())[:100]


# ---- shared by all programs: images -----------------------------------------------------------------------

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_UNREADABLE = 0.01  # share of a data set
LARGEST_LABEL = 2**16  # in a dataset.json, or else the number of its images
DEAD_LEAVES = 20_000  # images in the built-in set
PALETTE = np.frombuffer(bytes.fromhex("e63946f4a261e9d85a43aa573a86c47850aaf0f0eb"), np.uint8).reshape(7, 3)


def to_rgb(image):
    """A Pillow image just opened as 8-bit RGB: EXIF rotation applied, deeper greys scaled, transparency laid on white.
    Raises ValueError where the range of its pixels is not known (see `white_level`).
    """
    white, image = white_level(image), ImageOps.exif_transpose(image)
    if white != 255:
        image = Image.fromarray((np.asarray(image) * (255 / white)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def center_crop(image, size):
    """The central square of a Pillow image, `size` pixels wide: box-halved while twice as large, then bicubic."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    while image.width >= 2 * size:
        image = image.resize((image.width // 2, image.width // 2), Image.Resampling.BOX)
    return image if image.width == size else image.resize((size, size), Image.Resampling.BICUBIC)


def dead_leaves(index, size, full=False):
    """Image `index` of occluding discs with radius density r^-3, the model of natural images' power-law spectra
    (Lee, Mumford & Huang, IJCV 2001). One or two discs in seven colours, or with `full` as many as fill the
    frame, in free colours. -> (size, size, 3) uint8
    """
    rng, palette = np.random.default_rng([index, int(full)]), PALETTE.astype(np.float32)
    small, large = (size / 16, size / 2) if full else (size / 6, size / 3)
    rows = np.arange(size, dtype=np.float32)
    frame, empty = np.zeros((size, size, 3), np.float32), np.ones((size, size), np.float32)  # painted front to back
    for count in itertools.repeat(128) if full else [rng.integers(1, 3)]:
        radius = (rng.uniform(large**-2, small**-2, count) ** -0.5).astype(np.float32)  # inverse CDF of r^-3
        reach = radius[:, None] if full else -radius[:, None] / 2  # full: centres may lie outside the frame
        centre = rng.uniform(-reach, size + reach, (count, 2)).astype(np.float32)
        colour = rng.uniform(0, 255, (count, 3)) if full else palette[rng.integers(0, len(palette), count)]
        distance = np.hypot(*np.broadcast_arrays(rows[:, None] - centre[:, :1, None], rows - centre[:, 1:, None]))
        cover = (radius[:, None, None] - distance + 0.5).clip(0, 1)  # (count, size, size), soft edges
        left = np.cumprod(np.concatenate((empty[None], 1 - cover)), 0)  # what shows through the leaves before each
        frame += np.einsum("khw,kc->hwc", left[:-1] * cover, colour.astype(np.float32))
        empty = left[-1]
        if full and empty.max() < 1 / 255:
            break
    return (frame + empty[..., None] * palette[rng.integers(len(palette))]).round().astype(np.uint8)


class Images(Dataset):
    """The images of `--data SPEC`, centre-cropped to `size` pixels.

    SPEC: a folder tree or .zip (classes = the folders at its top; a StyleGAN/EDM dataset.json wins), `cifar10` or
    `cifar10:test` (torchvision downloads them to ./data), `dead-leaves` or `dead-leaves:full`. Attributes: names,
    labels (list of int, or None), classes (list of str, or None). Raises InputError where there are no images.
    """

    def __init__(self, spec, size, flag="--data"):
        hush_pillow()
        self.spec, self.size, self.flag, self.path = spec, size, f"{flag} {spec}", Path(spec)
        self.labels, self.classes = None, None
        self.kind, _, self.option = spec.partition(":")
        if spec in ("dead-leaves", "dead-leaves:full"):
            self.names = range(DEAD_LEAVES)
        elif spec in ("cifar10", "cifar10:test"):
            from torchvision.datasets import CIFAR10

            try:
                data = CIFAR10("data", train=not self.option, download=True)
            except Exception as error:  # torchvision lets whatever its download met through
                raise InputError(f"{self.flag}: torchvision could not download it to ./data ({error})") from error
            self.names, self.pixels, self.labels, self.classes = range(len(data)), data.data, data.targets, data.classes
        else:
            self._list_files()

    def _list_files(self):
        try:
            self._files = Files(self.path)
        except ValueError as error:
            kinds = "a folder, a .zip, cifar10, cifar10:test, dead-leaves or dead-leaves:full"
            raise InputError(f"{self.flag}: {error}; it takes {kinds}") from error
        self.kind, files = self._files.kind, self._files.names
        visible = [file for file in files if not re.search(r"(^|/)(__MACOSX|\.)", file)]
        self.names = [name for name in visible if os.path.splitext(name)[1].lower() in EXTENSIONS]
        if not self.names:
            raise InputError(f"{self.flag}: no image in it ({len(files)} files; {' '.join(sorted(EXTENSIONS))})")
        if "dataset.json" in files:
            return self._label_by_json()
        parts = [name.split("/")[:-1] for name in self.names]
        common = len(os.path.commonprefix(parts))  # of lists: the folders that all images share
        tops = [part[common] if len(part) > common else None for part in parts]
        if None not in tops:  # with images at the top as well, folders are no classes
            classes, labels = np.unique(tops, return_inverse=True)
            self.classes, self.labels = classes.tolist(), labels.tolist()

    def _label_by_json(self):
        try:
            entries = json.loads(self._files.read("dataset.json")).get("labels") or []  # null: a set without classes
            labels = dict(entries)
        except Exception as error:  # of a damaged .zip or file, or of JSON that is something else
            raise InputError(f"{self.flag}: dataset.json holds no list of [file, class number] ({error})") from error
        if len(labels) < len(entries):
            raise InputError(f"{self.flag}: dataset.json lists {len(entries) - len(labels)} files twice; mend it")
        if labels and (lacking := [name for name in self.names if name not in labels]):
            raise InputError(f"{self.flag}: dataset.json gives no label to {lacking[0]!r}")
        labels, limit = [labels[name] for name in self.names] if labels else [], max(LARGEST_LABEL, len(self))
        for name, label in zip(self.names, labels):
            if type(label) not in (int, float) or not 0 <= label < limit or label % 1:
                classes = len({label for label in labels if type(label) in (int, float)})
                wrong = f"dataset.json gives {name} the label {str(label)[:40]!r}, one of {classes}"
                raise InputError(f"{self.flag}: {wrong}; labels are whole numbers from 0 on, below {limit:,}")
        if labels:
            self.labels, self.classes = list(map(int, labels)), [str(i) for i in range(int(max(labels)) + 1)]

    def identity(self):
        """What the data is, however its path is spelled: plain values to compare."""
        names = [self.spec] if isinstance(self.names, range) else self.names
        return {"count": len(self), "names": digest([names, self.labels]), "classes": self.classes}

    def cache_name(self):
        """A name for the decoded images, which changes with the files."""
        files = {"folder": self.names, "zip": [""]}.get(self.kind, [])
        stats = []
        for file in files:
            with contextlib.suppress(OSError):  # a link to nowhere, one that has vanished
                stats.append(((stat := (self.path / file).stat()).st_size, stat.st_mtime_ns))
        return f"{short_name(self.spec)}-{self.size}-{digest([self.identity(), stats])[:8]}"

    def thin(self, count):
        """Keep at most `count` images, spread evenly."""
        kept = range(0, len(self.names), math.ceil(len(self.names) / count))
        self.names, self.labels = [self.names[i] for i in kept], self.labels and [self.labels[i] for i in kept]

    def __len__(self):
        return len(self.names)

    def open(self, i):
        """Image i as it is stored (Pillow). Raises what Pillow raises where it cannot be read."""
        if self.kind == "dead-leaves":
            return Image.fromarray(dead_leaves(self.names[i], self.size, full=self.option == "full"))
        if self.kind == "cifar10":
            return Image.fromarray(self.pixels[self.names[i]])
        return Image.open(io.BytesIO(self._files.read(self.names[i])))

    def read(self, i):
        """Image i as (3, size, size) uint8, or None, its name printed, where it is unreadable or truncated."""
        try:
            with self.open(i) as image:
                return torch.from_numpy(np.array(center_crop(to_rgb(image), self.size))).permute(2, 0, 1)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds on bad bytes
            text = f"skipped, unreadable: {self.spec}/{self.names[i]} ({error or type(error).__name__})"
            tqdm.write(one_line(text), file=sys.stderr)
            return None

    def readable(self, i):
        """(j, image j) of the first readable image from i on. Raises InputError where there is none."""
        for j in itertools.chain(range(i, len(self)), range(i)):
            if (image := self.read(j)) is not None:
                return j, image
        raise InputError(f"{self.flag}: of {len(self)} images none can be read, as {self.names[0]}; name others")

    def batches(self, indices, batch, workers, title, **bar):
        """Under a bar: indices (n,), images (n, 3, size, size) uint8, (n,) bool: which of them could be read."""
        options = {"num_workers": workers if len(indices) > 512 else 0, "worker_init_fn": begin_worker}
        with progress(desc=title, total=len(indices), unit="img", **bar) as bar:
            for where, pixels, good in DataLoader(Subset(self, indices), batch, **options):
                yield where, pixels, good
                bar.update(len(where))

    def check_unreadable(self, count):
        """Raise InputError where more than 1% of the images are unreadable."""
        if count > MAX_UNREADABLE * len(self):
            text = f"{count} of {len(self)} images are unreadable, more than 1%"
            raise InputError(f"{self.flag}: {text}; remove or replace those named above")

    def __getitem__(self, i):
        """(i, image (3, size, size) uint8, True), or (i, zeros, False) where it is unreadable."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        image = self.read(i)
        blank = torch.zeros(3, self.size, self.size, dtype=torch.uint8)
        return (i, blank, False) if image is None else (i, image, True)


def digest(values):
    """A hash of plain values."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def short_name(spec):
    """A word for a data set, for file names."""
    return Path(spec.replace(":", "-")).resolve().stem


def spread(indices, count):
    """At most `count` of some indices, evenly spread -> (n,) long, numpy."""
    indices = np.asarray(indices)
    return indices[np.unique(np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int))]


def mirrored(pixels, flip):
    """Pixels (n, 3, S, S) uint8 -> images in [-1, 1], mirrored where flip (n,)."""
    x = pixels / 127.5 - 1
    return torch.where(flip.to(x.device, non_blocking=True).view(-1, 1, 1, 1), x.flip(-1), x)


def to_uint8(images):
    """[-1, 1] -> 0..255 uint8, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


# ---- shared by all programs: what is computed once per image ----------------------------------------------

DISK_SHARE = 0.8  # of the free disk, for a folder of records
KINDS = {"pixels": "decoded images", "moments": "latents of train_vae.py --encode", "tokens": "encoder tokens"}
DTYPES = {"pixels": np.dtype(np.uint8), "moments": np.dtype(np.float16), "tokens": np.dtype(np.float16)}
# Forms of a header, see `misfit`.
IDENTITY = {"count": whole(1), "names": string, "classes": maybe(each(string))}  # of `Images`
HEADER = {"complete": one_of(False, True), "size": whole(1, SIDE), "data": string, "images": holding(IDENTITY)}
MADE_BY = {"pixels": {}, "tokens": {"encoder": string}}
MADE_BY["moments"] = {"autoencoder": string, "vae?": maybe(string), "preset?": maybe(string), "factor?": whole(1, SIDE)}


class Records:
    """What is computed once per image of a data set: a folder of plain files, memory-mapped, that np.load reads alone.

    header.json  kind, complete, size (of the images), images (`Images.identity`), data, and what made the values: of
                 moments autoencoder (hash of its weights), preset, factor, vae (where it was), latent_norm, scale and
                 shift (see `vae.latent_norm`); of tokens encoder
    values.npy   pixels (N, 3, S, S) uint8; moments (mean, log variance) of each image and its mirror image
                 (N, 2, 2C, h, w) float16, or tokens (N, 2, T, D) float16. Record i is image i
    done.npy     (N,) uint8: 0 to be made, 1 made, 2 unreadable
    labels.npy   (N,) int64, -1 without classes; names.json: a list
    """

    FILES = ("header.json", "names.json", "values.npy", "done.npy", "labels.npy")

    def __init__(self, folder, kind, flag="--latents", mode="r", like=None):
        self.folder, self.flag = Path(folder), f"{flag} {folder}"
        if self.folder.is_file():
            encode = "python train_vae.py --encode DATA --ckpt RUN --out FOLDER"
            anew = f"{encode if kind == 'moments' else 'the same command'} makes a folder anew, of another name"
            raise InputError(f"{self.flag}: a file of an earlier version; {anew}")
        if not (self.folder / "header.json").is_file():
            raise InputError(f"{self.flag}: no folder of {KINDS[kind]}")
        try:
            self._open(kind)
            if mode == "r+":  # which lengthens a file that is too short: opened when that is known not to be
                self.values, self.done = (np.load(self.folder / f"{name}.npy", mode) for name in ("values", "done"))
        except InputError:
            raise
        except Exception as error:  # json and numpy raise all kinds on bad bytes
            raise InputError(f"{self.flag}: damaged ({one_line(error)[:200]}); remove it and make it anew") from error
        if any(self.header.get(key) != value for key, value in (like or {}).items() if key != "vae"):
            raise InputError(f"{self.flag}: holds other {KINDS[kind]}; name another folder, or remove it")
        if mode == "r" and not self.header["complete"]:
            raise InputError(f"{self.flag}: unfinished; the command that began it completes it")

    def _open(self, kind):
        """Read header and arrays. Raises InputError on another kind, and all sorts where they are not what they say."""
        self.header = json.loads((self.folder / "header.json").read_text())
        check_form(self.header, {"kind": one_of(*KINDS)})
        if self.header["kind"] != kind:
            raise InputError(f"{self.flag}: no {KINDS[kind]} but {KINDS[self.header['kind']]}")
        check_form(self.header, HEADER | MADE_BY[kind])
        identity, names = self.header["images"], json.loads((self.folder / "names.json").read_text())
        n, size = identity["count"], self.header["size"]
        for name, dtype in {"values": DTYPES[kind], "done": np.uint8, "labels": np.int64}.items():
            array = np.load(self.folder / f"{name}.npy", mmap_mode="r")
            false = array.dtype != dtype or len(array) != n or (array.ndim > 1) != (name == "values")
            if false or not array.flags.c_contiguous:
                raise ValueError(f"its {name}.npy is {array.dtype} {array.shape}, not {np.dtype(dtype)} of {n} images")
            setattr(self, name, array)
        shape = self.values.shape[1:]
        fitting = (3, size, size) if kind == "pixels" else (2, shape[1], shape[2])
        if kind == "moments":
            fitting = (2, shape[1] // 2 * 2, *2 * [size // self.header.get("factor", size // shape[2])])
            check_norm(self.header, shape[1] // 2)
        if shape != fitting or not self.values.size:
            raise ValueError(f"its values are {shape}, of images of {size} pixels")
        marks, labels = np.bincount(self.done, minlength=3), self.labels.tolist() if identity["classes"] else None
        if len(marks) > 3 or (self.header["complete"] and (marks[0] or not marks[1])):
            raise ValueError("its done.npy does not say which images were read")
        if labels and not 0 <= min(labels) <= max(labels) < len(identity["classes"]):
            raise ValueError(f"labels {min(labels)} to {max(labels)} of {len(identity['classes'])} classes")
        if all(identity["names"] != digest([made_of, labels]) for made_of in (names, [self.header["data"]])):
            raise ValueError("its names.json or labels.npy is not what its header.json was made with")

    @classmethod
    def make(cls, folder, images, header, shape, encode, processes, workers, batch, flag, finish=lambda records: {}):
        """Fill a folder, or go on where that was interrupted, by the processes of the first machine -> the records.

        header: kind and what makes the values; encode(pixels (n, 3, S, S) uint8) -> values (n, *shape), numpy;
        finish(records) -> more of the header. Raises InputError where the folder holds something else.
        """
        folder, kind = Path(folder), header["kind"]
        header = {"size": images.size, "images": images.identity()} | header

        def damage():
            """What is wrong with decoded images that lie there, in words, or None; they alone are made again."""
            try:
                if kind == "pixels" and (folder / "header.json").exists():
                    cls(folder, kind, flag, None, header)
            except InputError as error:
                return str(error)

        with contextlib.ExitStack() as locks:
            if processes.main and (damage() or not cls.is_complete(folder)):
                cls._check_room(folder, len(images) * math.prod(shape) * DTYPES[kind].itemsize, flag)
                locks.enter_context(hold(folder, flag, wait=True))
                if wrong := damage():  # another command may have mended it meanwhile
                    tqdm.write(f"made again: {wrong}")
                    for name in cls.FILES:  # those who have them open keep them
                        (folder / name).unlink(missing_ok=True)
                if not (folder / "header.json").exists():
                    cls._create(folder, images, header | {"data": images.spec, "complete": False}, shape)
            processes.barrier()
            records = cls(folder, kind, flag, "r" if cls.is_complete(folder) else "r+", header)
            if records.header["complete"]:
                if kind != "pixels":
                    processes.print(f"{folder}: complete, {len(images)} images")
                return records
            records._fill(images, encode, processes, workers, batch)
            processes.barrier()
            if processes.main:
                records._complete(images, finish)
            processes.barrier()
        return cls(folder, kind, flag)

    @staticmethod
    def _check_room(folder, need, flag):
        """Raise InputError where a folder holds other files than those of records, or `need` bytes do not fit there."""
        files = {file.name.removesuffix(".tmp") for file in folder.iterdir()} if folder.is_dir() else set()
        if folder.is_file() or files - {*Records.FILES, ".lock"}:
            raise InputError(f"{flag} {folder}: is a file or holds other files; name another folder")
        if not files - {".lock"} and need > DISK_SHARE * (free := free_disk(folder)):
            raise InputError(f"{flag} {folder}: needs {need / 2**20:,.1f} MiB, its disk has {free / 2**20:,.1f} free")

    @staticmethod
    def _create(folder, images, header, shape):
        shape, values, dtype = (len(images), *shape), folder / "values.npy", DTYPES[header["kind"]]
        need = math.prod(shape) * dtype.itemsize
        print(f"{header['kind']:8} {' x '.join(map(str, shape))}: {need / 2**20:,.1f} MiB into {folder}")
        try:
            open_memmap(values, "w+", dtype, shape).flush()
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                with values.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(values))
        except OSError as error:
            values.unlink(missing_ok=True)
            raise unwritten(values, error, need) from error
        done, labels = np.zeros(len(images), np.uint8), np.array(images.labels or [-1] * len(images), np.int64)
        write_atomically(folder / "done.npy", lambda file: np.save(file, done))
        write_atomically(folder / "labels.npy", lambda file: np.save(file, labels))
        write_json(folder / "names.json", list(images.names))
        write_json(folder / "header.json", header)  # the last: all is there

    def _fill(self, images, encode, processes, workers, batch):
        mine = np.arange(processes.local_rank, len(images), processes.local_world)
        mine = mine[self.done[mine] == 0].tolist() if processes.machine == 0 else []
        title = "decode" if self.header["kind"] == "pixels" else "encode"
        every = processes.local_world if processes.local_world > 1 else False  # the bar counts those of all processes
        bar = {"disable": not processes.main, "unit_scale": every}
        for where, pixels, good in images.batches(mine, batch, processes.workers(workers), title, **bar):
            where, good = where.numpy(), good.numpy()
            if good.any():
                self.values[where[good]] = encode(pixels[good])
                self.values.flush()  # before they are called made
            self.done[where] = np.where(good, 1, 2)

    def _complete(self, images, finish):
        unreadable = self.done == 2
        try:
            images.check_unreadable(unreadable.sum())
        except InputError:
            self.done[unreadable] = 0  # the same command tries them again
            raise
        self.done.flush()
        write_json(self.folder / "header.json", self.header | finish(self) | {"complete": True})

    @staticmethod
    def is_complete(folder):
        with contextlib.suppress(ValueError, RecursionError, AttributeError, OSError):  # which opening it will name
            return json.loads((Path(folder) / "header.json").read_text()).get("complete") is True
        return False

    def check_images(self, identity, size):
        """Raise InputError where these are records of other images."""
        made_of = self.header["images"] | {"size": self.header["size"]}
        for name, value in (identity | {"size": size}).items():
            if made_of[name] != value:
                raise InputError(f"{self.flag}: made of other images: {name} {made_of[name]}, now {value}")

    @property
    def indices(self):
        """Of the images that could be read."""
        return np.flatnonzero(self.done == 1)

    def __str__(self):
        return f"{self.header['kind']} of {len(self.indices)} images of {self.header['size']} px, in {self.folder}"

    def read(self, where, flip=None):
        """The values of images `where` (n,), numpy, or of their mirror images where flip (n,) -> (n, ...). Raises
        InputError where they are not finite.
        """
        values = torch.from_numpy(self.values[where] if flip is None else self.values[where, flip.astype(int)])
        check_finite({"values.npy": values}, self.flag)
        return values


def free_disk(folder):
    """Bytes, where `folder` is or will be."""
    return shutil.disk_usage(next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())).free


class Pixels:
    """The images of a run as uint8: decoded once, into `Records` that all runs share, or at every use where the disk is
    too small for them. Attributes: indices of the readable images, labels (N,) or None, str(): which of the two.
    """

    def __init__(self, images, cache, processes, workers):
        self.images, self.workers, self.records, self.unreadable = images, processes.workers(workers), None, set()
        folder, shape = Path(cache or ".") / images.cache_name(), (3, images.size, images.size)
        fits = (folder / "header.json").exists() or len(images) * math.prod(shape) <= DISK_SHARE * free_disk(folder)
        if processes.all(fits and cache is not None):
            header, encode = {"kind": "pixels"}, torch.Tensor.numpy
            self.records = Records.make(folder, images, header, shape, encode, processes, workers, 256, "--cache")
        self.indices = self.records.indices if self.records else np.arange(len(images))
        self.labels = None if images.labels is None else np.array(images.labels)

    def __str__(self):
        text, skipped = f"{len(self.images)} images of {self.images.size} px", len(self.images) - len(self.indices)
        text += f", in {self.records.folder}" if self.records else f", decoded on the fly by {self.workers} workers"
        return text + f", {skipped} unreadable skipped" * bool(skipped)

    def read(self, where):
        """Images with these indices (n,), numpy -> (n, 3, S, S) uint8"""
        if self.records:
            return self.records.read(where)
        return torch.stack([self.images.readable(i)[1] for i in where.tolist()])

    def stream(self, wanted):
        """Of each (n,) indices: them, (n, 3, S, S) uint8. On the fly, others take the place of unreadable images."""
        if self.records:
            yield from ((where, self.records.read(where)) for where in wanted)
            return
        loader = {"batch_sampler": wanted, "num_workers": self.workers, "worker_init_fn": begin_worker}
        for where, pixels, good in DataLoader(self.images, **loader):
            for k in (~good).nonzero().flatten().tolist():
                self.unreadable.add(where[k].item())
                self.images.check_unreadable(len(self.unreadable))
                where[k], pixels[k] = self.images.readable(where[k].item())
            yield where.numpy(), pixels


# ---- shared by all programs: signals and bars -------------------------------------------------------------

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # heeded
asked = {}  # the signal that has asked this process to stop, and when


class Stopped(Exception):
    """A signal has asked for an end: its number, and where the work stands, in words."""


def ask_to_stop(number, _):
    """A signal handler: the first one is noted, for the work to end where it can go on; a second ends the process."""
    for stream in (1, 2) if number == getattr(signal, "SIGHUP", None) else ():
        if stat.S_ISCHR(os.fstat(stream).st_mode):  # the terminal is gone: writing to it would fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if not asked:
        asked.update(signal=number, at=time.monotonic())
    elif time.monotonic() - asked["at"] > 1:  # torchrun passes on what the terminal has given to all
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def stop_if_asked(where):
    """Raise Stopped where a signal has asked for it."""
    if asked:
        raise Stopped(asked["signal"], where)


def begin_worker(_):
    """In DataLoader's workers: no signals, as their process may still need them for the step it is in."""
    hush_pillow()
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class progress(tqdm):
    """A bar that goes when its work is done; where there is no terminal, a line every half minute. Stops the work, by
    an exception, within one tick of a signal.
    """

    def __init__(self, *args, **options):
        self.terminal = sys.stderr.isatty()
        line = "{desc} {n_fmt}/{total_fmt} {unit}  {rate_fmt}  {remaining} left"
        options |= {} if self.terminal else {"mininterval": 30, "bar_format": line}
        super().__init__(*args, dynamic_ncols=True, leave=False, delay=0.5, **options)

    def __iter__(self):
        for item in super().__iter__():
            stop_if_asked("" if self.disable else f" during {self.desc}")
            yield item

    def update(self, n=1):
        super().update(n)
        stop_if_asked("" if self.disable else f" after {self.desc} {self.n} of {self.total}")

    def display(self, msg=None, pos=None):
        if self.terminal:
            return super().display(msg, pos)
        if msg is None and self.n:
            self.fp.write(f"{self}\n")


def duration(seconds):
    """1m52s"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


# ---- shared by all programs: processes, devices, randomness -----------------------------------------------

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # rank 0 evaluates alone, decoding is uneven
MEETING_TIMEOUT = 600  # seconds until all processes have started


def meet(rank, world):
    """The store of torchrun's processes, under a prefix that rank 0 draws: what others, before a restart, have left in
    it is not seen (torch, up to 2.15, connects to their addresses and waits). Raises InputError where some do not come.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serving, mine = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True", os.urandom(8).hex()
    timeout, end = datetime.timedelta(seconds=MEETING_TIMEOUT), time.monotonic() + MEETING_TIMEOUT
    store = dist.TCPStore(address, port, world, serving, timeout, multi_tenant=True)
    store.set(f"asks {rank}", mine)
    # A key ends in what its asker has drawn, so that none is an old one; rank 0 answers until each has thanked.
    wanted = [f"{mine} thanks {other}" for other in range(1, world)] if rank == 0 else [f"answer {mine}"]
    while not store.check(wanted):
        stop_if_asked("")
        if time.monotonic() > end:
            raise InputError(f"--nproc_per_node, --nnodes: not all {world} processes started in {MEETING_TIMEOUT} s")
        for other in range(1, world) if rank == 0 else ():
            if store.check([f"asks {other}"]):
                store.set(f"answer {store.get(f'asks {other}').decode()}", mine)
        time.sleep(0.02)
    prefix = mine if rank == 0 else store.get(f"answer {mine}").decode()
    store.set(f"{prefix} thanks {rank}", "")
    store.set_timeout(COLLECTIVE_TIMEOUT)  # NCCL meets there again, at the first collective
    return dist.PrefixStore(prefix, store)


def cores():
    """How many cores this process may use: containers and Slurm leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Processes:
    """This process among those of torchrun (NCCL on GPUs, Gloo on CPU), or alone."""

    def __init__(self, device_name):
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
        values = (int(os.environ.get(name, int(name.endswith("SIZE")))) for name in names)
        self.rank, self.world, self.local_rank, self.local_world, self.machine = values
        self.device, self.main = choose_device(device_name), self.rank == 0
        self.device_ids = [self.device.index] if self.device.type == "cuda" else None
        if self.world > 1 and not dist.is_initialized():
            among = {"rank": self.rank, "world_size": self.world, "store": meet(self.rank, self.world)}
            backends = "cpu:gloo,cuda:nccl" if self.device_ids else "gloo"
            dist.init_process_group(backends, timeout=COLLECTIVE_TIMEOUT, **among)
            atexit.register(dist.destroy_process_group)

    def sum(self, tensor):
        """In-place sum over processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def local_first(self, make):
        """make() on local rank 0, then on the others: what it downloads is fetched once a machine."""
        if self.local_rank > 0:
            self.barrier()
        result = make()
        if self.local_rank == 0:
            self.barrier()
        return result

    def mean(self, tensor):
        return self.sum(tensor) / self.world

    def all(self, value):
        """Whether a value is true in all processes."""
        return self.sum(torch.tensor(float(bool(value)), device=self.device)) == self.world

    def barrier(self):
        if self.world > 1:
            dist.barrier(device_ids=self.device_ids)

    def asked_to_stop(self):
        """The number of a signal that has asked any process to stop, or 0: in all processes the same."""
        number = torch.tensor(asked["signal"] if asked else 0)
        if self.world > 1:
            dist.all_reduce(number, dist.ReduceOp.MAX)  # on the CPU: nothing waits for the device
        return number.item()

    def wrap(self, network, compiling=False):
        network = torch.compile(network) if compiling else network
        return DistributedDataParallel(network, device_ids=self.device_ids) if self.world > 1 else network

    def no_sync(self, wrapped, last):
        """The context of one part of a batch: gradients are averaged over processes with the last."""
        return contextlib.nullcontext() if last or self.world == 1 else wrapped.no_sync()

    def agree(self, value):
        """Process 0's plain value, in all."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def scratch(self):
        """A folder of all processes that goes when they end."""
        name = self.agree(tempfile.mkdtemp() if self.main else None)
        if self.local_rank == 0:
            atexit.register(shutil.rmtree, name, ignore_errors=True)
        return Path(name)

    def workers(self, count):
        """How many processes decode images for this one, where --workers does not say."""
        return min(8, cores() // self.local_world) if count is None else count

    def print(self, text):
        if self.main:
            tqdm.write(text)


def choose_device(name):
    """`--device auto|cpu|cuda` -> torch.device, of LOCAL_RANK under torchrun."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no GPU; --device cpu works everywhere")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"--nproc_per_node: process {index} has no GPU, this machine has {count}; --device cpu works")
    torch.cuda.set_device(index)
    return torch.device("cuda", torch.cuda.current_device())


def autocast(amp, device):
    """`--amp` -> (a function that makes the context in which networks run, dtype or None). auto: bf16 where the
    hardware multiplies it (CUDA from 8.0 on, CPUs with AVX512-BF16 or AMX), else fp16 on CUDA and float32 on a CPU.
    """
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    elif amp == "auto":
        amp = "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    return partial(torch.autocast, device.type, dtype, enabled=dtype is not None), dtype


def seeds(*numbers, count=1):
    """`count` seeds that follow from several non-negative integers; the first few do not depend on the count."""
    state = np.random.SeedSequence([len(numbers), *numbers]).generate_state(count, np.uint64)
    return [int(word) >> 1 for word in state]


# The last of a step's numbers says what is drawn, so that no two draws share theirs; ORDER goes by epochs.
ORDER, TIMES, FLIPS, VIEWS, NOISE, POSTERIOR, DEAL = 0, 1, 2, 3, 6, 7, 8


def generator(*numbers, device="cpu"):
    """A torch generator seeded by several non-negative integers."""
    return torch.Generator(device).manual_seed(seeds(*numbers)[0])


def image_noise(seed, step, stream, share, shape, device):
    """Standard normal noise (n, *shape) of the images at `share`, a slice, of a step's global batch. Each image's
    follows from (seed, step, stream) and its place alone, so that a process draws no other's.
    """
    g, noise = torch.Generator(device), torch.empty(share.stop - share.start, *shape, device=device)
    for row, number in zip(noise, seeds(seed, step, stream, count=share.stop)[share]):
        row.normal_(generator=g.manual_seed(number))
    return noise


class DataOrder:
    """Which images a step sees: epochs, each a permutation drawn from (seed, epoch), cut into batches end to end."""

    def __init__(self, count, batch, seed):
        self.count, self.batch = count, batch
        self.epoch_order = lru_cache(2)(lambda epoch: torch.randperm(count, generator=generator(seed, epoch, ORDER)))

    def __call__(self, step):
        """-> (batch,) long, 0..count-1"""
        positions = torch.arange(step * self.batch, (step + 1) * self.batch)
        epochs, places = positions // self.count, positions % self.count
        return torch.cat([self.epoch_order(epoch)[places[epochs == epoch]] for epoch in epochs.unique().tolist()])


def prefetch(batches):
    """The items of an iterator, each made by a background thread while the one before it is used."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


# ---- shared by all programs: writing files, and locks -----------------------------------------------------


def unwritten(file, error, takes=0):
    """The InputError of a file of `takes` bytes (0: unknown) that an OSError kept from being written."""
    reason, remedy = error.strerror or error, "make that possible"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        need = f"it takes {takes / 2**20:,.1f} MiB, " if takes else ""
        remedy = f"{need}{free_disk(Path(file)) / 2**20:,.1f} MiB are free on its disk; free some"
    return InputError(f"{file}: cannot be written ({reason}); {remedy}, and give the same command again")


def write_atomically(file, write, sync=True, takes=0, check=None):
    """write(binary file) beside `file`, then rename: the old one stays till then, with `sync` in a power cut too.
    check(name), before the rename, sees what is on the disk. Raises InputError, and leaves nothing, where either fails.
    """
    try:
        with open(f"{file}.tmp", "wb") as handle:
            write(handle)
            handle.flush()
            if sync:
                os.fsync(handle.fileno())
            if check and hasattr(os, "posix_fadvise"):  # else it would see what is in memory
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if check:
            check(handle.name)
        os.replace(handle.name, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(f"{file}.tmp")
        while isinstance(error, RuntimeError) and error.__context__:  # what torch.save raises at closing hides it
            error = error.__context__
        if isinstance(error, OSError):
            raise unwritten(file, error, takes) from error
        raise


def write_json(file, content):
    write_atomically(file, lambda handle: handle.write(json.dumps(content, indent=1).encode()))


def append_json(file, content):
    """Add a line to a file of them, unless it is the last one already (a killed command says it again). A half line
    stays alone. Raises InputError, and adds nothing, where it cannot be written.
    """
    line = json.dumps(content).encode() + b"\n"
    try:
        with open(file, "a+b", buffering=0) as handle:
            end = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, end - len(line) - 1))
            before = b"\n" + handle.read()
            if before.endswith(b"\n" + line):
                return
            line = line if before.endswith(b"\n") else b"\n" + line
            if handle.write(line) < len(line):
                handle.truncate(end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise unwritten(file, error, len(line)) from error


HELD = contextlib.ExitStack()  # what the command that is running holds to its end


def lock(handle):
    """Whether an open file could be locked; None where that is not known here. POSIX's locks are not inherited by
    workers, and work over NFS.
    """
    try:
        import fcntl  # Windows has none

        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (BlockingIOError, PermissionError):  # as systems have it
        return False
    except (ImportError, OSError):
        return None


def launch():
    """Which of torchrun's launches this process is of, in words."""
    where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return f", one of those that met at {where}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""


@contextlib.contextmanager
def hold(folder, flag, wait=False):
    """Make a folder, and keep other commands from working in it, by a lock on .lock in it that goes with the process.
    Raises InputError where one is at work and this is not to `wait`, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+b", buffering=0)
    except OSError as error:
        if folder.is_dir() and error.errno in (errno.EROFS, errno.EACCES):  # it may be looked at; writing will say so
            yield
            return
        raise InputError(f"{flag} {folder}: cannot be written ({error.strerror}); name another folder") from error
    with handle:
        if lock(handle) is False:
            handle.seek(0)
            holder = one_line(handle.read(200).decode(errors="replace")) or "another process"
            if not wait:
                raise InputError(f"{flag} {folder}: is in use by {holder}; wait for it, or name another folder")
            print(f"{flag} {folder}: is being made by {holder}; waiting for it", flush=True)
            for _ in progress(itertools.count(), desc=f"waiting for {folder}", unit="s"):
                time.sleep(1)
                if lock(handle) is not False:
                    break
        holder = f"process {os.getpid()} on {platform.node()} since {datetime.datetime.now():%Y-%m-%d %H:%M}{launch()}"
        with contextlib.suppress(OSError):  # a full disk: what needs room says so
            handle.truncate(0)
            handle.write(holder.encode())
        yield


def quoted(path):
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def save_grid(images, file, columns):
    """Write images (N, 3, S, S) in [-1, 1] as one PNG."""
    from torchvision.utils import save_image

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    grid = dict(nrow=columns, padding=2, normalize=True, value_range=(-1, 1), format="png")
    write_atomically(file, lambda handle: save_image(images.float().cpu(), handle, **grid), sync=False)
    return file


# ---- shared by all programs: checkpoints and weights ------------------------------------------------------

PROGRAMS = ("train_diffusion.py", "train_vae.py")  # by whether "widths" is a key of the config
CHECKPOINT = {"config", "model", "ema", "step"}  # keys of those of our trainers
FLAG = {f"{name}?": maybe(string) for name in ("data", "encoder", "init")}
FLAG |= {"regularizer?": string, "esm_delta?": real()}  # of the program that wrote it
flags = lambda value: holding(FLAG)(value) and all(plain(entry) or each(plain)(entry) for entry in value.values())
FORM = {"config": holding({}), "model": holding({}), "ema": maybe(holding({})), "step": whole(0), "args?": maybe(flags)}
FORM |= {"latent?": maybe(holding({"scale?": real(1e-30)})), "val?": maybe(string), "lpips?": one_of(False, True)}
FORM |= {"data?": holding(IDENTITY), "target_dim?": maybe(whole(1, 2**16))}
AUTOENCODER = {"widths": each(whole(1, 2**14), range(1, 17)), "latent_channels": whole(1, 2**12)}
AUTOENCODER |= {"num_res_blocks": whole(1, 16), "attention?": each(whole(0, 16)), "size?": maybe(whole(1, SIDE))}
AUTOENCODER |= {"preset?": maybe(string), "regularizer?": maybe(string)}


def read_checkpoint(path, kind="diffusion", published=None):
    """The dict in a run folder's checkpoint.pt, or in a file, of a diffusion model or an "autoencoder" (which may be
    published weights, a file or a folder of diffusers'). published(the dict in any other file) -> config, state dict.
    What is returned is sound: the config is one that `NETWORKS` builds, the weights are finite and fit it. Of a run
    whose checkpoint.pt is not there or cannot be opened it is the newest of the older ones, checkpoint.1.pt on, that
    can, which is said. Raises InputError; runs no code.
    """
    path, failed = Path(path), []
    if not path.exists():
        raise InputError(f"{path}: no such run folder or checkpoint")
    newest = weights_in(path)
    for file in [newest, *(older_checkpoints(path) if newest == path / "checkpoint.pt" else ())]:
        try:
            checkpoint = open_checkpoint(path, file, kind, published)
            break
        except InputError as error:
            failed.append(str(error))
    else:
        raise InputError(failed[0])
    if failed:
        say_once(f"{file} is taken, step {checkpoint['step']}: {'; '.join(failed)}")
    program, other = PROGRAMS if kind == "diffusion" else reversed(PROGRAMS)
    if other == PROGRAMS["widths" in checkpoint["config"]]:
        raise InputError(f"{file}: a checkpoint of {other}; give one of {program}")
    return checkpoint


def older_checkpoints(run):
    """checkpoint.1.pt, the one before the last, checkpoint.2.pt ... of a run folder, as far as there are any."""
    numbers = (re.fullmatch(r"checkpoint\.(\d+)\.pt", file.name) for file in run.iterdir())
    return [run / f"checkpoint.{i}.pt" for i in sorted(int(number[1]) for number in numbers if number)]


@lru_cache
def say_once(text):
    """A line on process 0, however often what it says is met."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(text)


def open_checkpoint(path, file, kind, published):
    """The dict in one of the files of `read_checkpoint`'s path; only one of this kind is known to be sound."""
    program = PROGRAMS[kind == "autoencoder"]
    if not file.exists():
        begun = " (one is being written, or its writing was cut off)" if Path(f"{file}.tmp").exists() else ""
        diffusers = ", nor diffusers' diffusion_pytorch_model.safetensors or .bin" * (kind == "autoencoder")
        when = "training writes one at --save-every, and at last"
        raise InputError(f"{path}: no checkpoint.pt in it yet{begun}{diffusers}; {when}")
    checkpoint = load_plain(file)
    missing = CHECKPOINT - {key for key, value in checkpoint.items() if key != "config" or isinstance(value, dict)}
    if missing and kind == "autoencoder":
        published = partial(published_autoencoder, file)
    if missing and published:
        config, state = published(checkpoint)
        return {"config": config, "model": state, "ema": None, "step": 0}
    if missing:
        remedy = "published weights of a DiT, SiT or U-ViT take sample.py --ckpt FILE"
        lacks = f"it lacks {', '.join(sorted(missing))}"
        raise InputError(f"{file}: no checkpoint of {program}, {lacks}; {seems(checkpoint)}; {remedy}")
    config, given = checkpoint["config"], checkpoint.get("args") or {}
    if ("widths" in config) != (kind == "autoencoder"):
        return checkpoint
    try:
        check_form(checkpoint, FORM)
        with torch.device("meta"):
            network = NETWORKS[kind](config)
        for name in config.keys() & given.keys():
            if type(given[name]) in (int, float, str) and given[name] not in ("auto", config[name]):
                raise ValueError(f"its {name} is {shown(config[name])}, by its flags {shown(given[name])}")
    except (ValueError, InputError) as error:
        raise InputError(f"{file}: a false checkpoint, {error}") from error
    for state in filter(None, (checkpoint["model"], checkpoint["ema"])):
        load_weights(network, state, file, assign=True)
    return checkpoint


def published_autoencoder(file, checkpoint):
    """The dict in a file of published weights -> config, state dict. Raises InputError."""
    config = diffusers_config(file.parent / "config.json")
    try:
        shape, state = read_published(next(iter(state_dicts(checkpoint).values())), config)
        shape |= published_norm(config, shape["latent_channels"]) if config else {}
        with torch.device("meta"):
            stored_autoencoder(shape)  # raises where it is false
        return shape, state
    except ValueError as error:
        raise InputError(f"{file}: {error}; {seems(checkpoint)}") from error


def weights_in(path):
    """The file that a path means: itself, a run's checkpoint.pt, or in diffusers' layout that of an autoencoder's
    folder, or of a pipeline's vae/.
    """
    if not path.is_dir():
        return path
    names = (f"diffusion_pytorch_model{kind}" for kind in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin"))
    files = [folder / name for name in names for folder in (path, path / "vae")]
    return next((file for file in (path / "checkpoint.pt", *files) if file.exists()), path / "checkpoint.pt")


def diffusers_config(file):
    """The dict in a config.json of diffusers' AutoencoderKL, or None where there is none. Raises InputError."""
    try:
        config = json.loads(file.read_text()) if file.is_file() else None
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error}); mend it, or take it away") from error
    return config if isinstance(config, dict) and config.get("_class_name") == "AutoencoderKL" else None


def check_norm(norm, channels):
    """Raise ValueError where how latents of so many channels are normalised, see `vae.latent_norm`, is false."""
    by_channel = lambda check: lambda value: check(value) or each(check, (channels,))(value)
    check_form(norm, {"scale?": by_channel(real(1e-30)), "shift?": by_channel(real()), "latent_norm?": string})


def stored_autoencoder(config):
    """The VAE of a checkpoint's config. Raises ValueError where that is false."""
    check_form(config, AUTOENCODER)
    check_norm(config, config["latent_channels"])
    return VAE(*(config[name] for name in ("widths", "latent_channels", "num_res_blocks")), config.get("attention", ()))


NETWORKS = {"autoencoder": stored_autoencoder}  # config -> network, raising ValueError; train_diffusion.py adds its own
CONTENTS = (  # how files begin that hold no weights
    (r"\A\Z", "it is empty: fetch it again"),
    (r"\APK\x03\x04", "it seems to be half a file of torch.save: fetch it, or make it, again"),
    (r"\A\s*<[^\0]*\Z", "it seems to be a web page, which is what some links give: fetch the file itself"),
    (r"\Aversion https://git-lfs", "it is git-lfs's pointer to the file: git lfs pull fetches it"),
    (r"\A\s*[\[{][^\0]*\Z", "it seems to be JSON, no weights: name the file beside it that holds them"),
    (r"\A[\t\n\r -~]+\Z", "it seems to be text, no weights"),
)
LAYOUTS = (  # keys, one a line, of weights
    (r"lora_|\.lora\.", "a LoRA"),
    (r"^model\.diffusion_model\.", "a whole Stable Diffusion checkpoint"),
    (r"^(time_embedding\.|(down_blocks|mid_block)\..*transformer_blocks\.)", "diffusers' UNet"),
    (r"^transformer_blocks\.", "a transformer in diffusers' layout"),
    (r"^x_embedder\.", "a DiT or a SiT"),
    (r"^proj\.weight$", "DCTdiff's U-ViT on tokens"),
    (r"^in_blocks\.", "a U-ViT"),
    (r"(en|de)coder\.(mid_block|down_blocks|up_blocks)\.", "an autoencoder in diffusers' layout"),
    (r"(en|de)coder\.(mid|down|up)\.", "an autoencoder in the original layout"),
    (r"text_model\.encoder\.", "a text encoder"),
    (r"^lin\d\.", "the heads of LPIPS"),
    (r"^features\.\d+\.weight", "VGG-16"),
    (r"Mixed_5b\.", "Inception"),
)


def described(text, table):
    """The words of the first form in a table that is found in a text, or None."""
    return next((words for form, words in table if re.search(form, text, re.MULTILINE)), None)


def state_dicts(checkpoint):
    """Those in a published file, in the order in which they are preferred, prefixes stripped: {"ema", "state_dict",
    "model": what there is of them}, or else {"": the whole}.
    """
    checkpoint = strip_prefixes(checkpoint)
    parts = {name: checkpoint.get(name) for name in ("ema", "state_dict", "model")}
    parts = {name: strip_prefixes(part) for name, part in parts.items() if isinstance(part, dict)} or {"": checkpoint}
    arrays = lambda part: {key: v for key, v in part.items() if isinstance(v, torch.Tensor) and v.numel()}
    return {name: arrays(part) for name, part in parts.items()}


def seems(checkpoint):
    """What a dict that is not the weights asked for seems to be, by its keys, in words."""
    if CHECKPOINT <= checkpoint.keys() and isinstance(checkpoint["config"], dict):
        return f"it is a checkpoint of {PROGRAMS['widths' in checkpoint['config']]}"
    keys = list(next(iter(state_dicts(checkpoint).values())))
    words = described("\n".join(keys), LAYOUTS) or "nothing known here"
    return f"it seems to be {words} ({', '.join(keys[:2])[:80]} ...)" if keys else "it is empty"


class Ignored:
    """Takes, where a checkpoint is read, the place of an object that is neither tensor nor plain; does nothing."""

    def __init__(self, *args):
        pass

    __setstate__ = __init__


# What lies in training checkpoints beside the weights: in those of DiT, SiT and REPA, and of Lightning, as Stable
# Diffusion's and latent diffusion's are, with numpy's scalars.
LIGHTNING = ("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.dtype", "_codecs.encode")
LIGHTNING += ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
HARMLESS = [argparse.Namespace]
HARMLESS += [type(name.split(".")[-1], (Ignored,), {"__module__": name.rpartition(".")[0]}) for name in LIGHTNING]


def load_plain(file):
    """The dict of tensors and plain values in a file of torch.save, or of the tensors in one of safetensors, told apart
    by their content. Raises InputError; runs no code.
    """
    try:
        with open(file, "rb") as handle:
            head = handle.read(512)
        if not zipfile.is_zipfile(file) and (words := described(head.decode("latin-1"), CONTENTS)):
            raise InputError(f"{file}: {words}")
        if head[8:9] == b"{" and 0 in head[:8]:  # no length has more than seven bytes
            return read_safetensors(file)
        check_records(file)
        with open(file, "rb") as handle, torch.serialization.safe_globals(HARMLESS):  # no name: it would trust that
            checkpoint = torch.load(handle, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        named = "; name the file in it" * Path(file).is_dir()
        raise InputError(f"{file}: cannot be read ({error.strerror or error}){named}") from error
    except pickle.UnpicklingError as error:
        text = "refused, it holds more than tensors and plain values, or is no checkpoint"
        raise InputError(f"{file}: {text}") from error
    except Exception as error:  # torch.load raises all kinds on bytes that are no checkpoint
        text = f"{type(error).__name__} {str(error)[:120]}"
        raise InputError(f"{file}: cannot be read as a checkpoint ({text})") from error
    check_tensors(checkpoint, file)
    return checkpoint if isinstance(checkpoint, dict) else {}


def check_records(file):
    """The path of a file of weights. Raises InputError where it is one of torch.save, a .zip, whose bytes have changed:
    it holds their CRCs, which torch does not test.
    """
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as records:
                if sum(record.file_size for record in records.infolist()) > os.path.getsize(file):
                    raise InputError(f"{file}: refused, its records are compressed, as torch.save writes none")
                bad = records.testzip()
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, ValueError) as error:
            bad = error
        if bad:
            raise InputError(f"{file}: damaged, its records are not those that were written ({bad}); fetch it again")
    return file


def check_tensors(content, file):
    """Raise InputError where a tensor in nested dicts and lists is no plain array in memory as large as it says."""
    nests, seen = [content], set()
    while nests:  # no recursion: a pickle may nest, or share, without end
        value = nests.pop()
        if isinstance(value, torch.Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.nbytes > value.untyped_storage().nbytes():
                kind = f"{value.layout} {tuple(value.shape)} on {value.device}"[:200]
                raise InputError(f"{file}: refused, it holds a tensor that is no plain array ({kind})")
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            nests.extend(value.values() if isinstance(value, dict) else value)


def is_finite(tensor):
    """Whether all of a tensor is, by its ends, which nan takes over: a tenth of isfinite's time, and no copy."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    tensor = tensor if tensor.element_size() > 1 else tensor.float()
    return torch.stack(tensor.aminmax()).isfinite().all().item()


def check_finite(state, source):
    """Raise InputError where the tensors of a state dict are not finite."""
    for name, value in state.items():
        if not is_finite(value):
            raise InputError(f"{source}: its {name} is not finite: damaged; make or fetch it anew")


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
SAFETENSORS |= {"BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
HEADER_LIMIT = 100_000_000  # bytes, by the format


def read_safetensors(file):
    """The tensors of a file of safetensors, memory-mapped: 8 bytes, little-endian, the length of a JSON header {name:
    {dtype, shape, data_offsets}}, then the tensors' bytes end to end. Raises InputError where the header lies.
    """
    data = np.memmap(file, np.uint8, "c")  # copy on write, as torch wants its memory
    begin = 8 + int.from_bytes(data[:8].tobytes(), "little")

    def check(condition, otherwise):
        if not condition:
            false = "safetensors with a false header, or not all of the file"
            raise InputError(f"{file}: {false}: {otherwise[:200]}; fetch it again")

    check(begin <= min(len(data), 8 + HEADER_LIMIT), f"a header of {begin - 8} bytes in a file of {len(data)}")
    try:
        header = json.loads(data[8:begin].tobytes())
    except (ValueError, RecursionError) as error:
        check(False, f"no JSON ({str(error)[:80]})")
    check(isinstance(header, dict), "no JSON object")
    notes = header.pop("__metadata__", {})
    check(isinstance(notes, dict) and all(isinstance(v, str) for v in notes.values()), "__metadata__ is no text")
    forms = {"dtype": one_of(*SAFETENSORS), "shape": each(whole(0)), "data_offsets": each(whole(0), (2,))}
    entries, end = [], 0
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        for key, fits in forms.items():
            check(fits(entry.get(key)), f"{name!r} has the {key.removeprefix('data_')} {entry.get(key)!r}")
        dtype, shape, offsets = map(entry.get, forms)
        size = math.prod(shape) * SAFETENSORS[dtype].itemsize
        check(offsets[1] - offsets[0] == size, f"{name!r}, {shape} of {dtype}, takes {size} bytes, not {offsets}")
        entries.append((*offsets, name, SAFETENSORS[dtype], shape))
    for start, stop, name in sorted(entry[:3] for entry in entries):
        check(start == end, f"{name!r} begins at byte {start}, the tensors before it end at {end}")
        end = stop
    check(begin + end == len(data), f"{end} bytes of tensors announced, {len(data) - begin} there")
    state = {}
    for start, stop, name, dtype, shape in entries:
        part = torch.from_numpy(data[begin + start : begin + stop])  # a storage each, as torch.save wants them
        part = part.clone() if (begin + start) % dtype.itemsize else part  # torch wants its memory aligned
        state[name] = part.view(dtype).view(shape)
    return state


def run_folder(path):
    """The folder of a run given by itself or by its checkpoint file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def name_of(path):
    """A word for an autoencoder: the folder of a run, or of diffusers', else the stem of a file."""
    path = Path(path).resolve()
    ours = re.match(r"checkpoint([-.]\d+)?\.pt|best\.pt|autoencoder\.pt|diffusion_pytorch_model\.", path.name)
    return run_folder(path).name if ours or path.is_dir() else path.stem


def strip_prefixes(state):
    """Keys without what DDP and torch.compile put before them, in any order."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", str(key)): value for key, value in state.items()}


def load_weights(network, state, source, assign=False):
    """Strict load, prefixes stripped. Raises InputError on another architecture, or on what are no finite weights."""
    state = strip_prefixes(state)
    check_weights(state, network, source)
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        name = type(network).__name__
        raise InputError(f"{source}: weights of another architecture than this {name}: {lines}") from error


def check_weights(state, network, source):
    """Raise InputError where what a network would take from a state dict is not finite, or not of its kind."""
    ours = network.state_dict()
    taken = {key: value for key, value in state.items() if key in ours}
    for key, value in taken.items():
        if not isinstance(value, torch.Tensor) or value.is_floating_point() != ours[key].is_floating_point():
            kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
            raise InputError(f"{source}: its {key} is of {kind}, no weights: damaged; make or fetch it anew")
    check_finite(taken, source)


def initialize(network, checkpoint, path, allow_partial):
    """Give a new run's network the weights of a checkpoint, their average where there is one -> a line that says so.
    Raises InputError where tensors differ in name or shape and may not be left as they are, or where no weights fit.
    """
    theirs, ours = strip_prefixes(checkpoint["ema"] or checkpoint["model"]), network.state_dict()

    def shape(state, key):
        return tuple(getattr(state[key], "shape", ())) if key in state else "none"

    keys = {**ours, **theirs}
    fits = {key: value for key, value in theirs.items() if shape(theirs, key) == shape(ours, key)}
    others = [f"{key} {shape(theirs, key)} there, {shape(ours, key)} here" for key in keys if key not in fits]
    text, config = "; ".join(others[:3]) + "; ..." * (len(others) > 3), checkpoint["config"]
    name = config.get("model") or config.get("preset") or "published"
    check_weights(fits, network, f"--init {path}")
    if not any(value.ndim > 1 for value in fits.values()):
        raise InputError(f"--init {path}: {name}, whose weights do not fit this {type(network).__name__} ({text})")
    if others and not allow_partial:
        remedy = f"--init-partial begins with the {len(fits)} that fit"
        raise InputError(f"--init {path}: {len(others)} of {len(keys)} tensors differ ({text}); {remedy}")
    network.load_state_dict(fits, strict=False)
    line = f"init     {path}, {name}" + (f", step {checkpoint['step']}" if checkpoint["step"] else "")
    return line + (f"\n         {len(others)} of {len(keys)} tensors differ and stay new: {text}" if others else "")


def load_autoencoder(path, device):
    """-> the frozen VAE of a run of train_vae.py or of published weights, and its checkpoint without the weights, with
    "weights", their hash. The average of the weights is taken where there is one. Raises InputError.
    """
    checkpoint = read_checkpoint(path, "autoencoder")
    with torch.device("meta"):
        vae = stored_autoencoder(checkpoint["config"]).requires_grad_(False)
    load_weights(vae, checkpoint["ema"] or checkpoint["model"], path, assign=True)
    weights = fingerprint(vae.state_dict())  # in one order, whatever the file's
    info = {key: checkpoint.get(key) for key in ("config", "step", "args", "latent", "val")}
    return vae.to(device, torch.float32).eval(), info | {"weights": weights}


def fingerprint(state):
    """Hash of a state dict's values: two models that draw different images differ in it."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# ---- shared by all programs: encoders and scores ----------------------------------------------------------


@torch.no_grad()
def open_encoder(spec, size, processes, resolution=PATCH_ENCODER_SIZE):
    """`--encoder`, fetched by local rank 0 alone -> it, and its tokens (1, T, D) of a blank image. Raises InputError
    where it cannot be had, or takes no images of `size`, or gives no square grid of tokens.
    """
    try:
        encoder = processes.local_first(partial(load_encoder, spec, processes.device, resolution))
        check_finite(encoder.state_dict(), f"--encoder {spec}")
    except ValueError as error:
        raise InputError(f"--{error}") from error
    try:
        tokens = encoder(torch.zeros(1, 3, size, size, device=processes.device))[0]
        as_map(tokens)
    except Exception as error:  # whatever the encoder's own code raises
        raise InputError(f"--encoder {spec} on images of {size} px: {error}") from error
    return encoder, tokens


class Features:
    """`--features`, called with images (N, 3, size, size) uint8 -> features (N, D) float32 on the CPU. Attributes:
    encoder, device, width (D). Raises InputError.
    """

    def __init__(self, spec, weights, size, device):
        self.device = device
        try:
            self.encoder = load_encoder(spec, device, antialias=True, weights=weights and check_records(weights))
            check_finite(self.encoder.state_dict(), f"--features {spec}")
            self.width = self(torch.zeros(1, 3, size, size)).shape[1]
        except ValueError as error:
            raise InputError(f"--features {spec}: {error}" + "; or use inception" * (spec != "inception")) from error

    @torch.no_grad()
    def __call__(self, images):
        return self.encoder(images.to(self.device) / 127.5 - 1)[1].float().cpu()


def crop_text(size):
    return f"centre, box halving, bicubic to {size}"


def score_names(features):
    """{key in scores.jsonl: name}, in the table's order. Only distances of Inception's features are called FID, KID."""
    distances = ("FID", "KID") if features == "inception" else ("Frechet distance", "kernel distance")
    names = {"frechet_distance": distances[0], "floor": "  its floor", "kid": distances[1]}
    return names | {"inception_score": "Inception Score", "precision": "precision", "recall": "recall"}


def record_score(folder, result):
    """Print a score as a table with its protocol, and add it to scores.jsonl in a folder."""
    protocol, names = dict(result), score_names(result["features"])
    n, reference, half = (protocol.pop(key, None) for key in ("images", "reference_images", "floor_images"))
    counts = {"floor": (half, half), "inception_score": (n, "-")}
    over = {"kid": f"{KID_SUBSETS} subsets of {protocol.pop('kid_subset_size', '-')}"}
    over["inception_score"] = f"{ISC_SPLITS} splits"
    print(f"{'':18}{'value':>10}{'images':>9}{'reference':>11}{'std':>9}")
    for key, name in names.items():
        if key in protocol:
            value, spread = protocol.pop(key), protocol.pop(f"{key}_std", None)
            ours, theirs = (f"{m:,}" if isinstance(m, int) else m or "?" for m in counts.get(key, (n, reference)))
            row = f"{name:18}{'-' if value is None else f'{value:.5g}':>10}{ours:>9}{theirs:>11}"
            print(row if spread is None else f"{row}{spread:>9.2g}  {over[key]}")
    for key, entry in protocol.items():
        print(f"  {key:18} {entry}")
    if (least := min(n, reference or n)) < 10_000:
        unbiased = f" ({names['kid']} is not)" if result.get("kid") is not None else ""
        biased = f"below 10,000 the distance is biased upwards{unbiased}"
        print(f"  note: {least} images; {biased}: compare equal counts only")
    append_json(Path(folder) / "scores.jsonl", result)


# ---- shared by both trainers: a run -----------------------------------------------------------------------

BAD_STEPS = 10  # non-finite ones in a row that stop a run
WARM_UP = 2  # steps that a benchmark does not count
# Flags that may change when a run goes on; what data it is, is compared by what it holds.
FREE = """
    steps grad_accum device workers compile log_every eval_every save_every snapshot_every keep_last fresh benchmark
    out data val cache features features_weights lpips_vgg lpips_heads eval_images eval_only spectrum encode ckpt
    latents vae cache_targets rmsc init_partial defaults
""".split()


def learning_rate(step, lr, warmup, steps, decay, taken=None):
    """Linear warm-up over steps an optimizer has `taken` (None: all), then constant, or linearly to 0 at `steps`."""
    rate = lr * min(1, ((step if taken is None else taken) + 1) / max(warmup, 1))
    return rate * (1 - step / steps) if decay == "linear" else rate


@torch.no_grad()
def update_ema(averaged, network, step, decay):
    """Exponential moving average of all parameters, with warm-up: decay_n = min(decay, (1 + n) / (10 + n))."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)


def count_flops(loss):
    """FLOPs of loss() and its backward pass, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode  # takes long to import

    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def matmul_rate(device, dtype):
    """This machine's own FLOP/s in one square matrix product, the best of five."""
    from torch.utils.benchmark import Timer

    n = 8192 if device.type == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.timeit(1).mean for _ in range(5))


def read_metrics(file):
    """The lines of a metrics.jsonl, dicts with a step, and how many others there are."""
    lines, broken = [], 0
    for text in file.read_bytes().split(b"\n") if file.exists() else ():
        try:
            line = json.loads(text)
            check_form(line, {"step": whole(0), "val_loss?": lambda value: type(value) in (int, float)})
            lines.append(line)
        except (ValueError, RecursionError):
            broken += bool(text)
    return lines, broken


class Log:
    """metrics.jsonl, the bar or lines, and timers. Sums stay on the device, so that steps never wait between lines."""

    def __init__(self, run, count, flops, dtype):
        self.run, self.processes, self.device, self.count = run, run.processes, run.processes.device, count
        self.file, self.best, self.flops = run.folder / "metrics.jsonl", math.inf, flops
        self.peak = matmul_rate(self.device, dtype) * self.processes.world if flops else 1  # FLOP/s
        self.bad_runs, self.worst_run = {}, torch.zeros((), device=self.device)
        if self.processes.main and self.file.exists():  # lines after the step resumed from will be made again
            lines, broken = read_metrics(self.file)
            kept = [line for line in lines if line["step"] < run.step + (run.evaluated or "lr" in line)]
            text = "".join(f"{json.dumps(line)}\n" for line in kept)
            write_atomically(self.file, lambda f: f.write(text.encode()))
            self.best = min([line.get("val_loss", math.inf) for line in kept], default=math.inf)
            if broken:
                run.processes.print(f"{self.file}: {broken} broken lines, as a power cut leaves them, are left out")
        hidden = not (self.processes.main and sys.stderr.isatty())
        self.bar = tqdm(None, "train", run.steps, unit="step", initial=run.step, dynamic_ncols=True, disable=hidden)
        HELD.callback(self.bar.close)  # before an error is printed
        self._begin(run.step)

    def _begin(self, step):
        self.sums, self.tried = {}, 0
        self.restart_clock(step)

    def restart_clock(self, step):
        self.started, self.first_step, self.seconds = time.perf_counter(), step, {}

    @contextlib.contextmanager
    def timer(self, name):
        """Count the seconds of a block; in a benchmark those of the device as well."""
        start = time.perf_counter()
        yield
        if self.run.benchmark and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0) + time.perf_counter() - start

    def add(self, name, values, where=None, bins=1):
        """Count values, (n,) or a scalar, in the mean called `name`, or in `bins` means, where (n,) saying which."""
        values = values.detach().float().view(-1)
        where, finite = torch.zeros_like(values).long() if where is None else where, values.isfinite()
        sums = self.sums.setdefault(name, torch.zeros(2, bins, device=self.device))
        sums.index_add_(1, where, torch.stack((values.where(finite, 0), finite.float())))

    def add_step(self, norm, optimizer):
        """Count a step of an optimizer by its gradient norm; one that is not finite was skipped."""
        self.tried += 1
        self.add("grad_norm", norm)
        self.bad_runs[optimizer] = torch.where(norm.isfinite(), 0, self.bad_runs.get(optimizer, 0) + 1)
        self.worst_run = torch.maximum(self.worst_run, self.bad_runs[optimizer])

    def end_step(self, step, lr, due):
        """Write a line where one is due. Raises InputError after ten non-finite steps in a row."""
        self.bar.update()
        if self.run.benchmark and step == WARM_UP:
            self._begin(step)
        if not due:
            return
        taken, worst, batch, steps = int(self.sums["grad_norm"][1]), int(self.worst_run), self.run.batch, self.run.steps
        elapsed, line = time.perf_counter() - self.started, {"step": step, "images": step * batch, "lr": lr}
        for name, sums in self.sums.items():
            means = [total / count if count else None for total, count in zip(*self.processes.sum(sums).tolist())]
            line[name] = means if len(means) > 1 else means[0]
        rate = (step - self.first_step) * batch / elapsed
        line |= {"epoch": step * batch / self.count, "skipped_steps": self.tried - taken}
        line |= {"images_per_s": round(rate, 1), "data_wait": round(self.seconds.get("data", 0) / elapsed, 4)}
        if self.flops:
            line["share_of_peak"] = round(rate * self.flops / self.peak, 4)
        self.write(**line)
        loss = "-" if line.get("loss") is None else f"{line['loss']:.4f}"
        self.bar.set_postfix_str(f"loss {loss}, {rate:.0f} img/s", refresh=False)
        if self.bar.disable:
            left = duration((steps - step) * batch / rate)
            self.processes.print(f"step {step}/{steps}  loss {loss}  {rate:.0f} img/s  {left} left")
        if worst >= BAD_STEPS:
            skipped = f"{worst} steps in a row up to {step} were not finite and were skipped"
            raise InputError(f"{skipped}; {self.run.last_good()}")
        self._begin(step)

    def write(self, **entry):
        if self.processes.main:
            append_json(self.file, entry)

    def benchmark(self, steps):
        """Print what the timers say of so many steps."""
        total, world, write = sum(self.seconds.values()) / steps, self.processes.world, self.processes.print
        parts = " + ".join(f"{seconds / steps * 1e3:.1f} {name}" for name, seconds in self.seconds.items())
        n, peak = self.run.batch // world, self.peak / world / 1e9  # images and GFLOP/s of a process
        rate = self.flops * n / total / 1e9
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            import resource  # Windows has none

            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        write(f"step         {total * 1e3:8.1f} ms = {parts}, mean of {steps}")
        write(f"training     {n * world / total:8.1f} images/s, batch {n} x {world}")
        write(f"arithmetic   {rate:8.1f} GFLOP/s a process, {rate / peak:.0%} of its {peak:.0f} in one matrix product")
        write(f"peak memory  {memory / 2**20:8.0f} MiB")


def binding(flags):
    """The flags that a run must go on with. Where an encoder or --init lies may change, not which one it is."""
    names, encoder = {name: value for name, value in flags.items() if name not in FREE}, flags.get("encoder") or ""
    return names | {"encoder": encoder.rpartition(":")[2] or None, "init": Path(flags.get("init") or "").name or None}


KEPT_TWICE = 10**9  # bytes of a checkpoint below which the one before it is kept
SCALER = {"scale": real(1e-30), "growth_factor": real(1), "backoff_factor": real(0, 1), "growth_interval": whole(1)}
SCALER |= {"_growth_tracker": whole(0)}


def load_part(part, state, source):
    """Load what `Run.save` wrote of a module, of AdamW (the moments: its settings are those of the flags) or of a
    GradScaler. Raises InputError where it is another's, or its values are not finite.
    """
    try:
        if not isinstance(state, dict):
            raise ValueError("is missing")
        if isinstance(part, nn.Module):
            return load_weights(part, state, source)
        if isinstance(part, torch.optim.Optimizer):
            check_moments(part, state.get("state"))
            return part.load_state_dict({"state": state["state"], "param_groups": part.state_dict()["param_groups"]})
        check_form(state, SCALER)
        part.load_state_dict(state)
    except ValueError as error:
        remedy = "remove checkpoint.pt to go on from an older one, or name another --out"
        raise InputError(f"{source}: {error}; {remedy}") from error


def check_moments(optimizer, moments):
    """Raise ValueError where AdamW's moments by parameter are not those of its parameters, or not finite:
    load_state_dict takes any, and a step on one of another shape ends the process.
    """
    parameters = optimizer.param_groups[0]["params"]
    if not isinstance(moments, dict) or (moments and moments.keys() != set(range(len(parameters)))):
        raise ValueError(f"has not the moments of all {len(parameters)} parameters")
    for i, entry in moments.items():
        for name, shape in {"step": (), "exp_avg": parameters[i].shape, "exp_avg_sq": parameters[i].shape}.items():
            value, form = entry.get(name) if isinstance(entry, dict) else None, f"{torch.float32} {tuple(shape)}"
            kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else shown(value)
            if kind != form:
                raise ValueError(f"{name} of parameter {i} is {kind}, not {form}")
            if not is_finite(value) or (name != "exp_avg" and (value < 0).any()):
                raise ValueError(f"{name} of parameter {i} is not finite, or negative")


class Run:
    """A run of a trainer: its folder, its optimizers, and what follows each step. The same command resumes.

    Attributes: folder, checkpoint (resumed from, or {}), step (where this command begins), steps, batch, share (this
    process's slice of a batch), micro (images at a time). `args` are those of `add_training_flags`.
    """

    def __init__(self, args, kind, processes):
        self.args, self.processes, self.batch, self.benchmark = args, processes, args.batch, args.benchmark
        if args.batch % (processes.world * args.grad_accum):
            divisor = f"{processes.world} processes x --grad-accum {args.grad_accum}"
            raise InputError(f"--batch {args.batch}: must be a multiple of {divisor}")
        if args.init_partial and not args.init:
            raise InputError("--init-partial: means nothing without --init FILE")
        local = args.batch // processes.world
        self.share, self.micro = slice(processes.rank * local, (processes.rank + 1) * local), local // args.grad_accum
        self.steps, self.folder, self.cache = args.steps, Path(args.out), args.cache
        if args.benchmark:
            self.steps, self.folder = args.benchmark + WARM_UP, processes.scratch()
            self.cache = self.folder
        self.kind, self.checkpoint = kind, self._open(kind)
        self.step = self.checkpoint.get("step", 0)
        self.saved, self.owed = self.step, False  # whether checkpoint.pt waits for a finite step
        # A killed command may have saved the last step and not evaluated it: the line is written when all is there.
        lines = [line["step"] for line in read_metrics(self.folder / "metrics.jsonl")[0] if "lr" not in line]
        evaluated = self.step in lines and self.picture(self.step).exists()
        evaluated = evaluated or not self.checkpoint or self.step > self.steps or not self.evaluates(self.step)
        step, self.evaluated = processes.agree((self.step, evaluated))
        if step != self.step:
            read = f"process {processes.rank} could read step {self.step}, process 0 step {step}"
            raise InputError(f"{self.folder}: {read}; the same command tries again")
        self.finished = self.step >= self.steps and self.evaluated
        self.counts_flops = bool(args.benchmark) or processes.device.type == "cuda"
        processes.barrier()  # all have looked before any writes

    def evaluates(self, step):
        """Whether an evaluation is due after a step."""
        return step == self.steps or step % self.args.eval_every == 0

    def picture(self, step):
        """The file that an evaluation draws."""
        return self.folder / "samples" / f"step{step:07d}.png"

    def _open(self, kind):
        """The checkpoint to resume from, or {}. Raises InputError where RUN is another's or made with other flags."""
        run, args = self.folder, self.args
        if run.exists() and not run.is_dir():
            raise InputError(f"--out {run}: is a file; name a folder")
        tokens = Path(getattr(args, "cache_targets", None) or "samples").name
        ours = ("metrics.jsonl", "samples", "checkpoint", "autoencoder.pt", "best.pt", ".lock", tokens)
        names = lambda: [file.name for file in run.iterdir()] if run.exists() else []
        saved = lambda: run.exists() and ((run / "checkpoint.pt").exists() or older_checkpoints(run))
        others = [] if saved() else [name for name in names() if not name.startswith(ours)]
        if names() and self.processes.main and not others and not self.benchmark:
            HELD.enter_context(hold(run, "--out"))
        if saved():
            if args.fresh:
                raise InputError(f"--fresh: {run} holds a run; --fresh starts in an empty folder, name another --out")
            checkpoint, now = read_checkpoint(run, kind), binding(vars(args))
            before = binding(args.defaults | (checkpoint.get("args") or {}))
            changed = [name for name in now if before.get(name) != now[name]]
            if changed:
                text = "; ".join(f"{flag_name(n)} {before.get(n)} there, {now[n]} now" for n in changed)
                raise InputError(f"{run} was made with other arguments: {text}. Give the same, or another --out")
            return checkpoint
        if others or (args.fresh and set(names()) - {".lock"}):
            content = ", ".join(others[:3]) or "a started run"
            raise InputError(f"--out {run} holds {content} and no checkpoint; name an empty folder")
        return {}

    def open_images(self, spec, size, few):
        """The images of --data, or a few of them."""
        images = self.processes.local_first(lambda: Images(spec, size))
        self.check_data(images.identity(), f"--data {spec}")
        if few:
            images.thin(2**24 // size**2)
            start, count = time.perf_counter(), min(64, len(images))
            for i in range(count):
                images.read(i)
            text = f"{(time.perf_counter() - start) / count * 1e3:8.2f} ms/image, file to pixels, one process"
            self.processes.print(f"decode       {text}")
        return images

    def check_data(self, identity, flag):
        """Raise InputError where the data is not what the run began with."""
        self.data, began = identity, self.checkpoint.get("data", {})
        for name, value in identity.items():
            if began.get(name, value) != value:
                changed = f"then its {name} {began[name]}, now {value}. Restore it, or name another --out"
                raise InputError(f"{flag} has changed since {self.folder} was begun: {changed}")

    def optimizer(self, network):
        # fused: one kernel, and a GradScaler's skip of a non-finite step without waiting for the device
        args, trained = self.args, [p for p in network.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, args.lr, tuple(args.betas), weight_decay=args.weight_decay, fused=True)

    def start(self, parts, facts, evaluate, indices, flops, dtype):
        """Resume, make the folder, and begin the log.

        parts: {name: module, optimizer, or None}, saved by their state dicts; facts() -> plain values beside them;
        evaluate(step) -> (figures for metrics.jsonl, text, val_loss or None), on process 0 alone; indices of the
        images; flops of one, or 0 where they are not wanted; dtype of the networks' products.
        """
        # Without fp16 the scale stays 1 and only the skipping of non-finite steps is used.
        self.half = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.processes.device.type, init_scale=2.0**16 if self.half else 1.0)
        self.parts, self.facts, self.evaluate, self.indices = parts | {"scaler": self.scaler}, facts, evaluate, indices
        for name, part in self.parts.items() if self.checkpoint else ():
            begun = name == "scaler" and self.half and self.checkpoint.get(name, {}).get("scale") == 1.0  # without fp16
            if part is not None and not begun:
                load_part(part, self.checkpoint.get(name), f"{self.folder}, the checkpoint's {name}")
        if self.processes.main:
            HELD.enter_context(hold(self.folder, "--out"))
            if not self.checkpoint and (self.folder / "checkpoint.pt").exists():
                raise InputError(f"--out {self.folder}: another command has begun it; the same command again goes on")
        write, processes = self.processes.print, f"{self.processes.world} x {self.processes.device.type}"
        epochs = self.steps * self.batch / len(indices)
        write(f"training {self.steps} steps of {self.batch} = {epochs:.1f} epochs, on {processes}")
        write(f"         into {self.folder}" + (f", resumed at step {self.step}" if self.checkpoint else ""))
        self.log = Log(self, len(indices), flops, dtype)
        if not self.evaluated and (stop := self._evaluate()):
            self._stop(stop)
        self.log.restart_clock(self.step)
        return self.log

    def batches(self, pixels=None, moments=None, tokens=None, stop=None):
        """From the next step up to `stop`: step, where (n,) and flip (n,) on the CPU, and of this process's images what
        is asked for, on the device: pixels (n, 3, S, S) uint8, moments and tokens, of mirror images where flip. A
        thread prepares them one step ahead.
        """
        args, device, first, stop = self.args, self.processes.device, self.step, min(stop or self.steps, self.steps)
        order = DataOrder(len(self.indices), self.batch, args.seed)

        def put(values):
            values = values.pin_memory() if device.type == "cuda" else values
            return values.to(device, non_blocking=True)

        def load():
            wanted = (self.indices[order(step)[self.share].numpy()] for step in range(first, stop))
            stream = pixels.stream(wanted) if pixels else ((where, None) for where in wanted)
            for step, (where, images) in enumerate(stream, first):
                flip = torch.rand(self.batch, generator=generator(args.seed, step, FLIPS)) < 0.5
                flip = (flip & args.flip)[self.share]
                sources = (records and put(records.read(where, flip.numpy())).float() for records in (moments, tokens))
                yield step, torch.from_numpy(where), flip, put(images) if pixels else None, *sources

        following = prefetch(load())
        for _ in range(first, stop):
            with self.log.timer("data"):
                batch = next(following)
            yield batch

    def parts_of(self, count):
        """The slices of --grad-accum, and whether each is the last."""
        for start in range(0, count, self.micro):
            yield slice(start, start + self.micro), start + self.micro >= count

    def backward(self, loss):
        self.scaler.scale(loss / self.args.grad_accum).backward()

    def take_step(self, optimizer, step, taken=None):
        """Clip the gradients and step; one whose gradients are not finite is skipped, and counted. -> learning rate"""
        args = self.args
        rate = learning_rate(step, args.lr, args.warmup, self.steps, args.lr_decay, taken)
        (group,) = optimizer.param_groups
        group["lr"] = rate
        self.scaler.unscale_(optimizer)
        self.log.add_step(nn.utils.clip_grad_norm_(group["params"], args.clip or math.inf), optimizer)
        self.scaler.step(optimizer)
        self.scaler.update(None if self.half else 1.0)
        optimizer.zero_grad(set_to_none=True)
        return rate

    def end_step(self, step, rate):
        """Log, save and evaluate after step number `step`, where it is due."""
        args, log, last = self.args, self.log, step == self.steps
        self.step = step
        log.end_step(step, rate, not self.benchmark and (last or step % args.log_every == 0))
        stop = self.processes.asked_to_stop()
        if self.benchmark:
            return self._stop(stop) if stop else log.benchmark(step - WARM_UP) if last else None
        self.owed |= last or step % args.save_every == 0
        saving, evaluating = self.owed, self.evaluates(step) and not stop
        snapshot = args.snapshot_every and step % args.snapshot_every == 0
        if self.processes.main and (saving or snapshot) and self._made_a_finite_step():
            if snapshot:
                self.save(f"checkpoint-{step:07d}.pt")
            if saving:
                self.save("checkpoint.pt")
        if last:
            log.bar.close()
        if stop or (stop := evaluating and self._evaluate()):
            self._stop(stop)
        if saving or evaluating:
            log.restart_clock(step)

    def _stop(self, number):
        """Raise Stopped in all processes, after the same step, which is saved."""
        if self.processes.main and not self.benchmark and self.saved < self.step and self._made_a_finite_step():
            self.save("checkpoint.pt")
        self.processes.barrier()  # torchrun ends the others where one has ended
        saved = "" if self.saved == self.step or self.benchmark else f" (step {self.saved} is saved)"
        raise Stopped(number, f" at step {self.step}{saved}")

    def _made_a_finite_step(self):
        """Whether the last step was one, of all optimizers: else what is to be saved waits. Raises InputError where it
        cannot wait; fp16 skips single steps while its scale adapts, which is no reason.
        """
        skipped = max(map(int, self.log.bad_runs.values()), default=0)
        last = self.step == self.steps
        if skipped and last and not self.half:
            raise InputError(f"the last {skipped} steps were not finite and were skipped; {self.last_good()}")
        return last or not skipped

    def last_good(self):
        """What there is to go on from after steps that were not finite, and what may do."""
        good = f"{self.folder}/checkpoint.pt, of step {self.saved}, is the last good one"
        remedy = f"Lower --lr {self.args.lr:g}, or --amp off"
        return f"{good if self.saved else 'none was saved before'}. {remedy}"

    def _finite_state(self):
        """The state of all parts, its bytes. Raises InputError where not all of it is finite, which no step mends."""
        state = {key: part and part.state_dict() for key, part in self.parts.items()}
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        if not all(map(is_finite, tensors)):
            raise InputError(f"the weights of step {self.step} are not finite; {self.last_good()}")
        return state, sum(tensor.nbytes for tensor in tensors)

    def _evaluate(self):
        """The evaluation of this step, by process 0; its line in metrics.jsonl, the last, says that all of it is there.
        -> the number of a signal that has asked any process to stop, or 0.
        """
        with contextlib.suppress(Stopped):  # the same command makes it
            if self.processes.main:
                self._finite_state()  # or it would measure nan
                if not self.folder.is_dir():
                    raise InputError(f"{self.folder}: removed while it was trained; the same command begins it anew")
                figures, text, val_loss = self.evaluate(self.step)
                if val_loss is not None:
                    figures, text = figures | {"val_loss": val_loss}, f"val_loss {val_loss:.4f}, {text}"
                self.processes.print(f"step {self.step}/{self.steps}  {text}")
                if val_loss is not None and val_loss < self.log.best and self._made_a_finite_step():
                    self.log.best = val_loss
                    self.save("best.pt")
                self.log.write(step=self.step, **figures)
        return self.processes.asked_to_stop()

    def save(self, name):
        """Write a checkpoint and read it back; of checkpoint.pt, the ones before it stay as --keep-last says."""
        (state, size), file = self._finite_state(), self.folder / name
        # the data order and every random draw of the steps to come follow from seed and step
        state |= {"step": self.step, "images_seen": self.step * self.batch, "data": self.data}
        state |= {"args": binding(vars(self.args)) | {"data": self.args.data}} | self.facts()

        def check(written):
            if size >= KEPT_TWICE:
                check_records(written)  # to open it would take as much memory again
            elif read_checkpoint(written, self.kind)["step"] != self.step:
                raise OSError(errno.EIO, "what was written is read back otherwise")
            if name == "checkpoint.pt":
                keep_older(file, self.args.keep_last or (2 if size < KEPT_TWICE else 1))

        write_atomically(file, lambda handle: torch.save(state, handle), takes=size, check=check)
        if name == "checkpoint.pt":
            self.saved, self.owed = self.step, False


def keep_older(file, count):
    """Make checkpoint.pt checkpoint.1.pt as well, that checkpoint.2.pt, and so on, `count` in all with a new one."""
    older = [file, *(file.with_suffix(f".{i}.pt") for i in range(1, count))]
    for new, old in reversed(list(zip(older, older[1:]))):
        with contextlib.suppress(InputError):  # one that is damaged takes no sound one's place
            if zipfile.is_zipfile(check_records(new)):
                old.unlink(missing_ok=True)
                try:
                    os.link(new, old)  # so that it is never missing
                except OSError:  # not on every file system
                    new.replace(old)


# ---- command line -----------------------------------------------------------------------------------------


def flag_name(name):
    """keep_threshold -> --keep-threshold"""
    return f"--{name.replace('_', '-')}"


class Help(argparse.RawDescriptionHelpFormatter):
    """Every default in its flag's help."""

    def _get_help_string(self, action):
        default = action.default
        text = action.help.replace(" (default: %(default)s)", "")  # argparse adds it to switches: True or False
        if isinstance(action, argparse.BooleanOptionalAction) and default is not None:
            default = "on" if default else "off"
        if "default:" in text or default is None or default is False or default == argparse.SUPPRESS:
            return text
        return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"


class Parser(argparse.ArgumentParser):
    """Errors of one line, and defaults that follow from other flags, which --help shows."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Help, add_help=False)

    def error(self, message):
        raise InputError(message[:1000])  # a value may be long

    def complete(self, argv, recipe=lambda first: {}):
        """The arguments; recipe(a first look at them) -> what those are that are not given."""
        first = self.parse_known_args(argv)[0]
        check_texts(vars(first))
        self.set_defaults(**recipe(first))
        self.add_argument("-h", "--help", action="help", help="show this")
        args = self.parse_args(argv)
        args.defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        return args


def check_texts(flags):
    """Raise InputError where a value is empty, or where what may be a path can be none."""
    for name, value in flags.items():
        flag, wrong = "RUN_OR_CKPT" if name == "run" else flag_name(name), None
        texts = value if isinstance(value, list) else [value]
        for text in (text for text in texts if isinstance(text, str)):
            if not text:  # "$UNSET"
                raise InputError(f"{flag}: its value is empty; give it one, or leave it out")
            try:
                os.stat(text)
            except ValueError:
                wrong = "holds a NUL byte, which no name does; name another"
            except OSError as error:
                if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP) and name != "model":
                    wrong = f"{error.strerror}; name another"
                elif os.path.islink(text):
                    wrong = "a link to nowhere; name another"
            if isinstance(value, str) and value.startswith("~"):  # as in --out=~/run
                wrong = "the shell has left ~ as it is; $HOME does, or ./~ for that name"
            if wrong:
                raise InputError(f"{flag} {text[:80]!r}: {wrong}")


def at_least(minimum, kind=int, most=10**9):
    """An argparse type: a number from `minimum` to `most`, which no one needs and memory survives."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if minimum <= value <= most:
            return value
        bound = f"at most {most:,}" if value > most else f"at least {minimum:g}"
        name = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:40]} must be {name} of {bound}")

    return number


def fraction(text):
    """An argparse type: a number in [0, 1)."""
    value = at_least(0, float)(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text} must lie in [0, 1)")
    return value


def add_device_flags(add):
    """The flags of all programs that say where and in which precision they run."""
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where it runs")
    amp = "precision of the networks; auto: bf16 where the hardware multiplies it, else fp16 on CUDA, off on a CPU"
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"), help=amp)


def add_training_flags(parser):
    """The flags of both trainers that read the same."""
    count, number, switch = at_least(1), at_least(0, float), argparse.BooleanOptionalAction
    add = parser.add_argument_group("optimizer").add_argument
    add("--steps", type=count, metavar="N", help="optimizer steps")
    add("--batch", type=at_least(1, most=2**20), metavar="GLOBAL", help="images a step, over all processes")
    add("--grad-accum", type=count, default=1, metavar="N", help="parts that a process's share is cut into")
    add("--lr", type=number, metavar="X", help="AdamW learning rate")
    add("--lr-decay", choices=("none", "linear"), help="after warm-up: constant, or linearly to 0 at --steps")
    add("--warmup", type=at_least(0), metavar="N", help="steps of linear warm-up")
    add("--betas", type=fraction, nargs=2, metavar=("B1", "B2"), help="AdamW betas")
    add("--weight-decay", type=number, metavar="X", help="AdamW weight decay")
    add("--clip", type=number, metavar="X", help="largest gradient norm, 0 for none")
    add("--ema", type=fraction, metavar="X", help="decay of the average of the weights, 0 for none")
    add = parser.add_argument_group("run").add_argument
    add_device_flags(add)
    add("--compile", action="store_true", help="torch.compile the network")
    add("--cache", metavar="DIR", default="cache", help="folder of decoded images, which all runs share")
    add("--flip", action=switch, default=True, help="mirror half of the images")
    add("--seed", type=at_least(0, most=2**63 - 1), default=0, metavar="N", help="of weights, data order and noise")
    workers = "processes that decode images (default: cores, at most 8)"
    add("--workers", type=at_least(0, most=1024), metavar="N", help=workers)
    add("--log-every", type=count, default=50, metavar="N", help="steps a metrics line")
    add("--eval-every", type=count, default=1000, metavar="N", help="steps between evaluations")
    add("--save-every", type=count, default=500, metavar="N", help="steps between checkpoints")
    last = "checkpoints that stay, checkpoint.1.pt the one before checkpoint.pt (default: 2, from 1 GB on 1)"
    add("--keep-last", type=count, metavar="K", help=last)
    add("--snapshot-every", type=count, metavar="N", help="keep a numbered checkpoint every N steps (default: none)")
    add("--fresh", action="store_true", help="never resume: --out must be empty")
    init = "begin with the network's weights (the average, where there is one) of a run or of published weights"
    add("--init", metavar="RUN_OR_FILE", help=f"{init}; a run that goes on no longer reads them (default: random)")
    add("--init-partial", action="store_true", help="where tensors of --init differ in name or shape, random ones")
    add("--benchmark", type=at_least(0), default=0, metavar="N", help="time N steps part by part, leave nothing behind")


def run_program(main, parse):
    """main(parse()); a user's mistake, what cannot be read or written, or the loss of another process as one line and
    exit code 2, a signal's request as one line and 128 + its number.
    """
    for name in ("stdout", "stderr"):  # None where it is closed, as >&- does
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    for name in ("stdout", "stderr"):  # None where it is closed, as >&- does
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files and classes may hold what no terminal shows
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, ask_to_stop)
    first, where, number = int(os.environ.get("RANK", 0)) == 0, "", None
    try:
        return main(parse())
    except Stopped as error:
        number, where = error.args
    except (InputError, OSError) as error:
        file = getattr(error, "filename", None)
        mistake = f"{file}: {error.strerror}" if file else error
    except RuntimeError as error:  # of a broken collective
        if not isinstance(error, dist.DistError) and not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        reason = re.sub(r"^\[.*?\] ", "", str(error).strip()).partition("\n")[0][
            :100
        ]  # without the place in Gloo's code
        mistake = f"another process has probably ended, the same command goes on from what is saved ({reason})"
        number = asked.get("signal")
    if number:
        if first:
            print(f"stopped{where} by {signal.Signals(number).name}: the same command goes on", file=sys.stderr)
        sys.exit(128 + number)
    if not first:  # process 0 has most likely met the same and says so, and torchrun ends the others
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        time.sleep(3)
    print(one_line(f"error: {mistake}"), file=sys.stderr)
    sys.exit(2)


# ---- flags of this program --------------------------------------------------------------------------------


def recipe(first):
    """Defaults that follow from the flags that were given."""
    preset = first.preset
    if first.eval_only and first.ckpt:
        preset = read_checkpoint(first.ckpt, "autoencoder")["config"].get("preset")
    values = dict(TINY if preset == "tiny" else PUBLISHED)
    if first.eval_only or first.spectrum or first.encode:  # they take size and data from the autoencoder
        values |= {"size": None, "batch": 32} | ({"features": "none"} if first.spectrum else {})
        if first.lpips_vgg or first.lpips_heads:
            values["lpips_weight"] = 1.0  # any weight measures
        return values
    size, factor = first.size or values["size"], 2 ** (len(PRESETS[first.preset]["widths"]) - 1)
    data = first.data or "dead-leaves"
    out = f"runs/{short_name(data)}-{size}-{first.preset}-{first.regularizer}"
    return values | {"data": data, "out": out, "esm_blur": blurs(size // factor)}


def parse(argv=None):
    parser = Parser(__doc__)
    add, weight = parser.add_argument_group("data").add_argument, at_least(0, float)
    data = "folder, .zip, cifar10, dead-leaves or dead-leaves:full (default: dead-leaves; of an autoencoder, its own)"
    sums = "kl, esm, dsm, eq, se, vf, none or a sum such as esm+dsm; eq goes with neither dsm nor se"
    kl = "of kl, a sum over latent dimensions, while the pixels' error is a mean: at 256 px latent diffusion's "
    add("--data", metavar="SPEC", help=data)
    held_out = "images held out, of which evaluations, val_loss and best.pt are (default: evaluations are of --data)"
    add("--val", metavar="SPEC", help=held_out)
    size = "images are cropped and resized to this"
    add("--size", type=at_least(SSIM_WINDOW, most=SIDE), metavar="PIXELS", help=size)
    add("--out", metavar="DIR", help="run folder, or where --encode, --spectrum or --eval-only write")
    add = parser.add_argument_group("model and loss").add_argument
    add("--preset", default="tiny", choices=PRESETS, help="f: pixels per latent pixel, d: channels")
    add("--regularizer", default="esm", metavar="NAME[+NAME]", help=sums)
    add("--kl-weight", type=weight, default=1e-6, metavar="W", help=kl + "1e-6 is 5e-12 here")
    add("--esm-weight", type=weight, default=0.01, metavar="W", help="of esm")
    delta = "the target is the image's spectrum times f^D"
    add("--esm-delta", type=at_least(-10, float, 10), default=1.0, metavar="D", help=delta)
    blur = "blur images before they are resized to the latent, as the authors do unless it is 32 wide"
    add("--esm-blur", action=argparse.BooleanOptionalAction, help=blur)
    add("--se-weight", type=weight, default=0.25, metavar="W", help="of se")
    add("--vf-weight", type=weight, default=0.1, metavar="W", help="of vf, beside its adaptive weight")
    add("--encoder", metavar="SPEC", help="torch.hub encoder of vf, REPO:ENTRY, REPO a local folder or on GitHub")
    add("--reconstruction", default="l1", choices=("l1", "l2"), help="error of the pixels")
    add("--lpips-weight", type=weight, metavar="W", help="of LPIPS, 0 for none")
    add("--lpips-vgg", metavar="FILE", help="torchvision's VGG-16 weights (default: torch.hub's folder, downloaded)")
    add("--lpips-heads", metavar="FILE", help="the weights of LPIPS's heads (default: torch.hub's folder, downloaded)")
    add("--gan-weight", type=weight, metavar="W", help="of the GAN, beside its adaptive weight, 0 for none")
    add("--gan-start", type=at_least(0), default=50_000, metavar="STEP", help="steps before the GAN starts")
    add = parser.add_argument_group("looking at autoencoders").add_argument
    add("--features", metavar="SPEC", help="of rFID, also low-passed: inception, hog, REPO:ENTRY or none")
    add("--features-weights", metavar="FILE", help="local Inception weights (default: torch-fidelity downloads them)")
    add("--eval-images", type=at_least(1), metavar="N", help="of an evaluation (default: 1000, with --eval-only all)")
    add("--eval-only", action="store_true", help="report on --ckpt, train nothing")
    add("--spectrum", nargs="+", metavar="CKPT", help="compare the spectra of these autoencoders, train nothing")
    add("--encode", metavar="SPEC", help="encode these images with --ckpt into latents, train nothing")
    norm = "of --encode: latents to unit std as one, or each channel to mean 0 and std 1 (default: what the config.json"
    add("--latent-norm", choices=("one", "channel"), help=f"{norm} of --ckpt says, else one)")
    ckpt = "run or checkpoint of this program, or SD-VAE weights: a file, or a folder of diffusers'"
    add("--ckpt", metavar="CKPT", help=ckpt)
    add_training_flags(parser)
    args = parser.complete(argv, recipe)
    if args.latent_norm and not args.encode:
        raise InputError(f"--latent-norm {args.latent_norm}: is for --encode; a run's checkpoint has both")
    if "eq" in parse_regularizer(args.regularizer) and args.compile:
        raise InputError("--compile: eq has images of nearly as many sizes as there are steps; leave it out")
    return args


def main(args):
    if args.spectrum:
        compare_spectra(args)
    elif args.encode:
        names = "encode ckpt size out device batch workers latent_norm".split()
        encode_data(*(getattr(args, name) for name in names))
    elif args.eval_only:
        evaluate_only(args)
    elif args.ckpt:
        raise InputError(f"--ckpt {args.ckpt}: is for --eval-only and --encode; a run in --out resumes by itself")
    else:
        with HELD:
            train(args)


if __name__ == "__main__":
    run_program(main, parse)
