"""Runs kvm-unit-tests on the software CPU and compares with the committed table of expected results.

    make conformance KUT=<folder>        the whole suite; the folder is a built checkout
    tools/conformance.py <folder> NAME…  only these configurations, with their output

The suite is not part of this repository. Its x86/unittests.cfg says which program runs with which processors, memory
and arguments. Of QEMU's options in it, memory and the processor are translated: each of QEMU's models becomes one of
Ostler's that has what the test is about, and its changes by feature those that Ostler knows of. One configuration runs
at a time, as many of them measure. Each processor has a minute of the host's time, or more where the suite itself gives
more; on the clock it may be three times that, as hosts are busy.
"""

from __future__ import annotations

import configparser
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ostler.accel.features import FEATURES as KNOWN_FEATURES

EXPECTED = Path(__file__).resolve().parent.parent / "tests" / "conformance" / "kvm-unit-tests.txt"
# The exit port turns a program's status into status * 2 + 1; the suite halves the 77 that means "skipped" for that.
STATUSES = {0 << 1 | 1: "pass", 77 >> 1 << 1 | 1: "skip"}
TIMEOUT_S = 60
CLOCK_TO_CPU_TIME = 3
OUT_OF_TIME = (-signal.SIGXCPU, -signal.SIGKILL)
# QEMU's processors as Ostler's. "max" has whatever can be had.
PROCESSORS = {"max": "ostler-v2.2,+pku,+pks", "qemu64": "ostler-v1.1", "Opteron_G1": "ostler-v1.1"}
VENDORS = {"vendor=GenuineIntel": "vendor=intel", "vendor=AuthenticAMD": "vendor=amd"}
FEATURES = {"tsc-deadline": "tsc_deadline_timer"}


@dataclass(frozen=True, slots=True)
class Config:
    """One configuration of the suite."""

    name: str
    program: Path
    cpus: int
    memory: str
    arguments: str
    cpu: str
    timeout_s: int


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
                cpu=_processor(options),
                timeout_s=max(TIMEOUT_S, int(section.get("timeout", "0"))),
            )
        )
    return found


def _joined(text: str) -> str:
    """A value in ''' goes on over lines, which no parser of this format knows."""
    return re.sub(r"'''(.*?)'''", lambda match: " ".join(match[1].split()), text, flags=re.DOTALL)


def _appended(options: str) -> str:
    words = shlex.split(options)
    return words[words.index("-append") + 1] if "-append" in words else ""


def _processor(options: str) -> str:
    """Ostler's model for QEMU's -cpu option; the default one where there is none or it is of no concern."""
    found = re.search(r"-cpu (\S+)", options)
    name, *changes = found[1].split(",") if found else ("",)
    if name not in PROCESSORS:
        return "ostler-v2.2"
    words = [PROCESSORS[name]]
    for change in changes:
        feature = FEATURES.get(change[1:], change[1:])
        if change in VENDORS:
            words.append(VENDORS[change])
        elif change[0] in "+-" and feature in KNOWN_FEATURES:
            words.append(change[0] + feature)
    return ",".join(words)


def run(config: Config) -> tuple[str, str]:
    """Return pass, fail, skip or timeout, and the console's output."""
    command = [
        "prlimit", f"--cpu={config.timeout_s * config.cpus}",
        sys.executable, "-m", "ostler", "run", "--accel", "soft", "--test-devices", "--kernel", str(config.program),
        "--cpus", str(config.cpus), "--cpu", config.cpu, "--memory", config.memory, "--append", config.arguments,
    ]  # fmt: skip
    try:
        clock_s = CLOCK_TO_CPU_TIME * config.timeout_s
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=clock_s, check=False)
    except subprocess.TimeoutExpired as error:
        return "timeout", (error.stdout or b"").decode(errors="replace")
    output = (done.stdout + done.stderr).decode(errors="replace")
    result = "timeout" if done.returncode in OUT_OF_TIME else STATUSES.get(done.returncode, "fail")
    # Programs without a summary end with status 0 whatever they found.
    return ("fail" if result == "pass" and re.search(r"^FAIL", output, re.MULTILINE) else result), output


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
        print(
            f"{config.name:<26} {result:<8} expected {wanted:<8} {summary[-1].strip() if summary else ''}", flush=True
        )
        if names:
            print(output)
        elif result != wanted:
            lines = output.splitlines()
            print("\n".join(f"    {line}" for line in [line for line in lines if "FAIL" in line] or lines[-3:]))
    print(f"conformance: {len(differing)} differ from the table{': ' if differing else ''}{' '.join(differing)}")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
