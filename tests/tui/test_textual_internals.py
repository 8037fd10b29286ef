"""The private names of Textual that the panel uses exist and do what is relied on."""

import errno
import inspect
import threading

import pytest
from textual.app import App
from textual.drivers import linux_driver
from textual.drivers._writer_thread import WriterThread

from tui import textual_internals
from tui.textual_internals import FooterKey, OutputThread, crash_of


class Gone:
    """A terminal that was closed: every write fails, as the kernel has it."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")

    def flush(self):
        self.write("")

    def fileno(self):
        return 2


def test_the_output_thread_outlives_its_terminal():
    """More writes than its queue holds, and it still ends when it is asked to."""
    thread = OutputThread(Gone())
    thread.start()

    def write_much():
        for _ in range(100):
            thread.write("text")
        thread.stop()

    writing = threading.Thread(target=write_much, daemon=True)
    writing.start()
    writing.join(20)
    assert not writing.is_alive() and not thread.is_alive()


def test_textuals_driver_writes_through_the_name_that_is_replaced(monkeypatch):
    assert linux_driver.WriterThread in (WriterThread, OutputThread)
    assert "WriterThread(self._file)" in inspect.getsource(linux_driver.LinuxDriver.start_application_mode)
    monkeypatch.setattr(linux_driver, "WriterThread", WriterThread)
    textual_internals.survive_lost_terminal()
    assert linux_driver.WriterThread is OutputThread


async def test_the_exception_that_ended_an_app_is_known():
    class Crashes(App[None]):
        def on_mount(self) -> None:
            raise ValueError("as if by accident")

    app = Crashes()
    with pytest.raises(ValueError, match="as if by accident"):
        async with app.run_test():
            pass
    assert isinstance(crash_of(app), ValueError)
    assert crash_of(App()) is None


def test_a_key_of_the_footer_says_what_it_does():
    assert FooterKey("q", "q", "quit", "quit").action == "quit"
