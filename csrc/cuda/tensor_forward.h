// Forward on tensor cores: a block has the channels of a group on a tile of up to 16 × 16 sites, a warp 16 of them.
//
// x is read once into shared memory, and every direction's weights are prepared there. Then every warp scans rows and
// after them columns, both senses of an axis at once: while one is at line i, the other is at line 15 - i, two chains
// of products that do not wait for each other. The sum of both is in registers; the rows' sum waits in shared memory,
// in the element type, for the columns to begin with.
#pragma once

#include "cuda/tensor_edges.h"

namespace gspn {

enum class TensorMode {
  kWhole,           // no scan crosses a tile's border, u = 1
  kTiled,           // u = 1
  kTiledWithGates,  // any u, and any map
};

struct TensorPlan {
  int channels;  // of a group
  bool packed;   // gates_are_packed()
  TileGrid grid;
  bool scans_axis[2];  // whether directions have rows for lines, and whether they have columns
};

// Shared memory of a block. kUnits: TileMemory<>::kUnits of the group's channels.
template <int kUnits, TensorMode kMode>
struct ForwardMemory {
  using Map = TileMemory<kUnits * 8>;
  static constexpr bool kTiled = kMode != TensorMode::kWhole, kGates = kMode == TensorMode::kTiledWithGates;
  static constexpr int kThreads = kTileSites * kUnits;
  static constexpr int kWordBytes = 4 * kTileSites * Words::kPieceWords * 4;  // of four directions
  static constexpr int kLineBytes = kUnits * 16;                              // of a site
  // bytes from the start
  static constexpr int kX = 0, kY = kX + Map::kBytes, kRecords = kY + Map::kBytes;
  static constexpr int kInputGate = kRecords + Records::bytes(4 * kTileSites);
  static constexpr int kOutputGate = kInputGate + kWordBytes;
  static constexpr int kFactors = kOutputGate + (kGates ? kWordBytes : 0);  // [direction][decay, scale][channel]
  static constexpr int kTile = kFactors + 4 * 2 * kUnits * 8 * 4;  // the block's TensorTile
  static constexpr int kBorders = kTile + 32;                      // TileBorders of rows, and of columns
  static constexpr int kSide = kBorders + 16;                      // [direction][step][before, behind][channel]
  // [direction][position][channel]
  static constexpr int kLine = kSide + (kTiled ? 4 * kTileSites * 2 * kLineBytes : 0);
  static constexpr int kBytes = kLine + (kTiled ? 4 * kTileSites * kLineBytes : 0);
};

// What a tile's scans of one axis have to know of chunks and windows, as bits of borders().
struct TileBorders {
  uint32_t lines, positions;

