"""A run on any mesh of ranks is the run on one: losses, gradients, weights, checkpoints, products, evaluation and answers.
In float64, where rounding cannot hide a fault: sums in another order differ by some 1e-16, a fault by 1e-3 and more."""
import json

import pytest
import torch
from safetensors.torch import load_file

from bounds import LAYOUT_BF16, LAYOUT_FP32
from program import SOURCE, run, override

STEPS = 20  # of twelve rows: 4 x accumulation 3 on one rank
QUICKSTART = SOURCE / "configs/quickstart"
SHAPE = dict(model_type="qwen3", vocab_size=1152, hidden_size=32, intermediate_size=44, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, max_position_embeddings=256, initializer_range=0.02)
# What a task learns and how: every value of every row of the table at least once with each way of cutting.
KINDS = {
    "full_untied_packed": (dict(tie_word_embeddings=False), ["--data.packing=true", "--data.max_length=96"], "model/model.safetensors"),
    "full_tied_biases": (dict(model_type="qwen2", tie_word_embeddings=True), ["--train.recompute=full"], "model/model.safetensors"),
    "lora_one_key_head": (dict(num_key_value_heads=1, tie_word_embeddings=False),
                          ["--lora.rank=4", "--lora.dropout=0.2", "--train.recompute=selective"], "adapter/adapter_model.safetensors"),
}
# Keys of each mesh; PAIRS says with which kinds it is tried, so that every pair of features meets.
MESHES = {
    "one": (1, []),
    "dp2": (2, ["--train.micro_batch_size=6", "--train.accumulation=1"]),
    "dp4_zero3": (4, ["--train.micro_batch_size=1", "--parallel.zero=3"]),
    "dp4": (4, ["--train.micro_batch_size=1"]),
    "tp2": (2, ["--parallel.tensor=2"]),
    "tp4": (4, ["--parallel.tensor=4"]),
    "tp2_zero2": (2, ["--parallel.tensor=2", "--parallel.zero=2"]),
    "pp2": (2, ["--parallel.pipeline=2"]),
    "pp2_gpipe": (2, ["--parallel.pipeline=2", "--parallel.schedule=gpipe"]),
    "pp2_zb_h1": (2, ["--parallel.pipeline=2", "--parallel.schedule=zb-h1"]),
    "pp2_zb_v": (2, ["--parallel.pipeline=2", "--parallel.schedule=zb-v"]),
    "pp2_interleaved": (2, ["--parallel.pipeline=2", "--parallel.schedule=interleaved", "--train.micro_batch_size=3", "--train.accumulation=4"]),
    "pp4": (4, ["--parallel.pipeline=4", "--train.micro_batch_size=2", "--train.accumulation=6"]),
    "pp2_tp2": (4, ["--parallel.pipeline=2", "--parallel.tensor=2"]),
    "dp2_pp2_zero1": (4, ["--parallel.pipeline=2", "--parallel.zero=1", "--train.micro_batch_size=2"]),
    "dp2_tp2_pp2": (8, ["--parallel.pipeline=2", "--parallel.tensor=2", "--train.micro_batch_size=2"]),
    "dp2_tp2": (4, ["--parallel.tensor=2", "--train.micro_batch_size=6", "--train.accumulation=1"]),
    "dp2_tp2_zero1": (4, ["--parallel.tensor=2", "--train.micro_batch_size=6", "--train.accumulation=1", "--parallel.zero=1"]),
    "dp2_pp2_zero3": (4, ["--parallel.pipeline=2", "--parallel.zero=3", "--train.micro_batch_size=2"]),
    "dp2_pp2_zb_v_zero3": (4, ["--parallel.pipeline=2", "--parallel.zero=3", "--train.micro_batch_size=2", "--parallel.schedule=zb-v"]),
    "dp2_tp2_pp2_zero3": (8, ["--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.zero=3", "--train.micro_batch_size=3", "--train.accumulation=2",
                              "--parallel.order=data-tensor-pipeline", "--parallel.schedule=interleaved"]),
    "dp2_tp2_zero3": (4, ["--parallel.tensor=2", "--train.micro_batch_size=6", "--train.accumulation=1", "--parallel.zero=3"]),
}
FULL, TIED, LORA = KINDS
PAIRS = [(mesh, kind) for mesh, kinds in {
    "dp2": [FULL], "dp4": [LORA], "pp4": [FULL, LORA], "tp2": KINDS, "tp4": [FULL, LORA], "tp2_zero2": [LORA], "dp2_tp2": [FULL], "dp2_tp2_zero1": [TIED], "dp2_tp2_zero3": [TIED, LORA],
    "pp2": KINDS, "pp2_gpipe": [FULL], "pp2_zb_h1": [FULL, TIED], "pp2_zb_v": [TIED, LORA], "pp2_interleaved": [FULL], "pp2_tp2": [LORA],
    "dp2_pp2_zero1": [TIED], "dp2_pp2_zero3": [TIED], "dp2_pp2_zb_v_zero3": [TIED, LORA], "dp2_tp2_pp2_zero3": [FULL], "dp2_tp2_pp2": [TIED]}.items() for kind in kinds]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    for kind, (shape, _, _) in KINDS.items():
        (folder / f"{kind}.json").write_text(json.dumps(SHAPE | shape))
    return folder


