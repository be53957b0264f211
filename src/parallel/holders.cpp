#include "parallel/holders.h"

#include <algorithm>
#include <map>

#include "base/check.h"
#include "base/hash.h"
#include "base/json.h"

namespace trireme {
namespace {

Json row_of(const Parameter& p) {
  return {p.name, trireme::str(p.value.scalar_type(), p.value.requires_grad() ? " trained" : " frozen"), p.shard.global_shape,
          p.shard.offset, p.value.sizes().vec()};
}

std::string table_of(const std::vector<Parameter>& parameters) {
  std::string text;
  for (const Parameter& p : parameters) text += dump_json(row_of(p)) + "\n";
  return text;
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (int64_t size : shape) n *= size;
  return n;
}

using Ranks = std::vector<int>;
using Slice = std::tuple<std::string, std::vector<int64_t>, std::vector<int64_t>>;  // name, offset, shape

// Who holds each slice, from the tables of all ranks; alike on every rank.
std::map<Slice, Ranks> holders_of_slices(const std::vector<std::string>& tables) {
  struct Whole {
    std::string kind;
    std::vector<int64_t> shape;
    int64_t covered = 0;
  };
  std::map<std::string, Whole> wholes;
  std::map<Slice, Ranks> slices;
  for (size_t rank = 0; rank < tables.size(); ++rank)
    for (size_t begin = 0; begin < tables[rank].size();) {
      const size_t end = tables[rank].find('\n', begin);
      const Json row = parse_json(tables[rank].substr(begin, end - begin), "table of parameters");
      begin = end + 1;
      const auto name = row[0].get<std::string>();
      const auto shape = row[4].get<std::vector<int64_t>>();
      Whole& whole = wholes.try_emplace(name, Whole{row[1], row[2]}).first->second;
      TRIREME_CHECK(whole.kind == row[1] && whole.shape == row[2].get<std::vector<int64_t>>(), name, " is ", dump_json(row),
                    " on rank ", rank, ", another on a rank before");
      Ranks& ranks = slices[{name, row[3].get<std::vector<int64_t>>(), shape}];
      TRIREME_CHECK(ranks.empty() || ranks.back() != static_cast<int>(rank), name, " appears twice on rank ", rank);
      if (ranks.empty()) whole.covered += product(shape);
      ranks.push_back(static_cast<int>(rank));
    }
  for (const auto& [name, whole] : wholes)
    TRIREME_CHECK(whole.covered == product(whole.shape), "the slices of ", name, " hold ", whole.covered, " of its ",
                  product(whole.shape), " values");
  return slices;
}

}  // namespace

Holders same_holders(const std::vector<Parameter>& parameters, const Communicator& group) {
  const std::string table = table_of(parameters), rank0 = group.broadcast_bytes(table);
  TRIREME_CHECK(group.agree(table != rank0) == 0, "the ranks of a data-parallel group train different parameters; here:\n",
                table, "on its rank 0:\n", rank0);
  return {group, {group}, std::vector<size_t>(parameters.size(), 0)};
}

Holders find_holders(const std::vector<Parameter>& parameters, const MeshComms& comms) {
  const Communicator& world = comms.world;
  if (comms.data.size() == world.size()) {
    Holders holders = same_holders(parameters, comms.data);
    holders.all = world;
    return holders;
  }
  const Json gathered = world.gather_bytes(table_of(parameters));
  const auto tables =
      parse_json(world.broadcast_bytes(dump_json(gathered)), "tables of the ranks").get<std::vector<std::string>>();
  const std::map<Slice, Ranks> slices = holders_of_slices(tables);

  std::map<Ranks, size_t> numbers;  // of the distinct sets, in order
  for (const auto& [slice, ranks] : slices) numbers.emplace(ranks, 0);
  Holders holders;
  holders.all = world;
  // Sets without a rank in common are made by one split.
  std::vector<std::vector<bool>> taken;  // rounds x ranks
  std::map<Ranks, std::pair<size_t, int>> places;  // round, first rank
  for (const auto& [ranks, number] : numbers) {
    if (ranks.size() == 1 || ranks == comms.mesh.group(ranks[0], MeshAxis::kData)) continue;
    size_t round = 0;
    auto free = [&](const std::vector<bool>& used) {
      return std::none_of(ranks.begin(), ranks.end(), [&](int r) { return used[static_cast<size_t>(r)]; });
    };
    while (round < taken.size() && !free(taken[round])) ++round;
    if (round == taken.size()) taken.emplace_back(static_cast<size_t>(world.size()));
    for (int r : ranks) taken[round][static_cast<size_t>(r)] = true;
    places[ranks] = {round, ranks[0]};
  }
  auto mine = [&](const Ranks& ranks) { return std::binary_search(ranks.begin(), ranks.end(), world.rank()); };
  std::vector<Communicator> split;
  for (size_t round = 0; round < taken.size(); ++round) {
    int color = -1;
    for (const auto& [ranks, place] : places)
      if (place.first == round && mine(ranks)) color = place.second;
    split.push_back(world.split(color, comms.coords.data * world.size() + world.rank(), "holders"));
  }
  for (auto& [ranks, number] : numbers) {
    if (!mine(ranks)) continue;
    number = holders.groups.size();
    auto place = places.find(ranks);
    holders.groups.push_back(place != places.end() ? split[place->second.first]
                             : ranks.size() == 1   ? Communicator::self()
                                                   : comms.data);
  }
  for (const Parameter& p : parameters)
    holders.group_of.push_back(numbers.at(slices.at({p.name, p.shard.offset, p.value.sizes().vec()})));
  for (size_t g = 0; g < holders.groups.size(); ++g) {  // in the order of the groups, which is that of every member
    std::vector<Parameter> members;
    for (size_t i = 0; i < parameters.size(); ++i)
      if (holders.group_of[i] == g) members.push_back(parameters[i]);
    same_holders(members, holders.groups[g]);
  }
  return holders;
}

void check_parameters_equal(const std::vector<Parameter>& parameters, const Holders& holders) {
  std::string different, rank0s;
  for (size_t g = 0; g < holders.groups.size(); ++g) {
    std::string hashes;
    std::vector<const Parameter*> members;
    for (size_t i = 0; i < parameters.size(); ++i) {
      if (holders.group_of[i] != g) continue;
      const at::Tensor value = parameters[i].value.detach().contiguous().cpu();
      hashes += hash_bytes(value.const_data_ptr(), value.nbytes());
      members.push_back(&parameters[i]);
    }
    const std::string first = holders.groups[g].broadcast_bytes(hashes);
    for (size_t i = 0; i < members.size() && different.empty(); ++i)
      if (first.compare(i * 32, 32, hashes, i * 32, 32) != 0) different = members[i]->name;
  }
  if (holders.all.agree(different.empty() ? 0 : 1) == 0) return;
  throw SystemError(different.empty()
                        ? "the parameters of another rank differ from those of the first rank that holds the same"
                        : str("parameter ", different, " differs from that of the first rank that holds the same: a rank has lost step"));
}

}  // namespace trireme
