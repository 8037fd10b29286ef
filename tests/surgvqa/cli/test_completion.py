"""What the shells complete is what the parsers know."""

import subprocess

import pytest

from remote.cli.parser import build_parser as remote_parser
from surgvqa.cli.completion import SHELLS
from surgvqa.cli.main import main
from surgvqa.cli.parser import build_parser
from tui.main import build_parser as panel_parser

ASK = """
source "$1"; complete=$(complete -p surgvqa | sed 's/.*-F \\([^ ]*\\).*/\\1/')
ask() { COMP_WORDS=(surgvqa "$@"); COMP_CWORD=$#; COMPREPLY=(); $complete; echo "${COMPREPLY[*]}"; }
ask tr; ask train --learn; ask train --on_oom ''; ask train --bf16 ''; ask audit mer
"""


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("parser", [build_parser, remote_parser, panel_parser])
def test_each_program_completes_its_options(capsys, parser, shell):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--completion", shell])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and parser().prog in out and "workspace" in out


def test_bash_completes_commands_options_choices_and_files(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["--completion=bash"])
    script = tmp_path / "surgvqa.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "merged").mkdir()
    words = ["bash", "-c", ASK, "bash", str(script)]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert found == ["train", "--learning_rate", "step_down fail", "true false", "merged"]


def test_a_shell_that_is_not_known_is_one_line(capsys):
    assert main(["--completion", "csh"]) == 2
    assert "invalid choice: 'csh'" in capsys.readouterr().err
