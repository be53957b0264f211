#!/usr/bin/env python3
"""gate.py COMPILER ARGUMENTS...: runs nvcc (through ccache or not) and fails where the machine code is not what was meant:
registers spilled to memory, wgmma made serial or setmaxnreg ignored, which ptxas only mentions and no flag makes an error.

Exceptions are lines of spills.txt beside this file: SOURCE | sm_XX | WHAT | TEXT | REASON, for functions of that file whose
demangled name has TEXT in it; WHAT is the most bytes that may be spilled (stores and loads together) or a number like C7510. One
that fits nothing any more is an error too."""

import os
import re
import shutil
import subprocess
import sys

# https://docs.nvidia.com/cuda/parallel-thread-execution (wgmma, setmaxnreg); numbers as ptxas 13.0 prints them.
SERIAL = ("C7508", *(f"C75{n}" for n in range(10, 21)))


def read_exceptions(path, source):
    """[line, sm_XX, what, text] of those for this source file."""
    found = []
    if not os.path.exists(path):
        return found
    with open(path) as lines:
        for number, line in enumerate(lines, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            fields = [field.strip() for field in line.split("|")]
            what_fits = len(fields) == 5 and all(fields) and (fields[2].isdigit() or fields[2] in SERIAL)
            if not what_fits:
                raise SystemExit(f"{path}:{number}: not SOURCE | sm_XX | BYTES or {', '.join(SERIAL)} | TEXT | REASON")
            if fields[0] == source:
                found.append([number, *fields[1:4]])
    return found


def findings(text):
    """(sm_XX, mangled function, bytes or C-number) of what ptxas says."""
    found, arch, function = [], "", ""
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            function, arch = match.groups()
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match.group(1)
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if spilled := int(match.group(1)) + int(match.group(2)):
                found.append((arch, function, str(spilled)))
        elif (match := re.search(r"\((C\d+)\)", line)) and match.group(1) in SERIAL:
            where = re.search(r"function '([^']+)'", line)
            found.append(("sm_90a", where.group(1) if where else "a function that ptxas does not name", match.group(1)))  # no other has wgmma
    return list(dict.fromkeys(found))


def demangle(names):
    if not names or not shutil.which("c++filt"):
        return names
    return subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True).stdout.splitlines()


def judge(text, source, table):
    """What is wrong, a sentence each."""
    exceptions, used, wrong = read_exceptions(table, source), set(), []
    found = findings(text)
    for (arch, _, what), name in zip(found, demangle([function for _, function, _ in found])):
        excused = False
        for number, its_arch, its_what, its_text in exceptions:
            enough = its_what == what or (its_what.isdigit() and what.isdigit() and int(what) <= int(its_what))
            if its_text in name and its_arch == arch and enough:
                excused = True
                used.add(number)
        if not excused:
            happened = f"{what} bytes of registers are spilled" if what.isdigit() else f"{what}: wgmma is serial or setmaxnreg ignored"
            wrong.append(f"{source}: {happened} in {name} for {arch}; mend the kernel, or give the reason in {table}")
    if re.search(r"Compiling entry function", text):  # else nothing was compiled, or without -v
        wrong += [f"{table}:{number}: nothing in {source} needs this exception any more" for number, *_ in exceptions if number not in used]
    return wrong


def main(command):
    compiles = "-c" in command
    run = subprocess.run(command + ["-Xptxas=-v"] * compiles, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    serial = re.compile(r"\((" + "|".join(SERIAL) + r")\)")
    for line in run.stdout.splitlines():  # what -v brought is not for the eye
        if not re.match(r"ptxas info|\s+\d+ bytes stack frame", line) or serial.search(line):
            print(line, file=sys.stderr)
    if run.returncode != 0 or not compiles:
        return run.returncode
    source = os.path.basename(next(a for a in command if a.endswith(".cu")))
    wrong = judge(run.stdout, source, os.path.join(os.path.dirname(os.path.abspath(__file__)), "spills.txt"))
    for sentence in wrong:
        print("error: " + sentence, file=sys.stderr)
    if wrong and "-o" in command:
        os.unlink(command[command.index("-o") + 1])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
