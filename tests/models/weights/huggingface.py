"""Hugging Face's Nat and Dinat for image classification, from their description: names, projections apart, padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.models.weights.original import ConvDownsampler, attend, padded


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int):
        super().__init__()
        self.heads, self.kernel_size, self.dilation = heads, kernel_size, dilation
        self.rpb = nn.Parameter(torch.zeros(heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4)
            for layer in (self.query, self.key, self.value)
        )
        x = attend(q / q.shape[-1] ** 0.5, k, v, self.rpb, self.kernel_size, self.dilation)
        return x.permute(0, 2, 3, 1, 4).flatten(-2)


def dense(inputs: int, outputs: int) -> nn.Module:
    return nn.ModuleDict({"dense": nn.Linear(inputs, outputs)})


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, kernel_size: int, dilation: int, mlp_ratio: float, layer_scale: bool):
        super().__init__()
        self.window = kernel_size * dilation
        self.layernorm_before, self.layernorm_after = nn.LayerNorm(dim), nn.LayerNorm(dim)
        attention = SelfAttention(dim, heads, kernel_size, dilation)
        self.attention = nn.ModuleDict({"self": attention, "output": dense(dim, dim)})
        self.intermediate, self.output = dense(dim, int(mlp_ratio * dim)), dense(int(mlp_ratio * dim), dim)
        self.layer_scale_parameters = nn.Parameter(torch.ones(2, dim)) if layer_scale else None

    def forward(self, x):
        height, width = x.shape[1:3]
        y = self.attention["self"](padded(self.layernorm_before(x), self.window))
        y = self.attention["output"]["dense"](y)[:, :height, :width]
        x = x + (y if self.layer_scale_parameters is None else self.layer_scale_parameters[0] * y)
        y = self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))
        return x + (y if self.layer_scale_parameters is None else self.layer_scale_parameters[1] * y)


class Level(nn.Module):
    def __init__(self, layers: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.layers, self.downsample = nn.ModuleList(layers), downsample


class Backbone(nn.Module):
    def __init__(self, dim, heads, plan, mlp_ratio, layer_scale, kernel_size):
        super().__init__()
        stem = [nn.Conv2d(3, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)]
        patches = nn.ModuleDict({"projection": nn.Sequential(*stem)})
        self.embeddings = nn.ModuleDict({"patch_embeddings": patches, "norm": nn.LayerNorm(dim)})
        levels = []
        for number, dilations in enumerate(plan):
            width, count = dim * 2**number, heads * 2**number
            layers = [Layer(width, count, kernel_size, d, mlp_ratio, layer_scale) for d in dilations]
            levels.append(Level(layers, ConvDownsampler(width) if number < len(plan) - 1 else None))
        self.encoder = nn.ModuleDict({"levels": nn.ModuleList(levels)})
        self.layernorm = nn.LayerNorm(width)

    def forward(self, images):
        x = self.embeddings["patch_embeddings"]["projection"](images).permute(0, 2, 3, 1)
        x, maps = self.embeddings["norm"](x), []
        for level in self.encoder["levels"]:
            for layer in level.layers:
                x = layer(x)
            maps.append(x)
            x = x if level.downsample is None else level.downsample(x)
        return self.layernorm(x), maps


class ForImageClassification(nn.Module):
    """``base`` is ``nat`` or ``dinat``: the name of the backbone in the state dict."""

    def __init__(self, base, dim, heads, plan, mlp_ratio, layer_scale=False, kernel_size=7):
        super().__init__()
        self.base = base
        setattr(self, base, Backbone(dim, heads, plan, mlp_ratio, layer_scale, kernel_size))
        self.classifier = nn.Linear(dim * 2 ** (len(plan) - 1), 11)

    def forward(self, images):
        x, maps = getattr(self, self.base)(images)
        return self.classifier(x.flatten(1, 2).mean(1)), maps
