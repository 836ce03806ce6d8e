// A whole map of a few channels in a block's memory, and a line divided among its lanes.
//
// Scans are independent across channels, and within a line across tokens, so a line is kept in registers: a lane has
// kPositions neighbouring tokens of kLaneChannels channels, kSegments lanes side by side cover the line, and a warp
// covers kWarpChannels channels of it. Only the two ends of a segment are exchanged, by shuffles.
#pragma once

#include "cuda/gates.h"
#include "cuda/tile_grid.h"

namespace gspn {

template <int kLongestLine, int kChannelsOfALane>
struct Lanes {
  static constexpr int kLine = kLongestLine;
  static constexpr int kPositions = 4;
  static constexpr int kLaneChannels = kChannelsOfALane;
  static constexpr int kSegments = kLine / kPositions;
  static constexpr int kSegmentLanes = kWarp / kSegments;
  static constexpr int kWarpChannels = kSegmentLanes * kLaneChannels;
  // Segments whose accesses to 16-bit elements meet in the same 128 bytes of banks; see MapShape.
  static constexpr int kBankGroups = 64 / kWarpChannels > 1 ? 64 / kWarpChannels : 1;
  // Gates are prepared for this many tokens at a time, for each sense.
  static constexpr int kStageTokens = 128;
  static constexpr int kStageLines = kStageTokens / kLine;
};

// What the host decides for the map kernels; see cuda/propagate.cu.
struct MapPlan {
  int parts;          // warps side by side along the channels: a block's slab is parts · kWarpChannels wide
  int domain;         // no slab crosses a multiple of this many channels: C / G where a group shares gates, else C
  int domain_slabs;   // slabs in a domain
  TileGrid grid;      // a block has a tile of the map
  // Whether a lane's channels of x, of y (and dx), of dy lie side by side and aligned.
  bool vector_x, vector_y, vector_grad;
};

// The block's part of the map: all of it, or a tile.
struct Tile {
  int row, column, height, width;  // its first row and column, and its size

  GSPN_DEVICE explicit Tile(const TileGrid& grid) {
    const int index = blockIdx.x % unsigned(grid.count()), down = index / grid.across, across = index % grid.across;
    row = grid.rows.begin(down), height = grid.rows.end(down) - row;
    column = grid.columns.begin(across), width = grid.columns.end(across) - column;
  }
};

// The channels of this block and this lane.
template <typename L>
struct Channels {
  int64_t batch;
  int slab, group, first, end;  // the block's: group only where gates are shared
  int part, lane, segment, segment_lane, channel;  // this lane's: `channel` its first in the map

  GSPN_DEVICE Channels(const Problem& p, const MapPlan& plan, int part_of_warp) {
    const int slabs = plan.domain_slabs * (int(p.channels) / plan.domain);
    const int block = int(blockIdx.x / unsigned(plan.grid.count()));
    batch = block / slabs;
    slab = block % slabs;
    group = slab / plan.domain_slabs;
    const int width = plan.parts * L::kWarpChannels;
    first = group * plan.domain + slab % plan.domain_slabs * width;
    end = min(first + width, (group + 1) * plan.domain);
    part = part_of_warp;
    lane = threadIdx.x % kWarp;
    segment = lane / L::kSegmentLanes;
    segment_lane = lane % L::kSegmentLanes;
    channel = first + part * L::kWarpChannels + segment_lane * L::kLaneChannels;
  }
  // The slab's channels from this lane's first on: the lane owns its c-th where c < room(), none where room() <= 0. Not
  // clamped to 0 … kLaneChannels: for sm_90, ptxas 13.0 compiles a clamp that is then compared with its bound to a
  // VIMNMX.RELU whose two predicates are one register, and a lane just beyond the slab, which owns nothing, would store
  // a whole vector.
  GSPN_DEVICE int room() const { return end - channel; }
};

// f and s of a lane's channels in the k-th direction.
template <typename L>
struct LaneFactors {
  float decay[L::kLaneChannels], scale[L::kLaneChannels];

