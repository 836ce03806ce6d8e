// Backward on tensor cores, of a map of up to 16 × 16 tokens: a block has one group's channels of one image, and x is
// read once, the gradients are written once.
//
// With h_i = f W_i h_{i-1} + λ_i x_i of a direction, and dy the gradient of y = Σ s u h:
//   dh_i = s u_i dy_i + f carry_i,    carry_i = W_{i+1}^T dh_{i+1},
//   dx_i += λ_i dh_i,    dλ_i = Σ_c dh_i x_i,    du_i = Σ_c s dy_i h_i,    dW_i[n][m] = Σ_c f dh_i[n] h_{i-1}[m],
//   df = Σ h_i carry_i,    ds = Σ u_i dy_i h_i,
// where Σ_c adds up the group's channels and a plain Σ all tokens. (df: each h_i[m] W_{i+1}[n][m] dh_{i+1}[n] is there
// once, whether it is counted at the line i or i + 1.)
//
// s is one number per channel and direction, so it is left out of the recursion: below, d = dh / s and carry = W^T d.
//
// Everything is a product of fragments (cuda/tensor_line.h), one line and 16 channels of a warp at a time:
//   d         is the left operand of d W as it lies; f carry + u dy in float32;
//   df, ds    are the diagonals of products over positions, with channels as rows and columns;
//   dλ, du, dW are the diagonals of products over channels, with positions as rows and columns: s d, as 16-bit elements, is
//             transposed in registers once for dλ and dW; f goes to h;
//   dx        is s d times a diagonal matrix, added to what other directions have left there.
// A warp first scans forward and leaves h of every line in shared memory, as 16-bit elements; then back. Sums over
// channels of a line replace its h, which is not needed any more; after the scan the block adds up the warps' sums in
// order, so two runs give the same bits.
#pragma once

#include "cuda/tensor_line.h"

namespace gspn {

// What the host decides; see cuda/tensor.cu.
struct TensorBackwardPlan {
  int k[4];          // of every direction: which one of the call it is, or -1
  bool both_senses;  // whether shared memory has room for both senses of an axis at once
  // Whether a site's gates in the four directions, or their gradients, lie side by side: see gates_side_by_side().
  bool wide_gates, wide_grads;
};

// Shared memory: x, dy and dx, and then for each of the senses that run at once its h and gates. kUnits:
// TileMemory<>::kUnits of the group's channels.
template <int kUnits>
struct BackwardMemory {
  using Map = TileMemory<kUnits * 8>;
  static constexpr int kWarps = kUnits / 2;  // of a sense, each with 16 channels
  static constexpr int kThreads = 2 * kWarps * kWarp;
  static constexpr int kX = 0, kGrad = Map::kBytes, kGradX = 2 * Map::kBytes, kSenses = 3 * Map::kBytes;
  // of a sense
  static constexpr int kHidden = 0, kForward = Map::kBytes, kAdjoint = kForward + Records::bytes(kTileSites);
  static constexpr int kInput = kAdjoint + Records::bytes(kTileSites);
  static constexpr int kOutput = kInput + kTileSites * Words::kPieceWords * 4;
  static constexpr int kSenseBytes = kOutput + kTileSites * Words::kPieceWords * 4;
  static constexpr int bytes(bool both_senses) { return kSenses + (both_senses ? 2 : 1) * kSenseBytes; }
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

// 1 in both halves of a word.
template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, BFloat16> ? 0x3f803f80u : 0x3c003c00u;

// A site's gates in both senses of an axis, or their gradients: the logits of the one and then of the other, and so on.
struct AxisGates {
  uint32_t logits[3], input, output;

