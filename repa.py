"""Representation alignment: a diffusion network's hidden tokens learn to predict a frozen encoder's (REPA, arXiv
2410.06940; iREPA; REPA-DoG of Spectrum Matching, arXiv 2603.14645, section 3.5).

    encoder = load_encoder("facebookresearch/dinov2:dinov2_vitb14")     # downloaded by torch.hub
    encoder = load_encoder("some/folder:entry")                         # a folder with a hubconf.py
    encoder = load_encoder("hog")                                       # oriented gradients: no weights at all

    tokens, summary = encoder(images)                                   # (N, 3, H, W) in [-1, 1] -> (N, T, D), (N, D)
    target = dog_target(resize_tokens(tokens, 16), 0, 2)                # or irepa_target, or the tokens themselves
    loss = alignment_loss(projector(hidden), target).mean()             # hidden (N, 256, width) of the noisy input

What a target keeps of the tokens is measured by `lds` here and by rmsc and directional_energy of spectral_losses.py;
`frechet_distance`, `kernel_distance` and `precision_recall` compare the summaries of two sets of images: FID, KID ...
with load_encoder("inception").
"""

import functools
import math
import traceback
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- encoders ---------------------------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH_ENCODER_SIZE = 224  # pixels given to an encoder that has a patch size (rounded to a multiple of it)


class Encoder(nn.Module):
    """A frozen network with the preprocessing it expects. (N, 3, H, W) in [-1, 1] -> tokens (N, T, D), summary (N, D)

    The network has DINOv2's `forward_features(x)`: patch tokens "x_norm_patchtokens" (N, T, D) and, where there is one,
    "x_norm_clstoken" (N, D). Images are normalised with ImageNet's mean and std; a network with a `patch_size` gets
    them resized to `resolution` or the nearest multiple of its patch below, others as they are: bicubic, and without
    antialiasing, as REPA and iREPA do it [code], unless that is asked for. Raises ValueError where there are no patch
    tokens.
    """

    def __init__(self, network, resolution=PATCH_ENCODER_SIZE, antialias=False):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        patch = getattr(network, "patch_size", None)
        patch = patch[0] if isinstance(patch, (tuple, list)) else patch
        self.resolution, self.antialias = max(1, resolution // patch) * patch if patch else None, antialias

    def forward(self, images):
        x = ((images.float() + 1) / 2 - self.mean) / self.std
        if self.resolution and x.shape[-2:] != (self.resolution, self.resolution):
            x = F.interpolate(x, (self.resolution, self.resolution), mode="bicubic", antialias=self.antialias)
        features = self.network.forward_features(x)
        tokens = features.get("x_norm_patchtokens") if isinstance(features, dict) else None
        if tokens is None or tokens.ndim != 3:
            raise ValueError("its forward_features returns no patch tokens: a dict with x_norm_patchtokens (N, T, D)")
        return tokens, features.get("x_norm_clstoken", tokens.mean(1))


class HOG(nn.Module):
    """Dense histograms of oriented gradients (Dalal & Triggs, CVPR 2005; normalised as by Felzenszwalb et al., PAMI
    2010), an encoder without weights.

    (N, 3, H, W) in [-1, 1] -> tokens (N, (H/8)(W/8), 36), their mean (N, 36). The gradient of the channel where it is
    strongest votes, by its length, linearly for the two nearest of 9 unsigned orientations of its 8 x 8 cell; a token
    is its cell's histogram, normalised in each of the four 2 x 2 blocks of cells that hold it (clipped at 0.2).
    Raises ValueError where 8 does not divide H and W.
    """

    CELL, ORIENTATIONS, CLIP = 8, 9, 0.2

    def forward(self, images):
        if images.shape[-2] % self.CELL or images.shape[-1] % self.CELL:
            size = f"{images.shape[-2]}x{images.shape[-1]}"
            raise ValueError(f"hog: images of {size}, no multiples of {self.CELL} pixels")
        x = F.pad(images.float(), (1, 1, 1, 1), mode="replicate")
        dx, dy = x[..., 1:-1, 2:] - x[..., 1:-1, :-2], x[..., 2:, 1:-1] - x[..., :-2, 1:-1]  # (N, 3, H, W)
        length, strongest = torch.hypot(dx, dy).max(1, keepdim=True)  # (N, 1, H, W)
        angle = torch.atan2(dy.gather(1, strongest), dx.gather(1, strongest)) % math.pi
        place = angle / math.pi * self.ORIENTATIONS - 0.5  # bin k is centred on (k + 1/2) pi / 9
        below = place.floor()
        votes = torch.zeros(len(x), self.ORIENTATIONS, *length.shape[-2:], device=x.device)
        votes.scatter_add_(1, below.long() % self.ORIENTATIONS, length * (1 - (place - below)))
        votes.scatter_add_(1, (below.long() + 1) % self.ORIENTATIONS, length * (place - below))
        cells = F.avg_pool2d(votes, self.CELL)  # (N, 9, h, w)
        cells = F.pad(cells, (1, 1, 1, 1), mode="replicate")
        energy = F.avg_pool2d(cells.square().sum(1, keepdim=True), 2, stride=1)  # (N, 1, h + 1, w + 1), of the blocks
        scale = (4 * energy + 1e-6).rsqrt()
        inner, h, w = cells[..., 1:-1, 1:-1], cells.shape[-2] - 2, cells.shape[-1] - 2
        blocks = [(inner * scale[..., i : i + h, j : j + w]).clamp_max(self.CLIP) for i in (0, 1) for j in (0, 1)]
        tokens = torch.cat(blocks, 1).flatten(2).mT  # (N, h w, 36)
        return tokens, tokens.mean(1)


class Inception(nn.Module):
    """torch-fidelity's Inception-v3, whose Frechet distance is the FID. Images (N, 3, H, W) in [-1, 1] -> token
    (N, 1, 2048), summary (N, 2048): its features of the images as uint8. `weights`: a file, None to download it.
    """

    def __init__(self, weights=None):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        super().__init__()
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights)
        except Exception as error:  # torch.hub's or urllib's download, torch.load, load_state_dict
            raise ValueError(
                f"the network's weights could not be loaded ({str(error)[:200]}). Without --features-weights, "
                f"torch-fidelity downloads {URL_INCEPTION_V3} to {torch.hub.get_dir()}/checkpoints; fetch that file "
                "yourself and pass --features-weights FILE"
            ) from error
        self.network.eval().requires_grad_(False)

    def forward(self, images):
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        with torch.autocast(images.device.type, enabled=False):
            summary = self.network(pixels)[0]
        return summary[:, None], summary

    def logits(self, summary):
        """(N, 2048) -> (N, 1008), those without bias, of which Inception Score is."""
        return summary @ self.network.fc.weight.to(summary).mT


