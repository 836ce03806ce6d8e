// As many channels as fit a vector register, for the loops that the compiler would not keep in registers by itself.
#pragma once

#include "cpu_map.h"

#if defined(__AVX512F__)
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

  // The first n of kLanes elements, `stride` apart; 0 in the other lanes.
  template <typename T>
  static GSPN_INLINE Vector load(const T* from, int64_t stride, int64_t n) {
    Vector v;
    if (stride == 1 && n >= kLanes) {
      if constexpr (std::is_same_v<T, A>) std::memcpy(&v, from, sizeof v);
      else for (int i = 0; i < kLanes; ++i) v.lanes[i] = gspn::load(from[i]);
    } else {
      alignas(kVectorBytes) A lane[kLanes] = {};
      for (int i = 0; i < kLanes && i < n; ++i) lane[i] = gspn::load(from[i * stride]);
      std::memcpy(&v, lane, sizeof v);
    }
    return v;
  }
  static GSPN_INLINE Vector load(const A* from) {
    Vector v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  GSPN_INLINE void store(A* to) const { std::memcpy(to, &lanes, sizeof lanes); }
  template <typename T>
  GSPN_INLINE void store(T* to, int64_t stride, int64_t n) const {
    if (stride == 1 && n >= kLanes) {
      if constexpr (std::is_same_v<T, A>) std::memcpy(to, &lanes, sizeof lanes);
      else for (int i = 0; i < kLanes; ++i) gspn::store(to[i], lanes[i]);
    } else {
      alignas(kVectorBytes) A lane[kLanes];
      std::memcpy(lane, &lanes, sizeof lane);
      for (int i = 0; i < kLanes && i < n; ++i) gspn::store(to[i * stride], lane[i]);
    }
  }

  friend GSPN_INLINE Vector operator+(Vector a, Vector b) { return a.lanes + b.lanes; }
  friend GSPN_INLINE Vector operator-(Vector a, Vector b) { return a.lanes - b.lanes; }
  friend GSPN_INLINE Vector operator*(Vector a, Vector b) { return a.lanes * b.lanes; }
  friend GSPN_INLINE Vector operator/(Vector a, Vector b) { return a.lanes / b.lanes; }
  friend GSPN_INLINE Vector minimum(Vector a, Vector b) { return a.lanes < b.lanes ? a.lanes : b.lanes; }
  friend GSPN_INLINE Vector maximum(Vector a, Vector b) { return a.lanes > b.lanes ? a.lanes : b.lanes; }

  // p 2^n, n in the low bits of `shifted`: as for a float.
  friend GSPN_INLINE Vector times_power_of_two(Vector p, Vector shifted) {
    using Bits = typename Register<A>::Bits;
    return (Lanes)((Bits)p.lanes + ((Bits)shifted.lanes << 23));
  }
};

template <typename A>
struct Bounds<Vector<A>> : Bounds<A> {};

inline Vector<double> exp_nonpositive(Vector<double> x) {
  for (int i = 0; i < Vector<double>::kLanes; ++i) x.lanes[i] = std::exp(x.lanes[i]);
  return x;
}

}  // namespace gspn
