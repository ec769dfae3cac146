"""Checks that nothing was skipped unnoticed: python .ci/check_skips.py SKIPS RUN.xml [CONDITION...].

SKIPS is the committed list: a line is a condition, spaces, and a test without its parameters
(`no-shared  tests.test_corpus::test_flores`). Conditions hold or not in this run: `always` holds, the others only
where they are named as arguments. Exactly the tests whose condition holds may be skipped (or xfail).
Only tests of this run are compared, so that one list serves the default, the slow and the bridge run.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def read_list(path: Path, holding: set[str]) -> set[str]:
    """Return the tests that are expected to be skipped."""
    lines = [line.split("#")[0].split() for line in path.read_text("utf-8").splitlines()]
    return {line[1] for line in lines if line and line[0] in holding}


def read_run(path: Path) -> dict[str, str | None]:
    """Return every test of a run, without parameters, and why (one case of) it was skipped, else None."""
    found: dict[str, str | None] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '').split('[')[0]}"
        skipped = case.find("skipped")
        reason = None if skipped is None else skipped.get("message", "") or "no reason given"
        found[name] = found.get(name) or reason
    return found


def main() -> int:
    """Return 0 if the skipped tests are the listed ones."""
    listed, run, *conditions = sys.argv[1:]
    expected = read_list(Path(listed), {"always", *conditions})
    tests = read_run(Path(run))
    if not tests:
        print(f"{run} holds no test")
        return 1
    skipped = {name for name, reason in tests.items() if reason is not None}
    problems = [f"skipped, and not in {listed}: {name} ({tests[name]})" for name in sorted(skipped - expected)]
    ran = {name for name in expected if name in tests} - skipped
    problems += [f"in {listed}, but it ran: {name}" for name in sorted(ran)]
    print("\n".join(problems) or f"{len(tests)} tests, {len(skipped)} skipped, all of them listed")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
