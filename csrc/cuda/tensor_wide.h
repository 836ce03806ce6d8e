// Forward on tensor cores of maps, or windows, of up to 32 × 32 sites: a block has the channels of a group on all of
// one, so nothing crosses its border, and x comes from memory once.
//
// The sum y of all directions, in the element type, is what fills shared memory; x passes through a ring of stages, two
// lines of either sense of an axis. Scanning warps have 16 channels of one sense each. The others help: they ask for x
// of the stages to come and prepare their gates. A barrier ends a stage. While one sense is at line i, the other is at
// line last - i, so no two warps touch the same site between two barriers, and each adds to y as it comes by: y is
// rounded once per direction.
#pragma once

#include "cuda/tensor_forward.h"

namespace gspn {

constexpr int kWideSites = 32;  // rows and columns

struct WidePlan {
  int channels;   // of a group
  TileGrid grid;  // tiles of up to 32 × 32
  int k[4];       // of gspn::Direction: which of the call's directions it is, or -1
};

// Shared memory and warps of a block. kUnits: TileMemory<>::kUnits of the group's channels.
template <int kUnits, bool kHasGates_>
struct WideMemory {
  using Map = TileMemory<kUnits * 8, kWideSites>;
  static constexpr bool kHasGates = kHasGates_;
  static constexpr int kStage = 2;             // lines of either sense
  static constexpr int kLines = 2 * kStage;    // of a stage: the first sense's, then the other's, as they are read
  static constexpr int kRing = 4, kReady = 3;  // stages that have room for their x; for their gates
  static constexpr int kScanners = kUnits;     // warps: of either sense one for 16 channels
  static constexpr int kHelpers = kUnits == 8 ? 4 : 2;
  static constexpr int kThreads = (kScanners + kHelpers) * kWarp;
  static constexpr int kBlocks = kUnits == 8 ? 1 : kUnits == 4 ? 2 : 3;  // of a multiprocessor with 228 KB
  static constexpr int kStageSites = kLines * kWideSites, kStagePieces = kStageSites / kPiece;
  // A stage's x; and its gates: records, λ, and u.
  static constexpr int kStageBytes = kLines * Map::kRowBytes;
  static constexpr int kWordBytes = kStagePieces * Words::kPieceWords * 4;
  static constexpr int kInputGate = Records::bytes(kStagePieces), kOutputGate = kInputGate + kWordBytes;
  static constexpr int kGateBytes = kOutputGate + (kHasGates ? kWordBytes : 0);
  // bytes from the start
  static constexpr int kY = 0, kX = kY + Map::kBytes, kGates = kX + kRing * kStageBytes;
  static constexpr int kFactors = kGates + kReady * kGateBytes;  // [direction][decay, scale][channel]
  static constexpr int kBytes = kFactors + 4 * 2 * kUnits * 8 * 4;

  // Where a stage of the block has its x, and its gates.
  static GSPN_DEVICE int x(int stage) { return kX + stage % kRing * kStageBytes; }
  static GSPN_DEVICE int gates(int stage) { return kGates + stage % kReady * kGateBytes; }
};

// How many stages a block has of rows, and then of columns: 0 where the call has no direction of that axis. Lines are
// counted from the tile's first one up to a number of whole stages in either half, so that senses do not meet within a
// stage; some may lie beyond the tile.
template <int kStage>
struct WideStages {
  int rows, columns;

  GSPN_DEVICE WideStages(const TensorTile& tile, const WidePlan& plan)
      : rows(of_lines(tile.height, plan, kDown, kUp)), columns(of_lines(tile.width, plan, kRight, kLeft)) {}
  GSPN_DEVICE int count() const { return rows + columns; }

