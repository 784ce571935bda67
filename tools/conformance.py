"""Runs kvm-unit-tests on the software CPU and compares with the committed table of expected results.

    make conformance KUT=<folder>        the whole suite; the folder is a built checkout
    tools/conformance.py <folder> NAME…  only these configurations, with their output

The suite is not part of this repository. Its x86/unittests.cfg says which program runs with which processors and
arguments; QEMU's own options in it are left aside, as the machine and its processor are Ostler's.
"""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

EXPECTED = Path(__file__).resolve().parent.parent / "tests" / "conformance" / "kvm-unit-tests.txt"
# The exit port turns a program's status into status * 2 + 1.
STATUSES = {0 << 1 | 1: "pass", 77 << 1 | 1: "skip"}
TIMEOUT_S = 90


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration of the suite."""

    name: str
    program: Path
    cpus: int
    memory: str
    arguments: str


def configurations(suite: Path) -> list[Config]:
    """Read the suite's table; 32-bit configurations are left out."""
    parser = configparser.ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.read_string(_joined((suite / "x86" / "unittests.cfg").read_text()))
    found = []
    for name in parser.sections():
        section = parser[name]
        if section.get("arch", "x86_64") != "x86_64":
            continue
        options = section.get("qemu_params", section.get("extra_params", ""))
        memory = re.search(r"-m (\d+)([gG]?)", options)
        found.append(
            Config(
                name=name,
                program=suite / "x86" / section["file"],
                cpus=int(section.get("smp", "1")) if section.get("smp", "1").isdigit() else 2,
                memory=memory[1] + (memory[2].upper() or "M") if memory else "128M",
                arguments=" ".join(shlex.split(section.get("test_args", ""))) or _appended(options),
            )
        )
    return found


def _joined(text: str) -> str:
    """A value in ''' goes on over lines, which no parser of this format knows."""
    return re.sub(r"'''(.*?)'''", lambda match: " ".join(match[1].split()), text, flags=re.DOTALL)


def _appended(options: str) -> str:
    words = shlex.split(options)
    return words[words.index("-append") + 1] if "-append" in words else ""


def run(config: Config) -> tuple[str, str]:
    """Return pass, fail, skip or timeout, and the console's output."""
    command = [
        sys.executable, "-m", "ostler", "run", "--accel", "soft", "--test-devices", "--kernel", str(config.program),
        "--cpus", str(config.cpus), "--memory", config.memory, "--append", config.arguments,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        return "timeout", (error.stdout or b"").decode(errors="replace")
    output = (done.stdout + done.stderr).decode(errors="replace")
    return STATUSES.get(done.returncode, "fail"), output


def expected() -> dict[str, str]:
    """Read the committed table: a name, its result, and behind # why."""
    lines = (line.partition("#")[0].split() for line in EXPECTED.read_text().splitlines())
    return {words[0]: words[1] for words in lines if len(words) == 2}


def main(arguments: list[str]) -> int:
    """Run what was asked for; 1 where a result differs from the table's."""
    if not arguments or not (Path(arguments[0]) / "x86" / "unittests.cfg").is_file():
        sys.stderr.write("conformance: KUT must name a built checkout of kvm-unit-tests (./configure && make)\n")
        return 2
    suite, names = Path(arguments[0]), arguments[1:]
    table = expected()
    differing = []
    for config in configurations(suite):
        if config.name not in (names or table):
            continue
        result, output = run(config)
        wanted = table.get(config.name, "?")
        if result != wanted:
            differing.append(config.name)
        summary = re.findall(r"^SUMMARY: (.*)$", output, re.MULTILINE)
        print(f"{config.name:<32} {result:<8} expected {wanted:<8} {summary[-1] if summary else ''}", flush=True)
        if names:
            print(output)
    print(f"conformance: {len(differing)} differ from the table{': ' if differing else ''}{' '.join(differing)}")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
