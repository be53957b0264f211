// Unicode normal forms (UAX 15) with alignment, as Hugging Face's Rust crate has it: a character that came out of a
// decomposition stands where its origin stood, a composed one where its first part stood.
#pragma once

#include "data/tok_text.h"

namespace trireme::tok {

enum class NormalForm { kC, kD, kKC, kKD };
void normal_form(Text& text, NormalForm form);

}  // namespace trireme::tok
