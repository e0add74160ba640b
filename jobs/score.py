"""spark-submit jobs/score.py CONFIG [key=value ...]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    sys.exit(main(["score", *sys.argv[1:]]))
