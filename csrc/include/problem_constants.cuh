// What every family's kernels take from the host alike: the window as constants, and where a tensor lies.
//
// Axes are always z, y, x; a problem of lower rank has leading axes of length 1 and kernel size 1, which the compiler
// folds away. Baked in (macros, from natrain.ops.geometry.window_defines): per axis NATRAIN_KERNEL_SIZE_Z..,
// NATRAIN_STRIDE_Z.., NATRAIN_IS_CAUSAL_Z...
#pragma once

#include "window.h"

// `name(axis)`: the macros NATRAIN_<NAME>_Z, _Y, _X as a function of the axis.
#define NATRAIN_PER_AXIS(type, name, NAME)                                            \
  __device__ constexpr type name(int axis) {                                          \
    const type values[3] = {NATRAIN_##NAME##_Z, NATRAIN_##NAME##_Y, NATRAIN_##NAME##_X}; \
    return values[axis];                                                              \
  }

namespace natrain {

NATRAIN_PER_AXIS(int, kernel_size, KERNEL_SIZE)
NATRAIN_PER_AXIS(int, window_stride, STRIDE)
NATRAIN_PER_AXIS(bool, is_causal, IS_CAUSAL)

// Strides in elements; the last axis ([D] or [K]) has stride 1.
struct Layout {
  long long batch, token[3], head;
};

// All lanes of a warp shuffle together: a shuffle among some of them costs several instructions more.
constexpr unsigned WARP = 0xffffffffu;

}  // namespace natrain