 private:
  static GSPN_DEVICE int of_lines(int lines, const WidePlan& plan, Direction one, Direction other) {
    return plan.k[one] < 0 && plan.k[other] < 0 ? 0 : 2 * ((lines + 2 * kStage - 1) / (2 * kStage));
  }
};

// A helping thread: stage by stage it asks for units of x, and reads and prepares the gates of sites.
template <typename Memory, typename T>
struct WideHelper {
  using Map = typename Memory::Map;
  static constexpr int kStage = Memory::kStage, kThreads = Memory::kHelpers * kWarp;
  static constexpr int kStep = kThreads / Map::kUnits;      // positions between two of its units of a line
  static constexpr int kUnitsOfALine = kWideSites / kStep;  // how many it has
  static constexpr int kSites = Memory::kStageSites / kThreads;
  static_assert(kSites * kThreads == Memory::kStageSites && kUnitsOfALine * kStep == kWideSites, "whole rounds");

  // Sites of a stage, each with its gates for the one direction that reads it there.
  struct Sites {
    T logits[kSites][3], input_gate[kSites], output_gate[kSites];
    bool goes_on[kSites];       // no restart, within the tile
    float has_minus, has_plus;  // of the position, the same for all
  };

  const Forward<T>& call;
  const TensorTile& tile;
  const WidePlan& plan;
  const WideStages<kStage>& stages;
  char* const memory;
  const int thread, position;  // its number among helpers, and where its sites lie on their lines
  int stage;                   // that is read next
  // Of that stage's axis:
  int lines, positions;
  float has_minus, has_plus;
  // Of either sense: whether the call has it, its next line, and the thread's first unit of that.
  bool present[2];
  int line[2];
  const T* x[2];
  // Of either of its sites: its line, bits that say whether a scan restarts there and at later stages, and its gates.
  int site_line[kSites];
  uint32_t restarts[kSites];
  const T *logits[kSites], *input_gate[kSites], *output_gate[kSites];

  GSPN_DEVICE WideHelper(const Forward<T>& call_, const TensorTile& tile_, const WidePlan& plan_,
                         const WideStages<kStage>& stages_, char* memory_, int thread_)
      : call(call_), tile(tile_), plan(plan_), stages(stages_), memory(memory_), thread(thread_),
        position(thread_ % kWideSites), stage(0) {}

  // The i-th site's line among those of its stage, and its sense.
  GSPN_DEVICE int in_stage(int i) const { return thread / kWideSites + i * (kThreads / kWideSites); }
  GSPN_DEVICE bool reversed(int i) const { return in_stage(i) >= kStage; }
  GSPN_DEVICE bool has_sense(bool reversed) const { return reversed ? present[1] : present[0]; }

  GSPN_DEVICE void begin_axis(bool rows) {
    const Lines<int> map(call.problem, rows);
    const int first_line = map.line_of(tile.row, tile.column), first_position = map.position_of(tile.row, tile.column);
    const int count = (rows ? stages.rows : stages.columns) * kStage;
    lines = rows ? tile.height : tile.width, positions = rows ? tile.width : tile.height;
    has_minus = map.has_minus(first_position + position), has_plus = map.has_plus(first_position + position);
    const int channel = tile.group * plan.channels + thread % Map::kUnits * 8, first = thread / Map::kUnits;
#pragma unroll
    for (int sense = 0; sense < 2; ++sense) {
      present[sense] = plan.k[direction_of(rows, sense)] >= 0;
      line[sense] = nth_read(0, count, 0, sense);
      x[sense] = map_at(call.x, tile.batch, tile.row + map.row(line[sense], first),
                        tile.column + map.column(line[sense], first), channel);
    }
#pragma unroll
    for (int i = 0; i < kSites; ++i) {
      const int n = in_stage(i) % kStage, lane_line = nth_read(0, count, position, reversed(i));
      restarts[i] =
          __ballot_sync(kAllLanes, lane_line >= lines || map.restarts(first_line + lane_line, reversed(i))) >> n;
      site_line[i] = nth_read(0, count, n, reversed(i));
      const int row = tile.row + map.row(site_line[i], position), k = plan.k[direction_of(rows, reversed(i))];
      const int column = tile.column + map.column(site_line[i], position);
      logits[i] = gate_at(call.gates, 5, tile.batch, row, column, k, tile.group);
      input_gate[i] = gate_at(call.input_gate, 4, tile.batch, row, column, k, tile.group);
      if constexpr (Memory::kHasGates)
        output_gate[i] = gate_at(call.output_gate, 4, tile.batch, row, column, k, tile.group);
    }
  }

