"""parallel.zero changes where a run keeps its state, and nothing of what it computes: metrics, gradients and the finished
product are those of plain data parallelism, bit for bit."""
import json

import h5py
import pytest

from program import SOURCE, run, small_run

LORA = ("--lora.rank=4", "--lora.dropout=0.1")
KEYS = {"full": ("--train.accumulation=2", "--comm.bucket_mb=0.1"), "lora": (*LORA, "--train.recompute=full", "--checkpoint.async=false")}
KEYS["tensor"] = (*KEYS["full"], "--parallel.tensor=2")
KEYS["pipeline"] = (*KEYS["full"], "--parallel.pipeline=2")
PRODUCT = {"full": "model/model.safetensors", "tensor": "model/model.safetensors", "pipeline": "model/model.safetensors", "lora": "adapter/adapter_model.safetensors"}


def train(work, name, kind, zero, ranks, *keys, status=0):
    done = run(work, "train", *small_run(work, name, *KEYS[kind], "--train.max_grad_norm=0.1", f"--parallel.zero={zero}", *keys), ranks=ranks)
    assert done.returncode == status, done.stderr
    return done.stderr


def outcome(work, name, kind):
    timed = {"seconds", "tokens_per_second", "memory_bytes", "bytes_reduced"}
    lines = [json.loads(line) for line in (work / name / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in line.items() if key not in timed} for line in lines]
    return metrics, (work / name / PRODUCT[kind]).read_bytes()


@pytest.mark.parametrize("kind, ranks", [("full", 2), ("full", 4), ("lora", 2), ("lora", 4), ("tensor", 4), ("pipeline", 4)])
def test_no_stage_changes_a_bit(tmp_path, kind, ranks):
    """Nor does it whether gradients, and weights of the next block, travel while the ranks compute."""
    def train_with(zero, name, *keys):
        train(tmp_path, name, kind, zero, ranks, f"--train.gradients={tmp_path}/{name}.safetensors", *keys)
        return outcome(tmp_path, name, kind), (tmp_path / f"{name}.safetensors").read_bytes()

    plain = train_with(0, "plain")
    (metrics, _), _ = plain
    assert len(metrics) == 6 and min(line["grad_norm"] for line in metrics if line["split"] == "train") > 0.1  # clipped
    for zero, *keys in [(1,), (2,), (3,), (3, "--comm.overlap=false")]:
        assert train_with(zero, f"zero{zero}{len(keys)}", *keys) == plain, (zero, keys)


@pytest.mark.parametrize("kind, ranks", [("full", 2), ("tensor", 4)])
def test_no_stage_changes_a_bit_of_weights_without_masters(tmp_path, kind, ranks):
    """Nor does the optimizer in host memory, or a run that goes on in another stage."""
    keys = ("--train.dtype=bfloat16", "--optim.masters=false")
    train(tmp_path, "plain", kind, 0, ranks, *keys)
    for zero in (1, 2, 3):
        train(tmp_path, f"zero{zero}", kind, zero, ranks, *keys, *(["--optim.offload=true"] if zero == 2 else []))
        assert outcome(tmp_path, f"zero{zero}", kind) == outcome(tmp_path, "plain", kind), zero
    for start, zero in enumerate((3, 0)):
        train(tmp_path, "cut", kind, zero, ranks, *keys, *(["--train.stop_after=2"] if start == 0 else []), status=0 if start else 75)
    assert outcome(tmp_path, "cut", kind) == outcome(tmp_path, "plain", kind)
    assert saved(tmp_path, "cut", 4) == saved(tmp_path, "plain", 4)
    assert not any(name.startswith("optimizer/master") for name in saved(tmp_path, "plain", 4))
    said = train(tmp_path, "plain", kind, 0, ranks, "--train.dtype=bfloat16", "--train.steps=5", status=2)
    assert "cannot go on from " in said and "\n  optim.masters: false then, true now\n" in said


