"""Free memory as the kernel writes it down, of machines and of both kinds of cgroups."""

import pytest

from dnd_jax.core.memory import free_memory

MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}


def second(limit, used, folder="", cache=0):
    return {
        f"sys/fs/cgroup/{folder}memory.max": f"{limit}\n",
        f"sys/fs/cgroup/{folder}memory.current": f"{used}\n",
        f"sys/fs/cgroup/{folder}memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def first(limit, used, folder="", cache=0):
    return {
        f"sys/fs/cgroup/memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"sys/fs/cgroup/memory/{folder}memory.usage_in_bytes": f"{used}\n",
        f"sys/fs/cgroup/memory/{folder}memory.stat": f"total_inactive_file {cache}\n",
    }


OWN2, OWN1 = {"proc/self/cgroup": "0::/a/b\n"}, {"proc/self/cgroup": "5:cpu:/\n4:memory:/a\n0::/\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 9 kB\n"}, None),
        (MACHINE, 8000 * 1024),
        (MACHINE | OWN2, 8000 * 1024),
        (MACHINE | OWN2 | second("max", 10, "a/b/"), 8000 * 1024),
        (MACHINE | OWN2 | second(1000, 400, "a/b/"), 600),
        (MACHINE | OWN2 | second(1000, 400, "a/b/", cache=300), 900),
        (MACHINE | OWN2 | second("max", 1, "a/b/") | second(700, 500, "a/"), 200),
        (MACHINE | {"proc/self/cgroup": "0::/\n"} | second(1000, 400), 600),
        (MACHINE | OWN2 | second(1000, 400), 600),  # the name is the host's
        (OWN2 | second(1000, 1400, "a/b/"), 0),
        (MACHINE | OWN1 | first(2**63 - 4096, 10, "a/"), 8000 * 1024),
        (MACHINE | OWN1 | first(1000, 400, "a/", cache=100), 700),
        (MACHINE | OWN1 | first(1000, 400), 600),
        (MACHINE | OWN1 | second(1000, 900), 100),
    ],
)
def test_the_least_that_is_free(tmp_path, files, free):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == free


def test_of_this_machine():
    assert free_memory() is None or free_memory() > 0
