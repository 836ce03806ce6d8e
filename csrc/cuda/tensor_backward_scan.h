// A warp's scan of a tile in one direction on tensor cores, forward and back: what tensor_backward() is made of.
//
// With h_i = f W_i h_{i-1} + λ_i x_i of a direction, and dy the gradient of y = Σ s u h:
//   dh_i = s u_i dy_i + f carry_i,    carry_i = W_{i+1}^T dh_{i+1},
//   dx_i += λ_i dh_i,    dλ_i = Σ_c dh_i x_i,    du_i = Σ_c s dy_i h_i,
//   dW_i[n][m] = Σ_c f dh_i[n] h_{i-1}[m],    df = Σ h_i carry_i,    ds = Σ u_i dy_i h_i,
// where Σ_c adds up the group's channels and a plain Σ all tokens. (df: each h_i[m] W_{i+1}[n][m] dh_{i+1}[n] is there
// once, whether it is counted at the line i or i + 1.)
//
// s is one number per channel and direction, so it is left out of the recursion: below, d = dh / s and carry = W^T d.
//
// Everything is a product of fragments (cuda/tensor_line.h), one line and 16 channels of a warp at a time:
//   d           is the left operand of d W as it lies; f carry + u dy is computed in float32;
//   df, ds      are diagonals of products over positions, with channels as rows and columns;
//   dλ, du, dW  are diagonals of products over channels, with positions as rows and columns: s d, in 16-bit elements,
//               is transposed in registers, once for dλ and dW; f goes to h;
//   dx          is s d times a diagonal matrix, added to what other directions have left there.
// A warp first scans forward and leaves h of every line in shared memory, as 16-bit elements; then back. Sums over
// channels of a line replace its h, which is not needed any more; after the scan the block adds up the warps' sums in
// order, so two runs give the same bits.
#pragma once

#include "cuda/tensor_line.h"

namespace gspn {

// Shared memory: x, dy and dx, f and s, what a tail has, and then for each of the senses that run at once its h and
// gates. kUnits: TileMemory<>::kUnits of the group's channels.
template <int kUnits, bool kTiled>
struct BackwardMemory {
  using Map = TileMemory<kUnits * 8>;
  static constexpr int kWarps = kUnits / 2;  // of a sense, each with 16 channels
  static constexpr int kThreads = 32 * (kUnits > 4 ? kUnits : 4);  // more than scan where groups are small
  static constexpr int kX = 0, kGrad = Map::kBytes, kGradX = 2 * Map::kBytes;
  static constexpr int kChannelBytes = kUnits * 8 * 4;  // of a float a channel
  static constexpr int kFactors = 3 * Map::kBytes;      // [direction][f, s][channel]
  static constexpr int kDirect = kFactors + 4 * 2 * kChannelBytes, kInverseRms = kDirect + kChannelBytes;
  static constexpr int kDirectSums = kInverseRms + kTileSites * kTileSites * 4;  // [warp][channel]
  // a multiple of 128, as all maps: see at()
  static constexpr int kSenses = (kDirectSums + kThreads / kWarp * kChannelBytes + 127) / 128 * 128;
  // of a sense
  static constexpr int kHidden = 0, kForward = Map::kBytes, kAdjoint = kForward + Records::bytes(kTileSites);
  static constexpr int kInput = kAdjoint + Records::bytes(kTileSites);
  static constexpr int kOutput = kInput + kTileSites * Words::kPieceWords * 4;
  // What a tile needs from beyond it, of which each sense has: [position][unit], h of the line before the first that is
  // read, and carry from the line after the last; [line][before, behind][unit], see copy_edges().
  static constexpr int kStart = (kOutput + kTileSites * Words::kPieceWords * 4 + 127) / 128 * 128;
  static constexpr int kCarry = kStart + kTiled * Map::kRowBytes, kSide = kCarry + kTiled * Map::kRowBytes;
  static constexpr int kSideLine = 2 * kUnits * 16, kCarrySide = kSide + kTiled * kTileSites * kSideLine;
  static constexpr int kSenseBytes = kCarrySide + kTiled * kTileSites * kSideLine;
  static constexpr int bytes(bool both_senses) { return kSenses + (both_senses ? 2 : 1) * kSenseBytes; }
};

// 1 in both halves of a word.
template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, BFloat16> ? 0x3f803f80u : 0x3c003c00u;

template <typename T>
GSPN_DEVICE uint32_t bits_of(float value) {
  T element;
  store(element, value);
  return element.bits;
}

// f or s of the channels that a lane has in the right operand of a product over channels: as two pairs of 16-bit
// elements, and what is left of them.
template <typename T>
struct FactorPairs {
  uint32_t high[2], low[2];

