"""Sample a trained diffusion model, look at how it samples, and score it.

    python sample.py runs/first --n 64                               # PNG files and a grid
    torchrun --nproc_per_node=8 sample.py runs/first -n 50000 --score photos/
    python sample.py runs/first --trajectory                         # low frequencies come first
    python sample.py --ckpt DiT-XL-2-256x256.pt --model dit-xl/2 --vae sd-vae.ckpt --classes 207 360 --guidance 4

Image i depends on the seed and i alone, not on batch size or number of processes; images already there are
skipped, so an interrupted command goes on when typed again.

This file holds what using a model needs: reading images, noise paths and predictions, samplers, checkpoints,
sampling, scores. What training needs on top is in train_diffusion.py, which imports from here.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from dct import DCTCodec, white_level
from dit import DIT_SIZES, DiT
from repa import load_encoder
from spectral_losses import psd
from uvit import UVIT_SIZES, UViT
from vae import VAE, infer_shape, sample_posterior


progress = functools.partial(tqdm, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 30)


class InputError(Exception):
    """A mistake of the user's: printed without a traceback. Names the flag or file, the value and what would do."""


# ---- images -----------------------------------------------------------------------------------------------

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
MAX_UNREADABLE = 0.01  # share of a data set
DEAD_LEAVES = 20_000  # images in the built-in set
PALETTE = np.array([(230, 57, 70), (244, 162, 97), (233, 216, 90), (67, 170, 87), (58, 134, 196), (120, 80, 170),
                    (240, 240, 235)], np.float32)  # fmt: skip


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
    rng = np.random.default_rng([index, int(full)])
    small, large = (size / 16, size / 2) if full else (size / 6, size / 3)
    rows = np.arange(size, dtype=np.float32)
    frame, empty = np.zeros((size, size, 3), np.float32), np.ones((size, size), np.float32)  # painted front to back
    for count in itertools.repeat(128) if full else [rng.integers(1, 3)]:
        radius = (rng.uniform(large**-2, small**-2, count) ** -0.5).astype(np.float32)  # inverse CDF of r^-3
        reach = radius[:, None] if full else -radius[:, None] / 2  # full: centres may lie outside the frame
        centre = rng.uniform(-reach, size + reach, (count, 2)).astype(np.float32)
        colour = rng.uniform(0, 255, (count, 3)) if full else PALETTE[rng.integers(0, len(PALETTE), count)]
        distance = np.hypot(*np.broadcast_arrays(rows[:, None] - centre[:, :1, None], rows - centre[:, 1:, None]))
        cover = (radius[:, None, None] - distance + 0.5).clip(0, 1)  # (count, size, size), soft edges
        left = np.cumprod(np.concatenate((empty[None], 1 - cover)), 0)  # what shows through the leaves before each
        frame += np.einsum("khw,kc->hwc", left[:-1] * cover, colour.astype(np.float32))
        empty = left[-1]
        if full and empty.max() < 1 / 255:
            break
    return (frame + empty[..., None] * PALETTE[rng.integers(len(PALETTE))]).round().astype(np.uint8)


def short_name(spec):
    """A word for a data set, for file names."""
    return Path(spec.replace(":", "-")).resolve().stem


