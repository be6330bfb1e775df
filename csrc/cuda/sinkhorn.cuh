// Sinkhorn ranking, forward and exact unrolled backward, free of torch and of the CUDA runtime.
//
// Both directions alternate two phases, numbered by iteration: rows(t), in which a CTA passes over its band of rows and
// leaves column sums of the band, and column(t, j), which adds these up over the CTAs of the matrix and publishes entry
// j of the next column vector. Where the matrix lies and what separates the phases is the layout's:
//   resident   X in the shared memory of one CTA, or of a cluster whose CTAs send each other their sums; barriers
//   streamed   X in global memory, any k, any card; every phase is a launch
// A phase adds in a fixed order, without atomics: results repeat bit for bit, on one card and for batches of one size.
// An entry of X costs an iteration 2 fma forward, 4 backward (2 of them in the fold). K = 784 issues 2.0 and 1.9
// instructions for each, all included (bench/instructions.py).
#pragma once

#include "cuda/ranking.cuh"

namespace aha {

// Threads of a resident CTA with so many columns a lane, and how many CTAs an SM must have registers for.
AHA_HD constexpr int resident_threads(int columns) { return columns <= 2 ? 128 : 256; }
constexpr int resident_ctas(int columns, bool backward) {
  return columns <= 2 ? (backward ? 3 : 4) : columns <= 4 && !backward ? 2
                                                                       : 1;
}

// Columns of a lane in a tile of the backward: whole tiles of a padded row, and no more than the registers hold.
constexpr int tile_columns(int columns) {
  return columns == 0 ? TILE_COLUMNS : columns <= 7 ? columns
                                   : columns <= 13  ? 7
                                                    : 5;
}

// What the CTAs of a matrix tell each other: sums of their bands over the columns (to whom the column belongs), the
// next column vector (to all), and that a scaling of iteration t has left its range.
// `sums` holds several vectors, one per slot.

AHA_HD int64_t band_rows(int64_t k, int64_t ranks) { return (k + ranks - 1) / ranks; }
AHA_HD int64_t padded(int64_t k) { return (k + 3) / 4 * 4; }
AHA_HD int64_t owned_columns(int64_t k, int64_t ranks) { return padded(band_rows(k, ranks)); }

// One CTA, or a cluster of them. Sums are sent to the CTA that owns the column, and lie there by rank.
template <bool CLUSTER>
struct Resident {
  int rank, ranks, width, owner;  // width: columns of a CTA, a multiple of four; owner: of this thread's columns
  int* flags;

  __device__ Resident(int rank, int ranks, int k, int* flags)
      : rank(rank),
        ranks(ranks),
        width(static_cast<int>(owned_columns(k, ranks))),
        owner(CLUSTER ? static_cast<int>(4 * threadIdx.x) / width : 0),
        flags(flags) {}
  // Columns that a thread adds up over the warps: in one CTA those that it finishes, without a barrier.
  __device__ static constexpr int thread_columns() { return CLUSTER ? 4 : 1; }
  template <typename T>
  __device__ T* peer(T* own, int other) const {
    return CLUSTER ? cluster_map(own, other) : own;
  }
  __device__ float* place(float* sums, int slot, int j) const {
    if (!CLUSTER) return sums + slot * width + j;
    const int owner = j / width;
    return peer(sums + (slot * ranks + rank) * width + j - owner * width, owner);
  }
  __device__ float* place_of_thread(float* sums, int slot, int j) const {
    return CLUSTER ? peer(sums + (slot * ranks + rank - owner) * width + j, owner) : sums + slot * width + j;
  }
  __device__ void send(float* sums, int slot, int j, float value) const { *place(sums, slot, j) = value; }
  // Zeros, by the threads of place_of_thread.
  __device__ void send_nothing(float* sums, int slot, int k) const {
    const int j = thread_columns() * static_cast<int>(threadIdx.x);
    if (j >= k) return;
    float* to = place_of_thread(sums, slot, j);
    if (CLUSTER) store_four(to, {0.0f, 0.0f, 0.0f, 0.0f});
    else *to = 0.0f;
  }
  __device__ float total(const float* sums, int slot, int j) const {
    if (!CLUSTER || ranks != 16) return rare_total(sums, slot, j);
    const float* mine = sums + (slot * ranks - rank) * width + j;
    const int step = held(width);  // or 16 addresses would be kept in registers
    float sum = 0.0f;
#pragma unroll  // where most of the time is spent
    for (int r = 0; r < 16; ++r) sum += mine[r * step];
    return sum;
  }
  // The same, in less code.
  __device__ float rare_total(const float* sums, int slot, int j) const {
    const float* mine = sums + (slot * ranks - rank) * width + j;
    float sum = 0.0f;
#pragma unroll 1
    for (int r = 0; r < ranks; ++r) sum += mine[r * width];
    return sum;
  }
  __device__ float most(const float* sums, int j) const {
    float top = -INFINITY;
    const float* mine = CLUSTER ? sums + j - rank * width : sums + j;
    for (int r = 0; r < ranks; ++r) top = fmaxf(top, mine[r * width]);
    return top;
  }
  __device__ void publish(float* columns, int j, float value) const { columns[j] = value; }
  // What this CTA has published, to the others: four columns to one CTA by each thread, to its `owner`.
  __device__ void spread(float* columns, int k) const {
    if (!CLUSTER) return;
    __syncthreads();
    const int j = (rank - owner) * width + static_cast<int>(4 * threadIdx.x);
    if (owner < ranks && owner != rank && j < k) store_four(peer(columns + j, owner), load_four(columns + j));
  }
  // Two flags in turn: a CTA may be told of iteration t + 1 before it has asked for t.
  __device__ void raise(int t) const {
    for (int r = 0; r < ranks; ++r) peer(flags, r)[t & 1] = t;
  }
  __device__ bool raised(int t) const { return flags[t & 1] == t; }
  // Between the sums and their columns. In one CTA each thread finishes the columns it has summed itself.
  __device__ void after_rows() const {
    if (CLUSTER) cluster_sync();
  }
  __device__ void after_columns() const { CLUSTER ? cluster_sync() : __syncthreads(); }
};

// CTAs that meet at the end of a launch; their sums lie one after the other.
struct Streamed {
  int rank, ranks, k, stride;
  int* flags;

