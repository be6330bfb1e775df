// The arithmetic of deletion and insertion, one text for the CPU and CUDA; it needs no header of PyTorch.
//
// m in [0, 1] is the mask at a pixel, x and r are image and reference, already (value - mean) / std:
//   inserted = r + m (x - r),  deleted = x - m (x - r)
// A hard mask chooses instead, so that its outputs are the values of x and r, bit for bit.
#pragma once

#include <cstdint>

#include "aha_math.h"

namespace aha {

template <typename T>
AHA_HD T normalised(T value, T mean, T std) {
  return (value - mean) / std;
}

template <typename T>
struct Blended {
  T deleted, inserted;
};

template <typename T>
AHA_HD Blended<T> blend(T x, T r, T mask) {
  const T shown = mask * (x - r);
  return {x - shown, r + shown};
}

template <typename T>
AHA_HD Blended<T> blend(T x, T r, bool keep) {
  return keep ? Blended<T>{r, x} : Blended<T>{x, r};
}

// The gradients of x and r, from those of both outputs: the transposed blend.
template <typename T>
struct Pulled {
  T image, reference;
};

template <typename T>
AHA_HD Pulled<T> pull(T deleted, T inserted, T mask) {
  const T shown = mask * (inserted - deleted);
  return {deleted + shown, inserted - shown};
}

template <typename T>
AHA_HD Pulled<T> pull(T deleted, T inserted, bool keep) {
  return keep ? Pulled<T>{inserted, deleted} : Pulled<T>{deleted, inserted};
}

// The gradient of the mask at a pixel, from one channel; difference = (x - r) / std.
template <typename T>
AHA_HD T pull_mask(T deleted, T inserted, T difference) {
  return (inserted - deleted) * difference;
}

}  // namespace aha
