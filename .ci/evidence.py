"""Repeats the runs behind assets/evidence.md, a row of claims at a time.

    python .ci/evidence.py matched --jobs 2       # run what is missing of a row, two commands side by side
    python .ci/evidence.py matched --list         # its commands, to type them oneself
    python .ci/evidence.py --write                # tables and figures of evidence.md, from assets/evidence.json

Commands run in the current folder, in which cifar10-train.zip, cifar10-test.zip, scenes64-train.zip, scenes64-val.zip,
kodak.zip and ENCODER, a folder with hubconf.py, have to lie. One that ended well is noted with its scores in --store
and not typed again; one that was interrupted goes on where it stopped. autoregression reads the runs of spaces,
alignment the latents of matched.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the programs
STORE, TEXT = ROOT / "assets" / "evidence.json", ROOT / "assets" / "evidence.md"
RESNET = "ENCODER:cifar10_resnet"
ME = "python .ci/evidence.py"


# ---- the rows: stages of chains of commands ---------------------------------------------------------------
# The chains of a stage may run side by side, the commands of a chain in turn.


def scored(run, n, reference, steps=20, more="", features=(RESNET, "hog")):
    """The commands that sample a run and score it."""
    sampling = f"python sample.py {run} --n {n} --batch 100 --steps {steps}{more} --score {reference}"
    return [f"{sampling} --features {spec}" for spec in features]


SETS = ("photographs", "whitened", "reversed", "noise")


def bias():
    def chain(name, seed):
        run = f"runs/bias-{name}-{seed}"
        space = "--size 16 --space pixel --model dit-nano/4 --t-sampling uniform --lr-decay none"
        train = f"python train_diffusion.py --data spectra/{name} {space} --seed {seed} --workers 1 --out {run}"
        return [f"{train} --steps 100 --eval-every 10", f"{train} --steps 500 --eval-every 50"]

    return [[[f"{ME} --measure spectra"]], [chain(name, seed) for seed in (0, 1) for name in SETS]]


AUTOENCODERS = {name: f"--regularizer {name}" for name in ("none", "kl", "esm", "dsm", "eq", "se")}
AUTOENCODERS["esm-dsm"] = "--regularizer esm+dsm"
DELTAS = {f"esm-{delta}": f"--regularizer esm --esm-delta {delta}" for delta in (0, 0.5, 1.5)}  # esm has 1
ALL = AUTOENCODERS | DELTAS


def matched():
    def autoencoder(name):
        train = "python train_vae.py --data scenes64-train.zip --val scenes64-val.zip --steps 600 --eval-images 300"
        encode = f"python train_vae.py --encode scenes64-train.zip --ckpt runs/{name} --workers 1 --out {name}.latents"
        return [f"{train} {ALL[name]} --workers 1 --out runs/{name}", encode]

    def diffusion(name, seed, patch=4, steps=1000):
        run = f"runs/{name}-p{patch}-{seed}"
        train = f"python train_diffusion.py --latents {name}.latents --model dit-nano/{patch} --steps {steps}"
        return [f"{train} --seed {seed} --workers 1 --out {run}", *scored(run, 2000, "scenes64-train.zip")]

    runs = " ".join(f"runs/{name}" for name in ALL)
    spectrum = f"python train_vae.py --spectrum {runs} --data scenes64-val.zip --features {RESNET} --out runs/spectra"
    chains, pairs = [diffusion("kl", 0, patch=2, steps=400)], [(name, seed) for seed in (0, 1) for name in ALL]
    chains += [diffusion(name, seed) for name, seed in pairs]
    apart = (
        "python sample.py --score-folder runs/{0}-p4-{1}/samples/step1000-euler20-g1-seed0 --score reconstructions/{0}"
    )
    apart = [[f"{apart.format(*pair)} --features {spec}" for spec in (RESNET, "hog")] for pair in pairs]
    measuring = [[spectrum], [f"{ME} --measure reconstructions"]]
    return [[autoencoder(name) for name in ALL], [*measuring, *chains], [*apart, [f"{ME} --measure sheet"]]]


def laws():
    return [[[f"{ME} --measure laws"]]]


METHODS = {"dct": "", "dct-4": "--block 4", "dct-8": "--block 8"}
METHODS |= {name: f"--method {name}" for name in ("bicubic", "lanczos", "nearest")}


def upsampling():
    def chain(data, name):
        up = f"python dct.py upsample upsampling/{data} upsampling/{data}-{name} {METHODS[name]}".rstrip()
        score = f"python sample.py --score-folder upsampling/{data}-{name} --score {data}.zip --features"
        return [up] + ([f"{score} {RESNET}", f"{score} hog"] if data == "scenes64-val" else [])

    doubled = [chain(data, name) for data in ("kodak", "scenes64-val") for name in METHODS]
    return [[[f"{ME} --measure halved"]], doubled, [[f"{ME} --measure upsampled"]]]


def codec():
    return [[[f"{ME} --measure codec"]]]


NETWORKS = ("dit-nano", "uvit-nano")
SPACES = {  # 16 tokens each, of 8 x 8 pixels
    "dct": "--data cifar10-train.zip --space dct --model {}",
    "pixel": "--data cifar10-train.zip --space pixel --model {}/8",
    "latent": "--latents kl32.latents --model {}/2",
}


def on_cifar10(run, flags, seed, snapshots=(1000,)):
    """A run on CIFAR-10 with classes, 64,000 images, scored at `snapshots`."""
    states = [f"{run}/checkpoint-{step:07d}.pt" if step < 1000 else run for step in snapshots]
    marks = " --snapshot-every 250" * (len(snapshots) > 1)
    train = f"python train_diffusion.py {flags} --steps 1000{marks} --seed {seed} --workers 1 --out {run}"
    return [train, *(line for state in states for line in scored(state, 2000, "cifar10-test.zip"))]


def spaces():
    def chain(space, network, seed):
        run = f"runs/spaces-{space}-{network}-{seed}"
        return on_cifar10(run, SPACES[space].format(network), seed, (250, 500, 1000))

    train = "python train_vae.py --data cifar10-train.zip --val cifar10-test.zip --size 32 --steps 1300 --batch 32"
    autoencoder = [
        f"{train} --eval-every 2000 --regularizer kl --workers 1 --out runs/kl32",
        "python train_vae.py --encode cifar10-train.zip --ckpt runs/kl32 --workers 1 --out kl32.latents",
        f"python train_vae.py --spectrum runs/kl32 --data cifar10-test.zip --features {RESNET} --out runs/spectrum32",
    ]
    runs = [(space, network, seed) for seed in SEEDS["spaces"] for network in NETWORKS for space in SPACES]
    first, last = ([chain(*run) for run in runs if (run[0] == "latent") == late] for late in (False, True))
    models = [SPACES[space].format(network) for network in NETWORKS for space in SPACES]
    alone = [f"python train_diffusion.py {model} --seed {k} --benchmark 60" for k in range(3) for model in models]
    return [[autoencoder, *first], last, [alone], [[f"{ME} --measure spaces-samples"]]]


CHANGES = {"ebfr": "--ebfr", "naive": "--scaling naive"} | {f"c{c}": f"--snr-scale {c}" for c in (1, 2, 4)}
CHANGES |= {f"keep{keep}": f"--keep {keep}" for keep in (4, 6, 12, 16)}


def design():
    dct = SPACES["dct"].format("dit-nano")
    chain = lambda name, seed: on_cifar10(f"runs/design-{name}-{seed}", f"{dct} {CHANGES[name]}", seed)
    return [[chain(name, seed) for seed in SEEDS["design"] for name in CHANGES]]


def autoregression():
    runs = [f"runs/spaces-{space}-dit-nano-{seed}" for seed in (0, 1) for space in ("dct", "pixel")]
    return [[[f"python sample.py {run} --trajectory --steps 100 --seed {k}" for k in range(4)] for run in runs]]


ALIGNMENTS = {"none": "", "repa": "--repa repa", "irepa": "--repa irepa"}
ALIGNMENTS |= {f"dog-{a}-{b}": f"--repa dog --repa-sigmas {a} {b}" for a, b in ((0, 2), (0.6, 2), (1, 4), (0, "inf"))}


def alignment():
    def chain(name, seed):
        run, more = f"runs/align-{name}-{seed}", ALIGNMENTS[name]
        more = more and f" {more} --repa-weight 0.5 --encoder {RESNET} --cache-targets resnet.tokens"
        train = "python train_diffusion.py --data scenes64-train.zip --latents esm.latents --steps 400"
        return [f"{train}{more} --seed {seed} --workers 1 --out {run}", *scored(run, 1000, "scenes64-train.zip")]

    first, *others = [chain(name, seed) for seed in SEEDS["alignment"] for name in ALIGNMENTS][1:]
    return [[first, chain("none", 0)], others]  # the first one makes the targets that the others read


def picture():
    run = "runs/cifar10"
    train = f"python train_diffusion.py --data cifar10-train.zip --model dit-tiny --steps 14000 --out {run}"
    return [[[train, *scored(run, 2000, "cifar10-test.zip", steps=40, more=" --guidance 1.5")]]]


ROWS = {"bias": bias, "laws": laws, "matched": matched, "spaces": spaces, "design": design}
ROWS |= {"autoregression": autoregression, "alignment": alignment, "upsampling": upsampling, "codec": codec}
ROWS |= {"picture": picture}
SEEDS = {"spaces": (0, 1), "design": (0, 1), "alignment": (0, 1, 2)}


# ---- measures that no program has -------------------------------------------------------------------------


def tensors(spec, size, count=None):
    """Images of a data set as uint8 (n, 3, size, size)."""
    import torch

    from train_vae import Images

    images = Images(spec, size)
    chosen = np.linspace(0, len(images) - 1, min(count or len(images), len(images))).astype(int)
    return torch.stack([torch.as_tensor(images.read(int(i))) for i in chosen])


def spectra(count=10_000, std=0.25):
    """Photographs, whitened, of a reversed spectrum, and noise, all of one variance, as folders of PNG files."""
    import torch
    from PIL import Image

    from dct import dct2, idct2

    x = tensors("cifar10-train.zip", 16, count).double() / 127.5 - 1
    x = dct2(x - x.mean())
    power = x.square().mean((0, 1))  # (16, 16)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    made = {"photographs": x, "whitened": x * power.rsqrt(), "reversed": x * (power.flip(0, 1) / power).sqrt()}
    clipped = {}
    for name, fields in (made | {"noise": noise}).items():
        fields = idct2(fields)
        fields *= std / fields.std()
        clipped[name] = (fields.abs() > 1).double().mean().item()
        folder = Path("spectra", name)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = ((fields + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(folder / f"{i:05d}.png")
    return {"std": std, "share_of_values_clipped": clipped}


def exponent_by_fourier(x):
    """alpha by other means: least squares through log power of numpy's FFT of windowed images over log frequency, each
    whole frequency from 2 to half the side once.
    """
    side = x.shape[-1]
    window = np.outer(np.hanning(side), np.hanning(side))
    x = x - x.mean((2, 3), keepdims=True)
    power = (np.abs(np.fft.fft2(x * window)) ** 2).mean((0, 1))
    f = np.fft.fftfreq(side, 1 / side)
    radius = np.hypot(f[:, None], f).round().astype(int)
    rings = np.arange(2, side // 2)  # the window smears 0 into 1
    rows = [power[radius == r].mean() for r in rings]
    return -np.polyfit(np.log(rings), np.log(rows), 1)[0]


LAWS = {
    "CIFAR-10, 32 px": ("cifar10-train.zip", 32),
    "scenes64, 64 px": ("scenes64-train.zip", 64),
    "Kodak, 256 px": ("kodak.zip", 256),
    "dead leaves, 64 px": ("dead-leaves", 64),
    "dead-leaves:full, 64 px": ("dead-leaves:full", 64),
}


def exponents():
    """alpha of the data sets (of 1,000 images at most) by this code and by other means."""
    from spectral_losses import power_law_exponent

    found = {}
    for name, (spec, size) in LAWS.items():
        x = tensors(spec, size, 1000).float() / 127.5 - 1
        found[name] = {
            "alpha": power_law_exponent(x).item(),
            "alpha_by_fourier": exponent_by_fourier(x.double().numpy()),
        }
        found[name]["images"] = len(x)
    return found


def halved():
    """Photographs halved by averaging 2 x 2 pixels, to 8 bits, as folders of PNG files."""
    from PIL import Image

    counts = {}
    for data in ("kodak", "scenes64-val"):
        for name, pixels in pictures(f"{data}.zip"):
            h, w = (side // 2 * 2 for side in pixels.shape[:2])
            half = pixels[:h, :w].astype(float).reshape(h // 2, 2, w // 2, 2, 3).mean((1, 3)).round()
            file = Path("upsampling", data, name).with_suffix(".png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(half.astype(np.uint8)).save(file)
            counts[data] = counts.get(data, 0) + 1
    return counts


def pictures(archive):
    """(name, pixels (H, W, 3) uint8) of the pictures in a .zip."""
    import io
    import zipfile

    from PIL import Image

    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            if name.lower().endswith((".png", ".jpg", ".jpeg")):
                yield name, np.asarray(Image.open(io.BytesIO(opened.read(name))).convert("RGB"))


def upsampled():
    """PSNR and SSIM of doubled pictures, and their gradient energy over the originals'."""
    import torch
    from PIL import Image

    from vae import psnr, ssim

    found = {data: {name: [] for name in METHODS} for data in ("kodak", "scenes64-val")}
    for data, by_method in found.items():
        for name, original in pictures(f"{data}.zip"):
            for method, values in by_method.items():
                made = np.asarray(Image.open(Path("upsampling", f"{data}-{method}", name).with_suffix(".png")))
                pair = [torch.tensor(pixels).movedim(-1, 0)[None].float() for pixels in (original, made)]
                slopes = [sum(x.diff(dim=axis).square().mean().item() for axis in (2, 3)) for x in pair]
                values.append([psnr(*pair).item(), ssim(*pair).item(), slopes[1] / max(slopes[0], 1e-9)])
    mean = lambda values: dict(zip(("psnr", "ssim", "gradients"), np.mean(values, 0).tolist()), images=len(values))
    return {data: {name: mean(values) for name, values in rows.items()} for data, rows in found.items()}


