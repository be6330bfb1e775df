// Sinkhorn ranking, forward and exact unrolled backward, free of torch and of the CUDA runtime.
//
// Both directions alternate two phases, numbered by iteration: rows(t), in which a CTA passes over its band of rows and
// leaves column sums of the band, and column(t, j), which adds these up over the CTAs of the matrix and publishes entry
// j of the next column vector. Where the matrix lies and what separates the phases is the layout's:
//   resident   X in the shared memory of one CTA, or of a cluster whose CTAs read each other's sums; barriers
//   streamed   X in global memory, any k, any card; every phase is a launch
// A phase adds in a fixed order, without atomics: results repeat bit for bit.
#pragma once

#include "cuda/ranking.cuh"

namespace aha {

// Threads of a resident CTA with so many columns a lane, and how many CTAs an SM must have registers for.
constexpr int resident_threads(int columns) { return columns <= 2 ? 128 : 256; }
constexpr int resident_ctas(int columns, bool backward) {
  return columns <= 2 ? (backward ? 3 : 4) : columns <= 4 && !backward ? 2 : 1;
}

// One CTA, or a cluster of them.
template <bool CLUSTER>
struct Resident {
  int rank, ranks;
  template <typename T>
  __device__ T* peer(T* own, int other) const {
    return CLUSTER ? cluster_map(own, other) : own;
  }
  __device__ void publish(float* columns, int j, float value) const {
    for (int r = 0; r < ranks; ++r) peer(columns, r)[j] = value;
  }
  __device__ const float* row(const Band& band, int i) const {
    const int size = (band.k + ranks - 1) / ranks;
    return peer(band.x, i / size) + static_cast<int64_t>(i % size) * band.k;
  }
  // Between the sums and their columns. In one CTA each thread finishes the columns it has summed itself.
  __device__ void after_rows() const {
    if (CLUSTER) cluster_sync();
  }
  __device__ void after_columns() const { CLUSTER ? cluster_sync() : __syncthreads(); }
};

// CTAs that meet at the end of a launch; their sums lie one after the other.
struct Streamed {
  int rank, ranks, stride;
  __device__ float* peer(float* own, int other) const { return own + static_cast<int64_t>(other - rank) * stride; }
  __device__ void publish(float* columns, int j, float value) const { columns[j] = value; }
  __device__ const float* row(const Band& band, int i) const {
    return band.x + static_cast<int64_t>(i - band.first) * band.k;
  }
};

template <typename Team>
__device__ __forceinline__ float total(const Team& team, float* own, int j) {
  float sum = 0.0f;
  for (int r = 0; r < team.ranks; ++r) sum += team.peer(own, r)[j];
  return sum;
}

// The sweep: c_i = coefficient(r, before(r), X_i . v), then own_j = sum_i c_i X_ij, one read of X
// own_k counts the c_i that have left the range of scalings.

// N columns a lane, in registers with R rows at a time.
template <int N>
struct Columns {
  static constexpr int R = N <= 2 ? 8 : N <= 13 ? 4 : 2;
  float v[N];

  // Whether an entry is outside the range of scalings.
  __device__ bool load(const float* columns, int k) {
    bool far = false;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int j = lane() + WARP * n;
      v[n] = j < k ? columns[j] : 0.0f;
      far |= j < k && outside(v[n]);
    }
    return __any_sync(ALL_LANES, far);
  }

  __device__ void reset() {
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = 1.0f;
  }

