// The routed low-rank path of one adapter and its gradients, in float32: the fast half of mtlora/ops/training.py.
//
// Each thread takes a range of tokens, one chunk at a time: forward from x to delta, backward from delta's gradient to
// x's. Intermediate values (s, z, their gradients) are one chunk long and stay in the core's caches; x and delta are
// read and written once, in the backbone's dtype. Each thread sums its weights' gradients; then threads are summed in
// their order, so the same number of threads gives the same bits.
//
// Plain C interface, OpenMP and instruction sets as in serving.cpp.
//
// c tokens of a chunk, D hidden size, r rank, N experts, G groups, E = D/G, K = N*r, S = r + G*N.

#ifndef MTLORA_ISA

#include "layout.h"

namespace {

// Mirrors `TrainingCall` in mtlora/ops/cpu_training.py. Tensors are contiguous; those of the input's dtype are void.
struct TrainingCall {
  int64_t tokens, hidden, rank, experts, groups;
  float scaling;
  int32_t dtype;  // 0 float32, 1 bfloat16
  int32_t threads, isa;
  const void* x;          // [T, D]
  const void* dropped;    // [T, D] or null: what A sees in x's place
  const float* lora_A;    // [r, D]
  const float* lora_B;    // [N, D, r]
  const float* route;     // [G*N, D]
  const float* bias;      // [T, G*N] or null
  float* weights;         // [T, G*N], written forward, read backward
  float* h;               // [T, r], likewise
  void* delta;            // [T, D]
  const void* grad_delta;       // [T, D]
  const float* grad_weights;    // [T, G*N] or null
  void* grad_x;                 // [T, D] or null
  void* grad_dropped;           // [T, D]; null where dropped is, or not wanted
  float* grad_A;                // [r, D]
  float* grad_B;                // [N, D, r]
  float* grad_route;            // [G*N, D]
  float* grad_logits;           // [T, G*N] or null: the bias' gradient
};

// Tokens of a chunk.
constexpr int64_t CHUNK = 32;

// Sizes rounded up to whole units and tiles. S: A's columns, then the router's, each in whole units.
struct Sizes {
  int64_t T, D, r, N, G, E, K, C;
  int64_t rank_units, route_units, s, d, e, k;  // strides of a row, in floats

  explicit Sizes(const TrainingCall& call)
      : T(call.tokens), D(call.hidden), r(call.rank), N(call.experts), G(call.groups), E(D / G), K(N * r), C(G * N),
        rank_units(up(r, UNIT) / UNIT), route_units(up(C, UNIT) / UNIT), s((rank_units + route_units) * UNIT),
        d(up(D, UNIT) + UNIT), e(up(E, UNIT)), k(up(K, UNIT)) {}
  // Packed weights, shared by the threads.
  int64_t shrink() const { return s * D; }           // units of [D, s]
  int64_t expand() const { return G * e * K; }       // a group's units of [K, E]
  int64_t widen() const { return up(D, UNIT) * s; }  // units of [s, D]: A's rows, then the router's
  int64_t contract() const { return G * k * E; }     // a group's units of [E, K]
  // Each thread's own memory.
  int64_t forward_scratch() const { return up(CHUNK * (d + s + k + e) + MAX_TILE * C, UNIT); }
  int64_t sums() const { return G * k * e + s * up(D, UNIT); }
  int64_t backward_scratch() const { return up(sums() + CHUNK * (4 * d + 2 * s + 2 * k + r + C), UNIT); }
};

}  // namespace

#define MTLORA_SOURCE "training.cpp"
#include "instruction_sets.h"

