// The noise-free ranking in O(K) per iteration on CUDA: the mathematics of blocks.h and of cpu/block_ranking.cpp, for one
// image by one CTA, or by the CTAs of a cluster. Free of torch and of the CUDA runtime.
//
// Elements of a side (rows: ranks; columns: scores in descending order) lie in blocks, those of a block in tiles, and a
// warp works on one tile. A pair of blocks leaves its row factors, its column factors and, of each of their tiles, the
// moments of the last vector. Which pairs there are is an interval for every block: the exponent is concave along rows
// and columns, as both potentials are negative logarithms of sums of exponentials. A pair without room for its factors
// is computed entry by entry: slow, but right for whatever scores come.
//   sweep        coefficients C_m from the other side's moments, a barrier; Σ over pairs of a_i Σ_m C_m y_i^m and the
//                moments of what follows from it, 17 fma per element and pair, a barrier
//   iteration    two sweeps forward, and two backward
// Sums are added in a fixed order: results repeat bit for bit.
#pragma once

#include "cuda/block_room.cuh"

namespace aha {

// Order, blocks, pairs and factors of one image.
template <bool CLUSTER>
struct Blocks {
  static constexpr int ROWS = 0, COLUMNS = 1;

  struct Tile {
    int block, first, count, within;  // within: number of the tile in its block
  };
  // Moments, of each tile of each pair `stride` floats.
  struct Sums {
    float* at;
    int stride;
  };

  const Ranking& p;
  const int64_t image;
  const Crew<CLUSTER> crew;
  const BlockRoom& room;
  char *const hot, *const cold;
  const int k, tile_size;  // tile_size: whole stretches
  const double tau, slope, step;  // step: between ranks
  const float fit;                // the coefficient of the fit that belongs to this lane

  __device__ Blocks(const Ranking& p, const BlockRoom& room, int tile_size, char* hot, char* cold, int64_t image,
                    Crew<CLUSTER> crew)
      : p(p), image(image), crew(crew), room(room), hot(hot), cold(cold), k(p.k), tile_size(tile_size), tau(*p.tau),
        slope(2 / tau),
        step(p.k > 1 ? 1.0 / (p.k - 1) : 0.0), fit(coefficient(lane() % BLOCK_TERMS)) {}

  template <typename T>
  __device__ T* of(Hot<T> place) const { return reinterpret_cast<T*>(hot + place.bytes); }
  template <typename T>
  __device__ T* of(Cold<T> place) const { return reinterpret_cast<T*>(cold + place.bytes); }

  __device__ static float coefficient(int m) {
    using Fit = BlockExp<float>;
    constexpr float c0 = Fit::COEFFICIENTS[0], c1 = Fit::COEFFICIENTS[1], c2 = Fit::COEFFICIENTS[2];
    constexpr float c3 = Fit::COEFFICIENTS[3], c4 = Fit::COEFFICIENTS[4], c5 = Fit::COEFFICIENTS[5];
    constexpr float c6 = Fit::COEFFICIENTS[6], c7 = Fit::COEFFICIENTS[7];
    static_assert(BLOCK_TERMS == 8);
    const float low = m < 2 ? (m == 0 ? c0 : c1) : (m == 2 ? c2 : c3), high = m < 6 ? (m == 4 ? c4 : c5) : (m == 6 ? c6 : c7);
    return m < 4 ? low : high;
  }

  __device__ double rank(int i) const { return 0.5 - i * step; }
  __device__ double place(int side, int i) const { return side == ROWS ? rank(i) : of(room.c)[i]; }
  __device__ double centre(int side, int b) const {
    return (place(side, of(room.edge[side])[b]) + place(side, of(room.edge[side])[b + 1] - 1)) / 2;
  }
  __device__ double half(int side, int b) const {
    return (place(side, of(room.edge[side])[b]) - place(side, of(room.edge[side])[b + 1] - 1)) / 2;
  }
  __device__ int blocks(int side) const { return of(room.counts)[side]; }
  __device__ int tiles(int side, int b) const { return of(room.first_tile[side])[b + 1] - of(room.first_tile[side])[b]; }
  __device__ Sums sums(int side) const { return {of(room.moment[side]), 2 * MOMENTS}; }
  template <typename T>  // float or const float
  __device__ T* saved(T* scalings, int t, int side) const {
    return scalings + ((image * (p.iterations + 1) + t) * 2 + side) * k;
  }

