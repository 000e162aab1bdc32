r"""Sample a trained diffusion model, look at how it samples, and score it.

    python sample.py runs/first --n 64                  # PNG files, a grid
    torchrun --nproc_per_node=8 sample.py runs/first -n 50000 --score photos/
    python sample.py runs/first --trajectory       # low frequencies come first
    python sample.py --ckpt DiT-XL-2-256x256.pt --model dit-xl/2 \
        --vae sd-vae.ckpt --classes 207 360 --guidance 4

Image i depends on the seed and i alone, not on batch size or number of
processes; images already there are skipped, so an interrupted command goes on
when typed again. DDIM is in train_diffusion.py, the other samplers are here.
"""

import argparse
import json
import math
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset

import dit
import train_vae
import uvit
from repa import frechet_distance
from spectral_losses import psd
from train_diffusion import Diffusion, ddim, generate, open_autoencoder, parse_model, time_grid
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


def trajectory(diffusion, protocol, stem, columns=10, rows=8):
    """Write the x0 predictions along one sampling run as a strip, and print the share of every radial band recovered
    so far (its power in the prediction over its power at the end; in latent space, of the latents): low frequencies
    come first (DCTdiff, section 3). Beside it, the t where the forward process drowns the band (`drowning_times`).
    """
    predictions = []  # (t, x0) of every evaluation
    final = generate_by(protocol, diffusion, range(rows), lambda t, x0: predictions.append((t, x0)))
    chosen = np.linspace(0, len(predictions) - 1, min(columns, len(predictions))).round().astype(int)
    times, frames = zip(*(predictions[k] for k in chosen))
    strip = torch.stack([*map(diffusion.decode, frames), final], 1).flatten(0, 1)
    print(f"x0 predictions, noise on the left: {save_grid(strip, f'{stem}-trajectory.png', len(frames) + 1)}")
    power = psd(frames[-1] if diffusion.vae else final).mean(0)  # (bands,)
    power = power.where(power > 1e-9 * power.sum(), torch.nan)  # a small field has no power in some bands
    shares = torch.stack([psd(diffusion.field(x0)).mean(0) / power for x0 in frames], 1).tolist()  # (bands, columns)
    drowned = drowning_times(diffusion, power).tolist()
    print("share of a band's final power in the x0 prediction, at t =")
    print("band  SNR<1 at " + "".join(f"{t:6.2f}" for t in times))
    for band, row in enumerate(shares):
        if math.isfinite(row[0]):
            print(f"{band:4d}  {drowned[band]:8.2f} " + "".join(f"{share:6.2f}" for share in row))
    finite = lambda values: [value if math.isfinite(value) else None for value in values]
    table = {"t": times, "share": [finite(row) for row in shares], "snr_below_1_at": finite(drowned)}
    Path(f"{stem}-trajectory.json").write_text(json.dumps(table | protocol))


# ---- models ---------------------------------------------------------------------------------------------------------

SD_SCALE = 0.18215  # of SD-VAE latents, in every published latent model
READERS = {kind: partial(dit.read_published, kind=kind) for kind in ("dit", "sit")} | {"uvit": uvit.read_published}


