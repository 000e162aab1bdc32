"""Train a diffusion model on block-DCT tokens (DCTdiff, arXiv 2412.15032) or on pixels.

    python train_diffusion.py                                    # built-in images, five minutes on a laptop
    python train_diffusion.py --data photos/ --size 64           # a folder or .zip of images
    torchrun --nproc_per_node=8 train_diffusion.py --data photos.zip --size 256 --model uvit-m

The same command again resumes. The method is in `diffusion_loss`, the tokens in dct.py, the samplers in sample.py.
What is random in a step follows from (seed, step) and what data it sees from (seed, images seen), whatever the
number of processes: that is all the state a resumed run needs.
"""

import argparse
import atexit
import contextlib
import copy
import datetime
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dct import DCTStatistics, ebfr_weights, psnr_per_keep
from sample import (Diffusion, Images, InputError, build_network, choose_device, generate, generator, like,
                    load_weights, make_codec, parse_model, progress, read_checkpoint, run_program, save_grid, short_name,
                    target, write_atomically)  # fmt: skip
from spectral_losses import band_error

# ---- set-up: processes, data order ------------------------------------------------------------------------

COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)  # rank 0 evaluates alone, decoding is uneven


class Processes:
    """This process among those of torchrun (NCCL on GPUs, Gloo on CPU), or alone."""

    def __init__(self, device_name):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank, self.local_world = (
            int(os.environ.get(f"LOCAL_{k}", d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1))
        )
        self.device = choose_device(device_name)
        self.main = self.rank == 0
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=COLLECTIVE_TIMEOUT)
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

    def barrier(self):
        if self.world > 1:
            dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def wrap(self, network):
        if self.world == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def no_sync(self, wrapped, last):
        """The context of one part of a batch: gradients are averaged over processes with the last."""
        return contextlib.nullcontext() if last or self.world == 1 else wrapped.no_sync()

    def print(self, text):
        if self.main:
            tqdm.write(text)