  template <typename Before, typename Coefficient>
  __device__ void sweep(const Band& band, const Before& before, const Coefficient& coefficient, float* buffer,
                        float* own) const {
    const int k = band.k, l = lane();
    float part[N] = {}, count = 0.0f;
    for (int r0 = warp() * R; r0 < band.rows; r0 += warps() * R) {
      float x[R][N], dot[R] = {};
      decltype(before(0)) known[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int here = min(r0 + r, band.rows - 1);  // past the end the last row again, and no coefficient
        const float* row = band.row(here);
        known[r] = before(here);
#pragma unroll
        for (int n = 0; n < N; ++n) x[r][n] = l + WARP * n < k ? row[l + WARP * n] : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < N; ++n)
#pragma unroll
        for (int r = 0; r < R; ++r) dot[r] = fmaf(x[r][n], v[n], dot[r]);
      warp_sums(dot);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        if (r0 + r >= band.rows) break;
        const float c = coefficient(r0 + r, known[r], dot[r]);
        count += outside(c);
#pragma unroll
        for (int n = 0; n < N; ++n) part[n] = fmaf(c, x[r][n], part[n]);
      }
    }
    float* mine = buffer + warp() * (k + 1);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (l + WARP * n < k) mine[l + WARP * n] = part[n];
    if (l == 0) mine[k] = count;
    __syncthreads();
    for (int j = threadIdx.x; j <= k; j += blockDim.x) {
      float sum = 0.0f;
      for (int w = 0; w < warps(); ++w) sum += buffer[w * (k + 1) + j];
      own[j] = sum;
    }
  }
};

// Any number of columns: v and X in global memory, X read again from the cache for the column sums.
template <>
struct Columns<0> {
  const float* v;

  __device__ bool load(const float* columns, int k) {
    v = columns;
    bool far = false;
    for (int j = lane(); j < k; j += WARP) far |= outside(v[j]);
    return __any_sync(ALL_LANES, far);
  }

  __device__ void reset() { v = nullptr; }

  template <typename Before, typename Coefficient>
  __device__ void sweep(const Band& band, const Before& before, const Coefficient& coefficient, float* buffer,
                        float* own) const {
    for (int r = warp(); r < band.rows; r += warps()) {
      const float* row = band.row(r);
      float dot = 0.0f;
#pragma unroll 4
      for (int j = lane(); j < band.k; j += WARP) dot = fmaf(row[j], v ? v[j] : 1.0f, dot);
      const float c = coefficient(r, before(r), warp_sum(dot));
      if (lane() == 0) buffer[r] = c;
    }
    __syncthreads();
    for (int j = threadIdx.x; j <= band.k; j += blockDim.x) {
      float sum = 0.0f;
#pragma unroll 4
      for (int r = 0; r < band.rows; ++r) sum += j < band.k ? buffer[r] * band.row(r)[j] : outside(buffer[r]);
      own[j] = sum;
    }
  }
};

// In floats. Own sums of a CTA: of a sweep; in the backward also two of the fold. Resident: each of `warps` warps
// needs room for its part of the sums.
AHA_HD int64_t own_floats(int64_t k, bool backward) { return backward ? 3 * k + 1 : k + 1; }
AHA_HD int64_t band_rows(int64_t k, int64_t ranks) { return (k + ranks - 1) / ranks; }
AHA_HD int64_t shared_floats(int64_t k, int64_t ranks, int64_t warps, bool backward) {
  const int64_t width = k + 1 > TILE ? k + 1 : TILE;
  return band_rows(k, ranks) * k + own_floats(k, backward) + k + 1 + warps * width;
}
AHA_HD int64_t streamed_floats(int64_t k, int64_t ranks, bool backward) {
  return k * k + ranks * own_floats(k, backward) + k + 1;
}
AHA_HD int64_t kept_floats(int64_t k, int64_t iterations) { return (2 * iterations + 3) * k; }

struct Place {
  Band band;
  float *own, *columns, *buffer;
};

__device__ inline Place place(float* x, float* own, float* columns, float* buffer, int k, int rank, int ranks) {
  const int size = static_cast<int>(band_rows(k, ranks)), first = min(rank * size, k);
  return {{x, first, min(size, k - first), k}, own, columns, buffer};
}

__device__ inline Place place_resident(float* shared, int k, int rank, int ranks, bool backward) {
  float* own = shared + band_rows(k, ranks) * k;
  float* columns = own + own_floats(k, backward);
  return place(shared, own, columns, columns + k + 1, k, rank, ranks);
}

