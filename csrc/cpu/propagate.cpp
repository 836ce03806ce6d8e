// GSPN propagation on the CPU, channels last: a SIMD lane is a channel, a thread works on a slab of channels of one
// image.
//
// A unit copies its slab of the map once into compact scratch, runs every direction there, and writes the result once.
// Channels of a slab either share their gates (a slab within one group) or have their own (one channel per group).
#include "propagate.h"

#include <array>

#include "cpu/backward.h"
#include "cpu/gates.h"
#include "cpu/kernel.h"
#include "cpu/line.h"
#include "cpu/map.h"
#include "scan.h"

namespace gspn {
namespace {

// How the channels of an image are cut into units, and a unit into slabs, which run one at a time. No slab crosses a
// group, unless every channel is a group of its own.
struct Cut {
  bool shared;
  int64_t span, unit_width, slab_width, units_per_span, count;  // count: units per image

  Cut(const Problem& p, int64_t slab, bool whole_groups) : shared(p.groups < p.channels) {
    span = shared ? p.channels / p.groups : p.channels;
    slab_width = std::min(slab, span);
    unit_width = shared && whole_groups ? span : slab_width;
    units_per_span = (span + unit_width - 1) / unit_width;
    count = p.channels / span * units_per_span;
  }

  // Units are whole groups, so that gates are prepared once, as long as there are enough of them for the threads.
  static Cut forward(const Problem& p, int64_t slab, int64_t threads) {
    return Cut(p, slab, p.batch * p.groups >= threads);
  }
  // The gates' gradients are sums over a group's channels: a group is one slab, so the sums need no second pass.
  static Cut backward(const Problem& p) {
    return Cut(p, p.groups < p.channels ? p.channels : p.height * p.width <= 64 * 64 ? 64 : 16, true);
  }

  int64_t first_channel(int64_t unit) const {
    return unit / units_per_span * span + unit % units_per_span * unit_width;
  }
  int64_t end_channel(int64_t unit) const {
    return std::min(first_channel(unit) + unit_width, (unit / units_per_span + 1) * span);
  }
};

// Directions in the order in which they run. The first one also reads x and the last one also writes y, so both have
// lines along rows, as memory does, if there are two of those.
std::array<int, 4> running_order(const Problem& p) {
  std::array<int, 4> order{0, 1, 2, 3};
  const auto rows = [&](int k) { return lines_are_rows(p.directions[k]); };
  const auto end = order.begin() + p.num_directions;
  const auto columns = std::stable_partition(order.begin(), end, rows);
  if (columns - order.begin() > 1) std::rotate(order.begin() + 1, columns, end);
  return order;
}

// Slabs of the forward pass: one cache line of channels per token, or two if the map is small enough for the caches.
template <typename A>
struct ForwardSlab {
  static constexpr int kNarrow = 64 / kVectorBytes, kWide = kVectorBytes == 64 ? 2 : kNarrow;

  static int64_t channels(const Problem& p) {
    return (p.height * p.width <= 64 * 64 ? kWide : kNarrow) * Vector<A>::kLanes;
  }
};

enum class Turn { kOnly, kFirst, kMiddle, kLast };

// Runs the directions of one slab in turn. kWhole: it has all kWidth channels, side by side in every tensor.
template <int kVectors, bool kWhole, typename SlabGates, typename T>
struct ForwardPass {
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int64_t kWidth = kVectors * V::kLanes, kAhead = 16;

  const Forward<T>& call;
  const SlabGates& gates;
  Workspace<A>& work;
  int64_t b, channel, channels;
  Slab<A> x{work.x, call.problem, kWidth}, y{work.y, call.problem, kWidth};

  void run() {
    const auto order = running_order(call.problem);
    const int last = call.problem.num_directions - 1;
    if (last == 0) return scan<Turn::kOnly>(order[0]);
    scan<Turn::kFirst>(order[0]);
    for (int turn = 1; turn < last; ++turn) scan<Turn::kMiddle>(order[turn]);
    scan<Turn::kLast>(order[last]);
  }

