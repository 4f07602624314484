// Sizes that both kernels share.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// Tokens of a tile: as many as softmax takes side by side, and as the innermost loop keeps in registers.
constexpr int MAX_TILE = 8;

// Columns of a unit: weights lie in units [depth, UNIT], so that what a product reads is one stream from end to end.
constexpr int UNIT = 16;

inline int64_t up(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

}  // namespace
