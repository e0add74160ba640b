# Two commands: `make demo` and `make test`. `make help` lists the rest.
.PHONY: help demo test lint horovod environment airflow clean
.DEFAULT_GOAL := help
# the tests are some hundred processes: what they import is compiled once
unexport PYTHONDONTWRITEBYTECODE

help: ## what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: environment ## a phantom archive and the whole path on it (DIR=folder)
	.venv/bin/sparkmed demo $(if $(DIR),"$(DIR)")

test: environment .venv/spark.jsa ## all tests (ARGS="tests/imaging -k resample" for some; SPARKMED_TEST_DATA=folder for those on real data)
	.venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

.venv/spark.jsa: requirements.lock tests/class_archive.py | environment
	.venv/bin/python tests/class_archive.py $@

lint: environment ## what ruff says
	.venv/bin/ruff check .

horovod: environment ## the Horovod wheel for this torch; prints where it is
	@.venv/bin/python conf/environment/horovod_wheel.py

environment: ## .venv as requirements.lock wants it; nothing when it is there
	@python=$$(bash conf/environment/check.sh) && "$$python" conf/environment/install.py

airflow: ## .venv-airflow, with which the tests run the DAGs; without it they say that they did not
	@cmp -s conf/schedules/airflow.lock .venv-airflow/airflow.lock || { python=$$(bash conf/environment/check.sh) && \
	  "$$python" -m venv --clear .venv-airflow && .venv-airflow/bin/python -m pip install -qq -r conf/schedules/airflow.lock && \
	  cp conf/schedules/airflow.lock .venv-airflow/; }

clean: ## remove .venv and what the tools left; the Horovod wheel stays in its cache
	rm -rf .venv .venv-airflow build dist *.egg-info .pytest_cache .ruff_cache .hypothesis spark-warehouse
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