  static GSPN_DEVICE TileBorders of(const Problem& p, const TensorTile& tile, bool rows) {
    const Lines<int> map(p, rows);
    return {borders(map.chunks, map.line_of(tile.row, tile.column)),
            borders(map.windows, map.position_of(tile.row, tile.column))};
  }
  // Whether a scan goes on at a line, or restarts there.
  GSPN_DEVICE bool goes_on(int line, bool reversed) const { return !(lines >> (line + reversed) & 1); }
  GSPN_DEVICE bool has_minus(int position) const { return !(positions >> position & 1); }
  GSPN_DEVICE bool has_plus(int position) const { return !(positions >> (position + 1) & 1); }
};

// The k-th direction's place in shared memory is its number among gspn::Direction.
GSPN_DEVICE Lines<int> lines_of(const Problem& p, int direction) { return Lines<int>(p, lines_are_rows(direction)); }

// Reads and prepares the gates of the tile's sites. Ends without a barrier.
template <typename Memory, typename T>
GSPN_DEVICE void prepare_gates(char* memory, const Forward<T>& call, const TensorTile& tile, const TensorPlan& plan,
                               const TileBorders& on_rows, const TileBorders& on_columns) {
  constexpr int kUnits = Memory::kThreads / kTileSites;
  const Problem& p = call.problem;
  char* const records = memory + Memory::kRecords;
  uint32_t* const input_gates = reinterpret_cast<uint32_t*>(memory + Memory::kInputGate);
  uint32_t* const output_gates = reinterpret_cast<uint32_t*>(memory + Memory::kOutputGate);
  const int column = threadIdx.x % kTileSites;
  for (int first = threadIdx.x / kTileSites; first < kTileSites; first += 2 * kUnits) {
    SiteGates<T> gates[2] = {};  // of two sites at a time, so that one does not wait for the other
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = first + n * kUnits;
      if (!tile.has(row, column)) continue;
      if (plan.packed) gates[n].template read<true>(call, tile.batch, tile.row + row, tile.column + column, tile.group);
      else gates[n].template read<false>(call, tile.batch, tile.row + row, tile.column + column, tile.group);
    }
    // Without branches, so that directions and sites are computed side by side: what a line that restarts, a site
    // beyond the map, or a direction that the call has not would have is computed and dropped.
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int row = first + n * kUnits;
      const bool real = tile.has(row, column);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int direction = p.directions[k];
        const Lines<int> map = lines_of(p, direction);
        const int line = map.line_of(row, column), position = map.position_of(row, column);
        const TileBorders has{map.rows ? on_rows.lines : on_columns.lines,
                              map.rows ? on_rows.positions : on_columns.positions};
        const Weights<float> w = normalise(load(gates[n].logits[k][0]), load(gates[n].logits[k][1]),
                                           load(gates[n].logits[k][2]), float(has.has_minus(position)),
                                           float(has.has_plus(position)));
        const Weights<float> any = differences(w);
        const bool goes_on = real && has.goes_on(line, is_reversed(direction));
        const Weights<float> d{goes_on ? any.minus : 0.f, goes_on ? any.centre : 0.f, goes_on ? any.plus : 0.f};
        const int piece = direction * kTileSites + line;
        if (k < p.num_directions) {
          Records::write(Records::piece(records, piece), position, d);
          Words::write(input_gates + piece * Words::kPieceWords, position, gates[n].input_gate[k]);
        }
        if constexpr (Memory::kGates) {
          if (k >= p.num_directions) continue;
          T u;
          store(u, 1.f);
          if (real && call.output_gate.data)
            u = *gate_at(call.output_gate, 4, tile.batch, tile.row + row, tile.column + column, k, tile.group);
          Words::write(output_gates + piece * Words::kPieceWords, position, u);
        }
      }
    }
  }
}

// Starts to copy what the tile's scans need from beyond it.
template <typename Memory, typename T>
GSPN_DEVICE void copy_edges(char* memory, const TileEdges<T>& edges, const Problem& p, const TensorTile& tile,
                            const TensorPlan& plan) {
  constexpr int kUnits = Memory::kThreads / kTileSites;
  const int unit = threadIdx.x % kUnits, n = threadIdx.x / kUnits;  // n: a step, or a position
  const int channel = tile.group * plan.channels + unit * 8;
  const bool real = unit * 8 < plan.channels;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k >= p.num_directions) break;
    const int direction = p.directions[k];
    const bool reversed = is_reversed(direction);
    const Lines<int> map = lines_of(p, direction);
    const int first_line = map.line_of(tile.row, tile.column), first_position = map.position_of(tile.row, tile.column);
    const int tiles = (map.positions + kTileSites - 1) / kTileSites, at = first_position / kTileSites;
    // h of the line before the n-th one that is read, beside the tile
    const int line = nth_read(first_line, kTileSites, n - 1, reversed);
    const T* const side = edges.side[k] + (tile.batch * map.lines + line) * 2 * tiles * p.channels + channel;
    char* const to = memory + Memory::kSide + ((direction * kTileSites + n) * 2 * kUnits + unit) * 16;
    const bool in_map = real && plan.grid.linked && line >= 0 && line < map.lines;
    const bool before = in_map && at > 0, behind = in_map && at + 1 < tiles;
    copy_async_or_zero(to, before ? side + (2 * at - 1) * p.channels : edges.side[k], before);
    copy_async_or_zero(to + kUnits * 16, behind ? side + (2 * at + 2) * p.channels : edges.side[k], behind);
    // h of the line before the first one that is read
    const int line_tiles = (map.lines + kTileSites - 1) / kTileSites;
    const int from = first_line / kTileSites + (reversed ? 1 : -1);
    const bool goes_on =
        real && plan.grid.linked && from >= 0 && from < line_tiles && first_position + n < map.positions;
    const T* const edge = edges.line[k] + channel +
                          ((tile.batch * line_tiles + from) * map.positions + first_position + n) * p.channels;
    copy_async_or_zero(memory + Memory::kLine + ((direction * kTileSites + n) * kUnits + unit) * 16,
                       goes_on ? edge : edges.line[k], goes_on);
  }
}