  template <typename F>
  __device__ void each(const F& f) const {
    for (int i = crew.thread(); i < k; i += crew.threads()) f(i);
  }
  // f(Tile), by the warp that has the tile
  template <typename F>
  __device__ void each_tile(int side, const F& f) const {
    for (int n = crew.warp(); n < of(room.counts)[2 + side]; n += crew.all_warps()) {
      const int b = of(room.tile_block[side])[n], within = n - of(room.first_tile[side])[b], first = of(room.edge[side])[b] + within * tile_size;
      f(Tile{b, first, min(tile_size, of(room.edge[side])[b + 1] - first), within});
    }
  }

  // ---- set-up ------------------------------------------------------------------------------------------------------

  // Whether tau and all scores are finite numbers; else nothing can be said of the order.
  __device__ bool usable() const {
    if (crew.thread() < 4) of(room.flags)[crew.thread()] = -1;
    crew.sync();
    const float* scores = p.scores + image * k;
    const float* start = p.start ? p.start + image * k : nullptr;
    bool good = tau > 0 && tau < INFINITY;
    each([&](int i) { good = good && fabsf(scores[i]) < INFINITY && (!start || fabsf(start[i]) < INFINITY); });
    if (!good) of(room.flags)[2] = 1;
    crew.sync();
    return of(room.flags)[2] < 0;
  }

  // The columns of the scores in descending order, equal ones as they come: a bitonic sort of 64-bit keys.
  __device__ void sort() const {
    uint64_t* keys = reinterpret_cast<uint64_t*>(of(room.potential[0]));
    const float* scores = p.scores + image * k;
    int size = 1;
    while (size < k) size *= 2;
    for (int i = crew.thread(); i < size; i += crew.threads()) {
      uint32_t bits = 0xffffffffu;
      if (i < k) {
        memcpy(&bits, scores + i, 4);
        bits = bits >> 31 ? bits : ~bits & 0x7fffffffu;  // the largest comes first
      }
      keys[i] = uint64_t{bits} << 32 | static_cast<uint32_t>(i);
    }
    crew.sync();
    for (int run = 2; run <= size; run *= 2)
      for (int apart = run / 2; apart; apart /= 2) {
        for (int n = crew.thread(); n < size / 2; n += crew.threads()) {
          const int low = n / apart * 2 * apart + n % apart, high = low + apart;
          const uint64_t a = keys[low], b = keys[high];
          if ((a > b) == !(low & run)) keys[low] = b, keys[high] = a;
        }
        crew.sync();
      }
    each([&](int i) {
      const int column = static_cast<int>(keys[i] & 0xffffffffu);
      of(room.order)[i] = column;
      of(room.c)[i] = static_cast<double>(scores[column]) - 0.5;
    });
    crew.sync();
  }

  // The first index from `from` on whose place is below `value`, descending places; one warp.
  __device__ int first_below(int from, double value) const {
    int end = k;
    for (int width = WARP; from < end; width = (end - from + WARP - 1) / WARP * WARP) {
      const int each = width / WARP, i = from + (lane() + 1) * each - 1;
      const unsigned below = __ballot_sync(ALL_LANES, i >= end || of(room.c)[i] < value);
      const int f = below ? __ffs(below) - 1 : WARP;
      if (f < WARP) end = min(end, from + (f + 1) * each - 1);
      from += f * each;
      if (each == 1 && f < WARP) return from;
    }
    return from;
  }

