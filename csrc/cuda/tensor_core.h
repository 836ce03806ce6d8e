// Instructions of a whole warp, for tensor cores (compute capability 8.0 and newer). tests/made/cuda_emulation has the
// same functions for the CPU.
//
// All 32 lanes of a warp take part in every function here but to_tf32() and those of copies. Lane l = 4 g + t, with g =
// l / 4 and t = l % 4, has of a matrix (PTX ISA, "matrix fragments"):
//   16 x 8 sums C:              c[0], c[1] of row g, columns 2 t and 2 t + 1; c[2], c[3] the same of row g + 8
//   16 x 8 tf32 A:              a[0], a[1] of column t, rows g and g + 8; a[2], a[3] the same of column t + 4
//   8 x 8 tf32 B:               b[0], b[1] of rows t and t + 4, column g
//   16 x 4 and 4 x 8 tf32:      the first half of these: a[0], a[1] of A and b[0] of B
//   16 x 8 A of 16-bit elements: a[0] of row g, columns 2 t (low half) and 2 t + 1; a[1] the same of row g + 8
//   8 x 8 B of 16-bit elements:  b of rows 2 t (low half) and 2 t + 1, column g
// A 16 x 16 A is two 16 x 8 ones side by side, a 16 x 8 B two 8 x 8 ones, one above the other.
//
// What only computes is plain `asm`, so that the compiler is free to move it. What reads or writes shared memory
// clobbers "memory", so that it stays on its side of a barrier.
#pragma once

#include "cuda/device.h"

#if !defined(GSPN_EMULATED_CUDA)

namespace gspn {

// The nearest number of 11 significant bits, of two equally near ones the larger in magnitude. Infinities stay, and so
// does a NaN of arithmetic. Three instructions: no machine so far has one for it.
GSPN_DEVICE float to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

// c += a b, with a 16 x 8 and b 8 x 8. Of a and b the product takes 11 significant bits, cut off: see to_tf32().
GSPN_DEVICE void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

// As mma_tf32(), with a 16 x 4 and b 4 x 8: half the work.
GSPN_DEVICE void mma_tf32_k4(float (&c)[4], const float (&a)[2], float b) {
  asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(b)));
}

// c += a b in elements T = BFloat16 or Float16, with a 16 x 8 and b 8 x 8.
template <typename T>
GSPN_DEVICE void mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  }
}

// As mma_k8(), with a 16 x 16 and b 16 x 8.
template <typename T>
GSPN_DEVICE void mma_k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// a b + c of both elements of a word, each rounded once.
template <typename T>
GSPN_DEVICE uint32_t multiply_add_pairs(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(sizeof(T) == 2, "16-bit elements");
  uint32_t result;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  }
  return result;
}

// The transposed of an 8 x 8 matrix of 16-bit elements, of which a lane has row g, columns 2 t and 2 t + 1.
GSPN_DEVICE uint32_t transpose_matrix(uint32_t elements) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(elements));
  return result;
}

// Reads N = 1, 2 or 4 matrices of 8 x 8 16-bit elements from shared memory: lane 8 i + j gives the address of row j of
// matrix i, 16 bytes, aligned to 16 (addresses of further lanes are not used), and gets in r[i] row g, columns 2 t and 2
// t + 1 of it. kTransposed: rows 2 t and 2 t + 1, column g.
template <bool kTransposed, int N>
GSPN_DEVICE void load_matrices(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "as many matrices as one instruction reads");
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (N == 1 && kTransposed)
    asm("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  if constexpr (N == 1 && !kTransposed)
    asm("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(from) : "memory");
  if constexpr (N == 2 && kTransposed)
    asm("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
        : "=r"(r[0]), "=r"(r[1])
        : "r"(from)
        : "memory");
  if constexpr (N == 2 && !kTransposed)
    asm("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(from) : "memory");
  if constexpr (N == 4 && kTransposed)
    asm("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(from)
        : "memory");
  if constexpr (N == 4 && !kTransposed)
    asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
        : "r"(from)
        : "memory");
}

// Writes four matrices: the reverse of load_matrices().
template <bool kTransposed>
GSPN_DEVICE void store_matrices(void* row, const uint32_t (&r)[4]) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(row));
#if __CUDA_ARCH__ >= 900
  if constexpr (kTransposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
  }
#else
  const unsigned lane = threadIdx.x % kWarp;
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned at = __shfl_sync(kAllLanes, to, 8 * i + lane / 4) + lane % 4 * 4;
    const uint32_t word = kTransposed ? transpose_matrix(r[i]) : r[i];
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
  }
#endif
}

// Copies 16 bytes from global to shared memory, or writes zeros there and does not read. Like copy_async(), but past the
// first-level cache.
GSPN_DEVICE void copy_async_or_zero(void* shared, const void* global, bool copies) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(copies ? 16 : 0)
               : "memory");
}

// Ends a group of this thread's copies. wait_copies_but<N>() waits for all groups but the last N.
GSPN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
GSPN_DEVICE void wait_copies_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace gspn

#endif
