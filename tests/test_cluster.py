"""The cluster that other tests submit their programs to."""

import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture
def program(tmp_path):
    def write(text: str) -> pathlib.Path:
        path = tmp_path / "program.py"
        path.write_text(text)
        return path

    return write


def test_two_workers_do_the_work(spark_cluster, program):
    path = program("""
import sys
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
def where(_):
    import os, time
    time.sleep(1)
    return os.getcwd(), sys.executable
seen = spark.sparkContext.parallelize(range(4), 4).map(where).collect()
print(len({folder for folder, _ in seen}), "executors;", *{python for _, python in seen}, sys.argv[1:])
""")
    ended = spark_cluster.submit(path, "a.yaml", "key=two words")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip() == f"2 executors; {sys.executable} ['a.yaml', 'key=two words']"


def test_failure_is_told(spark_cluster, program):
    ended = spark_cluster.submit(program("import sys; print('about to fail'); sys.exit(3)"))
    assert ended.returncode != 0 and "about to fail" in ended.stdout


def test_timeout_ends_the_program(spark_cluster, program, tmp_path):
    path = program("""
import os, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
print("started", flush=True)
time.sleep(600)
""")
    with pytest.raises(TimeoutError, match="started"):
        spark_cluster.submit(path, tmp_path / "pid", timeout=15)
    assert not _alive(int((tmp_path / "pid").read_text()))


HOROVOD = """
import horovod.spark
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
def train():
    import os, torch, horovod.torch as hvd
    hvd.init()
    total = hvd.allreduce(torch.full((3,), float(hvd.rank() + 1)), op=hvd.Sum)
    return hvd.rank(), hvd.size(), total.tolist(), os.getcwd()
{launch}
print([r[:3] for r in ranks], len({{r[3] for r in ranks}}), "executors")
"""
REDUCED = "[(0, 2, [3.0, 3.0, 3.0]), (1, 2, [3.0, 3.0, 3.0])] 2 executors"


def test_horovod_reduces_over_two_workers(spark_cluster, program):
    path = program(HOROVOD.format(launch="ranks = horovod.spark.run(train, num_proc=2, use_gloo=True, start_timeout=120)"))
    ended = spark_cluster.submit(path)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip() == REDUCED


def test_horovod_in_a_packed_environment(spark_cluster, program, tmp_path):
    """As on YARN: workers unpack the environment in their own folder, where the driver's interpreter is not."""
    (tmp_path / "environment" / "bin").mkdir(parents=True)
    (tmp_path / "environment" / "bin" / "python").symlink_to(pathlib.Path(sys.executable).resolve())
    (tmp_path / "environment" / "lib").symlink_to(pathlib.Path(sys.prefix) / "lib")
    (tmp_path / "environment" / "pyvenv.cfg").write_text((pathlib.Path(sys.prefix) / "pyvenv.cfg").read_text())
    with tarfile.open(tmp_path / "environment.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "environment", ".")
    how = "num_proc=2, use_gloo=True, start_timeout=120, executable=os.environ['PYSPARK_PYTHON']"
    launch = f"import os; ranks = horovod.spark.run(train, {how})"
    conf = {"spark.archives": f"{tmp_path / 'environment.tar.gz'}#environment"}
    env = {"PYSPARK_PYTHON": "./environment/bin/python"}
    ended = spark_cluster.submit(program(HOROVOD.format(launch=launch)), conf=conf, env=env)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip() == REDUCED


def test_nothing_stays_when_the_tests_are_killed(tmp_path):
    holder = tmp_path / "holder.py"
    holder.write_text("""
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
import cluster
with cluster.standalone(pathlib.Path(sys.argv[2]), workers=1, memory="512m") as c:
    print(c.master, flush=True)
    time.sleep(600)
""")
    (tmp_path / "cluster").mkdir()
    command = [sys.executable, str(holder), os.path.dirname(__file__), str(tmp_path / "cluster")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("spark://127.0.0.1:")
        assert len(_of(tmp_path)) >= 2  # the worker, and its keeper
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while _of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert _of(tmp_path) == []


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _of(folder: pathlib.Path) -> list[str]:
    """Command lines of the processes that name ``folder``, this one's apart."""
    import psutil

    lines = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
    return [" ".join(line) for line in lines if any(str(folder / "cluster") in word for word in line)]
