// As many channels as fit a vector register, for the loops that the compiler does not keep in registers by itself.
// Written with the vector extensions that gcc and clang have for every machine.
#pragma once

#include "cpu/map.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace gspn {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct Register;
template <>
struct Register<float> {
  typedef float Lanes __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Register<double> {
  typedef double Lanes __attribute__((vector_size(kVectorBytes)));
};

template <typename A>
struct Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(A);
  using Lanes = typename Register<A>::Lanes;
  Lanes lanes;

  Vector() = default;
  GSPN_INLINE Vector(Lanes from) : lanes(from) {}
  GSPN_INLINE Vector(A value) : lanes(value - Lanes{}) {}

  // kLanes elements side by side.
  template <typename T>
  static GSPN_INLINE Vector load(const T* from) {
    Vector v;
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(&v, from, sizeof v);
    } else {
      alignas(kVectorBytes) A lane[kLanes];
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) lane[i] = gspn::load(from[i]);
      std::memcpy(&v, lane, sizeof v);
    }
    return v;
  }
  template <typename T>
  GSPN_INLINE void store(T* to) const {
    if constexpr (std::is_same_v<T, A>) {
      std::memcpy(to, &lanes, sizeof lanes);
    } else {
      alignas(kVectorBytes) A lane[kLanes];
      std::memcpy(lane, &lanes, sizeof lane);
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) gspn::store(to[i], lane[i]);
    }
  }

  // The first n of kLanes elements, `stride` apart; the other lanes are 0, and are not stored. Out of line: the rare
  // case.
  template <typename T>
  static __attribute__((noinline)) Vector load_some(const T* from, int64_t stride, int64_t n) {
    A lane[kLanes] = {};
    gather(lane, from, stride, std::min<int64_t>(n, kLanes));
    return load(lane);
  }
  template <typename T>
  __attribute__((noinline)) void store_some(T* to, int64_t stride, int64_t n) const {
    A lane[kLanes];
    store(lane);
    scatter(to, stride, lane, std::min<int64_t>(n, kLanes));
  }

  // A whole cache line, past the caches: `to` is aligned to one. Only where kStreams.
#if defined(__AVX512F__)
  static constexpr bool kStreams = true;
  GSPN_INLINE void stream(A* to) const {
    if constexpr (std::is_same_v<A, float>) _mm512_stream_ps(to, lanes);
    else _mm512_stream_pd(to, lanes);
  }
  static void finish_streams() { _mm_sfence(); }  // before another thread may be told that the data is there
#else
  static constexpr bool kStreams = false;
  GSPN_INLINE void stream(A* to) const { store(to); }
  static void finish_streams() {}
#endif

  friend GSPN_INLINE Vector operator+(Vector a, Vector b) { return a.lanes + b.lanes; }
  friend GSPN_INLINE Vector operator-(Vector a, Vector b) { return a.lanes - b.lanes; }
  friend GSPN_INLINE Vector operator*(Vector a, Vector b) { return a.lanes * b.lanes; }
  friend GSPN_INLINE Vector operator/(Vector a, Vector b) { return a.lanes / b.lanes; }

  // What the maths of propagate.h asks of a number, for vectors of them.
  friend GSPN_INLINE Vector minimum(Vector a, Vector bound) { return bound.lanes < a.lanes ? bound.lanes : a.lanes; }
  friend GSPN_INLINE Vector maximum(Vector a, Vector bound) { return bound.lanes > a.lanes ? bound.lanes : a.lanes; }
  friend GSPN_INLINE Vector times_power_of_two(Vector p, Vector shifted) {
    using Bits = typename Register<A>::Bits;
    return (Lanes)((Bits)p.lanes + ((Bits)shifted.lanes << 23));
  }
};

#if defined(__AVX__)
template <typename T>
constexpr bool kTransposes = std::is_same_v<T, float>;

// Four numbers side by side at each of eight tokens, `step` apart: the n-th of all tokens go to to[n] + offset, unless
// to[n] is null.
inline void transpose_4x8(const float* from, int64_t step, float* const (&to)[4], int64_t offset) {
  __m256 token[4];  // and the fourth token after it
  for (int s = 0; s < 4; ++s)
    token[s] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from + s * step)),
                                    _mm_loadu_ps(from + (s + 4) * step), 1);
  const __m256 a = _mm256_unpacklo_ps(token[0], token[1]), b = _mm256_unpacklo_ps(token[2], token[3]);
  const __m256 c = _mm256_unpackhi_ps(token[0], token[1]), d = _mm256_unpackhi_ps(token[2], token[3]);
  if (to[0]) _mm256_storeu_ps(to[0] + offset, _mm256_shuffle_ps(a, b, 0x44));
  if (to[1]) _mm256_storeu_ps(to[1] + offset, _mm256_shuffle_ps(a, b, 0xee));
  if (to[2]) _mm256_storeu_ps(to[2] + offset, _mm256_shuffle_ps(c, d, 0x44));
  if (to[3]) _mm256_storeu_ps(to[3] + offset, _mm256_shuffle_ps(c, d, 0xee));
}
#else
template <typename T>
constexpr bool kTransposes = false;
#endif

template <typename A>
struct Bounds<Vector<A>> : Bounds<A> {};

inline Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x.lanes[i] = std::exp(x.lanes[i]);
  return x;
}

}  // namespace gspn
