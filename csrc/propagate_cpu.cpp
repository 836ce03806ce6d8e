// GSPN propagation on the CPU, channels last: a SIMD lane is a channel, a thread takes a slab of channels of one image.
//
// A unit copies its slab of the map once into compact scratch, runs every direction there, and writes the result once.
// Channels of a slab either share their gates (a slab within one group) or have their own (one channel a group).
#include "propagate_cpu.h"

#include <array>
#include <cstdlib>

#include "cpu_gates.h"
#include "cpu_map.h"
#include "cpu_scan.h"
#include "propagate.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace gspn {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 1 << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: it may fail
#endif
}

namespace {

// One line of a scan: h at each position, from the line before (null at the start of a chunk). `enter` and `leave` are
// called at each site before its x is read and when its h is there. `h` and `before` point at position 0 of lines with a
// zero position at each end.
template <int kWidth, typename SlabGates, typename Call, typename A, typename Enter, typename Leave>
void scan_line_old(const SlabGates& gates, const Call& call, const Scan& scan, int k, int64_t line, const Slab<A>& x,
               const A* before, A* h, Enter enter, Leave leave) {
  const int64_t width = kWidth ? kWidth : x.channels;
  const Gates<A> line_gates = gates.line(scan, k, line);
  for (int64_t j = 0; j < scan.positions; ++j) {
    const int64_t row = scan.row(line, j), column = scan.column(line, j);
    enter(row, column);
    const A* __restrict value = x.at(row, column);
    A* __restrict now = h + j * width;
    const Gates<A> site = gates.site(line_gates, call, scan, k, line, j, before);
    const auto gate = [&](Field f) { return GateValue<A, SlabGates::shared>{site.field[f]}; };
    const auto lam = gate(kLam);
    if (before) {
      const A *centre = before + j * width, *minus = centre - width, *plus = centre + width;
      const SiteWeights<A, SlabGates::shared> weights(site, scan, j);
#pragma omp simd
      for (int64_t c = 0; c < width; ++c)
        now[c] = advance(weights[c], minus[c], centre[c], plus[c], lam[c] * value[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) now[c] = lam[c] * value[c];
    }
    leave(row, column, gate(kOut), now);
  }
}

// How the channels of an image are cut into units, and a unit into slabs that are worked on one at a time. No slab
// crosses a group, unless every channel is a group of its own.
struct Cut {
  bool shared;
  int64_t span, unit_width, slab_width, units_per_span, count;  // count: units an image

  Cut(const Problem& p, int64_t slab, bool whole_groups) : shared(p.groups < p.channels) {
    span = shared ? p.channels / p.groups : p.channels;
    slab_width = std::min(slab, span);
    unit_width = shared && whole_groups ? span : slab_width;
    units_per_span = (span + unit_width - 1) / unit_width;
    count = p.channels / span * units_per_span;
  }

  // 64 channels a slab while the map is small, 16 to keep a large map in the caches. Units are whole groups, so that gates
  // are prepared once, as long as there are enough of them for the threads.
  static Cut forward(const Problem& p, int64_t threads) {
    return Cut(p, getenv("SLAB") ? atoi(getenv("SLAB")) : p.height * p.width <= 64 * 64 ? 64 : 16, p.batch * p.groups >= threads);
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

template <typename A>
struct Workspace {
  Scratch<A> x, y, dx, gates, lines, history, grads;
};

// A line of h with a zero position at either end, and where its position 0 is.
template <typename A>
A* padded_line(A* start, int64_t positions, int64_t width) {
  std::fill_n(start, width, A(0));
  std::fill_n(start + (positions + 1) * width, width, A(0));
  return start + width;
}

// Directions in the order in which they are run: one along rows, as memory lies, comes first, for it takes x in as it goes,
// and another last, for it hands y out.
inline std::array<int, 4> running_order(const Problem& p) {
  std::array<int, 4> order{0, 1, 2, 3};
  const auto rows = [&](int k) { return lines_are_rows(p.directions[k]); };
  const auto end = order.begin() + p.num_directions;
  std::stable_partition(order.begin(), end, rows);
  const auto columns = std::find_if_not(order.begin(), end, rows);
  if (columns - order.begin() > 1) std::rotate(order.begin() + 1, columns, end);
  return order;
}

enum class Turn { kOnly, kFirst, kMiddle, kLast };

template <int kVectors, Turn turn, typename SlabGates, typename T, typename A>
void forward_direction(const Forward<T>& call, const SlabGates& gates, Workspace<A>& work, const Slab<A>& x, const Slab<A>& y,
                       int64_t b, int64_t channel, int64_t channels, int k) {
  using V = Vector<A>;
  constexpr bool reads = turn == Turn::kOnly || turn == Turn::kFirst, writes = turn == Turn::kOnly || turn == Turn::kLast;
  constexpr int64_t width = kVectors * V::kLanes, kAhead = AHEAD;
  const Problem& p = call.problem;
  const Scan scan(p, p.directions[k]);
  A* h = work.lines.get((scan.positions + 1) * width);
  std::fill_n(h + scan.positions * width, width, A(0));
  const int axis = scan.rows ? 2 : 1;  // along a line
  const int64_t x_step = call.x.stride[axis], y_step = call.y.stride[axis], step = scan.rows ? width : x.row_stride;
  // Along a column every site is in another page: ask for the next column's while at this one's.
  const int64_t next_column = scan.rows ? 0 : scan.reversed ? -width : width;
  for (int64_t c = 0; c < scan.num_chunks(); ++c)
    for (int64_t n = 0; n < scan.chunk_lines(c); ++n) {
      const int64_t line = scan.line(c, n), row = scan.row(line, 0), column = scan.column(line, 0);
      const T* source = call.x.data + b * call.x.stride[0] + row * call.x.stride[1] + column * call.x.stride[2] + channel * call.x.stride[3];
      T* target = call.y.data + b * call.y.stride[0] + row * call.y.stride[1] + column * call.y.stride[2] + channel * call.y.stride[3];
      A *xs = x.at(row, column), *ys = y.at(row, column);
      const auto value = [&](int64_t j, int v) __attribute__((always_inline)) {
        A* kept = xs + j * step + v * V::kLanes;
        if constexpr (reads) {
          const T* from = source + j * x_step + v * V::kLanes * call.x.stride[3];
          __builtin_prefetch(from + kAhead * x_step);
          const V value = V::load(from, call.x.stride[3], channels - v * V::kLanes);
          value.store(kept);
          return value;
        } else {
          if (next_column) __builtin_prefetch(kept + next_column);
          return V::load(kept);
        }
      };
      const auto leave = [&](int64_t j, int v, V out, V now) __attribute__((always_inline)) {
        A* kept = ys + j * step + v * V::kLanes;
        if (next_column) __builtin_prefetch(kept + next_column, 1);
        V sum = out * now;
        if constexpr (!reads) sum = sum + V::load(kept);
        if constexpr (writes) {
          T* to = target + j * y_step + v * V::kLanes * call.y.stride[3];
#if NT
          if constexpr (std::is_same_v<T, float>) { _mm512_stream_ps(to, sum.lanes); return; }
#endif
          __builtin_prefetch(to + kAhead * y_step, 1);
          sum.store(to, call.y.stride[3], channels - v * V::kLanes);
        } else sum.store(kept);
      };
      const auto along = gates.along(call, scan, k, line);
      if (n) scan_line<kVectors, false>(along, scan.positions, width, (const A*)h, h, value, leave);
      else scan_line<kVectors, true>(along, scan.positions, width, (const A*)h, h, value, leave);
    }
}

template <int kVectors, typename SlabGates, typename T, typename A>
void forward_slab(const Forward<T>& call, const SlabGates& gates, Workspace<A>& work, int64_t b, int64_t channel,
                  int64_t channels) {
  const Problem& p = call.problem;
  const Slab<A> x(work.x, p, kVectors * Vector<A>::kLanes), y(work.y, p, kVectors * Vector<A>::kLanes);
  const auto order = running_order(p);
  const int last = p.num_directions - 1;
  for (int turn = 0; turn <= last; ++turn) {
    const auto run = [&](auto t) {
      forward_direction<kVectors, t.value>(call, gates, work, x, y, b, channel, channels, order[turn]);
    };
    if (last == 0) run(std::integral_constant<Turn, Turn::kOnly>());
    else if (turn == 0) run(std::integral_constant<Turn, Turn::kFirst>());
    else if (turn < last) run(std::integral_constant<Turn, Turn::kMiddle>());
    else run(std::integral_constant<Turn, Turn::kLast>());
  }
}

// Write the gates' gradients of `sites` positions of a line: the weights' through the normalisation, λ's and u's as they
// are. `grads` holds the weights' gradients under the weights; per_site values each.
template <typename T, typename A>
void write_gate_grads(const Backward<T>& call, const Gates<A>& gates, const Gates<A>& grads, const Scan& scan, int k,
                      int64_t b, int64_t group, int64_t line, int64_t position, int64_t sites, int64_t per_site,
                      bool has_before) {
  const A *const *l = gates.field + kLogitMinus, *const *w = gates.field + kWeightMinus;
  A* const* g = grads.field + kWeightMinus;
  if (!has_before) {  // no weights there, nor anything read in their place
    for (int n = 0; n < 3; ++n) std::fill_n(g[n], sites * per_site, A(0));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < sites * per_site; ++i) {
      const Weights<A> grad = normalise_backward(l[0][i], l[1][i], l[2][i], Weights<A>{w[0][i], w[1][i], w[2][i]},
                                                 Weights<A>{g[0][i], g[1][i], g[2][i]});
      g[0][i] = grad.minus;
      g[1][i] = grad.centre;
      g[2][i] = grad.plus;
    }
  }
  const auto put = [&](const Strided<T>& t, int64_t offset, int axis, const A* from) {
    for (int64_t s = 0; s < sites; ++s)
      scatter(gates_at(t, axis, b, scan.row(line, position + s), scan.column(line, position + s), k, group) + offset,
              t.stride[axis], from + s * per_site, per_site);
  };
  for (int n = 0; n < 3; ++n) put(call.grad_gates, n * call.grad_gates.stride[4], 5, g[n]);
  put(call.grad_lam, 0, 4, grads.field[kLam]);
  if (call.grad_out.data) put(call.grad_out, 0, 4, grads.field[kOut]);
}

// The reverse of scan_line. The gradient of h here, dh, is u dy plus what the line after handed back in `carry`; it adds
// to dx, hands on to the line before, and writes the gates' gradients (sums over the slab's channels where those share
// gates; `grads` is room for them, along a line then, else at one site).
template <int kWidth, typename SlabGates, typename T, typename A>
void unscan_line(const SlabGates& gates, const Backward<T>& call, const Scan& scan, int k, int64_t b, int64_t group,
                 int64_t line, const Slab<A>& x, const Slab<A>& dy, const Slab<A>& dx, const A* before, const A* h,
                 const A* carry, A* carry_before, A* dh, const Gates<A>& grads) {
  constexpr bool shared = SlabGates::shared;
  const int64_t width = kWidth ? kWidth : x.channels;
  const Gates<A> line_gates = gates.line(scan, k, line);
  if (before) std::fill(carry_before - width, carry_before + (scan.positions + 1) * width, A(0));
  for (int64_t j = 0; j < scan.positions; ++j) {
    const int64_t row = scan.row(line, j), column = scan.column(line, j);
    const A *__restrict value = x.at(row, column), *__restrict gy = dy.at(row, column);
    A* __restrict gx = dx.at(row, column);
    const A *hj = h + j * width, *carried = carry + j * width;
    const Gates<A> site = gates.site(line_gates, call, scan, k, line, j, before);
    const auto gate = [&](Field f) { return GateValue<A, shared>{site.field[f]}; };
    const Gates<A> grad = shared ? grads + j : grads;
    const auto lam = gate(kLam), out = gate(kOut);
    A *g_lam = grad.field[kLam], *g_out = grad.field[kOut];
    A s_lam = 0, s_out = 0;
#pragma omp simd reduction(+ : s_lam, s_out)
    for (int64_t c = 0; c < width; ++c) {
      const A d = out[c] * gy[c] + carried[c];
      dh[c] = d;
      gx[c] += lam[c] * d;
      if constexpr (shared) {
        s_lam += d * value[c];
        s_out += gy[c] * hj[c];
      } else {
        g_lam[c] = d * value[c];
        g_out[c] = gy[c] * hj[c];
      }
    }
    if constexpr (shared) *g_lam = s_lam, *g_out = s_out;

    A *g_minus = grad.field[kWeightMinus], *g_centre = grad.field[kWeightCentre], *g_plus = grad.field[kWeightPlus];
    if (before) {
      const A *centre = before + j * width, *minus = centre - width, *plus = centre + width;
      A *to = carry_before + j * width, *to_minus = to - width, *to_plus = to + width;
      if constexpr (!shared) normalise_range(site, width, j > 0, j + 1 < scan.positions);
      const auto w_minus = gate(kWeightMinus), w_centre = gate(kWeightCentre), w_plus = gate(kWeightPlus);
      A s_minus = 0, s_centre = 0, s_plus = 0;
#pragma omp simd reduction(+ : s_minus, s_centre, s_plus)
      for (int64_t c = 0; c < width; ++c) {
        const A d = dh[c];
        to_minus[c] += w_minus[c] * d;
        to[c] += w_centre[c] * d;
        to_plus[c] += w_plus[c] * d;
        if constexpr (shared) {
          s_minus += d * minus[c];
          s_centre += d * centre[c];
          s_plus += d * plus[c];
        } else {
          g_minus[c] = d * minus[c];
          g_centre[c] = d * centre[c];
          g_plus[c] = d * plus[c];
        }
      }
      if constexpr (shared) *g_minus = s_minus, *g_centre = s_centre, *g_plus = s_plus;
    }
    if constexpr (!shared) write_gate_grads(call, site, grad, scan, k, b, group, line, j, 1, width, before);
  }
  if constexpr (shared) write_gate_grads(call, line_gates, grads, scan, k, b, group, line, 0, scan.positions, 1, before);
}

template <int kWidth, typename SlabGates, typename T, typename A>
void backward_slab(const Backward<T>& call, const SlabGates& gates, Workspace<A>& work, int64_t b, int64_t channel,
                   int64_t width) {
  const Problem& p = call.problem;
  const int64_t group = channel / (p.channels / p.groups);
  Slab<A> x(work.x, p, width), dy(work.y, p, width), dx(work.dx, p, width);
  x.read(call.x, b, channel);
  dy.read(call.grad_y, b, channel);
  std::fill_n(dx.data, dx.height * dx.row_stride, A(0));
  for (int k = 0; k < p.num_directions; ++k) {
    const Scan scan(p, p.directions[k]);
    const int64_t line_size = (scan.positions + 2) * width, grad_size = SlabGates::shared ? scan.positions : width;
    A *history = work.history.get(scan.chunk * line_size), *lines = work.lines.get(2 * line_size + width);
    A* grads_data = work.grads.get(kLogitMinus * grad_size);
    Gates<A> grads{};
    for (int f = 0; f < kLogitMinus; ++f) grads.field[f] = grads_data + f * grad_size;
    const auto h = [&](int64_t n) { return history + n * line_size + width; };
    for (int64_t n = 0; n < scan.chunk; ++n) padded_line(history + n * line_size, scan.positions, width);
    for (int64_t c = 0; c < scan.num_chunks(); ++c) {
      for (int64_t n = 0; n < scan.chunk_lines(c); ++n)  // h again, kept for the whole chunk
        scan_line_old<kWidth>(gates, call, scan, k, scan.line(c, n), x, n ? h(n - 1) : (const A*)nullptr, h(n),
                          [](auto...) {}, [](auto...) {});
      A *carry = lines + width, *carry_before = carry + line_size, *dh = lines + 2 * line_size;
      std::fill_n(lines, line_size, A(0));  // nothing comes back from beyond the chunk's last line
      for (int64_t n = scan.chunk_lines(c) - 1; n >= 0; --n) {
        unscan_line<kWidth>(gates, call, scan, k, b, group, scan.line(c, n), x, dy, dx, n ? h(n - 1) : nullptr, h(n), carry,
                            carry_before, dh, grads);
        std::swap(carry, carry_before);
      }
    }
  }
  dx.write(call.grad_x, b, channel);
}

// Runs units [first, last), slab by slab, with the slab's width known to the compiler where it is a usual one.
template <typename SlabGates, typename Call, typename RunSlab>
void run_units(const Call& call, const Cut& cut, int64_t first, int64_t last, RunSlab run_slab) {
  // Kept from call to call while it is small: fresh memory costs more page faults than the scan costs time.
  static thread_local Workspace<typename SlabGates::A> work;
  constexpr bool is_forward = !Call::kNeedsLogits;
  for (int64_t u = first; u < last; ++u) {
    const int64_t b = u / cut.count, begin = cut.first_channel(u % cut.count), end = cut.end_channel(u % cut.count);
    const SlabGates gates(call, work.gates, b, begin, std::min(cut.slab_width, end - begin));
    for (int64_t channel = begin; channel < end; channel += cut.slab_width) {
      const int64_t width = std::min(cut.slab_width, end - channel);
      if constexpr (is_forward) {
        constexpr int64_t lanes = Vector<typename SlabGates::A>::kLanes;
        if (width > 2 * lanes) run_slab(std::integral_constant<int, 4>(), gates, work, b, channel, width);
        else if (width > lanes) run_slab(std::integral_constant<int, 2>(), gates, work, b, channel, width);
        else run_slab(std::integral_constant<int, 1>(), gates, work, b, channel, width);
        continue;
      } else
      if (width == 64) run_slab(std::integral_constant<int, 64>(), gates, work, b, channel, width);
      else if (width == 16) run_slab(std::integral_constant<int, 16>(), gates, work, b, channel, width);
      else run_slab(std::integral_constant<int, 0>(), gates, work, b, channel, width);
    }
  }
  for (auto* scratch : {&work.x, &work.y, &work.dx, &work.gates, &work.lines, &work.history, &work.grads})
    scratch->release_above(64 << 20);
}

}  // namespace

template <typename T>
int64_t forward_units(const Forward<T>& call, int64_t threads) {
  return call.problem.batch * Cut::forward(call.problem, threads).count;
}

template <typename T>
void run_forward(const Forward<T>& call, int64_t threads, int64_t first_unit, int64_t last_unit) {
  const Cut cut = Cut::forward(call.problem, threads);
  const auto run_slab = [&](auto kWidth, const auto& gates, auto& work, int64_t b, int64_t channel, int64_t width) {
    forward_slab<kWidth.value>(call, gates, work, b, channel, width);
  };
  if (cut.shared) run_units<GroupGates<Forward<T>>>(call, cut, first_unit, last_unit, run_slab);
  else run_units<ChannelGates<Forward<T>>>(call, cut, first_unit, last_unit, run_slab);
}

template <typename T>
int64_t backward_units(const Backward<T>& call) {
  return call.problem.batch * Cut::backward(call.problem).count;
}

template <typename T>
void run_backward(const Backward<T>& call, int64_t first_unit, int64_t last_unit) {
  const Cut cut = Cut::backward(call.problem);
  const auto run_slab = [&](auto kWidth, const auto& gates, auto& work, int64_t b, int64_t channel, int64_t width) {
    backward_slab<kWidth.value>(call, gates, work, b, channel, width);
  };
  if (cut.shared) run_units<GroupGates<Backward<T>>>(call, cut, first_unit, last_unit, run_slab);
  else run_units<ChannelGates<Backward<T>>>(call, cut, first_unit, last_unit, run_slab);
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
