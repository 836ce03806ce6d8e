// What the binding hands to the CPU kernel: sizes, and pointers with strides in elements.
#pragma once

#include <cstdint>

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

// The element types of a call: float, double, or bfloat16 as its 16 bits.
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Forward {
  using Element = T;
  static constexpr bool kNeedsLogits = false;
  Problem problem;
  Strided<const T> x;      // (B, H, W, C)
  Strided<const T> gates;  // (B, H, W, K, 3, G)
  Strided<const T> lam;    // (B, H, W, K, G)
  Strided<const T> out;    // (B, H, W, K, G), or null data for 1
  Strided<T> y;            // (B, H, W, C)
};

template <typename T>
struct Backward {
  using Element = T;
  static constexpr bool kNeedsLogits = true;
  Problem problem;
  Strided<const T> x, gates, lam, out, grad_y;
  Strided<T> grad_x, grad_gates, grad_lam, grad_out;  // grad_out: null data where out is
};

constexpr uintptr_t kHugePage = 1 << 21;  // x86-64's and most others'

// Ask for huge pages under fresh memory: a large result costs fewer page faults to fill, and fewer misses to walk.
void prefer_huge_pages(void* data, int64_t bytes);

// A call splits into units that no other unit shares an output with; any thread may run any of them, in any order.
template <typename T>
int64_t forward_units(const Forward<T>& call, int64_t threads);
template <typename T>
void run_forward(const Forward<T>& call, int64_t threads, int64_t first_unit, int64_t last_unit);

template <typename T>
int64_t backward_units(const Backward<T>& call);
template <typename T>
void run_backward(const Backward<T>& call, int64_t first_unit, int64_t last_unit);

}  // namespace gspn
