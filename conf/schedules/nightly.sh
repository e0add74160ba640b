#!/usr/bin/env bash
# One night of one project: the jobs catalog, volumes, score and report of jobs/, one after the other.
#   nightly.sh CONFIG [key=value ...]
# cron, systemd, Airflow and Kubernetes' CronJob run it; who starts it sees to it that no second one runs on the same lake meanwhile.
#
# From the environment:
#   SPARKMED_STAGES    jobs to run, "catalog volumes score report"; those of a training: "catalog volumes patches train promote"
#   SPARKMED_SUBMIT    spark-submit and its options, ".venv/bin/spark-submit --properties-file conf/spark/local.conf"
#   SPARKMED_ATTEMPTS  how often a stage is tried, 3
#   SPARKMED_WAIT      seconds before the second attempt, 60; twice as long before each further one
#   SPARKMED_LIMIT     how long one attempt may take, 4h
#   SPARKMED_LOGS      folder for a log per night, kept 60 days; then one sentence is said, when all was not well. Without it all is said
# The key of the pseudonyms is in none of them: identity.key_file in CONFIG names a file that this user alone can read.
#
# Exit status:
#   0         done
#   3, 4, 5   the scores are there and somebody should look: drift, backlog, quarantine (`sparkmed --help`); no retry helps
#   2         wrong arguments or config; no retry helps
#   others    the first stage that failed each time it was tried: 1 said by sparkmed, 124 too slow, 137 killed, 143 told to end
set -uo pipefail

home=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
# words, on one line or several
read -rd '' -a stages <<<"${SPARKMED_STAGES:-catalog volumes score report}"
submit=("$home/.venv/bin/spark-submit" --properties-file "$home/conf/spark/local.conf")
[ -z "${SPARKMED_SUBMIT:-}" ] || read -rd '' -a submit <<<"$SPARKMED_SUBMIT"
attempts=${SPARKMED_ATTEMPTS:-3} first_pause=${SPARKMED_WAIT:-60} limit=${SPARKMED_LIMIT:-4h}
# in client mode, because in cluster mode the exit status of a job is lost; the driver's Python is this machine's; Spark's own news
# would hide ours
driver=(--deploy-mode client --conf "spark.pyspark.driver.python=$home/.venv/bin/python" --conf spark.log.level=WARN)
export PYSPARK_PYTHON=${PYSPARK_PYTHON:-$home/.venv/bin/python}

[ $# -gt 0 ] || { sed -n '3s/^# */usage: /p' "${BASH_SOURCE[0]}" >&2; exit 2; }
for stage in "${stages[@]}"; do
  [ -f "$home/jobs/$stage.py" ] || { echo "nightly.sh: no job $stage in $home/jobs" >&2; exit 2; }
done
# sums are made with them: bash would drop the loop of a sum that is none, and the night would end as if it were done
for number in "SPARKMED_ATTEMPTS=$attempts" "SPARKMED_WAIT=$first_pause"; do
  [[ ${number#*=} =~ ^(0|[1-9][0-9]{0,5})$ ]] || { echo "nightly.sh: $number, wanted a whole number" >&2; exit 2; }
done
project=$(basename -- "$1")
project=${project%.*}

exec 3>&2
if [ -n "${SPARKMED_LOGS:-}" ]; then
  log=$SPARKMED_LOGS/$project-$(date +%F).log
  exec >>"$log" 2>&1 || exit 1
  find "$SPARKMED_LOGS" -maxdepth 1 -name "$project-????-??-??.log" -mtime +60 -delete
fi

child=
# told to end, it ends when the job has: what kills this script's children with it must not come before that
trap '[ -z "$child" ] || { kill "$child" 2>/dev/null; wait "$child"; }; exit 143' TERM INT HUP
waited() { # COMMAND...: its exit status; a signal to this script ends it too
  "$@" &
  child=$!
  wait "$child"
  local code=$?
  child=
  return $code
}

to_look_at() { [[ $1 == [345] ]]; }

tried() { # STAGE ARGUMENTS...: the exit status of its last attempt
  local stage=$1 pause=$first_pause attempt code
  shift
  for ((attempt = 1; ; attempt++)); do
    echo "$(date +%FT%T%z) $project $stage, attempt $attempt of $attempts"
    waited timeout --kill-after=60 "$limit" "${submit[@]}" "${driver[@]}" "$home/jobs/$stage.py" "$@"
    code=$?
    if [ $code -eq 0 ] || [ $code -eq 2 ] || to_look_at $code || [ $attempt -ge "$attempts" ]; then
      return $code
    fi
    echo "$(date +%FT%T%z) $project $stage ended with $code, again in $pause s"
    waited sleep "$pause"
    pause=$((pause * 2))
  done
}

status=0 at=
for stage in "${stages[@]}"; do
  # what failed ends the night, but for the report, which shows it
  [ $status -eq 0 ] || to_look_at $status || [ "$stage" = report ] || continue
  tried "$stage" "$@"
  code=$?
  [ $code -eq 0 ] && continue
  if [ $status -eq 0 ] || { to_look_at $status && ! to_look_at $code; }; then
    status=$code at=$stage
  fi
done

if [ $status -eq 0 ]; then
  echo "$(date +%FT%T%z) $project done"
elif to_look_at $status; then
  echo "sparkmed: $project: $at ended with $status: the scores are there, and somebody should look${log:+ at $log}" >&3
else
  echo "sparkmed: $project: $at failed with $status${log:+: see $log}" >&3
fi
exit $status
