"""What every printed C++ kernel begins with: types, loads, stores and the copies of a stage."""

PRELUDE = r"""
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef @TYPE@ T;
enum { WIDTH = @WIDTH@ };
typedef T V __attribute__((vector_size(WIDTH * sizeof(T))));
struct bf16 { uint16_t bits; };
typedef _Float16 half;

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(half x) { return (float)x; }
static inline float widen(bf16 x) {
  uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
static inline void narrow(float* p, float x) { *p = x; }
static inline void narrow(double* p, double x) { *p = x; }
static inline void narrow(half* p, float x) { *p = (half)x; }
static inline void narrow(bf16* p, float x) {  // round to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, 4);
  p->bits = x == x ? (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : (uint16_t)0x7fc0u;
}
static inline V load(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class E> static inline V load(const E* p) {
  V v;
  for (int i = 0; i < WIDTH; ++i) v[i] = widen(p[i]);
  return v;
}
// The first n lanes; out of line, because a tile may hold hundreds of them.
template <class E> static __attribute__((noinline)) V load_tail(const E* p, int64_t n) {
  asm("" : "+r"(n));  // with n known, GCC 12 reads all lanes and blends, past the end of the tensor
  V v = {};
  for (int i = 0; i < WIDTH; ++i) if (i < n) v[i] = widen(p[i]);
  return v;
}
static inline void store(T* p, V v) { memcpy(p, &v, sizeof v); }
template <class E> static inline void store(E* p, V v) {
  for (int i = 0; i < WIDTH; ++i) narrow(p + i, v[i]);
}
template <class E> static __attribute__((noinline)) void store_tail(E* p, V v, int64_t n) {
  for (int i = 0; i < WIDTH; ++i) if (i < n) narrow(p + i, v[i]);
}
@MASKED@
static inline T first(V v) { return v[0]; }
static inline T sum(V v) {  // pairwise, for its smaller error
  T part[WIDTH];
  memcpy(part, &v, sizeof v);
  for (int half_width = WIDTH / 2; half_width; half_width /= 2)
    for (int i = 0; i < half_width; ++i) part[i] += part[i + half_width];
  return part[0];
}
static inline void fill_zero(T* to, int64_t n) { memset(to, 0, n * sizeof(T)); }

// Elements first, first + PHASES, ... of a row of `extent`; zero outside it.
template <int64_t STRIDE, int64_t PHASES, class E>
static inline void read_run(
    T* __restrict to, const E* __restrict from, int64_t first, int64_t extent, int64_t n) {
  int64_t begin = first < 0 ? (-first + PHASES - 1) / PHASES : 0;
  int64_t end = extent > first ? (extent - first + PHASES - 1) / PHASES : 0;
  if (begin > n) begin = n;
  if (end > n) end = n;
  if (end < begin) end = begin;
  for (int64_t j = 0; j < begin; ++j) to[j] = 0;
  from += first * STRIDE;
  for (int64_t j = begin; j < end; ++j) to[j] = widen(from[j * (STRIDE * PHASES)]);
  for (int64_t j = end; j < n; ++j) to[j] = 0;
}
template <int64_t STRIDE, int64_t PHASES, class E>
static inline void write_run(
    const T* __restrict from, E* __restrict to, int64_t first, int64_t extent, int64_t n) {
  int64_t end = extent > first ? (extent - first + PHASES - 1) / PHASES : 0;
  if (end > n) end = n;
  to += first * STRIDE;
  for (int64_t j = 0; j < end; ++j) narrow(to + j * (STRIDE * PHASES), from[j]);
}
"""

MASKED = r"""
#if defined(__AVX512F__)
// Masked moves for whole registers; the intrinsics' header alone takes longer to compile than a kernel.
static inline uint16_t below(int64_t n) {
  return n >= WIDTH ? (1u << WIDTH) - 1u : n > 0 ? (1u << n) - 1u : 0u;
}
static inline V load_tail(const T* p, int64_t n) {
  return (V)__builtin_ia32_loadu@SUFFIX@512_mask(p, (V){}, below(n));
}
static inline void store_tail(T* p, V v, int64_t n) {
  __builtin_ia32_storeu@SUFFIX@512_mask(p, v, below(n));
}
#endif
"""


def prelude(compute: str, width: int) -> str:
    """The prelude for vectors of `width` elements of type `compute` ("float" or "double")."""
    whole = width * (8 if compute == "double" else 4) == 64
    masked = MASKED.replace("@SUFFIX@", "pd" if compute == "double" else "ps") if whole else ""
    return (
        PRELUDE.replace("@TYPE@", compute).replace("@WIDTH@", str(width)).replace("@MASKED@", masked.strip())
    )
