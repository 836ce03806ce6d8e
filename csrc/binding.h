// What both bindings hand to their kernels.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "problem.h"

namespace gspn {

using OptionalTensor = std::optional<at::Tensor>;

template <typename T>
Strided<T> strided(const at::Tensor& tensor) {
  Strided<T> result{};
  if (!tensor.defined() || tensor.numel() == 0) return result;
  result.data = static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) result.stride[axis] = tensor.stride(axis);
  return result;
}

inline Problem problem(const at::Tensor& x, const at::Tensor& lam, int64_t chunk, at::IntArrayRef directions) {
  Problem p{x.size(0), x.size(1), x.size(2), x.size(3), lam.size(4), chunk, int(directions.size()), {}};
  for (size_t k = 0; k < directions.size(); ++k) p.directions[k] = int(directions[k]);
  return p;
}

// f and s of a call, (K, C) or none, and their gradients: the kernels leave sums over parts of the sites.
struct ChannelFactors {
  OptionalTensor decay, scale;
  at::Tensor contiguous[2], sums;  // sums: (2, rows, K, C)

  ChannelFactors(const OptionalTensor& decay_, const OptionalTensor& scale_) : decay(decay_), scale(scale_) {
    if (decay) contiguous[0] = decay->contiguous();
    if (scale) contiguous[1] = scale->contiguous();
  }
  // Room for sums, once it is known how many rows there are. Rows that no kernel writes count nothing.
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

}  // namespace gspn
