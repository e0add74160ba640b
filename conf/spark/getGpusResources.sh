#!/usr/bin/env bash
# Tells Spark which GPUs this container or node has: {"name": "gpu", "addresses": ["0", "1"]}. None where there is no driver.
addresses=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | sed 's/.*/"&"/' | paste -sd, -)
printf '{"name": "gpu", "addresses": [%s]}\n' "$addresses"
