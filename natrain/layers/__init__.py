"""Building blocks of the models: attention layers, transformer block, tokenizers, downsamplers. Maps are NHWC."""

from natrain.layers.attention import (
    GlobalAttention2d,
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    check_counts,
    check_rates,
)
from natrain.layers.block import TransformerBlock
from natrain.layers.embed import ConvDownsampler, ConvTokenizer, PatchMerging, PatchTokenizer
from natrain.layers.padding import NA_PADDING, check_na_padding
from natrain.layers.position import POSITIONS

__all__ = [
    "NA_PADDING",
    "POSITIONS",
    "ConvDownsampler",
    "ConvTokenizer",
    "GlobalAttention2d",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "PatchMerging",
    "PatchTokenizer",
    "TransformerBlock",
    "check_na_padding",
    "check_counts",
    "check_rates",
]
