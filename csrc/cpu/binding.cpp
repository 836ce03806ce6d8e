// torch.ops.gspn_dit_cpu. Operands are not checked here (gspn_dit.ops has checked them). Allocates the results and
// distributes the units over the threads.
#include "binding.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/huge_pages.h"
#include "cpu/kernel.h"

namespace {

using at::Tensor;
using gspn::ChannelFactors;
using gspn::OptionalTensor;

constexpr gspn::ElementTypes<float, double, gspn::BFloat16> kElementTypes{
    "float32, float64 or bfloat16 on the CPU"};

Tensor fresh(const Tensor& like) {
  Tensor result = at::empty_like(like);
  gspn::prefer_huge_pages(result.data_ptr(), int64_t(result.nbytes()));
  return result;
}

Tensor propagate(const Tensor& x, const Tensor& gates, const Tensor& input_gate, const OptionalTensor& output_gate,
                 const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk, at::IntArrayRef directions) {
  const gspn::Operands operands(x, gates, input_gate, output_gate, chunk, directions);
  const ChannelFactors factors(decay, scale);
  Tensor y = fresh(x);
  kElementTypes.with_element(x, [&](auto element) {
    using T = decltype(element);
    auto call = operands.call<gspn::Forward<T>>();
    call.y = gspn::strided<T>(y);
    factors.give_to(call);
    const int64_t threads = at::get_num_threads();
    at::parallel_for(0, gspn::forward_units(call, threads), 1,
                     [&](int64_t first, int64_t last) { gspn::run_forward(call, threads, first, last); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> propagate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& input_gate,
    const OptionalTensor& output_gate, const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk,
    at::IntArrayRef directions) {
  const gspn::Operands operands(x, gates, input_gate, output_gate, chunk, directions);
  ChannelFactors factors(decay, scale);
  const gspn::Gradients grads(operands, fresh);
  kElementTypes.with_element(x, [&](auto element) {
    using T = decltype(element);
    auto call = operands.call<gspn::Backward<T>>();
    call.grad_y = gspn::strided<const T>(grad);
    grads.give_to(call);
    factors.make_sums(gspn::backward_rows(call));
    factors.give_to(call);
    at::parallel_for(0, gspn::backward_units(call), 1,
                     [&](int64_t first, int64_t last) { gspn::run_backward(call, first, last); });
  });
  return {grads.x, grads.gates, grads.input_gate, grads.output_gate, factors.grad_decay(x), factors.grad_scale(x)};
}

}  // namespace

TORCH_LIBRARY(gspn_dit_cpu, m) {
  m.def(gspn::kPropagate, propagate);
  m.def(gspn::kPropagateBackward, propagate_backward);
}
