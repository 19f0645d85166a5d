#pragma once

// How the threads of group_norm_silu's kernels walk over items, and the sums of an item's lanes.

#include "fastdiff/async_copy.cuh"
#include "fastdiff/group_norm_silu_lanes.cuh"
#include "fastdiff/group_norm_silu_plan.cuh"

namespace fastdiff {

// What one lane has of an item: `count` vectors. `channel` is that of the first element; in the
// contiguous layout it is that of all.
struct Item {
  int number;
  int segment;
  int channel;
  int count;
};

// The items [begin, end), one after another for each warp; in the contiguous layout several of
// them, next to each other, for as many teams of lanes. Kernels walk over them several times, and
// most warps have one: a walk starts where the last one ended, and goes the other way.
template <bool ChannelsLast, int V>
class Items {
 public:
  const GroupNormTiling& tiling;

  __device__ __forceinline__ Items(const GroupNormLayout& layout, const GroupNormTiling& of_block,
                                   int begin, int end)
      : tiling(of_block),
        layout_(layout),
        begin_(begin),
        end_(end),
        number_(begin + static_cast<int>(threadIdx.x / 32) * per_warp()),
        item_(at(number_)) {}

  // Every lane of a warp calls body for its item, or for none of count 0. Direction: 1, and -1 in
  // the walk after.
  template <int Direction, typename Body>
  __device__ __forceinline__ void walk(const Body& body) {
    const int stride = Direction * static_cast<int>(blockDim.x / 32) * per_warp();
    if (number_ >= end_) return;
#pragma unroll 1
    while (true) {
      body(item_);
      const int next = number_ + stride;
      if (Direction > 0 ? next >= end_ : next < begin_) break;
      number_ = next;
      item_ = at(next);
    }
  }

  // Whether the lane has channels of the item.
  __device__ __forceinline__ bool inside(const Item& item) const {
    if constexpr (ChannelsLast) return side() < tiling.row && item.channel < tiling.channels;
    return item.number < end_;
  }
  __device__ __forceinline__ int pixels(const Item& item) const {
    return static_cast<int>(min(layout_.pixels - first_pixel(item), tiling.segment_pixels));
  }
  // The element of the lane's first vector, counted from the first channel; tiling.step elements
  // from one vector to the next.
  __device__ __forceinline__ int64_t offset(const Item& item) const {
    if constexpr (ChannelsLast) {
      return (first_pixel(item) + team()) * layout_.channels + item.channel;
    }
    return item.channel * layout_.pixels + first_pixel(item) + side() * V;
  }
  // The pixel of that element, and how many pixels the lane's vectors are apart.
  __device__ __forceinline__ int64_t pixel(const Item& item) const {
    return first_pixel(item) + (ChannelsLast ? team() : side() * V);
  }
  __device__ __forceinline__ int pixel_step() const {
    return ChannelsLast ? teams() : tiling.lanes * V;
  }
  // The place on chip of the lane's first vector, in vectors, and the distance of the next.
  __device__ __forceinline__ int slot(const Item& item) const {
    if constexpr (ChannelsLast) {
      return (item.number - begin_) * tiling.item_vectors + team() * tiling.row + side();
    }
    if (by_turns()) {
      return (number_ - begin_) * tiling.item_vectors + team() * tiling.lanes + side();
    }
    return (item.number - begin_) * tiling.item_vectors + side();
  }
  __device__ __forceinline__ int slot_step() const {
    if constexpr (ChannelsLast) return teams() * tiling.row;
    return by_turns() ? min(teams(), end_ - number_) * tiling.lanes : tiling.lanes;
  }
  // How far the lane's first vector is behind that of the item's first pixels of the same channels.
  __device__ __forceinline__ int slots_before() const {
    return ChannelsLast ? team() * tiling.row : side();
  }
  __device__ __forceinline__ int64_t elements_before() const {
    return ChannelsLast ? team() * layout_.channels : int64_t{side() * V};
  }
  // Of the lane's first channel among partial sums: one for each channel of each item of the block.
  __device__ __forceinline__ int place(const Item& item) const {
    return (item.number - begin_) * tiling.block_channels + (ChannelsLast ? side() * V : 0);
  }
  // The mean of the values of the lanes that have the same item, of one channel; exact if they are
  // the same.
  __device__ __forceinline__ float lanes_mean(float value) const {
    value *= __int_as_float((127 - tiling.lane_bits) << 23);  // 1 / lanes
#pragma unroll 1
    for (unsigned offset = tiling.lanes >> 1; offset > 0; offset >>= 1) {
      value += __shfl_xor_sync(~0u, value, offset);
    }
    return value;
  }

 private:
  const GroupNormLayout& layout_;
  const int begin_, end_;
  int number_;
  Item item_;

  __device__ __forceinline__ int side() const { return threadIdx.x & (tiling.lanes - 1); }
  __device__ __forceinline__ int team() const { return threadIdx.x % 32 >> tiling.lane_bits; }
  __device__ __forceinline__ int teams() const { return 32 >> tiling.lane_bits; }
  __device__ __forceinline__ int per_warp() const { return ChannelsLast ? 1 : teams(); }
  // On chip, in the contiguous layout: the items of a warp by turns, so that its accesses are to
  // adjacent slots, if they are whole turns.
  __device__ __forceinline__ bool by_turns() const {
    return (tiling.item_vectors & (tiling.lanes - 1)) == 0;
  }
  __device__ __forceinline__ int64_t first_pixel(const Item& item) const {
    return int64_t{item.segment} * static_cast<int>(tiling.segment_pixels);
  }