def reconstructions(count=2000):
    """Training images as every autoencoder decodes the mean of their latents, as folders of PNG files."""
    import torch
    from PIL import Image

    from train_vae import open_trained, to_uint8

    pixels, device = tensors("scenes64-train.zip", 64, count), torch.device("cpu")
    for name in ALL:
        vae, *_ = open_trained(f"runs/{name}", 64, device, "--ckpt")
        folder = Path("reconstructions", name)
        folder.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            parts = [to_uint8(vae.decode(vae.encode(part / 127.5 - 1)[0]).clamp(-1, 1)) for part in pixels.split(50)]
        for i, image in enumerate(torch.cat(parts).permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(folder / f"{i:05d}.png")
    return {"images": count}


def sheet(name, runs, size, columns):
    """The first samples of runs, a row of pictures each, as runs/NAME.png."""
    from PIL import Image

    made = Image.new("RGB", ((size + 2) * columns, (size + 2) * len(runs)))
    for row, run in enumerate(runs):
        files = sorted(Path(run, "samples/step1000-euler20-g1-seed0").glob("*.png"))
        for column, file in enumerate(files[:columns]):
            made.paste(Image.open(file), ((size + 2) * column + 1, (size + 2) * row + 1))
    made.save(f"runs/{name}.png")
    return {"images": columns * len(runs)}


def matched_samples():
    return sheet("matched-samples", [f"runs/{name}-p4-0" for name in AUTOENCODERS], 64, 8)


def spaces_samples():
    runs = [f"runs/spaces-{space}-{network}-0" for network in NETWORKS for space in SPACES]
    return sheet("spaces-samples", runs, 32, 20)


KEEPS = {2: (1, 2, 3, 4), 4: (1, 2, 4, 6, 9, 12, 16), 8: (1, 4, 9, 18, 27, 36, 64)}


def codecs(size=64):
    """PSNR, Frechet distance and bits per pixel by coefficients kept, of images and of photographs cut into tiles."""
    import torch

    from dct import DCTCodec, DCTStatistics
    from sample import frechet_distance
    from train_vae import Features, to_uint8

    tiles = np.concatenate(
        [
            pixels.reshape(pixels.shape[0] // size, size, pixels.shape[1] // size, size, 3)
            .swapaxes(1, 2)
            .reshape(-1, size, size, 3)
            for _, pixels in pictures("kodak.zip")
        ]
    )
    sets = {"kodak": torch.from_numpy(tiles).permute(0, 3, 1, 2), "scenes64-val": tensors("scenes64-val.zip", size)}
    features, found = Features(RESNET, None, size, torch.device("cpu")), {}
    for data, pixels in sets.items():
        x, original = pixels / 127.5 - 1, torch.cat([features(part) for part in pixels.split(100)])
        for block, keeps in KEEPS.items():
            statistics = DCTStatistics(block)
            for part in x.split(100):
                statistics.update(part)
            bits = statistics.entropies()[[0, 0, 0, 0, 1, 2]]  # of a step of eta / 50, (6, B*B)
            for keep in keeps:
                coder = DCTCodec(size, block, keep, 256.0 * block)
                coded = torch.cat([to_uint8(coder.decode(coder.encode(part))) for part in x.split(100)])
                mse = (coded.float() - pixels).square().mean().item()
                made = torch.cat([features(part) for part in coded.split(100)])
                values = {"psnr": 10 * np.log10(255**2 / mse), "frechet_distance": frechet_distance(original, made)}
                values["bits_per_pixel"] = bits[:, :keep].sum().item() / (4 * block**2)
                found.setdefault(data, {}).setdefault(str(block), {})[str(keep)] = values
        found[data]["images"] = len(pixels)
    return found


MEASURES = {"spectra": spectra, "laws": exponents, "reconstructions": reconstructions, "halved": halved}
MEASURES |= {"upsampled": upsampled, "codec": codecs, "sheet": matched_samples}
MEASURES["spaces-samples"] = spaces_samples


# ---- running and noting -----------------------------------------------------------------------------------

SCORES = "frechet_distance floor floor_images kid kid_std kid_subset_size precision recall images reference_images"
SPECTRAL = """
    psnr ssim rfid kl_of_mean_spectra mean_of_kls_per_image upper_share latent_alpha target_alpha latent_std
    latent_effective_channels latent_rmsc made_artefacts lowpass_psnr_8 lowpass_psnr_10 lowpass_psnr_12 images
"""


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def some(values, names):
    return {name: values[name] for name in names.split() if name in values}


def note(command, printed=""):
    """What a command that has ended leaves on the disk, or has printed: steps, images, scores."""
    words = shlex.split(command)
    given = lambda flag, otherwise=None: words[words.index(flag) + 1] if flag in words else otherwise
    if "--measure" in words:
        return {"scores": json.loads(Path("runs", f"{given('--measure')}.json").read_text())}
    if words[1] == "sample.py" and "--trajectory" not in words:
        folder, features, run = given("--score-folder"), given("--features"), Path(words[2])
        run = run.parent if run.suffix == ".pt" else run
        found = lines((Path(folder).parent if folder else run / "samples") / "scores.jsonl")
        ours = lambda line: line["folder"] == folder if folder else "checkpoint_step" in line
        found = [line for line in found if line["features"] == features and ours(line)]
        artefacts = re.findall(r"patch artefacts, period (\d+): ([\d.]+)", printed)
        artefacts = {"patch_artefacts": {period: float(value) for period, value in artefacts}} if artefacts else {}
        return {"scores": some(found[-1], SCORES) | artefacts | {"features": features}}
    if "--spectrum" in words:
        found = json.loads(Path(given("--out"), "spectrum.json").read_text())
        scores = {name: some(result, SPECTRAL) for name, result in found.items()}
        for name, result in found.items():
            for scale in ("raw", "unit_std"):
                shares = {key: [round(v, 6) for v in result[scale][key]] for key in ("target_shares", "latent_shares")}
                scores[name][scale] = some(result[scale], SPECTRAL) | shares
        return {"scores": scores}
    if words[1] == "dct.py" or "--encode" in words:
        return {}
    if "--benchmark" in words:
        return {"scores": {"images_per_s": float(re.search(r"training +([\d.]+) images/s", printed)[1])}}
    if "--trajectory" in words:
        (file,) = Path(words[2], "samples").glob(f"*-seed{given('--seed')}-trajectory.json")
        return {"scores": some(json.loads(file.read_text()), "snr_below_1_at half_recovered_at")}
    logged = lines(Path(given("--out"), "metrics.jsonl"))
    training, evaluations = ([line for line in logged if ("lr" in line) == flag] for flag in (True, False))
    entry = {"seed": int(given("--seed", 0)), "steps": training[-1]["step"], "images": training[-1]["images"]}
    loss = {"loss": training[-1]["loss"]}
    if words[1] == "train_vae.py":
        return entry | {"scores": loss | some(evaluations[-1]["evaluation"], SPECTRAL)}
    errors = {str(line["step"]): line["x0_error_by_band"] for line in evaluations if "x0_error_by_band" in line}
    rounded = lambda row: [value and round(value, 4) for value in row]
    errors = {step: {t: rounded(row) for t, row in by_t.items()} for step, by_t in errors.items()}
    if errors and "bias" not in given("--out"):
        errors = errors[str(entry["steps"])]
    return entry | {"scores": loss | {"x0_error_by_band": errors}}


def machine(cores, jobs):
    import torch

    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text()).group(1) if info.exists() else "a CPU"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} cores of {name}"
    return f"{device}, torch {torch.__version__}, {jobs} command{'s' * (jobs > 1)} at a time"


