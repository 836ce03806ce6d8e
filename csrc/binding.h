// What both bindings share: the operators' signatures, and calls made of tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "problem.h"

namespace gspn {

using OptionalTensor = std::optional<at::Tensor>;

constexpr const char* kPropagate =
    "propagate(Tensor x, Tensor gates, Tensor input_gate, Tensor? output_gate, Tensor? decay, Tensor? scale, int chunk,"
    " int window, int shift, int[] directions) -> Tensor";
constexpr const char* kPropagateBackward =
    "propagate_backward(Tensor grad, Tensor x, Tensor gates, Tensor input_gate, Tensor? output_gate, Tensor? decay,"
    " Tensor? scale, int chunk, int window, int shift, int[] directions)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

// The same with the tail; forward also gives inverse_rms, backward the gradient of direct.
constexpr const char* kPropagateWithTail =
    "propagate_with_tail(Tensor x, Tensor gates, Tensor input_gate, Tensor? output_gate, Tensor? decay, Tensor? scale,"
    " int chunk, int window, int shift, int[] directions, Tensor direct) -> (Tensor, Tensor)";
constexpr const char* kPropagateBackwardWithTail =
    "propagate_backward_with_tail(Tensor grad, Tensor y, Tensor inverse_rms, Tensor x, Tensor gates, Tensor input_gate,"
    " Tensor? output_gate, Tensor? decay, Tensor? scale, int chunk, int window, int shift, int[] directions,"
    " Tensor direct) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

template <typename T>
constexpr at::ScalarType kDtype = at::kFloat;
template <>
inline constexpr at::ScalarType kDtype<double> = at::kDouble;
template <>
inline constexpr at::ScalarType kDtype<BFloat16> = at::kBFloat16;
template <>
inline constexpr at::ScalarType kDtype<Float16> = at::kHalf;

// The element types that a kernel takes, and their dtypes in words.
template <typename... Elements>
struct ElementTypes {
  const char* words;

  bool has(const at::Tensor& x) const { return ((x.scalar_type() == kDtype<Elements>) || ...); }

  // Why a kernel does not take x.
  std::string refusal(const at::Tensor& x) const {
    return std::string("x has dtype ") + c10::toString(x.scalar_type()) + ": wanted " + words;
  }
  // Calls `run` with a value of the element type of x's dtype.
  template <typename Run>
  void with_element(const at::Tensor& x, Run run) const {
    TORCH_CHECK(has(x), refusal(x));
    ((x.scalar_type() == kDtype<Elements> ? run(Elements()) : void()), ...);
  }
};

template <typename T>
Strided<T> strided(const at::Tensor& tensor) {
  Strided<T> result{};
  if (!tensor.defined() || tensor.numel() == 0) return result;
  result.data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) result.stride[axis] = tensor.stride(axis);
  return result;
}

// f and s of a call, (K, C) or none, and their gradients: the kernels write sums over parts of the tokens.
struct ChannelFactors {
  OptionalTensor decay, scale;
  at::Tensor contiguous[2], sums;  // sums: (2, rows, K, C)

  ChannelFactors(const OptionalTensor& decay_, const OptionalTensor& scale_) : decay(decay_), scale(scale_) {
    if (decay) contiguous[0] = decay->contiguous();
    if (scale) contiguous[1] = scale->contiguous();
  }
  // Allocates the sums, once it is known how many rows there are. Rows that no kernel writes stay 0.
  void make_sums(int64_t rows) {
    const at::Tensor& factor = contiguous[decay ? 0 : 1];
    if (factor.defined()) sums = at::zeros({2, rows, factor.size(0), factor.size(1)}, factor.options());
  }
  template <typename Call>
  void give_to(Call& call) const {
    using A = Accumulator<typename Call::Element>;
    call.decay = contiguous[0].defined() ? static_cast<const A*>(contiguous[0].const_data_ptr()) : nullptr;
    call.scale = contiguous[1].defined() ? static_cast<const A*>(contiguous[1].const_data_ptr()) : nullptr;
    if constexpr (Call::kIsBackward) {
      A* const data = sums.defined() ? static_cast<A*>(sums.data_ptr()) : nullptr;
      call.grad_decay = decay ? data : nullptr;
      call.grad_scale = scale ? data + sums.stride(0) : nullptr;
    }
  }
  at::Tensor grad_decay(const at::Tensor& x) const { return added_up(decay, 0, x); }
  at::Tensor grad_scale(const at::Tensor& x) const { return added_up(scale, 1, x); }

