// Products of a few rows of float32 with weights in int8, for the CPU: as long as it takes to read the weights.
//
// Outputs are lanes: the codes of OUTPUTS outputs lie side by side, input by input, and so do their scales, group by
// group.

constexpr int OUTPUTS = 16;                 // whose codes lie side by side
constexpr int GROUP = 32;                   // inputs that share a scale
constexpr int PARTS = OUTPUTS / LANES;      // vectors of outputs
constexpr int CODES = OUTPUTS * GROUP;      // codes of a group
constexpr int SOON = 4;                     // groups between what is read and what is asked for
constexpr int MOST = REGISTERS / PARTS / 2;  // rows that are multiplied together

typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

// The compiler's own conversion of so many bytes goes number by number.
static inline Floats load(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(p), Floats);
#endif
}

// R rows, x [inputs][R], by OUTPUTS outputs, of which the first `own` are written to out [R][outs].
template <int R>
static void multiply_tile(const float* x, int64_t groups, const int8_t* codes, const Narrow* scales,
                          float* out, int64_t outs, int64_t own) {
  constexpr int CHAINS = R * PARTS < 8 ? 8 / (R * PARTS) : 1;  // sums that do not wait for each other
  Floats total[R][PARTS] = {};
  for (int64_t g = 0; g < groups; ++g, x += GROUP * R, codes += CODES, scales += OUTPUTS) {
    Floats sums[R][PARTS][CHAINS] = {};
    for (int i = 0; i < CODES; i += 64) __builtin_prefetch(codes + SOON * CODES + i);
#pragma GCC unroll 32
    for (int k = 0; k < GROUP; ++k)
#pragma GCC unroll 4
      for (int p = 0; p < PARTS; ++p) {
        const Floats code = load(codes + k * OUTPUTS + p * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          Floats& sum = sums[r][p][k % CHAINS];
          sum = fused(code, fill(x[k * R + r]), sum);
        }
      }
#pragma GCC unroll 4
    for (int p = 0; p < PARTS; ++p) {
      const Floats scale = load(scales + p * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        Floats sum = sums[r][p][0];
#pragma GCC unroll 16
        for (int c = 1; c < CHAINS; ++c) sum += sums[r][p][c];
        total[r][p] = fused(sum, scale, total[r][p]);
      }
    }
  }
  for (int r = 0; r < R; ++r) std::memcpy(out + r * outs, total[r], own * sizeof(float));
}

// One weight of `outs` outputs: codes [tiles][inputs][OUTPUTS], scales [tiles][groups][OUTPUTS], out [rows][outs].
struct Int8Weight {
  const int8_t* codes;
  const Narrow* scales;
  float* out;
  int64_t outs;
};

// Rows are multiplied MOST at a time, what is left by 4, 2 and 1: calls `each` with how many and the first of them.
template <int R = MOST, typename Each>
static inline void by_rows(int64_t rows, const Each& each, int64_t first = 0) {
  for (; first + R <= rows; first += R) each(std::integral_constant<int, R>(), first);
  if constexpr (R > 1) by_rows<R / 2>(rows, each, first);
}

// x [rows][inputs] by each of `count` weights, whose `groups` of inputs reach as far or further; work has room for the
// rows of x as long as these.
extern "C" void multiply_int8(const float* x, int64_t rows, int64_t inputs, int64_t groups, const Int8Weight* weights,
                              int64_t count, float* work, int64_t threads) {
  const int64_t size = groups * GROUP;
  by_rows(rows, [&](auto many, int64_t first) {
    for (int64_t k = 0; k < size; ++k)
      for (int r = 0; r < many; ++r) work[first * size + k * many + r] = k < inputs ? x[(first + r) * inputs + k] : 0;
  });
  int64_t tiles = 0;
  for (int64_t i = 0; i < count; ++i) tiles += (weights[i].outs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const Int8Weight* weight = weights;
    int64_t at = tile;
    for (int64_t own; at >= (own = (weight->outs + OUTPUTS - 1) / OUTPUTS); ++weight) at -= own;
    const int8_t* codes = weight->codes + at * groups * CODES;
    const Narrow* scales = weight->scales + at * groups * OUTPUTS;
    const int64_t outs = weight->outs, own = outs - at * OUTPUTS < OUTPUTS ? outs - at * OUTPUTS : OUTPUTS;
    by_rows(rows, [&](auto many, int64_t first) {
      multiply_tile<many>(work + first * size, groups, codes, scales, weight->out + first * outs + at * OUTPUTS, outs, own);
    });
  }
}
