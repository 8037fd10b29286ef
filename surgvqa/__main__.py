"""`python -m surgvqa` is `surgvqa`; detached jobs are started this way."""

import sys

from surgvqa.cli.main import main

sys.exit(main())
