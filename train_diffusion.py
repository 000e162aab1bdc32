"""Train a diffusion model on block-DCT tokens (DCTdiff, arXiv 2412.15032), on latents or on pixels.

    python train_diffusion.py                                    # built-in images, five minutes on a laptop
    python train_diffusion.py --data photos/ --size 64           # a folder or .zip of images
    torchrun --nproc_per_node=8 train_diffusion.py --data photos.zip --size 256 --model uvit-m
    python train_diffusion.py --latents photos.latents           # of train_vae.py --encode; --vae RUN encodes on the fly
    python train_diffusion.py --latents photos.latents --repa dog --encoder facebookresearch/dinov2:dinov2_vitb14
    python train_diffusion.py --latents photos.latents --encoder hog --rmsc      # which target? no training

The same command again resumes. The method is in `diffusion_loss`, the tokens in dct.py, representation alignment in
repa.py, the samplers in sample.py.
What is random in a step follows from (seed, step) and what data it sees from (seed, images seen), whatever the
number of processes: that is all the state a resumed run needs.
"""

import argparse
import atexit
import contextlib
import copy
import datetime
import itertools
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dct import DCTStatistics, ebfr_weights, psnr_per_keep
from dit import DiT
from repa import (DOG_SIGMAS, PATCH_ENCODER_SIZE, Aligned, alignment_loss, as_map, lds, load_encoder, make_projector,
                  make_target, resize_tokens)  # fmt: skip
from sample import (PATHS, Diffusion, Images, InputError, add_device_flags, autocast, build_network, choose_device,
                    generate, generator, like, load_weights, make_codec, open_autoencoder, parse_model, progress,
                    read_checkpoint, run_program, save_grid, seeds, short_name, target, write_atomically)  # fmt: skip
from spectral_losses import band_error, directional_energy, rmsc

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


def prefetch(batches):
    """The items of an iterator, each made by a background thread while the one before it is used."""
    batches = iter(batches)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = thread.submit(next, batches, None)
            yield batch


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

    def align(self, indices):
        """Draw from these images, those of a latent cache. Raises InputError where others can be read now."""
        if self.data is not None and not np.array_equal(self.indices, indices):
            raise InputError(f"--data {self.images.spec}: other images can be read now than when --latents was made of it")
        self.indices, self.count = indices, len(indices)

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


class Cache:
    """What a frozen encoder makes of every image of a data set and of its mirror image, one memory-mapped file.

    header  dict: kind ("moments" of an autoencoder or "tokens" of a REPA encoder), shape, size (of the images), data,
            first and last image, classes, and what made them. Moments: preset, factor, autoencoder (hash of its weights),
            vae (where it was), scale (1 / std, None until all is encoded). Tokens: encoder.
    status  (N,) uint8: 0 to be encoded, 1 encoded, 2 unreadable
    labels  (N,) int32, -1 where there are no classes
    values  (N, 2, ...) float16, of the image and of its mirror image: moments (2C, h, w), the mean and the log variance;
            tokens (T, D)
    """

    MAGIC, PAGE = b"LATENTS1", 4096
    MADE_BY = {"moments": "latent cache of train_vae.py --encode", "tokens": "token cache of --cache-targets"}

    def __init__(self, file, mode="r", kind="moments"):
        self.file = Path(file)
        if not self.file.is_file():
            raise InputError(f"{file}: no such file; it should be a {self.MADE_BY[kind]}")
        with self.file.open("rb") as handle:
            known = handle.read(8) == self.MAGIC
            self.room = int.from_bytes(handle.read(8), "little")
            self.header = json.loads(handle.read(self.room - 16)) if known else {}
        if self.header.get("kind") != kind:
            raise InputError(f"{file}: no {self.MADE_BY[kind]}")
        n, *rest = self.header["shape"]
        offsets = self.layout(self.room, self.header["shape"])
        if self.file.stat().st_size < offsets[-1]:
            raise InputError(f"{file}: cut off, {self.file.stat().st_size:,} of {offsets[-1]:,} bytes; copy it again")
        self.status = np.memmap(file, np.uint8, mode, offsets[0], (n,))
        self.labels = np.memmap(file, np.int32, mode, offsets[1], (n,))
        self.values = np.memmap(file, np.float16, mode, offsets[2], (n, *rest))

    @classmethod
    def layout(cls, room, shape):
        """Where status, labels and values begin, and the size of the file, in bytes."""
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
        """Write the file without values."""
        start, room = cls.pack(header)
        with open(file, "wb") as handle:
            handle.write(start)
            size = cls.layout(room, header["shape"])[-1]
            handle.truncate(size)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would kill the process
                os.posix_fallocate(handle.fileno(), 0, size)
        cls(file, "r+", header["kind"]).labels[:] = -1 if labels is None else labels

    def same(self, header):
        """Is this what `header` says, the scale and where the autoencoder was aside?"""
        return all(self.header[key] == header.get(key) for key in self.header if key not in ("scale", "vae"))

    def finish(self, **entries):
        self.header |= entries
        with self.file.open("r+b") as handle:
            handle.write(self.pack(self.header, self.room)[0])

    def read(self, where, flip, device):
        """Values of images `where` (n,), of the mirror images where flip (n,), both on the CPU -> (n, ...) float32"""
        values = torch.from_numpy(self.values[where.numpy(), flip.numpy().astype(int)])
        return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True).float()

    def whole(self):
        """Itself. Raises InputError where it is unfinished."""
        if (np.asarray(self.status) == 0).any() or self.header.get("scale", 1) is None:
            raise InputError(f"{self.file}: unfinished; the command that began it completes it")
        return self

    # what a `Store` has as well

    @property
    def indices(self):
        """Of the images that could be read."""
        return np.flatnonzero(np.asarray(self.status) == 1)

    @property
    def count(self):
        return len(self.indices)

    @property
    def how(self):
        return f"latents of {self.count} images of {self.header['size']} px and their mirror images, in {self.file}"

    def batches(self, order, steps, share):
        """As `Store.batches`, without pixels."""
        indices = self.indices
        for step in steps:
            yield torch.from_numpy(indices[order(step)[share].numpy()]), None


