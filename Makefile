# Two commands: `make` runs both hypotheses at laptop scale and builds the book, `make test` passes the tests. Each sets itself up once.
PYTHON ?= python3
BIN := .venv/bin
# Modules are compiled when they are first imported, and kept: most of those that come with the libraries never are.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check --no-compile

.PHONY: all h1 h2 book test lab clean
all: h1 h2 book
h1 h2: .venv/.ready
	$(BIN)/flashoptim-nb run $@ --preset laptop
	$(BIN)/flashoptim-nb verdict $@

book: .venv/.ready
	$(BIN)/flashoptim-nb book

# The book executes every notebook, and a cell whose assertion fails is named: nothing is executed a second time.
# One thread a process: two workers run tests beside each other, and threads that wait for a core cost more than they give.
test: export OMP_NUM_THREADS = 1
# The book first, in the environment that a reader has, which lacks what only tests need.
test: .venv/.ready
	$(BIN)/flashoptim-nb book
	@$(MAKE) --no-print-directory .venv/.ready-test
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations 25 tests

lab: .venv/.ready
	$(INSTALL) -e '.[all,lab]'
	$(BIN)/jupyter lab nbs

# The version check comes first: an older Python would fail much later, with a message about something else.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || { echo "Python's venv module is needed; on Debian and Ubuntu: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.ready: .venv/bin/python settings.ini setup.py
	@echo "Setting up .venv (some minutes, once)"
	$(INSTALL) -e '.[all]'
	@touch $@

.venv/.ready-test: .venv/bin/python settings.ini setup.py
	@echo "Setting up .venv with what the tests need (some minutes, once)"
	$(INSTALL) -e '.[all,test]'
	@touch .venv/.ready $@

clean:
	rm -rf .venv _book .book-cache
