// Pieces of the ranking kernels that do not depend on where the matrix lies: noise, logits, potentials, the gradient
// that arrives, column sums over the warps of a CTA, the rank-2T pass of the backward.
//
// Rows i are ranks, columns j regions; k of each. A CTA holds a band of consecutive rows of
//   X_ij = exp(M_ij + F_i + G_j),  M_ij = (2 q_i c_j + noise gamma_ij) / tau,  c_j = a_j - 1/2,  q_i = p_i - 1/2,
// and the initial column potential h_j is the start given or -c_j^2 / tau, less that of the smallest |c|, a constant that
// the first row step removes; log_sinkhorn: M are the logits given, h = 0.
// F and G change only where scalings have been absorbed, between two segments of iterations.
#pragma once

#include "cuda/device.cuh"

namespace aha {

// The arguments of an operator, for all images. tau and seed are read on the device.
struct Ranking {
  const float *scores, *logits, *tau;  // scores or logits
  const int64_t* seed;
  const float *left, *right, *start;
  Readout readout;
  float noise;
  int k, steps, iterations;
};

// The logits of one image.
struct Logits {
  const float *scores, *given;
  float tau, inverse, noise;  // inverse: 1 / tau
  uint64_t seed, first;  // first: element of the noise at (0, 0)
  int k;

  __device__ Logits(const Ranking& p, int64_t image)
      : scores(p.logits ? nullptr : p.scores + image * p.k),
        given(p.logits ? p.logits + image * p.k * p.k : nullptr),
        tau(p.logits ? 1.0f : *p.tau),
        inverse(1.0f / tau),
        noise(p.noise),
        seed(p.logits ? 0 : static_cast<uint64_t>(*p.seed)),
        first(static_cast<uint64_t>(image) * p.k * p.k),
        k(p.k) {}

  __device__ float rank(int i) const { return k > 1 ? 0.5f - static_cast<float>(i) / static_cast<float>(k - 1) : 0.5f; }
  __device__ float centred(int j) const { return scores[j] - 0.5f; }
  // x / tau, corrected by its rest: within an ulp, without the branches of the division.
  __device__ float over_tau(float x) const {
    const float quotient = x * inverse;
    return fmaf(fmaf(-quotient, tau, x), inverse, quotient);
  }
  // p.start is that of all images; found from here, it occupies no register between its uses
  __device__ float initial(const Ranking& p, int j, float nearest) const {
    return given ? 0.0f : p.start ? p.start[scores - p.scores + j] : initial(centred(j), nearest);
  }
  // In factors, for squares may be rounded away, or overflow.
  __device__ float initial(float c, float nearest) const {
    return -4.0f * over_tau(fmaf(0.5f, c, -0.5f * nearest)) * fmaf(0.5f, c, 0.5f * nearest);
  }
  // The smallest |c|, where the potentials ask for it, of the columns from ... by `step`: of all if a thread alone.
  __device__ float nearest(const Ranking& p, int from = 0, int step = 1) const {
    float least = INFINITY;
    if (!given && !p.start)
      for (int j = from; j < k; j += step) least = fminf(least, fabsf(centred(j)));
    return least;
  }
};

// The scalings of one image, as saved for the backward.
struct State {
  const float* scalings;
  const int32_t* absorbed;
  int k;

  __device__ State(const Ranking& p, const float* scalings, const int32_t* absorbed, int64_t image)
      : scalings(scalings + image * (p.iterations + 1) * 2 * p.k), absorbed(absorbed + image * p.iterations), k(p.k) {}

