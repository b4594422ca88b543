// The twin of csrc/include/intrinsics.cuh and of the instructions in numeric.cuh: same names, same registers of every lane,
// as the PTX manual draws the fragments of mma and ldmatrix.
#pragma once

#define NATRAIN_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared

namespace natrain {

struct float16;
struct bfloat16;

inline float widen_bits(unsigned short bits, const float16*) {
  const unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
                          : exponent     ? ldexpf(float(1024 + fraction), int(exponent) - 25)
                                         : ldexpf(float(fraction), -24);
  return bits >> 15 ? -magnitude : magnitude;
}
inline float widen_bits(unsigned short bits, const bfloat16*) { return __uint_as_float(unsigned(bits) << 16); }
inline void widen_pair(unsigned word, float16*, float& low, float& high) {
  low = widen_bits((unsigned short)word, (float16*)nullptr);
  high = widen_bits((unsigned short)(word >> 16), (float16*)nullptr);
}

// To nearest, ties to even.
inline unsigned short narrow_bits(float x, const float16*) {
  const unsigned short sign = __float_as_uint(x) >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(magnitude, &exponent);
  // The last bit is worth 2^(exponent - 11), and 2^-24 among the subnormals; a carry moves on to the next exponent.
  const int last = exponent - 11 > -24 ? exponent - 11 : -24;
  const unsigned whole = unsigned(rintf(ldexpf(magnitude, -last)));
  return sign | (whole < 1024 ? whole : whole - 1024 + ((last + 25) << 10));
}
inline unsigned short narrow_bits(float x, const bfloat16*) {
  const unsigned word = __float_as_uint(x);
  if (x != x) return 0x7fff;
  return (unsigned short)((word + 0x7fffu + (word >> 16 & 1u)) >> 16);
}

template <class T>
inline unsigned pack(float low, float high) {
  return narrow_bits(low, (T*)nullptr) | unsigned(narrow_bits(high, (T*)nullptr)) << 16;
}

// To nearest, ties away from zero (cvt.rna.tf32).
inline unsigned to_tf32(float x) {
  const unsigned word = __float_as_uint(x);
  return x - x != 0 ? word : (word + 0x1000u) & ~0x1fffu;
}

// Kernels run one after another here.
inline void let_next_kernel_start() {}
inline void await_previous_kernel() {}

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }

inline unsigned shared_address(const void* at, EMULATOR_HERE) {
  const long long offset = static_cast<const unsigned char*>(at) - emulator::dynamic_shared;
  if (offset < 0 || offset > emulator::dynamic_shared_bytes)
    emulator::fail(place, "shared_address: %lld is no address in the %u bytes of dynamic shared memory", offset,
                   emulator::dynamic_shared_bytes);
  return unsigned(offset);
}