def fill_cache(file, header, images, encode, processes, args, flag, batch=32, finish=lambda cache: {}):
    """Make the file of a `Cache`, or go on where making it was interrupted, with any number of processes of one machine;
    no collective waits on any of them. Its size is stated first.

    encode(images (n, 3, S, S) in [-1, 1]) -> (n, 2, ...), of them and their mirror images; finish(cache) -> entries
    that its header gains at the end. -> whether there was anything to do. Raises InputError, naming `flag`.
    """
    file, say, device, kind = Path(file), processes.print, processes.device, header["kind"]
    unfinished, shape = Path(f"{file}.part"), header["shape"]
    if file.is_dir():
        raise InputError(f"{flag} {file}: is a folder; name a file")
    if not file.exists() and processes.world != processes.local_world:
        raise InputError(f"{flag}: runs on one machine, whose processes share the memory-mapped file")
    if processes.main and not file.exists() and not unfinished.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        need, free = Cache.layout(0, shape)[-1], shutil.disk_usage(file.parent).free
        say(f"{kind:8} {shape[0]} images and mirror images, {' x '.join(map(str, shape[2:]))} float16 each: "
            f"{need / 2**20:,.1f} MiB into {file}")  # fmt: skip
        if need > DISK_SHARE * free:
            raise InputError(f"{flag} {file}: needs {need / 2**20:,.1f} MiB, its disk has {free / 2**20:,.1f} free")
        new = Path(f"{unfinished}.{os.getpid()}")
        Cache.create(new, header, images.labels)
        try:
            os.link(new, unfinished)
        except FileExistsError:
            pass  # another command was faster: both fill that one
        except OSError:  # a disk without hard links
            os.replace(new, unfinished)
        new.unlink(missing_ok=True)
    while not file.exists() and not unfinished.exists():  # process 0 makes it
        time.sleep(0.1)
    if file.exists():
        if not Cache(file, kind=kind).same(header):
            raise InputError(f"{flag} {file}: holds other {kind}; name another file")
        return False
    cache = Cache(unfinished, "r+", kind)
    if not cache.same(header):
        raise InputError(f"{unfinished}: unfinished, of other images or another encoder; remove it first")
    mine = np.arange(processes.rank, len(images), processes.world)
    mine = mine[cache.status[mine] == 0].tolist()
    loader = DataLoader(Subset(images, mine), batch, num_workers=workers(args, processes))
    with torch.no_grad(), progress(total=len(images), initial=max(0, len(images) - processes.world * len(mine)),
                                   unit="img", desc="encode", disable=not processes.main) as bar:  # fmt: skip
        for where, pixels, good in loader:
            if good.any():
                cache.values[where[good].numpy()] = encode(pixels[good].to(device) / 127.5 - 1).half().cpu().numpy()
                cache.values.flush()  # before they are called encoded
            cache.status[where.numpy()] = np.where(good.numpy(), 1, 2)
            bar.update(min(len(where) * processes.world, len(images) - bar.n))
    if not processes.main:
        while not file.exists():
            time.sleep(0.2)
        return True
    while (cache.status == 0).any():  # the other processes' share
        time.sleep(0.2)
    if file.exists():  # another command made it meanwhile, from the same unfinished file
        return True
    unreadable = np.flatnonzero(cache.status == 2)
    try:
        images.check_unreadable(len(unreadable))
    except InputError:
        cache.status[unreadable] = 0  # the same command tries them again
        raise
    cache.finish(**finish(cache))
    cache.status.flush()
    os.replace(unfinished, file)
    return True


class LatentStatistics:
    """Mean and standard deviation of sampled latents, exactly, from a stream of posteriors."""

    def __init__(self):
        self.total = self.squares = self.count = 0

    def add(self, mean, logvar):
        """mean, logvar (N, C, h, w)"""
        mean, logvar = mean.double(), logvar.double()
        self.total = self.total + mean.sum((0, 2, 3)).cpu()
        self.squares = self.squares + (mean.square() + logvar.exp()).sum().cpu()
        self.count += mean[:, 0].numel()

    def result(self):
        """-> {"mean" per channel, "std" over all, "scale" = 1 / std}"""
        mean = self.total / self.count
        std = (self.squares / (self.count * len(mean)) - mean.mean() ** 2).sqrt().item()
        return {"mean": mean.tolist(), "std": std, "scale": 1 / std}


# ---- method -----------------------------------------------------------------------------------------------

X0_FLOOR = 0.04  # x0 errors are weighted 1 / (sigma^2 + this): the v loss, bounded near t = 0


def draw_times(n, sampling, mean_std, path, generator):
    """t (n,): uniform along the path's time, or logit-normal in it (arXiv 2403.03206, section 3.1)."""
    if sampling == "uniform":
        u = torch.rand(n, generator=generator, device=generator.device)
    else:
        u = torch.sigmoid(mean_std[0] + mean_std[1] * torch.randn(n, generator=generator, device=generator.device))
    return path.time(u)


def diffusion_loss(diffusion, network, x0, eps, t, y=None, drop=None, weights=None, tokens=None):
    """Squared error of the prediction at x_t = alpha x0 + sigma e, a mean per example, and where there are target
    tokens (N, T, D), the network being an `Aligned`, the alignment of its hidden tokens to them.

    x0, eps (N, *shape), t (N,), y (N,) classes, drop (N,) bool, weights (token_dim,) of EBFR
    -> (N,) float32, (N,) float32 or None
    """
    alpha, sigma = diffusion.path.alpha_sigma(like(t, x0))
    output, aligned = diffusion.output(network, alpha * x0 + sigma * eps, t, y, drop), None
    if tokens is not None:
        output, student = output
        aligned = alignment_loss(student, tokens)
    error = (output.float() - target(diffusion.path, diffusion.predict, x0, eps, t)).square()
    if weights is not None:
        error = error * weights
    if diffusion.predict == "x0":
        error = error / (sigma**2 + X0_FLOOR)
    return error.flatten(1).mean(1), aligned