class DataOrder:
    """Which images a step sees: epochs, each a permutation drawn from (seed, epoch), cut into batches end to end."""

    def __init__(self, count, batch, seed):
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, None

    def __call__(self, step):
        """-> (batch,) long"""
        parts, position, end = [], step * self.batch, (step + 1) * self.batch
        while position < end:
            epoch, offset = divmod(position, self.count)
            if epoch != self.epoch:
                self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator(self.seed, epoch, 0))
            parts.append(self.order[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)


# ---- data: decoded once, or on the fly --------------------------------------------------------------------

MEMORY_LIMIT, SMALL = 2**31, 2**26  # bytes one process alone, or each of several, holds in memory
DISK_SHARE = 0.8  # of the free disk, for a file


class Store:
    """The training images as uint8, decoded once to memory or to a memory-mapped file, or anew at every use.

    Attributes: count (readable images), labels (of all images, long, or None), how (which of the three, and why).
    """

    def __init__(self, images, folder, processes, workers):
        self.images, self.workers, self.unreadable, size = images, workers, set(), images.size
        need, limit = len(images) * 3 * size * size, MEMORY_LIMIT if processes.world == 1 else SMALL
        self.file, self.data = Path(folder) / f"images-{size}.u8", None
        named, room = f"{len(images)} images of {size} px", f"{need / 2**20:,.0f} MiB"
        if need <= limit:
            self.how = f"{named}, in memory ({room}, no more than {limit / 2**20:.0f})"
            self.data = np.empty((len(images), 3, size, size), np.uint8)
            self._decode(range(len(images)), processes)
        elif self._file_fits(need, processes):
            why = "shared by the processes" if processes.world > 1 else "too large for memory"
            self.how = f"{named}, in {self.file} ({room}, {why})"
            self._map(processes)
        else:
            self.how = f"{named}, decoded on the fly by {workers} workers ({room}, too large for the disk)"
        images.check_unreadable(len(self.unreadable))
        self.indices = np.delete(np.arange(len(images)), sorted(self.unreadable))
        self.count = len(self.indices)
        self.labels = None if images.labels is None else torch.tensor(images.labels)
        if self.unreadable:
            self.how += f", {len(self.unreadable)} unreadable skipped"

    def _decode(self, indices, processes):
        """Fill self.data at these indices, and self.unreadable."""
        workers = self.workers if len(indices) > 512 else 0
        loader = DataLoader(Subset(self.images, indices), 64, num_workers=workers)
        with progress(total=len(indices), unit="img", desc="decode", disable=not processes.main, leave=False) as bar:
            for where, pixels, good in loader:
                self.data[where.numpy()] = pixels.numpy()
                self.unreadable |= set(where[~good].tolist())
                bar.update(len(where))

    def _made_of(self):
        names = self.images.names
        return {"data": self.images.spec, "count": len(names), "first": str(names[0]), "last": str(names[-1])}

    def _file_fits(self, need, processes):
        """Is the file of these images there, or room for it? Process 0 looks, and drops what is of no use."""
        answer, record = torch.zeros(1, device=processes.device), self.file.with_suffix(".json")
        if processes.main:
            there = record.exists() and json.loads(record.read_text())["made_of"] == self._made_of()
            if not there:
                for stale in (record, self.file, self.file.with_suffix(".part")):
                    stale.unlink(missing_ok=True)
            answer += there or need <= DISK_SHARE * shutil.disk_usage(self.file.parent).free
        return processes.sum(answer).item() > 0

    def _map(self, processes):
        record, partial = self.file.with_suffix(".json"), self.file.with_suffix(".part")
        shape = (len(self.images), 3, self.images.size, self.images.size)
        if not record.exists():
            if processes.main:
                np.memmap(partial, np.uint8, "w+", shape=shape).flush()
            processes.barrier()
            self.data = np.memmap(partial, np.uint8, "r+", shape=shape)
            self._decode(range(processes.rank, len(self.images), processes.world), processes)
            self.data.flush()
            bad = torch.zeros(len(self.images), dtype=torch.int32, device=processes.device)
            bad[sorted(self.unreadable)] = 1
            processes.sum(bad)
            if processes.main:
                os.replace(partial, self.file)
                entry = json.dumps({"made_of": self._made_of(), "unreadable": bad.nonzero().flatten().tolist()})
                write_atomically(record, lambda f: f.write(entry.encode()))
        processes.barrier()
        self.unreadable = set(json.loads(record.read_text())["unreadable"])
        self.data = np.memmap(self.file, np.uint8, "r", shape=shape)

    def __getitem__(self, numbers):
        """Readable images with these numbers (n,), 0..count-1 -> (n, 3, S, S) uint8."""
        where = self.indices[np.asarray(numbers)]
        if self.data is None:
            return torch.stack([self.images.readable(i)[1] for i in where.tolist()])
        return torch.from_numpy(self.data[where])

    def batches(self, order, steps, share):
        """This process's `share` (a slice) of each step of a range: indices (n,) into the labels, (n, 3, S, S) uint8."""
        wanted, pin = (self.indices[order(step)[share].numpy()] for step in steps), torch.cuda.is_available()
        if self.data is not None:
            for where in wanted:
                pixels = torch.from_numpy(self.data[where])
                yield torch.from_numpy(where), pixels.pin_memory() if pin else pixels
            return
        loader = DataLoader(self.images, batch_sampler=wanted, num_workers=self.workers, pin_memory=pin)
        for where, pixels, good in loader:
            for k in (~good).nonzero().flatten().tolist():  # another image, and its label, for an unreadable one
                self.unreadable.add(where[k].item())
                self.images.check_unreadable(len(self.unreadable))
                where[k], pixels[k] = self.images.readable(where[k].item())
            yield where, pixels


class Latents:
    """A latent cache, one memory-mapped file: header, status and label of every image, moments.

    header   dict: kind ("moments"), preset, shape, size, factor, data, first and last image, classes, autoencoder (hash
             of its weights), scale (1 / std, None until all is encoded)
    status   (N,) uint8: 0 to be encoded, 1 encoded, 2 unreadable
    labels   (N,) int32, -1 where there are no classes
    moments  (N, 2, 2C, h, w) float16: of the image and of its mirror image, mean and log variance
    """

    MAGIC, PAGE = b"LATENTS1", 4096

    def __init__(self, file, mode="r"):
        self.file = Path(file)
        with self.file.open("rb") as handle:
            if handle.read(8) != self.MAGIC:
                raise InputError(f"{file}: no latent cache of train_vae.py --encode")
            self.room = int.from_bytes(handle.read(8), "little")
            self.header = json.loads(handle.read(self.room - 16))
        n, *rest = self.header["shape"]
        offsets = self.layout(self.room, self.header["shape"])
        self.status = np.memmap(file, np.uint8, mode, offsets[0], (n,))
        self.labels = np.memmap(file, np.int32, mode, offsets[1], (n,))
        self.moments = np.memmap(file, np.float16, mode, offsets[2], (n, *rest))

    @classmethod
    def layout(cls, room, shape):
        """Where status, labels and moments begin, and the size of the file, in bytes."""
        offsets = [room]
        for size in (shape[0], 4 * shape[0], 2 * math.prod(shape)):
            offsets.append(math.ceil((offsets[-1] + size) / cls.PAGE) * cls.PAGE)
        return offsets

    @classmethod
    def pack(cls, header, room=None):
        text = json.dumps(header).encode()
        room = room or math.ceil((len(text) + 256) / cls.PAGE) * cls.PAGE  # space for the scale
        return (cls.MAGIC + room.to_bytes(8, "little") + text).ljust(room), room

    @classmethod
    def create(cls, file, header, labels):
        """Write the file without moments."""
        start, room = cls.pack(header)
        with open(file, "wb") as handle:
            handle.write(start)
            size = cls.layout(room, header["shape"])[-1]
            handle.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                os.posix_fallocate(handle.fileno(), 0, size)
        cls(file, "r+").labels[:] = -1 if labels is None else labels

    def same(self, header):
        """Are these latents what `header` says, the scale aside?"""
        return self.header | {"scale": None} == header | {"scale": None}

    def finish(self, **entries):
        self.header |= entries
        with self.file.open("r+b") as handle:
            handle.write(self.pack(self.header, self.room)[0])


# ---- method -----------------------------------------------------------------------------------------------

X0_FLOOR = 0.04  # x0 errors are weighted 1 / (sigma^2 + this): the v loss, bounded near t = 0


def draw_times(n, sampling, mean_std, path, generator):
    """t (n,): uniform along the path's time, or logit-normal in it (arXiv 2403.03206, section 3.1)."""
    if sampling == "uniform":
        u = torch.rand(n, generator=generator, device=generator.device)
    else:
        u = torch.sigmoid(mean_std[0] + mean_std[1] * torch.randn(n, generator=generator, device=generator.device))
    return path.time(u)


def diffusion_loss(diffusion, network, x0, eps, t, y=None, drop=None, weights=None):
    """Squared error of the prediction at x_t = alpha x0 + sigma e, a mean per example.

    x0, eps (N, *shape), t (N,), y (N,) classes, drop (N,) bool, weights (token_dim,) of EBFR -> (N,) float32
    """
    alpha, sigma = diffusion.path.alpha_sigma(like(t, x0))
    output = diffusion.output(network, alpha * x0 + sigma * eps, t, y, drop).float()
    error = (output - target(diffusion.path, diffusion.predict, x0, eps, t)).square()
    if weights is not None:
        error = error * weights
    if diffusion.predict == "x0":
        error = error / (sigma**2 + X0_FLOOR)
    return error.flatten(1).mean(1)


def draw_step(seed, step, n, shape, args, path, device):
    """All that is random in a step, for the whole global batch, from (seed, step): t, noise, label drop, flip."""
    g = generator(seed, step, 1, device=device)
    t = draw_times(n, args.t_sampling, args.t_logit_normal, path, g)
    eps = torch.randn(n, *shape, generator=g, device=device)
    drop = torch.rand(n, generator=g, device=device) < args.label_dropout
    flip = (torch.rand(n, generator=g, device=device) < 0.5) & args.flip
    return t, eps, drop, flip


def learning_rate(step, args):
    """Linear warm-up, then constant or falling linearly to zero at the last step."""
    rate = args.lr * min(1, (step + 1) / max(args.warmup, 1))
    return rate * (1 - step / args.steps) if args.lr_decay == "linear" else rate


@torch.no_grad()
def update_ema(averaged, network, step, decay):
    """Exponential moving average of all parameters, with warm-up: decay_n = min(decay, (1 + n) / (10 + n))."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)


def fit_codec(store, size, block, processes, limit=(50_000, 300e6)):
    """Eta and entropies (3, B*B) from up to 50k images or 300 million pixels, spread over the set and the processes."""
    statistics = DCTStatistics(block, device=processes.device)
    count = max(1, min(store.count, limit[0], int(limit[1] / size**2)))
    chosen = torch.linspace(0, store.count - 1, count, dtype=torch.float64).round().long()
    parts = chosen[processes.rank :: processes.world].split(max(1, 2**21 // size**2))
    for part in progress(parts, desc="eta", unit="batch", disable=not processes.main, leave=False):
        statistics.update(store[part].to(processes.device) / 127.5 - 1)
    processes.sum(statistics.counts)
    return statistics.eta(), statistics.entropies(), count


@torch.no_grad()
def band_errors(diffusion, store, parts, seed, device, levels=(0.1, 0.5, 0.9)):
    """Power of the x0 error over power of the image, per radial band, at a low, middle and high t (DCTdiff, section 3)
    -> {t: [16 numbers]}, low to high; 1 is a prediction that knows nothing of the band, None a band without power.
    parts: numbers of images in the store, a batch at a time; their noise follows from the seed.
    """
    images, predictions, noise = [], {level: [] for level in levels}, generator(seed, 2)
    for numbers in parts:
        x0 = diffusion.encode(store[numbers].to(device) / 127.5 - 1)
        images.append(diffusion.decode(x0))
        eps = torch.randn(x0.shape, generator=noise).to(device)
        y = store.labels[store.indices[numbers]].to(device) if diffusion.classes else None
        denoise = diffusion.denoiser(y)
        for level in levels:
            t = torch.full((len(x0),), level, device=device)
            alpha, sigma = diffusion.path.alpha_sigma(like(t, x0))
            predictions[level].append(diffusion.decode(denoise(alpha * x0 + sigma * eps, t)[0]))
    images = torch.cat(images)
    ratios = {str(level): band_error(torch.cat(made), images).tolist() for level, made in predictions.items()}
    return {level: [r if math.isfinite(r) else None for r in ratio] for level, ratio in ratios.items()}


# ---- measuring --------------------------------------------------------------------------------------------


def autocast(args, device):
    """`--amp`, auto being bf16 on CUDA and off on a CPU -> (a function that makes the context, dtype or None)"""
    kind = {"auto": "bf16" if device.type == "cuda" else "off"}.get(args.amp, args.amp)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[kind]
    return lambda: torch.autocast(device.type, dtype, enabled=dtype is not None), dtype


def count_flops(loss):
    """FLOPs of loss() and its backward pass, counted by torch."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return counter.get_total_flops()


def diffusion_flops(diffusion, device):
    """Forward and backward FLOPs of one image."""
    x, t = torch.zeros(1, *diffusion.shape, device=device), torch.zeros(1, device=device)
    y = torch.zeros(1, dtype=torch.long, device=device) if diffusion.classes else None
    flops = count_flops(lambda: diffusion.output(diffusion.network, x, t, y).sum())
    diffusion.network.zero_grad(set_to_none=True)
    return flops


def matmul_rate(device, dtype, n=None):
    """This machine's own FLOP/s in one square matrix product, the best of ten."""
    n = n or (8192 if device.type == "cuda" else 1536)
    a, best = torch.randn(n, n, device=device, dtype=dtype or torch.float32), math.inf
    for _ in range(10):
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


BAD_STEPS = 10  # non-finite ones in a row that stop a run


class Log:
    """The progress bar and RUN/metrics.jsonl. Between two lines, sums stay on the device, so that steps never wait."""

    def __init__(self, args, processes, count, step, flops=0, peak=1):
        self.args, self.processes, self.device, self.count = args, processes, processes.device, count
        self.flops, self.peak = flops, peak  # FLOPs of an image, the device's FLOP/s
        self.file, self.worst_run, self.bad_runs = Path(args.out) / "metrics.jsonl", self._zero(), {}
        if processes.main and self.file.exists():  # lines after the step resumed from will be made again
            whole = self.file.read_text().split("\n")[:-1]  # a killed process may leave half a line
            kept = "".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step)
            write_atomically(self.file, lambda f: f.write(kept.encode()))
        self.bar = progress(total=args.steps * args.batch, initial=step * args.batch, unit="img", unit_scale=True,
                            desc="train", disable=not processes.main)  # fmt: skip
        self._begin(step)

    def _zero(self):
        return torch.zeros((), device=self.device)

    def _begin(self, step):
        self.sums, self.norm, self.steps, self.skipped = {}, self._zero(), self._zero(), self._zero()
        self.restart_clock(step)

    def restart_clock(self, step):
        self.started, self.step_then = time.perf_counter(), step

    def add(self, name, values, where=None, bins=1):
        """Count values, (n,) or a scalar, in the mean called `name`, or in `bins` means, where (n,) saying which."""
        values = values.detach().float().view(-1)
        where, finite = torch.zeros_like(values).long() if where is None else where, values.isfinite()
        sums = self.sums.setdefault(name, torch.zeros(2, bins, device=self.device))
        sums.index_add_(1, where, torch.stack((values.where(finite, 0), finite.float())))

    def add_step(self, norm, optimizer):
        """Count a step of an optimizer by its gradient norm; one that is not finite was skipped."""
        good = norm.isfinite()
        self.norm += torch.where(good, norm, 0)
        self.steps += good
        self.skipped += ~good
        self.bad_runs[optimizer] = torch.where(good, 0, self.bad_runs.get(optimizer, 0) + 1)
        self.worst_run = torch.maximum(self.worst_run, self.bad_runs[optimizer])

    def end_step(self, step, lr):
        """Write a line where one is due. Raises InputError after ten non-finite steps in a row."""
        self.bar.update(self.args.batch)
        if step % self.args.log_every and step != self.args.steps:
            return
        line = {}
        for name, sums in self.sums.items():
            total, count = self.processes.sum(sums).tolist()
            means = [t / c if c else None for t, c in zip(total, count)]
            line[name] = means if len(means) > 1 else means[0]
        line["grad_norm"], line["skipped_steps"] = (self.norm / self.steps.clamp_min(1)).item(), int(self.skipped)
        rate, worst = (step - self.step_then) * self.args.batch / (time.perf_counter() - self.started), int(self.worst_run)
        line |= {"lr": lr, "images_per_s": round(rate, 1)}
        line |= {"share_of_peak": round(rate * self.flops / self.peak, 4)} if self.flops else {}
        images = step * self.args.batch
        self.write(step=step, images=images, epoch=images / self.count, **line)
        if line.get("loss") is not None:
            self.bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)
        if worst >= BAD_STEPS:
            self.bar.close()
            raise InputError(
                f"{worst} steps in a row up to {step} were not finite and were skipped; {self.args.out}/checkpoint.pt "
                f"is the last good one. Lower --lr {self.args.lr:g}, or --amp off"
            )
        self._begin(step)

    def write(self, **entry):
        if self.processes.main:
            with self.file.open("a") as handle:
                handle.write(json.dumps(entry) + "\n")


