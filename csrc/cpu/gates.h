// How the CPU kernel stores gates: shared by the channels of a slab (GroupGates), or one set per channel
// (ChannelGates).
#pragma once

#include <limits>

#include "cpu/line.h"
#include "cpu/map.h"
#include "scan.h"

namespace gspn {

using Scan = ScanOrder<int64_t>;

// Gates in compact scratch, each an array along positions or channels. The normalised weights come before their logits.
enum Field {
  kInputGate,
  kOutputGate,
  kWeightMinus,
  kWeightCentre,
  kWeightPlus,
  kLogitMinus,
  kLogitCentre,
  kLogitPlus,
  kNumFields
};
template <typename A>
struct Gates {
  A* field[kNumFields];

  Gates operator+(int64_t offset) const {
    Gates moved;
    for (int f = 0; f < kNumFields; ++f) moved.field[f] = field[f] + offset;
    return moved;
  }
};

// Weights of n tokens or channels that have the same neighbours. Weights may overwrite their logits.
template <typename A>
void normalise_range(const Gates<A>& gates, int64_t n, bool has_minus, bool has_plus) {
  const A *minus = gates.field[kLogitMinus], *centre = gates.field[kLogitCentre], *plus = gates.field[kLogitPlus];
  A *w_minus = gates.field[kWeightMinus], *w_centre = gates.field[kWeightCentre], *w_plus = gates.field[kWeightPlus];
  const auto run = [&](auto with_minus, auto with_plus) {  // known to the compiler, so that the loop has no branches
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const Weights<A> w = normalise(minus[i], centre[i], plus[i], with_minus.value, with_plus.value);
      w_minus[i] = w.minus;
      w_centre[i] = w.centre;
      w_plus[i] = w.plus;
    }
  };
  if (has_minus && has_plus) run(std::true_type(), std::true_type());
  else if (has_minus) run(std::true_type(), std::false_type());
  else if (has_plus) run(std::false_type(), std::true_type());
  else run(std::false_type(), std::false_type());
}

// Gates of one group, which all channels of a slab share: prepared for the whole map and all directions at once.
template <typename Call, bool kHasOutputGate>
class GroupGates {
 public:
  using T = typename Call::Element;
  using A = Accumulator<T>;
  static constexpr bool shared = true;

  GroupGates(const Call& call, Scratch<A>& scratch, int64_t b, int64_t channel, int64_t /* slab channels */)
      : problem_(call.problem), field_size_((problem_.height * problem_.width + 2 * kLine - 1) / kLine * kLine) {
    data_ = scratch.get(problem_.num_directions * kStored * field_size_);
    const int64_t group = channel / (problem_.channels / problem_.groups);
    const bool fours = in_fours(call);
    for (int64_t i = 0; i < problem_.height; i += kTileRows)
      for (int64_t j = 0; j < problem_.width; j += kTileColumns) {
        if constexpr (kTransposes<T>)
          if (fours) {
            read_fours(call.gates, gate_at(call.gates, 5, b, i, j, 0, group), i, j, 3, kLogitMinus);
            read_fours(call.input_gate, gate_at(call.input_gate, 4, b, i, j, 0, group), i, j, 1, kInputGate);
            if constexpr (kHasOutputGate)
              read_fours(call.output_gate, gate_at(call.output_gate, 4, b, i, j, 0, group), i, j, 1, kOutputGate);
            continue;
          }
        for (int k = 0; k < problem_.num_directions; ++k) {
          const auto read = [&](int field, const Strided<const T>& t, int axis, int64_t offset) {
            read_tile(fields(k).field[field], t, gate_at(t, axis, b, i, j, k, group) + offset, k, i, j);
          };
          for (int n = 0; n < 3; ++n) read(kLogitMinus + n, call.gates, 5, n * call.gates.stride[4]);
          read(kInputGate, call.input_gate, 4, 0);
          if constexpr (kHasOutputGate) read(kOutputGate, call.output_gate, 4, 0);
        }
      }
    for (int k = 0; k < problem_.num_directions; ++k) {
      const Scan scan(problem_, problem_.directions[k]);
      const Gates<A> map = fields(k);
      const auto across_borders = [&](int minus, int plus, A value) {  // of the map and between windows
        for (int64_t i = 0; i < scan.lines; ++i)
          for (int64_t n = 0; n < scan.windows.count(); ++n) {
            map.field[minus][i * scan.positions + scan.windows.begin(n)] = value;
            map.field[plus][i * scan.positions + scan.windows.end(n) - 1] = value;
          }
      };
      // All tokens in one loop: a logit of -∞ gives a neighbour across a border a tiny weight, which is then set to 0.
      across_borders(kLogitMinus, kLogitPlus, -std::numeric_limits<A>::infinity());
      normalise_range(map, scan.lines * scan.positions, true, true);
      across_borders(kWeightMinus, kWeightPlus, A(0));
      if (Call::kIsBackward && !kHasOutputGate)
        std::fill_n(map.field[kOutputGate], scan.lines * scan.positions, A(1));
    }
  }

