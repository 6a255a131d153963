"""Runs printed CUDA C++ without a GPU: every thread is a fiber, and a warp meets where lanes exchange data.

The programs of a cluster run together, others one after another.  Half of them run in another order than that
of the threads, so that who waits for too few shows.

The prelude is replaced by one for a C++ compiler.  Shared memory holds NaN before a program begins and where
a copy is on its way, so that what is read too early or never written shows in the result, and ends where the
kernel says that it ends.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from g3dswap.tc.kernel import Kernel
from g3dswap.tc.launch import Entry
from g3dswap.tc.nest import Nest
from g3dswap.tc.prelude_cuda import MEMORY, prelude_cuda
from g3dswap.tc.print_cuda import shared_bytes
from g3dswap.tc.runtime_cpp import compiler
from g3dswap.tc.runtime_triton import Programs
from g3dswap.tc.schedule import Schedule, apply
from g3dswap.tc.source import source as source_of

PRELUDE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <ucontext.h>
#include <vector>
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __restrict__ __restrict
#define __launch_bounds__(threads)
#define __cluster_dims__(x, y, z)
#define __align__(bytes) __attribute__((aligned(bytes)))
using std::min;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
struct uint2 { u32 x, y; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
enum { MOST = @SHARED@, STACK = 256 * 1024, PROGRAMS = @CLUSTER@ };
alignas(128) unsigned char memories[PROGRAMS][(MOST + 4096 + 127) / 128 * 128];
static unsigned own_rank;
#define memory memories[own_rank]

struct Index { unsigned x; };
static Index threadIdx, blockIdx;
enum State { RUNS, AT_WARP, AT_TEAM, AT_BLOCK, AT_CLUSTER, DONE };
struct Copy { void* to; const void* from; int bytes; };
// copies: those of groups that have ended, the oldest first, and of the one that has not.
struct Fiber {
  ucontext_t context; std::unique_ptr<char[]> stack; State state; u32 mail[6]; int team, mates; bool waited;
  std::vector<std::vector<Copy>> copies;
};
static std::vector<Fiber> programs[PROGRAMS];
#define fibers programs[own_rank]
static ucontext_t scheduler;
static void wait_at(State state) {
  Fiber& own = fibers[threadIdx.x];
  own.state = state;
  swapcontext(&own.context, &scheduler);
}
static Fiber& lane(int i) { return fibers[threadIdx.x / 32 * 32 + i]; }
static void __syncthreads() { wait_at(AT_BLOCK); }
static void meet_cluster() { wait_at(AT_CLUSTER); }
static void wait_for_others() { fibers[threadIdx.x].waited = true; }
static void let_others_begin() {}
template <int THREADS> static void meet(int team) {
  fibers[threadIdx.x].team = team;
  fibers[threadIdx.x].mates = THREADS;
  wait_at(THREADS == 0 ? AT_BLOCK : THREADS == 32 ? AT_WARP : AT_TEAM);
}

static float bits(u32 x) { float y; memcpy(&y, &x, 4); return y; }
#if @HALF@
static float widen(u16 x) { _Float16 y; memcpy(&y, &x, 2); return (float)y; }
static u16 rounded(float x) { _Float16 y = (_Float16)x; u16 z; memcpy(&z, &y, 2); return z; }
#else
static float widen(u16 x) { return bits((u32)x << 16); }
static float widen(float x) { return x; }
static u16 rounded(float x) {
  u32 y;
  memcpy(&y, &x, 4);
  return x == x ? (u16)((y + 0x7fffu + ((y >> 16) & 1u)) >> 16) : (u16)0x7fc0u;
}
#endif
static void narrow(float* p, float x) { *p = x; }
static void narrow(u16* p, float x) { *p = rounded(x); }
static void aligned(const void* p, uintptr_t bytes) {
  if ((uintptr_t)p % bytes) { fprintf(stderr, "misaligned\n"); abort(); }
}
template <class T> static void narrow2(T* p, float x, float y) {
  aligned(p, 2 * sizeof(T));
  narrow(p, x);
  narrow(p + 1, y);
}
static u32 address(const void* p) { return (u32)((const unsigned char*)p - memory); }
static void inside(const void* p, int bytes) {
  if ((const unsigned char*)p < memory || (const unsigned char*)p + bytes > memory + MOST) {
    fprintf(stderr, "outside of shared memory\n");
    abort();
  }
}
static float of_program(u32 rank, const float* own) {
  inside(own, 4);
  float found;
  memcpy(&found, memories[rank] + address(own), 4);
  return found;
}
static void carried_out(const Copy& it) {
  if (it.from) memcpy(it.to, it.from, it.bytes); else memset(it.to, 0, it.bytes);
}
template <int BYTES> static void copy(void* to, const void* from, bool some) {
  aligned(to, BYTES);
  aligned(from, some ? BYTES : 1);
  inside(to, BYTES);
  if (!fibers[threadIdx.x].waited) { fprintf(stderr, "does not wait for the kernel before\n"); abort(); }
  Copy wanted{to, some ? from : nullptr, BYTES};
  if (BYTES == 2) return carried_out(wanted);
  memset(to, 0xff, BYTES);
  fibers[threadIdx.x].copies.back().push_back(wanted);
}
template <int WIDTH> static void turn(
    u16* to, int pitch, const u16* from, const u16* next, bool some, bool more) {
  if (some) aligned(from, 2 * WIDTH);
  if (more) aligned(next, 2 * WIDTH);
  for (int i = 0; i < WIDTH; ++i) {
    aligned(to + i * pitch, 4);
    inside(to + i * pitch, 4);
    to[i * pitch] = some ? from[i] : 0;
    to[i * pitch + 1] = more ? next[i] : 0;
  }
}
template <int WIDTH, class T> static void load(float (&to)[WIDTH], const T* from) {
  aligned(from, WIDTH * sizeof(T));
  inside(from, WIDTH * sizeof(T));
  for (int i = 0; i < WIDTH; ++i) to[i] = widen(from[i]);
}
template <int WIDTH, int COUNT> static void pack(u32 (&to)[COUNT], const float (&from)[WIDTH]) {
  for (int i = 0; i < WIDTH; ++i)
    if (COUNT == WIDTH) memcpy(to + i, from + i, 4);
    else narrow((u16*)to + i, from[i]);
}
template <int COUNT> static void write(void* to, const u32 (&from)[COUNT]) {
  aligned(to, 4 * COUNT);
  memcpy(to, from, 4 * COUNT);
}
template <int COUNT> static void keep(void* to, const u32 (&from)[COUNT]) {
  inside(to, 4 * COUNT);
  write(to, from);
}
template <int WIDTH, class T> static void put(T* to, const T* from) {
  aligned(to, WIDTH * sizeof(T));
  aligned(from, sizeof(T) == 4 || WIDTH == 1 ? WIDTH * sizeof(T) : 4);
  inside(from, WIDTH * sizeof(T));
  memcpy(to, from, WIDTH * sizeof(T));
}
static void committed() { fibers[threadIdx.x].copies.emplace_back(); }
template <int GROUPS, int THREADS = 0> static void arrived(int team = 0) {
  auto& copies = fibers[threadIdx.x].copies;
  while (copies.size() > GROUPS + 1) {
    for (const Copy& it : copies.front()) carried_out(it);
    copies.erase(copies.begin());
  }
  meet<THREADS>(team);
}
static void clear(unsigned char* at, int bytes, int thread, int threads) {
  for (int e = thread * 16; e < bytes; e += threads * 16) {
    inside(at + e, 16);
    memset(at + e, 0, 16);
  }
}
#if @SINGLE@
static u32 nearest(u32 x) { return (x & 0x7fffffffu) > 0x7f800000u ? x : (x + 0x1000u) & ~0x1fffu; }
#else
static u32 nearest(u32 x) { return x; }
#endif
static u16 settled(u16 x) { return x; }
static float settled(float x) { u32 y; memcpy(&y, &x, 4); return bits(nearest(y)); }
template <int WIDTH, class T> static void gather(T* to, const T* from, int stride) {
  aligned(to, WIDTH * sizeof(T));
  inside(to, WIDTH * sizeof(T));
  for (int i = 0; i < WIDTH; ++i) {
    inside(from + i * stride, sizeof(T));
    to[i] = settled(from[i * stride]);
  }
}
static u32 __byte_perm(u32 low, u32 high, u32 chosen) {
  const unsigned long long both = low | (unsigned long long)high << 32;
  u32 found = 0;
  for (int i = 0; i < 4; ++i) found |= u32(both >> (chosen >> 4 * i & 7) * 8 & 255) << 8 * i;
  return found;
}
static u32 word(u32 at) {
  inside(memory + at, 4);
  aligned(memory + at, 4);
  u32 found;
  memcpy(&found, memory + at, 4);
  return found;
}
template <int COUNT> static void exchange(u32 (&to)[COUNT], u32 at, bool turned) {
  lane(threadIdx.x % 32).mail[0] = at;
  wait_at(AT_WARP);
  int own = threadIdx.x % 32;
  for (int i = 0; i < COUNT; ++i)
    for (int half = 0; half < 2; ++half) {
      int row = own / 4, column = own % 4 * 2 + half;
      if (turned) std::swap(row, column);
      const unsigned char* begin = memory + lane(i * 8 + row).mail[0];
      aligned(begin, 16);
      inside(begin, 16);
      u16 found;
      memcpy(&found, begin + column * 2, 2);
      to[i] = half ? to[i] | (u32)found << 16 : found;
    }
  wait_at(AT_WARP);
}
static u32 rounded_word(u32 at) { return nearest(word(at)); }
static void matrices(u32 (&to)[4], u32 at) { exchange(to, at, false); }
static void rounded_matrices(u32 (&to)[4], u32 at) {
  exchange(to, at, false);
  for (u32& x : to) x = nearest(x);
}
template <int COUNT> static void transposed(u32 (&to)[COUNT], u32 at) { exchange(to, at, true); }
static void transposed(u32 (&first)[2], u32 (&second)[2], u32 at) {
  u32 both[4];
  transposed(both, at);
  first[0] = both[0], first[1] = both[1], second[0] = both[2], second[1] = both[3];
}
static void unpack(u32 (&to)[2], uint2 both) { to[0] = both.x, to[1] = both.y; }
static void multiply(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  u32* mail = lane(threadIdx.x % 32).mail;
  memcpy(mail, a, 16);
  memcpy(mail + 4, b, 8);
  wait_at(AT_WARP);
#if @SINGLE@
  enum { CHUNK = 4, PAIR = 1 };
  auto element = [](u32 word, int) {
    if (word & 0x1fffu && (word & 0x7fffffffu) < 0x7f800000u) { fprintf(stderr, "not rounded\n"); abort(); }
    return bits(word);
  };
#else
  enum { CHUNK = 8, PAIR = 2 };
  auto element = [](u32 word, int k) { return widen((u16)(k % 2 ? word >> 16 : word)); };
#endif
  int own = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 2 * CHUNK; ++k) {
      int row = own / 4 + i / 2 * 8, column = own % 4 * 2 + i % 2;
      u32 left = lane(row % 8 * 4 + k % CHUNK / PAIR).mail[row / 8 + k / CHUNK * 2];
      u32 right = lane(column * 4 + k % CHUNK / PAIR).mail[4 + k / CHUNK];
      sum[i] += element(left, k) * element(right, k);
    }
  wait_at(AT_WARP);
}
static void multiply_half(float (&sum)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  const u32 left[4] = {a[0], a[1]}, right[2] = {b[0]};
  multiply(sum, left, right);
}
"""

