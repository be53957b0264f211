"""What generate and eval say of one model: keys of sampling, stopping, chats, against transformers where it has the same."""
import json
import math

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import hf_models

PROMPTS = ["What is data parallelism?", "resume", "a b c d e f g h i j k"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("generate")
    model = hf_models.make("qwen3", folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PROMPTS))
    return folder, model, tokenizers.Tokenizer.from_file(str(hf_models.TOKENIZER / "tokenizer.json"))


def answers(work, *keys, name="prompts.jsonl", most=20):
    done = hf_models.succeed("generate", f"--model.path={work[0]}/model", f"--generate.file={work[0] / name}",
                             "--generate.format=json", f"--generate.max_tokens={most}", *keys)
    return [json.loads(line) for line in done.stdout.splitlines()]


def without_end(ids):
    return ids[:-1] if ids[-1] == hf_models.END else ids


def expected(work, ids, **options):
    out = work[1].generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False, pad_token_id=0, **options)
    return without_end(out[0, len(ids):].tolist())


@pytest.mark.parametrize("penalty", [1.0, 1.7, 0.6])
def test_the_repetition_penalty_is_that_of_transformers(work, penalty):
    found = answers(work, f"--generate.repetition_penalty={penalty}")
    assert [a["ids"] for a in found] == [expected(work, work[2].encode(p).ids, repetition_penalty=penalty) for p in PROMPTS]


def test_sampling_with_one_candidate_is_greedy(work):
    greedy = [a["ids"] for a in answers(work)]
    for keys in (("--generate.top_k=1",), ("--generate.top_p=1e-9",), ("--generate.min_p=1",)):
        assert [a["ids"] for a in answers(work, "--generate.temperature=1.5", *keys)] == greedy


def test_a_seed_gives_an_answer(work):
    keys = ("--generate.temperature=1", "--generate.top_k=50")
    one = answers(work, *keys, "--run.seed=1")
    assert answers(work, *keys, "--run.seed=1") == one
    assert answers(work, *keys, "--run.seed=2") != one
    (work[0] / "same.jsonl").write_text((json.dumps(PROMPTS[0]) + "\n") * 2)
    first, second = answers(work, *keys, name="same.jsonl")  # the same prompt twice
    assert first["ids"] != second["ids"]


def test_probabilities_are_those_of_transformers(work):
    """The first token of 300 equal prompts, sampled with every restriction at once."""
    ids = work[2].encode(PROMPTS[0]).ids
    logits = work[1](torch.tensor([ids])).logits[:, -1].detach()
    warpers = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(1.3), transformers.TemperatureLogitsWarper(1.4),
        transformers.TopKLogitsWarper(12), transformers.TopPLogitsWarper(0.8), transformers.MinPLogitsWarper(0.05)])
    p = warpers(torch.tensor([ids]), logits).softmax(-1)[0]
    n = 300
    (work[0] / "many.jsonl").write_text((json.dumps(PROMPTS[0]) + "\n") * n)
    found = answers(work, "--generate.temperature=1.4", "--generate.top_k=12", "--generate.top_p=0.8", "--generate.min_p=0.05",
                    "--generate.repetition_penalty=1.3", name="many.jsonl", most=1)
    counts = torch.zeros(len(p))
    for answer in found:
        counts[answer["ids"][0]] += 1
    assert 3 < (p > 0).sum() < 12
    assert set(counts.nonzero().flatten().tolist()) <= set(p.nonzero().flatten().tolist())
    for i in p.nonzero().flatten().tolist():  # five standard deviations
        assert abs(counts[i] - n * p[i]) <= 5 * math.sqrt(n * p[i] * (1 - p[i])) + 1, i


def test_stop_texts_and_streaming(work):
    whole = answers(work)[0]["text"]
    prompt = PROMPTS[0]
    streamed = hf_models.succeed("generate", f"--model.path={work[0]}/model", "--generate.max_tokens=20", prompt).stdout
    assert streamed == whole + "\n"
    middle = len(whole) // 2
    stop = whole[middle:middle + 4]
    cut = hf_models.succeed("generate", f"--model.path={work[0]}/model", "--generate.max_tokens=20",
                            f"--generate.stop=never said,{stop}", prompt).stdout
    assert cut == whole[:whole.index(stop)] + "\n"


def test_a_chat_is_asked_in_its_template(work):
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(work[0] / "model")
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    (work[0] / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n" +
                                        json.dumps({"messages": messages + [{"role": "assistant", "content": "No."}]}) + "\n")
    for answer in answers(work, name="chat.jsonl"):  # the answer that is there is not shown
        assert answer["ids"] == expected(work, ids)
    (work[0] / "asked.jsonl").write_text(json.dumps("Who are you?") + "\n")
    asked = answers(work, "--generate.chat=true", "--generate.system=Be short.", name="asked.jsonl")
    assert asked[0]["ids"] == expected(work, ids)


def test_the_context_ends_the_answer(work):
    prompt = "word " * 28
    (work[0] / "long.jsonl").write_text(json.dumps(prompt) + "\n")
    room = 64 - len(work[2].encode(prompt).ids)
    assert 0 < room < 20
    answer = answers(work, "--generate.repetition_penalty=1.3", name="long.jsonl")[0]
    assert len(answer["ids"]) == room and answer["finish_reason"] == "length"


def test_one_token_rows_have_logits_and_no_metrics(work):
    (work[0] / "ids.json").write_text("[[5], [7]]")
    keys = ("eval", f"--model.path={work[0]}/model", f"--eval.token_ids={work[0]}/ids.json")
    done = hf_models.succeed(*keys, f"--eval.logits={work[0]}/out.st")
    assert json.loads(done.stdout) == {"tokens": 0}
    assert [len(t) for t in load_file(work[0] / "out.st").values()] == [1, 1]
    done = hf_models.run(*keys)
    assert done.returncode == 3
    assert done.stderr == "error: the evaluation data has no learnt token\n"


def test_longer_samples_than_the_model_has_positions_are_refused(work):
    (work[0] / "long-text.jsonl").write_text(json.dumps({"text": "word " * 200}) + "\n")
    keys = ("train", f"--run.dir={work[0]}/run", f"--model.path={work[0]}/model", f"--data.train={work[0]}/long-text.jsonl", "--train.steps=1")
    done = hf_models.run(*keys, cache=work[0] / "cache")
    assert done.returncode == 2
    longest = len(work[2].encode("word " * 200).ids) + 1
    assert done.stderr.splitlines()[-1] == (
        f"error: the longest sample has {longest} tokens, but {work[0]}/model/config.json has max_position_embeddings 64: set "
        "data.max_length to at most that, or raise it in config.json if the model shall learn longer texts")
    hf_models.succeed(*keys, "--data.max_length=64", cache=work[0] / "cache")
