// Vectors of the instruction set MTLORA_ISA, inside its namespace: loads, stores, and softmax for tokens side by side.

#define INLINE static inline __attribute__((always_inline))

constexpr int LANES = MTLORA_VECTOR_BYTES / 4;
typedef float Floats __attribute__((vector_size(MTLORA_VECTOR_BYTES)));
// The same in memory, where a vector is aligned like its floats.
typedef float FloatsAt __attribute__((vector_size(MTLORA_VECTOR_BYTES), aligned(4), may_alias));
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

// Rounds to nearest even; NaN stays NaN.
INLINE void narrow(float value, float* out) { *out = value; }
INLINE void narrow(float value, uint16_t* out) {
  uint32_t word;
  memcpy(&word, &value, 4);
  *out = value != value ? 0x7FC0 : static_cast<uint16_t>((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

INLINE Floats load(const float* from) { return *reinterpret_cast<const FloatsAt*>(from); }
INLINE Floats load(const uint16_t* from) {
  const Words words = __builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16;
  return reinterpret_cast<Floats>(words);
}

INLINE void store(Floats values, float* out) { *reinterpret_cast<FloatsAt*>(out) = values; }
INLINE void store(Floats values, uint16_t* out) {
#ifdef MTLORA_DOT_BF16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(values))));
#else
  const Words words = reinterpret_cast<Words>(values);
  const Words rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;
  const Words quiet = {};
  *reinterpret_cast<Halves*>(out) = __builtin_convertvector(values == values ? rounded : quiet + 0x7FC0, Halves);
#endif
}

// Tokens are side by side, so softmax needs no step across lanes.
typedef float Tokens __attribute__((vector_size(4 * MAX_TILE), aligned(4), may_alias));
typedef int32_t TokenInts __attribute__((vector_size(4 * MAX_TILE)));

// exp(x) for x <= 0, to float32's precision: 2^n times the series of the rest of x / ln 2. I: V's integers.
template <class V, class I>
INLINE V exp_negative(const V& from) {
  const V zero = {};
  const V x = from > zero - 87.0f ? from : zero - 87.0f;
  const I n = __builtin_convertvector(x * 1.44269504f - 0.5f, I);
  const V whole = __builtin_convertvector(n, V);
  const V f = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  V p = zero + 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  return p * reinterpret_cast<V>((n + 127) << 23);
}

// Softmax over the experts of every group, in place. logits: [G*N, MAX_TILE].
INLINE void route(Tokens* logits, int64_t groups, int64_t experts) {
  for (int64_t j = 0; j < groups; ++j) {
    Tokens* group = logits + j * experts;
    Tokens largest = group[0], sum = {};
    // A NaN anywhere among the logits makes the sum NaN.
    for (int64_t i = 1; i < experts; ++i) largest = group[i] > largest ? group[i] : largest;
    for (int64_t i = 0; i < experts; ++i) {
      const Tokens less = group[i] - largest;
      group[i] = less == less ? exp_negative<Tokens, TokenInts>(less) : less;
      sum += group[i];
    }
    const Tokens scale = 1.0f / sum;
    for (int64_t i = 0; i < experts; ++i) group[i] *= scale;
  }
}

// out = x * factor.
template <class A>
INLINE void scale_into(const float* x, float factor, A* out, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(load(x + i) * factor, out + i);
  for (; i < size; ++i) narrow(x[i] * factor, out + i);
}

template <class W>
INLINE void add_into(W* y, const float* x, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(load(y + i) + load(x + i), y + i);
  for (; i < size; ++i) narrow(widen(y[i]) + x[i], y + i);
}

INLINE void copy(const float* from, float* to, int64_t size) { memcpy(to, from, size * sizeof(float)); }
INLINE void copy(const uint16_t* from, uint16_t* to, int64_t size) { memcpy(to, from, size * sizeof(uint16_t)); }
INLINE void copy(const uint16_t* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = widen(from[i]);
}

// The sum of a vector's lanes.
INLINE float total(Floats values) {
#if MTLORA_VECTOR_BYTES == 64
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(values));
#elif MTLORA_VECTOR_BYTES == 16
  return (values[0] + values[2]) + (values[1] + values[3]);
#else
  const __m256 all = reinterpret_cast<__m256>(values);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#endif
}
