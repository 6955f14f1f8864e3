# podium's recipes. `just` alone lists them; each passes its arguments on untouched.

set positional-arguments

manifest := justfile_directory() / "Cargo.toml"
venv := justfile_directory() / ".venv"
vocabulary := venv / "o200k"
browser := justfile_directory() / "tests/browser"
pages := browser / "pages"

[private]
default:
    @just --list --unsorted --justfile '{{ justfile() }}'

# Run prompt files through the model: just eval dataset.jsonl [options]
[no-cd]
eval *args:
    @cargo run --release --manifest-path '{{ manifest }}' -- eval "$@"

# Set runs side by side, the first is the base: just compare RUN_A RUN_B
[no-cd]
compare *args:
    @cargo run --release --manifest-path '{{ manifest }}' -- compare "$@"

# Show bytes by class, and how many slots and positions fit
[no-cd]
plan *args:
    @cargo run --release --manifest-path '{{ manifest }}' -- plan "$@"

# Write the page of a run: just report [RUN]
[no-cd]
report *args:
    @cargo run --release --manifest-path '{{ manifest }}' -- report "$@"

# Tests that need cargo alone
test *args:
    cargo test --release --manifest-path '{{ manifest }}' "$@"

# Python with the independent implementations (numpy, pandas, torch, transformers), in .venv; a browser
setup: setup-browser
    test -x '{{ venv }}/bin/python' || python3 -m venv '{{ venv }}'
    '{{ venv }}/bin/python' -m pip install --quiet --requirement '{{ justfile_directory() }}/tests/python/requirements.txt'

# Chromium and the package that drives it; installs Chromium only where it may
[private]
setup-browser:
    test -x /usr/bin/chromium || test "$(id -u)" != 0 || (apt-get update && apt-get install --yes chromium)
    cd '{{ browser }}' && npm ci --no-audit --no-fund

# The pages in headless Chromium; fails where Chromium, node or the driver is missing
test-browser:
    PODIUM_PAGES='{{ pages }}' cargo test --release --manifest-path '{{ manifest }}' --test report -- --ignored pages_for_the_browser
    cd '{{ browser }}' && PODIUM_PAGES='{{ pages }}' node --test test.js

# All tests: also those against Python's implementations and in a browser; fails where one is missing
test-full: test test-independent

# Of all tests those that `just test` leaves out
test-independent: setup test-browser
    '{{ venv }}/bin/python' '{{ justfile_directory() }}/models/nano/data.py' --check
    PODIUM_PYTHON='{{ venv }}/bin/python' cargo test --release --manifest-path '{{ manifest }}' -- --ignored independent

# Tests on a GPU; fails where there is none. PODIUM_NVRTC may name libnvrtc.so
test-gpu *args:
    cargo test --release --manifest-path '{{ manifest }}' --test cuda --test cuda_attention --test cuda_loading --test cuda_formats --test cuda_invariance --test cuda_memory --test cuda_lost "$@" -- --ignored --test-threads 2

# Real benchmark files, read as a few lines of Python read them: just test-samples FOLDER
[no-cd]
test-samples folder:
    PODIUM_SAMPLES="$(realpath '{{ folder }}')" cargo test --release --manifest-path '{{ manifest }}' --test samples -- --ignored

# Measure the CUDA engine: just bench --workload b64,b256
[no-cd]
bench *args:
    @cargo run --release --manifest-path '{{ manifest }}' -- bench "$@"

# Make the golden files again with the independent implementations and compare
golden: setup setup-vocabulary
    TIKTOKEN_ENCODINGS_BASE='{{ vocabulary }}' '{{ venv }}/bin/python' '{{ justfile_directory() }}/tests/golden/make.py' --check

# openai-harmony's vocabulary, out of the npm package that carries its ranks
[private]
setup-vocabulary: setup
    test -s '{{ vocabulary }}/o200k_base.tiktoken' || (mkdir -p '{{ vocabulary }}' && cd '{{ vocabulary }}' \
      && npm pack --silent js-tiktoken@1.0.21 && tar xzf js-tiktoken-1.0.21.tgz package/dist/ranks/o200k_base.cjs \
      && '{{ venv }}/bin/python' '{{ justfile_directory() }}/tests/golden/make_harmony.py' \
        --ranks package/dist/ranks/o200k_base.cjs --vocabulary '{{ vocabulary }}')

# Format, lints and documentation
check:
    cargo fmt --check --manifest-path '{{ manifest }}'
    cargo clippy --release --all-targets --locked --manifest-path '{{ manifest }}' -- --deny warnings
    RUSTDOCFLAGS='--deny warnings' cargo doc --release --no-deps --locked --manifest-path '{{ manifest }}'
