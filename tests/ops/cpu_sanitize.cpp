// Runs the cpu kernel over a small grid of problems, under whatever sanitizers it is compiled with. Every tensor has an
// allocation of its own, of exactly its size, so that a byte read or written too far is seen.
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
  natrain_cpu_forward(&a);
  natrain_cpu_backward(&a);
  // Values below lse keep probabilities at most 1: every gradient of ordinary inputs is finite.
  bool is_finite = true;
  for (int64_t i = 0; i < biases; ++i) is_finite = is_finite && std::isfinite(a.d_rpb[i]);
  return has_nan || is_finite;
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
      {3, {9, 4, 5}, {3, 3, 3}, {3, 1, 1}, {1, 3, 1}, {1, 0, 1}, 1, 1, 64},
  };
  for (const Case& c : cases) {
    for (int element = 0; element < (sizeof(Real) == 4 ? 3 : 1); ++element) {
      for (const bool has_dropout : {false, true}) {
        for (const bool has_nan : {false, true}) {
          if (!run(c, element, has_dropout, has_nan && !element)) return std::puts("a gradient is not finite"), 1;
        }
      }
    }
  }
  std::puts("clean");
}
