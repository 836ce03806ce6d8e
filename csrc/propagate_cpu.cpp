// GSPN propagation on the CPU, channels last: a SIMD lane is a channel, a thread takes a slab of channels of one image.
//
// A unit copies its slab of the map once into compact scratch, runs every direction there, and writes the result once.
// Channels of a slab either share their gates (a slab within one group) or have their own (one channel a group).
#include "propagate_cpu.h"

#include <algorithm>
#include <memory>
#include <type_traits>

#include "propagate.h"

namespace gspn {
namespace {

template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(BFloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void store(float& to, float value) { to = value; }
inline void store(double& to, double value) { to = value; }
inline void store(BFloat16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.bits = value != value ? 0x7fc0 : uint16_t(rounded);
}

// n elements, `stride` apart, into a compact row of accumulators.
template <typename T, typename A>
inline void gather(A* to, const T* from, int64_t stride, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = load(from[i * stride]);
  }
}
template <typename T, typename A>
inline void scatter(T* to, int64_t stride, const A* from, int64_t n) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) store(to[i], from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(to[i * stride], from[i]);
  }
}

// The scan order of one direction: which axis its lines follow, and which lines start a chunk.
struct Scan {
  bool rows, reversed;
  int64_t lines, positions, chunk;

  Scan(const Problem& p, int direction)
      : rows(lines_are_rows(direction)),
        reversed(far_end_first(direction)),
        lines(rows ? p.height : p.width),
        positions(rows ? p.width : p.height),
        chunk(p.chunk ? std::min(p.chunk, lines) : lines) {}

  int64_t row(int64_t line, int64_t position) const { return rows ? line : position; }
  int64_t column(int64_t line, int64_t position) const { return rows ? position : line; }
  int64_t num_chunks() const { return (lines + chunk - 1) / chunk; }
  int64_t chunk_lines(int64_t c) const { return std::min(chunk, lines - c * chunk); }
  // The n-th line read of chunk c, in map coordinates.
  int64_t line(int64_t c, int64_t n) const { return c * chunk + (reversed ? chunk_lines(c) - 1 - n : n); }
};

// Uninitialised memory that only ever grows: a thread's scratch for all its units of one call.
template <typename A>
class Scratch {
 public:
  A* get(int64_t size) {
    if (size > size_) data_.reset(new A[size_ = size]);
    return data_.get();
  }

 private:
  std::unique_ptr<A[]> data_;
  int64_t size_ = 0;
};

// Compact copy of a slab of the map. Rows are padded by a cache line, so that walking down a column of a map whose
// width is a power of two does not fall into the same cache sets again and again.
template <typename A>
struct Slab {
  A* data;
  int64_t height, width, row_stride, channels;

  Slab(Scratch<A>& scratch, const Problem& p, int64_t channels_)
      : height(p.height), width(p.width), row_stride(p.width * channels_ + 64 / sizeof(A)), channels(channels_) {
    data = scratch.get(height * row_stride);
  }
  A* at(int64_t row, int64_t column) const { return data + row * row_stride + column * channels; }

  template <typename T>
  void read(const Strided<const T>& from, int64_t b, int64_t channel) {
    const T* origin = from.data + b * from.stride[0] + channel * from.stride[3];
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j)
        gather(at(i, j), origin + i * from.stride[1] + j * from.stride[2], from.stride[3], channels);
  }
  template <typename T>
  void write(const Strided<T>& to, int64_t b, int64_t channel) const {
    T* origin = to.data + b * to.stride[0] + channel * to.stride[3];
    for (int64_t i = 0; i < height; ++i)
      for (int64_t j = 0; j < width; ++j)
        scatter(origin + i * to.stride[1] + j * to.stride[2], to.stride[3], at(i, j), channels);
  }
};

// The gates of one line, `per_site` values at each position: 1 where the slab shares them, else one a channel.
enum Field { kLam, kOut, kWeightMinus, kWeightCentre, kWeightPlus, kLogitMinus, kLogitCentre, kLogitPlus, kNumFields };
template <typename A>
struct GateLine {
  A* field[kNumFields];
};

