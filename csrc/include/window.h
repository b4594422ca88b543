// Which keys a query attends to, and which queries a key serves: the window arithmetic of device code, this one place.
// Twin of natrain/ops/window.py; plain C++17 without includes, for g++, nvcc and NVRTC.
//
// One axis at a time, in positions of one dilation group of n tokens (k <= n, 1 <= s <= k). Definitions: NAT
// (arXiv 2204.07143, section 3.1) for the shifted window at borders, DiNAT (arXiv 2209.15001, section 3.2) for dilation,
// GNA (arXiv 2504.16922, section 3) for stride.
#pragma once

#ifdef __CUDACC__
#define NATRAIN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NATRAIN_HOST_DEVICE inline
#endif

namespace natrain {

// Tokens of an axis that belong to dilation group `group` (token = position * dilation + group).
NATRAIN_HOST_DEVICE constexpr int group_length(int length, int dilation, int group) {
  return (length - group + dilation - 1) / dilation;
}

// The query whose own window its whole stride group shares.
NATRAIN_HOST_DEVICE constexpr int window_leader(int p, int n, int s, bool causal) {
  const int leader = p / s * s + (causal ? s - 1 : s / 2);
  return leader < n - 1 ? leader : n - 1;
}

// First key of query p.
NATRAIN_HOST_DEVICE constexpr int window_start(int p, int n, int k, int s, bool causal) {
  const int start = window_leader(p, n, s, causal) - (causal ? k - 1 : k / 2);
  const int last_start = causal ? start : n - k;
  const int shifted = start < last_start ? start : last_start;
  return shifted > 0 ? shifted : 0;
}

// One past the last key of query p. Not causal: start + k always.
NATRAIN_HOST_DEVICE constexpr int window_end(int p, int n, int k, int s, bool causal) {
  return causal ? p + 1 : window_start(p, n, k, s, causal) + k;
}

// First query whose window holds key j. The queries of a key are an interval, since starts and ends never decrease.
NATRAIN_HOST_DEVICE constexpr int inverse_first(int j, int n, int k, int s, bool causal) {
  if (causal) return j;
  if (j < k) return 0;
  // The first stride group whose leader is at least j - right extent; the last group's leader may be n - 1.
  const int above = j - (k - 1 - k / 2) - s / 2;
  const int group = above > 0 ? (above + s - 1) / s : 0;
  const int last_group = (n - 1) / s;
  return (group < last_group ? group : last_group) * s;
}

// Last query (inclusive) whose window holds key j.
NATRAIN_HOST_DEVICE constexpr int inverse_last(int j, int n, int k, int s, bool causal) {
  if (j >= n - (causal ? 1 : k)) return n - 1;
  const int leader = j + (causal ? k - 1 : k / 2);
  if (leader >= n - 1) return n - 1;
  // One past the last whole stride group whose leader is at most that.
  const int past = (leader - (causal ? s - 1 : s / 2)) / s * s + s;
  return past < n ? past - 1 : n - 1;
}

}  // namespace natrain
