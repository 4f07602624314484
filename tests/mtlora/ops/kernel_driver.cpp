// Runs the portable kernels on made numbers and prints what comes out, so that two processors can be compared.
// Linked with serving.cpp and elementwise.cpp, natively and by a cross compiler: see test_portable_kernel.py.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" int mtlora_supported(int isa);
extern "C" int mtlora_add_routed(const void* step, const void* table, void* y, const void* x, int64_t y_stride,
                                 int64_t x_stride, int64_t num_tokens);

// The same as in serving.cpp.
struct Adapter {
  int64_t shrink, expand, bias, rank, experts, groups, bias_rows, dtype, hidden, in_units;
};
struct Step {
  const int32_t *tokens, *bias_rows, *tiles;
  int64_t num_planned, num_tiles, num_rows, hidden;
  int32_t isa, dtype, threads;
};

static uint32_t state = 1;
static float next() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state >> 8) - (1 << 23)) / (1 << 24);
}

static void put(float value, float* out) { *out = value; }
static void put(float value, uint16_t* out) {
  uint32_t word;
  memcpy(&word, &value, 4);
  *out = static_cast<uint16_t>(word >> 16);
}
static float get(float value) { return value; }
static float get(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

template <class W>
static std::vector<W> made(int64_t size) {
  std::vector<W> values(size);
  for (W& value : values) put(next(), &value);
  return values;
}

template <class W>
static int routed(int dtype) {
  const int64_t D = 96, rank = 4, N = 4, G = 2, T = 5, columns = rank + G * N, K = N * rank, E = D / G;
  const auto padded = [](int64_t size) { return (size + 15) / 16 * 16; };
  const auto shrink = made<W>(padded(columns) * D), expand = made<W>(G * padded(E) * K), x = made<W>(T * D);
  auto y = made<W>(T * D);
  const auto bias = made<float>(G * N);
  const Adapter adapter = {reinterpret_cast<int64_t>(shrink.data()), reinterpret_cast<int64_t>(expand.data()),
                           reinterpret_cast<int64_t>(bias.data()), rank, N, G, 1, dtype, D, 1};
  const int32_t tokens[] = {0, 1, 2, 3, 4}, bias_rows[] = {0, 0, 0, 0, 0}, tiles[] = {0, 0, 5};
  const Step step = {tokens, bias_rows, tiles, T, 1, 1, D, 1, dtype, 1};
  const int error = mtlora_add_routed(&step, &adapter, y.data(), x.data(), D, D, T);
  for (W value : y) printf("%.6g\n", get(value));
  return error;
}

int main() { return !mtlora_supported(0) || !mtlora_supported(1) || routed<float>(0) || routed<uint16_t>(1); }