def published_network(file, name, vae=None, ema=True):
    """A published DiT, SiT or U-ViT from its checkpoint -> (config of `Diffusion`, state dict). Kind and shape are read
    off its keys; the heads of attention, and whether it is a DiT or a SiT, only `name` tells (sit-xl/2). Raises
    InputError where they do not fit, or where a latent model finds no `vae`, (VAE, info) of `load_autoencoder`.
    """
    state = published_weights(file, ema)
    kind, model = name.lower().partition("-")[0], name.lower().replace("sit-", "dit-", 1)
    _, _, wanted = parse_model(model)  # its patch, or None
    other, keys = ("dit", "a dit or sit's") if kind == "uvit" else ("uvit", "a uvit's")
    try:
        config, weights = READERS[kind](state) or (None, None)
        if config is None and READERS[other](state):
            raise InputError(f"--ckpt {file}: its keys are {keys}, --model {name} is none")
    except ValueError as error:
        raise InputError(f"--ckpt {file}: {error}") from error
    if config is None:
        keys = ", ".join(list(state)[:3])
        raise InputError(f"--ckpt {file}: its keys are no DiT's, SiT's or U-ViT's on maps ({keys} ...)")
    patch, channels, side = (config.pop(key) for key in ("patch", "channels", "side"))
    if wanted not in (None, patch):
        raise InputError(f"--model {name}: {file} has patches of {patch}")
    config |= {"snr_scale": 1.0, "space": "pixel", "size": side, "model": f"{model.partition('/')[0]}/{patch}"}
    if channels == 3:
        if vae:
            raise InputError(f"--vae: {file} is a model of pixels; leave it out")
        return config, weights
    if vae is None:
        raise InputError(f"--ckpt {file}: a model of {channels}-channel latents; --vae FILE names the SD-VAE's weights")
    autoencoder, info = vae
    if autoencoder.latent_channels != channels:
        raise InputError(f"--vae: latents of {autoencoder.latent_channels} channels, {file} takes {channels}")
    config |= {"space": "latent", "size": side * autoencoder.factor, "latent_shape": [channels, side, side]}
    return config | {"scale": SD_SCALE, "autoencoder": info["weights"]}, weights


def published_weights(file, ema=True):
    """The state dict in a published checkpoint, the average of the weights or with ema=False the weights themselves."""
    state = train_vae.strip_prefixes(train_vae.load_plain(file))
    if {"config", "model", "ema", "step"} <= state.keys():
        raise InputError(f"--ckpt {file}: a checkpoint of train_diffusion.py; give it without --ckpt and --model")
    parts = [part for part in ("ema", "state_dict", "model") if isinstance(state.get(part), dict)]
    if not ema and not {"ema", "model"} <= set(parts):
        raise InputError(f"--no-ema: {file} holds one set of weights; leave it out")
    return train_vae.strip_prefixes(state[parts[0] if ema else "model"]) if parts else state


def open_model(args, device):
    """-> (config, weights, step, the frozen VAE or None) of a run, or of published weights. Raises InputError."""
    if bool(args.run) == bool(args.ckpt):
        raise InputError("name a run folder of train_diffusion.py, or published weights by --ckpt FILE --model NAME")
    if args.ckpt:
        if not args.model:
            raise InputError(f"--ckpt {args.ckpt}: --model NAME says which network it is of, such as dit-xl/2")
        vae = train_vae.load_autoencoder(args.vae, device) if args.vae else None
        config, weights = published_network(args.ckpt, args.model, vae, ema=not args.no_ema)
        if vae and vae[0].factor != 8 and int(os.environ.get("RANK", 0)) == 0:
            print(f"note: --vae {args.vae} has {vae[0].factor} pixels a latent pixel; published models are of 8")
        return config, weights, 0, vae and vae[0]
    if args.model:
        raise InputError(f"--model {args.model}: is for --ckpt; {args.run} says itself what it is")
    checkpoint, vae = train_vae.read_checkpoint(args.run), None
    config = checkpoint["config"]
    if config["space"] == "latent":
        path = args.vae or run_folder(args.run) / "autoencoder.pt"
        vae, _ = open_autoencoder(path, device, config["autoencoder"], args.run)
    elif args.vae:
        raise InputError(f"--vae {args.vae}: {args.run} works on {config['space']}, without an autoencoder")
    return config, checkpoint["model" if args.no_ema else "ema"], checkpoint["step"], vae


# ---- files and scores -----------------------------------------------------------------------------------------------

FLOOR_LEAST = 512  # images that a reference needs for a floor


def generate_by(protocol, diffusion, indices, trace=None):
    """Images number `indices` by a protocol, its classes dealt in turn -> (n, 3, S, S) in [-1, 1]."""
    classes, sampler = protocol["classes"], SAMPLERS[diffusion.config["path"]][protocol["sampler"]]
    y = torch.tensor([classes[i % len(classes)] for i in indices], device=diffusion.device) if classes else None
    settings = protocol["steps"], protocol["guidance"], protocol["guidance_interval"]
    return generate(diffusion, indices, protocol["seed"], diffusion.device, y, sampler, *settings, trace)


