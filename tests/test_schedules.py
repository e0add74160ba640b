"""The files of conf/ that start sparkmed at night: each is read by what will read it, and run as far as it can be here.

``spark-submit`` is a stand-in that notes what it was asked and ends as told, except where a test says that it is the real one.
"""

import ast
import fcntl
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from archives import ct_config, ct_pairs

from sparkmed import cli, tables

ROOT = pathlib.Path(__file__).parents[1]
CONF = ROOT / "conf"
SCHEDULES = CONF / "schedules"
NIGHTLY = SCHEDULES / "nightly.sh"
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
STAGES = ["catalog", "volumes", "score", "report"]
LOOK = {3, 4, 5}
"""Exit statuses that say: the scores are there, and somebody should look."""


@pytest.fixture
def submit(tmp_path):
    """``submit(score="3 0")`` is an environment in which score.py ends with 3 and then always with 0; jobs not named end well."""
    program = tmp_path / "spark-submit"
    program.write_text(f"""#!/usr/bin/env bash
printf '%s\\n' "$*" >>"{tmp_path}/asked"
for word; do case $word in */jobs/*.py) stage=$(basename "$word" .py) ;; esac; done
read -ra ends <"{tmp_path}/$stage.ends" || exit 0
case ${{ends[0]}} in sleep) echo $$ >"{tmp_path}/pid"; exec sleep 60 ;; esac
[ ${{#ends[@]}} -eq 1 ] || echo "${{ends[@]:1}}" >"{tmp_path}/$stage.ends"
exit "${{ends[0]}}"
""")
    program.chmod(0o755)

    def environment(**ends: str) -> dict[str, str]:
        for stage, statuses in ends.items():
            (tmp_path / f"{stage}.ends").write_text(statuses + "\n")
        others = {k: v for k, v in os.environ.items() if not k.startswith("SPARKMED_")}
        return others | {"SPARKMED_SUBMIT": f"{program} --name night", "SPARKMED_WAIT": "0"}

    return environment


@pytest.fixture
def asked(tmp_path):
    """What spark-submit was asked so far, as (stage, arguments after it)."""

    def read() -> list[tuple[str, str]]:
        path = tmp_path / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        return [re.search(r"/jobs/(\w+)\.py ?(.*)", line).groups() for line in lines]

    return read


def night(environment, *arguments, timeout=60) -> subprocess.CompletedProcess:
    return subprocess.run([NIGHTLY, *arguments], env=environment, capture_output=True, text=True, timeout=timeout)


def test_statuses_are_those_of_the_command():
    assert {int(n) for n in re.findall(r"^ *(\d+) +done", cli.STATUSES, re.M)} - {0} == LOOK


# nightly.sh


def test_a_night_is_four_jobs_in_client_mode(submit, asked, tmp_path):
    ended = night(submit(), "/etc/liver.yaml", "lake=/the lake")
    assert ended.returncode == 0, ended.stderr
    assert asked() == [(stage, "/etc/liver.yaml lake=/the lake") for stage in STAGES]
    assert all("--name night --deploy-mode client" in line for line in (tmp_path / "asked").read_text().splitlines())
    assert "liver done" in ended.stdout