template <typename A>
void normalise_range(const GateLine<A>& line, int64_t begin, int64_t end, A has_minus, A has_plus) {
  const A *minus = line.field[kLogitMinus], *centre = line.field[kLogitCentre], *plus = line.field[kLogitPlus];
  A *w_minus = line.field[kWeightMinus], *w_centre = line.field[kWeightCentre], *w_plus = line.field[kWeightPlus];
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const Weights<A> w = normalise(minus[i], centre[i], plus[i], has_minus, has_plus);
    w_minus[i] = w.minus;
    w_centre[i] = w.centre;
    w_plus[i] = w.plus;
  }
}

template <typename A>
void normalise_line(const GateLine<A>& line, int64_t positions, int64_t per_site) {
  const int64_t last = (positions - 1) * per_site;
  normalise_range(line, 0, per_site, A(0), A(positions > 1));
  normalise_range(line, per_site, last, A(1), A(1));
  if (positions > 1) normalise_range(line, last, last + per_site, A(1), A(0));
}

// The gates of one group for the whole map and all directions: each site is read once, then lines lie side by side.
template <typename T>
class GroupGates {
 public:
  using A = Accumulator<T>;
  static constexpr bool shared = true;

  template <typename Call>
  GroupGates(const Call& call, Scratch<A>& scratch, int64_t /* slab channels */) : problem_(call.problem) {
    sites_ = problem_.height * problem_.width;
    data_ = scratch.get(problem_.num_directions * kNumFields * sites_);
  }

  template <typename Call>
  void prepare(const Call& call, int64_t b, int64_t channel) {
    const int64_t group = channel / (problem_.channels / problem_.groups);
    const auto &gates = call.gates, &lam = call.lam, &out = call.out;
    constexpr int64_t kTile = 16;  // a cache line of a field, whichever way its lines run
    for (int64_t i0 = 0; i0 < problem_.height; i0 += kTile)
      for (int64_t j0 = 0; j0 < problem_.width; j0 += kTile)
        for (int k = 0; k < problem_.num_directions; ++k) {
          const Scan scan(problem_, problem_.directions[k]);
          for (int64_t i = i0; i < std::min(i0 + kTile, problem_.height); ++i)
            for (int64_t j = j0; j < std::min(j0 + kTile, problem_.width); ++j) {
              const int64_t site = scan.rows ? i * problem_.width + j : j * problem_.height + i;
              const auto at = [&](const Strided<const T>& t, int axis) {
                return t.data + b * t.stride[0] + i * t.stride[1] + j * t.stride[2] + k * t.stride[3] + group * t.stride[axis];
              };
              for (int n = 0; n < 3; ++n) of(k, kLogitMinus + n)[site] = load(at(gates, 5)[n * gates.stride[4]]);
              of(k, kLam)[site] = load(*at(lam, 4));
              of(k, kOut)[site] = out.data ? load(*at(out, 4)) : A(1);
            }
        }
    for (int k = 0; k < problem_.num_directions; ++k) {
      const Scan scan(problem_, problem_.directions[k]);
      for (int64_t i = 0; i < scan.lines; ++i) normalise_line(line(call, scan, k, i), scan.positions, 1);
    }
  }

  template <typename Call>
  GateLine<A> line(const Call&, const Scan& scan, int k, int64_t line) {
    GateLine<A> result;
    for (int f = 0; f < kNumFields; ++f) result.field[f] = of(k, f) + line * scan.positions;
    return result;
  }

  int64_t per_site() const { return 1; }

 private:
  A* of(int k, int field) { return data_ + (k * kNumFields + field) * sites_; }

  const Problem& problem_;
  int64_t sites_;
  A* data_;
};

// The gates of a slab whose channels each have their own, a line at a time: they are as large as the map itself, many
// times over, so they are read where they lie.
template <typename T>
class ChannelGates {
 public:
  using A = Accumulator<T>;
  static constexpr bool shared = false;

  template <typename Call>
  ChannelGates(const Call& call, Scratch<A>& scratch, int64_t channels) : channels_(channels) {
    longest_ = std::max(call.problem.height, call.problem.width) * channels;
    data_ = scratch.get(kNumFields * longest_);
  }

  template <typename Call>
  void prepare(const Call&, int64_t b, int64_t channel) {
    b_ = b;
    channel_ = channel;
  }

