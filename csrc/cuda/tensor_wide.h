// Forward on tensor cores of maps, or windows, of up to 32 × 32 sites: a block has the channels of a group on all of
// one, so nothing crosses its border, and x is read from memory once.
//
// The sum y of all directions, in the element type, is what fills shared memory; x passes through a ring of stages, some
// lines of either sense of an axis. Scanning warps have 16 channels of one sense each. The others help: they ask for x
// of the stages to come and prepare their gates. A barrier ends a stage. While one sense is at line i, the other is at
// line last - i, so no two warps touch the same line between two barriers, and each adds to y as it comes by: y is
// rounded once per direction.
#pragma once

#include "cuda/tensor_forward.h"

namespace gspn {

constexpr int kWideSites = 32;  // rows and columns

struct WidePlan {
  int channels;  // of a group
  int k[4];      // of gspn::Direction: which of the call's directions it is, or -1
};

// Shared memory and warps of a block. kUnits: TileMemory<>::kUnits of the group's channels.
template <int kUnits, bool kGates>
struct WideMemory {
  using Map = TileMemory<kUnits * 8, kWideSites>;
  static constexpr bool kHasGates = kGates;
  static constexpr int kStage = 2;               // lines of either sense
  static constexpr int kLines = 2 * kStage;      // of a stage
  static constexpr int kRing = 4, kReady = 3;    // stages that have room for their x; for their gates
  static constexpr int kScanners = kUnits;       // warps: of either sense one for 16 channels
  static constexpr int kHelpers = kUnits == 8 ? 4 : 2;
  static constexpr int kThreads = (kScanners + kHelpers) * kWarp;
  static constexpr int kBlocks = kUnits == 8 ? 1 : kUnits == 4 ? 2 : 3;  // of a multiprocessor with 228 KB
  static constexpr int kStageSites = kLines * kWideSites, kStagePieces = kStageSites / kPiece;
  static constexpr int kStageBytes = kLines * Map::kRowBytes;  // of x
  static constexpr int kRecordBytes = Records::bytes(kStagePieces);
  static constexpr int kWordBytes = kStagePieces * Words::kPieceWords * 4;
  // bytes from the start
  static constexpr int kY = 0, kX = kY + Map::kBytes, kRecords = kX + kRing * kStageBytes;
  static constexpr int kInputGate = kRecords + kReady * kRecordBytes;
  static constexpr int kOutputGate = kInputGate + kReady * kWordBytes;
  static constexpr int kFactors = kOutputGate + (kGates ? kReady * kWordBytes : 0);  // [direction][decay, scale][channel]
  static constexpr int kBytes = kFactors + 4 * 2 * kUnits * 8 * 4;

  // Where a stage's x, records and words begin. Stages count from the block's first.
  static GSPN_DEVICE int x(int stage) { return kX + stage % kRing * kStageBytes; }
  static GSPN_DEVICE int records(int stage) { return kRecords + stage % kReady * kRecordBytes; }
  static GSPN_DEVICE int input_gate(int stage) { return kInputGate + stage % kReady * kWordBytes; }
  static GSPN_DEVICE int output_gate(int stage) { return kOutputGate + stage % kReady * kWordBytes; }
};

// The block's map and group. Neighbouring blocks have neighbouring groups, whose gates share sectors of memory.
struct WideTile {
  int64_t batch;
  int group, row, column, height, width;  // its first row and column, and its size

  GSPN_DEVICE WideTile(const Problem& p, unsigned block)
      : batch(block / unsigned(p.groups)), group(int(block % unsigned(p.groups))), row(0), column(0),
        height(int(p.height)), width(int(p.width)) {}
};

// A block's stages: those of rows, then those of columns. Lines of an axis are counted from the tile's first up to a
// number of whole stages in either half, so that the senses never meet within one; some may lie beyond the tile.
template <int kStage>
struct WideStages {
  int rows, columns;  // stages of rows and of columns; 0 where the call has no direction of that axis

  GSPN_DEVICE WideStages(const WideTile& tile, const WidePlan& plan)
      : rows(of_lines(tile.height, plan, kDown, kUp)), columns(of_lines(tile.width, plan, kRight, kLeft)) {}
  GSPN_DEVICE int count() const { return rows + columns; }
  GSPN_DEVICE int of_axis(bool is_rows) const { return is_rows ? rows : columns; }
  // The l-th line of the n-th stage of an axis, for a sense.
  GSPN_DEVICE int line(bool is_rows, int n, int l, bool reversed) const {
    return nth_read(0, of_axis(is_rows) * kStage, n * kStage + l, reversed);
  }

