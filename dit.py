"""DiT and SiT: diffusion transformers with adaLN-Zero (Peebles & Xie, arXiv 2212.09748; Ma et al., arXiv 2401.08740).

State-dict keys, shapes and outputs equal the published networks', so their checkpoints load with strict=True.
Beside maps, this one also reads tokens (DCTdiff's block-DCT tokens, arXiv 2412.15032):

    DiT(input_size=32, patch_size=2, in_channels=4, **DIT_SIZES["xl"])(x, t, y)     # (N, 4, 32, 32) -> (N, 8, 32, 32)
    DiT(num_tokens=1024, token_dim=48, num_classes=0, learn_sigma=False)(x, t)      # (N, 1024, 48) -> the same

With `learn_sigma`, the default, the output has twice the channels of the input: the noise, then the sigmas. What `t` is
multiplied by is the caller's: published DiTs are called with 999 t, SiTs with t in 0..1.
"""

import math
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

DIT_SIZES = {  # paper, table 1; "nano" and "tiny" are for CPUs
    "nano": dict(hidden_size=128, depth=6, num_heads=4),
    "tiny": dict(hidden_size=256, depth=8, num_heads=4),
    "s": dict(hidden_size=384, depth=12, num_heads=6),
    "b": dict(hidden_size=768, depth=12, num_heads=12),
    "l": dict(hidden_size=1024, depth=24, num_heads=16),
    "xl": dict(hidden_size=1152, depth=28, num_heads=16),
}


def timestep_frequencies(count, **options):
    """Geometrically spaced, from 1 to nearly 1/10000. -> (count,)"""
    return torch.exp(-math.log(10000) * torch.arange(count, **options) / count)


def timestep_features(t, dim):
    """Cosines, then sines, of t at `timestep_frequencies`. (N,) -> (N, dim), float32."""
    frequencies = timestep_frequencies(dim // 2, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * frequencies  # (N, dim/2)
    return F.pad(torch.cat((angles.cos(), angles.sin()), 1), (0, dim % 2))


def sincos_positions(dim, side):
    """Fixed 2-D positions: half the channels for the column, half for the row, sines first. -> (side^2, dim)"""
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    line = torch.cat((angles.sin(), angles.cos()), 1)  # (side, dim/2)
    cols, rows = line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)
    return torch.cat((cols, rows), 2).flatten(0, 1).float()


class Attention(nn.Module):
    """Multi-head self-attention. (N, L, D) -> (N, L, D)"""

    def __init__(self, dim, num_heads, qkv_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (N, heads, L, d)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two layers with a GELU between. (N, L, D) -> (N, L, D)"""

    def __init__(self, dim, hidden_dim, gelu="none"):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden_dim), nn.GELU(gelu), nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class PatchEmbed(nn.Module):
    """Maps (N, C, H, W) or tokens (N, L, token_dim) -> (N, L, D). A linear map either way, stored as `proj`."""

    def __init__(self, in_channels, patch_size, dim, token_dim=None):
        super().__init__()
        self.proj = nn.Linear(token_dim, dim) if token_dim else nn.Conv2d(in_channels, dim, patch_size, patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2) if x.ndim == 4 else self.proj(x)


def takes_maps(num_tokens, token_dim):
    """Whether a network's input is maps, not tokens. Raises ValueError where only one of the two is given."""
    if (num_tokens is None) != (token_dim is None):
        raise ValueError(f"num_tokens {num_tokens} and token_dim {token_dim}: tokens take both, maps neither")
    return token_dim is None


def check_call(network, x, y, tap):
    """Raise ValueError where a call does not fit a network of `input_shape`, `num_labels` and `depth`."""
    if x.shape[1:] != network.input_shape:
        raise ValueError(f"x {tuple(x.shape)}: this network takes (N, {', '.join(map(str, network.input_shape))})")
    if y is None and network.num_labels:
        raise ValueError("y: is missing, this network takes a class per example")
    if tap is not None and not 1 <= tap <= network.depth:
        raise ValueError(f"tap {tap}: the network's blocks are 1 to {network.depth}")
    if y is None:
        return
    if not network.num_labels:
        raise ValueError("y: was given to a network without classes")
    if y.shape != x.shape[:1] or y.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"y: is {tuple(y.shape)} of {y.dtype}, not one integer class per example, ({len(x)},)")
    check_labels(y, network.num_labels)


