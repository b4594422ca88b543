// Counter-based dropout: whether a probability is kept is a function of (seed, row, slot) alone, so that forward and
// backward of every kernel draw the same mask and none stores it. Twin of natrain/ops/dropout.py.
#pragma once

#include "window.h"

namespace natrain {

// A bijection of 32-bit words with low bias (C. Wellons, "hash-prospector", the two-round lowbias32).
NATRAIN_HOST_DEVICE constexpr unsigned dropout_mix(unsigned word) {
  word ^= word >> 16;
  word *= 0x21F0AAADu;
  word ^= word >> 15;
  word *= 0xD35A2D97u;
  return word ^ (word >> 15);
}

// What all slots of one row, (image * heads + head) * tokens + query, share.
struct DropoutRow {
  unsigned low, high;

  NATRAIN_HOST_DEVICE constexpr DropoutRow(long long seed, long long row)
      : low(dropout_mix(unsigned(row) ^ unsigned(seed))),
        high(dropout_mix(low + unsigned(row >> 32) + unsigned(seed >> 32))) {}

  // `slot` counts the window's keys in row-major order; `threshold` is natrain.ops.dropout.drop_threshold(p).
  NATRAIN_HOST_DEVICE constexpr bool keeps(int slot, unsigned threshold) const {
    return dropout_mix(dropout_mix(low ^ unsigned(slot) * 0x9E3779B9u) + high) >= threshold;
  }
};

}  // namespace natrain