  __device__ const float* rows(int t) const { return scalings + static_cast<int64_t>(2 * t) * k; }
  __device__ const float* columns(int t) const { return rows(t) + k; }
  // Whether iteration t starts from new potentials, with scalings of 1.
  __device__ bool fresh(int t) const { return t == 1 || absorbed[t - 2]; }
  // The potential of iteration t: that of the first, and what was absorbed since, in the order it was.
  __device__ float potential(int side, int index, int t) const {
    float sum = scalings[side * k + index];
    for (int s = 2; s <= t; ++s)
      if (absorbed[s - 2]) sum += logf(rows(s - 1)[side * k + index]);
    return sum;
  }
  // The first iteration with the potentials of iteration t if nothing was absorbed in between, else t; a whole warp.
  __device__ int origin(int t) const {
    bool any = false;
    for (int s = lane(); s < t - 1; s += WARP) any |= absorbed[s] != 0;
    return __any_sync(ALL_LANES, any) ? t : 1;
  }
};

// Consecutive rows of X, in shared or global memory. Where a lane holds its columns in registers, rows begin at multiples
// of 16 bytes (stride), and what a sweep reads past the end of one, of the next or of the vector that follows the last,
// is finite and meets a 0: so nothing asks whether a column exists.
struct Band {
  float* x;
  int first, rows, k, stride;
  __device__ float* row(int r) const { return x + static_cast<int64_t>(r) * stride; }
};

// The N columns of a lane among WARP N of a row: fours that lie together, then the rest one by one.
template <int N>
struct Lanes {
  static constexpr int FOURS = N / 4, WIDTH = WARP * N;

  __device__ static int column(int n) {
    return n < 4 * FOURS ? 4 * WARP * (n / 4) + 4 * lane() + n % 4 : WARP * n + lane();
  }
  __device__ __forceinline__ static void load(const float* row, float (&x)[N]) {
#pragma unroll
    for (int q = 0; q < FOURS; ++q) {
      const float4 four = load_four(row + 4 * (WARP * q + lane()));
      x[4 * q] = four.x, x[4 * q + 1] = four.y, x[4 * q + 2] = four.z, x[4 * q + 3] = four.w;
    }
#pragma unroll
    for (int n = 4 * FOURS; n < N; ++n) x[n] = row[WARP * n + lane()];
  }
  // The columns below `end`, a multiple of four, and 0: where another warp may be writing what lies after them.
  __device__ __forceinline__ static void load(const float* row, float (&x)[N], int end) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = 0.0f;
#pragma unroll
    for (int q = 0; q < FOURS; ++q)
      if (column(4 * q) < end) {
        const float4 four = load_four(row + column(4 * q));
        x[4 * q] = four.x, x[4 * q + 1] = four.y, x[4 * q + 2] = four.z, x[4 * q + 3] = four.w;
      }
#pragma unroll
    for (int n = 4 * FOURS; n < N; ++n)
      if (column(n) < end) x[n] = row[column(n)];
  }
  __device__ __forceinline__ static void store(float* row, const float (&x)[N]) {
#pragma unroll
    for (int q = 0; q < FOURS; ++q)
      store_four(row + 4 * (WARP * q + lane()), {x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]});
#pragma unroll
    for (int n = 4 * FOURS; n < N; ++n) row[WARP * n + lane()] = x[n];
  }
  // x += weight row, of a row of k columns anywhere. Held: 2 N addresses and conditions would be kept in registers.
  __device__ __forceinline__ static void add(const float* row, int k, float weight, float (&x)[N]) {
    const float *fours = held(row + 4 * lane()), *ones = held(row + lane());
    const int after_fours = held(k - 4 * lane()), after_ones = held(k - lane());
#pragma unroll
    for (int n = 0; n < 4 * FOURS; ++n) {
      const int j = 4 * WARP * (n / 4) + n % 4;
      if (j < after_fours) x[n] = fmaf(weight, fours[j], x[n]);
    }
#pragma unroll
    for (int n = 4 * FOURS; n < N; ++n)
      if (WARP * n < after_ones) x[n] = fmaf(weight, ones[WARP * n], x[n]);
  }
  // The columns below `end`, a multiple of four.
  __device__ __forceinline__ static void store(float* row, const float (&x)[N], int end) {
#pragma unroll
    for (int q = 0; q < FOURS; ++q)
      if (column(4 * q) < end)
        store_four(row + column(4 * q), {x[4 * q], x[4 * q + 1], x[4 * q + 2], x[4 * q + 3]});
#pragma unroll
    for (int n = 4 * FOURS; n < N; ++n)
      if (column(n) < end) row[column(n)] = x[n];
  }
};

