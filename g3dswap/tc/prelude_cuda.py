"""What every printed CUDA C++ kernel begins with: copies to shared memory, and fragments of the matrix unit.

A warp's fragment of a 16x16 operand has in each lane the pairs (row, k) .. (row, k + 1) of rows lane / 4 and
lane / 4 + 8 and of k = 2 * (lane % 4) and that plus 8; of a 16x8 result, the same of two columns (PTX ISA,
"Matrix fragments for mma.m16n8k16").  `ldmatrix` takes from each lane where eight elements of a row begin.
"""

MEMORY = "extern __shared__ __align__(128) unsigned char memory[];"

PRELUDE = r"""
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

static __device__ __forceinline__ void narrow(float* p, float x) { *p = x; }
static __device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Waits until the kernel before has ended, and what it has written is there: this one may have been launched
// before that (PTX ISA, "griddepcontrol").
static __device__ __forceinline__ void wait_for_others() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel be launched, which adds up what this one finds, and waits for it.
static __device__ __forceinline__ void let_others_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Copies so many bytes, or as many zeros, for which nothing is read; they are there behind `arrived`.
template <int BYTES> static __device__ __forceinline__ void copy(void* to, const void* from, bool some) {
  if constexpr (BYTES == 2) {
    *static_cast<u16*>(to) = some ? *static_cast<const u16*>(from) : u16(0);
  } else if constexpr (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::
                 "r"(address(to)), "l"(from), "r"(some ? 16 : 0) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::
                 "r"(address(to)), "l"(from), "n"(BYTES), "r"(some ? BYTES : 0) : "memory");
  }
}
// Ends a group of copies.
static __device__ __forceinline__ void committed() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for the other threads of a team of so many, or of the program.
template <int THREADS> static __device__ __forceinline__ void meet(int team) {
  if constexpr (THREADS == 0) __syncthreads();
  else if constexpr (THREADS == 32) __syncwarp();
  else asm volatile("bar.sync %0, %1;" :: "r"(team + 1), "n"(THREADS) : "memory");
}
// Waits for all threads of a cluster, and for what they have written to shared memory.
static __device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
// What another program of a cluster has where `own` lies in this one.
static __device__ __forceinline__ float of_program(u32 rank, const float* own) {
  u32 there;
  float found;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(own)), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(found) : "r"(there) : "memory");
  return found;
}
// Waits until all their groups of copies but the last so many have arrived.
template <int GROUPS, int THREADS = 0> static __device__ __forceinline__ void arrived(int team = 0) {
  if constexpr (GROUPS == 0) asm volatile("cp.async.wait_all;" ::: "memory");
  else asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS) : "memory");
  meet<THREADS>(team);
}

// Writes zeros to so many bytes, and to the rest of the last sixteen.
static __device__ __forceinline__ void clear(unsigned char* at, int bytes, int thread, int threads) {
  for (int e = thread * 16; e < bytes; e += threads * 16) {
    *reinterpret_cast<uint4*>(at + e) = make_uint4(0, 0, 0, 0);
  }
}

// Write so many registers as one word to memory, or to shared memory; the compiler splits what is not said to
// be one, to need fewer registers.
static __device__ __forceinline__ void write(void* to, const u32 (&from)[1]) {
  asm volatile("st.global.b32 [%0], %1;" :: "l"(to), "r"(from[0]) : "memory");
}
static __device__ __forceinline__ void write(void* to, const u32 (&from)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" :: "l"(to), "r"(from[0]), "r"(from[1]) : "memory");
}
static __device__ __forceinline__ void write(void* to, const u32 (&from)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::
               "l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
}
static __device__ __forceinline__ void narrow2(float* p, float x, float y) {
  const u32 both[2] = {__float_as_uint(x), __float_as_uint(y)};
  write(p, both);
}
static __device__ __forceinline__ void keep(void* to, const u32 (&from)[1]) {
  asm volatile("st.shared.b32 [%0], %1;" :: "r"(address(to)), "r"(from[0]) : "memory");
}
static __device__ __forceinline__ void keep(void* to, const u32 (&from)[2]) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" :: "r"(address(to)), "r"(from[0]), "r"(from[1]) : "memory");
}
static __device__ __forceinline__ void keep(void* to, const u32 (&from)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::
               "r"(address(to)), "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]) : "memory");
}

static __device__ __forceinline__ u32 word(u32 at) {
  u32 found;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(found) : "r"(at));
  return found;
}
static __device__ __forceinline__ void matrices(u32 (&to)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
}
static __device__ __forceinline__ void multiply(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.@PRODUCT@ "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
"""

