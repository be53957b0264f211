"""A run on any mesh of ranks is the run on one: losses, gradients, weights, checkpoints, products, evaluation and answers.
In float64, where rounding cannot hide a fault: sums in another order differ by some 1e-16, a fault by 1e-3 and more."""
import collections
import json

import pytest
import torch
from safetensors.torch import load_file

from bounds import LAYOUT_BF16, LAYOUT_FP32, LAYOUT_INT8
from mesh_runs import KINDS, MESHES, QUICKSTART, SHAPE, assert_same_run, losses, train, whole, work  # noqa: F401 (fixtures)
from program import run

FULL, TIED, LORA, LORA_TIED, DORA, QLORA, QDORA, LOFTQ = KINDS
DENSE = [FULL, TIED, LORA, LORA_TIED]
OF_KIND = {FULL: {"packed"}, TIED: {"tied"}, LORA: {"lora"}, LORA_TIED: {"lora", "packed", "tied"}, DORA: {"lora"}, QLORA: {"lora", "packed"}, QDORA: {"lora"}, LOFTQ: {"lora"}}
PAIRS = [(mesh, kind) for mesh, kinds in {
    "dp2": [FULL, TIED, LORA_TIED], "dp4": [FULL, TIED, LORA, QLORA], "tp2": DENSE, "tp4": [FULL, TIED, LORA, DORA, QLORA, QDORA], "dp2_tp2": [FULL],
    "dp2_tp2_zero1": [TIED, LORA, QLORA], "dp2_tp2_zero2": [FULL, LORA], "dp2_tp2_zero3": [TIED, LORA, DORA, QLORA], "pp2": DENSE, "pp2_one": [FULL, TIED, LORA_TIED],
    "pp4": [FULL, TIED, LORA, QLORA], "pp2_gpipe": [FULL, TIED, LORA], "pp2_zb_h1": DENSE, "pp2_zb_v": [*DENSE, QLORA], "pp2_interleaved": [*DENSE, DORA, QLORA], "pp2_tp2": [FULL],
    "pp2_tp2_zb_h1": [LORA, QLORA], "dp2_pp2_zero1": [FULL], "dp2_pp2_zero2": [TIED, QLORA], "dp2_pp2_zero3": [LORA_TIED, QLORA], "dp2_pp2_zb_v_zero3": [TIED, LORA],
    "dp2_tp2_pp2": [TIED, LORA_TIED, DORA, QLORA], "dp2_tp2_pp2_zero3": [FULL, QDORA, LOFTQ]}.items() for kind in kinds]