class Store:
    """What was run: {"runs": {row: [entry]}}; assets/evidence.json has machines and earlier experiments besides."""

    def __init__(self, file=STORE):
        self.file, self.lock = file, threading.Lock()
        self.content = json.loads(file.read_text()) if file.exists() else {}
        self.runs = self.content.setdefault("runs", {})

    def entry(self, row, command):
        return next((entry for entry in self.runs.get(row, []) if entry["command"] == command), None)

    def scores(self, row, command):
        return (self.entry(row, command) or {}).get("scores")

    def add(self, row, entry):
        with self.lock:
            self.runs.setdefault(row, []).append(entry)
            self.save()

    def save(self):
        text = json.dumps(self.content, indent=1, ensure_ascii=False)
        one_line = lambda found: f"[{' '.join(found[1].split())}]"
        text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", one_line, text)  # a list a line
        self.file.with_suffix(".tmp").write_text(text + "\n")
        self.file.with_suffix(".tmp").replace(self.file)


def run_row(row, jobs, store):
    """Run what is missing, `jobs` chains at a time, each on its share of the cores. Ends the program at a failure."""
    from train_vae import cores

    name, failed = machine(cores(), jobs), []
    env = dict(os.environ, OMP_NUM_THREADS=str(max(1, cores() // jobs)))
    Path("runs").mkdir(exist_ok=True)

    def run(chain):
        for command in chain:
            if store.entry(row, command) or failed:
                continue
            start, words = time.time(), shlex.split(command)
            words = [sys.executable, str(ROOT / words[1]), *words[2:]]
            done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            with open(f"runs/{row}.log", "a") as log:
                log.write(f"$ {command}\n{done.stdout}")
            if done.returncode:
                failed.append(command)
                continue
            entry = {"command": command, "minutes": round((time.time() - start) / 60, 2), "machine": name}
            store.add(row, entry | note(command, done.stdout))
            print(f"{entry['minutes']:7.1f} min  {command}", flush=True)

    for stage in ROWS[row]():
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, stage))
        if failed:
            sys.exit(f"failed, see runs/{row}.log: {failed[0]}")


# ---- tables and figures -----------------------------------------------------------------------------------


def markdown(head, rows):
    text = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in text)


