#include "parallel/buckets.h"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "base/check.h"

namespace trireme {

int64_t block_of(const std::string& name) {
  constexpr std::string_view kBlocks = "model.layers.";
  const size_t found = name.find(kBlocks);
  return found == std::string::npos ? -1 : std::strtoll(name.c_str() + found + kBlocks.size(), nullptr, 10);
}

std::vector<Bucket> cut_buckets(const std::vector<Parameter>& parameters, const std::vector<size_t>& chosen,
                                const Holders& holders, int64_t bucket_bytes, bool by_unit, int64_t align) {
  std::vector<int> sizes;
  for (const Communicator& group : holders.groups) sizes.push_back(group.size());
  return cut_buckets(parameters, chosen, holders.group_of, sizes, bucket_bytes, by_unit, align);
}

std::vector<Bucket> cut_buckets(const std::vector<Parameter>& parameters, const std::vector<size_t>& chosen,
                                const std::vector<size_t>& group_of, const std::vector<int>& group_sizes, int64_t bucket_bytes, bool by_unit,
                                int64_t align) {
  constexpr int64_t kNumBuckets = 8, kSmallest = 64 << 10;
  auto bytes_of = [&](size_t i) {
    const at::Tensor& value = parameters[i].value;
    const at::ScalarType type = value.scalar_type();
    return value.numel() * static_cast<int64_t>(c10::elementSize(c10::elementSize(type) == 1 ? type : gradient_type(type)));  // codes have no gradient
  };
  std::vector<Bucket> buckets;
  for (size_t g = 0; g < group_sizes.size(); ++g) {
    std::vector<size_t> members;
    int64_t total = 0, unit = -2;
    for (size_t i : chosen)
      if (group_of[i] == g) members.push_back(i), total += bytes_of(i);
    std::map<at::ScalarType, std::pair<size_t, int64_t>> open;  // of each dtype the bucket that is being filled, and its bytes
    const int64_t limit = std::min(bucket_bytes, std::max(kSmallest, total / kNumBuckets));
    for (auto i = members.rbegin(); i != members.rend(); ++i) {
      const at::Tensor& value = parameters[*i].value;
      if (const int64_t next = by_unit ? block_of(parameters[*i].name) : -1; next != unit) open.clear(), unit = next;
      const auto [found, is_new] = open.try_emplace(value.scalar_type());
      auto& [number, used] = found->second;
      if (is_new || used + bytes_of(*i) > limit) {
        number = buckets.size(), used = 0;
        buckets.push_back({g, unit, {}, {}, 0, value.options().requires_grad(false)});
      }
      Bucket& bucket = buckets[number];
      bucket.num_elements = (bucket.num_elements + align - 1) / align * align;
      bucket.parameters.push_back(*i);
      bucket.offsets.push_back(bucket.num_elements);
      bucket.num_elements += value.numel();
      used += bytes_of(*i);
    }
  }
  for (Bucket& bucket : buckets) {
    const int64_t size = group_sizes[bucket.group] * align;
    bucket.num_elements = (bucket.num_elements + size - 1) / size * size;
  }
  return buckets;
}

std::vector<PartRange> ranges_of_part(const Bucket& bucket, const std::vector<Parameter>& parameters, int part, int num_parts) {
  const int64_t size = bucket.num_elements / num_parts, first = part * size, last = first + size;
  std::vector<PartRange> ranges;
  for (size_t k = 0; k < bucket.parameters.size(); ++k) {
    const int64_t start = bucket.offsets[k];
    const int64_t begin = std::max(first, start), end = std::min(last, start + parameters[bucket.parameters[k]].value.numel());
    if (begin < end) ranges.push_back({bucket.parameters[k], begin - start, end - start, begin - first});
  }
  return ranges;
}

std::vector<Parameter> rectangles(const std::string& name, const at::Tensor& flat, at::IntArrayRef slice_shape,
                                  const ShardSpec& slice, int64_t begin, int64_t end, int64_t block) {
  if (block > 1) {
    const auto blocks = [&](int64_t elements) { return (elements + block - 1) / block; };
    std::vector<int64_t> shape = slice_shape.vec();
    ShardSpec in_blocks = slice;
    if (slice.global_shape.back() % block == 0) {
      for (int64_t* size : {&shape.back(), &in_blocks.global_shape.back(), &in_blocks.offset.back()}) {
        TRIREME_CHECK(*size % block == 0, name, slice_shape, slice.offset);
        *size /= block;
      }
    } else {
      int64_t place = 0, stride = 1;
      for (size_t d = shape.size(); d-- > 0; stride *= slice.global_shape[d]) place += slice.offset[d] * stride;
      TRIREME_CHECK(place % block == 0, name, slice.offset);
      shape = {blocks(c10::multiply_integers(slice_shape))};
      in_blocks.global_shape = {blocks(stride)}, in_blocks.offset = {place / block};
    }
    return rectangles(name, flat, shape, in_blocks, begin / block, blocks(end));
  }
  TRIREME_CHECK(flat.dim() == 1 && flat.numel() == end - begin, name, flat.sizes(), begin, end);
  std::vector<Parameter> out;
  int64_t done = 0;  // of flat
  while (begin < end) {
    // The largest block of whole sub-tensors at `begin`: dim `d` takes some, those behind it are whole.
    const auto dims = static_cast<int64_t>(slice_shape.size());
    int64_t d = 0, inner = 1;  // elements of one index of dim d
    for (int64_t k = dims - 1; k > 0; --k) inner *= slice_shape[static_cast<size_t>(k)];
    while (d + 1 < dims && (begin % inner != 0 || begin + inner > end)) inner /= slice_shape[static_cast<size_t>(++d)];
    const auto at = static_cast<size_t>(d);
    Parameter piece{name, at::Tensor(), slice};
    piece.shard.replicated = false;
    std::vector<int64_t> shape(slice_shape.begin(), slice_shape.end());
    int64_t count = dims == 0 ? 1 : (end - begin) / inner;
    if (dims > 0) {
      int64_t place = begin / inner;  // in rows of dim d
      count = std::min(count, slice_shape[at] - place % slice_shape[at]);
      shape[at] = count;
      for (size_t k = at;; --k) {
        const int64_t size = slice_shape[k];
        piece.shard.offset[k] += place % size;
        place /= size;
        if (k < at) shape[k] = 1;
        if (k == 0) break;
      }
    }
    const int64_t length = count * inner;
    piece.value = flat.narrow(0, done, length).view(shape);
    out.push_back(std::move(piece));
    begin += length, done += length;
  }
  return out;
}

}  // namespace trireme