 private:
  static GSPN_DEVICE int of_lines(int lines, const WidePlan& plan, Direction one, Direction other) {
    return plan.k[one] < 0 && plan.k[other] < 0 ? 0 : 2 * ((lines + 2 * kStage - 1) / (2 * kStage));
  }
};

// A helping thread: it reads units of x, and gates of sites, of any stage.
template <typename Memory, typename T>
struct WideHelper {
  using Map = typename Memory::Map;
  using Stages = WideStages<Memory::kStage>;
  static constexpr int kThreads = Memory::kHelpers * kWarp, kSites = Memory::kStageSites / kThreads;
  static constexpr int kStep = kThreads / Map::kUnits;  // positions between two of its units of a line
  static_assert(kSites * kThreads == Memory::kStageSites && kWideSites % kStep == 0, "whole rounds");

  const Forward<T>& call;
  const WideTile& tile;
  const WidePlan& plan;
  const Stages& stages;
  char* const memory;
  const int thread;  // its number among helpers

  // A stage's axis, and its number among the axis' stages.
  struct AxisStage {
    bool rows;
    int number, lines, positions;
  };
  GSPN_DEVICE AxisStage axis_stage(int stage) const {
    const bool rows = stage < stages.rows;
    return {rows, rows ? stage : stage - stages.rows, rows ? tile.height : tile.width,
            rows ? tile.width : tile.height};
  }
  // The call's direction that has the i-th line of a stage, or -1; and which line that is.
  GSPN_DEVICE int k_of(const AxisStage& at, int i) const {
    return plan.k[direction_of(at.rows, i >= Memory::kStage)];
  }
  GSPN_DEVICE int line_of(const AxisStage& at, int i) const {
    return stages.line(at.rows, at.number, i % Memory::kStage, i >= Memory::kStage);
  }

  // Starts to copy x of a stage, and ends the group of these copies. What lies beyond the tile becomes 0.
  GSPN_DEVICE void copy_x(int stage) const {
    if (stage < stages.count()) {
      const AxisStage at = axis_stage(stage);
      const int unit = thread % Map::kUnits, first = thread / Map::kUnits;
      const bool has_unit = unit * 8 < plan.channels;
      const int64_t line_step = call.x.stride[at.rows ? 1 : 2], position_step = call.x.stride[at.rows ? 2 : 1];
      const T* const map = map_at(call.x, tile.batch, tile.row, tile.column, tile.group * plan.channels + unit * 8);
#pragma unroll
      for (int i = 0; i < Memory::kLines; ++i) {
        if (k_of(at, i) < 0) continue;
        const int line = line_of(at, i);
        const T* from = map + line * line_step + first * position_step;
        char* const to = memory + Memory::x(stage) + i * Map::kRowBytes;
#pragma unroll
        for (int position = first; position < kWideSites; position += kStep) {
          const bool real = has_unit && line < at.lines && position < at.positions;
          copy_async_or_zero(to + Map::offset(0, position, unit), real ? from : call.x.data, real);
          from += kStep * position_step;
        }
      }
    }
    commit_copies();
  }