def several(values, form):
    return ", ".join(format(value, form) for value in values) or "-"


def command_of(row, *parts):
    """The command of a row that has all these parts."""
    found = [command for stage in ROWS[row]() for chain in stage for command in chain]
    return next(command for command in found if all(part in command for part in parts))


def half_way(errors, band, t="0.1"):
    """The step (interpolated) by which a band's error has come half of its way down, from 1 to the last one."""
    steps = sorted(map(int, errors))
    values = [errors[str(step)][t][band] for step in steps]
    level = (1 + values[-1]) / 2
    below = next((k for k, value in enumerate(values) if value <= level), None)
    if below is None or values[-1] > 0.95:
        return None
    before = (0, 1.0) if below == 0 else (steps[below - 1], values[below - 1])
    return float(np.interp(level, [values[below], before[1]], [steps[below], before[0]]))


BANDS = (0, 1, 2, 4, 8, 12, 15)


def bias_errors(store, name, seed):
    return (store.scores("bias", command_of("bias", f"bias-{name}-{seed} --steps 500")) or {}).get("x0_error_by_band")


def bias_table(store):
    rows = []
    for name in SETS:
        found = [errors for seed in (0, 1) if (errors := bias_errors(store, name, seed))]
        halves = [[half_way(errors, band) for errors in found] for band in BANDS]
        rows.append([name, *("/".join("-" if h is None else f"{h:.0f}" for h in half) for half in halves)])
        ends = [np.mean([errors["500"]["0.1"][band] for errors in found]) for band in BANDS] if found else []
        rows.append(["  error at the end", *(f"{end:.3f}" for end in ends)])
    return markdown(["half-way step at t = 0.1, band", *map(str, BANDS)], rows)