class Images(Dataset):
    """The images of `--data SPEC`, centre-cropped to `size` pixels.

    SPEC: a folder tree or .zip (classes = the folders at its top; a StyleGAN/EDM dataset.json wins), `cifar10` or
    `cifar10:test` (torchvision downloads them to ./data), `dead-leaves` or `dead-leaves:full`. Attributes: names,
    labels (list of int, or None), classes (list of str, or None). Raises InputError where there are no images.
    """

    def __init__(self, spec, size):
        self.spec, self.size, self.path = spec, size, Path(spec)
        self.labels, self.classes, self._zips = None, None, {}
        self.kind, _, self.option = spec.partition(":")
        if spec in ("dead-leaves", "dead-leaves:full"):
            self.names = range(DEAD_LEAVES)
        elif spec in ("cifar10", "cifar10:test"):
            from torchvision.datasets import CIFAR10

            try:
                data = CIFAR10("data", train=not self.option, download=True)
            except Exception as error:  # torchvision lets whatever its download met through
                raise InputError(f"--data {spec}: torchvision could not download it to ./data ({error})") from error
            self.names, self.pixels = range(len(data)), data.data
            self.labels, self.classes = data.targets, data.classes
        else:
            self._list_files()

    def _list_files(self):
        if self.path.is_dir():
            self.kind = "folder"
            files = sorted(file.relative_to(self.path).as_posix() for file in self._walk())
        elif zipfile.is_zipfile(self.path):
            self.kind = "zip"
            files = sorted(name for name in self._zip().namelist() if not name.endswith("/"))
        else:
            known = "a folder, a .zip, cifar10, cifar10:test, dead-leaves or dead-leaves:full"
            state = "is neither a folder nor a .zip" if self.path.exists() else "does not exist"
            raise InputError(f"--data {self.spec}: {state}; it takes {known}")
        hidden = ("__MACOSX", ".")
        shown = [file for file in files if not any(part.startswith(hidden) for part in file.split("/"))]
        self.names = [file for file in shown if os.path.splitext(file)[1].lower() in EXTENSIONS]
        if not self.names:
            raise InputError(f"--data {self.spec}: no image in it ({len(files)} files; {' '.join(sorted(EXTENSIONS))})")
        if "dataset.json" in files:
            self._label_by_json()
        else:
            self._label_by_folder()

    def _walk(self):
        """The files below a folder, links followed: a folder linked twice counts twice, as its owner wants it to.
        Raises InputError for a link to a folder that it lies in, below which there is no end.
        """
        for root, folders, files in os.walk(self.path, followlinks=True):
            yield from (Path(root, file) for file in files)
            for link in filter(Path.is_symlink, (Path(root, folder) for folder in folders)):
                around = [folder.resolve() for folder in link.parents if folder.is_relative_to(self.path)]
                if any(folder.is_relative_to(link.resolve()) for folder in around):
                    raise InputError(f"--data {self.spec}: {link} is a link to a folder that it lies in; remove it")

    def _label_by_json(self):
        try:
            labels = json.loads(self._bytes("dataset.json")).get("labels")
            if labels:  # null: a set without classes
                labels = dict(labels)
                self.labels = [labels[name] for name in self.names]
                for name, label in zip(self.names, self.labels):
                    if type(label) not in (int, float) or not (label >= 0 and label % 1 == 0):
                        raise InputError(f"--data {self.spec}: dataset.json gives {name} the label {label!r}; labels are "
                                         "whole numbers from 0 on")  # fmt: skip
                self.labels = [int(label) for label in self.labels]
                self.classes = [str(label) for label in range(max(self.labels) + 1)]
        except (ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"--data {self.spec}: dataset.json holds no list of [file, class number] ({error})"
            ) from error
        except KeyError as error:
            raise InputError(f"--data {self.spec}: dataset.json gives no label to {error}") from error

    def _label_by_folder(self):
        parts = [name.split("/")[:-1] for name in self.names]
        common = len(os.path.commonprefix(parts))  # of lists: the folders that all images share
        tops = [part[common] if len(part) > common else None for part in parts]
        if None not in tops:  # with images at the top as well, folders are no classes
            self.classes = sorted(set(tops))
            index = {name: i for i, name in enumerate(self.classes)}
            self.labels = [index[top] for top in tops]

    def thin(self, count):
        """Keep at most `count` images, spread evenly."""
        kept = range(0, len(self.names), math.ceil(len(self.names) / count))
        self.names = [self.names[i] for i in kept]
        if self.labels:
            self.labels = [self.labels[i] for i in kept]

    def _zip(self):  # one handle a process: they share no file position
        if os.getpid() not in self._zips:
            self._zips[os.getpid()] = zipfile.ZipFile(self.path)
        return self._zips[os.getpid()]

    def _bytes(self, name):
        return self._zip().read(name) if self.kind == "zip" else (self.path / name).read_bytes()

    def __getstate__(self):
        return self.__dict__ | {"_zips": {}}

    def __len__(self):
        return len(self.names)

    def open(self, i):
        """Image i as it is stored (Pillow). Raises what Pillow raises where it cannot be read."""
        if self.kind == "dead-leaves":
            return Image.fromarray(dead_leaves(self.names[i], self.size, full=self.option == "full"))
        if self.kind == "cifar10":
            return Image.fromarray(self.pixels[self.names[i]])
        return Image.open(io.BytesIO(self._bytes(self.names[i])))

    def read(self, i):
        """Image i as (3, size, size) uint8, or None, its name printed, where it is unreadable or truncated."""
        try:
            with self.open(i) as image:
                return torch.from_numpy(np.array(center_crop(to_rgb(image), self.size))).permute(2, 0, 1)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise all kinds on bad bytes
            tqdm.write(f"skipped, unreadable: {self.spec}/{self.names[i]} ({error})", file=sys.stderr)
            return None

    def readable(self, i):
        """(j, image j) of the first readable image from i on. Raises InputError where there is none."""
        for j in itertools.chain(range(i, len(self)), range(i)):
            image = self.read(j)
            if image is not None:
                return j, image
        raise InputError(f"--data {self.spec}: no image can be read")

    def check_unreadable(self, count):
        """Raise InputError where more than 1% of the images are unreadable."""
        if count > MAX_UNREADABLE * len(self):
            raise InputError(f"--data {self.spec}: {count} of {len(self)} images are unreadable, more than 1%")

    def __getitem__(self, i):
        """(i, image (3, size, size) uint8, True), or (i, zeros, False) where it is unreadable."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        image = self.read(i)
        return i, torch.zeros(3, self.size, self.size, dtype=torch.uint8) if image is None else image, image is not None


# ---- noise paths and predictions --------------------------------------------------------------------------


class VP:
    """Variance-preserving path x_t = alpha x0 + sigma e, alpha^2 + sigma^2 = 1, t in [0, 1], with SNR scaling:
    SNR'(t) = c SNR(t) exactly, abar' = c abar / (1 + (c - 1) abar) (DCTdiff, section 4.4). v = alpha e - sigma x0.
    """

    BETA0, BETA1 = 0.1, 20.0  # beta(t) = BETA0 + (BETA1 - BETA0) t
    LEAST_ALPHA = 0.0  # to divide by; alpha(1) is 0.0066 sqrt(c)

    def __init__(self, c=1.0):
        self.c = c

    def time(self, u):
        """The t at share u of the way from data to noise, of training draws and sampler steps."""
        return u

    def log_abar(self, t):
        return -(self.BETA0 * t + (self.BETA1 - self.BETA0) * t**2 / 2)  # without scaling

    def alpha_sigma(self, t):
        log_abar = self.log_abar(t)
        scale = 1 + (self.c - 1) * log_abar.exp()
        return (self.c * log_abar.exp() / scale).sqrt(), (-torch.expm1(log_abar) / scale).sqrt()

    def log_snr_half(self, t):
        """lambda(t) = log(alpha / sigma)"""
        log_abar = self.log_abar(t)
        return 0.5 * (math.log(self.c) + log_abar - torch.log(-torch.expm1(log_abar)))

    def t_of_lambda(self, lam):
        """Exact inverse of `log_snr_half`."""
        need = F.softplus(math.log(self.c) - 2 * lam)  # -log abar
        return 2 * need / (self.BETA0 + (self.BETA0**2 + 2 * (self.BETA1 - self.BETA0) * need).sqrt())

    def beta(self, t):
        """-d log abar' / dt: the drift is -beta x / 2, the squared diffusion beta."""
        return (self.BETA0 + (self.BETA1 - self.BETA0) * t) / (1 + (self.c - 1) * self.log_abar(t).exp())

    def velocity(self, alpha, sigma):
        return -sigma, alpha  # coefficients of x0 and e in v


class StableDiffusionVP(VP):
    """VP with Stable Diffusion's schedule, sqrt(beta) linear in t (arXiv 2112.10752; published latent U-ViTs)."""

    ROOT0, ROOT1 = math.sqrt(0.85), math.sqrt(12.0)  # of beta(t), over t in [0, 1]

    def log_abar(self, t):
        rise = (self.ROOT1 - self.ROOT0) * t
        return -t * (self.ROOT0**2 + self.ROOT0 * rise + rise**2 / 3)  # no difference of cubes: exact near t = 0

    def t_of_lambda(self, lam):
        rise = self.ROOT1 - self.ROOT0
        need = F.softplus(math.log(self.c) - 2 * lam)  # -log abar
        return ((3 * rise * need + self.ROOT0**3) ** (1 / 3) - self.ROOT0) / rise

    def beta(self, t):
        beta = (self.ROOT0 + (self.ROOT1 - self.ROOT0) * t) ** 2
        return beta / (1 + (self.c - 1) * self.log_abar(t).exp())


class Flow:
    """Linear path x_t = (1 - t) x0 + t e with v = e - x0 (SiT, arXiv 2401.08740). SNR scaling by c moves the times
    at which it is trained and sampled, SNR(time(u)) = c SNR(u), as SD3 does for resolution (2403.03206, section 5.3.2).
    """

    LEAST_ALPHA = 1e-2  # to divide by, with eps prediction: alpha(1) is 0

    def __init__(self, c=1.0):
        self.c = c

    def time(self, u):
        return u / (u + math.sqrt(self.c) * (1 - u))

    def alpha_sigma(self, t):
        return 1 - t, t

    def velocity(self, alpha, sigma):
        return -torch.ones_like(sigma), torch.ones_like(alpha)


PATHS = {"vp": VP, "vp-sd": StableDiffusionVP, "flow": Flow}
PREDICTIONS = ("eps", "v", "x0")
LEAST_SIGMA = 1e-4  # to divide by, with x0 prediction: sigma(0) is 0


def like(t, x):
    """(N,) -> (N, 1, ..., 1) to multiply x (N, ...)."""
    return t.view(-1, *[1] * (x.ndim - 1))


def target(path, predict, x0, eps, t):
    """What the network has to predict at t (N,), shaped like x0."""
    a, b = path.velocity(*path.alpha_sigma(like(t, x0)))
    return {"eps": eps, "x0": x0, "v": a * x0 + b * eps}[predict]


