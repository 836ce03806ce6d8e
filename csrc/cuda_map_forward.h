// Forward on a map that fits on chip: one block a slab of channels reads x once, runs every direction, writes y once.
#pragma once

#include "cuda_map.h"

namespace gspn {

template <typename L>
using LineValues = float[L::kPositions][L::kLaneChannels];

// Moves a lane's share of the line one line on: h becomes w · h + λx. `driven` is told each site's gates and new h.
template <bool kShared, typename L, typename T, typename Call, typename Visit>
GSPN_DEVICE void advance_line(LineValues<L>& h, const Call& call, const Stage& stage, const Axis<L>& axis,
                              const Walk<L>& walk, const Channels<L>& at, const T* x, int sense, int line, int first_line,
                              Visit visit) {
  const bool restarts = axis.restarts(line, sense);
  float before[L::kLaneChannels], after[L::kLaneChannels];
  if (restarts) {
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q)
#pragma unroll
      for (int c = 0; c < L::kLaneChannels; ++c) h[q][c] = 0.f;
  }
  segment_neighbours<L>(h, at.segment, before, after);
  const int line_offset = walk.shared_line(line);
  const int stage_site = sense * L::kStageSites + (line - first_line) * L::kLine;
#pragma unroll
  for (int q = 0; q < L::kPositions; ++q) {
    const int position = at.segment * L::kPositions + q;
    if (position >= axis.positions || (!kShared && at.count() == 0)) continue;
    float value[L::kLaneChannels];
    load_vector(x + line_offset + walk.shared_step[q], value);
    const auto gates = [&] {
      if constexpr (kShared) return SiteGates<L, true>(stage, stage_site + position);
      else return SiteGates<L, false>(call, axis, at, axis.direction(sense), line, position, restarts);
    }();
#pragma unroll
    for (int c = 0; c < L::kLaneChannels; ++c) {
      const int s = gates.set(c);
      const float centre = h[q][c], plus = q + 1 < L::kPositions ? h[q + 1][c] : after[c];
      h[q][c] = advance(gates.weights[s], before[c], centre, plus, gates.lam[s] * value[c]);
      before[c] = centre;
    }
    visit(q, gates);
  }
}

template <typename T, bool kShared, int kLine>
__global__ void __launch_bounds__(128, 1) map_forward(const __grid_constant__ Forward<T> call, const __grid_constant__ MapPlan plan) {
  using L = Lanes<kLine, 4>;
  const Problem& p = call.problem;
  const MapShape<L> shape(int(p.height), int(p.width), plan.parts);
  const int warp = threadIdx.x / kWarp, sense = warp % 2;
  const Channels<L> at(p, plan, warp / 2);

  const Stage stage = Stage::at<L>(shared_memory());
  float* y = stage.out + 2 * L::kStageSites;
  T* x = reinterpret_cast<T*>(y + shape.elements());
  read_map<L>(x, call.x, shape, at, plan.vector_x);
  wait_copies();

  T* map_y = call.y.data + at.batch * (p.height * p.width * p.channels) + at.channel;
  const bool has_rows = Axis<L>(p, true).any(), has_columns = Axis<L>(p, false).any();
  for (int a = has_rows ? 0 : 1; a < (has_columns ? 2 : 1); ++a) {
    const Axis<L> axis(p, a == 0);
    const bool first_axis = a == 0 || !has_rows, last_axis = a == 1 || !has_columns;
    const Walk<L> walk(shape, axis, at, int(p.channels));
    LineValues<L> h = {};
    for (int i = 0; i < axis.stages; ++i) {
      __syncthreads();
      if constexpr (kShared) {
        prepare_stage<L>(stage, call, axis, at, i);
        __syncthreads();
      }
      if (axis.direction(sense) < 0) continue;
      const bool second = i >= axis.stages / 2;
      const bool touched = !first_axis || (axis.both() && second), last = last_axis && (!axis.both() || second);
      const int s = axis.stage(i, sense), begin = axis.stage_begin(s), lines = axis.stage_end(s) - begin;
      for (int n = 0; n < lines; ++n) {
        const int line = sense ? begin + lines - 1 - n : begin + n;
        const int line_offset = walk.shared_line(line);
        advance_line<kShared, L>(h, call, stage, axis, walk, at, x, sense, line, begin, [&](int q, const auto& gates) {
          float sum[L::kLaneChannels] = {};
          float* const shared_y = y + line_offset + walk.shared_step[q];
          if (touched) load_vector(shared_y, sum);
#pragma unroll
          for (int c = 0; c < L::kLaneChannels; ++c) sum[c] += gates.out[gates.set(c)] * h[q][c];
          if (last) {
            write_channels<L>(map_y + (walk.map_first + q * walk.map_step + line * walk.map_line), sum, at.count(),
                              plan.vector_y);
          } else {
            store_vector(shared_y, sum);
          }
        });
      }
    }
  }
}

template <int kLine>
size_t map_forward_bytes(const Problem& p, int parts, size_t element) {
  using L = Lanes<kLine, 4>;
  return MapShape<L>(int(p.height), int(p.width), parts).elements() * (sizeof(float) + element) +
         Stage::bytes<L>();
}

}  // namespace gspn
