"""The zoo: importing this package registers every model with timm under its plain name (``timm.create_model``)."""

from natrain.models import dinats, isotropic, nat, small
from natrain.models.dinats import DiNATs
from natrain.models.isotropic import NATIsotropic, ViTRPB
from natrain.models.nat import NAT
from natrain.models.registry import list_models

__all__ = ["NAT", "DiNATs", "NATIsotropic", "ViTRPB", "dinats", "isotropic", "list_models", "nat", "small"]
