"""The CPU quota, read from trees of files as the kernel shows them."""

import pytest

from launch.core.cpu_quota import quota_cores

FREE_V1 = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}
TWO_V1 = {"cpu.cfs_quota_us": "200000\n", "cpu.cfs_period_us": "100000\n"}
HYBRID = "4:memory:/x\n3:cpuset:/\n2:cpu,cpuacct:/pods/a\n1:name=systemd:/y\n0::/z\n"


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/\n", {}, None),  # the root group has no cpu.max
        ("0::/\n", {"": {"cpu.max": "max 100000\n"}}, None),
        ("0::/\n", {"": {"cpu.max": "150000 100000\n"}}, 2),
        (
            "0::/a/b\n",
            {"a/b": {"cpu.max": "400000 100000\n"}, "a": {"cpu.max": "100000 50000\n"}},
            2,
        ),
        ("0::/\n", {"other": {"cpu.max": "100000 100000\n"}}, None),
        (HYBRID, {"cpu,cpuacct/pods/a": FREE_V1, "cpu,cpuacct": FREE_V1}, None),
        (HYBRID, {"cpu,cpuacct/pods/a": FREE_V1, "cpu,cpuacct/pods": TWO_V1}, 2),
        ("2:cpu,cpuacct:/docker/0a1b\n", {"cpu,cpuacct": TWO_V1}, 2),  # the host's path
        ("0::/\n", {"": {"cpu.max": "nonsense\n"}}, None),
    ],
)
def test_the_smallest_quota_above_this_process_counts(tmp_path, membership, files, cores):
    (tmp_path / "membership").write_text(membership)
    for folder, content in files.items():
        (tmp_path / "mount" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in content.items():
            (tmp_path / "mount" / folder / name).write_text(text)
    assert quota_cores(tmp_path / "mount", tmp_path / "membership") == cores


def test_controllers_in_another_order_than_in_the_mounts_name(tmp_path):
    """As in EL 7, which has links of each controller's name beside the mount."""
    (tmp_path / "membership").write_text("2:cpuacct,cpu:/job\n")
    group = tmp_path / "cpu,cpuacct" / "job"
    group.mkdir(parents=True)
    (tmp_path / "cpu").symlink_to("cpu,cpuacct")
    for name, text in TWO_V1.items():
        (group / name).write_text(text)
    assert quota_cores(tmp_path, tmp_path / "membership") == 2


def test_no_control_groups_are_no_quota(tmp_path):
    assert quota_cores(tmp_path, tmp_path / "membership") is None
