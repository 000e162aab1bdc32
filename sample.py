r"""Sample a trained diffusion model, look at how it samples, and score it.

    python sample.py runs/first --n 64                  # PNG files, a grid
    torchrun --nproc_per_node=8 sample.py runs/first -n 50000 --score photos/
    python sample.py --score-folder a/ --score b/  # images, without a model
    python sample.py runs/first --trajectory       # low frequencies come first
    python sample.py --ckpt cifar10_DCTdiff_mid_2by2.pth    # DCTdiff's own
    python sample.py --ckpt DiT-XL-2-256x256.pt --model dit-xl/2 \
        --vae sd-vae.ckpt --classes 207 360 --guidance 4

Image i depends on the seed and i alone, not on batch size or number of
processes; images already there are skipped, so an interrupted command goes on
when typed again. DDIM is in train_diffusion.py, the other samplers are here.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import train_vae
from repa import Inception, frechet_distance, inception_score, kernel_distance, precision_recall
from spectral_losses import patch_artefacts, psd
from train_diffusion import Diffusion, ddim, generate, open_autoencoder, published_network, time_grid
from train_vae import Images, InputError, Parser, at_least, generator, progress, run_folder, run_program, save_grid

# ---- samplers -------------------------------------------------------------------------------------------------------
# Each takes denoise(x, t) -> (x0, eps) with t (N,), the path, x at t = 1, the number of steps and noise(), fresh
# normal noise shaped like x, calls denoise once a step (heun twice) and returns x at t = 0 (dpm++: 1e-4).

DPM_END, EULER_LAST, SDE_LAST = 1e-4, 1e-3, 0.04  # where dpm++ ends, where the last step to t = 0 begins [code]


def euler_vp(denoise, path, x, steps, noise, stochastic=False):
    """Euler steps of the probability-flow ODE, or Euler-Maruyama of the reverse SDE (arXiv 2011.13456), from t = 1 to
    1e-3, and a last one without noise to 0 [code], which on vp leaves 45% (ODE) or 9% (SDE) of the noise in x.
    """
    times = F.pad(time_grid(path, steps - 1, x, end=EULER_LAST), (0, 1))
    for t, s in zip(times, times[1:]):
        _, eps = denoise(x, t.expand(len(x)))
        score, beta, h = -eps / path.alpha_sigma(t)[1], path.beta(t), t - s
        x = x + h * beta * (x / 2 + score * (1 if stochastic else 0.5))
        if stochastic and s > 0:
            x = x + (beta * h).sqrt() * noise()
    return x


def dpm_plus_plus(denoise, path, x, steps, noise):
    """DPM-Solver++(2M), data prediction, second order, multistep (arXiv 2211.01095, algorithm 2), in equal steps of
    lambda from t = 1 to 1e-4 [code], where sigma is 0.0032 / sqrt(c).
    """
    ends = path.log_snr_half(torch.tensor([1.0, DPM_END], dtype=torch.float64, device=x.device))
    lam = torch.lerp(ends[0], ends[1], torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=x.device))
    times, previous = path.t_of_lambda(lam), None
    alpha, sigma = path.alpha_sigma(times)
    for i in range(steps):
        x0, _ = denoise(x, times[i].float().expand(len(x)))
        h = lam[i + 1] - lam[i]
        data = x0 if previous is None else x0 + (x0 - previous) * (h / (lam[i] - lam[i - 1]) / 2).float()
        x = (sigma[i + 1] / sigma[i]).float() * x - (alpha[i + 1] * torch.expm1(-h)).float() * data
        previous = x0
    return x


def heun(denoise, path, x, steps, noise):
    """Heun's second-order steps, the last one Euler's, as in EDM (arXiv 2206.00364, algorithm 1)."""
    times = time_grid(path, steps, x)
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, t.expand(len(x)))
        slope = eps - x0
        if s > 0:
            x0, eps = denoise(x + (s - t) * slope, s.expand(len(x)))
            slope = (slope + eps - x0) / 2
        x = x + (s - t) * slope
    return x


def flow_sde(denoise, path, x, steps, noise):
    """Euler-Maruyama of SiT's reverse SDE with diffusion w = 2t. The last step, from t = 0.04 (at c = 1), adds no noise
    [code]: it turns 0.04 e into -0.04 e, which stays however fine the steps (of data of std 0.5, 0.005 of it goes).
    """
    times = F.pad(time_grid(path, steps - 1, x, end=SDE_LAST), (0, 1))
    for t, s in zip(times, times[1:]):
        x0, eps = denoise(x, t.expand(len(x)))
        x = x + (s - t) * (eps - x0 + eps)  # v - w score / 2, the score being -eps / t
        if s > 0:
            x = x + (2 * t * (t - s)).sqrt() * noise()
    return x


ddpm, euler_sde = partial(ddim, eta=1.0), partial(euler_vp, stochastic=True)
VP_SAMPLERS = {"dpm++": dpm_plus_plus, "ddim": ddim, "ddpm": ddpm, "euler-ode": euler_vp, "euler-sde": euler_sde}
FLOW_SAMPLERS = {"euler": ddim, "heun": heun, "sde": flow_sde}  # on the flow path DDIM is the Euler step
SAMPLERS = {"vp": VP_SAMPLERS, "vp-sd": VP_SAMPLERS, "flow": FLOW_SAMPLERS}  # by path, the default first


# ---- how it samples -------------------------------------------------------------------------------------------------


def noise_spectrum(diffusion, scale=1e-2, pixels=2**21):
    """Power per radial band (bands,) of unit noise as the decoder makes it: in DCT space far from white, since chroma
    is noised at half resolution and dropped coefficients are not noised. Measured at `scale`, where nothing clips, on
    as many draws as hold `pixels`: within 3%.
    """
    g, blank = generator(0, 5), diffusion.field(torch.zeros(1, *diffusion.shape, device=diffusion.device))
    draws = max(8, pixels // blank[0, 0].numel())
    noise = (torch.randn(min(draws, 64), *diffusion.shape, generator=g).to(blank.device) for _ in range(0, draws, 64))
    return torch.cat([psd((diffusion.field(scale * e) - blank) / scale) for e in noise]).mean(0)


def drowning_times(diffusion, power):
    """The t (bands,) at which the forward process drowns each radial band: from there on the SNR, of data of this power
    (bands,) to the decoded noise, is below 1. nan where the power is nan.
    """
    t = torch.linspace(0, 1, 10_001, dtype=torch.float64)[1:]
    alpha, sigma = diffusion.path.alpha_sigma(t)
    snr = (alpha / sigma) ** 2 * (power / noise_spectrum(diffusion)).double().cpu()[:, None]  # (bands, times)
    return t[(snr >= 1).sum(1).clamp_max(len(t) - 1)].where(power.isfinite().cpu(), torch.nan)


def recovery_times(times, amplitudes):
    """The t (bands,) from which on predictions hold half of each band's final power: the last time, t falling, that
    their `amplitudes` (bands, times), their projections on the final band, over that band, pass sqrt(1/2); between two
    of `times` by interpolation. nan where they always were above.

    Of Gaussian data, along a flow without noise, the amplitude is sqrt(SNR / (1 + SNR)), so that this t is that of
    `drowning_times`. Noise that a network lets through does not count: it is not that of the final picture.
    """
    recovered = []
    for row in amplitudes.tolist():
        last = max((k for k, amplitude in enumerate(row) if amplitude < 0.5**0.5), default=-1)
        both = slice(last, last + 2)
        recovered.append(math.nan if last < 0 else float(np.interp(0.5**0.5, row[both], times[both])))
    return recovered


def trajectory(diffusion, protocol, stem, columns=10, rows=8):
    """Write the x0 predictions along one sampling run as a strip, and print the share of every radial band recovered
    so far (its power in the prediction over its power at the end; in latent space, of the latents): low frequencies
    come first (DCTdiff, section 3). Beside it, the t where the forward process drowns the band (`drowning_times`), and
    the t at which half of it is recovered (`recovery_times`).
    """
    predictions = []  # (t, x0) of every evaluation

    def note(t, x0):
        train_vae.stop_if_asked(" during the trajectory")
        predictions.append((t, x0))

    final = generate_by(protocol, diffusion, range(rows), note)
    chosen = np.linspace(0, len(predictions) - 1, min(columns, len(predictions))).round().astype(int)
    times, frames = zip(*predictions)
    strip = torch.stack([*(diffusion.decode(frames[k]) for k in chosen), final], 1).flatten(0, 1)
    print(f"x0 predictions, noise on the left: {save_grid(strip, f'{stem}-trajectory.png', len(chosen) + 1)}")
    end = frames[-1] if diffusion.vae else final
    power = psd(end).mean(0)  # (bands,)
    power = power.where(power > 1e-9 * power.sum(), torch.nan)  # a small field has no power in some bands
    shares, amplitudes = [], []
    for x in map(diffusion.field, frames):  # one at a time: there may be many, and large
        shares.append(psd(x).mean(0) / power)
        amplitudes.append((psd(end + x) - psd(end - x)).mean(0) / 4 / power)  # <end, x> / <end, end>
    shares, amplitudes = torch.stack(shares, 1), torch.stack(amplitudes, 1)  # (bands, times)
    drowned, recovered = drowning_times(diffusion, power).tolist(), recovery_times(times, amplitudes)
    print("share of a band's final power in the x0 prediction, at t =")
    print("band  SNR<1  half " + "".join(f"{times[k]:6.2f}" for k in chosen))
    for band, row in enumerate(shares[:, chosen].tolist()):
        if math.isfinite(row[0]):
            row = [f"{drowned[band]:7.2f}", f"{recovered[band]:6.2f} ", *(f"{share:6.2f}" for share in row)]
            print(f"{band:4d}" + "".join(row))
    finite = lambda values: [value if math.isfinite(value) else None for value in values]
    table = {"t": times, "share": [finite(row) for row in shares.tolist()]}
    table |= {"snr_below_1_at": finite(drowned), "half_recovered_at": finite(recovered)}
    train_vae.write_json(f"{stem}-trajectory.json", table | protocol)


# ---- models ---------------------------------------------------------------------------------------------------------


def open_model(args, device):
    """-> (config, weights, step, the frozen VAE or None) of a run, or of published weights. Raises InputError."""
    if bool(args.run) == bool(args.ckpt):
        raise InputError("name a run folder of train_diffusion.py, or published weights by --ckpt FILE")
    codec = {name: getattr(args, name) for name in ("block", "eta", "snr_scale")}
    if args.ckpt:
        vae, note = train_vae.load_autoencoder(args.vae, device) if args.vae else None, None
        config, weights = published_network(args.ckpt, args.model, vae, not args.no_ema, codec)
        if vae and vae[0].factor != 8:
            note = f"note: --vae {args.vae} has {vae[0].factor} pixels a latent pixel; published models are of 8"
        elif config["space"] == "dct":
            note = "{model}: {size} px, B {block}, keep {keep}, eta {eta:g}, c {snr_scale:g}".format(**config)
        if note and int(os.environ.get("RANK", 0)) == 0:
            print(note)
        return config, weights, 0, vae and vae[0]
    for name, value in ({"model": args.model} | codec).items():
        if value:
            flag = f"{train_vae.flag_name(name)} {value}"
            raise InputError(f"{flag}: is for --ckpt; {args.run} says itself what it is")
    checkpoint, vae = train_vae.read_checkpoint(args.run), None
    config = checkpoint["config"]
    if config["space"] == "latent":
        path = args.vae or run_folder(args.run) / "autoencoder.pt"
        vae, _ = open_autoencoder(path, device, config["autoencoder"], args.run)
    elif args.vae:
        raise InputError(f"--vae {args.vae}: {args.run} works on {config['space']}, without an autoencoder")
    return config, checkpoint["model" if args.no_ema else "ema"], checkpoint["step"], vae


# ---- files ----------------------------------------------------------------------------------------------------------


def class_of(protocol, i):
    """The class of image number i: of the protocol's in turn, or drawn."""
    classes = protocol["classes"]
    if protocol["deal"] == "random":
        i = torch.randint(len(classes), (), generator=generator(protocol["seed"], i, train_vae.DEAL)).item()
    return classes[i % len(classes)]


