"""The process from which Spark forks Python workers, with what every stage needs imported once.

For ``spark.python.daemon.module``. A worker is there within milliseconds, also in place of one that died; all of an executor share
the memory of what is imported; and two things that PySpark does after or before each task no longer take longer than a small task:
the garbage collection does not walk through what is imported, and the list of files in pyspark.zip is not read again.

It is imported on every node before the job sends anything, so sparkmed has to be installed there (``--py-files`` come too late, and
a sparkmed among them is not the one that is used).
"""

import gc
import sys
import zipimport

if __name__ == "__main__":  # processes that a task spawns with multiprocessing, as Horovod does, import this under another name
    from pyspark.daemon import manager

    from sparkmed.spark import catalog, patches, score, volumes  # noqa: F401 (that is what it is for)

    if sys.version_info < (3, 12):  # python/cpython#103200: since 3.12 nothing is read until something is imported
        zipimport.zipimporter.invalidate_caches = lambda self: None
    gc.freeze()
    manager()
