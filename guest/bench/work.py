"""The workloads of `make bench`, in a guest or natively in a chroot: the standard library and Debian's programs.

    python3 work.py NAME…      prints "WORK <name> <figure>" for each, or "WORK <name> failed: <why>"

A figure is in seconds, less is better, or, for names in RATES, a rate that is better when it is more.
Every workload checks its own result: a quick wrong answer is a failure.
"""

import collections
import hashlib
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

WORKLOADS = {}
RATES = set()
LIMIT_S = 600


def workload(name, *, rate=False):
    """Register a function that does the work and, for a rate, returns it."""

    def register(function):
        WORKLOADS[name] = function
        if rate:
            RATES.add(name)
        return function

    return register


def expect(what, got, wanted):
    """Raise ValueError on a wrong result."""
    if got != wanted:
        raise ValueError(f"{what} is {got!r}, expected {wanted!r}")


def output(*command, **options):
    """Standard output of a command that must succeed; standard error where it says so."""
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, **options)
    return done.stdout


@workload("python-loop")
def python_loop():
    value = 0
    for number in range(3_000_000):
        value = (value + number * 3) & 0xFFFF_FFFF
    expect("sum", value, 3 * (3_000_000 * 2_999_999 // 2) & 0xFFFF_FFFF)


@workload("python-dict")
def python_dict():
    table = collections.defaultdict(list)
    for number in range(300_000):
        table[f"key{number % 50_000}"].append(number)
    expect("entries", sum(len(each) for each in table.values()), 300_000)


@workload("python-float")
def python_float():
    total = 0.0
    for number in range(1_000_000):
        total += math.sqrt(number * 1.5) * 0.25 - total / 3.0
    expect("finite", math.isfinite(total), True)


@workload("sha256sum-64M")
def sha256sum():
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(64 << 20)
        text = output("sha256sum", file.name)
    expect("sum", text.split()[0], hashlib.sha256(bytes(64 << 20)).hexdigest())


@workload("bzip2")
def bzip2():
    packed = subprocess.run(["bzip2", "-9", "-c", "/bin/bash"], check=True, stdout=subprocess.PIPE).stdout
    expect("magic", packed[:4], b"BZh9")


@workload("gzip")
def gzip():
    program = os.path.realpath("/usr/bin/python3")
    packed = subprocess.run(["gzip", "-9", "-c", program], check=True, stdout=subprocess.PIPE).stdout
    expect("magic", packed[:2], b"\x1f\x8b")


def openssl_rate(*algorithm):
    text = output("openssl", "speed", "-seconds", "1", "-bytes", "16384", "-evp", *algorithm, stderr=subprocess.STDOUT)
    return float(re.findall(r"([\d.]+)k\s*$", text, re.MULTILINE)[-1]) / 1000


@workload("aes-128-cbc", rate=True)
def aes():
    return openssl_rate("aes-128-cbc")


@workload("sha-256", rate=True)
def sha256():
    return openssl_rate("sha256")


@workload("chacha20", rate=True)
def chacha20():
    return openssl_rate("chacha20")


@workload("rsa-2048-sign", rate=True)
def rsa():
    text = output("openssl", "speed", "-seconds", "1", "rsa2048", stderr=subprocess.DEVNULL)
    return float(re.search(r"^rsa 2048 bits +\S+s +\S+s +([\d.]+)", text, re.MULTILINE)[1])


@workload("fork-exec-500")
def fork_exec():
    text = output("sh", "-c", "i=0; while [ $i -lt 500 ]; do /bin/true; i=$((i+1)); done; echo $i")
    expect("turns", text.strip(), "500")


@workload("read-write-300k")
def read_write():
    subprocess.run(
        ["dd", "if=/dev/zero", "of=/dev/null", "bs=1", "count=300000"], check=True, stderr=subprocess.DEVNULL
    )


def sysbench_events(processes):
    command = ["sysbench", "cpu", "--time=3", "run"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    texts = [each.communicate(timeout=LIMIT_S)[0] for each in running]
    return sum(float(re.search(r"events per second: +([\d.]+)", text)[1]) for text in texts)


@workload("sysbench-cpu", rate=True)
def sysbench_cpu():
    return sysbench_events(1)


@workload("sysbench-cpu-2", rate=True)
def sysbench_two():
    return sysbench_events(2)


@workload("sysbench-memory", rate=True)
def sysbench_memory():
    return float(re.search(r"\(([\d.]+) MiB/sec\)", output("sysbench", "memory", "--time=3", "run"))[1])


C_FUNCTION = """
int f{n}(int *p, int c) {{
    int s = {n};
    for (int i = 0; i < c; i++) {{
        if (p[i] & {bit}) s += p[i] * {n}; else s ^= p[i] >> {shift};
    }}
    switch (s & 3) {{ case 0: s += c; break; case 1: s -= c; break; default: s = -s; }}
    return s;
}}
"""


@workload("gcc-5000-lines")
def gcc():
    with tempfile.TemporaryDirectory() as folder:
        source = "".join(C_FUNCTION.format(n=n, bit=1 << n % 30, shift=n % 31) for n in range(556))
        expect("lines", source.count("\n") > 4_990, True)
        pathlib.Path(folder, "big.c").write_text(source, encoding="ascii")
        began = time.perf_counter()
        subprocess.run(["gcc", "-O1", "-c", f"{folder}/big.c", "-o", f"{folder}/big.o"], check=True)
        return time.perf_counter() - began


@workload("sqlite3-200k")
def sqlite():
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 200000)"
    script = f"CREATE TABLE t(i INTEGER, s TEXT); {rows} INSERT INTO t SELECT i, 'row ' || i FROM n;"
    with tempfile.TemporaryDirectory() as folder:
        text = output("sqlite3", f"{folder}/t.db", f"{script} CREATE INDEX x ON t(s); SELECT count(*), sum(i) FROM t;")
    expect("rows", text.strip(), "200000|20000100000")


NODE = """
let table = new Map(), sum = 0;
for (let i = 0; i < 2000000; i++) { const k = (i * 7919) % 10007; table.set(k, (table.get(k) || 0) + i % 13); }
for (const v of table.values()) sum += v;
function fib(n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
console.log(sum, fib(29), JSON.parse(JSON.stringify([...Array(50000).keys()])).length);
"""


@workload("nodejs")
def node():
    with tempfile.NamedTemporaryFile("w", suffix=".js") as file:
        file.write(NODE)
        file.flush()
        expect("output", output("node", file.name).split(), ["11999989", "514229", "50000"])


JAVA = """
public class Bench {
    static int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
    public static void main(String[] args) {
        long sum = 0;
        java.util.HashMap<Integer, Integer> table = new java.util.HashMap<>();
        for (int i = 0; i < 2000000; i++) table.merge(i * 31 % 9973, i % 7, Integer::sum);
        for (int value : table.values()) sum += value;
        System.out.println(sum + " " + fib(32));
    }
}
"""


@workload("openjdk")
def java():
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "Bench.java").write_text(JAVA, encoding="ascii")
        text = output("java", "-Xshare:auto", f"{folder}/Bench.java")
    expect("output", text.split(), ["5999995", "2178309"])


def main(names):
    """Run the workloads named, or all; a failure is a line of its own."""
    print("WORK begin 0", flush=True)
    for name in names or list(WORKLOADS):
        began = time.perf_counter()
        try:
            figure = WORKLOADS[name]()
        except Exception as error:  # every kind of failure is a result here
            print(f"WORK {name} failed: {type(error).__name__}: {error}", flush=True)
            continue
        elapsed = time.perf_counter() - began
        print(f"WORK {name} {elapsed if figure is None else figure:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