  template <typename Call>
  GSPN_DEVICE LaneFactors(const Call& call, const Channels<L>& at, int k) {
#pragma unroll
    for (int c = 0; c < L::kLaneChannels; ++c) {
      const bool real = k >= 0 && c < at.room();
      decay[c] = real ? of_channel(call.decay, call.problem, k, at.channel + c) : 1.f;
      scale[c] = real ? of_channel(call.scale, call.problem, k, at.channel + c) : 1.f;
    }
  }
};

// Where a token's channels lie in shared memory, in elements. A unit is one warp's channels at one token. Lanes of a
// warp differ in their segment, four tokens apart along a row or along a column. Units are permuted within a row by the
// low bits of the segment, and rows are a quarter of a unit longer than their units, so that segments have different
// banks in either order.
template <typename L>
struct MapShape {
  int height, width, parts, row_stride;

  GSPN_INLINE MapShape(int height_, int width_, int parts_)
      : height(height_), width(width_), parts(parts_) {
    const int units = (width * parts + L::kBankGroups - 1) / L::kBankGroups * L::kBankGroups;
    row_stride = units * L::kWarpChannels + L::kWarpChannels / 4;
  }
  GSPN_INLINE int elements() const { return height * row_stride; }
  GSPN_DEVICE int along_row(int column, int part) const {
    return ((column * parts + part) ^ (column / L::kPositions & (L::kBankGroups - 1))) * L::kWarpChannels;
  }
  GSPN_DEVICE int offset(int row, int column, int part) const { return row * row_stride + along_row(column, part); }
};

// One axis of scans over a tile: its lines and its two senses. `line` and `position` count from the tile's first.
//
// A block runs both senses of an axis at once, in different warps. The lines are cut into an even number of stages;
// while one sense is at stage i the other is at the mirrored one, so they never add to the same line at the same time.
// Each line is added to once in the first half of the stages, and once in the second half.
template <typename L>
struct Axis {
  Lines<int> map;
  int lines, positions, first_line, first_position;  // of the tile
  int stages, stage_lines;
  int forward, reversed;  // the direction index of either sense, or -1

  GSPN_DEVICE Axis(const Problem& p, const Tile& tile, bool rows) : map(p, rows) {
    lines = map.line_of(tile.height, tile.width);
    positions = map.position_of(tile.height, tile.width);
    first_line = map.line_of(tile.row, tile.column);
    first_position = map.position_of(tile.row, tile.column);
    stages = stages_of(lines);
    stage_lines = (lines + stages - 1) / stages;
    forward = index_of(p, direction_of(rows, false));
    reversed = index_of(p, direction_of(rows, true));
  }
  GSPN_INLINE static int stages_of(int lines) { return 2 * ((lines + 2 * L::kStageLines - 1) / (2 * L::kStageLines)); }
  GSPN_DEVICE static int index_of(const Problem& p, Direction direction) {
    int index = -1;
    for (int k = 0; k < p.num_directions; ++k)
      if (p.directions[k] == direction) index = k;
    return index;
  }
  GSPN_DEVICE bool any() const { return forward >= 0 || reversed >= 0; }
  GSPN_DEVICE bool both() const { return forward >= 0 && reversed >= 0; }
  GSPN_DEVICE int direction(int sense) const { return sense ? reversed : forward; }
  // The i-th stage of a sense, counted in map order.
  GSPN_DEVICE int stage(int i, int sense) const { return nth_read(0, stages, i, sense); }
  GSPN_DEVICE int stage_begin(int stage) const { return min(stage * stage_lines, lines); }
  GSPN_DEVICE int stage_end(int stage) const { return min((stage + 1) * stage_lines, lines); }
  // Whether the scan restarts at a line, which then has no line before.
  GSPN_DEVICE bool restarts(int line, int sense) const { return map.restarts(first_line + line, sense); }
  GSPN_DEVICE bool has_minus(int position) const { return map.has_minus(first_position + position); }
  GSPN_DEVICE bool has_plus(int position) const { return map.has_plus(first_position + position); }
  GSPN_DEVICE int row(int line, int position) const { return map.row(first_line + line, first_position + position); }
  GSPN_DEVICE int column(int line, int position) const {
    return map.column(first_line + line, first_position + position);
  }
};

// Offsets of a lane's four positions on a line, and of the line, in shared memory and in a contiguous (B, H, W, C) map.
template <typename L>
struct Walk {
  int shared_step[L::kPositions], map_first, map_step, map_line;
  const MapShape<L>& shape;
  const Axis<L>& axis;
  int part, lane_offset;