  __device__ void send(float* sums, int slot, int j, float value) const { sums[slot * k + j] = value; }
  __device__ const float* peer(const float* own, int other) const {
    return own + static_cast<int64_t>(other - rank) * stride;
  }
  __device__ float total(const float* sums, int slot, int j) const {
    float sum = 0.0f;
    for (int r = 0; r < ranks; ++r) sum += peer(sums, r)[slot * k + j];
    return sum;
  }
  __device__ float rare_total(const float* sums, int slot, int j) const { return total(sums, slot, j); }
  __device__ float most(const float* sums, int j) const {
    float top = -INFINITY;
    for (int r = 0; r < ranks; ++r) top = fmaxf(top, peer(sums, r)[j]);
    return top;
  }
  __device__ void publish(float* columns, int j, float value) const { columns[j] = value; }
  __device__ void raise(int t) const { flags[t & 1] = t; }
  __device__ bool raised(int t) const { return flags[t & 1] == t; }
};

// Adds vectors (or takes their maxima), one of each warp, over the warps in their order, and sends them.
template <int N, typename Team, typename Combine>
__device__ __forceinline__ void combine_warps(const float (&part)[N], int k, float* buffer, const Team& team,
                                              float* sums, int slot, const Combine& combine) {
  constexpr int WIDTH = Lanes<N>::WIDTH, WARPS = resident_threads(N) / WARP, EACH = Team::thread_columns();
  static_assert(WIDTH <= EACH * resident_threads(N));
  Lanes<N>::store(buffer + warp() * WIDTH, part);
  __syncthreads();
  const int j = EACH * static_cast<int>(threadIdx.x);
  if (j >= k) return;
  if constexpr (EACH == 4) {
    float4 sum = load_four(buffer + j);
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
      const float4 x = load_four(buffer + w * WIDTH + j);
      sum = {combine(sum.x, x.x), combine(sum.y, x.y), combine(sum.z, x.z), combine(sum.w, x.w)};
    }
    store_four(team.place_of_thread(sums, slot, j), sum);
  } else {
    float sum = buffer[j];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) sum = combine(sum, buffer[w * WIDTH + j]);
    *team.place_of_thread(sums, slot, j) = sum;
  }
}

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};
struct Most {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The sweep: c_i = coefficient(r, before(r), X_i . v), then sum_i c_i X_ij, one read of X. Whether a c_i of this lane
// has left the range of scalings is returned.

// The smallest and the largest of some positive numbers and 1.
struct Extremes {
  float least = 1.0f, most = 1.0f;
  __device__ void add(float x) { least = fminf(least, x), most = fmaxf(most, x); }
  __device__ bool outside() const { return least < 1.0f / LARGE_SCALING || most > LARGE_SCALING; }
};

// N columns a lane, in registers with R rows at a time, then one by one.
template <int N>
struct Columns {
  static constexpr int R = N <= 2 ? 8 : 4;
  float v[N];

  __device__ void load(const float* columns) { Lanes<N>::load(columns, v); }