def test_every_way_of_cutting_meets_full_and_lora_packed_and_padded_tied_and_untied():
    """ZeRO meets them with other ways of cutting too; with plain data parallelism alone run_zero_test.py compares bits."""
    met, accumulated, quantized = collections.defaultdict(set), collections.defaultdict(set), set()
    for mesh, kind in PAIRS:
        ranks, keys = MESHES[mesh]
        values = dict(key.removeprefix("--").split("=") for key in keys)
        tensor, pipeline = (int(values.get(f"parallel.{axis}", 1)) for axis in ("tensor", "pipeline"))
        ways = {("data", ranks // tensor // pipeline), ("tensor", tensor), ("pipeline", pipeline), ("zero", int(values.get("parallel.zero", 0)))}
        ways |= {("schedule", values.get("parallel.schedule", "1f1b"))} if pipeline > 1 else set()
        quantized |= ways if kind == QLORA else set()
        for way in ways:
            met[way] |= {(attribute, attribute in OF_KIND[kind]) for attribute in ("lora", "packed", "tied")}
            accumulated[way].add(values.get("train.accumulation", "3") != "1")
    assert met.keys() == {*((axis, size) for axis in ("data", "tensor", "pipeline") for size in (1, 2, 4)), *(("zero", zero) for zero in range(4)),
                          *(("schedule", kind) for kind in ("1f1b", "gpipe", "interleaved", "zb-h1", "zb-v"))}
    assert all(len(attributes) == 6 for attributes in met.values()), met
    assert quantized == met.keys()
    assert all(len(accumulated[way]) == 2 for way in [("data", 2), ("tensor", 2), ("pipeline", 2), ("zero", 1), ("zero", 3)])


@pytest.mark.parametrize("mesh, kind", PAIRS)
def test_every_mesh_learns_the_same(work, whole, mesh, kind):
    ranks, keys = MESHES[mesh]
    name = f"{mesh}_{kind}"
    train(work, kind, name, *keys, f"--train.gradients={work}/{name}.safetensors", ranks=ranks)
    assert_same_run(work, kind, name, whole[kind])
    found, expected = (load_file(f"{work}/{run}.safetensors") for run in (name, whole[kind]))
    assert found.keys() == expected.keys()
    learns = [key for key, value in expected.items() if value.norm() > 0]
    # Written in float32: 2^-24 = 6e-8 a value. Of a new adapter's A the gradient is zero, for its B is.
    assert all((found[key].double() - expected[key].double()).norm() < 1e-7 * expected[key].double().norm() for key in learns)
    assert not any(found[key].any() for key in expected.keys() - set(learns)) and len(learns) >= len(expected) // (2 if kind in (LORA, QLORA, QDORA) else 1)


@pytest.mark.parametrize("mesh, kind", [("one", FULL), ("tp2", TIED), ("tp2", DORA), ("dp2_tp2_zero3", LORA), ("tp4", QLORA), ("pp2_zb_h1", FULL), ("dp2_pp2_zero3", LORA_TIED)])
def test_an_mlp_in_pieces_of_the_tokens_learns_the_same(work, whole, mesh, kind):
    ranks, keys = MESHES[mesh]
    name = f"pieces_{mesh}_{kind}"
    train(work, kind, name, *keys, "--train.mlp_tokens=48", f"--train.gradients={work}/{name}.safetensors", ranks=ranks)
    assert_same_run(work, kind, name, whole[kind])
    found, expected = (load_file(f"{work}/{run}.safetensors") for run in (name, whole[kind]))
    assert all((found[key].double() - value.double()).norm() <= 1e-7 * value.double().norm() for key, value in expected.items())


@pytest.mark.parametrize("dtype, bound, of_dtype", [("float32", LAYOUT_FP32, []), ("bfloat16", LAYOUT_BF16, []), ("bfloat16", LAYOUT_BF16, ["--optim.masters=false"])],
                         ids=["float32", "bfloat16", "bfloat16 without masters"])
def test_every_way_of_cutting_learns_the_same_in_dtypes_that_round(work, dtype, bound, of_dtype):
    kind = "full_tied_biases"
    found = {}
    for mesh, faults in [(None, []), ("dp2", []), ("tp2", []), ("pp2", []), (None, ["--optim.lr=1.1e-3"])]:
        ranks, keys = MESHES[mesh] if mesh else (1, [])
        train(work, kind, name := f"{dtype}{len(of_dtype)}_{mesh}_{len(faults)}", *keys, *faults, *of_dtype, f"--model.dtype={dtype}", ranks=ranks)
        found[mesh, len(faults)] = losses(work, name)[0]
    expected = found.pop((None, 0))
    farthest = {key: max(abs(a / b - 1) for a, b in zip(losses, expected)) for key, losses in found.items()}
    assert farthest.pop((None, 1)) > 4 * bound  # what a tenth more of learning rate does
    assert max(farthest.values()) < bound, farthest


def test_adafactor_learns_the_same_on_every_mesh_and_goes_on_on_another(work):
    keys = ["--optim.kind=adafactor", "--optim.lr=0.02"]
    for name, (mesh, kind) in {"zero": ("dp4_zero3", FULL), "columns": ("dp2_tp2_zero2", FULL), "stages": ("dp2_tp2_pp2", TIED), "tensor": ("tp2", LORA)}.items():
        ranks, of_mesh = MESHES[mesh]
        train(work, kind, f"factored_{kind}", *keys)
        train(work, kind, f"factored_{name}", *of_mesh, *keys, "--train.stop_after=8", ranks=ranks, status=75)
        train(work, kind, f"factored_{name}", *of_mesh, *keys, "--train.stop_after=8", ranks=ranks, status=75)
        train(work, kind, f"factored_{name}", *keys)
        assert_same_run(work, kind, f"factored_{name}", f"factored_{kind}")


def test_int8_computes_with_the_same_codes_on_every_mesh(work):
    """Inputs of a layer whose columns are shared out are quantized by their whole rows. Where a last bit makes another code of an input, some
    layers differ by 1 / 127 of one value; quantized by the parts of rows nearly all codes differ."""
    shape = SHAPE | dict(hidden_size=64, head_dim=32, intermediate_size=128, tie_word_embeddings=False)
    (work / "int8.json").write_text(json.dumps(shape))
    keys = [f"--model.config={work}/int8.json", "--model.dtype=float32", "--quant.base=int8", "--quant.threshold=1.5", "--train.steps=6", "--eval.every=0", "--data.eval="]
    found = {}
    for mesh in ("one", "tp2", "tp4", "pp2", "pp2_tp2"):
        ranks, of_mesh = MESHES[mesh]
        train(work, LORA, f"int8_{mesh}", *keys, *of_mesh, ranks=ranks)
        found[mesh] = losses(work, f"int8_{mesh}")[:2]
    for mesh in ("dp4", "dp4_zero3"):  # each rank finds outliers in its own rows: these two have the same
        ranks, of_mesh = MESHES[mesh]
        train(work, LORA, f"int8_{mesh}", *keys, *of_mesh, ranks=ranks)
    assert losses(work, "int8_dp4") == losses(work, "int8_dp4_zero3")
    expected = found.pop("one")
    farthest = {mesh: [max(abs(a / b - 1) for a, b in zip(*values)) for values in zip(of, expected)] for mesh, of in found.items()}
    assert all(loss < LAYOUT_INT8[0] and norm < LAYOUT_INT8[1] for loss, norm in farthest.values()), farthest


@pytest.mark.parametrize("kind, meshes, keys", [
    (FULL, ["dp4_zero3", "tp2", "pp2", "dp2_tp2_pp2"], []),
    (QLORA, ["dp4_zero3", "pp2"], ["--lora.rank=64", "--optim.kind=adamw8bit"])], ids=["full", "adapters with moments in 8 bits"])
def test_weights_without_masters_are_rounded_by_the_same_bits_on_every_mesh(work, kind, meshes, keys):
    """After one step of AdamW, whose size does not depend on the gradient's: what differs is where a gradient changed its sign."""
    def step(mesh, masters="false"):
        ranks, of_mesh = MESHES[mesh]
        name = f"rounded_{kind}_{mesh}_{masters}"
        train(work, kind, name, *of_mesh, *keys, "--model.dtype=bfloat16", f"--optim.masters={masters}", "--train.steps=1", "--schedule.warmup_steps=0", "--optim.lr=1e-4",
              ranks=ranks)
        return load_file(work / name / KINDS[kind][2])

    def share_that_differs(a, b):
        return sum((a[key] != b[key]).sum().item() for key in a) / sum(value.numel() for value in a.values())

    one = step("one")
    for mesh in meshes:
        assert share_that_differs(one, step(mesh)) < 0.02, mesh
    assert share_that_differs(one, step("one", "true")) > 0.1  # rounded to the nearest: what other bits would do


def test_the_comparison_can_fail(work, whole):
    train(work, "full_tied_biases", "other", "--optim.lr=1.001e-3")
    with pytest.raises(AssertionError):
        assert_same_run(work, "full_tied_biases", "other", whole["full_tied_biases"])


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

    assert ("error: parallel.tensor=3: the 4 heads and the 2 key heads of " in (said := refusal(3, "--parallel.tensor=3"))
            and "cannot be shared out evenly over 3 ranks; sizes that can: 1, 2, 4" in said)
    # Of the meshes of 3 ranks those that 4 heads, 4 layers and 2 micro-batches a step allow.
    assert ("error: parallel.tensor=2 x parallel.pipeline=1 is 2 or a multiple of it, but there are 3 ranks: start 2 (mpirun -n 2 ...), or take one "
            "of these meshes: data 3 x tensor 1 x pipeline 1\n" in refusal(3, "--parallel.tensor=2", "--parallel.schedule=interleaved"))
    assert ("error: train.accumulation=3 with parallel.schedule=interleaved on 2 pipeline ranks: micro-batches go round in groups of 2; "
            in refusal(2, "--parallel.pipeline=2", "--parallel.schedule=interleaved", "--train.accumulation=3"))
    assert "error: parallel.virtual_stages=2 needs parallel.pipeline of 2 or more" in refusal(1, "--parallel.virtual_stages=2")
    assert "parallel.pipeline" in (said := refusal(5, "--parallel.pipeline=5")) and "layers" in said
    assert not (work / "refused").exists()


def test_a_prompt_that_is_wrong_ends_every_rank(work, whole):
    done = run(work, "generate", f"--model.path={work}/{whole['full_untied_packed']}/model", "--parallel.tensor=2", "fine", "a" * 4000, ranks=2)
    assert done.returncode == 3
    assert done.stderr.count("error: ") == 1 and "the model's context (max_position_embeddings) is 256" in done.stderr
