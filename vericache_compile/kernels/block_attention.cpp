// Attention over blocks of 256 columns, float32, for the CPU.
//
// Rows are lanes: a vector holds one number of LANES query rows, so all rows of a window go through the same
// instructions in the same order, whatever they hold and wherever they stand. A block is attended on its own; blocks
// are merged in order. Columns that a row may not see add exactly zero, values being finite; columns that no row sees
// are not read.
//
// B batch, H query heads, K KV heads, G = H / K, W window, R = G * W rows of a KV head, D head size, E value head size.

constexpr int BLOCK = 256;
constexpr int TILE = LANES < 8 ? 4 : LANES / 2;
constexpr int WIDE = 3;  // vectors of rows that are worked on together
constexpr float HIDDEN = -1e30f;

// exp(x) for x <= 0, to about one unit in the last place; exactly 0 below -87; NaN stays NaN.
static inline Floats exponential(Floats x) {
  const Floats magic = fill(12582912.0f);
  const Floats low = fill(-87.0f);
  const Floats y = x < low ? low : x;
  const Floats t = fused(y, fill(1.44269504088896341f), magic);
  const Floats n = t - magic;
  const Floats r = fused(n, fill(2.12194440e-4f), fused(n, fill(-0.693359375f), y));
  Floats p = fill(1.9875691500e-4f);
  p = fused(p, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p * r, r, r) + 1.0f;
  const Ints bits = reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(t) << 23);
  const Floats scaled = reinterpret_cast<Floats>(bits);
  return x < low ? Floats{} : x == x ? scaled : x;
}

// tanh(x), as Cephes's tanhf: a polynomial near 0, (1 - e) / (1 + e) with e = exp(-2|x|) elsewhere; NaN stays NaN.
static inline Floats hyperbolic_tangent(Floats x) {
  const Floats size = x < Floats{} ? -x : x;
  const Floats e = exponential(size * -2.0f);
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats z = x * x;
  Floats p = fill(-5.70498872745e-3f);
  p = fused(p, z, 2.06390887954e-2f);
  p = fused(p, z, -5.37397155531e-2f);
  p = fused(p, z, 1.33314422036e-1f);
  p = fused(p, z, -3.33332819422e-1f);
  const Floats near = fused(p * z, x, x);
  return size < fill(0.625f) ? near : x < Floats{} ? -far : far;
}