def generate_by(protocol, diffusion, indices, trace=None):
    """Images number `indices` by a protocol -> (n, 3, S, S) in [-1, 1]."""
    sampler = SAMPLERS[diffusion.config["path"]][protocol["sampler"]]
    y = [class_of(protocol, i) for i in indices] if protocol["classes"] else None
    y = y and torch.tensor(y, device=diffusion.device)
    settings = protocol["steps"], protocol["guidance"], protocol["guidance_interval"]
    return generate(diffusion, indices, protocol["seed"], diffusion.device, y, sampler, *settings, trace)


def is_whole(file):
    """Whether a PNG is there with both of its ends; after a power cut it may be empty, half of it, or zeros."""
    with contextlib.suppress(OSError), open(file, "rb") as handle:
        head = handle.read(8)
        handle.seek(-12, os.SEEK_END)
        return head == b"\x89PNG\r\n\x1a\n" and handle.read() == b"\0\0\0\0IEND\xaeB`\x82"
    return False


def sample_files(diffusion, protocol, folder, n, batch=64, rank=0, world=1):
    """Write images 0..n-1 as folder/000000.png ..., this process's share of those not there yet -> the n files. Process
    0 returns when all are there. The folder is one of `open_folder`.
    """
    files = [folder / f"{i:06d}.png" for i in range(n)]
    missing = [i for i in range(n) if not is_whole(files[i])]
    todo = [i for i in missing if i % world == rank]
    hide, watched = rank > 0 or not missing, {}

    def tick(start, images, t, x0):  # t falls from 1 to 0
        bar.update(max(0, min(n, start + int((1 - t) * images * world)) - bar.n))

    with progress(desc="sample", unit="img", total=n, initial=n - len(missing), disable=hide) as bar:
        for k in range(0, len(todo), batch):
            indices = todo[k : k + batch]
            start = bar.n
            images = train_vae.to_uint8(generate_by(protocol, diffusion, indices, partial(tick, start, len(indices))))
            for i, pixels in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy()):
                train_vae.write_atomically(files[i], partial(Image.fromarray(pixels).save, format="PNG"), sync=False)
            bar.update(min(start + len(indices) * world, n) - bar.n)
            watch(dict.fromkeys(range(1, world) if rank == 0 else (), n), folder, watched)
        while rank == 0:  # others' share; no collective
            there = set(os.listdir(folder))  # one look, not one at each of 50,000 files that are not yet there
            missing = [i for i in missing if files[i].name not in there or not is_whole(files[i])]
            if not missing:
                break
            done = f"after {n - len(missing)} of {n} images"
            train_vae.stop_if_asked(f" {done}")
            if ended := watch(collections.Counter(i % world for i in missing), folder, watched):
                raise InputError(f"--out {folder}: process {ended[0]} has ended, {done}; the same command goes on")
            time.sleep(0.2)
    return files


