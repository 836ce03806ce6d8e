// Maps larger than a tile of tensor-core kernels: a pass before them that scans whole lines, all directions at once, and
// writes only what the tiles need from each other. Forward that is h at the tiles' borders, backward what the gradient of
// h carries across them.
//
// A block has some channels of a group and some whole chunks of one direction. A warp has 16 channels of up to 64
// positions in registers (tensor_line.h); longer lines have warps side by side, which exchange the values at their ends
// through shared memory. Lines are read a stage at a time, the next stage while this one is scanned; what a scan computes
// takes the place of what it has read, so that 16-byte accesses carry it from there to memory.
#pragma once

#include "cuda/kernel.h"
#include "cuda/tensor_line.h"

namespace gspn {

// What a scan of a tile needs from beyond it, for every direction k; `tiles` count from the map's first, in map order.
// Forward:
//   line[k]: (B, tiles along the lines, positions, C): h on the line that k reads last in a tile;
//   side[k]: (B, lines, 2 tiles along the positions, C): h at the first and the last position of a tile.
// Backward, with dh the gradient of h and W its line's weights:
//   line[k]: of the same shape, what the tile read next adds to dh there: W^T dh of its first line. It is 0 where no line
//            follows, and where the next one starts a chunk;
//   side[k]: of the same shape, what a line's dh carries into a tile from beside it, to its first and to its last
//            position on the line before: w+ dh of the position before it, and w- dh of the one behind it.
template <typename T>
struct TileEdges {
  T *line[4], *side[4];
};

// Where the edges of a call's tiles lie in scratch: elements from its begin.
struct TileEdgeLayout {
  int64_t line[4], side[4], elements = 0;

  GSPN_INLINE explicit TileEdgeLayout(const Problem& p) {
    for (int k = 0; k < p.num_directions; ++k) {
      const Lines<int64_t> map(p, lines_are_rows(p.directions[k]));
      line[k] = elements;
      elements += p.batch * tiles(map.lines) * map.positions * p.channels;
      side[k] = elements;
      elements += p.batch * map.lines * 2 * tiles(map.positions) * p.channels;
    }
  }
  static GSPN_INLINE int64_t tiles(int64_t n) { return (n + kTileSites - 1) / kTileSites; }

  template <typename T>
  TileEdges<T> at(T* scratch, const Problem& p) const {
    TileEdges<T> edges{};
    for (int k = 0; k < p.num_directions; ++k) edges.line[k] = scratch + line[k], edges.side[k] = scratch + side[k];
    return edges;
  }
};

// What the host decides for a launch, whose directions have the same axis, or lines of the same length.
struct TileEdgePlan {
  int slab;             // channels of a block: 16 for each warp of those side by side
  int warps;            // along a line
  int stage;            // lines: one or two where a line has several warps
  int run;              // lines of a block: whole chunks
  int directions, k[4];
  struct {
    int positions, site_bytes, stage_bytes;  // of a line with its padding; of a position; of a stage's lines
    int records, record_bytes, words, block, ends;  // where the records of a stage lie, how long they are, and so on
    int bytes;
  } memory;  // a block's shared memory

  // Lays out `memory`, for lines of `warps` times `parts` parts.
  void lay_out(int parts);
  GSPN_INLINE int warps_across() const { return slab / kWarpRows; }
  GSPN_INLINE int threads() const { return kWarp * warps * warps_across(); }
};

// Runs of `run` lines, which begin where chunks do.
template <typename Int>
GSPN_INLINE Int runs_of(const Lines<Int>& map, int run) {
  return (map.lines + map.chunks.missing + run - 1) / run;
}

// What a block scans: a run of lines in one direction. It lies in shared memory, because scans leave no registers for it.
struct TileEdgeBlock : ScanOrder<int> {
  int k, first_channel, group, first_line, length;
  int64_t batch;

