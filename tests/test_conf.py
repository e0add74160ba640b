"""The files that say how to run on clusters: real option names, readable values, an explanation on each, and nothing missing."""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[1]
CONF = ROOT / "conf"
SPARK_CONFS = sorted((CONF / "spark").glob("*.conf"))

# families that Spark composes names of, and so has no list of
FAMILIES = re.compile(
    r"spark\.(master|executorEnv\.\w+|yarn\.appMasterEnv\.\w+"
    r"|(executor|task|driver|worker)\.resource\.gpu\.(amount|discoveryScript|vendor)"
    r"|kubernetes\.(driver|executor)\.volumes\.persistentVolumeClaim\.\w+\.(mount\.path|mount\.readOnly|options\.claimName))"
)


def options(path: pathlib.Path) -> dict[str, str]:
    """The options of a Spark properties file, those that are commented out too."""
    found = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"#?(spark\.[\w.]+)\s+(\S.*)$", line):
            assert match[1] not in found, f"{path.name}: {match[1]} twice"
            found[match[1]] = match[2]
    return found


@pytest.mark.parametrize("path", SPARK_CONFS, ids=lambda p: p.stem)
def test_each_option_has_its_line(path):
    lines = path.read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if re.match(r"#?spark\.", line):
            assert re.match(r"# \S", before), f"{path.name}: {line}"
        else:
            assert line == "" or line.startswith("#"), f"{path.name}: {line}"


@pytest.fixture(scope="module")
def jvm():
    """Spark's own Java classes; no session is started."""
    from pyspark.java_gateway import launch_gateway

    gateway = launch_gateway()
    loader = gateway.jvm.java.lang.Thread.currentThread().getContextClassLoader()
    internal = [f"org.apache.spark.internal.config.{name}$" for name in ("package", "Network", "Python", "UI", "Worker", "Deploy")]
    managers = ["org.apache.spark.deploy.yarn.config.package$", "org.apache.spark.deploy.k8s.Config$"]
    for name in [*internal, *managers, "org.apache.spark.sql.internal.SQLConf$"]:
        gateway.jvm.java.lang.Class.forName(name, True, loader)
    yield gateway.jvm
    gateway.shutdown()
    gateway.proc.stdin.close()
    gateway.proc.wait(30)


@pytest.mark.engine
@pytest.mark.parametrize("path", SPARK_CONFS, ids=lambda p: p.stem)
def test_spark_knows_each_option_and_can_read_its_value(jvm, path):
    assert options(path)
    for key, value in options(path).items():
        entry = jvm.org.apache.spark.internal.config.ConfigEntry.findEntry(key)
        assert entry is not None or FAMILIES.fullmatch(key), f"{path.name}: Spark has no {key}"
        if entry is not None:
            jvm.org.apache.spark.SparkConf(False).set(key, value).get(entry)  # raises when the value is not of its kind


