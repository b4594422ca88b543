// Entry points of the cpu kernel. Torch-free: natrain/ops/cpu.py calls them with one packed struct.
#include "backward.h"
#include "forward.h"

using namespace natrain;

namespace {

// Calls f(an element, whether narrow rows share vectors, whether units are dense) with the kind chosen once a call as
// types. Returns whether there was enough scratch memory.
template <class F>
int with_kind(const Arguments& arguments, F&& f) {
  const auto with_element = [&](const Plan& plan, auto is_paired, auto is_dense) {
    if constexpr (sizeof(Real) == 4) {
      if (plan.a.element == 1) return f(plan, bfloat16(), is_paired, is_dense);
      if (plan.a.element == 2) return f(plan, float16(), is_paired, is_dense);
    }
    f(plan, Real(), is_paired, is_dense);
  };
  try {
    const Plan plan(arguments);
    if (plan.is_dense) {
      with_element(plan, std::false_type(), std::true_type());
    } else if (HAS_PAIRS && plan.shape.is_paired) {
      with_element(plan, std::bool_constant<HAS_PAIRS>(), std::false_type());
    } else {
      with_element(plan, std::false_type(), std::false_type());
    }
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int natrain_cpu_forward(const Arguments* arguments) {
  return with_kind(*arguments, [](const Plan& plan, auto element, auto is_paired, auto is_dense) {
    if constexpr (is_dense()) return dense_forward<decltype(element)>(plan);
    forward<decltype(element), is_paired()>(plan);
  });
}

extern "C" __attribute__((visibility("default"))) int natrain_cpu_backward(const Arguments* arguments) {
  return with_kind(*arguments, [](const Plan& plan, auto element, auto is_paired, auto is_dense) {
    if constexpr (is_dense()) return dense_backward<decltype(element)>(plan);
    backward<decltype(element), is_paired()>(plan);
  });
}