LOST, UNSEEN = 30, 600  # seconds without a sign of a process, seen alive before or never, when it must have ended


def work_in(folder, rank):
    """Show process 0, by a lock on a file in a folder, that this one lives."""
    handle = train_vae.HELD.enter_context(open(folder / f".lock{rank}", "a"))
    while train_vae.lock(handle) is False:  # process 0 tries it for a moment
        train_vae.stop_if_asked("")
        time.sleep(0.01)


def watch(missing, folder, watched):
    """Look for signs of life, a lock held or an image made, of other processes at work in a folder. missing: {process:
    images it has to make}; watched: {process: (their number before, when it last gave a sign, whether its lock was ever
    held)}, kept up here -> the processes that must have ended.
    """
    now, ended = time.monotonic(), []
    for other, count in missing.items():
        before, since, seen = watched.get(other, (count, now, False))
        with open(folder / f".lock{other}", "a") as handle:
            locked = train_vae.lock(handle) is False
        since, seen = now if locked or count < before else since, seen or locked
        watched[other] = count, since, seen
        ended += [other] * (now - since > (LOST if seen else UNSEEN))
    return ended


def read_protocol(file):
    """The dict in a protocol.json, or None where there is none, or a torn one."""
    try:
        protocol = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return {"deal": "equal"} | protocol if isinstance(protocol, dict) else None  # earlier versions had no other deal


