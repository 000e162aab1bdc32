"""Spectrum Matching (Ning et al., 2026, arXiv 2603.14645): losses on, and measures of, the spectrum of VAE latents.

Latents are easy to diffuse when their power falls with frequency as that of images does, a little flatter. ESM pulls
the latent's radial spectrum to the image's times f^delta; DSM makes the decoder turn low-passed latents into low-passed
images, so that a frequency means the same on both sides. KL, EQ-VAE, scale equivariance and VA-VAE's loss, which the
paper reads as special cases, stand beside them.

    loss = esm_loss(images, latents)                     # (N, 3, 64, 64), (N, 4, 16, 16) -> scalar
    loss = l1(decode(low_pass(latents, 10)), low_pass(images, 10))     # DSM

All functions take (N, C, H, W) of any size (`low_pass`: multiples of its block), are differentiable, and compute in
float32 or wider even under autocast.
"""

import functools

import torch
import torch.nn.functional as F

from dct import blockify, dct2, idct2, unblockify

BINS = 16  # radial bands, as in the paper's code
DSM_KEEP_ALL, DSM_LEVELS, DSM_BLOCK = 0, (8, 10, 12), 8  # the k of a training step is one of all four [code]
BLUR_SIGMA, BLUR_SIZE = 1.2, 7  # of the image before it is resized to the latent [code]