 private:
  at::Tensor added_up(const OptionalTensor& factor, int64_t which, const at::Tensor& x) const {
    if (!factor) return x.new_empty({0});
    at::Tensor grad = at::empty_like(*factor);
    return at::sum_out(grad, sums[which], {0});
  }
};

// The operands of a call.
struct Operands {
  const at::Tensor &x, &gates, &input_gate;
  const at::Tensor output_gate;  // undefined for 1
  int64_t chunk, window, shift;
  at::IntArrayRef directions;

  Operands(const at::Tensor& x_, const at::Tensor& gates_, const at::Tensor& input_gate_,
           const OptionalTensor& output_gate_, int64_t chunk_, int64_t window_, int64_t shift_,
           at::IntArrayRef directions_)
      : x(x_), gates(gates_), input_gate(input_gate_), output_gate(output_gate_.value_or(at::Tensor())), chunk(chunk_),
        window(window_), shift(shift_), directions(directions_) {}

  template <typename Call>
  Call call() const {
    using T = typename Call::Element;
    Call call{};
    call.problem = {x.size(0), x.size(1), x.size(2), x.size(3), input_gate.size(4), chunk, window, shift,
                    int(directions.size()), {}};
    for (size_t k = 0; k < directions.size(); ++k) call.problem.directions[k] = int(directions[k]);
    call.x = strided<const T>(x), call.gates = strided<const T>(gates);
    call.input_gate = strided<const T>(input_gate), call.output_gate = strided<const T>(output_gate);
    return call;
  }
};

// inverse_rms of a call with a tail, before it is computed.
inline at::Tensor new_inverse_rms(const Operands& of) {
  const at::Tensor& x = of.x;
  return x.new_empty({x.size(0), x.size(1), x.size(2), of.input_gate.size(4)}, x.options().dtype(at::kFloat));
}

// The tail of a call, backward, without the gradients that it writes. `direct` is contiguous.
template <typename T>
TailBackward<T> tail_backward(const Operands& of, const at::Tensor& grad, const at::Tensor& y,
                              const at::Tensor& inverse_rms, const at::Tensor& direct) {
  TailBackward<T> tail{};
  tail.problem = of.call<Forward<T>>().problem;
  tail.x = strided<const T>(of.x), tail.y = strided<const T>(y), tail.grad_y = strided<const T>(grad);
  tail.direct = static_cast<const float*>(direct.const_data_ptr());
  tail.inverse_rms = static_cast<const float*>(inverse_rms.const_data_ptr());
  return tail;
}

// The gradients of a call's operands, in the layouts of these. fresh(like) allocates one.
struct Gradients {
  at::Tensor x, gates, input_gate, output_gate;  // output_gate: empty where there is none

  template <typename Fresh>
  Gradients(const Operands& of, Fresh fresh)
      : x(fresh(of.x)), gates(fresh(of.gates)), input_gate(fresh(of.input_gate)),
        output_gate(of.output_gate.defined() ? fresh(of.output_gate) : of.x.new_empty({0})) {}

  template <typename T>
  void give_to(Backward<T>& call) const {
    call.grad_x = strided<T>(x), call.grad_gates = strided<T>(gates);
    call.grad_input_gate = strided<T>(input_gate), call.grad_output_gate = strided<T>(output_gate);
  }
};

}  // namespace gspn