  // M rows from r0 on. Each lane forms the coefficient of one of them, the row `mine` after r0.
  template <int M, typename Before, typename Coefficient>
  __device__ __forceinline__ void rows(const Band& band, int r0, int mine, const Before& before,
                                       const Coefficient& coefficient, float (&part)[N], Extremes& seen) const {
    const auto known = before(r0 + mine);
    float x[M][N], dot[M] = {};
#pragma unroll
    for (int r = 0; r < M; ++r) Lanes<N>::load(band.row(r0 + r), x[r]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int r = 0; r < M; ++r) dot[r] = fmaf(x[r][n], v[n], dot[r]);
    const float own = coefficient(r0 + mine, known, scattered_sums(dot), lane() < M);
    seen.add(own);
#pragma unroll
    for (int r = 0; r < M; ++r) {
      const float c = M == 1 ? own : __shfl_sync(ALL_LANES, own, sum_of<M>(r));  // sum_of is its own inverse
#pragma unroll
      for (int n = 0; n < N; ++n) part[n] = fmaf(c, x[r][n], part[n]);
    }
  }

  template <typename Team, typename Before, typename Coefficient>
  __device__ bool sweep(const Band& band, const Before& before, const Coefficient& coefficient, float* buffer,
                        const Team& team, float* sums) const {
    constexpr int STEP = resident_threads(N) / WARP * R;
    float part[N] = {};
    Extremes seen;
    const int mine = held(sum_of<R>(lane()));
    int r0 = uniform_warp() * R;
#pragma unroll 1
    for (; r0 + R <= band.rows; r0 += STEP) rows<R>(band, r0, mine, before, coefficient, part, seen);
#pragma unroll 1
    for (int r = r0; r < min(r0 + R, band.rows); ++r) rows<1>(band, r, 0, before, coefficient, part, seen);
    combine_warps(part, band.k, buffer, team, sums, 0, Add{});
    return seen.outside();
  }
};

// Any number of columns: v and X in global memory, X read again from the cache for the column sums.
template <>
struct Columns<0> {
  const float* v;

  __device__ void load(const float* columns) { v = columns; }

  template <typename Team, typename Before, typename Coefficient>
  __device__ bool sweep(const Band& band, const Before& before, const Coefficient& coefficient, float* buffer,
                        const Team& team, float* sums) const {
    bool far = false;
    for (int r = warp(); r < band.rows; r += warps()) {
      const float* row = band.row(r);
      float dot = 0.0f;
#pragma unroll 4
      for (int j = lane(); j < band.k; j += WARP) dot = fmaf(row[j], v[j], dot);
      const float c = coefficient(r, before(r), warp_sum(dot), lane() == 0);
      if (lane() == 0) buffer[r] = c;
      far |= outside(c);
    }
    __syncthreads();
    for (int j = threadIdx.x; j < band.k; j += blockDim.x) {
      float sum = 0.0f;
#pragma unroll 4
      for (int r = 0; r < band.rows; ++r) sum += buffer[r] * band.row(r)[j];
      team.send(sums, 0, j, sum);
    }
    return far;
  }
};

// In floats. `wide`: columns that the lanes of a warp hold. Slots of column sums: forward two, which steps of
// the readout take in turn; backward one of a sweep and two of the fold. Each of `warps` warps of a resident CTA needs
// room for its part of the sums.
AHA_HD int64_t slots(bool backward) { return backward ? 3 : 2; }
AHA_HD int64_t shared_floats(int64_t k, int64_t ranks, int64_t wide, int64_t warps, bool backward) {
  return band_rows(k, ranks) * padded(k) + (1 + warps) * wide + slots(backward) * ranks * owned_columns(k, ranks) + 4;
}
AHA_HD int64_t streamed_floats(int64_t k, int64_t ranks, bool backward) {
  return k * k + ranks * slots(backward) * k + k + 2;
}
// Of every matrix: (u, z) of every row and (y, v before) of every column (iterations,k,2) each, then row sums, terms of
// grad_tau, the centre (k,) each, and room for the columns that a tile reads in vain.
AHA_HD int64_t kept_floats(int64_t k, int64_t iterations) { return 4 * iterations * k + 4 * k + 1024; }

struct Place {
  Band band;
  float *sums, *columns, *buffer;
  int* flags;
};

__device__ inline Place place(float* x, int stride, float* sums, float* columns, float* buffer, int* flags, int k,
                              int rank, int ranks) {
  const int size = static_cast<int>(band_rows(k, ranks)), first = min(rank * size, k);
  return {{x, first, min(size, k - first), k, stride}, sums, columns, buffer, flags};
}

template <int N>
__device__ inline Place place_resident(float* shared, int k, int rank, int ranks) {
  constexpr int WIDTH = Lanes<N>::WIDTH;
  const int stride = static_cast<int>(padded(k));
  float *x = shared + 4, *columns = x + band_rows(k, ranks) * stride, *buffer = columns + WIDTH;
  float* sums = buffer + resident_threads(N) / WARP * WIDTH;
  int* flags = reinterpret_cast<int*>(shared);
  const Place at = place(x, stride, sums, columns, buffer, flags, k, rank, ranks);
  // what follows the last row: past column k it stays so
  for (float* rest = at.band.row(at.band.rows) + threadIdx.x; rest < buffer; rest += blockDim.x) *rest = 0.0f;
  return at;
}

__device__ inline Place place_streamed(float* workspace, float* buffer, int k, int64_t image, int rank, int ranks,
                                       bool backward) {
  float* x = workspace + image * streamed_floats(k, ranks, backward);
  float *columns = x + static_cast<int64_t>(k) * k, *flags = columns + k, *sums = flags + 2 + rank * slots(backward) * k;
  return place(x + min(rank * band_rows(k, ranks), int64_t{k}) * k, k, sums, columns, buffer,
               reinterpret_cast<int*>(flags), k, rank, ranks);
}

struct ForwardTensors {
  float *out, *scalings;
  int32_t* absorbed;
  float* workspace;  // streamed
};

template <typename Team, int N>
struct Forward {
  const Ranking& p;
  int64_t image;
  State state;
  Team team;
  Place at;
  float *out, *scalings;
  int32_t* absorbed;