def held_by_this_launch(folder):
    """Whether process 0 of this launch holds a folder, rather than another command."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / ".lock").read_text(errors="replace").endswith(train_vae.launch())


def open_folder(folder, protocol, rank):
    """Make a folder for images of a protocol, or see that those in it were made by the same. Raises InputError. Where
    its protocol.json is torn, nothing says how its images were made: they go.
    """
    record = folder / "protocol.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; name a folder")
    if rank == 0:
        there = set(folder.iterdir()) if folder.exists() else set()
        files = {file for file in there - {record} if not file.name.startswith(".lock") and file.suffix != ".tmp"}
        images = {file for file in files if record.exists() and re.fullmatch(r"\d{6,}\.png", file.name)}
        if files - images and read_protocol(record) is None:
            raise InputError(f"--out {folder} holds other files and no protocol.json of sampling; name another folder")
        train_vae.HELD.enter_context(train_vae.hold(folder, "--out"))
    while rank > 0 and not (held_by_this_launch(folder) and read_protocol(record)):  # rank 0 looks at the folder first
        train_vae.stop_if_asked("")
        time.sleep(0.05)
    old = read_protocol(record)
    if old is None:
        if record.exists():
            print(f"{record}: torn; it is made again, and so are the {len(images)} images it was of")
        for file in images:
            file.unlink()
        old = protocol
        train_vae.write_json(record, protocol)
    changed = [f"{key} {old[key]} there, {new} now" for key, new in protocol.items() if old.get(key, new) != new]
    if changed:
        raise InputError(f"--out {folder} holds images made otherwise ({'; '.join(changed)}); name another folder")


def collect(files, grid, npz=None, cells=None):
    """Write the first `cells` images of PNG files (all by default) as a grid, and all of them as one array -> the first
    64 (n, 3, S, S) in [-1, 1].
    """
    pixels = np.stack([np.asarray(Image.open(file)) for file in (files if npz else files[:cells])])  # (n, S, S, 3)
    images = torch.from_numpy(pixels[:cells]).permute(0, 3, 1, 2) / 127.5 - 1
    print(f"grid {save_grid(images, grid, math.ceil(math.sqrt(len(images))))}")
    if npz:
        train_vae.write_atomically(npz, lambda file: np.savez(file, pixels))
        print(f"{pixels.shape} uint8 in {npz}")
    return images[:64]


def artefacts(images, diffusion):
    """Print `patch_artefacts` of images (n, 3, S, S) at the side, in pixels, of a token and of a block or latent."""
    config, side = diffusion.config, math.isqrt(diffusion.network.num_tokens)
    part = config["block"] if config["space"] == "dct" else diffusion.vae.factor if diffusion.vae else 0
    for period in sorted({config["size"] // side, part}, reverse=True):
        if 1 < period <= config["size"] // 3:
            print(f"patch artefacts, period {period}: {patch_artefacts(images, period):.2f} (photographs: about 1)")


# ---- scores ---------------------------------------------------------------------------------------------------------

FLOOR_LEAST = 512  # images that a reference needs for a floor
FEATURES_KEPT = 2**31  # bytes; of a larger set there are mean and covariance only
ARRAYS = {"features": np.float32, "mu": np.float64, "sigma": np.float64}  # in a file of reference statistics
# Form of what `Reference` says there.
PROTOCOL = {f"{name}?": train_vae.maybe(train_vae.whole(1)) for name in ("images", "floor_images")}
PROTOCOL |= {"floor?": train_vae.real()}
OF_SETS = "score_folder score size save_reference features features_weights cache batch device amp".split()  # flags


def smaller_side(images):
    """Of all images of a data set, as they are stored. Raises InputError where they do not share it."""
    sides = {}
    for i, name in enumerate(progress(images.names, desc="sizes", unit="img")):
        with contextlib.suppress(Exception), images.open(i) as image:  # `extract` counts unreadable ones
            sides.setdefault(min(image.size), name)
        if len(sides) > 1:
            (a, first), (b, second) = sides.items()
            text = f"smaller sides of {a} ({first}) and {b} pixels ({second})"
            remedy = "name another" if images.flag.startswith("--out") else "--size PIXELS crops and resizes all to one"
            raise InputError(f"{images.flag}: {text}; {remedy}")
    return min(sides) if sides else images.readable(0)  # which raises


def check_not_enlarged(images):
    """Raise InputError where one of 16 images of a data set is smaller than the size that it is asked for."""
    for i in range(0, len(images), math.ceil(len(images) / 16)):
        with images.open(images.readable(i)[0]) as image:
            if min(image.size) < images.size:
                sizes = f"{image.width}x{image.height} pixels ({images.names[i]}), compared at {images.size}"
                raise InputError(f"{images.flag}: {sizes}: enlarged images prove nothing; give some at least as large")


def extract(images, count, features, batch):
    """Of the readable ones of the first `count` images of a data set: {"images": n, "features": (n, D) float32, or
    (0, D) where they would be beyond 2 GiB, "mu": (D,), "sigma": (D, D)}. Raises InputError.
    """
    n, total, products = 0, 0, 0
    kept = torch.empty(count if count * features.width * 4 <= FEATURES_KEPT else 0, features.width)
    for _, pixels, good in images.batches(range(count), batch, min(4, train_vae.cores()), "features"):
        if good.any():
            x = features(pixels[good])
            kept[n : n + len(x)] = x[: len(kept)]
            n, x = n + len(x), x.double()
            total, products = total + x.sum(0), products + x.mT @ x
    images.check_unreadable(count - n)
    if n < 2:
        raise InputError(f"{images.flag}: {n} readable images; a score takes at least 2")
    sigma = (products - torch.outer(total, total) / n) / (n - 1)
    return {"images": n, "features": kept[:n], "mu": (total / n).numpy(), "sigma": sigma.numpy()}


def read_reference(flag, file, made_by, width):
    """A file of reference statistics, of ADM or pytorch-fid (mu, sigma) or of `write_reference` -> what was written.
    Raises InputError where it is damaged, or its features cannot be compared with those of `made_by`.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            sizes = {record.filename.removesuffix(".npy"): record.file_size for record in content.zip.infolist()}
            if max(sizes.get(name, 0) for name in (*ARRAYS, "protocol")) > FEATURES_KEPT + 2**10:
                raise ValueError("arrays beyond 2 GiB")  # or little that was compressed from so much
            protocol = dict(json.loads(str(content["protocol"]))) if "protocol" in content else {}
            train_vae.check_form(protocol, PROTOCOL)
            names = ARRAYS if protocol else ("mu", "sigma")
            # in this machine's order of bytes; complex numbers raise
            arrays = {key: content[key].astype(ARRAYS[key], casting="same_kind") for key in names if key in content}
    except Exception as error:  # np.load lets through whatever zipfile, numpy and json met
        raise InputError(f"{flag} {file}: cannot be read as reference statistics ({error})") from error
    if not {"mu", "sigma"} <= arrays.keys():
        makes = "as ADM's and pytorch-fid's have; of images, give the folder or .zip"
        raise InputError(f"{flag} {file}: no reference statistics, it lacks mu and sigma ({makes})")
    for key, value in made_by.items():
        if protocol.get(key, value) != value:
            raise InputError(f"{flag} {file}: made with {key} {protocol[key]}, now {value}; make it anew")
    arrays = {"features": np.zeros((0, width), np.float32)} | arrays
    shapes = {"features": (*arrays["features"].shape[:1], width), "mu": (width,), "sigma": (width, width)}
    for key, array in arrays.items():
        if array.shape != shapes[key] or not np.isfinite(array).all():
            fits = array.shape == shapes[key]
            text = "not finite" if fits else f"{array.shape}, these features have {width}"
            raise InputError(f"{flag} {file}: its {key} is {text}; --features names those it was made with")
    return {"images": None} | protocol | arrays | {"features": torch.from_numpy(arrays["features"])}