def load_encoder(spec, device="cpu", resolution=PATCH_ENCODER_SIZE, antialias=False, weights=None):
    """The encoder of SPEC: "hog", "inception" (of the file `weights`), or REPO:ENTRY, REPO a local folder with a
    hubconf.py, else a repository torch.hub downloads. `resolution`: pixels given to one that has a patch size,
    `antialias`: when they are resized to it.

    Raises ValueError, naming address and folder, where SPEC has another form, the entry does not exist or it or its
    weights cannot be fetched, or its module has no `forward_features`.
    """
    if spec in ("hog", "inception"):
        return (HOG() if spec == "hog" else Inception(weights)).to(device)
    repo, colon, entry = spec.rpartition(":")
    if not (colon and repo and entry):
        forms = "neither hog nor REPO:ENTRY, such as facebookresearch/dinov2:dinov2_vitb14"
        raise ValueError(f"encoder {spec!r} is {forms}")
    local = Path(repo).is_dir()
    if local and not (Path(repo) / "hubconf.py").is_file():
        raise ValueError(f"encoder folder {repo} holds no hubconf.py")
    try:
        network = torch.hub.load(repo, entry, source="local" if local else "github", trust_repo=True)
    except Exception as error:  # whatever the repository's own code raises
        frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
        urls = [names["url"] for names in frames if isinstance(names.get("url"), str)]  # what was being fetched
        offline = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
        if not urls and (local or not offline):
            raise ValueError(f"encoder {spec}: {repo} gave no entry {entry!r} ({error})") from error
        url = urls[-1] if urls else f"https://github.com/{repo}"
        raise ValueError(
            f"encoder {spec}: {url} could not be fetched into {torch.hub.get_dir()} ({error}). Put the file there "
            "yourself (into checkpoints/ if it holds weights), or name a local copy of the repository as "
            f"FOLDER:{entry}, a folder with a hubconf.py"
        ) from error
    if not callable(getattr(network, "forward_features", None)):
        raise ValueError(f"encoder {spec}: its module has no forward_features, as DINOv2's have")
    return Encoder(network, resolution, antialias).to(device)


# ---- targets ----------------------------------------------------------------------------------------------

EPS = 1e-6  # beside a standard deviation [code]
DOG_SIGMAS = (0.0, 2.0)  # in tokens: from the middle of the flat best range of our comparison (assets/evidence.md)