HALVES = r"""
static __device__ __forceinline__ void narrow(u16* p, float x) {
  u16 y;
  asm("cvt.rn.@TYPE@.f32 %0, %1;" : "=h"(y) : "f"(x));
  *p = y;
}
static __device__ __forceinline__ void narrow2(u16* p, float x, float y) {
  u32 both;
  asm("cvt.rn.@TYPE@x2.f32 %0, %1, %2;" : "=r"(both) : "f"(y), "f"(x));
  *reinterpret_cast<u32*>(p) = both;
}
static __device__ __forceinline__ float widen(u16 x) {
  @WIDEN@
}

template <int WIDTH> struct Wide;
template <> struct Wide<2> { typedef u32 type; };
template <> struct Wide<4> { typedef uint2 type; };
template <> struct Wide<8> { typedef uint4 type; };
template <int WIDTH> union Elements {
  typename Wide<WIDTH>::type whole;
  u32 pairs[WIDTH / 2];
};
// Turns so many elements from each of two places around, or zeros: rows of pairs, `pitch` elements apart.
template <int WIDTH>
static __device__ __forceinline__ void turn(
    u16* to, int pitch, const u16* from, const u16* next, bool some, bool more) {
  if constexpr (WIDTH == 1) {
    const u32 low = some ? *from : 0, high = more ? *next : 0;
    *reinterpret_cast<u32*>(to) = low | high << 16;
  } else {
    typedef typename Wide<WIDTH>::type Word;
    Elements<WIDTH> low = {}, high = {};
    if (some) low.whole = *reinterpret_cast<const Word*>(from);
    if (more) high.whole = *reinterpret_cast<const Word*>(next);
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
      *reinterpret_cast<u32*>(to + 2 * i * pitch) = __byte_perm(low.pairs[i], high.pairs[i], 0x5410);
      *reinterpret_cast<u32*>(to + (2 * i + 1) * pitch) = __byte_perm(low.pairs[i], high.pairs[i], 0x7632);
    }
  }
}
// Puts so many elements, each `stride` behind the one before, side by side.
template <int WIDTH> static __device__ __forceinline__ void gather(u16* to, const u16* from, int stride) {
  if constexpr (WIDTH == 1) {
    *to = *from;
  } else {
    u32 found[WIDTH / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
      found[i] = from[2 * i * stride] | u32(from[(2 * i + 1) * stride]) << 16;
    }
    keep(to, found);
  }
}
// Reads so many elements that are one word.
template <int WIDTH> static __device__ __forceinline__ void load(float (&to)[WIDTH], const u16* from) {
  if constexpr (WIDTH == 1) {
    to[0] = widen(*from);
  } else {
    Elements<WIDTH> found;
    found.whole = *reinterpret_cast<const typename Wide<WIDTH>::type*>(from);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) to[i] = widen(u16(found.pairs[i / 2] >> i % 2 * 16));
  }
}
// The registers of so many results that are one word.
template <int WIDTH>
static __device__ __forceinline__ void pack(u32 (&to)[WIDTH / 2], const float (&from)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH / 2; ++i) narrow2(reinterpret_cast<u16*>(&to[i]), from[2 * i], from[2 * i + 1]);
}
// Writes so many elements, which lie together in shared memory, as one word.
template <int WIDTH> static __device__ __forceinline__ void put(u16* to, const u16* from) {
  if constexpr (WIDTH == 1) {
    *to = *from;
  } else {
    u32 found[WIDTH / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) found[i] = reinterpret_cast<const u32*>(from)[i];
    write(to, found);
  }
}

// A product half as deep.
static __device__ __forceinline__ void multiply_half(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.@TYPE@.@TYPE@.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}

static __device__ __forceinline__ void transposed(u32 (&to)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at));
}
static __device__ __forceinline__ void transposed(u32 (&first)[2], u32 (&second)[2], u32 at) {
  u32 both[4];
  transposed(both, at);
  first[0] = both[0], first[1] = both[1], second[0] = both[2], second[1] = both[3];
}
static __device__ __forceinline__ void unpack(u32 (&to)[2], uint2 both) { to[0] = both.x, to[1] = both.y; }
static __device__ __forceinline__ void transposed(u32 (&to)[2], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1]) : "r"(at));
}
"""

