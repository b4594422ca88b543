"""The module trees of the official repository and of Hugging Face, written from their descriptions with torch only.

Names of parameters and the order of operations are theirs; attention is dense, over every key of the (padded) map, with
a mask. Nothing of natrain is used. Every forward returns the logits and the map after each stage (or block).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def neighbours(length: int, k: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask [length, length] of the k nearest keys of each query in its dilation group, and their bias index."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    index = torch.zeros(length, length, dtype=torch.long)
    for query in range(length):
        group = list(range(query % dilation, length, dilation))
        place = group.index(query)
        first = min(max(place - k // 2, 0), len(group) - k)
        for key_place in range(first, first + k):
            mask[query, group[key_place]] = True
            index[query, group[key_place]] = key_place - place + k - 1
    return mask, index


def attend(q, k, v, rpb, kernel_size: int, dilation: int):
    """Neighborhood attention of q, k, v [B, N, H, W, D], q scaled already."""
    batch, heads, height, width, _ = q.shape
    tokens = height * width
    (mask_y, index_y), (mask_x, index_x) = (neighbours(side, kernel_size, dilation) for side in (height, width))
    scores = q.flatten(2, 3) @ k.flatten(2, 3).transpose(-1, -2)
    bias = rpb[:, index_y[:, None, :, None], index_x[None, :, None, :]].reshape(heads, tokens, tokens)
    mask = (mask_y[:, None, :, None] & mask_x[None, :, None, :]).reshape(tokens, tokens)
    probs = (scores + bias).masked_fill(~mask, float("-inf")).softmax(-1)
    return (probs @ v.flatten(2, 3)).reshape(q.shape)


def padded(x, window: int):
    """The map [B, H, W, C] with zeros at the end of each axis shorter than the window: NATTEN up to 0.15."""
    return F.pad(x, (0, 0, 0, max(0, window - x.shape[2]), 0, max(0, window - x.shape[1])))


class NeighborhoodAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int):
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.qkv = nn.Linear(dim, dim * 3)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        height, width = x.shape[1:3]
        x = padded(x, self.kernel_size * self.dilation)
        shape = x.shape
        qkv = self.qkv(x).reshape(*shape[:3], 3, self.heads, -1).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv
        x = attend(q * q.shape[-1] ** -0.5, k, v, self.rpb, self.kernel_size, self.dilation)
        x = x.permute(0, 2, 3, 1, 4).reshape(shape)
        return self.proj(x[:, :height, :width])


class GlobalAttention(nn.Module):
    """ViT-rpb's: the table of offsets is (query - key), turned around on both axes."""

    def __init__(self, dim: int, heads: int, size: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * size - 1, 2 * size - 1))
        places = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        offsets = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + size - 1
        table = offsets[..., 0] * (2 * size - 1) + offsets[..., 1]
        self.register_buffer("relative_position_index", torch.flipud(torch.fliplr(table)))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        shape = x.shape
        x = x.flatten(1, 2)
        tokens = x.shape[1]
        q, k, v = self.qkv(x).reshape(shape[0], tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        bias = self.rpb.permute(1, 2, 0).flatten(0, 1)[self.relative_position_index.view(-1)]
        scores = scores + bias.view(tokens, tokens, -1).permute(2, 0, 1)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(shape))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: bool = False):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), attn, nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        if layer_scale:
            self.gamma1, self.gamma2 = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))

    def forward(self, x):
        if hasattr(self, "gamma1"):
            x = x + self.gamma1 * self.attn(self.norm1(x))
            return x + self.gamma2 * self.mlp(self.norm2(x))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ConvTokenizer(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x):
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj, self.norm = nn.Conv2d(3, dim, patch, stride=patch), nn.LayerNorm(dim)

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * dim, 2 * dim, bias=False), nn.LayerNorm(4 * dim)

    def forward(self, x):
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Stage(nn.Module):
    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x, x if self.downsample is None else self.downsample(x)


class Hierarchical(nn.Module):
    """NAT and DiNAT (``levels``), DiNATs (``layers``); ``is_detector``: a norm per stage instead of norm and head."""

    def __init__(self, trunk, dim, heads, plan, mlp_ratio, layer_scale=False, kernel_size=7, is_detector=False):
        super().__init__()
        self.trunk = trunk
        is_nat = trunk == "levels"
        self.patch_embed = ConvTokenizer(dim) if is_nat else PatchEmbed(dim, 4)
        downsample = ConvDownsampler if is_nat else PatchMerging
        stages = []
        for number, dilations in enumerate(plan):
            width, count = dim * 2**number, heads * 2**number
            attention = [NeighborhoodAttention(width, count, kernel_size, dilation) for dilation in dilations]
            blocks = [Block(width, attn, mlp_ratio, layer_scale) for attn in attention]
            stages.append(Stage(blocks, downsample(width) if number < len(plan) - 1 else None))
        setattr(self, trunk, nn.ModuleList(stages))
        if is_detector:
            for number in range(len(plan)):
                setattr(self, f"norm{number}", nn.LayerNorm(dim * 2**number))
        else:
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, x):
        x, maps = self.patch_embed(x), []
        for stage in getattr(self, self.trunk):
            before, x = stage(x)
            maps.append(before)
        if not hasattr(self, "head"):
            return [getattr(self, f"norm{number}")(one) for number, one in enumerate(maps)], maps
        return self.head(self.norm(x).flatten(1, 2).mean(1)), maps


class Isotropic(nn.Module):
    """Isotropic NAT and DiNAT; dilation 0 stands for ViT-rpb's global attention."""

    def __init__(self, dim: int, heads: int, plan, size: int = 14):
        super().__init__()
        self.patch_embed = PatchEmbed(dim, 16)
        attention = [
            NeighborhoodAttention(dim, heads, 7, dilation) if dilation else GlobalAttention(dim, heads, size)
            for dilation in plan
        ]
        self.layers = nn.Sequential(*[Block(dim, attn, 4) for attn in attention])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 11)

    def forward(self, x):
        x, maps = self.patch_embed(x), []
        for block in self.layers:
            x = block(x)
            maps.append(x)
        return self.head(self.norm(x.flatten(1, 2)).mean(1)), maps


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights far from their initialisation, so that a forgotten bias, norm or scale shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("rpb"):
                parameter.copy_(noise)
            elif parameter.dim() > 1 and "layer_scale" not in name:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if name.endswith("bias") else 1.0))
    return model.eval()
