// One line of a scan, some vectors of channels at a time; and the gates as it wants them.
#pragma once

#include "cpu_vector.h"

namespace gspn {

// Gates of a line whose channels share them: a scalar of each, broadcast once for all vectors of a site.
template <typename A>
struct SharedLine {
  const A *lam, *out, *minus, *centre, *plus;  // at position 0; the others follow

  struct Site {
    Vector<A> lam_, out_;
    Weights<Vector<A>> weights_;
    GSPN_INLINE Vector<A> lam(int) const { return lam_; }
    GSPN_INLINE Vector<A> out(int) const { return out_; }
    GSPN_INLINE Weights<Vector<A>> weights(int, bool, bool) const { return weights_; }
  };
  GSPN_INLINE Site site(int64_t j) const { return {lam[j], out[j], {minus[j], centre[j], plus[j]}}; }
};

// Gates of a line whose channels each have their own, read where they lie.
template <typename T, typename A>
struct OwnLine {
  struct Walk {  // position 0 of the line, and the strides to the next position and the next channel
    const T* data;
    int64_t step, lane;
  };
  Walk lam_, out_, logits_[3];
  int64_t channels;

  struct Site {
    const OwnLine& line;
    int64_t j;
    GSPN_INLINE Vector<A> read(const Walk& walk, int v) const {
      constexpr int kLanes = Vector<A>::kLanes;
      const T* from = walk.data + j * walk.step + v * kLanes * walk.lane;
      __builtin_prefetch(from + kAhead * walk.step);
      return Vector<A>::load(from, walk.lane, line.channels - v * kLanes);
    }
    GSPN_INLINE Vector<A> lam(int v) const { return read(line.lam_, v); }
    GSPN_INLINE Vector<A> out(int v) const { return line.out_.data ? read(line.out_, v) : Vector<A>(A(1)); }
    GSPN_INLINE Weights<Vector<A>> weights(int v, bool has_minus, bool has_plus) const {
      return normalise(read(line.logits_[0], v), read(line.logits_[1], v), read(line.logits_[2], v), has_minus, has_plus);
    }
  };
  GSPN_INLINE Site site(int64_t j) const { return {*this, j}; }

 private:
  static constexpr int64_t kAhead = 4;  // sites lie pages apart, where the hardware does not look ahead by itself
};

// h along a line from the line before (which may be the same memory), kVectors of channels from where the pointers
// point, `width` channels a site. kStart: there is no line before. `value(j, v)` is x, `leave(j, v, u, h)` takes h.
// A zero position follows the last one of `before`.
template <int kVectors, bool kStart, typename Line, typename A, typename Value, typename Leave>
GSPN_INLINE void scan_line(const Line& gates, int64_t positions, int64_t width, const A* before, A* h, Value value, Leave leave) {
  using V = Vector<A>;
  V minus[kVectors], centre[kVectors];
  if constexpr (!kStart)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      minus[v] = A(0);
      centre[v] = V::load(before + v * V::kLanes);
    }
  for (int64_t j = 0; j < positions; ++j) {
    const auto site = gates.site(j);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      V now = site.lam(v) * value(j, v);
      if constexpr (!kStart) {
        const V plus = V::load(before + (j + 1) * width + v * V::kLanes);
        now = advance(site.weights(v, j > 0, j + 1 < positions), minus[v], centre[v], plus, now);
        minus[v] = centre[v];
        centre[v] = plus;
      }
      now.store(h + j * width + v * V::kLanes);
      leave(j, v, site.out(v), now);
    }
  }
}

}  // namespace gspn