__device__ inline Place place_streamed(float* workspace, float* buffer, int k, int64_t image, int rank, int ranks,
                                       bool backward) {
  float* x = workspace + image * streamed_floats(k, ranks, backward);
  float *columns = x + static_cast<int64_t>(k) * k, *own = columns + k + 1 + rank * own_floats(k, backward);
  return place(x + min(rank * band_rows(k, ranks), int64_t{k}) * k, own, columns, buffer, k, rank, ranks);
}

struct ForwardTensors {
  float *out, *scalings;
  int32_t* absorbed;
  float* workspace;  // streamed
};

template <typename Team, int N>
struct Forward {
  const Ranking& p;
  Logits logits;
  State state;
  Team team;
  Place at;
  const float* right;
  float *out, *scalings;
  int32_t* absorbed;

  __device__ Forward(const Ranking& p, const ForwardTensors& to, int64_t image, Team team, Place at)
      : p(p),
        logits(p, image),
        state(p, to.scalings, to.absorbed, image),
        team(team),
        at(at),
        right(p.right ? p.right + image * p.k : nullptr),
        out(to.out + image * out_rows(p) * (p.readout == Readout::right ? 1 : p.k)),
        scalings(to.scalings + image * (p.iterations + 1) * 2 * p.k),
        absorbed(to.absorbed + image * p.iterations) {}

  __device__ static int64_t out_rows(const Ranking& p) { return p.readout == Readout::left ? p.steps : p.k; }
  __device__ float* saved(int t, int side) const { return scalings + static_cast<int64_t>(2 * t + side) * p.k; }

  // t = 0: row potentials and the column maxima of M + F; then iteration t, from the absorption of the one before.
  __device__ void rows(int t) const {
    if (t == 0) return start();
    Columns<N> v;
    const bool moved = t > 1 && (v.load(at.columns, p.k) || at.columns[p.k] != 0.0f);
    if (t > 1 && threadIdx.x == 0) absorbed[t - 2] = moved;  // every CTA of the matrix comes to the same
    if (moved) {
      __syncthreads();
      restart_rows(logits, state, t, at.band);
    }
    if (t == 1 || moved) {
      exponentiate(state, t, at.band);
      v.reset();
    }
    const auto none = [](int) { return 0; };
    v.sweep(at.band, none, [&](int r, int, float dot) {
      const float u = t == 1 ? 1.0f : 1.0f / dot;
      if (lane() == 0) saved(t, 0)[at.band.first + r] = u;
      return u;
    }, at.buffer, at.own);
  }

  __device__ void start() const {
    start_rows(p, logits, at.band, scalings);
    __syncthreads();
    for (int j = threadIdx.x; j < p.k; j += blockDim.x) {
      float top = -INFINITY;
      for (int r = 0; r < at.band.rows; ++r) top = fmaxf(top, at.band.row(r)[j]);
      at.own[j] = top;
    }
  }

  // j = k: how many scalings of the rows have left their range.
  __device__ void column(int t, int j) const {
    if (t == 0) {
      if (j == p.k) return;
      float top = -INFINITY;
      for (int r = 0; r < team.ranks; ++r) top = fmaxf(top, team.peer(at.own, r)[j]);
      saved(0, 1)[j] = -top;
      return;
    }
    const float sum = total(team, at.own, j);
    if (j < p.k) saved(t, 1)[j] = 1.0f / sum;
    team.publish(at.columns, j, j < p.k ? 1.0f / sum : sum);
  }

