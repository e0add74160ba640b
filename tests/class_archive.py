"""Writes the classes that Spark's JVMs load to an archive, from which those that the tests start take them in half the time.

    python tests/class_archive.py .venv/spark.jsa

See "Class Data Sharing" in Java's own documentation: a JVM with other classes or of another version ignores the archive.
"""

import os
import pathlib
import sys
import tempfile

LEAN = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
"""A JVM that lives for a minute spends half its time on compiling itself."""


def options(archive: pathlib.Path) -> str:
    """JDK_JAVA_OPTIONS for a JVM of the tests."""
    shared = f' "-XX:SharedArchiveFile={archive}" -Xlog:disable' if archive.exists() else ""
    return LEAN + shared


def _use_spark(master: str, folder: str):
    from pyspark.sql import SparkSession

    builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", "2")
    spark = builder.config("spark.executorEnv.JDK_JAVA_OPTIONS", LEAN).getOrCreate()
    frame = spark.range(10).selectExpr("id", "string(id % 2) as name")
    frame.mapInPandas(lambda frames: frames, frame.schema).write.mode("overwrite").parquet(folder)
    spark.read.parquet(folder).join(frame, "id").groupBy("id").count().collect()
    spark.sparkContext.parallelize(range(4), 2).map(str).collect()
    jvm, gateway = spark.sparkContext._gateway.proc, spark.sparkContext._gateway
    spark.stop()
    return jvm, gateway


def write(archive: pathlib.Path):
    new = archive.with_suffix(".new")
    new.unlink(missing_ok=True)
    os.environ |= {"JDK_JAVA_OPTIONS": f'{LEAN} "-XX:ArchiveClassesAtExit={new}" -Xlog:disable', "SPARK_LOCAL_IP": "127.0.0.1"}
    os.environ |= {"PYSPARK_PYTHON": sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        _use_spark("local-cluster[1,1,1024]", folder)  # a master and a worker are in this JVM too
        jvm, gateway = _use_spark("local[2]", folder)
    gateway.shutdown()
    jvm.stdin.close()
    jvm.wait()  # it writes when it ends
    new.replace(archive)


if __name__ == "__main__":
    write(pathlib.Path(sys.argv[1]).resolve())
