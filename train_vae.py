"""Train an autoencoder whose latents are easy to diffuse (Spectrum Matching, arXiv 2603.14645), and look at its spectrum.

    python train_vae.py                                                      # built-in images, minutes on a laptop
    python train_vae.py --data photos/ --size 64 --regularizer esm           # kl, esm, dsm, eq, se, vf, none, esm+dsm
    torchrun --nproc_per_node=8 train_vae.py --data photos.zip --preset f8d4 --regularizer dsm
    python train_vae.py --eval-only --ckpt runs/mine --data more/            # PSNR, SSIM, rFID, LPIPS, spectrum
    python train_vae.py --spectrum runs/kl runs/esm runs/dsm --data photos/  # side by side, a table and a figure
    python train_vae.py --encode photos/ --ckpt runs/mine --out photos.latents

The same command again resumes. The method is in `draw_views` (what the decoder is shown), `regularizers` and
spectral_losses.py; the network in vae.py; data, resume, logging and torchrun set-up are train_diffusion.py's.
"""

import argparse
import copy
import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset

from repa import as_map
from sample import (Images, InputError, autocast, crop_text, fingerprint, frechet_distance, generator, load_autoencoder,
                    load_features, load_weights, progress, record_score, run_folder, run_program, save_grid, short_name,
                    to_uint8, write_atomically)  # fmt: skip
from spectral_losses import (BINS, DSM_KEEP_ALL, DSM_LEVELS, bands_in_use, block_that_fits, blurs, downscale, esm_loss,
                             kl_loss, log_shares, low_pass, power_law_exponent, psd, resize_to_latent, scale_and_rotate,
                             spectral_kl, target_power, variance_of, vf_loss)  # fmt: skip
from train_diffusion import (SCALE_IMAGES, Cache, DataOrder, LatentStatistics, Log, Processes, add_training_flags,
                             benchmark, check_ranges, count_flops, fill_cache, image_header, image_noise, learning_rate,
                             load, make_optimizer, make_scaler, matmul_rate, mirrored, open_encoder, open_images,
                             open_store, plain_arguments, prefetch, recipe_defaults, set_up, take_step, update_ema,
                             workers)  # fmt: skip
from vae import PRESETS, VAE, PatchGAN, adaptive_weight, hinge_loss, load_lpips, sample_posterior

# ---- method -----------------------------------------------------------------------------------------------

REGULARIZERS = ("kl", "esm", "dsm", "eq", "se", "vf", "none")
EQ_TRANSFORMED, EQ_SMALL = 0.5, 0.125  # shares of EQ-VAE's steps; the rest are plain [code]
LEAST_SIDE = 16  # pixels, of what eq and se show the losses: LPIPS halves an image four times


def parse_regularizer(text):
    """'esm+dsm' -> {"esm", "dsm"}. Raises InputError."""
    names = text.split("+")
    unknown = [name for name in names if name not in REGULARIZERS]
    if unknown or len(set(names)) < len(names) or ("none" in names and len(names) > 1):
        raise InputError(f"--regularizer {text}: takes {', '.join(REGULARIZERS)}, or a sum of them such as esm+dsm")
    if "eq" in names and {"dsm", "se"} & set(names):
        raise InputError(f"--regularizer {text}: eq changes what the decoder sees, as dsm and se do; choose one")
    return set(names) - {"none"}


