"""`python -m remote` runs surgvqa-remote. A detached upload starts this way."""

import sys

from remote.start import main

sys.exit(main())
