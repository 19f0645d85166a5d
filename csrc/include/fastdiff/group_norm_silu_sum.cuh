#pragma once

// The sum x + residual + sum_bias that the residual kernels of group_norm_silu normalize: made of
// its summands where a lane reads it, rounded, and written where it does.

#include "fastdiff/group_norm_silu_blocks.cuh"

namespace fastdiff {

// Vectors of one lane, `step` elements apart.
template <typename T, bool ChannelsLast, int V>
struct SummedVectors {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  static constexpr int kBiases = ChannelsLast ? L::kFloats : 1;
  const GroupNormSiluArgs& args;
  int64_t first;  // element of the tensors
  int64_t step;
  Float bias[kBiases];

  // All reads first, as the compiler moves none of them across a write.
  template <int R>
  __device__ __forceinline__ void load(Vector<T, V> (&to)[R]) const {
    Vector<T, V> others[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      to[r] = load_global<T, V>(x() + r * step);
      others[r] = load_global<T, V>(residual() + r * step);
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      to[r] = added(to[r], others[r]);
      L::store(static_cast<T*>(args.sum) + first + r * step, to[r]);
    }
  }
  __device__ __forceinline__ void skip(int count) { first += count * step; }
  // The vector at the item's first pixels.
  template <typename First>
  __device__ __forceinline__ Vector<T, V> at(const First& first) const {
    return added(load_global<T, V>(first.x), load_global<T, V>(first.residual));
  }
  // The first element.
  __device__ __forceinline__ T element() const {
    return from_float<T>(to_float(__ldg(x())) + to_float(__ldg(residual())) + first_of(bias[0]));
  }

 private:
  __device__ __forceinline__ const T* x() const { return static_cast<const T*>(args.x) + first; }
  __device__ __forceinline__ const T* residual() const {
    return static_cast<const T*>(args.residual) + first;
  }
  __device__ __forceinline__ Vector<T, V> added(const Vector<T, V>& a,
                                                const Vector<T, V>& b) const {
    Float sums[L::kFloats];
#pragma unroll
    for (int j = 0; j < L::kFloats; ++j) {
      sums[j] = add(add(L::widen(a, j), L::widen(b, j)), bias[j % kBiases]);
    }
    return L::narrow(sums);
  }
};

// Its bias, one value per channel: on chip, as every item reads it.
using SumBias = ChannelTable<1>;

// That of channels [first, first + count); followed by a barrier.
template <typename T>
__device__ __forceinline__ void load_sum_bias(const GroupNormSiluArgs& args, int first, int count,
                                              const SumBias& bias) {
  for (int c = threadIdx.x; c < count; c += blockDim.x) {
    bias(c, 0) = load_operand<T>(args.sum_bias, 0, first + c, 0.0f);
  }
}

// The sum from element `base` of the tensors on; the bias of an item's channel c is in place c -
// first.
template <typename T, int V>
struct SummedInMemory {
  // Biases of eight channels leave no registers for a second one.
  template <bool ChannelsLast>
  static constexpr int kSumVectors = ChannelsLast && V > 4 ? 1 : 2;
  static constexpr int kSumsWalk = 1;
  const GroupNormSiluArgs& args;
  int64_t base;
  SumBias bias;
  int first_channel;

  template <bool ChannelsLast>
  __device__ __forceinline__ SummedVectors<T, ChannelsLast, V> vectors(
      const Items<ChannelsLast, V>& items, const Item& item) const {
    using L = Lane<T, V>;
    SummedVectors<T, ChannelsLast, V> vectors = {args, base + items.offset(item),
                                                 items.tiling.step};
    if (items.inside(item)) {
      typename L::Float biases[L::kFloats];
      L::template coefficients<ChannelsLast>(bias, item.channel - first_channel, 0, biases);
#pragma unroll
      for (int j = 0; j < vectors.kBiases; ++j) vectors.bias[j] = biases[j];
    }
    return vectors;
  }

  // Of the lane's channels at the item's first pixels.
  struct First {
    const SummedInMemory& source;
    const T *x, *residual;
    int channel;

    __device__ __forceinline__ T operator[](int i) const {
      return from_float<T>(to_float(__ldg(x + i)) + to_float(__ldg(residual + i)) +
                           source.bias(channel + i, 0));
    }
  };
  template <bool ChannelsLast>
  __device__ __forceinline__ First first(const Items<ChannelsLast, V>& items,
                                         const Item& item) const {
    const int64_t element = base + items.offset(item) - items.elements_before();
    return {*this, static_cast<const T*>(args.x) + element,
            static_cast<const T*>(args.residual) + element, item.channel - first_channel};
  }
};

// Writes the items of the sum to memory and on chip. A lane writes what it will read.
template <bool ChannelsLast, int V, typename T>
__device__ __forceinline__ void sum_items(Items<ChannelsLast, V>& items,
                                          const SummedInMemory<T, V>& source, T* data) {
  using Access = typename Vector<T, V>::Access;
  items.template walk<1>([&](const Item& item) {
    if (item.count == 0) return;
    auto vectors = source.vectors(items, item);
    T* to = data + items.slot(item) * V;
    const int slot_step = items.slot_step() * V;
    in_steps<4>(item.count, [&](auto R) {
      Vector<T, V> sums[R];
      vectors.load(sums);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        *reinterpret_cast<Access*>(to + r * slot_step) = sums[r].packets[0];
      }
      vectors.skip(R);
      to += R * slot_step;
    });
  });
}

}  // namespace fastdiff
