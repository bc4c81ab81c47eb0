"""Run the tests of the seam, the grafts, the probes and the hosts on the oldest and the newest releases we allow.

    make test-versions                         # every environment; goes on where it stopped
    make test-versions ONLY=lowest             # one of them: lowest, newest, lowest-torch
    python tools/versions.py --again           # although nothing has changed since the last run
    python tools/versions.py --page            # only write docs/results/versions.md anew from what is recorded

Every environment is a virtual environment of its own under `.versions/`. What "lowest" is stands in `pyproject.toml`;
what "newest" is, pip says. Outcomes are recorded in `benchmarks/results/versions.json`, and `docs/results/versions.md`
is written from them: both are committed. An environment whose packages, code and tests are those of its record is not
run again. A release that cannot be installed leaves a row that says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "versions.json"
PAGE = ROOT / "docs" / "results" / "versions.md"
PLACE = ROOT / ".versions"
WATCHED = ("transformers", "peft", "accelerate", "tokenizers", "datasets")
"""packages that are taken at their lowest and at their newest"""
TESTS = (
    "tests/seam",
    "tests/grafts",
    "tests/policies",
    "tests/probes",
    "tests/steering",
    "tests/hosts",
    "tests/contracts",
    "tests/inputs",
)
TORCH = "torch==2.13.0"

INTRODUCTION = """# Versions

Written by `make test-versions` (`tools/versions.py`) from `benchmarks/results/versions.json`, not by hand. The tests of
the seam, the grafts, the probes and the hosts, run in virtual environments with the oldest and with the newest releases
that `pyproject.toml` allows. On a transformers or peft newer than the newest one here, alula gives one warning when
something is attached to a model. A CPU build of the oldest torch is taken where pip finds one, else the stock one,
whose CUDA packages come with it.
"""


class CommandError(Exception):
    """A command failed, such as pip's that should make an environment; says why in a line."""


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its name, what it is for, and what pip is asked for beside alula's own requirements."""

    name: str
    what: str
    pins: tuple[str, ...]
    newest: bool = False

    @property
    def python(self) -> Path:
        return PLACE / self.name / ("Scripts" if os.name == "nt" else "bin") / "python"


def requirements() -> dict[str, Requirement]:
    """What alula and its tests require by name, from `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    each = map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"])
    return {requirement.name: requirement for requirement in each}


def lowest(requirement: Requirement) -> str:
    """The requirement at its lower bound, as pip reads it."""
    bounds = [each.version for each in requirement.specifier if each.operator in (">=", "==", "~=")]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: {requirement} has no single lower bound")
    return f"{requirement.name}=={bounds[0]}"


def environments(torch: str) -> list[Environment]:
    """The environments there are."""
    needed = requirements()
    lows = tuple(lowest(needed[name]) for name in WATCHED)
    return [
        Environment("lowest", "the oldest releases we allow", (torch, *lows)),
        Environment("newest", "the newest releases we allow", (torch,), newest=True),
        Environment(
            "lowest-torch", "the oldest releases we allow, and the oldest torch", (lowest(needed["torch"]), *lows)
        ),
    ]


def install(environment: Environment) -> None:
    """Make the environment, or bring it up to date.

    Raises:
        CommandError: pip could not.
    """
    python = environment.python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(PLACE / environment.name)], "no virtual environment")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    upgrade = ["--upgrade", "--upgrade-strategy", "eager"] if environment.newest else []
    _run(
        [*pip, *upgrade, *environment.pins, "--editable", f"{ROOT}[dev]", "--editable", f"{ROOT}/fledgling"],
        "pip could not install it",
    )


def _run(command: list[str], failure: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        told = re.findall(r"^\s*error: (.*)", done.stderr, re.MULTILINE | re.IGNORECASE)
        told = [line for line in told if not line.startswith("ResolutionImpossible")]  # says less than the line before
        raise CommandError(told[-1].strip() if told else failure)
    return done.stdout


def installed(environment: Environment) -> dict[str, str]:
    """The releases of all packages in the environment by name."""
    listed = _run([str(environment.python), "-m", "pip", "list", "--format", "json"], "pip could not list packages")
    return {each["name"].lower().replace("_", "-"): each["version"] for each in json.loads(listed)}


def held_back(environment: Environment, packages: dict[str, str]) -> dict[str, str]:
    """Newer releases that our bounds allow and pip did not take, since another package's bounds forbid them."""
    found = {}
    for name in WATCHED if environment.newest else ():
        try:
            told = _run([str(environment.python), "-m", "pip", "index", "versions", name], "")
        except CommandError:
            continue
        listed = re.search(r"Available versions: (.*)", told)
        allowed = requirements()[name].specifier
        newest = max(allowed.filter(_versions(listed[1] if listed else "")), default=None)
        if newest is not None and newest > Version(packages[name]):
            found[name] = str(newest)
    return found


def _versions(listed: str) -> Iterator[Version]:
    for each in listed.split(","):
        try:
            yield Version(each.strip())
        except InvalidVersion:  # no release under today's rules
            continue


