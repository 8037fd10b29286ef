"""`python -m remote`: the same as surgvqa-remote; a detached upload is started this way."""

import sys

from remote.cli.main import main

sys.exit(main())
