// Attention over blocks of 256 columns, for the CPU, in float32. Keys and values of bfloat16 are widened block by block,
// and what is made of them is rounded once, at the end.
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
// Keys and values are those of columns [from, to).
template <int N>
static void attend_block(const float* query, const float* keys, const float* values, const Shape& shape,
                         const Score& how, int64_t from, int64_t to, int64_t first, int64_t start, int64_t reach,
                         const int32_t* token, const int32_t* head, float* out) {
  constexpr int64_t rows = N * LANES;
  alignas(64) float scores[BLOCK * rows];
  const int64_t count = to - from;
  product<N>(keys, count, shape.k_row, 1, query, rows, shape.size, scores, rows);
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
  product<N>(values, shape.value_size, 1, shape.v_row, scores, rows, count, out, rows);
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

// The same for few rows, to the same bits: as lanes they would fill little of a vector, so columns are lanes until scores
// are shares, and then numbers of a value. Every sum is taken in the order of `attend_block`.

constexpr int FEW_ROWS = LANES / 2;
constexpr int SHARING = TILE / 2;  // of them, rows that share one read of a value

// out[e * rows + r] = sum over c of shares[r][c] * values[c][e] for N vectors of numbers e, and whole[r] = sum of shares[r].
template <int R, int N, typename T>
static inline void weigh(const float* shares, const T* values, const Shape& shape, int64_t count, float* out,
                         float* whole, int64_t rows) {
  Floats total[R][N] = {}, sums[R] = {};
  for (int64_t c = 0; c < count; ++c) {
    Floats part[N];
    for (int n = 0; n < N; ++n) part[n] = load(values + c * shape.v_row + n * LANES);
    for (int r = 0; r < R; ++r) {
      const Floats share = fill(shares[r * BLOCK + c]);
      sums[r] += share;
      for (int n = 0; n < N; ++n) total[r][n] = fused(part[n], share, total[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    whole[r] = sums[r][0];
    for (int e = 0; e < N * LANES; ++e) out[e * rows + r] = total[r][e / LANES][e % LANES];
  }
}

template <int R, typename T>
static inline void weigh_all(const float* shares, const T* values, const Shape& shape, int64_t count, float* out,
                             int64_t rows) {
  float* whole = out + (shape.value_size + 1) * rows;
  int64_t e = 0;
  for (; e + 4 * LANES <= shape.value_size; e += 4 * LANES)
    weigh<R, 4>(shares, values + e, shape, count, out + e * rows, whole, rows);
  for (; e < shape.value_size; e += LANES)
    weigh<R, 1>(shares, values + e, shape, count, out + e * rows, whole, rows);
}

// As attend_block<1>, but only for its first R rows: what is merged of the others is not read. Sizes are multiples of
// LANES.
template <int R, typename T>
static void attend_few(const float* query, const T* keys, const T* values, const Shape& shape, const Score& how,
                       int64_t from, int64_t to, int64_t first, int64_t start, int64_t reach, const int32_t* token,
                       const int32_t* head, float* out) {
  constexpr int64_t rows = LANES;
  alignas(64) float scores[R][BLOCK];
  const int64_t count = to - from, last = count - 1;
  for (int64_t c = 0; c < count; c += LANES) {
    Floats total[R] = {};
    for (int64_t d = 0; d < shape.size; d += LANES) {
      Floats part[LANES];
      for (int i = 0; i < LANES; ++i) part[i] = load(keys + (c + i < last ? c + i : last) * shape.k_row + d);
      transpose(part);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i)
        for (int r = 0; r < R; ++r) total[r] = fused(part[i], fill(query[(d + i) * rows + r]), total[r]);
    }
    for (int r = 0; r < R; ++r) store(scores[r] + c, total[r]);
  }
  for (int r = 0; r < R; ++r) {
    const int64_t own = start + token[r] - from;  // its own column, and it sees [oldest, newest]
    const Ints newest = Ints{} + static_cast<int32_t>(own < last ? own : last);
    const Ints oldest = Ints{} + static_cast<int32_t>(own - reach + 1 > 0 ? own - reach + 1 : 0);
    Floats best = fill(HIDDEN);
    for (int64_t c = 0; c < count; c += LANES) {
      Floats score = load(scores[r] + c);
      if (how.soft_cap != 0) score = how.capped(score);
      if (how.bias) {
        alignas(64) float added[LANES];
        for (int i = 0; i < LANES; ++i)
          added[i] = how.added(head[r], from + (c + i < last ? c + i : last), first, start + token[r]);
        score = score + load(added);
      }
      const Ints column = lane_numbers() + static_cast<int32_t>(c);
      score = (column < oldest) | (column > newest) ? fill(HIDDEN) : score;
      store(scores[r] + c, score);
      best = score > best ? score : best;
    }
    float highest = HIDDEN;
    for (int i = 0; i < LANES; ++i) highest = best[i] > highest ? best[i] : highest;
    for (int64_t c = 0; c < count; c += LANES) {
      const Floats score = load(scores[r] + c);
      store(scores[r] + c, score == fill(HIDDEN) ? Floats{} : exponential(score - highest));
    }
    out[shape.value_size * rows + r] = highest;
  }
  int r = 0;
  for (; r + SHARING <= R; r += SHARING) weigh_all<SHARING>(scores[r], values, shape, count, out + r, rows);
  if constexpr (R % SHARING != 0) weigh_all<R % SHARING>(scores[r], values, shape, count, out + r, rows);
}

template <int R = FEW_ROWS, typename... Arguments>
static void attend_rows(int64_t rows, Arguments... arguments) {
  if (rows == R) return attend_few<R>(arguments...);
  if constexpr (R > 1) attend_rows<R - 1>(rows, arguments...);
}

// Floats of workspace for rows whose longest spans `blocks` blocks.
static int64_t group_floats(const Shape& shape, int64_t blocks, int64_t rows) {
  return (shape.size + blocks * (shape.value_size + 2)) * rows;
}

// Floats in which a thread widens a block's keys and values.
static int64_t wide_floats(const Shape& shape) { return BLOCK * (shape.size + shape.value_size); }

static bool are_few(const Shape& shape) {
  const bool whole = shape.size % LANES == 0 && shape.value_size % LANES == 0;
  return whole && shape.heads / shape.kv_heads * shape.window <= FEW_ROWS;
}

extern "C" int64_t workspace(const Shape* shape, int64_t blocks, int64_t narrow, int64_t threads) {
  const int64_t rows = shape->heads / shape->kv_heads * shape->window;
  const int64_t vectors = (rows + LANES - 1) / LANES;
  const int64_t groups = shape->batch * shape->kv_heads * group_floats(*shape, blocks, vectors * LANES);
  return groups + (narrow && !are_few(*shape) ? threads * wide_floats(*shape) : 0);
}

#define BY_WIDTH(n, call)      \
  switch (n) {                 \
    case 1: call(1); break;    \
    case 2: call(2); break;    \
    default: call(3); break;   \
  }

// Rows of `size` numbers as floats: as they are, or widened to `wide`, which has no gaps between rows.
static inline const float* widen(const float* rows, int64_t /*count*/, int64_t /*stride*/, int64_t /*size*/, float*) {
  return rows;
}
static inline const float* widen(const Narrow* rows, int64_t count, int64_t stride, int64_t size, float* wide) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) store(wide + i * size + d, load(rows + i * stride + d));
    for (; d < size; ++d) wide[i * size + d] = widened(rows[i * stride + d]);
  }
  return wide;
}