def fingerprint(packages: dict[str, str]) -> str:
    """A digest of the packages and of the code and the tests that run on them."""
    digest = hashlib.sha256(json.dumps(packages, sort_keys=True).encode())
    for file in sorted(path for top in ("src", "fledgling", "tests") for path in (ROOT / top).rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(str(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> str:
    """The commit of the checkout, and whether it was changed."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = _run([*git, "rev-parse", "--short", "HEAD"], "no checkout").strip()
        changed = _run([*git, "status", "--porcelain", "--untracked-files=no", "--", "src", "tests"], "no checkout")
    except (CommandError, OSError):
        return "unknown (not a checkout)"
    return f"{head} with changes" if changed else head


def test(environment: Environment, processes: int) -> dict[str, Any]:
    """Run the tests; how many passed, failed and were skipped, and which failed."""
    report = PLACE / f"{environment.name}.xml"
    report.unlink(missing_ok=True)
    command = [str(environment.python), "-m", "pytest", "-n", str(processes), "--dist", "loadfile", *TESTS]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # nobody else's packages
    options = ["--continue-on-collection-errors", f"--junitxml={report}"]
    code = subprocess.run([*command, *options], cwd=ROOT, check=False, env=own).returncode
    if code not in (0, 1):  # done, and done with failures
        raise SystemExit(f"{environment.name}: pytest did not get to its end (exit code {code}); nothing is recorded")
    return {"command": " ".join(["python", *command[1:]]), **outcome(report)}


def outcome(report: Path) -> dict[str, Any]:
    """What a JUnit report says. An error while collecting or setting up counts as a failure."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None and case not in failures]
    return {
        "passed": len(cases) - len(failures) - len(skipped),
        "failed": len(failures),
        "skipped": len(skipped),
        "failures": sorted(_node(case) for case in failures),
    }


def _node(case: ElementTree.Element) -> str:
    """What pytest calls a test, from the dotted name a report has."""
    parts = case.get("classname", "").split(".")
    depth = next((i for i, part in enumerate(parts, start=1) if part.startswith("test_")), len(parts))
    file = "/".join(parts[:depth]) + ".py" if parts[0] else ""  # a file that cannot be read has its name alone
    return "::".join(filter(None, (file, *parts[depth:], case.get("name"))))


def page(record: dict[str, Any]) -> str:
    """docs/results/versions.md."""
    columns = ("torch", *WATCHED)
    lines = [
        INTRODUCTION,
        "| environment | " + " | ".join(columns) + " | Python | passed | failed | skipped | day |",
        "|---" * (len(columns) + 6) + "|",
    ]
    for name, row in record.items():
        packages = row["packages"]
        cells = [f"**{name}**: {row['what']}", *(packages.get(each, "") for each in columns), row["python"]]
        if "reason" in row:
            cells += ["no build at hand", "", ""]
        else:
            cells += [str(row[count]) for count in ("passed", "failed", "skipped")]
        lines.append("| " + " | ".join([*cells, row["day"]]) + " |")
    for name, row in record.items():
        lines += ["", f"## {name}", ""]
        if "reason" in row:
            lines.append(f"Not run: {row['reason']}")
            continue
        lines += [f"`{row['command']}` on {row['machine']}, at commit {row['commit']}."]
        for package, newer in row["held_back"].items():
            lines += ["", f"{package} {newer} is out; another package's bounds keep pip from it."]
        if row["failures"]:
            lines += ["", "Failed:", "", *(f"- `{each}`" for each in row["failures"])]
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], names: list[str]) -> None:
    """Save the record and the page, rows in the order of `names`."""
    record = {name: record[name] for name in names if name in record}
    for path, text in ((RECORD, json.dumps(record, indent=2) + "\n"), (PAGE, page(record))):
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run these environments")
    parser.add_argument("--torch", default=TORCH, help="the torch of the environments that do not test torch itself")
    parser.add_argument("--processes", type=int, default=2, help="tests at a time")
    parser.add_argument("--again", action="store_true", help="run although nothing has changed since")
    parser.add_argument("--page", action="store_true", help="write the page from the record and stop")
    options = parser.parse_args()
    known = environments(options.torch)
    names = [each.name for each in known]
    if unknown := sorted(set(options.only) - set(names)):
        parser.error(f"no environment {unknown[0]!r}; there are {', '.join(names)}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if options.page:
        write(record, names)
        return
    failed = False
    for environment in known:
        if options.only and environment.name not in options.only:
            continue
        row = run(environment, record.get(environment.name, {}), again=options.again, processes=options.processes)
        failed |= bool(row.get("failed"))
        record[environment.name] = row
        write(record, names)
    print(f"written: {PAGE.relative_to(ROOT)}, {RECORD.relative_to(ROOT)}")
    raise SystemExit(failed)


def run(environment: Environment, before: dict[str, Any], *, again: bool, processes: int) -> dict[str, Any]:
    """The row of an environment: the one there is, where nothing has changed, or a new one."""
    print(f"{environment.name}: installing {' '.join(environment.pins)}", flush=True)
    row = {"what": environment.what, "python": platform.python_version(), "day": f"{datetime.now(UTC):%Y-%m-%d}"}
    try:
        install(environment)
    except CommandError as error:
        print(f"{environment.name}: no build at hand: {error}", flush=True)
        return {**row, "packages": dict(pin.split("==") for pin in environment.pins), "reason": str(error)}
    packages = installed(environment)
    now = fingerprint(packages)
    if before.get("fingerprint") == now and not again:
        print(f"{environment.name}: nothing has changed since {before['day']}", flush=True)
        return before
    shown = {name: packages[name] for name in ("torch", *WATCHED)}
    print(f"{environment.name}: testing {', '.join(f'{k} {v}' for k, v in shown.items())}", flush=True)
    told = test(environment, processes)
    print(
        f"{environment.name}: {told['passed']} passed, {told['failed']} failed, {told['skipped']} skipped", flush=True
    )
    return {
        **row,
        "machine": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "packages": packages,
        "held_back": held_back(environment, packages),
        "fingerprint": now,
        **told,
    }


if __name__ == "__main__":
    main()