@pytest.mark.parametrize("rule, state", [("sgd", "momentum_buffer"), ("lion", "exp_avg")])
def test_no_stage_changes_a_bit_of_another_rule(tmp_path, rule, state):
    """Nor does a run that goes on in another stage, with the optimizer in host memory."""
    keys = (f"--optim.kind={rule}", "--optim.lr=1e-3", *(["--optim.beta2=0.999"] if rule == "sgd" else []))  # which sgd does not read: the file's goes
    train(tmp_path, "plain", "tensor", 0, 4, *keys)
    for start, zero in enumerate((3, 1, 2)):
        train(tmp_path, "cut", "tensor", zero, 4, *keys, *(["--optim.offload=true"] if zero == 1 else []), *(["--train.stop_after=1"] if start < 2 else []),
              status=0 if start == 2 else 75)
    assert outcome(tmp_path, "cut", "tensor") == outcome(tmp_path, "plain", "tensor")
    tensors = saved(tmp_path, "plain", 4)
    assert saved(tmp_path, "cut", 4) == tensors
    assert {name.split("/")[1] for name in tensors if name.startswith("optimizer/")} == {state}


EIGHT_BIT = ("--optim.kind=adamw8bit", "--train.dtype=bfloat16")


@pytest.mark.parametrize("kind, ranks", [("full", 4), ("pipeline", 4)])
def test_no_stage_changes_a_bit_of_moments_in_8_bits(tmp_path, kind, ranks):
    train(tmp_path, "plain", kind, 0, ranks, *EIGHT_BIT)
    train(tmp_path, "zero2", kind, 2, ranks, *EIGHT_BIT)
    for start, zero in enumerate((3, 1, 0)):
        train(tmp_path, "cut", kind, zero, ranks, *EIGHT_BIT, *(["--optim.offload=true"] if zero == 1 else []), *(["--train.stop_after=1"] if start < 2 else []),
              status=0 if start == 2 else 75)
    state = saved(tmp_path, "plain", 4)
    assert {(name.split("/")[1], dtype) for name, (_, dtype, _) in state.items() if name.startswith("optimizer/") and "q_proj" in name} == {
        ("exp_avg", "uint8"), ("exp_avg_sq", "uint8"), ("exp_avg_scale", "float32"), ("exp_avg_sq_scale", "float32"), ("master", "float32")}
    for name in ("zero2", "cut"):
        assert outcome(tmp_path, name, kind) == outcome(tmp_path, "plain", kind), name
        assert saved(tmp_path, name, 4) == state, name


