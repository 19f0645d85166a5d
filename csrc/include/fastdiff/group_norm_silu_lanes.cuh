#pragma once

// What a thread of group_norm_silu's kernels does with its vectors: elements as floats,
// coefficients per channel, the activation.

#include <cstring>
#include <type_traits>

#include "fastdiff/float_pair.cuh"
#include "fastdiff/group_norm_silu.h"
#include "fastdiff/vector_io.cuh"

namespace fastdiff {

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_global(const T* from) {
  using Access = typename Vector<T, V>::Access;
  Vector<T, V> vector;
  vector.packets[0] = __ldg(reinterpret_cast<const Access*>(from));
  return vector;
}

template <typename T, int V>
__device__ __forceinline__ Vector<T, V> load_shared(const T* from) {
  using Access = typename Vector<T, V>::Access;
  Vector<T, V> vector;
  vector.packets[0] = *reinterpret_cast<const Access*>(from);
  return vector;
}

// Coefficients of a channel: of z = slope (x - center) + offset, and in the backward pass two more,
// which give way to others when the sums are known.
enum Coefficient {
  kMinusCenter,
  kSlope,
  kOffset,
  kRstd,
  kGamma,
  kLinear = kRstd,
  kConstant = kGamma
};

// K coefficients per channel, those of four channels together, so that all that a lane reads lie at
// constant distances from one address.
template <int K>
struct ChannelTable {
  static constexpr int kCoefficients = K;
  float* floats;

  __device__ __forceinline__ float& operator()(int channel, int k) const {
    const unsigned c = static_cast<unsigned>(channel);
    return floats[c / 4 * (4 * K) + c % 4 + 4 * k];
  }
};

using AffineTable = ChannelTable<3>;

// The V elements of a vector as floats, in pairs if there are two.
template <typename T, int V>
struct Lane {
  using Float = std::conditional_t<V == 1, float, float2>;
  static constexpr int kElements = V, kFloats = V == 1 ? 1 : V / 2;

  // Float j.
  static __device__ __forceinline__ Float widen(const Vector<T, V>& from, int j) {
    if constexpr (V == 1) {
      return to_float(from.values[0]);
    } else if constexpr (sizeof(T) == 4) {
      return {from.values[2 * j], from.values[2 * j + 1]};
    } else {
      uint32_t words[kFloats];
      memcpy(words, &from, sizeof(words));
      return pair_of(words[j]);
    }
  }

  static __device__ __forceinline__ Vector<T, V> narrow(const Float (&from)[kFloats]) {
    Vector<T, V> vector;
    if constexpr (V == 1) {
      vector.values[0] = from_float<T>(from[0]);
    } else if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int j = 0; j < kFloats; ++j) {
        vector.values[2 * j] = from[j].x, vector.values[2 * j + 1] = from[j].y;
      }
    } else {
      uint32_t words[kFloats];
#pragma unroll
      for (int j = 0; j < kFloats; ++j) words[j] = word_of(from[j]);
      memcpy(&vector, words, sizeof(words));
    }
    return vector;
  }

  // An intrinsic, because the compiler splits a plain store of 16 bytes into its elements where it
  // unrolls, and does not always join them again.
  static __device__ __forceinline__ void store(T* to, const Vector<T, V>& vector) {
    __stwb(reinterpret_cast<typename Vector<T, V>::Access*>(to), vector.packets[0]);
  }

  // Coefficient k of the V channels from `channel` on; in the contiguous layout of one channel.
  template <bool ChannelsLast, int K>
  static __device__ __forceinline__ void coefficients(const ChannelTable<K>& table, int channel,
                                                      int k, Float (&to)[kFloats]) {
    const float* from = &table(channel, k);
    if constexpr (!ChannelsLast || V == 1) {
      const Float of_channel = broadcast<Float>(from[0]);
#pragma unroll
      for (int j = 0; j < kFloats; ++j) to[j] = of_channel;
    } else if constexpr (V == 2) {
      to[0] = *reinterpret_cast<const float2*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < kFloats; ++j) {
        const float4 four = *reinterpret_cast<const float4*>(from + j / 2 * 4 * K);
        to[j] = j % 2 ? float2{four.z, four.w} : float2{four.x, four.y};
      }
    }
  }

  // Sums of pairs as sums of A = V channels or, in the contiguous layout, of A = 1.
  template <int S, int A>
  static __device__ __forceinline__ void split(const Float (&from)[S], float (&to)[A]) {
    if constexpr (A == 1) {
      to[0] = total(from[0]);
    } else {
#pragma unroll
      for (int j = 0; j < S; ++j) to[2 * j] = from[j].x, to[2 * j + 1] = from[j].y;
    }
  }

 private:
  static __device__ __forceinline__ float2 pair_of(uint32_t word) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // Permuting bytes instead of shifting: shifts take turns with the multiply-adds on sm_80.
      return {__uint_as_float(__byte_perm(word, 0, 0x1044)), __uint_as_float(word & 0xFFFF0000u)};
    } else {
      __half2 pair;
      memcpy(&pair, &word, sizeof(pair));
      return __half22float2(pair);
    }
  }
  static __device__ __forceinline__ uint32_t word_of(float2 values) {
    uint32_t word;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      const __nv_bfloat162 pair = __float22bfloat162_rn(values);
      memcpy(&word, &pair, sizeof(word));
    } else {
      const __half2 pair = __float22half2_rn(values);
      memcpy(&word, &pair, sizeof(word));
    }
    return word;
  }
};

