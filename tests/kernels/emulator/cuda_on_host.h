// Runs CUDA kernels on a CPU, to test their indexing and their synchronisation where there is no GPU.
//
// Include this, then a .cuh that is free of torch and of the CUDA runtime, compile with g++ -std=c++20, and call
//   cuda_on_host::launch({.grid = {8}, .block = {128}, .cluster = 2, .shared = bytes, .order = 1}, kernel, args...);
// Every thread is a fiber; the CTAs of a cluster run together, clusters one after the other. A fiber runs until it
// waits, so nothing happens at the same time: a missing barrier shows as a result that depends on `order`. With 0 and 1
// fibers and clusters take turns in ascending and descending order, every warp and CTA running as far ahead of the next
// as barriers let it; more is a seed, and each round gives every fiber one turn in a new random order.
//
// Provided: threadIdx, blockIdx, blockDim, gridDim; __syncthreads and its _or, _and, _count; __syncwarp; __shfl_sync
// and its _xor, _up, _down; __ballot_sync, __any_sync, __all_sync, each with any mask; __popc, __ffs, __clz, __ldg;
// atomicMin, atomicMax;
// AHA_DYNAMIC_SHARED(T, name) and AHA_SHARED(T, name, count) in place of `extern __shared__ T name[]` and
// `__shared__ T name[count]`; float2, float4; in namespace aha cluster_rank(), cluster_size(), cluster_sync(),
// cluster_map(pointer to shared memory, rank), load_two, load_four, store_two, store_four, reciprocal and held.
// Shared memory starts as NaN. launch() throws std::runtime_error where a kernel deadlocks (also where some threads of
// a barrier have finished), writes past its dynamic shared memory, maps the memory of a CTA that has finished, or loads or
// stores a vector where it is not aligned.
// Not modelled: other atomics, the order in which memory becomes visible, and the width of a shuffle.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using std::max;
using std::min;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};

namespace cuda_on_host {

constexpr size_t STACK = 64 << 10, GUARD = 256;

struct Barrier {
  const char* name = "";
  unsigned expected = 0, arrived = 0, generation = 0;
};

// One word from each lane; two sets in turn, so that one barrier per exchange is enough.
struct Exchange {
  Barrier barrier;
  uint64_t words[2][32];
  unsigned count[32] = {};
};

struct Cta {
  dim3 index;
  unsigned rank = 0, running = 0;
  std::vector<char> shared;
  std::map<const void*, std::vector<char>> arrays;  // one for each AHA_SHARED in the source
  Barrier barrier;
  std::vector<std::map<unsigned, Exchange>> warps;  // by mask
  int votes[3] = {};
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Cta* cta;
  dim3 thread;
  unsigned lane, warp, votes = 0;
  const Barrier* waits = nullptr;
  unsigned generation = 0;
  bool finished = false;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Cta> ctas;  // of the cluster that is running
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  Barrier cluster;
  dim3 grid, block;
  std::function<void()> kernel;
  std::string error;
};

inline Machine& machine() {
  static Machine m;
  return m;
}
inline Fiber& here() { return *machine().current; }

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& self = here();
  self.waits = &barrier;
  self.generation = barrier.generation;
  swapcontext(&self.context, &machine().scheduler);
  if (!machine().error.empty()) throw std::runtime_error(machine().error);
}

inline void poison(std::vector<char>& memory, size_t bytes) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  memory.assign((bytes + 3) / 4 * 4 + GUARD, '\x5a');
  for (size_t at = 0; at + 4 <= memory.size() - GUARD; at += 4) std::memcpy(memory.data() + at, &nan, 4);
}

inline void* dynamic_shared() { return here().cta->shared.data(); }

inline void* shared_array(const void* site, size_t bytes) {
  std::vector<char>& memory = here().cta->arrays[site];
  if (memory.empty()) poison(memory, bytes);
  return memory.data();
}

// What lane `from` gives, for every lane in the mask.
template <typename T, typename From>
T exchange(unsigned mask, T value, const From& from) {
  static_assert(sizeof(T) <= 8);
  Fiber& self = here();
  Exchange& lanes = self.cta->warps[self.warp][mask];
  lanes.barrier.name = "warp";
  lanes.barrier.expected = std::popcount(mask);
  uint64_t* words = lanes.words[lanes.count[self.lane]++ % 2];
  std::memcpy(&words[self.lane], &value, sizeof(T));
  wait(lanes.barrier);
  const unsigned source = from(self.lane);
  T got = value;
  if (source < 32 && mask >> source & 1) std::memcpy(&got, &words[source], sizeof(T));
  return got;
}

