// CUDA's execution model on a CPU. Each CUDA thread is a fiber, which runs until it waits for others; which one goes on
// is random, set by a seed. What CUDA leaves undefined is made to show: shared memory starts as NaN, asynchronous
// copies arrive as late or as early as allowed, and waits that hardware would not serve fail the launch with a message.
//
// Environment, read at every launch:
//   LORAKERN_EMULATOR_SEED    an integer (0): the order of blocks, warps and lanes
//   LORAKERN_EMULATOR_COPIES  late (the default) or early: when cp.async copies
//   LORAKERN_EMULATOR_ARCH    90 (the default) or 80
//   LORAKERN_EMULATOR_MULTIPROCESSORS  of the device; read when a module first asks
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

constexpr int kLanes = 32;

struct Dim {
  unsigned x, y, z;
};

// Where a call stands in the source of a kernel. As a default argument it is evaluated where the call is.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

struct Launch {
  Dim grid, block, cluster;
  size_t dynamic_shared;  // bytes
  std::function<void()> kernel;
};

// Runs a kernel to its end. Null, or what it did wrong: the text stays until the next launch fails.
const char* run(const Launch& launch);

// Ends the launch. Only for the thread of a kernel.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);

// The lanes of `mask` meet, and the last one to arrive calls combine with what each passed (null for the others).
// Where `aligned` (PTX .aligned) all of them must have come from the same place in the source.
using Combine = void (*)(void* const (&lanes)[kLanes], uint32_t mask);
void meet_warp(const char* what, Site site, uint32_t mask, bool aligned, void* arguments, Combine combine);

// All threads of a block meet; how many of them passed true.
int meet_block(const char* what, Site site, bool predicate);

// All threads of a cluster that have not exited meet.
void meet_cluster(Site site);

// Bytes of all __shared__ variables of the module: no fewer than those of a kernel.
size_t static_shared();

uint32_t lane();
uint32_t cluster_rank();
uint32_t cluster_size();
char* dynamic_shared();

// Fails unless [address, address + bytes) lies in shared memory of the block and is aligned to its size.
void check_shared(const char* what, Site site, const void* address, size_t bytes);

// The place in the shared memory of block `rank` of the cluster that `address` is in this block's.
void store_shared_of(Site site, uint32_t rank, void* address, const void* value, size_t bytes);

// See csrc/cuda/ptx.cuh. The counter of a block is anywhere in its shared memory.
void expect_bytes(Site site, uint64_t* counter, int bytes);
void send_to(Site site, uint32_t rank, void* address, const void* value, size_t bytes, uint64_t* counter);
void await_bytes(Site site, uint64_t* counter);

void copy_async(Site site, void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int pending);

int arch();
uint64_t setting(const char* name, uint64_t otherwise);

}  // namespace emulator

// Of the thread that runs.
extern emulator::Dim threadIdx, blockIdx, blockDim, gridDim;
