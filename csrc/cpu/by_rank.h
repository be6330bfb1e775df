// The left factor of the readout, mostly zero, as a list for every rank.
#pragma once

#include <cstdint>
#include <vector>

namespace aha {

// left (S,K) by rank: which outputs a rank row belongs to and with what weight, zeros omitted.
template <typename T>
struct ByRank {
  struct Entry {
    int64_t s;
    T weight;
  };
  std::vector<Entry> entries;
  std::vector<size_t> first;  // of every rank, and the end

  ByRank(const T* left, int64_t rows, int64_t k) : first{0} {
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t s = 0; s < rows; ++s)
        if (left[s * k + i] != T{0}) entries.push_back({s, left[s * k + i]});
      first.push_back(entries.size());
    }
  }
  template <typename F>
  void of(int64_t rank, const F& f) const {
    for (size_t e = first[rank]; e < first[rank + 1]; ++e) f(entries[e].s, entries[e].weight);
  }
};

}  // namespace aha
