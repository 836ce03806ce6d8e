// Runs CUDA kernels on the CPU, thread by thread, so that their logic is tested where there is no GPU.
//
// Each CUDA thread is a fiber. A fiber runs until it meets a barrier or an instruction of its whole warp (a shuffle, a
// product on tensor cores); then others run, in an order that is drawn anew every time, so that a missing barrier shows
// as a wrong result. Shared memory starts as NaN and is followed by guard bytes; where a copy that runs beside the
// threads is on its way, it is NaN until the thread waits for it. A block that can't go on (a barrier that some threads
// never reach, or lanes of a warp that meet different instructions) aborts.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
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
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
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

enum class State : char { kRunning, kAtBarrier, kAtMeeting, kDone };

// 16 bytes or fewer on their way into shared memory. `group`: how many groups of copies the thread had ended before.
struct Copy {
  void* to;
  char bytes[16];
  size_t size;
  int group;
};

// What a lane brings to an instruction of its warp.
struct Lane {
  const char* instruction;
  uint32_t words[6];
};

// A fiber is entered through its context once, and by jumps from then on: those make no system calls.
struct Fiber {
  jmp_buf resume;
  bool entered = false;
  std::vector<Copy> copies;
  int groups = 0;  // of copies that it has ended
};

struct Block {
  // Beginnings of stacks lie an odd number of cache lines apart, else all of them share a few lines of the caches.
  static constexpr size_t kStack = 128 * 1024 + 17 * 64, kGuard = 4096;
  std::vector<Fiber> fibers;
  std::vector<State> states;
  std::vector<int> order;
  std::unique_ptr<char[]> stacks;
  jmp_buf scheduler;
  int current = 0;
  std::vector<char> shared;
  std::vector<Lane> lanes;  // what each thread brings to a meeting of its warp; two sets, used in turn
  std::vector<int> meetings;
  std::function<void()> body;
  uint64_t random = 20250101;
};
inline Block& block() {
  static thread_local Block* b = nullptr;  // never freed: a guard of its destructor would be asked at every use
  if (!b) b = new Block;
  return *b;
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
  b.states[b.current] = state;
  if (_setjmp(b.fibers[b.current].resume) == 0) _longjmp(b.scheduler, 1);
}

inline void run_fiber() {
  for (;;) {
    block().body();
    wait(State::kDone);
  }
}

// Runs a fiber until it waits.
__attribute__((noinline)) inline void resume(Block& b, int thread) {
  if (_setjmp(b.scheduler) != 0) return;
  Fiber& fiber = b.fibers[thread];
  if (fiber.entered) _longjmp(fiber.resume, 1);
  fiber.entered = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = b.stacks.get() + thread * Block::kStack;
  context.uc_stack.ss_size = Block::kStack;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  setcontext(&context);
}

// Wakes the threads [first, last) if all of them wait in `state`.
inline bool release(Block& b, int first, int last, State state) {
  for (int i = first; i < last; ++i)
    if (b.states[i] != state) return false;
  for (int i = first; i < last; ++i) b.states[i] = State::kRunning;
  return true;
}

// A number below n (xorshift64*).
inline int draw(Block& b, int n) {
  b.random ^= b.random >> 12;
  b.random ^= b.random << 25;
  b.random ^= b.random >> 27;
  return int((b.random * 0x2545f4914f6cdd1du >> 32) * uint64_t(n) >> 32);
}

inline void run_block(int threads) {
  Block& b = block();
  if (int(b.fibers.size()) < threads) {
    b.fibers = std::vector<Fiber>(threads);
    b.stacks.reset(new char[threads * Block::kStack]);
  }
  b.lanes.assign(2 * threads, {});
  b.meetings.assign(threads, 0);
  b.states.assign(threads, State::kRunning);
  b.order.resize(threads);
  for (int i = 0; i < threads; ++i) {
    b.fibers[i].copies.clear();
    b.fibers[i].groups = 0;
    b.order[i] = i;
  }
  for (;;) {
    for (int i = threads; i > 1; --i) std::swap(b.order[i - 1], b.order[draw(b, i)]);
    bool ran = false;
    for (int i : b.order) {
      if (b.states[i] != State::kRunning) continue;
      ran = true;
      b.current = i;
      thread_index().x = unsigned(i);
      resume(b, i);
    }
    for (int warp = 0; warp < threads; warp += 32)
      ran |= release(b, warp, std::min(warp + 32, threads), State::kAtMeeting);
    ran |= release(b, 0, threads, State::kAtBarrier);
    if (ran) continue;
    for (int i = 0; i < threads; ++i) {
      if (b.states[i] != State::kDone) {
        std::fprintf(stderr, "cuda_emulation: threads wait for others that never come (thread %d)\n", i);
        std::abort();
      }
    }
    return;
  }
}

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_emulation: %s\n", what);
  std::abort();
}

