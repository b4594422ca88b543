"""Pictures of what a model looks at: numbers from the layers and the one window arithmetic, figures from matplotlib."""

from natrain.viz.attention import attention_map, draw_attention
from natrain.viz.figure import save_figure
from natrain.viz.rpb import draw_rpb
from natrain.viz.windows import Reach, draw_windows, pixel_reach

__all__ = ["Reach", "attention_map", "draw_attention", "draw_rpb", "draw_windows", "pixel_reach", "save_figure"]