  GSPN_DEVICE TileEdgeBlock(const Problem& p, const TileEdgePlan& plan, unsigned block)
      // neighbouring blocks have different directions, which read the same map: it is in the cache
      : ScanOrder<int>(p, p.directions[plan.k[block % unsigned(plan.directions)]]),
        k(plan.k[block % unsigned(plan.directions)]) {
    block /= unsigned(plan.directions);
    const unsigned slabs = unsigned(p.channels) / plan.slab, runs = runs_of(*this, plan.run);
    first_channel = int(block % slabs) * plan.slab;
    group = first_channel / int(p.channels / p.groups);
    block /= slabs;
    const int next_run = int(block % runs + 1) * plan.run - chunks.missing;
    first_line = max(next_run - plan.run, 0);
    length = min(next_run, lines) - first_line;
    batch = block / runs;
  }
};

inline void TileEdgePlan::lay_out(int parts) {
  memory.positions = warps * parts * kPart;
  memory.site_bytes = slab * 2;
  memory.stage_bytes = stage * memory.positions * memory.site_bytes;
  memory.records = 2 * memory.stage_bytes;
  memory.record_bytes = Records::bytes(stage * memory.positions / kPiece);
  memory.words = memory.records + 2 * memory.record_bytes;
  memory.block = memory.words + stage * memory.positions * int(sizeof(uint32_t));
  memory.ends = memory.block + int(sizeof(TileEdgeBlock));
  memory.bytes = memory.ends + (warps > 1 ? 2 * warps * 2 * slab * int(sizeof(float)) : 0);
}

// What a position's units of 16 bytes are exchanged with, so that one unit of 8 neighbouring positions lies in
// different banks.
GSPN_DEVICE int unit_exchange(int units, int position) {
  return units == 8 ? position & 7 : units == 4 ? position / 2 & 3 : position / 4 & 1;
}

// Most threads of a block: its warps have half or a quarter of the registers to themselves.
template <bool kSplit>
constexpr int kTileEdgeThreads = kSplit ? 512 : 128;

// Call: Forward, for h, or Backward, for its gradient, in the reverse order. kParts of a line are one warp's. kSplit: a
// line has several warps.
template <typename Call, int kParts, bool kSplit>
__global__ void __launch_bounds__(kTileEdgeThreads<kSplit>)
    tensor_edges(const __grid_constant__ Call call, const __grid_constant__ TileEdgePlan plan,
                 const __grid_constant__ TileEdges<typename Call::Element> edges) {
  using T = typename Call::Element;
  constexpr bool kAdjoint = Call::kIsBackward;
  constexpr int kPieces = kParts / 2, kSitesOfAThread = kParts / 4;
  const Problem& p = call.problem;
  const auto& memory = plan.memory;
  char* const shared = shared_memory();
  const TileEdgeBlock& scan = *reinterpret_cast<const TileEdgeBlock*>(shared + memory.block);
  if (threadIdx.x == 0) *reinterpret_cast<TileEdgeBlock*>(shared + memory.block) = TileEdgeBlock(p, plan, blockIdx.x);
  __syncthreads();
  // the i-th line that is visited
  const auto line_at = [&](int i) { return nth_read(scan.first_line, scan.length, i, scan.reversed != kAdjoint); };

  const int tid = threadIdx.x, lane = tid % kWarp, across = tid / kWarp % plan.warps_across();
  const int along = tid / kWarp / plan.warps_across();  // the warp's place along the line
  const FragmentLane at(lane);
  char* const records = shared + memory.records;
  uint32_t* const words = reinterpret_cast<uint32_t*>(shared + memory.words);
  const int line_pieces = plan.warps * kPieces, stage_sites = plan.stage * memory.positions;
  Records::write_zeros(records, stage_sites / kPiece);
  if (kAdjoint) Records::write_zeros(records + memory.record_bytes, stage_sites / kPiece);

  // A thread has one unit of 16 bytes of every `step`-th position.
  const int units = plan.slab / 8, unit = tid % units, step = kPiece * plan.warps, own = tid / units;

  // The map that is read: x, or dy. Its gate: λ, or u.
  const auto& map = [&]() -> const auto& {
    if constexpr (kAdjoint) return call.grad_y;
    else return call.x;
  }();
  const auto& gate = [&]() -> const auto& {
    if constexpr (kAdjoint) return call.output_gate;
    else return call.input_gate;
  }();
  const int64_t position_step = scan.rows ? map.stride[2] : map.stride[1];
  const auto line_in_stage = [&](int site) { return kSplit ? int(site >= memory.positions) : site / (kParts * kPart); };
  struct Site {
    T minus, centre, plus, gate;
  };
  Site sites[kSitesOfAThread] = {};  // of the next stage
  // Starts to read stage s.
  const auto fetch = [&](int s) {
    const int own_offset = recomputed(own) * memory.site_bytes + (unit ^ unit_exchange(units, recomputed(own))) * 16;
    for (int l = 0; l < plan.stage && s * plan.stage + l < scan.length; ++l) {
      const int line = line_at(s * plan.stage + l);
      const T* from = map_at(map, scan.batch, scan.row(line, own), scan.column(line, own),
                             scan.first_channel + unit * 8);
      char* const to = shared + s % 2 * memory.stage_bytes + l * memory.positions * memory.site_bytes + own_offset;
#pragma unroll
      for (int n = 0; n < kParts / 2; ++n) {
        const bool real = own + n * step < scan.positions;
        copy_async_or_zero(to + n * step * memory.site_bytes, real ? from + n * step * position_step : map.data, real);
      }
    }
#pragma unroll
    for (int n = 0; n < kSitesOfAThread; ++n) {
      const int i = tid + n * int(blockDim.x), l = line_in_stage(i), position = i - l * memory.positions;
      if (i >= stage_sites || s * plan.stage + l >= scan.length || position >= scan.positions) continue;
      const int line = line_at(s * plan.stage + l), row = scan.row(line, position), column = scan.column(line, position);
      const T* from = gate_at(call.gates, 5, scan.batch, row, column, scan.k, scan.group);
      sites[n].minus = from[0], sites[n].centre = from[call.gates.stride[4]];
      sites[n].plus = from[2 * call.gates.stride[4]];
      if (gate.data) sites[n].gate = *gate_at(gate, 4, scan.batch, row, column, scan.k, scan.group);
      else store(sites[n].gate, 1.f);
    }
  };
  // Writes the records and words of stage s, which has been read.
  const auto prepare = [&](int s) {
    char* const to = records + (kAdjoint ? s % 2 * memory.record_bytes : 0);
#pragma unroll
    for (int n = 0; n < kSitesOfAThread; ++n) {
      const int i = tid + n * int(blockDim.x), l = line_in_stage(i), position = i - l * memory.positions;
      if (i >= stage_sites || s * plan.stage + l >= scan.length) continue;
      const bool real = position < scan.positions;
      Weights<float> row{0.f, 0.f, 0.f};
      if (real && !scan.restarts(line_at(s * plan.stage + l), scan.reversed)) {
        row = differences(normalise(load(sites[n].minus), load(sites[n].centre), load(sites[n].plus),
                                    float(scan.has_minus(position)), float(scan.has_plus(position))));
      }
      if constexpr (kAdjoint) {
        const auto column = [&](int position_, int neighbour, float value) {
          const int q = recomputed(i) - position + position_;
          Records::write_one(Records::piece(to, q / kPiece), q % kPiece, neighbour, value);
        };
        column(position, 0, row.centre);
        const bool first = position == 0, last = position + 1 == memory.positions;
        column(first ? position : position - 1, first ? -1 : 1, first ? 0.f : row.minus);
        column(last ? position : position + 1, last ? 1 : -1, last ? 0.f : row.plus);
        *reinterpret_cast<float*>(Records::piece(to, recomputed(i) / kPiece) +
                                  Records::at(recomputed(i) % kPiece, i % 2 ? 3 : 0)) = 0.f;
      } else {
        Records::write(Records::piece(to, i / kPiece), i % kPiece, row);
      }
      const int site = kAdjoint && kSplit ? recomputed(i) : i;
      Words::write(words + site / kPiece * Words::kPieceWords, site % kPiece, real ? sites[n].gate : T{0});
    }
  };

  // f and s of the lane's channels.
  float decay[2], scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int channel = scan.first_channel + across * kWarpRows + at.channel + 8 * i;
    decay[i] = of_channel(call.decay, p, scan.k, channel);
    scale[i] = of_channel(call.scale, p, scan.k, channel);
  }
  float* const ends = reinterpret_cast<float*>(shared + memory.ends) + across * kWarpRows + at.channel;

