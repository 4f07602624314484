// The routed low-rank path of a whole step in one pass, for any mix of adapters: the fast half of mtlora/ops/cpu.py.
//
// A tile is a few tokens of one adapter. One thread takes it from x to y: s = x [A; R], softmax over experts,
// z_j = Pi_j (x) h, y_j += z_j Bcat_j. Nothing between leaves the core's caches and no thread waits for another, so that
// a decode step costs about the reading of its adapters' weights. Everything accumulates in float32.
//
// Plain C interface, loaded with ctypes: it depends on no version of torch or Python. It is compiled with -fopenmp but
// not linked to any OpenMP: torch has loaded one, whose threads (and their binding) are thus the only ones.
//
// This file includes itself once an instruction set; which one runs is chosen when it is loaded.

#ifndef MTLORA_ISA

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

// One adapter in the table of a block; mirrors `Field` in mtlora/ops/table.py.
struct Adapter {
  int64_t shrink;  // [D, S]
  int64_t expand;  // [G, K, E]
  int64_t bias;    // float32 [bias_rows, G, N], or 0
  int64_t rank;    // 0: the slot has no path here
  int64_t experts;
  int64_t groups;
  int64_t bias_rows;
  int64_t dtype;
  int64_t hidden;
};

struct Tile {
  int32_t slot, start, count;
};

struct Call {
  void* y;
  const void* x;
  int64_t y_stride, x_stride, hidden;
  const Adapter* table;
  const int32_t* tokens;
  const int32_t* bias_rows;
};

constexpr int MAX_TILE = 8;
constexpr int MAX_LANES = 16;

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MTLORA_X86 1
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define MTLORA_ISA avx512bf16
#define MTLORA_VECTOR_BYTES 64
#define MTLORA_WIDE 3
#define MTLORA_DOT_BF16
#include "_cpu_kernel.cpp"
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#undef MTLORA_WIDE
#undef MTLORA_DOT_BF16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define MTLORA_ISA avx512
#define MTLORA_VECTOR_BYTES 64
#define MTLORA_WIDE 3
#include "_cpu_kernel.cpp"
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#undef MTLORA_WIDE
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MTLORA_ISA avx2
#define MTLORA_VECTOR_BYTES 32
#define MTLORA_WIDE 1
#include "_cpu_kernel.cpp"
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#undef MTLORA_WIDE
#pragma GCC pop_options
#endif

namespace {

using TileFunction = void (*)(const Call&, const Tile&, float*);

// dtype: 0 float32, 1 bfloat16. Null where the processor has no instruction set this was written for.
TileFunction choose(int dtype, int isa) {
#ifdef MTLORA_X86
  __builtin_cpu_init();
  const bool has512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_dot = has512 && has2 && __builtin_cpu_supports("avx512bf16");
  if (has_dot && (isa == 0 || isa == 516)) return dtype ? avx512bf16::tile<uint16_t> : avx512bf16::tile<float>;
  if (has512 && has2 && (isa == 0 || isa == 512)) return dtype ? avx512::tile<uint16_t> : avx512::tile<float>;
  if (has2 && (isa == 0 || isa == 2)) return dtype ? avx2::tile<uint16_t> : avx2::tile<float>;
#endif
  (void)dtype;
  (void)isa;
  return nullptr;
}

}  // namespace

extern "C" {

// 1 where this processor can run the kernel. isa: 0 for the best it has, else one alone: 2 AVX2, 512 AVX-512, 516 AVX-512 with
// its products of bfloat16.
int mtlora_supported(int isa) { return choose(1, isa) != nullptr; }

int mtlora_max_tile() { return MAX_TILE; }

// y += path(x) for every tile. x and y: [num_tokens, hidden] with strides of a row. Returns 0, or what is wrong with the
// call (y is untouched then): 1 no memory, 2 a slot out of range, 3 a tile or token out of range, 4 an adapter of another
// dtype or hidden size, 5 a bias row out of range.
int mtlora_add_routed(int isa, int dtype, void* y, const void* x, int64_t y_stride, int64_t x_stride,
                      int64_t num_tokens, int64_t hidden, const void* table, int64_t num_slots, const int32_t* tokens,
                      const int32_t* bias_rows, int64_t num_planned, const int32_t* tiles, int64_t num_tiles,
                      int threads) {
  const Call call{y, x, y_stride, x_stride, hidden, static_cast<const Adapter*>(table), tokens, bias_rows};
  const Tile* all = reinterpret_cast<const Tile*>(tiles);
  int64_t share = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const Tile& tile = all[i];
    if (tile.slot < 0 || tile.slot >= num_slots) return 2;
    if (tile.count < 0 || tile.count > MAX_TILE || tile.start < 0 || tile.start + tile.count > num_planned) return 3;
    const Adapter& adapter = call.table[tile.slot];
    if (adapter.rank == 0) continue;
    if (adapter.dtype != dtype || adapter.hidden != hidden) return 4;
    for (int t = tile.start; t < tile.start + tile.count; ++t) {
      if (tokens[t] < 0 || tokens[t] >= num_tokens) return 3;
      if (adapter.bias && bias_rows[t] >= adapter.bias_rows) return 5;
    }
    const int64_t width = hidden + adapter.rank + adapter.groups * adapter.experts + MAX_LANES +
                          adapter.experts * adapter.rank + hidden / adapter.groups;
    share = width > share ? width : share;
  }
  if (share == 0) return 0;
  share = (MAX_TILE * share + MAX_LANES - 1) / MAX_LANES * MAX_LANES;
  if (threads > num_tiles) threads = static_cast<int>(num_tiles);
  float* scratch = static_cast<float*>(aligned_alloc(64, share * threads * sizeof(float)));
  if (scratch == nullptr) return 1;
  const TileFunction run = choose(dtype, isa);
  int next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int mine;
#pragma omp atomic capture
    mine = next++;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < num_tiles; ++i) run(call, all[i], scratch + mine * share);
  }
  free(scratch);
  return 0;
}

}  // extern "C"

