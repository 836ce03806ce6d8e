// The maths of GSPN propagation, once, for the CPU and the CUDA kernels. No torch header is needed here.
//
// One direction, line i, position j (GSPN, arXiv 2501.12381):
//   h[i,j] = f (w-[i,j] h[i-1,j-1] + w0[i,j] h[i-1,j] + w+[i,j] h[i-1,j+1]) + λ[i,j] x[i,j],    y += s u[i,j] h[i,j]
// with x the values, y the result, h the hidden state, λ the input gate, u the output gate, and the weights w =
// sigmoid(logits) divided by its sum over the neighbours inside the map. f (decay) and s (scale) are one number per
// channel and direction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "inline.h"

namespace gspn {

// Of a NaN and a bound, the NaN: a run that diverges must show it.
template <typename T>
GSPN_INLINE T minimum(T a, T bound) {
  return bound < a ? bound : a;
}
template <typename T>
GSPN_INLINE T maximum(T a, T bound) {
  return bound > a ? bound : a;
}

// p 2^n for a p about 1, where `shifted` is 1.5 * 2^23 + n: n is added to p's exponent field.
GSPN_INLINE float times_power_of_two(float p, float shifted) {
  int32_t bits, n;
  std::memcpy(&bits, &p, sizeof bits);
  std::memcpy(&n, &shifted, sizeof n);
  bits += int32_t(uint32_t(n) << 23);  // the high bits of `shifted` fall off the left end
  std::memcpy(&p, &bits, sizeof p);
  return p;
}

// e^x for x <= 0, and up to 86. On the CPU in float32 a polynomial without branches, so that channels go in vectors:
// e^x = 2^n e^r with n = round(x / ln 2) and |r| <= ln 2 / 2. Below -86 it returns e^-86, about 4e-38.
GSPN_INLINE double exp_nonpositive(double x) { return std::exp(x); }

template <typename T>
GSPN_INLINE T exp_nonpositive(T x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);
#else
  x = maximum(x, T(-86.f));
  // + 1.5 * 2^23: the fraction rounds away, n stays in the low bits
  const T shifted = x * T(1.44269504f) + T(12582912.f);
  const T n = shifted - T(12582912.f);
  const T r = (x - n * T(0.693359375f)) + n * T(2.12194440e-4f);
  T p = T(8.29765e-3f);  // the polynomial of degree 5 with the least relative error there, 8e-8
  p = p * r + T(4.191538e-2f);
  p = p * r + T(1.6667575e-1f);
  p = p * r + T(4.9998895e-1f);
  p = p * r + T(9.9999969e-1f);
  p = p * r + T(1.00000007f);
  return times_power_of_two(p, shifted);
#endif
}

// 1 / x, for x from 1 to 2^126. On the GPU without the branch by which a division serves all other x.
template <typename T>
GSPN_INLINE T reciprocal(T x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return fmaf(r, fmaf(-x, r, 1.f), r);
#else
  return T(1) / x;
#endif
}

template <typename T>
struct Weights {
  T minus, centre, plus;
};

// Limits of `normalise`: below -kLow, σ(l) equals e^l to the last bit; two e^kHigh can be multiplied without overflow.
template <typename T>
struct Bounds {
  static constexpr float kLow = 20, kHigh = 42;
};
template <>
struct Bounds<double> {
  static constexpr double kLow = 40, kHigh = 340;
};

// 1 / σ(l) = 1 + e^-l, with l moved up by `shift`.
template <typename T>
GSPN_INLINE T inverse_sigmoid(T l, T shift) {
  return T(1) + exp_nonpositive(minimum(shift - l, T(Bounds<T>::kHigh)));
}

// Row-stochastic weights of three logits; has_minus and has_plus are 0 where the neighbour lies outside the map.
//
// Each weight is proportional to the product of the other two's 1 / σ: one division instead of three. If all logits are
// very negative, σ(l) ≈ e^l, so a common shift leaves the ratios unchanged and keeps e^-l finite. Weights are finite
// and sum to 1 for logits of any size.
template <typename T, typename Has>
GSPN_INLINE Weights<T> normalise(T minus, T centre, T plus, Has has_minus, Has has_plus) {
  T largest = centre;
  if (has_minus) largest = maximum(largest, minus);
  if (has_plus) largest = maximum(largest, plus);
  const T shift = minimum(largest + T(Bounds<T>::kLow), T(0));
  const T a = inverse_sigmoid(minus, shift), b = inverse_sigmoid(centre, shift), c = inverse_sigmoid(plus, shift);
  const T sa = has_minus ? b * c : T(0), sb = a * c, sc = has_plus ? a * b : T(0);
  const T scale = reciprocal(sa + sb + sc);
  return {sa * scale, sb * scale, sc * scale};
}

// 1 - σ(l), the derivative of log σ(l).
template <typename T>
GSPN_INLINE T one_minus_sigmoid(T l) {
  return reciprocal(T(1) + exp_nonpositive(minimum(l, T(2 * Bounds<T>::kHigh))));
}

// Gradient of the logits from that of the weights: dl_n = (1 - σ(l_n)) w_n (dw_n - Σ_m w_m dw_m).
template <typename T>
GSPN_INLINE Weights<T> normalise_backward(T minus, T centre, T plus, Weights<T> w, Weights<T> grad) {
  const T mean = w.minus * grad.minus + w.centre * grad.centre + w.plus * grad.plus;
  return {one_minus_sigmoid(minus) * w.minus * (grad.minus - mean),
          one_minus_sigmoid(centre) * w.centre * (grad.centre - mean),
          one_minus_sigmoid(plus) * w.plus * (grad.plus - mean)};
}

// The weighted sum of a token's three neighbours on the line before.
template <typename T>
GSPN_INLINE T carried(Weights<T> w, T before_minus, T before_centre, T before_plus) {
  return w.minus * before_minus + w.centre * before_centre + w.plus * before_plus;
}

// h of one token: that sum times f, plus the token's own input.
template <typename T>
GSPN_INLINE T advance(Weights<T> w, T before_minus, T before_centre, T before_plus, T decay, T driven) {
  return decay * carried(w, before_minus, before_centre, before_plus) + driven;
}

}  // namespace gspn