  // Blocks of both sides, as in cpu/block_matrix.h, and their tiles.
  __device__ void cut() const {
    if (crew.warp() == 0) {
      const double spread = (of(room.c)[k / 10] - of(room.c)[k - 1 - k / 10]) / 0.8;
      const double half = spread > 0 ? ::sqrt(BLOCK_REACH * tau / (2 * spread)) : 0.5;
      const double most = max(1, k / SMALLEST_BLOCK);
      const int rows = static_cast<int>(fmax(1.0, fmin(ceil(0.5 / half - 1e-9), most)));
      for (int b = lane(); b <= rows; b += WARP) of(room.edge[ROWS])[b] = static_cast<int>(int64_t{k} * b / rows);
      const int longest = (k + rows - 1) / rows - 1;
      const double scale = longest == 0 ? 0.5 : longest * step / 2;
      const double width = BLOCK_REACH * tau / scale * (1 - 1e-12);
      int columns = 0;
      for (int j = 0; j < k; ++columns) {
        if (lane() == 0) of(room.edge[COLUMNS])[columns] = j;
        j = first_below(j + 1, of(room.c)[j] - width);
      }
      if (lane() == 0) {
        of(room.edge[COLUMNS])[columns] = k;
        of(room.counts)[ROWS] = rows, of(room.counts)[COLUMNS] = columns, *of(room.scale) = scale;
      }
    }
    crew.sync();
    if (crew.warp() == 0)
      for (int side = 0; side < 2; ++side) {
        const int* edge = of(room.edge[side]);
        int* first = of(room.first_tile[side]);
        const int n = blocks(side);
        const int64_t total = scan(n, [&](int b) { return (edge[b + 1] - edge[b] + tile_size - 1) / tile_size; },
                                   [&](int b, int64_t before, int64_t) { first[b] = static_cast<int>(before); });
        if (lane() == 0) first[n] = of(room.counts)[2 + side] = static_cast<int>(total);
      }
    crew.sync();
    const double scale = *of(room.scale);
    for (int side = 0; side < 2; ++side) {
      for (int b = crew.thread(); b < blocks(side); b += crew.threads())
        for (int n = of(room.first_tile[side])[b]; n < of(room.first_tile[side])[b + 1]; ++n) of(room.tile_block[side])[n] = b;
    }
    crew.sync();
    for (int side = 0; side < 2; ++side) {
      const double unit = side == ROWS ? 1 / scale : scale * slope;
      each_tile(side, [&](const Tile& tile) {
        const double middle = centre(side, tile.block);
        for (int i = tile.first + lane(); i < tile.first + tile.count; i += WARP)
          of(room.number[side])[i] = static_cast<float>((place(side, i) - middle) * unit);
      });
    }
  }