#else  // MTLORA_ISA: the kernel for one instruction set

namespace {
namespace MTLORA_ISA {

#define INLINE static inline __attribute__((always_inline))

constexpr int LANES = MTLORA_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(MTLORA_VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(MTLORA_VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(MTLORA_VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(MTLORA_VECTOR_BYTES / 2), aligned(2), may_alias));

INLINE float widen(float value) { return value; }
INLINE float widen(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}

// What a product takes on its left for weights of a type.
template <class W> struct OperandOf { typedef float type; };
#ifdef MTLORA_DOT_BF16
template <> struct OperandOf<uint16_t> { typedef uint16_t type; };
#endif

// Round to nearest even; a NaN stays one.
INLINE void narrow(float value, float* out) { *out = value; }
INLINE void narrow(float value, uint16_t* out) {
  uint32_t word;
  memcpy(&word, &value, 4);
  *out = value != value ? 0x7FC0 : static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

INLINE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
INLINE Floats load(const uint16_t* from) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
  return reinterpret_cast<Floats>(words);
}

// exp(x) for x <= 0, to float32's precision: 2^n times the series of the rest of x / ln 2.
INLINE Floats exp_negative(Floats x) {
  const Floats zero = {};
  x = x > zero - 87.0f ? x : zero - 87.0f;
  const Ints n = __builtin_convertvector(x * 1.44269504f - 0.5f, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = zero + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * reinterpret_cast<Floats>((n + 127) << 23);
}

template <int T, int V>
INLINE void store(const Floats (&sum)[T][V], float* out, int64_t out_stride) {
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) *reinterpret_cast<Floats*>(out + t * out_stride + v * LANES) = sum[t][v];
  }
}

// out[t, 0:V*LANES] = sum_k a[t, k] w[k, 0:V*LANES]; the accumulators live in registers.
template <int T, int V, class W, class A>
INLINE void panel(const A* a, int64_t a_stride, const W* w, int64_t w_stride, int64_t depth, float* out,
                  int64_t out_stride) {
  Floats sum[T][V] = {};
  for (int64_t k = 0; k < depth; ++k, w += w_stride) {
    Floats row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(w + v * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[t][v] += row[v] * a[t * a_stride + k];
    }
  }
  store(sum, out, out_stride);
}

#ifdef MTLORA_DOT_BF16
// The same in bfloat16: two rows of w at a time, shuffled so that each lane has its column's pair.
template <int T, int V>
INLINE void panel(const uint16_t* a, int64_t a_stride, const uint16_t* w, int64_t w_stride, int64_t depth, float* out,
                  int64_t out_stride) {
  Floats sum[T][V] = {};
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int64_t k = 0; k < depth; k += 2, w += 2 * w_stride) {
    const bool last = k + 1 == depth;
    __m512i row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + v * LANES));
      const __m256i second = last ? _mm256_setzero_si256()
                                  : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + w_stride + v * LANES));
      row[v] = _mm512_permutexvar_epi16(pairs, _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      uint32_t pair = a[t * a_stride + k];
      if (!last) memcpy(&pair, a + t * a_stride + k, 4);
      const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        sum[t][v] = reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[t][v]),
                                                              reinterpret_cast<__m512bh>(row[v]),
                                                              reinterpret_cast<__m512bh>(both)));
    }
  }
  store(sum, out, out_stride);
}
#endif

// out [T, width] = a [T, depth] w [depth, width].
template <int T, class W, class A>
static __attribute__((noinline)) void product(const A* a, int64_t a_stride, const W* w, int64_t width,
                                              int64_t depth, float* out, int64_t out_stride) {
  int64_t n = 0;
  for (; n + MTLORA_WIDE * LANES <= width; n += MTLORA_WIDE * LANES)
    panel<T, MTLORA_WIDE>(a, a_stride, w + n, width, depth, out + n, out_stride);
  for (; n + LANES <= width; n += LANES) panel<T, 1>(a, a_stride, w + n, width, depth, out + n, out_stride);
  if (n == width) return;
  if (width >= LANES) {  // the last columns, along with some that are done already
    n = width - LANES;
    panel<T, 1>(a, a_stride, w + n, width, depth, out + n, out_stride);
    return;
  }
  for (int t = 0; t < T; ++t) {
    float* sum = out + t * out_stride;
    for (int64_t i = 0; i < width; ++i) sum[i] = 0;
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t i = 0; i < width; ++i) sum[i] += widen(a[t * a_stride + k]) * widen(w[k * width + i]);
  }
}

