"""Run by Airflow's Python: imports the DAGs of a folder, tells their graphs, and runs one with Airflow's own machinery.

    python airflow_run.py DAGS STATUS...

The last line is JSON: ``graphs``, and ``runs``, by the status that score.py is to end with, the states of the run and of its tasks.
"""

import datetime
import json
import os
import sys

from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.utils.db import initdb


def main(folder: str, statuses: list[str]) -> dict:
    bag = DagBag(folder)
    if bag.import_errors:
        raise SystemExit(str(bag.import_errors))
    graphs = {name: describe(dag) for name, dag in bag.dags.items()}
    initdb()
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, "dags-folder", None)
    dag = bag.dags["sparkmed_nightly"]
    for task in dag.tasks:  # as given, but without the minutes between attempts
        task.retry_delay, task.retries = datetime.timedelta(0), min(task.retries, 1)
    runs = {}
    for day, status in enumerate(statuses, start=1):
        os.environ["SCORE_ENDS_WITH"] = status
        run = dag.test(logical_date=datetime.datetime(2025, 1, day, tzinfo=datetime.UTC))
        tasks = {i.task_id: [str(i.state), i.try_number] for i in run.get_task_instances()}
        runs[status] = {"run": str(run.state), "tasks": tasks}
    return {"graphs": graphs, "runs": runs}


def describe(dag) -> dict:
    tasks = {
        t.task_id: {
            "next": sorted(t.downstream_task_ids),
            "rule": str(t.trigger_rule.value),
            "retries": t.retries,
            "backoff": bool(t.retry_exponential_backoff),
            "limit": t.execution_timeout and t.execution_timeout.total_seconds(),
        }
        for t in dag.tasks
    }
    return {"schedule": dag.schedule, "at_once": dag.max_active_runs, "catchup": dag.catchup, "tasks": tasks}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2:])))