  template <typename T>
  static GSPN_DEVICE float of(const uint32_t* words, int i) {
    return load(T{uint16_t(words[i / 2] >> (i % 2 * 16))});
  }
  static GSPN_DEVICE void put(uint32_t* words, int i, uint16_t bits) {
    words[i / 2] = i % 2 ? (words[i / 2] & 0xffffu) | uint32_t(bits) << 16 : (words[i / 2] & 0xffff0000u) | bits;
  }
};

// Reads a site's gates of the axis of rows, [0], and of columns, [1].
template <typename T>
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
  }
#pragma unroll
  for (int direction = 0; direction < 4; ++direction) {
    AxisGates& to = gates[direction / 2];
    const int k = plan.k[direction], sense = direction % 2;
    if (k < 0) continue;
    if (!plan.wide_gates) {
      const T* logits = gate_at(call.gates, 5, tile.batch, row, column, k, tile.group);
#pragma unroll
      for (int n = 0; n < 3; ++n) AxisGates::put(to.logits, 3 * sense + n, logits[n * call.gates.stride[4]].bits);
      AxisGates::put(&to.input, sense, gate_at(call.input_gate, 4, tile.batch, row, column, k, tile.group)->bits);
    }
    if (call.output_gate.data)
      AxisGates::put(&to.output, sense, gate_at(call.output_gate, 4, tile.batch, row, column, k, tile.group)->bits);
  }
}

// f or s of the channels that a lane has in the right operand of a product over channels: as two pairs of 16-bit
// elements, and what is left of them.
template <typename T>
struct FactorPairs {
  uint32_t high[2], low[2];

  GSPN_DEVICE FactorPairs(const float* factor, const Problem& p, int k, int channel, const FragmentLane& at) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float v[2], rounded[2];
#pragma unroll
      for (int n = 0; n < 2; ++n) v[n] = of_channel(factor, p, k, channel + 8 * i + 2 * at.pair + n);
      high[i] = pack<T>(v);
      unpack(T(), high[i], rounded);
#pragma unroll
      for (int n = 0; n < 2; ++n) v[n] -= rounded[n];
      low[i] = pack<T>(v);
    }
  }
  // Multiplies the matrices of a piece, as load_matrices() reads them.
  GSPN_DEVICE void scale(uint32_t (&r)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      r[i] = multiply_add_pairs<T>(r[i], high[i % 2], multiply_add_pairs<T>(r[i], low[i % 2], 0u));
  }
};

// Where a lane's operands and results of a line lie, in bytes from a map in shared memory.
template <int kUnits>
struct LinePlaces {
  using Map = TileMemory<kUnits * 8>;
  bool rows;
  int piece, swapped, sums[2];

  GSPN_DEVICE LinePlaces(bool rows_, int lane, int warp, const FragmentLane& at) : rows(rows_) {
    piece = Map::position_offset(rows, Map::matrix_position(lane), Map::matrix_unit(lane, warp));
    // the second matrix and the third exchanged
    swapped = Map::position_offset(rows, lane % 16, 2 * warp + lane / 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) sums[i] = Map::position_offset(rows, at.channel + 8 * i, 2 * warp);
  }
  struct At {
    int piece, swapped, sums[2];
  };
  GSPN_DEVICE At at(int line) const {
    const int offset = Map::line_offset(rows, line), exchange = Map::line_exchange(rows, line);
    return {offset + (piece ^ exchange), offset + (swapped ^ exchange),
            {offset + (sums[0] ^ exchange), offset + (sums[1] ^ exchange)}};
  }
};

// What a step forward reads from shared memory.
struct ForwardOperands {
  uint32_t x[4];
  uint2 input;
  LineOperands<2> d;
};

// What a step back reads from shared memory.
struct AdjointOperands {
  uint32_t grad[4], x[4], grad_x[4];
  uint32_t hidden[4], before[4];  // h of the line and of the line before
  uint2 input, output;
  LineOperands<2> d;
};

// The sums for df and ds: of channels 0-7 | 8-15 of a warp, as the diagonals of products.
struct FactorProducts {
  float decay[2][4], scale[2][4];
};

// A warp's scan of a tile in one direction, forward and back. `line` counts in map order, n in reading order.
template <typename T, int kUnits>
struct TensorScan {
  using Memory = BackwardMemory<kUnits>;
  using Call = Backward<T>;
  char *map, *own;  // in shared memory: x, dy and dx, and what the sense has
  const FragmentLane& fragment;
  const LinePlaces<kUnits>& places;
  Continues continues;
  int lines;
  bool reversed;
  float decay[2], scale[2];  // of a lane's channels g and g + 8
  FactorPairs<T> decay_pairs;

