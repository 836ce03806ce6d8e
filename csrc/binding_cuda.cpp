// torch.ops.gspn_dit_cuda: checks nothing (gspn_dit.ops has), allocates results and scratch, and starts the kernels on the
// current stream of the tensors' device.
#include <torch/library.h>

#include "binding.h"

#if defined(GSPN_EMULATED_CUDA)
#include "emulated_device.h"
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime.h>
#endif

#include "propagate_cuda.h"

namespace {

using at::Tensor;
using gspn::ChannelFactors;
using gspn::OptionalTensor;
using gspn::problem;
using gspn::strided;

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
    memory = {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
  }
};
Tensor fresh(const Tensor& like) { return at::empty_like(like); }

#endif

// Calls `run` with a value of the element type that tensors of x's dtype hold.
template <typename Run>
void with_element(const Tensor& x, Run run) {
  switch (x.scalar_type()) {
    case at::kFloat: return run(float());
    case at::kBFloat16: return run(gspn::BFloat16());
    case at::kHalf: return run(gspn::Float16());
    default: TORCH_CHECK(false, "x has dtype ", x.scalar_type(), ": the CUDA kernel takes float32, bfloat16 and float16");
  }
}

Tensor scratch(const Tensor& x, int64_t elements) {
  Tensor memory = x.new_empty({elements}, x.options().dtype(at::kFloat));
#if defined(GSPN_EMULATED_CUDA)
  poison(memory);
#endif
  return memory;
}

Tensor propagate(const Tensor& x, const Tensor& gates, const Tensor& lam, const OptionalTensor& out,
                 const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk, at::IntArrayRef directions) {
  const Device device(x);
  Tensor y = fresh(x);
  const ChannelFactors factors(decay, scale);
  with_element(x, [&](auto element) {
    using T = decltype(element);
    gspn::Forward<T> call{};
    call.problem = problem(x, lam, chunk, directions);
    call.x = strided<const T>(x), call.gates = strided<const T>(gates), call.lam = strided<const T>(lam);
    call.out = strided<const T>(out.value_or(Tensor())), call.y = strided<T>(y);
    factors.give_to(call);
    const Tensor memory = scratch(x, gspn::forward_scratch(call, device.memory));
    const char* error = gspn::run_forward(call, device.memory, static_cast<float*>(memory.data_ptr()), device.stream);
    TORCH_CHECK(error == nullptr, "gspn_dit's CUDA kernel: ", error);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> propagate_backward(
    const Tensor& grad, const Tensor& x, const Tensor& gates, const Tensor& lam, const OptionalTensor& out,
    const OptionalTensor& decay, const OptionalTensor& scale, int64_t chunk, at::IntArrayRef directions) {
  const Device device(x);
  const Tensor u = out.value_or(Tensor());
  Tensor grad_x = fresh(x), grad_gates = fresh(gates), grad_lam = fresh(lam);
  Tensor grad_out = u.defined() ? fresh(u) : x.new_empty({0});
  ChannelFactors factors(decay, scale);
  with_element(x, [&](auto element) {
    using T = decltype(element);
    gspn::Backward<T> call{};
    call.problem = problem(x, lam, chunk, directions);
    call.x = strided<const T>(x), call.gates = strided<const T>(gates), call.lam = strided<const T>(lam);
    call.out = strided<const T>(u), call.grad_y = strided<const T>(grad);
    call.grad_x = strided<T>(grad_x), call.grad_gates = strided<T>(grad_gates), call.grad_lam = strided<T>(grad_lam);
    call.grad_out = strided<T>(grad_out);
    factors.make_sums(gspn::backward_rows(call, device.memory));
    factors.give_to(call);
    const Tensor memory = scratch(x, gspn::backward_scratch(call, device.memory));
    const char* error = gspn::run_backward(call, device.memory, static_cast<float*>(memory.data_ptr()), device.stream);
    TORCH_CHECK(error == nullptr, "gspn_dit's CUDA kernel: ", error);
  });
  return {grad_x, grad_gates, grad_lam, grad_out, factors.grad_decay(x), factors.grad_scale(x)};
}

}  // namespace

TORCH_LIBRARY(gspn_dit_cuda, m) {
  m.def("propagate(Tensor x, Tensor gates, Tensor lam, Tensor? out, Tensor? decay, Tensor? scale, int chunk,"
        " int[] directions) -> Tensor", propagate);
  m.def("propagate_backward(Tensor grad, Tensor x, Tensor gates, Tensor lam, Tensor? out, Tensor? decay, Tensor? scale,"
        " int chunk, int[] directions) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", propagate_backward);
  m.def("unusable(Tensor on_device) -> str", [](const Tensor& on_device) {
    const Device device(on_device);
    const char* error = gspn::unusable();
    return std::string(error ? error : "");
  });
#if defined(GSPN_EMULATED_CUDA)
  m.def("set_shared_memory(int bytes) -> ()", [](int64_t bytes) { emulated_shared_memory() = bytes; });
#endif
}
