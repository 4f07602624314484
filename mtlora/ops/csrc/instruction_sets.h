// Includes MTLORA_SOURCE, the current kernel, once per instruction set, each time in its own namespace MTLORA_ISA, and
// finds the ones that this processor has.

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MTLORA_X86 1
#include <immintrin.h>
#endif

// A source that has code for AMX's tiles defines MTLORA_HAS_TILES. GCC 11 is the first to compile it.
#if !defined(MTLORA_X86) || !defined(__linux__) || __GNUC__ < 11
#undef MTLORA_HAS_TILES
#endif

#ifdef MTLORA_HAS_TILES
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,amx-tile,amx-bf16")
#define MTLORA_ISA amx_bf16
#define MTLORA_VECTOR_BYTES 64
#define MTLORA_DOT_BF16
#define MTLORA_TILES
#include MTLORA_SOURCE
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#undef MTLORA_DOT_BF16
#undef MTLORA_TILES
#pragma GCC pop_options
#endif

#ifdef MTLORA_X86
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")
#define MTLORA_ISA avx512bf16
#define MTLORA_VECTOR_BYTES 64
#define MTLORA_DOT_BF16
#include MTLORA_SOURCE
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#undef MTLORA_DOT_BF16
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define MTLORA_ISA avx512
#define MTLORA_VECTOR_BYTES 64
#include MTLORA_SOURCE
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define MTLORA_ISA avx2
#define MTLORA_VECTOR_BYTES 32
#include MTLORA_SOURCE
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES
#pragma GCC pop_options
#endif

// Vectors of 16 bytes, which every compiler has: NEON on aarch64, SSE2 on x86.
#pragma GCC diagnostic push
// Wider vectors are passed within this file alone.
#pragma GCC diagnostic ignored "-Wpsabi"
#define MTLORA_ISA portable
#define MTLORA_VECTOR_BYTES 16
#include MTLORA_SOURCE
#pragma GCC diagnostic pop
#undef MTLORA_ISA
#undef MTLORA_VECTOR_BYTES

// The function `name` of instruction set `isa`: 0 for the best, else exactly one: 1 portable, 2 AVX2, 512 AVX-512, 516
// AVX-512 with bfloat16 products, 520 the same and AMX. Null if this processor lacks it. A source without code for AMX
// gives 516's function for 520.
#if defined(MTLORA_HAS_TILES)
#define MTLORA_CHOOSE(Function, isa, ...)                                                                     \
  choose<Function>(isa, amx_bf16::__VA_ARGS__, avx512bf16::__VA_ARGS__, avx512::__VA_ARGS__, avx2::__VA_ARGS__, \
                   portable::__VA_ARGS__)
#elif defined(MTLORA_X86)
#define MTLORA_CHOOSE(Function, isa, ...)                                                                          \
  choose<Function>(isa, avx512bf16::__VA_ARGS__, avx512bf16::__VA_ARGS__, avx512::__VA_ARGS__, avx2::__VA_ARGS__, \
                   portable::__VA_ARGS__)
#else
#define MTLORA_CHOOSE(Function, isa, ...) \
  ((isa) == 0 || (isa) == 1 ? static_cast<Function>(portable::__VA_ARGS__) : nullptr)
#endif

#ifdef MTLORA_X86
namespace {

// Whether the processor has AMX's tiles and products of bfloat16, and Linux lets this process use them: it must ask.
// A source without code for them has no such condition: its function with tiles is that of 516.
inline bool has_tiles() {
#ifdef MTLORA_HAS_TILES
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  constexpr unsigned TILES_AND_BF16 = 1u << 24 | 1u << 22;
  unsigned a, b, c, d;
  static const bool found = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES_AND_BF16) == TILES_AND_BF16 &&
                            syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return found;
#else
  return true;
#endif
}

template <class Function>
Function choose(int isa, Function with_tiles, Function with_dot, Function with_512, Function with_2,
                Function portable) {
  __builtin_cpu_init();
  const bool has_2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_512 = has_2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_dot = has_512 && __builtin_cpu_supports("avx512bf16");
  if (has_dot && (isa == 0 || isa == 520) && has_tiles()) return with_tiles;
  if (has_dot && (isa == 0 || isa == 516)) return with_dot;
  if (has_512 && (isa == 0 || isa == 512)) return with_512;
  if (has_2 && (isa == 0 || isa == 2)) return with_2;
  return isa == 0 || isa == 1 ? portable : nullptr;
}

}  // namespace
#endif
