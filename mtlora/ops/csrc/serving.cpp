// The routed low-rank path of a whole step in one pass, for any mix of adapters: the fast half of mtlora/ops/cpu.py.
//
// A tile is a few tokens of one adapter. One thread takes it from x to y: s = x [A; R], softmax over experts,
// z_j = Pi_j (x) h, y_j += z_j Bcat_j. Intermediate values stay in the core's caches and no thread waits for another,
// so a decode step costs about as much as reading its adapters' weights. Everything accumulates in float32.
//
// Plain C interface, loaded with ctypes: independent of the versions of torch and Python. Compiled with -fopenmp but
// not linked to an OpenMP runtime: it uses the threads of the runtime that torch has loaded.
//
// Weights come in units of 16 columns, each [depth, 16] in float32 and [depth / 2, 16, 2] in bfloat16 (zeros complete
// an odd depth): see mtlora/ops/cpu_kernel.py. So a product reads one continuous stream per unit, and bfloat16 values
// are in the order of the processor's pairwise products.
//
// This file includes itself once per instruction set; the one to run is chosen when it is loaded.

#ifndef MTLORA_ISA

#include "layout.h"

namespace {

// One adapter in the table of a block; mirrors `Field` in mtlora/ops/table.py.
struct Adapter {
  int64_t shrink;  // units of [D, S]
  int64_t expand;  // [G] of units of [K, E]
  int64_t bias;    // float32 [bias_rows, G, N], or 0
  int64_t rank;    // 0: the row has no path here
  int64_t experts;
  int64_t groups;
  int64_t bias_rows;
  int64_t dtype;
  int64_t hidden;
  int64_t in_units;
};

struct Tile {
  int32_t row, start, count;
};

// The arguments that are the same for every block of a step; mirrors `Step` in mtlora/ops/cpu_kernel.py.
struct Step {
  const int32_t *tokens, *bias_rows, *tiles;
  int64_t num_planned, num_tiles, num_rows, hidden;
  int32_t isa, dtype, threads;
};

struct Call {
  void* y;
  const void* x;
  int64_t y_stride, x_stride, hidden;
  const Adapter* table;
  const int32_t* tokens;
  const int32_t* bias_rows;
};

// Rows of left operands are padded with zeros to a multiple of this: the depth of AMX's tiles of bfloat16.
constexpr int LEFT = 32;

// Floats of scratch that `tokens` of an adapter need.
inline int64_t scratch_size(const Adapter& adapter, int tokens) {
  const int64_t N = adapter.experts, G = adapter.groups, D = adapter.hidden;
  const int64_t S = adapter.rank + G * N, K = N * adapter.rank;
  return tokens * (up(S, UNIT) + up(D / G, UNIT) + up(D, LEFT) + up(K, LEFT) + up(G * N, UNIT));
}

// Two tiles of one adapter, side by side, as one.
inline bool join(const Tile* two, Tile* joined) {
  *joined = {two[0].row, two[0].start, two[0].count + two[1].count};
  return two[0].row == two[1].row && two[0].start + two[0].count == two[1].start;
}

}  // namespace

#define MTLORA_HAS_TILES
#define MTLORA_SOURCE "serving.cpp"
#include "instruction_sets.h"

namespace {

using TileFunction = void (*)(const Call&, const Tile&, float*);

// dtype: 0 float32, 1 bfloat16. Null if the processor has none of the instruction sets.
TileFunction choose_tile(int dtype, int isa) {
  return dtype ? MTLORA_CHOOSE(TileFunction, isa, tile<uint16_t>) : MTLORA_CHOOSE(TileFunction, isa, tile<float>);
}

// Whether the chosen function takes two tiles at once, and then reads their adapter's weights once.
bool takes_two(TileFunction run) {
#ifdef MTLORA_HAS_TILES
  return run == amx_bf16::tile<uint16_t>;
#else
  return false;
#endif
}

}  // namespace