  // The rows of out that belong to the band; one row of P, of log P or of P right.
  __device__ void read_rows() const {
    const int t = p.iterations, origin = state.origin(t), k = p.k;
    for (int r = warp(); r < at.band.rows; r += warps()) {
      const int i = at.band.first + r;
      const float *x = at.band.row(r), u = state.rows(t)[i];
      float sum = 0.0f;
      for (int j = lane(); j < k; j += WARP) {
        const int64_t to = static_cast<int64_t>(i) * k + j;
        const float v = at.columns[j];
        if (p.readout == Readout::right) {
          sum = fmaf(x[j] * v, right[j], sum);
        } else if (p.readout == Readout::matrix) {
          out[to] = u * x[j] * v;
        } else {
          const float f = state.potential(0, i, origin) + logf(u), g = state.potential(1, j, origin) + logf(v);
          out[to] = logits.given[to] + f + g;
        }
      }
      if (p.readout != Readout::right) continue;
      sum = warp_sum(sum);
      if (lane() == 0) out[i] = u * sum;
    }
  }

  // One row of left P, over the columns j0 ... j1 - 1, a tile at most.
  __device__ void read_left(int s, int j0, int j1) const {
    const auto row = [&](int i) { return team.row(at.band, i); };
    const auto finish = [&](int j, float sum) { out[static_cast<int64_t>(s) * p.k + j] = sum * at.columns[j]; };
    weigh_rows(p.left + static_cast<int64_t>(s) * p.k, state.rows(p.iterations), p.k, row, j0, j1, at.buffer, finish);
  }
};

template <bool CLUSTER, int N>
__global__ void __launch_bounds__(resident_threads(N), resident_ctas(N, false))
    resident_forward(Ranking p, ForwardTensors to, int ranks) {
  if constexpr (CLUSTER && !HAS_CLUSTERS) return;
  AHA_DYNAMIC_SHARED(float, shared);
  const int rank = blockIdx.x % ranks;
  const int width = (p.k + ranks) / ranks, from = rank * width, until = min(from + width, p.k + 1);
  const Resident<CLUSTER> team{rank, ranks};
  const Place at = place_resident(shared, p.k, rank, ranks, false);
  const Forward<Resident<CLUSTER>, N> forward(p, to, blockIdx.x / ranks, team, at);
  for (int t = 0; t <= p.iterations; ++t) {
    forward.rows(t);
    team.after_rows();
    for (int j = from + threadIdx.x; j < until; j += blockDim.x) forward.column(t, j);
    team.after_columns();
  }
  if (threadIdx.x == 0) forward.absorbed[p.iterations - 1] = 0;
  if (p.readout != Readout::left) return forward.read_rows();
  for (int s = 0; s < p.steps; ++s)
    for (int j = from; j < min(until, p.k); j += TILE) forward.read_left(s, j, min(j + TILE, min(until, p.k)));
  team.after_columns();  // others may still read the rows of this CTA
}

using StreamedForward = Forward<Streamed, 0>;

__device__ inline StreamedForward streamed_forward(const Ranking& p, const ForwardTensors& to, int64_t image, int rank,
                                                   int ranks, float* buffer) {
  const Streamed team{rank, ranks, static_cast<int>(own_floats(p.k, false))};
  return {p, to, image, team, place_streamed(to.workspace, buffer, p.k, image, rank, ranks, false)};
}

// grid: bands of rows of every matrix; t = iterations + 1: the readout by rows
__global__ void __launch_bounds__(256, 2) streamed_forward_rows(Ranking p, ForwardTensors to, int ranks, int t) {
  AHA_DYNAMIC_SHARED(float, buffer);
  const auto forward = streamed_forward(p, to, blockIdx.x / ranks, blockIdx.x % ranks, ranks, buffer);
  t <= p.iterations ? forward.rows(t) : forward.read_rows();
}

// grid: groups of columns of every matrix
__global__ void __launch_bounds__(256) streamed_forward_columns(Ranking p, ForwardTensors to, int ranks, int t) {
  const int groups = p.k / blockDim.x + 1, j = blockIdx.x % groups * blockDim.x + threadIdx.x;
  const auto forward = streamed_forward(p, to, blockIdx.x / groups, 0, ranks, nullptr);
  if (j <= p.k) forward.column(t, j);
  if (t == p.iterations && j == p.k) forward.absorbed[t - 1] = 0;
}

