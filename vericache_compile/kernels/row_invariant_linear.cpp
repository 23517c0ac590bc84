// Products of a few rows with a weight of float32 or bfloat16, for the CPU: rows are floats, and so are sums.
//
// Numbers of the inner dimension are lanes: each output of each row is LANES sums over every LANES-th product, in
// order, added up in one way. How many other rows there are, and in which pieces the inner dimension is gone through,
// changes no bit; a row less is work less.

constexpr int ROWS = REGISTERS < 32 ? 2 : 4, OUTS = 4;  // whose sums fill the registers
constexpr int BLOCK_OUTS = 2 * OUTS;                    // whose weights stay in the nearest cache
constexpr int FEW = 16;                                 // rows for which a weight is gone through once, as it comes
constexpr int MANY = 64;                                // rows that are gone through together
constexpr int64_t PIECE = 512;                          // of the inner dimension, for more rows than a few

// The first `count` < LANES numbers, and zeros.
template <typename T>
static inline Floats load_some(const T* p, int64_t count) {
  alignas(64) T some[LANES] = {};
  std::memcpy(some, p, count * sizeof(T));
  return load(some);
}

// Adds products of numbers [from, to) of x [R][size] and weight [O][size] to sums [R][BLOCK_OUTS]. Meanwhile `ahead`
// numbers of each of O weights come to the caches from `next` on, which may lie beyond the last: nothing is read there.
template <int R, int O, typename T>
static inline void add_products(const float* x, const T* weight, int64_t size, int64_t from, int64_t to, Floats* sums,
                                const T* next, int64_t ahead) {
  Floats total[R][O];
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) total[r][o] = sums[r * BLOCK_OUTS + o];
  const int64_t even = from + (to - from) / LANES * LANES;
  if (O == OUTS)
    for (int64_t k = from; k < to && k < ahead; k += LANES)
      for (int o = 0; o < O; ++o) __builtin_prefetch(next + o * size + k);
  for (int64_t k = from; k < even; k += LANES) {
    Floats right[O];
    for (int o = 0; o < O; ++o) right[o] = load(weight + o * size + k);
    for (int r = 0; r < R; ++r) {
      const Floats left = load(x + r * size + k);
      for (int o = 0; o < O; ++o) total[r][o] = fused(left, right[o], total[r][o]);
    }
  }
  if (even < to)
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < O; ++o)
        total[r][o] = fused(load_some(x + r * size + even, to - even), load_some(weight + o * size + even, to - even),
                            total[r][o]);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) sums[r * BLOCK_OUTS + o] = total[r][o];
}

// `count` <= MANY rows by `outs` <= BLOCK_OUTS weights, to sums [count][BLOCK_OUTS].
template <typename T>
static void add_block(const float* x, const T* weight, int64_t count, int64_t outs, int64_t size, Floats* sums) {
  const int64_t piece = count <= FEW ? size : PIECE;
  // What follows a weight comes to the caches in as many parts as there are turns over this one.
  const int64_t turns = count / ROWS, ahead = count <= FEW && turns > 1 ? (size / LANES / turns + 1) * LANES : 0;
  for (int64_t from = 0; from < size; from += piece) {
    const int64_t to = from + piece < size ? from + piece : size;
    for (int64_t r = 0; r < count;) {
      const bool full = r + ROWS <= count;
      for (int64_t o = 0; o < outs;) {
        const float* own_x = x + r * size;
        const T* own = weight + o * size;
        const T* next = own + BLOCK_OUTS * size + r / ROWS * ahead;
        Floats* at = sums + r * BLOCK_OUTS + o;
        const bool whole = o + OUTS <= outs;
        if (full && whole)
          add_products<ROWS, OUTS>(own_x, own, size, from, to, at, next, ahead);
        else if (full)
          add_products<ROWS, 1>(own_x, own, size, from, to, at, next, 0);
        else if (whole)
          add_products<1, OUTS>(own_x, own, size, from, to, at, next, 0);
        else
          add_products<1, 1>(own_x, own, size, from, to, at, next, 0);
        o += whole ? OUTS : 1;
      }
      r += full ? ROWS : 1;
    }
  }
}

template <typename T>
static void multiply_rows_as(const float* x, const T* weight, const T* bias, int64_t rows, int64_t total, int64_t token,
                             int64_t size, int64_t outs, T* out, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < (outs + BLOCK_OUTS - 1) / BLOCK_OUTS; ++block) {
    const int64_t first = block * BLOCK_OUTS, own = outs - first < BLOCK_OUTS ? outs - first : BLOCK_OUTS;
    alignas(64) Floats sums[MANY * BLOCK_OUTS];
    for (int64_t begin = 0; begin < rows; begin += MANY) {
      const int64_t count = rows - begin < MANY ? rows - begin : MANY;
      std::memset(sums, 0, count * BLOCK_OUTS * sizeof(Floats));
      add_block(x + begin * size, weight + first * size, count, own, size, sums);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t o = 0; o < own; ++o) {
          const float made = sum<LANES / 2>(reinterpret_cast<const float*>(sums + r * BLOCK_OUTS + o));
          narrowed(bias ? made + widened(bias[first + o]) : made, out[(begin + r) * outs + first + o]);
        }
    }
  }
  for (int64_t m = rows; m < total; ++m) std::memcpy(out + m * outs, out + m % token * outs, outs * sizeof(T));
}

// out[m][o] = sum over k of x[m][k] * weight[o][k], plus bias[o] where there is one; all of them without gaps, and of
// float32 or (narrow) bfloat16, of which work has room for the rows of x as floats. Of the `total` rows only those of the
// first `wanted` tokens (null: of all), `token` rows each, are multiplied: what comes after them is what the first
// token's rows were given, over and over.
extern "C" void multiply_rows(const void* x, const void* weight, const void* bias, const int64_t* wanted, int64_t total,
                              int64_t token, int64_t size, int64_t outs, void* out, int64_t narrow, float* work,
                              int64_t threads) {
  const int64_t rows = wanted && *wanted * token < total ? *wanted * token : total;
  const auto multiply = [&](const float* floats, auto zero) {
    using T = decltype(zero);
    multiply_rows_as(floats, static_cast<const T*>(weight), static_cast<const T*>(bias), rows, total, token, size, outs,
                     static_cast<T*>(out), threads);
  };
  if (!narrow) return multiply(static_cast<const float*>(x), 0.0f);
  for (int64_t i = 0; i < rows * size; ++i) work[i] = widened(static_cast<const Narrow*>(x)[i]);
  multiply(work, Narrow{});
}