def check_labels(y, num_labels):
    """Raise ValueError where a class (N,) has no row in the table. On the CPU alone: it would wait for a GPU."""
    if y.device.type == "cpu" and not torch.compiler.is_compiling():
        for label in y[(y < 0) | (y >= num_labels)][:1].tolist():
            raise ValueError(f"y: class {label}, the network's are 0 to {num_labels - 1}")


def unpatchify(x, patch_size, channels):
    """(N, L, p*p*C) -> (N, C, H, W), square."""
    side = math.isqrt(x.shape[1])
    x = x.unflatten(2, (patch_size, patch_size, channels)).unflatten(1, (side, side))  # (N, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    """Scaled time (N,) -> (N, D)"""

    FEATURES = 256

    def __init__(self, dim):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        return self.mlp(timestep_features(t, self.FEATURES).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Class (N,) -> (N, D). With dropout the table has one row more, the null class of classifier-free guidance."""

    def __init__(self, num_classes, dim, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), dim)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y, drop=None):
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(len(y), device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
            check_labels(y, self.embedding_table.num_embeddings)  # is there a null class?
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """Transformer block whose norms are shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu="tanh")
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        """x (N, L, D), condition c (N, D) -> (N, L, D)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        return self.linear(modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class DiT(nn.Module):
    """Arguments keep their published names and meaning; give `num_tokens` and `token_dim` for token input instead
    of `input_size`, `patch_size` and `in_channels`. `num_classes` 0 means no label table; the null class is
    `num_classes` itself. With `learn_sigma` the output has twice the channels, the noise (or velocity) first.
    Raises ValueError where the patch does not divide the input, tokens form no square grid, or one of `num_tokens` and
    `token_dim` is missing.
    """

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
        num_tokens=None,
        token_dim=None,
    ):
        super().__init__()
        maps = takes_maps(num_tokens, token_dim)
        if maps:
            if input_size % patch_size:
                raise ValueError(f"patch {patch_size} does not divide the input size {input_size}")
            num_tokens = (input_size // patch_size) ** 2
        side = math.isqrt(num_tokens)
        if side * side != num_tokens:
            raise ValueError(f"{num_tokens} tokens form no square grid")
        if hidden_size % 4 or hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} must be a multiple of 4 and of num_heads {num_heads}")
        self.patch_size, self.token_dim = patch_size, token_dim
        self.num_tokens, self.width, self.depth = num_tokens, hidden_size, depth  # of the hidden tokens
        self.input_shape = (in_channels, input_size, input_size) if maps else (num_tokens, token_dim)
        self.out_channels = (1 + learn_sigma) * (in_channels if maps else token_dim)
        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size, token_dim)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob) if num_classes else None
        self.num_labels = self.y_embedder.embedding_table.num_embeddings if num_classes else 0  # the null class counts
        self.pos_embed = nn.Parameter(sincos_positions(hidden_size, side)[None], requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, self.out_channels * (patch_size**2 if maps else 1))
        self.initialize_weights()

    @property
    def null_class(self):
        """Index of the label that means "no class", or None where there is none."""
        return self.y_embedder.num_classes if self.y_embedder and self.y_embedder.dropout_prob > 0 else None

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        tables = [self.t_embedder.mlp[0], self.t_embedder.mlp[2]]
        for table in tables + ([self.y_embedder.embedding_table] if self.y_embedder else []):
            nn.init.normal_(table.weight, std=0.02)
        for layer in (*self.blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y=None, drop=None):
        """x (N, C, H, W) or (N, L, token_dim), t (N,) scaled time, y (N,) classes -> same shape as x (twice the
        channels with learn_sigma). `drop` (N,) bool replaces those labels by the null class; left out, a network
        in training mode drops them itself. Raises ValueError where x or y do not fit; a class out of range is looked
        for on the CPU alone.
        """
        return self.tapped(x, t, y, drop)[0]

    def tapped(self, x, t, y=None, drop=None, tap=None):
        """The output of `forward`, and the hidden tokens (N, L, D) after block `tap`, 1..depth; None without a tap."""
        check_call(self, x, y, tap)
        x = self.x_embedder(x) + self.pos_embed  # (N, L, D)
        c, hidden = self.t_embedder(t), None  # (N, D)
        if self.y_embedder is not None:
            c = c + self.y_embedder(y, drop)
        for k, block in enumerate(self.blocks, 1):
            x = block(x, c)
            if k == tap:
                hidden = x
        x = self.final_layer(x, c)  # (N, L, p*p*C)
        if self.token_dim is None:
            x = unpatchify(x, self.patch_size, self.out_channels)
        return x, hidden


def size_name(sizes, width, depth):
    """The name in DIT_SIZES or UVIT_SIZES of a width and depth, which tells the heads of attention as no shape does.
    Raises ValueError.
    """
    for name, size in sizes.items():
        if list(size.values())[:2] == [width, depth]:
            return name
    raise ValueError(f"is {width} wide and {depth} blocks deep, which is no size of {', '.join(sizes)}")


def reverse_time(state):
    """Weights of f(x, t), t in 0..1, to those of -f(x, 1 - t), exactly: of the timestep features, the cosines and sines
    of w (1 - t) are those of w t reflected, cos w cos wt + sin w sin wt and sin w cos wt - cos w sin wt. A plain state
    dict of a SiT -> another, those weights in float32.
    """
    w = timestep_frequencies(TimestepEmbedder.FEATURES // 2, dtype=torch.float64)
    cos, sin = w.cos().diag(), w.sin().diag()
    reflection = torch.cat((torch.cat((cos, sin), 1), torch.cat((sin, -cos), 1)))  # (256, 256)
    time, last = "t_embedder.mlp.0.weight", ("final_layer.linear.weight", "final_layer.linear.bias")
    return state | {time: (state[time].double() @ reflection).float()} | {key: -state[key].float() for key in last}


def read_published(state, kind):
    """A published DiT ("dit") or SiT ("sit"; the keys are the same) on maps, read off its plain state dict.

    -> config, state; None where the keys are another network's. config: model (dit-xl/2), channels and side of the
    maps, predict, path, classes (names or None), label_dropout. The state is that of `DiT` without learned sigmas: no
    projectors of REPA, whose older files call the blocks after the aligned one decoder_blocks, and time runs from data
    to noise. Raises ValueError ("is no whole dit's ...") where keys lack or the size is not of DIT_SIZES.
    """
    patches = state.get("x_embedder.proj.weight")
    if getattr(patches, "ndim", 0) != 4:
        return None
    width, channels, patch, _ = patches.shape
    from_repa = any(key.startswith(("projectors.", "decoder_blocks.")) for key in state)
    first = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    later = lambda match: f"blocks.{first + int(match[1])}."
    state = {re.sub(r"^decoder_blocks\.(\d+)\.", later, key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith("projectors.")}
    try:
        out = state["final_layer.linear.weight"].shape[0] // patch**2
        for key in ("final_layer.linear.weight", "final_layer.linear.bias"):  # (p p out, ...), the sigmas last
            state[key] = state[key].unflatten(0, (patch**2, out))[:, :channels].flatten(0, 1)
        if kind == "sit" and out != channels and not from_repa:  # its own release: noise at t = 0, data at 1
            state = reverse_time(state)
        side = math.isqrt(state["pos_embed"].shape[1]) * patch
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"is no whole {kind}'s ({error})") from error
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    rows = len(state.get("y_embedder.embedding_table.weight", ()))  # the last is the null class
    config = {"model": f"{kind}-{size_name(DIT_SIZES, width, depth)}/{patch}", "channels": channels, "side": side}
    config |= {"predict": "v", "path": "flow"} if kind == "sit" else {"predict": "eps", "path": "vp"}
    config |= {"classes": [str(i) for i in range(rows - 1)] if rows else None, "label_dropout": 0.1 if rows else 0.0}
    return config, state