  GSPN_DEVICE FactorPairs(const float* factor, const FragmentLane& at) {  // `factor` of the warp's first channel
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float v[2], rounded[2];
      load_vector(factor + 8 * i + 2 * at.pair, v);
      high[i] = pack<T>(v);
      unpack(T(), high[i], rounded);
#pragma unroll
      for (int n = 0; n < 2; ++n) v[n] -= rounded[n];
      low[i] = pack<T>(v);
    }
  }
  // A word of channels 0-7, i = 0, or 8-15 of the warp, multiplied.
  GSPN_DEVICE uint32_t scale(uint32_t word, int i) const {
    return multiply_add_pairs<T>(word, high[i], multiply_add_pairs<T>(word, low[i], 0u));
  }
  // The same of the matrices of a piece, as load_matrices() reads them.
  GSPN_DEVICE void scale(uint32_t (&r)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = scale(r[i], i % 2);
  }
};

// What a step forward reads from shared memory, one line ahead of its use. `here`: at(line, piece).
struct ForwardOperands {
  int here;
  uint32_t x[4];
  uint2 input;
  LineOperands<2> d;
};

// What a step back reads from shared memory one line ahead of its use: the rest is used later in the step.
struct AdjointOperands {
  int here;
  uint32_t grad[4];
  uint2 output;
  LineOperands<2> d;
};

// The sums for df and ds: of channels 0-7 | 8-15 of a warp, as the diagonals of products.
struct FactorProducts {
  float decay[2][4], scale[2][4];
};

// A warp's scan of a tile in one direction, forward and back. `line` counts in map order.
template <typename T, int kUnits, bool kTiled, bool kGates>
struct TensorScan {
  using Memory = BackwardMemory<kUnits, kTiled>;
  using Map = typename Memory::Map;
  static constexpr int kWordBytes = Words::kPieceWords * 4;
  char* const memory;
  const Continues continues;
  const bool rows, reversed;
  const int lines, pitch;
  const float (&decay)[2], (&scale)[2];  // of a lane's channels g and g + 8
  const FactorPairs<T>&decay_pairs, &scale_pairs;
  // Where a lane's operands and results are, but for the line. In a map: its row of the matrices of a piece (`swapped`:
  // the second exchanged with the third). In h: `hidden` to add to it, and the lane's sums of positions g and g + 8,
  // see write_sums().
  int piece, swapped, hidden, hidden_swapped, hidden_sums[2];
  int input, output;
  FragmentLane forward_records, adjoint_records;
  int edge, side_beside, side_rows, carry_side;  // of tiles: see the constructor

