// The gradient of one slab. For each chunk: h is computed again and kept, line by line, then its lines are read in
// reverse.
#pragma once

#include "cpu/gates.h"

namespace gspn {

// Zeroes the positions beyond both ends of a line of h; returns where its position 0 is.
template <typename A>
A* padded_line(A* start, int64_t positions, int64_t width) {
  std::fill_n(start, width, A(0));
  std::fill_n(start + (positions + 1) * width, width, A(0));
  return start + width;
}

// f and s of the slab's channels for one direction, and the sums for their gradients.
template <typename A>
struct SlabFactors {
  A *decay, *scale, *grad_decay, *grad_scale;

  template <typename T>
  SlabFactors(const Backward<T>& call, Scratch<A>& scratch, int k, int64_t channel, int64_t width) {
    decay = scratch.get(4 * width);
    scale = decay + width, grad_decay = scale + width, grad_scale = grad_decay + width;
    const int64_t first = k * call.problem.channels + channel;
    for (int64_t c = 0; c < width; ++c) {
      decay[c] = call.decay ? call.decay[first + c] : A(1);
      scale[c] = call.scale ? call.scale[first + c] : A(1);
    }
    std::fill_n(grad_decay, 2 * width, A(0));
  }
  template <typename T>
  void write(const Backward<T>& call, int64_t b, int k, int64_t channel, int64_t width) const {
    const int64_t first = (b * call.problem.num_directions + k) * call.problem.channels + channel;
    if (call.grad_decay) std::copy_n(grad_decay, width, call.grad_decay + first);
    if (call.grad_scale) std::copy_n(grad_scale, width, call.grad_scale + first);
  }
};

// Computes h of one line again, from the line before (null at the start of a chunk). `h` and `before` point at position
// 0 of lines with a zero position at each end.
template <int kWidth, typename SlabGates, typename Call, typename A>
void rescan_line(const SlabGates& gates, const Call& call, const Scan& scan, int k, int64_t line, const Slab<A>& x,
                 const A* __restrict decay, const A* before, A* h) {
  const int64_t width = kWidth ? kWidth : x.channels;
  const Gates<A> line_gates = gates.line(scan, k, line);
  for (int64_t j = 0; j < scan.positions; ++j) {
    const A* __restrict value = x.at(scan.row(line, j), scan.column(line, j));
    A* __restrict now = h + j * width;
    const Gates<A> token = gates.token(line_gates, call, scan, k, line, j, before);
    const GateValue<A, SlabGates::shared> input_gate{token.field[kInputGate]};
    if (before) {
      const A *centre = before + j * width, *minus = centre - width, *plus = centre + width;
      const TokenWeights<A, SlabGates::shared> weights(token, scan, j);
#pragma omp simd
      for (int64_t c = 0; c < width; ++c)
        now[c] = advance(weights[c], minus[c], centre[c], plus[c], decay[c], input_gate[c] * value[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < width; ++c) now[c] = input_gate[c] * value[c];
    }
  }
}

// Writes the gradients of the gates of `tokens` positions of a line, or of per_token channels at one position: those of
// the weights through the normalisation, those of λ and u as they are. `grads` holds the former in the weights' fields.
template <typename T, typename A>
void write_gate_grads(const Backward<T>& call, const Gates<A>& gates, const Gates<A>& grads, const Scan& scan, int k,
                      int64_t b, int64_t group, int64_t line, int64_t position, int64_t tokens, int64_t per_token,
                      bool has_before) {
  const A *const *l = gates.field + kLogitMinus, *const *w = gates.field + kWeightMinus;
  A* const* g = grads.field + kWeightMinus;
  if (!has_before) {  // the line has no weights
    for (int n = 0; n < 3; ++n) std::fill_n(g[n], tokens * per_token, A(0));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < tokens * per_token; ++i) {
      const Weights<A> grad = normalise_backward(l[0][i], l[1][i], l[2][i], Weights<A>{w[0][i], w[1][i], w[2][i]},
                                                 Weights<A>{g[0][i], g[1][i], g[2][i]});
      g[0][i] = grad.minus;
      g[1][i] = grad.centre;
      g[2][i] = grad.plus;
    }
  }
  const auto put = [&](const Strided<T>& t, int64_t offset, int axis, const A* from) {
    T* to = gate_at(t, axis, b, scan.row(line, position), scan.column(line, position), k, group) + offset;
    if (tokens > 1) scatter(to, t.stride[scan.rows ? 2 : 1], from, tokens);
    else scatter(to, t.stride[axis], from, per_token);
  };
  for (int n = 0; n < 3; ++n) put(call.grad_gates, n * call.grad_gates.stride[4], 5, g[n]);
  put(call.grad_input_gate, 0, 4, grads.field[kInputGate]);
  if (call.grad_output_gate.data) put(call.grad_output_gate, 0, 4, grads.field[kOutputGate]);
}

// The backward step of one line. The gradient of h, dh, is s u dy plus `carry`, the contribution of the line after.
// Adds to dx and to the gradients of f and s, writes the contribution to the line before (weights times f dh) to
// `carry_before`, and writes the gradients of the gates (sums over the slab's channels where these share gates).
// `grads` is scratch for those gradients: for a line where gates are shared, else for one token.
template <int kWidth, typename SlabGates, typename T, typename A>
void unscan_line(const SlabGates& gates, const Backward<T>& call, const Scan& scan, int k, int64_t b, int64_t group,
                 int64_t line, const Slab<A>& x, const Slab<A>& dy, const Slab<A>& dx, const A* before, const A* h,
                 const A* carry, A* carry_before, A* dh, const Gates<A>& grads, const SlabFactors<A>& factors) {
  constexpr bool shared = SlabGates::shared;
  const int64_t width = kWidth ? kWidth : x.channels;
  const Gates<A> line_gates = gates.line(scan, k, line);
  const A *__restrict decay = factors.decay, *__restrict scale = factors.scale;
  A *__restrict grad_decay = factors.grad_decay, *__restrict grad_scale = factors.grad_scale;
  if (before) std::fill_n(carry_before - width, 2 * width, A(0));  // later positions are set by the one before: to_plus
  for (int64_t j = 0; j < scan.positions; ++j) {
    const int64_t row = scan.row(line, j), column = scan.column(line, j);
    const A *__restrict value = x.at(row, column), *__restrict gy = dy.at(row, column);
    A* __restrict gx = dx.at(row, column);
    const A *hj = h + j * width, *back = carry + j * width;
    const Gates<A> token = gates.token(line_gates, call, scan, k, line, j, before);
    const auto gate = [&](Field f) { return GateValue<A, shared>{token.field[f]}; };
    const Gates<A> grad = shared ? grads + j : grads;
    const auto input_gate = gate(kInputGate), output_gate = gate(kOutputGate);
    A *g_input_gate = grad.field[kInputGate], *g_output_gate = grad.field[kOutputGate];
    A s_input_gate = 0, s_output_gate = 0;
#pragma omp simd reduction(+ : s_input_gate, s_output_gate)
    for (int64_t c = 0; c < width; ++c) {
      const A scaled = scale[c] * gy[c], d = output_gate[c] * scaled + back[c];
      dh[c] = d;
      gx[c] += input_gate[c] * d;
      grad_scale[c] += output_gate[c] * gy[c] * hj[c];
      if constexpr (shared) {
        s_input_gate += d * value[c];
        s_output_gate += scaled * hj[c];
      } else {
        g_input_gate[c] = d * value[c];
        g_output_gate[c] = scaled * hj[c];
      }
    }
    if constexpr (shared) *g_input_gate = s_input_gate, *g_output_gate = s_output_gate;

    A *g_minus = grad.field[kWeightMinus], *g_centre = grad.field[kWeightCentre], *g_plus = grad.field[kWeightPlus];
    if (before) {
      const A *centre = before + j * width, *minus = centre - width, *plus = centre + width;
      A *to = carry_before + j * width, *to_minus = to - width, *to_plus = to + width;
      if constexpr (!shared) normalise_range(token, width, scan.has_minus(j), scan.has_plus(j));
      const auto w_minus = gate(kWeightMinus), w_centre = gate(kWeightCentre), w_plus = gate(kWeightPlus);
      A s_minus = 0, s_centre = 0, s_plus = 0;
#pragma omp simd reduction(+ : s_minus, s_centre, s_plus)
      for (int64_t c = 0; c < width; ++c) {
        const A d = decay[c] * dh[c];
        grad_decay[c] +=
            dh[c] * carried(Weights<A>{w_minus[c], w_centre[c], w_plus[c]}, minus[c], centre[c], plus[c]);
        to_minus[c] += w_minus[c] * d;
        to[c] += w_centre[c] * d;
        to_plus[c] = w_plus[c] * d;
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
    if constexpr (!shared) write_gate_grads(call, token, grad, scan, k, b, group, line, j, 1, width, before);
  }
  if constexpr (shared)
    write_gate_grads(call, line_gates, grads, scan, k, b, group, line, 0, scan.positions, 1, before);
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
    A *history = work.history.get(scan.chunks.size * line_size), *lines = work.lines.get(2 * line_size + width);
    const SlabFactors<A> factors(call, work.factors, k, channel, width);
    A* grads_data = work.grads.get(kLogitMinus * grad_size);
    Gates<A> grads{};
    for (int f = 0; f < kLogitMinus; ++f) grads.field[f] = grads_data + f * grad_size;
    const auto h = [&](int64_t n) { return history + n * line_size + width; };
    for (int64_t n = 0; n < scan.chunks.size; ++n) padded_line(history + n * line_size, scan.positions, width);
    for (int64_t c = 0; c < scan.chunks.count(); ++c) {
      for (int64_t n = 0; n < scan.chunk_lines(c); ++n)
        rescan_line<kWidth>(gates, call, scan, k, scan.line(c, n), x, factors.decay,
                            n ? h(n - 1) : (const A*)nullptr, h(n));
      A *carry = lines + width, *carry_before = carry + line_size, *dh = lines + 2 * line_size;
      std::fill_n(lines, line_size, A(0));  // no line comes after the chunk's last one
      for (int64_t n = scan.chunk_lines(c) - 1; n >= 0; --n) {
        unscan_line<kWidth>(gates, call, scan, k, b, group, scan.line(c, n), x, dy, dx, n ? h(n - 1) : nullptr, h(n),
                            carry, carry_before, dh, grads, factors);
        std::swap(carry, carry_before);
      }
    }
    factors.write(call, b, k, channel, width);
  }
  dx.write(call.grad_x, b, channel);
}

}  // namespace gspn