def x0_and_eps(path, predict, x, t, output):
    """The two sides of x_t = alpha x0 + sigma e that a network's output at t (N,) stands for."""
    alpha, sigma = path.alpha_sigma(like(t, x))
    if predict == "eps":
        return (x - sigma * output) / alpha.clamp_min(path.LEAST_ALPHA), output
    if predict == "x0":
        return output, (x - alpha * output) / sigma.clamp_min(LEAST_SIGMA)
    a, b = path.velocity(alpha, sigma)  # alpha b - sigma a = 1 on both paths
    return b * x - sigma * output, alpha * output - a * x


# ---- samplers ---------------------------------------------------------------------------------------------
# Each takes denoise(x, t) -> (x0, eps) with t (N,), the path, x at t = 1, the number of steps and noise(), fresh
# normal noise shaped like x, calls denoise once a step (heun twice) and returns x at t = 0 (dpm++: 1e-4).

DPM_END, EULER_LAST, SDE_LAST = 1e-4, 1e-3, 0.04  # where dpm++ ends, where the last step to t = 0 begins [code]


def _grid(path, steps, x, end=0.0):
    return path.time(torch.linspace(1, end, steps + 1, dtype=torch.float64, device=x.device)).float()


def _full(t, x):
    return t.expand(len(x))


def ddim(denoise, path, x, steps, noise, eta=0.0):
    """DDIM (arXiv 2010.02502, equation 12); eta = 1 is the ancestral sampler of DDPM (2006.11239)."""
    times = _grid(path, steps, x)
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, _full(t, x))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps
        if eta:
            x = x + std * noise()
    return x


def euler_vp(denoise, path, x, steps, noise, stochastic=False):
    """Euler steps of the probability-flow ODE, or Euler-Maruyama of the reverse SDE (arXiv 2011.13456), from t = 1 to
    1e-3, and a last one without noise to 0 [code], which on vp leaves 45% (ODE) or 9% (SDE) of the noise in x.
    """
    times = F.pad(_grid(path, steps - 1, x, end=EULER_LAST), (0, 1))
    for t, s in zip(times, times[1:]):
        _, eps = denoise(x, _full(t, x))
        score, beta, h = -eps / path.alpha_sigma(t)[1], path.beta(t), t - s
        x = x + h * beta * (x / 2 + score * (1 if stochastic else 0.5))
        if stochastic and s > 0:
            x = x + (beta * h).sqrt() * noise()
    return x


def dpm_plus_plus(denoise, path, x, steps, noise):
    """DPM-Solver++(2M), data prediction, second order, multistep (arXiv 2211.01095, algorithm 2), in equal steps
    of lambda from t = 1 to 1e-4 [code], where sigma is 0.0032 / sqrt(c)."""
    ends = path.log_snr_half(torch.tensor([1.0, DPM_END], dtype=torch.float64, device=x.device))
    lam = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device))
    times, previous = path.t_of_lambda(lam), None
    alpha, sigma = path.alpha_sigma(times)
    for i in range(steps):
        x0, _ = denoise(x, _full(times[i].float(), x))
        h = lam[i + 1] - lam[i]
        data = x0 if previous is None else x0 + (x0 - previous) * (h / (lam[i] - lam[i - 1]) / 2).float()
        x = (sigma[i + 1] / sigma[i]).float() * x - (alpha[i + 1] * torch.expm1(-h)).float() * data
        previous = x0
    return x


def euler_flow(denoise, path, x, steps, noise):
    """Euler steps of dx/dt = v = eps - x0."""
    times = _grid(path, steps, x)
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, _full(t, x))
        x = x + (s - t) * (eps - x0)
    return x


def heun(denoise, path, x, steps, noise):
    """Heun's second-order steps, the last one Euler's, as in EDM (arXiv 2206.00364, algorithm 1)."""
    times = _grid(path, steps, x)
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, _full(t, x))
        slope = eps - x0
        if s > 0:
            x0, eps = denoise(x + (s - t) * slope, _full(s, x))
            slope = (slope + eps - x0) / 2
        x = x + (s - t) * slope
    return x


def flow_sde(denoise, path, x, steps, noise):
    """Euler-Maruyama of SiT's reverse SDE with diffusion w = 2t. The last step, from t = 0.04 (at c = 1), adds no noise
    [code]: it turns 0.04 e into -0.04 e, which stays however fine the steps (of data of std 0.5, 0.005 of the std goes).
    """
    times = F.pad(_grid(path, steps - 1, x, end=SDE_LAST), (0, 1))
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, _full(t, x))
        x = x + (s - t) * (eps - x0 + eps)  # v - w score / 2, the score being -eps / t
        if s > 0:
            x = x + (2 * t * (t - s)).sqrt() * noise()
    return x


SAMPLERS = {  # by path, the default first
    "vp": {
        "dpm++": dpm_plus_plus,
        "ddim": ddim,
        "ddpm": functools.partial(ddim, eta=1.0),
        "euler-ode": euler_vp,
        "euler-sde": functools.partial(euler_vp, stochastic=True),
    },
    "flow": {"euler": euler_flow, "heun": heun, "sde": flow_sde},
}
SAMPLERS["vp-sd"] = SAMPLERS["vp"]


# ---- the model and its checkpoint -------------------------------------------------------------------------


def parse_model(name, published=False):
    """'uvit-s', 'dit-b/2', of published weights also 'sit-b/2', ... -> (class, its size arguments, patch size or None).
    Raises InputError.
    """
    base, slash, patch = name.lower().partition("/")
    kind, _, size = base.partition("-")
    kinds = {"uvit": (UViT, UVIT_SIZES), "dit": (DiT, DIT_SIZES)} | ({"sit": (DiT, DIT_SIZES)} if published else {})
    table = kinds.get(kind, (None, {}))
    if size not in table[1] or (slash and not (patch.isdigit() and int(patch) > 0)):
        names = [f"uvit-{s}" for s in UVIT_SIZES] + [f"dit-{s}" for s in DIT_SIZES]
        raise InputError(
            f"--model {name}: unknown; it takes {', '.join(names)}, with /PATCH in pixel and latent space (dit-b/2); a SiT "
            "is a dit on --path flow"
        )
    return table[0], table[1][size], int(patch) if slash else None