// items: tiles of columns of every step of every matrix
__global__ void __launch_bounds__(256) streamed_forward_left(Ranking p, ForwardTensors to, int ranks, int64_t items) {
  AHA_DYNAMIC_SHARED(float, buffer);
  const int tiles = (p.k + TILE - 1) / TILE;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int j = static_cast<int>(item % tiles) * TILE, s = static_cast<int>(item / tiles % p.steps);
    const auto forward = streamed_forward(p, to, item / tiles / p.steps, 0, ranks, buffer);
    forward.read_left(s, j, min(j + TILE, p.k));
  }
}

struct BackwardTensors {
  const float *grad, *scalings;
  const int32_t* absorbed;
  float *grad_scores, *grad_logits, *grad_tau, *grad_right, *grad_start;  // null where not wanted
  float* kept;       // of every matrix r, terms of grad_tau (k,) each, y, z (iterations,k) each, the centre (k,)
  float* workspace;  // streamed
};

template <typename Team, int N>
struct Backward {
  const Ranking& p;
  Logits logits;
  State state;
  Arriving arriving;
  Team team;
  Place at;
  float *grad_scores, *grad_logits, *grad_tau, *grad_right, *grad_start, *kept;

  __device__ Backward(const Ranking& p, const BackwardTensors& to, int64_t image, Team team, Place at)
      : p(p),
        logits(p, image),
        state(p, to.scalings, to.absorbed, image),
        arriving(p, to.grad, image),
        team(team),
        at(at),
        grad_scores(to.grad_scores ? to.grad_scores + image * p.k : nullptr),
        grad_logits(to.grad_logits ? to.grad_logits + image * p.k * p.k : nullptr),
        grad_tau(to.grad_tau ? to.grad_tau + image : nullptr),
        grad_right(to.grad_right ? to.grad_right + image * p.k : nullptr),
        grad_start(to.grad_start ? to.grad_start + image * p.k : nullptr),
        kept(to.kept + image * kept_floats(p.k, p.iterations)) {}

  __device__ float* row_sums() const { return kept; }
  __device__ float* tau_terms() const { return kept + p.k; }
  __device__ float* y(int t) const { return kept + static_cast<int64_t>(t + 1) * p.k; }
  __device__ float* z(int t) const { return y(t + p.iterations); }
  __device__ float* centre() const { return z(p.iterations + 1); }
  __device__ bool with_noise() const { return grad_tau && logits.noise != 0.0f; }

  // v of the iteration before t, relative to the X of t.
  __device__ float previous(int t, int j) const {
    if (t == 1) return expf(logits.initial(p, j) - state.columns(0)[j]);
    return state.fresh(t) ? 1.0f : state.columns(t - 1)[j];
  }
  // The last iteration with the X of t.
  __device__ int last(int t) const {
    while (t < p.iterations && !state.fresh(t + 1)) ++t;
    return t;
  }

  // t = iterations + 2: X of the last segment; from iterations on the sweep of iteration t, backwards.
  __device__ void rows(int t) const {
    if (t == p.iterations + 2 || (t < p.iterations && state.fresh(t + 1))) {
      const int segment = min(t, p.iterations);
      restart_rows(logits, state, segment, at.band);
      exponentiate(state, segment, at.band);
    }
    if (t > p.iterations) return;
    Columns<N> v;
    v.load(at.columns, p.k);
    struct Known {
      float u, sum;
    };
    const auto before = [&](int r) {
      const int i = at.band.first + r;
      return Known{state.rows(t)[i], t == p.iterations ? row_sums()[i] : 0.0f};
    };
    v.sweep(at.band, before, [&](int r, const Known& known, float dot) {
      const float coefficient = known.u * (known.sum - known.u * dot);
      if (lane() == 0) z(t)[at.band.first + r] = coefficient;
      return coefficient;
    }, at.buffer, at.own);
  }

  // t = iterations + 2 and + 1: row and column sums of W; then what a segment leaves, where iteration t is its first.
  __device__ void tiles(int t) const {
    if (t > p.iterations) weigh(t == p.iterations + 1);
    else if (state.fresh(t)) fold(t, last(t));
  }