extern "C" {

// 1 if this processor can run the kernel. isa as in MTLORA_CHOOSE.
int mtlora_supported(int isa) { return choose_tile(1, isa) != nullptr; }

int mtlora_max_tile() { return MAX_TILE; }

// Version of `Step`, of the table's rows and of the weights' layout, `LAYOUT` in mtlora/ops/cpu_kernel.py: raise it
// when one of them changes.
int mtlora_layout() { return 3; }

// y += path(x) for every tile. table: a block's rows. x and y: [num_tokens, hidden] with strides of a row. Returns 0,
// or an error, with y unchanged: 1 no memory, 2 a row out of range, 3 a tile or token out of range, 4 an adapter of
// another dtype or hidden size, 5 a bias row out of range, 6 weights that are not in units.
int mtlora_add_routed(const Step* step, const void* table, void* y, const void* x, int64_t y_stride, int64_t x_stride,
                      int64_t num_tokens) {
  const Call call{y, x, y_stride, x_stride, step->hidden, static_cast<const Adapter*>(table), step->tokens,
                  step->bias_rows};
  const Tile* all = reinterpret_cast<const Tile*>(step->tiles);
  const int64_t num_tiles = step->num_tiles;
  int64_t share = 0;
  for (int64_t i = 0; i < num_tiles; ++i) {
    const Tile& tile = all[i];
    if (tile.row < 0 || tile.row >= step->num_rows) return 2;
    if (tile.count < 0 || tile.count > MAX_TILE || tile.start < 0) return 3;
    if (tile.start + tile.count > step->num_planned) return 3;
    const Adapter& adapter = call.table[tile.row];
    if (adapter.rank == 0) continue;
    if (adapter.dtype != step->dtype || adapter.hidden != step->hidden) return 4;
    if (!adapter.in_units) return 6;
    for (int t = tile.start; t < tile.start + tile.count; ++t) {
      if (call.tokens[t] < 0 || call.tokens[t] >= num_tokens) return 3;
      if (adapter.bias && call.bias_rows[t] >= adapter.bias_rows) return 5;
    }
    const int64_t size = scratch_size(adapter, 2 * MAX_TILE);
    share = size > share ? size : share;
  }
  if (share == 0) return 0;
  const int threads = step->threads > num_tiles ? static_cast<int>(num_tiles) : step->threads;
  const TileFunction run = choose_tile(step->dtype, step->isa);
  // Two at once only where each thread still has several.
  const int64_t at_once = takes_two(run) && num_tiles >= 4 * threads ? 2 : 1;
  float* scratch = static_cast<float*>(aligned_alloc(64, share * threads * sizeof(float)));
  if (scratch == nullptr) return 1;
  int next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int mine;
#pragma omp atomic capture
    mine = next++;
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t first = 0; first < num_tiles; first += at_once) {
      const int64_t end = first + at_once < num_tiles ? first + at_once : num_tiles;
      Tile joined;
      if (end - first == 2 && join(all + first, &joined)) {
        run(call, joined, scratch + mine * share);
      } else {
        for (int64_t i = first; i < end; ++i) run(call, all[i], scratch + mine * share);
      }
    }
  }
  free(scratch);
  return 0;
}

}  // extern "C"

#else  // MTLORA_ISA: the kernel for one instruction set

namespace {
namespace MTLORA_ISA {

#include "vectors.h"

// Tokens that `tile` takes at most.
#ifdef MTLORA_TILES
constexpr int MOST = 2 * MAX_TILE;
#else
constexpr int MOST = MAX_TILE;
#endif

// The left operand's type for weights of a type: bfloat16 only with bfloat16 products.
template <class W> struct Left { typedef float type; };
#ifdef MTLORA_DOT_BF16
template <> struct Left<uint16_t> { typedef uint16_t type; };
#endif

// Vectors of a unit, and how many vectors of columns fit the registers for a panel of T tokens.
constexpr int PER_UNIT = UNIT / LANES;
constexpr int room(int T) { return LANES == 16 ? (T <= 4 ? 6 : 3) : (T <= 2 ? 4 : T <= 4 ? 2 : 1); }

// sum[t][v] += a[t, k] w[k, columns of v] over one row, or over one pair of rows. `w` is at the row of the first unit.
template <int T, int V>
INLINE void accumulate(Floats (&sum)[T][V], const float* a, int64_t a_stride, const float* w, int64_t unit, int first) {
  Floats row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) row[v] = load(w + (first + v) / PER_UNIT * unit + (first + v) % PER_UNIT * LANES);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[t][v] += row[v] * a[t * a_stride];
  }
}

template <int T, int V>
INLINE void accumulate(Floats (&sum)[T][V], const float* a, int64_t a_stride, const uint16_t* w, int64_t unit,
                       int first) {
  Floats even[V], odd[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    Words pairs;
    memcpy(&pairs, w + (first + v) / PER_UNIT * unit + (first + v) % PER_UNIT * 2 * LANES, sizeof pairs);
    even[v] = reinterpret_cast<Floats>(pairs << 16);
    odd[v] = reinterpret_cast<Floats>(pairs & 0xFFFF0000u);
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[t][v] += even[v] * a[t * a_stride] + odd[v] * a[t * a_stride + 1];
  }
}

#ifdef MTLORA_DOT_BF16
template <int T, int V>
INLINE void accumulate(Floats (&sum)[T][V], const uint16_t* a, int64_t a_stride, const uint16_t* w, int64_t unit,
                       int first) {
  __m512bh row[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) row[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(w + (first + v) * unit));
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    int pair;
    memcpy(&pair, a + t * a_stride, 4);
    const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      sum[t][v] = reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum[t][v]), row[v], both));
  }
}
#endif

