// Runs each instruction of csrc/cuda/tensor_core.h on one warp, for tests: with nvcc on a GPU, or emulated. Arrays hold
// what each lane has, lane by lane; `to` and `from` of instructions on shared memory are that memory, 512 bytes.
#include "cuda/tensor_core.h"

namespace {

using namespace gspn;

template <int N, typename T>
GSPN_DEVICE void read(T (&values)[N], const T* lanes) {
  for (int i = 0; i < N; ++i) values[i] = lanes[threadIdx.x * N + i];
}
template <int N, typename T>
GSPN_DEVICE void write(T* lanes, const T (&values)[N]) {
  for (int i = 0; i < N; ++i) lanes[threadIdx.x * N + i] = values[i];
}

__global__ void round_to_tf32(const float* from, float* to) { to[threadIdx.x] = to_tf32(from[threadIdx.x]); }

__global__ void multiply_tf32(const float* a, const float* b, float* c) {
  float lane_a[4], lane_b[2], lane_c[4];
  read(lane_a, a), read(lane_b, b), read(lane_c, c);
  mma_tf32(lane_c, lane_a, lane_b);
  write(c, lane_c);
}

__global__ void multiply_tf32_k4(const float* a, const float* b, float* c) {
  float lane_a[2], lane_c[4];
  read(lane_a, a), read(lane_c, c);
  mma_tf32_k4(lane_c, lane_a, b[threadIdx.x]);
  write(c, lane_c);
}

template <typename T>
__global__ void multiply_k8(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t lane_a[2];
  float lane_c[4];
  read(lane_a, a), read(lane_c, c);
  mma_k8<T>(lane_c, lane_a, b[threadIdx.x]);
  write(c, lane_c);
}

template <typename T>
__global__ void multiply_k16(const uint32_t* a, const uint32_t* b, float* c) {
  uint32_t lane_a[4], lane_b[2];
  float lane_c[4];
  read(lane_a, a), read(lane_b, b), read(lane_c, c);
  mma_k16<T>(lane_c, lane_a, lane_b);
  write(c, lane_c);
}

__global__ void transpose(const uint32_t* from, uint32_t* to) { to[threadIdx.x] = transpose_matrix(from[threadIdx.x]); }

// rows[lane]: which 16 bytes of shared memory the lane names.
template <bool kTransposed, int N>
__global__ void read_matrices(const uint32_t* from, const int* rows, uint32_t* to) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = 0; i < 4; ++i) shared[threadIdx.x * 4 + i] = from[threadIdx.x * 4 + i];
  __syncthreads();
  uint32_t r[N];
  load_matrices<kTransposed>(r, shared + 4 * rows[threadIdx.x]);
  write(to, r);
}

template <bool kTransposed>
__global__ void write_matrices(const uint32_t* from, const int* rows, uint32_t* to) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t r[4];
  read(r, from);
  store_matrices<kTransposed>(shared + 4 * rows[threadIdx.x], r);
  __syncthreads();
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = shared[threadIdx.x * 4 + i];
}

// Two groups of copies, of which the second is still on its way when the first is read.
__global__ void copy_in_groups(const uint32_t* from, const int* copies, uint32_t* to) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory()) + threadIdx.x * 4;
  uint32_t* const second = shared + 128;
  copy_async_or_zero(shared, from + threadIdx.x * 4, copies[threadIdx.x]);
  commit_copies();
  copy_async_or_zero(second, from + threadIdx.x * 4, !copies[threadIdx.x]);
  commit_copies();
  wait_copies_but<1>();
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = shared[i];
  wait_copies_but<0>();
  for (int i = 0; i < 4; ++i) to[128 + threadIdx.x * 4 + i] = second[i];
}

#if defined(GSPN_EMULATED_CUDA)
__global__ void read_before_waiting(const uint32_t* from, const int*, uint32_t* to) {
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory()) + threadIdx.x * 4;
  copy_async_or_zero(shared, from + threadIdx.x * 4, true);
  commit_copies();
  wait_copies_but<1>();
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = shared[i];
}
__global__ void disagree(const uint32_t* from, uint32_t* to) {
  if (threadIdx.x == 7) __syncwarp();
  else to[threadIdx.x] = transpose_matrix(from[threadIdx.x]);
}
#endif

template <typename... Parameters, typename... Arguments>
int run(void (*kernel)(Parameters...), Arguments... arguments) {
  return launch(kernel, 1, kWarp, 1024, cudaStream_t(), arguments...);
}

}  // namespace

extern "C" {

int run_to_tf32(const float* from, float* to) { return run(round_to_tf32, from, to); }
int run_mma_tf32(const float* a, const float* b, float* c) { return run(multiply_tf32, a, b, c); }
int run_mma_tf32_k4(const float* a, const float* b, float* c) { return run(multiply_tf32_k4, a, b, c); }
int run_mma_k8(bool bfloat16, const uint32_t* a, const uint32_t* b, float* c) {
  return run(bfloat16 ? multiply_k8<BFloat16> : multiply_k8<Float16>, a, b, c);
}
int run_mma_k16(bool bfloat16, const uint32_t* a, const uint32_t* b, float* c) {
  return run(bfloat16 ? multiply_k16<BFloat16> : multiply_k16<Float16>, a, b, c);
}
int run_transpose_matrix(const uint32_t* from, uint32_t* to) { return run(transpose, from, to); }
int run_load_matrices(bool transposed, int count, const uint32_t* from, const int* rows, uint32_t* to) {
  if (count == 1) return run(transposed ? read_matrices<true, 1> : read_matrices<false, 1>, from, rows, to);
  if (count == 2) return run(transposed ? read_matrices<true, 2> : read_matrices<false, 2>, from, rows, to);
  return run(transposed ? read_matrices<true, 4> : read_matrices<false, 4>, from, rows, to);
}
int run_store_matrices(bool transposed, const uint32_t* from, const int* rows, uint32_t* to) {
  return run(transposed ? write_matrices<true> : write_matrices<false>, from, rows, to);
}
int run_copies(const uint32_t* from, const int* copies, uint32_t* to) { return run(copy_in_groups, from, copies, to); }
#if defined(GSPN_EMULATED_CUDA)
int run_read_before_waiting(const uint32_t* from, const int* copies, uint32_t* to) {
  return run(read_before_waiting, from, copies, to);
}
int run_disagree(const uint32_t* from, uint32_t* to) { return run(disagree, from, to); }
#endif
}