// A thread's part of a tile's sites, between shared and global memory: 16 bytes of every site of a column.
template <int kUnits>
struct ThreadColumn {
  int unit, column, channel;
  bool real;  // whether the map has it

  GSPN_DEVICE ThreadColumn(const TensorTile& tile, const TensorPlan& plan)
      : unit(threadIdx.x % kUnits), column(threadIdx.x / kUnits), channel(tile.group * plan.channels + unit * 8),
        real(unit * 8 < plan.channels && column < tile.width) {}
  template <typename T>
  GSPN_DEVICE T* at(const Strided<T>& map, const TensorTile& tile) const {
    return real ? map_at(map, tile.batch, tile.row, tile.column + column, channel) : map.data;
  }
};

// Starts to copy x of the tile; what lies beyond the map becomes 0.
template <typename Memory, typename T>
GSPN_DEVICE void read_tile(char* memory, const Forward<T>& call, const TensorTile& tile, const TensorPlan& plan) {
  using Map = typename Memory::Map;
  const ThreadColumn<Map::kUnits> own(tile, plan);
  const T* from = own.at(call.x, tile);
#pragma unroll 4
  for (int row = 0; row < kTileSites; ++row) {
    const bool real = own.real && row < tile.height;
    copy_async_or_zero(memory + Memory::kX + Map::offset(row, own.column, own.unit), real ? from : call.x.data, real);
    from += call.x.stride[1];
  }
}

// Writes the tile's y, after the tail if the call has one.
template <typename Memory, typename T>
GSPN_DEVICE void write_tile(const char* memory, const Forward<T>& call, const TensorTile& tile,
                            const TensorPlan& plan) {
  using Map = typename Memory::Map;
  const Problem& p = call.problem;
  const ThreadColumn<Map::kUnits> own(tile, plan);
  const float inverse_channels = 1.f / float(plan.channels);
  float direct[8] = {};
  if (call.direct && own.real) {
#pragma unroll
    for (int i = 0; i < 8; ++i) direct[i] = call.direct[own.channel + i];
  }
  T* to = own.at(call.y, tile);
  float* inverse_rms = call.inverse_rms;
  if (call.direct)
    inverse_rms += ((tile.batch * p.height + tile.row) * p.width + tile.column + own.column) * p.groups + tile.group;
  for (int row = 0; row < tile.height; ++row) {
    const int offset = Map::offset(row, own.column, own.unit);
    uint4 words = *reinterpret_cast<const uint4*>(memory + Memory::kY + offset);
    if (call.direct) {
      float v[8], x[8], squares = 0.f;
      unpack_vector<T>(words, v);
      unpack_vector<T>(*reinterpret_cast<const uint4*>(memory + Memory::kX + offset), x);
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += v[i] * v[i];
      if (!own.real) squares = 0.f;
#pragma unroll
      for (int width = Map::kUnits / 2; width >= 1; width /= 2) squares += __shfl_xor_sync(kAllLanes, squares, width);
      const float inverse = inverse_root(squares * inverse_channels + kTailEpsilon);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = v[i] * inverse + direct[i] * x[i];
      words = pack_vector<T>(v);
      if (own.real && own.unit == 0) *inverse_rms = inverse;
      inverse_rms += p.width * p.groups;
    }
    if (own.real) *reinterpret_cast<uint4*>(to) = words;
    to += call.y.stride[1];
  }
}

// A piece of 16-bit elements as accumulators, and back.
template <typename T>
GSPN_DEVICE void unpack_piece(const uint32_t (&r)[4], float (&v)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack(T(), r[i], v[i / 2] + i % 2 * 2);
}
template <typename T>
GSPN_DEVICE void pack_piece(const float (&v)[2][4], uint32_t (&r)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) r[i] = pack<T>(v[i / 2] + i % 2 * 2);
}