  GSPN_DEVICE TensorScan(char* memory_, int own, const FragmentLane& fragment, const Continues& continues_, bool rows_,
                         bool reversed_, int lines_, int warp, const float (&decay_)[2], const float (&scale_)[2],
                         const FactorPairs<T>& decay_pairs_, const FactorPairs<T>& scale_pairs_)
      : memory(memory_), continues(continues_), rows(rows_), reversed(reversed_), lines(lines_),
        pitch(rows_ ? Map::kRowBytes : 128), decay(decay_), scale(scale_), decay_pairs(decay_pairs_),
        scale_pairs(scale_pairs_), forward_records(fragment), adjoint_records(fragment) {
    const int lane = threadIdx.x % kWarp;
    piece = Map::position_offset(rows, Map::matrix_position(lane), Map::matrix_unit(lane, warp));
    swapped = Map::position_offset(rows, lane % 16, 2 * warp + lane / 16);
    hidden = own + Memory::kHidden, hidden_swapped = hidden + swapped;
    const int g = fragment.channel, t = fragment.pair, d = 2 * t - g;
    const int second = d == 0 || d == 1 || (g == 7 && t == 0) ? 8 : 0;  // of a unit's four floats, the last two
#pragma unroll
    for (int i = 0; i < 2; ++i)
      hidden_sums[i] = hidden + Map::position_offset(rows, g + 8 * i, 2 * warp) + second;
    input = own + Memory::kInput + fragment.channel * 8, output = own + Memory::kOutput + fragment.channel * 8;
    forward_records.band += own + Memory::kForward, forward_records.corner += own + Memory::kForward;
    adjoint_records.band += own + Memory::kAdjoint, adjoint_records.corner += own + Memory::kAdjoint;
    edge = own + Map::position_offset(true, Map::matrix_position(lane), Map::matrix_unit(lane, warp));
    // A lane's row of two matrices, channels 0-7 | 8-15. Transposed, lanes with t = 0 get rows 0 and 1 and those with
    // t = 3 rows 6 and 7: of h the position behind and the one before the tile, of carry what comes from before and
    // from behind.
    const int unit = 2 * warp + lane / 8 % 2, row = lane % 8;
    const auto beside = [&](int which, bool behind) { return own + which + (behind * kUnits + unit) * 16; };
    side_beside = beside(Memory::kSide, row < 2);
    carry_side = beside(Memory::kCarrySide, row >= 4);
    side_rows = beside(Memory::kSide, row % 2);  // not transposed: even columns have the position before the tile
  }
  // A line at `place` as accumulators.
  GSPN_DEVICE void load_edge(float (&v)[2][4], int place) const {
    uint32_t r[4];
    load_matrices<true>(r, memory + place + edge);
#pragma unroll
    for (int i = 0; i < 4; ++i) unpack(T(), r[i], v[i / 2] + i % 2 * 2);
  }
  // The second of each pair that a lane gets of two matrices.
  GSPN_DEVICE void load_beside(float (&v)[2], int place, int line) const {
    uint32_t r[2];
    load_matrices<true>(r, memory + place + line * Memory::kSideLine);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float both[2];
      unpack(T(), r[i], both);
      v[i] = both[1];
    }
  }
  GSPN_DEVICE int at(int line, int place) const {  // maps begin at multiples of 128, within which units are exchanged
    if constexpr (Map::kTogether == 1) return line * pitch + (place ^ Map::line_exchange(true, line));
    return Map::line_offset(rows, line) + (place ^ Map::line_exchange(rows, line));
  }
  GSPN_DEVICE uint2 words(int place, int line) const {
    return *reinterpret_cast<const uint2*>(memory + place + line * kWordBytes);
  }
  static GSPN_DEVICE void pack_piece(uint32_t (&packed)[4], const float (&v)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack<T>(v[i / 2] + i % 2 * 2);
  }
  // The line after `line` in a direction; what is read of the one after the last is not used.
  static GSPN_DEVICE int next(int line, int direction) { return (line + direction) & (kTileSites - 1); }
  // Calls step(line, operands of it, those of the next line) for `count` lines from `line` on.
  template <typename Operands, typename Load, typename Step>
  static GSPN_DEVICE void each_line(int line, int count, int direction, Load load, Step step) {
    Operands even, odd;
    load(even, line);
#pragma unroll 1
    for (; count > 0; count -= 2) {
      step(line, even, odd);
      if (count == 1) break;
      line = next(line, direction);
      step(line, odd, even);
      line = next(line, direction);
    }
  }

  GSPN_DEVICE int first_read() const { return reversed ? lines - 1 : 0; }
  // Whether a line restarts the scan but for the first one that is read: else f is the same for all lines.
  GSPN_DEVICE bool restarts() const { return continues.restarts & ((1u << lines) - 1u) & ~(1u << first_read()); }

  // Leaves h of every line in shared memory. kRestarts: restarts().
  template <bool kRestarts>
  GSPN_DEVICE void forward() const {
    float h[2][4] = {};
    if (kTiled && continues.at(first_read())) load_edge(h, Memory::kStart);
    const int direction = reversed ? -1 : 1;
    const auto load = [&](ForwardOperands& to, int line) {
      to.here = at(line, piece);
      load_matrices<true>(to.x, memory + Memory::kX + to.here);
      to.input = words(input, line);
      to.d.load(Records::piece(memory, line), forward_records);
    };
    each_line<ForwardOperands>(
        first_read(), lines, direction, load,
        [&](int line, const ForwardOperands& now, ForwardOperands& ahead) {
          load(ahead, next(line, direction));
          const float goes_on = kRestarts && !continues.at(line) ? 0.f : 1.f;
          const float factor[2] = {goes_on * decay[0], goes_on * decay[1]};
          float driven[2][4];
          drive<T>(driven, now.x, now.input, forward_records);
          if constexpr (kTiled) {
            Beside beside;
            load_beside(beside.value, side_beside, line);
#pragma unroll
            for (int i = 0; i < 2; ++i) beside.value[i] *= factor[i];
            advance_parts<2>(h, driven, factor, now.d, beside);
          } else {
            advance_parts<2>(h, driven, factor, now.d, NothingBeside());
          }
          uint32_t packed[4];
          pack_piece(packed, h);
          store_matrices<true>(memory + now.here + hidden, packed);
        });
    __syncwarp();
  }

  // `count` lines from `line` on, against the scan's sense. carry: from the line after, and then for the line before.
  template <bool kRestarts>
  GSPN_DEVICE void back(int line, int count, float (&carry)[2][4], FactorProducts& products) const {
    const int direction = reversed ? 1 : -1;
    const auto load = [&](AdjointOperands& to, int line) {
      to.here = at(line, piece);
      load_matrices<true>(to.grad, memory + Memory::kGrad + to.here);
      if constexpr (kGates) to.output = words(output, line);
      else to.output = uint2{kOnes<T>, kOnes<T>};
      to.d.load(Records::piece(memory, line), adjoint_records);
    };
    each_line<AdjointOperands>(line, count, direction, load,
                               [&](int line, const AdjointOperands& now, AdjointOperands& ahead) {
                                 load(ahead, next(line, direction));
                                 step_back<kRestarts>(line, ahead.here, carry, products, now);
                               });
  }

  // before: at(the line before, piece).
  template <bool kRestarts>
  GSPN_DEVICE void step_back(int line, int before, float (&carry)[2][4], FactorProducts& products,
                             const AdjointOperands& now) const {
    const int here = now.here;
    uint32_t x[4], h[4], hidden_before[4], dx_before[4];
    load_matrices<true>(h, memory + at(line, hidden_swapped));
    load_matrices<false>(x, memory + Memory::kX + here);
    before += hidden;
    uint32_t hidden_beside[2];
    if constexpr (kTiled) {
      if (line == first_read()) before = Memory::kStart + edge;
      load_matrices<false>(hidden_beside, memory + side_rows + line * Memory::kSideLine);
    }
    load_matrices<false>(hidden_before, memory + before);
    load_matrices<true>(dx_before, memory + Memory::kGradX + here);
    const uint2 input_words = words(input, line);
    uint32_t grad[4], hidden_rows[4];  // as operands of products over channels
    if constexpr (kGates) {
      load_matrices<false>(grad, memory + Memory::kGrad + at(line, swapped));
      load_matrices<false>(hidden_rows, memory + here + hidden);
    }

    float driven[2][4], d[2][4];  // u dy
    drive<T>(driven, now.grad, now.output, adjoint_records);
    uint32_t carried[4];
    pack_piece(carried, carry);
#pragma unroll
    for (int c = 0; c < 8; ++c) d[c / 4][c % 4] = decay[c % 4 / 2] * carry[c / 4][c % 4] + driven[c / 4][c % 4];
    hand_back(carry, d, now.d, kRestarts && !continues.at(line) ? 0.f : 1.f);
    if constexpr (kTiled) {
      const float at_first = adjoint_records.pair == 0, at_last = adjoint_records.pair == 3;
      float beside[2];
      load_beside(beside, carry_side, line);
#pragma unroll
      for (int i = 0; i < 2; ++i) carry[0][2 * i] += at_first * beside[i], carry[1][2 * i + 1] += at_last * beside[i];
    }

    uint32_t gated[4] = {now.grad[0], now.grad[1], now.grad[2], now.grad[3]};
    if constexpr (kGates) pack_piece(gated, driven);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t of_channels[2] = {h[2 * half], h[2 * half + 1]};
      mma_k16<T>(products.decay[half], carried, of_channels);
      mma_k16<T>(products.scale[half], gated, of_channels);
    }

