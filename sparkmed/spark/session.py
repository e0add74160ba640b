"""The Spark session, and what must hold before a job is worth starting."""

import heapq
import os
import re
import sys
import time
import uuid

from pyspark import TaskContext
from pyspark.sql import SparkSession

from sparkmed import storage
from sparkmed.config import Spark
from sparkmed.formats import isolation
from sparkmed.rejection import InputError

LOCAL = {
    "spark.driver.host": "127.0.0.1",
    "spark.python.daemon.module": "sparkmed.spark.daemon",
    "spark.sql.shuffle.partitions": "8",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}
"""What local Spark gets unless the config says otherwise."""
_ONE_ATTEMPT = re.compile(r"local(?:\[(\d+|\*)\])?")


def session(settings: Spark, name: str) -> SparkSession:
    """The active session of spark-submit or a notebook; without one, a new one on ``settings.master``."""
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # workers must not take another interpreter
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    active = SparkSession.getActiveSession()
    if active is not None:
        return active
    builder = SparkSession.builder.appName(name)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:  # else spark-submit has chosen the master and everything about it
        local = settings.master.startswith("local")
        if local:
            os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        builder = builder.master(_retrying(settings))
        for key, value in {**(LOCAL if local else {}), **settings.conf}.items():
            builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    return spark


def _retrying(settings: Spark) -> str:
    """The master; local Spark, which gives up at the first failure of a task, is told to try as often as a cluster does.

    >>> _retrying(Spark(master="local[2]")), _retrying(Spark(master="local[2,1]"))
    ('local[2,4]', 'local[2,1]')
    """
    found = _ONE_ATTEMPT.fullmatch(settings.master)
    if not found:
        return settings.master
    return f"local[{found[1] or 1},{settings.conf.get('spark.task.maxFailures', '4')}]"


def decoding():
    """How the task at work decodes pixels: a context, quick at first, in child processes once the worker of an attempt has died."""
    return isolation.isolated() if TaskContext.get().attemptNumber() else isolation.watched()


def slots(spark: SparkSession, wanted: int, patience: float = 60.0) -> int:
    """Tasks that can run at once, after waiting up to ``patience`` seconds for executors to register if there are too few."""
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    deadline = time.monotonic() + (0 if context.isLocal() else patience)
    while True:
        found = context.maxNumConcurrentTasks(profile)
        if found >= wanted or time.monotonic() >= deadline:
            return found
        time.sleep(0.5)


_shared: set[tuple[str, str]] = set()


def require_shared(spark: SparkSession, url: str):
    """Raise :class:`InputError` unless executors see the folder ``url`` as the driver does, and the driver what they write there.

    Asked once per application and folder; not asked of local Spark.
    """
    asked = (spark.sparkContext.applicationId, url)
    if spark.sparkContext._jsc.sc().isLocal() or asked in _shared:
        return
    token = storage.join(url, f".seen-{uuid.uuid4().hex}")
    tasks = max(2, slots(spark, 1))
    storage.write_bytes(token, b"driver")

    def probe(index):
        import socket

        try:
            if storage.read_bytes(token) != b"driver":
                return f"{socket.gethostname()}: reads something else"
            storage.write_bytes(f"{token}.{index}", b"executor")
            return ""
        except OSError as e:
            return f"{socket.gethostname()}: {type(e).__name__}"

    try:
        answers = spark.sparkContext.parallelize(range(tasks), tasks).map(probe).collect()
        unseen = [i for i in range(tasks) if not answers[i] and not storage.exists(f"{token}.{i}")]
        problems = sorted({a for a in answers if a}) + (["the driver does not see what executors write"] if unseen else [])
    finally:
        for leftover in [token, *(f"{token}.{i}" for i in range(tasks))]:
            if storage.exists(leftover):
                storage.remove(leftover)
    if problems:
        raise InputError(
            f"{url} is not shared with the executors ({'; '.join(problems)}): use a folder that all nodes mount, hdfs:// or s3://"
        )
    _shared.add(asked)


def packed(items: list, weights: list[float], parts: int) -> list[list]:
    """``items`` in at most ``parts`` groups of similar weight: heaviest first, each to the lightest group.

    >>> packed(["a", "b", "c"], [3, 1, 2], 2)
    [['a'], ['c', 'b']]
    """
    groups: list[list] = [[] for _ in range(max(1, min(parts, len(items))))]
    loads = [(0.0, g) for g in range(len(groups))]  # a heap
    for i in sorted(range(len(items)), key=lambda i: -weights[i]):
        load, lightest = loads[0]
        groups[lightest].append(items[i])
        heapq.heapreplace(loads, (load + weights[i], lightest))
    return [g for g in groups if g]