namespace {

using Run = void (*)(const TrainingCall&, float*);

Run choose_run(bool forward, int dtype, int isa) {
  if (forward) return dtype ? MTLORA_CHOOSE(Run, isa, forward<uint16_t>) : MTLORA_CHOOSE(Run, isa, forward<float>);
  return dtype ? MTLORA_CHOOSE(Run, isa, backward<uint16_t>) : MTLORA_CHOOSE(Run, isa, backward<float>);
}

// Returns 0, or 1 if there is no memory, with nothing written.
int run(const TrainingCall& call, bool forward) {
  const Sizes sizes(call);
  const int64_t floats = forward ? sizes.shrink() + sizes.expand() + call.threads * sizes.forward_scratch()
                                 : sizes.widen() + sizes.contract() + call.threads * sizes.backward_scratch();
  float* memory = static_cast<float*>(aligned_alloc(64, up(floats * sizeof(float), 64)));
  if (memory == nullptr) return 1;
  choose_run(forward, call.dtype, call.isa)(call, memory);
  free(memory);
  return 0;
}

}  // namespace

extern "C" {

// Version of `TrainingCall`: raise it when that changes.
int mtlora_training_layout() { return 1; }

int mtlora_training_forward(const TrainingCall* call) { return run(*call, true); }

int mtlora_training_backward(const TrainingCall* call) { return run(*call, false); }

}  // extern "C"

#else  // MTLORA_ISA: the kernel for one instruction set

