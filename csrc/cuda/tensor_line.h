// Lines of scans as fragments of tensor-core products.
//
// A warp holds h of 16 channels on a line: rows of a product are channels, columns are positions. Of 8 positions it is
// one accumulator of m16n8, here called a part of the line; 16 positions are a piece. Lane 4 g + t holds
//   c[0], c[1]: channel g,     positions 2t, 2t + 1        c[2], c[3]: channel g + 8, the same positions.
//
// One step (csrc/propagate.h) with W the tridiagonal matrix of a line's weights, whose rows sum to 1:
//   h' = W (f h) + λx = f h + λx + D (f h),    D = W - 1.
// f h + λx is computed in float32; D (f h) is a tf32 product, whose operands lose all but 11 bits. So what is carried
// from line to line is never rounded to tf32, and rows of D sum to 0 exactly (differences()): ones stay ones, but for the
// product's own sums, which tensor cores cut off at float32. λx is a product of 16-bit operands: x from shared memory
// times a diagonal matrix.
//
// The accumulator is the next step's left operand as it lies: the product sums over positions in any order, so its
// index κ stands for position 2κ (κ < 4) or 2 (κ - 4) + 1. Then a lane needs D[n][2t] and D[n][2t + 1] with n = g.
// Neighbouring parts meet in one number each way, which one more product adds: its left operand has the position
// behind the part at κ = 0 and the one before it at κ = 7.
//
// A scan that restarts at a line has f = 0 there: see Continues.
#pragma once

#include "cuda/device.h"
#include "cuda/tensor_core.h"
#include "cuda/tile_grid.h"
#include "scan.h"

namespace gspn {

// `value`, which the compiler takes for an unknown one: what follows from it is computed where it is used, not once
// before a loop that has no registers to keep it in.
GSPN_DEVICE int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

constexpr int kPart = 8, kPiece = 16;  // positions
constexpr int kWarpRows = 16;          // channels of a warp
constexpr int kTileSites = 16;         // rows and columns of a tile

GSPN_DEVICE uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The rows of D = W - 1 in tf32, so that they sum to 0 exactly: the neighbours' weights are rounded to multiples of a
// power of two, 2^-10 of their sum or less, and so their sum is exact, too. A NaN stays one.
GSPN_DEVICE Weights<float> differences(const Weights<float>& w) {
  const float sum = w.minus + w.plus;
  // 1.5 · 2^13 · 2^⌊log2 sum⌋, whose last bit is worth 2^-10 · 2^⌊log2 sum⌋
  const float grid = from_bits((to_bits(sum) & 0x7f800000u) + (13u << 23 | 0x00400000u));
  const float minus = (w.minus + grid) - grid, plus = (w.plus + grid) - grid;
  return {minus, -(minus + plus), plus};
}

// Eight 16-bit elements, the first in the low half of the first word.
template <typename T>
GSPN_DEVICE void unpack_vector(const uint4& words, float (&v)[8]) {
  unpack(T(), words.x, v), unpack(T(), words.y, v + 2), unpack(T(), words.z, v + 4), unpack(T(), words.w, v + 6);
}
template <typename T>
GSPN_DEVICE uint4 pack_vector(const float (&v)[8]) {
  return {pack<T>(v), pack<T>(v + 2), pack<T>(v + 4), pack<T>(v + 6)};
}

// What a lane reads of records and words: see Records and Words.
struct FragmentLane {
  int channel, pair;      // g and t: of the lane's row, and of its columns 2t and 2t + 1
  int band, corner;       // bytes from a piece's records to the lane's operands
  uint32_t diagonal;      // the half of a word that the lane has of a diagonal matrix

  GSPN_DEVICE explicit FragmentLane(int lane) : channel(lane / 4), pair(lane % 4) {
    const int g = channel, t = pair, d = 2 * t - g;
    const int zeros = g / 2 % 2 ? 256 : -16;  // those that share no bank with the records read together with them
    band = d >= -2 && d <= 1 ? g * 32 + (d >= 0) * 16 : zeros;
    corner = g == 7 && t == 0 ? g * 32 + 16 : g == 0 && t == 3 ? 0 : zeros;
    diagonal = t != g / 2 ? 0u : g % 2 ? 0xffff0000u : 0x0000ffffu;
  }
};

// A line's rows of a tridiagonal matrix in shared memory, so that a lane has its operands for both parts of a piece in
// one load of 16 bytes. A position has the four floats (0, minus, centre, plus) if it is even, (minus, centre, plus,
// 0) if odd: whichever two of these a lane needs lie together. The first and the second two floats of positions g and
// g + 8 of a piece lie side by side: (first of g, first of g + 8), (second of g, second of g + 8). Before the first
// piece, and behind each, lie four zeros.
//
// The adjoint step is the same with the transposed matrix: position m then has minus = the plus of m - 1 and plus = the
// minus of m + 1.
struct Records {
  static constexpr int kPieceBytes = 256 + 16;