  float state[kParts][4] = {};  // h of the line before; or what is carried into this line's dh
  const auto write_line = [&](int line) {
    const FragmentLane at(recomputed(tid) % kWarp);  // anew: there is no register to keep it in
    const int64_t tile = scan.batch * TileEdgeLayout::tiles(scan.lines) + line / kTileSites;
    const int first = along * kParts * kPart + at.channel;
    T* const to = edges.line[scan.k] + (tile * scan.positions + first) * p.channels + scan.first_channel +
                  across * kWarpRows +
                  at.pair * 2;
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t elements = transpose_matrix(pack<T>(state[j] + 2 * half));
        if (first + j * kPart < scan.positions)
          *reinterpret_cast<uint32_t*>(to + j * kPart * p.channels + half * 8) = elements;
      }
    }
  };
  // Scans one line: in `from`, whose values it replaces by h or dh. `i` counts lines.
  const auto scan_line = [&](char* from, const char* line_records, const uint32_t* line_words, bool restarts, int i) {
    const auto store_piece = [&](int q, const float (&v)[2][4]) {
      const uint32_t r[4] = {pack<T>(v[0]), pack<T>(v[0] + 2), pack<T>(v[1]), pack<T>(v[1] + 2)};
      store_matrices<true>(from + q * kPiece * memory.site_bytes, r);
    };
    const auto driven_by = [&](int q, float (&driven)[2][4]) {
      uint32_t matrices[4];
      load_matrices<true>(matrices, from + q * kPiece * memory.site_bytes);
      drive<T>(driven, matrices, Words::of_diagonal(line_words + q * Words::kPieceWords, at), at);
    };
    // backward, f is in dh already, and what a line that restarts hands on is cleared behind it
    const float one = kAdjoint || !restarts ? 1.f : 0.f;
    const float kept[2] = {kAdjoint ? one : one * decay[0], kAdjoint ? one : one * decay[1]};
    const auto operand = [&](int q, float (&a)[2][4]) {
      if constexpr (kAdjoint) {
        float dh[2][4];
        driven_by(q, dh);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int c = 0; c < 4; ++c) dh[j][c] = decay[c / 2] * state[2 * q + j][c] + scale[c / 2] * dh[j][c];
        store_piece(q, dh);
        as_operand(a[0], dh[0], kept);
        as_operand(a[1], dh[1], kept);
      } else {
        as_operand(a[0], state[2 * q], kept);
        as_operand(a[1], state[2 * q + 1], kept);
      }
    };
    float current[2][4], last[2][4], before[2] = {}, after[2] = {};
    operand(0, current);
    if constexpr (kSplit) {
      operand(kPieces - 1, last);
      float* const own_ends = ends + (i % 2 * plan.warps + along) * 2 * plan.slab;
      if (at.pair == 0) own_ends[0] = current[0][0], own_ends[8] = current[0][1];
      if (at.pair == 3) own_ends[plan.slab] = last[1][2], own_ends[plan.slab + 8] = last[1][3];
      __syncthreads();
      if (along > 0) before[0] = own_ends[-plan.slab], before[1] = own_ends[8 - plan.slab];
      if (along + 1 < plan.warps) after[0] = own_ends[2 * plan.slab], after[1] = own_ends[2 * plan.slab + 8];
    }
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      float next[2][4] = {{after[0], after[1]}};
      if (kSplit && q + 2 == kPieces) std::memcpy(next, last, sizeof next);
      else if (q + 1 < kPieces) operand(q + 1, next);
      float sums[2][4] = {};
      if constexpr (!kAdjoint) driven_by(q, sums);
      LineOperands<2> d;
      d.load(line_records + q * Records::kPieceBytes, at);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[j][c] += current[j][c % 2 * 2 + c / 2];
        mma_tf32(sums[j], current[j], d.band[j]);
      }
      // the position before either part, and the one behind it
      const float beside[4][2] = {{before[0], before[1]}, {current[1][0], current[1][1]},
                                  {current[0][2], current[0][3]}, {next[0][0], next[0][1]}};
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        mma_tf32_k4(sums[j], beside[2 * j], d.corner[j][1]);
        mma_tf32_k4(sums[j], beside[2 * j + 1], d.corner[j][0]);
      }
      if constexpr (!kAdjoint) store_piece(q, sums);
      before[0] = current[1][2], before[1] = current[1][3];
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) state[2 * q + j][c] = sums[j][c], current[j][c] = next[j][c];
    }
  };
  // Writes the sides of stage s, which has been scanned.
  const auto write_sides = [&](int s) {
    const int64_t tiles = TileEdgeLayout::tiles(scan.positions);
    const char* const of_stage = shared + s % 2 * memory.stage_bytes;
    for (int slot = own; slot < plan.stage * line_pieces * 2; slot += step) {
      const int l = kSplit ? int(slot >= line_pieces * 2) : slot / kParts, in_line = slot - l * line_pieces * 2, tile = in_line / 2;
      const bool end = in_line % 2;
      if (s * plan.stage + l >= scan.length || tile >= tiles) continue;
      const int64_t line = line_at(s * plan.stage + l);
      T* const to = edges.side[scan.k] + ((scan.batch * scan.lines + line) * 2 * tiles + in_line) * p.channels +
                    scan.first_channel + unit * 8;
      // forward, the tile's own end; backward, the position beside it
      const int position = tile * kTileSites + (end ? kTileSites - 1 : 0) + (kAdjoint ? (end ? 1 : -1) : 0);
      uint4 elements = {0, 0, 0, 0};
      if (position >= 0 && position < memory.positions) {
        elements = *reinterpret_cast<const uint4*>(of_stage + (l * memory.positions + position) * memory.site_bytes +
                                                   (unit ^ unit_exchange(units, position)) * 16);
      }
      if constexpr (kAdjoint) {
        const char* const piece = Records::piece(records + s % 2 * memory.record_bytes, l * line_pieces + tile);
        const float weight = *reinterpret_cast<const float*>(piece + (end ? Records::at(kPiece - 1, 2) : Records::at(0, 1)));
        uint32_t* const each[4] = {&elements.x, &elements.y, &elements.z, &elements.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float v[2];
          unpack(T(), *each[e], v);
          v[0] *= weight, v[1] *= weight;
          *each[e] = pack<T>(v);
        }
      }
      *reinterpret_cast<uint4*>(to) = elements;
    }
  };

  fetch(0);
  for (int s = 0; s * plan.stage < scan.length; ++s) {
    prepare(s);
    wait_copies();
    __syncthreads();
    if ((s + 1) * plan.stage < scan.length) fetch(s + 1);
    // the lane's row of the matrices of this warp's first piece
    const int again = recomputed(tid), row = again % kWarp;
    const int matrix_row = along * kParts * kPart + row % 8 + row / 16 * 8;
    const int matrix_unit = 2 * (again / kWarp - along * plan.warps_across()) + row / 8 % 2;
    const int matrix_offset = matrix_row * memory.site_bytes + (matrix_unit ^ unit_exchange(units, row % 8)) * 16;
    for (int l = 0; l < plan.stage && s * plan.stage + l < scan.length; ++l) {
      const int line = line_at(s * plan.stage + l);
      const bool read_last = scan.reversed ? line % kTileSites == 0
                                           : line % kTileSites == kTileSites - 1 || line + 1 == scan.lines;
      if (kAdjoint && read_last) write_line(line);
      const bool restarts = scan.restarts(line, scan.reversed);
      const int piece = l * line_pieces + along * kPieces;
      scan_line(shared + s % 2 * memory.stage_bytes + l * memory.positions * memory.site_bytes + matrix_offset,
                Records::piece(records + (kAdjoint ? s % 2 * memory.record_bytes : 0), piece),
                words + piece * Words::kPieceWords, restarts, s * plan.stage + l);
      if (kAdjoint && restarts) std::memset(state, 0, sizeof state);
      if (!kAdjoint && read_last) write_line(line);
    }
    __syncthreads();
    write_sides(s);
  }
}