  __device__ Forward(const Ranking& p, const ForwardTensors& to, int64_t image, Team team, Place at)
      : p(p),
        image(image),
        state(p, to.scalings, to.absorbed, image),
        team(team),
        at(at),
        out(to.out + image * out_rows(p) * (p.readout == Readout::right ? 1 : p.k)),
        scalings(to.scalings + image * (p.iterations + 1) * 2 * p.k),
        absorbed(to.absorbed + image * p.iterations) {}

  __device__ Logits logits() const { return {p, image}; }  // made where it is used: a sweep has no registers for it
  __device__ static int64_t out_rows(const Ranking& p) { return p.readout == Readout::left ? p.steps : p.k; }
  __device__ float* saved(int t, int side) const { return scalings + static_cast<int64_t>(2 * t + side) * p.k; }

  // X of the first iteration.
  __device__ void begin() const {
    ones();
    exponentiate<N>(state, 1, at.band, at.buffer);
  }

  // Iteration t, from the absorption of the one before.
  __device__ void rows(int t) const {
    if (team.raised(t - 1)) {  // every CTA of the matrix comes to the same
      if (threadIdx.x == 0) absorbed[t - 2] = 1;
      __syncthreads();
      ones();
      restart_rows<N>(logits(), state, t, at.band);
      exponentiate<N>(state, t, at.band, at.buffer);
    }
    Columns<N> v;
    v.load(at.columns);
    float* scaling = held(saved(t, 0) + at.band.first);
    const auto none = [](int) { return 0; };
    const bool far = v.sweep(at.band, none, [&](int r, int, float dot, bool saves) {
      const float u = t == 1 ? 1.0f : reciprocal(dot);
      if (saves) scaling[r] = u;
      return u;
    }, at.buffer, team, at.sums);
    if (far) team.raise(t);
  }

  // Column scalings of a fresh X.
  __device__ void ones() const {
    for (int j = threadIdx.x; j < p.k; j += blockDim.x) at.columns[j] = 1.0f;
  }

  // Iteration 0: row potentials and the column maxima of M + F.
  __device__ void start() const {
    if (threadIdx.x < 2) at.flags[threadIdx.x] = -1;
    for (int t = threadIdx.x; t < p.iterations; t += blockDim.x) absorbed[t] = 0;
    start_rows<N>(p, logits(), at.band, scalings);
    if constexpr (N > 0) {
      float top[N];
#pragma unroll
      for (int n = 0; n < N; ++n) top[n] = -INFINITY;
#pragma unroll 1
      for (int r = warp(); r < at.band.rows; r += warps()) {  // those this warp has written
        float x[N];
        Lanes<N>::load(at.band.row(r), x, at.band.stride);
#pragma unroll
        for (int n = 0; n < N; ++n) top[n] = fmaxf(top[n], x[n]);
      }
      combine_warps(top, p.k, at.buffer, team, at.sums, 0, Most{});
    } else {
      __syncthreads();
      for (int j = threadIdx.x; j < p.k; j += blockDim.x) {
        float top = -INFINITY;
        for (int r = 0; r < at.band.rows; ++r) top = fmaxf(top, at.band.row(r)[j]);
        team.send(at.sums, 0, j, top);
      }
    }
  }

  __device__ void column(int t, int j) const {
    if (t == 0) {
      saved(0, 1)[j] = -team.most(at.sums, j);
      return;
    }
    const float v = reciprocal(team.total(at.sums, 0, j));
    saved(t, 1)[j] = v;
    if (outside(v)) team.raise(t);
    team.publish(at.columns, j, v);
  }