@torch.no_grad()
def open_encoder(args, processes):
    """`--encoder`, fetched by local rank 0 alone -> it, and its tokens (1, T, D) of a blank image. Raises InputError where
    it cannot be had, or takes no images of --size, or gives no square grid of tokens.
    """
    resolution = PATCH_ENCODER_SIZE * max(1, args.size // 256)  # as published: 224 at 256 px, 448 at 512
    try:
        encoder = processes.local_first(lambda: load_encoder(args.encoder, processes.device, resolution))
    except ValueError as error:
        raise InputError(f"--{error}") from error
    try:
        tokens = encoder(torch.zeros(1, 3, args.size, args.size, device=processes.device))[0]
        as_map(tokens)
    except Exception as error:  # whatever the encoder's own code raises
        raise InputError(f"--encoder {args.encoder} on images of {args.size} px: {error}") from error
    return encoder, tokens


class Targets:
    """The tokens that a network's hidden tokens are aligned to, from the encoder or from a cache of what it made.

    make(images, cached): of images (N, 3, S, S) in [-1, 1], or of their tokens from `cache` -> (N, T, D). Attributes: dim;
    cache and encoder, one of them None. Raises InputError where the encoder cannot be had or does not fit.
    """

    def __init__(self, args, network, images, about, processes):
        self.args, self.device, self.cache, self.encoder = args, processes.device, None, None
        side = self.side = math.isqrt(network.num_tokens)
        file, what = args.cache_targets, f"--cache-targets {args.cache_targets}"
        if not (file and Path(file).exists()):
            self.encoder, tokens = open_encoder(args, processes)
            self.dim = tokens.shape[2]
        if file and self.encoder:
            header = about | {"kind": "tokens", "encoder": args.encoder, "shape": [len(images), 2, side**2, self.dim]}
            fill_cache(file, header, images, self._both, processes, args, "--cache-targets")
        if file:
            self.cache, self.encoder = Cache(file, kind="tokens").whole(), None
            header, grid = self.cache.header, math.isqrt(self.cache.header["shape"][2])
            check_images(about, header, what)
            if encoder_name(header["encoder"]) != encoder_name(args.encoder):
                raise InputError(f"{what}: tokens of {header['encoder']}, not of --encoder {args.encoder}; name another file")
            if grid != side:
                raise InputError(f"{what}: {grid} x {grid} tokens, {args.model} has {side} x {side}; name another file")
            self.dim = header["shape"][3]

    @torch.no_grad()
    def tokens(self, images):
        """What the encoder makes of images, on the network's grid: (N, T, D)"""
        with autocast(self.args.amp, self.device)[0]():
            tokens = self.encoder(images)[0]
        return resize_tokens(tokens.float(), self.side)

    def _both(self, images):
        return torch.stack((self.tokens(images), self.tokens(images.flip(-1))), 1)

    def make(self, images, cached=None):
        tokens = self.tokens(images) if cached is None else cached
        return make_target(tokens, self.args.repa, sigmas=self.args.repa_sigmas)


def image_noise(seed, step, stream, share, shape, device):
    """Standard normal noise (n, *shape) of the images at `share`, a slice, of a step's global batch. Each image's follows
    from (seed, step, stream) and its place alone, so that a process draws no other's.
    """
    g, noise = torch.Generator(device), torch.empty(share.stop - share.start, *shape, device=device)
    for row, number in zip(noise, seeds(seed, step, stream, count=share.stop)[share]):
        row.normal_(generator=g.manual_seed(number))
    return noise


def draw_flips(args, step, share):
    """Which images of a process's share are mirrored (n,), on the CPU, where cached data is looked up."""
    return ((torch.rand(args.batch, generator=generator(args.seed, step, 2)) < 0.5) & args.flip)[share]


def draw_step(args, step, share, diffusion, device):
    """What else is random in a step, of the images at `share` of the global batch, from (seed, step) and their place: t,
    noise, label drop, and the noise of the latents' posteriors (None in other spaces).
    """
    g = generator(args.seed, step, 1, device=device)
    t = draw_times(args.batch, args.t_sampling, args.t_logit_normal, diffusion.path, g)[share]
    drop = (torch.rand(args.batch, generator=g, device=device) < args.label_dropout)[share]
    eps, posterior = (
        image_noise(args.seed, step, stream, share, diffusion.shape, device) if wanted else None
        for stream, wanted in ((6, True), (7, diffusion.vae))
    )
    return t, eps, drop, posterior


def learning_rate(step, args, taken=None):
    """Linear warm-up over an optimizer's own steps (`taken` before this one; left out, all), then constant or falling
    linearly to zero at the last step of the run.
    """
    rate = args.lr * min(1, ((step if taken is None else taken) + 1) / max(args.warmup, 1))
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
def band_errors(diffusion, examples, seed, device, levels=(0.1, 0.5, 0.9)):
    """Power of the x0 error over power of the image (in latent space, of the latent), per radial band, at a low, middle
    and high t (DCTdiff, section 3) -> {t: [16 numbers]}, low to high; 1 is a prediction that knows nothing of the band,
    None a band without power. examples: batches (x0, y or None); their noise follows from the seed.
    """
    fields, predictions, noise = [], {level: [] for level in levels}, generator(seed, 2)
    for x0, y in examples:
        x0, y = x0.to(device), None if y is None else y.to(device)
        fields.append(diffusion.field(x0))
        eps = torch.randn(x0.shape, generator=noise).to(device)
        denoise = diffusion.denoiser(y)
        for level in levels:
            t = torch.full((len(x0),), level, device=device)
            alpha, sigma = diffusion.path.alpha_sigma(like(t, x0))
            predictions[level].append(diffusion.field(denoise(alpha * x0 + sigma * eps, t)[0]))
    fields = torch.cat(fields)
    ratios = {str(level): band_error(torch.cat(made), fields).tolist() for level, made in predictions.items()}
    return {level: [r if math.isfinite(r) else None for r in ratio] for level, ratio in ratios.items()}


@torch.no_grad()
def held_out_loss(diffusion, examples, args, weights, device):
    """Mean training loss of fixed examples, batches (x0, y or None), with times and noise that are the same in all runs."""
    g, total, count = generator(0, 4), 0.0, 0
    for x0, y in examples:
        t = draw_times(len(x0), args.t_sampling, args.t_logit_normal, diffusion.path, g).to(device)
        eps, y = torch.randn(x0.shape, generator=g).to(device), None if y is None else y.to(device)
        loss, _ = diffusion_loss(diffusion, diffusion.network, x0.to(device), eps, t, y, weights=weights)
        total, count = total + loss.sum().item(), count + len(x0)
    return total / count


# ---- measuring --------------------------------------------------------------------------------------------


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
        self.started, self.step_then, self.waited = time.perf_counter(), step, 0.0

    def timed(self, batches):
        """The batches, the time spent waiting for them counted."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

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
        elapsed, worst = time.perf_counter() - self.started, int(self.worst_run)
        rate = (step - self.step_then) * self.args.batch / elapsed
        line |= {"lr": lr, "images_per_s": round(rate, 1), "data_wait": round(self.waited / elapsed, 4)}
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
# the flow path); all others take DCTdiff's published settings, which clip nothing, in latent space SiT's (arXiv
# 2401.08740) with REPA's clipping.
TINY = dict(path="flow", predict="x0", t_sampling="logit-normal", ebfr=False, lr=2e-3, betas=[0.9, 0.99],
            weight_decay=0.03, warmup=100, lr_decay="linear", clip=1.0, ema=0.999, batch=64,
            steps=1800)  # fmt: skip
PUBLISHED = dict(path="vp", predict="eps", t_sampling="uniform", ebfr=True, lr=2e-4, betas=[0.99, 0.99],
                 weight_decay=0.03, warmup=5000, lr_decay="none", clip=0.0, ema=0.9999, batch=256, steps=500_000)  # fmt: skip
LATENT = PUBLISHED | dict(path="flow", predict="v", ebfr=False, lr=1e-4, betas=[0.9, 0.999], weight_decay=0.0, warmup=0,
                          clip=1.0, steps=400_000)  # fmt: skip
KEEP = {2: 4, 4: 9, 8: 18}  # coefficients kept per block [code]; 8 of 16 from 256 px on
SNR_SCALE = {32: 2.0, 64: 4.0, 128: 4.0, 256: 4.0, 512: 12.0}  # c of the vp paths by resolution, in DCT space [code]
# On the flow path c is B^2 [ours]: dividing by eta, about 128 B, makes the noise of a token B times that of a pixel.
MAY_CHANGE = set("steps device workers compile log_every eval_every save_every fresh benchmark out "
                 "val features features_weights lpips_vgg lpips_heads eval_images eval_only spectrum encode ckpt "
                 "latents vae cache_targets rmsc".split())  # fmt: skip
ALIGNMENT_DEPTH = 8  # at most, of the tap: of REPA's SiT-L and XL; 4 of 12 blocks in its SiT-B
ALIGNMENT_WEIGHT = {"repa": 0.5, "irepa": 1.0, "dog": 1.0}  # [code]; dog's, which builds on iREPA's recipe, is [ours]
ALIGNMENT_WIDTH = {True: 512, False: 2048}  # of repa's projector: nano and tiny models [ours], others [code]


def adopt(args):
    """Take images, size and space from the header of --latents, or from the autoencoder of --vae, where the command left
    them open; what it says must agree. -> the latents, or None. Raises InputError.
    """
    if not (args.latents or args.vae):
        return None
    if args.space not in (None, "latent"):
        raise InputError(f"--space {args.space}: --latents and --vae are for --space latent")
    args.space, latents = "latent", Cache(args.latents).whole() if args.latents else None
    if latents is None:
        own = Path(args.out or "") / "autoencoder.pt"  # of a run that goes on, where --vae is no longer there
        path = own if args.out and own.exists() and not Path(args.vae).exists() else args.vae
        known = read_checkpoint(path, "autoencoder")
        args.size = args.size or known["config"].get("size") or 256
        args.data = args.data or (known.get("args") or {}).get("data")
        return None
    header = latents.header
    if args.size not in (None, header["size"]):
        raise InputError(f"--size {args.size}: {args.latents} was made of images of {header['size']} pixels; leave it out")
    args.size, args.data = header["size"], args.data or header["data"]
    return latents


def complete(args):
    """Fill in what the command left open, from the model, the space and the resolution. Raises InputError."""
    network, sizes, _ = parse_model(args.model)
    if args.space is None:
        args.space = "latent" if args.latents or args.vae else "dct"
    if args.space == "latent" and not (args.latents or args.vae):
        raise InputError("--space latent: needs --latents FILE (of train_vae.py --encode) or --vae CKPT")
    args.data, args.size = args.data or "dead-leaves", args.size or 32
    tiny, dct = args.model.lower().partition("/")[0].endswith(("nano", "tiny")), args.space == "dct"
    given = [name for name in ("block", "keep", "ebfr") if getattr(args, name)]
    if given and not dct:
        raise InputError(f"--{' --'.join(given)}: only for --space dct")
    for name, value in (TINY if tiny else LATENT if args.space == "latent" else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, value if name != "ebfr" else value and dct)
    if dct and args.block is None:
        args.block = 8 if args.size >= 512 else 4 if args.size >= 128 or tiny else 2  # tiny networks want few tokens
    if dct and args.keep is None:
        args.keep = 8 if args.block == 4 and args.size >= 256 else KEEP.get(args.block, max(1, args.block**2 * 9 // 32))
    if args.snr_scale is None:
        nearest = min(SNR_SCALE, key=lambda size: abs(size - args.size))
        args.snr_scale = 1.0 if not dct else float(args.block**2) if args.path == "flow" else SNR_SCALE[nearest]
    if dct:
        make_codec(vars(args) | {"eta": 1.0})  # raises where size, block and keep do not fit together
    if args.out is None:
        args.out = f"runs/{short_name(args.latents or args.data)}-{args.size}-{args.space}-"
        args.out += args.model.lower().replace("/", "-")
        args.out += f"-{args.repa}" if args.repa else ""
    check_ranges(args, snr_scale=1e-9, repa_weight=0, repa_stop=1, repa_width=1)
    if not 0 <= args.label_dropout < 1:
        raise InputError(f"--label-dropout {args.label_dropout}: must lie in [0, 1)")
    complete_alignment(args, sizes["depth"] if network is DiT else sizes["depth"] // 2 * 2 + 1, tiny)


def complete_alignment(args, depth, tiny):
    """Fill in the flags of --repa and --rmsc, which mean nothing without them. Raises InputError."""
    used = {"encoder": "facebookresearch/dinov2:dinov2_vitb14"} if args.repa or args.rmsc else {}
    if args.cache_targets and args.repa and Path(args.cache_targets).exists():
        used["encoder"] = Cache(args.cache_targets, kind="tokens").header["encoder"]
    if args.repa:
        used |= {"repa_depth": max(1, min(ALIGNMENT_DEPTH, depth // 3)), "repa_stop": None,
                 "repa_weight": ALIGNMENT_WEIGHT[args.repa], "cache_targets": None}  # fmt: skip
    if args.repa == "repa":
        used["repa_width"] = ALIGNMENT_WIDTH[tiny]
    if args.repa == "dog" or args.rmsc:
        used["repa_sigmas"] = list(DOG_SIGMAS)
    for name in ("encoder", "repa_depth", "repa_weight", "repa_stop", "repa_sigmas", "repa_width", "cache_targets"):
        if getattr(args, name) is None:
            setattr(args, name, used.get(name))
        elif name not in used:
            chosen = f"--repa {args.repa}" if args.repa else "--rmsc alone" if args.rmsc else "no --repa"
            raise InputError(f"--{name.replace('_', '-')}: means nothing with {chosen}; leave it out")
    if args.benchmark:
        args.cache_targets = None  # a benchmark writes nothing, and times the encoder itself
    if args.repa_sigmas and not 0 <= args.repa_sigmas[0] < args.repa_sigmas[1]:
        low, high = args.repa_sigmas
        raise InputError(f"--repa-sigmas {low:g} {high:g}: the first must be the smaller, and not negative; 0 2 does")
    if args.repa and not 1 <= args.repa_depth <= depth:
        raise InputError(f"--repa-depth {args.repa_depth}: {args.model} has blocks 1 to {depth}")


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
    """What a run must go on with. Where an encoder lies may change, not which one it is."""
    kept = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE}
    if getattr(args, "latents", None):
        del kept["data"]  # where the images of the latents lie; that they are the same is checked
    return kept | {"encoder": encoder_name(args.encoder)}


def encoder_name(spec):
    return spec and spec.rpartition(":")[2]


def open_run(args, kind):
    """The checkpoint to resume from, or None. Raises InputError where RUN is another's, or made with other arguments."""
    run = Path(args.out)
    if (run / "checkpoint.pt").exists():
        if args.fresh:
            raise InputError(f"--fresh: {run} holds a run; --fresh starts in an empty folder only, name another --out")
        checkpoint = read_checkpoint(run, kind)
        there, now = checkpoint.get("args", {}), plain_arguments(args)
        there |= {"encoder": encoder_name(there.get("encoder")), "data": there.get("data", now.get("data"))}
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
    own = ("metrics.jsonl", "samples", "checkpoint.pt.tmp", "images-", "autoencoder.pt")
    own += (Path(getattr(args, "cache_targets", None) or "images-").name,)  # the file itself or its .part
    others = [p.name for p in run.iterdir() if not p.name.startswith(own)] if run.is_dir() else []
    if others or (args.fresh and run.is_dir() and any(run.iterdir())):
        there = ", ".join(others[:3]) or "a started run"
        raise InputError(f"--out {run} holds {there} and no checkpoint; name an empty folder")
    return None


# ---- benchmark --------------------------------------------------------------------------------------------


def benchmark(args, images, processes, encode, names, step, count_flops, dtype):
    """`--benchmark N`: times of N steps, part by part, and of file to network input; nothing is written.

    encode(pixels in [-1, 1]) makes the network's input; step(i, pixels, mark) does this process's share of step i and
    calls mark(name) after each part in `names`; count_flops() -> FLOPs of one image, forward and backward. images None:
    the step reads its data itself.
    """
    device, say, clock, threads = processes.device, processes.print, time.perf_counter, torch.get_num_threads()
    torch.set_num_threads(1)

    def lap(function, items):
        start, results = clock(), [function(item) for item in items]
        return (clock() - start) / len(results) * 1e3, results

    n, all_times, batch = args.batch // processes.world, [], None
    if images is not None:
        read, pixels = lap(images.read, range(len(images)))  # decode, crop, resize
        pixels = [image for image in pixels if image is not None]
        lap(lambda image: encode(image[None].to(device) / 127.5 - 1), pixels[:4])  # warms up
        encoding, _ = lap(lambda image: encode(image[None].to(device) / 127.5 - 1), pixels)
        synchronize(device)
        split = f"{read:.2f} file to pixels + {encoding:.2f} pixels to network input"
        say(f"data, one core   {read + encoding:8.2f} ms/image = {split}")
        say(f"                 {1e3 / (read + encoding):8.0f} images/s a core, {len(pixels)} images of {args.size} px")
        batch = torch.stack(pixels).repeat(math.ceil(n / len(pixels)), 1, 1, 1)[:n]
    torch.set_num_threads(threads)
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


def benchmark_diffusion(args, images, diffusion, trained, weights, latents, targets, processes, dtype):
    """`--benchmark N` of this program."""
    device, n = processes.device, args.batch // processes.world
    network, optimizer = wrap(trained, args, processes), make_optimizer(trained, args)
    where = None if latents is None else torch.from_numpy(np.resize(latents.indices, n))
    blank = torch.zeros(n, 3, args.size, args.size, device=device)  # where latents come without their images

    def step(i, pixels, mark):
        flip = draw_flips(args, i, slice(0, n))
        t, eps, drop, noise = draw_step(args, i, slice(0, n), diffusion, device)
        y = torch.zeros(n, dtype=torch.long, device=device) if diffusion.classes else None
        moments = None if latents is None else latents.read(where, flip, device)
        pixels = None if pixels is None else pixels.to(device)
        for start in range(0, n, n // args.grad_accum):
            part = slice(start, start + n // args.grad_accum)
            x0, x = clean(diffusion, cut(pixels, part), cut(moments, part), flip[part], cut(noise, part))
            mark("data")
            tokens = targets.make(blank[part] if x is None else x) if targets else None
            mark("targets")
            loss, aligned = diffusion_loss(diffusion, network, x0, eps[part], t[part], cut(y, part), drop[part], weights, tokens)
            mark("forward")
            (loss.mean() + args.repa_weight * aligned.mean() if targets else loss.mean()).backward()
            mark("backward")
        torch.nn.utils.clip_grad_norm_(trained.parameters(), args.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        mark("optimizer")

    names = ("data", "targets", "forward", "backward", "optimizer")
    benchmark(args, images, processes, diffusion.encode, names, step, lambda: diffusion_flops(diffusion, device), dtype)


def wrap(network, args, processes):
    return processes.wrap(torch.compile(network) if args.compile else network)


# ---- training ---------------------------------------------------------------------------------------------

GRID_STEPS, GRID_GUIDANCE = 50, 1.5
EVAL_IMAGES = 1024  # looked at by an evaluation, up to 64 px; a quarter of them above
SCALE_IMAGES, TARGET_IMAGES = 256, 256  # whose latents give a scale, whose tokens --rmsc looks at
SHOWN_SIGMAS = ((0.0, 1.0), (0.0, 2.0), (0.6, 2.0), (0.0, 4.0), (0.0, math.inf))  # that --rmsc shows beside its own


def set_up(args, kind):
    """What both trainers begin with -> the processes, the checkpoint to resume from or None, this process's share of a
    batch (a slice), images at once. Raises InputError.
    """
    processes = Processes(args.device)
    parts = processes.world * args.grad_accum
    if args.batch % parts:
        raise InputError(
            f"--batch {args.batch}: must be a multiple of {processes.world} processes x --grad-accum {args.grad_accum}"
        )
    local = args.batch // processes.world
    share = slice(processes.rank * local, (processes.rank + 1) * local)
    checkpoint = None if args.benchmark else open_run(args, kind)
    processes.barrier()  # all have looked before any writes
    return processes, checkpoint, share, args.batch // parts


def open_images(args, processes):
    """The images of --data, of a benchmark a few."""
    images = processes.local_first(lambda: Images(args.data, args.size))
    if args.benchmark:
        images.thin(2**24 // args.size**2)
    return images


def image_header(images):
    """What a cache says of the images it was made of."""
    return {"size": images.size, "data": images.spec, "count": len(images), "first": str(images.names[0]),
            "last": str(images.names[-1]), "classes": images.classes}  # fmt: skip


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


def cut(values, part):
    """Those of a part of a batch."""
    return None if values is None else values[part]


def load(batches, step, args, share, device, latents=None, targets=None, until=0):
    """From `step` on, what a step needs of its data: where (n,) and flip (n,), on the CPU; and on the device pixels
    (n, 3, S, S) uint8, the moments of cached latents, the tokens of cached targets up to step `until`, or None.
    """
    for step, (where, pixels) in enumerate(batches, step):
        flip = draw_flips(args, step, share)
        pixels = None if pixels is None else pixels.to(device, non_blocking=True)
        moments = latents.read(where, flip, device) if latents else None
        cached = targets.cache.read(where, flip, device) if targets and targets.cache and step < until else None
        yield where, flip, pixels, moments, cached


def mirrored(pixels, flip):
    """Pixels (n, 3, S, S) uint8 -> images in [-1, 1], mirrored where flip (n,)."""
    x = pixels / 127.5 - 1
    return torch.where(like(flip.to(x.device, non_blocking=True), x), x.flip(-1), x)


def clean(diffusion, pixels, moments, flip, noise):
    """What a step learns from: the moments of cached latents, mirrored already, or pixels (n, 3, S, S) uint8, mirrored here
    where flip (n,); noise samples the latents' posteriors -> x0 (n, *shape), images (n, 3, S, S) in [-1, 1] or None
    """
    x = None if pixels is None else mirrored(pixels, flip)
    if moments is None:
        return diffusion.encode(x, noise), x
    return diffusion.from_moments(*moments.chunk(2, 1), noise), x


@torch.no_grad()
def examples(args, diffusion, store, latents, labels, validation, device, batch):
    """The images that evaluations look at, of --val or else of the training data: batches (x0, y or None) on the CPU."""
    found, noise, count = [], generator(0, 5), EVAL_IMAGES if args.size <= 64 else EVAL_IMAGES // 4
    if args.val:
        latents = None
        validation.thin(count)
        labels = torch.tensor(validation.labels) if diffusion.classes else None
        batches = ((where[good], pixels[good]) for where, pixels, good in DataLoader(validation, batch) if good.any())
    else:
        numbers = torch.linspace(0, store.count - 1, min(store.count, count), dtype=torch.float64).long().split(batch)
        batches = ((torch.from_numpy(store.indices[n.numpy()]), None if latents else store[n]) for n in numbers)
    for where, pixels in batches:
        drawn = torch.randn(len(where), *diffusion.shape, generator=noise).to(device) if diffusion.vae else None
        as_is = torch.zeros(len(where), dtype=torch.bool)
        moments = latents.read(where, as_is, device) if latents else None
        x0, _ = clean(diffusion, None if latents else pixels.to(device), moments, as_is, drawn)
        found.append((x0.cpu(), labels[where] if diffusion.classes else None))
    if args.val:
        validation.check_unreadable(len(validation) - sum(len(x0) for x0, _ in found))
    return found


def evaluate(diffusion, shown, weights, folder, step, args, device, batch):
    """A grid of samples from fixed noise into RUN/samples/; the x0 error by radial band of the examples `shown` and, with
    --val, their loss. `batch`: images at a time; four times what training takes at once fits, there being no gradients.
    """
    count = 64 if args.size <= 64 else 16
    guidance, images = GRID_GUIDANCE if diffusion.classes and args.label_dropout else 1.0, []
    for part in torch.arange(count).split(batch):
        y = (part % len(diffusion.classes)).to(device) if diffusion.classes else None
        images.append(generate(diffusion, part, args.seed, device, y, steps=GRID_STEPS, guidance=guidance))
    save_grid(torch.cat(images), folder / "samples" / f"step{step:07d}.png", math.isqrt(count))
    result = {"x0_error_by_band": band_errors(diffusion, shown, args.seed, device)}
    return result | ({"val_loss": held_out_loss(diffusion, shown, args, weights, device)} if args.val else {})


def open_vae(args, latents, checkpoint, device):
    """The frozen autoencoder of latent space -> (vae, the config's part of it, where it is). Raises InputError."""
    own, header = Path(args.out) / "autoencoder.pt", latents.header if latents else {}
    begun = checkpoint["config"] if checkpoint else {}
    if begun and latents and header["autoencoder"] != begun["autoencoder"]:
        raise InputError(
            f"--latents {args.latents}: made by autoencoder {header['autoencoder']}, {args.out} was begun with latents of "
            f"{begun['autoencoder']}; give those, or another --out"
        )
    path = args.vae or (own if begun else header.get("vae"))
    path = own if begun and own.exists() and not Path(path).exists() else path
    if path is None:
        raise InputError(f"--latents {args.latents}: does not say where its autoencoder is; --vae RUN_OR_FILE does")
    wanted = header.get("autoencoder") or begun.get("autoencoder")
    vae, info = open_autoencoder(path, device, wanted, args.latents or args.out)
    if args.size % vae.factor:
        raise InputError(f"--size {args.size}: the autoencoder {path} takes multiples of {vae.factor}")
    side, scales = args.size // vae.factor, (begun, header, info["latent"] or {})
    scale = next((known["scale"] for known in scales if known.get("scale")), None)
    return vae, {"latent_shape": [vae.latent_channels, side, side], "scale": scale, "autoencoder": info["weights"]}, path


def keep_autoencoder(path, folder):
    """Copy an autoencoder into a run, which sampling then needs nothing beside."""
    known = read_checkpoint(path, "autoencoder")
    known |= {"model": known["ema"] or known["model"], "ema": None}
    kept = {part: known.get(part) for part in ("config", "model", "ema", "step", "latent")}
    write_atomically(folder / "autoencoder.pt", lambda f: torch.save(kept, f))


@torch.no_grad()
def measure_scale(store, vae, device):
    """1 / std of the latents of up to 256 images, for an autoencoder that does not know its scale."""
    statistics, count = LatentStatistics(), min(store.count, SCALE_IMAGES)
    for part in torch.linspace(0, store.count - 1, count, dtype=torch.float64).long().split(8):
        statistics.add(*vae.encode(store[part].to(device) / 127.5 - 1))
    return statistics.result()["scale"]


def check_images(about, header, what):
    """Raise InputError where the images that `about` is of (see `image_header`) are not those of a cache."""
    for key in ("size", "count", "first", "last", "classes"):
        there = header["shape"][0] if key == "count" else header[key]
        if about[key] != there:
            raise InputError(f"{what}: made of other images than {about['data']}: {key} {there}, now {about[key]}")


def make_network(config):
    """A network without weights, to look at. Raises InputError where its parts do not fit together."""
    with torch.device("meta"):
        return build_network(config | {"eta": 1.0})


def main(args):
    # ---- set-up
    latents = adopt(args)
    complete(args)
    if args.rmsc:
        return compare_targets(args, latents)
    processes, checkpoint, share, micro = set_up(args, "diffusion")
    device, folder, say, local = processes.device, Path(args.out), processes.print, share.stop - share.start
    step = checkpoint["step"] if checkpoint else 0
    vae, found, origin = open_vae(args, latents, checkpoint, device) if args.space == "latent" else (None, {}, None)
    if checkpoint and step >= args.steps:
        return finished(args, say, step, again=True)
    aligning = bool(args.repa) and step < (args.repa_stop or math.inf)

    # ---- data
    images, cached = None, args.cache_targets and Path(args.cache_targets).exists()
    other = latents is not None and args.data != latents.header["data"]  # named by --data: are they the same images?
    if latents is None or other or (aligning and not cached and not args.benchmark):
        try:
            images = open_images(args, processes)
        except InputError as error:
            if latents is None:
                raise
            raise InputError(
                f"{error}. For --repa it should be the images --latents {args.latents} was made of: --data says where they "
                "are now, or --cache-targets FILE keeps what the encoder makes of them"
            ) from error
    about = image_header(images) if images else latents.header | {"count": latents.header["shape"][0]}
    if latents:
        check_images(about, latents.header, f"--latents {args.latents}")
    if args.classes and not about["classes"]:
        raise InputError(f"--classes: {args.data} has none; sort its images into a folder a class, or leave it out")
    classes = about["classes"] if args.classes is not False else None
    validation = processes.local_first(lambda: Images(args.val, args.size)) if args.val else None
    if validation and classes and validation.classes != classes:
        raise InputError(f"--val {args.val}: its classes are {validation.classes}, those of the data {classes}")
    named = ("space", "size", "model", "path", "snr_scale", "predict", "label_dropout", "block", "keep")
    config = {name: getattr(args, name) for name in named} | {"classes": classes} | found
    network = make_network(config)  # raises before any work
    if not args.benchmark:
        folder.mkdir(parents=True, exist_ok=True)
    targets = Targets(args, network, images, about, processes) if aligning else None
    if latents and (args.benchmark or not (targets and targets.encoder)):
        store = latents
    else:
        store = open_store(args, images, processes, None if latents else checkpoint)
        if latents:
            store.align(latents.indices)
    if checkpoint and checkpoint["data_count"] != store.count:
        raise InputError(f"--latents {args.latents}: {store.count} images, {folder} began with {checkpoint['data_count']}")
    labels = torch.from_numpy(latents.labels.astype(np.int64)) if latents else store.labels

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
    elif vae and not config["scale"]:
        config |= {"scale": measure_scale(store, vae, device)}
    torch.manual_seed(args.seed)  # the same weights in every process
    amp, dtype = autocast(args.amp, device)
    diffusion = Diffusion(config, vae=vae, amp=amp)
    trained = network = diffusion.network.to(device).train()
    if args.repa:
        dim = targets.dim if targets else checkpoint["target_dim"]
        projector = make_projector(args.repa, network.width, dim, args.repa_width)
        trained = Aligned(network, projector.to(device), args.repa_depth)
    weights = ebfr_weights(torch.tensor(config["entropies"]), config["keep"]).to(device) if args.ebfr else None
    if args.benchmark:
        return benchmark_diffusion(args, images, diffusion, trained, weights, latents, targets, processes, dtype)
    optimizer, ema = make_optimizer(trained, args), copy.deepcopy(network).eval().requires_grad_(False)
    scaler = make_scaler(device, dtype)

    # ---- resume
    if checkpoint:
        load_weights(network, checkpoint["model"], folder)
        load_weights(ema, checkpoint["ema"], folder)
        if args.repa:
            load_weights(trained.projector, checkpoint["projector"], folder)
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["scaler"])
    elif vae and processes.main:
        keep_autoencoder(origin, folder)
    sampled = Diffusion(config, ema, vae, amp)
    order = DataOrder(store.count, args.batch, args.seed)
    shown = None
    if processes.main:
        shown = examples(args, diffusion, store, latents, labels, validation, device, 4 * micro)
    epochs = args.steps * args.batch / store.count
    say(f"data     {store.how}" + (f", {len(classes)} classes" if classes else ", no classes"))
    if vae:
        say(f"latents  scale {config['scale']:.4f}, autoencoder {config['autoencoder']} ({origin})")
    millions = sum(p.numel() for p in network.parameters() if p.requires_grad) / 1e6
    say(f"model    {args.model}, {millions:.2f}M parameters, input {' x '.join(map(str, diffusion.shape))}")
    say(f"         {args.path} path, c = {args.snr_scale:g}, predicts {args.predict}")
    if args.repa:
        millions = sum(p.numel() for p in trained.projector.parameters()) / 1e6
        say(f"aligned  block {args.repa_depth} to {args.repa} of {args.encoder}, weight {args.repa_weight:g}, "
            f"projector {millions:.2f}M" + (f", until step {args.repa_stop}" if args.repa_stop else ""))  # fmt: skip
    say(f"training {args.steps} steps of {args.batch} = {epochs:.1f} epochs, on {processes.world} x {device.type}")
    say(f"         into {folder}" + (f", resumed at step {step}" if checkpoint else ""))

    def save():
        if processes.main:
            state = {
                "model": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "step": step, "images_seen": step * args.batch, "config": config,
                "projector": trained.projector.state_dict() if args.repa else None,
                "target_dim": dim if args.repa else None,
                # the data order and every random draw of the steps to come follow from these
                "random": {"seed": args.seed, "next_step": step}, "data_count": store.count,
                "args": plain_arguments(args),
            }  # fmt: skip
            write_atomically(folder / "checkpoint.pt", lambda f: torch.save(state, f))

    # ---- loop
    flops, peak = 0, 1
    if device.type == "cuda":
        flops, peak = diffusion_flops(diffusion, device), matmul_rate(device, dtype) * processes.world
    wrapped = wrap(trained if aligning else network, args, processes)
    log = Log(args, processes, store.count, step, flops, peak)
    until = min(args.repa_stop or args.steps, args.steps) if targets else args.steps
    batches = (store.batches(order, range(step, until), share),  # with images for the encoder, while it runs
               (latents or store).batches(order, range(until, args.steps), share))  # fmt: skip
    batches = load(itertools.chain(*batches), step, args, share, device, latents, targets, until)
    for where, flip, pixels, moments, cached in log.timed(prefetch(batches)):
        if targets and step == args.repa_stop:
            wrapped, targets = wrap(network, args, processes), None
        t, eps, drop, noise = draw_step(args, step, share, diffusion, device)
        y = labels[where].to(device) if classes else None
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        for start in range(0, local, micro):
            part, last = slice(start, start + micro), start + micro == local
            x0, x = clean(diffusion, cut(pixels, part), cut(moments, part), flip[part], cut(noise, part))
            tokens = targets.make(x, cut(cached, part)) if targets else None
            with processes.no_sync(wrapped, last):
                loss, aligned = diffusion_loss(diffusion, wrapped, x0, eps[part], t[part], cut(y, part), drop[part],
                                               weights, tokens)  # fmt: skip
                total = loss.mean() + args.repa_weight * aligned.mean() if targets else loss.mean()
                scaler.scale(total / args.grad_accum).backward()
            log.add("loss", loss)
            log.add("loss_by_quarter_of_t", loss, (t[part] * 4).long().clamp_max(3), bins=4)
            if targets:
                log.add("alignment", aligned)
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
                log.write(step=step, **evaluate(sampled, shown, weights, folder, step, args, device, 4 * micro))
            log.restart_clock(step)
    log.bar.close()
    finished(args, say, step)


def compare_targets(args, latents):
    """`--rmsc`: LDS, RMSC and directional energy by band of raw, iREPA and DoG targets, on the data, before any training;
    and a picture of them.
    """
    processes = Processes(args.device)
    args.repa, args.cache_targets, config = args.repa or "repa", None, vars(args) | {"classes": None}
    if latents:
        channels, side = latents.header["shape"][2] // 2, latents.header["shape"][3]
        config |= {"latent_shape": [channels, side, side]}
    elif args.space == "latent":
        config |= open_vae(args, latents, None, processes.device)[1]
    images = open_images(args, processes)
    targets = Targets(args, make_network(config), images, image_header(images), processes)
    if not processes.main:
        return
    images.thin(TARGET_IMAGES)
    found, seen = [], []
    with progress(total=len(images), unit="img", desc="targets", leave=False) as bar:
        for _, pixels, good in DataLoader(images, min(32, args.batch)):
            seen.append(pixels[good])
            found.append(targets.tokens(seen[-1].to(processes.device) / 127.5 - 1).cpu())
            bar.update(len(good))
    tokens, say, side = torch.cat(found), processes.print, targets.side
    rows = {"raw (repa)": ("repa",), "irepa": ("irepa",)}
    rows |= {"dog {:g} {:g}".format(*sigmas): ("dog", sigmas) for sigmas in (args.repa_sigmas, *SHOWN_SIGMAS)}
    pick = torch.linspace(0, len(tokens) - 1, min(8, len(tokens)), dtype=torch.float64).long()
    bins, pictures = max(2, min(8, side // 2)), [torch.cat(seen)[pick] / 127.5 - 1]
    say(f"{args.encoder} on {len(tokens)} images of {images.spec}: {side} x {side} tokens of {targets.dim}")
    say("target         LDS   RMSC  directional energy by band, low to high")
    for name, how in rows.items():
        made = []
        for part in tokens.split(16):  # pairs of tokens take room
            field = as_map(make_target(part, *how))
            made.append(torch.cat((lds(field)[:, None], rmsc(field)[:, None], directional_energy(field, bins)), 1))
        means = torch.cat(made).mean(0).tolist()
        say(f"{name:12}{means[0]:6.3f} {means[1]:6.3f}  " + " ".join(f"{energy:.3f}" for energy in means[2:]))
        pictures.append(principal_colours(make_target(tokens[pick], *how), args.size))
    file = save_grid(torch.cat(pictures), f"{args.out}-targets.png", len(pick))
    say(f"picture {file}: images, and a row a target, in its first three principal components")


def principal_colours(tokens, size):
    """The first three principal components of tokens (N, T, D) as images (N, 3, size, size) in [-1, 1]."""
    flat = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(0)  # (N T, D)
    colours = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].mT
    colours = (colours / (2 * colours.std(0) + 1e-6)).clamp(-1, 1).unflatten(0, tokens.shape[:2])  # (N, T, 3)
    return F.interpolate(as_map(colours), (size, size))


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
    cap = " (all kept: the rest is lost to halved chroma)"
    say("         PSNR by keep, dB: " + ", ".join(f"{k}: {psnr[k - 1]:.1f}" for k in shown) + cap)
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


def recipe_defaults(**recipes):
    """recipes: name=dict -> each(name), the end of a help text: a flag's default in each of them."""

    def each(name):
        shown = {}
        for which, recipe in recipes.items():
            value = " ".join(map(str, recipe[name])) if isinstance(recipe[name], list) else str(recipe[name])
            shown.setdefault(value, []).append(which.replace("_", " "))
        if len(shown) == 1:
            return f"(default: {next(iter(shown))})"
        return "(default: " + ", ".join(f"{value} for {' and '.join(names)}" for value, names in shown.items()) + ")"

    return each


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
    add("--clip", type=float, metavar="X", help=f"largest gradient norm, 0 for none {both('clip')}")
    add("--ema", type=float, metavar="X", help=f"decay of the average of the weights, 0 for none {both('ema')}")
    add_device_flags(add)
    add("--compile", action="store_true", help="torch.compile the network")
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
    add, both = parser.add_argument, recipe_defaults(nano_or_tiny_models=TINY, others=PUBLISHED, others_on_latents=LATENT)
    add("--data", metavar="SPEC",
        help="folder, .zip, cifar10, dead-leaves or dead-leaves:full (default: dead-leaves, with --latents what they were "
        "made of)")  # fmt: skip
    add("--val", metavar="SPEC", help="images held out, whose loss evaluations report (default: none)")
    add("--size", type=int, metavar="PIXELS",
        help="images are cropped and resized to this (default: 32, with --latents or --vae theirs)")  # fmt: skip
    add("--out", metavar="RUN", help="run folder (default: runs/DATA-SIZE-SPACE-MODEL)")
    add("--space", choices=("dct", "pixel", "latent"),
        help="what is diffused (default: latent with --latents or --vae, else dct)")  # fmt: skip
    add("--latents", metavar="FILE", help="latent cache of train_vae.py --encode, whose header says what else is needed")
    add("--vae", metavar="CKPT", help="autoencoder: run of train_vae.py or SD-VAE weights; encodes at every step, or says "
        "where that of --latents is now (default: where it was)")  # fmt: skip
    add("--model", default="dit-nano", metavar="NAME",
        help="uvit-nano|tiny|s|m|l|h or dit-nano|tiny|s|b|l|xl, in pixel and latent space with /PATCH "
        "(default: dit-nano)")  # fmt: skip

    add("--path", choices=tuple(PATHS), help=f"noise path; vp-sd is vp with Stable Diffusion's schedule {both('path')}")
    add("--predict", choices=("eps", "v", "x0"), help=f"what the network predicts {both('predict')}")
    add("--t-sampling", choices=("uniform", "logit-normal"), help=f"distribution of t {both('t_sampling')}")
    add("--t-logit-normal", type=float, nargs=2, default=[0.5, 1.0], metavar=("MEAN", "STD"),
        help="of logit t (default: 0.5 1)")  # fmt: skip
    add("--snr-scale", type=float, metavar="C",
        help="SNR scaling (default: 1; in DCT space B^2 on flow, on vp 2 to 12 by size)")  # fmt: skip
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
    add("--repa", choices=("repa", "irepa", "dog"),
        help="align hidden tokens to an encoder's: raw, spatially normalised, or without their low spatial frequencies "
        "(default: off)")  # fmt: skip
    add("--encoder", metavar="SPEC",
        help="hog, or a torch.hub entry REPO:ENTRY, REPO a local folder or on GitHub (default: "
        "facebookresearch/dinov2:dinov2_vitb14)")  # fmt: skip
    add("--repa-depth", type=int, metavar="K",
        help="the block after which tokens are aligned (default: a third of the network, at most 8)")  # fmt: skip
    add("--repa-weight", type=float, metavar="W", help="of the alignment loss (default: 0.5 for repa, 1 for irepa and dog)")
    add("--repa-stop", type=int, metavar="STEP", help="align no longer from this step on (default: never)")
    add("--repa-sigmas", type=float, nargs=2, metavar=("S1", "S2"),
        help="of dog, in tokens: a band-pass, a high-pass where S1 is 0; S2 may be inf "
        "(default: {:g} {:g})".format(*DOG_SIGMAS))  # fmt: skip
    add("--repa-width", type=int, metavar="N",
        help="width of repa's projector (default: 512 for nano or tiny models, 2048 for others)")  # fmt: skip
    add("--cache-targets", metavar="FILE", help="keep the encoder's tokens of all images and mirror images in this file, "
        "made at the first use (default: off, the encoder runs at every step)")  # fmt: skip
    add("--rmsc", action="store_true", help="only measure the targets of --encoder on the data, train nothing")
    add_training_flags(add, both)
    return parser


if __name__ == "__main__":
    run_program(main, make_parser().parse_args())
