"""What all families share: timm's interface over ``patch_embed -> trunk -> norm -> pool -> head``.

A family brings its tokenizer and its trunk: the units that features can be taken from, stages or blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import create_classifier, trunc_normal_
from timm.models import get_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from natrain.errors import invalid
from natrain.layers import TransformerBlock, check_counts, check_rates
from natrain.models.spec import check_num_classes


class Backbone(nn.Module):
    """A classifier over NHWC token maps with timm's methods; images come in as NCHW.

    Subclasses set ``patch_embed`` and the trunk (a ModuleList named ``trunk_name``), then call ``_finish``.
    """

    trunk_name = "levels"
    output_fmt = "NHWC"
    pos = "rpb"  # how attention knows positions: natrain.layers.position
    default_out_indices: int | None = None  # of features_only: None is every unit, an int the last ones

    def __init__(self, in_chans: int, num_classes: int, drop_rate: float, **other_rates: float) -> None:
        super().__init__()
        check_rates(drop_rate=drop_rate, **other_rates)
        check_counts(in_chans=in_chans)
        check_num_classes(num_classes)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.head_drop = nn.Dropout(drop_rate)

    def _finish(self, widths: Sequence[int], reductions: Sequence[int], global_pool: str) -> None:
        """Add norm, pooling and head; initialise; describe the units' maps (channels, pixels per token) to timm."""
        self.num_features = widths[-1]
        self.norm = nn.LayerNorm(self.num_features)
        self._make_head(global_pool)
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": f"{self.trunk_name}.{index}"}
            for index, (width, reduction) in enumerate(zip(widths, reductions, strict=True))
        ]
        self.apply(_init_weights)

    def _make_head(self, pool: str) -> None:
        try:
            self.global_pool, self.head = create_classifier(
                self.num_features, self.num_classes, pool_type=pool, input_fmt=self.output_fmt
            )
        except AssertionError:  # timm's word for a pooling that it has not
            allowed = "one of avg, max, avgmax, catavgmax, or '' for none"
            raise invalid("global_pool", pool, allowed, "global_pool='avg'") from None
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @property
    def trunk(self) -> nn.ModuleList:
        """The units in order: stages of a hierarchical model, blocks of an isotropic one."""
        return getattr(self, self.trunk_name)

    def check_image(self, height: int, width: int) -> None:
        """Raise ValueError when images of this size (pixels) cannot be processed; families say why."""

    def tokenize(self, x_BCHW: Tensor) -> Tensor:
        """Images ``[B, in_chans, H, W]`` to tokens ``[B, Y, X, C]``.

        Raises:
            ValueError: wrong rank or channels; an image too small for a window (unless na_padding allows it).
        """
        if x_BCHW.dim() != 4 or x_BCHW.shape[1] != self.in_chans:
            raise invalid(
                "images.shape",
                tuple(x_BCHW.shape),
                f"[B, {self.in_chans}, H, W]",
                f"in_chans={x_BCHW.shape[1]} when the model is created" if x_BCHW.dim() == 4 else "images[None]",
            )
        self.check_image(*x_BCHW.shape[2:])
        return self.patch_embed(x_BCHW)

    def _between(self, unit: nn.Module, x: Tensor) -> Tensor:
        """What happens to the map between ``unit`` and the next one."""
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to the last, normalised map ``[B, Y, X, num_features]``."""
        x = self.tokenize(x)
        for unit in self.trunk:
            x = self._between(unit, unit(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """``forward_features``' map to logits ``[B, num_classes]``, or to the pooled features when ``pre_logits``."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps after chosen units, before any downsampling: timm's interface to a feature pyramid.

        Args:
            x: images ``[B, in_chans, H, W]``.
            indices: units to take: None all, an int the last n, else their indices.
            norm: apply the final norm to maps of its width that were taken (of a hierarchical model: the last stage's).
            stop_early: do not compute units after the last one taken.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: return the list alone, not (last map, list).

        Raises:
            ValueError: ``output_fmt`` is neither.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise invalid("output_fmt", output_fmt, "'NCHW' or 'NHWC'", "output_fmt='NCHW'")
        take, last = feature_take_indices(len(self.trunk), indices)
        units = list(self.trunk)[: last + 1] if stop_early else list(self.trunk)
        maps = []
        x = self.tokenize(x)
        for index, unit in enumerate(units):
            x = unit(x)
            if index in take:
                tap = self.norm(x) if norm and x.shape[-1] == self.num_features else x
                maps.append(tap.permute(0, 3, 1, 2) if output_fmt == "NCHW" else tap)
            if index < len(units) - 1:
                x = self._between(unit, x)
        if intermediates_only:
            return maps
        return (self.norm(x) if len(units) == len(self.trunk) else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the units after the last of ``indices`` (and norm, head) so that no unused parameter is left."""
        take, last = feature_take_indices(len(self.trunk), indices)
        if prune_norm or last < len(self.trunk) - 1:
            self.norm = nn.Identity()
        setattr(self, self.trunk_name, self.trunk[: last + 1])
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.feature_info) - 1:
            self.reset_classifier(0, "")
        return take

    def load_pretrained(self, path: str) -> None:
        """Read a checkpoint of this variant in any layout: what timm calls for ``pretrained=True``.

        A classifier of another size keeps its start; a first convolution of other channels is converted as timm does.
        What the file says of preprocessing, classes and licence goes into ``pretrained_cfg``, where the caller did not
        say otherwise.

        Raises:
            ValueError: another variant, another kernel size, a file that cannot be read.
        """
        from natrain.models.weights import load_into, load_weights

        variant = self.pretrained_cfg["architecture"]
        weights = load_weights(path, model=variant, like=self, argument="pretrained")
        load_into(self, weights, argument="pretrained")
        tag = self.pretrained_cfg.get("tag")
        default = get_pretrained_cfg(f"{variant}.{tag}" if tag else variant).to_dict(remove_null=False)
        told = weights.pretrained_cfg()
        self.pretrained_cfg.update(
            {key: value for key, value in told.items() if self.pretrained_cfg.get(key) == default[key]}
        )

    def get_classifier(self) -> nn.Module:
        """The linear layer (Identity when num_classes is 0)."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of ``num_classes`` (0: none), and another pooling (``""``: none) when one is named."""
        check_num_classes(num_classes)
        like = next(self.parameters())
        self.num_classes = num_classes
        self._make_head(self.global_pool.pool_type if global_pool is None else global_pool)
        self.head.apply(_init_weights)
        self.head.to(device=like.device, dtype=like.dtype).train(self.training)

    def no_weight_decay(self) -> set[str]:
        """Names of the relative position biases: they offset scores, so weight decay would flatten attention."""
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block's activations in the backward pass instead of keeping them."""
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                module.grad_checkpointing = enable


def _init_weights(module: nn.Module) -> None:
    # Convolutions keep PyTorch's default, as in the published code.
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