  // Bytes for `pieces` one after another, lines of any number of them. The first piece is at `data` + 16.
  static GSPN_INLINE constexpr int bytes(int pieces) { return 16 + pieces * kPieceBytes; }
  static GSPN_DEVICE char* piece(char* data, int index) { return data + 16 + index * kPieceBytes; }

  // Writes the zeros before and behind `pieces` of them. All threads of the block take part.
  static GSPN_DEVICE void write_zeros(char* data, int pieces) {
    for (int i = threadIdx.x; i <= pieces; i += blockDim.x)
      *reinterpret_cast<float4*>(data + i * kPieceBytes) = make_float4(0.f, 0.f, 0.f, 0.f);
  }
  // Where the n-th of a position's four floats lies, in bytes from the records of its piece. Int: of unsigned numbers a
  // remainder is a mask.
  template <typename Int>
  static GSPN_DEVICE Int at(Int position, Int n) {
    return position % 8 * 32 + n / 2 * 16 + position / 8 * 8 + n % 2 * 4;
  }
  // The same of the number for its neighbour -1, 0 or +1.
  template <typename Int>
  static GSPN_DEVICE Int of_neighbour(Int position, int neighbour) {
    return at(position, Int(neighbour + 2) - position % 2);
  }
  // Writes a position's row; `position` counts from the piece's first.
  static GSPN_DEVICE void write(char* piece, int position, const Weights<float>& row) {
    const bool odd = position % 2;
    *reinterpret_cast<float2*>(piece + at(position, 0)) =
        make_float2(odd ? row.minus : 0.f, odd ? row.centre : row.minus);
    *reinterpret_cast<float2*>(piece + at(position, 2)) =
        make_float2(odd ? row.plus : row.centre, odd ? 0.f : row.plus);
  }
  // Writes one number of a position's row: of its neighbour -1, 0 or +1.
  static GSPN_DEVICE void write_one(char* piece, int position, int neighbour, float value) {
    *reinterpret_cast<float*>(piece + of_neighbour(position, neighbour)) = value;
  }
  // Writes column `position` of a matrix as a row of the transposed one, of which this piece is all: what lies beyond
  // its 16 positions is left out. One thread writes for each position of the piece; no two write the same number.
  static GSPN_DEVICE void write_transposed(char* piece, unsigned position, const Weights<float>& row) {
    const bool before = position > 0, behind = position + 1 < kPiece;
    const auto put = [&](unsigned at, float value) { *reinterpret_cast<float*>(piece + at) = value; };
    put(of_neighbour(position, 0), row.centre);
    // in the place of what is left out, the 0 that no position writes
    put(before ? of_neighbour(position - 1, 1) : of_neighbour(position, -1), before ? row.minus : 0.f);
    put(behind ? of_neighbour(position + 1, -1) : of_neighbour(position, 1), behind ? row.plus : 0.f);
    put(at(position, position % 2 ? 3u : 0u), 0.f);
  }
};

// λ or u of a piece's positions in shared memory, a word each, whose halves are both the element: positions g and g + 8
// lie side by side.
struct Words {
  static constexpr int kPieceWords = kPiece;

  static GSPN_DEVICE int at(int position) { return position % 8 * 2 + position / 8; }
  template <typename T>
  static GSPN_DEVICE void write(uint32_t* piece, int position, T value) {
    piece[at(position)] = uint32_t(value.bits) * 0x00010001u;
  }
  // A lane's words for diagonal matrices: of positions g of either part.
  static GSPN_DEVICE uint2 of_diagonal(const uint32_t* piece, const FragmentLane& at) {
    return *reinterpret_cast<const uint2*>(piece + at.channel * 2);
  }
  // The values at a lane's columns: v[part][0 or 1] at position 2t or 2t + 1.
  template <typename T>
  static GSPN_DEVICE void of_columns(const uint32_t* piece, const FragmentLane& at, float (&v)[2][2]) {
    const uint4 words = *reinterpret_cast<const uint4*>(piece + at.pair * 4);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float both[2];
      unpack(T(), word[i], both);
      v[i % 2][i / 2] = both[1];
    }
  }
};

// A lane's operands of D for kParts parts, an even number.
template <int kParts>
struct LineOperands {
  float band[kParts][2], corner[kParts][2];

