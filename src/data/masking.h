// A record as token ids and which of them are learnt.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/records.h"
#include "data/tokenizer.h"

namespace trireme {

class ChatTemplate;

struct EncodedRecord {
  std::string text;              // what was tokenised: the rendered chat, prompt + separator + completion, or the text
  std::vector<int64_t> ids;
  std::vector<std::pair<int64_t, int64_t>> offsets;  // of ids in text, in Unicode characters; only where asked for
  std::vector<uint8_t> learnt;   // 1: the model learns to produce this token; the first is never learnt
};

struct EncodeOptions {
  bool learn_all = false;        // data.learn=all: everything but the first token
  int64_t bos_id = -1, eos_id = -1;  // of the tokenizer; -1: it has none
  int64_t embedding_rows = 0;    // ids must be below; 0: not checked
  std::string template_args;     // a JSON object of extra variables for the chat template, or empty
  std::string separator;         // data.separator: between prompt and completion where there is no template
  bool offsets = false;          // fill EncodedRecord::offsets (0, 0 for what the post-processor adds)
  bool special = true;           // tokens of the post-processor, and the end token after completion and text
};

// With a chat template every form but text is rendered as messages; learnt is the assistant's text and its end-of-turn
// token, not the header, not the newline after it. The end of a turn must be one added token of the tokenizer: else a model
// that ends its turn could not be told from one that writes those letters.
// Without: prompt and completion are tokenised as one text; learnt are the tokens with a character of the completion (a
// token across the border belongs to it) and the end token added after it. Text: all, and the end token.
// Of a text file's pieces (Record::begins, ends) the first has the beginning token, if any, and the last the end token.
// DataError beginning with `source`: nothing to learn; messages, sharegpt or alpaca without a template; the beginning
// token twice; no end token to learn; an id outside the embedding; what the template or the tokenizer refuse.
// Thread-safe.
class RecordEncoder {
 public:
  RecordEncoder(const Tokenizer& tokenizer, const ChatTemplate* chat_template, EncodeOptions options);
  EncodedRecord encode(const Record& record, const std::string& source) const;
  // A record of make_prompt() as what the model is given to go on from: the chat with the template's generation prompt, or
  // prompt + separator, or the text. Nothing is learnt.
  EncodedRecord encode_prompt(const Record& record, const std::string& source) const;

 private:
  bool is_chat(const Record& record, const std::string& source) const;
  EncodedRecord encode_chat(const Record& record, const std::string& source) const;
  EncodedRecord encode_plain(const Record& record, const std::string& source) const;
  EncodedRecord tokenized(std::string text, bool needs_offsets) const;
  void end_turn(const Json& message, std::string_view span, int64_t last_id, const std::string& source) const;
  void check(EncodedRecord& encoded, const Record& record, const std::string& source) const;

  Tokenizer tokenizer_;
  std::vector<int64_t> before_, after_;  // what the post-processor puts around a text
  const ChatTemplate* template_;
  EncodeOptions options_;
  Json template_args_;
};

}  // namespace trireme
