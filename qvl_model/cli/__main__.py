"""``python -m qvl_model.cli``"""

import sys

from qvl_model.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