  GSPN_DEVICE Walk(const MapShape<L>& shape_, const Axis<L>& axis_, const Channels<L>& at, const Problem& p)
      : shape(shape_), axis(axis_), part(at.part), lane_offset(at.segment_lane * L::kLaneChannels) {
    const int begin = at.segment * L::kPositions;
#pragma unroll
    for (int q = 0; q < L::kPositions; ++q)
      shared_step[q] =
          lane_offset + (axis.map.rows ? shape.along_row(begin + q, part) : (begin + q) * shape.row_stride);
    map_step = int(axis.map.rows ? p.channels : p.width * p.channels);
    map_line = int(axis.map.rows ? p.width * p.channels : p.channels);
    map_first = begin * map_step;
  }
  GSPN_DEVICE int shared_line(int line) const {
    return axis.map.rows ? line * shape.row_stride : shape.along_row(line, part);
  }
};

// The gates of both senses' current stages that a group's channels share: (w-, w0, w+, λ) and u of every token.
struct Stage {
  float4* weights;
  float* output_gate;

  template <typename L>
  GSPN_DEVICE static Stage at(char* memory) {
    float4* weights = reinterpret_cast<float4*>(memory);
    return {weights, reinterpret_cast<float*>(weights + 2 * L::kStageTokens)};
  }
  template <typename L>
  static constexpr size_t bytes() { return 2 * L::kStageTokens * (sizeof(float4) + sizeof(float)); }
};

// Prepares stage i of both senses; all threads of the block take part. A line without a line before has weights 0, and
// its logits are not read.
template <typename L, typename Call>
GSPN_DEVICE void prepare_stage(const Stage& stage, const Call& call, const Axis<L>& axis, const Channels<L>& at,
                               int i) {
  for (int t = threadIdx.x; t < 2 * L::kStageTokens; t += blockDim.x) {
    const int sense = t / L::kStageTokens, token = t % L::kStageTokens;
    const int s = axis.stage(i, sense), k = axis.direction(sense);
    const int line = axis.stage_begin(s) + token / L::kLine, position = token % L::kLine;
    if (k < 0 || line >= axis.stage_end(s) || position >= axis.positions) continue;
    const int row = axis.row(line, position), column = axis.column(line, position);
    Weights<float> w{0.f, 0.f, 0.f};
    if (!axis.restarts(line, sense)) {
      const auto* logits = gate_at(call.gates, 5, at.batch, row, column, k, at.group);
      const int64_t next = call.gates.stride[4];
      w = normalise(load(logits[0]), load(logits[next]), load(logits[2 * next]), float(axis.has_minus(position)),
                    float(axis.has_plus(position)));
    }
    const float input_gate = load(*gate_at(call.input_gate, 4, at.batch, row, column, k, at.group));
    stage.weights[t] = make_float4(w.minus, w.centre, w.plus, input_gate);
    stage.output_gate[t] =
        call.output_gate.data ? load(*gate_at(call.output_gate, 4, at.batch, row, column, k, at.group)) : 1.f;
  }
}

// Begins stage i: afterwards all threads of the block see what others wrote before, and the stage's gates. The map may
// still be on its way into shared memory while the first stage's gates are prepared.
template <bool kShared, typename L, typename Call>
GSPN_DEVICE void start_stage(const Stage& stage, const Call& call, const Axis<L>& axis, const Channels<L>& at, int i) {
  if constexpr (kShared) {
    __syncthreads();
    prepare_stage<L>(stage, call, axis, at, i);
  }
  wait_copies();
  __syncthreads();
}

// Reads the block's part of the map into shared memory; channels beyond the slab's end become 0. start_stage() must
// follow.
template <typename L, typename T>
GSPN_DEVICE void read_map(T* shared, const Strided<const T>& from, const Tile& tile, const MapShape<L>& shape,
                          const Channels<L>& at, bool vector) {
  constexpr int kVector = L::kLaneChannels;
  const int step = vector ? kVector : 1;
  int shift = 0;  // accesses a token, a power of two
  while ((step << shift) < shape.parts * L::kWarpChannels) ++shift;
  const int count = shape.height * shape.width << shift;
  const float inverse_width = 1.f / float(shape.width);
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int token = i >> shift, c = (i - (token << shift)) * step;
    const int row = int((float(token) + 0.5f) * inverse_width), column = token - row * shape.width;
    T* to = shared + shape.offset(row, column, c / L::kWarpChannels) + c % L::kWarpChannels;
    const T* source = map_at(from, at.batch, tile.row + row, tile.column + column, at.first + c);
    if (at.first + c >= at.end) {
      for (int v = 0; v < step; ++v) store(to[v], 0.f);
    } else if (vector) {
      copy_async<kVector * sizeof(T)>(to, source);
    } else {
      *to = *source;
    }
  }
}

