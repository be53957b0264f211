"""log.trace: what each rank did, in Chrome's trace event format; and the line at the end of every run that says where the time went."""
import collections
import decimal
import json
import re

import pytest

from program import kill_all, processes, run, small_run, start, command, wait_for, end_of

STAGES, COPIES, PARTS, MICRO_BATCHES, STEPS = 2, 2, 2, 3, 4
RANKS_OF_STAGE = COPIES * PARTS  # pipeline is the outermost axis
KINDS = {"other", "compute", "wait", "bubble", "data", "optimizer", "checkpoint", "evaluation", "communication"}
MESH = (f"--parallel.pipeline={STAGES}", f"--parallel.tensor={PARTS}", f"--train.accumulation={MICRO_BATCHES}", "--train.micro_batch_size=1", "--log.trace=true")


def spans_of(path):
    """Complete events of one file, times in whole nanoseconds; and the names of its tracks."""
    events = json.loads(path.read_text(), parse_float=decimal.Decimal)["traceEvents"]
    spans = [dict(e, ts=int(e["ts"] * 1000), dur=int(e["dur"] * 1000)) for e in events if e["ph"] == "X"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert len(spans) + sum(e["ph"] == "M" for e in events) == len(events)
    return spans, tracks


def nested(spans):
    """The spans of one track as (span, what is right inside of it); fails where two overlap and neither holds the other."""
    tree, open_spans = [], []
    for span in sorted(spans, key=lambda s: (s["ts"], -s["dur"])):
        while open_spans and open_spans[-1][0]["ts"] + open_spans[-1][0]["dur"] <= span["ts"]:
            open_spans.pop()
        if open_spans:
            outer = open_spans[-1][0]
            assert span["ts"] + span["dur"] <= outer["ts"] + outer["dur"], (span, outer)
            open_spans[-1][1].append(span)
        tree.append((span, []))
        open_spans.append(tree[-1])
    return tree


def within(outer, span):
    return outer["ts"] <= span["ts"] and span["ts"] + span["dur"] <= outer["ts"] + outer["dur"]


def shares(line):
    """'compute 71.0 %, communication not hidden 12.0 % (gradients 8.0 %, tensor 4.0 %)' in tenths of a percent."""
    outside = re.sub(r"\([^)]*\)", "", line)
    return {name.strip(): round(float(value) * 10) for name, value in re.findall(r"([a-z ]+?) (\d+\.\d) %", outside)}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    work = tmp_path_factory.mktemp("trace")
    done = run(work, "train", *small_run(work, "run", *MESH), ranks=STAGES * RANKS_OF_STAGE)
    assert done.returncode == 0, done.stderr
    return done.stderr, [spans_of(work / f"run/trace/rank-{rank}.json") for rank in range(STAGES * RANKS_OF_STAGE)]


def test_spans_are_whole_and_nest(traced):
    for rank, (spans, tracks) in enumerate(traced[1]):
        by_track = collections.defaultdict(list)
        for span in spans:
            assert span["pid"] == rank and span["cat"] in KINDS and span["ts"] >= 0 and span["dur"] >= 0, span
            by_track[span["tid"]].append(span)
        assert by_track.keys() <= tracks.keys() and tracks[0] == "main"
        for tid, of_track in by_track.items():
            tree = nested(of_track)
            if tid > 0:  # collectives of a group: one after the other on each of its tracks
                assert not any(inside for _, inside in tree), tracks[tid]
        assert {"data", "pipeline", "tensor", "world"} <= set(tracks.values())


def test_every_action_of_the_schedule_is_there_once_a_step(traced):
    for rank, (spans, _) in enumerate(traced[1]):
        main = [s for s in spans if s["tid"] == 0]
        steps = [s for s in main if s["name"] == "step"]
        assert [s["args"]["step"] for s in steps] == list(range(1, STEPS + 1))
        stage = rank // RANKS_OF_STAGE
        for step in steps:
            inside = [s for s in main if within(step, s) and s is not step]
            assert {s["args"]["step"] for s in inside} == {step["args"]["step"]}
            count = collections.Counter((s["name"], s["args"].get("micro_batch"), s["args"].get("chunk")) for s in inside)
            for micro_batch in range(MICRO_BATCHES):
                for action in ("forward", "backward"):
                    assert count.pop((action, micro_batch, stage)) == 1
                waits = count.pop(("wait for input", micro_batch, stage))
                assert waits == 1  # of the first stage for gradients, of the last one for hidden states
                assert count.pop(("load batch", micro_batch, None)) == 1
            assert count.pop(("wait for all ranks", None, None)) == count.pop(("update", None, None)) == 1
            assert not {name for name, *_ in count} & {"forward", "backward", "wait for input"}
        assert sum(s["name"] == "evaluate" for s in main) == 2 and sum(s["name"] == "export" for s in main) == 1


def test_what_is_sent_is_received_and_clocks_agree(traced):
    traces = [spans for spans, _ in traced[1]]
    for row in range(RANKS_OF_STAGE):
        moved = [collections.Counter(), collections.Counter()]
        for stage in range(STAGES):
            for s in traces[stage * RANKS_OF_STAGE + row]:
                if s["cat"] == "communication" and s["args"]["group"] == "pipeline":
                    moved[s["name"] == "send"][1 - stage if s["name"] == "send" else stage] += s["args"]["bytes"]
        assert moved[0] == moved[1] and min(moved[0].values()) > 0
    # Nobody is done with the sums of a step before everybody has begun them. Clocks are compared by messages between busy
    # processes, which may have to wait for a core.
    waits = [[s for s in spans if s["name"] == "wait for all ranks"] for spans in traces]
    for of_step in zip(*waits):
        assert max(s["ts"] for s in of_step) - min(s["ts"] + s["dur"] for s in of_step) < 50_000_000
    assert len(waits[0]) == STEPS


def test_the_line_at_the_end_agrees_with_the_trace(traced):
    said, traces = traced
    mean, worst = [line for line in said.splitlines() if line.startswith("time")]
    assert mean.startswith("time: ") and re.match(r"time of rank \d, which computed least: ", worst), said
    totals = collections.Counter()
    for spans, _ in traces:
        inside_of = nested([s for s in spans if s["tid"] == 0])
        hidden = set()  # within what counts as a whole
        for span, inside in inside_of:
            whole = span["cat"] in ("bubble", "checkpoint", "evaluation") or id(span) in hidden
            hidden |= {id(s) for s in inside if whole}
            if id(span) not in hidden:
                totals[span["cat"]] += span["dur"] - (0 if whole else sum(s["dur"] for s in inside))
    # A span is added up and written by the same readings of the clock, so only what no span covers may differ, and rounding.
    said_shares = shares(mean)
    said_total, total = 1000 - said_shares.get("other", 0), sum(totals[kind] for kind in KINDS - {"other"})
    for name, kind in {"compute": "compute", "communication not hidden": "wait", "bubble": "bubble", "optimizer": "optimizer",
                       "evaluation": "evaluation", "checkpoints": "checkpoint", "data": "data"}.items():
        assert said_shares.get(name, 0) == pytest.approx(said_total * totals[kind] / total, abs=4), (name, mean)
    for line in (mean, worst):
        assert sum(shares(line.split(": ", 1)[1]).values()) == 1000, line
    assert shares(worst.split(": ", 1)[1])["compute"] <= shares(mean)["compute"]


def test_without_it_there_is_no_file_but_the_line(tmp_path):
    done = run(tmp_path, "train", *small_run(tmp_path))
    lines = [line for line in done.stderr.splitlines() if line.startswith("time")]
    assert len(lines) == 1 and sum(shares(lines[0][6:]).values()) == 1000 and shares(lines[0])["compute"] > 0, done.stderr
    assert not (tmp_path / "run/trace").exists()


def test_a_run_that_goes_on_writes_another_file(tmp_path):
    for name, status in (("rank-0.json", 75), ("rank-0.2.json", 0)):
        done = run(tmp_path, "train", *small_run(tmp_path, "run", "--log.trace=true", *(["--train.stop_after=1"] if status else [])))
        assert done.returncode == status, done.stderr
        steps = [s["args"]["step"] for s in spans_of(tmp_path / "run/trace" / name)[0] if s["name"] == "step"]
        assert steps == ([1] if status else [2, 3, 4])


def test_what_a_killed_run_leaves_can_be_read(tmp_path):
    job = start(tmp_path, command("train", *small_run(tmp_path, "run", "--log.trace=true", "--train.steps=10000", "--eval.every=0"), ranks=2))
    metrics = tmp_path / "run/metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, job)
    kill_all(tmp_path)
    end_of(job)
    wait_for(lambda: not processes(tmp_path))
    for rank in range(2):
        steps = [s["args"]["step"] for s in spans_of(tmp_path / f"run/trace/rank-{rank}.json")[0] if s["name"] == "step"]
        assert len(steps) >= 2 and steps == list(range(1, len(steps) + 1))


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    done = run(tmp_path, "train", *small_run(tmp_path, "run", "--train.micro_batch_size=2", "--train.accumulation=2", "--train.stop_after=1"))
    (tmp_path / "run/trace").write_text("no folder")
    done = run(tmp_path, "train", *small_run(tmp_path, "run", "--log.trace=true", "--train.micro_batch_size=2"), ranks=2)
    assert done.returncode == 1 and done.stderr.count("error: ") == 1, done.stderr
    assert f"error: cannot create {tmp_path}/run/trace: Not a directory; log.trace=false does without it" in done.stderr
