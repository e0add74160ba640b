#!/usr/bin/env bash
# Init script of a Databricks cluster (15.4 LTS ML): brings its Python to requirements.lock, with the Horovod wheel and sparkmed.
# SPARKMED_SETUP is a volume with requirements.lock and wheels/.
set -euo pipefail

python=${PYTHON:-/databricks/python/bin/python}
here=$(mktemp -d)

# Spark, and what drives notebooks and the task itself, are the runtime's own: another pyspark on the path breaks the cluster.
# The rest of the list is for developers.
runtimes='pyspark|py4j|setuptools|wheel|ipykernel|ipython|ipython_pygments_lexers|jupyter_client|jupyter_core|comm|debugpy|traitlets'
runtimes+='|tornado|nest-asyncio2|matplotlib-inline|prompt_toolkit|jedi|parso|pexpect|ptyprocess|stack-data|executing|asttokens|pure_eval'
developers='pytest|pytest-timeout|pluggy|iniconfig|hypothesis|sortedcontainers|ruff|nbclient|nbformat|fastjsonschema|jsonschema|jsonschema-specifications'
developers+='|referencing|rpds-py|dcm2niix|psycopg2-binary|databricks-bundles|kubernetes-validate'
grep -vE "^(#|($runtimes|$developers)==)" "$SPARKMED_SETUP/requirements.lock" >"$here/requirements.txt"

"$python" -m pip uninstall -y -q horovod || true
# torch alone brings what it needs (CUDA on GPU clusters); the lock has all that the others need
"$python" -m pip install -q "$(grep '^torch==' "$here/requirements.txt")"
"$python" -m pip install -q --no-deps -r "$here/requirements.txt"
"$python" -m pip install -q --no-deps "$SPARKMED_SETUP"/wheels/*.whl
"$python" -c 'import sparkmed, horovod.torch, horovod.spark'