# ---- settings ---------------------------------------------------------------------------------------------

# What a flag is when it is not given. The tiny networks take a recipe that learns in minutes on a CPU (x0 prediction on
# the flow path); all others take DCTdiff's published settings.
TINY = dict(path="flow", predict="x0", t_sampling="logit-normal", ebfr=False, lr=2e-3, betas=[0.9, 0.99],
            weight_decay=0.03, warmup=100, lr_decay="linear", ema=0.999, batch=64, steps=1800)  # fmt: skip
PUBLISHED = dict(path="vp", predict="eps", t_sampling="uniform", ebfr=True, lr=2e-4, betas=[0.99, 0.99],
                 weight_decay=0.03, warmup=5000, lr_decay="none", ema=0.9999, batch=256, steps=500_000)  # fmt: skip
KEEP = {2: 4, 4: 9, 8: 18}  # coefficients kept per block [code]; 8 of 16 from 256 px on
SNR_SCALE = {32: 2.0, 64: 4.0, 128: 4.0, 256: 4.0, 512: 12.0}  # c of the vp path by resolution, in DCT space [code]
# On the flow path c is B^2 [ours]: dividing by eta, about 128 B, makes the noise of a token B times that of a pixel.
MAY_CHANGE = set("steps device workers compile log_every eval_every save_every fresh benchmark out "
                 "val features features_weights lpips_vgg lpips_heads eval_images eval_only spectrum encode "
                 "ckpt".split())  # fmt: skip