__device__ __forceinline__ bool outside(float scaling) {
  return !(scaling >= 1.0f / LARGE_SCALING && scaling <= LARGE_SCALING);
}

// The noise of row i, columns from ... to - 1, into `row`; one warp. A lane draws whole Philox blocks of four words.
__device__ inline void write_noise(const Logits& l, int i, int from, int to, float* row) {
  const uint64_t start = l.first + static_cast<uint64_t>(i) * l.k;
  __syncwarp();
  for (uint64_t quad = (start + from) / 4 + lane(); quad < (start + to + 3) / 4; quad += WARP) {
    const Words words = random_words(l.seed, quad);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t j = static_cast<int64_t>(4 * quad + w - start);
      if (j >= from && j < to) row[j] = gumbel(words.w[w]);
    }
  }
  __syncwarp();
}

// M_ij of noise that is 0 where there is none. Explicit fma: forward and backward must round alike.
__device__ __forceinline__ float logit(const Logits& l, float twice_rank, float centred, float noise) {
  return l.over_tau(fmaf(twice_rank, centred, l.noise * noise));
}

// Rows of logits by one warp: of a lane's N columns in registers, -infinity past the end.
template <int N>
struct Rows {
  float centred[N];

  __device__ explicit Rows(const Logits& l) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int j = Lanes<N>::column(n);
      centred[n] = l.given || j >= l.k ? 0.0f : l.centred(j);
    }
  }
  // M_i; `row` is where the noise may lie meanwhile.
  __device__ void make(const Logits& l, int i, float* row, float (&m)[N]) const {
    if (l.given) {
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const int j = Lanes<N>::column(n);
        m[n] = j < l.k ? l.given[static_cast<int64_t>(i) * l.k + j] : -INFINITY;
      }
      return;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) m[n] = 0.0f;
    if (l.noise != 0.0f) {
      write_noise(l, i, 0, l.k, row);
      Lanes<N>::load(row, m, (l.k + 3) / 4 * 4);
    }
    const float twice = 2.0f * l.rank(i);
#pragma unroll
    for (int n = 0; n < N; ++n)
      m[n] = Lanes<N>::column(n) < l.k ? logit(l, twice, centred[n], m[n]) : -INFINITY;
  }
  // h_j, from the arguments of all images.
  __device__ void initial(const Ranking& p, const Logits& l, float (&h)[N]) const {
    const float nearest = -warp_max(-l.nearest(p, lane(), WARP));
#pragma unroll
    for (int n = 0; n < N; ++n) h[n] = Lanes<N>::column(n) < l.k ? l.initial(p, Lanes<N>::column(n), nearest) : 0.0f;
  }
};

// Of any number of columns, into `row`.
template <>
struct Rows<0> {
  __device__ explicit Rows(const Logits&) {}
  __device__ void make(const Logits& l, int i, float* row) const {
    if (l.given) {
      for (int j = lane(); j < l.k; j += WARP) row[j] = l.given[static_cast<int64_t>(i) * l.k + j];
      return;
    }
    if (l.noise != 0.0f) write_noise(l, i, 0, l.k, row);
    const float twice = 2.0f * l.rank(i);
    for (int j = lane(); j < l.k; j += WARP) row[j] = logit(l, twice, l.centred(j), l.noise != 0.0f ? row[j] : 0.0f);
  }
};

// M_ij + F_i into the band, with F_i = -logsumexp_j(M_ij + h_j), which is also saved.
template <int N>
__device__ inline void start_rows(const Ranking& p, const Logits& l, const Band& band, float* potentials) {
  const Rows<N> rows(l);
  float initial[N];
  rows.initial(p, l, initial);
#pragma unroll 1  // a row fills the registers
  for (int r = warp(); r < band.rows; r += warps()) {
    float m[N], most = -INFINITY, sum = 0.0f;
    rows.make(l, band.first + r, band.row(r), m);
#pragma unroll
    for (int n = 0; n < N; ++n) most = fmaxf(most, m[n] + initial[n]);
    most = warp_max(most);
#pragma unroll
    for (int n = 0; n < N; ++n) sum += expf(m[n] + initial[n] - most);
    const float potential = -(most + logf(warp_sum(sum)));
#pragma unroll
    for (int n = 0; n < N; ++n) m[n] += potential;
    Lanes<N>::store(band.row(r), m, band.stride);
    if (lane() == 0) potentials[band.first + r] = potential;
  }
}

