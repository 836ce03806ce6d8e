// What both bindings hand to their kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "problem.h"

namespace gspn {

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

}  // namespace gspn