  GSPN_DEVICE void load(const char* piece, const FragmentLane& at) {
#pragma unroll
    for (int q = 0; q < kParts / 2; ++q) {
      const float4 b = *reinterpret_cast<const float4*>(piece + q * Records::kPieceBytes + at.band);
      const float4 c = *reinterpret_cast<const float4*>(piece + q * Records::kPieceBytes + at.corner);
      band[2 * q][0] = b.x, band[2 * q][1] = b.y, band[2 * q + 1][0] = b.z, band[2 * q + 1][1] = b.w;
      corner[2 * q][0] = c.x, corner[2 * q][1] = c.y, corner[2 * q + 1][0] = c.z, corner[2 * q + 1][1] = c.w;
    }
  }
};

// λx of a piece: x[0 … 3] are its matrices of positions 0-7 | 8-15 and channels 0-7 | 8-15, transposed.
template <typename T>
GSPN_DEVICE void drive(float (&driven)[2][4], const uint32_t (&x)[4], const uint2& words, const FragmentLane& at) {
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const uint32_t a[2] = {x[2 * part], x[2 * part + 1]};
#pragma unroll
    for (int c = 0; c < 4; ++c) driven[part][c] = 0.f;
    mma_k8<T>(driven[part], a, (part ? words.y : words.x) & at.diagonal);
  }
}

// h as the left operand of a product over positions, times factor[0] for channel g and factor[1] for g + 8.
GSPN_DEVICE void as_operand(float (&a)[4], const float (&h)[4], const float (&factor)[2]) {
  a[0] = factor[0] * h[0], a[1] = factor[1] * h[2], a[2] = factor[0] * h[1], a[3] = factor[1] * h[3];
}

// h beside a line that ends within the map: `value` of channels g and g + 8 at the position before the line in lanes
// with t = 3, behind it in lanes with t = 0, and anything finite in the others; times the line's factor.
struct Beside {
  float value[2];
};
struct NothingBeside {};

// One step: line = W (factor line) + driven, for the parts of a line that a warp has.
template <int kParts, typename Neighbours>
GSPN_DEVICE void advance_parts(float (&line)[kParts][4], const float (&driven)[kParts][4], const float (&factor)[2],
                               const LineOperands<kParts>& d, const Neighbours& beside) {
  float a[kParts][4];
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    as_operand(a[j], line[j], factor);
#pragma unroll
    for (int c = 0; c < 4; ++c) line[j][c] = factor[c / 2] * line[j][c] + driven[j][c];
  }
#pragma unroll
  for (int j = 0; j < kParts; ++j) mma_tf32(line[j], a[j], d.band[j]);
#pragma unroll
  for (int j = 0; j < kParts; ++j) {
    // the position behind a part is at κ = 0 of the next one's first half, the one before it at κ = 7
    const float behind[2] = {a[(j + 1) % kParts][0], a[(j + 1) % kParts][1]};
    const float before[2] = {a[(j + kParts - 1) % kParts][2], a[(j + kParts - 1) % kParts][3]};
    if (j + 1 < kParts) mma_tf32_k4(line[j], behind, d.corner[j][0]);
    if (j > 0) mma_tf32_k4(line[j], before, d.corner[j][1]);
    if constexpr (std::is_same_v<Neighbours, Beside>) {
      if (j + 1 == kParts) mma_tf32_k4(line[j], beside.value, d.corner[j][0]);
      if (j == 0) mma_tf32_k4(line[j], beside.value, d.corner[j][1]);
    }
  }
}

// The borders of an axis' spans among 16 tokens from `first` on: bit i stands for one before token first + i, of which
// the last bit is 16.
GSPN_DEVICE uint32_t borders(const Spans<int>& spans, int first) {
  const int into = spans.is_cut() ? (first + spans.missing) % spans.size : first;  // a division is slow
  uint32_t bits = first == 0;
  for (int i = into ? spans.size - into : 0; i <= kTileSites; i += spans.size) bits |= 1u << i;
  const int left = spans.length - first;
  if (left <= kTileSites) bits |= 1u << left;
  return bits;
}

// For 16 lines of the map from `first` on: whether a scan goes on at line first + i, or restarts there.
struct Continues {
  uint32_t restarts;

  GSPN_DEVICE Continues(const Lines<int>& map, int first, bool reversed)
      : restarts(borders(map.chunks, first) >> reversed) {}
  GSPN_DEVICE bool at(int i) const { return !(restarts >> i & 1); }
};

// A tile of kSites × kSites sites in shared memory: kChannels 16-bit elements of each, in units of 16 bytes. Units are
// exchanged within 128 bytes so that 8 neighbouring sites (from an even multiple of 8 on) of a row, or of a column,
// lie in different banks. Sites of 48 channels have room for 64.
template <int kChannels, int kSites = kTileSites>
struct TileMemory {
  static constexpr int kUnits = (kChannels == 48 ? 64 : kChannels) / 8;
  static constexpr int kTogether = 8 / kUnits;  // sites in 128 bytes
  static constexpr int kRowBytes = kSites * kUnits * 16, kBytes = kSites * kRowBytes;

