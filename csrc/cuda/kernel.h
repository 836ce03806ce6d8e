// What the binding calls. `memory` is the shared memory of the device; scratch is float32 device memory of as many
// elements as the function before says. Everything runs on `stream`; no call waits for it.
#pragma once

#include "problem.h"

namespace gspn {

struct SharedMemory {
  int64_t of_a_block, of_a_multiprocessor;  // bytes
};

// Null if the kernels can run the call, and if `backward` its backward pass too, else why not. Nothing is launched, no
// data is read, and y is not needed.
template <typename T>
const char* refusal(const Forward<T>& call, const SharedMemory& memory, bool backward);

// float32 elements of scratch that a call needs.
template <typename T>
int64_t forward_scratch(const Forward<T>& call, const SharedMemory& memory);
template <typename T>
int64_t backward_scratch(const Backward<T>& call, const SharedMemory& memory);
// Rows of the sums for f and s.
template <typename T>
int64_t backward_rows(const Backward<T>& call, const SharedMemory& memory);

// What run_backward() computes of a tail, given its passes: nothing, so that both run beside it; what follows the
// scans, so that run_tail_backward() runs before it; or all.
enum class TailShare { kNone, kDirect, kAll };
template <typename T>
TailShare tail_share(const Backward<T>& call, const TailBackward<T>& passes, const SharedMemory& memory);

// Rows of grad_direct.
int64_t direct_rows(const Problem& problem, TailShare inside);

// Null, or what went wrong: a refusal, or an error of CUDA.
// With `direct`: y = sum / rms + direct x of each group's channels, 1 / rms = 1 / sqrt(mean square + kTailEpsilon).
template <typename T>
const char* run_forward(const Forward<T>& call, const SharedMemory& memory, float* scratch, void* stream);
template <typename T>
const char* run_tail_backward(const TailBackward<T>& call, void* stream);
template <typename T>
const char* run_direct_backward(const TailBackward<T>& call, void* stream);
template <typename T>
const char* run_backward(const Backward<T>& call, const SharedMemory& memory, float* scratch, void* stream);

// Null if the current device can run the kernels, else why not: they may have been compiled for other devices.
const char* unusable();

}  // namespace gspn