def sample_files(diffusion, protocol, folder, n, batch=64, rank=0, world=1):
    """Write images 0..n-1 as folder/000000.png ..., this process's share of those not there yet -> the n files. Process
    0 returns when all are there. Raises InputError where the folder holds anything else.
    """
    open_folder(folder, protocol, rank)
    files = [folder / f"{i:06d}.png" for i in range(n)]
    missing = [i for i in range(n) if not files[i].exists()]
    todo = [i for i in missing if i % world == rank]
    hide = rank > 0 or not missing
    with progress(desc="sample", unit="img", total=n, initial=n - len(missing), disable=hide) as bar:
        for k in range(0, len(todo), batch):
            indices = todo[k : k + batch]
            images = train_vae.to_uint8(generate_by(protocol, diffusion, indices))
            for i, pixels in zip(indices, images.permute(0, 2, 3, 1).cpu().numpy()):
                train_vae.write_atomically(files[i], partial(Image.fromarray(pixels).save, format="PNG"), sync=False)
            bar.update(min(len(indices) * world, n - bar.n))
        while rank == 0 and not all(file.exists() for file in files):  # the other processes' share; no collective
            time.sleep(0.2)
    return files


def open_folder(folder, protocol, rank):
    """Make a folder for images of a protocol, or see that those in it were made by the same. Raises InputError."""
    record = folder / "protocol.json"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if record.exists():
        old = json.loads(record.read_text())
        changed = [f"{key} {old[key]} there, {new} now" for key, new in protocol.items() if old.get(key, new) != new]
        if changed:
            raise InputError(f"--out {folder} holds images made otherwise ({'; '.join(changed)}); name another folder")
    elif rank > 0:
        while not record.exists():  # rank 0 looks at the folder first
            time.sleep(0.05)
    elif any(folder.iterdir()):
        raise InputError(f"--out {folder} holds other files and no protocol.json of sampling; name another folder")
    else:
        train_vae.write_atomically(record, lambda file: file.write(json.dumps(protocol, indent=1).encode()))


def collect(files, grid, npz=None, cells=None):
    """Write the first `cells` images of PNG files (all by default) as a grid, and all of them as one array."""
    pixels = np.stack([np.asarray(Image.open(file)) for file in (files if npz else files[:cells])])  # (n, S, S, 3)
    images = torch.from_numpy(pixels[:cells]).permute(0, 3, 1, 2) / 127.5 - 1
    print(f"grid {save_grid(images, grid, math.ceil(math.sqrt(len(images))))}")
    if npz:
        train_vae.write_atomically(npz, lambda file: np.savez(file, pixels))
        print(f"{pixels.shape} uint8 in {npz}")


def open_reference(spec, size):
    """The images of `--score SPEC`. Raises InputError where they are smaller than what they are compared with."""
    reference = Images(spec, size)
    for i in range(0, len(reference), math.ceil(len(reference) / 16)):
        with reference.open(reference.readable(i)[0]) as image:
            if min(image.size) < size:
                sizes = f"{image.width}x{image.height} pixels ({reference.names[i]}) against a model of {size}"
                remedy = "enlarged images are no reference; give one at least as large"
                raise InputError(f"--score {spec}: {sizes}: {remedy}")
    return reference


def extract(images, features, device, batch):
    """The features (n, D) of the readable images of a data set."""
    parts, loader = [], DataLoader(images, batch, num_workers=min(4, os.cpu_count() or 1))
    with torch.no_grad(), progress(desc="features", unit="img", total=len(images)) as bar:
        for _, pixels, readable in loader:
            parts.append(features(pixels[readable].to(device)).float().cpu())
            bar.update(len(readable))
    return torch.cat(parts)