  // An entry of W from one of the gradient that arrives. Columns of P sum to 1, so a constant may be taken from each
  // column of its gradient: the mean, which the last column step would take away later, with larger rounding errors.
  __device__ float weighed(float permutation, float g, float mean) const {
    return logits.given ? g - permutation * mean : permutation * (g - mean);
  }

  // own_j = sum_i W_ij, and the row sums. First without the centre, which comes of it; of P right without right_j.
  __device__ void weigh(bool centred) const {
    const int t = p.iterations, k = p.k;
    for (int j0 = 0; j0 < k; j0 += TILE) {
      Tile part = {};
      for (int r = warp(); r < at.band.rows; r += warps()) {
        const int i = at.band.first + r;
        const float *x = at.band.row(r), u = state.rows(t)[i];
        Tile g;
        arriving.row(i, j0, g);
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < TILE_COLUMNS; ++c) {
          const int j = j0 + lane() + WARP * c;
          if (j >= k) continue;
          const float permutation = u * x[j] * state.columns(t)[j];
          const float w = weighed(permutation, g[c], centred ? centre()[j] : 0.0f);
          sum += w;
          part[c] += !centred && p.readout == Readout::right ? permutation * arriving.grad[i] : w;
        }
        sum = warp_sum(sum);
        if (lane() == 0) row_sums()[i] = j0 ? row_sums()[i] + sum : sum;
      }
      add_warps(part, min(TILE, k - j0), at.buffer, [&](int j, float sum) { at.own[j0 + j] = sum; });
    }
    __syncthreads();
  }

  // What iterations from ... to, which share X, add to the gradient of the logits, and its column sums: weighted with
  // the rank, with the noise. Entry by entry: sums of these products over a matrix would cancel.
  __device__ void fold(int from, int to) const {
    constexpr int R = N <= 2 ? 4 : 8;
    const int k = p.k;
    for (int j0 = 0; j0 < k; j0 += TILE) {
      Tile ranked = {}, noisy = {};
      for (int r0 = warp() * R; r0 < at.band.rows; r0 += warps() * R) {
        float field[R][TILE_COLUMNS] = {};
#pragma unroll 1  // its loads fill the registers as it is
        for (int t = from; t <= to; ++t) add_outer<R>(t, r0, j0, field);
#pragma unroll 1  // the code once; a row of the field is selected, not indexed, and so stays in registers
        for (int r = 0; r < min(R, at.band.rows - r0); ++r) {
          Tile selected = {};
#pragma unroll
          for (int n = 0; n < R * TILE_COLUMNS; ++n)
            if (n / TILE_COLUMNS == r) selected[n % TILE_COLUMNS] = field[n / TILE_COLUMNS][n % TILE_COLUMNS];
          finish_row(r0 + r, j0, to == p.iterations, selected, ranked, noisy);
        }
      }
      if (logits.given) continue;
      const int width = min(TILE, k - j0);
      float* sums = at.own + k + 1 + j0;
      add_warps(ranked, width, at.buffer, [&](int j, float sum) { sums[j] = sum; });
      if (with_noise()) add_warps(noisy, width, at.buffer, [&](int j, float sum) { sums[k + j] = sum; });
    }
    __syncthreads();
  }

  template <int R>
  __device__ void add_outer(int t, int r0, int j0, float (&field)[R][TILE_COLUMNS]) const {
    Tile y_t, v;
#pragma unroll
    for (int c = 0; c < TILE_COLUMNS; ++c) {
      const int j = min(j0 + lane() + WARP * c, p.k - 1);
      y_t[c] = y(t)[j];
      v[c] = previous(t, j);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int i = at.band.first + min(r0 + r, at.band.rows - 1);
      const float u = state.rows(t)[i], z_t = z(t)[i];
#pragma unroll
      for (int c = 0; c < TILE_COLUMNS; ++c) field[r][c] = fmaf(u, y_t[c], fmaf(z_t, v[c], field[r][c]));
    }
  }

  // The gradient of the logits in one row of a tile. X there is not needed any more: the noise takes its place.
  __device__ void finish_row(int r, int j0, bool final, const Tile& field, Tile& ranked, Tile& noisy) const {
    const int i = at.band.first + r, k = p.k;
    float* x = at.band.row(r);
    const float u = state.rows(p.iterations)[i];
    Tile g = {}, grad;
    if (final) arriving.row(i, j0, g);
#pragma unroll
    for (int c = 0; c < TILE_COLUMNS; ++c) {
      const int j = j0 + lane() + WARP * c;
      if (j >= k) continue;
      const float w = final ? weighed(u * x[j] * state.columns(p.iterations)[j], g[c], centre()[j]) : 0.0f;
      grad[c] = w - x[j] * field[c];
      ranked[c] = fmaf(logits.rank(i), grad[c], ranked[c]);
      if (!grad_logits) continue;
      float& to = grad_logits[static_cast<int64_t>(i) * k + j];
      to = final ? grad[c] : to + grad[c];
    }
    if (!with_noise()) return;
    write_noise(logits, i, j0, min(j0 + TILE, k), x);
#pragma unroll
    for (int c = 0; c < TILE_COLUMNS; ++c) {
      const int j = j0 + lane() + WARP * c;
      if (j < k) noisy[c] = fmaf(grad[c], x[j], noisy[c]);
    }
  }

  __device__ void column(int t, int j) const {
    if (j == p.k) return;
    float g = total(team, at.own, j);
    if (t == p.iterations + 2) {
      if (grad_right) grad_right[j] = g, g *= arriving.right[j];
      centre()[j] = g;
      return;
    }
    if (t <= p.iterations) g *= -previous(t, j);
    if (t <= p.iterations && state.fresh(t) && grad_scores) gather(j, last(t) == p.iterations, t == 1 ? g : 0.0f);
    if (t == 1) {
      if (grad_start) grad_start[j] = g;
      return;
    }
    const float next = state.columns(t - 1)[j] * g;
    y(t - 1)[j] = next;
    team.publish(at.columns, j, next);
  }

  // What the segment that was folded last adds to the gradients of score j and, for this column, of tau. `initial`, the
  // gradient of the initial column potential, comes with the first segment: summing the fold's columns would cancel.
  // It is the scores' own where no start is given.
  __device__ void gather(int j, bool final, float initial) const {
    if (grad_start) initial = 0.0f;
    float* sums = at.own + p.k + 1;
    const float ranked = total(team, sums, j), c = logits.centred(j);
    const float score = 2.0f * (ranked - c * initial) / logits.tau;
    grad_scores[j] = final ? score : grad_scores[j] + score;
    if (!grad_tau) return;
    float term = c * (2.0f * ranked - c * initial);
    if (with_noise()) term = fmaf(logits.noise, total(team, sums, p.k + j), term);
    tau_terms()[j] = final ? term : tau_terms()[j] + term;
  }

  // One warp.
  __device__ void finish_tau() const {
    float sum = 0.0f;
    for (int j = lane(); j < p.k; j += WARP) sum += tau_terms()[j];
    sum = warp_sum(sum);
    if (lane() == 0) *grad_tau = -sum / logits.tau / logits.tau;
  }
};

