#!/bin/sh
# Makes the secrets of the cluster profile of docker-compose.yml: random, one file each, in deploy/secrets. Files that
# are there already stay as they are.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
# Containers read their files as users of their own: the folder is what keeps other users of this host out.
chmod 700 secrets

secret() { # NAME, and the content on standard input
    [ -e "secrets/$1" ] || cat >"secrets/$1"
    chmod 444 "secrets/$1"
}
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }

random | secret postgres_password
random | secret s3_access_key
random | secret s3_secret_key
random | secret grafana_password
random | secret ray_token
printf 'postgresql+psycopg://batchserve:%s@postgres/batchserve' "$(cat secrets/postgres_password)" | secret database
printf '{"identities": [{"name": "batchserve", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin"]}]}' \
    "$(cat secrets/s3_access_key)" "$(cat secrets/s3_secret_key)" | secret s3_identities
