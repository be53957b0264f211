"""launch/quickstart.sh itself, from the build on: it trains, evaluates and exports, and the model knows the answers."""
import json
import os
import pathlib
import re
import shutil
import subprocess

from program import BINARY, SOURCE, environment


def test_quickstart_trains_a_model_that_answers(tmp_path):
    clone = tmp_path / "clone"
    shutil.copytree(SOURCE / "launch", clone / "launch")
    (clone / "configs").symlink_to(SOURCE / "configs")
    (clone / "build/release").mkdir(parents=True)
    (clone / "build/release/trireme").symlink_to(BINARY)
    (clone / "build/release/.jobs").write_text("2\n")
    (clone / "runs/quickstart").mkdir(parents=True)  # of an earlier time: this one takes another folder
    (clone / "launch/setup.sh").write_text("#!/bin/sh\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cmake").write_text("#!/bin/sh\n")
    (tmp_path / "bin/cmake").chmod(0o755)
    env = environment(tmp_path, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name in ("TRIREME_BINARY", "OMP_NUM_THREADS"):
        env.pop(name)
    done = subprocess.run([clone / "launch/quickstart.sh"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = re.findall(r"^== (\w+)", done.stdout, re.M)
    assert stages == ["setting", "building", "training", "evaluating", "asking"], done.stdout
    assert "ready after" in done.stderr and "4 ranks of" in done.stderr and "wrote runs/quickstart-2/model" in done.stderr, done.stderr
    held_out = json.loads(re.search(r"^\{.*\}$", done.stdout, re.M)[0])
    assert held_out["token_accuracy"] > 0.9, held_out
    learnt = {}
    for name in ("train", "eval"):
        for line in (SOURCE / f"configs/quickstart/{name}.jsonl").read_text().splitlines():
            question, answer = json.loads(line)["messages"]
            learnt.setdefault(question["content"], (name, answer["content"]))
    asked = re.findall(r"^Q: (.*)\nA: (.*)$", done.stdout, re.M)
    assert len(asked) == 3
    for question, answer in asked:
        where, right = learnt[question]
        assert where == "eval" and answer == right, question
