// One line of a forward scan, a few vectors of channels at a time, and the gates in the form that it reads.
#pragma once

#include "cpu/vector.h"
#include "scan.h"

namespace gspn {

// Gates of a line whose channels share them: one number of each per token, broadcast once for all its vectors.
template <typename A, bool kHasOutputGate>
struct SharedLine {
  const A *input_gate, *output_gate, *minus, *centre, *plus;  // at position 0; the others follow

  struct Token {
    Vector<A> input_gate_, output_gate_;
    Weights<Vector<A>> weights_;
    GSPN_INLINE Vector<A> input_gate(int) const { return input_gate_; }
    GSPN_INLINE Vector<A> output_gate(int) const { return output_gate_; }
    GSPN_INLINE Weights<Vector<A>> weights(int, bool, bool) const { return weights_; }
  };
  GSPN_INLINE Token token(int64_t j) const {
    return {input_gate[j], kHasOutputGate ? output_gate[j] : A(1), {minus[j], centre[j], plus[j]}};
  }
};

// Gates of a line whose channels each have their own, read in place. kWhole: channels lie side by side, and there are
// as many as the vectors have lanes.
template <typename T, typename A, bool kWhole>
struct OwnLine {
  struct Walk {
    const T* first;  // at position 0
    int64_t step, stride;  // to the next position, and to the next channel
  };
  Walk input_gate, output_gate, logits[3];
  int64_t channels;

  struct Token {
    const OwnLine& line;
    int64_t j;

    GSPN_INLINE Vector<A> read(const Walk& walk, int v) const {
      constexpr int64_t kAhead = 4;  // tokens lie pages apart: the hardware does not prefetch across pages
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
    GSPN_INLINE Vector<A> input_gate(int v) const { return read(line.input_gate, v); }
    GSPN_INLINE Vector<A> output_gate(int v) const {
      return line.output_gate.first ? read(line.output_gate, v) : Vector<A>(A(1));
    }
    GSPN_INLINE Weights<Vector<A>> weights(int v, bool has_minus, bool has_plus) const {
      return normalise(read(line.logits[0], v), read(line.logits[1], v), read(line.logits[2], v), has_minus, has_plus);
    }
  };
  GSPN_INLINE Token token(int64_t j) const { return {*this, j}; }
};

// Advances h by one line. `h` holds the line before (kStart: there is none) and is overwritten: kVectors of channels
// per token, and a position of zeros after the last. `value(j, v)` returns x; `emit(j, v, u, h)` receives the result.
template <int kVectors, bool kStart, typename Line, typename A, typename Value, typename Emit>
GSPN_INLINE void scan_line(const Line& line, const Lines<int64_t>& map, const Vector<A> (&decay)[kVectors], A* h,
                           Value value, Emit emit) {
  using V = Vector<A>;
  const auto at = [&](int64_t j, int v) { return h + (j * kVectors + v) * V::kLanes; };
  V minus[kVectors], centre[kVectors];  // of the line before: the neighbours stay in registers as j advances
  if constexpr (!kStart)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) minus[v] = A(0), centre[v] = V::load(at(0, v));
  for (int64_t j = 0; j < map.positions; ++j) {
    const auto token = line.token(j);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      V now = token.input_gate(v) * value(j, v);
      if constexpr (!kStart) {
        const V plus = V::load(at(j + 1, v));
        now = advance(token.weights(v, map.has_minus(j), map.has_plus(j)), minus[v], centre[v], plus, decay[v], now);
        minus[v] = centre[v];
        centre[v] = plus;
      }
      now.store(at(j, v));
      emit(j, v, token.output_gate(v), now);
    }
  }
}

}  // namespace gspn
