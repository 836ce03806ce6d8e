// torch.ops.gspn_dit_cpu: checks nothing (gspn_dit.ops has), allocates the results, and shares the units among threads.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "binding.h"
#include "propagate_cpu.h"

namespace {

using at::Tensor;
using gspn::ChannelFactors;
using gspn::OptionalTensor;
using gspn::problem;
using gspn::strided;

Tensor fresh(const Tensor& like) {
  Tensor result = at::empty_like(like);
  gspn::prefer_huge_pages(result.data_ptr(), int64_t(result.nbytes()));
  return result;
}

template <typename T>
void forward(const gspn::Problem& p, const Tensor& x, const Tensor& gates, const Tensor& lam, const Tensor& out,
             const ChannelFactors& factors, Tensor& y) {
  gspn::Forward<T> call{};
  call.problem = p;
  call.x = strided<const T>(x), call.gates = strided<const T>(gates), call.lam = strided<const T>(lam);
  call.out = strided<const T>(out), call.y = strided<T>(y);
  factors.give_to(call);
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, gspn::forward_units(call, threads), 1,
                   [&](int64_t first, int64_t last) { gspn::run_forward(call, threads, first, last); });
}

Tensor propagate(const Tensor& x, const Tensor& gates, const Tensor& lam, const OptionalTensor& out,
                 const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk, at::IntArrayRef directions) {
  Tensor y = fresh(x);
  const auto p = problem(x, lam, chunk, directions);
  const Tensor u = out.value_or(Tensor());
  const ChannelFactors factors(decay, scale);
  switch (x.scalar_type()) {
    case at::kFloat: forward<float>(p, x, gates, lam, u, factors, y); break;
    case at::kDouble: forward<double>(p, x, gates, lam, u, factors, y); break;
    case at::kBFloat16: forward<gspn::BFloat16>(p, x, gates, lam, u, factors, y); break;
    default: TORCH_CHECK(false, "x has dtype ", x.scalar_type(), ": the CPU kernel takes float32, float64 and bfloat16");
  }
  return y;
}

template <typename T>
void backward(const gspn::Problem& p, const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& lam,
              const Tensor& out, ChannelFactors& factors, Tensor& grad_x, Tensor& grad_gates, Tensor& grad_lam,
              Tensor& grad_out) {
  gspn::Backward<T> call{};
  call.problem = p;
  call.x = strided<const T>(x), call.gates = strided<const T>(gates), call.lam = strided<const T>(lam);
  call.out = strided<const T>(out), call.grad_y = strided<const T>(grad);
  call.grad_x = strided<T>(grad_x), call.grad_gates = strided<T>(grad_gates), call.grad_lam = strided<T>(grad_lam);
  call.grad_out = strided<T>(grad_out);
  factors.make_sums(gspn::backward_rows(call));
  factors.give_to(call);
  at::parallel_for(0, gspn::backward_units(call), 1,
                   [&](int64_t first, int64_t last) { gspn::run_backward(call, first, last); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> propagate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& lam, const OptionalTensor& out,
    const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk, at::IntArrayRef directions) {
  Tensor grad_x = fresh(x), grad_gates = fresh(gates), grad_lam = fresh(lam);
  const Tensor u = out.value_or(Tensor());
  Tensor grad_out = u.defined() ? fresh(u) : x.new_empty({0});
  ChannelFactors factors(decay, scale);
  const auto p = problem(x, lam, chunk, directions);
  switch (x.scalar_type()) {
    case at::kFloat: backward<float>(p, grad, x, gates, lam, u, factors, grad_x, grad_gates, grad_lam, grad_out); break;
    case at::kDouble: backward<double>(p, grad, x, gates, lam, u, factors, grad_x, grad_gates, grad_lam, grad_out); break;
    case at::kBFloat16:
      backward<gspn::BFloat16>(p, grad, x, gates, lam, u, factors, grad_x, grad_gates, grad_lam, grad_out);
      break;
    default: TORCH_CHECK(false, "x has dtype ", x.scalar_type(), ": the CPU kernel takes float32, float64 and bfloat16");
  }
  return {grad_x, grad_gates, grad_lam, grad_out, factors.grad_decay(x), factors.grad_scale(x)};
}

}  // namespace

TORCH_LIBRARY(gspn_dit_cpu, m) {
  m.def("propagate(Tensor x, Tensor gates, Tensor lam, Tensor? out, Tensor? decay, Tensor? scale, int chunk,"
        " int[] directions) -> Tensor", propagate);
  m.def("propagate_backward(Tensor grad, Tensor x, Tensor gates, Tensor lam, Tensor? out, Tensor? decay, Tensor? scale,"
        " int chunk, int[] directions) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", propagate_backward);
}