inline unsigned ballot(unsigned mask, bool value) {
  unsigned bits = 0;
  Fiber& self = here();
  const unsigned turn = self.cta->warps[self.warp][mask].count[self.lane] % 2;
  exchange<uint64_t>(mask, value, [](unsigned lane) { return lane; });
  const Exchange& lanes = self.cta->warps[self.warp][mask];
  for (unsigned lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) bits |= unsigned(lanes.words[turn][lane]) << lane;
  return bits;
}

inline int block_count(bool value) {
  Fiber& self = here();
  int& votes = self.cta->votes[self.votes % 3];
  self.cta->votes[++self.votes % 3] = 0;  // of the next vote; some thread may still read the one before
  votes += value;
  wait(self.cta->barrier);
  return votes;
}

inline void fiber_main() {
  try {
    machine().kernel();
  } catch (const std::exception& e) {
    if (machine().error.empty()) machine().error = e.what();
  }
  here().finished = true;
  --here().cta->running;
  swapcontext(&here().context, &machine().scheduler);
}

// Not inline: getcontext may return twice as far as the compiler knows.
__attribute__((noinline)) inline void prepare(Fiber& fiber) {
  fiber.stack = std::make_unique_for_overwrite<char[]>(STACK);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = STACK;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
}

// One turn for the fibers from first ... to last in the order of `turns`; whether any could move.
inline bool run_once(const std::vector<size_t>& turns, size_t first, size_t last) {
  Machine& m = machine();
  bool progress = false;
  for (size_t at = first; at < last; ++at) {
    Fiber& fiber = m.fibers[turns[at]];
    if (fiber.finished || (m.error.empty() && fiber.waits && fiber.waits->generation == fiber.generation)) continue;
    fiber.waits = nullptr;
    progress = true;
    m.current = &fiber;
    swapcontext(&m.scheduler, &fiber.context);
  }
  return progress;
}

// As far ahead of the others as barriers let it: each warp, then each CTA.
inline bool run_ahead(const std::vector<size_t>& turns, size_t threads) {
  bool any = false;
  for (size_t cta = 0; cta < turns.size(); cta += threads)
    for (bool moved = true; moved; any |= moved) {
      moved = false;
      for (size_t warp = cta; warp < cta + threads; warp += 32)
        while (run_once(turns, warp, std::min(warp + 32, cta + threads))) moved = true;
    }
  return any;
}

inline void report_deadlock() {
  Machine& m = machine();
  const auto waits = [](const Fiber& fiber) { return !fiber.finished; };
  const auto stuck = std::find_if(m.fibers.begin(), m.fibers.end(), waits);
  const size_t waiting = std::count_if(m.fibers.begin(), m.fibers.end(), waits);
  m.error = "deadlock: " + std::to_string(waiting) + " threads wait, " + std::to_string(m.fibers.size() - waiting) +
            " have finished; thread " + std::to_string(stuck->thread.x) + " of CTA " +
            std::to_string(stuck->cta->index.x) + " waits for its " + stuck->waits->name;
}

// Gives every fiber of the cluster its turns until all have finished.
inline void run_cluster(unsigned order, size_t threads) {
  Machine& m = machine();
  std::vector<size_t> turns(m.fibers.size());
  std::iota(turns.begin(), turns.end(), 0);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  std::mt19937 random(order);
  while (!std::all_of(m.fibers.begin(), m.fibers.end(), [](const Fiber& fiber) { return fiber.finished; })) {
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    if (!(order > 1 ? run_once(turns, 0, turns.size()) : run_ahead(turns, threads))) report_deadlock();
  }
}

struct Shape {
  dim3 grid, block;
  unsigned cluster = 1;  // CTAs, along x
  size_t shared = 0;     // bytes
  unsigned order = 0;
};