  GSPN_DEVICE int line(int n) const { return nth_read(0, lines, n, reversed); }
  GSPN_DEVICE const uint32_t* words(int which, int line) const {
    return reinterpret_cast<const uint32_t*>(own + which) + line * Words::kPieceWords;
  }
  static GSPN_DEVICE void pack_piece(uint32_t (&packed)[4], const float (&v)[2][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = pack<T>(v[i / 2] + i % 2 * 2);
  }

  GSPN_DEVICE void load(ForwardOperands& to, int line) const {
    load_matrices<true>(to.x, map + Memory::kX + places.at(line).piece);
    to.input = Words::of_diagonal(words(Memory::kInput, line), fragment);
    to.d.load(Records::piece(own + Memory::kForward, line), fragment);
  }

  // Leaves h of every line in shared memory.
  GSPN_DEVICE void forward() const {
    float h[2][4] = {};
    ForwardOperands next;
    load(next, line(0));
#pragma unroll 2
    for (int n = 0; n < lines; ++n) {
      const ForwardOperands now = next;
      if (n + 1 < lines) load(next, line(n + 1));
      const bool goes_on = continues.at(line(n));
      const float factor[2] = {goes_on ? decay[0] : 0.f, goes_on ? decay[1] : 0.f};
      float driven[2][4];
      drive<T>(driven, now.x, now.input, fragment);
      advance_parts<2>(h, driven, factor, now.d, NothingBeside());
      uint32_t packed[4];
      pack_piece(packed, h);
      store_matrices<true>(own + Memory::kHidden + places.at(line(n)).piece, packed);
    }
    __syncwarp();
  }

  // `touched`: whether dx of the line has been begun by another direction.
  GSPN_DEVICE void load(AdjointOperands& to, int n, bool touched) const {
    const auto at = places.at(line(n)), before = places.at(line(n > 0 ? n - 1 : 0));
    load_matrices<true>(to.grad, map + Memory::kGrad + at.piece);
    load_matrices<false>(to.x, map + Memory::kX + at.piece);
    load_matrices<true>(to.hidden, own + Memory::kHidden + at.swapped);
    load_matrices<false>(to.before, own + Memory::kHidden + before.piece);
#pragma unroll
    for (int i = 0; i < 4; ++i) to.grad_x[i] = 0u;
    if (touched) load_matrices<true>(to.grad_x, map + Memory::kGradX + at.piece);
    to.input = Words::of_diagonal(words(Memory::kInput, line(n)), fragment);
    to.output = Words::of_diagonal(words(Memory::kOutput, line(n)), fragment);
    to.d.load(Records::piece(own + Memory::kAdjoint, line(n)), fragment);
  }

  // Lines from `last` down to `first`, in reading order. carry: from the line after.
  GSPN_DEVICE void back(int first, int last, bool touched, bool has_output, float (&carry)[2][4],
                        FactorProducts& sums, const FactorPairs<T>& scale_pairs) const {
    if (first > last) return;
    AdjointOperands next;
    load(next, last, touched);
#pragma unroll 1
    for (int n = last; n >= first; --n) {
      const AdjointOperands now = next;
      uint32_t dy[4], h[4];  // as operands of products over channels: for du
      if (has_output) {
        const auto at = places.at(line(n));
        load_matrices<false>(dy, map + Memory::kGrad + at.swapped);
        load_matrices<false>(h, own + Memory::kHidden + at.piece);
      }
      if (n > first) load(next, n - 1, touched);

      float driven[2][4], d[2][4];  // u dy
      drive<T>(driven, now.grad, has_output ? now.output : uint2{kOnes<T>, kOnes<T>}, fragment);
      uint32_t carried[4];
      pack_piece(carried, carry);
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i / 4][i % 4] = decay[i % 4 / 2] * carry[i / 4][i % 4] + driven[i / 4][i % 4];
      hand_back(carry, d, now.d, continues.at(line(n)));

      uint32_t gated[4] = {now.grad[0], now.grad[1], now.grad[2], now.grad[3]};
      if (has_output) pack_piece(gated, driven);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t hidden[2] = {now.hidden[2 * i], now.hidden[2 * i + 1]};
        mma_k16<T>(sums.decay[i], carried, hidden);
        mma_k16<T>(sums.scale[i], gated, hidden);
      }

#pragma unroll
      for (int i = 0; i < 8; ++i) d[i / 4][i % 4] *= scale[i % 4 / 2];
      uint32_t dh[4];
      pack_piece(dh, d);
      float dx[2][4];
      drive<T>(dx, now.grad_x, uint2{kOnes<T>, kOnes<T>}, fragment);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t a[2] = {dh[2 * part], dh[2 * part + 1]};
        mma_k8<T>(dx[part], a, (part ? now.input.y : now.input.x) & fragment.diagonal);
      }
      const uint32_t rows[4] = {transpose_matrix(dh[0]), transpose_matrix(dh[2]), transpose_matrix(dh[1]),
                                transpose_matrix(dh[3])};
      float input[2][4] = {}, output[2][4] = {}, weights[2][4] = {};
      uint32_t before[4] = {now.before[0], now.before[1], now.before[2], now.before[3]};
      decay_pairs.scale(before);
      if (has_output) scale_pairs.scale(h);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        mma_k16<T>(input[i], rows, {now.x[2 * i], now.x[2 * i + 1]});
        mma_k16<T>(weights[i], rows, {before[2 * i], before[2 * i + 1]});
        if (has_output) mma_k16<T>(output[i], dy, {h[2 * i], h[2 * i + 1]});
      }
      const auto at = places.at(line(n));
      uint32_t packed[4];
      pack_piece(packed, dx);
      store_matrices<true>(map + Memory::kGradX + at.piece, packed);
      write_sums(own + Memory::kHidden, at.sums, weights, input, output);
    }
  }

  // carry = W^T d: for the line before, or nothing where the scan restarts.
  static GSPN_DEVICE void hand_back(float (&carry)[2][4], const float (&d)[2][4], const LineOperands<2>& transposed,
                                    bool goes_on) {
    float a[2][4];
    constexpr float one[2] = {1.f, 1.f};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      as_operand(a[j], d[j], one);
#pragma unroll
      for (int c = 0; c < 4; ++c) carry[j][c] = d[j][c];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) mma_tf32(carry[j], a[j], transposed.band[j]);