namespace {
namespace MTLORA_ISA {

#include "vectors.h"

// Rows and vectors of columns of a product at a time: accumulators, a row of weights and a factor fill the registers.
constexpr int ROWS = LANES == 16 ? 8 : 4;
constexpr int VECTORS = 3;
constexpr int PER_UNIT = UNIT / LANES;

// A right-hand side: rows `row` floats apart, units of columns `unit` floats apart.
struct Columns {
  const float* data;
  int64_t row, unit;
};

template <int V, bool ADD>
INLINE void panel(const float* a, int64_t a_stride, const Columns& w, int first, int64_t depth, float* out,
                  int64_t out_stride) {
  Floats sum[ROWS][V];
#pragma GCC unroll 8
  for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[t][v] = ADD ? load(out + t * out_stride + (first + v) * LANES) : Floats{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      row[v] = load(w.data + k * w.row + (first + v) / PER_UNIT * w.unit + (first + v) % PER_UNIT * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[t][v] += row[v] * a[t * a_stride + k];
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < ROWS; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sum[t][v], out + t * out_stride + (first + v) * LANES);
  }
}

template <int V, bool ADD>
INLINE void column_of_panels(const float* a, int64_t a_stride, int64_t rows, const Columns& w, int first, int64_t depth,
                             float* out, int64_t out_stride) {
  for (int64_t t = 0; t < rows; t += ROWS)
    panel<V, ADD>(a + t * a_stride, a_stride, w, first, depth, out + t * out_stride, out_stride);
}

// out [rows, units] = (or, with ADD, +=) a [rows, depth] w. Rows are computed in whole tiles.
template <bool ADD>
static __attribute__((noinline)) void product(const float* a, int64_t a_stride, int64_t rows, Columns w, int64_t units,
                                              int64_t depth, float* out, int64_t out_stride) {
  const int end = static_cast<int>(units) * PER_UNIT;
  int v = 0;
  for (; v + VECTORS <= end; v += VECTORS) column_of_panels<VECTORS, ADD>(a, a_stride, rows, w, v, depth, out, out_stride);
  if (v + 2 <= end) {
    column_of_panels<2, ADD>(a, a_stride, rows, w, v, depth, out, out_stride);
    v += 2;
  }
  if (v < end) column_of_panels<1, ADD>(a, a_stride, rows, w, v, depth, out, out_stride);
}

// Rows [start, start + count) of x [T, size] as float32, `stride` apart, zeros behind each and in the chunk's other rows.
template <class W>
INLINE void widen_rows(const void* x, int64_t start, int64_t count, int64_t size, float* out, int64_t stride) {
  const W* from = static_cast<const W*>(x) + start * size;
  for (int64_t t = 0; t < count; ++t, from += size, out += stride) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(load(from + i), out + i);
    for (; i < size; ++i) out[i] = widen(from[i]);
    for (; i < stride; ++i) out[i] = 0;
  }
  memset(out, 0, (CHUNK - count) * stride * sizeof(float));
}

template <class W>
INLINE void narrow_row(const float* from, int64_t size, W* out) {
  scale_into(from, 1.0f, out, size);
}

template <class W>
INLINE void narrow_rows(const float* from, int64_t stride, int64_t start, int64_t count, int64_t size, void* out) {
  for (int64_t t = 0; t < count; ++t) narrow_row(from + t * stride, size, static_cast<W*>(out) + (start + t) * size);
}

// in [count, columns] times a factor as [columns, CHUNK], with zeros from `count` on.
INLINE void transpose(const float* in, int64_t columns, int64_t count, float factor, float* out) {
  for (int64_t c = 0; c < columns; ++c)
    for (int64_t t = 0; t < CHUNK; ++t) out[c * CHUNK + t] = t < count ? in[t * columns + c] * factor : 0;
}

// A matrix [depth, columns], `row` floats between its rows and `column` between its columns, as units [depth, UNIT].
INLINE void pack(const float* from, int64_t row, int64_t column, int64_t depth, int64_t columns, float* units,
                 int64_t unit) {
  for (int64_t first = 0; first < columns; first += UNIT, units += unit) {
    const int64_t width = columns - first < UNIT ? columns - first : UNIT;
    for (int64_t k = 0; k < depth; ++k) {
      float* out = units + k * UNIT;
      const float* in = from + k * row + first * column;
      for (int64_t i = 0; i < width; ++i) out[i] = in[i * column];
      for (int64_t i = width; i < UNIT; ++i) out[i] = 0;
    }
  }
}

// The first token of a part, in whole tiles; the part ends where the next begins.
INLINE int64_t begin_of(int64_t tokens, int64_t part, int64_t parts) {
  const int64_t start = up(tokens, MAX_TILE) / MAX_TILE * part / parts * MAX_TILE;
  return start < tokens ? start : tokens;
}

// [A; R] as units [D, UNIT]: columns of A, then of the router.
static void pack_shrink(const TrainingCall& call, const Sizes& z, float* units) {
  pack(call.lora_A, 1, z.D, z.D, z.r, units, z.D * UNIT);
  pack(call.route, 1, z.D, z.D, z.C, units + z.rank_units * z.D * UNIT, z.D * UNIT);
}

// [A; R] as units [s, UNIT] of the hidden size's columns; rows between the two are zeros.
static void pack_widen(const TrainingCall& call, const Sizes& z, float* units) {
  memset(units, 0, z.widen() * sizeof(float));
  pack(call.lora_A, z.D, 1, z.r, z.D, units, z.s * UNIT);
  pack(call.route, z.D, 1, z.C, z.D, units + z.rank_units * UNIT * UNIT, z.s * UNIT);
}

// Group j of the experts, [K, E], as units [K, UNIT].
static void pack_expand(const TrainingCall& call, const Sizes& z, int64_t j, float* units) {
  for (int64_t n = 0; n < z.N; ++n)
    pack(call.lora_B + (n * z.D + j * z.E) * z.r, 1, z.r, z.r, z.E, units + n * z.r * UNIT, z.K * UNIT);
}

// Its transpose, [E, K], as units [E, UNIT].
static void pack_contract(const TrainingCall& call, const Sizes& z, int64_t j, float* units) {
  for (int64_t k = 0; k < z.k; ++k) {
    float* out = units + k / UNIT * z.E * UNIT + k % UNIT;
    const float* in = call.lora_B + (k / z.r * z.D + j * z.E) * z.r + k % z.r;
    for (int64_t i = 0; i < z.E; ++i) out[i * UNIT] = k < z.K ? in[i * z.r] : 0;
  }
}

// Forward, for the tokens of one part.
template <class W>
static void forward_part(const TrainingCall& call, const Sizes& z, int64_t part, const float* shrink,
                         const float* expand, float* scratch) {
  float* x_cD = scratch;
  float* s_cS = x_cD + CHUNK * z.d;
  float* z_cK = s_cS + CHUNK * z.s;
  float* delta_cE = z_cK + CHUNK * z.k;
  float* lanes = delta_cE + CHUNK * z.e;
  const Columns of_A{shrink, UNIT, z.D * UNIT};
  const Columns of_route{shrink + z.rank_units * z.D * UNIT, UNIT, z.D * UNIT};
  const int64_t route_at = z.rank_units * UNIT, end = begin_of(z.T, part + 1, call.threads);
  for (int64_t start = begin_of(z.T, part, call.threads); start < end; start += CHUNK) {
    const int64_t count = end - start < CHUNK ? end - start : CHUNK, rows = up(count, MAX_TILE);
    float* weights_cC = call.weights + start * z.C;
    widen_rows<W>(call.x, start, count, z.D, x_cD, z.d);
    product<false>(x_cD, z.d, rows, of_route, z.route_units, z.D, s_cS + route_at, z.s);
    if (call.dropped) widen_rows<W>(call.dropped, start, count, z.D, x_cD, z.d);
    product<false>(x_cD, z.d, rows, of_A, z.rank_units, z.D, s_cS, z.s);
    for (int64_t t = 0; t < count; ++t) memcpy(call.h + (start + t) * z.r, s_cS + t * z.s, z.r * sizeof(float));

    for (int64_t tile = 0; tile < rows; tile += MAX_TILE) {
      const int64_t tokens = count - tile < MAX_TILE ? count - tile : MAX_TILE;
      for (int64_t t = 0; t < MAX_TILE; ++t) {
        const float* logits = s_cS + (tile + t) * z.s + route_at;
        const float* bias = call.bias && t < tokens ? call.bias + (start + tile + t) * z.C : nullptr;
        for (int64_t c = 0; c < z.C; ++c) lanes[c * MAX_TILE + t] = bias ? logits[c] + bias[c] : logits[c];
      }
      route(reinterpret_cast<Tokens*>(lanes), z.G, z.N);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t c = 0; c < z.C; ++c) weights_cC[(tile + t) * z.C + c] = lanes[c * MAX_TILE + t];
    }
    for (int64_t j = 0; j < z.G; ++j) {
      for (int64_t t = 0; t < count; ++t)
        for (int64_t n = 0; n < z.N; ++n)
          scale_into(s_cS + t * z.s, weights_cC[t * z.C + j * z.N + n] * call.scaling, z_cK + t * z.k + n * z.r, z.r);
      for (int64_t t = count; t < rows; ++t) memset(z_cK + t * z.k, 0, z.k * sizeof(float));
      product<false>(z_cK, z.k, rows, Columns{expand + j * z.e * z.K, UNIT, z.K * UNIT}, z.e / UNIT, z.K, delta_cE, z.e);
      for (int64_t t = 0; t < count; ++t)
        narrow_row(delta_cE + t * z.e, z.E, static_cast<W*>(call.delta) + (start + t) * z.D + j * z.E);
    }
  }
}