  // A site's gates for the one direction that reads it in a stage.
  struct Site {
    T logits[3], input_gate, output_gate;
  };
  struct Sites {
    Site site[kSites];
  };
  GSPN_DEVICE int site_index(int i) const { return thread + i * kThreads; }
  GSPN_DEVICE void read_gates(int stage, Sites& sites) const {
    sites = {};
    if (stage >= stages.count()) return;
    const AxisStage at = axis_stage(stage);
#pragma unroll
    for (int i = 0; i < kSites; ++i) {
      Site& site = sites.site[i];
      const int position = site_index(i) % kWideSites, in_stage = site_index(i) / kWideSites;
      const int line = line_of(at, in_stage), k = k_of(at, in_stage);
      if (line >= at.lines || position >= at.positions || k < 0) continue;
      const int row = tile.row + (at.rows ? line : position), column = tile.column + (at.rows ? position : line);
      const T* const logits = gate_at(call.gates, 5, tile.batch, row, column, k, tile.group);
#pragma unroll
      for (int n = 0; n < 3; ++n) site.logits[n] = logits[n * call.gates.stride[4]];
      site.input_gate = *gate_at(call.input_gate, 4, tile.batch, row, column, k, tile.group);
      if constexpr (Memory::kHasGates)
        site.output_gate = *gate_at(call.output_gate, 4, tile.batch, row, column, k, tile.group);
    }
  }
  // Writes the records and words of a stage whose gates it has read: zeros beyond the tile.
  GSPN_DEVICE void prepare_gates(int stage, const Sites& sites) const {
    if (stage >= stages.count()) return;
    const AxisStage at = axis_stage(stage);
    const Lines<int> map(call.problem, at.rows);
    const int first_line = map.line_of(tile.row, tile.column), first_position = map.position_of(tile.row, tile.column);
#pragma unroll
    for (int i = 0; i < kSites; ++i) {
      const Site& site = sites.site[i];
      const int position = site_index(i) % kWideSites, in_stage = site_index(i) / kWideSites;
      const int line = line_of(at, in_stage), piece = site_index(i) / kPiece;
      const bool goes_on = line < at.lines && position < at.positions &&
                           !map.starts_chunk(first_line + line, in_stage >= Memory::kStage);
      const int map_position = first_position + position;
      const Weights<float> w = differences(normalise(load(site.logits[0]), load(site.logits[1]), load(site.logits[2]),
                                                     float(map_position > 0),
                                                     float(map_position + 1 < map.positions)));
      Records::write(Records::piece(memory + Memory::records(stage), piece), position % kPiece,
                     {goes_on ? w.minus : 0.f, goes_on ? w.centre : 0.f, goes_on ? w.plus : 0.f});
      const auto words = [&](int from) {
        return reinterpret_cast<uint32_t*>(memory + from) + piece * Words::kPieceWords;
      };
      Words::write(words(Memory::input_gate(stage)), position % kPiece, site.input_gate);
      if constexpr (Memory::kHasGates)
        Words::write(words(Memory::output_gate(stage)), position % kPiece, site.output_gate);
    }
  }

  // Helps with all stages: after the barrier before stage n, x and gates of stages n and n + 1 are there.
  GSPN_DEVICE void help() const {
    Sites sites, second;
    read_gates(0, sites);
    read_gates(1, second);
    for (int stage = 0; stage < Memory::kRing - 1; ++stage) copy_x(stage);
    prepare_gates(0, sites);
    prepare_gates(1, second);
    read_gates(2, sites);
    wait_copies_but<Memory::kRing - 3>();
    __syncthreads();
#pragma unroll 1
    for (int stage = 0; stage < stages.count(); ++stage) {
      prepare_gates(stage + 2, sites);
      read_gates(stage + 3, sites);
      copy_x(stage + Memory::kRing - 1);
      wait_copies_but<Memory::kRing - 3>();
      __syncthreads();
    }
  }
};

// Scans 16 channels in one sense of every axis, in a warp of its own.
template <typename Memory, typename T>
GSPN_DEVICE void scan_wide(char* memory, const Problem& p, const WideTile& tile, const WidePlan& plan,
                           const WideStages<Memory::kStage>& stages, int warp, int lane, bool reversed) {
  using Map = typename Memory::Map;
  constexpr int kParts = kWideSites / kPart, kPieces = kWideSites / kPiece;
  const FragmentLane at(lane);
  const int unit = Map::matrix_unit(lane, warp);
  int in_line[kPieces];  // the lane's row of a piece's matrices, in a line of x
#pragma unroll
  for (int q = 0; q < kPieces; ++q) in_line[q] = Map::offset(0, q * kPiece + Map::matrix_position(lane), unit);

  float h[kParts][4], driven[kParts][4];  // of the line that is read next: λx and the weights
  LineOperands<kParts> d;
  const auto read_line = [&](int stage, int l) {
    const int line = reversed * Memory::kStage + l;
    const char* const x = memory + Memory::x(stage) + line * Map::kRowBytes;
    const uint32_t* const input_gates =
        reinterpret_cast<const uint32_t*>(memory + Memory::input_gate(stage)) + line * kPieces * Words::kPieceWords;
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      uint32_t matrices[4];
      float both[2][4];
      load_matrices<true>(matrices, x + in_line[q]);
      drive<T>(both, matrices, Words::of_diagonal(input_gates + q * Words::kPieceWords, at), at);
#pragma unroll
      for (int i = 0; i < 8; ++i) driven[2 * q + i / 4][i % 4] = both[i / 4][i % 4];
    }
    d.load(Records::piece(memory + Memory::records(stage), line * kPieces), at);
  };

