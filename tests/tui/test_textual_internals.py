"""The private names of Textual that the panel uses exist and do what is relied on."""

import pytest
from textual.app import App

from tui.textual_internals import FooterKey, crash_of


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