template <class W>
static void forward(const TrainingCall& call, float* memory) {
  const Sizes z(call);
  float* shrink = memory;
  float* expand = shrink + z.shrink();
  float* scratch = expand + z.expand();
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i <= z.G; ++i) {
      if (i == z.G) pack_shrink(call, z, shrink);
      else pack_expand(call, z, i, expand + i * z.e * z.K);
    }
#pragma omp for schedule(static, 1)
    for (int part = 0; part < call.threads; ++part)
      forward_part<W>(call, z, part, shrink, expand, scratch + part * z.forward_scratch());
  }
}

// One token and group: from the gradient of z [K], add to that of h [r] and set that of the routing weights [N].
INLINE void contract_token(const Sizes& z, const float* grad_z, const float* h, const float* weights, float scaling,
                           float* grad_h, float* grad_weights) {
  for (int64_t n = 0; n < z.N; ++n, grad_z += z.r) {
    const float factor = weights[n] * scaling;
    Floats dots = {};
    float dot = 0;
    int64_t i = 0;
    for (; i + LANES <= z.r; i += LANES) {
      const Floats grad = load(grad_z + i);
      store(load(grad_h + i) + grad * factor, grad_h + i);
      dots += grad * load(h + i);
    }
    for (; i < z.r; ++i) {
      grad_h[i] += grad_z[i] * factor;
      dot += grad_z[i] * h[i];
    }
    grad_weights[n] = (total(dots) + dot) * scaling;
  }
}