  // The rows of out that belong to the band; one row of P, of log P or of P right.
  __device__ void read_rows() const {
    const int t = p.iterations, origin = state.origin(t), k = p.k;
    const float *right = p.right + image * k, *given = p.logits + image * k * k;  // if there are any
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
          // as X was made: large potentials cancel the logit before anything small is added
          const float logit = given[to] + state.potential(0, i, origin) + state.potential(1, j, origin);
          out[to] = logit + (logf(u) + logf(v));
        }
      }
      if (p.readout != Readout::right) continue;
      sum = warp_sum(sum);
      if (lane() == 0) out[i] = u * sum;
    }
  }

  // Which of the rows s ... s + 31 of left have an entry for the band, most being 0: bits from the lowest on; all warps.
  __device__ unsigned used_by(int s) const {
    const float* left = p.left + static_cast<int64_t>(s + lane()) * p.k + at.band.first;
    bool any = false;
    if (s + lane() < p.steps)
      for (int r = warp(); r < at.band.rows; r += warps()) any |= left[r] != 0.0f;
    unsigned* words = reinterpret_cast<unsigned*>(at.buffer);
    unsigned used = __ballot_sync(ALL_LANES, any);
    if (lane() == 0) words[warp()] = used;
    __syncthreads();
    for (int w = 0; w < warps(); ++w) used |= words[w];
    __syncthreads();
    return used;
  }

  // What the band adds to row s of left P; all warps.
  __device__ void sum_left(int s) const {
    const float* left = p.left + static_cast<int64_t>(s) * p.k + at.band.first;
    float part[N] = {};
    const float* u = state.rows(p.iterations) + at.band.first;
    const unsigned turns = __ballot_sync(ALL_LANES, lane() % warps() == warp());  // the rows of this warp
#pragma unroll 1
    for (int r0 = 0; r0 < at.band.rows; r0 += WARP) {
      const int mine = min(r0 + lane(), at.band.rows - 1);
      const float weight = r0 + lane() < at.band.rows ? left[mine] * u[mine] : 0.0f;
#pragma unroll 1
      for (unsigned rest = turns & __ballot_sync(ALL_LANES, weight != 0.0f); rest; rest &= rest - 1) {
        const int r = __ffs(rest) - 1;
        const float w = __shfl_sync(ALL_LANES, weight, r);
        float x[N];
        Lanes<N>::load(at.band.row(r0 + r), x);
#pragma unroll
        for (int n = 0; n < N; ++n) part[n] = fmaf(w, x[n], part[n]);
      }
    }
    combine_warps(part, p.k, at.buffer, team, at.sums, s & 1, Add{});
  }

  __device__ void read_left(int s, int j) const {
    out[static_cast<int64_t>(s) * p.k + j] = team.total(at.sums, s & 1, j) * at.columns[j];
  }

  // Streamed: one row of left P, over the columns j0 ... j1 - 1, a tile at most.
  __device__ void weigh_left(int s, int j0, int j1) const {
    const auto row = [&](int i) { return at.band.row(i - at.band.first); };
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
  const Place at = place_resident<N>(shared, p.k, rank, ranks);
  const Resident<CLUSTER> team(rank, ranks, p.k, at.flags);
  const int j = rank * team.width + threadIdx.x, until = min((rank + 1) * team.width, p.k);  // one column a thread
  const Forward<Resident<CLUSTER>, N> forward(p, to, blockIdx.x / ranks, team, at);
  team.after_columns();  // the others have begun: their memory may be written
  forward.start();
  team.after_rows();
  if (j < until) forward.column(0, j);
  team.after_columns();
  forward.begin();
  for (int t = 1; t <= p.iterations; ++t) {
    forward.rows(t);
    team.after_rows();
    if (j < until) forward.column(t, j);
    team.spread(at.columns, p.k);
    team.after_columns();
  }
  if (p.readout != Readout::left) return forward.read_rows();
  unsigned used = 0;
  for (int s = 0; s < p.steps; ++s, used >>= 1) {
    if (s % WARP == 0) used = forward.used_by(s);
    if (used & 1) forward.sum_left(s);
    else team.send_nothing(at.sums, s & 1, p.k);
    team.after_rows();
    if (j < until) forward.read_left(s, j);
    if (!CLUSTER) team.after_columns();  // of a cluster the sums of two steps lie apart
  }
}

using StreamedForward = Forward<Streamed, 0>;

__device__ inline StreamedForward streamed_forward(const Ranking& p, const ForwardTensors& to, int64_t image, int rank,
                                                   int ranks, float* buffer) {
  const Place at = place_streamed(to.workspace, buffer, p.k, image, rank, ranks, false);
  const Streamed team{rank, ranks, p.k, static_cast<int>(slots(false) * p.k), at.flags};
  return {p, to, image, team, at};
}

// grid: bands of rows of every matrix; t = iterations + 1: the readout by rows
__global__ void __launch_bounds__(256, 2) streamed_forward_rows(Ranking p, ForwardTensors to, int ranks, int t) {
  AHA_DYNAMIC_SHARED(float, buffer);
  const auto forward = streamed_forward(p, to, blockIdx.x / ranks, blockIdx.x % ranks, ranks, buffer);
  if (t == 0) return forward.start();
  if (t == 1) forward.begin();
  t <= p.iterations ? forward.rows(t) : forward.read_rows();
}

