// One axis of the linear-time ranking: the ranks, or the scores in descending order, cut into padded blocks and tiles.
#pragma once

#include <algorithm>
#include <vector>

#include "block_rows.h"

namespace aha {

// Elements first ... first + count - 1 of the sorted axis lie at begin ... of padded buffers, zeros up to end.
struct Block {
  int64_t first, count, begin, end, tile, tiles;
  double centre, half;  // of its places
};
struct Tile {
  int64_t block, begin, end;  // padded
  int64_t size() const { return end - begin; }
};

template <typename T>
struct Axis {
  static constexpr int64_t TILE = 8192 / sizeof(T) / 4;  // elements whose powers and factors stay in the nearest cache
  static constexpr double NOWHERE = -1e300;              // potential of the padding

  int64_t size = 0;  // with padding
  std::vector<Block> blocks;
  std::vector<Tile> tiles;
  Buffer<double> place, potential;
  // Of each tile, one after the other as they are read: [kept][size of the tile], the powers of its elements' numbers. Of
  // more elements than a cache holds only the first: to make the others takes less time than to load them.
  static constexpr int64_t CACHED = 65536 / sizeof(T);
  int64_t kept = 1;
  Buffer<T> powers;
  Buffer<T> pad;  // 1 at the padding

  // edges: where blocks begin, and the end; number(i) = (place_i - centre) unit
  template <typename Place>
  Axis(const std::vector<int64_t>& edges, const Place& place_of, double unit) {
    constexpr int64_t N = Lanes<T>::N;
    blocks.reserve(edges.size() - 1);
    for (size_t b = 0; b + 1 < edges.size(); ++b) {
      const int64_t first = edges[b], length = edges[b + 1] - first, begin = size;
      size += (length + N - 1) / N * N;
      const double high = place_of(first), low = place_of(first + length - 1);
      const int64_t tile = static_cast<int64_t>(tiles.size());
      for (int64_t at = begin; at < size; at += TILE)
        tiles.push_back({static_cast<int64_t>(b), at, std::min(at + TILE, size)});
      blocks.push_back({first, length, begin, size, tile, static_cast<int64_t>(tiles.size()) - tile, (high + low) / 2,
                        (high - low) / 2});
    }
    place = Buffer<double>(size), potential = Buffer<double>(size);
    kept = size <= CACHED ? TERMS<T> : 1;
    powers = Buffer<T>(kept * size), pad = Buffer<T>(size);
    for (const Block& block : blocks)
      for (int64_t i = block.begin; i < block.end; ++i) {
        const bool real = i - block.begin < block.count;
        place[i] = real ? place_of(block.first + i - block.begin) : 0;
        potential[i] = NOWHERE;
        pad[i] = real ? T{0} : T{1};
      }
    for (const Tile& tile : tiles) {
      const Block& block = blocks[tile.block];
      T* number = powers.get() + kept * tile.begin;
      for (int64_t i = tile.begin; i < tile.end; ++i)
        number[i - tile.begin] = i - block.begin < block.count ? static_cast<T>((place[i] - block.centre) * unit) : T{0};
      if (kept > 1) raise(tile.size(), number);
    }
  }

  // [TERMS][n]: the powers of numbers, from the first row
  static void raise(int64_t n, T* power) {
    for (int m = 1; m < TERMS<T>; ++m)
      for (int64_t i = 0; i < n; ++i) power[m * n + i] = power[(m - 1) * n + i] * power[i];
  }

  // f(padded position, sorted position) of all elements
  template <typename F>
  void each(const F& f) const {
    for (const Block& block : blocks)
      for (int64_t i = 0; i < block.count; ++i) f(block.begin + i, block.first + i);
  }
  template <typename F>
  void each(const Tile& tile, const F& f) const {
    const Block& block = blocks[tile.block];
    for (int64_t i = tile.begin; i < std::min(tile.end, block.begin + block.count); ++i)
      f(i, block.first + i - block.begin);
  }
  void unpack(const T* sorted, T* padded, T padding) const {
    for (const Block& block : blocks) {
      std::copy_n(sorted + block.first, block.count, padded + block.begin);
      std::fill(padded + block.begin + block.count, padded + block.end, padding);
    }
  }
  void pack(const T* padded, T* sorted) const {
    for (const Block& block : blocks) std::copy_n(padded + block.begin, block.count, sorted + block.first);
  }
  void absorb(const T* scaling, double sign) {
    each([&](int64_t i, int64_t) { potential[i] += sign * std::log(static_cast<double>(scaling[i])); });
  }
};

}  // namespace aha
