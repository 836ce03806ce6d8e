// Backward on tensor cores, of a map or a tile of up to 16 × 16 tokens: a block has one group's channels of it, reads x
// once and writes the gradients once.
//
// Warps scan forward and then back (cuda/tensor_backward_scan.h, which has the maths). The block reads and prepares
// what they need, adds up what they leave, and writes it.
#pragma once

#include "cuda/tensor_backward_scan.h"
#include "cuda/tensor_edges.h"

namespace gspn {

// What the host decides; see cuda/tensor.cu.
struct TensorBackwardPlan {
  int channels;      // of a group
  int k[4];          // of every direction: which one of the call it is, or -1
  bool both_senses;  // whether shared memory has room for both senses of an axis at once
  // Whether a site's gates in the four directions, or their gradients, lie side by side: see gates_side_by_side().
  bool wide_gates, wide_grads;
  TileGrid grid;
};

// Whether a group's gates of all four directions, or their gradients, lie side by side in the order of gspn::Direction,
// so that two elements may be read or written at once: 12 logits, and 4 input gates.
template <typename T>
bool gates_side_by_side(const Problem& p, const Strided<T>& gates, const Strided<T>& input_gate) {
  const int64_t size[3] = {p.batch, p.height, p.width};
  const auto aligned = [&](const Strided<T>& t, int group_axis) {
    bool fits = reinterpret_cast<uintptr_t>(t.data) % 8 == 0 && (p.groups == 1 || t.stride[group_axis] % 4 == 0);
    for (int axis = 0; axis < 3; ++axis) fits = fits && (size[axis] == 1 || t.stride[axis] % 4 == 0);
    return fits;
  };
  bool all = p.num_directions == 4;
  for (int k = 0; k < p.num_directions; ++k) all = all && p.directions[k] == k;
  return all && gates.stride[3] == 3 && gates.stride[4] == 1 && input_gate.stride[3] == 1 && aligned(gates, 5) &&
         aligned(input_gate, 4);
}

// A site's gates in both senses of an axis, or their gradients, two 16-bit elements a word: the logits of the one sense
// and then of the other, both input gates, and both output gates.
struct AxisGates {
  uint32_t logits[3], input, output;

