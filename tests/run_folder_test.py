"""What a run may write over, what it begins with, and what a finished run answers."""
import shutil

import pytest

from program import SOURCE, override, run, small_run

EVAL = SOURCE / "configs/quickstart/eval.jsonl"
KEYS = ("--eval.every=0", "--data.eval=", "--checkpoint.every=2")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("folder")
    assert run(work, "train", *small_run(work, "made", *KEYS)).returncode == 0
    return work


@pytest.fixture
def made(work, tmp_path):
    """The folder of a finished run of four steps."""
    return shutil.copytree(work / "made", tmp_path / "made")


def train(made, *keys):
    return run(made.parent, "train", *override(small_run(made.parent, "made", *KEYS), keys))


def refused(done, status, sentence):
    assert (done.returncode, done.stderr) == (status, f"error: {sentence}\n")


def test_a_finished_run_begins_again_at_a_checkpoint_that_is_named_but_once(made):
    keys = [f"--run.resume={made}/checkpoints/step-2"]
    again = train(made, *keys)
    assert again.returncode == 0 and f"going on from {made}/checkpoints/step-2, step 2 of 4\n" in again.stderr
    assert train(made, *keys).stderr.splitlines()[-1] == (f"{made} is finished (step 4); raise train.steps to go on, or set another "
                                                          "run.dir")


def test_a_finished_run_without_its_product_says_how_to_get_it(made):
    shutil.rmtree(made / "model")
    said = train(made).stderr
    assert said == (f"{made} is finished (step 4); raise train.steps to go on, or set another run.dir; its model is gone: trireme export "
                    f"{made}/config.ini --run.resume={made}/checkpoints/step-N --run.dir=OUT writes it again\n")
    command = said.split("trireme ")[1].split(" writes")[0].replace("step-N", "step-4").replace("OUT", str(made / "model"))
    assert run(made.parent, *command.split()).returncode == 0
    assert train(made).stderr.endswith("or set another run.dir\n")


def test_files_of_others_are_not_overwritten(made):
    there = made / "model/config.json"
    before = there.read_bytes()
    refused(train(made, f"--run.dir={made}/model"), 2, f"run.dir={made}/model is no run folder (it has no run.lock), and the run would "
            "overwrite the config.json that is in it; name a new folder")
    refused(run(made.parent, "train", "configs/finetune.ini", f"--data.train={EVAL}", f"--model.path={made}/model", f"--run.dir={made}"), 2,
            f"run.dir={made}: the run would write model/ over model.path={made}/model; set another run.dir")
    assert there.read_bytes() == before and not (made / "model/run.lock").exists()


@pytest.mark.parametrize("name, why", [("nosuch", "not there"), ("checkpoints/latest", "no folder")])
def test_no_checkpoint_to_resume(made, name, why):
    refused(train(made, f"--run.resume={made}/{name}"), 2, f"run.resume={made}/{name} is {why}: allowed are auto, never, and the folder of "
            "a checkpoint, RUN/checkpoints/step-N")


def test_a_run_folder_is_no_model(made):
    eval_of = lambda *keys: run(made.parent, "eval", f"--data.eval={EVAL}", *keys)
    refused(eval_of(f"--model.path={made}"), 3, f"model folder {made} has no config.json; the run's model is {made}/model")
    adapter = made.parent / "lora"
    assert train(made, f"--run.dir={adapter}", "--lora.rank=2").returncode == 0
    refused(eval_of(f"--model.path={adapter}/adapter"), 3, f"model folder {adapter}/adapter holds a PEFT adapter: set lora.path to it, and "
            "model.path to its base model")
    refused(eval_of(f"--model.path={made}/model", f"--lora.path={adapter}"), 3, f"lora.path={adapter} is no PEFT adapter: there is no "
            f"adapter_config.json in it; the run's adapter is {adapter}/adapter")
    step = f"{adapter}/checkpoints/step-4"
    refused(run(made.parent, "export", "--model.config=configs/quickstart/model/config.json", f"--run.resume={step}", f"--run.dir={made}/out"), 2,
            f"the checkpoint {step} holds adapters, but lora.rank is 0: name the run's config.ini, as in trireme export RUN/config.ini "
            f"--run.resume={step} --run.dir=OUT")


def test_prepare_names_all_ways_to_a_tokenizer(tmp_path):
    refused(run(tmp_path, "prepare", f"--data.train={EVAL}"), 2, "neither model.path nor model.config is set: set model.path to a Hugging "
            "Face folder, or model.config to a config.json for random weights, or model.tokenizer to a folder with a tokenizer.json")