def test_moments_in_8_bits_are_cut_where_blocks_end(tmp_path):
    """Over tensor ranks too, whose slices of columns have whole blocks; what a checkpoint of one layout says, another goes on from."""
    said = train(tmp_path, "refused", "tensor", 0, 2, *EIGHT_BIT, status=2)
    assert ("error: optim.kind=adamw8bit keeps 256 elements of a tensor together, but parallel.tensor=2 cuts model.layers.0.self_attn.o_proj.weight [192, 192] "
            "into slices like [192, 96]: " in said)
    assert "error: optim.kind=adamw8bit is not possible with train.dtype=float64" in train(tmp_path, "refused", "full", 0, 1, EIGHT_BIT[0], "--train.dtype=float64", status=2)
    shape = json.loads((SOURCE / "configs/quickstart/model/config.json").read_text())
    shape |= dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    wide = ("--optim.kind=adamw8bit", f"--model.config={tmp_path}/config.json", f"--model.tokenizer={SOURCE}/configs/quickstart/model")
    train(tmp_path, "plain", "full", 0, 1, *wide)
    train(tmp_path, "cut", "tensor", 0, 2, *wide, "--train.stop_after=2", status=75)
    train(tmp_path, "cut", "full", 0, 1, *wide)
    losses = [[line["loss"] for line in outcome(tmp_path, name, "full")[0]] for name in ("plain", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # fp32 sums in another order, whose moments may have a neighbour's code
    states = [saved(tmp_path, name, 4) for name in ("plain", "cut")]
    assert {name: value[:2] for name, value in states[0].items()} == {name: value[:2] for name, value in states[1].items()}


def test_a_run_goes_on_in_another_stage(tmp_path):
    train(tmp_path, "whole", "full", 0, 2)
    for zero in (3, 1, 2, 0):
        train(tmp_path, "cut", "full", zero, 2, "--train.stop_after=1", status=0 if zero == 0 else 75)
    assert outcome(tmp_path, "cut", "full") == outcome(tmp_path, "whole", "full")


def test_a_run_goes_on_in_another_stage_on_another_mesh(tmp_path):
    train(tmp_path, "whole", "full", 0, 2)
    for kind, zero, ranks in [("tensor", 3, 4), ("full", 1, 4), ("tensor", 2, 2), ("full", 3, 2)]:
        last = zero == 3 and kind == "full"
        keys = () if last else ("--train.stop_after=1",)
        # Four rows a copy in two micro-batches, or in one where there are twice the copies: a step keeps its rows.
        train(tmp_path, "cut", kind, zero, ranks, *keys, status=0 if last else 75)
    losses = [[line["loss"] for line in outcome(tmp_path, name, "full")[0]] for name in ("whole", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32 sums in another order, four steps


def test_the_plan_says_what_is_shared_out(tmp_path):
    plans = [train(tmp_path, f"plan{zero}", "full", zero, 2, "--dry-run") for zero in (0, 1)]
    share = [float(plan.split("optimizer ")[1].split(" MiB")[0]) for plan in plans]
    assert share[0] == pytest.approx(2 * share[1], abs=0.02)


def test_reducing_every_micro_batch_needs_a_place_for_the_sums(tmp_path):
    assert "error: parallel.reduce=micro_batch needs parallel.zero=2 or 3" in train(
        tmp_path, "refused", "full", 1, 1, "--parallel.reduce=micro_batch", status=2)
    losses = []
    for keys in [(0,), (2, "--parallel.reduce=micro_batch")]:
        train(tmp_path, f"each{keys[0]}", "full", keys[0], 2, *keys[1:])
        losses.append([line["loss"] for line in outcome(tmp_path, f"each{keys[0]}", "full")[0]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32 sums in another order, four steps


def test_neighbours_share_out_and_groups_of_them_repeat(tmp_path):
    train(tmp_path, "plain", "lora", 0, 4)
    train(tmp_path, "pairs", "lora", 3, 4, "--parallel.shard_within=2")
    losses = [[line["loss"] for line in outcome(tmp_path, name, "lora")[0]] for name in ("plain", "pairs")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # fp32 sums in another order, four steps
    for keys, wrong in [((1, 4, "--parallel.shard_within=3"), "parallel.shard_within=3 does not divide the 4 copies of the model"),
                        ((0, 1, "--parallel.shard_within=1"), "parallel.shard_within=1 needs parallel.zero=1, 2 or 3")]:
        assert wrong in train(tmp_path, "refused", "lora", *keys, status=2)


def saved(work, name, step):
    """All tensors of a checkpoint: name, shape, dtype, bytes."""
    with h5py.File(work / name / f"checkpoints/step-{step}/all.h5") as file:
        tensors = {}
        file.visititems(lambda path, item: tensors.update({path: (item.shape, str(item.dtype), item[()].tobytes())}) if isinstance(item, h5py.Dataset) else None)
    return tensors


@pytest.mark.parametrize("kind, zero, ranks, keys", [("full", 0, 2, ()), ("lora", 1, 2, ("--train.dtype=bfloat16",)), ("tensor", 3, 4, ())])
def test_an_optimizer_in_host_memory_changes_nothing(tmp_path, kind, zero, ranks, keys):
    train(tmp_path, "plain", kind, zero, ranks, *keys)
    train(tmp_path, "host", kind, zero, ranks, *keys, "--optim.offload=true")
    for start, offload in enumerate(("true", "false", "true")):  # one goes on where the other has saved
        train(tmp_path, "both", kind, zero, ranks, *keys, f"--optim.offload={offload}", *(["--train.stop_after=1"] if start < 2 else []), status=0 if start == 2 else 75)
    state = saved(tmp_path, "plain", 4)
    assert sum(name.startswith("optimizer/exp_avg/") for name in state) > 5
    for name in ("host", "both"):
        assert outcome(tmp_path, name, kind) == outcome(tmp_path, "plain", kind), name
        assert saved(tmp_path, name, 4) == state, name
