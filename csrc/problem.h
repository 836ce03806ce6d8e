// One call of `propagate`, as the bindings pass it to the kernels: sizes, and pointers with strides in elements.
#pragma once

#include <cstdint>
#include <type_traits>

#include "inline.h"

namespace gspn {

struct Problem {
  int64_t batch, height, width, channels, groups;
  int64_t chunk;   // lines of a chunk; 0: the whole map is one
  int64_t window;  // side of a window in tokens; 0: there are none, as always with chunks
  int64_t shift;   // row and column of the first border between windows; 0: that of the map
  int num_directions;
  int directions[4];  // gspn::Direction
};

// A tensor's data and the strides of its axes, in the order of `propagate`'s documentation.
template <typename T>
struct Strided {
  T* data;
  int64_t stride[6];
};

// Where a tensor of x's shape, (B, H, W, C), holds a channel of a token: the offset in elements, and the address.
template <typename T>
GSPN_INLINE int64_t map_offset(const Strided<T>& t, int64_t b, int64_t row, int64_t column, int64_t channel) {
  return b * t.stride[0] + row * t.stride[1] + column * t.stride[2] + channel * t.stride[3];
}
template <typename T>
GSPN_INLINE T* map_at(const Strided<T>& t, int64_t b, int64_t row, int64_t column, int64_t channel) {
  return t.data + map_offset(t, b, row, column, channel);
}

// Where a gate tensor holds direction k of a token's gates, for a group. group_axis: 4 for the input and the output
// gate, (B, H, W, K, G); 5 for the logits, (B, H, W, K, 3, G), of which this is neighbour -1, with stride[4] to the
// next one.
template <typename T>
GSPN_INLINE T* gate_at(const Strided<T>& t, int group_axis, int64_t b, int64_t row, int64_t column, int k,
                       int64_t group) {
  return t.data + b * t.stride[0] + row * t.stride[1] + column * t.stride[2] + k * t.stride[3] +
         group * t.stride[group_axis];
}

// The element types of a call: float, double, or one of these as its 16 bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// The type in which sums are held.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Added to the mean square of a group's channels under the root of inverse_rms; gspn_dit/ops/tail.py has the same.
constexpr float kTailEpsilon = 1e-6f;

template <typename T>
struct Forward {
  using Element = T;
  static constexpr bool kIsBackward = false;
  Problem problem;
  Strided<const T> x;            // (B, H, W, C)
  Strided<const T> gates;        // (B, H, W, K, 3, G): logits of the neighbours -1, 0, +1
  Strided<const T> input_gate;   // (B, H, W, K, G): λ
  Strided<const T> output_gate;  // (B, H, W, K, G): u, or null data for 1
  const Accumulator<T>* decay;   // (K, C), contiguous: f, or null for 1
  const Accumulator<T>* scale;   // as decay: s
  Strided<T> y;                  // (B, H, W, C)
  const Accumulator<T>* direct;  // (C,), contiguous, or null: y is the sum of the scans
  float* inverse_rms;  // (B, H, W, G), contiguous, where direct is given
};

// The part of a tail that a backward kernel computes with the scans' pass, or null `direct`.
template <typename T>
struct TailInside {
  const float *direct, *inverse_rms;  // as in Forward
  Strided<const T> y;                 // null data where grad_y of Backward is the gradient of the sum already
  Strided<const T> grad_y;            // the gradient of y
  float* grad_direct;                 // (rows, C): sums over parts of the tokens
};

template <typename T>
struct Backward {
  using Element = T;
  static constexpr bool kIsBackward = true;
  Problem problem;
  Strided<const T> x, gates, input_gate, output_gate, grad_y;
  const Accumulator<T>*decay, *scale;
  Strided<T> grad_x, grad_gates, grad_input_gate;
  Strided<T> grad_output_gate;  // null data where output_gate has none
  // (rows, K, C): sums over parts of the tokens, whose rows the binding adds up; the kernels say how many rows.
  Accumulator<T>*grad_decay, *grad_scale;
  TailInside<T> tail;
};

// The tail of a call, backward: what comes before the scans' backward pass, and what comes after it.
template <typename T>
struct TailBackward {
  Problem problem;
  Strided<const T> x, y, grad_y;
  const float *direct, *inverse_rms;  // as in Forward
  Strided<T> grad_scanned;            // (B, H, W, C): written before, the gradient of the sum of the scans
  Strided<T> grad_x;                  // has the scans' part after their pass; the direct path's is added
  float* grad_direct;                 // (rows, C): sums over parts of the tokens, written with grad_x
};

}  // namespace gspn