  // Starts to copy x of the next stage, reads its gates, and goes on to the stage behind it. Copies are a group. What
  // lies beyond the tile becomes 0; its address, which may be beyond the tensor, is not read.
  GSPN_DEVICE void fetch(Sites& sites) {
    sites = {};
    if (stage == 0) begin_axis(stages.rows > 0);
    else if (stage == stages.rows) begin_axis(false);
    if (stage < stages.count()) {
      const int axis = stage < stages.rows ? 1 : 2;  // of the strides
      const int unit = thread % Map::kUnits, first = thread / Map::kUnits;
#pragma unroll
      for (int sense = 0; sense < 2; ++sense) {
        if (!present[sense]) continue;
#pragma unroll
        for (int l = 0; l < kStage; ++l) {
          char* const to = memory + Memory::x(stage) + (sense * kStage + l) * Map::kRowBytes;
#pragma unroll
          for (int n = 0; n < kUnitsOfALine; ++n) {
            const int at = first + n * kStep;
            copy_async_or_zero(to + Map::offset(0, at, unit), x[sense] + n * kStep * call.x.stride[3 - axis],
                               unit * 8 < plan.channels && at < positions && line[sense] < lines);
          }
          line[sense] += sense ? -1 : 1;
          x[sense] += sense ? -call.x.stride[axis] : call.x.stride[axis];
        }
      }
      sites.has_minus = has_minus, sites.has_plus = has_plus;
#pragma unroll
      for (int i = 0; i < kSites; ++i) {
        const int step = reversed(i) ? -kStage : kStage;
        if (position < positions && site_line[i] < lines && has_sense(reversed(i))) {
#pragma unroll
          for (int n = 0; n < 3; ++n) sites.logits[i][n] = logits[i][n * call.gates.stride[4]];
          sites.input_gate[i] = *input_gate[i];
          if constexpr (Memory::kHasGates) sites.output_gate[i] = *output_gate[i];
          sites.goes_on[i] = !(restarts[i] & 1);
        }
        restarts[i] >>= kStage;
        site_line[i] += step;
        logits[i] += step * call.gates.stride[axis], input_gate[i] += step * call.input_gate.stride[axis];
        if constexpr (Memory::kHasGates) output_gate[i] += step * call.output_gate.stride[axis];
      }
    }
    commit_copies();
    ++stage;
  }

  // Writes the records and words of stage `n` of the block.
  GSPN_DEVICE void prepare(int n, const Sites& sites) const {
    char* const gates = memory + Memory::gates(n);
#pragma unroll
    for (int i = 0; i < kSites; ++i) {
      const int piece = in_stage(i) * (kWideSites / kPiece) + position / kPiece;
      const Weights<float> d = differences(normalise(load(sites.logits[i][0]), load(sites.logits[i][1]),
                                                     load(sites.logits[i][2]), sites.has_minus, sites.has_plus));
      const bool goes_on = sites.goes_on[i];
      Records::write(Records::piece(gates, piece), position % kPiece,
                     {goes_on ? d.minus : 0.f, goes_on ? d.centre : 0.f, goes_on ? d.plus : 0.f});
      const auto words = [&](int from) {
        return reinterpret_cast<uint32_t*>(gates + from) + piece * Words::kPieceWords;
      };
      Words::write(words(Memory::kInputGate), position % kPiece, sites.input_gate[i]);
      if constexpr (Memory::kHasGates) Words::write(words(Memory::kOutputGate), position % kPiece, sites.output_gate[i]);
    }
  }

  // Helps with all stages: behind the barrier before a stage, x and gates of it and of the next one are there.
  GSPN_DEVICE void help() {
    Sites sites, first, second;
    fetch(first), fetch(second), fetch(sites);
    prepare(0, first), prepare(1, second);
    wait_copies_but<1>();
    __syncthreads();
#pragma unroll 1
    for (int n = 0; n < stages.count(); ++n) {
      prepare(n + 2, sites);
      fetch(sites);
      wait_copies_but<1>();
      __syncthreads();
    }
  }
};

// Scans 16 channels in one sense, of rows and then of columns, in a warp of its own.
template <typename Memory, typename T>
struct WideScanner {
  using Map = typename Memory::Map;
  static constexpr int kStage = Memory::kStage, kParts = kWideSites / kPart, kPieces = kWideSites / kPiece;

