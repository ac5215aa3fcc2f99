# The commands of this project. They all run on a CPU; on a GPU: pip install -e '.[cuda,dev]'.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo playground screenshots test test-browser test-dashboard test-matrix soak soak-server fuzz check bench bench-grid bench-more bench-attention clean

install: $(STAMP)

$(STAMP): requirements/cpu.txt requirements/install.sh requirements/vllm_shim/pyproject.toml pyproject.toml
	sh requirements/install.sh $(VENV)
	touch $@

demo: install
	$(BIN)/lora-drop demo

# the same model on a page, beside its base model
playground: install
	$(BIN)/lora-drop playground

# tests run in JOBS processes of one thread each; the system places vLLM's workers
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind $(BIN)/pytest -n $(JOBS) --dist loadfile
V2 := VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1

# all tests, then those of the model runners once more under Model Runner V2 in Triton's interpreter
test: install check
	$(PYTEST)
	$(V2) $(PYTEST) -m runners

# the playground's page in Chromium; installs what is missing of Playwright's client and the browser
define browser
command -v chromium >/dev/null || $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get install -y chromium
$(BIN)/python -m pip install --quiet 'playwright>=1.60,<2'
endef

test-browser: install
	$(browser)
	$(PYTEST) -m browser

# every query of the Grafana dashboard, against a real Prometheus; installs it where it is missing
test-dashboard: install
	command -v prometheus >/dev/null || $$([ "$$(id -u)" = 0 ] || echo sudo) apt-get install -y prometheus
	$(PYTEST) tests/server/test_compatibility.py -k dashboard

# the playground's pictures in docs/
screenshots: install
	$(browser)
	$(BIN)/python tests/playground/screenshots.py

# the settings that `make test` leaves out, above all the real model in each of them
test-matrix: install
	$(PYTEST) --matrix -m matrix
	$(V2) $(PYTEST) --matrix -m "matrix and runners"

# random lives of the scheduler and random workloads, 100 times as many as in `make test`; another
# FIRST_SEED gives others
EFFORT ?= 100
FIRST_SEED ?= 0
soak: install
	$(BIN)/pytest --effort $(EFFORT) --first-seed $(FIRST_SEED) tests/engine/test_scheduler_model.py \
		tests/engine/test_random_workloads.py

# 100,000 adapters and settings, most of them broken
fuzz: install
	$(BIN)/pytest --effort 50 --first-seed $(FIRST_SEED) tests/method/test_adapter_folder.py

# half an hour of mixed traffic at a server: memory, blocks, errors, latency
soak-server: install
	$(BIN)/python benchmarks/soak.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# a served model on a CPU: 20 minutes on 2 cores, 18 GB; docs/measuring.md says how
BENCH := $(BIN)/python benchmarks/serve_latency.py --dtype float32
bench: install
	$(BENCH) --context 32 --tokens 17 --rounds 30 --kv-tokens 480
	$(BENCH) --model 1b --context 16 --tokens 12 --rounds 12 --kv-tokens 0
	$(BIN)/python benchmarks/kv_saving.py
	$(BIN)/python benchmarks/record.py

# speed and KV over rho and k (Table III without quality), which need no adapter: half an hour
bench-grid: install
	for rho in 0.25 0.5 0.75; do $(BIN)/python benchmarks/decode_latency.py --dtype float32 \
		--rho $$rho --k 1 2 3 5 --prompt 16 --tokens 13 --rounds 40 || exit 1; done
	$(BIN)/python benchmarks/kv_saving.py --rho 0.25 0.5 0.75 --k 1 2 3 5
	$(BIN)/python benchmarks/record.py
	$(BIN)/python benchmarks/quality_tables.py

# the engine alone, peers, vLLM's own clients, capacity, parts of a step: 38 minutes
bench-more: install
	$(BIN)/python benchmarks/decode_latency.py --dtype float32 --batch 4 --prompt 16 --tokens 13 \
		--rounds 40
	$(BENCH) --peers --vllm-bench --concurrency 1 --context 32 --tokens 33 --rounds 15
	$(BIN)/python benchmarks/capacity.py --pool-mb 32 --tokens 256
	$(BIN)/python benchmarks/step_breakdown.py
	$(BIN)/python benchmarks/record.py

# layers that drop whole beside their attention alone: contexts up to 8 x 8192 tokens, KV, capacity;
# docs/measuring.md says how long its parts take
bench-attention: install
	for injection in block attn; do $(BIN)/python benchmarks/decode_latency.py --model 1b \
		--injection $$injection --batch 1 8 --prompt 128 1024 4096 8192 --filled --tokens 13 \
		--rounds 5 || exit 1; done
	$(BIN)/python benchmarks/decode_latency.py --dtype float32 --injection attn --prompt 16 \
		--tokens 13 --rounds 40
	$(BIN)/python benchmarks/kv_saving.py --injection attn
	$(BIN)/python benchmarks/capacity.py --pool-mb 32 --tokens 256 --injection attn
	$(BIN)/python benchmarks/record.py

clean:
	rm -rf $(VENV) build *.egg-info