// grid: groups of columns of every matrix
__global__ void __launch_bounds__(256) streamed_forward_columns(Ranking p, ForwardTensors to, int ranks, int t) {
  const int groups = (p.k + blockDim.x - 1) / blockDim.x, j = blockIdx.x % groups * blockDim.x + threadIdx.x;
  const auto forward = streamed_forward(p, to, blockIdx.x / groups, 0, ranks, nullptr);
  if (j < p.k) forward.column(t, j);
}

// items: tiles of columns of every step of every matrix
__global__ void __launch_bounds__(256) streamed_forward_left(Ranking p, ForwardTensors to, int ranks, int64_t items) {
  AHA_DYNAMIC_SHARED(float, buffer);
  const int tiles = (p.k + TILE - 1) / TILE;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int j = static_cast<int>(item % tiles) * TILE, s = static_cast<int>(item / tiles % p.steps);
    const auto forward = streamed_forward(p, to, item / tiles / p.steps, 0, ranks, buffer);
    forward.weigh_left(s, j, min(j + TILE, p.k));
  }
}

struct BackwardTensors {
  const float *grad, *scalings;
  const int32_t* absorbed;
  float *grad_scores, *grad_logits, *grad_tau, *grad_right, *grad_start;  // null where not wanted
  float* kept;       // kept_floats of every matrix
  float* workspace;  // streamed
};

template <typename Team, int N>
struct Backward {
  static constexpr int C = tile_columns(N);
  const Ranking& p;
  int64_t image;
  State state;
  Arriving arriving;
  Team team;
  Place at;
  float *grad_scores, *grad_logits, *grad_tau, *grad_right, *grad_start, *kept;

  __device__ Backward(const Ranking& p, const BackwardTensors& to, int64_t image, Team team, Place at)
      : p(p),
        image(image),
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

  // (u, z) of row i and (y, v of the iteration before) of column j, as the fold reads them
  __device__ float* row_pair(int t, int i) const { return kept + 2 * (static_cast<int64_t>(t - 1) * p.k + i); }
  __device__ float* column_pair(int t, int j) const { return row_pair(t + p.iterations, j); }
  __device__ float* row_sums() const { return row_pair(2 * p.iterations + 1, 0); }
  __device__ float* tau_terms() const { return row_sums() + p.k; }
  __device__ float* centre() const { return row_sums() + 2 * p.k; }
  __device__ Logits logits() const { return {p, image}; }  // made where it is used: a sweep has no registers for it
  __device__ bool with_noise() const { return grad_tau && p.noise != 0.0f; }

  // v of the iteration before t, relative to the X of t.
  __device__ float previous(int t, int j) const {
    if (t == 1) {
      const Logits l = logits();
      return expf(l.initial(p, j, l.nearest(p)) - state.columns(0)[j]);
    }
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
      restart_rows<N>(logits(), state, segment, at.band);
      exponentiate<N>(state, segment, at.band, at.buffer);
    }
    if (t > p.iterations) return;
    Columns<N> v;
    v.load(at.columns);
    struct Known {
      float u, sum;
    };
    const float *scaling = state.rows(t) + at.band.first, *sums = row_sums() + at.band.first;
    float* pairs = held(row_pair(t, at.band.first));
    const auto before = [&](int r) { return Known{scaling[r], t == p.iterations ? sums[r] : 0.0f}; };
    v.sweep(at.band, before, [&](int r, const Known& known, float dot, bool saves) {
      const float z = known.u * (known.sum - known.u * dot);
      if (saves) store_two(pairs + 2 * r, {known.u, z});
      return z;
    }, at.buffer, team, at.sums);
  }

  // t = iterations + 2 and + 1: row and column sums of W; then what a segment leaves, where iteration t is its first.
  __device__ void tiles(int t) const {
    if (t > p.iterations) weigh(t == p.iterations + 1);
    else if (state.fresh(t)) fold(t, last(t));
  }

  // An entry of W from one of the gradient that arrives. Columns of P sum to 1, so a constant may be taken from each
  // column of its gradient: the mean, which the last column step would take away later, with larger rounding errors.
  __device__ float weighed(float permutation, float g, float mean) const {
    return p.logits ? g - permutation * mean : permutation * (g - mean);
  }

  // The column sums of W, and the row sums. First without the centre, which comes of it; of P right without right_j.
  __device__ void weigh(bool centred) const {
    if constexpr (N > 0)
      if (p.readout == Readout::left) return weigh_masks(centred);
    const int t = p.iterations, k = p.k;
    for (int j0 = 0; j0 < k; j0 += WARP * C) {
      const TileColumns column{j0};
      Tile<C> part = {};
      for (int r = warp(); r < at.band.rows; r += warps()) {
        const int i = at.band.first + r;
        const float *x = at.band.row(r), u = state.rows(t)[i];
        Tile<C> g;
        arriving.row(i, column, g);
        float sum = 0.0f;
#pragma unroll
        for (int c = 0; c < C; ++c) {
          const int j = column(c);
          if (j >= k) continue;
          const float permutation = u * x[j] * state.columns(t)[j];
          const float w = weighed(permutation, g[c], centred ? centre()[j] : 0.0f);
          sum += w;
          part[c] += !centred && p.readout == Readout::right ? permutation * arriving.grad[i] : w;
        }
        sum = warp_sum(sum);
        if (lane() == 0) row_sums()[i] = j0 ? row_sums()[i] + sum : sum;
      }
      const auto send = [&](int j, float sum) { team.send(at.sums, 0, j0 + j, sum); };
      add_warps(part, min(WARP * C, k - j0), at.buffer, send);
    }
    __syncthreads();
  }

  // The same of left P: whole rows, so that the steps of a row are looked up once.
  __device__ void weigh_masks(bool centred) const {
    float mean[N], part[N] = {};
    for (int j = threadIdx.x; j < p.k; j += blockDim.x) at.columns[j] = state.columns(p.iterations)[j];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int j = Lanes<N>::column(n);
      mean[n] = centred && j < p.k ? centre()[j] : 0.0f;
    }
    __syncthreads();