@pytest.mark.parametrize(
    "ends, status, tried",
    [
        ({"catalog": "1 0"}, 0, ["catalog", *STAGES]),
        ({"score": "3"}, 3, STAGES),
        ({"score": "1 4"}, 4, ["catalog", "volumes", "score", "score", "report"]),
        ({"score": "1"}, 1, ["catalog", "volumes", "score", "score", "score", "report"]),
        ({"volumes": "2"}, 2, ["catalog", "volumes", "report"]),
        ({"score": "137 1"}, 1, ["catalog", "volumes", "score", "score", "score", "report"]),
        ({"score": "5", "report": "1"}, 1, [*STAGES, "report", "report"]),
        ({"catalog": "1", "report": "3"}, 1, ["catalog", "catalog", "catalog", "report"]),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else None,
)
def test_what_is_tried_again_and_how_the_night_ends(submit, asked, ends, status, tried):
    ended = night(submit(**ends), "liver.yaml")
    assert (ended.returncode, [stage for stage, _ in asked()]) == (status, tried)
    if status:
        said = "somebody should look" if status in LOOK else f"failed with {status}"
        assert said in ended.stderr


def test_pauses_double(submit):
    started = time.monotonic()
    ended = night(submit(catalog="1") | {"SPARKMED_WAIT": "1", "SPARKMED_STAGES": "catalog"}, "liver.yaml")
    assert re.findall(r"again in (\d+) s", ended.stdout) == ["1", "2"] and time.monotonic() - started >= 3


def test_a_stage_that_takes_too_long_is_ended(submit):
    ended = night(submit(score="sleep") | {"SPARKMED_LIMIT": "1s", "SPARKMED_ATTEMPTS": "1"}, "liver.yaml")
    assert ended.returncode == 124


def test_a_night_that_is_told_to_end_takes_its_job_along(submit, tmp_path):
    with subprocess.Popen([NIGHTLY, "liver.yaml"], env=submit(score="sleep"), stderr=subprocess.DEVNULL) as process:
        _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    _until(lambda: not _alive(int((tmp_path / "pid").read_text())))


def test_a_night_that_is_told_to_end_waits_for_its_job(submit, tmp_path):
    slow = tmp_path / "slow"
    slow.write_text(f"""#!/usr/bin/env bash
trap 'sleep 1; echo >"{tmp_path}/tidied"; exit 0' TERM
echo $$ >"{tmp_path}/pid"
sleep 60 &
wait
""")
    slow.chmod(0o755)
    with subprocess.Popen([NIGHTLY, "liver.yaml"], env=submit() | {"SPARKMED_SUBMIT": str(slow)}) as process:
        _until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
    assert (tmp_path / "tidied").exists()


def test_a_checkout_with_a_space_and_options_on_several_lines(submit, asked, tmp_path):
    home = tmp_path / "my sparkmed"
    (home / "conf" / "schedules").mkdir(parents=True)
    shutil.copy(NIGHTLY, home / "conf" / "schedules")
    shutil.copytree(ROOT / "jobs", home / "jobs")
    (home / ".venv" / "bin").mkdir(parents=True)
    environment = submit()
    (tmp_path / "spark-submit").rename(home / ".venv" / "bin" / "spark-submit")
    script = home / "conf" / "schedules" / "nightly.sh"
    plain = {k: v for k, v in environment.items() if k != "SPARKMED_SUBMIT"}
    assert subprocess.run([script, "a.yaml"], env=plain, capture_output=True, timeout=60).returncode == 0
    assert [stage for stage, _ in asked()] == STAGES
    (tmp_path / "asked").unlink()
    (home / ".venv" / "bin" / "spark-submit").rename(tmp_path / "spark-submit")
    lines = plain | {
        "SPARKMED_SUBMIT": f"{tmp_path}/spark-submit --name night\n  --master yarn",
        "SPARKMED_STAGES": "score\nreport",
    }
    assert night(lines, "a.yaml").returncode == 0
    assert [stage for stage, _ in asked()] == ["score", "report"]
    assert all("--name night --master yarn --deploy-mode" in line for line in (tmp_path / "asked").read_text().splitlines())


def test_log_of_the_night_and_one_sentence(submit, tmp_path):
    logs = tmp_path / "logs"
    logs.mkdir()
    old, other = logs / "liver-2020-01-01.log", logs / "spine-2020-01-01.log"
    for path in (old, other):
        path.touch()
        os.utime(path, (0, 0))
    ended = night(submit(score="3") | {"SPARKMED_LOGS": str(logs)}, "/etc/sparkmed/liver.yaml")
    assert ended.stdout == "" and len(ended.stderr.splitlines()) == 1
    (log,) = logs.glob("liver-*.log")
    assert "liver score, attempt 1 of 3" in log.read_text() and str(log) in ended.stderr
    assert other.exists() and not old.exists()


@pytest.mark.parametrize("job", JOBS)
def test_every_job_can_be_a_stage(submit, asked, job):
    assert night(submit() | {"SPARKMED_STAGES": job}, "a", "b").returncode == 0
    assert asked() == [(job, "a b")]


def test_wrong_use_starts_nothing(submit, asked):
    assert night(submit()).returncode == 2
    ended = night(submit() | {"SPARKMED_STAGES": "catalog scoer"}, "liver.yaml")
    assert ended.returncode == 2 and "no job scoer" in ended.stderr
    for odd in ({"SPARKMED_WAIT": "1m"}, {"SPARKMED_WAIT": "08"}, {"SPARKMED_ATTEMPTS": "two"}):
        ended = night(submit(catalog="1") | odd, "liver.yaml", timeout=20)
        assert ended.returncode == 2 and "wanted a whole number" in ended.stderr
    assert asked() == []


def real_environment(**variables: str) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("SPARKMED_", "PYSPARK_", "SPARK_"))} | {
        "PYTHONPATH": str(ROOT),
        "SPARKMED_LIMIT": "400",
        **variables,
    }