// out[i] (+ lanes) = sum over s of a[i * a_row + s * a_step] * b[s * b_step + lanes], for `count` rows i.
template <int ROWS, int N>
static inline void tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                        float* out, int64_t out_row) {
  Floats total[ROWS][N] = {};
  for (int64_t s = 0; s < steps; ++s) {
    Floats right[N];
    for (int n = 0; n < N; ++n) right[n] = load(b + s * b_step + n * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      const Floats left = fill(a[i * a_row + s * a_step]);
      for (int n = 0; n < N; ++n) total[i][n] = fused(left, right[n], total[i][n]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int n = 0; n < N; ++n) store(out + i * out_row + n * LANES, total[i][n]);
}

template <int N>
static inline void product(const float* a, int64_t count, int64_t a_row, int64_t a_step, const float* b,
                           int64_t b_step, int64_t steps, float* out, int64_t out_row) {
  int64_t i = 0;
  for (; i + TILE <= count; i += TILE)
    tile<TILE, N>(a + i * a_row, a_row, a_step, b, b_step, steps, out + i * out_row, out_row);
  for (; i < count; ++i) tile<1, N>(a + i * a_row, a_row, a_step, b, b_step, steps, out + i * out_row, out_row);
}

struct Shape {
  int64_t batch, heads, kv_heads, window, size, value_size;
  int64_t q_batch, q_head, q_row;
  int64_t k_batch, k_head, k_row;
  int64_t v_batch, v_head, v_row;
};

// What is done to scores: scaled, capped, a bias added by the key's place; `sinks` are scores without a value.
struct Score {
  float scale, soft_cap;             // 0: no cap
  const float *sinks, *bias;         // [H] or null; [H][bias_row] or null
  int64_t bias_row, relative;        // places count from a row's first column, or (relative) back from its own

  inline Floats capped(Floats score) const {
    return soft_cap == 0 ? score : soft_cap * hyperbolic_tangent(score / soft_cap);
  }
  inline float added(int64_t head, int64_t column, int64_t first, int64_t own) const {
    const int64_t place = relative ? own - column : column - first;
    return bias[head * bias_row + (place > 0 ? place : 0)];
  }
};

// One block for N vectors of rows: probabilities' products with values to out [E][N * LANES], maxima and sums after it.
template <int N>
static void attend_block(const float* query, const float* keys, const float* values, const Shape& shape,
                         const Score& how, int64_t from, int64_t to, int64_t first, int64_t start, int64_t reach,
                         const int32_t* token, const int32_t* head, float* out) {
  constexpr int64_t rows = N * LANES;
  alignas(64) float scores[BLOCK * rows];
  const int64_t count = to - from;
  product<N>(keys + from * shape.k_row, count, shape.k_row, 1, query, rows, shape.size, scores, rows);
  for (int n = 0; n < N; ++n) {
    const Ints own = *reinterpret_cast<const Ints*>(token + n * LANES);
    Floats highest = fill(HIDDEN);
    for (int64_t c = 0; c < count; ++c) {
      float* at = scores + c * rows + n * LANES;
      Floats score = load(at);
      const int64_t ahead = from + c - start;
      if (how.soft_cap != 0) store(at, score = how.capped(score));
      if (how.bias) {
        alignas(64) float added[LANES];
        for (int i = 0; i < LANES; ++i)
          added[i] = how.added(head[n * LANES + i], from + c, first, start + token[n * LANES + i]);
        store(at, score = score + load(added));
      }
      if (ahead > 0) {
        score = own < (Ints{} + static_cast<int32_t>(ahead)) ? fill(HIDDEN) : score;
        store(at, score);
      }
      if (ahead + reach < shape.window) {
        score = own < (Ints{} + static_cast<int32_t>(ahead + reach)) ? score : fill(HIDDEN);
        store(at, score);
      }
      highest = score > highest ? score : highest;
    }
    Floats total = {};
    for (int64_t c = 0; c < count; ++c) {
      float* at = scores + c * rows + n * LANES;
      const Floats score = load(at);
      const Floats share = score == fill(HIDDEN) ? Floats{} : exponential(score - highest);
      store(at, share);
      total += share;
    }
    store(out + shape.value_size * rows + n * LANES, highest);
    store(out + (shape.value_size + 1) * rows + n * LANES, total);
  }
  product<N>(values + from * shape.v_row, shape.value_size, 1, shape.v_row, scores, rows, count, out, rows);
}

// Blocks' parts [blocks][E + 2][N * LANES] into part 0, in block order, divided by the sum of all shares and sinks'.
template <int N>
static void merge(float* parts, int64_t blocks, int64_t value_size, const float* sinks, const int32_t* head) {
  constexpr int64_t rows = N * LANES;
  const int64_t stride = (value_size + 2) * rows;
  for (int n = 0; n < N; ++n) {
    float* at = parts + n * LANES;
    Floats highest = load(at + value_size * rows);
    for (int64_t i = 1; i < blocks; ++i) {
      const Floats other = load(at + i * stride + value_size * rows);
      highest = other > highest ? other : highest;
    }
    Floats whole = {};
    if (sinks) {
      alignas(64) float own[LANES];
      for (int i = 0; i < LANES; ++i) own[i] = sinks[head[n * LANES + i]];
      const Floats sink = load(own);
      highest = sink > highest ? sink : highest;
      whole = exponential(sink - highest);
    }
    for (int64_t i = 0; i < blocks; ++i) {
      float* part = at + i * stride;
      const Floats share = exponential(load(part + value_size * rows) - highest);
      whole = fused(load(part + (value_size + 1) * rows), share, whole);
      for (int64_t e = 0; e < value_size; ++e) {
        const Floats before = i == 0 ? Floats{} : load(at + e * rows);
        store(at + e * rows, fused(load(part + e * rows), share, before));
      }
    }
    for (int64_t e = 0; e < value_size; ++e) store(at + e * rows, load(at + e * rows) / whole);
  }
}

// One token per row of the batch: numbers of one key are lanes, so few rows fill the vectors too.

constexpr int SHARING = TILE / 2;  // rows that share one read of a key

// out[r] (+ N vectors) = sum over c of shares[r][c] * values[c]
template <int ROWS, int N>
static inline void weigh(const float* shares, const float* values, int64_t v_row, int64_t count, float* out,
                         int64_t out_row) {
  Floats total[ROWS][N] = {};
  for (int64_t c = 0; c < count; ++c) {
    Floats part[N];
    for (int n = 0; n < N; ++n) part[n] = load(values + c * v_row + n * LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int n = 0; n < N; ++n) total[r][n] = fused(fill(shares[r * BLOCK + c]), part[n], total[r][n]);
  }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < N; ++n) store(out + r * out_row + n * LANES, total[r][n]);
}

template <int ROWS>
static void attend_few(const float* query, const float* keys, const float* values, const Shape& shape,
                       const Score& how, int64_t from, int64_t to, int64_t first, int64_t own, int64_t head, float* out) {
  const int64_t count = to - from, stride = shape.value_size + 2;
  alignas(64) float scores[ROWS][BLOCK];
  for (int64_t c = 0; c < BLOCK; ++c) {
    if (c >= count) {
      for (int r = 0; r < ROWS; ++r) scores[r][c] = HIDDEN;
      continue;
    }
    const float* key = keys + (from + c) * shape.k_row;
    Floats total[ROWS] = {};
    for (int64_t d = 0; d < shape.size; d += LANES) {
      const Floats part = load(key + d);
      for (int r = 0; r < ROWS; ++r) total[r] = fused(part, load(query + r * shape.q_head + d), total[r]);
    }
    for (int r = 0; r < ROWS; ++r)
      scores[r][c] = how.scale * sum<LANES / 2>(reinterpret_cast<const float*>(&total[r]));
  }
  for (int r = 0; r < ROWS; ++r) {
    if (how.soft_cap != 0)
      for (int64_t c = 0; c < count; c += LANES) {
        const Floats capped = how.capped(load(scores[r] + c));
        std::memcpy(scores[r] + c, &capped, (count - c < LANES ? count - c : LANES) * sizeof(float));
      }
    if (how.bias)
      for (int64_t c = 0; c < count; ++c) scores[r][c] += how.added(head + r, from + c, first, own);
    float highest = HIDDEN;
    for (int64_t c = 0; c < count; ++c) highest = scores[r][c] > highest ? scores[r][c] : highest;
    Floats total = {};
    for (int64_t c = 0; c < BLOCK; c += LANES) {
      const Floats share = exponential(load(scores[r] + c) - highest);
      store(scores[r] + c, share);
      total += share;
    }
    out[r * stride + shape.value_size] = highest;
    out[r * stride + shape.value_size + 1] = sum<LANES / 2>(reinterpret_cast<const float*>(&total));
  }
  int64_t e = 0;
  for (; e + 4 * LANES <= shape.value_size; e += 4 * LANES)
    weigh<ROWS, 4>(scores[0], values + from * shape.v_row + e, shape.v_row, count, out + e, stride);
  for (; e < shape.value_size; e += LANES)
    weigh<ROWS, 1>(scores[0], values + from * shape.v_row + e, shape.v_row, count, out + e, stride);
}

// Floats of workspace for rows whose longest spans `blocks` blocks.
static int64_t group_floats(const Shape& shape, int64_t blocks, int64_t rows) {
  return (shape.size + blocks * (shape.value_size + 2)) * rows;
}

extern "C" int64_t workspace(const Shape* shape, int64_t blocks) {
  const int64_t rows = shape->heads / shape->kv_heads * shape->window;
  const int64_t vectors = (rows + LANES - 1) / LANES;
  return shape->batch * shape->kv_heads * group_floats(*shape, blocks, vectors * LANES);
}

// As `attend`, for a window of one token, and sizes that vectors divide.
static void attend_one(const float* q, const float* keys, const float* values, const int64_t* starts,
                       const int64_t* pads, const Shape& shape, const Score& how, int64_t blocks, float* work,
                       float* out, int threads) {
  const int64_t group = shape.heads / shape.kv_heads, sites = shape.batch * shape.kv_heads;
  const int64_t stride = shape.value_size + 2;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t site = 0; site < sites; ++site)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t b = site / shape.kv_heads, k = site % shape.kv_heads;
        const int64_t begin = (pads[site] / BLOCK + block) * BLOCK, end = starts[b] + 1;
        const int64_t from = begin > pads[site] ? begin : pads[site], to = begin + BLOCK < end ? begin + BLOCK : end;
        if (from >= to) continue;
        for (int64_t g = 0; g < group; g += SHARING) {
          const float* query = q + b * shape.q_batch + (k * group + g) * shape.q_head;
          const float* own_keys = keys + b * shape.k_batch + k * shape.k_head;
          const float* own_values = values + b * shape.v_batch + k * shape.v_head;
          float* at = work + ((site * blocks + block) * group + g) * stride;
          switch (group - g < SHARING ? group - g : SHARING) {
            case 1: attend_few<1>(query, own_keys, own_values, shape, how, from, to, pads[site], starts[b], k * group + g, at); break;
            case 2: attend_few<2>(query, own_keys, own_values, shape, how, from, to, pads[site], starts[b], k * group + g, at); break;
            case 3: attend_few<3>(query, own_keys, own_values, shape, how, from, to, pads[site], starts[b], k * group + g, at); break;
            default: attend_few<SHARING>(query, own_keys, own_values, shape, how, from, to, pads[site], starts[b], k * group + g, at); break;
          }
        }
      }
