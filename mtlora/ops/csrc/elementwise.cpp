// Operations of a backbone along its rows, each in one pass over its tensors: those of training forward and backward,
// and norm and gate as serving has them.
//
// Computed in float32; threads share the rows. Plain C interface, OpenMP and instruction sets as in serving.cpp.
// Tensors are contiguous and of one dtype (0 float32, 1 bfloat16); RMSNorm's `inverse` is float32.

#ifndef MTLORA_ISA

#include <algorithm>

#include "layout.h"

namespace {

// Mirrors `ElementwiseCall` in mtlora/ops/cpu_elementwise.py: [rows, size] of every tensor but `weight` [size] and
// `inverse` [rows].
struct ElementwiseCall {
  int64_t rows, size;
  float number;  // RMSNorm's epsilon, softmax's scaling
  int32_t dtype, threads, isa;
  const void *first, *second, *third;
  float* inverse;
  void *out, *also_out;
};

}  // namespace

#define MTLORA_SOURCE "elementwise.cpp"
#include "instruction_sets.h"

namespace {

using RowFunction = void (*)(const ElementwiseCall&, int64_t);

void over_rows(const ElementwiseCall& call, RowFunction row) {
#pragma omp parallel for schedule(static) num_threads(call.threads) if (call.threads > 1 && call.rows > 1)
  for (int64_t i = 0; i < call.rows; ++i) row(call, i);
}

// Words of 32 bits are mostly all ones or all zeros: a task's type allows few tokens, or nearly all.
template <class W>
void mask_row(W* row, const uint32_t* bits, int64_t size, W fill) {
  for (int64_t first = 0; first < size; first += 32) {
    const uint32_t word = bits[first / 32];
    if (word == ~0u) continue;
    const int64_t count = size - first < 32 ? size - first : 32;
    if (word == 0)
      std::fill_n(row + first, count, fill);
    else
      for (int64_t i = 0; i < count; ++i)
        if (!(word >> i & 1)) row[first + i] = fill;
  }
}

}  // namespace

#define MTLORA_CHOOSE_ROW(call, name)                                           \
  ((call)->dtype ? MTLORA_CHOOSE(RowFunction, (call)->isa, name<uint16_t>) \
                 : MTLORA_CHOOSE(RowFunction, (call)->isa, name<float>))

extern "C" {

// Version of `ElementwiseCall` and of the functions below: raise it when they change.
int mtlora_elementwise_layout() { return 3; }

// out = weight * x / sqrt(mean x^2 + epsilon), rounded before the weight, as in eager models. first: x, second: weight.
void mtlora_rms_norm(const ElementwiseCall* call) { over_rows(*call, MTLORA_CHOOSE_ROW(call, rms_norm)); }

// out = x's gradient. first: out's gradient, second: weight, third: x.
void mtlora_rms_norm_backward(const ElementwiseCall* call) { over_rows(*call, MTLORA_CHOOSE_ROW(call, rms_norm_backward)); }

// out = silu(gate) * up. first: gate, second: up.
void mtlora_swiglu(const ElementwiseCall* call) { over_rows(*call, MTLORA_CHOOSE_ROW(call, swiglu)); }

// out, also_out = the gradients of gate and up. first: out's gradient, second: gate, third: up.
void mtlora_swiglu_backward(const ElementwiseCall* call) { over_rows(*call, MTLORA_CHOOSE_ROW(call, swiglu_backward)); }

// In place: x = weight * s / sqrt(mean s^2 + epsilon), residual = s, where s = x + residual.
void mtlora_add_rms_norm(void* x, void* residual, const void* weight, int64_t rows, int64_t size, float epsilon,
                         int32_t dtype, int32_t threads, int32_t isa) {
  const ElementwiseCall call = {rows, size, epsilon, dtype, threads, isa, x, weight, residual, nullptr, x, residual};
  over_rows(call, MTLORA_CHOOSE_ROW(&call, add_rms_norm));
}

// out = weight * x / sqrt(mean x^2 + epsilon): `mtlora_rms_norm` without the inverse.
void mtlora_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t size, float epsilon, int32_t dtype,
                 int32_t threads, int32_t isa) {
  const ElementwiseCall call = {rows, size, epsilon, dtype, threads, isa, x, weight, nullptr, nullptr, out, nullptr};
  over_rows(call, MTLORA_CHOOSE_ROW(&call, rms_norm));
}