  // Sums of count(b) before each of n blocks to put(b, sum before, count); their total; one warp.
  template <typename Count, typename Put>
  __device__ static int64_t scan(int n, const Count& count, const Put& put) {
    int64_t total = 0;
    for (int b0 = 0; b0 < n; b0 += WARP) {
      const int b = b0 + lane();
      const int64_t own = b < n ? count(b) : 0;
      int64_t sum = own;
#pragma unroll
      for (int by = 1; by < WARP; by *= 2) {
        const int64_t other = __shfl_up_sync(ALL_LANES, sum, by);
        if (lane() >= by) sum += other;
      }
      if (b < n) put(b, total + sum - own, own);
      total += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    return total;
  }

  // The first column potential, of the sorted columns: -c^2 / tau, less that of the smallest |c|, for it is saved in float.
  __device__ double initial(int j, double nearest) const {
    if (p.start) return static_cast<double>(p.start[image * k + of(room.order)[j]]);
    return -(of(room.c)[j] - nearest) * (of(room.c)[j] + nearest) / tau;
  }
  // The smallest |c|, or 0 where its potential is no larger than 1, which no float loses.
  __device__ double nearest() const {
    int from = 0, to = k;  // the first negative c lies between them
    while (from < to) {
      const int middle = (from + to) / 2;
      if (of(room.c)[middle] < 0) to = middle;
      else from = middle + 1;
    }
    const double above = from > 0 ? of(room.c)[from - 1] : INFINITY, below = from < k ? -of(room.c)[from] : INFINITY;
    const double least = above < below ? above : below;
    return least * least > tau ? least : 0;
  }

  // potential_e = - the largest of other(o) + slope place_e place_o over the other side, rounded as it is saved. Where it
  // is moves one way along the side, so it lies between those of elements that are known: 32 times as many at a time.
  template <typename Other>
  __device__ void tops(int side, const Other& other) const {
    int apart = 1;
    while (apart * WARP < k) apart *= WARP;
    for (bool first = true; apart; apart /= WARP, first = false) {
      for (int n = crew.warp(); n * apart < k; n += crew.all_warps()) {
        const int e = n * apart;
        if (!first && n % WARP == 0) continue;  // known
        const int before = n / WARP * WARP * apart, after = before + WARP * apart;
        const int from = first ? 0 : of(room.best)[before], to = first || after >= k ? k - 1 : of(room.best)[after];
        const double own = slope * place(side, e);
        double most = -INFINITY;
        int where = from;
        for (int o = from + lane(); o <= to; o += WARP) {
          const double value = other(o) + own * place(1 - side, o);
          if (value > most) most = value, where = o;
        }
        largest(most, where);
        if (lane() == 0) of(room.best)[e] = where, of(room.potential[side])[e] = static_cast<float>(-most);
      }
      crew.sync();
    }
  }
  // Of all lanes, and where it is: the first such place.
  __device__ static void largest(double& most, int& where) {
#pragma unroll
    for (int offset = WARP / 2; offset; offset /= 2) {
      const double other = __shfl_xor_sync(ALL_LANES, most, offset);
      const int there = __shfl_xor_sync(ALL_LANES, where, offset);
      if (other > most || (other == most && there < where)) most = other, where = there;
    }
  }

  // ---- factors -----------------------------------------------------------------------------------------------------

  // The largest potential + slope place `there` over a block, by bisection, as this is concave. Elements at one place have
  // one potential, so that what lies after all of them is asked.
  __device__ double peak(int side, int b, double there) const {
    const double *potential = of(room.potential[side]), by = slope * there;
    int lo = of(room.edge[side])[b], hi = of(room.edge[side])[b + 1] - 1;
    while (lo < hi) {
      const int middle = (lo + hi) / 2;
      const double here = place(side, middle);
      int next = middle + 1;
      if (place(side, next) == here) {
        int end = hi + 1;  // the first that lies elsewhere
        while (next < end) {
          const int n = (next + end) / 2;
          if (place(side, n) == here) next = n + 1;
          else end = n;
        }
      }
      if (next <= hi && potential[next] + by * place(side, next) > potential[middle] + by * here) lo = next;
      else hi = middle;
    }
    return potential[lo] + by * place(side, lo);
  }
  // Not below any exponent of the pair, and at most twice the last term above the largest.
  __device__ double bound(int row, int column) const {
    const double q = centre(ROWS, row), c = centre(COLUMNS, column);
    return peak(ROWS, row, c) + peak(COLUMNS, column, q) - slope * q * c + slope * half(ROWS, row) * half(COLUMNS, column);
  }
  __device__ bool has_room(int side, int b) const { return of(room.factor_at[side])[b] >= 0; }
  // Intervals of columns enclose the pairs, which those of rows are.
  __device__ bool paired(int side, int block, int other) const {
    return side == ROWS || (of(room.lo[ROWS])[other] <= block && block < of(room.hi[ROWS])[other]);
  }
  // The pairs and their factors, from the potentials.
  __device__ void make() const {
    const double drop = BlockExp<float>::NEGLIGIBLE + ::log(static_cast<double>(k)) + 2 * ::log(BLOCK_SCALING);
    const int rows = blocks(ROWS), columns = blocks(COLUMNS);
    for (int b = crew.thread(); b < columns; b += crew.threads()) of(room.lo[COLUMNS])[b] = rows, of(room.hi[COLUMNS])[b] = 0;
    if (crew.thread() < 2) of(room.counts)[4 + crew.thread()] = 0;
    crew.sync();
    for (int b = crew.warp(); b < rows; b += crew.all_warps()) {
      const double by = slope * centre(ROWS, b);
      double most = -INFINITY;
      int lo = 0;
      for (int o = lane(); o < columns; o += WARP) {
        const int j = (of(room.edge[COLUMNS])[o] + of(room.edge[COLUMNS])[o + 1] - 1) / 2;
        const double value = of(room.potential[COLUMNS])[j] + by * of(room.c)[j];
        if (value > most) most = value, lo = o;
      }
      largest(most, lo);
      int hi = lo + 1, run = WARP;
      while (run == WARP) {
        const int o = lo - 1 - lane();
        run = leading(o >= 0 && bound(b, max(o, 0)) >= -drop);
        lo -= run;
      }
      for (run = WARP; run == WARP; hi += run) {
        const int o = hi + lane();
        run = leading(o < columns && bound(b, min(o, columns - 1)) >= -drop);
      }
      if (lane() == 0) of(room.lo[ROWS])[b] = lo, of(room.hi[ROWS])[b] = hi;
      for (int o = lo + lane(); o < hi; o += WARP) atomicMin(of(room.lo[COLUMNS]) + o, b), atomicMax(of(room.hi[COLUMNS]) + o, b + 1);
    }
    crew.sync();
    if (crew.warp() < 2) place_blocks(crew.warp());
    crew.sync();
    for (int side = 0; side < 2; ++side)
      for (int b = crew.warp(); b < blocks(side); b += crew.all_warps()) list_pairs(side, b);
    crew.sync();
    for (int side = 0; side < 2; ++side)
      each_tile(side, [&](const Tile& tile) { make_factors(side, tile); });
    crew.sync();
  }
  // How many lanes from the first on say yes, without a gap.
  __device__ static int leading(bool yes) {
    const unsigned no = ~__ballot_sync(ALL_LANES, yes);
    return no ? __ffs(no) - 1 : WARP;
  }
  // Where the moments and factors of a side's blocks lie; one warp.
  __device__ void place_blocks(int side) const {
    const auto pairs = [&](int b) -> int64_t { return max(0, of(room.hi[side])[b] - of(room.lo[side])[b]); };
    const auto length = [&](int b) { return of(room.edge[side])[b + 1] - of(room.edge[side])[b]; };
    scan(blocks(side), [&](int b) { return pairs(b) * tiles(side, b); },
         [&](int b, int64_t before, int64_t own) { of(room.slot[side])[b] = before + own <= room.slots ? static_cast<int>(before) : -1; });
    __syncwarp();
    scan(blocks(side), [&](int b) { return pairs(b) * length(b); }, [&](int b, int64_t before, int64_t own) {
      of(room.factor_at[side])[b] = before + own <= room.factor_room && of(room.slot[side])[b] >= 0 ? static_cast<int>(before) : -1;
    });
    // no more than slots, which count every pair at least once; what has no room is behind what has
    scan(blocks(side), pairs, [&](int b, int64_t before, int64_t own) {
      of(room.pair_at[side])[b] = static_cast<int>(before);
      if (has_room(side, b)) atomicMax(of(room.counts) + 4 + side, static_cast<int>(before + own));
    });
  }
  // The pairs of a block, and whether one of them has no room; one warp.
  __device__ void list_pairs(int side, int b) const {
    const int there = 1 - side, lo = of(room.lo[side])[b], hi = of(room.hi[side])[b], at = of(room.pair_at[side])[b];
    const bool room_here = has_room(side, b);
    bool lonely = !room_here;
    for (int o = lo + lane(); o < hi && room_here; o += WARP) {
      const bool pair = paired(side, b, o), stored = pair && has_room(there, o);
      lonely = lonely || (pair && !stored);
      const int from = stored ? of(room.slot[there])[o] + (b - of(room.lo[there])[o]) * tiles(there, o) : -1;
      of(room.pairs[side])[at + o - lo] = {b, o, from, tiles(there, o)};
      if (side == ROWS) of(room.shift)[at + o - lo] = peak(ROWS, b, centre(COLUMNS, o));
    }
    lonely = __any_sync(ALL_LANES, lonely);
    if (lane() == 0) of(room.lonely[side])[b] = lonely;
  }
  __device__ void make_factors(int side, const Tile& tile) const {
    const int b = tile.block, begin = of(room.edge[side])[b], length = of(room.edge[side])[b + 1] - begin;
    if (!has_room(side, b)) return;
    float* to = of(room.factors[side]) + of(room.factor_at[side])[b];
    for (int o = of(room.lo[side])[b]; o < of(room.hi[side])[b]; ++o, to += length) {
      const bool stored = paired(side, b, o) && has_room(1 - side, o);
      const int row = side == ROWS ? b : o, column = side == ROWS ? o : b;
      const double there = centre(1 - side, o), by = slope * there;
      double shift = stored ? of(room.shift)[of(room.pair_at[ROWS])[row] + column - of(room.lo[ROWS])[row]] : 0.0;
      shift = side == ROWS ? -shift : shift - by * centre(COLUMNS, column);
      for (int i = tile.first + lane(); i < tile.first + tile.count; i += WARP) {
        const double exponent = fmax(of(room.potential[side])[i] + by * place(side, i) + shift, -1e4);
        to[i - begin] = stored ? expf(static_cast<float>(exponent)) : 0.0f;
      }
    }
  }

  // The scores in order, and their blocks; false where there is no order.
  __device__ bool begin() const {
    if (!usable()) return false;
    sort();
    cut();
    return true;
  }
};

}  // namespace aha