  template <typename Call>
  GateLine<A> line(const Call& call, const Scan& scan, int k, int64_t line) {
    GateLine<A> result;
    for (int f = 0; f < kNumFields; ++f) result.field[f] = data_ + f * longest_;
    for (int64_t j = 0; j < scan.positions; ++j) {
      const auto read = [&](int field, const Strided<const T>& t, int axis, int64_t offset) {
        gather(result.field[field] + j * channels_,
               t.data + b_ * t.stride[0] + scan.row(line, j) * t.stride[1] + scan.column(line, j) * t.stride[2] +
                   k * t.stride[3] + channel_ * t.stride[axis] + offset,
               t.stride[axis], channels_);
      };
      read(kLam, call.lam, 4, 0);
      if (call.out.data) read(kOut, call.out, 4, 0);
      for (int n = 0; n < 3; ++n) read(kLogitMinus + n, call.gates, 5, n * call.gates.stride[4]);
    }
    if (!call.out.data) std::fill_n(result.field[kOut], scan.positions * channels_, A(1));
    normalise_line(result, scan.positions, channels_);
    return result;
  }

  int64_t per_site() const { return channels_; }

 private:
  int64_t channels_, longest_, b_ = 0, channel_ = 0;
  A* data_;
};

// A gate's value at channel c of a site: the group's, held in a register, or the channel's own.
template <typename A, bool shared>
struct SiteGate {
  const A* value;
  A GSPN_INLINE operator[](int64_t c) const { return value[c]; }
};
template <typename A>
struct SiteGate<A, true> {
  A value;
  explicit SiteGate(const A* from) : value(*from) {}
  A GSPN_INLINE operator[](int64_t) const { return value; }
};

