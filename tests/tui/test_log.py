"""The panel's log file: where it is, what it keeps, what it never holds."""

import logging

import pytest
from panels import panel, settle, text

from tui import log


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The log's file; logging is as before afterwards."""
    logger = logging.getLogger("tui")
    handlers, before, propagate = list(logger.handlers), log.path, logger.propagate
    file = tmp_path / "state" / "panel.log"
    log.write_to(file)
    yield file
    for handler in [h for h in logger.handlers if h not in handlers]:
        logger.removeHandler(handler)
        handler.close()
    log.path, logger.propagate = before, propagate


async def test_a_workers_traceback_is_in_the_log_and_the_notice_says_where(root, written):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.front is not None)

        async def fails():
            raise RuntimeError("something nobody foresaw")

        app.front.run_worker(fails(), exit_on_error=False)
        await settle(pilot, lambda: "something nobody foresaw" in text(app, "#notice"))
        assert str(written) in text(app, "#notice")
        recorded = written.read_text()
        assert "Traceback" in recorded and "in fails" in recorded
        await pilot.press("question_mark")
        await settle(pilot, lambda: str(written) in getattr(app.screen, "about", ""))


def test_the_log_holds_no_secrets_and_is_only_its_owners(written, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecretvalue")
    logging.getLogger("tui.x").error("token hf_verysecretvalue and https://me:word@host/path")
    recorded = written.read_text()
    assert "verysecret" not in recorded and "word@" not in recorded and "https://***@host/path" in recorded
    assert written.stat().st_mode & 0o777 == 0o600


def test_the_log_is_bounded(written, monkeypatch):
    for _ in range(60):
        logging.getLogger("tui.x").error("x" * 50_000)
    files = list(written.parent.iterdir())
    assert len(files) == 2 and sum(file.stat().st_size for file in files) < 2.2 * log.LARGEST_BYTES
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_the_default_place_is_the_users_state_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert log.default_path() == tmp_path / "surgvqa" / "panel.log"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert log.default_path().parts[-4:] == (".local", "state", "surgvqa", "panel.log")
