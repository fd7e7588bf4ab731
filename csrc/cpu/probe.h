// What the machine can do at most, for the floors of the benchmarks: no kernel uses this.
#pragma once
#include <cstdint>
#include <string>

namespace lorakern::cpu {

// Read every byte of a buffer once, on all threads and with the widest loads of this CPU. Returns a checksum, so that
// no read can be left out.
uint64_t read_buffer(const void* data, int64_t bytes, int threads);

// Multiply-adds of registers alone: `rounds` times sixteen independent accumulators on each thread.
struct FmaLoop {
  std::string instruction;  // what was run, such as "avx512 fma"
  double operations;        // a multiply and an add each count as one
  float checksum;
};
FmaLoop fma_loop(bool bf16, int64_t rounds, int threads);

}  // namespace lorakern::cpu
