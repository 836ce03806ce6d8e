// What the binding calls. `memory` is what the device offers; scratch is float32 device memory of as many elements as the
// call before said. Everything runs on `stream`; nothing waits for it.
#pragma once

#include "problem.h"

namespace gspn {

struct SharedMemory {
  int64_t of_a_block, of_a_multiprocessor;  // bytes
};

// float32 elements of scratch that a call needs.
template <typename T>
int64_t forward_scratch(const Forward<T>& call, const SharedMemory& memory);
template <typename T>
int64_t backward_scratch(const Backward<T>& call, const SharedMemory& memory);
// Rows of the sums for f and s.
template <typename T>
int64_t backward_rows(const Backward<T>& call, const SharedMemory& memory);

// Null, or what went wrong.
template <typename T>
const char* run_forward(const Forward<T>& call, const SharedMemory& memory, float* scratch, void* stream);
template <typename T>
const char* run_backward(const Backward<T>& call, const SharedMemory& memory, float* scratch, void* stream);

// Null if the current device can run the kernels, else why not: they may have been compiled for other ones.
const char* unusable();

}  // namespace gspn
