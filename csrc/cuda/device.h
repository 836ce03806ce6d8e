// What the CUDA kernels are built on: the device's language (or its emulation on the CPU, for the tests), element
// types, vector accesses, and sums over lanes without atomics.
#pragma once

#if defined(GSPN_EMULATED_CUDA)
#include "cuda_emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "problem.h"
#include "propagate.h"

#define GSPN_DEVICE __device__ __forceinline__

namespace gspn {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if !defined(GSPN_EMULATED_CUDA)

GSPN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char gspn_shared_memory[];
  return gspn_shared_memory;
}

// Copies 4, 8 or 16 bytes from global to shared memory, without registers. wait_copies() and then a barrier make them
// visible.
template <int kBytes>
GSPN_DEVICE void copy_async(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(kBytes) : "memory");
}
GSPN_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Launches on `stream`. A kernel that needs more than the default shared memory is allowed all that a block of the
// device may have: always the same number, so that threads which launch it at several sizes do not lower it for each
// other.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
  }
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

GSPN_DEVICE float from_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
GSPN_DEVICE uint16_t to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
GSPN_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
GSPN_DEVICE uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
GSPN_DEVICE float inverse_root(float value) { return rsqrtf(value); }

#endif

// f or s of a channel in the k-th direction, from (K, C); 1 where there is none.
GSPN_DEVICE float of_channel(const float* factor, const Problem& p, int k, int channel) {
  return factor ? factor[int64_t(k) * p.channels + channel] : 1.f;
}

GSPN_DEVICE float load(float value) { return value; }
GSPN_DEVICE float load(BFloat16 value) { return from_bits(uint32_t(value.bits) << 16); }
GSPN_DEVICE float load(Float16 value) { return from_half(value.bits); }
GSPN_DEVICE void store(float& to, float value) { to = value; }
GSPN_DEVICE void store(BFloat16& to, float value) { to.bits = to_bfloat16(value); }
GSPN_DEVICE void store(Float16& to, float value) { to.bits = to_half(value); }

// Two 16-bit elements in a word, the first in its low half.
GSPN_DEVICE void unpack(BFloat16, uint32_t word, float* v) {
  v[0] = from_bits(word << 16);
  v[1] = from_bits(word & 0xffff0000u);
}
GSPN_DEVICE void unpack(Float16, uint32_t word, float* v) {
  v[0] = from_half(uint16_t(word));
  v[1] = from_half(uint16_t(word >> 16));
}
template <typename T>
GSPN_DEVICE uint32_t pack(const float* v) {
  T low, high;
  store(low, v[0]);
  store(high, v[1]);
  return uint32_t(low.bits) | uint32_t(high.bits) << 16;
}

// N = 2 or 4 neighbouring elements, aligned to their size together, in one access.
template <int N>
GSPN_DEVICE void load_vector(const float* from, float (&v)[N]) {
  static_assert(N == 2 || N == 4, "one 8- or 16-byte access");
  if constexpr (N == 2) {
    const float2 two = *reinterpret_cast<const float2*>(from);
    v[0] = two.x, v[1] = two.y;
  } else {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
  }
}
template <int N, typename T>
GSPN_DEVICE void load_vector(const T* from, float (&v)[N]) {
  static_assert(sizeof(T) == 2 && (N == 2 || N == 4), "one 4- or 8-byte access");
  if constexpr (N == 2) {
    unpack(T(), *reinterpret_cast<const uint32_t*>(from), v);
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    unpack(T(), words.x, v);
    unpack(T(), words.y, v + 2);
  }
}
template <int N>
GSPN_DEVICE void store_vector(float* to, const float (&v)[N]) {
  if constexpr (N == 2) *reinterpret_cast<float2*>(to) = make_float2(v[0], v[1]);
  else *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
}
template <int N, typename T>
GSPN_DEVICE void store_vector(T* to, const float (&v)[N]) {
  if constexpr (N == 2) *reinterpret_cast<uint32_t*>(to) = pack<T>(v);
  else *reinterpret_cast<uint2*>(to) = make_uint2(pack<T>(v), pack<T>(v + 2));
}

// How many of n sums a lane has after share_out_sums: half of them per round, rounded up.
GSPN_INLINE constexpr int shared_out(int n, int lanes) { return lanes == 1 ? n : shared_out((n + 1) / 2, lanes / 2); }

// Sums v[0] … v[N-1] over groups of kLanes neighbouring lanes, always in the same order, and distributes the sums: the
// lane gets v[0] … v[shared_out(N, kLanes) - 1], which are the totals first, first + 1, … (those below `limit`; the
// rest is padding). A butterfly that exchanges half of the remaining sums in every round: about N shuffles in all,
// where N reductions take N log2(kLanes).
template <int kLanes, int N>
GSPN_DEVICE void share_out_sums(float (&v)[N], int lane, int& first, int& limit) {
  first = 0;
  limit = N;
  int n = N;
#pragma unroll
  for (int width = kLanes / 2; width >= 1; width /= 2) {
    const int half = (n + 1) / 2;
    const bool upper = lane & width;
#pragma unroll
    for (int i = 0; i < (N + 1) / 2; ++i) {
      if (i >= half) break;
      const float low = v[i], high = half + i < n ? v[half + i] : 0.f;
      v[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, width);
    }
    if (upper) first += half;
    else limit = first + half < limit ? first + half : limit;
    n = half;
  }
}

}  // namespace gspn
