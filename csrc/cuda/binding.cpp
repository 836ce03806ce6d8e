// torch.ops.gspn_dit_cuda. Operands are not checked here (gspn_dit.ops has checked them). Allocates results and
// scratch, and launches the kernels on the current stream of the tensors' device.
#include "binding.h"

#include <torch/library.h>

#if defined(GSPN_EMULATED_CUDA)
#include "emulated_device.h"
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#endif

#include "cuda/kernel.h"
#include "cuda/tensor.h"

namespace {

using at::Tensor;
using gspn::ChannelFactors;
using gspn::OptionalTensor;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // of the operands

constexpr gspn::ElementTypes<float, gspn::BFloat16, gspn::Float16> kElementTypes{
    "float32, bfloat16 or float16 on CUDA"};

#if !defined(GSPN_EMULATED_CUDA)

struct Device {
  c10::cuda::CUDAGuard guard;
  gspn::SharedMemory memory;
  void* stream;

  explicit Device(const Tensor& tensor) : guard(tensor.device()), stream(c10::cuda::getCurrentCUDAStream().stream()) {
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      const cudaError_t error = cudaDeviceGetAttribute(&value, which, tensor.device().index());
      TORCH_CHECK(error == cudaSuccess, "gspn_dit: ", cudaGetErrorString(error));
      return int64_t(value);
    };
    memory = {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
              attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
};
Tensor fresh(const Tensor& like) { return at::empty_like(like); }

#endif

Tensor scratch(const Tensor& x, int64_t elements) {
  Tensor memory = x.new_empty({elements}, x.options().dtype(at::kFloat));
#if defined(GSPN_EMULATED_CUDA)
  poison(memory);
#endif
  return memory;
}

void check(const char* error) { TORCH_CHECK(error == nullptr, "gspn_dit's CUDA kernel: ", error); }

// y, and inverse_rms with `direct`: without, it is undefined.
std::pair<Tensor, Tensor> forward(const gspn::Operands& operands, const ChannelFactors& factors,
                                  const OptionalTensor& direct) {
  const Tensor& x = operands.x;
  const Device device(x);
  Tensor y = fresh(x), inverse_rms;
  const Tensor per_channel = direct ? direct->contiguous() : Tensor();
  if (direct) inverse_rms = gspn::new_inverse_rms(operands);
  kElementTypes.with_element(x, [&](auto element) {
    using T = decltype(element);
    auto call = operands.call<gspn::Forward<T>>();
    call.y = gspn::strided<T>(y);
    factors.give_to(call);
    if (direct) {
      call.direct = static_cast<const float*>(per_channel.const_data_ptr());
      call.inverse_rms = static_cast<float*>(inverse_rms.data_ptr());
    }
    const Tensor memory = scratch(x, gspn::forward_scratch(call, device.memory));
    check(gspn::run_forward(call, device.memory, static_cast<float*>(memory.data_ptr()), device.stream));
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

// What the backward pass of a call with a tail takes beside the gradient of y.
struct TailOperands {
  const Tensor &y, &inverse_rms, &direct;
};

// The gradients of the operands, and that of direct where there is a tail: without, it is undefined.
std::pair<Gradients, Tensor> backward(const Tensor& grad, const gspn::Operands& operands, ChannelFactors factors,
                                      const TailOperands* tail) {
  using gspn::TailShare;
  const Tensor& x = operands.x;
  const Device device(x);
  const gspn::Gradients grads(operands, fresh);
  const Tensor direct = tail ? tail->direct.contiguous() : Tensor();
  Tensor grad_scanned, direct_sums, grad_direct;
  kElementTypes.with_element(x, [&](auto element) {
    using T = decltype(element);
    auto call = operands.call<gspn::Backward<T>>();
    call.grad_y = gspn::strided<const T>(grad);
    grads.give_to(call);
    gspn::TailBackward<T> passes{};
    TailShare inside = TailShare::kNone;
    if (tail) {
      passes = gspn::tail_backward<T>(operands, grad, tail->y, tail->inverse_rms, direct);
      inside = gspn::tail_share(call, passes, device.memory);
      direct_sums = scratch(x, gspn::direct_rows(call.problem, inside) * x.size(3)).view({-1, x.size(3)});
      passes.grad_x = call.grad_x, passes.grad_direct = static_cast<float*>(direct_sums.data_ptr());
      if (inside != TailShare::kNone)
        call.tail = {passes.direct, passes.inverse_rms, passes.y, passes.grad_y, passes.grad_direct};
      if (inside != TailShare::kAll) {
        grad_scanned = fresh(x);
        passes.grad_scanned = gspn::strided<T>(grad_scanned);
        check(gspn::run_tail_backward(passes, device.stream));
        call.grad_y = gspn::strided<const T>(grad_scanned), call.tail.y.data = nullptr;
      }
    }
    factors.make_sums(gspn::backward_rows(call, device.memory));
    factors.give_to(call);
    const Tensor memory = scratch(x, gspn::backward_scratch(call, device.memory));
    check(gspn::run_backward(call, device.memory, static_cast<float*>(memory.data_ptr()), device.stream));
    if (tail && inside == TailShare::kNone) check(gspn::run_direct_backward(passes, device.stream));
  });
  if (tail) {
    grad_direct = at::empty_like(tail->direct);
    at::sum_out(grad_direct, direct_sums, {0});
  }
  return {{grads.x, grads.gates, grads.input_gate, grads.output_gate, factors.grad_decay(x), factors.grad_scale(x)},
          grad_direct};
}

Gradients propagate_backward(const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& input_gate,
                             const OptionalTensor& output_gate, const OptionalTensor& decay,
                             const OptionalTensor& scale, int64_t chunk, int64_t window, int64_t shift,
                             at::IntArrayRef directions) {
  const gspn::Operands operands(x, gates, input_gate, output_gate, chunk, window, shift, directions);
  return backward(grad, operands, {decay, scale}, nullptr).first;
}

// The gradients of propagate_backward, and that of direct.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> propagate_backward_with_tail(
    const Tensor& grad, const Tensor& y, const Tensor& inverse_rms, const Tensor& x, const Tensor& gates,
    const Tensor& input_gate, const OptionalTensor& output_gate, const OptionalTensor& decay,
    const OptionalTensor& scale, int64_t chunk, int64_t window, int64_t shift, at::IntArrayRef directions,
    const Tensor& direct) {
  const gspn::Operands operands(x, gates, input_gate, output_gate, chunk, window, shift, directions);
  const TailOperands tail{y, inverse_rms, direct};
  const auto [grads, grad_direct] = backward(grad, operands, {decay, scale}, &tail);
  return std::tuple_cat(grads, std::make_tuple(grad_direct));
}

// Why the kernels cannot run a call, or nothing: forward, and unless `backward` is false also backward. Launches
// nothing.
std::string refusal(const Tensor& x, const Tensor& gates, const Tensor& input_gate, const OptionalTensor& output_gate,
                    const OptionalTensor&, const OptionalTensor&, int64_t chunk, int64_t window, int64_t shift,
                    at::IntArrayRef directions, bool backward) {
  if (!kElementTypes.has(x)) return kElementTypes.refusal(x);
  const Device device(x);
  const gspn::Operands operands(x, gates, input_gate, output_gate, chunk, window, shift, directions);
  const char* reason = nullptr;
  kElementTypes.with_element(x, [&](auto element) {
    reason = gspn::refusal(operands.call<gspn::Forward<decltype(element)>>(), device.memory, backward);
  });
  return reason ? reason : "";
}

}  // namespace

TORCH_LIBRARY(gspn_dit_cuda, m) {
  m.def(gspn::kPropagate, propagate);
  m.def(gspn::kPropagateBackward, propagate_backward);
  m.def(gspn::kPropagateWithTail, propagate_with_tail);
  m.def(gspn::kPropagateBackwardWithTail, propagate_backward_with_tail);
  m.def(
      "refusal(Tensor x, Tensor gates, Tensor input_gate, Tensor? output_gate, Tensor? decay, Tensor? scale, int chunk,"
      " int window, int shift, int[] directions, bool backward=True) -> str",
      refusal);
  m.def("unusable(Tensor on_device) -> str", [](const Tensor& on_device) {
    const Device device(on_device);
    const char* error = gspn::unusable();
    return std::string(error ? error : "");
  });
  m.def("use_tensor_cores(bool on) -> ()", [](bool on) { gspn::use_tensor_cores(on); });
#if defined(GSPN_EMULATED_CUDA)
  m.def("set_shared_memory(int bytes) -> ()", [](int64_t bytes) { emulated_shared_memory() = bytes; });
#endif
}