// Backward through softmax over the experts of every group: the logits' gradient overwrites the weights'.
INLINE void route_backward(const Sizes& z, const float* weights, const float* more, float* grad) {
  for (int64_t j = 0; j < z.G; ++j, grad += z.N, weights += z.N) {
    float inner = 0;
    for (int64_t n = 0; n < z.N; ++n) {
      if (more) grad[n] += *more++;
      inner += weights[n] * grad[n];
    }
    for (int64_t n = 0; n < z.N; ++n) grad[n] = weights[n] * (grad[n] - inner);
  }
}

// Backward, for the tokens of one part; the weights' gradients are summed into `sums`: [G, k, e], then [s, D].
template <class W>
static void backward_part(const TrainingCall& call, const Sizes& z, int64_t part, const float* widening,
                          const float* contracting, float* sums) {
  const int64_t route_at = z.rank_units * UNIT, width = up(z.D, UNIT), units = width / UNIT;
  float* sum_S = sums + z.G * z.k * z.e;
  float* grad_cD = sums + z.sums();
  float* x_cD = grad_cD + CHUNK * z.d;
  float* dropped_cD = x_cD + CHUNK * z.d;
  float* grad_x_cD = dropped_cD + CHUNK * z.d;
  float* grad_s_cS = grad_x_cD + CHUNK * width;
  float* grad_z_cK = grad_s_cS + CHUNK * z.s;
  float* grad_s_Sc = grad_z_cK + CHUNK * z.k;
  float* z_Kc = grad_s_Sc + CHUNK * z.s;
  float* h_rc = z_Kc + CHUNK * z.k;
  float* weights_Cc = h_rc + CHUNK * z.r;
  const Columns of_A{widening, UNIT, z.s * UNIT}, of_route{widening + route_at * UNIT, UNIT, z.s * UNIT};
  const float* seen_by_A = call.dropped ? dropped_cD : x_cD;
  memset(sums, 0, z.sums() * sizeof(float));
  memset(z_Kc, 0, CHUNK * z.k * sizeof(float));  // rows from K on stay zeros

  const int64_t end = begin_of(z.T, part + 1, call.threads);
  for (int64_t start = begin_of(z.T, part, call.threads); start < end; start += CHUNK) {
    const int64_t count = end - start < CHUNK ? end - start : CHUNK, rows = up(count, MAX_TILE);
    const float* h = call.h + start * z.r;
    const float* weights = call.weights + start * z.C;
    widen_rows<W>(call.grad_delta, start, count, z.D, grad_cD, z.d);
    widen_rows<W>(call.x, start, count, z.D, x_cD, z.d);
    if (call.dropped) widen_rows<W>(call.dropped, start, count, z.D, dropped_cD, z.d);
    transpose(h, z.r, count, call.scaling, h_rc);
    transpose(weights, z.C, count, 1, weights_Cc);
    memset(grad_s_cS, 0, CHUNK * z.s * sizeof(float));

    for (int64_t j = 0; j < z.G; ++j) {
      product<false>(grad_cD + j * z.E, z.d, rows, Columns{contracting + j * z.k * z.E, UNIT, z.E * UNIT}, z.k / UNIT,
                     z.E, grad_z_cK, z.k);
      for (int64_t t = 0; t < count; ++t)
        contract_token(z, grad_z_cK + t * z.k, h + t * z.r, weights + t * z.C + j * z.N, call.scaling,
                       grad_s_cS + t * z.s, grad_s_cS + t * z.s + route_at + j * z.N);
      for (int64_t n = 0; n < z.N; ++n)
        for (int64_t i = 0; i < z.r; ++i) {
          const float* by = weights_Cc + (j * z.N + n) * CHUNK;
          for (int64_t t = 0; t < CHUNK; ++t) z_Kc[(n * z.r + i) * CHUNK + t] = h_rc[i * CHUNK + t] * by[t];
        }
      product<true>(z_Kc, CHUNK, up(z.K, MAX_TILE), Columns{grad_cD + j * z.E, z.d, UNIT}, z.e / UNIT, count,
                    sums + j * z.k * z.e, z.e);
    }
    for (int64_t t = 0; t < count; ++t) {
      float* grad = grad_s_cS + t * z.s + route_at;
      route_backward(z, weights + t * z.C, call.grad_weights ? call.grad_weights + (start + t) * z.C : nullptr, grad);
      if (call.grad_logits) memcpy(call.grad_logits + (start + t) * z.C, grad, z.C * sizeof(float));
    }
    transpose(grad_s_cS, z.s, CHUNK, 1, grad_s_Sc);
    product<true>(grad_s_Sc, CHUNK, route_at, Columns{seen_by_A, z.d, UNIT}, units, count, sum_S, width);
    product<true>(grad_s_Sc + route_at * CHUNK, CHUNK, z.s - route_at, Columns{x_cD, z.d, UNIT}, units, count,
                  sum_S + route_at * width, width);
    if (call.grad_dropped) {
      product<false>(grad_s_cS, z.s, rows, of_A, units, z.r, grad_x_cD, width);
      narrow_rows<W>(grad_x_cD, width, start, count, z.D, call.grad_dropped);
    }
    if (call.grad_x) {
      if (call.dropped) product<false>(grad_s_cS + route_at, z.s, rows, of_route, units, z.C, grad_x_cD, width);
      else product<false>(grad_s_cS, z.s, rows, of_A, units, z.s, grad_x_cD, width);
      narrow_rows<W>(grad_x_cD, width, start, count, z.D, call.grad_x);
    }
  }
}