def write_reference(file, reference):
    arrays = {key: reference[key] for key in ARRAYS}
    protocol = json.dumps({key: value for key, value in reference.items() if key not in ARRAYS})
    ours = Path(f"{file}.{os.getpid()}")  # another command may write the same
    train_vae.write_atomically(ours, lambda handle: np.savez(handle, **arrays, protocol=protocol))
    ours.replace(file)


class Reference:
    """What `--score` names: statistics in a FILE.npz, or images, whose own are computed once and kept in --cache.

    Attributes: features (of `--features`), settings (plain values: what is compared, and how). Raises InputError for
    all that can be wrong before `load`, which takes long.
    """

    def __init__(self, args, size, device):
        self.spec, self.cache, self.copy, self.batch = args.score, Path(args.cache), args.save_reference, args.batch
        ready, self.kept = self.spec.endswith(".npz"), None
        if ready and self.copy:
            raise InputError(f"--save-reference: {self.spec} holds statistics already; --score names images")
        if not ready:
            self.images = Images(self.spec, size, "--score")
            name = self.images.cache_name()  # what is kept, by whatever features, was looked at
            if not any(file.name.startswith(name) for file in self.cache.glob("*.npz")):
                check_not_enlarged(self.images)
        self.features = train_vae.Features(args.features, args.features_weights, size, device)
        encoder, weights = args.features.rpartition(":")[2], train_vae.fingerprint(self.features.encoder.state_dict())
        self.made_by = {"encoder": encoder, "size": size, "crop": train_vae.crop_text(size), "encoder_weights": weights}
        self.settings = {"reference": self.spec, "features": args.features, "features_weights": args.features_weights}
        self.settings |= {"encoder_weights": weights, "crop": self.made_by["crop"]}
        if ready:
            self.kept = read_reference("--score", self.spec, self.made_by, self.features.width)
            return
        self.file = self.cache / f"{name}-{encoder}-{weights}.npz"
        if self.file.exists():
            try:
                self.kept = read_reference("--cache", self.file, self.made_by, self.features.width)
            except InputError as error:
                print(f"made again: {error}")

    def load(self):
        """-> what `extract` returns of the images, with the floor where they are enough, and what made it."""
        reference = self.kept or self.make()
        if self.copy:
            write_reference(self.copy, reference)
            print(f"statistics of {reference['images']} images in {self.copy}")
        return reference

    def make(self):
        extracted = extract(self.images, len(self.images), self.features, self.batch)
        reference, n = {"data": self.spec} | self.made_by | extracted, len(extracted["features"])
        if n >= FLOOR_LEAST:
            halves = torch.randperm(n, generator=generator(0, 6)).split(n // 2)[:2]
            floor = frechet_distance(*(reference["features"][half] for half in halves))
            reference |= {"floor": floor, "floor_images": n // 2}
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            write_reference(self.file, reference)
        except (InputError, OSError) as error:
            print(f"note: --cache {self.cache}: the reference's features are not kept ({error})")
        return reference


def score(ours, reference, features, settings, folder):
    """Every score of one set of images to another, both of `extract`, None where they are too few; printed, and saved
    in scores.jsonl in a folder, with what it depends on -> the same.
    """
    a, b = (x["features"].to(features.device) for x in (ours, reference))
    with progress(desc="scores", unit="score", total=4) as bar:
        result = {"frechet_distance": frechet_distance(ours, reference)}
        result |= {key: reference[key] for key in ("floor", "floor_images") if key in reference}
        bar.update()
        result |= kernel_distance(a, b)
        bar.update()
        if isinstance(features.encoder, Inception):
            result |= inception_score(features.encoder.logits(a))
        bar.update()
        result |= precision_recall(a, b)
    result |= {"images": ours["images"], "reference_images": reference["images"]} | settings
    train_vae.record_score(folder, result)
    if not len(b):
        print("  note: the reference holds mean and covariance alone, which give neither KID, precision nor recall")
    return result


def print_range(results):
    """Mean and range of every number over several seeds."""
    print(f"{f'{len(results)} seeds':18}{'mean':>10}{'least':>10}{'most':>10}")
    for key, name in train_vae.score_names(results[0]["features"]).items():
        values = [result[key] for result in results if result.get(key) is not None]
        if values and key != "floor":  # the reference's alone
            print(f"{name:18}{np.mean(values):10.5g}{min(values):10.5g}{max(values):10.5g}")


def score_sets(args, device):
    """`--score-folder A --score B`, and `--score B --save-reference FILE` alone: no model is asked."""
    spec, flag = (args.score_folder, "--score-folder") if args.score_folder else (args.score, "--score")
    for name in (name for name in args.defaults if name not in OF_SETS and getattr(args, name) != args.defaults[name]):
        given = args.run if name == "run" else train_vae.flag_name(name)
        raise InputError(f"{flag} {spec}: images are scored as they are; leave {given} out")
    if not args.score or (not args.score_folder and spec.endswith(".npz")):
        raise InputError(f"{flag} {spec}: --score SPEC names the images to compare with")
    images = Images(spec, args.size or 1, flag)
    if images.kind == "dead-leaves" and not args.size:
        raise InputError(f"{flag} {spec}: are of any size; --size PIXELS names one")
    images.size = args.size or smaller_side(images)
    check_not_enlarged(images)
    reference = Reference(args, images.size, device)
    statistics = reference.load()
    if args.score_folder:
        formats = sorted({Path(str(name)).suffix[1:].upper() for name in images.names})
        settings = reference.settings | {"format": " ".join(formats), "folder": spec}
        ours = extract(images, len(images), reference.features, args.batch)
        folder = images.path.resolve().parent if images.kind == "folder" else Path()
        score(ours, statistics, reference.features, settings, folder)
        print(f"  saved in           {folder}/scores.jsonl")


# ---- command line ---------------------------------------------------------------------------------------------------


def ends_in(suffix, text):
    """With its suffix filled in, an argparse type: the name of a file to write."""
    if os.path.isdir(text) or Path(text).suffix != suffix:
        raise argparse.ArgumentTypeError(f"{text!r} must be a file that ends in {suffix}")
    return text


def parse_classes(chosen, classes):
    """`--classes` names or numbers -> indices; image i takes entry i modulo their count. None: all, in turn."""
    if classes is None and chosen:
        raise InputError(f"--classes {' '.join(chosen)}: this model was trained without classes")
    indices = []
    for name in chosen or classes or ():
        index = classes.index(name) if name in classes else int(name) if name.isdecimal() and len(name) < 10 else -1
        if not 0 <= index < len(classes):
            names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise InputError(f"--classes {name}: not one of the {len(classes)} classes 0..{len(classes) - 1} ({names})")
        indices.append(index)
    return indices or None


def make_protocol(args, config, weights, step, dtype):
    """What the images follow from but the seed, plain values. Raises InputError where settings do not fit the model."""
    samplers, classes = list(SAMPLERS[config["path"]]), parse_classes(args.classes, config["classes"])
    sampler = args.sampler or samplers[0]
    if sampler not in samplers:
        takes = f"{config['path']} path, which takes {', '.join(samplers)}"
        raise InputError(f"--sampler {sampler}: not for this model's {takes}")
    if config["classes"] is None and args.guidance != 1:
        raise InputError(f"--guidance {args.guidance}: this model was trained without classes, nothing can guide it")
    if args.guidance != 1 and not config["label_dropout"]:
        raise InputError(f"--guidance {args.guidance}: trained without label dropout, this model knows no null class")
    if args.deal == "random" and not classes:
        raise InputError("--deal random: this model was trained without classes, there is nothing to deal")
    protocol = {"weights": train_vae.fingerprint(weights), "checkpoint_step": step, "ema": not args.no_ema}
    protocol |= {"sampler": sampler, "steps": args.steps, "guidance": args.guidance}
    protocol |= {"guidance_interval": args.guidance_interval} | ({"deal": args.deal} if classes else {})
    protocol |= {"amp": str(dtype or torch.float32).removeprefix("torch."), "classes": classes}
    names = {"latent": ("autoencoder", "scale", "shift"), "dct": ("eta", "snr_scale")}.get(config["space"], ())
    return protocol | {name: config[name] for name in names if name in config}


def folder_name(protocol, model, chosen):
    """The settings in a word; `chosen` says whether the classes were."""
    name = f"{model}-{protocol['sampler']}{protocol['steps']}-g{protocol['guidance']:g}-seed{protocol['seed']}"
    if protocol["guidance_interval"] != [0, 1]:
        name += "-t{:g}-{:g}".format(*protocol["guidance_interval"])
    if chosen:
        name += f"-classes{'-'.join(map(str, protocol['classes']))[:40]}"
    name += "-random" * (protocol.get("deal") == "random")
    return name if protocol["ema"] else f"{name}-no-ema"


@dataclasses.dataclass
class Samples:
    """Those of one seed: what they follow from, and where the files, the grid and the array (or None) go."""

    protocol: dict
    folder: Path
    grid: Path
    npz: Path | None


def main(args):
    # ---- set-up
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for file in filter(None, (args.npz, args.grid, args.save_reference)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    if args.save_reference and not args.score:
        raise InputError(f"--save-reference {args.save_reference}: --score SPEC names the images it is of")
    device = train_vae.choose_device(args.device)
    if args.score_folder or (args.save_reference and not (args.run or args.ckpt)):
        return score_sets(args, device) if rank == 0 else None
    if args.size:
        raise InputError(f"--size {args.size}: is for sets of images alone; a model's samples have their size")
    config, weights, step, vae = open_model(args, device)
    amp, dtype = train_vae.autocast(args.amp, device)
    protocol = make_protocol(args, config, weights, step, dtype)
    diffusion = Diffusion(config, vae=vae, amp=amp)
    train_vae.load_weights(diffusion.network, weights, args.run or args.ckpt)
    diffusion.network.to(device).eval()
    model, beside = Path(args.ckpt).stem if args.ckpt else f"step{step}", run_folder(args.run or args.ckpt) / "samples"
    seeds, jobs = list(dict.fromkeys(args.seeds or [args.seed or 0])), []
    for seed in seeds:  # each of several has files of its own
        own, ending = protocol | {"seed": seed}, f"-seed{seed}" * (len(seeds) > 1)
        folder = Path(f"{Path(args.out)}{ending}") if args.out else beside / folder_name(own, model, args.classes)
        grid, npz = (file and Path(file).with_stem(f"{Path(file).stem}{ending}") for file in (args.grid, args.npz))
        jobs.append(Samples(own, folder, grid or Path(f"{folder}.png"), npz))
    if args.trajectory:
        for job in jobs if rank == 0 else ():
            trajectory(diffusion, job.protocol, job.folder)
        return
    reference = Reference(args, config["size"], device) if args.score and rank == 0 else None

    # ---- sample
    with train_vae.HELD:
        for job in jobs:
            open_folder(job.folder, job.protocol, rank)
            if rank > 0:
                work_in(job.folder, rank)
        # whatever is wrong with it shows before an hour of sampling; the other processes begin with that
        statistics = reference and reference.load()
        for job in jobs:
            files = sample_files(diffusion, job.protocol, job.folder, args.n, args.batch, rank, world)
            if rank == 0:
                print(f"{args.n} images in {job.folder}")
                artefacts(collect(files, job.grid, job.npz, None if args.grid else 64), diffusion)
    if not reference:
        return

    # ---- score
    results = []
    for job in jobs:
        images = Images(str(job.folder), config["size"], "--out")
        if (side := smaller_side(images)) != config["size"]:
            raise InputError(f"--out {job.folder}: images of {side} pixels, not the model's {config['size']}")
        ours = extract(images, args.n, reference.features, args.batch)
        settings = reference.settings | {"format": "PNG", "folder": job.folder.name} | job.protocol
        results.append(score(ours, statistics, reference.features, settings, job.folder.parent))
    if len(results) > 1:
        print_range(results)


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN_OR_CKPT", nargs="?", help="run folder of train_diffusion.py, or a checkpoint file")
    add("--ckpt", metavar="FILE", help="instead of RUN_OR_CKPT: published weights of a DiT, SiT or U-ViT")
    add("--model", metavar="NAME", help="their network, which a DiT's and a SiT's must name: dit-xl/2, sit-xl/2")
    trained = "that --ckpt on DCT tokens was trained with (default: as published"
    add("--block", type=at_least(1), metavar="B", help=f"DCT block size {trained})")
    add("--eta", type=at_least(1e-9, float), metavar="X", help=f"scale of the coefficients {trained})")
    text = f"SNR scaling {trained} for its shapes; 4 of FFHQ 128 and 256, in the authors' first release 3 and 1)"
    add("--snr-scale", type=at_least(1e-9, float), metavar="C", help=text)
    text = "the autoencoder: SD-VAE weights, in any layout, for --ckpt; for a run, where its own is elsewhere"
    add("--vae", metavar="RUN_OR_FILE", help=f"{text} (default: RUN/autoencoder.pt)")
    # -n as well: on Python 3.11, torchrun takes --n for an abbreviation of its own flags
    add("-n", "--n", type=at_least(1, most=10**7), default=64, help="images")
    add("--out", metavar="DIR", help="folder of the PNG files (default: in RUN/samples/, named after the settings)")
    npz, png = partial(ends_in, ".npz"), partial(ends_in, ".png")
    add("--npz", metavar="FILE", type=npz, help="one uint8 array (n, S, S, 3) as well, the ADM evaluation format")
    add("--grid", metavar="FILE", type=png, help="the grid, of all n images (default: beside --out, the first 64)")
    add("--batch", type=at_least(1, most=2**20), default=64, help="images at a time, in each process")
    seed = at_least(0, most=2**63 - 1)
    add_one = parser.add_mutually_exclusive_group().add_argument
    add_one("--seed", type=seed, help="image i depends on (seed, i) alone (default: 0)")
    several = "instead of --seed: sample, and score, each; their files end in -seedN"
    add_one("--seeds", type=seed, nargs="+", metavar="N", help=several)
    text = "; ".join(f"{path}: {', '.join(SAMPLERS[path])}" for path in ("vp", "flow"))
    add("--sampler", help=f"{text}, some leave noise, as published: README (default: the first)")
    add("--steps", type=at_least(1, most=10**6), default=50, help="sampler steps")
    add("--guidance", type=at_least(-1000, float, 1000), default=1.0, help="classifier-free guidance scale, 1 for none")
    text = "t between which guidance acts (default: 0 1)"
    add("--guidance-interval", type=at_least(0, float, 1), nargs=2, default=[0.0, 1.0], metavar=("A", "B"), help=text)
    add("--classes", nargs="+", help="names or numbers, dealt in turn (default: all)")
    add("--no-ema", action="store_true", help="sample the raw weights instead of their average")
    deal = "of classes: each in turn, or drawn for each image, as published scores often have it"
    add("--deal", choices=("equal", "random"), default="equal", help=deal)
    score = "score against this data, given as train_diffusion.py's --data, or against statistics in FILE.npz"
    add("--score", metavar="SPEC", help=score)
    add("--score-folder", metavar="SPEC", help="without a model: score these images, given likewise, against --score")
    size = "with --score-folder: both are cropped and resized to this (default: the smaller side of its images)"
    add("--size", type=at_least(1, most=train_vae.SIDE), metavar="PIXELS", help=size)
    save = "write the statistics of --score, for --score FILE.npz; without a model, only that"
    add("--save-reference", metavar="FILE", type=npz, help=save)
    add("--cache", metavar="DIR", default="cache", help="folder where features of --score are kept")
    add("--features", default="inception", help="inception, hog or a torch.hub REPO:ENTRY")
    add("--features-weights", metavar="FILE", help="local Inception weights (default: downloaded by torch-fidelity)")
    add("--trajectory", action="store_true", help="only show one sampling run, band by band")
    train_vae.add_device_flags(add)
    args = parser.complete(argv)
    low, high = args.guidance_interval
    if low >= high:
        raise InputError(f"--guidance-interval {low:g} {high:g}: the first must be the smaller; 0 1 does")
    return args


if __name__ == "__main__":
    run_program(main, parse)