@pytest.mark.engine
def test_with_the_real_spark_submit(tmp_path):
    (tmp_path / "liver.yaml").write_text(yaml.safe_dump(ct_config(ct_pairs(tmp_path / "archive", 2), tmp_path / "lake")))
    ended = night(real_environment(SPARKMED_STAGES="catalog"), tmp_path / "liver.yaml", timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert len(tables.catalog(str(tmp_path / "lake")).rows()) == 4


# cron


def here(text: str, tmp_path: pathlib.Path) -> str:
    """A line of a schedule with the places of this test in it."""
    return text.replace("/opt/sparkmed", str(ROOT)).replace("/var/lib/sparkmed", str(tmp_path))


def crontab() -> tuple[dict[str, str], list[str]]:
    """Variables, and commands with their times before them."""
    lines = [line for line in (SCHEDULES / "crontab").read_text().splitlines() if line and not line.startswith("#")]
    variables = dict(line.split("=", 1) for line in lines if re.match(r"\w+=", line))
    return variables, [line for line in lines if not re.match(r"\w+=", line)]


def test_crontab_is_what_cron_reads():
    variables, lines = crontab()
    assert variables.keys() == {"MAILTO", "SPARKMED_LOGS", "PATH"}
    assert (SCHEDULES / "crontab").read_text().endswith("\n")  # cron drops a last line without an end
    for line in lines:
        assert re.match(r"\d+ \d+ \* \* \* flock ", line) and "%" not in line  # cron ends a command at a %


def test_cron_starts_no_second_run(submit, asked, tmp_path):
    _, (line,) = crontab()
    command = ["sh", "-c", here(line.split(maxsplit=5)[5], tmp_path)]
    environment = submit(score="sleep")
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as first:
        _until(lambda: (tmp_path / "pid").exists())
        second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert (second.returncode, second.stdout.count("\n"), second.stderr) == (0, 1, "")
        assert "still at work" in second.stdout and len(asked()) == 3
        first.kill()  # the lock stays with what it started
        assert "still at work" in subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    (tmp_path / "score.ends").write_text("0\n")
    _until(lambda: subprocess.run(["flock", "-n", tmp_path / "liver.lock", "true"]).returncode == 0)
    after = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert after.returncode == 0 and "liver done" in after.stdout


# systemd

UNITS = sorted([*SCHEDULES.glob("sparkmed*"), *(CONF / "mlflow").glob("*.service")])


def unit(path: pathlib.Path) -> dict[str, list[str]]:
    """Values by key of a unit file, all sections together."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if match := re.match(r"(\w+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_has_nothing_to_say(tmp_path):
    for path in UNITS:
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/sparkmed/.venv/bin/mlflow", sys.executable))
    names = [str(tmp_path / p.name.replace("@", "@liver")) for p in UNITS]
    ended = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")
    (when,) = unit(SCHEDULES / "sparkmed@.timer")["OnCalendar"]
    assert subprocess.run(["systemd-analyze", "calendar", when], capture_output=True).returncode == 0


def test_service_keeps_the_lock_of_the_crontab(submit, asked, tmp_path):
    """systemd is no part of a test machine: its command is run with what systemd would put into it."""
    settings = unit(SCHEDULES / "sparkmed@.service")
    (command,) = settings["ExecStart"]
    assert settings["Type"] == ["oneshot"] and settings["SuccessExitStatus"] == ["75"]
    (lock,) = re.findall(r"/var/lib/sparkmed/\S+", command)
    assert lock.replace("%i", "liver") in crontab()[1][0]
    words = [w.replace("%i", "liver").replace("${CREDENTIALS_DIRECTORY}", "/run/key") for w in shlex.split(here(command, tmp_path))]
    ended = subprocess.run(words, env=submit(score="3"), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 3 and asked()[0] == ("catalog", "/etc/sparkmed/liver.yaml identity.key_file=/run/key/subject.key")
    with open(tmp_path / "liver.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert subprocess.run(words, env=submit(), capture_output=True, timeout=60).returncode == 75
    assert len(asked()) == 4


def test_alert_has_its_unit():
    (told,) = unit(SCHEDULES / "sparkmed@.service")["OnFailure"]
    assert (SCHEDULES / told.replace("%n.service", ".service")).is_file()


# Kubernetes


def cronjob() -> dict:
    return yaml.safe_load((CONF / "kubernetes" / "nightly.yaml").read_text())


def test_pod_is_the_driver_of_the_executors_of_kubernetes_conf(submit, asked):
    spec = cronjob()["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    conf = dict(re.findall(r"^(spark\.\S+)\s+(\S+)$", (CONF / "spark" / "kubernetes.conf").read_text(), re.M))
    assert container["image"] == conf["spark.kubernetes.container.image"]
    assert pod["serviceAccountName"] == conf["spark.kubernetes.authenticate.driver.serviceAccountName"]
    assert cronjob()["metadata"]["namespace"] == conf["spark.kubernetes.namespace"]
    mounts = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    claim = "spark.kubernetes.executor.volumes.persistentVolumeClaim.lake"
    assert mounts["lake"] == conf[f"{claim}.mount.path"]
    volumes = {v["name"]: v for v in pod["volumes"]}
    assert volumes["lake"]["persistentVolumeClaim"]["claimName"] == conf[f"{claim}.options.claimName"]
    assert mounts.keys() == volumes.keys() and "secret" in volumes["key"]

    dockerfile = (CONF / "kubernetes" / "Dockerfile").read_text()
    *start, program = container["command"]
    assert start[0] == "/usr/bin/tini" and " tini " in dockerfile and f"USER {pod['securityContext']['runAsUser']}" in dockerfile
    assert program.replace("/opt/sparkmed", str(ROOT)) == str(NIGHTLY)
    named = {variable["name"]: variable for variable in container["env"]}
    asks = named["SPARKMED_SUBMIT"]["value"].split()
    assert set(re.findall(r"\$\((\w+)\)", " ".join(asks))) < named.keys()
    assert subprocess.run([NIGHTLY, *container["args"]], env=submit(), capture_output=True, timeout=60).returncode == 0
    assert asked()[2] == ("score", " ".join(container["args"]))


@pytest.mark.engine
def test_spark_submit_in_the_pod(tmp_path):
    """The real one, without a cluster: it gets a pod's driver's options, and a wrong config, seen before Spark is asked for
    anything, ends the night with sparkmed's own status at the first attempt."""
    (container,) = cronjob()["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    value = {v["name"]: v.get("value") for v in container["env"]}["SPARKMED_SUBMIT"]
    value = value.replace("$(POD_IP)", "127.0.0.1").replace("$(POD_NAME)", "driver").replace("/opt/sparkmed", str(ROOT))
    value = value.replace("/etc/sparkmed/spark.conf", str(CONF / "spark" / "kubernetes.conf"))
    (tmp_path / "project.yaml").write_text("name: x\nakrive: /data\n")
    environment = real_environment(SPARKMED_SUBMIT=f"{value} --verbose", SPARKMED_STAGES="catalog")
    ended = night(environment, tmp_path / "project.yaml", timeout=500)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 2 and "did you mean archive?" in said and "again in" not in said
    for key, given in {"deployMode": "client", "master": "k8s://https://kubernetes.default.svc"}.items():
        assert re.search(rf"^ *{key} +{given}$", said, re.M), said
    for key, given in {"spark.driver.host": "127.0.0.1", "spark.kubernetes.driver.pod.name": "driver"}.items():
        assert f"({key},{given})" in said, said


def test_a_pod_is_started_again_only_where_that_helps():
    job = cronjob()["spec"]["jobTemplate"]["spec"]
    rules = {rule["action"]: rule for rule in job["podFailurePolicy"]["rules"]}
    final = rules["FailJob"]["onExitCodes"]
    assert final["operator"] == "In" and set(final["values"]) == {1, 2, 124, *LOOK}
    assert job["backoffLimit"] > 0 and job["activeDeadlineSeconds"] < 24 * 3600


# Databricks


def test_databricks_reports_whatever_happened_and_tells():
    job = yaml.safe_load((CONF / "databricks" / "databricks.yml").read_text())["resources"]["jobs"]["nightly"]
    assert job["max_concurrent_runs"] == 1
    tasks = {t["task_key"]: t for t in job["tasks"]}
    assert list(tasks) == STAGES
    assert [t for t in tasks.values() if t.get("run_if") == "ALL_DONE"] == [tasks["report"]]
    for task in tasks.values():
        assert task["email_notifications"]["on_failure"] and task["timeout_seconds"] < job["timeout_seconds"]
    for cluster in job["job_clusters"]:
        assert cluster["new_cluster"]["spark_env_vars"]["SPARKMED_KEY"] == "{{secrets/sparkmed/subject_key}}"


# Airflow

DAGS = SCHEDULES / "airflow_dags.py"


def test_dags_name_what_there_is():
    """What can be seen without Airflow."""
    tree = ast.parse(DAGS.read_text())
    constants = {n.targets[0].id: n.value for n in tree.body if isinstance(n, ast.Assign)}
    assert constants["NIGHTLY"].value.replace("/opt/sparkmed", str(ROOT)) == str(NIGHTLY)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "stage"]
    assert {"patches", "train", "promote", *STAGES} <= {call.args[0].value for call in calls} <= set(JOBS)


@pytest.fixture(scope="module")
def airflow() -> str:
    """Python of a real Airflow, which cannot live in one environment with us."""
    python = pathlib.Path(os.environ.get("SPARKMED_AIRFLOW") or ROOT / ".venv-airflow" / "bin" / "python")
    if not python.exists():
        pytest.skip(
            "needs Airflow: `make airflow`, or SPARKMED_AIRFLOW=its python; without it only the names in the DAGs were checked"
        )
    return str(python)


@pytest.mark.engine
def test_airflow_runs_the_dags(airflow, submit, asked, tmp_path):
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "airflow_dags.py").write_text(DAGS.read_text().replace("/opt/sparkmed", str(ROOT)))
    program = (
        (tmp_path / "spark-submit")
        .read_text()
        .replace("read -ra ends", '[ $stage = score ] && exit "$SCORE_ENDS_WITH"\nread -ra ends')
    )
    (tmp_path / "spark-submit").write_text(program)
    environment = {k: v for k, v in submit().items() if not k.startswith(("PYTHON", "AIRFLOW"))}
    environment |= {
        "AIRFLOW_HOME": str(tmp_path / "home"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "False",
        "AIRFLOW_VAR_SPARKMED_SUBMIT": environment.pop("SPARKMED_SUBMIT"),
        "AIRFLOW_VAR_SPARKMED_CONFIG": "/etc/the project.yaml",
    }
    command = [airflow, pathlib.Path(__file__).with_name("airflow_run.py"), tmp_path / "dags", "3", "1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    seen = json.loads(ended.stdout.splitlines()[-1])

    graph = seen["graphs"]["sparkmed_nightly"]
    assert (graph["schedule"], graph["at_once"], graph["catchup"]) == ("0 2 * * *", 1, False)
    after = {name: task["next"] for name, task in graph["tasks"].items()}
    assert after == {"catalog": ["volumes"], "volumes": ["score"], "score": ["look", "report"], "report": [], "look": []}
    assert graph["tasks"]["report"]["rule"] == "all_done" and graph["tasks"]["look"]["retries"] == 0
    for stage in STAGES:
        task = graph["tasks"][stage]
        assert task["retries"] > 0 and task["backoff"] and task["limit"]
    training = seen["graphs"]["sparkmed_training"]
    assert training["schedule"] is None and training["tasks"]["train"]["next"] == ["promote"]

    drift, failed = seen["runs"]["3"], seen["runs"]["1"]
    assert drift["run"] == "failed" and drift["tasks"]["look"][0] == "failed"
    assert {drift["tasks"][stage] == ["success", 1] for stage in STAGES} == {True}
    assert failed["run"] == "failed" and failed["tasks"]["score"] == ["failed", 2]
    assert failed["tasks"]["look"][0] == "upstream_failed" and failed["tasks"]["report"] == ["success", 1]
    assert [stage for stage, _ in asked()] == [*STAGES, "catalog", "volumes", "score", "score", "report"]
    assert {arguments for _, arguments in asked()} == {"/etc/the project.yaml"}


# all of them


@pytest.mark.parametrize("path", [*SCHEDULES.iterdir(), CONF / "kubernetes" / "nightly.yaml", *UNITS], ids=lambda p: p.name)
def test_no_secret_is_in_a_file(path):
    assert not re.search(r"SPARKMED_KEY\s*[=:]\s*[\w']|password\s*[=:]|://\w+:\w+@", path.read_text(), re.I)


def test_each_schedule_is_in_the_table():
    table = (CONF / "README.md").read_text()
    for path in [*SCHEDULES.iterdir(), CONF / "kubernetes" / "nightly.yaml", CONF / "mlflow" / "sparkmed-mlflow.service"]:
        assert path.name.removesuffix(".timer").removesuffix(".service") in table, path.name


def _until(holds, patience=60.0):
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
