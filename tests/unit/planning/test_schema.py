"""Estate files: what they mean, and one line for each way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ostler.errors import BadRequest
from ostler.planning.schema import percentile, read_files
from tests.unit.planning.estates import GIB

HOST = '[[hosts]]\nname = "a"\ncpus = 4\nmemory = "8G"\n'
GUEST = '[[guests]]\nname = "x"\nhost = "a"\nmemory = "1G"\ncpu = 0.5\n'


def written(folder: Path, text: str, name: str = "estate.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_read_files_toml_and_json_are_one_estate(tmp_path: Path) -> None:
    toml = written(tmp_path, "[assumptions]\npue = 1.2\n" + HOST + GUEST)
    other = {"hosts": [{"name": "b", "cpus": 2, "memory": 4 * GIB}],
             "guests": [{"name": "y", "host": "b", "memory": GIB, "cpu_samples": [1, 2, 3, 4], "disk": "2G",
                         "shared_disk": False, "memory_used": "512M"}]}  # fmt: skip
    both = read_files([toml, written(tmp_path, json.dumps(other), "b.json")])

    assert [each.name for each in both.hosts] == ["a", "b"]
    x, y = both.guests
    assert (x.needs.cpus, x.mean_cpus, x.moved_bytes) == (0.5, 0.5, GIB)
    assert (y.needs.cpus, y.mean_cpus, y.moved_bytes) == (4, 2.5, GIB // 2 + 2 * GIB)
    assert both.assumptions.pue == 1.2


@pytest.mark.parametrize(("rank", "expected"), [(95, 19), (100, 20), (50, 10), (0.1, 1)])
def test_percentile_is_the_nearest_rank(rank: float, expected: float) -> None:
    assert percentile(list(range(20, 0, -1)), rank) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "no JSON"),
        ("a b", "neither TOML"),
        ('{"format": "other"}', "format 'other'"),
        (HOST + "colour = 1\n", "hosts.0.colour: not known here"),
        ('[[hosts]]\nname = "a"\nmemory = "8G"\n', "cpus: missing"),
        (HOST.replace('"8G"', '"8"'), "memory '8': expected a size such as"),
        (HOST.replace("4", "-4"), "cpus '-4'"),
        (HOST.replace("4", "nan"), "cpus 'nan'"),
        (HOST + HOST, "host 'a': described twice"),
        (HOST + "idle_w = 300\n", "full_w 250 is less than idle_w 300"),
        (HOST + GUEST + GUEST, "guest 'x': described twice"),
        (HOST + GUEST.replace('host = "a"', 'host = "b"'), "host 'b' is not described; there is a"),
        (HOST + GUEST.replace("cpu = 0.5", ""), "expected cpu or cpu_samples"),
        (HOST + GUEST.replace('host = "a"', "pinned = true"), "pinned, but it runs on no host"),
        ("[assumptions]\npue = 0.5\n", "assumptions.pue '0.5'"),
        ("[assumptions]\nheadroom_cpu = 1\n", "headroom_cpu '1'"),
        ('[assumptions]\ncurrency = "euros"\n', "currency 'euros'"),
        ("hosts = 3\n", "hosts '3'"),
        ("[" * 20_000, "neither TOML"),
        ('{"a":' + "[" * 200_000, "nested too deeply"),
    ],
)
def test_read_files_bad_file_is_refused_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_files([written(tmp_path, text)])

    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_read_files_no_text_and_no_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(BadRequest, match="not UTF-8"):
        read_files([tmp_path / "bytes"])
    with pytest.raises(BadRequest, match="No such file"):
        read_files([tmp_path / "none"])


def test_read_files_assumptions_that_differ_are_refused(tmp_path: Path) -> None:
    one, two = (written(tmp_path, f"[assumptions]\npue = {pue}\n", f"{pue}.toml") for pue in (1.2, 1.3))
    with pytest.raises(BadRequest, match=r"assumption pue 1\.3: another file says 1\.2"):
        read_files([one, two])


def test_read_files_unknown_host_to_drain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="'z' to drain"):
        read_files([written(tmp_path, HOST)], drain=["z"])
