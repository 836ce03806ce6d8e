// Backward on a map, or a tile of whole windows, that fits into a block's memory. h is computed again: a first sweep
// keeps it at the end of every stage. Then the stages run from the last to the first, each forward once more with its
// lines kept, and back with the gradient.
#pragma once

#include "cuda/map_forward.h"

namespace gspn {

template <typename L>
struct Kept {  // a lane's own line in shared memory; all of a block's lanes stand side by side
  float* data;
  GSPN_DEVICE float* at(int line, int q) const {
    return data + ((line * L::kPositions + q) * int(blockDim.x) + int(threadIdx.x)) * L::kLaneChannels;
  }
  GSPN_DEVICE void put(int line, const LineValues<L>& h) const {
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q) store_vector(at(line, q), h[q]);
  }
  GSPN_DEVICE void get(int line, LineValues<L>& h) const {
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q) load_vector(at(line, q), h[q]);
  }
};

// What the backward step of a line needs besides the scan's state: dy and x of the map, and where the results go.
template <typename L, typename T>
struct Adjoint {
  const T *x, *dy;
  float* dx;
  T* map_dx;
  bool touched, last, vector_dx;
  float* sums;  // this warp's row for this direction, or null where every channel has its own gates
};

// The gradients of f and s, summed over a lane's tokens of one direction.
template <typename L>
struct FactorSums {
  float decay[L::kLaneChannels] = {}, scale[L::kLaneChannels] = {};

  // Adds up the lanes that share a line, and writes the sums to this tile's row of (rows, K, C).
  template <typename T>
  GSPN_DEVICE void write(const Backward<T>& call, const MapPlan& plan, const Channels<L>& at, int k) {
    const unsigned tiles = plan.grid.count();
    const int64_t row = at.batch * tiles + blockIdx.x % tiles;
    const int64_t first = (row * call.problem.num_directions + k) * call.problem.channels + at.channel;
#pragma unroll
    for (int c = 0; c < L::kLaneChannels; ++c) {
#pragma unroll
      for (int lanes = L::kSegmentLanes; lanes < kWarp; lanes *= 2) {
        decay[c] += __shfl_xor_sync(kAllLanes, decay[c], lanes);
        scale[c] += __shfl_xor_sync(kAllLanes, scale[c], lanes);
      }
      if (at.segment != 0 || c >= at.room()) continue;
      if (call.grad_decay) call.grad_decay[first + c] = decay[c];
      if (call.grad_scale) call.grad_scale[first + c] = scale[c];
    }
  }
};