def build_network(config):
    """The network of a config (see `Diffusion`). Raises InputError where its parts do not fit together."""
    network, kwargs, patch = parse_model(config["model"])
    kwargs, classes = dict(kwargs), len(config["classes"] or ())
    if network is DiT:
        kwargs |= dict(num_classes=classes, learn_sigma=False, class_dropout_prob=config["label_dropout"])
    else:
        null = config["label_dropout"] > 0  # U-ViT counts the null class
        kwargs |= dict(num_classes=classes + null if classes else -1)
    if config["space"] == "dct":
        if patch:
            raise InputError(f"--model {config['model']}: in DCT space a token is one 2B x 2B area; leave /{patch} out")
        codec = make_codec(config)
        kwargs |= dict(num_tokens=codec.num_tokens, token_dim=codec.token_dim)
    else:
        latent = config["space"] == "latent"
        channels, side = config["latent_shape"][:2] if latent else (3, config["size"])
        patch = patch or (LATENT_PATCH if latent else max(1, side // 16))
        names = ("input_size", "in_channels") if network is DiT else ("img_size", "in_chans")
        kwargs |= {names[0]: side, names[1]: channels, "patch_size": patch}
    try:
        return network(**kwargs | config.get("network", {}))
    except ValueError as error:
        raise InputError(f"--model {config['model']} at --size {config['size']}: {error}") from error


def make_codec(config):
    try:
        return DCTCodec(config["size"], config["block"], config["keep"], config["eta"])
    except ValueError as error:
        raise InputError(
            f"--size {config['size']} --block {config['block']} --keep {config['keep']}: {error}"
        ) from error


LATENT_PATCH = 2  # of networks on latents, unless --model says /PATCH
VAE_BATCH = 16  # images an autoencoder sees at a time: it takes far more memory than the network on its latents


class Diffusion:
    """A network with its path, prediction and space: images in, images out.

    config, plain values: space ("pixel", "dct" or "latent"), size, model, path (of PATHS), snr_scale, predict,
    classes (names, or None), label_dropout; in DCT space also block, keep, eta; in latent space latent_shape
    [C, h, w], scale (1 / std of the latents), autoencoder (hash of its weights). Published weights add network (more
    arguments of it) and reversed (SiT: it is shown 1 - t and gives -v). vae: the frozen autoencoder, in latent space.
    amp() is the context in which the networks run (see `autocast`); all else is computed in float32.
    """

    def __init__(self, config, network=None, vae=None, amp=contextlib.nullcontext):
        self.config, self.predict, self.classes = config, config["predict"], config["classes"]
        self.path, self.vae, self.amp = PATHS[config["path"]](config["snr_scale"]), vae, amp
        self.codec = make_codec(config) if config["space"] == "dct" else None
        self.network = network or build_network(config)
        # As published: DiT and U-ViT are called with 999 t, SiT, which is DiT on the flow path, with t in 0..1.
        self.time_scale = 1.0 if config["path"] == "flow" and isinstance(self.network, DiT) else 999.0
        size = config["size"]
        self.shape = (self.codec.num_tokens, self.codec.token_dim) if self.codec else (3, size, size)
        if config["space"] == "latent":
            self.shape = tuple(config["latent_shape"])

    def encode(self, images, noise=None):
        """(N, 3, S, S) in [-1, 1] -> what the network works on, (N, *shape). Of latents: a sample of the posterior, by
        noise (N, *shape), or its mean.
        """
        if self.config["space"] == "latent":
            with torch.no_grad(), self.amp():
                moments = zip(*[self.vae.encode(part) for part in images.split(VAE_BATCH)])
            return self.from_moments(*(torch.cat(moment).float() for moment in moments), noise)
        return self.codec.encode(images) if self.codec else images

    def from_moments(self, mean, logvar, noise=None):
        """The same from what the autoencoder makes of images, each (N, *shape), as latent caches hold it."""
        return self.config["scale"] * (mean if noise is None else sample_posterior(mean, logvar, noise))

    def decode(self, x):
        """(N, *shape) -> images (N, 3, S, S) in [-1, 1]."""
        if self.config["space"] == "latent":
            parts = (x / self.config["scale"]).split(VAE_BATCH)
            with self.amp():
                return torch.cat([self.vae.decode(part).float() for part in parts]).clamp(-1, 1)
        return self.codec.decode(x) if self.codec else x.clamp(-1, 1)

    def field(self, x):
        """What spectra are taken of: images, in latent space the latents themselves."""
        return x if self.config["space"] == "latent" else self.decode(x)

    def output(self, network, x, t, y=None, drop=None):
        with self.amp():
            if self.config.get("reversed"):
                return -network(x, (1 - t) * self.time_scale, y, drop)
            return network(x, t * self.time_scale, y, drop)

    def denoiser(self, y=None, guidance=1.0, interval=(0.0, 1.0)):
        """denoise(x, t) -> (x0, eps) for the samplers. Classifier-free guidance (arXiv 2207.12598) within an interval
        of t (2404.07724): null + guidance (class - null); 1 is the class alone, 0 the null class alone."""

        def denoise(x, t):
            scale = guidance if y is not None and interval[0] <= t[0] <= interval[1] else 1.0
            if scale == 1.0:
                out = self.output(self.network, x, t, y)
            else:
                drop = torch.arange(2 * len(x), device=x.device) >= len(x)
                out = self.output(self.network, torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, y)), drop)
                out, null = out.float().chunk(2)
                out = null + scale * (out - null)
            return x0_and_eps(self.path, self.predict, x, t, out.float())

        return denoise


def read_checkpoint(path, kind="diffusion"):
    """The dict in a run folder's checkpoint.pt, or in a checkpoint file, of a diffusion model or an "autoencoder".
    Raises InputError; runs no code.
    """
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.exists():
        if not path.exists():
            raise InputError(f"{path}: no such run folder or checkpoint")
        partial = " (one is being written, or its writing was cut off)" if Path(f"{file}.tmp").exists() else ""
        raise InputError(
            f"{path}: no checkpoint.pt in it yet{partial}; training writes it at --save-every and at its end"
        )
    checkpoint = load_plain(file)
    missing = {"config", "model", "ema", "step"} - checkpoint.keys()
    program, other = "train_diffusion.py", "train_vae.py"
    if kind == "autoencoder":
        if missing:
            return published_autoencoder(checkpoint, file)
        program, other = other, program
    elif missing:
        raise InputError(
            f"{file}: no checkpoint of {program}, it lacks {', '.join(sorted(missing))}; published weights of a DiT, SiT "
            "or U-ViT take sample.py --ckpt FILE --model NAME --vae FILE"
        )
    if ("widths" in checkpoint["config"]) != (kind == "autoencoder"):
        raise InputError(f"{file}: a checkpoint of {other}; give one of {program}")
    return checkpoint


def load_plain(file):
    """The dict of tensors and plain values in a file of torch.save. Raises InputError; runs no code."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # in training checkpoints of DiT, SiT and REPA
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file}: refused, it holds more than tensors and plain values, or is no checkpoint"
        ) from error
    except Exception as error:  # torch.load raises all kinds on bytes that are no checkpoint
        raise InputError(
            f"{file}: cannot be read as a checkpoint ({type(error).__name__} {str(error)[:120]})"
        ) from error
    return checkpoint if isinstance(checkpoint, dict) else {}


def run_folder(path):
    """The folder of a run given by itself or by its checkpoint file."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def published_autoencoder(checkpoint, file):
    """SD-VAE weights in the original layout, alone or within a Stable Diffusion checkpoint, as one of train_vae.py's."""
    state, prefix = checkpoint.get("state_dict", checkpoint), "first_stage_model."
    if any(key.startswith(prefix) for key in state):
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # the rest is the loss's networks
    state = {key: value for key, value in state.items() if key.startswith(parts)}
    try:
        return {"config": infer_shape(state), "model": state, "ema": None, "step": 0}
    except (KeyError, IndexError) as error:
        other = "; these are in diffusers' layout" if any("down_blocks" in key for key in state) else ""
        raise InputError(
            f"{file}: neither a checkpoint of train_vae.py nor SD-VAE weights in their original layout (no {error}){other}"
        ) from error