def keys_of(work, kind, name, *keys):
    usual = [f"--run.dir={work / name}", f"--model.config={work / kind}.json", f"--model.tokenizer={QUICKSTART}/model", "--model.dtype=float64",
             f"--data.train={QUICKSTART}/train.jsonl:90", f"--train.steps={STEPS}", "--train.micro_batch_size=4", "--train.accumulation=3",
             "--optim.lr=1e-3", "--optim.weight_decay=0.01", "--schedule.warmup_steps=3", "--train.max_grad_norm=0.5"]
    return override(usual, [*KINDS[kind][1], *keys])


def train(work, kind, name, *keys, ranks=1, status=0):
    done = run(work, "train", *keys_of(work, kind, name, *keys), ranks=ranks)
    assert done.returncode == status, done.stderr
    return done.stderr


def losses(work, name):
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines], [line["grad_norm"] for line in lines]


def assert_same_run(work, kind, name, whole):
    for found, expected in zip(losses(work, name), losses(work, whole)):
        assert len(found) == STEPS
        assert found == pytest.approx(expected, rel=1e-12)
    found, expected = (load_file(work / run / KINDS[kind][2]) for run in (name, whole))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.dtype == torch.float64 and torch.allclose(found[key], value, rtol=0, atol=1e-10), key


@pytest.fixture(scope="module")
def whole(work):
    """The run on one rank, by kind."""
    for kind in KINDS:
        train(work, kind, f"one_{kind}", f"--train.gradients={work}/one_{kind}.safetensors")
    return {kind: f"one_{kind}" for kind in KINDS}


@pytest.mark.parametrize("mesh, kind", PAIRS)
def test_every_mesh_learns_the_same(work, whole, mesh, kind):
    ranks, keys = MESHES[mesh]
    name = f"{mesh}_{kind}"
    train(work, kind, name, *keys, f"--train.gradients={work}/{name}.safetensors", ranks=ranks)
    assert_same_run(work, kind, name, whole[kind])
    found, expected = (load_file(f"{work}/{run}.safetensors") for run in (name, whole[kind]))
    assert found.keys() == expected.keys()
    for key, value in expected.items():  # written in float32: 2^-24 = 6e-8 a value
        difference = (found[key].double() - value.double()).norm() / max(value.double().norm(), 1e-30)
        assert value.norm() == 0 or difference < 1e-7, key


@pytest.mark.parametrize("dtype, bound", [("float32", LAYOUT_FP32), ("bfloat16", LAYOUT_BF16)])
def test_every_way_of_cutting_learns_the_same_in_dtypes_that_round(work, dtype, bound):
    kind = "full_tied_biases"
    found = {}
    for mesh, faults in [(None, []), ("dp2", []), ("tp2", []), ("pp2", []), (None, ["--optim.lr=1.1e-3"])]:
        ranks, keys = MESHES[mesh] if mesh else (1, [])
        train(work, kind, name := f"{dtype}_{mesh}_{len(faults)}", *keys, *faults, f"--model.dtype={dtype}", ranks=ranks)
        found[mesh, len(faults)] = losses(work, name)[0]
    expected = found.pop((None, 0))
    farthest = {key: max(abs(a / b - 1) for a, b in zip(losses, expected)) for key, losses in found.items()}
    assert farthest.pop((None, 1)) > 4 * bound  # what a tenth more of learning rate does
    assert max(farthest.values()) < bound, farthest


def test_the_comparison_can_fail(work, whole):
    train(work, "full_tied_biases", "other", "--optim.lr=1.001e-3")
    with pytest.raises(AssertionError):
        assert_same_run(work, "full_tied_biases", "other", whole["full_tied_biases"])