def bias_figure(store, plt):
    figure, panels = plt.subplots(1, len(SETS), figsize=(13, 3.4), layout="constrained", sharey=True)
    for axes, name in zip(panels, SETS):
        for seed, style in ((0, "-"), (1, ":")):
            errors = bias_errors(store, name, seed) or {}
            steps = sorted(map(int, errors))
            for k, band in enumerate(BANDS[:-1]):
                values = [errors[str(step)]["0.1"][band] for step in steps]
                label = f"band {band}" if seed == 0 else None
                axes.plot(steps, values, style, color=plt.cm.viridis(k / 5), label=label)
        axes.set(title=name, xscale="log", xlabel="training step", ylim=(0, 1.2))
    panels[0].set(ylabel="x0 error / power at t = 0.1")
    panels[-1].legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=8)
    return figure


def matched_values(store, name):
    """Of an autoencoder: its spectrum's entry, and {(features, to the data or to its own reconstructions): scores of
    both seeds}.
    """
    spectra = store.scores("matched", command_of("matched", "--spectrum")) or {}
    spectrum = dict(spectra.get(name, {}))
    for scale in ("raw", "unit_std") if spectrum else ():  # the KL to the target of delta 1, whatever its own delta
        target, latent = (
            np.array(spectra[which][scale][f"{key}_shares"]) for which, key in (("none", "target"), (name, "latent"))
        )
        spectrum[f"kl_{scale}"] = float((target * np.log(target / latent)).sum())
    starts = {"data": "runs/{}-p4-{} --n", "own": "--score-folder runs/{}-p4-{}/"}
    distances = {}
    for features, (to, start) in itertools.product((RESNET, "hog"), starts.items()):
        found = [store.scores("matched", command_of("matched", start.format(name, s), features)) for s in (0, 1)]
        distances[features, to] = [score for score in found if score]
    return spectrum, distances


