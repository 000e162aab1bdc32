"""U-ViT: a transformer with long skip connections (Bao et al., arXiv 2209.12152), the network of DCTdiff (2412.15032).

Time and class are tokens like the patches; the first half of the blocks hands its results to the second half.
State-dict keys, shapes and outputs equal the published networks', so their checkpoints load with strict=True;
beside maps it reads tokens, as DCTdiff does:

    UViT(32, 2, 4, num_classes=1001, conv=False, **UVIT_SIZES["h"])(x, t, y)      # (N, 4, 32, 32) -> the same
    UViT(num_tokens=1024, token_dim=48, **UVIT_SIZES["s"])(x, t)                  # (N, 1024, 48) -> the same

`t` is scaled time, 999 t in all published networks. `num_classes` counts the null class, its last row, where there is
one.
"""

import math

import torch
import torch.nn as nn

from dit import Attention, Mlp, PatchEmbed, check_call, sincos_positions, size_name, takes_maps, timestep_features
from dit import unpatchify

UVIT_SIZES = {  # paper, table 1, and M of the CIFAR-10 / DCTdiff settings; "nano" and "tiny" are for CPUs
    "nano": dict(embed_dim=128, depth=6, num_heads=4, sincos_init=True),
    "tiny": dict(embed_dim=256, depth=8, num_heads=4, sincos_init=True),
    "s": dict(embed_dim=512, depth=12, num_heads=8),
    "m": dict(embed_dim=768, depth=16, num_heads=12),
    "l": dict(embed_dim=1024, depth=20, num_heads=16),
    "h": dict(embed_dim=1152, depth=28, num_heads=16),
}


class Block(nn.Module):
    """Pre-norm transformer block; with `skip` it first merges the tokens of its partner in the first half."""

    def __init__(self, dim, num_heads, mlp_ratio, qkv_bias, skip=False):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x, skip=None):
        """x, skip (N, extras + L, D) -> the same"""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat((x, skip), 2))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class UViT(nn.Module):
    """Arguments keep their published names and meaning; give `num_tokens` and `token_dim` for token input instead
    of `img_size`, `patch_size`, `in_chans` and `conv`. `num_classes` <= 0 means no label table. `skip` False leaves
    the long skips out. `sincos_init` starts the learned positions at DiT's sine-cosine ones: on a short training budget
    they need not be found first. Raises ValueError where the patch does not divide the image, or where one of
    `num_tokens` and `token_dim` is missing.
    """

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=False,
        mlp_time_embed=False,
        num_classes=-1,
        conv=True,
        skip=True,
        num_tokens=None,
        token_dim=None,
        sincos_init=False,
    ):
        super().__init__()
        maps = takes_maps(num_tokens, token_dim)
        if maps:
            if img_size % patch_size:
                raise ValueError(f"patch {patch_size} does not divide the image size {img_size}")
            num_tokens = (img_size // patch_size) ** 2
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.embed_dim, self.patch_size, self.in_chans, self.num_classes = embed_dim, patch_size, in_chans, num_classes
        if maps:
            self.patch_embed = PatchEmbed(in_chans, patch_size, embed_dim)
        else:
            self.proj = nn.Linear(token_dim, embed_dim)
        self.time_embed = nn.Identity()
        if mlp_time_embed:
            inner = 4 * embed_dim
            self.time_embed = nn.Sequential(nn.Linear(embed_dim, inner), nn.SiLU(), nn.Linear(inner, embed_dim))
        if num_classes > 0:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        self.input_shape = (in_chans, img_size, img_size) if maps else (num_tokens, token_dim)
        self.num_labels = max(0, num_classes)
        self.extras = 2 if num_classes > 0 else 1
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + num_tokens, embed_dim))
        half, block = depth // 2, (embed_dim, num_heads, mlp_ratio, qkv_bias)
        self.num_tokens, self.width, self.depth = num_tokens, embed_dim, 2 * half + 1  # of the hidden tokens
        self.in_blocks = nn.ModuleList(Block(*block) for _ in range(half))
        self.mid_block = Block(*block)
        self.out_blocks = nn.ModuleList(Block(*block, skip=skip) for _ in range(half))
        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans if maps else token_dim)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if maps and conv else nn.Identity()
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if sincos_init:
            self.pos_embed.data[0, self.extras :] = sincos_positions(embed_dim, math.isqrt(num_tokens))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def null_class(self):
        """Index of the label that means "no class" where there is one, the last; None where there are no classes."""
        return self.num_classes - 1 if self.num_classes > 0 else None

    def forward(self, x, t, y=None, drop=None):
        """x (N, C, H, W) or (N, L, token_dim), t (N,) scaled time, y (N,) classes -> same shape as x. `drop` (N,) bool
        replaces those labels by the null class. Raises ValueError where x or y do not fit; a class out of range is
        looked for on the CPU alone.
        """
        return self.tapped(x, t, y, drop)[0]

    def tapped(self, x, t, y=None, drop=None, tap=None):
        """The output of `forward`, and the hidden tokens (N, L, D) after block `tap`, 1..depth, counted through the
        network: the middle one is depth // 2 + 1; None without a tap.
        """
        check_call(self, x, y, tap)
        maps = x.ndim == 4
        x = self.patch_embed(x) if maps else self.proj(x)  # (N, L, D)
        extras = [self.time_embed(timestep_features(t, self.embed_dim).to(self.pos_embed.dtype))]
        if self.num_classes > 0:
            extras.insert(0, self.label_emb(y if drop is None else torch.where(drop, self.null_class, y)))
        x = torch.cat((torch.stack(extras, 1), x), 1) + self.pos_embed  # (N, extras + L, D)

        skips, hidden = [], None
        blocks = (*self.in_blocks, self.mid_block, *self.out_blocks)
        for k, block in enumerate(blocks, 1):
            x = block(x, skips.pop()) if k > len(self.in_blocks) + 1 else block(x)
            if k <= len(self.in_blocks):
                skips.append(x)
            if k == tap:
                hidden = x[:, self.extras :]
        x = self.decoder_pred(self.norm(x))[:, self.extras :]  # (N, L, p*p*C)
        if maps:
            x = self.final_layer(unpatchify(x, self.patch_size, self.in_chans))
        return x, hidden