// Waits for the other lanes of the warp. What each has brought is there until this lane has met the others once more.
inline const Lane* meet(const char* instruction, const uint32_t* words, int count) {
  Block& b = block();
  const int thread = b.current, warp = thread / 32 * 32, lanes = std::min(32, int(b.meetings.size()) - warp);
  Lane* const set = b.lanes.data() + (b.meetings[thread]++ % 2) * b.meetings.size() + warp;
  set[thread - warp].instruction = instruction;
  std::copy_n(words, count, set[thread - warp].words);
  wait(State::kAtMeeting);
  const char* const neighbours = set[(thread - warp + 1) % lanes].instruction;
  if (neighbours != instruction && std::strcmp(neighbours, instruction) != 0) {
    std::fprintf(stderr, "cuda_emulation: lanes of a warp meet at %s and at %s\n", instruction, neighbours);
    std::abort();
  }
  return set;
}

inline int lane() { return block().current % 32; }

template <typename T>
T shuffle(const char* instruction, T value, int source) {
  static_assert(sizeof(T) <= 8, "one register or two");
  uint32_t words[2] = {};
  std::memcpy(words, &value, sizeof value);
  const Lane* const lanes = meet(instruction, words, 2);
  T result;
  std::memcpy(&result, lanes[source < 0 || source > 31 ? lane() : source].words, sizeof result);
  return result;
}

// Begins a copy of `size` bytes into shared memory, of zeros where `from` is null.
inline void start_copy(void* to, const void* from, size_t size) {
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size) fail("a misaligned copy");
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  fiber.copies.push_back({to, {}, size, fiber.groups});
  if (from) std::memcpy(fiber.copies.back().bytes, from, size);
  std::memset(to, 0xff, size);
}

// Ends the thread's copies, but for those of its last `groups` groups and of the one that it has not ended yet.
inline void finish_copies_but(int groups) {
  Block& b = block();
  Fiber& fiber = b.fibers[b.current];
  size_t kept = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group >= fiber.groups - groups) fiber.copies[kept++] = copy;
    else std::memcpy(copy.to, copy.bytes, copy.size);
  }
  fiber.copies.resize(kept);
}

}  // namespace emulation

#define threadIdx (emulation::thread_index())
#define blockIdx (emulation::block_index())
#define blockDim (emulation::block_size())
#define gridDim (emulation::grid_size())

inline void __syncthreads() { emulation::wait(emulation::State::kAtBarrier); }
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) { return emulation::shuffle(__func__, value, emulation::lane() - delta); }
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) { return emulation::shuffle(__func__, value, emulation::lane() + delta); }
template <typename T>
T __shfl_sync(unsigned, T value, int source) { return emulation::shuffle(__func__, value, source % 32); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulation::shuffle(__func__, value, emulation::lane() ^ mask); }

namespace gspn {

inline char* shared_memory() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(emulation::block().shared.data()) + 127) & ~uintptr_t(127));
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  emulation::start_copy(shared, global, kBytes);
}
inline void copy_async_or_zero(void* shared, const void* global, bool copies) {
  // of zeros, too, which a GPU does not have to excuse
  if (!global || reinterpret_cast<uintptr_t>(global) % 16) emulation::fail("a copy from an address that can't be one");
  emulation::start_copy(shared, copies ? global : nullptr, 16);
}
inline void commit_copies() { ++emulation::block().fibers[emulation::block().current].groups; }
template <int N>
void wait_copies_but() {
  emulation::finish_copies_but(N);
}
inline void wait_copies() {
  commit_copies();
  wait_copies_but<0>();
}

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
inline float inverse_root(float value) { return 1.f / std::sqrt(value); }
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

#include "tensor_instructions.h"