#pragma omp for
    for (int64_t h = 0; h < shape.batch * shape.heads; ++h) {
      const int64_t b = h / shape.heads, site = h / group, g = h % group;
      const int64_t have = starts[b] / BLOCK + 1 - pads[site] / BLOCK;
      const float* from = work + (site * blocks * group + g) * stride;
      float* to = out + h * shape.value_size;
      float highest = HIDDEN;
      for (int64_t i = 0; i < have; ++i) {
        const float other = from[i * group * stride + shape.value_size];
        highest = other > highest ? other : highest;
      }
      float whole = 0;
      if (how.sinks) {
        highest = how.sinks[h % shape.heads] > highest ? how.sinks[h % shape.heads] : highest;
        whole = exponential(fill(how.sinks[h % shape.heads] - highest))[0];
      }
      for (int64_t i = 0; i < have; ++i) {
        const float* part = from + i * group * stride;
        const float share = exponential(fill(part[shape.value_size] - highest))[0];
        whole += part[shape.value_size + 1] * share;
        for (int64_t e = 0; e < shape.value_size; ++e) to[e] = (i == 0 ? 0 : to[e]) + part[e] * share;
      }
      for (int64_t e = 0; e < shape.value_size; ++e) to[e] /= whole;
    }
  }
}

#define BY_WIDTH(n, call)      \
  switch (n) {                 \
    case 1: call(1); break;    \
    case 2: call(2); break;    \
    default: call(3); break;   \
  }

