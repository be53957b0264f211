"""A checkpoint of one mesh goes on on any other, with the optimizer's state: in float64, over every ordered pair of meshes."""
import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bounds import LOGITS_FP32
from mesh_runs import KINDS, MESHES, assert_same_run, keys_of, train, whole, work  # noqa: F401 (fixtures)
from program import run


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


THIRD = len(WALK) // 3


@pytest.mark.parametrize("kind, meshes", [*((kind, WALK[part * THIRD:(part + 1) * THIRD + 1]) for part, kind in enumerate(list(KINDS)[:3])), ("qlora_packed", SAVED_ON)],
                         ids=[*list(KINDS)[:3], "qlora_packed"])
def test_every_mesh_goes_on_from_a_checkpoint_of_every_other(work, whole, kind, meshes):
    for number, mesh in enumerate(meshes, 1):
        last = number == len(meshes)
        ranks, keys = MESHES[mesh]
        train(work, kind, f"walk_{kind}", *keys, *([] if last else ["--train.stop_after=1"]), ranks=ranks, status=0 if last else 75)
    assert_same_run(work, kind, f"walk_{kind}", whole[kind])


@pytest.mark.parametrize("kind", ["dora_pissa", "qdora", "loftq"])
def test_what_begins_with_the_weights_goes_on_on_another_mesh(work, whole, kind):
    for mesh, stop, status in [("dp2_tp2_zero3", ["--train.stop_after=8"], 75), ("pp2_interleaved", [], 0)]:
        ranks, keys = MESHES[mesh]
        train(work, kind, f"moved_{kind}", *keys, *stop, ranks=ranks, status=status)
    assert_same_run(work, kind, f"moved_{kind}", whole[kind])


def test_from_eight_ranks_to_two_to_peft(work, whole):
    """LoRA on 2 x 2 x 2, stopped, gone on with on two tensor ranks: PEFT's logits are those of `eval` on a 2 x 2 mesh."""
    base, adapter, ids = work / whole["full_untied_packed"] / "model", work / "eight/adapter", [[5, 6, 7, 8, 9, 10, 11, 300], [3, 1, 4]]
    keys = ["--model.path=" + str(base), "--lora.rank=4", "--eval.every=0"]
    for mesh, stop, status in [("dp2_tp2_pp2", ["--train.stop_after=2"], 75), ("tp2", [], 0)]:
        ranks, cut = MESHES[mesh]
        given = [key for key in keys_of(work, "full_untied_packed", "eight", *keys, *cut, *stop, "--train.steps=4") if "model.config" not in key]
        done = run(work, "train", *given, ranks=ranks)
        assert done.returncode == status, done.stderr
    (work / "ids.json").write_text(json.dumps(ids))
    done = run(work, "eval", f"--model.path={base}", f"--lora.path={adapter}", f"--eval.token_ids={work}/ids.json", f"--eval.logits={work}/eight.safetensors",
               "--parallel.tensor=2", "--parallel.pipeline=2", ranks=4)
    assert done.returncode == 0, done.stderr
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    with torch.no_grad():
        before = [plain(torch.tensor([row])).logits[0] for row in ids]
        theirs = peft.PeftModel.from_pretrained(plain, adapter)
        for i, row in enumerate(ids):
            logits, ours = theirs(torch.tensor([row])).logits[0], load_file(work / "eight.safetensors")[f"logits.{i}"].double()
            assert (ours - logits).abs().max() < LOGITS_FP32 < (before[i] - logits).abs().max()  # and the adapter counts