// A lane's channels at one token, to a contiguous map; `room` is Channels::room().
template <typename L, typename T>
GSPN_DEVICE void write_channels(T* to, const float (&v)[L::kLaneChannels], int room, bool vector) {
  if (vector && room >= L::kLaneChannels) {
    store_vector(to, v);
  } else {
#pragma unroll
    for (int c = 0; c < L::kLaneChannels; ++c)
      if (c < room) store(to[c], v[c]);
  }
}

// The neighbours of a lane's segment on the same line: 0 beyond the ends of the line.
template <typename L>
GSPN_DEVICE void segment_neighbours(const float (&line)[L::kPositions][L::kLaneChannels], int segment,
                                    float (&before)[L::kLaneChannels], float (&after)[L::kLaneChannels]) {
#pragma unroll
  for (int c = 0; c < L::kLaneChannels; ++c) {
    before[c] = __shfl_up_sync(kAllLanes, line[L::kPositions - 1][c], L::kSegmentLanes);
    after[c] = __shfl_down_sync(kAllLanes, line[0][c], L::kSegmentLanes);
    if (segment == 0) before[c] = 0.f;
    if (segment == L::kSegments - 1) after[c] = 0.f;
  }
}

// A lane's gates at one token: those of its group from the stage, or its channels' own from memory.
template <typename L, bool kShared>
struct TokenGates {
  static constexpr int kSets = kShared ? 1 : L::kLaneChannels;
  Weights<float> weights[kSets];
  float input_gate[kSets], output_gate[kSets];

  GSPN_DEVICE TokenGates(const Stage& stage, int stage_token) {
    const float4 g = stage.weights[stage_token];
    weights[0] = {g.x, g.y, g.z};
    input_gate[0] = g.w;
    output_gate[0] = stage.output_gate[stage_token];
  }
  template <typename Call>
  GSPN_DEVICE TokenGates(const Call& call, const Axis<L>& axis, const Channels<L>& at, int k, int line, int position,
                         bool restarts) {
    const int row = axis.row(line, position), column = axis.column(line, position);
    load_vector(gate_at(call.input_gate, 4, at.batch, row, column, k, at.channel), input_gate);
#pragma unroll
    for (int c = 0; c < kSets; ++c) weights[c] = {0.f, 0.f, 0.f}, output_gate[c] = 1.f;
    if (call.output_gate.data)
      load_vector(gate_at(call.output_gate, 4, at.batch, row, column, k, at.channel), output_gate);
    if (restarts) return;
    float minus[kSets], centre[kSets], plus[kSets];
    read_logits(call, at, k, row, column, minus, centre, plus);
    const float has_minus = float(axis.has_minus(position)), has_plus = float(axis.has_plus(position));
#pragma unroll
    for (int c = 0; c < kSets; ++c) weights[c] = normalise(minus[c], centre[c], plus[c], has_minus, has_plus);
  }
  template <typename Call>
  GSPN_DEVICE static void read_logits(const Call& call, const Channels<L>& at, int k, int row, int column,
                                      float (&minus)[kSets], float (&centre)[kSets], float (&plus)[kSets]) {
    const auto* logits = gate_at(call.gates, 5, at.batch, row, column, k, at.channel);
    load_vector(logits, minus);
    load_vector(logits + call.gates.stride[4], centre);
    load_vector(logits + 2 * call.gates.stride[4], plus);
  }
  GSPN_DEVICE static int set(int channel) { return kShared ? 0 : channel; }
};

}  // namespace gspn
