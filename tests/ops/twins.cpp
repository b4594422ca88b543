// Hands the headers of csrc/include and the exponential of csrc/cpu to tests/ops/test_cpu_headers.py.
#include "dropout.h"
#include "vector.h"
#include "window.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))

// start, end, first and last query of the key, for every position of a group of n; 4 ints each.
VISIBLE void windows(int n, int k, int s, int causal, int* out) {
  for (int p = 0; p < n; ++p, out += 4) {
    out[0] = natrain::window_start(p, n, k, s, causal);
    out[1] = natrain::window_end(p, n, k, s, causal);
    out[2] = natrain::inverse_first(p, n, k, s, causal);
    out[3] = natrain::inverse_last(p, n, k, s, causal);
  }
}

VISIBLE int group_length(int length, int dilation, int group) { return natrain::group_length(length, dilation, group); }

VISIBLE void keeps(long long seed, long long row, int slots, unsigned threshold, unsigned char* out) {
  const natrain::DropoutRow dropout(seed, row);
  for (int slot = 0; slot < slots; ++slot) out[slot] = dropout.keeps(slot, threshold);
}

// count is a multiple of 16.
VISIBLE void exponentials(const natrain::Real* x, int count, natrain::Real* out) {
  for (int i = 0; i < count; i += natrain::LANES) natrain::store(out + i, natrain::exponential(natrain::load(x + i)));
}