def load_autoencoder(path, device):
    """-> the frozen VAE of a run of train_vae.py or of published weights, and its checkpoint without the weights, with
    "weights", their hash. The average of the weights is taken where there is one. Raises InputError.
    """
    checkpoint = read_checkpoint(path, "autoencoder")
    state = checkpoint["ema"] or checkpoint["model"]
    shape = {name: checkpoint["config"][name] for name in ("widths", "latent_channels", "num_res_blocks")}
    with torch.device("meta"):
        vae = VAE(**shape).requires_grad_(False)
    load_weights(vae, state, path, assign=True)
    info = {key: checkpoint.get(key) for key in ("config", "step", "args", "latent", "val")}
    return vae.to(device, torch.float32).eval(), info | {"weights": fingerprint(state)}


SD_SCALE = 0.18215  # of SD-VAE latents, in every published latent model


def published_network(file, name, vae=None, ema=True):
    """A published DiT, SiT or U-ViT from its checkpoint -> (config of `Diffusion`, state dict). Kind and shape are read
    off its keys; the heads of attention, and whether it is a DiT or a SiT, only `name` tells (sit-xl/2). Raises
    InputError where they do not fit, or where a latent model finds no `vae`, (VAE, info) of `load_autoencoder`.
    """
    state = strip_prefixes(load_plain(file))
    if {"config", "model", "ema", "step"} <= state.keys():
        raise InputError(f"--ckpt {file}: a checkpoint of train_diffusion.py; give it without --ckpt and --model")
    parts = [part for part in ("ema", "state_dict", "model") if isinstance(state.get(part), dict)]
    if not ema and not {"ema", "model"} <= set(parts):
        raise InputError(f"--no-ema: {file} holds one set of weights; leave it out")
    if parts:  # a training checkpoint
        state = strip_prefixes(state[parts[0] if ema else "model"])
    kind, (base, _, patch_named) = name.lower().partition("-")[0], name.lower().partition("/")
    parse_model(name, published=True)  # raises on an unknown size
    embeddings = {"x_embedder.proj.weight": ("dit", "sit"), "patch_embed.proj.weight": ("uvit",)}
    there = [key for key in embeddings if getattr(state.get(key), "ndim", 0) == 4]
    if not there:
        raise InputError(f"--ckpt {file}: its keys are no DiT's, SiT's or U-ViT's on maps ({', '.join(list(state)[:3])} ...)")
    if kind not in embeddings[there[0]]:
        raise InputError(f"--ckpt {file}: its keys are a {' or '.join(embeddings[there[0]])}'s, --model {name} is none")
    _, channels, patch, _ = state[there[0]].shape
    if patch_named and patch != int(patch_named):
        raise InputError(f"--model {name}: {file} has patches of {patch}")
    try:
        config, side = (published_uvit if kind == "uvit" else published_dit)(state, kind, channels, patch)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"--ckpt {file}: is no whole {kind}'s ({error})") from error
    config |= {"snr_scale": 1.0, "space": "pixel", "size": side, "model": f"{base.replace('sit', 'dit')}/{patch}"}
    if channels == 3:
        if vae is not None:
            raise InputError(f"--vae: {file} is a model of pixels; leave it out")
    elif vae is None:
        raise InputError(f"--ckpt {file}: a model of {channels}-channel latents; --vae FILE names the SD-VAE's weights")
    elif vae[0].latent_channels != channels:
        raise InputError(f"--vae: latents of {vae[0].latent_channels} channels, {file} takes {channels}")
    else:
        config |= {"space": "latent", "size": side * vae[0].factor, "latent_shape": [channels, side, side],
                   "scale": SD_SCALE, "autoencoder": vae[1]["weights"]}  # fmt: skip
    return config, {key: value for key, value in state.items() if not key.startswith("projectors.")}


def published_dit(state, kind, channels, patch):
    """-> (the config's part of it, the side of its maps); learned sigmas are cut off the state."""
    out = state["final_layer.linear.weight"].shape[0] // patch**2
    for key in ("final_layer.linear.weight", "final_layer.linear.bias"):  # (p p out, ...): keep the noise or velocity
        state[key] = state[key].unflatten(0, (patch**2, out))[:, :channels].flatten(0, 1)
    config, side = {"predict": "eps", "path": "vp"}, math.isqrt(state["pos_embed"].shape[1]) * patch
    if kind == "sit":  # its own release, with learned sigmas, runs from noise at t = 0 to data at 1, REPA's like ours
        repa = out == channels or any(key.startswith("projectors.") for key in state)
        config = {"predict": "v", "path": "flow", "reversed": not repa}
    rows = len(state.get("y_embedder.embedding_table.weight", ()))
    classes = [str(i) for i in range(rows - 1)] if rows else None
    return config | {"classes": classes, "label_dropout": 0.1 if rows else 0.0}, side


def published_uvit(state, kind, channels, patch):
    rows, width = len(state.get("label_emb.weight", ())), len(state["mid_block.norm1.weight"])
    null = rows != 1000  # ImageNet's 1000 rows hold no null class, 1001 do
    network = {"conv": "final_layer.weight" in state, "mlp_time_embed": "time_embed.0.weight" in state,
               "qkv_bias": "mid_block.attn.qkv.bias" in state, "num_classes": rows or -1,
               "mlp_ratio": len(state["mid_block.mlp.fc1.weight"]) / width}  # fmt: skip
    side = math.isqrt(state["pos_embed"].shape[1] - 1 - bool(rows)) * patch
    classes = [str(i) for i in range(rows - null)] if rows else None
    path = "vp" if channels == 3 else "vp-sd"
    return {"predict": "eps", "path": path, "network": network, "classes": classes,
            "label_dropout": 0.1 if rows and null else 0.0}, side  # fmt: skip


def open_autoencoder(path, device, wanted=None, wanted_by=None):
    """`load_autoencoder`, the hash of its weights compared with that of the autoencoder that made the latents."""
    if not Path(path).exists():
        raise InputError(f"{path}: no such autoencoder; --vae RUN_OR_FILE names the one that made the latents ({wanted})")
    vae, info = load_autoencoder(path, device)
    if wanted not in (None, info["weights"]):
        raise InputError(
            f"{path}: another autoencoder ({info['weights']}) than made the latents of {wanted_by} ({wanted}); "
            "--vae RUN_OR_FILE names the right one"
        )
    return vae, info


def fingerprint(state):
    """Hash of a state dict's values: two models that draw different images differ in it."""
    digest = hashlib.sha256()
    for value in state.values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def strip_prefixes(state):
    """Keys without what DDP and torch.compile put before them, in either order."""

    def strip(key):
        return strip(key.partition(".")[2]) if key.startswith(("module.", "_orig_mod.")) else key

    return {strip(str(key)): value for key, value in state.items()}


def load_weights(network, state, source, assign=False):
    """Strict load, prefixes stripped. Raises InputError on another architecture."""
    state = strip_prefixes(state)
    try:
        network.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        lines = "; ".join(line.strip() for line in str(error).splitlines()[1:3])[:300]
        raise InputError(
            f"{source}: weights of another architecture than this {type(network).__name__}: {lines}"
        ) from error


