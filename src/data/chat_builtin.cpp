#include "data/chat_builtin.h"

namespace trireme {
namespace {

// Stanford Alpaca: an instruction, its input where it has one (a message with the fields of both, data/records.h), an
// optional system text in place of the usual preamble, the answer and the end token. The line break after "### Response:"
// is that of Axolotl and LLaMA-Factory; Stanford's own code has the answer on the same line.
constexpr const char* kAlpaca = R"(
{%- if messages and messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
    {%- if turns | selectattr('input', 'defined') | list %}
        {%- set system = 'Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.' %}
    {%- else %}
        {%- set system = 'Below is an instruction that describes a task. Write a response that appropriately completes the request.' %}
    {%- endif %}
{%- endif %}
{{- system }}
{%- for message in turns %}
    {%- if message['role'] == 'user' and message['input'] is defined %}
        {{- '\n\n### Instruction:\n' + message['instruction'] | trim + '\n\n### Input:\n' + message['input'] | trim }}
    {%- elif message['role'] == 'user' %}
        {{- '\n\n### Instruction:\n' + message['content'] | trim }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\n\n### Response:\n' }}{% generation %}{{ message['content'] | trim + (eos_token if eos_token is defined else '') }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('The alpaca template knows the roles system (first), user and assistant, not ' + message['role'] + '.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n### Response:\n' }}
{%- endif %}
)";

// OpenAI's ChatML as Qwen and many others use it.
constexpr const char* kChatml = R"(
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
)";

// Meta Llama 3.
constexpr const char* kLlama3 = R"(
{{- bos_token if bos_token is defined else '<|begin_of_text|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
)";

// Microsoft Phi-3.
constexpr const char* kPhi3 = R"(
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|end|>' }}{% endgeneration %}
    {%- else %}
        {{- message['content'] + '<|end|>' }}
    {%- endif %}
    {{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
)";

// Google Gemma: no system role, so a system text goes before the first user's.
constexpr const char* kGemma = R"(
{{- bos_token if bos_token is defined else '<bos>' }}
{%- set ns = namespace(prefix='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if not loop.first %}{{- raise_exception('The gemma template takes a system message in the first place only.') }}{%- endif %}
        {%- set ns.prefix = message['content'] | trim + '\n\n' %}
    {%- elif message['role'] == 'assistant' %}
        {{- '<start_of_turn>model\n' }}{% generation %}{{- message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{- '\n' }}
    {%- else %}
        {{- '<start_of_turn>' + message['role'] + '\n' + ns.prefix + message['content'] | trim + '<end_of_turn>\n' }}
        {%- set ns.prefix = '' %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<start_of_turn>model\n' }}
{%- endif %}
)";

// Mistral Instruct: no system role, so a system text goes before the first user's.
constexpr const char* kMistral = R"(
{{- bos_token if bos_token is defined else '<s>' }}
{%- set ns = namespace(prefix='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- if not loop.first %}{{- raise_exception('The mistral template takes a system message in the first place only.') }}{%- endif %}
        {%- set ns.prefix = message['content'] | trim + '\n\n' %}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + ns.prefix + message['content'] | trim + ' [/INST]' }}
        {%- set ns.prefix = '' %}
    {%- elif message['role'] == 'assistant' %}
        {%- generation %}{{- ' ' + message['content'] | trim + (eos_token if eos_token is defined else '</s>') }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('The mistral template knows the roles system (first), user and assistant, not ' + message['role'] + '.') }}
    {%- endif %}
{%- endfor %}
)";

}  // namespace

const std::vector<BuiltinTemplate>& builtin_templates() {
  static const std::vector<BuiltinTemplate> kTemplates = {{"alpaca", kAlpaca}, {"chatml", kChatml},   {"gemma", kGemma},
                                                          {"llama3", kLlama3}, {"mistral", kMistral}, {"phi3", kPhi3}};
  return kTemplates;
}

}  // namespace trireme
