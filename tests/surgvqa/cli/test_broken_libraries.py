"""A library whose own import fails is named, with its reason: never the recording or the module that needed it."""

from __future__ import annotations

import importlib
import sys
import wave

import pytest

from surgvqa.cli import main
from surgvqa.data import audio
from surgvqa.errors import SurgvqaError, unexpected, unimportable

REASONS = {
    "raises": ("raise RuntimeError('\\n  CUDA setup failed\\n')", "RuntimeError: CUDA setup failed"),
    "exits": ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
    "is empty": ("assert False", "AssertionError: no reason given"),
}


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A function that puts a library with this source before the installed one."""

    def put(name: str, source: str) -> None:
        (tmp_path / "lib").mkdir(exist_ok=True)
        (tmp_path / "lib" / f"{name}.py").write_text(source + "\n")
        monkeypatch.syspath_prepend(tmp_path / "lib")
        for module in [m for m in sys.modules if m.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)

    return put


@pytest.mark.parametrize("how", REASONS)
def test_the_library_at_fault_is_named_and_not_the_one_that_imports_it(broken, monkeypatch, capsys, how):
    source, reason = REASONS[how]
    broken("deepest_fake", source)
    broken(
        "outer_fake", "try:\n import deepest_fake\nexcept BaseException as e:\n raise ImportError('try DEBUG') from e"
    )
    monkeypatch.setattr(main, "dispatch", lambda *_: importlib.import_module("outer_fake"))
    assert main.main(["presets"]) == 1
    said = capsys.readouterr().err
    assert f"surgvqa presets: deepest_fake cannot be imported ({reason}); surgvqa doctor" in said
    assert "report it" not in said and "Traceback" not in said


def test_a_library_that_ends_the_process_is_named(broken, monkeypatch, capsys):
    broken("ending_fake", "import sys; sys.exit(3)")
    monkeypatch.setattr(main, "dispatch", lambda *_: importlib.import_module("ending_fake"))
    assert main.main(["presets"]) == 1
    assert "ending_fake cannot be imported (SystemExit: 3)" in capsys.readouterr().err


def test_other_errors_blame_no_library():
    try:
        raise ValueError("wrong figure") from KeyError("x")
    except ValueError as error:
        assert unimportable(error) is None and unexpected(error) == "ValueError: wrong figure"


@pytest.mark.parametrize(("library", "rate"), [("librosa", 0), ("soundfile", 16_000), ("soxr", 24_000)])
def test_a_broken_decoder_is_not_the_recordings_fault(broken, monkeypatch, tmp_path, library, rate):
    file = tmp_path / "q.wav"
    if rate:
        with wave.open(str(file), "wb") as sound:
            sound.setparams((1, 2, rate, 0, "NONE", ""))
            sound.writeframes(b"\1\1" * rate)
    else:  # a format that only librosa may know
        file.write_bytes(b"unknown" * 100)
    broken(library, "raise ImportError('Numba needs NumPy 2.2 or less')")
    with pytest.raises(SurgvqaError, match=f"no decoder for audio .*: {library} cannot be imported .*Num") as failed:
        audio.load_audio(file)
    assert failed.value.exit_code == 1