  template <typename T>
  static GSPN_DEVICE float of(const uint32_t* words, int i) {
    return load(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
  }
  // For a sense that has not been put there yet, where all was 0.
  GSPN_DEVICE void put(int sense, uint32_t minus, uint32_t centre, uint32_t plus, uint32_t input_gate,
                       uint32_t output_gate) {
    if (sense == 0) logits[0] |= minus | centre << 16, logits[1] |= plus;
    else logits[1] |= minus << 16, logits[2] |= centre | plus << 16;
    input |= input_gate << 16 * sense;
    output |= output_gate << 16 * sense;
  }
};

// Reads a site's gates of the axis of rows, [0], and of columns, [1], which were 0.
template <bool kGates, typename T>
GSPN_DEVICE void read_gates(AxisGates (&gates)[2], const Backward<T>& call, const TensorBackwardPlan& plan,
                            const TensorTile& tile, int row, int column) {
  if (plan.wide_gates) {
    const uint2* logits =
        reinterpret_cast<const uint2*>(gate_at(call.gates, 5, tile.batch, row, column, 0, tile.group));
    const uint2 a = logits[0], b = logits[1], c = logits[2];
    const uint2 input =
        *reinterpret_cast<const uint2*>(gate_at(call.input_gate, 4, tile.batch, row, column, 0, tile.group));
    gates[0] = {{a.x, a.y, b.x}, input.x, 0u};
    gates[1] = {{b.y, c.x, c.y}, input.y, 0u};
    if (!kGates) return;
  }
#pragma unroll
  for (int direction = 0; direction < 4; ++direction) {
    const int k = plan.k[direction];
    if (k < 0) continue;
    uint32_t bits[5] = {};
    if (!plan.wide_gates) {
      const T* logits = gate_at(call.gates, 5, tile.batch, row, column, k, tile.group);
#pragma unroll
      for (int n = 0; n < 3; ++n) bits[n] = logits[n * call.gates.stride[4]].bits;
      bits[3] = gate_at(call.input_gate, 4, tile.batch, row, column, k, tile.group)->bits;
    }
    if constexpr (kGates) bits[4] = gate_at(call.output_gate, 4, tile.batch, row, column, k, tile.group)->bits;
    gates[direction / 2].put(direction % 2, bits[0], bits[1], bits[2], bits[3], bits[4]);
  }
}

// Writes a site's gradients of one axis, those of the senses that run.
template <bool kGates, typename T, typename Runs>
GSPN_DEVICE void write_gates(const AxisGates& grads, const Backward<T>& call, const TensorBackwardPlan& plan,
                             const TensorTile& tile, int axis, Runs runs, int row, int column) {
  if (plan.wide_grads) {
    uint32_t* const logits =
        reinterpret_cast<uint32_t*>(gate_at(call.grad_gates, 5, tile.batch, row, column, 2 * axis, tile.group));
#pragma unroll
    for (int i = 0; i < 3; ++i) logits[i] = grads.logits[i];
    *reinterpret_cast<uint32_t*>(gate_at(call.grad_input_gate, 4, tile.batch, row, column, 2 * axis, tile.group)) =
        grads.input;
    if (!kGates) return;
  }
#pragma unroll
  for (int sense = 0; sense < 2; ++sense) {
    if (!runs(sense)) continue;
    const int k = axis ? (sense ? plan.k[kLeft] : plan.k[kRight]) : (sense ? plan.k[kUp] : plan.k[kDown]);
    const auto element = [&](const uint32_t* words, int i) { return T{uint16_t(words[i / 2] >> (i % 2 * 16))}; };
    if (!plan.wide_grads) {
      T* const logits = gate_at(call.grad_gates, 5, tile.batch, row, column, k, tile.group);
#pragma unroll
      for (int n = 0; n < 3; ++n) logits[n * call.grad_gates.stride[4]] = element(grads.logits, 3 * sense + n);
      *gate_at(call.grad_input_gate, 4, tile.batch, row, column, k, tile.group) = element(&grads.input, sense);
    }
    if constexpr (kGates)
      *gate_at(call.grad_output_gate, 4, tile.batch, row, column, k, tile.group) = element(&grads.output, sense);
  }
}

// Begins to copy what the scans of the two senses of an axis, or of one of them, need from beyond the tile: of `hidden`
// h, of `carried` carry.
template <typename Memory, typename T, typename Runs, typename Place>
GSPN_DEVICE void copy_edges(char* memory, const TileEdges<T>& hidden, const TileEdges<T>& carried, const Problem& p,
                            const TensorBackwardPlan& plan, const TensorTile& tile, const Lines<int>& map, Runs runs,
                            Place place_of_sense) {
  using Map = typename Memory::Map;
  constexpr int kUnits = Map::kUnits;
  const int channels = plan.channels, unit = threadIdx.x % kUnits;
  const bool real = unit * 8 < channels;
  const int64_t channel = tile.group * channels + (real ? unit * 8 : 0);
  const int first_line = map.line_of(tile.row, tile.column), first_position = map.position_of(tile.row, tile.column);
  const int tiles = (map.positions + kTileSites - 1) / kTileSites, at = first_position / kTileSites;
  const int line_tiles = (map.lines + kTileSites - 1) / kTileSites, line_at = first_line / kTileSites;
  for (int sense = 0; sense < 2; ++sense) {
    if (!runs(sense)) continue;
    const int k = plan.k[map.rows ? (sense ? kUp : kDown) : (sense ? kLeft : kRight)];
    char* const own = memory + place_of_sense(sense);
    const auto copy = [&](int place, const T* edges, int64_t offset, bool copies) {
      copy_async_or_zero(own + place, copies ? edges + offset + channel : edges, copies);
    };
    for (int i = threadIdx.x / kUnits; i < 2 * kTileSites; i += Memory::kThreads / kUnits) {
      // beside the tile: h on the line before each of its lines in reading order, carry of each line
      const int line = first_line + i / 2, behind = i % 2, before = line + (sense ? 1 : -1);
      const bool has_tile = real && plan.grid.linked && (behind ? at + 1 < tiles : at > 0);
      const int place = i / 2 * Memory::kSideLine + (behind * kUnits + unit) * 16;
      const auto side = [&](int line, int number) {
        return ((tile.batch * map.lines + line) * 2 * tiles + number) * p.channels;
      };
      copy(Memory::kSide + place, hidden.side[k], side(before, 2 * at + (behind ? 2 : -1)),
           has_tile && before >= 0 && before < map.lines);
      copy(Memory::kCarrySide + place, carried.side[k], side(line, 2 * at + behind), has_tile && line < map.lines);
      if (i >= kTileSites) continue;
      const auto edge = [&](int tile_of_lines) {
        return ((tile.batch * line_tiles + tile_of_lines) * map.positions + first_position + i) * p.channels;
      };
      const int from = line_at + (sense ? 1 : -1), row = Map::offset(0, i, unit);
      const bool inside = real && plan.grid.linked && first_position + i < map.positions;
      copy(Memory::kStart + row, hidden.line[k], edge(from), inside && from >= 0 && from < line_tiles);
      const bool continued = sense ? line_at > 0 : line_at + 1 < line_tiles;
      copy(Memory::kCarry + row, carried.line[k], edge(line_at), inside && continued);
    }
  }
  commit_copies();
}

// A thread's part of a tile in shared memory: a unit of every second, fourth or eighth row's site in a column.
template <int kUnits, int kThreads>
struct TileColumn {
  using Map = TileMemory<kUnits * 8>;
  static constexpr int kRows = kThreads / kUnits / kTileSites;  // rows at a time
  int unit, column, row;