// A launch for the directions of one axis; `blocks` is 0 where a line is too long for a block.
struct TileEdgeLaunch {
  TileEdgePlan plan{};
  int parts = 0;  // of a warp
  int64_t blocks = 0;

  TileEdgeLaunch(const Problem& p, bool rows, const SharedMemory& memory) {
    constexpr int kLeastRun = 32;  // lines; a block that has fewer waits for its first ones most of the time
    const Lines<int64_t> map(p, rows);
    const int64_t positions = map.positions, warp_channels = p.channels / p.groups / kWarpRows;
    parts = positions <= 4 * kPart ? 4 : 8;
    plan.warps = int((positions + parts * kPart - 1) / (parts * kPart));
    const int64_t chunk = map.chunks.size;
    plan.run = int(chunk * ((kLeastRun + chunk - 1) / chunk));
    for (int across = 4; across >= 1; --across) {
      if (warp_channels % across) continue;
      plan.slab = across * kWarpRows;
      plan.stage = 4 * across > parts ? 4 * across / parts : 1;
      plan.lay_out(parts);
      const int most = plan.warps > 1 ? kTileEdgeThreads<true> : kTileEdgeThreads<false>;
      if (plan.threads() > most || plan.memory.bytes > memory.of_a_block) continue;
      blocks = p.batch * (p.channels / plan.slab) * runs_of(map, plan.run);
      return;
    }
  }
};