// Sums the parts in their order: `size` floats each, `step` floats apart.
INLINE void add_parts(const float* from, int64_t parts, int64_t step, int64_t size, float* out) {
  copy(from, out, size);
  for (int64_t part = 1; part < parts; ++part) add_into(out, from + part * step, size);
}

template <class W>
static void backward(const TrainingCall& call, float* memory) {
  const Sizes z(call);
  const int64_t size = z.backward_scratch(), route_at = z.rank_units * UNIT, width = up(z.D, UNIT);
  float* widening = memory;
  float* contracting = widening + z.widen();
  float* parts = contracting + z.contract();
#pragma omp parallel num_threads(call.threads) if (call.threads > 1)
  {
#pragma omp for schedule(static, 1)
    for (int64_t i = 0; i <= z.G; ++i) {
      if (i == z.G) pack_widen(call, z, widening);
      else pack_contract(call, z, i, contracting + i * z.k * z.E);
    }
#pragma omp for schedule(static, 1)
    for (int part = 0; part < call.threads; ++part)
      backward_part<W>(call, z, part, widening, contracting, parts + part * size);
#pragma omp for schedule(static) nowait
    for (int64_t c = 0; c < z.r + z.C; ++c) {
      const int64_t row = c < z.r ? c : route_at + c - z.r;
      float* out = c < z.r ? call.grad_A + c * z.D : call.grad_route + (c - z.r) * z.D;
      add_parts(parts + z.G * z.k * z.e + row * width, call.threads, size, z.D, out);
    }
#pragma omp for schedule(static)
    for (int64_t n = 0; n < z.N; ++n)
      for (int64_t j = 0; j < z.G; ++j)
        for (int64_t k = 0; k < z.r; ++k) {
          float* first = parts + (j * z.k + n * z.r + k) * z.e;
          add_parts(first, call.threads, size, z.E, first);
          float* out = call.grad_B + (n * z.D + j * z.E) * z.r + k;
          for (int64_t i = 0; i < z.E; ++i) out[i * z.r] = first[i];
        }
  }
}

#undef INLINE

}  // namespace MTLORA_ISA
}  // namespace

#endif
