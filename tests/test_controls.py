"""The kill switch fails closed (F16): what cannot be read means halt, and what cannot be read never means go on."""
import pytest

from stratfam.core import ConfigError
from stratfam.trading.permit import Controls


def test_silence_is_no_halt_and_a_file_of_any_content_is_one(tmp_path):
    c = Controls(tmp_path)
    assert c.halt_wanted() is None and c.resume_wanted() is None
    for content in (b"", b"  ", b"drill", b"\xff\xfe not text"):
        (tmp_path / "HALT").write_bytes(content)
        assert c.halt_wanted() is not None


def test_an_unreadable_switch_halts_and_does_not_resume(tmp_path):
    c = Controls(tmp_path)
    for name in ("HALT", "RESUME"): (tmp_path / name).mkdir()
    assert "cannot be read" in c.halt_wanted() and c.resume_wanted() is None
    (tmp_path / "file").write_text("")
    gone = Controls(tmp_path / "file" / "below")
    for c in (gone, Controls(tmp_path / "never made")): assert "cannot be read" in c.halt_wanted() and c.resume_wanted() is None


def test_going_on_needs_a_reason(tmp_path):
    c = Controls(tmp_path)
    c.halt("storm")
    for reason in ("", "  "):
        with pytest.raises(ConfigError, match="reason"): c.resume(reason)
    assert c.halt_wanted() == "storm" and c.resume_wanted() is None
    c.resume("calm again")
    assert c.resume_wanted() == "calm again"
    c.clear()
    assert c.halt_wanted() is None and c.resume_wanted() is None