FAULTS = {1: "threads wait for others that have ended", 2: "lanes of a warp are at different places"}
LAUNCH = r"""
static void** arguments;
static void start() {
  kernel(@ARGUMENTS@);
  fibers[threadIdx.x].state = DONE;
}
// How a program's threads stand once they have run as far as they can: DONE, AT_CLUSTER, or RUNS if some can
// go on; or what went wrong.
static int standing(int threads) {
  int done = 0, waiting = 0, ready = 0;
  for (const Fiber& each : fibers) {
    done += each.state == DONE;
    waiting += each.state == AT_BLOCK;
    ready += each.state == AT_CLUSTER;
  }
  if (done == threads) return DONE;
  if (ready == threads) return AT_CLUSTER;
  if (waiting + ready + done == threads) {
    if (waiting < threads) return -1;  // some threads wait for others that have ended, or wait elsewhere
    for (Fiber& each : fibers) each.state = RUNS;
    return RUNS;
  }
  bool moves = false;
  for (int first = 0; first < threads; first += 32) {
    int met = 0;
    for (int i = 0; i < 32; ++i) met += fibers[first + i].state == AT_WARP;
    if (met && met < 32) return -2;  // lanes of a warp are at different places
    if (met) for (int i = 0; i < 32; ++i) fibers[first + i].state = RUNS;
    moves |= met > 0;
  }
  for (int team = 0; team < threads / 32; ++team) {
    auto waits = [&](const Fiber& it) { return it.state == AT_TEAM && it.team == team; };
    std::vector<Fiber*> met;
    for (Fiber& each : fibers) if (waits(each)) met.push_back(&each);
    if (met.empty() || (int)met.size() < met[0]->mates) continue;
    for (Fiber* each : met) each->state = RUNS;
    moves = true;
  }
  for (const Fiber& each : fibers) moves |= each.state == RUNS;
  return moves ? RUNS : -1;
}
extern "C" int launch(int count, int threads, void** with) {
  arguments = with;
  for (int first = 0; first < count; first += PROGRAMS) {
    for (own_rank = 0; own_rank < PROGRAMS; ++own_rank) {
      memset(memory, 0xff, sizeof memory);
      fibers = std::vector<Fiber>(threads);
      for (Fiber& made : fibers) {
        made.state = RUNS;
        made.copies.resize(1);
        made.stack.reset(new char[STACK]);
        getcontext(&made.context);
        made.context.uc_stack.ss_sp = made.stack.get();
        made.context.uc_stack.ss_size = STACK;
        made.context.uc_link = &scheduler;
        makecontext(&made.context, start, 0);
      }
    }
    for (int done = 0; done < PROGRAMS;) {
      int ready = done = 0;
      for (own_rank = 0; own_rank < PROGRAMS; ++own_rank) {
        blockIdx.x = first + own_rank;
        int state = RUNS;
        while (state == RUNS) {
          // In every other program the last warp that runs goes on alone as far as it can, ahead of others.
          int last = 0;
          for (int i = 0; i < threads; ++i) if (blockIdx.x % 2 && fibers[i].state == RUNS) last = i / 32 * 32;
          for (int i = last; i < threads; ++i) {
            threadIdx.x = i;
            if (fibers[i].state == RUNS) swapcontext(&scheduler, &fibers[i].context);
          }
          state = standing(threads);
        }
        if (state < 0) return -state;
        if (state == DONE) memset(memory, 0xff, sizeof memory);  // nobody may read it any more
        done += state == DONE;
        ready += state == AT_CLUSTER;
      }
      if (ready && done) return 1;  // some programs wait for others that have ended
      if (!ready) continue;
      for (auto& all : programs) for (Fiber& each : all) each.state = RUNS;
    }
  }
  return 0;
}
"""