#pragma unroll
    for (int c = 0; c < 8; ++c) d[c / 4][c % 4] *= scale[c % 4 / 2];
    uint32_t dh[4];
    pack_piece(dh, d);
    float dx[2][4];
    drive<T>(dx, dx_before, uint2{kOnes<T>, kOnes<T>}, adjoint_records);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const uint32_t a[2] = {dh[2 * part], dh[2 * part + 1]};
      mma_k8<T>(dx[part], a, (part ? input_words.y : input_words.x) & adjoint_records.diagonal);
    }
    const uint32_t dh_rows[4] = {transpose_matrix(dh[0]), transpose_matrix(dh[2]), transpose_matrix(dh[1]),
                                 transpose_matrix(dh[3])};
    float of_input[2][4] = {}, of_output[2][4] = {}, of_weights[2][4] = {};
    decay_pairs.scale(hidden_before);
    if constexpr (kGates) scale_pairs.scale(hidden_rows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      mma_k16<T>(of_input[half], dh_rows, {x[2 * half], x[2 * half + 1]});
      mma_k16<T>(of_weights[half], dh_rows, {hidden_before[2 * half], hidden_before[2 * half + 1]});
      if constexpr (kGates) mma_k16<T>(of_output[half], grad, {hidden_rows[2 * half], hidden_rows[2 * half + 1]});
    }
    uint32_t packed[4];
    pack_piece(packed, dx);
    store_matrices<true>(memory + Memory::kGradX + here, packed);
    const int sums[2] = {at(line, hidden_sums[0]), at(line, hidden_sums[1])};
    write_sums(sums, of_weights, of_input, of_output);
    if constexpr (kTiled) {  // the first position with the one before the tile, the last with the one behind
#pragma unroll
      for (int i = 0; i < 2; ++i) hidden_beside[i] = decay_pairs.scale(hidden_beside[i], i);
      float of_beside[4] = {};
      mma_k16<T>(of_beside, dh_rows, hidden_beside);
      if (threadIdx.x % kWarp == 0) *reinterpret_cast<float*>(memory + sums[0] - 4) = of_beside[0];
      if (threadIdx.x % kWarp == kWarp - 1) *reinterpret_cast<float*>(memory + sums[1] + 8) = of_beside[3];
    }
  }

  // carry = W^T d for the line before; goes_on: 0 where the scan restarts, whose weights are 0, else 1.
  static GSPN_DEVICE void hand_back(float (&carry)[2][4], const float (&d)[2][4], const LineOperands<2>& transposed,
                                    float goes_on) {
    float a[2][4];
    constexpr float one[2] = {1.f, 1.f};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      as_operand(a[j], d[j], one);
#pragma unroll
      for (int c = 0; c < 4; ++c) carry[j][c] = goes_on * d[j][c];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_tf32(carry[j], a[j], transposed.band[j]);
    mma_tf32_k4(carry[0], {a[1][0], a[1][1]}, transposed.corner[0][0]);  // from the position behind the first part
    mma_tf32_k4(carry[1], {a[0][2], a[0][3]}, transposed.corner[1][1]);  // from the one before the second
  }

  // Writes a line's sums over the warp's channels in the place of its h. Of a site, the first unit of 16 bytes has
  // those for dW, four floats as Records has them of a row; the second has those for dλ and du, see input_sum().
  // Numbers that lie beyond the tile are not written. at: of hidden_sums, which have each lane's half of a unit.
  GSPN_DEVICE void write_sums(const int (&at)[2], const float (&weights)[2][4], const float (&input)[2][4],
                              const float (&output)[2][4]) const {
    const int g = adjoint_records.channel, t = adjoint_records.pair, d = 2 * t - g;
    const auto put = [&](int place, float first, float second) {
      *reinterpret_cast<float2*>(memory + place) = make_float2(first, second);
    };
    if (d >= -2 && d <= 1) put(at[0], weights[0][0], weights[0][1]);
    if (d >= -2 && d <= 1) put(at[1], weights[1][2], weights[1][3]);
    if (g == 7 && t == 0) put(at[0], weights[1][0], weights[1][1]);  // position 7 with 8
    if (g == 0 && t == 3) put(at[1], weights[0][2], weights[0][3]);  // position 8 with 7
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (adjoint_records.diagonal) put(at[i] ^ 16, input[i][2 * i], input[i][2 * i + 1]);
      if (kGates && adjoint_records.diagonal) put(at[i] ^ 24, output[i][2 * i], output[i][2 * i + 1]);
    }
  }
  // Which of the second unit's four floats has the sum for dλ, or du: of each pair, the other number is of no use.
  static GSPN_DEVICE int input_sum(bool odd) { return odd ? 1 : 2; }
  static GSPN_DEVICE int output_sum(bool odd) { return odd ? 3 : 0; }

  // Writes the sums for f and s to this block's row of (rows, K, C), at the warp's first channel.
  GSPN_DEVICE void write(float* grad_decay, float* grad_scale, int64_t at, const FactorProducts& products) const {
    if (adjoint_records.diagonal == 0u) return;
    const bool odd = adjoint_records.channel % 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float(&f)[4] = products.decay[i];
      const float(&s)[4] = products.scale[i];
      const int64_t to = at + adjoint_records.channel + 8 * i;
      if (grad_decay) grad_decay[to] = scale[i] * (odd ? f[2 * i + 1] : f[2 * i]);
      if (grad_scale) grad_scale[to] = odd ? s[2 * i + 1] : s[2 * i];
    }
  }
};

}  // namespace gspn
