"""spark-submit jobs/deidentify.py ARCHIVE OUT [key=value ...] [--config CONFIG]"""

import sys

from sparkmed.cli import main

if __name__ == "__main__":
    status = main(["deidentify", *sys.argv[1:]])
    if status:  # Databricks takes even an exit with status 0 for a failure
        sys.exit(status)
