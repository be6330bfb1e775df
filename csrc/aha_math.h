// What host and device must agree on: random bits, the Gumbel transform, when scalings are absorbed, what is read out.
//
// Every multiply-add is an explicit fma and nothing is left for a compiler to contract, so g++, clang and nvcc
// return the same bits. On an x86 host without FMA instructions the C library supplies fma: slow, still the same.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define AHA_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define AHA_HD inline __attribute__((always_inline))  // joins the caller's target_clones
#else
#define AHA_HD inline
#endif

namespace aha {

// After an iteration whose scalings leave [2^-32, 2^32] they move into the potentials and X is made again: two of
// them, and what one more iteration adds (a factor K at most), then stay far from overflow, and no entry of X that
// could matter, u X v > 2^-38, is below the smallest normal float.
constexpr float LARGE_SCALING = 0x1p32f;

// What is read out of the ranking: P, log P, left P with left (S,K), P right with right (B,K).
enum class Readout { matrix, logarithm, left, right };

struct Words {
  uint32_t w[4];
};

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
AHA_HD Words philox(Words counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.w[0], c1 = counter.w[1], c2 = counter.w[2], c3 = counter.w[3];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(a);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The four words of elements 4 * quad ... 4 * quad + 3 of the stream named by seed.
AHA_HD Words random_words(uint64_t seed, uint64_t quad) {
  const Words counter = {{static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), 0, 0}};
  return philox(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The centre of one of 2^23 equal cells of (0, 1): never 0, never 1, and exact in float.
AHA_HD float uniform(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

// An unevaluated sum; |low| is at most half an ulp of high.
struct Pair {
  float high, low;
};

// log(x.high + x.low) for positive normal x.high: x.high = 2^k (1 + f), |f| <= 1/3, log(1 + f) = f + f^2 P(f).
// f is exact, so the relative error stays small near 1, where a table or a log2 loses it.
AHA_HD Pair log_pair(Pair x) {
  uint32_t bits;
  std::memcpy(&bits, &x.high, 4);
  const int32_t k = static_cast<int32_t>(bits - 0x3f2aaaabu) >> 23;  // 0x3f2aaaab is 2/3
  bits -= static_cast<uint32_t>(k) << 23;
  float f;
  std::memcpy(&f, &bits, 4);
  f -= 1.0f;
  constexpr float LN2_HIGH = 0x1.62e43p-1f, LN2_LOW = -0x1.05c61p-29f;
  float p = 0x1.e9cfbp-4f;  // P is a minimax fit, relative error of log(1 + f) below 2^-30
  p = fmaf(p, f, -0x1.06c2bap-3f);
  p = fmaf(p, f, 0x1.b91f52p-4f);
  p = fmaf(p, f, -0x1.f3b02cp-4f);
  p = fmaf(p, f, 0x1.24eb6cp-3f);
  p = fmaf(p, f, -0x1.55978cp-3f);
  p = fmaf(p, f, 0x1.9997eep-3f);
  p = fmaf(p, f, -0x1.ffff18p-3f);
  p = fmaf(p, f, 0x1.555556p-2f);
  p = fmaf(p, f, -0x1p-1f);
  const float square = f * f, e = static_cast<float>(k);
  const float big = fmaf(e, LN2_HIGH, f);
  // what big lost, then the small terms, then one rounding to a pair
  const float lost = fmaf(e, LN2_HIGH, -big) + f;
  const float small = fmaf(p, square, fmaf(e, LN2_LOW, lost + x.low / x.high));
  const float high = big + small;
  return {high, (big - high) + small};
}

// Standard Gumbel noise -log(-log u), u = uniform(word): within 1.11 ulp of the true value for each of the 2^23 u.
// Around the zero at u = 1/e, -log u is formed as 1 - log(e u): there its distance to 1 is all that counts.
AHA_HD float gumbel(uint32_t word) {
  constexpr float E_HIGH = 0x1.5bf0a8p+1f, E_LOW = 0x1.628aeep-24f;
  const float u = uniform(word);
  const bool near_one = u > 0.60653066f;  // exp(-1/2): closer to 1, -log u itself is the accurate form
  const float scaled = u * E_HIGH;
  const Pair s = log_pair(near_one ? Pair{u, 0.0f} : Pair{scaled, fmaf(u, E_LOW, fmaf(u, E_HIGH, -scaled))});
  const float rest = 1.0f - s.high;
  const Pair exponential = near_one ? Pair{-s.high, -s.low} : Pair{rest, ((1.0f - rest) - s.high) - s.low};
  return -log_pair(exponential).high;
}

}  // namespace aha