def spectra_table(store):
    head = ["regulariser", "PSNR, dB", "rFD", "low-pass 12, dB", "KL, raw", "KL, unit std", "alpha"]
    head += ["effective channels", "patch artefacts"]
    rows = []
    for name in ALL:
        s, _ = matched_values(store, name)
        if s:
            cells = [name, f"{s['psnr']:.2f}", f"{s['rfid']:.3f}", f"{s['lowpass_psnr_12']:.2f}"]
            cells += [f"{s['kl_raw']:.4f}", f"{s['kl_unit_std']:.4f}", f"{s['latent_alpha']:.2f}"]
            cells += [f"{s['latent_effective_channels']:.2f}"]
            rows.append([*cells, f"{s['made_artefacts']:.2f}"])
    return markdown(head, rows)


def cells(scores):
    """FD and 1000 KD of scores in the same features, a seed each."""
    digits = 3 if scores and scores[0]["features"] == RESNET else 4
    distances = [("frechet_distance", 1, digits), ("kid", 1000, digits - 2)]
    return [several([scale * score[key] for score in scores], f".{d}f") for key, scale, d in distances]


def of_run(store, row, run, features, state=""):
    """The scores of all seeds of a run, noted so far."""
    found = [store.scores(row, command_of(row, f"{run}-{seed}{state} --n", features)) for seed in SEEDS[row]]
    return [score for score in found if score]


FDS = ["FD", "KD", "FD, HOG", "KD, HOG"]


def matched_table(store):
    rows = []
    for name in ALL:
        _, distances = matched_values(store, name)
        rows.append([name, *(cell for scores in distances.values() for cell in cells(scores))])
    return markdown(
        ["regulariser", "FD", "KD", "FD to own", "KD to own", *FDS[2:], "FD to own, HOG", "KD to own, HOG"], rows
    )


PREDICTORS = {
    "KL to the target, raw": lambda s: s["kl_raw"],
    "KL to the target, unit std": lambda s: s["kl_unit_std"],
    "alpha less the target's": lambda s: s["latent_alpha"] - 1.6,
    "rFD": lambda s: s["rfid"],
    "PSNR, falling": lambda s: -s["psnr"],
    "effective channels": lambda s: s["latent_effective_channels"],
}


def correlation_table(store):
    """Spearman's rank correlation over the autoencoders between what is measured of latents and of samples."""
    from scipy.stats import spearmanr

    found = {name: matched_values(store, name) for name in ALL}
    found = {name: pair for name, pair in found.items() if pair[0] and all(pair[1].values())}
    rows, keys = [], list(next(iter(found.values()))[1]) if found else []
    for title, value in PREDICTORS.items():
        x, cells = [value(spectrum) for spectrum, _ in found.values()], []
        for key in keys:
            result = spearmanr(x, [np.mean([s["frechet_distance"] for s in pair[1][key]]) for pair in found.values()])
            cells.append(f"{result.statistic:+.2f} ({result.pvalue:.2f})")
        rows.append([title, *cells])
    head = [f"over {len(found)} autoencoders", "FD", "FD to own", "FD, HOG", "FD to own, HOG"]
    return markdown(head, rows)