// Vectors of one lane, `step` elements apart, in shared or global memory.
template <typename T, int V, bool Shared>
struct LaneVectors {
  std::conditional_t<Shared, T, const T>* from;
  std::conditional_t<Shared, int, int64_t> step;

  static __device__ __forceinline__ Vector<T, V> at(const T* address) {
    if constexpr (Shared) {
      return load_shared<T, V>(address);
    } else {
      return load_global<T, V>(address);
    }
  }
  __device__ __forceinline__ Vector<T, V> operator[](int k) const { return at(from + k * step); }
  template <int R>
  __device__ __forceinline__ void load(Vector<T, V> (&to)[R]) const {
#pragma unroll
    for (int r = 0; r < R; ++r) to[r] = (*this)[r];
  }
  __device__ __forceinline__ void replace(int k, const Vector<T, V>& vector) const {
    using Access = typename Vector<T, V>::Access;
    *reinterpret_cast<Access*>(from + k * step) = vector.packets[0];
  }
  // The first element.
  __device__ __forceinline__ T element() const { return from[0]; }
  __device__ __forceinline__ void skip(int count) { from += count * step; }
};

// Calls body(constant R) for R vectors at a time, and body(constant 1) for what is left of `count`.
template <int R, typename Body>
__device__ __forceinline__ void in_steps(int count, const Body& body) {
#pragma unroll 1
  for (; count >= R; count -= R) body(std::integral_constant<int, R>{});
  if constexpr (R > 1) {
#pragma unroll 1
    for (; count > 0; --count) body(std::integral_constant<int, 1>{});
  }
}

// Of SiLU, act(z) = z sigmoid(z) with sigmoid(z) = 1 / (1 + 2^(-z / ln 2)), or of the identity.
//
// With u = 2^-24, the exponential is off by at most (1.5 |z| + 4) u and the quotient by 4 u,
// relatively. The first goes into z sigmoid(z) times 1 - sigmoid(z). As |z| (1 - sigmoid(z)) < 0.3
// for z > 0, and |z| sigmoid(z) < 0.3 for z < 0, silu is off by at most (0.5 + 8) |z| u. Beyond
// |z| = 87 the exponential over- or underflows to the right limit.
template <bool Silu>
struct Gate {
  // act(z)
  template <typename Float>
  static __device__ __forceinline__ Float activate(Float z) {
    if constexpr (!Silu) return z;
    return multiply(z, sigmoid(z));
  }
  // grad act'(z), of SiLU grad s (1 + z (1 - s))
  template <typename Float>
  static __device__ __forceinline__ Float gradient(Float grad, Float z) {
    if constexpr (!Silu) return grad;
    const Float s = sigmoid(z), scaled = multiply(grad, s);
    return multiply_add(scaled, multiply_add(negative(z), s, z), scaled);
  }

 private:
  template <typename Float>
  static __device__ __forceinline__ Float sigmoid(Float z) {
    const Float power = fast_exp2(multiply(z, broadcast<Float>(-1.44269504f)));
    return fast_reciprocal(add(power, broadcast<Float>(1.0f)));
  }
};

// Calls body with the gate: a branch outside of loops, where the compiler would split them and with
// them 16-byte stores.
template <typename Body>
__device__ __forceinline__ void with_gate(Activation activation, const Body& body) {
  if (activation == Activation::kSilu) {
    body(Gate<true>{});
  } else {
    body(Gate<false>{});
  }
}

}  // namespace fastdiff
