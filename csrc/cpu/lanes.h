#pragma once

// Loops over kLanes elements of a tensor at a time, whatever they are stored as.

#include "bfloat16.h"
#include "float16.h"

namespace fastdiff::cpu {

// Two vectors of AVX2: with one, each addition to a sum would wait for the one before.
constexpr int kLanes = 16;

// The sum over N lanes, halves onto halves: compilers add up the lanes of an `omp simd reduction`
// one after the other, which takes as long as 60 elements.
template <int N, typename F>
FASTDIFF_HD F add_lanes(F* lanes) {
  if constexpr (N > 1) {
#pragma omp simd
    for (int l = 0; l < N / 2; ++l) lanes[l] += lanes[l + N / 2];
    return add_lanes<N / 2>(lanes);
  }
  return lanes[0];
}

// How values lie in memory: Type there, F in registers.
//
// each(fn, x...) calls fn(lane, x[i]...) and map(y, fn, x...) assigns y[i] = fn(lane, x[i]...), for
// the kLanes elements from x and y on. Every element has a lane of its own, not always of its own
// number.
template <typename T, typename Float, Float (*kLoad)(T), T (*kStore)(Float)>
struct Values {
  using Type = T;
  using F = Float;
  static FASTDIFF_HD F load(T value) { return kLoad(value); }
  static FASTDIFF_HD T store(F value) { return kStore(value); }

  template <typename Fn, typename... In>
  static FASTDIFF_HD void each(const Fn& fn, const In* __restrict... x) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) fn(l, load(x[l])...);
  }
  template <typename Fn, typename... In>
  static FASTDIFF_HD void map(T* __restrict y, const Fn& fn, const In* __restrict... x) {
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) y[l] = store(fn(l, load(x[l])...));
  }
};

template <typename T>
FASTDIFF_HD T identity(T value) {
  return value;
}
template <typename T>
using Plain = Values<T, T, identity<T>, identity<T>>;

FASTDIFF_HD float half_to_float(uint16_t bits) { return float16_to_float(bits); }
using Float16 = Values<uint16_t, float, half_to_float, round_to_float16>;

FASTDIFF_HD float bfloat16_to_float(uint16_t bits) { return bits_to_float(uint32_t{bits} << 16); }
FASTDIFF_HD uint16_t float_to_bfloat16(float value) {
  return static_cast<uint16_t>(round_to_bfloat16(value) >> 16);
}

// Neighbours are the halves of one 32-bit lane, so that vectors need not be widened and narrowed:
// the first halves have the lower lanes.
struct BFloat16 : Values<uint16_t, float, bfloat16_to_float, float_to_bfloat16> {
  static constexpr int kPairs = kLanes / 2;

  static FASTDIFF_HD const Pair* pairs(const uint16_t* x) {
    return reinterpret_cast<const Pair*>(x);
  }

  template <typename Fn, typename... In>
  static FASTDIFF_HD void each(const Fn& fn, const In* __restrict... x) {
#pragma omp simd
    for (int l = 0; l < kPairs; ++l) {
      fn(l, low(pairs(x)[l])...);
      fn(l + kPairs, high(pairs(x)[l])...);
    }
  }
  template <typename Fn, typename... In>
  static FASTDIFF_HD void map(uint16_t* __restrict y, const Fn& fn, const In* __restrict... x) {
    Pair* __restrict out = reinterpret_cast<Pair*>(y);
#pragma omp simd
    for (int l = 0; l < kPairs; ++l) {
      out[l] = bfloat16_pair(fn(l, low(pairs(x)[l])...), fn(l + kPairs, high(pairs(x)[l])...));
    }
  }
};

}  // namespace fastdiff::cpu
