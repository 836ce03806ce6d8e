// GSPN_INLINE: a function for the CPU and the GPU, always inlined.
#pragma once

#if defined(__CUDACC__)
#define GSPN_INLINE __host__ __device__ __forceinline__
#else
#define GSPN_INLINE inline __attribute__((always_inline))
#endif