  char* const memory;
  const Problem& p;
  const TensorTile& tile;
  const WidePlan& plan;
  const int warp, lane, position, unit;  // position, unit: of its row of a piece's matrices
  const bool reversed;
  const FragmentLane at;
  const uint32_t one;     // its element of a diagonal matrix of ones
  int stage;              // of the block
  const char *x, *gates;  // of its sense in that stage; of that stage
  int in_line[kPieces];   // from x of a line to its row of the matrices
  float h[kParts][4], driven[kParts][4];  // driven: λx of the line that is scanned next, beside its weights
  LineOperands<kParts> d;

  GSPN_DEVICE WideScanner(char* memory_, const Problem& p_, const TensorTile& tile_, const WidePlan& plan_, int warp_,
                          int lane_, bool reversed_)
      : memory(memory_), p(p_), tile(tile_), plan(plan_), warp(warp_), lane(lane_),
        position(Map::matrix_position(lane_)), unit(Map::matrix_unit(lane_, warp_)), reversed(reversed_), at(lane_),
        one((std::is_same_v<T, BFloat16> ? 0x3f803f80u : 0x3c003c00u) & at.diagonal), stage(0),
        x(memory_ + Memory::kX + reversed_ * kStage * Map::kRowBytes), gates(memory_ + Memory::kGates) {
#pragma unroll
    for (int q = 0; q < kPieces; ++q) in_line[q] = Map::offset(0, q * kPiece + position, unit);
  }

  // The l-th line's first piece among those of the stage.
  GSPN_DEVICE int piece(int l) const { return (reversed * kStage + l) * kPieces; }
  GSPN_DEVICE void read_line(int l) {
    const uint32_t* const words =
        reinterpret_cast<const uint32_t*>(gates + Memory::kInputGate) + piece(l) * Words::kPieceWords;
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      uint32_t matrices[4];
      float of_piece[2][4];
      load_matrices<true>(matrices, x + l * Map::kRowBytes + in_line[q]);
      drive<T>(of_piece, matrices, Words::of_diagonal(words + q * Words::kPieceWords, at), at);
#pragma unroll
      for (int i = 0; i < 8; ++i) driven[2 * q + i / 4][i % 4] = of_piece[i / 4][i % 4];
    }
    d.load(gates + 16 + piece(l) * Records::kPieceBytes, at);
  }
  GSPN_DEVICE void next_stage() {
    ++stage;
    x += stage % Memory::kRing ? Memory::kStageBytes : (1 - Memory::kRing) * Memory::kStageBytes;
    gates += stage % Memory::kReady ? Memory::kGateBytes : (1 - Memory::kReady) * Memory::kGateBytes;
  }