def score(files, reference, features, settings, device="cpu", batch=64):
    """Frechet distance (FID, with Inception's features) of PNG files to the reference, and as its floor that between
    random halves of the reference, by torch-fidelity; printed, and saved in scores.jsonl beside the folder, with its
    settings. Raises InputError where the sizes do not match.
    """
    size, folder = reference.size, files[0].parent
    for file in files:
        with Image.open(file) as image:
            if image.size != (size, size):
                raise InputError(f"{file}: {image.width}x{image.height} pixels, not the model's {size}")
    samples = Subset(Images(str(folder), size), range(len(files)))
    ours, theirs = (extract(images, features, device, batch) for images in (samples, reference))
    reference.check_unreadable(len(reference) - len(theirs))
    result = {"frechet_distance": frechet_distance(ours, theirs)}
    if len(theirs) >= FLOOR_LEAST:
        half, order = len(theirs) // 2, torch.randperm(len(theirs), generator=generator(0, 6))
        result["floor"] = frechet_distance(*(theirs[part] for part in order.split(half)[:2]))
        result["floor_images"] = half
    result |= {"images": len(ours), "reference": reference.spec, "reference_images": len(theirs), "format": "PNG"}
    result |= {"crop": train_vae.crop_text(size), "folder": folder.name, **settings}
    train_vae.record_score(folder.parent, result)


# ---- command line ---------------------------------------------------------------------------------------------------


def ends_in(suffix, text):
    """With its suffix filled in, an argparse type: the name of a file to write."""
    if Path(text).is_dir() or Path(text).suffix != suffix:
        raise argparse.ArgumentTypeError(f"{text!r} must be a file that ends in {suffix}")
    return text


def parse_classes(chosen, classes):
    """`--classes` names or numbers -> indices; image i takes entry i modulo their count. None: all, in turn."""
    if classes is None and chosen:
        raise InputError(f"--classes {' '.join(chosen)}: this model was trained without classes")
    indices = []
    for name in chosen or classes or ():
        index = classes.index(name) if name in classes else int(name) if name.isdigit() else -1
        if not 0 <= index < len(classes):
            names = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise InputError(f"--classes {name}: not one of the {len(classes)} classes 0..{len(classes) - 1} ({names})")
        indices.append(index)
    return indices or None


def make_protocol(args, config, weights, step, dtype):
    """What the images follow from, plain values. Raises InputError where settings do not fit the model."""
    samplers, classes = list(SAMPLERS[config["path"]]), parse_classes(args.classes, config["classes"])
    sampler = args.sampler or samplers[0]
    if sampler not in samplers:
        takes = f"{config['path']} path, which takes {', '.join(samplers)}"
        raise InputError(f"--sampler {sampler}: not for this model's {takes}")
    if config["classes"] is None and args.guidance != 1:
        raise InputError(f"--guidance {args.guidance}: this model was trained without classes, nothing can guide it")
    if args.guidance != 1 and not config["label_dropout"]:
        raise InputError(f"--guidance {args.guidance}: trained with --label-dropout 0, this model knows no null class")
    protocol = {"weights": train_vae.fingerprint(weights), "checkpoint_step": step, "ema": not args.no_ema}
    protocol |= {"sampler": sampler, "steps": args.steps, "guidance": args.guidance}
    protocol |= {"guidance_interval": args.guidance_interval, "seed": args.seed}
    protocol |= {"amp": str(dtype or torch.float32).removeprefix("torch."), "classes": classes}
    return protocol | ({"autoencoder": config["autoencoder"]} if config["space"] == "latent" else {})


def folder_name(protocol, model, chosen):
    """The settings in a word; `chosen` says whether the classes were."""
    name = f"{model}-{protocol['sampler']}{protocol['steps']}-g{protocol['guidance']:g}-seed{protocol['seed']}"
    if protocol["guidance_interval"] != [0, 1]:
        name += "-t{:g}-{:g}".format(*protocol["guidance_interval"])
    if chosen:
        name += f"-classes{'-'.join(map(str, protocol['classes']))[:40]}"
    return name if protocol["ema"] else f"{name}-no-ema"


