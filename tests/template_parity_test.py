"""Our Jinja engine against jinja2 as transformers configures it: the same text, an error where it has one, and the words of the
errors that template authors cause on purpose or rely on."""

import json
import os
import re
import subprocess

import jinja2
import pytest
from template_families import CHATS, FAMILIES, SPECIAL
from template_snippets import CONTEXT, EXPRESSIONS, TEMPLATES
from transformers.utils.chat_template_utils import _cached_compile_jinja_template, render_jinja_template

DUMP = os.path.join(os.path.dirname(os.environ["TRIREME_BINARY"]), "jinja_dump")

# Our own templates must mean the same to both engines.
with open(os.path.join(os.environ["TRIREME_SOURCE"], "src/data/chat_builtin.cpp"), encoding="utf-8") as source:
    BUILTIN = dict(re.findall(r'constexpr const char\* k(\w+) = R"\((.*?)\)";', source.read(), re.S))
assert len(BUILTIN) == 6
FAMILIES.update({f"builtin_{name}": text for name, text in BUILTIN.items()})


def ours(requests):
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([DUMP], input=lines, capture_output=True, text=True, timeout=120, check=True)
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def reference(template, context):
    try:
        return {"output": _cached_compile_jinja_template(template).render(**context)}
    except Exception as error:  # noqa: BLE001: every kind counts
        return {"error": str(error), "exact": isinstance(error, jinja2.exceptions.UndefinedError)
                or type(error) is jinja2.exceptions.TemplateError}


def compare(templates, context):
    bad = []
    answers = ours([{"template": template, "context": context} for template in templates])
    assert len(answers) == len(templates)
    for template, answer in zip(templates, answers):
        expected = reference(template, context)
        if "output" in expected:
            good = answer.get("output") == expected["output"]
        else:
            good = "error" in answer and (not expected["exact"] or answer["error"].endswith(": " + expected["error"]))
        if not good:
            bad.append(f"{template!r}\n  expected {expected}\n  ours     {answer}")
    assert not bad, f"{len(bad)} of {len(templates)} differ:\n" + "\n".join(bad)


def test_expressions():
    assert len(EXPRESSIONS) > 400
    compare(["{{ " + expression + " }}" for expression in EXPRESSIONS], CONTEXT)


def test_statements():
    compare(TEMPLATES, CONTEXT)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_family(family):
    requests, expected = [], []
    for chat in CHATS:
        for prompt in (False, True):
            requests.append({"template": FAMILIES[family], "messages": chat["messages"], "tools": chat.get("tools"), "prompt": prompt,
                             "special": SPECIAL, "variables": chat.get("variables")})
            try:
                text = render_jinja_template([chat["messages"]], tools=chat.get("tools"), chat_template=FAMILIES[family],
                                             add_generation_prompt=prompt, **SPECIAL, **chat.get("variables", {}))[0][0]
                expected.append({"output": text})
            except Exception as error:  # noqa: BLE001
                expected.append({"error": str(error), "exact": type(error) is jinja2.exceptions.TemplateError})
    assert any("output" in one for one in expected)
    for request, answer, one in zip(requests, ours(requests), expected):
        if "output" in one:
            assert answer.get("output") == one["output"], (answer, request["messages"])
        else:
            assert "error" in answer, (one, answer)
            assert not one["exact"] or answer["error"].endswith(": " + one["error"])


def test_generation_spans():
    """Byte spans of ours against the character spans of transformers, on text that is not ASCII."""
    template = ("{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
                "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}")
    messages = [{"role": "user", "content": "héé"}, {"role": "assistant", "content": "世界"}, {"role": "user", "content": "😀"},
                {"role": "assistant", "content": ""}]
    rendered, spans = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True)
    (answer,) = ours([{"template": template, "context": {"messages": messages}}])
    data = answer["output"].encode()
    assert [data[begin:end].decode() for begin, end in answer["generations"]] == [rendered[0][b:e] for b, e in spans[0]]


# What is learnt of the chats of template_families.py: by chat, the beginning of each span, and the end token.
LEARNT = {
    "llama3": ([["Hello!"], ["A"], ["<think>", "<think>"], ["2"], ["", "21"]], "<|eot_id|>"),
    "llama31": ([["Hello!"], ["A"], ["<think>", "<think>"], ["2"], ['{"name": "get_weather"', "21"]], "<|eot_id|>"),
    "mistral": ([[" Hello!"], ["A"], ["<think>", "<think>"], [" 2"], ["[TOOL_CALLS]", " 21"]], "</s>"),
    "qwen25": ([["  Hello!"], ["A"], ["<think>", "<think>"], ["2"], ["<tool_call>", "21"]], "<|im_end|>"),
    "qwen3": ([["<think>"], ["A"], ["2", "<think>"], ["<think>\nbecause"], ["<tool_call>", "<think>"]], "<|im_end|>"),
    "gemma3": ([["Hello!"], ["A"], ["<think>", "<think>"], ["2"]], "<end_of_turn>"),
    "phi3": ([["  Hello!"], ["A"], ["<think>", "<think>"], ["2"], ["", "21"]], "<|end|>"),
    "zephyr": ([["  Hello!"], ["A"], ["<think>", "<think>"], ["2"], ["", "21"]], "</s>"),
    "deepseek_r1": ([["  Hello!"], ["A"], ["\n\n2", "\n\n4"], ["2"], ["<|tool_calls_begin|>", "21"]], "<|end_of_sentence|>"),
    "smollm3_generation": ([["  Hello!"], ["A"], ["<think>", "<think>"], ["2"], ["", "21"]], "<|im_end|>"),
    "granite": ([["  Hello!"], ["A"], ["<think>", "<think>"], ["2"], ["", "21"]], "<|end_of_text|>"),
}


@pytest.mark.parametrize("family", sorted(LEARNT))
def test_learnt_spans(family):
    chats, end = LEARNT[family]
    answers = ours([{"template": FAMILIES[family], "messages": chat["messages"], "tools": chat.get("tools"), "special": SPECIAL,
                     "variables": chat.get("variables")} for chat in CHATS[1 : 1 + len(chats)]])
    for beginnings, answer, chat in zip(chats, answers, CHATS[1:]):
        texts = [text for text, _ in answer["learnt"]]
        assert len(texts) == len(beginnings), answer
        assert [index for _, index in answer["learnt"]] == [i for i, m in enumerate(chat["messages"]) if m["role"] == "assistant"]
        for text, beginning in zip(texts, beginnings):
            assert text.startswith(beginning or end) and text.endswith(end), (text, beginning)