def in_float32(function):
    """Decorator: autocast off, tensors of half precision widened."""

    def widen(value):
        return value.to(torch.promote_types(value.dtype, torch.float32)) if isinstance(value, torch.Tensor) else value

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        args, kwargs = [widen(a) for a in args], {name: widen(a) for name, a in kwargs.items()}
        device = next(a.device.type for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


# ---- radial spectra ---------------------------------------------------------------------------------------


def _radius(height, width, device=None):
    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    return torch.hypot(rows[:, None].double(), cols.double())  # (H, W), of every DCT coefficient from DC


@functools.lru_cache(maxsize=64)
def radial_bands(height, width, bins=BINS, device=None):
    """Band floor(bins r / r_max) of every DCT coefficient, r its distance from DC -> (H, W) long, 0..bins-1."""
    with torch.inference_mode(False):  # a cached tensor must stay usable by autograd
        radius = _radius(height, width, device)
        return (bins * radius / radius[-1, -1].clamp_min(1)).floor().long().clamp_max(bins - 1)


def bands_in_use(height, width, bins=BINS):
    """The bands that hold a coefficient besides DC -> list of 0..bins-1; of fields less than 13 wide not all do: the
    first of an 8 x 8 field holds DC alone.
    """
    cells = _cells(height, width, bins, None).tolist()
    return [band for band in range(bins) if cells[band] > (band == 0)]


@functools.lru_cache(maxsize=64)
def _cells(height, width, bins, device):
    """How many coefficients each band has (bins,); cached, since counting waits for the device."""
    with torch.inference_mode(False):
        return torch.bincount(radial_bands(height, width, bins, device).flatten(), minlength=bins)


def _band_sums(x, bins):
    """(N, H, W) -> sums over the cells of each radial band (N, bins), and their numbers (bins,)"""
    band = radial_bands(*x.shape[-2:], bins, x.device).flatten()
    return x.new_zeros(len(x), bins).index_add(1, band, x.flatten(1)), _cells(*x.shape[-2:], bins, x.device)


@in_float32
def psd(x, bins=BINS):
    """Radial power spectral density (section 3.1): subtract the spatial mean, DCT of the whole frame, square, mean
    over channels, mean over the cells of each radial band. x (N, C, H, W) -> (N, bins), units of x squared.
    The DC cell is zero but counts in the size of its band, as in the authors' code.
    """
    total, cells = _band_sums(dct2(x - x.mean((-2, -1), keepdim=True)).square().mean(1), bins)
    return total / cells.clamp_min(1)


@in_float32
def variance_of(power, height, width):
    """Variance of fields of height x width about their mean, mean over channels, from their `psd` (N, bins) -> (N,)"""
    return power @ _cells(height, width, power.shape[1], power.device).to(power.dtype) / (height * width)  # Parseval


@in_float32
def power_law_exponent(x, delta=0.0, bins=BINS):
    """alpha of power ~ 1 / f^alpha (section 3.1): slope of log power against log radius over radial bands, of x
    (N, C, H, W), H W > 2 -> scalar; with `delta`, of its spectrum times f^delta, f = 1..bins, as ESM's target has it.

    Power is averaged over batch and channels; within a band, logarithms are averaged on both sides, so that an exact
    power law gives its exponent exactly however wide the bands are.
    """
    power = dct2(x).square().mean((0, 1))  # (H, W)
    radius = _radius(*x.shape[-2:], x.device).to(power.dtype)
    ac = (radius > 0).to(power.dtype)  # DC has no place on a logarithmic axis
    fields = torch.stack([ac] + [ac * v.clamp_min(1e-20).log() for v in (radius, power)])
    (count, f, p), _ = _band_sums(fields, bins)
    used = count > 0
    f, p = f[used] / count[used], p[used] / count[used] + delta * torch.arange(1, bins + 1, device=x.device)[used].log()
    f, p = f - f.mean(), p - p.mean()
    return -(f * p).sum() / f.square().sum()


@in_float32
def band_error(prediction, reference, bins=BINS):
    """Power of the error over power of the reference in each radial band, over a batch (N, C, H, W) -> (bins,).
    1 is a prediction that knows nothing of the band; nan marks a band without power, of small fields also the first.
    """
    power = psd(reference, bins).sum(0)
    return torch.where(power > 1e-9 * power.sum(), psd(prediction - reference, bins).sum(0) / power, torch.nan)


# ---- encoding spectrum matching ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=16)
def _blurred_resampling(n, m, dtype, device):
    """(m, n): zero-padded Gaussian blur, then bicubic interpolation without antialiasing, along an axis of n pixels."""
    with torch.inference_mode(False), torch.no_grad():
        g = torch.exp(-(torch.arange(BLUR_SIZE).double() - BLUR_SIZE // 2).square() / (2 * BLUR_SIGMA**2))
        x = torch.eye(n, dtype=torch.float64)[None, None]
        x = F.conv2d(x, (g / g.sum()).view(1, 1, -1, 1), padding=(BLUR_SIZE // 2, 0))
        return F.interpolate(x, (m, n), mode="bicubic")[0, 0].to(device, dtype)


def blurs(width):
    """Whether the authors blur the image before they resize it to a latent: except where that is 32 wide [code]."""
    return width != 32


@in_float32
def resize_to_latent(images, size, blur=None):
    """Images (N, C, H, W) as ESM compares them with a latent: blurred by a zero-padded 7 x 7 Gaussian of sigma 1.2
    (None: where the authors do, see `blurs`), then bicubic without antialiasing -> (N, C, *size). The two are linear
    along each axis: two matrix products do them.
    """
    if not (blurs(size[-1]) if blur is None else blur):
        return F.interpolate(images, size, mode="bicubic")
    rows, cols = (_blurred_resampling(n, m, images.dtype, images.device) for n, m in zip(images.shape[-2:], size))
    return rows @ (images @ cols.mT)


@in_float32
def target_power(power, delta=1.0):
    """The spectrum latents should have: that of images S (N, bins) times f^delta, f = 1..bins (section 3.2)."""
    return power * torch.arange(1, power.shape[1] + 1, dtype=power.dtype, device=power.device) ** delta


@in_float32
def log_shares(power):
    """s = log(1 + 1e-8 + S) of spectra S (N, bins), as `psd` gives them, divided by its sum (section 3.2) -> (N, bins).
    Not free of scale: s is as steep as S where S is small, and the flatter the larger S is.
    """
    s = torch.log(1 + 1e-8 + power)
    return s / s.sum(1, keepdim=True).clamp_min(1e-12)


def spectral_kl(target, shares):
    """KL(target || shares) of two normalised spectra (N, bins) -> (N,). The paper's published numbers are of mean
    spectra: shares averaged over the images first.
    """
    return (torch.xlogy(target, target) - target * shares.clamp_min(1e-12).log()).sum(1)


@in_float32
def esm_loss(images, latents, delta=1.0, bins=BINS, blur=None):
    """Encoding spectrum matching (section 3.2): KL(target || latent) between log spectra, mean over the batch.

    images (N, 3, H, W) in [-1, 1], latents (N, C, h, w) sampled from the posterior -> scalar. The target is the
    spectrum of the image, resized to the latent as in `resize_to_latent`, times f^delta.
    """
    target = target_power(psd(resize_to_latent(images, latents.shape[-2:], blur), bins), delta)
    return spectral_kl(log_shares(target), log_shares(psd(latents, bins))).mean()


def compare_with_target(image, latent, height, width, delta=1.0):
    """Spectra of latents beside the target's, image x f^delta. image, latent (N, BINS): `psd` of every image, resized
    to the latent of height x width, and of every latent -> dict of plain values.

    "raw" is as ESM sees them; at "unit_std" latents, target and image are brought to std 1 over the data set (about
    each field's mean) before the logarithm, which is not free of scale. Each holds mean shares of log power of the
    `bands` that have coefficients; the KL of those mean spectra, which is what the paper publishes, and the larger mean
    of the KLs per image, which is what ESM lowers; and the latents' share in the upper half less the target's.
    """
    spectra = {"image": image, "target": target_power(image, delta), "latent": latent}
    variances = {name: variance_of(power, height, width).mean() for name, power in spectra.items()}
    used = bands_in_use(height, width)
    upper = torch.tensor(used) >= BINS // 2
    result = {"delta": delta, "bands": [band + 1 for band in used]}
    result["spatial_std"] = {name: variance.sqrt().item() for name, variance in variances.items()}
    for scale in ("unit_std", "raw"):
        divisors = variances if scale == "unit_std" else dict.fromkeys(spectra, torch.ones(()))
        shares = {n: log_shares(power / divisors[n].clamp_min(1e-12))[:, used] for n, power in spectra.items()}
        means = {name: share.mean(0) for name, share in shares.items()}
        result[scale] = {f"{name}_shares": mean.tolist() for name, mean in means.items()} | {
            "kl_of_mean_spectra": spectral_kl(means["target"][None], means["latent"][None]).item(),
            "mean_of_kls_per_image": spectral_kl(shares["target"], shares["latent"]).mean().item(),
            "upper_share": (means["latent"] - means["target"])[upper].sum().item(),
        }
    return result


# ---- decoding spectrum matching ---------------------------------------------------------------------------


def low_pass_mask(k, block=DSM_BLOCK, device=None):
    """DSM's spectral mask (section 3.3): True where a coefficient u, v of an 8 x 8 block stays, u + v < 15 - k; of the
    64 that is 28, 15, 6 for k = 8, 10, 12 and all for k = 0. Other block sizes cut at the same share of the diagonal.
    """
    u = torch.arange(block, device=device)
    return u[:, None] + u < (15 - k) * block / DSM_BLOCK


def low_pass(x, k, block=DSM_BLOCK):
    """Block DCT, `low_pass_mask`, inverse. (N, C, H, W) -> the same shape; for latents less than 16 wide see
    `block_that_fits`. Raises ValueError where blocks do not fit.
    """
    blocks = blockify(x.to(torch.promote_types(x.dtype, torch.float32)), block)
    return unblockify(idct2(dct2(blocks) * low_pass_mask(k, block, x.device)))


def block_that_fits(height, width):
    """DSM's block for a latent: the largest of 8, 4 and 2 that divides it and is at most half its side, as in the
    authors' latents (16 and 32 wide, blocks of 8), or None. A block as large as the latent would make the mask a
    low-pass of the frame, and the latents far too smooth.
    """
    fits = (b for b in (DSM_BLOCK, 4, 2) if height % b == width % b == 0 and 2 * b <= min(height, width))
    return next(fits, None)


# ---- the special cases ------------------------------------------------------------------------------------


@in_float32
def kl_loss(mean, logvar):
    """KL of the posterior from N(0, 1) (SD-VAE): a sum over latent dimensions, mean over the batch -> scalar, nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


@in_float32
def scale_and_rotate(x, size, quarter_turns):
    """EQ-VAE's transform (arXiv 2502.09509): bilinear to `size` (height, width), then turned -> (N, C, *size), or its
    transpose. Done to latent and image alike: the decoder must commute with it.
    """
    return torch.rot90(F.interpolate(x, size, mode="bilinear"), quarter_turns, (-2, -1))


@in_float32
def downscale(x, factor):
    """Scale equivariance (arXiv 2502.14831): factor x factor averages, of latent and image alike."""
    return F.avg_pool2d(x, factor)


@in_float32
def vf_loss(latents, features, matrix_margin=0.25, cosine_margin=0.5):
    """VA-VAE's vision-foundation loss (arXiv 2501.01423): mean relu(|cos(z_i, z_j) - cos(f_i, f_j)| - 0.25) over pairs
    plus mean relu(1 - 0.5 - cos(z_i, f_i)).

    latents (N, D, h, w), projected to the width of features (N, D, h', w'), which are resized to h x w -> scalar
    """
    features = F.interpolate(features, latents.shape[-2:], mode="bilinear", antialias=True)
    z, f = (F.normalize(x.flatten(2), dim=1) for x in (latents, features))  # (N, D, T)
    matrices = (z.mT @ z - f.mT @ f).abs()  # (N, T, T)
    return F.relu(matrices - matrix_margin).mean() + F.relu(1 - cosine_margin - (z * f).sum(1)).mean()


# ---- directional spectra ----------------------------------------------------------------------------------


@in_float32
def rmsc(x):
    """RMSC (section 3.5): sqrt(mean_t |u_t - mean u|^2) of the unit vectors u_t = z_t / |z_t| of a field, each position
    t a token. (N, C, H, W) -> (N,), 0 where all point one way, at most 1.
    """
    u = F.normalize(x.flatten(2), dim=1)  # (N, C, T)
    return (u - u.mean(2, keepdim=True)).square().sum(1).mean(1).clamp_min(1e-12).sqrt()


@in_float32
def directional_energy(x, bins=BINS):
    """The same by Parseval (section 3.5): AC energy of the DCT of the unit vectors over the number of positions, in
    radial bands. (N, C, H, W) -> (N, bins), whose sum is rmsc(x)^2.
    """
    energy = dct2(F.normalize(x, dim=1)).square().sum(1) * (_radius(*x.shape[-2:], x.device) > 0)  # (N, H, W)
    return _band_sums(energy, bins)[0] / (x.shape[-2] * x.shape[-1])


# ---- patch artefacts --------------------------------------------------------------------------------------


@in_float32
def patch_artefacts(x, period):
    """How much the borders of patches or blocks, `period` pixels apart, show (Wang, Bovik & Evans, ICIP 2000): power
    of the absolute differences of neighbouring pixels at the harmonics k / period, over what a power law through the
    two frequencies beside each of them has there, along rows and columns.

    x (N, C, H, W) of any range -> scalar, of the whole batch: about 1 where nothing is periodic. It grows with the
    number of periods in a frame: compare equal sizes. Absolute differences, since steps at borders are up as often as
    down: a mosaic's own spectrum has zeros at these frequencies. Raises ValueError for a period below 2 or above a
    third of a side.
    """
    if not 2 <= period <= min(x.shape[-2:]) // 3:
        raise ValueError(f"period {period} must lie between 2 and a third of an image of {x.shape[-2]}x{x.shape[-1]}")
    peaks = expected = 0
    for field in (x, x.mT):
        periods = field.shape[-1] // period - 1  # whole ones, around their borders: a harmonic lies in a single bin
        steps = field.diff(dim=-1).abs()[..., period // 2 :][..., : periods * period]
        power = torch.fft.rfft(steps).abs().square().flatten(0, -2).mean(0).clamp_min(1e-20) / periods
        k = torch.arange(1, period // 2 + 1, device=x.device) * periods
        below, above = power[k - 1].log(), power[torch.minimum(k + 1, periods * period - k - 1)].log()
        peaks = peaks + power[k].sum()
        share = ((k / (k - 1)).log() / ((k + 1) / (k - 1)).log()).to(power.dtype)
        expected = expected + torch.lerp(below, above, share).exp().sum()
    return peaks / expected
