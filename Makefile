# make demo   from a bare machine to a moving arm      make demo FRESH=1   start over
#             make demo IMAGES=1   the same, with a goal that only the camera shows (half an hour)
# make test   unit tests and graph tests, but the long ones
# make soak   the long ones (half an hour; IL_SOAK_MINUTES=0.5: 12 minutes), and docs/safety.md from what they measured
SHELL := /bin/bash
.PHONY: demo test soak setup clean

demo: setup
	@. ./env.sh && exec python -m il_runtime.demo --setup-seconds "$$(cat .venv/seconds)" $(if $(IMAGES),--images) $(if $(FRESH),--fresh)

test: setup
	@. ./env.sh; failed=0; \
	OMP_NUM_THREADS=1 python -m pytest -n logical --dist worksteal test/unit || failed=1; \
	python -m pytest test/graph -m 'not shown and not long' && exit $$failed

soak: setup
	@rm -rf log/faults; . ./env.sh; failed=0; \
	python -m pytest test/unit -m shown || failed=1; \
	python -m pytest test/graph -m 'shown or long' || failed=1; \
	python -m pytest test/soak || failed=1; \
	python test/safety_table.py && exit $$failed

setup:
	@bash setup.sh

clean:
	rm -rf .venv build install log demo_out