# ---- sampling ---------------------------------------------------------------------------------------------


def seeds(*numbers, count=1):
    """`count` seeds that follow from several non-negative integers; the first few do not depend on how many there are."""
    state = np.random.SeedSequence([len(numbers), *numbers]).generate_state(count, np.uint64)
    return [int(word) >> 1 for word in state]


def generator(*numbers, device="cpu"):
    """A torch generator seeded by several non-negative integers."""
    return torch.Generator(device).manual_seed(seeds(*numbers)[0])


@torch.no_grad()
def generate(diffusion, indices, seed, device, y=None, sampler=None, steps=50, guidance=1.0, interval=(0.0, 1.0),
             trace=None):  # fmt: skip
    """Images number `indices` of a seed -> (n, 3, S, S) in [-1, 1]. The noise of each comes from (seed, its index).

    y (n,) classes on `device`, or None. trace(t, x0): called with the prediction of x0 at every evaluation.
    """
    generators = [generator(seed, int(i)) for i in indices]

    def noise():
        return torch.stack([torch.randn(diffusion.shape, generator=g) for g in generators]).to(device)

    denoise = diffusion.denoiser(y, guidance, interval)

    def traced(x, t):
        x0, eps = denoise(x, t)
        trace(t[0].item(), x0)
        return x0, eps

    samplers = SAMPLERS[diffusion.config["path"]]
    run = samplers[sampler or next(iter(samplers))]
    return diffusion.decode(run(traced if trace else denoise, diffusion.path, noise(), steps, noise))