def walk_over_all_pairs(names):
    """A closed walk that goes from each name to each other one once."""
    left, path, walk = {name: [other for other in names if other != name] for name in names}, [names[0]], []
    while path:
        if left[path[-1]]:
            path.append(left[path[-1]].pop())
        else:
            walk.append(path.pop())
    assert len(set(zip(walk, walk[1:]))) == len(walk) - 1 == len(names) * (len(names) - 1)
    return walk


SAVED_ON = ["one", "dp2", "tp2", "pp2", "pp2_tp2", "dp2_tp2_pp2", "dp4_zero3"]
WALK = walk_over_all_pairs(SAVED_ON)


@pytest.mark.parametrize("part, kind", enumerate(KINDS))
def test_every_mesh_goes_on_from_a_checkpoint_of_every_other(work, whole, part, kind):
    third = len(WALK) // len(KINDS)
    meshes = WALK[part * third:(part + 1) * third + 1]
    for number, mesh in enumerate(meshes, 1):
        last = number == len(meshes)
        ranks, keys = MESHES[mesh]
        train(work, kind, f"walk_{kind}", *keys, *([] if last else ["--train.stop_after=1"]), ranks=ranks, status=0 if last else 75)
    assert_same_run(work, kind, f"walk_{kind}", whole[kind])


def test_evaluation_and_answers_on_a_mesh(work, whole):
    model = f"--model.path={work}/{whole['full_untied_packed']}/model"
    (work / "ids.json").write_text(json.dumps([[5, 6, 7, 8, 9, 10, 11], [3, 1, 4]]))
    found, answers = [], []
    for ranks, *keys in [(1,), (2, "--parallel.tensor=2"), (4, "--parallel.tensor=2"), (2, "--parallel.pipeline=2"),
                         (8, "--parallel.pipeline=2", "--parallel.tensor=2", "--parallel.order=tensor-data-pipeline")]:
        logits = work / f"logits{ranks}{len(keys)}.safetensors"
        done = run(work, "eval", model, f"--eval.token_ids={work}/ids.json", f"--eval.logits={logits}", *keys, ranks=ranks)
        assert done.returncode == 0, done.stderr
        data = run(work, "eval", model, f"--data.eval={QUICKSTART}/eval.jsonl:9", *keys, ranks=ranks)
        assert data.returncode == 0, data.stderr
        found.append((json.loads(done.stdout), json.loads(data.stdout), load_file(logits)))
        said = run(work, "generate", model, "--generate.format=json", "--generate.max_tokens=12", *keys, "What is a rank?", "Why?", ranks=ranks)
        assert said.returncode == 0, said.stderr
        answers.append(said.stdout)
    assert all(said == answers[0] for said in answers) and len(answers) == 5 and len(answers[0].splitlines()) == 2
    for ids, data, logits in found[1:]:
        assert ids == pytest.approx(found[0][0], rel=1e-12) and data == pytest.approx(found[0][1], rel=1e-12)
        for key, value in found[0][2].items():
            assert torch.allclose(logits[key], value, rtol=1e-6, atol=1e-6), key


def test_what_a_mesh_cannot_do_is_refused_before_anything_is_read(work):
    def refusal(ranks, *keys):
        return train(work, "full_untied_packed", "refused", *keys, ranks=ranks, status=2)

    assert ("error: parallel.tensor=3: the 4 heads, 2 key heads, 44 MLP units and 1152 ids of " in (said := refusal(3, "--parallel.tensor=3"))
            and "cannot be shared out evenly over 3 ranks; sizes that can: 1, 2, 4" in said)
    assert ("error: parallel.tensor=2 x parallel.pipeline=1 does not divide the 3 ranks of this job; start a multiple of 2 ranks "
            "(mpirun -n 2 ...) or choose divisors of 3" in refusal(3, "--parallel.tensor=2"))
    assert "error: parallel.virtual_stages=2 needs parallel.pipeline of 2 or more" in refusal(1, "--parallel.virtual_stages=2")
    assert "parallel.pipeline" in (said := refusal(5, "--parallel.pipeline=5")) and "layers" in said
    assert not (work / "refused").exists()


def test_a_prompt_that_is_wrong_ends_every_rank(work, whole):
    done = run(work, "generate", f"--model.path={work}/{whole['full_untied_packed']}/model", "--parallel.tensor=2", "fine", "a" * 4000, ranks=2)
    assert done.returncode == 3
    assert done.stderr.count("error: ") == 1 and "the model's context (max_position_embeddings) is 256" in done.stderr
