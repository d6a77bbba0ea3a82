# The few commands of every day. Each does the set-up that it needs by itself.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The Python that .venv is made with; never the one in .venv, also where that is active
PYTHON ?= $(shell PATH="$(subst $(CURDIR)/.venv/bin:,,$(PATH))" command -v python3)
IMAGE ?= mixtral-trainer:release
WORKERS ?= 2
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# This project's settings, whatever the user's own are. Where everybody may write, Ansible takes them by name only.
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
unexport ANSIBLE_COLLECTIONS_PATH
# Where an image's archive is kept that is being shipped
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mixtral-tpu

READY := .venv/ready
BROWSER := /usr/bin/chromedriver

##@ Use it
.PHONY: train
train: $(READY) ## Set everything up, then train a small Mixtral on this machine
	ansible-playbook site.yml
	ansible-playbook train.yml -e gmm=true

.PHONY: doctor
doctor: $(READY) ## Check the stack: versions, imports, and its kernels for a TPU
	ansible-playbook doctor.yml

.PHONY: stop
stop: $(READY) ## Stop the training on this machine
	ansible-playbook stop.yml

.PHONY: once
once: $(READY) ## Create a TPU slice, train, delete the slice: make once SLICE='-e accelerator_type=v5p-16'
	@playbooks/train_and_delete.sh

.PHONY: simulated-slice
simulated-slice: $(READY) ## Start containers that stand in for TPU VMs: make simulated-slice WORKERS=4
	ansible-playbook -i inventory/simulated molecule/shared/create.yml -e simulated_workers=$(WORKERS)

.PHONY: simulated-slice-down
simulated-slice-down: $(READY) ## End the simulated slice
	ansible-playbook -i inventory/simulated molecule/shared/destroy.yml

.PHONY: slice slice-down
slice slice-down:
	@echo 'make $@ is called make simulated-$@: it makes containers on this machine, which cost nothing.' \
	  'A slice of TPUs, which costs money, is what slice.yml makes.' >&2; exit 2

.PHONY: setup
setup: $(READY) ## Make .venv, the controller's environment

##@ Check it
.PHONY: test
test: ## Set everything up, then run every check; the last lines say what took how long
	@$(PYTHON) tests/gate.py

.PHONY: quick
quick: lint unit ## Lint and unit tests: what needs no engine and no image

.PHONY: lint
lint: $(READY) ## Python, Ansible, the changelog, and whether generated files are up to date
	ruff check
	ruff format --check
	ansible-lint
	antsibull-changelog lint
	python -m docs.generate --check

.PHONY: unit
unit: $(READY) ## Unit tests
	pytest --numprocesses=auto

.PHONY: site
site: $(READY) ## Bring this machine to the described state: engine, configuration, trainer image
	ansible-playbook site.yml

# One process per device count, which XLA reads once. On eight and on one, what sharding could change.
.PHONY: test-stack
test-stack: $(READY) ## The trainer's own tests, inside its image, on this tree
	$(call in_image,4) tests/trainer/stack --ignore tests/trainer/stack/test_model.py
	$(call in_image,8) tests/trainer/stack/test_model.py
	$(call in_image,1) tests/trainer/stack/test_model.py tests/trainer/stack/test_optimizer.py

# Beside the scenarios, of which some are timed, it gets what they leave of the processors.
in_image = docker run --rm --cpu-shares 512 --volume "$(CURDIR):/src:ro" --workdir /src \
  --env CPU_NUM_DEVICES=$1 --env PYTHONDONTWRITEBYTECODE=1 \
  --entrypoint python $(IMAGE) -m pytest -p no:cacheprovider --durations=10

.PHONY: molecule
molecule: $(READY) ## The playbooks against two simulated slices, and every fault
	molecule destroy
	molecule test --scenario-name default --destroy never --no-command-borders
	$(SECOND) molecule/shared/create.yml molecule/shared/layers.yml site.yml
	pytest --numprocesses=2 --verbose --durations=20 molecule
	$(SECOND) molecule/shared/destroy.yml
	molecule destroy

# Most of a scenario is waiting, so two go side by side. A slice for each: the second one's workers are fresh
# containers that share the first one's layers.
SECOND := SIMULATED_NAME=sim2 ansible-playbook -i inventory/simulated

.PHONY: e2e
e2e: $(READY) $(BROWSER) ## A short training run from end to end, looked at in a browser
	pytest --exitfirst --capture=no tests/end_to_end

##@ Work on it
.PHONY: docs
docs: $(READY) ## Write what is generated: files that list the flags, roles' READMEs, docs/variables.md
	python -m docs.generate

.PHONY: lock
lock: $(READY) ## Write the lock files anew, with the newest versions that pyproject.toml allows
	$(COMPILE) --output-file requirements-lock.txt
	$(COMPILE) --extra dev --output-file requirements-dev.txt
	runtime/requirements/lock.sh

COMPILE := uv pip compile pyproject.toml requirements.txt --quiet --upgrade --generate-hashes --no-emit-index-url \
  --python-version 3.11 --custom-compile-command 'make lock'

.PHONY: release
release: $(READY) ## Release what is committed: make release VERSION=1.2.3
	@changelogs/release.sh '$(VERSION)'

.PHONY: clean
clean: ## Remove what set-up and tests have left; the trainer image and runs/ stay
	if [ -e $(READY) ]; then \
	  for name in sim sim2; do SIMULATED_NAME=$$name \
	    ansible-playbook -i inventory/simulated molecule/shared/destroy.yml -e simulated_keep_images=false; done; \
	fi
	rm -rf .venv .cache .ansible .pytest_cache .ruff_cache "$(CACHE)"

.PHONY: help
help:
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@/ { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z0-9-]+:.*## / { printf "  make %-22s %s\n", $$1, $$2 }' Makefile

# Made without pip, because Debian's Python has none to give unless python3-venv is installed; the lock
# file brings it. The dots say that it moves, one for each package.
$(READY): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  f"Python {sys.version.split()[0]} is too old: 3.11 or newer is needed. Try make PYTHON=python3.11")'
	@echo "Making .venv with $$($(PYTHON) --version), about half a minute"
	@$(PYTHON) -m venv --without-pip .venv
	@$(PYTHON) -m pip --python .venv/bin/python install --require-hashes --progress-bar off \
	  --requirement requirements-dev.txt 2> .venv/pip.log \
	  | awk '/^Collecting/ { printf "."; fflush() } END { print "" }' \
	  || { cat .venv/pip.log >&2; exit 1; }
	@touch $@

$(BROWSER):
	apt-get update -qq
	apt-get install --yes -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core
