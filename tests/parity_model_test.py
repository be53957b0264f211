"""Logits, metrics, gradients of every parameter and greedy answers of every family against transformers in fp32."""
import json
import math

import pytest
import tokenizers
import torch
import transformers
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


def assert_metrics(line, rows):
    """`line`: what eval printed; `rows`: (transformers' logits, target or -100) of each position."""
    logits, targets = torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
    learnt = targets != -100
    loss = torch.nn.functional.cross_entropy(logits[learnt].double(), targets[learnt]).item()
    correct = (logits.argmax(-1) == targets).sum().item()
    assert 0 < correct < learnt.sum().item()  # else a wrong accuracy could be right
    assert json.loads(line) == {"loss": pytest.approx(loss, rel=bounds.LOSS_FP32), "tokens": learnt.sum().item(),
                                "perplexity": pytest.approx(math.exp(loss), rel=bounds.PERPLEXITY_FP32),
                                "token_accuracy": correct / learnt.sum().item()}


def test_logits_and_metrics(case):
    folder, model = case
    rows = random_rows(1, 7, 40)
    with torch.no_grad():  # and one whose end the model foretells
        rows.append(model.generate(torch.tensor([rows[1]]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0].tolist())
    (folder / "ids.json").write_text(json.dumps(rows))
    done = hf_models.succeed("eval", f"--model.path={folder}", f"--eval.token_ids={folder}/ids.json", f"--eval.logits={folder}/out.st")
    ours, theirs = load_file(folder / "out.st"), []
    for i, row in enumerate(rows):
        with torch.no_grad():
            theirs.append((model(torch.tensor([row])).logits[0], torch.tensor(row[1:] + [-100])))
        assert ours[f"logits.{i}"].shape == theirs[i][0].shape
        assert (ours[f"logits.{i}"] - theirs[i][0]).abs().max().item() <= bounds.LOGITS_FP32
    assert_metrics(done.stdout, theirs)


@pytest.fixture(scope="module")
def memorized(work):
    """A model that has half learnt the records, so that some of its answers are right."""
    folder = work[0] / "memorized"
    hf_models.make("llama", folder)
    hf_models.succeed("train", f"--run.dir={folder}/run", f"--model.path={folder}", f"--data.train={work[0]}/train.jsonl",
                      "--train.steps=12", "--train.micro_batch_size=4", "--optim.lr=0.01", cache=work[0] / "cache")
    return folder / "run/model"


@pytest.mark.parametrize("ranks, rows", [(1, 0), (1, 1), (2, 3), (4, 0), (4, 5)])
def test_metrics_of_records(memorized, work, ranks, rows):
    """However the 8 rows are shared out; with 4 ranks and 5 rows a batch, two ranks have none."""
    model = transformers.AutoModelForCausalLM.from_pretrained(memorized)
    done = hf_models.succeed("eval", f"--model.path={memorized}", f"--data.eval={work[0]}/train.jsonl", f"--eval.micro_batch_size={rows}",
                             cache=work[0] / "cache", ranks=ranks)
    theirs = []
    for record in work[1]:
        targets = [id if learnt else -100 for id, learnt in zip(record["ids"], record["loss"])][1:] + [-100]
        with torch.no_grad():
            theirs.append((model(torch.tensor([record["ids"]])).logits[0], torch.tensor(targets)))
    assert_metrics(done.stdout, theirs)


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