  static GSPN_DEVICE int offset(int row, int column, int unit) {
    const int group = column / kTogether, place = column % kTogether * kUnits + unit;
    return row * kRowBytes + group * 128 + ((place ^ row ^ group) & 7) * 16;
  }
  // The same in two steps, for lines that are rows or columns: the offset at a line is
  // line_offset() + (position_offset() ^ line_exchange()).
  static GSPN_DEVICE int position_offset(bool rows, int position, int unit) {
    return rows ? offset(0, position, unit) : offset(position, 0, unit);
  }
  static GSPN_DEVICE int line_offset(bool rows, int line) { return rows ? line * kRowBytes : line / kTogether * 128; }
  static GSPN_DEVICE int line_exchange(bool rows, int line) {
    return (rows ? line & 7 : (line % kTogether * kUnits ^ line / kTogether) & 7) * 16;
  }
  // A lane's row of the four matrices of a piece, which load_matrices() and store_matrices() take: the position, and
  // the unit of a warp that has channels 16 · warp ….
  static GSPN_DEVICE int matrix_position(int lane) { return lane % 8 + lane / 16 * 8; }
  static GSPN_DEVICE int matrix_unit(int lane, int warp) { return 2 * warp + lane / 8 % 2; }
};

// For 16 positions of a line from `first` on: which neighbours position first + i has.
struct PositionEnds {
  uint32_t ends;  // bit i: first + i begins a line, or a window's part of one; bit i + 1: it ends one

  GSPN_DEVICE PositionEnds(const Lines<int>& map, int first) : ends(borders(map.windows, first)) {}
  GSPN_DEVICE bool has_minus(int i) const { return !(ends >> i & 1); }
  GSPN_DEVICE bool has_plus(int i) const { return !(ends >> (i + 1) & 1); }
};

// The block's tile and group. Neighbouring blocks have neighbouring groups, whose gates share sectors of memory.
struct TensorTile {
  int64_t batch;
  int group, row, column, height, width;  // its first row and column, and its size
  unsigned number;                        // among the tiles of all images

  GSPN_DEVICE TensorTile(const Problem& p, const TileGrid& grid, unsigned block) {
    const unsigned groups = unsigned(p.groups), tiles = unsigned(grid.count());
    group = int(block % groups);
    number = block / groups;
    const unsigned tile = number % tiles;
    batch = number / tiles;
    const int down = int(tile / unsigned(grid.across)), across = int(tile % unsigned(grid.across));
    row = grid.rows.begin(down), height = grid.rows.end(down) - row;
    column = grid.columns.begin(across), width = grid.columns.end(across) - column;
  }
  GSPN_DEVICE bool has(int r, int c) const { return r < height && c < width; }
};

// A site's gates in all directions, as they are read. kPacked: as gates_are_packed() says, in two loads.
template <typename T>
struct SiteGates {
  T logits[4][3], input_gate[4];

  template <bool kPacked, typename Call>
  GSPN_DEVICE void read(const Call& call, int64_t batch, int row, int column, int group) {
    if constexpr (kPacked) {
      const uint4* from = reinterpret_cast<const uint4*>(gate_at(call.gates, 5, batch, row, column, 0, group));
      const uint4 low = from[0], high = from[1];
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const T value{uint16_t(words[i / 2] >> (i % 2 * 16))};
        if (i < 12) logits[i / 3][i % 3] = value;
        else input_gate[i - 12] = value;
      }
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (k >= call.problem.num_directions) break;
        const T* from = gate_at(call.gates, 5, batch, row, column, k, group);
#pragma unroll
        for (int n = 0; n < 3; ++n) logits[k][n] = from[n * call.gates.stride[4]];
        input_gate[k] = *gate_at(call.input_gate, 4, batch, row, column, k, group);
      }
    }
  }
};

// Whether a group's gates of four directions lie in 32 aligned bytes: 12 logits, then 4 input gates.
template <typename Call>
bool gates_are_packed(const Call& call) {
  const Problem& p = call.problem;
  const auto &gates = call.gates, &input_gate = call.input_gate;
  const int64_t size[3] = {p.batch, p.height, p.width};
  bool packed = p.num_directions == 4 && gates.stride[3] == 3 && gates.stride[4] == 1 && input_gate.stride[3] == 1 &&
                input_gate.data == gates.data + 12 && reinterpret_cast<uintptr_t>(gates.data) % 16 == 0;
  for (int axis = 0; axis < 3; ++axis)
    packed = packed && (size[axis] == 1 ||
                        (gates.stride[axis] == input_gate.stride[axis] && gates.stride[axis] % 8 == 0));
  return packed && (p.groups == 1 || (gates.stride[5] == input_gate.stride[4] && gates.stride[5] % 8 == 0));
}

}  // namespace gspn
