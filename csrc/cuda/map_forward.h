// Forward on a map, or a tile of one, that fits into a block's memory. One block per slab of channels reads x once,
// runs every direction, and writes y once.
#pragma once

#include <type_traits>

#include "cuda/map.h"

namespace gspn {

template <typename L>
using LineValues = float[L::kPositions][L::kLaneChannels];

// What a scan needs from beyond its tile, where the map is larger than a tile: for every direction, h on the last line
// that it reads in every tile, and h at both ends of a tile on every line. edge_scan() writes them.
struct Edges {
  float* line[4];  // of direction k: (B, tiles along the lines, positions, C)
  float* side[4];  // (B, lines, 2 · tiles along the positions, C): first and last position of every tile
};

// Where no scan crosses a tile's border: there are no values beyond it.
template <typename L>
struct NoHalo {
  GSPN_DEVICE NoHalo(const Edges&, const Problem&, const MapPlan&, const Axis<L>&, const Channels<L>&, int) {}
  GSPN_DEVICE void start(LineValues<L>&, int) {}
  GSPN_DEVICE void beside(int, float (&)[L::kLaneChannels], float (&)[L::kLaneChannels]) {}
  GSPN_DEVICE void skip(int) {}
};

// The edges of one direction that a lane needs. Those beside a line are read while the line before is computed.
template <typename L>
struct Halo {
  const float *line_edge, *side_edge;  // at this lane's channels
  int64_t channels, side_row;
  const Axis<L>& axis;
  int sense, tile, segment;
  bool from_minus, from_plus;
  float4 next;  // beside the next line

  GSPN_DEVICE Halo(const Edges& edges, const Problem& p, const MapPlan& plan, const Axis<L>& axis_,
                   const Channels<L>& at, int sense_)
      : channels(p.channels), axis(axis_), sense(sense_), tile(L::kLine), segment(at.segment), next() {
    const int k = axis.direction(sense), tiles_along = (axis.map.positions + tile - 1) / tile;
    const int line_tiles = (axis.map.lines + tile - 1) / tile;
    const bool real = k >= 0 && at.room() > 0;
    from_minus = real && at.segment == 0 && axis.first_position > 0;
    from_plus = real && at.segment == L::kSegments - 1 && axis.first_position + axis.positions < axis.map.positions;
    side_row = 2 * tiles_along * channels;
    const int tile_index = axis.first_position / tile;
    side_edge = (k < 0 ? nullptr : edges.side[k]) + at.batch * axis.map.lines * side_row + at.channel +
                (from_minus ? 2 * tile_index - 1 : 2 * tile_index + 2) * channels;
    line_edge = (k < 0 ? nullptr : edges.line[k]) +
                ((at.batch * line_tiles + axis.first_line / tile + (sense ? 1 : -1)) * axis.map.positions +
                 axis.first_position + at.segment * L::kPositions) * channels + at.channel;
    if (!real) line_edge = nullptr;
  }
  GSPN_DEVICE void fetch(int line) {  // h beside `line` of the tile
    if (from_minus || from_plus)
      next = *reinterpret_cast<const float4*>(side_edge + (axis.first_line + line) * side_row);
  }
  // Reads h on the line before `line`, the first of the tile that is read, where the scan continues from another tile.
  GSPN_DEVICE void start(LineValues<L>& h, int line) {
    if (axis.restarts(line, sense)) return;
    const int before = nth_read(line, 1, -1, sense);
    fetch(before);
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q)
      if (line_edge && at_position(q) < axis.positions) load_vector(line_edge + q * channels, h[q]);
  }
  GSPN_DEVICE int at_position(int q) const { return segment * L::kPositions + q; }
  // The values beside the line before `line`; starts to read those beside `line`.
  GSPN_DEVICE void beside(int line, float (&before)[L::kLaneChannels], float (&after)[L::kLaneChannels]) {
    const float v[4] = {next.x, next.y, next.z, next.w};
#pragma unroll
    for (int c = 0; c < L::kLaneChannels; ++c) {
      if (from_minus) before[c] = v[c];
      if (from_plus) after[c] = v[c];
    }
    fetch(line);
  }
  GSPN_DEVICE void skip(int line) { fetch(line); }  // a line that starts a chunk needs no values beside it
};