// The backward step of one line. dh = s u dy + carry, with `carry` the contribution of the line after; then dx += λ dh,
// `carry` becomes the contribution to the line before (weights times f dh), and the gradients of the gates are written,
// or added up over channels.
template <bool kShared, typename L, typename T>
GSPN_DEVICE void retreat_line(LineValues<L>& carry, const LineValues<L>& h, const LineValues<L>& h_before,
                              const Backward<T>& call, const Stage& stage, const Axis<L>& axis, const Walk<L>& walk,
                              const Channels<L>& at, const LaneFactors<L>& factors, FactorSums<L>& factor_sums,
                              const Adjoint<L, T>& adjoint, int sense, int line, int first_line) {
  constexpr int kC = L::kLaneChannels;
  const bool restarts = axis.restarts(line, sense);
  const int line_offset = walk.shared_line(line), k = axis.direction(sense);
  const int stage_token = sense * L::kStageTokens + (line - first_line) * L::kLine;
  float before[kC], after[kC];  // h_before beyond the segment
  segment_neighbours<L>(h_before, at.segment, before, after);
  LineValues<L> handed = {};
  float to_before[kC] = {}, to_after[kC] = {};  // contributions to the neighbouring segments
  float sums[L::kPositions * kNumSums] = {};
#pragma unroll
  for (int q = 0; q < L::kPositions; ++q) {
    const int position = at.segment * L::kPositions + q;
    if (position >= axis.positions || (!kShared && at.room() <= 0)) continue;
    const int offset = line_offset + walk.shared_step[q];
    float value[kC], dy[kC], dx[kC] = {}, d[kC];
    load_vector(adjoint.x + offset, value);
    load_vector(adjoint.dy + offset, dy);
    if (adjoint.touched) load_vector(adjoint.dx + offset, dx);
    const auto gates = [&] {
      if constexpr (kShared) return TokenGates<L, true>(stage, stage_token + position);
      else return TokenGates<L, false>(call, axis, at, k, line, position, restarts);
    }();
    Weights<float> grads[kC];
    float grad_input_gate[kC], grad_output_gate[kC];
#pragma unroll
    for (int c = 0; c < kC; ++c) {
      const int s = gates.set(c);
      const Weights<float>& w = gates.weights[s];
      const float scaled = factors.scale[c] * dy[c];
      d[c] = gates.output_gate[s] * scaled + carry[q][c];
      dx[c] += gates.input_gate[s] * d[c];
      grad_input_gate[c] = d[c] * value[c];
      grad_output_gate[c] = scaled * h[q][c];
      factor_sums.scale[c] += gates.output_gate[s] * dy[c] * h[q][c];
      const float minus = q > 0 ? h_before[q > 0 ? q - 1 : 0][c] : before[c], centre = h_before[q][c];
      const float plus = q + 1 < L::kPositions ? h_before[q + 1 < L::kPositions ? q + 1 : 0][c] : after[c];
      if (!restarts) factor_sums.decay[c] += d[c] * carried(w, minus, centre, plus);
      const float back = factors.decay[c] * d[c];
      (q > 0 ? handed[q > 0 ? q - 1 : 0][c] : to_before[c]) += w.minus * back;
      handed[q][c] += w.centre * back;
      (q + 1 < L::kPositions ? handed[q + 1 < L::kPositions ? q + 1 : 0][c] : to_after[c]) += w.plus * back;
      grads[c] = {back * minus, back * centre, back * plus};
      if constexpr (kShared) {
        float* sum = sums + q * kNumSums;
        sum[kSumMinus] += grads[c].minus;
        sum[kSumCentre] += grads[c].centre;
        sum[kSumPlus] += grads[c].plus;
        sum[kSumInputGate] += grad_input_gate[c];
        sum[kSumOutputGate] += grad_output_gate[c];
      }
    }
    if (adjoint.last) {
      write_channels<L>(adjoint.map_dx + (walk.map_first + q * walk.map_step + line * walk.map_line), dx, at.room(),
                        adjoint.vector_dx);
    } else {
      store_vector(adjoint.dx + offset, dx);
    }
    if constexpr (!kShared) {  // every channel has its own gates: their gradients are complete
      const int row = axis.row(line, position), column = axis.column(line, position);
      float minus[kC] = {}, centre[kC] = {}, plus[kC] = {};
      if (!restarts) {
        TokenGates<L, false>::read_logits(call, at, k, row, column, minus, centre, plus);
#pragma unroll
        for (int c = 0; c < kC; ++c) {
          const Weights<float> g = normalise_backward(minus[c], centre[c], plus[c], gates.weights[c], grads[c]);
          minus[c] = g.minus, centre[c] = g.centre, plus[c] = g.plus;
        }
      }
      T* to = gate_at(call.grad_gates, 5, at.batch, row, column, k, at.channel);
      store_vector(to, minus);
      store_vector(to + call.grad_gates.stride[4], centre);
      store_vector(to + 2 * call.grad_gates.stride[4], plus);
      store_vector(gate_at(call.grad_input_gate, 4, at.batch, row, column, k, at.channel), grad_input_gate);
      if (call.grad_output_gate.data)
        store_vector(gate_at(call.grad_output_gate, 4, at.batch, row, column, k, at.channel), grad_output_gate);
    }
  }
  if constexpr (kShared) {
    int first, limit;
    share_out_sums<L::kSegmentLanes>(sums, at.segment_lane, first, limit);
#pragma unroll
    for (int i = 0; i < shared_out(L::kPositions * kNumSums, L::kSegmentLanes); ++i) {
      const int q = (first + i) / kNumSums, sum = (first + i) % kNumSums, position = at.segment * L::kPositions + q;
      if (first + i >= limit || position >= axis.positions) continue;
      const int64_t token = axis.row(line, position) * call.problem.width + axis.column(line, position);
      adjoint.sums[token * kNumSums + sum] = sums[i];
    }
  }
#pragma unroll
  for (int c = 0; c < kC; ++c) {
    const float from_after = __shfl_down_sync(kAllLanes, to_before[c], L::kSegmentLanes);
    const float from_before = __shfl_up_sync(kAllLanes, to_after[c], L::kSegmentLanes);
    if (at.segment > 0) handed[0][c] += from_before;
    if (at.segment < L::kSegments - 1) handed[L::kPositions - 1][c] += from_after;
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q) carry[q][c] = restarts ? 0.f : handed[q][c];
  }
}