// One of the two scans of an axis, in a warp.
struct SenseScan {
  float h[2][4], decay[2], scale[2];

  GSPN_DEVICE SenseScan(const float* factors, int pitch) : h() {
#pragma unroll
    for (int i = 0; i < 2; ++i) decay[i] = factors[i * 8], scale[i] = factors[pitch + i * 8];
  }
};

template <typename T, int kUnits, TensorMode kMode>
__global__ void __launch_bounds__(16 * kUnits, 16 / kUnits)
    tensor_forward(const __grid_constant__ Forward<T> call, const __grid_constant__ TileEdges<T> edges,
                   const __grid_constant__ TensorPlan plan) {
  using Memory = ForwardMemory<kUnits, kMode>;
  using Map = typename Memory::Map;
  const Problem& p = call.problem;
  const int thread = threadIdx.x;
  char* const memory = shared_memory();
  float* const factors = reinterpret_cast<float*>(memory + Memory::kFactors);

  {
    const TensorTile tile(p, plan.grid, blockIdx.x);
    if (p.num_directions < 4) {  // what stands for directions that the call has not
      for (int i = thread; i < (Memory::kBytes - Memory::kRecords) / 4; i += Memory::kThreads)
        reinterpret_cast<float*>(memory + Memory::kRecords)[i] = 0.f;
      __syncthreads();
    }
    read_tile<Memory>(memory, call, tile, plan);
    for (int i = thread; i < Map::kBytes / 16; i += Memory::kThreads)
      reinterpret_cast<float4*>(memory + Memory::kY)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if constexpr (Memory::kTiled) copy_edges<Memory>(memory, edges, p, tile, plan);
    Records::write_zeros(memory + Memory::kRecords, 4 * kTileSites);
    for (int k = 0; k < p.num_directions; ++k) {
      for (int c = thread; c < 2 * plan.channels; c += Memory::kThreads) {
        const int which = c >= plan.channels, channel = c - which * plan.channels;
        const float* const from = which ? call.scale : call.decay;
        float* const to = factors + (p.directions[k] * 2 + which) * kUnits * 8 + channel;
        if (from) copy_async<4>(to, from + k * p.channels + tile.group * plan.channels + channel);
        else *to = 1.f;
      }
    }
    const TileBorders on_rows = TileBorders::of(p, tile, true), on_columns = TileBorders::of(p, tile, false);
    prepare_gates<Memory>(memory, call, tile, plan, on_rows, on_columns);
    // all that is needed of the tile from here on, without registers
    if (thread == 0) {
      *reinterpret_cast<TensorTile*>(memory + Memory::kTile) = tile;
      TileBorders* const both = reinterpret_cast<TileBorders*>(memory + Memory::kBorders);
      both[0] = on_rows, both[1] = on_columns;
    }
  }
  wait_copies();
  __syncthreads();

  const TensorTile& tile = *reinterpret_cast<const TensorTile*>(memory + Memory::kTile);
  const bool scans = thread / kWarp * kWarpRows < plan.channels;
#pragma unroll 1
  for (int axis = scans ? 0 : 2; axis < 2; ++axis) {
    const bool rows = axis == 0;
    if (!plan.scans_axis[axis]) continue;
    const int own = recomputed(threadIdx.x), warp = own / kWarp, lane = own % kWarp;
    const FragmentLane at(lane);
    const TileBorders borders = reinterpret_cast<const TileBorders*>(memory + Memory::kBorders)[axis];
    int along = axis, in_line = Map::position_offset(rows, Map::matrix_position(lane), Map::matrix_unit(lane, warp));
    // The second sense reads a piece's halves in the other order: else ptxas sees that both senses read the same, and
    // keeps it in registers from one to the other.
    const int swap = Map::position_offset(rows, 8, 0);
    const auto site = [&](int line, int exchange) {
      return Map::line_offset(along == 0, line) + (in_line ^ Map::line_exchange(along == 0, line) ^ exchange);
    };
    const char* const records = Records::piece(memory + Memory::kRecords, 2 * axis * kTileSites);
    const uint32_t* const input_gates =
        reinterpret_cast<const uint32_t*>(memory + Memory::kInputGate) + 2 * axis * kTileSites * Words::kPieceWords;
    const float* const lane_factors = factors + 2 * axis * 2 * kUnits * 8 + warp * kWarpRows + at.channel;
    SenseScan scan[2] = {{lane_factors, kUnits * 8}, {lane_factors + 2 * kUnits * 8, kUnits * 8}};
    __syncwarp();
    float sum[kTileSites][2][4];
    if constexpr (Memory::kTiled) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        uint32_t r[4];
        load_matrices<true>(r, memory + Memory::kLine +
                                   (((2 * axis + s) * kTileSites + Map::matrix_position(lane)) * kUnits +
                                    Map::matrix_unit(lane, warp)) * 16);
        unpack_piece<T>(r, scan[s].h);
      }
    }
    // Of the values beside the n-th step's lines a lane reads, for matrix m of channels 8 m % 16 … of sense m / 2, the
    // ones behind the tile in rows 0 and 1, which lanes with t = 0 get, and the ones before it in the others.
    const int in_sides = (2 * axis + lane / 16) * kTileSites * 2 + (lane % 8 < 2);
    const char* const side = memory + Memory::kSide + (in_sides * kUnits + Map::matrix_unit(lane, warp)) * 16;

    float driven[2][2][4];  // λx and the weights of the line that either sense reads next
    LineOperands<2> d[2];
    const auto read_lines = [&](int n) {
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int line = s ? kTileSites - 1 - n : n;
        uint32_t r[4];
        load_matrices<true>(r, memory + Memory::kX + site(line, s ? swap : 0));
        const uint32_t x[4] = {r[s ? 2 : 0], r[s ? 3 : 1], r[s ? 0 : 2], r[s ? 1 : 3]};
        drive<T>(driven[s], x, Words::of_diagonal(input_gates + (s * kTileSites + line) * Words::kPieceWords, at), at);
        d[s].load(records + (s * kTileSites + line) * Records::kPieceBytes, at);
      }
    };
    read_lines(0);
