"""What Trireme writes, the Python libraries read, and the reverse: safetensors, transformers, PEFT, h5py.

The C++ tests do the reading and writing: they take folders from TRIREME_INTEROP and TRIREME_INTEROP_OUT."""
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

BUILD = Path(os.environ["TRIREME_BINARY"]).parent


def run_test(program, test_filter, given, output=None, ranks=None):
    command = [str(BUILD / program), f"--gtest_filter={test_filter}", "--gtest_color=no"]
    if ranks:
        command = ["mpirun", "-q", "--bind-to", "none", "--oversubscribe", "-n", str(ranks)] + command
    env = dict(os.environ, TRIREME_INTEROP=str(given), OMP_NUM_THREADS="1",
               OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    env.pop("GTEST_OUTPUT", None)
    if output:
        env["TRIREME_INTEROP_OUT"] = str(output)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "[  PASSED  ] 1 test." in done.stdout, done.stdout + done.stderr


def small_model(dtype=torch.float32):
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                         num_attention_heads=3, num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_of_transformers_goes_through_and_loads_again(tmp_path, dtype):
    model = small_model(dtype)
    model.save_pretrained(tmp_path / "in", max_shard_size="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    run_test("safetensors_test", "Safetensors.FolderRoundTrip", tmp_path / "in", tmp_path / "out")

    out = tmp_path / "out"
    assert len(list(out.glob("*.safetensors"))) > 1
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    expected = model.state_dict()
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in expected.values())
    got = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name

    (out / "config.json").write_text((tmp_path / "in" / "config.json").read_text())
    ids = torch.arange(20)[None]
    logits = [LlamaForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits for folder in (tmp_path / "in", out)]
    assert torch.equal(*logits)


def test_adapter_of_peft_goes_through_and_loads_again(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    adapted = get_peft_model(small_model(), LoraConfig(r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False,
                                                       target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "in")
    run_test("checkpoint_test", "CheckpointFiles.AdapterRoundTrip", tmp_path / "in", tmp_path / "out")
    again = PeftModel.from_pretrained(small_model(), tmp_path / "out")
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, adapted(ids).logits)
    assert not torch.allclose(again(ids).logits, small_model()(ids).logits)


@pytest.mark.parametrize("ranks", [1, 4])
def test_h5py_reads_the_whole_tensors_of_a_checkpoint(tmp_path, ranks):
    run_test("checkpoint_mpi_test", "CheckpointTest.ViewShowsWholeTensors", tmp_path / "checkpoints", ranks=ranks)
    folder = tmp_path / "checkpoints" / "step-3"

    def expected(shape, dtype):  # the test's global_value() at scale 3
        count = int(np.prod(shape))
        return (torch.remainder(torch.arange(count, dtype=torch.float64) * 3, 251) - 100).to(dtype).view(shape)

    with h5py.File(folder / "all.h5") as view:
        for name, shape, dtype in [("model/embed.weight", (7, 5), torch.float32),
                                   ("model/layers.0.up.weight", (10, 6), torch.bfloat16),
                                   ("model/layers.0.down.weight", (6, 11), torch.float16),
                                   ("optimizer/exp_avg/flat", (1001,), torch.float64),
                                   ("optimizer/step", (), torch.int64)]:
            got = np.asarray(view[name][()], dtype=np.float64)
            assert got.shape == shape, name
            assert np.array_equal(got, expected(shape, dtype).to(torch.float64).numpy()), name
        assert view["optimizer/none"].shape == (0, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == "trireme checkpoint" and manifest["state"] == {"step": 3}
    assert len(manifest["files"]) <= ranks


def test_killed_saves_leave_a_whole_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    env = dict(os.environ, TRIREME_INTEROP=str(folder), TRIREME_NUM_SAVES="1000000", OMP_NUM_THREADS="1", TMPDIR=str(tmp_path))
    env.pop("GTEST_OUTPUT", None)
    command = [str(BUILD / "checkpoint_mpi_test"), "--gtest_filter=CheckpointTest.GoesOnAfterAnotherProcess"]
    last_seen, num_leftovers = 0, 0
    random.seed(1)
    for _ in range(5):
        # One rank without mpirun: the kill hits the writer itself, at any point of a save.
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not (folder / f"step-{last_seen + 1}").exists():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.001)
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        num_leftovers += len(list(folder.glob("*.tmp")))

        done = subprocess.run(command, env=dict(env, TRIREME_NUM_SAVES="0"), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        found = int(re.search(r"found step (\d+)", done.stdout)[1])
        steps = [int(path.name[5:]) for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
        assert found == max(steps) > last_seen and "broken" not in done.stderr
        assert not list(folder.glob("*.tmp"))
        last_seen = found
    assert num_leftovers > 0  # else no kill ever hit a save
