// The kernels of perturb and perturb_by_rank, in plain CUDA: perturb.cu launches them.
//
// A thread works on V neighbouring pixels of one row (16 bytes of the outputs where they are aligned, else one pixel)
// and on STEPS steps, so that it reads taps, images and references once for STEPS outputs. Images and masks come
// through the caches; what counts is the 2 B S C H W values written or read once.
// No atomics: every sum has one order, so results repeat bit for bit.
#pragma once

#include <cstdint>

#include "cuda/device.cuh"
#include "perturb.h"

// AHA_UNROLL for loops over register arrays, AHA_ROLLED for those around them, which would spill if they were unrolled.
// The host's compiler would warn of a pragma it does not know.
#ifdef __CUDA_ARCH__
#define AHA_UNROLL _Pragma("unroll")
#define AHA_ROLLED _Pragma("unroll 1")
#else
#define AHA_UNROLL
#define AHA_ROLLED
#endif

// an array shared by the block, unless an emulation of CUDA has its own
#ifndef AHA_SHARED
#define AHA_SHARED(T, name, count) alignas(16) __shared__ T name[count]
#endif

namespace aha::pixels {

// Blocks per multiprocessor are part of every __launch_bounds__: left to choose, ptxas buys more of them with spills.
constexpr int THREADS = 256;
constexpr int STEPS = 4;
constexpr int TILE = 2048;  // pixels of reduce_columns: STEPS of them in float are 32 KiB of shared memory

// An image plane is indexed in 32 bits, everything above it in 64.
struct PerturbSizes {
  int64_t batch, steps, channels;
  int height, width;

  AHA_HD int pixels() const { return height * width; }
  AHA_HD int64_t groups() const { return (steps + STEPS - 1) / STEPS; }
};

template <typename T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T v[V];
};

template <int V, typename T>
AHA_HD void load(const T* from, float (&to)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(from);
  AHA_UNROLL
  for (int v = 0; v < V; ++v) to[v] = static_cast<float>(pack.v[v]);
}