// V vectors of columns from vector `first` of the units at w; the accumulators live in registers.
template <int T, int V, class W, class A>
INLINE void panel(const A* a, int64_t a_stride, const W* w, int first, int64_t depth, float* out, int64_t out_stride) {
  constexpr int ROWS = sizeof(W) == 2 ? 2 : 1;
  const int64_t unit = up(depth, ROWS) * UNIT;
  Floats sum[T][V] = {};
  for (int64_t k = 0; k < depth; k += ROWS) accumulate<T, V>(sum, a + k, a_stride, w + k * UNIT, unit, first);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(sum[t][v], out + t * out_stride + (first + v) * LANES);
  }
}

// out [T, width] = a [T, depth] w, for `units` units of columns; a has a zero behind an odd depth.
template <int T, class W, class A>
static __attribute__((noinline)) void product(const A* a, int64_t a_stride, const W* w, int64_t units, int64_t depth,
                                              float* out, int64_t out_stride) {
  const int end = static_cast<int>(units) * PER_UNIT;
  int v = 0;
  for (; v + room(T) <= end; v += room(T)) panel<T, room(T)>(a, a_stride, w, v, depth, out, out_stride);
  if (room(T) > 3)
    for (; v + 3 <= end; v += 3) panel<T, 3>(a, a_stride, w, v, depth, out, out_stride);
  for (; v < end; ++v) panel<T, 1>(a, a_stride, w, v, depth, out, out_stride);
}