#pragma unroll
    for (int j = 0; j < 2; ++j) add_corner(carry[j], a[1 - j], a[1 - j], transposed.corner[j]);
    if (goes_on) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) carry[i / 4][i % 4] = 0.f;
  }

  // Writes a line's sums over the warp's channels in the place of its h. Of a site, the first unit of 16 bytes has those
  // for dW, four floats as Records has them of a row; the second has those for dλ and du. Numbers that lie beyond the
  // tile are not written.
  GSPN_DEVICE void write_sums(char* to, const int (&at)[2], const float (&weights)[2][4], const float (&input)[2][4],
                              const float (&output)[2][4]) const {
    const int g = fragment.channel, t = fragment.pair, d = 2 * t - g;
    const bool band = d >= -2 && d <= 1, after = g == 7 && t == 0, before = g == 0 && t == 3;
    const int half = (band ? d >= 0 : after) * 8;
    if (band || after)  // position g; where lane 28 has position 7 with 8
      *reinterpret_cast<float2*>(to + at[0] + half) =
          make_float2(after ? weights[1][0] : weights[0][0], after ? weights[1][1] : weights[0][1]);
    if (band || before)  // position g + 8; where lane 3 has position 8 with 7
      *reinterpret_cast<float2*>(to + at[1] + half) =
          make_float2(before ? weights[0][2] : weights[1][2], before ? weights[0][3] : weights[1][3]);
    if (fragment.diagonal == 0u) return;
    const int odd = g % 2;
    *reinterpret_cast<float2*>(to + (at[0] ^ 16)) = make_float2(odd ? input[0][1] : input[0][0], odd ? output[0][1] : output[0][0]);
    *reinterpret_cast<float2*>(to + (at[1] ^ 16)) = make_float2(odd ? input[1][3] : input[1][2], odd ? output[1][3] : output[1][2]);
  }

  // Writes this block's sums for f and s: `row` of (rows, K, C).
  GSPN_DEVICE void write(const Call& call, const FactorProducts& sums, int64_t row, int k, int channel) const {
    if (fragment.diagonal == 0u) return;
    const int odd = fragment.channel % 2;
    const int64_t at = (row * call.problem.num_directions + k) * call.problem.channels + channel + fragment.channel;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float(&f)[4] = sums.decay[i];
      const float(&s)[4] = sums.scale[i];
      if (call.grad_decay) call.grad_decay[at + 8 * i] = scale[i] * (i ? (odd ? f[3] : f[2]) : (odd ? f[1] : f[0]));
      if (call.grad_scale) call.grad_scale[at + 8 * i] = i ? (odd ? s[3] : s[2]) : (odd ? s[1] : s[0]);
    }
  }
};

