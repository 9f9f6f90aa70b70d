# Two commands do everything on a fresh machine: `make serve` and `make test`.
# They need Python 3.11 or newer with venv, and a package index.

PYTHON ?= python3
HOST   ?= 127.0.0.1
PORT   ?= 3000
IMAGES ?= digits
# Digits and MNIST have their own encoder. All other pictures use the encoder for photographs, built below.
PHOTOS := .lookalike/models/photos
MODEL  ?= $(if $(filter-out digits digits[% mnist/%,$(IMAGES)),$(PHOTOS),models/digits)

# RUNTIME=openvino serves from an environment of its own, which has OpenVINO beside onnxruntime.
RUNTIME ?=
SERVING := .venv-serve$(if $(filter openvino,$(RUNTIME)),-openvino)

# Of the image. Podman's own format holds no health check, and its cache takes layers of another commit.
ACCELERATOR ?= cpu
EXTRAS  ?=
VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"$$/\1/p' service/__init__.py)
COMMIT  := $(shell git rev-parse HEAD 2>/dev/null)
BUILDER ?= $(firstword $(foreach tool,podman docker buildah,$(if $(shell command -v $(tool)),$(tool))))

# Containers often forbid bytecode. The tests start hundreds of processes, and each is seconds faster with it.
unexport PYTHONDONTWRITEBYTECODE

# Debian's packages docker-compose and prometheus have these tools. $(1) is the tool, $(2) what it is asked.
if-there = if command -v $(1) >/dev/null; then $(1) $(2); else echo "not checked: there is no $(1)"; fi
# Kubernetes has no schema of kustomize's and the Prometheus operator's own kinds.
MANIFESTS = $(shell find deploy/kubernetes -name '*.yaml' ! -name kustomization.yaml ! -name service-monitor.yaml)

.DEFAULT_GOAL := help
.PHONY: help serve test test-all test-scale test-openvino check survive proofs fuzz-api generated-client fuzz-pictures guards slow-clients kills \
        kills-http kills-embed power-loss disk-errors damaged-snapshots many-at-once wild bench-serve bench-search soak figures image image-test sbom \
        setup setup-serve lock clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

# The store's name contains a checksum of its pictures' path and its encoder, so a new encoder gets a new store.
serve: setup-serve $(filter $(PHOTOS),$(MODEL)) ## serve the demo gallery, or IMAGES=folder; MODEL= PORT= HOST= RUNTIME=openvino
	@key=$$( (cat "$(MODEL)/model.onnx" "$(MODEL)/preprocessor_config.json"; realpath "$(IMAGES)") | cksum); \
	store=".lookalike/$$(basename "$(IMAGES)")-$${key%% *}"; \
	$(SERVING)/bin/lookalike index "$(IMAGES)" --model "$(MODEL)" --store "$$store" || [ $$? = 1 ] || exit 2; \
	exec $(SERVING)/bin/lookalike serve --model "$(MODEL)" --store "$$store" --host "$(HOST)" --port "$(PORT)"

$(PHOTOS): requirements/serve-cpu.txt service/encoding/pretrained.json | setup-serve
	@rm -rf $@
	$(SERVING)/bin/lookalike import efficientnet-lite0 --out $@

# Each worker of pytest has one core, so the threads of FAISS, scikit-learn and torch would only wait for one another.
test: export OMP_NUM_THREADS = 1
test-all: export OMP_NUM_THREADS = 1

test: setup ## run the tests that find most faults, in a few minutes
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile -m "not proof and not slow"

test-all: setup requirements/node_modules/.done ## run every test that this machine has the means for
	.venv/bin/python -m pytest --numprocesses auto --dist loadfile

test-scale: .venv-scale/.done ## run the tests of the store on Milvus and of embedding on Ray
	.venv-scale/bin/python -m pytest tests/scale tests/service/store/test_contract.py

test-openvino: .venv-openvino/.done ## run the tests of encoders in OpenVINO
	.venv-openvino/bin/python -m pytest tests/service/encoding/test_openvino.py

check: setup requirements/node_modules/.done ## lint, types of Python and of the page, import rules, files for operators
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/node requirements/node_modules/typescript/bin/tsc -p tsconfig.json
	.venv/bin/lint-imports
	.venv/bin/bandit --quiet --recursive --configfile pyproject.toml service training lookalike.py
	.venv/bin/hadolint Dockerfile
	.venv/bin/kubernetes-validate --strict --quiet $(MANIFESTS)
	$(call if-there,docker-compose,--profile gpu --profile scale config --quiet)
	$(call if-there,promtool,check rules deploy/alerts.yaml)
	$(call if-there,promtool,check config deploy/prometheus.yml)

survive: setup ## kill a training run 20 times with -9, and compare its result with an undisturbed run
	LOOKALIKE_KILLS=20 .venv/bin/python -m pytest tests/training/test_survival.py --timeout 1800

# CI runs the short forms; LONG=1 runs the forms of a release.
proofs: fuzz-api generated-client fuzz-pictures guards slow-clients kills kills-http kills-embed power-loss disk-errors damaged-snapshots many-at-once wild ## all below

fuzz-api: setup ## send requests derived from our OpenAPI document; LONG=1 for 500 of each, three seeds
	$(if $(LONG),LOOKALIKE_EXAMPLES=500 LOOKALIKE_SEEDS=3) .venv/bin/python -m pytest -m proof tests/proofs/test_openapi.py

generated-client: setup ## add, filter, patch and delete with a typed client that is generated from the document
	.venv/bin/python -m pytest -m proof tests/proofs/test_generated_client.py

fuzz-pictures: setup ## send 2,000 mutated pictures; LONG=1 for 20,000
	$(if $(LONG),LOOKALIKE_MUTATIONS=20000) .venv/bin/python -m pytest -m proof tests/proofs/test_mutated_pictures.py

guards: setup ## take out one guard at a time, and see a test notice
	.venv/bin/python -m pytest -m proof -s tests/proofs/test_guards.py

slow-clients: setup ## ordinary requests beside 200 slow uploads and 500 unfinished headers; LONG=1 for 60 s each
	.venv/bin/python -m benchmarks.slow_clients --seconds $(if $(LONG),60,10)

kills: setup ## kill -9 a process that writes a store, at 25 named points and at random; LONG=1 for 2,000 times
	$(if $(LONG),LOOKALIKE_KILLS=2000) .venv/bin/python -m pytest -m proof -s tests/proofs/test_kill.py

kills-http: setup ## kill -9 the whole service under load, and make its clock jump by a day; LONG=1 for 200 times
	$(if $(LONG),LOOKALIKE_KILLS=200) .venv/bin/python -m pytest -m proof -s tests/proofs/test_kill_http.py

kills-embed: setup ## kill -9 `lookalike embed` 10 times and resume it; LONG=1 for 200 times
	$(if $(LONG),LOOKALIKE_KILLS=200) .venv/bin/python -m pytest -m proof -s tests/proofs/test_kill_embed.py

power-loss: setup ## a disk that loses and tears unsynced writes; LONG=1 for 300 times each
	$(if $(LONG),LOOKALIKE_POWER_LOSSES=300) .venv/bin/python -m pytest -m proof -s tests/proofs/test_power_loss.py

disk-errors: setup ## EIO and ENOSPC at 25 of the first 200 writes and syncs; LONG=1 for each of them
	$(if $(LONG),LOOKALIKE_ERRORS_STEP=1) .venv/bin/python -m pytest -m proof -s tests/proofs/test_disk_errors.py

damaged-snapshots: setup ## 300 damaged snapshots, half with a correct checksum; LONG=1 for 10,000
	$(if $(LONG),LOOKALIKE_MUTATIONS=10000) .venv/bin/python -m pytest -m proof -s tests/proofs/test_damaged_snapshots.py

many-at-once: setup ## 4 writers and 8 readers against plain NumPy for 10 s; LONG=1 for 10 minutes
	$(if $(LONG),LOOKALIKE_SECONDS=600) .venv/bin/python -m pytest -m proof -s tests/proofs/test_many_at_once.py

wild: setup ## 2,000 odd folders, archives, tables and pictures against a plain reading of them; LONG=1 for 50,000
	$(if $(LONG),LOOKALIKE_CASES=50000) .venv/bin/python -m pytest -m proof -s tests/proofs/test_wild.py

bench-serve: setup ## measure the service against its peers and limits; LONG=1 for three turns
	.venv/bin/python -m benchmarks.serve $(if $(LONG),--turns 3)

bench-search: .venv-bench/.done ## measure the store against peers in WORK=folder; COUNT=100000 is quick; ARGS="--only http"
	.venv-bench/bin/python -m benchmarks.search --work $(or $(WORK),data/search) --count $(or $(COUNT),1000000) $(ARGS)

soak: setup ## measure memory, threads and descriptors in ten minutes of mixed load; LONG=1 for thirty
	.venv/bin/python -m benchmarks.soak --minutes $(if $(LONG),30,10)

figures: setup ## measure the shipped encoder on all of MNIST; LOOKALIKE_TEST_DATA names its folder
	LOOKALIKE_FIGURES=1 .venv/bin/python -m pytest tests/docs/test_readme.py -k figures --timeout 1200

image: ## build the image with podman, docker or buildah; ACCELERATOR=gpu or openvino, EXTRAS=milvus
	$(BUILDER) build $(if $(filter docker,$(BUILDER)),,--format docker --layers=false) $(foreach name,ACCELERATOR EXTRAS VERSION COMMIT, \
	  --build-arg $(name)=$($(name))) -t lookalike:$(VERSION) -t lookalike .

image-test: setup ## build the image and test it as an operator runs it, with podman or docker; LONG=1 builds it twice
	$(if $(LONG),LOOKALIKE_TWO_BUILDS=1) .venv/bin/python -m pytest -m proof -s tests/deploy/test_image.py tests/deploy/test_bento_image.py

sbom: image ## write the image's list of packages to sbom.cdx.json, as CycloneDX
	$(BUILDER) run --rm --entrypoint cat lookalike /app/sbom.cdx.json > sbom.cdx.json

setup-serve: $(SERVING)/.done ## make .venv-serve: the serving set, without torch; RUNTIME=openvino
setup: .venv/.done ## make .venv: training, serving and test tools

.venv-serve/.done: requirements/serve-cpu.txt pyproject.toml
.venv/.done: requirements/dev.txt pyproject.toml
.venv-bench/.done: requirements/bench-search.txt pyproject.toml
.venv-scale/.done: requirements/scale.txt pyproject.toml
.venv-serve-openvino/.done: requirements/serve-openvino.txt pyproject.toml
.venv-openvino/.done: requirements/openvino.txt pyproject.toml

# One recipe makes every environment from its lock. The lock holds all dependencies, so the project itself is installed
# without any. The recipe writes .done last, so make repeats a failed set-up.
.venv-serve/.done .venv/.done .venv-bench/.done .venv-scale/.done .venv-serve-openvino/.done .venv-openvino/.done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(@D)/bin/uv pip install --quiet --python $(@D) --require-hashes -r $<
	$(@D)/bin/uv pip install --quiet --python $(@D) --no-deps --no-build-isolation --editable .
	@touch $@

# TypeScript checks the page's types. Nothing of it is served.
requirements/node_modules/.done: requirements/package-lock.json | setup
	PATH="$(CURDIR)/.venv/bin:$$PATH" npm ci --prefix requirements --no-audit --no-fund --loglevel error
	@touch $@

COMPILE = .venv-serve/bin/uv pip compile --python-version 3.11 --generate-hashes --no-header --quiet --upgrade
lock: .venv-serve/.done ## compile requirements/*.txt from pyproject.toml (hashes, no index address), and list the licences
	for set in "serve-cpu --extra cpu --extra demo --group build" "serve-gpu --extra gpu --extra demo --group build" \
	    "serve-openvino --extra cpu --extra openvino --extra demo --group build" \
	    "image-cpu --extra cpu" "image-openvino --extra cpu --extra openvino" "image-gpu --extra gpu" "image-cpu-milvus --extra cpu --extra milvus" \
	    "train --extra cpu --extra demo --extra train --group build" \
	    "dev --extra cpu --extra demo --extra train --extra dev --group build" \
	    "openvino --extra cpu --extra openvino --extra demo --extra train --extra dev --group build" \
	    "scale --extra cpu --extra demo --extra milvus --extra ray --extra scale --group build" \
	    "bench-search --extra cpu --extra demo --extra train --extra dev --extra bench-search --group build"; do \
	  $(COMPILE) pyproject.toml $${set#* } -o requirements/$${set%% *}.txt || exit 2; \
	done
	$(COMPILE) --group build --group image -o requirements/image-build.txt
	$(MAKE) setup-serve
	.venv-serve/bin/python requirements/licences.py

clean: ## remove the environments and the files that serving made
	rm -rf .venv .venv-serve .venv-serve-openvino .venv-openvino .venv-bench .venv-scale .lookalike
