// The instructions that CUDA C++ has no name for, one function each. No other file contains PTX.
//
// Copies and matrix loads are not marked as touching memory: what they touch is fenced by wait_copies and barriers, and
// the compiler may keep across them what it has read from elsewhere.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace lorakern::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// An address in shared memory that is kept in a register: a pointer is made anew, from special registers, at every use.
using Shared = uint32_t;

__device__ __forceinline__ Shared shared_place(const void* pointer) {
  Shared place;
  asm volatile("mov.u32 %0, %1;" : "=r"(place) : "r"(shared_address(pointer)));
  return place;
}

// 16 bytes of shared memory begin to be filled with `bytes` (0 .. 16) bytes from global memory, zeros after them. Both
// addresses are multiples of 16; where bytes is 0 nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes));
}

__device__ __forceinline__ void copy_async(Shared shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes));
}

// Ends a group of the copies that this thread has begun since the last group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until all but the newest kPending groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of matrix i, a multiple of 16; lane
// 4 g + t gets, in out[i], the elements 2 t and 2 t + 1 of row g of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row));
}

__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  load_matrices(out, shared_address(row));
}

// c (16 x 8) += a (16 x 16) b (16 x 8). Lane 4 g + t holds c[g][2 t], c[g][2 t + 1], c[g + 8][2 t], c[g + 8][2 t + 1];
// in a the pairs a[g][2 t ..], a[g + 8][2 t ..], a[g][2 t + 8 ..], a[g + 8][2 t + 8 ..]; in b the pairs b[2 t ..][g]
// and b[2 t + 8 ..][g], the smaller index in the lower half.
template <typename T>
__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// float32 rounded to nearest to the 10 bits of mantissa that tf32 keeps; float16 and bfloat16 values stay as they are.
__device__ __forceinline__ uint32_t round_tf32(float value) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return rounded;
}

// c (16 x 8) += a (16 x 8) b (8 x 8) of tf32 values. Lane 4 g + t holds c as `multiply` has it; a[g][t], a[g + 8][t],
// a[g][t + 4], a[g + 8][t + 4]; b[t][g] and b[t + 4][g].
__device__ __forceinline__ void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A cluster is a group of blocks whose shared memory each can write. Before sm_90 every block is a cluster of its own.

// All threads of all blocks of the cluster meet; what they wrote to any shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// Writes to the place in block `rank`'s shared memory that `shared` is in this block's.
__device__ __forceinline__ void store_shared_of(uint32_t rank, float* shared, float value) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#else
  *shared = value;
#endif
}

__device__ __forceinline__ void store_shared_of(uint32_t rank, float4* shared, float4 value) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(remote), "f"(value.x), "f"(value.y),
               "f"(value.z), "f"(value.w)
               : "memory");
#else
  *shared = value;
#endif
}

// All threads of all blocks of the cluster meet; nothing that they wrote is seen for it.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// One thread of a block says how many bytes send_to will bring to the block. The threads of the cluster meet before the
// first is sent. Used once.
__device__ __forceinline__ void expect_bytes(uint64_t* arrivals, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "mbarrier.init.shared.b64 [%0], 1;\nmbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrivals)),
      "r"(bytes)
      : "memory");
#endif
}

// Like store_shared_of, and counted by that block's `arrivals`.
__device__ __forceinline__ void send_to(uint32_t rank, float2* shared, float2 value, uint64_t* arrivals) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote, counter;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(counter) : "r"(shared_address(arrivals)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(remote),
               "f"(value.x), "f"(value.y), "r"(counter)
               : "memory");
#else
  *shared = value;
#endif
}

// Every thread of the block waits until all bytes have arrived, and sees them.
__device__ __forceinline__ void await_bytes(uint64_t* arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n@!done bra again;\n}" ::"r"(
          shared_address(arrivals))
      : "memory");
#else
  __syncthreads();
#endif
}

// The shared memory that the launch asked for.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char lorakern_shared[];
  return lorakern_shared;
}

}  // namespace lorakern::cuda