template <>
__device__ inline void start_rows<0>(const Ranking& p, const Logits& l, const Band& band, float* potentials) {
  const Rows<0> rows(l);
  const float nearest = -warp_max(-l.nearest(p, lane(), WARP));
  for (int r = warp(); r < band.rows; r += warps()) {
    float* row = band.row(r);
    rows.make(l, band.first + r, row);
    float top = -INFINITY, sum = 0.0f;
    for (int j = lane(); j < l.k; j += WARP) top = fmaxf(top, row[j] + l.initial(p, j, nearest));
    top = warp_max(top);
    for (int j = lane(); j < l.k; j += WARP) sum += expf(row[j] + l.initial(p, j, nearest) - top);
    const float potential = -(top + logf(warp_sum(sum)));
    for (int j = lane(); j < l.k; j += WARP) row[j] += potential;
    if (lane() == 0) potentials[band.first + r] = potential;
  }
}

// M_ij + F_i into the band, with the potentials of iteration t.
template <int N>
__device__ inline void restart_rows(const Logits& l, const State& state, int t, const Band& band) {
  t = state.origin(t);
  const Rows<N> rows(l);
#pragma unroll 1
  for (int r = warp(); r < band.rows; r += warps()) {
    const float potential = state.potential(0, band.first + r, t);
    float* row = band.row(r);
    if constexpr (N > 0) {
      float m[N];
      rows.make(l, band.first + r, row, m);
#pragma unroll
      for (int n = 0; n < N; ++n) m[n] += potential;
      Lanes<N>::store(row, m, band.stride);
    } else {
      rows.make(l, band.first + r, row);
      for (int j = lane(); j < l.k; j += WARP) row[j] += potential;
    }
  }
}

// X from M_ij + F_i, with the potentials of iteration t. A thread reads the entries it has written itself. `buffer` has
// room for the columns of all lanes.
template <int N>
__device__ inline void exponentiate(const State& state, int t, const Band& band, float* buffer) {
  t = state.origin(t);
  if constexpr (N > 0) {
    for (int j = threadIdx.x; j < WARP * N; j += blockDim.x) buffer[j] = j < band.k ? state.potential(1, j, t) : 0.0f;
    __syncthreads();
    float g[N];
    Lanes<N>::load(buffer, g);
#pragma unroll 1
    for (int r = warp(); r < band.rows; r += warps()) {
      float x[N];
      Lanes<N>::load(band.row(r), x, band.stride);
#pragma unroll
      for (int n = 0; n < N; ++n) x[n] = expf(x[n] + g[n]);
      Lanes<N>::store(band.row(r), x, band.stride);
    }
  } else {
    for (int j = lane(); j < band.k; j += WARP) {
      const float potential = state.potential(1, j, t);
      for (int r = warp(); r < band.rows; r += warps()) band.row(r)[j] = expf(band.row(r)[j] + potential);
    }
  }
  __syncthreads();
}

// Passes over tiles of columns: lane l of every warp holds the C columns l, l + WARP, ... of the tile.
template <int C>
using Tile = float[C];
constexpr int TILE_COLUMNS = 4, TILE = WARP * TILE_COLUMNS;  // where nothing asks for others

// The columns of a lane in the tile that starts at j0.
struct TileColumns {
  int j0;
  __device__ int operator()(int c) const { return j0 + lane() + WARP * c; }
};