  // sum += s u h, in the element type: h times s u is added to the sum inside a product with ones.
  GSPN_DEVICE void add_line(uint32_t (&sum)[kPieces][4], const float (&scale)[2], int l) const {
#pragma unroll
    for (int q = 0; q < kPieces; ++q) {
      float v[2][4], u[2][2] = {{1.f, 1.f}, {1.f, 1.f}};
      if constexpr (Memory::kHasGates) {
        Words::of_columns<T>(reinterpret_cast<const uint32_t*>(gates + Memory::kOutputGate) +
                                 (piece(l) + q) * Words::kPieceWords,
                             at, u);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) v[j][c] = scale[c / 2] * u[j][c % 2] * h[2 * q + j][c];
        const uint32_t part[2] = {sum[q][2 * j], sum[q][2 * j + 1]};
        mma_k8<T>(v[j], part, one);
      }
      pack_piece<T>(v, sum[q]);
    }
  }

  // Scans an axis, whose lines are rows or columns, in `stages` stages; adds: y has another axis' sum.
  template <bool kRows>
  GSPN_DEVICE void scan(int stages, bool adds) {
    const int direction = direction_of(kRows, reversed);
    // y of a stage's lower line, which is even, and from there to its rows of the matrices
    int line = reversed ? (stages - 1) * kStage : 0;
    const int step = reversed ? -kStage : kStage;
    char* y = memory + Memory::kY + Map::line_offset(kRows, line);
    int in_y[kPieces];
#pragma unroll
    for (int q = 0; q < kPieces; ++q) in_y[q] = Map::position_offset(kRows, q * kPiece + position, unit);
    const auto y_at = [&](int l, int q) {
      const int upper = reversed ? kStage - 1 - l : l;
      return y + upper * (Map::line_offset(kRows, 1) - Map::line_offset(kRows, 0)) +
             (in_y[q] ^ Map::line_exchange(kRows, line + upper));
    };
    const auto next_y = [&] {
      y += Map::line_offset(kRows, line + step) - Map::line_offset(kRows, line);
      line += step;
    };
    const auto is_new = [&](int n) { return !adds && 2 * n < stages; };  // nobody has added to a stage's lines

    if (plan.k[direction] < 0 || warp * kWarpRows >= plan.channels) {
#pragma unroll 1
      for (int n = 0; n < stages; ++n) {
        const uint32_t zeros[4] = {};
#pragma unroll
        for (int i = 0; i < kStage * kPieces && is_new(n); ++i)
          store_matrices<true>(y_at(i / kPieces, i % kPieces), zeros);
        next_y();
        next_stage();
        __syncthreads();
      }
      return;
    }

    float decay[2], scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* const factors = reinterpret_cast<const float*>(memory + Memory::kFactors) +
                                   direction * 2 * Map::kUnits * 8 + warp * kWarpRows + at.channel + i * 8;
      decay[i] = factors[0], scale[i] = factors[Map::kUnits * 8];
    }
    // bit n: it restarts at the n-th line that it reads
    const Lines<int> map(p, kRows);
    const int lane_line = nth_read(0, stages * kStage, lane, reversed);
    uint32_t restarts =
        __ballot_sync(kAllLanes, map.restarts(map.line_of(tile.row, tile.column) + lane_line, reversed));
#pragma unroll
    for (int i = 0; i < 4 * kParts; ++i) h[i / 4][i % 4] = 0.f;
    if (stages > 0) read_line(0);
#pragma unroll 1
    for (int n = 0; n < stages; ++n) {
#pragma unroll
      for (int l = 0; l < kStage; ++l) {
        char* const to[kPieces] = {y_at(l, 0), y_at(l, 1)};
        uint32_t sum[kPieces][4] = {};
        if (!is_new(n)) {
#pragma unroll
          for (int q = 0; q < kPieces; ++q) load_matrices<true>(sum[q], to[q]);
        }
        const bool goes_on = !(restarts >> l & 1);
        advance_parts(h, driven, {goes_on ? decay[0] : 0.f, goes_on ? decay[1] : 0.f}, d, NothingBeside());
        if (l + 1 < kStage) read_line(l + 1);
        add_line(sum, scale, l);
#pragma unroll
        for (int q = 0; q < kPieces; ++q) store_matrices<true>(to[q], sum[q]);
      }
      restarts >>= kStage;
      next_y();
      next_stage();
      if (n + 1 < stages) read_line(0);
      __syncthreads();
    }
  }
};

