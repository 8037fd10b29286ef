"""`python -m surgvqa` runs `surgvqa`. Detached jobs start this way."""

import sys

from surgvqa.cli.main import main

sys.exit(main())