  __device__ __forceinline__ Item at(int number) const {
    Item item;
    item.number = ChannelsLast ? number : number + team();
    const int block = tiling.segments == 1 ? item.number
                      : tiling.blocks == 1 ? 0
                                           : item.number / tiling.segments;
    item.segment = item.number - block * tiling.segments;
    item.channel = ChannelsLast ? block * tiling.block_channels + side() * V : block;
    if constexpr (ChannelsLast) {
      const int own = inside(item) ? pixels(item) - team() : 0;
      item.count = own > 0 ? (own + teams() - 1) >> (5 - tiling.lane_bits) : 0;
    } else {
      const int own = inside(item) ? pixels(item) / V - side() : 0;
      item.count = own > 0 ? (own + tiling.lanes - 1) >> tiling.lane_bits : 0;
    }
    return item;
  }
};

// Where the vectors of items are read: a copy on chip, or memory. kSumVectors or kSumPairs are read
// at a time for sums, of one tensor or two, kVectors for results. kSumsWalk: the direction of the
// walk that adds up, which follows that of the copies, if there are any.
template <typename T, int V>
struct OnChip {
  template <bool>
  static constexpr int kSumVectors = 2;
  static constexpr int kSumPairs = 2, kVectors = 2, kSumsWalk = -1;
  static constexpr bool kOnChip = true;
  T* data;

  template <bool ChannelsLast>
  __device__ __forceinline__ LaneVectors<T, V, true> vectors(const Items<ChannelsLast, V>& items,
                                                             const Item& item) const {
    return {data + items.slot(item) * V, items.slot_step() * V};
  }
  template <bool ChannelsLast>
  __device__ __forceinline__ const T* first(const Items<ChannelsLast, V>& items,
                                            const Item& item) const {
    return data + (items.slot(item) - items.slots_before()) * V;
  }
};
template <typename T, int V>
struct InMemory {
  template <bool>
  static constexpr int kSumVectors = 4;
  static constexpr int kSumPairs = 1, kVectors = 2, kSumsWalk = 1;
  static constexpr bool kOnChip = false;
  const void* tensor;
  int64_t base;  // element of the first item's channel 0

  template <bool ChannelsLast>
  __device__ __forceinline__ LaneVectors<T, V, false> vectors(const Items<ChannelsLast, V>& items,
                                                              const Item& item) const {
    return {static_cast<const T*>(tensor) + (base + items.offset(item)), items.tiling.step};
  }
  template <bool ChannelsLast>
  __device__ __forceinline__ const T* first(const Items<ChannelsLast, V>& items,
                                            const Item& item) const {
    return static_cast<const T*>(tensor) + (base + items.offset(item) - items.elements_before());
  }
};

// Starts the copies of the items of tensors, each `distance` elements behind the one before on
// chip. A lane copies what it will read.
template <bool ChannelsLast, int V, typename T, int N>
__device__ __forceinline__ void copy_items(Items<ChannelsLast, V>& items,
                                           const T* const (&tensors)[N], T* data, int distance) {
  items.template walk<1>([&](const Item& item) {
    int64_t from = items.offset(item);
    T* to = data + items.slot(item) * V;
    const int slot_step = items.slot_step() * V;
#pragma unroll(8 / N)
    for (int k = 0; k < item.count; ++k) {
#pragma unroll
      for (int n = 0; n < N; ++n) copy_to_shared<T, V>(to + n * distance, tensors[n] + from);
      from += items.tiling.step;
      to += slot_step;
    }
  });
}

// What a lane has after sum_lanes: the sums of channels [first, first + width) of its V; `own` in
// one of the lanes that have the same.
struct Share {
  int first, width;
  bool own;
};

namespace group_norm_items {

// Adds K sums of `Width` channels over the lanes whose numbers differ in the bits [low, high).
// Lanes high / 2 apart share their channels: each hands over its sums of half of them, and adds up
// the other half. As soon as one channel is left both have its sums.
template <int Width, int K, int A>
__device__ __forceinline__ Share halve(float (&sums)[K][A], int high, int low) {
  if constexpr (Width > 1) {
    if (high == low) return {0, Width, true};
    const bool upper = threadIdx.x & (high >> 1);
#pragma unroll
    for (int k = 0; k < K; ++k) {
#pragma unroll
      for (int a = 0; a < Width / 2; ++a) {
        const float given = upper ? sums[k][a] : sums[k][a + Width / 2];
        const float kept = upper ? sums[k][a + Width / 2] : sums[k][a];
        sums[k][a] = kept + __shfl_xor_sync(~0u, given, high >> 1);
      }
    }
    Share share = halve<Width / 2>(sums, high >> 1, low);
    share.first += upper ? Width / 2 : 0;
    return share;
  } else {
#pragma unroll 1
    for (int offset = high >> 1; offset >= low; offset >>= 1) {
#pragma unroll
      for (int k = 0; k < K; ++k) sums[k][0] += __shfl_xor_sync(~0u, sums[k][0], offset);
    }
    return {0, 1, (threadIdx.x & (high - low)) == 0};
  }
}

}  // namespace group_norm_items

// Adds K sums of A channels over the lanes that have the same channels of an item.
template <bool ChannelsLast, int K, int A>
__device__ __forceinline__ Share sum_lanes(float (&sums)[K][A], int lanes) {
  using namespace group_norm_items;
  return ChannelsLast ? halve<A>(sums, 32, lanes) : halve<A>(sums, lanes, 1);
}

}  // namespace fastdiff