def main(args):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for file in filter(None, (args.npz, args.grid)):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
    device = train_vae.choose_device(args.device)
    config, weights, step, vae = open_model(args, device)
    amp, dtype = train_vae.autocast(args.amp, device)
    protocol = make_protocol(args, config, weights, step, dtype)
    diffusion = Diffusion(config, vae=vae, amp=amp)
    train_vae.load_weights(diffusion.network, weights, args.run or args.ckpt)
    diffusion.network.to(device).eval()
    name = folder_name(protocol, Path(args.ckpt).stem if args.ckpt else f"step{step}", args.classes)
    folder = Path(args.out) if args.out else run_folder(args.run or args.ckpt) / "samples" / name
    if args.trajectory:
        if rank == 0:
            trajectory(diffusion, protocol, folder)
        return
    if args.score and rank == 0:  # whatever is wrong with these shows before an hour of sampling
        reference = open_reference(args.score, config["size"])
        features = train_vae.open_features(args.features, args.features_weights, config["size"], device)
    files = sample_files(diffusion, protocol, folder, args.n, args.batch, rank, world)
    if rank > 0:
        return
    print(f"{args.n} images in {folder}")
    collect(files, args.grid or f"{folder}.png", args.npz, None if args.grid else 64)
    if args.score:
        settings = {"features": args.features, "features_weights": args.features_weights} | protocol
        score(files, reference, features, settings, device, args.batch)


def parse(argv=None):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN_OR_CKPT", nargs="?", help="run folder of train_diffusion.py, or a checkpoint file")
    add("--ckpt", metavar="FILE", help="instead of RUN_OR_CKPT: published weights of a DiT, SiT or U-ViT")
    add("--model", metavar="NAME", help="their network: dit-xl/2, sit-xl/2, uvit-h/2, ...")
    text = "the autoencoder: SD-VAE weights in their original layout for --ckpt; for a run, where its own is elsewhere"
    add("--vae", metavar="RUN_OR_FILE", help=f"{text} (default: RUN/autoencoder.pt)")
    # -n as well: on Python 3.11, torchrun takes --n for an abbreviation of its own flags
    add("-n", "--n", type=at_least(1), default=64, help="images")
    add("--out", metavar="DIR", help="folder of the PNG files (default: in RUN/samples/, named after the settings)")
    npz, png = partial(ends_in, ".npz"), partial(ends_in, ".png")
    add("--npz", metavar="FILE", type=npz, help="one uint8 array (n, S, S, 3) as well, the ADM evaluation format")
    add("--grid", metavar="FILE", type=png, help="the grid, of all n images (default: beside --out, the first 64)")
    add("--batch", type=at_least(1), default=64, help="images at a time, in each process")
    add("--seed", type=at_least(0), default=0, help="image i depends on (seed, i) alone")
    text = "; ".join(f"{path}: {', '.join(SAMPLERS[path])}" for path in ("vp", "flow"))
    add("--sampler", help=f"{text}, some leave noise, as published: README (default: the first)")
    add("--steps", type=at_least(1), default=50, help="sampler steps")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance scale, 1 for none")
    text = "t between which guidance acts (default: 0 1)"
    add("--guidance-interval", type=float, nargs=2, default=[0.0, 1.0], metavar=("A", "B"), help=text)
    add("--classes", nargs="+", help="names or numbers, dealt in turn (default: all)")
    add("--no-ema", action="store_true", help="sample the raw weights instead of their average")
    add("--score", metavar="SPEC", help="Frechet distance to this data, given as train_diffusion.py's --data")
    add("--features", default="inception", help="inception, hog or a torch.hub REPO:ENTRY")
    add("--features-weights", metavar="FILE", help="local Inception weights (default: downloaded by torch-fidelity)")
    add("--trajectory", action="store_true", help="only show one sampling run, band by band")
    train_vae.add_device_flags(add)
    return parser.complete(argv)


if __name__ == "__main__":
    run_program(main, parse)