template <bool CLUSTER, int N>
__global__ void __launch_bounds__(resident_threads(N), resident_ctas(N, true))
    resident_backward(Ranking p, BackwardTensors to, int ranks) {
  if constexpr (CLUSTER && !HAS_CLUSTERS) return;
  AHA_DYNAMIC_SHARED(float, shared);
  const int rank = blockIdx.x % ranks;
  const int width = (p.k + ranks) / ranks, from = rank * width, until = min(from + width, p.k + 1);
  const Resident<CLUSTER> team{rank, ranks};
  const Place at = place_resident(shared, p.k, rank, ranks, true);
  const Backward<Resident<CLUSTER>, N> backward(p, to, blockIdx.x / ranks, team, at);
  for (int t = p.iterations + 2; t >= 1; --t) {
    backward.rows(t);
    backward.tiles(t);
    team.after_rows();
    for (int j = from + threadIdx.x; j < until; j += blockDim.x) backward.column(t, j);
    team.after_columns();
  }
  if (backward.grad_tau && rank == 0 && warp() == 0) backward.finish_tau();
}

using StreamedBackward = Backward<Streamed, 0>;

__device__ inline StreamedBackward streamed_backward(const Ranking& p, const BackwardTensors& to, int64_t image,
                                                     int rank, int ranks, float* buffer) {
  const Streamed team{rank, ranks, static_cast<int>(own_floats(p.k, true))};
  return {p, to, image, team, place_streamed(to.workspace, buffer, p.k, image, rank, ranks, true)};
}

