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

// As in elementwise.cpp.
struct ElementwiseCall {
  int64_t rows, size;
  float number;
  int32_t dtype, threads, isa;
  const void *first, *second, *third;
  float* inverse;
  void *out, *also_out;
};
extern "C" void mtlora_rms_norm(const ElementwiseCall* call);
extern "C" void mtlora_rms_norm_backward(const ElementwiseCall* call);
extern "C" void mtlora_swiglu_backward(const ElementwiseCall* call);
extern "C" void mtlora_causal_softmax(const ElementwiseCall* call);
extern "C" void mtlora_add_rms_norm(void* x, void* residual, const void* weight, int64_t rows, int64_t size,
                                    float epsilon, int32_t dtype, int32_t threads, int32_t isa);
extern "C" void mtlora_silu_and_mul(const void* in, void* out, int64_t rows, int64_t size, int32_t dtype,
                                    int32_t threads, int32_t isa);
extern "C" void mtlora_mask(void* logits, const uint32_t* bits, const int64_t* places, int64_t rows, int64_t size,
                            int64_t words, int32_t dtype);

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
static void print(const std::vector<W>& values) {
  for (W value : values) printf("%.6g\n", get(value));
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
  print(y);
  return error;
}

// Rows end within a vector.
template <class W>
static void elementwise(int dtype) {
  const int64_t rows = 37, size = 37, all = rows * size;
  const auto x = made<W>(all), grad = made<W>(all), weight = made<W>(size), side_by_side = made<W>(2 * all);
  std::vector<W> out(all), also_out(all);
  std::vector<float> inverse(rows);
  ElementwiseCall call = {rows, size, 1e-2f, dtype, 1, 1, x.data(), weight.data(), nullptr, inverse.data(), out.data(),
                          also_out.data()};
  mtlora_rms_norm(&call);
  print(out);
  print(inverse);
  call.first = grad.data();
  call.third = x.data();
  mtlora_rms_norm_backward(&call);
  print(out);
  call.second = side_by_side.data();
  mtlora_swiglu_backward(&call);
  print(out);
  print(also_out);
  call.first = x.data();
  mtlora_causal_softmax(&call);
  print(out);
  auto sum = x, residual = grad;
  mtlora_add_rms_norm(sum.data(), residual.data(), weight.data(), rows, size, 1e-2f, dtype, 1, 1);
  print(sum);
  print(residual);
  mtlora_silu_and_mul(side_by_side.data(), out.data(), rows, size, dtype, 1, 1);
  print(out);
  const uint32_t bits[] = {0x0F0F1234u, 0xFFFFFFFFu};
  const int64_t places[] = {1};
  auto logits = x;
  mtlora_mask(logits.data(), bits, places, 1, size, 2, dtype);
  print(logits);
}

int main() {
  if (!mtlora_supported(0) || !mtlora_supported(1) || routed<float>(0) || routed<uint16_t>(1)) return 1;
  elementwise<float>(0);
  elementwise<uint16_t>(1);
}
