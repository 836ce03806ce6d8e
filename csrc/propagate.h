// The maths of GSPN propagation, once, for the CPU and the CUDA kernels. No torch header is needed here.
//
// One direction, line i, position j (GSPN, arXiv 2501.12381):
//   h[i,j] = w-[i,j] h[i-1,j-1] + w0[i,j] h[i-1,j] + w+[i,j] h[i-1,j+1] + λ[i,j] x[i,j],      y += u[i,j] h[i,j]
// with w = sigmoid(logits) divided by its sum over the neighbours inside the map.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GSPN_INLINE __host__ __device__ __forceinline__
#else
#define GSPN_INLINE inline __attribute__((always_inline))
#endif

namespace gspn {

enum Direction : int { kDown = 0, kUp = 1, kRight = 2, kLeft = 3 };

GSPN_INLINE bool lines_are_rows(int direction) { return direction == kDown || direction == kUp; }
GSPN_INLINE bool far_end_first(int direction) { return direction == kUp || direction == kLeft; }

// e^x for x <= 0. On the CPU in float32 a polynomial without branches, so that loops over channels vectorise:
// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. Below -87 it returns e^-87, about 1e-38.
GSPN_INLINE double exp_nonpositive(double x) { return std::exp(x); }

GSPN_INLINE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  x = x < -87.f ? -87.f : x;
  const float shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the fraction rounds away, n stays in the low bits
  const float n = shifted - 12582912.f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 8.29765e-3f;  // the polynomial of degree 5 with the least relative error there, 8e-8
  p = p * r + 4.191538e-2f;
  p = p * r + 1.6667575e-1f;
  p = p * r + 4.9998895e-1f;
  p = p * r + 9.9999969e-1f;
  p = p * r + 1.00000007f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;  // the exponent field of 2^n: the high bits of `shifted` fall off the left end
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
#endif
}

template <typename T>
struct Weights {
  T minus, centre, plus;
};

// e^(-|l| - shift), or 1 where that is more: a neighbour outside the map may exceed the largest inside.
template <typename T>
GSPN_INLINE T decay(T l, T shift) {
  const T exponent = (l < T(0) ? l : -l) - shift;
  return exp_nonpositive(exponent < T(0) ? exponent : T(0));
}

// Row-stochastic weights of three logits; has_minus and has_plus are 1, or 0 where the neighbour lies outside the map.
//
// With t = e^-|l|, σ(l) = (l < 0 ? t : 1) / (1 + t); putting the three over one denominator leaves one division. Where all
// logits lie below -60, where 1 + t is 1, the largest is taken out of the exponents, so that nothing underflows: weights
// are finite and sum to 1 for logits of any size.
template <typename T>
GSPN_INLINE Weights<T> normalise(T minus, T centre, T plus, T has_minus, T has_plus) {
  const T zero = 0, one = 1, low = -60;
  T largest = centre;
  largest = (has_minus > zero && minus > largest) ? minus : largest;
  largest = (has_plus > zero && plus > largest) ? plus : largest;
  const T shift = largest < low ? largest : zero;
  const T counts = largest < low ? zero : one;
  const T a = decay(minus, shift), b = decay(centre, shift), c = decay(plus, shift);
  const T na = minus < zero ? a : one, nb = centre < zero ? b : one, nc = plus < zero ? c : one;
  const T da = one + counts * a, db = one + counts * b, dc = one + counts * c;
  const T sa = has_minus * na * (db * dc), sb = nb * (da * dc), sc = has_plus * nc * (da * db);
  const T scale = one / (sa + sb + sc);
  return {sa * scale, sb * scale, sc * scale};
}

// 1 - σ(l), the derivative of log σ(l).
template <typename T>
GSPN_INLINE T one_minus_sigmoid(T l) {
  const T zero = 0, one = 1;
  const T e = exp_nonpositive(l < zero ? l : -l);
  return (l < zero ? one : e) / (one + e);
}

// Gradient of the logits from that of the weights: dl_n = (1 - σ(l_n)) w_n (dw_n - Σ_m w_m dw_m).
template <typename T>
GSPN_INLINE Weights<T> normalise_backward(T minus, T centre, T plus, Weights<T> w, Weights<T> grad) {
  const T mean = w.minus * grad.minus + w.centre * grad.centre + w.plus * grad.plus;
  return {one_minus_sigmoid(minus) * w.minus * (grad.minus - mean),
          one_minus_sigmoid(centre) * w.centre * (grad.centre - mean),
          one_minus_sigmoid(plus) * w.plus * (grad.plus - mean)};
}

// One site of one line: the three neighbours on the line before, and what the site itself drives in.
template <typename T>
GSPN_INLINE T advance(Weights<T> w, T before_minus, T before_centre, T before_plus, T driven) {
  return w.minus * before_minus + w.centre * before_centre + w.plus * before_plus + driven;
}

}  // namespace gspn
