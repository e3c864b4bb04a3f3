"""`evomerge doctor`: what it finds here, and that a broken part is a failed check, not a crash."""

from __future__ import annotations

from evomerge import doctor
from evomerge.methods import fused


def test_all_is_well_on_the_machine_that_runs_the_tests():
    checks = {check.name: check for check in doctor.examine()}
    assert {*doctor.REQUIRED, "python", "memory", "store", "hash cache"} <= set(checks)
    assert [c for c in checks.values() if not c.ok] == []
    assert checks["torch"].found.startswith("2.")


def test_it_says_whether_merging_is_compiled():
    found = {check.name: check.found for check in doctor.examine()}["compiled merging"]
    assert found.startswith("numba ") == (fused.kernels() is not None)
    with fused.plain():
        assert "evomerge[fast]" in {check.name: check.found for check in doctor.examine()}["compiled merging"]


def test_a_missing_library_and_a_cache_that_cannot_be_written_fail_by_name(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-library"))
    failed = {check.name: check.found for check in doctor.examine() if not check.ok}
    assert set(failed) == {"no-such-library", "hash cache"}
    assert "PackageNotFoundError" in failed["no-such-library"]
