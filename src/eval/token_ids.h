// Rows of ids that somebody brings along (eval.token_ids), so that another program can evaluate the very same.
#pragma once

#include "base/json.h"
#include "data/batch.h"

namespace trireme {

// `json`: an array of arrays of ids, none empty. A batch each, of one segment; every token but the first is a target.
// DataError, beginning with `source`: another form, or an id outside of [0, vocab_size).
std::vector<SequenceBatch> token_ids_from_json(const Json& json, int64_t vocab_size, const std::string& source);

}  // namespace trireme
