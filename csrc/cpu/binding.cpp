// torch.ops.gspn_dit_cpu. Operands are not checked here (gspn_dit.ops has checked them). Allocates the results and
// distributes the units over the threads.
#include "binding.h"

#include <array>

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/huge_pages.h"
#include "cpu/kernel.h"
#include "cpu/tail.h"

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

// Calls run(first, last) for parts of n, on torch's threads.
template <typename Run>
void distribute(int64_t n, Run run) {
  at::parallel_for(0, n, 1, run);
}

// y, and inverse_rms with `direct`: without, it is undefined. The tail takes no doubles.
std::pair<Tensor, Tensor> forward(const gspn::Operands& operands, const ChannelFactors& factors,
                                  const OptionalTensor& direct) {
  Tensor y = fresh(operands.x), inverse_rms;
  const Tensor per_channel = direct ? direct->contiguous() : Tensor();
  if (direct) inverse_rms = gspn::new_inverse_rms(operands);
  kElementTypes.with_element(operands.x, [&](auto element) {
    using T = decltype(element);
    auto call = operands.call<gspn::Forward<T>>();
    call.y = gspn::strided<T>(y);
    factors.give_to(call);
    const int64_t threads = at::get_num_threads();
    distribute(gspn::forward_units(call, threads),
               [&](int64_t first, int64_t last) { gspn::run_forward(call, threads, first, last); });
    if constexpr (!std::is_same_v<T, double>) {
      if (!direct) return;
      call.direct = static_cast<const float*>(per_channel.const_data_ptr());
      call.inverse_rms = static_cast<float*>(inverse_rms.data_ptr());
      distribute(call.problem.batch * call.problem.height,
                 [&](int64_t first, int64_t last) { gspn::run_tail(call, first, last); });
    }
  });
  return {y, inverse_rms};
}

Tensor propagate(const Tensor& x, const Tensor& gates, const Tensor& input_gate, const OptionalTensor& output_gate,
                 const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk, int64_t window, int64_t shift,
                 at::IntArrayRef directions) {
  return forward({x, gates, input_gate, output_gate, chunk, window, shift, directions}, {decay, scale}, {}).first;
}

std::tuple<Tensor, Tensor> propagate_with_tail(const Tensor& x, const Tensor& gates, const Tensor& input_gate,
                                               const OptionalTensor& output_gate, const OptionalTensor& decay,
                                               const OptionalTensor& scale, int64_t chunk, int64_t window,
                                               int64_t shift, at::IntArrayRef directions, const Tensor& direct) {
  return forward({x, gates, input_gate, output_gate, chunk, window, shift, directions}, {decay, scale}, direct);
}

std::array<Tensor, 6> backward(const Tensor& grad, const gspn::Operands& operands, ChannelFactors factors) {
  const Tensor& x = operands.x;
  const gspn::Gradients grads(operands, fresh);
  kElementTypes.with_element(x, [&](auto element) {
    using T = decltype(element);
    auto call = operands.call<gspn::Backward<T>>();
    call.grad_y = gspn::strided<const T>(grad);
    grads.give_to(call);
    factors.make_sums(gspn::backward_rows(call));
    factors.give_to(call);
    distribute(gspn::backward_units(call), [&](int64_t first, int64_t last) { gspn::run_backward(call, first, last); });
  });
  return {grads.x, grads.gates, grads.input_gate, grads.output_gate, factors.grad_decay(x), factors.grad_scale(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> propagate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& input_gate,
    const OptionalTensor& output_gate, const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk,
    int64_t window, int64_t shift, at::IntArrayRef directions) {
  return std::tuple_cat(
      backward(grad, {x, gates, input_gate, output_gate, chunk, window, shift, directions}, {decay, scale}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> propagate_backward_with_tail(
    const Tensor& grad, const Tensor& y, const Tensor& inverse_rms, const Tensor& x, const Tensor& gates,
    const Tensor& input_gate, const OptionalTensor& output_gate, const OptionalTensor& decay,
    const OptionalTensor& scale, int64_t chunk, int64_t window, int64_t shift, at::IntArrayRef directions,
    const Tensor& direct) {
  const gspn::Operands operands(x, gates, input_gate, output_gate, chunk, window, shift, directions);
  const Tensor per_channel = direct.contiguous(), grad_scanned = fresh(x);
  const int64_t lines = x.size(0) * x.size(1);
  const Tensor sums = x.new_empty({lines, x.size(3)}, x.options().dtype(at::kFloat));
  kElementTypes.with_element(x, [&](auto element) {
    using T = decltype(element);
    if constexpr (!std::is_same_v<T, double>) {
      auto tail = gspn::tail_backward<T>(operands, grad, y, inverse_rms, per_channel);
      tail.grad_scanned = gspn::strided<T>(grad_scanned);
      tail.grad_direct = static_cast<float*>(sums.data_ptr());
      distribute(lines, [&](int64_t first, int64_t last) { gspn::run_tail_backward(tail, first, last); });
    }
  });
  const auto grads = backward(grad_scanned, operands, {decay, scale});
  grads[0].addcmul_(direct, grad);
  Tensor grad_direct = at::empty_like(direct);
  at::sum_out(grad_direct, sums, {0});
  return std::tuple_cat(grads, std::make_tuple(grad_direct));
}

}  // namespace

TORCH_LIBRARY(gspn_dit_cpu, m) {
  m.def(gspn::kPropagate, propagate);
  m.def(gspn::kPropagateBackward, propagate_backward);
  m.def(gspn::kPropagateWithTail, propagate_with_tail);
  m.def(gspn::kPropagateBackwardWithTail, propagate_backward_with_tail);
}
