"""Turns the output of `iscsi-test-cu -v` into a table of results, and compares it with an expected table.

Usage: conformance.py OUTPUT FOUND-TABLE EXPECTED-TABLE

A line of a table is `Suite.Test RESULT [reason]`, RESULT one of PASS, FAIL, SKIP (a test that says [SKIPPED] in any part and
fails in none). In the expected table, `Suite.Test A|B` allows either result. Any other difference, better or worse, ends
with status 1: a table that is out of date hides the next regression.
"""

import re
import sys


def parse(text):
    results = {}
    suite = test = None
    body = []

    def close():
        if test is None:
            return
        joined = "\n".join(body)
        failed = [line.strip() for line in body if "[FAILED]" in line]
        skipped = [line.strip() for line in body if "[SKIPPED]" in line]
        if re.search(r"^FAILED", joined, re.M):
            result = ("FAIL", reason(failed))
        elif skipped:
            result = ("SKIP", reason(skipped))
        elif re.search(r"^passed", joined, re.M):
            result = ("PASS", "")
        else:
            result = ("FAIL", "no result: the test did not end")
        results[f"{suite}.{test}"] = result

    def reason(lines):
        return re.sub(r"^.*\[(FAILED|SKIPPED)\]\s*", "", lines[0]) if lines else ""

    for line in text.splitlines():
        head = re.match(r"Suite: (\S+)", line)
        if head:
            close()
            suite, test, body = head.group(1), None, []
            continue
        if line.startswith("Run Summary:"):
            close()
            test = None
            break
        head = re.match(r"  Test: (\S+) \.\.\.(.*)", line)
        if head:
            close()
            test, body = head.group(1), [head.group(2)]
        elif test is not None:
            body.append(line)
    else:
        close()
        print("iscsi-test-cu did not reach its end")
    return results


def main():
    output, found_path, expected_path = sys.argv[1:]
    with open(output, errors="replace") as file:
        found = parse(file.read())
    with open(found_path, "w") as file:
        for name in sorted(found):
            print(name, *[part for part in found[name] if part], file=file)
    counts = {kind: sum(1 for result, _ in found.values() if result == kind) for kind in ("PASS", "FAIL", "SKIP")}
    print(f"{counts['PASS']} pass, {counts['FAIL']} fail, {counts['SKIP']} skip, of {len(found)}")

    expected = {}
    try:
        with open(expected_path) as file:
            for line in file:
                if line.strip() and not line.startswith("#"):
                    name, result = line.split()[:2]
                    expected[name] = result
    except FileNotFoundError:
        print(f"there is no expected table {expected_path}")
        return 1
    differences = 0
    for name in sorted(set(found) | set(expected)):
        got, why = found.get(name, ("ABSENT", ""))
        want = expected.get(name, "ABSENT")
        if got not in want.split("|"):
            differences += 1
            print(f"{name}: expected {want}, found {got}{': ' + why if why else ''}")
    print(f"{differences} differences from {expected_path}")
    return 1 if differences or not found else 0


sys.exit(main())