def least_latent(latent, factor):
    """The smallest side EQ-VAE scales a latent to: a quarter, unless the losses cannot see so small an image."""
    return max(latent // 4, math.ceil(LEAST_SIDE / factor))


def draw_views(names, weight_se, seed, step, latent, factor):
    """What the decoder is shown in a step, and what it has to make of it, the same in all processes.

    -> (side of the input in pixels, [(change of latents, change of images, weight), ...]); latent: its side.
    """

    def draw(n):  # 0..n-1
        return int(torch.randint(n, (), generator=g))

    g = generator(seed, step, 3)
    same, side = (lambda x: x), latent * factor
    views = [(same, same, 1.0)]
    if "dsm" in names:  # section 3.3: the low-passed latent decodes to the low-passed image
        k = (DSM_KEEP_ALL, *DSM_LEVELS)[draw(1 + len(DSM_LEVELS))]
        mask = partial(low_pass, k=k, block=block_that_fits(latent, latent))
        views = [(mask, mask, 1.0)] if k else views
    if "eq" in names:  # the scaled and turned latent decodes to the image scaled and turned alike
        which, least = torch.rand((), generator=g).item(), least_latent(latent, factor)
        small, turn = least + draw(latent - least), partial(scale_and_rotate, quarter_turns=1 + draw(3))
        if which < EQ_TRANSFORMED:
            to_latent, to_image = (partial(turn, size=(n, n)) for n in (small, small * factor))
            views = [(to_latent, to_image, 1.0)]
        elif which < EQ_TRANSFORMED + EQ_SMALL:
            side = small * factor
    if "se" in names:  # the halved or quartered latent decodes to the image halved or quartered
        scales = [s for s in (2, 4) if latent % s == 0 and side // s >= LEAST_SIDE]
        change = partial(downscale, factor=scales[draw(len(scales))])
        views.append((change, change, weight_se))
    return side, views


def regularizers(args, terms, images, mean, logvar, latents):
    """The terms of the loss on latents themselves -> {name: (weight, value)}; vf, of adaptive weight, is apart."""
    values = {}
    if "kl" in terms:
        values["kl"] = args.kl_weight, kl_loss(mean, logvar)
    if "esm" in terms:
        values["esm"] = args.esm_weight, esm_loss(images, latents, args.esm_delta, blur=args.esm_blur)
    return values


class OnePass(nn.Module):
    """Encode, sample, decode every view: one forward call, as DistributedDataParallel wants it."""

    def __init__(self, vae, feature_width=None):
        super().__init__()
        self.vae, self.encode, self.decode = vae, vae.encode, vae.decode
        if feature_width:  # onto the features of vf's encoder
            self.project = nn.Conv2d(vae.latent_channels, feature_width, 1, bias=False)

    def forward(self, x, noise, changes):
        """x (N, 3, H, W), noise (N, C, h, w) -> mean, logvar, latents (N, C, h, w), [images], projected latents."""
        mean, logvar = self.encode(x)
        latents = sample_posterior(mean.float(), logvar.float(), noise)
        made = [self.decode(change(latents)).float() for change in changes]
        return mean, logvar, latents, made, self.project(latents) if hasattr(self, "project") else None


def resized(images, side):
    return F.interpolate(images, (side, side), mode="bilinear", antialias=True) if images.shape[-1] != side else images


def autoencoder_loss(args, parts, images, noise, views, log, gan=False):
    """All terms of one part of a batch -> scalar. `parts`: the networks, see `make_parts`. With `gan` the discriminator's."""
    mean, logvar, latents, made, projected = parts.wrapped(images, noise, [change for change, _, _ in views])
    wanted = [change(images) for _, change, _ in views]
    reconstruction = 0
    for name, output, image, (_, _, weight) in zip(("reconstruction", "se"), made, wanted, views):
        error = F.mse_loss(output, image) if args.reconstruction == "l2" else F.l1_loss(output, image)
        log.add(name, error)
        if parts.lpips:
            perceptual = parts.lpips(image, output).mean()
            log.add("lpips" if name == "reconstruction" else "se_lpips", perceptual)
            error = error + args.lpips_weight * perceptual
        reconstruction = reconstruction + weight * error
    total = reconstruction
    for name, (weight, value) in regularizers(args, parts.terms, images, mean, logvar, latents).items():
        log.add(name, value)
        total = total + weight * value
    if "vf" in parts.terms:
        with torch.no_grad():
            tokens = parts.encoder(images)[0].float()  # (N, T, D)
        vf = vf_loss(projected, as_map(tokens))
        balance = adaptive_weight(reconstruction, vf, parts.vae.encoder.conv_out.weight, parts.average)
        log.add("vf", vf)
        log.add("vf_balance", balance)
        total = total + args.vf_weight * balance * vf
    if gan:
        fooled = -parts.discriminator(made[0]).mean()
        balance = adaptive_weight(reconstruction, fooled, parts.vae.decoder.conv_out.weight, parts.average)
        log.add("gan", fooled)
        log.add("gan_balance", balance)
        total = total + args.gan_weight * balance * fooled
    log.add("loss", total)
    return total


def discriminator_loss(parts, images, noise, views, log):
    """Hinge loss of real against reconstructed images, both as the first view shows them -> scalar."""
    with torch.no_grad():
        _, _, _, made, _ = parts.one_pass(images, noise, [views[0][0]])
    logits = parts.wrapped_discriminator(torch.cat((views[0][1](images), made[0])))
    real, fake = logits.chunk(2)
    log.add("logits_real", real.mean())
    log.add("logits_fake", fake.mean())
    loss = hinge_loss(real, fake)
    log.add("discriminator", loss)
    return loss


# ---- measuring --------------------------------------------------------------------------------------------

EVAL_IMAGES = 1000  # looked at by an evaluation during training
SCALE_LIMIT = 50_000  # images whose latents give the scale of a latent cache
MATCHED = 0.05  # difference from the target in the upper half of the bands, at unit std, up to which a latent is matched
SSIM_WINDOW, SHOWN = 11, 8  # pixels; pictures in a row


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


def some_images(images, count, batch, workers, bar="evaluate"):
    """Batches of `count` images spread over a data set, (n, 3, S, S) uint8; unreadable ones are left out. Raises
    InputError where they are more than 1%.
    """
    chosen, bad = np.unique(np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)).tolist(), 0
    apart = max(1, len(chosen) // SHOWN)
    chosen = [i for start in range(apart) for i in chosen[start::apart]]  # those shown, the first, from all over the set
    with progress(total=len(chosen), unit="img", desc=bar, leave=False) as shown:
        for _, pixels, good in DataLoader(Subset(images, chosen), batch, num_workers=workers if count > 512 else 0):
            bad += int((~good).sum())
            images.check_unreadable(bad)
            if good.any():
                yield pixels[good]
            shown.update(len(good))


def target_delta(flags):
    """The delta of the target that a run of these flags is judged against (None: published weights): its own where ESM
    trained it, else the paper's 1.
    """
    return flags["esm_delta"] if flags and "esm" in parse_regularizer(flags["regularizer"]) else 1.0


def compare_with_target(image, latent, height, width, delta=1.0):
    """Spectra of latents beside the target's, image x f^delta. image, latent (N, BINS): `psd` of every image, resized to
    the latent of height x width, and of every latent -> dict of plain values.

    "raw" is as ESM sees them; at "unit_std" latents, target and image are brought to std 1 over the data set (about each
    field's mean) before the logarithm, which is not free of scale. Each holds mean shares of log power of the `bands`
    that have coefficients; the KL of those mean spectra, which is what the paper publishes, and the larger mean of the
    images' own KLs, which is what ESM lowers; and by how much the latents' share in the upper half exceeds the target's.
    """
    spectra = {"image": image, "target": target_power(image, delta), "latent": latent}
    variances = {name: variance_of(power, height, width).mean() for name, power in spectra.items()}
    used = bands_in_use(height, width)
    result = {"delta": delta, "bands": [band + 1 for band in used],
              "spatial_std": {name: variance.sqrt().item() for name, variance in variances.items()}}  # fmt: skip
    for scale in ("unit_std", "raw"):
        divisors = variances if scale == "unit_std" else dict.fromkeys(spectra, torch.ones(()))
        shares = {n: log_shares(power / divisors[n].clamp_min(1e-12))[:, used] for n, power in spectra.items()}
        means = {name: share.mean(0) for name, share in shares.items()}
        upper = torch.tensor(used) >= BINS // 2
        result[scale] = {f"{name}_shares": mean.tolist() for name, mean in means.items()} | {
            "kl_of_mean_spectra": spectral_kl(means["target"][None], means["latent"][None]).item(),
            "mean_of_kls_per_image": spectral_kl(shares["target"], shares["latent"]).mean().item(),
            "upper_share": (means["latent"] - means["target"])[upper].sum().item(),
        }
    return result


@torch.no_grad()
def measure(vae, batches, device, seed=0, lpips=None, features=None, shown=SHOWN, delta=1.0):
    """Everything that is reported of an autoencoder -> (dict of plain values, rows of pictures).

    Reconstructions are of the posterior's mean, spectra of its samples (as the losses see them), judged against the
    image's times f^delta.
    """
    values, noise, latents, rows = {}, generator(seed, 4), LatentStatistics(), []
    spectra = {"image": [], "latent": []}
    kept = {"original": [], "reconstruction": []}

    def add(name, value):  # (n, ...)
        values.setdefault(name, []).append(value.double().cpu())

    for pixels in batches:
        pixels = pixels.to(device)
        x = pixels / 127.5 - 1
        mean, logvar = vae.encode(x)
        latents.add(mean, logvar)
        made = vae.decode(mean).clamp(-1, 1)
        add("psnr", psnr(pixels, to_uint8(made)))
        add("ssim", ssim(pixels, to_uint8(made)))
        if lpips:
            add("lpips", lpips(x, made))
        if features:
            kept["original"].append(features(pixels).float().cpu())
            kept["reconstruction"].append(features(to_uint8(made)).float().cpu())
        z = sample_posterior(mean, logvar, torch.randn(mean.shape, generator=noise).to(device))
        small = resize_to_latent(x, z.shape[-2:])
        for name, field in (("image", small), ("latent", z)):
            spectra[name].append(psd(field).double().cpu())
            add(f"{name}_alpha", power_law_exponent(field).expand(len(x)))
        add("target_alpha", power_law_exponent(small, delta=delta).expand(len(x)))
        pictures = [x[:shown], made[:shown]]
        block = block_that_fits(*z.shape[-2:])
        for k in DSM_LEVELS if block else ():
            wanted, got = low_pass(x, k, block).clamp(-1, 1), vae.decode(low_pass(mean, k, block)).clamp(-1, 1)
            add(f"lowpass_psnr_{k}", psnr(to_uint8(wanted), to_uint8(got)))
            pictures += [wanted[:shown], got[:shown]]
        if not rows:
            rows = [picture.cpu() for picture in pictures]
    result = {name: torch.cat(value).mean(0).tolist() for name, value in values.items()}
    result |= compare_with_target(*map(torch.cat, spectra.values()), *z.shape[-2:], delta)
    if features:
        result["rfid"] = frechet_distance(*(torch.cat(part) for part in kept.values()))
    result |= {f"latent_{key}": value for key, value in latents.result().items()}
    return result | {"images": len(torch.cat(values["psnr"])), "latent_side": z.shape[-1], "size": x.shape[-1]}, rows


def verdict(result):
    gap, raw = (result[scale]["upper_share"] for scale in ("unit_std", "raw"))
    word = "matched" if abs(gap) <= MATCHED else "too noisy" if gap > 0 else "too smooth"
    return (f"{word} at unit std ({gap:+.3f} of log power in the upper half of the bands, against the target; raw "
            f"{raw:+.3f}); alpha {result['latent_alpha']:.2f}, the target's {result['target_alpha']:.2f}")  # fmt: skip


def report(name, result, say):
    """Print a result of `measure`."""
    extra = [f"{title} {result[key]:.4f}" for title, key in (("rFID", "rfid"), ("LPIPS", "lpips")) if key in result]
    say(f"{result['images']} images: " + ", ".join([f"PSNR {result['psnr']:.2f} dB", f"SSIM {result['ssim']:.4f}", *extra]))
    means = " ".join(f"{mean:.3f}" for mean in result["latent_mean"][:8])
    say(f"latents: mean by channel {means}, std {result['latent_std']:.4f}, scale {result['latent_scale']:.4f}")
    spectrum_table({name: result}, say)
    say(f"latents {verdict(result)}")


def save_pictures(rows, stem):
    """STEM.png: originals above reconstructions; STEM-lowpass.png: low-passed images above what the low-passed
    latents decode to, for each k."""
    files = [save_grid(torch.cat(rows[:2]), f"{stem}.png", len(rows[0]))]
    if rows[2:]:
        files.append(save_grid(torch.cat(rows[2:]), f"{stem}-lowpass.png", len(rows[0])))
    return files


def optional(load, flag, what, say):
    """load(), or None, in one line, where weights are missing."""
    try:
        return load()
    except (InputError, ValueError) as error:
        say(f"{what} is off: {' '.join(str(error).split())[:450]}; {flag} turns it on")


def open_measures(args, processes):
    """-> (lpips or None, features or None; features on process 0 alone), called by all processes. Raises InputError for a
    file that was named and is bad; what is merely absent is off, with a line that says so.
    """
    say, named = processes.print, args.lpips_vgg or args.lpips_heads
    lpips = features = None
    flag = "--lpips-weight 0.5, with --lpips-vgg FILE --lpips-heads FILE where nothing can be downloaded,"
    if args.lpips_weight:

        def load():
            return load_lpips(args.lpips_vgg, args.lpips_heads).to(processes.device)

        try:
            lpips = processes.local_first(load if named else partial(optional, load, flag, "LPIPS", say))
        except ValueError as error:
            raise InputError(f"--lpips-vgg, --lpips-heads: {error}") from error
        if processes.sum(torch.tensor(float(lpips is None), device=processes.device)):
            lpips = None  # off in all, where it is in one
    else:
        say(f"LPIPS is off; {flag} turns it on")
    flag = "--features inception --features-weights FILE, or --features REPO:ENTRY,"
    if args.features == "none":
        say(f"rFID is off; {flag} turns it on")
    elif processes.main:
        load = partial(load_features, args, processes.device)
        must = args.features_weights or args.features != "inception"
        features = load() if must else optional(load, flag, "rFID", say)
    return lpips, features


def save_score(folder, result, args, images, info):
    """rFID with its protocol, as sample.py writes its scores."""
    record_score(folder, {"frechet_distance": result["rfid"], "kind": "reconstruction", "features": args.features,
                          "features_weights": args.features_weights, "images": result["images"],
                          "reference": images.spec, "reference_images": result["images"], "format": "uint8",
                          "crop": crop_text(images.size), **info})  # fmt: skip


# ---- settings ---------------------------------------------------------------------------------------------

# What a flag is when it is not given: the CPU preset's recipe [ours], and the published one (arXiv 2603.14645) [code],
# batch and steps being those of CelebA-HQ; ImageNet's are 128 and 600,000, with dsm a million.
TINY = dict(size=64, steps=400, batch=16, lr=1e-3, lr_decay="linear", warmup=50, betas=[0.9, 0.99], weight_decay=0.005,
            clip=1.0, ema=0.0, lpips_weight=0.0, gan_weight=0.0, features="none")  # fmt: skip
PUBLISHED = dict(size=256, steps=500_000, batch=48, lr=5e-5, lr_decay="none", warmup=2000, betas=[0.9, 0.999],
                 weight_decay=0.005, clip=1.0, ema=0.0, lpips_weight=0.5, gan_weight=0.5,
                 features="inception")  # fmt: skip


def fill(args, preset):
    """Flags that were not given take the preset's recipe."""
    for name, value in (TINY if preset == "tiny" else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def complete(args):
    """Fill in what the command left open, from the preset. Raises InputError."""
    args.data = args.data or "dead-leaves"
    if args.ckpt:
        raise InputError(f"--ckpt {args.ckpt}: is for --eval-only and --encode; a run in --out resumes by itself")
    fill(args, args.preset)
    weights = ("kl_weight", "esm_weight", "se_weight", "vf_weight", "lpips_weight", "gan_weight", "gan_start")
    check_ranges(args, **dict.fromkeys(weights, 0))
    terms, factor = parse_regularizer(args.regularizer), 2 ** (len(PRESETS[args.preset]["widths"]) - 1)
    if args.size % factor:
        raise InputError(f"--size {args.size}: --preset {args.preset} takes multiples of {factor}")
    latent = args.size // factor
    if args.esm_blur is None:
        args.esm_blur = blurs(latent)
    if "dsm" in terms and not block_that_fits(latent, latent):
        raise InputError(f"--regularizer {args.regularizer} at --size {args.size}: DSM's blocks of 8, 4 or 2 are at most half "
                         f"as wide as the latent and divide it, which is {latent}x{latent} here; "
                         f"--size {16 * factor} does")  # fmt: skip
    if "eq" in terms and latent <= least_latent(latent, factor):
        raise InputError(f"--regularizer eq at --size {args.size}: nothing smaller to scale to; --size 64 does")
    if "se" in terms and (latent % 2 or args.size < 2 * LEAST_SIDE):
        raise InputError(f"--regularizer se at --size {args.size}: a latent of {latent} cannot be halved; --size 64 does")
    if "vf" in terms and not args.encoder:
        raise InputError("--regularizer vf: needs --encoder REPO:ENTRY, such as facebookresearch/dinov2:dinov2_vitb14")
    if "eq" in terms and args.compile:
        raise InputError("--compile: eq shows the network images of nearly as many sizes as there are steps, each of which "
                         "would be compiled anew; leave --compile out")  # fmt: skip
    smallest = least_latent(latent, factor) * factor if "eq" in terms else args.size
    if args.gan_weight and smallest < PatchGAN().least_size:
        raise InputError(f"--gan-weight {args.gan_weight:g}: the discriminator would see {smallest} pixels and needs "
                         f"{PatchGAN().least_size}; a larger --size, or --gan-weight 0")  # fmt: skip
    if args.out is None:
        args.out = f"runs/{short_name(args.data)}-{args.size}-{args.preset}-{args.regularizer}"


# ---- training ---------------------------------------------------------------------------------------------


def make_parts(args, processes, config):
    """The networks of a run, by name: vae, one_pass, discriminator, encoder (of vf), and what `main` wraps of them."""
    torch.manual_seed(args.seed)  # the same weights in every process
    device, encoder, terms = processes.device, None, parse_regularizer(args.regularizer)
    shape = {name: config[name] for name in ("widths", "latent_channels", "num_res_blocks")}
    vae, width = VAE(**shape).to(device, memory_format=layout(device)), None
    if "vf" in terms:
        encoder, tokens = open_encoder(args, processes)
        width = tokens.shape[2]
    one_pass = OnePass(vae, width).to(device)
    discriminator = PatchGAN().to(device, memory_format=layout(device)) if args.gan_weight else None
    return SimpleNamespace(terms=terms, vae=vae, one_pass=one_pass, discriminator=discriminator, encoder=encoder,
                           average=lambda gradient: processes.sum(gradient) / processes.world)  # fmt: skip


def layout(device):
    """The memory format of convolutions: on a CPU, channels_last took 1.3 times as long."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def wrap(parts, args, processes):
    if args.compile:  # adaptive weights go back through a part of the graph twice
        import torch._functorch.config

        torch._functorch.config.donated_buffer = False
        parts.one_pass.encode = torch.compile(parts.vae.encode, dynamic=False)  # se's views have three sizes
        parts.one_pass.decode = torch.compile(parts.vae.decode, dynamic=False)
    parts.wrapped = processes.wrap(parts.one_pass)
    parts.wrapped_discriminator = processes.wrap(parts.discriminator) if parts.discriminator else None


def turn(args, step):
    """Whose step it is: from the start of the GAN on, autoencoder and discriminator alternate [code] -> (whether the
    discriminator's, how many steps its optimizer has taken before).
    """
    since = step - args.gan_start
    if not args.gan_weight or since < 0:
        return False, step
    return since % 2 == 1, since // 2 + (0 if since % 2 else args.gan_start)


def train_step(args, parts, processes, images, step, share, micro, context, scaler, log):
    """Forward and backward of this process's share of a step. images (n, 3, S, S) in [-1, 1]"""
    latent = args.size // parts.vae.factor
    side, views = draw_views(parts.terms, args.se_weight, args.seed, step, latent, parts.vae.factor)
    gan, (critic, _) = bool(args.gan_weight) and step >= args.gan_start, turn(args, step)
    small = side // parts.vae.factor
    noise = image_noise(args.seed, step, 7, share, (parts.vae.latent_channels, small, small), images.device)
    if parts.discriminator:
        parts.discriminator.requires_grad_(critic)
    for start in range(0, len(images), micro):
        part = slice(start, start + micro)
        x = resized(images[part], side)
        with processes.no_sync(parts.wrapped_discriminator if critic else parts.wrapped, start + micro >= len(images)):
            with context():
                if critic:
                    loss = discriminator_loss(parts, x, noise[part], views, log)
                else:
                    loss = autoencoder_loss(args, parts, x, noise[part], views, log, gan)
            scaler.scale(loss / args.grad_accum).backward()


def benchmark_vae(args, images, parts, processes, amp):
    """`--benchmark N` of this program: the autoencoder's steps; with --gan-start 0 the GAN's part in them is in."""
    device, (context, dtype) = processes.device, amp
    wrap(parts, args, processes)
    n, optimizer = args.batch // processes.world, make_optimizer(parts.one_pass, args)
    scaler, quiet = make_scaler(device, dtype), SimpleNamespace(add=lambda name, value: None)

    def step(i, pixels, mark):
        x = (pixels.to(device) / 127.5 - 1).contiguous(memory_format=layout(device))
        mark("data")
        train_step(args, parts, processes, x, 2 * i, slice(0, n), n // args.grad_accum, context, scaler, quiet)
        mark("forward and backward")
        torch.nn.utils.clip_grad_norm_(parts.one_pass.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")

    names = ("data", "forward and backward", "optimizer")
    benchmark(args, images, processes, lambda x: x, names, step, lambda: vae_flops(parts, args.size, device), dtype)


def vae_flops(parts, size, device):
    """Forward and backward FLOPs of one image through the autoencoder, its losses' networks left out."""
    x, side = torch.zeros(1, 3, size, size, device=device), size // parts.vae.factor
    noise = torch.zeros(1, parts.vae.latent_channels, side, side, device=device)
    flops = count_flops(lambda: parts.one_pass(x, noise, [lambda z: z])[3][0].sum())
    parts.one_pass.zero_grad(set_to_none=True)
    return flops


def main(args):
    check_ranges(args, eval_images=1, size=SSIM_WINDOW)  # what SSIM needs
    if args.spectrum:
        return compare_spectra(args)
    if args.encode:
        return encode_data(args)
    if args.eval_only:
        return evaluate_only(args)

    # ---- set-up
    complete(args)
    processes, checkpoint, share, micro = set_up(args, "autoencoder")
    images = open_images(args, processes)
    device, folder, say = processes.device, Path(args.out), processes.print
    if checkpoint and checkpoint["step"] >= args.steps:
        return finished(args, say, checkpoint["step"], again=True)
    if args.gan_weight and args.gan_start >= args.steps:
        say(f"warning: --gan-start {args.gan_start} is not before the end, --steps {args.steps}: the GAN never acts")
    validation = processes.local_first(lambda: Images(args.val, args.size)) if args.val else images

    # ---- data
    store = open_store(args, images, processes, checkpoint)

    # ---- model
    config = {"preset": args.preset, "size": args.size, "regularizer": args.regularizer, "num_res_blocks": 2}
    config |= PRESETS[args.preset]
    config["widths"] = list(config["widths"])
    parts = make_parts(args, processes, config)
    vae, discriminator = parts.vae, parts.discriminator
    parts.lpips, features = open_measures(args, processes)
    if checkpoint and not checkpoint["lpips"]:
        parts.lpips = None  # a run goes on as it began
    if checkpoint and checkpoint["lpips"] and not parts.lpips:
        raise InputError(f"{folder} was begun with LPIPS; name its weights by --lpips-vgg FILE --lpips-heads FILE")
    amp, dtype = autocast(args.amp, device)
    if args.benchmark:
        return benchmark_vae(args, images, parts, processes, (amp, dtype))
    optimizer, critic_optimizer = make_optimizer(parts.one_pass, args), None
    if discriminator:
        critic_optimizer = make_optimizer(discriminator, args)
    ema = copy.deepcopy(vae).requires_grad_(False) if args.ema else None
    scaler = make_scaler(device, dtype)

    # ---- resume
    step = 0
    if checkpoint:
        load_weights(vae, checkpoint["model"], folder)
        if ema:
            load_weights(ema, checkpoint["ema"], folder)
        if "vf" in parts.terms:
            load_weights(parts.one_pass.project, checkpoint["projector"], folder)
        if discriminator:
            load_weights(discriminator, checkpoint["discriminator"], folder)
            critic_optimizer.load_state_dict(checkpoint["critic_optimizer"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step = checkpoint["step"]
    order = DataOrder(store.count, args.batch, args.seed)
    epochs, millions = args.steps * args.batch / store.count, sum(p.numel() for p in vae.parameters()) / 1e6
    side = args.size // vae.factor
    say(f"data     {store.how}")
    say(f"model    {args.preset}, {millions:.2f}M parameters, latents {vae.latent_channels} x {side} x {side}")
    say(f"losses   {describe(args, parts, side)}")
    say(f"training {args.steps} steps of {args.batch} = {epochs:.1f} epochs, on {processes.world} x {device.type}")
    say(f"         into {folder}" + (f", resumed at step {step}" if checkpoint else ""))

    def save():
        if processes.main:
            count, latent = min(store.count, SCALE_IMAGES), LatentStatistics()
            chosen = torch.linspace(0, store.count - 1, count, dtype=torch.float64).long()
            with torch.no_grad():
                for part in chosen.split(micro):
                    latent.add(*(ema or vae).encode(store[part].to(device) / 127.5 - 1))
            state = {
                "model": vae.state_dict(), "ema": ema.state_dict() if ema else None, "step": step, "config": config,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "latent": latent.result(), "val": args.val,
                "projector": parts.one_pass.project.state_dict() if "vf" in parts.terms else None,
                "discriminator": discriminator.state_dict() if discriminator else None,
                "critic_optimizer": critic_optimizer.state_dict() if discriminator else None,
                # the data order and every random draw of the steps to come follow from these
                "random": {"seed": args.seed, "next_step": step}, "images_seen": step * args.batch,
                "data_count": store.count, "lpips": bool(parts.lpips), "args": plain_arguments(args),
            }  # fmt: skip
            write_atomically(folder / "checkpoint.pt", lambda f: torch.save(state, f))

    # ---- loop
    decoders = workers(args, processes)
    flops, peak = 0, 1
    if device.type == "cuda":
        flops, peak = vae_flops(parts, args.size, device), matmul_rate(device, dtype) * processes.world
    wrap(parts, args, processes)
    log = Log(args, processes, store.count, step, flops, peak)
    batches = load(store.batches(order, range(step, args.steps), share), step, args, share, device)
    for _, flip, pixels, _, _ in log.timed(prefetch(batches)):
        x = mirrored(pixels, flip).contiguous(memory_format=layout(device))  # (N, 3, S, S)
        train_step(args, parts, processes, x, step, share, micro, amp, scaler, log)
        critic, taken = turn(args, step)
        trained = critic_optimizer if critic else optimizer
        for group in trained.param_groups:
            group["lr"] = learning_rate(step, args, taken)
        take_step(trained, scaler, log, args, dtype)
        if ema and not critic:
            update_ema(ema, vae, taken, args.ema)
        step += 1
        # log
        log.end_step(step, trained.param_groups[0]["lr"])
        # save
        if step % args.save_every == 0 or step == args.steps:
            save()
            log.restart_clock(step)
        # evaluate
        if step % args.eval_every == 0 or step == args.steps:
            if processes.main:
                batches = some_images(validation, args.eval_images or EVAL_IMAGES, micro, decoders)
                delta = target_delta(vars(args))
                result, rows = measure(ema or vae, batches, device, args.seed, parts.lpips, features, delta=delta)
                save_pictures(rows, folder / "samples" / f"step{step:07d}")
                log.write(step=step, evaluation=result)
                if step == args.steps:
                    log.bar.close()
                    report(args.regularizer, result, say)
                if step == args.steps and "rfid" in result:
                    info = {"step": step, "weights": fingerprint((ema or vae).state_dict())}
                    save_score(folder, result, args, validation, info)
            log.restart_clock(step)
    finished(args, say, step)


def describe(args, parts, side):
    words = [args.reconstruction.upper()]
    words += [f"{args.lpips_weight:g} LPIPS"] * bool(parts.lpips)
    words += [f"{args.gan_weight:g} adaptive GAN from step {args.gan_start + 1}"] * bool(args.gan_weight)
    known = {
        "kl": f"{args.kl_weight:g} KL",
        "esm": f"{args.esm_weight:g} ESM (delta {args.esm_delta:g}, {'' if args.esm_blur else 'not '}blurred)",
        "dsm": f"DSM in blocks of {block_that_fits(side, side)} ({side} x {side} latents)",
        "eq": "EQ-VAE",
        "se": f"{args.se_weight:g} scale equivariance",
        "vf": f"{args.vf_weight:g} adaptive VF ({args.encoder})",
    }
    return " + ".join(words + [known[name] for name in sorted(parts.terms)])


def finished(args, say, step, again=False):
    say(f"{args.out}: {'this run is finished' if again else 'done'} at step {step} of {args.steps}.")
    say(f"  look      {args.out}/samples/")
    say(f"  spectrum  python train_vae.py --spectrum {args.out} --data {args.val or args.data}")
    say(f"  evaluate  python train_vae.py --eval-only --ckpt {args.out}")
    say(f"  encode    python train_vae.py --encode {args.data} --ckpt {args.out}")
    if again:
        say(f"  go on     the same command with --steps {2 * step}")


# ---- using a trained autoencoder --------------------------------------------------------------------------


def open_trained(args, path, device, flag):
    """-> (vae, its info, the size of its images). Raises InputError; `flag` names where the path came from."""
    if not path:
        raise InputError(f"{flag}: name the autoencoder with --ckpt RUN_OR_FILE")
    vae, info = load_autoencoder(path, device)
    size = args.size or info["config"].get("size") or 256
    if size % vae.factor:
        raise InputError(f"--size {size}: the autoencoder {path} takes multiples of {vae.factor}")
    return vae.to(memory_format=layout(device)), info, size


def data_of(args, info):
    """--val or --data, or else what the autoencoder was validated or trained on."""
    spec = args.val or args.data or info["val"] or (info["args"] or {}).get("data")
    if not spec:
        raise InputError("--data: name the images to look at; this checkpoint does not say what it was trained on")
    return spec


def evaluate_only(args):
    """`--eval-only`: a report and pictures of one autoencoder, into --out or its run folder."""
    processes = Processes(args.device)
    device, say = processes.device, processes.print
    vae, info, size = open_trained(args, args.ckpt, device, "--eval-only")
    if args.lpips_weight is None and (args.lpips_vgg or args.lpips_heads):
        args.lpips_weight = 1.0  # any weight measures
    fill(args, info["config"].get("preset"))
    lpips, features = open_measures(args, processes)
    if not processes.main:
        return
    images = Images(data_of(args, info), size)
    batches = some_images(images, args.eval_images or len(images), args.batch, workers(args, processes))
    result, rows = measure(vae, batches, device, args.seed, lpips, features, delta=target_delta(info["args"]))
    folder = Path(args.out or run_folder(args.ckpt))
    report(run_folder(args.ckpt).resolve().name, result, say)
    stem = folder / "samples" / f"eval-step{info['step']:07d}-{short_name(images.spec)}-{size}"
    files = save_pictures(rows, stem)
    write_atomically(f"{stem}.json", lambda f: f.write(json.dumps(result, indent=1).encode()))
    say(f"pictures {' '.join(map(str, files))}, numbers {stem}.json")
    if "rfid" in result:
        save_score(folder, result, args, images, {"step": info["step"], "weights": info["weights"]})


def compare_spectra(args):
    """`--spectrum CKPT ...`: any number of autoencoders side by side, as a table, a figure and spectrum.json."""
    processes = Processes(args.device)
    if not processes.main:
        return
    device, say, folder, results = processes.device, processes.print, Path(args.out or "runs/spectrum"), {}
    for path in args.spectrum:
        vae, info, size = open_trained(args, path, device, "--spectrum")
        args.data = data_of(args, info)  # the first one's, for all
        images = Images(args.data, size)
        name = run_folder(path).resolve().name
        name = path if name in results else name
        batches = some_images(images, args.eval_images or EVAL_IMAGES, args.batch or 32, workers(args, processes), name)
        results[name], _ = measure(vae, batches, device, args.seed, delta=target_delta(info["args"]))
    for name, result in results.items():
        say(f"{name}: latents {verdict(result)}")
    for alike in grouped(results):
        spectrum_table(alike, say)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "spectrum.json", lambda f: f.write(json.dumps(results, indent=1).encode()))
    say(f"numbers {folder}/spectrum.json, from {args.data}")
    try:
        draw_spectra(results, folder / "spectrum.png")
        say(f"figure  {folder}/spectrum.png")
    except ImportError:
        say("no figure: it takes matplotlib (pip install matplotlib)")


def grouped(results):
    """Results of autoencoders with the same target: one size of images, one of latents, one delta."""

    def kind(result):
        return result["size"], result["latent_side"], result["delta"]

    kinds = sorted({kind(result) for result in results.values()})
    return [{name: result for name, result in results.items() if kind(result) == one} for one in kinds]


def target_name(result):
    return "image x f" + (f"^{result['delta']:g}" if result["delta"] != 1 else "")


def spectrum_table(results, say):
    """Print results with one target: shares of log power by band at unit std, and sums."""
    names, first = list(results), next(iter(results.values()))
    width, side, shares = max(8, *(len(name) + 2 for name in names)), first["latent_side"], first["unit_std"]

    def row(title, form, value, *others):
        cells = [" " * 8 if other is None else format(other, f"8{form}") for other in others or (None, None)]
        say(f"{title:<22}" + "".join(cells) + "".join(format(value(r), form).rjust(width) for r in results.values()))

    say(f"share of log power per band of {side} x {side} latents at unit std, low to high; target = {target_name(first)}")
    say(f"{'band':<22}{'image':>8}{'target':>8}" + "".join(name.rjust(width) for name in names))
    for i, band in enumerate(first["bands"]):
        image, target = (shares[f"{name}_shares"][i] for name in ("image", "target"))
        row(band, ".4f", lambda r, i=i: r["unit_std"]["latent_shares"][i], image, target)
    for title, key, form in (("KL of mean spectra", "kl_of_mean_spectra", ".4f"),
                             ("mean of KLs per image", "mean_of_kls_per_image", ".4f"),
                             ("upper half", "upper_share", "+.3f")):  # fmt: skip
        row(title, form, lambda r, key=key: r["unit_std"][key])
        row("  raw", form, lambda r, key=key: r["raw"][key])
    row("alpha", ".2f", lambda r: r["latent_alpha"], first["image_alpha"], first["target_alpha"])
    stds = (first["spatial_std"][name] for name in ("image", "target"))
    row("std about own mean", ".3f", lambda r: r["spatial_std"]["latent"], *stds)
    lines = [("std", "latent_std", ".3f"), ("PSNR, dB", "psnr", ".2f"), ("SSIM", "ssim", ".4f")]
    lines += [(f"low-pass {k}", f"lowpass_psnr_{k}", ".2f") for k in DSM_LEVELS if f"lowpass_psnr_{k}" in first]
    for title, key, form in lines:
        row(title, form, lambda r, key=key: r[key])


def draw_spectra(results, file):
    """Shares of power by band, on a logarithmic scale, in the manner of the paper's figure (raw), and at unit std. Needs
    matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, scale, title in zip(both, ("unit_std", "raw"), ("at unit std", "raw, as ESM and the paper have them")):
        for alike in grouped(results):
            first = next(iter(alike.values()))
            at = f", {first['latent_side']} x {first['latent_side']}"
            axes.plot(first["bands"], first[scale]["image_shares"], "k:", label="image" + at)
            axes.plot(first["bands"], first[scale]["target_shares"], "k--", label=f"target: {target_name(first)}{at}")
        for name, result in results.items():
            label = f"{name}, KL of mean spectra {result[scale]['kl_of_mean_spectra']:.4f}"
            axes.plot(result["bands"], result[scale]["latent_shares"], marker=".", label=label)
        axes.set(title=title, xlabel="radial frequency band", yscale="log", xticks=range(1, BINS + 1))
        axes.legend(frameon=False, fontsize=8)
    both[0].set(ylabel="share of log power")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def encode_data(args):
    """`--encode DATA --ckpt CKPT --out FILE`: the latent cache of stage 2 (see `Cache`). The same command goes on
    where it was interrupted.
    """
    processes = Processes(args.device)
    say = processes.print
    vae, info, size = open_trained(args, args.ckpt, processes.device, "--encode")
    images = processes.local_first(lambda: Images(args.encode, size))
    file = Path(args.out or run_folder(args.ckpt) / f"{short_name(args.encode)}-{size}.latents")
    header = image_header(images) | {
        "kind": "moments", "shape": [len(images), 2, 2 * vae.latent_channels, *2 * [size // vae.factor]], "scale": None,
        "factor": vae.factor, "autoencoder": info["weights"], "preset": info["config"].get("preset"), "vae": args.ckpt,
    }  # fmt: skip
    # float32, whatever --amp: a posterior's std may be less than a half-precision rounding of its mean
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def encode(x):
        views = (view.contiguous(memory_format=layout(x.device)) for view in (x, x.flip(-1)))
        return torch.stack([torch.cat(vae.encode(view), 1) for view in views], 1)

    def measure_scale(cache):
        good, statistics = cache.indices, LatentStatistics()
        good = good[:: math.ceil(len(good) / SCALE_LIMIT)]
        for part in np.array_split(good, math.ceil(len(good) / 256)):
            statistics.add(*torch.from_numpy(cache.values[part].astype(np.float32)).flatten(0, 1).chunk(2, 1))
        return {"scale": statistics.result()["scale"]}

    if not fill_cache(file, header, images, encode, processes, args, "--out", args.batch or 32, measure_scale):
        return say(f"{file}: all {len(images)} images are encoded already")
    if processes.main:
        latents = Cache(file)
        say(f"{file}: {len(latents.indices)} images, scale {latents.header['scale']:.4f}, autoencoder {info['weights']}")
        say(f"  diffuse  python train_diffusion.py --latents {file}")


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, both = parser.add_argument, recipe_defaults(tiny=TINY, other_presets=PUBLISHED)
    add("--data", metavar="SPEC",
        help="folder, .zip, cifar10, dead-leaves or dead-leaves:full (default: dead-leaves; where a trained autoencoder "
        "is looked at, its own)")  # fmt: skip
    add("--val", metavar="SPEC", help="images that evaluations look at (default: those of --data)")
    add("--size", type=int, metavar="PIXELS", help=f"images are cropped and resized to this {both('size')}")
    add("--out", metavar="RUN", help="run folder (default: runs/DATA-SIZE-PRESET-REGULARIZER); the file of --encode "
        "(default: in CKPT's folder); the folder of --spectrum (default: runs/spectrum) and of --eval-only's pictures "
        "(default: CKPT's)")  # fmt: skip
    add("--preset", default="tiny", choices=PRESETS, help="f: pixels per latent pixel, d: channels (default: tiny)")
    add("--regularizer", default="esm", metavar="NAME[+NAME]",
        help="kl, esm, dsm, eq, se, vf, none or a sum such as esm+dsm; eq goes with neither dsm nor se "
        "(default: esm)")  # fmt: skip
    add("--kl-weight", type=float, default=1e-6, metavar="W", help="of kl. The reconstruction is a mean over pixels, KL "
        "a sum over latent dimensions: at 256 px 1e-6 is 196,608 times latent diffusion's 1e-6, whose reconstruction is "
        "a sum (default: 1e-6)")  # fmt: skip
    add("--esm-weight", type=float, default=0.01, metavar="W", help="of esm (default: 0.01)")
    add("--esm-delta", type=float, default=1.0, metavar="D",
        help="the target is the image's spectrum times f^D (default: 1)")  # fmt: skip
    add("--esm-blur", action=argparse.BooleanOptionalAction,
        help="blur images before they are resized to the latent (default: yes, except where it is 32 wide)")  # fmt: skip
    add("--se-weight", type=float, default=0.25, metavar="W", help="of se (default: 0.25)")
    add("--vf-weight", type=float, default=0.1, metavar="W", help="of vf, beside its adaptive weight (default: 0.1)")
    add("--encoder", metavar="SPEC", help="torch.hub encoder of vf, REPO:ENTRY, REPO a local folder or on GitHub")
    add("--reconstruction", default="l1", choices=("l1", "l2"), help="error of the pixels (default: l1)")
    add("--lpips-weight", type=float, metavar="W", help=f"of LPIPS, 0 for none {both('lpips_weight')}")
    add("--lpips-vgg", metavar="FILE", help="torchvision's VGG-16 weights (default: torch.hub's folder, downloaded)")
    add("--lpips-heads", metavar="FILE", help="the weights of LPIPS's heads (default: torch.hub's folder, downloaded)")
    add("--gan-weight", type=float, metavar="W",
        help=f"of the GAN, beside its adaptive weight, 0 for none {both('gan_weight')}")  # fmt: skip
    add("--gan-start", type=int, default=50_000, metavar="STEP", help="steps before the GAN starts (default: 50000)")
    add("--features", metavar="SPEC", help=f"of rFID: inception, REPO:ENTRY or none {both('features')}")
    add("--features-weights", metavar="FILE", help="local Inception weights (default: torch-fidelity downloads them)")
    add("--eval-images", type=int, metavar="N",
        help="images an evaluation looks at (default: 1000, with --eval-only all)")  # fmt: skip
    add("--eval-only", action="store_true", help="report on --ckpt, train nothing")
    add("--spectrum", nargs="+", metavar="CKPT", help="compare the spectra of these autoencoders, train nothing")
    add("--encode", metavar="SPEC", help="encode these images with --ckpt into the latent cache --out, train nothing")
    add("--ckpt", metavar="CKPT",
        help="run folder or checkpoint of this program, or SD-VAE weights in their original layout")  # fmt: skip
    add_training_flags(add, both)
    return parser


if __name__ == "__main__":
    run_program(main, make_parser().parse_args())
