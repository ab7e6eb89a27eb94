# make demo   from a bare machine to a moving arm      make demo FRESH=1   start over
# make test   unit tests and graph tests
SHELL := /bin/bash
.PHONY: demo test setup clean

demo: setup
	@. ./env.sh && exec python -m il_runtime.demo --setup-seconds "$$(cat .venv/seconds)" $(if $(FRESH),--fresh)

test: setup
	@. ./env.sh && exec python -m pytest test/unit test/graph

setup:
	@bash setup.sh

clean:
	rm -rf .venv build install log demo_out