template <typename... P, typename... A>
void launch(const Shape& shape, void (*kernel)(P...), const A&... arguments) {
  Machine& m = machine();
  const dim3 grid = shape.grid, block = shape.block;
  const unsigned threads = block.x * block.y * block.z, groups = grid.x / shape.cluster * grid.y * grid.z;
  if (!groups || !threads || threads > 1024 || grid.x % shape.cluster) throw std::runtime_error("invalid launch");
  m.grid = grid;
  m.block = block;
  m.kernel = [&] { kernel(static_cast<P>(arguments)...); };
  m.error.clear();
  std::vector<unsigned> sequence(groups);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (shape.order == 1) std::reverse(sequence.begin(), sequence.end());
  if (shape.order > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(shape.order));
  for (unsigned group : sequence) {
    m.ctas = std::vector<Cta>(shape.cluster);
    m.fibers = std::vector<Fiber>(shape.cluster * threads);
    m.cluster = {"cluster", shape.cluster * threads};
    for (unsigned rank = 0; rank < shape.cluster; ++rank) {
      Cta& cta = m.ctas[rank];
      const unsigned flat = group * shape.cluster + rank;
      cta.index = {flat % grid.x, flat / grid.x % grid.y, flat / grid.x / grid.y};
      cta.rank = rank;
      cta.running = threads;
      cta.barrier = {"block", threads};
      cta.warps.resize((threads + 31) / 32);
      poison(cta.shared, shape.shared);
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = m.fibers[rank * threads + t];
        fiber.cta = &cta;
        fiber.thread = {t % block.x, t / block.x % block.y, t / block.x / block.y};
        fiber.lane = t % 32;
        fiber.warp = t / 32;
        prepare(fiber);
      }
    }
    run_cluster(shape.order, threads);
    for (const Cta& cta : m.ctas)
      if (std::any_of(cta.shared.end() - GUARD, cta.shared.end(), [](char c) { return c != '\x5a'; }))
        m.error = m.error.empty() ? "a write past the end of dynamic shared memory" : m.error;
    if (!m.error.empty()) throw std::runtime_error(m.error);
  }
}

}  // namespace cuda_on_host

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (cuda_on_host::here().thread)
#define blockIdx (cuda_on_host::here().cta->index)
#define blockDim (cuda_on_host::machine().block)
#define gridDim (cuda_on_host::machine().grid)
#define AHA_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(cuda_on_host::dynamic_shared())
#define AHA_SHARED(T, name, count)  \
  static const char name##_site = 0; \
  T* name = static_cast<T*>(cuda_on_host::shared_array(&name##_site, sizeof(T) * (count)))

inline void __syncthreads() { cuda_on_host::wait(cuda_on_host::here().cta->barrier); }
inline int __syncthreads_count(int value) { return cuda_on_host::block_count(value != 0); }
inline int __syncthreads_or(int value) { return __syncthreads_count(value) != 0; }
inline int __syncthreads_and(int value) { return __syncthreads_count(value == 0) == 0; }

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_host::exchange<int>(mask, 0, [](unsigned lane) { return lane; });
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_on_host::exchange(mask, value, [=](unsigned) { return unsigned(lane) % 32; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_host::exchange(mask, value, [=](unsigned own) { return own ^ unsigned(bits); });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  return cuda_on_host::exchange(mask, value, [=](unsigned own) { return own - by; });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  return cuda_on_host::exchange(mask, value, [=](unsigned own) { return own + by; });
}
inline unsigned __ballot_sync(unsigned mask, int value) { return cuda_on_host::ballot(mask, value != 0); }
inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }
inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == mask; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(unsigned x) { return std::countl_zero(x); }
inline int __ffs(unsigned x) { return x ? std::countr_zero(x) + 1 : 0; }
inline int atomicMin(int* at, int value) { return std::exchange(*at, std::min(*at, value)); }
inline int atomicMax(int* at, int value) { return std::exchange(*at, std::max(*at, value)); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}

namespace cuda_on_host {

// A vector at an address that a GPU would accept.
template <typename T>
T* aligned(const float* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) throw std::runtime_error("an address that is not aligned");
  return reinterpret_cast<T*>(const_cast<float*>(address));
}

}  // namespace cuda_on_host

namespace aha {

inline float2 load_two(const float* from) { return *cuda_on_host::aligned<float2>(from); }
inline float4 load_four(const float* from) { return *cuda_on_host::aligned<float4>(from); }
inline void store_two(float* to, const float2& x) { *cuda_on_host::aligned<float2>(to) = x; }
inline void store_four(float* to, const float4& x) { *cuda_on_host::aligned<float4>(to) = x; }
inline float reciprocal(float x) { return 1.0f / x; }

inline int cluster_rank() { return cuda_on_host::here().cta->rank; }
inline int cluster_size() { return cuda_on_host::machine().ctas.size(); }
inline void cluster_sync() { cuda_on_host::wait(cuda_on_host::machine().cluster); }

template <typename T>
T* cluster_map(T* own, int rank) {
  cuda_on_host::Cta &from = *cuda_on_host::here().cta, &to = cuda_on_host::machine().ctas.at(rank);
  if (!to.running) throw std::runtime_error("a map of the shared memory of a CTA that has finished");
  return reinterpret_cast<T*>(to.shared.data() + (reinterpret_cast<char*>(own) - from.shared.data()));
}

template <typename T>
T held(T x) {
  return x;
}

}  // namespace aha