// out [rows, size] = silu(gate) * up of `in` [rows, 2 * size], whose rows are gate and up side by side.
void mtlora_silu_and_mul(const void* in, void* out, int64_t rows, int64_t size, int32_t dtype, int32_t threads,
                         int32_t isa) {
  const ElementwiseCall call = {rows, size, 0, dtype, threads, isa, in, nullptr, nullptr, nullptr, out, nullptr};
  over_rows(call, MTLORA_CHOOSE_ROW(&call, silu_and_mul));
}

// out = softmax(scaling * scores) up to the diagonal, zeros after it; may overwrite the scores. first: scores; row i is
// a query at position i % size, over `size` keys.
void mtlora_causal_softmax(const ElementwiseCall* call) { over_rows(*call, MTLORA_CHOOSE_ROW(call, causal_softmax)); }

// Row places[i] of logits [.., size] becomes -infinity where bit j of row i of bits [rows, words] is 0, for j < size.
void mtlora_mask(void* logits, const uint32_t* bits, const int64_t* places, int64_t rows, int64_t size, int64_t words,
                 int32_t dtype) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = places[i] * size;
    if (dtype)
      mask_row<uint16_t>(static_cast<uint16_t*>(logits) + at, bits + i * words, size, 0xFF80);
    else
      mask_row<float>(static_cast<float*>(logits) + at, bits + i * words, size, -__builtin_inff());
  }
}

}  // extern "C"

#else  // MTLORA_ISA: the operations for one instruction set

namespace {
namespace MTLORA_ISA {

#include "vectors.h"

// The next `count` elements, at most a vector, with `rest` in the other lanes.
template <class W>
INLINE Floats load_part(const W* from, int64_t count, float rest = 0) {
  if (count >= LANES) return load(from);
  Floats lanes = Floats{} + rest;
  for (int64_t i = 0; i < count; ++i) lanes[i] = widen(from[i]);
  return lanes;
}

template <class W>
INLINE void store_part(Floats values, W* out, int64_t count) {
  if (count >= LANES) return store(values, out);
  W lanes[LANES];
  store(values, lanes);
  for (int64_t i = 0; i < count; ++i) out[i] = lanes[i];
}

// Rounded to W and back.
INLINE Floats rounded(Floats values, const float*) { return values; }
INLINE Floats rounded(Floats values, const uint16_t*) {
  uint16_t lanes[LANES];
  store(values, lanes);
  return load(lanes);
}

INLINE Floats sigmoid(Floats x) {
  const Floats zero = {}, power = exp_negative<Floats, Ints>(x < zero ? x : -x);
  return (x < zero ? power : zero + 1.0f) / (power + 1.0f);
}

template <class W>
static void rms_norm(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size;
  const W* x = static_cast<const W*>(call.first) + row * size;
  const W* weight = static_cast<const W*>(call.second);
  W* out = static_cast<W*>(call.out) + row * size;
  Floats squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats values = load_part(x + i, size - i);
    squares += values * values;
  }
  const float inverse = 1.0f / __builtin_sqrtf(total(squares) / size + call.number);
  if (call.inverse) call.inverse[row] = inverse;
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats normal = rounded(load_part(x + i, size - i) * inverse, x);
    store_part(normal * load_part(weight + i, size - i), out + i, size - i);
  }
}