def as_map(tokens):
    """(N, T, D) in raster order -> (N, D, g, g). Raises ValueError where T is no square."""
    side = math.isqrt(tokens.shape[1])
    if side**2 != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens form no square grid")
    return tokens.mT.unflatten(2, (side, side))


def resize_tokens(tokens, side):
    """(N, T, D) on a square grid -> (N, side^2, D), bilinear, antialiased where it gets smaller."""
    field = as_map(tokens)
    if field.shape[-1] == side:
        return tokens
    return F.interpolate(field.float(), (side, side), mode="bilinear", antialias=True).flatten(2).mT


@functools.lru_cache(maxsize=16)
def blur_matrix(side, sigma, device):
    """Gaussian averages along one axis as a matrix (side, side), its rows renormalised to sum 1: at a border, what lies
    beyond has no weight. sigma infinity is the mean.
    """
    with torch.inference_mode(False):
        at = torch.arange(side, dtype=torch.float64)
        weights = torch.exp(-(at[:, None] - at).square() / (2 * sigma**2))
        return (weights / weights.sum(1, keepdim=True)).to(device, torch.float32)


def blur(field, sigma):
    """(N, D, h, w) -> the same, smoothed by a Gaussian of sigma positions, renormalised at the borders; 0: as it is."""
    if sigma == 0:
        return field
    rows, cols = (blur_matrix(side, sigma, field.device) for side in field.shape[-2:])
    with torch.autocast(field.device.type, enabled=False):  # the two blurs of a DoG nearly cancel
        return rows @ field.float() @ cols.mT


def irepa_target(tokens, gamma=0.6):
    """iREPA's spatial normalisation: (z - gamma mean) / (std + 1e-6), over the tokens. (N, T, D) -> (N, T, D)"""
    z = tokens.float()
    centred = z - gamma * z.mean(1, keepdim=True)
    return centred / (z.std(1, correction=0, keepdim=True) + EPS)


def dog_target(tokens, sigma1, sigma2):
    """REPA-DoG (section 3.5): H = G_s1 * Z - G_s2 * Z on the token grid, over its spatial std + 1e-6.

    Sigmas in tokens, sigma1 < sigma2. A band-pass where sigma1 > 0; 0 leaves the tokens as they are, a high-pass that
    keeps all above the second blur. sigma2 inf takes their mean, so that (0, inf) is `irepa_target` with gamma 1. A
    constant field gives 0. (N, T, D) on a square grid -> (N, T, D). Raises ValueError.
    """
    if not 0 <= sigma1 < sigma2:
        raise ValueError(f"sigmas {sigma1:g} {sigma2:g}: the first must be the smaller, and not negative")
    z = as_map(tokens.float())
    z = z - z.mean((2, 3), keepdim=True)  # both blurs keep it: taken out first, its rounding is not enlarged below
    h = (blur(z, sigma1) - blur(z, sigma2)).flatten(2).mT  # (N, T, D)
    return h / (h.std(1, correction=0, keepdim=True) + EPS)


def make_target(tokens, method, sigmas=DOG_SIGMAS):
    """The target of method "repa" (the tokens as they are), "irepa" or "dog". (N, T, D) -> (N, T, D)"""
    return {"repa": lambda z: z, "irepa": irepa_target, "dog": lambda z: dog_target(z, *sigmas)}[method](tokens)


# ---- alignment --------------------------------------------------------------------------------------------


class MLPProjector(nn.Sequential):
    """REPA's projector, each token by itself: three layers with SiLUs between. (N, T, dim) -> (N, T, target_dim)"""

    def __init__(self, dim, target_dim, width=2048):
        first, second, third = nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, target_dim)
        super().__init__(first, nn.SiLU(), second, nn.SiLU(), third)


class ConvProjector(nn.Module):
    """iREPA's projector, which sees the neighbours: a 3x3 convolution. (N, T, dim) -> (N, T, target_dim), T a square"""

    def __init__(self, dim, target_dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, target_dim, 3, padding=1)

    def forward(self, tokens):
        return self.conv(as_map(tokens)).flatten(2).mT


def make_projector(method, dim, target_dim, width=2048):
    """REPA's for "repa", iREPA's for "irepa" and "dog". `width` is of the former's hidden layers."""
    return MLPProjector(dim, target_dim, width) if method == "repa" else ConvProjector(dim, target_dim)


