// The linear-time ranking on CUDA: products with X and what a readout adds to them, on the blocks of blocks.cuh.
#pragma once

#include "cuda/blocks.cuh"

namespace aha {

template <bool CLUSTER>
struct BlockSweeps : Blocks<CLUSTER> {
  using Base = Blocks<CLUSTER>;
  using Base::each, Base::each_tile, Base::blocks, Base::tiles, Base::place, Base::centre, Base::has_room, Base::paired;
  using Base::p, Base::crew, Base::room, Base::of, Base::k, Base::slope, Base::step, Base::fit, Base::ROWS, Base::COLUMNS;
  using Base::sums;
  using typename Base::Sums, typename Base::Tile;

  __device__ explicit BlockSweeps(const Base& base) : Base(base) {}

  // Elements of a lane in the stretch that begins at `from`; past the end of the tile, the last one again.
  struct Elements {
    int index[EACH], count;
    __device__ Elements(int from, const Tile& tile) : count(tile.first + tile.count - from) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) index[e] = from + min(WARP * e + lane(), count - 1);
    }
    __device__ bool exists(int e) const { return WARP * e + lane() < count; }
  };
  template <typename F>
  __device__ void each_stretch(const Tile& tile, const F& f) const {
    for (int from = tile.first; from < tile.first + tile.count; from += STRETCH) f(Elements(from, tile));
  }

  // fit_m term(pair, s, m) of all pairs of a side: the coefficients of the polynomials in its numbers.
  template <int SETS, typename Term>
  __device__ void combine(int side, float* to, const Term& term) const {
    const int count = of(room.counts)[4 + side] * BLOCK_TERMS;
    for (int n = crew.thread(); n < count; n += crew.threads()) {
      const BlockPair pair = of(room.pairs[side])[n / BLOCK_TERMS];
      const int m = n % BLOCK_TERMS;  // this lane's
#pragma unroll
      for (int s = 0; s < SETS; ++s)
        to[(n / BLOCK_TERMS * SETS + s) * BLOCK_TERMS + m] = pair.from < 0 ? 0.0f : fit * term(pair, s, m);
    }
    crew.sync();
  }
  // Moment m of the other block for this one, in all its tiles.
  __device__ float moment(const Sums& from, const BlockPair& pair, int set, int m) const {
    const float* values = from.at + pair.from * from.stride + set * MOMENTS + m;
    float sum = 0.0f;
#pragma unroll 4
    for (int n = 0; n < pair.tiles; ++n) sum += values[n * from.stride];
    return sum;
  }
  // The same of rows weighed by q_i - q as well.
  __device__ float ranked_moment(const Sums& from, const BlockPair& pair, int set, int m, double q) const {
    return static_cast<float>(centre(ROWS, pair.other) - q) * moment(from, pair, set, m) +
           static_cast<float>(*of(room.scale)) * moment(from, pair, set, m + 1);
  }
  // The coefficients of the plain product, with the vector whose moments the other side has.
  __device__ void combine(int side) const {
    combine<1>(side, of(room.coefficients), [&](const BlockPair& pair, int, int m) {
      return moment(sums(1 - side), pair, 0, m);
    });
  }

  // From those, of the other side's blocks lo ... hi - 1: out[s] = Σ_pairs a_i Σ_m C_sm y_i^m, which is
  // Σ_o X_io weight(o, s).
  template <int SETS, typename Weight>
  __device__ void products(int side, int block, const Elements& elements, int lo, int hi, const float* coefficients,
                           const Weight& weight, float (&out)[SETS][EACH]) const {
    constexpr int SIZE = SETS * BLOCK_TERMS, TOGETHER = SETS == 1 ? 4 : 1;
    const int begin = of(room.edge[side])[block], length = of(room.edge[side])[block + 1] - begin;
    const int own = of(room.lo[side])[block];
    lo = max(lo, own), hi = min(hi, of(room.hi[side])[block]);
    float y[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) y[e] = of(room.number[side])[elements.index[e]];
#pragma unroll
    for (int s = 0; s < SETS; ++s)
#pragma unroll
      for (int e = 0; e < EACH; ++e) out[s][e] = 0.0f;
    const float* factors = of(room.factors[side]) + of(room.factor_at[side])[block] + (lo - own) * length - begin;
    const float* C = coefficients + (of(room.pair_at[side])[block] + lo - own) * SIZE;
    if (of(room.lonely[side])[block]) {
#pragma unroll 1
      for (int o = lo; o < hi; ++o, factors += length, C += SIZE) {
        if (!paired(side, block, o)) continue;
        if (has_room(side, block) && has_room(1 - side, o)) add_pair(factors, C, elements, y, out);
        else add_entries(side, elements, o, weight, out);
      }
      return;
    }
    for (; lo + TOGETHER <= hi; lo += TOGETHER)
#pragma unroll
      for (int n = 0; n < TOGETHER; ++n, factors += length, C += SIZE) add_pair(factors, C, elements, y, out);
#pragma unroll 1
    for (; lo < hi; ++lo, factors += length, C += SIZE) add_pair(factors, C, elements, y, out);
  }
  template <int SETS, typename Weight>
  __device__ void products(int side, int block, const Elements& elements, const Weight& weight, float (&out)[SETS][EACH]) const {
    products(side, block, elements, 0, blocks(1 - side), of(room.coefficients), weight, out);
  }
  __device__ void product(int side, int block, const Elements& elements, const float* vector, float (&out)[1][EACH]) const {
    products(side, block, elements, [&](int o, int) { return vector[o]; }, out);
  }
  template <int SETS>
  __device__ __forceinline__ static void add_pair(const float* factors, const float* C, const Elements& elements,
                                                  const float (&y)[EACH], float (&out)[SETS][EACH]) {
    float factor[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) factor[e] = factors[elements.index[e]];
#pragma unroll
    for (int s = 0; s < SETS; ++s) {
      const float4 low = load_four(C + s * BLOCK_TERMS), high = load_four(C + s * BLOCK_TERMS + 4);
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        float value = fmaf(high.w, y[e], high.z);
        value = fmaf(value, y[e], high.y), value = fmaf(value, y[e], high.x);
        value = fmaf(value, y[e], low.w), value = fmaf(value, y[e], low.z);
        value = fmaf(value, y[e], low.y), value = fmaf(value, y[e], low.x);
        out[s][e] = fmaf(factor[e], value, out[s][e]);
      }
    }
  }
  // The same for one block of the other side, entry by entry.
  template <int SETS, typename Weight>
  __device__ void add_entries(int side, const Elements& elements, int other, const Weight& weight, float (&out)[SETS][EACH]) const {
    const int there = 1 - side;
#pragma unroll 1
    for (int o = of(room.edge[there])[other]; o < of(room.edge[there])[other + 1]; ++o) {
      const double by = slope * place(there, o), potential = of(room.potential[there])[o];
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const int i = elements.index[e];
        const float x = expf(static_cast<float>(of(room.potential[side])[i] + by * place(side, i) + potential));
#pragma unroll
        for (int s = 0; s < SETS; ++s) out[s][e] = fmaf(x, weight(o, s), out[s][e]);
      }
    }
  }

  // Powers 1 ... COUNT - 1 of the numbers of a lane's elements, and its SETS weights, 0 where there is no element.
  template <int SETS, int COUNT>
  struct Weighed {
    float power[EACH][COUNT - 1], weight[SETS][EACH];
  };
  // The first COUNT moments of SETS vectors weight(i, s) at a tile, for its pairs with lo ... hi - 1.
  template <int SETS, int COUNT, typename Weight>
  __device__ void add_up(int side, const Tile& tile, int lo, int hi, const Sums& to, const Weight& weight) const {
    const int block = tile.block, own = of(room.lo[side])[block], count = tiles(side, block);
    const int begin = of(room.edge[side])[block], length = of(room.edge[side])[block + 1] - begin;
    if (!has_room(side, block)) return;
    lo = max(lo, own), hi = min(hi, of(room.hi[side])[block]);
    const float* factors = of(room.factors[side]) + of(room.factor_at[side])[block] + (lo - own) * length - begin;
    float* values = to.at + (of(room.slot[side])[block] + (lo - own) * count + tile.within) * to.stride;
    const auto load = [&](const Elements& elements) {
      Weighed<SETS, COUNT> found;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const float y = of(room.number[side])[elements.index[e]];
        found.power[e][0] = y;
#pragma unroll
        for (int m = 1; m < COUNT - 1; ++m) found.power[e][m] = found.power[e][m - 1] * y;
#pragma unroll
        for (int s = 0; s < SETS; ++s)
          found.weight[s][e] = elements.exists(e) ? weight(elements.index[e], s) : 0.0f;
      }
      return found;
    };
    const auto some = [&]<int PAIRS>(const auto& add) {
      for (; lo + PAIRS <= hi; lo += PAIRS, factors += PAIRS * length, values += PAIRS * count * to.stride)
        add.template operator()<PAIRS>();
    };
    const auto each_pair = [&](const auto& add) {
      if constexpr (SETS == 1) some.template operator()<4>(add);
      some.template operator()<2>(add);
      some.template operator()<1>(add);
    };
    if (tile.count <= STRETCH) {
      const Elements elements(tile.first, tile);
      const Weighed<SETS, COUNT> weighed = load(elements);
      each_pair([&]<int PAIRS>() {
        float sum[PAIRS * SETS][COUNT] = {};
        add_moments<PAIRS>(factors, length, elements, weighed, sum);
        put_moments<PAIRS, SETS>(sum, values, count * to.stride);
      });
      return;
    }
    each_pair([&]<int PAIRS>() {
      float sum[PAIRS * SETS][COUNT] = {};
      each_stretch(tile, [&](const Elements& elements) { add_moments<PAIRS>(factors, length, elements, load(elements), sum); });
      put_moments<PAIRS, SETS>(sum, values, count * to.stride);
    });
  }
  template <int PAIRS, int SETS, int COUNT>
  __device__ __forceinline__ static void add_moments(const float* factors, int length, const Elements& elements,
                                                     const Weighed<SETS, COUNT>& weighed, float (&sum)[PAIRS * SETS][COUNT]) {
#pragma unroll
    for (int n = 0; n < PAIRS; ++n)
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const float factor = factors[n * length + elements.index[e]];
#pragma unroll
        for (int s = 0; s < SETS; ++s) {
          const float x = factor * weighed.weight[s][e];
          float (&own)[COUNT] = sum[n * SETS + s];
          own[0] += x;
#pragma unroll
          for (int m = 1; m < COUNT; ++m) own[m] = fmaf(x, weighed.power[e][m - 1], own[m]);
        }
      }
  }
  // The sums over the lanes; `apart` from one pair to the next.
  template <int PAIRS, int SETS, int COUNT>
  __device__ __forceinline__ static void put_moments(const float (&sum)[PAIRS * SETS][COUNT], float* values, int apart) {
    constexpr int VECTORS = PAIRS * SETS, ALL = VECTORS * BLOCK_TERMS;
    const auto to = [&](int vector) { return values + vector / SETS * apart + vector % SETS * MOMENTS; };
    float all[ALL], more[VECTORS];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
      for (int m = 0; m < BLOCK_TERMS; ++m) all[v * BLOCK_TERMS + m] = sum[v][m];
      more[v] = sum[v][COUNT - 1];
    }
    // the moments of the vectors side by side, so that they wait for each other's shuffles
    const float total = scattered_sums<ALL>(all);
    if (const int mine = sum_of<ALL>(lane()); lane() < ALL)
      values[mine / (BLOCK_TERMS * SETS) * apart + mine / BLOCK_TERMS % SETS * MOMENTS + mine % BLOCK_TERMS] = total;
    if constexpr (COUNT > BLOCK_TERMS) {
      warp_sums(more);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v)
        if (lane() == v) to(v)[BLOCK_TERMS] = more[v];
    }
  }
  template <int SETS, int COUNT, typename Weight>
  __device__ void add_up(int side, const Tile& tile, const Weight& weight) const {
    add_up<SETS, COUNT>(side, tile, 0, blocks(1 - side), sums(side), weight);
  }

  // ---- reading out by one vector -----------------------------------------------------------------------------------

  // The means over all blocks, as they lie among the ranks, of the vector that reads out.
  __device__ void find_means(const float* alpha) const {
    for (int side = 0; side < 2; ++side)
      for (int b = crew.warp(); b < blocks(side); b += crew.all_warps()) {
        const int from = of(room.edge[side])[b], to = of(room.edge[side])[b + 1];
        double sum = 0;
        for (int i = from + lane(); i < to; i += WARP) sum += alpha[i];
#pragma unroll
        for (int offset = WARP / 2; offset; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
        if (lane() == 0) of(room.block_mean[side])[b] = sum / (to - from);
      }
    crew.sync();
  }
  __device__ void add_up_weighted(const float* alpha, const float* u) const {
    each_tile(ROWS, [&](const Tile& tile) {
      const double middle = of(room.block_mean[ROWS])[tile.block];
      add_up<2, BLOCK_TERMS + 1>(ROWS, tile, [&](int i, int s) {
        return s == 0 ? u[i] : u[i] * static_cast<float>(alpha[i] - middle);
      });
    });
    crew.sync();
  }
  // Its moment, of the vector relative to its mean over the block that asks.
  __device__ float relative(int side, const BlockPair& pair, int m) const {
    const double by = of(room.block_mean[1 - side])[pair.other] - of(room.block_mean[side])[pair.block];
    return moment(sums(1 - side), pair, 1, m) + static_cast<float>(by) * moment(sums(1 - side), pair, 0, m);
  }
  // The mean of q over the ranks that a block of columns has when sorted.
  __device__ double mean_rank(int block) const {
    return 0.5 - step * (of(room.edge[COLUMNS])[block] + 0.5 * (of(room.edge[COLUMNS])[block + 1] - of(room.edge[COLUMNS])[block] - 1));
  }

  // ---- reading out by several --------------------------------------------------------------------------------------

  __device__ float left(int s, int i) const { return s < p.steps ? p.left[static_cast<int64_t>(s) * k + i] : of(room.rest)[i]; }

  // What is left of 1, one more output, so that the weights of a rank sum to 1; and the heaviest output of every rank.
  __device__ void find_rest() const {
    each([&](int i) {
      float rest = 1.0f, most = 0.0f;
      int heaviest = 0;
      for (int s = 0; s < p.steps; ++s) {
        const float weight = left(s, i);
        rest -= weight;
        if (fabsf(weight) > most) most = fabsf(weight), heaviest = s;
      }
      of(room.rest)[i] = fabsf(rest) <= 0x1p-21f ? 0.0f : rest;
      of(room.heaviest)[i] = fabsf(of(room.rest)[i]) > most ? p.steps : heaviest;
    });
    crew.sync();
  }
  // Which blocks of rows each output weighs.
  __device__ void find_blocks(int outputs) const {
    for (int s = crew.warp(); s < outputs; s += crew.all_warps()) {
      int begin = k, end = 0;
      for (int i = lane(); i < k; i += WARP)
        if (left(s, i) != 0.0f) begin = min(begin, i), end = i + 1;
#pragma unroll
      for (int offset = WARP / 2; offset; offset /= 2) {
        begin = min(begin, __shfl_xor_sync(ALL_LANES, begin, offset));
        end = max(end, __shfl_xor_sync(ALL_LANES, end, offset));
      }
      if (lane() == 0) {
        of(room.first_block)[s] = begin < end ? row_block(begin) : 0;
        of(room.end_block)[s] = begin < end ? row_block(end - 1) + 1 : 0;
      }
    }
    crew.sync();
  }
  __device__ int row_block(int i) const {
    int b = static_cast<int>(static_cast<int64_t>(i) * blocks(ROWS) / k);
    while (of(room.edge[ROWS])[b + 1] <= i) ++b;
    while (of(room.edge[ROWS])[b] > i) --b;
    return b;
  }
  __device__ bool weighs(int s, int row_block) const {
    return of(room.first_block)[s] <= row_block && row_block < of(room.end_block)[s];
  }
  __device__ Sums step_sums(int side, int s) const {
    return {of(room.steps[side]) + s % OUTPUTS_AT_ONCE * room.slots * MOMENTS, MOMENTS};
  }
  template <int SETS>
  __device__ float* step_coefficients(int s) const {
    return of(room.step_coefficients) + s % OUTPUTS_AT_ONCE * room.slots * SETS * BLOCK_TERMS;
  }
  // The coefficients fit_m term(s, pair, set, m) of outputs from ... to - 1, of the pairs that they weigh.
  template <int SETS, typename Term>
  __device__ void combine_steps(int side, int from, int to, const Term& term) const {
    const int count = of(room.counts)[4 + side] * BLOCK_TERMS;
    for (int n = crew.thread(); n < count; n += crew.threads()) {
      const BlockPair pair = of(room.pairs[side])[n / BLOCK_TERMS];
      for (int s = from; s < to; ++s) {
        if (!weighs(s, side == ROWS ? pair.block : pair.other)) continue;
        float* C = step_coefficients<SETS>(s) + n / BLOCK_TERMS * SETS * BLOCK_TERMS + n % BLOCK_TERMS;
#pragma unroll
        for (int set = 0; set < SETS; ++set)
          C[set * BLOCK_TERMS] = pair.from < 0 ? 0.0f : fit * term(s, pair, set, n % BLOCK_TERMS);
      }
    }
    crew.sync();
  }
  // f(first output, end) of outputs whose moments are kept together
  template <typename F>
  __device__ void each_group(int outputs, const F& f) const {
    for (int s = 0; s < outputs; s += OUTPUTS_AT_ONCE) f(s, min(s + OUTPUTS_AT_ONCE, outputs));
  }
  // The moments of u W_s.
  __device__ void add_up_steps(int from, int to, const float* u) const {
    each_tile(ROWS, [&](const Tile& tile) {
      for (int s = from; s < to; ++s)
        if (weighs(s, tile.block))
          add_up<1, BLOCK_TERMS + 1>(ROWS, tile, 0, blocks(COLUMNS), step_sums(ROWS, s),
                                     [&](int i, int) { return u[i] * left(s, i); });
    });
    crew.sync();
  }
};

}  // namespace aha