// grid: bands of rows of every matrix
__global__ void __launch_bounds__(256, 2) streamed_backward_rows(Ranking p, BackwardTensors to, int ranks, int t) {
  AHA_DYNAMIC_SHARED(float, buffer);
  streamed_backward(p, to, blockIdx.x / ranks, blockIdx.x % ranks, ranks, buffer).rows(t);
}

// grid: bands of rows of every matrix. Apart from the sweep, which needs many warps and few registers.
__global__ void __launch_bounds__(256, 1) streamed_backward_tiles(Ranking p, BackwardTensors to, int ranks, int t) {
  AHA_DYNAMIC_SHARED(float, buffer);
  streamed_backward(p, to, blockIdx.x / ranks, blockIdx.x % ranks, ranks, buffer).tiles(t);
}

// grid: groups of columns of every matrix
__global__ void __launch_bounds__(256) streamed_backward_columns(Ranking p, BackwardTensors to, int ranks, int t) {
  const int groups = p.k / blockDim.x + 1, j = blockIdx.x % groups * blockDim.x + threadIdx.x;
  const auto backward = streamed_backward(p, to, blockIdx.x / groups, 0, ranks, nullptr);
  if (j <= p.k) backward.column(t, j);
}

// grid: one warp for every matrix
__global__ void streamed_backward_tau(Ranking p, BackwardTensors to, int ranks) {
  streamed_backward(p, to, blockIdx.x, 0, ranks, nullptr).finish_tau();
}

// left P. items: tiles of columns of every step of every matrix
__global__ void __launch_bounds__(256)
    masks_forward(const float* permutation, const float* left, float* out, int k, int steps, int64_t items) {
  AHA_DYNAMIC_SHARED(float, buffer);
  const int tiles = (k + TILE - 1) / TILE;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int j = static_cast<int>(item % tiles) * TILE, s = static_cast<int>(item / tiles % steps);
    const float* matrix = permutation + item / tiles / steps * k * k;
    const auto row = [&](int i) { return matrix + static_cast<int64_t>(i) * k; };
    const auto finish = [&](int j, float sum) { out[item / tiles * k + j] = sum; };
    weigh_rows(left + static_cast<int64_t>(s) * k, nullptr, k, row, j, min(j + TILE, k), buffer, finish);
  }
}

// left^T grad. items: rows of every matrix, one for each warp
__global__ void __launch_bounds__(256)
    masks_backward(const float* grad, const float* left, float* out, int k, int steps, int64_t items) {
  for (int64_t item = static_cast<int64_t>(blockIdx.x) * warps() + warp(); item < items;
       item += static_cast<int64_t>(gridDim.x) * warps()) {
    const float* image = grad + item / k * steps * k;
    for (int j0 = 0; j0 < k; j0 += TILE) {
      Tile sum;
      weigh_steps(left, image, steps, k, static_cast<int>(item % k), j0, sum);
#pragma unroll
      for (int c = 0; c < TILE_COLUMNS; ++c) {
        const int j = j0 + lane() + WARP * c;
        if (j < k) out[item * k + j] = sum[c];
      }
    }
  }
}

}  // namespace aha
