// Entry points of the cpu kernel. Torch-free: natrain/ops/cpu.py calls them with one packed struct.
#include "backward.h"
#include "forward.h"

using namespace natrain;

namespace {

// Chooses the storage type and how narrow rows share vectors, once a call.
template <class F>
void with_types(const Plan& plan, F&& f) {
  const auto with_element = [&](auto is_paired) {
    if constexpr (sizeof(Real) == 4) {
      if (plan.a.element == 1) return f(bfloat16(), is_paired);
      if (plan.a.element == 2) return f(float16(), is_paired);
    }
    f(Real(), is_paired);
  };
  if constexpr (HAS_PAIRS) {
    if (plan.shape.is_paired) return with_element(std::true_type());
  }
  with_element(std::false_type());
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void natrain_cpu_forward(const Arguments* arguments) {
  const Plan plan(*arguments);
  with_types(plan, [&](auto element, auto is_paired) { forward<decltype(element), is_paired()>(plan); });
}

extern "C" __attribute__((visibility("default"))) void natrain_cpu_backward(const Arguments* arguments) {
  const Plan plan(*arguments);
  with_types(plan, [&](auto element, auto is_paired) { backward<decltype(element), is_paired()>(plan); });
}
