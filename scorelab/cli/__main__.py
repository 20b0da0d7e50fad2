import sys

from scorelab.cli.main import main

sys.exit(main())