// One line of a scan: h at each position, from the line before (null at the start of a chunk); then y += u h, where y is
// wanted (y = u h if it holds nothing yet). `h` and `before` point at position 0 of lines with a zero position at each end.
template <bool shared, int kWidth, typename A>
void scan_line(const GateLine<A>& gates, const Scan& scan, int64_t line, const Slab<A>& x, const Slab<A>* y, bool y_is_empty,
               const A* before, A* h) {
  const int64_t width = kWidth ? kWidth : x.channels, per_site = shared ? 1 : width;
  for (int64_t j = 0; j < scan.positions; ++j) {
    const A* __restrict value = x.at(scan.row(line, j), scan.column(line, j));
    A* __restrict now = h + j * width;
    const auto gate = [&](Field f) { return SiteGate<A, shared>{gates.field[f] + j * per_site}; };
    const auto lam = gate(kLam);
    if (before) {
      const A *centre = before + j * width, *minus = centre - width, *plus = centre + width;
      const auto w_minus = gate(kWeightMinus), w_centre = gate(kWeightCentre), w_plus = gate(kWeightPlus);
#pragma omp simd
      for (int64_t c = 0; c < width; ++c)
        now[c] = advance(Weights<A>{w_minus[c], w_centre[c], w_plus[c]}, minus[c], centre[c], plus[c], lam[c] * value[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) now[c] = lam[c] * value[c];
    }
    if (!y) continue;
    const auto out = gate(kOut);
    A* __restrict sum = y->at(scan.row(line, j), scan.column(line, j));
    if (y_is_empty) {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) sum[c] = out[c] * now[c];
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) sum[c] += out[c] * now[c];
    }
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
    return Cut(p, p.height * p.width <= 64 * 64 ? 64 : 16, p.batch * p.groups >= threads);
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

template <typename Gates, int kWidth, typename T, typename A>
void forward_slab(const Forward<T>& call, Gates& gates, Workspace<A>& work, int64_t b, int64_t channel, int64_t width) {
  const Problem& p = call.problem;
  Slab<A> x(work.x, p, width), y(work.y, p, width);
  x.read(call.x, b, channel);
  for (int k = 0; k < p.num_directions; ++k) {
    const Scan scan(p, p.directions[k]);
    const int64_t line_size = (scan.positions + 2) * width;
    A* lines = work.lines.get(2 * line_size);
    A *now = padded_line(lines, scan.positions, width), *before = padded_line(lines + line_size, scan.positions, width);
    for (int64_t c = 0; c < scan.num_chunks(); ++c)
      for (int64_t n = 0; n < scan.chunk_lines(c); ++n) {
        const int64_t line = scan.line(c, n);
        scan_line<Gates::shared, kWidth>(gates.line(call, scan, k, line), scan, line, x, &y, k == 0, n ? before : nullptr, now);
        std::swap(now, before);
      }
  }
  y.write(call.y, b, channel);
}

// The reverse of scan_line. The gradient of h here, dh, is u dy plus what the line after handed back in `carry`; it adds
// to dx, hands on to the line before, and leaves the gates' gradients in `grads`, by the fields of GateLine (sums over the
// slab's channels where those share gates; a weight's gradient under its weight).
template <bool shared, int kWidth, typename A>
void unscan_line(const GateLine<A>& gates, const Scan& scan, int64_t line, const Slab<A>& x, const Slab<A>& dy,
                 const Slab<A>& dx, const A* before, const A* h, const A* carry, A* carry_before, A* dh,
                 const GateLine<A>& grads) {
  const int64_t width = kWidth ? kWidth : x.channels, per_site = shared ? 1 : width;
  if (before) std::fill(carry_before - width, carry_before + (scan.positions + 1) * width, A(0));
  for (int64_t j = 0; j < scan.positions; ++j) {
    const int64_t row = scan.row(line, j), column = scan.column(line, j);
    const A *__restrict value = x.at(row, column), *__restrict gy = dy.at(row, column);
    A* __restrict gx = dx.at(row, column);
    const A *hj = h + j * width, *carried = carry + j * width;
    const auto gate = [&](Field f) { return SiteGate<A, shared>{gates.field[f] + j * per_site}; };
    const auto grad = [&](Field f) { return grads.field[f] + j * per_site; };
    const auto lam = gate(kLam), out = gate(kOut);
    A *g_lam = grad(kLam), *g_out = grad(kOut);
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

    A *g_minus = grad(kWeightMinus), *g_centre = grad(kWeightCentre), *g_plus = grad(kWeightPlus);
    if (!before) {
      for (A* g : {g_minus, g_centre, g_plus}) std::fill_n(g, per_site, A(0));
      continue;
    }
    const A *centre = before + j * width, *minus = centre - width, *plus = centre + width;
    A *to = carry_before + j * width, *to_minus = to - width, *to_plus = to + width;
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
}

// Write the gates' gradients of one line: the weights' through the normalisation, λ's and u's as they are.
template <typename T, typename A>
void write_gate_grads(const Backward<T>& call, const GateLine<A>& gates, const GateLine<A>& grads, const Scan& scan, int k,
                      int64_t b, int64_t group, int64_t line, int64_t per_site) {
  const A *const *l = gates.field + kLogitMinus, *const *w = gates.field + kWeightMinus;
  A* const* g = grads.field + kWeightMinus;
#pragma omp simd
  for (int64_t i = 0; i < scan.positions * per_site; ++i) {
    const Weights<A> grad = normalise_backward(l[0][i], l[1][i], l[2][i], Weights<A>{w[0][i], w[1][i], w[2][i]},
                                               Weights<A>{g[0][i], g[1][i], g[2][i]});
    g[0][i] = grad.minus;
    g[1][i] = grad.centre;
    g[2][i] = grad.plus;
  }
  const auto put = [&](const Strided<T>& t, int64_t offset, int axis, const A* from) {
    for (int64_t j = 0; j < scan.positions; ++j)
      scatter(t.data + b * t.stride[0] + scan.row(line, j) * t.stride[1] + scan.column(line, j) * t.stride[2] +
                  k * t.stride[3] + offset + group * t.stride[axis],
              t.stride[axis], from + j * per_site, per_site);
  };
  for (int n = 0; n < 3; ++n) put(call.grad_gates, n * call.grad_gates.stride[4], 5, g[n]);
  put(call.grad_lam, 0, 4, grads.field[kLam]);
  if (call.grad_out.data) put(call.grad_out, 0, 4, grads.field[kOut]);
}

template <typename Gates, int kWidth, typename T, typename A>
void backward_slab(const Backward<T>& call, Gates& gates, Workspace<A>& work, int64_t b, int64_t channel, int64_t width) {
  const Problem& p = call.problem;
  const int64_t group = channel / (p.channels / p.groups), per_site = gates.per_site();
  Slab<A> x(work.x, p, width), dy(work.y, p, width), dx(work.dx, p, width);
  x.read(call.x, b, channel);
  dy.read(call.grad_y, b, channel);
  std::fill_n(dx.data, dx.height * dx.row_stride, A(0));
  for (int k = 0; k < p.num_directions; ++k) {
    const Scan scan(p, p.directions[k]);
    const int64_t line_size = (scan.positions + 2) * width;
    A *history = work.history.get(scan.chunk * line_size), *lines = work.lines.get(2 * line_size + width);
    A* grads_data = work.grads.get(kLogitMinus * scan.positions * per_site);
    GateLine<A> grads;
    for (int f = 0; f < kLogitMinus; ++f) grads.field[f] = grads_data + f * scan.positions * per_site;
    const auto h = [&](int64_t n) { return history + n * line_size + width; };
    for (int64_t n = 0; n < scan.chunk; ++n) padded_line(history + n * line_size, scan.positions, width);
    for (int64_t c = 0; c < scan.num_chunks(); ++c) {
      for (int64_t n = 0; n < scan.chunk_lines(c); ++n) {  // h again, kept for the whole chunk
        const int64_t line = scan.line(c, n);
        scan_line<Gates::shared, kWidth, A>(gates.line(call, scan, k, line), scan, line, x, nullptr, false,
                                            n ? h(n - 1) : nullptr, h(n));
      }
      A *carry = lines + width, *carry_before = carry + line_size, *dh = lines + 2 * line_size;
      std::fill_n(lines, line_size, A(0));  // nothing comes back from beyond the chunk's last line
      for (int64_t n = scan.chunk_lines(c) - 1; n >= 0; --n) {
        const int64_t line = scan.line(c, n);
        const GateLine<A> line_gates = gates.line(call, scan, k, line);
        unscan_line<Gates::shared, kWidth>(line_gates, scan, line, x, dy, dx, n ? h(n - 1) : nullptr, h(n), carry,
                                           carry_before, dh, grads);
        write_gate_grads(call, line_gates, grads, scan, k, b, group, line, per_site);
        std::swap(carry, carry_before);
      }
    }
  }
  dx.write(call.grad_x, b, channel);
}

// Runs units [first, last), slab by slab, with the slab's width known to the compiler where it is a usual one.
template <typename Gates, typename Call, typename RunSlab>
void run_units(const Call& call, const Cut& cut, int64_t first, int64_t last, RunSlab run_slab) {
  Workspace<typename Gates::A> work;
  for (int64_t u = first; u < last; ++u) {
    const int64_t b = u / cut.count, begin = cut.first_channel(u % cut.count), end = cut.end_channel(u % cut.count);
    Gates gates(call, work.gates, std::min(cut.slab_width, end - begin));
    gates.prepare(call, b, begin);
    for (int64_t channel = begin; channel < end; channel += cut.slab_width) {
      const int64_t width = std::min(cut.slab_width, end - channel);
      if (width == 64) run_slab(std::integral_constant<int, 64>(), gates, work, b, channel, width);
      else if (width == 16) run_slab(std::integral_constant<int, 16>(), gates, work, b, channel, width);
      else run_slab(std::integral_constant<int, 0>(), gates, work, b, channel, width);
    }
  }
}

}  // namespace

template <typename T>
int64_t forward_units(const Forward<T>& call, int64_t threads) {
  return call.problem.batch * Cut::forward(call.problem, threads).count;
}

template <typename T>
void run_forward(const Forward<T>& call, int64_t threads, int64_t first_unit, int64_t last_unit) {
  const Cut cut = Cut::forward(call.problem, threads);
  const auto run_slab = [&](auto kWidth, auto& gates, auto& work, int64_t b, int64_t channel, int64_t width) {
    forward_slab<std::decay_t<decltype(gates)>, kWidth.value>(call, gates, work, b, channel, width);
  };
  if (cut.shared) run_units<GroupGates<T>>(call, cut, first_unit, last_unit, run_slab);
  else run_units<ChannelGates<T>>(call, cut, first_unit, last_unit, run_slab);
}

template <typename T>
int64_t backward_units(const Backward<T>& call) {
  return call.problem.batch * Cut::backward(call.problem).count;
}

template <typename T>
void run_backward(const Backward<T>& call, int64_t first_unit, int64_t last_unit) {
  const Cut cut = Cut::backward(call.problem);
  const auto run_slab = [&](auto kWidth, auto& gates, auto& work, int64_t b, int64_t channel, int64_t width) {
    backward_slab<std::decay_t<decltype(gates)>, kWidth.value>(call, gates, work, b, channel, width);
  };
  if (cut.shared) run_units<GroupGates<T>>(call, cut, first_unit, last_unit, run_slab);
  else run_units<ChannelGates<T>>(call, cut, first_unit, last_unit, run_slab);
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