def matched_figure(store, plt):
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex="col")
    for row, key in zip(panels, ((RESNET, "own"), ("hog", "own"))):
        for axes, scale, title in zip(row, ("raw", "unit_std"), ("raw, as the paper publishes it", "at unit std")):
            for name in ALL:
                spectrum, distances = matched_values(store, name)
                if spectrum and distances[key]:
                    x, ys = spectrum[f"kl_{scale}"], [s["frechet_distance"] for s in distances[key]]
                    axes.plot([x] * len(ys), ys, "o-", ms=5, color="C3" if name in DELTAS else "C0")
                    offset = (6, 6 if name in DELTAS else -6)
                    axes.annotate(name, (x, np.mean(ys)), xytext=offset, textcoords="offset points", fontsize=9)
            axes.set(xscale="log", xlabel=f"KL to the target, {title}", xlim=(8e-4, 0.3))
            axes.set_xticks(ticks := [0.001, 0.003, 0.01, 0.03, 0.1], ticks)
            axes.minorticks_off()
        row[0].set(ylabel=f"FD to own reconstructions,\n{'ResNet' if key[0] == RESNET else 'HOG'} features, two seeds")
    return figure


def laws_table(store):
    found = store.scores("laws", command_of("laws", "laws")) or {}
    rows = [[name, v["images"], f"{v['alpha']:.2f}", f"{v['alpha_by_fourier']:.2f}"] for name, v in found.items()]
    return markdown(["data", "images", "alpha", "by Fourier"], rows)


def space_of(store, space, network):
    """{(features, steps): scores of both seeds} of a network in a space."""
    run, states = f"spaces-{space}-{network}", {250: "/checkpoint-0000250.pt", 500: "/checkpoint-0000500.pt", 1000: ""}
    return {
        (f, step): of_run(store, "spaces", run, f, state) for f in (RESNET, "hog") for step, state in states.items()
    }


def spaces_table(store):
    rows = []
    for network, space in itertools.product(NETWORKS, SPACES):
        scores, model = space_of(store, space, network), SPACES[space].format(network)
        speeds = [store.scores("spaces", command_of("spaces", f"{model} --seed {k} --benchmark")) for k in range(3)]
        speeds = sorted(speed["images_per_s"] for speed in speeds if speed)
        early = [cells(scores[RESNET, step])[0] for step in (250, 500)]
        last = [cell for features in (RESNET, "hog") for cell in cells(scores[features, 1000])]
        speed = f"{speeds[1]:.0f} ({speeds[0]:.0f} to {speeds[-1]:.0f})" if len(speeds) == 3 else "-"
        seams = [score["patch_artefacts"]["8"] for score in scores[RESNET, 1000] if "patch_artefacts" in score]
        rows.append([network, space, *early, *last, several(seams, ".2f"), speed])
    head = ["network", "space", "FD, 16,000 images", "FD, 32,000", "FD, 64,000", *FDS[1:], "patch artefacts"]
    head.append("images/s, one core")
    return markdown(head, rows)


def spaces_figure(store, plt):
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for axes, features, title in zip(panels, (RESNET, "hog"), ("ResNet", "HOG")):
        for (k, space), network in itertools.product(enumerate(SPACES), NETWORKS):
            scores = space_of(store, space, network)
            points = [
                (64 * step, score["frechet_distance"]) for step in (250, 500, 1000) for score in scores[features, step]
            ]
            if points:
                style = "o-" if network == NETWORKS[0] else "s--"
                means = {x: np.mean([y for at, y in points if at == x]) for x, _ in points}
                axes.plot(means.keys(), means.values(), style[1:], color=f"C{k}", label=f"{space}, {network}")
                axes.plot(*zip(*points), style[0], ms=4, color=f"C{k}")
        axes.set(xlabel="training images", ylabel=f"FD, {title} features", ylim=(0, None), xlim=(0, 68_000))
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def design_table(store):
    base = {features: of_run(store, "spaces", "spaces-dct-dit-nano", features) for features in (RESNET, "hog")}
    rows = [["no EBFR, one eta, c 16, keep 9", *(cell for scores in base.values() for cell in cells(scores))]]
    for name, change in CHANGES.items():
        found = [cells(of_run(store, "design", f"design-{name}", features)) for features in (RESNET, "hog")]
        rows.append([f"`{change}`", *itertools.chain(*found)])
    return markdown(["", *FDS], rows)


def autoregression_table(store):
    """Means over both runs and the seeds of sampling, and the range of the measured ones."""
    rows, bands = [], range(8)
    for space in ("dct", "pixel"):
        commands = [command for chain in autoregression()[0] for command in chain if f"-{space}-" in command]
        found = [scores for command in commands if (scores := store.scores("autoregression", command))]
        values = {
            key: np.array([score[key] for score in found], float) for key in ("snr_below_1_at", "half_recovered_at")
        }
        if found:
            predicted, measured = (v[:, : len(bands)] for v in values.values())
            rows.append([f"{space}, predicted", *(f"{value:.3f}" for value in predicted.mean(0))])
            rows.append([f"{space}, measured", *(f"{value:.3f}" for value in measured.mean(0))])
            spread = zip(measured.min(0), measured.max(0))
            rows.append(["  least and largest", *(f"{low:.2f}, {high:.2f}" for low, high in spread)])
    return markdown(["t of band", *map(str, bands)], rows)