// Sums a tile over the warps in their order, then finish(column, sum) for its first `width` columns.
template <int C, typename Finish>
__device__ __forceinline__ void add_warps(const Tile<C>& part, int width, float* buffer, const Finish& finish) {
  __syncthreads();
#pragma unroll
  for (int c = 0; c < C; ++c) buffer[(warp() * C + c) * WARP + lane()] = part[c];
  __syncthreads();
  for (int j = threadIdx.x; j < width; j += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < warps(); ++w) sum += buffer[w * C * WARP + j];
    finish(j, sum);
  }
}

// sum_i left_i row(i) over a tile of columns j0 ... j1 - 1, most of left being 0; all warps. scale (k,) or null.
template <typename Row, typename Finish>
__device__ void weigh_rows(const float* left, const float* scale, int k, const Row& row, int j0, int j1,
                           float* buffer, const Finish& finish) {
  Tile<TILE_COLUMNS> part = {};
  for (int i0 = WARP * warp(); i0 < k; i0 += WARP * warps()) {
    float weight = i0 + lane() < k ? left[i0 + lane()] : 0.0f;
    if (scale && weight != 0.0f) weight *= scale[i0 + lane()];
    for (unsigned rest = __ballot_sync(ALL_LANES, weight != 0.0f); rest; rest &= rest - 1) {
      const int i = __ffs(rest) - 1;
      const float w = __shfl_sync(ALL_LANES, weight, i);
      const float* from = row(i0 + i);
#pragma unroll
      for (int c = 0; c < TILE_COLUMNS; ++c) {
        const int j = j0 + lane() + WARP * c;
        if (j < j1) part[c] = fmaf(w, from[j], part[c]);
      }
    }
  }
  add_warps(part, j1 - j0, buffer, [&](int j, float sum) { finish(j0 + j, sum); });
}

// Sums over the rows of grad, of which left weighs a few: add(weight, row); one warp.
template <typename Row>
__device__ __forceinline__ void each_step(const float* left, const float* grad, int steps, int k, int i,
                                          const Row& add) {
  for (int s0 = 0; s0 < steps; s0 += WARP) {
    const float weight = s0 + lane() < steps ? left[static_cast<int64_t>(s0 + lane()) * k + i] : 0.0f;
    for (unsigned rest = __ballot_sync(ALL_LANES, weight != 0.0f); rest; rest &= rest - 1) {
      const int s = __ffs(rest) - 1;
      add(__shfl_sync(ALL_LANES, weight, s), grad + static_cast<int64_t>(s0 + s) * k);
    }
  }
}

// sum_s left_si grad_sj over a tile of columns, most of left being 0; one warp.
template <int C>
__device__ inline void weigh_steps(const float* left, const float* grad, int steps, int k, int i, TileColumns column,
                                   Tile<C>& sum) {
#pragma unroll
  for (int c = 0; c < C; ++c) sum[c] = 0.0f;
  each_step(left, grad, steps, k, i, [&](float w, const float* from) {
#pragma unroll
    for (int c = 0; c < C; ++c)
      if (column(c) < k) sum[c] = fmaf(w, from[column(c)], sum[c]);
  });
}

// The gradient that arrives at P (of log_sinkhorn: at log P), from that of the output of one image.
struct Arriving {
  const float *grad, *left, *right;
  Readout readout;
  int steps, k;

  __device__ Arriving(const Ranking& p, const float* grad, int64_t image)
      : grad(grad + image * p.k * (p.readout == Readout::left ? p.steps : p.readout == Readout::right ? 1
                                                                                                      : p.k)),
        left(p.left),
        right(p.right ? p.right + image * p.k : nullptr),
        readout(p.readout),
        steps(p.steps),
        k(p.k) {}

  // Row i over a tile of columns, 0 past the end; one warp.
  template <int C>
  __device__ void row(int i, TileColumns column, Tile<C>& g) const {
    if (readout == Readout::left) return weigh_steps(left, grad, steps, k, i, column, g);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int j = column(c);
      if (j >= k) g[c] = 0.0f;
      else g[c] = readout == Readout::right ? grad[i] * right[j] : grad[static_cast<int64_t>(i) * k + j];
    }
  }
};

}  // namespace aha