SINGLES = r"""
static __device__ __forceinline__ float widen(float x) { return x; }

// The nearest TF32, which the matrix unit would truncate a float to.
static __device__ __forceinline__ float rounded(float x) {
  u32 found;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(found) : "f"(x));
  return __uint_as_float(found);
}
static __device__ __forceinline__ u32 rounded_word(u32 at) {
  return __float_as_uint(rounded(__uint_as_float(word(at))));
}
static __device__ __forceinline__ void rounded_matrices(u32 (&to)[4], u32 at) {
  matrices(to, at);
#pragma unroll
  for (int i = 0; i < 4; ++i) to[i] = __float_as_uint(rounded(__uint_as_float(to[i])));
}
template <int WIDTH> struct Wide;
template <> struct Wide<1> { typedef float type; };
template <> struct Wide<2> { typedef float2 type; };
template <> struct Wide<4> { typedef float4 type; };
// Reads so many elements that are one word.
template <int WIDTH> static __device__ __forceinline__ void load(float (&to)[WIDTH], const float* from) {
  const auto found = *reinterpret_cast<const typename Wide<WIDTH>::type*>(from);
  if constexpr (WIDTH == 1) to[0] = found;
  else to[0] = found.x, to[1] = found.y;
  if constexpr (WIDTH == 4) to[2] = found.z, to[3] = found.w;
}
// The registers of so many results that are one word.
template <int WIDTH>
static __device__ __forceinline__ void pack(u32 (&to)[WIDTH], const float (&from)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) to[i] = __float_as_uint(from[i]);
}
// Writes so many elements, which are one word in shared memory.
template <int WIDTH> static __device__ __forceinline__ void put(float* to, const float* from) {
  float some[WIDTH];
  u32 words[WIDTH];
  load(some, from);
  pack(words, some);
  write(to, words);
}
// Puts so many floats, each `stride` behind the one before, side by side, and rounds them.
template <int WIDTH> static __device__ __forceinline__ void gather(float* to, const float* from, int stride) {
  float some[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) some[i] = rounded(from[i * stride]);
  u32 words[WIDTH];
  pack(words, some);
  keep(to, words);
}
"""

_TYPES = {
    "bfloat16": ("bf16", "return __uint_as_float((u32)x << 16);"),
    "float16": ("f16", 'float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y;'),
}


def prelude_cuda(dtype: str) -> str:
    """The prelude for factors of a half type, or of float32 that are rounded to TF32."""
    if dtype == "float32":
        return PRELUDE.replace("@PRODUCT@", "m16n8k8.row.col.f32.tf32.tf32.f32") + SINGLES
    name, widen = _TYPES[dtype]
    product = f"m16n8k16.row.col.f32.{name}.{name}.f32"
    return PRELUDE.replace("@PRODUCT@", product) + HALVES.replace("@TYPE@", name).replace("@WIDEN@", widen)