#pragma unroll 1  // a row fills the registers
    for (int r = warp(); r < at.band.rows; r += warps()) {
      const int i = at.band.first + r;
      const float u = state.rows(p.iterations)[i];
      float x[N], v[N], g[N] = {}, sum = 0.0f;
      const auto add = [&](float weight, const float* from) { Lanes<N>::add(from, p.k, weight, g); };
      each_step(p.left, arriving.grad, p.steps, p.k, i, add);
      Lanes<N>::load(at.band.row(r), x);
      Lanes<N>::load(at.columns, v);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const float w = u * x[n] * v[n] * (g[n] - mean[n]);
        sum += w;
        part[n] += w;
      }
      sum = warp_sum(sum);
      if (lane() == 0) row_sums()[i] = sum;
    }
    combine_warps(part, p.k, at.buffer, team, at.sums, 0, Add{});
    __syncthreads();
  }

  // What iterations from ... to, which share X, add to the gradient of the logits, and its column sums: weighted with
  // the rank, with the noise. Entry by entry: sums of these products over a matrix would cancel.
  __device__ void fold(int from, int to) const {
    constexpr int R = N <= 2 ? 4 : 7;
    const int k = p.k;
    for (int j0 = 0; j0 < k; j0 += WARP * C) {
      Tile<C> ranked = {}, noisy = {};
#pragma unroll 1
      for (int r0 = warp() * R; r0 < at.band.rows; r0 += warps() * R) {
        float field[R][C] = {};
        add_outer<R>(from, to, r0, j0, field);
#pragma unroll 1  // the code once; a row of the field is selected, not indexed, and so stays in registers
        for (int r = 0; r < min(R, at.band.rows - r0); ++r) {
          Tile<C> selected = {};
#pragma unroll
          for (int n = 0; n < R * C; ++n)
            if (n / C == r) selected[n % C] = field[n / C][n % C];
          finish_row(r0 + r, j0, to == p.iterations, selected, ranked, noisy);
        }
      }
      if (p.logits) continue;
      const int width = min(WARP * C, k - j0);
      add_warps(ranked, width, at.buffer, [&](int j, float sum) { team.send(at.sums, 1, j0 + j, sum); });
      if (with_noise())
        add_warps(noisy, width, at.buffer, [&](int j, float sum) { team.send(at.sums, 2, j0 + j, sum); });
    }
    __syncthreads();
  }

  // sum_t u_i y_j + z_i v_j over R rows and a tile of columns; past the ends of either whatever is kept there.
  template <int R>
  __device__ __forceinline__ void add_outer(int from, int to, int r0, int j0, float (&field)[R][C]) const {
    const float *rows = row_pair(from, at.band.first + r0), *columns = column_pair(from, j0 + lane());
#pragma unroll 1  // its loads fill the registers as it is
    for (int t = from; t <= to; ++t, rows += 2 * p.k, columns += 2 * p.k) {
      float2 yv[C];
#pragma unroll
      for (int c = 0; c < C; ++c) yv[c] = load_two(columns + 2 * WARP * c);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const float2 uz = load_two(rows + 2 * r);
#pragma unroll
        for (int c = 0; c < C; ++c) field[r][c] = fmaf(uz.x, yv[c].x, fmaf(uz.y, yv[c].y, field[r][c]));
      }
    }
  }

  // The gradient of the logits in one row of a tile. X there is not needed any more: the noise takes its place.
  __device__ void finish_row(int r, int j0, bool final, const Tile<C>& field, Tile<C>& ranked,
                             Tile<C>& noisy) const {
    const int i = at.band.first + r, k = p.k;
    float* x = at.band.row(r);
    const float u = state.rows(p.iterations)[i];
    const Logits l = logits();
    Tile<C> g = {}, grad;
    if (final) arriving.row(i, TileColumns{j0}, g);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int j = j0 + lane() + WARP * c;
      if (j >= k) continue;
      const float w = final ? weighed(u * x[j] * state.columns(p.iterations)[j], g[c], centre()[j]) : 0.0f;
      grad[c] = w - x[j] * field[c];
      ranked[c] = fmaf(l.rank(i), grad[c], ranked[c]);
      if (!grad_logits) continue;
      float& to = grad_logits[static_cast<int64_t>(i) * k + j];
      to = final ? grad[c] : to + grad[c];
    }
    if (!with_noise()) return;
    write_noise(l, i, j0, min(j0 + WARP * C, k), x);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int j = j0 + lane() + WARP * c;
      if (j < k) noisy[c] = fmaf(grad[c], x[j], noisy[c]);
    }
  }

  __device__ void column(int t, int j) const {
    float g = team.total(at.sums, 0, j);
    if (t == p.iterations + 2) {
      if (grad_right) grad_right[j] = g, g *= arriving.right[j];
      centre()[j] = g;
      return;
    }
    if (t <= p.iterations) g *= -column_pair(t, j)[1];
    if (t <= p.iterations && state.fresh(t) && grad_scores) gather(j, last(t) == p.iterations, t == 1 ? g : 0.0f);
    if (t == 1) {
      if (grad_start) grad_start[j] = g;
      return;
    }
    const float next = state.columns(t - 1)[j] * g;
    store_two(column_pair(t - 1, j), {next, previous(t - 1, j)});
    team.publish(at.columns, j, next);
  }

  // What the segment that was folded last adds to the gradients of score j and, for this column, of tau. `initial`, the
  // gradient of the initial column potential, comes with the first segment: summing the fold's columns would cancel.
  // It is the scores' own where no start is given.
  __device__ void gather(int j, bool final, float initial) const {
    if (grad_start) initial = 0.0f;
    const Logits l = logits();
    const float ranked = team.rare_total(at.sums, 1, j), c = l.centred(j);
    const float score = 2.0f * (ranked - c * initial) / l.tau;
    grad_scores[j] = final ? score : grad_scores[j] + score;
    if (!grad_tau) return;
    float term = c * (2.0f * ranked - c * initial);
    if (with_noise()) term = fmaf(l.noise, team.rare_total(at.sums, 2, j), term);
    tau_terms()[j] = final ? term : tau_terms()[j] + term;
  }

  // One warp.
  __device__ void finish_tau() const {
    float sum = 0.0f;
    for (int j = lane(); j < p.k; j += WARP) sum += tau_terms()[j];
    sum = warp_sum(sum);
    if (lane() == 0) *grad_tau = -sum / *p.tau / *p.tau;
  }
};