  GSPN_DEVICE TileColumn()
      : unit(threadIdx.x % kUnits), column(threadIdx.x / kUnits % kTileSites), row(threadIdx.x / kUnits / kTileSites) {}
  // visit(offset in shared memory, address in a map, whether it is in the map)
  template <typename T, typename Visit>
  GSPN_DEVICE void each(const Strided<T>& t, const TensorTile& tile, int channels, Visit visit) const {
    const bool real = unit * 8 < channels && column < tile.width;
    T* place = map_at(t, tile.batch, tile.row + (row < tile.height ? row : 0), tile.column + (real ? column : 0),
                      tile.group * channels + (real ? unit * 8 : 0));
#pragma unroll
    for (int i = 0; i < kTileSites / kRows; ++i, place += kRows * t.stride[1])
      visit(Map::offset(row + i * kRows, column, unit), place, real && row + i * kRows < tile.height);
  }
};

// A tail, backward, in shared memory. What it takes has been copied to the place of dx: y, or the gradient of y where
// kGrad has that of the scans' sum already. With y, kGrad has the gradient of y before, and that of the sum after (see
// tail_backward() in cuda/tail.h). dx begins as d times the gradient of y. Every thread takes part, with its own units
// of sites; each warp's sums for the gradient of d are left in kDirectSums.
template <typename Memory, typename T, typename Column>
GSPN_DEVICE void begin_with_tail(char* memory, const Column& own, bool has_y, float inverse_channels) {
  using Map = typename Memory::Map;
  constexpr int kUnits = Map::kUnits;
  const float* const inverse_rms = reinterpret_cast<const float*>(memory + Memory::kInverseRms);
  const float* const direct = reinterpret_cast<const float*>(memory + Memory::kDirect) + own.unit * 8;
  float sums[8] = {};
  for (int row = own.row; row < kTileSites; row += Column::kRows) {
    const int at = Map::offset(row, own.column, own.unit);
    uint4* const place = reinterpret_cast<uint4*>(memory + Memory::kGradX + at);
    float x[8], grad[8], map[8];
    unpack_vector<T>(*reinterpret_cast<const uint4*>(memory + Memory::kX + at), x);
    unpack_vector<T>(*place, map);
    if (has_y) {
      uint4* const scanned = reinterpret_cast<uint4*>(memory + Memory::kGrad + at);
      unpack_vector<T>(*scanned, grad);
      float normed[8], mean = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) normed[i] = map[i] - direct[i] * x[i], mean += grad[i] * normed[i], map[i] = grad[i];
#pragma unroll
      for (int width = kUnits / 2; width >= 1; width /= 2) mean += __shfl_xor_sync(kAllLanes, mean, width);
      const float r = inverse_rms[row * kTileSites + own.column], along = r * mean * inverse_channels;
#pragma unroll
      for (int i = 0; i < 8; ++i) grad[i] = r * grad[i] - along * normed[i];
      *scanned = pack_vector<T>(grad);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] += map[i] * x[i], map[i] *= direct[i];
    *place = pack_vector<T>(map);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int width = kWarp / 2; width >= kUnits; width /= 2) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], width);
  }
  const int warp = threadIdx.x / kWarp;
  float* const of_warp = reinterpret_cast<float*>(memory + Memory::kDirectSums + warp * Memory::kChannelBytes);
  if (threadIdx.x % kWarp < kUnits) {
#pragma unroll
    for (int i = 0; i < 8; ++i) of_warp[own.unit * 8 + i] = sums[i];
  }
}