// Begins to read the tile's sites of a map into shared memory: zeros where the tile has none.
template <int kUnits, typename T>
GSPN_DEVICE void fetch_map(char* to, const Strided<const T>& from, const TensorTile& tile, int channels) {
  for (int i = threadIdx.x; i < kTileSites * kTileSites * kUnits; i += blockDim.x) {
    const int unit = i % kUnits, column = i / kUnits % kTileSites, row = i / kUnits / kTileSites;
    const bool inside = tile.has(row, column) && unit * 8 < channels;
    const T* source =
        inside ? map_at(from, tile.batch, tile.row + row, tile.column + column, tile.group * channels + unit * 8)
               : from.data;
    copy_async_or_zero(to + TileMemory<kUnits * 8>::offset(row, column, unit), source, inside);
  }
  commit_copies();
}

// A site's place on the lines of one axis, and its gates there.
template <typename T>
struct SiteOnAxis {
  Lines<int> lines;
  int row, column, line, position;  // of the map; line and position of the tile
  bool has_minus, has_plus;
  const AxisGates& gates;

  GSPN_DEVICE SiteOnAxis(const Problem& p, bool rows, const TensorTile& tile, int r, int c, const AxisGates& gates_)
      : lines(p, rows), row(tile.row + r), column(tile.column + c), line(lines.line_of(r, c)),
        position(lines.position_of(r, c)), gates(gates_) {
    const int on_map = lines.position_of(row, column);
    has_minus = on_map > 0, has_plus = on_map + 1 < lines.positions;
  }
  GSPN_DEVICE float logit(int sense, int n) const { return AxisGates::of<T>(gates.logits, 3 * sense + n); }
  GSPN_DEVICE bool restarts(int sense) const { return lines.starts_chunk(lines.line_of(row, column), sense); }
  GSPN_DEVICE Weights<float> weights(int sense) const {
    return normalise(logit(sense, 0), logit(sense, 1), logit(sense, 2), float(has_minus), float(has_plus));
  }
  // Gradients of the logits, from those of the weights.
  GSPN_DEVICE Weights<float> logit_gradients(int sense, Weights<float> sum) const {
    if (restarts(sense)) return {0.f, 0.f, 0.f};
    if (!has_minus) sum.minus = 0.f;  // it was not written
    if (!has_plus) sum.plus = 0.f;
    return normalise_backward(logit(sense, 0), logit(sense, 1), logit(sense, 2), weights(sense), sum);
  }
};

