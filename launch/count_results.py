"""Counts test cases from JUnit XML and ctest's list of failures; prints `N passed, N failed, N skipped`.

usage: count_results.py RESULTS_FOLDER CTEST_FOLDER. Exit status 1 if a case failed or none ran.
"""
import pathlib
import sys
import xml.etree.ElementTree as ElementTree

results, ctest = map(pathlib.Path, sys.argv[1:3])
passed = failed = skipped = 0
with_failures = set()
for path in sorted(results.glob("*.xml")):
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except ElementTree.ParseError as error:  # its cases are unknown: none may vanish from the count
        failed += 1
        with_failures.add(path.stem)
        print("failed:", path.stem, f"(its results cannot be read: {error})")
        continue
    for case in cases:
        name = f"{path.stem}: {case.get('classname')}.{case.get('name')}"
        skip = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
            with_failures.add(path.stem)
            print("failed:", name)
        elif skip is not None or case.get("result") == "skipped" or case.get("status") == "notrun":
            skipped += 1
            reason = (skip.get("message") or "").strip() if skip is not None else ""
            print("skipped:", name, reason.splitlines()[0] if reason else "")
        else:
            passed += 1

# An entry that ended without saying which case failed (crash, time limit, not built) is a failure of its own.
failures = ctest / "LastTestsFailed.log"
if failures.exists():
    for line in failures.read_text().split():
        entry = line.split(":", 1)[1]
        if entry not in with_failures:
            failed += 1
            print("failed:", entry, "(the whole program)")

print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(1 if failed or not passed else 0)
