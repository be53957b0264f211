"""Logits, gradients of every parameter and greedy answers of every family against transformers in fp32."""
import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file

import bounds
import hf_models

RECORDS = (hf_models.SOURCE / "configs/quickstart/train.jsonl").read_text().splitlines()[:8]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The records, and their tokens and learnt targets."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("parity-model")
    (folder / "train.jsonl").write_text("\n".join(RECORDS) + "\n")
    tokens = hf_models.succeed("tokenize", f"--model.path={hf_models.TOKENIZER}", input="\n".join(RECORDS) + "\n")
    return folder, [json.loads(line) for line in tokens.stdout.splitlines()]


@pytest.fixture(scope="module", params=list(hf_models.CASES))
def case(request, work):
    folder = work[0] / request.param
    return folder, hf_models.make(request.param, folder)


def random_rows(*lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 1100, (n,), generator=generator).tolist() for n in lengths]


def test_logits(case):
    folder, model = case
    rows = random_rows(1, 7, 40)
    (folder / "ids.json").write_text(json.dumps(rows))
    hf_models.succeed("eval", f"--model.path={folder}", f"--eval.token_ids={folder}/ids.json", f"--eval.logits={folder}/out.st")
    ours = load_file(folder / "out.st")
    for i, row in enumerate(rows):
        with torch.no_grad():
            theirs = model(torch.tensor([row])).logits[0]
        assert ours[f"logits.{i}"].shape == theirs.shape
        assert (ours[f"logits.{i}"] - theirs).abs().max().item() <= bounds.LOGITS_FP32


def test_gradients_of_packed_rows(case, work):
    folder, model = case
    # 8 records in 2 rows of at most 192 tokens, one step; the gradient is of the mean over all learnt tokens.
    hf_models.succeed("train", f"--run.dir={folder}/run", f"--model.path={folder}", f"--data.train={work[0]}/train.jsonl",
                      "--data.packing=true", "--data.max_length=192", "--train.epochs=1", "--train.micro_batch_size=2",
                      "--train.recompute=selective", f"--train.gradients={folder}/gradients.st", cache=work[0] / "cache")
    gradients = load_file(folder / "gradients.st")
    line = json.loads((folder / "run/metrics.jsonl").read_text().splitlines()[0])
    total, count = 0.0, 0
    for record in work[1]:
        ids, learnt = torch.tensor([record["ids"]]), torch.tensor(record["loss"][1:], dtype=torch.bool)
        total = total + torch.nn.functional.cross_entropy(model(ids).logits[0, :-1][learnt], ids[0, 1:][learnt], reduction="sum")
        count += int(learnt.sum())
    model.zero_grad()
    (total / count).backward()
    assert line["tokens"] == count  # all records were in the one step
    assert line["loss"] == pytest.approx(total.item() / count, rel=bounds.LOSS_FP32)
    theirs = dict(model.named_parameters())
    assert set(gradients) == set(theirs)
    for name, parameter in theirs.items():
        scale = parameter.grad.abs().max().item()
        assert scale > 0, name
        assert (gradients[name] - parameter.grad).abs().max().item() <= bounds.GRADIENT_FP32 * scale, name


def test_greedy_answers(case):
    """With the KV cache, prompts shorter and longer than every window."""
    folder, model = case
    tokenizer = tokenizers.Tokenizer.from_file(str(hf_models.TOKENIZER / "tokenizer.json"))
    prompts = [tokenizer.decode(ids) for ids in random_rows(1, 4, 24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    done = hf_models.succeed("generate", f"--model.path={folder}", f"--generate.file={folder}/prompts.jsonl",
                             "--generate.format=json", "--generate.max_tokens=16")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(prompts)
    for prompt, answer in zip(prompts, answers):
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
        ended = expected[-1] == hf_models.END
        assert answer["ids"] == (expected[:-1] if ended else expected)
        assert answer["finish_reason"] == ("stop" if ended else "length")
        assert answer["text"] == tokenizer.decode(answer["ids"])
