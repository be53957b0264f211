#include "base/tensor.h"

#include "model/kv_cache.h"

#include "base/check.h"

namespace trireme {

KvCache::KvCache(int64_t num_layers, int64_t num_sequences)
    : stores_(static_cast<size_t>(num_layers), std::vector<Store>(static_cast<size_t>(num_sequences))),
      lengths_(static_cast<size_t>(num_sequences), 0) {}

std::pair<at::Tensor, at::Tensor> KvCache::append(int64_t layer, const at::Tensor& k_TKD, const at::Tensor& v_TKD,
                                                  const std::vector<int64_t>& cu_seqlens) {
  TRIREME_CHECK(static_cast<int64_t>(cu_seqlens.size()) == num_sequences() + 1, cu_seqlens.size());
  std::vector<at::Tensor> keys, values;
  for (size_t s = 0; s < lengths_.size(); ++s) {
    int64_t old = lengths_[s], added = cu_seqlens[s + 1] - cu_seqlens[s], total = old + added;
    Store& store = stores_[static_cast<size_t>(layer)][s];
    if (!store.k.defined() || store.k.size(0) < total) {
      // Doubling: appending n tokens one by one copies O(n), not O(n^2).
      int64_t capacity = std::max<int64_t>(total, store.k.defined() ? 2 * store.k.size(0) : 64);
      auto grown = [&](const at::Tensor& from, const at::Tensor& like) {
        at::Tensor to = at::empty({capacity, like.size(1), like.size(2)}, like.options());
        if (old > 0) to.narrow(0, 0, old).copy_(from.narrow(0, 0, old));
        return to;
      };
      store.k = grown(store.k, k_TKD);
      store.v = grown(store.v, v_TKD);
    }
    store.k.narrow(0, old, added).copy_(k_TKD.narrow(0, cu_seqlens[s], added));
    store.v.narrow(0, old, added).copy_(v_TKD.narrow(0, cu_seqlens[s], added));
    keys.push_back(store.k.narrow(0, 0, total));
    values.push_back(store.v.narrow(0, 0, total));
  }
  if (keys.size() == 1) return {keys[0], values[0]};
  return {at::cat(keys), at::cat(values)};
}

std::vector<int64_t> KvCache::cu_seqlens_after(const std::vector<int64_t>& cu_seqlens) const {
  std::vector<int64_t> out = {0};
  for (size_t s = 0; s < lengths_.size(); ++s) out.push_back(out.back() + lengths_[s] + cu_seqlens[s + 1] - cu_seqlens[s]);
  return out;
}

void KvCache::advance(const std::vector<int64_t>& cu_seqlens) {
  for (size_t s = 0; s < lengths_.size(); ++s) lengths_[s] += cu_seqlens[s + 1] - cu_seqlens[s];
}

}  // namespace trireme