namespace emulated {

struct LoadMatrix {
  emulator::Place place;
  unsigned address;
  unsigned registers[4];
};

// Lane i of the first 8 * COUNT names row i % 8 of matrix i / 8; lane 4 r + c receives elements 2 c and 2 c + 1 of row r,
// or of column r.
template <int COUNT, bool TRANS>
inline void finish_load(void** requests, unsigned) {
  unsigned short matrices[COUNT][8][8];
  for (int lane = 0; lane < 8 * COUNT; ++lane) {
    const LoadMatrix& of = *static_cast<LoadMatrix*>(requests[lane]);
    if (of.address % 16 || of.address + 16 > emulator::dynamic_shared_bytes)
      emulator::fail(of.place, "ldmatrix: lane %d reads at %u of %u bytes of shared memory", lane, of.address,
                     emulator::dynamic_shared_bytes);
    std::memcpy(matrices[lane / 8][lane % 8], emulator::dynamic_shared + of.address, 16);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int m = 0; m < COUNT; ++m) {
      const int row = lane / 4, column = lane % 4 * 2;
      const unsigned low = TRANS ? matrices[m][column][row] : matrices[m][row][column];
      const unsigned high = TRANS ? matrices[m][column + 1][row] : matrices[m][row][column + 1];
      static_cast<LoadMatrix*>(requests[lane])->registers[m] = low | high << 16;
    }
}

template <int COUNT, bool TRANS>
inline void load_matrix(const char* name, emulator::Place place, unsigned (&r)[COUNT], unsigned address) {
  LoadMatrix request = {place, address, {}};
  emulator::collective(name, place, 0xffffffffu, &request, finish_load<COUNT, TRANS>);
  for (int i = 0; i < COUNT; ++i) r[i] = request.registers[i];
}

struct Product {
  float (&d)[4];
  const unsigned (&a)[4];
  const unsigned (&b)[2];
};

template <class T>
struct Halves {
  static constexpr int DEPTH = 16;
  static float get(const unsigned* registers, int index) {
    return widen_bits((unsigned short)(registers[index / 2] >> 16 * (index % 2)), (T*)nullptr);
  }
};
struct Tf32 {
  static constexpr int DEPTH = 8;
  static float get(const unsigned* registers, int index) { return __uint_as_float(registers[index] & ~0x1fffu); }
};

// In a lane 4 g + t, with n elements a register: element e of register r of A is row g + 8 (r % 2), column
// n t + e + DEPTH / 2 (r / 2); of B it is row n t + e + DEPTH / 2 r, column g; D's are (g + 8 (i / 2), 2 t + i % 2).
template <class Type>
inline void finish_product(void** requests, unsigned) {
  constexpr int DEPTH = Type::DEPTH, PER = DEPTH / 8;
  float a[16][DEPTH], b[DEPTH][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Product& of = *static_cast<Product*>(requests[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)
      for (int e = 0; e < PER; ++e) a[g + 8 * (r % 2)][PER * t + e + DEPTH / 2 * (r / 2)] = Type::get(of.a, PER * r + e);
    for (int r = 0; r < 2; ++r)
      for (int e = 0; e < PER; ++e) b[PER * t + e + DEPTH / 2 * r][g] = Type::get(of.b, PER * r + e);
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
      float& d = static_cast<Product*>(requests[lane])->d[i];
      for (int k = 0; k < DEPTH; ++k) d += a[row][k] * b[k][column];
    }
}

}  // namespace emulated

inline void ldmatrix_x4(unsigned (&r)[4], unsigned address, EMULATOR_HERE) {
  emulated::load_matrix<4, false>("ldmatrix_x4", place, r, address);
}
inline void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address, EMULATOR_HERE) {
  emulated::load_matrix<4, true>("ldmatrix_x4_trans", place, r, address);
}
inline void ldmatrix_x2(unsigned (&r)[2], unsigned address, EMULATOR_HERE) {
  emulated::load_matrix<2, false>("ldmatrix_x2", place, r, address);
}
inline void ldmatrix_x2_trans(unsigned (&r)[2], unsigned address, EMULATOR_HERE) {
  emulated::load_matrix<2, true>("ldmatrix_x2_trans", place, r, address);
}

template <class T>
inline void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMULATOR_HERE) {
  emulated::Product request = {d, a, b};
  emulator::collective("mma_m16n8k16", place, 0xffffffffu, &request, emulated::finish_product<emulated::Halves<T>>);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], EMULATOR_HERE) {
  emulated::Product request = {d, a, b};
  emulator::collective("mma_m16n8k8_tf32", place, 0xffffffffu, &request, emulated::finish_product<emulated::Tf32>);
}

inline void hide(unsigned&) {}

inline void cp_async_16(unsigned shared, const void* global, bool valid, EMULATOR_HERE) {
  emulator::copy_async(place, 16, shared, global, valid);
}
inline void cp_async_8(unsigned shared, const void* global, bool valid, EMULATOR_HERE) {
  emulator::copy_async(place, 8, shared, global, valid);
}
inline void cp_async_4(unsigned shared, const void* global, bool valid, EMULATOR_HERE) {
  emulator::copy_async(place, 4, shared, global, valid);
}
inline void cp_async_commit() { emulator::commit_async(); }
template <int N>
inline void cp_async_wait() {
  emulator::wait_async(N);
}

}  // namespace natrain