template <typename T, int kUnits>
__global__ void __launch_bounds__(32 * kUnits, 1)
    tensor_backward(const __grid_constant__ Backward<T> call, const __grid_constant__ TensorBackwardPlan plan) {
  using Memory = BackwardMemory<kUnits>;
  using Map = typename Memory::Map;
  constexpr int kWarps = Memory::kWarps, kThreads = Memory::kThreads;
  constexpr int kSites = kTileSites * kTileSites, kOwnSites = kSites / kThreads;
  const Problem& p = call.problem;
  const TensorTile tile(p, blockIdx.x);
  char* const map = shared_memory();
  const int warp = threadIdx.x / kWarp % kWarps, lane = threadIdx.x % kWarp, channels = int(p.channels / p.groups);
  const FragmentLane fragment(lane);
  const bool has_output = call.output_gate.data;
  const auto of_sense = [&](int sense) {
    return map + Memory::kSenses + (plan.both_senses ? sense : 0) * Memory::kSenseBytes;
  };

  fetch_map<kUnits>(map + Memory::kX, call.x, tile, channels);
  fetch_map<kUnits>(map + Memory::kGrad, call.grad_y, tile, channels);
  if (tile.height < kTileSites || tile.width < kTileSites) {  // dx beyond the map is added to, too: a NaN would spread
    for (int i = threadIdx.x; i < Map::kBytes / int(sizeof(uint4)); i += kThreads)
      reinterpret_cast<uint4*>(map + Memory::kGradX)[i] = uint4{0u, 0u, 0u, 0u};
  }
  for (int sense = 0; sense < (plan.both_senses ? 2 : 1); ++sense) {
    Records::write_zeros(of_sense(sense) + Memory::kForward, kTileSites);
    Records::write_zeros(of_sense(sense) + Memory::kAdjoint, kTileSites);
  }
  // A thread has whole sites of the tile.
  AxisGates site_gates[kOwnSites][2] = {};
  const auto each_site = [&](auto visit) {
#pragma unroll
    for (int j = 0; j < kOwnSites; ++j) {
      const int site = threadIdx.x + j * kThreads;
      visit(site / kTileSites, site % kTileSites, site_gates[j]);
    }
  };
  each_site([&](int row, int column, AxisGates (&gates)[2]) {
    if (tile.has(row, column)) read_gates(gates, call, plan, tile, tile.row + row, tile.column + column);
  });

  bool first = true;  // whether no direction has run yet
#pragma unroll 1
  for (int pass = 0; pass < (plan.both_senses ? 2 : 4); ++pass) {
    const int axis = plan.both_senses ? pass : pass / 2;
    const bool rows = axis == 0;
    const auto direction_index = [&](int sense) {  // -1 unless it runs in this pass
      if (!plan.both_senses && sense != pass % 2) return -1;
      return rows ? (sense ? plan.k[kUp] : plan.k[kDown]) : (sense ? plan.k[kLeft] : plan.k[kRight]);
    };
    if (direction_index(0) < 0 && direction_index(1) < 0) continue;
    const bool both = direction_index(0) >= 0 && direction_index(1) >= 0;
    const auto each_site_on_axis = [&](auto visit) {
      each_site([&](int row, int column, const AxisGates (&gates)[2]) {
        AxisGates of_axis;
#pragma unroll
        for (int i = 0; i < 3; ++i) of_axis.logits[i] = rows ? gates[0].logits[i] : gates[1].logits[i];
        of_axis.input = rows ? gates[0].input : gates[1].input;
        of_axis.output = rows ? gates[0].output : gates[1].output;
        visit(SiteOnAxis<T>(p, rows, tile, row, column, of_axis), row, column);
      });
    };

    each_site_on_axis([&](const SiteOnAxis<T>& site, int row, int column) {
#pragma unroll
      for (int sense = 0; sense < 2; ++sense) {
        if (direction_index(sense) < 0) continue;
        char* const own = of_sense(sense);
        Weights<float> d{0.f, 0.f, 0.f};
        if (tile.has(row, column) && !site.restarts(sense)) d = differences(site.weights(sense));
        Records::write(Records::piece(own + Memory::kForward, site.line), site.position, d);
        Records::write_transposed(Records::piece(own + Memory::kAdjoint, site.line), site.position, d);
        const int word = site.line * Words::kPieceWords;
        const auto element = [&](uint32_t words) { return T{uint16_t(words >> 16 * sense)}; };
        Words::write(reinterpret_cast<uint32_t*>(own + Memory::kInput) + word, site.position, element(site.gates.input));
        Words::write(reinterpret_cast<uint32_t*>(own + Memory::kOutput) + word, site.position, element(site.gates.output));
      }
    });
    if (first) wait_copies_but<1>();  // x
    __syncthreads();

    const int sense = plan.both_senses ? int(threadIdx.x) / (kWarp * kWarps) : pass % 2;
    const bool idle = (!plan.both_senses && threadIdx.x >= kWarp * kWarps) || warp * kWarpRows >= channels;
    const int k = idle ? -1 : direction_index(sense);
    const int channel = tile.group * channels + (idle ? 0 : warp * kWarpRows);  // the warp's first
    const Lines<int> lines(p, rows);
    const LinePlaces<kUnits> places(rows, lane, warp, fragment);
    const auto factors = [&](const float* factor, int i) {
      return of_channel(factor, p, k < 0 ? 0 : k, channel + fragment.channel + 8 * i);
    };
    const TensorScan<T, kUnits> scan{
        map, of_sense(sense), fragment, places, Continues(lines, lines.line_of(tile.row, tile.column), sense),
        lines.line_of(tile.height, tile.width), bool(sense), {factors(call.decay, 0), factors(call.decay, 1)},
        {factors(call.scale, 0), factors(call.scale, 1)}, FactorPairs<T>(call.decay, p, k < 0 ? 0 : k, channel, fragment)};
    if (k >= 0) scan.forward();
    if (first) {
      wait_copies_but<0>();  // dy
      __syncthreads();
    }
    // Two senses meet in the middle, and go on after a barrier: each line has one that begins its dx, and one that adds.
    const int middle = sense ? scan.lines - scan.lines / 2 : scan.lines / 2;
    float carry[2][4] = {};
    FactorProducts sums = {};
    const FactorPairs<T> scale_pairs(call.scale, p, k < 0 ? 0 : k, channel, fragment);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if (k >= 0)
        scan.back(half ? 0 : middle, half ? middle - 1 : scan.lines - 1, !first || (both && half), has_output, carry, sums,
                  scale_pairs);
      __syncthreads();
    }
    if (k >= 0) scan.write(call, sums, blockIdx.x / unsigned(p.groups), k, channel);

    each_site_on_axis([&](const SiteOnAxis<T>& site, int row, int column) {
      if (!tile.has(row, column)) return;
      AxisGates grads = {};
#pragma unroll
      for (int sense = 0; sense < 2; ++sense) {
        const int k = direction_index(sense);
        if (k < 0) continue;
        float weights[4] = {}, input = 0.f, output = 0.f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          if (w * kWarpRows >= channels) break;
          const int at = Map::offset(row, column, 2 * w);
          const char* const from = of_sense(sense) + Memory::kHidden;
          float of_warp[4];
          load_vector(reinterpret_cast<const float*>(from + at), of_warp);
#pragma unroll
          for (int i = 0; i < 4; ++i) weights[i] += of_warp[i];
          const float2 others = *reinterpret_cast<const float2*>(from + (at ^ 16));
          input += others.x, output += others.y;
        }
        const bool odd = site.position % 2;
        const Weights<float> grad = site.logit_gradients(
            sense, Weights<float>{odd ? weights[0] : weights[1], odd ? weights[1] : weights[2], odd ? weights[2] : weights[3]});
        const float logits[3] = {grad.minus, grad.centre, grad.plus};
        T bits[3], input_bits, output_bits;
#pragma unroll
        for (int n = 0; n < 3; ++n) store(bits[n], logits[n]);
        store(input_bits, input), store(output_bits, output);
        if (has_output)
          *gate_at(call.grad_output_gate, 4, tile.batch, site.row, site.column, k, tile.group) = output_bits;
        if (plan.wide_grads) {
#pragma unroll
          for (int n = 0; n < 3; ++n) AxisGates::put(grads.logits, 3 * sense + n, bits[n].bits);
          AxisGates::put(&grads.input, sense, input_bits.bits);
          continue;
        }
        T* const to = gate_at(call.grad_gates, 5, tile.batch, site.row, site.column, k, tile.group);
#pragma unroll
        for (int n = 0; n < 3; ++n) to[n * call.grad_gates.stride[4]] = bits[n];
        *gate_at(call.grad_input_gate, 4, tile.batch, site.row, site.column, k, tile.group) = input_bits;
      }
      if (!plan.wide_grads) return;
      uint32_t* const to = reinterpret_cast<uint32_t*>(
          gate_at(call.grad_gates, 5, tile.batch, site.row, site.column, 2 * axis, tile.group));
#pragma unroll
      for (int i = 0; i < 3; ++i) to[i] = grads.logits[i];
      *reinterpret_cast<uint32_t*>(
          gate_at(call.grad_input_gate, 4, tile.batch, site.row, site.column, 2 * axis, tile.group)) = grads.input;
    });
    first = false;
  }

  for (int i = threadIdx.x; i < kSites * kUnits; i += kThreads) {
    const int unit = i % kUnits, column = i / kUnits % kTileSites, row = i / kUnits / kTileSites;
    if (!tile.has(row, column) || unit * 8 >= channels) continue;
    *reinterpret_cast<uint4*>(map_at(call.grad_x, tile.batch, tile.row + row, tile.column + column,
                                     tile.group * channels + unit * 8)) =
        *reinterpret_cast<const uint4*>(map + Memory::kGradX + Map::offset(row, column, unit));
  }
}

}  // namespace gspn