#ifdef MTLORA_TILES
// AMX's tiles for T tokens while it lives, for weights in bfloat16: 0 to 3 for sums, 4 for tokens, 5 to 7 for weights.
template <class W> struct Tiles {
  explicit Tiles(int) {}
  ~Tiles() {}
};
template <> struct Tiles<uint16_t> {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  explicit Tiles(int T) {
    Config config;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = 64;
      config.rows[i] = static_cast<uint8_t>(i < 5 ? T : LEFT / 2);
    }
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// out [T, 16 U] = a [T, depth] w for U units of columns, whose layout is that of tiles. Strides are in bytes.
template <int U>
INLINE void tiles(const uint16_t* a, int64_t a_stride, const uint16_t* w, int64_t depth, float* out,
                  int64_t out_stride) {
  alignas(64) uint16_t last[U][LEFT * UNIT];
  int64_t unit = up(depth, 2) * UNIT;
  _tile_zero(0);
  if (U > 1) _tile_zero(1);
  if (U > 2) _tile_zero(2);
  if (U > 3) _tile_zero(3);
  for (int64_t left = unit; left > 0; left -= LEFT * UNIT, a += LEFT, w += LEFT * UNIT) {
    if (left < LEFT * UNIT) {
      // What lies behind a unit is another's, or no memory: with zeros, each sum has the same order for any depth.
      for (int u = 0; u < U; ++u) {
        memcpy(last[u], w + u * unit, left * sizeof *w);
        memset(last[u] + left, 0, sizeof last[u] - left * sizeof *w);
      }
      w = last[0];
      unit = LEFT * UNIT;
      asm volatile("" ::: "memory");
    }
    _tile_loadd(4, a, a_stride);
    _tile_loadd(5, w, 64);
    _tile_dpbf16ps(0, 4, 5);
    if (U > 1) {
      _tile_loadd(6, w + unit, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (U > 2) {
      _tile_loadd(7, w + 2 * unit, 64);
      _tile_dpbf16ps(2, 4, 7);
    }
    if (U > 3) {
      _tile_loadd(5, w + 3 * unit, 64);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, out, out_stride);
  if (U > 1) _tile_stored(1, out + UNIT, out_stride);
  if (U > 2) _tile_stored(2, out + 2 * UNIT, out_stride);
  if (U > 3) _tile_stored(3, out + 3 * UNIT, out_stride);
}

static __attribute__((noinline)) void product_of_tiles(const uint16_t* a, int64_t a_stride, const uint16_t* w,
                                                       int64_t units, int64_t depth, float* out, int64_t out_stride) {
  // The intrinsics do not tell the compiler that they read memory.
  asm volatile("" ::: "memory");
  a_stride *= sizeof *a;
  out_stride *= sizeof *out;
  const int64_t four = 4 * up(depth, 2) * UNIT;
  for (; units >= 4; units -= 4, w += four, out += 4 * UNIT) tiles<4>(a, a_stride, w, depth, out, out_stride);
  if (units == 3) tiles<3>(a, a_stride, w, depth, out, out_stride);
  if (units == 2) tiles<2>(a, a_stride, w, depth, out, out_stride);
  if (units == 1) tiles<1>(a, a_stride, w, depth, out, out_stride);
  asm volatile("" ::: "memory");
}
#endif

template <class W, class A>
INLINE void product(int count, const A* a, int64_t a_stride, const W* w, int64_t units, int64_t depth, float* out,
                    int64_t out_stride) {
#ifdef MTLORA_TILES
  if constexpr (sizeof(W) == 2) return product_of_tiles(a, a_stride, w, units, depth, out, out_stride);
#endif
  switch (count) {
    case 1: return product<1>(a, a_stride, w, units, depth, out, out_stride);
    case 2: return product<2>(a, a_stride, w, units, depth, out, out_stride);
    case 3: return product<3>(a, a_stride, w, units, depth, out, out_stride);
    case 4: return product<4>(a, a_stride, w, units, depth, out, out_stride);
    case 5: return product<5>(a, a_stride, w, units, depth, out, out_stride);
    case 6: return product<6>(a, a_stride, w, units, depth, out, out_stride);
    case 7: return product<7>(a, a_stride, w, units, depth, out, out_stride);
    default: return product<8>(a, a_stride, w, units, depth, out, out_stride);
  }
}

// The path of up to MAX_TILE tokens of one adapter; of up to MOST with AMX.
template <class W>
static void tile(const Call& call, const Tile& tile, float* scratch) {
  const Adapter& adapter = call.table[tile.row];
  const int64_t r = adapter.rank, N = adapter.experts, G = adapter.groups, D = call.hidden;
  if (r == 0 || tile.count == 0) return;
  const int64_t S = r + G * N, K = N * r, E = D / G, C = G * N;
  const int64_t s_stride = up(S, UNIT), e_stride = up(E, UNIT), x_stride = up(D, LEFT), z_stride = up(K, LEFT);
  const int64_t depth_K = sizeof(W) == 2 ? up(K, 2) : K;
  const int T = tile.count;
  const int32_t* tokens = call.tokens + tile.start;
  typedef typename Left<W>::type A;
  // Of MAX_TILE tokens, then of the others.
  float* weights[] = {scratch, scratch + MAX_TILE * up(C, UNIT)};
  float* s = scratch + MOST * up(C, UNIT);
  float* delta = s + MOST * s_stride;
  A* x = reinterpret_cast<A*>(delta + MOST * e_stride);
  A* z = reinterpret_cast<A*>(delta + MOST * (e_stride + x_stride));
#ifdef MTLORA_TILES
  const Tiles<W> configured(T);
#endif

  for (int t = 0; t < T; ++t) {
    copy(static_cast<const W*>(call.x) + tokens[t] * call.x_stride, x + t * x_stride, D);
    for (int64_t i = D; i < x_stride; ++i) x[t * x_stride + i] = 0;
    for (int64_t i = K; i < z_stride; ++i) z[t * z_stride + i] = 0;
  }
  product(T, x, x_stride, reinterpret_cast<const W*>(adapter.shrink), s_stride / UNIT, D, s, s_stride);
  for (int t = 0; t < (T > MAX_TILE ? 2 : 1) * MAX_TILE; ++t) {
    float* logits = weights[t / MAX_TILE] + t % MAX_TILE;
    if (t >= T) {  // lanes without a token
      for (int64_t c = 0; c < C; ++c) logits[c * MAX_TILE] = 0;
      continue;
    }
    const float* from = s + t * s_stride + r;
    const int32_t row = adapter.bias ? call.bias_rows[tile.start + t] : -1;
    if (row >= 0) {
      const float* bias = reinterpret_cast<const float*>(adapter.bias) + row * C;
      for (int64_t c = 0; c < C; ++c) logits[c * MAX_TILE] = from[c] + bias[c];
    } else {
      for (int64_t c = 0; c < C; ++c) logits[c * MAX_TILE] = from[c];
    }
  }
  route(reinterpret_cast<Tokens*>(weights[0]), G, N);
  if (T > MAX_TILE) route(reinterpret_cast<Tokens*>(weights[1]), G, N);
  const W* expand = reinterpret_cast<const W*>(adapter.expand);
  for (int64_t j = 0; j < G; ++j, expand += e_stride * depth_K) {
    for (int t = 0; t < T; ++t) {
      const float* of_token = weights[t / MAX_TILE] + t % MAX_TILE;
      for (int64_t i = 0; i < N; ++i)
        scale_into(s + t * s_stride, of_token[(j * N + i) * MAX_TILE], z + t * z_stride + i * r, r);
    }
    product(T, z, z_stride, expand, e_stride / UNIT, K, delta, e_stride);
    for (int t = 0; t < T; ++t)
      add_into(static_cast<W*>(call.y) + tokens[t] * call.y_stride + j * E, delta + t * e_stride, E);
  }
}

#undef INLINE

}  // namespace MTLORA_ISA
}  // namespace

#endif