  // The gates of a line, from position 0 on: line() for the backward pass, along() for a forward scan.
  Gates<A> line(const Scan& scan, int k, int64_t line) const { return fields(k) + line * scan.positions; }

  template <bool kWhole>
  SharedLine<A, kHasOutputGate> along(const Call&, const Scan& scan, int k, int64_t number, int64_t,
                                      int64_t) const {
    const Gates<A> gates = line(scan, k, number);
    A* const* field = gates.field;
    return {field[kInputGate], field[kOutputGate], field[kWeightMinus], field[kWeightCentre], field[kWeightPlus]};
  }

  static Gates<A> token(const Gates<A>& line, const Call&, const Scan&, int, int64_t, int64_t position, bool) {
    return line + position;
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(A);
  // The map is read in tiles: small enough to stay in the nearest cache while each field is extracted, and with columns
  // that fill pieces of the cache lines of a field laid out by columns.
  static constexpr int64_t kTileRows = 8, kTileColumns = 32;
  // Only the backward pass needs the logits again; otherwise the weights overwrite them.
  static constexpr int kStored = Call::kIsBackward ? kNumFields : kLogitMinus;

  Gates<A> fields(int k) const {
    Gates<A> map;
    for (int f = 0; f < kNumFields; ++f)
      map.field[f] = data_ + (k * kStored + (f < kStored ? f : f - kLogitMinus + kWeightMinus)) * field_size_;
    return map;
  }

  void read_tile(A* to, const Strided<const T>& t, const T* from, int k, int64_t i, int64_t j) const {
    const int64_t rows = std::min(kTileRows, problem_.height - i), columns = std::min(kTileColumns, problem_.width - j);
    if (lines_are_rows(problem_.directions[k]))
      for (int64_t r = 0; r < rows; ++r)
        gather(to + (i + r) * problem_.width + j, from + r * t.stride[1], t.stride[2], columns);
    else
      for (int64_t c = 0; c < columns; ++c)
        gather(to + (j + c) * problem_.height + i, from + c * t.stride[2], t.stride[1], rows);
  }

  // Whether the numbers of all four directions lie side by side at a token, and lines are multiples of 8 tokens.
  bool in_fours(const Call& call) const {
    const auto side_by_side = [](const auto& t, int per_direction) {
      return !t.data || (t.stride[3] == per_direction && (per_direction == 1 || t.stride[4] == 1));
    };
    return problem_.num_directions == 4 && problem_.height % 8 == 0 && problem_.width % 8 == 0 &&
           side_by_side(call.gates, 3) && side_by_side(call.input_gate, 1) && side_by_side(call.output_gate, 1);
  }

  // Reads a tile of a tensor in fours: 4 · per_direction numbers per token, into the fields from `field` on.
  void read_fours(const Strided<const T>& t, const T* from, int64_t i, int64_t j, int per_direction, int field) const {
    const int64_t columns = std::min(kTileColumns, problem_.width - j);
    for (int four = 0; four < per_direction; ++four, from += 4)
      for (const bool rows : {true, false}) {
        A* to[4];  // null: a direction whose lines run the other way
        for (int e = 0; e < 4; ++e) {
          const int n = 4 * four + e, k = n / per_direction;
          to[e] = lines_are_rows(problem_.directions[k]) == rows ? fields(k).field[field + n % per_direction] : nullptr;
        }
        if (!to[0] && !to[1] && !to[2] && !to[3]) continue;
        if (rows)
          for (int64_t r = 0; r < kTileRows; ++r)
            for (int64_t c = 0; c < columns; c += 8)
              transpose_4x8(from + r * t.stride[1] + c * t.stride[2], t.stride[2], to,
                            (i + r) * problem_.width + j + c);
        else
          for (int64_t c = 0; c < columns; ++c)
            transpose_4x8(from + c * t.stride[2], t.stride[1], to, (j + c) * problem_.height + i);
      }
  }

  const Problem& problem_;
  int64_t field_size_;  // a cache line more than the tokens: fields of a power of two would share cache sets
  A* data_;
};

// Gates of a slab whose channels each have their own. They are many times as large as the map, so they are read token
// by token, when they are needed.
template <typename Call>
class ChannelGates {
 public:
  using T = typename Call::Element;
  using A = Accumulator<T>;
  static constexpr bool shared = false;

