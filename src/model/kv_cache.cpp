#include "base/tensor.h"

#include "model/kv_cache.h"

namespace trireme {

std::pair<at::Tensor, at::Tensor> KvCache::append(int64_t layer, const at::Tensor& k_TKD, const at::Tensor& v_TKD) {
  const int64_t added = k_TKD.size(0), total = length_ + added;
  Store& store = stores_[static_cast<size_t>(layer)];
  if (!store.k.defined() || store.k.size(0) < total) {
    // Doubling: appending n tokens one by one copies O(n), not O(n^2).
    const int64_t capacity = std::max<int64_t>(total, store.k.defined() ? 2 * store.k.size(0) : 64);
    auto grown = [&](const at::Tensor& from, const at::Tensor& like) {
      at::Tensor to = at::empty({capacity, like.size(1), like.size(2)}, like.options());
      if (length_ > 0) to.narrow(0, 0, length_).copy_(from.narrow(0, 0, length_));
      return to;
    };
    store.k = grown(store.k, k_TKD);
    store.v = grown(store.v, v_TKD);
  }
  store.k.narrow(0, length_, added).copy_(k_TKD);
  store.v.narrow(0, length_, added).copy_(v_TKD);
  return {store.k.narrow(0, 0, total), store.v.narrow(0, 0, total)};
}

}  // namespace trireme