def alignment_table(store):
    rows = []
    for name in ALIGNMENTS:
        found = [of_run(store, "alignment", f"align-{name}", features) for features in ("hog", RESNET)]
        means = [
            f"{np.mean([score['frechet_distance'] for score in scores]):.4f}" if scores else "-" for scores in found
        ]
        rows.append([name, *(cell for scores, mean in zip(found, means) for cell in (*cells(scores), mean))])
    return markdown(["", "FD, HOG", "KD, HOG", "mean FD, HOG", "FD", "KD", "mean FD"], rows)


def upsampling_table(store):
    found, rows = store.scores("upsampling", command_of("upsampling", "--measure upsampled")) or {}, []
    for name in METHODS if found else ():
        cells = [name]
        for data in found:
            value = found[data][name]
            cells += [f"{value['psnr']:.2f}", f"{value['ssim']:.4f}", f"{value['gradients']:.2f}"]
        for features in (RESNET, "hog"):
            s = store.scores("upsampling", command_of("upsampling", f"upsampling/scenes64-val-{name} ", features))
            cells += [f"{s['frechet_distance']:.4f}", f"{1000 * s['kid']:.2f} ({1000 * s['kid_std']:.2f})"]
        rows.append(cells)
    of = lambda data: [f"{data}: PSNR", "SSIM", "gradients"]
    head = ["method", *of("Kodak"), *of("scenes64"), "FD", "KD x 1000 (spread)", "FD in HOG", "KD x 1000 (spread)"]
    return markdown(head, rows)


def codec_table(store):
    found, rows = store.scores("codec", command_of("codec", "codec")) or {}, []
    for block, keeps in KEEPS.items() if found else ():
        for keep in keeps:
            cells = [block, f"{keep}, the cap" * (keep == block**2) or keep]
            for data in ("kodak", "scenes64-val"):
                value = found[data][str(block)][str(keep)]
                cells += [f"{value['psnr']:.1f}", f"{value['frechet_distance']:.4f}", f"{value['bits_per_pixel']:.2f}"]
            rows.append(cells)
    of = lambda data: [f"{data}: PSNR, dB", "FD", "bits per pixel"]
    return markdown(["B", "keep", *of("Kodak"), *of("scenes64")], rows)


def picture_table(store):
    rows = []
    for name, features in (("ResNet", RESNET), ("HOG", "hog")):
        score = store.scores("picture", command_of("picture", "--n", features))
        if score:
            rows.append([name, *cells([score]), f"{1000 * score['kid_std']:.2g}", f"{score['floor']:.1g}"])
    return markdown(["features", "FD", "KD", "KD's spread", "floor of FD"], rows)


TABLES = {"bias": bias_table, "laws": laws_table, "spectra": spectra_table, "matched": matched_table}
TABLES |= {"correlation": correlation_table, "spaces": spaces_table, "design": design_table}
TABLES |= {"autoregression": autoregression_table, "alignment": alignment_table}
TABLES |= {"upsampling": upsampling_table, "codec": codec_table, "picture": picture_table}
OF_ROW = {"matched": ("spectra", "matched", "correlation")}
FIGURES = {"bias": bias_figure, "matched": matched_figure, "spaces": spaces_figure}


def write(store):
    """Put the tables between their marks in evidence.md, and draw the figures."""
    text = TEXT.read_text()
    for name, table in TABLES.items():
        mark = f"<!-- table: {name} -->"
        if mark in text:
            head, _, rest = text.partition(mark)
            rest = rest[re.match(r"(\s*\|.*\n)*\s*", rest).end() :]
            text = f"{head}{mark}\n\n{table(store)}\n\n{rest}"
    TEXT.write_text(text)
    try:
        import matplotlib
    except ImportError:
        return print("no figures: they take matplotlib (pip install matplotlib)")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, draw in FIGURES.items():
        if store.runs.get(name):
            draw(store, plt).savefig(ROOT / "assets" / f"{name}.png", dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("row", nargs="*", choices=[[], *ROWS], metavar="ROW", help=f"of {', '.join(ROWS)}: run what is missing")
    add("--list", action="store_true", help="print the commands instead")
    add("--jobs", type=int, default=1, help="commands at a time, which share the cores (default: 1)")
    add(
        "--store",
        type=Path,
        default=Path("runs/evidence.json"),
        metavar="FILE",
        help="where runs are noted, %(default)s",
    )
    add(
        "--write",
        action="store_true",
        help="write the tables of evidence.md and the figures, from assets/evidence.json",
    )
    add("--measure", choices=MEASURES, help="what no program measures, into runs/MEASURE.json")
    args = parser.parse_args()
    if args.measure:
        Path("runs").mkdir(exist_ok=True)
        found = MEASURES[args.measure]()
        return Path("runs", f"{args.measure}.json").write_text(json.dumps(found))
    for row in args.row:
        if args.list:
            print("\n".join(command for stage in ROWS[row]() for chain in stage for command in chain))
            continue
        run_row(row, args.jobs, store := Store(args.store))
        for name in OF_ROW.get(row, (row,)):
            print(f"\n{TABLES[name](store)}" if name in TABLES else "")
    if args.write:
        write(Store())


if __name__ == "__main__":
    main()