// Whether tensor_edges can scan a map's lines on this device.
inline bool tile_edges_fit(const Problem& p, const SharedMemory& memory) {
  for (int k = 0; k < p.num_directions; ++k)
    if (TileEdgeLaunch(p, lines_are_rows(p.directions[k]), memory).blocks == 0) return false;
  return true;
}

// Writes the edges of a call, a Forward or a Backward one.
template <typename Call>
cudaError_t launch_tile_edges(const Call& call, const TileEdges<typename Call::Element>& edges,
                              const SharedMemory& memory, cudaStream_t stream) {
  const Problem& p = call.problem;
  for (const bool rows : {true, false}) {  // all directions at once where rows and columns are as many
    TileEdgeLaunch tile_edges(p, rows, memory);
    TileEdgePlan& plan = tile_edges.plan;
    const bool square = p.height == p.width;
    if (square && !rows) break;
    for (int k = 0; k < p.num_directions; ++k)
      if (square || lines_are_rows(p.directions[k]) == rows) plan.k[plan.directions++] = k;
    if (plan.directions == 0) continue;
    const auto run = [&](auto kernel) {
      return launch(kernel, tile_edges.blocks * plan.directions, plan.threads(), plan.memory.bytes, stream, call, plan,
                    edges);
    };
    const cudaError_t error = plan.warps > 1          ? run(tensor_edges<Call, 8, true>)
                              : tile_edges.parts == 4 ? run(tensor_edges<Call, 4, false>)
                                                      : run(tensor_edges<Call, 8, false>);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace gspn