def complete(args):
    """Fill in what the command left open, from the model, the space and the resolution. Raises InputError."""
    parse_model(args.model)
    tiny, dct = args.model.lower().partition("/")[0].endswith(("nano", "tiny")), args.space == "dct"
    given = [name for name in ("block", "keep", "ebfr") if getattr(args, name)]
    if given and not dct:
        raise InputError(f"--{' --'.join(given)}: only for --space dct")
    for name, value in (TINY if tiny else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, value if name != "ebfr" else value and dct)
    if dct and args.block is None:
        args.block = 8 if args.size >= 512 else 4 if args.size >= 128 or tiny else 2  # tiny networks want few tokens
    if dct and args.keep is None:
        args.keep = 8 if args.block == 4 and args.size >= 256 else KEEP.get(args.block, max(1, args.block**2 * 9 // 32))
    if args.snr_scale is None:
        nearest = min(SNR_SCALE, key=lambda size: abs(size - args.size))
        args.snr_scale = 1.0 if not dct else SNR_SCALE[nearest] if args.path == "vp" else float(args.block**2)
    if dct:
        make_codec(vars(args) | {"eta": 1.0})  # raises where size, block and keep do not fit together
    if args.out is None:
        args.out = f"runs/{short_name(args.data)}-{args.size}-{args.space}-{args.model.lower().replace('/', '-')}"
    check_ranges(args, snr_scale=1e-9)
    if not 0 <= args.label_dropout < 1:
        raise InputError(f"--label-dropout {args.label_dropout}: must lie in [0, 1)")


def check_ranges(args, **least):
    """Raise InputError for a flag that is out of its range, or below that of name=least; None is in every range."""
    ones = ("size", "steps", "batch", "grad_accum", "log_every", "eval_every", "save_every")
    zeros = ("lr", "clip", "seed", "weight_decay", "warmup", "benchmark", "workers")
    for name, minimum in (dict.fromkeys(ones, 1) | dict.fromkeys(zeros, 0) | least).items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be at least {minimum:g}")
    for name, value in (("ema", args.ema), *(("betas", b) for b in args.betas or ())):
        if value is not None and not 0 <= value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: must lie in [0, 1)")


def plain_arguments(args):
    return {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}


def open_run(args, kind):
    """The checkpoint to resume from, or None. Raises InputError where RUN is another's, or made with other arguments."""
    run = Path(args.out)
    if (run / "checkpoint.pt").exists():
        if args.fresh:
            raise InputError(f"--fresh: {run} holds a run; --fresh starts in an empty folder only, name another --out")
        checkpoint = read_checkpoint(run, kind)
        there, now = checkpoint.get("args", {}), plain_arguments(args)
        changed = [
            f"--{k.replace('_', '-')} {there.get(k)} there, {v} now" for k, v in now.items() if there.get(k) != v
        ]
        if changed:
            raise InputError(
                f"{run} was made with other arguments: {'; '.join(changed)}. Give the same, or another --out"
            )
        return checkpoint
    if run.exists() and not run.is_dir():
        raise InputError(f"--out {run}: is a file; name a folder")
    own = ("metrics.jsonl", "samples", "checkpoint.pt.tmp", "images-")
    others = [p.name for p in run.iterdir() if not p.name.startswith(own)] if run.is_dir() else []
    if others or (args.fresh and run.is_dir() and any(run.iterdir())):
        there = ", ".join(others[:3]) or "a started run"
        raise InputError(f"--out {run} holds {there} and no checkpoint; name an empty folder")
    return None


# ---- benchmark --------------------------------------------------------------------------------------------


def benchmark(args, images, processes, encode, names, step, count_flops, dtype):
    """`--benchmark N`: times of N steps, part by part, and of file to network input; nothing is written.

    encode(pixels in [-1, 1]) makes the network's input; step(i, pixels, mark) does this process's share of step i and
    calls mark(name) after each part in `names`; count_flops() -> FLOPs of one image, forward and backward.
    """
    device, say, clock, threads = processes.device, processes.print, time.perf_counter, torch.get_num_threads()
    torch.set_num_threads(1)

    def lap(function, items):
        start, results = clock(), [function(item) for item in items]
        return (clock() - start) / len(results) * 1e3, results

    read, pixels = lap(images.read, range(len(images)))  # decode, crop, resize
    pixels = [image for image in pixels if image is not None]
    lap(lambda image: encode(image[None].to(device) / 127.5 - 1), pixels[:4])  # warms up
    encoding, _ = lap(lambda image: encode(image[None].to(device) / 127.5 - 1), pixels)
    synchronize(device)
    torch.set_num_threads(threads)
    split = f"{read:.2f} file to pixels + {encoding:.2f} pixels to network input"
    say(f"data, one core   {read + encoding:8.2f} ms/image = {split}")
    say(f"                 {1e3 / (read + encoding):8.0f} images/s a core, {len(pixels)} images of {args.size} px")

    n, all_times = args.batch // processes.world, []
    batch = torch.stack(pixels).repeat(math.ceil(n / len(pixels)), 1, 1, 1)[:n]
    times, last = {}, clock()

    def mark(name):
        nonlocal last
        synchronize(device)
        times[name] += clock() - last
        last = clock()

    for i in range(args.benchmark + 2):
        times.update(dict.fromkeys(names, 0.0))
        last = clock()
        step(i, batch, mark)
        all_times.append(list(times.values()))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    parts = np.median(all_times[2:], 0)  # the first two warm up
    total = parts.sum()
    rate, own = count_flops() * n / total / 1e9, matmul_rate(device, dtype) / 1e9
    split = " + ".join(f"{seconds * 1e3:.1f} {name}" for name, seconds in zip(names, parts))
    say(f"step             {total * 1e3:8.1f} ms = {split}, median of {args.benchmark}")
    say(f"training         {n * processes.world / total:8.1f} images/s, batch {n} x {processes.world}")
    say(f"arithmetic       {rate:8.1f} GFLOP/s a process, {rate / own:.0%} of its {own:.0f} in one matrix product")
    say(f"peak memory      {peak / 2**20:8.0f} MiB")


def benchmark_diffusion(args, images, diffusion, weights, processes, amp):
    """`--benchmark N` of this program."""
    device, (context, dtype) = processes.device, amp
    network = processes.wrap(torch.compile(diffusion.network) if args.compile else diffusion.network)
    optimizer, n = make_optimizer(diffusion.network, args), args.batch // processes.world

    def step(i, pixels, mark):
        x0 = diffusion.encode(pixels.to(device) / 127.5 - 1)
        t, eps, drop, _ = draw_step(args.seed, i, n, diffusion.shape, args, diffusion.path, device)
        y = torch.zeros(n, dtype=torch.long, device=device) if diffusion.classes else None
        mark("data")
        for part in torch.arange(n, device=device).chunk(args.grad_accum):
            with context():
                labels = None if y is None else y[part]
                loss = diffusion_loss(diffusion, network, x0[part], eps[part], t[part], labels, drop[part], weights)
            mark("forward")
            loss.mean().backward()
            mark("backward")
        torch.nn.utils.clip_grad_norm_(diffusion.network.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")

    names = ("data", "forward", "backward", "optimizer")
    benchmark(args, images, processes, diffusion.encode, names, step, lambda: diffusion_flops(diffusion, device), dtype)


# ---- training ---------------------------------------------------------------------------------------------

GRID_STEPS, GRID_GUIDANCE = 50, 1.5


def set_up(args, kind):
    """What both trainers begin with -> the processes, the images, the checkpoint to resume from or None, this process's
    share of a batch (a slice), images at once. Raises InputError.
    """
    processes = Processes(args.device)
    parts = processes.world * args.grad_accum
    if args.batch % parts:
        raise InputError(
            f"--batch {args.batch}: must be a multiple of {processes.world} processes x --grad-accum {args.grad_accum}"
        )
    local = args.batch // processes.world
    share = slice(processes.rank * local, (processes.rank + 1) * local)
    images = processes.local_first(lambda: Images(args.data, args.size))
    if args.benchmark:
        images.thin(2**24 // args.size**2)
    checkpoint = None if args.benchmark else open_run(args, kind)
    processes.barrier()  # all have looked before any writes
    return processes, images, checkpoint, share, args.batch // parts


def workers(args, processes):
    """How many processes decode images for this one."""
    return args.workers if args.workers is not None else min(8, (os.cpu_count() or 1) // processes.local_world)


def open_store(args, images, processes, checkpoint):
    """The decoded images of a run, whose folder is made. Raises InputError where they are not those it began with."""
    folder = Path("." if args.benchmark else args.out)  # a benchmark writes nothing
    folder.mkdir(parents=True, exist_ok=True)
    store = Store(images, folder, processes, workers(args, processes))
    if checkpoint and checkpoint["data_count"] != store.count:
        raise InputError(
            f"--data {args.data} has changed since {folder} was begun: then {checkpoint['data_count']} images, now "
            f"{store.count}. Restore it, or name another --out"
        )
    return store


def make_scaler(device, dtype):
    # Without fp16 the scale stays 1 and only the skipping of non-finite steps is used.
    return torch.amp.GradScaler(device.type, init_scale=2.0**16 if dtype == torch.float16 else 1.0)


def take_step(optimizer, scaler, log, args, dtype):
    """Clip the gradients and step; a step whose gradients are not finite is skipped, and counted."""
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    log.add_step(torch.nn.utils.clip_grad_norm_(parameters, args.clip or math.inf), optimizer)
    scaler.step(optimizer)
    scaler.update(None if dtype == torch.float16 else 1.0)
    optimizer.zero_grad(set_to_none=True)


def make_optimizer(network, args):
    # fused: one kernel, and a GradScaler's skip of a non-finite step without waiting for the device
    trained = [p for p in network.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, args.lr, tuple(args.betas), weight_decay=args.weight_decay, fused=True)


def evaluate(diffusion, store, folder, step, args, device, batch):
    """A grid of samples from fixed noise into RUN/samples/, and the x0 error by radial band of fixed images.
    `batch`: images at a time; four times what training takes at once fits, there being no gradients.
    """
    count, classes = 64 if args.size <= 64 else 16, diffusion.classes
    guidance, images = GRID_GUIDANCE if classes and args.label_dropout else 1.0, []
    for part in torch.arange(count).split(batch):
        y = (part % len(classes)).to(device) if classes else None
        images.append(generate(diffusion, part, args.seed, device, y, steps=GRID_STEPS, guidance=guidance))
    save_grid(torch.cat(images), folder / "samples" / f"step{step:07d}.png", math.isqrt(count))
    chosen = torch.linspace(0, store.count - 1, 256 if args.size <= 64 else 32, dtype=torch.float64).long()
    return band_errors(diffusion, store, chosen.split(batch), args.seed, device)


def main(args):
    # ---- set-up
    complete(args)
    processes, images, checkpoint, share, micro = set_up(args, "diffusion")
    device, folder, say, local = processes.device, Path(args.out), processes.print, share.stop - share.start
    if checkpoint and checkpoint["step"] >= args.steps:
        return finished(args, say, checkpoint["step"], again=True)

    if args.classes and not images.classes:
        raise InputError(f"--classes: {args.data} has none; sort its images into a folder a class, or leave it out")
    classes = images.classes if args.classes is not False else None
    named = ("space", "size", "model", "path", "snr_scale", "predict", "label_dropout", "block", "keep")
    config = {name: getattr(args, name) for name in named} | {"classes": classes}
    with torch.device("meta"):
        build_network(config | {"eta": 1.0})  # raises before any work where model and size do not fit

    # ---- data
    store = open_store(args, images, processes, checkpoint)

    # ---- model
    if checkpoint:
        config = checkpoint["config"]
        if config["classes"] != classes:
            raise InputError(
                f"--data {args.data} has changed since {folder} was begun: then its classes were {config['classes']}, "
                f"now {classes}. Restore it, or name another --out"
            )
    elif args.space == "dct":
        config |= measure_codec(args, store, processes)
    torch.manual_seed(args.seed)  # the same weights in every process
    diffusion = Diffusion(config)
    network = diffusion.network.to(device).train()
    weights = ebfr_weights(torch.tensor(config["entropies"]), config["keep"]).to(device) if args.ebfr else None
    amp, dtype = autocast(args, device)
    if args.benchmark:
        return benchmark_diffusion(args, images, diffusion, weights, processes, (amp, dtype))
    optimizer, ema = make_optimizer(network, args), copy.deepcopy(network).eval().requires_grad_(False)
    scaler = make_scaler(device, dtype)

    # ---- resume
    step = 0
    if checkpoint:
        load_weights(network, checkpoint["model"], folder)
        load_weights(ema, checkpoint["ema"], folder)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
        step = checkpoint["step"]
    sampled = Diffusion(config, ema)
    order = DataOrder(store.count, args.batch, args.seed)
    epochs = args.steps * args.batch / store.count
    say(f"data     {store.how}" + (f", {len(classes)} classes" if classes else ", no classes"))
    millions = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    say(f"model    {args.model}, {millions:.2f}M parameters, input {' x '.join(map(str, diffusion.shape))}")
    say(f"         {args.path} path, c = {args.snr_scale:g}, predicts {args.predict}")
    say(f"training {args.steps} steps of {args.batch} = {epochs:.1f} epochs, on {processes.world} x {device.type}")
    say(f"         into {folder}" + (f", resumed at step {step}" if checkpoint else ""))

    def save():
        if processes.main:
            state = {
                "model": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "step": step, "images_seen": step * args.batch, "config": config,
                # the data order and every random draw of the steps to come follow from these
                "random": {"seed": args.seed, "next_step": step}, "data_count": store.count,
                "args": plain_arguments(args),
            }  # fmt: skip
            write_atomically(folder / "checkpoint.pt", lambda f: torch.save(state, f))

    # ---- loop
    flops, peak = 0, 1
    if device.type == "cuda":
        flops, peak = diffusion_flops(diffusion, device), matmul_rate(device, dtype) * processes.world
    wrapped = processes.wrap(torch.compile(network) if args.compile else network)
    log = Log(args, processes, store.count, step, flops, peak)
    for where, pixels in store.batches(order, range(step, args.steps), share):
        drawn = draw_step(args.seed, step, args.batch, diffusion.shape, args, diffusion.path, device)
        t, eps, drop, flip = (values[share] for values in drawn)
        x0 = pixels.to(device, non_blocking=True) / 127.5 - 1  # (N, 3, S, S)
        x0 = diffusion.encode(torch.where(like(flip, x0), x0.flip(-1), x0))
        y = store.labels[where].to(device) if classes else None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for start in range(0, local, micro):
            part, last = slice(start, start + micro), start + micro == local
            with processes.no_sync(wrapped, last):
                with amp():
                    loss = diffusion_loss(diffusion, wrapped, x0[part], eps[part], t[part],
                                          None if y is None else y[part], drop[part], weights)  # fmt: skip
                scaler.scale(loss.mean() / args.grad_accum).backward()
            log.add("loss", loss)
            log.add("loss_by_quarter_of_t", loss, (t[part] * 4).long().clamp_max(3), bins=4)
        take_step(optimizer, scaler, log, args, dtype)
        update_ema(ema, network, step, args.ema)
        step += 1
        # log
        log.end_step(step, optimizer.param_groups[0]["lr"])
        # save
        if step % args.save_every == 0 or step == args.steps:
            save()
        # evaluate
        if step % args.eval_every == 0 or step == args.steps:
            if processes.main:
                log.write(step=step, x0_error_by_band=evaluate(sampled, store, folder, step, args, device, 4 * micro))
            log.restart_clock(step)
    log.bar.close()
    finished(args, say, step)


def measure_codec(args, store, processes):
    """The codec's part of a config, measured on the data and shown: eta, entropies, PSNR per `keep`."""
    eta, entropies, count = fit_codec(store, args.size, args.block, processes)
    say = processes.print
    if not processes.main:
        return {"eta": eta, "entropies": entropies.tolist()}
    some = store[torch.linspace(0, store.count - 1, min(store.count, 64 if args.size <= 128 else 16)).long()]
    psnr = psnr_per_keep(some.to(processes.device) / 127.5 - 1, args.block)
    say(f"codec    B {args.block}, keep {args.keep}, eta {eta:.3f} from {count} images")
    shown = sorted({1, max(1, args.keep // 2), args.keep, min(args.keep + 1, len(psnr)), len(psnr)})
    say("         PSNR by keep, dB: " + ", ".join(f"{k}: {psnr[k - 1]:.1f}" for k in shown))
    for name, row in zip(("Y", "Cb", "Cr"), entropies[:, : args.keep].tolist()):
        say(f"         H({name}) ".ljust(15) + " ".join(f"{h:.2f}" for h in row[:12]) + " ..." * (len(row) > 12))
    return {"eta": eta, "entropies": entropies.tolist()}


def finished(args, say, step, again=False):
    say(f"{args.out}: {'this run is finished' if again else 'done'} at step {step} of {args.steps}.")
    say(f"  look     {args.out}/samples/")
    say(f"  sample   python sample.py {args.out} --n 64")
    if again:
        say(f"  go on    the same command with --steps {2 * step}")
    if args.data.startswith("dead-leaves"):
        say("  your own python train_diffusion.py --data FOLDER_OR_ZIP --size 64")


def recipe_defaults(small, large, which):
    """-> both(name), the end of a help text: a flag's default in two recipes."""

    def both(name):
        values = [" ".join(map(str, d[name])) if isinstance(d[name], list) else d[name] for d in (small, large)]
        if values[0] == values[1]:
            return f"(default: {values[0]})"
        return "(default: {} for {which}, {} for others)".format(*values, which=which)

    return both


def add_training_flags(add, both):
    """The flags of both trainers that read the same."""
    add("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the images (default: yes)")
    add("--steps", type=int, metavar="N", help=f"optimizer steps {both('steps')}")
    add("--batch", type=int, metavar="GLOBAL", help=f"images a step, over all processes {both('batch')}")
    add("--grad-accum", type=int, default=1, metavar="N", help="parts that a process's share is cut into (default: 1)")
    add("--lr", type=float, metavar="X", help=f"AdamW learning rate {both('lr')}")
    add("--lr-decay", choices=("none", "linear"),
        help=f"after warm-up: constant, or linearly to 0 at --steps {both('lr_decay')}")  # fmt: skip
    add("--warmup", type=int, metavar="N", help=f"steps of linear warm-up {both('warmup')}")
    add("--betas", type=float, nargs=2, metavar=("B1", "B2"), help=f"AdamW betas {both('betas')}")
    add("--weight-decay", type=float, metavar="X", help=f"AdamW weight decay {both('weight_decay')}")
    add("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm, 0 for none (default: 1)")
    add("--ema", type=float, metavar="X", help=f"decay of the average of the weights, 0 for none {both('ema')}")
    add("--amp", default="auto", choices=("auto", "off", "bf16", "fp16"),
        help="autocast (default: auto, bf16 on CUDA, off on a CPU)")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the network")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: auto)")
    add("--seed", type=int, default=0, metavar="N", help="of weights, data order and noise (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: the CPU's cores, at most 8)")
    add("--log-every", type=int, default=50, metavar="N", help="steps a metrics line (default: 50)")
    add("--eval-every", type=int, default=1000, metavar="N", help="steps between evaluations (default: 1000)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (default: 500)")
    add("--fresh", action="store_true", help="never resume: --out must be empty")
    add("--benchmark", type=int, default=0, metavar="N",
        help="time N steps part by part, train nothing (default: 0, off)")  # fmt: skip


def make_parser():
    flag = argparse.BooleanOptionalAction
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, both = parser.add_argument, recipe_defaults(TINY, PUBLISHED, "nano and tiny models")
    add("--data", default="dead-leaves", metavar="SPEC",
        help="folder, .zip, cifar10, dead-leaves or dead-leaves:full (default: dead-leaves)")  # fmt: skip
    add("--size", type=int, default=32, metavar="PIXELS", help="images are cropped and resized to this (default: 32)")
    add("--out", metavar="RUN", help="run folder (default: runs/DATA-SIZE-SPACE-MODEL)")
    add("--space", default="dct", choices=("dct", "pixel"), help="what is diffused (default: dct)")
    add("--model", default="dit-nano", metavar="NAME",
        help="uvit-nano|tiny|s|m|l|h or dit-nano|tiny|s|b|l|xl, in pixel space with /PATCH (default: dit-nano)")  # fmt: skip

    add("--path", choices=("vp", "flow"), help=f"noise path {both('path')}")
    add("--predict", choices=("eps", "v", "x0"), help=f"what the network predicts {both('predict')}")
    add("--t-sampling", choices=("uniform", "logit-normal"), help=f"distribution of t {both('t_sampling')}")
    add("--t-logit-normal", type=float, nargs=2, default=[0.5, 1.0], metavar=("MEAN", "STD"),
        help="of logit t (default: 0.5 1)")  # fmt: skip
    add("--snr-scale", type=float, metavar="C",
        help="SNR scaling (default: 1 in pixel space; in DCT space B^2 on flow, on vp 2 to 12 by size)")  # fmt: skip
    add("--block", type=int, metavar="B",
        help="DCT block size (default: 2 to 64 px, 4 to 256, 8 at 512; at least 4 for nano and tiny models)")  # fmt: skip
    add("--keep", type=int, metavar="K",
        help="coefficients kept per block (default: 4 of 4, 9 of 16 or 8 from 256 px, 18 of 64)")  # fmt: skip
    add("--ebfr", action=flag, help=f"entropy-based frequency reweighting {both('ebfr')}")
    add("--classes", action=flag, help="train with classes (default: where the data has them)")
    add(
        "--label-dropout",
        type=float,
        default=0.1,
        metavar="P",
        help="share of labels made the null class (default: 0.1)",
    )
    add_training_flags(add, both)
    return parser


if __name__ == "__main__":
    run_program(main, make_parser().parse_args())
