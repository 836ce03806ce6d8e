// The kernels on tensor cores, for calls in 16-bit elements: compiled beside those of propagate.cu, which asks them
// first.
#pragma once

#include "cuda/kernel.h"

namespace gspn {

// Whether they are used at all, from the next call on; they are unless this says no.
void use_tensor_cores(bool on);

// Whether they run a call. They do not ask for y's strides where it has no data yet.
template <typename T>
bool tensor_takes(const Forward<T>& call, const SharedMemory& memory);
template <typename T>
bool tensor_takes(const Backward<T>& call, const SharedMemory& memory);

// float32 elements of scratch that such a call needs.
template <typename T>
int64_t tensor_scratch(const Forward<T>& call, const SharedMemory& memory);
template <typename T>
int64_t tensor_scratch(const Backward<T>& call);
// Rows of the sums for f and s, and for direct, that it writes, all of them.
int64_t tensor_backward_rows(const Problem& p);

// What run_tensor_backward() computes of a call's tail, if it takes the call: see kernel.h.
template <typename T>
TailShare tensor_tail_share(const TailBackward<T>& passes);

// Null, or an error of CUDA.
template <typename T>
const char* run_tensor_forward(const Forward<T>& call, const SharedMemory& memory, float* scratch, void* stream);
template <typename T>
const char* run_tensor_backward(const Backward<T>& call, const SharedMemory& memory, float* scratch, void* stream);

}  // namespace gspn