template <int V, typename T>
AHA_HD void store(const float (&from)[V], T* to) {
  Pack<T, V> pack;
  AHA_UNROLL
  for (int v = 0; v < V; ++v) pack.v[v] = static_cast<T>(from[v]);
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// (B,C,H,W), contiguous but for the batch: its stride is 0 where all images share one reference.
template <typename T>
struct Images {
  const T* data;
  int64_t stride;

  AHA_HD const T* at(int64_t b, int64_t c, const PerturbSizes& size, int pixel) const {
    return data + b * stride + c * size.pixels() + pixel;
  }
};

// One axis of the upsampling: cell, weight (pixels, taps). A cell outside of the grid reads the nearest one.
struct Band {
  const int64_t* cell;
  const float* weight;
  int taps, cells;

  AHA_HD int cell_at(int pixel, int tap) const {
    const int64_t c = cell[static_cast<int64_t>(pixel) * taps + tap];
    return static_cast<int>(c < 0 ? 0 : c < cells ? c : cells - 1);
  }
  AHA_HD float weight_at(int pixel, int tap) const { return weight[static_cast<int64_t>(pixel) * taps + tap]; }
};

// The masks of V pixels in up to STEPS steps.
struct SoftMask {
  using Value = float;
  const float* masks;  // (B, S, rows, cols)
  Band rows, cols;

  template <int V>
  AHA_HD void read(const PerturbSizes& size, int64_t b, int64_t s, int count, int pixel,
                   float (&mask)[STEPS][V]) const {
    const int y = pixel / size.width, x = pixel % size.width;
    const int64_t cells = static_cast<int64_t>(rows.cells) * cols.cells;
    const float* from = masks + (b * size.steps + s) * cells;
    AHA_UNROLL
    for (int g = 0; g < STEPS; ++g)
      AHA_UNROLL
      for (int v = 0; v < V; ++v) mask[g][v] = 0.0f;
    AHA_ROLLED
    for (int i = 0; i < rows.taps; ++i) {
      const float* row = from + static_cast<int64_t>(rows.cell_at(y, i)) * cols.cells;
      const float row_weight = rows.weight_at(y, i);
      AHA_ROLLED
      for (int j = 0; j < cols.taps; ++j)
        AHA_UNROLL
        for (int v = 0; v < V; ++v) {
          const float weight = row_weight * cols.weight_at(x + v, j);
          const float* cell = row + cols.cell_at(x + v, j);
          AHA_UNROLL
          for (int g = 0; g < STEPS; ++g)
            if (g < count) mask[g][v] += weight * cell[g * cells];
        }
    }
  }
};

struct RankMask {
  using Value = bool;
  const int32_t *ranks, *counts;  // (B, H, W), (S,)

  template <int V>
  AHA_HD void read(const PerturbSizes& size, int64_t b, int64_t s, int count, int pixel,
                   bool (&mask)[STEPS][V]) const {
    const Pack<int32_t, V> rank = *reinterpret_cast<const Pack<int32_t, V>*>(ranks + b * size.pixels() + pixel);
    AHA_UNROLL
    for (int g = 0; g < STEPS; ++g) {
      const int32_t limit = g < count ? counts[s + g] : 0;
      AHA_UNROLL
      for (int v = 0; v < V; ++v) mask[g][v] = rank.v[v] < limit;
    }
  }
};

// The work of a block along y and z of the grid: images, and in each their groups of steps, or their channels.
struct Jobs {
  int64_t image, inner;
  const int64_t images, inners;

  __device__ Jobs(int64_t batch, int64_t each) : image(blockIdx.z), inner(blockIdx.y), images(batch), inners(each) {}
  __device__ explicit operator bool() const { return image < images && inner < inners; }
  __device__ void operator++() {
    inner += gridDim.y;
    if (inner < inners) return;
    inner = blockIdx.y;
    image += gridDim.z;
  }
};

// Forward. grid: x over pixels, y over groups of steps, z over images

template <int V, typename Mask, typename In, typename Out>
__global__ void __launch_bounds__(THREADS, 2)
    write_outputs(PerturbSizes size, Mask mask, Images<In> images, Images<In> references,
                  const float* __restrict__ mean, const float* __restrict__ std, Out* __restrict__ deleted,
                  Out* __restrict__ inserted) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (first >= size.pixels()) return;
  const int pixel = static_cast<int>(first);
  AHA_ROLLED
  for (Jobs job(size.batch, size.groups()); job; ++job) {
    const int64_t b = job.image, s = job.inner * STEPS;
    const int count = static_cast<int>(size.steps - s < STEPS ? size.steps - s : STEPS);
    typename Mask::Value m[STEPS][V];
    mask.template read<V>(size, b, s, count, pixel, m);
    AHA_ROLLED
    for (int64_t c = 0; c < size.channels; ++c) {
      float x[V], r[V];
      load<V>(images.at(b, c, size, pixel), x);
      load<V>(references.at(b, c, size, pixel), r);
      const float shift = mean ? mean[c] : 0.0f, scale = std ? std[c] : 1.0f;
      AHA_UNROLL
      for (int v = 0; v < V; ++v) x[v] = normalised(x[v], shift, scale), r[v] = normalised(r[v], shift, scale);
      AHA_UNROLL
      for (int g = 0; g < STEPS; ++g) {
        if (g >= count) break;
        float d[V], i[V];
        AHA_UNROLL
        for (int v = 0; v < V; ++v) {
          const Blended<float> y = blend(x[v], r[v], m[g][v]);
          d[v] = y.deleted, i[v] = y.inserted;
        }
        const int64_t to = ((b * size.steps + s + g) * size.channels + c) * size.pixels() + pixel;
        store<V>(d, deleted + to);
        store<V>(i, inserted + to);
      }
    }
  }
}

// Gradients of images and references: sums over the steps, in their order.
// grid: x over pixels, y over channels, z over images