// A site's place on the lines of one axis, and its gates there.
template <typename T>
struct SiteOnAxis {
  int line, position;  // of the tile
  bool has_minus, has_plus;
  AxisGates gates;

  GSPN_DEVICE SiteOnAxis(const Lines<int>& map, const PositionEnds& on_line, int row, int column,
                         const AxisGates (&of)[2])
      : line(map.line_of(row, column)), position(map.position_of(row, column)),
        has_minus(on_line.has_minus(position)), has_plus(on_line.has_plus(position)) {
#pragma unroll
    for (int i = 0; i < 3; ++i) gates.logits[i] = map.rows ? of[0].logits[i] : of[1].logits[i];
    gates.input = map.rows ? of[0].input : of[1].input;
    gates.output = map.rows ? of[0].output : of[1].output;
  }
  GSPN_DEVICE float logit(int sense, int n) const { return AxisGates::of<T>(gates.logits, 3 * sense + n); }
  GSPN_DEVICE Weights<float> weights(int sense) const {
    return normalise(logit(sense, 0), logit(sense, 1), logit(sense, 2), float(has_minus), float(has_plus));
  }
};

// kTiled: scans may cross the borders of tiles; hidden and carried are its edges (cuda/tensor_edges.h), and carried has
// been computed without s. kGates: u is there.
template <typename T, int kUnits, bool kTiled, bool kGates>
__global__ void __launch_bounds__(BackwardMemory<kUnits, kTiled>::kThreads, 1)
    tensor_backward(const __grid_constant__ Backward<T> call, const __grid_constant__ TensorBackwardPlan plan,
                    const __grid_constant__ TileEdges<T> hidden, const __grid_constant__ TileEdges<T> carried) {
  using Memory = BackwardMemory<kUnits, kTiled>;
  using Map = typename Memory::Map;
  using Scan = TensorScan<T, kUnits, kTiled, kGates>;
  constexpr int kWarps = Memory::kWarps, kThreads = Memory::kThreads;
  constexpr int kOwnSites = kTileSites * kTileSites / kThreads;
  const Problem& p = call.problem;
  const TensorTile tile(p, plan.grid, blockIdx.x);
  char* const memory = shared_memory();
  float* const factors = reinterpret_cast<float*>(memory + Memory::kFactors);
  const int channels = plan.channels;
  const auto place_of_sense = [&](int sense) {
    return Memory::kSenses + (plan.both_senses ? sense : 0) * Memory::kSenseBytes;
  };
  const auto of_sense = [&](int sense) { return memory + place_of_sense(sense); };

  const TileColumn<kUnits, kThreads> column_of_thread;
  column_of_thread.each(call.x, tile, channels, [&](int at, const T* from, bool real) {
    copy_async_or_zero(memory + Memory::kX + at, real ? from : call.x.data, real);
  });
  if (call.tail.direct) {
    for (int i = threadIdx.x; i < kTileSites * kTileSites && call.tail.y.data; i += kThreads) {
      const int row = i / kTileSites, column = i % kTileSites;
      float* const to = reinterpret_cast<float*>(memory + Memory::kInverseRms) + i;
      const int64_t token = (tile.batch * p.height + tile.row + row) * p.width + tile.column + column;
      if (tile.has(row, column)) copy_async<4>(to, call.tail.inverse_rms + token * p.groups + tile.group);
      else *to = 0.f;
    }
    for (int c = threadIdx.x; c < kUnits * 8; c += kThreads)
      reinterpret_cast<float*>(memory + Memory::kDirect)[c] =
          c < channels ? call.tail.direct[tile.group * channels + c] : 0.f;
  }
  commit_copies();
  column_of_thread.each(call.grad_y, tile, channels, [&](int at, const T* from, bool real) {
    copy_async_or_zero(memory + Memory::kGrad + at, real ? from : call.grad_y.data, real);
    // what dx begins as, also beyond the map, where a NaN would spread
    if (!call.tail.direct) *reinterpret_cast<uint4*>(memory + Memory::kGradX + at) = uint4{0u, 0u, 0u, 0u};
  });
  if (call.tail.direct) {
    const Strided<const T>& map = call.tail.y.data ? call.tail.y : call.tail.grad_y;
    column_of_thread.each(map, tile, channels, [&](int at, const T* from, bool real) {
      copy_async_or_zero(memory + Memory::kGradX + at, real ? from : map.data, real);
    });
  }
  commit_copies();
  // A thread has whole sites of the tile.
  AxisGates site_gates[kOwnSites][2] = {};
  Weights<float> site_weights[kOwnSites][2];  // in the two senses of the axis
  const auto each_site = [&](auto visit) {
#pragma unroll
    for (int j = 0; j < kOwnSites; ++j) {
      const int site = threadIdx.x + j * kThreads;
      visit(site / kTileSites, site % kTileSites, j);
    }
  };
  each_site([&](int row, int column, int j) {
    if (!tile.has(row, column)) return;
    read_gates<kGates>(site_gates[j], call, plan, tile, tile.row + row, tile.column + column);
  });
  for (unsigned i = threadIdx.x; i < 4 * 2 * kUnits * 8; i += kThreads) {
    const int direction = i / (2 * kUnits * 8), which = i / (kUnits * 8) % 2, c = i % (kUnits * 8);
    if (c < channels)
      factors[i] = of_channel(which ? call.scale : call.decay, p, max(plan.k[direction], 0), tile.group * channels + c);
  }
  for (int sense = 0; sense < (plan.both_senses ? 2 : 1); ++sense) {
    Records::write_zeros(of_sense(sense) + Memory::kForward, kTileSites);
    Records::write_zeros(of_sense(sense) + Memory::kAdjoint, kTileSites);
  }

  const FragmentLane fragment(threadIdx.x % kWarp);
  const int warp = threadIdx.x / kWarp % kWarps, sense_of_warp = threadIdx.x / kWarp / kWarps;
  bool first = true;  // whether no direction has run yet
#pragma unroll 1
  for (int pass = 0; pass < (plan.both_senses ? 2 : 4); ++pass) {
    const int axis = plan.both_senses ? pass : pass / 2;
    const bool rows = axis == 0;
    const auto runs = [&](int sense) {
      return (plan.both_senses || sense == pass % 2) &&
             (rows ? (sense ? plan.k[kUp] : plan.k[kDown]) : (sense ? plan.k[kLeft] : plan.k[kRight])) >= 0;
    };
    if (!runs(0) && !runs(1)) continue;
    const Lines<int> lines(p, rows);
    const int first_line = lines.line_of(tile.row, tile.column);
    if constexpr (kTiled) copy_edges<Memory>(memory, hidden, carried, p, plan, tile, lines, runs, place_of_sense);
    const Continues continues[2] = {Continues(lines, first_line, false), Continues(lines, first_line, true)};
    const PositionEnds on_line(lines, lines.position_of(tile.row, tile.column));

    each_site([&](int row, int column, int j) {
      const SiteOnAxis<T> site(lines, on_line, row, column, site_gates[j]);
#pragma unroll
      for (int sense = 0; sense < 2; ++sense) {
        if (!runs(sense)) continue;
        char* const own = of_sense(sense);
        site_weights[j][sense] = site.weights(sense);
        const bool has_row = tile.has(row, column) && continues[sense].at(site.line);
        const Weights<float> d = has_row ? differences(site_weights[j][sense]) : Weights<float>{0.f, 0.f, 0.f};
        Records::write(Records::piece(own + Memory::kForward, site.line), site.position, d);
        Records::write_transposed(Records::piece(own + Memory::kAdjoint, site.line), site.position, d);
        const auto write_word = [&](int which, uint32_t words) {
          Words::write(reinterpret_cast<uint32_t*>(own + which) + site.line * Words::kPieceWords, site.position,
                       T{uint16_t(words >> 16 * sense)});
        };
        write_word(Memory::kInput, site.gates.input);
        if constexpr (kGates) write_word(Memory::kOutput, site.gates.output);
      }
    });
    if (kTiled) wait_copies_but<0>();
    else if (first) wait_copies_but<1>();  // x
    __syncthreads();

    const int sense = (plan.both_senses ? sense_of_warp : pass) % 2, direction = 2 * axis + sense;
    const bool scans = warp * kWarpRows < channels && sense_of_warp < (plan.both_senses ? 2 : 1) && runs(sense);
    Continues goes_on = continues[0];
    if (sense) goes_on.restarts = continues[1].restarts;
    const int k = rows ? (sense ? plan.k[kUp] : plan.k[kDown]) : (sense ? plan.k[kLeft] : plan.k[kRight]);
    const float* const decays = factors + direction * 2 * kUnits * 8 + warp * kWarpRows;
    const float* const scales = decays + kUnits * 8;
    const float decay[2] = {decays[fragment.channel], decays[fragment.channel + 8]};
    const float scale[2] = {scales[fragment.channel], scales[fragment.channel + 8]};
    const FactorPairs<T> decay_pairs(decays, fragment), scale_pairs(scales, fragment);
    const Scan scan(memory, place_of_sense(sense), fragment, goes_on, rows, sense,
                    lines.line_of(tile.height, tile.width), warp, decay, scale, decay_pairs, scale_pairs);
    const bool restarts = scan.restarts();
    if (scans) restarts ? scan.template forward<true>() : scan.template forward<false>();
    if (first) {
      wait_copies_but<0>();  // dy, and what the tail takes
      if (call.tail.direct)
        begin_with_tail<Memory, T>(memory, column_of_thread, call.tail.y.data != nullptr, reciprocal(float(channels)));
      __syncthreads();
      if (call.tail.direct && threadIdx.x < channels) {
        float sum = 0.f;
        for (int w = 0; w < kThreads / kWarp; ++w)
          sum += reinterpret_cast<const float*>(memory + Memory::kDirectSums)[w * kUnits * 8 + threadIdx.x];
        call.tail.grad_direct[tile.number * p.channels + tile.group * channels + threadIdx.x] = sum;
      }
    }
    // Two senses meet in the middle, and go on after a barrier, so that one at a time adds to a line's dx. Both scans
    // go back, so down reads the last lines first.
    float carry[2][4] = {};
    if (kTiled && scans) scan.load_edge(carry, Memory::kCarry);
    FactorProducts products = {};
    int from = sense ? 0 : scan.lines - 1, count = sense ? scan.lines / 2 : scan.lines - scan.lines / 2;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (scans && restarts) scan.template back<true>(from, count, carry, products);
      if (scans && !restarts) scan.template back<false>(from, count, carry, products);
      __syncthreads();
      from += sense ? count : -count, count = scan.lines - count;
    }
    if (scans) {
      const int64_t row = int64_t(tile.number) * p.num_directions + k;
      const int64_t first_channel = row * p.channels + tile.group * channels + warp * kWarpRows;
      scan.write(call.grad_decay, call.grad_scale, first_channel, products);
    }

    each_site([&](int row, int column, int j) {
      if (!tile.has(row, column)) return;
      const SiteOnAxis<T> site(lines, on_line, row, column, site_gates[j]);
      AxisGates grads = {};
#pragma unroll
      for (int sense = 0; sense < 2; ++sense) {
        if (!runs(sense)) continue;
        const bool odd = site.position % 2;
        float sums[4] = {}, input = 0.f, output = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          if (w == 3 && channels == 48) break;  // a warp without channels
          const int at = Map::offset(row, column, 2 * w);
          const char* const from = of_sense(sense) + Memory::kHidden;
          float of_warp[4];
          load_vector(reinterpret_cast<const float*>(from + at), of_warp);
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[i] += of_warp[i];
          const float* const others = reinterpret_cast<const float*>(from + (at ^ 16));
          input += others[Scan::input_sum(odd)];
          if constexpr (kGates) output += others[Scan::output_sum(odd)];
        }
        Weights<float> grad{0.f, 0.f, 0.f};
        if (continues[sense].at(site.line)) {
          // what lies beyond the map has not been written
          const Weights<float> of_weights{site.has_minus ? (odd ? sums[0] : sums[1]) : 0.f, odd ? sums[1] : sums[2],
                                          site.has_plus ? (odd ? sums[2] : sums[3]) : 0.f};
          grad = normalise_backward(site.logit(sense, 0), site.logit(sense, 1), site.logit(sense, 2),
                                    site_weights[j][sense], of_weights);
        }
        grads.put(sense, bits_of<T>(grad.minus), bits_of<T>(grad.centre), bits_of<T>(grad.plus), bits_of<T>(input),
                  bits_of<T>(output));
      }
      write_gates<kGates>(grads, call, plan, tile, axis, runs, tile.row + row, tile.column + column);
    });
    first = false;
  }

  column_of_thread.each(call.grad_x, tile, channels, [&](int at, T* to, bool real) {
    if (real) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(memory + Memory::kGradX + at);
  });
}

}  // namespace gspn