  __syncthreads();
  int stage = 0;
#pragma unroll 1
  for (int axis = 0; axis < 2; ++axis) {
    const bool rows = axis == 0, adds = stage > 0;  // adds: to the sum of another axis
    const int direction = direction_of(rows, reversed), length = rows ? tile.height : tile.width;
    const bool scans = plan.k[direction] >= 0 && warp * kWarpRows < plan.channels;
    int in_y[kPieces];
#pragma unroll
    for (int q = 0; q < kPieces; ++q)
      in_y[q] = Map::position_offset(rows, q * kPiece + Map::matrix_position(lane), unit);
    float decay[2], scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const factors = reinterpret_cast<const float*>(memory + Memory::kFactors) +
                                   direction * 2 * Map::kUnits * 8 + warp * kWarpRows + at.channel + i * 8;
      decay[i] = factors[0], scale[i] = factors[Map::kUnits * 8];
    }
    const Lines<int> map(p, rows);
    const unsigned restarts = __ballot_sync(
        kAllLanes, lane >= length || map.starts_chunk(map.line_of(tile.row, tile.column) + lane, reversed));
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) h[i / 4][i % 4] = 0.f;
    const int count = stages.of_axis(rows);
    if (scans && count > 0) read_line(stage, 0);
#pragma unroll 1
    for (int n = 0; n < count; ++n, ++stage) {
      const bool begins = !adds && 2 * n < count;  // lines that nothing has been written to
#pragma unroll
      for (int l = 0; l < Memory::kStage && (scans || begins); ++l) {
        const int line = stages.line(rows, n, l, reversed);
        char* const y = memory + Memory::kY + Map::line_offset(rows, line);
        const int exchange = Map::line_exchange(rows, line);
        uint32_t sum[kPieces][4] = {};
        if (!scans) {
#pragma unroll
          for (int q = 0; q < kPieces; ++q) store_matrices<true>(y + (in_y[q] ^ exchange), sum[q]);
          continue;
        }
        if (!begins) {
#pragma unroll
          for (int q = 0; q < kPieces; ++q) load_matrices<true>(sum[q], y + (in_y[q] ^ exchange));
        }
        const bool goes_on = !(restarts >> line & 1);
        const float factor[2] = {goes_on ? decay[0] : 0.f, goes_on ? decay[1] : 0.f};
        advance_parts(h, driven, factor, d, NothingBeside());
        const bool last = l + 1 == Memory::kStage;
        read_line(last ? stage + 1 : stage, last ? 0 : l + 1);
#pragma unroll
        for (int q = 0; q < kPieces; ++q) {
          float v[2][4], u[2][2] = {{1.f, 1.f}, {1.f, 1.f}};
          unpack_piece<T>(sum[q], v);
          if constexpr (Memory::kHasGates) {
            const int piece = (reversed * Memory::kStage + l) * kPieces + q;
            Words::of_columns<T>(reinterpret_cast<const uint32_t*>(memory + Memory::output_gate(stage)) +
                                     piece * Words::kPieceWords,
                                 at, u);
          }
#pragma unroll
          for (int i = 0; i < 8; ++i)
            v[i / 4][i % 4] += scale[i / 2 % 2] * u[i / 4][i % 2] * h[2 * q + i / 4][i % 4];
          pack_piece<T>(v, sum[q]);
          store_matrices<true>(y + (in_y[q] ^ exchange), sum[q]);
        }
      }
      __syncthreads();
    }
  }
}