template <int V, typename Mask, typename Grad, typename Out>
__global__ void __launch_bounds__(THREADS, 2)
    sum_gradients(PerturbSizes size, Mask mask, const Grad* __restrict__ deleted, const Grad* __restrict__ inserted,
                  const float* __restrict__ std, Out* __restrict__ images, Out* __restrict__ references) {
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * V;
  if (first >= size.pixels()) return;
  const int pixel = static_cast<int>(first);
  AHA_ROLLED
  for (Jobs job(size.batch, size.channels); job; ++job) {
    const int64_t b = job.image, c = job.inner, plane = b * size.channels + c;
    float x[V] = {}, r[V] = {};
    AHA_ROLLED
    for (int64_t s = 0; s < size.steps; s += STEPS) {
      const int count = static_cast<int>(size.steps - s < STEPS ? size.steps - s : STEPS);
      typename Mask::Value m[STEPS][V];
      mask.template read<V>(size, b, s, count, pixel, m);
      AHA_UNROLL
      for (int g = 0; g < STEPS; ++g) {
        if (g >= count) break;
        const int64_t from = ((b * size.steps + s + g) * size.channels + c) * size.pixels() + pixel;
        float d[V], i[V];
        load<V>(deleted + from, d);
        load<V>(inserted + from, i);
        AHA_UNROLL
        for (int v = 0; v < V; ++v) {
          const Pulled<float> pulled = pull(d[v], i[v], m[g][v]);
          x[v] += pulled.image, r[v] += pulled.reference;
        }
      }
    }
    const float scale = std ? std[c] : 1.0f;
    AHA_UNROLL
    for (int v = 0; v < V; ++v) x[v] /= scale, r[v] /= scale;
    store<V>(x, images + plane * size.pixels() + pixel);
    store<V>(r, references + plane * size.pixels() + pixel);
  }
}

// Gradient of the masks: ranges, then columns to cells, then rows to cells.

// For every cell of an axis the pixels that read it: from begin to before end, perhaps with others among them.
struct Range {
  int *begin, *end;
};

// a warp for each cell; grid: x over cells, y over the axes
static __global__ void __launch_bounds__(THREADS, 2) find_ranges(Band rows, int height, Range row_range, Band cols,
                                                              int width, Range col_range) {
  const Band band = blockIdx.y ? cols : rows;
  const Range range = blockIdx.y ? col_range : row_range;
  const int pixels = blockIdx.y ? width : height;
  const int cell = static_cast<int>((blockIdx.x * THREADS + threadIdx.x) / WARP), lane = aha::lane();
  if (cell >= band.cells) return;
  int begin = pixels, end = 0;
  for (int pixel = lane; pixel < pixels; pixel += WARP)
    for (int t = 0; t < band.taps; ++t)
      if (band.cell_at(pixel, t) == cell) {
        begin = pixel < begin ? pixel : begin;
        end = pixel + 1;
      }
  for (int step = WARP / 2; step > 0; step /= 2) {
    const int other_begin = __shfl_xor_sync(ALL_LANES, begin, step);
    const int other_end = __shfl_xor_sync(ALL_LANES, end, step);
    begin = other_begin < begin ? other_begin : begin;
    end = other_end > end ? other_end : end;
  }
  if (lane == 0) range.begin[cell] = begin, range.end[cell] = end;
}

// Cuts the image into tiles of at most TILE pixels: rows of the whole width, or strips of rows that are wider.
struct Tiling {
  int rows, width, strips;

  AHA_HD explicit Tiling(const PerturbSizes& size) {
    width = size.width < TILE ? size.width : TILE;
    rows = TILE / width;
    strips = (size.width + width - 1) / width;
  }
  AHA_HD int64_t tiles(const PerturbSizes& size) const {
    return static_cast<int64_t>((size.height + rows - 1) / rows) * strips;
  }
};

