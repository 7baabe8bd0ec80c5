"""What the wheel's own check says of wheels that were built wrongly. Building one is .ci/run's matter."""

import zipfile

from build_wheel import _expected_files, faults


def write_wheel(path, names, library=b"\0GLIBC_2.2.5\0GLIBC_2.28\0"):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, library if name.endswith(".so") else b"")
        archive.writestr("moeflow-0.1.0.dist-info/METADATA", b"")
    return path


def test_a_whole_wheel_has_no_fault(tmp_path):
    assert {"moeflow/errors.py", "moeflow/kernels/cpu/ops.py", "moeflow/kernels/cpu/_cpu.so"} <= _expected_files()
    assert faults(write_wheel(tmp_path / "whole.whl", _expected_files())) == []


def test_what_is_no_python_is_expected_too_but_for_c_sources_and_notes():
    assert {"moeflow/py.typed", "moeflow/server/page/page.html", "moeflow/server/page/main.js"} <= _expected_files()
    assert not [name for name in _expected_files() if name.endswith((".c", ".cpp", ".h", ".md", ".pyc"))]


def test_files_left_out_and_files_too_many_are_named(tmp_path):
    names = _expected_files() - {"moeflow/policy/cache.py", "moeflow/kernels/cpu/_cpu.so"} | {"kernels/cpu/ops.py"}
    assert faults(write_wheel(tmp_path / "torn.whl", names)) == [
        "moeflow/kernels/cpu/_cpu.so is left out",
        "moeflow/policy/cache.py is left out",
        "kernels/cpu/ops.py has no place in it",
    ]


def test_a_library_that_needs_a_newer_glibc_is_named(tmp_path):
    wheel = write_wheel(tmp_path / "new.whl", _expected_files(), b"\0GLIBC_2.4\0GLIBC_2.34\0")
    assert len(faults(wheel)) == 5
    assert all(fault.endswith("needs glibc 2.34") for fault in faults(wheel))