class Emulated:
    """Launches a scheduled nest's kernel on tensors of the CPU."""

    def __init__(self, nest: Nest, schedule: Schedule, source: str) -> None:
        self.programs = Programs(nest)
        self.threads = 32 * schedule.hint("warps", 4)
        self.launch = _library(_emulated(nest, source)).launch

    def __call__(self, operands: Sequence[torch.Tensor], out: torch.Tensor, batch: int) -> None:
        number = ctypes.c_int(batch)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (*operands, out)]
        pointers.append(ctypes.cast(ctypes.byref(number), ctypes.c_void_p))
        status = self.launch(self.programs(batch), self.threads, (ctypes.c_void_p * len(pointers))(*pointers))
        assert status == 0, FAULTS[status]

    def entry(self) -> Entry | None:
        return None


def emulated(nest: Nest, schedule: Schedule) -> Kernel:
    """The kernel of a nest and a schedule; ScheduleError: it does not print."""
    scheduled = apply(nest, schedule)
    source = source_of(scheduled, schedule, "triton")
    return Kernel(scheduled, schedule, "triton", Emulated(scheduled, schedule, source))


def _emulated(nest: Nest, source: str) -> str:
    """The printed kernel as C++ for this processor."""
    dtype = nest.tensors[0].dtype
    prelude = PRELUDE.replace("@SHARED@", str(shared_bytes(source)))
    prelude = prelude.replace("@HALF@", str(int(dtype == "float16")))
    prelude = prelude.replace("@SINGLE@", str(int(dtype == "float32")))
    prelude = prelude.replace("@CLUSTER@", str(nest.cluster))
    assert prelude_cuda(dtype) in source and MEMORY in source
    source = source.replace(prelude_cuda(dtype), prelude).replace(MEMORY, "")
    parameters = re.search(r"\nkernel\((.*)\) \{", source)
    assert parameters is not None
    kinds = [part.rsplit(" ", 1)[0].replace("__restrict__", "") for part in parameters[1].split(", ")]
    arguments = [f"({kind})arguments[{i}]" for i, kind in enumerate(kinds[:-1])]
    arguments.append(f"*(int*)arguments[{len(arguments)}]")
    return source + LAUNCH.replace("@ARGUMENTS@", ", ".join(arguments))


@functools.cache
def _library(text: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as place:
        source, made = Path(place, "kernel.cpp"), Path(place, "kernel.so")
        source.write_text(text)
        command = [compiler(), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(made))
