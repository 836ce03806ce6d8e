// What the binding calls.
#pragma once

#include "problem.h"

namespace gspn {

// A call is cut into units. No two units write the same output; any thread may run any of them, in any order.
template <typename T>
int64_t forward_units(const Forward<T>& call, int64_t threads);
template <typename T>
void run_forward(const Forward<T>& call, int64_t threads, int64_t first_unit, int64_t last_unit);

// Rows of the sums for f and s: one per image.
template <typename T>
int64_t backward_rows(const Backward<T>& call) {
  return call.problem.batch;
}
template <typename T>
int64_t backward_units(const Backward<T>& call);
template <typename T>
void run_backward(const Backward<T>& call, int64_t first_unit, int64_t last_unit);

}  // namespace gspn