// The gradient of the upsampled masks, sum_c (inserted - deleted) (x - r) / std, reduced along each row of pixels:
// partial (B, S, H, strips, cols). The cotangents are read here, once.
// grid: x over tiles, y over groups of steps, z over images
template <int V, typename In, typename Grad>
__global__ void __launch_bounds__(THREADS, 2)
    reduce_columns(PerturbSizes size, Band cols, Range range, Images<In> images, Images<In> references,
                   const float* __restrict__ std, const Grad* __restrict__ deleted,
                   const Grad* __restrict__ inserted, float* __restrict__ partial) {
  AHA_SHARED(float, sums, STEPS * TILE);
  const Tiling tiling(size);
  const int strip = static_cast<int>(blockIdx.x % tiling.strips);
  const int row = static_cast<int>(blockIdx.x / tiling.strips) * tiling.rows, col = strip * tiling.width;
  const int rows = size.height - row < tiling.rows ? size.height - row : tiling.rows;
  const int width = size.width - col < tiling.width ? size.width - col : tiling.width;
  AHA_ROLLED
  for (Jobs job(size.batch, size.groups()); job; ++job) {
    const int64_t b = job.image, s = job.inner * STEPS;
    const int count = static_cast<int>(size.steps - s < STEPS ? size.steps - s : STEPS);
    for (int at = threadIdx.x * V; at < rows * width; at += THREADS * V) {
      const int pixel = (row + at / width) * size.width + col + at % width;
      float sum[STEPS][V] = {};
      AHA_ROLLED
      for (int64_t c = 0; c < size.channels; ++c) {
        float x[V], r[V];
        load<V>(images.at(b, c, size, pixel), x);
        load<V>(references.at(b, c, size, pixel), r);
        const float scale = std ? std[c] : 1.0f;
        AHA_UNROLL
        for (int v = 0; v < V; ++v) x[v] = (x[v] - r[v]) / scale;
        AHA_UNROLL
        for (int g = 0; g < STEPS; ++g) {
          if (g >= count) break;
          const int64_t from = ((b * size.steps + s + g) * size.channels + c) * size.pixels() + pixel;
          float d[V], i[V];
          load<V>(deleted + from, d);
          load<V>(inserted + from, i);
          AHA_UNROLL
          for (int v = 0; v < V; ++v) sum[g][v] += pull_mask(d[v], i[v], x[v]);
        }
      }
      AHA_UNROLL
      for (int g = 0; g < STEPS; ++g) store<V>(sum[g], sums + g * TILE + at);
    }
    __syncthreads();
    for (int node = threadIdx.x; node < rows * cols.cells; node += THREADS) {
      const int y = node / cols.cells, cell = node % cols.cells;
      const int begin = range.begin[cell] > col ? range.begin[cell] : col;
      const int end = range.end[cell] < col + width ? range.end[cell] : col + width;
      float total[STEPS] = {};
      for (int x = begin; x < end; ++x)
        for (int t = 0; t < cols.taps; ++t) {
          if (cols.cell_at(x, t) != cell) continue;
          const float weight = cols.weight_at(x, t);
          AHA_UNROLL
          for (int g = 0; g < STEPS; ++g) total[g] += weight * sums[g * TILE + y * width + x - col];
        }
      AHA_UNROLL
      for (int g = 0; g < STEPS; ++g)
        if (g < count)
          partial[(((b * size.steps + s + g) * size.height + row + y) * tiling.strips + strip) * cols.cells + cell] =
              total[g];
    }
    __syncthreads();
  }
}

// grad_masks (B, S, rows, cols), a thread for each value: the partial sums of the pixel rows that read its cell.
static __global__ void __launch_bounds__(THREADS, 2)
    reduce_rows(PerturbSizes size, Band rows, Range range, int cols, const float* __restrict__ partial,
                float* __restrict__ grad_masks) {
  const int64_t cells = static_cast<int64_t>(rows.cells) * cols, total = size.batch * size.steps * cells;
  const int strips = Tiling(size).strips;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; at < total;
       at += static_cast<int64_t>(gridDim.x) * THREADS) {
    const int row = static_cast<int>(at % cells / cols), col = static_cast<int>(at % cols);
    const float* from = partial + at / cells * size.height * strips * cols + col;
    float sum = 0.0f;
    for (int y = range.begin[row]; y < range.end[row]; ++y)
      for (int t = 0; t < rows.taps; ++t) {
        if (rows.cell_at(y, t) != row) continue;
        for (int strip = 0; strip < strips; ++strip)
          sum += rows.weight_at(y, t) * from[(static_cast<int64_t>(y) * strips + strip) * cols];
      }
    grad_masks[at] = sum;
  }
}

}  // namespace aha::pixels