// Writes the tile's y, after the tail if the call has one.
template <typename Memory, typename T>
GSPN_DEVICE void write_wide(const char* memory, const Forward<T>& call, const WideTile& tile, const WidePlan& plan) {
  using Map = typename Memory::Map;
  constexpr int kTogether = Memory::kThreads / Map::kUnits;  // sites that the block's threads have at a time
  constexpr int kAhead = 4;                                  // of these, how many times a thread reads x at once
  static_assert(kWideSites % (kWarp / Map::kUnits) == 0, "a warp's sites lie in one row");
  const Problem& p = call.problem;
  const int unit = threadIdx.x % Map::kUnits, first_site = threadIdx.x / Map::kUnits;
  const int channel = tile.group * plan.channels + unit * 8;
  const bool has_unit = unit * 8 < plan.channels;
  const float inverse_channels = 1.f / float(plan.channels);
  float direct[8] = {};
  if (call.direct && has_unit) {
#pragma unroll
    for (int i = 0; i < 8; ++i) direct[i] = call.direct[channel + i];
  }
#pragma unroll 1
  for (int begin = first_site; begin / kWideSites < tile.height; begin += kAhead * kTogether) {
    uint4 x_words[kAhead] = {};
    if (call.direct) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int row = (begin + i * kTogether) / kWideSites, column = (begin + i * kTogether) % kWideSites;
        if (has_unit && row < tile.height && column < tile.width)
          x_words[i] = *reinterpret_cast<const uint4*>(
              map_at(call.x, tile.batch, tile.row + row, tile.column + column, channel));
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int row = (begin + i * kTogether) / kWideSites, column = (begin + i * kTogether) % kWideSites;
      if (row >= tile.height) break;
      const bool real = has_unit && column < tile.width;
      uint4 words = *reinterpret_cast<const uint4*>(memory + Memory::kY + Map::offset(row, column, unit));
      if (call.direct) {
        float v[8], x[8], squares = 0.f;
        unpack_vector<T>(words, v);
        unpack_vector<T>(x_words[i], x);
#pragma unroll
        for (int c = 0; c < 8; ++c) squares += v[c] * v[c];
        if (!real) squares = 0.f;
#pragma unroll
        for (int width = Map::kUnits / 2; width >= 1; width /= 2) squares += __shfl_xor_sync(kAllLanes, squares, width);
        const float inverse = inverse_root(squares * inverse_channels + kTailEpsilon);
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] = v[c] * inverse + direct[c] * x[c];
        words = pack_vector<T>(v);
        const int64_t site = (tile.batch * p.height + tile.row + row) * p.width + tile.column + column;
        if (real && unit == 0) call.inverse_rms[site * p.groups + tile.group] = inverse;
      }
      if (real)
        *reinterpret_cast<uint4*>(map_at(call.y, tile.batch, tile.row + row, tile.column + column, channel)) = words;
    }
  }
}

template <typename T, int kUnits, bool kGates>
__global__ void __launch_bounds__(WideMemory<kUnits, kGates>::kThreads, WideMemory<kUnits, kGates>::kBlocks)
    tensor_wide(const __grid_constant__ Forward<T> call, const __grid_constant__ WidePlan plan) {
  using Memory = WideMemory<kUnits, kGates>;
  constexpr int kScanThreads = Memory::kScanners * kWarp;
  const Problem& p = call.problem;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  char* const memory = shared_memory();
  const WideTile tile(p, blockIdx.x);
  const WideStages<Memory::kStage> stages(tile, plan);

  for (int slot = 0; slot < Memory::kReady; ++slot)
    Records::write_zeros(memory + Memory::records(slot), Memory::kStagePieces);
  if (thread < kScanThreads) {
    float* const factors = reinterpret_cast<float*>(memory + Memory::kFactors);
    for (int i = thread; i < 4 * kUnits * 8; i += kScanThreads) {
      const int direction = i / (kUnits * 8), channel = i % (kUnits * 8), k = plan.k[direction];
      const bool real = k >= 0 && channel < plan.channels;
      float* const to = factors + direction * 2 * kUnits * 8 + channel;
      to[0] = real ? of_channel(call.decay, p, k, tile.group * plan.channels + channel) : 0.f;
      to[kUnits * 8] = real ? of_channel(call.scale, p, k, tile.group * plan.channels + channel) : 0.f;
    }
    scan_wide<Memory, T>(memory, p, tile, plan, stages, warp % (kUnits / 2), lane, warp >= kUnits / 2);
  } else {
    WideHelper<Memory, T>{call, tile, plan, stages, memory, thread - kScanThreads}.help();
  }
  write_wide<Memory>(memory, call, tile, plan);
}

}  // namespace gspn
