// Vectors of 64 bytes whose lanes are added in one fixed order on every machine, and the little the CPU rooms build on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "clones.h"
#include "pages.h"

// 64-byte values are only ever passed to functions that are inlined
#pragma GCC diagnostic ignored "-Wpsabi"

namespace aha {

template <typename T>
struct Lanes {
  static constexpr int64_t N = 64 / sizeof(T);
  typedef T V __attribute__((vector_size(64), may_alias));
};

// Rows of work buffers are padded to whole pairs of vectors, so loops over columns have no tail.
template <typename T>
constexpr int64_t padded(int64_t n) {
  constexpr int64_t PAIR = 2 * Lanes<T>::N;
  return (n + PAIR - 1) / PAIR * PAIR;
}

template <typename T>
AHA_INLINE typename Lanes<T>::V& at(T* p) {
  return *reinterpret_cast<typename Lanes<T>::V*>(p);
}
template <typename T>
AHA_INLINE const typename Lanes<T>::V& at(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::V*>(p);
}

// Half a vector of floats, anywhere.
typedef float Eight __attribute__((vector_size(32), may_alias, aligned(4)));
AHA_INLINE Eight add_halves(Lanes<float>::V v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}

// The upper half of the lanes onto the lower, until one is left.
template <typename T>
AHA_INLINE T sum(typename Lanes<T>::V v) {
  if constexpr (sizeof(T) == 4) {
    const Eight half = add_halves(v), quarter = half + __builtin_shufflevector(half, half, 4, 5, 6, 7, 0, 1, 2, 3);
    const Eight eighth = quarter + __builtin_shufflevector(quarter, quarter, 2, 3, 0, 1, 6, 7, 4, 5);
    return eighth[0] + eighth[1];
  } else {
    for (int64_t w = Lanes<T>::N / 2; w > 0; w /= 2)
      for (int64_t l = 0; l < w; ++l) v[l] += v[l + w];
    return v[0];
  }
}

// exp to 1.2 ulp for x <= 88; below 2^-126 the result is 0.
AHA_INLINE Lanes<float>::V exp(Lanes<float>::V x) {
  typedef int32_t I __attribute__((vector_size(64), may_alias));
  constexpr float LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f, TO_INTEGER = 0x1.8p23f;
  const Lanes<float>::V power = (x * 0x1.715476p+0f + TO_INTEGER) - TO_INTEGER;
  const Lanes<float>::V r = (x - power * LN2_HIGH) - power * LN2_LOW;
  // minimax fit of (exp(r) - 1 - r) / r^2 on |r| <= ln 2 / 2, relative error of exp(r) 3e-9
  Lanes<float>::V p = r * 0x1.6a23dp-10f + 0x1.123a2p-7f;
  p = p * r + 0x1.5558f2p-5f;
  p = p * r + 0x1.555492p-3f;
  p = p * r + 0x1.fffffcp-2f;
  p = p * (r * r) + r + 1.0f;
  const I scale = (__builtin_convertvector(power, I) + 127) << 23;
  const Lanes<float>::V value = p * reinterpret_cast<const Lanes<float>::V&>(scale);
  return x < -87.33654f ? Lanes<float>::V{} : value;
}
AHA_INLINE Lanes<double>::V exp(Lanes<double>::V x) {
  for (int64_t l = 0; l < Lanes<double>::N; ++l) x[l] = std::exp(x[l]);
  return x;
}

// Work memory: aligned to vectors, not initialised.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t n) : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
    prefer_large_pages(data_.get(), n * sizeof(T));
  }
  T* get() const { return data_.get(); }
  operator T*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

template <typename T>
Buffer<T> zeros(int64_t n) {
  Buffer<T> buffer(n);
  std::fill_n(buffer.get(), n, T{0});
  return buffer;
}

// Denormal numbers count as zero while this lives: they slow x86 down a hundredfold and weigh nothing here.
class FlushDenormals {
#if defined(__SSE__)
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
  FlushDenormals(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
#endif
};

// f with a value of the type of the tensor, float or double.
template <typename F>
void with_type(const torch::stable::Tensor& tensor, const char* name, const F& f) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " on the CPU: the input is ",
                  torch::headeronly::toString(type), "; use float32 or float64");
  type == ScalarType::Float ? f(float{}) : f(double{});
}

// f(0) ... f(n - 1), shared out among threads; inside another such loop one after the other.
template <typename F>
void for_each(int64_t n, const F& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals guard;
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace aha
