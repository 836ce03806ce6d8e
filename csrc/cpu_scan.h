// One line of a scan, some vectors of channels at a time; and the gates as it wants them.
#pragma once

#include "cpu_vector.h"

namespace gspn {

// Gates of a line whose channels share them: one number of each, broadcast once for all vectors of a site. kOut: u is there.
template <typename A, bool kOut>
struct SharedLine {
  const A *lam, *out, *minus, *centre, *plus;  // at position 0; the others follow

  struct Site {
    Vector<A> lam_, out_;
    Weights<Vector<A>> weights_;
    GSPN_INLINE Vector<A> lam(int) const { return lam_; }
    GSPN_INLINE Vector<A> out(int) const { return out_; }
    GSPN_INLINE Weights<Vector<A>> weights(int, bool, bool) const { return weights_; }
  };
  GSPN_INLINE Site site(int64_t j) const {
    return {lam[j], kOut ? out[j] : A(1), {minus[j], centre[j], plus[j]}};
  }
};

// Gates of a line whose channels each have their own, read where they lie. kWhole: channels lie side by side, and there
// are as many as the scan takes.
template <typename T, typename A, bool kWhole>
struct OwnLine {
  struct Walk {
    const T* first;  // at position 0
    int64_t step, stride;  // to the next position, and to the next channel
  };
  Walk lam, out, logits[3];
  int64_t channels;

  struct Site {
    const OwnLine& line;
    int64_t j;

    GSPN_INLINE Vector<A> read(const Walk& walk, int v) const {
      constexpr int64_t kAhead = 4;  // sites lie pages apart, where the hardware does not look ahead by itself
      const int64_t channel = v * Vector<A>::kLanes;
      if constexpr (kWhole) {
        const T* from = walk.first + j * walk.step + channel;
        __builtin_prefetch(from + kAhead * walk.step);
        return Vector<A>::load(from);
      } else {
        const T* from = walk.first + j * walk.step + channel * walk.stride;
        return Vector<A>::load_some(from, walk.stride, line.channels - channel);
      }
    }
    GSPN_INLINE Vector<A> lam(int v) const { return read(line.lam, v); }
    GSPN_INLINE Vector<A> out(int v) const { return line.out.first ? read(line.out, v) : Vector<A>(A(1)); }
    GSPN_INLINE Weights<Vector<A>> weights(int v, bool has_minus, bool has_plus) const {
      return normalise(read(line.logits[0], v), read(line.logits[1], v), read(line.logits[2], v), has_minus, has_plus);
    }
  };
  GSPN_INLINE Site site(int64_t j) const { return {*this, j}; }
};

// The new h along a line, in place of that of the line before; kStart: there is none. `h` is kVectors of channels a site
// and a position of zeros after the last. `value(j, v)` is x, `leave(j, v, u, h)` takes what has come out.
template <int kVectors, bool kStart, typename Line, typename A, typename Value, typename Leave>
GSPN_INLINE void scan_line(const Line& line, int64_t positions, const Vector<A> (&decay)[kVectors], A* h, Value value,
                           Leave leave) {
  using V = Vector<A>;
  const auto at = [&](int64_t j, int v) { return h + (j * kVectors + v) * V::kLanes; };
  V minus[kVectors], centre[kVectors];  // of the line before: the neighbours stay in registers as j advances
  if constexpr (!kStart)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) minus[v] = A(0), centre[v] = V::load(at(0, v));
  for (int64_t j = 0; j < positions; ++j) {
    const auto site = line.site(j);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      V now = site.lam(v) * value(j, v);
      if constexpr (!kStart) {
        const V plus = V::load(at(j + 1, v));
        now = advance(site.weights(v, j > 0, j + 1 < positions), minus[v], centre[v], plus, decay[v], now);
        minus[v] = centre[v];
        centre[v] = plus;
      }
      now.store(at(j, v));
      leave(j, v, site.out(v), now);
    }
  }
}

}  // namespace gspn
