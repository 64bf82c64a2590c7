# make demo    see the whole story on this machine, without an account
# make test    run the tests
# make lint    check style, types and what is known to be unsafe
# make audit   ask PyPI for known holes in the packages that runner.py needs
# make race    run the tests that need the machine to themselves: many runners at one queue, greedy agents
# make browser look at the status page with Chromium, which must be installed
# make agents  have real coding agents make pull requests, with a scripted model; AGENTS="codex aider" takes some
# make docker  try the image and the compose file on a Docker engine; PARTS="demo replicas" takes some of it
# make soak    run 2,000 small tasks in one runner and see what grows; TASKS=200 runs fewer
# make wake    measure how long it takes from a webhook to a claim
# make bench   measure what a task costs, in a quarter of an hour, and write bench/results.md
# make bench-smoke  the same in little; it fails on counts, never on times
# make release-check  say whether the tree is ready to be released, and what is missing
# make clean   remove what these made
#
# They need Python 3.11 or newer, git and make; PYTHON=python3.12 picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin
TASKS := 2000
AGENTS :=
PARTS :=

.PHONY: demo test race browser agents docker lint audit soak wake bench bench-smoke release-check clean

demo: .venv/runtime
	$(BIN)/python tests/demo.py

test: .venv/development
	$(BIN)/python -m pytest -n auto -m "not race and not browser" --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

race: .venv/development
	$(BIN)/python -m pytest -m race

browser: .venv/development
	$(BIN)/python -m pytest -m browser

agents: .venv/development
	$(BIN)/python tests/agents.py $(AGENTS)

docker: .venv/development
	$(BIN)/python tests/docker.py $(PARTS)

# What looks like a password in tests is none.
lint: .venv/development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/bandit -q -c pyproject.toml -r ./runner.py ./bench ./.ci/release_check.py
	$(BIN)/bandit -q -c pyproject.toml -s B105,B106,B107 -r ./tests
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck --severity=warning .ci/run .ci/engine

audit: .venv/development
	$(BIN)/python .ci/audit.py

soak: .venv/development
	PYTHONPATH=tests $(BIN)/python bench/soak.py $(TASKS)

wake: .venv/development
	PYTHONPATH=tests $(BIN)/python bench/wake.py

bench: .venv/development
	PYTHONPATH=.:tests $(BIN)/python bench/bench.py

bench-smoke: .venv/development
	PYTHONPATH=.:tests $(BIN)/python bench/bench.py --smoke

release-check: | .venv/bin/python
	$(BIN)/python .ci/release_check.py

clean:
	rm -rf .venv .agents .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage* __pycache__ tests/__pycache__ bench/__pycache__

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/development: requirements.txt requirements-dev.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

