#include "parallel/gather.h"

#include <map>
#include <set>

#include "base/check.h"
#include "base/json.h"

namespace trireme {
namespace {

struct Piece {
  int holder;
  std::vector<int64_t> offset, shape;
};

struct Whole {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  std::vector<Piece> pieces;  // each slice once, of the first rank that holds it
  const Parameter* mine = nullptr;
};

at::Tensor place_of(const at::Tensor& whole, const Piece& piece) {
  at::Tensor part = whole;
  for (size_t d = 0; d < piece.offset.size(); ++d) part = part.narrow(static_cast<int64_t>(d), piece.offset[d], piece.shape[d]);
  return part;
}

at::Tensor gather(const Whole& whole, const Communicator& world) {
  const bool is_root = world.rank() == 0;
  if (whole.pieces.size() == 1 && whole.pieces[0].holder == 0) return is_root ? whole.mine->value.detach() : at::Tensor();
  const auto options = at::TensorOptions().dtype(whole.dtype);
  at::Tensor out = is_root ? at::empty(whole.shape, options) : at::Tensor();
  for (const Piece& piece : whole.pieces) {
    if (is_root && piece.holder == 0) {
      place_of(out, piece).copy_(whole.mine->value.detach());
    } else if (is_root) {
      at::Tensor part = at::empty(piece.shape, options);
      world.receive(part, piece.holder);
      place_of(out, piece).copy_(part);
    } else if (piece.holder == world.rank()) {
      world.send(whole.mine->value.detach().cpu().contiguous(), 0);
    }
  }
  return out;
}

}  // namespace

std::vector<TensorSource> whole_tensors(const std::vector<Parameter>& slices, const Communicator& world,
                                        const std::function<void(const std::string&)>& hold) {
  Json table = Json::array();
  for (const Parameter& p : slices)
    table.push_back({p.name, static_cast<int>(p.value.scalar_type()), p.shard.global_shape, p.shard.offset, p.value.sizes().vec()});
  Json tables = world.gather_bytes(dump_json(table));
  tables = parse_json(world.broadcast_bytes(dump_json(tables)), "tables of the ranks");

  auto wholes = std::make_shared<std::map<std::string, Whole>>();
  std::vector<std::string> names;
  std::set<std::pair<std::string, std::vector<int64_t>>> known;
  for (int rank = 0; rank < world.size(); ++rank)
    for (const Json& row : parse_json(tables[static_cast<size_t>(rank)].get<std::string>(), "table of a rank")) {
      const auto name = row[0].get<std::string>();
      const auto offset = row[3].get<std::vector<int64_t>>(), shape = row[4].get<std::vector<int64_t>>();
      auto [entry, fresh] = wholes->try_emplace(name);
      Whole& whole = entry->second;
      if (fresh) names.push_back(name), whole.dtype = static_cast<at::ScalarType>(row[1].get<int>()), whole.shape = row[2].get<std::vector<int64_t>>();
      if (known.emplace(name, offset).second) whole.pieces.push_back({rank, offset, shape});
    }
  auto kept = std::make_shared<std::vector<Parameter>>(slices);
  for (const Parameter& p : *kept) wholes->at(p.name).mine = &p;

  std::vector<TensorSource> sources;
  for (const std::string& name : names) {
    const Whole& whole = wholes->at(name);
    int64_t covered = 0;
    for (const Piece& piece : whole.pieces) covered += c10::multiply_integers(piece.shape);
    TRIREME_CHECK(covered == c10::multiply_integers(whole.shape), "the slices of ", name, " hold ", covered, " of its values");
    sources.push_back({name, whole.dtype, whole.shape, [wholes, kept, &whole, world, hold] {
                         if (hold && whole.mine) hold(whole.mine->name);
                         return gather(whole, world);
                       }});
  }
  return sources;
}

}  // namespace trireme
