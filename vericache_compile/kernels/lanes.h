// Vectors of as many numbers as this machine works on at once, for the kernels of the CPU.

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(_OPENMP)
#include <omp.h>
static inline int thread_number() { return omp_get_thread_num(); }
#else
static inline int thread_number() { return 0; }
#endif

#if defined(__FMA__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX__)
constexpr int LANES = 8, REGISTERS = 16;
#elif defined(__aarch64__)
constexpr int LANES = 4, REGISTERS = 32;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// A bfloat16: the upper half of a float.
struct Narrow {
  uint16_t bits;
};

static inline float widened(float x) { return x; }
static inline float widened(Narrow x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float made;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

// To the nearest, of two that are as near to the even one; NaN stays NaN.
static inline void narrowed(float x, float& to) { to = x; }
static inline void narrowed(float x, Narrow& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to.bits = static_cast<uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0);
}

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline Floats load(const Narrow* p) {
  return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
}
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats fill(float x) { return x - Floats{}; }

template <int... I>
static inline Ints lane_numbers(std::integer_sequence<int, I...>) { return Ints{I...}; }
static inline Ints lane_numbers() { return lane_numbers(std::make_integer_sequence<int, LANES>()); }

// a * b + c, with one rounding where the machine has it. It is spelled out, and the compiler is told to fuse nothing by
// itself: for some machines it fuses one instantiation of a loop and not another, and a row's bits follow.
static inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
static inline Floats fused(Floats a, Floats b, float c) { return fused(a, b, fill(c)); }

// The sum of 2 * N numbers: of halves, of halves of these, and so on.
template <int N>
static inline float sum(const float* x) {
  typedef float Part __attribute__((vector_size(N * 4), aligned(4), may_alias));
  const Part half = *reinterpret_cast<const Part*>(x) + *reinterpret_cast<const Part*>(x + N);
  alignas(64) float left[N];
  *reinterpret_cast<Part*>(left) = half;
  return sum<N / 2>(left);
}
template <>
inline float sum<1>(const float* x) { return x[0] + x[1]; }

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Trades the upper half of every 2 * SPAN numbers of a for the lower half of b's.
template <int SPAN, int... I>
static inline void trade(Floats& a, Floats& b, std::integer_sequence<int, I...>) {
  const Floats low = PICK(a, b, (I & SPAN ? LANES + I - SPAN : I)...);
  b = PICK(a, b, (I & SPAN ? LANES + I : I + SPAN)...);
  a = low;
}

// Number i of vector j becomes number j of vector i.
template <int SPAN = LANES / 2>
static inline void transpose(Floats* x) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & SPAN)) trade<SPAN>(x[i], x[i + SPAN], std::make_integer_sequence<int, LANES>());
  if constexpr (SPAN > 1) transpose<SPAN / 2>(x);
}