// Writes the tile's y, after the tail if the call has one: a warp a row at a time.
template <typename Memory, typename T>
GSPN_DEVICE void write_wide(const char* memory, const Forward<T>& call, const TensorTile& tile, const WidePlan& plan) {
  using Map = typename Memory::Map;
  constexpr int kSites = kWarp / Map::kUnits, kRounds = kWideSites / kSites;  // of a warp side by side; of a row
  const Problem& p = call.problem;
  const int unit = threadIdx.x % Map::kUnits, first = threadIdx.x % kWarp / Map::kUnits;
  const int channel = tile.group * plan.channels + unit * 8;
  const bool has_unit = unit * 8 < plan.channels;
  const float inverse_channels = 1.f / float(plan.channels);
  float direct[8] = {};
  if (call.direct && has_unit) {
#pragma unroll
    for (int i = 0; i < 8; ++i) direct[i] = call.direct[channel + i];
  }
#pragma unroll 1
  for (int row = threadIdx.x / kWarp; row < tile.height; row += Memory::kThreads / kWarp) {
    const T* const x = map_at(call.x, tile.batch, tile.row + row, tile.column + first, channel);
    T* const y = map_at(call.y, tile.batch, tile.row + row, tile.column + first, channel);
    float* const inverse_rms =
        call.inverse_rms +
        ((tile.batch * p.height + tile.row + row) * p.width + tile.column + first) * p.groups + tile.group;
    const auto is_real = [&](int round) { return has_unit && first + round * kSites < tile.width; };
    uint4 x_words[kRounds] = {};
    if (call.direct) {
#pragma unroll
      for (int i = 0; i < kRounds; ++i)
        if (is_real(i)) x_words[i] = *reinterpret_cast<const uint4*>(x + i * kSites * call.x.stride[2]);
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      uint4 words =
          *reinterpret_cast<const uint4*>(memory + Memory::kY + Map::offset(row, first + i * kSites, unit));
      if (call.direct) {
        float v[8], own_x[8], squares = 0.f;
        unpack_vector<T>(words, v);
        unpack_vector<T>(x_words[i], own_x);
#pragma unroll
        for (int c = 0; c < 8; ++c) squares += v[c] * v[c];
        if (!has_unit) squares = 0.f;
#pragma unroll
        for (int width = Map::kUnits / 2; width >= 1; width /= 2) squares += __shfl_xor_sync(kAllLanes, squares, width);
        const float inverse = inverse_root(squares * inverse_channels + kTailEpsilon);
#pragma unroll
        for (int c = 0; c < 8; ++c) v[c] = v[c] * inverse + direct[c] * own_x[c];
        words = pack_vector<T>(v);
        if (is_real(i) && unit == 0) inverse_rms[i * kSites * p.groups] = inverse;
      }
      if (is_real(i)) *reinterpret_cast<uint4*>(y + i * kSites * call.y.stride[2]) = words;
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
  const TensorTile tile(p, plan.grid, blockIdx.x);
  const WideStages<Memory::kStage> stages(tile, plan);

  // A product of 8 sites of a column has those that no row wrote as well: 0 times a NaN would be one.
  for (int i = stages.rows * Memory::kStage * Memory::Map::kRowBytes / 16 + thread; i < Memory::Map::kBytes / 16;
       i += Memory::kThreads)
    reinterpret_cast<float4*>(memory + Memory::kY)[i] = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int i = 0; i < Memory::kReady; ++i) Records::write_zeros(memory + Memory::gates(i), Memory::kStagePieces);
  if (thread < kScanThreads) {
    float* const factors = reinterpret_cast<float*>(memory + Memory::kFactors);
    for (int i = thread; i < 4 * kUnits * 8; i += kScanThreads) {
      const int direction = i / (kUnits * 8), channel = i % (kUnits * 8), k = plan.k[direction];
      const bool real = k >= 0 && channel < plan.channels;
      float* const to = factors + direction * 2 * kUnits * 8 + channel;
      to[0] = real ? of_channel(call.decay, p, k, tile.group * plan.channels + channel) : 0.f;
      to[kUnits * 8] = real ? of_channel(call.scale, p, k, tile.group * plan.channels + channel) : 0.f;
    }
    WideScanner<Memory, T> scanner(memory, call.problem, tile, plan, warp % (kUnits / 2), lane, warp >= kUnits / 2);
    __syncthreads();
    scanner.template scan<true>(stages.rows, false);
    scanner.template scan<false>(stages.columns, stages.rows > 0);
  } else {
    WideHelper<Memory, T>{call, tile, plan, stages, memory, thread - kScanThreads}.help();
  }
  write_wide<Memory>(memory, call, tile, plan);
}

}  // namespace gspn
