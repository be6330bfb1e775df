// The noise-free ranking without its matrix: what its CPU and CUDA rooms agree on.
//
// X_ij = exp(F_i + G_j + 2 c_j q_i / tau), ranks q and sorted scores c cut into blocks with centres q_I and c_J. In one
// pair of blocks
//   2 c_j q_i = 2 c_J q_i + 2 q_I c_j - 2 q_I c_J + 2 (c_j - c_J)(q_i - q_I)
// and with 2 |c - c_J| |q - q_I| <= BLOCK_REACH tau the exponential of the last term is one polynomial in a product of
// a row's and a column's number. So X x costs O(K) per pair: moments of x over the columns, a polynomial in each row.
// The error is relative, per entry, so products with positive vectors inherit it (fast Gauss transform, Greengard and
// Strain 1991, without the truncation that its exponents would need here).
#pragma once

#include <cstdint>

namespace aha {

constexpr double BLOCK_REACH = 0.8;

// The minimax fit, in relative error, of exp on [-BLOCK_REACH, BLOCK_REACH] by TERMS powers; ROOM of them are stored.
// An entry of exp(-NEGLIGIBLE) is below the rounding of 1.
template <typename T>
struct BlockExp;
template <>
struct BlockExp<float> {  // 3.2e-8
  static constexpr int TERMS = 8, ROOM = 16;
  static constexpr double NEGLIGIBLE = 18.4;
  alignas(64) static constexpr float COEFFICIENTS[ROOM] = {0x1p+0f,         0x1.000004p+0f, 0x1.00002ep-1f,  0x1.555426p-3f,
                                               0x1.553c98p-5f,  0x1.114672p-7f, 0x1.74333p-10f,  0x1.98c3bap-13f};
};
template <>
struct BlockExp<double> {  // 6.1e-17
  static constexpr int TERMS = 14, ROOM = 16;
  static constexpr double NEGLIGIBLE = 36.8;
  alignas(64) static constexpr double COEFFICIENTS[ROOM] = {
      0x1p+0,                0x1.ffffffffffffap-1,  0x1.fffffffffff78p-2,  0x1.5555555555991p-3,
      0x1.555555555c6a4p-5,  0x1.11111110dc40cp-7,  0x1.6c16c1635d74bp-10, 0x1.a01a01e5afcbcp-13,
      0x1.a01a0bbe83c53p-16, 0x1.71de0ee2a45b7p-19, 0x1.27df01b6d14bbp-22, 0x1.ae7cc1d46dc01p-26,
      0x1.22678ec1f3783p-29, 0x1.5d64ec4263725p-33};
};

// Scalings beyond [1/64, 64] move into the potentials and the factors are made again, so a pair of blocks may be
// dropped if its entries, scaled by two of them and added up K times, stay below the rounding of the rest.
constexpr double BLOCK_SCALING = 64;

// bits of `absorbed`, which the forward pass saves for each iteration
constexpr int32_t ABSORBED = 1, IN_BLOCKS = 2, IN_NODES = 4, NODE_LEVELS = 8;  // the last: where a number begins

}  // namespace aha
