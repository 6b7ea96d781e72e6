# Every command of the project. `just` alone lists them.

python := env("PYTHON", "python3")
binary := "target/release/hardmax"

_list:
    @just --list --unsorted

# Compile for use.
build:
    cargo build --release --locked

# All tests.
test *args:
    cargo test --locked {{ args }}

# What CI holds against the code.
lint:
    cargo fmt --all --check
    cargo clippy --all-targets --locked -- -D warnings

# Format the code.
fmt:
    cargo fmt --all

# The CUDA kernels in an emulator, each against its definition; then the server's own use of them. Needs a C++ compiler.
kernels *args:
    cargo test --locked -p hardmax-kernels --features emulated {{ args }}
    cargo test --locked --lib --features cuda-emulated gpu

# A CUDA toolkit to compile with, where there is none; the line it prints is for the shell.
cuda-toolkit dir="target/cuda-toolkit":
    kernels/toolkit.sh {{ dir }}

# Compile for the GPU that CUDA_COMPUTE_CAP names; needs nvcc and CUTLASS's headers: docs/cuda.md.
cuda-build:
    cargo build --release --locked --features cuda

# What nvcc made of the kernels: registers, spills, shared memory, tensor cores. Needs what cuda-build needs.
cuda-report:
    kernels/report.sh

# On a machine with a GPU: every kernel, the model, the engine, the measurements. Compiles nothing.
gpu-test *args:
    tests/gpu/run.sh {{ binary }} {{ args }}

# The documentation of the library.
doc *args:
    RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked {{ args }}

# Licences, bans and sources of the dependencies; needs cargo-deny.
deny:
    cargo deny --locked check

# What runs for every change.
ci:
    .ci/run

# Serve a checkpoint, the demo unless told otherwise.
serve *args:
    cargo run --release --locked -- serve {{ args }}

# Continue a text on a running server.
generate prompt *args:
    cargo run --release --locked -- generate {{ quote(prompt) }} {{ args }}

# Compare with transformers, live. Set-up: tests/parity/README.md; PYTHON is the interpreter.
parity *args: build
    {{ python }} tests/parity/check.py --binary {{ binary }} {{ args }}
    {{ python }} tests/parity/fidelity.py --binary {{ binary }}

# Look at the live page in a headless Chromium; `--screenshots docs/img` takes its pictures.
page *args: build
    tests/page/run.sh {{ binary }} {{ args }}

# Write tests/goldens again.
goldens *cases:
    {{ python }} tests/parity/make_goldens.py {{ cases }}

# A real Prometheus against running servers: page, rules, dashboard, alerts.
prometheus: build
    tests/prometheus/run.sh {{ binary }}

# Measure on this machine what a tuning job does to a server: `just tuning alongside`, `just tuning memory`, `just tuning kill`.
tuning script: build
    tests/tuning/{{ script }}.sh

# Make the text of the demo model and train it.
demo-train *args:
    models/demo/prepare.sh
    cargo run --release --locked -- train --config models/demo/train.toml {{ args }}

# Build the container image.
docker-build tag="hardmax":
    docker build -f docker/Dockerfile --build-arg REVISION="$(git rev-parse --short HEAD)" -t {{ tag }} .

# Build the container image for NVIDIA GPUs of this compute capability.
docker-build-cuda tag="hardmax:cuda" capability="90":
    docker build -f docker/Dockerfile.cuda --build-arg CUDA_COMPUTE_CAP={{ capability }} --build-arg REVISION="$(git rev-parse --short HEAD)" -t {{ tag }} .

# The entry point of that image, without a GPU, a driver or a container.
entrypoint-test:
    docker/entrypoint-test.sh

# Run the steps of the Dockerfile in a root of their own; needs root and debootstrap, no container engine.
docker-test *args:
    docker/chroot-test.sh {{ args }}