template <class W>
static void add_rms_norm(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size;
  const W* weight = static_cast<const W*>(call.second);
  W *x = static_cast<W*>(call.out) + row * size, *residual = static_cast<W*>(call.also_out) + row * size;
  const auto sum = [&](int64_t i) { return load_part(x + i, size - i) + load_part(residual + i, size - i); };
  Floats squares = {};
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats values = sum(i);
    squares += values * values;
  }
  const float inverse = 1.0f / __builtin_sqrtf(total(squares) / size + call.number);
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats values = sum(i);
    store_part(values, residual + i, size - i);
    store_part(rounded(values * inverse, x) * load_part(weight + i, size - i), x + i, size - i);
  }
}

template <class W>
static void rms_norm_backward(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size;
  const W* grad = static_cast<const W*>(call.first) + row * size;
  const W* weight = static_cast<const W*>(call.second);
  const W* x = static_cast<const W*>(call.third) + row * size;
  W* out = static_cast<W*>(call.out) + row * size;
  const float inverse = call.inverse[row];
  Floats along = {};
  for (int64_t i = 0; i < size; i += LANES)
    along += load_part(grad + i, size - i) * load_part(weight + i, size - i) * load_part(x + i, size - i);
  const float factor = total(along) / size * inverse * inverse;
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats weighted = load_part(grad + i, size - i) * load_part(weight + i, size - i);
    store_part((weighted - load_part(x + i, size - i) * factor) * inverse, out + i, size - i);
  }
}

template <class W>
INLINE void gate_row(const W* gate, const W* up, W* out, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats g = load_part(gate + i, size - i);
    store_part(g * sigmoid(g) * load_part(up + i, size - i), out + i, size - i);
  }
}

template <class W>
static void swiglu(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size, at = row * size;
  gate_row(static_cast<const W*>(call.first) + at, static_cast<const W*>(call.second) + at,
           static_cast<W*>(call.out) + at, size);
}

template <class W>
static void silu_and_mul(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size;
  const W* gate = static_cast<const W*>(call.first) + 2 * row * size;
  gate_row(gate, gate + size, static_cast<W*>(call.out) + row * size, size);
}

template <class W>
static void swiglu_backward(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size, at = row * size;
  const W* grad = static_cast<const W*>(call.first) + at;
  const W *gate = static_cast<const W*>(call.second) + at, *up = static_cast<const W*>(call.third) + at;
  W *grad_gate = static_cast<W*>(call.out) + at, *grad_up = static_cast<W*>(call.also_out) + at;
  for (int64_t i = 0; i < size; i += LANES) {
    const Floats d = load_part(grad + i, size - i), g = load_part(gate + i, size - i), s = sigmoid(g);
    store_part(d * g * s, grad_up + i, size - i);
    store_part(d * load_part(up + i, size - i) * s * (1.0f + g * (1.0f - s)), grad_gate + i, size - i);
  }
}

template <class W>
static void causal_softmax(const ElementwiseCall& call, int64_t row) {
  const int64_t size = call.size, keys = row % size + 1;
  const W* scores = static_cast<const W*>(call.first) + row * size;
  W* out = static_cast<W*>(call.out) + row * size;
  const Floats zero = {};
  Floats largest = zero - __builtin_inff(), sums = zero;
  for (int64_t i = 0; i < keys; i += LANES) {
    const Floats values = load_part(scores + i, keys - i, -__builtin_inff());
    largest = values > largest ? values : largest;
  }
  float top = largest[0];
  for (int lane = 1; lane < LANES; ++lane) top = largest[lane] > top ? largest[lane] : top;
  // Computed twice, which costs less than storing a row. A NaN makes the sum, and so the row, NaN.
  const auto power = [&](int64_t i) {
    const Floats less = (load_part(scores + i, keys - i, -__builtin_inff()) - top) * call.number;
    return less == less ? exp_negative<Floats, Ints>(less) : less;
  };
  for (int64_t i = 0; i < keys; i += LANES) sums += power(i);
  const float scale = 1.0f / total(sums);
  for (int64_t i = 0; i < keys; i += LANES) store_part(power(i) * scale, out + i, keys - i);
  memset(out + keys, 0, (size - keys) * sizeof(W));
}

#undef INLINE

}  // namespace MTLORA_ISA
}  // namespace

#endif