def to_uint8(images):
    """[-1, 1] -> 0..255 uint8, rounded."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, file, columns):
    """Write images (N, 3, S, S) in [-1, 1] as one PNG."""
    from torchvision.utils import save_image

    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_image(images.float().cpu(), file, nrow=columns, padding=2, normalize=True, value_range=(-1, 1))
    return file


def write_atomically(file, write, sync=True):
    """write(binary file) beside `file`, then rename: what was there stays until the new one is whole. `sync` waits for
    the disk, so that a power cut is survived as well.
    """
    partial = Path(f"{file}.tmp")
    with partial.open("wb") as handle:
        write(handle)
        handle.flush()
        if sync:
            os.fsync(handle.fileno())
    os.replace(partial, file)


def choose_device(name):
    """`--device auto|cpu|cuda` -> torch.device, of LOCAL_RANK under torchrun."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no GPU; --device cpu works everywhere")
        index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= count:
            raise InputError(
                f"--nproc_per_node: process {index} has no GPU, this machine has {count}; --device cpu works"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def multiplies_bf16(device):
    """Whether the hardware has bf16 matrix products: CUDA from compute capability 8.0, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(amp, device, tf32=False):
    """`--amp` -> (a function that makes the context in which networks run, dtype or None). auto: bf16 where the hardware
    multiplies it, else fp16 on CUDA and float32 on a CPU. tf32 lets CUDA round what is left of float32 products, within
    the context alone: a codec's stay exact.
    """
    if amp == "auto":
        amp = "bf16" if multiplies_bf16(device) else "fp16" if device.type == "cuda" else "off"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]

    @contextlib.contextmanager
    def context():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if tf32 and device.type == "cuda" else before)
        try:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    return context, dtype


def parse_classes(chosen, classes):
    """`--classes` names or numbers -> indices; image i takes entry i modulo their count. None: all, in turn."""
    if classes is None:
        if chosen:
            raise InputError(f"--classes {' '.join(chosen)}: this model was trained without classes")
        return None
    indices = []
    for name in chosen or classes:
        index = classes.index(name) if name in classes else int(name) if name.isdigit() else -1
        if not 0 <= index < len(classes):
            names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise InputError(f"--classes {name}: not one of the {len(classes)} classes 0..{len(classes) - 1} ({names})")
        indices.append(index)
    return indices


def sample_files(diffusion, protocol, args, folder, device, rank, world):
    """Write images 0..n-1 as folder/000000.png ..., this process's share of those not there yet."""
    record = folder / "protocol.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if record.exists():
        there = json.loads(record.read_text())
        changed = [f"{k} {there[k]} there, {v} now" for k, v in protocol.items() if there.get(k, v) != v]
        if changed:
            raise InputError(f"--out {folder} holds images made otherwise ({'; '.join(changed)}); name another folder")
    elif rank > 0:
        while not record.exists():  # rank 0 looks at the folder first
            time.sleep(0.05)
    elif any(folder.iterdir()):
        raise InputError(f"--out {folder} holds other files and no protocol.json of sampling; name another folder")
    else:
        write_atomically(record, lambda f: f.write(json.dumps(protocol, indent=1).encode()))
    files = [folder / f"{i:06d}.png" for i in range(args.n)]
    todo = [i for i in range(rank, args.n, world) if not files[i].exists()]
    labels = protocol["classes"]
    with progress(total=args.n, initial=args.n - world * len(todo), unit="img", desc="sample", disable=rank > 0) as bar:
        for k in range(0, len(todo), args.batch):
            indices = todo[k : k + args.batch]
            y = torch.tensor([labels[i % len(labels)] for i in indices], device=device) if labels else None
            images = generate(diffusion, indices, args.seed, device, y, protocol["sampler"], protocol["steps"],
                              protocol["guidance"], protocol["guidance_interval"])  # fmt: skip
            for i, pixels in zip(indices, to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()):
                write_atomically(files[i], functools.partial(Image.fromarray(pixels).save, format="PNG"), sync=False)
            bar.update(len(indices) * world)
    while rank == 0 and not all(file.exists() for file in files):  # the other processes' share; no collective
        time.sleep(0.2)
    return files


# ---- scores -----------------------------------------------------------------------------------------------


def load_features(args, device):
    """`--features` as a function: images (N, 3, S, S) uint8 -> (N, D). Raises InputError where weights are missing."""
    if args.features != "inception":
        try:
            encoder = load_encoder(args.features, device, antialias=True)
        except ValueError as error:
            raise InputError(f"--features {args.features}: {error}; or use inception") from error

        def encode(images):
            try:
                return encoder(images / 127.5 - 1)[1]
            except ValueError as error:
                raise InputError(f"--features {args.features}: {error}") from error

        return encode
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    weights = args.features_weights
    try:
        inception = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except Exception as error:  # torch.hub's or urllib's download, torch.load, load_state_dict
        raise InputError(
            f"--features inception: the network's weights could not be loaded ({str(error)[:200]}). Without "
            f"--features-weights, torch-fidelity downloads {URL_INCEPTION_V3} to {torch.hub.get_dir()}/checkpoints; "
            "fetch that file yourself and pass --features-weights FILE"
        ) from error
    inception.eval().requires_grad_(False).to(device)
    return lambda images: inception(images)[0]


def open_reference(spec, size):
    """The images of `--score SPEC`. Raises InputError where they are smaller than what they are compared with."""
    reference = Images(spec, size)
    for i in range(0, len(reference), math.ceil(len(reference) / 16)):
        with reference.open(reference.readable(i)[0]) as image:
            if min(image.size) < size:
                raise InputError(
                    f"--score {spec}: {image.width}x{image.height} pixels ({reference.names[i]}) against a model of "
                    f"{size}: enlarged images are no reference; give one at least as large"
                )
    return reference


def extract(images, features, device, batch):
    """The features (n, D) of the readable images of a data set."""
    found, loader = [], DataLoader(images, batch, num_workers=min(4, os.cpu_count() or 1))
    with torch.no_grad(), progress(total=len(images), unit="img", desc="features", leave=False) as bar:
        for _, pixels, good in loader:
            found.append(features(pixels[good].to(device)).float().cpu())
            bar.update(len(good))
    return torch.cat(found)


def frechet_distance(a, b):
    """Between two sets of features (n, D), by torch-fidelity: the FID where they are Inception's."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a, b = fid_features_to_statistics(a), fid_features_to_statistics(b)
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def record_score(folder, result):
    """Print a score with its protocol, and add it to scores.jsonl in a folder."""
    for key, entry in result.items():
        print(f"  {key:18} {entry}")
    count = min(result["images"], result["reference_images"])
    if count < 10_000:
        print(f"  note: {count} images; below 10,000 the distance is biased upwards: compare equal counts only")
    with (Path(folder) / "scores.jsonl").open("a") as log:
        log.write(json.dumps(result) + "\n")


def score(files, protocol, args, reference, features, device):
    """Frechet distance (FID, with Inception's features) of PNG files to the reference, by torch-fidelity; printed, and
    saved in scores.jsonl beside the folder, with its protocol. Raises InputError where the sizes do not match.
    """
    for file in files:
        with Image.open(file) as image:
            if image.size != (reference.size, reference.size):
                raise InputError(f"{file}: {image.width}x{image.height} pixels, not the model's {reference.size}")
    made = Subset(Images(str(files[0].parent), reference.size), range(len(files)))
    samples, others = (extract(images, features, device, args.batch) for images in (made, reference))
    reference.check_unreadable(len(reference) - len(others))
    result = {"frechet_distance": frechet_distance(samples, others), "features": args.features,
              "features_weights": args.features_weights, "images": len(samples), "reference": args.score,
              "reference_images": len(others), "format": "PNG", "crop": crop_text(reference.size),
              "folder": files[0].parent.name, **protocol}  # fmt: skip
    record_score(files[0].parent.parent, result)


def crop_text(size):
    return f"centre, box halving, bicubic to {size}"


# ---- trajectory -------------------------------------------------------------------------------------------


def noise_spectrum(diffusion, device="cpu", scale=1e-2, pixels=2**21):
    """Power per radial band (bands,) of unit noise as the decoder makes it: in DCT space far from white, since chroma is
    noised at half resolution and dropped coefficients are not noised. Measured at `scale`, where nothing clips, on as
    many draws as hold `pixels`: within 3%.
    """
    g, blank = generator(0, 5), diffusion.field(torch.zeros(1, *diffusion.shape, device=device))
    draws = max(8, pixels // blank[0, 0].numel())
    noise = (torch.randn(min(draws, 64), *diffusion.shape, generator=g).to(device) for _ in range(0, draws, 64))
    return torch.cat([psd((diffusion.field(scale * e) - blank) / scale) for e in noise]).mean(0)


def drowning_times(diffusion, power, device="cpu"):
    """The t (bands,) at which the forward process drowns each radial band: from there on the SNR, of data of this power
    (bands,) to the decoded noise, is below 1. nan where the power is nan.
    """
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:]
    alpha, sigma = diffusion.path.alpha_sigma(t)
    snr = (alpha / sigma) ** 2 * (power / noise_spectrum(diffusion, device)).double().cpu()[:, None]  # (bands, times)
    return t[(snr >= 1).sum(1).clamp_max(len(t) - 1)].where(power.isfinite().cpu(), torch.nan)


def trajectory(diffusion, protocol, args, stem, device, columns=10, rows=8):
    """Write the x0 predictions along one sampling run as a strip, and print the share of every radial band recovered
    so far (its power in the prediction over its power at the end; in latent space, of the latents): low frequencies
    come first (DCTdiff, section 3). Beside it, the t where the forward process drowns the band (`drowning_times`).
    """
    labels, seen = protocol["classes"], []
    y = torch.tensor([labels[i % len(labels)] for i in range(rows)], device=device) if labels else None
    final = generate(diffusion, range(rows), args.seed, device, y, protocol["sampler"], protocol["steps"],
                     protocol["guidance"], protocol["guidance_interval"], lambda t, x: seen.append((t, x)))  # fmt: skip
    shown = [seen[round(k)] for k in np.linspace(0, len(seen) - 1, min(columns, len(seen)))]
    strip = torch.stack([diffusion.decode(x0) for _, x0 in shown] + [final], 1).flatten(0, 1)
    print(f"x0 predictions, noise on the left: {save_grid(strip, f'{stem}-trajectory.png', len(shown) + 1)}")
    power = psd(seen[-1][1] if diffusion.vae else final).mean(0)  # (bands,)
    power = power.where(power > 1e-9 * power.sum(), torch.nan)  # a small field has no power in some bands
    shares = torch.stack([psd(diffusion.field(x0)).mean(0) / power for _, x0 in shown], 1).cpu()  # (bands, columns)
    drowned = drowning_times(diffusion, power, device).tolist()
    print("share of a band's final power in the x0 prediction, at t =")
    print("band  SNR<1 at " + "".join(f"{t:6.2f}" for t, _ in shown))
    for band, row in enumerate(shares.tolist()):
        if math.isfinite(row[0]):
            print(f"{band:4d}  {drowned[band]:8.2f} " + "".join(f"{share:6.2f}" for share in row))

    def finite(row):
        return [value if math.isfinite(value) else None for value in row]

    table = {"t": [t for t, _ in shown], "share": [finite(row) for row in shares.tolist()],
             "snr_below_1_at": finite(drowned), **protocol}  # fmt: skip
    Path(f"{stem}-trajectory.json").write_text(json.dumps(table))


# ---- command line -----------------------------------------------------------------------------------------


def run_program(main, args):
    """main(args), a user's mistake as one line and exit code 2. An empty value ("$UNSET") is one: not the default."""
    try:
        for name, value in vars(args).items():
            if "" in (value if isinstance(value, list) else [value]):
                flag = "RUN_OR_CKPT" if name == "run" else f"--{name.replace('_', '-')}"
                raise InputError(f"{flag}: its value is empty; give it one, or leave it out")
        main(args)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(3)  # process 0 has most likely met the same, says so, and torchrun ends the others
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def open_model(args, device):
    """-> (config, weights, step, the frozen VAE or None) of a run, or of published weights. Raises InputError."""
    if bool(args.run) == bool(args.ckpt):
        raise InputError("name a run folder of train_diffusion.py, or published weights by --ckpt FILE --model NAME")
    if args.ckpt:
        if not args.model:
            raise InputError(f"--ckpt {args.ckpt}: --model NAME says which network it is of, such as dit-xl/2")
        vae = load_autoencoder(args.vae, device) if args.vae else None
        config, weights = published_network(args.ckpt, args.model, vae, ema=not args.no_ema)
        if vae and vae[0].factor != 8 and int(os.environ.get("RANK", 0)) == 0:
            print(f"note: --vae {args.vae} has {vae[0].factor} pixels a latent pixel; published models are of 8")
        return config, weights, 0, vae and vae[0]
    if args.model:
        raise InputError(f"--model {args.model}: is for --ckpt; {args.run} says itself what it is")
    checkpoint, vae = read_checkpoint(args.run), None
    config = checkpoint["config"]
    if config["space"] == "latent":
        path = args.vae or run_folder(args.run) / "autoencoder.pt"
        vae, _ = open_autoencoder(path, device, config["autoencoder"], args.run)
    elif args.vae:
        raise InputError(f"--vae {args.vae}: {args.run} works on {config['space']}, without an autoencoder")
    return config, checkpoint["model" if args.no_ema else "ema"], checkpoint["step"], vae


def main(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for flag, value, least in (
        ("n", args.n, 1),
        ("batch", args.batch, 1),
        ("steps", args.steps, 1),
        ("seed", args.seed, 0),
    ):
        if value < least:
            raise InputError(f"--{flag} {value}: must be at least {least}")
    for flag, file in (("npz", args.npz), ("grid", args.grid)):
        if file and (Path(file).is_dir() or Path(file).suffix != {"npz": ".npz", "grid": ".png"}[flag]):
            raise InputError(f"--{flag} {file}: must be a file that ends in {'.npz' if flag == 'npz' else '.png'}")
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
    device = choose_device(args.device)
    config, weights, step, vae = open_model(args, device)
    samplers = SAMPLERS[config["path"]]
    sampler = args.sampler or next(iter(samplers))
    if sampler not in samplers:
        raise InputError(
            f"--sampler {sampler}: not for this model's {config['path']} path, which takes {', '.join(samplers)}"
        )
    if config["classes"] is None and args.guidance != 1:
        raise InputError(f"--guidance {args.guidance}: this model was trained without classes, nothing can guide it")
    if args.guidance != 1 and not config["label_dropout"]:
        raise InputError(f"--guidance {args.guidance}: trained with --label-dropout 0, this model knows no null class")
    amp, dtype = autocast(args.amp, device, tf32=True)
    diffusion = Diffusion(config, vae=vae, amp=amp)
    load_weights(diffusion.network, weights, args.run or args.ckpt)
    diffusion.network.to(device).eval()

    reference = features = None
    if args.score and rank == 0 and not args.trajectory:  # whatever is wrong with them shows before an hour of sampling
        reference, features = open_reference(args.score, config["size"]), load_features(args, device)
        features(torch.zeros(1, 3, config["size"], config["size"], dtype=torch.uint8, device=device))
    protocol = {"weights": fingerprint(weights), "checkpoint_step": step, "ema": not args.no_ema,
                "sampler": sampler, "steps": args.steps, "guidance": args.guidance,
                "guidance_interval": list(args.guidance_interval), "seed": args.seed,
                "amp": str(dtype or torch.float32).removeprefix("torch."),
                "classes": parse_classes(args.classes, config["classes"])}  # fmt: skip
    protocol |= {"autoencoder": config["autoencoder"]} if config["space"] == "latent" else {}
    name = Path(args.ckpt).stem if args.ckpt else f"step{step}"
    name += f"-{sampler}{args.steps}-g{args.guidance:g}-seed{args.seed}"
    if args.guidance_interval != [0, 1]:
        name += "-t{:g}-{:g}".format(*args.guidance_interval)
    if args.classes:
        name += f"-classes{'-'.join(map(str, protocol['classes']))[:40]}"
    name += "-no-ema" * args.no_ema
    folder = Path(args.out) if args.out else run_folder(args.run or args.ckpt) / "samples" / name
    if args.trajectory:
        if rank == 0:
            trajectory(diffusion, protocol, args, folder, device)
        return
    files = sample_files(diffusion, protocol, args, folder, device, rank, world)
    if rank > 0:
        return
    print(f"{args.n} images in {folder}")
    shown = files[:64] if args.grid is None else files
    pixels = np.stack([np.asarray(Image.open(file)) for file in (files if args.npz else shown)])  # (n, S, S, 3)
    grid = torch.from_numpy(pixels[: len(shown)]).permute(0, 3, 1, 2) / 127.5 - 1
    print(f"grid {save_grid(grid, args.grid or f'{folder}.png', math.ceil(math.sqrt(len(shown))))}")
    if args.npz:
        write_atomically(args.npz, lambda f: np.savez(f, pixels))
        print(f"{pixels.shape} uint8 in {args.npz}")
    if args.score:
        score(files, protocol, args, reference, features, device)


def add_device_flags(add):
    """The flags of all programs that say where and in which precision they run."""
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="precision of the networks' products (default: auto, bf16 where the hardware multiplies it, else fp16 on "
        "CUDA and off on a CPU)")  # fmt: skip


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN_OR_CKPT", nargs="?", help="run folder of train_diffusion.py, or a checkpoint file")
    add("--ckpt", metavar="FILE", help="instead of RUN_OR_CKPT: published weights of a DiT, SiT or U-ViT")
    add("--model", metavar="NAME", help="their network: dit-xl/2, sit-xl/2, uvit-h/2, ...")
    add("--vae", metavar="RUN_OR_FILE", help="the autoencoder: SD-VAE weights in their original layout for --ckpt; for a "
        "run, where its own is elsewhere (default: RUN/autoencoder.pt)")  # fmt: skip
    # -n as well: on Python 3.11, torchrun takes --n for an abbreviation of its own flags
    add("-n", "--n", type=int, default=64, help="images (default: 64)")
    add("--out", metavar="DIR", help="folder of the PNG files (default: in RUN/samples/, named after the settings)")
    add("--npz", metavar="FILE", help="also write them as one uint8 array (n, S, S, 3), the ADM evaluation format")
    add("--grid", metavar="FILE", help="the grid, with all n images (default: beside --out, the first 64)")
    add("--batch", type=int, default=64, help="images at a time, in each process (default: 64)")
    add("--seed", type=int, default=0, help="image i depends on (seed, i) alone (default: 0)")
    add("--sampler", help="vp: dpm++, ddim, ddpm, euler-ode, euler-sde; flow: euler, heun, sde, which as "
        "published leaves noise of std 0.04 (default: the first)")  # fmt: skip
    add("--steps", type=int, default=50, help="sampler steps (default: 50)")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance scale (default: 1, none)")
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("A", "B"),
        help="t between which guidance acts (default: 0 1)")  # fmt: skip
    add("--classes", nargs="+", help="names or numbers, dealt in turn (default: all)")
    add("--no-ema", action="store_true", help="sample the raw weights instead of their average")
    add("--score", metavar="SPEC", help="Frechet distance to this data, given as train_diffusion.py's --data")
    add("--features", default="inception", help="inception, hog or a torch.hub encoder REPO:ENTRY (default: inception)")
    add("--features-weights", metavar="FILE", help="local Inception weights (default: torch-fidelity downloads them)")
    add("--trajectory", action="store_true", help="only show one sampling run, band by band")
    add_device_flags(add)
    return parser


if __name__ == "__main__":
    run_program(main, make_parser().parse_args())
