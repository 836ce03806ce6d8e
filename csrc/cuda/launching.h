// What launches ask of a call, and how they report.
#pragma once

#include "cuda/device.h"

namespace gspn {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// Whether n channels of a tensor, starting at a multiple of n, can be read in one access.
// (The stride of an axis of one element means nothing.)
template <typename T>
bool vectorises(const Problem& p, const Strided<T>& t, int channel_axis, int n) {
  if (t.data == nullptr) return true;
  const int64_t size[5] = {p.batch, p.height, p.width, p.num_directions, 3};  // of the axes before the channels
  bool fits = t.stride[channel_axis] == 1 && reinterpret_cast<uintptr_t>(t.data) % (n * sizeof(T)) == 0;
  for (int axis = 0; axis < channel_axis; ++axis) fits = fits && (size[axis] == 1 || t.stride[axis] % n == 0);
  return fits;
}
}  // namespace gspn