template <typename T>
static void attend_as(const T* q, const T* keys, const T* values, const int64_t* starts, const int64_t* pads,
                      const Shape& shape, const Score& how, int64_t reach, int64_t blocks, float* work, T* out,
                      int threads) {
  const int64_t group = shape.heads / shape.kv_heads, count = group * shape.window;
  const int64_t vectors = (count + LANES - 1) / LANES, chunks = (vectors + WIDE - 1) / WIDE;
  const int64_t sites = shape.batch * shape.kv_heads;
  const bool few = are_few(shape);
  const int64_t site_floats = group_floats(shape, blocks, vectors * LANES);
  constexpr bool narrow = !std::is_same<T, float>::value;
  Shape inner = shape;  // of what a block is attended from
  if (narrow) inner.k_row = shape.size, inner.v_row = shape.value_size;

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
          const T* from = q + b * shape.q_batch + h * shape.q_head + w * shape.q_row;
          for (int64_t d = 0; d < shape.size; ++d) to[d * rows + r] = widened(from[d]) * how.scale;
        }
      }
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t site = 0; site < sites; ++site)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t b = site / shape.kv_heads, k = site % shape.kv_heads;
        const int64_t first = left(site), begin = (first / BLOCK + block) * BLOCK, end = starts[b] + shape.window;
        const int64_t from = begin > first ? begin : first, to = begin + BLOCK < end ? begin + BLOCK : end;
        if (from >= to) continue;
        const T* own_keys = keys + b * shape.k_batch + k * shape.k_head + from * shape.k_row;
        const T* own_values = values + b * shape.v_batch + k * shape.v_head + from * shape.v_row;
        const float *block_keys = nullptr, *block_values = nullptr;
        if (!few) {
          float* wide = narrow ? work + sites * site_floats + thread_number() * wide_floats(shape) : nullptr;
          float* behind = narrow ? wide + BLOCK * shape.size : nullptr;
          block_keys = widen(own_keys, to - from, shape.k_row, shape.size, wide);
          block_values = widen(own_values, to - from, shape.v_row, shape.value_size, behind);
        }
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          int32_t token[WIDE * LANES], head[WIDE * LANES];
          places(k, chunk, token, head);
          float* at = parts(site, chunk) + block * (shape.value_size + 2) * width(chunk) * LANES;
#define HERE how, from, to, pads[site], starts[b], span, token, head, at
#define CALL(N) attend_block<N>(query(site, chunk), block_keys, block_values, inner, HERE)
          if (few) attend_rows(count, query(site, chunk), own_keys, own_values, shape, HERE);
          else BY_WIDTH(width(chunk), CALL)
#undef CALL
#undef HERE
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
          T* to = out + ((b * shape.heads + h) * shape.window + w) * shape.value_size;
          for (int64_t e = 0; e < shape.value_size; ++e) narrowed(from[e * rows + r], to[e]);
        }
      }
  }
}

// q [B, H, W, D], keys [B, K, C, D], values [B, K, C, E] with the strides in `shape` (innermost 1), out [B, H, W, E], of
// float32 or (narrow) bfloat16. The token at place w of row b sees columns pads[b * K + k] .. starts[b] + w of KV head k,
// and of these the last `reach` (all of them where it is 0).
extern "C" void attend(const void* q, const void* keys, const void* values, const int64_t* starts, const int64_t* pads,
                       const Shape* shape, const Score* how, int64_t reach, int64_t blocks, float* work, void* out,
                       int64_t narrow, int64_t threads) {
#define AS(T)                                                                                                      \
  attend_as(static_cast<const T*>(q), static_cast<const T*>(keys), static_cast<const T*>(values), starts, pads,    \
            *shape, *how, reach, blocks, work, static_cast<T*>(out), threads)
  narrow ? AS(Narrow) : AS(float);
#undef AS
}
