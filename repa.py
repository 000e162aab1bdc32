"""Frozen image encoders: features to score samples with and, later, to align a diffusion network to (REPA).

An encoder is any torch.hub entry point whose module has DINOv2's `forward_features(x)`: patch tokens
"x_norm_patchtokens" (N, T, D) and, where there is one, "x_norm_clstoken" (N, D), for ImageNet-normalised x.

    encoder = load_encoder("facebookresearch/dinov2:dinov2_vitb14")     # downloaded by torch.hub
    encoder = load_encoder("some/folder:entry")                         # a folder with a hubconf.py
    tokens, summary = encoder(images)                                   # images (N, 3, H, W) in [-1, 1]
"""

from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH_ENCODER_SIZE = 224  # pixels given to an encoder that has a patch size (rounded to a multiple of it)


class Encoder(nn.Module):
    """A frozen network with the preprocessing it expects. (N, 3, H, W) in [-1, 1] -> tokens (N, T, D), summary (N, D)

    Images are normalised with ImageNet's mean and std; a network with a `patch_size` gets them resized
    (bicubic, antialiased) to 224 pixels or the nearest multiple of its patch below, others as they are.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        patch = getattr(network, "patch_size", None)
        patch = patch[0] if isinstance(patch, (tuple, list)) else patch
        self.resolution = PATCH_ENCODER_SIZE // patch * patch if patch else None

    def forward(self, images):
        x = ((images.float() + 1) / 2 - self.mean) / self.std
        if self.resolution and x.shape[-2:] != (self.resolution, self.resolution):
            x = F.interpolate(x, (self.resolution, self.resolution), mode="bicubic", antialias=True)
        features = self.network.forward_features(x)
        tokens = features["x_norm_patchtokens"]
        return tokens, features.get("x_norm_clstoken", tokens.mean(1))


def load_encoder(spec, device="cpu"):
    """`Encoder` of SPEC = REPO:ENTRY, REPO a local folder with a hubconf.py, else a repository torch.hub downloads.

    Raises ValueError where SPEC has another form, the entry does not exist or cannot be fetched, or its module
    has no `forward_features`.
    """
    repo, colon, entry = spec.rpartition(":")
    if not (colon and repo and entry):
        raise ValueError(f"encoder {spec!r} is not REPO:ENTRY, such as facebookresearch/dinov2:dinov2_vitb14")
    local = Path(repo).is_dir()
    if local and not (Path(repo) / "hubconf.py").is_file():
        raise ValueError(f"encoder folder {repo} holds no hubconf.py")
    try:
        network = torch.hub.load(repo, entry, source="local" if local else "github", trust_repo=True)
    except Exception as error:  # whatever the repository's own code raises
        where = "the local folder" if local else f"https://github.com/{repo}, cached in {torch.hub.get_dir()},"
        raise ValueError(f"encoder {spec}: {where} gave no entry {entry!r} ({error})") from error
    if not callable(getattr(network, "forward_features", None)):
        raise ValueError(f"encoder {spec}: its module has no forward_features, as DINOv2's have")
    return Encoder(network).to(device)
