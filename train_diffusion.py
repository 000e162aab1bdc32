"""Stage 2: train a diffusion model on block-DCT tokens (DCTdiff, arXiv
2412.15032), on latents or on pixels.

    python train_diffusion.py                     # built-in images, minutes
    python train_diffusion.py --data photos/ --size 64
    torchrun --nproc_per_node=8 train_diffusion.py --data photos.zip --size 256
    python train_diffusion.py --latents photos.latents    # of train_vae.py
    python train_diffusion.py --latents photos.latents --repa dog
    python train_diffusion.py --latents photos.latents --encoder hog --rmsc
    python train_diffusion.py --data mine/ --size 64 --init runs/photos

The same command again resumes. The method comes first: paths, loss, the model,
DDIM; then training. Tokens are in dct.py, representation alignment in repa.py,
more samplers in sample.py, what all programs share in train_vae.py.
"""

# What is random in a step follows from (seed, step), what data it sees from (seed, images seen), whatever the number of
# processes: that is all the state a resumed run needs.

import argparse
import bisect
import contextlib
import copy
import itertools
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from dct import DCTCodec, DCTStatistics, ebfr_weights, psnr_per_keep
from dit import DIT_SIZES, DiT
from dit import read_published as read_dit
from repa import DOG_SIGMAS, PATCH_ENCODER_SIZE, Aligned, alignment_loss, as_map, frechet_distance, lds
from repa import make_projector, make_target, principal_colours, resize_tokens
from spectral_losses import band_error, directional_energy, rmsc
from train_vae import CHECKPOINT, HELD, NETWORKS, NOISE, POSTERIOR, SIDE, TIMES
from train_vae import Features, Images, InputError, Parser, Pixels, Processes, Records, Run
from train_vae import add_training_flags, at_least, autocast, check_form, check_norm, count_flops, each, flag_name
from train_vae import fraction, generator, holding, image_noise, initialize, latent_statistics, load_autoencoder
from train_vae import load_plain, maybe, mirrored, norm_text, one_of, open_encoder, progress, quoted, read_checkpoint
from train_vae import real, run_program, save_grid, seems, short_name, spread, state_dicts, string, to_uint8
from train_vae import update_ema, whole, write_atomically
from uvit import UVIT_SIZES, UViT
from uvit import read_published as read_uvit
from vae import latent_norm, sample_posterior

# ---- method: noise paths and predictions ------------------------------------------------------------------

PREDICTIONS = ("eps", "v", "x0")
LEAST_SIGMA = 1e-4  # to divide by, with x0 prediction: sigma(0) is 0


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
        return 1 - t, t  # c moves t instead, see `time`

    def velocity(self, alpha, sigma):
        return -torch.ones_like(sigma), torch.ones_like(alpha)


PATHS = {"vp": VP, "vp-sd": StableDiffusionVP, "flow": Flow}


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


# ---- method: loss -----------------------------------------------------------------------------------------

X0_FLOOR = 0.04  # x0 errors are weighted 1 / (sigma^2 + this): the v loss, bounded near t = 0


def diffusion_loss(diffusion, network, x0, eps, t, y=None, drop=None, weights=None, tokens=None):
    """Squared error of the prediction at x_t = alpha x0 + sigma e, a mean per example, and the alignment of the
    network's hidden tokens to target tokens (N, T, D), 0 without any. network: an `Aligned`.

    x0, eps (N, *shape), t (N,), y (N,) classes, drop (N,) bool, weights (token_dim,) of EBFR -> twice (N,) float32
    """
    alpha, sigma = diffusion.path.alpha_sigma(like(t, x0))
    output, student = diffusion.call(network, alpha * x0 + sigma * eps, t, y, drop)
    error = (output.float() - target(diffusion.path, diffusion.predict, x0, eps, t)).square()
    if weights is not None:
        error = error * weights
    if diffusion.predict == "x0":
        error = error / (sigma**2 + X0_FLOOR)
    aligned = torch.zeros_like(t) if tokens is None else alignment_loss(student, tokens)
    return error.flatten(1).mean(1), aligned


def draw_times(n, sampling, mean_std, path, generator):
    """t (n,): uniform along the path's time, or logit-normal in it (arXiv 2403.03206, section 3.1)."""
    if sampling == "uniform":
        u = torch.rand(n, generator=generator, device=generator.device)
    else:
        u = torch.sigmoid(mean_std[0] + mean_std[1] * torch.randn(n, generator=generator, device=generator.device))
    return path.time(u)


# ---- method: the model, images in, images out -------------------------------------------------------------

LATENT_PATCH = 2  # of networks on latents, unless --model says /PATCH
VAE_BATCH = 16  # images an autoencoder sees at a time: it takes far more memory than the network on its latents


class Diffusion:
    """A network with its path, prediction and space: images in, images out.

    config, plain values: space ("pixel", "dct" or "latent"), size, model, path (of PATHS), snr_scale, predict,
    classes (names, or None), label_dropout; in DCT space also block, keep, eta; in latent space latent_shape
    [C, h, w], autoencoder (hash of its weights), scale and shift (absent: 0), each a number or a list by channel, which
    normalise latents: (z - shift) scale. Published weights add network (more arguments of it). vae: the frozen
    autoencoder, in latent space. amp() is the context in which the networks run (see `autocast`); all else is computed
    in float32.
    """

    def __init__(self, config, network=None, vae=None, amp=contextlib.nullcontext):
        self.config, self.predict, self.classes = config, config["predict"], config["classes"]
        self.path, self.vae, self.amp = PATHS[config["path"]](config["snr_scale"]), vae, amp
        self.codec = make_codec(config) if config["space"] == "dct" else None
        self.network = network or build_network(config)
        # As published: DiT and U-ViT are called with 999 t, SiT, which is DiT on the flow path, with t in 0..1.
        self.time_scale = 1.0 if config["path"] == "flow" and isinstance(self.network, DiT) else 999.0
        shape = config["latent_shape"] if config["space"] == "latent" else (3, config["size"], config["size"])
        norm = (config.get("scale", 1.0), config.get("shift", 0.0))
        norm = (torch.tensor(value).view(-1, 1, 1) for value in norm)  # (1 or C, 1, 1)
        self.scale, self.shift = (value.to(next(vae.parameters()).device) if vae else value for value in norm)
        self.shape = (self.codec.num_tokens, self.codec.token_dim) if self.codec else tuple(shape)

    @property
    def device(self):
        return next(self.network.parameters()).device

    def encode(self, images, noise=None):
        """(N, 3, S, S) in [-1, 1] -> what the network works on, (N, *shape). Of latents: a sample of the posterior, by
        noise (N, *shape), or its mean.
        """
        if self.config["space"] == "latent":
            with torch.no_grad(), self.amp():
                moments = torch.cat([torch.cat(self.vae.encode(part), 1) for part in images.split(VAE_BATCH)])
            return self.from_moments(moments.float(), noise)
        return self.codec.encode(images) if self.codec else images

    def from_moments(self, moments, noise=None):
        """The same from the mean and log variance that the autoencoder makes of images, (N, 2C, h, w)."""
        mean, logvar = moments.chunk(2, 1)
        return ((mean if noise is None else sample_posterior(mean, logvar, noise)) - self.shift) * self.scale

    def decode(self, x):
        """(N, *shape) -> images (N, 3, S, S) in [-1, 1]."""
        if self.config["space"] == "latent":
            parts = (x / self.scale + self.shift).split(VAE_BATCH)
            with self.amp():
                return torch.cat([self.vae.decode(part).float() for part in parts]).clamp(-1, 1)
        return self.codec.decode(x) if self.codec else x.clamp(-1, 1)

    def field(self, x):
        """What spectra are taken of: images, in latent space the latents themselves."""
        return x if self.config["space"] == "latent" else self.decode(x)

    def call(self, network, x, t, y=None, drop=None):
        """What a network, or an `Aligned`, returns at t (N,)."""
        with self.amp():
            return network(x, t * self.time_scale, y, drop)

    def denoiser(self, y=None, guidance=1.0, interval=(0.0, 1.0), trace=None):
        """denoise(x, t) -> (x0, eps) for the samplers. Classifier-free guidance (arXiv 2207.12598) within an interval
        of t (2404.07724): null + guidance (class - null); 1 is the class alone, 0 the null class alone. trace(t, x0),
        where there is one, is called with the prediction of x0 at every evaluation.
        """

        def output(*given):
            return self.call(self.network, *given).float()

        def denoise(x, t):
            scale = guidance if y is not None and interval[0] <= t[0] <= interval[1] else 1.0
            if scale == 1.0:
                out = output(x, t, y)
            else:
                drop = torch.arange(2 * len(x), device=x.device) >= len(x)
                out, null = output(torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, y)), drop).chunk(2)
                out = null + scale * (out - null)
            x0, eps = x0_and_eps(self.path, self.predict, x, t, out)
            if trace:
                trace(t[0].item(), x0)
            return x0, eps

        return denoise


