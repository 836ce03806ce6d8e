// One call of `propagate`, as the bindings hand it to the kernels: sizes, and pointers with strides in elements.
#pragma once

#include <cstdint>
#include <type_traits>

namespace gspn {

struct Problem {
  int64_t batch, height, width, channels, groups;
  int64_t chunk;  // 0: global
  int num_directions;
  int directions[4];  // gspn::Direction
};

// A tensor's data with the strides of its axes, in the order of `propagate`'s documentation.
template <typename T>
struct Strided {
  T* data;
  int64_t stride[6];
};

// The element types of a call: float, double, or one of these as its 16 bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What sums are held in.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Forward {
  using Element = T;
  static constexpr bool kIsBackward = false;
  Problem problem;
  Strided<const T> x;           // (B, H, W, C)
  Strided<const T> gates;       // (B, H, W, K, 3, G)
  Strided<const T> lam;         // (B, H, W, K, G)
  Strided<const T> out;         // (B, H, W, K, G), or null data for 1
  const Accumulator<T>* decay;  // (K, C), contiguous, or null for 1
  const Accumulator<T>* scale;  // as decay
  Strided<T> y;                 // (B, H, W, C)
};

template <typename T>
struct Backward {
  using Element = T;
  static constexpr bool kIsBackward = true;
  Problem problem;
  Strided<const T> x, gates, lam, out, grad_y;
  const Accumulator<T>*decay, *scale;
  Strided<T> grad_x, grad_gates, grad_lam, grad_out;  // grad_out: null data where out is
  // (rows, K, C): sums over parts of the sites, still to be added up over the rows; the kernels say how many rows.
  Accumulator<T>*grad_decay, *grad_scale;
};

}  // namespace gspn
