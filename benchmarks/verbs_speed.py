"""The verbs on the model that the quickstart trains: seconds from the start of the process to its end."""
import argparse
import pathlib
import tempfile

import measure

QUESTION = "Could you say what Trireme is?"


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--print", action="store_true", help="write no result file")
    options = arguments.parse_args()
    table = measure.Sides()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        trireme = lambda verb, *keys: measure.run([measure.BINARY, verb, *keys], env={"TRIREME_CACHE": str(folder / "cache")})
        trireme("train", "configs/quickstart.ini", f"--run.dir={folder / 'run'}", "--train.micro_batch_size=16",
                "--train.threads=1", "--eval.every=0")
        model, data = f"--model.path={folder / 'run/model'}", "configs/quickstart/eval.jsonl"
        records = measure.SOURCE / data
        verbs = {
            "doctor": ("this machine", lambda: trireme("doctor")),
            "tokenize": ("64 records", lambda: measure.run(["sh", "-c", f'"$1" tokenize "$2" < {records}', "sh", measure.BINARY, model])),
            "prepare": ("64 records, tokens cached", lambda: trireme("prepare", model, f"--data.train={data}", "--data.show=3")),
            "eval": ("64 records, tokens cached", lambda: trireme("eval", model, f"--data.eval={data}", "--data.max_length=256")),
            "generate": ("one question, its whole answer", lambda: trireme("generate", model, "--generate.chat=true", QUESTION)),
            "plan": ("configs/quickstart.ini, tokens cached", lambda: trireme("plan", "configs/quickstart.ini"))}
        for _ in range(options.rounds):
            for verb, (_, run) in verbs.items():
                table.add(verb, "trireme", run()["seconds"])
    rows = [table.row(verb, f"quickstart model, {shape}", "s", target=1) for verb, (shape, _) in verbs.items()]
    measure.finish("verbs_speed", rows, f"medians of {options.rounds} rounds in which the verbs take turns", not options.print)


if __name__ == "__main__":
    main()