  template <Turn turn>
  void scan(int k) {
    constexpr bool reads = turn == Turn::kOnly || turn == Turn::kFirst;
    constexpr bool writes = turn == Turn::kOnly || turn == Turn::kLast;
    const Scan scan(call.problem, call.problem.directions[k]);
    A* h = work.lines.get((scan.positions + 1) * kWidth);
    std::fill_n(h + scan.positions * kWidth, kWidth, A(0));
    const int along = scan.rows ? 2 : 1;  // the axis
    const int64_t x_step = call.x.stride[along], y_step = call.y.stride[along];
    const int64_t step = scan.rows ? kWidth : x.row_stride;
    // Along a column every token is in another page: prefetch the next column's tokens. (Rows, if there are any, are
    // first and last.)
    constexpr bool prefetches = turn == Turn::kMiddle;
    const int64_t next_column = scan.reversed ? -kWidth : kWidth;
    const bool past_caches = kWhole && streams();
    V decay[kVectors], scale[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      decay[v] = of_channels(call.decay, k, v);
      scale[v] = of_channels(call.scale, k, v);
    }
    for (int64_t c = 0; c < scan.chunks.count(); ++c)
      for (int64_t n = 0; n < scan.chunk_lines(c); ++n) {
        const int64_t line = scan.line(c, n), row = scan.row(line, 0), column = scan.column(line, 0);
        const T* from = map_at(call.x, b, row, column, channel);
        T* to = map_at(call.y, b, row, column, channel);
        A *x_line = x.at(row, column), *y_line = y.at(row, column);
        const auto value = [&](int64_t j, int v) __attribute__((always_inline)) {
          A* kept = x_line + j * step + v * V::kLanes;
          if constexpr (reads) {
            const V loaded = read_token(from + j * x_step, v);
            if (starts_line(v)) __builtin_prefetch(from + (j + kAhead) * x_step + v * V::kLanes);
            loaded.store(kept);
            return loaded;
          } else {
            if (prefetches && starts_line(v)) __builtin_prefetch(kept + next_column);
            return V::load(kept);
          }
        };
        const auto emit = [&](int64_t j, int v, V output_gate, V now) __attribute__((always_inline)) {
          A* kept = y_line + j * step + v * V::kLanes;
          if (prefetches && starts_line(v)) __builtin_prefetch(kept + next_column, 1);
          V sum = scale[v] * output_gate * now;
          if constexpr (!reads) sum = sum + V::load(kept);
          if constexpr (writes) write_token(to + j * y_step, v, sum, y_step, past_caches);
          else sum.store(kept);
        };
        const auto line_gates = gates.template along<kWhole>(call, scan, k, line, channel, channels);
        if (n) scan_line<kVectors, false>(line_gates, scan, decay, h, value, emit);
        else scan_line<kVectors, true>(line_gates, scan, decay, h, value, emit);
      }
    if (past_caches) V::finish_streams();
  }

  // Whether a token's v-th vector is the first in its cache line: one prefetch per cache line is enough.
  static constexpr bool starts_line(int v) { return v * kVectorBytes % 64 == 0; }
  // f or s of the v-th vector of channels.
  V of_channels(const A* factor, int k, int v) const {
    const int64_t first = v * V::kLanes;
    return factor ? V::load_some(factor + k * call.problem.channels + channel + first, 1, channels - first) : V(A(1));
  }
  GSPN_INLINE V read_token(const T* token, int v) const {
    const int64_t stride = call.x.stride[3], first = v * V::kLanes;
    if constexpr (kWhole) return V::load(token + first);
    else return V::load_some(token + first * stride, stride, channels - first);
  }
  GSPN_INLINE void write_token(T* token, int v, V sum, int64_t y_step, bool past_caches) const {
    const int64_t stride = call.y.stride[3], first = v * V::kLanes;
    if constexpr (std::is_same_v<T, A> && kWhole)
      if (past_caches) return sum.stream(token + first);
    if (starts_line(v)) __builtin_prefetch(token + first + kAhead * y_step, 1);
    if constexpr (kWhole) sum.store(token + first);
    else sum.store_some(token + first * stride, stride, channels - first);
  }

