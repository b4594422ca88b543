// Runs the cpu kernel over a small grid of problems, under whatever sanitizers or processor it is compiled for, and compares
// out with loops over the definition. Every tensor has an allocation of its own, of exactly its size, so that a byte read
// or written too far is seen.
#include <cstdio>
#include <random>

#include "attention.cpp"

namespace {

struct Case {
  int rank, length[3], kernel[3], dilation[3], stride[3], causal[3], batch, heads, head_dim;
};

struct Storage {
  std::vector<Real*> owned;
  ~Storage() {
    for (Real* data : owned) std::free(data);
  }
  Real* make(int64_t elements) {
    static std::mt19937 random(0);
    auto* data = static_cast<Real*>(std::malloc(elements * sizeof(Real)));
    for (int64_t i = 0; i < elements; ++i) data[i] = Real(random() % 2001) / 1000 - 1;
    owned.push_back(data);
    return data;
  }
};

Real at(const TensorArgument& t, int image, const int (&p)[3], int head, int d) {
  const int64_t token = p[0] * t.token[0] + p[1] * t.token[1] + p[2] * t.token[2];
  return static_cast<const Real*>(t.data)[image * t.batch + token + head * t.head + d];
}

// Largest difference between `a.out` and the softmax-weighted sum of the definition.
double worst_difference(const Arguments& a) {
  double worst = 0;
  const int64_t* length = a.length;
  const int64_t tokens = length[0] * length[1] * length[2];
  for (int64_t index = 0; index < a.batch * a.heads * tokens; ++index) {
    const int64_t token = index % tokens;
    const int head = index / tokens % a.heads, image = index / tokens / a.heads;
    const int query[3] = {int(token / (length[1] * length[2])), int(token / length[2] % length[1]),
                          int(token % length[2])};
    int group[3], first[3], count[3], keys = 1;
    for (int axis = 0; axis < 3; ++axis) {
      group[axis] = query[axis] % a.dilation[axis];
      const int p = query[axis] / a.dilation[axis], k = a.kernel_size[axis], s = a.stride[axis];
      const int n = group_length(length[axis], a.dilation[axis], group[axis]);
      first[axis] = window_start(p, n, k, s, a.is_causal[axis]);
      count[axis] = window_end(p, n, k, s, a.is_causal[axis]) - first[axis];
      keys *= count[axis];
    }
    double sum = 0;
    std::vector<double> out(a.head_dim);
    for (int slot = 0; slot < keys; ++slot) {
      const int step[3] = {slot / (count[1] * count[2]), slot / count[2] % count[1], slot % count[2]};
      int key[3];
      int64_t entry = head;
      for (int axis = 0; axis < 3; ++axis) {
        key[axis] = (first[axis] + step[axis]) * a.dilation[axis] + group[axis];
        const int64_t offset = (key[axis] - query[axis]) / a.dilation[axis] + a.kernel_size[axis] - 1;
        entry = entry * (2 * a.kernel_size[axis] - 1) + offset;
      }
      double score = 0;
      for (int d = 0; d < a.head_dim; ++d) score += double(at(a.q, image, query, head, d)) * at(a.k, image, key, head, d);
      const double weight = std::exp(a.scale * score + a.rpb[entry]);
      sum += weight;
      for (int d = 0; d < a.head_dim; ++d) out[d] += weight * at(a.v, image, key, head, d);
    }
    for (int d = 0; d < a.head_dim; ++d) {
      worst = std::max(worst, std::abs(out[d] / sum - at(a.out, image, query, head, d)));
    }
  }
  return worst;
}

bool run(const Case& c, int element, bool has_dropout, bool has_nan) {
  Storage storage;
  Arguments a{};
  a.batch = c.batch, a.heads = c.heads, a.head_dim = c.head_dim;
  int64_t tokens = 1, biases = c.heads;
  for (int axis = 0; axis < 3; ++axis) {
    a.length[axis] = c.length[axis], a.kernel_size[axis] = c.kernel[axis], a.dilation[axis] = c.dilation[axis];
    a.stride[axis] = c.stride[axis], a.is_causal[axis] = c.causal[axis];
    tokens *= c.length[axis], biases *= 2 * c.kernel[axis] - 1;
  }
  a.slab_axis = 3 - c.rank, a.element = element, a.threads = 2, a.scale = 0.3;
  a.keep_scale = has_dropout ? 2 : 1, a.has_dropout = has_dropout, a.drop_threshold = 1u << 31, a.seed = 5;
  a.rpb = storage.make(biases), a.d_rpb = storage.make(biases);
  const auto tensor = [&](int dims, bool is_real) {
    const int64_t elements = c.batch * tokens * c.heads * dims;
    const int64_t reals = is_real || element == 0 ? elements : (elements * 2 + sizeof(Real) - 1) / sizeof(Real);
    TensorArgument t{};
    t.data = storage.make(reals);
    t.head = dims, t.token[2] = c.heads * dims, t.token[1] = t.token[2] * c.length[2];
    t.token[0] = t.token[1] * c.length[1], t.batch = tokens * c.heads * dims;
    // Reals read as 16-bit elements would be arbitrary numbers; zeros will do.
    if (!is_real && element) std::fill_n(static_cast<Real*>(t.data), reals, Real(0));
    return t;
  };
  a.q = tensor(c.head_dim, false), a.k = tensor(c.head_dim, false), a.v = tensor(c.head_dim, false);
  a.out = tensor(c.head_dim, false), a.lse = tensor(1, true), a.d_lse = tensor(1, true);
  a.d_out = tensor(c.head_dim, false), a.d_q = tensor(c.head_dim, false);
  a.d_k = tensor(c.head_dim, false), a.d_v = tensor(c.head_dim, false);
  if (has_nan) *static_cast<Real*>(a.k.data) = std::numeric_limits<Real>::quiet_NaN();
  if (!natrain_cpu_forward(&a) || !natrain_cpu_backward(&a)) return false;
  if (has_nan) return true;
  // Values below lse keep probabilities at most 1: every gradient of ordinary inputs is finite.
  bool is_right = true;
  for (int64_t i = 0; i < biases; ++i) is_right = is_right && std::isfinite(a.d_rpb[i]);
  const double allowed = sizeof(Real) == 4 ? 1e-5 : 1e-13;
  return is_right && (element || has_dropout || worst_difference(a) <= allowed);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, {1, 1, 7}, {1, 1, 7}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 1, 1, 8},
      {1, {1, 1, 97}, {1, 1, 20}, {1, 1, 3}, {1, 1, 5}, {0, 0, 1}, 2, 3, 20},
      {1, {1, 1, 300}, {1, 1, 9}, {1, 1, 2}, {1, 1, 1}, {0, 0, 0}, 1, 1, 5},
      {2, {1, 7, 7}, {1, 7, 7}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, 2, 2, 32},
      {2, {1, 14, 13}, {1, 7, 3}, {1, 2, 4}, {1, 1, 2}, {0, 0, 0}, 1, 2, 32},
      {2, {1, 33, 19}, {1, 4, 13}, {1, 1, 1}, {1, 4, 1}, {0, 1, 0}, 1, 1, 40},
      {2, {1, 11, 26}, {1, 2, 8}, {1, 5, 3}, {1, 2, 8}, {0, 0, 1}, 1, 3, 16},
      {3, {5, 6, 7}, {2, 3, 7}, {2, 2, 1}, {2, 1, 3}, {0, 1, 0}, 1, 2, 24},
      {1, {1, 1, 96}, {1, 1, 32}, {1, 1, 3}, {1, 1, 4}, {0, 0, 0}, 2, 3, 12},
      {3, {4, 3, 8}, {2, 3, 4}, {2, 1, 2}, {2, 1, 3}, {0, 0, 0}, 1, 2, 24},
      {3, {9, 4, 5}, {3, 3, 3}, {3, 1, 1}, {1, 3, 1}, {1, 0, 1}, 1, 1, 64},
  };
  for (const Case& c : cases) {
    for (int element = 0; element < (sizeof(Real) == 4 ? 3 : 1); ++element) {
      for (const bool has_dropout : {false, true}) {
        for (const bool has_nan : {false, true}) {
          if (!run(c, element, has_dropout, has_nan && !element)) return std::puts("wrong"), 1;
        }
      }
    }
  }
  std::puts("clean");
}