def parse_model(name):
    """'uvit-s', 'dit-b/2' -> (class, its size arguments, patch size or None). Raises InputError."""
    base, slash, patch = name.lower().partition("/")
    kind, _, size = base.partition("-")
    network, sizes = {"uvit": (UViT, UVIT_SIZES), "dit": (DiT, DIT_SIZES)}.get(kind, (None, {}))
    if size not in sizes or (slash and not (patch.isdecimal() and 0 < int(patch[:6]) <= SIDE)):
        names = ", ".join([f"uvit-{s}" for s in UVIT_SIZES] + [f"dit-{s}" for s in DIT_SIZES])
        text = f"it takes {names}, with /PATCH in pixel and latent space (dit-b/2)"
        raise InputError(f"--model {name}: unknown; {text}; a SiT is a dit on --path flow")
    return network, sizes[size], int(patch) if slash else None


def build_network(config):
    """The network of a config (see `Diffusion`). Raises InputError where its parts do not fit together."""
    network, kwargs, patch = parse_model(config["model"])
    kwargs, classes = dict(kwargs), len(config["classes"] or ())
    if network is DiT:
        kwargs |= dict(num_classes=classes, learn_sigma=False, class_dropout_prob=config["label_dropout"])
    else:  # U-ViT counts the null class
        kwargs |= dict(num_classes=classes + (config["label_dropout"] > 0) if classes else -1)
    if config["space"] == "dct":
        if patch:
            raise InputError(f"--model {config['model']}: in DCT space a token is one 2B x 2B area; leave /{patch} out")
        codec = make_codec(config)
        kwargs |= dict(num_tokens=codec.num_tokens, token_dim=codec.token_dim)
    else:
        latent = config["space"] == "latent"
        channels, side = config["latent_shape"][:2] if latent else (3, config["size"])
        names = ("input_size", "in_channels") if network is DiT else ("img_size", "in_chans")
        kwargs |= {names[0]: side, names[1]: channels}
        kwargs |= {"patch_size": patch or (LATENT_PATCH if latent else max(1, side // 16))}
    try:
        return network(**kwargs | config.get("network", {}))
    except ValueError as error:
        raise InputError(f"--model {config['model']} at --size {config['size']}: {error}") from error


def make_codec(config):
    size, block, keep = (config[name] for name in ("size", "block", "keep"))
    try:
        return DCTCodec(size, block, keep, config["eta"])
    except ValueError as error:
        raise InputError(f"--size {size} --block {block} --keep {keep}: {error}") from error


# ---- method: sampling -------------------------------------------------------------------------------------


def time_grid(path, steps, x, end=0.0):
    """Sampler times from 1 to `end` -> (steps + 1,) float32"""
    return path.time(torch.linspace(1, end, steps + 1, dtype=torch.float64, device=x.device)).float()


def ddim(denoise, path, x, steps, noise, eta=0.0):
    """DDIM (arXiv 2010.02502, equation 12), on the flow path an Euler step; eta = 1 is DDPM's ancestral sampler
    (2006.11239). denoise(x, t (N,)) -> (x0, eps); x at t = 1; noise() is normal, shaped like x -> x at t = 0.
    """
    times = time_grid(path, steps, x)
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, t.expand(len(x)))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
        std = eta * sigma_s / sigma_t * (1 - (alpha_t / alpha_s) ** 2).sqrt()
        x = alpha_s * x0 + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps
        if eta:
            x = x + std * noise()
    return x


@torch.no_grad()
def generate(diffusion, indices, seed, device, y=None, sampler=ddim, steps=50, guidance=1, interval=(0, 1), trace=None):
    """Images number `indices` of a seed -> (n, 3, S, S) in [-1, 1]. The noise of each comes from (seed, its index).

    y (n,) classes on `device`, or None; guidance, interval and trace are of `Diffusion.denoiser`.
    """
    generators = [generator(seed, int(i)) for i in indices]

    def noise():
        return torch.stack([torch.randn(diffusion.shape, generator=g) for g in generators]).to(device)

    denoise = diffusion.denoiser(y, guidance, interval, trace)
    return diffusion.decode(sampler(denoise, diffusion.path, noise(), steps, noise))


# ---- measuring --------------------------------------------------------------------------------------------

GRID_STEPS, GRID_GUIDANCE = 50, 1.5
LEVELS = (0.1, 0.5, 0.9)  # t at which the error by band is measured
EVAL_IMAGES = 1024  # looked at by an evaluation, up to 64 px; a quarter of them above


@torch.no_grad()
def make_examples(diffusion, validation, data, batch):
    """What evaluations look at, of --val or else of the training data (`Pixels` or moments): batches x0, y, drop on the
    CPU. drop, all True, makes images without labels examples of the null class, where the model has classes.
    """
    examples, noise, count = [], generator(0, 5), EVAL_IMAGES if diffusion.config["size"] <= 64 else EVAL_IMAGES // 4
    if validation:
        validation.thin(count)
        batches = ((where[good], pixels[good]) for where, pixels, good in DataLoader(validation, batch) if good.any())
    else:
        chosen = torch.from_numpy(spread(data.indices, count)).split(batch)
        batches = ((where, data.read(where.numpy())) for where in chosen)
    labels = (validation or data).labels
    for where, values in batches:
        values = values.to(diffusion.device).float()
        # of the moments of image and mirror image, the image's
        x, moments = (None, values[:, 0]) if values.ndim == 5 else (values / 127.5 - 1, None)
        drawn = torch.randn(len(where), *diffusion.shape, generator=noise).to(values) if diffusion.vae else None
        x0 = to_x0(diffusion, x, moments, drawn).cpu()
        y = torch.zeros(len(where)).long() if labels is None else torch.from_numpy(np.asarray(labels)[where.numpy()])
        drop = where >= 0 if labels is None else None
        examples.append((x0, y, drop) if diffusion.classes else (x0, None, None))
    if validation:
        validation.check_unreadable(len(validation) - sum(len(x0) for x0, _, _ in examples))
    return examples


@torch.no_grad()
def evaluate(diffusion, examples, seed, batch, folder, held_out, step):
    """`Run`'s evaluation: a grid of samples, the x0 error by band, held_out(diffusion, examples), a loss, or None."""
    config, classes, device = diffusion.config, diffusion.classes, diffusion.device
    parts = torch.arange(64 if config["size"] <= 64 else 16).split(batch)
    guidance, pictures = GRID_GUIDANCE if classes and config["label_dropout"] else 1.0, []
    total = len(parts) * GRID_STEPS + len(examples) * (2 if held_out else 1)
    with progress(desc="evaluate", total=total, unit="batch") as bar:

        def on_device():
            for example in examples:
                yield [None if value is None else value.to(device) for value in example]
                bar.update()

        for part in parts:
            y = (part % len(classes)).to(device) if classes else None
            tick = lambda t, x0: bar.update()
            pictures.append(generate(diffusion, part, seed, device, y, ddim, GRID_STEPS, guidance, trace=tick))
        pictures = torch.cat(pictures)
        save_grid(pictures, folder / "samples" / f"step{step:07d}.png", math.isqrt(len(pictures)))
        errors = band_errors(diffusion, on_device(), seed)
        loss = held_out(diffusion, on_device()) if held_out else None
    text = " ".join("-" if error is None else f"{error:.2f}" for error in errors["0.5"][:8])
    return {"x0_error_by_band": errors}, f"x0 error by band at t = 0.5: {text}", loss


def band_errors(diffusion, examples, seed):
    """Power of the x0 error over power of the image (in latent space, of the latent), per radial band, at a low, middle
    and high t (DCTdiff, section 3) -> {t: [16 numbers]}, low to high; 1 is a prediction that knows nothing of the band,
    None a band without power. examples: batches (x0, y, drop); their noise follows from the seed.
    """
    fields, predictions, noise = [], {level: [] for level in LEVELS}, generator(seed, 2)
    for x0, y, drop in examples:
        fields.append(diffusion.field(x0))
        eps = torch.randn(x0.shape, generator=noise).to(x0.device)
        denoise = diffusion.denoiser(y, guidance=0.0 if drop is not None else 1.0)
        for level in LEVELS:
            t = torch.full((len(x0),), level, device=x0.device)
            alpha, sigma = diffusion.path.alpha_sigma(like(t, x0))
            predictions[level].append(diffusion.field(denoise(alpha * x0 + sigma * eps, t)[0]))
    ratios = {t: band_error(torch.cat(made), torch.cat(fields)).tolist() for t, made in predictions.items()}
    return {str(t): [r if math.isfinite(r) else None for r in ratio] for t, ratio in ratios.items()}


def held_out_loss(diffusion, examples, sampling, mean_std, weights):
    """Mean training loss of fixed examples, batches (x0, y, drop), at times and noise that are the same in all runs."""
    g, losses, network = generator(0, 4), [], Aligned(diffusion.network)
    for x0, y, drop in examples:
        t = draw_times(len(x0), sampling, mean_std, diffusion.path, g).to(x0.device)
        eps = torch.randn(x0.shape, generator=g).to(x0.device)
        losses.append(diffusion_loss(diffusion, network, x0, eps, t, y, drop, weights)[0])
    return torch.cat(losses).mean().item()


def diffusion_flops(diffusion):
    """Forward and backward FLOPs of one image."""
    x, t = torch.zeros(1, *diffusion.shape, device=diffusion.device), torch.zeros(1, device=diffusion.device)
    y = torch.zeros(1, dtype=torch.long, device=diffusion.device) if diffusion.classes else None
    flops = count_flops(lambda: diffusion.call(diffusion.network, x, t, y).sum())
    diffusion.network.zero_grad(set_to_none=True)
    return flops


# ---- codec, autoencoder, targets --------------------------------------------------------------------------

CODEC_IMAGES, CODEC_PIXELS = 50_000, 300e6  # looked at for eta and entropies
KEEP_IMAGES = 5000  # looked at by --keep auto [ours; the paper: 50,000]


def measure_codec(pixels, size, block, keep, scaling, features, threshold, processes):
    """The codec's part of a config, measured on the data by all processes: keep, eta (of naive scaling a number each
    coefficient), entropies. Keep "auto" is that of `fewest_coefficients`, where process 0 has features, or the default.
    Prints PSNR by keep.
    """
    statistics, read = DCTStatistics(block, device=processes.device), lambda where: pixels.read(where) / 127.5 - 1
    chosen = spread(pixels.indices, int(max(1, min(CODEC_IMAGES, CODEC_PIXELS / size**2))))
    parts = torch.from_numpy(chosen[processes.rank :: processes.world]).split(max(1, 2**21 // size**2))
    for part in progress(parts, desc="eta", unit="batch", disable=not processes.main):
        statistics.update(read(part.numpy()).to(processes.device))
    processes.sum(statistics.counts)
    eta, entropies = statistics.eta(), statistics.entropies()
    if processes.main:
        psnr = psnr_per_keep(read(spread(pixels.indices, 64 if size <= 128 else 16)).to(processes.device), block)
        if keep == "auto" and not features:
            keep = default_keep(block, size)
            print(f"keep     auto: {keep}, the default for blocks of {block}; with --features SPEC it is measured")
        elif keep == "auto":
            codec = partial(DCTCodec, size, block, eta=eta)
            keep = fewest_coefficients(pixels, codec, features, threshold, psnr.tolist(), processes.device)
        counts = sorted({1, max(1, keep // 2), keep, min(keep + 1, len(psnr)), len(psnr)})
        by_keep = ", ".join(f"{count}: {psnr[count - 1]:.1f}" for count in counts)
        print(f"codec    B {block}, keep {keep}, eta {eta:.3f} from {len(chosen)} images")
        print(f"         PSNR by keep, dB: {by_keep} (all kept: the rest is lost to halved chroma)")
        for name, row in zip(("Y", "Cb", "Cr"), entropies[:, :keep].tolist()):
            print(f"         H({name}) ".ljust(15) + " ".join(f"{h:.2f}" for h in row[:12]) + " ..." * (len(row) > 12))
    keep = processes.sum(torch.tensor(keep if processes.main else 0, device=processes.device)).item()
    if scaling == "naive":
        eta = statistics.scales()[:, :keep].tolist()
        processes.print("         naive: Y over " + " ".join(f"{bound:.0f}" for bound in eta[0]))
    return {"keep": keep, "eta": eta, "entropies": entropies.tolist()}


@torch.no_grad()
def fewest_coefficients(pixels, codec, features, threshold, psnr, device):
    """m* (DCTdiff, section 4.1): the fewest coefficients per block with which images, coded by codec(keep=), are at a
    Frechet distance below `threshold` from themselves; by bisection, as the distance falls with their number. Prints
    those tried beside their `psnr`, of 1..B*B. Raises InputError where even all do not do.
    """
    where, most, tried = spread(pixels.indices, KEEP_IMAGES), len(psnr), {}
    parts = torch.from_numpy(where).split(64 if pixels.images.size <= 256 else 16)

    def summary(title, change):
        bar = progress(parts, desc=title, unit="batch")
        return torch.cat([features(change(pixels.read(part.numpy()).to(device))) for part in bar])

    def near(keep):
        coder = codec(keep=keep)
        coded = summary(f"keep {keep}", lambda x: to_uint8(coder.decode(coder.encode(x / 127.5 - 1))))
        tried[keep] = frechet_distance(originals, coded)
        return tried[keep] < threshold

    originals = summary("features", lambda x: x)
    keep = 1 + bisect.bisect_left(range(1, most + 1), True, key=near)
    print(f"keep     distance and PSNR of {len(where)} images to themselves coded")
    for count, distance in sorted(tried.items()):
        chosen = f", the fewest below {threshold:g}" * (count == keep)
        print(f"{count:8} {distance:9.4f} {psnr[count - 1]:6.1f} dB{chosen}")
    if keep > most:
        rest = f"even all {most} coefficients, with halved chroma, are at {tried[most]:.4g}"
        raise InputError(f"--keep-threshold {threshold:g}: {rest}; a higher threshold, or --keep {most}")
    return keep


def open_autoencoder(path, device, wanted=None, wanted_by=None):
    """`load_autoencoder`, the hash of its weights compared with that of the autoencoder that made the latents."""
    if not Path(path).exists():
        remedy = f"--vae RUN_OR_FILE names the one that made the latents ({wanted})"
        raise InputError(f"{path}: no such autoencoder; {remedy}")
    vae, info = load_autoencoder(path, device)
    if wanted not in (None, info["weights"]):
        other = f"another autoencoder ({info['weights']}) than made the latents of {wanted_by} ({wanted})"
        raise InputError(f"{path}: {other}; --vae RUN_OR_FILE names the right one")
    return vae, info


def open_vae(path, run, latents, size, device, latent_norm=None):
    """The frozen autoencoder of latent space, from `path` or from where it was -> (vae, the config's part of it, where
    it is). The scale is None where it is to be measured. Raises InputError.
    """
    header, config, copied = latents.header if latents else {}, {}, run.folder / "autoencoder.pt"
    if run.checkpoint:
        config = run.checkpoint["config"]
        if latents and header["autoencoder"] != config["autoencoder"]:
            made_by = f"made by autoencoder {header['autoencoder']}"
            begun = f"{run.folder} was begun with latents of {config['autoencoder']}"
            raise InputError(f"{latents.flag}: {made_by}, {begun}; give those, or another --out")
        path = path if path and (Path(path).exists() or not copied.exists()) else copied
    path = path or header.get("vae")
    if path is None:
        raise InputError(f"{latents.flag}: does not say where its autoencoder is; --vae RUN_OR_FILE does")
    made_by = header.get("autoencoder") or config.get("autoencoder")
    vae, info = open_autoencoder(path, device, made_by, latents.folder if latents else run.folder)
    if size % vae.factor:
        raise InputError(f"--size {size}: the autoencoder {path} takes multiples of {vae.factor}")
    sources = [config, header] + ([] if latent_norm else [info["config"], info["latent"] or {}])
    norm = next((source for source in sources if source.get("scale")), {})
    norm = {"latent_norm": norm.get("latent_norm", "one"), "scale": norm.get("scale"), "shift": norm.get("shift", 0.0)}
    shape = [vae.latent_channels, size // vae.factor, size // vae.factor]
    return vae, norm | {"latent_shape": shape, "autoencoder": info["weights"]}, path


def copy_autoencoder(path, folder):
    """Copy an autoencoder into a run, which sampling then needs nothing beside."""
    checkpoint = read_checkpoint(path, "autoencoder")
    copied = {name: checkpoint.get(name) for name in ("config", "step", "latent")}
    copied |= {"model": checkpoint["ema"] or checkpoint["model"], "ema": None}
    write_atomically(folder / "autoencoder.pt", lambda file: torch.save(copied, file))


class Targets:
    """The tokens that a network's hidden tokens are aligned to: by an encoder at every step, or from `Records` of what
    it made of all images. Raises InputError where the encoder cannot be had or either does not fit.
    """

    def __init__(self, spec, size, num_tokens, amp, processes, records=None):
        self.spec, self.side, self.processes, self.records = spec, math.isqrt(num_tokens), processes, None
        self.context, self.encoder = autocast(amp, processes.device)[0], None
        if records:
            self.use(records)
        else:
            resolution = PATCH_ENCODER_SIZE * max(1, size // 256)  # as published: 224 at 256 px, 448 at 512
            self.encoder, tokens = open_encoder(spec, size, processes, resolution)
            self.dim = tokens.shape[2]

    def use(self, records):
        """Take the tokens from records, without the encoder."""
        encoder, (_, _, count, self.dim) = records.header["encoder"], records.values.shape
        if encoder.rpartition(":")[2] != self.spec.rpartition(":")[2]:
            raise InputError(f"{records.flag}: tokens of {encoder}, not of --encoder {self.spec}; name another folder")
        if count != self.side**2:
            grids = f"{math.isqrt(count)} x {math.isqrt(count)} tokens, the model has {self.side} x {self.side}"
            raise InputError(f"{records.flag}: {grids}; name another folder")
        self.encoder, self.records = None, records

    def keep(self, folder, images, workers):
        """Make the records of all images in a folder, and use them."""
        header, shape = {"kind": "tokens", "encoder": self.spec}, (2, self.side**2, self.dim)
        make = partial(Records.make, folder, images, header, shape, self.encode_mirrored, self.processes)
        self.use(make(self.processes.workers(workers), 32, "--cache-targets"))

    @torch.no_grad()
    def tokens(self, images):
        """What the encoder makes of images (N, 3, S, S) in [-1, 1], on the network's grid: (N, T, D)"""
        with self.context():
            tokens = self.encoder(images)[0]
        return resize_tokens(tokens.float(), self.side)

    def encode_mirrored(self, pixels):
        """The tokens of images (n, 3, S, S) uint8 and of their mirror images, for `Records`."""
        x = pixels.to(self.processes.device) / 127.5 - 1
        return torch.stack((self.tokens(x), self.tokens(x.flip(-1))), 1).half().cpu().numpy()


TARGET_IMAGES = 256  # whose tokens --rmsc looks at
SHOWN_SIGMAS = ((0.0, 1.0), (0.0, 2.0), (0.6, 2.0), (0.0, 4.0), (0.0, math.inf))  # that --rmsc shows beside its own


def compare_targets(args):
    """`--rmsc`: LDS, RMSC and directional energy by band of raw, iREPA and DoG targets, on the data, before any
    training; and a picture of them.
    """
    processes, config = Processes(args.device), vars(args) | {"classes": None}
    if args.latents:
        _, channels, side, _ = Records(args.latents, "moments").values.shape[1:]
        config["latent_shape"] = [channels // 2, side, side]
    elif args.space == "latent":
        vae, _ = load_autoencoder(args.vae, processes.device)
        config["latent_shape"] = [vae.latent_channels, *2 * [args.size // vae.factor]]
    images = processes.local_first(lambda: Images(args.data, args.size))
    targets = Targets(args.encoder, args.size, meta_network(config).num_tokens, args.amp, processes)
    if not processes.main:
        return
    images.thin(TARGET_IMAGES)
    tokens, pictures = [], []
    with progress(total=len(images), unit="img", desc="targets") as bar:
        for _, pixels, good in DataLoader(images, min(32, args.batch)):
            pictures.append(pixels[good] / 127.5 - 1)
            tokens.append(targets.tokens(pictures[-1].to(processes.device)).cpu())
            bar.update(len(good))
    tokens, pictures, side = torch.cat(tokens), torch.cat(pictures), targets.side
    methods = {"raw (repa)": ("repa",), "irepa": ("irepa",)}
    methods |= {"dog {:g} {:g}".format(*sigmas): ("dog", sigmas) for sigmas in (args.repa_sigmas, *SHOWN_SIGMAS)}
    pick, bins = torch.from_numpy(spread(range(len(tokens)), 8)), max(2, min(8, side // 2))
    rows = [pictures[pick]]
    print(f"{args.encoder} on {len(tokens)} images of {images.spec}: {side} x {side} tokens of {targets.dim}")
    print("target         LDS   RMSC  directional energy by band, low to high")
    for name, method in methods.items():
        figures = []
        for part in tokens.split(16):  # pairs of tokens take room
            field = as_map(make_target(part, *method))
            figures.append(torch.cat((lds(field)[:, None], rmsc(field)[:, None], directional_energy(field, bins)), 1))
        means = torch.cat(figures).mean(0).tolist()
        print(f"{name:12}{means[0]:6.3f} {means[1]:6.3f}  " + " ".join(f"{energy:.3f}" for energy in means[2:]))
        rows.append(principal_colours(make_target(tokens[pick], *method), args.size))
    file = save_grid(torch.cat(rows), f"{args.out}-targets.png", len(pick))
    print(f"picture {file}: images, and a row a target, in its first three principal components")


# ---- checkpoints ------------------------------------------------------------------------------------------

# Forms of a config, see `check_form`.
CONFIG = {"size": whole(1, SIDE), "model": string, "path": one_of(*PATHS), "snr_scale": real(1e-30)}
CONFIG |= {
    "predict": one_of(*PREDICTIONS),
    "classes": maybe(each(string)),
    "label_dropout": real(0, math.nextafter(1.0, 0)),
}
SWITCHES = {f"{name}?": one_of(False, True) for name in ("conv", "mlp_time_embed", "qkv_bias")}
CONFIG |= {"network?": holding(SWITCHES | {"mlp_ratio?": real(0.01, 64)})}
BLOCK = {"block": whole(1, 256), "keep": whole(1)}
BLOCK |= {"eta": lambda eta: each(each(real(1e-30)), (3,))(eta if isinstance(eta, list) else [[eta]] * 3)}
BLOCK |= {"entropies": each(each(real(), range(1, 2**16 + 1)), (3,))}
LATENT_SHAPE = {"latent_shape": each(whole(1, SIDE), (3,)), "autoencoder": string}
SPACES = {"pixel": {}, "dct": BLOCK, "latent": LATENT_SHAPE}


def stored_network(config):
    """The network of a checkpoint's config (see `Diffusion`). Raises ValueError or InputError where that is false."""
    check_form(config, {"space": one_of(*SPACES)})
    check_form(config, CONFIG | SPACES[config["space"]])
    if config["space"] == "dct":
        check_form(config, {"entropies": each(lambda row: len(row) == config["block"] ** 2)})
    if config["space"] == "latent":
        check_norm(config, config["latent_shape"][0])
    return build_network(config)


NETWORKS["diffusion"] = stored_network


# ---- published networks -----------------------------------------------------------------------------------

SD_SCALE = 0.18215  # of SD-VAE latents, in every published latent model
# DCTdiff's, all U-ViTs on the vp path that predict eps. Classes, tokens, width and coefficients kept per block
# -> block, eta by data; c is SNR_SCALE's [code]
DCTDIFF = {
    (0, 64, 768, 4): (2, {"CIFAR-10": 242.382}),
    (0, 256, 512, 4): (2, {"CelebA 64": 244.925}),
    (1000, 256, 512, 4): (2, {"ImageNet 64": 247.125}),
    (1000, 256, 768, 4): (2, {"ImageNet 64": 247.125}),
    (0, 256, 512, 9): (4, {"FFHQ 128": 480.25}),
    (0, 1024, 768, 8): (4, {"FFHQ 256": 485.0}),
    (0, 1024, 768, 18): (8, {"FFHQ 512": 969.5, "AFHQ 512": 928.0}),
}


def read_network(checkpoint, kind, source, ema=True):
    """The dict in a published DiT's, SiT's or U-ViT's file -> the part of `Diffusion`'s config that keys and shapes
    tell, and the state dict: the average of the weights, or with ema=False the weights themselves. kind: "dit" or
    "sit", as which their common keys are read; source: flag and file. Raises InputError.
    """
    states = state_dicts(checkpoint)
    if not ema and not {"ema", "model"} <= states.keys():
        raise InputError(f"--no-ema: {source} holds one set of weights; leave it out")
    state = next(iter(states.values())) if ema else states["model"]
    try:
        config, weights = read_uvit(state) or read_dit(state, kind) or (None, None)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from error
    if config is None:
        raise InputError(f"{source}: its keys are no DiT's, SiT's or U-ViT's; {seems(state)}")
    tokens = "num_tokens" in config
    return config | {"space": "dct" if tokens else "pixel" if config["channels"] == 3 else "latent"}, weights


def published_network(file, name=None, vae=None, ema=True, codec=None):
    """A published network from its file -> (config of `Diffusion`, state dict). `name` says whether it is a DiT or a
    SiT (sit-xl/2), for which nothing else does; `codec` what a token network was trained with, see `dct_settings`.
    Raises InputError where they do not fit, or where a latent model finds no `vae`, (VAE, info) of `load_autoencoder`.
    """
    checkpoint, codec = load_plain(file), codec or {}
    kind = "sit" if (name or "").lower().startswith("sit") else "dit"
    if CHECKPOINT <= checkpoint.keys():
        raise InputError(f"--ckpt {file}: {seems(checkpoint)}; one of train_diffusion.py is given without --ckpt")
    config, weights = read_network(checkpoint, kind, f"--ckpt {file}", ema)
    model, space = config["model"].replace("sit-", "dit-", 1), config["space"]
    names = [model, model.replace("dit-", "sit-", 1)] if model.startswith("dit-") else [model]
    if name is None and len(names) > 1:
        raise InputError(f"--ckpt {file}: its keys are a DiT's or a SiT's; --model {' or '.join(names)} says which")
    if name and name.lower() not in [part for full in names for part in (full, full.partition("/")[0])]:
        raise InputError(f"--model {name}: {file} is a {' or '.join(names)}")
    config |= {"model": model, "snr_scale": 1.0}
    if space != "latent" and vae:
        raise InputError(f"--vae: {file} is a model of {'pixels' if space == 'pixel' else 'DCT tokens'}; leave it out")
    if space == "dct":
        classes, width = len(weights.get("label_emb.weight", ())), len(weights["proj.weight"])
        shapes = (classes, config.pop("num_tokens"), width, config.pop("token_dim") // 6)
        return config | dct_settings(shapes, f"--ckpt {file}", **codec), weights
    given = [flag_name(name) for name, value in codec.items() if value]
    if given:
        raise InputError(f"{given[0]}: is for networks on DCT tokens, {file} is one of maps")
    channels, side = config.pop("channels"), config.pop("side")
    if space == "pixel":
        return config | {"size": side}, weights
    if vae is None:
        raise InputError(f"--ckpt {file}: a model of {channels}-channel latents; --vae FILE names the SD-VAE's weights")
    autoencoder, info = vae
    if autoencoder.latent_channels != channels:
        raise InputError(f"--vae: latents of {autoencoder.latent_channels} channels, {file} takes {channels}")
    config |= {"space": "latent", "size": side * autoencoder.factor, "latent_shape": [channels, side, side]}
    norm = {name: info["config"][name] for name in ("scale", "shift") if name in info["config"]}  # of its config.json
    return config | {"scale": SD_SCALE, "autoencoder": info["weights"]} | norm, weights


def dct_settings(shapes, source, block=None, eta=None, snr_scale=None):
    """What a network on DCT tokens was trained with, a part of `Diffusion`'s config: as given, or else as the published
    one of these shapes, a key of `DCTDIFF`. Raises InputError, naming the flags that have to say it.
    """
    (classes, tokens, width, keep), (published, etas) = shapes, DCTDIFF.get(shapes, (None, {}))
    block = block or {keep: block for (*_, keep), (block, _) in DCTDIFF.items()}.get(keep)
    etas = etas if block == published else {}
    size = math.isqrt(tokens) * 2 * (block or 0)
    values = {"block": block, "eta": eta or (min(etas.values()) if len(etas) == 1 else None)}
    values["snr_scale"] = snr_scale or (SNR_SCALE[size] if etas else None)
    lacking = ", ".join(flag_name(name) for name, value in values.items() if value is None)
    if lacking and etas:
        choices = " or ".join(f"{value} ({data})" for data, value in etas.items())
        raise InputError(f"{source}: {lacking} says of which it is, {choices}")
    if lacking:
        text = f"{tokens} tokens of 6 x {keep}, {width} wide, {classes} classes"
        raise InputError(f"{source}: none of DCTdiff's published networks ({text}); {lacking} must say its own")
    return values | {"keep": keep, "size": size}


def make_network(config, seed, init=None, allow_partial=False, write=print):
    """The network of a run: random, the same in every process, or with the weights of `--init`, a run's or published.
    A U-ViT's arguments that no flag has come with them, into config. Raises InputError.
    """
    torch.manual_seed(seed)
    if not init:
        return build_network(config)
    kind = "sit" if config["path"] == "flow" else "dit"  # whose keys are the same
    checkpoint = read_checkpoint(init, published=partial(read_network, kind=kind, source=f"--init {init}"))
    theirs = checkpoint["config"]
    if "network" in theirs and parse_model(config["model"])[0] is UViT:
        config["network"] = theirs["network"]
    network = build_network(config)
    write(initialize(network, checkpoint, init, allow_partial))
    if "side" in theirs and theirs["model"].startswith(kind):
        name = {"dit": "DiT", "sit": "SiT"}[kind]
        write(f"         read as a {name}, as the path is {config['path']}; the keys of DiTs and SiTs are the same")
    names = [name for name in ("space", "path", "predict", "snr_scale", "block", "autoencoder") if name in theirs]
    others = [f"{name} {theirs[name]} there, {config[name]} here" for name in names if theirs[name] != config.get(name)]
    if "eta" in theirs and "eta" in config:  # published files may have none
        naive = [isinstance(eta, list) for eta in (theirs["eta"], config["eta"])]
        if any(naive) and not all(naive):
            others.append("scaling naive on one side alone")
        elif not any(naive) and not math.isclose(theirs["eta"], config["eta"], rel_tol=0.01):
            others.append(f"eta {theirs['eta']:.1f} there, {config['eta']:.1f} here, of this data")
    if theirs.get("space") == config["space"] == "latent":
        scales = [torch.tensor(norm.get("scale", SD_SCALE)) for norm in (theirs, config)]
        if not torch.allclose(*torch.broadcast_tensors(*scales), rtol=0.1):
            others.append(f"latents of {norm_text({'scale': SD_SCALE} | theirs)} there, {norm_text(config)} here")
    if others:
        write(f"warning: --init {init} was trained otherwise: {'; '.join(others)}")
    return network


# ---- training ---------------------------------------------------------------------------------------------


def meta_network(config):
    """A network without weights, to look at. Raises InputError where its parts do not fit together."""
    with torch.device("meta"):
        return build_network(unmeasured(config))


def unmeasured(config):
    """A config of which nothing has been measured, with numbers in those places."""
    return config | {"eta": 1.0} | ({"keep": 1} if config["keep"] == "auto" else {})


def to_x0(diffusion, x, moments, noise):
    """What a step learns from: images (n, 3, S, S) in [-1, 1], or the moments (n, 2C, h, w) of their latents; noise
    samples the latents' posteriors -> x0 (n, *shape)
    """
    return diffusion.encode(x, noise) if moments is None else diffusion.from_moments(moments, noise)


def draw_step(seed, step, batch, share, sampling, mean_std, diffusion):
    """What else is random in a step, of the images at `share` of the global batch, from (seed, step) and their place:
    t (n,), noise (n, *shape), label drop (n,) bool, and the noise of the latents' posteriors, None in other spaces.
    """
    device, g = diffusion.device, generator(seed, step, TIMES, device=diffusion.device)
    t = draw_times(batch, sampling, mean_std, diffusion.path, g)[share]
    drop = (torch.rand(batch, generator=g, device=device) < diffusion.config["label_dropout"])[share]
    eps = image_noise(seed, step, NOISE, share, diffusion.shape, device)
    return t, eps, drop, image_noise(seed, step, POSTERIOR, share, diffusion.shape, device) if diffusion.vae else None


def open_images(args, run, latents, live):
    """-> (the images of --data or None, what the data is). They are needed where there are no latents, where --data
    names others than those of the latents, and where an encoder runs beside them. Raises InputError.
    """
    needed = latents is None or live or args.data != latents.header["data"]
    try:
        images = run.open_images(args.data, args.size, few=args.benchmark and latents is None) if needed else None
    except InputError as error:
        if latents is None:
            raise
        advice = "--data says where they are now, or --cache-targets FOLDER keeps what the encoder makes of them"
        raise InputError(f"{error}. {latents.flag} was made of its images: {advice}") from error
    identity = images.identity() if images else latents.header["images"]
    if latents:
        latents.check_images(identity, args.size)
    run.check_data(identity, f"--data {args.data}")
    return images, identity


def open_data(args, run, latents, config, processes):
    """What a run learns from -> Pixels or None, the complete config but for what is measured, Targets or None, and the
    features of --keep auto on process 0, or None.
    """
    measuring = args.features and processes.main and not run.checkpoint
    features = Features(args.features, args.features_weights, args.size, processes.device) if measuring else None
    aligning, folder = bool(args.repa) and run.step < (args.repa_stop or math.inf), args.cache_targets
    records = Records(folder, "tokens", "--cache-targets") if folder and Records.is_complete(folder) else None
    images, identity = open_images(args, run, latents, live=aligning and not records)
    if args.classes and not identity["classes"]:
        raise InputError(f"--classes: {args.data} has none; sort its images into a folder a class, or leave it out")
    names = ("space", "size", "model", "path", "snr_scale", "predict", "label_dropout", "block", "keep")
    config |= {name: getattr(args, name) for name in names}
    config["classes"] = None if args.classes is False else identity["classes"]
    num_tokens, pixels, targets = meta_network(config).num_tokens, None, None  # raises before any work
    if aligning:
        targets = Targets(args.encoder, args.size, num_tokens, args.amp, processes, records)
        if records:
            records.check_images(identity, args.size)
        elif folder and not args.benchmark:
            targets.keep(folder, images, args.workers)
    if latents is None or (targets and targets.encoder):
        pixels = Pixels(images, None if latents and args.benchmark else run.cache, processes, args.workers)
        if latents and pixels.records and not np.array_equal(pixels.indices, latents.indices):
            changed = f"other images can be read now than when {latents.flag} was made of it"
            raise InputError(f"--data {args.data}: {changed}")
    return pixels, config, targets, features


def open_validation(spec, size, classes, label_dropout, processes):
    """The images of --val. Raises InputError where their classes are others."""
    validation = processes.local_first(lambda: Images(spec, size, "--val"))
    if classes and validation.classes is None:
        if not label_dropout:
            raise InputError(f"--val {spec}: has no classes, and with --label-dropout 0 the model has no null class")
        processes.print(f"val      {spec} has no classes: val_loss is that of the null class, unconditional")
    elif classes and validation.classes != classes:
        raise InputError(f"--val {spec}: its classes are {validation.classes}, those of the data {classes}")
    return validation


def train(args):
    # ---- set-up
    processes = Processes(args.device)
    run, device, vae, config = Run(args, "diffusion", processes), processes.device, None, {}
    latents = Records(args.latents, "moments") if args.latents else None
    if args.space == "latent":
        vae, config, origin = open_vae(args.vae, run, latents, args.size, device, args.latent_norm)
    if run.finished:
        return processes.print(what_next(args.out, run.step, args.data, again=True))

    # ---- data
    pixels, config, targets, features = open_data(args, run, latents, config, processes)
    data, classes = latents or pixels, config["classes"]
    validation = args.val and open_validation(args.val, args.size, classes, args.label_dropout, processes)

    # ---- model
    if run.checkpoint:
        config = run.checkpoint["config"]
    elif args.space == "dct":
        codec = args.size, args.block, args.keep, args.scaling
        measured = measure_codec(pixels, *codec, features, args.keep_threshold, processes)
        config, features = config | measured, None
    elif vae and not config["scale"]:
        config |= latent_norm(latent_statistics(vae, pixels, device), args.latent_norm or "one")
    amp, dtype = autocast(args.amp, device)
    network = make_network(config, args.seed, not run.step and args.init, args.init_partial, processes.print)
    network.to(device).train()
    diffusion, dim = Diffusion(config, network, vae, amp), targets.dim if targets else run.checkpoint.get("target_dim")
    projector = args.repa and make_projector(args.repa, network.width, dim, args.repa_width).to(device)
    aligned, ema = Aligned(network, projector, args.repa_depth), copy.deepcopy(network).eval().requires_grad_(False)
    weights = ebfr_weights(torch.tensor(config["entropies"]), config["keep"]).to(device) if args.ebfr else None
    optimizer, sampling, look = run.optimizer(aligned), (args.t_sampling, args.t_logit_normal), None
    if processes.main and not args.benchmark:
        batch = 4 * run.micro  # no gradients are kept
        averaged, examples = Diffusion(config, ema, vae, amp), make_examples(diffusion, validation, data, batch)
        loss = partial(held_out_loss, sampling=args.t_sampling, mean_std=args.t_logit_normal, weights=weights)
        look = partial(evaluate, averaged, examples, args.seed, batch, run.folder, loss if validation else None)

    # ---- resume
    parts = {"model": network, "ema": ema, "optimizer": optimizer, "projector": projector}
    processes.print(describe(data, diffusion))
    if projector:
        tap = f"block {args.repa_depth} to {args.repa} of {args.encoder}, weight {args.repa_weight:g}"
        processes.print(f"aligned  {tap}" + (f" until step {args.repa_stop}" if args.repa_stop else ""))
    flops = diffusion_flops(diffusion) if run.counts_flops else 0
    log = run.start(parts, lambda: {"config": config, "target_dim": dim}, look, data.indices, flops, dtype)
    if vae and processes.main and not run.checkpoint and not args.benchmark:
        copy_autoencoder(origin, run.folder)
    wrapped = processes.wrap(aligned, args.compile)

    # ---- loop: batches until --repa-stop, which feed the encoder as well, and the rest
    batches = run.batches(pixels, latents, targets and targets.records, stop=args.repa_stop if targets else None)
    rest = run.batches(None if latents else pixels, latents)
    for step, where, flip, images, moments, cached in itertools.chain(batches, rest):
        if targets and step == args.repa_stop:
            wrapped, targets = processes.wrap(Aligned(network), args.compile), None
        t, eps, drop, noise = draw_step(args.seed, step, args.batch, run.share, *sampling, diffusion)
        y = torch.from_numpy(data.labels[where.numpy()]).to(device) if classes else None
        for part, last in run.parts_of(len(t)):
            with log.timer("encode"):
                x = None if images is None else mirrored(images[part], flip[part])
                x0 = to_x0(diffusion, x, *(None if v is None else v[part] for v in (moments, noise)))
            with log.timer("targets"):
                tokens = targets and (targets.tokens(x) if cached is None else cached[part])
                tokens = targets and make_target(tokens, args.repa, sigmas=args.repa_sigmas)
            with processes.no_sync(wrapped, last):
                with log.timer("forward"):
                    given = (x0, eps[part], t[part], None if y is None else y[part], drop[part], weights, tokens)
                    loss, alignment = diffusion_loss(diffusion, wrapped, *given)
                with log.timer("backward"):
                    run.backward(loss.mean() + (args.repa_weight * alignment.mean() if targets else 0))
            log.add("loss", loss)
            log.add("loss_by_quarter_of_t", loss, (t[part] * 4).long().clamp_max(3), bins=4)
            if targets:
                log.add("alignment", alignment)
        with log.timer("optimizer"):
            rate = run.take_step(optimizer, step)
            update_ema(ema, network, step, args.ema)
        run.end_step(step + 1, rate)
    if not args.benchmark:
        processes.print(what_next(args.out, run.steps, args.data))


def describe(data, diffusion):
    """What is trained on what, in lines."""
    classes, config = diffusion.classes, diffusion.config
    names = f"{len(classes)} classes: {', '.join(classes[:8])}" if classes else "no classes"
    millions = sum(p.numel() for p in diffusion.network.parameters() if p.requires_grad) / 1e6
    shape = " x ".join(map(str, diffusion.shape))
    lines = [f"data     {data}, {names}" + ", ..." * (len(classes or ()) > 8)]
    if diffusion.vae:
        lines.append(f"latents  {norm_text(config)}, autoencoder {config['autoencoder']}")
    lines.append(f"model    {config['model']}, {millions:.2f}M parameters, input {shape}")
    lines.append(f"         {config['path']} path, c = {config['snr_scale']:g}, predicts {config['predict']}")
    return "\n".join(lines)


def what_next(out, step, data, again=False):
    """Commands to type after a run, in lines."""
    lines = [f"{out}: {'this run is finished' if again else 'done'} at step {step}."]
    lines += [f"  look     {out}/samples/", f"  sample   python sample.py {quoted(out)} --n 64"]
    if again:
        lines.append(f"  go on    the same command with --steps {2 * step}")
    if data.startswith("dead-leaves"):
        lines.append("  your own python train_diffusion.py --data FOLDER_OR_ZIP --size 64")
    return "\n".join(lines)


# ---- command line -----------------------------------------------------------------------------------------

# What a flag is when it is not given. The tiny networks take a recipe that learns in minutes on a CPU (x0 prediction on
# the flow path); all others take DCTdiff's published settings, which clip nothing, in latent space SiT's (arXiv
# 2401.08740) with REPA's clipping.
TINY = dict(path="flow", predict="x0", t_sampling="logit-normal", ebfr=False, lr=2e-3, betas=[0.9, 0.99])
TINY |= dict(weight_decay=0.03, warmup=100, lr_decay="linear", clip=1.0, ema=0.999, batch=64, steps=1800)
PUBLISHED = dict(path="vp", predict="eps", t_sampling="uniform", ebfr=True, lr=2e-4, betas=[0.99, 0.99])
PUBLISHED |= dict(weight_decay=0.03, warmup=5000, lr_decay="none", clip=0.0, ema=0.9999, batch=256, steps=500_000)
LATENT = PUBLISHED | dict(path="flow", predict="v", ebfr=False, lr=1e-4, betas=[0.9, 0.999], weight_decay=0.0)
LATENT |= dict(warmup=0, clip=1.0, steps=400_000)
KEEP = {2: 4, 4: 9, 8: 18}  # coefficients kept per block [code]
SNR_SCALE = {32: 2.0, 64: 4.0, 128: 4.0, 256: 4.0, 512: 12.0}  # c of the vp paths by resolution, in DCT space [code]
# On the flow path c is B^2 [ours]: dividing by eta, about 128 B, makes the noise of a token B times that of a pixel.
ALIGNMENT_DEPTH = 8  # at most, of the tap: of REPA's SiT-L and XL; 4 of 12 blocks in its SiT-B
ALIGNMENT_WEIGHT = {"repa": 0.5, "irepa": 1.0, "dog": 1.0}  # [code]; dog's, which builds on iREPA's recipe, is [ours]
ALIGNMENT_WIDTH = {True: 512, False: 2048}  # of repa's projector: nano and tiny models [ours], others [code]
DINO = "facebookresearch/dinov2:dinov2_vitb14"


def is_tiny(model):
    return model.lower().partition("/")[0].endswith(("nano", "tiny"))


def depth_of(model):
    network, sizes, _ = parse_model(model)
    with torch.device("meta"):
        return network(**sizes).depth


def default_keep(block, size):
    """Coefficients kept per block: as published, elsewhere their share at blocks of 8."""
    return 8 if block == 4 and size >= 256 else KEEP.get(block, max(1, block**2 * 9 // 32))


def recipe(first):
    """Defaults that follow from the flags that were given: model, space, size, method of alignment."""
    tiny, values = is_tiny(first.model), {"data": "dead-leaves", "size": 32}
    space = first.space or ("latent" if first.latents or first.vae else "dct")
    if first.latents:
        header = Records(first.latents, "moments").header
        values = {"data": header["data"], "size": header["size"]}
    elif first.vae:
        copied = Path(first.out or "") / "autoencoder.pt"  # of a run that goes on, where --vae is no longer there
        path = copied if first.out and copied.exists() and not Path(first.vae).exists() else first.vae
        checkpoint = read_checkpoint(path, "autoencoder")
        values["size"] = checkpoint["config"].get("size") or 256
        values["data"] = (checkpoint.get("args") or {}).get("data") or values["data"]
    values |= {"space": space} | (TINY if tiny else LATENT if space == "latent" else PUBLISHED)
    size, path = first.size or values["size"], first.path or values["path"]
    if space == "dct":
        block = first.block or (8 if size >= 512 else 4 if size >= 128 or tiny else 2)  # tiny networks want few tokens
        nearest = min(SNR_SCALE, key=lambda at: abs(at - size))
        scale = float(block**2) if path == "flow" else SNR_SCALE[nearest]
        if first.features in (None, "inception"):
            values["keep_threshold"] = 0.5
        values |= {"block": block, "keep": default_keep(block, size), "scaling": "entropy", "snr_scale": scale}
    else:
        values |= {"ebfr": None, "snr_scale": 1.0}
    name = f"{short_name(first.latents or first.data or values['data'])}-{size}-{space}"
    values["out"] = f"runs/{name}-{first.model.lower().replace('/', '-')}" + (f"-{first.repa}" if first.repa else "")
    return values | alignment_defaults(first)


def alignment_defaults(args):
    """Defaults of the flags of --repa and --rmsc that mean something."""
    values = {"encoder": DINO} if args.repa or args.rmsc else {}
    if args.repa and args.cache_targets and Records.is_complete(args.cache_targets):
        values["encoder"] = Records(args.cache_targets, "tokens", "--cache-targets").header["encoder"]
    if args.repa:
        values |= {"repa_depth": max(1, min(ALIGNMENT_DEPTH, depth_of(args.model) // 3))}
        values |= {"repa_weight": ALIGNMENT_WEIGHT[args.repa], "repa_stop": None, "cache_targets": None}
    if args.repa == "repa":
        values["repa_width"] = ALIGNMENT_WIDTH[is_tiny(args.model)]
    if args.repa == "dog" or args.rmsc:
        values["repa_sigmas"] = list(DOG_SIGMAS)
    return values


def number_or_auto(text):
    """An argparse type: of --keep."""
    return text if text == "auto" else at_least(1)(text)


def parse(argv=None):
    parser = Parser(__doc__)
    switch, count, finite = argparse.BooleanOptionalAction, at_least(1), at_least(-100, float, 100)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="SPEC", help="folder, .zip, cifar10, dead-leaves or dead-leaves:full")
    add("--val", metavar="SPEC", help="images held out: evaluations, val_loss and best.pt are of them (default: none)")
    add("--size", type=at_least(1, most=SIDE), metavar="PIXELS", help="images are cropped and resized to this")
    add("--out", metavar="RUN", help="run folder")
    add("--space", choices=("dct", "pixel", "latent"), help="what is diffused")
    add("--latents", metavar="FOLDER", help="of train_vae.py --encode, whose header says what else is needed")
    use = "autoencoder that encodes at every step, or where that of --latents is now"
    add("--vae", metavar="CKPT", help=f"{use}: run of train_vae.py, SD-VAE weights")
    norm = "without --latents: latents to unit std as one, or each channel to mean 0 and std 1 (default: what the"
    add("--latent-norm", choices=("one", "channel"), help=f"{norm} config.json of --vae says, else one)")
    add = parser.add_argument_group("model and loss").add_argument
    sizes = "uvit-nano|tiny|s|m|l|h or dit-nano|tiny|s|b|l|xl, on pixels and latents /PATCH may follow"
    add("--model", default="dit-nano", metavar="NAME", help=sizes)
    add("--path", choices=tuple(PATHS), help="noise path; vp-sd is vp with Stable Diffusion's schedule")
    add("--predict", choices=PREDICTIONS, help="what the network predicts")
    add("--t-sampling", choices=("uniform", "logit-normal"), help="distribution of t")
    add("--t-logit-normal", type=finite, nargs=2, default=[0.5, 1.0], metavar=("MEAN", "STD"), help="of logit t")
    text = "SNR scaling: in DCT space B^2 on flow and by size on vp, elsewhere 1"
    add("--snr-scale", type=at_least(1e-9, float), metavar="C", help=text)
    add("--block", type=at_least(1, most=256), metavar="B", help="DCT block size")
    fewest = "coefficients kept per block; auto: the fewest whose truncation costs less than --keep-threshold"
    add("--keep", type=number_or_auto, metavar="K", help=fewest)
    distance = "Frechet distance in --features (default: inception's 0.5, as in the paper; others have other scales)"
    add("--keep-threshold", type=at_least(0, float), metavar="X", help=distance)
    spec = "of --keep auto: inception, hog or REPO:ENTRY (default: none, the number that is the default of --keep)"
    add("--features", metavar="SPEC", help=spec)
    add("--features-weights", metavar="FILE", help="local Inception weights (default: torch-fidelity downloads them)")
    add("--scaling", choices=("entropy", "naive"), help="coefficients over one eta, or each over its own (ablation)")
    add("--ebfr", action=switch, help="entropy-based frequency reweighting")
    add("--classes", action=switch, help="train with classes (default: where the data has them)")
    add("--label-dropout", type=fraction, default=0.1, metavar="P", help="share of labels made the null class")
    add = parser.add_argument_group("alignment").add_argument
    methods = "align hidden tokens to an encoder's: raw, spatially normalised, or without their low spatial frequencies"
    add("--repa", choices=("repa", "irepa", "dog"), help=f"{methods} (default: off)")
    add("--encoder", metavar="SPEC", help="hog, or a torch.hub entry REPO:ENTRY, REPO a local folder or on GitHub")
    add("--repa-depth", type=count, metavar="K", help="the block after which tokens are aligned")
    add("--repa-weight", type=at_least(0, float), metavar="W", help="of the alignment loss")
    add("--repa-stop", type=count, metavar="STEP", help="align no longer from this step on (default: never)")
    sigmas = "of dog, in tokens: a band-pass, a high-pass where S1 is 0; S2 may be inf"
    add("--repa-sigmas", type=float, nargs=2, metavar=("S1", "S2"), help=sigmas)
    add("--repa-width", type=at_least(1, most=2**16), metavar="N", help="width of repa's projector")
    text = "keep the encoder's tokens of all images and mirror images, made at the first use (default: off)"
    add("--cache-targets", metavar="FOLDER", help=text)
    add("--rmsc", action="store_true", help="only measure the targets of --encoder on the data, train nothing")
    add_training_flags(parser)
    args = parser.complete(argv, recipe)
    if args.t_logit_normal[1] <= 0:
        raise InputError("--t-logit-normal {:g} {:g}: the second, a std, must be positive".format(*args.t_logit_normal))
    if args.space == "latent" and not (args.latents or args.vae):
        raise InputError("--space latent: needs --latents FOLDER (of train_vae.py --encode) or --vae CKPT")
    if args.space != "latent" and (args.latents or args.vae):
        raise InputError(f"--space {args.space}: --latents and --vae are for --space latent")
    if args.latent_norm and (args.latents or not args.vae):
        raise InputError(f"--latent-norm {args.latent_norm}: is for --vae without --latents, whose header has its own")
    if args.latents and args.size != args.defaults["size"]:
        raise InputError(f"--size {args.size}: {args.latents} is of {args.defaults['size']} pixels; leave it out")
    if args.space == "dct":
        make_codec(unmeasured(vars(args)))  # raises where size, block and keep do not fit together
    elif args.block or args.keep or args.scaling or args.ebfr:
        raise InputError("--block, --keep, --scaling, --ebfr: only for --space dct")
    chosen = args.features or args.features_weights or args.keep_threshold != args.defaults["keep_threshold"]
    if args.keep != "auto" and chosen:
        raise InputError("--features, --keep-threshold: are for --keep auto; leave them out")
    if args.keep == "auto" and args.keep_threshold is None:
        raise InputError(f"--features {args.features}: needs --keep-threshold X, its distances being on another scale")
    useful = alignment_defaults(args)
    for name in ("encoder", "repa_depth", "repa_weight", "repa_stop", "repa_sigmas", "repa_width", "cache_targets"):
        if getattr(args, name) is not None and name not in useful:
            chosen = f"--repa {args.repa}" if args.repa else "--rmsc alone" if args.rmsc else "no --repa"
            raise InputError(f"{flag_name(name)}: means nothing with {chosen}; leave it out")
    low, high = args.repa_sigmas or DOG_SIGMAS
    if not 0 <= low < high or 1e6 < high < math.inf:
        raise InputError(f"--repa-sigmas {low:g} {high:g}: the first must be the smaller, from 0 on, S2 to 1e6 or inf")
    if args.repa and not 1 <= args.repa_depth <= depth_of(args.model):
        raise InputError(f"--repa-depth {args.repa_depth}: {args.model} has blocks 1 to {depth_of(args.model)}")
    return args


def main(args):
    with HELD:
        compare_targets(args) if args.rmsc else train(args)


if __name__ == "__main__":
    run_program(main, parse)
