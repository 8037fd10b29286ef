#!/usr/bin/env -S python3 -IS
"""A hostile host's "python3": runs the agent that the laptop sends, with the operations of `scenario.py` (beside it) in
place of its own."""

import sys
import zlib
from pathlib import Path

stdin = i = sys.stdin.buffer
code = zlib.decompress(stdin.read(int(stdin.readline()))).decode()
exec(compile(code.rsplit("\n", 1)[0], "agent", "exec"))
agent = sys.modules["remote.agent.main"]
known = agent.operation
scenario = Path(__file__).with_name("scenario.py")
exec(compile(scenario.read_text(), str(scenario), "exec"))
agent.main(stdin)
