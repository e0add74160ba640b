"""Airflow 3: ``sparkmed_nightly`` scores what is new, ``sparkmed_training`` makes a model when it is triggered.

Copy this file to the DAGs folder; the workers have /opt/sparkmed, java and the config. Two variables of Airflow say the rest:
``sparkmed_config``, the project's YAML (/etc/sparkmed/project.yaml), and ``sparkmed_submit``, spark-submit and its options, for
another place than this machine. The key of the pseudonyms is in neither: ``identity.key_file`` in the YAML names a file that the
workers have.

A stage runs as nightly.sh runs it, which says what an exit status means. 3, 4 and 5 mean that the scores are there and somebody
should look: then ``score`` is no failure and is not tried again, ``look`` fails with that status, and with it the DAG run.
"""

from datetime import timedelta

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

NIGHTLY = "/opt/sparkmed/conf/schedules/nightly.sh"
# the last line of what a task says is its result: its exit status
STAGE = f'{NIGHTLY} "$SPARKMED_CONFIG"; status=$?; echo $status; case $status in [345]) exit 0 ;; *) exit $status ;; esac'
LOOK = 'status={{ ti.xcom_pull(task_ids="score") }}; echo "score ended with $status, see nightly.sh"; exit $status'
SETTINGS = {
    "SPARKMED_CONFIG": "{{ var.value.get('sparkmed_config', '/etc/sparkmed/project.yaml') }}",
    "SPARKMED_SUBMIT": "{{ var.value.get('sparkmed_submit', '') }}",
    "SPARKMED_ATTEMPTS": "1",  # Airflow tries again, below
    "SPARKMED_LIMIT": "0",  # and ends what takes too long
}
COMMON = {
    "start_date": pendulum.datetime(2025, 1, 1, tz="UTC"),
    "catchup": False,  # one run scores all that has come since the last
    "max_active_runs": 1,  # one writes the lake at a time
    "doc_md": __doc__,
    "tags": ["sparkmed"],
    "default_args": {
        "retries": 2,
        "retry_delay": timedelta(minutes=5),
        "retry_exponential_backoff": 2.0,
        "max_retry_delay": timedelta(hours=1),
        "execution_timeout": timedelta(hours=4),
    },
}


def stage(name: str, **options) -> BashOperator:
    environment = SETTINGS | {"SPARKMED_STAGES": name}
    return BashOperator(task_id=name, bash_command=STAGE, env=environment, append_env=True, **options)


with DAG("sparkmed_nightly", schedule="0 2 * * *", dagrun_timeout=timedelta(hours=10), **COMMON):
    score = stage("score")
    stage("catalog") >> stage("volumes") >> score
    score >> stage("report", trigger_rule="all_done")  # it shows a failure too
    score >> BashOperator(task_id="look", bash_command=LOOK, retries=0)

with DAG("sparkmed_training", schedule=None, **COMMON):
    stage("catalog") >> stage("volumes") >> stage("patches") >> stage("train", execution_timeout=None) >> stage("promote")