#pragma unroll
    for (int n = 0; n < kTileSites; ++n) {
      // offsets of lines have no registers until the other sense comes to them
      if (n == kTileSites / 2) in_line = recomputed(in_line), along = recomputed(along);
      uint32_t beside_words[4];
      if constexpr (Memory::kTiled) load_matrices<true>(beside_words, side + n * 2 * kUnits * 16);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const bool goes_on = borders.goes_on(s ? kTileSites - 1 - n : n, s);
        const float factor[2] = {goes_on ? scan[s].decay[0] : 0.f, goes_on ? scan[s].decay[1] : 0.f};
        if constexpr (Memory::kTiled) {
          Beside beside;
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float both[2];
            unpack(T(), beside_words[2 * s + i], both);
            beside.value[i] = factor[i] * both[1];
          }
          advance_parts(scan[s].h, driven[s], factor, d[s], beside);
        } else {
          advance_parts(scan[s].h, driven[s], factor, d[s], NothingBeside());
        }
      }
      if (n + 1 < kTileSites) read_lines(n + 1);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const int line = s ? kTileSites - 1 - n : n;
        const bool begins = n < kTileSites / 2;
        uint32_t r[4];
        if (begins) {  // with the other axis' sum, or 0
          load_matrices<true>(r, memory + Memory::kY + site(line, 0));
          unpack_piece<T>(r, sum[line]);
        }
        float factor[2][4];
#pragma unroll
        for (int i = 0; i < 8; ++i) factor[i / 4][i % 4] = scan[s].scale[i / 2 % 2];
        if constexpr (Memory::kGates) {
          float u[2][2];
          Words::of_columns<T>(reinterpret_cast<const uint32_t*>(memory + Memory::kOutputGate) +
                                   ((2 * axis + s) * kTileSites + line) * Words::kPieceWords,
                               at, u);
#pragma unroll
          for (int i = 0; i < 8; ++i) factor[i / 4][i % 4] *= u[i / 4][i % 2];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[line][i / 4][i % 4] += factor[i / 4][i % 4] * scan[s].h[i / 4][i % 4];
        if (!begins) {
          pack_piece<T>(sum[line], r);
          store_matrices<true>(memory + Memory::kY + site(line, 0), r);
        }
      }
    }
  }
  __syncthreads();

  write_tile<Memory>(memory, call, tile, plan);
}

}  // namespace gspn