// q [B, H, W, D], keys [B, K, C, D], values [B, K, C, E] with the strides in `shape` (innermost 1), out [B, H, W, E].
// The token at place w of row b sees columns pads[b * K + k] .. starts[b] + w of KV head k, and of these the last `reach`
// (all of them where it is 0).
extern "C" void attend(const float* q, const float* keys, const float* values, const int64_t* starts,
                       const int64_t* pads, const Shape* given, const Score* score, int64_t reach, int64_t blocks,
                       float* work, float* out, int threads) {
  const Shape shape = *given;
  const Score how = *score;
  if (reach == 0 && shape.window == 1 && shape.size % LANES == 0 && shape.value_size % LANES == 0)
    return attend_one(q, keys, values, starts, pads, shape, how, blocks, work, out, threads);
  const int64_t group = shape.heads / shape.kv_heads, count = group * shape.window;
  const int64_t vectors = (count + LANES - 1) / LANES, chunks = (vectors + WIDE - 1) / WIDE;
  const int64_t sites = shape.batch * shape.kv_heads;
  const int64_t site_floats = group_floats(shape, blocks, vectors * LANES);

  // Of one site (row of the batch, KV head) and chunk of its rows.
  auto left = [&](int64_t site) {
    const int64_t oldest = reach ? starts[site / shape.kv_heads] + 1 - reach : 0;
    return oldest > pads[site] ? oldest : pads[site];
  };
  const int64_t span = reach ? reach : INT64_MAX / 2;
  auto width = [&](int64_t chunk) { return static_cast<int>(vectors - chunk * WIDE < WIDE ? vectors - chunk * WIDE : WIDE); };
  auto query = [&](int64_t site, int64_t chunk) {
    return work + site * site_floats + group_floats(shape, blocks, chunk * WIDE * LANES);
  };
  auto places = [&](int64_t k, int64_t chunk, int32_t* token, int32_t* head) {
    for (int64_t r = 0; r < WIDE * LANES; ++r) {
      const int64_t row = chunk * WIDE * LANES + r;
      token[r] = static_cast<int32_t>(row % shape.window);
      head[r] = static_cast<int32_t>(k * group + (row < count ? row / shape.window : 0));
    }
  };
  auto parts = [&](int64_t site, int64_t chunk) { return query(site, chunk) + shape.size * width(chunk) * LANES; };

#pragma omp parallel num_threads(threads)
  {
#pragma omp for collapse(2)
    for (int64_t site = 0; site < sites; ++site)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t b = site / shape.kv_heads, k = site % shape.kv_heads, rows = width(chunk) * LANES;
        float* to = query(site, chunk);
        std::memset(to, 0, shape.size * rows * sizeof(float));
        for (int64_t r = 0; r < rows && chunk * WIDE * LANES + r < count; ++r) {
          const int64_t row = chunk * WIDE * LANES + r, h = k * group + row / shape.window, w = row % shape.window;
          const float* from = q + b * shape.q_batch + h * shape.q_head + w * shape.q_row;
          for (int64_t d = 0; d < shape.size; ++d) to[d * rows + r] = from[d] * how.scale;
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t site = 0; site < sites; ++site)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t b = site / shape.kv_heads, k = site % shape.kv_heads;
        const int64_t first = left(site), begin = (first / BLOCK + block) * BLOCK, end = starts[b] + shape.window;
        const int64_t from = begin > first ? begin : first, to = begin + BLOCK < end ? begin + BLOCK : end;
        if (from >= to) continue;
        const float* own_keys = keys + b * shape.k_batch + k * shape.k_head;
        const float* own_values = values + b * shape.v_batch + k * shape.v_head;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          int32_t token[WIDE * LANES], head[WIDE * LANES];
          places(k, chunk, token, head);
          float* at = parts(site, chunk) + block * (shape.value_size + 2) * width(chunk) * LANES;
#define CALL(N)                                                                                                    \
  attend_block<N>(query(site, chunk), own_keys, own_values, shape, how, from, to, pads[site], starts[b], span, token, \
                  head, at)
          BY_WIDTH(width(chunk), CALL)
#undef CALL
        }
      }
#pragma omp for collapse(2)
    for (int64_t site = 0; site < sites; ++site)
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t b = site / shape.kv_heads, k = site % shape.kv_heads, rows = width(chunk) * LANES;
        const int64_t have = (starts[b] + shape.window - 1) / BLOCK + 1 - left(site) / BLOCK;
        float* from = parts(site, chunk);
        int32_t token[WIDE * LANES], head[WIDE * LANES];
        places(k, chunk, token, head);
#define CALL(N) merge<N>(from, have, shape.value_size, how.sinks, head)
        BY_WIDTH(width(chunk), CALL)
#undef CALL
        for (int64_t r = 0; r < rows && chunk * WIDE * LANES + r < count; ++r) {
          const int64_t row = chunk * WIDE * LANES + r, h = k * group + row / shape.window, w = row % shape.window;
          float* to = out + ((b * shape.heads + h) * shape.window + w) * shape.value_size;
          for (int64_t e = 0; e < shape.value_size; ++e) to[e] = from[e * rows + r];
        }
      }
  }
}
