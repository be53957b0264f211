"""A picture of one step of a run with log.trace=true: timeline_picture.py RUN STEP OUT.svg. A row a rank, its main thread:
forward, backward and weight gradients by micro-batch, waiting, bubble, optimizer."""
import json
import pathlib
import sys

COLOURS = {"forward": "#4e79a7", "backward": "#59a14f", "backward_input": "#59a14f", "backward_weight": "#b6d7a8", "wait": "#e15759",
           "bubble": "#d9d9d9", "optimizer": "#f1a340", "data": "#b07aa1"}
WIDTH, LEFT, ROW, GAP = 1000, 60, 34, 8


def spans(path, step):
    main = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X" and e["tid"] == 0]
    whole = next(e for e in main if e["name"] == "step" and e["args"]["step"] == step)
    inside = [e for e in main if whole["ts"] <= e["ts"] and e["ts"] + e["dur"] <= whole["ts"] + whole["dur"] and e is not whole]
    return whole, sorted(inside, key=lambda e: -e["dur"])  # what is within another comes over it


def main():
    folder, step, out = pathlib.Path(sys.argv[1]) / "trace", int(sys.argv[2]), pathlib.Path(sys.argv[3])
    ranks = [spans(folder / f"rank-{rank}.json", step) for rank in range(sum(path.stem[5:].isdigit() for path in folder.glob("rank-*.json")))]
    begin = min(whole["ts"] for whole, _ in ranks)
    length = max(whole["ts"] + whole["dur"] for whole, _ in ranks) - begin
    scale = (WIDTH - LEFT) / length
    height = len(ranks) * (ROW + GAP) + 40
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">',
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    for rank, (_, inside) in enumerate(ranks):
        y = rank * (ROW + GAP) + GAP
        lines.append(f'<text x="4" y="{y + ROW / 2 + 4}">rank {rank}</text>')
        for e in inside:
            colour = COLOURS.get(e["name"], COLOURS.get(e["cat"]))
            if colour is None:
                continue
            x, w = LEFT + (e["ts"] - begin) * scale, e["dur"] * scale
            if w < 0.3:  # a file of a size that pages show
                continue
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{w:.1f}" height="{ROW}" fill="{colour}"/>')
            if "micro_batch" in e["args"] and e["cat"] == "compute" and w > 10:
                lines.append(f'<text x="{x + w / 2:.1f}" y="{y + ROW / 2 + 4}" text-anchor="middle" fill="white">{e["args"]["micro_batch"] + 1}</text>')
    x, y = LEFT, height - 14
    for name in ("forward", "backward", "backward_weight", "wait", "bubble", "optimizer", "data"):
        text = {"backward_weight": "weight gradient"}.get(name, name)
        lines.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[name]}"/><text x="{x + 16}" y="{y}">{text}</text>')
        x += 40 + 7 * len(text)
    lines.append(f'<text x="{WIDTH - 4}" y="{y}" text-anchor="end">{length / 1000:.0f} ms</text></svg>')
    out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