@pytest.mark.engine
def test_local_conf_starts_a_session(tmp_path):
    import pyspark

    (tmp_path / "program.py").write_text("""
from pyspark.sql import SparkSession
spark = SparkSession.builder.getOrCreate()
print(spark.sparkContext.master, spark.conf.get("spark.sql.shuffle.partitions"), spark.range(10).count())
""")
    submit = pathlib.Path(pyspark.__file__).parent / "bin" / "spark-submit"
    ended = subprocess.run(
        [submit, "--properties-file", CONF / "spark" / "local.conf", tmp_path / "program.py"],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == ["local[2,4]", "8", "10"]


@pytest.mark.engine
@pytest.mark.parametrize("gpus", [0, 2])
def test_discovery_script_says_what_spark_reads(jvm, tmp_path, gpus):
    if gpus:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nseq 0 {gpus - 1}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    for tool in ("bash", "env", "sed", "paste", "seq"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    script = CONF / "spark" / "getGpusResources.sh"
    said = subprocess.run([script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=True).stdout
    assert json.loads(said) == {"name": "gpu", "addresses": [str(i) for i in range(gpus)]}
    information = jvm.org.apache.spark.resource.ResourceInformation.parseJson(said)
    assert (information.name(), list(information.addresses())) == ("gpu", [str(i) for i in range(gpus)])


@pytest.mark.parametrize("script", sorted(ROOT.glob("conf/**/*.sh")) + [ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_scripts_are_bash_and_executable(script):
    assert script.read_text().startswith("#!/usr/bin/env bash\n") and os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


# Kubernetes


def test_dockerfile_copies_what_is_there():
    text = (CONF / "kubernetes" / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.M) for word in line.split()]
    assert {"requirements.lock", "sparkmed", "jobs", "conf"} <= set(copied)
    assert not [path for path in copied if path != "README.md" and not (ROOT / path).exists()]


@pytest.mark.parametrize("path", sorted((CONF / "kubernetes").glob("*.yaml")), ids=lambda p: p.stem)
@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_knows_each_field(path, version):
    """By the schema of the version's own API; other keys are refused."""
    import kubernetes_validate

    for document in yaml.safe_load_all(path.read_text()):
        assert kubernetes_validate.validate(document, version, strict=True) == version


def test_driver_of_kubernetes_is_the_account_of_the_role():
    documents = {d["kind"]: d for d in yaml.safe_load_all((CONF / "kubernetes" / "rbac.yaml").read_text())}
    asked = options(CONF / "spark" / "kubernetes.conf")
    account = documents["ServiceAccount"]["metadata"]
    assert account == {
        "name": asked["spark.kubernetes.authenticate.driver.serviceAccountName"],
        "namespace": asked["spark.kubernetes.namespace"],
    }
    assert documents["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert documents["RoleBinding"]["roleRef"]["name"] == documents["Role"]["metadata"]["name"]


# Databricks

BUNDLE = yaml.safe_load((CONF / "databricks" / "databricks.yml").read_text())
JOBS = BUNDLE["resources"]["jobs"]


@pytest.mark.parametrize("job", JOBS)
def test_databricks_knows_each_field(job):
    """Of the job and all below it, and each value is of its type: by the classes that Databricks makes of its bundles' schema."""
    from databricks.bundles.jobs import Job

    assert Job.from_dict(JOBS[job]).as_dict() == JOBS[job]


def test_bundle_around_the_jobs():
    """The keys that docs.databricks.com/dev-tools/bundles/reference gives; the schema itself comes with Databricks' CLI only."""
    top = {"artifacts", "bundle", "experimental", "include", "permissions", "presets", "python", "resources", "run_as", "scripts"}
    top |= {"sync", "targets", "variables", "workspace"}
    assert set(BUNDLE) <= top and BUNDLE["bundle"].keys() == {"name"} and BUNDLE["sync"].keys() <= {"include", "exclude", "paths"}
    assert all(v.keys() <= {"default", "description", "lookup", "type"} for v in BUNDLE["variables"].values())
    for target in BUNDLE["targets"].values():
        assert target.keys() <= top - {"include", "targets"} | {"default", "mode"}
        assert target["mode"] in ("development", "production")
        changed = target.get("resources", {"jobs": {}})["jobs"]
        assert all(changed[job].keys() <= JOBS[job].keys() for job in changed)


@pytest.mark.parametrize("job", JOBS)
def test_tasks_name_what_there_is(job):
    clusters = {c["job_cluster_key"] for c in JOBS[job]["job_clusters"]}
    seen = set()
    for task in JOBS[job]["tasks"]:
        assert task["job_cluster_key"] in clusters
        assert {d["task_key"] for d in task.get("depends_on", [])} <= seen
        seen.add(task["task_key"])
        program = CONF / "databricks" / task["spark_python_task"]["python_file"]
        assert program.is_file() and program.stem == task["task_key"]


def test_bundle_has_every_stage():
    run = {task["task_key"] for job in JOBS.values() for task in job["tasks"]}
    apart = {"deidentify", "screen", "watch"}  # of no project; of plates; done by score
    assert run == {path.stem for path in (ROOT / "jobs").glob("*.py")} - apart


def test_bundle_variables_are_declared_and_used():
    assert set(re.findall(r"\$\{var\.(\w+)\}", json.dumps(BUNDLE["resources"]))) == set(BUNDLE["variables"])


def test_bundle_parameters_are_keys_of_the_config():
    from sparkmed import config

    values = {"workers": "2"}
    for job in JOBS.values():
        for task in job["tasks"]:
            first, *overrides = task["spark_python_task"]["parameters"]
            assert first == "${var.config}"
            data = {"name": "x", "task": "segmentation", "classes": ["background", "organ"]}
            for override in overrides:
                config._override(data, re.sub(r"\$\{var\.(\w+)\}", lambda m: values.get(m[1], "/a"), override))
            assert config.parse(data).archive == "/a"


def test_bundle_is_on_the_runtime_with_our_python():
    """15.4 LTS ML: Python 3.11, Spark 3.5, and the last that ships Horovod."""
    versions = {c["new_cluster"]["spark_version"] for job in JOBS.values() for c in job["job_clusters"]}
    assert versions == {"15.4.x-cpu-ml-scala2.12", "15.4.x-gpu-ml-scala2.12"}


def test_init_script_installs_what_sparkmed_needs_and_no_other_spark(tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").touch()
    shutil.copy(ROOT / "requirements.lock", tmp_path)
    python = tmp_path / "python"
    keep = f'for a; do case $a in */requirements.txt) cp "$a" "{tmp_path}/list" ;; esac; done'
    python.write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/asked"\n{keep}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "SPARKMED_SETUP": str(tmp_path)}
    subprocess.run([CONF / "databricks" / "install.sh"], env=environment, check=True)
    installed = {canonicalize_name(line.split("==")[0]) for line in (tmp_path / "list").read_text().splitlines()}
    asked = (tmp_path / "asked").read_text()
    assert re.search(r"install -q torch==[\d.]+\n", asked) and "horovod-0.28.1-cp311" in asked

    needed, todo = set(), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    while todo:
        requirement = Requirement(todo.pop())
        name = canonicalize_name(requirement.name)
        if name in needed or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        if name in ("pyspark", "py4j", "setuptools") or name.startswith(("nvidia-", "cuda-", "triton")):
            continue  # the runtime's own, and what torch brings
        needed.add(name)
        todo += importlib.metadata.requires(name) or []
    assert not installed & {"pyspark", "py4j", "pytest", "ipykernel", "ruff"}
    assert needed <= installed
