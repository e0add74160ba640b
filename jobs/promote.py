"""spark-submit jobs/promote.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    sys.exit(main(["promote", *sys.argv[1:]]))
