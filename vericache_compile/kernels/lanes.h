// Vectors of as many numbers as this machine works on at once, for the kernels of the CPU.

#include <cstdint>
#include <cstring>

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

static inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
static inline void store(float* p, Floats x) { *reinterpret_cast<Floats*>(p) = x; }
static inline Floats fill(float x) { return x - Floats{}; }

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