  // Whether y is written past the caches: it is too large to stay in them, and made of whole cache lines.
  bool streams() const {
    constexpr int64_t kLarge = 16 << 20;
    const Problem& p = call.problem;
    bool aligned = (reinterpret_cast<uintptr_t>(call.y.data + channel) & 63) == 0;
    for (int axis = 0; axis < 3; ++axis) aligned &= call.y.stride[axis] * sizeof(T) % 64 == 0;
    return V::kStreams && aligned && p.batch * p.height * p.width * p.channels * int64_t(sizeof(T)) >= kLarge;
  }
};

// A type as a value.
template <typename T>
struct Named {
  using Type = T;
};

// Runs units [first, last), slab by slab.
template <typename SlabGates, typename Call, typename RunSlab>
void run_units(const Call& call, const Cut& cut, int64_t first, int64_t last, RunSlab run_slab) {
  // Small scratch is kept between calls: page faults in fresh memory would take longer than the scan.
  static thread_local Workspace<typename SlabGates::A> work;
  for (int64_t u = first; u < last; ++u) {
    const int64_t b = u / cut.count, begin = cut.first_channel(u % cut.count), end = cut.end_channel(u % cut.count);
    const SlabGates gates(call, work.gates, b, begin, std::min(cut.slab_width, end - begin));
    for (int64_t channel = begin; channel < end; channel += cut.slab_width)
      run_slab(gates, work, b, channel, std::min(cut.slab_width, end - channel));
  }
  work.release_above(8 << 20);
}

}  // namespace

template <typename T>
int64_t forward_units(const Forward<T>& call, int64_t threads) {
  const Problem& p = call.problem;
  return p.batch * Cut::forward(p, ForwardSlab<Accumulator<T>>::channels(p), threads).count;
}

template <typename T>
void run_forward(const Forward<T>& call, int64_t threads, int64_t first_unit, int64_t last_unit) {
  using A = Accumulator<T>;
  using Size = ForwardSlab<A>;
  constexpr int64_t kLanes = Vector<A>::kLanes;
  const Cut cut = Cut::forward(call.problem, Size::channels(call.problem), threads);
  const auto one = [](const auto& t, int axis) { return !t.data || t.stride[axis] == 1; };
  const bool side_by_side = one(call.x, 3) && one(call.y, 3) &&
                            (cut.shared || (one(call.gates, 5) && one(call.input_gate, 4) && one(call.output_gate, 4)));
  const auto run_slab = [&](const auto& gates, auto& work, int64_t b, int64_t channel, int64_t channels) {
    using SlabGates = std::decay_t<decltype(gates)>;
    const int64_t end = channel + channels;
    if (side_by_side && channels == Size::kWide * kLanes) {
      ForwardPass<Size::kWide, true, SlabGates, T>{call, gates, work, b, channel, channels}.run();
    } else if (side_by_side && channels == Size::kNarrow * kLanes) {
      ForwardPass<Size::kNarrow, true, SlabGates, T>{call, gates, work, b, channel, channels}.run();
    } else {
      for (; channel < end; channel += kLanes)
        ForwardPass<1, false, SlabGates, T>{call, gates, work, b, channel, std::min(kLanes, end - channel)}.run();
    }
  };
  const auto run = [&](auto gates) {
    run_units<typename decltype(gates)::Type>(call, cut, first_unit, last_unit, run_slab);
  };
  if (!cut.shared) run(Named<ChannelGates<Forward<T>>>());
  else if (call.output_gate.data) run(Named<GroupGates<Forward<T>, true>>());
  else run(Named<GroupGates<Forward<T>, false>>());
}

template <typename T>
int64_t backward_units(const Backward<T>& call) {
  return call.problem.batch * Cut::backward(call.problem).count;
}

template <typename T>
void run_backward(const Backward<T>& call, int64_t first_unit, int64_t last_unit) {
  const Cut cut = Cut::backward(call.problem);
  const auto run_slab = [&](const auto& gates, auto& work, int64_t b, int64_t channel, int64_t width) {
    // the usual widths are known to the compiler
    if (width == 64) backward_slab<64>(call, gates, work, b, channel, width);
    else if (width == 16) backward_slab<16>(call, gates, work, b, channel, width);
    else backward_slab<0>(call, gates, work, b, channel, width);
  };
  const auto run = [&](auto gates) {
    run_units<typename decltype(gates)::Type>(call, cut, first_unit, last_unit, run_slab);
  };
  if (!cut.shared) run(Named<ChannelGates<Backward<T>>>());
  else if (call.output_gate.data) run(Named<GroupGates<Backward<T>, true>>());
  else run(Named<GroupGates<Backward<T>, false>>());
}

#define GSPN_INSTANTIATE(T)                                                     \
  template int64_t forward_units<T>(const Forward<T>&, int64_t);                \
  template void run_forward<T>(const Forward<T>&, int64_t, int64_t, int64_t);   \
  template int64_t backward_units<T>(const Backward<T>&);                       \
  template void run_backward<T>(const Backward<T>&, int64_t, int64_t);
GSPN_INSTANTIATE(float)
GSPN_INSTANTIATE(double)
GSPN_INSTANTIATE(BFloat16)

}  // namespace gspn
