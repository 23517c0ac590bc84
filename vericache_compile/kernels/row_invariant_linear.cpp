// Products of a few rows with a weight, float32, for the CPU.
//
// Numbers of the inner dimension are lanes: each output of each row is LANES sums over every LANES-th product, in
// order, added up in one way. How many other rows there are decides only how often a part of the weight is read again
// from the caches, so it changes no bit, and a row less is work less.

constexpr int ROWS = REGISTERS < 32 ? 2 : 4, OUTS = 4;  // whose sums fill the registers

// The first `count` < LANES numbers, and zeros.
static inline Floats load_some(const float* p, int64_t count) {
  alignas(64) float some[LANES] = {};
  std::memcpy(some, p, count * sizeof(float));
  return load(some);
}

// x [R][size] by weight [O][size], out [R][outs]. Meanwhile `ahead` numbers of each weight of `next` come to the caches.
template <int R, int O>
static inline void multiply(const float* x, const float* weight, const float* bias, int64_t size, float* out,
                            int64_t outs, const float* next, int64_t ahead) {
  Floats total[R][O] = {};
  auto add = [&](auto part, int64_t k) {
    Floats right[O];
    for (int o = 0; o < O; ++o) right[o] = part(weight + o * size + k);
    for (int r = 0; r < R; ++r) {
      const Floats left = part(x + r * size + k);
      for (int o = 0; o < O; ++o) total[r][o] = fused(left, right[o], total[r][o]);
    }
  };
  int64_t k = 0;
  for (; k + LANES <= size; k += LANES) {
    if (k < ahead)
      for (int o = 0; o < O; ++o) __builtin_prefetch(next + o * size + k);
    add(load, k);
  }
  if (k < size) add([&](const float* p) { return load_some(p, size - k); }, k);
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      const float made = sum<LANES / 2>(reinterpret_cast<const float*>(&total[r][o]));
      out[r * outs + o] = bias ? made + bias[o] : made;
    }
}

// All rows by weights [O][size], ROWS at a time; each time some of the weights that follow come to the caches.
template <int O>
static void multiply_all(const float* x, const float* weight, const float* bias, int64_t rows, int64_t size, float* out,
                         int64_t outs) {
  const int64_t times = rows / ROWS, ahead = times > 1 ? (size / LANES / times + 1) * LANES : 0;
  const float* next = weight + O * size;
  for (int64_t i = 0; i < times; ++i, x += ROWS * size, out += ROWS * outs, next += ahead)
    multiply<ROWS, O>(x, weight, bias, size, out, outs, next, ahead);
  for (int64_t i = times * ROWS; i < rows; ++i, x += size, out += outs)
    multiply<1, O>(x, weight, bias, size, out, outs, next, 0);
}

// out[m][o] = sum over k of x[m][k] * weight[o][k], plus bias[o] where there is one; all of them without gaps.
extern "C" void multiply_rows(const float* x, const float* weight, const float* bias, int64_t rows, int64_t size,
                              int64_t outs, float* out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < (outs + OUTS - 1) / OUTS; ++tile) {
    const int64_t first = tile * OUTS;
    const float* own_bias = bias ? bias + first : nullptr;
    if (first + OUTS <= outs) {
      multiply_all<OUTS>(x, weight + first * size, own_bias, rows, size, out + first, outs);
    } else {
      for (int64_t o = first; o < outs; ++o)
        multiply_all<1>(x, weight + o * size, bias ? bias + o : nullptr, rows, size, out + o, outs);
    }
  }
}