// Advances a lane's share of h by one line: h becomes f w · h + λx, or λx where the line starts a chunk. `visit` is
// called with each token's gates.
template <bool kShared, typename L, typename T, typename Call, typename SideValues, typename Visit>
GSPN_DEVICE void advance_line(LineValues<L>& h, SideValues& halo, const Call& call, const Stage& stage,
                              const Axis<L>& axis, const Walk<L>& walk, const Channels<L>& at,
                              const LaneFactors<L>& factors, const T* x, int sense, int line, int first_line,
                              Visit visit) {
  const int line_offset = walk.shared_line(line);
  const int stage_token = sense * L::kStageTokens + (line - first_line) * L::kLine;
  float before[L::kLaneChannels], after[L::kLaneChannels];
  const auto advance_tokens = [&](auto fresh) {
    constexpr bool kFresh = decltype(fresh)::value;
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q) {
      const int position = at.segment * L::kPositions + q;
      if (position >= axis.positions || (!kShared && at.room() <= 0)) continue;
      float value[L::kLaneChannels];
      load_vector(x + line_offset + walk.shared_step[q], value);
      const auto gates = [&] {
        if constexpr (kShared) return TokenGates<L, true>(stage, stage_token + position);
        else return TokenGates<L, false>(call, axis, at, axis.direction(sense), line, position, kFresh);
      }();
#pragma unroll
      for (int c = 0; c < L::kLaneChannels; ++c) {
        const int s = gates.set(c);
        const float driven = gates.input_gate[s] * value[c];
        if constexpr (kFresh) {
          h[q][c] = driven;
        } else {
          const float centre = h[q][c], plus = q + 1 < L::kPositions ? h[q + 1][c] : after[c];
          h[q][c] = advance(gates.weights[s], before[c], centre, plus, factors.decay[c], driven);
          before[c] = centre;
        }
      }
      visit(q, gates);
    }
  };
  if (axis.restarts(line, sense)) {
    halo.skip(line);
    advance_tokens(std::true_type());
  } else {
    segment_neighbours<L>(h, at.segment, before, after);
    halo.beside(line, before, after);
    advance_tokens(std::false_type());
  }
}

template <typename T, bool kShared, typename L, bool kTiled>
__global__ void __launch_bounds__(128, 1)
    map_forward(const __grid_constant__ Forward<T> call, const __grid_constant__ MapPlan plan,
                const __grid_constant__ Edges edges) {
  const Problem& p = call.problem;
  const Tile tile(plan.grid);
  const MapShape<L> shape(tile.height, tile.width, plan.parts);
  const int warp = threadIdx.x / kWarp, sense = warp % 2;
  const Channels<L> at(p, plan, warp / 2);

  const Stage stage = Stage::at<L>(shared_memory());
  float* y = stage.output_gate + 2 * L::kStageTokens;
  T* x = reinterpret_cast<T*>(y + shape.elements());
  read_map<L>(x, call.x, tile, shape, at, plan.vector_x);

  T* map_y = call.y.data + ((at.batch * p.height + tile.row) * p.width + tile.column) * p.channels + at.channel;
  const bool has_rows = Axis<L>(p, tile, true).any(), has_columns = Axis<L>(p, tile, false).any();
  for (int a = has_rows ? 0 : 1; a < (has_columns ? 2 : 1); ++a) {
    const Axis<L> axis(p, tile, a == 0);
    const bool first_axis = a == 0 || !has_rows, last_axis = a == 1 || !has_columns;
    const Walk<L> walk(shape, axis, at, p);
    const LaneFactors<L> factors(call, at, axis.direction(sense));
    LineValues<L> h = {};
    std::conditional_t<kTiled, Halo<L>, NoHalo<L>> halo(edges, p, plan, axis, at, sense);
    if (axis.direction(sense) >= 0) halo.start(h, nth_read(0, axis.lines, 0, sense));
    for (int i = 0; i < axis.stages; ++i) {
      start_stage<kShared, L>(stage, call, axis, at, i);
      if (axis.direction(sense) < 0) continue;
      const bool second = i >= axis.stages / 2;
      const bool touched = !first_axis || (axis.both() && second), last = last_axis && (!axis.both() || second);
      const int s = axis.stage(i, sense), begin = axis.stage_begin(s), lines = axis.stage_end(s) - begin;
      for (int n = 0; n < lines; ++n) {
        const int line = nth_read(begin, lines, n, sense);
        const int line_offset = walk.shared_line(line);
        const auto add_up = [&](int q, const auto& gates) {
          float sum[L::kLaneChannels] = {};
          float* const shared_y = y + line_offset + walk.shared_step[q];
          if (touched) load_vector(shared_y, sum);
#pragma unroll
          for (int c = 0; c < L::kLaneChannels; ++c)
            sum[c] += factors.scale[c] * gates.output_gate[gates.set(c)] * h[q][c];
          if (last) {
            write_channels<L>(map_y + (walk.map_first + q * walk.map_step + line * walk.map_line), sum, at.room(),
                              plan.vector_y);
          } else {
            store_vector(shared_y, sum);
          }
        };
        advance_line<kShared, L>(h, halo, call, stage, axis, walk, at, factors, x, sense, line, begin, add_up);
      }
    }
  }
}

template <typename L>
size_t map_forward_bytes(int height, int width, int parts, size_t element) {
  return MapShape<L>(height, width, parts).elements() * (sizeof(float) + element) +
         Stage::bytes<L>();
}

}  // namespace gspn