def read_published(state):
    """A published U-ViT, read off the keys of its plain state dict as `dit.read_published` does: config, whose
    `network` holds arguments of `UViT` beside its size's, and state; None where the keys are another network's. Of a
    network on tokens the config has num_tokens and token_dim instead of channels and side. Raises ValueError.
    """
    patches = state.get("patch_embed.proj.weight", state.get("proj.weight"))  # of maps, of tokens
    if getattr(patches, "ndim", 0) != (4 if "patch_embed.proj.weight" in state else 2):
        return None
    (width, channels, *patch), rows = patches.shape, len(state.get("label_emb.weight", ()))
    null = rows not in (0, 1000)  # ImageNet's 1000 rows hold no null class, 1001 do
    try:
        network = {
            "conv": "final_layer.weight" in state,
            "mlp_time_embed": "time_embed.0.weight" in state,
            "qkv_bias": "mid_block.attn.qkv.bias" in state,
            "mlp_ratio": len(state["mid_block.mlp.fc1.weight"]) / len(state["mid_block.norm1.weight"]),
        }
        num_tokens = state["pos_embed"].shape[1] - 1 - bool(rows)
    except (KeyError, IndexError) as error:
        raise ValueError(f"is no whole uvit's ({error})") from error
    depth = 2 * len({key.split(".")[1] for key in state if key.startswith("in_blocks.")})
    config = {"model": f"uvit-{size_name(UVIT_SIZES, width, depth)}", "network": network, "predict": "eps"}
    if patch:
        config |= {"model": f"{config['model']}/{patch[0]}", "side": math.isqrt(num_tokens) * patch[0]}
        config |= {"channels": channels, "path": "vp" if channels == 3 else "vp-sd"}
    else:
        config |= {"num_tokens": num_tokens, "token_dim": channels, "path": "vp"}
    config |= {"classes": [str(i) for i in range(rows - null)] if rows else None, "label_dropout": 0.1 if null else 0.0}
    return config, {key: value for key, value in state.items() if not key.startswith("projectors.")}