template <class W, class A>
INLINE void product(int count, const A* a, int64_t a_stride, const W* w, int64_t width, int64_t depth, float* out,
                    int64_t out_stride) {
  switch (count) {
    case 1: return product<1>(a, a_stride, w, width, depth, out, out_stride);
    case 2: return product<2>(a, a_stride, w, width, depth, out, out_stride);
    case 3: return product<3>(a, a_stride, w, width, depth, out, out_stride);
    case 4: return product<4>(a, a_stride, w, width, depth, out, out_stride);
    case 5: return product<5>(a, a_stride, w, width, depth, out, out_stride);
    case 6: return product<6>(a, a_stride, w, width, depth, out, out_stride);
    case 7: return product<7>(a, a_stride, w, width, depth, out, out_stride);
    default: return product<8>(a, a_stride, w, width, depth, out, out_stride);
  }
}

// Softmax over the experts of every group, in place; `logits` has room for a vector more than G*N.
INLINE void route(float* logits, int64_t groups, int64_t experts) {
  const int64_t size = groups * experts;
  for (int64_t j = 0; j < groups; ++j) {
    float* group = logits + j * experts;
    float largest = group[0];
    for (int64_t i = 1; i < experts; ++i) largest = group[i] > largest ? group[i] : largest;
    for (int64_t i = 0; i < experts; ++i) group[i] -= largest;
  }
  for (int64_t i = 0; i < size; i += LANES)
    *reinterpret_cast<Floats*>(logits + i) = exp_negative(load(logits + i));
  for (int64_t j = 0; j < groups; ++j) {
    float* group = logits + j * experts;
    float sum = 0;
    for (int64_t i = 0; i < experts; ++i) sum += group[i];
    for (int64_t i = 0; i < experts; ++i) group[i] /= sum;
  }
}

// Ask for weights that are needed next, while there are others to work on: their rows are too far apart for the
// processor to guess.
template <class W>
INLINE void prefetch(const W* weights, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(W)) __builtin_prefetch(weights + i, 0, 2);
}

template <class W>
static void tile(const Call& call, const Tile& tile, float* scratch) {
  const Adapter& adapter = call.table[tile.slot];
  const int64_t r = adapter.rank, N = adapter.experts, G = adapter.groups, D = call.hidden;
  if (r == 0 || tile.count == 0) return;
  const int64_t S = r + G * N, K = N * r, E = D / G;
  const int T = tile.count;
  const int32_t* tokens = call.tokens + tile.start;
  typedef typename OperandOf<W>::type Operand;
  float* s = scratch;
  float* delta = s + MAX_TILE * (S + LANES);
  Operand* x = reinterpret_cast<Operand*>(delta + MAX_TILE * E);
  Operand* z = x + MAX_TILE * D;

  for (int t = 0; t < T; ++t) {
    const W* from = static_cast<const W*>(call.x) + tokens[t] * call.x_stride;
    for (int64_t d = 0; d < D; ++d) narrow(widen(from[d]), x + t * D + d);
  }
  const W* expand = reinterpret_cast<const W*>(adapter.expand);
  prefetch(expand, K * E);
  product(T, x, D, reinterpret_cast<const W*>(adapter.shrink), S, D, s, S + LANES);
  for (int t = 0; t < T; ++t) {
    float* logits = s + t * (S + LANES) + r;
    if (adapter.bias && call.bias_rows[tile.start + t] >= 0) {
      const float* bias = reinterpret_cast<const float*>(adapter.bias) + call.bias_rows[tile.start + t] * G * N;
      for (int64_t i = 0; i < G * N; ++i) logits[i] += bias[i];
    }
    for (int64_t i = G * N; i < G * N + LANES; ++i) logits[i] = 0;
    route(logits, G, N);
  }
  for (int64_t j = 0; j < G; ++j) {
    if (j + 1 < G) prefetch(expand + (j + 1) * K * E, K * E);
    for (int t = 0; t < T; ++t) {
      const float* h = s + t * (S + LANES);
      const float* weights = h + r + j * N;
      for (int64_t i = 0; i < N; ++i)
        for (int64_t k = 0; k < r; ++k) narrow(weights[i] * h[k], z + t * K + i * r + k);
    }
    product(T, z, K, expand + j * K * E, E, K, delta, E);
    for (int t = 0; t < T; ++t) {
      W* to = static_cast<W*>(call.y) + tokens[t] * call.y_stride + j * E;
      for (int64_t e = 0; e < E; ++e) narrow(widen(to[e]) + delta[t * E + e], to + e);
    }
  }
}

#undef INLINE

}  // namespace MTLORA_ISA
}  // namespace

#endif
