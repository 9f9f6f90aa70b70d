#!/bin/sh
# Runs while `bentoml containerize` builds an image: a volume for the store takes its owner from this folder.
set -eu
install -d -o bentoml -g bentoml /home/bentoml/store