  ChannelGates(const Call& call, Scratch<A>& scratch, int64_t b, int64_t channel, int64_t channels)
      : b_(b), channel_(channel), channels_(channels) {
    A* data = scratch.get(kNumFields * channels);
    for (int f = 0; f < kNumFields; ++f) buffer_.field[f] = data + f * channels;
    if (!call.output_gate.data) std::fill_n(buffer_.field[kOutputGate], channels, A(1));
  }

  Gates<A> line(const Scan&, int, int64_t) const { return buffer_; }

  // The gates of a line for a forward scan, of `channels` channels from `channel` on.
  template <bool kWhole>
  OwnLine<T, A, kWhole> along(const Call& call, const Scan& scan, int k, int64_t line, int64_t channel,
                              int64_t channels) const {
    const int64_t row = scan.row(line, 0), column = scan.column(line, 0), neighbour = call.gates.stride[4];
    const auto walk = [&](const Strided<const T>& t, int axis, int64_t offset) -> typename OwnLine<T, A, kWhole>::Walk {
      if (!t.data) return {};
      const T* first = gate_at(t, axis, b_, row, column, k, channel) + offset;
      return {first, scan.rows ? t.stride[2] : t.stride[1], t.stride[axis]};
    };
    const auto logits = [&](int n) { return walk(call.gates, 5, n * neighbour); };
    return {walk(call.input_gate, 4, 0), walk(call.output_gate, 4, 0), {logits(0), logits(1), logits(2)}, channels};
  }

  Gates<A> token(Gates<A> buffer, const Call& call, const Scan& scan, int k, int64_t line, int64_t position,
                 bool needs_logits) const {
    const int64_t row = scan.row(line, position), column = scan.column(line, position);
    const auto read = [&](int field, const Strided<const T>& t, int axis, int64_t offset) {
      const T* from = gate_at(t, axis, b_, row, column, k, channel_) + offset;
      const T* ahead = from + kAhead * (scan.rows ? t.stride[2] : t.stride[1]);
      for (int64_t c = 0; c < channels_; c += 64 / sizeof(T)) __builtin_prefetch(ahead + c * t.stride[axis]);
      if constexpr (std::is_same_v<T, A>)
        if (t.stride[axis] == 1) return void(buffer.field[field] = const_cast<A*>(from));  // no copy needed
      gather(buffer.field[field], from, t.stride[axis], channels_);
    };
    read(kInputGate, call.input_gate, 4, 0);
    if (call.output_gate.data) read(kOutputGate, call.output_gate, 4, 0);
    if (needs_logits)
      for (int n = 0; n < 3; ++n) read(kLogitMinus + n, call.gates, 5, n * call.gates.stride[4]);
    return buffer;
  }

 private:
  static constexpr int64_t kAhead = 2;  // tokens lie pages apart: the hardware does not prefetch across pages
  int64_t b_, channel_, channels_;
  Gates<A> buffer_;
};

// A gate's value at channel c of a token: the group's, held in a register, or the channel's own.
template <typename A, bool shared>
struct GateValue {
  const A* value;
  A GSPN_INLINE operator[](int64_t c) const { return value[c]; }
};
template <typename A>
struct GateValue<A, true> {
  A value;
  explicit GateValue(const A* from) : value(*from) {}
  A GSPN_INLINE operator[](int64_t) const { return value; }
};

// The weights at channel c of a token: the group's, or from the channel's own logits.
template <typename A, bool shared>
struct TokenWeights {
  const A *minus, *centre, *plus;
  const bool has_minus, has_plus;
  TokenWeights(const Gates<A>& token, const Scan& scan, int64_t position)
      : minus(token.field[kLogitMinus]),
        centre(token.field[kLogitCentre]),
        plus(token.field[kLogitPlus]),
        has_minus(scan.has_minus(position)),
        has_plus(scan.has_plus(position)) {}
  Weights<A> GSPN_INLINE operator[](int64_t c) const {
    return normalise(minus[c], centre[c], plus[c], has_minus, has_plus);
  }
};
template <typename A>
struct TokenWeights<A, true> {
  Weights<A> value;
  TokenWeights(const Gates<A>& token, const Scan&, int64_t)
      : value{*token.field[kWeightMinus], *token.field[kWeightCentre], *token.field[kWeightPlus]} {}
  Weights<A> GSPN_INLINE operator[](int64_t) const { return value; }
};

}  // namespace gspn
