// Runs CUDA kernels on the CPU, thread by thread, so that their logic is tested where there is no GPU.
//
// Each CUDA thread is a fiber. A fiber runs until it meets a barrier or a shuffle; then others run, in an order that is
// drawn anew every time, so that a missing barrier shows as a wrong result. Shared memory starts as NaN and is followed by
// guard bytes. A block that can't go on (a barrier that some threads never reach) aborts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include <cmath>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct Uint3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "error of the emulation"; }

namespace emulation {

enum class State { kRunning, kAtBarrier, kAtShuffle, kDone };

// A fiber is entered through its context the first time, and by jumps from then on: those make no system calls.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  State state;
  bool entered;
};

struct Block {
  static constexpr size_t kStack = 128 * 1024, kGuard = 4096;
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  int current = 0;
  std::vector<char> shared;
  std::vector<uint64_t> lanes;  // what each thread brings to a shuffle; two sets, used in turn
  std::vector<int> shuffles;
  std::function<void()> body;
  std::mt19937 random{20250101};
};
inline Block& block() {
  static thread_local Block b;
  return b;
}
inline Uint3& thread_index() {
  static thread_local Uint3 i{};
  return i;
}
inline Uint3& block_index() {
  static thread_local Uint3 i{};
  return i;
}
inline Uint3& block_size() {
  static thread_local Uint3 n{1, 1, 1};
  return n;
}
inline Uint3& grid_size() {
  static thread_local Uint3 n{1, 1, 1};
  return n;
}

inline void wait(State state) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(b.scheduler, 1);
}

inline void run_fiber() {
  Block& b = block();
  b.body();
  b.fibers[b.current].state = State::kDone;
  _longjmp(b.scheduler, 1);
}

// Runs a fiber until it waits.
__attribute__((noinline)) inline void resume(Block& b, Fiber& fiber) {
  if (_setjmp(b.scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  setcontext(&fiber.context);
}

// Wakes the fibers [first, last) if all of them wait in `state`.
inline bool release(Block& b, int first, int last, State state) {
  for (int i = first; i < last; ++i)
    if (b.fibers[i].state != state) return false;
  for (int i = first; i < last; ++i) b.fibers[i].state = State::kRunning;
  return true;
}

inline void run_block(int threads) {
  Block& b = block();
  if (int(b.fibers.size()) < threads) b.fibers.resize(threads);
  b.lanes.assign(2 * threads, 0);
  b.shuffles.assign(threads, 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[Block::kStack]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Block::kStack;
    fiber.context.uc_link = nullptr;
    fiber.state = State::kRunning;
    fiber.entered = false;
    makecontext(&fiber.context, run_fiber, 0);
  }
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) order[i] = i;
  for (;;) {
    std::shuffle(order.begin(), order.end(), b.random);
    bool ran = false;
    for (int i : order) {
      if (b.fibers[i].state != State::kRunning) continue;
      ran = true;
      b.current = i;
      thread_index().x = unsigned(i);
      resume(b, b.fibers[i]);
    }
    for (int warp = 0; warp < threads; warp += 32)
      ran |= release(b, warp, std::min(warp + 32, threads), State::kAtShuffle);
    ran |= release(b, 0, threads, State::kAtBarrier);
    if (ran) continue;
    for (int i = 0; i < threads; ++i) {
      if (b.fibers[i].state != State::kDone) {
        std::fprintf(stderr, "cuda_emulation: threads wait for others that never come (thread %d)\n", i);
        std::abort();
      }
    }
    return;
  }
}

template <typename T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= 8, "one register or two");
  Block& b = block();
  const int thread = b.current, warp = thread / 32 * 32;
  uint64_t* set = b.lanes.data() + (b.shuffles[thread]++ % 2) * b.shuffles.size();
  std::memcpy(&set[thread], &value, sizeof value);
  wait(State::kAtShuffle);
  T result;
  std::memcpy(&result, &set[warp + (source < 0 || source > 31 ? thread - warp : source)], sizeof result);
  return result;
}
inline int lane() { return block().current % 32; }

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

inline void __syncthreads() { emulation::wait(emulation::State::kAtBarrier); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) { return emulation::shuffle(value, emulation::lane() - delta); }
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) { return emulation::shuffle(value, emulation::lane() + delta); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulation::shuffle(value, emulation::lane() ^ mask); }

namespace gspn {

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulation::block().shared.data()) + 127) & ~uintptr_t(127));
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % kBytes || reinterpret_cast<uintptr_t>(global) % kBytes) {
    std::fprintf(stderr, "cuda_emulation: a misaligned copy\n");
    std::abort();
  }
  std::memcpy(shared, global, kBytes);
}
inline void wait_copies() {}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                   const Arguments&... arguments) {
  emulation::Block& b = emulation::block();
  emulation::block_size().x = unsigned(threads);
  emulation::grid_size().x = unsigned(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    b.shared.assign(shared_bytes + 128 + emulation::Block::kGuard, char(0xff));
    emulation::block_index().x = unsigned(i);
    b.body = [&] { kernel(arguments...); };
    emulation::run_block(threads);
    for (const char* guard = shared_memory() + shared_bytes; guard < b.shared.data() + b.shared.size(); ++guard) {
      if (*guard != char(0xff)) {
        std::fprintf(stderr, "cuda_emulation: a write beyond the %zu bytes of shared memory\n", shared_bytes);
        std::abort();
      }
    }
  }
  return cudaSuccess;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return 0x7fc0;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return float(half);
}
inline uint16_t to_half(float value) {
  const _Float16 half = _Float16(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

}  // namespace gspn
