// The instructions of tensor cores and asynchronous copies that CUDA C++ has no name for (sm_80 and up); all inline PTX
// of the tensor-core kernels is here. PTX ISA 8.x, sections "mma", "ldmatrix", "cp.async".
//
// Fragments, with g = lane / 4 and t = lane % 4, of m16n8k16 (16-bit; a register holds two, the lower column or k first):
//   A [16, 16] row major: a[0] row g, k 2t 2t+1; a[1] row g+8, same k; a[2] row g, k 2t+8 2t+9; a[3] row g+8, those k
//   B [16, 8]:            b[0] column g, k 2t 2t+1; b[1] column g, k 2t+8 2t+9
//   C, D [16, 8]:         d[0], d[1] row g, columns 2t, 2t+1; d[2], d[3] row g+8, same columns
// of m16n8k8 (tf32, one value a register): A: a[0] row g, k t; a[1] row g+8, k t; a[2] row g, k t+4; a[3] row g+8, k t+4.
//   B: b[0] column g, k t; b[1] column g, k t+4. C, D as above.
//
// With NATRAIN_EMULATED a host compiler gets the same names from a header of the tests.
#pragma once

#include "numeric.cuh"

#ifdef NATRAIN_EMULATED
#include "intrinsics_emulated.h"
#else

// Declares `unsigned char* name`: the block's dynamic shared memory.
#define NATRAIN_DYNAMIC_SHARED(name)                                  \
  extern __shared__ __align__(128) unsigned char natrain_shared_[];   \
  unsigned char* const name = natrain_shared_

namespace natrain {

// Address in shared memory, in bytes: what ldmatrix and cp.async take.
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return unsigned(__cvta_generic_to_shared(pointer));
}

// Four (two) 8x8 matrices of 16-bit elements; lane 8i + j gives the address of row j of matrix i, 16 bytes, aligned to
// 16. Register i gets row lane / 4, elements 2 * (lane % 4) and the next, of matrix i; `trans`: of its transpose.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], unsigned address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

// d += a * b, accumulated in float32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
template <>
__device__ __forceinline__ void mma_m16n8k16<float16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma_m16n8k16<bfloat16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Fetches 16 bytes into shared memory past the first-level cache; zeros when not valid, and nothing is read then.
// Both addresses aligned to 16 bytes.
__device__ __forceinline__ void cp_async_16(unsigned shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(shared), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
// The same of 8 bytes, through the first-level cache.
__device__ __forceinline__ void cp_async_8(unsigned shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :
               : "r"(shared), "l"(global), "r"(valid ? 8 : 0)
               : "memory");
}
// And of 4.
__device__ __forceinline__ void cp_async_4(unsigned shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :
               : "r"(shared), "l"(global), "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most the N latest committed groups of this thread are in flight.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Programmatic dependent launch (sm_90): the next kernel of the stream may start once every block has said so, if it was
// launched to; what this kernel writes it sees after it has awaited it. PTX ISA, "griddepcontrol".
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Hides what `x` is, so that nothing that depends on it is computed ahead and kept in registers.
__device__ __forceinline__ void hide(unsigned& x) { asm volatile("" : "+r"(x)); }

// 2^x and log2(x), within 2 ulp; subnormal results and arguments count as zero. 2^-inf = 0, log2(0) = -inf.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values rounded to T (to nearest even) in one register, `low` in the lower half.
template <class T>
__device__ __forceinline__ unsigned pack(float low, float high);
template <>
__device__ __forceinline__ unsigned pack<float16>(float low, float high) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
__device__ __forceinline__ unsigned pack<bfloat16>(float low, float high) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The nearest value with 10 bits of mantissa, as the bits of a float.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

}  // namespace natrain

#endif
