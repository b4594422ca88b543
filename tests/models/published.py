"""Forward passes written from the papers with torch functions only: the truth the models are compared with.

Attention is dense here: every query against every key of the map, then masked. Nothing of natrain is used.
Legend: T tokens of a map, N heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def axis_neighbours(length: int, k: int, dilation: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask [length, length] of the k keys nearest to each query in its dilation group, and their bias index."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    index = torch.zeros(length, length, dtype=torch.long)
    for query in range(length):
        group = [token for token in range(length) if token % dilation == query % dilation]
        place = group.index(query)
        first = min(max(place - k // 2, 0), len(group) - k)
        for key_place in range(first, first + k):
            mask[query, group[key_place]] = True
            index[query, group[key_place]] = key_place - place + k - 1
    return mask, index


def dense_attention(x, weights, prefix: str, heads: int, mask=None, index=None):
    """Self-attention on x [B, Y, X, C]; ``index`` [T, T, 2] into rpb, ``mask`` [T, T] of keys that count."""
    batch, height, width, channels = x.shape
    tokens = height * width
    qkv = F.linear(x.reshape(batch, tokens, channels), weights[prefix + "qkv.weight"], weights[prefix + "qkv.bias"])
    q, k, v = qkv.reshape(batch, tokens, 3, heads, channels // heads).permute(2, 0, 3, 1, 4)
    scores = (q * (channels // heads) ** -0.5) @ k.transpose(-2, -1)
    scores = scores + weights[prefix + "rpb"][:, index[..., 0], index[..., 1]]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, height, width, channels)
    return F.linear(out, weights[prefix + "proj.weight"], weights[prefix + "proj.bias"])


def neighborhood_attention(x, weights, prefix: str, heads: int, k: int, dilation: int):
    _, height, width, _ = x.shape
    mask_y, index_y = axis_neighbours(height, k, dilation)
    mask_x, index_x = axis_neighbours(width, k, dilation)
    tokens = height * width
    mask = (mask_y[:, None, :, None] & mask_x[None, :, None, :]).reshape(tokens, tokens)
    pairs = (height, width, height, width)
    index = torch.stack([index_y[:, None, :, None].expand(pairs), index_x[None, :, None, :].expand(pairs)], -1)
    return dense_attention(x, weights, prefix, heads, mask, index.reshape(tokens, tokens, 2))


def global_attention(x, weights, prefix: str, heads: int):
    _, height, width, _ = x.shape
    y, x_ = (axis.flatten() for axis in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    index = torch.stack([y[None] - y[:, None] + height - 1, x_[None] - x_[:, None] + width - 1], -1)
    return dense_attention(x, weights, prefix, heads, None, index)


def norm(x, weights, prefix: str):
    return F.layer_norm(x, x.shape[-1:], weights[prefix + "weight"], weights[prefix + "bias"], 1e-5)


def block(x, weights, prefix: str, attend):
    """Pre-norm transformer block with layer scale where the weights have it."""
    gamma1, gamma2 = (weights.get(prefix + name, 1.0) for name in ("gamma1", "gamma2"))
    x = x + gamma1 * attend(norm(x, weights, prefix + "norm1."), prefix + "attn.")
    hidden = F.linear(
        norm(x, weights, prefix + "norm2."), weights[prefix + "mlp.fc1.weight"], weights[prefix + "mlp.fc1.bias"]
    )
    return x + gamma2 * F.linear(F.gelu(hidden), weights[prefix + "mlp.fc2.weight"], weights[prefix + "mlp.fc2.bias"])


def convolve(x, weights, prefix: str, stride: int):
    return F.conv2d(x, weights[prefix + "weight"], weights.get(prefix + "bias"), stride=stride, padding=1)


def patches(images, weights, size: int):
    """Swin's patch embedding, sides padded with zeros at their end to whole patches."""
    missing = [-side % size for side in images.shape[2:]]
    x = F.pad(images, (0, missing[1], 0, missing[0]))
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=size)
    return norm(x.permute(0, 2, 3, 1), weights, "patch_embed.norm.")


def classify(x, weights):
    return F.linear(norm(x, weights, "norm.").mean((1, 2)), weights["head.weight"], weights["head.bias"])


def nat(images, weights, plan, heads: int, kernel_sizes, strides=(2, 2)):
    """NAT and DiNAT; ``plan`` is the dilation of every block of every stage."""
    x = convolve(
        convolve(images, weights, "patch_embed.proj.0.", strides[0]), weights, "patch_embed.proj.1.", strides[1]
    )
    x = norm(x.permute(0, 2, 3, 1), weights, "patch_embed.norm.")
    for stage, (dilations, k) in enumerate(zip(plan, kernel_sizes, strict=True)):
        for number, dilation in enumerate(dilations):
            x = block(
                x,
                weights,
                f"levels.{stage}.blocks.{number}.",
                lambda y, prefix, s=stage, k=k, d=dilation: neighborhood_attention(
                    y, weights, prefix, heads * 2**s, k, d
                ),
            )
        if stage < len(plan) - 1:
            down = f"levels.{stage}.downsample."
            x = convolve(x.permute(0, 3, 1, 2), weights, down + "reduction.", 2).permute(0, 2, 3, 1)
            x = norm(x, weights, down + "norm.")
    return classify(x, weights)


def dinats(images, weights, plan, heads: int, k: int):
    x = patches(images, weights, 4)
    for stage, dilations in enumerate(plan):
        for number, dilation in enumerate(dilations):
            x = block(
                x,
                weights,
                f"layers.{stage}.blocks.{number}.",
                lambda y, prefix, s=stage, d=dilation: neighborhood_attention(y, weights, prefix, heads * 2**s, k, d),
            )
        if stage < len(plan) - 1:
            down = f"layers.{stage}.downsample."
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            # Swin's order of the four neighbours: down before right.
            corners = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
            x = F.linear(norm(torch.cat(corners, -1), weights, down + "norm."), weights[down + "reduction.weight"])
    return classify(x, weights)


def isotropic(images, weights, plan, heads: int, k: int):
    """``plan``: the dilation of every block; 0 stands for global attention."""
    x = patches(images, weights, 16)
    for number, dilation in enumerate(plan):

        def attend(y, prefix, d=dilation):
            if d == 0:
                return global_attention(y, weights, prefix, heads)
            return neighborhood_attention(y, weights, prefix, heads, k, d)

        x = block(x, weights, f"layers.{number}.", attend)
    return classify(x, weights)