template <typename T, bool kShared, int kLine>
__global__ void __launch_bounds__(256, 1) map_backward(const __grid_constant__ Backward<T> call,
                                                    const __grid_constant__ MapPlan plan, const PartialSums partial) {
  using L = Lanes<kLine, 2>;
  const Problem& p = call.problem;
  const Tile tile(plan.grid);
  const MapShape<L> shape(tile.height, tile.width, plan.parts);
  const int warp = threadIdx.x / kWarp, sense = warp % 2;
  const Channels<L> at(p, plan, warp / 2);

  const Stage stage = Stage::at<L>(shared_memory());
  // the lines of a stage, then h at the end of every stage
  const Kept<L> kept{stage.output_gate + 2 * L::kStageTokens};
  const int kept_lines = L::kStageLines + Axis<L>::stages_of(max(tile.height, tile.width)) - 1;
  float* dx = kept.data + kept_lines * L::kPositions * L::kLaneChannels * int(blockDim.x);
  T* x = reinterpret_cast<T*>(dx + shape.elements());
  T* dy = x + shape.elements();
  read_map<L>(x, call.x, tile, shape, at, plan.vector_x);
  read_map<L>(dy, call.grad_y, tile, shape, at, plan.vector_grad);

  const int64_t tokens = p.height * p.width;
  const bool has_rows = Axis<L>(p, tile, true).any(), has_columns = Axis<L>(p, tile, false).any();
  for (int a = has_rows ? 0 : 1; a < (has_columns ? 2 : 1); ++a) {
    const Axis<L> axis(p, tile, a == 0);
    const bool first_axis = a == 0 || !has_rows, last_axis = a == 1 || !has_columns;
    const Walk<L> walk(shape, axis, at, p);
    const int k = axis.direction(sense);
    const LaneFactors<L> factors(call, at, k);
    FactorSums<L> factor_sums;
    const auto prepare = [&](int i) { start_stage<kShared, L>(stage, call, axis, at, i); };
    // One stage forward; `visit` sees h before each of its lines.
    LineValues<L> h = {};
    NoHalo<L> none({}, p, plan, axis, at, sense);
    const auto advance_stage = [&](int i, auto visit) {
      const int s = axis.stage(i, sense), begin = axis.stage_begin(s), lines = axis.stage_end(s) - begin;
      for (int n = 0; n < lines; ++n) {
        visit(n);
        advance_line<kShared, L>(h, none, call, stage, axis, walk, at, factors, x, sense,
                                 nth_read(begin, lines, n, sense), begin, [](auto...) {});
      }
    };
    for (int i = 0; i + 1 < axis.stages; ++i) {
      prepare(i);
      if (k < 0) continue;
      advance_stage(i, [](int) {});
      kept.put(L::kStageLines + i, h);
    }
    LineValues<L> carry = {};
    const int64_t first_token = at.batch * tokens + tile.row * p.width + tile.column;
    Adjoint<L, T> adjoint{x, dy, dx, call.grad_x.data + first_token * p.channels + at.channel, false, false,
                          plan.vector_y, nullptr};
    if constexpr (kShared) {
      const int64_t row = int64_t(at.slab) * plan.parts + at.part;
      const int64_t rows = p.groups * partial.group_rows;
      adjoint.sums = partial.data + ((at.batch * p.num_directions + max(k, 0)) * rows + row) * tokens * kNumSums;
    }
    for (int i = axis.stages - 1; i >= 0; --i) {
      prepare(i);
      if (k < 0) continue;
      const bool second = i < axis.stages / 2;
      adjoint.touched = !first_axis || (axis.both() && second);
      adjoint.last = last_axis && (!axis.both() || second);
      if (i > 0) {
        kept.get(L::kStageLines + i - 1, h);
      } else {
#pragma unroll
        for (int q = 0; q < L::kPositions; ++q)
#pragma unroll
          for (int c = 0; c < L::kLaneChannels; ++c) h[q][c] = 0.f;
      }
      advance_stage(i, [&](int n) { kept.put(n, h); });
      const int s = axis.stage(i, sense), begin = axis.stage_begin(s), lines = axis.stage_end(s) - begin;
      for (int n = lines - 1; n >= 0; --n) {
        const int line = nth_read(begin, lines, n, sense);
        LineValues<L> h_before;
        kept.get(n, h_before);  // of another chunk where the line restarts: its weights are 0, its sums are not used
        retreat_line<kShared, L>(carry, h, h_before, call, stage, axis, walk, at, factors, factor_sums, adjoint,
                                 sense, line, begin);
#pragma unroll
        for (int q = 0; q < L::kPositions; ++q)
#pragma unroll
          for (int c = 0; c < L::kLaneChannels; ++c) h[q][c] = h_before[q][c];
      }
    }
    if (k >= 0) factor_sums.write(call, plan, at, k);
  }
}

template <int kLine>
size_t map_backward_bytes(int height, int width, int parts, size_t element) {
  using L = Lanes<kLine, 2>;
  const int lines = L::kStageLines + Axis<L>::stages_of(height > width ? height : width) - 1;
  return MapShape<L>(height, width, parts).elements() * (sizeof(float) + 2 * element) +
         lines * L::kPositions * L::kLaneChannels * (2 * kWarp * parts) * sizeof(float) + Stage::bytes<L>();
}

}  // namespace gspn
