#pragma once

// The gradient of a sum that group_norm_silu normalized: what comes to it from elsewhere is added
// to grad_x, and grad_x is summed over pixels for the bias of the sum.

#include "fastdiff/group_norm_silu_gradients.cuh"

namespace fastdiff {

// A sum over pixels of grad_x.
struct ChannelSum {
  static constexpr int kFloats = 1;
  float sum = 0.0f;

  __device__ __forceinline__ void merge(const ChannelSum& other) { sum += other.sum; }
  __device__ __forceinline__ ChannelSum other_lane(int offset) const {
    return {__shfl_xor_sync(~0u, sum, offset)};
  }
  __device__ __forceinline__ float value(int) const { return sum; }
  template <typename Load>
  static __device__ __forceinline__ ChannelSum from(float, const Load& load) {
    return {load(0)};
  }
};

// Vectors of one lane.
template <typename T, bool ChannelsLast, int V>
struct AddedVectors {
  using L = Lane<T, V>;
  using Float = typename L::Float;
  static constexpr int kMost = 2, kSums = ChannelsLast ? L::kFloats : 1;
  const T* from;  // null: zeros
  const Items<ChannelsLast, V>& items;
  const Item& item;
  float* partials;  // of the item; null: no sums
  Vector<T, V> loaded[kMost];
  Float sums[kSums];

  template <int R>
  __device__ __forceinline__ void load(std::integral_constant<int, R>) {
    static_assert(R <= kMost);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (from) {
        loaded[r] = load_global<T, V>(from + r * items.tiling.step);
      } else {
        loaded[r].packets[0] = {};
      }
    }
    if (from) from += R * items.tiling.step;
  }
  // To a vector of grad_x.
  __device__ __forceinline__ void add_to(int r, Float (&values)[L::kFloats]) {
#pragma unroll
    for (int j = 0; j < L::kFloats; ++j) {
      values[j] = add(values[j], L::widen(loaded[r], j));
      sums[j % kSums] = add(sums[j % kSums], values[j]);
    }
  }
  __device__ __forceinline__ void finish() {
    constexpr int A = ChannelsLast ? V : 1;
    if (!partials) return;
    float of_lane[1][A];
    L::split(sums, of_lane[0]);
    const Share share = sum_lanes<ChannelsLast>(of_lane, items.tiling.lanes);
    if (!items.inside(item) || !share.own) return;
#pragma unroll
    for (int a = 0; a < A; ++a) {
      if (a < share.width) partials[items.place(item) + share.first + a] = of_lane[0][a];
    }
  }
};

// At element `base` of grad_sum begin the items; `partials` has room for one sum per channel of
// each, or is null.
template <typename T, int V>
struct SumGradient {
  static constexpr bool kAdds = true;
  const void* grad_sum;  // null: zeros
  int64_t base;
  float* partials;

  template <bool ChannelsLast>
  __device__ __forceinline__ AddedVectors<T, ChannelsLast, V> vectors(
      const Items<ChannelsLast, V>& items, const Item& item) const {
    using Float = typename Lane<T, V>::Float;
    AddedVectors<T, ChannelsLast, V> vectors = {
        grad_sum ? static_cast<const T*>(grad_sum) + (base + items.offset(item)) : nullptr, items,
        item, partials};
#pragma unroll
    for (int j = 0; j < vectors.kSums; ++j) vectors.sums[j] = broadcast<Float>(0.0f);
    return vectors;
  }
};

// grad_x is that of the norm alone.
struct NoSumGradient {
  static constexpr bool kAdds = false;

  struct Vectors {
    template <int R>
    __device__ __forceinline__ void load(std::integral_constant<int, R>) {}
    template <typename Values>
    __device__ __forceinline__ void add_to(int, Values&) {}
    __device__ __forceinline__ void finish() {}
  };
  template <typename Items>
  __device__ __forceinline__ Vectors vectors(const Items&, const Item&) const {
    return {};
  }
};

// A block's part of the sums over samples and pixels: of its items' partial sums, by all threads of
// the samples that are side by side in it, whose `totals` are `distance` bytes apart.
template <typename T>
__device__ __forceinline__ void store_sum_gradient(const GroupNormSiluBackwardArgs& args,
                                                   const GroupNormPlan& plan,
                                                   const UnitBlock& block, const float* partials,
                                                   float* totals, int64_t distance) {
  const GroupNormTiling& tiling = plan.tiling;
  const int width = tiling.block_channels;
  __syncthreads();
  merge_channels<ChannelSum>(
      tiling.channels, tiling.segments,
      [&](int c, int segment) {
        const int strip = width == 1 ? c : c / width;
        const int item = strip * tiling.segments + segment;
        const bool own = item >= block.begin() && item < block.end();
        const int place = (item - block.begin()) * width + c - strip * width;
        return ChannelSum{own ? partials[place] : 0.0f};
      },
      [&](int c, const ChannelSum& sum) { totals[c] = sum.sum; });
  __syncthreads();
  if (threadIdx.y) return;
  const GradientWorkspace workspace(args.workspace, args.layout, plan);
  const int64_t row = block.sample() / plan.samples * plan.cluster + block.rank();
  for (int c = threadIdx.x; c < tiling.channels; c += blockDim.x) {
    const char* from = reinterpret_cast<const char*>(totals + c);
    float total = 0.0f;
    for (int i = 0; i < plan.samples; ++i, from += distance) {
      total += *reinterpret_cast<const float*>(from);
    }
    const int64_t channel = block.channel() + c;
    if (workspace.sum_rows == 1) {
      store_gradient<T>(args.grad_sum_bias, channel, total);
    } else {
      workspace.sums[row * args.layout.channels + channel] = total;
    }
  }
}

}  // namespace fastdiff
