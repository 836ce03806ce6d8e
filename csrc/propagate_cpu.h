// What the binding calls.
#pragma once

#include "problem.h"

namespace gspn {

constexpr uintptr_t kHugePage = 1 << 21;  // bytes: x86-64's, and most others'

// Ask for huge pages under fresh memory: a large result costs fewer page faults to fill, and fewer misses to walk.
void prefer_huge_pages(void* data, int64_t bytes);

// A call splits into units that no other unit shares an output with; any thread may run any of them, in any order.
template <typename T>
int64_t forward_units(const Forward<T>& call, int64_t threads);
template <typename T>
void run_forward(const Forward<T>& call, int64_t threads, int64_t first_unit, int64_t last_unit);

// Rows of the sums for f and s: one an image.
template <typename T>
int64_t backward_rows(const Backward<T>& call) {
  return call.problem.batch;
}
template <typename T>
int64_t backward_units(const Backward<T>& call);
template <typename T>
void run_backward(const Backward<T>& call, int64_t first_unit, int64_t last_unit);

}  // namespace gspn