template <bool CLUSTER, int N>
__global__ void __launch_bounds__(resident_threads(N), resident_ctas(N, true))
    resident_backward(Ranking p, BackwardTensors to, int ranks) {
  if constexpr (CLUSTER && !HAS_CLUSTERS) return;
  AHA_DYNAMIC_SHARED(float, shared);
  const int rank = blockIdx.x % ranks;
  const Place at = place_resident<N>(shared, p.k, rank, ranks);
  const Resident<CLUSTER> team(rank, ranks, p.k, at.flags);
  const int j = rank * team.width + threadIdx.x, until = min((rank + 1) * team.width, p.k);  // one column a thread
  const Backward<Resident<CLUSTER>, N> backward(p, to, blockIdx.x / ranks, team, at);
  team.after_columns();  // the others have begun: their memory may be written
  for (int t = p.iterations + 2; t >= 1; --t) {
    backward.rows(t);
    backward.tiles(t);
    team.after_rows();
    if (j < until) backward.column(t, held(j));
    team.spread(at.columns, p.k);
    team.after_columns();
  }
  if (backward.grad_tau && rank == 0 && warp() == 0) backward.finish_tau();
}

using StreamedBackward = Backward<Streamed, 0>;

__device__ inline StreamedBackward streamed_backward(const Ranking& p, const BackwardTensors& to, int64_t image,
                                                     int rank, int ranks, float* buffer) {
  const Place at = place_streamed(to.workspace, buffer, p.k, image, rank, ranks, true);
  const Streamed team{rank, ranks, p.k, static_cast<int>(slots(true) * p.k), at.flags};
  return {p, to, image, team, at};
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
  const int groups = (p.k + blockDim.x - 1) / blockDim.x, j = blockIdx.x % groups * blockDim.x + threadIdx.x;
  const auto backward = streamed_backward(p, to, blockIdx.x / groups, 0, ranks, nullptr);
  if (j < p.k) backward.column(t, j);
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
      Tile<TILE_COLUMNS> sum;
      weigh_steps(left, image, steps, k, static_cast<int>(item % k), TileColumns{j0}, sum);
#pragma unroll
      for (int c = 0; c < TILE_COLUMNS; ++c) {
        const int j = j0 + lane() + WARP * c;
        if (j < k) out[item * k + j] = sum[c];
      }
    }
  }
}

}  // namespace aha
