"""The aliases of ``natten.types``, for annotations in code written against NATTEN."""

from __future__ import annotations

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType
CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType

Dimension1DTypeOrDed = int | Dimension1DType
Dimension2DTypeOrDed = int | Dimension2DType
Dimension3DTypeOrDed = int | Dimension3DType
DimensionTypeOrDed = int | DimensionType
CausalArg1DTypeOrDed = bool | CausalArg1DType
CausalArg2DTypeOrDed = bool | CausalArg2DType
CausalArg3DTypeOrDed = bool | CausalArg3DType
CausalArgTypeOrDed = bool | CausalArgType

NAMES = {name: value for name, value in dict(globals()).items() if name.partition("Type")[1]}