class Aligned(nn.Module):
    """A network (`DiT` or `UViT`) and the projector of its hidden tokens after block `depth`: one forward call, as
    DistributedDataParallel wants it. The network's arguments -> its output, the projected tokens (N, T, target_dim),
    None without a projector.
    """

    def __init__(self, network, projector=None, depth=None):
        super().__init__()
        self.network, self.projector, self.depth = network, projector, depth

    def forward(self, x, t, y=None, drop=None):
        if self.projector is None:
            return self.network.tapped(x, t, y, drop)
        output, hidden = self.network.tapped(x, t, y, drop, self.depth)
        return output, self.projector(hidden)


def alignment_loss(student, target):
    """- mean cosine over the tokens, of two (N, T, D) -> (N,), -1 at best (REPA, equation 6)."""
    return -F.cosine_similarity(student.float(), target.float(), dim=2).mean(1)


# ---- measures ---------------------------------------------------------------------------------------------

DISTANT = 6  # tokens apart, by rows and columns, from where on a pair is distant for `lds`


def lds(field):
    """Local against distant similarity (iREPA's measure of spatial structure): the mean cosine of neighbours in a row
    or column, minus that of tokens at a Manhattan distance of 6 or more [code], on smaller grids at their largest.
    (N, D, g, g) -> (N,), 0 for one token
    """
    u, side = F.normalize(field.float().flatten(2), dim=1), field.shape[-1]  # (N, D, T)
    line = torch.arange(side, device=u.device)
    at = torch.cartesian_prod(line, line)  # (T, 2)
    distance = (at[:, None] - at).abs().sum(2)  # (T, T)
    cosines, near, far = u.mT @ u, distance == 1, distance >= max(1, min(DISTANT, 2 * (side - 1)))
    return (cosines * near).sum((1, 2)) / near.sum().clamp_min(1) - (cosines * far).sum((1, 2)) / far.sum().clamp_min(1)


def principal_colours(tokens, size):
    """The first three principal components of tokens (N, T, D) as images (N, 3, size, size) in [-1, 1]."""
    flat = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(0)  # (N T, D)
    colours = flat @ torch.linalg.svd(flat, full_matrices=False).Vh[:3].mT
    colours = (colours / (2 * colours.std(0) + 1e-6)).clamp(-1, 1).unflatten(0, tokens.shape[:2])  # (N, T, 3)
    return F.interpolate(as_map(colours), (size, size))


# ---- scores, by torch-fidelity's own functions ------------------------------------------------------------

KID_SUBSETS, KID_SUBSET = 100, 1000  # torch-fidelity's; a subset is at most half of the smaller set
ISC_SPLITS = 10
NEIGHBOURS = 3  # radius of precision's and recall's balls (arXiv 1904.06991)
PRC_BATCH = 2000  # rows of a distance matrix held at a time


def statistics(features):
    """Of features (n, D), n at least 2: {"mu": (D,), "sigma": (D, D)}, numpy, float64."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.cpu().double())


def frechet_distance(a, b):
    """Between two sets of features (n, D), or their `statistics`: the FID where they are Inception's (1706.08500)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    a, b = (x if isinstance(x, dict) else statistics(x) for x in (a, b))
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def kernel_distance(a, b):
    """Unbiased squared MMD of features (n, D), kernel (x.y / D + 1)^3: the KID where they are Inception's (1801.01401)
    -> kid, kid_std over random subsets, kid_subset_size; kid None from fewer than 4 images.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(KID_SUBSET, len(a) // 2, len(b) // 2)
    if size < 2:
        return {"kid": None}
    settings = {"kid_subsets": KID_SUBSETS, "kid_subset_size": size, "verbose": False}
    metric = kid_features_to_metric(a.double(), b.double(), **settings)
    return {"kid": metric[KEY_METRIC_KID_MEAN], "kid_std": metric[KEY_METRIC_KID_STD], "kid_subset_size": size}


def inception_score(logits):
    """Of Inception's logits (n, classes) (1606.03498) -> inception_score and its _std over 10 splits; None from fewer
    than 20 images.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < 2 * ISC_SPLITS:
        return {"inception_score": None}
    metric = isc_features_to_metric(logits, ISC_SPLITS)
    return {"inception_score": metric[KEY_METRIC_ISC_MEAN], "inception_score_std": metric[KEY_METRIC_ISC_STD]}


def precision_recall(a, b):
    """Shares of features a (n, D) within the third-neighbour balls of b (m, D): precision, and of b within those of a:
    recall (1904.06991), computed on their device; None from fewer than 4 images.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    if min(len(a), len(b)) <= NEIGHBOURS:
        return {"precision": None, "recall": None}
    settings = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": PRC_BATCH, "save_cpu_ram": True, "verbose": False}
    metric = prc_features_to_metric(a, b, **settings)
    return {"precision": metric[KEY_METRIC_PRECISION], "recall": metric[KEY_METRIC_RECALL]}
