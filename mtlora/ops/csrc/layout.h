// Sizes shared by the kernels.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// Tokens of a tile: as many as softmax processes side by side, and as the inner loop keeps in registers.
constexpr int MAX_TILE = 8;

// Columns of a unit: weights are stored in units [depth, UNIT], so that a product reads one continuous stream.
constexpr int UNIT = 16;

inline int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

}  // namespace
